"""Draw what a study found: the value of each trial, and how much of it each hyperparameter explains."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna


def plot_history(
    trials: Sequence[optuna.trial.FrozenTrial], metric: str, path: Path, *, maximize: bool
) -> Path:
    """Draw the value of every trial, numbered in this order, and the best so far."""
    from matplotlib.figure import Figure

    complete = [
        (n, t.value) for n, t in enumerate(trials) if t.state.name == "COMPLETE" and t.value is not None
    ]
    pruned = [(n, t.intermediate_values) for n, t in enumerate(trials) if t.state.name == "PRUNED"]
    last = [(n, values[max(values)]) for n, values in pruned if values]
    numbers = [n for n, _ in complete]
    best = list(accumulate((value for _, value in complete), max if maximize else min))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(numbers, [value for _, value in complete], "o", label="complete")
    axes.plot(
        [n for n, _ in last],
        [value for _, value in last],
        "x",
        color="0.6",
        label="pruned (mean of the folds run)",
    )
    axes.step(numbers, best, where="post", label="best so far")
    axes.set(xlabel="trial", ylabel=f"{metric}, mean over folds", title=f"{len(complete)} complete trials")
    axes.legend()
    figure.savefig(path, format="png", dpi=100)
    return path


def importances(study: optuna.Study, seed: int) -> dict[str, float]:
    """The share of the value's variance that each hyperparameter explains (fANOVA, Hutter et al. 2014).

    Empty with fewer than four different values.
    """
    import optuna

    values = {t.value for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"}
    if len(values) < 4:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def plot_importance(importance: dict[str, float], metric: str, path: Path) -> Path:
    """Draw what :func:`importances` found."""
    from matplotlib.figure import Figure

    names = sorted(importance, key=lambda name: importance[name])
    figure = Figure(figsize=(7, 1 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [importance[n] for n in names])
    axes.set(xlabel=f"share of the variance of {metric} (fANOVA)", xlim=(0, 1))
    figure.savefig(path, format="png", dpi=100)
    return path
