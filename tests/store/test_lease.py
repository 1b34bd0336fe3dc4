"""The lease: one at a time, taken over from the dead at once and from the silent in time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from lepton_airflow.errors import LeptonError, Preempted
from lepton_airflow.store import Store, lease as module
from lepton_airflow.store.lease import lease

ELSEWHERE = {"process": ["another kernel", "pid:[1]", 1, "1"], "beats": 0, "released": False}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def claims(store: Store) -> list[str]:
    return [key.rpartition("/")[2] for key in store.keys("leases/key")]


def count_up(root: str, counter: str) -> None:
    for _ in range(10):
        with lease(Store(root), "key"):
            Path(counter).write_text(str(int(Path(counter).read_text()) + 1))  # loses counts unless alone


def test_files_of_other_programs_among_the_claims_are_passed_over(store: Store) -> None:
    store.write("leases/key/.DS_Store", b"")
    store.write("leases/key/000001.json", b"[" * 100_000)
    with lease(store, "another"), lease(store, "key/below"):
        assert claims(store) != []


def test_six_processes_take_turns(store: Store, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    with ProcessPoolExecutor(6, mp_context=multiprocessing.get_context("fork")) as pool:
        for done in [pool.submit(count_up, str(tmp_path / "store"), str(counter)) for _ in range(6)]:
            done.result()
    assert counter.read_text() == "60"
    assert len(claims(store)) == 1  # those that are over are cleared away


def test_a_killed_holder_is_replaced_at_once(store: Store, tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom lepton_airflow.store.lease import lease\nfrom lepton_airflow.store import Store\n"
        "with lease(Store(sys.argv[1]), 'key'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"

    def give_up() -> None:
        raise Preempted("still held")

    with pytest.raises(Preempted), lease(store, "key", give_up):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with lease(store, "key", give_up) as held:
        assert held.number == 2


def test_a_silent_holder_elsewhere_expires_and_one_that_beats_does_not(store: Store, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    looks = []

    def wait() -> None:
        clock[0] += 10
        looks.append(clock[0])
        if len(looks) <= 10:  # alive for 100 s by its beats, then silent
            store.write("leases/key/000001.json", json.dumps(ELSEWHERE | {"beats": len(looks)}).encode())

    store.write("leases/key/000001.json", json.dumps(ELSEWHERE).encode())
    with lease(store, "key", wait) as held:
        assert held.number == 2
    assert 100 + module.EXPIRES_S < looks[-1] <= 100 + module.EXPIRES_S + 20


def test_a_holder_that_was_frozen_learns_of_its_loss(store: Store) -> None:
    with lease(store, "key") as held:
        held.check()
        assert store.create_exclusive("leases/key/000002.json", json.dumps(ELSEWHERE).encode())
        with pytest.raises(LeptonError, match="stood still for more than 30 s") as error:
            held.check()
        assert error.value.exit_code == 1


def test_a_waiter_that_looked_long_ago_does_not_take_a_number_of_the_past(store: Store, monkeypatch) -> None:
    """Between its look and its claim, the row went on and its start was cleared: number 2 is free, but over."""
    create = store.create_exclusive

    def late(key: str, content: bytes) -> bool:
        monkeypatch.setattr(store, "create_exclusive", create)
        store.delete("leases/key/000001.json")
        store.write("leases/key/000007.json", json.dumps(ELSEWHERE | {"released": True}).encode())
        return create(key, content)

    store.write("leases/key/000001.json", json.dumps(ELSEWHERE | {"released": True}).encode())
    monkeypatch.setattr(store, "create_exclusive", late)
    with lease(store, "key") as held:
        assert held.number == 8


def test_the_holder_beats_and_releases(store: Store, monkeypatch) -> None:
    monkeypatch.setattr(module, "_BEAT_S", 0.01)
    beaten = threading.Event()
    write = store.write

    def seen(key: str, content: bytes) -> None:
        write(key, content)
        if json.loads(content)["beats"] >= 3:
            beaten.set()

    monkeypatch.setattr(store, "write", seen)
    with lease(store, "key"):
        assert beaten.wait(timeout=30)
    assert json.loads(store.read("leases/key/000001.json") or b"")["released"] is True


def test_it_is_released_when_the_work_fails(store: Store) -> None:
    with pytest.raises(ValueError, match="work"), lease(store, "key"):
        raise ValueError("work")
    with lease(store, "key") as held:
        assert held.number == 2
