"""The server of one or several endpoints: it follows the store, keeps the workers running, and shows what they count.

The supervisor reads no request, so nothing that a client sends keeps it from its work: it looks at the store, reports to it,
answers health checks on a port of its own where one is asked for, and replaces workers that end. A new version is tried in a
process of its own first, so what it does there (a segmentation fault, an endless loop, too much memory) no client sees.
Then one worker after the other loads it beside the former one, and one byte in shared memory makes all answer with it.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from typing import Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, Status, check_endpoint_name
from lepton_airflow.errors import BadConfiguration, LeptonError, StoreError
from lepton_airflow.serving import worker
from lepton_airflow.serving.counters import Counters
from lepton_airflow.serving.http import ConnectionLimits, Listener, Request, Response, refusal
from lepton_airflow.serving.reconcile import Died, NotNow, Reconciler
from lepton_airflow.serving.worker import NONE, Limits, Post
from lepton_airflow.store.files import Store

log = logging.getLogger(__name__)

_DRAIN_S = 30.0  # for the requests that are in flight when the server is told to end
_HUNG_S = 30.0  # without a sign of life after which a worker is ended and replaced
_TRY_S = 600.0  # for a version to load and to be measured, and then for each worker to load it
_RESERVED_FILES = 64  # of a worker, for other things than connections


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server is run.

    :ivar names: of the endpoints, each a model of this server.
    :ivar grpc_port: for gRPC; None: none.
    :ivar health_port: for health checks and metrics alone; None: none but the main port.
    :ivar workers: processes that answer requests.
    :ivar poll_s: how often to look for a newer version [seconds].
    :ivar drain_s: after SIGTERM, for load balancers to see that the server is not ready before it closes its port [seconds].
    """

    names: tuple[str, ...]
    host: str
    port: int
    health_port: int | None
    url: str | None
    workers: int
    limits: Limits
    poll_s: float
    drain_s: float
    grpc_port: int | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            check_endpoint_name(name)
        if len(set(self.names)) < len(self.names):
            raise BadConfiguration(f"endpoints {', '.join(self.names)}: expected each once.")
        if not self.poll_s > 0:
            raise BadConfiguration(f"poll_s={self.poll_s:g}: expected a number of seconds above 0.")
        numbers = {
            "workers": self.workers,
            "max_rows": self.limits.rows,
            "max_bytes": self.limits.connections.body_bytes,
            "max_in_flight": self.limits.in_flight,
            "threads": self.limits.threads,
            "max_connections": self.limits.connections.connections,
        }
        for name, number in numbers.items():
            if number < 1:
                raise BadConfiguration(f"{name}={number}: expected at least 1.")
        if self.limits.batch_rows < 0 or not 0 <= self.limits.batch_wait_s < 10:
            raise BadConfiguration(
                f"batch_rows={self.limits.batch_rows}, batch_wait_ms={1000 * self.limits.batch_wait_s:g}: expected 0 rows or "
                "more, and at most 10,000 ms."
            )


def serve(store: Store, settings: Settings) -> None:
    """Serve endpoints until SIGTERM or SIGINT, then answer what was admitted and end.

    :raises BadConfiguration: a setting is wrong, a port cannot be had, or the store is not there.
    """
    store.check_there()
    try:
        asyncio.run(_Server(store, settings).life())
    except LeptonError:
        raise
    except Exception as error:
        log.exception("the server ends")
        raise LeptonError(
            f"the server cannot go on: {type(error).__name__}: {error}. Its log says where; start it again."
        ) from error


