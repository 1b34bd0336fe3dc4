"""The drills' DAGs: one task each, in a pod of ours and in one of a plain KubernetesPodOperator, sync and deferred."""

import json
import os
import sys
from datetime import UTC, datetime, timedelta

from airflow.sdk import DAG, Param

from lepton_airflow.operators import StageOperator
from lepton_airflow.runners import Pod

DRILLS = json.loads(os.environ["LEPTON_DRILLS"])  # what test_drills.py found: image, volume, code
sys.path.append(DRILLS["code"])

from drill_stages import WaitForFile  # noqa: E402 - beside the tests, not in a package


class WaitForFileOperator(StageOperator, stage=WaitForFile):
    pass


COMMON = {
    "schedule": None,
    "start_date": datetime(2026, 1, 1, tzinfo=UTC),
    "default_args": {"retries": 1, "retry_delay": timedelta(seconds=1)},
    "params": {
        "drill": Param("drill", type="string"),
        "folder": Param("", type="string"),
        "namespace": Param(DRILLS["namespace"], type="string"),
        "image": Param(DRILLS["image"], type="string"),
        "memory": Param("300Mi", type="string"),
        "cpu": Param("20m", type="string"),
        "megabytes": Param(0, type="integer"),
        "config_file": Param(DRILLS["config_file"], type="string"),
        "python": Param("python", type="string"),
    },
}


def pod(**settings: object) -> Pod:
    return Pod(
        image="{{ params.image }}",
        image_pull_policy="IfNotPresent",
        namespace="{{ params.namespace }}",
        cpu="{{ params.cpu }}",
        memory="{{ params.memory }}",
        python="{{ params.python }}",
        config_file="{{ params.config_file }}",
        labels={"drill": "{{ params.drill }}"},
        env={"PYTHONPATH": DRILLS["code"]},
        volumes=[{"name": "shared", "mount": DRILLS["shared"], "host_path": DRILLS["shared"]}],
        security=DRILLS["security"],
        grace_s=3,
        **settings,
    )


FETCH = {  # before the stage, as a team's own image might fetch something
    "name": "fetch",
    "image": DRILLS["image"],
    "imagePullPolicy": "IfNotPresent",
    "command": ["python", "-c", "for n in range(500): print(f'fetched part {n} of 500')"],
}
PREPARED = {"spec": {"initContainers": [FETCH]}}

for name, settings in {
    "sync": {"deferrable": False},
    "deferred": {"deferrable": True},
    "prepared_sync": {"deferrable": False, "pod_template": PREPARED},
    "prepared_deferred": {"deferrable": True, "pod_template": PREPARED},
    "impatient": {"deferrable": True, "schedule_timeout_s": 10.0, "start_timeout_s": 15.0},
}.items():
    with DAG(f"drill_{name}", **COMMON):
        WaitForFileOperator(
            task_id="stage",
            folder="{{ params.folder }}",
            megabytes="{{ params.megabytes }}",
            runner=pod(**settings),
        )

if DRILLS["plain"]:  # only where the benchmark compares: this import is what Pod spares every parse
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
    from kubernetes.client import models as k8s

    for name in ("sync", "deferred", "impatient"):
        with DAG(f"plain_{name}", **COMMON):
            KubernetesPodOperator(
                task_id="stage",
                name="{{ params.drill }}",
                namespace="{{ params.namespace }}",
                image="{{ params.image }}",
                image_pull_policy="IfNotPresent",
                config_file="{{ params.config_file }}",
                labels={"drill": "{{ params.drill }}"},
                cmds=["{{ params.python }}", "-c"],
                arguments=[
                    "import drill_stages; drill_stages.wait_for_file('{{ params.folder }}', {{ params.megabytes }})"
                ],
                env_vars={"PYTHONPATH": DRILLS["code"]},
                container_resources=k8s.V1ResourceRequirements(
                    requests={"cpu": "{{ params.cpu }}", "memory": "{{ params.memory }}"},
                    limits={"memory": "{{ params.memory }}"},
                ),
                volumes=[
                    k8s.V1Volume(name="shared", host_path=k8s.V1HostPathVolumeSource(path=DRILLS["shared"]))
                ],
                volume_mounts=[k8s.V1VolumeMount(name="shared", mount_path=DRILLS["shared"])],
                termination_grace_period=3,
                deferrable=name != "sync",
                poll_interval=2,
                schedule_timeout_seconds=10 if name == "impatient" else 300,
                startup_timeout_seconds=15 if name == "impatient" else 600,
            )
