"""Files that other people write: each is read exactly, or refused in a sentence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.errors import BadConfiguration, BadInput
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.ingest_data import IngestData

Rows = list[dict[str, Any]]


def ingest(folder: Path, files: dict[str, str | bytes], **options: Any) -> tuple[Rows, Rows, int]:
    """The rows, the rejected rows, and how many were rejected."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    spec = {"uri": [str(folder / name) for name in files]} | options
    run = RunInfo.local(folder)
    stage = IngestData(sources={"s": spec}, query="FROM s", max_rejected_share=1.0, on_empty="keep")
    result = stage.run(run)
    read = {name: pq.read_table(run.fetch(a.uri)).to_pylist() for name, a in result.artifacts.items()}
    return read["snapshot"], read.get("rejected", []), result.values["sources"]["s"]["rejected"]


def test_json_files_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    files = {"d1/x.jsonl": '{"a": 1.5}\nbad\n', "d2/x.jsonl": '{"a": 2.5}\nbad\n'}
    rows, _, rejected = ingest(tmp_path, files, types={"a": "DECIMAL(5,2)"})
    assert [str(row["a"]) for row in rows] == ["1.50", "2.50"]
    assert rejected == 2


@pytest.mark.parametrize(
    "content",
    [
        '{"id": 1, "Name": "x"}\n{"id": 2, "name": "y"}\n',
        '{"a": 1, "A": 2}\n',
        '{"a": 1, "A": 2, "A_1": 3}\n',
    ],
)
def test_json_keys_that_differ_by_case_are_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(
        BadInput, match=r"has the column '(name|Name|A|a)' twice \(case does not count in SQL\)"
    ):
        ingest(tmp_path, {"s.jsonl": content})
    rows, *_ = ingest(tmp_path, {"t.jsonl": '{"a": 1, "a_1": 2}\n'})  # no such keys
    assert rows == [{"a": 1, "a_1": 2}]


def test_json_keeps_numbers_beside_texts_and_within_lists(tmp_path: Path) -> None:
    rows, *_ = ingest(tmp_path, {"s.jsonl": '{"a": "y"}\n{"a": 1}\n{"a": 0.1234567890123456789}\n'})
    assert [row["a"] for row in rows] == ["0.1234567890123456789", "1", "y"]
    rows, _, rejected = ingest(
        tmp_path,
        {"t.jsonl": '{"a": [18446744073709551617, 1.5]}\n{"a": [0.5, 2]}\n'},
        types={"a": "DECIMAL(38,1)[]"},
    )
    assert sorted([str(v) for v in row["a"]] for row in rows) == [
        ["0.5", "2.0"],
        ["18446744073709551617.0", "1.5"],
    ]
    assert rejected == 0


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        ("\na,b\n1,2\n", {}, "begins with a blank line: expected the header in line 1"),
        ("\r\na\r\n1\r\n", {}, "begins with a blank line: expected the header in line 1"),
        ("Größe,Preis\nx,20\n".encode("latin-1"), {}, "no header line that can be read as utf-8"),
    ],
)
def test_the_first_line_is_the_header_or_the_file_is_refused(
    tmp_path: Path, content: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence):
        ingest(tmp_path, {"s.csv": content}, **options)


