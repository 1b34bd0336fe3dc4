"""What is proposed for a window must hold on the next one, and still find what is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pytest

from lepton_airflow.data.suites import propose_suite


def proposed(sql: str) -> dict[str, dict[str, Any]]:
    """What is proposed for the rows of a query: by column (``""`` for the table) the arguments by kind."""
    con = duckdb.connect()
    con.execute(f"CREATE TABLE t AS {sql}")
    columns = {name: kind for name, kind, *_ in con.execute("DESCRIBE t").fetchall()}
    found: dict[str, dict[str, Any]] = {name: {} for name in ("", *columns)}
    for one in propose_suite(con, "t", columns, Path("t.parquet"))["expectations"]:
        kwargs = dict(one["kwargs"])
        found[kwargs.pop("column", "")][one["type"].removeprefix("expect_")] = kwargs
    return found


BETWEEN, UNIQUE, PRESENT = (
    "column_values_to_be_between",
    "column_values_to_be_unique",
    "column_values_to_not_be_null",
)
IN_SET, LENGTHS = "column_values_to_be_in_set", "column_value_lengths_to_be_between"


@pytest.mark.parametrize(
    "column",
    [
        "1000000 + i",
        "(3 * i)::INTEGER",
        "i::HUGEINT",
        "uuid()",
        "uuid()::VARCHAR",
        "md5(i::VARCHAR)",
        "'ORD-' || lpad(i::VARCHAR, 6, '0')",
    ],
)
def test_ids_are_unique_present_and_without_bounds(column: str) -> None:
    found = proposed(f"SELECT {column} AS id FROM range(200) r(i)")["id"]
    assert found[UNIQUE] == found[PRESENT] == {}
    assert "max_value" not in found.get(BETWEEN, {})
    assert IN_SET not in found


@pytest.mark.parametrize(
    "column",
    [
        "i * 1_000_003 % 999_983",  # 200 numbers from a million, which differ by chance
        "i / 7",
        "'name ' || chr((65 + i // 26)::INT) || chr((65 + i % 26)::INT)",
        "i // 2",
        "CASE WHEN i > 0 THEN i // 2 END",
    ],
)
def test_what_differs_by_chance_is_not_called_unique(column: str) -> None:
    assert UNIQUE not in proposed(f"SELECT {column} AS x FROM range(200) r(i)")["x"]


@pytest.mark.parametrize(
    "column",
    [
        "2013",  # the window's own year, country, month
        "'NL'",
        "'2013-0' || (1 + i % 7)",
        "DATE '2013-05-01' + i::INT",
        "TIMESTAMP '2013-05-01' + INTERVAL (i) HOUR",
        "true",
    ],
)
def test_what_follows_the_window_gets_no_bounds(column: str) -> None:
    found = proposed(f"SELECT {column} AS x FROM range(31) r(i)")["x"]
    assert set(found) == {PRESENT, "column_values_to_be_in_type_list"}


@pytest.mark.parametrize("form", ["%Y%m%d", "%y%m%d", "%Y%m"])
def test_dates_written_as_numbers_have_no_upper_bound(form: str) -> None:
    dates = f"strftime(DATE '2013-01-15' + (i // 2)::INT, '{form}')::BIGINT"
    assert proposed(f"SELECT {dates} AS x FROM range(120) r(i)")["x"][BETWEEN] == {"min_value": 0}


@pytest.mark.parametrize(
    ("column", "low", "high"),
    [
        ("i % 2", 0, 12),  # of two values little is known
        ("i % 100", 0, 390),
        ("100 + i % 100", -98, 400),
        ("(i % 100) / 100", 0, 4),
        ("-5.0 + (i % 100) / 10", -25, 25),
        ("1 + i % 5 ", 0, 47),
        ("exp(i / 100)", 0, 22_030_000),  # amounts of which a few are large
        ("0.77 + (i % 20) / 10000", 0.69, 0.86),
    ],
)
def test_bounds_are_wide_where_values_are_few(column: str, low: float, high: float) -> None:
    bounds = proposed(f"SELECT {column} AS x FROM range(1000) r(i)")["x"][BETWEEN]
    assert bounds["min_value"] == pytest.approx(low, rel=0.05)
    assert bounds["max_value"] == pytest.approx(high, rel=0.05)


def test_bounds_are_those_of_json_and_hold_what_they_come_from() -> None:
    found = proposed(
        """SELECT 4611686018427387904 + i // 2 AS huge, -1e9 - i / 2 AS below, i * 1e-7 AS small,
            (i / 7)::DECIMAL(9, 3) AS price, 1e300 * i AS vast, CASE WHEN i = 0 THEN 'inf'::DOUBLE ELSE i END AS infinite
        FROM range(100) t(i)"""
    )
    assert BETWEEN not in found["infinite"]
    assert found["vast"][BETWEEN]["max_value"] > 99e300
    assert found["small"][BETWEEN] == {"min_value": -2e-5, "max_value": 4e-5}
    assert found["price"][BETWEEN]["max_value"] == pytest.approx(57, rel=0.05)
    assert found["below"][BETWEEN]["min_value"] < -1e9 - 50 < -1e9 < found["below"][BETWEEN]["max_value"]
    assert found["huge"][BETWEEN]["min_value"] < 2**62 < 2**62 + 50 < found["huge"][BETWEEN]["max_value"]


def test_categories_are_proposed_when_each_is_seen_often() -> None:
    found = proposed(
        """SELECT ['EWR', 'JFK', 'LGA'][1 + i % 3] AS origin, if(i < 3, 'rare' || i, 'often' || i % 2) AS some,
            if(i < 12, 'rare' || i, 'often' || i % 2) AS many, 'n' || i AS text FROM range(100) r(i)"""
    )
    assert found["origin"][IN_SET] == {"value_set": ["EWR", "JFK", "LGA"], "mostly": 0.95}
    assert found["some"][IN_SET]["value_set"] == ["often0", "often1", "rare0", "rare1", "rare2"]
    assert IN_SET not in found["many"]
    assert found["text"][LENGTHS] == {"min_value": 1, "max_value": 5}


@pytest.mark.parametrize(
    ("rows", "missing", "mostly"),
    [(100, 0, 0.9), (1000, 0, 0.99), (20_000, 0, 1), (20_000, 400, 0.9), (1000, 300, 0.3), (1000, 800, None)],
)
def test_the_share_of_missing_values_may_grow(rows: int, missing: int, mostly: float | None) -> None:
    found = proposed(f"SELECT CASE WHEN i >= {missing} THEN i % 7 END AS x FROM range({rows}) r(i)")
    assert found["x"].get(PRESENT) == (None if mostly is None else {"mostly": mostly} if mostly < 1 else {})
    assert found[""]["table_row_count_to_be_between"] == {"min_value": rows // 5, "max_value": rows * 5}


def test_one_window_of_no_values_proposes_their_types() -> None:
    assert set(proposed("SELECT NULL::BIGINT AS x FROM range(3)")["x"]) == {
        "column_values_to_be_in_type_list"
    }
