"""What every runner must do, as tests: subclass the class that fits and say how to make your runner.

::

    class TestMyRunner(IsolatedRunnerConformance):
        def make_runner(self, **settings):
            return MyRunner(**settings)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Receipt, Request, RunIdentity, split_pin
from lepton_airflow.errors import (
    BadConfiguration,
    BadInput,
    IntegrityError,
    LeptonError,
    OutOfMemory,
    Preempted,
    RunnerError,
    Skipped,
)
from lepton_airflow.registry.ledger import Ledger, Registrations
from lepton_airflow.runners import InProcess, Runner
from lepton_airflow.stages import get_stage
from lepton_airflow.store import Store
from lepton_airflow.testing.local_endpoint import LocalEndpoint

PROBES = "lepton_airflow.testing.probe_stages"

_PASSWORD = 'c0nformance p@ss/wörd"%'  # noqa: S105 - made up, with all that needs quoting somewhere


def probe(name: str, store: str | Path, **parameters: Any) -> Request:
    """A request for one of the probe stages."""
    return Request(
        stage=f"{PROBES}:{name}",
        parameters=parameters,
        store=str(store),
        identity=RunIdentity(dag_id="conformance", task_id=name),
    )


def until(condition: Callable[[], Any], what: str, within_s: float = 20) -> Any:
    """Wait for a condition to become true and return its value; fails the test when it does not."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"gave up after {within_s:.0f} s of waiting for {what}"
        time.sleep(0.02)
    return value


def running(pids: Sequence[int]) -> list[int]:
    """The ids among these whose process still runs; a zombie does not."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def _pids(file: Path) -> list[int]:
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


class RunnerConformance:
    """The contract of every runner. Each test gets a store that runner and test both reach."""

    @abstractmethod
    def make_runner(self, **settings: Any) -> Runner:
        """A runner; ``settings`` may be ``memory_limit_mb`` and ``grace_s``."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Path:
        """The artifact store of the test; override it where the runner reaches another one."""
        return tmp_path / "store with späce"

    def run(
        self, request: Request, connections: Sequence[Connection] = (), runner: Runner | None = None
    ) -> Receipt:
        """Run a request with no Airflow around it."""
        return (runner or self.make_runner()).run(request, connections, {})

    # -- results -----------------------------------------------------------------------------------------------------

    def test_result_arrives_whole(self, store: Path) -> None:
        receipt = self.run(probe("Copy", store, text="grün"))
        assert (receipt.status, receipt.summary) == ("done", "4 characters copied.")
        assert (receipt.values, receipt.metrics) == ({"length": 4}, {"length": 4.0, "undefined": None})
        assert receipt.links == {"about": "https://example.org/copy"}
        artifact = receipt.artifacts["copy"]
        assert artifact.sha256 == hashlib.sha256("grün".encode()).hexdigest()
        assert artifact.bytes == 5
        assert Store(str(store)).fetch(artifact.uri, Path()).read_text() == "grün"

    def test_receipt_is_in_the_store(self, store: Path) -> None:
        request = probe("Copy", store)
        assert self.run(request) == Store(str(store)).receipt(request.run_key)

    def test_equal_run_comes_from_the_cache(self, store: Path) -> None:
        first = self.run(probe("Copy", store))
        again = self.run(probe("Copy", store))
        assert (first.status, again.status) == ("done", "cached")
        assert again.artifacts == first.artifacts

    # -- failures ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("how", "kind", "status"),
        [
            ("BadInput", BadInput, "refused"),
            ("BadConfiguration", BadConfiguration, "refused"),
            ("IntegrityError", IntegrityError, "refused"),
            ("LeptonError", LeptonError, "failed"),
            ("Preempted", Preempted, "preempted"),
            ("Skipped", Skipped, "skipped"),
        ],
    )
    def test_failure_keeps_its_kind_and_leaves_a_receipt(
        self, store: Path, how: str, kind: type[LeptonError], status: str
    ) -> None:
        request = probe("Fail", store, how=how, message="naïve «words»")
        with pytest.raises(kind, match="naïve «words»") as caught:
            self.run(request)
        assert type(caught.value) is kind
        receipt = Store(str(store)).receipt(request.run_key)
        assert receipt is not None
        assert receipt.status == status
        assert receipt.error == {"kind": how, "message": "naïve «words»", "exit_code": kind.exit_code}

    def test_foreign_error_may_be_retried(self, store: Path) -> None:
        with pytest.raises(LeptonError, match="ValueError: as asked") as caught:
            self.run(probe("Fail", store, how="ValueError"))
        assert caught.value.exit_code == 1

    def test_exit_is_a_failure(self, store: Path) -> None:
        with pytest.raises(LeptonError, match=r"called sys.exit\(3\)"):
            self.run(probe("Fail", store, how="exit"))

    def test_endless_message_is_cut(self, store: Path) -> None:
        with pytest.raises(BadInput) as caught:
            self.run(probe("Fail", store, how="BadInput", message='界"\n\0' * 50_000))
        assert str(caught.value).startswith("界")
        assert str(caught.value).endswith("…")

    def test_unknown_stage_is_refused(self, store: Path) -> None:
        with pytest.raises(BadConfiguration, match=r"no function 'Copyy'; known: "):
            self.run(probe("Copyy", store))

    # -- surroundings -------------------------------------------------------------------------------------------------

    def test_scratch_space_is_removed(self, store: Path) -> None:
        assert not Path(self.run(probe("Look", store)).values["scratch"]).exists()

    def test_cancel_is_safe_at_any_time(self, store: Path) -> None:
        runner = self.make_runner()
        runner.cancel()
        assert self.run(probe("Copy", store), runner=runner).status == "done"
        runner.cancel()

    def test_pinned_input_that_was_altered(self, store: Path) -> None:
        artifact = Store(str(store)).put("input.txt", b"before")
        Path(split_pin(artifact.uri)[0].removeprefix("file://")).write_bytes(b"after!")
        with pytest.raises(IntegrityError, match=r"input\.txt has sha256 .* pinned to"):
            self.run(probe("Copy", store, source=artifact.uri))


