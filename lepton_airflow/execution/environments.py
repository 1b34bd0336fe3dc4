"""Python environments for stages, built on demand: each is named by its contents, built once, and kept until it is pruned.

Layout under the root::

    <extras>-<16 hex digits>/                    the environment: bin/python, lib/…
    <extras>-<16 hex digits>/environment.json    what it was built from; written last: without it, it is half-built
    <extras>-<16 hex digits>.lock                locked shared while a stage uses it, exclusively while it is built or removed

The digits are a hash of the requirement lines, the constraints, the installer, and the interpreter below it: a change of
any of these makes another environment. The code of lepton_airflow is not in it: a stage gets that of its worker.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from lepton_airflow.connections import hide_logins
from lepton_airflow.contract import digest_of
from lepton_airflow.errors import BadConfiguration, LeptonError, RunnerError, did_you_mean
from lepton_airflow.settings import setting

PACKAGE = "lepton-airflow"
# What `python -m lepton_airflow run` itself imports, besides the stage's libraries. Airflow is not among them.
ENTRY_POINT_NEEDS = ("fsspec", "psutil")
OLDEST_PYTHON = (3, 11)

Say = Callable[[str], None]

_POLL_S = 0.2


@dataclass(frozen=True)
class Environment:
    """What an environment is built from; equal ones are the same environment.

    :ivar extras: extras of lepton-airflow, sorted; they only make the name readable.
    :ivar requirements: sorted lines as in a requirements file.
    :ivar python: the interpreter below it.
    :ivar constraints: path or URL of a constraints file, or None.
    :ivar key: hash of everything that decides what is installed.
    """

    extras: tuple[str, ...]
    requirements: tuple[str, ...]
    python: str
    constraints: str | None
    installer: str
    key: str

    @classmethod
    def of(
        cls,
        extras: Iterable[str],
        requirements: Iterable[str] = (),
        python: str | None = None,
        constraints: str | None = None,
        installer: str | None = None,
    ) -> Environment:
        """The environment with those extras of lepton-airflow and those further requirement lines.

        :raises BadConfiguration: an extra, the interpreter, the constraints file or the installer does not exist.
        """
        interpreter = find_python(python)
        installer = installer or ("uv" if _uv() else "pip")
        # The process that builds it has another working directory.
        if constraints is not None and "://" not in constraints:
            constraints = os.path.abspath(os.path.expanduser(constraints))
        names = tuple(sorted(set(extras)))
        lines = tuple(sorted({*extra_lines(names), *requirements}))
        key = digest_of([lines, installer, facts(interpreter), _digest_of_constraints(constraints)])[:16]
        return cls(names, lines, interpreter, constraints, installer, key)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{'-'.join(self.extras) or 'own'}-{self.key}"

    @contextmanager
    def use(self, root: Path, say: Say | None = None) -> Iterator[str | None]:
        """Its interpreter, which nobody removes while the context lasts; None when it is not built.

        :param say: reports that another process is building it, and makes this wait for that; None: do not wait, and count
            it as not built.
        """
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(_locked(root, self.name, fcntl.LOCK_SH | fcntl.LOCK_NB))
            except BlockingIOError:
                if say is None:
                    yield None
                    return
                say(f"environment {self.name} is being built or removed by another process: waiting")
                lock = stack.enter_context(_locked(root, self.name, fcntl.LOCK_SH))
            os.utime(lock.fileno())  # the time of its last use
            python = root / self.name / "bin" / "python"
            yield str(python) if _complete(root / self.name) else None

    def build(self, root: Path, say: Say) -> Path:
        """Build it unless it is built, wait for another process that is building it, and return its interpreter.

        :raises BadConfiguration: there is no such package or version, or the interpreter cannot make environments.
        :raises RunnerError: the package index did not answer, or the disk is full: a retry may help.
        """
        while True:
            # A shared lock: an exclusive one would have to wait until no stage uses what another process has built.
            with self.use(root, say) as python:
                if python:
                    say(f"environment {self.name} is there: {root / self.name}")
                    return Path(python)
            with ExitStack() as stack:
                try:
                    lock = stack.enter_context(_locked(root, self.name, fcntl.LOCK_EX | fcntl.LOCK_NB))
                except BlockingIOError:
                    # Another process is looking, or has begun to build it.
                    time.sleep(_POLL_S)
                    continue
                return self._make(root / self.name, lock, say)

    def _make(self, home: Path, lock: IO[str], say: Say) -> Path:
        # Another process may have built it just before this one got the lock.
        if not _complete(home):
            if home.exists():
                say(f"environment {self.name} was left half-built: building it again")
                (home / "environment.json").unlink(missing_ok=True)
                shutil.rmtree(home)
            shown = [hide_logins(line) for line in self.requirements]
            say(f"building environment {self.name} with {self.installer}: {', '.join(shown)}")
            started = time.monotonic()
            try:
                self._install(home, lock, say)
            except LeptonError:
                shutil.rmtree(home, ignore_errors=True)
                raise
            seconds = round(time.monotonic() - started, 1)
            size = sum(f.lstat().st_size for f in home.rglob("*"))
            record = asdict(self) | {"requirements": shown, "seconds": seconds, "bytes": size}
            temporary = home / "environment.json.tmp"
            temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
            temporary.replace(home / "environment.json")
            say(f"environment {self.name} built in {seconds} s, {size >> 20} MiB: {home}")
        return home / "bin" / "python"

    def _install(self, home: Path, lock: IO[str], say: Say) -> None:
        uv = _uv() or "uv"
        python = str(home / "bin" / "python")
        file = home / "requirements.txt"
        make, install = {
            "uv": ([uv, "venv", "--python", self.python], [uv, "pip", "install", "--python", python]),
            "pip": (
                [self.python, "-m", "venv"],
                [python, "-m", "pip", "install", "--no-input", "--progress-bar", "off"],
            ),
        }[self.installer]
        call = _Installer(self.name, lock, say)
        call([*make, str(home)])
        file.write_text("\n".join(self.requirements) + "\n", encoding="utf-8")
        call([*install, "-r", str(file), *(["-c", self.constraints] if self.constraints else [])])


@dataclass(frozen=True)
class EnvironmentInfo:
    """An environment as it is found on disk.

    :ivar state: ``ready``, ``in use``, ``building`` or ``half-built``.
    :ivar used: when a stage last used it [Unix time].
    :ivar bytes: its size; None unless it is complete.
    """

    name: str
    state: str
    used: float
    bytes: int | None
    requirements: tuple[str, ...]


def list_environments(root: Path) -> list[EnvironmentInfo]:
    """Every environment under the root, the one that was used longest ago first."""
    found = []
    # Recognised by name and lock: the root may hold other things, and prune removes what is found here.
    names = [file.stem for file in root.glob("*.lock") if _NAME.search(file.stem)]
    for home in (root / name for name in names if (root / name).is_dir()):
        record = _record(home) or {}
        idle = "ready" if record else "half-built"
        busy = "in use" if record else "building"
        found.append(
            EnvironmentInfo(
                home.name,
                busy if _busy(root, home.name) else idle,
                _lock_file(root, home.name).stat().st_mtime,
                record.get("bytes"),
                tuple(record.get("requirements", ())),
            )
        )
    return sorted(found, key=lambda info: info.used)


_NAME = re.compile(r"-[0-9a-f]{16}$")


def prune(root: Path, older_than_s: float) -> list[EnvironmentInfo]:
    """Remove environments that no stage has used for so long [seconds], and half-built ones; returns those removed.

    One that is in use, or being built, stays.
    """
    removed = []
    for entry in list_environments(root):
        if entry.state != "half-built" and time.time() - entry.used < older_than_s:
            continue
        with suppress(BlockingIOError), _locked(root, entry.name, fcntl.LOCK_EX | fcntl.LOCK_NB):
            home = root / entry.name
            # First of all: if the removal is interrupted, the rest must not count as a complete environment.
            (home / "environment.json").unlink(missing_ok=True)
            shutil.rmtree(home)
            removed.append(entry)
    return removed


def default_root() -> Path:
    """The folder where environments lie: ``[lepton] environments``, else in the user's cache."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = setting("environments") or os.path.join(cache_home, "lepton_airflow", "environments")
    return Path(root).expanduser().absolute()


