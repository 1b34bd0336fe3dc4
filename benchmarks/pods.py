"""What a stage's pod costs Airflow: parsing its DAG, starting its container, waiting for it without a worker slot.

`parse_ratio_vs_kpo` and `parse_ratio_vs_empty` are the CPU time of a fresh interpreter that imports
`dags/flights_retrain_pods.py` (12 tasks) over that of one that imports the same DAG made of plain `KubernetesPodOperator`s, and
of `EmptyOperator`s: medians of alternating runs. Most of that time is `airflow.sdk` itself, so `parse_added_seconds` gives the CPU
time that the file costs a process that has already imported it, as Airflow's DAG processor has. `seconds_to_container_start` is the
time from the start of the task, by Airflow's clock, to the start of the container, which the kubelet gives in whole seconds: medians
of alternating runs. `triggerer_mib_per_deferred_pod` is the memory that the triggerer's processes hold for themselves (USS) with 50
tasks deferred whose pods wait for a node, less what they held before, divided by the number of tasks. Both are measured on the cluster
of `$KUBECONFIG`, in the image of `$LEPTON_TEST_IMAGE`.
"""

from __future__ import annotations

import os
import re
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path

from parse import _cpu_s, _warm_s

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "cluster"))

import disturb  # noqa: E402 - the arena of the drills
from disturb import Arena  # noqa: E402

from lepton_airflow.testing import LocalAirflow, LocalPostgres  # noqa: E402
from lepton_airflow.testing.local_postgres import pg_ctl  # noqa: E402

GOALS = {"parse_ratio_vs_kpo": "at most 0.55", "parse_ratio_vs_empty": "at most 1.15"}
DAG_FILE = ROOT / "dags" / "flights_retrain_pods.py"
ROUNDS = 9
STARTS = 5
DEFERRED = 50
IMAGE = os.environ.get("LEPTON_TEST_IMAGE", "localhost/lepton-stage:all")


def lacks() -> str:
    """What is missing here to run it."""
    return (
        ""
        if os.environ.get("KUBECONFIG")
        else "a cluster: set KUBECONFIG to the kubeconfig of one, such as kind's"
    )


def measure() -> dict[str, float]:
    """Parsing in turns; then, on one Airflow and one cluster, starts in turns and the triggerer's memory."""
    numbers = _parsing()
    with arenas() as both:
        numbers |= _starts(both)
        for name, arena in both.items():
            numbers[f"triggerer_mib_per_deferred_pod{name}"] = _memory(arena)
    return numbers


def _parsing() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        files = {"ours": DAG_FILE, "kpo": Path(folder, "kpo.py"), "empty": Path(folder, "empty.py")}
        files["kpo"].write_text(_twin(DAG_FILE.read_text(), _KPO_IMPORT, _KPO))
        files["empty"].write_text(_twin(DAG_FILE.read_text(), _EMPTY_IMPORT, _EMPTY))
        seconds: dict[str, list[float]] = {name: [] for name in files}
        for file in files.values():
            _cpu_s(file)  # the first run also reads files from disk
        added: dict[str, list[float]] = {name: [] for name in files}
        for _ in range(ROUNDS):
            for name, file in files.items():
                seconds[name].append(_cpu_s(file))
                added[name].append(_warm_s(file))
    for name, each in seconds.items():
        print(f"{name:<5} {[round(s, 2) for s in each]} s CPU")
    median = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "parse_ratio_vs_kpo": round(median["ours"] / median["kpo"], 3),
        "parse_ratio_vs_empty": round(median["ours"] / median["empty"], 3),
        "parse_cpu_seconds": round(median["ours"], 2),
        "parse_cpu_seconds_kpo": round(median["kpo"], 2),
        "parse_cpu_seconds_empty": round(median["empty"], 2),
        "parse_added_seconds": round(statistics.median(added["ours"]), 3),
        "parse_added_seconds_kpo": round(statistics.median(added["kpo"]), 3),
        "parse_added_seconds_empty": round(statistics.median(added["empty"]), 3),
    }


_EMPTY_IMPORT = "from airflow.providers.standard.operators.empty import EmptyOperator\n"
_EMPTY = 'EmptyOperator(task_id="{name}")'
_KPO_IMPORT = (
    "from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator\n"
    "from kubernetes.client import models as k8s\n"
)
_KPO = (
    'KubernetesPodOperator(task_id="{name}", name="{name}", image="{{{{ var.value.flights_image }}}}", '
    'namespace="{{{{ var.value.flights_namespace }}}}", cmds=["python", "-m", "stage"], arguments=["{name}"], '
    'container_resources=k8s.V1ResourceRequirements(requests={{"cpu": "1", "memory": "2Gi"}}))'
)


