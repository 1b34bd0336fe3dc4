"""One try to bring a request to its end in a pod: look at what exists, decide, act, and look again.

The state of a run is in the cluster and in the store. So there is one way in, whether a task starts, comes back from a
deferral, or is retried after its worker died: :meth:`Attempt.run` lists the pods of the run key, lets
:func:`lepton_airflow.pods.lifecycle.decide` choose the next action, and does it, until there is a receipt of this very
pod in the store, or an error.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NoReturn

from lepton_airflow.connections import Connection, redactor
from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import DO_NOT_RETRY, PREEMPTED, ContractError, PodFailed, Preempted, RunnerError
from lepton_airflow.execution.output import level_of
from lepton_airflow.pods import ADMITTED, IDENTITY, LOCAL_TRY, NONCE, SETTLED, TRY, PodJson
from lepton_airflow.pods.cluster import Cluster
from lepton_airflow.pods.diagnosis import (
    ApiRefused,
    Diagnosis,
    diagnose,
    error_of,
    event_lines,
    expired,
    resubmissions_spent,
)
from lepton_airflow.pods.lifecycle import (
    Action,
    Clocks,
    annotation,
    container_state,
    decide,
    describe_wait,
    is_terminating,
    logged_containers,
    next_submission,
    submission_of,
    termination,
)
from lepton_airflow.pods.manifest import (
    check_store,
    labels,
    pod_base,
    pod_key,
    pod_name,
    request_digest,
    submission,
)
from lepton_airflow.pods.settings import PodSettings, load_template
from lepton_airflow.pods.task_state import is_wanted
from lepton_airflow.store import Store
from lepton_airflow.store.identity import identity_of

log = logging.getLogger("lepton_airflow.stage")

_POLL_S = 5.0
_QUIET_S = 30.0  # after so long without a line, the pod is looked at before its log is followed on
_FOLLOW_S = 60.0  # a log that never pauses is followed for so long before the pod is looked at
# How long a receipt may take to become visible here after the pod has said that it wrote it (NFS, S3).
_LATE_STORE_S = 60.0


@dataclass(frozen=True)
class Waiting:
    """What an attempt returns when it can wait without a worker slot.

    :ivar trigger: the arguments of the trigger that waits.
    :ivar state: the ``state`` of the attempt that continues afterwards.
    """

    trigger: dict[str, Any]
    state: dict[str, Any]


@dataclass
class AttemptState:
    """What a try remembers across a deferral: enough to recognise its own pod, and never evidence of what the pod did.

    :ivar uid: uid of the pod that this try has created or adopted.
    :ivar nonce: the nonce of that pod.
    :ivar submission: number of the last submission.
    :ivar resubmissions: how often this try has submitted again.
    :ivar refused_since: since when the API server has refused to create the pod for now [Unix time].
    :ivar deadline: when the task's execution_timeout is over [Unix time].
    :ivar read: for each container, the time of the last line that is in the task's log.
    :ivar read_here: of these, the lines that a worker logged. Airflow lets a trigger overwrite what an earlier trigger of
        the same try logged.
    :ivar tail: the last lines that the trigger logged, with their levels.
    :ivar refused: why the triggerer may not wait for the pod.
    """

    uid: str | None = None
    nonce: str = ""
    submission: int = 0
    resubmissions: int = 0
    refused_since: float | None = None
    deadline: float | None = None
    read: dict[str, str] = field(default_factory=dict)
    read_here: dict[str, str] = field(default_factory=dict)
    tail: list[tuple[int, str]] = field(default_factory=list)
    refused: str = ""

    def forget_pod(self) -> None:
        """Forget the pod that is gone, before another one is submitted."""
        self.uid, self.nonce, self.read, self.read_here, self.tail = None, "", {}, {}, []


class Attempt:
    """One entry into the loop of a try.

    :param ti: the task instance in Airflow's context; None without Airflow.
    :param state: the :class:`AttemptState` of this try's last entry, as a dict; None for the first entry.
    :param defers: whether to return :class:`Waiting` instead of waiting here.
    """

    def __init__(
        self,
        settings: PodSettings,
        request: Request,
        connections: Sequence[Connection],
        *,
        ti: Any | None = None,
        state: Mapping[str, Any] | None = None,
        defers: bool = False,
    ) -> None:
        self.settings, self.request, self.connections = settings, request, connections
        self.ti, self.defers = ti, defers
        # What another version kept, and this one does not know, is left out.
        known = {f.name for f in fields(AttemptState)}
        self.state = AttemptState(**{name: value for name, value in (state or {}).items() if name in known})
        self.try_id = str(ti.id) if ti is not None else LOCAL_TRY
        self.base = pod_base(settings, load_template(settings))
        self.digest = request_digest(self.base, request)
        check_store(request, self.base)
        by_id = {c.id: c for c in connections}
        self.hide = redactor(by_id)
        self.store = Store(request.store, by_id.get(request.store_connection or ""))
        self.store_id = identity_of(self.store)
        self.key = pod_key(request, self.store_id)
        self.store.receipt(request.run_key)  # a store that cannot be read fails before the pod is created
        self.cluster = Cluster(settings, in_airflow=ti is not None)
        self.clocks = Clocks(
            admission_s=settings.admission_timeout_s,
            schedule_s=settings.schedule_timeout_s or (1200.0 if settings.gpus else 300.0),
            start_s=settings.start_timeout_s,
            run_s=settings.run_timeout_s,
            deadline=self.state.deadline,
        )
        self.last_lines: deque[str] = deque(maxlen=50)
        self.said = ""
        self.cancelled = False

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> Receipt | Waiting:
        """Look, decide, act, until there is a receipt or an error, or the attempt can wait without a worker slot."""
        try:
            while True:
                outcome = self._act(*self._look())
                if outcome is not None:
                    return outcome
        except ApiRefused as error:
            raise error_of(error.diagnosis) from None

    def _look(self) -> tuple[Action, str, list[dict[str, Any]]]:
        pods, version = self.cluster.list_pods(self.key)
        own = next((p for p in pods if p["metadata"]["uid"] == self.state.uid), None)
        # Once the stage runs, no event changes what is done.
        events = self.cluster.events(own) if own and container_state(own)[0] == "waiting" else []
        action = decide(
            pods,
            owned=self.state.uid,
            try_id=self.try_id,
            digest=self.digest,
            clocks=self.clocks,
            now=time.time(),
            events=events,
        )
        return action, version, pods

    def _act(self, action: Action, version: str, pods: list[dict[str, Any]]) -> Receipt | Waiting | None:
        pod, kind = action.pod, action.kind
        if kind in ("collect", "gone"):
            return self._collect(pod)
        if self.cancelled:
            self.delete_own()  # a pod that was being created when the signal came
            raise self._stopped()
        if kind == "create":
            return self._submit(pods)
        if kind == "expire":
            self._expire(action)
        assert pod is not None
        name = pod["metadata"]["name"]
        # After a resubmission, a pod of another try is newer than this try: Airflow has started a later one.
        overtaken = self.state.resubmissions and annotation(pod, TRY) != self.try_id
        if kind == "lost" or (kind in ("adopt", "delete") and overtaken):
            raise RunnerError(
                f"{self.request.stage}: another try of this task has taken pod {name} over, so this one ends; see the "
                "log of the latest try."
            )
        if kind == "wait":
            return self._wait(action, version)
        if kind == "adopt":
            self._adopt(pod)
        elif kind == "admit":
            self.cluster.annotate(pod, {ADMITTED: f"{time.time():.0f}"})
        elif kind == "delete":
            log.info("pod %s of an earlier try does something else: it is deleted first", name)
            self.cluster.delete(pod)
        elif kind == "fail":
            assert action.diagnosis is not None
            self._resubmit_or_raise(pod, action.diagnosis)
        return None

    def _submit(self, pods: Sequence[PodJson]) -> Waiting | None:
        number, nonce = next_submission(pods, self.state.submission), secrets.token_hex(16)
        secret, pod = submission(
            self.base,
            self.request,
            self.connections,
            number=number,
            nonce=nonce,
            try_id=self.try_id,
            store_id=self.store_id,
        )
        if self.state.refused_since is None:
            self.cluster.sweep_secrets(self.store_id)
            if not self.state.resubmissions:
                self._delete_ended(pods)
        try:
            created = self.cluster.submit(secret, pod)
        except ApiRefused as error:
            if error.diagnosis.then != "wait":
                raise
            return self._wait_for_room(error.diagnosis, pod)
        self.state.refused_since = None
        self.state.submission = number
        if created is not None:
            self.state.uid, self.state.nonce, self.state.read = created["metadata"]["uid"], nonce, {}
            log.info("pod %s was made in namespace %s", pod["metadata"]["name"], self.cluster.namespace)
        return None

    def _delete_ended(self, pods: Sequence[PodJson]) -> None:
        """Delete what a try whose worker died has left: each such pod still has its Secret."""
        for pod in pods:
            if self.settings.keep_pod == "never" and termination(pod) is not None and not is_terminating(pod):
                self.cluster.delete(pod)

    def _adopt(self, pod: PodJson) -> None:
        identity = asdict(self.request.identity) | {"try": self.try_id}
        if self.cluster.annotate(pod, {TRY: self.try_id, IDENTITY: json.dumps(identity)}) is None:
            return  # it has changed since: look again
        name = pod["metadata"]["name"]
        log.info("pod %s of an earlier try goes on with the same request: attached to it", name)
        self.state.uid, self.state.nonce = pod["metadata"]["uid"], annotation(pod, NONCE)
        self.state.submission = max(self.state.submission, submission_of(pod))
        self.cluster.set_secret_owner(pod)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def _wait(self, action: Action, version: str) -> Waiting | None:
        """Wait for a change of the pod: in a trigger if the task may defer, else here while the log is followed."""
        assert action.pod is not None
        assert action.until is not None
        self._say(describe_wait(action))
        if self.defers:
            return self._waiting(action.pod)
        started = time.monotonic()
        any_lines = self._read_logs(action.pod, min(action.until, time.time() + _FOLLOW_S))
        if not any_lines or time.monotonic() - started < 1:
            within_s = max(1.0, min(_POLL_S, action.until - time.time()))
            self.cluster.wait_for_change(self.key, version, within_s)
        return None

    def _wait_for_room(self, diagnosis: Diagnosis, pod: dict[str, Any]) -> Waiting | None:
        """Wait for a full quota to have room: in a trigger if the task may defer, else here."""
        limit_s = self.settings.admission_timeout_s
        self.state.refused_since = self.state.refused_since or time.time()
        if time.time() - self.state.refused_since >= limit_s:
            raise error_of(expired("admission_timeout_s", limit_s, diagnosis))
        if self.state.deadline is not None and time.time() >= self.state.deadline:
            raise self._timed_out()
        self._say(f"waiting: {diagnosis.sentence}")
        if self.defers:
            return self._waiting(refused=pod)
        time.sleep(_POLL_S)
        return None

    def _waiting(self, pod: PodJson | None = None, refused: dict[str, Any] | None = None) -> Waiting:
        """What the runner defers with.

        :param pod: our pod, if there is one.
        :param refused: the pod that could not be created, if a quota was full.
        """
        if self.state.refused:
            self.delete_own()  # no triggerer would wait for it
            raise PodFailed(
                f"{self.request.stage} cannot wait without a worker slot: {self.state.refused}",
                "Forbidden",
                DO_NOT_RETRY,
            )
        if pod is not None and self.state.read != self.state.read_here:
            self._read_logs(pod, time.time() + _QUIET_S, again=True)
        self.state.tail = []
        settings, clocks = self.settings, self.clocks
        if self.state.refused_since is not None:
            until = self.state.refused_since + clocks.admission_s
            clocks = replace(clocks, deadline=min(until, clocks.deadline or until))
        trigger = {
            "cluster": {
                "kubernetes_conn_id": settings.kubernetes_conn_id,
                "config_file": settings.config_file,
                "cluster_context": settings.cluster_context,
                "in_cluster": self.cluster.in_cluster,
            },
            "namespace": self.cluster.namespace,
            "run_key": self.key,
            "owned": self.state.uid,
            "try_id": self.try_id,
            "digest": self.digest,
            "clocks": asdict(clocks),
            "read": self.state.read,
            "connections": [c.id for c in self.connections],
            "refused": refused,
        }
        return Waiting(trigger, asdict(self.state))

    def _say(self, what: str) -> None:
        if what != self.said:
            log.info("%s", what)
            self.said = what

    def _read_logs(self, pod: PodJson, until: float = math.inf, *, again: bool = False) -> bool:
        """Follow the pod's log into the task's log, from the first line that is not there; whether there were lines.

        :param until: when to stop following [Unix time].
        :param again: begin with the lines that only the trigger logged, because another trigger will overwrite them.
        """
        any_lines = False
        for container in logged_containers(pod):
            if container_state(pod, container)[0] == "waiting":
                continue
            after = (self.state.read_here if again else self.state.read).get(container, "")
            for stamp, line in self.cluster.log_lines(pod, container, after, _QUIET_S):
                level, text = level_of(self.hide(line))
                log.log(level, "%s", text)
                self.last_lines.append(text)
                self.state.read[container] = self.state.read_here[container] = stamp
                any_lines = True
                if time.time() >= until:
                    break
        return any_lines

    # -- the end -------------------------------------------------------------------------------------------------------

    def _collect(self, pod: PodJson | None) -> Receipt | None:
        """The receipt of our pod, which has ended or is gone; None when another pod is to be submitted."""
        receipt = self._receipt(pod)
        if receipt is not None and (receipt.error is None or int(receipt.error["exit_code"]) != PREEMPTED):
            if pod is not None:
                self._read_logs(pod)
            if receipt.error:
                self._report(pod)
            self._delete_or_keep(pod, failed=receipt.error is not None)
            return receipt
        known = pod or self._gone_pod()
        diagnosis = diagnose(known, self.cluster.events(known))
        again = diagnosis is not None and diagnosis.then == "resubmit" and self._may_resubmit()
        self._log_the_rest(pod, again=again)
        if receipt is not None and not again:  # preempted, and preemption_limit is reached
            self._delete_or_keep(pod, failed=True)
            return receipt
        if diagnosis is None:
            code = (termination(pod) or {}).get("exitCode") if pod else None
            self._report(pod)
            self._delete_or_keep(pod, failed=True)
            raise RunnerError(
                f"{self.request.stage} left no receipt of this run in {self.request.store} (exit code {code}): without that "
                "nothing proves what it did. Worker and pod may see different stores; else look at the log above."
            )
        self._resubmit_or_raise(pod, diagnosis)
        return None

    def _log_the_rest(self, pod: PodJson | None, *, again: bool) -> None:
        """Log what the pod wrote last, which a pod that is being deleted may no longer have.

        :param again: another pod is to be submitted in this try.
        """
        any_lines = pod is not None and self._read_logs(pod, again=again and self.defers)
        if again and not any_lines and self.state.tail:
            log.info("the last lines of the pod that is gone:")
            for level, text in self.state.tail:
                log.log(level, "%s", text)

    def _gone_pod(self) -> PodJson:
        """Our pod as far as it is known without the cluster, which no longer has it: its events may tell why."""
        name = pod_name(self.request, self.state.submission, self.store_id)
        known = {"name": name, "uid": self.state.uid, "namespace": self.cluster.namespace}
        return {
            "metadata": known
            | {"labels": labels(self.request, self.store_id), "deletionTimestamp": "some time ago"}
        }

    def _receipt(self, pod: PodJson | None) -> Receipt | None:
        """The receipt that this very pod left in the store.

        Or in its termination message, when that tells a failure: a stage that could not write to the store has no other way.
        """
        end = (termination(pod) or {}) if pod else {}
        message = None
        with suppress(ContractError):
            message = self._if_ours(Receipt.from_json(end.get("message") or ""))
        wait_s = (
            _LATE_STORE_S if message and not message.error else _POLL_S if end.get("exitCode") == 0 else 0.0
        )
        deadline = time.monotonic() + wait_s
        while True:
            stored = self._if_ours(self.store.receipt(self.request.run_key))
            if stored is not None or time.monotonic() >= deadline:
                break
            time.sleep(1)
        return stored or (message if message and message.error else None)

    def _if_ours(self, receipt: Receipt | None) -> Receipt | None:
        """The receipt if it answers the request that our pod was given."""
        if receipt is None or receipt.run_key != self.request.run_key or receipt.stage != self.request.stage:
            return None
        return receipt if self.state.nonce and receipt.nonce == self.state.nonce else None

    def _resubmit_or_raise(self, pod: PodJson | None, diagnosis: Diagnosis) -> None:
        """Make room for another pod if the diagnosis says so and preemption_limit allows it; else raise its error."""
        again = diagnosis.then == "resubmit" and self._may_resubmit() and not self.cancelled
        if not again:
            self._report(pod)
        self._delete_or_keep(pod, failed=True)
        if self.cancelled:
            raise self._stopped()
        limit = self.settings.preemption_limit
        if not again:
            spent = diagnosis.then == "resubmit"
            raise error_of(resubmissions_spent(diagnosis, limit) if spent else diagnosis)
        self.state.resubmissions += 1
        log.warning("%s (%d of at most %d times)", diagnosis.sentence, self.state.resubmissions, limit)
        self.state.forget_pod()

    def _may_resubmit(self) -> bool:
        return self.state.resubmissions < self.settings.preemption_limit

    def _expire(self, action: Action) -> NoReturn:
        self._report(action.pod)
        self._delete_or_keep(action.pod, failed=True)
        if action.phase == "deadline":
            raise self._timed_out()
        limit_s = getattr(self.clocks, f"{action.phase}_s")
        raise error_of(expired(f"{action.phase}_timeout_s", limit_s, action.diagnosis))

    def _report(self, pod: PodJson | None) -> None:
        """Log what helps to understand a failure: the pod's events, and the last lines that the stage wrote."""
        if pod is None:
            return
        name = pod["metadata"]["name"]
        if events := event_lines(self.cluster.events(pod)):
            log.error("events of pod %s:\n%s", name, "\n".join(events))
        if self.last_lines:
            log.error("last lines of pod %s:\n%s", name, "\n".join(self.last_lines))

    def _delete_or_keep(self, pod: PodJson | None, *, failed: bool) -> None:
        """Delete our pod, and its Secret with it; or mark it as settled where ``keep_pod`` says that it stays."""
        keep = self.settings.keep_pod == "always" or (failed and self.settings.keep_pod == "failed")
        while pod is not None and annotation(pod, TRY) == self.try_id:
            if keep and termination(pod) is not None and not is_terminating(pod):
                if self.cluster.annotate(pod, {SETTLED: "yes"}) is not None:
                    return
            elif is_terminating(pod) or self.cluster.delete(pod):
                return
            uid = pod["metadata"]["uid"]  # it has changed since it was looked at: look again
            pods, _ = self.cluster.list_pods(self.key)
            pod = next((p for p in pods if p["metadata"]["uid"] == uid), None)

    # -- being stopped -------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Delete the pod if this try still owns it, unless Airflow still wants the task."""
        if self.ti is not None and is_wanted(self.ti):
            log.warning("the worker was asked to stop; the pod goes on, and the next try takes it up")
            return
        self.cancelled = True
        self.delete_own()

    def delete_own(self) -> None:
        """Delete the pods that this try owns; safe in a signal handler, because it needs no lock that :meth:`run` holds.

        They are found by the try's id: the signal may have come before the uid of a new pod was known here.
        """
        cluster = self.cluster.for_signal_handler()
        try:
            for _ in range(5):  # a pod may change between the list and the deletion
                pods, _version = cluster.list_pods(self.key)
                if all(cluster.delete(pod) for pod in pods if self._is_to_delete(pod)):
                    return
        except (ApiRefused, RunnerError) as error:  # must not hide what stopped the task
            log.error("the pod of %s goes on, for it could not be deleted: %s", self.request.stage, error)  # noqa: TRY400

    def _is_to_delete(self, pod: PodJson) -> bool:
        own = annotation(pod, TRY) == self.try_id
        return own and not annotation(pod, SETTLED) and not is_terminating(pod)

    def _stopped(self) -> Preempted:
        return Preempted(f"{self.request.stage} was asked to stop, and its pod was deleted.")

    def _timed_out(self) -> BaseException:
        from airflow.providers.common.compat.sdk import AirflowTaskTimeout

        return AirflowTaskTimeout(
            f"{self.request.stage}: the task's execution_timeout is over; its pod was deleted."
        )
