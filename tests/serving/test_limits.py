"""What clients may take: time for heads and bodies, bytes that wait, connections of one address; and what happens to others."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from lepton_airflow.serving.http import ConnectionLimits, Listener, Request, Response, address_of
from lepton_airflow.serving.worker import Queue

TIGHT = ConnectionLimits(
    body_bytes=400_000,
    waiting_bytes=1_600_000,
    head_bytes=4096,
    head_s=0.5,
    body_s=1.0,
    write_s=1.0,
    idle_s=1.0,
)

CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


class Server:
    """A listener in a thread, which answers with what it was sent; ``/later`` when the test says so."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.socket.getsockname()[1]
        self.limits = limits
        self.refused: list[int] = []
        self.later: list[Callable[[], None]] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.end = asyncio.Event()
        self.listener = Listener(self.limits, self._answer, self.refused.append)
        self.listener.listen(self.socket)
        self._ready.set()
        await self.end.wait()
        self.listener.close()

    def _answer(self, request: Request, later: Callable[[Response], None]) -> Response | None:
        response = Response(200, request.body or request.path.encode(), "text/plain")
        if request.path == "/later":
            self.later.append(lambda: self.loop.call_soon_threadsafe(later, response))
            return None
        if request.path == "/slow":
            time.sleep(0.005)
        if request.path == "/large":
            return Response(200, b"x" * 20_000_000)
        return response

    def connect(self, address: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10, source_address=(address, 0))

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.end.set)
        self._thread.join(10)
        self.socket.close()


@contextmanager
def serving(**changes: Any) -> Iterator[Server]:
    from dataclasses import replace

    server = Server(replace(TIGHT, **changes))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