ODD = [
    # What others write: the text, the options, the rows, and the line and the beginning of the reason of each rejected row.
    ("a,b\n1,2,\n3,4,\n", {}, [(1, 2), (3, 4)], []),
    ("a,b,\n1,2,\n3,4\n5,6,,\n", {}, [(1, 2), (3, 4), (5, 6)], []),
    ("a,b,\n1,2,\n3,4,x\n", {}, [(1, 2)], [(3, "CELLS: 3")]),
    ("# by x\na,b\n1,2\n", {"skip_lines": 1}, [(1, 2)], []),
    ("Sales, 2013\n\na,b\n1,2\nx,4\n", {"skip_lines": 2, "types": {"a": "BIGINT"}}, [(1, 2)], [(5, "CAST")]),
    ("a,b\n1,2\n# note\n3,4\n", {}, [(1, 2), (3, 4)], [(3, "CELLS: 1")]),
    ("a,b\r\n1,2\n3,4\r\n5,6\n", {}, [(1, 2), (3, 4), (5, 6)], []),
    ("a,b\n1,2\r\n3,4\n5,6\r\n", {}, [(1, 2), (3, 4), (5, 6)], []),
    ("a,b\r1,2\r3,4\r", {}, [(1, 2), (3, 4)], []),
    ("a,b\r1,2\r\n3,4", {}, [(1, 2), (3, 4)], []),
    ("a,b\n1,2\r3,4\n5,6\n", {}, [(5, 6)], [(2, "LINE END")]),
    ('a,b\n1,"open\n2,3\n4,5\n', {}, [(2, 3), (4, 5)], [(2, "QUOTE")]),
    ('a,b\n1,"x"y"\n2,"y"\n', {}, [(2, "y")], [(2, "QUOTE")]),
    ('a,b\n1,5" pipe\n2,"3"" pipe"\n', {}, [(1, '5" pipe'), (2, '3" pipe')], []),
    ('a,b\n1, "x, y" \n2 ,"z"\n', {}, [(1, "x, y"), (2, "z")], []),
    ('a,b\n1,"x\ny"\n2,"x\r\ny"\n3,"x\ry"\nq\n', {}, [(1, "x\ny"), (2, "x\r\ny"), (3, "x\ry")], [(7, "CELLS: 1")]),
    ('a,"b"\n1,x\0y\n', {}, [(1, "x\0y")], []),
    ('a,b,"c\nd"\n1,2,3\nq\n', {}, [(1, 2)], [(4, "CELLS: 1")]),
    ("\ufeffa,b\n\ufeff1,2\n", {}, [("\ufeff1", 2)], []),
    ("sep=;\na;b\n1;2\n3\n", {}, [(1, 2)], [(4, "CELLS: 1")]),
    ("sep=;\r\na;b\r\n1;2,5\r\n", {"decimal": ","}, [(1, 2.5)], []),
    ("a||b\n1||x|y,z\n2||w\n3||v||u\n", {"delimiter": "||"}, [(1, "x|y,z"), (2, "w")], [(4, "CELLS: 3")]),
    ("a¦b\n1¦2\n", {"delimiter": "¦"}, [(1, 2)], []),
    ('a\tb\n1\t"x\n', {"delimiter": "\t", "quote": ""}, [(1, '"x')], []),
    ("a,b\n1,'x, ''y'''\n", {"quote": "'"}, [(1, "x, 'y'")], []),
    ("a;b\n1.234,5;1.000\n-7,25;12\n", {"delimiter": ";", "decimal": ",", "thousands": "."}, [(-7.25, 12), (1234.5, 1000)], []),
    (
        "a;b\n1.5;x\n1,5;x\n1.2345,5;x\n1.234,5;x\n,5;x\n1e3;x\n12.34;x\n",
        {"delimiter": ";", "decimal": ",", "thousands": ".", "types": {"a": "DECIMAL(10,2)"}},
        [(Decimal("0.50"), "x"), (Decimal("1.50"), "x"), (Decimal("1234.50"), "x")],
        [(2, "CAST"), (4, "CAST"), (7, "CAST"), (8, "CAST")],
    ),
    ("a;b\n1.5;2\n", {"delimiter": ";", "decimal": ","}, [("1.5", 2)], []),
    ("a,b\n1,é\n".encode("cp1252"), {}, [], [(2, "ENCODING")]),
    ("a,b\n1,é€\n".encode("cp1252"), {"encoding": "windows-1252"}, [(1, "é€")], []),
    (b"a,b\n1,\x81\n2,\x80\n", {"encoding": "cp1252"}, [(2, "€")], [(2, "ENCODING")]),
    ("a,b\n1,é\n".encode("utf-16-be"), {"encoding": "utf-16"}, [(1, "é")], []),
    ("\ufeffa,b\n1,é\n".encode("utf-16-be"), {"encoding": "utf-16"}, [(1, "é")], []),
    ("a,b\n1,é\n".encode("utf-16"), {"encoding": "utf-16"}, [(1, "é")], []),
    ("a,b\n1,é\n".encode("utf-16"), {}, "byte order mark of UTF-16: set encoding='utf-16'", []),
    ("a,b\n1,é\n".encode("utf-8-sig"), {"encoding": "utf-8-sig"}, [(1, "é")], []),
    ("a,b\n1,é\n".encode("utf-8-sig"), {"encoding": "cp1252"},
     "begins with the byte order mark of UTF-8: set encoding='utf-8' in place of 'cp1252'", []),
    ("a,b\n1,é\n".encode("utf-8-sig"), {"encoding": "utf-16"}, "byte order mark of UTF-8: set encoding='utf-8'", []),
    ("\ufeffa,b\n1,é\n".encode("utf-16-be"), {"encoding": "latin-1"}, "byte order mark of UTF-16: set encoding='utf-16'", []),
    ("\ufeffa,b\n1,é\n".encode("utf-16-be"), {"encoding": "utf-16-le"}, "byte order mark of UTF-16: set encoding='utf-16'", []),
    ("\ufeffa,b\n1,é\n".encode("utf-16-le"), {"encoding": "utf-16-le"}, [(1, "é")], []),
    ("a,b\n1,é\n".encode("utf-32"), {"encoding": "utf-32"}, [(1, "é")], []),
    ("a,b\n1,é\n".encode("utf-16-be"), {}, "has NUL characters in the header", []),
    ("# by x\na,b\n1,2\n3,4\n", {}, "begins with '# by x' in line 1, and the lines below have other cells", []),
    ('"a,b\n1,2\n', {}, "no header line that can be read as utf-8 in line 1", []),
]  # fmt: skip


