"""What our operators add to the time in which Airflow parses a DAG file.

`parse_ratio_vs_empty` is the CPU time of a fresh interpreter that imports `dags/flights_retrain.py` over that of one
that imports the same DAG (schedule, params, task ids, dependencies) made of `EmptyOperator`s: medians of alternating
runs. `added_ms_in_warm_process` is what the file adds where Airflow is imported already, as in the DAG processor.
"""

from __future__ import annotations

import re
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

GOALS = {"parse_ratio_vs_empty": "at most 1.15"}
ROUNDS = 9
DAG_FILE = Path(__file__).parent.parent / "dags" / "flights_retrain.py"
_WARM = (
    "import sys, time, airflow.sdk, airflow.providers.standard.operators.empty, runpy\n"
    "start = time.process_time(); runpy.run_path(sys.argv[1]); print(time.process_time() - start)"
)


def measure() -> dict[str, float]:
    """CPU of parsing ours and the empty twin, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder, "flights_empty.py")
        twin.write_text(_twin(DAG_FILE.read_text()))
        ours, empty = [], []
        _cpu_s(DAG_FILE), _cpu_s(twin)  # the first runs also read files from disk
        for _ in range(ROUNDS):
            ours.append(_cpu_s(DAG_FILE))
            empty.append(_cpu_s(twin))
        warm = [_warm_s(DAG_FILE) - _warm_s(twin) for _ in range(ROUNDS)]
    print(f"ours  {[round(s, 2) for s in ours]} s CPU\nempty {[round(s, 2) for s in empty]} s CPU")
    return {
        "parse_ratio_vs_empty": round(statistics.median(ours) / statistics.median(empty), 3),
        "parse_cpu_seconds": round(statistics.median(ours), 2),
        "empty_cpu_seconds": round(statistics.median(empty), 2),
        "added_ms_in_warm_process": round(statistics.median(warm) * 1000, 1),
    }


def _twin(source: str) -> str:
    """The same DAG of EmptyOperators: every task id, param and schedule stays, the stages' arguments go."""
    head, body = source.split("with DAG(", 1)
    dag, tasks = body.split("):\n", 1)
    head = re.sub(r"from lepton_airflow\.operators import \(.*?\)\n", "", head, flags=re.DOTALL)
    names = re.findall(r'^    (\w+) = \w+Operator\(\s*task_id="(\w+)"', tasks, re.MULTILINE)
    assert names, "no tasks found in the DAG file"
    lines = [f'    {name} = EmptyOperator(task_id="{task_id}")' for name, task_id in names]
    lines.append("    " + " >> ".join(name for name, _ in names))
    imports = "from airflow.providers.standard.operators.empty import EmptyOperator\n"
    return f"{head}{imports}with DAG({dag}):\n" + "\n".join(lines) + "\n"


def _cpu_s(file: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(file)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def _warm_s(file: Path) -> float:
    return float(
        subprocess.run(
            [sys.executable, "-c", _WARM, str(file)], check=True, capture_output=True, text=True
        ).stdout
    )
