"""The trigger against a small API server of our own: what it asks, when it fires, and what it deletes."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from lepton_airflow.pods import MANAGED_BY, MANAGER, RUN_KEY, TRY, watch
from lepton_airflow.triggers import pod as triggers
from lepton_airflow.triggers.pod import PodTrigger

WITHIN_S = 120.0  # the first import of the client takes long on a busy machine


class ApiServer(ThreadingHTTPServer):
    """LIST, WATCH, log and DELETE of pods, over what a test puts into it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pods: dict[str, dict[str, Any]] = {}
        self.log = b""
        self.asked: list[str] = []
        self.refuse: tuple[int, str] | None = None
        self.full = False
        self.watchers: list[queue.Queue[dict[str, Any]]] = []

    def put(self, name: str, state: dict[str, Any], **meta: Any) -> None:
        """Make or change a pod."""
        kind = "MODIFIED" if name in self.pods else "ADDED"
        self.pods[name] = pod(name, state, **meta)
        for watcher in self.watchers:
            watcher.put({"type": kind, "object": self.pods[name]})

    def count(self, what: str) -> int:
        return self.asked.count(what)


class _Handler(BaseHTTPRequestHandler):
    server: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        asked = parse_qs(address.query)
        if self.server.refuse:
            status, message = self.server.refuse
            self._answer(status, {"kind": "Status", "message": message})
        elif address.path.endswith("/log"):
            self.server.asked.append("log")
            self._answer(200, self.server.log)
        elif "watch" in asked:
            self.server.asked.append("watch")
            self._watch()
        else:
            self.server.asked.append("list")
            name, value = asked["labelSelector"][0].split("=")
            found = [p for p in self.server.pods.values() if p["metadata"]["labels"].get(name) == value]
            self._answer(200, {"metadata": {"resourceVersion": "1"}, "items": found})

    def _watch(self) -> None:
        changes: queue.Queue[dict[str, Any]] = queue.Queue()
        self.server.watchers.append(changes)
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        while True:
            self.wfile.write(json.dumps(changes.get()).encode() + b"\n")
            self.wfile.flush()

    def do_DELETE(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = self.path.rpartition("/")[2]
        meta = self.server.pods[name]["metadata"]
        same = all(meta[key] == value for key, value in body["preconditions"].items())
        self.server.asked.append("delete" if same else "refused delete")
        if same:
            del self.server.pods[name]
        self._answer(200 if same else 409, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append("dry run" if "dryRun=All" in self.path else "create")
        full = "exceeded quota: q, requested: pods=1, used: pods=9, limited: pods=9"
        self._answer(403 if self.server.full else 201, {"kind": "Status", "message": full})


def pod(name: str, state: dict[str, Any], **meta: Any) -> dict[str, Any]:
    labels = {MANAGED_BY: MANAGER, RUN_KEY: name.partition(".")[0]}
    values = {"uid": f"uid-{name}", "name": name, "resourceVersion": "1", "labels": labels}
    values |= {"creationTimestamp": "2026-01-01T00:00:00Z", "annotations": {TRY: "mine"}, **meta}
    status = {"phase": "Running", "containerStatuses": [{"name": "stage", "state": state}]}
    return {"metadata": values, "spec": {"containers": [{"name": "stage"}]}, "status": status}


RUNS: dict[str, Any] = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
ENDED: dict[str, Any] = {"terminated": {"exitCode": 0}}


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def trigger(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    config = {
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{api.server_address[1]}"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "current-context": "c",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    monkeypatch.setenv("AIRFLOW_CONN_KUBERNETES_DEFAULT", "kubernetes://")
    monkeypatch.setattr(triggers, "_SOONEST_S", 0.0)
    monkeypatch.setattr(triggers, "_ROOM_EVERY_S", 0.05)
    monkeypatch.setattr(watch, "REFUSAL_SURE_S", 0.5)

    def make(run_key: str, **changes: Any) -> PodTrigger:
        clocks = {"admission_s": 1e9, "schedule_s": 1e9, "start_s": 1e9, "run_s": 1e9, "deadline": None}
        names = ("kubernetes_conn_id", "cluster_context")
        cluster = {"config_file": str(tmp_path / "kubeconfig"), "in_cluster": False, **dict.fromkeys(names)}
        settings = {
            "cluster": cluster,
            "namespace": "ml",
            "run_key": run_key,
            "owned": f"uid-{run_key}",
            "try_id": "mine",
            "digest": "d",
            "clocks": clocks,
            "read": {},
            "connections": [],
        }
        return PodTrigger(**settings | changes)

    return make


async def fired(*waiting: PodTrigger) -> list[dict[str, Any]]:
    """What the triggers send, as the triggerer runs them: side by side."""

    async def one(each: PodTrigger) -> dict[str, Any]:
        events = [event.payload async for event in each.run()]
        assert len(events) == 1
        return events[0]

    return list(await asyncio.wait_for(asyncio.gather(*map(one, waiting)), WITHIN_S))


async def seen(condition: Any) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_thirty_triggers_ask_as_much_as_one(api: ApiServer, trigger: Any) -> None:
    keys = [f"run{n}" for n in range(30)]
    for key in keys:
        api.put(key, RUNS)

    async def story() -> list[dict[str, Any]]:
        events = asyncio.create_task(fired(*map(trigger, keys)))
        await seen(lambda: api.count("watch") == 1)
        assert not events.done()
        for key in keys:
            api.put(key, ENDED)
        return await events

    assert asyncio.run(story()) == [{"read": {}, "refused": ""}] * 30
    assert (api.count("list"), api.count("watch")) == (1, 1)
    assert watch._NAMESPACES == {}  # nothing goes on when nobody waits


def test_new_lines_are_logged_once_and_the_last_one_is_handed_on(
    api: ApiServer, trigger: Any, caplog: pytest.LogCaptureFixture
) -> None:
    api.put("run", RUNS)
    api.log = b"2026-01-01T00:00:01.000000002Z WARNING careful\n2026-01-01T00:00:01.1Z plain\n2026-01-01T00:00:02Z half"
    waiting = trigger("run", read={"stage": "2026-01-01T00:00:01.000000001Z"})
    logged: list[tuple[int, str]] = []
    waiting._log = type(
        "Log",
        (),
        {"info": lambda *_: None, "log": lambda _self, level, _form, text: logged.append((level, text))},
    )()

    async def story() -> list[dict[str, Any]]:
        events = asyncio.create_task(fired(waiting))
        await seen(lambda: len(logged) == 2)
        api.put("run", RUNS)  # a change: it reads the log again
        await seen(lambda: api.count("log") == 2)
        api.put("run", ENDED)
        return await events

    (event,) = asyncio.run(story())
    assert logged == [(30, "careful"), (20, "plain")]
    assert event["read"] == {"stage": "2026-01-01T00:00:01.1Z"}
    assert "tail" not in event  # the worker can ask the pod
    assert waiting._last_lines() == logged
    waiting._tail.append((20, "x" * 9000))  # more than an event may hold
    waiting._tail.append((20, "the end"))
    assert waiting._last_lines() == [(20, "the end")]


def test_a_pod_that_is_gone_fires_only_when_the_server_says_so_too(api: ApiServer, trigger: Any) -> None:
    assert asyncio.run(fired(trigger("run"))) == [{"read": {}, "refused": "", "tail": []}]
    assert api.count("list") == 2


def test_what_this_triggerer_may_not_do_is_said(api: ApiServer, trigger: Any) -> None:
    api.refuse = (
        403,
        'pods is forbidden: User "sa" cannot list resource "pods" in API group "" in the namespace "ml"',
    )
    (event,) = asyncio.run(fired(trigger("run")))
    assert event["refused"].startswith("sa may not list pods in namespace ml")


def test_a_server_that_is_away_fails_nothing(api: ApiServer, trigger: Any) -> None:
    api.put("run", ENDED)
    api.refuse = 503, "etcd is away"

    async def story() -> list[dict[str, Any]]:
        events = asyncio.create_task(fired(trigger("run")))
        done, _ = await asyncio.wait([events], timeout=1)
        assert not done
        api.refuse = None
        return await events

    assert asyncio.run(story())[0]["refused"] == ""


def test_a_kubeconfig_that_the_triggerer_has_not_is_named(api: ApiServer, trigger: Any) -> None:
    waiting = trigger("run")
    waiting.cluster = {**waiting.cluster, "config_file": "/none/kubeconfig"}
    (event,) = asyncio.run(fired(waiting))
    assert "the triggerer cannot read the kubeconfig '/none/kubeconfig'" in event["refused"]


def test_a_deadline_fires(api: ApiServer, trigger: Any) -> None:
    api.put("run", RUNS)
    waiting = trigger("run")
    waiting.clocks = {**waiting.clocks, "deadline": time.time() + 0.5}
    assert asyncio.run(fired(waiting))[0]["refused"] == ""


def test_a_deadline_fires_also_while_nobody_answers(api: ApiServer, trigger: Any) -> None:
    api.refuse = 503, "etcd is away"
    waiting = trigger("run")
    waiting.clocks = {**waiting.clocks, "deadline": time.time() + 0.5}
    assert asyncio.run(fired(waiting))[0]["refused"] == ""


def test_the_worker_asks_where_a_server_is_away_for_long(
    api: ApiServer, trigger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.refuse = 503, "etcd is away"
    monkeypatch.setattr(triggers, "API_PAUSE_S", 0.1)
    monkeypatch.setattr(triggers, "API_AWAY_S", 0.5)
    assert asyncio.run(fired(trigger("run")))[0]["refused"] == ""


def test_a_full_quota_is_asked_again_by_a_dry_run(api: ApiServer, trigger: Any) -> None:
    api.full = True

    async def story() -> list[dict[str, Any]]:
        events = asyncio.create_task(fired(trigger("run", owned=None, refused=pod("run", {}))))
        await seen(lambda: api.count("dry run") > 2)
        assert not events.done()
        api.full = False
        return await events

    asyncio.run(story())
    assert api.count("create") == 0


@pytest.mark.parametrize(
    ("meta", "deleted"), [({}, 1), ({"annotations": {TRY: "another"}}, 0), ({"uid": "another"}, 0)], ids=str
)
def test_a_kill_deletes_only_what_its_own_try_owns(
    api: ApiServer, trigger: Any, meta: dict[str, Any], deleted: int
) -> None:
    api.put("run", RUNS, **meta)
    asyncio.run(trigger("run").on_kill())
    assert (api.count("delete"), len(api.pods)) == (deleted, 1 - deleted)


def test_a_kill_goes_on_when_airflow_cancels_it(api: ApiServer, trigger: Any) -> None:
    """As it does a second after it has called it, and every second from then on."""
    api.put("run", RUNS)

    async def story() -> None:
        killing = asyncio.create_task(trigger("run").on_kill())
        await asyncio.sleep(0)
        killing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await killing
        await seen(lambda: api.count("delete") == 1)

    asyncio.run(story())
    assert len(api.pods) == 0


def test_a_row_holds_no_secret_and_makes_the_same_trigger(trigger: Any) -> None:
    path, values = trigger("run").serialize()
    assert path == "lepton_airflow.triggers.pod.PodTrigger"
    assert "token" not in json.dumps(values)
    assert PodTrigger(**values).serialize() == (path, values)


def test_a_password_in_a_connection_s_url_is_kept_out_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    address = {"conn_type": "http", "host": "https://me:correct-horse@proxy.example"}
    monkeypatch.setenv("AIRFLOW_CONN_BY_URL", json.dumps(address))
    hide = asyncio.run(triggers._redactor(["by_url"]))
    assert hide("cannot reach https://me:correct-horse@proxy.example") == (
        "cannot reach https://me:***@proxy.example"
    )
