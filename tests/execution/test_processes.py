"""A stage ends with everything it has started: real processes, in their own sessions, stubborn or busy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lepton_airflow.execution.processes import MARK, kill_marked, signal_group
from lepton_airflow.testing import until
from lepton_airflow.testing.conformance import running

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """``start(code, *arguments)``: a Python process in a session of its own; what is left of it ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def call(
        code: str, *arguments: object, mark: str | None = None, **options: object
    ) -> subprocess.Popen[str]:
        env = {name: value for name, value in os.environ.items() if name != MARK}
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=env | ({MARK: mark} if mark else {}),
            text=True,
            **({"start_new_session": True} | options),  # type: ignore[call-overload]
        )
        started.append(process)
        return process

    yield call
    for process in started:
        signal_group(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


SLEEP = "import time; time.sleep(600)"


# -- signals to a group ------------------------------------------------------------------------------------------------


def test_a_signal_reaches_the_whole_group_and_none_is_not_an_error(start: Start, tmp_path: Path) -> None:
    family = start(
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        "open(sys.argv[1], 'w').write(f'{p.pid}\\n'); p.wait()",
        tmp_path / "child",
    )
    child = int(
        until(lambda: _read(tmp_path / "child").endswith("\n") and _read(tmp_path / "child"), "the child")
    )
    signal_group(family.pid, signal.SIGKILL)
    assert family.wait(10) == -signal.SIGKILL
    until(lambda: not running([child]), "the child to end")
    signal_group(family.pid, signal.SIGKILL)  # nobody is there any more


# -- what carries the mark ---------------------------------------------------------------------------------------------


def test_what_carries_the_mark_is_killed_in_any_session_and_nothing_else(start: Start) -> None:
    daemons = [start(SLEEP, mark="of this stage") for _ in range(2)]
    other, none = start(SLEEP, mark="of another stage"), start(SLEEP)
    kill_marked("of this stage")
    assert [daemon.wait(10) for daemon in daemons] == [-signal.SIGKILL] * 2
    assert running([other.pid, none.pid]) == [other.pid, none.pid]


def test_the_one_that_kills_may_carry_the_mark_itself(start: Start) -> None:
    """As the watcher of a stage does: it inherits the mark, and has more to do than to kill."""
    daemon = start(SLEEP, mark="shared")
    killer = start(
        "from lepton_airflow.execution.processes import kill_marked; kill_marked('shared'); print('still here')",
        mark="shared",
        stdout=subprocess.PIPE,
    )
    assert killer.communicate(timeout=60)[0] == "still here\n"
    assert daemon.wait(10) == -signal.SIGKILL


def test_one_that_is_started_while_others_are_killed_is_found_too(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of processes is a second old when its end is reached."""
    import psutil

    late: list[subprocess.Popen[str]] = []
    listed = psutil.process_iter

    def first_without_the_late_one() -> Iterator[psutil.Process]:
        yield from list(listed())
        if not late:
            late.append(start(SLEEP, mark="spreading"))

    first = start(SLEEP, mark="spreading")
    monkeypatch.setattr(psutil, "process_iter", first_without_the_late_one)
    kill_marked("spreading")
    assert [first.wait(10), late[0].wait(10)] == [-signal.SIGKILL] * 2


# -- the end of the parent ---------------------------------------------------------------------------------------------

# A stage: argv is the pipe, the scratch folder, a file for process ids, and what it does then.
STAGE = f"""
import os, pathlib, signal, subprocess, sys, time
from lepton_airflow.execution.processes import end_with_parent
pipe, scratch, pids, then = int(sys.argv[1]), pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4]
end_with_parent(pipe, scratch)
daemon = subprocess.Popen(
    [sys.executable, "-c", {SLEEP!r}], start_new_session="no mark" not in then, stdout=subprocess.DEVNULL
)
saved = pids.with_name("saved")
if then == "saves":
    def stop(*_):
        time.sleep(0.5)
        saved.touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
if then.startswith("is stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pids.write_text(f"{{os.getpid()}} {{daemon.pid}}\\n")
if then == "is busy":
    sum(range(10**12))  # one call that never gives the interpreter back
if then == "ends":
    daemon.kill()
    sys.exit(0)
time.sleep(600)
"""


class Parent:
    """What a worker is to a stage: it holds the other end of the pipe, and closes it as its death would."""

    def __init__(self, start: Start, folder: Path) -> None:
        self.start, self.scratch, self.pids = start, folder / "scratch", folder / "pids"
        self.scratch.mkdir()
        (self.scratch / "half a file").touch()
        self.reading, self.writing = os.pipe()

    def stage(self, then: str, **options: object) -> subprocess.Popen[str]:
        arguments = (self.reading, self.scratch, self.pids, then)
        mark = None if "no mark" in then else "stage"
        process = self.start(STAGE, *arguments, mark=mark, **({"pass_fds": (self.reading,)} | options))
        os.close(self.reading)
        until(lambda: _read(self.pids).endswith("\n"), "the stage to run", 60)
        return process

    def family(self) -> list[int]:
        return [int(pid) for pid in _read(self.pids).split()]

    def watchers(self) -> list[int]:
        """The processes that hold the pipe's reading end, but for the stage itself."""
        link = os.readlink(f"/proc/self/fd/{self.writing}")
        found = []
        for fd in Path("/proc").glob("[0-9]*/fd/*"):
            pid = int(fd.parts[2])
            try:
                if os.readlink(fd) == link and pid not in (os.getpid(), self.family()[0]):
                    found.append(pid)
            except OSError:
                continue
        return found

    def dies(self) -> None:
        os.close(self.writing)


@pytest.fixture
def parent(start: Start, tmp_path: Path) -> Parent:
    return Parent(start, tmp_path)


@pytest.mark.parametrize("then", ["sleeps", "is busy", "is stubborn", "is stubborn and has no mark"])
def test_nothing_of_a_stage_survives_its_parent(parent: Parent, then: str) -> None:
    stage = parent.stage(then)
    (watcher,) = parent.watchers()
    family = [*parent.family(), watcher]
    assert running(family) == family
    parent.dies()
    until(lambda: not running(family), "all of it to end", 10)
    assert not parent.scratch.exists()
    assert stage.wait(10) in (-signal.SIGTERM, -signal.SIGKILL)


@pytest.mark.parametrize(
    "own_session", [True, False]
)  # without one it shares its parent's group until it leaves it
def test_a_stage_has_time_to_save_what_it_has(parent: Parent, own_session: bool) -> None:
    stage = parent.stage("saves", start_new_session=own_session)
    parent.dies()
    assert stage.wait(10) == 75
    assert parent.pids.with_name("saved").exists()
    until(lambda: not running(parent.family()), "the daemon to end", 10)


def test_the_watcher_holds_nothing_open_but_the_pipe(parent: Parent) -> None:
    """Whoever reads the stage's log, or waits for a lock that it held, does not wait for the watcher."""
    with (parent.scratch / "half a file").open() as held:
        parent.stage("sleeps", stdout=subprocess.PIPE, pass_fds=(parent.reading, held.fileno()))
        (watcher,) = parent.watchers()
        pipe = os.readlink(f"/proc/self/fd/{parent.writing}")
        links = [os.readlink(fd) for fd in Path(f"/proc/{watcher}/fd").iterdir()]
        assert set(links) == {pipe, os.devnull}
    parent.dies()


def test_a_stage_that_ends_by_itself_leaves_no_watcher_and_its_scratch_to_the_parent(parent: Parent) -> None:
    stage = parent.stage("ends", stdout=subprocess.PIPE)
    began = time.monotonic()
    assert stage.communicate(timeout=10)[0] == ""
    until(lambda: not parent.watchers(), "the watcher to end", 5)
    assert time.monotonic() - began < 5
    assert parent.scratch.exists()
    parent.dies()
