"""ValidateData: every family of expectations on both engines, what a failure says, what SQL may not do."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.errors import BadConfiguration, BadInput
from lepton_airflow.sdk.fingerprint import cache_key
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.validate_data import ValidateData

SUITES = Path(__file__).parents[2] / "great_expectations"
CITY = "Origin city ñ; 50% of :x's"  # unicode, spaces, and what is special to drivers and templates


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo.local(tmp_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def january(raw_flights: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flights of January 2013 as Parquet: 27,004 rows."""
    path = tmp_path_factory.mktemp("january") / "january.parquet"
    source = raw_flights / "flights" / "2013-01.csv"
    duckdb.sql(f"COPY (SELECT * FROM read_csv('{source}')) TO '{path}' (FORMAT parquet)")
    return str(path)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,000 rows of every common type, with nulls, NaN and duplicates, under a difficult column name."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.parquet"
    duckdb.sql(
        f"""COPY (
            SELECT i AS id, i + 1 AS next, i % 7 AS "group", 'v' || i AS text,
                CASE WHEN i % 10 = 0 THEN 'NaN'::DOUBLE WHEN i % 11 = 0 THEN NULL ELSE i * 0.5 END AS number,
                ['EWR', 'JFK', 'Łódź'][1 + i % 3] AS "{CITY}",
                TIMESTAMP '2013-01-01' + INTERVAL (i) HOUR AS at, DATE '2013-01-01' + CAST(i % 28 AS INT) AS day,
                (i % 100)::DECIMAL(10, 2) AS price, CASE WHEN i % 5 > 0 THEN i % 3 END AS few,
                NULL::VARCHAR AS nothing
            FROM range(1000) t(i)
        ) TO '{path}' (FORMAT parquet)"""
    )
    return str(path)


