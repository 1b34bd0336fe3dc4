"""Land CSV and TSV files as Parquet: read the header, find the types of the columns, set lines apart that do not fit."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lepton_airflow.data.sources.files import Reader, check_no_doubles, open_bytes, parquet_scan
from lepton_airflow.data.sources.text_types import ALL_KINDS
from lepton_airflow.data.sql import SCRATCH, literal, quote
from lepton_airflow.errors import BadInput, did_you_mean

log = logging.getLogger(__name__)

# Texts that people write for "no value".
_MISSING = "'na', 'n/a', '#n/a', 'nan', 'nil', 'none', 'null', 'missing', 'unknown', '?', '.', '-', '--'"
_FIRST_ROWS = 20_000  # in these, most columns of text show that they hold no numbers
_RECORDS_AT_ONCE = 1000  # held in memory before they are written
_RAW_CHARACTERS = 65_536  # of a rejected record that are kept

_Header = tuple[str, ...]


class CsvFiles(Reader):
    """Delimited text with a header line."""

    def land(self) -> list[Path]:
        self._by_header: dict[_Header, list[Path]] = {}
        for path, uri in self.files.items():
            self._by_header.setdefault(self._header(path, uri), []).append(path)
        self.check_same_columns({paths[0]: names for names, paths in self._by_header.items()})
        self.texts = {name: ALL_KINDS for names in self._by_header for name in names}
        return [self._copy(number, *group) for number, group in enumerate(self._by_header.items())]

    def _options(self, path: Path) -> str:
        source = self.source
        delimiter = source.delimiter or ("\t" if source.file_format(path.name) == "tsv" else ",")
        return (
            f"delim={literal(delimiter)}, quote='\"', escape='\"', encoding={literal(source.encoding)}, "
            f"nullstr={literal(['', *source.null_values])}, buffer_size=8388608"
        )

    def _scan(self, names: _Header, paths: Sequence[Path], more: str) -> str:
        """SQL that reads files with this header, every column as text."""
        return (
            f"read_csv({literal(paths)}, {self._options(paths[0])}, header=true, auto_detect=false, "
            f"columns={literal(dict.fromkeys(names, 'VARCHAR'))}, {more})"
        )

    def _header(self, path: Path, uri: str) -> _Header:
        """The names of the columns as the file has them; DuckDB would rename doubles without a word."""
        source = self.source
        self._check_first_line(path, uri)
        lines = self.query(
            uri,
            f"SELECT * FROM read_csv({literal(path)}, {self._options(path)}, header=false, "
            "all_varchar=true, null_padding=true, ignore_errors=true, parallel=false) LIMIT 1",
        )
        if not lines:
            raise BadInput(
                f"source {source.name!r}: {uri} has no header line that can be read as {source.encoding}."
            )
        header = list(lines[0])
        while header and header[-1] is None:  # DuckDB pads the header if a later line is longer
            header.pop()
        for position, name in enumerate(header, 1):
            if name is None:
                raise BadInput(
                    f"source {source.name!r}: column {position} of {uri} has no name in the header line."
                )
        check_no_doubles(source, uri, header)
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

    def _check_first_line(self, path: Path, uri: str) -> None:
        """Raise unless a file begins with a line that can be read: DuckDB would take the first that can for the header."""
        encoding = self.source.encoding
        first = b""
        # What is no archive is named when it is read.
        with suppress(OSError, EOFError), open_bytes(path) as stream:
            first = stream.readline(_RAW_CHARACTERS)
        try:
            if not encoding.lower().startswith("utf-16"):  # in which a line end is no byte
                first.decode(encoding)
        except UnicodeError:
            raise BadInput(
                f"source {self.source.name!r}: {uri} has no header line that can be read as {encoding}: set its encoding, "
                "such as latin-1."
            ) from None
        except LookupError:  # an encoding that DuckDB knows by another name, or refuses
            pass
        if first in (b"\n", b"\r\n", b"\r"):
            raise BadInput(
                f"source {self.source.name!r}: {uri} begins with a blank line: expected the header; take the line away."
            )

    def _copy(self, number: int, names: _Header, paths: Sequence[Path]) -> Path:
        """Write the text of files with equal headers as Parquet, and lines that are no such row into ``rejected``."""
        target = self.folder / f"{self.source.name}-{number}.parquet"
        rejects = (
            "store_rejects=true, rejects_table='csv_errors', rejects_scan='csv_scans', "
            f"rejects_line_size_limit={_RAW_CHARACTERS}"
        )
        self.query(
            self.first_uris(paths),
            f"COPY (FROM {self._scan(names, paths, rejects)}) TO {literal(target)} ({SCRATCH})",
        )
        self.con.execute(
            "CREATE TEMP TABLE IF NOT EXISTS csv_rejects (source TEXT, path TEXT, line BIGINT, first_byte BIGINT, "
            '"column" TEXT, error TEXT, raw TEXT)'
        )
        # Where lines end with CR and LF, DuckDB's record begins with the LF of the line before, and with blank lines.
        record = "ltrim(csv_line, chr(13) || chr(10))"
        self.con.execute(
            f"INSERT INTO csv_rejects SELECT $1, file_path, line, line_byte_position - 1 + length(csv_line) - length({record}), "
            f"column_name, error_type || ': ' || error_message, {record} FROM csv_errors JOIN csv_scans USING (scan_id, file_id)",
            [self.source.name],
        )
        self.con.execute("DROP TABLE csv_errors; DROP TABLE csv_scans")
        for path in paths:
            self._write_rejects(path)
        return target

    def _write_rejects(self, path: Path) -> None:
        """Put the lines of a file that are no row into ``rejected``. DuckDB counts records; a quoted value may hold line ends."""
        of_file = [self.source.name, str(path)]
        ((found,),) = self.con.execute(
            "SELECT count(DISTINCT coalesce(first_byte, -line)) FROM csv_rejects WHERE source = $1 AND path = $2",
            of_file,
        ).fetchall()
        self.unreadable += found
        if found:
            self.con.execute(
                'INSERT INTO rejected SELECT source, $3, records.line, "column", error, csv_rejects.raw '
                f"FROM csv_rejects LEFT JOIN {parquet_scan([self._records(path)], union=False)} records "
                "USING (first_byte) "
                "WHERE source = $1 AND path = $2",
                [*of_file, self.files[path]],
            )

    def reject(self, wrong: Mapping[str, tuple[str, str]]) -> bool:
        for names, paths in self._by_header.items():
            conditions = {column: sql for column, (sql, _) in wrong.items() if column in names}
            for path in paths if conditions else ():
                self._write_misfits(path, names, conditions, {c: reason for c, (_, reason) in wrong.items()})
        return True

    def _write_misfits(
        self, path: Path, names: _Header, conditions: Mapping[str, str], reasons: Mapping[str, str]
    ) -> None:
        """Put the rows of a file with values that do not fit into ``rejected``."""
        uri, found = self.files[path], self.folder / "misfits.parquet"
        # One thread, so that rows are numbered in the order of the file; and all columns, since a value that no query asks for
        # is not found to be no text either, and its line would be counted.
        scan = self._scan(names, [path], "ignore_errors=true, parallel=false")
        number = _unused("number", names)
        cases = ", ".join(f"CASE WHEN {sql} THEN {literal(c)} END" for c, sql in conditions.items())
        self.query(
            uri,
            f"COPY (FROM (SELECT {number} AS number, list_filter([{cases}], lambda x: x IS NOT NULL) AS columns, "
            f"hash({', '.join(map(quote, names))}) AS every FROM (SELECT row_number() OVER () AS {number}, * FROM {scan})) "
            f"WHERE len(columns) > 0) TO {literal(found)} ({SCRATCH})",
        )
        ((rows, *_),) = self.query(uri, f"SELECT count(*), count(COLUMNS(*)) FROM {scan}")
        records = (
            "(SELECT row_number() OVER (ORDER BY first_byte) AS number, line, raw "
            f"FROM {parquet_scan([self._records(path)], union=False)} records "
            f"WHERE NOT header AND (raw <> '' OR {len(names) == 1}) AND first_byte NOT IN (SELECT first_byte FROM csv_rejects "
            f"WHERE source = {literal(self.source.name)} AND path = {literal(path)} AND first_byte IS NOT NULL))"
        )
        ((counted,),) = self.con.execute(f"SELECT count(*) FROM {records}").fetchall()
        # Where our records differ from DuckDB's, as they may beside stray quotes, no line is better than a wrong one.
        join = (
            f"LEFT JOIN {records} USING (number)"
            if counted == rows
            else "CROSS JOIN (SELECT NULL AS line, NULL AS raw)"
        )
        for column, reason in reasons.items():
            self.con.execute(
                f"INSERT INTO rejected SELECT $1, $2, line, $3, $4, raw FROM {parquet_scan([found], union=False)} {join} "
                "WHERE list_contains(columns, $3)",
                [self.source.name, uri, column, reason],
            )

    def _records(self, path: Path) -> Path:
        """A table of a file's records: the byte at which each begins, its line and its text."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            {"first_byte": pa.int64(), "line": pa.int64(), "header": pa.bool_(), "raw": pa.string()}
        )
        target, waiting = self.folder / "records.parquet", list[tuple[Any, ...]]()
        with pq.ParquetWriter(target, schema) as writer:

            def write() -> None:
                writer.write_batch(pa.record_batch([*map(list, zip(*waiting, strict=True))], schema=schema))
                waiting.clear()

            with suppress(UnicodeError):  # UTF-16 without a byte order mark: DuckDB reads it, Python does not
                for record in _each_record(path, self.source.encoding):
                    waiting.append(record)
                    if len(waiting) == _RECORDS_AT_ONCE:
                        write()
            if waiting:
                write()
        return target

    def warn_of(self, texts: Sequence[str], scan: str) -> None:
        # The first rows rule most columns out; only the others are read whole.
        for table in (f"(FROM {scan} LIMIT {_FIRST_ROWS})", scan):
            looked = self._look(texts, table) if texts else {}
            texts = [column for column, (_, others, _) in looked.items() if not others]
        for column in texts:
            numbers, _, missing = looked[column]
            if numbers and missing:
                log.warning(
                    "source %r: column %r is text because of %s among %d numbers: pass null_values=%s to read them as "
                    "missing, or types={%r: 'VARCHAR'} to keep the text.",
                    self.source.name, column, ", ".join(map(repr, sorted(missing))), numbers, sorted(missing), column,
                )  # fmt: skip

    def _look(self, columns: Sequence[str], table: str) -> dict[str, tuple[int, int, list[str]]]:
        """For each column: how many numbers, how many values that are neither number nor missing, the texts for missing."""
        parts = []
        for name in map(quote, columns):
            number = f"TRY_CAST({name} AS DOUBLE) IS NOT NULL"
            missing = f"lower(trim({name})) IN ({_MISSING})"
            parts += [
                f"count(*) FILTER ({number})",
                f"count(*) FILTER ({name} IS NOT NULL AND NOT ({number}) AND NOT ({missing}))",
                f"list(DISTINCT {name}) FILTER (NOT ({number}) AND {missing})",
            ]
        (row,) = self.con.execute(f"SELECT {', '.join(parts)} FROM {table}").fetchall()
        return {c: (row[3 * i], row[3 * i + 1], row[3 * i + 2] or []) for i, c in enumerate(columns)}


def _unused(name: str, names: Sequence[str]) -> str:
    """A name that no column has."""
    taken = {n.lower() for n in names}
    while name in taken:
        name += "_"
    return name


def _each_record(path: Path, encoding: str) -> Iterator[tuple[int, int, bool, str]]:
    """The byte at which each record of a CSV file begins, its line, whether it is the header, and its text."""
    with (
        open_bytes(path) as stream,
        io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline="") as lines,
    ):
        at = position = 0
        begin, parts, within, header = 1, list[bytes](), False, True
        for number, text in enumerate(lines, 1):
            # DuckDB counts the bytes of UTF-8, whatever the file's encoding.
            line = text.encode(errors="surrogateescape")
            parts.append(line)
            position += len(line)
            within ^= bool(line.count(b'"') % 2)
            if within:  # a quoted value goes on in the next line
                continue
            record = b"".join(parts).rstrip(b"\r\n").decode(errors="replace")
            yield at, begin, header, record[:_RAW_CHARACTERS]
            at, begin, header, parts = position, number + 1, False, []
