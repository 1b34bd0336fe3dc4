"""What befalls pods, workers and clusters, on a real Airflow and a real cluster: each drill once, side by side.

One Airflow for all. What takes a component of it away comes last, when the others have ended.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.testing import LocalAirflow

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import disturb  # noqa: E402 - beside this file; tests are no package
from disturb import Arena, Outcome  # noqa: E402

pytestmark = pytest.mark.airflow


@pytest.fixture(scope="module")
def arena(
    cluster: Any,
    namespace: str,
    shared: Path,
    tmp_path_factory: pytest.TempPathFactory,
    new_airflow_database: Callable[[], str | None],
) -> Iterator[Arena]:
    """The Airflow and the namespace of these drills."""
    home = tmp_path_factory.mktemp("airflow")
    environment = disturb.environment(cluster.image, namespace, shared, plain=False)
    with LocalAirflow(
        home, HERE / "bundle", parallelism=5, env=environment, database=new_airflow_database()
    ) as airflow:
        for name in ("sync", "deferred", "prepared_sync", "prepared_deferred", "impatient"):
            airflow.wait_for_dag(f"drill_{name}")
        with disturb.arena(airflow, namespace, shared, "drill") as made:
            yield made


@pytest.fixture(scope="module")
def drilled(arena: Arena) -> Mapping[str, Future[Outcome]]:
    """The drills that do not disturb each other, eight at a time: all at once they wait for each other's turn on two cores."""
    together: dict[str, tuple[Callable[..., Outcome], str]] = {
        "undisturbed": (disturb.undisturbed, "prepared_deferred"),
        "undisturbed sync": (disturb.undisturbed, "prepared_sync"),
        "pod deleted": (disturb.pod_deleted, "deferred"),
        "pod deleted sync": (disturb.pod_deleted, "sync"),
        "evicted": (disturb.evicted, "deferred"),
        "out of memory": (disturb.out_of_memory, "deferred"),
        "no image": (disturb.no_image, "impatient"),
        "unschedulable": (disturb.unschedulable, "impatient"),
        "full quota": (disturb.full_quota, "deferred"),
        "wrong namespace": (disturb.wrong_namespace, "deferred"),
        "RBAC denied": (disturb.rbac_denied, "deferred"),
        "marked failed": (disturb.marked_failed, "deferred"),
        "marked success": (disturb.marked_success, "deferred"),
        "cleared": (disturb.cleared, "deferred"),
        "no receipt": (disturb.no_receipt, "deferred"),
        "worker killed": (disturb.worker_killed, "sync"),
        "API server away": (disturb.api_server_away, "deferred"),
    }
    with ThreadPoolExecutor(8) as pool:
        return {name: pool.submit(drill, arena, how) for name, (drill, how) in together.items()}


Drilled = Mapping[str, Future[Outcome]]


def _is(outcome: Outcome, state: str, *, pods: int, tries: int, says: str = "") -> None:
    """The final state, the number of pods ever made, the tries used, and the sentence."""
    seen = (outcome.state, outcome.pods, outcome.tries)
    assert seen == (state, pods, tries), outcome.log[-3000:]
    assert outcome.alive == 0
    assert says in outcome.log, outcome.log[-3000:]


@pytest.mark.parametrize("name", ["undisturbed", "undisturbed sync"])
def test_without_a_disturbance_one_pod_is_made(drilled: Drilled, name: str) -> None:
    outcome = drilled[name].result()
    _is(outcome, "success", pods=1, tries=1, says="The file came.")
    assert re.findall(r"fetched part (\d+) of 500", outcome.log) == [str(n) for n in range(500)]


@pytest.mark.parametrize("name", ["pod deleted", "pod deleted sync", "evicted"])
def test_a_pod_that_is_taken_away_is_submitted_again_in_the_same_try(drilled: Drilled, name: str) -> None:
    outcome = drilled[name].result()
    _is(outcome, "success", pods=2, tries=1)
    assert outcome.starts == 2
    # What the first pod wrote is there, too: the second trigger of a try overwrites the log of the first.
    assert re.findall(r"start \d of the stage", outcome.log) == [
        "start 1 of the stage",
        "start 2 of the stage",
    ]
    assert "was deleted, and not by this task" in outcome.log or "exit code 75" in outcome.log


