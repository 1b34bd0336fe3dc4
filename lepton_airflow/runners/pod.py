"""Run a stage in a Kubernetes pod, in the cluster and with the rights that the installation's pod operators use.

:meth:`Pod.run` keeps no state of its own. Entered for the first time, after a deferral, or by a retry after the worker died:
it looks at the pods that there are for the run key, decides (:func:`lepton_airflow.pods.lifecycle.decide`), acts, and looks
again. It ends with the receipt of this very pod, read from the store, or it raises.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import (
    DO_NOT_RETRY,
    PREEMPTED,
    BadConfiguration,
    ContractError,
    PodFailed,
    Preempted,
    RunnerError,
    did_you_mean,
)
from lepton_airflow.runners import Runner, level_of, settle
from lepton_airflow.store.files import Store

if TYPE_CHECKING:
    from lepton_airflow.pods.diagnosis import Diagnosis
    from lepton_airflow.pods.lifecycle import Seen, Step

log = logging.getLogger("lepton_airflow.stage")

_QUIET_S = 30.0  # a log without a line for so long is asked for again, and the pod is looked at
_POLL_S = 5.0
_FOLLOW_S = 60.0  # a log that never pauses is left for a look at the pod so often
_LATE_STORE_S = (
    60.0  # how long a receipt may take to be seen here once the pod says that it wrote it (NFS, S3)
)


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

    def __post_init__(self) -> None:
        _check(self)

    def run(self, request: Request, connections: Sequence[Connection], context: Mapping[str, Any]) -> Receipt:
        """Bring the request to its end in a pod, and return the receipt that this pod left in the store."""
        self._run = run = _Run(self, request, connections, context)
        try:
            return run.to_its_end()
        except Exception:
            raise
        except BaseException as stopped:
            # Airflow's execution_timeout, or an interrupt; a deferral is none. What fails leaves a pod to the next try.
            if type(stopped).__name__ != "TaskDeferred":
                run.delete_own()
            raise
        finally:
            self._run = None

    def cancel(self) -> None:
        """Delete the pod of :meth:`run` if its own try still owns it, unless Airflow still wants the task.

        Airflow calls this when somebody ends the task, and also when its worker shuts down: then the pod goes on, and the
        next try adopts it.
        """
        run = self._run
        if run is None:
            return
        if run.wanted():
            log.warning("the worker was asked to stop; the pod goes on, and the next try takes it up")
            return
        run.cancelled = True
        run.delete_own()

    def rendered(self, render: Callable[[Any], Any]) -> Self:
        """A copy with its templates rendered; raises BadConfiguration for one that cannot be."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for name, value in values.items():
            if isinstance(value, (str, list, dict)):
                try:
                    values[name] = _rendered(value, render)
                except Exception as error:
                    if type(error).__module__.partition(".")[0] != "jinja2":
                        raise
                    raise BadConfiguration(
                        f"Pod({name}={value!r}) cannot be rendered: {error}. Mend the template."
                    ) from None
                if name in _TEXTS and values[name] in (
                    None,
                    "None",
                ):  # Jinja renders None as Python writes it
                    if getattr(type(self), name, "") is not None:
                        raise BadConfiguration(
                            f"Pod({name}={value!r}) renders to None: give what the template names a value."
                        )
                    values[name] = None
        return replace(self, **values)


@dataclass
class _Held:
    """What a try keeps across a deferral: enough to know its own pod, and no proof of anything."""

    uid: str | None = None
    nonce: str = ""
    number: int = 0  # of the last submission
    resubmitted: int = 0
    refused_since: float | None = (
        None  # since when the API server has refused to make the pod for now [Unix time]
    )
    deadline: float | None = None  # the task's execution_timeout [Unix time]
    read: dict[str, str] = field(
        default_factory=dict
    )  # container: the time of its last line in the task's log
    # Of these, what this worker logged itself. Airflow lets a trigger overwrite what an earlier one of the same try logged.
    own: dict[str, str] = field(default_factory=dict)
    tail: list[tuple[int, str]] = field(default_factory=list)  # the last lines that the trigger logged
    refused: str = ""  # why the triggerer may not wait for the pod


