"""The README's code runs, in order and in one folder, and prints what the README says it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lepton_airflow.stages import all_stages

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
# These set up or need a whole machine: they are run by CI itself, by a person, or in other tests.
NOT_HERE = ("make ", "pip install ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def _run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "AIRFLOW_HOME": str(folder / "airflow")}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("index", range(len(BLOCKS)), ids=lambda i: f"{i}-{BLOCKS[i][0]}")
def test_a_block_runs_and_prints_what_it_says(index: int, folder: Path) -> None:
    language, code = BLOCKS[index]
    if language == "python":
        printed = _run([sys.executable, "-c", code], folder)
        following = BLOCKS[index + 1] if index + 1 < len(BLOCKS) else ("", "")
        if following[0] == "text":
            assert printed == following[1]
    elif language == "bash":
        here = "\n".join(line for line in code.splitlines() if not line.startswith(NOT_HERE))
        _run(["bash", "-euc", here], folder)
    else:
        assert language == "text"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert named
    assert named <= targets


def test_every_operator_is_in_the_table() -> None:
    rows = [
        f"| `{name}Operator` | {(stage.__doc__ or '').strip().splitlines()[0]} |"
        for name, stage in all_stages().items()
    ]
    missing = [row for row in rows if row not in README]
    assert missing == []


@pytest.mark.parametrize(
    "page",
    [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^):]+)\)", page.read_text())
    assert [link for link in links if not _there(page, link)] == []


def _there(page: Path, link: str) -> bool:
    """Whether a link's file is there, and in it the heading that comes after ``#``."""
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    if not anchor:
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if target.exists() else []
    return anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_make_lists_every_benchmark() -> None:
    listed = re.search(r"^bench-%:.*\((.*?)\)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed
    there = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if p.stem != "run")
    assert listed[1].split(", ") == there
