"""What every runner promises, on pods of a real cluster; and every stage in pods, with the bytes that it makes here."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lepton_airflow.runners import Runner
from lepton_airflow.testing import IsolatedRunnerConformance, StageConformance


class TestPod(IsolatedRunnerConformance):
    # The kubelet keeps 10 MiB of a container's log by default, and rotates it away from whoever reads it late.
    many_lines: ClassVar[int] = 20_000

    @pytest.fixture(autouse=True)
    def _pods(self, make_pod: Callable[..., Runner]) -> None:
        self.make_pod = make_pod

    @pytest.fixture
    def tmp_path(self, shared: Path) -> Path:
        """Where a test keeps its files: on the volume that its pods see too."""
        folder = shared / secrets.token_hex(4)
        folder.mkdir()
        return folder

    def make_runner(self, **settings: Any) -> Runner:
        limit = settings.pop("memory_limit_mb", None)
        return self.make_pod(**settings, **({"memory": f"{limit}Mi"} if limit else {}))


class TestStages(StageConformance):
    stops: ClassVar[int] = int(os.environ.get("LEPTON_STOPS", "0"))  # as in tests/runners/test_every_stage.py

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _pods(cls, make_pod: Callable[..., Runner]) -> None:
        cls.make_pod = staticmethod(make_pod)

    @pytest.fixture(scope="class")
    def folder(self, shared: Path) -> Path:
        """Where the data, the store and MLflow's database lie: on the volume that the pods see too."""
        folder = shared / "chain"
        folder.mkdir()
        return folder

    def make_runner(self) -> Runner:
        return self.make_pod()
