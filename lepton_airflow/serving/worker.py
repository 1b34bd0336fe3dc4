"""A worker process: it answers the requests that come to the server's port.

The supervisor (:mod:`lepton_airflow.serving.supervisor`) starts it, hands it versions that have passed their checks, and
says by a byte in shared memory which of them answers. So all workers change at the same moment. A small request is
computed where it was read; a larger one in a thread, whose time all addresses share; of one address those first that
arrived long ago or are small.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import logging
import math
import os
import queue
import signal
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

import msgspec

from lepton_airflow import __version__
from lepton_airflow.delivery.endpoints import Desired
from lepton_airflow.errors import LeptonError, did_you_mean
from lepton_airflow.serving import describe
from lepton_airflow.serving.batches import Batches
from lepton_airflow.serving.counters import Counters
from lepton_airflow.serving.http import ConnectionLimits, Listener, Request, Response, refusal
from lepton_airflow.serving.model import ServedModel, measure
from lepton_airflow.serving.protocol import (
    HEADER_LENGTH,
    Answer,
    Inference,
    RequestError,
    configuration,
    metadata,
)

if TYPE_CHECKING:
    from lepton_airflow.serving.grpc import Service

log = logging.getLogger(__name__)

_T = TypeVar("_T")
NONE = 255  # in the place of the number of a version: none is in service
BEAT_S = 1.0  # between two signs of life to the supervisor
_INLINE_S = 0.003  # a request that should take no longer is computed in the thread that reads and writes
_FAIR = 5.0  # how many times the time that a request takes it may be overtaken by smaller ones
_BATCHES = "batches"  # the address of the requests of many
_PAGE_S = 0.01  # that a page should take
_PACKED = 16 * 1024  # bytes of an answer from which on it is compressed for clients that accept that


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes at a time.

    :ivar rows: of one request.
    :ivar in_flight: large requests, and pages that describe models, that wait or are computed, of one worker; further ones get
        503 with Retry-After, and so do those of the address that has most when another one asks. So many small ones may wait
        for a batch besides.
    :ivar threads: of one worker, that compute large requests side by side.
    :ivar batch_rows: small requests that come within ``batch_wait_s`` are computed together, up to so many rows; 0: each by itself.
    """

    rows: int = 10_000
    in_flight: int = 64
    threads: int = 1
    batch_rows: int = 0
    batch_wait_s: float = 0.0
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)


@dataclass(kw_only=True)
class Post:
    """What a worker gets from the supervisor when it starts.

    :ivar slots: for each endpoint which of its two places holds the version in service, or ``NONE``.
    :ivar grpc: the address on which each worker listens for gRPC.
    """

    number: int
    names: tuple[str, ...]
    limits: Limits
    listener: socket.socket
    pipe: Pipe
    slots: Any
    counters: Counters
    grpc: str | None = None


def run(post: Post) -> None:
    """Answer requests until the supervisor says to end, or is gone."""
    for number in (signal.SIGTERM, signal.SIGINT):  # which a terminal sends to all; the supervisor says when
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(_Worker(post).life())


