"""Bad days on a real Airflow: what is killed, away, full, altered or asked for twice; and what that costs.

A second Airflow, with the same store, is started for the last test.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from lepton_airflow.contract import Artifact, split_pin
from lepton_airflow.errors import LeptonError
from lepton_airflow.registry.ledger import Ledger, registrations
from lepton_airflow.store import Store
from lepton_airflow.testing import LocalAirflow, LocalMlflow, processes

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(600)]


# -- MLflow that can go away in the middle of a call -------------------------------------------------------------------


@dataclass
class Cut:
    """What the proxy between Airflow and MLflow does.

    :param on: the end of a path: with the next call of it MLflow goes away, until ``away`` is set to False.
    :param forwarded: whether MLflow still gets that call, so that only its answer is lost.
    """

    upstream: str
    on: str | None = None
    forwarded: bool = False
    away: bool = False


class _Handler(BaseHTTPRequestHandler):
    cut: Cut

    def _pass_on(self) -> None:
        cut = self.cut
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        last = bool(cut.on) and urlsplit(self.path).path.endswith(cut.on or "")
        if last:
            cut.on, cut.away = None, True
        self.close_connection = True
        if cut.away and not (last and cut.forwarded):
            return
        upstream = http.client.HTTPConnection(urlsplit(cut.upstream).netloc, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        upstream.request(self.command, self.path, body, headers)
        reply = upstream.getresponse()
        content = reply.read()
        upstream.close()
        if cut.away:
            return
        self.send_response(reply.status)
        for name in ("Content-Type", "Content-Disposition"):
            if value := reply.getheader(name):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815 - the names the library calls

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def cut(mlflow: LocalMlflow) -> Cut:
    return Cut(mlflow.url)


@pytest.fixture(scope="module")
def proxy(cut: Cut) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"cut": cut}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def _mlflow(mlflow: LocalMlflow, call: str, body: Mapping[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f"{mlflow.url}/api/2.0/mlflow/{call}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def _versions(mlflow: LocalMlflow, model: str) -> list[int]:
    found = _mlflow(mlflow, f"model-versions/search?filter=name%3D'{model}'")
    return sorted(int(v["version"]) for v in found.get("model_versions", []))


def _aliases(mlflow: LocalMlflow, model: str) -> dict[str, int]:
    found = _mlflow(mlflow, f"registered-models/get?name={model}")["registered_model"]
    return {alias["alias"]: int(alias["version"]) for alias in found.get("aliases", [])}


# -- Airflow -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def airflow(airflow: LocalAirflow, proxy: str) -> Iterator[LocalAirflow]:
    """The Airflow of all files, its scheduler and workers restarted: more patient, and with MLflow behind the proxy."""
    usual = airflow.env
    airflow.env = {
        **usual,
        "AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps({"conn_type": "http", "host": proxy}),
        "AIRFLOW__LEPTON__DEPLOYMENT": "here",
        # With Airflow's own 5 attempts a task gives the API server up after some 7 s; these are 4 minutes.
        "AIRFLOW__WORKERS__EXECUTION_API_RETRIES": "20",
        "AIRFLOW__WORKERS__EXECUTION_API_RETRY_WAIT_MAX": "15",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "300",  # Airflow's own
    }
    _restart_scheduler(airflow)
    yield airflow
    airflow.env = usual
    _restart_scheduler(airflow)


def _restart_scheduler(airflow: LocalAirflow) -> None:
    airflow.stop_component("scheduler", signal.SIGKILL)
    airflow.start_component("scheduler")


@pytest.fixture
def store(airflow: LocalAirflow) -> Store:
    return Store(str(airflow.home / "store"))


def _starts(folder: Path) -> list[int]:
    file = folder / "starts"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_run(airflow: LocalAirflow, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    run = airflow.trigger("wait", {"folder": str(folder)})
    airflow.until(lambda: len(_starts(folder)) == 1, "the stage to start", 90)
    return run


def _start_month(airflow: LocalAirflow, month: str, model: str, on_backfill: str = "register_only") -> int:
    conf = {"model": model, "on_backfill": on_backfill}
    return airflow.backfill("monthly", f"{month}-01", f"{month}-01", conf)


def _run_of(airflow: LocalAirflow, month: str) -> str:
    (run,) = [r["dag_run_id"] for r in airflow.runs("monthly") if r["logical_date"].startswith(month)]
    return str(run)


def _receipts(airflow: LocalAirflow, month: str) -> dict[str, Any]:
    run = _run_of(airflow, month)
    tasks = airflow.tasks("monthly", run)
    assert {t["state"] for t in tasks.values()} == {"success"}, {n: t["state"] for n, t in tasks.items()}
    return {name: airflow.xcom("monthly", run, name) for name in tasks}


# -- what dies ---------------------------------------------------------------------------------------------------------


def test_a_killed_scheduler_costs_one_more_start(airflow: LocalAirflow, tmp_path: Path) -> None:
    run = _wait_run(airflow, tmp_path)
    (first,) = _starts(tmp_path)
    airflow.stop_component("scheduler", signal.SIGKILL)  # and its workers with it, as a power cut would
    airflow.until(lambda: not _running(first), "the stage to end with its worker", 10)
    meanwhile = airflow.trigger("count", {"text": "asked for while nobody scheduled"})
    airflow.start_component("scheduler")
    airflow.until(lambda: len(_starts(tmp_path)) == 2, "the new scheduler to try again", 120)
    (tmp_path / "go").touch()
    assert airflow.wait("wait", run) == "success"
    assert airflow.xcom("wait", run, "wait", "starts") == 2
    assert airflow.wait("count", meanwhile) == "success"


def test_an_api_server_away_for_20_seconds_costs_nothing(airflow: LocalAirflow, tmp_path: Path) -> None:
    through, ends = tmp_path / "through", tmp_path / "ends"
    runs = {folder: _wait_run(airflow, folder) for folder in (through, ends)}
    airflow.stop_component("api-server", signal.SIGKILL)
    back = time.monotonic() + 20
    (ends / "go").touch()  # so this stage ends while nobody takes its result
    processes.until(lambda: not _running(_starts(ends)[0]), "the stage to end", 15)
    processes.until(lambda: time.monotonic() > back, "20 s to pass", 25)
    assert _running(_starts(through)[0])
    airflow.start_component("api-server")
    airflow.wait_until_it_answers()
    (through / "go").touch()
    for folder, run in runs.items():
        assert airflow.wait("wait", run) == "success"
        assert airflow.xcom("wait", run, "wait", "starts") == len(_starts(folder)) == 1


# -- what is asked for twice -------------------------------------------------------------------------------------------


def test_the_same_month_backfilled_twice_at_once_is_computed_once(
    airflow: LocalAirflow, store: Store, mlflow: LocalMlflow
) -> None:
    def start(_: int) -> int | LeptonError:
        try:
            return _start_month(airflow, "2013-01", "twice", "full")
        except LeptonError as error:
            return error

    airflow.api("GET", "/version")  # logs in, once for both
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(start, range(2)))
    accepted = [answer for answer in answers if isinstance(answer, int)]
    assert accepted, answers
    assert all("already a running backfill" in str(a) for a in answers if isinstance(a, LeptonError))
    for backfill in accepted:
        airflow.wait_for_backfill(backfill, 300)
    run = _run_of(airflow, "2013-01")  # there is one
    assert {task["try_number"] for task in airflow.tasks("monthly", run).values()} == {1}
    receipts = _receipts(airflow, "2013-01")
    assert receipts["promote"]["values"]["decision"] == "bootstrap"
    assert [r.version for r in registrations(store, "twice")] == [1]
    assert [entry.version for entry in Ledger(store, "twice").entries()] == [1]
    assert _versions(mlflow, "twice") == [1]


# -- the store ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; only root can mount one, and in some containers not even root."""
    if (
        os.geteuid() != 0
        or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("a full and a read-only disk need the right to mount one: run as root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_and_a_read_only_store_fail_in_a_sentence_and_work_again_when_they_can(
    airflow: LocalAirflow, small_disk: Path
) -> None:
    def fill() -> None:
        with pytest.raises(OSError, match="No space left"):
            (small_disk / "filler").write_bytes(b"x" * 2_000_000)

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", small_disk], check=True)

    for spoil, said, mend in (
        (fill, "No space left on device", (small_disk / "filler").unlink),
        (lambda: remount("ro"), "Read-only file system", lambda: remount("rw")),
    ):
        spoil()
        kept = sorted(p for p in small_disk.rglob("*") if p.is_file())
        run = airflow.trigger("keep", {"store": str(small_disk)})
        assert airflow.wait("keep", run) == "failed"
        log = airflow.log("keep", run, "keep")
        assert said in log
        assert "Check that it is reachable, writable and has space; nothing that was there is changed" in log
        assert sorted(p for p in small_disk.rglob("*") if p.is_file()) == kept
        mend()
        airflow.clear("keep", run, ["keep"])
        assert airflow.wait("keep", run) == "success"
        (count,) = small_disk.glob("artifacts/*/count.txt")
        assert count.read_text() == "7"
        count.unlink()  # so that the next one has to write again


def test_a_package_altered_by_one_byte_is_refused_and_made_anew(
    airflow: LocalAirflow, store: Store, mlflow: LocalMlflow
) -> None:
    airflow.wait_for_backfill(_start_month(airflow, "2013-02", "altered"), 300)
    before = _receipts(airflow, "2013-02")
    run = _run_of(airflow, "2013-02")
    package = Path(split_pin(before["train"]["artifacts"]["model"]["uri"])[0].removeprefix("file://"))
    model = package / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)

    airflow.clear("monthly", run, ["register"], downstream=True)
    assert airflow.wait("monthly", run) == "failed"
    register = airflow.tasks("monthly", run)["register"]
    assert (register["state"], register["try_number"]) == ("failed", 2)  # a retry would not mend it
    assert "pinned to" in airflow.log("monthly", run, "register", 2)
    assert airflow.tasks("monthly", run)["promote"]["state"] == "upstream_failed"

    airflow.clear("monthly", run, ["train"], downstream=True)
    assert airflow.wait("monthly", run) == "success"
    now = _receipts(airflow, "2013-02")
    assert (now["train"]["status"], now["train"]["artifacts"]) == ("done", before["train"]["artifacts"])
    assert now["register"]["values"] == before["register"]["values"]
    assert _versions(mlflow, "altered") == [r.version for r in registrations(store, "altered")] == [1]


