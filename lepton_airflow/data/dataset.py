"""Datasets as Parquet files that describe themselves, and a DuckDB that can read only what it is given.

PrepareData writes one Parquet file per split. Its key-value metadata holds a :class:`DatasetInfo` under the key
``lepton``, so every later stage knows target, features, time, clusters and which rows it has, from the file alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lepton_airflow.errors import BadConfiguration, BadInput, did_you_mean

if TYPE_CHECKING:
    import duckdb
    import pandas as pd

    from lepton_airflow.contract import Window

_KEY = b"lepton"
_T = TypeVar("_T")
# Small row groups: a writer holds one of them whole, and the memory limit must hold with wide rows too.
PARQUET = "FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 24576"
# For what is read once and thrown away: row groups are small in bytes too, which DuckDB allows where order is free.
SCRATCH = "FORMAT parquet, ROW_GROUP_SIZE 24576, ROW_GROUP_SIZE_BYTES '8MB'"
_MB_PER_THREAD = (
    125  # what DuckDB advises at least; with less, sorts and Parquet writers fail instead of spilling
)


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset says of itself.

    :ivar features: columns a model may see, in order; the other columns are target, time, clusters or ids.
    :ivar categorical: the features that are categories (text); all others are numbers.
    :ivar time_range: smallest and largest value of ``time_column`` in this split, both inclusive, ISO 8601; or None.
    :ivar cluster_column: rows with an equal value depend on one another (one day's flights).
    :ivar split: ``train``, ``valid``, ``test``, or None before splitting.
    :ivar split_id: equal for the disjoint splits of one PrepareData run: two splits of one id share no row.
    :ivar classes: the distinct values of a class target in training order; empty for a number to regress on.
    """

    target: str | None = None
    task: str | None = None  # classification or regression
    features: list[str] = field(default_factory=list)
    categorical: list[str] = field(default_factory=list)
    classes: list[Any] = field(default_factory=list)
    time_column: str | None = None
    time_range: list[str] | None = None
    cluster_column: str | None = None
    split: str | None = None
    split_id: str | None = None
    snapshot_sha256: str | None = None
    rows: int = 0


def read_info(path: Path) -> DatasetInfo:
    """The description that a Parquet file carries; raises BadInput when it is no Parquet file or carries none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path.name} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
    if _KEY not in metadata:
        raise BadInput(
            f"{path.name} does not say what its target and features are: expected a split made by PrepareData; "
            "pass prepare.output['train'], ['valid'] or ['test']."
        )
    known = {f.name for f in fields(DatasetInfo)}
    return DatasetInfo(**{k: v for k, v in json.loads(metadata[_KEY]).items() if k in known})


def info_sql(info: DatasetInfo) -> str:
    """The ``KV_METADATA`` clause for DuckDB's ``COPY … TO`` that writes a dataset's description into the file."""
    text = json.dumps(asdict(info), sort_keys=True, ensure_ascii=False, allow_nan=False).replace("'", "''")
    return f"KV_METADATA {{lepton: '{text}'}}"


def load_frame(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Some columns of a Parquet file in memory; raises BadInput with the columns there are when one is absent."""
    import pyarrow.parquet as pq

    present = pq.read_schema(path).names
    for column in columns or ():
        if column not in present:
            raise BadInput(f"column {column!r} is not in {path.name}; {did_you_mean(column, present)}")
    return pq.read_table(path, columns=list(columns) if columns is not None else None).to_pandas()


def quote(identifier: str) -> str:
    """An SQL identifier in double quotes, whatever is in it."""
    return '"' + identifier.replace('"', '""') + '"'


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: DuckDB draws the query under its own."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def literal(value: Path | str | Mapping[str, Any] | Sequence[Any]) -> str:
    """A path or a text as SQL; a sequence as a list and a mapping as a struct of such texts."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(str(k))}: {literal(str(v))}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(literal, value)) + "]"
    return "'" + str(value).replace("'", "''") + "'"


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
