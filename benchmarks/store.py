"""What the store's records cost as they grow: requests to S3, and seconds of making room on disk.

On S3 (moto on loopback, each answer 30 ms late, requests counted) a model has 10,000 registrations and as many moves of its
champion, and an endpoint was asked for 10,000 versions, of which the last ten were rejected. Counted are the requests that tell
who is champion, which version an alias means, where a version lies and what the endpoint should serve; those of a server that
looks for something newer; and those of the history of another champion, which moved 1,000 times. Before, a registration or a move
took two requests each. `…_at_once` is the largest number of requests that were in work at the same time.

Eviction looks through artifacts, a receipt for each and a cache entry for every second one. On disk the receipts are old, so
that they go, and every second artifact with them: `evict_disk_seconds_N` is the time that N artifacts take, and
`evict_disk_cpu_seconds_N` the CPU time of it, which does not depend on what else the machine does. On S3 nothing is old enough to
go: `again` is the next eviction, for which nothing is new. Before, 500, 2,000 and 8,000 artifacts took 0.16, 1.3
and 13.9 s on disk, and each entry 18 requests on S3, one after the other.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lepton_airflow.contract import Artifact, Receipt, pin
from lepton_airflow.delivery.endpoints import Desired, DesiredLog, LoadVerdict, decide, not_rejected
from lepton_airflow.registry.ledger import Ledger, LedgerEntry, Registration, Registrations, find_version
from lepton_airflow.store import Store, cache
from lepton_airflow.store.eviction import evict
from lepton_airflow.testing.local_s3 import LocalS3

GOALS = {
    "champion_requests": "at most 10",
    "alias_requests": "at most 10",
    "version_requests": "at most 10",
    "endpoint_requests": "at most 10",
    "poll_requests": "at most 1",
    "evict_disk_seconds_100000": "at most 60",
}
RECORDS = 10_000
HISTORY = 1_000
ON_DISK = (1_000, 10_000, 100_000)
ON_S3 = 2_000
REJECTED = 10
LATENCY_S = 0.03
DAY_S = 24 * 3600.0


def measure() -> dict[str, float]:
    """Requests of a log's state and history; time and requests of eviction and of ``cache ls``."""
    return _logs() | _on_disk() | _on_s3()


