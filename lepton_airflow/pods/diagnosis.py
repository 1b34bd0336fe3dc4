"""Why a pod does not run, or did not end well, and whether to wait, submit again, retry or give up.

Pure functions of what the API server sends (plain dicts with its camelCase names), so they are tested on recorded
answers. Statuses differ between versions of Kubernetes. From 1.26 on, a disrupted pod has a condition that says so
(``DisruptionTarget``); before, only an event does, or nothing. The kubelet of 1.20 drops the container statuses of a
pod that it evicts.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from lepton_airflow.errors import DO_NOT_RETRY, FAILED, PREEMPTED, OutOfMemory, PodFailed, RunnerError
from lepton_airflow.pods import CONTAINER, QUEUE, STAGE

Then = Literal["wait", "resubmit", "retry", "refuse"]


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a pod, or with a call of the API server.

    :ivar reason: one word for it, the same in every version of Kubernetes.
    :ivar sentence: what failed, on which value, what was expected, what to do next.
    :ivar then: what to do. ``wait``: it may still succeed, within its clock. ``resubmit``: submit a new pod in the same
        try. ``retry``: fail this try. ``refuse``: fail the task, because the next try would end the same way.
    """

    reason: str
    sentence: str
    then: Then


class ApiRefused(Exception):
    """The API server refused a call, and would refuse it again; ``diagnosis`` says why."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        super().__init__(diagnosis.sentence)
        self.diagnosis = diagnosis


def diagnose(
    pod: Mapping[str, Any] | None, events: Sequence[Mapping[str, Any]] = (), container: str = CONTAINER
) -> Diagnosis | None:
    """Say what is wrong with a pod; None while nothing is, and when the stage's container ended with exit code 0.

    :param pod: the pod as the API server sends it; None: it is gone.
    :param events: the events about it, oldest first.
    :param container: name of the container that runs the stage; other containers only matter before it starts.
    """
    view = _PodView.of(pod, events, container)
    if view.ended and view.ended.get("exitCode") == 0:
        return None
    for diagnose_one in (
        _out_of_memory,
        _rejected_by_the_stage,
        _disrupted,
        _not_by_this_node,
        _failed,
        _not_started,
    ):
        if found := diagnose_one(view):
            return found
    return None


def diagnose_refusal(status: int, body: Mapping[str, Any] | str, doing: str) -> Diagnosis:
    """Say why the API server refused a call, or did not answer it.

    :param status: its HTTP status; 0: it did not answer.
    :param body: its answer: a ``Status`` as a dict or as JSON, or any other text.
    :param doing: what was asked for, such as ``create pod train-1 in namespace ml``.
    """
    message = _message(body)
    if status in (0, 408, 410, 429) or status >= 500:
        what = f"answered {status}" if status else "does not answer"
        return Diagnosis(
            "ApiServer",
            f"The API server {what} ({_clip(message) or 'no reason given'}) when asked to {doing}; it is asked again.",
            "wait",
        )
    if status == 401:
        return Diagnosis(
            "Forbidden",
            f"The API server does not know the credentials it was given to {doing}: renew the token or certificate in "
            "the kubeconfig or in the Connection of kubernetes_conn_id.",
            "refuse",
        )
    if status == 409:
        return Diagnosis("Conflict", f"Somebody was faster (tried: {doing}): {_clip(message)}.", "wait")
    if status == 404 and re.search(r'namespaces? "', message):
        name = _quoted(message)
        return Diagnosis(
            "NoNamespace",
            f"Namespace {name!r} does not exist (tried: {doing}): create it, or pass the namespace=… that your team has.",
            "refuse",
        )
    if status == 404:
        return Diagnosis("Deleted", f"It is gone (tried: {doing}): {_clip(message)}.", "resubmit")
    if status == 403:
        return _forbidden(message, doing)
    return _invalid(message, doing)


def expired(clock: str, limit_s: float, waiting: Diagnosis | None) -> Diagnosis:
    """Turn a wait that exceeded its limit into a failure that still says what the wait was for.

    :param clock: name of the setting that limits the wait, such as ``schedule_timeout_s``.
    :param limit_s: its value [seconds].
    :param waiting: what the pod waited for, if a diagnosis said so.
    """
    told = f"{clock}={limit_s:g} seconds are over"
    if waiting is None:
        return Diagnosis("Deadline", f"{told}: raise {clock}, or make it quicker.", "retry")
    return replace(waiting, sentence=f"{waiting.sentence} {told}.", then="retry")


def resubmissions_spent(diagnosis: Diagnosis, limit: int) -> Diagnosis:
    """Turn a reason to submit again into a failure, once this try has submitted again ``limit`` times."""
    times = f"It was submitted again {limit} times in this try, as preemption_limit={limit} allows"
    advice = "find out who takes its pods away, give it a priority_class, or raise the limit"
    return replace(diagnosis, sentence=f"{diagnosis.sentence} {times}: {advice}.", then="retry")


def error_of(diagnosis: Diagnosis) -> RunnerError:
    """The error that fails the task: its exit code says whether Airflow may retry, its ``reason`` why it failed."""
    if diagnosis.reason == "OOM":
        return OutOfMemory(diagnosis.sentence)
    code = {"refuse": DO_NOT_RETRY, "resubmit": PREEMPTED}.get(diagnosis.then, FAILED)
    return PodFailed(diagnosis.sentence, diagnosis.reason, code)


def event_lines(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """Events as lines for a log, in the order given."""
    return [
        f"{e.get('type', '')} {e.get('reason', '')}"
        + (f" ({_count(e)} times)" if _count(e) > 1 else "")
        + f": {(e.get('message') or '').strip()}"
        for e in events
    ]


def parse_quantity(text: str) -> float:
    """The number that a Kubernetes quantity such as ``1500m``, ``64Mi`` or ``2`` stands for; ValueError for other text."""
    match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)([numkMGTPE]|[KMGTPE]i)?", text.strip())
    if match is None:
        raise ValueError(text)
    suffix = match[2] or ""
    power = "num kMGTPE".index(suffix[0]) - 3 if suffix else 0
    return float(match[1]) * (1024.0 if suffix.endswith("i") else 1000.0) ** power


# The pod -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PodView:
    """What the diagnoses look at, read once from the pod's JSON and its events."""

    exists: bool
    name: str  # namespace/name
    stage: str
    node: str
    phase: str
    reason: str
    message: str
    deleted: bool
    conditions: Mapping[str, Mapping[str, Any]]
    spec: Mapping[str, Any]  # of the stage's container
    gates: Sequence[str]
    queue: str
    stage_state: Mapping[str, Any]
    started: bool  # the stage's container runs or ran
    init: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]

    @classmethod
    def of(
        cls, pod: Mapping[str, Any] | None, events: Sequence[Mapping[str, Any]], container: str
    ) -> _PodView:
        about = next((e.get("involvedObject") or {} for e in events), {})
        meta = (pod or {}).get("metadata") or about
        spec, status = (pod or {}).get("spec") or {}, (pod or {}).get("status") or {}
        labels = meta.get("labels") or {}
        uid = meta.get("uid")
        stage: Mapping[str, Any] = next(
            (c for c in status.get("containerStatuses") or () if c.get("name") == container), {}
        )
        state = stage.get("state") or {}
        if (
            "running" not in state
            and "terminated" not in state
            and "terminated" in (stage.get("lastState") or {})
        ):
            # The kubelet was restarted, or the pod has another restartPolicy than ours.
            state = stage["lastState"]
        return cls(
            exists=pod is not None,
            name=f"{meta.get('namespace', 'default')}/{meta.get('name', '?')}",
            stage=labels.get(STAGE, container),
            node=spec.get("nodeName") or "",
            phase=status.get("phase") or "",
            reason=status.get("reason") or "",
            message=status.get("message") or "",
            deleted=bool(meta.get("deletionTimestamp")),
            conditions={c["type"]: c for c in status.get("conditions") or ()},
            spec=next((c for c in spec.get("containers") or () if c.get("name") == container), {}),
            gates=[g["name"] for g in spec.get("schedulingGates") or ()],
            queue=labels.get(QUEUE, ""),
            stage_state=state,
            started="running" in state or "terminated" in state,
            init=status.get("initContainerStatuses") or (),
            events=[e for e in events if not uid or (e.get("involvedObject") or {}).get("uid", uid) == uid],
        )

    @property
    def ended(self) -> Mapping[str, Any] | None:
        """The ``terminated`` state of the stage's container."""
        return self.stage_state.get("terminated")

    def condition(self, kind: str, status: str) -> Mapping[str, Any] | None:
        found = self.conditions.get(kind)
        return found if found and found.get("status") == status else None

    def event(self, *reasons: str) -> Mapping[str, Any] | None:
        """The latest event with one of these reasons."""
        return next((e for e in reversed(self.events) if e.get("reason") in reasons), None)

    @property
    def asks(self) -> str:
        """What the stage asks for, in words."""
        resources = self.spec.get("resources") or {}
        asked = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        return ", ".join(f"{k} {v}" for k, v in sorted(asked.items())) or "nothing in particular"


