"""What lies in a namespace of this package's, and what of it may go: behind ``python -m lepton_airflow pods ls|sweep``.

A task removes its own pod and Secret. What stays is of tasks that nobody could stop in time: Airflow promises no last word
to a task whose worker or triggerer died. So the judgement here is Airflow's database, where there is one: a pod whose task
instance has ended is wanted by nobody.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lepton_airflow.pods import IDENTITY, ORPHANED_S, RUN_KEY, SETTLED, STAGE
from lepton_airflow.pods.cluster import Cluster
from lepton_airflow.pods.diagnosis import diagnose
from lepton_airflow.pods.lifecycle import ended, leaving, note, seconds
from lepton_airflow.pods.manifest import secret_name
from lepton_airflow.pods.task_state import ENDED, Task, task_states


@dataclass(frozen=True)
class Item:
    """One pod or Secret of this package's.

    :ivar thing: it as the API server's JSON.
    :ivar why: why it may go, in words; empty while it is needed, or while nobody knows.
    :ivar stays: why it does not, in words.
    """

    kind: str  # pod, secret
    thing: Mapping[str, Any]
    age_s: float
    state: str
    reason: str
    why: str
    stays: str = ""

    @property
    def name(self) -> str:
        """Its name in the namespace."""
        return str(self.thing["metadata"]["name"])

    @property
    def owner(self) -> str:
        """The task instance and try that it is for, in words; of a Secret its run key."""
        who = identity(self.thing)
        if not who:
            return f"run key {self.thing['metadata'].get('labels', {}).get(RUN_KEY, '?')}"
        mapped = f"[{who['map_index']}]" if who.get("map_index", -1) >= 0 else ""
        return f"{who['dag_id']}.{who['task_id']}{mapped} {who['run_id']} try {who['try_number']}"


def inventory(
    cluster: Cluster, deployment: str, *, older_than_s: float | None = None, now: float
) -> list[Item]:
    """All pods and Secrets of this package's in the cluster's namespace, oldest first, judged.

    :param deployment: name of this Airflow (``[lepton] deployment``); pods of another one are not asked about here.
    :param older_than_s: age from which a pod goes that no Airflow here knows [seconds]; None: never.
    :param now: Unix time.
    """
    pods, secrets = cluster.everything()
    ours = [who for pod in pods if (who := identity(pod)).get("deployment") == deployment]
    states = task_states(
        {_task(who) for who in ours}
    )  # asked after the pods, so that none is younger than its answer
    items = [_pod(pod, states, deployment, older_than_s, now) for pod in pods]
    used = {secret_name(pod) for pod in pods}
    items += [_secret(secret, used, now) for secret in secrets]
    return sorted(items, key=lambda item: -item.age_s)


def sweep(cluster: Cluster, items: Iterable[Item]) -> list[Item]:
    """Delete what may go, if it still is as it was seen; returns what is gone."""
    return [
        item
        for item in items
        if item.why and (cluster.delete if item.kind == "pod" else cluster.delete_secret)(item.thing)
    ]


def identity(thing: Mapping[str, Any]) -> dict[str, Any]:
    """Which task instance a pod is for; empty where it does not say."""
    with suppress(ValueError):
        found = json.loads(note(thing, IDENTITY))
        if isinstance(found, dict) and {"deployment", "dag_id", "task_id", "run_id", "try_number"} <= set(
            found
        ):
            return found
    return {}


def _pod(
    pod: Mapping[str, Any],
    states: Mapping[Task, str],
    deployment: str,
    older_than_s: float | None,
    now: float,
) -> Item:
    age_s = now - seconds(pod["metadata"]["creationTimestamp"])
    found = diagnose(pod)
    phase = (pod.get("status") or {}).get("phase") or "Unknown"
    state = "Leaving" if leaving(pod) else "Settled" if note(pod, SETTLED) else phase
    reason = found.reason if found and not leaving(pod) else ""
    who = identity(pod)
    known = states.get(_task(who)) if who and who["deployment"] == deployment else None
    why = stays = ""
    if leaving(pod):
        stays = "it is being deleted"
    elif note(pod, SETTLED):
        why = "its end was taken into account"
    elif known in ENDED:
        why = f"its task is {known} in Airflow"
    elif known is not None:
        stays = f"its task is {known} in Airflow"
    elif older_than_s is not None and age_s >= older_than_s:
        still = "has ended" if ended(pod) is not None else "has not ended"
        why = f"no Airflow here knows its task, and it {still} after {age_s:.0f} s"
    else:
        stays = "no Airflow here knows its task, so only --older-than-s lets it go"
    return Item("pod", pod, age_s, state, reason, why, stays)


def _secret(secret: Mapping[str, Any], used: set[str | None], now: float) -> Item:
    meta = secret["metadata"]
    age_s = now - seconds(meta["creationTimestamp"])
    owned = bool(meta.get("ownerReferences")) or meta["name"] in used
    why = "it has no pod" if not owned and age_s >= ORPHANED_S else ""
    stays = "it goes with its pod" if owned else f"its pod may still come, until it is {ORPHANED_S:.0f} s old"
    return Item("secret", secret, age_s, "Owned" if owned else "Ownerless", "", why, "" if why else stays)


def _task(who: Mapping[str, Any]) -> Task:
    return who["dag_id"], who["task_id"], who["run_id"], int(who.get("map_index", -1))


def table(items: Sequence[Item], gone: Sequence[Item] = ()) -> list[str]:
    """The items as lines: kind and name, age, state and reason, stage, owner, and why it is gone, may go, or stays."""
    rows = [
        [
            f"{item.kind}/{item.name}",
            _age(item.age_s),
            f"{item.state} {item.reason}".strip(),
            item.thing["metadata"].get("labels", {}).get(STAGE, ""),
            item.owner,
            f"{'deleted' if item in gone else 'may go'}: {item.why}" if item.why else f"stays: {item.stays}",
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
