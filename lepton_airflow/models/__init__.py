"""What can be fitted by name? The standard models of TrainModel and TuneModel.

One file is one model, and a new file here is a new name. A model's file holds

- ``TASKS``: what it can do, of ``classification`` and ``regression``
- ``DEFAULTS``: its hyperparameters with their defaults; a name that is not among them is refused
- ``SEARCH_SPACE``: what TuneModel searches unless it is told otherwise
- ``fit(train, valid, hyperparameters, run)``: the trainer contract of :mod:`lepton_airflow.training`

:func:`fit_torch` is the training loop for torch modules, for trainers of your own too.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lepton_airflow.errors import BadConfiguration, did_you_mean
from lepton_airflow.sdk.closure import package_digest
from lepton_airflow.sdk.code import code_digest, is_code, load_code
from lepton_airflow.training.torch_loop import fit_torch
from lepton_airflow.training.trainer import Trainer

__all__ = ["at_least", "find", "fit_torch", "load", "names"]


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


def find(name: str, task: str) -> Trainer:
    """The standard model of that name, or the user's ``module:function``, as a trainer for ``task``."""
    if is_code(name):
        fit = load_code(name, "trainer")
        space = getattr(sys.modules[fit.__module__], "SEARCH_SPACE", {})
        _load_torch_for(fit)
        return Trainer(name, fit, None, space, code_digest(name))
    module = load(name)
    if task not in module.TASKS:
        fitting = [n for n in names() if task in load(n).TASKS]
        raise BadConfiguration(
            f"trainer={name!r} does {' and '.join(module.TASKS)}, the dataset asks for {task}: use one of "
            f"{', '.join(fitting)}."
        )
    return Trainer(name, module.fit, module.DEFAULTS, module.SEARCH_SPACE, code_of(name))


def code_of(name: str) -> str:
    """sha256 of a trainer's source: the user's own, or a standard model's with all modules of this package that it uses."""
    return code_digest(name) if is_code(name) else package_digest(f"{__name__}.{name}")


def _load_torch_for(fit: Callable[..., Any]) -> None:
    """Import torch if the user's module will: ``fit_model`` seeds only what is loaded."""
    path = getattr(sys.modules[fit.__module__], "__file__", None) or ""
    source = Path(path).read_text(errors="replace") if path.endswith(".py") else ""
    if re.search(r"^\s*(?:import|from)\s+torch\b", source, re.MULTILINE):
        # If it is missing, the user's own import says so.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("torch")


def at_least(least: float, hyperparameters: Mapping[str, float]) -> None:
    """Raise BadConfiguration with the first hyperparameter that is below what a model can work with."""
    for name, value in hyperparameters.items():
        if not value >= least:
            raise BadConfiguration(f"hyperparameters: {name}={value}, expected at least {least}.")