class _Server:
    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self.told_to_end = asyncio.Event()
        self.draining = False

    async def life(self) -> None:
        settings = self.settings
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.told_to_end.set)
        listener = _listen(settings.host, settings.port, "port")
        health = (
            None
            if settings.health_port is None
            else _listen(settings.host, settings.health_port, "health-port")
        )
        port = listener.getsockname()[1]
        shared = (
            None if settings.grpc_port is None else _claim(settings.host, settings.grpc_port, "grpc-port")
        )
        grpc = None if shared is None else "{}:{}".format(*_named(shared))
        url = settings.url or f"http://{_address(settings.host)}:{port}"
        self.fleet = Fleet(settings, listener, self.page, grpc)
        self.reconcilers = [
            Reconciler(
                self.store,
                name,
                Status(server=f"{socket.gethostname()}-{port}", url=url),
                self.fleet.part(number),
                settings.poll_s,
            )
            for number, name in enumerate(settings.names)
        ]
        for reconciler in self.reconcilers:
            try:
                endpoints.forget_the_dead(self.store, reconciler.endpoint)
                reconciler.recover()
            except Exception as error:  # noqa: BLE001 - the store may be away or damaged, and clearing up can wait
                log.warning("endpoint %s: %s", reconciler.endpoint, error)
        try:
            await self._follow(url, health)
        finally:
            for reconciler in self.reconcilers:
                reconciler.stop()
            self.fleet.kill()
            listener.close()
            if shared is not None:
                shared.close()

    async def _follow(self, url: str, health: socket.socket | None) -> None:
        """Run the workers and follow the store until told to end."""
        settings = self.settings
        await asyncio.to_thread(self.fleet.start)
        following = [
            threading.Thread(target=r.run, name=f"reconciler-{r.endpoint}", daemon=True)
            for r in self.reconcilers
        ]
        for thread in following:
            thread.start()
        if health is not None:
            Listener(ConnectionLimits(connections=200, per_address=100, body_bytes=1024), self.answer).listen(
                health
            )
        beating = asyncio.create_task(self._beat())
        names = ", ".join(settings.names)
        log.info("serving %s at %s, store %s", names, url, self.store.root)
        if self.fleet.grpc is not None:
            log.info("serving %s at %s by gRPC", names, self.fleet.grpc)
        await self.told_to_end.wait()
        log.info("told to end: not ready any more, the port is closed in %g s", settings.drain_s)
        self.draining = True
        for reconciler in self.reconcilers:
            reconciler.stop()
        await self.fleet.end(settings.drain_s)
        beating.cancel()
        for thread, reconciler in zip(following, self.reconcilers, strict=True):
            await asyncio.to_thread(thread.join, _DRAIN_S)
            with suppress(StoreError):
                await asyncio.to_thread(reconciler.leave)

    async def _beat(self) -> None:
        """Report again and again, as long as a worker gives signs of life: a server that answers nobody goes silent."""
        told: dict[Reconciler, str] = {}  # of each the last error, which is logged once
        while True:
            if self.fleet.living():
                for reconciler in self.reconcilers:
                    reason = ""
                    try:
                        await asyncio.to_thread(reconciler.report)
                    except Exception as error:  # noqa: BLE001 - whatever it was, the next report may succeed
                        reason = str(error)
                    if reason and told.get(reconciler) != reason:
                        log.warning("endpoint %s: no heartbeat: %s", reconciler.endpoint, reason)
                    told[reconciler] = reason
            await asyncio.sleep(endpoints.BEAT_S)

    def answer(self, request: Request, _: Callable[[Response], None]) -> Response:
        """Health checks and metrics, on their own port."""
        path = request.path.partition("?")[0]
        if request.method not in ("GET", "HEAD"):
            return refusal(
                405, f"{request.method} is not allowed here: expected GET.", {"allow": "GET, HEAD"}
            )
        if path == "/metrics":
            return self.page()
        if path == "/v2/health/live":
            alive = self.fleet.living() > 0
            return Response(200 if alive else 503, b'{"live":true}' if alive else b'{"live":false}')
        if path == "/v2/health/ready":
            ready = not self.draining and self.fleet.living() > 0 and self.fleet.serves_all()
            return Response(200 if ready else 503, b'{"ready":true}' if ready else b'{"ready":false}')
        return refusal(
            404, f"there is nothing at {path[:100]}: here are /v2/health/live, /v2/health/ready and /metrics."
        )

    def page(self) -> Response:
        """What ``/metrics`` shows."""
        try:
            registry = prometheus.CollectorRegistry()
            registry.register(_Metrics(self.fleet, self.reconcilers))
            return Response(200, prometheus.generate_latest(registry), prometheus.CONTENT_TYPE_LATEST)
        except Exception:  # who asks is to have an answer, whatever it was
            log.exception("the page of metrics")
            return refusal(500, "the metrics cannot be shown; the server's log says why.")


_Version = tuple[Desired, Mapping[str, bytes], dict[str, float]]  # with its files, and what was measured


