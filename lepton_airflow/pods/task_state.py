"""What Airflow says of a task: to a worker or triggerer through its API, and in its database."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

TaskKey = tuple[str, str, str, int]  # dag_id, task_id, run_id, map_index

DEFERRED = "deferred"
# Airflow has no more use for the work of a task in one of these states. `restarting`, `up_for_retry` and a cleared task
# (no state) are not among them: their next try adopts the pod.
ENDED = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})

_ANSWER_WITHIN_S = 2.0  # Airflow sends SIGKILL five seconds after SIGTERM


def state_of(ti: Any) -> str | None:
    """The current state of a task instance in Airflow; ``removed`` when Airflow no longer knows it.

    :param ti: the task instance in Airflow's context.
    """
    found = ti.get_task_states(
        dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
    )
    states = found.get(ti.run_id, {})
    mapped = ti.map_index is not None and ti.map_index >= 0
    state = states.get(f"{ti.task_id}_{ti.map_index}" if mapped else ti.task_id, "removed")
    return None if state is None else str(getattr(state, "value", state))


def is_wanted(ti: Any) -> bool:
    """Whether Airflow still wants the work of a task instance; also true when it does not answer within two seconds.

    Asked in a thread: this may run in a signal handler that has interrupted another call of the same process, and would
    wait forever for the lock which that call holds.
    """
    answers: list[str | None] = []
    asking = threading.Thread(target=lambda: answers.append(state_of(ti)), daemon=True)
    asking.start()
    asking.join(_ANSWER_WITHIN_S)
    return not answers or answers[0] not in ENDED


def states_in_database(tasks: set[TaskKey]) -> dict[TaskKey, str]:
    """The states of those task instances that Airflow's database knows; empty where there is no such database.

    A task instance that waits to run again (cleared, or up for retry) has not ended; a cleared one has the state ``none``.
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
    # SQLite would create a missing file.
    if not tasks or not database or (file and not Path(file).exists()):
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
    except SQLAlchemyError:  # the database does not answer, or is not Airflow's
        return {}
    return {task: found[task] for task in tasks & found.keys()}
