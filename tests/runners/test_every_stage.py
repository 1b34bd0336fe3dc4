"""Every stage on every runner of this machine: the same life of a model, with the same bytes."""

from __future__ import annotations

import os
import sys
from typing import ClassVar

import pytest

from lepton_airflow.runners import InProcess, Runner, Subprocess, Venv
from lepton_airflow.stages import all_stages
from lepton_airflow.testing import StageConformance
from lepton_airflow.testing.conformance import STAGES

pytestmark = pytest.mark.slow


def test_no_stage_is_left_out() -> None:
    assert set(all_stages()) == set(STAGES)


class TestInProcess(StageConformance):
    def make_runner(self) -> Runner:
        return InProcess()


class TestSubprocess(StageConformance):
    # LEPTON_STOPS=100 makes a drill of it, hours long: each stage is asked to stop so often, at random moments.
    stops: ClassVar[int] = int(os.environ.get("LEPTON_STOPS", "0"))

    def make_runner(self) -> Runner:
        return Subprocess()


class TestVenv(StageConformance):
    stops = TestSubprocess.stops

    def make_runner(self) -> Runner:
        return Venv(python=sys.executable)
