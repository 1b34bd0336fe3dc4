"""What clients of one address can do to a model server, and what becomes of a client of another address meanwhile."""

from __future__ import annotations

import gzip
import http.client
import select
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle

MIB = 2**20
BAD, GOOD = "127.0.0.2", "127.0.0.3"
CHUNKED = ("Transfer-Encoding: chunked",)


@dataclass(frozen=True)
class Target:
    """A server.

    :ivar body: the body of a request for so many rows, and its headers; as JSON, or as binary tensors.
    :ivar large: rows of a large request.
    :ivar grpc: its port for gRPC.
    """

    port: int
    model: str
    body: Callable[[int, bool], tuple[bytes, dict[str, str]]]
    large: int = 10_000
    max_bytes: int = 8 * MIB
    grpc: int | None = None

    def post(self, body: bytes, *headers: str, close: bool = True) -> bytes:
        """A request for predictions."""
        length = () if headers[:1] == CHUNKED else (f"Content-Length: {len(body)}",)
        end = ("Connection: close",) if close else ()
        lines = [f"POST /v2/models/{self.model}/infer HTTP/1.1", "Host: x", *headers, *length, *end, "", ""]
        return "\r\n".join(lines).encode() + body

    def rows(self, count: int, *, binary: bool = False, close: bool = True) -> bytes:
        """A request for predictions of rows."""
        body, headers = self.body(count, binary)
        return self.post(body, *(f"{name}: {value}" for name, value in headers.items()), close=close)


Attack = Callable[[Target, threading.Event], None]


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(BAD, 0))


