"""What a release uploads: built as `python -m build` does, accepted by `twine check`, and nothing in it but the package."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

import lepton_airflow

ROOT = Path(__file__).parent.parent
VERSION = lepton_airflow.__version__
METADATA = f"lepton_airflow-{VERSION}.dist-info"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("distributions")
    # With the hatchling that is installed: an isolated build would download one.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(build, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(folder.iterdir())


@pytest.fixture
def wheel(distributions: list[Path]) -> zipfile.ZipFile:
    return zipfile.ZipFile(distributions[0])


def test_both_carry_the_version_of_the_package(distributions: list[Path]) -> None:
    assert [file.name for file in distributions] == [
        f"lepton_airflow-{VERSION}-py3-none-any.whl",
        f"lepton_airflow-{VERSION}.tar.gz",
    ]


def test_an_index_would_take_them(distributions: list[Path]) -> None:
    check = [sys.executable, "-m", "twine", "check", "--strict", *distributions]
    done = subprocess.run(check, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    of_git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "lepton_airflow"]
    tracked = subprocess.run(of_git, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    there = {file for file in tracked if (ROOT / file).exists()}
    assert {name for name in wheel.namelist() if not name.startswith(METADATA)} == there
    assert {"lepton_airflow/py.typed", "lepton_airflow/operators.pyi"} <= there


def test_the_metadata_says_what_the_project_is(wheel: zipfile.ZipFile) -> None:
    said: Message = HeaderParser().parsestr(wheel.read(f"{METADATA}/METADATA").decode())
    assert said["Requires-Python"] == ">=3.11"
    assert said["License-Expression"] == "Apache-2.0"
    urls = dict(line.split(", ") for line in said.get_all("Project-URL", []))
    assert {"Changelog", "Documentation", "Issues", "Source"} <= set(urls)


def test_the_source_distribution_can_be_tested(distributions: list[Path]) -> None:
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "constraints.txt", "tests/conftest.py", "docs/architecture.md"} <= names
