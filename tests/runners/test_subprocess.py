from __future__ import annotations

from typing import Any

from lepton_airflow.runners import Runner, Subprocess
from lepton_airflow.testing import LocalRunnerConformance


class TestSubprocess(LocalRunnerConformance):
    def make_runner(self, **settings: Any) -> Runner:
        return Subprocess(**settings)