class _Collecting(Store):
    """Keeps in memory what is written, so that 10,000 records are there in seconds."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.root, store.connection)
        self.objects: dict[str, bytes] = {}

    def read(self, key: str) -> bytes | None:
        return self.objects.get(key)

    def write(self, key: str, content: bytes | Path) -> None:
        assert isinstance(content, bytes)
        self.objects[key] = content

    def create_exclusive(self, key: str, content: bytes) -> bool:
        self.objects[key] = content
        return True


def _logs() -> dict[str, float]:
    with LocalS3() as s3:
        store = s3.store("logs")
        s3.put(store, _records(store))
        s3.latency_s = LATENCY_S
        asked = DesiredLog(store, "late")

        def what_to_serve() -> None:
            last = asked.newest()
            assert last is not None
            assert asked.existing(not_rejected(store, "late", last.sequence)).sequence == RECORDS - REJECTED

        return {
            "champion_requests": s3.count(Ledger(store, "late").newest),
            "alias_requests": s3.count(lambda: find_version(store, "late", None)),
            "version_requests": s3.count(lambda: find_version(store, "late", RECORDS // 2)),
            "endpoint_requests": s3.count(what_to_serve),
            "poll_requests": s3.count(lambda: asked.after(RECORDS)),
            **_at_once(s3, f"history_{HISTORY}", Ledger(store, "another").entries),
        }


def _records(store: Store) -> dict[str, bytes]:
    """What the writers of these logs leave in the store."""
    writes = _Collecting(store)
    registered, asked = Registrations(writes, "late"), DesiredLog(writes, "late")
    registration: Registration | None = None
    desired: Desired | None = None
    package = _artifact(store, 0).uri
    too_slow = {"kind": "LeptonError", "message": "too slow.", "exit_code": 1}
    for n in range(1, RECORDS + 1):
        run_key = f"{n:024x}"
        registration = registered.append_after(
            registration, Registration("late", n, package, run_key, "mlflow", "candidate")
        )
        for name in ("late", "another") if n <= HISTORY else ("late",):
            move = LedgerEntry(name, n, "promote", n, package, n - 1 or None, run_key, "promote: better.")
            Ledger(writes, name).append(move)
        desired = asked.append_after(
            desired,
            Desired(
                endpoint="late",
                package=package,
                version=f"{n}",
                golden=package,
                max_difference=1e-4,
                max_latency_ms=100.0,
                max_memory_mb=2048.0,
                run_key=run_key,
                name="late",
                ledger=n,
            ),
        )
        error = too_slow if n > RECORDS - REJECTED else None
        verdict = LoadVerdict(sequence=n, accepted=error is None, server="a", error=error)
        decide(writes, "late", verdict)
    return writes.objects


def _on_disk() -> dict[str, float]:
    found: dict[str, float] = {}
    for count in ON_DISK:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            then = time.time() - 30 * DAY_S
            for key, content in _shelf(store, count).items():
                path = Path(folder, key)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                if not key.startswith("cache/"):
                    os.utime(path, (then, then))
                    os.utime(path.parent, (then, then))
            started, cpu = time.monotonic(), time.process_time()
            dropped, _ = evict(store, older_than_s=7 * DAY_S)
            found[f"evict_disk_seconds_{count}"] = round(time.monotonic() - started, 2)
            found[f"evict_disk_cpu_seconds_{count}"] = round(time.process_time() - cpu, 2)
            assert dropped == 0
            assert len(os.listdir(Path(folder, "artifacts"))) == count // 2
            print(f"{count:>7,} artifacts on disk: {found[f'evict_disk_seconds_{count}']:6.2f} s", flush=True)
    return found


def _on_s3() -> dict[str, float]:
    with LocalS3() as s3:
        store = s3.store("eviction")
        s3.put(store, _shelf(store, ON_S3), age_s=2 * 3600.0)
        s3.latency_s = LATENCY_S

        def make_room() -> None:
            assert evict(store, older_than_s=7 * DAY_S) == (0, 0)

        return {
            **_at_once(s3, f"evict_s3_{ON_S3}", make_room),
            f"evict_s3_{ON_S3}_again_requests": s3.count(make_room),
            **_at_once(s3, f"cache_ls_{ON_S3 // 2}", lambda: cache.entries(store)),
        }


def _at_once(s3: LocalS3, name: str, call: Callable[[], Any]) -> dict[str, float]:
    """How many requests a call makes, and how many of them at the same time."""
    s3.most_at_once = 0
    return {f"{name}_requests": s3.count(call), f"{name}_at_once": s3.most_at_once}


def _artifact(store: Store, number: int) -> Artifact:
    content = b"%d" % number
    sha256 = hashlib.sha256(content).hexdigest()
    return Artifact(pin(store.uri(f"artifacts/{sha256[:32]}/data"), sha256), sha256, len(content))


def _shelf(store: Store, count: int) -> dict[str, bytes]:
    """Keys and contents of so many artifacts, of a receipt for each and of a cache entry for every second one."""
    objects = {}
    for number in range(count):
        artifact = _artifact(store, number)
        receipt = Receipt(
            stage="PrepareData",
            run_key=f"{number:024x}",
            cache_key=artifact.sha256,
            status="done",
            summary="a summary of the usual length, with a number or two in it, as most stages write.",
            artifacts={"data": artifact},
            created="2026-01-01T00:00:00+00:00",
        )
        text = receipt.to_json().encode()
        objects[f"artifacts/{artifact.sha256[:32]}/data"] = b"%d" % number
        objects[f"receipts/{receipt.run_key}.json"] = text
        if number % 2:
            objects[f"cache/PrepareData/{artifact.sha256[:40]}.json"] = text
    return objects
