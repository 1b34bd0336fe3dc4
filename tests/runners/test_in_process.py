from __future__ import annotations

from typing import Any

from lepton_airflow.runners import InProcess, Runner
from lepton_airflow.testing import WorkerRunnerConformance


class TestInProcess(WorkerRunnerConformance):
    def make_runner(self, **settings: Any) -> Runner:
        return InProcess()
