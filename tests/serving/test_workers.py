"""Several workers behind one port: one version at a time, a death that costs only what it held, one sum of all counters."""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import psutil
import pytest

from lepton_airflow.contract import split_pin
from lepton_airflow.delivery import endpoints
from lepton_airflow.serving import worker
from lepton_airflow.serving.reconcile import Died, NotNow
from lepton_airflow.serving.supervisor import Fleet, Settings
from lepton_airflow.serving.worker import Limits, end_with
from lepton_airflow.store import Store
from lepton_airflow.testing import LocalEndpoint, processes
from tests.serving.test_server import call, deploy, metrics, tensors

if TYPE_CHECKING:
    from lepton_airflow.stages import RunInfo

pytestmark = pytest.mark.slow


@contextmanager
def two_workers(shelf: Any, folder: Path, name: str, *options: str) -> Iterator[LocalEndpoint]:
    ways = ("--poll-s", "0.1", "--workers", "2", *options)
    with LocalEndpoint(name, shelf.run.store.root, folder, options=ways) as server:
        yield server


def workers_of(server: LocalEndpoint) -> list[psutil.Process]:
    """The processes that answer requests: the children of the one that forks them."""
    pid = processes.pid(f"endpoint-{server.endpoint}", server.home)
    forkers = [p for p in psutil.Process(pid).children() if "forkserver" in " ".join(p.cmdline())]
    return [child for forker in forkers for child in forker.children()]


def kill_supervisor(server: LocalEndpoint) -> None:
    """Kill it alone, where LocalEndpoint.kill kills the whole process group."""
    pid = processes.pid(f"endpoint-{server.endpoint}", server.home)
    assert pid
    os.kill(pid, signal.SIGKILL)


