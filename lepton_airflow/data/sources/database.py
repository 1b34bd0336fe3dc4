"""Read the rows of a query from PostgreSQL or SQLite, through an ADBC driver."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, time
from os.path import isfile
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
# A bound that sqlite's functions of date and time read, whatever its form.
_READ_AS_TIME = r"\b(date|time|datetime|julianday|unixepoch|strftime|timediff)\s*\(\s*('[^']*'\s*,\s*)?\$window_(start|end)\b"


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
        if not isfile(path):
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
    bounds = {"window_start": window.start, "window_end": window.end}
    moments = [datetime.fromisoformat(bounds[name]).astimezone(UTC) for name in names]
    if mark == "$":
        return sql, moments
    return sql, [_as_text(moment, name, source) for moment, name in zip(moments, names, strict=True)]


def _as_text(moment: datetime, name: str, source: Source) -> str:
    """A bound as sqlite, whose times are texts, compares it: a day alone, which is right however a text goes on after its day.

    :raises BadConfiguration: it is no midnight, and the sql compares it as it is: texts with a space and with a T would differ.
    """
    if moment.time() == time.min:
        return moment.date().isoformat()
    bare = re.search(rf"\${name}\b", re.sub(_READ_AS_TIME, "", str(source.sql), flags=re.IGNORECASE))
    if bare:
        raise BadConfiguration(
            f"source {source.name!r}: its sql compares ${name}, {moment.isoformat()}, as a text, and sqlite's texts of one moment "
            f"differ: compare datetime(column) with datetime(${name})."
        )
    return moment.strftime("%Y-%m-%d %H:%M:%S")
