"""One real Airflow for all files here, with the project's DAGs and the drills' DAGs; beside it a real MLflow."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from lepton_airflow.testing import LocalAirflow, LocalEndpoint, LocalMlflow

ROOT = Path(__file__).parents[2]
BUNDLES = {"project": ROOT / "dags", "drills": Path(__file__).parent / "bundle"}


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
def few_flights(raw_flights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fourth of the raw flights, the other sources whole: the chain is tested here, and not the model."""
    folder = shutil.copytree(raw_flights, tmp_path_factory.mktemp("raw") / "flights_raw")
    for month in (folder / "flights").iterdir():
        header, *rows = month.read_text().splitlines(keepends=True)
        month.write_text("".join([header, *rows[::4]]))
    return folder


@pytest.fixture(scope="session")
def make_airflow(
    tmp_path_factory: pytest.TempPathFactory,
    few_flights: Path,
    password: str,
    new_airflow_database: Callable[[], str | None],
) -> Callable[..., LocalAirflow]:
    """``make_airflow("drills", env={…})``: an Airflow with these bundles, on PostgreSQL (sqlite where there is none).

    Lost heartbeats are noticed after 30 s, not 300, so that drills end. Its user must log in.
    """

    def make(*bundles: str, env: Mapping[str, str]) -> LocalAirflow:
        home = tmp_path_factory.mktemp("airflow")
        config = [
            {
                "name": name,
                "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
                "kwargs": {"path": str(BUNDLES[name])},
            }
            for name in bundles
        ]
        settings = {
            "AIRFLOW__API__AUTO_REFRESH_INTERVAL": "10",  # a page asks every 3 s by default, at the cost of the tasks
            "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(config),
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "3",
            "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
            "AIRFLOW__LEPTON__STORE": str(home / "store"),
            "AIRFLOW_VAR_FLIGHTS_RAW": str(few_flights),
            "AIRFLOW_CONN_DRILL_DATABASE": json.dumps(
                {"conn_type": "postgres", "host": "db.example", "login": "me", "password": password}
            ),
        }
        return LocalAirflow(
            home,
            ROOT / "dags",
            parallelism=4,
            env=settings | env,
            database=new_airflow_database(),
            password=secrets.token_hex(8),
        )

    return make


@pytest.fixture(scope="session")
def airflow(make_airflow: Callable[..., LocalAirflow], mlflow: LocalMlflow) -> Iterator[LocalAirflow]:
    """A running Airflow with the project's DAGs and those of the drills."""
    with make_airflow("project", "drills", env={"AIRFLOW_CONN_MLFLOW_DEFAULT": mlflow.connection}) as running:
        for dag_id in ("wait", "count", "keep", "monthly", "flights_retrain", "flights_watch", "one_stage"):
            running.wait_for_dag(dag_id)
        yield running


@pytest.fixture(scope="session")
def endpoint(airflow: LocalAirflow) -> Iterator[LocalEndpoint]:
    """The model server of flights_retrain, for backfills that deploy."""
    with LocalEndpoint("flights-late", str(airflow.home / "store"), airflow.home / "endpoint") as server:
        yield server
