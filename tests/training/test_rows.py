"""A split in memory: what trainers get, and what is refused before a fit begins."""

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
from lepton_airflow.errors import BadInput
from lepton_airflow.training.rows import Rows

INFO = DatasetInfo(
    target="y", task="classification", features=["n", "c"], categorical=["c"], classes=["no", "yes"]
)
FRAME = pd.DataFrame(
    {"n": [0.1, None, 2.0, 3.0], "c": ["a", None, "b", "a"], "y": ["yes", "no", "no", "yes"]}
)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """``load(info, **columns)``: the rows of a file with this description, and with other values in some columns."""

    def call(
        info: DatasetInfo = INFO, like: Rows | None = None, frame: pd.DataFrame = FRAME, **columns: Any
    ) -> Rows:
        sample = {name: columns.pop(name) for name in ("max_rows", "seed") if name in columns}
        table = pa.Table.from_pandas(frame.assign(**columns), preserve_index=False)
        about = {b"lepton": json.dumps(asdict(info)).encode()}
        pq.write_table(table.replace_schema_metadata(about), tmp_path / "t.parquet")
        return Rows.load(tmp_path / "t.parquet", "valid" if like else "train", like, **sample)

    return call


def test_a_trainer_gets_rounded_numbers_texts_and_class_numbers(load: Any) -> None:
    rows = load()
    assert list(rows.frame) == ["n", "c", "y"]
    assert rows.frame["n"].dtype == np.float64
    np.testing.assert_array_equal(rows.frame["n"], [np.float32(0.1), np.nan, 2, 3])
    assert rows.frame["c"].tolist() == ["a", "", "b", "a"]
    assert rows.y.tolist() == [1, 0, 0, 1]
    assert (rows.target, rows.clusters, rows.moments) == ("y", None, None)
    assert rows.take(np.array([3, 0])).y.tolist() == [1, 1]
    assert rows.take(np.array([3, 0])).index.tolist() == [0, 1]


def test_clusters_and_times_come_along_and_no_trainer_sees_them(load: Any) -> None:
    day = pd.to_datetime(["2024-01-02", "2024-01-01", "2024-01-02", "2024-01-03"])
    rows = load(replace(INFO, cluster_column="day", time_column="day"), day=day)
    assert "day" not in rows.frame
    assert rows.clusters.tolist() == [0, 1, 0, 2]
    assert rows.moments.tolist() == day.to_numpy().tolist()


def test_a_sample_is_in_order_and_depends_on_the_seed_alone(load: Any) -> None:
    many = pd.DataFrame({"n": np.arange(200.0), "c": "a", "y": ["yes", "no"] * 100})

    def sample(seed: int) -> list[float]:
        return load(frame=many, max_rows=50, seed=seed).frame["n"].tolist()

    assert len(sample(1)) == 50
    assert sample(1) == sorted(sample(1))
    assert sample(1) == sample(1) != sample(2)
    assert load(frame=many, max_rows=200).frame["n"].tolist() == many["n"].tolist()


def test_a_sample_has_a_row_of_each_class(load: Any) -> None:
    info = replace(INFO, classes=["no", "rarely", "yes"])
    many = pd.DataFrame({"n": np.arange(200.0), "c": "a", "y": ["yes", "no"] * 100})
    many.loc[[60, 61], "y"] = "rarely"
    for seed in range(5):
        y = load(info, frame=many, max_rows=20, seed=seed).y
        assert (set(y), len(y) - 20) in [({0, 1, 2}, 0), ({0, 1, 2}, 1)]


def test_classes_that_json_has_only_as_text_are_found(load: Any) -> None:
    info = replace(INFO, classes=["2024-01-01", "2024-01-02"])
    days = pd.to_datetime(["2024-01-01", "2024-01-02", "2024-01-02", "2024-01-01"]).date
    assert load(info, y=days).y.tolist() == [0, 1, 1, 0]


def test_other_rows_have_the_classes_and_features_of_the_training_rows(load: Any) -> None:
    train = load()
    # Other rows may lack a class, and a feature.
    valid = load(replace(INFO, classes=[]), train, y=["no"] * 4, c=[None] * 4)
    assert valid.y.tolist() == [0] * 4
    assert valid.schema == train.schema


@pytest.mark.parametrize(
    ("info", "columns", "message"),
    [
        (replace(INFO, target=None), {}, "train: the dataset's target is None and its task 'classification'"),
        (replace(INFO, task=None), {}, "its task None, expected a target column and classification or regression"),
        (replace(INFO, features=[]), {}, "train: the dataset has no features"),
        (INFO, {"c": [None] * 4}, "train: feature 'c' is missing in all 4 rows"),
        (INFO, {"n": [float("nan")] * 4}, "train: feature 'n' is missing in all 4 rows"),
        (INFO, {"n": [None] * 4, "c": [None] * 4}, "train: features 'n', 'c' are missing in all 4 rows"),
        (INFO, {"n": ["a", "b", "c", "d"]}, "train: feature 'n' should hold numbers"),
        (INFO, {"y": ["yes"] * 4}, r"target 'y' is 'yes' in all rows \(4 rows\), expected every class"),
        (replace(INFO, classes=["no", "yes", "maybe"]), {}, r"target 'y' has no row of 'maybe' \(4 rows\)"),
        (INFO, {"y": ["yes", "no", None, "yes"]}, "target 'y' is missing in 1 of 4 rows"),
        (INFO, {"y": ["yes", "no", "oui", "yes"]}, "target 'y' has the value 'oui', which is none of train's classes"),
        (replace(INFO, task="regression"), {}, "target 'y' has dtype object, expected numbers for regression"),
        (
            replace(INFO, task="regression"),
            {"y": [1.0, 2.0, float("inf"), None]},
            "target 'y' is missing or infinite in 2 of 4 rows, first in row 2",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_refused(
    load: Any, info: DatasetInfo, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        load(info, **columns)


def test_a_number_to_predict_stays_in_its_units(load: Any) -> None:
    rows = load(replace(INFO, task="regression", classes=[]), y=[1, 2, 3, 4_000_000_001])
    assert rows.y.dtype == np.float64
    assert rows.y.tolist() == [1, 2, 3, 4_000_000_001]  # not rounded to float32, as features are
    assert rows.schema.classes == []


def test_rows_of_another_target_are_refused(load: Any) -> None:
    train = load()
    with pytest.raises(BadInput, match=r"valid: its target is 'z' \(classification\), that of train is 'y'"):
        load(replace(INFO, target="z"), train, z=["yes", "no", "no", "yes"])


def test_no_rows_are_refused(load: Any) -> None:
    with pytest.raises(BadInput, match="train: 0 rows, expected some"):
        load(frame=FRAME[:0])
