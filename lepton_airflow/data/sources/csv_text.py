"""Split delimited text into rows: each record is read exactly, or set apart with its line and the reason.

The grammar is RFC 4180's and what others write beside it: LF, CR LF or CR ends a line; spaces around quotes are layout; empty cells beyond
the header's count for nothing; a quote in a cell that does not begin with one is a character as any other. One regular expression finds
whole runs of regular records, so that only the others are taken apart in Python.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lepton_airflow.data.sources.files import Unreadable, read_blocks

_LONGEST_BYTES = 16 << 20  # of a record: a quote that is still open after them was not meant to quote
_SEP = re.compile(rb'"?sep=([^\r\n])"?(?:\r\n|\n|\r)')  # Excel's own first line
_CONTROLS = re.compile(rb"[\x80-\x9f]")
# A byte order mark, the encoding to state for it, and the begins of the names of encodings of which it may be the mark.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8", ("utf-8",)),
    (codecs.BOM_UTF16_LE, "utf-16", ("utf-16-le", "utf-32")),
    (codecs.BOM_UTF16_BE, "utf-16", ("utf-16-be",)),
)
# Stands for bytes that are no text in a file's encoding; as it is no UTF-8 either, its row is found with those of bad UTF-8.
_NO_TEXT = "\udcff"
codecs.register_error("lepton-no-text", lambda error: (_NO_TEXT, error.end))  # type: ignore[attr-defined]


class Piece(NamedTuple):
    """A part of a file.

    :ivar line: the first of its lines, counted from 1.
    :ivar raw: what stands there, in UTF-8.
    :ivar rows: the same for a parser of the file's ``dialect``: ``raw`` itself, where all records are regular.
    :ivar error: why it is no row.
    """

    line: int
    raw: bytes
    rows: bytes = b""
    error: str = ""


@dataclass
class CsvText:
    """One file of delimited text.

    :ivar delimiter: None: a comma, or what Excel's line ``sep=;`` says.
    :ivar quote: empty, where no character quotes.
    :ivar skip_lines: how many lines stand above the header.
    :ivar names: the header's cells, but for empty ones at its end.
    :ivar dialect: delimiter and quote of the rows of the pieces.
    :ivar controls: whether a file in latin-1 has control characters where Windows-1252 has letters.
    """

    path: Path
    encoding: str
    delimiter: str | None
    quote: str
    skip_lines: int
    controls: bool = False

    def __post_init__(self) -> None:
        head, blocks = b"", self._blocks()
        while (found := self._find_header(head)) is None and len(head) < _LONGEST_BYTES:
            head += (block := next(blocks, b""))
            if not block:
                found = self._find_header(head + b"\n")
                break
        if found is None:
            raise Unreadable(
                f"has no header line that can be read as {self.encoding} in line {self.skip_lines + 1}."
            )
        self.header_line, record, self._body_byte = found
        self._body_line = self.header_line + record.count(self._newline)
        self.names = self._names(record)
        self._grammar(len(self.names))

    def pieces(self) -> Iterator[Piece]:
        """What stands below the header, in its order; records that are no row one by one."""
        blocks, buffer, ended = self._blocks(), b"", False
        at, line = self._body_byte, self._body_line
        while True:
            end = self._rows.match(buffer, at).end() if at < len(buffer) else at  # type: ignore[union-attr]
            if end > at:
                run = buffer[at:end]
                yield from self._texts(line, run)
                line, at = line + run.count(self._newline), end
            record = self._record.match(buffer, at)
            if record is None and not ended and len(buffer) - at < _LONGEST_BYTES:
                block = next(blocks, b"")
                ended = not block
                buffer, at = buffer[at:] + block, max(at - len(buffer), 0)
                if ended and at < len(buffer) and not buffer.endswith(self._newline):
                    buffer += self._newline
            elif at >= len(buffer):
                return
            else:
                stop = record or self._end.search(buffer, at)
                if stop is None:
                    raise Unreadable(f"has a line {line} of more than {_LONGEST_BYTES >> 20} MB.")
                raw = buffer[at : stop.end()]
                yield from self._odd(line, raw) if record else [Piece(line, raw, error=self._reason(raw))]
                line, at = line + raw.count(self._newline), stop.end()

    def records(self) -> Iterator[tuple[int, bytes]]:
        """The line and the text of each row, in the order of the rows."""
        for piece in self.pieces():
            if piece.rows is piece.raw:
                line = piece.line
                for record in _each(self._row, piece.raw):
                    yield line, record
                    line += record.count(self._newline)
            elif not piece.error:
                yield piece.line, piece.raw

    def _blocks(self) -> Iterator[bytes]:
        """The file in UTF-8 without a byte order mark; no block ends between a CR and an LF."""
        name = codecs.lookup(self.encoding).name
        decoder, kept, first = None, b"", True
        for block in read_blocks(self.path):
            if first:
                self._check_mark(name, block)
            if first and not name.startswith("utf-8"):
                decoder = codecs.getincrementaldecoder(_with_order(name, block))("lepton-no-text")
            self.controls |= name == "iso8859-1" and _CONTROLS.search(block) is not None
            text = kept + (_utf8(decoder.decode(block)) if decoder else block)
            if first:
                text = text.removeprefix(codecs.BOM_UTF8)
            kept, first = b"\r" if text.endswith(b"\r") else b"", False
            if text := text[: len(text) - len(kept)]:
                yield text
        if last := kept + (_utf8(decoder.decode(b"", final=True)) if decoder else b""):
            yield last

    def _check_mark(self, name: str, begin: bytes) -> None:
        """Raise when a file begins with the byte order mark of another encoding than the stated one."""
        for mark, encoding, begins in _MARKS:
            if begin.startswith(mark) and not name.startswith(begins) and name != encoding:
                raise Unreadable(
                    f"begins with the byte order mark of {encoding.upper()}: set encoding={encoding!r} in place of {self.encoding!r}."
                )

    def _find_header(self, head: bytes) -> tuple[int, bytes, int] | None:
        """The header's line, its record, and where the next one begins; None: not in these bytes. Finds what ends lines."""
        skipped = re.compile(rb"(?:[^\r\n]*+(?:\r\n|\n|\r)){%d}" % self.skip_lines).match(head)
        if skipped is None:
            return None
        line, at = self.skip_lines + 1, skipped.end()
        if (sep := _SEP.match(head, at)) and self.delimiter in (None, sep[1].decode(errors="replace")):
            self.delimiter, line, at = sep[1].decode(errors="replace"), line + 1, sep.end()
        for self._newline in (b"\n", b"\r"):
            self._grammar(1)
            if header := self._record.match(head, at):
                return line, header[0], header.end()
        return None

    def _names(self, record: bytes) -> list[str]:
        where = f"line {self.header_line}"
        if not record.strip(b"\r\n"):
            raise Unreadable(
                f"begins with a blank line: expected the header in {where}; take it away, or count it in skip_lines."
            )
        try:
            names = [cell.decode() for cell in self._cells(record)]
        except UnicodeDecodeError:
            raise Unreadable(
                f"has no header line that can be read as {self.encoding} in {where}: set its encoding, such as cp1252."
            ) from None
        if "\0" in "".join(names):
            raise Unreadable(
                f"has NUL characters in the header, {where}: if it is UTF-16, set encoding='utf-16'."
            )
        while names and not names[-1]:
            names.pop()
        return names

    def _grammar(self, cells: int) -> None:
        """Regular expressions of rows with so many cells."""
        delimiter, quote = (self.delimiter or ",").encode(), self.quote.encode()
        apart, mark, space = re.escape(delimiter), re.escape(quote), rb"" if delimiter == b" " else rb" *+"
        other = rb"[^\r\n%b]" % apart if len(delimiter) == 1 else rb"(?:(?!%b)[^\r\n])" % apart
        quoted = rb"%b(?:[^%b]++|%b%b)*+%b" % ((mark,) * 5)
        end = rb"\r?\n" if self._newline == b"\n" else rb"\r\n?"
        plain = rb"(?!%b%b)%b*+" % (space, mark, other) if quote else rb"%b*+" % other
        cell = rb"(?:%b%b%b|%b)" % (space, quoted, space, plain) if quote else plain
        regular = rb"(?:%b|%b)" % (quoted, plain) if quote else plain
        row = rb"%b(?:%b%b){%d}%b" % (regular, apart, regular, cells - 1, end)
        self._cell, self._row, self._end = re.compile(cell), re.compile(row), re.compile(end)
        self._record = re.compile(rb"%b(?:%b%b)*+%b" % (cell, apart, cell, end))
        # PyArrow, which parses the rows, knows single bytes only; other rows are written for it anew.
        self.dialect = (delimiter.decode(), self.quote)
        self._rows = re.compile(rb"(?:%b)*+" % row)
        if len(delimiter) > 1:
            self.dialect, self._rows = (",", '"'), re.compile(rb"")

    def _cells(self, record: bytes) -> list[bytes]:
        """What the cells of a record say, quotes taken off."""
        cells, at, record = list[bytes](), 0, record.rstrip(b"\r\n")
        delimiter, quote = (self.delimiter or ",").encode(), self.quote.encode()
        while True:
            cell = self._cell.match(record, at)[0]  # type: ignore[index]
            at += len(cell) + len(delimiter)
            bare = cell.strip(b" ") if delimiter != b" " else cell
            quoted = quote and bare.startswith(quote)
            cells.append(bare[1:-1].replace(quote * 2, quote) if quoted else cell)
            if at > len(record):
                return cells

    def _odd(self, line: int, raw: bytes) -> list[Piece]:
        """A record that is well formed and yet no regular row: it may be blank, have spaces around quotes, or empty cells at its end."""
        cells, wanted = self._cells(raw), len(self.names)
        if not raw.strip(b"\r\n") and wanted > 1:
            return []
        if len(cells) < wanted or any(cells[wanted:]):
            return [Piece(line, raw, error=f"CELLS: {len(cells)}, and the header has {wanted}")]
        delimiter, quote = (part.encode() for part in self.dialect)
        written = (
            quote + cell.replace(quote, quote * 2) + quote if quote else cell for cell in cells[:wanted]
        )
        return [self._text(line, raw, delimiter.join(written) + b"\n")]

    def _texts(self, line: int, run: bytes) -> Iterator[Piece]:
        """A run of regular rows, one by one where they are not all text."""
        piece = self._text(line, run, run)
        if not piece.error:
            yield piece
            return
        for record in _each(self._row, run):
            yield self._text(line, record, record)
            line += record.count(self._newline)

    def _text(self, line: int, raw: bytes, rows: bytes) -> Piece:
        try:
            raw.decode()
        except UnicodeDecodeError:
            return Piece(line, raw, error=f"ENCODING: no text in {self.encoding}")
        return Piece(line, raw, rows)

    def _reason(self, raw: bytes) -> str:
        if self.quote and self.quote.encode() in raw:
            return f"QUOTE: a {self.quote} that does not close, or text beside it; within quotes it is written twice"
        return "LINE END: a single CR or LF within the line, which ends otherwise"


def _each(pattern: re.Pattern[bytes], run: bytes) -> Iterator[bytes]:
    """The matches of a pattern that follow each other without a gap."""
    match = pattern.scanner(run).match  # type: ignore[attr-defined]
    while found := match():
        yield found[0]


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _with_order(encoding: str, begin: bytes) -> str:
    """UTF-16 with its byte order, by which half of its characters are zero where no mark says it."""
    if encoding != "utf-16" or begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return encoding
    return "utf-16-be" if begin[:1000:2].count(0) > begin[1:1000:2].count(0) else "utf-16-le"
