"""Every kind of column in every role: the exact values, held against plain Python, or one sentence."""

from __future__ import annotations

import decimal
import json
import math
from collections import Counter
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

from lepton_airflow.data.dataset import read_info
from lepton_airflow.errors import LeptonError
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.check_drift import CheckDrift
from lepton_airflow.stages.prepare_data import PrepareData

pytestmark = pytest.mark.slow

ROWS = 240
DAY = datetime(2024, 1, 1)  # noqa: DTZ001 - a column without a time zone


def column(kind: pa.DataType, values: list[Any], *, nulls: bool = True) -> pa.Array:
    """The values over and over, in an order that tells nothing of the target; every eleventh is missing."""
    picked = [values[(i * 7) % len(values)] for i in range(ROWS)]
    return pa.array([None if nulls and i % 11 == 5 else v for i, v in enumerate(picked)], kind)


FLOATS = [0.0, -0.0, 1.5, -2.25, 1e-300, 1e300, 3.0]
KINDS: dict[str, pa.Array] = {
    "bool": column(pa.bool_(), [True, False, False]),
    "int8": column(pa.int8(), [-128, 127, 0, 5]),
    "int16": column(pa.int16(), [-32768, 32767, 4]),
    "int32": column(pa.int32(), [-(2**31), 2**31 - 1, 9]),
    "int64": column(pa.int64(), [-(2**62), 2**63 - 1, 2**53 + 1, 7]),
    "uint8": column(pa.uint8(), [255, 0, 3]),
    "uint32": column(pa.uint32(), [2**32 - 1, 0, 3]),
    "uint64": column(pa.uint64(), [2**64 - 1, 2**63, 1]),
    "float16": column(pa.float16(), [np.float16(0.5), np.float16(-2), np.float16(65504)]),
    "float32": column(pa.float32(), [0.1, -7.5, 3e38, 1e-45]),
    "float64": column(pa.float64(), FLOATS),
    "nan": column(pa.float64(), [*FLOATS, math.nan]),
    "infinite": column(pa.float64(), [*FLOATS, math.inf]),
    "decimal": column(pa.decimal128(20, 4), [decimal.Decimal("12.3456"), decimal.Decimal("-0.0001")]),
    "wide decimal": column(pa.decimal128(38, 0), [decimal.Decimal(10**37), decimal.Decimal(-3)]),
    "decimal256": column(pa.decimal256(50, 2), [decimal.Decimal("1.25"), decimal.Decimal("-3.5")]),
    "text": column(pa.string(), ["", " ", "a", "A", "ä", "a\u0308", "😀", "1", "null", "NaN", "x\n", "'\""]),
    "large text": column(pa.large_string(), ["a", "b" * 300, "b" * 301]),
    "dictionary": column(pa.string(), ["low", "high", "low"]).dictionary_encode(),
    "numbers in a dictionary": column(pa.int64(), [10, 20, 30]).dictionary_encode(),
    "bytes": column(pa.binary(), [b"\x00\xff", b"a"]),
    "date": column(pa.date32(), [date(2024, 1, 1), date(1900, 2, 28)]),
    "time": column(pa.time64("us"), [time(1, 2, 3), time(23, 59, 59, 999999)]),
    "timestamp s": column(pa.timestamp("s"), [DAY, DAY + timedelta(hours=5)]),
    "timestamp ns": column(pa.timestamp("ns"), [DAY, DAY + timedelta(microseconds=1)]),
    "timestamp with zone": column(pa.timestamp("us", "Europe/Vienna"), [DAY.replace(tzinfo=UTC)]),
    "list": column(pa.list_(pa.int64()), [[1, 2], []]),
    "struct": column(pa.struct({"a": pa.int64()}), [{"a": 1}, {"a": None}]),
    "map": column(pa.map_(pa.string(), pa.int64()), [[("k", 1)], []]),
    "nothing": pa.nulls(ROWS),
    "no text": pa.array([None] * ROWS, pa.string()),
    "one value": column(pa.float64(), [4.25], nulls=False),
    "one text": column(pa.string(), ["same"], nulls=False),
}
NUMBERS = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint32", "uint64", "float16", "float32", "float64", "nan", "decimal",
    "wide decimal", "decimal256", "nothing", "one value", "numbers in a dictionary",
}  # fmt: skip
TEXTS = {"text", "large text", "dictionary", "no text", "one text"}