@dataclass(eq=False)
class _Worker:
    """A worker as the supervisor sees it.

    :ivar heard: time.monotonic() of the last sign of life.
    :ivar loads: how many versions it was told to load.
    :ivar loaded: the number of the last one that it has told of, and why it cannot load that.
    """

    number: int
    process: BaseProcess
    pipe: Pipe
    heard: float
    sending: threading.Lock
    loads: int = 0
    loaded: tuple[int, str | None] = (0, None)

    @property
    def is_loading(self) -> bool:
        """Whether it has to tell of a version that it was told to load."""
        return self.loaded[0] < self.loads

    def load(self, endpoint: int, slot: int, version: _Version) -> None:
        """Have it load a version."""
        self.loads += 1
        self.send("load", self.loads, endpoint, slot, *version)

    def send(self, *message: object) -> None:
        """Tell it something; one that has ended is replaced by the watch."""
        with suppress(OSError), self.sending:
            self.pipe.send(message)

    def close(self) -> None:
        """Tell it nothing more."""
        with self.sending:
            self.pipe.close()


class Fleet:
    """The workers of a server, and the versions that they hold.

    :param page: makes the page of ``/metrics``, which a worker may be asked for.
    :param grpc: the address on which all workers listen for gRPC.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        page: Callable[[], Response],
        grpc: str | None = None,
    ) -> None:
        self.grpc = grpc
        self.settings = settings
        self.page = page
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lepton_airflow.serving.preload"])
        names = settings.names
        self.slots = self._context.RawArray("B", [NONE] * len(names))
        self.counters = Counters(self._context, settings.workers, len(names))
        self.restarts = 0
        self._listener = listener
        self._limits = _within_files(settings)
        self._workers: dict[int, _Worker] = {}
        self._held: dict[tuple[int, int], _Version] = {}  # what is in service
        self._changing = threading.Lock()  # one version at a time
        self._members = threading.Lock()  # a worker that starts has what is held, or is told
        self._loaded = threading.Condition()
        self._trials: set[BaseProcess] = set()
        self._watching = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._ending = False
        self._ended = False

    def start(self) -> None:
        """Start the workers, and keep them."""
        for number in range(self.settings.workers):
            self._start(number)
        self._watching.start()

    def part(self, endpoint: int) -> _Part:
        """What an endpoint's reconciler may do."""
        return _Part(self, endpoint)

    def living(self) -> int:
        """How many workers have given a sign of life lately."""
        now = time.monotonic()
        return sum(now - w.heard < _HUNG_S / 2 for w in list(self._workers.values()))

    def serves_all(self) -> bool:
        """Whether each endpoint has a version in service."""
        return all(slot != NONE for slot in self.slots[:])

    def put(self, endpoint: int, version: _Version, accept: Callable[[], bool]) -> None:
        """Have one worker after the other load a version, and then, at one moment, all answer with it; see :class:`reconcile.Fleet`.

        A worker that is started meanwhile loads what is in service, and then this version, as the others do.
        """
        with self._changing:
            before = self.slots[endpoint]
            slot = spare = 1 if before == 0 else 0
            told: list[_Worker] = []
            accepted = False
            try:
                while True:
                    while (w := self._next(told)) is not None:
                        told.append(w)
                        self._load(w, told, endpoint, slot, version)
                    accepted = accepted or accept()
                    if not accepted:
                        return
                    with self._members:
                        if set(self._workers.values()) <= set(
                            told
                        ):  # none has taken another's place meanwhile
                            self._held.pop((endpoint, before), None)
                            self._held[endpoint, slot] = version
                            self.slots[endpoint], spare = slot, before
                            return
            finally:
                # Requests that were admitted before hold the former version as long as they need it.
                for w in told if spare != NONE else ():
                    w.send("drop", endpoint, spare)

    def _next(self, told: Sequence[_Worker]) -> _Worker | None:
        """A worker that was not told to load a version, or None; waits for those that start, and load what is in service."""

        def all_run() -> bool:
            workers = list(self._workers.values())
            return len(workers) == self.settings.workers and not any(w.is_loading for w in workers)

        if not self._wait(all_run, told):
            raise NotNow(
                f"not all of {self.settings.workers} workers run with what is in service; the server's log says why."
            )
        return next((w for w in list(self._workers.values()) if w not in told), None)

    def _load(self, w: _Worker, told: Sequence[_Worker], endpoint: int, slot: int, version: _Version) -> None:
        """Have a worker load a version, and wait until it has done so."""
        w.load(endpoint, slot, version)
        if not self._wait(lambda: not w.is_loading, told):
            _kill(w.process)  # it listens to nothing else
            raise LeptonError(f"a worker has not loaded it within {_TRY_S:g} s. Deploy a lighter model.")
        if w.loaded[1] is not None:
            raise LeptonError(f"a worker cannot load it: {w.loaded[1]}")

    def _wait(self, condition: Callable[[], bool], told: Sequence[_Worker]) -> bool:
        """Wait for something; False: it takes too long.

        Raises Died when a worker has ended that was told to load a version: the last one while it loads, another one for want of memory.
        What ended otherwise may have had its reason in a request, and is told anew in its new place.
        """
        until = time.monotonic() + _TRY_S
        with self._loaded:
            while True:
                for w in told:
                    code = w.process.exitcode
                    loads = w.is_loading and w is told[-1]
                    if self._workers.get(w.number) is not w and (loads or code in (None, -signal.SIGKILL)):
                        raise Died(f"a worker that held it beside what is in service ended {_how(code)}.")
                if condition():
                    return True
                if self._ending:
                    raise LeptonError("the server ends.")
                if time.monotonic() > until:
                    return False
                self._loaded.wait(0.2)

    def try_out(
        self, desired: Desired, files: Mapping[str, bytes], golden: Mapping[str, Any]
    ) -> dict[str, float]:
        """Load and measure a version in a process of its own."""
        ours, theirs = self._context.Pipe()
        alive, lifeline = self._context.Pipe(duplex=False)
        trial = self._context.Process(
            target=worker.try_out, args=(theirs, alive, desired, dict(files), golden), daemon=True
        )
        try:
            trial.start()
        except (OSError, EOFError) as error:  # EOFError: the process that forks could not
            ours.close()
            lifeline.close()
            raise NotNow(f"no process can be started to try it: {error!r}.") from None
        finally:
            theirs.close()
            alive.close()
        self._trials.add(trial)
        try:
            outcome = self._outcome(ours)
        finally:
            self._trials.discard(trial)
            if outcome_late := trial.is_alive():
                trial.join(1)
            if outcome_late and trial.is_alive():
                trial.kill()
            trial.join()
            ours.close()
            lifeline.close()
        if outcome is None:
            raise Died(f"the process that tried it ended {_how(trial.exitcode)}.")
        if isinstance(outcome, LeptonError):
            raise outcome
        found: dict[str, float] = outcome
        if self.settings.limits.batch_rows:  # a request that no other joins waits for the whole of it
            found["latency_p95_ms"] += 1000 * self.settings.limits.batch_wait_s
        return found

    def _outcome(self, pipe: Pipe) -> Any:
        until = time.monotonic() + _TRY_S
        while time.monotonic() < until:
            if self._ending:
                return None
            if pipe.poll(0.2):
                try:
                    return pipe.recv()
                except (EOFError, OSError):
                    return None
        return LeptonError(f"it has not loaded within {_TRY_S:g} s. Deploy a lighter model.")

    async def end(self, drain_s: float) -> None:
        """Let the workers answer what they have admitted, and end them."""
        self._ending = True
        workers = list(self._workers.values())
        for w in workers:
            w.send("drain")
        await asyncio.sleep(drain_s)
        # The last worker takes the connections that wait, and closes the port.
        for w in workers[:-1]:
            w.send("close", False)
        await asyncio.sleep(0.02)
        for w in workers[-1:]:
            w.send("close", True)
        await asyncio.sleep(0.2)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # if that worker did not
        until = time.monotonic() + _DRAIN_S
        for w in workers:
            await asyncio.to_thread(self._has_ended, w, until)
        await asyncio.to_thread(self.kill)

    def kill(self) -> None:
        """End at once what still runs."""
        if self._ended:  # what ended then may have left its number to another process
            return
        was_ending, self._ending, self._ended = self._ending, True, True
        if self._watching.is_alive() and not was_ending:
            self._watching.join(5)  # it may be starting one
        for process in [*(w.process for w in list(self._workers.values())), *self._trials]:
            _kill(process)
            process.join(5)

    def _has_ended(self, w: _Worker, until: float) -> bool:
        """Wait for the end of a worker, by its pipe: its process tells of none when what forked it was killed."""
        while self._workers.get(w.number) is w:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def _start(self, number: int) -> None:
        ours, theirs = self._context.Pipe()
        post = Post(
            number=number,
            names=self.settings.names,
            limits=self._limits,
            listener=self._listener,
            pipe=theirs,
            slots=self.slots,
            counters=self.counters,
            grpc=self.grpc,
        )
        process = self._context.Process(target=worker.run, args=(post,), daemon=True)
        process.start()
        theirs.close()
        w = _Worker(number, process, ours, time.monotonic(), threading.Lock())
        with self._members:
            for (endpoint, slot), version in self._held.items():
                w.load(endpoint, slot, version)
            w.send("open")  # when it has what the others have
            self._workers[number] = w

    def _watch(self) -> None:
        """Hear what the workers say, and replace those that end or give no sign of life."""
        while not self._ended:
            try:
                self._watch_once()
            except Exception:  # whatever it was, the workers are to be kept
                log.exception("the watch over the workers")
                time.sleep(0.5)

    def _watch_once(self) -> None:
        by_pipe = {w.pipe: w for w in self._workers.values()}
        for pipe in connection.wait(list(by_pipe), timeout=1.0):
            w = by_pipe[pipe]  # type: ignore[index]
            try:
                self._hear(w, w.pipe.recv())
            except (EOFError, OSError):
                self._bury(w)
            except Exception:  # whatever it was, the others are to be kept
                log.exception("worker %d", w.number)
        # Before any is started, which may take long: what was said meanwhile was not heard.
        for w in list(self._workers.values()):
            if time.monotonic() - w.heard > _HUNG_S:
                log.error("worker %d has not answered for %g s", w.number, _HUNG_S)
                _kill(w.process)
                w.heard = time.monotonic()
        for number in sorted(set(range(self.settings.workers)) - self._workers.keys()):
            self._start_again(number)

    def _hear(self, w: _Worker, message: tuple[Any, ...]) -> None:
        w.heard = time.monotonic()
        what, *rest = message
        if what == "loaded":
            number, endpoint, slot, failure = rest
            with self._loaded:
                w.loaded = number, failure
                self._loaded.notify_all()
            if failure is not None and self.slots[endpoint] == slot:
                log.error("worker %d cannot load what is in service: %s", w.number, failure)
                _kill(w.process)  # so that it is tried again
        elif what == "page":
            w.send("page", self.page())

    def _bury(self, w: _Worker) -> None:
        """Take a worker out that has ended."""
        w.process.join(5)
        w.close()
        with self._members:
            self._workers.pop(w.number, None)
        self.counters.forget(w.number)
        if not self._ending:
            log.error("worker %d ended %s; another one takes its place", w.number, _how(w.process.exitcode))

    def _start_again(self, number: int) -> None:
        """Start a worker in the place of one that ended; tried again when that fails."""
        if self._ending:
            return
        self.restarts += 1
        if self.restarts > 20:
            time.sleep(0.5)  # workers that end again and again should not use the machine up
        try:
            self._start(number)
        except Exception:
            log.exception("worker %d cannot be started", number)
            time.sleep(0.5)


