"""One run of a stage, wherever it runs: ask the cache, make scratch space, do the work, write the receipt."""

from __future__ import annotations

import bisect
import json
import logging
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lepton_airflow.connections import Connection, redact
from lepton_airflow.contract import Receipt, Request, digest_of
from lepton_airflow.errors import (
    BadConfiguration,
    ContractError,
    LeptonError,
    MissingExtra,
    OutOfMemory,
    Preempted,
)
from lepton_airflow.execution.stop import StopOnSigterm, Stopped
from lepton_airflow.sdk.fingerprint import cache_key_parts, in_short, versions
from lepton_airflow.sdk.stage import Result, RunInfo, Stage
from lepton_airflow.sdk.values import plain_json
from lepton_airflow.stages import build
from lepton_airflow.store import cache
from lepton_airflow.store.files import Store, now

log = logging.getLogger(__name__)

# Up to this size [bytes] inputs are digested on the worker before a process is started: a tenth of a second, where the
# process takes half a second to start.
_QUICKLY_READ = 64 << 20
_STOPPED = "asked to stop (SIGTERM); nothing was kept but finished artifacts, the next try starts again."
_STOPPED_EARLY = "asked to stop (SIGTERM) before it had saved anything; what an earlier try has kept stays."
_STATUS = {99: "skipped", 80: "refused", 75: "preempted"}


