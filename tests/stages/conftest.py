"""Small models and datasets that are known exactly, for the stages that judge models."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lepton_airflow.contract import Artifact
from lepton_airflow.data.dataset import DatasetInfo, info_sql
from lepton_airflow.packaging.card import ModelCard, Touched
from lepton_airflow.packaging.package import write_package
from lepton_airflow.packaging.schema import features_of
from lepton_airflow.store import Store
from lepton_airflow.store.files import digest_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pandas as pd


def _write_dataset(path: Path, frame: pd.DataFrame, info: DatasetInfo) -> DatasetInfo:
    """Write a frame as PrepareData writes a split, with the time range and rows filled in."""
    from dataclasses import replace

    import duckdb

    if info.time_column:
        info = replace(
            info, time_range=[str(frame[info.time_column].min()), str(frame[info.time_column].max())]
        )
    info = replace(info, rows=len(frame))
    con = duckdb.connect()
    con.register("frame", frame)
    con.execute(f"COPY (SELECT * FROM frame) TO '{path}' (FORMAT parquet, {info_sql(info)})")
    return info


@pytest.fixture
def write_dataset() -> Callable[..., DatasetInfo]:
    """``write_dataset(path, frame, info)``: a Parquet file that describes itself."""
    return _write_dataset


@pytest.fixture
def put_model(tmp_path: Path) -> Callable[..., Artifact]:
    """``put_model(store, info, weights)``: a package whose scores are ``numbers @ weights``, in a store.

    ``weights`` has one number per numeric feature, or a list of k per feature for k classes. Two classes get a sigmoid,
    more a softmax, a regression nothing. Categories enter the graph and count nothing.
    """
    made = 0

    def put(
        store: Store,
        info: DatasetInfo,
        weights: Sequence[Any],
        window: dict[str, str] | None = None,
        **card: Any,
    ) -> Artifact:
        nonlocal made
        made += 1
        directory = tmp_path / f"package-{made}"
        features = features_of(info)
        touched = card.pop("touched", [Touched.by("train", "0" * 64, info)])
        rows = card.pop("rows", None)
        write_package(
            directory,
            _linear_onnx(info, weights),
            ModelCard(
                task=info.task or "",
                target=info.target or "",
                features=features,
                outputs=["probabilities"] if info.task == "classification" else ["prediction"],
                trainer="linear",
                framework="onnx",
                hyperparameters={"weights": list(weights)},
                seed=0,
                classes=info.classes,
                window=window,
                touched=touched,
                **card,
            ),
            rows=rows,
        )
        assert digest_path(directory)[0]
        return store.put("model", directory)

    return put


def _linear_onnx(info: DatasetInfo, weights: Sequence[Any]) -> bytes:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    features = features_of(info)
    numbers = [f.input for f in features if f.kind == "number"]
    matrix = np.asarray(weights, dtype=np.float32).reshape(len(numbers), -1)
    kinds = {"number": TensorProto.FLOAT, "category": TensorProto.STRING}
    inputs = [helper.make_tensor_value_info(f.input, kinds[f.kind], [None, 1]) for f in features]
    nodes = [
        helper.make_node("Concat", numbers, ["x"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["score"]),
    ]
    if info.task == "regression":
        out, width = "prediction", 1
        nodes.append(helper.make_node("Identity", ["score"], [out]))
    else:
        out, width = "probabilities", max(2, matrix.shape[1])
        if matrix.shape[1] == 1:
            nodes += [
                helper.make_node("Sigmoid", ["score"], ["p"]),
                helper.make_node("Sub", ["one", "p"], ["q"]),
                helper.make_node("Concat", ["q", "p"], [out], axis=1),
            ]
        else:
            nodes.append(helper.make_node("Softmax", ["score"], [out], axis=1))
    constants = {"w": matrix, "one": np.ones((1, 1), dtype=np.float32)}
    graph = helper.make_graph(
        nodes,
        "linear",
        inputs,
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, [None, width])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


# -- MLflow, for real --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one takes seconds of migrations, copying it takes none."""
    from lepton_airflow.registry.mlflow import open_registry

    folder = tmp_path_factory.mktemp("mlflow-template")
    with open_registry(f"sqlite:///{folder}/mlflow.db", None, folder):
        return folder / "mlflow.db"


@pytest.fixture
def mlflow_sqlite(tmp_path: Path, mlflow_template: Path) -> str:
    """Tracking URI of a fresh MLflow database."""
    folder = tmp_path / "mlflow"
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when pytest is killed before it could stop the server."""
    prctl_set_pdeathsig = 1
    _LIBC.prctl(prctl_set_pdeathsig, signal.SIGTERM)


_LIBC = ctypes.CDLL(None)


class MlflowServer:
    """A real ``mlflow server`` on a free loopback port; it can be stopped and started again on the same data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        mlflow = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        data = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*mlflow, *data, "--artifacts-destination", str(self.folder / "artifacts")],
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - one system call, no lock taken
            )
        deadline = time.monotonic() + 200  # seconds; 20 are usual, more beside busy programs
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                urllib.request.urlopen(f"{self.uri}/health"),
            ):
                return
            time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Iterator[MlflowServer]:
    """The session's MLflow server. A test that stops it starts it again."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    server = MlflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def at_once() -> Callable[[Sequence[Callable[..., Any]], Sequence[Any]], list[Any]]:
    """``at_once([a.run, b.run], [run_a, run_b])``: each call in a process of its own, all together.

    The processes are forked from one that has imported the engines, so that they start within milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "lepton_airflow.stages.promote_model",
            "lepton_airflow.stages.register_model",
            "mlflow.store.model_registry.sqlalchemy_store",
            "mlflow.store.tracking.sqlalchemy_store",
            "onnxruntime",
            "pandas",
            "pyarrow.parquet",
            "scipy.stats",
            "sklearn.metrics",
        ]
    )

    def call(functions: Sequence[Callable[..., Any]], arguments: Sequence[Any]) -> list[Any]:
        with ProcessPoolExecutor(len(functions), mp_context=context) as pool:
            futures = [pool.submit(f, a) for f, a in zip(functions, arguments, strict=True)]
            return [future.result() for future in futures]

    return call