def test_too_little_memory_is_named_and_retried(drilled: Drilled) -> None:
    _is(drilled["out of memory"].result(), "failed", pods=2, tries=2, says="its limit of 64Mi")


def test_an_image_that_does_not_exist_is_named(drilled: Drilled) -> None:
    outcome = drilled["no image"].result()
    _is(outcome, "failed", pods=2, tries=2, says="cannot get its image localhost/no-such-image:1")
    assert "start_timeout_s=15 seconds are over" in outcome.log


def test_a_request_that_no_node_can_meet_is_named(drilled: Drilled) -> None:
    outcome = drilled["unschedulable"].result()
    _is(outcome, "failed", pods=2, tries=2, says="Insufficient cpu")
    assert "schedule_timeout_s=10 seconds are over" in outcome.log


def test_a_full_quota_is_waited_for_without_a_worker(drilled: Drilled) -> None:
    outcome = drilled["full quota"].result()
    _is(outcome, "success", pods=1, tries=1, says="Quota 'team' is full")
    assert outcome.notes["state_while_full"] == "deferred"


def test_a_namespace_that_does_not_exist_fails_at_once(drilled: Drilled) -> None:
    _is(drilled["wrong namespace"].result(), "failed", pods=0, tries=1, says="no-such-namespace")


def test_missing_rights_fail_at_once_and_are_named(drilled: Drilled) -> None:
    outcome = drilled["RBAC denied"].result()
    _is(outcome, "failed", pods=0, tries=1, says=":nobody may not list pods in namespace")


@pytest.mark.parametrize("state", ["failed", "success"])
def test_marking_a_task_ends_its_pod(drilled: Drilled, state: str) -> None:
    _is(drilled[f"marked {state}"].result(), state, pods=1, tries=1)


def test_clearing_ends_with_exactly_one_live_pod(drilled: Drilled) -> None:
    outcome = drilled["cleared"].result()
    assert outcome.notes["alive_after_clear"] == 1
    assert (outcome.state, outcome.alive) == ("success", 0), outcome.log[-3000:]
    assert outcome.pods <= 2, outcome.log[-3000:]


def test_exit_code_0_without_a_receipt_is_a_failure(drilled: Drilled) -> None:
    _is(drilled["no receipt"].result(), "failed", pods=2, tries=2, says="no receipt")


def test_a_retry_goes_on_with_the_pod_of_a_killed_worker(drilled: Drilled) -> None:
    outcome = drilled["worker killed"].result()
    _is(outcome, "success", pods=1, tries=2)
    assert outcome.starts == 1


def test_an_api_server_that_is_away_is_waited_for(drilled: Drilled) -> None:
    _is(drilled["API server away"].result(), "success", pods=1, tries=1)


@pytest.mark.parametrize("component", ["triggerer", "scheduler"])
def test_killed_components_do_not_touch_the_pod(arena: Arena, drilled: Drilled, component: str) -> None:
    for other in drilled.values():
        other.exception()  # they have ended, well or not
    outcome = disturb.component_killed(arena, "deferred", component)
    _is(outcome, "success", pods=1, tries=1)
    assert outcome.starts == 1


def test_a_pod_that_no_triggerer_could_end_is_swept(arena: Arena, drilled: Drilled) -> None:
    for other in drilled.values():
        other.exception()
    outcome = disturb.triggerer_down_and_swept(arena, "deferred")
    _is(outcome, "failed", pods=1, tries=1)
    listed, swept = outcome.notes["printed"]
    assert outcome.notes["left"] == 1
    assert "drill_deferred.stage" in listed
    (line,) = (line for line in swept.splitlines() if line.startswith(f"pod/{outcome.notes['pod']} "))
    assert line.endswith("deleted: its task is failed in Airflow")
