"""The rows that a model is judged on: read in order, encoded as the model's classes, refused in a sentence where they do not fit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.features import Feature
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError
from lepton_airflow.evaluation.rows import check_columns, check_features, columns_like, load_rows
from lepton_airflow.packaging.card import ModelCard

INFO = DatasetInfo(
    target="late",
    task="classification",
    features=["hour", "origin"],
    categorical=["origin"],
    classes=["no", "yes"],
    cluster_column="day",
)
CARD = ModelCard(
    task="classification",
    target="late",
    classes=["yes", "no"],  # the model's own order, which is not that of the dataset
    features=[Feature("hour", "number", "hour"), Feature("origin", "category", "origin")],
    outputs=[],
    trainer="",
    framework="",
    hyperparameters={},
    seed=0,
)
REGRESSION = replace(CARD, task="regression", classes=[])
FRAME = pd.DataFrame(
    {
        "hour": [1.0, 2.0, 3.0, 4.0],
        "origin": ["JFK", "EWR", "JFK", None],
        "day": [7, 7, 8, 9],
        "month": [1, 1, 2, 2],
        "late": ["no", "yes", "yes", "no"],
    }
)


def write(folder: Path, frame: pd.DataFrame, info: DatasetInfo) -> Path:
    described = {b"lepton": json.dumps(asdict(info)).encode()}
    path = folder / "test.parquet"
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(described), path)
    return path


def test_labels_are_the_numbers_of_the_models_classes_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path, FRAME, INFO), CARD, columns=["origin", "hour"])
    assert rows.y.tolist() == [1, 0, 0, 1]
    assert rows.y.dtype == np.int64
    assert rows.cluster_column == "day"
    assert rows.clusters is not None
    assert rows.clusters.tolist() == [7, 7, 8, 9]
    assert list(rows.frame) == ["late", "day", "origin", "hour"]
    assert rows.info == INFO


def test_a_cluster_column_of_ones_own_takes_the_place_of_the_datasets(tmp_path: Path) -> None:
    path = write(tmp_path, FRAME, INFO)
    by_month = load_rows(path, CARD, "month").clusters
    assert by_month is not None
    assert by_month.tolist() == [1, 1, 2, 2]
    assert load_rows(write(tmp_path, FRAME, replace(INFO, cluster_column=None)), CARD).clusters is None


def test_a_regression_takes_whole_numbers_and_booleans_as_numbers(tmp_path: Path) -> None:
    info = replace(INFO, task="regression", classes=[])
    for target in ([1, 2, 3, 4], [True, False, True, True], [0.5, 1.5, 2.5, 3.5]):
        y = load_rows(write(tmp_path, FRAME.assign(late=target), info), REGRESSION).y
        assert y.dtype == np.float64
        assert y.tolist() == [float(value) for value in target]


REGRESS: dict[str, Any] = {"task": "regression", "classes": []}


@pytest.mark.parametrize(
    ("card", "changes", "late", "kind", "sentence"),
    [
        (
            CARD,
            REGRESS,
            FRAME["late"],
            BadConfiguration,
            "the model's task is 'classification', the dataset's is 'r",
        ),
        (
            CARD,
            {"target": "x"},
            FRAME["late"],
            BadConfiguration,
            "the model's target is 'late', the dataset's is 'x'",
        ),
        (CARD, {}, ["no", None, "yes", None], BadInput, "target 'late' is missing in 2 of 4 rows"),
        (
            CARD,
            {},
            ["no", "maybe", "yes", "3"],
            BadInput,
            "the values '3', 'maybe', .* trained on 'yes', 'no'",
        ),
        (REGRESSION, REGRESS, ["1", "2", "x", "4"], BadInput, "'late' has dtype object, expected numbers"),
        (REGRESSION, REGRESS, [1.0, np.inf, -np.inf, 2.0], BadInput, "'late' is infinite in 2 rows"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(
    tmp_path: Path,
    card: ModelCard,
    changes: dict[str, Any],
    late: Any,
    kind: type[LeptonError],
    sentence: str,
) -> None:
    path = write(tmp_path, FRAME.assign(late=late), replace(INFO, **changes))
    with pytest.raises(kind, match=sentence):
        load_rows(path, card)


def test_columns_that_are_not_there_and_datasets_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"^slices: column 'orign' is not in test\.parquet; did you mean 'origin'"
    ):
        load_rows(write(tmp_path, FRAME, INFO), CARD, columns=["orign"])
    with pytest.raises(BadInput, match=r"test\.parquet has 0 rows"):
        load_rows(write(tmp_path, FRAME.head(0), INFO), CARD)


@pytest.mark.parametrize(
    ("categorical", "sentence"),
    [
        ([], "feature 'origin' is a number in the dataset, the model was trained on it as a category"),
        (
            ["hour", "origin"],
            "feature 'hour' is a category in the dataset, the model was trained on it as a number",
        ),
    ],
)
def test_a_feature_of_another_kind_is_refused(tmp_path: Path, categorical: list[str], sentence: str) -> None:
    path = write(tmp_path, FRAME, INFO)
    with pytest.raises(BadInput, match=sentence):
        check_features(CARD, path, replace(INFO, categorical=categorical), "the model")
    carried = replace(INFO, features=[], carried=["hour", "origin"], categorical=categorical)
    with pytest.raises(BadInput, match=sentence):
        check_features(CARD, path, carried, "the model")


def test_who_needs_a_column_that_the_dataset_lacks_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, FRAME.drop(columns="origin"), replace(INFO, features=["hour"], categorical=[]))
    with pytest.raises(BadInput) as caught:
        load_rows(path, CARD, who="champion version 3 of 'late'")
    assert str(caught.value).startswith(
        "champion version 3 of 'late' needs the column 'origin', which test.parquet does not have: let PrepareData's features"
    )
    many = [Feature(f"c{i}", "number", f"c{i}") for i in range(7)]
    with pytest.raises(BadInput, match="needs the columns 'c0', 'c1', 'c2', 'c3', 'c4' and 2 more, which"):
        check_columns(many, path, "the model")


def test_probabilities_follow_the_order_of_the_classes() -> None:
    scores = np.array([[0.1, 0.9]])
    assert columns_like(scores, ["bad", "good"], ["bad", "good"]) is scores
    assert columns_like(scores, ["bad", "good"], ["good", "bad"]).tolist() == [[0.9, 0.1]]
