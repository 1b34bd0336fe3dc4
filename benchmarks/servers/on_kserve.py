# ruff: noqa: TID253 - a script in an environment of its own
"""The model in KServe's Python server, in JSON by the Open Inference Protocol: a ``Model`` with KServe's own tensors.

Its lines in the log for each request are off, and so is gRPC.
"""

import logging
import sys
from typing import Any

import onnxruntime
import uvicorn
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer  # type: ignore[import-not-found]
from kserve.utils.numpy_codec import from_np_dtype  # type: ignore[import-not-found]
from kserve.utils.utils import generate_uuid  # type: ignore[import-not-found]


class Bench(Model):  # type: ignore[misc]
    """Reads and writes its own tensors."""

    def __init__(self) -> None:
        super().__init__("bench")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options)
        self.names = [output.name for output in self.session.get_outputs()]
        self.ready = True

    def predict(self, payload: InferRequest, headers: dict[str, str] | None = None) -> InferResponse:
        feed = {tensor.name: tensor.as_numpy() for tensor in payload.inputs}
        outputs = []
        for name, values in zip(self.names, self.session.run(self.names, feed), strict=True):
            output = InferOutput(name, list(values.shape), from_np_dtype(values.dtype))
            output.set_data_from_numpy(values, binary_data=False)
            outputs.append(output)
        return InferResponse(generate_uuid(), self.name, outputs)


class Loopback(uvicorn.Config):
    """KServe listens on all addresses, and has no setting for it."""

    def __init__(self, app: str, **settings: Any) -> None:
        super().__init__(app, **settings | {"host": "127.0.0.1"})


uvicorn.Config = Loopback  # type: ignore[assignment, misc]
server = ModelServer(http_port=int(sys.argv[2]), enable_grpc=False, enable_latency_logging=False)
for name in ("kserve.trace", "uvicorn.access"):
    logging.getLogger(name).setLevel(logging.WARNING)
server.start([Bench()])
