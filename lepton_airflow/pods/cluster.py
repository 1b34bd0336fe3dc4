"""The API server, called through the hook that a ``KubernetesPodOperator`` would use.

So an installation's ways to reach its clusters (Connections, kubeconfigs, service accounts) and its mutation hook apply
here too. Answers are plain JSON. A call that nobody answers is repeated; a refusal raises
:class:`~lepton_airflow.pods.diagnosis.ApiRefused`.
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
    STORE,
)
from lepton_airflow.pods.diagnosis import ApiRefused, diagnose_refusal
from lepton_airflow.pods.lifecycle import unix_time
from lepton_airflow.pods.logs import is_later, lines_of, since_s
from lepton_airflow.pods.manifest import secret_name
from lepton_airflow.pods.settings import PodSettings

log = logging.getLogger(__name__)

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Cluster:
    """One namespace of one cluster, as the settings of a Pod name it."""

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
        self._forbidden_calls: set[str] = set()  # of those that a warning has named
        hook: Any = self._operator.hook
        self.in_cluster: bool = hook.is_in_cluster
        self.namespace: str = settings.namespace or hook.get_namespace() or self._own_namespace() or "default"

    def _own_namespace(self) -> str | None:
        return _NAMESPACE_FILE.read_text().strip() if self.in_cluster and _NAMESPACE_FILE.exists() else None

    # -- reading -----------------------------------------------------------------------------------------------------

    def list_pods(self, run_key: str) -> tuple[list[dict[str, Any]], str]:
        """All pods of a run key, and the resource version of the list, from which :meth:`wait_for_change` watches."""
        found = self._call(
            f"list pods in namespace {self.namespace}",
            lambda: self._core.list_namespaced_pod(
                self.namespace, label_selector=f"{RUN_KEY}={run_key}", _preload_content=False
            ),
        )
        return found["items"], found["metadata"]["resourceVersion"]

    def wait_for_change(self, run_key: str, version: str, within_s: float) -> None:
        """Return when a pod of the run key changes, after so many seconds, or when the server closes the connection."""
        within_s = math.ceil(max(1, within_s))
        started = time.monotonic()
        with suppress(OSError, *_client_errors()):
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
        # The watch failed: poll instead.
        time.sleep(max(0.0, min(2.0, within_s - (time.monotonic() - started))))

    def events(self, pod: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The events about a pod, oldest first; none where reading events is forbidden."""
        found = self._call(
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
        """The lines of a container as it writes them, each with its time, from the first one after ``after``.

        Ends with the container, after ``quiet_s`` seconds without a line, or when the server closes the connection.
        """
        age = {"since_seconds": since_s(after)} if after else {}
        with (
            suppress(OSError, *_client_errors()),
            self._warning_if_forbidden(f"read the log of {pod['metadata']['name']}"),
        ):
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
                    if is_later(stamp, after):
                        yield stamp, line
            finally:
                response.close()

    @contextmanager
    def _warning_if_forbidden(self, doing: str) -> Iterator[None]:
        """Warn once that a call is forbidden whose failure the caller ignores."""
        from kubernetes.client import ApiException

        try:
            yield
        except ApiException as error:
            if error.status == 403 and doing not in self._forbidden_calls:
                self._forbidden_calls.add(doing)
                log.warning("%s", diagnose_refusal(403, error.body or "", doing).sentence)
            raise

    # -- writing -----------------------------------------------------------------------------------------------------

    def submit(self, secret: dict[str, Any], pod: dict[str, Any]) -> dict[str, Any] | None:
        """Create the Secret, then the pod, then make the pod the Secret's owner; None when the pod's name is taken.

        :raises ApiRefused: the pod may not be created; the Secret has been deleted again.
        """
        name, where = pod["metadata"]["name"], f"in namespace {self.namespace}"
        # Before the Secret exists: this is the installation's own code, which may raise.
        pod = self._mutated(pod)
        self._call(
            f"create a secret {where}",
            lambda: self._core.create_namespaced_secret(self.namespace, secret, _preload_content=False),
            {409: None},  # created by an earlier call whose answer was lost
        )
        try:
            created = self._call(
                f"create pod {name} {where}",
                lambda: self._core.create_namespaced_pod(self.namespace, pod, _preload_content=False),
                {409: None},
            )
            # The name is taken: by an earlier call of ours whose answer was lost, or by another try.
            if created is None:
                created = self._read(name)
                if created is None or secret_name(created) != secret["metadata"]["name"]:
                    self._drop_secret(secret["metadata"]["name"])
                    return None
        except ApiRefused:
            self._drop_secret(secret["metadata"]["name"])
            raise
        self.set_secret_owner(created)
        return created

    def set_secret_owner(self, pod: Mapping[str, Any]) -> None:
        """Make a pod the owner of its Secret, so that Kubernetes deletes the Secret together with the pod."""
        owner = {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": pod["metadata"]["name"],
            "uid": pod["metadata"]["uid"],
        }
        self._call(
            f"patch a secret in namespace {self.namespace}",
            lambda: self._core.patch_namespaced_secret(
                secret_name(pod),
                self.namespace,
                {"metadata": {"ownerReferences": [owner]}},
                _preload_content=False,
            ),
            {404: None},
        )

    def annotate(self, pod: Mapping[str, Any], annotations: Mapping[str, str]) -> dict[str, Any] | None:
        """Add annotations to exactly the pod that was seen; None when it has changed since, or is gone."""
        meta = pod["metadata"]
        return self._call(
            f"patch pod {meta['name']} in namespace {self.namespace}",
            lambda: self._core.patch_namespaced_pod(
                meta["name"],
                self.namespace,
                {"metadata": {**_precondition(pod), "annotations": dict(annotations)}},
                _preload_content=False,
            ),
            {409: None, 404: None},
        )

    def delete(self, pod: Mapping[str, Any]) -> bool:
        """Delete exactly the pod that was seen; False when it has changed since."""
        name = pod["metadata"]["name"]
        done = self._call(
            f"delete pod {name} in namespace {self.namespace}",
            lambda: self._core.delete_namespaced_pod(
                name, self.namespace, body={"preconditions": _precondition(pod)}, _preload_content=False
            ),
            {409: False, 404: True},
        )
        return done is not False

    def sweep_secrets(self, store_id: str) -> None:
        """Delete a store's Secrets whose task died before it created their pod; does nothing where that is forbidden."""
        with suppress(ApiRefused):
            found = self._call(
                f"list secrets in namespace {self.namespace}",
                lambda: self._core.list_namespaced_secret(
                    self.namespace,
                    label_selector=f"{MANAGED_BY}={MANAGER},{STORE}={store_id}",
                    _preload_content=False,
                ),
                {403: {"items": []}},
            )
            for secret in found["items"]:
                meta = secret["metadata"]
                if (
                    meta.get("ownerReferences")
                    or time.time() - unix_time(meta["creationTimestamp"]) < ORPHANED_S
                ):
                    continue
                pods, _ = self.list_pods(meta["labels"][RUN_KEY])
                user = next((p for p in pods if secret_name(p) == meta["name"]), None)
                # Its task died after it created the pod and before it made the pod the owner.
                if user is not None:
                    self.set_secret_owner(user)
                else:
                    self._drop_secret(meta["name"])

    def list_all(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """All pods and Secrets in the namespace that this package created."""
        selector = f"{MANAGED_BY}={MANAGER}"
        pods = self._call(
            f"list pods in namespace {self.namespace}",
            lambda: self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _preload_content=False
            ),
        )
        secrets = self._call(
            f"list secrets in namespace {self.namespace}",
            lambda: self._core.list_namespaced_secret(
                self.namespace, label_selector=selector, _preload_content=False
            ),
        )
        return pods["items"], secrets["items"]

    def delete_secret(self, secret: Mapping[str, Any]) -> bool:
        """Delete exactly the Secret that was seen; False when it has changed since."""
        name = secret["metadata"]["name"]
        done = self._call(
            f"delete a secret in namespace {self.namespace}",
            lambda: self._core.delete_namespaced_secret(
                name, self.namespace, body={"preconditions": _precondition(secret)}, _preload_content=False
            ),
            {409: False, 404: True},
        )
        return done is not False

    def for_signal_handler(self) -> Cluster:
        """The same namespace with a client of its own: the handler may have interrupted a call that holds a lock of ours."""
        from kubernetes.client import CoreV1Api

        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        hook: Any = self._operator.hook
        other._core = CoreV1Api(hook.get_conn())
        return other

    def _read(self, name: str) -> dict[str, Any] | None:
        return self._call(
            f"get pod {name} in namespace {self.namespace}",
            lambda: self._core.read_namespaced_pod(name, self.namespace, _preload_content=False),
            {404: None},
        )

    def _drop_secret(self, name: str) -> None:
        self._call(
            f"delete a secret in namespace {self.namespace}",
            lambda: self._core.delete_namespaced_secret(name, self.namespace, _preload_content=False),
            {404: None},
        )

    def _mutated(self, pod: dict[str, Any]) -> dict[str, Any]:
        """The pod after the installation's ``pod_mutation_hook``."""
        from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
        from airflow.settings import pod_mutation_hook

        model = PodGenerator.deserialize_model_dict(pod)
        before = self._core.api_client.sanitize_for_serialization(model)
        pod_mutation_hook(model)  # type: ignore[no-untyped-call]
        after = self._core.api_client.sanitize_for_serialization(model)
        # The client's model drops fields that it does not know, so a pod that the hook left alone stays as it was.
        return pod if before == after else after

    def _call(
        self,
        doing: str,
        call: Callable[[], Any],
        answers: Mapping[int, Any] | None = None,
    ) -> Any:
        """The JSON that a call answers with, or what ``answers`` has for its status; repeated while nobody answers.

        :raises ApiRefused: the server refused the call.
        :raises RunnerError: there was no answer for :data:`~lepton_airflow.pods.API_AWAY_S`.
        """
        from kubernetes.client import ApiException

        started, pause = time.monotonic(), 0.5
        # A proxy before a server that does not answer may send a page of its own.
        lost: tuple[type[Exception], ...] = (OSError, json.JSONDecodeError, *_client_errors())
        while True:
            try:
                return json.loads(call().data)
            except ApiException as error:
                status = int(error.status or 0)
                if status in (answers or {}):
                    return (answers or {})[status]
                found = diagnose_refusal(status, error.body or error.reason or "", doing)
                unsure = found.reason == "Forbidden" and time.monotonic() - started < REFUSAL_SURE_S
                if found.reason != "ApiServer" and not unsure:
                    raise ApiRefused(found) from None
            except lost as error:
                found = diagnose_refusal(0, str(error), doing)
            if time.monotonic() + pause > started + API_AWAY_S:
                raise RunnerError(f"{found.sentence} It was asked for {API_AWAY_S:.0f} s.") from None
            log.warning("%s", found.sentence)
            time.sleep(pause)
            pause = min(2 * pause, API_PAUSE_S)


def _client_errors() -> tuple[type[Exception], ...]:
    """What the client raises for a call that fails: the server refused it, did not answer, or broke off."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    return ApiException, HTTPError


def _precondition(thing: Mapping[str, Any]) -> dict[str, str]:
    """What makes a call fail when the pod or Secret is no longer the one that was seen."""
    meta = thing["metadata"]
    return {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