def snapshot(folder: Path, values: pa.Array, **more: pa.Array) -> str:
    number = pa.array(np.random.default_rng(0).normal(size=ROWS))
    table = pa.table({"k": values, "x": number, "row": pa.array(range(ROWS)), **more})
    pq.write_table(table, folder / "snapshot.parquet")
    return str(folder / "snapshot.parquet")


def prepared(folder: Path, path: str, **fields: Any) -> tuple[RunInfo, Any, dict[int, Any]]:
    """The stage's result, and what it wrote into the column k by number of row."""
    run = RunInfo.local(folder)
    defaults: dict[str, Any] = {"target": None, "split": "random", "id_columns": ["row"]}
    result = PrepareData(snapshot=path, **(defaults | fields)).run(run)
    written: dict[int, Any] = {}
    for name in result.artifacts.keys() - {"profile"}:
        table = pq.read_table(run.fetch(result.artifacts[name].uri))
        written |= dict(zip(table["row"].to_pylist(), table["k"].to_pylist(), strict=True))
    return run, result, written


def as_number(value: Any) -> float | None:
    number = None if value is None else float(value)
    return None if number is None or math.isnan(number) else number


@pytest.mark.parametrize("kind", KINDS)
def test_a_feature_keeps_its_values_or_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    values = KINDS[kind].to_pylist()
    path = snapshot(tmp_path, KINDS[kind])
    if kind not in NUMBERS | TEXTS:
        with pytest.raises(LeptonError, match="feature 'k' is") as error:
            prepared(tmp_path, path)
        assert error.value.exit_code == 80
        assert "\n" not in str(error.value)
        return
    run, result, written = prepared(tmp_path, path)
    assert set(written) == set(range(ROWS))
    for row, value in written.items():
        wanted = values[row]
        if kind in TEXTS:
            assert value == wanted
        elif isinstance(value, int):
            assert value == wanted  # whole numbers stay whole, whatever their size
        else:
            assert as_number(value) == as_number(wanted)

    profile = json.loads(run.fetch(result.artifacts["profile"].uri).read_bytes())["columns"]["k"]
    trained = pq.read_table(run.fetch(result.artifacts["train"].uri))["row"].to_pylist()
    if kind in TEXTS:
        counted = Counter(values[row] for row in trained if values[row] is not None)
        found: Counter[str] = Counter()
        for label, rows in profile["top"]:
            found[label] += rows
        shortened: Counter[str] = Counter()
        for label, rows in counted.items():
            shortened[label[:200]] += rows
        assert found == shortened
        assert (profile["count"], profile["nulls"]) == (
            sum(counted.values()),
            len(trained) - sum(counted.values()),
        )
        assert profile["distinct"] == len(counted)
    else:
        numbers = [n for row in trained if (n := as_number(values[row])) is not None]
        assert (profile["count"], profile["nulls"]) == (len(numbers), len(trained) - len(numbers))
        assert profile["min"] == min(numbers, default=None)
        assert profile["max"] == max(numbers, default=None)
        if numbers:
            assert profile["mean"] == pytest.approx(
                math.fsum(n / len(numbers) for n in numbers), rel=1e-8, abs=1e-12
            )
        assert sum(profile["counts"]) == len(numbers)
        below = [sum(n <= edge for n in numbers) for edge in profile["edges"]]
        assert np.cumsum(profile["counts"]).tolist()[: len(below)] == below


