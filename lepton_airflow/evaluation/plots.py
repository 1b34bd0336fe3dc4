"""The pictures of an evaluation: ROC, precision and recall, calibration, confusion, residuals.

Figures are made without pyplot (no global state, no display) and saved without date or program name, so equal inputs
give equal bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_INK, _MUTED = "#1f2933", "#9aa5b1"
_COLOURS = (
    "#2563eb",
    "#d97706",
    "#059669",
    "#dc2626",
    "#7c3aed",
    "#0891b2",
    "#be185d",
    "#4d7c0f",
    "#475569",
    "#b45309",
)
_MOST_LINES = len(_COLOURS)
_MOST_POINTS = 1_000  # of a curve: more make the file larger and look the same


def classification_plots(
    folder: Path, y: NDArray[np.int64], p: NDArray[Any], classes: Sequence[Any], threshold: float
) -> list[Path]:
    """Draw ``roc``, ``precision_recall``, ``calibration`` and ``confusion`` into a folder.

    :param y: (n,) class numbers.
    :param p: (n, k) probabilities in the order of ``classes``; with two classes the second one is the positive one.
    """
    return [
        _save(folder / "roc.png", lambda axes: _roc(axes, y, p, classes)),
        _save(folder / "precision_recall.png", lambda axes: _precision_recall(axes, y, p, classes)),
        _save(folder / "calibration.png", lambda axes: _calibration(axes, y, p, classes)),
        _save(folder / "confusion.png", lambda axes: _confusion(axes, y, p, classes, threshold)),
    ]


def regression_plots(folder: Path, y: NDArray[np.float64], predicted: NDArray[Any]) -> list[Path]:
    """Draw ``predicted`` (against actual) and ``residuals`` (their histogram, and against the prediction)."""
    return [
        _save(folder / "predicted.png", lambda axes: _predicted(axes, y, predicted)),
        _save(folder / "residuals.png", lambda axes: _residuals(axes, y, predicted)),
        _save(
            folder / "residuals_by_prediction.png", lambda axes: _residuals_by_prediction(axes, y, predicted)
        ),
    ]


def _save(path: Path, draw: Callable[[Axes], None]) -> Path:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "legend.frameon": False,
    }
    with rc_context(style):
        figure: Figure = Figure(figsize=(5.2, 4.4), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _label(classes: Sequence[Any], number: int) -> str:
    """A class in a legend: of two, the positive one says so."""
    return _short(classes[number]) + (" (positive class)" if len(classes) == 2 else "")


def _events(
    y: NDArray[np.int64], p: NDArray[Any], classes: Sequence[Any]
) -> Iterator[tuple[str, str, NDArray[np.bool_], NDArray[Any]]]:
    """(label, colour, truth, score) of each class that can be drawn: the positive one of two classes, else all against the rest."""
    shown = [1] if len(classes) == 2 else list(range(len(classes)))[:_MOST_LINES]
    for colour, number in zip(_COLOURS, shown, strict=False):
        truth = y == number
        if 0 < truth.sum() < len(truth):
            yield _label(classes, number), colour, truth, p[:, number]


def _roc(axes: Axes, y: NDArray[np.int64], p: NDArray[Any], classes: Sequence[Any]) -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle="--")
    for label, colour, truth, score in _events(y, p, classes):
        false, true, _ = roc_curve(truth, score)
        keep = _thin(len(false))
        axes.plot(false[keep], true[keep], color=colour, label=f"{label}: {roc_auc_score(truth, score):.3f}")
    axes.set(
        title="ROC", xlabel="False positive rate", ylabel="True positive rate", xlim=(0, 1), ylim=(0, 1.01)
    )
    _legend(axes, "Area")


def _precision_recall(axes: Axes, y: NDArray[np.int64], p: NDArray[Any], classes: Sequence[Any]) -> None:
    from sklearn.metrics import average_precision_score, precision_recall_curve

    for label, colour, truth, score in _events(y, p, classes):
        precision, recall, _ = precision_recall_curve(truth, score)
        keep = _thin(len(precision))
        axes.plot(
            recall[keep],
            precision[keep],
            color=colour,
            label=f"{label}: {average_precision_score(truth, score):.3f}",
        )
        axes.axhline(truth.mean(), color=colour, linewidth=1, linestyle=":")
    axes.set(
        title="Precision and recall (dotted: share of the class)",
        xlabel="Recall",
        ylabel="Precision",
        xlim=(0, 1),
        ylim=(0, 1.01),
    )
    _legend(axes, "Average precision")


def _calibration(axes: Axes, y: NDArray[np.int64], p: NDArray[Any], classes: Sequence[Any]) -> None:
    import numpy as np

    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle="--")
    for label, colour, truth, score in _events(y, p, classes):
        order = np.argsort(score, kind="stable")
        bins = [part for part in np.array_split(order, min(10, max(1, len(order) // 20))) if len(part)]
        said = np.array([score[part].mean() for part in bins])
        came = np.array([truth[part].mean() for part in bins])
        size = np.array([len(part) for part in bins])
        # The interval of Wilson (1927), which stays inside [0, 1] also where few or no events came.
        z = 1.96
        centre = (came + z * z / (2 * size)) / (1 + z * z / size)
        reach = z * np.sqrt(came * (1 - came) / size + z * z / (4 * size * size)) / (1 + z * z / size)
        below, above = np.maximum(came - (centre - reach), 0), np.maximum(centre + reach - came, 0)
        axes.errorbar(
            said, came, yerr=[below, above], color=colour, marker="o", markersize=4, capsize=2, label=label
        )
    axes.set(
        title="Calibration (95% intervals of independent rows)",
        xlabel="Predicted probability (tenths of the rows)",
        ylabel="Observed share",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    _legend(axes)


def _confusion(
    axes: Axes, y: NDArray[np.int64], p: NDArray[Any], classes: Sequence[Any], threshold: float
) -> None:
    import numpy as np

    predicted = (p[:, 1] >= threshold).astype(int) if len(classes) == 2 else p.argmax(axis=1)
    k = len(classes)
    counts = np.bincount(y * k + predicted, minlength=k * k).reshape(k, k)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = range(k) if k <= 20 else []
    axes.set_xticks(ticks, [_short(classes[i]) for i in ticks], rotation=0 if k <= 5 else 90)
    axes.set_yticks(ticks, [_short(classes[i]) for i in ticks])
    if k <= 8:
        for i in range(k):
            for j in range(k):
                colour = "white" if share[i, j] > 0.6 else _INK
                axes.text(
                    j, i, f"{counts[i, j]:,}\n{share[i, j]:.0%}", ha="center", va="center", color=colour
                )
    rule = f"{_short(classes[1])} from {threshold:g} on" if k == 2 else "the most probable"
    axes.set(title="Confusion (shares of each true class)", xlabel=f"Predicted ({rule})", ylabel="True")
    axes.spines[:].set_visible(False)


def _predicted(axes: Axes, y: NDArray[np.float64], predicted: NDArray[Any]) -> None:
    keep = _sample(len(y))
    axes.scatter(y[keep], predicted[keep], s=8, alpha=0.4, color=_COLOURS[0], linewidths=0)
    ends = [float(min(y.min(), predicted.min())), float(max(y.max(), predicted.max()))]
    axes.plot(ends, ends, color=_MUTED, linewidth=1, linestyle="--")
    axes.set(title="Predicted against actual", xlabel="Actual", ylabel="Predicted")


def _residuals(axes: Axes, y: NDArray[np.float64], predicted: NDArray[Any]) -> None:
    residual = y - predicted
    axes.hist(residual, bins=40, color=_COLOURS[0], alpha=0.8)
    axes.axvline(0, color=_INK, linewidth=1)
    axes.axvline(residual.mean(), color=_COLOURS[1], linewidth=1.5, label=f"mean {residual.mean():.3g}")
    axes.set(title="Residuals (actual minus predicted)", xlabel="Residual", ylabel="Rows")
    _legend(axes)


def _residuals_by_prediction(axes: Axes, y: NDArray[np.float64], predicted: NDArray[Any]) -> None:
    keep = _sample(len(y))
    axes.scatter(predicted[keep], (y - predicted)[keep], s=8, alpha=0.4, color=_COLOURS[0], linewidths=0)
    axes.axhline(0, color=_MUTED, linewidth=1, linestyle="--")
    axes.set(title="Residuals by prediction", xlabel="Predicted", ylabel="Residual")


def _legend(axes: Axes, title: str | None = None) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title=title, fontsize=9)


def _thin(n: int) -> NDArray[np.int64]:
    """Positions of at most about a thousand points of a curve, its ends among them."""
    import numpy as np

    return np.unique(np.linspace(0, n - 1, min(n, _MOST_POINTS)).astype(np.int64))


def _sample(n: int) -> NDArray[np.int64]:
    """Positions of at most four thousand rows, the same ones every time."""
    import numpy as np

    most = 4 * _MOST_POINTS
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def _short(label: Any) -> str:
    text = str(label)
    return text if len(text) <= 16 else text[:15] + "…"
