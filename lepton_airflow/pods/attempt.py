"""One try to bring a request to its end in a pod: look at what exists, decide, act, and look again.

:class:`Attempt` keeps no state of its own. Entered for the first time, after a deferral, or by a retry after the worker died:
it looks at the pods that there are for the run key, decides (:func:`lepton_airflow.pods.lifecycle.decide`), acts, and looks
again. It ends with the receipt of this very pod, read from the store, or it raises.
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
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

from lepton_airflow.connections import Connection, redactor
from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import DO_NOT_RETRY, PREEMPTED, ContractError, PodFailed, Preempted, RunnerError
from lepton_airflow.execution.output import level_of, settle
from lepton_airflow.pods import ADMITTED, IDENTITY, LOCAL_TRY, NONCE, SETTLED, TRY
from lepton_airflow.pods.cluster import Cluster, Refused
from lepton_airflow.pods.diagnosis import Diagnosis, diagnose, error_of, expired, spent, told
from lepton_airflow.pods.lifecycle import (
    Clocks,
    Seen,
    Step,
    container_state,
    containers,
    decide,
    ended,
    leaving,
    next_number,
    note,
    number_of,
    phase_of,
)
from lepton_airflow.pods.manifest import check_store, labels, pod_base, pod_name, request_digest, submission
from lepton_airflow.pods.settings import PodSettings, load_template
from lepton_airflow.pods.task_state import wanted
from lepton_airflow.store import Store

log = logging.getLogger("lepton_airflow.stage")

_QUIET_S = 30.0  # a log without a line for so long is asked for again, and the pod is looked at
_POLL_S = 5.0
_FOLLOW_S = 60.0  # a log that never pauses is left for a look at the pod so often
_LATE_STORE_S = (
    60.0  # how long a receipt may take to be seen here once the pod says that it wrote it (NFS, S3)
)


@dataclass(frozen=True)
class Waiting:
    """The pod, or room for one, is to be waited for without a worker slot.

    :ivar trigger: the arguments of the trigger that waits.
    :ivar state: what the next entry of this try is given.
    """

    trigger: dict[str, Any]
    state: dict[str, Any]


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


class Attempt:
    """One entry into the step machine."""

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

        self.settings, self.request, self.connections, self.ti = settings, request, connections, ti
        by_id = {c.id: c for c in connections}
        self.hide = redactor(by_id)
        self.held = _Held(**(state or {}))
        self.defers = defers
        self.try_id = str(ti.id) if ti is not None else LOCAL_TRY
        self.base = pod_base(settings, request, load_template(settings))
        self.digest = request_digest(self.base, request)
        check_store(request, self.base)
        self.store = Store(request.store, by_id.get(request.store_connection or ""))
        self.store.receipt(request.run_key)  # a store that cannot be read fails before the pod is made
        self.cluster = Cluster(settings, in_airflow=ti is not None)
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

    def run(self) -> Receipt | Waiting:
        """Look, decide, act, until there is a receipt, an error, or a wait that needs no worker."""

        try:
            while True:
                outcome = self._act(*self._look())
                if outcome is not None:
                    return outcome
        except Refused as error:
            raise error_of(error.diagnosis) from None

    def _look(self) -> tuple[Step, str, list[dict[str, Any]]]:
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

    def _act(self, step: Step, version: str, pods: list[dict[str, Any]]) -> Receipt | Waiting | None:
        pod = step.pod
        if step.do in ("take", "gone"):
            return self._conclude(pod)
        if self.cancelled:
            self.delete_own()  # one that was being made when the signal came
            raise Preempted(f"{self.request.stage} was asked to stop, and its pod was deleted.")
        if step.do == "create":
            return self._submit(pods)
        if step.do in ("adopt", "delete") and self.held.resubmitted and pod and note(pod, TRY) != self.try_id:
            step = replace(step, do="lost")  # made since this try began: Airflow has started a later one
        assert pod is not None or step.do == "late"
        if step.do == "late":
            self._too_late(step)
        assert pod is not None
        name = pod["metadata"]["name"]
        if step.do == "wait":
            return self._wait(step, version)
        if step.do == "adopt":
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

    def _submit(self, pods: Sequence[Seen]) -> Waiting | None:
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
            return self._wait_for_room(error.diagnosis, pod)
        self.held.refused_since = None
        self.held.number = number
        if made is not None:
            self.held.uid, self.held.nonce, self.held.read = made["metadata"]["uid"], nonce, {}
            log.info("pod %s was made in namespace %s", pod["metadata"]["name"], self.cluster.namespace)
        return None

    def _adopt(self, pod: Seen) -> None:
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

    def _wait(self, step: Step, version: str) -> Waiting | None:
        """Until something changes: in a trigger where that is wanted, else here, with the log flowing."""

        assert step.pod is not None
        assert step.until is not None
        self._say(phase_of(step))
        if self.defers:
            return self._waiting(step.pod)
        started = time.monotonic()
        if (
            not self._read_logs(step.pod, min(step.until, time.time() + _FOLLOW_S))
            or time.monotonic() - started < 1
        ):
            self.cluster.wait(self.request.run_key, version, max(1.0, min(_POLL_S, step.until - time.time())))
        return None

    def _wait_for_room(self, diagnosis: Diagnosis, pod: dict[str, Any]) -> Waiting | None:
        """A quota is full: hold no worker slot meanwhile, and ask again."""

        limit_s = self.settings.admission_timeout_s
        self.held.refused_since = self.held.refused_since or time.time()
        if time.time() - self.held.refused_since >= limit_s:
            raise error_of(expired("admission_timeout_s", limit_s, diagnosis))
        if self.held.deadline is not None and time.time() >= self.held.deadline:
            raise _timed_out(self.request)
        self._say(f"waiting: {diagnosis.sentence}")
        if self.defers:
            return self._waiting(refused=pod)
        time.sleep(_POLL_S)
        return None

    def _waiting(self, pod: Seen | None = None, refused: dict[str, Any] | None = None) -> Waiting:
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
        trigger = {
            "cluster": {
                "kubernetes_conn_id": s.kubernetes_conn_id,
                "config_file": s.config_file,
                "cluster_context": s.cluster_context,
                "in_cluster": self.cluster.in_cluster,
            },
            "namespace": self.cluster.namespace,
            "run_key": self.request.run_key,
            "owned": self.held.uid,
            "try_id": self.try_id,
            "digest": self.digest,
            "clocks": asdict(clocks),
            "read": self.held.read,
            "connections": [c.id for c in self.connections],
            "refused": refused,
        }
        return Waiting(trigger, asdict(self.held))

    def _say(self, what: str) -> None:
        if what != self.said:
            log.info("%s", what)
            self.said = what

    def _read_logs(self, pod: Seen, until: float = math.inf, *, again: bool = False) -> bool:
        """Bring the lines that were not logged yet into the task's log, following them; whether there were any.

        :param until: when to leave a log that goes on [Unix time].
        :param again: those too that the trigger logged, for another trigger is going to overwrite them.
        """

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
        read = pod is not None and self._read_logs(pod, again=again and self.defers)
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

        name = pod_name(self.request, self.held.number)
        known = {"name": name, "uid": self.held.uid, "namespace": self.cluster.namespace}
        return {"metadata": known | {"labels": labels(self.request), "deletionTimestamp": "some time ago"}}

    def _receipt(self, pod: Seen | None) -> Receipt | None:
        """What this very pod has left: in the store, or, where it could not reach that, in its termination message."""

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
        self._report(step.pod)
        self._clear_away(step.pod, failed=True)
        if step.phase == "deadline":
            raise _timed_out(self.request)
        limit_s = getattr(self.clocks, f"{step.phase}_s")
        raise error_of(expired(f"{step.phase}_timeout_s", limit_s, step.diagnosis))

    def _report(self, pod: Seen | None) -> None:
        """Log what somebody who looks at a failure wants to see: the events, and the last lines that the stage wrote."""

        if pod is None:
            return
        name = pod["metadata"]["name"]
        if events := told(self.cluster.events(pod)):
            log.error("events of pod %s:\n%s", name, "\n".join(events))
        if self.last_lines:
            log.error("last lines of pod %s:\n%s", name, "\n".join(self.last_lines))

    def _clear_away(self, pod: Seen | None, *, failed: bool) -> None:
        """Delete our pod, and its Secret with it; one that is to be kept is marked, so that nobody takes its end again."""

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

    def cancel(self) -> None:
        """Delete the pod if this try still owns it, unless Airflow still wants the task."""
        if self.ti is not None and wanted(self.ti):
            log.warning("the worker was asked to stop; the pod goes on, and the next try takes it up")
            return
        self.cancelled = True
        self.delete_own()

    def delete_own(self) -> None:
        """Delete what this try owns, also from a signal handler: nothing here waits for a lock of :meth:`run`.

        Found by the try's id, for the signal may have come before the uid of a new pod was known here.
        """

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


def _timed_out(request: Request) -> BaseException:
    from airflow.providers.common.compat.sdk import AirflowTaskTimeout

    return AirflowTaskTimeout(f"{request.stage}: the task's execution_timeout is over; its pod was deleted.")
