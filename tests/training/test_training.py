"""Fits that are killed at random times, in processes of their own, end as if nothing had happened."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.contract import Receipt, Request, RunIdentity
from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import PREEMPTED
from lepton_airflow.models import fit_torch
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.train_model import TrainModel
from lepton_airflow.store import Store
from lepton_airflow.training.gpu import Readings
from lepton_airflow.training.trainer import TrainerRun

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()

# Around the trainer of the page: notes the time of every step, so that the test can tell what a kill cost.
WATCHED = """
import os, time
import digits

def fit(train, valid, hyperparameters, run):
    offer = run.save_checkpoint
    log = os.open(hyperparameters.pop("log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def save_checkpoint(step, write):
        os.write(log, f"{os.getpid()} {step} {time.monotonic()}\\n".encode())
        return offer(step, write)

    run.save_checkpoint = save_checkpoint
    return digits.fit(train, valid, hyperparameters, run)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 6))
    y = (x @ rng.normal(size=6) + rng.normal(size=4000) > 0).astype(int)
    names = [f"x{i}" for i in range(6)]
    info = DatasetInfo(target="y", task="classification", features=names, classes=[0, 1], split_id="one")
    folder = tmp_path_factory.mktemp("rows")
    for split, part in (("train", slice(0, 3000)), ("valid", slice(3000, None))):
        table = pa.table({n: x[part, i] for i, n in enumerate(names)} | {"y": y[part]})
        about = json.dumps(asdict(replace(info, split=split, rows=len(table)))).encode()
        pq.write_table(table.replace_schema_metadata({b"lepton": about}), folder / f"{split}.parquet")
    return folder


class TaskInstance:
    """One task instance, tried again and again in processes of its own, as a runner does it."""

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.store = folder, Store(str(folder / "store"))
        self.request = Request(
            stage="TrainModel",
            parameters=parameters,
            store=str(folder / "store"),
            identity=RunIdentity(run_id=folder.name),
        )
        (folder / "request.json").write_text(self.request.to_json())
        self.logs: list[str] = []

    def start(self) -> subprocess.Popen[str]:
        command = [
            "-m",
            "lepton_airflow",
            "run",
            "request.json",
            "receipt.json",
            "--search-path",
            str(self.folder.parent),
        ]
        with (self.folder / "log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, *command], cwd=self.folder, stdout=log, stderr=log, text=True
            )

    def end(self, process: subprocess.Popen[str]) -> int:
        code = process.wait(300)
        self.logs.append((self.folder / "log").read_text())
        return code

    def finish(self) -> Receipt:
        assert self.end(self.start()) == 0, self.logs[-1]
        return Receipt.from_json((self.folder / "receipt.json").read_text())

    def progress(self) -> str:
        """Name of the newest checkpoint of the fit of all rows."""
        pointers = [k for k in self.store.keys("checkpoints") if k.endswith("/final/latest")]
        return (self.store.read(pointers[0]) or b"").decode() if pointers else ""

    def kill_at_random(self, times: int, longest_s: float, seed: int) -> list[int]:
        """Kill so many tries, each at a random time after it made a checkpoint; returns their exit codes."""
        draw, codes = random.Random(seed), []
        for number in range(times):
            before, process = self.progress(), self.start()
            until(lambda b=before, p=process: self.progress() not in ("", b) or p.poll() is not None)
            with_grace = number % 2 == 0
            try:
                process.wait(draw.uniform(0, longest_s))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM if with_grace else signal.SIGKILL)
            code = self.end(process)
            assert code == (PREEMPTED if with_grace else -signal.SIGKILL), self.logs[-1]
            codes.append(code)
        return codes


