"""Run users' SQL on a DuckDB that can read only what it is given, and quote their names and values in SQL of ours."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lepton_airflow.errors import BadConfiguration, cut_quoted, did_you_mean, first_line

if TYPE_CHECKING:
    import duckdb

    from lepton_airflow.contract import Window

_T = TypeVar("_T")
# Row groups are small, because a writer holds one of them in memory and rows may be wide.
PARQUET = "FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 24576"
# For files that are read once and deleted. DuckDB can limit the bytes of a row group only where the order is free.
SCRATCH = "FORMAT parquet, ROW_GROUP_SIZE 24576, ROW_GROUP_SIZE_BYTES '8MB'"
_LONGEST = 200  # characters of a sentence about a value
# DuckDB advises at least this much; with less, sorts and Parquet writers fail instead of spilling.
_MB_PER_THREAD = 125


def quote(identifier: str) -> str:
    """An SQL identifier in double quotes, whatever is in it."""
    return '"' + identifier.replace('"', '""') + '"'


def literal(value: Path | str | Mapping[str, Any] | Sequence[Any]) -> str:
    """A path or a text as SQL; a sequence as a list and a mapping as a struct of such texts."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(str(k))}: {literal(str(v))}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(literal, value)) + "]"
    return "'" + str(value).replace("'", "''") + "'"


def nan_as_null(value: str) -> str:
    """SQL that turns NaN into NULL, since pandas, scikit-learn and ONNX models treat both as missing.

    It uses neither nullif nor isnan: DuckDB 2.0 answers these from the statistics of a Parquet file, in which Arrow leaves
    NaN out.
    """
    return f"CASE WHEN isfinite({value}) OR isinf({value}) THEN {value} END"


def for_each(template: str, columns: Sequence[str]) -> str:
    """One SQL expression for each column, whose name replaces ``{}``: many aggregates in one pass over the table."""
    return ", ".join(template.format(quote(column)) for column in columns)


def fetch_row(con: duckdb.DuckDBPyConnection, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...]:
    """The one row of a query."""
    (row,) = con.execute(sql, list(values)).fetchall()
    return tuple(row)


def select_statement(con: duckdb.DuckDBPyConnection, sql: str, what: str) -> duckdb.Statement:
    """Parse the user's SQL, which must be one SELECT; raises BadConfiguration otherwise. Nothing is run."""
    import duckdb

    try:
        statements = con.extract_statements(sql)
    except duckdb.Error as error:
        raise BadConfiguration(
            f"{what}: {sql_message(error)}. Expected one SELECT of DuckDB's SQL."
        ) from None
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        found = ", ".join(s.type.name for s in statements) or "nothing"
        raise BadConfiguration(f"{what} must be one SELECT, and is {found}: {' '.join(sql.split())[:80]!r}.")
    # The text is put in parentheses later, so a semicolon at its end must go.
    end = next(
        (at for at, kind in duckdb.tokenize(sql) if kind.name == "operator" and _byte(sql, at) == ";"), None
    )
    return con.extract_statements(sql.encode()[:end].decode())[0] if end is not None else statements[0]


def _byte(sql: str, position: int) -> str:
    return sql.encode()[position : position + 1].decode(errors="replace")


def sql_message(error: BaseException) -> str:
    """What DuckDB says of a user's SQL, in one line: with the line of the text that it drew, and the words under its mark."""
    for shown, mark in itertools.pairwise(str(error).splitlines()):
        found = re.match(r"LINE (\d+): ", shown)
        if found and set(mark.strip()) == {"^"}:
            return (
                f"{_without_values(error)} (line {found[1]}, at {shown[mark.index('^') :][:40].rstrip()!r})"
            )
    return _without_values(error)


