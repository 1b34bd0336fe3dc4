"""The wheel, with the core's dependencies and no engine, works on the oldest Airflow that is supported.

The environment is made once in ``.cache``; the package is built anew for each run, as a wheel, so that what
is tried is what would be installed.
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
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINS = Path(__file__).with_name("airflow-3.1.txt")

Run = Callable[..., str]
pytestmark = pytest.mark.timeout(900)  # the first run installs an Airflow


@pytest.fixture(scope="session")
def airflow_31() -> Path:
    """The interpreter of an environment with Airflow 3.1, the core's declared dependencies and pytest."""
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    key = hashlib.sha256(f"{core}{sys.version}{PINS.read_text()}".encode()).hexdigest()[:12]
    home = ROOT / ".cache" / f"airflow-3.1-{key}"
    home.parent.mkdir(exist_ok=True)
    python, complete = home / "bin" / "python", home / ".complete"
    with (home.parent / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(home, ignore_errors=True)
            uv = [sys.executable, "-m", "uv"]  # installs in a fifth of pip's time
            for command in (
                [*uv, "venv", "--quiet", "--python", sys.executable, str(home)],
                [
                    *uv,
                    "pip",
                    "install",
                    "--quiet",
                    "--python",
                    str(python),
                    "-c",
                    str(PINS),
                    *core,
                    "pytest",
                    "pytest-timeout",
                ],
            ):
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr}"
            complete.touch()
    return python


@pytest.fixture(scope="session")
def run(airflow_31: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run("-c", code)``: the old environment's Python with the freshly built wheel; returns what it printed."""
    wheels, package, home = (tmp_path_factory.mktemp(name) for name in ("wheels", "package", "home"))
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(build, check=True, capture_output=True, cwd=ROOT)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(package)
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "AIRFLOW_HOME": str(home),
        "PYTHONPATH": str(package),
    }

    def run(*arguments: str) -> str:
        # -P: neither the current folder nor a script's own gets in front of the wheel.
        command = [str(airflow_31), "-P", *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=home, env=env)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-4000:]
        return done.stdout

    return run


def test_operators_import_with_nothing_heavy_installed(run: Run) -> None:
    code = """
import airflow, importlib.util, json, lepton_airflow.operators as operators
engines = ["duckdb", "great_expectations", "mlflow", "numpy", "onnxruntime", "optuna", "pandas", "sklearn", "torch"]
installed = [name for name in engines if importlib.util.find_spec(name)]
print(json.dumps([airflow.__version__, operators.__file__, installed, operators.__all__]))
"""
    version, file, installed, names = json.loads(run("-c", code).splitlines()[-1])
    assert version.startswith("3.1.")
    assert not Path(file).is_relative_to(ROOT)
    assert installed == []
    assert "TrainModelOperator" in names


def test_the_entry_point_answers_without_an_engine(run: Run) -> None:
    stages = run("-m", "lepton_airflow", "stages")
    named = {line.split()[0] for line in stages.splitlines()}
    assert {"IngestData", "TrainModel", "RegisterModel"} <= named
    described = run("-m", "lepton_airflow", "describe", "TrainModel")
    assert "trainer" in described
    assert "hyperparameters" in described


def test_every_dag_parses_and_serializes(run: Run) -> None:
    code = f"""
import json
from airflow.models.dagbag import DagBag
from airflow.serialization.serialized_objects import SerializedDAG
bag = DagBag({str(ROOT / "dags")!r}, include_examples=False, safe_mode=False)
for dag in bag.dags.values():
    json.dumps(SerializedDAG.to_dict(dag))
print(json.dumps([bag.import_errors, sorted(bag.dags)]))
"""
    errors, dags = json.loads(run("-c", code).splitlines()[-1])
    assert errors == {}
    assert set(dags) == {file.stem for file in (ROOT / "dags").glob("*.py")}


def test_the_contract_holds(run: Run) -> None:
    tests = str(ROOT / "tests" / "test_contract.py")
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    assert " passed" in run("-m", "pytest", *options, tests)