class _Worker:
    def __init__(self, post: Post) -> None:
        self.post = post
        self.endpoints = [Endpoint(name, number, post) for number, name in enumerate(post.names)]
        self.by_name = {endpoint.name: endpoint for endpoint in self.endpoints}
        self.ended = asyncio.Event()
        self._to_load: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._pages: list[Callable[[Response], None]] = []  # who waits for the page of metrics
        self._sending = threading.Lock()
        self._queue = Queue(post.limits.threads, post.limits.in_flight)
        self._in_batches = 0
        limits = post.limits
        self._batches = (
            Batches(limits.batch_rows, limits.batch_wait_s, self._run_batch) if limits.batch_rows else None
        )
        self.grpc: Service | None = None

    async def life(self) -> None:
        self.loop = asyncio.get_running_loop()
        leaves = partial(self.post.counters.has_more_connections, self.post.number)
        self.listener = Listener(self.post.limits.connections, self.answer, self._refused, leaves)
        for what in (self._obey, self._load_all):
            threading.Thread(target=what, name=what.__name__, daemon=True).start()
        beating = self.loop.create_task(self._beat())
        await self.ended.wait()
        beating.cancel()
        self.listener.close()
        self._send("ended")

    # -- the supervisor ----------------------------------------------------------------------------------------------

    def _obey(self) -> None:
        """Do what the supervisor says, at once; in a thread of its own."""
        while True:
            try:
                what, *rest = self.post.pipe.recv()
            except (EOFError, OSError):
                os._exit(1)  # the supervisor is gone
            except Exception:  # too little memory for a version, for example
                log.exception("worker %d cannot hear the supervisor", self.post.number)
                os._exit(1)
            if what in ("load", "drop", "open"):
                self._to_load.put((what, *rest))
            elif what == "page":
                self.loop.call_soon_threadsafe(self._page_there, *rest)
            elif what == "drain":
                self.loop.call_soon_threadsafe(self._drain)
            elif what == "close":
                self.loop.call_soon_threadsafe(self._close, *rest)
            elif what == "end":
                self.loop.call_soon_threadsafe(self.ended.set)
            del rest  # with the bytes of a version

    def _load_all(self) -> None:
        """Load and drop versions one after the other, and open the port when all are there; in a thread of its own."""
        while True:
            what, *rest = self._to_load.get()
            if what == "load":
                self._load(*rest)
            elif what == "drop":
                endpoint, slot = rest
                self.endpoints[endpoint].models[slot] = None
            else:
                asyncio.run_coroutine_threadsafe(self._open(), self.loop).add_done_callback(_end_on_failure)
            del rest  # with the bytes of a version
            if what != "open":
                _give_back()

    def _load(
        self,
        load: int,
        endpoint: int,
        slot: int,
        desired: Desired,
        files: dict[str, bytes],
        numbers: dict[str, float],
    ) -> None:
        try:
            self.endpoints[endpoint].models[slot] = ServedModel.of(desired, files, numbers)
        except Exception as error:
            log.exception("worker %d: version %s", self.post.number, desired.version)
            self._send("loaded", load, endpoint, slot, f"{type(error).__name__}: {error}")
        else:
            self._send("loaded", load, endpoint, slot, None)

    def _send(self, *message: object) -> None:
        with self._sending:
            try:
                self.post.pipe.send(message)
            except OSError:
                os._exit(1)

    async def _beat(self) -> None:
        """Say again and again that the loop turns."""
        while True:
            self._send("beat")
            await asyncio.sleep(BEAT_S)

    async def _open(self) -> None:
        """Take requests, with what was in service when this worker started."""
        if self.listener.draining:
            return
        self.listener.listen(self.post.listener)
        if self.post.grpc is not None:
            # Not before the fork, which gRPC's threads would not survive.
            from lepton_airflow.serving.grpc import Service

            self.grpc = Service(self.answer, self._refused, self.post.limits, self.listener.turns)
            await self.grpc.start(self.post.grpc)

    def _drain(self) -> None:
        self.listener.draining = True

    def _close(self, for_all: bool) -> None:
        """Accept nothing more; end when what was admitted is answered."""
        self.listener.draining = True
        self.listener.stop_accepting(for_all=for_all)
        self.loop.create_task(self._finish())

    async def _finish(self) -> None:
        stopping = self.loop.create_task(self.grpc.stop()) if self.grpc else None
        self.listener.close_idle()
        while self.listener.connections or self.listener.accepting or (stopping and not stopping.done()):
            await asyncio.sleep(0.02)
            self.listener.close_idle()
        self.ended.set()

    # -- requests ----------------------------------------------------------------------------------------------------

    def _refused(self, status: int, name: str = "") -> None:
        """A request that ended before anybody knew what it asks for; it counts for the first endpoint, or the one named."""
        endpoint = self.by_name.get(name, self.endpoints[0])
        self.post.counters.add(self.post.number, endpoint.number, status)

    def answer(self, request: Request, later: Callable[[Response], None]) -> Response | None:
        """The answer to a request, or None when ``later`` will get it."""
        try:
            return self._route(request, later)
        except RequestError as error:
            return _refusal(error)
        except Exception:
            log.exception("%s %s", request.method, request.path)
            return refusal(500, "the server failed on this request; its log says why.")

    def _route(self, request: Request, later: Callable[[Response], None]) -> Response | None:
        path = request.path.partition("?")[0]
        # No more of a long path than shows that there is nothing.
        parts = tuple(unquote(part[:1000]) for part in path.strip("/").split("/", 6))
        match parts:
            case ("v2", "models", name, "infer") | ("v2", "models", name, "versions", _, "infer"):
                if request.method != "POST":
                    raise _not_allowed(request, "POST")
                version = parts[4] if len(parts) == 6 else None
                compute = partial(self._compute, later, request.address)
                return self._endpoint(name).infer(request, version, compute)
            case ("v2", "repository", "index"):
                if request.method != "POST":
                    raise _not_allowed(request, "POST")
                only_ready = _asks_for_ready(request.body)
                return _json([e.in_index() for e in self.endpoints if e.current() or not only_ready])
            case ("metrics",):
                if request.method not in ("GET", "HEAD"):
                    raise _not_allowed(request, "GET, HEAD")
                self._pages.append(later)
                if len(self._pages) == 1:  # who asks while a page is made gets that one
                    self._send("page")
                return None
            case ("docs",) | ("openapi.json",) | ("v2", "openapi.json"):
                if request.method not in ("GET", "HEAD"):
                    raise _not_allowed(request, "GET, HEAD")
                make = self._page if parts == ("docs",) else self._description
                return self._make(later, request, partial(make, request))
            case _:
                found = self._look(request, path, parts)
                if request.method not in ("GET", "HEAD"):
                    raise _not_allowed(request, "GET, HEAD")
                return found

    def _look(self, request: Request, path: str, parts: tuple[str, ...]) -> Response:
        """What there is to read."""
        match parts:
            case ("v2",):
                extensions = ["binary_tensor_data", "model_repository", "model_configuration", "statistics"]
                return _json({"name": "lepton_airflow", "version": __version__, "extensions": extensions})
            case ("v2", "health", "live"):
                return _json({"live": True})
            case ("v2", "health", "ready"):
                is_ready = not self.listener.draining and all(e.current() for e in self.endpoints)
                return _json({"ready": is_ready}, 200 if is_ready else 503)
            case ("v2", "models", "stats") if "stats" not in self.by_name:
                return _json({"model_stats": [e.statistics() for e in self.endpoints if e.current()]})
            case ("v2", "models", name) | ("v2", "models", name, "versions", _):
                return _json(self._endpoint(name).metadata(parts[4] if len(parts) == 5 else None))
            case ("v2", "models", name, "ready") | ("v2", "models", name, "versions", _, "ready"):
                self._endpoint(name).find(parts[4] if len(parts) == 6 else None)
                return _json({"name": name, "ready": True})
            case ("v2", "models", name, "config") | ("v2", "models", name, "versions", _, "config"):
                return _json(self._endpoint(name).configuration(parts[4] if len(parts) == 6 else None))
            case ("v2", "models", name, "stats") | ("v2", "models", name, "versions", _, "stats"):
                version = parts[4] if len(parts) == 6 else None
                return _json({"model_stats": [self._endpoint(name).statistics(version)]})
            case _:
                raise _nothing_at(path)

    def _description(self, _: Request) -> Response:
        serving = {e.name: served for e in self.endpoints if (served := e.current())}
        return _json(describe.openapi(serving, self.post.limits.rows))

    def _page(self, request: Request) -> Response:
        port = self.post.listener.getsockname()[1]
        models = {e.name: e.current() for e in self.endpoints}
        page = describe.page(models, describe.base_url(request.headers, port))
        return Response(200, page.encode(), "text/html; charset=utf-8", _NO_SCRIPTS)

    def _make(
        self, later: Callable[[Response], None], request: Request, make: Callable[[], Response]
    ) -> Response | None:
        """Make a page in a thread, which takes long for a model of many inputs."""

        def job() -> None:
            self.loop.call_soon_threadsafe(told, _attempt(make))

        def told(found: Response | RequestError) -> None:
            later(found if isinstance(found, Response) else _refusal(found))

        dropped = partial(self.loop.call_soon, told, full := self._full())
        return None if self._queue.put(request.address, _PAGE_S, job, dropped) else _refusal(full)

    def _full(self) -> RequestError:
        most = self.post.limits.in_flight
        return RequestError(
            503, f"{most} requests are in flight, the limit: come back later.", retry_after="1"
        )

    def _endpoint(self, name: str) -> Endpoint:
        endpoint = self.by_name.get(name)
        if endpoint is None:
            raise RequestError(
                404, f"there is no model {name[:100]!r} here; {did_you_mean(name[:100], self.by_name)}"
            )
        return endpoint

    def _compute(
        self, later: Callable[[Response], None], address: str, endpoint: Endpoint, question: Question
    ) -> Response | None:
        """Compute an answer here if that is quick, else in a thread."""
        if question.seconds <= _INLINE_S:
            # Beyond the limit requests are computed as if there were no batches, which slows down those who send so many.
            if self._batches is None or self._in_batches >= self.post.limits.in_flight:
                return question.answered(_attempt(question.answer))
            return self._compute_with_others(self._batches, later, endpoint, question)

        def job() -> None:
            outcome = _attempt(question.answer)
            self.loop.call_soon_threadsafe(done, outcome)

        def done(outcome: Answer | RequestError) -> None:
            endpoint.count_in_flight(-1)
            later(question.answered(outcome))

        full = self._full()
        if not self._queue.put(address, question.seconds, job, partial(self.loop.call_soon, done, full)):
            return question.answered(full)
        endpoint.count_in_flight(1)
        return None

    def _compute_with_others(
        self, batches: Batches, later: Callable[[Response], None], endpoint: Endpoint, question: Question
    ) -> Response | None:
        """Read a request, and have it computed in a batch."""
        inference = _attempt(question.read)
        if isinstance(inference, RequestError):
            return question.answered(inference)
        self._in_batches += 1
        endpoint.count_in_flight(1)

        def done(outcome: Any) -> None:
            self._in_batches -= 1
            endpoint.count_in_flight(-1)
            if not isinstance(outcome, RequestError):
                outcome = _attempt(lambda: question.finish(inference, outcome))
            later(question.answered(outcome))

        batches.add(question.model, inference, done)
        return None

    def _run_batch(
        self, seconds: float, compute: Callable[[], list[Any]], done: Callable[[list[Any]], None]
    ) -> None:
        if seconds <= _INLINE_S:
            done(compute())
        else:

            def job() -> None:
                self.loop.call_soon_threadsafe(done, compute())

            self._queue.put(_BATCHES, seconds, job)

    def _page_there(self, page: Response) -> None:
        waiting, self._pages = self._pages, []
        for later in waiting:
            later(page)


