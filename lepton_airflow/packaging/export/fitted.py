"""What a trainer returned, checked: it predicts natively, and it turns into one ONNX graph over the raw features.

Three kinds come in, a scikit-learn estimator, a torch module and an ONNX model, and one shape goes out: the graph that
:mod:`lepton_airflow.packaging.package` describes, without names of files, times or anything else that differs between equal runs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lepton_airflow.errors import BadInput
from lepton_airflow.packaging.package import OUTPUTS, Feature, open_session

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import pandas as pd
    from numpy.typing import NDArray

OPSET = 18  # what torch's exporter speaks natively; skl2onnx writes operators that mean the same there
OLDEST_OPSET = 13  # the operators added around a user's own ONNX model exist since then
_PREDICT_ROWS = 65_536


@dataclass(frozen=True)
class Schema:
    """What goes in and out of a model: raw features, task and classes (none for regression)."""

    features: list[Feature]
    task: str
    classes: list[Any]

    @property
    def names(self) -> list[str]:
        """The feature columns in order."""
        return [f.name for f in self.features]

    @property
    def output_columns(self) -> int:
        """Columns of the main output: one per class, or one."""
        return len(self.classes) if self.task == "classification" else 1


class Fitted(Protocol):
    """A fitted model of any kind."""

    framework: str

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Predict natively from raw features: (n, k) probabilities, or (n,) numbers for regression."""

    def to_onnx(self) -> onnx.ModelProto:
        """The packaged graph."""


def as_fitted(returned: Any, schema: Schema, trainer: str) -> Fitted:
    """Recognise what a trainer returned; raises :class:`BadInput` with what a trainer may return."""
    if _is(returned, "onnx", "ModelProto"):
        return OnnxModel(returned, schema, trainer)
    parts = returned if isinstance(returned, tuple) else (returned,)
    if len(parts) <= 2 and (modules := [p for p in parts if _is(p, "torch.nn", "Module")]):
        others = [p for p in parts if p is not modules[0]]
        transformer = others[0] if others and hasattr(others[0], "transform") else None
        if not others and getattr(modules[0], "example_input", None) is None:
            raise BadInput(
                f"trainer {trainer}: it returned a torch module without an example input; expected (module, example) "
                "with a float32 tensor [rows, columns], a module with the attribute example_input, or "
                "(fitted transformer of the raw columns, module)."
            )
        return TorchModel(modules[0], transformer, schema, trainer)
    if len(parts) == 1 and hasattr(returned, "predict") and hasattr(returned, "get_params"):
        return SklearnModel(returned, schema, trainer)
    raise BadInput(
        f"trainer {trainer}: it returned {_type_name(returned)}; expected a fitted scikit-learn estimator over the raw "
        "feature columns, a torch.nn.Module with an example input, or an onnx.ModelProto."
    )


def _is(value: Any, module: str, name: str) -> bool:
    """Whether a value is of a class of a library that may not even be installed."""
    return any(c.__name__ == name and c.__module__.startswith(module) for c in type(value).__mro__)


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


# -- scikit-learn ------------------------------------------------------------------------------------------------------


