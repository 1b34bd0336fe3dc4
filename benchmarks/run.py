"""Measure: ``make bench-NAME`` runs one benchmark, ``make bench`` all of them; each writes its part of docs/benchmarks.md.

A benchmark is a file here with ``GOALS`` and ``measure() -> dict``; it measures both sides of each ratio in one run. One
that not every machine can run says in ``lacks() -> str`` what is missing here; one whose results are no list of numbers
makes its table in ``report(dict) -> str``. One whose ``measure`` takes options (``make bench-serving ARGS="--only peers"``)
measures by them, and what it finds so becomes a part of the page of its own.
The last line printed is one JSON object of its numbers.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def main(arguments: list[str]) -> int:
    """Run the named benchmarks, or all; one alone may be followed by its options. Returns the exit code."""
    names = list(itertools.takewhile(lambda a: not a.startswith("-"), arguments))
    options = arguments[len(names) :]
    known = sorted(p.stem for p in HERE.glob("*.py") if p.name != "run.py")
    for name in names:
        if name not in known:
            print(f"bench: there is no benchmark {name!r}; known: {', '.join(known)}", file=sys.stderr)
            return 2
    for name in names or known:
        module = importlib.import_module(name)
        if options and (len(names) > 1 or not inspect.signature(module.measure).parameters):
            print(
                f"bench: {' '.join(options)}: expected one benchmark that takes options: serving",
                file=sys.stderr,
            )
            return 2
        if lack := getattr(module, "lacks", str)():
            print(f"bench: {name} is not measured: {lack}", file=sys.stderr)
            if names:
                return 99
            continue
        print(f"== {name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        load = _load()
        numbers = module.measure(*options)
        _write(name, options, _part(module, options, numbers, max(load, _load())), known)
        print(json.dumps(numbers), flush=True)
    return 0


_HEAD = """# Benchmarks

Written by `make bench` (all) and `make bench-NAME` (one). Both sides of each ratio were measured in the same run. Numbers that
were measured while other programs took more than a tenth of a core are provisional, and it is said there.

`make bench-serving ARGS="--only peers,memory --memory-minutes 2"` measures parts of one, and writes them into a section of their own;
the parts are `cpu`, `rows`, `workers`, `changes`, `attacks`, `peers` and `memory`.
"""


def _write(name: str, options: list[str], part: str, known: list[str]) -> None:
    """Put what was measured into the page, in place of what was measured so before; a whole benchmark also of its parts."""
    page = HERE.parent / "docs" / "benchmarks.md"
    _, *parts = re.split(r"^## ", page.read_text(), flags=re.MULTILINE) if page.exists() else [""]
    kept = {text.partition("\n")[0]: text.partition("\n")[2].strip() for text in parts}
    if not options:
        kept = {title: text for title, text in kept.items() if title.split()[0] != name}
    kept[" ".join([name, *options])] = part
    titles = [title for title in sorted(kept) if title.split()[0] in known]
    page.write_text("\n".join([_HEAD, *(f"## {title}\n\n{kept[title]}\n" for title in titles)]))


def _part(module: ModuleType, options: list[str], numbers: dict[str, float], load: float) -> str:
    if hasattr(module, "report"):  # words, or more than one column
        table = module.report(numbers)
    else:
        rows = [f"| `{key}` | {value} | {module.GOALS.get(key, '')} |" for key, value in numbers.items()]
        table = "\n".join(["| number | value | goal |", "|---|---|---|", *rows])
    name = module.__name__
    what = f"Parts of [{name}](#{name}), measured alone." if options else (module.__doc__ or "").strip()
    busy = (
        f" **Provisional:** other programs took {load:.1f} cores when it began or ended."
        if load > 0.1
        else ""
    )
    return f"{what}\n\n{_machine()}.{busy}\n\n{table}"


def _load() -> float:
    """How many cores other programs use now."""
    return psutil.cpu_percent(interval=3) / 100 * (os.cpu_count() or 1)


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
