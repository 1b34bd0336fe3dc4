"""The pods of a namespace as a triggerer process sees them: one LIST and one WATCH, shared by all that wait in it.

So a hundred deferred tasks put the same load on the API server as one, and take little memory.
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
from lepton_airflow.pods import API_PAUSE_S, MANAGED_BY, MANAGER, REFUSAL_SURE_S, RUN_KEY, PodJson
from lepton_airflow.pods.diagnosis import ApiRefused, Diagnosis, diagnose_refusal
from lepton_airflow.pods.logs import is_later, lines_of, since_s

log = logging.getLogger(__name__)

_WATCH_S = 280  # a watch ends after so long, and the next one reads the credentials anew
# Bytes of one read of a log. The worker reads what is beyond them, so that one task's log does not hold up the others.
_LOG_BYTES = 1 << 20


class NamespaceWatch:
    """What this process knows about the pods of one namespace.

    :ivar pods: for each run key its pods, by their uid.
    :ivar refusal: why this process may not watch the namespace; empty while it may, or while nobody knows.
    :ivar users: how many triggers wait here.
    """

    def __init__(self, cluster: Mapping[str, Any], namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.users = 0
        self.pods: defaultdict[str, dict[str, PodJson]] = defaultdict(dict)
        self.refusal = ""
        self._api: Any = None
        self._known = asyncio.Event()
        self._away_since: float | None = time.monotonic()
        self._changes: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._selector = f"{MANAGED_BY}={MANAGER}"

    # -- watching ------------------------------------------------------------------------------------------------------

    async def keep_watching(self) -> None:
        """LIST, then WATCH, and again, until this is cancelled."""
        client: tuple[Any, Any] | None = None
        refused_since: float | None = None
        pause = 0.5
        while True:
            try:
                # In a thread: importing the client takes seconds, in which no other trigger of this process would run.
                if client is None:
                    client = await asyncio.to_thread(_client, self.cluster)
                hook, api_class = client
                async with hook.get_conn() as connection:
                    self._api = api_class(connection)
                    version = await self._list()
                    pause, refused_since, self._away_since = 0.5, None, None
                    await self._watch(version)
            except Exception as error:  # noqa: BLE001 - no error may fail the tasks that wait: try again
                self._away_since = self._away_since or time.monotonic()
                log.warning("the pods of namespace %s cannot be watched now: %s", self.namespace, error)
                if isinstance(error, (ApiRefused, BadConfiguration)):
                    refused_since = refused_since or time.monotonic()
                    if time.monotonic() - refused_since >= REFUSAL_SURE_S:
                        self.refusal = str(error)
                        self._wake_all()
            self._api = None
            await asyncio.sleep(pause)
            pause = min(2 * pause, API_PAUSE_S)

    async def _list(self) -> str:
        found = await self._call(
            self._api.list_namespaced_pod,
            f"list pods in namespace {self.namespace}",
            label_selector=self._selector,
        )
        self.pods.clear()
        for pod in found["items"]:
            self._update(pod)
        self._wake_all()
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
            await _raise_for_status(response, f"watch pods in namespace {self.namespace}")
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":  # the version is too old, for example: list again
                    return
                self._update(event["object"], deleted=event["type"] == "DELETED")
        finally:
            response.close()

    def _update(self, pod: dict[str, Any], *, deleted: bool = False) -> None:
        run_key, uid = pod["metadata"].get("labels", {}).get(RUN_KEY, ""), pod["metadata"]["uid"]
        if deleted:
            self.pods[run_key].pop(uid, None)
        else:
            pod["metadata"].pop("managedFields", None)  # large, and never looked at
            self.pods[run_key][uid] = pod
        self._changes[run_key].set()

    def _wake_all(self) -> None:
        self._known.set()
        for event in self._changes.values():
            event.set()

    # -- waiting -------------------------------------------------------------------------------------------------------

    @property
    def is_known(self) -> bool:
        """Whether the pods have been listed, or listing them is refused."""
        return self._known.is_set()

    @property
    def away_s(self) -> float:
        """For how long the API server has not answered [seconds]."""
        return 0.0 if self._away_since is None else time.monotonic() - self._away_since

    async def wait_until_known(self, within_s: float) -> None:
        """Return when :attr:`is_known` is true, or after so many seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._known.wait(), within_s)

    async def wait_for_change(self, run_key: str, within_s: float) -> None:
        """Return when a pod of the run changes, or after so many seconds."""
        event = self._changes[run_key]
        with suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), within_s)
        event.clear()

    # -- asking --------------------------------------------------------------------------------------------------------

    async def list_pods(self, run_key: str) -> list[PodJson] | None:
        """The pods of a run as they are now; None when the API server does not answer."""
        with suppress(Exception):
            found = await self._call(
                self._api.list_namespaced_pod, "list pods", label_selector=f"{RUN_KEY}={run_key}"
            )
            return list(found["items"])
        return None

    async def log_lines(self, pod: PodJson, container: str, after: str) -> list[tuple[str, str]]:
        """Lines of a container after a time; none where they cannot be read now, because the worker reads them at the end."""
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
            await _raise_for_status(response, "read a log")
            text = await response.read()
            # The last line is left for the next read when it is still being written, or was cut by the limit.
            whole = text[: text.rfind(b"\n") + 1]
            return [(stamp, line) for stamp, line in lines_of([whole]) if is_later(stamp, after)]
        return []

    async def delete(self, pod: PodJson) -> bool:
        """Delete exactly this pod; False when it has changed since, or when the API server does not answer."""
        meta = pod["metadata"]
        precondition = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        with suppress(Exception):
            response = await self._api.delete_namespaced_pod(
                meta["name"], self.namespace, body={"preconditions": precondition}, _preload_content=False
            )
            return response.status < 300 or response.status == 404
        return False

    async def dry_run(self, pod: dict[str, Any]) -> Diagnosis | None:
        """Ask whether the API server would create this pod now: None if it would, else why not."""
        doing = f"create pod {pod['metadata']['name']} in namespace {self.namespace}"
        try:
            await self._call(self._api.create_namespaced_pod, doing, body=pod, dry_run="All")
        except ApiRefused as error:
            return error.diagnosis
        except Exception as error:  # noqa: BLE001 - no answer: ask again later, as when the quota is full
            return diagnose_refusal(0, str(error), doing)
        return None

    async def _call(self, call: Callable[..., Any], doing: str, **arguments: Any) -> Any:
        response = await call(self.namespace, _preload_content=False, **arguments)
        await _raise_for_status(response, doing)
        return json.loads(await response.read())