# The diagnoses, in the order of their precedence ----------------------------------------------------------------------


def _out_of_memory(view: _PodView) -> Diagnosis | None:
    ends = [(view.stage, view.spec, view.ended)]
    ends += [(f"init container {c['name']}", {}, (c.get("state") or {}).get("terminated")) for c in view.init]
    for who, spec, ended in ends:
        if ended and ended.get("reason") == "OOMKilled":
            limit = ((spec.get("resources") or {}).get("limits") or {}).get("memory")
            return Diagnosis(
                "OOM",
                f"{who} used more memory than {f'its limit of {limit}' if limit else 'it was given'} in pod {view.name} and was "
                f"killed (OOMKilled, exit code {ended.get('exitCode')}): raise memory=… of its Pod, or lower what the stage "
                "reads at once.",
                "retry",
            )
    return None


def _rejected_by_the_stage(view: _PodView) -> Diagnosis | None:
    """Exit code 80: another try would end the same way. It counts even if the pod was disrupted at the same time."""
    if not view.ended or view.ended.get("exitCode") != DO_NOT_RETRY:
        return None
    return Diagnosis(
        "UserCode",
        f"{view.stage} refused its input or configuration in pod {view.name} (exit code 80){_last_words(view.ended)}.",
        "refuse",
    )


