"""What a trainer may return: recognised here, and made one ONNX graph by the module of its kind.

Three kinds come in, a scikit-learn estimator, a torch module and an ONNX model, and one form goes out: the graph that
:mod:`lepton_airflow.packaging.package` describes. Equal models give equal bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lepton_airflow.errors import BadInput, LeptonError, first_line
from lepton_airflow.packaging.export.onnx import OnnxModel
from lepton_airflow.packaging.export.sklearn import SklearnModel
from lepton_airflow.packaging.export.torch import TorchModel
from lepton_airflow.packaging.schema import Schema

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import pandas as pd
    from numpy.typing import NDArray


class Fitted(Protocol):
    """A fitted model of any kind."""

    framework: str
    trainer: str

    @property
    def described(self) -> str:
        """The classes that it is made of, for sentences about it."""

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Predict from raw features with the model's own library: (n, k) probabilities, or (n,) numbers for regression."""

    def to_onnx(self) -> onnx.ModelProto:
        """The packaged graph."""


def as_fitted(returned: Any, schema: Schema, trainer: str) -> Fitted:
    """Recognise what a trainer returned; raises BadInput with what a trainer may return."""
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
    estimator = hasattr(returned, "predict") and hasattr(returned, "get_params")
    if estimator and not isinstance(returned, type):
        return SklearnModel(returned, schema, trainer)
    raise BadInput(
        f"trainer {trainer}: it returned {_type_name(returned)}; expected a fitted scikit-learn estimator over the raw "
        "feature columns, a torch.nn.Module with an example input, or an onnx.ModelProto."
    )


def packaged(model: Fitted) -> bytes:
    """The packaged graph's bytes; raises BadInput with what the exporter says where there is none."""
    try:
        return model.to_onnx().SerializeToString(deterministic=True)
    except (LeptonError, MemoryError):
        raise
    except Exception as error:  # of an exporter, or of a step of the user's
        raise BadInput(
            f"trainer {model.trainer}: its {model.framework} model cannot be written as ONNX: {type(error).__name__}: "
            f"{first_line(error)[:200]}"
        ) from error


def _is(value: Any, module: str, name: str) -> bool:
    """Whether a value is of a class of a library that may not even be installed."""
    return any(c.__name__ == name and c.__module__.startswith(module) for c in type(value).__mro__)


def _type_name(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return f"the class {name} itself" if isinstance(value, type) else name
