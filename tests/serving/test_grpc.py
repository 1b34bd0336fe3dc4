"""The gRPC side of the real server, called by Triton's client: it answers and refuses what REST answers and refuses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import grpc
import numpy as np
import pandas as pd
import psutil
import pytest
from tritonclient import grpc as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from benchmarks.servers.attacks import calls_unread
from lepton_airflow.contract import split_pin
from lepton_airflow.errors import BadConfiguration
from lepton_airflow.serving.grpc import Service
from lepton_airflow.serving.http import ConnectionLimits, Request, Response
from lepton_airflow.serving.messages import CLASSES
from lepton_airflow.serving.protocol import RequestError
from lepton_airflow.serving.supervisor import Settings, serve
from lepton_airflow.serving.worker import Limits
from lepton_airflow.stages.deploy_model import DeployModel
from lepton_airflow.store import Store
from lepton_airflow.testing import LocalEndpoint, processes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from lepton_airflow.stages import RunInfo


class Served:
    """A server with a gRPC port, and a client of it."""

    def __init__(self, name: str, store: str, home: Path, *options: str) -> None:
        self.port = processes.free_port()
        self.address = f"127.0.0.1:{self.port}"
        more = ("--poll-s", "0.1", "--grpc-port", str(self.port), *options)
        self.http = LocalEndpoint(name, store, home, options=more)

    def __enter__(self) -> Self:
        self.http.start()
        self.client = triton.InferenceServerClient(self.address)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.http.stop()

    def deploy(self, run: RunInfo, uri: str) -> str:
        result = DeployModel(endpoint=self.http.endpoint, model=uri, timeout_s=60, max_latency_ms=5000).run(
            run
        )
        assert result.values["deployed"]
        return str(result.values["version"])

    def call(self, method: str, request: Any, answer: Any = None, **how: Any) -> Any:
        """Any method, with messages of the client's own classes."""
        with grpc.insecure_channel(self.address) as channel:
            call = channel.unary_unary(
                f"/inference.GRPCInferenceService/{method}",
                lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
                answer.FromString if answer else None,
            )
            return call(request, timeout=30, **how)

    def infer(self, request: Any) -> Any:
        return self.call("ModelInfer", request, pb.ModelInferResponse)

    def refusal(self, request: Any, method: str = "ModelInfer") -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as refused:
            self.call(method, request)
        return refused.value.code().name, refused.value.details()


@pytest.fixture(scope="module")
def wine(shelf: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("wine")
    limits = ("--max-rows", "200", "--max-bytes", "100000")
    with Served("wine", shelf.run.store.root, folder, *limits) as served:
        served.deploy(replace(shelf.run, run_key="wine", workdir=folder), shelf.wine.uri)
        yield served


def columns(rows: pd.DataFrame, package: Any) -> dict[str, np.ndarray]:
    """The inputs as clients hold them: float64, and bytes."""
    return {
        f.name: rows[f.name].fillna("").to_numpy(object)
        if f.kind == "category"
        else rows[f.name].to_numpy(np.float64)
        for f in package.card.features
    }


def given(found: dict[str, np.ndarray]) -> list[triton.InferInput]:
    inputs = []
    for name, values in found.items():
        datatype = "BYTES" if values.dtype == object else "FP64"
        inputs.append(triton.InferInput(name, [len(values), 1], datatype))
        inputs[-1].set_data_from_numpy(values.reshape(-1, 1))
    return inputs


def typed(found: dict[str, np.ndarray], **more: Any) -> Any:
    """The same as a message with typed contents."""
    request = pb.ModelInferRequest(model_name="wine", **more)
    for name, values in found.items():
        tensor = request.inputs.add(name=name, shape=[len(values), 1])
        if values.dtype == object:
            tensor.datatype = "BYTES"
            tensor.contents.bytes_contents.extend(v.encode() for v in values)
        else:
            tensor.datatype = "FP64"
            tensor.contents.fp64_contents.extend(values)
    return request


def rest(served: Served, found: dict[str, np.ndarray]) -> dict[str, Any]:
    inputs = [
        {"name": name, "datatype": "BYTES" if v.dtype == object else "FP64", "shape": [len(v)], "data": v.tolist()}
        for name, v in found.items()
    ]  # fmt: skip
    answer = served.http.infer({"inputs": inputs})
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in answer["outputs"]}


