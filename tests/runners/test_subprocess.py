from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.contract import Request
from lepton_airflow.errors import Preempted, RunnerError
from lepton_airflow.runners import Runner, Subprocess
from lepton_airflow.testing import LocalRunnerConformance, probe, until


class TestSubprocess(LocalRunnerConformance):
    def make_runner(self, **settings: Any) -> Runner:
        return Subprocess(**settings)


def test_a_stage_that_did_not_stop_in_time_was_not_killed_for_memory(tmp_path: Path) -> None:
    pids, runner = tmp_path / "pids", Subprocess(grace_s=0.2)
    request = Request(
        "lepton_airflow.testing.probe_stages:Hang",
        {"pids": str(pids), "stubborn": "ignore"},
        str(tmp_path / "store"),
    )

    def cancel() -> None:
        until(pids.exists, "the stage to run")
        runner.cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(RunnerError, match=r"had not stopped after grace_s=0.2 s, and was killed"):
        runner.run(request, [], {})
    canceller.join()


def test_a_stop_before_the_process_is_known_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Subprocess()
    monkeypatch.setattr("lepton_airflow.runners.subprocess.recall", lambda *_: runner.cancel())
    with pytest.raises(Preempted):
        runner.run(probe("Copy", tmp_path / "store"), [], {})
