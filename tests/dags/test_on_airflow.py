"""On a real Airflow: kill, retry, clear, map and expire a team's own stages; runs that have no data or no window."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from lepton_airflow.contract import split_pin
from lepton_airflow.testing import LocalAirflow

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(900)]

DAG = "flights_retrain"
QUICK = {"trainer": "logistic_regression", "trials": 2}


def _starts(folder: Path) -> list[int]:
    file = folder / "starts"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _wait_run(airflow: LocalAirflow, folder: Path) -> str:
    run = airflow.trigger("wait", {"folder": str(folder)})
    airflow.until(lambda: len(_starts(folder)) == 1, "the stage to start", 120)
    return run


def test_a_killed_stage_is_retried(airflow: LocalAirflow, tmp_path: Path) -> None:
    run = _wait_run(airflow, tmp_path)
    os.kill(_starts(tmp_path)[0], signal.SIGKILL)
    airflow.until(lambda: len(_starts(tmp_path)) == 2, "the second try to start", 60)
    (tmp_path / "go").touch()
    assert airflow.wait("wait", run) == "success"
    assert airflow.xcom("wait", run, "wait", "starts") == 2
    assert "was killed (SIGKILL)" in airflow.log("wait", run, "wait", 1)


def test_a_killed_worker_leaves_nothing_running_and_is_retried(airflow: LocalAirflow, tmp_path: Path) -> None:
    both, alone = tmp_path / "supervisor and task", tmp_path / "supervisor alone"
    both.mkdir()
    alone.mkdir()
    # Side by side, because most of it is waiting.
    runs = {folder: _wait_run(airflow, folder) for folder in (both, alone)}
    stages = {folder: _starts(folder)[0] for folder in runs}
    tasks = {folder: _parent(stage) for folder, stage in stages.items()}
    for task in tasks.values():
        os.kill(_parent(task), signal.SIGKILL)  # the supervisor, so that nobody reports the task's end
    os.kill(tasks[both], signal.SIGKILL)
    airflow.until(lambda: not any(map(_running, stages.values())), "the stages to end with their workers", 15)
    airflow.until(
        lambda: not any(map(_running, tasks.values())), "the tasks to end with their supervisors", 30
    )
    airflow.until(lambda: all(len(_starts(folder)) == 2 for folder in runs), "Airflow to try both again", 240)
    for folder, run in runs.items():
        (folder / "go").touch()
        assert airflow.wait("wait", run) == "success"


def test_a_task_marked_failed_stops_its_stage(airflow: LocalAirflow, tmp_path: Path) -> None:
    run = _wait_run(airflow, tmp_path)
    stage = _starts(tmp_path)[0]
    airflow.api("PATCH", f"/dags/wait/dagRuns/{run}/taskInstances/wait", {"new_state": "failed"})
    airflow.until(lambda: not _running(stage), "the stage to end", 30)
    assert len(_starts(tmp_path)) == 1


def test_a_cleared_running_task_starts_again_alone(airflow: LocalAirflow, tmp_path: Path) -> None:
    run = _wait_run(airflow, tmp_path)
    first = _starts(tmp_path)[0]
    airflow.clear("wait", run, ["wait"])
    airflow.until(lambda: len(_starts(tmp_path)) == 2, "the cleared task to start", 60)
    assert not _running(first)
    (tmp_path / "go").touch()
    assert airflow.wait("wait", run) == "success"


def test_mapped_tasks_cache_windows_and_secrets(airflow: LocalAirflow, password: str) -> None:
    first = airflow.trigger("count", {"text": "letters"})
    assert airflow.wait("count", first) == "success"
    assert [airflow.xcom("count", first, "each", "letters", i) for i in range(3)] == [1, 2, 3]
    assert airflow.xcom("count", first, "sum", "letters") == 1 + 2 + 3
    assert airflow.xcom("count", first, "total", "letters") == len("letters") + len(password)
    assert airflow.xcom("count", first, "own")["status"] == "done"

    again = airflow.trigger("count", {"text": "letters"})
    assert airflow.wait("count", again) == "success"
    assert airflow.xcom("count", again, "own")["status"] == "cached"
    assert airflow.xcom("count", again, "each", map_index=1)["status"] == "cached"
    assert airflow.xcom("count", again, "total")["status"] == "done"  # cache="off"

    forced = airflow.trigger("count", {"text": "letters", "refresh_cache": True})
    assert airflow.wait("count", forced) == "success"
    assert airflow.xcom("count", forced, "own")["status"] == "done"

    blob = Path(split_pin(airflow.xcom("count", forced, "own", "count"))[0].removeprefix("file://"))
    blob.write_text("8")
    healed = airflow.trigger("count", {"text": "letters"})
    assert airflow.wait("count", healed) == "success"
    assert airflow.xcom("count", healed, "own")["status"] == "done"
    assert blob.read_text() == "7"

    _assert_nowhere(airflow, password)


def _assert_nowhere(airflow: LocalAirflow, secret: str) -> None:
    """The secret is neither in the database (XComs, rendered fields), nor in a log, nor in the store."""
    files = [p for p in airflow.home.rglob("*") if p.is_file()]
    assert any("attempt=1" in p.name for p in files)
    if airflow.database:
        dump = airflow.home / "dump.sql"
        address = airflow.database.replace("+psycopg2", "")
        subprocess.run(["pg_dump", "--inserts", "--file", dump, address], check=True, timeout=60)
        files.append(dump)
    assert any(b"letters" in p.read_bytes() for p in files if p.name in ("airflow.db", "dump.sql"))
    forms = (secret.encode(), secret.encode().hex().encode())  # a dump shows bytes in hexadecimal digits
    holders = [str(p) for p in files if any(form in p.read_bytes() for form in forms)]
    assert holders == []


def test_a_store_that_another_airflow_uses_under_this_name_is_refused(airflow: LocalAirflow) -> None:
    run = airflow.trigger("one_stage")
    assert airflow.wait("one_stage", run) == "success"
    own = airflow.api("GET", "/variables/lepton_installation")["value"]
    (owner,) = (airflow.home / "store" / "deployments").iterdir()
    assert owner.read_text() == own
    owner.write_text("another's")
    try:
        refused = airflow.trigger("one_stage")
        assert airflow.wait("one_stage", refused) == "failed"
    finally:
        owner.write_text(own)
    log = airflow.log("one_stage", refused, "check")
    assert "under [lepton] deployment='airflow'" in log
    assert "set [lepton] deployment to another name here" in log
    assert airflow.tasks("one_stage", refused)["check"]["try_number"] == 1


def test_an_asset_event_brings_its_window(airflow: LocalAirflow) -> None:
    (asset,) = [a for a in airflow.api("GET", "/assets")["assets"] if a["name"] == "letters-arrived"]
    window = {"start": "2026-03-01T00:00:00+00:00", "end": "2026-04-01T00:00:00+00:00"}
    before = {r["dag_run_id"] for r in airflow.runs("count")}
    airflow.api("POST", "/assets/events", {"asset_id": asset["id"], "extra": {"window": window}})
    airflow.until(
        lambda: bool({r["dag_run_id"] for r in airflow.runs("count")} - before), "the event's run", 60
    )
    (run,) = {r["dag_run_id"] for r in airflow.runs("count")} - before
    assert airflow.wait("count", run) == "success"
    assert airflow.xcom("count", run, "own", "window") == [window["start"], window["end"]]


def test_a_month_without_data_is_skipped(airflow: LocalAirflow) -> None:
    run = airflow.trigger(DAG, QUICK, logical_date="2026-11-22T00:00:00Z")
    assert airflow.wait(DAG, run) == "success"
    assert {t["state"] for t in airflow.tasks(DAG, run).values()} == {"skipped"}
    assert "gives no row" in airflow.log(DAG, run, "ingest")


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
