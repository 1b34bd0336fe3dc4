"""Run a stage in a Kubernetes pod, in the cluster and with the rights that the installation's pod operators use.

:meth:`Pod.run` keeps no state of its own. Entered for the first time, after a deferral, by a retry after the worker died:
it looks at the pods that there are for the run key, decides (:func:`lepton_airflow.pods.lifecycle.decide`), acts, and looks
again. It ends with the receipt of this very pod, read from the store, or it raises.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self, get_args

from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import (
    DO_NOT_RETRY,
    PREEMPTED,
    SKIP,
    BadConfiguration,
    ContractError,
    LeptonError,
    Preempted,
    RunnerError,
    did_you_mean,
    from_record,
)
from lepton_airflow.runners import Runner, level_of, settle
from lepton_airflow.store import Connection, Store

if TYPE_CHECKING:
    from lepton_airflow.pods.cluster import Cluster
    from lepton_airflow.pods.diagnosis import Diagnosis
    from lepton_airflow.pods.lifecycle import Clocks, Step

log = logging.getLogger("lepton_airflow.stage")


@dataclass(kw_only=True)
class Pod(Runner):
    """Run the stage in a pod of its own.

    Everything but the numbers may be a template. What is left out comes from ``pod_template``, else from the defaults.

    :param image: an image with a Python that has lepton_airflow and what the stage needs.
    :param namespace: where the pod is made; default: the Connection's, else the worker's own, else ``default``.
    :param cpu: cores to reserve, such as ``"500m"`` (the default) or ``"4"``; ``cpu_limit``: cores it may use, default: all.
    :param memory: memory to reserve, such as ``"2Gi"`` (the default); ``memory_limit``: where it is killed; default: there.
    :param gpus: number of GPUs, of the kind ``gpu_resource``.
    :param node_selector: labels that the node must have; ``affinity`` and ``tolerations`` as Kubernetes writes them.
    :param volumes: what to mount: ``{"name": "data", "mount": "/data", "pvc": "claim"}``, or instead of ``pvc`` one of
        ``host_path``, ``config_map``, ``secret``, ``empty_dir``; ``"read_only": True`` if so.
    :param env: environment variables. No secrets: they show in the serialized DAG.
    :param pull_secrets: names of the Secrets that open the image's registry.
    :param pod_template: a pod as a dict, or the path of its YAML on the worker, that all this lies over.
    :param queue: the Kueue queue that admits the pod.
    :param security: fields of Kubernetes' security contexts to override, such as ``{"runAsUser": 1000}``.
    :param schedule_timeout_s: time to find a node [seconds]; default: 300, with GPUs 1200.
    :param start_timeout_s: time from there until the stage starts, mostly the image's pull [seconds].
    :param run_timeout_s: time the stage may take [seconds].
    :param admission_timeout_s: time that a quota or a queue may hold it back [seconds].
    :param preemption_limit: how often one try submits it again after an eviction, a preemption or a lost node.
    :param deferrable: whether to wait without a worker slot; default: ``[operators] default_deferrable``.
    :param python: the interpreter in the image.
    :param grace_s: time between asking the stage to stop and killing it [seconds].
    :param keep_pod: which pods stay when they have ended: ``never``, ``failed``, ``always``. They keep their Secret.
    :param kubernetes_conn_id: the Connection that opens the cluster; default: ``kubernetes_default`` where it exists, else
        the service account of the worker's own pod, else its kubeconfig. ``config_file``, ``cluster_context`` and
        ``in_cluster`` as in a ``KubernetesPodOperator``.
    """

    local: ClassVar[bool] = False

    image: str
    namespace: str | None = None
    cpu: str | None = None
    memory: str | None = None
    cpu_limit: str | None = None
    memory_limit: str | None = None
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    affinity: dict[str, Any] = field(default_factory=dict)
    service_account: str | None = None
    priority_class: str | None = None
    runtime_class: str | None = None
    volumes: list[dict[str, Any]] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    pull_secrets: list[str] = field(default_factory=list)
    image_pull_policy: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    pod_template: str | dict[str, Any] | None = None
    queue: str | None = None
    security: dict[str, Any] = field(default_factory=dict)
    schedule_timeout_s: float | None = None
    start_timeout_s: float = 600.0
    run_timeout_s: float = 86_400.0
    admission_timeout_s: float = 86_400.0
    preemption_limit: int = 5
    deferrable: bool | None = None
    python: str = "python"
    grace_s: float = 30.0
    keep_pod: Literal["never", "failed", "always"] = "never"
    kubernetes_conn_id: str | None = None
    config_file: str | None = None
    cluster_context: str | None = None
    in_cluster: bool | None = None
    _run: _Run | None = field(default=None, init=False, repr=False, compare=False)

    def run(self, request: Request, connections: Sequence[Connection], context: Mapping[str, Any]) -> Receipt:
        """Bring the request to its end in a pod, and return the receipt that this pod left in the store."""
        self._run = _Run(self, request, connections, context)
        try:
            return self._run.to_its_end()
        finally:
            self._run = None

    def cancel(self) -> None:
        """Delete the pod of :meth:`run`, if its own try still owns it."""
        if self._run is not None:
            self._run.cancel()

    def rendered(self, render: Callable[[Any], Any]) -> Self:
        """A copy with its templates rendered."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return replace(
            self, **{k: render(v) if isinstance(v, (str, list, dict)) else v for k, v in values.items()}
        )