def expect(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {"type": f"expect_{kind}", "kwargs": kwargs}


def suite(*expectations: dict[str, Any]) -> dict[str, Any]:
    return {"name": "test", "expectations": list(expectations)}


def full_result(run: RunInfo, stage: ValidateData) -> list[dict[str, Any]]:
    """The expectations' results, in the suite's order, as the stage stored them."""
    stage.on_failure = "warn"
    result = stage.run(run)
    report: list[dict[str, Any]] = json.loads(run.fetch(result.artifacts["validation"].uri).read_text())[
        "results"
    ]
    return report


def quantiles(low: float, high: float) -> dict[str, Any]:
    return {"quantiles": [0.25, 0.75], "value_ranges": [[low, low + 10], [high, high + 10]]}


NUMBERS = [
    i * 0.5 for i in range(1000) if i % 10 and i % 11
]  # the column ``number`` without its NaN and nulls
MISSING, ABOVE_100 = 1000 - len(NUMBERS), sum(n > 100 for n in NUMBERS)
MEAN = sum(NUMBERS) / len(NUMBERS)

# Expectation, whether it holds on ``mixed``, and the count or value observed where both engines report one.
FAMILIES: list[tuple[dict[str, Any], bool, Any]] = [
    (expect("column_values_to_not_be_null", column="id"), True, 0),
    (expect("column_values_to_not_be_null", column="number"), False, MISSING),
    (expect("column_values_to_not_be_null", column="number", mostly=0.8), True, MISSING),
    (expect("column_values_to_be_null", column="nothing"), True, 0),
    (expect("column_values_to_be_between", column="id", min_value=0, max_value=999), True, 0),
    (expect("column_values_to_be_between", column="number", min_value=0, max_value=100), False, ABOVE_100),
    (expect("column_values_to_be_between", column="price", min_value=0, max_value=98), False, 10),
    (expect("column_values_to_be_between", column="at", min_value="2013-01-01T00:00:00"), True, 0),
    (expect("column_values_to_be_between", column="at", max_value="2013-01-02T00:00:00"), False, 975),
    (
        expect("column_values_to_be_between", column="day", min_value="2013-01-01", max_value="2013-01-28"),
        True,
        0,
    ),
    (expect("column_values_to_be_in_set", column=CITY, value_set=["EWR", "JFK", "Łódź"]), True, 0),
    (expect("column_values_to_be_in_set", column=CITY, value_set=["EWR", "JFK"]), False, 333),
    (expect("column_values_to_not_be_in_set", column="group", value_set=[0]), False, 143),
    (expect("column_distinct_values_to_be_in_set", column="group", value_set=list(range(7))), True, None),
    (expect("column_distinct_values_to_equal_set", column=CITY, value_set=["EWR"]), False, None),
    (expect("column_distinct_values_to_contain_set", column=CITY, value_set=["EWR"]), True, None),
    (expect("column_values_to_be_unique", column="id"), True, 0),
    (expect("column_values_to_be_unique", column="number"), True, 0),  # nulls do not repeat one another
    (expect("column_values_to_be_unique", column="few"), False, 800),
    (expect("compound_columns_to_be_unique", column_list=["group", "text"]), True, 0),
    (expect("compound_columns_to_be_unique", column_list=["few", "group"]), False, 1000),  # here they do
    (expect("column_values_to_match_regex", column="text", regex="^v[0-9]+$"), True, 0),
    (expect("column_values_to_match_regex", column="text", regex="9"), False, 729),  # anywhere in the text
    (expect("column_values_to_match_regex", column="id", regex="^[0-9]{1,3}$"), True, 0),  # numbers as text
    (expect("column_values_to_match_regex", column=CITY, regex="^[EJŁ]"), True, 0),
    (expect("column_values_to_not_match_regex", column="text", regex="99"), False, 19),
    (expect("column_values_to_match_regex_list", column="text", regex_list=["^v1", "^v2"]), False, 778),
    (expect("column_values_to_not_match_regex_list", column="text", regex_list=["^w", "^x"]), True, 0),
    (expect("column_values_to_be_in_type_list", column="id", type_list=["BIGINT", "int64"]), True, None),
    (expect("column_values_to_be_in_type_list", column="id", type_list=["DOUBLE", "float64"]), False, None),
    (expect("column_values_to_be_in_type_list", column="text", type_list=["TEXT", "str"]), True, None),
    (expect("column_value_lengths_to_be_between", column="text", min_value=2, max_value=3), False, 900),
    (expect("column_value_lengths_to_equal", column=CITY, value=3), False, 333),
    (expect("table_row_count_to_equal", value=1000), True, 1000),
    (expect("table_row_count_to_be_between", max_value=999), False, 1000),
    (expect("table_column_count_to_equal", value=11), True, 11),
    (expect("table_columns_to_match_set", column_set=["id", CITY], exact_match=False), True, None),
    (expect("table_columns_to_match_set", column_set=["id", CITY], exact_match=True), False, None),
    (expect("table_columns_to_match_ordered_list", column_list=["next", "id"]), False, None),
    (expect("column_to_exist", column=CITY), True, None),
    (expect("column_to_exist", column="absent"), False, None),
    (expect("column_mean_to_be_between", column="number", min_value=249, max_value=251), True, MEAN),
    (expect("column_median_to_be_between", column="id", min_value=499, max_value=500), True, 499.5),
    (expect("column_stdev_to_be_between", column="id", min_value=0, max_value=288), False, 288.8194360957494),
    (expect("column_sum_to_be_between", column="id", min_value=499500, max_value=499500), True, 499500),
    (expect("column_min_to_be_between", column="number", min_value=0.5, max_value=0.5), True, 0.5),
    (expect("column_max_to_be_between", column="price", min_value=0, max_value=50), False, 99),
    (
        expect("column_quantile_values_to_be_between", column="id", quantile_ranges=quantiles(245, 745)),
        True,
        None,
    ),
    (
        expect("column_quantile_values_to_be_between", column="id", quantile_ranges=quantiles(0, 745)),
        False,
        None,
    ),
    (expect("column_unique_value_count_to_be_between", column="group", min_value=7, max_value=7), True, 7),
    (
        expect("column_proportion_of_unique_values_to_be_between", column="group", max_value=0.001),
        False,
        0.007,
    ),
    (expect("column_most_common_value_to_be_in_set", column=CITY, value_set=["EWR"]), True, None),
    (expect("column_pair_values_a_to_be_greater_than_b", column_A="next", column_B="id"), True, 0),
    (expect("column_pair_values_to_be_equal", column_A="next", column_B="id"), False, 1000),
    (expect("multicolumn_sum_to_equal", column_list=["id", "next"], sum_total=1), False, 999),
    (expect("select_column_values_to_be_unique_within_record", column_list=["id", "next"]), True, 0),
    (
        expect("column_value_z_scores_to_be_less_than", column="id", threshold=1.5, double_sided=True),
        False,
        134,
    ),
    (
        expect(
            "column_values_to_be_between",
            column="id",
            max_value=500,
            row_condition='col("group")==1',
            condition_parser="great_expectations",
        ),
        False,
        71,
    ),
]


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_every_family_has_the_same_verdict_and_count_on_both_engines(
    mixed: str, run: RunInfo, engine: Any
) -> None:
    stage = ValidateData(dataset=mixed, suite=suite(*[e for e, _, _ in FAMILIES]), engine=engine)
    results = full_result(run, stage)
    assert len(results) == len(FAMILIES)
    wrong = []
    for (expectation, holds, observed), result in zip(FAMILIES, results, strict=True):
        assert result["expectation_config"]["type"] == expectation["type"]
        found = result["result"].get("unexpected_count", result["result"].get("observed_value"))
        if result["success"] != holds or (observed is not None and found != pytest.approx(observed)):
            wrong.append((expectation, result["success"], found, result["exception_info"]))
    assert not wrong


def counted(expectations: list[dict[str, Any]], dataset: str, run: RunInfo, engine: Any) -> list[Any]:
    """Of each expectation the number of unexpected values; what went wrong, where it could not be evaluated."""
    results = full_result(run, ValidateData(dataset=dataset, suite=suite(*expectations), engine=engine))
    return [r["result"].get("unexpected_count", r["exception_info"]) for r in results]


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_missing_values_beside_others_are_unexpected_on_both_engines(
    tmp_path: Path, run: RunInfo, engine: Any
) -> None:
    path = tmp_path / "pairs.parquet"
    table = {"a": [1, 1, None, None, 3], "b": [1, None, 1, None, 2], "c": [1, 1, 1, None, 1]}
    pq.write_table(pa.table({n: pa.array(v, pa.int64()) for n, v in table.items()}), path)
    pair, pairs = {"column_A": "a", "column_B": "b"}, [[1, 1], [3, 2]]
    never, any_missing = {"ignore_row_if": "neither"}, {"ignore_row_if": "either_value_is_missing"}
    asked = {
        # by default rows are left out in which both values are missing
        "equal": (expect("column_pair_values_to_be_equal", **pair), 3),
        "equal, all rows": (expect("column_pair_values_to_be_equal", **pair, **never), 4),
        "equal, whole rows": (expect("column_pair_values_to_be_equal", **pair, **any_missing), 1),
        "greater": (expect("column_pair_values_a_to_be_greater_than_b", **pair), 3),
        "greater or equal": (expect("column_pair_values_a_to_be_greater_than_b", **pair, or_equal=True), 2),
        "in set": (expect("column_pair_values_to_be_in_set", **pair, value_pairs_set=pairs), 2),
        "sum": (expect("multicolumn_sum_to_equal", column_list=["a", "b", "c"], sum_total=3), 3),
        "unique": (expect("select_column_values_to_be_unique_within_record", column_list=["a", "b", "c"]), 3),
    }
    found = counted([e for e, _ in asked.values()], str(path), run, engine)
    assert dict(zip(asked, found, strict=True)) == {name: count for name, (_, count) in asked.items()}


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_a_row_condition_is_read_to_its_end(mixed: str, run: RunInfo, engine: Any) -> None:
    conditions = {
        'col("id") < 10': 10,
        'col("id") < 10 AND col("id") > 4': 5,
        'col("id") < 10 or col("id") >= 990': 20,
        'col("id")<10 and col("text")=="v3" OR col("id") == 7': 2,
        'col("text") == "v1 OR v2"': 0,
        'col("few").notNull() AND col("id") < 10': 8,
    }
    asked = [
        expect(
            "column_values_to_be_between",
            column="id",
            max_value=-1,
            row_condition=text,
            condition_parser="great_expectations",
        )
        for text in conditions
    ]
    found = counted(asked, mixed, run, engine)
    assert [count or 0 for count in found] == list(conditions.values())  # of no rows DuckDB's count is null
    with pytest.raises(BadInput) as failure:
        ValidateData(dataset=mixed, suite=suite(asked[1]), engine=engine).run(run)
    assert 'row_condition=col("id") < 10 AND col("id") > 4, max_value=-1.0): 5 of 5' in str(failure.value)


@pytest.mark.parametrize(
    "text",
    ['(col("id") < 10)', 'col("id") < 10 AND', 'col("id") < 10 XOR col("id") > 4', 'col("id") BETWEEN 1'],
)
def test_a_row_condition_that_would_be_read_in_part_is_refused(mixed: str, run: RunInfo, text: str) -> None:
    asked = expect(
        "column_values_to_not_be_null", column="id", row_condition=text, condition_parser="great_expectations"
    )
    with pytest.raises(BadConfiguration, match=r"expectation 1: .* is no comparison such as"):
        ValidateData(dataset=mixed, suite=suite(asked)).run(run)


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_dates_are_compared_with_the_texts_of_a_suite(mixed: str, run: RunInfo, engine: Any) -> None:
    days = [f"2013-01-{day:02}" for day in range(1, 29)]
    asked = [
        expect("column_values_to_be_in_set", column="day", value_set=days),
        expect("column_values_to_be_in_set", column="day", value_set=days[1:]),
        expect("column_values_to_not_be_in_set", column="day", value_set=days[:1]),
        expect("column_values_to_not_be_in_set", column="day", value_set=["2014-01-01"]),
        expect("column_values_to_be_between", column="day", max_value="2013-01-27"),
    ]
    assert counted(asked, mixed, run, engine) == [0, 36, 36, 0, 35]
    of_all = [
        (expect("column_distinct_values_to_be_in_set", column="day", value_set=days), True),
        (expect("column_distinct_values_to_be_in_set", column="day", value_set=days[1:]), False),
        (expect("column_distinct_values_to_equal_set", column="day", value_set=days), True),
        (expect("column_distinct_values_to_contain_set", column="day", value_set=["2014-01-01"]), False),
        (expect("column_most_common_value_to_be_in_set", column="day", value_set=days, ties_okay=True), True),
        (
            expect(
                "column_values_to_be_in_set", column="at", value_set=["2013-01-01T00:00:00"], mostly=0.001
            ),
            True,
        ),
        (expect("column_values_to_not_be_in_set", column="at", value_set=["2013-01-01T05:00:00"]), False),
        (expect("column_distinct_values_to_contain_set", column="at", value_set=["2013-01-01 05:00"]), True),
    ]
    stage = ValidateData(dataset=mixed, suite=suite(*[e for e, _ in of_all]), engine=engine)
    assert [r["success"] for r in full_result(run, stage)] == [holds for _, holds in of_all]


@pytest.fixture(scope="session")
def hours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The 48 hours of two days, as every type of time that Parquet has."""
    path = tmp_path_factory.mktemp("hours") / "hours.parquet"
    con = duckdb.connect()
    con.execute("SET TimeZone = 'UTC'")
    con.execute(
        f"""COPY (
            SELECT "at", "at"::TIMESTAMP_NS AS ns, "at"::TIMESTAMP_MS AS ms, "at"::TIMESTAMPTZ AS seen, "at"::TIMESTAMPTZ_NS AS seen_ns,
                "at"::DATE AS day
            FROM (SELECT TIMESTAMP '2013-01-01' + INTERVAL (i) HOUR AS "at" FROM range(48) t(i))
        ) TO '{path}' (FORMAT parquet)"""
    )
    return str(path)


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_bounds_in_any_form_are_compared_with_times_of_any_type(
    hours: str, run: RunInfo, engine: Any
) -> None:
    texts = ["2013-01-02", "2013-01-02T00:00:00", "2013-01-02 00:00:00+00:00", "2013-01-02T02:00:00+02:00"]
    start, week = {"$PARAMETER": "start"}, {"$PARAMETER": "start + timedelta(weeks=1)"}
    asked, wanted = list[Any](), list[Any]()
    for column in ("at", "ns", "ms", "seen", "seen_ns", "day"):
        equal = 24 if column == "day" else 1
        for text in texts:
            condition = {
                "row_condition": f'col("{column}") < "{text}"',
                "condition_parser": "great_expectations",
            }
            asked += [
                expect("column_values_to_be_between", column=column, min_value=text),
                expect("column_values_to_be_in_set", column=column, value_set=[text]),
                expect("column_values_to_be_null", column="ms", **condition),
            ]
            wanted += [(False, 24), (False, 48 - equal), (False, 24)]
        asked += [
            expect("column_max_to_be_between", column=column, min_value=start, max_value=week),
            expect("column_min_to_be_between", column=column, min_value=start),
            expect("column_max_to_be_between", column=column, min_value=week),
        ]
        wanted += [(True, None), (False, None), (False, None)]
    stage = ValidateData(
        dataset=hours,
        suite=suite(*asked),
        engine=engine,
        suite_parameters={"start": "2013-01-02T00:00:00+00:00"},
    )
    found = [(r["success"], r["result"].get("unexpected_count")) for r in full_result(run, stage)]
    assert [(a, f) for a, f, w in zip(asked, found, wanted, strict=True) if f != w] == []


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_numbers_are_the_same_on_both_engines(tmp_path: Path, run: RunInfo, engine: Any) -> None:
    path = tmp_path / "numbers.parquet"
    duckdb.sql(
        f"""COPY (SELECT i AS id, CASE WHEN i % 10 > 0 THEN 9007199254740992 + i END AS big,
            CASE WHEN i % 6 > 0 THEN i % 4 END AS few FROM range(100) t(i)) TO '{path}'"""
    )

    def where(sign: str, value: Any) -> dict[str, Any]:
        condition = {"type": "comparison", "column": {"name": "few"}, "operator": sign, "parameter": value}
        return expect("column_values_to_be_null", column="id", row_condition=condition)

    few = [i % 4 for i in range(100) if i % 6]
    asked = {
        "big are unique": (expect("column_values_to_be_unique", column="big"), 0),
        "one of big": (expect("column_values_to_be_in_set", column="big", value_set=[2**53 + 1]), 89),
        "texts": (
            expect("column_values_to_be_in_set", column="few", value_set=["1", "2"]),
            len(few) - few.count(1) - few.count(2),
        ),
        "no texts": (expect("column_values_to_not_be_in_set", column="few", value_set=["1"]), few.count(1)),
        "a missing value differs from none": (where("!=", 1), len(few) - few.count(1)),
        "nor is it in no set": (where("NOT_IN", [1]), len(few) - few.count(1)),
        "where a text": (where("==", "1"), few.count(1)),
    }
    found = counted([e for e, _ in asked.values()], str(path), run, engine)
    assert dict(zip(asked, found, strict=True)) == {name: count for name, (_, count) in asked.items()}


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_outliers_are_the_same_on_both_engines(mixed: str, run: RunInfo, engine: Any) -> None:
    kind = "column_values_to_not_be_outliers"
    asked = [
        expect(kind, column="id", method="iqr", multiplier=1.5),
        expect(kind, column="id", method="iqr", multiplier=0.3),
        expect(kind, column="number", method="iqr", multiplier=0.3),
        expect(kind, column="id", method="std", multiplier=1.0),
        expect(kind, column="nothing", method="iqr"),
        expect(
            kind,
            column="number",
            method="iqr",
            multiplier=0.0,
            row_condition='col("id") < 100',
            condition_parser="great_expectations",
        ),
    ]
    of_id, of_number = range(1000), sorted(NUMBERS)

    def outside(values: Any, reach: float) -> int:
        low, high = (pd.Series(values).quantile(q) for q in (0.25, 0.75))
        return sum(not low - reach * (high - low) <= v <= high + reach * (high - low) for v in values)

    spread = pd.Series(of_id).std()
    wanted = [
        0,
        outside(of_id, 0.3),
        outside(of_number, 0.3),
        sum(abs(v - 499.5) >= spread for v in of_id),
        0,
        outside([i * 0.5 for i in range(100) if i % 10 and i % 11], 0.0),
    ]
    assert wanted[1] > 0
    assert counted(asked, mixed, run, engine) == wanted


def test_columns_in_another_order_are_said(mixed: str, run: RunInfo) -> None:
    asked = expect("table_columns_to_match_ordered_list", column_list=["next", "id"])
    with pytest.raises(BadInput, match=r"expect_table_columns_to_match_ordered_list\(.*'next'.*Found.*'id'"):
        ValidateData(dataset=mixed, suite=suite(asked)).run(run)


@pytest.mark.parametrize("missing", [None, float("nan")], ids=["a null too", "no null"])
@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_nan_is_missing_in_what_arrow_wrote_too(
    tmp_path: Path, run: RunInfo, engine: Any, missing: float | None
) -> None:
    """Arrow's statistics leave NaN out, from which DuckDB concludes that nothing is NaN."""
    path = tmp_path / "arrow.parquet"
    pq.write_table(pa.table({"x": [1.0, 2.0, float("nan"), missing, 5.0], "id": [1, 2, 3, 4, 5]}), path)
    spread = {"quantiles": [0.5, 1.0], "value_ranges": [[2, 2], [5, 5]]}
    late = {"quantiles": [0.5, 1.0], "value_ranges": [[4, 4], [5, 5]]}
    asked = suite(
        expect("column_values_to_not_be_null", column="x"),
        expect("column_max_to_be_between", column="x", min_value=5, max_value=5),
        expect("column_quantile_values_to_be_between", column="x", quantile_ranges=spread),
        expect(
            "column_quantile_values_to_be_between",
            column="id",
            quantile_ranges=late,
            row_condition='col("id") > 2',
            condition_parser="great_expectations",
        ),
    )
    results = full_result(run, ValidateData(dataset=str(path), suite=asked, engine=engine))
    assert [r["success"] for r in results] == [False, True, True, True]
    assert results[0]["result"]["unexpected_count"] == 2


LIKE = expect("column_values_to_match_like_pattern", column="text", like_pattern="v_%")
ROWS = {
    "type": "unexpected_rows_expectation",
    "kwargs": {"unexpected_rows_query": 'SELECT id FROM {batch} WHERE "group" = 3'},
}


def test_like_patterns_and_queries_are_sql_only(mixed: str, run: RunInfo) -> None:
    like, rows = full_result(run, ValidateData(dataset=mixed, suite=suite(LIKE, ROWS)))
    assert (like["success"], like["result"]["unexpected_count"]) == (True, 0)
    assert (rows["success"], rows["result"]["observed_value"]) == (False, 143)
    with pytest.raises(BadInput, match="does not exist for this engine; set engine='duckdb'"):
        ValidateData(dataset=mixed, suite=suite(LIKE), engine="pandas").run(run)


def test_increasing_values_are_for_pandas_only(mixed: str, run: RunInfo) -> None:
    increasing = suite(expect("column_values_to_be_increasing", column="id"))
    assert ValidateData(dataset=mixed, suite=increasing, engine="pandas").run(run).values == {"passed": True}
    with pytest.raises(BadInput, match="set engine='pandas'"):
        ValidateData(dataset=mixed, suite=increasing).run(run)


FAILING = suite(
    expect("column_values_to_be_in_set", column="origin", value_set=["EWR", "JFK"]),
    expect("column_values_to_be_between", column="distance", max_value=4000) | {"severity": "warning"},
    expect("column_mean_to_be_between", column="distance", min_value=0, max_value=900),
    expect("column_values_to_not_be_null", column="tail"),
    expect("compound_columns_to_be_unique", column_list=["day", "origin"]),
    expect("table_columns_to_match_set", column_set=["gate", "carrier"], exact_match=False),
    expect("column_values_to_match_regex", column="carrier", regex="^(?=[A-Z9])"),
    expect("table_row_count_to_be_between", min_value=27_000),
)


def test_a_failure_says_what_where_how_many_and_which_values(january: str, run: RunInfo) -> None:
    with pytest.raises(BadInput) as failure:
        ValidateData(dataset=january, suite=FAILING).run(run)
    assert failure.value.exit_code == 80
    lines = str(failure.value).splitlines()
    assert lines[0] == "7 of 8 expectations failed: suite 'test' on january.parquet (27004 rows)."
    assert lines[1] == (
        "- expect_column_values_to_be_in_set(column='origin', value_set=['EWR', 'JFK']): "
        "7950 of 27004 (29.4%) unexpected, e.g. 'LGA'"
    )
    assert re.fullmatch(r"- expect_column_mean_to_be_between\(.*\): observed 1006\.8\d+", lines[2])
    assert lines[3].endswith(": could not be evaluated: column 'tail' is not in the data")
    assert re.search(r"27004 of 27004 \(100%\) unexpected, e\.g\. \{day=\d+, origin='\w+'\}, \{", lines[4])
    assert "missing=['gate']" in lines[5]
    assert re.search("could not be evaluated: .*perl operator", lines[6])
    assert lines[7].startswith("- [warning] expect_column_values_to_be_between")
    assert len(str(failure.value)) < 4000

    stored = re.findall(r"file://\S+", str(failure.value))
    report = json.loads(run.fetch(stored[0]).read_text())
    assert report["statistics"]["unsuccessful_expectations"] == 7
    assert set(report["results"][0]["result"]["partial_unexpected_list"]) == {"LGA"}
    assert "must belong to this set" in run.fetch(stored[1]).read_text()


def test_many_failures_leave_room_in_the_receipt_for_the_addresses(mixed: str, run: RunInfo) -> None:
    wide = [
        expect("column_values_to_be_in_set", column="text", value_set=[f"wért {n}" * 5] * 20)
        for n in range(20)
    ]
    with pytest.raises(
        BadInput, match=r"- and \d+ more, in the full result\.\nFull result: file:"
    ) as failure:
        ValidateData(dataset=mixed, suite=suite(*wide)).run(run)
    assert len(json.dumps(str(failure.value))) < 3000  # what a receipt keeps of a message


def test_the_log_says_nothing_of_the_library(january: str, tmp_path: Path) -> None:
    """In a process of its own, because the library talks most while it is imported."""
    stage = {"dataset": january, "suite": suite(expect("table_row_count_to_equal", value=27_004))}
    code = (
        "import logging, warnings; logging.basicConfig(level='INFO'); warnings.simplefilter('ignore')\n"
        "from lepton_airflow.stages import RunInfo\n"
        "from lepton_airflow.stages.validate_data import ValidateData\n"
        f"print(ValidateData(**{stage!r}).run(RunInfo.local({str(tmp_path)!r})).summary)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=SUITES.parent
    )
    assert done.stdout == "january.parquet: all 1 expectations of suite 'test' hold on 27004 rows.\n"
    said = done.stderr.splitlines()
    assert [line.partition(",")[0] for line in said] == [
        "INFO:lepton_airflow.stages.validate_data:loading Great Expectations",
        "INFO:lepton_airflow.stages.validate_data:checking 1 expectations of suite 'test' on duckdb",
    ]


def test_warn_goes_on_and_tells(january: str, run: RunInfo, caplog: pytest.LogCaptureFixture) -> None:
    result = ValidateData(dataset=january, suite=FAILING, on_failure="warn").run(run)
    assert result.values == {"passed": False}
    assert result.metrics == {"rows": 27004, "expectations": 8, "failed": 7, "failed_critical": 6}
    assert "column 'tail' is not in the data" in caplog.text


def test_a_warning_expectation_fails_nothing(
    january: str, run: RunInfo, caplog: pytest.LogCaptureFixture
) -> None:
    mild = expect("column_values_to_be_between", column="distance", max_value=100) | {"severity": "warning"}
    result = ValidateData(dataset=january, suite=suite(mild)).run(run)
    assert (result.values["passed"], result.metrics["failed"]) == (True, 1)
    assert "[warning]" in caplog.text


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_the_page_is_one_file_that_runs_and_loads_nothing(tmp_path: Path, run: RunInfo, engine: Any) -> None:
    path = tmp_path / "markup.parquet"
    duckdb.sql(f"COPY (SELECT '<script>alert(1)</script><img src=\"http://evil/x\">' AS text) TO '{path}'")
    stage = ValidateData(
        dataset=str(path),
        suite=suite(expect("column_values_to_be_in_set", column="text", value_set=["a"])),
        on_failure="warn",
        engine=engine,
    )
    page = run.fetch(stage.run(run).artifacts["data_docs"].uri).read_text()
    assert not re.search("<(script|link|img)", page)
    assert page.index("Content-Security-Policy") < page.index("<style>")
    assert "default-src 'none'" in page


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_the_shipped_suite_holds_without_network(raw_flights: Path, run: RunInfo, engine: Any) -> None:
    planes = raw_flights / "planes.parquet"
    result = ValidateData(dataset=str(planes), suite=str(SUITES / "planes.json"), engine=engine).run(run)
    assert result.summary == "planes.parquet: all 9 expectations of suite 'planes' hold on 3322 rows."


def test_the_flights_suite_holds_on_a_snapshot_and_notices_a_broken_one(
    raw_flights: Path, tmp_path: Path, run: RunInfo
) -> None:
    con = duckdb.connect()
    for name, source in {
        "flights": f"read_csv('{raw_flights}/flights/2013-0[1-4].csv')",
        "weather": f"read_json('{raw_flights}/weather/2013-0[1-4].jsonl')",
        "planes": f"'{raw_flights}/planes.parquet'",
        "airports": f"read_csv('{raw_flights}/airports.csv')",
        "airlines": f"read_csv('{raw_flights}/airlines.tsv')",
    }.items():
        con.execute(f"CREATE VIEW {name} AS FROM {source}")
    query = (SUITES.parent / "dags" / "sql" / "flights_snapshot.sql").read_text()
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    window = {"window_start": "2013-04-01", "window_end": "2013-05-01"}
    con.execute("CREATE TABLE snapshot AS " + query, window)
    con.execute(f"COPY snapshot TO '{good}'")
    con.execute(
        f"COPY (SELECT * REPLACE (if(origin = 'EWR', 'ewr', origin) AS origin) FROM snapshot UNION ALL "
        f"(FROM snapshot LIMIT 10)) TO '{bad}'"
    )
    flights = str(SUITES / "flights.json")
    assert ValidateData(dataset=str(good), suite=flights).run(run).values == {"passed": True}
    with pytest.raises(BadInput, match=r"'ewr'") as failure:
        ValidateData(dataset=str(bad), suite=flights).run(run)
    assert "expect_compound_columns_to_be_unique" in str(failure.value)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM {batch}, read_text('%s')",
        "SELECT * FROM {batch}, read_csv('%s', header=false)",
        "SELECT * FROM {batch}, '%s' AS t",
        "SELECT * FROM {batch}, glob('%s')",
    ],
)
def test_a_query_in_a_suite_reads_nothing_but_the_dataset(
    january: str, tmp_path_factory: pytest.TempPathFactory, run: RunInfo, sql: str
) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.csv"
    secret.write_text("hunter2\n")
    query = {"type": "unexpected_rows_expectation", "kwargs": {"unexpected_rows_query": sql % secret}}
    [result] = full_result(run, ValidateData(dataset=january, suite=suite(query)))
    assert not result["success"]
    assert "hunter2" not in json.dumps(result)
    assert re.search("Permission Error|Catalog Error", json.dumps(result["exception_info"]))


