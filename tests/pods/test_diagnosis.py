from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.errors import OutOfMemory, PodFailed
from lepton_airflow.pods.diagnosis import (
    Diagnosis,
    diagnose,
    diagnose_refusal,
    error_of,
    event_lines,
    expired,
    parse_quantity,
    resubmissions_spent,
)

STATUSES = Path(__file__).parent / "statuses"

# file: (reason, what then, words that the sentence must have); None: nothing is wrong.
EXPECTED: dict[str, tuple[str, str, list[str]] | None] = {
    # recorded
    "claim_missing": ("CreateConfig", "refuse", ["no-such-claim", "volumes="]),
    "config_map_missing": ("CreateConfig", "refuse", ["no-such-map", "Create"]),
    "deadline_reached": ("Deadline", "retry", ["run_timeout_s"]),
    "deleted_and_killed": ("Deleted", "resubmit", ["mark it failed in Airflow"]),
    "deleted_while_running": ("Deleted", "resubmit", ["deleted", "mark it failed in Airflow"]),
    "env_secret_missing": ("CreateConfig", "refuse", ["no-such-secret", "Create"]),
    "evicted_through_the_api": ("Deleted", "resubmit", ["eviction"]),
    "exit_0": None,
    "exit_1": ("UserCode", "retry", ["exit code 1", ": the last words;"]),
    "exit_2": ("CreateConfig", "refuse", ["another version", "the last words"]),
    "exit_75": ("Preempted", "resubmit", ["exit code 75"]),
    "exit_80": ("UserCode", "refuse", ["exit code 80", "the last words"]),
    "exit_99": ("UserCode", "retry", ["exit code 99", "the last words"]),
    "exit_137": ("Killed", "retry", ["exit code 137", "node1", "memory="]),
    "exit_143": ("Killed", "retry", ["exit code 143"]),
    "image_from_no_registry": ("ImagePull", "wait", ["localhost/no-such-image:1", "connection refused"]),
    "image_name_invalid": ("ImagePull", "refuse", ["registry.example/Stage:1.4", "must be lowercase"]),
    "image_never_pulled": ("ImagePull", "refuse", ["localhost/no-such-image:1", "load it"]),
    "init_container_failed": ("InitContainer", "retry", ["fetch", "exit code 3", "no such bucket"]),
    "oom": ("OOM", "retry", ["64Mi", "memory="]),
    "oom_of_a_child": ("OOM", "retry", ["64Mi", "memory="]),
    "preempted": ("Preempted", "resubmit", ["higher priority", "p4/preemptor"]),
    "program_missing": ("CreateConfig", "refuse", ["python=", "executable file not found"]),
    "root_image": ("CreateConfig", "refuse", ["runAsNonRoot", "USER"]),
    "scratch_over_its_limit": ("Evicted", "retry", ["10Mi", "write less"]),
    "unschedulable_cpu": ("Unschedulable", "wait", ["cpu 1k", "Insufficient cpu", "Ask for less"]),
    "unschedulable_node_selector": ("Unschedulable", "wait", ["node affinity", "node_selector"]),
    # made by hand
    "autoscaler_helps": ("Unschedulable", "wait", ["gpu-pool 0->1"]),
    "collected_1_26": ("NodeLost", "resubmit", ["gpu-1", "node no longer exists"]),
    "container_not_made_in_time": ("CreateConfig", "wait", ["context deadline exceeded"]),
    "disk_of_its_own_1_31": ("Evicted", "retry", ["10Gi", "write less"]),
    "done_although_disrupted": None,
    "evicted_1_26": ("Evicted", "resubmit", ["gpu-1"]),
    "gated_by_kueue": ("Gated", "wait", ["Kueue", "team-a"]),
    "gated_by_somebody": ("Gated", "wait", ["example.com/licence"]),
    "gpu_gone_at_the_node": ("NodeRefused", "resubmit", ["devices unavailable"]),
    "image_access_denied": ("ImagePull", "refuse", ["access denied", "pull_secrets"]),
    "image_for_another_cpu": ("ImagePull", "refuse", ["no match for platform"]),
    "image_not_found": ("ImagePull", "refuse", ["registry.example/lepton-stage:1.4", "not found"]),
    "image_too_many_requests": ("ImagePull", "wait", ["429"]),
    "just_made": None,
    "killed_by_kubelet_1_31": ("Evicted", "resubmit", ["low on resource: memory"]),
    "node_full_after_all": ("NodeRefused", "resubmit", ["OutOfnvidia.com/gpu"]),
    "node_lost_1_20": ("NodeLost", "resubmit", ["gpu-1", "unresponsive"]),
    "node_not_answering": ("NodeLost", "wait", ["gpu-1", "may still run"]),
    "node_pressure_1_20": ("Evicted", "resubmit", ["low on resource: memory"]),
    "node_restarted_1_34": ("NodeLost", "resubmit", ["could not be located"]),
    "node_shut_down_1_20": ("NodeLost", "resubmit", ["shutting"]),
    "node_shut_down_1_34": ("NodeLost", "resubmit", ["imminent node shutdown"]),
    "not_ready_by_its_own_probe": None,
    "out_of_memory_although_disrupted": ("OOM", "retry", ["16Gi"]),
    "package_not_in_the_image": ("CreateConfig", "refuse", ["pip install lepton-airflow"]),
    "preempted_1_25": ("Preempted", "resubmit", ["higher priority"]),
    "preempted_1_26": ("Preempted", "resubmit", ["higher priority"]),
    "program_for_another_cpu": ("CreateConfig", "refuse", ["another kind of CPU"]),
    "refused_although_disrupted": ("UserCode", "refuse", ["column 'late'"]),
    "room_for_a_critical_pod": ("Preempted", "resubmit", ["critical pod"]),
    "running": None,
    "stage_crashed": ("UserCode", "retry", ["SIGSEGV"]),
    "stage_failed_with_a_receipt": ("UserCode", "retry", [": bucket 'x' did not answer;"]),
    "stage_runs_beside_a_sidecar": None,
    "stopped_by_kueue": ("Preempted", "resubmit", ["higher priority Workload"]),
    "tainted_1_20": ("NodeLost", "resubmit", ["gpu-1"]),
    "tainted_1_26": ("NodeLost", "resubmit", ["NoExecute"]),
    "volume_not_attached": ("CreateConfig", "wait", ["Multi-Attach"]),
}

