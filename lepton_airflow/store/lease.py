"""A lease in the store: one worker at a time, for work on something that has no lock of its own (MLflow).

A lease is a row of numbered claims, ``leases/<key>/000001.json``, ``000002.json``, …, each made once by
:meth:`~lepton_airflow.store.files.Store.create_exclusive`. The highest claim counts; its holder rewrites it every few seconds.
Whoever waits may make the next claim as soon as the highest one is released or its holder is dead. A holder on the same
machine is dead when its process is gone. Any other is taken for dead when its claim did not change for :data:`EXPIRES_S`
seconds by the clock of the one who waits; clocks of different machines are never compared.

A holder that was suspended for longer than that has lost the lease without knowing. So it calls :meth:`Lease.check` before each
write outside the store. It may still be suspended between the check and the write. Then the record in the store, which only
one writer can create, decides. The lease saves double work and keeps MLflow's versions in order; correctness never depends
on it alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_airflow.errors import LeptonError, StoreError
from lepton_airflow.store.files import Store

EXPIRES_S = 30.0
_BEAT_S = 5.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Lease:
    """A held lease: its store, its key, and the number of the claim that holds it."""

    store: Store
    key: str
    number: int

    def check(self) -> None:
        """Raise an error that may be retried when somebody else has taken over the lease."""
        if max(_numbers(self.store, self.key), default=0) > self.number:
            raise LeptonError(
                f"this process stood still for more than {EXPIRES_S:g} s, so another one took over its work on {self.key!r}; "
                "a retry goes on from what that one did."
            )


@contextmanager
def lease(store: Store, key: str, wait: Callable[[], None] = lambda: None) -> Iterator[Lease]:
    """Hold a lease while the block runs. Until it is its turn, it looks again and again, and calls ``wait``, which may raise."""
    number = _acquire(store, key, wait)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(store, key, number, stop), name=f"lease {key}", daemon=True)
    beat.start()
    try:
        yield Lease(store, key, number)
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(StoreError):  # the work is done, and a claim that is not released expires
            store.write(_claim(key, number), _content(released=True))


def _acquire(store: Store, key: str, wait: Callable[[], None]) -> int:
    seen: tuple[int, bytes | None] = (0, None)
    since = time.monotonic()
    while True:
        numbers = _numbers(store, key)
        last = max(numbers, default=0)
        content = store.read(_claim(key, last)) if last else None
        if (last, content) != seen:
            seen, since = (last, content), time.monotonic()
        free = not last or (content is not None and _is_over(content)) or time.monotonic() - since > EXPIRES_S
        if free and store.create_exclusive(_claim(key, last + 1), _content()):
            if max(_numbers(store, key)) == last + 1:
                for older in numbers:
                    store.delete(_claim(key, older))
                return last + 1
            # Others have made and deleted claims since we looked, so the number that we took was free only by that.
            store.delete(_claim(key, last + 1))
        elif not free:
            wait()
            time.sleep(_POLL_S)


def _beat(store: Store, key: str, number: int, stop: threading.Event) -> None:
    beats = 0
    while not stop.wait(_BEAT_S):
        beats += 1
        with contextlib.suppress(StoreError):
            store.write(_claim(key, number), _content(beats=beats))


def _claim(key: str, number: int) -> str:
    return f"leases/{key}/{number:06d}.json"


def _numbers(store: Store, key: str) -> list[int]:
    names = (found.rpartition("/")[2] for found in store.keys(f"leases/{key}"))
    return [
        int(name[:-5]) for name in names if re.fullmatch(r"\d+\.json", name)
    ]  # a Mac leaves files of its own


def _content(beats: int = 0, released: bool = False) -> bytes:
    return json.dumps({"process": _process(os.getpid()), "beats": beats, "released": released}).encode()


def _is_over(content: bytes) -> bool:
    """Whether a claim was released, or made by a process of this machine that is gone."""
    try:
        claim: dict[str, Any] = json.loads(content)
        holder = claim["process"]
        if claim["released"]:
            return True
        return bool(holder and holder[:2] == _machine() and holder != _process(holder[2]))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return False  # a claim that we do not understand expires


def _machine() -> list[str] | None:
    """The boot of the kernel and the process table (a container has its own): within both, a pid names one process."""
    try:
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        return None


def _process(pid: int) -> list[Any] | None:
    """A living process as machine, pid and start time, so that a reused pid is told apart; None: not known."""
    machine = _machine()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return [*machine, pid, fields[19]] if machine and fields[0] not in "ZX" else None