@dataclass
class SklearnModel:
    """A fitted estimator or Pipeline that takes the raw feature columns as a DataFrame."""

    estimator: Any
    schema: Schema
    trainer: str
    framework: str = "scikit-learn"

    def __post_init__(self) -> None:
        if self.schema.task == "classification" and not hasattr(self.estimator, "predict_proba"):
            raise BadInput(
                f"trainer {self.trainer}: {type(self.estimator).__name__} has no predict_proba, and classification needs "
                "probabilities; wrap it in sklearn.calibration.CalibratedClassifierCV."
            )

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Predict natively; a class that a fold did not hold gets probability 0."""
        import numpy as np

        raw = frame[self.schema.names]
        if self.schema.task == "regression":
            return np.asarray(self.estimator.predict(raw), dtype=np.float64).reshape(len(raw))
        seen = np.asarray(self.estimator.classes_)
        if not set(seen.tolist()) <= set(range(len(self.schema.classes))):
            raise BadInput(
                f"trainer {self.trainer}: the estimator knows the classes {seen.tolist()[:5]}, expected the class numbers "
                f"0 to {len(self.schema.classes) - 1} that the target column holds; fit on that column as it is."
            )
        result = np.zeros((len(raw), len(self.schema.classes)))
        result[:, seen.astype(int)] = self.estimator.predict_proba(raw)
        return result

    def to_onnx(self) -> onnx.ModelProto:
        """Convert with skl2onnx."""
        if self.schema.task == "classification" and len(self.estimator.classes_) != len(self.schema.classes):
            raise BadInput(
                f"trainer {self.trainer}: the estimator knows {len(self.estimator.classes_)} of the "
                f"{len(self.schema.classes)} classes {self.schema.classes[:5]}; train has no row of the others."
            )
        model = _convert_sklearn(self.estimator, self.schema.features, self.trainer)
        return _finish(model, model.graph.output[-1].name, self.schema, columns=self.schema.output_columns)


def _convert_sklearn(estimator: Any, features: Sequence[Feature], trainer: str) -> onnx.ModelProto:
    """skl2onnx's graph of an estimator, with one input per feature in their order."""
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType
    from sklearn.base import is_classifier

    tensor = {"number": FloatTensorType, "category": StringTensorType}
    by_column = _selects_columns(estimator)
    if by_column:
        inputs = [(f.name, tensor[f.kind]([None, 1])) for f in features]
    elif len({f.kind for f in features}) == 1:
        inputs = [("features", tensor[features[0].kind]([None, len(features)]))]
    else:
        raise BadInput(
            f"trainer {trainer}: {type(estimator).__name__} gets numbers and categories in one table, which ONNX cannot "
            "hold; start the Pipeline with a ColumnTransformer that names the columns."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = convert_sklearn(
                _with_float32_thresholds(estimator),
                name="model",
                initial_types=inputs,
                target_opset={"": OPSET, "ai.onnx.ml": 3},
                options={"zipmap": False} if is_classifier(estimator) else None,
            )
    except Exception as error:  # skl2onnx raises a dozen kinds
        raise BadInput(
            f"trainer {trainer}: skl2onnx cannot convert {type(estimator).__name__}: {_first_line(error)}. "
            "Use estimators it supports, or return an onnx.ModelProto."
        ) from error
    for entry in model.opset_import:  # it declares the oldest opset that will do; merging needs one number
        if entry.domain == "":
            entry.version = OPSET
    return model if by_column else _with_concat(model, features)


def _with_float32_thresholds(estimator: Any) -> Any:
    """A copy whose histogram trees split where float32 comparisons split the same.

    skl2onnx rounds their thresholds to the nearest float32, which may lie above a value that the float64 threshold lies
    below. For a float32 ``x``, ``x <= t`` is exactly ``x <= (the largest float32 not above t)``.
    """
    import numpy as np

    def visit(value: Any) -> None:
        if isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif hasattr(value, "get_params"):
            for tree in (t for trees in getattr(value, "_predictors", ()) for t in trees):
                exact = tree.nodes["num_threshold"]
                near = exact.astype(np.float32)
                below = np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)
                tree.nodes["num_threshold"] = below
            for item in vars(value).values():
                visit(item)

    estimator = copy.deepcopy(estimator)
    visit(estimator)
    return estimator


def _selects_columns(estimator: Any) -> bool:
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import Pipeline

    while isinstance(estimator, Pipeline):
        estimator = estimator.steps[0][1]
    return isinstance(estimator, ColumnTransformer)


# -- torch -------------------------------------------------------------------------------------------------------------


