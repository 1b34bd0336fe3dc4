"""What a network gives becomes predictions, or gets a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadInput
from lepton_airflow.packaging.export.network import blank_row, checked_predictions
from lepton_airflow.packaging.schema import Schema, features_of

FEATURES = features_of(DatasetInfo(features=["x", "c"], categorical=["c"]))
TWO, THREE = (Schema(FEATURES, "classification", list("abc"[:k])) for k in (2, 3))
NUMBER = Schema(FEATURES, "regression", [])


@pytest.mark.parametrize(
    ("given", "schema", "expected"),
    [
        ([[0.25], [1.0]], TWO, [[0.75, 0.25], [0.0, 1.0]]),
        ([0.25, 1.0], TWO, [[0.75, 0.25], [0.0, 1.0]]),
        ([[0.5, 0.5], [0.0005, 1.0]], TWO, [[0.5, 0.5], [0.0005, 1.0]]),  # rounding of 16-bit floats
        ([[[0.2], [0.3], [0.5]]], THREE, [[0.2, 0.3, 0.5]]),
        ([[7.0], [-7.0]], NUMBER, [7.0, -7.0]),
    ],
)
def test_the_form_of_predictions(given: Any, schema: Schema, expected: Any) -> None:
    assert checked_predictions(np.array(given), schema, "mine").tolist() == expected


@pytest.mark.parametrize(
    ("given", "schema", "sentence"),
    [
        (
            [[0.5, 0.5], [0.5, 0.502]],
            TWO,
            r"the model's row 1 is \[0\.5, 0\.502\], which are no probabilities",
        ),
        ([[1.5, -0.5]], TWO, r"row 0 is \[1\.5, -0\.5\], which are no probabilities"),
        (
            [[0.5, 0.5]],
            THREE,
            r"gives 2 numbers a row, expected 3 probabilities, one per class of \['a', 'b', 'c'\]",
        ),
        ([[0.5]], THREE, r"gives 1 numbers a row, expected 3"),
        ([[1.0, 2.0]], NUMBER, r"trainer mine: the model gives 2 numbers a row, expected 1\."),
    ],
)
def test_what_is_no_prediction_is_refused(given: Any, schema: Schema, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        checked_predictions(np.array(given), schema, "mine")


def test_a_blank_row_holds_a_value_of_each_kind() -> None:
    assert blank_row(NUMBER).to_dict("records") == [{"x": 0.0, "c": ""}]
