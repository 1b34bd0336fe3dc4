"""Which pods and Secrets of this package a namespace has, and which of them may go: ``python -m lepton_airflow pods``.

A task deletes its own pod and Secret. Some are left by tasks whose worker or triggerer died, because Airflow then calls
nothing of the task any more. Airflow's database, where there is one, decides about those: a pod whose task instance has
ended is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lepton_airflow.pods import IDENTITY, ORPHANED_S, RUN_KEY, SETTLED, STAGE, STORE, PodJson
from lepton_airflow.pods.cluster import Cluster
from lepton_airflow.pods.diagnosis import diagnose
from lepton_airflow.pods.lifecycle import annotation, is_terminating, termination, unix_time
from lepton_airflow.pods.manifest import secret_name
from lepton_airflow.pods.task_state import ENDED, TaskKey, states_in_database


@dataclass(frozen=True)
class Item:
    """A pod or Secret of this package.

    :ivar kind: ``pod`` or ``secret``.
    :ivar thing: what the API server sends for it.
    :ivar reason: the reason of a pod's diagnosis, such as ``OOM``.
    :ivar why: why it may go, in words; empty if it must stay.
    :ivar stays: why it must stay, in words; empty if it may go.
    """

    kind: str
    thing: Mapping[str, Any]
    age_s: float
    state: str
    reason: str
    why: str
    stays: str = ""

    @property
    def name(self) -> str:
        """The name of the pod or Secret."""
        return str(self.thing["metadata"]["name"])

    @property
    def owner(self) -> str:
        """The task instance and try that a pod belongs to, in words; for a Secret its run key."""
        who = identity(self.thing)
        if not who:
            return f"run key {self.thing['metadata'].get('labels', {}).get(RUN_KEY, '?')}"
        mapped = f"[{who['map_index']}]" if who.get("map_index", -1) >= 0 else ""
        return f"{who['dag_id']}.{who['task_id']}{mapped} {who['run_id']} try {who['try_number']}"


def inventory(
    cluster: Cluster, deployment: str, store_id: str, *, older_than_s: float | None = None, now: float
) -> list[Item]:
    """All pods and Secrets of this package in the cluster's namespace, oldest first, and whether each may go.

    :param deployment: name of this Airflow (``[lepton] deployment``); its database knows nothing of pods of another one.
    :param store_id: what tells its store from others; what belongs to another store stays.
    :param older_than_s: age from which a pod may go whose task this Airflow does not know [seconds]; None: never.
    :param now: Unix time.
    """
    pods, secrets = cluster.list_all()
    ours = [
        who
        for pod in pods
        if _store_of(pod) == store_id and (who := identity(pod)).get("deployment") == deployment
    ]
    # Read after the pods were listed: an older state could be that of an earlier try, and condemn the pod of a newer one.
    states = states_in_database({_task(who) for who in ours})
    items = [
        _foreign("pod", pod, now)
        if _store_of(pod) not in ("", store_id)
        else _pod(pod, states, deployment if _store_of(pod) else None, older_than_s, now)
        for pod in pods
    ]
    used = {secret_name(pod) for pod in pods}
    items += [
        _foreign("secret", secret, now)
        if _store_of(secret) not in ("", store_id)
        else _secret(secret, used, now)
        for secret in secrets
    ]
    return sorted(items, key=lambda item: -item.age_s)


def sweep(cluster: Cluster, items: Iterable[Item]) -> list[Item]:
    """Delete the items that may go and have not changed since they were listed; returns those that were deleted."""
    return [
        item
        for item in items
        if item.why and (cluster.delete if item.kind == "pod" else cluster.delete_secret)(item.thing)
    ]


def identity(thing: Mapping[str, Any]) -> dict[str, Any]:
    """The task instance that a pod belongs to, from its annotation; empty where it has none."""
    with suppress(ValueError):
        found = json.loads(annotation(thing, IDENTITY))
        if isinstance(found, dict) and {"deployment", "dag_id", "task_id", "run_id", "try_number"} <= set(
            found
        ):
            return found
    return {}


def _store_of(thing: Mapping[str, Any]) -> str:
    """The id of the store that a pod or Secret belongs to; empty for those of versions that wrote none."""
    return str((thing["metadata"].get("labels") or {}).get(STORE, ""))


def _foreign(kind: str, thing: Mapping[str, Any], now: float) -> Item:
    age_s = now - unix_time(thing["metadata"]["creationTimestamp"])
    state = (thing.get("status") or {}).get("phase") or "Unknown"
    return Item(kind, thing, age_s, state, "", "", "it belongs to another installation, with another store")


def _pod(
    pod: PodJson,
    states: Mapping[TaskKey, str],
    deployment: str | None,
    older_than_s: float | None,
    now: float,
) -> Item:
    age_s = now - unix_time(pod["metadata"]["creationTimestamp"])
    diagnosis = diagnose(pod)
    phase = (pod.get("status") or {}).get("phase") or "Unknown"
    state = "Terminating" if is_terminating(pod) else "Settled" if annotation(pod, SETTLED) else phase
    reason = diagnosis.reason if diagnosis and not is_terminating(pod) else ""
    who = identity(pod)
    task_state = states.get(_task(who)) if who and who["deployment"] == deployment else None
    why = stays = ""
    if is_terminating(pod):
        stays = "it is being deleted"
    elif annotation(pod, SETTLED):
        why = "its task has used its result"
    elif task_state in ENDED:
        why = f"its task is {task_state} in Airflow"
    elif task_state is not None:
        stays = f"its task is {task_state} in Airflow"
    elif older_than_s is not None and age_s >= older_than_s:
        still = "has ended" if termination(pod) is not None else "has not ended"
        why = f"no Airflow here knows its task, and it {still} after {age_s:.0f} s"
    else:
        stays = "no Airflow here knows its task, so only --older-than-s lets it go"
    return Item("pod", pod, age_s, state, reason, why, stays)


def _secret(secret: Mapping[str, Any], used: set[str | None], now: float) -> Item:
    meta = secret["metadata"]
    age_s = now - unix_time(meta["creationTimestamp"])
    owned = bool(meta.get("ownerReferences")) or meta["name"] in used
    why = "it has no pod" if not owned and age_s >= ORPHANED_S else ""
    stays = "it goes with its pod" if owned else f"its pod may still come, until it is {ORPHANED_S:.0f} s old"
    return Item("secret", secret, age_s, "Owned" if owned else "Ownerless", "", why, "" if why else stays)


def _task(who: Mapping[str, Any]) -> TaskKey:
    return who["dag_id"], who["task_id"], who["run_id"], int(who.get("map_index", -1))


def table(items: Sequence[Item], deleted: Sequence[Item] = ()) -> list[str]:
    """The items as lines: kind and name, age, state and reason, stage, owner, and why it was deleted, may go, or stays."""
    rows = [
        [
            f"{item.kind}/{item.name}",
            _age(item.age_s),
            f"{item.state} {item.reason}".strip(),
            item.thing["metadata"].get("labels", {}).get(STAGE, ""),
            item.owner,
            f"{'deleted' if item in deleted else 'may go'}: {item.why}"
            if item.why
            else f"stays: {item.stays}",
        ]
        for item in items
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _age(age_s: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if age_s >= size:
            return f"{age_s / size:.0f} {unit}"
    return f"{max(age_s, 0):.0f} s"
