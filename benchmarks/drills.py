"""What becomes of a task in a pod when it is disturbed: `Pod` and a plain `KubernetesPodOperator`, side by side.

Each disturbance is produced once, on a real Airflow (missing heartbeats noticed after 15 s, `retries=1`) and the cluster of
`$KUBECONFIG`, with the image of `$LEPTON_TEST_IMAGE`. A cell gives the task's final state, the number of pods that were ever made for
it, how many of them still ran when it had ended, the number of tries, and the seconds that it took. The stage waits for a file and ends
when the disturbance is over. `tests/cluster/test_drills.py` asserts the last column.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pods import arenas, lacks

GOALS: dict[str, str] = {}

import disturb  # noqa: E402 - pods has put the drills on the path
from disturb import Arena, Outcome  # noqa: E402

TOGETHER: dict[str, Callable[..., Outcome]] = {
    "undisturbed": disturb.undisturbed,
    "pod deleted in the middle": disturb.pod_deleted,
    "evicted through the API": disturb.evicted,
    "out of memory (64 MiB)": disturb.out_of_memory,
    "image that does not exist": disturb.no_image,
    "request that no node can meet": disturb.unschedulable,
    "full quota, free later": disturb.full_quota,
    "namespace that does not exist": disturb.wrong_namespace,
    "RBAC denied": disturb.rbac_denied,
    "exit code 0 without the work": disturb.no_receipt,
    "marked failed": disturb.marked_failed,
    "cleared": disturb.cleared,
    "API server away for 20 s": disturb.api_server_away,
}
IMPATIENT = {disturb.no_image, disturb.unschedulable}  # their DAGs have short clocks
__all__ = ["GOALS", "lacks", "measure", "report"]
COLUMNS = ("plain sync", "plain deferred", "Pod sync", "Pod deferred")


def measure() -> dict[str, Any]:
    """All drills: those that disturb nobody else at once, column by column; the killed components after them."""
    cells: dict[str, dict[str, str]] = {}

    def note(drill: str, column: str, run: Callable[[], Outcome]) -> None:
        try:
            o = run()
            cell = f"{o.state}, pods {o.pods}, left {o.alive}, tries {o.tries}, {o.seconds:.0f} s"
        except Exception as error:  # noqa: BLE001 - a drill that does not come to its end is a result too
            cell = f"no end: {str(error).partition(';')[0]}"
        cells.setdefault(drill, {})[column] = cell
        print(f"{column}: {drill}: {cell}", flush=True)

    with arenas() as both:
        for column in COLUMNS:
            kind, how = column.split()
            arena: Arena = both["_kpo" if kind == "plain" else ""]
            with ThreadPoolExecutor(6) as pool:
                for drill, done in TOGETHER.items():
                    if done in IMPATIENT and how == "sync":
                        continue  # the short clocks are those of the deferred DAG
                    where = "impatient" if done in IMPATIENT else how
                    pool.submit(note, drill, column, partial(done, arena, where))
            killed = ("worker",) if how == "sync" else ("triggerer", "scheduler")
            for name in killed:
                kill = (
                    partial(disturb.worker_killed, arena, how)
                    if name == "worker"
                    else partial(disturb.component_killed, arena, how, name)
                )
                note(f"kill -9 of the {name}", column, kill)
    return {"drills": len(cells), "cells": cells}


def report(numbers: dict[str, Any]) -> str:
    """The outcomes as one table."""
    rows = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for drill, cells in numbers["cells"].items():
        rows.append(f"| {drill} | {' | '.join(cells.get(c, '') for c in COLUMNS)} |")
    return "\n".join(rows)