def test_the_messages_have_the_numbers_and_types_of_the_protocol() -> None:
    def fields(descriptor: Any) -> set[tuple[Any, ...]]:
        return {
            (f.number, f.type, f.is_repeated, f.name, f.message_type and f.message_type.name)
            for f in descriptor.fields
        }

    theirs = {m.name: m for m in pb.DESCRIPTOR.message_types_by_name.values()}
    theirs |= {n.name: n for m in list(theirs.values()) for n in m.nested_types}
    for name, ours in CLASSES.items():
        assert fields(ours.DESCRIPTOR) == fields(theirs[name]), name


def test_answers_are_those_of_rest_to_the_bit_raw_and_typed(wine: Served, shelf: Any) -> None:
    found = columns(shelf.wine.rows, shelf.wine.package)
    wanted = rest(wine, found)
    answer = wine.client.infer("wine", given(found), request_id="a", parameters={"x": 1, "y": 0.5, "z": True})
    head = answer.get_response(as_json=True)
    assert (head["id"], head["model_name"]) == ("a", "wine")
    assert head["parameters"] == {
        "x": {"int64_param": "1"},
        "y": {"double_param": 0.5},
        "z": {"bool_param": True},
    }
    for name, values in wanted.items():
        np.testing.assert_array_equal(answer.as_numpy(name).astype(np.float64), values)
    message = wine.infer(typed(found))
    assert not message.raw_output_contents
    probabilities, label = message.outputs
    assert (probabilities.name, probabilities.datatype, list(probabilities.shape)) == (
        "probabilities",
        "FP32",
        [len(shelf.wine.rows), 3],
    )
    np.testing.assert_array_equal(
        np.reshape(probabilities.contents.fp32_contents, probabilities.shape), wanted["probabilities"]
    )
    np.testing.assert_array_equal(label.contents.int64_contents, wanted["label"])


def test_outputs_can_be_chosen_and_requests_compressed(wine: Served, shelf: Any) -> None:
    found = columns(shelf.wine.rows[:3], shelf.wine.package)
    for packed in (None, "gzip", "deflate"):
        answer = wine.client.infer(
            "wine", given(found), outputs=[triton.InferRequestedOutput("label")], compression_algorithm=packed
        )
        assert [o.name for o in answer.get_response().outputs] == ["label"]
        np.testing.assert_array_equal(answer.as_numpy("label"), rest(wine, found)["label"])


@pytest.mark.parametrize(
    ("datatype", "field"),
    [
        *((f"INT{bits}", "int_contents") for bits in (8, 16, 32)),
        *((f"UINT{bits}", "uint_contents") for bits in (8, 16, 32)),
        *(("INT64", "int64_contents"), ("UINT64", "uint64_contents"), ("BOOL", "bool_contents")),
        *(("FP32", "fp32_contents"), ("FP64", "fp64_contents")),
    ],
)
def test_a_value_means_the_same_in_each_datatype(wine: Served, shelf: Any, datatype: str, field: str) -> None:
    found = columns(shelf.wine.rows[:2], shelf.wine.package)
    number = next(name for name, values in found.items() if values.dtype != object)
    found[number] = np.array([1.0, 0.0])
    wanted = rest(wine, found)["probabilities"]
    request = typed(found)
    tensor = next(t for t in request.inputs if t.name == number)
    tensor.ClearField("contents")
    tensor.datatype = datatype
    getattr(tensor.contents, field).extend([1, 0])
    contents = wine.infer(request).outputs[0].contents.fp32_contents
    np.testing.assert_array_equal(np.reshape(contents, wanted.shape), wanted)


