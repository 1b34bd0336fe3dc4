from __future__ import annotations

from typing import Any

import pytest

from lepton_airflow.pods import ADMITTED, LOCAL_TRY, QUEUE, REQUEST, SETTLED, SUBMISSION, TRY
from lepton_airflow.pods.lifecycle import (
    Action,
    Clocks,
    decide,
    describe_wait,
    logged_containers,
    next_submission,
    termination,
    unix_time,
)

MADE = "2026-01-01T00:00:00Z"
T0 = unix_time(MADE)
CLOCKS = Clocks(admission_s=1000, schedule_s=300, start_s=600, run_s=3600)


def pod(
    uid: str = "a",
    *,
    try_id: str = "mine",
    digest: str = "same",
    number: int = 1,
    state: dict[str, Any] | None = None,
    phase: str = "Pending",
    scheduled: str = "",
    deleted: str = "",
    gates: bool = False,
    queue: bool = False,
    annotations: dict[str, str] | None = None,
    **status: Any,
) -> dict[str, Any]:
    conditions = (
        [{"type": "PodScheduled", "status": "True", "lastTransitionTime": scheduled}] if scheduled else []
    )
    return {
        "metadata": {
            "uid": uid,
            "name": f"pod-{uid}",
            "creationTimestamp": MADE,
            "labels": {QUEUE: "gpus"} if queue else {},
            "annotations": {TRY: try_id, REQUEST: digest, SUBMISSION: str(number), **(annotations or {})},
            **({"deletionTimestamp": deleted} if deleted else {}),
        },
        "spec": {
            "containers": [{"name": "stage"}],
            **({"schedulingGates": [{"name": "kueue.x-k8s.io/admission"}]} if gates else {}),
        },
        "status": {
            "phase": phase,
            "conditions": conditions,
            **({"containerStatuses": [{"name": "stage", "state": state}]} if state else {}),
            **status,
        },
    }


def running(uid: str = "a", since: str = MADE, **settings: Any) -> dict[str, Any]:
    return pod(uid, state={"running": {"startedAt": since}}, phase="Running", scheduled=MADE, **settings)


def finished(uid: str = "a", code: int = 0, **settings: Any) -> dict[str, Any]:
    state = {"terminated": {"exitCode": code}}
    return pod(uid, state=state, phase="Failed" if code else "Succeeded", **settings)


def after(s: float, *pods: Any, owned: str | None = None, clocks: Clocks = CLOCKS) -> Action:
    return decide(pods, owned=owned, try_id="mine", digest="same", clocks=clocks, now=T0 + s)


@pytest.mark.parametrize(
    ("pods", "owned", "kind", "uid"),
    [
        pytest.param([], None, "create", None, id="nothing there"),
        pytest.param([running()], "a", "wait", "a", id="ours runs"),
        pytest.param([finished()], "a", "collect", "a", id="ours ended"),
        pytest.param([finished(code=137)], "a", "collect", "a", id="ours failed: its receipt may say why"),
        pytest.param([], "a", "gone", None, id="ours vanished"),
        pytest.param([running("b", try_id="other")], "a", "gone", None, id="ours vanished, another's runs"),
        pytest.param([running(try_id="other")], "a", "lost", "a", id="taken over by another try"),
        pytest.param([running(try_id="old")], None, "adopt", "a", id="a dead try's, same request"),
        pytest.param([running(try_id="old", digest="x")], None, "delete", "a", id="same run, other request"),
        pytest.param([running(digest="x")], None, "adopt", "a", id="our own, whatever its templates gave"),
        pytest.param([finished(try_id="old")], None, "adopt", "a", id="a dead try's that ended well"),
        pytest.param([finished(try_id="old", digest="x")], None, "create", None, id="ended, other request"),
        pytest.param([finished(code=1, try_id="old")], None, "create", None, id="a dead try's that failed"),
        pytest.param(
            [finished(annotations={SETTLED: "yes"})],
            None,
            "create",
            None,
            id="kept, and its result used already",
        ),
        pytest.param(
            [running(try_id="old", deleted="2026-01-01T00:01:00Z")],
            None,
            "wait",
            "a",
            id="never adopted: it is terminating",
        ),
        pytest.param(
            [running(annotations={SETTLED: "yes"}, deleted="2026-01-01T00:01:00Z")],
            None,
            "wait",
            "a",
            id="nothing runs beside one that is still terminating",
        ),
        pytest.param(
            [running("a", try_id="old"), running("b", try_id="old", number=2)],
            None,
            "delete",
            "a",
            id="two live ones: the newest stays",
        ),
    ],
)
def test_next_action(pods: list[Any], owned: str | None, kind: str, uid: str | None) -> None:
    found = after(10, *pods, owned=owned)
    assert (found.kind, found.pod and found.pod["metadata"]["uid"]) == (kind, uid)


