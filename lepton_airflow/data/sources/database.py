"""Read the rows of a query from PostgreSQL or SQLite, through an ADBC driver."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote as percent, urlencode

from lepton_airflow.connections import Connection
from lepton_airflow.data.sources.spec import Source
from lepton_airflow.errors import (
    BadConfiguration,
    BadInput,
    LeptonError,
    did_you_mean,
    first_line,
    is_transient,
    require,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from lepton_airflow.sdk.stage import RunInfo

# Classes of SQLSTATE: connection lost, transaction rolled back, out of resources, operator intervened.
_TRANSIENT_STATES = frozenset({"08", "40", "53", "57"})
_POSTGRES_OPTIONS = (
    "sslmode", "sslrootcert", "sslcert", "sslkey", "options", "connect_timeout", "application_name",
)  # fmt: skip
_BOUNDS = re.compile(r"\$(window_start|window_end)\b")


def query_database(source: Source, run: RunInfo) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a source's query in Arrow batches; the first one has no rows. No error shows the password.

    :raises LeptonError: the database is away, and may be back at the next try.
    :raises BadInput: the Connection or the query is wrong.
    """
    import pyarrow as pa
    from adbc_driver_manager import Error

    connection = run.connection(str(source.connection))
    module_name, uri, mark = _driver(source, connection)
    require(module_name.replace("_", "-"), f"source {source.name!r}", "ingest")
    driver = importlib.import_module(f"{module_name}.dbapi")
    sql, values = _bind(source, run, mark)
    try:
        with driver.connect(uri) as con, con.cursor() as cursor:
            cursor.execute(sql, values or None)
            reader = cursor.fetch_record_batch()
            yield _empty_batch(reader.schema)
            yield from reader
    except (Error, pa.ArrowException, OSError) as error:  # Arrow's and the system's, while rows arrive
        text = first_line(error)
        for secret in (connection.password, percent(connection.password or "", safe="")):
            text = text.replace(secret, "***") if secret else text
        state = str(getattr(error, "sqlstate", None))[:2]
        kind = LeptonError if state in _TRANSIENT_STATES or is_transient(first_line(error)) else BadInput
        raise kind(
            f"source {source.name!r}: Connection {connection.id!r} or its sql failed: {text}"
        ) from None


def _empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """A batch without rows, from which the columns are known even if the query gives no row."""
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)


def _driver(source: Source, connection: Connection) -> tuple[str, str, str]:
    """The ADBC driver for a Connection, the URI for it, and its sign for parameters."""
    if connection.type in ("postgres", "postgresql"):
        login = percent(connection.login or "", safe="")
        if connection.password:
            login += ":" + percent(connection.password, safe="")
        host = f"{connection.host or 'localhost'}:{connection.port or 5432}"
        options = {k: str(connection.extra[k]) for k in _POSTGRES_OPTIONS if k in connection.extra}
        query = urlencode(options, quote_via=percent)
        uri = f"postgresql://{login + '@' if login else ''}{host}/{percent(connection.schema or '', safe='')}"
        return "adbc_driver_postgresql", uri + (f"?{query}" if query else ""), "$"
    if connection.type == "sqlite":
        path = connection.host or connection.schema or ""
        if not Path(path).is_file():
            raise BadInput(
                f"source {source.name!r}: Connection {connection.id!r} names no sqlite file ({path!r})."
            )
        return "adbc_driver_sqlite", Path(path).absolute().as_uri() + "?mode=ro", "?"
    raise BadConfiguration(
        f"source {source.name!r}: Connection {connection.id!r} is of type {connection.type!r}; "
        f"{did_you_mean(connection.type, ('postgres', 'sqlite'))}"
    )


def _bind(source: Source, run: RunInfo, mark: str) -> tuple[str, list[Any]]:
    """The query with the window's bounds as numbered parameters, and the values of these."""
    query = str(source.sql)
    names = list(dict.fromkeys(_BOUNDS.findall(query)))
    if not names:
        return query, []
    sql = _BOUNDS.sub(lambda found: f"{mark}{names.index(found[1]) + 1}", query)
    window = run.need_window(f"source {source.name!r}: its sql uses ${names[0]}")
    values = [{"window_start": window.start, "window_end": window.end}[name] for name in names]
    return sql, values if mark == "?" else [datetime.fromisoformat(v) for v in values]
