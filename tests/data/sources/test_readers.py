"""The table (reader x option x kind of value): each cell holds what Python's exact types say of the text, or its row is rejected.

The tests fill a part of it; ``python -m tests.data.sources.test_readers`` fills it whole and counts the cells that are wrong.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.data.sources.files import find_files
from lepton_airflow.data.sources.landing import Landing
from lepton_airflow.data.sources.spec import Source
from lepton_airflow.data.sql import connect
from lepton_airflow.errors import LeptonError
from lepton_airflow.stages import RunInfo
from tests.data.sources.test_text_types import ABSENT, KINDS, VALUES, WHOLE, exact, is_number

TEXTS = [
    "a,b", "a;b", "a\tb", 'say "hi"', '"', "''", "it's", "two\nlines", "two\r\nlines", "one\rline", "\n", " padded ", "x\0y", "\ufeffx", "é€ß", "😀",
    "#", "=1+1", "\\", "\\n", "sep=;", "NA", "null", "None", "-", "x" * 5000, "\u00a07", "1\u00a0234", "1\u202f234,5", "１２",
]  # fmt: skip
NUMBERS = [
    "1,5", "1.5", "1.234", "1,234", "1.234,5", "1,234.5", "1.234.567", "1,234,567.89", "12.34,5", "1.23,4", "-1.234,50", "+1,5", ",5", "5,", "1,2,3",
    "1 234", "1 234,5", "1'234.5", "0,1", "0,10", "1,5e3", "9.223.372.036.854.775.807", "1.2345", "1..5", "1,,5", ".", ",", "-", "0.123", "1234.567",
]  # fmt: skip
DATES = [
    "01/02/2013", "1/2/2013", "31/02/2013", "29/02/2012", "01/02/13", "01/02/2013 14:38", "01.02.2013 14:38", "01.02.2013 00:00", "01.02.2013", "01/02/0013",
    "2013-05-01 14:38:09.123456789", "2013-05-01 14:38:09.123456000", "2013-05-01 14:38:09.000000001", "20130201", "20131301",
]  # fmt: skip
EVERY = [*dict.fromkeys([*VALUES, *TEXTS, *NUMBERS, *DATES])]

Options = dict[str, Any]
OPTIONS: list[Options] = [
    {},
    {"delimiter": ";"},
    {"delimiter": "\t"},
    {"delimiter": "||"},
    {"quote": "'"},
    {"encoding": "utf-16"},
    {"encoding": "utf-8-sig"},
    {"null_values": ["NA", "-", "1,5", "12.7"]},
    {"decimal": ",", "delimiter": ";"},
    {"decimal": ",", "thousands": ".", "delimiter": ";"},
    {"thousands": ","},
    {"thousands": " ", "decimal": ","},
    {"date_format": "%d/%m/%Y"},
    {"date_format": "%d.%m.%Y %H:%M"},
    {"date_format": "%Y-%m-%d %H:%M:%S.%n"},
    {"date_format": "%Y%m%d"},
]
COMPRESS = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
    "zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}  # fmt: skip
CSV = ["csv", "csv with CR LF", "CSV.GZ", "csv.xz", "csv.zst", "csv.bz2"]
JSON = ["jsonl", "jsonl of numbers", "json array", "json array of numbers", "jsonl.gz", "JSONL.XZ"]
READERS = [*CSV, *JSON, "parquet"]


def write(folder: Path, reader: str, columns: dict[str, Sequence[Any]], options: Options) -> Path:
    """A file of texts, as its writers' own libraries write it."""
    suffix, _, form = reader.partition(" ")
    path, kind = folder / f"s.{suffix}", suffix.lower().partition(".")[0]
    rows = list(zip(*columns.values(), strict=True))
    if kind == "parquet":
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
        return path
    if kind == "csv":
        text, end = io.StringIO(), "\r\n" if form else "\n"
        delimiter = options.get("delimiter", ",")
        out = csv.writer(
            text,
            delimiter=delimiter[0],
            quotechar=options.get("quote", '"'),
            quoting=csv.QUOTE_ALL,
            lineterminator=end,
        )
        out.writerows([list(columns), *rows])
        content = text.getvalue()
        if len(delimiter) > 1:  # csv writes one character
            mark = options.get("quote", '"')
            content = content.replace(f"{mark}{delimiter[0]}{mark}", f"{mark}{delimiter}{mark}")
        encoded = content.encode(options.get("encoding", "utf-8"))
    else:
        bare = form.endswith("of numbers")
        objects = [
            "{" + ", ".join(f"{json.dumps(n)}: {v if bare or isinstance(v, int) else json.dumps(v)}" for n, v in zip(columns, row, strict=True)) + "}"
            for row in rows
        ]  # fmt: skip
        encoded = (
            "[\n" + ",\n".join(objects) + "]" if form.startswith("array") else "\n".join(objects)
        ).encode()
    compress = COMPRESS.get(suffix.lower().rpartition(".")[2])
    path.write_bytes(compress(encoded) if compress else encoded)
    return path


