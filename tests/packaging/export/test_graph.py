"""The graph of a package: equal bytes in every process, names that never clash, labels, and no trace of who made it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.packaging.export import graph
from lepton_airflow.packaging.schema import Schema, features_of
from lepton_airflow.packaging.session import open_session

_CONVERT = textwrap.dedent(
    """
    import hashlib
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler
    from lepton_airflow.data.features import Feature
    from lepton_airflow.packaging.export.fitted import as_fitted
    from lepton_airflow.packaging.schema import Schema

    data = load_breast_cancer()
    frame = pd.DataFrame({"radius": data.data[:, 0], "size": ["large" if r > 14 else "small" for r in data.data[:, 0]]})
    columns = ColumnTransformer([("n", StandardScaler(), ["radius"]), ("c", OneHotEncoder(), ["size"])])
    fitted = make_pipeline(columns, LogisticRegression()).fit(frame, data.target)
    features = [Feature("radius", "number", "radius"), Feature("size", "category", "size")]
    model = as_fitted(fitted, Schema(features, "classification", [0, 1]), "test").to_onnx()
    print(hashlib.sha256(model.SerializeToString()).hexdigest())
    """
)


def test_the_bytes_do_not_depend_on_the_hash_seed() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", _CONVERT],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "20")  # with which a set of operator sets has another order
    }
    assert len(digests) == 1


def test_operator_sets_are_declared_once() -> None:
    identity = helper.make_node("Identity", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 1]) for name in "xy")
    sets = [
        helper.make_opsetid(domain, version) for domain, version in (("", 18), ("ai.onnx.ml", 1), ("", 17))
    ]
    model = helper.make_model(helper.make_graph([identity], "g", [x], [y]), opset_imports=sets)
    graph.strip(model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18), ("ai.onnx.ml", 1)]


X = features_of(DatasetInfo(features=["label", "x"]))  # their inputs are label_2 and x


def branching() -> onnx.ModelProto:
    """``x`` where the sum of both inputs is above 0, else -``x``; the branches read ``x`` from outside."""
    boxes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 1]) for n in ("p", "q")]
    total = helper.make_tensor_value_info("total", TensorProto.FLOAT, ["rows", 1])
    inner = [
        helper.make_graph(
            [helper.make_node(op, ["q"], [f"{op}_out"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, None)],
        )
        for op in ("Identity", "Neg")
    ]
    nodes = [
        helper.make_node("Add", ["p", "q"], ["total"]),
        helper.make_node("ReduceSum", ["total"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["above"]),
        helper.make_node("If", ["above"], ["label"], then_branch=inner[0], else_branch=inner[1]),
    ]
    zero = numpy_helper.from_array(np.array(0, dtype=np.float32), "zero")
    made = helper.make_graph(
        nodes,
        "branching",
        boxes,
        [helper.make_tensor_value_info("label", TensorProto.FLOAT, None)],
        [zero],
        value_info=[total],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_inputs_are_renamed_inside_branches_too_and_inner_names_clash_with_none() -> None:
    # The graph's own output is called as one that a package has, and so is a feature.
    made = graph.finish(branching(), "label", Schema(X, "regression", []), columns=1)
    assert [i.name for i in made.graph.input] == ["label_2", "x"]
    session = open_session(made.SerializeToString())
    for sign in (1, -1):
        feed = {"label_2": np.full((2, 1), 9 * sign, np.float32), "x": np.array([[1], [2]], np.float32)}
        np.testing.assert_array_equal(session.run(["prediction"], feed)[0], [[sign], [2 * sign]])


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ([10, 20], [20, 10]),
        (["no", "yes"], ["yes", "no"]),
        ([False, True], ["True", "False"]),
        ([0.5, 7], ["7", "0.5"]),
    ],
)
def test_labels_are_the_classes_themselves_where_onnx_has_their_type(
    classes: list[Any], labels: list[Any]
) -> None:
    features = features_of(DatasetInfo(features=["x"]))
    column = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 1])
    half = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 1])
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [column], [half])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    made = graph.finish(model, "y", Schema(features, "classification", classes), columns=1)
    session = open_session(made.SerializeToString())
    probabilities, label = session.run(
        ["probabilities", "label"], {"x": np.array([[0.75], [0.25]], np.float32)}
    )
    assert probabilities.tolist() == [[0.25, 0.75], [0.75, 0.25]]
    assert label.tolist() == labels


def test_no_note_of_an_exporter_is_left() -> None:
    model = branching()
    model.producer_name, model.doc_string = "torch", "somebody/train.py"
    for part in (model, model.graph, model.graph.node[0], model.graph.initializer[0]):
        part.metadata_props.add(key="stack", value="somebody/train.py")
        part.doc_string = "line 7"
    made = graph.finish(model, "label", Schema(X, "regression", []), columns=1)
    assert b"somebody" not in made.SerializeToString()
    assert b"line 7" not in made.SerializeToString()
    assert b"torch" not in made.SerializeToString()