def until(condition: Callable[[], bool], limit_s: float = 150.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the modules of trainers that docs/training.md shows."""
    folder = tmp_path_factory.mktemp("code")
    for name, text in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(text)
    (folder / "watched.py").write_text(WATCHED)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes that import torch or scikit-learn: a minute on a quiet machine
def test_a_users_trainer_killed_at_random_ends_as_if_undisturbed(rows: Path, code: Path) -> None:
    every_s = 0.1
    hyper = {"steps": 60_000, "log": "undisturbed.log"}
    parameters = {
        "dataset": str(rows / "train.parquet"),
        "trainer": "watched:fit",
        "hyperparameters": hyper,
        "checkpoint_s": every_s,
    }
    whole = TaskInstance(code / "whole", parameters).finish()
    killed = TaskInstance(code / "killed", parameters | {"hyperparameters": hyper | {"log": "killed.log"}})
    codes = killed.kill_at_random(5, 0.4, seed=int(os.environ.get("LEPTON_KILL_SEED", "1")))
    assert set(codes) == {PREEMPTED, -signal.SIGKILL}
    receipt = killed.finish()
    assert {k: v for k, v in receipt.metrics.items() if not k.startswith("gpu")} == {
        k: v for k, v in whole.metrics.items() if not k.startswith("gpu")
    }
    assert onnx_of(killed.store, receipt) == onnx_of(Store(str(code / "whole" / "store")), whole)
    assert killed.store.keys("checkpoints") == []

    tries: dict[str, list[tuple[int, float]]] = {}
    for line in (killed.folder / "killed.log").read_text().splitlines():
        pid, step, moment = line.split()
        tries.setdefault(pid, []).append((int(step), float(moment)))
    assert len(tries) == len(codes) + 1
    former: list[tuple[int, float]] = []
    for number, steps in enumerate(tries.values()):
        if former:
            resumed = steps[0][0] - 1
            ended = dict(former)
            assert resumed in ended, "a resumed fit starts after a step of the try before it"
            lost_s = former[-1][1] - ended[resumed]
            if codes[number - 1] == PREEMPTED:
                assert resumed == former[-1][0]  # SIGTERM loses nothing
            # one interval, and the while that a checkpoint takes to the store (it is flushed to disk)
            assert lost_s < every_s + 0.5
        former = steps


def test_the_torch_trainer_of_the_page_learns(
    rows: Path, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(code))
    stage = TrainModel(
        dataset=str(rows / "train.parquet"),
        valid=str(rows / "valid.parquet"),
        trainer="residual:fit",
        hyperparameters={"width": 16},
    )
    result = stage.run(RunInfo.local(tmp_path))
    assert (result.metrics["valid_roc_auc"] or 0) > 0.9
    assert {"model", "curves"} == set(result.artifacts)


def test_the_page_names_what_there_is() -> None:
    arguments = {
        n for n, p in inspect.signature(fit_torch).parameters.items() if p.kind is p.KEYWORD_ONLY
    } - {"valid"}
    table = PAGE[PAGE.index("| argument |") : PAGE.index("Within an epoch")]
    assert arguments == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|[^|]*\|", table, re.MULTILINE))))
    for name in set(re.findall(r"`run\.(\w+)", PAGE)):
        assert hasattr(TrainerRun, name) or name in {f.name for f in fields(TrainerRun)}
    assert set(re.findall(r"`(gpu_\w+)`", PAGE)) == set(
        re.findall(r'"(gpu_\w+)"', inspect.getsource(Readings))
    )


def onnx_of(store: Store, receipt: Receipt) -> bytes:
    model = store.load(receipt.artifacts["model"].uri)
    return model["model.onnx"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_mlp_killed_at_random_has_the_same_digest(rows: Path, tmp_path: Path) -> None:
    hyper = {"epochs": 50, "patience": 50, "batch_size": 64, "hidden": 32, "dropout": 0.3, "clip_norm": 1.0}
    parameters = {
        "dataset": str(rows / "train.parquet"),
        "valid": str(rows / "valid.parquet"),
        "trainer": "mlp",
        "hyperparameters": hyper,
        "checkpoint_s": 0.05,
    }
    whole = TaskInstance(tmp_path / "whole", parameters).finish()
    killed = TaskInstance(tmp_path / "killed", parameters)
    killed.kill_at_random(2, 0.3, seed=int(os.environ.get("LEPTON_KILL_SEED", "2")))
    receipt = killed.finish()
    assert receipt.artifacts["model"].sha256 == whole.artifacts["model"].sha256
    assert "resuming after step" in killed.logs[-1]
    assert re.search(
        r"final: epoch \d+ of 50 train_loss=\S+ valid_loss=\S+ \(.*(per epoch|epochs per s)", killed.logs[-1]
    )
