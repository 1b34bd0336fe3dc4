"""Make a model smaller and faster where that costs it nothing."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lepton_airflow.contract import Artifact, pin, split_pin
from lepton_airflow.data.dataset import DatasetInfo, read_info
from lepton_airflow.errors import BadConfiguration, did_you_mean, require
from lepton_airflow.sdk.fingerprint import cpu_model, versions
from lepton_airflow.sdk.stage import ArtifactUri, Result, RunInfo, Stage
from lepton_airflow.store.files import digest_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lepton_airflow.evaluation.rows import EvaluationRows
    from lepton_airflow.packaging.compression.quantize import Candidate, Comparison, Judge
    from lepton_airflow.packaging.package import ModelPackage

    Feeds = dict[int, list[dict[str, NDArray[Any]]]]

log = logging.getLogger(__name__)

_DEFAULT_METRIC = {"classification": "roc_auc", "regression": "rmse"}
_IN_UNITS_OF_TARGET = ("mae", "rmse")
_DEFAULT_LOSS = 0.005  # of a metric on a scale from 0 to 1; of MAE and RMSE this share of the original's
_CALIBRATION_BATCH = 256  # rows: bounds the memory of calibration, which holds every tensor of a batch
_TIMED_ROWS = 2048  # how many different rows are timed at most


@dataclass(kw_only=True)
class QuantizeModel(Stage):
    """Try smaller number formats on a model, measure them on this CPU, and take one only where it pays.

    Candidates: ``dynamic_int8`` (8-bit weights), ``static_int8`` (8-bit weights per channel and activations, whose ranges
    come from ``calibration``) and ``fp16``. Each is timed beside the original, call by call in turns, and scored on
    ``dataset``. One is taken when its metric is not worse by more than ``max_loss`` (the whole interval of the paired
    difference says so), it is at no batch size slower by more than ``max_slowdown``, and it is faster by ``min_speedup`` or
    smaller by ``min_shrink``.
    Otherwise the model stays as it is, and the summary says why: trees and linear models have nothing to quantize.

    Returns the artifacts ``model`` (a model package: a new one, or the very one that was given) and ``report`` (a
    directory with ``quantization.json`` and ``report.html``), and the values ``chosen`` (``fp32`` or a candidate) and
    ``reason``. What holds on this CPU may not hold on another: run it on the kind of machine that will serve.

    :param model: the model package, ``train.output["model"]``.
    :param calibration: rows that activation ranges are taken from, ``prepare.output["train"]``.
    :param dataset: rows that the candidates are judged on, ``prepare.output["valid"]``; never the test split, since
        choosing on it would spend the rows that evaluation needs. The new package names both as touched.
    :param candidates: which formats to try; None: all of them; an empty list tries none.
    :param metric: what must not get worse; None: ``roc_auc`` for classification, ``rmse`` for regression.
    :param max_loss: how much of the metric may be lost [of the metric]; None: 0.005, and for MAE and RMSE 0.5% of the
        original's.
    :param min_speedup: how many times as fast a candidate must be, with its whole interval [times].
    :param max_slowdown: how much slower a candidate may be at any batch size, with its whole interval [share, 0 to 1].
    :param min_shrink: how many times smaller a candidate must be that is no faster [times].
    :param calibration_rows: how many rows to calibrate with, spread over all of them [rows].
    :param batch_rows: batch sizes to time [rows].
    :param rounds: how often to open fresh sessions and time all of them, at least 6; the intervals count these.
    :param timing_s: about how long to time [seconds].
    :param threads: CPU threads of a session [threads].
    :param cluster_column: column that names dependent rows, such as the day; None: the one the dataset names, if any.
    :param threshold: probability from which on the second class is predicted, for accuracy, precision, recall and F1.
    :param confidence: level of the metric's intervals [0 to 1].
    :param seed: of the order of calls and of the bootstrap.
    :raises BadInput: the rows do not fit the model, or do not define the metric (one class).
    :raises BadConfiguration: a test split, a quantized model, an unknown candidate or metric, a number out of its range.
    """

    windowed: ClassVar[bool] = False
    measures_machine: ClassVar[bool] = True
    engines: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "scikit-learn", "scipy")
    extra: ClassVar[str] = "quantize"
    outputs: ClassVar[tuple[str, ...]] = ("model", "report", "chosen", "reason")

    model: ArtifactUri
    calibration: ArtifactUri
    dataset: ArtifactUri
    candidates: list[str] | None = None
    metric: str | None = None
    max_loss: float | None = None
    min_speedup: float = 1.1
    max_slowdown: float = 0.03
    min_shrink: float = 2.0
    calibration_rows: int = 1024
    batch_rows: list[int] = field(default_factory=lambda: [1, 256])
    rounds: int = 12
    timing_s: float = 30.0
    threads: int = 1
    cluster_column: str | None = None
    threshold: float = 0.5
    confidence: float = 0.95
    seed: int = 0

    def run(self, run: RunInfo) -> Result:
        from lepton_airflow.evaluation.rows import load_rows
        from lepton_airflow.packaging.compression.quantize import METHODS, Work, compare
        from lepton_airflow.packaging.package import OUTPUTS, ModelPackage, parquet_feeds, write_package

        for library in self.engines:
            require(library, "QuantizeModel", self.extra)
        self._check_numbers()
        package = ModelPackage.open(run.fetch(self.model))
        card = package.card
        if card.quantization:
            raise BadConfiguration(
                f"the model is quantized already ({card.quantization.get('method')}): pass the package that was trained, "
                "train.output['model']."
            )
        paths = {"calibration": run.fetch(self.calibration), "dataset": run.fetch(self.dataset)}
        infos = {name: self._usable(name, path, package) for name, path in paths.items()}
        rows = load_rows(paths["dataset"], card, self.cluster_column)
        judge = self._judge(package, rows, paths["dataset"])

        def predict(model: bytes) -> NDArray[np.float32]:
            """Score as the package of this model would: by the same door that it will be used through."""
            write_package(run.workdir / "candidate", model, card)
            return ModelPackage.open(run.workdir / "candidate").predict_parquet(paths["dataset"])

        found = compare(
            (package.path / "model.onnx").read_bytes(),
            Work(
                output=OUTPUTS[card.task][0],
                calibration=lambda: parquet_feeds(
                    paths["calibration"], card.features, self.calibration_rows, _CALIBRATION_BATCH
                ),
                predict=predict,
                timing=self._timing(package, paths["dataset"]),
            ),
            judge,
            list(METHODS) if self.candidates is None else self.candidates,
            min_speedup=self.min_speedup,
            max_slowdown=self.max_slowdown,
            min_shrink=self.min_shrink,
            rounds=self.rounds,
            seconds=self.timing_s,
            threads=self.threads,
            seed=self.seed,
            check_stop=run.check_stop,
        )
        for candidate in found.candidates[1:]:
            log.info("%s: %s (%s)", candidate.name, candidate.verdict, candidate.reason)
        model = self._package(run, package, paths, infos, found, judge)
        report = self._report(run, found, judge, rows)
        return Result(
            summary=_summary(found),
            artifacts={"model": model, "report": report},
            values={"chosen": found.chosen, "reason": found.reason},
            metrics=_metrics(found),
        )

    # -- what goes in ----------------------------------------------------------------------------------------------

    def _check_numbers(self) -> None:
        bounds = {
            "max_loss": (0.0 if self.max_loss is None else self.max_loss, 0, "at least 0"),
            "min_speedup": (self.min_speedup, 1, "at least 1"),
            "max_slowdown": (self.max_slowdown, 0, "at least 0"),
            "min_shrink": (self.min_shrink, 1, "at least 1"),
            "timing_s": (self.timing_s, 0, "at least 0"),
            "calibration_rows": (self.calibration_rows, 1, "at least 1"),
            "batch_rows": (
                min(self.batch_rows, default=0),
                1,
                "some batch sizes of at least 1, such as [1, 256]",
            ),
            "threads": (self.threads, 1, "at least 1"),
        }
        for name, (value, smallest, expected) in bounds.items():
            if not value >= smallest:
                raise BadConfiguration(f"{name}={getattr(self, name)!r}: expected {expected}.")

    def _usable(self, name: str, path: Path, package: ModelPackage) -> DatasetInfo:
        from lepton_airflow.evaluation.rows import check_kinds

        info = read_info(path)
        if info.split == "test":
            raise BadConfiguration(
                f"{name} is the test split: a model that was chosen on these rows could not be evaluated on them any more. "
                f"Pass prepare.output[{'train' if name == 'calibration' else 'valid'!r}]."
            )
        check_kinds(package.card, info)
        return info

    def _judge(self, package: ModelPackage, rows: EvaluationRows, path: Path) -> Judge:
        from lepton_airflow.packaging.compression.quantize import Judge
        from lepton_airflow.statistics.metrics import CLASSIFICATION, REGRESSION

        names = CLASSIFICATION if package.card.task == "classification" else REGRESSION
        metric = self.metric or _DEFAULT_METRIC[package.card.task]
        if metric not in names:
            raise BadConfiguration(
                f"metric={metric!r} is not one of {package.card.task}; {did_you_mean(metric, names)}"
            )
        judge = Judge(
            y=rows.y,
            metric=metric,
            max_loss=_DEFAULT_LOSS if self.max_loss is None else self.max_loss,
            clusters=rows.clusters,
            confidence=self.confidence,
            threshold=self.threshold,
            seed=self.seed,
        )
        if self.max_loss is None and metric in _IN_UNITS_OF_TARGET:
            judge = replace(judge, max_loss=_DEFAULT_LOSS * judge.value(package.predict_parquet(path)).value)
        return judge

    def _timing(self, package: ModelPackage, path: Path) -> Feeds:
        """By batch size, feeds of real rows; where the dataset has too few, they come again."""
        import numpy as np

        from lepton_airflow.packaging.package import parquet_feeds

        parts = list(parquet_feeds(path, package.card.features, _TIMED_ROWS, _TIMED_ROWS))
        sample = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        present = len(next(iter(sample.values())))
        feeds: Feeds = {}
        for batch in self.batch_rows:
            turns = max(4, min(64, _TIMED_ROWS // batch))
            places = [np.arange(number * batch, (number + 1) * batch) % present for number in range(turns)]
            feeds[batch] = [{name: values[place] for name, values in sample.items()} for place in places]
        return feeds

    # -- what comes out --------------------------------------------------------------------------------------------

    def _package(
        self,
        run: RunInfo,
        package: ModelPackage,
        paths: Mapping[str, Path],
        infos: Mapping[str, DatasetInfo],
        found: Comparison,
        judge: Judge,
    ) -> Artifact:
        """The package to go on with: the one that was given, or a new one beside it that says where it comes from."""
        import numpy as np

        from lepton_airflow.packaging.package import Touched, row_fingerprints, write_package

        given = _sha256(run, self.model)
        if found.chosen == "fp32":
            return Artifact(pin(split_pin(self.model)[0], given), given, digest_path(package.path)[1])
        chosen = next(c for c in found.candidates if c.name == found.chosen)
        original = found.candidates[0]
        assert chosen.quality is not None
        assert chosen.graph is not None
        assert original.graph is not None
        digests = {"calibration": _sha256(run, self.calibration), "dataset": _sha256(run, self.dataset)}
        rows = package.rows
        if rows is not None:
            features, target = package.card.features, package.card.target
            rows = np.unique(
                np.concatenate([rows, *(row_fingerprints(p, features, target) for p in paths.values())])
            )
        scale = 1.0 if package.card.task == "classification" else float(np.std(np.asarray(judge.y))) or 1.0
        assert chosen.difference is not None
        card = replace(
            package.card,
            touched=[
                *package.card.touched,
                *(Touched.by("calibration", digests[n], infos[n]) for n in paths),
            ],
            parity={
                "difference": chosen.difference / scale,
                "tolerance": None,  # the metric decides, not the single prediction
                "unit": "probability"
                if package.card.task == "classification"
                else "standard deviations of the target",
                "rows": infos["dataset"].rows,
                "tried": ["the package it was made from"],
            },
            quantization={
                "method": chosen.name,
                "of": given,
                "calibration": digests["calibration"],
                "calibration_rows": min(self.calibration_rows, infos["calibration"].rows),
                "dataset": digests["dataset"],
                "quality": asdict(chosen.quality),
                "max_loss": judge.max_loss,
                "ops_before": original.graph.ops,
                "ops_after": chosen.graph.ops,
            },
            versions=package.card.versions | versions(type(self)),
        )
        profile = package.path / "profile.json"
        folder = run.workdir / "model"
        write_package(
            folder, found.models[chosen.name], card, profile=profile if profile.exists() else None, rows=rows
        )
        return run.save("model", folder)

    def _report(self, run: RunInfo, found: Comparison, judge: Judge, rows: EvaluationRows) -> Artifact:
        from lepton_airflow.packaging.compression.quantize import cpu_flags

        record = {
            "summary": _summary(found),
            "chosen": found.chosen,
            "reason": found.reason,
            "candidates": [asdict(c) for c in found.candidates],
            "rules": {
                "metric": judge.metric,
                "max_loss": judge.max_loss,
                "min_speedup": self.min_speedup,
                "max_slowdown": self.max_slowdown,
                "min_shrink": self.min_shrink,
            },
            "machine": {
                "cpu": cpu_model(),
                "flags": cpu_flags(),
                "threads": self.threads,
                "rounds": self.rounds,
                "timing_s": self.timing_s,
            },
            "model": {"sha256": _sha256(run, self.model)},
            "calibration": {"sha256": _sha256(run, self.calibration), "rows": self.calibration_rows},
            "dataset": {
                "sha256": _sha256(run, self.dataset),
                "rows": len(rows.y),
                "time_range": rows.info.time_range,
                "cluster_column": rows.cluster_column,
            },
            "versions": versions(type(self)),
        }
        folder = run.workdir / "report"
        folder.mkdir(exist_ok=True)
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "quantization.json").write_text(text, encoding="utf-8")
        (folder / "report.html").write_text(_page(record, found, judge), encoding="utf-8")
        return run.save("report", folder)


def _sha256(run: RunInfo, uri: str) -> str:
    return split_pin(uri)[1] or run.store.digest(uri)


def _summary(found: Comparison) -> str:
    if found.chosen == "fp32":
        return f"{found.reason[0].upper()}{found.reason[1:]}."
    return f"Chose {found.chosen}: {found.reason}."


def _metrics(found: Comparison) -> dict[str, float | None]:
    """Of the model to go on with, and of the original where it differs."""
    original = found.candidates[0]
    chosen = next(c for c in found.candidates if c.name == found.chosen)
    assert original.quality is not None
    assert chosen.quality is not None
    assert chosen.bytes is not None
    assert original.bytes is not None
    quality = chosen.quality
    metrics: dict[str, float | None] = {
        "speedup": chosen.speedup if chosen.latency else None,
        "size_ratio": chosen.bytes / original.bytes,
        quality.metric: quality.value,
        f"{quality.metric}_low": quality.low,
        f"{quality.metric}_high": quality.high,
        f"fp32_{quality.metric}": original.quality.value,
        "difference": quality.difference,
        "difference_low": quality.difference_low,
        "difference_high": quality.difference_high,
    }
    for prefix, candidate in (("", chosen), ("fp32_", original)):
        metrics |= {f"{prefix}p50_us_batch_{item.batch}": item.p50_us for item in candidate.latency}
    return metrics


# -- the page ----------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --bar: #2563eb; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --muted: #9aa5b1; --line: #323f4b; --bar: #60a5fa;
  --paper: #151b22; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p { color: var(--muted); margin: 0; } .scroll { overflow-x: auto; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; white-space: normal; }
td:first-child { white-space: nowrap; } th { color: var(--muted); font-weight: 600; }
tr.chosen td { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def _page(record: Mapping[str, Any], found: Comparison, judge: Judge) -> str:
    """One page that needs nothing but itself."""
    machine, rules, data = record["machine"], record["rules"], record["dataset"]
    facts = {
        "CPU": f"{machine['cpu']} ({' '.join(machine['flags']) or 'flags not known'})",
        "Timing": f"{machine['threads']} thread(s), {machine['rounds']} rounds of fresh sessions, calls in turns; speedups "
        "are medians over rounds of the ratio of the fastest calls, with 95% intervals",
        "Required": f"{rules['metric']} not worse by {rules['max_loss']:.4g} (whole interval), nowhere slower by {100 * rules['max_slowdown']:g}%, and "
        f"{rules['min_speedup']:g} times as fast or {rules['min_shrink']:g} times smaller",
        "Judged on": f"{data['rows']:,} rows"
        + (f", {' to '.join(data['time_range'])}" if data["time_range"] else "")
        + (f", dependent by {data['cluster_column']}" if data["cluster_column"] else ""),
        "Model package": record["model"]["sha256"],
        "Dataset": data["sha256"],
        "Calibration": record["calibration"]["sha256"],
        "Versions": ", ".join(f"{k} {v}" for k, v in record["versions"].items()),
    }
    parts = [
        "<h1>What a smaller number format does to the model</h1>",
        f"<p>{escape(record['summary'])}</p>",
        "<h2>Candidates</h2>",
        _table(found, judge.metric),
    ]
    if any(c.latency for c in found.candidates[1:]):
        parts += [
            "<h2>Times as fast as the original</h2>",
            _picture(found.candidates[1:], rules["min_speedup"]),
        ]
    parts += ["<h2>Operators</h2>", _operators(found.candidates), "<h2>How it was measured</h2><dl>"]
    parts += [f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Quantization</title><style>{_STYLE}</style><body>{''.join(parts)}</dl></body></html>\n"
    )


def _table(found: Comparison, metric: str) -> str:
    batches = [item.batch for item in found.candidates[0].latency]
    head = "".join(f"<th>µs at batch {b}<br>median, 95th percentile</th>" for b in batches)
    body = []
    for c in found.candidates:
        quality, difference = "", ""
        if c.quality:
            quality = f"{c.quality.value:.4f}<br>[{c.quality.low:.4f}, {c.quality.high:.4f}]"
            difference = (
                ""
                if c.verdict == "original"
                else f"{c.quality.difference:+.4f}<br>[{c.quality.difference_low:+.4f}, {c.quality.difference_high:+.4f}]"
            )
        times = {item.batch: f"{item.p50_us:,.0f}, {item.p95_us:,.0f}" for item in c.latency}
        cells = [
            f"{c.bytes / 1000:,.1f}" if c.bytes else "",
            quality,
            difference,
            *(times.get(b, "") for b in batches),
        ]
        mark = ' class="chosen"' if c.name == found.chosen else ""
        body.append(
            f"<tr{mark}><td>{escape(c.name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}"
            f'<td class="text">{escape(c.verdict)}{": " if c.reason else ""}{escape(c.reason)}</td></tr>'
        )
    return (
        f'<div class="scroll"><table><tr><th></th><th>kB</th><th>{escape(metric)}</th><th>difference</th>{head}'
        '<th class="text">verdict</th></tr>'
        f"{''.join(body)}</table></div>"
    )


def _picture(candidates: Sequence[Candidate], min_speedup: float) -> str:
    """The speedups with their intervals on a logarithmic scale, as a drawing inside the page."""
    lines = [
        (f"{c.name}, batch {item.batch}: {item.speedup:.2f}", item) for c in candidates for item in c.latency
    ]
    ends = [v for _, item in lines for v in (item.speedup_low, item.speedup_high)] + [0.5, 2.0, min_speedup]
    low, high = math.log(min(ends)), math.log(max(ends))
    height = 26 * len(lines) + 30

    def x(speedup: float) -> str:
        return f"{270 + 710 * (math.log(speedup) - low) / (high - low):.1f}"

    def mark(speedup: float, dash: str, anchor: str) -> str:
        return (
            f'<line x1="{x(speedup)}" x2="{x(speedup)}" y1="0" y2="{height - 22}" stroke="var(--muted)" '
            f'stroke-dasharray="{dash}"/><text x="{x(speedup)}" y="{height - 6}" text-anchor="{anchor}" '
            f'fill="var(--muted)">{speedup:g}</text>'
        )

    parts = [mark(1.0, "none", "end"), mark(min_speedup, "4 3", "start") if min_speedup > 1 else ""]
    for number, (label, item) in enumerate(lines):
        y = 26 * number + 16
        parts.append(
            f'<text x="0" y="{y + 5}" fill="currentColor">{escape(label)}</text>'
            f'<line x1="{x(item.speedup_low)}" x2="{x(item.speedup_high)}" y1="{y}" y2="{y}" stroke="var(--bar)" '
            f'stroke-width="4" opacity=".45"/><circle cx="{x(item.speedup)}" cy="{y}" r="5" fill="var(--bar)"/>'
        )
    return f'<svg viewBox="0 0 1000 {height}" font-size="14" role="img">{"".join(parts)}</svg>'


def _operators(candidates: Sequence[Candidate]) -> str:
    counted = [c for c in candidates if c.graph]
    names = sorted({name for c in counted if c.graph for name in c.graph.ops})
    head = "".join(f"<th>{escape(c.name)}</th>" for c in counted)
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{c.graph.ops.get(name, 0)}</td>' for c in counted if c.graph)}</tr>"
        for name in names
    )
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'