class _Part:
    """What a reconciler may do with the workers, for its endpoint."""

    def __init__(self, fleet: Fleet, endpoint: int) -> None:
        self._fleet = fleet
        self._endpoint = endpoint

    def try_out(
        self, desired: Desired, files: Mapping[str, bytes], golden: Mapping[str, Any]
    ) -> dict[str, float]:
        return self._fleet.try_out(desired, files, golden)

    def put(
        self,
        desired: Desired,
        files: Mapping[str, bytes],
        numbers: dict[str, float],
        accept: Callable[[], bool],
    ) -> None:
        self._fleet.put(self._endpoint, (desired, files, numbers), accept)


class _Metrics:
    """What the workers have counted and the reconcilers know, as Prometheus collects it."""

    def __init__(self, fleet: Fleet, reconcilers: Sequence[Reconciler]) -> None:
        self.fleet = fleet
        self.reconcilers = reconcilers

    def collect(self) -> list[Any]:
        counters = self.fleet.counters
        requests = CounterMetricFamily(
            "lepton_serve_requests", "Inference requests by HTTP status.", labels=["endpoint", "status"]
        )
        seconds = HistogramMetricFamily(
            "lepton_serve_request_seconds",
            "Time from the head of an inference request to its answer.",
            labels=["endpoint"],
        )
        rows = CounterMetricFamily("lepton_serve_rows", "Rows answered.", labels=["endpoint"])
        in_flight = GaugeMetricFamily(
            "lepton_serve_in_flight",
            "Large requests, and those that wait for a batch, admitted and not answered.",
            labels=["endpoint"],
        )
        model = GaugeMetricFamily(
            "lepton_serve_model_info",
            "1 for the version in service.",
            labels=["endpoint", "version", "sha256"],
        )
        state = GaugeMetricFamily(
            "lepton_serve_state",
            "1 for the state of the newest desired version.",
            labels=["endpoint", "state"],
        )
        sequence = GaugeMetricFamily(
            "lepton_serve_sequence",
            "Numbers of the versions desired and in service.",
            labels=["endpoint", "which"],
        )
        failures = CounterMetricFamily(
            "lepton_serve_store_failures", "Failed looks at the store since the start.", labels=["endpoint"]
        )
        beats = CounterMetricFamily(
            "lepton_serve_heartbeat_failures",
            "Reports that could not be written to the store.",
            labels=["endpoint"],
        )
        beaten = GaugeMetricFamily(
            "lepton_serve_heartbeat_timestamp_seconds",
            "When the last report was written.",
            labels=["endpoint"],
        )
        problems = GaugeMetricFamily(
            "lepton_serve_store_problems",
            "Things in the store that are damaged or cannot be read.",
            labels=["endpoint"],
        )
        for number, reconciler in enumerate(self.reconcilers):
            name, status = reconciler.endpoint, reconciler.status
            for code, count in counters.requests(number):
                requests.add_metric([name, str(code)], count)
            buckets, total = counters.seconds(number)
            seconds.add_metric([name], buckets, total)
            rows.add_metric([name], counters.rows(number))
            in_flight.add_metric([name], counters.in_flight(number))
            if status.version and status.sha256:
                model.add_metric([name, status.version, status.sha256], 1)
            for possible in ("idle", "loading", "serving", "rejected"):
                state.add_metric([name, possible], possible == status.state)
            for which, value in (("desired", status.desired), ("serving", status.serving)):
                sequence.add_metric([name, which], value or 0)
            failures.add_metric([name], reconciler.failures)
            beats.add_metric([name], reconciler.beat_failures)
            beaten.add_metric([name], reconciler.beaten)
            problems.add_metric([name], len(status.problems))
        workers = GaugeMetricFamily(
            "lepton_serve_workers", "Workers that give signs of life.", self.fleet.living()
        )
        restarts = CounterMetricFamily(
            "lepton_serve_worker_restarts", "Workers that ended and were replaced.", self.fleet.restarts
        )
        return [
            *(requests, seconds, rows, in_flight, model, state, sequence, failures, beats, beaten, problems),
            *(workers, restarts),
        ]