@pytest.mark.parametrize("kind", [k for k in KINDS if k in NUMBERS | TEXTS])
def test_equal_rows_have_not_drifted_prepared_or_plain(kind: str, tmp_path: Path, monkeypatch) -> None:
    path = snapshot(tmp_path, KINDS[kind])
    monkeypatch.setattr(CheckDrift, "_report", lambda *_: Path(path))  # Evidently's page is drawn elsewhere
    run, result, _ = prepared(tmp_path, path, valid_fraction=0, test_fraction=0.5)
    shifted = PrepareData(
        snapshot=path, target=None, split="random", id_columns=["row"], test_fraction=1.0
    ).run(run)
    distances = []
    for rows in (shifted.artifacts["test"].uri, path):
        found = CheckDrift(dataset=rows, reference=result.artifacts["profile"].uri).run(run)
        verdict = json.loads(run.fetch(found.artifacts["verdict"].uri).read_bytes())
        distances.append({v["name"]: (v["distance"], v["missing"]) for v in verdict["columns"]})
        assert not found.values["drifted"]
    assert distances[0] == distances[1]
    same = CheckDrift(dataset=result.artifacts["train"].uri, reference=result.artifacts["profile"].uri).run(
        run
    )
    verdict = json.loads(run.fetch(same.artifacts["verdict"].uri).read_bytes())
    assert {v["distance"] for v in verdict["columns"]} == {0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_clusters_of_any_kind_stay_whole(kind: str, tmp_path: Path) -> None:
    """Many clusters, of few rows each, with a name of this kind; a missing name belongs to no cluster and is refused."""
    values = KINDS[kind]
    path = snapshot(tmp_path, values)
    there = values.drop_null()
    if pa.types.is_floating(there.type):
        there = there.filter(pa.compute.invert(pa.compute.is_nan(there)))
    if missing := len(values) - len(there):
        with pytest.raises(LeptonError, match=f"column 'k' is missing in {missing} rows|no feature") as error:
            prepared(tmp_path, path, cluster_column="k", split="group", test_fraction=0.5)
        assert error.value.exit_code == 80
    if len({str(v) for v in there.to_pylist()}) < 3:
        return
    rows = len(there)
    table = pa.table({"k": there, "x": pa.array(range(rows)), "row": pa.array(range(rows))})
    pq.write_table(table, tmp_path / "whole.parquet")
    run = RunInfo.local(tmp_path)
    result = PrepareData(
        snapshot=str(tmp_path / "whole.parquet"), target=None, split="group", cluster_column="k", id_columns=["row"],
        valid_fraction=0, test_fraction=0.5,
    ).run(run)  # fmt: skip
    sides: dict[str, set[str]] = {}
    for name in ("train", "test"):
        there_rows = pq.read_table(run.fetch(result.artifacts[name].uri))["row"].to_pylist()
        for row in there_rows:
            value = there[row].as_py()
            value = value + 0 if isinstance(value, float) else value  # 0.0 and -0.0 are one cluster
            sides.setdefault(repr(value), set()).add(name)
    assert {len(side) for side in sides.values()} == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_any_kind_are_kept(kind: str, tmp_path: Path) -> None:
    values = KINDS[kind].to_pylist()
    _, _, written = prepared(tmp_path, snapshot(tmp_path, KINDS[kind]), id_columns=["row", "k"])
    for row, value in written.items():
        wanted = values[row]
        if isinstance(wanted, (decimal.Decimal, float)):
            assert as_number(value) == as_number(wanted)
        elif kind == "timestamp with zone" and wanted is not None:
            assert value.timestamp() == wanted.timestamp()
        elif kind == "timestamp ns" and wanted is not None:
            assert value == wanted.to_pydatetime()
        else:
            assert value == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_of_any_kind_is_learnt_or_refused(kind: str, tmp_path: Path) -> None:
    path = snapshot(tmp_path, KINDS[kind])
    values = [v for v in KINDS[kind].to_pylist() if v is not None]
    if kind not in (NUMBERS | TEXTS) - {"nan", "nothing", "no text", "one text"}:
        with pytest.raises(LeptonError, match=r"target 'k' (is|has)") as error:
            prepared(tmp_path, path, target="k", drop_missing_target=True)
        assert error.value.exit_code == 80
        assert "\n" not in str(error.value)
        return
    run, result, written = prepared(tmp_path, path, target="k", drop_missing_target=True)
    assert len(written) == len(values)
    info = read_info(run.fetch(result.artifacts["train"].uri))
    if info.task == "classification":
        assert info.classes == sorted({int(v) if isinstance(v, bool) else v for v in values})
    else:
        assert sorted(map(float, written.values())) == sorted(map(float, values))
