"""Land JSON lines, or one JSON array, as Parquet: each object is a row, with all digits of its numbers, or is set apart with its line."""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from lepton_airflow.contract import digest_of
from lepton_airflow.data.duckdb_types import parts_of, with_parts
from lepton_airflow.data.sources.files import Reader, Rejected, Unreadable, check_no_doubles, read_blocks
from lepton_airflow.data.sources.text_types import TIMES_ONLY
from lepton_airflow.data.sql import SCRATCH, literal
from lepton_airflow.errors import BadInput

_NEAREST = ("DOUBLE", "FLOAT", "REAL", "FLOAT4", "FLOAT8", "BOOLEAN")  # types that lose nothing in a DOUBLE
_TEXTS = ("VARCHAR", "DATE", "TIME", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE", "UUID")
# Parquet holds a HUGEINT as a DOUBLE, which rounds it; a UUID is written in another form than the text that it was.
_UNLIKE_TEXTS = dict.fromkeys(("HUGEINT", "UHUGEINT", "UUID"), "VARCHAR")
_LISTS_OF_TIMES = re.compile(r"(DATE|TIME[ A-Z]*)((\[\])+)")
_NUMBERS_AS_TEXTS = dict.fromkeys(("DOUBLE", "BIGINT", "UBIGINT"), "VARCHAR")
_MIXED_AS_TEXTS = {"JSON": "VARCHAR"}
_TIMES_AS_TEXTS = dict.fromkeys(("DATE", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"), "VARCHAR")
_WORD = re.compile(r"\s*[-+]?(epoch|inf|infinity)\s*", re.IGNORECASE)  # which DuckDB takes for a time
_LONGEST_BYTES = 16_000_000  # of an object: DuckDB reads 16 MiB
_BEGIN = re.compile(r"[ \t\r\n]*+\[[ \t\r\n]*+(?=[^ \t\r\n])")  # of an array
_BETWEEN = re.compile(r"[ \t\r\n]*+,?[ \t\r\n]*+(?=[^ \t\r\n])")
_EXACT = 2**53  # whole numbers up to it are exact in a DOUBLE
_DEEPEST = 20  # lists and objects within each other: DuckDB's time doubles with each, and 30 take minutes
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_LONG_NUMBER_OR_WORD = re.compile(rb'[0-9]{16}|"\s*[-+]?(epoch|inf)', re.IGNORECASE)
# Marks a number with a point, kept as it is written: Python and DuckDB would round it to a double. No text can begin so by chance.
_MARK = f"\ue000{secrets.token_hex(8)}:"
_MARKED = re.compile(rf'"{_MARK}([-+.0-9eE]+)"')


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; raises for a key that it has twice, of which nobody knows which counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)[:40]!r} twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_no_doubles, parse_float=(_MARK + "{}").format)


