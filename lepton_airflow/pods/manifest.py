"""What the API server is asked to create: pure functions from settings and a request to plain JSON.

A pod is merged from four layers, of which a later one wins: the defaults, the user's ``pod_template``, the runner's
settings, and what the entry point needs to start and to be found.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
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
    STORE,
    SUBMISSION,
    TRY,
)
from lepton_airflow.pods.settings import OF_CONTAINER, OF_POD, OF_SPEC, PodSettings

HANDED_OVER = "/run/lepton"  # where the Secret with the request and the Connections is mounted
WORK = "/work"
USER = 10001

_VOLUME_OF_SECRET, _VOLUME_OF_WORK, _VOLUME_OF_TMP = "lepton", "lepton-work", "lepton-tmp"
# activeDeadlineSeconds lies so much above the clocks that they end a pod first, and can say why.
_DEADLINE_MARGIN_S = 300


def pod_base(settings: PodSettings, template: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The pod that these settings make, without what belongs to one request.

    :param template: the pod that ``settings.pod_template`` names; only the defaults lie below it.
    """
    layers = (
        _defaults(),
        _from_template(template or {}),
        _from_settings(settings),
        _required(settings),
    )
    return reduce(merge, layers)


def check_store(request: Request, base: Mapping[str, Any]) -> None:
    """Raise BadConfiguration when the store is a folder that the pod does not mount at the same path."""
    scheme, found, path = request.store.rpartition("://")
    if found and scheme not in ("file", "local"):
        return
    mounts = [
        m["mountPath"]
        for c in base["spec"]["containers"]
        for m in c.get("volumeMounts") or ()
        if c["name"] == CONTAINER and m["name"] not in (_VOLUME_OF_SECRET, _VOLUME_OF_WORK, _VOLUME_OF_TMP)
    ]
    if not any(PurePosixPath(path).is_relative_to(mount) for mount in mounts):
        raise BadConfiguration(
            f"store {request.store!r} is a folder, which a pod does not see: mount it at the same path, "
            f'volumes=[{{"name": "store", "mount": {path!r}, "pvc": "…"}}], or set [lepton] store to s3://….'
        )


def request_digest(base: Mapping[str, Any], request: Request) -> str:
    """Digest of what a pod is asked to do, and how; a later try adopts the pod if its own digest is equal."""
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
    store_id: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Secret and the pod of one submission.

    :param number: how often the run has been submitted, this time included. It is in the pod's name, so when two tries
        create the same submission, the API server refuses the second.
    :param store_id: what tells the run's store from others (:func:`~lepton_airflow.store.identity.identity_of`).
    """
    name = pod_name(request, number, store_id)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{name}-{nonce[:8]}", "labels": labels(request, store_id)},
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
            "labels": labels(request, store_id),
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


def pod_key(request: Request, store_id: str) -> str:
    """What a run's pods and Secrets are known by: its run key and its store.

    Two Airflows with the same DAGs have equal run keys, unless ``[lepton] deployment`` tells them apart. In one namespace each would
    take the other's pods for its own.
    """
    return digest_of([store_id, request.run_key])[:24]


def labels(request: Request, store_id: str) -> dict[str, str]:
    """The labels by which a run's pods and Secrets are found."""
    stage = re.sub(r"[^A-Za-z0-9_.-]", "-", request.stage.rpartition(":")[2])[:63].strip("-_.")
    return {MANAGED_BY: MANAGER, RUN_KEY: pod_key(request, store_id), STORE: store_id, STAGE: stage}


def pod_name(request: Request, number: int, store_id: str) -> str:
    """A name that people recognise and that exists once: DAG, task, key of the run, number of the submission."""
    end = f"{pod_key(request, store_id)}-{number}"
    slug = re.sub(r"[^a-z0-9]+", "-", f"{request.identity.dag_id}-{request.identity.task_id}".lower())
    return f"{slug[: 62 - len(end)].strip('-') or 'stage'}-{end}"


def secret_name(pod: Mapping[str, Any]) -> str | None:
    """The Secret that holds a pod's request and Connections."""
    for volume in pod["spec"].get("volumes") or ():
        if volume["name"] == _VOLUME_OF_SECRET:
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
    """The key that names the items of these lists: ``mountPath`` for mounts, else ``name``; None if some have no name."""
    items = [item for each in lists for item in each]
    for name in ("mountPath", "name"):
        if items and all(isinstance(item, Mapping) and name in item for item in items):
            return name
    return None


def _defaults() -> dict[str, Any]:
    """The default pod: few rights, and two writable folders."""
    env = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # see runners/subprocess.py
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
            "volumes": [{"name": _VOLUME_OF_WORK, "emptyDir": {}}, {"name": _VOLUME_OF_TMP, "emptyDir": {}}],
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
                        {"name": _VOLUME_OF_WORK, "mountPath": WORK},
                        # For programs that ignore TMPDIR.
                        {"name": _VOLUME_OF_TMP, "mountPath": "/tmp"},  # noqa: S108 - the pod's own
                    ],
                }
            ],
        },
    }


def _from_template(template: Mapping[str, Any]) -> dict[str, Any]:
    """The template's labels, annotations and spec; without a container named ``stage``, its first one gets that name."""
    spec = dict(template.get("spec") or {})
    containers = [dict(c) for c in spec.get("containers") or ()]
    if containers and all(c.get("name") != CONTAINER for c in containers):
        containers[0]["name"] = CONTAINER
    metadata = {k: v for k, v in (template.get("metadata") or {}).items() if k in ("labels", "annotations")}
    return {"metadata": metadata, "spec": spec | ({"containers": containers} if containers else {})}


def _from_settings(settings: PodSettings) -> dict[str, Any]:
    """The pod as far as the runner's settings describe it."""
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
        "resources": _without_empty({"requests": _without_empty(requests), "limits": _without_empty(limits)}),
        "securityContext": {k: v for k, v in security.items() if k in OF_CONTAINER},
        "volumeMounts": [
            _without_empty({"name": v["name"], "mountPath": v["mount"], "readOnly": v.get("read_only")})
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
        "containers": [_without_empty(container)],
    }
    own = {k: v for k, v in security.items() if k in OF_SPEC}
    queue = {QUEUE: settings.queue} if settings.queue else {}
    metadata = {"labels": {**settings.labels, **queue}, "annotations": dict(settings.annotations)}
    return {"metadata": metadata, "spec": _without_empty(spec) | own}


def _required(settings: PodSettings) -> dict[str, Any]:
    """What the entry point needs to start, and we to read how it ended."""
    command = [settings.python, "-P", "-m", "lepton_airflow", "run", f"{HANDED_OVER}/request.json"]
    command += [f"{WORK}/receipt.json", "--connections-file", f"{HANDED_OVER}/connections.json"]
    return {
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": math.ceil(settings.start_timeout_s + settings.run_timeout_s)
            + _DEADLINE_MARGIN_S,
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
                    "volumeMounts": [{"name": _VOLUME_OF_SECRET, "mountPath": HANDED_OVER, "readOnly": True}],
                }
            ],
        },
    }


def _secret_volume(name: str) -> dict[str, Any]:
    # Root owns the files of a mounted Secret. The stage's user reads them through the group that fsGroup gives them.
    return {"name": _VOLUME_OF_SECRET, "secret": {"secretName": name, "defaultMode": 0o440}}


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


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v not in (None, "", [], {})}