def land(
    folder: Path, path: Path, options: Options
) -> tuple[dict[str, list[Any]], dict[str, str], list[Any]]:
    """The columns, the types, and the rejected rows."""
    run, source = RunInfo.local(folder), Source.parse("s", {"uri": str(path)} | options)
    con = connect(run.workdir, readable=[path], threads=1)
    try:
        landed = Landing(con, run).land(source, find_files(source, run))
        table = con.sql("FROM s").to_arrow_table()
        rejected = con.execute('SELECT line, "column", error, raw FROM rejected ORDER BY line').fetchall()
    finally:
        con.close()
    return {name: table[name].to_pylist() for name in table.column_names}, landed.columns, rejected


def number(text: str, options: Options) -> str | None:
    """A number in the source's notation with a decimal point and nothing else between its digits; None where it is none."""
    decimal, thousands = options.get("decimal", "."), options.get("thousands", "")
    sign, digits = re.fullmatch(r"([+-]?)(.*)", text.strip(" "), re.DOTALL).groups()  # type: ignore[union-attr]
    if re.fullmatch(r"(?i)nan|inf|infinity", digits):
        return text
    mantissa, e, exponent = digits.replace("E", "e").partition("e")
    whole, point, fraction = mantissa.partition(decimal)
    if thousands and thousands in whole:
        first, *groups = whole.split(thousands)
        # A number in groups does not begin with 0: 0.125 among such is a fraction of somebody else's.
        if not 1 <= len(first) <= 3 or first.startswith("0") or any(len(group) != 3 for group in groups):
            return None
        whole = first + "".join(groups)
    parts = [whole, fraction]
    if not any(parts) or any(part and not (part.isascii() and part.isdigit()) for part in parts):
        return None
    if e and not re.fullmatch(r"[+-]?[0-9]+", exponent):
        return None
    return sign + whole + ("." if point else "") + fraction + e + exponent


def strptime(text: str, date_format: str) -> tuple[datetime, int] | None:
    """A moment in a format, and its nanoseconds beyond the microsecond."""
    rest = 0
    if date_format.endswith("%n"):
        found = re.fullmatch(r"(.*\.\d{6})(\d{3})", text.strip(" "))
        if not found:
            return None
        text, rest, date_format = found[1], int(found[2]), date_format[:-1] + "f"
    try:
        return datetime.strptime(text.strip(" "), date_format), rest  # noqa: DTZ007 - it has no offset
    except ValueError:
        return None


def wanted(text: str, kind: str, reader: str, options: Options) -> Any:
    """What a cell must hold, by Python's exact types; ABSENT: its row is rejected."""
    if reader.lower().startswith("csv") and text in ("", *options.get("null_values", [])):
        return None
    date_format = options.get("date_format", "")
    if date_format and (kind == "DATE" or (kind.startswith("TIMESTAMP") and "%H" in date_format)):
        found = strptime(text, date_format)
        if found is None or found[0].year < 1000:
            return ABSENT
        moment, rest = found
        if kind == "DATE":
            return ABSENT if moment.time() != datetime.min.time() or rest else moment.date()
        if kind == "TIMESTAMP_NS":
            return (moment, rest)
        return ABSENT if rest else moment.replace(tzinfo=UTC) if kind == "TIMESTAMPTZ" else moment
    if kind in WHOLE or kind == "DOUBLE" or kind.startswith("DECIMAL"):
        plain = number(text, options) if {"decimal", "thousands"} & set(options) else text
        return ABSENT if plain is None else exact(plain, kind)
    return exact(text, kind)


def same(got: Any, want: Any) -> bool:
    if isinstance(want, tuple):  # nanoseconds
        return (
            got is not ABSENT and got is not None and (got.to_pydatetime(warn=False), got.nanosecond) == want
        )
    if isinstance(got, datetime) and got.tzinfo:
        got = got.astimezone(UTC)
    return (got == want and type(got) is type(want)) or repr(got) == repr(want)


