"""What waits without a worker slot, in Airflow's triggerer: it only says when to look again, and is proof of nothing.

All triggers of a triggerer process share one client and one LIST and WATCH for each namespace, so that a hundred deferred
tasks ask the API server as much as one does, and take little memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from lepton_airflow.connections import redactor
from lepton_airflow.errors import BadConfiguration
from lepton_airflow.pods import MANAGED_BY, MANAGER, RUN_KEY, TRY
from lepton_airflow.pods.diagnosis import Diagnosis, refused as refusal
from lepton_airflow.pods.lifecycle import (
    Clocks,
    Seen,
    Step,
    container_state,
    containers,
    decide,
    leaving,
    note,
    phase_of,
)
from lepton_airflow.pods.logs import later, lines_of, since_s
from lepton_airflow.runners import level_of

log = logging.getLogger(__name__)

_LOOK_S = 10.0  # how often new log lines are asked for while the stage runs
_CREATE_S = 15.0  # how often room for a pod is asked for
# A task that is resumed before the scheduler has heard that its worker deferred it counts as failed ("finished with state
# success, but the task instance's state attribute is queued"): so no trigger fires sooner after its start.
_SOONEST_S = 5.0
_WATCH_S = 280  # a watch is renewed so often, with the credentials of then
_SURE_S = 10.0  # a refusal must last so long: an API server that just started knows no roles yet
_AWAY_S = 15.0  # longest pause between two questions to an API server that is away
_AWAY_LIMIT_S = 900.0  # then the worker asks, and fails the try if it gets no answer either
_TAIL_LINES, _TAIL_BYTES = 50, 8192  # of the log, for the worker: an event is a row of Airflow's database
_LOG_BYTES = (
    1 << 20
)  # of one look: what is more is left to the worker, so that one task's log holds up no other's


class PodTrigger(BaseTrigger):
    """Wait until there is something to do about a run's pods.

    :param cluster: how to reach it: ``kubernetes_conn_id``, ``config_file``, ``cluster_context``, ``in_cluster``. No secrets.
    :param namespace: where the pods are.
    :param run_key: whose pods they are.
    :param owned: uid of the pod of this try.
    :param try_id: id of this try.
    :param digest: of what was asked for, see :func:`lepton_airflow.pods.lifecycle.decide`.
    :param clocks: the limits, as a dict of :class:`lepton_airflow.pods.lifecycle.Clocks`.
    :param read: for each container, the time of its last line that was logged.
    :param connections: ids of the Connections whose secrets are kept out of the log.
    :param refused: a pod that could not be made yet because a quota was full: wait until it can.
    """

    def __init__(
        self,
        *,
        cluster: dict[str, Any],
        namespace: str,
        run_key: str,
        owned: str | None,
        try_id: str,
        digest: str,
        clocks: dict[str, Any],
        read: dict[str, str],
        connections: list[str],
        refused: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cluster = cluster
        self.namespace = namespace
        self.run_key = run_key
        self.owned = owned
        self.try_id = try_id
        self.digest = digest
        self.clocks = clocks
        self.read = read
        self.connections = connections
        self.refused = refused
        self._fired = False
        self._gone = False
        self._said = ""
        self._tail: deque[tuple[int, str]] = deque(maxlen=_TAIL_LINES)
        self._hide: Callable[[str], str] | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        names = (
            "cluster",
            "namespace",
            "run_key",
            "owned",
            "try_id",
            "digest",
            "clocks",
            "read",
            "connections",
        )
        values = {name: getattr(self, name) for name in (*names, "refused")}
        return f"{type(self).__module__}.{type(self).__qualname__}", values

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Send one event, when the worker is to look again; ``refused`` in it: this triggerer may not watch."""
        started = time.monotonic()
        async with _shared(self.cluster, self.namespace) as namespace:
            said = await (self._room(namespace) if self.refused else self._change(namespace))
        await asyncio.sleep(max(0.0, _SOONEST_S - (time.monotonic() - started)))
        self._fired = True
        last = {"tail": self._last_lines()} if self._gone else {}  # else the worker can ask the pod
        yield TriggerEvent({"read": self.read, "refused": said} | last)  # type: ignore[no-untyped-call]

    async def _change(self, namespace: _Namespace) -> str:
        """Until the next step is another than to wait; what the API server refused, if it did."""
        await self._first_look(namespace)
        while not namespace.refused and not self._late(namespace):
            step = self._decide(namespace.pods[self.run_key].values())
            if step.do not in ("wait", "take"):  # what is seen here may be late: ask
                found = await namespace.look(self.run_key)
                step = Step("wait") if found is None else self._decide(found)
            if step.do != "wait":
                if step.pod is not None and leaving(step.pod):  # it may be gone when the worker asks
                    await self._forward(namespace, step.pod)
                self._gone = step.do == "gone" or (step.pod is not None and leaving(step.pod))
                return ""
            wait_s = _AWAY_S
            if step.pod is not None:
                self._say(phase_of(step))
                if container_state(step.pod)[0] != "waiting":
                    await self._forward(namespace, step.pod)
                    wait_s = _LOOK_S
            if step.until is not None:
                wait_s = min(wait_s, max(0.1, step.until - time.time()))
            deadline = self.clocks["deadline"]
            if deadline is not None:
                wait_s = min(wait_s, max(0.1, deadline - time.time()))
            await namespace.change(self.run_key, wait_s)
        return namespace.refused

    def _decide(self, pods: Any) -> Step:
        return decide(
            list(pods),
            owned=self.owned,
            try_id=self.try_id,
            digest=self.digest,
            clocks=Clocks(**self.clocks),
            now=time.time(),
        )

    async def _room(self, namespace: _Namespace) -> str:
        """Until the API server would take the pod; what it refused for good, if it did."""
        await self._first_look(namespace)
        while not namespace.refused and not self._late(namespace):
            found = await namespace.would_take(self.refused or {})
            if found is None or found.then != "wait" or found.reason == "Conflict":
                return ""  # the worker meets the same answer, and says it
            self._say(f"waiting: {found.sentence}")
            await asyncio.sleep(_CREATE_S)
        return namespace.refused

    async def _first_look(self, namespace: _Namespace) -> None:
        while not namespace.looked and not self._late(namespace):
            deadline = self.clocks["deadline"]
            left = _AWAY_S if deadline is None else max(0.0, deadline - time.time())
            await namespace.first_look(min(_AWAY_S, left))

    def _late(self, namespace: _Namespace) -> bool:
        """Whether the worker must act though nobody answers here: the task's time is over, or the server is long away."""
        deadline = self.clocks["deadline"]
        return (deadline is not None and time.time() >= deadline) or namespace.away_s >= _AWAY_LIMIT_S

    def _say(self, what: str) -> None:
        if what != self._said:
            self.log.info("%s", what)
            self._said = what

    async def _forward(self, namespace: _Namespace, pod: Seen) -> None:
        """New lines of the pod into the task's log, as many as one look may bring."""
        if self._hide is None:
            try:
                self._hide = await _redactor(self.connections)
            except Exception as error:  # noqa: BLE001 - whatever a secrets backend raises: the worker reads the log at the end
                self._say(
                    f"the log comes at the end, for a Connection cannot be read here: {type(error).__name__}"
                )
                return
        for container in containers(pod):
            after = self.read.get(container, "")
            if container_state(pod, container)[0] == "waiting":
                continue
            for stamp, line in await namespace.log(pod, container, after):
                level, text = level_of(self._hide(line))
                self.log.log(level, "%s", text)
                self._tail.append((level, text))
                self.read[container] = stamp

    def _last_lines(self) -> list[tuple[int, str]]:
        """The last lines that were logged here, as many as an event may hold."""
        kept: list[tuple[int, str]] = []
        left = _TAIL_BYTES
        for level, text in reversed(self._tail):
            left -= len(text.encode())
            if left < 0:
                break
            kept.append((level, text))
        return kept[::-1]

    async def on_kill(self) -> None:
        """Delete the pod when somebody ends or clears the task while it is deferred; only a pod that this try owns."""
        if self._fired or self.owned is None:
            return
        # Airflow cancels a trigger anew with every look at its database, a second later: what it calls here, too.
        killing = asyncio.create_task(self._delete_own())
        _KILLS.add(killing)
        killing.add_done_callback(_KILLS.discard)
        await asyncio.shield(killing)

    async def _delete_own(self) -> None:
        async with _shared(self.cluster, self.namespace) as namespace:
            await namespace.first_look(_AWAY_S)
            for _ in range(60):
                found = await namespace.look(self.run_key)
                pod = next((p for p in found or () if p["metadata"]["uid"] == self.owned), None)
                if found is not None and (pod is None or leaving(pod) or note(pod, TRY) != self.try_id):
                    return
                if pod is not None and await namespace.delete(pod):
                    self.log.info("pod %s was deleted, for the task was ended", pod["metadata"]["name"])
                    return
                await asyncio.sleep(0.5)

    async def cleanup(self) -> None:
        """Before Airflow 3.3 nothing calls :meth:`on_kill`: there, ask whether the task was taken away."""
        if hasattr(BaseTrigger, "on_kill") or self._fired or self.task_instance is None:
            return
        from lepton_airflow.runners.pod import state_of

        with suppress(Exception):
            if await asyncio.to_thread(state_of, self.task_instance) != "deferred":
                await self.on_kill()