def _within_files(settings: Settings) -> Limits:
    """The limits of each worker, with no more connections than it may have files; raises that limit as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    wanted = -(-settings.limits.connections.connections // settings.workers)
    files = (soft - _RESERVED_FILES) // (1 if settings.grpc_port is None else 2)
    allowed = wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, files))
    if allowed < wanted:
        log.warning(
            "only %d files may be open: each worker takes %d connections, not %d", soft, allowed, wanted
        )
    connections = replace(
        settings.limits.connections,
        connections=allowed,
        per_address=max(1, min(-(-settings.limits.connections.per_address // settings.workers), allowed)),
    )
    return replace(settings.limits, connections=connections)


def _kill(process: BaseProcess) -> None:
    """End a process that has not ended, also where multiprocessing takes it for ended, as when what forked it was killed."""
    if process.pid is not None:
        with suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with suppress(ValueError):
            return f"by {signal.Signals(-exitcode).name}"
    return f"with exit code {exitcode}"


def _address(host: str) -> str:
    """The name under which others reach a host that this server listens on."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - a comparison: it listens there only when told to
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int, option: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise BadConfiguration(
            f"cannot listen on {host}:{port}: {reason}. Pass another --host or --{option}."
        ) from None


def _claim(host: str, port: int, option: str) -> socket.socket:
    """Take a port on which the workers, and nobody else, will listen."""
    # Where another server listens, this fails, although that one may share.
    with _listen(host, port, option) as probe:
        family, address = probe.family, probe.getsockname()
    held = socket.socket(family)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(address)
    return held


def _named(bound: socket.socket) -> tuple[str, int]:
    host, port = bound.getsockname()[:2]
    return f"[{host}]" if ":" in host else host, port
