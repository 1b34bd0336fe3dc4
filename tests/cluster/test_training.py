"""A trainer of the user's own, in a pod that is killed while it trains: it goes on, and ends as if undisturbed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lepton_airflow.contract import Request, RunIdentity
from lepton_airflow.pods.manifest import pod_key
from lepton_airflow.runners import Runner
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.prepare_data import PrepareData
from lepton_airflow.store import Store
from lepton_airflow.store.identity import identity_of
from lepton_airflow.testing.conformance import until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(shared: Path) -> str:
    """A training table in the shared store, and beside it the module of the trainer that docs/training.md shows."""
    page = (ROOT / "docs" / "training.md").read_text()
    for name, text in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        (shared / name).write_text(text)
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(draw.normal(size=(2000, 4)), columns=[f"x{i}" for i in range(4)])
    frame["y"] = (frame.sum(axis=1) + draw.normal(size=2000) > 0).astype(int)
    frame.to_parquet(shared / "raw.parquet")
    prepared = PrepareData(snapshot=str(shared / "raw.parquet"), target="y", split="random")
    return (
        prepared.run(RunInfo.local(shared / "run", store=Store(str(shared / "store")))).artifacts["train"].uri
    )


def _train(rows: str, shared: Path, run_id: str) -> Request:
    parameters = {
        "dataset": rows,
        "trainer": "digits:fit",
        "hyperparameters": {"steps": 400_000},
        "checkpoint_s": 0.5,
    }
    identity = RunIdentity(dag_id="kill", task_id="train", run_id=run_id)
    return Request("TrainModel", parameters, str(shared / "store"), identity, cache="off")


@pytest.mark.parametrize("force", [(), ("--grace-period=0", "--force")], ids=["asked to stop", "killed"])
def test_a_trainer_whose_pod_is_deleted_resumes(
    cluster: Any,
    namespace: str,
    shared: Path,
    rows: str,
    make_pod: Callable[..., Runner],
    force: tuple[str, ...],
    said: list[str],
) -> None:
    store = Store(str(shared / "store"))

    def pod() -> Runner:
        return make_pod(env={"PYTHONPATH": str(shared)}, grace_s=20.0)

    disturbed = _train(rows, shared, f"killed {force}")
    with ThreadPoolExecutor(2) as beside:
        whole = beside.submit(pod().run, _train(rows, shared, f"whole {force}"), [], {})
        killed = beside.submit(pod().run, disturbed, [], {})

        def kept() -> bool:
            assert not killed.done(), killed.result().summary
            return any(k.endswith("/latest") for k in store.keys(f"checkpoints/{disturbed.run_key}"))

        until(kept, "a checkpoint", within_s=200)
        (mine,) = [
            p["metadata"]["name"]
            for p in cluster.items("pods", namespace)
            if p["metadata"]["labels"]["lepton-airflow/run-key"] == pod_key(disturbed, identity_of(store))
        ]
        subprocess.run(
            ["kubectl", "delete", "pod", "-n", namespace, mine, "--wait=false", *force],
            check=True,
            timeout=60,
        )
        result, reference = killed.result(300), whole.result(300)
    assert any("resuming after step" in line for line in said)
    assert result.artifacts["model"] == reference.artifacts["model"]
    assert result.metrics == reference.metrics
    assert store.keys(f"checkpoints/{disturbed.run_key}") == []