_BY_CONDITION = {
    "PreemptionByScheduler": "Preempted",
    "PreemptionByKubeScheduler": "Preempted",  # its name in 1.25
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
    "DeletionByTaintManager": "NodeLost",
    "DeletionByPodGC": "NodeLost",
    "DeletionByKueue": "Preempted",
}
_BY_REASON = {
    "Evicted": "Evicted",
    "Preempting": "Preempted",  # the kubelet made room for a critical pod
    "NodeLost": "NodeLost",
    "Terminated": "NodeLost",  # graceful shutdown of the node; Shutdown and NodeShutdown before 1.22
    "Shutdown": "NodeLost",
    "NodeShutdown": "NodeLost",
}
_BY_EVENT = {"Preempted": "Preempted", "TaintManagerEviction": "NodeLost", "Evicted": "Evicted"}
_HAPPENED = {
    "Evicted": "was evicted from",
    "Preempted": "made room for a pod of higher priority on",
    "NodeLost": "was lost with",
}


def _disrupted(view: _PodView) -> Diagnosis | None:
    """The cluster or somebody removed the pod. No code is to blame, so a new pod may go on from the checkpoint."""
    reason, message = _disruption(view)
    if reason == "NodeLost" and not _is_given_up(view):
        return _node_away(view)
    # The stage itself caused such an eviction, and would cause it again.
    if reason and re.search(r"exceed(?:s|ed) .*limit", message):
        return Diagnosis(
            "Evicted",
            f"{view.stage} wrote more to disk than pod {view.name} may and was evicted ({_clip(message)}): give the volume or "
            "ephemeral-storage a higher limit, or write less to its work directory.",
            "retry",
        )
    if reason:
        why = f" ({_clip(message)})" if message else ""
        return Diagnosis(
            reason,
            f"Pod {view.name} of {view.stage} {_HAPPENED[reason]} node {view.node or '(unknown)'}{why}.",
            "resubmit",
        )
    if not view.exists or view.deleted:
        return Diagnosis(
            "Deleted",
            f"Pod {view.name} of {view.stage} was deleted, and not by this task: by hand, or by a drain or eviction, which clusters "
            "before 1.26 do not tell apart. To stop a task, mark it failed in Airflow.",
            "resubmit",
        )
    if view.ended and view.ended.get("exitCode") == PREEMPTED:
        return Diagnosis(
            "Preempted",
            f"{view.stage} was asked to stop in pod {view.name} and kept what it had (exit code 75).",
            "resubmit",
        )
    ready = view.condition("Ready", "False")
    if (
        "running" in view.stage_state
        and view.phase in ("Running", "Unknown")
        and ready
        and not ready.get("reason")
    ):
        # The node controller set Ready to False: the kubelet would have given a reason.
        return _node_away(view)
    return None


