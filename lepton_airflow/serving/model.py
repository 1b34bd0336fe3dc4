"""One version of a model in memory: made of exactly the bytes that were verified, and checked before it serves."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from typing import TYPE_CHECKING, Any

import psutil

from lepton_airflow.contract import split_pin
from lepton_airflow.data.features import KINDS
from lepton_airflow.delivery.endpoints import Desired
from lepton_airflow.errors import BadInput, LeptonError
from lepton_airflow.packaging.card import ModelCard
from lepton_airflow.packaging.session import open_session
from lepton_airflow.serving.protocol import (
    Answer,
    Inference,
    Output,
    RequestError,
    parse,
    render,
    request_body,
)

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

_WARM_UP = 20  # requests of one row before any is timed
_TIMED = 200  # requests of one row, or as many as fit into the time
_TIMED_S = 10.0
_MIB = 2**20
# Bytes of a value in a request, low rather than high.
_JSON_VALUE, _BINARY_VALUE = 6, 4

# The protocol's name for each type of output that ONNX Runtime may give.
_DATATYPES = {
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(int64)": "INT64",
    "tensor(int32)": "INT32",
    "tensor(bool)": "BOOL",
    "tensor(string)": "BYTES",
}


@dataclass(frozen=True)
class ServedModel:
    """A version that can answer requests, from several threads at once."""

    desired: Desired
    card: ModelCard
    session: onnxruntime.InferenceSession
    numbers: dict[str, float] = field(default_factory=dict)
    profile: bytes = b""  # of the rows that it was trained on, where its package has one

    @classmethod
    def of(
        cls, desired: Desired, files: Mapping[str, bytes], numbers: dict[str, float] | None = None
    ) -> ServedModel:
        """Build a version's session from the verified bytes of its package.

        :param numbers: what :func:`measure` has found.
        :raises BadInput: they are no package, or no model that ONNX Runtime runs.
        """
        for name in ("model.json", "model.onnx"):
            if name not in files:
                raise BadInput(f"{split_pin(desired.package)[0]} has no {name}: expected a model package.")
        card = ModelCard.from_json(files["model.json"])
        session = _session(files["model.onnx"])
        model = cls(desired, card, session, numbers or {}, files.get("profile.json", b""))
        model._check_signature()
        return model

    def seconds(self, size: int, *, is_binary: bool) -> float:
        """How long an answer to a body of so many bytes should take, from what was measured [seconds]."""
        return self.seconds_of(
            size / (len(self.card.features) * (_BINARY_VALUE if is_binary else _JSON_VALUE))
        )

    def seconds_of(self, rows: float) -> float:
        """How long so many rows should take [seconds]."""
        numbers = self.numbers
        return (numbers.get("latency_p50_ms", 1.0) + rows * numbers.get("latency_row_ms", 1.0)) / 1000

    @cached_property
    def outputs(self) -> dict[str, Output]:
        """The outputs that clients get, by name: those of the graph that ``model.json`` lists."""
        found = {}
        for node in self.session.get_outputs():
            shape = [size if isinstance(size, int) else -1 for size in node.shape]
            binary = node.name == "probabilities" and self.card.schema.positive_class is not None
            told = {"positive_class": self.card.schema.positive_class} if binary else {}
            found[node.name] = Output(node.name, _DATATYPES.get(node.type, ""), [-1, *shape[1:]], told)
        return {name: found[name] for name in self.card.outputs if name in found}

    def read(self, body: bytes, max_rows: int, header_length: int | None = None) -> Inference:
        """A request in the form that the model takes; see :func:`lepton_airflow.serving.protocol.parse`."""
        return parse(body, self.card.features, list(self.outputs), max_rows, header_length)

    def run(self, inference: Inference) -> list[NDArray[Any]]:
        """The values of the outputs that were asked for; raises RequestError where the model fails on these rows."""
        try:
            return self.session.run(list(inference.outputs), inference.feed)
        except Exception as error:  # noqa: BLE001 - as in _session
            raise RequestError(422, f"the model cannot compute these rows: {str(error)[:300]}") from None

    def render(self, inference: Inference, values: Sequence[NDArray[Any]]) -> Answer:
        """The answer with these values."""
        return render(self.desired.endpoint, self.desired.version, inference, self.outputs, values)

    def answer(self, body: bytes, max_rows: int, header_length: int | None = None) -> Answer:
        """The answer to an inference request.

        :raises RequestError: the request is wrong, or the model fails on it.
        """
        inference = self.read(body, max_rows, header_length)
        return self.render(inference, self.run(inference))

    def _check_signature(self) -> None:
        """Raise BadInput unless the graph takes and gives what the card says."""
        takes = {node.name: node.type for node in self.session.get_inputs()}
        wanted = {f.input: f"tensor({KINDS[f.kind].tensor})" for f in self.card.features}
        if takes != wanted:
            raise BadInput(f"model.onnx takes {takes}, model.json says {wanted}: the package is not whole.")
        absent = {*self.card.outputs, self.card.schema.output} - set(self.outputs)
        unknown = [o.name for o in self.outputs.values() if not o.datatype]
        if absent or unknown:
            raise BadInput(
                f"model.onnx lacks the output {', '.join(sorted(absent))}, or its type is not served "
                f"({', '.join(unknown) or 'all others are'}): expected those that model.json lists."
            )


def _session(model: bytes) -> onnxruntime.InferenceSession:
    """A session on one thread: requests run side by side, and one that used all cores would slow the others."""
    import onnxruntime

    try:
        return open_session(model)
    except Exception as error:  # noqa: BLE001 - a dozen kinds of its own, and RuntimeError
        raise BadInput(
            f"model.onnx cannot be run by ONNX Runtime {onnxruntime.__version__}: {str(error)[:300]}"
        ) from None


def measure(model: ServedModel, golden: Mapping[str, Any]) -> dict[str, float]:
    """Answer the golden requests as clients' requests are answered, and measure how exactly and how fast.

    Answers are compared for each row alone and for all rows in one request. Latency is that of requests of one row, from
    their bytes to the bytes of the answer.

    :param golden: ``rows``, ``{column: value}`` each, and their ``answers``.
    :raises BadInput: an answer differs from the golden one by more than the limit.
    """
    rows, answers = golden["rows"], golden["answers"]
    bodies = [request_body(model.card.features, [row]) for row in rows]
    differences = [
        _difference(_values(model, body), [answer]) for body, answer in zip(bodies, answers, strict=True)
    ]
    differences.append(_difference(_values(model, request_body(model.card.features, rows)), answers))
    difference = max(differences)
    if model.card.task == "regression":
        difference /= scale_of(answers)
    if not difference <= model.desired.max_difference:
        raise BadInput(
            f"its answers to {len(rows)} golden requests differ by up to {difference:.3g}, the limit is "
            f"max_difference={model.desired.max_difference:g}: it does not compute here what it computed for "
            "DeployModel. Serve it on the same kind of CPU, or raise the limit."
        )
    times = sorted(_times(model, bodies, _WARM_UP, _TIMED))
    together = min(_times(model, [request_body(model.card.features, rows)], 1, 5))
    return {
        "difference": difference,
        "latency_p50_ms": 1000 * times[len(times) // 2],
        "latency_p95_ms": 1000 * times[math.ceil(0.95 * len(times)) - 1],
        "latency_row_ms": (
            1000 * max(0.0, together - times[0]) / (len(rows) - 1) if len(rows) > 1 else 1000 * times[0]
        ),
        "memory_mib": psutil.Process().memory_info().rss / _MIB,
    }


def over_budget(desired: Desired, numbers: dict[str, float]) -> LeptonError | None:
    """The error that says that a version is too slow or too large here, or None. A retry on an idler machine may pass."""
    for name, what, limit, value in (
        (
            "max_latency_ms",
            "the 95th percentile of its latency [ms]",
            desired.max_latency_ms,
            "latency_p95_ms",
        ),
        ("max_memory_mb", "the memory of a process with it [MiB]", desired.max_memory_mb, "memory_mib"),
    ):
        if numbers[value] > limit:
            return LeptonError(
                f"{what} is {numbers[value]:.3g}, the limit is {name}={limit:g}. Raise it, or deploy a lighter model."
            )
    return None


def _values(model: ServedModel, body: bytes) -> list[list[float | None]]:
    """The main output of an answer, read back from its JSON, row by row."""
    try:
        answer = model.answer(body, max_rows=10**6)
    except RequestError as error:
        raise BadInput(f"it does not answer the golden requests: {error}") from None
    tensor = next(o for o in json.loads(answer.content)["outputs"] if o["name"] == model.card.schema.output)
    width = len(tensor["data"]) // answer.rows
    return [tensor["data"][i * width : (i + 1) * width] for i in range(answer.rows)]


def _difference(found: list[list[float | None]], wanted: list[list[float | None]]) -> float:
    """The largest absolute difference; infinite where only one of the two has a number, or their sizes differ."""
    if [len(row) for row in found] != [len(row) for row in wanted]:
        return math.inf
    pairs = [pair for rows in zip(found, wanted, strict=True) for pair in zip(*rows, strict=True)]
    return max(
        (math.inf if (a is None) != (b is None) else abs((a or 0.0) - (b or 0.0)) for a, b in pairs),
        default=0.0,
    )


def scale_of(answers: list[list[float | None]]) -> float:
    """The largest absolute answer, or 1 when all are 0."""
    return max((abs(v) for answer in answers for v in answer if v is not None), default=0.0) or 1.0


def _times(model: ServedModel, bodies: list[bytes], warm_up: int, count: int) -> Iterator[float]:
    """Time requests [seconds], after some that are not timed; at least one, and as many as fit into the time."""
    until = time.perf_counter() + _TIMED_S
    for number, body in enumerate(cycle(bodies)):
        before = time.perf_counter()
        model.answer(body, max_rows=10**6)
        after = time.perf_counter()
        if number >= warm_up:
            yield after - before
            if number >= warm_up + count - 1 or after > until:
                return
