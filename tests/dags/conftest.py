"""One real Airflow for all tests here: the project's DAGs and the drills' DAGs, with real MLflow beside it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lepton_airflow.testing import LocalAirflow
from lepton_airflow.testing.local_airflow import end_process, free_port

ROOT = Path(__file__).parents[2]
PASSWORD = "correct-horse-battery-staple"


@pytest.fixture(scope="session")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on sqlite."""
    home = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    with (home / "log").open("wb") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
                *("--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--workers", "1"),
                *("--artifacts-destination", str(home / "artifacts")),
            ],
            cwd=home,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (home / "log").read_text()
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
        return False

    try:
        LocalAirflow(home, home).until(answers, "MLflow to answer", 90)
        yield url
    finally:
        end_process(process.pid)


@pytest.fixture(scope="session")
def airflow(
    tmp_path_factory: pytest.TempPathFactory, mlflow_url: str, raw_flights: Path
) -> Iterator[LocalAirflow]:
    """A running Airflow; lost heartbeats are noticed after 15 s, not 300, so that drills end."""
    home = tmp_path_factory.mktemp("airflow")
    bundles = [
        {"name": name, "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle", "kwargs": {"path": str(path)}}
        for name, path in (("project", ROOT / "dags"), ("drills", Path(__file__).parent / "bundle"))
    ]
    export = home / "airports.parquet"
    running = LocalAirflow(
        home,
        ROOT / "dags",
        parallelism=4,
        env={
            "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(bundles),
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "15",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "3",
            "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
            "AIRFLOW__LEPTON__STORE": str(home / "store"),
            "AIRFLOW_VAR_FLIGHTS_RAW": str(raw_flights),
            "AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps({"conn_type": "http", "host": mlflow_url}),
            "AIRFLOW_CONN_DRILL_DATABASE": json.dumps(
                {"conn_type": "postgres", "host": "db.example", "login": "me", "password": PASSWORD}
            ),
            "NIGHTLY_EXPORT": str(export),
        },
    )
    with running:
        for dag_id in ("wait", "count", "flights_retrain", "one_stage"):
            running.wait_for_dag(dag_id)
        yield running