def said(client: socket.socket) -> bytes:
    """All that the server says until it ends the connection."""
    found = b""
    try:
        while part := client.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_good(server: Server, address: str = "127.0.0.9") -> float:
    """Ask as a client that does no harm; returns how long it took [seconds]."""
    started = time.monotonic()
    with server.connect(address) as client:
        client.sendall(b"GET /good HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert said(client).endswith(b"\r\n\r\n/good")
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 5000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 400_000, 431),  # a header that never ends
        (b"POST / HTTP/1.1\r\nContent-Length: 400001\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b"a" * 0x8000 + b"\r\n" + b"60000\r\n" + b"a" * 0x60000, 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", 405),
        (b"\x16\x03\x01\x02\x00\x01", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x00" * 100, 400),
        (b"GET / HTTP/1.1\r\nHost: x", 408),
        (b"G", 408),
        (b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc", 408),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
        (CHUNKED + b"2\r\nab\r\n" * 60_000 + b"0\r\n\r\n", 400),
        (CHUNKED + b"1;" + b"x" * 200_000 + b"\r\na\r\n0\r\n\r\n", 400),
        (CHUNKED + b"1;x=y\r\na\r\n" * 20_000, 400),
        (CHUNKED + b"1\r\na\r\n0\r\n" + b"X: y\r\n" * 200_000, 431),  # trailers without end
        (CHUNKED + b"1\r\na\r\n0\r\n" + b"X: " + b"y" * 200_000, 400),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else str(value),
)  # fmt: skip
def test_what_is_no_request_within_the_limits_is_refused_and_the_connection_ends(
    server: Server, sent: bytes, status: int
) -> None:
    with server.connect() as client:
        client.sendall(sent)
        answer = said(client)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"connection: close" in answer
    assert b'{"error":"' in answer
    assert server.refused[-1] == status
    is_good(server)


def test_a_silent_connection_is_ended(server: Server) -> None:
    with server.connect() as client:
        started = time.monotonic()
        assert said(client) == b""
        assert time.monotonic() - started < 2


def test_a_connection_that_was_answered_is_kept_and_ended_when_nothing_more_comes(server: Server) -> None:
    with server.connect() as client:
        for _ in range(3):
            client.sendall(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1000).endswith(b"/a")
            time.sleep(0.3)
        assert said(client) == b""


def test_a_head_byte_by_byte_does_not_buy_time(server: Server) -> None:
    with server.connect() as client:
        started = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT011, PT012 - reset, or a broken pipe
            for byte in b"GET / HTTP/1.1\r\n" + b"a" * 100:
                client.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - started < 4


def test_bodies_on_their_way_of_one_address_leave_room_for_others(server: Server) -> None:
    clients = [server.connect("127.0.0.2") for _ in range(4)]
    for client in clients:
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 390000\r\n\r\n" + b"a" * 300_000)
    # Half of 1,600,000 bytes may wait for one address: two of the four are told to come back.
    answers = [said(client)[:12] for client in clients]
    assert sorted(answers) == [b"HTTP/1.1 408"] * 2 + [b"HTTP/1.1 503"] * 2
    assert server.listener.waiting == 0
    assert not server.listener.waiting_by_address
    is_good(server)


def test_one_address_takes_no_connection_from_others() -> None:
    with serving(connections=30, per_address=20, head_s=30.0) as server:
        clients = [server.connect("127.0.0.2") for _ in range(100)]
        assert is_good(server) < 2
        assert len(server.listener.connections) <= 21
        for client in clients:
            client.close()


def test_a_client_that_asks_keeps_its_connection_among_silent_ones_of_its_address() -> None:
    ways = {"connections": 30, "per_address": 10, "head_s": 30.0, "idle_s": 30.0}
    with serving(**ways) as server, server.connect() as good:
        silent = []
        for _ in range(30):
            silent.append(server.connect())
            good.sendall(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
            assert good.recv(1000).endswith(b"/a")
        for client in silent:
            client.close()


def test_a_client_that_does_not_read_is_ended(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(2.5)
        assert len(said(client)) < 20_000_000
    is_good(server)


def test_requests_in_a_row_are_answered_in_their_order_also_when_the_first_takes_long(server: Server) -> None:
    with server.connect() as client:
        client.sendall(
            b"POST /later HTTP/1.1\r\nContent-Length: 5\r\n\r\nfirst"
            + b"".join(b"GET /%d HTTP/1.1\r\n\r\n" % n for n in range(40))
            + b"GET /last HTTP/1.1\r\nConnection: close\r\n\r\n"
        )
        while not server.later:
            time.sleep(0.01)
        time.sleep(0.2)
        server.later.pop()()
        bodies = [part.rpartition(b"\r\n\r\n")[2] for part in said(client).split(b"HTTP/1.1 200")]
    assert bodies == [b"", b"first", *(b"/%d" % n for n in range(40)), b"/last"]


def test_a_client_that_asks_on_and_does_not_read_is_read_no_further_and_ended(server: Server) -> None:
    with server.connect() as client:
        client.settimeout(0.2)
        sent = 0
        started = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT011, PT012 - first it takes no more, then it is reset
            while time.monotonic() - started < 10:
                try:
                    sent += client.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
                except TimeoutError:
                    continue
        assert time.monotonic() - started < 5
        assert sent < 20_000_000
    is_good(server)


def test_requests_in_a_row_of_one_client_do_not_hold_up_others() -> None:
    with serving(waiting_bytes=100_000_000) as server, server.connect() as busy:
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                busy.recv(1_000_000)

        def ask() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    busy.sendall(b"GET /slow HTTP/1.1\r\n\r\n" * 5000)

        threads = [threading.Thread(target=each, daemon=True) for each in (read, ask)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert max(is_good(server) for _ in range(5)) < 1.5  # a few of 5,000 slow ones, not all
        stop.set()
        busy.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)


def test_many_connections_of_one_address_do_not_hold_up_another() -> None:
    with serving() as server:
        clients = [server.connect("127.0.0.2") for _ in range(100)]
        for client in clients:
            client.sendall(b"GET /slow HTTP/1.1\r\n\r\n" * 10)  # 5 s in all
        time.sleep(0.2)
        assert max(is_good(server) for _ in range(3)) < 1.5
        for client in clients:
            client.close()


def test_requests_that_wait_for_an_answer_count_as_waiting_bytes(server: Server) -> None:
    body = b"a" * 390_000
    whole = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    clients = [server.connect("127.0.0.2") for _ in range(4)]
    for client in clients:
        client.sendall(b"GET /later HTTP/1.1\r\n\r\n" + whole)
    until(lambda: len(server.later) == 4)
    time.sleep(0.5)
    assert 500_000 < server.listener.waiting <= 800_000
    is_good(server)
    for _ in range(4):
        server.later.pop()()
    for client in clients:
        assert b"/later" in client.recv(1000)
        client.close()
    until(lambda: server.listener.waiting == 0)


def test_answers_that_clients_do_not_take_count_as_waiting_bytes() -> None:
    with serving(waiting_bytes=50_000_000, write_s=30.0) as server:
        clients = [server.connect("127.0.0.2") for _ in range(4)]
        for client in clients:
            client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(3.5)
        assert 0 < server.listener.waiting <= 25_000_000
        is_good(server)
        for client in clients:
            client.close()


def test_an_answer_for_which_there_is_no_room_is_whole_and_the_last_one() -> None:
    with serving(waiting_bytes=20_000_000, write_s=30.0) as server, server.connect("127.0.0.2") as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.5)
        found = bytearray()
        while part := client.recv(2_000_000):
            found += part
            time.sleep(0.2)  # slowly
        head, _, body = bytes(found).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert len(body) == 20_000_000  # and no refusal of something that nobody has asked
        assert server.refused == []


@pytest.mark.parametrize("after", [b"", b"x", b"GET /later HTTP/1.1\r\n\r\n"])
def test_an_answer_that_ends_the_connection_is_whole_whatever_came_after_the_request(
    server: Server, after: bytes
) -> None:
    with server.connect() as client:
        client.sendall(b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n" + after)
        time.sleep(0.3)
        assert len(said(client)) > 20_000_000


def test_an_answer_on_its_way_is_no_idle_connection() -> None:
    with serving(write_s=30.0, waiting_bytes=100_000_000) as server, server.connect() as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1.5)  # longer than a client that was just answered has
        server.loop.call_soon_threadsafe(server.listener.close_idle)
        found = 0
        while found < 20_000_000 and (part := client.recv(1_000_000)):
            found += len(part)
        assert found > 20_000_000


def test_in_the_drain_one_that_asks_on_and_does_not_read_is_ended() -> None:
    with serving(write_s=0.5, waiting_bytes=100_000_000) as server, server.connect() as client:
        client.sendall(b"GET /later HTTP/1.1\r\n\r\nGET /large HTTP/1.1\r\n\r\n")
        until(lambda: bool(server.later))
        server.listener.draining = True
        server.later.pop()()
        until(lambda: not server.listener.connections)


def test_nobody_is_told_to_go_on_before_the_answer_to_what_was_asked_before(server: Server) -> None:
    with server.connect() as client:
        client.sendall(
            b"GET /later HTTP/1.1\r\n\r\nPOST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n"
        )
        until(lambda: bool(server.later))
        time.sleep(0.1)
        server.later.pop()()
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_of_ipv6_a_network_counts_as_one_address(host: str, address: str) -> None:
    assert address_of(host) == address


def test_a_body_in_small_chunks_is_read() -> None:
    # 400,000 bytes in chunks of 20, as programs write that send what an encoder gives
    with serving(body_bytes=8_000_000, body_s=30.0) as server, server.connect() as client:
        client.sendall(CHUNKED + b"14\r\n01234567890123456789\r\n" * 20_000 + b"0\r\n\r\n")
        answer = b""
        while len(answer) < 400_000:
            answer += client.recv(1_000_000)
        assert answer.endswith(b"01234567890123456789" * 20_000)


def test_a_wrong_request_after_a_good_one_leaves_the_good_one_its_answer(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"POST /later HTTP/1.1\r\nContent-Length: 5\r\n\r\nfirst" + b"nonsense\r\n\r\n")
        while not server.later:
            time.sleep(0.01)
        server.later.pop()()
        answer = said(client)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"first" in answer
    assert b"HTTP/1.1 400" in answer


def test_a_client_that_leaves_is_forgotten(server: Server) -> None:
    client = server.connect()
    client.sendall(b"POST /later HTTP/1.1\r\nContent-Length: 5\r\n\r\nfirst")
    while not server.later:
        time.sleep(0.01)
    client.close()
    time.sleep(0.2)
    server.later.pop()()
    is_good(server)
    time.sleep(0.1)
    assert len(server.listener.connections) == 0


def test_a_large_job_is_overtaken_by_small_ones_and_not_for_ever() -> None:
    gate, order = threading.Event(), []
    queue = Queue(1, 64)
    queue.put("a", 0.0, lambda: gate.wait(10))
    time.sleep(0.05)
    queue.put("a", 1.0, lambda: order.append("large"))
    queue.put("a", 0.001, lambda: order.append("small"))
    queue.put("a", 10.0, lambda: order.append("huge"))
    queue.put("a", 0.001, lambda: order.append("small"))
    done = threading.Event()
    queue.put("a", 60.0, done.set)
    gate.set()
    assert done.wait(10)
    assert order == ["small", "small", "large", "huge"]


@contextmanager
def held(threads: int, places: int) -> Iterator[tuple[Queue, threading.Event]]:
    """A queue whose threads wait for a gate."""
    queue, gate = Queue(threads, places), threading.Event()
    for _ in range(threads):
        assert queue.put("first", 0.0, lambda: gate.wait(10), print)
    time.sleep(0.05)
    yield queue, gate


def test_one_address_has_as_much_time_of_the_threads_as_another_whatever_it_sends() -> None:
    order: list[str] = []
    with held(1, 100) as (queue, gate):

        def job(name: str, seconds: float) -> None:
            queue.put(name, seconds, lambda: (time.sleep(seconds), order.append(name)), print)

        for _ in range(20):
            job("many large", 0.05)
        for _ in range(20):
            job("many small", 0.01)
        job("one", 0.05)
        done = threading.Event()
        queue.put("last", 0.0, done.set)
        gate.set()
        assert done.wait(10)
        time.sleep(1.0)
    assert "one" in order[:6]
    # In the time of four large ones of one address, the other has all but a few of its own.
    fourth = [i for i, name in enumerate(order) if name == "many large"][3]
    assert order[:fourth].count("many small") >= 10


def test_an_address_that_asks_again_and_again_does_not_wait_behind_what_another_has_sent_before() -> None:
    with held(1, 100) as (queue, gate):
        for _ in range(60):
            queue.put("many", 0.02, lambda: time.sleep(0.02), print)
        gate.set()
        waits = []
        for _ in range(10):
            done, began = threading.Event(), time.monotonic()
            queue.put("one", 0.02, done.set, print)
            assert done.wait(10)
            waits.append(time.monotonic() - began)
    assert sorted(waits)[5] < 0.1


def test_an_address_that_has_more_places_than_another_loses_one_to_it() -> None:
    lost: Counter[str] = Counter()

    def put(queue: Queue, name: str) -> bool:
        return queue.put(name, 1.0, lambda: None, lambda: lost.update([name]))

    with held(1, 9) as (queue, gate):
        assert [put(queue, "a") for _ in range(10)] == [True] * 8 + [False] * 2
        assert [put(queue, "b") for _ in range(6)] == [True] * 4 + [False] * 2
        assert lost == {"a": 4}
        assert put(queue, "c")
        assert lost.total() == 5
        for _ in range(9):
            assert queue.put("batches", 0.0, lambda: None)  # which take no place
        assert put(queue, "d")
        gate.set()
        time.sleep(0.2)
        assert [put(queue, "a") for _ in range(9)] == [True] * 9


def test_a_wrong_request_after_a_large_answer_does_not_cut_it() -> None:
    with serving(write_s=10.0, waiting_bytes=100_000_000) as server, server.connect() as client:
        client.sendall(b"GET /large HTTP/1.1\r\n\r\nnonsense\r\n\r\n")
        time.sleep(3.0)
        found = said(client)
    assert found.count(b"HTTP/1.1 ") == 2
    assert len(found) > 20_000_000


def test_a_slow_client_has_no_more_time_for_its_last_answer_when_it_goes_on_reading() -> None:
    with serving(write_s=1.0, idle_s=60.0) as server, server.connect() as client:
        client.sendall(b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n")
        until(lambda: bool(server.listener.waiting))
        (connection,) = server.listener.connections
        server.loop.call_soon_threadsafe(connection.resume_writing)
        time.sleep(0.2)
        assert connection.deadline < time.monotonic() + 2


def test_connections_without_end_do_not_hold_up_the_end_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = []
    with serving() as server:
        monkeypatch.setattr(
            server.listener, "_accept", lambda _: accepted.append(1) or len(accepted) < 100_000
        )
        server.loop.call_soon_threadsafe(partial(server.listener.stop_accepting, for_all=True))
        time.sleep(0.5)
    assert len(accepted) == 1024
