"""What a try does about the pods it finds, and what counts as evidence of a pod's work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import DO_NOT_RETRY, BadConfiguration, PodFailed, RunnerError
from lepton_airflow.pods import LOCAL_TRY, NONCE, REQUEST, SUBMISSION, TRY
from lepton_airflow.pods.attempt import Attempt, Waiting
from lepton_airflow.pods.settings import PodSettings
from lepton_airflow.store import Store

REQUESTED = Request(stage="Copy", parameters={}, store="")


class Recorder:
    """Stands where the cluster would: the pods of one run key, and what was done to them."""

    namespace = "ml"
    in_cluster = False

    def __init__(self, *pods: dict[str, Any]) -> None:
        self.pods, self.done = list(pods), []

    def list_pods(self, _run_key: str) -> tuple[list[dict[str, Any]], str]:
        return self.pods, "1"

    def events(self, _pod: Any) -> list[dict[str, Any]]:
        return []

    def log_lines(self, *_: Any) -> list[tuple[str, str]]:
        return []

    def sweep_secrets(self, _store_id: str) -> None:
        pass

    def set_secret_owner(self, _pod: Any) -> None:
        pass

    def wait_for_change(self, *_: Any) -> None:
        pass

    def for_signal_handler(self) -> Recorder:
        return self

    def submit(self, secret: dict[str, Any], pod: dict[str, Any]) -> dict[str, Any]:
        self.done.append(("submit", pod["metadata"]["name"]))
        raise RunnerError("submitted again")

    def annotate(self, pod: dict[str, Any], annotations: dict[str, str]) -> dict[str, Any]:
        self.done.append(("annotate", sorted(annotations)))
        pod["metadata"]["annotations"].update(annotations)
        return pod

    def delete(self, pod: dict[str, Any]) -> bool:
        self.done.append(("delete", pod["metadata"]["name"]))
        self.pods.remove(pod)
        return True


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    return replace(REQUESTED, store=str(tmp_path))


def ended_pod(code: int, *, try_id: str = LOCAL_TRY, digest: str = "", **terminated: Any) -> dict[str, Any]:
    annotations = {TRY: try_id, NONCE: "ours", SUBMISSION: "1", REQUEST: digest}
    state = {"terminated": {"exitCode": code, **terminated}}
    return {
        "metadata": {"uid": "u", "name": "pod-1", "resourceVersion": "1", "annotations": annotations},
        "spec": {"containers": [{"name": "stage"}]},
        "status": {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": "stage", "state": state}],
        },
    }


def receipt(request: Request, **changes: Any) -> Receipt:
    values = {"stage": request.stage, "run_key": request.run_key, "nonce": "ours", "summary": "s", **changes}
    return Receipt(cache_key=None, status="done", **values)


@pytest.fixture
def conclude(request_: Request, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Go on after a deferral, among these pods."""

    def call(
        *pods: dict[str, Any],
        state: Mapping[str, Any] = MappingProxyType({}),
        defers: bool = False,
        **settings: Any,
    ) -> tuple[Any, list[Any]]:
        mount = {"name": "store", "mount": request_.store, "host_path": request_.store}
        cluster = Recorder(*pods)
        monkeypatch.setattr("lepton_airflow.pods.attempt.Cluster", lambda *_a, **_k: cluster)
        monkeypatch.setattr("lepton_airflow.pods.attempt._POLL_S", 0.0)
        monkeypatch.setattr("lepton_airflow.pods.attempt._LATE_STORE_S", 0.0)
        call.cluster = cluster  # type: ignore[attr-defined]
        attempt = Attempt(
            PodSettings(image="stage:1", volumes=[mount], **settings),
            request_,
            [],
            ti=SimpleNamespace(id=LOCAL_TRY),
            state={"uid": "u", "nonce": "ours", "submission": 1, **state},
            defers=defers,
        )
        return attempt.run(), cluster.done

    return call


def test_the_receipt_of_the_pod_is_taken_and_the_pod_deleted(request_: Request, conclude: Any) -> None:
    Store(request_.store).record(receipt(request_))
    found, done = conclude(ended_pod(0))
    assert found.summary == "s"
    assert done[-1] == ("delete", "pod-1")


@pytest.mark.parametrize(
    "changes", [{"nonce": "another's"}, {"nonce": ""}, {"stage": "Other"}, None], ids=str
)
def test_exit_code_0_without_its_own_receipt_is_a_failure(
    request_: Request, conclude: Any, changes: dict[str, Any] | None
) -> None:
    if changes is not None:
        Store(request_.store).record(receipt(request_, **changes))
    with pytest.raises(RunnerError, match="left no receipt of this run"):
        conclude(ended_pod(0))


def test_a_termination_message_alone_proves_nothing_but_tells_a_failure(
    request_: Request, conclude: Any
) -> None:
    with pytest.raises(RunnerError, match="left no receipt of this run"):
        conclude(ended_pod(0, message=receipt(request_).to_json()))
    error = {"kind": "BadInput", "message": "the store is read-only", "exit_code": 80}
    told = receipt(request_, error=error, nonce="ours").to_json()
    assert conclude(ended_pod(80, message=told))[0].error == error


