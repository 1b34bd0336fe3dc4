"""What the API server is asked to make: pure functions from settings and a request to plain JSON.

Four layers lie over one another: defaults, the user's ``pod_template``, the runner's settings, and what must be so for
the door to open. A later one wins.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import Any

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Request, digest_of
from lepton_airflow.errors import BadConfiguration
from lepton_airflow.pods import (
    CONTAINER,
    IDENTITY,
    MANAGED_BY,
    MANAGER,
    NONCE,
    QUEUE,
    REQUEST,
    RUN_KEY,
    STAGE,
    SUBMISSION,
    TRY,
)
from lepton_airflow.pods.settings import OF_CONTAINER, OF_POD, OF_SPEC, PodSettings

HANDED_OVER = "/run/lepton"  # where request and Connections are mounted
WORK = "/work"
USER = 10001

_ROOM_S = (
    300  # activeDeadlineSeconds is the net below the clocks, so that one never ends what they would explain
)


def pod_base(
    settings: PodSettings, request: Request, template: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The pod of a request, but for what each submission draws anew.

    :param template: the pod that ``settings.pod_template`` names, which everything but the defaults lies over.
    """
    return merge(
        merge(merge(_defaults(), _with_container(template or {})), _wanted(settings)),
        _needed(settings, request),
    )


def check_store(request: Request, base: Mapping[str, Any]) -> None:
    """A store that is a folder must be mounted where the request says that it is."""
    scheme, found, path = request.store.rpartition("://")
    if found and scheme not in ("file", "local"):
        return
    mounts = [
        m["mountPath"]
        for c in base["spec"]["containers"]
        for m in c.get("volumeMounts") or ()
        if c["name"] == "stage" and m["name"] not in ("lepton", "lepton-work", "lepton-tmp")
    ]
    if not any(PurePosixPath(path).is_relative_to(mount) for mount in mounts):
        raise BadConfiguration(
            f"store {request.store!r} is a folder, which a pod does not see: mount it at the same path, "
            f'volumes=[{{"name": "store", "mount": {path!r}, "pvc": "…"}}], or set [lepton] store to s3://….'
        )


def request_digest(base: Mapping[str, Any], request: Request) -> str:
    """What a running pod must have been asked to do, and how, for another try to adopt it."""
    asked = replace(request, nonce="", identity=replace(request.identity, try_number=1))
    return digest_of([json.loads(asked.to_json()), base])


def submission(
    base: Mapping[str, Any],
    request: Request,
    connections: Sequence[Connection],
    *,
    number: int,
    nonce: str,
    try_id: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Secret and the pod of one submission.

    :param number: how often the run was submitted, this time included; it is in the pod's name, so that the API server
        lets only one of two creators through.
    """
    name = pod_name(request, number)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{name}-{nonce[:8]}", "labels": labels(request)},
        "type": "Opaque",
        "stringData": {
            "request.json": replace(request, nonce=nonce).to_json(),
            "connections.json": json.dumps([asdict(c) for c in connections]),
        },
    }
    identity = asdict(request.identity) | {"try": try_id}
    over = {
        "metadata": {
            "name": name,
            "annotations": {
                TRY: try_id,
                REQUEST: request_digest(base, request),
                NONCE: nonce,
                SUBMISSION: str(number),
                IDENTITY: json.dumps(identity),
            },
        },
        "spec": {"volumes": [_secret_volume(secret["metadata"]["name"])]},  # type: ignore[index]
    }
    return secret, merge(base, over)


def labels(request: Request) -> dict[str, str]:
    """The labels that a run's pods and Secrets are found by."""
    stage = re.sub(r"[^A-Za-z0-9_.-]", "-", request.stage.rpartition(":")[2])[:63].strip("-_.")
    return {MANAGED_BY: MANAGER, RUN_KEY: request.run_key, STAGE: stage}


def pod_name(request: Request, number: int) -> str:
    """A name that people recognise and that is taken at most once: DAG, task, run key, number of the submission."""
    end = f"{request.run_key}-{number}"
    slug = re.sub(r"[^a-z0-9]+", "-", f"{request.identity.dag_id}-{request.identity.task_id}".lower())
    return f"{slug[: 62 - len(end)].strip('-') or 'stage'}-{end}"


def secret_name(pod: Mapping[str, Any]) -> str | None:
    """The Secret that a pod was handed over."""
    for volume in pod["spec"].get("volumes") or ():
        if volume["name"] == "lepton":
            return volume.get("secret", {}).get("secretName")
    return None


def merge(base: Any, over: Any) -> Any:
    """``over`` laid over ``base``: mappings key by key, lists of named things by name; anything else is replaced."""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        return {
            key: merge(base[key], over[key]) if key in base and key in over else over.get(key, base.get(key))
            for key in [*base, *(k for k in over if k not in base)]
        }
    if isinstance(base, list) and isinstance(over, list) and (by := _named_by(base, over)):
        found = {item[by]: item for item in base}
        for item in over:
            found[item[by]] = merge(found.get(item[by], {}), item)
        return list(found.values())
    return over


def _named_by(*lists: list[Any]) -> str | None:
    """What tells the things of these lists apart: a mount is named by its path, all else by its name."""
    items = [item for each in lists for item in each]
    for name in ("mountPath", "name"):
        if items and all(isinstance(item, Mapping) and name in item for item in items):
            return name
    return None


def _defaults() -> dict[str, Any]:
    """What holds where nobody says otherwise: little rights, and folders to write in."""
    env = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # as in a process of the worker, see runners/subprocess.py
        "HOME": WORK,
        "TMPDIR": WORK,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {"fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"},
            "volumes": [{"name": "lepton-work", "emptyDir": {}}, {"name": "lepton-tmp", "emptyDir": {}}],
            "containers": [
                {
                    "name": CONTAINER,
                    "env": _env(env),
                    "resources": {
                        "requests": {"cpu": "500m", "memory": "2Gi"},
                        "limits": {"memory": "2Gi"},
                    },
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                        "readOnlyRootFilesystem": True,
                        "runAsGroup": USER,
                        "runAsNonRoot": True,
                        "runAsUser": USER,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "volumeMounts": [
                        {"name": "lepton-work", "mountPath": WORK},
                        {"name": "lepton-tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own, for what ignores TMPDIR
                    ],
                }
            ],
        },
    }