async def _raise_for_status(response: Any, doing: str) -> None:
    """Raise ApiRefused for a refusal that lasts, and ConnectionError for a failure that may pass."""
    if response.status < 300:
        return
    diagnosis = diagnose_refusal(response.status, (await response.read()).decode("utf-8", "replace"), doing)
    if diagnosis.reason == "ApiServer":
        raise ConnectionError(diagnosis.sentence)
    raise ApiRefused(diagnosis)


# One loop runs all triggers of a process; tests have several.
_NAMESPACES: dict[tuple[asyncio.AbstractEventLoop, str], tuple[NamespaceWatch, asyncio.Task[None]]] = {}


@asynccontextmanager
async def watched(cluster: Mapping[str, Any], name: str) -> AsyncIterator[NamespaceWatch]:
    """The namespace that all triggers of this process share, watched while any of them needs it.

    :param cluster: how to reach it: ``kubernetes_conn_id``, ``config_file``, ``cluster_context``, ``in_cluster``.
    """
    key = asyncio.get_running_loop(), json.dumps([cluster, name], sort_keys=True)
    if key not in _NAMESPACES:
        new = NamespaceWatch(cluster, name)
        _NAMESPACES[key] = new, asyncio.create_task(new.keep_watching())
    namespace, watching = _NAMESPACES[key]
    namespace.users += 1
    try:
        yield namespace
    finally:
        namespace.users -= 1
        if not namespace.users:
            del _NAMESPACES[key]
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching


def _client(cluster: Mapping[str, Any]) -> tuple[Any, Any]:
    """The hook that a deferred ``KubernetesPodOperator`` would use, and the class of the API.

    A kubeconfig is read here, so its contents stand in no trigger's row of Airflow's database.
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