class JsonFiles(Reader):
    """One JSON object a line, or one array of objects."""

    def land(self) -> list[Path]:
        import duckdb

        name = digest_of(list(self.files.values()))[:16]  # no key of anybody's objects
        self.place = (f"file {name}", f"row {name}")
        self._keys: dict[str, None] = {}
        paths = [self._copy(at, path) for at, path in enumerate(self.files)]
        uris = self.first_uris(list(self.files))
        check_no_doubles(self.source, uris, list(self._keys))
        if not self._keys or "" in self._keys:
            what = "an object with an empty key" if self._keys else "only objects without keys"
            raise BadInput(
                f"source {self.source.name!r}: {uris} has {what}: expected keys that are names of columns."
            )
        types = self._types(paths)
        if texts := self._texts(types, paths):
            kinds = {column: duckdb.sqltype(types[column]) for column in texts}
            paths = [self._with_texts(path, kinds) for path in paths]
        target = self.folder / f"{self.source.name}.parquet"
        self.query(
            uris,
            f"COPY (FROM read_ndjson({literal(paths)}, records=true, columns={literal(types)})) TO {literal(target)} ({SCRATCH})",
        )
        return [target]

    def records(self, path: Path) -> Iterator[tuple[int, int, bytes]]:
        for line, raw, _, _ in _values(path):
            yield line, line, raw

    def _copy(self, at: int, path: Path) -> Path:
        """The objects of one file as JSON lines, each with its place; what is none becomes a rejected row."""
        target = self.folder / f"{self.source.name}-{at}.jsonl"
        rejected, good, uri = Rejected(self.con, self.source.name), 0, self.files[path]
        with self.reading(path), target.open("wb") as out:
            for line, raw, value, error in _values(path):
                if error:
                    rejected.add(uri, line, f"JSON: {error}", raw)
                    self.unreadable += 1
                    continue
                good += 1
                if not self._keys.keys() >= value.keys():
                    self._keys |= dict.fromkeys(value)
                # A line end in an object of an array can only stand between its parts.
                body = raw.strip()[1:].replace(b"\r", b" ").replace(b"\n", b" ")
                comma = b", " if value else b""
                out.write(
                    b'{"%b": %d, "%b": %d%b'
                    % (self.place[0].encode(), at, self.place[1].encode(), line, comma)
                    + body
                    + b"\n"
                )
                if not good % 10_000:
                    self.check_stop()
        rejected.flush()
        if not good:
            raise BadInput(
                f"source {self.source.name!r}: {uri} has no line that is a JSON object; expected JSON lines, one object a line, "
                "or one array of objects."
            )
        return target

    def _types(self, paths: list[Path]) -> dict[str, str]:
        """What DuckDB finds in each field; it looks at every row, so that this does not depend on where a field first appears."""
        found = self.query(
            self.first_uris(list(self.files)),
            f"DESCRIBE FROM read_ndjson({literal(paths)}, records=true, sample_size=-1, maximum_sample_files=1000000, "
            "map_inference_threshold=-1, field_appearance_threshold=0)",
        )
        return {str(name): with_parts(str(kind), _UNLIKE_TEXTS) for name, kind, *_ in found}

    def _texts(self, types: dict[str, str], paths: list[Path]) -> set[str]:
        """Change the types of columns that must be read as text, or partly so, and say whose numbers must be made texts for it."""
        stated = self.source.types
        texts: set[str] = set()
        deep: list[str] = []
        for column, kind in types.items():
            exact = column in stated and stated[column].upper().removesuffix("[]") not in _NEAREST
            if column in self.place:
                continue
            if kind == '"NULL"':  # no value at all: as in CSV
                types[column], self.texts[column] = "VARCHAR", ()
            elif kind == "JSON":  # numbers beside texts
                texts.add(column)
                types[column] = "VARCHAR"
                if column not in stated:
                    self.texts[column] = ()
            elif kind == "DOUBLE[]" and exact:
                texts.add(column)
                types[column] = "VARCHAR[]"
            elif column in stated and (lists := _LISTS_OF_TIMES.fullmatch(kind)):
                types[column] = f"VARCHAR{lists[2]}"
            elif kind.endswith((")", "]")):
                deep.append(column)
            elif column in stated:
                if kind == "DOUBLE" and exact:
                    texts.add(column)
                types[column] = "VARCHAR"
            elif kind == "DOUBLE":  # whole numbers that no DOUBLE holds may be among them
                types[column], self.texts[column] = "VARCHAR", ("DOUBLE",)
            elif kind in _TEXTS:
                types[column], self.texts[column] = "VARCHAR", TIMES_ONLY
        whole, words = self._within(deep, paths) if deep else (set(), set())
        for column in deep:
            kind = types[column]
            changed = _MIXED_AS_TEXTS if "JSON" in parts_of(kind) else {}
            if column in whole and "DOUBLE" in parts_of(kind):
                changed = changed | _NUMBERS_AS_TEXTS
            if changed:
                texts.add(column)
            types[column] = with_parts(kind, changed | (_TIMES_AS_TEXTS if column in words else {}))
        return texts

    def _within(self, columns: list[str], paths: list[Path]) -> tuple[set[str], set[str]]:
        """The columns with whole numbers that no DOUBLE holds within lists or objects, and those with words that are no times."""
        whole, words = set[str](), set[str]()
        for path in paths:
            with path.open("rb") as lines:
                for line in filter(_LONG_NUMBER_OR_WORD.search, lines):
                    row = _DECODER.decode(line.decode())
                    for column in columns:
                        for value in _scalars(row.get(column)):
                            if isinstance(value, int) and abs(value) > _EXACT:
                                whole.add(column)
                            if isinstance(value, str) and _WORD.fullmatch(value):
                                words.add(column)
            self.check_stop()
        return whole, words

    def _with_texts(self, path: Path, columns: Mapping[str, Any]) -> Path:
        """A copy in which what is read as text is one, with all digits of numbers."""
        target = path.with_suffix(".texts")
        with path.open("rb") as lines, target.open("w", encoding="utf-8") as out:
            for number, line in enumerate(lines):
                row = _DECODER.decode(line.decode())
                row |= {c: _as_text(row[c], kind) for c, kind in columns.items() if c in row}
                out.write(_MARKED.sub(r"\1", _dumped(row)) + "\n")
                if not number % 10_000:
                    self.check_stop()
        return target


