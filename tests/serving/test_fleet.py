"""How a version comes into all workers, with workers that are threads of the test: what they are told, and who dies when."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import pytest

from lepton_airflow.delivery.endpoints import Desired
from lepton_airflow.errors import LeptonError
from lepton_airflow.serving import supervisor
from lepton_airflow.serving.reconcile import Died, NotNow
from lepton_airflow.serving.supervisor import Fleet, Settings
from lepton_airflow.serving.worker import NONE, Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SETTINGS = Settings(
    names=("wine",),
    host="127.0.0.1",
    port=0,
    health_port=None,
    url=None,
    workers=2,
    limits=Limits(),
    poll_s=1,
    drain_s=0,
)


class Stage:
    """In the place of multiprocessing: its processes are threads, which do as a worker does, or as a test says."""

    def __init__(self, pipe: Callable[[], tuple[Connection, Connection]]) -> None:
        self.Pipe = pipe
        self.actors: list[Actor] = []
        self.told: list[tuple[int, str, str]] = []  # which process was told what, of which version or slot
        self.on_load: Callable[[Actor, str, int], str | None] = lambda *_: None

    def Process(self, args: tuple[Any], **_: Any) -> Actor:  # noqa: N802 - as multiprocessing has it
        self.actors.append(Actor(self, len(self.actors), args[0].pipe))
        return self.actors[-1]


class Actor(threading.Thread):
    """A worker."""

    def __init__(self, stage: Stage, name: int, pipe: Connection) -> None:
        super().__init__(daemon=True)
        self.stage, self.number = stage, name
        self.pipe = Connection(os.dup(pipe.fileno()))
        self.exitcode: int | None = None

    def kill(self) -> None:
        self.exitcode = self.exitcode or -9
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        while self.exitcode is None:
            try:
                what, *rest = self.pipe.recv()
            except (EOFError, OSError):
                return
            if what == "load":
                number, endpoint, slot, desired, *_ = rest
                self.stage.told.append((self.number, "load", desired.version))
                failure = self.stage.on_load(self, desired.version, number)
                if self.exitcode is None:
                    self.pipe.send(("loaded", number, endpoint, slot, failure))
            elif what == "drop":
                self.stage.told.append((self.number, "drop", str(rest[1])))


class Bench:
    def __init__(self) -> None:
        self.fleet = Fleet(SETTINGS, None, bytes)  # type: ignore[arg-type]
        self.stage = self.fleet._context = Stage(self.fleet._context.Pipe)
        self.fleet.start()

    def put(self, version: str, accept: Callable[[], bool] = lambda: True) -> None:
        desired = Desired(
            endpoint="wine",
            package="",
            version=version,
            golden="",
            run_key="",
            max_difference=1.0,
            max_latency_ms=1.0,
            max_memory_mb=1.0,
        )
        self.fleet.part(0).put(desired, {}, {}, accept)

    @property
    def serving(self) -> int:
        slot: int = self.fleet.slots[0]
        return slot

    def told(self, *, of: str) -> list[tuple[int, str]]:
        """Who was told to load a version, or to drop a slot, in the order of the telling."""
        time.sleep(0.3)
        return [(name, what) for name, what, which in self.stage.told if which == of]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.fleet._ending = bench.fleet._ended = True
    for actor in bench.stage.actors:
        actor.kill()


def test_one_worker_after_the_other_loads_a_version_and_then_all_answer_with_it(bench: Bench) -> None:
    loading, most, slots = [], [], []

    def on_load(actor: Any, *_: Any) -> None:
        loading.append(actor)
        time.sleep(0.1)
        most.append(len(loading))
        slots.append(bench.serving)
        loading.remove(actor)

    bench.stage.on_load = on_load
    bench.put("v1", lambda: len(most) == 2)
    assert bench.serving == 0
    bench.put("v2", lambda: len(most) == 4)
    assert bench.serving == 1
    assert (most, slots) == ([1] * 4, [NONE, NONE, 0, 0])
    assert sorted(bench.told(of="0")) == [(0, "drop"), (1, "drop")]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_worker_that_dies_of_a_version_is_replaced_by_one_without_it(bench: Bench, dies: int) -> None:
    bench.put("v1")
    bench.stage.on_load = lambda actor, version, _: actor.kill() if actor.number == dies else None
    asked: list[bool] = []
    with pytest.raises(Died, match="ended by SIGKILL"):
        bench.put("v2", lambda: bool(asked.append(True)))
    assert not asked
    assert bench.serving == 0
    assert bench.told(of="v2") == [(n, "load") for n in range(dies + 1)]  # nobody else, the new one neither
    assert (2, "load") in bench.told(of="v1")
    assert bench.told(of="1") == [(n, "drop") for n in range(dies)]
    bench.put("v2")  # and the next try is one with all
    assert bench.serving == 1


def test_what_is_not_accepted_or_cannot_be_loaded_is_dropped(bench: Bench) -> None:
    bench.put("v1")
    bench.put("v2", lambda: False)
    bench.stage.on_load = lambda actor, *_: "MemoryError: " if actor.number == 1 else None
    with pytest.raises(LeptonError, match="a worker cannot load it: MemoryError"):
        bench.put("v3")
    assert bench.serving == 0
    assert sorted(bench.told(of="1")) == [(0, "drop"), (0, "drop"), (1, "drop"), (1, "drop")]
    assert bench.told(of="0") == []


def test_a_late_answer_about_another_version_does_not_count(bench: Bench) -> None:
    bench.put("v1")

    def on_load(actor: Any, version: str, number: int) -> str:
        actor.pipe.send(("loaded", number - 1, 0, 1, None))
        time.sleep(0.5)
        return "no"

    bench.stage.on_load = on_load
    with pytest.raises(LeptonError, match="cannot load it: no"):
        bench.put("v2")


def test_a_worker_that_never_loads_is_replaced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put("v1")
    monkeypatch.setattr(supervisor, "_TRY_S", 0.5)
    monkeypatch.setattr(supervisor, "_kill", Actor.kill)
    never = threading.Event()
    bench.stage.on_load = lambda actor, version, _: str(never.wait(5)) if version == "v2" else None
    with pytest.raises(LeptonError, match=r"not loaded it within 0\.5 s"):
        bench.put("v2")
    never.set()
    monkeypatch.undo()
    assert bench.told(of="v1")[2:] == [(2, "load")]
    bench.put("v3")
    assert bench.serving == 1


def test_a_worker_that_dies_of_what_is_in_service_says_nothing_about_the_next_version(bench: Bench) -> None:
    bench.put("v1")

    def on_load(actor: Any, version: str, _: int) -> None:
        time.sleep(0.3)
        if version == "v1" and actor.number == 2:
            actor.kill()

    bench.stage.on_load = on_load
    bench.stage.actors[1].kill()
    bench.told(of="v1")
    bench.put("v2")
    assert bench.told(of="v2") == [(0, "load"), (3, "load")]
    assert bench.serving == 1


def test_a_request_that_ends_a_worker_says_nothing_about_the_next_version(bench: Bench) -> None:
    bench.put("v1")

    def on_load(actor: Any, version: str, _: int) -> None:
        if version == "v2" and actor.number == 1:
            bench.stage.actors[0].exitcode = -11  # which has loaded it, and crashes in what is in service
            bench.stage.actors[0].kill()
            time.sleep(0.3)

    bench.stage.on_load = on_load
    bench.put("v2")
    assert bench.told(of="v2") == [(0, "load"), (1, "load"), (2, "load")]
    assert bench.serving == 1


def test_nobody_is_blamed_where_workers_do_not_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put("v1")
    monkeypatch.setattr(supervisor, "_TRY_S", 0.5)
    monkeypatch.setattr(bench.stage, "Process", None)
    bench.stage.actors[0].kill()
    time.sleep(0.3)
    with pytest.raises(NotNow, match="not all of 2 workers run"):
        bench.put("v2")


def test_what_a_worker_has_to_load_keeps_nobody_from_hearing_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put("v1")
    monkeypatch.setattr(supervisor, "_HUNG_S", 1.0)
    monkeypatch.setattr(supervisor, "_kill", Actor.kill)
    start = bench.fleet._start

    def slowly(number: int) -> None:
        time.sleep(1.5)
        start(number)

    monkeypatch.setattr(bench.fleet, "_start", slowly)
    beating = threading.Event()

    def beat() -> None:
        while not beating.wait(0.1):
            with contextlib.suppress(OSError):
                bench.stage.actors[1].pipe.send(("beat",))

    threading.Thread(target=beat, daemon=True).start()
    bench.stage.actors[0].kill()
    time.sleep(2.5)
    beating.set()
    assert bench.stage.actors[1].exitcode is None


def test_a_worker_that_is_replaced_while_the_others_load_gets_the_version_too(bench: Bench) -> None:
    bench.put("v1")

    def accept() -> bool:
        bench.stage.on_load = lambda *_: None
        return True

    def on_load(actor: Any, *_: Any) -> None:
        if actor.number == 0:
            bench.stage.actors[1].kill()  # which has not been told
            time.sleep(0.3)

    bench.stage.on_load = on_load
    bench.put("v2", accept)
    assert bench.told(of="v2") == [(0, "load"), (2, "load")]
    assert bench.serving == 1
