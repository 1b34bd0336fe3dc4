"""Find the files of a source, and land those in JSON lines and Parquet as Parquet that DuckDB can query."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lepton_airflow.contract import digest_of, split_pin
from lepton_airflow.data.sources.spec import Source
from lepton_airflow.data.sources.text_types import TIMES_ONLY
from lepton_airflow.data.sql import SCRATCH, literal
from lepton_airflow.errors import BadConfiguration, BadInput, first_line
from lepton_airflow.store.files import Store, total_bytes

if TYPE_CHECKING:
    import duckdb

    from lepton_airflow.sdk.stage import RunInfo

_REALS = ("DOUBLE", "JSON", "DOUBLE[]")  # what DuckDB finds where numbers have a point, or stand beside texts
_NEAREST = ("DOUBLE", "FLOAT", "REAL", "FLOAT4", "FLOAT8", "BOOLEAN")  # types that lose nothing by it
_TEXTS = ("VARCHAR", "DATE", "TIME", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE", "UUID")
_REJECTED_AT_ONCE = 1000  # bad lines held in memory before they go into the table ``rejected``


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
    :ivar unreadable: how many lines were no row.
    :ivar texts: the columns that are landed as text, and the types that each may have, the narrowest first.
    """

    con: duckdb.DuckDBPyConnection
    source: Source
    files: Mapping[Path, str]
    folder: Path
    texts: dict[str, Sequence[str]] = field(default_factory=dict)
    unreadable: int = 0

    @abstractmethod
    def land(self) -> list[Path]:
        """Write the rows as Parquet, and those that cannot be read into DuckDB's table ``rejected``."""

    def reject(self, wrong: Mapping[str, tuple[str, str]]) -> bool:
        """Write the rows with a value that does not fit into ``rejected``, with file and line.

        :param wrong: by column, the SQL condition under which its value does not fit, and what to say of it.
        :return: whether it did; where a format has no lines, nothing is written.
        """
        return False

    def warn_of(self, texts: Sequence[str], scan: str) -> None:  # noqa: B027 - most formats have nothing to warn of
        """Warn of columns that look as if they should hold something else than text."""

    def query(self, what: str, sql: str) -> list[tuple[Any, ...]]:
        """Run a query that reads ``what``; raises BadInput if that cannot be read."""
        return query(self.con, self.source, what, sql)

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
                difference = [f"lacks {', '.join(lacking)}"] * bool(lacking)
                difference += [f"also has {', '.join(more)}"] * bool(more)
                raise BadInput(
                    f"source {self.source.name!r}: {self.files[path]} {' and '.join(difference)}, compared with "
                    f"{self.files[first]}: files of one source have the same columns; set union=true to read absent ones "
                    "as missing values."
                )


