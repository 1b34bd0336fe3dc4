"""Run a stage in a process of its own on the worker: the default."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lepton_airflow.contract import Receipt, Request
from lepton_airflow.door import redact
from lepton_airflow.errors import BadConfiguration, OutOfMemory, RunnerError
from lepton_airflow.runners import Runner, settle
from lepton_airflow.store import Connection

log = logging.getLogger("lepton_airflow.stage")

# What a stage may see of the worker's environment. AIRFLOW__* and AIRFLOW_CONN_* hold secrets and never pass;
# cloud credentials come from a Connection or from the machine's role (whose variables only name files and roles).
ALLOWED_ENVIRONMENT = (
    "PATH HOME USER LOGNAME SHELL LANG LANGUAGE LC_* TZ TMPDIR VIRTUAL_ENV LD_LIBRARY_PATH PYTHONHASHSEED "
    "SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy "
    "OMP_* OPENBLAS_* MKL_* NUMEXPR_* NVIDIA_* CUDA_* "
    "AWS_REGION AWS_DEFAULT_REGION AWS_ROLE_ARN AWS_WEB_IDENTITY_TOKEN_FILE GOOGLE_APPLICATION_CREDENTIALS "
    "AZURE_CLIENT_ID AZURE_TENANT_ID AZURE_FEDERATED_TOKEN_FILE"
).split()

_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
_POLL_S = 0.25


@dataclass
class Subprocess(Runner):
    """Run the stage in its own process group on the worker, with an allow-listed environment.

    :param memory_limit_mb: resident memory of the stage and its children above which it is killed [MiB]; None: no limit.
    :param grace_s: time between asking the stage to stop and killing it [seconds].
    :param env: environment variables to set for the stage. No secrets: they show in the serialized DAG.
    :param pass_env: further variables of the worker to pass on, as names or patterns such as ``MYTEAM_*``.
    """

    memory_limit_mb: int | None = None
    grace_s: float = 10.0
    env: dict[str, str] = field(default_factory=dict)
    pass_env: list[str] = field(default_factory=list)
    _process: subprocess.Popen[str] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.memory_limit_mb is not None and self.memory_limit_mb < 64:
            raise BadConfiguration(
                f"Subprocess(memory_limit_mb={self.memory_limit_mb}): a Python process needs at least 64 MiB."
            )
        if self.grace_s < 0:
            raise BadConfiguration(f"Subprocess(grace_s={self.grace_s}): expected seconds, zero or more.")

    def run(self, request: Request, connections: Sequence[Connection], context: Mapping[str, Any]) -> Receipt:
        """Start the door, stream its log, and return the receipt it left."""
        with tempfile.TemporaryDirectory(prefix="lepton-run-") as folder:
            receipt_file = Path(folder, "receipt.json")
            Path(folder, "request.json").write_text(request.to_json())
            with self._started(folder, connections) as process:
                over_limit = self._attend(process, {c.id: c for c in connections})
            if over_limit:
                raise OutOfMemory(
                    f"{request.stage} used {over_limit} MiB, its limit is {self.memory_limit_mb} MiB and it was killed: "
                    "raise memory_limit_mb of the runner, or lower what the stage reads at once."
                )
            if not receipt_file.exists():
                raise RunnerError(f"{request.stage} left no receipt: {_how_it_ended(process.returncode)}")
            return settle(request, Receipt.from_json(receipt_file.read_bytes()))

    def cancel(self) -> None:
        """Ask the stage to stop, and kill its process group when the grace period is over."""
        process = self._process
        if process is None:
            return
        _signal_group(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(self.grace_s)
        _signal_group(process, signal.SIGKILL)

    @contextmanager
    def _started(self, folder: str, connections: Sequence[Connection]) -> Iterator[subprocess.Popen[str]]:
        secrets_read, secrets_write = os.pipe()
        # The write end of the second pipe stays with this process alone: when it dies, the stage reads the end of file.
        alive_read, alive_write = os.pipe()
        try:
            process = self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "lepton_airflow", "run"),
                    *(f"{folder}/request.json", f"{folder}/receipt.json"),
                    *("--connections-fd", str(secrets_read), "--parent-fd", str(alive_read)),
                ],
                cwd=folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                bufsize=1,
                start_new_session=True,
                pass_fds=(secrets_read, alive_read),
            )
            os.close(secrets_read)
            os.close(alive_read)
            secrets_read = alive_read = -1
            with open(secrets_write, "w") as pipe:
                secrets_write = -1
                with suppress(BrokenPipeError):  # it ended before it read; its exit is reported below
                    json.dump([asdict(c) for c in connections], pipe)
            try:
                yield process
            finally:
                _signal_group(process, signal.SIGKILL)  # whatever the stage left behind
                process.wait()
                self._process = None
        finally:
            for fd in (secrets_read, secrets_write, alive_read, alive_write):
                if fd >= 0:
                    os.close(fd)

    def _attend(self, process: subprocess.Popen[str], connections: Mapping[str, Connection]) -> int | None:
        """Bring the log over until the stage ends; the MiB it used if that was over the limit, else None."""
        over: list[int] = []
        if self.memory_limit_mb is not None:
            threading.Thread(target=self._watch_memory, args=(process, over), daemon=True).start()
        assert process.stdout is not None
        reader = threading.Thread(target=_forward, args=(process.stdout, connections), daemon=True)
        reader.start()
        process.wait()
        # A grandchild may hold the pipe open; the stage itself has ended, so its group is ended before the last lines.
        _signal_group(process, signal.SIGKILL)
        reader.join(timeout=5)
        return over[0] if over else None

    def _watch_memory(self, process: subprocess.Popen[str], over: list[int]) -> None:
        import psutil

        limit = (self.memory_limit_mb or 0) << 20
        while process.poll() is None:
            used = 0
            with suppress(psutil.Error):
                family = psutil.Process(process.pid)
                for member in (family, *family.children(recursive=True)):
                    with suppress(psutil.Error):
                        info = member.memory_info()
                        used += info.rss - getattr(info, "shared", 0)
            if used > limit:
                over.append(used >> 20)
                _signal_group(process, signal.SIGKILL)
                return
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)

    def _environment(self) -> dict[str, str]:
        wanted = [*ALLOWED_ENVIRONMENT, *self.pass_env]
        env = {k: v for k, v in os.environ.items() if any(fnmatch.fnmatchcase(k, p) for p in wanted)}
        # User code lives in the DAG bundle or the plugins folder, which Airflow puts on sys.path.
        installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        ours = [p for p in sys.path if p and p not in installed and not p.endswith(("lib-dynload", ".zip"))]
        return env | {"PYTHONPATH": os.pathsep.join(ours), "PYTHONUNBUFFERED": "1"} | self.env


def _forward(stream: Any, connections: Mapping[str, Connection]) -> None:
    with suppress(ValueError):  # closed under us after the kill
        for line in stream:
            text = redact(line.rstrip("\n"), connections)  # a library may print what it was given
            level = _LEVEL.match(text)
            log.log(getattr(logging, level[1]) if level else logging.INFO, "%s", text[level.end() :] if level else text)


def _signal_group(process: subprocess.Popen[str], sig: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, sig)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}; the log above has its last words."
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        return "it was killed (SIGKILL), most likely by the kernel for memory: give it a memory_limit_mb below the worker's."
    return f"it was ended by {name}; the log above has its last words."
