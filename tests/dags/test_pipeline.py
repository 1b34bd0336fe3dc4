"""The whole chain on real flights in a real Airflow: backfills, the cache, and who moves production."""

from __future__ import annotations

from typing import Any

import pytest

from lepton_airflow.registry import Ledger
from lepton_airflow.store import Store
from lepton_airflow.testing import LocalAirflow

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(900)]

DAG = "flights_retrain"
QUICK = {"trainer": "logistic_regression", "trials": 2}  # what is tested here is the chain, not the model


def _backfill(
    airflow: LocalAirflow, first: str, last: str, conf: dict[str, Any], reprocess: str = "none"
) -> None:
    body = {
        "dag_id": DAG,
        "from_date": f"{first}-01T00:00:00Z",
        "to_date": f"{last}-01T00:00:00Z",
        "max_active_runs": 2,
        "reprocess_behavior": reprocess,
        "dag_run_conf": QUICK | conf,
    }
    backfill = airflow.api("POST", "/backfills", body)["id"]
    airflow.until(
        lambda: airflow.api("GET", f"/backfills/{backfill}")["completed_at"] is not None,
        "the backfill to end",
        600,
    )


def _receipts(airflow: LocalAirflow, month: str) -> dict[str, Any]:
    (run,) = [r for r in airflow.runs(DAG) if r["logical_date"].startswith(month)]
    tasks = airflow.tasks(DAG, run["dag_run_id"])
    assert {t["state"] for t in tasks.values()} == {"success"}, {n: t["state"] for n, t in tasks.items()}
    return {name: airflow.xcom(DAG, run["dag_run_id"], name) for name in tasks}


@pytest.fixture(scope="module")
def ledger(airflow: LocalAirflow) -> Ledger:
    return Ledger(Store(str(airflow.home / "store")), "flights_late")


def test_a_backfill_of_two_months_at_once_registers_and_moves_nothing(
    airflow: LocalAirflow, ledger: Ledger
) -> None:
    _backfill(airflow, "2013-06", "2013-07", {})
    for month in ("2013-06", "2013-07"):
        receipts = _receipts(airflow, month)
        assert receipts["promote"]["values"]["moved"] is False
        assert receipts["evaluate"]["metrics"]["roc_auc_low"] > 0.5
        assert receipts["ingest"]["values"]["rows"] > 100_000
    assert ledger.entries() == []
    versions = {
        _receipts(airflow, month)["register"]["values"]["version"] for month in ("2013-06", "2013-07")
    }
    assert versions == {1, 2}


def test_the_same_months_again_are_taken_from_the_cache(airflow: LocalAirflow) -> None:
    before = {month: _receipts(airflow, month) for month in ("2013-06", "2013-07")}
    _backfill(airflow, "2013-06", "2013-07", {}, reprocess="completed")
    for month, earlier in before.items():
        now = _receipts(airflow, month)
        cached = {name for name, receipt in now.items() if receipt["status"] == "cached"}
        assert cached == {"ingest", "validate", "prepare", "tune", "train", "evaluate"}
        assert now["train"]["artifacts"] == earlier["train"]["artifacts"]
        assert now["register"]["values"] == earlier["register"]["values"]  # one version per task instance


def test_a_full_backfill_makes_a_champion_that_older_months_cannot_replace(
    airflow: LocalAirflow, ledger: Ledger
) -> None:
    _backfill(airflow, "2013-07", "2013-07", {"on_backfill": "full"}, reprocess="completed")
    promoted = _receipts(airflow, "2013-07")["promote"]["values"]
    assert (promoted["decision"], promoted["moved"]) == ("bootstrap", True)

    _backfill(airflow, "2013-06", "2013-06", {"on_backfill": "full"}, reprocess="completed")
    older = _receipts(airflow, "2013-06")["promote"]["values"]
    assert (older["decision"], older["moved"]) == ("hold", False)
    assert "newer" in older["reason"]
    assert [entry.version for entry in ledger.entries()] == [promoted["champion"]]


def test_a_run_without_a_data_interval_says_what_to_do(airflow: LocalAirflow) -> None:
    run = airflow.trigger(DAG, QUICK)
    assert airflow.wait(DAG, run) == "failed"
    log = airflow.log(DAG, run, "ingest")
    assert "this run has no window" in log
    assert "this kind of run has no data interval: give the asset event" in log
    assert airflow.tasks(DAG, run)["ingest"]["try_number"] == 1  # exit code 80: retries would not help


def test_one_stage_in_a_team_s_own_dag(airflow: LocalAirflow) -> None:
    run = airflow.trigger("one_stage")
    assert airflow.wait("one_stage", run) == "success"
    assert airflow.xcom("one_stage", run, "check", "passed") is True
