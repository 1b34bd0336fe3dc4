"""The server process of an endpoint: its routes, its limits, its metrics, and how it starts and ends.

Inference runs in threads, so that the event loop always answers health checks. A request is admitted before its body is
read: at most ``Limits.in_flight`` bodies of at most ``Limits.bytes`` are in memory, and all further clients are told to come
back later. A request is answered by the version that was in service when it was admitted. A new version comes into service
by one assignment, so every request has exactly one version.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass

import prometheus_client as prometheus
import uvicorn
from fastapi import FastAPI, Request, Response  # noqa: TID253 - only the command serve imports this module
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from lepton_airflow import __version__
from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Status, check_endpoint_name
from lepton_airflow.errors import BadConfiguration, StoreError, did_you_mean
from lepton_airflow.serving.model import ServedModel
from lepton_airflow.serving.protocol import RequestError, metadata
from lepton_airflow.serving.reconcile import Reconciler
from lepton_airflow.store.files import Store

log = logging.getLogger(__name__)

_BODY_S = 30.0  # for the whole body of a request; a slower client loses its place
_DRAIN_S = 30  # for the requests that are in flight when the server is told to end
# Longer than load balancers keep an idle connection, so that none sends a request into one that was just closed.
_KEEP_ALIVE_S = 75


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes at a time.

    :ivar rows: of one request.
    :ivar bytes: of one request's body.
    :ivar in_flight: requests admitted and not yet answered; further ones get 503 with Retry-After.
    :ivar threads: that infer side by side.
    """

    rows: int = 10_000
    bytes: int = 8 * 2**20
    in_flight: int = 64
    threads: int = 0  # 0: one per CPU

    def __post_init__(self) -> None:
        for name in ("rows", "bytes", "in_flight"):
            if getattr(self, name) < 1:
                raise BadConfiguration(f"the limit of {name} is {getattr(self, name)}: expected at least 1.")
        if self.threads < 0:
            raise BadConfiguration(
                f"threads={self.threads}: expected at least 1, or 0 for as many as there are CPUs."
            )


class Metrics:
    """What ``/metrics`` shows; names end in their units."""

    def __init__(self) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "lepton_serve_requests", "Inference requests by HTTP status.", ["status"], registry=registry
        )
        self.seconds = prometheus.Histogram(
            "lepton_serve_request_seconds",
            "Time from the head of an inference request to its answer.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
            registry=registry,
        )
        self.rows = prometheus.Counter("lepton_serve_rows", "Rows answered.", registry=registry)
        self.in_flight = prometheus.Gauge(
            "lepton_serve_in_flight", "Requests admitted and not answered.", registry=registry
        )
        self.model = prometheus.Gauge(
            "lepton_serve_model_info",
            "1 for the version in service.",
            ["version", "sha256"],
            registry=registry,
        )
        self.state = prometheus.Gauge(
            "lepton_serve_state",
            "1 for the state of the newest desired version.",
            ["state"],
            registry=registry,
        )
        self.sequence = prometheus.Gauge(
            "lepton_serve_sequence",
            "Numbers of the versions desired and in service.",
            ["which"],
            registry=registry,
        )
        self.failures = prometheus.Gauge(
            "lepton_serve_store_failures",
            "Failed looks at the store since the start.",
            registry=registry,
        )

    def show(self, status: Status, failures: int) -> bytes:
        """The text of the page."""
        for state in ("idle", "loading", "serving", "rejected"):
            self.state.labels(state).set(state == status.state)
        for which, number in (("desired", status.desired), ("serving", status.serving)):
            self.sequence.labels(which).set(number or 0)
        self.model.clear()
        if status.version and status.sha256:
            self.model.labels(status.version, status.sha256).set(1)
        self.failures.set(failures)
        return prometheus.generate_latest(self.registry)


class Endpoint:
    """The version in service, and how a request gets its answer from it."""

    def __init__(self, name: str, limits: Limits, metrics: Metrics) -> None:
        self.name = name
        self.limits = limits
        self.metrics = metrics
        self.current: ServedModel | None = None
        self._in_flight = 0
        self._threads = ThreadPoolExecutor(
            limits.threads or len(os.sched_getaffinity(0)), thread_name_prefix="inference"
        )

    def swap(self, model: ServedModel) -> None:
        """Put a version into service; the former one still answers the requests that it was asked."""
        self.current = model

    def find(self, name: str, version: str | None) -> ServedModel:
        """The version in service, if it is the one asked for."""
        if name != self.name:
            raise RequestError(404, f"there is no model {name!r} here; {did_you_mean(name, [self.name])}")
        current = self.current
        if current is None:
            raise RequestError(
                503, f"endpoint {self.name!r} has no version in service yet: deploy one.", **_LATER
            )
        if version not in (None, current.desired.version):
            serving = current.desired.version
            raise RequestError(
                404, f"version {version!r} of {name!r} is not in service, version {serving!r} is."
            )
        return current

    async def infer(self, request: Request, name: str, version: str | None) -> bytes:
        """Answer an inference request, and count it."""
        started = time.perf_counter()
        status = 500
        try:
            content = await self._admit(request, self.find(name, version))
            status = 200
        except RequestError as error:
            status = error.status
            raise
        finally:
            self.metrics.requests.labels(str(status)).inc()
        self.metrics.seconds.observe(time.perf_counter() - started)
        return content

    async def _admit(self, request: Request, model: ServedModel) -> bytes:
        """Read a request and have it answered in a thread, unless too many are in flight."""
        if self._in_flight >= self.limits.in_flight:
            raise RequestError(
                503, f"{self.limits.in_flight} requests are in flight, the limit: come back later.", **_LATER
            )
        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        try:
            body = await self._read(request)
            loop = asyncio.get_running_loop()
            content, rows = await loop.run_in_executor(self._threads, model.answer, body, self.limits.rows)
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)
        self.metrics.rows.inc(rows)
        return content

    async def _read(self, request: Request) -> bytes:
        too_large = RequestError(
            413,
            f"the request has more than {self.limits.bytes} bytes, the limit: send its rows in several requests.",
        )
        if "inference-header-content-length" in request.headers:
            raise RequestError(400, "the request holds binary data, an extension not offered: send JSON.")
        if int(request.headers.get("content-length", "0")) > self.limits.bytes:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(_BODY_S):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > self.limits.bytes:
                        raise too_large
        except ClientDisconnect:
            raise RequestError(400, "the client left before its request was whole.") from None
        except TimeoutError:
            raise RequestError(408, f"the request did not arrive within {_BODY_S:g} s.") from None
        return b"".join(parts)


