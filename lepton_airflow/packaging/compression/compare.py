"""Which number format to ship?

A candidate replaces the original only if it is not worse (paired on the same rows, whole interval above a margin), nowhere
slower by more than a margin, and clearly faster or much smaller. Keeping the original is the normal answer for models whose
time does not go into matrix products.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadConfiguration, BadInput, did_you_mean, first_line
from lepton_airflow.packaging.compression.convert import METHODS, Graph, convert, inspect, prepare
from lepton_airflow.packaging.compression.latency import Latency, median_interval, time_side_by_side
from lepton_airflow.packaging.compression.quality import Judge, Quality

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from lepton_airflow.packaging.compression.convert import Feed


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a model is asked to do.

    :ivar output: its main output.
    :ivar calibration: gives calibration rows in batches.
    :ivar predict: predictions of a model, given as ONNX bytes, on the rows of the judge.
    :ivar timing: by batch size, the feeds that calls are timed with.
    """

    output: str
    calibration: Callable[[], Iterator[Feed]]
    predict: Callable[[bytes], NDArray[Any]]
    timing: Mapping[int, Sequence[Feed]]


@dataclass(frozen=True)
class Candidate:
    """One number format and what was found about it.

    :ivar verdict: ``original``, ``better``, or why not: ``no-op``, ``failed``, ``worse``, ``slower``, ``no gain``.
    :ivar difference: largest difference of a prediction from the original's, None when there are none.
    """

    name: str
    verdict: str
    reason: str
    bytes: int | None = None
    graph: Graph | None = None
    quality: Quality | None = None
    latency: list[Latency] = field(default_factory=list)
    difference: float | None = None

    @property
    def speedup(self) -> float:
        """How many times as fast as the original: the geometric mean over the batch sizes."""
        return math.exp(statistics.fmean(math.log(item.speedup) for item in self.latency))


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a candidate must reach, beside the judge's ``max_loss``.

    :ivar min_speedup: how many times as fast it must be at one batch size, with its whole interval [times].
    :ivar max_slowdown: how much slower it may be at any batch size, with its whole interval [share].
    :ivar min_shrink: how many times smaller it must be when it is no faster [times].
    """

    min_speedup: float = 1.1
    max_slowdown: float = 0.03
    min_shrink: float = 2.0


@dataclass(frozen=True)
class Comparison:
    """All candidates, the original first, and the one to ship."""

    chosen: str
    reason: str
    candidates: list[Candidate]
    models: dict[str, bytes] = field(repr=False)


def compare(
    model: bytes,
    work: Work,
    judge: Judge,
    methods: Sequence[str] = tuple(METHODS),
    *,
    rules: Rules = Rules(),
    rounds: int = 12,
    seconds: float = 30.0,
    threads: int = 1,
    seed: int = 0,
    check_stop: Callable[[], None] = lambda: None,
) -> Comparison:
    """Convert a model, measure each candidate beside it, and choose.

    Chosen is the fastest candidate whose metric is not worse by more than ``judge.max_loss`` (the whole interval of the
    paired difference says so), that is at no batch size slower (the whole interval of the speedup is at least
    ``1 - max_slowdown``: of two models of equal speed, half of all intervals reach below 1) and at one of them faster (the
    whole interval is at least ``min_speedup``). Without such a one it is the smallest that is not worse, not slower and
    ``min_shrink`` times smaller; without that, the original.

    :raises BadInput: the rows do not define the metric.
    :raises BadConfiguration: an unknown method, or too few rounds for an interval.
    """
    import numpy as np

    for method in methods:
        if method not in METHODS:
            raise BadConfiguration(
                f"candidates: {method!r} is no number format; {did_you_mean(method, METHODS)}"
            )
    median_interval([1.0] * rounds)  # refuses too few before the work
    predicted = np.asarray(work.predict(model), dtype=np.float64)
    original = Candidate("fp32", "original", "", len(model), None, judge.value(predicted))
    try:
        prepared = prepare(model)
    except Exception as error:  # noqa: BLE001 - any kind of onnx, protobuf and onnxruntime
        return _unprepared(model, original, methods, error)
    before = inspect(prepared)
    models = {"fp32": model}
    found = {"fp32": replace(original, graph=before)}
    for method in methods:
        check_stop()
        found[method], made = _scored(method, prepared, before, work, judge, predicted)
        if made is not None:
            models[method] = made
    if len(models) > 1:
        latency = time_side_by_side(
            models,
            work.output,
            work.timing,
            rounds=rounds,
            seconds=seconds,
            threads=threads,
            seed=seed,
            check_stop=check_stop,
        )
        for name, measured in latency.items():
            found[name] = _judged(found[name], measured, len(model), judge, rules)
    candidates = list(found.values())
    chosen = _choose(candidates, rules)
    reason = chosen.reason if chosen.verdict == "better" else _why_kept(before, candidates)
    return Comparison(chosen.name, reason, candidates, models)


def _unprepared(model: bytes, original: Candidate, methods: Sequence[str], error: Exception) -> Comparison:
    """The answer for a graph that onnxruntime cannot prepare for conversion."""
    broken = f"onnxruntime cannot prepare the model: {first_line(error)[:200]}"
    failed = [Candidate(method, "failed", broken) for method in methods]
    return Comparison("fp32", f"kept fp32, because {broken}", [original, *failed], {"fp32": model})


def _scored(
    method: str,
    prepared: onnx.ModelProto,
    before: Graph,
    work: Work,
    judge: Judge,
    original: NDArray[np.float64],
) -> tuple[Candidate, bytes | None]:
    """Convert and score: a candidate, which has no verdict as long as it may be chosen, and its bytes if they can be timed."""
    import numpy as np

    if not before.linear:
        return Candidate(method, "no-op", _nothing_to_gain(before)), None
    try:
        made = convert(prepared, method, work.calibration)
        graph = inspect(made)
        content = made.SerializeToString(deterministic=True)
        if graph.lowered:
            _try_in_a_process(content, work.output, work.timing[max(work.timing)][0])
            predicted = np.asarray(work.predict(content), dtype=np.float64)
    except Exception as error:  # noqa: BLE001 - any kind of onnx, protobuf and onnxruntime
        return Candidate(method, "failed", f"it cannot be made or run: {first_line(error)[:200]}"), None
    size = len(content)
    if not graph.lowered:
        reason = f"the conversion changed none of the {before.linear} Conv, Gemm and MatMul"
        return Candidate(method, "no-op", reason, size, graph), None
    wrong = int((~np.isfinite(predicted)).reshape(len(predicted), -1).any(axis=1).sum())
    if wrong:
        reason = f"{wrong:,} of {len(predicted):,} predictions are missing or infinite"
        return Candidate(method, "worse", reason, size, graph), content
    difference = float(np.abs(predicted - original).max())
    try:
        quality = judge.compare(original, predicted)
    except BadInput as error:  # the original's predictions passed, so these are no longer probabilities
        return Candidate(method, "worse", str(error).rstrip("."), size, graph, None, [], difference), content
    return Candidate(method, "", "", size, graph, quality, [], difference), content


def _try_in_a_process(model: bytes, output: str, feed: Feed) -> None:
    """Open a model and run one batch in a process of its own; raises RuntimeError when that process dies or hangs.

    onnxruntime 1.31 dies of a segmentation fault when it opens a transformer encoder of torch's exporter in 16 bits. In the
    stage's own process that would end the stage.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model)
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _TRY, str(path), output],
                input=_feed_as_json(feed),
                check=False,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TRY_S,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"onnxruntime has not run one batch of it within {_TRY_S} s") from None
    if done.returncode < 0:
        raise RuntimeError(f"onnxruntime dies of signal {-done.returncode} when it opens or runs it")


