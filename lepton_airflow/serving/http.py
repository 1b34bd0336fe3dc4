"""HTTP/1.1 connections of a worker: bytes into whole requests, answers into bytes, and limits on both.

llhttp (by httptools) parses. What this module adds is what no Python server offers and what a model server that anybody may
call needs: limits on the head of a request, on the time that its head and its body may take, on the bytes that wait in
memory, and on the connections of one address. A request is handed on when its body is there, so a slow client holds a
connection and nothing else. docs/decisions/0016 says what was measured against uvicorn and granian.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache, partial
from http import HTTPStatus
from io import BytesIO
from ipaddress import IPv6Address, IPv6Network
from typing import cast

import httptools

log = logging.getLogger(__name__)

_BACKLOG = 1024  # connections that may wait to be accepted
_LEAVE_S = 0.002  # for which a connection is left to another worker
_SWEEP_S = 0.25  # between two looks at the time of connections
_LINGER_S = 2.0  # for which what a refused client still sends is thrown away, so that it reads its answer
_JUST_S = 1.0  # after which a client that was accepted, or answered, should have asked


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What the connections of one worker may take.

    :ivar body_bytes: of one request's body.
    :ivar waiting_bytes: of all requests that have not arrived whole or wait for the answer to the one before them, and of
        answers that their clients do not take; one address may have half of them.
    :ivar head_bytes: of one request line and its headers.
    :ivar head_s: for a head, from its first byte or from the connection on.
    :ivar body_s: for a body.
    :ivar write_s: for a client to take its answer.
    :ivar idle_s: between an answer and the next request; longer than load balancers keep an idle connection, so that none
        sends a request into one that was just closed.
    :ivar connections: at a time. When there are more, the one that has waited longest for a request is closed.
    :ivar per_address: connections of one client address, in the same way.
    """

    body_bytes: int = 8 * 2**20
    waiting_bytes: int = 256 * 2**20
    head_bytes: int = 32 * 1024
    head_s: float = 10.0
    body_s: float = 30.0
    write_s: float = 30.0
    idle_s: float = 75.0
    connections: int = 1000
    per_address: int = 250


@dataclass(slots=True)
class Request:
    """A whole request. ``headers`` has lower-case names; the values of a header that is sent twice are joined by a comma."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    started: float = 0.0  # time.perf_counter() when its head was there
    address: str = ""
    keep_alive: bool = True


@dataclass(slots=True)
class Response:
    """An answer; ``close`` ends the connection after it."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    close: bool = False


def refusal(
    status: int, sentence: str, headers: Mapping[str, str] | None = None, *, close: bool = False
) -> Response:
    """An answer that says in one sentence why there is none."""
    import msgspec

    return Response(status, msgspec.json.encode({"error": sentence}), headers=headers or {}, close=close)


# Called with each whole request; gives the answer, or None and calls the second argument with it later, in the loop's thread.
Handler = Callable[[Request, Callable[[Response], None]], Response | None]


