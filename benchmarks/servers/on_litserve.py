# ruff: noqa: TID253 - a script in an environment of its own
"""The model in LitServe, in JSON: a column is a list of values, an answer has a list for each output.

LitServe reads requests in one process and computes in another one, at least: two processes. ``fast_queue``, which its documentation
recommends for more than 100 requests a second, was slower here and is left off; lines in the log for each request are off.
"""

import sys
from typing import Any

import litserve  # type: ignore[import-not-found]
import numpy as np
import onnxruntime


class Bench(litserve.LitAPI):  # type: ignore[misc]
    """Reads columns, writes outputs."""

    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options)
        self.dtypes = {i.name: np.float32 if "float" in i.type else object for i in self.session.get_inputs()}
        self.names = [output.name for output in self.session.get_outputs()]

    def decode_request(self, request: dict[str, list[Any]]) -> dict[str, Any]:
        return {
            name: np.array(values, dtype=self.dtypes[name]).reshape(-1, 1) for name, values in request.items()
        }

    def predict(self, feed: dict[str, Any]) -> list[Any]:
        values: list[Any] = self.session.run(self.names, feed)
        return values

    def encode_response(self, values: list[Any]) -> dict[str, Any]:
        return {name: value.tolist() for name, value in zip(self.names, values, strict=True)}


if __name__ == "__main__":  # its workers import this file
    server = litserve.LitServer(Bench(), accelerator="cpu", workers_per_device=1)
    server.run(
        "127.0.0.1", int(sys.argv[2]), num_api_servers=1, log_level="warning", generate_client_file=False
    )
