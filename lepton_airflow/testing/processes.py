"""Start background processes that a later process can find and end by name, without ever ending another one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from lepton_airflow.errors import LeptonError


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def refuse_used_port(port: int, remedy: str) -> None:
    """Raise LeptonError when somebody listens on a loopback port; ``remedy`` says how to choose another."""
    with socket.socket() as s:
        if s.connect_ex(("127.0.0.1", port)) == 0:
            raise LeptonError(f"port {port} is in use: stop what listens there, or {remedy}.")


def start(name: str, command: Sequence[str], home: Path, env: Mapping[str, str] | None = None) -> int:
    """Start a command in the background with its output in ``home/NAME.log``; returns its process id."""
    with (home / f"{name}.log").open("ab") as out:
        process = subprocess.Popen(
            command,
            env=None if env is None else dict(env),
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (home / f"{name}.id").write_text(f"{process.pid} {_started_at(process.pid)}")
    return process.pid


def pid(name: str, home: Path) -> int | None:
    """The process id of what :func:`start` started under this name, if it still runs."""
    file = home / f"{name}.id"
    if not file.exists():
        return None
    number, _, started = file.read_text().partition(" ")
    return int(number) if started and _started_at(int(number)) == started else None


def stop(name: str, home: Path, sig: signal.Signals = signal.SIGTERM, wait_s: float = 15) -> None:
    """End what :func:`start` started under this name, and its process group: ask, wait, then kill."""
    number = pid(name, home)
    if number is not None:
        started = _started_at(number)
        with suppress(ProcessLookupError):
            os.killpg(number, sig)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and _started_at(number) == started:
            _reap(number)
            time.sleep(0.1)
        with suppress(ProcessLookupError):
            os.killpg(number, signal.SIGKILL)
        _reap(number, wait=True)
    (home / f"{name}.id").unlink(missing_ok=True)


def stopped(name: str, home: Path) -> bool:
    """Whether nothing was started under this name, or :func:`stop` has ended it since."""
    return not (home / f"{name}.id").exists()


def check_alive(name: str, home: Path) -> None:
    """Raise LeptonError with the end of its log when what was started has ended."""
    if pid(name, home) is None:
        log = home / f"{name}.log"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise LeptonError(f"{name} ended; the end of {log}:\n{tail}")


def until(condition: Callable[[], bool], what: str, wait_s: float, where: str = "") -> None:
    """Wait for a condition; raises LeptonError naming it when the time is over."""
    deadline = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > deadline:
            raise LeptonError(
                f"gave up after {wait_s:.0f} s of waiting for {what}{where and f'; see {where}'}."
            )
        time.sleep(0.2)


def _reap(number: int, *, wait: bool = False) -> None:
    with suppress(ChildProcessError):
        os.waitpid(number, 0 if wait else os.WNOHANG)


def _started_at(number: int) -> str:
    """The kernel's start time of a process, which tells it from a later one with its id; empty when it has ended."""
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return ""
    state, *rest = text.rpartition(")")[2].split()
    return "" if state == "Z" else rest[18]