REFUSED: dict[str, tuple[str, str, list[str]]] = {
    "exists": ("Conflict", "wait", ["already exists"]),
    "invalid": ("Invalid", "refuse", ["Bad_Name", "less than or equal to cpu limit"]),
    "limit_range": ("Invalid", "refuse", ["maximum memory usage per Container is 100Gi"]),
    "no_namespace": ("NoNamespace", "refuse", ["'p4-none'", "namespace="]),
    "no_pod": ("Deleted", "resubmit", ["nosuch"]),
    "no_priority_class": ("CreateConfig", "refuse", ["'no-such-class'", "priority_class="]),
    "no_runtime_class": ("CreateConfig", "refuse", ["'no-such-class'", "runtime_class="]),
    "no_service_account": ("CreateConfig", "refuse", ["'no-such-account'", "service_account="]),
    "quota_full": ("QuotaExceeded", "wait", ["'team'", "requests.cpu=500m", "until others have ended"]),
    "quota_smaller_than_the_request": ("QuotaExceeded", "refuse", ["requests.cpu=1500m", "never fit"]),
    "quota_unspecified": ("Invalid", "refuse", ["'team'", "requests.cpu", "cpu="]),
    "rbac_create_pods": ("Forbidden", "refuse", ["'create'", "'pods'", "namespace p4", "p4:worker"]),
    "rbac_delete_pod": ("Forbidden", "refuse", ["'delete'", "'pods'", "namespace p4"]),
    "rbac_list_pods": ("Forbidden", "refuse", ["'list'", "'pods'", "namespace p4"]),
    "rbac_pod_log": ("Forbidden", "refuse", ["'get'", "'pods/log'", "namespace p4"]),
    "stale_delete": ("Conflict", "wait", ["precondition"]),
    "unauthorized": ("Forbidden", "refuse", ["credentials"]),
    "unreadable": ("Invalid", "refuse", ["quantities must match"]),
}


def _read(name: str) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((STATUSES / f"{name}.json").read_text())
    return status


def _answers() -> dict[str, Any]:
    answers: dict[str, Any] = _read("refused")["answers"]
    return answers