@dataclass
class TorchModel:
    """A torch module over a float32 matrix, behind a fitted transformer of the raw columns or over the numbers alone.

    Its output is probabilities [n, k] (or [n, 1] for the second of two classes), or numbers [n, 1].
    """

    module: Any
    transformer: Any
    schema: Schema
    trainer: str
    framework: str = "torch"

    def __post_init__(self) -> None:
        categories = [f.name for f in self.schema.features if f.kind == "category"]
        if self.transformer is None and categories:
            raise BadInput(
                f"trainer {self.trainer}: a torch module alone takes numbers, and {categories[0]!r} is a category; "
                "return (fitted transformer of the raw columns, module)."
            )
        self.module = self.module.eval().cpu()

    def matrix(self, frame: pd.DataFrame) -> NDArray[np.float32]:
        """The float32 matrix that the module reads."""
        import numpy as np

        raw = frame[self.schema.names]
        table = raw if self.transformer is None else self.transformer.transform(raw)
        return np.ascontiguousarray(table.toarray() if hasattr(table, "toarray") else table, dtype=np.float32)

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Predict natively, without gradients."""
        import numpy as np
        import torch

        parts = []
        with torch.inference_mode():
            for start in range(0, max(len(frame), 1), _PREDICT_ROWS):
                rows = self.matrix(frame.iloc[start : start + _PREDICT_ROWS])
                parts.append(self.module(torch.from_numpy(rows)).numpy().astype(np.float64))
        return _shaped(np.concatenate(parts), self.schema, self.trainer)

    def to_onnx(self) -> onnx.ModelProto:
        """Export with torch's exporter and put the preprocessing in front."""
        import onnx
        import torch

        width = self._width()
        rows = torch.export.Dim("rows", min=1)
        quiet = io.StringIO()
        loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stdout(quiet), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.onnx.export(
                    self.module,
                    (torch.zeros(2, width),),
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=["matrix"],
                    output_names=["outcome"],
                    dynamic_shapes=({0: rows},),
                    verbose=False,
                )
            assert program is not None
            body = program.model_proto
        except Exception as error:  # the exporter wraps whatever the module did
            raise BadInput(
                f"trainer {self.trainer}: torch.onnx cannot export {type(self.module).__name__} for a [rows, {width}] "
                f"float32 input: {_first_line(error)}. Keep shapes free of the number of rows, and forward free of "
                "Python branches on values."
            ) from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
        with torch.inference_mode():
            columns = int(self.module(torch.zeros(2, width)).reshape(2, -1).shape[1])
        if self.transformer is None:
            return _finish(_with_concat(body, self.schema.features), "outcome", self.schema, columns=columns)
        front = onnx.compose.add_prefix(
            _convert_sklearn(self.transformer, self.schema.features, self.trainer), "pre/"
        )
        body = onnx.compose.add_prefix(body, "net/")
        front.ir_version = body.ir_version = max(front.ir_version, body.ir_version)
        _keep_default_domain(body)
        merged = onnx.compose.merge_models(front, body, io_map=[(front.graph.output[0].name, "net/matrix")])
        return _finish(merged, "net/outcome", self.schema, columns=columns)

    def _width(self) -> int:
        return int(self.matrix(_blank(self.schema)).shape[1])


def _keep_default_domain(model: onnx.ModelProto) -> None:
    """Drop declared operator sets that no node uses: torch's exporter lists some that other tools do not know."""
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in used | {""}]
    del model.opset_import[:]
    model.opset_import.extend(kept)


# -- ONNX --------------------------------------------------------------------------------------------------------------