# -- MLflow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forwarded", [False, True], ids=["call lost", "answer lost"])
def test_mlflow_away_between_its_two_writes_leaves_one_version(
    airflow: LocalAirflow, store: Store, mlflow: LocalMlflow, cut: Cut, forwarded: bool
) -> None:
    month, model = ("2013-04", "answer-lost") if forwarded else ("2013-03", "call-lost")
    cut.on, cut.forwarded = "/model-versions/create", forwarded  # the package is uploaded by then
    backfill = _start_month(airflow, month, model)
    airflow.until(lambda: cut.away, "the stage to create the version", 180)
    run = _run_of(airflow, month)
    airflow.until(
        lambda: airflow.tasks("monthly", run)["register"]["try_number"] >= 2, "the next try of register", 120
    )
    assert registrations(store, model) == []
    assert _versions(mlflow, model) == ([1] if forwarded else [])
    cut.away = False
    airflow.wait_for_backfill(backfill, 300)
    version = _receipts(airflow, month)["register"]["values"]["version"]
    assert _versions(mlflow, model) == [r.version for r in registrations(store, model)] == [version] == [1]
    experiment = _mlflow(mlflow, f"experiments/get-by-name?experiment_name={model}")["experiment"]
    runs = _mlflow(mlflow, "runs/search", {"experiment_ids": [experiment["experiment_id"]]})["runs"]
    assert [r["info"]["status"] for r in runs] == ["FINISHED"]


