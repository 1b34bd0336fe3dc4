"""A real Airflow on this machine: scheduler, triggerer, DAG processor and API server, on loopback and free ports.

The demo and the tests drive it the way a person does: through its REST API.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lepton_airflow.errors import LeptonError
from lepton_airflow.testing import processes

COMPONENTS = ("api-server", "scheduler", "dag-processor", "triggerer")
_BUSY_S = 30  # how long a locked database is asked again
_FIRST_ANSWER_S = 120
_ENDED = frozenset({"success", "failed"})


@dataclass
class LocalAirflow:
    """Start a whole Airflow under ``home``, call its API, and stop it; also a context manager.

    :param home: AIRFLOW_HOME; its database, logs and process ids live there, so a later process can stop it.
    :param dags: folder of DAG files.
    :param port: port of the API server and UI; 0: a free one.
    :param env: further environment variables, such as ``AIRFLOW__LEPTON__STORE`` or ``AIRFLOW_CONN_…``.
    :param parallelism: task instances that may run at once.
    :param database: SQLAlchemy URL of the metadata database; default: sqlite under ``home``. PostgreSQL
        (``postgresql+psycopg2://…``) needs psycopg2 and, for Airflow's API server, asyncpg.
    :param password: of the user ``admin``, who must log in; default: whoever reaches the loopback port is admin.
    """

    home: Path
    dags: Path
    port: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    parallelism: int = 2
    database: str | None = None
    password: str | None = field(default=None, repr=False)
    _token: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.home = self.home.absolute()
        self.port = self.port or processes.free_port()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where the UI is."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """The environment that every component and command of this Airflow runs in."""
        # Nothing of another Airflow, and no measuring of coverage, which would slow down every component.
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "COVERAGE_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{keep.get('PATH', '')}"
        return keep | {
            "PATH": path,
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.dags),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": str(self.parallelism),
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": str(self.password is None),
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(self.home / "passwords.json"),
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "30",  # Airflow's 5 s are too short for a busy machine
            "AIRFLOW__API__BASE_URL": self.url,
            "AIRFLOW__API__SECRET_KEY": self._secret("api"),
            "AIRFLOW__API_AUTH__JWT_SECRET": self._secret("jwt"),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": self.database
            or f"sqlite:///{self.home}/airflow.db?timeout=60",
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
            # A file that changes is parsed at once; each further parse costs three seconds of a core.
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "600",
            "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
            "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.3",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
            **self.env,
        }

    def _secret(self, name: str) -> str:
        file = self.home / f"{name}.secret"
        if not file.exists():
            self._write_private(file, secrets.token_hex(32))
        return file.read_text()

    def _write_private(self, file: Path, text: str) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(text)

    # -- processes ---------------------------------------------------------------------------------------------------

    def start(self, components: Sequence[str] = COMPONENTS, wait_s: float = 300) -> None:
        """Make the database, start the components and wait until the API answers.

        :raises LeptonError: the port is taken, or a component ended at once; its log is named.
        """
        processes.refuse_used_port(self.port, "choose another port for Airflow")
        self.home.mkdir(parents=True, exist_ok=True)
        if self.password is not None:
            self._write_private(self.home / "passwords.json", json.dumps({"admin": self.password}))
        self.command("db", "migrate")
        if self.database is None:
            with closing(sqlite3.connect(self.home / "airflow.db")) as database:
                # The file keeps this mode, in which readers do not block a writer. With the default journal a commit can
                # fail at once with "database is locked", which ends Airflow's scheduler.
                database.execute("PRAGMA journal_mode=WAL")
        for component in components:
            self.start_component(component)
        self.wait_until_it_answers(components, wait_s)

    def wait_until_it_answers(self, components: Sequence[str] = COMPONENTS, wait_s: float = 300) -> None:
        """Wait for the API of what was started; raises LeptonError when a component ends, or the time is over."""

        def answers() -> bool:
            for component in components:
                processes.check_alive(component, self.home)
            return self._answers()

        processes.until(answers, f"Airflow to answer on {self.url}", wait_s, f"{self.home}/*.log")

    def start_component(self, component: str) -> int:
        """Start one component in the background; returns its process id."""
        extra = {
            "api-server": ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"],
            "scheduler": ["--skip-serve-logs"],
            "triggerer": ["--skip-serve-logs"],
        }.get(component, [])
        command = [sys.executable, "-m", "airflow", component, *extra]
        return processes.start(component, command, self.home, self.environment())

    def pid(self, component: str) -> int | None:
        """The process id of a component that this home started and that still runs, else None."""
        return processes.pid(component, self.home)

    def running(self) -> bool:
        """Whether all components of this home run."""
        return all(self.pid(component) for component in COMPONENTS)

    def ended(self) -> list[str]:
        """Components that were started, that nobody stopped, and that do not run any more."""
        return [c for c in COMPONENTS if not processes.stopped(c, self.home) and not self.pid(c)]

    def stop_component(self, component: str, sig: signal.Signals = signal.SIGTERM) -> None:
        """End one component and its children; SIGKILL ends it at once, as a power cut would."""
        processes.stop(component, self.home, sig)

    def stop(self) -> None:
        """End every component that this home started."""
        for component in reversed(COMPONENTS):
            self.stop_component(component)

    def _answers(self) -> bool:
        with suppress(OSError, ValueError):  # URLError is an OSError
            # Airflow builds the API for tasks at its first request, which took 11 s here and 40 s on a busy machine: longer
            # than a task waits for it. So the first request is made here.
            with urllib.request.urlopen(f"{self.url}/execution/health", timeout=_FIRST_ANSWER_S):
                pass
            with urllib.request.urlopen(f"{self.url}/api/v2/monitor/health", timeout=5) as reply:
                return bool(json.load(reply)["metadatabase"]["status"] == "healthy")
        return False

    # -- asking it ---------------------------------------------------------------------------------------------------

    def command(self, *args: str, timeout_s: float = 180) -> str:
        """Run ``airflow ARGS`` in this Airflow's environment; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "airflow", *args],
            check=False,
            env=self.environment(),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode:
            raise LeptonError(f"airflow {' '.join(args)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def api(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """One call of the REST API (``/api/v2`` is put before the path); returns the JSON, None when there is none."""
        return self._call(self._request(method, path, body, query))

    def _request(
        self, method: str, path: str, body: Any = None, query: Mapping[str, Any] | None = None
    ) -> urllib.request.Request:
        if self._token is None:
            self._token = self._log_in()
        address = f"{self.url}/api/v2{urllib.parse.quote(path, safe='/:~')}"
        if query:
            address += "?" + urllib.parse.urlencode(query, doseq=True)
        return urllib.request.Request(
            address,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )

    def _log_in(self) -> str:
        request = urllib.request.Request(
            f"{self.url}/auth/token", headers={"Content-Type": "application/json"}
        )
        if self.password is not None:
            request.data = json.dumps({"username": "admin", "password": self.password}).encode()
        return str(self._call(request)["access_token"])

    def _call(self, request: urllib.request.Request, undo: Callable[[], None] | None = None) -> Any:
        """Make a call, and repeat it while the database is busy; ``undo`` first removes what the failed call left."""
        what = f"{request.get_method()} {request.full_url}"
        deadline = time.monotonic() + _BUSY_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    text = reply.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")
                # sqlite takes one writer at a time, and Airflow rolls back what could not be written
                if error.code not in (500, 503) or "atabase" not in said or time.monotonic() > deadline:
                    raise LeptonError(f"{what}: {error.code} {said[:600]}") from None
                time.sleep(1)
                if undo:
                    undo()
            except OSError as error:  # URLError is one, and so is a time-out
                raise LeptonError(f"{what}: no answer ({error}); see the logs in {self.home}.") from None

    def wait_for_dag(self, dag_id: str, wait_s: float = 240) -> None:
        """Wait until the DAG processor has stored a DAG; raises with the import error when it has one."""

        def known() -> bool:
            errors = self.api("GET", "/importErrors")["import_errors"]
            if errors:
                raise LeptonError(
                    f"{errors[0]['filename']} does not import:\n{errors[0]['stack_trace'][-2000:]}"
                )
            with suppress(LeptonError):
                return bool(self.api("GET", f"/dags/{dag_id}")["dag_id"])
            return False

        self.until(known, f"DAG {dag_id} to be parsed", wait_s)

    def trigger(
        self,
        dag_id: str,
        conf: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        logical_date: str | None = None,
    ) -> str:
        """Start one manual run; returns its run id."""
        body: dict[str, Any] = {"conf": dict(conf or {}), "logical_date": logical_date}
        if run_id:
            body["dag_run_id"] = run_id
        return str(self.api("POST", f"/dags/{dag_id}/dagRuns", body)["dag_run_id"])

    def wait(self, dag_id: str, run_id: str, wait_s: float = 300) -> str:
        """Wait for the end of a run; returns ``success`` or ``failed``."""
        state = ""

        def ended() -> bool:
            nonlocal state
            state = self.api("GET", f"/dags/{dag_id}/dagRuns/{run_id}")["state"]
            return state in _ENDED

        self.until(ended, f"run {run_id} of {dag_id} to end", wait_s)
        return state

    def backfill(
        self,
        dag_id: str,
        first: str,
        last: str,
        conf: Mapping[str, Any],
        *,
        max_active_runs: int = 1,
        reprocess: str = "none",
    ) -> int:
        """Start a backfill of the days ``first`` to ``last`` (YYYY-MM-DD), as the UI's form does; returns its id."""
        body = {
            "dag_id": dag_id,
            "from_date": f"{first}T00:00:00Z",
            "to_date": f"{last}T00:00:00Z",
            "max_active_runs": max_active_runs,
            "reprocess_behavior": reprocess,
            "dag_run_conf": dict(conf),
        }
        before = self._active_backfills(dag_id)

        def undo() -> None:  # Airflow commits the backfill before it makes the runs
            for left in self._active_backfills(dag_id) - before:
                self.api("PUT", f"/backfills/{left}/cancel")

        return int(self._call(self._request("POST", "/backfills", body), undo)["id"])

    def _active_backfills(self, dag_id: str) -> set[int]:
        found = self.api("GET", "/backfills", dag_id=dag_id, limit=100, order_by="-id")["backfills"]
        return {b["id"] for b in found if b["completed_at"] is None}

    def wait_for_backfill(self, backfill: int, wait_s: float) -> None:
        """Wait until every run of a backfill has ended."""
        self.until(
            lambda: self.api("GET", f"/backfills/{backfill}")["completed_at"] is not None,
            f"backfill {backfill} to end",
            wait_s,
        )

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """All runs of a DAG, oldest data first."""
        found = self.api("GET", f"/dags/{dag_id}/dagRuns", limit=100)["dag_runs"]
        return sorted(found, key=lambda r: (r["data_interval_start"] or "", r["run_after"]))

    def tasks(self, dag_id: str, run_id: str) -> dict[str, dict[str, Any]]:
        """The task instances of a run, by task id (``id[n]`` where mapped)."""
        found = self.api("GET", f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances", limit=200)["task_instances"]
        return {t["task_id"] + (f"[{t['map_index']}]" if t["map_index"] >= 0 else ""): t for t in found}

    def xcom(
        self, dag_id: str, run_id: str, task_id: str, key: str = "return_value", map_index: int = -1
    ) -> Any:
        """One XCom value."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}"
        return self.api("GET", path, map_index=map_index, deserialize="true", stringify="false")["value"]

    def log(self, dag_id: str, run_id: str, task_id: str, try_number: int = 1, map_index: int = -1) -> str:
        """The log of one try of a task, as the UI shows it."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        lines = self.api("GET", path, full_content="true", map_index=map_index)["content"]
        return "\n".join(line if isinstance(line, str) else json.dumps(line, default=str) for line in lines)

    def clear(self, dag_id: str, run_id: str, task_ids: Sequence[str], downstream: bool = False) -> None:
        """Clear tasks of a run so that they run again."""
        self.api(
            "POST",
            f"/dags/{dag_id}/clearTaskInstances",
            {
                "dry_run": False,
                "dag_run_id": run_id,
                "task_ids": list(task_ids),
                "only_failed": False,
                "reset_dag_runs": True,
                "include_downstream": downstream,
            },
        )

    def until(self, condition: Callable[[], bool], what: str, wait_s: float) -> None:
        """Wait for a condition; raises LeptonError when the time is over, or a component ended that nobody stopped."""

        def checked() -> bool:
            for component in COMPONENTS:
                if not processes.stopped(component, self.home):
                    processes.check_alive(component, self.home)
            return condition()

        processes.until(checked, what, wait_s, f"the logs in {self.home}")