class Turns:
    """Work for the event loop's thread: a piece of each address in turn, and only a little before the loop looks for more."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, deque[Callable[[], object]]] = {}
        self._is_next = False

    def add(self, address: str, work: Callable[[], object]) -> None:
        """Have some work done when it is the turn of an address."""
        self._waiting.setdefault(address, deque()).append(work)
        if not self._is_next:
            self._is_next = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        until = time.perf_counter() + _TURN_S
        try:
            while self._waiting:
                address = next(iter(self._waiting))
                line = self._waiting.pop(address)
                work = line.popleft()
                if line:
                    self._waiting[address] = line  # behind all others
                work()
                if time.perf_counter() > until:
                    break
        finally:
            self._is_next = bool(self._waiting)
            if self._is_next:
                self._loop.call_soon(self._go_on)


class Listener:
    """Accepts connections from a socket that several workers may share.

    :param handler: answers requests.
    :param refused: called with the status of each request that ended before the handler saw it.
    :param leaves: called with the number of connections here; whether the next one is for another worker, which has fewer.
    """

    def __init__(
        self,
        limits: ConnectionLimits,
        handler: Handler,
        refused: Callable[[int], None] = lambda _: None,
        leaves: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self.limits = limits
        self.leaves = leaves
        self.handler = handler
        self.refused = refused
        self.draining = False
        self.connections: dict[Connection, None] = {}  # in the order in which they came
        self.by_address: Counter[str] = Counter()
        self.waiting = 0  # bytes of requests and answers; see ConnectionLimits.waiting_bytes
        self.waiting_by_address: Counter[str] = Counter()
        self._sockets: list[socket.socket] = []
        self._loop = asyncio.get_running_loop()
        self.turns = Turns()
        self._tasks: set[asyncio.Task[object]] = set()
        self._sweeper = self._loop.create_task(self._sweep())

    def listen(self, listener: socket.socket) -> None:
        """Accept what comes to a listening socket."""
        listener.setblocking(False)
        self._sockets.append(listener)
        self._loop.add_reader(listener, self._offered, listener)

    def _offered(self, listener: socket.socket) -> None:
        """Accept a connection, or leave it to another worker for a moment."""
        if self.leaves(len(self.connections) + len(self._tasks)):
            self._loop.remove_reader(listener)
            self._loop.call_later(_LEAVE_S, self._take, listener)
        else:
            self._accept(listener)

    def _take(self, listener: socket.socket) -> None:
        """Accept a connection that no other worker has taken."""
        if listener in self._sockets:
            self._loop.add_reader(listener, self._offered, listener)
            self._accept(listener)

    def _accept(self, listener: socket.socket) -> bool:
        """Accept one connection, if there is one."""
        try:
            connected, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False  # another worker took it, or it is gone
        except OSError as error:  # no file or no memory is left: the connections that end give some back
            log.warning("no connection was accepted: %s", error)
            self._loop.remove_reader(listener)
            self._loop.call_later(0.1, self._again, listener)
            return False
        connected.setblocking(False)
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._loop.connect_accepted_socket(lambda: Connection(self), connected))
        self._tasks.add(task)
        task.add_done_callback(self._accepted)
        return True

    def _accepted(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a client that is gone already

    def _again(self, listener: socket.socket) -> None:
        if listener in self._sockets:
            self._loop.add_reader(listener, self._offered, listener)

    @property
    def accepting(self) -> bool:
        """Whether a connection was accepted that is not made yet."""
        return bool(self._tasks)

    def stop_accepting(self, *, for_all: bool = False) -> None:
        """Accept no more connections here; ``for_all``: take all that wait, and close the sockets for other workers, too."""
        for listener in self._sockets:
            self._loop.remove_reader(listener)
            if for_all:
                for _ in range(_BACKLOG):
                    if not self._accept(listener):
                        break
                with suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)  # at once, or what comes in between would be reset
        self._sockets.clear()

    def close_idle(self) -> None:
        """Close the connections on which no request is under way, unless they came, or were answered, just now."""
        before = time.monotonic() - _JUST_S
        for connection in list(self.connections):
            if connection.idle and connection.since < before:
                connection.abandon()

    def close(self) -> None:
        """End all connections at once."""
        self.stop_accepting()
        self._sweeper.cancel()
        for connection in list(self.connections):
            connection.abandon()

    def make_room(self, newest: Connection) -> None:
        """Close the connection that has waited longest for a request, if there are too many of an address or in all."""
        if self.by_address[newest.address] > self.limits.per_address:
            address = newest.address
        elif len(self.connections) > self.limits.connections:
            address = self.by_address.most_common(1)[0][0]  # one that opens many takes none from others
        else:
            return
        idle = [c for c in self.connections if c.address == address and not c.busy]
        min(idle, key=lambda c: (c.sends, c.since), default=newest).abandon()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.leaves(len(self.connections))  # so that others know
            now = time.monotonic()
            for connection in [c for c in self.connections if c.deadline < now]:
                try:
                    connection.overdue()
                except Exception:  # the limits of the others are to hold
                    log.exception("a connection could not be ended")
                    connection.deadline = math.inf


class Connection(asyncio.Protocol):
    """One client's connection: its requests one after the other."""

    transport: asyncio.Transport

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.limits = listener.limits
        self.address = ""
        self.deadline = 0.0
        self.since = 0.0  # when it last asked or was answered
        self.busy = False  # a request is being answered
        self._ended = False  # nothing that comes is read any more
        self._half_closed = False  # the client sends nothing more
        self._writing = False  # the client was slow to take an answer
        self._state = _IDLE
        self._head_bytes = 0
        self._headers = 0
        self._body_bytes = 0
        self._body = BytesIO()  # one block, however small its pieces are
        self._rest = _NOTHING  # what came and was not parsed
        self._open = 0  # bytes of an unfinished request
        self._ready_bytes = 0
        self._held = 0  # bytes that count as waiting
        self._request: Request | None = None
        self._ready: deque[Request] = deque()
        self._refusal: Response | None = None
        # Bytes of an answer for which there was no room, and until when they may be taken.
        self._untaken = (0, 0.0)
        self._parser = httptools.HttpRequestParser(self)

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        under_way = self.busy or self._ready or self._rest or self._ended or self.sends
        return not under_way and self._state == _IDLE

    @property
    def sends(self) -> bool:
        """Whether a part of an answer has not been taken."""
        return self.transport.get_write_buffer_size() > 0

    # -- what the event loop says ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self.transport = cast("asyncio.Transport", transport)  # which uvloop's is in all but name
        peer = transport.get_extra_info("peername")
        self.address = address_of(peer[0]) if isinstance(peer, tuple) else "local"
        self.listener.connections[self] = None
        self.listener.by_address[self.address] += 1
        self.since = time.monotonic()
        self.deadline = self.since + self.limits.head_s
        self.listener.make_room(self)

    def connection_lost(self, _: Exception | None) -> None:
        """The client is gone, or was ended."""
        # This and its parser know each other: what they held would wait for Python's collector.
        self._forget()
        self._ready.clear()
        self._ready_bytes = 0
        self._writing = False
        self._hold()
        if self.listener.connections.pop(self, self) is None:
            count_down(self.listener.by_address, self.address, 1)

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        if not self._ended:
            self._rest = memoryview(bytes(self._rest) + data if self._rest else data)
            self._go_on()

    def eof_received(self) -> bool:
        """The client sends no more; what it has asked is answered."""
        self._half_closed = True
        return self.busy or bool(self._rest)

    def pause_writing(self) -> None:
        """The client does not take its answers, so nothing more is read of it."""
        self._writing = True
        self.transport.pause_reading()

    # -- what the parser finds ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self._state, self._head_bytes, self._headers, self._body_bytes = _HEAD, 0, 0, 0
        self._request = Request("", "", address=self.address)
        self._set_deadline()

    def on_url(self, url: bytes) -> None:
        """A piece of the path."""
        assert self._request is not None
        self._count(len(url))
        self._request.path += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header, or one that follows a body in chunks."""
        assert self._request is not None
        self._count(len(name) + len(value) + 4)
        self._headers += 1
        if self._headers > _HEADERS:
            self._refuse(431, f"the request has more than {_HEADERS} headers, the limit.")
        if self._state == _HEAD:
            headers, key, text = (
                self._request.headers,
                name.decode("latin-1").lower(),
                value.decode("latin-1").rstrip(" \t"),  # those before it the parser takes off
            )
            headers[key] = f"{headers[key]}, {text}" if key in headers else text

    def on_headers_complete(self) -> None:
        """The head is there."""
        request = self._request
        assert request is not None
        self._state = _BODY
        request.method = self._parser.get_method().decode("latin-1")
        if not request.path.startswith("/"):
            request.path = _path(request.path)
        request.keep_alive = self._parser.should_keep_alive()
        request.started = time.perf_counter()
        self._set_deadline()
        if request.method == "CONNECT":
            self._refuse(405, "CONNECT is for proxies, this is none.")
        if int(request.headers.get("content-length") or 0) > self.limits.body_bytes:
            self._refuse_large()
        expects = request.headers.get("expect", "").lower() == "100-continue"
        if expects and not (self.busy or self._ready) and self._parser.get_http_version() != "1.0":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, part: bytes) -> None:
        """A piece of the body."""
        self._body_bytes += len(part)
        if self._body_bytes > self.limits.body_bytes:
            self._refuse_large()
        self._body.write(part)

    def on_message_complete(self) -> None:
        """A request is whole."""
        request = self._request
        assert request is not None
        if self._parser.should_upgrade():
            return
        self._request, self._state = None, _IDLE
        request.body = self._body.getvalue()
        self._body, self._open = BytesIO(), 0
        self._ready.append(request)
        self._ready_bytes += _REQUEST + len(request.body)

    # -- answers -----------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Unless a request is being answered, read on for the next, which is handed on when it is the turn of the address."""
        while self._rest and not (self.busy or self._ready or self._ended):
            piece, self._rest = self._rest[:_PIECE], self._rest[_PIECE:]
            self._parse(piece)
        if self._ready and not (self.busy or self._writing):
            self.busy, self.deadline = True, math.inf
            self.listener.turns.add(self.address, self._hand_on)
        self._hold()
        if self._refusal:
            self._forget()
            self._hold()
            if not self.busy and not self._ready:
                self._end_with(self._refusal)
        elif self._rest or self._writing:
            self.transport.pause_reading()
        elif self._half_closed and not self.busy:
            self.transport.close()
        else:
            self.transport.resume_reading()

    def _hand_on(self) -> None:
        """Have the next request answered."""
        if self.transport.is_closing():
            return
        request = self._ready.popleft()
        self._ready_bytes -= _REQUEST + len(request.body)
        self.since = time.monotonic()
        try:
            response = self.listener.handler(request, partial(self._respond_later, request))
        except Exception:
            log.exception("%s %s", request.method, request.path[:100])
            self.abandon()
            return
        if response is None:
            self._hold()
        else:
            self._respond_later(request, response)

    def _parse(self, piece: memoryview) -> None:
        before, size = self._state, len(piece)
        data: bytes | memoryview = piece
        while data:
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                # An offer to go on in another protocol, such as h2c, is declined by an answer in this one. The parser stops
                # before the body, so the request is read once more without the offer.
                assert self._request is not None
                version = self._parser.get_http_version()
                data = _head_without_offer(self._request, version) + data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserCallbackError:
                break  # raised by _refuse, in which all is said
            except httptools.HttpParserError as error:
                self._refusal = self._refusal or refusal(400, f"this is no HTTP request: {error}.")
                break
        if self._state != _IDLE and not self._refusal:
            self._open += size
            self._check_frame(is_head=before == self._state == _HEAD)
        if self._refusal:
            self._ended = True

    def _respond_later(self, request: Request, response: Response) -> None:
        self._respond(request, response)
        self._go_on()

    def _respond(self, request: Request, response: Response) -> None:
        self.busy, self.since = False, time.monotonic()
        if self.transport.is_closing():
            return
        last = self._half_closed and not self._ready and not self._rest
        close = response.close or not request.keep_alive or self.listener.draining or last
        self.transport.write(_as_bytes(response, close=close, without_body=request.method == "HEAD"))
        if close:
            self._forget()
            self._ready.clear()
            self._ready_bytes = 0
            self.deadline = self.since + self.limits.write_s
            self.transport.close()  # after what was written
        else:
            self._set_deadline()

    def _set_deadline(self) -> None:
        if self.busy:
            return
        seconds = {_HEAD: self.limits.head_s, _BODY: self.limits.body_s}.get(self._state, self.limits.idle_s)
        if self._writing:
            seconds = self.limits.write_s
        elif self._ended:
            seconds = _LINGER_S
        self.deadline = time.monotonic() + seconds

    def resume_writing(self) -> None:
        """The client takes its answers again."""
        self._writing = False
        if self.transport.is_closing():
            self._hold()
            return
        self._set_deadline()
        self._go_on()

    def overdue(self) -> None:
        """Its time is over."""
        untaken, until = self._untaken
        if (left := self.transport.get_write_buffer_size()) < untaken and time.monotonic() < until:
            self._untaken, self.deadline = (left, until), time.monotonic() + _LINGER_S
            return
        if self._state == _IDLE or self._ended or self._writing:
            self.abandon()
            return
        what, seconds = (
            ("the head of the request", self.limits.head_s)
            if self._state == _HEAD
            else ("the request", self.limits.body_s)
        )
        self._end_with(refusal(408, f"{what} did not arrive within {seconds:g} s."))

    def abandon(self) -> None:
        """End the connection without a word."""
        self._forget()
        self.transport.abort()

    def _end_with(self, response: Response) -> None:
        """Answer a request that was not read, and end the connection when the client has had time to read that."""
        self._forget()
        self._hold()
        self._refusal = None
        if self.transport.is_closing():
            return  # after an answer that said so, whose time is limited
        self.listener.refused(response.status)
        self.transport.write(_as_bytes(response, close=True))
        with suppress(OSError):  # the client may be gone
            self.transport.write_eof()
        self._state = _IDLE
        self._set_deadline()

    # -- limits ------------------------------------------------------------------------------------------------------

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.limits.head_bytes:
            self._refuse(431, self._LARGE_HEAD.format(self.limits.head_bytes))

    _LARGE_HEAD = "the head of the request has more than {} bytes, the limit."

    def _check_frame(self, *, is_head: bool) -> None:
        """Limit what no callback of the parser tells. Only of the first piece is not known where the request began."""
        limits, around = self.limits, self._open - self._body_bytes - _PIECE
        if is_head and around > limits.head_bytes:
            self._refusal = refusal(431, self._LARGE_HEAD.format(limits.head_bytes))
        elif around > limits.head_bytes + _FRAMES + self._body_bytes // 4:
            self._refusal = refusal(
                400,
                f"what is around the chunks of the body takes more than {_FRAMES} bytes and a quarter of the body: send larger "
                "chunks without extensions.",
            )

    def _hold(self) -> None:
        """Count the bytes that wait in this connection."""
        held = len(self._rest) + self._open + self._ready_bytes
        if self._writing:
            held += self.transport.get_write_buffer_size()
        change, self._held = held - self._held, held
        if change == 0:
            return
        listener, most = self.listener, self.limits.waiting_bytes
        listener.waiting += change
        count_down(listener.waiting_by_address, self.address, -change)
        if change < 0 or (
            listener.waiting <= most and listener.waiting_by_address[self.address] <= most // 2
        ):
            return
        if self._open or self._rest:
            self._refusal = self._refusal or refusal(
                503, "too many bytes of unfinished requests wait here: come back later.", {"retry-after": "1"}
            )
        elif self._writing and not self.transport.is_closing():  # nothing was asked that could be refused
            self._forget()
            now = time.monotonic()
            self._untaken = self.transport.get_write_buffer_size(), now + self.limits.write_s
            self.deadline = now + _LINGER_S
            self.transport.close()  # after what was written

    def _forget(self) -> None:
        """Read nothing more, and forget what was not read."""
        self._ended = True
        self._rest, self._body, self._open = _NOTHING, BytesIO(), 0

    def _refuse_large(self) -> None:
        self._refuse(
            413,
            f"the request has more than {self.limits.body_bytes} bytes, the limit: send its rows in several requests.",
        )

    def _refuse(self, status: int, sentence: str) -> None:
        """Remember the refusal, and make the parser stop here."""
        self._refusal = self._refusal or refusal(status, sentence)
        raise _Refused


