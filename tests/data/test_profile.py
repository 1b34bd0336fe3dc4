"""The reference profile and the counts that drift is measured with, on tables that can be counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import duckdb
import pytest

from lepton_airflow.contract import Window
from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.profile import count_rows, reference_counts, reference_profile, unseen_categories

INFO = DatasetInfo(
    target="y", task="regression", features=["n", "c"], categorical=["c"], cluster_column="day", rows=10
)


@pytest.fixture
def con() -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    con.execute(
        """
        CREATE TABLE t AS SELECT * FROM (VALUES
            (1, 0, 'a', 1.0), (1, 0, 'a', 2.0), (1, 0, 'b', 3.0), (1, 4, 'b', 4.0), (2, 5, NULL, 5.0),
            (2, 6, 'c', 6.0), (2, 7, 'a', 7.0), (3, 8, 'a', 8.0), (3, 'nan'::DOUBLE, 'a', 9.0), (3, NULL, 'b', 10.0)
        ) t(day, n, c, y)"""
    )
    return con


def test_numbers_are_counted_between_their_deciles(con: duckdb.DuckDBPyConnection) -> None:
    found = reference_profile(
        con, "t", INFO, Window("2024-01-01T00:00:00+00:00", "2024-02-01T00:00:00+00:00")
    )
    assert found["window"] == ["2024-01-01T00:00:00+00:00", "2024-02-01T00:00:00+00:00"]
    n = found["columns"]["n"]
    assert (n["count"], n["nulls"], n["min"], n["max"]) == (8, 2, 0, 8)  # NaN counts as missing
    assert n["quantiles"] == [0, 0, 0, 0, 4, 4, 5, 6, 7, 8, 8]  # by nearest rank: always values that occur
    assert n["edges"] == [-5e-324, 0, 4, 5, 6, 7, 8]
    assert n["counts"] == [0, 3, 1, 1, 1, 1, 1, 0]  # zeros fill whole deciles: a bin of their own
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_categories_are_counted_by_name_ties_in_order(con: duckdb.DuckDBPyConnection) -> None:
    c = reference_profile(con, "t", INFO, None)["columns"]["c"]
    assert c["top"] == [["a", 5], ["b", 3], ["c", 1]]
    assert (c["count"], c["nulls"], c["distinct"], c["rest"]) == (9, 1, 3, 0)
    con.execute("CREATE TABLE tied AS SELECT unnest(['z', 'y', 'x', 'y', 'z']) AS c, 0 AS y")
    info = DatasetInfo(target="y", task="regression", features=["c"], categorical=["c"], rows=5)
    assert reference_profile(con, "tied", info, None)["columns"]["c"]["top"] == [["y", 2], ["z", 2], ["x", 1]]


def test_what_occurs_once_is_counted_with_what_is_new(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("CREATE TABLE texts AS SELECT 'text ' || i AS c, 0 AS y FROM range(50) r(i)")
    con.execute("CREATE TABLE later AS SELECT 'text ' || i AS c, 0 AS y FROM range(45, 95) r(i)")
    info = DatasetInfo(target="y", task="regression", features=["c"], categorical=["c"], rows=50)
    column = reference_profile(con, "texts", info, None)["columns"]["c"]
    assert reference_counts(column) == [50, 0]
    assert count_rows(con, "later", "c", column, None).tolist() == [[50, 0]]
    assert len(column["top"]) == 50
    assert sum((unseen_categories(con, "later", "c", column, 100) or {}).values()) == 45


def test_only_rows_in_clusters_have_a_design_effect(con: duckdb.DuckDBPyConnection) -> None:
    clustered = reference_profile(con, "t", INFO, None)["columns"]
    assert set(clustered["n"]["design_effect"]) == {"mean", "spread", "clusters"}
    plain = reference_profile(con, "t", replace(INFO, cluster_column=None), None)["columns"]
    assert {name: column for name, column in plain.items() if "design_effect" in column} == {}
    assert all(plain[name].items() <= clustered[name].items() for name in plain)


def test_the_profiled_rows_are_counted_as_the_profile_counts_them(con: duckdb.DuckDBPyConnection) -> None:
    for name, column in reference_profile(con, "t", INFO, None)["columns"].items():
        counts = count_rows(con, "t", name, column, None)
        assert counts.tolist() == [reference_counts(column)]
        by_day = count_rows(con, "t", name, column, "day")
        assert by_day.shape[0] == 3
        assert by_day.sum(axis=0).tolist() == reference_counts(column)
        assert sorted(by_day.sum(axis=1)) == [3, 3, 4]


def test_every_later_value_falls_into_a_bin(con: duckdb.DuckDBPyConnection) -> None:
    columns = reference_profile(con, "t", INFO, None)["columns"]
    con.execute(
        "CREATE TABLE later AS SELECT n::DOUBLE AS n, c FROM (VALUES ('-5', 'a'), ('0.5', 'new'), ('inf', 'new'), "
        "('-inf', NULL), ('nan', 'newer'), (NULL, 'b')) t(n, c)"
    )
    (n,), (c,) = (count_rows(con, "later", name, columns[name], None).tolist() for name in ("n", "c"))
    assert n == [2, 0, 1, 0, 0, 0, 0, 1, 2]  # -5 and -inf, 0.5, …, inf beyond the last edge, and two missing
    assert c == [1, 1, 3, 1]
    assert unseen_categories(con, "later", "c", columns["c"]) == {"new": 2, "newer": 1}
    assert unseen_categories(con, "later", "c", columns["c"], limit=1) == {"new": 2}
    assert unseen_categories(con, "later", "n", columns["n"]) is None
    assert unseen_categories(con, "later", "c", columns["c"] | {"rest": 1}) is None  # not all are named


@pytest.mark.parametrize(
    ("values", "later", "bins"),
    [
        ("1", "0", [[0, 100, 0, 0], [100, 0, 0, 0]]),  # a constant, which falls
        ("(i >= 5)::INT", "0", [[5, 95, 0, 0], [100, 0, 0, 0]]),  # a flag that 95 of 100 rows have
        ("greatest(i - 60, 0)", "-9999", [[0, 61], [100, 0]]),  # often zero, and now a mark for missing
        (
            "CASE WHEN i < 30 THEN 0 WHEN i < 35 THEN i ELSE 80 END",
            "50",
            [[0, 30, 5, 65, 0, 0], [0, 0, 100, 0, 0, 0]],
        ),
        ("-1.7976931348623157e308", "0", [[100, 0, 0], [0, 100, 0]]),  # nothing is below
    ],
)
def test_a_value_that_fills_a_decile_is_told_from_lower_ones(
    con: duckdb.DuckDBPyConnection, values: str, later: str, bins: list[list[int]]
) -> None:
    con.execute(f"CREATE TABLE often AS SELECT {values} AS n, 0 AS y FROM range(100) r(i)")
    con.execute(f"CREATE TABLE later AS SELECT {later} AS n FROM range(100)")
    info = DatasetInfo(target="y", task="regression", features=["n"], rows=100)
    column = reference_profile(con, "often", info, None)["columns"]["n"]
    (before,), (now,) = (count_rows(con, table, "n", column, None).tolist() for table in ("often", "later"))
    assert before == reference_counts(column)
    assert [before[: len(bins[0])], now[: len(bins[1])]] == bins


def test_a_column_without_values_has_no_bins(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("CREATE TABLE void AS SELECT NULL::DOUBLE AS n, NULL::TEXT AS c, 1.0 AS y FROM range(3)")
    info = DatasetInfo(target="y", task="regression", features=["n", "c"], categorical=["c"], rows=3)
    columns = reference_profile(con, "void", info, None)["columns"]
    assert reference_counts(columns["n"]) == [0, 3]
    assert reference_counts(columns["c"]) == [0, 3]
    for name in ("n", "c"):
        assert count_rows(con, "void", name, columns[name], None).tolist() == [[0, 3]]
        filled = count_rows(con, "t", name, columns[name], None)
        assert filled.tolist() == [[8, 2] if name == "n" else [9, 1]]


def test_names_that_are_cut_short_are_counted_together(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("CREATE TABLE long AS SELECT repeat('x', 250) || i AS c, 0 AS y FROM range(4) r(i)")
    info = DatasetInfo(target="y", task="regression", features=["c"], categorical=["c"], rows=4)
    column = reference_profile(con, "long", info, None)["columns"]["c"]
    assert {len(label) for label, _ in column["top"]} == {200}
    assert count_rows(con, "long", "c", column, None).sum() == 4
    assert unseen_categories(con, "long", "c", column) == {}
