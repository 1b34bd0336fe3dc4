"""Why a pod does not run, or did not end well, and whether to wait, submit again, retry or give up.

Pure functions over what the API server sends (plain dicts, its camelCase), so they are tested on recorded answers. Statuses
differ between versions of Kubernetes: from 1.26 on a pod that was disrupted says so in a condition (``DisruptionTarget``),
before that only an event does, or nothing; the kubelet of 1.20 drops the containers of a pod that it evicts.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from lepton_airflow.errors import (
    DO_NOT_RETRY,
    FAILED,
    PREEMPTED,
    OutOfMemory,
    PodFailed,
    RunnerError,
)

Then = Literal["wait", "resubmit", "retry", "refuse"]


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a pod.

    :ivar reason: one word for it, the same in every version of Kubernetes.
    :ivar sentence: what failed, on which value, what was expected, what to do next.
    :ivar then: ``wait`` (it may still come right, within its clock), ``resubmit`` (in the same try), ``retry`` (fail this
        try) or ``refuse`` (fail at once: the next try would end the same way).
    """

    reason: str
    sentence: str
    then: Then


def diagnose(
    pod: Mapping[str, Any] | None, events: Sequence[Mapping[str, Any]] = (), container: str = "stage"
) -> Diagnosis | None:
    """Say what is wrong with a pod; None while nothing is, and when the stage's container ended with exit code 0.

    :param pod: the pod as the API server sends it; None: it is gone.
    :param events: the events about it, oldest first.
    :param container: name of the container that runs the stage; others in the pod only matter before it starts.
    """
    seen = _Seen.of(pod, events, container)
    if seen.ended and seen.ended.get("exitCode") == 0:
        return None
    for look in (_out_of_memory, _refused_by_the_stage, _disrupted, _not_by_this_node, _failed, _not_started):
        if found := look(seen):
            return found
    return None


def refused(status: int, body: Mapping[str, Any] | str, doing: str) -> Diagnosis:
    """Say why the API server refused a call.

    :param status: its HTTP status; 0: it did not answer.
    :param body: its answer, a ``Status`` as dict or text, or any other text.
    :param doing: what was tried, such as ``create pod train-1 in namespace ml``.
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
    """Turn a wait that is over its limit into a failure that still says what was waited for.

    :param clock: name of the setting that ended it, such as ``schedule_timeout_s``.
    :param limit_s: its value [seconds].
    :param waiting: what was wrong meanwhile, if anything was.
    """
    told = f"{clock}={limit_s:g} seconds are over"
    if waiting is None:
        return Diagnosis("Deadline", f"{told}: raise {clock}, or make it quicker.", "retry")
    return replace(waiting, sentence=f"{waiting.sentence} {told}.", then="retry")


def spent(diagnosis: Diagnosis, limit: int) -> Diagnosis:
    """Turn what is submitted again into a failure once it happened more than ``limit`` times in one try."""
    times = f"It was submitted again {limit} times in this try, as preemption_limit={limit} allows"
    advice = "find out who takes its pods away, give it a priority_class, or raise the limit"
    return replace(diagnosis, sentence=f"{diagnosis.sentence} {times}: {advice}.", then="retry")


def error_of(diagnosis: Diagnosis) -> RunnerError:
    """The error to fail the task with: its exit code says whether Airflow may retry, its ``reason`` why it failed."""
    if diagnosis.reason == "OOM":
        return OutOfMemory(diagnosis.sentence)
    code = {"refuse": DO_NOT_RETRY, "resubmit": PREEMPTED}.get(diagnosis.then, FAILED)
    return PodFailed(diagnosis.sentence, diagnosis.reason, code)


def told(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """Events as lines for a log, oldest first."""
    return [
        f"{e.get('type', '')} {e.get('reason', '')}"
        + (f" ({_count(e)} times)" if _count(e) > 1 else "")
        + f": {(e.get('message') or '').strip()}"
        for e in events
    ]


def quantity(text: str) -> float:
    """The number that a Kubernetes quantity such as ``1500m``, ``64Mi`` or ``2`` stands for; ValueError for other text."""
    match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)([numkMGTPE]|[KMGTPE]i)?", text.strip())
    if match is None:
        raise ValueError(text)
    suffix = match[2] or ""
    power = "num kMGTPE".index(suffix[0]) - 3 if suffix else 0
    return float(match[1]) * (1024.0 if suffix.endswith("i") else 1000.0) ** power


# What is seen ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """A pod's answer, taken apart once."""

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
    def of(cls, pod: Mapping[str, Any] | None, events: Sequence[Mapping[str, Any]], container: str) -> _Seen:
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
            state = stage["lastState"]  # a kubelet that was restarted, or a restartPolicy other than ours
        return cls(
            exists=pod is not None,
            name=f"{meta.get('namespace', 'default')}/{meta.get('name', '?')}",
            stage=labels.get("lepton-airflow/stage", container),
            node=spec.get("nodeName") or "",
            phase=status.get("phase") or "",
            reason=status.get("reason") or "",
            message=status.get("message") or "",
            deleted=bool(meta.get("deletionTimestamp")),
            conditions={c["type"]: c for c in status.get("conditions") or ()},
            spec=next((c for c in spec.get("containers") or () if c.get("name") == container), {}),
            gates=[g["name"] for g in spec.get("schedulingGates") or ()],
            queue=labels.get("kueue.x-k8s.io/queue-name", ""),
            stage_state=state,
            started="running" in state or "terminated" in state,
            init=status.get("initContainerStatuses") or (),
            events=[e for e in events if not uid or (e.get("involvedObject") or {}).get("uid", uid) == uid],
        )

    @property
    def ended(self) -> Mapping[str, Any] | None:
        """How the stage's container ended."""
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


