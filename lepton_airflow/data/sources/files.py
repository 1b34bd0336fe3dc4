"""What IngestData can read: files by URI or glob, tables of a lake, and the rows of a database.

Each source lands as Parquet in the run's scratch space, so the user's query reads only typed, checked columns.
Nothing is held in memory: files are streamed to disk, DuckDB spills, and the rows of tables arrive in batches.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote as percent, urlencode

from lepton_airflow.connections import Connection
from lepton_airflow.contract import digest_of, split_pin
from lepton_airflow.data.dataset import SCRATCH, first_line, quote
from lepton_airflow.data.sources.lakes import FORMATS, Lake, check_lake, lake_digest, open_lake
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError, did_you_mean, require
from lepton_airflow.store.files import Store, digest_path, total_bytes

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from lepton_airflow.sdk.stage import RunInfo

log = logging.getLogger(__name__)

_SUFFIXES = {
    "csv": "csv", "tsv": "tsv", "tab": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl",
    "parquet": "parquet", "pq": "parquet",
}  # fmt: skip
_FILES = ("csv", "tsv", "jsonl", "parquet")
_FORMATS = (*_FILES, *FORMATS)
_ROW_GROUP_BYTES = 32 << 20  # of a table's rows in memory before they are written
_TELL_S = 10.0  # between two lines in the log about a table that is being read
_COMPRESSED = (".gz", ".zst")
_TYPE = re.compile(r"^[A-Za-z][A-Za-z0-9_ ]*(\(\s*\d+\s*(,\s*\d+\s*)?\))?(\[\])*$")
_MISSING = "'na', 'n/a', '#n/a', 'nan', 'nil', 'none', 'null', 'missing', 'unknown', '?', '.', '-', '--'"
_LAKE_ONLY = ("catalog", "table", "snapshot_id", "columns", "filters")
# What each kind of source takes. An option that would do nothing is refused: ``version`` of an Iceberg table, which has
# snapshots, would otherwise read the current one.
_OPTIONS = {
    "files": ("uri", "format", "connection", "types", "delimiter", "null_values", "date_format", "encoding", "union"),
    "delta": ("format", "uri", "version", "columns", "filters", "types", "connection"),
    "iceberg": ("format", "catalog", "table", "snapshot_id", "columns", "filters", "types", "connection"),
    "a database": ("connection", "sql", "version", "types"),
}  # fmt: skip
_NAME = re.compile(r"^[A-Za-z_]\w*$")


class NoFiles(BadInput):
    """The files of a source are not there."""


@dataclass(frozen=True)
class Source:
    """One named source of rows: files (``uri``), a table of a lake (``format``), or a database (``connection``, ``sql``).

    :ivar uri: a URI, a glob, or a list of them; files in the order of their URIs. Of a Delta table, its folder.
    :ivar format: ``csv``, ``tsv``, ``jsonl`` or ``parquet``, None: from the suffix; or ``delta`` or ``iceberg``.
    :ivar types: DuckDB types of columns. A value that does not fit is a rejected row. Columns not named are sniffed
        over the whole file: a scheduled run should state them, since one month's values may look different.
    :ivar delimiter: of a CSV file; None: ``,`` for csv and a tab for tsv.
    :ivar null_values: texts that mean "no value" in a CSV file, besides the empty one.
    :ivar date_format: of dates in a CSV file, as in strptime; ISO when not given.
    :ivar union: whether files of one source may lack some columns (read as missing values).
    :ivar connection: id of an Airflow Connection: the database for ``sql``, or what opens the URI or the catalog.
    :ivar sql: one query for the database; ``$window_start`` and ``$window_end`` are bound.
    :ivar version: of a Delta table, its number, None: the current one; of a database, what the user says its state is:
        with it, an equal run may be reused.
    :ivar catalog: pyiceberg's properties of an Iceberg catalog (``type``, ``uri``, ``warehouse``, …), without secrets.
    :ivar table: the Iceberg table, as ``namespace.table``.
    :ivar snapshot_id: of the Iceberg table; None: the current one.
    :ivar columns: the columns of a lake's table to read; empty: all.
    :ivar filters: ``[column, sign, value]`` that rows of a lake's table must all meet, so that files without such rows are
        not read; the values ``$window_start`` and ``$window_end`` are those of the run's window.
    """

    name: str
    uri: str | list[str] = ""
    format: str | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    delimiter: str | None = None
    null_values: list[str] = field(default_factory=list)
    date_format: str = "%Y-%m-%d"
    encoding: str = "utf-8"
    union: bool = False
    connection: str | None = None
    sql: str | None = None
    version: str | int | None = None
    catalog: Mapping[str, Any] = field(default_factory=dict)
    table: str | None = None
    snapshot_id: int | str | None = None
    columns: list[str] = field(default_factory=list)
    filters: list[Any] = field(default_factory=list)

    @classmethod
    def parse(cls, name: str, spec: Any) -> Source:
        """Read one entry of ``sources``; raises BadConfiguration with the right form."""
        if not _NAME.match(name):
            raise BadConfiguration(
                f"source name {name!r} is not a table name: expected letters, digits and _."
            )
        if isinstance(spec, (str, list)):
            spec = {"uri": spec}
        if not isinstance(spec, dict):
            raise BadConfiguration(
                f"source {name!r} is {spec!r}: expected a URI, a list of URIs, {{'uri': …, 'types': …}}, "
                "{'format': 'delta', 'uri': …}, {'format': 'iceberg', 'catalog': …, 'table': …} or {'connection': …, 'sql': …}."
            )
        known = [f.name for f in fields(cls) if f.name != "name"]
        for key in spec:
            if key not in known:
                raise BadConfiguration(f"source {name!r} has no option {key!r}; {did_you_mean(key, known)}")
        source = cls(name=name, **spec)
        if source.format not in (None, *_FORMATS):
            raise BadConfiguration(
                f"source {name!r}: format={source.format!r}; {did_you_mean(str(source.format), _FORMATS)}"
            )
        if source.format in FORMATS:
            check_lake(source)
        elif option := next((o for o in _LAKE_ONLY if getattr(source, o)), None):
            raise BadConfiguration(
                f"source {name!r} has the option {option!r}, which only tables of a lake take: set format to "
                f"{' or '.join(FORMATS)}, or select in the query."
            )
        elif bool(source.uri) == bool(source.sql):
            raise BadConfiguration(
                f"source {name!r} needs either a uri or a sql, and has {'both' if source.sql else 'none'}."
            )
        kind = str(source.format) if source.format in FORMATS else "a database" if source.sql else "files"
        unset = cls(name=name)
        for option in spec:
            value = getattr(source, option)
            if option not in _OPTIONS[kind] and value is not None and value != getattr(unset, option):
                raise BadConfiguration(
                    f"source {name!r} has the option {option!r}, which a source of {kind} does not take; it takes "
                    f"{', '.join(_OPTIONS[kind])}."
                )
        if source.sql and not source.connection:
            raise BadConfiguration(
                f"source {name!r} has a sql and no connection: say which Airflow Connection it is for."
            )
        for column, kind in source.types.items():
            if not _TYPE.match(str(kind)):
                raise BadConfiguration(
                    f"source {name!r}: types[{column!r}]={kind!r} is not a DuckDB type such as BIGINT."
                )
        return source

    @property
    def lake_version(self) -> int | None:
        """The stated version or snapshot of a lake's table; run parameters bring it as text."""
        option = "version" if self.format == "delta" else "snapshot_id"
        stated = getattr(self, option)
        if stated is None or str(stated).isdecimal():
            return None if stated is None else int(stated)
        raise BadConfiguration(f"source {self.name!r}: {option}={stated!r}: expected a whole number.")

    def lake(self, run: RunInfo) -> Lake | None:
        """The table of a lake, at the version this run reads; None for files and databases."""
        return open_lake(self, run) if self.format in FORMATS else None

    def files(self, run: RunInfo) -> dict[Path, str]:
        """Local paths of the files, each with the URI it came from, in the order of the URIs; none of a table."""
        if self.sql or self.format in FORMATS:
            return {}
        patterns = [self.uri] if isinstance(self.uri, str) else list(self.uri)
        found: dict[Path, str] = {}
        for pattern in patterns:
            plain, digest = split_pin(pattern)
            store = run.store
            if self.connection:
                store = Store(
                    re.split(r"[*?\[]", plain)[0].rpartition("/")[0], run.connection(self.connection)
                )
            uris = [pattern] if digest else store.glob(plain)
            if not uris:
                what = "no file matches" if re.search(r"[*?\[]", plain) else "there is no file"
                raise NoFiles(
                    f"source {self.name!r}: {what} {plain}. Check the path and that the data has arrived."
                )
            for uri in uris:
                path = store.fetch(uri, run.workdir)
                if path.is_dir():
                    raise BadInput(
                        f"source {self.name!r}: {uri} is a directory; name its files: {uri.rstrip('/')}/*.csv"
                    )
                found[path] = split_pin(uri)[0]
        return found

    def digest(self, run: RunInfo) -> str | None:
        """sha256 over the contents of the files in order; that of the version of a table; None of a live database."""
        if self.sql:
            return digest_of([self.version]) if self.version is not None else None
        if self.format in FORMATS:
            return lake_digest(self, run)
        return digest_of([digest_path(path)[0] for path in self.files(run)])

    def local_bytes(self, store: Store) -> int | None:
        """How large its files are [bytes]; None of a table, and of files elsewhere."""
        if self.sql or self.format in FORMATS or self.connection:
            return None
        patterns = [self.uri] if isinstance(self.uri, str) else list(self.uri)
        return total_bytes(store.local_bytes(pattern) for pattern in patterns)

    def place(self, version: int | None) -> str:
        """Where the rows of a table come from, for the log."""
        return f"{self.table or self.uri}, version {version}" if version is not None else str(self.connection)

    def kind(self, path: Path) -> str:
        """The format of one file; raises BadConfiguration when neither option nor suffix tells it."""
        if self.format:
            return self.format
        name = path.name.lower()
        for suffix in _COMPRESSED:
            name = name.removesuffix(suffix)
        kind = _SUFFIXES.get(name.rpartition(".")[2])
        if kind is None:
            raise BadConfiguration(
                f"source {self.name!r}: the format of {path.name} is not clear from its name: "
                f"set format to one of {', '.join(_FILES)}."
            )
        return kind


