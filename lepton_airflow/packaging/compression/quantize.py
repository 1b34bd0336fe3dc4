"""Does a smaller number format pay on this CPU? Converts an ONNX model, measures what came out, and decides.

A candidate replaces the original only if it is not worse (paired on the same rows, whole interval above a margin), nowhere
slower by more than a margin, and clearly faster or much smaller. Keeping the original is the normal answer for models whose
time does not go into matrix products. Works on ONNX bytes and arrays, so that models of any shape can be compared.
"""

from __future__ import annotations

import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.dataset import first_line
from lepton_airflow.errors import BadConfiguration, BadInput, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnxruntime
    from numpy.typing import ArrayLike, NDArray

    Feed = Mapping[str, NDArray[Any]]  # what one call of a session takes

METHODS = {
    "dynamic_int8": "weights as 8-bit integers, activations rounded call by call",
    "static_int8": "weights and activations as 8-bit integers, their ranges taken from calibration rows",
    "fp16": "16-bit floats from the first matrix product on",
}
_LINEAR = ("Conv", "Gemm", "MatMul")  # with constant weights: what there is to gain from
_INTEGER = ("ConvInteger", "MatMulInteger")  # what quantize_dynamic makes of them
_BETWEEN = (
    "Clip",
    "MaxPool",
    "Relu",
)  # let through 8-bit tensors, so that two layers need no detour over floats
_CONFIDENCE = 0.95
_FEWEST_CALLS, _MOST_CALLS = 5, 200  # of one model, one batch size and one round
_FLAGS = (  # instruction sets that matrix kernels are chosen by, x86 and ARM
    *(
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_int8",
        "amx_bf16",
        "amx_fp16",
    ),
    *("asimddp", "asimdhp", "i8mm", "bf16", "sve"),
)


# -- the machine -------------------------------------------------------------------------------------------------------


def cpu_flags() -> list[str]:
    """The instruction sets of this CPU that 8-bit and 16-bit kernels use, as the kernel names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(found[1].split()) if found else set()
    return [flag for flag in _FLAGS if flag in present]


def _saturates() -> bool:
    """Whether products of two 8-bit numbers are summed in 16 bits here: x86 without VNNI, where 7-bit weights are safe."""
    return platform.machine() in ("x86_64", "AMD64") and not any("vnni" in flag for flag in cpu_flags())


# -- conversion --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """What an ONNX model consists of.

    :ivar ops: how many nodes of each operator, nested graphs included.
    :ivar linear: how many of them are Conv, Gemm or MatMul with constant weights.
    :ivar lowered: how many of those compute with weights of fewer than 32 bits.
    """

    ops: dict[str, int]
    linear: int
    lowered: int


def inspect(model: onnx.ModelProto) -> Graph:
    """Count a model's operators, and those that a smaller number format can speed up or has."""
    from onnx import TensorProto

    def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    yield from nodes(inner)

    stored = {i.name: i.data_type for i in model.graph.initializer}
    scaled = {
        n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored
    }
    linear = lowered = 0
    for node in model.graph.node:
        integer = node.op_type in _INTEGER
        weight = node.input[1] if node.op_type in _LINEAR else ""
        linear += integer or weight in stored or weight in scaled
        lowered += integer or weight in scaled or stored.get(weight) == TensorProto.FLOAT16
    counts = Counter(n.op_type for n in nodes(model.graph))
    return Graph(dict(sorted(counts.items())), linear, lowered)


