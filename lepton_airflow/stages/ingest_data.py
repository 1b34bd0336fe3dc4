"""IngestData: several raw sources become one immutable Parquet snapshot."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.contract import Artifact, digest_of, split_pin
from lepton_airflow.data.duckdb_types import parts_of, with_parts
from lepton_airflow.data.sql import (
    PARQUET,
    SCRATCH,
    bind,
    column_types,
    connect,
    interruptible,
    literal,
    quote,
    select_statement,
    sql_message,
)
from lepton_airflow.errors import BadConfiguration, BadInput, Skipped, did_you_mean, first_line, require
from lepton_airflow.sdk.stage import Result, RunInfo, Stage
from lepton_airflow.store.files import Store, total_bytes

if TYPE_CHECKING:
    import duckdb

    from lepton_airflow.data.sources.landing import Landed
    from lepton_airflow.data.sources.spec import Source

log = logging.getLogger(__name__)

_UNSORTED = "query.parquet"
_SCHEMA_BYTES = 2500  # of the receipt's 8 KB; the snapshot itself has the whole schema
_TYPES_BYTES = 2000  # the same of the types that were found, of all sources together


@dataclass(kw_only=True)
class IngestData(Stage):
    """Collect rows from files, lakes and databases into one immutable Parquet snapshot.

    ``query`` is one DuckDB SELECT in which each source is a table of its name. Equal inputs give byte-equal snapshots
    whatever the number of threads, as long as the result of the query is fixed: give every ``DISTINCT ON``, ``first()`` and
    ``row_number()`` an order, and round averages, whose last bits depend on the order of adding.

    ``sources={"flights": "s3://raw/flights/*.csv", "weather": {"uri": "weather.jsonl", "types": {"hour": "INTEGER"}},
    "orders": {"connection": "shop_db", "sql": "SELECT * FROM orders WHERE ordered_at >= $window_start"},
    "stock": {"format": "delta", "uri": "s3://lake/stock", "version": 12, "connection": "lake"}}``

    :param sources: by name, a URI, a glob, a list of them, or a dict. Of files: uri, format (csv, tsv, jsonl, parquet), types,
        date_format, union, connection; of CSV also delimiter, quote, skip_lines, null_values, decimal, thousands, encoding. Of a
        lake: format (delta), uri, version, or format (iceberg), catalog, table, snapshot_id, each with columns, filters, types,
        connection. Of a database: connection (postgres, sqlite), sql, version, types.
    :param query: one SELECT; ``$window_start`` and ``$window_end`` are the run's window as TIMESTAMPTZ, and
        ``parameters`` are bound by name.
    :param parameters: values bound to the query by name; put values from a form here, not into the text.
    :param order_by: columns that order the snapshot; rows that are equal in them get a fixed order, too; empty: all columns.
    :param max_rejected_share: largest share of a source's rows that may be unreadable [share, 0 to 1].
    :param on_empty: when files of a source do not exist or the query gives no row: ``fail``; ``skip`` this task and those
        after it, for a schedule with months without data; or ``keep`` a snapshot without rows, if the files exist.
    :param memory_limit_mb: what DuckDB may hold, at least 128; the rest is spilled to disk. The process needs 300 MB more,
        for Python and Parquet writers. Rows over 10 KB or of 500 columns need a higher limit [MB].
    :param threads: threads of DuckDB; the result does not depend on it.
    :raises BadInput: a source is missing, empty, damaged or rejects too many rows, or the query gives no row.
    :raises BadConfiguration: the query is not one SELECT over the sources, or needs a window and there is none.
    """

    sources: dict[str, Any]
    query: str
    parameters: dict[str, Any] = field(default_factory=dict)
    order_by: list[str] = field(default_factory=list)
    max_rejected_share: float = 0.01
    on_empty: Literal["fail", "skip", "keep"] = "fail"
    memory_limit_mb: int = 1024
    threads: int = 2

    engines: ClassVar[tuple[str, ...]] = ("duckdb", "pyarrow")
    extra: ClassVar[str] = "ingest"
    outputs: ClassVar[tuple[str, ...]] = ("snapshot", "rejected", "rows", "sources", "schema")

    def input_digests(self, run: RunInfo) -> dict[str, str] | None:
        """A digest of each source's files or of its table's version; None if one of them is a live database."""
        from lepton_airflow.data.sources.landing import source_digest

        with self._if_absent():
            digests = {source.name: source_digest(source, run) for source in self._sources()}
        known = {name: digest for name, digest in digests.items() if digest is not None}
        return known if len(known) == len(digests) else None

    def bytes_to_digest(self, store: Store) -> int | None:
        """The size of the sources' files; None if one of them is a table, or not on this machine."""
        from lepton_airflow.data.sources.files import local_bytes

        return total_bytes(local_bytes(source, store) for source in self._sources())

    def connection_ids(self) -> list[str]:
        """The Connections that the sources name."""
        return sorted({s.connection for s in self._sources() if s.connection})

    def _sources(self) -> list[Source]:
        from lepton_airflow.data.sources.spec import Source

        if not self.sources:
            raise BadConfiguration(
                "sources is empty: expected at least one name with a URI, e.g. {'flights': 'raw/*.csv'}."
            )
        sources = [Source.parse(name, spec) for name, spec in self.sources.items()]
        lower = [s.name.lower() for s in sources]
        if len(set(lower)) < len(lower):
            raise BadConfiguration(
                f"sources {', '.join(self.sources)}: two names differ by case only, which SQL ignores."
            )
        return sources

    def run(self, run: RunInfo) -> Result:
        """Land the sources, run the query, and save the snapshot.

        :return: artifacts ``snapshot`` and, if a row was unreadable, ``rejected`` (source, file, line, column,
            error, raw); values ``rows``, ``sources`` (rows, rejected, digest, the version of a lake's table, and the types of
            columns that nobody stated) and ``schema``.
        """
        from lepton_airflow.data.sorting import MIN_MEMORY_MB
        from lepton_airflow.data.sources.files import find_files
        from lepton_airflow.data.sources.landing import source_digest

        require("duckdb", "IngestData", self.extra)
        if not 0 <= self.max_rejected_share <= 1:
            raise BadConfiguration(
                f"max_rejected_share={self.max_rejected_share}: expected a share from 0 to 1."
            )
        if self.memory_limit_mb < MIN_MEMORY_MB:
            raise BadConfiguration(
                f"memory_limit_mb={self.memory_limit_mb}: DuckDB needs at least {MIN_MEMORY_MB} to sort in pieces."
            )
        sources = self._sources()
        with self._if_absent():
            files = {source.name: find_files(source, run) for source in sources}
        readable = [path for found in files.values() for path in found]
        con = connect(
            run.workdir, memory_limit_mb=self.memory_limit_mb, threads=self.threads, readable=readable
        )
        try:
            landed, schema, rejected = interruptible(con, lambda: self._collect(con, sources, files, run))
        finally:
            con.close()
        _compare_with_former(run, landed)
        snapshot = run.workdir / "snapshot.parquet"
        rows = self._sort(run.workdir / _UNSORTED, snapshot, run)
        if not rows and self.on_empty != "keep":
            read = ", ".join(f"{one.name} {one.rows}" for one in landed)
            nothing = f"the query gives no row{_span(run)}; rows read: {read}."
            if self.on_empty == "skip":
                raise Skipped(nothing)
            raise BadInput(f"{nothing} Check the window and the conditions, or set on_empty to skip or keep.")
        artifacts = rejected | {"snapshot": run.save("snapshot.parquet", snapshot)}
        counts = {
            one.name: {"rows": one.rows, "rejected": one.rejected, "digest": source_digest(source, run)}
            | ({"version": one.version} if one.version is not None else {})
            | ({"types": _bounded(one.inferred, _TYPES_BYTES // len(sources))} if one.inferred else {})
            for one, source in zip(landed, sources, strict=True)
        }
        taken, left = sum(one.rows for one in landed), sum(one.rejected for one in landed)
        return Result(
            summary=f"{rows} rows with {len(schema)} columns from {taken} rows of {len(sources)} source(s)"
            f"{_span(run)}; {left} rejected.",
            artifacts=artifacts,
            values={"rows": rows, "sources": counts, "schema": _bounded(schema)},
            metrics={"rows": rows, "rows_read": taken, "rows_rejected": left},
        )

    @contextmanager
    def _if_absent(self) -> Iterator[None]:
        """Skip instead of failing when files do not exist, if the user said so."""
        from lepton_airflow.data.sources.files import NoFiles

        try:
            yield
        except NoFiles as error:
            if self.on_empty != "skip":
                raise
            raise Skipped(str(error)) from None

    def _collect(
        self,
        con: duckdb.DuckDBPyConnection,
        sources: list[Source],
        files: dict[str, dict[Path, str]],
        run: RunInfo,
    ) -> tuple[list[Landed], dict[str, str], dict[str, Artifact]]:
        """Land the sources, and write the rows of the query to the scratch space in any order."""
        from lepton_airflow.data.sources.landing import Landing

        landing, landed = Landing(con, run), []
        for source in sources:
            began = time.monotonic()
            landed.append(landing.land(source, files[source.name]))
            log.info(
                "%s: %d rows, %d rejected, from %s (%.1f s)",
                source.name, landed[-1].rows, landed[-1].rejected,
                f"{len(files[source.name])} file(s)" if files[source.name] else source.place(landed[-1].version),
                time.monotonic() - began,
            )  # fmt: skip
            run.check_stop()
        kept: dict[str, Artifact] = {}
        if any(one.rejected for one in landed):
            kept["rejected"] = run.save("rejected.parquet", _rejected(con, run.workdir))
            self._check_rejected(con, landed, kept["rejected"].uri)
        return landed, self._query(con, landed, run), kept

    def _sort(self, unsorted: Path, target: Path, run: RunInfo) -> int:
        import duckdb
        import pyarrow as pa

        from lepton_airflow.data.sorting import sort_parquet

        try:
            return sort_parquet(
                unsorted,
                target,
                self.order_by,
                scratch=run.workdir / "sort",
                memory_limit_mb=self.memory_limit_mb,
                threads=self.threads,
                check_stop=run.check_stop,
            )
        except duckdb.OutOfMemoryException as error:
            raise BadConfiguration(
                f"sorting the snapshot: {first_line(error)} Raise memory_limit_mb={self.memory_limit_mb}."
            ) from None
        except pa.ArrowNotImplementedError as error:
            raise BadConfiguration(
                f"query gives a type that the snapshot cannot hold ({first_line(error)}): cast it, an INTERVAL to seconds "
                "with epoch()."
            ) from None

    def _check_rejected(self, con: duckdb.DuckDBPyConnection, landed: list[Landed], kept: str) -> None:
        for one in landed:
            total = one.rows + one.rejected
            if total and one.rejected / total > self.max_rejected_share:
                file, line, column, error = con.execute(
                    'SELECT file, line, "column", error FROM rejected WHERE source = $1 ORDER BY ALL LIMIT 1',
                    [one.name],
                ).fetchall()[0]
                where = f"{file} line {line}" if line else "a row"
                where += f", column {column!r}" if column else ""
                raise BadInput(
                    f"source {one.name!r}: {one.rejected} of {total} rows ({one.rejected / total:.2%}) cannot be read, at "
                    f"most {self.max_rejected_share:.2%} may (max_rejected_share); the first is {where}: "
                    f"{first_line(ValueError(error))}. All are kept in {split_pin(kept)[0]}; "
                    "correct the source, its types, delimiter or encoding."
                )

    def _query(self, con: duckdb.DuckDBPyConnection, landed: list[Landed], run: RunInfo) -> dict[str, str]:
        import duckdb

        statement = select_statement(con, self.query, "query")
        values = bind(statement, self.parameters, run.need_window, "query")
        tables = "; ".join(f"{one.name}({', '.join(one.columns)})" for one in landed)
        try:
            schema = column_types(con, statement.query, values, "query")
            for column in self.order_by:
                if column not in schema:
                    raise BadConfiguration(f"order_by names {column!r}; {did_you_mean(column, schema)}")
            log.info(
                "query: %d columns, ordered by %s", len(schema), ", ".join(self.order_by) or "all of them"
            )
            rows = f"(\n{statement.query}\n)"
            if huge := [column for column, kind in schema.items() if parts_of(kind) & _HUGE.keys()]:
                rows = (
                    f"(SELECT * REPLACE ({', '.join(_exact_double(c, schema[c]) for c in huge)}) FROM {rows})"
                )
            con.execute(f"COPY {rows} TO {literal(run.workdir / _UNSORTED)} ({SCRATCH})", values)
        except duckdb.OutOfMemoryException as error:
            raise BadConfiguration(
                f"query: {first_line(error)} Raise memory_limit_mb={self.memory_limit_mb}."
            ) from None
        except duckdb.PermissionException as error:
            raise BadConfiguration(
                f"query may read only its sources: {sql_message(error)}. Sources: {tables}."
            ) from None
        except (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException) as error:
            raise BadConfiguration(f"query: {sql_message(error)}. Sources: {tables}.") from None
        except duckdb.Error as error:
            raise BadInput(f"query: {sql_message(error)}. Sources: {tables}.") from None
        return schema


_HUGE = dict.fromkeys(("HUGEINT", "UHUGEINT"), "DOUBLE")


def _exact_double(column: str, kind: str) -> str:
    """SQL of a HUGEINT, such as a sum of BIGINT, as the DOUBLE that Parquet holds; an error where that would round it."""
    name = quote(column)
    nearest = f"TRY_CAST({name} AS {with_parts(kind, _HUGE)})"
    rounds = f"column {column!r} is {kind}, which Parquet would hold as a DOUBLE, rounded: cast it to BIGINT, DECIMAL(38,0) or VARCHAR"
    return (
        f"CASE WHEN TRY_CAST({nearest} AS {kind}) IS NOT DISTINCT FROM {name} THEN {nearest} "
        f"ELSE error({literal(rounds)}) END AS {name}"
    )


def _span(run: RunInfo) -> str:
    return f" for the window {run.window.start} to {run.window.end}" if run.window else ""


def _compare_with_former(run: RunInfo, landed: list[Landed]) -> None:
    """Warn of each column whose type was found from its values and is another than in the run of this task before, or that is gone."""
    own = run.identity
    key = f"schemas/{digest_of([own.deployment, own.dag_id, own.task_id, own.map_index])}.json"
    types = {one.name: one.inferred for one in landed if one.inferred}
    try:
        former = json.loads(run.store.read(key) or b"{}")
    except ValueError:  # half written by a killed run: only a warning depends on it
        former = {}
    for one in landed:
        gone = [column for column in former.get(one.name, {}) if column not in one.columns]
        if gone:
            log.warning(
                "source %r: %d columns of the run before are not there any more: %s. If they have new names, change what reads "
                "them; if not, look whether the first line that is read of each file is its header.",
                one.name, len(gone), ", ".join(gone[:10]) + ", …" * (len(gone) > 10),
            )  # fmt: skip
    for source, columns in types.items():
        for column, kind in columns.items():
            before = former.get(source, {}).get(column, kind)
            if kind != before:
                log.warning(
                    "source %r: column %r is %s by its values, and was %s in the run before: state types={%r: %r} so that "
                    "every run gives it the same.",
                    source, column, kind, before, column, before,
                )  # fmt: skip
    if types and types != former:
        run.store.write(key, json.dumps(types).encode())


def _rejected(con: duckdb.DuckDBPyConnection, workdir: Path) -> Path:
    target = workdir / "rejected.parquet"
    con.execute(f"COPY (FROM rejected ORDER BY ALL) TO {literal(target)} ({PARQUET})")
    return target


def _bounded(schema: dict[str, str], limit: int = _SCHEMA_BYTES) -> dict[str, str]:
    """As many columns as fit into the receipt, and how many more there are."""
    kept: dict[str, str] = {}
    for name, kind in schema.items():
        if len(json.dumps(kept | {name: kind})) > limit:
            kept["…"] = f"and {len(schema) - len(kept)} more"
            break
        kept[name] = kind
    return kept
