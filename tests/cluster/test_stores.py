"""Worker and pods share one store: on S3, through a Connection that only a mounted Secret holds, or on a shared volume."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Request
from lepton_airflow.errors import BadConfiguration, LeptonError
from lepton_airflow.pods import RUN_KEY
from lepton_airflow.pods.manifest import pod_key
from lepton_airflow.runners import Runner
from lepton_airflow.store import Store
from lepton_airflow.store.identity import identity_of
from lepton_airflow.testing import probe


def on_s3(name: str, bucket: str, **parameters: Any) -> Request:
    return replace(probe(name, bucket, **parameters), store_connection="s3", connections=("s3",))


def test_s3(
    make_pod: Callable[..., Runner],
    s3: Connection,
    bucket: str,
    hidden: Callable[[str], list[str]],
    said: list[str],
) -> None:
    """Artifacts go from pod to pod by their pinned URIs, and the key that opens them is seen nowhere."""
    assert s3.password
    runner = make_pod(volumes=[], keep_pod="always")
    first = runner.run(on_s3("Copy", bucket, text="grün"), [s3], {})
    second = runner.run(on_s3("Copy", bucket, source=first.artifacts["copy"].uri), [s3], {})
    again = runner.run(on_s3("Copy", bucket, text="grün"), [s3], {})
    assert (first.status, second.status, again.status) == ("done", "done", "cached")
    assert second.artifacts == first.artifacts
    store = Store(bucket, s3)
    assert store.present(first.artifacts["copy"])
    kept = store.receipt(again.run_key)
    assert kept is not None
    assert kept.nonce == again.nonce != first.nonce
    assert hidden(s3.password) == []
    assert "Copy done" in "\n".join(said)
    assert s3.password not in "\n".join(said)


def test_two_installations_in_one_namespace_leave_each_other_alone(
    cluster: Any, namespace: str, make_pod: Callable[..., Runner], shared: Path
) -> None:
    """Staging and production run the same DAG at the same time, each with its own store, and nobody has named either."""
    requests = [probe("Copy", shared / name, text=name) for name in ("staging", "production")]
    assert len({request.run_key for request in requests}) == 1
    with ThreadPoolExecutor(2) as pool:
        receipts = list(pool.map(lambda r: make_pod(keep_pod="always").run(r, [], {}), requests))
    assert [receipt.values["length"] for receipt in receipts] == [7, 10]
    keys = {pod_key(request, identity_of(Store(request.store))) for request in requests}
    made = [pod["metadata"]["labels"][RUN_KEY] for pod in cluster.items("pods", namespace)]
    assert sorted(key for key in made if key in keys) == sorted(keys)  # one pod each


def test_altered_in_s3(make_pod: Callable[..., Runner], s3: Connection, bucket: str) -> None:
    store = Store(bucket, s3)
    artifact = store.put("input.txt", b"before")
    store.write(artifact.uri.partition("/store/")[2].partition("@")[0], b"after!")
    with pytest.raises(LeptonError, match=r"input\.txt has sha256 .* pinned to"):
        make_pod(volumes=[]).run(on_s3("Copy", bucket, source=artifact.uri), [s3], {})


def test_a_bucket_that_is_not_there_is_said_before_a_pod_is_made(
    cluster: Any, namespace: str, make_pod: Callable[..., Runner], s3: Connection
) -> None:
    before = {pod["metadata"]["uid"] for pod in cluster.items("pods", namespace)}
    with pytest.raises(LeptonError, match="no-such-bucket"):
        make_pod(volumes=[]).run(on_s3("Copy", "s3://no-such-bucket/store"), [s3], {})
    assert {pod["metadata"]["uid"] for pod in cluster.items("pods", namespace)} <= before


def test_a_folder_that_no_volume_holds_is_refused_before_a_pod_is_made(
    cluster: Any, namespace: str, make_pod: Callable[..., Runner], shared: Path
) -> None:
    before = {pod["metadata"]["uid"] for pod in cluster.items("pods", namespace)}
    with pytest.raises(BadConfiguration, match=r"store.*volume"):
        make_pod(volumes=[]).run(probe("Copy", shared / "store"), [], {})
    assert {pod["metadata"]["uid"] for pod in cluster.items("pods", namespace)} <= before


def test_two_pods_write_one_volume_at_once(make_pod: Callable[..., Runner], shared: Path) -> None:
    """The same bytes under the same name, by different task instances: neither harms the other."""
    from concurrent.futures import ThreadPoolExecutor

    requests = [probe("Copy", shared / "both", text="x" * 1_000_000) for _ in range(3)]
    requests = [
        replace(r, identity=replace(r.identity, map_index=n), cache="off") for n, r in enumerate(requests)
    ]
    with ThreadPoolExecutor(3) as pool:
        receipts = list(pool.map(lambda r: make_pod().run(r, [], {}), requests))
    (artifact,) = {receipt.artifacts["copy"] for receipt in receipts}
    assert Store(str(shared / "both")).intact(artifact)
