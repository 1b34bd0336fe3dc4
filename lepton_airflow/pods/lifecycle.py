"""What to do next about a run's pods: one pure function of what is seen, called by worker and triggerer alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from lepton_airflow.pods import ADMITTED, CONTAINER, LOCAL_TRY, QUEUE, REQUEST, SETTLED, SUBMISSION, TRY
from lepton_airflow.pods.diagnosis import Diagnosis, diagnose

Seen = Mapping[str, Any]  # a pod as the API server's JSON
STUCK_S = (
    60.0  # a pod that is not gone so long after its grace period lies on a lost node, and is passed over
)


@dataclass(frozen=True)
class Clocks:
    """How long each part of a pod's life may take [seconds]; ``deadline``: when all must be over [Unix time]."""

    admission_s: float
    schedule_s: float
    start_s: float
    run_s: float
    deadline: float | None = None


@dataclass(frozen=True)
class Step:
    """What to do next, about which pod.

    ====== =====================================================================================================
    create submit the run; no pod of it lives
    adopt  write this try's id on a pod of another try that does the same, and go on with it
    admit  note on a pod that it is no longer held back
    delete end a pod of another try that does something else
    wait   until something changes, or ``until``; ``phase`` says for what
    take   the stage's container has ended: look for its receipt
    gone   our pod is no longer there: look for its receipt too
    fail   our pod cannot come right; ``diagnosis`` says why
    late   a clock ran out; ``phase`` says which
    lost   another try has taken our pod over
    ====== =====================================================================================================
    """

    do: Literal["create", "adopt", "admit", "delete", "wait", "take", "gone", "fail", "late", "lost"]
    pod: Seen | None = None
    phase: str = ""  # leaving, admission, schedule, start, run, deadline
    until: float | None = None
    diagnosis: Diagnosis | None = None


def decide(
    pods: Sequence[Seen],
    *,
    owned: str | None,
    try_id: str,
    digest: str,
    clocks: Clocks,
    now: float,
    events: Sequence[Mapping[str, Any]] = (),
) -> Step:
    """The next step.

    :param pods: all pods of the run key.
    :param events: what is known of the events of our own pod.
    :param owned: uid of the pod that this try has created or adopted, None while it has none.
    :param digest: what a pod of another try must have been asked for to be adopted.
    :param now: Unix time.
    """
    ours = next((p for p in pods if p["metadata"]["uid"] == owned), None)
    if ours is not None and note(ours, TRY) != try_id:
        return Step("lost", ours)
    if ours is not None and ended(ours) is not None:
        return Step("take", ours)
    if clocks.deadline is not None and now >= clocks.deadline:
        return Step("late", ours, "deadline", clocks.deadline)
    if ours is not None and not _stuck(ours, now):
        return _attend(ours, clocks, now, events)
    if owned is not None:
        return Step("gone", ours)
    present = sorted((p for p in pods if not _stuck(p, now)), key=number_of, reverse=True)
    equal = [p for p in present if _worth_adopting(p, try_id, digest)]
    live = [p for p in present if ended(p) is None and p not in equal[:1]]
    for pod in live:
        if not leaving(pod):
            return Step("delete", pod)
    for pod in live:  # nothing may run beside it
        return Step("wait", pod, "leaving", _gone_by(pod))
    return Step("adopt", equal[0]) if equal else Step("create")


def phase_of(step: Step) -> str:
    """What a pod is waited for, in words."""
    assert step.pod is not None
    name = step.pod["metadata"]["name"]
    what = {
        "leaving": "is being deleted; waiting until it is gone",
        "admission": "waits to be admitted",
        "schedule": "waits for a node",
        "start": "starts",
        "run": "runs",
    }[step.phase]
    return f"pod {name} {what}" + (f": {step.diagnosis.sentence}" if step.diagnosis else "")


def next_number(pods: Sequence[Seen], used: int) -> int:
    """The number of the next submission: above those of all pods that are there, and of all that this try made."""
    return max([used, *map(number_of, pods)]) + 1