def test_the_protocol_describes_server_and_model(wine: Served, shelf: Any) -> None:
    version = (split_pin(shelf.wine.uri)[1] or "")[:12]
    client = wine.client
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("wine")
    assert client.is_model_ready("wine", version)
    assert client.get_server_metadata().name == "lepton_airflow"
    described = client.get_model_metadata("wine", as_json=True)
    assert described["versions"] == [version]
    assert {"name": "größe (mm)", "datatype": "FP32", "shape": ["-1", "1"]} in described["inputs"]
    assert described["outputs"] == [
        {"name": "probabilities", "datatype": "FP32", "shape": ["-1", "3"]},
        {"name": "label", "datatype": "INT64", "shape": ["-1"]},
    ]
    (model,) = client.get_model_repository_index().models
    assert (model.name, model.version, model.state) == ("wine", version, "READY")
    with pytest.raises(InferenceServerException, match=r"no model 'vine' here; did you mean 'wine'\?"):
        client.is_model_ready("vine")


def changed(request: Any, **fields: Any) -> Any:
    """The request with other fields of its first input, a number."""
    for name, value in fields.items():
        if isinstance(value, list):
            request.inputs[0].ClearField(name)
            getattr(request.inputs[0], name).extend(value)
        else:
            setattr(request.inputs[0], name, value)
    return request


