"""A scikit-learn estimator as ONNX, which is protobuf, by skl2onnx."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.features import KINDS, Feature
from lepton_airflow.errors import BadInput, LeptonError, first_line
from lepton_airflow.packaging.export import graph, steps
from lepton_airflow.packaging.schema import Schema

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import pandas as pd
    from numpy.typing import NDArray


@dataclass
class SklearnModel:
    """A fitted estimator or Pipeline that takes the raw feature columns as a DataFrame."""

    estimator: Any
    schema: Schema
    trainer: str
    framework: str = "scikit-learn"

    def __post_init__(self) -> None:
        if self.schema.task != "classification":
            return
        if not hasattr(self.estimator, "predict_proba"):
            raise BadInput(
                f"trainer {self.trainer}: {type(self.estimator).__name__} has no predict_proba, and classification needs "
                "probabilities; wrap it in sklearn.calibration.CalibratedClassifierCV."
            )
        if not hasattr(self.estimator, "classes_"):
            raise BadInput(
                f"trainer {self.trainer}: {described(self.estimator)} has no classes_: it is no classifier, or it was not "
                "fitted; return a fitted classifier."
            )

    @property
    def described(self) -> str:
        """The classes of its steps."""
        return described(self.estimator)

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Predict with scikit-learn; a class that a fold did not hold gets probability 0.

        :raises BadInput: the estimator fails, or gives something else than one prediction a row.
        """
        import numpy as np

        raw = frame[self.schema.names]
        if self.schema.task == "regression":
            return self._ask("predict", raw, 1).reshape(len(raw))
        seen = np.asarray(self.estimator.classes_)
        if seen.ndim != 1 or not set(seen.tolist()) <= set(range(len(self.schema.classes))):
            raise BadInput(
                f"trainer {self.trainer}: the estimator knows the classes {seen.tolist()[:5]}, expected the class numbers "
                f"0 to {len(self.schema.classes) - 1} that the target column holds; fit on that column as it is."
            )
        result = np.zeros((len(raw), len(self.schema.classes)))
        result[:, seen.astype(int)] = self._ask("predict_proba", raw, len(seen))
        return result

    def _ask(self, method: str, raw: pd.DataFrame, columns: int) -> NDArray[np.float64]:
        """What the estimator's ``method`` gives, [rows, columns]."""
        import numpy as np

        told = f"trainer {self.trainer}: {method} of {described(self.estimator)}"
        try:
            values = np.asarray(getattr(self.estimator, method)(raw), dtype=np.float64)
        except (LeptonError, MemoryError):
            raise
        except Exception as error:  # of the user's or any library's code
            raise BadInput(
                f"{told} fails on the raw feature columns: {type(error).__name__}: {first_line(error)[:200]}"
            ) from error
        if values.shape not in {(len(raw), columns), (len(raw),) * (columns == 1)}:
            raise BadInput(
                f"{told} gives the shape {values.shape}, expected {len(raw)} rows and {columns} columns."
            )
        return values.reshape(len(raw), columns)

    def to_onnx(self) -> onnx.ModelProto:
        """Convert with skl2onnx."""
        if self.schema.task == "classification" and len(self.estimator.classes_) != len(self.schema.classes):
            raise BadInput(
                f"trainer {self.trainer}: the estimator knows {len(self.estimator.classes_)} of the "
                f"{len(self.schema.classes)} classes {self.schema.classes[:5]}; train has no row of the others."
            )
        model = convert_sklearn(self.estimator, self.schema.features, self.trainer)
        return graph.finish(
            model, model.graph.output[-1].name, self.schema, columns=self.schema.output_columns
        )


def convert_sklearn(estimator: Any, features: Sequence[Feature], trainer: str) -> onnx.ModelProto:
    """skl2onnx's graph of an estimator, with one input per feature in their order; what it gives may be float64."""
    import onnx
    import skl2onnx
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType, StringTensorType
    from sklearn.base import is_classifier

    number = DoubleTensorType if steps.computes(estimator) else FloatTensorType

    def columns(kind: str, count: int) -> Any:
        return {"float": number, "string": StringTensorType}[KINDS[kind].tensor]([None, count])

    by_column = _selects_columns(estimator)
    if by_column:
        inputs = [(f.name, columns(f.kind, 1)) for f in features]
    elif len({f.kind for f in features}) == 1:
        inputs = [("features", columns(features[0].kind, len(features)))]
    else:
        raise BadInput(
            f"trainer {trainer}: {type(estimator).__name__} gets numbers and categories in one table, which ONNX cannot "
            "hold; start the Pipeline with a ColumnTransformer that names the columns."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = skl2onnx.convert_sklearn(
                copy.deepcopy(estimator),  # a converter may round its thresholds
                name="model",
                initial_types=inputs,
                custom_conversion_functions=steps.converters(estimator),
                custom_shape_calculators=steps.shape_calculators(),
                target_opset={"": graph.OPSET, "ai.onnx.ml": 3},
                options={"zipmap": False} if is_classifier(estimator) else None,
            )
    except (LeptonError, MemoryError):
        raise
    except Exception as error:  # skl2onnx raises a dozen kinds
        raise BadInput(
            f"trainer {trainer}: skl2onnx cannot convert {described(estimator)}: {first_line(error)[:300].rstrip('.')}. "
            "Use estimators it supports, or return an onnx.ModelProto."
        ) from error
    # skl2onnx declares the oldest opset that will do; graphs can be merged only when they declare the same one.
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = graph.OPSET
    graph.read_float32(model)
    for node in model.graph.node:
        if node.op_type == "StringNormalizer" and not any(a.name == "locale" for a in node.attribute):
            # ONNX Runtime's default is en_US.UTF-8, which small images lack; this one is part of the C library.
            node.attribute.append(onnx.helper.make_attribute("locale", "C.UTF-8"))
    return model if by_column else graph.with_concat(model, features)


def _selects_columns(estimator: Any) -> bool:
    """Whether an estimator takes columns by name, so that they may be of different kinds."""
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import Pipeline

    while isinstance(estimator, Pipeline):
        estimator = estimator.steps[0][1]
    return isinstance(estimator, ColumnTransformer)


def described(estimator: Any) -> str:
    """An estimator by the classes of its steps: ``StandardScaler > LogisticRegression``."""
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import Pipeline

    if isinstance(estimator, Pipeline):
        return " > ".join(described(step) for _, step in estimator.steps)
    if isinstance(estimator, ColumnTransformer):
        parts = [described(step) for _, step, _ in estimator.transformers]
        return f"ColumnTransformer({', '.join(parts)})"
    return estimator if isinstance(estimator, str) else type(estimator).__name__
