"""What Airflow says of a task, and what is made of an Airflow that does not answer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.pods import task_state
from lepton_airflow.pods.task_state import TaskKey, is_wanted, state_of, states_in_database

TASK: TaskKey = ("retrain", "train", "r1", 2)


class TaskInstance:
    """What a task's context has under ``ti``, as far as it is asked."""

    dag_id, task_id, run_id = "retrain", "train", "r1"

    def __init__(self, states: dict[str, Any], map_index: int = -1) -> None:
        self.states, self.map_index = states, map_index

    def get_task_states(self, **asked: Any) -> dict[str, dict[str, Any]]:
        assert asked == {
            "dag_id": "retrain",
            "task_ids": ["train"],
            "run_ids": ["r1"],
            "map_index": self.map_index,
        }
        return {"r1": self.states} if self.states else {}


def test_the_state_of_a_task_of_a_mapped_one_and_of_an_unknown_one() -> None:
    assert state_of(TaskInstance({"train": "running"})) == "running"
    assert state_of(TaskInstance({"train_2": "deferred"}, map_index=2)) == "deferred"
    assert state_of(TaskInstance({"train": None})) is None
    assert state_of(TaskInstance({})) == "removed"


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        ("running", True),
        ("restarting", True),
        ("up_for_retry", True),
        (None, True),
        ("failed", False),
        ("success", False),
    ],
)
def test_airflow_wants_the_work_until_the_task_has_ended(state: str | None, wanted: bool) -> None:
    assert is_wanted(TaskInstance({"train": state})) is wanted


def test_without_an_answer_the_work_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(TaskInstance):
        def get_task_states(self, **_: Any) -> dict[str, dict[str, Any]]:
            answered.wait()
            return {"r1": {"train": "failed"}}

    answered = threading.Event()
    monkeypatch.setattr(task_state, "_ANSWER_WITHIN_S", 0.05)
    assert is_wanted(Silent({}))
    answered.set()


def test_no_database_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "airflow.db"
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", f"sqlite:///{file}?timeout=60")
    assert states_in_database({TASK}) == {}
    assert not file.exists()