def _disruption(view: _PodView) -> tuple[str, str]:
    """The reason of a disruption and the message about it, from wherever this version of Kubernetes has them; else empty."""
    target = view.condition("DisruptionTarget", "True")
    workload = view.condition("TerminationTarget", "True")  # set by Kueue on a pod that has to make room
    event = view.event(*_BY_EVENT)
    ended = view.ended or {}
    # The kubelet's own reason comes first: its condition is the same for every pod that it ends.
    if view.reason in _BY_REASON:
        return _BY_REASON[view.reason], view.message
    if target:
        return _BY_CONDITION.get(target.get("reason") or "", "Evicted"), target.get("message") or ""
    if workload:
        return "Preempted", workload.get("message") or ""
    if event and (view.deleted or not view.exists):
        return _BY_EVENT[event["reason"]], event.get("message") or ""
    if ended.get("reason") == "ContainerStatusUnknown" and not view.deleted:
        return "NodeLost", ended.get("message") or ""
    return "", ""


def _is_given_up(view: _PodView) -> bool:
    """Whether the cluster has given the pod up, so that no container of it can still run on a node that is away."""
    gone = not view.exists or view.deleted or view.phase == "Failed"
    return gone or view.condition("DisruptionTarget", "True") is not None


def _node_away(view: _PodView) -> Diagnosis:
    return Diagnosis(
        "NodeLost",
        f"Node {view.node or '(unknown)'} of pod {view.name} does not answer; {view.stage} may still run there, so it is waited for "
        "until the cluster gives the node up (five minutes by default).",
        "wait",
    )


_ELSEWHERE = re.compile(
    r"OutOf.+|UnexpectedAdmissionError|NodeAffinity|NodePorts|TopologyAffinityError|PodOSNotSupported"
)


def _not_by_this_node(view: _PodView) -> Diagnosis | None:
    """The kubelet refused the pod: the scheduler had assigned it on outdated knowledge, and may choose another node."""
    if view.phase != "Failed" or view.started or not _ELSEWHERE.fullmatch(view.reason):
        return None
    return Diagnosis(
        "NodeRefused",
        f"Node {view.node or '(unknown)'} did not take pod {view.name} ({view.reason}: {_clip(view.message)}).",
        "resubmit",
    )


def _failed(view: _PodView) -> Diagnosis | None:
    if view.reason == "DeadlineExceeded":
        return Diagnosis(
            "Deadline",
            f"Pod {view.name} of {view.stage} ran for longer than it may and was ended: raise run_timeout_s, or let the stage do "
            "less.",
            "retry",
        )
    if not view.started:
        for c in view.init:
            ended = (c.get("state") or {}).get("terminated")
            if ended and ended.get("exitCode"):
                return _cannot_begin(view, ended) or Diagnosis(
                    "InitContainer",
                    f"Init container {c['name']} failed in pod {view.name} with exit code {ended['exitCode']}"
                    f"{_last_words(ended)}, so {view.stage} did not start.",
                    "retry",
                )
    if view.ended:
        return _cannot_begin(view, view.ended) or _exit_code(view, view.ended)
    if view.phase == "Failed":
        return Diagnosis(
            "Failed",
            f"Pod {view.name} of {view.stage} failed and its node does not say how its container ended"
            f" ({': '.join(filter(None, (view.reason, _clip(view.message)))) or 'no reason given'}); look at the events below.",
            "retry",
        )
    return None