def test_preempted_is_submitted_again_until_its_limit(request_: Request, conclude: Any) -> None:
    error = {"kind": "Preempted", "message": "stopped", "exit_code": 75}
    Store(request_.store).record(receipt(request_, error=error))
    assert conclude(ended_pod(75), preemption_limit=0)[0].error == error
    with pytest.raises(RunnerError, match="submitted again"):
        conclude(ended_pod(75))
    assert [what for what, _ in conclude.cluster.done] == ["delete", "submit"]
    assert conclude.cluster.done[-1][1].endswith("-2")


def test_a_pod_that_is_gone_counts_only_by_its_receipt(request_: Request, conclude: Any) -> None:
    with pytest.raises(RunnerError, match="submitted again"):
        conclude()
    Store(request_.store).record(receipt(request_))
    assert conclude()[0].summary == "s"


def test_a_pod_that_another_try_took_over_is_left_to_it(request_: Request, conclude: Any) -> None:
    Store(request_.store).record(receipt(request_))
    with pytest.raises(RunnerError, match="another try of this task has taken pod pod-1 over"):
        conclude(ended_pod(0, try_id="another"))
    assert conclude.cluster.done == []


def running_pod(**settings: Any) -> dict[str, Any]:
    pod = ended_pod(0, **settings)
    pod["metadata"] |= {"creationTimestamp": "2999-01-01T00:00:00Z"}
    pod["status"] = {"phase": "Running", "containerStatuses": [{"name": "stage", "state": {"running": {}}}]}
    return pod


def test_a_pod_that_no_triggerer_may_wait_for_is_deleted(conclude: Any) -> None:
    with pytest.raises(
        PodFailed, match="Copy cannot wait without a worker slot: sa may not watch pods"
    ) as failed:
        conclude(running_pod(), defers=True, state={"refused": "sa may not watch pods"})
    assert failed.value.exit_code == DO_NOT_RETRY
    assert conclude.cluster.done == [("delete", "pod-1")]


def test_a_wait_holds_what_the_trigger_and_the_next_entry_need(conclude: Any) -> None:
    waiting, done = conclude(running_pod(), defers=True, state={"deadline": 4e9, "tail": [[20, "old"]]})
    assert isinstance(waiting, Waiting)
    assert waiting.trigger["owned"] == "u"
    assert (waiting.trigger["try_id"], waiting.trigger["namespace"]) == (LOCAL_TRY, "ml")
    assert (waiting.trigger["clocks"]["deadline"], waiting.trigger["refused"]) == (4e9, None)
    assert (waiting.state["uid"], waiting.state["nonce"], waiting.state["tail"]) == ("u", "ours", [])
    assert done == []


def test_a_pod_of_a_later_try_is_neither_taken_nor_deleted(conclude: Any) -> None:
    state = {"uid": None, "nonce": "", "resubmissions": 1}
    with pytest.raises(RunnerError, match="another try of this task has taken pod pod-1 over"):
        conclude(running_pod(try_id="later"), state=state)
    assert conclude.cluster.done == []


def test_the_limit_of_resubmissions_is_told(conclude: Any) -> None:
    with pytest.raises(PodFailed, match="submitted again 0 times in this try, as preemption_limit=0 allows"):
        conclude(preemption_limit=0)


def test_what_a_dead_try_left_goes_before_the_next_pod_comes(conclude: Any) -> None:
    with pytest.raises(RunnerError, match="submitted again"):
        conclude(ended_pod(1, try_id="dead"), state={"uid": None, "nonce": "", "submission": 0})
    assert [what for what, _ in conclude.cluster.done] == ["delete", "submit"]


def test_a_log_that_never_pauses_is_left_for_a_look_at_the_pod(
    conclude: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = running_pod()

    def endless(*_: Any) -> Iterator[tuple[str, str]]:
        while True:
            ours["metadata"]["annotations"][TRY] = "later"
            yield "2026-01-01T00:00:00Z", "a line"

    monkeypatch.setattr("lepton_airflow.pods.attempt._FOLLOW_S", 0.0)
    monkeypatch.setattr(Recorder, "log_lines", endless)
    with pytest.raises(RunnerError, match="another try"):
        conclude(ours)


def test_a_kept_pod_is_marked_so_that_no_later_try_takes_it(request_: Request, conclude: Any) -> None:
    Store(request_.store).record(receipt(request_))
    _, done = conclude(ended_pod(0), keep_pod="always")
    assert done[-1] == ("annotate", ["lepton-airflow/settled"])


def test_a_store_that_no_pod_sees_is_refused_before_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(BadConfiguration, match="is a folder, which a pod does not see: mount it"):
        Attempt(PodSettings(image="stage:1"), replace(REQUESTED, store=str(tmp_path)), [])
