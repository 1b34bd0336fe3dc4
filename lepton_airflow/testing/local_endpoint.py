"""A real model server on this machine, on loopback."""

from __future__ import annotations

import json
import signal
import sys
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lepton_airflow.errors import LeptonError
from lepton_airflow.testing import processes


@dataclass
class LocalEndpoint:
    """Start the server of an endpoint and stop it; also a context manager.

    :param endpoint: its name.
    :param store: URI of the store that it follows.
    :param home: its log lives there.
    :param port: 0: a free one.
    :param more: names of further endpoints of the same server.
    :param options: further options of ``python -m lepton_airflow serve``.
    :param more: further endpoints, each a model of the same server.
    """

    endpoint: str
    store: str
    home: Path
    port: int = 0
    options: Sequence[str] = ()
    more: Sequence[str] = ()

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
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.home / f"{self._process}.log"

    def running(self) -> bool:
        """Whether this home's server runs."""
        return processes.pid(self._process, self.home) is not None

    def start(self, wait_s: float = 180) -> None:
        """Start the server and wait until it answers; it may have nothing to serve yet."""
        processes.refuse_used_port(self.port, "choose another port for the endpoint")
        self.home.mkdir(parents=True, exist_ok=True)
        if self.store.startswith(
            ("/", "file://")
        ):  # a store that is not there is refused, and here it may be new
            Path(self.store.removeprefix("file://")).mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "lepton_airflow", "serve", self.endpoint, *self.more),
            *("--store", self.store),
            *("--port", str(self.port), "--drain-s", "0", *self.options),
        ]
        processes.start(self._process, command, self.home)
        processes.until(self._answers, "the model server to answer", wait_s, str(self.log))

    def stop(self) -> None:
        """End the server as a service manager does: it answers what it has admitted first."""
        processes.stop(self._process, self.home, wait_s=40)

    def kill(self) -> None:
        """End the server at once, as a crash does."""
        processes.stop(self._process, self.home, signal.SIGKILL)
        processes.until(self._is_port_free, "the killed server's workers to be gone", 30, str(self.log))

    def wait_ready(self, wait_s: float = 180) -> None:
        """Wait until it has a version in service."""
        processes.until(
            lambda: self._get("/v2/health/ready"), "the endpoint to be ready", wait_s, str(self.log)
        )

    def metadata(self) -> dict[str, Any]:
        """What the version in service takes and gives."""
        with urllib.request.urlopen(f"{self.url}/v2/models/{self.endpoint}", timeout=60) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def infer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to an inference request; raises HTTPError where it is refused."""
        answer: dict[str, Any] = json.loads(
            urllib.request.urlopen(
                urllib.request.Request(
                    f"{self.url}/v2/models/{self.endpoint}/infer",
                    json.dumps(request).encode(),
                    {"Content-Type": "application/json"},
                ),
                timeout=60,
            ).read()
        )
        return answer

    @property
    def _process(self) -> str:
        return f"endpoint-{self.endpoint}"

    def _is_port_free(self) -> bool:
        try:
            processes.refuse_used_port(self.port, "wait")
        except LeptonError:
            return False
        return True

    def _answers(self) -> bool:
        processes.check_alive(self._process, self.home)
        return self._get("/v2/health/live")

    def _get(self, path: str) -> bool:
        with suppress(OSError), urllib.request.urlopen(self.url + path, timeout=5):
            return True
        return False