def prepare(model: bytes) -> onnx.ModelProto:
    """The same model with constants folded and shapes known, which all conversions start from."""
    import onnx
    from onnxruntime.quantization import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        given, path = Path(folder, "model.onnx"), Path(folder, "prepared.onnx")
        given.write_bytes(model)
        # Symbolic inference knows no ai.onnx.ml operator; plain inference finds all types that conversion needs.
        quant_pre_process(given, path, skip_symbolic_shape=True)
        prepared = onnx.load(path)
    # torch also notes the shapes of weights, which quantize_dynamic transposes without a look at the notes.
    graph = prepared.graph
    stored = {i.name: i.data_type for i in graph.initializer}
    typed = {v.name: v for v in graph.value_info if v.name not in stored}
    # Inference ends at ai.onnx.ml operators. What meets weights in a product has their type.
    known = {v.name for v in (*graph.input, *graph.output)} | set(typed)
    for node in graph.node:
        if node.op_type in _LINEAR and node.input[1] in stored and node.input[0] not in known:
            name = node.input[0]
            typed[name] = onnx.helper.make_tensor_value_info(name, stored[node.input[1]], None)
    del graph.value_info[:]
    graph.value_info.extend(typed.values())
    return onnx.shape_inference.infer_shapes(prepared)


def convert(
    prepared: onnx.ModelProto, method: str, calibration: Callable[[], Iterator[Feed]]
) -> onnx.ModelProto:
    """A prepared model in another number format; preprocessing and trees in it stay as they are.

    :param method: a name from :data:`METHODS`.
    :param calibration: gives the calibration rows in batches, of which one at a time is in memory; for ``static_int8``.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    if method == "fp16":
        return _strip(_half(prepared))
    common = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": _saturates()}
    with tempfile.TemporaryDirectory() as folder:
        given, path = Path(folder, "prepared.onnx"), Path(folder, "quantized.onnx")
        onnx.save(prepared, given)  # from a model in memory the library takes the weights out
        if method == "dynamic_int8":
            quantize_dynamic(given, path, op_types_to_quantize=["Conv", "MatMul"], **common)
        else:
            # MinMax keeps two numbers per tensor and batch. CalibMaxIntermediateOutputs is not for bounding memory: in
            # onnxruntime 1.31 it drops what it has collected.
            quantize_static(
                given,
                path,
                _Reader(calibration()),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=[*_LINEAR, *_BETWEEN],
                extra_options={"MatMulConstBOnly": True},  # products of two activations lose too much
                **common,
            )
        return _strip(onnx.load(path))


@dataclass
class _Reader:
    """Calibration rows as onnxruntime asks for them."""

    batches: Iterator[Feed]

    def get_next(self) -> Feed | None:
        return next(self.batches, None)


def _half(prepared: onnx.ModelProto) -> onnx.ModelProto:
    """16-bit floats from the first linear operator on.

    What comes before stays as it is: raw features above 65,504 would become infinite and those above 2,048 inexact,
    which moves them over the thresholds of trees and bins.
    """
    import onnx
    from onnx import helper
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.ModelProto()
    model.CopyFrom(prepared)
    graph = model.graph
    stored = {i.name: i for i in graph.initializer}
    after: set[str] = set()  # tensors that depend on a linear operator
    front: list[onnx.NodeProto] = []
    back: list[onnx.NodeProto] = []
    for node in graph.node:  # in topological order
        linear = node.op_type in _LINEAR and node.input[1] in stored
        (back if linear or after.intersection(node.input) else front).append(node)
        if back and back[-1] is node:
            after.update(node.output)
    read_in_front = {name for node in front for name in node.input}
    for node in back:  # a constant that both sides read gets a copy
        for index, name in enumerate(node.input):
            if name in stored and name in read_in_front:
                node.input[index] = copy = f"{name}/half"
                if copy not in stored:
                    stored[copy] = onnx.TensorProto()
                    stored[copy].CopyFrom(stored[name])
                    stored[copy].name = copy
    typed = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    read = dict.fromkeys(name for node in back for name in node.input if name)
    entering = [typed[name] for name in read if name not in stored and name not in after]
    leaving = [typed[o.name] for o in graph.output if o.name in after]
    part = helper.make_model(
        helper.make_graph(back, "half", entering, leaving, [stored[n] for n in read if n in stored]),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    half = convert_float_to_float16(part, keep_io_types=True)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend([*front, *half.graph.node])
    graph.initializer.extend([*(i for n, i in stored.items() if n in read_in_front), *half.graph.initializer])
    OnnxModel(model).topological_sort()
    return model


def _strip(model: onnx.ModelProto) -> onnx.ModelProto:
    """Take out the libraries' notes, so that equal conversions give equal bytes."""
    del model.metadata_props[:]
    model.producer_name, model.producer_version = "lepton_airflow", ""
    model.graph.name = "model"
    return model


