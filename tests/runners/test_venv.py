"""The runner Venv: a given interpreter keeps the whole contract; what it builds, builds once, and says why it cannot."""

from __future__ import annotations

import sys
from typing import Any

from lepton_airflow.runners import Runner, Venv
from lepton_airflow.testing import LocalRunnerConformance


class TestGivenInterpreter(LocalRunnerConformance):
    def make_runner(self, **settings: Any) -> Runner:
        return Venv(python=sys.executable, **settings)
