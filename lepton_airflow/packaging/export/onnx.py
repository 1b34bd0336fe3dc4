"""A user's own ONNX model, brought into the package's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lepton_airflow.data.features import KINDS, Feature
from lepton_airflow.errors import BadInput, first_line
from lepton_airflow.packaging.export import graph, network
from lepton_airflow.packaging.schema import Schema
from lepton_airflow.packaging.session import open_session

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import pandas as pd
    from numpy.typing import NDArray

OLDEST_OPSET = 13  # the first that has all operators which graph.finish adds


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
        self.output = self.schema.output if self.schema.output in names else names[0]
        self.session = open_session(self.model.SerializeToString())

    @property
    def described(self) -> str:
        """What a user's own model is called."""
        return "its ONNX model"

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Predict with the model as it was returned."""
        return network.checked_predictions(self._run(frame), self.schema, self.trainer)

    def to_onnx(self) -> onnx.ModelProto:
        """The same model under the package's input and output names."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        columns = self._run(network.blank_row(self.schema)).reshape(1, -1).shape[1]
        if self.by_column:
            by_name = {i.name: i for i in self.model.graph.input}
            del model.graph.input[:]
            model.graph.input.extend([by_name[self._input_of(f)] for f in self.schema.features])
        else:
            graph.with_concat(model, self.schema.features)
        return graph.finish(model, self.output, self.schema, columns=columns)

    def _input_of(self, feature: Feature) -> str:
        return feature.name if feature.name in self.inputs else feature.input

    def _run(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        import numpy as np

        if self.by_column:
            feed = {
                self._input_of(f): frame[f.name].to_numpy(dtype=KINDS[f.kind].dtype).reshape(-1, 1)
                for f in self.schema.features
            }
        else:
            feed = {self.inputs[0]: frame[self.schema.names].to_numpy(dtype=np.float32)}
        try:
            (values,) = self.session.run([self.output], feed)
            return np.asarray(values, dtype=np.float64)
        except Exception as error:  # onnxruntime's own kinds, or an output that is no tensor of numbers
            raise BadInput(
                f"trainer {self.trainer}: its ONNX model does not run on the raw features: {first_line(error)[:300]}"
            ) from error
