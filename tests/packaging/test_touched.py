"""Which rows a model has touched: by split, by time, by the rows themselves."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadInput
from lepton_airflow.packaging.card import ModelCard, Touched
from lepton_airflow.packaging.package import ModelPackage, write_package
from lepton_airflow.packaging.schema import features_of
from lepton_airflow.packaging.touched import (
    id_fingerprints,
    overlap,
    row_fingerprints,
    time_span,
    touched_rows,
)

INFO = DatasetInfo(
    target="late",
    task="classification",
    features=["hour", "carrier"],
    categorical=["carrier"],
    classes=["no", "yes"],
    split="train",
    split_id="run 1",
)


def table(rows: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"hour": rng.normal(size=rows), "carrier": rng.choice(["AA", "ü b", None], rows)})
    return frame.assign(late=rng.choice(["no", "yes"], rows))


def write(path: Path, frame: pd.DataFrame, info: DatasetInfo) -> None:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    pq.write_table(table.replace_schema_metadata({b"lepton": json.dumps(asdict(info)).encode()}), path)


def save(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_parquet(path, index=False, row_group_size=100)
    return path


def package(
    folder: Path, *touched: Touched, rows: np.ndarray | None = None, ids: list[str] | None = None
) -> ModelPackage:
    card = ModelCard(
        task="classification",
        target="late",
        features=features_of(INFO),
        outputs=[],
        trainer="",
        framework="",
        hyperparameters={},
        seed=0,
        touched=list(touched),
        row_identity=ids or [],
    )
    write_package(folder, b"no model is run here", card, rows=rows)
    return ModelPackage.open(folder)


JANUARY = Touched("train", "a" * 64, "train", "run 1", "day", ["2013-01-01", "2013-01-31"], 300)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"time_range": ["2013-02-01", "2013-02-28"], "split_id": "run 2"}, None),
        (
            {"time_range": ["2013-01-31", "2013-02-28"], "split_id": "run 2"},
            "train rows span 2013-01-01 to 2013-01-31",
        ),
        ({"time_range": ["2013-01-31T12:00:00", "2013-02-28T00:00:00"], "split_id": "run 2"}, "overlaps"),
        ({"time_range": ["2013-01-31T19:00:00-05:00", "2013-02-28T00:00:00Z"], "split_id": "run 2"}, None),
        ({"time_range": ["2012-01-01", "2014-01-01"], "split_id": "run 2"}, "overlaps"),
        # Times overlap, but splits of one run share no row.
        ({"time_range": ["2013-01-10", "2013-01-20"], "split": "test"}, None),
        ({"time_range": ["2013-01-10", "2013-01-20"]}, "the same split ('train' of run 1)"),
        ({"time_range": None, "split_id": "run 2"}, "cannot be told"),
    ],
)
def test_overlap_by_split_and_by_time(
    tmp_path: Path, changes: dict[str, object], expected: str | None
) -> None:
    model = package(tmp_path / "model", JANUARY)
    said = overlap(model, tmp_path / "not read", replace(INFO, time_column="day", **changes))
    assert (said is None) if expected is None else (said is not None and expected in said)


def test_overlap_by_equal_rows_without_a_time_column(tmp_path: Path) -> None:
    seen, unseen = table(300), table(40, seed=9)
    path = save(seen, tmp_path / "train.parquet")
    rows = row_fingerprints(path, features_of(INFO), "late")
    assert len(rows) == 300
    touched = replace(JANUARY, time_column=None, time_range=None)
    model = package(tmp_path / "model", touched, rows=rows)
    other = replace(INFO, split_id="run 2", split="test")
    assert overlap(model, save(unseen, tmp_path / "new.parquet"), other) is None
    mixed = save(pd.concat([unseen, seen.iloc[[3, 7, 7]]]), tmp_path / "mixed.parquet")
    said = overlap(model, mixed, other)
    assert said is not None
    assert "cannot be told: 2 of 42 distinct rows have the values of rows" in said
    assert overlap(model, mixed, replace(INFO, split="test")) is None  # a split of the same run shares no row


def test_ids_tell_rows_apart_that_have_equal_values(tmp_path: Path) -> None:
    """Coarse categories: every new row equals one that the model has seen, and is another one all the same."""
    coarse = pd.DataFrame({"hour": 1.0, "carrier": "AA", "late": "no"}, index=range(60))
    info = replace(INFO, id_columns=["flight", "leg"])
    train = coarse.assign(flight=range(60), leg="a")
    path = tmp_path / "train.parquet"
    write(path, train, info)
    rows, ids = touched_rows([path], features_of(INFO), "late")
    assert (len(rows), ids) == (60, ["flight", "leg"])
    timeless = replace(JANUARY, time_column=None, time_range=None)
    other = replace(info, split_id="run 2", split="test")
    for touched in (timeless, JANUARY):  # also where the times overlap
        model = package(tmp_path / "model", touched, rows=rows, ids=ids)
        other = replace(other, time_column=touched.time_column, time_range=touched.time_range)
        new = save(coarse.assign(flight=range(60, 120), leg="a"), tmp_path / "new.parquet")
        assert overlap(model, new, other) is None
        some = save(coarse.assign(flight=range(50, 110), leg="a"), tmp_path / "some.parquet")
        assert overlap(model, some, other) == "it knows 10 of the 60 ids of these rows (flight, leg)."
    without = replace(other, id_columns=[], time_range=None)
    said = overlap(package(tmp_path / "model", timeless, rows=rows, ids=ids), new, without)
    assert said is not None
    assert "cannot be told: the model knows its rows by id (flight, leg), the dataset has neither" in said


def test_an_id_is_the_same_in_any_type(tmp_path: Path) -> None:
    def ids(*values: object) -> list[int]:
        whole = any(isinstance(v, int) for v in values)
        column = pd.Series(values, dtype="Int64" if whole else None)
        path = save(pd.DataFrame({"id": column}), tmp_path / "ids.parquet")
        return id_fingerprints(path, ["id"]).tolist()

    assert ids(1, 2) == ids("1", "2") == ids(2.0, 1.0)
    assert set(ids(1, 2)) < set(ids(1.0, None, 2.0))
    assert len(ids(2**60, 2**60 + 1)) == 2
    assert ids(0.5) == ids("0.5") != ids(0.25)
    # Neither what stands beside an id nor the type of its column changes it.
    assert set(ids(2**60, 2**60 + 1)) < set(ids(2**60, None, 2**60 + 1))
    day, hour = pd.Timestamp("2013-01-01"), pd.Timestamp("2013-01-02 10:00:00.5")
    assert ids(day) == ids(day.date())
    assert set(ids(day)) < set(ids(day, hour))
    fine = pd.Series(pd.to_datetime([1], unit="ns"))
    assert len(ids(*fine)) == 1
    assert ids(Decimal("5.00"), Decimal("1E+2")) == ids(5, 100)


def test_a_label_that_looks_ahead_belongs_to_the_touched_time(tmp_path: Path) -> None:
    train = replace(
        INFO, time_column="day", time_range=["2013-01-01", "2013-01-31"], labels_until="2013-03-02T00:00:00"
    )
    model = package(tmp_path / "model", Touched.by("train", "a" * 64, train))
    february = replace(INFO, split_id="run 2", time_column="day", time_range=["2013-02-10", "2013-02-20"])
    assert "2013-01-01 to 2013-03-02" in str(overlap(model, tmp_path / "not read", february))
    april = replace(february, time_range=["2013-04-01", "2013-04-20"])
    assert overlap(model, tmp_path / "not read", april) is None


def test_equal_rows_have_equal_fingerprints_whatever_type_a_missing_value_made_of_their_column(
    tmp_path: Path,
) -> None:
    def fingerprints(**columns: object) -> set[int]:
        path = save(pd.DataFrame(columns), tmp_path / "rows.parquet")
        return set(row_fingerprints(path, features_of(INFO), "late").tolist())

    whole = fingerprints(hour=[1, 2], carrier=["7", "8"], late=[0, 1])
    with_missing = fingerprints(hour=[1.0, None, 2.0], carrier=[7.0, 7.0, 8.0], late=[0, None, 1.0])
    assert len(whole) == 2
    assert whole < with_missing
    assert whole.isdisjoint(fingerprints(hour=[1, 2], carrier=["7", "8"], late=[1, 0]))
    assert fingerprints(hour=[], carrier=[], late=[]) == set()


def test_a_time_span_holds_its_last_day() -> None:
    first, last = time_span(["2013-01-01", "2013-01-31"])
    assert first == datetime(2013, 1, 1, tzinfo=UTC)
    assert datetime(2013, 1, 31, 23, 59, tzinfo=UTC) < last < datetime(2013, 2, 1, tzinfo=UTC)
    with pytest.raises(BadInput, match="expected two ISO 8601 times"):
        time_span(["2013-01-01", "later"])
