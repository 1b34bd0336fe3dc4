"""Land CSV and TSV files as Parquet of texts; lines that are no row are set apart."""

from __future__ import annotations

import io
import logging
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lepton_airflow.data.sources.csv_text import CsvText
from lepton_airflow.data.sources.files import Reader, Rejected, check_no_doubles, unused
from lepton_airflow.data.sources.text_types import ALL_KINDS, COLUMNS_AT_ONCE
from lepton_airflow.data.sql import quote
from lepton_airflow.errors import BadInput, brief, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

# Texts that people write for "no value".
_MISSING = "'na', 'n/a', '#n/a', 'nan', 'nil', 'none', 'null', 'missing', 'unknown', '?', '.', '-', '--'"
_FIRST_ROWS = 20_000  # in these, most columns of text show that they hold no numbers
_PARSED_BYTES = 4 << 20  # of rows that are parsed at once and become a row group
# A date or a number, in the header of a file: but for years, and for numbers of hours and days, which are names of columns, too.
_VALUE = re.compile(
    r"\s*(\d{1,4}([-./])\d{1,2}\2\d{1,4}([ T].*)?|[-+]?(?!([12]?\d?\d|3[0-6]\d|(1[89]|20)\d\d)\s*$)\d[\d.,]*)\s*"
)
_FIRST_PIECES = 20  # below the header, which show whether it is one

_Header = tuple[str, ...]