# Looks, in the order in which they count -------------------------------------------------------------------------------


def _out_of_memory(seen: _Seen) -> Diagnosis | None:
    ends = [(seen.stage, seen.spec, seen.ended)]
    ends += [(f"init container {c['name']}", {}, (c.get("state") or {}).get("terminated")) for c in seen.init]
    for who, spec, ended in ends:
        if ended and ended.get("reason") == "OOMKilled":
            limit = ((spec.get("resources") or {}).get("limits") or {}).get("memory")
            return Diagnosis(
                "OOM",
                f"{who} used more memory than {f'its limit of {limit}' if limit else 'it was given'} in pod {seen.name} and was "
                f"killed (OOMKilled, exit code {ended.get('exitCode')}): raise memory=… of its Pod, or lower what the stage "
                "reads at once.",
                "retry",
            )
    return None


def _refused_by_the_stage(seen: _Seen) -> Diagnosis | None:
    """Exit code 80 counts also where the pod was disrupted as it ended: another try would say the same."""
    if not seen.ended or seen.ended.get("exitCode") != DO_NOT_RETRY:
        return None
    return Diagnosis(
        "UserCode",
        f"{seen.stage} refused its input or configuration in pod {seen.name} (exit code 80){_last_words(seen.ended)}.",
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


def _disrupted(seen: _Seen) -> Diagnosis | None:
    """Taken away by the cluster or by somebody: no code is to blame, so a new pod may go on from its checkpoint."""
    reason = message = ""
    target = seen.condition("DisruptionTarget", "True")
    workload = seen.condition("TerminationTarget", "True")  # Kueue stops a pod that is to make room
    event = seen.event(*_BY_EVENT)
    if seen.reason in _BY_REASON:  # the kubelet's own word; its condition is the same for all that it ends
        reason, message = _BY_REASON[seen.reason], seen.message
    elif target:
        reason, message = (
            _BY_CONDITION.get(target.get("reason") or "", "Evicted"),
            target.get("message") or "",
        )
    elif workload:
        reason, message = "Preempted", workload.get("message") or ""
    elif event and (seen.deleted or not seen.exists):
        reason, message = _BY_EVENT[event["reason"]], event.get("message") or ""
    elif (seen.ended or {}).get("reason") == "ContainerStatusUnknown" and not seen.deleted:
        reason, message = "NodeLost", (seen.ended or {}).get("message") or ""
    if reason == "NodeLost" and not (target or seen.deleted or seen.phase == "Failed" or not seen.exists):
        return _node_away(seen)
    if reason:
        if re.search(r"exceed(?:s|ed) .*limit", message):  # its own doing: the same would happen again
            return Diagnosis(
                "Evicted",
                f"{seen.stage} wrote more to disk than pod {seen.name} may and was evicted ({_clip(message)}): give the volume or "
                "ephemeral-storage a higher limit, or write less to its work directory.",
                "retry",
            )
        why = f" ({_clip(message)})" if message else ""
        return Diagnosis(
            reason,
            f"Pod {seen.name} of {seen.stage} {_HAPPENED[reason]} node {seen.node or '(unknown)'}{why}.",
            "resubmit",
        )
    if not seen.exists or seen.deleted:
        return Diagnosis(
            "Deleted",
            f"Pod {seen.name} of {seen.stage} was deleted, and not by this task: by hand, or by a drain or eviction, which clusters "
            "before 1.26 do not tell apart. To stop a task, mark it failed in Airflow.",
            "resubmit",
        )
    if seen.ended and seen.ended.get("exitCode") == PREEMPTED:
        return Diagnosis(
            "Preempted",
            f"{seen.stage} was asked to stop in pod {seen.name} and kept what it had (exit code 75).",
            "resubmit",
        )
    ready = seen.condition("Ready", "False")
    if (
        "running" in seen.stage_state
        and seen.phase in ("Running", "Unknown")
        and ready
        and not ready.get("reason")
    ):
        return _node_away(seen)  # the node controller took Ready away; the kubelet would have said why
    return None


def _node_away(seen: _Seen) -> Diagnosis:
    return Diagnosis(
        "NodeLost",
        f"Node {seen.node or '(unknown)'} of pod {seen.name} does not answer; {seen.stage} may still run there, so it is waited for "
        "until the cluster gives the node up (five minutes by default).",
        "wait",
    )


_ELSEWHERE = re.compile(
    r"OutOf.+|UnexpectedAdmissionError|NodeAffinity|NodePorts|TopologyAffinityError|PodOSNotSupported"
)


def _not_by_this_node(seen: _Seen) -> Diagnosis | None:
    """The kubelet refused what the scheduler had sent: the scheduler's picture was old, so it may choose again."""
    if seen.phase != "Failed" or seen.started or not _ELSEWHERE.fullmatch(seen.reason):
        return None
    return Diagnosis(
        "NodeRefused",
        f"Node {seen.node or '(unknown)'} did not take pod {seen.name} ({seen.reason}: {_clip(seen.message)}).",
        "resubmit",
    )


def _failed(seen: _Seen) -> Diagnosis | None:
    if seen.reason == "DeadlineExceeded":
        return Diagnosis(
            "Deadline",
            f"Pod {seen.name} of {seen.stage} ran for longer than it may and was ended: raise run_timeout_s, or let the stage do "
            "less.",
            "retry",
        )
    if not seen.started:
        for c in seen.init:
            ended = (c.get("state") or {}).get("terminated")
            if ended and ended.get("exitCode"):
                return _cannot_begin(seen, ended) or Diagnosis(
                    "InitContainer",
                    f"Init container {c['name']} failed in pod {seen.name} with exit code {ended['exitCode']}"
                    f"{_last_words(ended)}, so {seen.stage} did not start.",
                    "retry",
                )
    if seen.ended:
        return _cannot_begin(seen, seen.ended) or _exit_code(seen, seen.ended)
    if seen.phase == "Failed":
        return Diagnosis(
            "Failed",
            f"Pod {seen.name} of {seen.stage} failed and its node does not say how its container ended"
            f" ({': '.join(filter(None, (seen.reason, _clip(seen.message)))) or 'no reason given'}); look at the events below.",
            "retry",
        )
    return None


def _cannot_begin(seen: _Seen, ended: Mapping[str, Any]) -> Diagnosis | None:
    """The program itself could not be started: an image or a command that does not fit."""
    said = ended.get("message") or ""
    if "exec format error" in said:
        fix = f"its image {seen.spec.get('image', '')} is built for another kind of CPU than node {seen.node}'s: build it for that one, or set node_selector"
    elif re.search(r"No module named '?lepton_airflow", said):
        fix = "its image has no lepton_airflow: pip install lepton-airflow in it (--no-deps, fsspec and psutil are enough for a stage of your own)"
    elif ended.get("reason") in ("StartError", "ContainerCannotRun") or ended.get("exitCode") in (126, 127):
        fix = "its command cannot be started: set python=… of its Pod to an interpreter that is in the image"
    elif ended.get("exitCode") == 2:
        fix = "its command line was not understood: the lepton_airflow in the image is another version than the worker's, so build the image again"
    else:
        return None
    return Diagnosis(
        "CreateConfig", f"{seen.stage} did not begin in pod {seen.name}{_last_words(ended)}: {fix}.", "refuse"
    )


def _exit_code(seen: _Seen, ended: Mapping[str, Any]) -> Diagnosis:
    code = int(ended.get("exitCode") or 0)
    if code in (128 + signal.SIGKILL, 128 + signal.SIGTERM):
        return Diagnosis(
            "Killed",
            f"{seen.stage} was ended from outside in pod {seen.name} (exit code {code}); nobody deleted the pod, and it was within "
            f"its memory limit. If nobody killed its process, node {seen.node} itself ran out of memory: ask for what it really "
            "needs (memory=…).",
            "retry",
        )
    how = f"exit code {code}"
    with suppress(ValueError):
        how += f", {signal.Signals(code - 128).name}" if code > 128 else ""
    return Diagnosis(
        "UserCode",
        f"{seen.stage} failed in pod {seen.name} ({how}){_last_words(ended)}; its last lines are in the log.",
        "retry",
    )


# Pulls that no waiting mends; all others (a registry that is away, too many requests) may still come right.
_NO_SUCH_IMAGE = re.compile(
    r"not found|does not exist|manifest unknown|no match for platform|no matching manifest|unauthorized|denied|forbidden"
    r"|authorization failed|authentication required|no basic auth|invalid reference|no such host|name unknown",
    re.IGNORECASE,
)
_MAY_PASS = re.compile(
    r"timed? ?out|deadline exceeded|is reserved for|temporar|connection refused|try again", re.IGNORECASE
)
_MOUNTS_TRIED = 3  # the kubelet's view of a new Secret may be late; the third look is seconds after the first


def _not_started(seen: _Seen) -> Diagnosis | None:
    if seen.started or seen.phase not in ("", "Pending"):
        return None
    for state in [*((c.get("state") or {}) for c in seen.init), seen.stage_state]:
        waiting = state.get("waiting") or {}
        if found := _waits(seen, waiting.get("reason") or "", waiting.get("message") or ""):
            return found
    return _unscheduled(seen) or _unmounted(seen)


def _waits(seen: _Seen, reason: str, message: str) -> Diagnosis | None:
    image = seen.spec.get("image", "")
    if reason in ("InvalidImageName", "ErrImageNeverPull"):
        return Diagnosis(
            "ImagePull",
            f"Pod {seen.name} cannot get its image {image}: {_clip(message)}. Correct image=…, or load it on the nodes.",
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
                for e in reversed(seen.events)
                if (e.get("message") or "").startswith("Failed to pull")
            ),
            "",
        )
        why = pull.rpartition(" desc = ")[2] or message
        lost = _NO_SUCH_IMAGE.search(why) or reason == "SignatureValidationFailed"
        return Diagnosis(
            "ImagePull",
            f"Pod {seen.name} cannot get its image {image} on node {seen.node}: {_clip(why)}. Check image=…, and "
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
            f"The container of {seen.stage} cannot be made in pod {seen.name}: {_clip(message) or reason}. {_remedy(message)}",
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


def _unmounted(seen: _Seen) -> Diagnosis | None:
    event = seen.event("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "NetworkNotReady")
    if event is None:
        return None
    message = event.get("message") or ""
    missing = event["reason"] == "FailedMount" and "not found" in message
    return Diagnosis(
        "CreateConfig",
        f"Pod {seen.name} of {seen.stage} cannot be set up on node {seen.node} ({event['reason']}): {_clip(message)}. "
        + (_remedy(message.rpartition(" : ")[2]) if missing else "The kubelet tries again."),
        "refuse" if missing and _count(event) >= _MOUNTS_TRIED else "wait",
    )


def _unscheduled(seen: _Seen) -> Diagnosis | None:
    scheduled = seen.condition("PodScheduled", "False") or {}
    message = scheduled.get("message") or ""
    if seen.gates or scheduled.get("reason") == "SchedulingGated":
        kueue = any("kueue" in gate for gate in seen.gates)
        who = (
            f"Kueue to admit it (queue {seen.queue or 'unknown'})"
            if kueue
            else f"its scheduling gates ({', '.join(seen.gates) or 'unknown'})"
        )
        why = f": {_clip(message)}" if message and kueue and "gate" not in message else ""
        return Diagnosis(
            "Gated",
            f"Pod {seen.name} of {seen.stage} waits for {who}{why}; no node is asked before that.",
            "wait",
        )
    if not scheduled:
        return None
    claim = re.search(r'persistentvolumeclaim "([^"]+)" not found', message)
    if claim:
        return Diagnosis(
            "CreateConfig",
            f"Pod {seen.name} of {seen.stage} mounts the claim {claim[1]!r}, which does not exist in its namespace: create it, or "
            "correct volumes=….",
            "refuse",
        )
    scaling = seen.event("TriggeredScaleUp", "NotTriggerScaleUp")
    grows = f" The autoscaler: {_clip(scaling['message'])}." if scaling else ""
    return Diagnosis(
        "Unschedulable",
        f"No node can take pod {seen.name} of {seen.stage} (it asks for {seen.asks}): {_clip(message).rstrip('.')}.{grows} Ask for less, "
        "correct node_selector, tolerations or affinity, or wait for a node.",
        "wait",
    )


# Calls that were refused ------------------------------------------------------------------------------------------------


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
    # In a new namespace the account "default" and its token come a moment after the namespace.
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
    """``pods=1,requests.cpu=500m`` as numbers; what is no quantity is left out."""
    amounts = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        with suppress(ValueError):
            amounts[name] = quantity(value)
    return amounts


# Words ------------------------------------------------------------------------------------------------------------------

_LONGEST = 600  # characters of somebody else's message in one of our sentences


def _clip(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _quoted(text: str) -> str:
    found = re.search(r'"([^"]+)"', text)
    return found[1] if found else ""


def _count(event: Mapping[str, Any]) -> int:
    return int(event.get("count") or (event.get("series") or {}).get("count") or 1)


def _last_words(ended: Mapping[str, Any]) -> str:
    """What the container said last: the error in the door's short receipt, or the last line of its log."""
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
