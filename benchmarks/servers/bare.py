# ruff: noqa: TID253 - a script in an environment of its own
"""What the server is compared with: FastAPI, orjson and ONNX Runtime, written by hand for one model, with no checks."""

import sys

import numpy as np
import onnxruntime
import orjson  # type: ignore[import-not-found]
import uvicorn
from fastapi import FastAPI, Request, Response

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options)
names = [output.name for output in session.get_outputs()]
app = FastAPI()


@app.get("/v2/health/ready")
def ready() -> dict[str, bool]:
    return {"ready": True}


@app.post("/v2/models/{name}/infer")
async def infer(name: str, request: Request) -> Response:
    asked = orjson.loads(await request.body())
    feed = {}
    for tensor in asked["inputs"]:
        dtype = object if tensor["datatype"] == "BYTES" else np.float32
        feed[tensor["name"]] = np.array(tensor["data"], dtype=dtype).reshape(tensor["shape"])
    outputs = [
        {"name": output, "shape": values.shape, "data": values.ravel()}
        for output, values in zip(names, session.run(names, feed), strict=True)
    ]
    content = orjson.dumps({"model_name": name, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, media_type="application/json")


uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)
