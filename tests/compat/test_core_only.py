"""An Airflow with nothing but the core installed runs a stage whose libraries it does not have.

The Airflow is made once in ``.cache``, with the versions of ``constraints.txt``, and so is the environment that the
runner builds; the package is built anew for each run, as a wheel.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.prepare_data import PrepareData
from lepton_airflow.store import Store

ROOT = Path(__file__).parents[2]
PINS = ROOT / "constraints.txt"
CACHE = ROOT / ".cache"

pytestmark = [
    pytest.mark.network,
    pytest.mark.timeout(900),
]  # the first run installs an Airflow, and an environment for the stage


@pytest.fixture(scope="session")
def core_only() -> Path:
    """An environment with the core's declared dependencies; beside its ``bin`` lies an empty Airflow database."""
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    key = hashlib.sha256(f"{core}{sys.version}{PINS.read_text()}".encode()).hexdigest()[:12]
    home = CACHE / f"core-only-{key}"
    CACHE.mkdir(exist_ok=True)
    uv, python = str(Path(sys.executable).with_name("uv")), str(home / "bin" / "python")
    database = {"AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    with (CACHE / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / ".complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            _call([uv, "venv", "--python", sys.executable, str(home)])
            _call([uv, "pip", "install", "--python", python, "-c", str(PINS), *core])
            _call([python, "-m", "airflow", "db", "migrate"], os.environ | database)
            (home / ".complete").touch()
    return home


@pytest.fixture
def environment(core_only: Path, tmp_path: Path) -> dict[str, str]:
    """What Airflow's processes there are started with: a home of their own, and the freshly built wheel."""
    _call([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "package")
    (tmp_path / "dags").mkdir()
    shutil.copy(core_only / "airflow.db", tmp_path)
    # A machine's certificates and proxies stay; nothing of this Python or of another Airflow.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "PYTHON", "VIRTUAL_ENV"))}
    return kept | {
        # The tests' own bin comes last, for uv.
        "PATH": os.pathsep.join([str(core_only / "bin"), os.defpath, str(Path(sys.executable).parent)]),
        "PYTHONPATH": str(tmp_path / "package"),
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__LEPTON__STORE": str(tmp_path / "store"),
        "AIRFLOW__LEPTON__ENVIRONMENTS": str(CACHE / "environments"),
        "AIRFLOW__LEPTON__CONSTRAINTS": str(PINS),
    }


def _call(command: list[str], env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


def test_no_engine_is_installed(core_only: Path, environment: dict[str, str]) -> None:
    code = """
import importlib.util, json
engines = ["duckdb", "evidently", "numpy", "pandas", "pyarrow", "scipy", "sklearn"]
print(json.dumps([name for name in engines if importlib.util.find_spec(name)]))
"""
    assert json.loads(_call([str(core_only / "bin" / "python"), "-c", code], environment)) == []


DAG = """
import json
from datetime import UTC, datetime

from airflow.sdk import DAG

from lepton_airflow.operators import CheckDriftOperator
from lepton_airflow.runners import Venv

with DAG("watch", schedule=None, start_date=datetime(2026, 1, 1, tzinfo=UTC)) as dag:
    CheckDriftOperator(task_id="drift", runner=Venv("drift"), **json.loads({arguments!r}))

if __name__ == "__main__":
    run = dag.test()
    (task,) = run.get_task_instances()
    print("ended:", json.dumps([task.state, task.xcom_pull(task_ids="drift", key="columns")]))
"""


def test_drift_is_checked_where_airflow_has_no_pandas(
    core_only: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    prepared = _prepared(tmp_path)
    arguments = {"reference": prepared["profile"], "dataset": prepared["test"], "cluster_column": None}
    file = tmp_path / "dags" / "watch.py"
    file.write_text(DAG.format(arguments=json.dumps(arguments)))
    printed = _call([str(core_only / "bin" / "python"), str(file)], environment, tmp_path)
    ended = next(line for line in printed.splitlines() if line.startswith("ended: "))
    state, columns = json.loads(ended.removeprefix("ended: "))
    assert state == "success", printed
    assert columns[0] == "radius"
    assert "texture" not in columns
    (receipt,) = (json.loads(file.read_bytes()) for file in (tmp_path / "store" / "receipts").iterdir())
    assert receipt["status"] == "done"
    assert set(receipt["versions"]) == {"duckdb", "evidently", "scipy"}
    assert Store(str(tmp_path / "store")).fetch(receipt["artifacts"]["report"]["uri"], tmp_path).exists()


_LATER = "2026-02-01"


def _prepared(folder: Path) -> dict[str, Any]:
    """Tumours to learn from, and later ones that measure twice as large; made here, where the libraries are."""
    import pandas as pd
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer(as_frame=True)
    frame = bunch.frame[["mean radius", "mean texture"]].set_axis(["radius", "texture"], axis=1)
    frame["malignant"] = bunch.target.map({0: "yes", 1: "no"})
    frame["day"] = pd.date_range("2025-01-01", periods=len(frame), freq="D")
    later = frame.day >= _LATER
    frame.loc[later, "radius"] *= 2
    frame.to_parquet(folder / "tumours.parquet")
    stage = PrepareData(
        snapshot=str(folder / "tumours.parquet"),
        target="malignant",
        split="time",
        time_column="day",
        test_start=_LATER,
    )
    result = stage.run(RunInfo.local(folder / "made"))
    return {name: artifact.uri for name, artifact in result.artifacts.items()}
