"""A scikit-learn estimator as ONNX, by skl2onnx."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.features import KINDS, Feature
from lepton_airflow.errors import BadInput, first_line
from lepton_airflow.packaging.export import graph
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
        if self.schema.task == "classification" and not hasattr(self.estimator, "predict_proba"):
            raise BadInput(
                f"trainer {self.trainer}: {type(self.estimator).__name__} has no predict_proba, and classification needs "
                "probabilities; wrap it in sklearn.calibration.CalibratedClassifierCV."
            )

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Predict with scikit-learn; a class that a fold did not hold gets probability 0."""
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
        model = convert_sklearn(self.estimator, self.schema.features, self.trainer)
        return graph.finish(
            model, model.graph.output[-1].name, self.schema, columns=self.schema.output_columns
        )


def convert_sklearn(estimator: Any, features: Sequence[Feature], trainer: str) -> onnx.ModelProto:
    """skl2onnx's graph of an estimator, with one input per feature in their order."""
    import skl2onnx
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType
    from sklearn.base import is_classifier

    def columns(kind: str, count: int) -> Any:
        return {"float": FloatTensorType, "string": StringTensorType}[KINDS[kind].tensor]([None, count])

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
                _with_float32_thresholds(estimator),
                name="model",
                initial_types=inputs,
                target_opset={"": graph.OPSET, "ai.onnx.ml": 3},
                options={"zipmap": False} if is_classifier(estimator) else None,
            )
    except Exception as error:  # skl2onnx raises a dozen kinds
        raise BadInput(
            f"trainer {trainer}: skl2onnx cannot convert {type(estimator).__name__}: {first_line(error)[:300]}. "
            "Use estimators it supports, or return an onnx.ModelProto."
        ) from error
    # skl2onnx declares the oldest opset that will do; graphs can be merged only when they declare the same one.
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = graph.OPSET
    return model if by_column else graph.with_concat(model, features)


def _with_float32_thresholds(estimator: Any) -> Any:
    """A copy whose histogram trees have thresholds that float32 holds, and split all float32 values as before.

    skl2onnx rounds a threshold to the nearest float32. Where that is above the threshold, a value between the two would
    change its side. For a float32 ``x``, ``x <= t`` means exactly ``x <= (the largest float32 not above t)``.
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
    """Whether an estimator takes columns by name, so that they may be of different kinds."""
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import Pipeline

    while isinstance(estimator, Pipeline):
        estimator = estimator.steps[0][1]
    return isinstance(estimator, ColumnTransformer)
