"""Files of random characters: every line is a row, a rejected row or blank, whatever the blocks are that it is read in."""

from __future__ import annotations

import csv
import io
import random
import re
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.data.sources import files
from lepton_airflow.data.sources.csv_text import CsvText
from lepton_airflow.data.sources.files import Unreadable

HEADERS = ["a,b\n", "a\n", "a,b\r\n", "a,b,c\n", "a,b\r", '"a",b\n']
ALPHABETS = ['a,"\n', ' a,"\n\r', 'a5,;"\n\r\n é\0', 'a,,""\n\n\r']


def read(path: Path) -> Any:
    """The header, the rows and the rejected records with their lines, and what a parser is given; or why there are none."""
    try:
        text = CsvText(path, "utf-8", ",", '"', 0)
        pieces = list(text.pieces())
        return (
            text,
            [(p.line, p.raw) for p in pieces if p.error],
            list(text.records()),
            b"".join(p.rows for p in pieces),
        )
    except Unreadable as error:
        return str(error)


def test_random_files_are_split_without_losing_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, path = random.Random(0), tmp_path / "s.csv"
    compared = 0
    for _ in range(1500):
        alphabet, header = draw.choice(ALPHABETS), draw.choice(HEADERS)
        content = header + "".join(draw.choices(alphabet, k=draw.randrange(40)))
        path.write_text(content, newline="")
        monkeypatch.setattr(files, "_BLOCK_BYTES", 1 << 20)
        found = read(path)
        monkeypatch.setattr(files, "_BLOCK_BYTES", draw.randrange(1, 9))
        again = read(path)
        if isinstance(found, str):
            assert again == found
            continue
        text, rejected, rows, parsed = found
        assert again[1:] == found[1:]
        assert b"".join(raw for _, raw in sorted([*rejected, *rows])).translate(None, b"\r\n") == re.sub(
            rb"[\r\n]", b"", path.read_bytes()[text._body_byte :]
        )
        ends = re.split("\r\n?" if text._newline == b"\r" else "\n", content)
        for line, raw in [*rejected, *rows]:
            assert ends[line - 1].startswith(re.split("[\r\n]", raw.decode())[0])
        for _, raw in rows:
            record = re.sub(r"\r\n?$|\n$", "", raw.decode())
            if (
                '" ' not in record and ' "' not in record
            ):  # spaces around quotes are layout to us, and text to csv
                (cells,) = list(csv.reader(io.StringIO(record, newline=""))) or [[""]]
                assert [cell.decode() for cell in text._cells(raw)] == (cells or [""])
                compared += 1
        assert parsed.count(b"a") == sum(raw.count(b"a") for _, raw in rows)
    assert compared > 1000
