"""What can be reused: the receipts of finished runs, found by stage and cache key.

Every stage imports :mod:`lepton_airflow.store.files`, so a change there changes all cache keys. The cache's code is kept here so
that a change of it does not.
"""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime

from lepton_airflow.contract import Receipt
from lepton_airflow.store.files import Store, at_once


def lookup(
    store: Store, stage: str, cache_key: str, ttl_s: float | None = None
) -> tuple[Receipt | None, str]:
    """The receipt of an equal earlier run whose artifacts are all intact, or None; and why, in a few words."""
    entry = store.read_receipt(_key(stage, cache_key))
    if entry is None:
        return None, "miss: not computed before"
    if (entry.stage, entry.cache_key) != (stage, cache_key):
        return None, "miss: the entry is of another run"
    age_s = time.time() - _created(entry)
    if ttl_s is not None and age_s > ttl_s:
        return None, f"miss: the entry is {age_s:.0f} s old, older than cache_ttl_s={ttl_s:g}"
    for name, artifact in entry.artifacts.items():
        if not store.intact(artifact):
            return None, f"miss: artifact {name!r} is missing or altered"
    return entry, f"hit: computed {entry.created} in {entry.seconds:.1f} s"


def record(store: Store, receipt: Receipt) -> None:
    """Make a finished receipt what an equal run gets."""
    if receipt.cache_key:
        entry = replace(receipt, status="done")
        store.write(_key(receipt.stage, receipt.cache_key), entry.to_json().encode())


def entries(store: Store) -> list[Receipt]:
    """All cache entries, oldest first; unreadable ones are passed over."""
    found = at_once(store.read_receipt, store.keys("cache"))
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.created)


def _key(stage: str, cache_key: str) -> str:
    return f"cache/{stage}/{cache_key[:40]}.json"


def _created(entry: Receipt) -> float:
    """When a receipt was made, in seconds since 1970; one that does not say it is as old as can be."""
    try:
        return datetime.fromisoformat(entry.created).timestamp()
    except ValueError:
        return 0.0
