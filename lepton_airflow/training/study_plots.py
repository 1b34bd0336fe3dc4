"""Draw what a study found: the value of each trial, and how much of it each hyperparameter explains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna


def plot_history(study: optuna.Study, metric: str, path: Path) -> Path:
    """Draw the value of every trial, and the best so far."""
    from matplotlib.figure import Figure

    complete = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    pruned = [
        t for t in study.get_trials(deepcopy=False) if t.state.name == "PRUNED" and t.intermediate_values
    ]
    better = max if study.direction.name == "MAXIMIZE" else min
    best = [better(t.value for t in complete[: i + 1] if t.value is not None) for i in range(len(complete))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([t.number for t in complete], [t.value for t in complete], "o", label="complete")
    last = [t.intermediate_values[max(t.intermediate_values)] for t in pruned]
    axes.plot([t.number for t in pruned], last, "x", color="0.6", label="pruned (mean of the folds run)")
    axes.step([t.number for t in complete], best, where="post", label="best so far")
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
