"""What to do next about the pods of a run: one pure function of what is seen, which worker and triggerer both call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from lepton_airflow.pods import (
    ADMITTED,
    CONTAINER,
    LOCAL_TRY,
    QUEUE,
    REQUEST,
    SETTLED,
    SUBMISSION,
    TRY,
    PodJson,
)
from lepton_airflow.pods.diagnosis import Diagnosis, diagnose

# A pod that still exists so long after its grace period lies on a lost node, and counts as gone.
STUCK_S = 60.0


@dataclass(frozen=True)
class Clocks:
    """How long each phase of a pod's life may take [seconds]; ``deadline``: when all of them must be over [Unix time]."""

    admission_s: float
    schedule_s: float
    start_s: float
    run_s: float
    deadline: float | None = None


@dataclass(frozen=True)
class Action:
    """What to do next, about which pod.

    ======= ====================================================================================================
    create  submit the run: no live pod of it exists
    adopt   write this try's id on a pod of another try that does the same, and continue with it
    admit   note on a pod that its scheduling gates are gone
    delete  delete a pod of another try that does something else
    wait    until something changes, or ``until``; ``phase`` says for what
    collect the stage's container has ended: read its receipt
    gone    our pod no longer exists: read its receipt too
    fail    our pod cannot succeed; ``diagnosis`` says why
    expire  a clock ran out; ``phase`` says which
    lost    another try has adopted our pod
    ======= ====================================================================================================
    """

    kind: Literal["create", "adopt", "admit", "delete", "wait", "collect", "gone", "fail", "expire", "lost"]
    pod: PodJson | None = None
    phase: str = ""  # terminating, admission, schedule, start, run, deadline
    until: float | None = None
    diagnosis: Diagnosis | None = None


def decide(
    pods: Sequence[PodJson],
    *,
    owned: str | None,
    try_id: str,
    digest: str,
    clocks: Clocks,
    now: float,
    events: Sequence[Mapping[str, Any]] = (),
) -> Action:
    """The next action.

    :param pods: all pods of the run key.
    :param owned: uid of the pod that this try has created or adopted; None while it has none.
    :param try_id: id of this try.
    :param digest: the request that a pod of another try must have, as a digest, to be adopted.
    :param clocks: the limits of this run.
    :param now: Unix time.
    :param events: the events of our own pod, as far as they are known.
    """
    ours = next((p for p in pods if p["metadata"]["uid"] == owned), None)
    if ours is not None and annotation(ours, TRY) != try_id:
        return Action("lost", ours)
    if ours is not None and termination(ours) is not None:
        return Action("collect", ours)
    if clocks.deadline is not None and now >= clocks.deadline:
        return Action("expire", ours, "deadline", clocks.deadline)
    if ours is not None and not _is_stuck(ours, now):
        return _supervise(ours, clocks, now, events)
    if owned is not None:
        return Action("gone", ours)
    present = sorted((p for p in pods if not _is_stuck(p, now)), key=submission_of, reverse=True)
    adoptable = [p for p in present if _is_adoptable(p, try_id, digest)][:1]
    live = [p for p in present if termination(p) is None and p not in adoptable]
    for pod in live:
        if not is_terminating(pod):
            return Action("delete", pod)
    for pod in live:  # no second pod may run beside it
        return Action("wait", pod, "terminating", _gone_by(pod))
    return Action("adopt", adoptable[0]) if adoptable else Action("create")


def describe_wait(action: Action) -> str:
    """What a pod is waited for, in words."""
    assert action.pod is not None
    name = action.pod["metadata"]["name"]
    what = {
        "terminating": "is being deleted; waiting until it is gone",
        "admission": "waits to be admitted",
        "schedule": "waits for a node",
        "start": "starts",
        "run": "runs",
    }[action.phase]
    return f"pod {name} {what}" + (f": {action.diagnosis.sentence}" if action.diagnosis else "")


def next_submission(pods: Sequence[PodJson], last: int) -> int:
    """The number of the next submission: above those of all existing pods, and above the last one of this try."""
    return max([last, *map(submission_of, pods)]) + 1


# -- reading a pod -----------------------------------------------------------------------------------------------------


def container_state(pod: PodJson, name: str = CONTAINER) -> tuple[str, Mapping[str, Any]]:
    """``waiting``, ``running`` or ``terminated``, with the details that the kubelet gives."""
    status = pod.get("status") or {}
    for each in [*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ())]:
        if each["name"] == name:
            for state in ("terminated", "running", "waiting"):
                if each.get("state", {}).get(state) is not None:
                    return state, each["state"][state]
    return "waiting", {}


