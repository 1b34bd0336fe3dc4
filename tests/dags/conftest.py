"""One real Airflow for all tests here: the project's DAGs and the drills' DAGs, with real MLflow beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lepton_airflow.testing import LocalAirflow, LocalMlflow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMlflow]:
    """A real MLflow server on sqlite."""
    with LocalMlflow(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(scope="session")
def password() -> str:
    """The secret of the Connection ``drill_database``."""
    return "correct-horse-battery-staple"


@pytest.fixture(scope="session")
def airflow(
    tmp_path_factory: pytest.TempPathFactory,
    mlflow: LocalMlflow,
    raw_flights: Path,
    password: str,
    new_airflow_database: Callable[[], str | None],
) -> Iterator[LocalAirflow]:
    """A running Airflow on PostgreSQL (sqlite where there is none); lost heartbeats are noticed after 15 s, not 300."""
    home = tmp_path_factory.mktemp("airflow")
    bundles = [
        {
            "name": name,
            "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
            "kwargs": {"path": str(path)},
        }
        for name, path in (("project", ROOT / "dags"), ("drills", Path(__file__).parent / "bundle"))
    ]
    running = LocalAirflow(
        home,
        ROOT / "dags",
        parallelism=4,
        database=new_airflow_database(),
        env={
            "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(bundles),
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "15",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "3",
            "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
            "AIRFLOW__LEPTON__STORE": str(home / "store"),
            "AIRFLOW_VAR_FLIGHTS_RAW": str(raw_flights),
            "AIRFLOW_CONN_MLFLOW_DEFAULT": mlflow.connection,
            "AIRFLOW_CONN_DRILL_DATABASE": json.dumps(
                {"conn_type": "postgres", "host": "db.example", "login": "me", "password": password}
            ),
        },
    )
    with running:
        for dag_id in ("wait", "count", "flights_retrain", "one_stage"):
            running.wait_for_dag(dag_id)
        yield running
