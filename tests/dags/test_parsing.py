"""Every DAG file parses with Airflow alone: nothing heavy imported, nothing looked up, nothing fetched."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lepton_airflow.operators import StageOperator
from lepton_airflow.runners import Pod

DAGS = Path(__file__).parents[2] / "dags"
FILES = sorted(DAGS.glob("*.py"))
HEAVY = [
    "adbc_driver_manager",
    "duckdb",
    "evidently",
    "great_expectations",
    "kubernetes",
    "kubernetes_asyncio",
    "matplotlib",
    "mlflow",
    "numpy",
    "onnx",
    "onnxruntime",
    "optuna",
    "pandas",
    "pyarrow",
    "scipy",
    "skl2onnx",
    "sklearn",
    "sqlalchemy_adbc",
    "torch",
]
# Of ours, what only the work of a stage needs: every task parses its DAG.
WORK = (
    *(
        "data.expectations",
        "data.features",
        "data.sorting",
        "data.sources",
        "evaluation.plots",
        "evaluation.rows",
    ),
    *(
        "execution",
        "models",
        "packaging",
        "serving",
        "statistics",
        "store.cache",
        "store.checkpoints",
    ),
    *("store.eviction", "training", "triggers"),
    # Of pods, a DAG file needs the settings.
    *("pods.attempt", "pods.cluster", "pods.diagnosis", "pods.lifecycle", "pods.manifest", "pods.watch"),
)

# Runs in an interpreter of its own. A look-up or a connection while parsing ends it with what was tried.
PARSE = """
import gc, json, runpy, socket, sys
import airflow.sdk
from airflow.sdk import Connection, Variable
def refuse(what):
    def refused(*args, **kwargs):
        raise AssertionError(f"{what} while parsing: {args[1:] or kwargs}")
    return refused
Connection.get = classmethod(refuse("Connection looked up"))
Variable.get = classmethod(refuse("Variable looked up"))
before = set(sys.modules)
socket.socket.connect = refuse("network used")
socket.getaddrinfo = refuse("name resolved")
names = runpy.run_path(sys.argv[1])
dags = [o for o in gc.get_objects() if issubclass(type(o), airflow.sdk.DAG)]  # isinstance would wake lazy proxies
print(json.dumps({
    "dags": sorted({d.dag_id for d in dags}),
    "heavy": sorted({m.partition(".")[0] for m in set(sys.modules) - before} & set(sys.argv[2:])),
    "ours": sorted(m.partition(".")[2] for m in set(sys.modules) - before if m.startswith("lepton_airflow.")),
}))
"""


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_dag_file_parses_with_airflow_alone(file: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(file), *HEAVY],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"AIRFLOW_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["dags"] == [file.stem]
    assert found["heavy"] == []
    assert [name for name in found["ours"] if name.startswith(WORK)] == []


def test_twelve_tasks_each_have_a_pod() -> None:
    names = runpy.run_path(str(DAGS / "flights_retrain_pods.py"))
    tasks = [value for value in names.values() if isinstance(value, StageOperator)]
    assert len(tasks) == 12
    assert {type(task.runner) for task in tasks} == {Pod}
    assert len({(task.runner.cpu, task.runner.memory) for task in tasks}) > 2  # as large as its stage needs


def test_one_stage_is_a_short_file() -> None:
    lines = (DAGS / "one_stage.py").read_text().splitlines()
    assert len(lines) < 25
