"""End a stage together with everything it started, also what left its process group.

Whatever a stage starts inherits :data:`MARK` in its environment, so it is found even as a daemon in a session of its
own; only a process that wipes its environment on purpose escapes.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

MARK = "LEPTON_STAGE_MARK"

_GRACE_S = 2.0
_POLL_S = 0.5


def signal_group(group: int, sig: signal.Signals) -> None:
    """Send a signal to a process group, if there still is one."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, sig)


def kill_marked(mark: str) -> None:
    """Kill every process but this one that carries the mark, until none is left."""
    import psutil

    for _ in range(10):  # one may have started another while we looked
        found = False
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                    process.kill()
                    found = True
        if not found:
            return


def end_with_parent(pipe: int, scratch: Path | None = None) -> None:
    """End this process and all it starts once the other end of ``pipe`` closes, as it does when a worker is killed.

    The directory ``scratch`` is removed then, as the killed parent cannot do it any more.
    A process of its own watches the pipe: a thread would wait for as long as some library keeps the interpreter busy.
    Everything is told to stop, and killed two seconds later. Call it before any thread is started.
    """
    stage = os.getpid()
    if os.getpgrp() != stage:
        os.setpgid(0, 0)
    if os.fork():
        os.close(pipe)
        return
    try:
        _watch(pipe, stage, scratch)
    finally:
        os._exit(0)


def _watch(pipe: int, stage: int, scratch: Path | None) -> None:
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):  # whoever reads the stage's log must not wait for this process
        os.dup2(nothing, fd)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, 1024)
    while not (select.select([pipe], [], [], _POLL_S)[0] and not os.read(pipe, 1)):
        if os.getppid() != stage:  # it has ended by itself, and whoever waits for it cleans up
            return
    signal_group(stage, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while os.getppid() == stage and time.monotonic() < deadline:
        time.sleep(0.05)
    if mark := os.environ.get(MARK):
        kill_marked(mark)
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    signal_group(stage, signal.SIGKILL)  # this process too
