"""The server process of an endpoint: its routes, its limits, its metrics, its life.

Inference runs in threads, so that the event loop always answers health checks. Admission comes before the body of a
request is read: at most ``max_in_flight`` bodies of at most ``max_bytes`` are in memory, all others are told to come
back. A request belongs to the version that was in service when it was admitted, and a new version is one assignment,
so no request ever falls between two versions.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
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

_BODY_S = 30.0  # a client that sends slower than that gives up its place
_DRAIN_S = 30
_KEEP_ALIVE_S = (
    75  # longer than load balancers keep an idle connection, so that none meets one that just closed
)


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
    """What ``/metrics`` tells; names end in their units."""

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
            "Looks at the store that came to nothing since the start.",
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
    """The version in service, and the way of a request to it."""

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
        """Let a version in; what was admitted before is still answered by the former one."""
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
        """Read a request, unless there are too many, and have it answered in a thread."""
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

    # Its documentation pages load scripts from elsewhere.
    app = FastAPI(title="lepton_airflow", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}. See GET /v2."
        return JSONResponse({"error": message}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        return JSONResponse({"error": "the server failed on this request; its log says why."}, 500)

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

    @app.get("/metrics")
    async def metrics() -> Response:
        page = endpoint.metrics.show(reconciler.status, reconciler.failures)
        return Response(page, media_type=prometheus.CONTENT_TYPE_LATEST)

    return app


async def _beat(reconciler: Reconciler) -> None:
    """Give signs of life from the event loop itself, so that a server that hangs gives none."""
    while True:
        try:
            await asyncio.to_thread(reconciler.report)
        except Exception as error:  # noqa: BLE001 - whatever it was, the next one may come through
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
    with suppress(StoreError):  # tidying can wait
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

    # uvicorn ends on a signal with handlers of its own, and then raises it again, as if ending when asked to were a
    # failure. Before and after that it comes here.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    log.info("endpoint %s listens on %s, store %s", name, status.url, store.root)
    server.run([listener])


def _address(host: str) -> str:
    """What others call a host that is listened on."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - asked for, not listened on by itself
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