class Endpoint:
    """A model of this server: the version in service, and what is asked of it."""

    def __init__(self, name: str, number: int, post: Post) -> None:
        self.name = name
        self.number = number
        self.post = post
        self.models: list[ServedModel | None] = [None, None]
        self.in_flight = 0

    def current(self) -> ServedModel | None:
        """The version in service."""
        while (slot := self.post.slots[self.number]) != NONE:
            model = self.models[slot]
            if model is not None or slot == self.post.slots[self.number]:
                return model  # else the version changed in between, and the former one was dropped
        return None

    def find(self, version: str | None) -> ServedModel:
        """The version in service, if it is the one asked for."""
        current = self.current()
        if current is None:
            raise RequestError(
                503, f"endpoint {self.name!r} has no version in service yet: deploy one.", retry_after="1"
            )
        if version not in (None, current.desired.version):
            serving = current.desired.version
            raise RequestError(
                404, f"version {version[:100]!r} of {self.name!r} is not in service, version {serving!r} is."
            )
        return current

    def metadata(self, version: str | None) -> dict[str, Any]:
        """What the model takes and gives."""
        served = self.find(version)
        return metadata(self.name, served.desired.version, served.card.features, served.outputs)

    def configuration(self, version: str | None) -> dict[str, Any]:
        """The model as Triton describes its configuration."""
        served = self.find(version)
        return configuration(self.name, served.card.features, served.outputs, self.post.limits.rows)

    def statistics(self, version: str | None = None) -> dict[str, Any]:
        """What is counted of the endpoint, as Triton writes it; what is not measured has the count 0."""
        served, counters = self.find(version), self.post.counters
        by_status = dict(counters.requests(self.number))
        answered = int(by_status.pop(200, 0))
        took = {"count": answered, "ns": int(counters.seconds(self.number)[1] * 1e9)}
        nothing = {"count": 0, "ns": 0}
        parts = ("queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
        failed = {"count": int(sum(by_status.values())), "ns": 0}
        return {
            "name": self.name,
            "version": served.desired.version,
            "inference_count": int(counters.rows(self.number)),
            "execution_count": answered,
            "inference_stats": {"success": took, "fail": failed} | dict.fromkeys(parts, nothing),
            "batch_stats": [],
        }

    def in_index(self) -> dict[str, str]:
        """Its line in the index of the repository."""
        current = self.current()
        if current is None:
            return {"name": self.name, "state": "UNAVAILABLE", "reason": "no version is in service"}
        return {"name": self.name, "version": current.desired.version, "state": "READY", "reason": ""}

    def count_in_flight(self, change: int) -> None:
        """Count requests that are admitted and not answered."""
        self.in_flight += change
        self.post.counters.set_in_flight(self.post.number, self.number, self.in_flight)

    def infer(
        self, request: Request, version: str | None, compute: Callable[..., Response | None]
    ) -> Response | None:
        """Have an inference request answered, and count it."""
        add = partial(self.post.counters.add, self.post.number, self.number)

        def answered(outcome: Answer | RequestError) -> Response:
            if isinstance(outcome, RequestError):
                add(outcome.status)
                return _refusal(outcome)
            add(200, time.perf_counter() - request.started, outcome.rows)
            headers = {}
            if outcome.encoding is not None:
                headers = {"content-encoding": outcome.encoding, "vary": "accept-encoding"}
            if outcome.header_length is None:
                return Response(200, outcome.content, headers=headers)
            headers[HEADER_LENGTH] = str(outcome.header_length)
            return Response(200, outcome.content, "application/octet-stream", headers)

        try:
            model = self.find(version)
            header_length = _header_length(request)
        except RequestError as error:
            return answered(error)
        limits = self.post.limits
        encoding = request.headers.get("content-encoding", "").lower() or "identity"
        accepted = request.headers.get("accept-encoding", "")
        size = len(request.body)
        if encoding != "identity":  # as long as it may be
            size = min(1000 * size, limits.connections.body_bytes)

        def read() -> Inference:
            body = _unpacked(request.body, encoding, limits.connections.body_bytes)
            return model.read(body, limits.rows, header_length)

        return compute(
            self,
            Question(
                model=model,
                seconds=model.seconds(size, is_binary=header_length is not None),
                read=read,
                finish=lambda inference, values: _packed(model.render(inference, values), accepted),
                answered=answered,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """An inference request on its way to its answer.

    :ivar seconds: that it should take.
    :ivar read: checks it, and makes what the model takes.
    :ivar finish: makes the answer of that and of what the model gave.
    :ivar answered: counts it, and makes the response.
    """

    model: ServedModel
    seconds: float
    read: Callable[[], Inference]
    finish: Callable[[Inference, Any], Answer]
    answered: Callable[[Answer | RequestError], Response]

    def answer(self) -> Answer:
        """Its answer, computed by itself."""
        inference = self.read()
        return self.finish(inference, self.model.run(inference))


def _refusal(error: RequestError) -> Response:
    return refusal(error.status, str(error), error.headers)


def _attempt(compute: Callable[[], _T]) -> _T | RequestError:
    try:
        return compute()
    except RequestError as error:
        return error.to_keep()
    except MemoryError:
        return RequestError(503, "too little memory for this request: send its rows in several requests.")
    except Exception:
        log.exception("a request failed")
        return RequestError(500, "the server failed on this request; its log says why.")


def _give_back() -> None:
    """Have the C library give the system back what is free: where a session was opened or closed that is more than a version takes."""
    with suppress(AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)


def _end_on_failure(opened: Any) -> None:
    """A worker that cannot listen ends, so that another one is tried."""
    if (error := opened.exception()) is not None:
        log.error("a worker cannot listen: %r", error)
        os._exit(1)


def _header_length(request: Request) -> int | None:
    text = request.headers.get(HEADER_LENGTH.lower())
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise RequestError(400, f"{HEADER_LENGTH} is {text[:40]!r}, expected a number of bytes.")
    return int(text)


def _unpacked(body: bytes, encoding: str, most: int) -> bytes:
    """The body of a request as it was before it was packed for the way."""
    if encoding == "identity":
        return body
    bits = _BITS.get(encoding)
    if bits is None:
        raise RequestError(
            415, f"content-encoding {encoding[:40]!r} is not known here: send gzip, deflate or identity."
        )
    try:
        unpacker = zlib.decompressobj(bits)
        found = unpacker.decompress(body, most + 1)
    except zlib.error:
        if bits != 15:
            raise RequestError(400, f"the body is no {encoding}.") from None
        try:  # deflate without zlib's own head, as some clients send it
            unpacker = zlib.decompressobj(-15)
            found = unpacker.decompress(body, most + 1)
        except zlib.error:
            raise RequestError(400, "the body is no deflate.") from None
    if len(found) > most:
        raise RequestError(
            413,
            f"the request has more than {most} bytes unpacked, the limit: send its rows in several requests.",
        )
    if not unpacker.eof or unpacker.unused_data:
        raise RequestError(400, f"the body is not one whole {encoding} stream.")
    return found


def _packed(answer: Answer, accepted: str) -> Answer:
    """An answer as a client that accepts these encodings gets it."""
    if len(answer.content) < _PACKED or (encoding := _chosen(accepted)) is None:
        return answer
    packer = zlib.compressobj(1, zlib.DEFLATED, _BITS[encoding])
    return replace(answer, content=packer.compress(answer.content) + packer.flush(), encoding=encoding)


@lru_cache(maxsize=256)
def _chosen(accepted: str) -> str | None:
    """The encoding of an answer, by the header Accept-Encoding: gzip, unless the client wants it less than deflate."""
    weights: dict[str, float] = {}
    for part in accepted.lower().split(","):
        name, _, parameters = part.partition(";")
        key, _, weight = parameters.partition("=")
        try:
            weights[name.strip()] = float(weight) if key.strip() == "q" else 1.0
        except ValueError:
            continue
    found = max(("gzip", "deflate"), key=lambda name: weights.get(name, 0.0))
    return found if weights.get(found, 0.0) > 0 else None


def _asks_for_ready(body: bytes) -> bool:
    """Whether an index should hold nothing but what is ready."""
    if not body.strip():
        return False
    try:
        return bool(_INDEX.decode(body).ready)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RequestError(400, 'the body should be empty or {"ready": true}.') from None


class _Index(msgspec.Struct):
    ready: bool | None = None


@dataclass(eq=False, kw_only=True, slots=True)
class _Job:
    address: str
    due: float
    do: Callable[[], object]
    dropped: Callable[[], object] | None


class Queue:
    """Threads that compute. Addresses share their time; of one address first comes what has waited long for its size.

    :param places: for jobs that wait or are done. When there is none left, the address that has most of them loses one to
        an address that has fewer.
    """

    def __init__(self, threads: int, places: int) -> None:
        self._places = places
        self._jobs: list[_Job] = []  # that wait
        self._placed = 0  # jobs that have a place
        self._taken: Counter[str] = Counter()  # jobs that wait or are done, by address
        self._used: dict[str, float] = {}  # seconds that an address has had
        self._fair = 0.0  # the seconds of one that asks all the time, with which one begins that comes
        self._change = threading.Condition()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"inference-{number}", daemon=True).start()

    def put(
        self,
        address: str,
        seconds: float,
        do: Callable[[], object],
        dropped: Callable[[], object] | None = None,
    ) -> bool:
        """Have a job done that should take so long; False if there is no place for it.

        :param dropped: called when the job has lost its place; a job without it needs none.
        """
        loser: _Job | None = None
        with self._change:
            if dropped is not None and self._placed >= self._places:
                may = [job for job in self._jobs if job.dropped is not None]
                loser = max(may, key=lambda job: (self._taken[job.address], job.due), default=None)
                if loser is None or self._taken[loser.address] <= self._taken[address] + 1:
                    return False
                self._jobs.remove(loser)
                self._taken[loser.address] -= 1
                self._placed -= 1
            self._placed += dropped is not None
            self._taken[address] += 1
            self._used.setdefault(address, self._fair)
            due = time.monotonic() + _FAIR * seconds
            self._jobs.append(_Job(address=address, due=due, do=do, dropped=dropped))
            self._change.notify()
        if loser is not None and loser.dropped is not None:
            loser.dropped()
        return True

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._jobs:
                    self._change.wait()
                job = min(self._jobs, key=lambda job: (self._used[job.address], job.due))
                self._jobs.remove(job)
            began, address, placed = time.monotonic(), job.address, job.dropped is not None
            try:
                job.do()
            except Exception:  # no job may end the thread that others wait for
                log.exception("a job failed")
            del job  # its request
            with self._change:
                self._placed -= placed
                self._charge(address, time.monotonic() - began)

    def _charge(self, address: str, seconds: float) -> None:
        """A job is done. Who has had more than others is remembered until these have had as much, or nobody asks."""
        self._fair += seconds / len(+self._taken)
        self._used[address] += seconds
        self._taken[address] -= 1
        self._taken = +self._taken
        kept = self._fair if self._taken else math.inf
        self._used = {a: used for a, used in self._used.items() if a in self._taken or used > kept}


_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_INDEX = msgspec.json.Decoder(_Index)
_NO_SCRIPTS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}


def _json(value: object, status: int = 200) -> Response:
    return Response(status, msgspec.json.encode(value))


def _nothing_at(path: str) -> RequestError:
    return RequestError(404, f"there is nothing at {path[:100]}. See GET /v2.")


def _not_allowed(request: Request, allowed: str) -> RequestError:
    return RequestError(
        405,
        f"{request.method} {request.path[:100]} is not allowed: expected {allowed}. See GET /v2.",
        allow=allowed,
    )


def try_out(
    pipe: Pipe, lifeline: Pipe, desired: Desired, files: dict[str, bytes], golden: dict[str, Any]
) -> None:
    """Load a version in a process of its own, check and measure it, and tell the supervisor; it may be the process's end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    end_with(lifeline)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory is short the kernel ends this process, and no worker
    started = time.monotonic()
    try:
        model = ServedModel.of(desired, files)
        numbers = measure(model, golden)
    except LeptonError as error:
        pipe.send(error)
    except Exception as error:
        log.exception("endpoint %s: version %s", desired.endpoint, desired.version)
        pipe.send(LeptonError(f"it cannot be loaded: {error!r}."))
    else:
        pipe.send({"load_s": time.monotonic() - started} | numbers)


def end_with(lifeline: Pipe) -> None:
    """Have the kernel end this process when the other end of a one-way pipe closes, whatever code it is in then.

    A thread that waits for it would wait for ever for the interpreter's lock, where a library loops and holds that.
    """
    fd = lifeline.fileno()
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # which ends a process
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline.poll():  # it was closed before
        os._exit(1)
