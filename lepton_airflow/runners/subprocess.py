"""Run a stage in a process of its own on the worker: the default."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

from lepton_airflow.connections import Connection, redactor
from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import (
    DO_NOT_RETRY,
    PREEMPTED,
    SKIP,
    BadConfiguration,
    LeptonError,
    OutOfMemory,
    Preempted,
    RunnerError,
    from_record,
)
from lepton_airflow.execution.output import level_of
from lepton_airflow.execution.processes import MARK, kill_marked, signal_group
from lepton_airflow.execution.run_stage import recall
from lepton_airflow.runners import Runner, settle

if TYPE_CHECKING:
    import psutil

log = logging.getLogger("lepton_airflow.stage")

# The environment variables of the worker that a stage may see. AIRFLOW__* and AIRFLOW_CONN_* hold secrets and never pass.
# Cloud credentials come from a Connection, or from the machine's role, whose variables only name files and roles.
ALLOWED_ENVIRONMENT = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "LC_*",
    "TZ",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "PYTHONHASHSEED",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "OMP_*",
    "OPENBLAS_*",
    "MKL_*",
    "NUMEXPR_*",
    "NVIDIA_*",
    "CUDA_*",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CA_BUNDLE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AZURE_CLIENT_ID",
    "AZURE_TENANT_ID",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_AUTHORITY_HOST",
]
# These do not pass even when pass_env names them.
_NEVER = re.compile(r"^(AIRFLOW__|AIRFLOW_CONN_|AIRFLOW_VAR_|_AIRFLOW)")

# Characters. A longer line is cut into pieces, so that no output fills the worker's memory.
_LONGEST_LINE = 1 << 16
_POLL_S = 0.25


@dataclass(frozen=True)
class Interpreter:
    """A Python that can run the entry point, and where it finds code.

    :ivar python: the path of its executable.
    :ivar path: the folders that it searches before its own libraries.
    :ivar search_path: the folders that it searches after them, for user code.
    :ivar env: environment variables that it needs.
    """

    python: str
    path: list[str]
    search_path: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Exit:
    """How a process of the entry point ended.

    :ivar code: its exit code; negative: the signal that ended it.
    :ivar last_line: the last line of its output.
    :ivar over_limit_mib: the memory it held when it was killed for its limit [MiB]; None if it was not.
    """

    code: int
    last_line: str
    over_limit_mib: int | None


@dataclass(kw_only=True)
class Subprocess(Runner):
    """Run the stage in its own process group on the worker, with an allow-listed environment.

    :param memory_limit_mb: memory that the stage and its children may hold before they are killed [MiB]; shared memory
        counts once, mapped files do not count; None: no limit.
    :param grace_s: time between asking the stage to stop and killing it [seconds].
    :param env: environment variables to set for the stage. No secrets: they show in the serialized DAG.
    :param pass_env: further variables of the worker to pass on, as names or patterns such as ``MYTEAM_*``.
    """

    memory_limit_mb: int | None = None
    grace_s: float = 10.0
    env: dict[str, str] = field(default_factory=dict)
    pass_env: list[str] = field(default_factory=list)
    _process: subprocess.Popen[str] | None = field(default=None, init=False, repr=False, compare=False)
    _cancelled: bool = field(default=False, init=False, repr=False, compare=False)
    _grace_over: bool = field(default=False, init=False, repr=False, compare=False)
    _same_interpreter: ClassVar[bool] = True  # the stage has the worker's code and libraries

    def __post_init__(self) -> None:
        if self.memory_limit_mb is not None and self.memory_limit_mb < 64:
            raise BadConfiguration(
                f"{type(self).__name__}(memory_limit_mb={self.memory_limit_mb}): a Python process needs at least 64 MiB."
            )
        if self.grace_s < 0:
            raise BadConfiguration(
                f"{type(self).__name__}(grace_s={self.grace_s}): expected seconds, zero or more."
            )

    def run(self, request: Request, connections: Sequence[Connection], context: Mapping[str, Any]) -> Receipt:
        """Start the entry point, stream its log, and return the receipt it left; a cached result needs no process."""
        self._cancelled = self._grace_over = False
        if self._same_interpreter and (hit := recall(request, {c.id: c for c in connections})):
            return hit
        supervised = bool(context)
        with tempfile.TemporaryDirectory(prefix="lepton-run-", ignore_cleanup_errors=True) as folder:
            receipt_file = Path(folder, "receipt.json")
            Path(folder, "request.json").write_text(request.to_json(), encoding="utf-8")
            Path(folder, "tmp").mkdir()
            with self._interpreter(request.stage, folder, supervised) as interpreter:
                arguments = ["run", f"{folder}/request.json", str(receipt_file)]
                arguments += ["--search-path", os.pathsep.join(interpreter.search_path)]
                ended = self._run_entry_point(
                    interpreter, arguments, folder, supervised, connections, self.memory_limit_mb
                )
            if ended.over_limit_mib:
                raise OutOfMemory(
                    f"{request.stage} used {ended.over_limit_mib} MiB, its limit is {self.memory_limit_mb} MiB and it was "
                    "killed: raise memory_limit_mb of the runner, or lower what the stage reads at once."
                )
            if not receipt_file.exists():
                raise self._without_receipt(request.stage, ended.code, ended.last_line)
            return settle(request, Receipt.from_json(receipt_file.read_bytes()))

    def cancel(self) -> None:
        """Ask the stage to stop, and kill its process group when the grace period is over."""
        self._cancelled = True
        process = self._process
        if process is None:
            return  # one that starts now is stopped as soon as it is known
        signal_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + self.grace_s
        # Airflow calls this from a signal handler, which may have interrupted run() anywhere, so this must take no lock.
        while time.monotonic() < deadline and not _has_ended(process.pid):
            time.sleep(0.05)
        self._grace_over = not _has_ended(process.pid)
        signal_group(process.pid, signal.SIGKILL)

    @contextmanager
    def _interpreter(self, stage: str, folder: str, supervised: bool) -> Iterator[Interpreter]:
        """The interpreter that runs the entry point for this stage: the worker's own."""
        yield own_interpreter()

    def _run_entry_point(
        self,
        interpreter: Interpreter,
        arguments: Sequence[str],
        folder: str,
        supervised: bool,
        connections: Sequence[Connection] | None = None,
        limit_mb: int | None = None,
    ) -> _Exit:
        """Run ``python -m lepton_airflow ARGUMENTS`` to its end, forward its log, and leave nothing of it behind."""
        last_line: deque[str] = deque(maxlen=1)
        with self._started(interpreter, arguments, folder, connections, last_line) as process:
            over_limit_mib = self._supervise(process, supervised, limit_mb)
        return _Exit(process.returncode, "".join(last_line), over_limit_mib)

    @contextmanager
    def _started(
        self,
        interpreter: Interpreter,
        arguments: Sequence[str],
        folder: str,
        connections: Sequence[Connection] | None,
        last_line: deque[str],
    ) -> Iterator[subprocess.Popen[str]]:
        """The process of the entry point, its log forwarded; at the end it is gone, and everything that it started."""
        mark = secrets.token_hex(16)
        # The write end of the second pipe stays in this process alone: when this dies, the stage reads the end of file.
        with _pipe() as (connections_in, connections_out), _pipe() as (parent_in, _parent_out):
            if connections is not None:
                arguments = [*arguments, "--connections-fd", str(connections_in.fileno())]
            process = self._process = subprocess.Popen(
                [
                    *(interpreter.python, "-P", "-m", "lepton_airflow", *arguments),
                    *("--parent-fd", str(parent_in.fileno()), "--scratch", folder),
                ],
                cwd=folder,
                env=self._environment(interpreter, folder) | {MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                pass_fds=(connections_in.fileno(), parent_in.fileno()),
            )
            hide = redactor({c.id: c for c in connections or ()})
            with _forwarding(process, hide, last_line), self._ending(process, mark):
                connections_in.close()
                parent_in.close()
                with suppress(BrokenPipeError), connections_out:
                    connections_out.write(json.dumps([asdict(c) for c in connections or ()]).encode())
                if self._cancelled:
                    self.cancel()
                yield process

    @contextmanager
    def _ending(self, process: subprocess.Popen[str], mark: str) -> Iterator[None]:
        """At the end, kill the process and everything that carries its mark."""
        try:
            yield
        finally:
            # Nobody has collected the ended process until here, so no other process can have its id.
            signal_group(process.pid, signal.SIGKILL)
            kill_marked(mark)
            self._process = None
            process.wait()

    def _supervise(
        self, process: subprocess.Popen[str], supervised: bool, limit_mb: int | None
    ) -> int | None:
        """Wait until the process ends, without collecting it; the memory it held if that was over the limit [MiB]."""
        over_limit: list[int] = []
        ended = threading.Event()
        watches = []
        if limit_mb is not None:
            limit = limit_mb << 20
            watches.append(
                threading.Thread(
                    target=_limit_memory, args=(process.pid, limit, ended, over_limit), daemon=True
                )
            )
        if supervised:
            watches.append(
                threading.Thread(
                    target=_end_with_supervisor, args=(os.getppid(), ended, self.cancel), daemon=True
                )
            )
        for watch in watches:
            watch.start()
        try:
            with suppress(ChildProcessError):  # a worker that ignores SIGCHLD
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        except BaseException:
            # Airflow's execution_timeout: let the stage save what it has, as when it is cancelled.
            self.cancel()
            raise
        finally:
            ended.set()
            # No watch may send a signal once another process group can have this id.
            for watch in watches:
                watch.join()
        return over_limit[0] if over_limit else None

    def _environment(self, interpreter: Interpreter, folder: str) -> dict[str, str]:
        """The environment variables of a stage whose files lie in ``folder``."""
        wanted = [*ALLOWED_ENVIRONMENT, *self.pass_env]
        env = {
            k: v
            for k, v in os.environ.items()
            if any(fnmatch.fnmatchcase(k, p) for p in wanted) and not _NEVER.match(k)
        }
        # OpenMP's threads spin while they wait. When several tasks share a worker's cores, that made a boosted model of
        # 20,000 rows take 24.5 s instead of 1.7 s (docs/decisions/0004).
        fixed = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        # Scratch space lies in the folder that this process removes, however the stage ends.
        of_run = {"TMPDIR": str(Path(folder, "tmp")), "PYTHONPATH": os.pathsep.join(interpreter.path)}
        return {"OMP_WAIT_POLICY": "PASSIVE"} | env | fixed | interpreter.env | self.env | of_run

    def _without_receipt(self, stage: str, code: int, last_line: str) -> LeptonError:
        """Why there is no receipt: the request was refused, the process stopped before the stage began, or was killed."""
        if code in (DO_NOT_RETRY, PREEMPTED, SKIP):
            return from_record("", last_line, code)
        if code >= 0:
            return RunnerError(
                f"{stage} left no receipt: exit code {code}, last words {last_line!r}; see the log above."
            )
        name = signal.Signals(-code).name
        if name == "SIGTERM":
            return Preempted(
                f"{stage} was asked to stop (SIGTERM) before it began; the next try starts again."
            )
        if name == "SIGKILL" and self._grace_over:
            return RunnerError(
                f"{stage} left no receipt: it was asked to stop, had not stopped after grace_s={self.grace_s:g} s, and was killed; "
                "the next try goes on from what an earlier one has kept."
            )
        if name == "SIGKILL":
            return RunnerError(
                f"{stage} left no receipt: it was killed (SIGKILL), most likely by the kernel for memory: give it a "
                "memory_limit_mb below the worker's."
            )
        return RunnerError(
            f"{stage} left no receipt: it was ended by {name}; the log above has its last words."
        )


def own_interpreter() -> Interpreter:
    """The interpreter of this process, with the folders of its ``sys.path`` that are not its own libraries."""
    before, after = _search_path()
    return Interpreter(sys.executable, before, after)


def _search_path() -> tuple[list[str], list[str]]:
    """The folders of user code and DAGs in ``sys.path``: those before the standard library, and those after it.

    They stay apart, because a DAG file named ``mlflow.py`` that hides no library here must hide none in the stage.
    """
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    ours = [
        (p, place)
        for place, p in enumerate(sys.path)
        if p and p not in installed and not p.endswith(("lib-dynload", ".zip"))
    ]
    stdlib = (
        sys.path.index(os.path.dirname(os.__file__))
        if os.path.dirname(os.__file__) in sys.path
        else len(sys.path)
    )
    before = [p for p, place in ours if place < stdlib]
    # This package itself may lie in a plugins folder.
    package = str(Path(__file__).parents[2])
    if package not in installed and package not in before:
        before.append(package)
    return before, [p for p, place in ours if place > stdlib]


@contextmanager
def _pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A pipe: the file to read from, and the one to write to."""
    read, write = os.pipe()
    with open(read, "rb") as reading, open(write, "wb") as writing:
        yield reading, writing


@contextmanager
def _forwarding(
    process: subprocess.Popen[str], hide: Callable[[str], str], last_line: deque[str]
) -> Iterator[None]:
    """Forward the output of a process to the task's log while it runs."""
    assert process.stdout is not None
    reader = threading.Thread(target=_forward, args=(process.stdout, hide, last_line), daemon=True)
    reader.start()
    try:
        yield
    finally:
        # A process that escaped may hold the stream open: its output is not waited for.
        reader.join(timeout=5)
        if not reader.is_alive():
            process.stdout.close()


def _forward(stream: IO[str], hide: Callable[[str], str], last_line: deque[str]) -> None:
    while line := stream.readline(_LONGEST_LINE):
        level, text = level_of(hide(line.rstrip("\n")))
        last_line.append(text)
        log.log(level, "%s", text)


def _limit_memory(pid: int, limit: int, ended: threading.Event, over_limit: list[int]) -> None:
    """Kill the process group of ``pid`` once it and its children hold more than ``limit`` bytes."""
    import psutil

    while not ended.wait(_POLL_S):
        with suppress(psutil.Error):
            leader = psutil.Process(pid)
            family = [leader, *leader.children(recursive=True)]
            # The kernel knows an upper bound at once; the exact number costs a walk over all pages.
            if sum(_resident_bytes(p) for p in family) <= limit:
                continue
            used = sum(_unshared_bytes(p) for p in family)
            if used > limit and not ended.is_set():
                over_limit.append(used >> 20)
                signal_group(pid, signal.SIGKILL)
                return


def _end_with_supervisor(supervisor: int, ended: threading.Event, cancel: Callable[[], None]) -> None:
    """Cancel the stage once Airflow's supervisor, our parent, is gone: without its heartbeat Airflow starts another try."""
    while not ended.wait(_POLL_S):
        if os.getppid() != supervisor:
            cancel()
            return


def _resident_bytes(process: psutil.Process) -> int:
    import psutil

    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _unshared_bytes(process: psutil.Process) -> int:
    """The memory that the end of a process frees: private memory and its share of shared memory, without mapped files."""
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:  # the process has ended, or this is not Linux
        return _resident_bytes(process)
    return sum(int(kib) << 10 for kib in re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", rollup, re.MULTILINE))


def _has_ended(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return True
