"""Fitted models become ONNX in the same bytes, whichever process converts them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from onnx import TensorProto, helper

from lepton_airflow.packaging.export import graph

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
