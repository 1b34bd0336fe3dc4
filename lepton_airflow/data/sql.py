"""SQL on a DuckDB that can read only what it is given, put together from other people's names, values and queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lepton_airflow.errors import BadConfiguration, did_you_mean, first_line

if TYPE_CHECKING:
    import duckdb

    from lepton_airflow.contract import Window

_T = TypeVar("_T")
# Small row groups: a writer holds one of them whole, and the memory limit must hold with wide rows too.
PARQUET = "FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 24576"
# For what is read once and thrown away: row groups are small in bytes too, which DuckDB allows where order is free.
SCRATCH = "FORMAT parquet, ROW_GROUP_SIZE 24576, ROW_GROUP_SIZE_BYTES '8MB'"
# What DuckDB advises at least; with less, sorts and Parquet writers fail instead of spilling.
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
    """SQL of a float with NaN as missing: pandas, scikit-learn and ONNX models see no difference.

    Not by nullif or isnan: DuckDB 2.0 answers these from a Parquet file's statistics, and those that Arrow writes leave NaN
    out.
    """
    return f"CASE WHEN isfinite({value}) OR isinf({value}) THEN {value} END"


def for_each(template: str, columns: Sequence[str]) -> str:
    """A template once per column, which stands for ``{}`` in it, for one pass over the table."""
    return ", ".join(template.format(quote(column)) for column in columns)


def fetch_row(con: duckdb.DuckDBPyConnection, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...]:
    """The one row of a query."""
    (row,) = con.execute(sql, list(values)).fetchall()
    return tuple(row)


def select_statement(con: duckdb.DuckDBPyConnection, sql: str, what: str) -> duckdb.Statement:
    """The one SELECT that the user's SQL must be; raises BadConfiguration otherwise. Nothing is run."""
    import duckdb

    try:
        statements = con.extract_statements(sql)
    except duckdb.Error as error:
        raise BadConfiguration(f"{what}: {first_line(error)}. Expected one SELECT of DuckDB's SQL.") from None
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        found = ", ".join(s.type.name for s in statements) or "nothing"
        raise BadConfiguration(f"{what} must be one SELECT, and is {found}: {' '.join(sql.split())[:80]!r}.")
    # The text is put in parentheses later, where the semicolon that may end it would not parse.
    end = next(
        (at for at, kind in duckdb.tokenize(sql) if kind.name == "operator" and _byte(sql, at) == ";"), None
    )
    return con.extract_statements(sql.encode()[:end].decode())[0] if end is not None else statements[0]


def _byte(sql: str, position: int) -> str:
    return sql.encode()[position : position + 1].decode(errors="replace")


def total_order(first: Sequence[str], columns: Sequence[str]) -> str:
    """What to ORDER BY so that the rows' order, and so the file's bytes, do not depend on threads or input order.

    Rows equal in ``first`` are ordered by a hash of the others, which keeps the sort's keys narrow; without ``first``
    by all columns. Only fully equal rows are left in doubt, and those are interchangeable.
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
    """The values that a statement's ``$names`` take; raises BadConfiguration for a name without a value.

    :param need_window: asked for the run's window when ``$window_start`` or ``$window_end`` is used; raises if there is none.
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
    """Columns and types that a SELECT gives; raises BadConfiguration when two of them have one name."""
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
    """A DuckDB for the user's SQL: it spills to ``workdir``, reads only ``readable``, and cannot be reconfigured.

    Paths in ``readable`` are files or directories. External access is off and the configuration locked before the
    first user statement, because run parameters come from a form.
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
    """Do work with a DuckDB so that a signal is heeded at once: it raises here, and stops the statement under way.

    DuckDB does not return to Python before a statement is done, and Python handles signals in its main thread only: so
    the work is done in another one.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            return future.result()
        finally:
            while not future.done():  # the signal may have come between two statements
                con.interrupt()
                wait([future], timeout=0.05)