def test_what_is_wrong_is_refused_in_the_sentence_of_rest_and_counted(wine: Served, shelf: Any) -> None:
    found = columns(shelf.wine.rows[:1], shelf.wine.package)
    number = next(iter(found))
    assert found[number].dtype != object
    big = columns(pd.concat([shelf.wine.rows] * 2), shelf.wine.package)

    def one() -> Any:
        return typed(found)

    def contents(**fields: list[Any]) -> Any:
        request = one()
        request.inputs[0].contents.Clear()
        for name, values in fields.items():
            getattr(request.inputs[0].contents, name).extend(values)
        return request

    def raw(*blobs: bytes) -> Any:
        request = one()
        for tensor in request.inputs:
            tensor.ClearField("contents")
        request.raw_input_contents.extend(blobs)
        return request

    category = next(t for t in one().inputs if t.datatype == "BYTES").name
    not_text = one()
    next(t for t in not_text.inputs if t.name == category).contents.bytes_contents[0] = b"\xff"
    twice = one()
    twice.inputs.append(twice.inputs[0])
    without = one()
    del without.inputs[1:]
    many = one()
    many.inputs.extend([pb.ModelInferRequest.InferInputTensor(name="x")] * 3000)
    both = raw(*[b"\0" * 8] * len(found))
    both.inputs[0].contents.fp64_contents.append(1)
    told = one()
    told.parameters["a"].SetInParent()
    wrong_nan = one()
    wrong_nan.parameters["a"].double_param = float("nan")
    asked = one()
    asked.outputs.add(name="labels")
    classes = one()
    classes.outputs.add(name="label").parameters["classification"].int64_param = 2
    bad = "INVALID_ARGUMENT"
    cases: list[tuple[Any, str, str]] = [
        (b"\xff\xff", bad, "does not fit the protocol: it is no ModelInferRequest"),
        (pb.ModelInferRequest(model_name="wine"), bad, "Expected array of length >= 1 - at $.inputs"),
        (many, "RESOURCE_EXHAUSTED", "inputs, the limit of gRPC is 2000: ask by REST"),
        (typed(found, model_version="9"), "NOT_FOUND", "version '9' of 'wine' is not in service"),
        (typed(big), "RESOURCE_EXHAUSTED", "356 rows, the limit is 200"),
        (typed(found, id="x" * 1001), bad, "length <= 1000 - at $.id"),
        (changed(one(), name="huor"), bad, "the model has no input 'huor'"),
        (changed(one(), name="x" * 5000), bad, "length <= 1000 - at $.inputs[0].name"),
        (twice, bad, f"inputs names {number!r} twice"),
        (without, bad, "missing: send a tensor of every feature"),
        (changed(one(), datatype="FP31"), bad, "datatype 'FP31' is unknown; did you mean 'FP32'?"),
        (changed(one(), datatype="FP16"), bad, "no field for FP16: send raw_input_contents"),
        (changed(one(), datatype="INT64"), bad, "values of INT64 are expected in int64_contents, not in fp64_contents"),
        (changed(one(), shape=[1, 2]), bad, "shape [1, 2] should be [N, 1] or [N]"),
        (changed(one(), shape=[]), bad, "shape [] should be [N, 1] or [N]"),
        (changed(one(), shape=[-1]), bad, "Expected int >= 0 - at $.inputs[0].shape[0]"),
        (changed(one(), shape=[0, 1]), bad, "has no rows"),
        (changed(one(), shape=[201]), "RESOURCE_EXHAUSTED", "201 rows, the limit is 200"),
        (changed(one(), shape=[2]), bad, "has 1 values, its shape [2] says 2"),
        (contents(fp64_contents=[1, 2]), bad, "has 2 values, its shape [1, 1] says 1"),
        (contents(fp64_contents=[1e39]), bad, "row 0 is infinite or beyond float32"),
        (contents(fp64_contents=[float("inf")]), bad, "row 0 is infinite"),
        (changed(contents(uint_contents=[300]), datatype="UINT8"), bad, "row 0 is no UINT8 such as 7: Expected int <= 255"),
        (changed(contents(int_contents=[-129]), datatype="INT8"), bad, "row 0 is no INT8 such as 7: Expected int >= -128"),
        (changed(contents(bytes_contents=[b"a"]), datatype="BYTES"), bad, "is a number: expected one of"),
        (not_text, bad, f"input {category!r}: row 0 is text that is no UTF-8"),
        (raw(b"12"), bad, f"raw_input_contents has 1 tensors, inputs has {len(found)}"),
        (raw(*[b"12"] * len(found)), bad, "its binary data has 2 bytes, 1 values of FP64 have 8"),
        (both, bad, "both contents and raw_input_contents"),
        (told, bad, "parameters of the request: expected an object of strings, numbers and booleans"),
        (wrong_nan, bad, "parameters of the request: expected"),
        (asked, bad, "no output 'labels'; did you mean 'label'?"),
        (classes, bad, "classification extension, which is not offered"),
        (b"\0" * 100_001, "RESOURCE_EXHAUSTED", "larger than max (100001 vs. 100000)"),
    ]  # fmt: skip
    before = requests(wine)
    for request, code, words in cases:
        found_code, said = wine.refusal(request)
        assert (found_code, words in said or said) == (code, True)
        assert len(said) < 300
    after = requests(wine)
    counted = Counter(code for _, code, _ in cases)
    assert {k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0)} == {
        "400": counted[bad],
        "404": counted["NOT_FOUND"],
        "413": counted["RESOURCE_EXHAUSTED"],
    }
    assert wine.client.infer("wine", given(found))