def _cannot_begin(view: _PodView, ended: Mapping[str, Any]) -> Diagnosis | None:
    """The image or the command does not fit, so the program could not be started."""
    said = ended.get("message") or ""
    if "exec format error" in said:
        fix = f"its image {view.spec.get('image', '')} is built for another kind of CPU than node {view.node}'s: build it for that one, or set node_selector"
    elif re.search(r"No module named '?lepton_airflow", said):
        fix = "its image has no lepton_airflow: pip install lepton-airflow in it (--no-deps, fsspec and psutil are enough for a stage of your own)"
    elif ended.get("reason") in ("StartError", "ContainerCannotRun") or ended.get("exitCode") in (126, 127):
        fix = "its command cannot be started: set python=… of its Pod to an interpreter that is in the image"
    elif ended.get("exitCode") == 2:
        fix = "its command line was not understood: the lepton_airflow in the image is another version than the worker's, so build the image again"
    else:
        return None
    return Diagnosis(
        "CreateConfig", f"{view.stage} did not begin in pod {view.name}{_last_words(ended)}: {fix}.", "refuse"
    )


def _exit_code(view: _PodView, ended: Mapping[str, Any]) -> Diagnosis:
    code = int(ended.get("exitCode") or 0)
    if code in (128 + signal.SIGKILL, 128 + signal.SIGTERM):
        return Diagnosis(
            "Killed",
            f"{view.stage} was ended from outside in pod {view.name} (exit code {code}); nobody deleted the pod, and it was within "
            f"its memory limit. If nobody killed its process, node {view.node} itself ran out of memory: ask for what it really "
            "needs (memory=…).",
            "retry",
        )
    how = f"exit code {code}"
    with suppress(ValueError):
        how += f", {signal.Signals(code - 128).name}" if code > 128 else ""
    return Diagnosis(
        "UserCode",
        f"{view.stage} failed in pod {view.name} ({how}){_last_words(ended)}; its last lines are in the log.",
        "retry",
    )


# Pulls that fail for good. All others (a registry that does not answer, too many requests) may still succeed.
_NO_SUCH_IMAGE = re.compile(
    r"not found|does not exist|manifest unknown|no match for platform|no matching manifest|unauthorized|denied|forbidden"
    r"|authorization failed|authentication required|no basic auth|invalid reference|no such host|name unknown",
    re.IGNORECASE,
)
_MAY_PASS = re.compile(
    r"timed? ?out|deadline exceeded|is reserved for|temporar|connection refused|try again", re.IGNORECASE
)
# Mounts that must fail before a missing object is believed: the kubelet may see a new Secret late. The third attempt comes
# seconds after the first.
_MOUNTS_TRIED = 3


def _not_started(view: _PodView) -> Diagnosis | None:
    if view.started or view.phase not in ("", "Pending"):
        return None
    for state in [*((c.get("state") or {}) for c in view.init), view.stage_state]:
        waiting = state.get("waiting") or {}
        if found := _waits(view, waiting.get("reason") or "", waiting.get("message") or ""):
            return found
    return _unscheduled(view) or _unmounted(view)


