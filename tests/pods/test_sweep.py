from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest

from lepton_airflow.pods import IDENTITY, RUN_KEY, SETTLED, STORE, sweep
from lepton_airflow.pods.sweep import Item, inventory, table
from lepton_airflow.pods.task_state import TaskKey

NOW = 1_767_229_200.0  # 2026-01-01T01:00:00Z
IN_TIME, EARLIER = "2026-01-01T00:59:00Z", "2026-01-01T00:30:00Z"


class Listed:
    """A namespace as it was listed; remembers what is deleted, and refuses what has changed."""

    def __init__(self, pods: list[dict[str, Any]], secrets: list[dict[str, Any]], changed: str = "") -> None:
        self.pods, self.secrets, self.changed = pods, secrets, changed
        self.deleted: list[str] = []

    def list_all(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return copy.deepcopy(self.pods), copy.deepcopy(self.secrets)

    def delete(self, thing: Mapping[str, Any]) -> bool:
        if thing["metadata"]["name"] == self.changed:
            return False
        self.deleted.append(thing["metadata"]["name"])
        return True

    delete_secret = delete


def _pod(
    name: str = "train-1", created: str = IN_TIME, phase: str = "Running", **notes: str
) -> dict[str, Any]:
    who = {
        "deployment": "airflow",
        "dag_id": "retrain",
        "task_id": "train",
        "run_id": "r1",
        "map_index": 2,
        "try_number": 3,
    }
    return {
        "metadata": {
            "name": name,
            "namespace": "ml",
            "creationTimestamp": created,
            "labels": {RUN_KEY: "k" * 24, STORE: "ours", "lepton-airflow/stage": "TrainModel"},
            "annotations": {IDENTITY: json.dumps(who)} | {k.replace("_", "/"): v for k, v in notes.items()},
        },
        "spec": {
            "volumes": [{"name": "lepton", "secret": {"secretName": f"{name}-secret"}}],
            "containers": [],
        },
        "status": {"phase": phase},
    }


def _secret(name: str, created: str, owned: bool = False) -> dict[str, Any]:
    meta: dict[str, Any] = {"name": name, "creationTimestamp": created}
    meta["labels"] = {RUN_KEY: "k" * 24, STORE: "ours"}
    return {"metadata": meta | ({"ownerReferences": [{"kind": "Pod"}]} if owned else {})}


@pytest.fixture
def airflow_says(monkeypatch: pytest.MonkeyPatch) -> dict[TaskKey, str]:
    """What Airflow's database holds, by task instance; empty: there is none here."""
    states: dict[TaskKey, str] = {}
    monkeypatch.setattr(
        sweep, "states_in_database", lambda tasks: {t: states[t] for t in tasks & states.keys()}
    )
    return states


TASK: TaskKey = ("retrain", "train", "r1", 2)


def _judge(cluster: Listed, **options: Any) -> list[Item]:
    return inventory(cluster, "airflow", "ours", now=NOW, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "state", ["none", "scheduled", "queued", "running", "deferred", "up_for_retry", "restarting"]
)
@pytest.mark.parametrize("phase", ["Pending", "Running", "Succeeded", "Failed"])
def test_a_pod_whose_task_goes_on_stays_however_old(
    state: str, phase: str, airflow_says: dict[TaskKey, str]
) -> None:
    airflow_says[TASK] = state
    (item,) = _judge(Listed([_pod(created=EARLIER, phase=phase)], []), older_than_s=1)
    assert item.why == ""


@pytest.mark.parametrize("state", ["success", "failed", "skipped", "upstream_failed", "removed"])
def test_a_pod_whose_task_has_ended_may_go_at_once(state: str, airflow_says: dict[TaskKey, str]) -> None:
    airflow_says[TASK] = state
    (item,) = _judge(Listed([_pod()], []))
    assert item.why == f"its task is {state} in Airflow"
    assert item.owner == "retrain.train[2] r1 try 3"


def test_what_no_airflow_knows_goes_by_age_alone(airflow_says: dict[TaskKey, str]) -> None:
    airflow_says["retrain", "train", "another run", 2] = "failed"
    cluster = Listed([_pod(created=EARLIER)], [])
    assert [i.why for i in _judge(cluster)] == [""]
    assert [i.why for i in _judge(cluster, older_than_s=1801)] == [""]
    assert [i.why for i in _judge(cluster, older_than_s=1800)] == [
        "no Airflow here knows its task, and it has not ended after 1800 s"
    ]


def test_another_airflows_pod_is_not_judged_by_this_ones_database(airflow_says: dict[TaskKey, str]) -> None:
    airflow_says[TASK] = "failed"
    theirs = _pod()
    who = json.loads(theirs["metadata"]["annotations"][IDENTITY]) | {"deployment": "theirs"}
    theirs["metadata"]["annotations"][IDENTITY] = json.dumps(who)
    assert [i.why for i in _judge(Listed([theirs], []))] == [""]


def test_what_belongs_to_another_store_stays(airflow_says: dict[TaskKey, str]) -> None:
    airflow_says[TASK] = "failed"
    theirs, settled = _pod(), _pod("settled")
    settled["metadata"]["annotations"][SETTLED] = "yes"
    orphan = _secret("orphan", EARLIER)
    for thing in (theirs, settled, orphan):
        thing["metadata"]["labels"][STORE] = "theirs"
    items = _judge(Listed([theirs, settled], [orphan]), older_than_s=1)
    assert [item.why for item in items] == ["", "", ""]
    assert {item.stays for item in items} == {"it belongs to another installation, with another store"}


def test_a_pod_of_a_version_that_named_no_store_goes_by_age_alone(airflow_says: dict[TaskKey, str]) -> None:
    airflow_says[TASK] = "failed"
    old = _pod()
    del old["metadata"]["labels"][STORE]
    assert [i.why for i in _judge(Listed([old], []))] == [""]
    assert [bool(i.why) for i in _judge(Listed([old], []), older_than_s=1)] == [True]


def test_settled_pods_go_and_terminating_ones_are_left(airflow_says: dict[TaskKey, str]) -> None:
    settled, terminating = _pod("settled", phase="Succeeded"), _pod("terminating")
    settled["metadata"]["annotations"][SETTLED] = "done"
    terminating["metadata"]["deletionTimestamp"] = EARLIER
    airflow_says[TASK] = "failed"
    found = {i.name: (i.state, i.why) for i in _judge(Listed([settled, terminating], []), older_than_s=0)}
    assert found == {
        "settled": ("Settled", "its task has used its result"),
        "terminating": ("Terminating", ""),
    }


def test_secrets_without_a_pod_go_after_ten_minutes(airflow_says: dict[TaskKey, str]) -> None:
    secrets = [
        _secret("young", IN_TIME),
        _secret("old", EARLIER),
        _secret("owned", EARLIER, owned=True),
        _secret("train-1-secret", EARLIER),  # its pod is there, and was not yet made its owner
    ]
    cluster = Listed([_pod()], secrets)
    items = _judge(cluster)
    assert {i.name for i in items if i.why} == {"old"}
    assert [i.name for i in sweep.sweep(cluster, items)] == ["old"]  # type: ignore[arg-type]
    assert cluster.deleted == ["old"]


def test_what_changed_since_it_was_seen_is_not_deleted(airflow_says: dict[TaskKey, str]) -> None:
    airflow_says[TASK] = "failed"
    cluster = Listed([_pod("adopted-meanwhile"), _pod("train-1")], [], changed="adopted-meanwhile")
    gone = sweep.sweep(cluster, _judge(cluster))  # type: ignore[arg-type]
    assert [i.name for i in gone] == ["train-1"]


@pytest.mark.parametrize("annotation", ["", "no JSON", "[]", '{"dag_id": "retrain"}'])
def test_a_pod_that_says_nothing_of_its_task(annotation: str, airflow_says: dict[TaskKey, str]) -> None:
    pod = _pod()
    pod["metadata"]["annotations"][IDENTITY] = annotation
    (item,) = _judge(Listed([pod], []))
    assert item.owner == f"run key {'k' * 24}"
    assert item.why == ""


def test_the_table_names_age_state_owner_and_reason(airflow_says: dict[TaskKey, str]) -> None:
    pod = _pod(created=EARLIER, phase="Failed")
    pod["spec"]["containers"] = [{"name": "stage", "resources": {"limits": {"memory": "64Mi"}}}]
    pod["status"]["containerStatuses"] = [
        {"name": "stage", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    ]
    first, second = table(_judge(Listed([pod], [_secret("train-1-secret", IN_TIME, owned=True)])))
    assert first.split("  ")[0] == "pod/train-1"
    assert [cell.strip() for cell in first.split("  ")[1:] if cell.strip()] == [
        "30 min",
        "Failed OOM",
        "TrainModel",
        "retrain.train[2] r1 try 3",
        "stays: no Airflow here knows its task, so only --older-than-s lets it go",
    ]
    (old,) = _judge(Listed([_pod(created=EARLIER, phase="Failed")], []), older_than_s=60)
    assert "  may go: no Airflow here knows its task" in table([old])[0]
    assert "  deleted: no Airflow here knows its task" in table([old], [old])[0]
    assert [cell.strip() for cell in second.split("  ") if cell.strip()][:2] == [
        "secret/train-1-secret",
        "1 min",
    ]