# -- two Airflows ------------------------------------------------------------------------------------------------------


@pytest.fixture
def other(
    make_airflow: Callable[..., LocalAirflow], airflow: LocalAirflow, mlflow: LocalMlflow
) -> Iterator[LocalAirflow]:
    """A second Airflow with the store and the MLflow of the first one."""
    env = {
        "AIRFLOW_CONN_MLFLOW_DEFAULT": mlflow.connection,
        "AIRFLOW__LEPTON__STORE": airflow.env["AIRFLOW__LEPTON__STORE"],
        "AIRFLOW__LEPTON__DEPLOYMENT": "there",
    }
    with make_airflow("drills", env=env) as running:
        running.wait_for_dag("monthly")
        yield running


def test_two_airflows_with_one_store_agree_on_one_champion(
    airflow: LocalAirflow, other: LocalAirflow, store: Store, mlflow: LocalMlflow
) -> None:
    backfills = [(each, _start_month(each, "2013-05", "shared", "full")) for each in (airflow, other)]
    for each, backfill in backfills:
        each.wait_for_backfill(backfill, 300)
    here, there = (_receipts(each, "2013-05") for each in (airflow, other))
    assert here["train"]["artifacts"] == there["train"]["artifacts"]
    assert here["register"]["run_key"] != there["register"]["run_key"]
    versions = [tasks["register"]["values"]["version"] for tasks in (here, there)]
    assert sorted(versions) == _versions(mlflow, "shared") == [1, 2]
    assert sorted(r.version for r in registrations(store, "shared")) == [1, 2]

    decisions = {tasks["promote"]["values"]["decision"]: tasks for tasks in (here, there)}
    assert sorted(decisions) == ["bootstrap", "hold"]
    (entry,) = Ledger(store, "shared").entries()
    assert entry.version == decisions["bootstrap"]["register"]["values"]["version"]
    assert decisions["hold"]["promote"]["values"]["champion"] == entry.version
    assert _aliases(mlflow, "shared")["champion"] == entry.version
    for tasks in (here, there):
        for receipt in tasks.values():
            for artifact in receipt["artifacts"].values():
                assert store.present(Artifact(**artifact))
