"""The real server process on loopback: its answers, its refusals, its metrics, swaps under load, ends and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import psutil
import pytest

from lepton_airflow import contract
from lepton_airflow.contract import split_pin
from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, DesiredLog
from lepton_airflow.errors import BadConfiguration, LeptonError
from lepton_airflow.serving import supervisor
from lepton_airflow.serving.http import Request, Response
from lepton_airflow.serving.supervisor import Settings, serve
from lepton_airflow.serving.worker import Limits
from lepton_airflow.stages.deploy_model import DeployModel
from lepton_airflow.store import Store
from lepton_airflow.testing import LocalEndpoint, processes
from lepton_airflow.testing.local_s3 import LocalS3

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lepton_airflow.stages import Result, RunInfo

QUICK = ("--poll-s", "0.1")


def deploy(run: RunInfo, endpoint: str, uri: str) -> Result:
    result = DeployModel(endpoint=endpoint, model=uri, timeout_s=60, max_latency_ms=5000).run(run)
    assert result.values["deployed"]
    return result


def call(url: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, JSON and headers of an answer, whatever its status."""
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), error.headers


def tensors(rows: pd.DataFrame, package: Any, *, nested: bool = False) -> list[dict[str, Any]]:
    """The inputs of a request as a client writes them."""
    found = []
    for feature in package.card.features:
        values = [None if pd.isna(v) else v for v in rows[feature.name]]
        found.append(
            {
                "name": feature.name,
                "datatype": "BYTES" if feature.kind == "category" else "FP64",
                "shape": [len(rows), 1],
                "data": [[v] for v in values] if nested else values,
            }
        )
    return found


def outputs(answer: dict[str, Any]) -> dict[str, Any]:
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in answer["outputs"]}


def metrics(server: LocalEndpoint) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


@pytest.fixture(scope="module")
def wine(shelf: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    folder = tmp_path_factory.mktemp("wine")
    options = (*QUICK, "--max-rows", "200", "--max-bytes", "20000")
    with LocalEndpoint("wine", shelf.run.store.root, folder, options=options) as server:
        deploy(replace(shelf.run, run_key="wine", workdir=folder), "wine", shelf.wine.uri)
        yield server


def test_classes_are_answered_as_the_package_answers(wine: LocalEndpoint, shelf: Any) -> None:
    rows, package = shelf.wine.rows, shelf.wine.package
    answer = wine.infer({"id": "a", "parameters": {"x": 1}, "inputs": tensors(rows, package)})
    assert (answer["id"], answer["parameters"], answer["model_name"]) == ("a", {"x": 1}, "wine")
    found = outputs(answer)
    np.testing.assert_allclose(found["probabilities"], package.predict(rows), rtol=0, atol=1e-7)
    assert found["label"].tolist() == package.predict(rows).argmax(axis=1).tolist()
    nested = wine.infer({"inputs": tensors(rows, package, nested=True), "outputs": [{"name": "label"}]})
    assert [o["name"] for o in nested["outputs"]] == ["label"]
    np.testing.assert_array_equal(outputs(nested)["label"], found["label"])


def test_numbers_are_answered_as_the_package_answers(shelf: Any, run_at: RunInfo, tmp_path: Path) -> None:
    rows, package = shelf.diabetes.rows, shelf.diabetes.package
    with LocalEndpoint("sugar", shelf.run.store.root, tmp_path, options=QUICK) as server:
        before = [
            call(server.url + path)[0] for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/sugar")
        ]
        assert before == [200, 503, 503]
        result = deploy(run_at, "sugar", shelf.diabetes.uri)
        answer = outputs(server.infer({"inputs": tensors(rows, package)}))
    np.testing.assert_allclose(answer["prediction"].ravel(), package.predict(rows), rtol=1e-6)
    assert endpoints.read_statuses(run_at.store, "sugar") == []  # it has ended, and says so
    golden = json.loads(run_at.fetch(result.artifacts["golden"].uri).read_bytes())["rows"]
    made_up = pd.DataFrame(golden[:-1])  # typical values, and then a row with nothing
    assert golden[-1] == {"bp": None, "s5": None, "größe (mm)": None, "shade": ""}
    assert set(made_up["shade"]) == {"hell", "dark"}
    assert made_up["bp"].agg(["min", "max"]).tolist() == pytest.approx(
        rows["bp"].agg(["min", "max"]).tolist()
    )
    assert len(made_up) == 31


def test_the_protocol_describes_server_and_model(wine: LocalEndpoint, shelf: Any) -> None:
    version = (split_pin(shelf.wine.uri)[1] or "")[:12]
    assert call(f"{wine.url}/v2")[1]["name"] == "lepton_airflow"
    assert call(f"{wine.url}/v2/health/ready")[:2] == (200, {"ready": True})
    status, described, _ = call(f"{wine.url}/v2/models/wine")
    assert status == 200
    assert described["versions"] == [version]
    assert {"name": "größe (mm)", "datatype": "FP32", "shape": [-1, 1]} in described["inputs"]
    assert {"name": "shade", "datatype": "BYTES", "shape": [-1, 1]} in described["inputs"]
    assert described["outputs"] == [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "label", "datatype": "INT64", "shape": [-1]},
    ]
    assert call(f"{wine.url}/v2/models/wine/versions/{version}")[1] == described
    assert call(f"{wine.url}/v2/models/wine/versions/{version}/ready")[:2] == (
        200,
        {"name": "wine", "ready": True},
    )