class _Run:
    """One entry into the step machine."""

    def __init__(
        self, settings: Pod, request: Request, connections: Sequence[Connection], context: Mapping[str, Any]
    ) -> None:
        from lepton_airflow.connections import redactor
        from lepton_airflow.pods import LOCAL_TRY
        from lepton_airflow.pods.cluster import Cluster
        from lepton_airflow.pods.lifecycle import Clocks
        from lepton_airflow.pods.manifest import pod_base, request_digest

        self.settings, self.request, self.connections, self.context = settings, request, connections, context
        by_id = {c.id: c for c in connections}
        self.hide = redactor(by_id)
        self.held = _Held(**context.get("lepton", {}))
        self.try_id = str(context["ti"].id) if context else LOCAL_TRY
        self.base = pod_base(settings, request, _template(settings))
        self.digest = request_digest(self.base, request)
        _check_store(request, self.base)
        self.store = Store(request.store, by_id.get(request.store_connection or ""))
        self.store.receipt(request.run_key)  # a store that cannot be read fails before the pod is made
        self.cluster = Cluster(settings, in_airflow=bool(context))
        schedule_s = settings.schedule_timeout_s or (1200.0 if settings.gpus else 300.0)
        self.clocks = Clocks(
            admission_s=settings.admission_timeout_s,
            schedule_s=schedule_s,
            start_s=settings.start_timeout_s,
            run_s=settings.run_timeout_s,
            deadline=self.held.deadline,
        )
        self.last_lines: deque[str] = deque(maxlen=50)
        self.said = ""
        self.cancelled = False

    # -- the machine ---------------------------------------------------------------------------------------------------

    def to_its_end(self) -> Receipt:
        """Look, decide, act, until there is a receipt or an error."""
        from lepton_airflow.pods.cluster import Refused
        from lepton_airflow.pods.diagnosis import error_of

        try:
            while True:
                receipt = self._act(*self._look())
                if receipt is not None:
                    return receipt
        except Refused as error:
            raise error_of(error.diagnosis) from None

    def _look(self) -> tuple[Step, str, list[dict[str, Any]]]:
        from lepton_airflow.pods.lifecycle import container_state, decide

        pods, version = self.cluster.look(self.request.run_key)
        own = next((p for p in pods if p["metadata"]["uid"] == self.held.uid), None)
        # While it runs, nothing that an event says changes what is done.
        events = self.cluster.events(own) if own and container_state(own)[0] == "waiting" else []
        step = decide(
            pods,
            owned=self.held.uid,
            try_id=self.try_id,
            digest=self.digest,
            clocks=self.clocks,
            now=time.time(),
            events=events,
        )
        return step, version, pods

    def _act(self, step: Step, version: str, pods: list[dict[str, Any]]) -> Receipt | None:
        from lepton_airflow.pods import ADMITTED, TRY
        from lepton_airflow.pods.lifecycle import note

        pod = step.pod
        if step.do in ("take", "gone"):
            return self._conclude(pod)
        if self.cancelled:
            self.delete_own()  # one that was being made when the signal came
            raise Preempted(f"{self.request.stage} was asked to stop, and its pod was deleted.")
        if step.do == "create":
            self._submit(pods)
            return None
        if step.do in ("adopt", "delete") and self.held.resubmitted and pod and note(pod, TRY) != self.try_id:
            step = replace(step, do="lost")  # made since this try began: Airflow has started a later one
        assert pod is not None or step.do == "late"
        if step.do == "late":
            self._too_late(step)
        assert pod is not None
        name = pod["metadata"]["name"]
        if step.do == "wait":
            self._wait(step, version)
        elif step.do == "adopt":
            self._adopt(pod)
        elif step.do == "admit":
            self.cluster.annotate(pod, {ADMITTED: f"{time.time():.0f}"})
        elif step.do == "delete":
            log.info("pod %s of an earlier try does something else: it is deleted first", name)
            self.cluster.delete(pod)
        elif step.do == "fail":
            assert step.diagnosis is not None
            self._fail(pod, step.diagnosis)
        elif step.do == "lost":
            raise RunnerError(
                f"{self.request.stage}: another try of this task has taken pod {name} over, so this one ends; see the "
                "log of the latest try."
            )
        return None

    def _submit(self, pods: Sequence[Seen]) -> None:
        from lepton_airflow.pods.cluster import Refused
        from lepton_airflow.pods.lifecycle import ended, leaving, next_number
        from lepton_airflow.pods.manifest import submission

        number, nonce = next_number(pods, self.held.number), secrets.token_hex(16)
        secret, pod = submission(
            self.base, self.request, self.connections, number=number, nonce=nonce, try_id=self.try_id
        )
        if self.held.refused_since is None:
            self.cluster.sweep_secrets()
            for old in (
                pods if not self.held.resubmitted else ()
            ):  # of a try whose worker died: it holds a Secret
                if self.settings.keep_pod == "never" and ended(old) is not None and not leaving(old):
                    self.cluster.delete(old)
        try:
            made = self.cluster.submit(secret, pod)
        except Refused as error:
            if error.diagnosis.then != "wait":
                raise
            self._wait_for_room(error.diagnosis, pod)
            return
        self.held.refused_since = None
        self.held.number = number
        if made is not None:
            self.held.uid, self.held.nonce, self.held.read = made["metadata"]["uid"], nonce, {}
            log.info("pod %s was made in namespace %s", pod["metadata"]["name"], self.cluster.namespace)

    def _adopt(self, pod: Seen) -> None:
        from lepton_airflow.pods import IDENTITY, NONCE, TRY
        from lepton_airflow.pods.lifecycle import note, number_of

        identity = asdict(self.request.identity) | {"try": self.try_id}
        if self.cluster.annotate(pod, {TRY: self.try_id, IDENTITY: json.dumps(identity)}) is None:
            return  # it has changed meanwhile: look again
        log.info(
            "pod %s of an earlier try goes on with the same request: attached to it", pod["metadata"]["name"]
        )
        self.held.uid, self.held.nonce = pod["metadata"]["uid"], note(pod, NONCE)
        self.held.number = max(self.held.number, number_of(pod))
        self.cluster.own_secret(pod)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def _wait(self, step: Step, version: str) -> None:
        """Until something changes: in a trigger where that is wanted, else here, with the log flowing."""
        from lepton_airflow.pods.lifecycle import phase_of

        assert step.pod is not None
        assert step.until is not None
        self._say(phase_of(step))
        if self._defers():
            self._defer(step.pod)
        started = time.monotonic()
        if (
            not self._read_logs(step.pod, min(step.until, time.time() + _FOLLOW_S))
            or time.monotonic() - started < 1
        ):
            self.cluster.wait(self.request.run_key, version, max(1.0, min(_POLL_S, step.until - time.time())))

    def _wait_for_room(self, diagnosis: Diagnosis, pod: dict[str, Any]) -> None:
        """A quota is full: hold no worker slot meanwhile, and ask again."""
        from lepton_airflow.pods.diagnosis import error_of, expired

        limit_s = self.settings.admission_timeout_s
        self.held.refused_since = self.held.refused_since or time.time()
        if time.time() - self.held.refused_since >= limit_s:
            raise error_of(expired("admission_timeout_s", limit_s, diagnosis))
        if self.held.deadline is not None and time.time() >= self.held.deadline:
            raise _timed_out(self.request)
        self._say(f"waiting: {diagnosis.sentence}")
        if self._defers():
            self._defer(refused=pod)
        time.sleep(_POLL_S)

    def _defers(self) -> bool:
        if not self.context:
            return False
        if self.settings.deferrable is not None:
            return self.settings.deferrable
        from airflow.configuration import conf

        return bool(conf.getboolean("operators", "default_deferrable", fallback=False))

    def _defer(self, pod: Seen | None = None, refused: dict[str, Any] | None = None) -> NoReturn:
        from airflow.providers.common.compat.sdk import TaskDeferred

        from lepton_airflow.triggers.pod import PodTrigger

        if self.held.refused:
            self.delete_own()  # nobody would wait for it
            raise PodFailed(
                f"{self.request.stage} cannot wait without a worker slot: {self.held.refused}",
                "Forbidden",
                DO_NOT_RETRY,
            )
        if pod is not None and self.held.read != self.held.own:
            self._read_logs(pod, time.time() + _QUIET_S, again=True)
        self.held.tail = []
        s, clocks = self.settings, self.clocks
        if self.held.refused_since is not None:
            until = self.held.refused_since + clocks.admission_s
            clocks = replace(clocks, deadline=min(until, clocks.deadline or until))
        trigger = PodTrigger(
            cluster={
                "kubernetes_conn_id": s.kubernetes_conn_id,
                "config_file": s.config_file,
                "cluster_context": s.cluster_context,
                "in_cluster": self.cluster.in_cluster,
            },
            namespace=self.cluster.namespace,
            run_key=self.request.run_key,
            owned=self.held.uid,
            try_id=self.try_id,
            digest=self.digest,
            clocks=asdict(clocks),
            read=self.held.read,
            connections=[c.id for c in self.connections],
            refused=refused,
        )
        raise TaskDeferred(trigger=trigger, method_name="resume", kwargs={"kept": asdict(self.held)})

    def _say(self, what: str) -> None:
        if what != self.said:
            log.info("%s", what)
            self.said = what

    def _read_logs(self, pod: Seen, until: float = math.inf, *, again: bool = False) -> bool:
        """Bring the lines that were not logged yet into the task's log, following them; whether there were any.

        :param until: when to leave a log that goes on [Unix time].
        :param again: those too that the trigger logged, for another trigger is going to overwrite them.
        """
        from lepton_airflow.pods.lifecycle import container_state, containers

        any_lines = False
        for container in containers(pod):
            if container_state(pod, container)[0] == "waiting":
                continue
            after = (self.held.own if again else self.held.read).get(container, "")
            for stamp, line in self.cluster.log_lines(pod, container, after, _QUIET_S):
                level, text = level_of(self.hide(line))
                log.log(level, "%s", text)
                self.last_lines.append(text)
                self.held.read[container] = self.held.own[container] = stamp
                any_lines = True
                if time.time() >= until:
                    break
        return any_lines

    # -- the end -------------------------------------------------------------------------------------------------------

    def _conclude(self, pod: Seen | None) -> Receipt | None:
        """The receipt of our pod, which has ended or is gone; None when it is submitted again."""
        from lepton_airflow.pods.diagnosis import diagnose
        from lepton_airflow.pods.lifecycle import ended

        receipt = self._receipt(pod)
        if receipt is not None and (receipt.error is None or int(receipt.error["exit_code"]) != PREEMPTED):
            if pod is not None:
                self._read_logs(pod)
            if receipt.error:
                self._report(pod)
            self._clear_away(pod, failed=receipt.error is not None)
            return settle(self.request, receipt)
        seen = pod or self._gone()
        diagnosis = diagnose(seen, self.cluster.events(seen))
        again = diagnosis is not None and diagnosis.then == "resubmit" and self._may_resubmit()
        read = pod is not None and self._read_logs(pod, again=again and self._defers())
        if again and not read and self.held.tail:  # a pod that is leaving may have no log any more
            log.info("the last lines of the pod that is gone:")
            for level, text in self.held.tail:
                log.log(level, "%s", text)
        if receipt is not None and not again:  # preempted once too often
            self._clear_away(pod, failed=True)
            return settle(self.request, receipt)
        if diagnosis is None:
            code = (ended(pod) or {}).get("exitCode") if pod else None
            self._report(pod)
            self._clear_away(pod, failed=True)
            raise RunnerError(
                f"{self.request.stage} left no receipt of this run in {self.request.store} (exit code {code}): without that "
                "nothing proves what it did. Worker and pod may see different stores; else look at the log above."
            )
        self._fail(pod, diagnosis)
        return None

    def _gone(self) -> Seen:
        """Our pod as far as it is known without the cluster, which has it no more: its events may tell why."""
        from lepton_airflow.pods.manifest import labels, pod_name

        name = pod_name(self.request, self.held.number)
        known = {"name": name, "uid": self.held.uid, "namespace": self.cluster.namespace}
        return {"metadata": known | {"labels": labels(self.request), "deletionTimestamp": "some time ago"}}

    def _receipt(self, pod: Seen | None) -> Receipt | None:
        """What this very pod has left: in the store, or, where it could not reach that, in its termination message."""
        from lepton_airflow.pods.lifecycle import ended

        end = (ended(pod) or {}) if pod else {}
        told = None
        with suppress(ContractError):
            told = self._ours(Receipt.from_json(end.get("message") or ""))
        wait_s = _LATE_STORE_S if told and not told.error else _POLL_S if end.get("exitCode") == 0 else 0.0
        deadline = time.monotonic() + wait_s
        while True:
            kept = self._ours(self.store.receipt(self.request.run_key))
            if kept is not None or time.monotonic() >= deadline:
                break
            time.sleep(1)
        return kept or (told if told and told.error else None)

    def _ours(self, receipt: Receipt | None) -> Receipt | None:
        """The receipt if it answers the request that our pod was handed."""
        if receipt is None or receipt.run_key != self.request.run_key or receipt.stage != self.request.stage:
            return None
        return receipt if self.held.nonce and receipt.nonce == self.held.nonce else None

    def _fail(self, pod: Seen | None, diagnosis: Diagnosis) -> None:
        """Submit again where that is the remedy and the limit allows it; else raise."""
        from lepton_airflow.pods.diagnosis import error_of, spent

        again = diagnosis.then == "resubmit" and self._may_resubmit() and not self.cancelled
        if not again:
            self._report(pod)
        self._clear_away(pod, failed=True)
        if self.cancelled:
            raise Preempted(f"{self.request.stage} was asked to stop, and its pod was deleted.")
        if not again:
            limit = self.settings.preemption_limit
            raise error_of(spent(diagnosis, limit) if diagnosis.then == "resubmit" else diagnosis)
        self.held.resubmitted += 1
        log.warning(
            "%s (%d of at most %d times)",
            diagnosis.sentence,
            self.held.resubmitted,
            self.settings.preemption_limit,
        )
        self.held.uid, self.held.nonce, self.held.read, self.held.own, self.held.tail = None, "", {}, {}, []

    def _may_resubmit(self) -> bool:
        return self.held.resubmitted < self.settings.preemption_limit

    def _too_late(self, step: Step) -> NoReturn:
        from lepton_airflow.pods.diagnosis import error_of, expired

        self._report(step.pod)
        self._clear_away(step.pod, failed=True)
        if step.phase == "deadline":
            raise _timed_out(self.request)
        limit_s = getattr(self.clocks, f"{step.phase}_s")
        raise error_of(expired(f"{step.phase}_timeout_s", limit_s, step.diagnosis))

    def _report(self, pod: Seen | None) -> None:
        """Log what somebody who looks at a failure wants to see: the events, and the last lines that the stage wrote."""
        from lepton_airflow.pods.diagnosis import told

        if pod is None:
            return
        name = pod["metadata"]["name"]
        if events := told(self.cluster.events(pod)):
            log.error("events of pod %s:\n%s", name, "\n".join(events))
        if self.last_lines:
            log.error("last lines of pod %s:\n%s", name, "\n".join(self.last_lines))

    def _clear_away(self, pod: Seen | None, *, failed: bool) -> None:
        """Delete our pod, and its Secret with it; one that is to be kept is marked, so that nobody takes its end again."""
        from lepton_airflow.pods import SETTLED, TRY
        from lepton_airflow.pods.lifecycle import ended, leaving, note

        keep = self.settings.keep_pod == "always" or (failed and self.settings.keep_pod == "failed")
        while pod is not None and note(pod, TRY) == self.try_id:
            if keep and ended(pod) is not None and not leaving(pod):
                if self.cluster.annotate(pod, {SETTLED: "yes"}) is not None:
                    return
            elif leaving(pod) or self.cluster.delete(pod):
                return
            uid = pod["metadata"]["uid"]  # it has changed since it was looked at
            pods, _ = self.cluster.look(self.request.run_key)
            pod = next((p for p in pods if p["metadata"]["uid"] == uid), None)

    # -- being stopped -------------------------------------------------------------------------------------------------

    def wanted(self) -> bool:
        """Whether Airflow still wants the task, or does not say so in time; without Airflow, the caller does not.

        Asked in a thread: this may run in a signal handler that has interrupted another question of the same process,
        whose lock would then never be free.
        """
        if not self.context:
            return False
        answers: list[str | None] = []
        asking = threading.Thread(target=lambda: answers.append(state_of(self.context["ti"])), daemon=True)
        asking.start()
        asking.join(2.0)
        return not answers or answers[0] not in _OVER

    def delete_own(self) -> None:
        """Delete what this try owns, also from a signal handler: nothing here waits for a lock of :meth:`to_its_end`.

        Found by the try's id, for the signal may have come before the uid of a new pod was known here.
        """
        from lepton_airflow.pods import SETTLED, TRY
        from lepton_airflow.pods.cluster import Refused
        from lepton_airflow.pods.lifecycle import leaving, note

        cluster = self.cluster.apart()
        try:
            for _ in range(5):  # a pod may change while it is looked at
                pods, _version = cluster.look(self.request.run_key)
                own = [
                    p for p in pods if note(p, TRY) == self.try_id and not note(p, SETTLED) and not leaving(p)
                ]
                if all(cluster.delete(pod) for pod in own):
                    return
        except (Refused, RunnerError) as error:  # what stopped the task is not to be hidden by this
            log.error("the pod of %s goes on, for it could not be deleted: %s", self.request.stage, error)  # noqa: TRY400


