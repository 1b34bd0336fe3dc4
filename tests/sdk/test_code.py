"""The user's code runs as its file is now, whatever bytecode lies beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.sdk.code import code_digest, load_code

# Imports the user's functions in this process, and prints what they give.
LOAD = """
import json, sys
from lepton_airflow.sdk.code import load_code
print(json.dumps([load_code(name, "trainer")() for name in sys.argv[1:]]))
"""


def environment(folder: Path) -> dict[str, str]:
    """That of a process that finds modules in this folder, and leaves bytecode."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": str(folder)}


def ran(folder: Path, *names: str) -> list[Any]:
    command = [sys.executable, "-c", LOAD, *names]
    done = subprocess.run(command, env=environment(folder), check=True, capture_output=True, text=True)
    found: list[Any] = json.loads(done.stdout)
    return found


def write(file: Path, text: str) -> None:
    """Write a file as at one and the same second."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    os.utime(file, (1e9, 1e9))


def test_code_that_was_edited_twice_in_a_second_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    files = ("mine.py", "beside.py", "pack/__init__.py", "pack/deep.py")
    names = ("mine:f", "mine:g", "pack:f", "pack.deep:f")
    for file in files:
        write(tmp_path / file, "def f(): return 1\n")
    write(tmp_path / "mine.py", "from beside import f as g\ndef f(): return 1\n")
    # As the DAG processor does: it imports the module, and leaves bytecode.
    subprocess.run([sys.executable, "-c", "import mine, pack.deep"], env=environment(tmp_path), check=True)
    kept = {file: file.read_bytes() for file in tmp_path.rglob("*.pyc")}
    assert len(kept) == 4
    assert ran(tmp_path, *names) == [1, 1, 1, 1]
    before = code_digest("mine:f")
    for file in files:
        write(tmp_path / file, (tmp_path / file).read_text().replace("return 1", "return 2"))
    assert code_digest("mine:f") != before
    assert ran(tmp_path, *names) == [2, 2, 2, 2]
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.pyc")} == kept


def test_code_beside_a_zip_file_finds_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "lib.zip", "w") as file:
        file.writestr("in_a_zip.py", "def f(): return 7\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "lib.zip"), *sys.path])
    write(tmp_path / "beside_a_zip.py", "from in_a_zip import f\n")
    assert load_code("beside_a_zip:f", "trainer")() == 7


def test_installed_libraries_keep_their_bytecode(tmp_path: Path) -> None:
    write(tmp_path / "mine.py", "import colorsys\nf = lambda: colorsys.__spec__.loader.__class__.__name__\n")
    assert ran(tmp_path, "mine:f") == ["SourceFileLoader"]
