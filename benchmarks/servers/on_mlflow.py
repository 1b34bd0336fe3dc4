# ruff: noqa: TID253 - a script in an environment of its own
"""The model in MLflow's scoring server: saved in its ONNX flavour with a signature, and served by ``mlflow models serve``.

Its protocol is MLflow's ``inputs``, a tensor for each input. ``dataframe_split`` will not do: the flavour gives columns of a data frame to ONNX
Runtime as vectors, and this model takes matrices of one column. With 100 rows most of its time goes into copying and reading these lists; a
model without a signature is as slow. Lines in the log for each request are off.
"""

import os
import sys
from pathlib import Path

import mlflow
import numpy as np
import onnx
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

DTYPES = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.STRING: str, onnx.TensorProto.INT64: np.int64}


def schema(tensors: list[onnx.ValueInfoProto]) -> Schema:
    return Schema(
        [
            TensorSpec(
                np.dtype(DTYPES[t.type.tensor_type.elem_type]),
                (-1, *[d.dim_value for d in t.type.tensor_type.shape.dim[1:]]),
                t.name,
            )
            for t in tensors
        ]
    )


model = onnx.load(sys.argv[1])
folder = Path("mlflow-model").absolute()
mlflow.onnx.save_model(
    model,
    str(folder),
    signature=ModelSignature(schema(model.graph.input), schema(model.graph.output)),
    onnx_execution_providers=["CPUExecutionProvider"],
    onnx_session_options={"intra_op_num_threads": 1, "inter_op_num_threads": 1},
    pip_requirements=[],
)
command = [
    "mlflow",
    "models",
    "serve",
    "--env-manager",
    "local",
    "--workers",
    "1",
    "--model-uri",
    str(folder),
]
path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
os.execvpe(
    Path(sys.executable).with_name("mlflow"),
    [*command, "--host", "127.0.0.1", "--port", sys.argv[2]],
    os.environ | {"PATH": path, "UVICORN_ACCESS_LOG": "false"},
)
