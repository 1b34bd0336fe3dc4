"""Models trained for real on scikit-learn's data, and a store to deploy them from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_diabetes, load_wine

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.profile import reference_profile
from lepton_airflow.packaging.package import ModelPackage
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.train_model import TrainModel

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Trained:
    """A package in the store, and rows that it was trained on."""

    uri: str
    package: ModelPackage
    rows: pd.DataFrame


def _train(run: RunInfo, frame: pd.DataFrame, task: str, trainer: str, **hyperparameters: float) -> Trained:
    # No plain identifier, so its ONNX input has another name.
    frame["größe (mm)"] = frame.pop(frame.columns[0])
    frame.loc[::9, "größe (mm)"] = np.nan
    frame["shade"] = np.where(frame["größe (mm)"] > frame["größe (mm)"].median(), "hell", "dark")
    frame.loc[::7, "shade"] = None
    features = [column for column in frame if column != "target"]
    info = DatasetInfo(
        target="target",
        task=task,
        features=features,
        categorical=["shade"],
        classes=sorted(set(frame["target"].tolist())) if task == "classification" else [],
        split="train",
        split_id="one",
        rows=len(frame),
    )
    with duckdb.connect() as con:
        con.register("frame", frame)
        profile = reference_profile(con, "frame", info, None)
    (run.workdir / "profile.json").write_text(json.dumps(profile))
    table = pa.Table.from_pandas(frame, preserve_index=False)
    data = run.workdir / f"{task}.parquet"
    pq.write_table(table.replace_schema_metadata({b"lepton": json.dumps(asdict(info)).encode()}), data)
    stage = TrainModel(
        dataset=str(data),
        profile=str(run.workdir / "profile.json"),
        trainer=trainer,
        hyperparameters=hyperparameters,
    )
    uri = stage.run(run).artifacts["model"].uri
    return Trained(uri, ModelPackage.open(run.fetch(uri)), frame)


@dataclass(frozen=True)
class Shelf:
    """A store with three packages: two of the same model, and a regression."""

    run: RunInfo
    wine: Trained
    other_wine: Trained
    diabetes: Trained


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("shelf")
    run = RunInfo.local(folder)

    def at(key: str) -> RunInfo:
        (folder / key).mkdir()
        return replace(run, run_key=key, workdir=folder / key)

    wine = load_wine(as_frame=True).frame
    wine = wine[[*wine.columns[:4], "target"]]
    diabetes = load_diabetes(as_frame=True).frame
    return Shelf(
        run,
        _train(at("wine"), wine.copy(), "classification", "logistic_regression"),
        _train(at("other"), wine.copy(), "classification", "logistic_regression", C=0.01),
        _train(
            at("diabetes"), diabetes[["bmi", "bp", "s5", "target"]].copy(), "regression", "linear_regression"
        ),
    )


@pytest.fixture
def run_at(shelf: Shelf, tmp_path: Path) -> RunInfo:
    """A run of its own in the shelf's store."""
    return replace(shelf.run, run_key=tmp_path.name, workdir=tmp_path)
