"""What gives a leak away, and what only looks like one."""

from __future__ import annotations

from datetime import datetime

import duckdb
import pytest

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.leaks import (
    copies_of_target,
    differing_columns,
    in_order_of_target,
    look_ahead,
    perfect_separators,
)
from lepton_airflow.data.splits import timestamp


def table(select: str) -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    con.execute(f"CREATE TABLE t AS {select}")
    return con


CLASSES = DatasetInfo(
    target="y", task="classification", features=["f", "g"], categorical=["g"], classes=[0, 1]
)
NUMBERS = DatasetInfo(target="y", task="regression", features=["f", "g"], categorical=["g"])


@pytest.mark.parametrize(
    ("info", "select", "copies"),
    [
        (CLASSES, "SELECT i % 2 AS y, 5 - i % 2 AS f, i % 7 || '' AS g FROM range(40) r(i)", ["f"]),
        (CLASSES, "SELECT i % 2 AS y, i AS f, ['no', 'yes'][1 + i % 2] AS g FROM range(40) r(i)", ["g"]),
        (CLASSES, "SELECT i % 2 AS y, i AS f, ['no', 'yes', NULL][1 + i % 3] AS g FROM range(40) r(i)", []),
        (CLASSES, "SELECT i % 2 AS y, (i // 20)::INT AS f, 'x' AS g FROM range(40) r(i)", []),
        (NUMBERS, "SELECT i AS y, 3 - 2 * i AS f, i || '' AS g FROM range(40) r(i)", ["f"]),
        (NUMBERS, "SELECT i AS y, i * i AS f, 'x' AS g FROM range(40) r(i)", []),
        (
            NUMBERS,
            "SELECT i AS y, 1 AS f, 'x' AS g FROM range(40) r(i)",
            [],
        ),  # no correlation with a constant
        # NaN is a missing value, and neither hides the copy nor makes one.
        (
            NUMBERS,
            "SELECT i AS y, CASE WHEN i = 7 THEN 'nan'::DOUBLE ELSE 2 * i END AS f, 'x' AS g FROM range(40) r(i)",
            ["f"],
        ),
        (CLASSES, "SELECT i % 2 AS y, 'nan'::DOUBLE AS f, i || '' AS g FROM range(40) r(i)", []),
        # Two points lie on a line: of a number that is missing almost everywhere that tells nothing.
        (NUMBERS, "SELECT i AS y, CASE WHEN i < 2 THEN i END AS f, 'x' AS g FROM range(40) r(i)", []),
        (NUMBERS, "SELECT i AS y, CASE WHEN i < 20 THEN i END AS f, 'x' AS g FROM range(40) r(i)", ["f"]),
    ],
)
def test_the_target_is_found_under_another_name(info: DatasetInfo, select: str, copies: list[str]) -> None:
    assert copies_of_target(table(select), "t", info) == copies


@pytest.mark.parametrize(
    ("f", "found"),
    [
        ("y * 10 + i % 5", ["f"]),
        ("-y * 10 - i % 5", ["f"]),
        ("y * 4 + i % 5", []),
        ("NULL::INT", []),
        ("CASE WHEN i < 20 THEN y * 10 + i % 5 END", ["f"]),
        ("CASE WHEN i < 19 THEN y * 10 + i % 5 END", []),
        ("CASE WHEN y = 1 THEN i END", ["f"]),  # there in one class alone
        ("CASE WHEN y = 0 THEN 7 END", ["f"]),
        ("CASE WHEN y = 1 AND i > 1 THEN i END", []),
    ],
)
def test_a_number_that_separates_two_classes_is_found(f: str, found: list[str]) -> None:
    con = table(f"SELECT i % 2 AS y, i, {f} AS f, 'x' AS g FROM (SELECT i, i % 2 AS y FROM range(40) r(i))")
    assert perfect_separators(con, "t", CLASSES) == found
    assert perfect_separators(con, "t", NUMBERS) == []


def test_a_text_that_is_there_in_one_class_alone_is_found() -> None:
    con = table(
        "SELECT i % 2 AS y, i AS f, CASE WHEN i % 2 = 1 THEN 'day ' || i END AS g FROM range(40) r(i)"
    )
    assert perfect_separators(con, "t", CLASSES) == ["g"]


