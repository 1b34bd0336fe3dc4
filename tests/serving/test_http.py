"""Requests as the default clients of other languages write them, byte by byte: each gets the answer that the package gives."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import pytest

from lepton_airflow.stages.deploy_model import DeployModel
from lepton_airflow.testing import LocalEndpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

INFER = "/v2/models/rohr/infer"
PAUSE_S = 0.1  # after which what follows comes in another packet


@pytest.fixture(scope="module")
def server(shelf: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    folder = tmp_path_factory.mktemp("raw")
    run = replace(shelf.run, run_key="raw", workdir=folder)
    with LocalEndpoint("rohr", shelf.run.store.root, folder, options=("--poll-s", "0.1")) as server:
        stage = DeployModel(endpoint="rohr", model=shelf.wine.uri, timeout_s=60, max_latency_ms=5000)
        assert stage.run(run).values["deployed"]
        yield server


@dataclass
class Asked:
    """A body, and the predictions that its answer must hold."""

    body: bytes
    wanted: Any = field(repr=False)

    def check(self, answer: http.client.HTTPResponse, content: bytes) -> None:
        assert answer.status == 200, content
        found = json.loads(content)["outputs"][0]
        np.testing.assert_array_equal(np.reshape(found["data"], found["shape"]), self.wanted)


@pytest.fixture
def asked(shelf: Any) -> list[Asked]:
    """Requests that differ, so that an answer to another one is seen."""
    found = []
    for number in range(20):
        rows = shelf.wine.rows[number : number + 2]
        inputs = [
            {
                "name": f.name,
                "datatype": "BYTES" if f.kind == "category" else "FP64",
                "shape": [2],
                "data": [None if pd.isna(value) else value for value in rows[f.name]],
            }
            for f in shelf.wine.package.card.features
        ]
        body = json.dumps({"inputs": inputs}).encode()
        found.append(Asked(body, shelf.wine.package.predict(rows)))
    return found


class Client:
    """A socket that says what it is told, and reads one answer after the other."""

    def __init__(self, server: LocalEndpoint) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def say(self, *packets: bytes) -> None:
        for number, packet in enumerate(packets):
            if number:
                time.sleep(PAUSE_S)
            self.socket.sendall(packet)

    def hear(self, method: str = "POST") -> tuple[http.client.HTTPResponse, bytes]:
        class Same:  # HTTPResponse closes what it has read
            def __init__(self, file: Any) -> None:
                self.file = file

            def makefile(self, *_: object) -> Any:
                return self

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def close(self) -> None:
                pass

        answer = http.client.HTTPResponse(Same(self.file), method=method)
        answer.begin()
        return answer, answer.read()

    def is_closed(self) -> bool:
        return self.file.read(1) == b""


def post(body: bytes, *headers: str, version: str = "1.1", path: str = INFER) -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%X\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def split(request: bytes, *places: int) -> list[bytes]:
    ends = [*places, len(request)]
    return [request[a:b] for a, b in zip([0, *places], ends, strict=True)]


# -- Java --------------------------------------------------------------------------------------------------------------

JAVA = (
    "Connection: Upgrade, HTTP2-Settings",
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    "Upgrade: h2c",
    "User-Agent: Java-http-client/17.0.11",
)


@pytest.mark.parametrize("where", ["together", "later", "twice", "byte by byte"])
def test_java_offers_h2c(server: LocalEndpoint, asked: list[Asked], where: str) -> None:
    with Client(server) as client:
        for one in asked[:3]:
            request = post(one.body, *JAVA)
            head = len(request) - len(one.body)
            if where == "together":
                client.say(request)
            elif where == "later":
                client.say(*split(request, head))
            elif where == "twice":
                client.say(*split(request, head - 10, head + 10, len(request) - 1))
            else:
                for byte in request:
                    client.say(bytes([byte]))
            answer, content = client.hear()
            one.check(answer, content)
            assert answer.headers["connection"] == "keep-alive"
            assert answer.headers["upgrade"] is None


def test_java_offers_h2c_without_a_body_in_chunks_and_in_a_pipeline(
    server: LocalEndpoint, asked: list[Asked]
) -> None:
    look = "\r\n".join(["GET /v2/health/live HTTP/1.1", "Host: x", *JAVA, "", ""]).encode()
    pieces = "\r\n".join([f"POST {INFER} HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", *JAVA, "", ""])
    with Client(server) as client:
        client.say(
            look + look + pieces.encode() + chunked(asked[0].body, 100) + post(asked[1].body, *JAVA) + look
        )
        assert client.hear()[1] == b'{"live":true}'
        assert client.hear()[1] == b'{"live":true}'
        asked[0].check(*client.hear())
        asked[1].check(*client.hear())
        assert client.hear()[1] == b'{"live":true}'


def test_java_expects_to_be_told_to_go_on_and_offers_h2c(server: LocalEndpoint, asked: list[Asked]) -> None:
    request = post(asked[0].body, *JAVA, "Expect: 100-continue")
    with Client(server) as client:
        client.say(request[: -len(asked[0].body)])
        assert client.file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert client.file.readline() == b"\r\n"
        client.say(asked[0].body)
        asked[0].check(*client.hear())


@pytest.mark.parametrize("offer", ["websocket", "h2c, foo/2", "TLS/1.0"])
def test_other_offers_are_declined_too(server: LocalEndpoint, asked: list[Asked], offer: str) -> None:
    with Client(server) as client:
        client.say(post(asked[0].body, "Connection: keep-alive", "Connection: upgrade", f"Upgrade: {offer}"))
        asked[0].check(*client.hear())
        client.say(post(asked[1].body, "Connection: close", "Connection: upgrade", f"Upgrade: {offer}"))
        answer, content = client.hear()
        asked[1].check(answer, content)
        assert answer.headers["connection"] == "close"
        assert client.is_closed()


# -- Go ----------------------------------------------------------------------------------------------------------------

GO = ("User-Agent: Go-http-client/1.1", "Accept-Encoding: gzip", "Content-Type: application/json")


def test_go_sends_a_length_or_chunks(server: LocalEndpoint, asked: list[Asked]) -> None:
    head = "\r\n".join(
        [f"POST {INFER} HTTP/1.1", "Host: x", *GO[:1], "Transfer-Encoding: chunked", *GO[1:], "", ""]
    )
    with Client(server) as client:
        for number, one in enumerate(asked[:6]):
            if number % 2:
                client.say(post(one.body, *GO))
            else:
                request = head.encode() + chunked(one.body, [1, 50, 100_000][number // 2])
                client.say(*split(request, len(head) - 3, len(head) + 1, len(head) + 40, len(request) - 2))
            one.check(*client.hear())


def test_go_sends_trailers(server: LocalEndpoint, asked: list[Asked]) -> None:
    head = "\r\n".join(
        [f"POST {INFER} HTTP/1.1", "Host: x", "Trailer: Md5", "Transfer-Encoding: chunked", *GO, "", ""]
    )
    body = chunked(asked[0].body, 64)[:-2] + b"Md5: abc\r\nContent-Encoding: br\r\n\r\n"
    with Client(server) as client:
        client.say(head.encode() + body)
        asked[0].check(*client.hear())
        client.say(post(asked[1].body, *GO))
        asked[1].check(*client.hear())


def test_go_waits_to_be_told_to_go_on(server: LocalEndpoint, asked: list[Asked]) -> None:
    with Client(server) as client:
        for one in asked[:2]:
            request = post(one.body, *GO, "Expect: 100-continue")
            client.say(request[: -len(one.body)])
            assert client.file.readline() == b"HTTP/1.1 100 Continue\r\n"
            assert client.file.readline() == b"\r\n"
            client.say(one.body)
            one.check(*client.hear())


def test_a_client_that_expects_is_told_at_once_that_its_body_is_too_large(server: LocalEndpoint) -> None:
    with Client(server) as client:
        client.say(
            f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\nExpect: 100-Continue\r\n\r\n".encode()
        )
        answer, content = client.hear()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert b"more than" in content


# -- Rust, and others --------------------------------------------------------------------------------------------------


def test_rust_writes_names_in_lower_case_and_others_as_they_like(
    server: LocalEndpoint, asked: list[Asked]
) -> None:
    def written(name: str, body: bytes) -> bytes:
        return (
            f"POST {INFER} HTTP/1.1\r\n{name}: {len(body)}\r\nhost: 127.0.0.1:80\r\naccept: */*\r\n\r\n".encode()
            + body
        )

    with Client(server) as client:
        for one, name in zip(asked, ("content-length", "CONTENT-LENGTH", "cOnTeNt-LeNgTh"), strict=False):
            client.say(written(name, one.body))
            one.check(*client.hear())
        packed = "CONTENT-encoding: IDENTITY", "INFERENCE-header-Content-LENGTH: {}"
        client.say(post(asked[4].body, packed[0], packed[1].format(len(asked[4].body))))
        asked[4].check(*client.hear())


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Content-Type:",),
        ("Content-Type: text/plain",),
        ("Content-Type: application/x-www-form-urlencoded",),
        ("Content-Type: application/json; charset=utf-8",),
        ("Content-Encoding:",),
        ("Accept: application/xml", "Accept-Encoding: br, zstd", "Cookie: a=b"),
    ],
    ids=lambda headers: headers[0] if headers else "none",
)
def test_what_a_body_is_said_to_be_changes_nothing(
    server: LocalEndpoint, asked: list[Asked], headers: tuple[str, ...]
) -> None:
    with Client(server) as client:
        client.say(post(asked[0].body, *headers))
        asked[0].check(*client.hear())


def test_spaces_around_a_value_are_no_part_of_it(server: LocalEndpoint, asked: list[Asked]) -> None:
    body = asked[0].body
    length = f"Inference-Header-Content-Length: \t {len(body)} \t"
    request = post(gzip.compress(body), "Content-Encoding:  gzip \t", length, "Expect: 100-continue\t ")
    with Client(server) as client:
        client.say(request)
        assert client.file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert client.file.readline() == b"\r\n"
        asked[0].check(*client.hear())


def test_a_coding_that_is_named_twice_is_not_taken_for_one(server: LocalEndpoint, asked: list[Asked]) -> None:
    with Client(server) as client:
        client.say(post(asked[0].body, "Content-Encoding: gzip", "Content-Encoding: identity"))
        answer, content = client.hear()
        assert answer.status == 415
        assert b"gzip, identity" in content


@pytest.mark.parametrize("target", ["http://models.example:8080{}", "HTTP://x{}", "{}?trace=1", "{}/?a=/b"])
def test_a_target_may_be_a_whole_url(server: LocalEndpoint, asked: list[Asked], target: str) -> None:
    with Client(server) as client:
        client.say(post(asked[0].body, path=target.format(INFER)))
        asked[0].check(*client.hear())
        client.say(b"GET http://x/v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.hear("GET")[1] == b'{"live":true}'
        client.say(b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.hear("GET")[0].status == 404


@pytest.mark.parametrize(("headers", "stays"), [((), False), (("Connection: keep-alive",), True)])
def test_http_1_0_is_kept_alive_where_that_is_asked_for(
    server: LocalEndpoint, asked: list[Asked], headers: tuple[str, ...], stays: bool
) -> None:
    with Client(server) as client:
        client.say(post(asked[0].body, *headers, version="1.0"))
        answer, content = client.hear()
        asked[0].check(answer, content)
        assert answer.headers["connection"] == ("keep-alive" if stays else "close")
        if stays:
            client.say(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
            assert client.hear("GET")[1] == b'{"live":true}'
        assert client.is_closed()


def test_http_1_0_is_not_told_to_go_on_nor_led_to_another_version(
    server: LocalEndpoint, asked: list[Asked]
) -> None:
    for headers in (("Expect: 100-continue",), JAVA):
        with Client(server) as client:
            client.say(*split(post(asked[0].body, *headers, version="1.0"), 300))
            answer, content = client.hear()
            asked[0].check(answer, content)
            assert answer.headers["connection"] == "close"
            assert client.is_closed()


def test_requests_in_a_pipeline_are_answered_in_their_order(
    server: LocalEndpoint, asked: list[Asked]
) -> None:
    # Large ones are computed in a thread, small ones where they are read: neither overtakes another.
    large = json.loads(asked[0].body)
    for tensor in large["inputs"]:
        tensor |= {"data": tensor["data"] * 2000, "shape": [4000]}
    slow = Asked(json.dumps(large).encode(), np.tile(asked[0].wanted, (2000, 1)))
    order = [slow, *asked[:5], slow, *asked[5:]] * 3
    with Client(server) as client:
        client.say(b"".join(post(one.body) for one in order[:-1]) + post(order[-1].body, "Connection: close"))
        for one in order:
            one.check(*client.hear())
        assert client.is_closed()


def test_what_follows_the_last_request_of_a_connection_is_not_answered(
    server: LocalEndpoint, asked: list[Asked]
) -> None:
    with Client(server) as client:
        client.say(post(asked[0].body, "Connection: close") + b"\r\n" + post(asked[1].body))
        asked[0].check(*client.hear())
        assert client.is_closed()


def test_a_client_may_end_its_half_and_may_send_empty_lines(
    server: LocalEndpoint, asked: list[Asked]
) -> None:
    with Client(server) as client:
        client.say(b"\r\n" + post(asked[0].body) + b"\r\n\r\n" + post(asked[1].body))
        asked[0].check(*client.hear())
        client.socket.shutdown(socket.SHUT_WR)
        asked[1].check(*client.hear())
        assert client.is_closed()


def test_head_has_the_head_of_get_and_no_body(server: LocalEndpoint) -> None:
    with Client(server) as client:
        for path in ("/v2", "/v2/models/rohr", "/v2/models/nobody", "/metrics", "/docs"):
            found = []
            for method in ("GET", "HEAD"):
                client.say(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                answer, content = client.hear(method)
                found.append((answer.status, answer.headers["content-type"]))
                assert bool(content) == (method == "GET")
            assert found[0] == found[1]


@pytest.mark.parametrize(
    "request_",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",  # a client that knows that this is HTTP/2
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # one that speaks TLS
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nContent-Length: -2\r\n\r\n{}",
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
    ],
)
def test_what_is_no_request_is_told_so_and_ends(server: LocalEndpoint, request_: bytes) -> None:
    with Client(server) as client:
        client.say(request_)
        answer, content = client.hear()
        assert (answer.status, answer.headers["connection"]) == (400, "close")
        assert b"no HTTP request" in content
        assert client.is_closed()
