"""Files that other people write: each is read exactly, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        ("\na,b\n1,2\n", {}, "begins with a blank line"),
        ("\r\na\r\n1\r\n", {}, "begins with a blank line"),
        ("Größe,Preis\nx,20\n".encode("latin-1"), {}, "no header line that can be read as utf-8"),
    ],
)
def test_the_first_line_is_the_header_or_the_file_is_refused(
    tmp_path: Path, content: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence):
        ingest(tmp_path, {"s.csv": content}, **options)


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


def test_rows_without_a_known_line_are_counted_too(tmp_path: Path) -> None:
    content = "a,b\né,1\nü,x\nq,1,2\nq,1,2\n".encode("utf-16-le")
    _, rejected, count = ingest(tmp_path, {"s.csv": content}, encoding="utf-16", types={"b": "INTEGER"})
    assert count == 3
    assert {row["line"] for row in rejected} == {None}
    stray = 'a,b\nx"y,1\nz,q\nw,2\n'
    (tmp_path / "t.csv").write_text(stray)
    spec = {"uri": str(tmp_path / "t.csv"), "types": {"b": "INTEGER"}}
    stage = IngestData(sources={"s": spec}, query="FROM s")
    with pytest.raises(BadInput, match=r"1 of 3 rows .* cannot be read"):
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