def _feed_as_json(feed: Feed) -> str:
    """The arrays of a call, each as its type, shape and values."""
    arrays = {
        name: ("O" if array.dtype.kind == "O" else array.dtype.str, array.shape, array.ravel().tolist())
        for name, array in feed.items()
    }
    return json.dumps(arrays)


_TRY_S = 120
# It imports nothing of this package, so that it runs wherever onnxruntime does. A positive exit status is ignored: the
# same error is raised again when the model is asked for predictions.
_TRY = """
import json, sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {n: numpy.array(v, dtype).reshape(shape) for n, (dtype, shape, v) in json.load(sys.stdin).items()}
session.run([sys.argv[2]], feed)
"""


def _judged(found: Candidate, latency: list[Latency], original: int, judge: Judge, rules: Rules) -> Candidate:
    """The candidate with its latencies, and with a verdict if it had none.

    :param original: size of the original [bytes].
    """
    found = replace(found, latency=latency)
    quality = found.quality
    if found.verdict or quality is None or found.bytes is None:
        return found
    slowest = min(latency, key=lambda item: item.speedup_high)
    doubtful = min(latency, key=lambda item: item.speedup_low)
    fastest = max(latency, key=lambda item: item.speedup_low)
    shrink = original / found.bytes
    if quality.difference_low <= -judge.max_loss:
        verdict = "worse"
        reason = (
            f"{quality.metric} differs by {quality.difference:+.4f} [{quality.difference_low:+.4f}, "
            f"{quality.difference_high:+.4f}] (positive is better), which does not lie above -{judge.max_loss:g}"
        )
    elif slowest.speedup_high < 1 - rules.max_slowdown:
        verdict, reason = "slower", f"it is {_times(slowest)}"
    elif doubtful.speedup_low < 1 - rules.max_slowdown:
        verdict = "no gain"
        reason = f"it is {_times(doubtful)}, so it may be slower by more than {100 * rules.max_slowdown:g}%"
    elif fastest.speedup_low >= rules.min_speedup or shrink >= rules.min_shrink:
        verdict = "better"
        reason = (
            f"{_times(fastest)}, {shrink:.1f} times smaller, {quality.metric} {quality.value:.4f} "
            f"({quality.difference:+.4f}, at worst {quality.difference_low:+.4f})"
        )
    else:
        verdict = "no gain"
        reason = (
            f"it is {_times(fastest)} and {shrink:.1f} times smaller, required is {rules.min_speedup:g} (whole interval) or "
            f"{rules.min_shrink:g}"
        )
    return replace(found, verdict=verdict, reason=reason)