def wrong_when_stated(folder: Path, reader: str, kind: str, options: Options) -> tuple[int, dict[str, Any]]:
    """How many cells a column of all kinds of value with a stated type has, and which are wrong."""
    texts = [text for text in EVERY if "of numbers" not in reader or (is_number(text) and text != "1e400")]
    columns = {"row": list(range(len(texts))), "value": texts}
    path = write(folder, reader, columns, options)
    got, _, rejected = land(folder, path, options | {"types": {"row": "BIGINT", "value": kind}})
    found = dict(zip(got["row"], got["value"], strict=True))
    wrong = {}
    for row, text in enumerate(texts):
        want = wanted(text, kind, reader, options)
        if not same(found.get(row, ABSENT), want):
            wrong[text] = (found.get(row, ABSENT), want)
    if len(rejected) != len(texts) - len(found):
        wrong["rejected"] = (len(rejected), len(texts) - len(found))
    if reader != "parquet" and {raw for line, _, _, raw in rejected if line is None}:
        wrong["line"] = rejected
    return len(texts), wrong


def wrong_when_found(folder: Path, reader: str, options: Options) -> tuple[int, dict[str, Any]]:
    """The same of a column of one value each, whose type is found."""
    texts = [text for text in EVERY if "of numbers" not in reader or is_number(text)]
    columns = {"row": [0]} | {f"c{n}": [text] for n, text in enumerate(texts)}
    got, kinds, rejected = land(folder, write(folder, reader, columns, options), options)
    wrong: dict[str, Any] = {"rejected": rejected} if rejected else {}
    for n, text in enumerate(texts):
        kind = kinds[f"c{n}"].replace("TIMESTAMP WITH TIME ZONE", "TIMESTAMPTZ")
        (value,) = got[f"c{n}"]
        want = wanted(text, kind, reader, options)
        if not same(value, want):
            wrong[text] = (kind, value, want)
        elif kind == "DOUBLE" and not _keeps(text, value, options):
            wrong[text] = (kind, value, "rounded")
    return len(texts), wrong


def _keeps(text: str, value: float, options: Options) -> bool:
    """Whether a DOUBLE may stand for a number: it is the nearest, and a whole number the same."""
    plain = number(text, options)
    return plain is not None and (
        not re.fullmatch(r" *[+-]?[0-9]+ *", plain) or Decimal(plain.strip()) == Decimal(value)
    )


def takes(reader: str, options: Options) -> bool:
    return reader.lower().startswith("csv") or not set(options) - {"date_format"}


def table() -> Iterator[tuple[str, str | None, Options]]:
    for reader, options in itertools.product(READERS, OPTIONS):
        if takes(reader, options):
            yield reader, None, options
            for kind in [*KINDS, "TIMESTAMP_NS"] if "%n" in str(options) else KINDS:
                yield reader, kind, options


def cells(folder: Path, reader: str, kind: str | None, options: Options) -> tuple[int, dict[str, Any]]:
    if kind is None:
        return wrong_when_found(folder, reader, options)
    return wrong_when_stated(folder, reader, kind, options)


# Each reader, each option and each type, in a few of their pairs.
PART = [run for n, run in enumerate(table()) if n % 89 == 0]


@pytest.mark.parametrize(("reader", "kind", "options"), PART)
def test_each_cell_is_exact_or_its_row_rejected(
    tmp_path: Path, reader: str, kind: str | None, options: Options
) -> None:
    assert cells(tmp_path, reader, kind, options)[1] == {}


if __name__ == "__main__":
    import sys
    from collections import Counter

    every, bad, refused = Counter[str](), Counter[str](), Counter[str]()
    step = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    for reader, kind, options in itertools.islice(table(), 0, None, step):
        with tempfile.TemporaryDirectory() as folder:
            try:
                count, wrong = cells(Path(folder), reader, kind, options)
            except LeptonError as error:
                refused[reader] += 1
                print("refused", reader, kind, options, str(error)[:200])
                continue
            except Exception as error:  # noqa: BLE001
                refused[reader] += 1
                print("CRASH", reader, kind, options, repr(error)[:300])
                continue
        every[reader] += count
        bad[reader] += len(wrong)
        if wrong:
            print(reader, kind, options, len(wrong), str(wrong)[:400])
    for reader in every | refused:
        print(
            f"{reader}: {bad[reader]} of {every[reader]} cells are wrong; {refused[reader]} files refused or crashed"
        )