@pytest.mark.parametrize(
    ("f", "found"),
    [
        ("ln(y)", ["f"]),
        ("1 / y", ["f"]),
        ("CASE WHEN i % 9 > 0 THEN sqrt(y) END", ["f"]),
        ("ln(y) + CASE WHEN i = 1500 THEN -1 ELSE 0 END", []),  # beyond the rows that are looked at first
        ("round(ln(y), 1)", []),
        ("CASE WHEN i >= 1500 THEN ln(y) END", ["f"]),  # missing in these
        ("CASE WHEN i < 19 THEN ln(y) END", []),
        ("7", []),
    ],
)
def test_a_number_that_orders_the_rows_as_the_target_is_found(f: str, found: list[str]) -> None:
    con = table(f"SELECT y, {f} AS f, 'x' AS g FROM (SELECT i, 1 + hash(i) % 50 AS y FROM range(2000) r(i))")
    assert in_order_of_target(con, "t", NUMBERS) == found
    assert in_order_of_target(con, "t", CLASSES) == []


TYPES = {"n": "DOUBLE", "c": "VARCHAR"}
ROWS = "SELECT i AS k, i / 7 AS n, 'c' || i % 5 AS c FROM range(1000) r(i)"


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (f"SELECT * FROM ({ROWS}) ORDER BY k DESC", []),
        (f"SELECT * REPLACE (n * (1 + 1e-14) AS n) FROM ({ROWS})", []),  # the last bits of a float
        (f"SELECT * REPLACE (n + (k = 3)::INT AS n) FROM ({ROWS})", ["n"]),
        (f"SELECT * REPLACE (CASE WHEN k = 3 THEN NULL ELSE n END AS n) FROM ({ROWS})", ["n"]),
        # Two rows have exchanged their values: all sums are equal, and all but the weighted one.
        (f"SELECT * REPLACE (CASE k WHEN 3 THEN 700 / 7 WHEN 700 THEN 3 / 7 ELSE n END AS n) FROM ({ROWS})", ["n"]),
        (f"SELECT * REPLACE (CASE k WHEN 3 THEN 'c4' WHEN 4 THEN 'c3' ELSE c END AS c) FROM ({ROWS})", ["c"]),
        (f"SELECT * FROM ({ROWS}) WHERE k <> 0", ["*", "n", "c"]),
    ],
)  # fmt: skip
def test_tables_differ_where_a_value_does(other: str, differing: list[str]) -> None:
    con = table(ROWS)
    assert differing_columns(con, "t", f"({other})", TYPES, key="k") == differing


def test_what_looks_one_row_ahead_does_not_drown_in_many_rows() -> None:
    """Of 200,000 values near 100,000 one changes by a few: less than the rounding of sums that is allowed for all rows."""
    con = duckdb.connect()
    con.execute(
        "CREATE TABLE s AS SELECT TIMESTAMP '2024-01-01' + to_minutes(i) AS t, 1e5 + (i * 7919) % 11 AS p FROM range(200000) r(i)"
    )
    cut = datetime(2024, 5, 1)  # noqa: DTZ001 - as DuckDB gives it
    features = (
        "SELECT t, p, avg(p) OVER (ORDER BY t ROWS BETWEEN 1 PRECEDING AND {} FOLLOWING) AS around FROM {}"
    )
    info = DatasetInfo(target="p", task="regression", features=["around"], time_column="t")
    types = {"t": "TIMESTAMP", "p": "DOUBLE", "around": "DOUBLE"}
    for after, said in ((0, ""), (1, "features look into the future: column 'around'")):
        con.execute(f"CREATE OR REPLACE VIEW whole AS {features.format(after, 's')}")
        con.execute(
            f"CREATE OR REPLACE VIEW alone AS {features.format(after, '(FROM s WHERE t < ' + timestamp(cut) + ')')}"
        )
        assert look_ahead(con, "whole", "alone", cut, types, info, None).startswith(said)
        assert bool(look_ahead(con, "whole", "alone", cut, types, info, None)) == bool(said)