class JsonLines(Reader):
    """One JSON object a line."""

    def land(self) -> list[Path]:
        paths = [self._without_bad_lines(path, uri) for path, uri in self.files.items()]
        types = self._types(paths)
        stated = self.source.types
        exact = {c for c, kind in stated.items() if kind.upper().removesuffix("[]") not in _NEAREST}
        if numbers := [
            c for c, k in types.items() if (k in _REALS and c in exact) or (k == "JSON" and c not in stated)
        ]:
            paths = [self._with_texts(path, numbers) for path in paths]
        for column, kind in types.items():
            if kind == "JSON" and column not in stated:  # numbers beside texts
                types[column], self.texts[column] = "VARCHAR", ()
            elif kind == "DOUBLE[]" and column in exact:
                types[column] = "VARCHAR[]"
            elif column in stated and not kind.endswith((")", "]")):  # other nested values have no text
                types[column] = "VARCHAR"
            elif kind == "DOUBLE":  # whole numbers that no DOUBLE holds may be among them
                types[column], self.texts[column] = "VARCHAR", ("DOUBLE",)
            elif kind in _TEXTS:
                types[column], self.texts[column] = "VARCHAR", TIMES_ONLY
        target = self.folder / f"{self.source.name}.parquet"
        self.query(
            self.first_uris(list(self.files)),
            f"COPY (FROM read_ndjson({literal(paths)}, records=true, columns={literal(types)})) TO {literal(target)} ({SCRATCH})",
        )
        return [target]

    def _scratch(self, path: Path, what: str) -> Path:
        """A file of this one file's own: others may have its name in other folders."""
        return self.folder / f"{self.source.name}-{digest_of(str(path))[:16]}-{what}.jsonl"

    def _types(self, paths: Sequence[Path]) -> dict[str, str]:
        """What DuckDB finds in each field; it looks at every row, so that this does not depend on where a field first appears."""
        found = self.query(
            self.first_uris(list(self.files)),
            f"DESCRIBE FROM read_ndjson({literal(paths)}, records=true, sample_size=-1, maximum_sample_files=1000000, "
            "map_inference_threshold=-1, field_appearance_threshold=0)",
        )
        names = [str(name) for name, *_ in found]
        # DuckDB gives keys that differ by case alone a number, and would then look for keys of these names.
        if any(re.fullmatch(rf"(?i){re.escape(one)}_\d+", other) for one in names for other in names):
            keys = self.query(
                self.first_uris(list(self.files)),
                f"SELECT DISTINCT unnest(json_keys(json)) FROM read_ndjson_objects({literal(paths)}) ORDER BY 1",
            )
            check_no_doubles(self.source, self.first_uris(list(self.files)), [str(key) for (key,) in keys])
        # Parquet holds a HUGEINT as a DOUBLE, which rounds it.
        return {str(name): re.sub(r"\bU?HUGEINT\b", "VARCHAR", str(kind)) for name, kind, *_ in found}

    def _with_texts(self, path: Path, columns: Sequence[str]) -> Path:
        """A copy in which the numbers of some fields are texts: DuckDB reads a number with a point as a DOUBLE, which rounds it."""
        target = self._scratch(path, "texts")
        with open_bytes(path) as lines, target.open("w") as out:
            for line in lines:
                if line.strip():
                    try:
                        row = json.loads(line, parse_float=_Written)
                    except ValueError:  # a number of thousands of digits: DuckDB says what it makes of it
                        out.write(line.decode(errors="replace"))
                        continue
                    row |= {c: _as_text(row[c]) for c in columns if c in row}
                    out.write(json.dumps(row) + "\n")
        return target

    def _without_bad_lines(self, path: Path, uri: str) -> Path:
        """The file itself, or a copy without the lines that are no JSON object, which become rejected rows."""
        ((bad,),) = self.query(
            uri,
            "SELECT count(*) FILTER (json IS NULL OR json_type(json) <> 'OBJECT') FROM "
            f"read_ndjson_objects({literal(path)}, ignore_errors=true)",
        )
        if not bad:
            return path
        target = self._scratch(path, "good")
        good, rejected = 0, list[list[Any]]()
        with open_bytes(path) as lines, target.open("wb") as out:
            for number, line in enumerate(lines, 1):
                error = _json_error(line)
                if error is None:
                    good += bool(line.strip())
                    out.write(line)
                else:
                    raw = line.decode(errors="replace").rstrip("\r\n")
                    rejected.append([self.source.name, uri, number, None, error, raw])
                if len(rejected) >= _REJECTED_AT_ONCE:
                    self._reject(rejected)
        self._reject(rejected)
        if not good:
            raise BadInput(
                f"source {self.source.name!r}: {uri} has no line that is a JSON object; expected JSON lines, "
                "one object a line (a single JSON array is not)."
            )
        return target

    def _reject(self, lines: list[list[Any]]) -> None:
        if lines:
            self.unreadable += len(lines)
            self.con.executemany("INSERT INTO rejected VALUES ($1, $2, $3, $4, $5, $6)", lines)
            lines.clear()


class _Written(float):
    """A number that remembers how it was written."""

    text: str

    def __new__(cls, text: str) -> Self:
        self = super().__new__(cls, text)
        self.text = text
        return self


def _as_text(value: Any) -> Any:
    """A value of JSON with the numbers in it as texts, as they were written."""
    if isinstance(value, _Written):
        return value.text
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return value


class ParquetFiles(Reader):
    """Parquet, which needs no copy."""

    def land(self) -> list[Path]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names: dict[Path, list[str]] = {}
        for path, uri in self.files.items():
            try:
                names[path] = list(pq.read_schema(path).names)
            except (pa.ArrowException, OSError) as error:
                raise BadInput(
                    f"source {self.source.name!r}: {uri} is not a whole Parquet file ({first_line(error)}): "
                    "it may still be being written, or is damaged; bring it again."
                ) from None
            check_no_doubles(self.source, uri, names[path])
        self.check_same_columns(names)
        for path, uri in self.files.items():  # a damaged page is noticed only when it is read
            self.query(uri, f"SELECT count(COLUMNS(*)) FROM {parquet_scan([path], union=False)}")
        return list(self.files)


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
        reason = first_line(error)
        if "Error when sniffing" in reason:  # the rest of that message is a page of settings
            reason = f"no CSV in {source.encoding}; look for an unclosed quote, another delimiter or encoding"
        raise BadInput(f"source {source.name!r}: {what} cannot be read: {reason}") from None


def check_no_doubles(source: Source, where: str, names: Sequence[str]) -> None:
    """Raise when two columns have the same name to SQL, which ignores case."""
    seen = set[str]()
    for name in names:
        if name.lower() in seen:
            raise BadInput(
                f"source {source.name!r}: {where} has the column {name!r} twice (case does not count in SQL): "
                "rename one of them."
            )
        seen.add(name.lower())


def parquet_scan(paths: Sequence[Path], *, union: bool) -> str:
    """SQL that reads Parquet files as one table; several are matched by the names of their columns."""
    return f"read_parquet({literal(paths)}, union_by_name={str(union or len(paths) > 1).lower()})"


def open_bytes(path: Path) -> Any:
    """Open a file that may be compressed, as its name says."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        import gzip

        return gzip.open(path, "rb")
    if suffix == ".zst":
        import io

        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _json_error(line: bytes) -> str | None:
    """Why a line is not one JSON object; None: it is, or is blank."""
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except (
        ValueError,
        RecursionError,
    ) as error:  # broken JSON, bytes that are no UTF-8, or no end of brackets
        return f"JSON: {error}"
    return None if isinstance(value, dict) else f"JSON: a {type(value).__name__}, expected an object"
