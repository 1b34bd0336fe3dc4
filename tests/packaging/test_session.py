"""ONNX sessions: from verified bytes alone, as asked; and rows as they take them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper, numpy_helper

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadInput
from lepton_airflow.packaging.schema import Schema, features_of
from lepton_airflow.packaging.session import open_session, parquet_feeds, predict_onnx


def doubling() -> onnx.ModelProto:
    """``prediction`` is twice the one feature ``x``."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 1]) for n in ("x", "prediction")]
    two = numpy_helper.from_array(np.full((1, 1), 2, dtype=np.float32), "two")
    product = helper.make_node("Mul", ["x", "two"], ["prediction"])
    graph = helper.make_graph([product], "doubling", ends[:1], ends[1:], [two])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_weights_in_a_file_beside_the_model_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 64]) for n in ("x", "y")]
    weights = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([product], "product", ends[:1], ends[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    monkeypatch.chdir(tmp_path)
    # This is what must not happen: nobody has verified the digest of weights.bin.
    assert onnxruntime.InferenceSession(path.read_bytes())
    with pytest.raises(Exception, match=r"External data path .*weights\.bin"):
        open_session(path.read_bytes())
    assert open_session(onnx.load(path).SerializeToString())


def test_a_session_has_the_threads_asked_for_and_spins_unless_told_not_to() -> None:
    model = doubling().SerializeToString()
    options = open_session(model).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    options = open_session(model, 2, spin=False).get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_more_rows_than_a_batch_are_predicted_in_their_order() -> None:
    schema = Schema(features_of(DatasetInfo(features=["x"])), "regression", [])
    x = np.arange(70_000, dtype=np.float32)
    found = predict_onnx(open_session(doubling().SerializeToString()), schema, pd.DataFrame({"x": x}))
    np.testing.assert_array_equal(found, 2 * x)


def test_calibration_rows_are_spread_over_the_whole_file(tmp_path: Path) -> None:
    info = DatasetInfo(features=["x", "name"], categorical=["name"])
    frame = pd.DataFrame({"x": np.arange(150_000.0), "name": [f"n{i}" for i in range(150_000)]})
    path = tmp_path / "rows.parquet"
    frame.to_parquet(path, index=False)
    feeds = list(parquet_feeds(path, features_of(info), 1000, 64))
    assert max(len(feed["x"]) for feed in feeds) == 64
    x = np.concatenate([feed["x"] for feed in feeds]).ravel()
    assert (len(x), x[0], x[-1]) == (1000, 0, 149_999)
    assert np.ptp(np.diff(x)) <= 1
    assert feeds[0]["name"][1, 0] == f"n{int(x[1])}"
    few = [value for feed in parquet_feeds(path, features_of(info), 3, 64) for value in feed["x"].ravel()]
    assert few == [0, 74_999, 149_999]


def lower_case(locale: str) -> bytes:
    """``y`` is the text ``x`` in lower case."""
    ends = [helper.make_tensor_value_info(n, TensorProto.STRING, ["rows"]) for n in ("x", "y")]
    node = helper.make_node("StringNormalizer", ["x"], ["y"], case_change_action="LOWER", locale=locale)
    graph = helper.make_graph([node], "lower", ends[:1], ends[1:])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()


def test_a_locale_that_is_not_installed_is_named_with_what_installs_it() -> None:
    (made,) = open_session(lower_case("C.UTF-8")).run(None, {"x": np.array(["ÜBER New"], dtype=object)})
    assert made.tolist() == ["über new"]
    with pytest.raises(
        BadInput, match=r"the locale xx_YY\.UTF-8, which is not installed here; .+ localedef -i xx_YY "
    ):
        open_session(lower_case("xx_YY.UTF-8"))


def test_what_onnx_runtime_does_not_take_is_one_sentence() -> None:
    model = doubling()
    model.graph.node[0].op_type, model.graph.node[0].domain = "Twice", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(
        BadInput, match=r"^ONNX Runtime cannot open the model: Fatal error: com\.microsoft:Twice"
    ):
        open_session(model.SerializeToString())


def test_a_model_with_too_many_numbers_a_row_is_refused() -> None:
    schema = Schema(features_of(DatasetInfo(features=["x"])), "regression", [])
    model = doubling()
    model.graph.node[0].input[1] = "wide"
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 3), dtype=np.float32), "wide"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3
    with pytest.raises(BadInput, match=r"the ONNX model gives 3 numbers a row, expected 1\."):
        predict_onnx(open_session(model.SerializeToString()), schema, pd.DataFrame({"x": [1.0, 2.0]}))