def test_a_directory_of_files_is_one_dataset(january: str, tmp_path: Path, run: RunInfo) -> None:
    folder = tmp_path / "parts"
    duckdb.sql(f"COPY (FROM '{january}') TO '{folder}' (FORMAT parquet, PARTITION_BY (origin))")
    whole = suite(
        expect("table_row_count_to_equal", value=27_004),
        expect("column_values_to_be_in_set", column="origin", value_set=["EWR", "JFK", "LGA"]),
    )
    for engine in ("duckdb", "pandas"):
        stage = ValidateData(dataset=str(folder), suite=whole, engine=engine)  # type: ignore[arg-type]
        assert stage.run(run).values == {"passed": True}


def test_no_rows_fail_what_asks_for_rows(tmp_path: Path, run: RunInfo) -> None:
    path = tmp_path / "empty.parquet"
    duckdb.sql(f"COPY (SELECT 1 AS id, 'a' AS text WHERE false) TO '{path}'")
    asked = suite(
        expect("table_row_count_to_be_between", min_value=1),
        expect("column_values_to_not_be_null", column="id"),
        expect("column_values_to_be_unique", column="id"),
    )
    for engine in ("duckdb", "pandas"):
        stage = ValidateData(dataset=str(path), suite=asked, engine=engine)  # type: ignore[arg-type]
        assert [r["success"] for r in full_result(run, stage)] == [False, True, True]
    with pytest.raises(BadInput, match="has no rows, so there is nothing to infer"):
        ValidateData(dataset=str(path), suite="infer").run(run)


