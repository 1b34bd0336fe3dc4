"""The names of a graph's inputs, and the shapes of what comes out."""

from __future__ import annotations

import pytest

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.packaging.schema import Schema, features_of


@pytest.mark.parametrize(
    ("columns", "inputs"),
    [
        (["hour", "_x9"], ["hour", "_x9"]),
        (["dep hour", "größe (mm)", "1st", ""], ["dep_hour", "gr__e__mm_", "_1st", "_"]),
        (["a b", "a_b", "a-b"], ["a_b", "a_b_2", "a_b_3"]),
        (
            ["label", "label_2", "probabilities", "prediction"],
            ["label_2", "label_2_2", "probabilities_2", "prediction_2"],
        ),
    ],
)
def test_every_feature_has_an_input_of_its_own_that_any_client_can_name(
    columns: list[str], inputs: list[str]
) -> None:
    features = features_of(DatasetInfo(features=columns, categorical=columns[:1]))
    assert [f.name for f in features] == columns
    assert [f.input for f in features] == inputs
    assert [f.kind for f in features] == ["category", *["number"] * (len(columns) - 1)]


def test_a_classification_gives_a_column_for_each_class_and_a_regression_one_number() -> None:
    features = features_of(DatasetInfo(features=["x"]))
    three, number = Schema(features, "classification", ["a", "b", "c"]), Schema(features, "regression", [])
    assert (three.output, three.output_columns, three.output_shape(7)) == ("probabilities", 3, (7, 3))
    assert (number.output, number.output_columns, number.output_shape(7)) == ("prediction", 1, (7,))
