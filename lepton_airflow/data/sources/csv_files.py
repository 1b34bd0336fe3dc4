"""Land CSV and TSV files as Parquet: read the header, find the types of the columns, set lines apart that do not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from lepton_airflow.data.sources.files import Reader, check_no_doubles, parquet_scan
from lepton_airflow.data.sql import SCRATCH, literal, quote
from lepton_airflow.errors import BadInput, did_you_mean

log = logging.getLogger(__name__)

# Texts that people write for "no value".
_MISSING = "'na', 'n/a', '#n/a', 'nan', 'nil', 'none', 'null', 'missing', 'unknown', '?', '.', '-', '--'"
_FIRST_ROWS = 20_000  # in these, most columns of text show that they hold no numbers
_SNIFFED = ["NULL", "BOOLEAN", "BIGINT", "DOUBLE", "DATE", "TIMESTAMP", "TIMESTAMPTZ", "VARCHAR"]

_Header = tuple[str, ...]


class CsvFiles(Reader):
    """Delimited text with a header line."""

    applies_types: ClassVar[bool] = True

    def land(self) -> list[Path]:
        by_header: dict[_Header, list[Path]] = {}
        for path, uri in self.files.items():
            by_header.setdefault(self._header(path, uri), []).append(path)
        self.check_same_columns({paths[0]: names for names, paths in by_header.items()})
        types = self._types(by_header)
        landed = [
            self._copy(number, names, paths, types) for number, (names, paths) in enumerate(by_header.items())
        ]
        guessed = [n for n, kind in types.items() if kind == "VARCHAR" and n not in self.source.types]
        self._warn_of_numbers(guessed, landed)
        return landed

    def _options(self, path: Path) -> str:
        source = self.source
        delimiter = source.delimiter or ("\t" if source.file_format(path.name) == "tsv" else ",")
        return (
            f"delim={literal(delimiter)}, quote='\"', escape='\"', encoding={literal(source.encoding)}, "
            f"dateformat={literal(source.date_format)}, nullstr={literal(['', *source.null_values])}, "
            "buffer_size=8388608"
        )

    def _header(self, path: Path, uri: str) -> _Header:
        """The names of the columns as the file has them; DuckDB would rename doubles without a word."""
        source = self.source
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

    def _types(self, by_header: Mapping[_Header, Sequence[Path]]) -> dict[str, str]:
        """The type of each column: as stated, else one that all values of all files fit."""
        types: dict[str, str] = {}
        for names, paths in by_header.items():
            if not set(names) <= set(self.source.types):
                for path in paths:
                    for name, kind in self._sniffed(names, path).items():
                        types[name] = _common(types.get(name, kind), kind)
        return types | dict(self.source.types)

    def _sniffed(self, names: _Header, path: Path) -> dict[str, str]:
        """The types of one file's columns, from all of its rows."""
        stated = {n: t for n, t in self.source.types.items() if n in names}
        ((columns, odd_timestamps),) = self.query(
            self.files[path],
            f"SELECT Columns, TimestampFormat FROM sniff_csv({literal(path)}, {self._options(path)}, "
            "header=true, sample_size=-1, ignore_errors=true, "
            f"auto_type_candidates={literal(_SNIFFED)}{', types=' + literal(stated) if stated else ''})",
        )
        kinds = [column["type"] for column in columns]
        if odd_timestamps:
            # A timestamp in a guessed format could be read day-first one month and month-first the next.
            kinds = ["VARCHAR" if kind.startswith("TIMESTAMP") else kind for kind in kinds]
        return dict(zip(names, kinds, strict=True))

    def _copy(self, number: int, names: _Header, paths: Sequence[Path], types: Mapping[str, str]) -> Path:
        """Write files with equal headers as Parquet, and rows that do not fit the types into ``rejected``."""
        target = self.folder / f"{self.source.name}-{number}.parquet"
        self.query(
            self.first_uris(paths),
            f"COPY (SELECT * FROM read_csv({literal(paths)}, {self._options(paths[0])}, header=true, auto_detect=false, "
            f"columns={literal({n: types[n] for n in names})}, store_rejects=true, rejects_table='csv_errors', "
            f"rejects_scan='csv_scans', rejects_line_size_limit=65536)) TO {literal(target)} ({SCRATCH})",
        )
        self.con.execute(
            "INSERT INTO rejected SELECT $1, file_path, line, column_name, error_type || ': ' || error_message, csv_line "
            "FROM csv_errors JOIN csv_scans USING (scan_id, file_id)",
            [self.source.name],
        )
        self.con.execute("DROP TABLE csv_errors; DROP TABLE csv_scans")
        for path in paths:
            self.con.execute("UPDATE rejected SET file = $1 WHERE file = $2", [self.files[path], str(path)])
        return target

    def _warn_of_numbers(self, texts: Sequence[str], landed: Sequence[Path]) -> None:
        """Warn of columns that would hold numbers but for a few texts that mean "no value"."""
        scan = parquet_scan(landed, union=True)
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


def _common(one: str, other: str) -> str:
    """A type that the values of both types fit."""
    if one == other:
        return one
    for pair, both in ((("BIGINT", "DOUBLE"), "DOUBLE"), (("DATE", "TIMESTAMP"), "TIMESTAMP")):
        if {one, other} == set(pair):
            return both
    return "VARCHAR"
