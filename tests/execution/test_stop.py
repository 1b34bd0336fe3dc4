"""A stop passes through whatever catches exceptions, and nothing that it has disturbed is published."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lepton_airflow.contract import Receipt, Request
from lepton_airflow.store import Store

# Stages that take a stop for something else. Each says in the file `begun` that it may be stopped.
STAGES = '''
import logging, threading, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from lepton_airflow.stages import Result, Stage
from lepton_airflow.errors import BadInput, LeptonError

@dataclass(kw_only=True)
class Base(Stage):
    begun: str
    outputs: ClassVar[tuple[str, ...]] = ("score",)

    def run(self, run):
        Path(self.begun).touch()
        return Result(summary="done", values={"score": self.score(run)})

class Swallows(Base):
    """As logging, Great Expectations and scikit-learn do."""
    def score(self, run):
        until, failed = time.monotonic() + 20, 0
        while time.monotonic() < until:
            try:
                time.sleep(0.01)
            except Exception:
                failed += 1
        return "nan" if failed else 1.0

class SwallowsAll(Base):
    def score(self, run):
        until, failed = time.monotonic() + 20, 0
        while time.monotonic() < until and failed < 3:
            try:
                time.sleep(0.01)
            except:
                failed += 1
        return "nan" if failed else 1.0

class Destructor(Base):
    """Where an exception is printed and ignored."""
    def score(self, run):
        class Slow:
            def __del__(self):
                time.sleep(0.5)
        for _ in range(100):
            Slow()
            time.sleep(0.15)
        return 1.0

class Replaces(Base):
    """As DuckDB does: the exception becomes an error of its own, and that a finding."""
    def score(self, run):
        try:
            time.sleep(20)
        except BaseException:
            pass
        raise BadInput("1 of 20 expectations failed: could not be evaluated")

class Wraps(Base):
    def score(self, run):
        try:
            time.sleep(20)
        except BaseException:
            pass
        raise RuntimeError("Query interrupted")

class CleansUp(Base):
    """What it does on its way out is not interrupted again."""
    def score(self, run):
        try:
            time.sleep(20)
        finally:
            time.sleep(0.5)
            Path(self.begun).with_name("cleaned").touch()
        return 1.0

@dataclass(kw_only=True)
class Asks(Base):
    """Resumable, and its children die of the signal."""
    resumable: ClassVar[bool] = True
    def score(self, run):
        run.should_stop()
        time.sleep(1)  # from its first question on it is not interrupted
        Path(self.begun).with_name("slept").touch()
        while not run.should_stop():
            time.sleep(0.01)
        raise LeptonError("a worker process ended")

@dataclass(kw_only=True)
class HasNotAsked(Base):
    """Resumable, and still importing its libraries."""
    resumable: ClassVar[bool] = True
    def score(self, run):
        time.sleep(20)
        run.check_stop()
        return 1.0

@dataclass(kw_only=True)
class NeverAsks(SwallowsAll):
    """Resumable, and takes the only interruption that there is for an error."""
    resumable: ClassVar[bool] = True
'''
NAMES = [
    "Swallows",
    "SwallowsAll",
    "Destructor",
    "Replaces",
    "Wraps",
    "CleansUp",
    "Asks",
    "HasNotAsked",
    "NeverAsks",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("signals", [1, 3])
def test_a_stop_is_obeyed_and_counts_for_nothing_else(tmp_path: Path, name: str, signals: int) -> None:
    (tmp_path / "stubborn.py").write_text(STAGES)
    begun, receipt = tmp_path / "begun", tmp_path / "receipt.json"
    request = Request(f"stubborn:{name}", {"begun": str(begun)}, str(tmp_path / "store"))
    (tmp_path / "request.json").write_text(request.to_json())
    arguments = ["run", "request.json", str(receipt), "--search-path", str(tmp_path)]
    stage = subprocess.Popen([sys.executable, "-m", "lepton_airflow", *arguments], cwd=tmp_path)
    try:
        while not begun.exists():
            assert stage.poll() is None
            time.sleep(0.02)
        for _ in range(signals):
            time.sleep(0.05)
            stage.send_signal(signal.SIGTERM)
        assert stage.wait(timeout=10) == 75
    finally:
        stage.kill()
        stage.wait()
    found = Receipt.from_json(receipt.read_bytes())
    assert found.status == "preempted"
    assert "asked to stop (SIGTERM)" in found.summary
    assert (tmp_path / "cleaned").exists() == (name == "CleansUp")
    assert (tmp_path / "slept").exists() == (name == "Asks")
    store = Store(str(tmp_path / "store"))
    assert store.receipt(request.run_key) == found
    assert store.keys("cache") == []  # nothing that a later run would take for a result


def test_a_stop_before_the_stage_begins_is_kept_for_it(tmp_path: Path) -> None:
    script = f"""
import os, signal
from lepton_airflow.contract import Request
from lepton_airflow.execution.run_stage import run_stage
from lepton_airflow.execution.stop import StopOnSigterm
stop = StopOnSigterm(resumable=False)
os.kill(os.getpid(), signal.SIGTERM)
print(run_stage(Request("lepton_airflow.testing.probe_stages:Copy", {{}}, {str(tmp_path)!r}), {{}}, stop).status)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "preempted"


def test_a_stop_after_the_result_changes_nothing(tmp_path: Path) -> None:
    """The signal comes while the receipt is written."""
    script = f"""
import os, signal, json
from lepton_airflow.contract import Request
from lepton_airflow.execution import run_stage as module
from lepton_airflow.execution.stop import StopOnSigterm
record = module.cache.record
def interrupted(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    record(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
module.cache.record = interrupted
request = Request("lepton_airflow.testing.probe_stages:Copy", {{"text": "whole"}}, {str(tmp_path)!r})
print(module.run_stage(request, {{}}, StopOnSigterm(resumable=False)).status)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "done"