@dataclass
class _Held:
    """What a try keeps across a deferral: enough to know its own pod, and no proof of anything."""

    uid: str | None = None
    name: str = ""
    nonce: str = ""
    number: int = 0  # of the last submission
    resubmitted: int = 0
    waits_since: float | None = None  # since when a quota has held the pod back [Unix time]
    deadline: float | None = None  # execution_timeout [Unix time]
    read: dict[str, str] = field(default_factory=dict)  # container: time of its last line that was logged


class _Run:
    """One entry into the step machine."""

    def __init__(
        self, settings: Pod, request: Request, connections: Sequence[Connection], context: Mapping[str, Any]
    ) -> None:
        from lepton_airflow.door import redactor
        from lepton_airflow.pods.cluster import Cluster

        self.settings, self.request, self.connections, self.context = settings, request, connections, context
        self.by_id = {c.id: c for c in connections}
        self.hide = redactor(self.by_id)
        self.held = _Held(**context.get("lepton", {}))
        self.try_id = str(context["ti"].id) if context else "local"
        self.store = Store(request.store, self.by_id.get(request.store_connection or ""))
        self.cluster: Cluster = Cluster(settings, in_airflow=bool(context))
        self.last_lines: deque[str] = deque(maxlen=50)
        self.cancelled = False

    def to_its_end(self) -> Receipt:
        from lepton_airflow.pods.lifecycle import Clocks, decide, next_number
        from lepton_airflow.pods.manifest import pod_base, request_digest

        s = self.settings
        base = pod_base(s, self.request, None)
        digest = request_digest(base, self.request)
        schedule_s = s.schedule_timeout_s or (1200.0 if s.gpus else 300.0)
        clocks = Clocks(
            s.admission_timeout_s, schedule_s, s.start_timeout_s, s.run_timeout_s, self.held.deadline
        )
        while True:
            pods, version = self.cluster.look(self.request.run_key)
            step = decide(
                pods,
                owned=self.held.uid,
                try_id=self.try_id,
                digest=digest,
                clocks=clocks,
                now=time.time(),
            )
            if step.do == "create":
                self._submit(base, next_number(pods, self.held.number))
            elif step.do == "wait":
                self._attend(step, version)
            elif step.do == "take":
                receipt = self._take(step.pod)
                if receipt is not None:
                    return receipt
            else:
                raise NotImplementedError(step.do)

    def _submit(self, base: dict[str, Any], number: int) -> None:
        from lepton_airflow.pods.manifest import submission

        nonce = secrets.token_hex(16)
        secret, pod = submission(
            base, self.request, self.connections, number=number, nonce=nonce, try_id=self.try_id
        )
        made = self.cluster.submit(secret, pod)
        if made is not None:
            meta = made["metadata"]
            self.held.uid, self.held.name, self.held.nonce = meta["uid"], meta["name"], nonce
            log.info("pod %s/%s was made", self.cluster.namespace, meta["name"])
        self.held.number = number

    def _attend(self, step: Step, version: str) -> None:
        from lepton_airflow.pods.lifecycle import container_state

        if container_state(step.pod)[0] != "waiting":
            for stamp, line in self.cluster.log_lines(step.pod, "stage", self.held.read.get("stage", ""), 30):
                self.held.read["stage"] = stamp
                level, text = level_of(self.hide(line))
                log.log(level, "%s", text)
        self.cluster.wait(self.request.run_key, version, 5)

    def _take(self, pod: Any) -> Receipt | None:
        receipt = self.store.receipt(self.request.run_key)
        if receipt is None or receipt.nonce != self.held.nonce:
            raise RunnerError(f"no receipt {pod['status']}")
        self.cluster.delete(pod)
        return settle(self.request, receipt)

    def cancel(self) -> None:
        pass
