"""The default calls of other projects' clients, each with the real library, against a real server of two models.

Triton's client lives in the tests' own environment. KServe's and MLServer's need versions of other libraries: each is
installed by uv into an environment of its own in ``.cache``, once, and asked there by a script.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio

from lepton_airflow.contract import split_pin
from lepton_airflow.stages.deploy_model import DeployModel
from lepton_airflow.testing import LocalEndpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CACHE = Path(__file__).parents[2] / ".cache"


@pytest.fixture(scope="module")
def server(shelf: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    """A server of two models."""
    folder = tmp_path_factory.mktemp("two")
    run = replace(shelf.run, run_key="two", workdir=folder)
    options = ("--poll-s", "0.1")
    with LocalEndpoint("rebe", shelf.run.store.root, folder, options=options, more=("zucker",)) as server:
        for endpoint, model in (("rebe", shelf.wine), ("zucker", shelf.diabetes)):
            stage = DeployModel(endpoint=endpoint, model=model.uri, timeout_s=60, max_latency_ms=5000)
            assert stage.run(run).values["deployed"]
        yield server


@pytest.fixture
def client(server: LocalEndpoint) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


def columns(model: Any, rows: pd.DataFrame) -> dict[str, tuple[str, np.ndarray]]:
    """Datatype and values of each input, as a client of Python holds them."""
    return {
        f.name: ("BYTES", rows[f.name].fillna("").to_numpy(dtype=object).reshape(-1, 1))
        if f.kind == "category"
        else ("FP64", rows[f.name].to_numpy(dtype=np.float64).reshape(-1, 1))
        for f in model.package.card.features
    }


def inputs(model: Any, rows: pd.DataFrame, **how: bool) -> list[Any]:
    found = []
    for name, (datatype, values) in columns(model, rows).items():
        tensor = triton.InferInput(name, list(values.shape), datatype)
        tensor.set_data_from_numpy(values, **how)
        found.append(tensor)
    return found


def many(model: Any) -> pd.DataFrame:
    return pd.concat([model.rows] * 30, ignore_index=True)


def answers(model: Any, rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """What the package itself answers."""
    predicted = model.package.predict(rows)
    if model.package.card.task == "regression":
        return {"prediction": predicted.reshape(-1, 1)}
    return {"probabilities": predicted, "label": predicted.argmax(axis=1)}


def same(model: Any, rows: pd.DataFrame, found: Callable[[str], Any], names: tuple[str, ...] = ()) -> None:
    """Compare answers bit by bit."""
    wanted = answers(model, rows)
    for name in names or wanted:
        values = np.asarray(found(name))
        np.testing.assert_array_equal(values.reshape(wanted[name].shape), wanted[name], strict=False)


MODELS = [("rebe", "wine"), ("zucker", "diabetes")]


# -- Triton ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("endpoint", "name"), MODELS)
def test_triton_asks_and_is_answered_in_binary(client: Any, shelf: Any, endpoint: str, name: str) -> None:
    model = getattr(shelf, name)
    result = client.infer(endpoint, inputs(model, model.rows), request_id="7")
    same(model, model.rows, result.as_numpy)
    assert result.get_response()["id"] == "7"
    tensor = result.get_output(next(iter(answers(model, model.rows))))
    assert tensor["parameters"]["binary_data_size"] > 0
    version = (split_pin(model.uri)[1] or "")[:12]
    assert result.get_response()["model_version"] == version
    same(model, model.rows, client.infer(endpoint, inputs(model, model.rows), version).as_numpy)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_triton_asks_for_outputs(client: Any, shelf: Any, binary_in: bool, binary_out: bool) -> None:
    model = shelf.wine
    wanted = [
        triton.InferRequestedOutput("label", binary_data=not binary_out),
        triton.InferRequestedOutput("probabilities", binary_data=binary_out),
    ]
    sent = inputs(model, model.rows, binary_data=binary_in)
    result = client.infer("rebe", sent, outputs=wanted)
    assert [o["name"] for o in result.get_response()["outputs"]] == ["label", "probabilities"]
    same(model, model.rows, result.as_numpy)
    result = client.infer("rebe", sent, outputs=[triton.InferRequestedOutput("label")])
    assert result.as_numpy("probabilities") is None
    same(model, model.rows, result.as_numpy, ("label",))


@pytest.mark.parametrize("datatype", ["FP32", "INT64"])
def test_triton_sends_other_datatypes(client: Any, shelf: Any, datatype: str) -> None:
    model, rows = shelf.wine, shelf.wine.rows.dropna().copy()
    numbers = [f.name for f in model.package.card.features if f.kind == "number"]
    rows[numbers] = rows[numbers].astype(np.float32 if datatype == "FP32" else np.int64)
    sent = []
    for name, (_, values) in columns(model, rows).items():
        kind = datatype if name in numbers else "BYTES"
        sent.append(triton.InferInput(name, list(values.shape), kind))
        sent[-1].set_data_from_numpy(values.astype({"FP32": np.float32, "INT64": np.int64}.get(kind, object)))
    same(model, rows, client.infer("rebe", sent).as_numpy)


@pytest.mark.parametrize("there", [None, "gzip", "deflate"])
@pytest.mark.parametrize("back", [None, "gzip", "deflate"])
def test_triton_compresses(client: Any, shelf: Any, there: str | None, back: str | None) -> None:
    model = shelf.wine
    for rows in (model.rows[:1], many(model)):
        result = client.infer(
            "rebe",
            inputs(model, rows),
            request_compression_algorithm=there,
            response_compression_algorithm=back,
        )
        same(model, rows, result.as_numpy)


def test_an_answer_is_compressed_where_that_pays_and_the_client_accepts_it(
    server: LocalEndpoint, shelf: Any
) -> None:
    body, length = triton.InferenceServerClient.generate_request_body(inputs(shelf.wine, many(shelf.wine)))
    found = {}
    for accepted in (
        "",
        "br",
        "GZip;Q=0.5, deflate;q=0.4",
        "gzip;q=0, deflate",
        "gzip;q=0",
        "identity, *;q=0",
    ):
        request = urllib.request.Request(
            f"{server.url}/v2/models/rebe/infer",
            body,
            {"Accept-Encoding": accepted, "Inference-Header-Content-Length": str(length)},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found[accepted] = answer.headers["Content-Encoding"]
    assert list(found.values()) == [None, None, "gzip", "deflate", None, None]


def test_triton_waits_and_asks_side_by_side(client: Any, server: LocalEndpoint, shelf: Any) -> None:
    model = shelf.wine
    same(model, model.rows, client.async_infer("rebe", inputs(model, model.rows)).get_result().as_numpy)

    async def ask() -> list[Any]:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as several:
            assert await several.is_model_ready("rebe")
            return await asyncio.gather(
                *(several.infer("rebe", inputs(model, model.rows[n:])) for n in range(8))
            )

    for n, result in enumerate(asyncio.run(ask())):
        same(model, model.rows[n:], result.as_numpy)


def test_triton_looks_at_server_and_models(client: Any, shelf: Any) -> None:
    version = (split_pin(shelf.wine.uri)[1] or "")[:12]
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("rebe")
    assert client.is_model_ready("zucker")
    assert client.is_model_ready("rebe", version)
    assert not client.is_model_ready("rebe", "9")
    assert not client.is_model_ready("wine")
    assert client.get_server_metadata()["extensions"] == [
        "binary_tensor_data",
        "model_repository",
        "model_configuration",
        "statistics",
    ]
    described = client.get_model_metadata("rebe")
    assert (described["name"], described["versions"]) == ("rebe", [version])
    assert client.get_model_metadata("rebe", version) == described
    index = client.get_model_repository_index()
    assert [(m["name"], m["state"]) for m in index] == [("rebe", "READY"), ("zucker", "READY")]
    config = client.get_model_config("rebe")
    assert client.get_model_config("rebe", version) == config
    assert (config["name"], config["backend"]) == ("rebe", "onnxruntime")
    assert {t["name"]: (t["data_type"], t["dims"]) for t in config["input"]} == {
        f.name: ("TYPE_STRING" if f.kind == "category" else "TYPE_FP32", [1])
        for f in shelf.wine.package.card.features
    }
    assert config["output"] == [
        {"name": "probabilities", "data_type": "TYPE_FP32", "dims": [3]},
        {"name": "label", "data_type": "TYPE_INT64", "dims": [1], "reshape": {"shape": []}},
    ]
    with pytest.raises(triton.InferenceServerException, match="no model 'wine' here"):
        client.get_model_config("wine")


def test_triton_reads_what_was_counted(client: Any, shelf: Any) -> None:
    def counted() -> dict[str, Any]:
        (found,) = client.get_inference_statistics("rebe")["model_stats"]
        return found

    before = counted()
    client.infer("rebe", inputs(shelf.wine, shelf.wine.rows[:5]))
    with pytest.raises(triton.InferenceServerException, match="missing"):
        client.infer("rebe", inputs(shelf.wine, shelf.wine.rows[:5])[1:])
    after = counted()
    assert after["version"] == (split_pin(shelf.wine.uri)[1] or "")[:12]
    assert after["inference_count"] - before["inference_count"] == 5
    assert after["execution_count"] - before["execution_count"] == 1
    stats = [counts["inference_stats"] for counts in (before, after)]
    assert [stats[1][k]["count"] - stats[0][k]["count"] for k in ("success", "fail")] == [1, 1]
    assert 0 < stats[1]["success"]["ns"] - stats[0]["success"]["ns"] < 60e9
    both = client.get_inference_statistics()["model_stats"]
    assert [m["name"] for m in both] == ["rebe", "zucker"]
    assert client.get_inference_statistics("rebe", after["version"])["model_stats"] == both[:1]


def test_what_is_not_offered_is_not_there(client: Any) -> None:
    for call in (lambda: client.load_model("rebe"), client.get_trace_settings, client.get_log_settings):
        with pytest.raises(triton.InferenceServerException, match="there is nothing at /v2/"):
            call()


def test_an_index_may_be_asked_for_what_is_ready(server: LocalEndpoint) -> None:
    def ask(body: bytes) -> list[str]:
        request = urllib.request.Request(f"{server.url}/v2/repository/index", body, method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [model["name"] for model in json.load(answer)]

    for body in (b"", b"{}", b'{"ready":true}', b'{"ready": null}'):
        assert ask(body) == ["rebe", "zucker"]
    for body in (b"[]", b"\xff", b'{"ready": 1}'):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(body)


# -- clients that need an environment of their own ---------------------------------------------------------------------


def environment(*requirements: str) -> Path:
    """An environment with these packages and nothing of ours, made once."""
    key = hashlib.sha256(f"{requirements}{sys.version}".encode()).hexdigest()[:12]
    home = CACHE / f"client-{key}"
    CACHE.mkdir(exist_ok=True)
    uv = str(Path(sys.executable).with_name("uv"))
    with (CACHE / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / ".complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            call([uv, "venv", "--python", sys.executable, str(home)])
            call(
                [
                    uv,
                    "pip",
                    "install",
                    "--system-certs",
                    "--python",
                    str(home / "bin" / "python"),
                    *requirements,
                ]
            )
            (home / ".complete").touch()
    return home


def call(command: list[str]) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE", "VIRTUAL_ENV"))}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=kept, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)[:300]} failed:\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


def asked(home: Path, script: str, server: LocalEndpoint, model: Any, rows: pd.DataFrame) -> dict[str, Any]:
    """What a script prints last, that was given the server, and the columns, where a missing value is None."""
    given = {
        f.name: [None if pd.isna(value) else value for value in rows[f.name]]
        for f in model.package.card.features
    }
    python = str(home / "bin" / "python")
    return json.loads(call([python, "-c", script, server.url, json.dumps(given)]).splitlines()[-1])


KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

url, columns = sys.argv[1], json.loads(sys.argv[2])

def inputs(binary):
    for name, values in columns.items():
        text = any(isinstance(v, str) for v in values)
        array = np.array([v or "" for v in values], dtype=object) if text else np.array(values, dtype=np.float64)
        tensor = InferInput(name, [len(values), 1], "BYTES" if text else "FP64")
        tensor.set_data_from_numpy(array.reshape(-1, 1), **({} if binary is None else {"binary_data": binary}))
        yield tensor

async def main():
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    found = {
        "live": await client.is_server_live(url),
        "ready": [await client.is_server_ready(url), await client.is_model_ready(url, "rebe"),
                  await client.is_model_ready(url, "nobody")],
        "answers": [],
    }
    plain = [InferInput(name, [len(values), 1], "BYTES" if any(isinstance(v, str) for v in values) else "FP64", data=values)
             for name, values in columns.items()]
    ways = [(plain, {})]
    for binary in (None, False):
        ways += [(list(inputs(binary)), {}), (list(inputs(binary)), {"parameters": {"binary_data_output": True}}),
                 (list(inputs(binary)), {"request_outputs": [RequestedOutput("label", {"binary_data": True}),
                                                             RequestedOutput("probabilities")]})]
    for tensors, how in ways:
        response = await client.infer(url, InferRequest(model_name="rebe", infer_inputs=tensors, **how), model_name="rebe")
        found["answers"].append({o.name: o.as_numpy().tolist() for o in response.outputs})
    await client.close()
    print(json.dumps(found))

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.network
def test_kserve_asks(server: LocalEndpoint, shelf: Any) -> None:
    found = asked(environment("kserve==0.21.0"), KSERVE, server, shelf.wine, shelf.wine.rows)
    assert found["live"] is True
    assert found["ready"] == [True, True, False]
    assert len(found["answers"]) == 7
    for answer in found["answers"]:
        same(shelf.wine, shelf.wine.rows, answer.get)


MLSERVER = """
import json, subprocess, sys, tempfile, urllib.request
from pathlib import Path
import numpy as np
import pandas as pd
from mlserver.codecs import NumpyCodec, PandasCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse, MetadataServerResponse, RequestOutput