def _choose(candidates: Sequence[Candidate], rules: Rules) -> Candidate:
    """The fastest of those that are clearly faster, else the smallest of those that are better, else the original."""
    better = [c for c in candidates if c.verdict == "better"]
    faster = [c for c in better if max(item.speedup_low for item in c.latency) >= rules.min_speedup]
    if faster:
        return max(faster, key=lambda c: c.speedup)
    return min(better, key=lambda c: c.bytes or 0) if better else candidates[0]


def _why_kept(before: Graph, candidates: Sequence[Candidate]) -> str:
    if not before.linear:
        return f"kept fp32, because {_nothing_to_gain(before)}"
    if len(candidates) == 1:
        return "kept fp32, because no candidate was asked for"
    return "kept fp32, because " + "; ".join(f"{c.name}: {c.reason}" for c in candidates[1:])


def _nothing_to_gain(graph: Graph) -> str:
    names = list(graph.ops)
    return (
        "there is nothing to quantize: no Conv, Gemm or MatMul with constant weights among its operators "
        f"({', '.join(names[:15])}{', …' if len(names) > 15 else ''})"
    )


def _times(latency: Latency) -> str:
    return (
        f"{latency.speedup:.2f} times as fast [{latency.speedup_low:.2f}, {latency.speedup_high:.2f}] at batch "
        f"{latency.batch}"
    )