class CsvFiles(Reader):
    """Delimited text with a header line."""

    def land(self) -> list[Path]:
        self._texts: dict[Path, CsvText] = {}
        by_header: dict[_Header, list[Path]] = {}
        for path, uri in self.files.items():
            by_header.setdefault(self._header(path, uri), []).append(path)
        self.check_same_columns({paths[0]: names for names, paths in by_header.items()})
        self.texts = {name: ALL_KINDS for names in by_header for name in names}
        self.place = (unused("file", self.texts), unused("row", self.texts))
        return [self._copy(number, *group) for number, group in enumerate(by_header.items())]

    def records(self, path: Path) -> Iterator[tuple[int, int, bytes]]:
        for number, (line, raw) in enumerate(self._texts[path].records(), 1):
            yield number, line, raw

    def _header(self, path: Path, uri: str) -> _Header:
        """The names of the columns; raises when the first line is none, or does not belong to the lines below."""
        source, delimiter = self.source, self.source.delimiter
        if delimiter is None and source.file_format(path.name) == "tsv":
            delimiter = "\t"
        with self.reading(path):
            text = CsvText(path, source.encoding, delimiter, source.quote, int(source.skip_lines))
        self._texts[path], header = text, text.names
        if "" in header:
            raise BadInput(
                f"source {source.name!r}: column {header.index('') + 1} of {uri} has no name in the header line."
            )
        check_no_doubles(source, uri, header)
        if text.skip_lines and (value := next(filter(_VALUE.fullmatch, header), None)):
            log.warning(
                "source %r: the header of %s, in line %d, has %s, which looks like a value: if no line stands above the file's "
                "header, skip_lines=%d has skipped the header and made names of the first row.",
                source.name, uri, text.header_line, brief(value), text.skip_lines,
            )  # fmt: skip
        if len(header) == 1 and (other := next((d for d in ",;\t|" if d in header[0]), None)):
            raise BadInput(
                f"source {source.name!r}: {uri} has the one column {header[0][:40]!r}, which looks separated by {other!r}: "
                f"set delimiter={other!r}."
            )
        with self.reading(path):
            pieces = list(islice(text.pieces(), _FIRST_PIECES))
        errors = [
            piece.error for piece in pieces if piece.raw.strip(b"\r\n")
        ]  # blank lines are rows of one column
        if len(errors) > 1 and errors[0].startswith("CELLS") and len(set(errors)) == 1:
            raise BadInput(
                f"source {source.name!r}: {uri} begins with {header[0][:40]!r} in line {text.header_line}, and the lines below have "
                f"other cells ({errors[0]}): set skip_lines to the number of lines above the header, or another delimiter."
            )
        for column in source.types:
            if column not in header and not source.union:
                raise BadInput(
                    f"source {source.name!r}: types names column {column!r}, not in {uri}; {did_you_mean(column, header)}"
                )
        return tuple(header)

    def _copy(self, number: int, names: _Header, paths: Sequence[Path]) -> Path:
        """Write the text of files with equal headers as Parquet, and lines that are no such row into ``rejected``."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        target = self.folder / f"{self.source.name}-{number}.parquet"
        schema = pa.schema(
            [
                *((name, pa.string()) for name in names),
                (self.place[0], pa.int32()),
                (self.place[1], pa.int64()),
            ]
        )
        rejected = Rejected(self.con, self.source.name)
        # Read twice and deleted: dictionaries and statistics would cost more than to read without them.
        with pq.ParquetWriter(target, schema, use_dictionary=False, write_statistics=False) as writer:
            for path in paths:
                text, at, rows = self._texts[path], list(self.files).index(path), 0
                for table in self._tables(text, names, rejected):
                    ones = pa.repeat(pa.scalar(1, pa.int64()), table.num_rows)
                    numbers = pc.cumulative_sum(ones, start=rows)
                    files = pa.repeat(pa.scalar(at, pa.int32()), table.num_rows)
                    rows += table.num_rows
                    writer.write_table(pa.table([*table.columns, files, numbers], schema=schema))
                    self.check_stop()
                if text.controls:
                    log.warning(
                        "source %r: %s has control characters of latin-1 where Windows-1252 has letters and quotes: if "
                        "these are wanted, set encoding='cp1252'.", self.source.name, self.files[path],
                    )  # fmt: skip
        rejected.flush()
        return target

    def _tables(self, text: CsvText, names: _Header, rejected: Rejected) -> Iterator[pa.Table]:
        """The rows of a file, all of its columns as text; what is no row is rejected."""
        waiting, size = list[bytes](), 0
        with self.reading(text.path):
            for piece in text.pieces():
                if piece.error:
                    rejected.add(self.files[text.path], piece.line, piece.error, piece.raw)
                    self.unreadable += 1
                    continue
                waiting.append(piece.rows)
                size += len(piece.rows)
                if size >= _PARSED_BYTES:
                    yield self._parsed(waiting, text, names)
                    waiting, size = [], 0
        if waiting:
            yield self._parsed(waiting, text, names)

    def _parsed(self, rows: Iterable[bytes], text: CsvText, names: _Header) -> pa.Table:
        import pyarrow as pa
        from pyarrow import csv

        data = b"".join(rows)
        if data.startswith(BOM_UTF8):  # a character of the first cell, which PyArrow would take away
            data = BOM_UTF8 + data
        delimiter, quote_char = text.dialect
        return csv.read_csv(
            io.BytesIO(data),
            csv.ReadOptions(column_names=names, block_size=len(data) + 1, use_threads=False),
            csv.ParseOptions(
                delimiter=delimiter,
                quote_char=quote_char or False,
                newlines_in_values=True,
                ignore_empty_lines=len(names) > 1,
            ),
            csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                null_values=["", *self.source.null_values],
                strings_can_be_null=True,
            ),
        )

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
        looked: dict[str, tuple[int, int, list[str]]] = {}
        for first in range(0, len(columns), COLUMNS_AT_ONCE):
            some, parts = columns[first : first + COLUMNS_AT_ONCE], []
            for name in map(quote, some):
                number = f"TRY_CAST({name} AS DOUBLE) IS NOT NULL"
                missing = f"lower(trim({name})) IN ({_MISSING})"
                parts += [
                    f"count(*) FILTER ({number})",
                    f"count(*) FILTER ({name} IS NOT NULL AND NOT ({number}) AND NOT ({missing}))",
                    f"list(DISTINCT {name}) FILTER (NOT ({number}) AND {missing})",
                ]
            (row,) = self.con.execute(f"SELECT {', '.join(parts)} FROM {table}").fetchall()
            looked |= {c: (row[3 * i], row[3 * i + 1], row[3 * i + 2] or []) for i, c in enumerate(some)}
        return looked
