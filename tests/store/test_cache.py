"""The cache on S3, and which cache keys a change of it leaves alone. What is a hit is tested in tests/sdk/test_fingerprint.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Receipt
from lepton_airflow.sdk.closure import closure
from lepton_airflow.stages import all_stages
from lepton_airflow.store import Store, cache
from lepton_airflow.testing.local_s3 import LocalS3


@pytest.mark.parametrize("name", sorted(name for name, stage in all_stages().items() if stage.cacheable))
def test_a_change_of_the_cache_or_of_eviction_empties_no_cache(name: str) -> None:
    files = {file.name for file in closure(all_stages()[name].__module__) if file.parent.name == "store"}
    assert "files.py" in files
    assert not files & {"cache.py", "eviction.py", "records.py"}


@pytest.mark.parametrize(
    "change",
    [{"created": 5}, {"created": None}, {"seconds": "x"}, {"cache_key": 7}, {"metrics": []},
     {"artifacts": {"a": {"uri": 5, "sha256": "0", "bytes": 1}}}, {"artifacts": {"a": {"uri": "u", "sha256": "0", "bytes": "9"}}}],
)  # fmt: skip
def test_an_entry_of_another_shape_is_a_miss(tmp_path: Path, change: dict[str, Any]) -> None:
    store = Store(str(tmp_path))
    cache.record(store, Receipt("Shout", "run", "k" * 64, "done", "", created="2013-01-01T00:00:00+00:00"))
    assert cache.lookup(store, "Shout", "k" * 64)[0] is not None
    (key,) = store.keys("cache")
    store.write(key, json.dumps(json.loads(store.read(key) or b"") | change).encode())
    assert cache.lookup(store, "Shout", "k" * 64)[0] is None
    assert cache.entries(store) == []


def test_entries_are_read_sixteen_at_a_time(s3: LocalS3, bucket: tuple[str, Connection]) -> None:
    store = Store(*bucket)
    for number in range(60):
        created = f"2013-01-{number % 28 + 1:02}T00:00:00+00:00"
        cache.record(store, Receipt("Shout", "run", f"{number:040x}", "done", "", created=created))
    s3.most_at_once, s3.latency_s = 0, 0.02
    try:
        assert s3.count(lambda: cache.entries(store)) == 61
    finally:
        s3.latency_s = 0.0
    assert 8 <= s3.most_at_once <= 16
    order = [entry.created for entry in cache.entries(store)]
    assert order == sorted(order)