@dataclass(frozen=True)
class Landed:
    """A source as Parquet: where, how many rows, how many were rejected on the way, and of which version of a table."""

    name: str
    paths: list[Path]
    rows: int
    rejected: int
    columns: dict[str, str]
    version: int | None = None


class Landing:
    """Turns sources into Parquet with one DuckDB connection; its table ``rejected`` keeps what could not be read."""

    def __init__(self, con: duckdb.DuckDBPyConnection, run: RunInfo) -> None:
        self.con, self.run = con, run
        self.folder = run.workdir / "landed"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._count = 0
        con.execute(
            'CREATE TEMP TABLE rejected (source TEXT, file TEXT, line BIGINT, "column" TEXT, error TEXT, raw TEXT)'
        )

    def land(self, source: Source, files: Mapping[Path, str]) -> Landed:
        """Land one source. ``files`` is empty for a table of a lake or a database.

        :raises BadInput: a file is empty, damaged, or its columns do not fit the others'.
        """
        before, unfit = {path: _stamp(path) for path in files}, 0
        lake = source.lake(self.run)
        if not files:
            paths = [self._table(source, lake.batches() if lake else _query_database(source, self.run))]
        else:
            kinds = {source.kind(path) for path in files}
            if len(kinds) > 1:
                raise BadConfiguration(
                    f"source {source.name!r} mixes {' and '.join(sorted(kinds))}: make it two sources."
                )
            for path, uri in files.items():
                if path.stat().st_size == 0:
                    raise BadInput(
                        f"source {source.name!r}: {uri} is empty (0 bytes): expected at least a header or a row."
                    )
            kind = kinds.pop()
            reader = {"jsonl": self._json_lines, "parquet": self._parquet}.get(kind, self._csv)
            paths = reader(source, files)
        for path, uri in files.items():
            if _stamp(path) != before[path]:
                raise LeptonError(
                    f"source {source.name!r}: {uri} changed while it was read; try again when it is complete."
                )
        if source.types and (not files or kind in ("jsonl", "parquet")):
            paths, unfit = self._cast(source, paths)
        self.con.execute(
            f"CREATE TEMP VIEW {quote(source.name)} AS SELECT * FROM {_parquet_scan(paths, source.union)}"
        )
        (rows,) = self._one(f"SELECT count(*) FROM {quote(source.name)}")
        # One line may be wrong in several columns: it is one rejected row.
        (rejected,) = self._one(
            "SELECT count(*) FROM (SELECT DISTINCT file, line FROM rejected WHERE source = $1 AND line IS NOT NULL)",
            [source.name],
        )
        described = self.con.execute(f"DESCRIBE {quote(source.name)}").fetchall()
        columns = {str(r[0]): str(r[1]) for r in described}
        return Landed(
            source.name, paths, rows, rejected + unfit, columns, lake.version if lake is not None else None
        )

    # -- CSV -------------------------------------------------------------------------------------------------------

    def _csv(self, source: Source, files: Mapping[Path, str]) -> list[Path]:
        layouts: dict[tuple[str, ...], list[Path]] = {}
        for path, uri in files.items():
            layouts.setdefault(self._header(source, path, uri), []).append(path)
        _same_columns(source, {paths[0]: list(names) for names, paths in layouts.items()}, files)
        types = self._csv_types(source, layouts, files)
        landed = [self._copy_csv(source, names, paths, types, files) for names, paths in layouts.items()]
        guessed = [name for name, kind in types.items() if kind == "VARCHAR" and name not in source.types]
        self._warn_of_numbers(source, guessed, landed)
        return landed

    def _warn_of_numbers(self, source: Source, texts: list[str], paths: list[Path]) -> None:
        """Name the columns that would be numbers but for a few texts that mean "no value"."""
        scan = _parquet_scan(paths, union=True)

        def look(columns: list[str], table: str) -> dict[str, tuple[int, int, list[str]]]:
            """By column: its numbers, its values that are neither a number nor missing, its texts for missing ones."""
            parts = []
            for name in map(quote, columns):
                number, missing = (
                    f"TRY_CAST({name} AS DOUBLE) IS NOT NULL",
                    f"lower(trim({name})) IN ({_MISSING})",
                )
                parts += [
                    f"count(*) FILTER ({number})",
                    f"count(*) FILTER ({name} IS NOT NULL AND NOT ({number}) AND NOT ({missing}))",
                    f"list(DISTINCT {name}) FILTER (NOT ({number}) AND {missing})",
                ]
            row = self._one(f"SELECT {', '.join(parts)} FROM {table}")
            return {c: (row[3 * i], row[3 * i + 1], row[3 * i + 2] or []) for i, c in enumerate(columns)}

        # Most texts show themselves in the first rows; only for the others is the whole column read.
        if texts:
            texts = [
                c for c, (_, others, _) in look(texts, f"(FROM {scan} LIMIT 20000)").items() if not others
            ]
        if texts:
            for column, (numbers, others, missing) in look(texts, scan).items():
                if numbers and not others and missing:
                    log.warning(
                        "source %r: column %r is text because of %s among %d numbers: pass null_values=%s to read them as "
                        "missing, or types={%r: 'VARCHAR'} to keep the text.",
                        source.name, column, ", ".join(map(repr, sorted(missing))), numbers, sorted(missing), column,
                    )  # fmt: skip

    def _csv_options(self, source: Source, path: Path) -> str:
        delimiter = source.delimiter or ("\t" if source.kind(path) == "tsv" else ",")
        return (
            f"delim={_literal(delimiter)}, quote='\"', escape='\"', encoding={_literal(source.encoding)}, "
            f"dateformat={_literal(source.date_format)}, nullstr={_literal(['', *source.null_values])}, "
            "buffer_size=8388608"
        )

    def _header(self, source: Source, path: Path, uri: str) -> tuple[str, ...]:
        """The names of the columns as they stand in the file; DuckDB itself would rename doubles silently."""
        names = self._read(
            source,
            uri,
            f"SELECT * FROM read_csv({_literal(str(path))}, {self._csv_options(source, path)}, header=false, "
            "all_varchar=true, null_padding=true, ignore_errors=true, parallel=false) LIMIT 1",
        )
        if not names:
            raise BadInput(
                f"source {source.name!r}: {uri} has no header line that can be read as {source.encoding}."
            )
        header = list(names[0])
        while header and header[-1] is None:  # padding: some later line is longer than the header
            header.pop()
        for position, name in enumerate(header, 1):
            if name is None:
                raise BadInput(
                    f"source {source.name!r}: column {position} of {uri} has no name in the header line."
                )
        _no_doubles(source, uri, header)
        if len(header) == 1 and (other := next((d for d in ",;\t|" if d in header[0]), None)):
            raise BadInput(
                f"source {source.name!r}: {uri} has the one column {header[0]!r}, which looks separated by {other!r}: "
                f"set delimiter={other!r}."
            )
        for column in source.types:
            if column not in header and not source.union:
                raise BadInput(
                    f"source {source.name!r}: types names column {column!r}, not in {uri}; {did_you_mean(column, header)}"
                )
        return tuple(header)

    def _csv_types(
        self, source: Source, layouts: Mapping[tuple[str, ...], list[Path]], files: Mapping[Path, str]
    ) -> dict[str, str]:
        """The type of each column: as stated, else the one that every value of every file fits."""
        types: dict[str, str] = {}
        for names, paths in layouts.items():
            if set(names) <= set(source.types):
                continue
            stated = {n: t for n, t in source.types.items() if n in names}
            for path in paths:
                found = self._read(
                    source,
                    files[path],
                    f"SELECT Columns, TimestampFormat FROM sniff_csv({_literal(str(path))}, {self._csv_options(source, path)}, "
                    "header=true, sample_size=-1, ignore_errors=true, "
                    f"auto_type_candidates=['NULL', 'BOOLEAN', 'BIGINT', 'DOUBLE', 'DATE', 'TIMESTAMP', 'TIMESTAMPTZ', 'VARCHAR']"
                    f"{', types=' + _literal(stated) if stated else ''})",
                )
                columns, odd_timestamps = found[0]
                for name, column in zip(names, columns, strict=True):
                    # A timestamp in a guessed format could be read day-first one month and month-first the next.
                    kind = (
                        "VARCHAR"
                        if odd_timestamps and column["type"].startswith("TIMESTAMP")
                        else column["type"]
                    )
                    types[name] = _common(types.get(name, kind), kind)
        return types | dict(source.types)

    def _copy_csv(
        self,
        source: Source,
        names: tuple[str, ...],
        paths: list[Path],
        types: Mapping[str, str],
        files: Mapping[Path, str],
    ) -> Path:
        self._count += 1
        errors, scans = f"csv_errors_{self._count}", f"csv_scans_{self._count}"
        target = self.folder / f"{source.name}-{self._count}.parquet"
        listed = _literal([str(p) for p in paths])
        columns = _literal({n: types[n] for n in names})
        self._read(
            source,
            ", ".join(files[p] for p in paths[:3]),
            f"COPY (SELECT * FROM read_csv({listed}, {self._csv_options(source, paths[0])}, header=true, auto_detect=false, "
            f"columns={columns}, store_rejects=true, rejects_table='{errors}', rejects_scan='{scans}', "
            f"rejects_line_size_limit=65536)) TO {_literal(str(target))} ({SCRATCH})",
        )
        self.con.execute(
            f"INSERT INTO rejected SELECT $1, file_path, line, column_name, error_type || ': ' || error_message, csv_line "
            f"FROM {errors} JOIN {scans} USING (scan_id, file_id)",
            [source.name],
        )
        for path in paths:
            self.con.execute("UPDATE rejected SET file = $1 WHERE file = $2", [files[path], str(path)])
        return target

    # -- JSON lines -------------------------------------------------------------------------------------------------

    def _json_lines(self, source: Source, files: Mapping[Path, str]) -> list[Path]:
        paths = list(files)
        for index, (path, uri) in enumerate(files.items()):
            (bad,) = self._read(
                source,
                uri,
                "SELECT count(*) FILTER (json IS NULL OR json_type(json) <> 'OBJECT') FROM "
                f"read_ndjson_objects({_literal(str(path))}, ignore_errors=true)",
            )[0]
            if bad:
                paths[index] = self._without_bad_lines(source, path, uri)
        target = self.folder / f"{source.name}.parquet"
        # Every row is looked at, so that a field's type does not depend on where in the file it first appears.
        self._read(
            source,
            ", ".join(list(files.values())[:3]),
            f"COPY (SELECT * FROM read_ndjson({_literal([str(p) for p in paths])}, records=true, sample_size=-1, "
            "maximum_sample_files=1000000, map_inference_threshold=-1, field_appearance_threshold=0)) "
            f"TO {_literal(str(target))} ({SCRATCH})",
        )
        return [target]

    def _without_bad_lines(self, source: Source, path: Path, uri: str) -> Path:
        """A copy of the file without the lines that are not one JSON object; those become rejected rows."""
        target = self.folder / f"{source.name}-{path.name}.jsonl"
        good, bad = 0, []
        with _open_bytes(path) as lines, target.open("wb") as out:
            for number, line in enumerate(lines, 1):
                error = _json_error(line)
                if error is None:
                    good += bool(line.strip())
                    out.write(line)
                else:
                    bad.append(
                        [source.name, uri, number, None, error, line.decode(errors="replace").rstrip("\r\n")]
                    )
                if len(bad) >= 1000:
                    self.con.executemany("INSERT INTO rejected VALUES ($1, $2, $3, $4, $5, $6)", bad)
                    bad.clear()
        if bad:
            self.con.executemany("INSERT INTO rejected VALUES ($1, $2, $3, $4, $5, $6)", bad)
        if not good:
            raise BadInput(
                f"source {source.name!r}: {uri} has no line that is a JSON object; expected JSON lines, "
                "one object a line (a single JSON array is not)."
            )
        return target

    # -- Parquet ----------------------------------------------------------------------------------------------------

    def _parquet(self, source: Source, files: Mapping[Path, str]) -> list[Path]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names: dict[Path, list[str]] = {}
        for path, uri in files.items():
            try:
                names[path] = list(pq.read_schema(path).names)
            except (pa.ArrowException, OSError) as error:
                raise BadInput(
                    f"source {source.name!r}: {uri} is not a whole Parquet file ({first_line(error)}): "
                    "it may still be being written, or is damaged; bring it again."
                ) from None
            _no_doubles(source, uri, names[path])
        _same_columns(source, names, files)
        for path, uri in files.items():  # a damaged page shows only when it is read
            self._read(source, uri, f"SELECT count(COLUMNS(*)) FROM {_parquet_scan([path], False)}")
        return list(files)

    # -- tables of a lake or a database ------------------------------------------------------------------------------

    def _table(self, source: Source, batches: Iterator[pa.RecordBatch]) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        target = self.folder / f"{source.name}.parquet"
        schema = next(batches).schema
        _no_doubles(source, "its table", schema.names)
        rows, waiting, told = 0, list[pa.RecordBatch](), time.monotonic()
        with pq.ParquetWriter(target, schema) as writer:

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

    # -- types stated for what is not CSV ---------------------------------------------------------------------------

    def _cast(self, source: Source, paths: list[Path]) -> tuple[list[Path], int]:
        """Give columns their stated types; a row with a value that does not fit is rejected, and counted."""
        import duckdb

        scan = _parquet_scan(paths, source.union)
        names = [str(r[0]) for r in self.con.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()]
        for column, kind in source.types.items():
            if column not in names:
                raise BadInput(
                    f"source {source.name!r}: types names column {column!r}; {did_you_mean(column, names)}"
                )
            try:
                self.con.execute(f"SELECT CAST(NULL AS {kind})")
            except duckdb.Error as error:
                raise BadConfiguration(
                    f"source {source.name!r}: types[{column!r}]={kind!r}: {first_line(error)}"
                ) from None
            self.con.execute(
                f"INSERT INTO rejected SELECT $1, NULL, NULL, $2, 'CAST: not a ' || $3, to_json(t)::TEXT FROM {scan} t "
                f"WHERE {quote(column)} IS NOT NULL AND TRY_CAST({quote(column)} AS {kind}) IS NULL",
                [source.name, column, kind],
            )
        target = self.folder / f"{source.name}-typed.parquet"
        casts = ", ".join(f"TRY_CAST({quote(c)} AS {k}) AS {quote(c)}" for c, k in source.types.items())
        fits = " AND ".join(
            f"({quote(c)} IS NULL OR TRY_CAST({quote(c)} AS {k}) IS NOT NULL)"
            for c, k in source.types.items()
        )
        self._read(
            source,
            "its rows",
            f"COPY (SELECT * REPLACE ({casts}) FROM {scan} WHERE {fits}) TO {_literal(str(target))} ({SCRATCH})",
        )
        (unfit,) = self._one(
            f"SELECT (SELECT count(*) FROM {scan}) - (SELECT count(*) FROM {_parquet_scan([target], False)})"
        )
        return [target], unfit

    # -- small things -----------------------------------------------------------------------------------------------

    def _one(self, sql: str, parameters: list[Any] | None = None) -> tuple[Any, ...]:
        row = self.con.execute(sql, parameters or []).fetchone()
        assert row is not None
        return row

    def _read(self, source: Source, what: str, sql: str) -> list[tuple[Any, ...]]:
        import duckdb

        try:
            return self.con.execute(sql).fetchall()
        except duckdb.OutOfMemoryException as error:
            raise BadConfiguration(
                f"source {source.name!r}: {first_line(error)} Raise memory_limit_mb."
            ) from None
        except duckdb.Error as error:
            reason = first_line(error)
            if "Error when sniffing" in reason:  # the rest of that message is a page of settings
                reason = (
                    f"no CSV in {source.encoding}; look for an unclosed quote, another delimiter or encoding"
                )
            raise BadInput(f"source {source.name!r}: {what} cannot be read: {reason}") from None


