"""What can be gained in a graph, and the graph in another number format."""

from __future__ import annotations

import platform
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[Any]]  # what one call of a session takes

METHODS = {
    "dynamic_int8": "weights as 8-bit integers, activations rounded call by call",
    "static_int8": "weights and activations as 8-bit integers, their ranges taken from calibration rows",
    "fp16": "16-bit floats from the first matrix product on",
}
_LINEAR = ("Conv", "Gemm", "MatMul")  # with constant weights: what there is to gain from
_INTEGER = ("ConvInteger", "MatMulInteger")  # what quantize_dynamic makes of them
# What lets 8-bit tensors through, so that two layers need no detour over floats.
_BETWEEN = ("Clip", "MaxPool", "Relu")
# Instruction sets that matrix kernels are chosen by, on x86 and on ARM.
_FLAGS = (
    *(
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_int8",
        "amx_bf16",
        "amx_fp16",
    ),
    *("asimddp", "asimdhp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True)
class Graph:
    """What an ONNX model consists of.

    :ivar ops: how many nodes of each operator, nested graphs included.
    :ivar linear: how many of them are Conv, Gemm or MatMul with constant weights.
    :ivar lowered: how many of those compute with weights of fewer than 32 bits.
    """

    ops: dict[str, int]
    linear: int
    lowered: int


def inspect(model: onnx.ModelProto) -> Graph:
    """Count a model's operators, those that a smaller number format can speed up, and those that have one."""
    from onnx import TensorProto

    def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    yield from nodes(inner)

    # Weights in float64 belong to a preprocessing that decides on which side of a threshold a value is: they stay.
    stored = {i.name: i.data_type for i in model.graph.initializer if i.data_type != TensorProto.DOUBLE}
    scaled = {
        n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored
    }
    linear = lowered = 0
    for node in model.graph.node:
        integer = node.op_type in _INTEGER
        weight = node.input[1] if node.op_type in _LINEAR else ""
        linear += integer or weight in stored or weight in scaled
        lowered += integer or weight in scaled or stored.get(weight) == TensorProto.FLOAT16
    counts = Counter(n.op_type for n in nodes(model.graph))
    return Graph(dict(sorted(counts.items())), linear, lowered)


def prepare(model: bytes) -> onnx.ModelProto:
    """The same model with constants folded and shapes known, which all conversions start from."""
    import onnx
    from onnxruntime.quantization import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        given, path = Path(folder, "model.onnx"), Path(folder, "prepared.onnx")
        given.write_bytes(model)
        # Symbolic inference knows no ai.onnx.ml operator; plain inference finds all types that conversion needs.
        quant_pre_process(given, path, skip_symbolic_shape=True)
        prepared = onnx.load(path)
    # torch also notes the shapes of weights. quantize_dynamic transposes weights and leaves their notes, so those must go.
    graph = prepared.graph
    weights = {i.name: i for i in graph.initializer}
    for node in graph.node:
        # onnxruntime makes Gemm of a product and skl2onnx's bias [1, n], and quantize_static (1.31) takes biases [n] alone.
        bias = weights.get(node.input[2]) if node.op_type == "Gemm" and len(node.input) == 3 else None
        if bias is not None and len(bias.dims) == 2 and bias.dims[0] == 1:
            del bias.dims[0]
    stored = {i.name: i.data_type for i in graph.initializer}
    typed = {v.name: v for v in graph.value_info if v.name not in stored}
    # Inference stops at ai.onnx.ml operators. A tensor that is multiplied with weights has the type of these weights.
    known = {v.name for v in (*graph.input, *graph.output)} | set(typed)
    for node in graph.node:
        if node.op_type in _LINEAR and node.input[1] in stored and node.input[0] not in known:
            name = node.input[0]
            typed[name] = onnx.helper.make_tensor_value_info(name, stored[node.input[1]], None)
    del graph.value_info[:]
    graph.value_info.extend(typed.values())
    return onnx.shape_inference.infer_shapes(prepared)


def convert(
    prepared: onnx.ModelProto, method: str, calibration: Callable[[], Iterator[Feed]]
) -> onnx.ModelProto:
    """A prepared model in another number format; preprocessing and trees in it stay as they are.

    :param method: a name from :data:`METHODS`.
    :param calibration: gives the calibration rows in batches, of which one at a time is in memory; for ``static_int8``.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    if method == "fp16":
        return _without_notes(_half(prepared))
    common = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": _saturates()}
    with tempfile.TemporaryDirectory() as folder:
        given, path = Path(folder, "prepared.onnx"), Path(folder, "quantized.onnx")
        # From a file, because the library takes the weights out of a model that it gets in memory.
        onnx.save(prepared, given)
        if method == "dynamic_int8":
            quantize_dynamic(given, path, op_types_to_quantize=["Conv", "MatMul"], **common)
        else:
            # MinMax keeps two numbers per tensor and batch. The option CalibMaxIntermediateOutputs would not bound memory:
            # onnxruntime 1.31 drops what it has collected when the limit is reached.
            quantize_static(
                given,
                path,
                _Reader(calibration()),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=[*_LINEAR, *_BETWEEN],
                extra_options={"MatMulConstBOnly": True},  # products of two activations lose too much
                **common,
            )
        return _without_notes(onnx.load(path))


@dataclass
class _Reader:
    """Calibration rows as onnxruntime asks for them."""

    batches: Iterator[Feed]

    def get_next(self) -> Feed | None:
        return next(self.batches, None)


def _half(prepared: onnx.ModelProto) -> onnx.ModelProto:
    """16-bit floats from the first linear operator on.

    What comes before stays as it is: raw features above 65,504 would become infinite and those above 2,048 inexact, so
    some would change the side of a tree's or a bin's threshold.
    """
    import onnx
    from onnx import helper
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.ModelProto()
    model.CopyFrom(prepared)
    graph = model.graph
    stored = {i.name: i for i in graph.initializer}
    front, back = _cut_at_linear(graph, stored)
    made = {name for node in back for name in node.output}
    read_in_front = {name for node in front for name in node.input}
    _copy_shared_constants(back, stored, read_in_front)
    typed = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    read = dict.fromkeys(name for node in back for name in node.input if name)
    entering = [typed[name] for name in read if name not in stored and name not in made]
    leaving = [typed[o.name] for o in graph.output if o.name in made]
    part = helper.make_model(
        helper.make_graph(back, "half", entering, leaving, [stored[n] for n in read if n in stored]),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    half = convert_float_to_float16(part, keep_io_types=True)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend([*front, *half.graph.node])
    graph.initializer.extend([*(i for n, i in stored.items() if n in read_in_front), *half.graph.initializer])
    OnnxModel(model).topological_sort()
    return model


def _cut_at_linear(
    graph: onnx.GraphProto, stored: Mapping[str, onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes that depend on no linear operator in float32, and all others."""
    from onnx import TensorProto

    made: set[str] = set()
    front: list[onnx.NodeProto] = []
    back: list[onnx.NodeProto] = []
    for node in graph.node:  # in topological order
        weight = stored.get(node.input[1]) if node.op_type in _LINEAR else None
        linear = weight is not None and weight.data_type == TensorProto.FLOAT
        if linear or made.intersection(node.input):
            back.append(node)
            made.update(node.output)
        else:
            front.append(node)
    return front, back


def _copy_shared_constants(
    back: Sequence[onnx.NodeProto], stored: dict[str, onnx.TensorProto], read_in_front: set[str]
) -> None:
    """Give these nodes copies of the constants that others read too, so that theirs can become 16-bit floats."""
    import onnx

    for node in back:
        for index, name in enumerate(node.input):
            if name in stored and name in read_in_front:
                node.input[index] = copy = f"{name}/half"
                if copy not in stored:
                    stored[copy] = onnx.TensorProto()
                    stored[copy].CopyFrom(stored[name])
                    stored[copy].name = copy


def _without_notes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Take out the libraries' notes, so that equal conversions give equal bytes."""
    del model.metadata_props[:]
    model.producer_name, model.producer_version = "lepton_airflow", ""
    model.graph.name = "model"
    return model


def cpu_flags() -> list[str]:
    """The instruction sets of this CPU that make 8-bit and 16-bit products fast, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(found[1].split()) if found else set()
    return [flag for flag in _FLAGS if flag in present]


def _saturates() -> bool:
    """Whether this CPU sums products of 8-bit numbers in 16 bits: x86 without VNNI. These overflow unless weights have 7 bits."""
    return platform.machine() in ("x86_64", "AMD64") and not any("vnni" in flag for flag in cpu_flags())
