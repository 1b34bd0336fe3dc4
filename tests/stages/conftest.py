"""Small models and datasets that are known exactly, for the stages that judge models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lepton_airflow.contract import Artifact
from lepton_airflow.dataset import DatasetInfo, info_sql
from lepton_airflow.package import ModelCard, Touched, features_of, write_package
from lepton_airflow.store import Store, digest_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
