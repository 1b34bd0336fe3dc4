"""Read one version of a Delta Lake or Iceberg table, in Arrow batches.

The version is fixed when a run first asks for it. So the cache key, the rows and the receipt are about the same version,
however often the table is written meanwhile.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lepton_airflow.connections import AwsAccess, Connection, hide_logins
from lepton_airflow.contract import digest_of
from lepton_airflow.data.held_values import midnight
from lepton_airflow.data.sources.spec import Source
from lepton_airflow.data.sql import literal, quote
from lepton_airflow.errors import (
    BadConfiguration,
    BadInput,
    LeptonError,
    did_you_mean,
    is_transient,
    require,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable
    from pyiceberg.catalog import Catalog
    from pyiceberg.expressions import BooleanExpression
    from pyiceberg.table import DataScan, Table

    from lepton_airflow.sdk.stage import RunInfo

_MAX_LISTED = 20  # versions, snapshots or tables named in a message


def open_lake(source: Source, run: RunInfo) -> Lake:
    """Open the table of a source at the stated version, else at the one that was current when this run first asked.

    :raises BadInput: there is no such table, version or snapshot; the message names those there are.
    """
    kind = {"delta": Delta, "iceberg": Iceberg}[str(source.format)]
    require(kind.library, f"source {source.name!r}", "lakes")
    connection = run.connection(source.connection) if source.connection else None
    version, _ = run.pins.get(repr(source)) or (source.lake_version, None)
    with _in_one_sentence(source, connection):
        lake = kind(source, connection, version, run)
    # By the whole source, not by its name: in a notebook, one run may meet several sources of a name.
    run.pins[repr(source)] = (lake.version, lake.digest)
    return lake


def lake_digest(source: Source, run: RunInfo) -> str:
    """The digest of a source's table at its version; the table is opened for it once in a run."""
    if repr(source) not in run.pins:
        open_lake(source, run)
    return str(run.pins[repr(source)][1])