# -- quality -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """A metric with its interval, and its difference from the original's on the same rows (positive: better)."""

    metric: str
    value: float
    low: float
    high: float
    difference: float = 0.0
    difference_low: float = 0.0
    difference_high: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Rows with known answers, and what counts as worse on them.

    :ivar y: (n,) class numbers, or numbers for a regression.
    :ivar max_loss: how much of the metric may be lost [of the metric].
    :ivar clusters: (n,) keys of what is dependent, or None.
    """

    y: ArrayLike
    metric: str
    max_loss: float
    clusters: ArrayLike | None = None
    confidence: float = 0.95
    threshold: float = 0.5
    resamples: int = 1000
    seed: int = 0

    def value(self, predicted: NDArray[Any]) -> Quality:
        """The metric of some predictions; raises BadInput when the rows do not define it or cannot judge chance."""
        from lepton_airflow.statistics.bootstrap import bootstrap_intervals

        found = bootstrap_intervals(
            self.y,
            predicted,
            [self.metric],
            clusters=self.clusters,
            n_resamples=self.resamples,
            confidence=self.confidence,
            seed=self.seed,
            threshold=self.threshold,
        )
        if self.metric not in found:
            raise BadInput(
                f"{self.metric} is not defined on these rows (one class, or a constant target): pass more rows, or "
                "another metric."
            )
        low, value, high = found[self.metric]
        return Quality(self.metric, value, low, high)

    def compare(self, original: NDArray[Any], candidate: NDArray[Any]) -> Quality:
        """The metric of a candidate and its paired difference from the original (see :mod:`.statistics.paired`)."""
        from lepton_airflow.statistics.paired import paired_test

        own = self.value(candidate)
        paired = paired_test(
            self.y,
            original,
            candidate,
            metric=self.metric,
            clusters=self.clusters,
            confidence=self.confidence,
            threshold=self.threshold,
        )
        return Quality(own.metric, own.value, own.low, own.high, paired.difference, paired.low, paired.high)


# -- latency -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """How long a call takes at one batch size, and how many times as fast it is as the original's.

    ``speedup`` is the median over rounds of the ratio of the fastest calls in a round, for other processes can only add
    to a call; its interval holds the true median with at least 95% confidence, whatever the distribution.
    """

    batch: int  # rows a call
    p50_us: float
    p95_us: float
    speedup: float = 1.0
    speedup_low: float = 1.0
    speedup_high: float = 1.0


def time_side_by_side(
    models: Mapping[str, bytes],
    output: str,
    feeds: Mapping[int, Sequence[Feed]],
    *,
    rounds: int = 12,
    seconds: float = 30.0,
    threads: int = 1,
    seed: int = 0,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, list[Latency]]:
    """Time models against the first of them, call by call in turns, so that what disturbs the machine hits all alike.

    Each round opens fresh sessions in another order, because where a session lies in memory shifts all its calls
    together; so rounds, not calls, are what the intervals count.

    :param output: the output that is asked for.
    :param feeds: by batch size, the feeds that calls take in turn.
    :param seconds: about how long all of it takes [s].
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    names = list(models)
    taken: dict[tuple[str, int], list[list[float]]] = {(name, b): [] for name in names for b in feeds}
    calls: dict[int, int] = {}
    for _ in range(rounds):
        check_stop()
        sessions = {names[i]: open_session(models[names[i]], threads) for i in rng.permutation(len(names))}

        def call(name: str, feed: Feed, sessions: Mapping[str, Any] = sessions) -> float:
            start = time.perf_counter()
            sessions[name].run([output], feed)
            return time.perf_counter() - start

        for batch, turns in feeds.items():
            for feed in turns[:2]:  # the first calls allocate
                warm = sum(call(name, feed) for name in names)
            if batch not in calls:
                share = seconds / rounds / len(feeds)
                calls[batch] = max(_FEWEST_CALLS, min(_MOST_CALLS, int(share / warm)))
            for name in names:
                taken[name, batch].append([])
            for number in range(calls[batch]):
                feed = turns[number % len(turns)]
                for i in rng.permutation(len(names)):
                    taken[names[i], batch][-1].append(call(names[i], feed))
    return {name: [_latency(taken[names[0], b], taken[name, b], b) for b in feeds] for name in names}


