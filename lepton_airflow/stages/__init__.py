"""What is done to data and models? One file here is one stage of the lifecycle.

A stage is a keyword-only dataclass whose fields are its parameters (JSON values) and whose :meth:`Stage.run` does
the work. It knows no Airflow and no runner, so ``TrainModel(...).run(RunInfo.local(tmp_path))`` is all a test needs.
A new file with a :class:`Stage` in it is found by name (``python -m lepton_airflow stages``) and gets its named
operator; a stage of your own package is found through the entry point group ``lepton_airflow.stages``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from lepton_airflow.errors import BadConfiguration, did_you_mean
from lepton_airflow.sdk.code import is_code, load_code
from lepton_airflow.sdk.stage import ArtifactUri, CodeRef, ConnectionId, Result, RunInfo, Stage

__all__ = [
    "ArtifactUri",
    "CodeRef",
    "ConnectionId",
    "Result",
    "RunInfo",
    "Stage",
    "all_stages",
    "build",
    "get_stage",
    "stage_name",
]

log = logging.getLogger(__name__)


@cache
def all_stages() -> dict[str, type[Stage]]:
    """Every stage by class name: the files of this package, then the entry points ``lepton_airflow.stages``."""
    found: dict[str, type[Stage]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Stage) and value.__module__ == module.__name__:
                found[value.__name__] = value
    from importlib.metadata import entry_points  # costs a process of a stage 20 ms

    for entry in entry_points(group="lepton_airflow.stages"):
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # noqa: BLE001 - one broken package must not break every DAG
            log.warning("stage %s of %s is left out: %r", entry.name, entry.value, error)
    return dict(sorted(found.items()))


def get_stage(name: str) -> type[Stage]:
    """The stage of that class name, or your own as ``module:Class``; raises BadConfiguration with the nearest known name."""
    if ":" in name:
        found = load_code(name, "stage")
        if not (isinstance(found, type) and issubclass(found, Stage)):
            raise BadConfiguration(f"stage={name!r} is no subclass of lepton_airflow.stages.Stage.")
        return found
    own = _own_module(name)
    if name.isidentifier() and importlib.util.find_spec(own):
        alone: Any = getattr(importlib.import_module(own), name, None)
        if isinstance(alone, type) and issubclass(alone, Stage):
            return alone
    stages = all_stages()
    if name not in stages:
        raise BadConfiguration(f"there is no stage {name!r}; {did_you_mean(name, stages)}")
    return stages[name]


def _own_module(name: str) -> str:
    # The file of a stage of ours is named after it: importing that one alone saves every task a tenth of a second.
    return f"{__name__}.{re.sub(r'(?<!^)(?=[A-Z])', '_', name).lower()}"


def stage_name(stage: type[Stage]) -> str:
    """The name by which :func:`get_stage` finds a stage wherever it runs: its own, or ``module:Class``."""
    if stage.__module__ == _own_module(stage.__name__):
        return stage.__name__
    for name, known in all_stages().items():
        if known is stage:
            return name
    name = f"{stage.__module__}:{stage.__qualname__}"
    # Airflow imports a DAG file under a made-up name, which no other process can import.
    if not is_code(name) or stage.__module__ == "__main__" or stage.__module__.startswith("unusual_prefix_"):
        raise BadConfiguration(
            f"stage {stage.__qualname__} is defined where no other process can import it ({stage.__module__}): put the "
            "class at the top level of a module beside the DAG file."
        )
    return name


def build(name: str, parameters: Mapping[str, Any]) -> Stage:
    """Make a stage from JSON parameters; raises BadConfiguration for unknown, missing or wrongly typed ones."""
    stage = get_stage(name)
    known = {f.name: f for f in fields(stage)}
    for key in parameters:
        if key not in known:
            raise BadConfiguration(f"{name} has no parameter {key!r}; {did_you_mean(key, known)}")
    missing = [
        k
        for k, f in known.items()
        if k not in parameters and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise BadConfiguration(f"{name} needs {', '.join(missing)}: python -m lepton_airflow describe {name}")
    return stage(**parameters)