def _query_database(source: Source, run: RunInfo) -> Iterator[pa.RecordBatch]:
    """The rows of a query in Arrow batches, first one without rows. A failure's message is scrubbed of the password."""
    import importlib

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
    except (Error, pa.ArrowException, OSError) as error:  # the latter two while rows arrive
        text = first_line(error)
        for secret in (connection.password, percent(connection.password or "", safe="")):
            text = text.replace(secret, "***") if secret else text
        # A database that is away may be back at the next try; a wrong password or query stays wrong.
        passing = str(getattr(error, "sqlstate", None))[:2] in _PASSING_STATES or _PASSING.search(str(error))
        kind = LeptonError if passing else BadInput
        raise kind(
            f"source {source.name!r}: Connection {connection.id!r} or its sql failed: {text}"
        ) from None


# Classes of SQLSTATE: lost connection, rollback for another transaction's sake, out of resources, operator's intervention.
_PASSING_STATES = frozenset({"08", "40", "53", "57"})
_PASSING = re.compile(
    r"connection refused|timed? ?out|timeout expired|closed the connection|reset by peer|no route to host|unreachable"
    r"|temporary failure|starting up|shutting down|terminating connection|too many (clients|connections)|database is locked",
    re.IGNORECASE,
)


def _empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """No rows, but the columns: a query without a result still gives a table."""
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)