async def _redactor(conn_ids: list[str]) -> Callable[[str], str]:
    """What keeps the secrets of these Connections out of a line."""
    from airflow.providers.common.compat.connection import get_async_connection

    from lepton_airflow.connections import Connection

    found = {}
    for conn_id in conn_ids:
        c = await get_async_connection(conn_id)
        found[conn_id] = Connection(
            conn_id, c.conn_type or "", password=c.password, extra=dict(c.extra_dejson)
        )
    return redactor(found)


class _Namespace:
    """What this process sees of the pods of one namespace."""

    def __init__(self, cluster: Mapping[str, Any], namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.users = 0
        self.pods: defaultdict[str, dict[str, Seen]] = defaultdict(dict)  # run key: uid: pod
        self.refused = ""
        self._api: Any = None
        self._looked = asyncio.Event()
        self._away_since: float | None = time.monotonic()
        self._changes: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._selector = f"{MANAGED_BY}={MANAGER}"

    async def keep_looking(self) -> None:
        """LIST, then WATCH, and again, for as long as anybody waits."""
        made: tuple[Any, Any] | None = None
        unsure_since: float | None = None
        pause = 0.5
        while True:
            try:
                # In a thread: the client's import takes seconds, in which no other trigger would get its turn.
                if made is None:
                    made = await asyncio.to_thread(_hook, self.cluster)
                hook, core = made
                async with hook.get_conn() as client:
                    self._api = core(client)
                    version = await self._list()
                    pause, unsure_since, self._away_since = 0.5, None, None
                    await self._watch(version)
            except Exception as error:  # noqa: BLE001 - whatever it is, the tasks must not fail for it: it is tried again
                self._away_since = self._away_since or time.monotonic()
                log.warning("the pods of namespace %s cannot be watched now: %s", self.namespace, error)
                if isinstance(error, (_Refusal, BadConfiguration)):
                    unsure_since = unsure_since or time.monotonic()
                    if time.monotonic() - unsure_since >= _SURE_S:
                        self.refused = str(error)
                        self._wake()
            self._api = None
            await asyncio.sleep(pause)
            pause = min(2 * pause, _AWAY_S)

    def _wake(self) -> None:
        self._looked.set()
        for event in self._changes.values():
            event.set()

    async def _list(self) -> str:
        found = await self._json(
            self._api.list_namespaced_pod,
            f"list pods in namespace {self.namespace}",
            label_selector=self._selector,
        )
        self.pods.clear()
        for pod in found["items"]:
            self._keep(pod)
        self._wake()
        return str(found["metadata"]["resourceVersion"])

    async def _watch(self, version: str) -> None:
        response = await self._api.list_namespaced_pod(
            self.namespace,
            label_selector=self._selector,
            resource_version=version,
            watch=True,
            timeout_seconds=_WATCH_S,
            _preload_content=False,
            _request_timeout=_WATCH_S + 20,
        )
        try:
            await _checked(response, f"watch pods in namespace {self.namespace}")
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":  # such as a version that is too old: list again
                    return
                self._keep(event["object"], gone=event["type"] == "DELETED")
        finally:
            response.close()

    def _keep(self, pod: dict[str, Any], *, gone: bool = False) -> None:
        run_key, uid = pod["metadata"].get("labels", {}).get(RUN_KEY, ""), pod["metadata"]["uid"]
        if gone:
            self.pods[run_key].pop(uid, None)
        else:
            pod["metadata"].pop("managedFields", None)
            self.pods[run_key][uid] = pod
        self._changes[run_key].set()

    @property
    def looked(self) -> bool:
        """Whether the pods are known, or may not be."""
        return self._looked.is_set()

    @property
    def away_s(self) -> float:
        """For how long nobody has answered."""
        return 0.0 if self._away_since is None else time.monotonic() - self._away_since

    async def first_look(self, within_s: float) -> None:
        """Until the pods are known, or may not be, or so many seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._looked.wait(), within_s)

    async def change(self, run_key: str, within_s: float) -> None:
        """Until something about the run's pods changes, or so many seconds."""
        event = self._changes[run_key]
        with suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), within_s)
        event.clear()

    async def look(self, run_key: str) -> list[Seen] | None:
        """The pods of a run as they are now; None while nobody answers."""
        with suppress(Exception):
            found = await self._json(
                self._api.list_namespaced_pod, "list pods", label_selector=f"{RUN_KEY}={run_key}"
            )
            return list(found["items"])
        return None

    async def log(self, pod: Seen, container: str, after: str) -> list[tuple[str, str]]:
        """Lines after the given time; none where they cannot be had now: the worker reads them at the end."""
        with suppress(Exception):
            response = await self._api.read_namespaced_pod_log(
                pod["metadata"]["name"],
                self.namespace,
                container=container,
                timestamps=True,
                limit_bytes=_LOG_BYTES,
                _preload_content=False,
                **({"since_seconds": since_s(after)} if after else {}),
            )
            await _checked(response, "read a log")
            text = await response.read()
            whole = text[
                : text.rfind(b"\n") + 1
            ]  # a line that is still being written, or was cut, comes later
            return [(stamp, line) for stamp, line in lines_of([whole]) if later(stamp, after)]
        return []

    async def delete(self, pod: Seen) -> bool:
        """Delete exactly this pod; False when it has changed since, or nobody answers."""
        meta = pod["metadata"]
        precondition = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        with suppress(Exception):
            response = await self._api.delete_namespaced_pod(
                meta["name"], self.namespace, body={"preconditions": precondition}, _preload_content=False
            )
            return response.status < 300 or response.status == 404
        return False

    async def would_take(self, pod: dict[str, Any]) -> Diagnosis | None:
        """Why the API server would not make this pod now; None: it would."""
        doing = f"create pod {pod['metadata']['name']} in namespace {self.namespace}"
        try:
            await self._json(self._api.create_namespaced_pod, doing, body=pod, dry_run="All")
        except _Refusal as error:
            return error.diagnosis
        except Exception as error:  # noqa: BLE001 - nobody answers: the same as if there were no room yet
            return refusal(0, str(error), doing)
        return None

    async def _json(self, call: Callable[..., Any], doing: str, **arguments: Any) -> Any:
        response = await call(self.namespace, _preload_content=False, **arguments)
        await _checked(response, doing)
        return json.loads(await response.read())