def _together(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def holding(
    count: int, head: Callable[[Target], bytes], drop: bytes = b"", *, grpc: bool = False, read: int = 0
) -> Attack:
    """Sockets that send something, and then a little each second; each that is closed is opened again.

    :param read: bytes that each reads in a second.
    """

    def attack(target: Target, stop: threading.Event) -> None:
        sockets: list[socket.socket] = []
        first = head(target)
        while not stop.is_set():
            while len(sockets) < count and not stop.is_set():
                with suppress(OSError):
                    each = _connect((target.grpc or 0) if grpc else target.port)
                    sockets.append(each)
                    each.settimeout(0.2)
                    each.sendall(first)
                    each.setblocking(False)
            stop.wait(1.0)
            alive = []
            for each in sockets:
                with suppress(OSError):
                    if drop:
                        each.send(drop)
                    if read:
                        with suppress(BlockingIOError):
                            each.recv(read)
                    alive.append(each)
            sockets = alive
        for each in sockets:
            each.close()

    return attack


def repeating(clients: int, request: Callable[[Target], bytes]) -> Attack:
    """Clients that send a request, read the answer and begin anew."""

    def attack(target: Target, stop: threading.Event) -> None:
        content = request(target)

        def client() -> None:
            while not stop.is_set():
                with suppress(OSError), _connect(target.port) as each:
                    each.sendall(content)
                    while not stop.is_set() and each.recv(65536):
                        pass

        _together([client] * clients)

    return attack


def asking_on(connections: int, requests: Callable[[Target], list[bytes]], *, read: bool = True) -> Attack:
    """Connections that ask without a pause, one request after the other, and read the answers or do not."""

    def attack(target: Target, stop: threading.Event) -> None:
        asked = [request * (64 * 1024 // len(request) + 1) for request in requests(target)]
        each_asks: Iterator[bytes] = cycle(asked)
        rest: dict[socket.socket, memoryview] = {}
        while not stop.is_set():
            while len(rest) < connections and not stop.is_set():
                with suppress(OSError):
                    each = _connect(target.port)
                    each.setblocking(False)
                    rest[each] = memoryview(next(each_asks))
            readable, writable, _ = select.select(rest if read else [], rest, [], 0.1)
            for each in {*readable, *writable}:
                try:
                    if each in readable and not each.recv(MIB):
                        raise ConnectionResetError
                    if each in writable:
                        rest[each] = rest[each][each.send(rest[each]) :] or memoryview(next(each_asks))
                except BlockingIOError:
                    pass
                except OSError:
                    each.close()
                    del rest[each]
            time.sleep(0.001)  # the good client is in this process, too
        for each in rest:
            each.close()

    return attack


def _bomb(target: Target) -> bytes:
    return b'{"inputs":[' + b" " * (target.max_bytes - 100)


def _wanted(*paths: str, method: str = "GET") -> Callable[[Target], list[bytes]]:
    return lambda _: [f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def calls_unread(method: str, count: int) -> bytes:
    """Calls of gRPC at once, without a message, on one connection whose client has no room for answers."""
    path = f"/inference.GRPCInferenceService/{method}"
    head = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    head["content-type"] = "application/grpc"
    fields = b"".join(
        b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in field) for field in head.items()
    )
    found = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"\0\4" + bytes(4)) + frame(4, 1, 0)
    for stream in range(1, 2 * count, 2):
        found += frame(1, 4, stream, fields) + frame(0, 1, stream, bytes(5))
    return found


def calling(clients: int, at_once: int, message: Callable[[Target], bytes]) -> Attack:
    """Clients of gRPC that have so many calls under way; they use another port, and the address 127.0.0.1."""

    def attack(target: Target, stop: threading.Event) -> None:
        import grpc

        content = message(target)

        def client() -> None:
            own = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(f"127.0.0.1:{target.grpc}", own) as channel:
                call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                while not stop.is_set():
                    for one in [call.future(content, timeout=5) for _ in range(at_once)]:
                        one.exception()

        _together([client] * clients)

    return attack


def _asked_by_grpc(target: Target, rows: int) -> bytes:
    """The message of a request; the body of REST has all that it needs."""
    import json

    from lepton_airflow.serving.messages import CLASSES

    request = CLASSES["ModelInferRequest"](model_name=target.model)
    for tensor in json.loads(target.body(rows, False)[0])["inputs"]:
        texts = tensor["datatype"] == "BYTES"
        given = request.inputs.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"])
        if texts:
            given.contents.bytes_contents.extend((text or "").encode() for text in tensor["data"])
        else:
            field = "fp32_contents" if tensor["datatype"] == "FP32" else "fp64_contents"
            missing = [float("nan") if value is None else value for value in tensor["data"]]
            getattr(given.contents, field).extend(missing)
    message: bytes = request.SerializeToString()
    return message


_CHUNKS = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"

ATTACKS: dict[str, Attack] = {
    "slow_bodies": holding(64, lambda t: t.post(b"x" * 100_000)[:-99_999], b"x"),
    "slow_heads": holding(300, lambda _: b"GET / HTTP/1.1\r\nX: ", b"x"),
    "silent_sockets": holding(1050, lambda _: b""),
    "endless_header": repeating(2, lambda _: b"GET / HTTP/1.1\r\nX: " + b"a" * (100 * MIB)),
    "nested_arrays": repeating(
        4,
        lambda t: t.post(
            b'{"inputs":[{"name":"f0","datatype":"FP32","shape":[1],"data":[' + b"[],[]," * (t.max_bytes // 8)
        ),
    ),
    "long_name": repeating(
        4, lambda t: t.post(b'{"inputs":[{"name":"' + b"a" * (t.max_bytes - 100) + b'"}]}')
    ),
    "large_requests": repeating(8, lambda t: t.rows(t.large)),
    "large_binary_requests": repeating(8, lambda t: t.rows(t.large, binary=True)),
    "connections": repeating(8, lambda _: b"GET /v2/health/live HTTP/1.1\r\nConnection: close\r\n\r\n"),
    "requests_in_a_row": asking_on(8, lambda t: [t.rows(1, close=False)]),
    "requests_in_a_row_unread": asking_on(20, lambda t: [t.rows(1, close=False)], read=False),
    "many_connections": asking_on(200, lambda t: [t.rows(1, close=False)]),
    "packed_bombs": repeating(8, lambda t: t.post(gzip.compress(_bomb(t), 9), "Content-Encoding: gzip")),
    "deflated_bombs": repeating(8, lambda t: t.post(zlib.compress(_bomb(t), 9), "Content-Encoding: deflate")),
    "small_packed_requests": asking_on(
        16, lambda t: [t.post(gzip.compress(t.body(1, False)[0]), "Content-Encoding: gzip", close=False)]
    ),
    "small_chunks": repeating(4, lambda t: t.post(b"2\r\nab\r\n" * (t.max_bytes // 2), *CHUNKED)),
    "small_chunks_within_limits": repeating(
        8, lambda t: t.post(b"14\r\n01234567890123456789\r\n" * (t.max_bytes // 20) + b"0\r\n\r\n", *CHUNKED)
    ),
    "chunk_extensions": repeating(4, lambda _: b"".join([_CHUNKS, b"1;", b"x" * (100 * MIB)])),
    "endless_trailers": repeating(4, lambda _: b"".join([_CHUNKS, b"0\r\n", b"X: y\r\n" * (10 * MIB)])),
    "metrics": asking_on(8, _wanted("/metrics")),
    "descriptions": asking_on(8, _wanted("/docs", "/v2/openapi.json")),
    "unknown_paths": asking_on(8, _wanted("/%41" * 8000, "/v2/models/" + "%41" * 10_000, "/a" * 16_000)),
    "other_methods": asking_on(
        8,
        lambda t: [
            f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            for method in ("HEAD", "OPTIONS", "BREW", "TRACE")
            for path in ("/docs", f"/v2/models/{t.model}/infer", "*")
        ],
    ),
    "slow_readers": holding(100, lambda t: t.rows(t.large, close=False) * 2, read=100),
}

GRPC_ATTACKS: dict[str, Attack] = {
    "grpc_calls": calling(8, 100, lambda t: _asked_by_grpc(t, 1)),
    "grpc_large_calls": calling(8, 4, lambda t: _asked_by_grpc(t, t.large)),
    "grpc_wrong_messages": calling(4, 1, lambda t: b"\x2a\0" * (t.max_bytes // 2 - 100)),  # empty tensors
    "grpc_unread": holding(50, lambda _: calls_unread("ServerMetadata", 100), grpc=True),
}


def attacked(
    target: Target,
    attack: Attack,
    *,
    asked: int = 100,
    rows: int = 1,
    before_s: float = 2.0,
    wait_s: float = 2.0,
    then: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """The share of a good client's requests that were answered in time, and the 99th percentile of the time [ms].

    :param rows: of each of its requests.
    :param before_s: between the attack's and its begin.
    :param wait_s: for each answer.
    :param then: done when it begins.
    """
    body, _ = target.body(rows, False)
    stop = threading.Event()
    attacking = threading.Thread(target=attack, args=(target, stop), daemon=True)
    attacking.start()
    time.sleep(before_s)
    then()
    times, good = [], 0
    connection: http.client.HTTPConnection | None = None
    for _ in range(asked):
        began = time.monotonic()
        try:
            if connection is None:
                connection = http.client.HTTPConnection(
                    "127.0.0.1", target.port, timeout=wait_s, source_address=(GOOD, 0)
                )
            connection.request("POST", f"/v2/models/{target.model}/infer", body)
            answer = connection.getresponse()
            answer.read()
            good += answer.status == 200
        except (OSError, http.client.HTTPException):
            connection = None
        times.append(time.monotonic() - began)
        time.sleep(max(0.0, 0.05 - times[-1]))
    stop.set()
    attacking.join(30)
    return good / asked, round(1000 * sorted(times)[int(0.99 * (asked - 1))], 1)