def test_what_is_wrong_is_refused_and_counted_and_the_server_goes_on(wine: LocalEndpoint, shelf: Any) -> None:
    base = f"{wine.url}/v2/models/wine"
    many = json.dumps({"inputs": tensors(pd.concat([shelf.wine.rows] * 2), shelf.wine.package)}).encode()
    cases: list[tuple[str, bytes | None, int, str]] = [
        (f"{base}/infer", b"{", 400, "not JSON"),
        (f"{base}/infer", b"{}", 400, "missing required field inputs"),
        (f"{base}/versions/9/infer", b"{}", 404, "version '9' of 'wine' is not in service"),
        (f"{wine.url}/v2/models/vine/infer", b"{}", 404, "no model 'vine' here; did you mean 'wine'?"),
        (f"{base}/infer", b" " * 20_001, 413, "more than 20000 bytes"),
        (f"{base}/infer", many, 413, "356 rows, the limit is 200"),
        (f"{base}/infer", None, 405, "GET /v2/models/wine/infer is not allowed: expected POST"),
        (f"{wine.url}/v2/modells", None, 404, "there is nothing at"),
        (f"{wine.url}/redoc", None, 404, "there is nothing at"),
    ]
    before = metrics(wine)
    for url, body, status, words in cases:
        found, answer, _ = call(url, body)
        assert found == status
        assert list(answer) == ["error"]
        assert words in answer["error"]
    found, answer, _ = call(f"{base}/infer", b"abcd", **{"Inference-Header-Content-Length": "x"})
    assert (found, "expected a number of bytes" in answer["error"]) == (400, True)
    found, answer, _ = call(f"{base}/infer", b"abcd", **{"Content-Encoding": "br"})
    assert (found, "send gzip, deflate or identity" in answer["error"]) == (415, True)
    after = metrics(wine)
    counted = {
        k: int(v - before.get(k, 0)) for k, v in after.items() if k.startswith("lepton_serve_requests_total")
    }
    assert {k: v for k, v in counted.items() if v} == {
        'lepton_serve_requests_total{endpoint="wine",status="400"}': 3,
        'lepton_serve_requests_total{endpoint="wine",status="404"}': 1,
        'lepton_serve_requests_total{endpoint="wine",status="413"}': 2,
        'lepton_serve_requests_total{endpoint="wine",status="415"}': 1,
    }
    assert wine.infer({"inputs": tensors(shelf.wine.rows[:1], shelf.wine.package)})["outputs"]


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(wine: LocalEndpoint) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", wine.port, timeout=30)) as connection:
        connection.request("POST", "/v2/models/wine/infer", iter([b" " * 10_000] * 3), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        assert connection.getresponse().status == 413


def test_metrics_tell_rows_version_and_state(wine: LocalEndpoint, shelf: Any) -> None:
    before = metrics(wine)
    wine.infer({"inputs": tensors(shelf.wine.rows[:7], shelf.wine.package)})
    after = metrics(wine)
    sha256 = split_pin(shelf.wine.uri)[1] or ""
    assert after[f'lepton_serve_model_info{{endpoint="wine",sha256="{sha256}",version="{sha256[:12]}"}}'] == 1
    assert (
        after['lepton_serve_rows_total{endpoint="wine"}'] - before['lepton_serve_rows_total{endpoint="wine"}']
        == 7
    )
    assert (
        after['lepton_serve_request_seconds_count{endpoint="wine"}']
        - before['lepton_serve_request_seconds_count{endpoint="wine"}']
        == 1
    )
    assert after['lepton_serve_state{endpoint="wine",state="serving"}'] == 1
    assert after['lepton_serve_state{endpoint="wine",state="rejected"}'] == 0


def test_a_server_needs_no_more_than_its_extra_brings(shelf: Any, tmp_path: Path) -> None:
    """Its image holds no Airflow, no pandas and no training library."""
    desired = asdict(_desired(shelf.wine.uri))
    script = (
        "import json, sys; import lepton_airflow.serving.supervisor; from lepton_airflow.delivery.endpoints import Desired\n"
        "from lepton_airflow.serving.model import ServedModel; from lepton_airflow.store import Store\n"
        "store, desired = Store(sys.argv[1]), Desired(**json.loads(sys.argv[2]))\n"
        "model = ServedModel.of(desired, store.load(desired.package))\n"
        "inputs = [{'name': f.name, 'datatype': 'INT64', 'shape': [1], 'data': [1]} for f in model.card.features]\n"
        "print(model.answer(json.dumps({'inputs': inputs}).encode(), 1).rows, *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    command = [sys.executable, "-c", script, shelf.run.store.root, json.dumps(desired)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    rows, *modules = done.stdout.split()
    assert rows == "1"
    assert {"httptools", "onnxruntime", "numpy"} <= set(modules)
    assert {"airflow", "duckdb", "onnx", "pandas", "pyarrow", "scipy", "sklearn", "torch"} & set(
        modules
    ) == set()


def test_the_request_of_the_page_is_one(shelf: Any, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    found = re.search(r"<<'JSON'\n(.*?)\nJSON\n", page, re.DOTALL)
    assert found is not None
    request = contract.Request.from_json(found[1])
    stage = DeployModel(**request.parameters, on_backfill="full", timeout_s=0.1)
    with pytest.raises(LeptonError, match=r"serve flights-late --store"):
        replace(stage, model=shelf.wine.uri).run(replace(shelf.run, workdir=tmp_path))


def test_every_metric_is_described(wine: LocalEndpoint) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    with urllib.request.urlopen(f"{wine.url}/metrics", timeout=30) as found:
        lines = found.read().decode().splitlines()
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == 13
    assert [name for name in names if f"`{name}" not in page] == []


def _desired(package: str) -> Desired:
    return Desired(
        endpoint="wine",
        sequence=1,
        package=package,
        version="1",
        golden="",
        max_difference=0,
        max_latency_ms=0,
        max_memory_mb=0,
        run_key="",
    )


class HalfSent:
    """A request whose body is on its way."""

    def __init__(self, server: LocalEndpoint, inputs: list[dict[str, Any]]) -> None:
        body = json.dumps({"inputs": inputs}).encode()
        self.rest = body[10:]
        head = f"POST /v2/models/{server.endpoint}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self.socket.sendall(head.encode() + body[:10])
        assert call(f"{server.url}/v2/health/live")[0] == 200  # by now the server has read it

    def finish(self) -> int:
        self.socket.sendall(self.rest)
        answer = http.client.HTTPResponse(self.socket)
        answer.begin()
        answer.read()
        self.socket.close()
        return answer.status


def test_sigterm_answers_what_was_admitted_and_ends_well(shelf: Any, run_at: RunInfo, tmp_path: Path) -> None:
    server = LocalEndpoint("drain", shelf.run.store.root, tmp_path, options=QUICK)
    with server:
        deploy(run_at, "drain", shelf.wine.uri)
        pid = processes.pid("endpoint-drain", tmp_path)
        assert pid is not None
        request = HalfSent(server, tensors(shelf.wine.rows[:1], shelf.wine.package))
        os.kill(pid, signal.SIGTERM)

        def refuses() -> bool:
            with (
                contextlib.suppress(ConnectionRefusedError),
                socket.create_connection(("127.0.0.1", server.port)),
            ):
                return False
            return True

        processes.until(refuses, "the server to take no new connection", 30)
        assert endpoints.read_statuses(run_at.store, "drain")[0].alive
        assert request.finish() == 200
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert endpoints.read_statuses(run_at.store, "drain") == []


def test_a_signal_to_all_processes_of_a_server_ends_it_as_well(
    shelf: Any, run_at: RunInfo, tmp_path: Path
) -> None:
    """As systemd sends it: to the supervisor, to what forks the workers, and to the workers."""
    with LocalEndpoint("group", shelf.run.store.root, tmp_path, options=QUICK) as server:
        deploy(run_at, "group", shelf.wine.uri)
        pid = processes.pid("endpoint-group", tmp_path)
        assert pid is not None
        request = HalfSent(server, tensors(shelf.wine.rows[:1], shelf.wine.package))
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        assert len(family) >= 3
        for process in family:
            process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert request.finish() == 200
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_killed_server_serves_again_from_the_store(shelf: Any, run_at: RunInfo, tmp_path: Path) -> None:
    server = LocalEndpoint("killed", shelf.run.store.root, tmp_path, options=QUICK)
    with server:
        deploy(run_at, "killed", shelf.other_wine.uri)
        server.kill()
        assert not server.running()
        server.start()
        server.wait_ready()
        answer = server.infer({"inputs": tensors(shelf.wine.rows[:3], shelf.wine.package)})
        assert answer["model_version"] == (split_pin(shelf.other_wine.uri)[1] or "")[:12]
        # The version answers a moment before the status says so.
        _until(
            lambda: (
                [(s.state, s.serving) for s in endpoints.read_statuses(run_at.store, "killed")]
                == [("serving", 1)]
            )
        )


def test_no_request_fails_while_versions_change(shelf: Any, run_at: RunInfo, tmp_path: Path) -> None:
    """Four clients ask without a pause while the version changes six times; each answer is that of the version it names."""
    models = {(split_pin(m.uri)[1] or "")[:12]: m for m in (shelf.wine, shelf.other_wine)}
    rows = shelf.wine.rows[:20]
    body = json.dumps({"inputs": tensors(rows, shelf.wine.package)}).encode()
    wanted = {version: model.package.predict(rows) for version, model in models.items()}
    first, second = wanted.values()
    assert np.abs(first - second).max() > 0.1
    stop = threading.Event()
    seen: Counter[str] = Counter()
    wrong: list[object] = []

    def client(server: LocalEndpoint) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        while not stop.is_set():
            try:
                connection.request("POST", "/v2/models/swap/infer", body)
                answer = connection.getresponse()
                content = answer.read()
                if answer.status != 200:
                    wrong.append((answer.status, content))
                    continue
                found = json.loads(content)
                version = found["model_version"]
                np.testing.assert_allclose(outputs(found)["probabilities"], wanted[version], atol=1e-6)
                seen[version] += 1
            except (OSError, http.client.HTTPException, AssertionError, KeyError) as error:
                wrong.append(error)
        connection.close()

    with LocalEndpoint("swap", shelf.run.store.root, tmp_path, options=QUICK) as server:
        deploy(run_at, "swap", shelf.wine.uri)
        clients = [threading.Thread(target=client, args=(server,)) for _ in range(4)]
        for thread in clients:
            thread.start()
        try:
            for number, model in enumerate([shelf.other_wine, shelf.wine] * 3):
                result = deploy(replace(run_at, run_key=f"{run_at.run_key}-{number}"), "swap", model.uri)
                before = seen[result.values["version"]]
                _until(lambda v=result.values["version"], n=before: seen[v] > n + 20 or wrong)  # type: ignore[misc]
        finally:
            stop.set()
            for thread in clients:
                thread.join()
    assert wrong == []
    assert len(DesiredLog(run_at.store, "swap").entries()) == 7


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_store_on_s3_serves_too(
    shelf: Any, run_at: RunInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalS3() as s3:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store = s3.store("served")
        uri = store.put("model", shelf.wine.package.path).uri
        with LocalEndpoint("clouds", store.root, tmp_path, options=QUICK) as server:
            deploy(replace(run_at, store=store), "clouds", uri)
            answer = outputs(server.infer({"inputs": tensors(shelf.wine.rows, shelf.wine.package)}))
        assert endpoints.read_statuses(store, "clouds") == []
    wanted = shelf.wine.package.predict(shelf.wine.rows)
    np.testing.assert_allclose(answer["probabilities"], wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"names": ("../wine",)}, "cannot name an endpoint"),
        ({"names": ("wine", "wine")}, "expected each once"),
        ({"port": 99999}, r"cannot listen on 127\.0\.0\.1:99999"),
        ({"poll_s": 0}, "poll_s=0: expected"),
        ({"workers": 0}, "workers=0: expected"),
        ({"limits": Limits(in_flight=0)}, "max_in_flight=0: expected"),
        ({"limits": Limits(threads=-1)}, "threads=-1: expected"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfiguration, match=words):
        serve(Store(str(tmp_path)), Settings(**_SETTINGS | settings))


_SETTINGS: dict[str, Any] = {
    "names": ("wine",),
    "host": "127.0.0.1",
    "port": 0,
    "health_port": None,
    "url": None,
    "workers": 1,
    "limits": Limits(),
    "poll_s": 1,
    "drain_s": 0,
}


def test_a_port_that_is_taken_and_a_store_that_is_not_there_are_refused(
    wine: LocalEndpoint, tmp_path: Path
) -> None:
    with pytest.raises(BadConfiguration, match=f"cannot listen on 127.0.0.1:{wine.port}"):
        serve(Store(str(tmp_path)), Settings(**_SETTINGS | {"port": wine.port}))
    with pytest.raises(BadConfiguration, match="mount it"):
        serve(Store(str(tmp_path / "not-mounted")), Settings(**_SETTINGS))
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_fails_after_its_start_ends_its_workers_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[psutil.Process] = []

    def fail(*_: object) -> None:
        started.extend(psutil.Process(child.pid) for child in multiprocessing.active_children())
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(supervisor, "Listener", fail)
    settings = Settings(**_SETTINGS | {"health_port": processes.free_port(), "workers": 2})
    with pytest.raises(LeptonError, match="cannot go on: RuntimeError: can't start new thread"):
        serve(Store(str(tmp_path)), settings)
    assert len(started) == 2
    assert not any(process.is_running() for process in started)


def test_metrics_that_cannot_be_made_are_an_answer(tmp_path: Path) -> None:
    async def asked() -> Response:
        server = supervisor._Server(Store(str(tmp_path)), Settings(**_SETTINGS))
        server.fleet, server.reconcilers = None, []  # type: ignore[assignment]
        return server.answer(Request("GET", "/metrics"), print)

    response = asyncio.run(asked())
    assert response.status == 500
    assert b"the server's log says why" in response.body
