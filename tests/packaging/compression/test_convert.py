"""Conversion of real networks: what changes, what must not, and equal bytes in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lepton_airflow.packaging.compression.convert import (
    METHODS,
    _saturates,
    convert,
    cpu_flags,
    inspect,
    prepare,
)
from lepton_airflow.packaging.session import open_session


@pytest.mark.parametrize("method", METHODS)
def test_only_the_products_change_and_text_still_goes_in(mlp: Any, method: str) -> None:
    prepared = prepare(mlp.model)
    before = inspect(prepared)
    made = convert(prepared, method, mlp.batches)
    after = inspect(made)
    assert (before.linear, before.lowered, after.lowered) == (3, 0, 3)
    for operator in ("OneHotEncoder", "Where", "Div"):  # the encoder, the imputer, the scaler
        assert before.ops[operator] == after.ops[operator] == 1 + (operator == "OneHotEncoder"), operator
    onnx.checker.check_model(made)
    assert len(made.SerializeToString()) < 0.7 * len(mlp.model)
    original, predicted = (mlp.predict(m) for m in (mlp.model, made.SerializeToString()))
    assert predicted.dtype == np.float32
    assert np.corrcoef(original[:, 1], predicted[:, 1])[0, 1] > 0.98
    assert inspect(prepared) == before  # left as it was, for the next candidate


def test_raw_features_too_large_for_16_bits_stay_exact(mlp: Any) -> None:
    far = replace(mlp, feed=mlp.feed | {"distance": mlp.feed["distance"] * 100})
    assert far.feed["distance"].max() > 65504
    made = convert(prepare(far.model), "fp16", far.batches).SerializeToString()
    original, predicted = far.predict(far.model), far.predict(made)
    assert np.isfinite(predicted).all()
    assert np.abs(original - predicted).max() < 0.01


def test_a_constant_that_both_parts_read_stays_exact_in_front() -> None:
    offset, weights = (
        onnx.numpy_helper.from_array(value.astype(np.float32), name)
        for value, name in ((np.array([2049.0]), "offset"), (np.eye(2), "weights"))
    )
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["rows", 2]) for n in ("x", "y")]
    nodes = [
        onnx.helper.make_node("Sub", ["x", "offset"], ["centred"]),
        onnx.helper.make_node("MatMul", ["centred", "weights"], ["product"]),
        onnx.helper.make_node("Div", ["product", "offset"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [offset, weights])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    made = convert(prepare(model.SerializeToString()), "fp16", lambda: iter(()))
    types = {i.name: i.data_type for i in made.graph.initializer}
    assert types["offset"] == onnx.TensorProto.FLOAT
    assert types["weights"] == types["offset/half"] == onnx.TensorProto.FLOAT16
    # In 16 bits 2,049 is 2,048. In front of the product that would make these 1 / 2,048 and 2 / 2,048.
    (found,) = open_session(made.SerializeToString()).run(["y"], {"x": np.array([[2049, 2050]], np.float32)})
    np.testing.assert_allclose(found, [[0, 1 / 2048]], atol=1e-5)


def test_ranges_do_not_depend_on_the_batches_of_calibration(mlp: Any) -> None:
    prepared = prepare(mlp.model)
    whole, small = (
        convert(prepared, "static_int8", lambda size=size: mlp.batches(size)).SerializeToString(
            deterministic=True
        )
        for size in (len(mlp.y), 100)
    )
    assert whole == small


def test_equal_conversions_give_equal_bytes_in_every_process(mlp: Any, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(mlp.model)
    np.savez(
        tmp_path / "rows.npz", **{n: v.astype(str) if v.dtype == object else v for n, v in mlp.feed.items()}
    )
    code = (
        "import hashlib, numpy as np; from lepton_airflow.packaging.compression.convert import *\n"
        "rows = {n: v.astype(object) if v.dtype.kind == 'U' else v for n, v in np.load('rows.npz').items()}\n"
        "model = prepare(open('model.onnx', 'rb').read())\n"
        "for method in METHODS:\n"
        "    made = convert(model, method, lambda: iter([rows])).SerializeToString(deterministic=True)\n"
        "    print(hashlib.sha256(made).hexdigest())\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert len(set(runs[0])) == 3
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "flags", "saturates"),
    [
        ("model name\t: some\nflags\t\t: fpu avx2 avx512f sse\n", "x86_64", ["avx2", "avx512f"], True),
        ("flags\t\t: fpu avx2 avx512_vnni\n", "x86_64", ["avx2", "avx512_vnni"], False),
        ("Features\t: fp asimd asimddp i8mm\n", "aarch64", ["asimddp", "i8mm"], False),
        ("processor\t: 0\n", "x86_64", [], True),
    ],
)
def test_the_flags_of_the_cpu_say_whether_8_bit_weights_overflow(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, machine: str, flags: list[str], saturates: bool
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: cpuinfo if str(path) == "/proc/cpuinfo" else "")
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert cpu_flags() == flags
    assert _saturates() is saturates


def test_without_cpuinfo_no_flags_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert cpu_flags() == []


def test_a_tensor_of_unknown_type_gets_that_of_the_weights_it_meets(mlp: Any) -> None:
    typed = {v.name: v.type.tensor_type.elem_type for v in prepare(mlp.model).graph.value_info}
    first = next(n for n in prepare(mlp.model).graph.node if n.op_type in ("Gemm", "MatMul"))
    assert typed[first.input[0]] == onnx.TensorProto.FLOAT