@pytest.mark.parametrize(("content", "options", "wanted", "rejected"), ODD)
def test_csv_that_others_write_is_read_exactly_or_rejected_with_its_line(
    tmp_path: Path, content: Any, options: dict[str, Any], wanted: Any, rejected: list[tuple[int, str]]
) -> None:
    if isinstance(wanted, str):
        with pytest.raises(BadInput, match=f"s.csv .*{wanted}"):
            ingest(tmp_path, {"s.csv": content}, **options)
        return
    rows, found, count = ingest(tmp_path, {"s.csv": content}, **options)
    assert sorted((row["a"], row["b"]) for row in rows) == sorted(wanted)
    assert [
        (row["line"], row["error"][: len(reason)]) for row, (_, reason) in zip(found, rejected, strict=True)
    ] == rejected
    assert count == len(rejected)


@pytest.mark.parametrize(
    ("header", "value"),
    [("7;Meier;1.250,50", "1.250,50"), ("31.05.2024;Meier;x", "31.05.2024"), ("000017;Meier;x", "000017"), ("Land;2013;2014;1;24", None)],
)  # fmt: skip
def test_a_header_that_looks_like_a_row_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, header: str, value: str | None
) -> None:
    text = f"{header}\n{header}\n"
    ingest(tmp_path, {"s.csv": f"# of May\n{text}"}, skip_lines=1, delimiter=";")
    found = [r.getMessage() for r in caplog.records if "looks like a value" in r.getMessage()]
    assert len(found) == (value is not None)
    assert all(f"in line 2, has {value!r}" in sentence for sentence in found)
    caplog.clear()
    ingest(tmp_path, {"s.csv": text}, delimiter=";")
    assert caplog.text.count("looks like a value") == 0


NESTED: Any = [[[[[[[[[]]]]]]]]]


