"""Fit a model once, with all randomness seeded and the number of threads fixed."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadConfiguration, LeptonError, OutOfMemory
from lepton_airflow.packaging.export.fitted import Fitted, as_fitted
from lepton_airflow.packaging.schema import Schema
from lepton_airflow.store.checkpoints import Checkpoints
from lepton_airflow.training.curves import Curves
from lepton_airflow.training.rows import Rows
from lepton_airflow.training.trainer import Trainer, TrainerRun, silent

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


def fit_model(
    trainer: Trainer,
    rows: Rows,
    hyperparameters: dict[str, Any],
    *,
    valid: Rows | None = None,
    subset: NDArray[np.intp] | None = None,
    seed: int,
    threads: int,
    device: str = "auto",
    should_stop: Callable[[], bool] = lambda: False,
    checkpoints: Checkpoints | None = None,
    curves: Curves | None = None,
    say: Callable[[str], None] = silent,
    settled: Mapping[str, Any] | None = None,
    decided: Callable[[dict[str, Any] | None], None] | None = None,
) -> Fitted:
    """Fit on all rows or a subset, with every source of randomness seeded and the number of threads fixed.

    :param subset: numbers of the rows to train on; None: all.
    :param say: is told of the progress.
    :param settled: for a refit: what the fit before it has decided by ``valid``.
    :param decided: is told what this fit has decided by ``valid``, None if the trainer does not say.
    :raises LeptonError: the user's trainer failed; the message names the line in it, the cause is its error.
    """
    run = TrainerRun(
        info=rows.info,
        features=rows.schema.names,
        target=rows.target,
        task=rows.schema.task,
        classes=rows.schema.classes,
        seed=seed,
        threads=threads,
        device=device,
        should_stop=should_stop,
        checkpoints=checkpoints,
        curves=curves if curves is not None else Curves(),
        say=say,
        settled=settled,
    )
    train = rows.frame.copy() if subset is None else rows.take(subset)
    held_out = valid.frame.copy() if valid is not None else None
    with deterministic(seed, threads):
        try:
            returned = _call(trainer, train, held_out, hyperparameters, run)
        finally:
            if checkpoints is not None:
                checkpoints.close()
    if decided is not None:
        decided(run.decided)
    return as_fitted(returned, rows.schema, trainer.name)


def _call(
    trainer: Trainer,
    train: pd.DataFrame,
    valid: pd.DataFrame | None,
    hyperparameters: dict[str, Any],
    run: TrainerRun,
) -> Any:
    """Call the trainer's ``fit``; an error that its user can mend becomes one sentence."""
    from sklearn.utils._param_validation import InvalidParameterError

    try:
        return trainer.fit(train, valid, dict(hyperparameters), run)
    except (LeptonError, MemoryError):
        raise
    except InvalidParameterError as error:
        raise BadConfiguration(f"hyperparameters of {trainer.name}: {error}") from None
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
            raise OutOfMemory(
                f"trainer {trainer.name}: the GPU's memory is full: {str(error).splitlines()[0]} Lower the batch size, "
                "or accumulate gradients over parts of a batch."
            ) from error
        if trainer.defaults is not None:  # a standard model: no code of the user's
            raise
        raise LeptonError(
            f"trainer {trainer.name}, which is your code, failed{_where(error, trainer.fit)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _where(error: BaseException, fit: Callable[..., Any]) -> str:
    """Name the last line of the user's own module that led to an error."""
    own = getattr(sys.modules[fit.__module__], "__file__", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    return f" in line {lines[-1]} of {Path(own).name}" if own and lines else ""


@contextlib.contextmanager
def deterministic(seed: int, threads: int) -> Iterator[None]:
    """Seed Python, numpy and (if loaded) torch, and limit BLAS, OpenMP and torch to this many threads."""
    import random

    import numpy as np
    from threadpoolctl import threadpool_limits

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  a user's library may draw from the global generator
    with threadpool_limits(threads):
        torch = sys.modules.get("torch")
        if torch is None:
            yield
            return
        torch.manual_seed(seed)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def score(schema: Schema, y: NDArray[Any], predicted: NDArray[Any]) -> dict[str, float | None]:
    """Compute all metrics of the task."""
    from lepton_airflow.statistics.metrics import classification_metrics, regression_metrics

    return (
        classification_metrics(y, predicted)
        if schema.task == "classification"
        else regression_metrics(y, predicted)
    )
