"""The pictures show the numbers of these rows: curves against scikit-learn and against sums by hand, and real pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn import metrics

from lepton_airflow.evaluation import plots

Y = np.array([0, 0, 1, 1])
P = np.array([0.1, 0.4, 0.35, 0.8])  # the textbook's four rows: an area of 0.75
CLASSES = ["on time", "late"]


def both(p: np.ndarray) -> np.ndarray:
    """Probabilities of two classes, of which these are the second's."""
    return np.stack([1 - p, p], axis=1)


@pytest.fixture
def axes() -> Axes:
    return Figure().add_subplot()


@pytest.fixture
def many() -> tuple[np.ndarray, np.ndarray]:
    """Labels and calibrated probabilities of three classes."""
    rng = np.random.default_rng(3)
    p = rng.dirichlet([1, 2, 3], 4000)
    return (p.cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1), p


def series(axes: Axes) -> dict[str, list[list[float]]]:
    """The labelled lines, each as [xs, ys]."""
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): np.array(line.get_data()).tolist() for line in lines}


def test_roc_is_that_of_the_four_rows(axes: Axes) -> None:
    plots._roc(axes, Y, both(P), CLASSES)
    assert series(axes) == {"late (positive class): 0.750": [[0, 0, 0.5, 0.5, 1], [0, 0.5, 0.5, 1, 1]]}
    assert axes.get_legend().get_title().get_text() == "Area"


def test_roc_of_several_classes_has_a_curve_for_each_against_the_rest(axes: Axes, many: Any) -> None:
    y, p = many
    plots._roc(axes, y, p, ["a", "b", "c"])
    areas = [metrics.roc_auc_score(y == k, p[:, k]) for k in range(3)]
    drawn = series(axes)
    assert list(drawn) == [f"{name}: {area:.3f}" for name, area in zip("abc", areas, strict=True)]
    for (x, tpr), area in zip(drawn.values(), areas, strict=True):
        assert len(x) <= 1000
        assert (x[0], tpr[0], x[-1], tpr[-1]) == (0, 0, 1, 1)
        assert np.trapezoid(tpr, x) == pytest.approx(area, abs=2e-3)  # thinned, and still that curve
    assert len({line.get_color() for line in axes.get_lines()[1:]}) == 3


def test_precision_and_recall_by_hand(axes: Axes) -> None:
    plots._precision_recall(axes, Y, both(P), CLASSES)
    # Thresholds 0.1, 0.35, 0.4, 0.8: of 4, 3, 2, 1 rows said to be late, 2, 2, 1, 1 are.
    assert series(axes) == {
        "late (positive class): 0.833": [[1, 1, 0.5, 0.5, 0], [0.5, pytest.approx(2 / 3), 0.5, 1, 1]]
    }
    share = axes.get_lines()[-1]
    assert share.get_linestyle() == ":"
    assert set(share.get_ydata()) == {0.5}  # the share of late rows


def test_calibration_has_tenths_of_the_rows_with_their_shares_and_wilson_intervals(axes: Axes) -> None:
    p = np.linspace(0, 1, 1000)
    y = (np.arange(1000) % 10 < 10 * p).astype(int)
    plots._calibration(axes, y, both(p), CLASSES)
    ((said, came),) = [line.get_data() for line in axes.get_lines() if line.get_marker() == "o"]
    assert said == pytest.approx(p.reshape(10, 100).mean(axis=1))
    assert came == pytest.approx(y.reshape(10, 100).mean(axis=1))
    ends = axes.collections[0].get_segments()  # of the error bars
    n, share = 100, came[4]
    centre = (share + 1.96**2 / (2 * n)) / (1 + 1.96**2 / n)
    reach = 1.96 * math.sqrt(share * (1 - share) / n + 1.96**2 / (4 * n * n)) / (1 + 1.96**2 / n)
    assert ends[4][:, 1] == pytest.approx([centre - reach, centre + reach])


def test_calibration_of_few_rows_is_one_point(axes: Axes) -> None:
    plots._calibration(axes, Y, both(P), CLASSES)
    ((said, came),) = [line.get_data() for line in axes.get_lines() if line.get_marker() == "o"]
    assert (said.tolist(), came.tolist()) == ([pytest.approx(P.mean())], [0.5])


