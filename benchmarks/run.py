"""Measure: ``make bench-NAME`` runs one benchmark, ``make bench`` all of them and writes docs/benchmarks.md.

A benchmark is a file here with ``GOALS`` and ``measure() -> dict``; it measures both sides of each ratio in one run.
The last line printed is one JSON object of its numbers.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
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
    results = {}
    for name in names or known:
        module = importlib.import_module(name)
        print(f"== {name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        results[name] = (module, module.measure())
        print(json.dumps(results[name][1]), flush=True)
    if not names:
        page = HERE.parent / "docs" / "benchmarks.md"
        page.write_text(_page(results))
        print(f"wrote {page.relative_to(HERE.parent)}")
    return 0


def _page(results: dict[str, tuple[ModuleType, dict[str, float]]]) -> str:
    lines = [
        "# Benchmarks",
        "",
        f"Written by `make bench` on {_machine()}. Both sides of each ratio were measured in the same run.",
        f"Versions: {', '.join(f'{p} {version(p)}' for p in ('apache-airflow', 'duckdb', 'scikit-learn', 'optuna'))}.",
        "",
    ]
    for name, (module, numbers) in results.items():
        lines += [
            f"## {name}",
            "",
            (module.__doc__ or "").strip(),
            "",
            "| number | value | goal |",
            "|---|---|---|",
        ]
        lines += [f"| `{key}` | {value} | {module.GOALS.get(key, '')} |" for key, value in numbers.items()]
        lines.append("")
    return "\n".join(lines)


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
    return f"{os.cpu_count()} cores of {cpu}, {memory_gib:.0f} GiB, Python {platform.python_version()}, at {revision.strip()}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
