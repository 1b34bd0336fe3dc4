"""The form that every graph gets in the end: the package's inputs and outputs, and nothing that differs between equal runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.features import KINDS, Feature
from lepton_airflow.packaging.schema import Schema

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

OPSET = 18  # torch's exporter writes it, and what skl2onnx writes means the same in it


def with_concat(model: onnx.ModelProto, features: Sequence[Feature]) -> onnx.ModelProto:
    """Replace a graph's one matrix input by one input per feature."""
    from onnx import helper

    stored = {i.name for i in model.graph.initializer}
    matrix = next(i for i in model.graph.input if i.name not in stored)
    element = _element_type(features[0])
    names = [f"column/{i}" for i in range(len(features))]
    nodes = [helper.make_node("Concat", names, [matrix.name], axis=1, name="columns"), *model.graph.node]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend(helper.make_tensor_value_info(n, element, ["rows", 1]) for n in names)
    return model


def read_float32(model: onnx.ModelProto) -> None:
    """Let a graph whose inputs are float64 read float32, in which packages take numbers."""
    from onnx import TensorProto, helper

    casts = []
    for read in model.graph.input:
        if read.type.tensor_type.elem_type == TensorProto.DOUBLE:
            given = f"{read.name}/float32"
            casts.append(
                helper.make_node(
                    "Cast", [given], [read.name], name=f"cast/{read.name}", to=TensorProto.DOUBLE
                )
            )
            read.name, read.type.tensor_type.elem_type = given, TensorProto.FLOAT
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def give_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Round what a graph gives to float32, which a network reads."""
    from onnx import TensorProto, helper

    (made,) = model.graph.output
    if made.type.tensor_type.elem_type == TensorProto.DOUBLE:
        rounded = f"{made.name}/float32"
        model.graph.node.append(
            helper.make_node("Cast", [made.name], [rounded], name="cast", to=TensorProto.FLOAT)
        )
        made.name, made.type.tensor_type.elem_type = rounded, TensorProto.FLOAT
    return model


def finish(model: onnx.ModelProto, output: str, schema: Schema, *, columns: int) -> onnx.ModelProto:
    """Give a graph the package's inputs and outputs, and take out all that could differ between equal runs.

    :param output: the tensor with probabilities or numbers, with ``columns`` columns; one column of probabilities is that
        of the positive one of two classes.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.compose.add_prefix(model, "/")  # no inner name can now meet a feature's or an output's
    graph = model.graph
    _rename_inputs(graph, {old.name: f.input for old, f in zip(graph.input, schema.features, strict=True)})
    del graph.input[:], graph.output[:], graph.value_info[:]
    for f in schema.features:
        graph.input.append(helper.make_tensor_value_info(f.input, _element_type(f), ["rows", 1]))
    shape = ["rows", schema.output_columns]
    graph.output.append(helper.make_tensor_value_info(schema.output, TensorProto.FLOAT, shape))
    _append(graph, "Cast", [f"/{output}"], "end/as_float", to=TensorProto.FLOAT)
    if schema.task == "regression":
        column = _constant(graph, "end/one_column", _whole([-1, 1]))
        _append(graph, "Reshape", ["end/as_float", column], schema.output)
    else:
        _append_probabilities(graph, columns, schema.output)
        _append_label(graph, schema)
    strip(model)
    onnx.checker.check_model(model)
    return model


def strip(model: onnx.ModelProto) -> None:
    """Take out the exporters' notes: they hold stack traces with paths, and random names."""
    del model.metadata_props[:], model.graph.metadata_props[:]
    model.producer_name, model.producer_version, model.doc_string, model.domain = "lepton_airflow", "", "", ""
    model.model_version = 0
    model.graph.name, model.graph.doc_string = "model", ""
    # Merging lists some operator sets twice, and the order of skl2onnx's changes with the hash seed.
    versions = {entry.domain: entry.version for entry in sorted(model.opset_import, key=lambda e: e.version)}
    del model.opset_import[:]
    for domain in sorted(versions):
        model.opset_import.add(domain=domain, version=versions[domain])
    for item in (*model.graph.node, *model.graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


def _append_probabilities(graph: onnx.GraphProto, columns: int, output: str) -> None:
    """Make a matrix of all classes of what the model gives."""
    import numpy as np

    shape = _constant(graph, "end/columns", _whole([-1, columns]))
    if columns > 1:
        _append(graph, "Reshape", ["end/as_float", shape], output)
        return
    _append(graph, "Reshape", ["end/as_float", shape], "end/second")
    one = _constant(graph, "end/one", np.array(1, dtype=np.float32))
    _append(graph, "Sub", [one, "end/second"], "end/first")
    _append(graph, "Concat", ["end/first", "end/second"], output, axis=1)


def _append_label(graph: onnx.GraphProto, schema: Schema) -> None:
    """Name the most probable class of each row: a whole number where all classes are such, else text."""
    import numpy as np
    from onnx import TensorProto, helper

    whole = all(isinstance(c, int) and not isinstance(c, bool) for c in schema.classes)
    names = np.array(schema.classes) if whole else np.array([str(c) for c in schema.classes], dtype=object)
    classes = _constant(graph, "end/classes", names)
    _append(graph, "ArgMax", [schema.output], "end/largest", axis=1, keepdims=0)
    _append(graph, "Gather", [classes, "end/largest"], "label")
    element = TensorProto.INT64 if whole else TensorProto.STRING
    graph.output.append(helper.make_tensor_value_info("label", element, ["rows"]))


def _append(graph: onnx.GraphProto, operator: str, read: Sequence[str], made: str, **attributes: Any) -> None:
    from onnx import helper

    node = helper.make_node(operator, read, [made], name=f"end/{operator}_{made}", **attributes)
    graph.node.append(node)


def _constant(graph: onnx.GraphProto, name: str, values: NDArray[Any]) -> str:
    """Store a constant in the graph and return its name."""
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _whole(numbers: Sequence[int]) -> NDArray[Any]:
    import numpy as np

    return np.array(numbers, dtype=np.int64)


def _element_type(feature: Feature) -> int:
    """ONNX's number for the type of a feature's values."""
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(KINDS[feature.kind].tensor.upper()))


def _rename_inputs(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Rename tensors where nodes read them, in nested graphs too."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename_inputs(inner, names)