def _driver(source: Source, connection: Connection) -> tuple[str, str, str]:
    """The ADBC driver, its URI and its parameter mark for a Connection."""
    if connection.type in ("postgres", "postgresql"):
        login = percent(connection.login or "", safe="")
        if connection.password:
            login += ":" + percent(connection.password, safe="")
        host = f"{connection.host or 'localhost'}:{connection.port or 5432}"
        passed = (
            "sslmode",
            "sslrootcert",
            "sslcert",
            "sslkey",
            "options",
            "connect_timeout",
            "application_name",
        )
        query = urlencode(
            {k: str(connection.extra[k]) for k in passed if k in connection.extra}, quote_via=percent
        )
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
    """The query with ``$window_start`` and ``$window_end`` as numbered parameters, and their values."""
    from datetime import datetime

    names = list(dict.fromkeys(re.findall(r"\$(window_start|window_end)\b", str(source.sql))))
    sql = re.sub(
        r"\$(window_start|window_end)\b", lambda m: f"{mark}{names.index(m[1]) + 1}", str(source.sql)
    )
    if not names:
        return sql, []
    window = run.need_window(f"source {source.name!r}: its sql uses ${names[0]}")
    values = [{"window_start": window.start, "window_end": window.end}[name] for name in names]
    return sql, values if mark == "?" else [datetime.fromisoformat(v) for v in values]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _same_columns(source: Source, columns: Mapping[Path, list[str]], files: Mapping[Path, str]) -> None:
    if source.union or not columns:
        return
    (first, wanted), *others = columns.items()
    for path, names in others:
        if set(names) != set(wanted):
            lacking, more = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
            difference = " and ".join(
                part
                for part in (
                    f"lacks {', '.join(lacking)}" * bool(lacking),
                    f"also has {', '.join(more)}" * bool(more),
                )
                if part
            )
            raise BadInput(
                f"source {source.name!r}: {files[path]} {difference}, compared with {files[first]}: "
                "files of one source have the same columns; set union=true to read absent ones as missing values."
            )


