"""A comparison of number formats as one HTML page that needs no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_airflow.packaging.compression.compare import Candidate, Comparison

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


def render(record: Mapping[str, Any], found: Comparison) -> str:
    """The page of a comparison: ``record`` is what ``quantization.json`` holds."""
    machine, rules, data = record["machine"], record["rules"], record["dataset"]
    facts = {
        "CPU": f"{machine['cpu']} ({' '.join(machine['flags']) or 'flags not known'})",
        "Timing": f"{machine['threads']} thread(s), {machine['rounds']} rounds of fresh sessions, calls in turns; speedups "
        "are medians over rounds of the ratio of the fastest calls, with 95% intervals",
        "Required": f"{rules['metric']} not worse by {rules['max_loss']:.4g} (whole interval), nowhere slower by {100 * rules['max_slowdown']:g}%, and "
        f"{rules['min_speedup']:g} times as fast or {rules['min_shrink']:g} times smaller",
        "Positive class": ""
        if rules["positive_class"] is None
        else f"{rules['positive_class']}, predicted from a probability of {rules['threshold']:g} on",
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
        _table(found, rules["metric"]),
    ]
    if any(c.latency for c in found.candidates[1:]):
        parts += [
            "<h2>Times as fast as the original</h2>",
            _picture(found.candidates[1:], rules["min_speedup"]),
        ]
    parts += ["<h2>Operators</h2>", _operators(found.candidates), "<h2>How it was measured</h2><dl>"]
    parts += [f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v]
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