def _twin(source: str, imports: str, operator: str) -> str:
    """The same DAG of other operators: every task id, param, schedule and dependency stays, the stages' arguments go."""
    head, body = source.split("with DAG(", 1)
    dag, tasks = body.split("):\n", 1)
    head = re.sub(r"from lepton_airflow\.operators import \(.*?\)\n", "", head, flags=re.DOTALL)
    head = head.replace("from lepton_airflow.runners import Pod\n", "").partition("\ndef pod(")[0]
    dag = dag.replace(', "runner": SMALL', "")
    found = re.findall(r"^    (\w+) = \w+Operator\((.*?)^    \)$", tasks, re.MULTILINE | re.DOTALL)
    assert len(found) == 12, f"{len(found)} tasks found in the DAG file"
    names = [name for name, _ in found]
    lines = [f"    {name} = {operator.format(name=name)}" for name in names]
    lines += [
        f"    {upstream} >> {name}"
        for name, arguments in found
        for upstream in dict.fromkeys(re.findall(r"(\w+)\.output\[", arguments))
    ]
    lines += [line for line in tasks.splitlines() if re.fullmatch(r"    \w+( >> \w+)+", line)]
    return f"{head}\n{imports}\nwith DAG({dag}):\n" + "\n".join(lines) + "\n"


@contextmanager
def arenas() -> Iterator[dict[str, Arena]]:
    """Our pods' arena (``""``) and plain ones' (``"_kpo"``), on one Airflow and in one new namespace."""
    namespace = f"lepton-bench-{secrets.token_hex(4)}"
    disturb.kubectl("create", "namespace", namespace)
    before = os.umask(0)  # pods are another user
    try:
        with (
            tempfile.TemporaryDirectory(prefix="lepton-bench-") as folder,
            LocalPostgres() if pg_ctl() else nullcontext() as server,
        ):
            database = server.new_database() if server else None
            shared = Path(folder, "shared")
            shared.mkdir(mode=0o777)
            Path(folder).chmod(0o755)
            environment = disturb.environment(IMAGE, namespace, shared, plain=True)
            dags = ROOT / "tests" / "cluster" / "bundle"
            with LocalAirflow(
                Path(folder, "airflow"), dags, parallelism=4, env=environment, database=database
            ) as airflow:
                for kind in ("drill", "plain"):
                    for how in ("sync", "deferred", "impatient"):
                        airflow.wait_for_dag(f"{kind}_{how}")
                with (
                    disturb.arena(airflow, namespace, shared, "drill") as ours,
                    disturb.arena(airflow, namespace, shared, "plain") as plain,
                ):
                    yield {"": ours, "_kpo": plain}
    finally:
        os.umask(before)
        disturb.kubectl("delete", "namespace", namespace, "--wait=false")


def _starts(both: dict[str, Arena]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(STARTS):
        for name, arena in both.items():
            task = arena.start("sync")
            task.until_it_runs()
            task.go()
            task.end()
            state = arena.pods_of(task.drill)[0]["status"]["containerStatuses"][0]["state"]
            began = (state.get("terminated") or state.get("running"))["startedAt"]
            seconds[name].append(_moment(began) - _moment(task.instance["start_date"]))
    print({name: [round(s, 1) for s in each] for name, each in seconds.items()})
    return {
        f"seconds_to_container_start{name}": round(statistics.median(each), 1)
        for name, each in seconds.items()
    }


def _moment(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def _memory(arena: Arena) -> float:
    """MiB that the triggerer holds for one more deferred task, on an otherwise idle Airflow."""
    airflow = arena.airflow
    airflow.stop_component("triggerer")
    airflow.start_component("triggerer")
    before = _settled_mib(airflow)
    tasks = [arena.start("deferred", cpu="1000") for _ in range(DEFERRED)]
    for task in tasks:
        task.until_state("deferred")
    airflow.until(lambda: len(arena.pods) >= DEFERRED, f"{DEFERRED} pods", 300)
    held = _settled_mib(airflow)
    for task in tasks:
        path = f"/dags/{task.dag}/dagRuns/{task.run}/taskInstances/stage"
        airflow.api("PATCH", path, {"new_state": "failed"})
    print(f"{arena.kind}: triggerer {before:.0f} MiB, with {len(tasks)} deferred {held:.0f} MiB")
    return round((held - before) / DEFERRED, 2)


def _settled_mib(airflow: LocalAirflow) -> float:
    """MiB that the triggerer's processes have for themselves, once that has stopped to grow."""
    latest: list[float] = []

    def settled() -> bool:
        time.sleep(2)
        latest.append(_uss_mib(airflow.pid("triggerer") or 0))
        return len(latest) > 5 and max(latest[-5:]) - min(latest[-5:]) < 1

    airflow.until(settled, "the triggerer to settle", 180)
    return latest[-1]


def _uss_mib(pid: int) -> float:
    import psutil

    leader = psutil.Process(pid)
    return sum(p.memory_full_info().uss for p in [leader, *leader.children(recursive=True)]) / 2**20
