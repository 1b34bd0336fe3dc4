"""End a stage together with everything it started, also with processes that left its process group.

Every process that a stage starts inherits :data:`MARK` in its environment, so it is found even as a daemon in a session of
its own. Only a process that clears its environment on purpose escapes.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

MARK = "LEPTON_STAGE_MARK"  # environment variable

_GRACE_S = 2.0  # between SIGTERM and SIGKILL
_POLL_S = 0.5


def signal_group(group: int, sig: signal.Signals) -> None:
    """Send a signal to a process group, if it still exists."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, sig)


def kill_marked(mark: str) -> None:
    """Kill every process but this one that carries the mark, until none is left."""
    import psutil

    # Several times: while the list is read, a process of it may start another one, and a killed one is there for a moment. It is
    # not waited for by wait(), which would take its exit status from whoever started it.
    for _ in range(50):
        found = False
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                    process.kill()
                    found = True
        if not found:
            return
        time.sleep(0.02)


def end_with_parent(pipe: int, scratch: Path | None = None) -> None:
    """End this process and everything it starts when the other end of ``pipe`` closes, as it does when a worker is killed.

    All of it gets SIGTERM, and SIGKILL two seconds later; then the directory ``scratch`` is removed, which the killed parent
    cannot do any more. A separate process watches the pipe, because a thread would have to wait while a library holds the
    interpreter's lock. Call this before any thread is started.
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
    # Reading the stage's output must not wait for the end of this process.
    for fd in range(3):
        os.dup2(nothing, fd)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, 1024)
    while not (select.select([pipe], [], [], _POLL_S)[0] and not os.read(pipe, 1)):
        # The stage has ended by itself: its parent cleans up.
        if os.getppid() != stage:
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