@pytest.mark.parametrize(
    ("threshold", "texts"),
    [
        (0.35, ["1\n50%", "1\n50%", "0\n0%", "2\n100%"]),  # a row at the threshold is predicted late
        (0.5, ["2\n100%", "0\n0%", "1\n50%", "1\n50%"]),
    ],
)
def test_confusion_counts_by_true_class_at_the_threshold(
    axes: Axes, threshold: float, texts: list[str]
) -> None:
    plots._confusion(axes, Y, both(P), CLASSES, threshold)
    assert [text.get_text() for text in axes.texts] == texts
    assert axes.get_xlabel() == f"Predicted (late from {threshold:g} on)"
    assert [label.get_text() for label in axes.get_yticklabels()] == CLASSES


def test_confusion_of_several_classes_is_that_of_scikit_learn(axes: Axes, many: Any) -> None:
    y, p = many
    plots._confusion(axes, y, p, ["a", "b", "c"], 0.5)
    expected = metrics.confusion_matrix(y, p.argmax(axis=1), normalize="true")
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(expected)
    assert axes.get_xlabel() == "Predicted (the most probable)"


def test_a_class_that_is_absent_or_alone_is_not_drawn(axes: Axes) -> None:
    plots._roc(axes, np.zeros(4, dtype=int), both(P), CLASSES)
    assert series(axes) == {}
    assert axes.get_legend() is None


def test_of_many_classes_ten_get_a_line_and_long_names_are_cut(axes: Axes) -> None:
    y = np.arange(30) % 15
    p = np.full((30, 15), 1 / 15)
    plots._roc(axes, y, p, [f"{k:02} is a long name" for k in range(15)])
    assert len(series(axes)) == 10
    assert next(iter(series(axes))) == "00 is a long na…: 0.500"


def test_residuals_are_actual_minus_predicted(axes: Axes) -> None:
    y, predicted = np.arange(100.0), np.arange(100.0) - np.tile([1, 3], 50)
    plots._residuals(axes, y, predicted)
    bars = {
        round(bar.get_x() + bar.get_width() / 2, 1): bar.get_height()
        for bar in axes.patches
        if bar.get_height()
    }
    assert sum(bars.values()) == 100
    assert [height for _, height in sorted(bars.items())] == [50, 50]
    assert 1 <= min(bars) < 1.1
    assert 2.9 < max(bars) <= 3
    assert list(series(axes)) == ["mean 2"]


def test_clouds_hold_the_rows_and_of_many_rows_a_fixed_sample(axes: Axes) -> None:
    y = np.arange(10_000.0)
    plots._predicted(axes, y, 2 * y)
    points = np.asarray(axes.collections[0].get_offsets())
    assert len(points) == 4000
    assert (points[:, 1] == 2 * points[:, 0]).all()
    assert (np.diff(points[:, 0]) > 0).all()
    np.testing.assert_array_equal(plots._sample(10_000), points[:, 0])
    few = Figure().add_subplot()
    plots._residuals_by_prediction(few, np.array([1.0, 2.0]), np.array([3.0, 5.0]))
    assert few.collections[0].get_offsets().tolist() == [[3, -2], [5, -3]]


def colours(path: Path) -> set[tuple[int, ...]]:
    """The colours of a picture's pixels."""
    pixels = (255 * matplotlib.image.imread(path)[..., :3]).round().astype(int)
    assert pixels.shape == (484, 572, 3)
    return set(map(tuple, pixels.reshape(-1, 3).tolist()))


def test_every_picture_is_drawn_and_equal_rows_give_equal_bytes(tmp_path: Path, many: Any) -> None:
    y, p = many
    drawn: list[list[Path]] = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        drawn.append(
            [
                *plots.classification_plots(folder, y, p, ["a", "b", "c"], 0.5),
                *plots.regression_plots(folder, p[:, 0], p[:, 1]),
            ]
        )
    assert [path.stem for path in drawn[0]] == [
        *("roc", "precision_recall", "calibration", "confusion"),
        *("predicted", "residuals", "residuals_by_prediction"),
    ]
    for path, again in zip(*drawn, strict=True):
        assert path.read_bytes() == again.read_bytes()
    for path in drawn[0][:3]:
        lines = {tuple(round(255 * v) for v in matplotlib.colors.to_rgb(c)) for c in plots._COLOURS[:3]}
        assert lines <= colours(path), path.stem
    for path in drawn[0][3:]:
        assert len(colours(path)) > 50, path.stem
