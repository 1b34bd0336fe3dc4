"""Small stages that show how a runner treats a stage: each does one thing that a real one may do, well or badly.

They are no part of the registry: a request names them ``lepton_airflow.testing.probe_stages:Probe``.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from lepton_airflow import errors
from lepton_airflow.stages import ArtifactUri, ConnectionId, Result, RunInfo, Stage

log = logging.getLogger(__name__)

_FOREVER_S = 600.0


@dataclass(kw_only=True)
class Copy(Stage):
    """Store a text, or what an artifact holds, and return it in every way a stage can.

    :param text: what to store.
    :param source: an artifact whose text is stored instead.
    """

    outputs: ClassVar[tuple[str, ...]] = ("copy", "length")

    text: str = "hello"
    source: ArtifactUri | None = None

    def run(self, run: RunInfo) -> Result:
        text = run.fetch(self.source).read_text() if self.source else self.text
        log.info("copying %d characters", len(text))
        return Result(
            summary=f"{len(text)} characters copied.",
            artifacts={"copy": run.save("copy.txt", text)},
            values={"length": len(text)},
            metrics={"length": float(len(text)), "undefined": float("nan")},
            links={"about": "https://example.org/copy"},
        )


@dataclass(kw_only=True)
class Fail(Stage):
    """End in the way that is asked for.

    :param how: name of a kind in :mod:`lepton_airflow.errors`, or ``ValueError``, ``exit``, ``SIGKILL``, ``no result``.
    :param message: what the error says.
    :param once: a file that is made at the first call; while it exists the stage succeeds.
    """

    cacheable: ClassVar[bool] = False

    how: str
    message: str = "as asked"
    once: str = ""

    def run(self, run: RunInfo) -> Result:
        if self.once and Path(self.once).exists():
            return Result(summary="It went well this time.")
        if self.once:
            Path(self.once).touch()
        if self.how == "ValueError":
            raise ValueError(self.message)
        if self.how == "exit":
            sys.exit(3)
        if self.how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
            # The first process of a container cannot be killed from inside it, so it ends with the code of a kill.
            os._exit(137)
        if self.how == "no result":
            return None  # type: ignore[return-value]
        raise getattr(errors, self.how)(self.message)


@dataclass(kw_only=True)
class Speak(Stage):
    """Write to the log.

    :param lines: number of lines to print.
    :param garbage: also write bytes that are no text, and one line of a million characters.
    """

    cacheable: ClassVar[bool] = False

    lines: int = 0
    garbage: bool = False

    def run(self, run: RunInfo) -> Result:
        log.warning("careful with ünïcödé")
        log.error("two lines:\nthe second")
        print("plain words")
        for number in range(self.lines):
            print(f"line {number} " + "x" * 80)
        if self.garbage:
            sys.stdout.flush()
            os.write(1, b"\xff\xfe\x00\x80 garbage\r\n" + b"y" * 1_000_000 + b"\n")
        log.info("last line")
        return Result(summary=f"{self.lines} lines written.")


@dataclass(kw_only=True)
class Look(Stage):
    """Tell what the stage can see: its environment, its arguments, its search path, its Connections.

    :param password_is: sha256 of the password that the Connection should have.
    :param connection: id of a Connection to look at.
    :param module: a module to import and to call ``answer()`` of.
    :param say: log the Connection's password and fail with it in the message, as a careless driver does.
    """

    cacheable: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("environment", "answer", "password_arrived", "process", "scratch")

    password_is: str = ""
    connection: ConnectionId | None = None
    module: str = ""
    say: bool = False

    def run(self, run: RunInfo) -> Result:
        import hashlib

        values: dict[str, Any] = {
            "environment": sorted(os.environ),
            "process": os.getpid(),
            "scratch": str(run.workdir),
        }
        if self.connection:
            password = run.connection(self.connection).password or ""
            values["password_arrived"] = hashlib.sha256(password.encode()).hexdigest() == self.password_is
            seen = [Path(f"/proc/self/{name}").read_bytes() for name in ("environ", "cmdline")]
            seen += [file.read_bytes() for file in Path.cwd().rglob("*") if file.is_file()]
            if any(password.encode() in text for text in seen):
                raise errors.RunnerError(
                    "the password lies open in the environment, in an argument or in a file"
                )
            if self.say:
                log.info("connecting to db://user:%s@host", password)
                print(f"connecting with {password}")
                raise ValueError(f"cannot connect to db://user:{password}@host")
        if self.module:
            values["answer"] = importlib.import_module(self.module).answer()
        return Result(summary="Looked around.", values=values)


@dataclass(kw_only=True)
class Hang(Stage):
    """Run for ten minutes, with company, until somebody ends it.

    :param pids: a file that gets the ids of this process and of those it started, once all of them run.
    :param stubborn: ``no``: ends when asked; ``ignore``: ignores SIGTERM; ``busy``: never gives the interpreter a chance.
    """

    cacheable: ClassVar[bool] = False

    pids: str
    stubborn: Literal["no", "ignore", "busy"] = "no"

    def run(self, run: RunInfo) -> Result:
        if self.stubborn == "ignore":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _record(self.pids, [os.getpid(), *start_family()])
        log.info("hanging")
        if self.stubborn == "busy":
            sum(range(10**15))  # one call of C that holds the interpreter's lock to its end
        threading.Event().wait(_FOREVER_S)
        return Result(summary="Nobody came.")


@dataclass(kw_only=True)
class Abandon(Stage):
    """Succeed and leave a child, a grandchild and a daemon running.

    :param pids: a file that gets their process ids.
    """

    cacheable: ClassVar[bool] = False

    pids: str

    def run(self, run: RunInfo) -> Result:
        _record(self.pids, start_family())
        return Result(summary="Left three processes behind.")


@dataclass(kw_only=True)
class Resume(Stage):
    """Count up to a number, one step each hundredth of a second, keeping the count when asked to stop.

    :param file: where the count is kept.
    :param steps: where it ends.
    """

    cacheable: ClassVar[bool] = False
    resumable: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ("start", "steps")

    file: str
    steps: int = 100_000

    def run(self, run: RunInfo) -> Result:
        kept = Path(self.file)
        start = count = int(kept.read_text()) if kept.exists() else 0
        while count < self.steps:
            count += 1
            _record(self.file, [count])
            run.check_stop()
            time.sleep(0.01)
        return Result(summary=f"Counted from {start} to {count}.", values={"start": start, "steps": count})


@dataclass(kw_only=True)
class Fill(Stage):
    """Take memory.

    :param megabytes: how much [MiB].
    :param children: in how many child processes; 0: in this one.
    """

    cacheable: ClassVar[bool] = False

    megabytes: int
    children: int = 0
    held: list[int] = field(default_factory=list)

    def run(self, run: RunInfo) -> Result:
        hold = f"import time; block = bytearray(b'x') * ({self.megabytes} << 20); time.sleep({_FOREVER_S})"
        for _ in range(self.children):
            subprocess.Popen([sys.executable, "-c", hold])
        if not self.children:
            block = bytearray(b"x") * (self.megabytes << 20)
            log.info("holding %d MiB", len(block) >> 20)
        threading.Event().wait(_FOREVER_S)
        return Result(summary="Nobody minded.")


_FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
grandchild = subprocess.Popen(sleep)
daemon = subprocess.Popen(sleep, start_new_session=True)
print(grandchild.pid, daemon.pid, flush=True)
time.sleep(600)
"""


def start_family() -> list[int]:
    """Start a child with a child of its own and a daemon in another session; returns the three process ids."""
    child = subprocess.Popen([sys.executable, "-c", _FAMILY], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return [child.pid, *map(int, child.stdout.readline().split())]


def _record(file: str, numbers: list[int]) -> None:
    part = Path(f"{file}.part")
    part.write_text(" ".join(map(str, numbers)))
    part.replace(file)