class WorkerRunnerConformance(RunnerConformance):
    """The contract of a runner whose stages run on the worker's machine, where the DAG's files are."""

    def test_code_beside_the_dag_is_found_and_hides_no_library(
        self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "dags"
        folder.mkdir()
        (folder / "probe_beside_the_dag.py").write_text(
            "import fsspec\n\ndef answer():\n    return fsspec.__name__, 42\n"
        )
        (folder / "fsspec.py").write_text("raise ImportError('a DAG file named like a library')\n")
        monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])  # where Airflow puts it: at the end
        assert self.run(probe("Look", store, module="probe_beside_the_dag")).values["answer"] == [
            "fsspec",
            42,
        ]


class IsolatedRunnerConformance(RunnerConformance):
    """The contract of a runner whose stages run in a process of their own, here or elsewhere."""

    # Lines that a stage may write at once; set fewer where logs are rotated.
    many_lines: ClassVar[int] = 100_000

    def test_killed_stage_is_a_sentence_and_a_retry_works(self, store: Path, tmp_path: Path) -> None:
        request = probe("Fail", store, how="SIGKILL", once=str(tmp_path / "once"))
        with pytest.raises(RunnerError, match=r"Fail (.*it was killed|was ended from outside)"):
            self.run(request)
        assert self.run(request).summary == "It went well this time."

    def test_log_arrives_line_by_line_with_levels(
        self, store: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            self.run(probe("Speak", store))
        lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "lepton_airflow.stage"]
        for wanted in (
            ("WARNING", "careful with ünïcödé"),
            ("ERROR", "two lines:"),
            ("ERROR", "the second"),
            ("INFO", "plain words"),
            ("INFO", "last line"),
        ):
            assert wanted in lines

    def test_log_arrives_while_the_stage_runs(self, store: Path, tmp_path: Path) -> None:
        runner = self.make_runner(grace_s=5)
        request = probe("Hang", store, pids=str(tmp_path / "pids"))
        with _Listener() as lines, _Background(lambda: self.run(request, runner=runner)) as task:
            until(lambda: "hanging" in lines, "the stage's line")
            assert task.is_alive()
            runner.cancel()

    def test_much_output_and_garbage_block_nothing(self, store: Path) -> None:
        with _Listener() as lines:
            receipt = self.run(probe("Speak", store, lines=self.many_lines, garbage=True))
        assert receipt.status == "done"
        assert sum(line.startswith("line ") for line in lines) == self.many_lines
        assert any("garbage" in line for line in lines)
        assert max(map(len, lines)) < 100_000

    def _look(self, store: Path, **parameters: Any) -> tuple[Request, list[Connection]]:
        # More than a pipe holds at once, so that the runner cannot hand it over before the stage reads.
        connection = Connection("db", "postgres", "host", "user", _PASSWORD, extra={"padding": "." * 200_000})
        wanted = hashlib.sha256(_PASSWORD.encode()).hexdigest()
        return probe("Look", store, connection="db", password_is=wanted, **parameters), [connection]

    def test_connections_arrive_and_lie_open_nowhere(self, store: Path) -> None:
        receipt = self.run(*self._look(store))
        assert receipt.values["password_arrived"] is True

    def test_secrets_are_in_no_log_message_or_file(
        self, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        request, connections = self._look(store, say=True)
        with caplog.at_level(logging.DEBUG), pytest.raises(LeptonError) as caught:
            self.run(request, connections)
        lines = [r.getMessage() for r in caplog.records]
        told = "\n".join([str(caught.value), *lines])
        assert "cannot connect to db://user:***@host" in str(caught.value)
        assert "connecting with ***" in lines
        for form in (_PASSWORD, json.dumps(_PASSWORD)[1:-1], repr(_PASSWORD)[1:-1]):
            assert form not in told
            for file in tmp_path.rglob("*"):
                assert not file.is_file() or form.encode() not in file.read_bytes(), file

    def test_workers_environment_does_not_leak(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (
            "AIRFLOW_CONN_DB",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN",
            "AIRFLOW_VAR_KEY",
            "MY_API_TOKEN",
        ):
            monkeypatch.setenv(name, "secret")
        seen = self.run(probe("Look", store)).values["environment"]
        assert [name for name in seen if name.startswith("AIRFLOW") or name == "MY_API_TOKEN"] == []
        assert "PATH" in seen

    def test_memory_limit(self, store: Path) -> None:
        with pytest.raises(OutOfMemory, match=r"limit.*\b300 ?Mi"):
            self.run(probe("Fill", store, megabytes=400), runner=self.make_runner(memory_limit_mb=300))


class LocalRunnerConformance(WorkerRunnerConformance, IsolatedRunnerConformance):
    """The contract of a runner whose stages run in a process of their own on this machine."""

    def test_memory_limit_counts_what_the_stage_started(self, store: Path) -> None:
        with pytest.raises(OutOfMemory, match="its limit is 300 MiB"):
            self.run(
                probe("Fill", store, megabytes=133, children=3), runner=self.make_runner(memory_limit_mb=300)
            )

    def test_nothing_stays_behind_a_stage(self, store: Path, tmp_path: Path) -> None:
        pids = tmp_path / "pids"
        assert self.run(probe("Abandon", store, pids=str(pids))).status == "done"
        assert len(_pids(pids)) == 3
        assert running(_pids(pids)) == []

    def test_cancel_ends_the_stage_and_its_family(self, store: Path, tmp_path: Path) -> None:
        pids, runner = tmp_path / "pids", self.make_runner(grace_s=10)
        with _Background(lambda: self.run(probe("Hang", store, pids=str(pids)), runner=runner)) as task:
            family = until(lambda: _pids(pids), "the stage to run")
            started = time.monotonic()
            runner.cancel()
            task.join(15)
        # It ended when it was asked, not when the grace period was over.
        assert time.monotonic() - started < 8
        assert isinstance(task.error, Preempted)
        assert running(family) == []

    def test_cancel_from_a_signal_handler(self, store: Path, tmp_path: Path) -> None:
        """As Airflow calls it: in the thread that waits for the stage."""
        pids, runner = tmp_path / "pids", self.make_runner(grace_s=30)
        before = signal.signal(signal.SIGUSR1, lambda *_: runner.cancel())

        def interrupt() -> None:
            until(lambda: _pids(pids), "the stage to run")
            os.kill(os.getpid(), signal.SIGUSR1)

        try:
            with _Background(interrupt):
                started = time.monotonic()
                with pytest.raises(Preempted):
                    self.run(probe("Hang", store, pids=str(pids)), runner=runner)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert time.monotonic() - started < 20

    def test_stubborn_stage_is_killed_after_the_grace_period(self, store: Path, tmp_path: Path) -> None:
        pids, runner = tmp_path / "pids", self.make_runner(grace_s=0.5)
        with _Background(
            lambda: self.run(probe("Hang", store, pids=str(pids), stubborn="ignore"), runner=runner)
        ) as task:
            family = until(lambda: _pids(pids), "the stage to run")
            runner.cancel()
            task.join(15)
        assert isinstance(task.error, RunnerError)
        assert running(family) == []

    def test_resumable_stage_goes_on_where_it_stopped(self, store: Path, tmp_path: Path) -> None:
        count, runner = tmp_path / "count", self.make_runner(grace_s=10)
        with _Background(lambda: self.run(probe("Resume", store, file=str(count)), runner=runner)) as task:
            until(lambda: count.exists() and int(count.read_text()) >= 5, "five steps")
            runner.cancel()
            task.join(15)
        assert isinstance(task.error, Preempted)
        kept = int(count.read_text())
        receipt = self.run(probe("Resume", store, file=str(count), steps=kept + 1))
        assert receipt.values == {"start": kept, "steps": kept + 1}

    @pytest.mark.parametrize("stubborn", ["no", "ignore", "busy"])
    def test_nothing_survives_a_killed_worker(self, store: Path, tmp_path: Path, stubborn: str) -> None:
        pids, scratch = tmp_path / "pids", tmp_path / "scratch"
        scratch.mkdir()
        request = probe("Hang", store, pids=str(pids), stubborn=stubborn)
        worker = subprocess.Popen(
            [sys.executable, "-c", _WORKER, request.to_json(), repr(self.make_runner())],
            env=os.environ | {"TMPDIR": str(scratch)},
        )
        try:
            family = until(lambda: _pids(pids), "the stage to run")
            assert running(family) == family
        finally:
            worker.kill()
            worker.wait()
        until(lambda: not running(family), "the stage and its family to end", within_s=5)
        until(lambda: not any(scratch.iterdir()), "its scratch space to be removed", within_s=5)

    def test_nothing_survives_a_killed_supervisor(self, store: Path, tmp_path: Path) -> None:
        """Only the supervisor, which sends a task's heartbeats, is killed: Airflow takes the task for dead and starts another try."""
        pids, task = tmp_path / "pids", tmp_path / "task"
        request = probe("Hang", store, pids=str(pids))
        supervisor = subprocess.Popen(
            [sys.executable, "-c", _WORKER, request.to_json(), repr(self.make_runner()), str(task)]
        )
        try:
            family = [*until(lambda: _pids(pids), "the stage to run"), *_pids(task)]
            assert running(family) == family
        finally:
            supervisor.kill()
            supervisor.wait()
        until(lambda: not running(family), "the task, the stage and its family to end", within_s=8)

    def test_a_task_out_of_time_asks_its_stage_to_stop(self, store: Path, tmp_path: Path) -> None:
        """As Airflow's execution_timeout does: an exception out of a signal handler."""
        count, runner = tmp_path / "count", self.make_runner(grace_s=10)
        before = signal.signal(signal.SIGUSR1, _time_is_over)

        def interrupt() -> None:
            until(lambda: count.exists() and int(count.read_text()) >= 5, "five steps")
            os.kill(os.getpid(), signal.SIGUSR1)

        try:
            with _Background(interrupt), pytest.raises(_TimeIsOver):
                self.run(probe("Resume", store, file=str(count)), runner=runner)
        finally:
            signal.signal(signal.SIGUSR1, before)
        left = Store(str(store)).receipt(probe("Resume", store).run_key)
        assert left is not None
        assert left.status == "preempted"


@dataclass
class Chain:
    """A small model's whole life, run by one runner: real data, its own store and its own MLflow."""

    folder: Path
    receipts: dict[str, Receipt] = field(default_factory=dict)

    @property
    def data(self) -> str:
        """The raw source, a CSV file: measurements of 569 breast tumours, of which some are malignant."""
        return str(self.folder / "tumours.csv")

    @property
    def tracking_uri(self) -> str:
        """MLflow's database."""
        return f"sqlite:///{self.folder}/mlflow.db"

    def artifact(self, stage: str, name: str) -> str:
        """The pinned URI of an artifact that an earlier stage made."""
        return self.receipts[stage].artifacts[name].uri

    def value(self, stage: str, name: str) -> Any:
        """A value that an earlier stage returned."""
        return self.receipts[stage].values[name]


_MEASURES = ("radius", "texture", "smoothness", "concavity")
_SUITE = {
    "name": "tumours",
    "expectations": [
        {"type": "expect_table_row_count_to_equal", "kwargs": {"value": 569}},
        {"type": "expect_column_values_to_be_between", "kwargs": {"column": "radius", "min_value": 1}},
    ],
}
_MODEL = "tumours"

# Every stage in an order in which it can run, and how its parameters follow from what ran before. A new stage is one
# entry here, and so runs on every runner.
STAGES: dict[str, Callable[[Chain], dict[str, Any]]] = {
    "IngestData": lambda c: {
        "sources": {"tumours": c.data},
        "query": "SELECT * FROM tumours",
        "order_by": ["id"],
    },
    "ValidateData": lambda c: {"dataset": c.artifact("IngestData", "snapshot"), "suite": _SUITE},
    "PrepareData": lambda c: {
        "snapshot": c.artifact("IngestData", "snapshot"),
        "target": "malignant",
        "split": "random",
        "id_columns": ["id"],
    },
    "CheckDrift": lambda c: {
        "dataset": c.artifact("PrepareData", "test"),
        "reference": c.artifact("PrepareData", "profile"),
        "reference_rows": c.artifact("PrepareData", "train"),
    },
    "TuneModel": lambda c: {
        "dataset": c.artifact("PrepareData", "train"),
        "trainer": "logistic_regression",
        "folds": 2,
        "trials": 2,
    },
    "TrainModel": lambda c: {
        "dataset": c.artifact("PrepareData", "train"),
        "valid": c.artifact("PrepareData", "valid"),
        "trainer": "logistic_regression",
        "hyperparameters": c.value("TuneModel", "best"),
        "profile": c.artifact("PrepareData", "profile"),
    },
    "QuantizeModel": lambda c: {
        "model": c.artifact("TrainModel", "model"),
        "calibration": c.artifact("PrepareData", "train"),
        "dataset": c.artifact("PrepareData", "valid"),
        "candidates": ["dynamic_int8"],
        "rounds": 6,
        "timing_s": 1.0,
    },
    "EvaluateModel": lambda c: {
        "model": c.artifact("TrainModel", "model"),
        "dataset": c.artifact("PrepareData", "test"),
        "bootstrap_resamples": 100,
    },
    "RegisterModel": lambda c: {
        "model": c.artifact("TrainModel", "model"),
        "name": _MODEL,
        "metrics": c.receipts["EvaluateModel"].metrics,
        "tracking_uri": c.tracking_uri,
    },
    "PromoteModel": lambda c: {
        "name": c.value("RegisterModel", "name"),
        "version": c.value("RegisterModel", "version"),
        "dataset": c.artifact("PrepareData", "test"),
        "tracking_uri": c.tracking_uri,
    },
    "DeployModel": lambda c: {
        "endpoint": _MODEL,
        "name": c.value("RegisterModel", "name"),
        "max_latency_ms": 10_000.0,  # a slow machine must not fail this
    },
    "RollbackModel": lambda c: {
        "name": _followed(c),
        "reason": "It is worse.",
        "endpoint": _MODEL,
        "tracking_uri": c.tracking_uri,
    },
}


def _followed(chain: Chain) -> str:
    """The name of the model, whose champion another one has followed: there is one to go back to."""
    store = Store(str(chain.folder / "store"))
    records, ledger = Registrations(store, _MODEL), Ledger(store, _MODEL)
    first, champion = records.newest(), ledger.newest()
    assert first is not None
    assert champion is not None
    package, version = chain.artifact("PrepareData", "profile"), first.version + 1
    worse = replace(first, version=version, package=package, run_key="worse", alias=None)
    assert records.append_after(first, worse)
    move = replace(
        champion, sequence=champion.sequence + 1, version=version, package=package, run_key="worse"
    )
    assert ledger.append(replace(move, previous=champion.version))
    return _MODEL


class StageConformance:
    """Every stage runs on a runner as it does in this process, and makes the same bytes.

    :cvar stops: how often each stage is asked to stop, at a random moment, before it is left to end: that must change nothing.
    """

    stops: ClassVar[int] = 0

    @abstractmethod
    def make_runner(self) -> Runner:
        """A runner that has the libraries of every stage."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Where data, store and MLflow's database lie; override it where the runner sees another place."""
        return tmp_path_factory.mktemp("chain")

    @pytest.fixture(scope="class")
    def chain(self, folder: Path) -> Chain:
        """The whole life of a model, on the runner."""
        return _lived(self.make_runner(), folder, self.stops)

    @pytest.fixture(scope="class")
    def reference(self) -> Chain:
        """The same in this process."""
        return _reference()

    @pytest.mark.parametrize("stage", STAGES)
    def test_stage_runs_and_makes_the_same_bytes(self, chain: Chain, reference: Chain, stage: str) -> None:
        receipt, wanted = chain.receipts[stage], reference.receipts[stage]
        # A stop that comes when the result is recorded, and not yet told, leaves it to the next run's cache.
        assert receipt.status == "done" or (self.stops and receipt.status == "cached")
        store = Store(str(chain.folder / "store"))
        assert all(store.present(artifact) for artifact in receipt.artifacts.values())
        assert _digests(receipt) == _digests(wanted)
        assert receipt.values.keys() == wanted.values.keys()
        if get_stage(stage).measures_machine or stage == "DeployModel":  # DeployModel times its server
            assert receipt.metrics.keys() == wanted.metrics.keys()
        else:
            assert receipt.metrics == wanted.metrics


# Artifacts whose bytes differ between equal runs: they hold times, or what was chosen for its speed, or a page whose parts
# have random names.
_VARY = {
    ("CheckDrift", "report"),
    ("PromoteModel", "evidence"),
    ("QuantizeModel", "model"),
    ("QuantizeModel", "report"),
    ("TuneModel", "trials"),
}


def _digests(receipt: Receipt) -> dict[str, str | None]:
    return {
        name: None if (receipt.stage, name) in _VARY else artifact.sha256
        for name, artifact in receipt.artifacts.items()
    }


_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # removed when the tests end


def _folder() -> Path:
    _KEPT.append(tempfile.TemporaryDirectory(prefix="lepton-conformance-"))
    return Path(_KEPT[-1].name)


@cache
def _reference() -> Chain:
    return _lived(InProcess(), _folder())


@cache
def _beginning() -> Path:
    """A folder with the raw data and an empty MLflow database, whose migrations take seconds."""
    from sklearn.datasets import load_breast_cancer

    from lepton_airflow.registry.mlflow import open_registry

    folder = _folder()
    bunch = load_breast_cancer(as_frame=True)
    frame = bunch.frame[[f"mean {name}" for name in _MEASURES]].set_axis(_MEASURES, axis=1)
    frame = frame.assign(malignant=bunch.target.map({0: "yes", 1: "no"})).rename_axis("id")
    frame.to_csv(folder / "tumours.csv")
    with open_registry(f"sqlite:///{folder}/mlflow.db", None, folder):
        return folder


def _lived(runner: Runner, folder: Path, stops: int = 0) -> Chain:
    chain = Chain(folder)
    for name in ("tumours.csv", "mlflow.db"):
        # The stages may run as another user, in a container.
        Path(shutil.copy(_beginning() / name, folder)).chmod(0o666)
    store = str(folder / "store")
    with LocalEndpoint(_MODEL, store, folder / "endpoint"):
        for stage, parameters in STAGES.items():
            request = Request(
                stage=stage,
                parameters=parameters(chain),
                store=store,
                identity=RunIdentity(dag_id="conformance", task_id=stage),
            )
            started = time.monotonic()
            if stage in _LEAVES_TRACES:
                stopped = (_stopped(runner, request, _START_S) for _ in range(stops))
                done = next((receipt for receipt in stopped if receipt), None)
                chain.receipts[stage] = done or runner.run(request, [], {})
                continue
            chain.receipts[stage] = receipt = runner.run(request, [], {})
            took = time.monotonic() - started
            for number in range(stops):
                own = replace(request.identity, run_id=f"stop-{number}")
                again = replace(request, identity=own, cache="off")
                for found in (_stopped(runner, again, took), runner.run(again, [], {})):
                    assert found is None or _exact(found) == _exact(receipt), (stage, number)
    return chain


def _exact(receipt: Receipt) -> tuple[dict[str, str | None], object]:
    """What is equal in two runs of one stage under two run ids, which Great Expectations' documents name."""
    named = {"validation", "data_docs"}
    digests = {name: sha256 for name, sha256 in _digests(receipt).items() if name not in named}
    return digests, None if get_stage(receipt.stage).measures_machine else receipt.metrics


# What these do stays: each is asked to stop until it has done it once.
_LEAVES_TRACES = ("RegisterModel", "PromoteModel", "DeployModel", "RollbackModel")
_START_S = 4.0  # until a stage has imported its libraries, roughly


def _stopped(runner: Runner, request: Request, within_s: float) -> Receipt | None:
    """The receipt of a run that was asked to stop at a random moment; None when it stopped, and said so."""
    after_s = random.uniform(0, within_s)  # noqa: S311 - no secret
    receipts: list[Receipt] = []
    with _Background(lambda: receipts.append(runner.run(request, [], {}))) as task:
        task.join(after_s)
        runner.cancel()
    assert receipts or isinstance(task.error, Preempted), (
        f"{request.stage}, asked to stop after {after_s:.2f} s, ended with {task.error!r}"
    )
    return receipts[0] if receipts else None


class _TimeIsOver(BaseException):
    pass


def _time_is_over(*_: object) -> None:
    raise _TimeIsOver


# A worker: runs one request with a runner given by its repr. With a third argument, a file, it runs it in a child, as Airflow's
# supervisor runs a task, and writes the child's process id into the file.
_WORKER = """
import os, pathlib, sys
from lepton_airflow.contract import Request
from lepton_airflow import runners
runner = eval(sys.argv[2], {name: getattr(runners, name) for name in runners.__all__})
forked = len(sys.argv) > 3
if forked and os.fork():
    os.wait()
else:
    if forked:
        pathlib.Path(sys.argv[3]).write_text(str(os.getpid()))
    runner.run(Request.from_json(sys.argv[1]), [], {"dag_run": None} if forked else {})
"""


class _Listener(logging.Handler):
    """Collects the stage's log lines, and does not pass them on to slower handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.logger = logging.getLogger("lepton_airflow.stage")

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> list[str]:
        self.before = self.logger.level, self.logger.propagate
        self.logger.level, self.logger.propagate = logging.INFO, False
        self.logger.addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.level, self.logger.propagate = self.before


class _Background(threading.Thread):
    """A thread for the length of a ``with`` block: it keeps the error of what it ran, and is joined at the end."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join(30)
        assert not self.is_alive(), "it did not end"
