"""What Airflow says of a task instance: to the task itself, and in Airflow's database."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

Task = tuple[str, str, str, int]  # dag_id, task_id, run_id, map_index

# The states in which Airflow has no more use for a task's work. `restarting` is not among them: the next try adopts.
ENDED = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})


def state_of(ti: Any) -> str | None:
    """The state that Airflow has for a task instance now; ``removed`` when it knows the task instance no more."""
    found = ti.get_task_states(
        dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
    )
    states = found.get(ti.run_id, {})
    mapped = ti.map_index is not None and ti.map_index >= 0
    state = states.get(f"{ti.task_id}_{ti.map_index}" if mapped else ti.task_id, "removed")
    return None if state is None else str(getattr(state, "value", state))


def wanted(ti: Any) -> bool:
    """Whether Airflow still wants the task, or does not say so in time.

    Asked in a thread: this may run in a signal handler that has interrupted another question of the same process,
    whose lock would then never be free.
    """
    answers: list[str | None] = []
    asking = threading.Thread(target=lambda: answers.append(state_of(ti)), daemon=True)
    asking.start()
    asking.join(2.0)
    return not answers or answers[0] not in ENDED


def task_states(tasks: set[Task]) -> dict[Task, str]:
    """The states of those task instances that Airflow's database knows; nothing where there is no such database.

    A task instance that waits to be run again (cleared, or up for retry) has not ended.
    """
    try:
        from airflow.configuration import conf
        from airflow.models.taskinstance import TaskInstance
        from airflow.utils.session import create_session
        from sqlalchemy import select
        from sqlalchemy.exc import SQLAlchemyError
    except ModuleNotFoundError:  # no Airflow on this machine
        return {}
    database = conf.get("database", "sql_alchemy_conn", fallback="") or ""
    file = database.partition("sqlite:///")[2].partition("?")[0]
    if not tasks or not database or (file and not Path(file).exists()):  # SQLite would make an empty one
        return {}
    rows = select(
        TaskInstance.dag_id,
        TaskInstance.task_id,
        TaskInstance.run_id,
        TaskInstance.map_index,
        TaskInstance.state,
    ).where(TaskInstance.run_id.in_({run_id for _, _, run_id, _ in tasks}))
    try:
        with create_session() as session:
            found = {
                (d, t, r, m): str(getattr(s, "value", s) or "none") for d, t, r, m, s in session.execute(rows)
            }
    except SQLAlchemyError:  # unreachable, or no Airflow's
        return {}
    return {task: found[task] for task in tasks & found.keys()}