def logged_containers(pod: PodJson) -> list[str]:
    """The containers whose lines belong in the task's log: the init containers in their order, then the stage's.

    Init containers that restart always are sidecars, which end after the stage.
    """
    init = pod["spec"].get("initContainers") or ()
    return [c["name"] for c in init if c.get("restartPolicy") != "Always"] + [CONTAINER]


def termination(pod: PodJson) -> Mapping[str, Any] | None:
    """How the stage's container ended; ``{}`` where the pod ended without saying so; None while it may still run.

    A sidecar may outlive the stage, so the pod's own phase only counts when it is a final one.
    """
    state, details = container_state(pod)
    if state == "terminated":
        return details
    return {} if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed") else None


def is_terminating(pod: PodJson) -> bool:
    """Whether somebody has asked for the pod's deletion."""
    return bool(pod["metadata"].get("deletionTimestamp"))


def is_gated(pod: PodJson) -> bool:
    """Whether a scheduling gate holds the pod back, as Kueue's does until the queue admits it."""
    return bool((pod.get("spec") or {}).get("schedulingGates"))


def annotation(pod: Mapping[str, Any], name: str) -> str:
    """The value of a pod's annotation; empty where it has none."""
    return str((pod["metadata"].get("annotations") or {}).get(name, ""))


def submission_of(pod: PodJson) -> int:
    """Which submission of its run the pod is."""
    text = annotation(pod, SUBMISSION)
    return int(text) if text.isdecimal() else 0


def unix_time(timestamp: str) -> float:
    """The Unix time of an RFC 3339 timestamp."""
    return datetime.fromisoformat(timestamp).replace(tzinfo=UTC).timestamp()


# -- deciding about one pod --------------------------------------------------------------------------------------------


def _supervise(pod: PodJson, clocks: Clocks, now: float, events: Sequence[Mapping[str, Any]]) -> Action:
    """Keep waiting for our own pod, unless it cannot succeed or the clock of its phase ran out."""
    if is_terminating(pod):
        return Action("wait", pod, "terminating", _gone_by(pod))
    if QUEUE in (pod["metadata"].get("labels") or {}) and not is_gated(pod) and not annotation(pod, ADMITTED):
        return Action("admit", pod)
    diagnosis = diagnose(pod, events)
    if diagnosis is not None and diagnosis.then != "wait":
        return Action("fail", pod, diagnosis=diagnosis)
    phase, since, limit = _clock(pod, clocks)
    until = since + limit
    if now >= until:
        return Action("expire", pod, phase, until, diagnosis)
    if clocks.deadline is not None:
        until = min(until, clocks.deadline)
    return Action("wait", pod, phase, until, diagnosis)


def _clock(pod: PodJson, clocks: Clocks) -> tuple[str, float, float]:
    """The phase of the pod's life, when it began [Unix time], and its limit [seconds]."""
    created = unix_time(pod["metadata"]["creationTimestamp"])
    state, details = container_state(pod)
    if state == "running":
        return "run", unix_time(details["startedAt"]) if details.get("startedAt") else created, clocks.run_s
    if is_gated(pod):
        return "admission", created, clocks.admission_s
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "True":
            return "start", unix_time(condition["lastTransitionTime"]), clocks.start_s
    admitted = annotation(pod, ADMITTED)
    return "schedule", float(admitted) if admitted else created, clocks.schedule_s


def _is_adoptable(pod: PodJson, try_id: str, digest: str) -> bool:
    """Whether this try may continue with the pod: it does what was asked for, and runs or may have left a receipt."""
    if is_terminating(pod) or annotation(pod, SETTLED):
        return False
    ended = termination(pod)
    if ended is not None and ended.get("exitCode") != 0:
        return False  # it failed: submit again
    return annotation(pod, REQUEST) == digest or annotation(pod, TRY) == try_id != LOCAL_TRY


def _gone_by(pod: PodJson) -> float:
    # The deletionTimestamp is the end of the grace period.
    return unix_time(pod["metadata"]["deletionTimestamp"]) + STUCK_S


def _is_stuck(pod: PodJson, now: float) -> bool:
    return is_terminating(pod) and now >= _gone_by(pod)
