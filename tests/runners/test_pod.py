"""What the runner makes of an attempt: a receipt, a deferral, or a deleted pod."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import pytest
from airflow.providers.common.compat.sdk import TaskDeferred

from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import RunnerError
from lepton_airflow.pods import attempt
from lepton_airflow.pods.attempt import Waiting
from lepton_airflow.runners import Pod
from lepton_airflow.triggers.pod import PodTrigger

REQUEST = Request(stage="Copy", parameters={}, store="s3://lake/lepton")
RECEIPT = Receipt(stage="Copy", run_key=REQUEST.run_key, cache_key=None, status="done", summary="s")
ARGUMENTS = ("cluster", "namespace", "run_key", "owned", "try_id", "digest", "clocks", "read", "connections")
CONTEXT = {"ti": "the task instance", "lepton": {"uid": "u"}}


class Attempt:
    """Stands where an attempt would: gives the outcome that a test sets, and remembers what it was given."""

    outcome: ClassVar[Any] = RECEIPT
    given: ClassVar[dict[str, Any]] = {}
    done: ClassVar[list[str]] = []

    def __init__(self, settings: Pod, request: Request, connections: Sequence[Any], **given: Any) -> None:
        assert (settings.image, request, connections) == ("stage:1", REQUEST, [])
        type(self).given = given

    def run(self) -> Any:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def cancel(self) -> None:
        self.done.append("cancel")

    def delete_own(self) -> None:
        self.done.append("delete")


@pytest.fixture(autouse=True)
def attempts(monkeypatch: pytest.MonkeyPatch) -> type[Attempt]:
    for name, value in (("outcome", RECEIPT), ("given", {}), ("done", [])):
        monkeypatch.setattr(Attempt, name, value)
    monkeypatch.setattr(attempt, "Attempt", Attempt)
    return Attempt


def test_repr_is_stable_and_holds_the_settings_alone() -> None:
    pod = Pod(image="stage:1", gpus=1)
    pod.cancel()  # nothing runs
    assert repr(pod) == repr(Pod(image="stage:1", gpus=1))
    assert "_attempt" not in repr(pod)


def test_help_describes_every_setting() -> None:
    assert {f.name for f in fields(Pod) if f.init} <= set(re.findall(r"\w+", Pod.__doc__ or ""))


def test_an_attempt_gets_what_airflow_and_the_last_entry_say(attempts: type[Attempt]) -> None:
    assert Pod(image="stage:1", deferrable=True).run(REQUEST, [], CONTEXT) == RECEIPT
    assert attempts.given == {"ti": "the task instance", "state": {"uid": "u"}, "defers": True}
    Pod(image="stage:1", deferrable=True).run(REQUEST, [], {})  # without Airflow nothing can defer
    assert attempts.given == {"ti": None, "state": None, "defers": False}


@pytest.mark.parametrize("default", [True, False])
def test_airflows_default_says_whether_a_pod_defers(
    attempts: type[Attempt], monkeypatch: pytest.MonkeyPatch, default: bool
) -> None:
    monkeypatch.setenv("AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE", str(default))
    Pod(image="stage:1").run(REQUEST, [], CONTEXT)
    assert attempts.given["defers"] is default


def test_a_wait_becomes_a_deferral(attempts: type[Attempt]) -> None:
    arguments: dict[str, Any] = {name: {} for name in ARGUMENTS}
    attempts.outcome = Waiting(arguments, {"uid": "u"})
    with pytest.raises(TaskDeferred) as deferred:
        Pod(image="stage:1").run(REQUEST, [], CONTEXT)
    assert isinstance(deferred.value.trigger, PodTrigger)
    assert deferred.value.trigger.serialize()[1] == arguments | {"refused": None}
    assert (deferred.value.method_name, deferred.value.kwargs) == ("resume", {"kept": {"uid": "u"}})
    assert attempts.done == []


def test_an_interrupt_deletes_the_pod_and_a_failure_leaves_it_to_the_next_try(
    attempts: type[Attempt],
) -> None:
    attempts.outcome = RunnerError("the store did not answer")
    with pytest.raises(RunnerError):
        Pod(image="stage:1").run(REQUEST, [], CONTEXT)
    assert attempts.done == []
    attempts.outcome = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        Pod(image="stage:1").run(REQUEST, [], CONTEXT)
    assert attempts.done == ["delete"]


def test_a_kill_reaches_the_attempt_only_while_it_runs(
    attempts: type[Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = Pod(image="stage:1")
    monkeypatch.setattr(Attempt, "run", lambda _self: pod.cancel() or RECEIPT)
    pod.run(REQUEST, [], CONTEXT)
    assert attempts.done == ["cancel"]
    pod.cancel()
    assert attempts.done == ["cancel"]