def _values(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any], str]]:
    """The line, the text, and the object or why there is none, of each line that is not blank or each element of an array."""
    blocks = read_blocks(path)
    first = next(blocks, b"").removeprefix(codecs.BOM_UTF8)
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Unreadable("begins with the byte order mark of UTF-16, and JSON is UTF-8: convert it.")
    items = _elements if first.lstrip().startswith(b"[") else _lines
    for line, raw in items(chain([first], blocks)):
        yield (line, raw, *_object(raw))


def _lines(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    line, rest = 0, b""
    for block in chain(blocks, [b"\n"]):
        *whole, rest = (rest + block).split(b"\n")
        for line, raw in enumerate(whole, line + 1):  # noqa: B020 - it goes on
            if raw.strip():
                yield line, raw
        if len(rest) > _LONGEST_BYTES:
            raise Unreadable(f"has a line {line + 1} of more than {_LONGEST_BYTES // 10**6} MB.")


def _elements(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The elements of an array, which may be written in many lines."""
    decoder, text = codecs.getincrementaldecoder("utf-8")("surrogateescape"), ""
    at, line, begun = 0, 1, False
    for block in chain(blocks, [b""]):
        text, at = text[at:] + decoder.decode(block, final=not block), 0
        while True:
            space = (_BETWEEN if begun else _BEGIN).match(text, at)
            if space is None:
                break
            begun = True
            line, at = line + text.count("\n", at, space.end()), space.end()
            if text[at : at + 1] == "]":
                if text[at + 1 :].strip() or any(more.strip() for more in blocks):
                    raise Unreadable(
                        f"goes on after its array, in line {line}: expected one array, or JSON lines."
                    )
                return
            try:
                _, end = json.JSONDecoder().raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if block and len(text) - at < _LONGEST_BYTES:
                    break
                raise Unreadable(
                    f"has an array that cannot be read from line {line} on: {_reason(error)}."
                ) from None
            if end == len(text) and block:  # more digits may come
                break
            yield line, text[at:end].encode(errors="surrogateescape")
            line, at = line + text.count("\n", at, end), end
    raise Unreadable(f"ends within its array, in line {line}: it may still be being written, or is damaged.")


def _object(raw: bytes) -> tuple[dict[str, Any], str]:
    """The object that a text says, or why it is none that Python and DuckDB read alike."""
    try:
        value = _DECODER.decode(raw.decode())
        if isinstance(value, dict) and _HALF_PAIR.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
        if raw.count(b"[") + raw.count(b"{") > _DEEPEST and _depth(value) > _DEEPEST:
            raise RecursionError
    except (ValueError, RecursionError) as error:
        return {}, _reason(error)
    if len(raw) > _LONGEST_BYTES:
        return {}, f"an object of more than {_LONGEST_BYTES // 10**6} MB"
    return (value, "") if isinstance(value, dict) else ({}, f"a {type(value).__name__}, expected an object")


def _depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    if isinstance(error, RecursionError):
        return f"lists and objects within each other more than {_DEEPEST} deep"
    return "half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else str(error)


def _scalars(value: Any) -> Iterator[Any]:
    """The texts, numbers and other values in a value of JSON, at any depth."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _scalars(part)
    else:
        yield value


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _as_text(value: Any, kind: Any) -> Any:
    """A value of JSON in which all that a type of DuckDB's has as text is one."""
    parts = dict(kind.children) if kind.id in ("list", "struct", "map") else {}
    if isinstance(value, list) and kind.id == "list":
        return [_as_text(part, parts["child"]) for part in value]
    if isinstance(value, dict) and parts:
        of = parts if kind.id == "struct" else dict.fromkeys(value, parts["value"])
        return {key: _as_text(part, of[key]) for key, part in value.items()}
    if value is None or str(kind) != "VARCHAR" or (isinstance(value, str) and not value.startswith(_MARK)):
        return value
    return value.removeprefix(_MARK) if isinstance(value, str) else _MARKED.sub(r"\1", _dumped(value))
