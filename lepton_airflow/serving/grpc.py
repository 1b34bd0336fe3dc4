"""The Open Inference Protocol over gRPC, by a worker, on a port that all workers share.

A call is translated into the request of the REST protocol that says the same, with its tensors as binary data, and what the
worker answers is translated back. So both protocols have one set of checks, sentences, limits and counters, one queue, and
the same bits in their answers. A refusal's HTTP status becomes gRPC's code for the same matter.

The server is ``grpc.aio``, in the event loop that answers REST, too: a worker's state then belongs to one thread, and small
requests of both protocols are answered in the order in which they came. Only long messages are translated in a thread.
gRPC's own threads read and write, and unpack gzip and deflate up to the limit of a message. Each worker listens for itself
(``SO_REUSEPORT``): when one ends, the kernel gives new connections to the others, and clients connect anew.

A call is handled from its head on, so that its message has a time in which to arrive, and few are held that arrive slowly.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice
from math import prod
from typing import Any, cast
from urllib.parse import quote, unquote

import grpc  # noqa: TID253 - this module is imported in a worker, after the fork
import msgspec
import numpy as np  # noqa: TID253
from google.protobuf.message import DecodeError

from lepton_airflow.errors import did_you_mean
from lepton_airflow.serving.http import Request, Response, Turns, address_of, count_down
from lepton_airflow.serving.messages import CLASSES
from lepton_airflow.serving.protocol import HEADER_LENGTH, RequestError, check_count
from lepton_airflow.serving.worker import Limits, Queue

log = logging.getLogger(__name__)

_SERVICE = "inference.GRPCInferenceService"
_LARGE = 64 * 1024  # bytes of a message from which on it is translated in a thread
_LONG_S = 0.02  # for which parsing holds up all other calls; 10,000 good rows take a tenth of it
_BYTE_S = 1e-8  # that a byte takes to be translated
_SLOW_S = 1.0  # for a message to arrive before it counts as slow
_GIVEN_UP = 0.0  # as the deadline of a call: long ago
_TOO_MANY = "too many unfinished requests wait here: come back later."
_STREAMS = 100  # calls of one connection at a time; a client's library holds back further ones
# Of a connection: gRPC's libraries then open another, and what a client does not take is forgotten.
_AGE_S = 600.0
_DRAIN_S = 30.0  # for the calls that are under way at the end
# Entries beyond which a list is longer than the checks allow, so that nothing of it need be translated.
_TENSORS, _PARAMETERS, _DIMENSIONS = 2000, 4000, 20
_NAME = 1000  # characters, more than an endpoint's name may have

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.UNIMPLEMENTED,
    422: grpc.StatusCode.FAILED_PRECONDITION,  # the same rows fail again, and the server is well
    503: grpc.StatusCode.UNAVAILABLE,
}

# Of each datatype the field of InferTensorContents, and its values in binary data. FP16 has no field.
_CONTENTS = {
    "BOOL": ("bool_contents", "|b1"),
    **{f"INT{bits}": ("int_contents", f"<i{bits // 8}") for bits in (8, 16, 32)},
    "INT64": ("int64_contents", "<i8"),
    **{f"UINT{bits}": ("uint_contents", f"<u{bits // 8}") for bits in (8, 16, 32)},
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "BYTES": ("bytes_contents", ""),
}

# What a worker answers to a request: at once, or later by the second argument.
Answering = Callable[[Request, Callable[[Response], None]], Response | None]


class Service:
    """The gRPC server of one worker.

    :param answering: answers the requests of REST.
    :param refused: called with the HTTP status of each call that does not get as far as that, and the model's name.
    :param turns: of the addresses, in which requests are answered.
    """

    def __init__(
        self,
        answering: Answering,
        refused: Callable[[int, str], None],
        limits: Limits,
        turns: Turns | None = None,
    ) -> None:
        self._turns = turns or Turns()
        self._answering = answering
        self._refused = refused
        self._limits = limits
        connections = limits.connections
        self._most_slow = max(2, connections.waiting_bytes // connections.body_bytes)
        self._calls: Counter[str] = Counter()  # that are not over, by address
        self._untaken: Counter[str] = Counter()  # bytes of answers that clients have not taken
        self._slow: dict[
            str, dict[asyncio.Timeout, None]
        ] = {}  # those of them that began a while ago, in order
        self._translations = Queue(1, limits.in_flight)
        self._server = grpc.aio.server(
            handlers=[_Methods(self._call)],
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", connections.body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", connections.head_bytes),
                ("grpc.absolute_max_metadata_size", connections.head_bytes),
                ("grpc.max_concurrent_streams", _STREAMS),
                ("grpc.max_allowed_incoming_connections", connections.connections),
                ("grpc.server_handshake_timeout_ms", round(1000 * connections.head_s)),
                ("grpc.max_connection_idle_ms", round(1000 * connections.idle_s)),
                ("grpc.max_connection_age_ms", round(1000 * _AGE_S)),
                ("grpc.max_connection_age_grace_ms", round(1000 * _DRAIN_S)),
            ],
        )

    async def start(self, address: str) -> None:
        """Listen."""
        self._server.add_insecure_port(address)
        await self._server.start()

    async def stop(self) -> None:
        """Take no more calls, and end when those that were taken are answered."""
        await self._server.stop(_DRAIN_S)

    async def _call(self, name: str, _: object, context: Any) -> bytes:
        """Answer a call."""
        started = time.perf_counter()
        try:
            method = _METHODS.get(name)
            if method is None:
                raise RequestError(405, _unknown(name))
            address = _host(context.peer())
            self._admit(context, address)
            answer = await method(
                self,
                await self._message(context, address),
                Request("GET", "", started=started, address=address),
            )
            return self._until_taken(context, address, answer)
        except RequestError as error:
            refused = error.to_keep()
        except Exception:
            log.exception("gRPC %s", name)
            refused = RequestError(500, "the server failed on this request; its log says why.")
        # Not where it was caught, and with no message in this frame: what abort raises keeps both until the collector comes.
        code = _CODES.get(refused.status, grpc.StatusCode.INTERNAL)
        wait = refused.headers.get("retry-after")
        trailing = (("grpc-retry-pushback-ms", f"{wait}000"),) if wait else ()
        await context.abort(code, str(refused), trailing)
        raise AssertionError  # abort does not return

    def _admit(self, context: Any, address: str) -> None:
        """Count a call until it is over, which it is not before its answer was taken; refuse one of an address with many."""
        limits, calls, untaken = self._limits.connections, self._calls, self._untaken
        if (
            calls[address] >= limits.connections
            or calls.total() >= 4 * limits.connections
            or untaken[address] >= limits.waiting_bytes // 2
            or untaken.total() >= limits.waiting_bytes
        ):
            raise self._refusal(503, _TOO_MANY, retry_after="1")
        calls[address] += 1
        context.add_done_callback(lambda _: count_down(calls, address, 1))

    def _until_taken(self, context: Any, address: str, answer: bytes) -> bytes:
        """Count the bytes of an answer until then."""
        size = len(answer)
        self._untaken[address] += size
        context.add_done_callback(lambda _: count_down(self._untaken, address, size))
        return answer

    async def _message(self, context: Any, address: str) -> bytes:
        """The message of a call, when it has arrived whole and in time."""
        limits = self._limits.connections
        deadline = asyncio.timeout(limits.body_s)
        slow = asyncio.get_running_loop().call_later(_SLOW_S, self._is_slow, address, deadline)
        try:
            async with deadline:
                message = await context.read()
        except TimeoutError:
            if deadline.when() == _GIVEN_UP:
                raise self._refusal(503, _TOO_MANY, retry_after="1") from None
            raise self._refusal(408, f"the request did not arrive within {limits.body_s:g} s.") from None
        finally:
            slow.cancel()
            if address in self._slow:
                self._slow[address].pop(deadline, None)
                if not self._slow[address]:
                    del self._slow[address]
        if message is grpc.aio.EOF:  # it was too long, and gRPC has said so
            raise self._refusal(
                413,
                f"the request has more than {limits.body_bytes} bytes, the limit: send its rows in several requests.",
            )
        return cast("bytes", message)

    def _is_slow(self, address: str, deadline: asyncio.Timeout) -> None:
        """Count a call's message as slow, and give up the slowest of an address that has too many, as these take memory."""
        slow = self._slow.setdefault(address, {})
        slow[deadline] = None
        if sum(map(len, self._slow.values())) > self._most_slow:
            slow = max(self._slow.values(), key=len)
        elif len(slow) <= self._most_slow // 2:
            return
        oldest = next(iter(slow))
        del slow[oldest]
        oldest.reschedule(_GIVEN_UP)

    def _refusal(self, status: int, sentence: str, **headers: str) -> RequestError:
        self._refused(status, "")
        return RequestError(status, sentence, **headers)

    async def _answer(self, request: Request) -> Response:
        """What the worker answers to a request of REST."""
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

        def later(response: Response) -> None:
            if not future.done():  # the client may be gone
                future.set_result(response)

        def ask() -> None:
            if future.done():  # the client is gone
                return
            if (response := self._answering(request, later)) is not None:
                later(response)

        self._turns.add(request.address, ask)
        try:
            return await future
        except asyncio.CancelledError:
            request.body = b""  # which would wait for its turn
            raise

    async def _look(self, request: Request, path: str, *may: int) -> tuple[Response, Any]:
        """The answer at a path, and what its JSON says; raises what it refuses, but for the statuses that may be."""
        request.path = path
        response = await self._answer(request)
        if response.status not in (200, *may):
            raise _refused(response)
        return response, msgspec.json.decode(response.body)

    async def _translate(
        self, address: str, size: int, function: Callable[..., Any], *args: object, is_answer: bool = False
    ) -> Any:
        if size <= _LARGE:
            return function(*args)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def told(tell: Callable[[Any], None], what: Any) -> None:
            if not future.done():  # the client may be gone
                tell(what)

        def job() -> None:
            try:
                found = function(*args)
            except Exception as error:  # noqa: BLE001 - which the call tells
                loop.call_soon_threadsafe(told, future.set_exception, error)
            else:
                loop.call_soon_threadsafe(told, future.set_result, found)

        many = RequestError(503, _TOO_MANY, retry_after="1")
        dropped = None if is_answer else partial(loop.call_soon, told, future.set_exception, many)
        if not self._translations.put(address, size * _BYTE_S, job, dropped):
            raise many
        return await future

    def _read(self, kind: str, message: bytes) -> Any:
        started = time.thread_time()
        try:
            return CLASSES[kind].FromString(message)
        except DecodeError:
            raise RequestError(400, f"the request does not fit the protocol: it is no {kind}.") from None
        finally:
            took = time.thread_time() - started
            if len(message) > _LARGE and took > _LONG_S:  # in the thread, but holding the interpreter's lock
                time.sleep(3 * took)

    # -- the methods of the service ----------------------------------------------------------------------------------

    async def server_live(self, message: bytes, request: Request) -> bytes:
        """ServerLive."""
        _, found = await self._look(request, "/v2/health/live")
        return _message("ServerLiveResponse", live=found["live"])

    async def server_ready(self, message: bytes, request: Request) -> bytes:
        """ServerReady."""
        _, found = await self._look(request, "/v2/health/ready", 503)
        return _message("ServerReadyResponse", ready=found["ready"])

    async def model_ready(self, message: bytes, request: Request) -> bytes:
        """ModelReady: false while nothing is in service; another version or model is not found."""
        asked = self._read("ModelReadyRequest", message)
        response, _ = await self._look(request, f"{_path(asked.name, asked.version)}/ready", 503)
        return _message("ModelReadyResponse", ready=response.status == 200)

    async def server_metadata(self, message: bytes, request: Request) -> bytes:
        """ServerMetadata."""
        _, found = await self._look(request, "/v2")
        return _message("ServerMetadataResponse", **found)

    async def model_metadata(self, message: bytes, request: Request) -> bytes:
        """ModelMetadata; which class is the positive one, for which a message has no place, stands in every answer."""
        asked = self._read("ModelMetadataRequest", message)
        _, found = await self._look(request, _path(asked.name, asked.version))
        for side in ("inputs", "outputs"):
            found[side] = [
                CLASSES["TensorMetadata"](name=t["name"], datatype=t["datatype"], shape=t["shape"])
                for t in found[side]
            ]
        return _message("ModelMetadataResponse", **found)

    async def repository_index(self, message: bytes, request: Request) -> bytes:
        """RepositoryIndex, an extension."""
        asked = self._read("RepositoryIndexRequest", message)
        request.method = "POST"
        _, found = await self._look(request, "/v2/repository/index")
        models = [m for m in found if m["state"] == "READY" or not asked.ready]
        return _message("RepositoryIndexResponse", models=[CLASSES["ModelIndex"](**m) for m in models])

    async def model_infer(self, message: bytes, request: Request) -> bytes:
        """ModelInfer."""
        size = len(message)
        asked = _Asked()
        try:
            await self._translate(
                request.address, size, asked.read, self._read, message, self._limits.rows, request
            )
        except RequestError as error:
            self._refused(error.status, asked.name)
            raise error.with_traceback(None) from None  # whose frames hold the message
        del message
        response = await self._answer(request)
        if response.status != 200:
            raise _refused(response)
        size = max(size, len(response.body))
        return cast(
            "bytes", await self._translate(request.address, size, asked.write, response, is_answer=True)
        )


