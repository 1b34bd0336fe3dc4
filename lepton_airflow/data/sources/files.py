"""Find the files of a source, read them whatever compresses them, and say what every reader of a format does."""

from __future__ import annotations

import io
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from lepton_airflow.contract import split_pin
from lepton_airflow.data.sources.spec import Source
from lepton_airflow.data.sql import SCRATCH, literal, quote, sql_message
from lepton_airflow.errors import BadConfiguration, BadInput, brief, first_line
from lepton_airflow.store.files import Store, total_bytes

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from lepton_airflow.sdk.stage import RunInfo

log = logging.getLogger(__name__)

_REJECTED_AT_ONCE = 1000  # bad lines held in memory before they go into the table ``rejected``
_RAW_CHARACTERS = 65_536  # of a rejected record that are kept
_BLOCK_BYTES = 1 << 20
_MOST_DIGITS = 38  # of a DECIMAL in DuckDB
_MAGIC = {".gz": b"\x1f\x8b\x08", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\0"}


class Unreadable(ValueError):
    """A file cannot be read: the end of a sentence that begins with its URI."""


class NoFiles(BadInput):
    """A source names files that do not exist."""


def find_files(source: Source, run: RunInfo) -> dict[Path, str]:
    """Fetch the files of a source: local paths, each with its URI, in the order of the URIs; empty for a table.

    :raises NoFiles: a URI or a glob names no file.
    """
    if source.kind != "files":
        return {}
    found: dict[Path, str] = {}
    for pattern in source.uris:
        plain, digest = split_pin(pattern)
        store = run.store
        if source.connection:
            store = Store(re.split(r"[*?\[]", plain)[0].rpartition("/")[0], run.connection(source.connection))
        uris = [pattern] if digest else store.glob(plain)
        if not uris:
            what = "no file matches" if re.search(r"[*?\[]", plain) else "there is no file"
            raise NoFiles(
                f"source {source.name!r}: {what} {plain}. Check the path and that the data has arrived."
            )
        for uri in uris:
            path = store.fetch(uri, run.workdir)
            if path.is_dir():
                raise BadInput(
                    f"source {source.name!r}: {uri} is a directory; name its files: {uri.rstrip('/')}/*.csv"
                )
            found[path] = split_pin(uri)[0]
    return found


def local_bytes(source: Source, store: Store) -> int | None:
    """The size of a source's files [bytes]; None for a table, and for files that are not on this machine."""
    if source.kind != "files" or source.connection:
        return None
    return total_bytes(store.local_bytes(pattern) for pattern in source.uris)


@dataclass
class Reader(ABC):
    """Lands the files of one source, which all have one format, as Parquet.

    :ivar files: local paths, each with its URI for messages.
    :ivar folder: where the Parquet is written.
    :ivar check_stop: called between pieces; it raises to end the work.
    :ivar texts: the columns that are landed as text, and the types that each may have, the narrowest first.
    :ivar place: two further columns of what was landed: the position of a row's file among ``files``, and the row's number in it.
    :ivar unreadable: how many lines were no row.
    """

    con: duckdb.DuckDBPyConnection
    source: Source
    files: Mapping[Path, str]
    folder: Path
    check_stop: Callable[[], None]
    texts: dict[str, Sequence[str]] = field(default_factory=dict)
    place: tuple[str, ...] = ()
    unreadable: int = 0

    @abstractmethod
    def land(self) -> list[Path]:
        """Write the rows as Parquet, and those that cannot be read into DuckDB's table ``rejected``."""

    def records(self, path: Path) -> Iterator[tuple[int, int, bytes]]:
        """The number, the line and the text of each row of a file that was landed with its ``place``."""
        raise NotImplementedError

    def reject(self, scan: str, wrong: Mapping[str, tuple[str, str]]) -> bool:
        """Write the rows with a value that does not fit into ``rejected``, with file and line.

        :param wrong: by column, the SQL condition under which its value does not fit, and what to say of it.
        :return: whether it did; where a format has no lines, nothing is written.
        """
        import pyarrow.parquet as pq

        if not self.place:
            return False
        found = self.folder / f"{self.source.name}-misfits.parquet"
        file, number = map(quote, self.place)
        cases = ", ".join(
            f"CASE WHEN {sql} THEN {{'name': {literal(column)}, 'value': {begin_of(column)}}} END"
            for column, (sql, _) in wrong.items()
        )
        self.query(
            "its rows",
            f"COPY (SELECT * FROM (SELECT {file} AS file, {number} AS number, list_filter([{cases}], lambda x: x IS NOT NULL) AS columns "
            f"FROM {scan}) WHERE len(columns) > 0 ORDER BY file, number) TO {literal(found)} ({SCRATCH})",
        )
        rejected, paths, at = Rejected(self.con, self.source.name), list(self.files), -1
        with pq.ParquetFile(found) as misfits:
            for batch in misfits.iter_batches(_REJECTED_AT_ONCE):
                for misfit in batch.to_pylist():
                    if misfit["file"] != at:
                        at = misfit["file"]
                        records = self.records(paths[at])
                    line, raw = next((line, raw) for row, line, raw in records if row == misfit["number"])
                    for column in misfit["columns"]:
                        error = f"{wrong[column['name']][1]}: {brief(column['value'])}"
                        rejected.add(self.files[paths[at]], line, error, raw, column["name"])
                self.check_stop()
        rejected.flush()
        return True

    def warn_of(self, texts: Sequence[str], scan: str) -> None:  # noqa: B027 - most formats have nothing to warn of
        """Warn of columns that look as if they should hold something else than text."""

    def query(self, what: str, sql: str) -> list[tuple[Any, ...]]:
        """Run a query that reads ``what``; raises BadInput if that cannot be read."""
        return query(self.con, self.source, what, sql)

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Name the file of which :class:`Unreadable` tells."""
        try:
            yield
        except Unreadable as error:
            raise BadInput(f"source {self.source.name!r}: {self.files[path]} {error}") from None

    def first_uris(self, paths: Sequence[Path]) -> str:
        """The first URIs of some files, for a message."""
        return ", ".join(self.files[path] for path in paths[:3])

    def check_same_columns(self, columns: Mapping[Path, Sequence[str]]) -> None:
        """Raise unless all files have the same columns, or the source is a union."""
        if self.source.union or not columns:
            together = dict.fromkeys(name for names in columns.values() for name in names)
            check_no_doubles(self.source, "the files together", list(together))
            return
        (first, wanted), *others = columns.items()
        for path, names in others:
            if set(names) != set(wanted):
                lacking, more = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
                difference = [f"lacks {_names(lacking)}"] * bool(lacking)
                difference += [f"also has {_names(more)}"] * bool(more)
                raise BadInput(
                    f"source {self.source.name!r}: {self.files[path]} {' and '.join(difference)}, compared with "
                    f"{self.files[first]}: files of one source have the same columns; set union=true to read absent ones "
                    "as missing values."
                )


class Rejected:
    """Fills DuckDB's table ``rejected``, some rows at a time."""

    def __init__(self, con: duckdb.DuckDBPyConnection, source: str) -> None:
        self.con, self.source = con, source
        self.rows: list[tuple[Any, ...]] = []

    def add(self, uri: str, line: int, error: str, raw: bytes, column: str | None = None) -> None:
        """A record that is no row, or of which a column does not fit."""
        text = raw.decode(errors="replace").rstrip("\r\n")[:_RAW_CHARACTERS]
        self.rows.append((self.source, uri, line, column, error, text))
        if len(self.rows) >= _REJECTED_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        import pyarrow as pa

        if self.rows:
            names = ("source", "file", "line", "column", "error", "raw")
            kinds = (pa.string(), pa.string(), pa.int64(), pa.string(), pa.string(), pa.string())
            arrays = [
                pa.array(cells, kind) for cells, kind in zip(zip(*self.rows, strict=True), kinds, strict=True)
            ]
            self.con.register("rejected_rows", pa.table(dict(zip(names, arrays, strict=True))))
            self.con.execute("INSERT INTO rejected FROM rejected_rows").fetchall()
            self.con.unregister("rejected_rows")
            self.rows.clear()


def _names(names: Sequence[str]) -> str:
    """Names of columns for a message, which are values where a file has no header."""
    shown = ", ".join(name if len(name) <= 40 else f"{name[:39]}…" for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def unused(name: str, names: Iterable[str]) -> str:
    """A name that no column has."""
    taken = {n.lower() for n in names}
    while name in taken:
        name += "_"
    return name


class ParquetFiles(Reader):
    """Parquet, which needs no copy unless its files hold a column in types of which DuckDB would make a rounded one."""

    def land(self) -> list[Path]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schemas: dict[Path, pa.Schema] = {}
        for path, uri in self.files.items():
            try:
                schemas[path] = pq.read_schema(path)
            except (pa.ArrowException, OSError) as error:
                raise BadInput(
                    f"source {self.source.name!r}: {uri} is not a whole Parquet file ({first_line(error)}): "
                    "it may still be being written, or is damaged; bring it again. Of another format, state format."
                ) from None
            check_no_doubles(self.source, uri, schemas[path].names)
            check_schema(self.source, uri, schemas[path])
        self.check_same_columns({path: schema.names for path, schema in schemas.items()})
        self._check_durations(schemas)
        for path, uri in self.files.items():  # a damaged page is noticed only when it is read
            self.query(uri, f"SELECT count(COLUMNS(*)) FROM {parquet_scan([path], union=False)}")
        rounded = self._rounded() if len(schemas) > 1 else {}
        return [self._as_texts(at, path, rounded) for at, path in enumerate(self.files)]

    def _check_durations(self, schemas: Mapping[Path, pa.Schema]) -> None:
        """Warn of durations, which DuckDB reads as whole numbers; raise where these would be of several units."""
        import pyarrow as pa

        units: dict[str, str] = {}
        for path, schema in schemas.items():
            for column in schema:
                if (
                    pa.types.is_duration(column.type)
                    and units.setdefault(column.name, column.type.unit) != column.type.unit
                ):
                    raise BadInput(
                        f"source {self.source.name!r}: the duration {column.name!r} is in {units[column.name]} in some files and in "
                        f"{column.type.unit} in {self.files[path]}: write them alike."
                    )
        for name, unit in units.items():
            log.warning(
                "source %r: the duration %r is read as a whole number of %s", self.source.name, name, unit
            )

    def _rounded(self) -> dict[str, str]:
        """The columns that one file holds in numbers, and another in numbers that would round these.

        :raises BadInput: nobody has stated the type of one, or it is within a struct or a map, whose type nobody can state.
        """

        def types(paths: Sequence[Path]) -> dict[str, str]:
            found = self.query(
                self.first_uris(paths), f"DESCRIBE SELECT * FROM {parquet_scan(paths, union=True)}"
            )
            return {str(name): str(kind) for name, kind, *_ in found}

        rounded: dict[str, str] = {}
        together = types(list(self.files))
        for path, uri in self.files.items():
            for column, own in types([path]).items():
                kind, name = together[column], quote(column)
                if own == kind or column in rounded or not re.search(r"DOUBLE|FLOAT|DECIMAL", kind):
                    continue
                again = f"TRY_CAST(TRY_CAST({name} AS {kind}) AS {own})"
                ((count,),) = self.query(
                    uri,
                    f"SELECT count(*) FROM {parquet_scan([path], union=False)} WHERE {again} IS DISTINCT FROM {name}",
                )
                deep = kind.startswith(("STRUCT", "MAP"))
                state = "" if deep else "state its type in types, such as BIGINT or VARCHAR, or "
                if count and (deep or column not in self.source.types):
                    raise BadInput(
                        f"source {self.source.name!r}: column {column!r} is {own} in {uri} and {kind} in others, which would round "
                        f"{count} of its values: {state}write the files alike."
                    )
                if count:
                    rounded[column] = kind
        return rounded

    def _as_texts(self, at: int, path: Path, columns: Mapping[str, str]) -> Path:
        """A copy of a file with some columns as text, from which their stated type is made; the file itself if there are none."""
        if not columns:
            return path
        target = self.folder / f"{self.source.name}-{at}-texts.parquet"
        texts = (
            f"CASE WHEN TRY_CAST(TRY_CAST({c} AS DECIMAL(38,0)) AS DOUBLE) = TRY_CAST({c} AS DOUBLE) AND typeof({c}) IN ('DOUBLE', 'FLOAT') "
            f"THEN CAST(TRY_CAST({c} AS DECIMAL(38,0)) AS VARCHAR) ELSE CAST({c} AS VARCHAR) END AS {c}"
            if not kind.endswith("]")
            else f"CAST({c} AS VARCHAR[]) AS {c}"
            for c, kind in ((quote(column), kind) for column, kind in columns.items())
        )
        self.query(
            self.files[path],
            f"COPY (SELECT * REPLACE ({', '.join(texts)}) FROM {parquet_scan([path], union=False)}) TO {literal(target)} ({SCRATCH})",
        )
        return target


def check_schema(source: Source, where: str, schema: pa.Schema) -> None:
    """Raise for a column without a name, and for decimals of so many digits that DuckDB reads them as DOUBLE, which rounds them."""
    import pyarrow as pa

    def within(kind: pa.DataType) -> Iterator[pa.DataType]:
        yield kind
        for place in range(kind.num_fields):
            yield from within(kind.field(place).type)

    for number, column in enumerate(schema, 1):
        if not column.name:  # DuckDB would give it one
            raise BadInput(f"source {source.name!r}: {where} has no name for column {number}: name it.")
        for kind in within(column.type):
            if pa.types.is_decimal(kind) and kind.precision > _MOST_DIGITS:
                raise BadInput(
                    f"source {source.name!r}: {where} has the column {column.name!r} of {kind}, of which at most {_MOST_DIGITS} digits "
                    "can be read exactly: write it with fewer, or as text."
                )


def query(con: duckdb.DuckDBPyConnection, source: Source, what: str, sql: str) -> list[tuple[Any, ...]]:
    """Run a query that reads ``what`` of a source.

    :raises BadInput: it cannot be read.
    :raises BadConfiguration: DuckDB needs more memory.
    """
    import duckdb

    try:
        return con.execute(sql).fetchall()
    except duckdb.OutOfMemoryException as error:
        raise BadConfiguration(
            f"source {source.name!r}: {first_line(error)} Raise memory_limit_mb."
        ) from None
    except duckdb.Error as error:
        reason = sql_message(error)
        if "Error when sniffing" in reason:  # the rest of that message is a page of settings
            reason = f"no CSV in {source.encoding}; look for an unclosed quote, another delimiter or encoding"
        raise BadInput(f"source {source.name!r}: {what} cannot be read: {reason}") from None


def begin_of(column: str) -> str:
    """SQL of the begin of a value, as a text for a message."""
    return f"left(CAST({quote(column)} AS VARCHAR), 40)"


def check_no_doubles(source: Source, where: str, names: Sequence[str]) -> None:
    """Raise when two columns have the same name to SQL, which ignores case."""
    seen = set[str]()
    for name in names:
        if name.lower() in seen:
            raise BadInput(
                f"source {source.name!r}: {where} has the column {brief(name)} twice (case does not count in SQL): "
                "rename one of them."
            )
        seen.add(name.lower())


def parquet_scan(paths: Sequence[Path], *, union: bool) -> str:
    """SQL that reads Parquet files as one table; several are matched by the names of their columns."""
    return f"read_parquet({literal(paths)}, union_by_name={str(union or len(paths) > 1).lower()})"


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file that may be compressed, as its name says."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        import gzip

        return cast("IO[bytes]", gzip.open(path))
    if suffix == ".zst":
        import pyarrow as pa

        return cast("IO[bytes]", io.BufferedReader(pa.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file that may be compressed, some megabytes at a time, until one is empty."""
    suffix = path.suffix.lower()
    if suffix == ".bz2":
        import bz2

        yield from _members(path, bz2.BZ2Decompressor)
    elif suffix == ".xz":
        import lzma

        yield from _members(path, lzma.LZMADecompressor)
    else:
        with open_bytes(path) as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block


def _members(path: Path, new: Callable[[], Any]) -> Iterator[bytes]:
    """What archives one after the other hold, as pbzip2 writes them. Python's own files end without a word at one that is damaged."""
    with path.open("rb") as stream:
        member, raw = new(), stream.read(_BLOCK_BYTES)
        while raw or not member.eof:
            member = new() if member.eof else member
            if block := member.decompress(raw, _BLOCK_BYTES):
                yield block
            if member.eof:
                raw = member.unused_data.lstrip(b"\0")
                while not raw and (more := stream.read(_BLOCK_BYTES)):
                    raw = more.lstrip(b"\0")
            else:
                raw = stream.read(_BLOCK_BYTES) if member.needs_input else b""
                if member.needs_input and not raw:
                    raise EOFError("it ends before the end of its archive")


def read_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file that may be compressed, some megabytes at a time.

    :raises Unreadable: it is no archive of the kind that its name says, or is cut off; or is one that its name does not tell.
    """
    import lzma
    import zlib

    first, blocks = True, _blocks(path)
    while True:
        try:
            block = next(blocks, b"")
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if getattr(error, "errno", None):  # the disk's, not the archive's
                raise
            raise Unreadable(
                f"cannot be read: {first_line(error)}; it may still be being written, or is damaged."
            ) from None
        if not block:
            return
        for suffix, magic in _MAGIC.items():
            if first and block.startswith(magic):
                raise Unreadable(
                    f"is compressed within, as {suffix} files are: rename it so that its name says it."
                )
        yield block
        first = False
