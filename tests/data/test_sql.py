from __future__ import annotations

import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from lepton_airflow.contract import Window
from lepton_airflow.data.sql import (
    bind,
    column_types,
    connect,
    interruptible,
    quote,
    select_statement,
    sql_message,
    total_order,
)
from lepton_airflow.errors import BadConfiguration


@pytest.mark.parametrize(
    ("sql", "where"),
    [
        ("SELECT 1 AS one,\n  absent AS two\nFROM t", "(line 2, at 'absent AS two')"),
        ("SELECT 1\nFROM t\nWHER one > 2", "(line 3, at 'one > 2')"),
        ("SELECT sum(text) FROM t", "at 'sum(text) FROM t')"),
        ("SELECT 1 FROM nowhere", "(line 1, at 'nowhere')"),
    ],
)
def test_what_duckdb_says_keeps_the_line_and_the_words(sql: str, where: str) -> None:
    con = duckdb.connect()
    con.execute("CREATE TABLE t (one INT, text TEXT)")
    with pytest.raises(duckdb.Error) as caught:
        con.execute(sql)
    said = sql_message(caught.value)
    assert where in said
    assert "\n" not in said
    assert sql_message(duckdb.Error("Some Error: no line\nmore")) == "Some Error: no line"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT (repeat('long', 10) || 'Meier')::INTEGER",
        "SELECT strptime(repeat('long', 10) || 'Meier', '%Y')",
        """SELECT ('{"name": "' || repeat('long', 10) || 'Meier"')::JSON""",
    ],
)
def test_a_message_holds_the_begin_of_a_value_and_no_more(sql: str) -> None:
    with pytest.raises(duckdb.Error) as caught:
        duckdb.sql(sql).fetchall()
    said = sql_message(caught.value)
    assert "longlong" in said
    assert "Meier" not in said


def test_any_name_can_be_quoted() -> None:
    name = 'a "quoted"; DROP TABLE x; -- ü'
    assert duckdb.sql(f"SELECT 1 AS {quote(name)}").columns == [name]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('{outside}')",
        "SELECT * FROM read_parquet('{outside}')",
        "COPY (SELECT 1) TO '{outside}'",
        "ATTACH '{outside}' AS other",
        "SET enable_external_access = true",
        "SET allowed_directories = ['/']",
        "SET memory_limit = '100GB'",
        "INSTALL httpfs",
        "LOAD '{outside}'",
        "SELECT * FROM found_by_name",
    ],
)
def test_sql_cannot_leave_its_box(tmp_path: Path, sql: str) -> None:
    outside = tmp_path / "outside.csv"
    outside.write_text("secret")
    inside = tmp_path / "inside.csv"
    inside.write_text("a\n1\n")
    (tmp_path / "work").mkdir()
    found_by_name = pa.table({"secret": [1]})
    con = connect(tmp_path / "work", readable=[inside])
    with pytest.raises(duckdb.Error):
        con.execute(sql.format(outside=outside))
    assert con.execute(f"SELECT * FROM read_csv('{inside}')").fetchall() == [(1,)]
    assert outside.read_text() == "secret"
    assert found_by_name.num_rows == 1


def test_a_small_memory_limit_uses_fewer_threads(tmp_path: Path) -> None:
    settings = "SELECT current_setting('threads'), current_setting('TimeZone')"
    assert connect(tmp_path, memory_limit_mb=1000, threads=4).execute(settings).fetchone() == (4, "UTC")
    assert connect(tmp_path, memory_limit_mb=64, threads=4).execute(settings).fetchone() == (1, "UTC")


@pytest.mark.parametrize(
    "sql",
    ["SELECT ';' AS x", "SELECT ';' AS x;", "SELECT ';' AS x ; -- ü; done\n", "/* ü; */ SELECT ';' AS x;\n"],
)
def test_one_select_can_be_put_in_parentheses(tmp_path: Path, sql: str) -> None:
    con = connect(tmp_path)
    statement = select_statement(con, sql, "query")
    assert con.execute(f"SELECT * FROM (\n{statement.query}\n)").fetchall() == [(";",)]


@pytest.mark.parametrize(
    "sql", ["", "SELECT 1; SELECT 2", "CREATE TABLE x AS SELECT 1", "SELECT 1) TO 'x' --", "PRAGMA version"]
)
def test_anything_else_is_refused(tmp_path: Path, sql: str) -> None:
    with pytest.raises(BadConfiguration, match=r"^query"):
        select_statement(connect(tmp_path), sql, "query")


def test_values_are_bound_by_name(tmp_path: Path) -> None:
    statement = select_statement(connect(tmp_path), "SELECT $b, $window_end", "query")
    january = Window("2024-01-01T00:00:00+00:00", "2024-02-01T00:00:00+00:00")

    def absent(what: str) -> Window:
        raise BadConfiguration(f"{what}, and this run has no window")

    bound = bind(statement, {"a": 1, "b": 2}, lambda _: january, "query")
    assert bound == {"b": 2, "window_end": datetime(2024, 2, 1, tzinfo=UTC)}
    with pytest.raises(BadConfiguration, match=r"query uses \$window_end, and this run has no window"):
        bind(statement, {"b": 2}, absent, "query")
    with pytest.raises(BadConfiguration, match=r"query uses \$b; did you mean 'bb'"):
        bind(statement, {"bb": 2}, lambda _: january, "query")


def test_doubled_columns_are_found_whatever_their_case(tmp_path: Path) -> None:
    con = connect(tmp_path)
    assert column_types(con, "SELECT 1 AS a, 'x' AS b", {}, "query") == {"a": "INTEGER", "b": "VARCHAR"}
    with pytest.raises(BadConfiguration, match="query gives the column 'A' twice"):
        column_types(con, "SELECT 1 AS a, 2 AS A", {}, "query")


@pytest.mark.parametrize("first", [[], ["g"], ["g", "x"]])
def test_a_total_order_leaves_no_choice(first: list[str]) -> None:
    rows = "(SELECT i % 7 AS g, i % 13 AS x, i % 17 AS z FROM range(1547) r(i) ORDER BY random())"
    order = total_order(first, ["g", "x", "z"])
    found = {tuple(duckdb.sql(f"SELECT * FROM {rows} ORDER BY {order}").fetchall()) for _ in range(3)}
    assert len(found) == 1


def test_a_signal_stops_a_long_statement_at_once() -> None:
    def handle(*_: Any) -> None:
        raise KeyboardInterrupt

    con = duckdb.connect()
    before, began = signal.signal(signal.SIGALRM, handle), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(
                con,
                lambda: con.execute(
                    "SELECT sum(hash(a.range + b.range)) FROM range(10_000_000) a, range(100_000) b"
                ),
            )
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 20  # alone it takes hours
    assert interruptible(con, lambda: con.execute("SELECT 1").fetchone()) == (1,)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT body::INT FROM mail",
        "SELECT strptime(body, '%Y') FROM mail",
        "SELECT body::DATE FROM mail",
        "SELECT regexp_matches('a', body || '(') FROM mail",
    ],
)
def test_what_duckdb_says_of_a_value_is_cut(sql: str) -> None:
    con = duckdb.connect()
    con.execute("CREATE TABLE mail (body TEXT)")
    con.execute("INSERT INTO mail VALUES ($1)", ["Dear 'Ann', " + "it is a secret, " * 200])
    with pytest.raises(duckdb.Error) as caught:
        con.execute(sql).fetchall()
    said = sql_message(caught.value)
    assert said.count("secret") < 15
    assert len(said) < 300
