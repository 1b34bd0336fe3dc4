"""Land any source as Parquet in the run's scratch space, so that the user's query reads only typed, checked columns.

Nothing is held in memory whole: files are streamed to disk, DuckDB spills, and the rows of tables arrive in batches.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.contract import digest_of
from lepton_airflow.data.duckdb_types import MICROSECONDS
from lepton_airflow.data.sources.csv_files import CsvFiles
from lepton_airflow.data.sources.database import query_database
from lepton_airflow.data.sources.files import (
    ParquetFiles,
    Reader,
    begin_of,
    check_no_doubles,
    check_schema,
    find_files,
    parquet_scan,
    query,
)
from lepton_airflow.data.sources.json_files import JsonFiles
from lepton_airflow.data.sources.lakes import lake_digest, open_lake
from lepton_airflow.data.sources.spec import CSV_ONLY, Source
from lepton_airflow.data.sources.text_types import Notation, canonical, cast, fits, fits_again, infer
from lepton_airflow.data.sql import SCRATCH, literal, quote
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError, did_you_mean, first_line
from lepton_airflow.store.files import digest_path

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from lepton_airflow.sdk.stage import RunInfo

log = logging.getLogger(__name__)

_READERS: dict[str, type[Reader]] = {
    "csv": CsvFiles, "tsv": CsvFiles, "jsonl": JsonFiles, "parquet": ParquetFiles,
}  # fmt: skip
_ROW_GROUP_BYTES = 32 << 20  # of a table's rows in memory before they are written
_TELL_S = 10.0  # between two lines in the log about a table that is being read


def source_digest(source: Source, run: RunInfo) -> str | None:
    """sha256 of what a source holds: its files in order, or the version of its table; None for a live database."""
    if source.sql:
        return digest_of([source.version]) if source.version is not None else None
    if source.is_lake:
        return lake_digest(source, run)
    return digest_of([digest_path(path)[0] for path in find_files(source, run)])


@dataclass(frozen=True)
class Landed:
    """What was landed of a source.

    :ivar columns: with their types.
    :ivar inferred: the types among these that nobody stated and that were found from the values.
    :ivar version: of a lake's table.
    """

    name: str
    rows: int
    rejected: int
    columns: dict[str, str]
    inferred: dict[str, str]
    version: int | None = None


class Landing:
    """Lands sources on one DuckDB connection, whose table ``rejected`` keeps the rows that could not be read."""

    def __init__(self, con: duckdb.DuckDBPyConnection, run: RunInfo) -> None:
        self.con, self.run = con, run
        self.folder = run.workdir / "landed"
        self.folder.mkdir(parents=True, exist_ok=True)
        con.execute(
            'CREATE TEMP TABLE rejected (source TEXT, file TEXT, line BIGINT, "column" TEXT, error TEXT, raw TEXT)'
        )

    def land(self, source: Source, files: Mapping[Path, str]) -> Landed:
        """Land one source, and make a view of its name. ``files`` is empty for a table of a lake or a database.

        :raises BadInput: a file is empty, damaged, or its columns do not fit the others'.
        """
        version, reader = None, None
        self._check_date_format(source)
        if files:
            reader = self._reader(source, files)
            paths = self._files(reader)
        elif source.is_lake:
            lake = open_lake(source, self.run)
            paths, version = [self._table(source, lake.batches())], lake.version
        else:
            paths = [self._table(source, query_database(source, self.run))]
        lines = reader.unreadable if reader else 0
        paths, inferred, unfit = self._cast(source, paths, reader)
        name = quote(source.name)
        scan = parquet_scan(paths, union=source.union)
        coarser = self._in_microseconds(source, scan)
        replaced = ", ".join(f"CAST({quote(c)} AS {kind}) AS {quote(c)}" for c, kind in coarser.items())
        without = f" EXCLUDE ({', '.join(map(quote, reader.place))})" if reader and reader.place else ""
        with_times = f" REPLACE ({replaced})" if coarser else ""
        self.con.execute(f"CREATE TEMP VIEW {name} AS SELECT *{without}{with_times} FROM {scan}")
        columns = {str(r[0]): str(r[1]) for r in self.con.execute(f"DESCRIBE {name}").fetchall()}
        rows = self._count(f"FROM {name}")
        return Landed(source.name, rows, lines + unfit, columns, inferred | coarser, version)

    def _check_date_format(self, source: Source) -> None:
        """Raise for a format that DuckDB does not know, or that has no year: it would read one of 1900."""
        import duckdb

        wrong = f"source {source.name!r}: date_format={source.date_format!r}"
        if not re.search(r"%-?[YyGxcs]", source.date_format):
            raise BadConfiguration(f"{wrong} has no year: expected a format of strptime such as %d/%m/%Y.")
        try:
            self.con.execute("SELECT try_strptime('', $1)", [source.date_format]).fetchall()
        except duckdb.Error as error:
            raise BadConfiguration(f"{wrong}: {first_line(error)}") from None

    def _reader(self, source: Source, files: Mapping[Path, str]) -> Reader:
        """What reads these files; raises when they are no files of one format."""
        formats = {source.file_format(path.name) for path in files}
        if len(formats) > 1:
            raise BadConfiguration(
                f"source {source.name!r} mixes {' and '.join(sorted(formats))}: make it two sources."
            )
        (form,) = formats
        if form not in ("csv", "tsv") and (useless := next(filter(source.states, CSV_ONLY), None)):
            raise BadConfiguration(
                f"source {source.name!r} has the option {useless!r}, which does nothing in {form}: it is for CSV files only."
            )
        for path, uri in files.items():
            if path.stat().st_size == 0:
                raise BadInput(
                    f"source {source.name!r}: {uri} is empty (0 bytes): expected at least a header or a row."
                )
        return _READERS[form](self.con, source, files, self.folder, self.run.check_stop)

    def _files(self, reader: Reader) -> list[Path]:
        """Land files that nobody may change meanwhile."""
        before = {path: _stamp(path) for path in reader.files}
        paths = reader.land()
        for path, uri in reader.files.items():
            if _stamp(path) != before[path]:
                raise LeptonError(
                    f"source {reader.source.name!r}: {uri} changed while it was read; try again when it is complete."
                )
        return paths

    def _table(self, source: Source, batches: Iterator[pa.RecordBatch]) -> Path:
        """Write batches, the first of which has no rows, as one Parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        target = self.folder / f"{source.name}.parquet"
        schema = next(batches).schema
        check_no_doubles(source, "its table", schema.names)
        check_schema(source, "its table", schema)
        rows, waiting, told = 0, list[pa.RecordBatch](), time.monotonic()
        try:
            opened = pq.ParquetWriter(target, schema)
        except pa.ArrowNotImplementedError as error:
            raise BadInput(
                f"source {source.name!r}: its table has a type that Parquet cannot hold ({first_line(error)}): cast it in sql, an "
                "interval to seconds, or leave it out."
            ) from None
        with opened as writer:

            def write() -> None:
                writer.write_table(pa.Table.from_batches(waiting, schema))  # one row group
                waiting.clear()

            for batch in batches:
                waiting.append(batch)
                rows += batch.num_rows
                if sum(b.nbytes for b in waiting) >= _ROW_GROUP_BYTES:
                    write()
                if time.monotonic() - told > _TELL_S:
                    told = time.monotonic()
                    log.info("%s: %d rows so far", source.name, rows)
                self.run.check_stop()
            write()
        return target

    def _cast(
        self, source: Source, paths: Sequence[Path], reader: Reader | None
    ) -> tuple[list[Path], dict[str, str], int]:
        """Give columns their types, as stated, else as found from their values.

        :return: the Parquet, the types that were found, and how many rows had a value that does not fit its stated type.
        """
        scan = parquet_scan(paths, union=source.union)
        notation = Notation(source.date_format, source.decimal, source.thousands)
        found = self.con.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()
        of = {str(name): str(kind) for name, kind, *_ in found}
        stated = self._stated(source, [name for name in of if reader is None or name not in reader.place])
        inferred = {} if reader is None else self._inferred(reader, scan, stated, notation)
        wrong = {
            column: f"({quote(column)} IS NOT NULL AND NOT {_fits(column, kind, of[column], notation)})"
            for column, kind in stated.items()
            if kind not in ("VARCHAR", of[column])
        }
        any_wrong = " OR ".join(wrong.values()) or "false"
        unfit = self._count(f"FROM {scan} WHERE {any_wrong}") if wrong else 0
        if unfit:
            reasons = {column: f"CAST: not exactly a {stated[column]}" for column in wrong}
            by_line = reader is not None and reader.reject(scan, {c: (wrong[c], reasons[c]) for c in wrong})
            for column, condition in {} if by_line else wrong.items():
                self.con.execute(
                    f"INSERT INTO rejected SELECT $1, NULL, NULL, $2, $3 || {begin_of(column)}, to_json(t)::TEXT FROM {scan} t WHERE {condition}",
                    [source.name, column, f"{reasons[column]}: "],
                )
        casts = {
            column: cast(quote(column), kind, notation) if of[column] == "VARCHAR"
            else f"TRY_CAST({quote(column)} AS {kind})"
            for column, kind in (inferred | stated).items()
            if kind != of[column]
        }  # fmt: skip
        if reader is not None:
            reader.warn_of([column for column, kind in inferred.items() if kind == "VARCHAR"], scan)
        if not casts:
            return list(paths), inferred, 0
        target = self.folder / f"{source.name}-typed.parquet"
        columns = ", ".join(f"{sql} AS {quote(column)}" for column, sql in casts.items())
        query(
            self.con,
            source,
            "its rows",
            f"COPY (SELECT * REPLACE ({columns}) FROM {scan} WHERE NOT ({any_wrong})) TO {literal(target)} ({SCRATCH})",
        )
        return [target], inferred, unfit

    def _in_microseconds(self, source: Source, scan: str) -> dict[str, str]:
        """The types, in microseconds, of the timestamps in nanoseconds that lose nothing by it: most of those that pandas writes.

        DuckDB compares nanoseconds with no time that has a zone, such as the bounds of the run's window. A column with finer
        values stays as it is.
        """
        found = self.con.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()
        fine = {str(c): str(of) for c, of, *_ in found if of in MICROSECONDS and c not in source.types}
        return {
            column: MICROSECONDS[of]
            for column, of in fine.items()
            if not self._count(
                f"FROM {scan} WHERE {quote(column)} IS NOT NULL AND NOT {fits_again(quote(column), MICROSECONDS[of], of)}"
            )
        }

    def _stated(self, source: Source, names: Iterable[str]) -> dict[str, str]:
        """The stated types by DuckDB's names for them; raises when one is none, or its column is not there."""
        import duckdb

        stated = {}
        for column, kind in source.types.items():
            if column not in names:
                raise BadInput(
                    f"source {source.name!r}: types names column {column!r}; {did_you_mean(column, names)}"
                )
            try:
                stated[column] = canonical(self.con, kind)
            except duckdb.Error as error:
                raise BadConfiguration(
                    f"source {source.name!r}: types[{column!r}]={kind!r}: {first_line(error)}"
                ) from None
            if "HUGEINT" in stated[column]:
                raise BadConfiguration(
                    f"source {source.name!r}: types[{column!r}]={kind!r}: Parquet would hold it as a DOUBLE, which rounds; state "
                    "DECIMAL(38,0) or VARCHAR."
                )
        return stated

    def _inferred(
        self, reader: Reader, scan: str, stated: Mapping[str, str], notation: Notation
    ) -> dict[str, str]:
        """The types of the columns of text that nobody stated."""
        found: dict[str, str] = {}
        for kinds in dict.fromkeys(tuple(kinds) for kinds in reader.texts.values()):
            columns = [c for c, own in reader.texts.items() if tuple(own) == kinds and c not in stated]
            found |= infer(self.con, scan, columns, notation, kinds)
        return found

    def _count(self, of: str, parameters: Sequence[Any] = ()) -> int:
        ((rows,),) = self.con.execute(f"SELECT count(*) {of}", list(parameters)).fetchall()
        return int(rows)


def _fits(column: str, kind: str, of: str, notation: Notation) -> str:
    value = quote(column)
    of_text = of == "VARCHAR" or (of.startswith("VARCHAR[]") and kind.endswith("[]"))
    return fits(value, kind, notation) if of_text else fits_again(value, kind, of)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
