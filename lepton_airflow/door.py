"""What happens around a stage, wherever it runs: cache, scratch space, receipt, and an end with its parent."""

from __future__ import annotations

import logging
import math
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import ContractError, LeptonError, MissingExtra, OutOfMemory, StoreError
from lepton_airflow.stages import Result, RunInfo, Stage, build, cache_key, get_stage, versions
from lepton_airflow.store import Connection, Store, now

log = logging.getLogger(__name__)

_STATUS = {99: "skipped", 80: "refused", 75: "preempted"}


def perform(
    request: Request,
    connections: Mapping[str, Connection] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Receipt:
    """Run one stage, or take its result from the cache, and say in a receipt what came of it; raises nothing.

    The receipt is kept in the store, under the run key, also when the stage failed.
    """
    connections = connections or {}
    started = time.monotonic()
    store: Store | None = None
    try:
        store = Store(request.store, connections.get(request.store_connection or ""))
        receipt = _perform(request, store, connections, should_stop)
    except MemoryError:
        receipt = _failed(request, OutOfMemory(f"{request.stage} ran out of memory: give it more, or lower its limits."))
    except Exception as error:
        if not isinstance(error, LeptonError):
            log.error("%s", redact(traceback.format_exc(), connections))
        receipt = _failed(request, error, connections)
    if receipt.status not in ("done", "cached"):
        receipt = replace(receipt, seconds=round(time.monotonic() - started, 3))
    if store is not None:
        try:
            store.record(receipt)
        except StoreError as error:  # a receipt that cannot be kept is no proof
            return receipt if receipt.error else _failed(request, error)
    return receipt


def _perform(
    request: Request, store: Store, connections: Mapping[str, Connection], should_stop: Callable[[], bool]
) -> Receipt:
    kind = get_stage(request.stage)
    stage = build(request.stage, request.parameters)
    with tempfile.TemporaryDirectory(prefix="lepton-") as scratch:
        run = RunInfo(
            store=store,
            workdir=Path(scratch),
            run_key=request.run_key,
            identity=request.identity,
            window=request.window,
            window_note=request.window_note,
            connections=connections,
            refresh=request.cache == "refresh",
            should_stop=should_stop,
        )
        key = cache_key(stage, run)
        run.cache_key = key
        if kind.cacheable and key and request.cache == "use":
            hit, why = store.cache_lookup(request.stage, key, request.cache_ttl_s)
            log.info("cache %s", why)
            if hit is not None:
                return replace(hit, run_key=request.run_key, status="cached")
        elif kind.cacheable:
            log.info("cache not used: %s", "an input has no digest" if not key else f"cache={request.cache!r}")
        started = time.monotonic()
        result = _run(kind, stage, run)
        receipt = Receipt(
            stage=request.stage,
            run_key=request.run_key,
            cache_key=key,
            status="done",
            summary=result.summary,
            artifacts=dict(result.artifacts),
            values=plain(result.values),
            metrics=plain(result.metrics),
            links=dict(result.links),
            seconds=round(time.monotonic() - started, 3),
            versions=versions(kind),
            created=now(),
        )
        undeclared = sorted({*receipt.artifacts, *receipt.values} - set(kind.outputs))
        if undeclared:
            raise ContractError(f"{request.stage} returned {', '.join(undeclared)}, which its `outputs` does not name.")
        receipt.to_json()  # too large or not JSON: say so before it is recorded
        if kind.cacheable and request.cache != "off":
            store.cache_record(receipt)
        return receipt


def _run(kind: type[Stage], stage: Stage, run: RunInfo) -> Result:
    try:
        return stage.run(run)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if not kind.extra or library not in ENGINE_MODULES:
            raise
        raise MissingExtra(kind.__name__, library, kind.extra) from error


# Modules that an extra of this package brings; any other missing module is the user's own.
ENGINE_MODULES = frozenset(
    "adbc_driver_manager adbc_driver_postgresql adbc_driver_sqlite alembic duckdb duckdb_engine great_expectations "
    "matplotlib mlflow numpy onnx onnxruntime onnxscript optuna pandas pyarrow scipy skl2onnx sklearn sqlalchemy "
    "torch".split()
)


def _failed(request: Request, error: Exception, connections: Mapping[str, Connection] | None = None) -> Receipt:
    exit_code = error.exit_code if isinstance(error, LeptonError) else 1
    kind = type(error).__name__
    text = str(error) or kind
    message = redact(text if isinstance(error, LeptonError) else f"{kind}: {text}", connections or {})
    message = message if len(message) <= _MAX_MESSAGE else message[: _MAX_MESSAGE - 1] + "…"
    return Receipt(
        stage=request.stage,
        run_key=request.run_key,
        cache_key=None,
        status=_STATUS.get(exit_code, "failed"),
        summary=message,
        created=now(),
        error={"kind": kind, "message": message, "exit_code": exit_code},
    )


_MAX_MESSAGE = 1800  # characters: the message stands twice in a receipt of at most 8 KB


def redact(text: str, connections: Mapping[str, Connection]) -> str:
    """The text without any secret of the given Connections: a driver's message may quote its whole URL."""
    for connection in connections.values():
        for secret in _secrets(connection):
            text = text.replace(secret, "***")
    return text


def _secrets(connection: Connection) -> list[str]:
    found = [connection.password or ""]
    stack: list[Any] = [connection.extra]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, str):
            found.append(item)
    return sorted((s for s in found if len(s) >= _SHORTEST_SECRET), key=len, reverse=True)


_SHORTEST_SECRET = 5  # shorter ones would blank ordinary words


def plain(value: Any) -> Any:
    """JSON values: numpy scalars become numbers, NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def stop_on_sigterm(kind: type[Stage] | None) -> Callable[[], bool]:
    """Handle SIGTERM: a resumable stage is told through ``should_stop``, any other ends at once as preempted."""
    from lepton_airflow.errors import Preempted

    asked = threading.Event()

    def handle(_signum: int, _frame: Any) -> None:
        asked.set()
        if kind is None or not kind.resumable:
            raise Preempted("asked to stop (SIGTERM); nothing was kept but finished artifacts, the next try starts again.")

    signal.signal(signal.SIGTERM, handle)
    return asked.is_set


def end_with_parent(pipe: int) -> None:
    """End this process and all its children once the other end of ``pipe`` closes, as it does when a worker is killed.

    Must be called in the leader of a process group: the whole group is told to stop, and killed two seconds later.
    """

    def watch() -> None:
        with suppress(OSError):
            while os.read(pipe, 1):
                pass
        group = os.getpgrp()
        log.error("the process that started this stage is gone: stopping")
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
        time.sleep(2)
        os.killpg(group, signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
