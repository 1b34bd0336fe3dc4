"""A user's own ONNX model under the package's names: inputs by column or as one matrix, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper, numpy_helper

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadInput
from lepton_airflow.packaging.export.onnx import OnnxModel
from lepton_airflow.packaging.schema import Schema, features_of
from lepton_airflow.packaging.session import open_session, predict_onnx

NUMBERS = DatasetInfo(features=["a b", "z"])
MIXED = DatasetInfo(features=["z", "origin"], categorical=["origin"])
FRAME = pd.DataFrame({"z": [1.0, -2.0], "a b": [0.5, 4.0], "origin": ["JFK", "EWR"]})
INPUT_TYPES = {"origin": TensorProto.STRING}


def model(
    inputs: Sequence[str], nodes: Sequence[Any], outputs: Sequence[str], opset: int = 17
) -> onnx.ModelProto:
    """A graph of these nodes over inputs [rows, 1], or [rows, 2] for ``matrix``."""
    given = [
        helper.make_tensor_value_info(
            n, INPUT_TYPES.get(n, TensorProto.FLOAT), ["rows", 2 if n == "matrix" else 1]
        )
        for n in inputs
    ]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    weights = numpy_helper.from_array(np.array([[1], [10]], dtype=np.float32), "w")
    graph = helper.make_graph([helper.make_node(*node) for node in nodes], "own", given, made, [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


MATRIX = model(["matrix"], [("MatMul", ["matrix", "w"], ["sum"])], ["sum"])


def regression(info: DatasetInfo) -> Schema:
    return Schema(features_of(info), "regression", [])


def both(given: onnx.ModelProto, schema: Schema) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of the model as it came, and as it is packaged."""
    fitted = OnnxModel(given, schema, "mine")
    made = fitted.to_onnx()
    assert [i.name for i in made.graph.input] == [f.input for f in schema.features]
    return fitted.predict(FRAME), predict_onnx(open_session(made.SerializeToString()), schema, FRAME)


def test_one_matrix_takes_the_numbers_in_the_order_of_the_features() -> None:
    before = MATRIX.SerializeToString()
    native, packaged = both(MATRIX, regression(NUMBERS))
    np.testing.assert_array_equal(native, [10.5, -16.0])  # a b + 10 z
    np.testing.assert_array_equal(packaged, native)
    assert MATRIX.SerializeToString() == before  # the user's own object is left as it was


@pytest.mark.parametrize("first", ["a b", "a_b"])
def test_inputs_may_have_the_names_of_columns_or_their_safe_form_in_any_order(first: str) -> None:
    given = model(["z", first], [("Sub", ["z", first], ["difference"])], ["difference"])
    native, packaged = both(given, regression(NUMBERS))
    np.testing.assert_array_equal(native, [0.5, -6.0])
    np.testing.assert_array_equal(packaged, native)


def test_a_category_goes_in_as_text() -> None:
    nodes = [
        ("LabelEncoder", ["origin"], ["code"]),
        ("Sub", ["z", "code"], ["difference"]),
    ]
    given = model(["z", "origin"], nodes, ["difference"])
    encoder = given.graph.node[0]
    encoder.domain = "ai.onnx.ml"
    encoder.attribute.extend(
        [helper.make_attribute("keys_strings", ["JFK"]), helper.make_attribute("values_floats", [100.0])]
    )
    encoder.attribute.append(helper.make_attribute("default_float", 7.0))
    given.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    native, packaged = both(given, regression(MIXED))
    np.testing.assert_array_equal(native, [-99.0, -9.0])
    np.testing.assert_array_equal(packaged, native)


def test_of_several_outputs_the_one_with_the_packages_name_is_taken() -> None:
    nodes = [
        ("Sigmoid", ["z"], ["probabilities"]),
        ("Neg", ["z"], ["other"]),
    ]
    given = model(["z"], nodes, ["other", "probabilities"])
    schema = Schema(features_of(DatasetInfo(features=["z"])), "classification", ["no", "yes"])
    native, packaged = both(given, schema)
    second = 1 / (1 + np.exp(-FRAME["z"]))
    np.testing.assert_allclose(native, np.stack([1 - second, second], axis=1), atol=1e-6)
    np.testing.assert_allclose(packaged, native, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "info", "sentence"),
    [
        (
            model(["matrix"], [("MatMul", ["matrix", "w"], ["y"])], ["y"], opset=11),
            NUMBERS,
            "has opset 11, expected 13 or",
        ),
        (
            model(["x", "z"], [("Sub", ["x", "z"], ["y"])], ["y"]),
            NUMBERS,
            r"inputs \['x', 'z'\]; expected one per feature",
        ),
        (MATRIX, MIXED, r"inputs \['matrix'\]; expected one per feature \(\['z', 'origin'\]\)"),
        (MATRIX, DatasetInfo(features=["z"]), r"mine: its ONNX model does not run on the raw features: "),
    ],
)
def test_a_model_that_does_not_fit_the_features_is_refused(
    given: Any, info: DatasetInfo, sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence):
        OnnxModel(given, regression(info), "mine").predict(FRAME)