_Method = Callable[[Service, bytes, Request], Awaitable[bytes]]
_METHODS: dict[str, _Method] = {
    "ServerLive": Service.server_live,
    "ServerReady": Service.server_ready,
    "ModelReady": Service.model_ready,
    "ServerMetadata": Service.server_metadata,
    "ModelMetadata": Service.model_metadata,
    "ModelInfer": Service.model_infer,
    "RepositoryIndex": Service.repository_index,
}


def _unknown(name: str) -> str:
    if name == "ModelStreamInfer":
        return "ModelStreamInfer is not offered: send each request by ModelInfer."
    return f"there is no method {name[:100]!r} here; {did_you_mean(name[:100], _METHODS)}"


class _Methods(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """All methods of all services; in the form in which a method reads its message itself."""

    def __init__(self, call: Callable[..., Awaitable[bytes]]) -> None:
        self._call = call
        self._known = {f"/{_SERVICE}/{name}": self._handler(name) for name in _METHODS}

    def _handler(self, name: str) -> Any:
        return grpc.stream_unary_rpc_method_handler(partial(self._call, name))

    def service(self, details: Any) -> Any:
        """What answers a call."""
        name = details.method.removeprefix(f"/{_SERVICE}/")
        return self._known.get(details.method) or self._handler(name)


class _Asked:
    """A ModelInferRequest: it becomes a request of REST, and the answer to that a ModelInferResponse.

    :ivar name: of the model, when it is known.
    :ivar raw: whether tensors came as raw contents; those of the answer go in the same form.
    """

    name = ""
    raw = False
    parameters: dict[str, Any] | None = None

    def read(self, parse: Callable[..., Any], message: bytes, max_rows: int, request: Request) -> None:
        """Make the request of REST.

        :param request: becomes it.
        """
        asked = parse("ModelInferRequest", message)
        self.name = asked.model_name
        raws = asked.raw_input_contents
        self.raw = len(raws) > 0
        if self.raw and len(raws) != len(asked.inputs):
            raise RequestError(
                400,
                f"raw_input_contents has {len(raws)} tensors, inputs has {len(asked.inputs)}: expected one for each.",
            )
        if len(asked.inputs) > _TENSORS:
            raise RequestError(
                413,
                f"the request has {len(asked.inputs)} inputs, the limit of gRPC is {_TENSORS}: ask by REST.",
            )
        self.parameters = _from_parameters(asked.parameters)
        head: dict[str, Any] = {"parameters": {**(self.parameters or {}), "binary_data_output": True}}
        if asked.id:
            head["id"] = asked.id
        head["inputs"], blobs = [], []
        for number, tensor in enumerate(asked.inputs):
            if not self.raw:
                blob = _binary(tensor, max_rows)
            elif tensor.HasField("contents") and tensor.contents.ListFields():
                raise RequestError(
                    400,
                    f"input {tensor.name[:100]!r} has both contents and raw_input_contents: expected one of them.",
                )
            else:
                blob = raws[number]
            blobs.append(blob)
            told = _from_parameters(tensor.parameters) or {}
            head["inputs"].append(
                {
                    "name": tensor.name,
                    "datatype": tensor.datatype,
                    "shape": tensor.shape[:_DIMENSIONS],
                    "parameters": {**told, "binary_data_size": len(blob)},
                }
            )
        if asked.outputs:
            head["outputs"] = [
                {
                    "name": o.name,
                    "parameters": {**(_from_parameters(o.parameters) or {}), "binary_data": True},
                }
                for o in islice(asked.outputs, _TENSORS + 1)
            ]
        encoded = msgspec.json.encode(head)
        request.method, request.path = "POST", f"{_path(asked.model_name, asked.model_version)}/infer"
        request.headers = {HEADER_LENGTH.lower(): str(len(encoded))}
        request.body = b"".join([encoded, *blobs])

    def write(self, response: Response) -> bytes:
        """The answer in its binary form as a message."""
        at = int(response.headers.get(HEADER_LENGTH, len(response.body)))
        content = memoryview(response.body)
        found = msgspec.json.decode(content[:at])
        answer = CLASSES["ModelInferResponse"](
            model_name=found["model_name"], model_version=found["model_version"], id=found.get("id", "")
        )
        _set_parameters(answer.parameters, self.parameters or {})
        for told in found["outputs"]:
            output = answer.outputs.add(name=told["name"], datatype=told["datatype"], shape=told["shape"])
            parameters = told["parameters"]
            blob = content[at : at + parameters.pop("binary_data_size")]
            at += len(blob)
            _set_parameters(output.parameters, parameters)
            if self.raw:
                answer.raw_output_contents.append(bytes(blob))
            else:
                field, dtype = _CONTENTS[told["datatype"]]
                values = np.frombuffer(blob, dtype).tolist() if dtype else _texts(blob)
                getattr(output.contents, field).extend(values)
        return cast("bytes", answer.SerializeToString())


def _binary(tensor: Any, max_rows: int) -> bytes:
    """The values of a tensor with typed contents as binary data."""
    name, datatype, contents = tensor.name[:_NAME], tensor.datatype, tensor.contents
    if datatype == "FP16":
        raise RequestError(
            400, f"input {name[:100]!r}: contents have no field for FP16: send raw_input_contents."
        )
    if datatype not in _CONTENTS:
        return b""  # which is said when the datatype is checked
    field, dtype = _CONTENTS[datatype]
    for other, _ in contents.ListFields():
        if other.name != field:
            raise RequestError(
                400,
                f"input {name[:100]!r}: values of {datatype} are expected in {field}, not in {other.name}.",
            )
    values, shape = getattr(contents, field), list(tensor.shape[:_DIMENSIONS])
    if min(shape, default=0) < 0:
        return b""  # as above
    if len(values) != prod(shape) or len(shape) == 0:
        check_count(name, datatype, shape, len(values), max_rows)
    if not dtype:
        return b"".join(part for text in values for part in (len(text).to_bytes(4, "little"), text))
    if np.dtype(dtype).kind not in "iu":
        return np.fromiter(values, dtype, len(values)).tobytes()
    numbers = np.fromiter(values, np.uint64 if dtype[1] == "u" else np.int64, len(values))
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if (wrong := (numbers < low) | (numbers > high)).any():
        row = int(wrong.argmax())
        limit = f"<= {high}" if numbers[row] > high else f">= {low}"
        raise RequestError(
            400, f"input {name!r}: row {row} is no {datatype} such as 7: Expected int {limit}."
        )
    return numbers.astype(dtype).tobytes()


def _texts(blob: memoryview) -> list[bytes]:
    found, at = [], 0
    while at < len(blob):
        end = at + 4 + int.from_bytes(blob[at : at + 4], "little")
        found.append(bytes(blob[at + 4 : end]))
        at = end
    return found


def _from_parameters(parameters: Any) -> dict[str, Any] | None:
    """Parameters as JSON has them; one without a value is null, which the checks refuse."""
    if not parameters:
        return None
    return {
        name: getattr(value, choice) if (choice := value.WhichOneof("choice")) else None
        for name, value in islice(parameters.items(), _PARAMETERS)
    }


def _set_parameters(place: Any, parameters: dict[str, Any]) -> None:
    for name, value in parameters.items():
        match value:
            case bool():
                place[name].bool_param = value
            case int() if value >= 2**63:
                place[name].uint64_param = value
            case int():
                place[name].int64_param = value
            case float():
                place[name].double_param = value
            case _:
                place[name].string_param = value


def _message(kind: str, **fields: Any) -> bytes:
    return cast("bytes", CLASSES[kind](**fields).SerializeToString())


def _path(name: str, version: str) -> str:
    """Where REST has a model, or a version of it."""
    path = f"/v2/models/{quote(name[:_NAME], safe='')}"
    return f"{path}/versions/{quote(version[:_NAME], safe='')}" if version else path


def _refused(response: Response) -> RequestError:
    return RequestError(
        response.status, msgspec.json.decode(response.body)["error"], **dict(response.headers)
    )


def _host(peer: str) -> str:
    """The client's address of what gRPC calls a peer, such as ``ipv4:127.0.0.1:49934``."""
    return address_of(unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]"))
