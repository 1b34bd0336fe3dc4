"""The standard models: what TrainModel and TuneModel fit when they are given a name.

One file is one model, and a new file here is a new name. A model's file holds

- ``TASKS``: what it can do, of ``classification`` and ``regression``
- ``DEFAULTS``: its hyperparameters with their defaults; a name that is not among them is refused
- ``SEARCH_SPACE``: what TuneModel searches unless it is told otherwise
- ``fit(train, valid, hyperparameters, run)``: the trainer contract of :mod:`lepton_airflow.training`

:func:`fit_torch` is the training loop for torch modules, for trainers of your own too.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import ModuleType

from lepton_airflow.errors import BadConfiguration, did_you_mean
from lepton_airflow.models._torch import fit_torch

__all__ = ["at_least", "fit_torch", "load", "names"]


@cache
def names() -> tuple[str, ...]:
    """The standard models' names."""
    return tuple(
        sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    )


def load(name: str) -> ModuleType:
    """The module of a standard model; raises BadConfiguration with the nearest known name."""
    if name not in names():
        raise BadConfiguration(
            f"trainer={name!r} is no standard model and no reference module:function; {did_you_mean(name, names())}"
        )
    return importlib.import_module(f"{__name__}.{name}")


def at_least(least: float, hyperparameters: Mapping[str, float]) -> None:
    """Refuse hyperparameters below what a model can work with; raises BadConfiguration with the first of them."""
    for name, value in hyperparameters.items():
        if not value >= least:
            raise BadConfiguration(f"hyperparameters: {name}={value}, expected at least {least}.")
