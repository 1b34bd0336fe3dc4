"""What waits without a worker slot, in Airflow's triggerer: it only says when to look again, and is proof of nothing.

All triggers of a triggerer process share one client and one LIST and WATCH for each namespace, so that a hundred deferred
tasks ask the API server as much as one does, and take little memory.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from lepton_airflow.connections import redactor
from lepton_airflow.execution.output import level_of
from lepton_airflow.pods import API_AWAY_S, API_PAUSE_S, TRY
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
from lepton_airflow.pods.task_state import state_of
from lepton_airflow.pods.watch import NamespaceWatch, watched

_LOOK_S = 10.0  # how often new log lines are asked for while the stage runs
_CREATE_S = 15.0  # how often room for a pod is asked for
# A task that is resumed before the scheduler has heard that its worker deferred it counts as failed ("finished with state
# success, but the task instance's state attribute is queued"): so no trigger fires sooner after its start.
_SOONEST_S = 5.0
_TAIL_LINES, _TAIL_BYTES = 50, 8192  # of the log, for the worker: an event is a row of Airflow's database


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
        async with watched(self.cluster, self.namespace) as namespace:
            said = await (self._room(namespace) if self.refused else self._change(namespace))
        await asyncio.sleep(max(0.0, _SOONEST_S - (time.monotonic() - started)))
        self._fired = True
        last = {"tail": self._last_lines()} if self._gone else {}  # else the worker can ask the pod
        yield TriggerEvent({"read": self.read, "refused": said} | last)  # type: ignore[no-untyped-call]

    async def _change(self, namespace: NamespaceWatch) -> str:
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
            wait_s = API_PAUSE_S
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

    async def _room(self, namespace: NamespaceWatch) -> str:
        """Until the API server would take the pod; what it refused for good, if it did."""
        await self._first_look(namespace)
        while not namespace.refused and not self._late(namespace):
            found = await namespace.would_take(self.refused or {})
            if found is None or found.then != "wait" or found.reason == "Conflict":
                return ""  # the worker meets the same answer, and says it
            self._say(f"waiting: {found.sentence}")
            await asyncio.sleep(_CREATE_S)
        return namespace.refused

    async def _first_look(self, namespace: NamespaceWatch) -> None:
        while not namespace.looked and not self._late(namespace):
            deadline = self.clocks["deadline"]
            left = API_PAUSE_S if deadline is None else max(0.0, deadline - time.time())
            await namespace.first_look(min(API_PAUSE_S, left))

    def _late(self, namespace: NamespaceWatch) -> bool:
        """Whether the worker must act though nobody answers here: the task's time is over, or the server is long away."""
        deadline = self.clocks["deadline"]
        return (deadline is not None and time.time() >= deadline) or namespace.away_s >= API_AWAY_S

    def _say(self, what: str) -> None:
        if what != self._said:
            self.log.info("%s", what)
            self._said = what

    async def _forward(self, namespace: NamespaceWatch, pod: Seen) -> None:
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
        async with watched(self.cluster, self.namespace) as namespace:
            await namespace.first_look(API_PAUSE_S)
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


_KILLS: set[asyncio.Task[None]] = set()  # a loop itself does not keep its tasks