# The states in which Airflow has no more use for a task's work. `restarting` is not among them: the next try adopts.
_OVER = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})


def state_of(ti: Any) -> str | None:
    """The state that Airflow has for a task instance now; ``removed`` when it knows the task instance no more."""
    found = ti.get_task_states(
        dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
    )
    states = found.get(ti.run_id, {})
    mapped = ti.map_index is not None and ti.map_index >= 0
    state = states.get(f"{ti.task_id}_{ti.map_index}" if mapped else ti.task_id, "removed")
    return None if state is None else str(getattr(state, "value", state))


def _timed_out(request: Request) -> BaseException:
    from airflow.providers.common.compat.sdk import AirflowTaskTimeout

    return AirflowTaskTimeout(f"{request.stage}: the task's execution_timeout is over; its pod was deleted.")


# -- checks ------------------------------------------------------------------------------------------------------------


def _template(settings: Pod) -> Mapping[str, Any] | None:
    """The pod that ``pod_template`` names."""
    template: Any = settings.pod_template
    if isinstance(template, str):
        import yaml

        try:
            template = yaml.safe_load(Path(template).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise BadConfiguration(
                f"Pod(pod_template={settings.pod_template!r}) cannot be read on this worker: {error}."
            ) from None
    if template is not None and not (
        isinstance(template, Mapping) and isinstance(template.get("spec"), Mapping)
    ):
        raise BadConfiguration(
            f"Pod(pod_template=…): expected a pod, {{'spec': {{'containers': […]}}}}, not {type(template).__name__}."
        )
    return template


def _check_store(request: Request, base: Mapping[str, Any]) -> None:
    """A store that is a folder must be mounted where the request says that it is."""
    scheme, found, path = request.store.rpartition("://")
    if found and scheme not in ("file", "local"):
        return
    mounts = [
        m["mountPath"]
        for c in base["spec"]["containers"]
        for m in c.get("volumeMounts") or ()
        if c["name"] == "stage" and m["name"] not in ("lepton", "lepton-work", "lepton-tmp")
    ]
    if not any(PurePosixPath(path).is_relative_to(mount) for mount in mounts):
        raise BadConfiguration(
            f"store {request.store!r} is a folder, which a pod does not see: mount it at the same path, "
            f'volumes=[{{"name": "store", "mount": {path!r}, "pvc": "…"}}], or set [lepton] store to s3://….'
        )


def _is_template(value: Any) -> bool:
    return isinstance(value, str) and ("{{" in value or "{%" in value)


def _rendered(value: Any, render: Callable[[Any], Any]) -> Any:
    """A value with its templates rendered, at any depth; numbers that Airflow's native rendering makes are text again."""
    if isinstance(value, dict):
        return {k: _rendered(v, render) for k, v in value.items()}
    if isinstance(value, list):
        return [_rendered(v, render) for v in value]
    if not _is_template(value):
        return value
    made = render(value)
    return str(made) if isinstance(made, (int, float)) and not isinstance(made, bool) else made


_TEXTS = (
    *("image", "namespace", "cpu", "memory", "cpu_limit", "memory_limit", "gpu_resource", "service_account"),
    *("priority_class", "runtime_class", "image_pull_policy", "queue", "python", "keep_pod"),
    *("kubernetes_conn_id", "config_file", "cluster_context"),
)
_DICTS = ("node_selector", "affinity", "env", "labels", "annotations", "security")
_LISTS = ("tolerations", "volumes", "pull_secrets")
_NUMBERS = ("start_timeout_s", "run_timeout_s", "admission_timeout_s", "schedule_timeout_s")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_CPU = re.compile(r"\d+(\.\d+)?|\d+m")
_MEMORY = re.compile(r"\d+(\.\d+)?([kMGTP]|[KMGTP]i)|\d{7,}")  # less than a MB is a forgotten unit
_SOURCES = ("pvc", "host_path", "config_map", "secret", "empty_dir")


def _check(s: Pod) -> None:
    """Refuse what the API server would refuse, or would take and mean otherwise, with the right form."""

    def refuse(name: str, expected: str) -> NoReturn:
        raise BadConfiguration(f"Pod({name}={getattr(s, name)!r}): expected {expected}.")

    for name in _TEXTS:
        if getattr(s, name) is not None and not isinstance(getattr(s, name), str):
            forms = {
                "cpu": '"500m" or "2"',
                "cpu_limit": '"500m" or "2"',
                "memory": '"2Gi"',
                "memory_limit": '"2Gi"',
            }
            refuse(name, f"text, such as {forms[name]}" if name in forms else "text")
    for names, kind, form in ((_DICTS, dict, '{"name": …}'), (_LISTS, list, "[…]")):
        for name in names:
            if not isinstance(getattr(s, name), kind) and not _is_template(getattr(s, name)):
                refuse(name, f"a {kind.__name__}, {form}")
    if not s.image.strip():
        refuse("image", 'an image, such as "registry.example/stage:1.4"')
    if s.namespace is not None and not _is_template(s.namespace) and not _NAME.fullmatch(s.namespace):
        refuse("namespace", 'lower-case letters, digits and "-", at most 63')
    for name, pattern, form in (
        ("cpu", _CPU, '"500m" or "2"'),
        ("cpu_limit", _CPU, '"500m" or "2"'),
        ("memory", _MEMORY, '"512Mi" or "2Gi"'),
        ("memory_limit", _MEMORY, '"512Mi" or "2Gi"'),
    ):
        value = getattr(s, name)
        if value is not None and not _is_template(value) and not pattern.fullmatch(value):
            refuse(name, f"a quantity such as {form}")
    if not isinstance(s.gpus, int) or isinstance(s.gpus, bool) or s.gpus < 0:
        refuse("gpus", "a whole number, zero or more")
    for name in _NUMBERS:
        value = getattr(s, name)
        if value is None and name == "schedule_timeout_s":
            continue
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            refuse(name, "seconds, more than zero")
    if not isinstance(s.grace_s, (int, float)) or not 0 <= s.grace_s < math.inf:
        refuse("grace_s", "seconds, zero or more")
    if not isinstance(s.preemption_limit, int) or s.preemption_limit < 0:
        refuse("preemption_limit", "a whole number, zero or more")
    for name, allowed in (
        ("keep_pod", ("never", "failed", "always")),
        ("image_pull_policy", (None, "Always", "IfNotPresent", "Never")),
    ):
        if getattr(s, name) not in allowed and not _is_template(getattr(s, name)):
            refuse(name, f"one of {', '.join(a for a in allowed if a)}")
    for name in ("env", "labels", "annotations", "node_selector"):
        for key, value in getattr(s, name).items() if isinstance(getattr(s, name), dict) else ():
            if not isinstance(key, str) or not isinstance(value, str):
                refuse(
                    name, f"text for {key!r}, not {type(value).__name__}: {{{str(key)!r}: {str(value)!r}}}"
                )
    for volume in s.volumes if isinstance(s.volumes, list) else ():
        _check_volume(volume)
    for toleration in s.tolerations if isinstance(s.tolerations, list) else ():
        if not isinstance(toleration, dict):
            refuse("tolerations", '[{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]')
    if s.pod_template is not None and not isinstance(s.pod_template, (str, dict)):
        refuse("pod_template", "the path of a YAML file, or a dict")
    if isinstance(s.security, dict) and s.security:
        from lepton_airflow.pods.manifest import OF_CONTAINER, OF_POD, OF_SPEC

        for key in s.security:
            if key not in OF_CONTAINER | OF_POD | OF_SPEC:
                raise BadConfiguration(
                    f"Pod(security=…): {key!r} is unknown; {did_you_mean(key, OF_CONTAINER | OF_POD | OF_SPEC)}"
                )
        if s.security.get("runAsUser") == 0 and s.security.get("runAsNonRoot", s.pod_template) is None:
            raise BadConfiguration(
                f"Pod(security={s.security!r}): pods run as root only where that is said; add 'runAsNonRoot': False."
            )


def _check_volume(volume: Any) -> None:
    form = '{"name": "data", "mount": "/data", "pvc": "claim"}'
    if not isinstance(volume, dict):
        raise BadConfiguration(f"Pod(volumes=…): {volume!r} is no dict; expected {form}.")
    known = {"name", "mount", "read_only", *_SOURCES}
    for key in volume:
        if key not in known:
            raise BadConfiguration(f"Pod(volumes=…): {key!r} is unknown; {did_you_mean(key, known)}")
    if "name" not in volume or "mount" not in volume or sum(s in volume for s in _SOURCES) != 1:
        raise BadConfiguration(
            f"Pod(volumes=…): {volume!r} needs a name, a mount and one of {', '.join(_SOURCES)}: {form}."
        )
    for key in ("name", "mount"):
        if not isinstance(volume[key], str):
            raise BadConfiguration(
                f"Pod(volumes=…): {key}={volume[key]!r} is no text; expected as in {form}."
            )
        good = _NAME.fullmatch(volume[key]) if key == "name" else volume[key].startswith("/")
        if not good and not _is_template(volume[key]):
            raise BadConfiguration(f"Pod(volumes=…): {key}={volume[key]!r}; expected as in {form}.")
