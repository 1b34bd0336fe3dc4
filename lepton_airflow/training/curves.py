"""Keep what a fit reports of its progress, over all tries, and draw it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_MOST_POINTS = 4000
_MOST_PANELS = 4


@dataclass
class Curves:
    """What a trainer reported, over all tries.

    :ivar unit: what a step is: ``epoch``, ``step``, …
    :ivar points: one dict a report: ``step`` and the metrics.
    :ivar resumed: the steps at which a later try went on.
    """

    unit: str = "step"
    points: list[dict[str, float]] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)

    def add(self, step: float, metrics: Mapping[str, float]) -> None:
        """Add a report. Beyond 4,000 points, every second one is dropped: a picture shows no more."""
        self.points.append({"step": float(step), **{name: float(value) for name, value in metrics.items()}})
        if len(self.points) >= _MOST_POINTS:
            del self.points[1:-1:2]


def draw(curves: Curves, path: Path, title: str) -> Path | None:
    """Draw the curves, a measure of train and valid in one panel.

    Returns None when nothing was reported, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:  # after hours of training, no picture is a reason to fail
        log.warning("curves.png is not drawn: matplotlib is not installed where the stage ran")
        return None
    panels = _panels(curves)
    if not panels:
        return None
    figure = Figure(figsize=(7, 1 + 3 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axes, (measure, names) in zip(rows, panels.items(), strict=True):
        for name in names:
            _draw_line(axes, name, [(p["step"], p[name]) for p in curves.points if name in p])
        for number, step in enumerate(curves.resumed):
            axes.axvline(step, color="0.6", linestyle=":", label="resumed" if number == 0 else None)
        axes.set(ylabel=measure)
        axes.legend()
    axes.set(xlabel=curves.unit)
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=100, metadata={"Software": None})
    return path


def _panels(curves: Curves) -> dict[str, list[str]]:
    """The names of the metrics by what they measure: ``train_loss`` and ``valid_loss`` are both ``loss``."""
    found: dict[str, list[str]] = {}
    for name in sorted({name for point in curves.points for name in point} - {"step"}):
        found.setdefault(name.removeprefix("train_").removeprefix("valid_"), []).append(name)
    return dict(list(found.items())[:_MOST_PANELS])


def _draw_line(axes: Any, name: str, points: list[tuple[float, float]]) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, marker="." if len(steps) < 50 else None, label=name)
    if name == "valid_loss":
        best = min(range(len(values)), key=lambda i: values[i])
        ring = {"color": "0.2", "fillstyle": "none", "markersize": 10, "label": "smallest"}
        axes.plot(steps[best], values[best], "o", **ring)
