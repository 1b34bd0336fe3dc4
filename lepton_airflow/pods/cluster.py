"""The API server, asked through the hook and the pod manager that a ``KubernetesPodOperator`` would use.

So every way in which an installation reaches its clusters (Connections, kubeconfigs, service accounts, mutation hooks)
holds here too. What comes back is plain JSON. A server that is away is asked again; a refusal is a :class:`Refused`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lepton_airflow.errors import BadConfiguration, RunnerError
from lepton_airflow.pods import (
    API_AWAY_S,
    API_PAUSE_S,
    MANAGED_BY,
    MANAGER,
    ORPHANED_S,
    REFUSAL_SURE_S,
    RUN_KEY,
)
from lepton_airflow.pods.diagnosis import Diagnosis, refused
from lepton_airflow.pods.lifecycle import seconds
from lepton_airflow.pods.logs import later, lines_of, since_s
from lepton_airflow.pods.manifest import secret_name
from lepton_airflow.pods.settings import PodSettings

log = logging.getLogger(__name__)

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Refused(Exception):
    """The API server said no; ``diagnosis`` says what that means."""

    def __init__(self, status: int, diagnosis: Diagnosis) -> None:
        super().__init__(diagnosis.sentence)
        self.status = status
        self.diagnosis = diagnosis


class Cluster:
    """One namespace of one cluster, as a Pod's settings name it."""

    def __init__(self, settings: PodSettings, *, in_airflow: bool) -> None:
        from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
        from airflow.providers.common.compat.sdk import AirflowNotFoundException
        from kubernetes.config import ConfigException

        conn_id = settings.kubernetes_conn_id or ("kubernetes_default" if in_airflow else None)
        self._operator = KubernetesPodOperator(
            task_id="pod",
            kubernetes_conn_id=conn_id,
            config_file=settings.config_file,
            cluster_context=settings.cluster_context,
            in_cluster=settings.in_cluster,
        )
        try:
            self._core = self._operator.client
        except AirflowNotFoundException:
            raise BadConfiguration(
                f"Pod(kubernetes_conn_id={conn_id!r}): there is no such Connection; make it in Airflow (Admin, Connections) or "
                f"set AIRFLOW_CONN_{str(conn_id).upper()}."
            ) from None
        except (ConfigException, OSError) as error:
            raise BadConfiguration(
                f"Pod: no way to a cluster is configured ({error}): set kubernetes_conn_id to a Connection, config_file "
                "to a kubeconfig, or run the worker in the cluster."
            ) from None
        self._forbidden: set[str] = set()
        hook: Any = self._operator.hook
        self.in_cluster: bool = hook.is_in_cluster
        self.namespace: str = settings.namespace or hook.get_namespace() or self._own_namespace() or "default"

    def _own_namespace(self) -> str | None:
        return _NAMESPACE_FILE.read_text().strip() if self.in_cluster and _NAMESPACE_FILE.exists() else None

    # -- reading -----------------------------------------------------------------------------------------------------

    def look(self, run_key: str) -> tuple[list[dict[str, Any]], str]:
        """All pods of a run key, and the version of what was seen, from which changes can be waited for."""
        found = self._ask(
            f"list pods in namespace {self.namespace}",
            lambda: self._core.list_namespaced_pod(
                self.namespace, label_selector=f"{RUN_KEY}={run_key}", _preload_content=False
            ),
        )
        return found["items"], found["metadata"]["resourceVersion"]

    def wait(self, run_key: str, version: str, within_s: float) -> None:
        """Return when a pod of the run key changes, or after so many seconds; also whenever the server hangs up."""
        within_s = math.ceil(max(1, within_s))
        started = time.monotonic()
        with suppress(OSError, *_away()):
            response = self._core.list_namespaced_pod(
                self.namespace,
                label_selector=f"{RUN_KEY}={run_key}",
                resource_version=version,
                watch=True,
                timeout_seconds=within_s,
                _preload_content=False,
                _request_timeout=(10, within_s + 10),
            )
            try:
                next(response.stream(1 << 16, decode_content=False), b"")
                return
            finally:
                response.close()
        time.sleep(max(0.0, min(2.0, within_s - (time.monotonic() - started))))  # it could not be watched

    def events(self, pod: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The events about a pod, oldest first; none where they may not be read."""
        found = self._ask(
            f"list events in namespace {self.namespace}",
            lambda: self._core.list_namespaced_event(
                self.namespace,
                field_selector=f"involvedObject.uid={pod['metadata']['uid']}",
                _preload_content=False,
            ),
            {403: {"items": []}},
        )
        return sorted(found["items"], key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")

    def log_lines(
        self, pod: Mapping[str, Any], container: str, after: str, quiet_s: float
    ) -> Iterator[tuple[str, str]]:
        """The lines of a container as they come, each with its time, from the first one after ``after``.

        Ends when the container does, when nothing came for ``quiet_s`` seconds, and when the server hangs up.
        """
        age = {"since_seconds": since_s(after)} if after else {}
        with suppress(OSError, *_away()), self._told(f"read the log of {pod['metadata']['name']}"):
            response = self._core.read_namespaced_pod_log(
                pod["metadata"]["name"],
                self.namespace,
                container=container,
                follow=True,
                timestamps=True,
                _preload_content=False,
                _request_timeout=(10, quiet_s),
                **age,
            )
            try:
                for stamp, line in lines_of(response.stream(1 << 16, decode_content=False)):
                    if later(stamp, after):
                        yield stamp, line
            finally:
                response.close()

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Say once what is forbidden, where going on without it is better than to fail."""
        from kubernetes.client import ApiException

        try:
            yield
        except ApiException as error:
            if error.status == 403 and doing not in self._forbidden:
                self._forbidden.add(doing)
                log.warning("%s", refused(403, error.body or "", doing).sentence)
            raise

    # -- writing -----------------------------------------------------------------------------------------------------

    def submit(self, secret: dict[str, Any], pod: dict[str, Any]) -> dict[str, Any] | None:
        """Make the Secret, then the pod, then the pod the Secret's owner; None when the pod's name is taken.

        :raises Refused: the pod may not be made; the Secret is gone again then.
        """
        name, where = pod["metadata"]["name"], f"in namespace {self.namespace}"
        pod = self._mutated(pod)  # the installation's own code: it may raise, and then no Secret is left
        self._ask(
            f"create a secret {where}",
            lambda: self._core.create_namespaced_secret(self.namespace, secret, _preload_content=False),
            {409: None},  # an earlier call that seemed to fail
        )
        try:
            made = self._ask(
                f"create pod {name} {where}",
                lambda: self._core.create_namespaced_pod(self.namespace, pod, _preload_content=False),
                {409: None},
            )
            if made is None:  # taken: by our own call whose answer was lost, or by somebody else
                made = self._read(name)
                if made is None or secret_name(made) != secret["metadata"]["name"]:
                    self._drop_secret(secret["metadata"]["name"])
                    return None
        except Refused:
            self._drop_secret(secret["metadata"]["name"])
            raise
        self.own_secret(made)
        return made

    def own_secret(self, pod: Mapping[str, Any]) -> None:
        """Make a pod the owner of its Secret, so that the one goes with the other."""
        owner = {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": pod["metadata"]["name"],
            "uid": pod["metadata"]["uid"],
        }
        self._ask(
            f"patch a secret in namespace {self.namespace}",
            lambda: self._core.patch_namespaced_secret(
                secret_name(pod),
                self.namespace,
                {"metadata": {"ownerReferences": [owner]}},
                _preload_content=False,
            ),
            {404: None},
        )

    def annotate(self, pod: Mapping[str, Any], notes: Mapping[str, str]) -> dict[str, Any] | None:
        """Write on exactly the pod that was seen; None when it has changed since, or is gone."""
        meta = pod["metadata"]
        precondition = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        return self._ask(
            f"patch pod {meta['name']} in namespace {self.namespace}",
            lambda: self._core.patch_namespaced_pod(
                meta["name"],
                self.namespace,
                {"metadata": {**precondition, "annotations": dict(notes)}},
                _preload_content=False,
            ),
            {409: None, 404: None},
        )

    def delete(self, pod: Mapping[str, Any]) -> bool:
        """Delete exactly the pod that was seen; False when it has changed since."""
        meta = pod["metadata"]
        precondition = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        done = self._ask(
            f"delete pod {meta['name']} in namespace {self.namespace}",
            lambda: self._core.delete_namespaced_pod(
                meta["name"], self.namespace, body={"preconditions": precondition}, _preload_content=False
            ),
            {409: False, 404: True},
        )
        return done is not False

    def sweep_secrets(self) -> None:
        """Remove Secrets whose task died before it made their pod; quietly passed over where that is not allowed."""
        with suppress(Refused):
            found = self._ask(
                f"list secrets in namespace {self.namespace}",
                lambda: self._core.list_namespaced_secret(
                    self.namespace, label_selector=f"{MANAGED_BY}={MANAGER}", _preload_content=False
                ),
                {403: {"items": []}},
            )
            for secret in found["items"]:
                meta = secret["metadata"]
                if (
                    meta.get("ownerReferences")
                    or time.time() - seconds(meta["creationTimestamp"]) < ORPHANED_S
                ):
                    continue
                pods, _ = self.look(meta["labels"][RUN_KEY])
                user = next((p for p in pods if secret_name(p) == meta["name"]), None)
                if user is not None:  # its task died between making the pod and making it the owner
                    self.own_secret(user)
                else:
                    self._drop_secret(meta["name"])

    def everything(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """All pods and Secrets in the namespace that this package made."""
        selector = f"{MANAGED_BY}={MANAGER}"
        pods = self._ask(
            f"list pods in namespace {self.namespace}",
            lambda: self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _preload_content=False
            ),
        )
        secrets = self._ask(
            f"list secrets in namespace {self.namespace}",
            lambda: self._core.list_namespaced_secret(
                self.namespace, label_selector=selector, _preload_content=False
            ),
        )
        return pods["items"], secrets["items"]

    def delete_secret(self, secret: Mapping[str, Any]) -> bool:
        """Delete exactly the Secret that was seen; False when it has changed since."""
        meta = secret["metadata"]
        precondition = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        done = self._ask(
            f"delete a secret in namespace {self.namespace}",
            lambda: self._core.delete_namespaced_secret(
                meta["name"], self.namespace, body={"preconditions": precondition}, _preload_content=False
            ),
            {409: False, 404: True},
        )
        return done is not False

    def apart(self) -> Cluster:
        """The same namespace with connections of its own, for a signal handler: it may have interrupted one that holds a lock."""
        from kubernetes.client import CoreV1Api

        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        hook: Any = self._operator.hook
        other._core = CoreV1Api(hook.get_conn())
        return other

    def _read(self, name: str) -> dict[str, Any] | None:
        return self._ask(
            f"get pod {name} in namespace {self.namespace}",
            lambda: self._core.read_namespaced_pod(name, self.namespace, _preload_content=False),
            {404: None},
        )

    def _drop_secret(self, name: str) -> None:
        self._ask(
            f"delete a secret in namespace {self.namespace}",
            lambda: self._core.delete_namespaced_secret(name, self.namespace, _preload_content=False),
            {404: None},
        )

    def _mutated(self, pod: dict[str, Any]) -> dict[str, Any]:
        """The pod as the installation's own ``pod_mutation_hook`` makes it."""
        from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
        from airflow.settings import pod_mutation_hook

        model = PodGenerator.deserialize_model_dict(pod)
        before = self._core.api_client.sanitize_for_serialization(model)
        pod_mutation_hook(model)  # type: ignore[no-untyped-call]
        after = self._core.api_client.sanitize_for_serialization(model)
        return pod if before == after else after  # untouched, it keeps fields that the client does not know

    def _ask(
        self,
        doing: str,
        call: Callable[[], Any],
        answers: Mapping[int, Any] | None = None,
    ) -> Any:
        """The JSON that a call answers with, or what ``answers`` has for its status; asked again while nobody answers.

        :raises Refused: the server answered, and with no.
        :raises RunnerError: there was no answer for :data:`~lepton_airflow.pods.API_AWAY_S`.
        """
        from kubernetes.client import ApiException

        started, pause = time.monotonic(), 0.5
        # A proxy before a server that is away may answer with a page of its own.
        lost: tuple[type[Exception], ...] = (OSError, json.JSONDecodeError, *_away())
        while True:
            try:
                return json.loads(call().data)
            except ApiException as error:
                status = int(error.status or 0)
                if status in (answers or {}):
                    return (answers or {})[status]
                found = refused(status, error.body or error.reason or "", doing)
                unsure = found.reason == "Forbidden" and time.monotonic() - started < REFUSAL_SURE_S
                if found.reason != "ApiServer" and not unsure:
                    raise Refused(status, found) from None
            except lost as error:
                found = refused(0, str(error), doing)
            if time.monotonic() + pause > started + API_AWAY_S:
                raise RunnerError(f"{found.sentence} It was asked for {API_AWAY_S:.0f} s.") from None
            log.warning("%s", found.sentence)
            time.sleep(pause)
            pause = min(2 * pause, API_PAUSE_S)


def _away() -> tuple[type[Exception], ...]:
    """What the client raises when it has no answer, or loses it on the way."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    return ApiException, HTTPError
