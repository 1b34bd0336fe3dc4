"""An evaluation as one HTML page that needs no other file: it can be mailed, archived, or opened from a store."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.statistics.catalogue import METRICS

if TYPE_CHECKING:
    from lepton_airflow.packaging.card import ModelCard

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --bar: #2563eb; --paper: #fff;
  --card: #f7f9fb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --muted: #9aa5b1; --line: #323f4b; --bar: #60a5fa;
  --paper: #151b22; --card: #1c242d; } img { filter: invert(.92) hue-rotate(180deg); } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p.lead { color: var(--muted); margin: 0; } .metrics + p.lead { margin-top: .6rem; }
.metrics { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: .8rem; }
.metric { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.metric b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.metric span, td.muted { color: var(--muted); font-size: .85rem; }
.track { position: relative; height: 6px; margin-top: .5rem; background: var(--line); border-radius: 3px; }
.track i { position: absolute; height: 6px; background: var(--bar); opacity: .45; border-radius: 3px; }
.track u { position: absolute; width: 2px; height: 10px; top: -2px; background: var(--bar); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: 1rem; }
.plots img { width: 100%; border: 1px solid var(--line); border-radius: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--muted); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def render(result: Mapping[str, Any], card: ModelCard, pictures: Sequence[Path]) -> str:
    """The page of an evaluation: ``result`` is what ``metrics.json`` holds, ``pictures`` are PNG files."""
    positive = card.schema.positive_class
    parts = [
        f"<h1>How well the model predicts {escape(card.target)}</h1>",
        f'<p class="lead">{escape(result["summary"])}</p>',
        "<h2>Metrics</h2>",
        f'<div class="metrics">{"".join(_metric(name, m, positive) for name, m in result["metrics"].items())}</div>',
        f'<p class="lead">Intervals: {escape(result["intervals"])}</p>',
        "<h2>Plots</h2>",
        f'<div class="plots">{"".join(map(_picture, pictures))}</div>',
    ]
    for column, rows in result["slices"].items():
        parts += [f"<h2>By {escape(column)}</h2>", _slices(rows)]
    parts += ["<h2>Model and rows</h2>", _facts(result, card)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Evaluation: {escape(card.target)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _metric(name: str, metric: Mapping[str, float | None], positive: Any) -> str:
    """A card with the value, its interval, and a bar of the interval where the scale has two ends."""
    about = positive is not None and METRICS[name].of_positive and name != "accuracy"
    of = f" of {escape(str(positive)[:40])}" if about else ""
    value, low, high = metric["value"], metric["low"], metric["high"]
    inner = f"<span>{METRICS[name].title}{of}</span><b>{_number(value)}</b>"
    if low is not None and high is not None:
        inner += f"<span>{_number(low)} to {_number(high)}</span>"
        if METRICS[name].scale == "share" and value is not None:
            left, width = 100 * max(low, 0), 100 * (min(high, 1) - max(low, 0))
            inner += (
                f'<div class="track"><i style="left:{left:.1f}%;width:{max(width, 0.5):.1f}%"></i>'
                f'<u style="left:{100 * value:.1f}%"></u></div>'
            )
    return f'<div class="metric">{inner}</div>'


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem.replace("_", " "))}" src="data:image/png;base64,{data}">'


def _slices(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(rows[0]["metrics"]) if rows else []
    head = "".join(f"<th>{METRICS[name].title}</th>" for name in names)
    body = []
    for row in rows:
        cells = []
        for name in names:
            text = _number(row["metrics"][name])
            if row["interval"] and row["interval"]["metric"] == name:
                text += f" [{_number(row['interval']['low'])}, {_number(row['interval']['high'])}]"
            cells.append(f"<td>{text}</td>")
        body.append(f"<tr><td>{escape(row['slice'])}</td><td>{row['rows']:,}</td>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr><th></th><th>Rows</th>{head}</tr>{"".join(body)}</table></div>'


def _facts(result: Mapping[str, Any], card: ModelCard) -> str:
    data = result["dataset"]
    facts = {
        "Trainer": f"{card.trainer} ({card.framework})",
        "Task": card.task + (f", classes {', '.join(map(str, card.classes[:20]))}" if card.classes else ""),
        "Positive class": _positive(result, card),
        "Features": ", ".join(f.name for f in card.features),
        "Hyperparameters": ", ".join(f"{k}={v}" for k, v in card.hyperparameters.items()) or "defaults",
        "Fitted on": _refit(card),
        "Model window": f"{card.window['start']} to {card.window['end']}" if card.window else "not known",
        "Model package": result["model"]["sha256"],
        "Rows evaluated": f"{data['rows']:,}"
        + (f", {' to '.join(data['time_range'])}" if data["time_range"] else ""),
        "Dataset": data["sha256"],
        "Dependent rows": f"by {data['cluster_column']}" if data["cluster_column"] else "none stated",
    }
    return (
        "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v) + "</dl>"
    )


def _refit(card: ModelCard) -> str:
    """What a model was fitted on that was fitted again; empty for others."""
    if card.refit is None:
        return ""
    settled = ", ".join(f"{k}={v}" for k, v in card.refit["settled"].items())
    return f"{card.refit['rows']}" + (
        f", with {settled} as early stopping on valid had settled" if settled else ""
    )


def _positive(result: Mapping[str, Any], card: ModelCard) -> str:
    """Which class precision and recall are about, and when it is predicted; empty unless there are two."""
    positive = card.schema.positive_class
    return (
        "" if positive is None else f"{positive}, predicted from a probability of {result['threshold']:g} on"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