url, columns = sys.argv[1], json.loads(sys.argv[2])
frame = pd.DataFrame(columns)
whole = frame.fillna({name: "" for name in frame if frame[name].dtype == object})
mixed = pd.concat([whole, whole[:1].assign(shade=7)])

def post(body):
    request = urllib.request.Request(f"{url}/v2/models/rebe/infer", body.encode(), {"Content-Type": "application/json"})
    return InferenceResponse.model_validate_json(urllib.request.urlopen(request).read())

def read(response):
    return {o.name: NumpyCodec.decode_output(o).tolist() for o in response.outputs}

by_column = InferenceRequest(
    inputs=[StringCodec.encode_input(name, whole[name].tolist(), use_bytes=False) if whole[name].dtype == object
            else NumpyCodec.encode_input(name, whole[name].to_numpy()) for name in whole],
    outputs=[RequestOutput(name="label"), RequestOutput(name="probabilities")],
)
answers = [
    read(post(PandasCodec.encode_request(whole).model_dump_json())),
    read(post(json.dumps(PandasCodec.encode_request(whole, use_bytes=False).model_dump()))),
    read(post(PandasCodec.encode_request(mixed, use_bytes=False).model_dump_json())),  # as texts of JSON
    read(post(json.dumps(PandasCodec.encode_request(whole, use_bytes=False).dict()))),  # null for what is not set
    read(post(by_column.model_dump_json())),
    read(post(json.dumps(by_column.model_dump(exclude_none=True)))),
]
meta = MetadataModelResponse.model_validate_json(urllib.request.urlopen(f"{url}/v2/models/rebe").read())
server = MetadataServerResponse.model_validate_json(urllib.request.urlopen(f"{url}/v2").read())