def container_state(pod: Seen, name: str = CONTAINER) -> tuple[str, Mapping[str, Any]]:
    """``waiting``, ``running`` or ``terminated``, with what the kubelet says about it."""
    status = pod.get("status") or {}
    for each in [*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ())]:
        if each["name"] == name:
            for state in ("terminated", "running", "waiting"):
                if each.get("state", {}).get(state) is not None:
                    return state, each["state"][state]
    return "waiting", {}


def containers(pod: Seen) -> list[str]:
    """The containers whose lines are the task's: those that prepare, in their order, and the stage's."""
    init = pod["spec"].get("initContainers") or ()
    return [c["name"] for c in init if c.get("restartPolicy") != "Always"] + [CONTAINER]  # those are sidecars


def ended(pod: Seen) -> Mapping[str, Any] | None:
    """How the stage's container ended; ``{}`` where the pod ended without it; None while it may go on.

    A sidecar may run on, so the pod's own phase only counts when it is over.
    """
    state, details = container_state(pod)
    if state == "terminated":
        return details
    return {} if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed") else None


def leaving(pod: Seen) -> bool:
    """Whether somebody asked for the pod's deletion."""
    return bool(pod["metadata"].get("deletionTimestamp"))


def note(pod: Seen, annotation: str) -> str:
    """What stands in an annotation of the pod, or nothing."""
    return str((pod["metadata"].get("annotations") or {}).get(annotation, ""))


def number_of(pod: Seen) -> int:
    """Which submission of its run the pod is."""
    text = note(pod, SUBMISSION)
    return int(text) if text.isdecimal() else 0


def held_back(pod: Seen) -> bool:
    """Whether a scheduling gate holds the pod, as Kueue's does until the queue admits it."""
    return bool((pod.get("spec") or {}).get("schedulingGates"))


def seconds(timestamp: str) -> float:
    """The Unix time of an RFC 3339 timestamp."""
    return datetime.fromisoformat(timestamp).replace(tzinfo=UTC).timestamp()


def _attend(pod: Seen, clocks: Clocks, now: float, events: Sequence[Mapping[str, Any]]) -> Step:
    """Wait on for our own pod, unless it cannot come right or the clock of its part of life ran out."""
    if leaving(pod):
        return Step("wait", pod, "leaving", _gone_by(pod))
    if QUEUE in (pod["metadata"].get("labels") or {}) and not held_back(pod) and not note(pod, ADMITTED):
        return Step("admit", pod)
    diagnosis = diagnose(pod, events)
    if diagnosis is not None and diagnosis.then != "wait":
        return Step("fail", pod, diagnosis=diagnosis)
    phase, since, limit = _clock(pod, clocks)
    until = since + limit
    if now >= until:
        return Step("late", pod, phase, until, diagnosis)
    if clocks.deadline is not None:
        until = min(until, clocks.deadline)
    return Step("wait", pod, phase, until, diagnosis)


def _clock(pod: Seen, clocks: Clocks) -> tuple[str, float, float]:
    """Which part of life the pod is in, since when [Unix time], and its limit [seconds]."""
    made = seconds(pod["metadata"]["creationTimestamp"])
    state, details = container_state(pod)
    if state == "running":
        return "run", seconds(details["startedAt"]) if details.get("startedAt") else made, clocks.run_s
    if held_back(pod):
        return "admission", made, clocks.admission_s
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "True":
            return "start", seconds(condition["lastTransitionTime"]), clocks.start_s
    admitted = note(pod, ADMITTED)
    return "schedule", float(admitted) if admitted else made, clocks.schedule_s


def _worth_adopting(pod: Seen, try_id: str, digest: str) -> bool:
    """Whether going on with the pod is what was asked for: it runs, or it may have left a receipt."""
    if leaving(pod) or note(pod, SETTLED):
        return False
    end = ended(pod)
    if end is not None and end.get("exitCode") != 0:
        return False  # failed: submitted again
    return note(pod, REQUEST) == digest or note(pod, TRY) == try_id != LOCAL_TRY


def _gone_by(pod: Seen) -> float:
    # The timestamp of a deletion is when the grace period ends.
    return seconds(pod["metadata"]["deletionTimestamp"]) + STUCK_S


def _stuck(pod: Seen, now: float) -> bool:
    return leaving(pod) and now >= _gone_by(pod)