_IDLE, _HEAD, _BODY = "idle", "head", "body"
_NOTHING = memoryview(b"")
_PIECE = 16 * 1024  # bytes that are parsed at a time
_HEADERS = 100  # of a request, with those that follow a body in chunks
_FRAMES = 64 * 1024  # bytes around the chunks of a body
_TURN_S = 0.002  # of work before the event loop looks for what has come meanwhile
_REQUEST = 1024  # bytes that a request takes without its body, low rather than high


@lru_cache(maxsize=1024)
def address_of(host: str) -> str:
    """What counts as one address: of IPv6 the first 64 bits, as each client has all that begin with its own."""
    if ":" not in host:
        return host
    address = IPv6Address(host.partition("%")[0])
    return str(address.ipv4_mapped or IPv6Network((int(address) >> 64 << 64, 64)))


def count_down(counter: Counter[str], key: str, by: int) -> None:
    """Subtract; a counter keeps no key that has nothing."""
    counter[key] -= by
    if counter[key] <= 0:
        del counter[key]


def _path(target: str) -> str:
    """The path of a request's target, which may be a whole URL."""
    scheme, found, rest = target.partition("://")
    if not found or scheme.lower() not in ("http", "https"):
        return target
    return f"/{rest.partition('/')[2]}"


def _head_without_offer(request: Request, version: str) -> bytes:
    """The head of a request without its offer, and without an expectation that was met."""
    done = ("upgrade", "http2-settings", "expect")
    headers = {name: value for name, value in request.headers.items() if name not in done}
    kept = [part.strip() for part in headers.pop("connection", "").split(",")]
    headers["connection"] = ", ".join(
        part for part in kept if part.lower() not in ("upgrade", "http2-settings")
    )
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{request.method} {request.path} HTTP/{version}\r\n{lines}\r\n".encode("latin-1")


class _Refused(Exception):
    """Raised in a callback of the parser, to stop it."""


_REASONS = {status.value: status.phrase for status in HTTPStatus}


def _as_bytes(response: Response, *, close: bool, without_body: bool = False) -> bytes:
    more = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items())
    head = (
        f"HTTP/1.1 {response.status} {_REASONS.get(response.status, '')}\r\n"
        f"date: {_date(int(time.time()))}\r\ncontent-type: {response.content_type}\r\ncontent-length: {len(response.body)}\r\n{more}"
        f"{'connection: close' if close else 'connection: keep-alive'}\r\n\r\n"
    ).encode("latin-1")
    return head if without_body else head + response.body


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