def batch(*options):  # the client itself
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        asked.write_text("".join(PandasCodec.encode_request(whole[n : n + 10], use_bytes=False).model_dump_json() + "\\n"
                                 for n in range(0, len(whole), 10)))
        command = [Path(sys.executable).with_name("mlserver"), "infer", "-u", url.removeprefix("http://"), "-m", "rebe",
                   "-i", asked, "-o", told, *options]
        subprocess.run(command, check=True, capture_output=True)
        lines = sorted(map(json.loads, told.read_text().splitlines()), key=lambda line: line["parameters"]["batch_index"])
    parts = [read(InferenceResponse.model_validate(line)) for line in lines]
    return {name: sum((part[name] for part in parts), []) for name in parts[0]}

answers += [batch(), batch("-b"), batch("-b", "--batch-size", "4")]
print(json.dumps({"answers": answers, "name": meta.name, "inputs": [t.name for t in meta.inputs], "server": server.name}))
"""


@pytest.mark.slow
@pytest.mark.network
def test_mlserver_asks(server: LocalEndpoint, shelf: Any) -> None:
    # Under pandas 3 its own codec knows no column of text.
    home = environment("mlserver==1.7.1", "pandas<3")
    found = asked(home, MLSERVER, server, shelf.wine, shelf.wine.rows)
    assert (found["name"], found["server"]) == ("rebe", "lepton_airflow")
    assert found["inputs"] == [f.name for f in shelf.wine.package.card.features]
    assert len(found["answers"]) == 9
    for place, answer in enumerate(found["answers"]):
        rows = shelf.wine.rows
        if place == 2:
            rows = pd.concat([rows, rows[:1].assign(shade="7")], ignore_index=True)
        same(shelf.wine, rows, answer.get)