def run_stage(
    request: Request,
    connections: Mapping[str, Connection] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Receipt:
    """Run one stage, or take its result from the cache, and say in a receipt what came of it; raises nothing.

    The receipt is kept in the store, under the run key, also when the stage failed.
    """
    connections = connections or {}
    started = time.monotonic()
    stop = should_stop if isinstance(should_stop, StopOnSigterm) else None
    stores: list[Store] = []
    try:
        if stop:
            stop.begin()
        receipt = _attempt(request, stores, connections, should_stop)
        if stop:
            stop.end()
    except Stopped:
        if stop:
            stop.end()
        receipt = _failed(request, Preempted(_STOPPED_EARLY if stop and stop.resumable else _STOPPED))
    store = stores[0] if stores else None
    if receipt.status not in ("done", "cached"):
        receipt = replace(receipt, seconds=round(time.monotonic() - started, 3))
    # The cache entry was written without it: the entry answers any request, this receipt one alone.
    receipt = replace(receipt, nonce=request.nonce)
    if store is not None:
        try:
            store.record(receipt)
        except LeptonError as error:
            # The task may turn green only on a receipt in the store. A failure is told also without one.
            if not receipt.error:
                return replace(_failed(request, error, connections), nonce=request.nonce)
    return receipt


def _attempt(
    request: Request,
    stores: list[Store],
    connections: Mapping[str, Connection],
    should_stop: Callable[[], bool],
) -> Receipt:
    """Run the stage; what came of it, also of a failure. Its store is added to ``stores`` once it is open."""
    try:
        stores.append(Store(request.store, connections.get(request.store_connection or "")))
        return _perform(request, stores[0], connections, should_stop)
    except MemoryError:
        error: Exception = OutOfMemory(
            f"{request.stage} ran out of memory: give it more, or lower its limits."
        )
    except SystemExit as ended:
        error = LeptonError(
            f"{request.stage}: its code called sys.exit({ended.code!r}); raise an error, or Skipped, to end a stage."
        )
    except Exception as caught:  # noqa: BLE001 - every failure gets a receipt
        error = caught
    if should_stop() and not isinstance(error, Preempted):
        # The signal ends this stage's children too, and libraries make all sorts of errors of that: no verdict on anything.
        log.info("asked to stop; what then failed does not count: %s", redact(repr(error), connections))
        error = Preempted(_STOPPED)
    elif not isinstance(error, LeptonError):
        trace = "".join(traceback.format_exception(error))
        log.error("%s", _without_long_values(redact(trace, connections)))
    return _failed(request, error, connections)


def recall(request: Request, connections: Mapping[str, Connection]) -> Receipt | None:
    """The receipt of an equal earlier run, recorded as this run's too; None when the stage has to run.

    For runners whose stages run with the worker's own interpreter and code: a cached task then starts no process. The cache
    is asked only where the digests of the inputs are known or quickly computed, because a miss computes them twice. An
    error is not raised here: :func:`run_stage` meets it again and reports it.
    """
    try:
        stage = build(request.stage, request.parameters)
        if request.cache != "use" or not stage.cacheable:
            return None
        store = Store(request.store, connections.get(request.store_connection or ""))
        to_read = stage.bytes_to_digest(store)
        if to_read is None or to_read > _QUICKLY_READ:
            return None
        # A miss is logged where the stage then runs.
        with _prepared(request, store, connections, lambda: False, logging.DEBUG) as (_, _, hit):
            if hit is not None:
                store.record(hit)
            return hit
    except Exception as error:  # noqa: BLE001 - see above
        log.debug("the cache was not asked in advance: %s", redact(repr(error), connections))
        return None


@contextmanager
def _prepared(
    request: Request,
    store: Store,
    connections: Mapping[str, Connection],
    should_stop: Callable[[], bool],
    level_of_a_miss: int = logging.INFO,
) -> Iterator[tuple[Stage, RunInfo, Receipt | None]]:
    """Build the stage, make its scratch space, ask the cache: the stage, its RunInfo, and the receipt of a hit."""
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
        parts = cache_key_parts(stage, run)
        run.cache_key = None if parts is None else digest_of(list(parts.values()))
        hit: Receipt | None = None
        if type(stage).cacheable and run.cache_key and request.cache == "use":
            hit, why = cache.lookup(store, request.stage, run.cache_key, request.cache_ttl_s)
            level = level_of_a_miss if hit is None else logging.INFO
            log.log(level, "cache %s", why)
            log.log(level, "cache key %s from %s", run.cache_key[:12], in_short(parts or {}))
        elif type(stage).cacheable:
            reason = f"cache={request.cache!r}" if run.cache_key else "an input has no digest"
            log.info("cache not used: %s", reason)
        yield stage, run, hit and replace(hit, run_key=request.run_key, status="cached")


def _perform(
    request: Request, store: Store, connections: Mapping[str, Connection], should_stop: Callable[[], bool]
) -> Receipt:
    with _prepared(request, store, connections, should_stop) as (stage, run, hit):
        if hit is not None:
            return hit
        store.check_writable()
        kind, key = type(stage), run.cache_key
        started = time.monotonic()
        result = _run(kind, stage, run)
        if isinstance(should_stop, StopOnSigterm):
            should_stop.end()  # from here on it is quicker to finish
            if should_stop.disturbed:
                raise Preempted(_STOPPED)  # something took the interruption for an error, and went on with it
        receipt = Receipt(
            stage=request.stage,
            run_key=request.run_key,
            cache_key=key,
            status="done",
            summary=result.summary,
            artifacts=dict(result.artifacts),
            values=plain_json(result.values),
            metrics=plain_json(result.metrics),
            links=dict(result.links),
            seconds=round(time.monotonic() - started, 3),
            versions=versions(kind),
            created=now(),
        )
        undeclared = sorted({*receipt.artifacts, *receipt.values} - set(kind.outputs))
        if undeclared:
            raise ContractError(
                f"{request.stage} returned {', '.join(undeclared)}, which its `outputs` does not name."
            )
        # Raises when it is too large or not JSON, before it is recorded; as `cached` it is a few bytes longer.
        replace(receipt, status="cached").to_json()
        if kind.cacheable and request.cache != "off":
            cache.record(store, receipt)
        return receipt


def _run(kind: type[Stage], stage: Stage, run: RunInfo) -> Result:
    try:
        result = stage.run(run)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if kind.extra and library in ENGINE_MODULES:
            raise MissingExtra(kind.__name__, library, kind.extra) from error
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
        raise BadConfiguration(
            f"{kind.__name__}: there is no module {error.name!r} where the stage runs; {frames[-1].filename} line "
            f"{frames[-1].lineno} asks for it. Put it beside the DAG file or install it; for a pod, into the image."
        ) from error
    if not isinstance(result, Result):
        raise ContractError(f"{kind.__name__}.run returned {type(result).__name__}, expected a Result.")
    return result


# Modules that an extra of this package brings. Any other missing module is one that the user's code asks for.
ENGINE_MODULES = frozenset(
    [
        "adbc_driver_manager",
        "adbc_driver_postgresql",
        "adbc_driver_sqlite",
        "alembic",
        "deltalake",
        "duckdb",
        "duckdb_engine",
        "great_expectations",
        "matplotlib",
        "mlflow",
        "numpy",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "optuna",
        "pandas",
        "pyarrow",
        "pyiceberg",
        "scipy",
        "skl2onnx",
        "sklearn",
        "sqlalchemy",
        "torch",
    ]
)


def _failed(
    request: Request, error: Exception, connections: Mapping[str, Connection] | None = None
) -> Receipt:
    exit_code = error.exit_code if isinstance(error, LeptonError) else 1
    kind = type(error).__name__
    text = str(error) or kind
    text = text if isinstance(error, LeptonError) else f"{kind}: {text}"
    message = _clipped(_without_long_values(redact(text, connections or {})))
    return Receipt(
        stage=request.stage,
        run_key=request.run_key,
        cache_key=None,
        status=_STATUS.get(exit_code, "failed"),
        summary=message,
        created=now(),
        error={"kind": kind, "message": message, "exit_code": exit_code},
    )


# In quotes; an apostrophe within or after a word is none.
_LONG_VALUE = re.compile(r"""(?s)(?<!\w)(['"])(?=(?:(?!\1)[^\\]|\\.){201})((?:(?!\1)[^\\]|\\.)+)\1(?!\w)""")
_SHOWN = 80


def _without_long_values(text: str) -> str:
    """The text with the beginnings only of long values in quotes: a library may quote a whole document, with what is personal in it."""
    return _LONG_VALUE.sub(lambda m: f"{m[1]}{m[2][:_SHOWN]}…{m[1]} ({len(m[2]):,} characters)", text)


# As JSON. The message stands in a receipt twice, and a receipt has at most 8 KB.
_MAX_MESSAGE_BYTES = 3000


def _clipped(text: str, limit: int = _MAX_MESSAGE_BYTES) -> str:
    """The text, or as much of its beginning as a receipt can carry; ``limit`` counts it as JSON [bytes]."""
    text = text.encode("utf-8", "backslashreplace").decode()

    def room(end: int) -> bool:
        return len(json.dumps(text[:end], ensure_ascii=False).encode()) <= limit

    if room(len(text)):
        return text
    return text[: bisect.bisect_left(range(limit), True, key=lambda end: not room(end)) - 1] + "…"


# Kubernetes cuts a container's termination message at this size.
MAX_TERMINATION_BYTES = 4096


def in_brief(receipt: Receipt) -> str:
    """The receipt as JSON of at most 4096 bytes, for a container's termination message.

    When it is longer, metrics, versions, links, values and artifacts are left out in this order, and at last the texts are
    cut. The whole receipt is in the store; how the stage ended is never left out.
    """
    spare: dict[str, Any] = {}
    for name in ("", "metrics", "versions", "links", "values", "artifacts"):
        spare |= {name: {}} if name else {}
        text = replace(receipt, **spare).to_json()
        if len(text.encode()) <= MAX_TERMINATION_BYTES:
            return text
    error = receipt.error and receipt.error | {"message": _clipped(receipt.error["message"], 2000)}
    return replace(receipt, **spare, summary=_clipped(receipt.summary, 1000), error=error).to_json()