@dataclass
class OnnxModel:
    """A user's own ONNX model, with one input per feature or one float matrix of all of them."""

    model: onnx.ModelProto
    schema: Schema
    trainer: str
    framework: str = "onnx"

    def __post_init__(self) -> None:
        version = next((e.version for e in self.model.opset_import if e.domain == ""), OLDEST_OPSET)
        if version < OLDEST_OPSET:
            raise BadInput(
                f"trainer {self.trainer}: its ONNX model has opset {version}, expected {OLDEST_OPSET} or newer; convert it "
                "with onnx.version_converter."
            )
        stored = {i.name for i in self.model.graph.initializer}
        self.inputs = [i.name for i in self.model.graph.input if i.name not in stored]
        wanted = [{f.name, f.input} for f in self.schema.features]
        self.by_column = len(self.inputs) == len(wanted) and all(
            any(i in w for i in self.inputs) for w in wanted
        )
        numbers = all(f.kind == "number" for f in self.schema.features)
        if not self.by_column and not (len(self.inputs) == 1 and numbers):
            raise BadInput(
                f"trainer {self.trainer}: its ONNX model has the inputs {self.inputs[:8]}; expected one per feature "
                f"({self.schema.names[:8]}), or one float matrix when all features are numbers."
            )
        names = [o.name for o in self.model.graph.output]
        wanted_output = OUTPUTS[self.schema.task][0]
        self.output = wanted_output if wanted_output in names else names[0]
        self.session = open_session(self.model.SerializeToString())

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Predict with the model as it was returned."""
        return _shaped(self._run(frame), self.schema, self.trainer)

    def to_onnx(self) -> onnx.ModelProto:
        """The same model under the package's input and output names."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        columns = self._run(_blank(self.schema)).reshape(1, -1).shape[1]
        if not self.by_column:
            return _finish(
                _with_concat(model, self.schema.features), self.output, self.schema, columns=columns
            )
        by_name = {i.name: i for i in self.model.graph.input}
        own = [self._input_of(f) for f in self.schema.features]
        del model.graph.input[:]
        model.graph.input.extend([by_name[name] for name in own])
        return _finish(model, self.output, self.schema, columns=columns)

    def _input_of(self, feature: Feature) -> str:
        return feature.name if feature.name in self.inputs else feature.input

    def _run(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        import numpy as np

        feed: dict[str, Any] = {self.inputs[0]: None}
        if self.by_column:
            for f in self.schema.features:
                kind = np.float32 if f.kind == "number" else object
                feed[self._input_of(f)] = frame[f.name].to_numpy(dtype=kind).reshape(-1, 1)
        else:
            feed[self.inputs[0]] = frame[self.schema.names].to_numpy(dtype=np.float32)
        try:
            (values,) = self.session.run([self.output], feed)
            return np.asarray(values, dtype=np.float64)
        except Exception as error:  # onnxruntime's own kinds, or an output that is no tensor of numbers
            raise BadInput(
                f"trainer {self.trainer}: its ONNX model does not run on the raw features: {_first_line(error)}"
            ) from error


# -- the graph ---------------------------------------------------------------------------------------------------------


def _shaped(values: NDArray[np.float64], schema: Schema, trainer: str) -> NDArray[np.float64]:
    """Probabilities (n, k) or numbers (n,) from what a network gave; raises BadInput when it is neither."""
    import numpy as np

    table = values.reshape(len(values), -1)
    if schema.task == "regression":
        if table.shape[1] != 1:
            raise BadInput(f"trainer {trainer}: the model gives {table.shape[1]} numbers a row, expected 1.")
        return table[:, 0]
    if table.shape[1] == 1 and len(schema.classes) == 2:
        table = np.hstack([1 - table, table])
    if table.shape[1] != len(schema.classes):
        raise BadInput(
            f"trainer {trainer}: the model gives {table.shape[1]} numbers a row, expected {len(schema.classes)} "
            f"probabilities, one per class of {schema.classes[:5]}."
        )
    wrong = (np.abs(table.sum(axis=1) - 1) > 1e-3) | (table.min(axis=1) < -1e-6)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise BadInput(
            f"trainer {trainer}: the model's row {row} is {np.round(table[row][:4], 3).tolist()}, which are no "
            "probabilities; end the network with softmax (or sigmoid for one output)."
        )
    return table


def _blank(schema: Schema) -> pd.DataFrame:
    """One row of raw features: zeros and empty texts."""
    import pandas as pd

    return pd.DataFrame({f.name: [""] if f.kind == "category" else [0.0] for f in schema.features})


def _with_concat(model: onnx.ModelProto, features: Sequence[Feature]) -> onnx.ModelProto:
    """Replace a graph's one matrix input by one input per feature."""
    from onnx import TensorProto, helper

    stored = {i.name for i in model.graph.initializer}
    matrix = next(i for i in model.graph.input if i.name not in stored)
    kind = TensorProto.FLOAT if features[0].kind == "number" else TensorProto.STRING
    names = [f"column/{i}" for i in range(len(features))]
    nodes = [helper.make_node("Concat", names, [matrix.name], axis=1, name="columns"), *model.graph.node]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend(helper.make_tensor_value_info(n, kind, ["rows", 1]) for n in names)
    return model


def _finish(model: onnx.ModelProto, output: str, schema: Schema, *, columns: int) -> onnx.ModelProto:
    """Give a graph the package's inputs and outputs, and take out all that could differ between equal runs.

    :param output: the tensor with probabilities or numbers, with ``columns`` columns.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.compose.add_prefix(model, "/")  # no inner name can now meet a feature's or an output's
    graph = model.graph
    renamed = {old.name: f.input for old, f in zip(graph.input, schema.features, strict=True)}
    _rename_inputs(graph, renamed)
    del graph.input[:], graph.output[:], graph.value_info[:]
    for f in schema.features:
        kind = TensorProto.STRING if f.kind == "category" else TensorProto.FLOAT
        graph.input.append(helper.make_tensor_value_info(f.input, kind, ["rows", 1]))
    constants: dict[str, NDArray[Any]] = {}
    nodes = [("Cast", [f"/{output}"], ["as_float"], {"to": TensorProto.FLOAT})]
    main = OUTPUTS[schema.task][0]
    if schema.task == "regression":
        constants["one_column"] = np.array([-1, 1], dtype=np.int64)
        nodes.append(("Reshape", ["as_float", "one_column"], [main], {}))
    else:
        constants["columns"] = np.array([-1, columns], dtype=np.int64)
        nodes.append(("Reshape", ["as_float", "columns"], [main if columns > 1 else "second"], {}))
        if columns == 1:
            constants["one"] = np.array(1, dtype=np.float32)
            nodes.append(("Sub", ["one", "second"], ["first"], {}))
            nodes.append(("Concat", ["first", "second"], [main], {"axis": 1}))
        whole = all(isinstance(c, int) and not isinstance(c, bool) for c in schema.classes)
        constants["classes"] = np.array(schema.classes if whole else [str(c) for c in schema.classes])
        if not whole:
            constants["classes"] = constants["classes"].astype(object)
        nodes.append(("ArgMax", [main], ["largest"], {"axis": 1, "keepdims": 0}))
        nodes.append(("Gather", ["classes", "largest"], ["label"], {}))
        label = TensorProto.INT64 if whole else TensorProto.STRING
        graph.output.append(helper.make_tensor_value_info("label", label, ["rows"]))
    own = set(constants) | {out for _, _, outs, _ in nodes for out in outs} - set(OUTPUTS[schema.task])
    for operator, *tensors, attributes in nodes:
        read, made = ([f"end/{n}" if n in own else n for n in names] for names in tensors)
        graph.node.append(
            helper.make_node(operator, read, made, name=f"end/{operator}_{made[0]}", **attributes)
        )
    graph.initializer.extend(numpy_helper.from_array(v, f"end/{k}") for k, v in constants.items())
    shape = ["rows", schema.output_columns]
    graph.output.insert(0, helper.make_tensor_value_info(main, TensorProto.FLOAT, shape))
    _strip(model)
    onnx.checker.check_model(model)
    return model


def _rename_inputs(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Rename tensors where nodes read them, in nested graphs too."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename_inputs(inner, names)


def _strip(model: onnx.ModelProto) -> None:
    """Take out notes of the exporters: they hold stack traces with paths, and random names."""
    del model.metadata_props[:], model.graph.metadata_props[:]
    model.producer_name, model.producer_version, model.doc_string, model.domain = "lepton_airflow", "", "", ""
    model.model_version = 0
    model.graph.name, model.graph.doc_string = "model", ""
    # Once each, and sorted: merging lists some twice, and skl2onnx's order changes with the hash seed.
    versions = {entry.domain: entry.version for entry in sorted(model.opset_import, key=lambda e: e.version)}
    del model.opset_import[:]
    for domain in sorted(versions):
        model.opset_import.add(domain=domain, version=versions[domain])
    for item in (*model.graph.node, *model.graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
