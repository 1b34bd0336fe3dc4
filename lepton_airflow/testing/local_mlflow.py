"""A real MLflow server on this machine, on loopback with sqlite."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lepton_airflow.testing import processes


@dataclass
class LocalMlflow:
    """Start an MLflow server under ``home`` and stop it; also a context manager.

    :param home: its database and artifacts live there.
    :param port: 0: a free one.
    :param host: address to listen on; another one than loopback is for stages that run on other machines.
    """

    home: Path
    port: int = 0
    host: str = "127.0.0.1"

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
        """Where API and UI are."""
        return f"http://{self.host}:{self.port}"

    @property
    def connection(self) -> str:
        """The Airflow Connection to it, as the value of an ``AIRFLOW_CONN_…`` variable."""
        return json.dumps({"conn_type": "http", "host": self.url})

    def running(self) -> bool:
        """Whether this home's server runs."""
        return processes.pid("mlflow", self.home) is not None

    def start(self, wait_s: float = 240) -> None:
        """Start the server and wait until it answers."""
        processes.refuse_used_port(self.port, "choose another port for MLflow")
        self.home.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", self.host, "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self.home}/mlflow.db", "--workers", "1"),
            *("--artifacts-destination", str(self.home / "artifacts")),
        ]
        # Without its background jobs, which nobody uses here: they are eight more processes.
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        processes.start("mlflow", command, self.home, env)
        processes.until(self._answers, "MLflow to answer", wait_s, f"{self.home}/mlflow.log")

    def stop(self) -> None:
        """End the server."""
        processes.stop("mlflow", self.home)

    def _answers(self) -> bool:
        processes.check_alive("mlflow", self.home)
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
            return True
        return False