def _without_values(error: BaseException) -> str:
    """The first line of an error, with a value of the data in it cut: it may be a letter of somebody's."""
    import duckdb

    text = first_line(error)
    if not isinstance(error, (duckdb.DataError, duckdb.InvalidInputException, duckdb.IntegrityError)):
        return text
    text = cut_quoted(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def total_order(first: Sequence[str], columns: Sequence[str]) -> str:
    """What to ORDER BY so that the bytes of the file depend neither on threads nor on the order of the input.

    Rows that are equal in ``first`` are ordered by a hash of the other columns, which keeps the sort key narrow; without
    ``first``, rows are ordered by all columns. Rows whose order is still open are equal in every column.
    """
    others = [quote(c) for c in columns if c not in first]
    if not first or not others:
        return ", ".join(map(quote, first or columns))
    return ", ".join([*map(quote, first), f"hash({', '.join(others)})"])


def bind(
    statement: duckdb.Statement,
    parameters: Mapping[str, Any],
    need_window: Callable[[str], Window],
    what: str,
) -> dict[str, Any]:
    """Find the values of a statement's ``$names``; raises BadConfiguration for a name without a value.

    :param need_window: gives the run's window, or raises; called if ``$window_start`` or ``$window_end`` is used.
    """
    wanted = sorted(statement.named_parameters)
    values = dict(parameters)
    bounds = [name for name in wanted if name in ("window_start", "window_end") and name not in values]
    if bounds:
        values = window_values(need_window(f"{what} uses ${bounds[0]}")) | values
    for name in wanted:
        if name not in values:
            raise BadConfiguration(
                f"{what} uses ${name}; {did_you_mean(name, values)} Give it in parameters."
            )
    return {name: values[name] for name in wanted}


def window_values(window: Window) -> dict[str, Any]:
    """The run's window as values for ``$window_start`` and ``$window_end``."""
    return {
        "window_start": datetime.fromisoformat(window.start),
        "window_end": datetime.fromisoformat(window.end),
    }


def column_types(
    con: duckdb.DuckDBPyConnection, sql: str, values: Mapping[str, Any], what: str
) -> dict[str, str]:
    """The columns of a SELECT and their types; raises BadConfiguration when two columns have the same name."""
    types: dict[str, str] = {}
    for name, kind, *_ in con.execute(f"DESCRIBE {sql}", values).fetchall():
        if name.lower() in (known.lower() for known in types):
            raise BadConfiguration(
                f"{what} gives the column {name!r} twice (case does not count in SQL): rename one with AS."
            )
        types[name] = kind
    return types


def connect(
    workdir: Path, *, memory_limit_mb: int = 1024, threads: int = 2, readable: Sequence[Path] = ()
) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB for users' SQL: it spills to ``workdir``, reads only that and ``readable``, and cannot be reconfigured.

    External access is off and the configuration locked before the first statement of a user, because run parameters come
    from a form.

    :param readable: files or directories.
    """
    import duckdb

    spill = workdir / "duckdb"
    spill.mkdir(parents=True, exist_ok=True)
    con = duckdb.connect(
        config={
            "memory_limit": f"{memory_limit_mb}MB",
            "threads": max(1, min(threads, memory_limit_mb // _MB_PER_THREAD)),
            "temp_directory": str(spill),
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
    )
    con.execute("SET TimeZone = 'UTC'")
    con.execute("SET enable_progress_bar = false")
    folders = [str(p) for p in (*readable, workdir) if p.is_dir()]
    files = [str(p) for p in readable if not p.is_dir()]
    con.execute("SET allowed_directories = $1", [folders])
    con.execute("SET allowed_paths = $1", [files])
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")
    return con


def interruptible(con: duckdb.DuckDBPyConnection, work: Callable[[], _T]) -> _T:
    """Do work with a DuckDB in another thread, so that a signal raises here at once and stops the running statement.

    In the main thread, which handles Python's signals, DuckDB would return only after the statement.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            return future.result()
        finally:
            while not future.done():  # again and again: an interrupt between two statements stops none
                con.interrupt()
                wait([future], timeout=0.05)
