from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Request, RunIdentity
from lepton_airflow.pods import IDENTITY, NONCE, REQUEST, RUN_KEY, STORE, SUBMISSION, TRY
from lepton_airflow.pods.manifest import (
    merge,
    pod_base,
    pod_key,
    pod_name,
    request_digest,
    secret_name,
    submission,
)
from lepton_airflow.runners import Pod

REQUESTED = Request(
    stage="TrainModel",
    parameters={"trainer": "mlp"},
    store="s3://lake/lepton",
    identity=RunIdentity(dag_id="Flights_Retrain", task_id="models.train", run_id="r1"),
    connections=("db",),
)
STORE_ID = "5" * 24
SECRET = Connection("db", "postgres", password="hunter2-of-the-lake")


def base(template: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return pod_base(Pod(image="stage:1", **settings), template)


def stage(manifest: dict[str, Any]) -> dict[str, Any]:
    return next(c for c in manifest["spec"]["containers"] if c["name"] == "stage")


def made(store_id: str = STORE_ID, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    names: dict[str, Any] = {"number": 2, "nonce": "n" * 32, "try_id": "try-7", "store_id": store_id}
    return submission(base(**settings), REQUESTED, [SECRET], **names)


def test_a_pod_has_few_rights_unless_it_is_given_more() -> None:
    spec = base()["spec"]
    assert stage(base())["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsGroup": 10001,
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert (spec["automountServiceAccountToken"], spec["restartPolicy"]) == (False, "Never")
    more = base(security={"runAsUser": 7, "fsGroup": 5, "automountServiceAccountToken": True})
    assert stage(more)["securityContext"]["runAsUser"] == 7
    assert stage(more)["securityContext"]["runAsNonRoot"] is True
    assert more["spec"]["securityContext"]["fsGroup"] == 5
    assert more["spec"]["automountServiceAccountToken"] is True


def test_every_setting_is_in_the_manifest() -> None:
    manifest = base(
        cpu="2",
        memory="4Gi",
        cpu_limit="3",
        memory_limit="6Gi",
        gpus=2,
        gpu_resource="amd.com/gpu",
        node_selector={"pool": "gpu"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
        affinity={"nodeAffinity": {}},
        service_account="trainer",
        priority_class="high",
        runtime_class="nvidia",
        volumes=[
            {"name": "data", "mount": "/data", "pvc": "claim", "read_only": True},
            {"name": "shm", "mount": "/dev/shm", "empty_dir": {"medium": "Memory"}},
        ],
        env={"OMP_NUM_THREADS": "2", "HOME": "/data/home"},
        pull_secrets=["registry"],
        image_pull_policy="Always",
        labels={"team": "ml"},
        annotations={"note": "x"},
        queue="gpus",
        grace_s=90.5,
        start_timeout_s=100,
        run_timeout_s=1000,
        python="/opt/python",
    )
    spec, container = manifest["spec"], stage(manifest)
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "4Gi", "amd.com/gpu": "2"},
        "limits": {"cpu": "3", "memory": "6Gi", "amd.com/gpu": "2"},
    }
    assert (spec["nodeSelector"], spec["priorityClassName"]) == ({"pool": "gpu"}, "high")
    assert (spec["serviceAccountName"], spec["runtimeClassName"]) == ("trainer", "nvidia")
    assert spec["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert spec["affinity"] == {"nodeAffinity": {}}
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert {"name": "data", "persistentVolumeClaim": {"claimName": "claim"}} in spec["volumes"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in spec["volumes"]
    assert {"name": "data", "mountPath": "/data", "readOnly": True} in container["volumeMounts"]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert (env["HOME"], env["OMP_NUM_THREADS"], env["TMPDIR"]) == ("/data/home", "2", "/work")
    labels = manifest["metadata"]["labels"]
    assert (labels["team"], labels["kueue.x-k8s.io/queue-name"]) == ("ml", "gpus")
    assert manifest["metadata"]["annotations"] == {"note": "x"}
    assert (spec["terminationGracePeriodSeconds"], spec["activeDeadlineSeconds"]) == (91, 1400)
    assert (container["image"], container["imagePullPolicy"]) == ("stage:1", "Always")
    assert container["command"][:4] == ["/opt/python", "-P", "-m", "lepton_airflow"]


def test_settings_lie_over_the_template_and_the_template_over_the_defaults() -> None:
    template = {
        "metadata": {"name": "mine", "labels": {"team": "ml"}},
        "spec": {
            "nodeSelector": {"pool": "cpu", "disk": "ssd"},
            "initContainers": [{"name": "fetch", "image": "busybox"}],
            "containers": [
                {
                    "name": "base",
                    "image": "theirs",
                    "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "1"}],
                    "resources": {"limits": {"memory": "8Gi"}},
                    "securityContext": {"runAsUser": 5000},
                    "command": ["sleep"],
                },
                {"name": "proxy", "image": "envoy"},
            ],
        },
    }
    manifest = base(template, node_selector={"pool": "gpu"}, env={"B": "2"})
    container = stage(manifest)
    assert [c["name"] for c in manifest["spec"]["containers"]] == ["stage", "proxy"]
    assert manifest["spec"]["initContainers"] == [{"name": "fetch", "image": "busybox"}]
    assert manifest["spec"]["nodeSelector"] == {"pool": "gpu", "disk": "ssd"}
    env = {e["name"]: e["value"] for e in container["env"]}
    assert (env["A"], env["B"]) == ("1", "2")
    assert container["resources"]["limits"]["memory"] == "8Gi"
    assert container["securityContext"]["runAsUser"] == 5000
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert (container["image"], container["command"][0]) == ("stage:1", "python")
    assert manifest["metadata"]["labels"]["team"] == "ml"
    assert "name" not in manifest["metadata"]


def test_secrets_are_in_the_secret_and_nowhere_in_the_pod() -> None:
    secret, pod = made()
    assert json.loads(secret["stringData"]["connections.json"])[0]["password"] == SECRET.password
    assert SECRET.password not in json.dumps(pod)
    assert json.loads(secret["stringData"]["request.json"])["nonce"] == "n" * 32
    assert secret_name(pod) == secret["metadata"]["name"]
    key = pod_key(REQUESTED, STORE_ID)
    assert secret["metadata"]["labels"][RUN_KEY] == pod["metadata"]["labels"][RUN_KEY] == key
    assert secret["metadata"]["labels"][STORE] == pod["metadata"]["labels"][STORE] == STORE_ID


def test_equal_runs_of_two_installations_have_pods_of_their_own() -> None:
    ours, theirs = made()[1], made(store_id="theirs")[1]
    assert ours["metadata"]["name"] != theirs["metadata"]["name"]
    assert ours["metadata"]["labels"][RUN_KEY] != theirs["metadata"]["labels"][RUN_KEY]


def test_a_pod_says_whose_it_is() -> None:
    notes = made()[1]["metadata"]["annotations"]
    assert (notes[TRY], notes[NONCE], notes[SUBMISSION]) == ("try-7", "n" * 32, "2")
    assert json.loads(notes[IDENTITY])["task_id"] == "models.train"


def test_equal_requests_have_equal_digests_whatever_the_try() -> None:
    digest = made()[1]["metadata"]["annotations"][REQUEST]
    later = replace(REQUESTED, nonce="z", identity=replace(REQUESTED.identity, try_number=4))
    assert request_digest(pod_base(Pod(image="stage:1")), later) == digest
    other = replace(REQUESTED, parameters={"trainer": "linear_regression"})
    assert request_digest(pod_base(Pod(image="stage:1")), other) != digest
    assert request_digest(base(memory="3Gi"), REQUESTED) != digest


@pytest.mark.parametrize("task_id", ["train", "t" * 200, "__Größe__", "---"])
def test_names_are_dns_labels(task_id: str) -> None:
    name = pod_name(replace(REQUESTED, identity=replace(REQUESTED.identity, task_id=task_id)), 12, STORE_ID)
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name)
    assert name.endswith("-12")


def test_merge_knows_mounts_by_their_path_and_things_by_their_name() -> None:
    under = {
        "volumeMounts": [{"name": "a", "mountPath": "/x"}, {"name": "a", "mountPath": "/y"}],
        "args": ["1", "2"],
    }
    over = {"volumeMounts": [{"name": "b", "mountPath": "/y"}], "args": ["3"]}
    assert merge(under, over) == {
        "volumeMounts": [{"name": "a", "mountPath": "/x"}, {"name": "b", "mountPath": "/y"}],
        "args": ["3"],
    }