@cache
def known_extras() -> frozenset[str]:
    """The extras of the installed lepton-airflow; empty when the package was copied and not installed."""
    try:
        return frozenset(importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or ())
    except importlib.metadata.PackageNotFoundError:
        return frozenset()


_LINE = re.compile(
    r"""^(?P<line>[^;]+?)\s*;\s*(?:(?P<marker>.+?)\s+and\s+)?extra\s*==\s*['"](?P<extra>[^'"]+)['"]$"""
)


def extra_lines(extras: Iterable[str]) -> list[str]:
    """What the entry point and these extras of lepton-airflow need, as requirement lines; Airflow is left out."""
    try:
        declared = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise BadConfiguration(
            f"{PACKAGE} is not installed here but copied, so what its extras need is not known: pip install it, or give "
            "an interpreter that has everything, Venv(python=…)."
        ) from None
    for extra in extras:
        if extra not in known_extras():
            raise BadConfiguration(f"{PACKAGE} has no extra {extra!r}; {did_you_mean(extra, known_extras())}")
    lines = [
        line
        for line in declared
        if re.split(r"[^\w.-]", line, maxsplit=1)[0] in ENTRY_POINT_NEEDS and ";" not in line
    ]
    return lines + [
        f"{match['line']}; {match['marker']}" if match["marker"] else match["line"]
        for match in filter(None, map(_LINE.match, declared))
        if match["extra"] in extras
    ]


