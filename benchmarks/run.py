"""Measure: ``make bench-NAME`` runs one benchmark, ``make bench`` all of them; each writes its part of docs/benchmarks.md.

A benchmark is a file here with ``GOALS`` and ``measure() -> dict``; it measures both sides of each ratio in one run. One
that not every machine can run says in ``lacks() -> str`` what is missing here; one whose results are no list of numbers
makes its table in ``report(dict) -> str``.
The last line printed is one JSON object of its numbers.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; returns the exit code."""
    known = sorted(p.stem for p in HERE.glob("*.py") if p.name != "run.py")
    for name in names:
        if name not in known:
            print(f"bench: there is no benchmark {name!r}; known: {', '.join(known)}", file=sys.stderr)
            return 2
    for name in names or known:
        module = importlib.import_module(name)
        if lack := getattr(module, "lacks", str)():
            print(f"bench: {name} is not measured: {lack}", file=sys.stderr)
            if names:
                return 99
            continue
        print(f"== {name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        numbers = module.measure()
        _write(name, _part(module, numbers), known)
        print(json.dumps(numbers), flush=True)
    return 0


_HEAD = """# Benchmarks

Written by `make bench` (all) and `make bench-NAME` (one). Both sides of each ratio were measured in the same run.
"""


def _write(name: str, part: str, known: list[str]) -> None:
    """Put a benchmark's part into the page, in place of its former one."""
    page = HERE.parent / "docs" / "benchmarks.md"
    _, *parts = re.split(r"^## ", page.read_text(), flags=re.MULTILINE) if page.exists() else [""]
    kept = {text.partition("\n")[0]: text.partition("\n")[2].strip() for text in parts} | {name: part}
    page.write_text("\n".join([_HEAD, *(f"## {n}\n\n{kept[n]}\n" for n in known if n in kept)]))


def _part(module: ModuleType, numbers: dict[str, float]) -> str:
    if hasattr(module, "report"):  # words, or more than one column
        table = module.report(numbers)
    else:
        rows = [f"| `{key}` | {value} | {module.GOALS.get(key, '')} |" for key, value in numbers.items()]
        table = "\n".join(["| number | value | goal |", "|---|---|---|", *rows])
    return f"{(module.__doc__ or '').strip()}\n\n{_machine()}.\n\n{table}"


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], check=True, cwd=HERE, capture_output=True, text=True
    ).stdout
    changed = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", ":!/docs"], check=False, cwd=HERE
    ).returncode
    versions = ", ".join(
        f"{p} {version(p)}" for p in ("apache-airflow", "duckdb", "onnxruntime", "scikit-learn")
    )
    return (
        f"Measured on {os.cpu_count()} cores of {cpu}, {memory_gib:.0f} GiB, with Python {platform.python_version()}, {versions}, "
        f"at {revision.strip()}{' with changes' if changed else ''}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