def _waits(view: _PodView, reason: str, message: str) -> Diagnosis | None:
    image = view.spec.get("image", "")
    if reason in ("InvalidImageName", "ErrImageNeverPull"):
        return Diagnosis(
            "ImagePull",
            f"Pod {view.name} cannot get its image {image}: {_clip(message)}. Correct image=…, or load it on the nodes.",
            "refuse",
        )
    if reason in (
        "ErrImagePull",
        "ImagePullBackOff",
        "RegistryUnavailable",
        "ImageInspectError",
        "SignatureValidationFailed",
    ):
        pull = next(
            (
                e["message"]
                for e in reversed(view.events)
                if (e.get("message") or "").startswith("Failed to pull")
            ),
            "",
        )
        why = pull.rpartition(" desc = ")[2] or message
        lost = _NO_SUCH_IMAGE.search(why) or reason == "SignatureValidationFailed"
        return Diagnosis(
            "ImagePull",
            f"Pod {view.name} cannot get its image {image} on node {view.node}: {_clip(why)}. Check image=…, and "
            "pull_secrets=… if the registry asks who you are.",
            "refuse" if lost else "wait",
        )
    if reason in (
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "PreStartHookError",
    ):
        return Diagnosis(
            "CreateConfig",
            f"The container of {view.stage} cannot be made in pod {view.name}: {_clip(message) or reason}. {_remedy(message)}",
            "wait" if _MAY_PASS.search(message) else "refuse",
        )
    return None


def _remedy(message: str) -> str:
    if "runAsNonRoot" in message:
        return (
            "Build the image with a numeric USER other than 0 (images/stage.Dockerfile has 10001), or let its Pod say "
            "security={'runAsUser': …}."
        )
    if "not found" in message:
        return f"Create {_quoted(message) or 'it'} in the pod's namespace, or correct its name in env, volumes or the template."
    return "Correct the Pod's settings or the image."