def test_too_little_memory_is_told_apart_from_bad_data(tmp_path: Path, run: RunInfo) -> None:
    path = tmp_path / "wide.parquet"
    duckdb.sql(f"COPY (SELECT random() AS number FROM range(2_000_000)) TO '{path}'")
    spread = suite(
        expect("column_quantile_values_to_be_between", column="number", quantile_ranges=quantiles(0, 0))
    )
    with pytest.raises(
        BadInput, match="could not be evaluated: DuckDB needs more memory: raise memory_limit_mb"
    ):
        ValidateData(dataset=str(path), suite=spread, memory_limit_mb=20).run(run)


def test_times_are_compared_in_utc(tmp_path: Path, run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    path = tmp_path / "time.parquet"
    duckdb.sql(f"COPY (SELECT TIMESTAMPTZ '2013-01-01 10:00:00+00' AS seen) TO '{path}'")
    noon = suite(
        expect(
            "column_values_to_be_between",
            column="seen",
            min_value="2013-01-01T09:59:00+00:00",
            max_value="2013-01-01T10:01:00+00:00",
        ),
        {
            "type": "unexpected_rows_expectation",
            "kwargs": {"unexpected_rows_query": "SELECT * FROM {batch} WHERE hour(seen) <> 10"},
        },
    )
    assert ValidateData(dataset=str(path), suite=noon).run(run).values == {"passed": True}


# -- the suite --------------------------------------------------------------------------------------------------------


def test_parameters_fill_the_suite(january: str, run: RunInfo) -> None:
    asked = suite(expect("table_row_count_to_be_between", min_value={"$PARAMETER": "least_rows"}))
    stage = ValidateData(dataset=january, suite=asked, suite_parameters={"least_rows": 30_000})
    with pytest.raises(BadInput, match="min_value=30000"):
        stage.run(run)
    with pytest.raises(BadConfiguration, match=r"pass suite_parameters=\{'least_rows': …\}"):
        ValidateData(dataset=january, suite=asked).run(run)


def test_what_asks_for_now_is_asked_again(january: str, run: RunInfo, tmp_path: Path) -> None:
    asked = suite(expect("column_max_to_be_between", column="at", min_value={"$PARAMETER": "now()"}))
    path = write(tmp_path / "suite.json", asked)
    keys = [cache_key(ValidateData(dataset=january, suite=one), run) for one in (asked, path, FAILING)]
    assert [key is None for key in keys] == [True, True, False]


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ([], "has no expectations: expected"),
        ({"expectations": []}, "has no expectations: expected"),
        (
            suite({"type": "expect_column_value_to_be_unique", "kwargs": {}}),
            "mean 'expect_column_values_to_be_unique'",
        ),
        (suite({"kwargs": {}}), "expectation 1: there is no expectation None"),
        (suite(expect("column_values_to_be_unique")), "column\n? *field required|column field required"),
        (suite(expect("column_values_to_be_unique", column="a", most=1)), "most.*extra fields not permitted"),
        (suite(expect("column_values_to_be_between", column="a", mostly=2)), "mostly.*less than"),
    ],
)
def test_a_wrong_suite_gets_one_sentence(
    january: str, run: RunInfo, tmp_path: Path, content: Any, message: str
) -> None:
    path = write(tmp_path / "wrong.json", content)
    with pytest.raises(BadConfiguration, match=message):
        ValidateData(dataset=january, suite=path).run(run)