def _latency(original: list[list[float]], own: list[list[float]], batch: int) -> Latency:
    import numpy as np

    p50, p95 = np.quantile(np.concatenate(own), [0.5, 0.95]) * 1e6
    ratios = [min(a) / min(b) for a, b in zip(original, own, strict=True)]
    low, high = median_interval(ratios)
    return Latency(batch, float(p50), float(p95), statistics.median(ratios), low, high)


def median_interval(values: Sequence[float], confidence: float = _CONFIDENCE) -> tuple[float, float]:
    """Ends of an interval for the median of what these values were drawn from: that of the sign test, exact for any law.

    Raises BadConfiguration for fewer values than can have that confidence (6 for 95%).
    """
    n, below = len(values), 0.0
    outside = -1  # how many values lie beyond each end
    while (below := below + math.comb(n, outside + 1) / 2**n) <= (1 - confidence) / 2:
        outside += 1
    if outside < 0:
        raise BadConfiguration(
            f"rounds={n}: an interval of {100 * confidence:g}% needs at least "
            f"{math.ceil(1 - math.log2(1 - confidence))}."
        )
    ordered = sorted(values)
    return ordered[outside], ordered[-1 - outside]


def open_session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """A session to be timed beside others: its threads do not spin while another one works."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# -- decision ----------------------------------------------------------------------------------------------------------


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
    min_speedup: float = 1.1,
    max_slowdown: float = 0.03,
    min_shrink: float = 2.0,
    rounds: int = 12,
    seconds: float = 30.0,
    threads: int = 1,
    seed: int = 0,
    check_stop: Callable[[], None] = lambda: None,
) -> Comparison:
    """Convert, measure and choose.

    Chosen is the fastest candidate whose metric is not worse by more than ``judge.max_loss`` (the whole interval of the
    paired difference says so), that is at no batch size slower (the whole interval of the speedup is at least
    ``1 - max_slowdown``: of two models of equal speed, half of all intervals reach below 1) and at one of them faster (the
    whole interval is at least ``min_speedup``); without such a one the smallest that is not worse, not slower and
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
    median_interval([1.0] * rounds)  # refuse too few before the work
    predicted = np.asarray(work.predict(model), dtype=np.float64)
    quality = judge.value(predicted)
    try:
        prepared = prepare(model)
    except Exception as error:  # noqa: BLE001 - any kind of onnx, protobuf and onnxruntime
        broken = f"onnxruntime cannot prepare the model: {first_line(error)[:200]}"
        original = Candidate("fp32", "original", "", len(model), None, quality)
        failed = [Candidate(method, "failed", broken) for method in methods]
        return Comparison("fp32", f"kept fp32, because {broken}", [original, *failed], {"fp32": model})
    before = inspect(prepared)
    models = {"fp32": model}
    found = {"fp32": Candidate("fp32", "original", "", len(model), before, quality)}
    for method in methods:
        check_stop()
        found[method], made = _try(method, prepared, before, work, judge, predicted)
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
            found[name] = _judged(
                found[name], measured, len(model), judge, min_speedup, max_slowdown, min_shrink
            )
    candidates = list(found.values())
    chosen = _choose(candidates, min_speedup)
    reason = chosen.reason if chosen.verdict == "better" else _kept(before, candidates)
    return Comparison(chosen.name, reason, candidates, models)


