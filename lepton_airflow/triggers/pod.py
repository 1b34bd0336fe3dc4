"""Wait for a stage's pod without a worker slot, in Airflow's triggerer.

The event of the trigger says only that the worker should look again. It is no evidence of what the pod did.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from lepton_airflow.connections import Connection, redactor
from lepton_airflow.execution.output import level_of
from lepton_airflow.pods import API_AWAY_S, API_PAUSE_S, TRY, PodJson
from lepton_airflow.pods.lifecycle import (
    Action,
    Clocks,
    annotation,
    container_state,
    decide,
    describe_wait,
    is_terminating,
    logged_containers,
)
from lepton_airflow.pods.task_state import DEFERRED, state_of
from lepton_airflow.pods.watch import NamespaceWatch, watched

_LOG_EVERY_S = 10.0  # how often new log lines are read while the stage runs
_ROOM_EVERY_S = 15.0  # how often a dry run asks whether a full quota has room
# No trigger fires sooner after its start. A task that is resumed before the scheduler has heard that its worker deferred it
# counts as failed ("finished with state success, but the task instance's state attribute is queued").
_SOONEST_S = 5.0
# The end of the log that an event takes to the worker. An event is a row of Airflow's database.
_TAIL_LINES, _TAIL_BYTES = 50, 8192


class PodTrigger(BaseTrigger):
    """Wait until there is something to do about a run's pods.

    :param cluster: how to reach it: ``kubernetes_conn_id``, ``config_file``, ``cluster_context``, ``in_cluster``. No secrets.
    :param namespace: the namespace of the pods.
    :param run_key: the run key of the pods.
    :param owned: uid of the pod of this try.
    :param try_id: id of this try.
    :param digest: digest of what was asked for, see :func:`lepton_airflow.pods.lifecycle.decide`.
    :param clocks: the limits, as a dict of :class:`lepton_airflow.pods.lifecycle.Clocks`.
    :param read: for each container, the time of the last line that has been logged.
    :param connections: ids of the Connections whose secrets are kept out of the log.
    :param refused: a pod that could not be created because a quota was full: wait until it can be.
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
        self._pod_is_going = False
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
        """Send one event when the worker should look again; its ``refused`` says why this triggerer may not watch."""
        started = time.monotonic()
        async with watched(self.cluster, self.namespace) as namespace:
            wait = self._wait_for_room if self.refused else self._wait_for_action
            refusal = await wait(namespace)
        await asyncio.sleep(max(0.0, _SOONEST_S - (time.monotonic() - started)))
        self._fired = True
        event: dict[str, Any] = {"read": self.read, "refused": refusal}
        if self._pod_is_going:  # the worker may find no log any more
            event["tail"] = self._last_lines()
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def _wait_for_action(self, namespace: NamespaceWatch) -> str:
        """Return when there is something else to do than to wait; with the API server's refusal, if it refused."""
        await self._wait_until_known(namespace)
        while not namespace.refusal and not self._worker_must_act(namespace):
            action = self._decide(namespace.pods[self.run_key].values())
            # The watch may lag behind, so the API server is asked; what has ended stays ended.
            if action.kind not in ("wait", "collect"):
                found = await namespace.list_pods(self.run_key)
                action = Action("wait") if found is None else self._decide(found)
            if action.kind != "wait":
                if action.pod is not None and is_terminating(action.pod):
                    await self._forward_log(namespace, action.pod)
                    self._pod_is_going = True
                elif action.kind == "gone":
                    self._pod_is_going = True
                return ""
            if action.pod is not None:
                self._say(describe_wait(action))
                if container_state(action.pod)[0] != "waiting":
                    await self._forward_log(namespace, action.pod)
            await namespace.wait_for_change(self.run_key, self._pause_s(action))
        return namespace.refusal

    def _decide(self, pods: Iterable[PodJson]) -> Action:
        return decide(
            list(pods),
            owned=self.owned,
            try_id=self.try_id,
            digest=self.digest,
            clocks=Clocks(**self.clocks),
            now=time.time(),
        )

    def _pause_s(self, action: Action) -> float:
        """How long to wait for a change before the next look [seconds]."""
        logs = action.pod is not None and container_state(action.pod)[0] != "waiting"
        pause_s = _LOG_EVERY_S if logs else API_PAUSE_S
        for moment in (action.until, self.clocks["deadline"]):
            if moment is not None:
                pause_s = min(pause_s, max(0.1, moment - time.time()))
        return pause_s

    async def _wait_for_room(self, namespace: NamespaceWatch) -> str:
        """Return when the API server would create the pod; with its refusal, if it refused to be watched."""
        await self._wait_until_known(namespace)
        while not namespace.refusal and not self._worker_must_act(namespace):
            diagnosis = await namespace.dry_run(self.refused or {})
            if diagnosis is None or diagnosis.then != "wait" or diagnosis.reason == "Conflict":
                return ""  # the worker gets the same answer, and reports it
            self._say(f"waiting: {diagnosis.sentence}")
            await asyncio.sleep(_ROOM_EVERY_S)
        return namespace.refusal

    async def _wait_until_known(self, namespace: NamespaceWatch) -> None:
        while not namespace.is_known and not self._worker_must_act(namespace):
            deadline = self.clocks["deadline"]
            left = API_PAUSE_S if deadline is None else max(0.0, deadline - time.time())
            await namespace.wait_until_known(min(API_PAUSE_S, left))

    def _worker_must_act(self, namespace: NamespaceWatch) -> bool:
        """Whether the worker must act without an answer: the task's time is over, or the API server is away for long.

        In the latter case the worker asks too, and fails the try if it gets no answer either.
        """
        deadline = self.clocks["deadline"]
        return (deadline is not None and time.time() >= deadline) or namespace.away_s >= API_AWAY_S

    # -- the log -------------------------------------------------------------------------------------------------------

    def _say(self, what: str) -> None:
        if what != self._said:
            self.log.info("%s", what)
            self._said = what

    async def _forward_log(self, namespace: NamespaceWatch, pod: PodJson) -> None:
        """Write new lines of the pod into the task's log, as many as one read may bring."""
        if self._hide is None:
            try:
                self._hide = await _redactor(self.connections)
            except Exception as error:  # noqa: BLE001 - whatever a secrets backend raises: the worker reads the log at the end
                kind = type(error).__name__
                self._say(f"the log comes at the end, because a Connection cannot be read here: {kind}")
                return
        for container in logged_containers(pod):
            after = self.read.get(container, "")
            if container_state(pod, container)[0] == "waiting":
                continue
            for stamp, line in await namespace.log_lines(pod, container, after):
                level, text = level_of(self._hide(line))
                self.log.log(level, "%s", text)
                self._tail.append((level, text))
                self.read[container] = stamp

    def _last_lines(self) -> list[tuple[int, str]]:
        """The last lines that were logged here, as many as an event may hold."""
        last: list[tuple[int, str]] = []
        left = _TAIL_BYTES
        for level, text in reversed(self._tail):
            left -= len(text.encode())
            if left < 0:
                break
            last.append((level, text))
        return last[::-1]

    # -- being stopped -------------------------------------------------------------------------------------------------

    async def on_kill(self) -> None:
        """Delete the pod when somebody ends or clears the task while it is deferred, if this try owns the pod."""
        if self._fired or self.owned is None:
            return
        # Airflow cancels the trigger again each time it looks at its database, every second, and would cancel this call too.
        killing = asyncio.create_task(self._delete_own())
        _KILLS.add(killing)
        killing.add_done_callback(_KILLS.discard)
        await asyncio.shield(killing)

    async def _delete_own(self) -> None:
        async with watched(self.cluster, self.namespace) as namespace:
            await namespace.wait_until_known(API_PAUSE_S)
            for _ in range(60):
                found = await namespace.list_pods(self.run_key)
                pod = next((p for p in found or () if p["metadata"]["uid"] == self.owned), None)
                if found is not None and (pod is None or not self._may_delete(pod)):
                    return
                if pod is not None and await namespace.delete(pod):
                    self.log.info("pod %s was deleted, because the task was ended", pod["metadata"]["name"])
                    return
                await asyncio.sleep(0.5)

    def _may_delete(self, pod: PodJson) -> bool:
        return not is_terminating(pod) and annotation(pod, TRY) == self.try_id

    async def cleanup(self) -> None:
        """Delete the pod as :meth:`on_kill` does, if Airflow took the task away: before 3.3 it does not call that."""
        if hasattr(BaseTrigger, "on_kill") or self._fired or self.task_instance is None:
            return
        with suppress(Exception):
            if await asyncio.to_thread(state_of, self.task_instance) != DEFERRED:
                await self.on_kill()


_KILLS: set[asyncio.Task[None]] = set()  # an event loop holds only weak references to its tasks


async def _redactor(conn_ids: list[str]) -> Callable[[str], str]:
    """A function that takes the secrets of these Connections out of a line."""
    from airflow.providers.common.compat.connection import get_async_connection

    # The host too: it may be a URL with a password in it.
    return redactor(
        {conn_id: Connection.of_airflow(conn_id, await get_async_connection(conn_id)) for conn_id in conn_ids}
    )