def _no_doubles(source: Source, where: str, names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            raise BadInput(
                f"source {source.name!r}: {where} has the column {name!r} twice (case does not count in SQL): "
                "rename one of them."
            )
        seen[name.lower()] = name


def _common(one: str, other: str) -> str:
    """The type that the values of both fit."""
    if one == other:
        return one
    for pair, both in ((("BIGINT", "DOUBLE"), "DOUBLE"), (("DATE", "TIMESTAMP"), "TIMESTAMP")):
        if {one, other} == set(pair):
            return both
    return "VARCHAR"


def _parquet_scan(paths: list[Path], union: bool) -> str:
    return f"read_parquet({_literal([str(p) for p in paths])}, union_by_name={str(union or len(paths) > 1).lower()})"


def _literal(value: Any) -> str:
    """A Python value as SQL text."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(k))}: {_literal(str(v))}" for k, v in value.items()) + "}"
    return "[" + ", ".join(_literal(item) for item in value) + "]"


def _open_bytes(path: Path) -> Any:
    if path.suffix == ".gz":
        import gzip

        return gzip.open(path, "rb")
    return path.open("rb")


def _json_error(line: bytes) -> str | None:
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except ValueError as error:  # broken JSON, or bytes that are no UTF-8
        return f"JSON: {error}"
    return None if isinstance(value, dict) else f"JSON: a {type(value).__name__}, expected an object"