def _try(
    method: str,
    prepared: onnx.ModelProto,
    before: Graph,
    work: Work,
    judge: Judge,
    original: NDArray[np.float64],
) -> tuple[Candidate, bytes | None]:
    """Convert and score; bytes when the result can be timed."""
    import numpy as np

    if not before.linear:
        return Candidate(method, "no-op", _nothing(before)), None
    try:
        made = convert(prepared, method, work.calibration)
        graph = inspect(made)
        content = made.SerializeToString(deterministic=True)
        if graph.lowered:
            _try_elsewhere(content, work.output, work.timing[max(work.timing)][0])
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
    except BadInput as error:  # the original's predictions passed, so it is these: no probabilities any more
        return Candidate(method, "worse", str(error), size, graph, None, [], difference), content
    return Candidate(method, "", "", size, graph, quality, [], difference), content


def _try_elsewhere(model: bytes, output: str, feed: Feed) -> None:
    """Open a model and run one batch in a process of its own; raises when that process dies or hangs.

    onnxruntime 1.31 dies of a segmentation fault when it opens a transformer encoder of torch's exporter in 16 bits, and
    a candidate must not take the stage with it.
    """
    arrays = {
        n: (a.dtype.str if a.dtype.kind != "O" else "O", a.shape, a.ravel().tolist()) for n, a in feed.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model)
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _TRY, str(path), output],
                input=json.dumps(arrays).encode(),
                check=False,
                capture_output=True,
                timeout=_TRY_S,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"onnxruntime has not run one batch of it within {_TRY_S} s") from None
    if done.returncode < 0:
        raise RuntimeError(f"onnxruntime dies of signal {-done.returncode} when it opens or runs it")


_TRY_S = 120
_TRY = """
import json, sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {n: numpy.array(v, dtype).reshape(shape) for n, (dtype, shape, v) in json.load(sys.stdin).items()}
session.run([sys.argv[2]], feed)
"""


def _judged(
    found: Candidate,
    latency: list[Latency],
    original: int,
    judge: Judge,
    min_speedup: float,
    max_slowdown: float,
    min_shrink: float,
) -> Candidate:
    """The candidate with its latencies and, unless it has one, its verdict."""
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
    elif slowest.speedup_high < 1 - max_slowdown:
        verdict, reason = "slower", f"it is {_times(slowest)}"
    elif doubtful.speedup_low < 1 - max_slowdown:
        verdict = "no gain"
        reason = f"it is {_times(doubtful)}, so it may be slower by more than {100 * max_slowdown:g}%"
    elif fastest.speedup_low >= min_speedup or shrink >= min_shrink:
        verdict = "better"
        reason = (
            f"{_times(fastest)}, {shrink:.1f} times smaller, {quality.metric} {quality.value:.4f} "
            f"({quality.difference:+.4f}, at worst {quality.difference_low:+.4f})"
        )
    else:
        verdict = "no gain"
        reason = (
            f"it is {_times(fastest)} and {shrink:.1f} times smaller, required is {min_speedup:g} (whole interval) or "
            f"{min_shrink:g}"
        )
    return replace(found, verdict=verdict, reason=reason)


def _choose(candidates: Sequence[Candidate], min_speedup: float) -> Candidate:
    """The fastest of those that are clearly faster, else the smallest of those that are better, else the original."""
    better = [c for c in candidates if c.verdict == "better"]
    faster = [c for c in better if max(item.speedup_low for item in c.latency) >= min_speedup]
    if faster:
        return max(faster, key=lambda c: c.speedup)
    return min(better, key=lambda c: c.bytes or 0) if better else candidates[0]


def _kept(before: Graph, candidates: Sequence[Candidate]) -> str:
    if not before.linear:
        return f"kept fp32, because {_nothing(before)}"
    if len(candidates) == 1:
        return "kept fp32, because no candidate was asked for"
    return "kept fp32, because " + "; ".join(f"{c.name}: {c.reason}" for c in candidates[1:])


def _nothing(graph: Graph) -> str:
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
