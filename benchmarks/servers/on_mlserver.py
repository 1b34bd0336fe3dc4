# ruff: noqa: TID253 - a script in an environment of its own
"""The model in MLServer, in JSON by the Open Inference Protocol: a runtime with MLServer's own codecs.

It computes in the process that reads the requests (``parallel_workers=0``), which costs least; a line in the log for each request is off
(``debug=False``). Metrics stay on, gRPC and metrics listen on free ports.
"""

import asyncio
import sys

import numpy as np
import onnxruntime
from mlserver import MLModel, MLServer, ModelSettings, Settings  # type: ignore[import-not-found]
from mlserver.codecs import NumpyCodec, StringCodec  # type: ignore[import-not-found]
from mlserver.types import InferenceRequest, InferenceResponse  # type: ignore[import-not-found]
from mlserver.utils import install_uvloop_event_loop  # type: ignore[import-not-found]


class Bench(MLModel):  # type: ignore[misc]
    """Reads by its own codecs."""

    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options)
        self.names = [output.name for output in self.session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feed = {}
        for tensor in payload.inputs:
            if tensor.datatype == "BYTES":
                texts = self.decode(tensor, default_codec=StringCodec)
                feed[tensor.name] = np.array(texts, dtype=object).reshape(tensor.shape)
            else:
                feed[tensor.name] = self.decode(tensor, default_codec=NumpyCodec)
        values = self.session.run(self.names, feed)
        outputs = [NumpyCodec.encode_output(*pair) for pair in zip(self.names, values, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)


settings = Settings(
    debug=False,
    parallel_workers=0,
    host="127.0.0.1",
    http_port=int(sys.argv[2]),
    grpc_port=0,
    metrics_port=0,
)
install_uvloop_event_loop()  # as its command line does


async def serve() -> None:
    await MLServer(settings).start([ModelSettings(name="bench", implementation=Bench)])


asyncio.run(serve())