_LATER = {"Retry-After": "1"}


def create_app(endpoint: Endpoint, reconciler: Reconciler) -> FastAPI:
    """The routes of the protocol, and what runs beside them."""
    app = FastAPI(
        title="lepton_airflow",
        lifespan=_beside(reconciler),
        exception_handlers={RequestError: _wrong_request, HTTPException: _no_route, Exception: _own_failure},
        # The pages that FastAPI would make load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    _add_protocol(app, endpoint)

    @app.get("/metrics")
    async def metrics() -> Response:
        page = endpoint.metrics.show(reconciler.status, reconciler.failures)
        return Response(page, media_type=prometheus.CONTENT_TYPE_LATEST)

    return app


def _beside(reconciler: Reconciler) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """What runs as long as requests are answered: the thread that follows the store, and the heartbeat."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        following = threading.Thread(target=reconciler.run, name="reconciler", daemon=True)
        following.start()
        beating = asyncio.create_task(_beat(reconciler))
        try:
            yield
        finally:  # after the last request was answered
            beating.cancel()
            with suppress(asyncio.CancelledError):
                await beating
            reconciler.stop()
            await asyncio.to_thread(following.join, _DRAIN_S)
            with suppress(StoreError):
                await asyncio.to_thread(reconciler.leave)

    return life


def _add_protocol(app: FastAPI, endpoint: Endpoint) -> None:
    """Add the routes of the Open Inference Protocol."""

    @app.get("/v2")
    async def server() -> dict[str, object]:
        return {"name": "lepton_airflow", "version": __version__, "extensions": []}

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        is_ready = endpoint.current is not None
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/v2/models/{model}")
    @app.get("/v2/models/{model}/versions/{version}")
    async def model_metadata(model: str, version: str | None = None) -> dict[str, object]:
        served = endpoint.find(model, version)
        return metadata(model, served.desired.version, served.card.features, served.outputs)

    @app.get("/v2/models/{model}/ready")
    @app.get("/v2/models/{model}/versions/{version}/ready")
    async def model_ready(model: str, version: str | None = None) -> dict[str, object]:
        endpoint.find(model, version)
        return {"name": model, "ready": True}

    @app.post("/v2/models/{model}/infer")
    @app.post("/v2/models/{model}/versions/{version}/infer")
    async def infer(request: Request, model: str, version: str | None = None) -> Response:
        return Response(await endpoint.infer(request, model, version), media_type="application/json")


async def _wrong_request(_: Request, error: RequestError) -> Response:
    return JSONResponse({"error": str(error)}, error.status, error.headers)


async def _no_route(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}. See GET /v2."
    return JSONResponse({"error": message}, error.status_code, error.headers)


async def _own_failure(_: Request, __: Exception) -> Response:
    return JSONResponse({"error": "the server failed on this request; its log says why."}, 500)


async def _beat(reconciler: Reconciler) -> None:
    """Report this server's status again and again, from the event loop, so that a server whose loop hangs goes silent."""
    while True:
        try:
            await asyncio.to_thread(reconciler.report)
        except Exception as error:  # noqa: BLE001 - whatever it was, the next report may succeed
            log.warning("no heartbeat: %s", error)
        await asyncio.sleep(endpoints.BEAT_S)


def serve(
    name: str, store: Store, *, host: str, port: int, url: str | None, limits: Limits, poll_s: float
) -> None:
    """Serve an endpoint until SIGTERM or SIGINT, then answer what was admitted and end."""
    check_endpoint_name(name)
    if not poll_s > 0:
        raise BadConfiguration(f"poll_s={poll_s:g}: expected a number of seconds above 0.")
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    status = Status(server=f"{socket.gethostname()}-{port}", url=url or f"http://{_address(host)}:{port}")
    endpoint = Endpoint(name, limits, Metrics())
    reconciler = Reconciler(store, name, status, endpoint.swap, poll_s)
    with suppress(StoreError):  # the store may be away, and clearing up can wait
        endpoints.forget_the_dead(store, name)
        reconciler.recover()
    config = uvicorn.Config(
        create_app(endpoint, reconciler),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_S,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    server = uvicorn.Server(config)

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn has handlers of its own while it serves, ends on a signal, and then sends itself that signal again, which would
    # make the exit status that of a killed process. These handlers take that signal, and any that comes before uvicorn's own.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    log.info("endpoint %s listens on %s, store %s", name, status.url, store.root)
    server.run([listener])


def _address(host: str) -> str:
    """The name under which others reach a host that this server listens on."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - a comparison: it listens there only when told to
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadConfiguration(
            f"cannot listen on {host}:{port}: {reason}. Pass another --host or --port."
        ) from None