class _Refusal(Exception):
    def __init__(self, diagnosis: Diagnosis) -> None:
        super().__init__(diagnosis.sentence)
        self.diagnosis = diagnosis


async def _checked(response: Any, doing: str) -> None:
    """Raise unless the answer is a good one: a refusal that lasts, or anything that passes."""
    if response.status < 300:
        return
    diagnosis = refusal(response.status, (await response.read()).decode("utf-8", "replace"), doing)
    if diagnosis.reason == "ApiServer":
        raise ConnectionError(diagnosis.sentence)
    raise _Refusal(diagnosis)


_KILLS: set[asyncio.Task[None]] = set()  # a loop itself does not keep its tasks
# One loop runs all triggers of a process; tests have several.
_NAMESPACES: dict[tuple[asyncio.AbstractEventLoop, str], tuple[_Namespace, asyncio.Task[None]]] = {}


@asynccontextmanager
async def _shared(cluster: Mapping[str, Any], name: str) -> AsyncIterator[_Namespace]:
    """The namespace that all triggers of this process share, watched while any of them needs it."""
    key = asyncio.get_running_loop(), json.dumps([cluster, name], sort_keys=True)
    if key not in _NAMESPACES:
        made = _Namespace(cluster, name)
        _NAMESPACES[key] = made, asyncio.create_task(made.keep_looking())
    namespace, looking = _NAMESPACES[key]
    namespace.users += 1
    try:
        yield namespace
    finally:
        namespace.users -= 1
        if not namespace.users:
            del _NAMESPACES[key]
            looking.cancel()
            with suppress(asyncio.CancelledError):
                await looking


def _hook(cluster: Mapping[str, Any]) -> tuple[Any, Any]:
    """The hook that a deferred ``KubernetesPodOperator`` would use, and the API's class.

    A kubeconfig is read here, and is in no trigger's row.
    """
    import yaml
    from airflow.providers.cncf.kubernetes.hooks.kubernetes import AsyncKubernetesHook
    from kubernetes_asyncio.client import CoreV1Api

    config: Any = None
    if cluster["config_file"]:
        try:
            with open(cluster["config_file"], encoding="utf-8") as file:
                config = yaml.safe_load(file)
        except (OSError, yaml.YAMLError) as error:
            raise BadConfiguration(
                f"the triggerer cannot read the kubeconfig {cluster['config_file']!r} ({error}): put it there too, or use a "
                "Connection (kubernetes_conn_id)."
            ) from None
    hook = AsyncKubernetesHook(
        config_dict=config,
        conn_id=cluster["kubernetes_conn_id"] or "kubernetes_default",
        in_cluster=cluster["in_cluster"],
        cluster_context=cluster["cluster_context"],
    )
    return hook, CoreV1Api