def find_python(python: str | None) -> str:
    """The path of an interpreter given as a path or as a name on PATH; None: this process's own."""
    if python is None:
        return sys.executable
    found = shutil.which(os.path.expanduser(python))
    if not found:
        raise BadConfiguration(
            f"there is no interpreter {python!r} on this worker: give the path of a python, or its name on PATH."
        )
    return os.path.abspath(found)


_FACTS = """
import json, os, platform, sys, sysconfig
base = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
print(json.dumps([sys.implementation.name, platform.python_version(), sysconfig.get_platform(), base]))
"""


def facts(python: str) -> list[str]:
    """The facts about an interpreter that decide which packages fit it.

    :raises BadConfiguration: it does not run, or it is too old for lepton_airflow.
    """
    try:
        done = subprocess.run(
            [python, "-I", "-c", _FACTS], check=False, capture_output=True, text=True, timeout=60
        )
        found: list[str] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise BadConfiguration(f"{python} did not run as a Python interpreter.") from None
    if tuple(map(int, found[1].split(".")[:2])) < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise BadConfiguration(f"{python} is Python {found[1]}: lepton_airflow needs {oldest} or newer.")
    return found


def _uv() -> str | None:
    """The path of uv: beside the interpreter, or on PATH."""
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else shutil.which("uv")


def _digest_of_constraints(constraints: str | None) -> str | None:
    """The digest of a constraints file; a URL stands for itself, so it must name a version."""
    if constraints is None or "://" in constraints:
        return constraints
    try:
        return hashlib.sha256(Path(constraints).read_bytes()).hexdigest()
    except OSError as error:
        raise BadConfiguration(
            f"constraints={constraints!r} cannot be read on this worker: {error.strerror}. Give a path or a URL."
        ) from None


