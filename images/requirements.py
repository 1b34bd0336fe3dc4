"""Print what a stage image installs: what the entry point and the extras of pyproject.toml need, one requirement a line.

    python images/requirements.py train,s3 < pyproject.toml

Airflow is left out: a stage runs by `python -m lepton_airflow run`, which does not import it. Standard library only, because
this runs before anything is installed. It reads pyproject.toml instead of the package, so that a change of code installs
nothing anew.
"""

# ruff: noqa: INP001 - a script, no package
from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence

ENTRY_POINT_NEEDS = ("fsspec", "psutil")  # as in lepton_airflow/execution/environments.py


def requirements(project: Mapping[str, list[str]], core: Sequence[str], extras: Sequence[str]) -> list[str]:
    """The requirement lines of the entry point and of these extras, each once."""
    base = [line for line in core if _name(line) in ENTRY_POINT_NEEDS]
    return list(dict.fromkeys([*base, *(line for extra in extras for line in _lines(project, extra))]))


def _lines(project: Mapping[str, list[str]], extra: str) -> Iterator[str]:
    if extra not in project:
        sys.exit(f"pyproject.toml has no extra {extra!r}. Known: {', '.join(sorted(project))}.")
    for line in project[extra]:
        if _name(line) == "lepton-airflow":  # lepton-airflow[train]: the lines of another extra
            for other in line.partition("[")[2].rstrip("] ").split(","):
                yield from _lines(project, other.strip())
        else:
            yield line


def _name(line: str) -> str:
    return re.split(r"[^\w.-]", line, maxsplit=1)[0].lower()


if __name__ == "__main__":
    table = tomllib.load(sys.stdin.buffer)["project"]
    wanted = [extra for extra in sys.argv[1].split(",") if extra]
    print("\n".join(requirements(table["optional-dependencies"], table["dependencies"], wanted)))