def requests(served: Served) -> dict[str, float]:
    import urllib.request

    with urllib.request.urlopen(f"{served.http.url}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    return {
        line.partition('status="')[2].partition('"')[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("lepton_serve_requests_total")
    }


def test_other_methods_are_refused_by_name(wine: Served) -> None:
    for method, words in (
        ("ModelStreamInfer", "ModelStreamInfer is not offered: send each request by ModelInfer."),
        ("ModelInfr", "no method 'ModelInfr' here; did you mean 'ModelInfer'?"),
        ("ModelStatistics", "no method 'ModelStatistics' here"),
    ):
        code, said = wine.refusal(b"", method)
        assert code == "UNIMPLEMENTED"
        assert words in said


def test_a_model_without_a_version_is_not_ready_and_says_when_to_ask_again(
    shelf: Any, tmp_path: Path
) -> None:
    with Served("idle", shelf.run.store.root, tmp_path) as served:
        assert served.client.is_server_live()
        assert not served.client.is_server_ready()
        assert not served.client.is_model_ready("idle")
        with pytest.raises(grpc.RpcError) as refused:
            served.infer(pb.ModelInferRequest(model_name="idle"))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "no version in service yet" in refused.value.details()
        assert ("grpc-retry-pushback-ms", "1000") in [tuple(m) for m in refused.value.trailing_metadata()]


def _until(condition: Callable[[], object], wait_s: float = 60) -> None:
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_call_fails_while_versions_change_in_two_workers(
    shelf: Any, run_at: RunInfo, tmp_path: Path
) -> None:
    """Four clients call without a pause; each answer is that of the version it names, and none is older than one before it."""
    models = {(split_pin(m.uri)[1] or "")[:12]: m for m in (shelf.wine, shelf.other_wine)}
    rows = shelf.wine.rows[:20]
    wanted = {version: model.package.predict(rows) for version, model in models.items()}
    stop = threading.Event()
    seen: Counter[str] = Counter()
    wrong: list[object] = []

    def ask(served: Served) -> None:
        # A connection of its own, of which the kernel gives some to each worker.
        with triton.InferenceServerClient(
            served.address, channel_args=[("grpc.use_local_subchannel_pool", 1)]
        ) as client:
            inputs = given(columns(rows, shelf.wine.package))
            while not stop.is_set():
                try:
                    answer = client.infer("swap-grpc", inputs)
                    version = answer.get_response().model_version
                    np.testing.assert_allclose(answer.as_numpy("probabilities"), wanted[version], atol=1e-6)
                    seen[version] += 1
                except (InferenceServerException, AssertionError, KeyError) as error:
                    wrong.append(error)

    with Served("swap-grpc", shelf.run.store.root, tmp_path, "--workers", "2") as served:
        served.deploy(run_at, shelf.wine.uri)
        clients = [threading.Thread(target=ask, args=(served,)) for _ in range(4)]
        for thread in clients:
            thread.start()
        try:
            for number, model in enumerate([shelf.other_wine, shelf.wine] * 3):
                version = served.deploy(replace(run_at, run_key=f"{run_at.run_key}-{number}"), model.uri)
                before = seen[version]
                _until(lambda v=version, n=before: seen[v] > n + 20 or wrong)  # type: ignore[misc]
        finally:
            stop.set()
            for thread in clients:
                thread.join()
    assert wrong == []


def test_a_worker_that_dies_takes_no_connections_with_it(shelf: Any, run_at: RunInfo, tmp_path: Path) -> None:
    found = columns(shelf.wine.rows[:1], shelf.wine.package)
    with Served("dies", shelf.run.store.root, tmp_path, "--workers", "2") as served:
        served.deploy(run_at, shelf.wine.uri)
        pid = processes.pid("endpoint-dies", tmp_path)
        workers = [
            p for p in psutil.Process(pid).children(recursive=True)
            if any(c.laddr.port == served.port for c in p.net_connections() if c.status == "LISTEN")
        ]  # fmt: skip
        assert len(workers) == 2
        workers[0].kill()
        psutil.wait_procs(workers[:1], timeout=10)
        for _ in range(40):
            with triton.InferenceServerClient(
                served.address, channel_args=[("grpc.use_local_subchannel_pool", 1)]
            ) as client:
                assert client.infer("dies", given(found)).as_numpy("label").shape == (1,)


def test_sigterm_answers_what_was_admitted(shelf: Any, run_at: RunInfo, tmp_path: Path) -> None:
    """A call whose message is on its way when the server is told to end."""
    sending, ended = threading.Event(), threading.Event()
    request = typed(columns(shelf.wine.rows[:1], shelf.wine.package))
    request.model_name = "drain"

    def slowly() -> Iterator[bytes]:
        sending.set()
        ended.wait(20)
        yield request.SerializeToString()

    with Served("drain", shelf.run.store.root, tmp_path) as served:
        served.deploy(run_at, shelf.wine.uri)
        pid = processes.pid("endpoint-drain", tmp_path)
        with grpc.insecure_channel(served.address) as channel:
            call = channel.stream_unary(
                "/inference.GRPCInferenceService/ModelInfer", None, pb.ModelInferResponse.FromString
            ).future(slowly(), timeout=60)
            assert sending.wait(20)
            time.sleep(0.3)  # in which the head arrives
            os.kill(pid, signal.SIGTERM)

            def refuses() -> bool:
                with (
                    contextlib.suppress(InferenceServerException),
                    triton.InferenceServerClient(
                        served.address, channel_args=[("grpc.use_local_subchannel_pool", 1)]
                    ) as client,
                ):
                    client.is_server_live(client_timeout=2)
                    return False
                return True

            _until(refuses, 20)
            ended.set()
            assert call.result().model_name == "drain"
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_few_messages_may_arrive_slowly_and_they_hold_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one of each address; a Unix socket stands for another address."""
    monkeypatch.setattr("lepton_airflow.serving.grpc._SLOW_S", 0.1)
    refused: list[int] = []
    connections = ConnectionLimits(body_bytes=1000, waiting_bytes=2000, body_s=0.6)

    def answering(request: Request, _: object) -> Response:
        return Response(200, b'{"live": true}')

    async def timed(address: str, messages: AsyncIterator[bytes]) -> tuple[str, float]:
        started = time.monotonic()
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_unary("/inference.GRPCInferenceService/ServerLive")(messages)
            code = await call.code()
        return code.name, time.monotonic() - started

    async def never() -> AsyncIterator[bytes]:
        await asyncio.sleep(5)
        yield b""

    async def at_once() -> AsyncIterator[bytes]:
        yield b""

    async def drill() -> None:
        service = Service(
            answering, lambda status, _: refused.append(status), Limits(connections=connections)
        )
        unix = f"unix:{tmp_path}/socket"
        service._server.add_insecure_port(unix)
        tcp = f"127.0.0.1:{processes.free_port()}"
        await service.start(tcp)
        silent = []
        for address in (tcp, tcp, unix):
            silent.append(asyncio.create_task(timed(address, never())))
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)
        for address in (tcp, unix):
            code, seconds = await timed(address, at_once())
            assert (code, seconds < 0.2) == ("OK", True)
        codes = [(await task)[0] for task in silent]
        assert codes == ["UNAVAILABLE", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"]
        assert refused == [503, 408, 408]
        assert not service._calls
        assert not service._slow
        await service.stop()

    asyncio.run(drill())


@pytest.mark.parametrize(("calls", "most"), [(8, {"connections": 8}), (4, {"waiting_bytes": 16})])
def test_answers_that_clients_do_not_take_are_limited_by_address(
    tmp_path: Path, calls: int, most: dict[str, int]
) -> None:
    connections = ConnectionLimits(**most)  # type: ignore[arg-type]

    async def drill() -> None:
        service = Service(
            lambda _, __: Response(200, b'{"live": true}'), lambda *_: None, Limits(connections=connections)
        )
        unix, port = f"unix:{tmp_path}/socket", processes.free_port()
        service._server.add_insecure_port(unix)
        await service.start(f"127.0.0.1:{port}")
        _, writer = await asyncio.open_connection("127.0.0.1", port)

        async def asked(address: str) -> str:
            async with grpc.aio.insecure_channel(address) as channel:
                call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"")
                return str((await call.code()).name)

        writer.write(calls_unread("ServerLive", calls))
        await asyncio.sleep(0.3)
        assert await asked(f"127.0.0.1:{port}") == "UNAVAILABLE"
        assert await asked(unix) == "OK"
        writer.close()
        await asyncio.sleep(0.3)
        assert await asked(f"127.0.0.1:{port}") == "OK"
        await asyncio.sleep(0.1)
        assert not service._calls
        assert not service._untaken
        await service.stop()

    asyncio.run(drill())


def test_a_call_that_is_cancelled_before_its_turn_is_not_computed() -> None:
    class Held:
        """Turns that come when the test says so."""

        def __init__(self) -> None:
            self.waiting: list[Callable[[], object]] = []

        def add(self, _: str, work: Callable[[], object]) -> None:
            self.waiting.append(work)

    computed: list[str] = []

    def answering(request: Request, _: object) -> Response:
        computed.append(request.path)
        return Response(200, b'{"live": true}')

    async def drill() -> None:
        held = Held()
        limits = Limits(connections=ConnectionLimits(connections=5))
        service = Service(answering, lambda *_: None, limits, held)  # type: ignore[arg-type]
        port = processes.free_port()
        await service.start(f"127.0.0.1:{port}")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            calls = [ask(b"") for _ in range(5)]
            await asyncio.sleep(0.3)
            assert len(held.waiting) == 5
            for call in calls[:4]:
                call.cancel()
            await asyncio.sleep(0.3)
            for work in held.waiting:
                work()
            assert (await calls[4].code()).name == "OK"
            await asyncio.sleep(0.1)
        assert computed == ["/v2/health/live"]
        assert not service._calls
        await service.stop()

    asyncio.run(drill())


def test_long_messages_that_wait_to_be_read_are_limited_and_those_of_one_address_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_: Service, kind: str, message: bytes) -> Any:
        time.sleep(0.1)
        raise RequestError(400, "read.")

    monkeypatch.setattr(Service, "_read", read)

    async def drill() -> None:
        service = Service(lambda _, __: None, lambda *_: None, Limits(in_flight=4))
        unix, tcp = f"unix:{tmp_path}/socket", f"127.0.0.1:{processes.free_port()}"
        service._server.add_insecure_port(unix)
        await service.start(tcp)

        async def asked(address: str) -> str:
            async with grpc.aio.insecure_channel(address) as channel:
                call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(bytes(100_000))
                return str((await call.code()).name)

        many = [asyncio.create_task(asked(tcp)) for _ in range(20)]
        await asyncio.sleep(0.15)
        assert await asked(unix) == "INVALID_ARGUMENT"
        codes = Counter(await asyncio.gather(*many))
        assert set(codes) == {"INVALID_ARGUMENT", "UNAVAILABLE"}
        assert codes["INVALID_ARGUMENT"] <= 8
        await service.stop()

    asyncio.run(drill())


@pytest.mark.parametrize("port", [99999, -1])
def test_a_wrong_port_is_refused(port: int, tmp_path: Path) -> None:
    with pytest.raises(BadConfiguration, match=f"cannot listen on 127.0.0.1:{port}"):
        serve(Store(str(tmp_path)), settings(grpc_port=port))


def test_a_port_that_another_server_has_is_refused(wine: Served, tmp_path: Path) -> None:
    with pytest.raises(BadConfiguration, match=f"cannot listen on 127.0.0.1:{wine.port}"):
        serve(Store(str(tmp_path)), settings(grpc_port=wine.port))


def settings(**more: Any) -> Settings:
    return Settings(
        names=("wine",),
        host="127.0.0.1",
        port=0,
        health_port=None,
        url=None,
        workers=1,
        limits=Limits(),
        poll_s=1,
        drain_s=0,
        **more,
    )


def test_refused_messages_do_not_wait_in_memory(shelf: Any, run_at: RunInfo, tmp_path: Path) -> None:
    """Their frames would, until Python's collector comes: half a GB of one client that asks one thing after the other."""
    values = pb.ModelInferRequest.InferInputTensor(name="malic_acid", datatype="FP32", shape=[1_500_000, 1])
    lacking = pb.ModelInferRequest(
        model_name="wein", inputs=[values], raw_input_contents=[bytes(6_000_000)]
    ).SerializeToString()
    with Served("wein", run_at.store.root, tmp_path) as served:
        served.deploy(run_at, shelf.wine.uri)
        supervisor = psutil.Process(processes.pid("endpoint-wein", tmp_path))
        [worker] = [w for forkserver in supervisor.children() for w in forkserver.children()]
        for message in (lacking, b"\xff" * 6_000_000):
            held = []
            for calls in (10, 60):
                for _ in range(calls):
                    assert served.refusal(message)[0] == "INVALID_ARGUMENT"
                held.append(worker.memory_info().rss / 2**20)
            assert held[1] - held[0] < 100
