"""Where a Connection's secrets go on their way from Airflow to a pod: into one Secret, and nowhere else."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sqlite3
import time
import urllib.parse
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.connections import Connection
from lepton_airflow.testing import LocalAirflow

pytestmark = pytest.mark.airflow

PASSWORD = 'correct h0rse/bättery "%staple'  # with all that needs quoting somewhere


def _forms(secret: str) -> list[bytes]:
    """The ways in which a secret may be written."""
    raw = secret.encode()
    written = [
        *(secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]),
        *(urllib.parse.quote(secret, safe=""), urllib.parse.quote_plus(secret), raw.hex()),
        base64.b64encode(raw).decode(),
    ]
    return [form.encode() for form in dict.fromkeys(written)]


def _triggers(database: Path, key: bytes) -> set[str]:
    """What Airflow has written about the triggers that wait now, as it is and, where it is encrypted, decrypted."""
    from cryptography.fernet import Fernet

    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as db:
        rows = db.execute("SELECT classpath, kwargs FROM trigger").fetchall()
    plain = Fernet(key).decrypt
    return {
        f"{path} {text if text.startswith('{') else plain(text.encode()).decode()}" for path, text in rows
    }


def test_a_secret_is_in_one_mounted_file_and_nowhere_else(
    cluster: Any, namespace: str, s3: Connection, bucket: str, tmp_path: Path
) -> None:
    from cryptography.fernet import Fernet

    assert s3.password
    key = Fernet.generate_key()
    pod = {"image": cluster.image, "image_pull_policy": "IfNotPresent", "namespace": namespace}
    settings = {
        "pod": pod | {"cpu": "50m", "memory": "500Mi", "config_file": os.environ["KUBECONFIG"]},
        "password_is": hashlib.sha256(PASSWORD.encode()).hexdigest(),
    }
    database = {"conn_type": "postgres", "host": "db.example", "login": "me", "password": PASSWORD}
    store = {"conn_type": "aws", "login": s3.login, "password": s3.password, "extra": s3.extra}
    environment = {
        "LEPTON_SECRETS": json.dumps(settings),
        "AIRFLOW__CORE__FERNET_KEY": key.decode(),
        "AIRFLOW__LEPTON__STORE": bucket,
        "AIRFLOW__LEPTON__STORE_CONN_ID": "lepton_store",
        "AIRFLOW_CONN_LEPTON_STORE": json.dumps(store),
        "AIRFLOW_CONN_DRILL_DATABASE": json.dumps(database),
    }
    dags = Path(__file__).parent / "secret_dags"
    triggers: set[str] = set()
    with LocalAirflow(tmp_path / "airflow", dags, parallelism=4, env=environment) as airflow:
        airflow.wait_for_dag("look")
        run = airflow.trigger("look")

        def ended() -> bool:
            triggers.update(_triggers(airflow.home / "airflow.db", key))
            return airflow.api("GET", f"/dags/look/dagRuns/{run}")["state"] in ("success", "failed")

        _until(ended, 300)
        states = {name: task["state"] for name, task in airflow.tasks("look", run).items()}
        assert states == {
            "sync": "success",
            "deferred": "success",
            "sync_careless": "failed",
            "deferred_careless": "failed",
        }
        for name in ("sync", "deferred"):
            assert airflow.xcom("look", run, name, "password_arrived") is True

    assert any("PodTrigger" in row for row in triggers), triggers
    files = {str(p): p.read_bytes() for p in airflow.home.rglob("*") if p.is_file()}
    logs = {path: text for path, text in files.items() if "attempt=1" in path}
    assert any(b"connecting with ***" in text for text in logs.values())
    seen = files | {f"trigger {n}": row.encode() for n, row in enumerate(triggers)}
    pods = cluster.items("pods", namespace)
    assert len(pods) == 4
    for item in pods:
        name = item["metadata"]["name"]
        seen[f"pod {name}"] = json.dumps(item, ensure_ascii=False).encode()
        seen[f"log of pod {name}"] = cluster.kubectl("logs", "-n", namespace, name).encode()
    for kind in ("events", "configmaps"):
        seen[kind] = json.dumps(cluster.items(kind, namespace), ensure_ascii=False).encode()
    for secret in (PASSWORD, s3.password):
        forms = _forms(secret)
        assert [place for place, text in seen.items() if any(form in text for form in forms)] == []
    mine = "app.kubernetes.io/managed-by=lepton-airflow"
    kept = json.loads(cluster.kubectl("get", "secrets", "-n", namespace, "-l", mine, "-o", "json"))["items"]
    owners = {owner["name"] for item in kept for owner in item["metadata"]["ownerReferences"]}
    assert owners == {item["metadata"]["name"] for item in pods}
    for item in kept:
        held = {
            c["id"]: c["password"] for c in json.loads(base64.b64decode(item["data"]["connections.json"]))
        }
        assert held == {"drill_database": PASSWORD, "lepton_store": s3.password}


def _until(condition: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the run did not end"
        time.sleep(0.1)