def _with_container(template: Mapping[str, Any]) -> dict[str, Any]:
    """The template with its container for the stage named so: the one that is, else the first."""
    spec = dict(template.get("spec") or {})
    containers = [dict(c) for c in spec.get("containers") or ()]
    if containers and all(c.get("name") != CONTAINER for c in containers):
        containers[0]["name"] = CONTAINER
    metadata = {k: v for k, v in (template.get("metadata") or {}).items() if k in ("labels", "annotations")}
    return {"metadata": metadata, "spec": spec | ({"containers": containers} if containers else {})}


def _wanted(settings: PodSettings) -> dict[str, Any]:
    """What the runner's settings say, without those that were left out."""
    security = settings.security
    requests = {"cpu": settings.cpu, "memory": settings.memory}
    limits = {"cpu": settings.cpu_limit, "memory": settings.memory_limit or settings.memory}
    if settings.gpus:
        requests[settings.gpu_resource] = limits[settings.gpu_resource] = str(settings.gpus)
    container = {
        "name": CONTAINER,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "env": _env(settings.env),
        "resources": _given({"requests": _given(requests), "limits": _given(limits)}),
        "securityContext": {k: v for k, v in security.items() if k in OF_CONTAINER},
        "volumeMounts": [
            _given({"name": v["name"], "mountPath": v["mount"], "readOnly": v.get("read_only")})
            for v in settings.volumes
        ],
    }
    spec = {
        "nodeSelector": dict(settings.node_selector),
        "tolerations": list(settings.tolerations),
        "affinity": dict(settings.affinity),
        "serviceAccountName": settings.service_account,
        "priorityClassName": settings.priority_class,
        "runtimeClassName": settings.runtime_class,
        "imagePullSecrets": [{"name": name} for name in settings.pull_secrets],
        "volumes": [{"name": v["name"], **_volume_source(v)} for v in settings.volumes],
        "securityContext": {k: v for k, v in security.items() if k in OF_POD},
        "containers": [_given(container)],
    }
    own = {k: v for k, v in security.items() if k in OF_SPEC}
    queue = {QUEUE: settings.queue} if settings.queue else {}
    metadata = {"labels": {**settings.labels, **queue}, "annotations": dict(settings.annotations)}
    return {"metadata": metadata, "spec": _given(spec) | own}


def _needed(settings: PodSettings, request: Request) -> dict[str, Any]:
    """What must be so, or the door does not open, or nobody finds the pod."""
    command = [settings.python, "-P", "-m", "lepton_airflow", "run", f"{HANDED_OVER}/request.json"]
    command += [f"{WORK}/receipt.json", "--connections-file", f"{HANDED_OVER}/connections.json"]
    return {
        "metadata": {"labels": labels(request)},
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": math.ceil(settings.start_timeout_s + settings.run_timeout_s) + _ROOM_S,
            "terminationGracePeriodSeconds": math.ceil(settings.grace_s),
            "volumes": [_secret_volume("")],
            "containers": [
                {
                    "name": CONTAINER,
                    "command": [*command, "--termination-message", "/dev/termination-log"],
                    "args": [],
                    "workingDir": WORK,
                    "terminationMessagePath": "/dev/termination-log",
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "volumeMounts": [{"name": "lepton", "mountPath": HANDED_OVER, "readOnly": True}],
                }
            ],
        },
    }


def _secret_volume(name: str) -> dict[str, Any]:
    # Readable for the group that fsGroup gives it: the stage's user is not the owner of a mounted Secret's files.
    return {"name": "lepton", "secret": {"secretName": name, "defaultMode": 0o440}}


def _volume_source(volume: Mapping[str, Any]) -> dict[str, Any]:
    forms: dict[str, Callable[[Any], dict[str, Any]]] = {
        "pvc": lambda name: {"persistentVolumeClaim": {"claimName": name}},
        "host_path": lambda path: {"hostPath": {"path": path}},
        "config_map": lambda name: {"configMap": {"name": name}},
        "secret": lambda name: {"secret": {"secretName": name}},
        "empty_dir": lambda options: {"emptyDir": dict(options or {})},
    }
    return next(form(volume[kind]) for kind, form in forms.items() if kind in volume)


def _env(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v not in (None, "", [], {})}
