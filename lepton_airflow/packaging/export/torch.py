"""A torch module as ONNX, by torch's own exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.features import BATCH_ROWS
from lepton_airflow.errors import BadInput, LeptonError, first_line
from lepton_airflow.packaging.export import graph, network
from lepton_airflow.packaging.export.sklearn import convert_sklearn
from lepton_airflow.packaging.schema import Schema

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import pandas as pd
    from numpy.typing import NDArray


@dataclass
class TorchModel:
    """A torch module over a float32 matrix, behind a fitted transformer of the raw columns or over the numbers alone.

    Its output is probabilities [n, k] (or [n, 1] for the positive one of two classes), or numbers [n, 1].
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

    @property
    def described(self) -> str:
        """The module's class."""
        return type(self.module).__name__

    def matrix(self, frame: pd.DataFrame) -> NDArray[np.float32]:
        """The float32 matrix that the module reads."""
        import numpy as np

        raw = frame[self.schema.names]
        table = raw if self.transformer is None else self.transformer.transform(raw)
        return np.ascontiguousarray(table.toarray() if hasattr(table, "toarray") else table, dtype=np.float32)

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Predict with torch, without gradients; raises BadInput where the module or its transformer fails."""
        import numpy as np
        import torch

        parts = []
        try:
            with torch.inference_mode():
                for start in range(0, max(len(frame), 1), BATCH_ROWS):
                    rows = self.matrix(frame.iloc[start : start + BATCH_ROWS])
                    parts.append(self.module(torch.from_numpy(rows)).numpy().astype(np.float64))
        except (LeptonError, MemoryError):
            raise
        except Exception as error:  # of the user's code
            raise BadInput(
                f"trainer {self.trainer}: {type(self.module).__name__} fails on the raw feature columns: "
                f"{type(error).__name__}: {first_line(error)[:200]}"
            ) from error
        return network.checked_predictions(np.concatenate(parts), self.schema, self.trainer)

    def to_onnx(self) -> onnx.ModelProto:
        """Export with torch's exporter and put the preprocessing in front."""
        import onnx
        import torch

        width = int(self.matrix(network.blank_row(self.schema)).shape[1])
        body = self._export(width)
        with torch.inference_mode():
            columns = int(self.module(torch.zeros(2, width)).reshape(2, -1).shape[1])
        if self.transformer is None:
            whole = graph.with_concat(body, self.schema.features)
            return graph.finish(whole, "outcome", self.schema, columns=columns)
        front = graph.give_float32(convert_sklearn(self.transformer, self.schema.features, self.trainer))
        front = onnx.compose.add_prefix(front, "pre/")
        body = onnx.compose.add_prefix(body, "net/")
        front.ir_version = body.ir_version = max(front.ir_version, body.ir_version)
        _keep_used_domains(body)
        merged = onnx.compose.merge_models(front, body, io_map=[(front.graph.output[0].name, "net/matrix")])
        return graph.finish(merged, "net/outcome", self.schema, columns=columns)

    def _export(self, width: int) -> onnx.ModelProto:
        """The module's own graph, from ``matrix`` [rows, width] to ``outcome``."""
        import torch

        try:
            with _quiet():
                program = torch.onnx.export(
                    self.module,
                    (torch.zeros(2, width),),
                    dynamo=True,
                    opset_version=graph.OPSET,
                    input_names=["matrix"],
                    output_names=["outcome"],
                    dynamic_shapes=({0: torch.export.Dim("rows", min=1)},),
                    verbose=False,
                )
        except Exception as error:  # the exporter wraps whatever the module did
            raise BadInput(
                f"trainer {self.trainer}: torch.onnx cannot export {type(self.module).__name__} for a [rows, {width}] "
                f"float32 input: {first_line(error)[:300]}. Keep shapes free of the number of rows, and forward free of "
                "Python branches on values."
            ) from error
        assert program is not None
        return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter prints, warns and logs about its own steps out of the task's log."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _keep_used_domains(model: onnx.ModelProto) -> None:
    """Drop declared operator sets that no node uses; torch's exporter declares some that other tools do not know."""
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in used | {""}]
    del model.opset_import[:]
    model.opset_import.extend(kept)