@pytest.mark.parametrize(
    ("content", "options", "wanted", "rejected"),
    [
        # What only one of Python's and DuckDB's readers takes is a rejected row, not a failed file.
        ('{"a": 1, "a": 2}\n{"a": 3}\n', {}, [3], [(1, "JSON: the key 'a' twice")]),
        ('{"a": {"b": 1, "b": 2}}\n{"a": {"b": 3}}\n', {}, [{"b": 3}], [(1, "JSON: the key 'b' twice")]),
        ('{"a": "\\ud800"}\n{"a": "\\ud83d\\ude00"}\n', {}, ["😀"], [(1, "JSON: half of a surrogate pair")]),
        ('{"a": 1,}\n{"a": 3}\n', {}, [3], [(1, "JSON: Expecting property name")]),
        ('{"a": 1}\n\n{"a": "x"}\r\n{"a": 2}\n', {"types": {"a": "BIGINT"}}, [1, 2], [(3, "CAST: not exactly a BIGINT")]),
        ('[{"a": 1},\n {"a":\n  "x"},\n 7, {"a": 2}\n]\n', {"types": {"a": "BIGINT"}}, [1, 2], [(2, "CAST"), (4, "JSON: a int")]),
        ('{"a": ' + "[" * 9 + "]" * 9 + '}\n{"a": ' + "[" * 30 + "]" * 30 + '}\n{"a": ' + "[" * 900 + "]" * 900 + "}\n{}\n", {}, [None, NESTED],
         [(2, "JSON: lists and objects within each other more than 20 deep"), (3, "JSON: lists")]),
        ('{"a": null}\n{"a": null}\n', {}, [None, None], []),
        (" \n[\n]", {}, "no line that is a JSON object", []),
        ('[{"a": 1}, {"a": 2', {}, "has an array that cannot be read from line 1 on", []),
        ('[{"a": 1}]\n{"a": 2}\n', {}, "goes on after its array, in line 1", []),
        ('{"a": 1}\n'.encode("utf-16"), {}, "begins with the byte order mark of UTF-16", []),
        ('{"": 1}\n', {}, "has an object with an empty key", []),
        ("{}\n{ }\n", {}, "has only objects without keys", []),
        # Numbers deep within keep their digits.
        ('{"a": [9007199254740993, 1.50]}\n', {}, [["9007199254740993", "1.50"]], []),
        ('{"a": [9007199254740992, 1.50]}\n', {}, [[9007199254740992.0, 1.5]], []),
        ('{"a": {"x": [9007199254740993, 0.5], "n": 1}}\n', {}, [{"x": ["9007199254740993", "0.5"], "n": "1"}], []),
        ('{"a": {"x": "t"}}\n{"a": {"x": 0.1234567890123456789}}\n', {}, [{"x": "t"}, {"x": "0.1234567890123456789"}], []),
        ('{"a": "t"}\n{"a": {"x": [0.1234567890123456789, 1]}}\n', {}, ["t", '{"x":[0.1234567890123456789,1]}'], []),
    ],
)  # fmt: skip
def test_json_that_others_write_is_read_exactly_or_rejected_with_its_line(
    tmp_path: Path, content: Any, options: dict[str, Any], wanted: Any, rejected: list[tuple[int, str]]
) -> None:
    if isinstance(wanted, str):
        with pytest.raises(BadInput, match=f"s.json {wanted}|s.json has {wanted}"):
            ingest(tmp_path, {"s.json": content}, **options)
        return
    rows, found, count = ingest(tmp_path, {"s.json": content}, **options)
    key = repr
    assert sorted((row["a"] for row in rows), key=key) == sorted(wanted, key=key)
    assert [
        (row["line"], row["error"][: len(reason)]) for row, (_, reason) in zip(found, rejected, strict=True)
    ] == rejected
    assert count == len(rejected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"delimiter": ""}, "delimiter='': expected up to four characters"),
        ({"quote": "''"}, 'quote="\'\'": expected one character, or none'),
        ({"quote": ";", "delimiter": ";"}, "quote=';' and delimiter=';' are the same"),
        ({"decimal": "5"}, "decimal='5' may be a part of a number"),
        ({"thousands": "."}, "decimal and thousands are both '.'"),
        ({"skip_lines": -1}, "skip_lines=-1: expected a whole number"),
        ({"encoding": "punycode"}, "encoding='punycode' is none that Python knows"),
        ({"encoding": "base64"}, "encoding='base64' is none that Python knows"),
        ({"format": "jsonl", "decimal": ","}, "has the option 'decimal', which does nothing in jsonl"),
        ({"format": "parquet", "null_values": ["NA"]}, "has the option 'null_values', which does nothing in parquet"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_or_would_do_nothing_are_refused(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadConfiguration, match=re.escape(sentence)):
        ingest(tmp_path, {"s.csv": "a\n1\n"}, **options)


def test_bytes_of_windows_in_latin_1_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for encoding, warned in {"latin-1": True, "cp1252": False}.items():
        caplog.clear()
        ingest(tmp_path, {"s.csv": b"a\n\x93x\x94\n"}, encoding=encoding)
        assert ("set encoding='cp1252'" in caplog.text) is warned


def test_records_longer_than_a_block_and_lines_beside_them(tmp_path: Path) -> None:
    long = 'one "line"\r\n' * 300_000  # 3.6 MB
    text = "a,b\r\n" + "".join(
        f'{n},"{(long if n % 2 else "x").replace(chr(34), chr(34) * 2)}"\r\n' for n in range(4)
    )
    rows, rejected, _ = ingest(tmp_path, {"s.csv": text + '4,"open\r\n5,y\r\n'})
    assert sorted(rows, key=lambda row: row["a"]) == [
        {"a": n, "b": long if n % 2 else "x"} for n in range(4)
    ] + [{"a": 5, "b": "y"}]
    assert [row["line"] for row in rejected] == [2 + 4 + 2 * 300_000]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_compressed_files_and_suffixes_in_capitals(tmp_path: Path, suffix: str) -> None:
    def compress(content: bytes) -> bytes:
        library = {".gz": gzip, ".xz": lzma, ".bz2": bz2}.get(suffix)
        return library.compress(content) if library else pa.Codec("zstd").compress(content, asbytes=True)  # type: ignore[attr-defined]

    csv = compress(b"a,b\n1,2\n") + compress(b"3,x\n")  # as one file appended to another
    _, rejected, _ = ingest(
        tmp_path, {f"1.csv{suffix}": csv, f"2.CSV{suffix.upper()}": csv}, types={"b": "BIGINT"}
    )
    assert [row["line"] for row in rejected] == [3, 3]
    for name, content in {"3.JSONL": b'{"a": 1}\n', "4.csv": b"a\n1\n"}.items():
        assert ingest(tmp_path, {name + suffix: compress(content)})[0] == [{"a": 1}]
        with pytest.raises(
            BadInput,
            match=f"{name}{suffix} cannot be read: .*; it may still be being written, or is damaged",
        ):
            ingest(tmp_path, {name + suffix: compress(content)[:-5]})
    if suffix != ".bz2":
        with pytest.raises(BadInput, match=f"5.csv is compressed within, as {suffix} files are"):
            ingest(tmp_path, {"5.csv": csv})


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rejected_rows_have_their_line_whatever_ends_lines(tmp_path: Path, end: str) -> None:
    lines = ["a,b", '"x', 'y",2,4', "1,2,3", "5,6", "", "1,2,3", "3,x"]
    rows, rejected, count = ingest(tmp_path, {"s.csv": end.join([*lines, ""])}, types={"b": "INTEGER"})
    assert [(row["a"], row["b"]) for row in rows] == [("5", 6)] or [(row["a"], row["b"]) for row in rows] == [
        (5, 6)
    ]
    assert sorted({row["line"] for row in rejected}) == [2, 4, 7, 8]
    assert count == 4
    assert {row["raw"] for row in rejected if row["line"] == 8} == {"3,x"}


def test_rows_have_their_line_in_other_encodings_and_beside_stray_quotes(tmp_path: Path) -> None:
    content = "a,b\né,1\nü,x\nq,1,2\nq,1,2\n".encode("utf-16-le")
    _, rejected, count = ingest(tmp_path, {"s.csv": content}, encoding="utf-16", types={"b": "INTEGER"})
    assert count == 3
    assert [row["line"] for row in rejected] == [3, 4, 5]
    stray = 'a,b\nx"y,1\nz,q\nw,2\n'
    (tmp_path / "t.csv").write_text(stray)
    spec = {"uri": str(tmp_path / "t.csv"), "types": {"b": "INTEGER"}}
    stage = IngestData(sources={"s": spec}, query="FROM s")
    with pytest.raises(BadInput, match=r"1 of 3 rows .* cannot be read.*t.csv line 3"):
        stage.run(RunInfo.local(tmp_path))


@pytest.mark.parametrize(
    ("files", "options", "error", "sentence"),
    [
        (
            {"1.csv": "a,b\n1,2\n", "2.csv": "A,b\n1,2\n"},
            {"union": True},
            BadInput,
            "the files together has the column 'A' twice",
        ),
        ({"1.csv": "a\n1\n"}, {"date_format": "%Q %Y"}, BadConfiguration, "date_format='%Q %Y': .*"),
        ({"1.csv": "a\n1\n"}, {"date_format": "%d.%m"}, BadConfiguration, "has no year"),
        ({"1.csv": "a\n1\n"}, {"types": ["a"]}, BadConfiguration, "expected a dict such as"),
    ],
)
def test_what_cannot_be_read_gets_a_sentence(
    tmp_path: Path,
    files: dict[str, str | bytes],
    options: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        ingest(tmp_path, files, **options)


def test_endless_numbers_and_brackets_are_no_tracebacks(tmp_path: Path) -> None:
    rows, *_ = ingest(
        tmp_path, {"s.jsonl": '{"a":' + "1" * 5000 + '}\n{"a": 1.5}\n'}, types={"a": "DECIMAL(9,2)"}
    )
    assert [str(row["a"]) for row in rows] == ["1.50"]
    rows, _, count = ingest(tmp_path, {"t.jsonl": '{"a":' + "[" * 100_000 + "}\n" + '{"a": 1}\n'})
    assert (rows, count) == ([{"a": 1}], 1)


@pytest.mark.parametrize(("suffix", "library"), [("bz2", bz2), ("xz", lzma)])
def test_archives_one_after_the_other_are_read_whole_or_refused(
    tmp_path: Path, suffix: str, library: Any
) -> None:
    first, second = library.compress(b"a\n1\n"), library.compress(b"2\n" * 3000)
    rows, *_ = ingest(tmp_path, {f"s.csv.{suffix}": first + bytes(8) + second + bytes(4)})
    assert [row["a"] for row in rows] == [1] + [2] * 3000
    damaged = second[:2] + b"?" + second[3:]
    for n, more in enumerate((damaged, b"more", second[:-4], second[:3])):
        with pytest.raises(BadInput, match=rf"{n}.csv.{suffix} cannot be read: .*is damaged"):
            ingest(tmp_path, {f"{n}.csv.{suffix}": first + more})


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": 2}', '[{"a": 1}\n', '[{"a": 1}, ', "["])
def test_an_array_without_its_end_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(BadInput, match=r"s.json (ends within its array|has an array that cannot be read)"):
        ingest(tmp_path, {"s.json": content})


def test_texts_in_lists_of_json_stay_as_they_are(tmp_path: Path) -> None:
    identity = "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"
    line = f'{{"ids": ["{identity}"], "in": {{"UUID": "{identity}"}}, "at": ["2024-01-01T02:00:00+02:00"]}}\n'
    rows, *_ = ingest(tmp_path, {"s.jsonl": line}, types={"at": "VARCHAR[]"})
    assert rows == [{"ids": [identity], "in": {"UUID": identity}, "at": ["2024-01-01T02:00:00+02:00"]}]
    for kind in ("TIMESTAMP[]", "DATE[]"):
        rows, rejected, _ = ingest(tmp_path, {"s.jsonl": line}, types={"at": kind})
        assert (rows, [r["column"] for r in rejected]) == ([], ["at"])


def test_keys_of_json_may_be_called_as_types(tmp_path: Path) -> None:
    line = '{"a": {"HUGEINT": 12345678901234567890, "DOUBLE": 1.5, "n": 9007199254740993}}\n'
    rows, *_ = ingest(tmp_path, {"s.jsonl": line})
    assert rows == [{"a": {"HUGEINT": "12345678901234567890", "DOUBLE": "1.5", "n": "9007199254740993"}}]


def test_codes_with_a_point_keep_their_zeros(tmp_path: Path) -> None:
    rows, *_ = ingest(tmp_path, {"s.csv": "icd9,share\n001.9,0.5\n250.01,-0.25\n"})
    assert rows == [{"icd9": "001.9", "share": 0.5}, {"icd9": "250.01", "share": -0.25}]


def test_a_fraction_is_no_number_in_groups(tmp_path: Path) -> None:
    rows, rejected, _ = ingest(
        tmp_path,
        {"s.csv": "a;b\n1.234;1\n0.125;2\n0,125;3\n"},
        types={"a": "DOUBLE"},
        delimiter=";",
        decimal=",",
        thousands=".",
    )
    assert sorted(row["a"] for row in rows) == [0.125, 1234]
    assert [r["raw"] for r in rejected] == ["0.125;2"]


@pytest.mark.parametrize(
    ("date_format", "good", "bad"),
    [
        ("%Y %j", "2024 366", "2023 366"),
        ("%G-%V-%u", "2020-53-1", "2023-53-1"),
        ("%Y%j", "2023060", "2023366"),
        ("%Y-%jT%H:%M:%S%z", "2023-365T23:30:00-0700", "2023-366T10:00:00+0000"),
        ("%Y-%jT%H:%M:%S.%f", "2024-366T10:00:00.25", "2023-366T10:00:00.25"),
        ("%Y-%jT%H:%M:%S.%f %z", "2024-366T10:00:00.25 +00:00", "2023-366T10:00:00.25 +00:00"),
    ],
)
def test_a_day_that_a_year_lacks_is_rejected(tmp_path: Path, date_format: str, good: str, bad: str) -> None:
    files: dict[str, str | bytes] = {"s.csv": f"a,b\n{good},1\n{bad},2\n"}
    kind = "TIMESTAMPTZ" if "z" in date_format else "TIMESTAMP" if "H" in date_format else "DATE"
    rows, rejected, _ = ingest(tmp_path, files, types={"a": kind}, date_format=date_format)
    assert ([row["b"] for row in rows], [r["line"] for r in rejected]) == ([1], [3])


def test_parquet_files_that_disagree_round_nothing(tmp_path: Path) -> None:
    large = 2**53 + 1
    pq.write_table(pa.table({"id": [large], "x": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"id": [8.0, 1e17, 1.5], "x": [0.5, 1.0, 2.0]}), tmp_path / "2.parquet")
    files = [tmp_path / f"{n}.parquet" for n in (1, 2)]
    same: dict[str, str | bytes] = {path.name: path.read_bytes() for path in files}
    with pytest.raises(
        BadInput, match=r"'id' is BIGINT in \S*1.parquet and DOUBLE in others, which would round 1"
    ):
        ingest(tmp_path, same)
    rows, rejected, _ = ingest(tmp_path, same, types={"id": "BIGINT"})
    assert sorted(row["id"] for row in rows) == [8, large, 10**17]
    assert {type(row["x"]) for row in rows} == {float}
    assert len(rejected) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([{"id": 2**53 + 1}], [{"id": 1.5}]),
        ([{"id": 2**53 + 1}], [{"id": 1.5, "more": 1}]),
        (pa.array([Decimal("1.234")], pa.decimal128(38, 3)), pa.array([Decimal(1)], pa.decimal128(38, 0))),
    ],
)
def test_parquet_files_that_disagree_within_or_in_digits_are_refused(
    tmp_path: Path, one: Any, other: Any
) -> None:
    files: dict[str, str | bytes] = {}
    for name, values in {"1.parquet": one, "2.parquet": other}.items():
        pq.write_table(pa.table({"a": values}), tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
    with pytest.raises(BadInput, match=r"column 'a' is .* in others, which would round 1 of its values"):
        ingest(tmp_path, files)


def test_decimals_that_disagree_become_the_type_that_is_stated(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {}
    for name, value, scale in ("1.parquet", "1.234", 3), ("2.parquet", "1", 0):
        pq.write_table(pa.table({"a": pa.array([Decimal(value)], pa.decimal128(38, scale))}), tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
    rows, *_ = ingest(tmp_path, files, types={"a": "DECIMAL(9,3)"})
    assert sorted(row["a"] for row in rows) == [1, Decimal("1.234")]


def test_a_column_of_parquet_without_a_name_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "": [2]}), tmp_path / "s.parquet")
    with pytest.raises(BadInput, match=r"s.parquet has no name for column 2: name it"):
        ingest(tmp_path, {"s.parquet": (tmp_path / "s.parquet").read_bytes()})


def test_what_parquet_holds_and_duckdb_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wide = pa.array([[Decimal("1" * 45)]], pa.list_(pa.decimal256(50, 0)))
    pq.write_table(pa.table({"a": wide}), tmp_path / "wide.parquet")
    with pytest.raises(BadInput, match=r"column 'a' of decimal256\(50, 0\), of which at most 38 digits"):
        ingest(tmp_path, {"wide.parquet": (tmp_path / "wide.parquet").read_bytes()})
    files: dict[str, str | bytes] = {}
    for unit in ("us", "ns"):
        pq.write_table(pa.table({"took": pa.array([7], pa.duration(unit))}), tmp_path / f"{unit}.parquet")
        files[f"{unit}.parquet"] = (tmp_path / f"{unit}.parquet").read_bytes()
        assert ingest(tmp_path, {f"{unit}.parquet": files[f"{unit}.parquet"]})[0] == [{"took": 7}]
        assert f"the duration 'took' is read as a whole number of {unit}" in caplog.text
    with pytest.raises(BadInput, match="the duration 'took' is in us in some files and in ns in"):
        ingest(tmp_path, files)


def test_a_sum_that_parquet_would_round_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(f"a,b\n{2**53 + 1},1\n5,2\n")

    def total(condition: str, within: str = "sum(a)") -> Any:
        stage = IngestData(
            sources={"s": str(tmp_path / "s.csv")}, query=f'SELECT {within} AS "t\'" FROM s WHERE {condition}'
        )
        run = RunInfo.local(tmp_path)
        return pq.read_table(run.fetch(stage.run(run).artifacts["snapshot"].uri)).to_pylist()

    assert total("b = 2") == [{"t'": 5.0}]
    with pytest.raises(BadInput, match="is HUGEINT, which Parquet would hold as a DOUBLE, rounded: cast it"):
        total("b = 1")
    for within in ("[sum(a)]", "{'k': sum(a), 'n': 1}", "MAP{'k': [sum(a)]}"):
        assert total("b = 2", within)
        with pytest.raises(BadInput, match="which Parquet would hold as a DOUBLE, rounded: cast it"):
            total("b = 1", within)


@pytest.mark.parametrize(
    "files",
    [
        {"s.csv": "{0},{0}\n1,2\n1,2\n"},
        {"1.csv": "{0},b\n1,2\n", "2.csv": "a,b\n1,2\n"},
        {"1.csv": "a,b\n1,2\n", "2.csv": "a,{0}\n1,2\n"},
    ],
)
def test_a_row_in_the_place_of_the_header_is_cut_in_messages(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(BadInput) as caught:
        ingest(tmp_path, {name: content.format("Dear Ann " * 300) for name, content in files.items()})
    assert str(caught.value).count("Ann") < 10


@pytest.mark.parametrize(
    ("texts", "read"),
    [
        (["infinity", "epoch"], ["infinity", "epoch"]),
        ([" EPOCH "], [" EPOCH "]),
        (["-inf", "2024-01-01"], ["-inf", "2024-01-01"]),
        (["2024-01-01"], [date(2024, 1, 1)]),
    ],
)
def test_words_in_lists_of_json_are_no_times(tmp_path: Path, texts: list[str], read: list[Any]) -> None:
    files: dict[str, str | bytes] = {"s.jsonl": json.dumps({"a": texts, "in": {"b": texts[0]}}) + "\n"}
    rows, *_ = ingest(tmp_path, files)
    assert rows == [{"a": read, "in": {"b": read[0]}}]


def test_values_of_mixed_types_in_json_are_texts_as_they_are_written(tmp_path: Path) -> None:
    long = 12345678901234567890
    lines = [
        f'{{"a": ["x", 1.50, true, null, {{"k": [1.50]}}, {long}], "in": {{"b": "x", "c": 1.5}}, "n": [1.50]}}',
        '{"a": [], "in": {"b": [1.50, "y"], "c": 2}, "n": [2]}',
    ]
    rows, *_ = ingest(tmp_path, {"s.jsonl": "\n".join(lines) + "\n"})
    assert sorted(rows, key=lambda row: not row["a"]) == [
        {"a": ["x", "1.50", "true", None, '{"k":[1.50]}', str(long)], "in": {"b": "x", "c": 1.5}, "n": [1.5]},
        {"a": [], "in": {"b": '[1.50,"y"]', "c": 2.0}, "n": [2.0]},
    ]