def test_a_pod_that_does_not_go_is_passed_over_by_the_next_submission() -> None:
    stuck = running(try_id="old", number=3, deleted="2026-01-01T00:01:00Z")
    assert after(119, stuck).kind == "wait"
    assert after(121, stuck).kind == "create"
    assert next_submission([stuck], last=1) == 4
    assert next_submission([], last=2) == 3


def test_ours_that_does_not_go_is_gone() -> None:
    assert after(121, running(deleted="2026-01-01T00:01:00Z"), owned="a").kind == "gone"


@pytest.mark.parametrize(
    ("seen", "phase", "limit"),
    [
        (pod(), "schedule", 300),
        (pod(gates=True, queue=True), "admission", 1000),
        (pod(queue=True, annotations={ADMITTED: str(T0 + 500)}), "schedule", 800),
        (pod(scheduled="2026-01-01T00:00:50Z"), "start", 650),
        (running(since="2026-01-01T00:02:00Z"), "run", 3720),
    ],
)
def test_each_part_of_life_has_its_clock(seen: Any, phase: str, limit: float) -> None:
    waiting, expired = after(limit - 1, seen, owned="a"), after(limit, seen, owned="a")
    assert (waiting.kind, waiting.phase, waiting.until) == ("wait", phase, T0 + limit)
    assert (expired.kind, expired.phase) == ("expire", phase)
    assert seen["metadata"]["name"] in describe_wait(waiting)


def test_a_queue_that_lets_the_pod_go_starts_the_schedule_clock() -> None:
    assert after(900, pod(gates=True, queue=True), owned="a").phase == "admission"
    assert after(900, pod(queue=True), owned="a").kind == "admit"


def test_execution_timeout_holds_in_every_phase() -> None:
    clocks = Clocks(admission_s=1000, schedule_s=300, start_s=600, run_s=3600, deadline=T0 + 100)
    for seen in (pod(), running()):
        assert after(99, seen, owned="a", clocks=clocks).until == T0 + 100
        assert after(100, seen, owned="a", clocks=clocks).phase == "deadline"
    assert after(100, finished(), owned="a", clocks=clocks).kind == "collect"  # it was in time
    assert after(100, clocks=clocks) == Action("expire", None, "deadline", T0 + 100)


def test_a_pod_that_cannot_come_right_is_not_waited_for() -> None:
    waiting = {"waiting": {"reason": "InvalidImageName", "message": "couldn't parse image name"}}
    found = after(5, pod(state=waiting, scheduled=MADE), owned="a")
    assert found.kind == "fail"
    assert found.diagnosis is not None
    assert found.diagnosis.reason == "ImagePull"


def test_a_sidecar_that_runs_on_does_not_hold_the_end_back() -> None:
    both = finished(code=0)
    both["status"]["phase"] = "Running"
    both["status"]["containerStatuses"].append({"name": "proxy", "state": {"running": {}}})
    assert termination(both) == {"exitCode": 0}


def test_a_sidecar_that_never_ends_is_not_read() -> None:
    first, proxy = {"name": "fetch"}, {"name": "proxy", "restartPolicy": "Always"}
    assert logged_containers({"spec": {"initContainers": [first, proxy]}}) == ["fetch", "stage"]


def test_without_airflow_only_an_equal_request_is_gone_on_with() -> None:
    pods = [running(try_id=LOCAL_TRY, digest="x")]
    found = decide(pods, owned=None, try_id=LOCAL_TRY, digest="same", clocks=CLOCKS, now=T0)
    assert found.kind == "delete"


def test_an_evicted_pod_without_container_states_has_ended() -> None:
    assert termination(pod(phase="Failed", reason="Evicted")) == {}
