"""The watch: it shares its results with the retraining, and a backfill of it starts nothing unless it is told to act."""

from __future__ import annotations

import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.registry.ledger import Ledger
from lepton_airflow.store import Store
from lepton_airflow.testing import LocalAirflow, LocalEndpoint

DAGS = Path(__file__).parents[2] / "dags"
WATCH, RETRAIN = "flights_watch", "flights_retrain"
MONTH = "2013-11"
WINDOW = {"start": "2013-11-01T00:00:00+00:00", "end": "2013-12-01T00:00:00+00:00"}


def _watch(airflow: LocalAirflow, conf: dict[str, Any]) -> dict[str, Any]:
    """What the watch of the month said."""
    backfill = airflow.backfill(WATCH, f"{MONTH}-01", f"{MONTH}-01", conf, reprocess="completed")
    airflow.wait_for_backfill(backfill, 300)
    (run,) = (r for r in airflow.runs(WATCH) if (r["logical_date"] or "").startswith(MONTH))
    assert run["state"] == "success"
    values: dict[str, Any] = airflow.xcom(WATCH, run["dag_run_id"], "check_drift")["values"]
    return values


def _stop(airflow: LocalAirflow, run: str) -> None:
    """End a retraining early: what follows is tested elsewhere."""
    airflow.api("PATCH", f"/dags/{RETRAIN}/dagRuns/{run}", {"state": "failed"})


def _started_by_assets(airflow: LocalAirflow) -> list[str]:
    return [r["dag_run_id"] for r in airflow.runs(RETRAIN) if r["run_type"] == "asset_triggered"]


@pytest.mark.parametrize("task", ["ingest", "prepare"])
def test_watch_and_retraining_prepare_alike_so_that_they_share_results(task: str) -> None:
    watch, retrain = (runpy.run_path(str(DAGS / f"{dag_id}.py"))[task] for dag_id in (WATCH, RETRAIN))
    for field in fields(watch.stage):
        mine, theirs = (getattr(operator, field.name) for operator in (watch, retrain))
        assert str(mine).replace(WATCH, RETRAIN) == str(theirs), field.name


@pytest.mark.airflow
@pytest.mark.timeout(900)
def test_drift_starts_a_retraining_over_its_month(airflow: LocalAirflow, endpoint: LocalEndpoint) -> None:
    airflow.wait_for_dag(WATCH)
    ledger = Ledger(Store(str(airflow.home / "store")), "flights_late")
    if not ledger.entries():  # when this file is run alone
        conf = {"trainer": "logistic_regression", "trials": 1, "on_backfill": "full"}
        airflow.backfill(RETRAIN, "2013-04-01", "2013-04-01", conf)
        airflow.until(lambda: bool(ledger.entries()), "a first champion", 600)
        (made,) = (r for r in airflow.runs(RETRAIN) if (r["logical_date"] or "").startswith("2013-04"))
        _stop(airflow, made["dag_run_id"])

    seen = _watch(airflow, {"min_columns": 1})
    assert (seen["drifted"], seen["retrain"]) == (True, False)
    assert "temp" in seen["columns"]
    assert "this is a backfill" in seen["reason"]
    assert _started_by_assets(airflow) == []

    acted = _watch(airflow, {"min_columns": 1, "on_backfill": "full"})
    assert (acted["retrain"], acted["columns"]) == (True, seen["columns"])
    airflow.until(lambda: len(_started_by_assets(airflow)) == 1, "the retraining to start", 60)
    (run,) = _started_by_assets(airflow)
    (event,) = airflow.api("GET", f"/dags/{RETRAIN}/dagRuns/{run}/upstreamAssetEvents")["asset_events"]
    assert event["extra"]["window"] == WINDOW
    assert event["extra"]["reason"] == acted["reason"]
    airflow.until(lambda: airflow.tasks(RETRAIN, run)["prepare"]["state"] == "success", "it to prepare", 300)
    airflow.api(
        "PATCH", f"/dags/{RETRAIN}/dagRuns/{run}", {"state": "failed"}
    )  # what follows is tested elsewhere
    assert airflow.xcom(RETRAIN, run, "ingest")["status"] == "cached"  # the watch computed them
    assert airflow.xcom(RETRAIN, run, "prepare")["status"] == "cached"