def test_a_worker_that_dies_is_replaced_and_costs_only_what_it_held(
    shelf: Any, run_at: RunInfo, tmp_path: Path
) -> None:
    body = json.dumps({"inputs": tensors(shelf.wine.rows[:1], shelf.wine.package)}).encode()
    stop, answered, lost = threading.Event(), Counter[int](), []

    def client(port: int, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while not stop.is_set():
            try:
                connection.request("POST", "/v2/models/two/infer", body)
                answer = connection.getresponse()
                answer.read()
                answered[answer.status] += 1
            except (OSError, http.client.HTTPException):
                lost.append(number)
                connection.close()

    with two_workers(shelf, tmp_path, "two") as server:
        deploy(run_at, "two", shelf.wine.uri)
        clients = [threading.Thread(target=client, args=(server.port, number)) for number in range(8)]
        for thread in clients:
            thread.start()
        try:
            for _ in range(3):
                before = set(workers_of(server))
                assert len(before) == 2
                os.kill(min(p.pid for p in before), signal.SIGKILL)
                _until(lambda old=before: len(set(workers_of(server)) - old) == 1)  # type: ignore[misc]
                seen = answered[200]
                _until(lambda n=seen: answered[200] > n + 200)  # type: ignore[misc]
        finally:
            stop.set()
            for thread in clients:
                thread.join()
        page = metrics(server)
    assert set(answered) == {200}
    assert len(lost) <= 3 * len(clients)  # what a killed worker held: at most one request of each connection
    # A request that was computed and never sent counts, too.
    counted = page['lepton_serve_requests_total{endpoint="two",status="200"}']
    assert answered[200] <= counted <= answered[200] + len(lost)
    assert page["lepton_serve_worker_restarts_total"] == 3
    assert page["lepton_serve_workers"] == 2
    assert page['lepton_serve_in_flight{endpoint="two"}'] == 0


def test_all_workers_change_at_one_moment(shelf: Any, run_at: RunInfo, tmp_path: Path) -> None:
    """An answer of the new version is never followed by one of the former, whichever workers give them."""
    body = json.dumps({"inputs": tensors(shelf.wine.rows[:1], shelf.wine.package)}).encode()
    versions = [(split_pin(m.uri)[1] or "")[:12] for m in (shelf.wine, shelf.other_wine)]
    stop, spans = threading.Event(), []

    def client(port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while not stop.is_set():
            asked = time.monotonic()
            connection.request("POST", "/v2/models/swap2/infer", body)
            version = json.loads(connection.getresponse().read())["model_version"]
            spans.append((asked, time.monotonic(), version))
        connection.close()

    with two_workers(shelf, tmp_path, "swap2") as server:
        deploy(run_at, "swap2", shelf.wine.uri)
        clients = [threading.Thread(target=client, args=(server.port,)) for _ in range(6)]
        for thread in clients:
            thread.start()
        try:
            deploy(replace(run_at, run_key=f"{run_at.run_key}-2"), "swap2", shelf.other_wine.uri)
            time.sleep(0.3)
        finally:
            stop.set()
            for thread in clients:
                thread.join()
        cpu = [sum(p.cpu_times()[:2]) for p in workers_of(server)]
    assert {version for *_, version in spans} == set(versions)
    first_new = min(end for _, end, version in spans if version == versions[1])
    assert [s for s in spans if s[0] > first_new and s[2] == versions[0]] == []
    assert min(cpu) > 0.2 * max(cpu)  # both have worked


def test_health_checks_have_a_port_that_no_request_reaches(
    shelf: Any, run_at: RunInfo, tmp_path: Path
) -> None:
    port = processes.free_port()
    with two_workers(shelf, tmp_path, "health", "--health-port", str(port)) as server:
        at = f"http://127.0.0.1:{port}"
        assert call(f"{at}/v2/health/live")[:2] == (200, {"live": True})
        assert call(f"{at}/v2/health/ready")[:2] == (503, {"ready": False})
        deploy(run_at, "health", shelf.wine.uri)
        for worker in workers_of(server):
            worker.suspend()  # as if requests held them all
        try:
            assert call(f"{at}/v2/health/ready")[:2] == (200, {"ready": True})
        finally:
            for worker in workers_of(server):
                worker.resume()
        assert call(f"{at}/v2/models/health/infer", b"{}")[0] == 405
        assert "there is nothing at /v2: here are" in call(f"{at}/v2")[1]["error"]


def test_several_models_share_a_server(shelf: Any, run_at: RunInfo, tmp_path: Path) -> None:
    server = LocalEndpoint(
        "left", shelf.run.store.root, tmp_path, options=("--poll-s", "0.1"), more=("right",)
    )
    with server:
        deploy(run_at, "left", shelf.wine.uri)
        assert call(f"{server.url}/v2/health/ready")[0] == 503  # one of two
        deploy(replace(run_at, run_key=f"{run_at.run_key}-r"), "right", shelf.diabetes.uri)
        assert call(f"{server.url}/v2/health/ready")[0] == 200
        for name, trained in (("left", shelf.wine), ("right", shelf.diabetes)):
            inputs = tensors(trained.rows[:2], trained.package)
            body = json.dumps({"inputs": inputs}).encode()
            status, answer, _ = call(f"{server.url}/v2/models/{name}/infer", body)
            assert (status, answer["model_name"]) == (200, name)
        found = {s.server for name in ("left", "right") for s in endpoints.read_statuses(run_at.store, name)}
        assert len(found) == 1


def test_workers_end_when_their_supervisor_is_killed(shelf: Any, tmp_path: Path) -> None:
    with two_workers(shelf, tmp_path, "orphans") as server:
        workers = workers_of(server)
        kill_supervisor(server)
        _until(lambda: not any(worker.is_running() for worker in workers))


def test_no_client_that_honours_close_loses_a_request_when_the_server_ends(
    shelf: Any, run_at: RunInfo, tmp_path: Path
) -> None:
    body = json.dumps({"inputs": tensors(shelf.wine.rows[:1], shelf.wine.package)}).encode()
    lost: list[object] = []
    answered, refused, told = Counter[int](), [], []

    def client(port: int, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while True:
            try:
                connection.connect()
            except OSError:  # no request was sent
                refused.append(number)
                return
            try:
                while connection.sock is not None:  # closed when an answer says so
                    connection.request("POST", "/v2/models/ends/infer", body)
                    answer = connection.getresponse()
                    answer.read()
                    answered[answer.status] += 1
                told.append(number)
            except (OSError, http.client.HTTPException) as error:
                lost.append((number, repr(error)))
                return

    with two_workers(shelf, tmp_path, "ends", "--drain-s", "1") as server:
        deploy(run_at, "ends", shelf.wine.uri)
        clients = [threading.Thread(target=client, args=(server.port, number)) for number in range(48)]
        for thread in clients:
            thread.start()
        _until(lambda: answered[200] > 500)
        pid = processes.pid("endpoint-ends", tmp_path) or 0
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
        assert call(f"{server.url}/v2/health/ready")[0] == 503
        assert metrics(server)["lepton_serve_workers"] == 2  # it is watched until it has ended
        for thread in clients:
            thread.join(60)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert lost == []
    assert set(answered) == {200}
    assert len(refused) == len(clients)
    assert set(told) == set(range(48))


def fleet_of_one() -> Fleet:
    settings = Settings(
        names=("wine",),
        host="127.0.0.1",
        port=0,
        health_port=None,
        url=None,
        workers=1,
        limits=Limits(),
        poll_s=1,
        drain_s=0,
    )
    return Fleet(settings, None, bytes)  # type: ignore[arg-type]


def desired_of(package: str, endpoint: str = "wine", golden: str = "") -> endpoints.Desired:
    return endpoints.Desired(
        endpoint=endpoint,
        package=package,
        version="1",
        golden=golden,
        run_key="",
        max_difference=1.0,
        max_latency_ms=1.0,
        max_memory_mb=1.0,
    )


def test_a_trial_that_ends_without_a_word_is_said_to_have_died(shelf: Any) -> None:
    fleet = fleet_of_one()
    rows = [dict.fromkeys((f.name for f in shelf.wine.package.card.features), None)] * 200_000
    golden = {"rows": rows, "answers": [[0.3, 0.3, 0.4]] * len(rows)}  # which keeps it busy
    outcome: list[BaseException] = []

    def attempt() -> None:
        try:
            fleet.try_out(desired_of(shelf.wine.uri), shelf.run.store.load(shelf.wine.uri), golden)
        except BaseException as error:  # noqa: BLE001 - it is looked at below
            outcome.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    _until(lambda: bool(fleet._trials))
    time.sleep(0.5)
    pid = next(iter(fleet._trials)).pid
    score = Path(f"/proc/{pid}/oom_score_adj")
    _until(lambda: score.read_text() == "1000\n")  # the first to go where memory is short
    os.kill(pid, signal.SIGSEGV)
    thread.join(30)
    assert isinstance(outcome[0], Died)
    assert "SIGSEGV" in str(outcome[0])


def test_memory_that_is_free_goes_back_to_the_system() -> None:
    blocks = [b"x" * 100_000 for _ in range(2000)]
    last, before = blocks.pop(), psutil.Process().memory_info().rss  # the last one keeps the others' place
    del blocks
    worker._give_back()
    assert psutil.Process().memory_info().rss < before - 150e6
    assert last


def test_a_trial_for_which_there_is_no_process_says_nothing_about_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(_: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    fleet = fleet_of_one()
    monkeypatch.setattr(fleet._context.Process, "start", refused)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(NotNow, match="Resource temporarily unavailable"):
            fleet.try_out(desired_of(""), {}, {})
    assert len(os.listdir("/proc/self/fd")) == before


def loop_in_native_code(lifeline: Any, begun: Any) -> None:
    end_with(lifeline)
    begun.set()
    re.match(r"(a+)+$", "a" * 60 + "b")  # for years, and with the interpreter's lock


def test_a_process_ends_with_its_lifeline_although_native_code_holds_the_interpreter() -> None:
    context = multiprocessing.get_context("forkserver")
    alive, lifeline = context.Pipe(duplex=False)
    begun = context.Event()
    process = context.Process(target=loop_in_native_code, args=(alive, begun), daemon=True)
    process.start()
    alive.close()
    assert begun.wait(30)
    process.join(0.2)
    assert process.is_alive()
    lifeline.close()
    process.join(10)
    assert process.exitcode == -signal.SIGIO


def test_a_trial_that_never_ends_ends_when_its_supervisor_is_killed(shelf: Any, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    folder = tmp_path / "model"
    shutil.copytree(shelf.wine.package.path, folder)
    model = onnx.load(folder / "model.onnx")
    value = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("go_on", "number")],
        "body",
        [
            value("turn", onnx.TensorProto.INT64, []),
            value("go_on", onnx.TensorProto.BOOL, []),
            value("number", onnx.TensorProto.FLOAT, []),
        ],
        [
            value("go_on_out", onnx.TensorProto.BOOL, []),
            value("number_out", onnx.TensorProto.FLOAT, []),
        ],
    )
    for name, content in (("turns", np.int64(2**62)), ("true", np.bool_(True)), ("zero", np.float32(0))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(content), name))
    model.graph.node.append(onnx.helper.make_node("Loop", ["turns", "true", "zero"], ["unused"], body=body))
    model.graph.output.append(value("unused", onnx.TensorProto.FLOAT, []))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    row = dict.fromkeys((f.name for f in shelf.wine.package.card.features), None)
    golden = store.put("golden.json", json.dumps({"rows": [row], "answers": [[0.3, 0.3, 0.4]]}))
    desired = desired_of(store.put("model", folder).uri, "loops", golden.uri)
    assert endpoints.DesiredLog(store, "loops").append_after(None, desired)
    with LocalEndpoint("loops", store.root, tmp_path / "server", options=("--poll-s", "0.1")) as server:
        _until(lambda: len(workers_of(server)) == 2 and max(p.cpu_times()[0] for p in workers_of(server)) > 2)
        both = workers_of(server)
        kill_supervisor(server)
        _until(lambda: not any(p.is_running() for p in both))


def test_workers_whose_forker_was_killed_are_watched_and_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fleet = Fleet(replace(fleet_of_one().settings, workers=3), listener, bytes)
        fleet.start()
        one, hangs, late = (w.process.pid or 0 for w in fleet._workers.values())
        os.kill(psutil.Process(one).ppid(), signal.SIGKILL)
        os.kill(one, signal.SIGKILL)
        _until(lambda: fleet.restarts > 0 and len(fleet._workers) == 3)
        os.kill(hangs, signal.SIGSTOP)
        time.sleep(1)  # what it has said is heard
        next(w for w in fleet._workers.values() if w.process.pid == hangs).heard -= 3600
        _until(lambda: not _runs(hangs))
        os.kill(late, signal.SIGSTOP)  # so it has something left to answer
        threading.Timer(1.5, os.kill, (late, signal.SIGCONT)).start()
        before = time.monotonic()
        asyncio.run(fleet.end(0))
        assert time.monotonic() - before > 1
        assert not _runs(late)


def _runs(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