def _unmounted(view: _PodView) -> Diagnosis | None:
    event = view.event("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "NetworkNotReady")
    if event is None:
        return None
    message = event.get("message") or ""
    missing = event["reason"] == "FailedMount" and "not found" in message
    return Diagnosis(
        "CreateConfig",
        f"Pod {view.name} of {view.stage} cannot be set up on node {view.node} ({event['reason']}): {_clip(message)}. "
        + (_remedy(message.rpartition(" : ")[2]) if missing else "The kubelet tries again."),
        "refuse" if missing and _count(event) >= _MOUNTS_TRIED else "wait",
    )


def _unscheduled(view: _PodView) -> Diagnosis | None:
    scheduled = view.condition("PodScheduled", "False") or {}
    message = scheduled.get("message") or ""
    if view.gates or scheduled.get("reason") == "SchedulingGated":
        kueue = any("kueue" in gate for gate in view.gates)
        who = (
            f"Kueue to admit it (queue {view.queue or 'unknown'})"
            if kueue
            else f"its scheduling gates ({', '.join(view.gates) or 'unknown'})"
        )
        why = f": {_clip(message)}" if message and kueue and "gate" not in message else ""
        return Diagnosis(
            "Gated",
            f"Pod {view.name} of {view.stage} waits for {who}{why}; no node is asked before that.",
            "wait",
        )
    if not scheduled:
        return None
    claim = re.search(r'persistentvolumeclaim "([^"]+)" not found', message)
    if claim:
        return Diagnosis(
            "CreateConfig",
            f"Pod {view.name} of {view.stage} mounts the claim {claim[1]!r}, which does not exist in its namespace: create it, or "
            "correct volumes=….",
            "refuse",
        )
    scaling = view.event("TriggeredScaleUp", "NotTriggerScaleUp")
    grows = f" The autoscaler: {_clip(scaling['message'])}." if scaling else ""
    return Diagnosis(
        "Unschedulable",
        f"No node can take pod {view.name} of {view.stage} (it asks for {view.asks}): {_clip(message).rstrip('.')}.{grows} Ask for less, "
        "correct node_selector, tolerations or affinity, or wait for a node.",
        "wait",
    )


# Refused calls ----------------------------------------------------------------------------------------------------------


def _forbidden(message: str, doing: str) -> Diagnosis:
    rbac = re.search(
        r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
        r'(?: in the namespace "(?P<namespace>[^"]+)")?',
        message,
    )
    if rbac:
        where = f"in namespace {rbac['namespace']}" if rbac["namespace"] else "in the whole cluster"
        return Diagnosis(
            "Forbidden",
            f"{rbac['user'] or 'Nobody'} may not {rbac['verb']} {rbac['resource']} {where} (tried: {doing}): bind it to a Role that grants "
            f"verb {rbac['verb']!r} on {rbac['resource']!r} there; docs/kubernetes/role.yaml grants just what Pod needs.",
            "refuse",
        )
    quota = re.search(r"exceeded quota: ([^,]+), requested: (\S+), used: (\S+), limited: (\S+)", message)
    if quota:
        asked, limit = _amounts(quota[2]), _amounts(quota[4])
        never = [name for name in asked if name in limit and asked[name] > limit[name]]
        end = (
            "It can never fit: ask for less, or have the quota raised."
            if never
            else "It waits until others have ended; ask for less to start sooner."
        )
        return Diagnosis(
            "QuotaExceeded",
            f"Quota {quota[1]!r} is full (tried: {doing}; asked for {quota[2]}, in use {quota[3]}, limit {quota[4]}). {end}",
            "refuse" if never else "wait",
        )
    # The account "default" of a new namespace, and its token, are created a moment after the namespace.
    if re.search(r"service account [^ ]*/default\b|No API token found", message):
        return Diagnosis(
            "CreateConfig", f"The namespace is not ready yet (tried: {doing}): {_clip(message)}.", "wait"
        )
    if "because it is being terminated" in message:
        return Diagnosis(
            "NoNamespace", f"The namespace is being deleted (tried: {doing}): {_clip(message)}.", "retry"
        )
    for found, advice in (
        (r"service account [^ ]*/([^ :]+)", "create it, or correct service_account=…"),
        (r"PriorityClass with name (\S+)", "create it, or correct priority_class=…"),
        (r'RuntimeClass "([^"]+)"', "create it, or correct runtime_class=…"),
    ):
        if named := re.search(found, message):
            return Diagnosis(
                "CreateConfig",
                f"{named[1]!r} does not exist in the cluster (tried: {doing}): {advice}.",
                "refuse",
            )
    return _invalid(message, doing)


def _invalid(message: str, doing: str) -> Diagnosis:
    message = re.sub(
        r": spec: Forbidden: pod updates may not.*",
        ": pod updates may not change its spec",
        message,
        flags=re.DOTALL,
    )
    message = re.sub(r",? ?error found in #\d+ byte.*", "", message, flags=re.DOTALL)
    failed = re.search(r"failed quota: ([^:]+): must specify ([\w.,/-]+)", message)
    if failed:
        advice = f"quota {failed[1]!r} wants {failed[2]} of every pod: set cpu=…, memory=…, cpu_limit=… or memory_limit=…"
    elif "violates PodSecurity" in message:
        advice = "loosen nothing that the defaults of Pod set (security=…, pod_template=…), or use another namespace"
    else:
        advice = "correct the Pod's settings or its pod_template"
    return Diagnosis(
        "Invalid",
        f"The API server does not accept it (tried: {doing}): {_clip(message)}. So {advice}.",
        "refuse",
    )


def _amounts(text: str) -> dict[str, float]:
    """The numbers in ``pods=1,requests.cpu=500m``; a value that is no quantity is left out."""
    amounts = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        with suppress(ValueError):
            amounts[name] = parse_quantity(value)
    return amounts


# Texts ------------------------------------------------------------------------------------------------------------------

_LONGEST = 600  # characters of a foreign message that one of our sentences quotes


def _clip(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _quoted(text: str) -> str:
    found = re.search(r'"([^"]+)"', text)
    return found[1] if found else ""


def _count(event: Mapping[str, Any]) -> int:
    return int(event.get("count") or (event.get("series") or {}).get("count") or 1)


def _last_words(ended: Mapping[str, Any]) -> str:
    """The last message of a container: the error in the receipt that the entry point left, or the last line of its log."""
    text = (ended.get("message") or "").strip()
    with suppress(ValueError, TypeError, AttributeError):
        receipt = json.loads(text)
        text = (receipt.get("error") or {}).get("message") or receipt.get("summary") or ""
    lines = [line for line in text.splitlines() if line.strip()]
    return f": {_clip(re.sub(r'^(DEBUG|INFO|WARNING|ERROR|CRITICAL) ', '', lines[-1]))}" if lines else ""


def _message(body: Mapping[str, Any] | str) -> str:
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError:
            return str(body)
    return str(body.get("message") or "") if isinstance(body, Mapping) else str(body)