class Lake(ABC):
    """One version of one table.

    :ivar library: the distribution that reads it.
    :ivar identity: the table's own id, which differs when a table of the same name is made anew.
    :ivar version: number of the Delta version, or id of the Iceberg snapshot.
    :ivar schema: names and types of the columns to read.
    """

    library: str
    identity: str
    version: int
    schema: pa.Schema

    @property
    def digest(self) -> str:
        """Equal for the same version of the same table, read by the same release of the library."""
        from importlib.metadata import version

        return digest_of([self.identity, self.version, version(self.library)])

    def __init__(
        self, source: Source, connection: Connection | None, version: int | None, run: RunInfo
    ) -> None:
        self.source, self.connection, self.run = source, connection, run
        self._open(version)

    @abstractmethod
    def _open(self, version: int | None) -> None:
        """Find the table and the version, and set ``identity``, ``version`` and ``schema``."""

    @abstractmethod
    def _stream(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows that meet the filters."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the wanted columns of the wanted rows, in no fixed order; the first batch has no rows."""
        import pyarrow as pa

        yield pa.RecordBatch.from_pylist([], schema=self.schema)
        with _in_one_sentence(self.source, self.connection):
            for batch in self._stream():
                yield batch.select(self.schema.names).cast(self.schema)

    def _project(self, schema: pa.Schema) -> pa.Schema:
        import pyarrow as pa

        wanted = self.source.columns or schema.names
        for column in [*wanted, *(column for column, _, _ in self.source.filters)]:
            if column not in schema.names:
                raise BadInput(
                    f"source {self.source.name!r}: column {column!r} is not in version {self.version} of the table; "
                    f"{did_you_mean(column, schema.names)}"
                )
        self._types = {name: schema.field(name).type for name in schema.names}
        return pa.schema([schema.field(name) for name in wanted])

    def _filters(self) -> Iterator[tuple[str, str, Any]]:
        """The source's filters, with the bounds of the window written as each column needs them."""
        for column, sign, value in self.source.filters:
            if value in ("$window_start", "$window_end"):
                window = self.run.need_window(f"source {self.source.name!r}: its filters use {value}")
                moment = datetime.fromisoformat(window.start if value == "$window_start" else window.end)
                yield column, sign, self._bound(column, sign, moment)
            else:
                yield column, sign, value

    def _bound(self, column: str, sign: str, moment: datetime) -> str:
        import pyarrow as pa

        kind = self._types[column]
        if pa.types.is_date(kind):
            return midnight(moment, sign).isoformat()
        if pa.types.is_timestamp(kind):
            return moment.isoformat() if kind.tz else moment.astimezone(UTC).replace(tzinfo=None).isoformat()
        raise BadConfiguration(
            f"source {self.source.name!r}: filters compare column {column!r} ({kind}) with the window: expected a date or "
            "a timestamp; select the rows in the query instead."
        )


class Delta(Lake):
    """A version of a Delta Lake table, read by ``deltalake``, which knows deletion vectors and column mapping."""

    library = "deltalake"
    _table: DeltaTable

    def _open(self, version: int | None) -> None:
        import pyarrow as pa
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        uri = str(self.source.uri)
        try:
            table = DeltaTable(uri, storage_options=self._options(uri))
        except TableNotFoundError:
            raise BadInput(
                f"source {self.source.name!r}: there is no Delta table at {uri}: expected its folder, with _delta_log in it."
            ) from None
        latest = table.version()
        if version is not None and version != latest:
            try:
                table.load_as_version(version)
            except DeltaError:
                first = min(
                    entry["version"]
                    for entry in DeltaTable(uri, storage_options=self._options(uri)).history()
                )
                raise BadInput(
                    f"source {self.source.name!r}: {uri} has no version {version}; its log goes from {first} to {latest}."
                ) from None
        self._table, self.version = table, table.version()
        self.identity = str(table.metadata().id)
        self.schema = self._project(pa.schema(table.schema().to_arrow()))

    def _options(self, uri: str) -> dict[str, str]:
        """What ``deltalake`` needs to open the table, named as Rust's object store names it."""
        connection = self.connection
        store = self.run.store
        if connection is None and uri.partition("://")[0] == store.protocol:
            connection = store.connection
        if connection is None:
            return {}
        aws = AwsAccess.of(connection)
        named = {
            "AWS_ACCESS_KEY_ID": aws.access_key_id,
            "AWS_SECRET_ACCESS_KEY": aws.secret_access_key,
            "AWS_SESSION_TOKEN": aws.session_token,
            "AWS_REGION": aws.region,
            "AWS_ENDPOINT_URL": aws.endpoint_url,
            "AWS_ALLOW_HTTP": "true" if aws.endpoint_url and aws.endpoint_url.startswith("http://") else None,
        }
        on_s3 = uri.startswith(("s3://", "s3a://"))
        return {k: v for k, v in named.items() if v and on_s3} | connection.extra.get("delta", {})

    def _stream(self) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        conditions = [f"{quote(column)} {_sql(sign, value)}" for column, sign, value in self._filters()]
        scan = self._table.scan(columns=self.schema.names, predicate=" AND ".join(conditions) or None)
        yield from pa.RecordBatchReader.from_stream(scan)


class Iceberg(Lake):
    """A snapshot of an Iceberg table, read by ``pyiceberg`` through any catalog that it knows."""

    library = "pyiceberg"
    _scan: DataScan

    def _open(self, version: int | None) -> None:
        from pyiceberg.catalog import load_catalog
        from pyiceberg.io.pyarrow import schema_to_pyarrow

        properties = self._properties()
        table = self._find(load_catalog(properties.pop("name", "default"), **properties))
        snapshots = {snapshot.snapshot_id: snapshot.timestamp_ms for snapshot in table.snapshots()}
        current = table.current_snapshot()
        if current is None:
            raise BadInput(
                f"source {self.source.name!r}: table {self.source.table} has no snapshot: nothing was ever written."
            )
        if version is not None and version not in snapshots:
            last = list(snapshots.items())[-_MAX_LISTED:]
            there = ", ".join(f"{number} ({_moment(at_ms)})" for number, at_ms in last)
            raise BadInput(
                f"source {self.source.name!r}: table {self.source.table} has no snapshot {version}; known: {there}."
            )
        self.version = current.snapshot_id if version is None else version
        self.identity = str(table.metadata.table_uuid)
        # A snapshot is read with the columns that it was written with, whatever the table has now.
        whole = table.scan(snapshot_id=self.version)
        self.schema = self._project(schema_to_pyarrow(whole.projection(), include_field_ids=False))
        self._scan = whole.update(row_filter=self._expression(), selected_fields=tuple(self.schema.names))

    def _properties(self) -> dict[str, Any]:
        """What ``pyiceberg`` needs to open the catalog and its files."""
        connection = self.connection
        if connection is None:
            return dict(self.source.catalog)
        aws = AwsAccess.of(connection)
        named = {
            "client.access-key-id": aws.access_key_id,
            "client.secret-access-key": aws.secret_access_key,
            "client.session-token": aws.session_token,
            "client.region": aws.region,
            "s3.endpoint": aws.endpoint_url,
        }
        of_aws = connection.type in ("aws", "s3")
        return (
            {k: v for k, v in named.items() if v and of_aws}
            | dict(self.source.catalog)
            | connection.extra.get("iceberg", {})
        )

    def _find(self, catalog: Catalog) -> Table:
        from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError

        name = str(self.source.table)
        try:
            return catalog.load_table(name)
        except NoSuchTableError:
            pass
        try:
            listed = [".".join(parts) for parts in catalog.list_tables(name.rpartition(".")[0])]
            there = did_you_mean(name, listed[:_MAX_LISTED])
        except NoSuchNamespaceError:
            spaces = [".".join(parts) for parts in catalog.list_namespaces()]
            there = f"nor a namespace {name.rpartition('.')[0]!r}; {did_you_mean(name.rpartition('.')[0], spaces[:_MAX_LISTED])}"
        raise BadInput(f"source {self.source.name!r}: the catalog has no table {name!r}; {there}")

    def _expression(self) -> BooleanExpression:
        from pyiceberg import expressions as iceberg

        signs = {"=": iceberg.EqualTo, "<": iceberg.LessThan, "<=": iceberg.LessThanOrEqual,
                 ">": iceberg.GreaterThan, ">=": iceberg.GreaterThanOrEqual, "in": iceberg.In}  # fmt: skip
        found: BooleanExpression = iceberg.AlwaysTrue()
        for column, sign, value in self._filters():
            found = iceberg.And(found, signs[sign](column, value))
        return found

    def _stream(self) -> Iterator[pa.RecordBatch]:
        from pyiceberg.io.pyarrow import ArrowScan, _read_all_delete_files

        scan = self._scan
        reader = ArrowScan(scan.table_metadata, scan.io, scan.projection(), scan.row_filter)
        for task in scan.plan_files():
            # The public functions read all data files, each perhaps a gigabyte, into a list before they give a row.
            deletes = _read_all_delete_files(scan.io, [task])
            yield from reader._record_batches_from_scan_tasks_and_deletes([task], deletes)  # noqa: SLF001


def _sql(sign: str, value: Any) -> str:
    if sign == "in":
        return f"IN ({', '.join(_sql_value(item) for item in value)})"
    return f"{sign} {_sql_value(value)}"


def _sql_value(value: Any) -> str:
    return literal(value) if isinstance(value, str) else json.dumps(value)


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")


# Errors of SQLAlchemy and pyiceberg that the next try may not meet. Those of Rust's object store arrive as Arrow's, so only
# the text tells them.
_TRANSIENT_KINDS = frozenset({"InterfaceError", "OperationalError", "ServerError", "ServiceUnavailableError"})
_OBJECT_STORE = re.compile(r"Generic \w+ error")


@contextmanager
def _in_one_sentence(source: Source, connection: Connection | None) -> Iterator[None]:
    """Turn any error of the libraries, whose messages may fill a page, into one sentence without secrets."""
    try:
        yield
    except LeptonError:
        raise
    except Exception as error:  # noqa: BLE001 - Rust's, Arrow's, SQLAlchemy's, requests' and botocore's share no base
        where = source.table or source.uri
        text = " ".join(re.sub(r"\x1b\[[0-9;]*m|↳", " ", str(error) or type(error).__name__).split())
        text = hide_logins(text)
        if connection is not None and connection.password:
            text = text.replace(connection.password, "***")
        if isinstance(error, FileNotFoundError) or "not found: No such file" in text:
            raise BadInput(
                f"source {source.name!r}: files of {source.format} table {where} are gone; an old version loses them to VACUUM "
                f"or to the expiry of snapshots: read a newer one. ({text[-200:]})"
            ) from None
        # A store or a catalog that does not answer may answer the next try; everything else would fail again.
        transient = (
            isinstance(error, OSError)
            or type(error).__name__ in _TRANSIENT_KINDS
            or is_transient(text)
            or _OBJECT_STORE.search(text)
        )
        kind = LeptonError if transient else BadInput
        raise kind(
            f"source {source.name!r}: {source.format} table {where} cannot be read: {text[:400]}"
        ) from None