def test_every_recorded_answer_is_looked_at() -> None:
    assert {file.stem for file in STATUSES.glob("*.json")} == {*EXPECTED, "refused"}
    assert set(_answers()) == set(REFUSED)
    assert all(_read(name)["source"] for name in EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_pod_is_diagnosed(name: str) -> None:
    status = _read(name)
    before = copy.deepcopy(status)
    found = diagnose(status["pod"], status["events"])
    assert status == before
    _check(found, EXPECTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_is_explained(name: str) -> None:
    answer = _answers()[name]
    for body in (answer["body"], json.dumps(answer["body"])):
        _check(diagnose_refusal(answer["status"], body, "do something"), REFUSED[name])


def _check(found: Diagnosis | None, expected: tuple[str, str, list[str]] | None) -> None:
    if expected is None:
        assert found is None
        return
    assert found is not None
    reason, then, words = expected
    assert (found.reason, found.then) == (reason, then), found.sentence
    assert [w for w in words if w not in found.sentence] == [], found.sentence
    assert found.sentence.endswith(".")
    assert "\n" not in found.sentence
    assert not {"()", "''", "::", "..", "  ", "None"} & {
        found.sentence[i : i + 2] for i in range(len(found.sentence))
    }


@pytest.mark.parametrize("status", [0, 429, 500, 503])
def test_an_api_server_that_is_away_is_asked_again(status: int) -> None:
    found = diagnose_refusal(status, "connection refused", "read pod ml/train")
    assert (found.reason, found.then) == ("ApiServer", "wait")
    assert "read pod ml/train" in found.sentence


def test_refusals_that_no_cluster_here_gives() -> None:
    security = 'pods "x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true'
    webhook = 'admission webhook "vpod.kb.io" denied the request: spec.priority: no'
    ending = (
        'pods "x" is forbidden: unable to create new content in namespace ml because it is being terminated'
    )
    early = 'pods "x" is forbidden: error looking up service account ml/default: serviceaccount "default" not found'
    expected = {security: ("Invalid", "refuse"), webhook: ("Invalid", "refuse")}
    expected |= {ending: ("NoNamespace", "retry"), early: ("CreateConfig", "wait")}
    for message, (reason, then) in expected.items():
        found = diagnose_refusal(403, {"message": message}, "create pod x")
        assert (found.reason, found.then) == (reason, then)
        assert message.partition(": ")[2] in found.sentence


def test_a_pod_that_is_gone_was_deleted_unless_its_events_say_more() -> None:
    gone = diagnose(None)
    assert gone is not None
    assert (gone.reason, gone.then) == ("Deleted", "resubmit")
    preempted = diagnose(None, _read("preempted")["events"])
    assert preempted is not None
    assert preempted.reason == "Preempted"
    assert "p4/preempted" in preempted.sentence


def test_events_of_a_namesake_do_not_count() -> None:
    status = _read("deleted_while_running")
    others = [
        e | {"involvedObject": e["involvedObject"] | {"uid": "another"}} for e in _read("preempted")["events"]
    ]
    found = diagnose(status["pod"], others)
    assert found is not None
    assert found.reason == "Deleted"


def test_another_name_of_the_container() -> None:
    status = _read("oom")
    status["pod"]["spec"]["containers"][0]["name"] = "base"
    status["pod"]["status"]["containerStatuses"][0]["name"] = "base"
    found = diagnose(status["pod"], (), "base")
    assert found is not None
    assert found.reason == "OOM"


def test_a_mount_is_given_time_to_come_right() -> None:
    status = _read("config_map_missing")
    (mount,) = [e for e in status["events"] if e["reason"] == "FailedMount"]
    mount["count"] = 1
    found = diagnose(status["pod"], status["events"])
    assert found is not None
    assert (found.reason, found.then) == ("CreateConfig", "wait")


def test_a_wait_that_lasted_too_long_fails_with_what_was_waited_for() -> None:
    status = _read("unschedulable_cpu")
    waiting = diagnose(status["pod"], status["events"])
    late = expired("schedule_timeout_s", 1200, waiting)
    assert (late.reason, late.then) == ("Unschedulable", "retry")
    assert late.sentence.endswith("schedule_timeout_s=1200 seconds are over.")
    assert "Insufficient cpu" in late.sentence
    assert expired("start_timeout_s", 600, None).reason == "Deadline"


def test_too_many_resubmissions_fail_with_the_last_reason() -> None:
    status = _read("preempted")
    preempted = diagnose(status["pod"], status["events"])
    assert preempted is not None
    over = resubmissions_spent(preempted, 5)
    assert (over.reason, over.then) == ("Preempted", "retry")
    assert "preemption_limit=5" in over.sentence


@pytest.mark.parametrize(("then", "code"), [("retry", 1), ("wait", 1), ("resubmit", 75), ("refuse", 80)])
def test_the_error_says_whether_to_try_again(then: Any, code: int) -> None:
    error = error_of(Diagnosis("ImagePull", "the sentence", then))
    assert isinstance(error, PodFailed)
    assert (error.reason, error.exit_code, str(error)) == ("ImagePull", code, "the sentence")


def test_too_little_memory_is_the_error_of_every_runner() -> None:
    assert type(error_of(Diagnosis("OOM", "the sentence", "retry"))) is OutOfMemory


def test_events_as_lines() -> None:
    lines = event_lines(_read("config_map_missing")["events"])
    assert (
        'Warning FailedMount (4 times): MountVolume.SetUp failed for volume "v" : configmap "no-such-map" not found'
        in lines
    )
    assert lines[0].startswith("Normal Scheduled: Successfully assigned")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2", 2),
        ("1500m", 1.5),
        ("64Mi", 64 * 2**20),
        ("1k", 1000),
        ("1e3", 1000),
        (".5", 0.5),
        ("2E", 2e18),
        ("3Gi", 3 * 2**30),
    ],
)
def test_quantities(text: str, number: float) -> None:
    assert parse_quantity(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["two", "1 Gi", "1GB", "Mi", "1e"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_quantity(text)
