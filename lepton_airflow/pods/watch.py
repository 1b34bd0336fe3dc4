"""The pods of a namespace as a triggerer process sees them: one LIST and one WATCH, which all that wait in it share.

A hundred deferred tasks so ask the API server as much as one does, and take little memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from lepton_airflow.errors import BadConfiguration
from lepton_airflow.pods import API_PAUSE_S, MANAGED_BY, MANAGER, REFUSAL_SURE_S, RUN_KEY
from lepton_airflow.pods.diagnosis import Diagnosis, refused as refusal
from lepton_airflow.pods.lifecycle import Seen
from lepton_airflow.pods.logs import later, lines_of, since_s

log = logging.getLogger(__name__)

_WATCH_S = 280  # a watch is renewed so often, with the credentials of then
_LOG_BYTES = (
    1 << 20
)  # of one look: what is more is left to the worker, so that one task's log holds up no other's


class NamespaceWatch:
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
                    if time.monotonic() - unsure_since >= REFUSAL_SURE_S:
                        self.refused = str(error)
                        self._wake()
            self._api = None
            await asyncio.sleep(pause)
            pause = min(2 * pause, API_PAUSE_S)

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


# One loop runs all triggers of a process; tests have several.
_NAMESPACES: dict[tuple[asyncio.AbstractEventLoop, str], tuple[NamespaceWatch, asyncio.Task[None]]] = {}


@asynccontextmanager
async def watched(cluster: Mapping[str, Any], name: str) -> AsyncIterator[NamespaceWatch]:
    """The namespace that all triggers of this process share, watched while any of them needs it."""
    key = asyncio.get_running_loop(), json.dumps([cluster, name], sort_keys=True)
    if key not in _NAMESPACES:
        made = NamespaceWatch(cluster, name)
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