def test_progress_is_told_while_queries_run(
    january: str, run: RunInfo, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lepton_airflow.data import expectations as gx_duckdb

    monkeypatch.setattr(gx_duckdb, "_TELL_S", 0.0)
    with caplog.at_level("INFO", logger="lepton_airflow"):
        ValidateData(dataset=january, suite=FAILING, on_failure="warn").run(run)
    told = [r.getMessage() for r in caplog.records if r.levelname == "INFO"]
    assert told[0].startswith("loading Great Expectations")
    assert (
        told[1]
        == f"checking {len(FAILING['expectations'])} expectations of suite {FAILING['name']!r} on duckdb"
    )
    queries = [int(t.split()[1]) for t in told if re.fullmatch(r"query \d+ begins after \d+ s", t)]
    assert queries == list(range(1, len(queries) + 1))
    assert len(queries) >= 3


def test_an_absent_suite_is_looked_for_by_name(january: str, run: RunInfo, tmp_path: Path) -> None:
    write(tmp_path / "flights.json", suite(expect("table_row_count_to_equal", value=1)))
    with pytest.raises(BadConfiguration, match=r"did you mean 'flights.json'\?"):
        ValidateData(dataset=january, suite=str(tmp_path / "flight.json")).run(run)
    with pytest.raises(
        BadConfiguration, match=r"suite='\./suites/a\.json' takes it from the DAG file's folder"
    ):
        ValidateData(dataset=january, suite="suites/a.json").run(run)
    for text in (
        json.dumps(suite(*[expect("column_to_exist", column=c) for c in "abcdef"])),
        "~nobody/a.json",
    ):
        with pytest.raises(BadConfiguration, match="there is no file"):
            ValidateData(dataset=january, suite=text.replace("f", "f/" + "f" * 300)).run(run)


def test_a_suite_from_the_store_is_fetched_by_its_pin(january: str, run: RunInfo) -> None:
    artifact = run.save("stored.json", json.dumps(suite(expect("table_row_count_to_equal", value=27_004))))
    assert ValidateData(dataset=january, suite=artifact.uri).run(run).values == {"passed": True}


def test_an_edited_suite_is_a_new_cache_key(january: str, run: RunInfo, tmp_path: Path) -> None:
    path = tmp_path / "suite.json"

    def key() -> str | None:
        return cache_key(ValidateData(dataset=january, suite=str(path)), run)

    write(path, suite(expect("table_row_count_to_equal", value=1)))
    first = key()
    write(path, json.dumps(suite(expect("table_row_count_to_equal", value=1)), indent=4))
    assert key() == first  # white space is no change
    write(path, suite(expect("table_row_count_to_equal", value=2)))
    assert key() != first
    inline = [
        ValidateData(dataset=january, suite=suite(expect("column_to_exist", column=c)))
        for c in ("a.b", "a.c")
    ]
    assert cache_key(inline[0], run) != cache_key(inline[1], run)


def test_no_parquet_gets_one_sentence(run: RunInfo, tmp_path: Path, january: str) -> None:
    truncated = tmp_path / "truncated.parquet"
    truncated.write_bytes(Path(january).read_bytes()[:5000])
    text = Path(write(tmp_path / "text.csv", "a,b\n1,2\n"))
    for path, said in (
        (truncated, "truncated.parquet cannot be read as Parquet: .* Run the task that wrote it again"),
        (text, "text.csv is no Parquet file: land it with IngestData first"),
    ):
        with pytest.raises(BadInput, match=said):
            ValidateData(dataset=str(path), suite=FAILING).run(run)


# -- infer ------------------------------------------------------------------------------------------------------------


def infer(run: RunInfo, dataset: str) -> tuple[str, dict[str, Any]]:
    uri = ValidateData(dataset=dataset, suite="infer").run(run).artifacts["suite"].uri
    proposed: dict[str, Any] = json.loads(run.fetch(uri).read_text())
    return uri, proposed


def kwargs_of(proposed: dict[str, Any], kind: str, column: str) -> Callable[[], dict[str, Any]] | Any:
    found = [
        e["kwargs"]
        for e in proposed["expectations"]
        if e["type"] == f"expect_{kind}" and e["kwargs"].get("column") == column
    ]
    return found[0] if found else None


def test_an_inferred_suite_holds_on_other_months_and_catches_a_broken_one(
    raw_flights: Path, january: str, tmp_path: Path, run: RunInfo
) -> None:
    uri, proposed = infer(run, january)
    assert kwargs_of(proposed, "column_values_to_be_in_set", "origin")["value_set"] == ["EWR", "JFK", "LGA"]
    assert kwargs_of(proposed, "column_values_to_not_be_null", "dep_time")["mostly"] == 0.91  # 1.9% are null
    assert "mostly" not in kwargs_of(proposed, "column_values_to_not_be_null", "carrier")
    assert kwargs_of(proposed, "column_values_to_be_between", "distance")["min_value"] == 0  # never below 0
    assert kwargs_of(proposed, "column_values_to_be_between", "month") is None
    assert ValidateData(dataset=january, suite=uri).run(run).values == {"passed": True}
    for month in ("02", "07", "12"):
        later = tmp_path / f"{month}.parquet"
        duckdb.sql(f"COPY (FROM read_csv('{raw_flights}/flights/2013-{month}.csv')) TO '{later}'")
        assert ValidateData(dataset=str(later), suite=uri).run(run).values == {"passed": True}

    broken = tmp_path / "broken.parquet"
    duckdb.sql(
        f"COPY (SELECT * REPLACE (-distance AS distance, 'SWF' AS origin) FROM '{january}') TO '{broken}'"
    )
    with pytest.raises(BadInput) as failure:
        ValidateData(dataset=str(broken), suite=uri).run(run)
    assert re.match("2 of .*'SWF'", str(failure.value), re.DOTALL)


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_a_suite_inferred_for_an_engine_holds_on_it(mixed: str, run: RunInfo, engine: Any) -> None:
    uri = ValidateData(dataset=mixed, suite="infer", engine=engine).run(run).artifacts["suite"].uri
    assert ValidateData(dataset=mixed, suite=uri, engine=engine).run(run).values == {"passed": True}


def test_an_inferred_suite_takes_any_types_and_names(mixed: str, tmp_path: Path, run: RunInfo) -> None:
    uri, proposed = infer(run, mixed)
    assert kwargs_of(proposed, "column_values_to_be_unique", "id") == {"column": "id"}
    assert kwargs_of(proposed, "column_values_to_be_unique", "group") is None
    assert kwargs_of(proposed, "column_values_to_be_in_set", CITY)["value_set"] == ["EWR", "JFK", "Łódź"]
    assert ValidateData(dataset=mixed, suite=uri).run(run).values == {"passed": True}

    nested = tmp_path / "nested.parquet"
    duckdb.sql(
        f"COPY (SELECT [1, 2] AS list, {{'a': 1}} AS struct, uuid() AS id, 'x'::BLOB AS blob) TO '{nested}'"
    )
    uri, _ = infer(run, str(nested))
    assert ValidateData(dataset=str(nested), suite=uri).run(run).values == {"passed": True}


@pytest.fixture
def few(tmp_path: Path) -> str:
    """Four rows: decimals that no float holds, and pairs of which one is wrong."""
    price = pa.array([Decimal("1.10"), Decimal("0.30"), Decimal("0.10"), None], pa.decimal128(10, 2))
    total = pa.array([Decimal("0.30")] * 4, pa.decimal128(10, 2))
    key = pa.array([Decimal("12345678901234567890.12"), Decimal("12345678901234567890.13")] * 2)
    columns = {"price": price, "total": total, "key": key, "a": [1, 2, 3, 4], "b": [1, 1, 1, 1]}
    pq.write_table(pa.table(columns), tmp_path / "few.parquet")
    return str(tmp_path / "few.parquet")


def only(column: str, value: float) -> dict[str, str]:
    return {"row_condition": f'col("{column}") == {value}', "condition_parser": "great_expectations"}


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_decimals_equal_the_numbers_of_a_suite(engine: Any, few: str, run: RunInfo) -> None:
    asked = [
        (expect("column_min_to_be_between", column="price", min_value=0.1), True),
        (expect("column_max_to_be_between", column="total", max_value=0.3), True),
        (expect("column_max_to_be_between", column="price", min_value=1.1), True),
        (expect("column_values_to_be_between", column="price", min_value=1.1, **only("a", 1)), True),
        (expect("column_values_to_be_between", column="total", min_value=0.3, strict_min=True), False),
        (expect("column_values_to_be_in_set", column="total", value_set=[0.3]), True),
        (expect("column_values_to_not_be_in_set", column="total", value_set=[0.3]), False),
        (expect("column_distinct_values_to_equal_set", column="price", value_set=[0.1, 0.3, 1.1]), True),
        (expect("column_most_common_value_to_be_in_set", column="total", value_set=[0.3]), True),
        (expect("column_values_to_be_between", column="a", min_value=2, **only("price", 0.3)), True),
        (expect("column_values_to_be_between", column="a", min_value=9, **only("price", 0.3)), False),
        # Floats would make one of these two.
        (expect("column_unique_value_count_to_be_between", column="key", min_value=2), True),
    ]
    results = full_result(run, ValidateData(dataset=few, suite=suite(*(e for e, _ in asked)), engine=engine))
    assert [r["success"] for r in results] == [holds for _, holds in asked]
    assert not any(r["exception_info"].get("raised_exception") for r in results)


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_long_decimals_equal_the_numbers_of_a_suite(engine: Any, odd: str, run: RunInfo) -> None:
    asked = [
        (expect("column_values_to_be_in_set", column="long", value_set=[0.3], mostly=0.5), 1),
        (expect("column_values_to_not_be_in_set", column="long", value_set=[0.3]), 1),
        (expect("column_values_to_be_between", column="long", max_value=0.3), 1),
        (expect("column_values_to_be_between", column="n", max_value=0, **only("long", 0.3)), 1),
        (expect("column_min_to_be_between", column="long", min_value=0.3, max_value=0.3), True),
        (expect("column_mean_to_be_between", column="long", min_value=6e18, max_value=7e18), True),
        (expect("column_unique_value_count_to_be_between", column="long", min_value=2, max_value=2), True),
        (expect("column_values_to_not_be_null", column="long"), 1),
        (pair("to_be_equal", "long", "price", ignore_row_if="either_value_is_missing"), 1),
    ]
    stage = ValidateData(dataset=odd, suite=suite(*(e for e, _ in asked)), engine=engine)
    found = [r["result"].get("unexpected_count", r["success"]) for r in full_result(run, stage)]
    assert found == [wanted for _, wanted in asked]


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_a_value_twice_in_a_set_is_there_once(engine: Any, few: str, run: RunInfo) -> None:
    asked = expect("column_distinct_values_to_contain_set", column="a", value_set=[1, "1", 2, 2])
    (result,) = full_result(run, ValidateData(dataset=few, suite=suite(asked), engine=engine))
    assert result["success"]


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_pairs_in_a_set_obey_the_row_condition(engine: Any, few: str, run: RunInfo) -> None:
    kind, pairs = "column_pair_values_to_be_in_set", {"column_A": "a", "column_B": "b"}
    results = full_result(
        run,
        ValidateData(
            dataset=few,
            suite=suite(
                expect(kind, **pairs, value_pairs_set=[[1, 1]], **only("a", 1)),
                expect(kind, **pairs, value_pairs_set=[[1, 1], [2, 1], [3, 1]], mostly=0.7, **only("a", 4)),
            ),
            engine=engine,
        ),
    )
    assert [(r["success"], r["result"]["unexpected_count"]) for r in results] == [(True, 0), (False, 1)]


@pytest.mark.parametrize(
    ("asked", "observed"),
    [
        (expect("column_distinct_values_to_be_in_set", column="a", value_set=[1]), None),
        (expect("column_distinct_values_to_equal_set", column="a", value_set=[1]), None),
        (expect("column_distinct_values_to_contain_set", column="a", value_set=[1]), None),
        (expect("column_most_common_value_to_be_in_set", column="a", value_set=[1]), [2]),
        (expect("column_median_to_be_between", column="a", max_value=1), 2),
        (
            expect(
                "column_kl_divergence_to_be_less_than",
                column="a",
                partition_object={"bins": [0, 2, 4], "weights": [0.5, 0.5]},
                threshold=0.1,
            ),
            None,
        ),
        (
            expect(
                "column_pair_values_a_to_be_greater_than_b",
                column_A="b",
                column_B="a",
                ignore_row_if="neither",
            ),
            None,
        ),
    ],
)
def test_every_metric_of_duckdb_takes_a_row_condition(
    asked: dict[str, Any], observed: Any, few: str, run: RunInfo
) -> None:
    asked["kwargs"] |= only("a", 2)
    (result,) = full_result(run, ValidateData(dataset=few, suite=suite(asked)))
    assert not result["success"]
    assert not result["exception_info"].get("raised_exception")
    assert observed is None or result["result"]["observed_value"] == observed


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_floats_times_and_booleans_equal_what_a_suite_says(engine: Any, tmp_path: Path, run: RunInfo) -> None:
    columns = {
        "float": (pa.array([0.1, 0.2], pa.float32()), [0.1, "0.2"]),
        "time": (pa.array([time(10), time(14, 30)]), ["10:00:00", "14:30"]),
        "flag": (pa.array([True, False]), ["true", "FALSE"]),
    }
    pq.write_table(pa.table({name: column for name, (column, _) in columns.items()}), tmp_path / "s.parquet")
    asked = []
    for name, (_, values) in columns.items():
        asked.append(expect("column_values_to_be_in_set", column=name, value_set=values))
        asked.append(expect("column_values_to_not_be_in_set", column=name, value_set=values[:1]))
    asked.append(expect("column_values_to_be_in_set", column="flag", value_set=[True], **only("float", 0.1)))
    found = counted(asked, str(tmp_path / "s.parquet"), run, engine)
    assert found == [0, 1, 0, 1, 0, 1, 0]


@pytest.fixture
def odd(tmp_path: Path) -> str:
    """Three rows of what floats, zones and texts do not hold."""
    ten, kind = datetime(2024, 1, 1, 10, tzinfo=UTC), pa.timestamp("us", "UTC")
    columns = {
        "n": [1, 2, 3],
        "plain": pa.array([ten.replace(tzinfo=None)] * 3, pa.timestamp("us")),
        "zoned": pa.array([ten] * 3, kind),
        "later": pa.array([ten.replace(hour=11), ten, None], kind),
        "midnight": pa.array([ten.replace(hour=0, tzinfo=None)] * 3, pa.timestamp("ns")),
        "day": [ten.date()] * 3,
        "big": [2**53 + 1, 2**53 + 3, 5],
        "unsigned": pa.array([2**63 + 5, 2**63, 1], pa.uint64()),
        "huge": [2**62, 2**62, 1],
        "float": pa.array([0.1, 0.2, 0.7], pa.float32()),
        "bytes": [b"abc", b"abc", b"\xff"],
        "price": pa.array([Decimal("1.10"), Decimal("0.30"), None], pa.decimal128(10, 2)),
        "fee": pa.array([Decimal("0.300")] * 3, pa.decimal128(10, 3)),
        "long": pa.array([Decimal("12345678901234567890.12"), Decimal("0.30"), None], pa.decimal128(38, 2)),
    }
    pq.write_table(pa.table(columns), tmp_path / "odd.parquet")
    return str(tmp_path / "odd.parquet")


def pair(kind: str, a: str, b: str, **more: Any) -> dict[str, Any]:
    return expect(f"column_pair_values_{kind}", column_A=a, column_B=b, **more)


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_moments_with_and_without_a_zone_compare(engine: Any, odd: str, run: RunInfo) -> None:
    asked = [
        pair("to_be_equal", "plain", "zoned"),
        pair("to_be_equal", "day", "midnight"),
        pair("to_be_equal", "day", "plain"),
        pair("a_to_be_greater_than_b", "later", "plain"),
        pair("a_to_be_greater_than_b", "later", "plain", or_equal=True),
        expect("select_column_values_to_be_unique_within_record", column_list=["plain", "zoned"]),
        expect("select_column_values_to_be_unique_within_record", column_list=["day", "plain"]),
    ]
    assert counted(asked, odd, run, engine) == [0, 0, 3, 2, 1, 3, 0]


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_numbers_beyond_2_to_the_53_and_of_4_bytes_are_told_apart(
    engine: Any, odd: str, run: RunInfo
) -> None:
    values, big = "column_values_to_be_between", f'col("big") <= {2**53}.0'
    asked = [
        expect(values, column="big", max_value=2**53),
        expect(values, column="big", min_value=2**53 + 2),
        expect(values, column="unsigned", max_value=2**63),
        expect("column_values_to_be_in_set", column="big", value_set=[float(2**53), float(2**53 + 2), 5]),
        expect(values, column="n", max_value=0, row_condition=big, condition_parser="great_expectations"),
        expect(values, column="float", min_value=0.1, max_value=0.2),
        expect(values, column="float", min_value=0.1, strict_min=True),
        expect("column_max_to_be_between", column="float", min_value=0.7, max_value=0.7),
        expect("column_median_to_be_between", column="float", min_value=0.2, max_value=0.2),
        expect("column_proportion_of_unique_values_to_be_between", column="float", min_value=1.0),
    ]
    results = full_result(run, ValidateData(dataset=odd, suite=suite(*asked), engine=engine))
    assert [r["result"].get("unexpected_count", r["success"]) for r in results] == [
        *(2, 2, 1, 2, 1, 1, 1),
        *(True, True, True),
    ]


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_bytes_compare_with_texts(engine: Any, odd: str, run: RunInfo) -> None:
    asked = [
        expect("column_values_to_be_in_set", column="bytes", value_set=["abc"]),
        expect("column_values_to_not_be_in_set", column="bytes", value_set=["abc"]),
        expect("column_values_to_match_regex", column="bytes", regex="^a"),
        expect(
            "column_values_to_be_between", column="n", max_value=1,
            row_condition='col("bytes") == "abc"', condition_parser="great_expectations",
        ),
    ]  # fmt: skip
    assert counted(asked, odd, run, engine) == [1, 2, 1, 1]


@pytest.mark.parametrize("engine", ["duckdb", "pandas"])
def test_sums_of_decimals_and_whole_numbers_are_exact(engine: Any, odd: str, run: RunInfo) -> None:
    total, price = "multicolumn_sum_to_equal", ["price", "fee"]
    asked = [
        expect(total, column_list=price, sum_total=1.4, **only("n", 1)),
        expect(total, column_list=price, sum_total=1.4, ignore_row_if="any_value_is_missing"),
        expect(total, column_list=[*price, "n"], sum_total=2.4),
        expect(total, column_list=["long", "fee"], sum_total=0.6, **only("n", 2)),
        expect("column_sum_to_be_between", column="price", min_value=1.4, max_value=1.4),
        expect("column_sum_to_be_between", column="price", min_value=1.1, max_value=1.1, **only("n", 1)),
        expect("column_sum_to_be_between", column="long", min_value=1, max_value=2),
        expect(total, column_list=["n", "big"], sum_total=2**53 + 4, ignore_row_if="never"),
        expect("column_sum_to_be_between", column="huge", min_value=2.0**63),
        expect("column_values_to_be_in_set", column="float", value_set=[0.1, 0.2, "0.7", 2**24 + 1]),
    ]
    results = full_result(run, ValidateData(dataset=odd, suite=suite(*asked), engine=engine))
    assert [r["result"].get("unexpected_count", r["success"]) for r in results] == [
        *(0, 1, 2, 0),
        *(True, True, False),
        *(3, True, 0),
    ]
    assert not any(r["exception_info"].get("raised_exception") for r in results)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            expect("column_values_to_be_between", column="big", min_value=2**53 + 1),
            f"would round min_value={2**53 + 1} to {2**53}: write that number",
        ),
        (
            expect("column_max_to_be_between", column="big", max_value=f"-{2**53 + 1}"),
            "would round max_value=-",
        ),
        (
            expect("multicolumn_sum_to_equal", column_list=["big", "n"], sum_total=2**60 + 1),
            "would round sum_total",
        ),
        (
            expect("column_values_to_be_in_set", column="n", value_set=[[1]]),
            "value_set holds a list or an object",
        ),
    ],
)
def test_what_great_expectations_would_take_otherwise_is_refused(
    asked: dict[str, Any], sentence: str, odd: str, run: RunInfo
) -> None:
    with pytest.raises(BadConfiguration, match=sentence):
        ValidateData(dataset=odd, suite=suite(asked)).run(run)


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        ("in_set", {"value_set": ["10:00+02:00"]}, "is no time such as 14:30:00"),
        ("between", {"min_value": "10:30"}, "holds TIME, for which Great Expectations has no bounds"),
    ],
)
def test_times_of_day_have_no_zone_and_no_bounds(
    kind: str, arguments: dict[str, Any], sentence: str, tmp_path: Path, run: RunInfo
) -> None:
    pq.write_table(pa.table({"at": [time(10), time(14, 30)]}), tmp_path / "s.parquet")
    asked = expect(f"column_values_to_be_{kind}", column="at", **arguments)
    with pytest.raises(BadConfiguration, match=sentence):
        ValidateData(dataset=str(tmp_path / "s.parquet"), suite=suite(asked)).run(run)