def _record(home: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        record: dict[str, Any] = json.loads((home / "environment.json").read_bytes())
        return record
    return None


def _complete(home: Path) -> bool:
    # exists() follows the link bin/python: without the interpreter below it, the environment is of no use.
    return (home / "environment.json").exists() and (home / "bin" / "python").exists()


def _lock_file(root: Path, name: str) -> Path:
    file = root / f"{name}.lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        file.touch() if not file.exists() else None
    except OSError as error:
        raise BadConfiguration(
            f"environments cannot be kept in {root}: {error.strerror}. Set [lepton] environments to a folder that "
            "workers can write."
        ) from None
    return file


@contextmanager
def _locked(root: Path, name: str, how: int) -> Iterator[IO[str]]:
    """Hold an environment's lock, which the kernel releases when the process dies.

    The lock file stays when the environment is removed: another process may have it open, and wait for the lock.
    """
    with _lock_file(root, name).open("r+") as lock:
        fcntl.flock(lock, how)
        yield lock


def _busy(root: Path, name: str) -> bool:
    try:
        with _locked(root, name, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
    except BlockingIOError:
        return True


@dataclass
class _Installer:
    """Runs uv or pip, reports what they print, and tells a failure that may pass from one that will not."""

    name: str
    lock: IO[str]
    say: Say

    def __call__(self, command: Sequence[str]) -> None:
        env = os.environ | {"NO_COLOR": "1", "UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never"}
        env.pop("PYTHONPATH", None)
        lines = []
        try:
            # The installer inherits the lock: if only this process is killed, nobody touches the folder while it still writes.
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                pass_fds=(self.lock.fileno(),),
            )
        except OSError as error:
            raise BadConfiguration(
                f"environment {self.name} cannot be built: {command[0]}: {error.strerror}. Install it where the worker "
                "runs, or choose the other installer, 'uv' or 'pip'."
            ) from None
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if text := hide_logins(line.rstrip()):
                    lines.append(text)
                    self.say(text)
        if process.wait():
            raise _failure(self.name, lines, process.returncode)


_ORNAMENT = re.compile(r"[×╰─▶├│▲]+|\b(ERROR|error|cause|Caused by):")
_REASON = re.compile(r"^\s*(ERROR:|error:|×)")
# Failures that a later try may not meet. All others come from the packages and the pins.
_PASSING = re.compile(
    r"timed out|(read|connect)timeout|connection (refused|reset|aborted|broken|closed)|NewConnectionError|NameResolution|dns error"
    r"|failed to lookup|temporary failure|error sending request|max retries|ProxyError|IncompleteRead"
    r"|server error \(5|(HTTP error|status code|Error) 5\d\d|too many requests|no space left",
    re.IGNORECASE,
)


def _failure(name: str, lines: list[str], code: int) -> LeptonError:
    starts = [n for n, line in enumerate(lines) if _REASON.match(line)]
    if starts and lines[starts[-1]].startswith("ERROR:"):
        reason = lines[starts[-1]]  # pip: its last error is the reason
    elif starts:
        reason = " ".join(lines[starts[0] :])  # uv: the reason takes several lines, from the first error on
    else:
        reason = (lines or [f"exit code {code}"])[-1]
    reason = " ".join(_ORNAMENT.sub(" ", reason).split())[:600].rstrip(".")
    what = f"environment {name} could not be built: {reason}."
    suspects = [line for line in lines if line.startswith("WARNING:")] + [reason]
    passing = next((line for line in suspects if _PASSING.search(line)), None)
    if code < 0 or (passing and "certificate" not in reason):
        before = "" if not passing or passing.strip() in reason else f" Before that: {passing.strip()[:300]}."
        return RunnerError(
            f"{what}{before} A retry may find the index, the network or the disk in order again."
        )
    if any("ensurepip is not" in line for line in lines):
        return BadConfiguration(
            f"environment {name} could not be built: its Python cannot make environments. Install uv beside Airflow, or "
            "Python's venv module (Debian: python3-venv)."
        )
    return BadConfiguration(f"{what} Change extras, requirements, constraints or python of Venv.")
