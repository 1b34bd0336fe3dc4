"""Where does a stage run? One file here is one place, and knows no ML.

A runner is a mutable dataclass: settings in the constructor, host-independent defaults, a stable ``repr``. It starts
``python -m lepton_airflow run`` somewhere, waits, and returns the receipt, or raises the error that the receipt records.
Each passes ``lepton_airflow.testing.RunnerConformance``. A file ``my_place.py`` here with a runner ``MyPlace`` in it is
``lepton_airflow.runners.MyPlace``, and a name for ``[lepton] runner``.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import BadConfiguration, RunnerError, did_you_mean, from_record
from lepton_airflow.settings import setting


class Runner(ABC):
    """One place where a stage can run.

    A runner must:

    - hand ``connections`` over without writing them to disk, argv, environment or log;
    - forward the stage's log lines to the logger ``lepton_airflow.stage`` while it runs;
    - leave no process behind, however the run ends;
    - return a receipt only when the stage wrote one for this run key.

    :cvar local: whether its stages see the worker's files.
    """

    local: ClassVar[bool] = True

    @abstractmethod
    def run(self, request: Request, connections: Sequence[Connection], context: Mapping[str, Any]) -> Receipt:
        """Run the request to its end; raises the LeptonError that the receipt records, or RunnerError without a receipt.

        :param connections: the contents of the Connections that the request names.
        :param context: Airflow's context; empty without Airflow. A runner that deferred the task finds under ``lepton`` what
            it passed to the deferral.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Stop what :meth:`run` started: ask, wait for the grace period, then kill. Safe to call at any time."""

    def rendered(self, render: Callable[[Any], Any]) -> Self:
        """The runner with its templated settings rendered: a copy, because several tasks may share this one."""
        del render  # by default a runner has no templated settings
        return self


def settle(request: Request, receipt: Receipt) -> Receipt:
    """The receipt, if it answers this request and records no error; else raises RunnerError, or the error it records."""
    if receipt.run_key != request.run_key or receipt.stage != request.stage:
        raise RunnerError(
            f"{request.stage}: the receipt is of {receipt.stage} with run key {receipt.run_key}, expected "
            f"{request.run_key}: two runs share a place; clear the task."
        )
    if receipt.error:
        raise from_record(receipt.error["kind"], receipt.error["message"], int(receipt.error["exit_code"]))
    return receipt


def default_runner() -> Runner:
    """The runner that ``[lepton] runner`` names, or describes as JSON of one name with its settings."""
    text = setting("runner", "Subprocess") or "Subprocess"
    try:
        value: Any = json.loads(text) if text.lstrip().startswith("{") else {text: {}}
    except ValueError:
        value = None
    if not isinstance(value, dict) or len(value) != 1:
        raise BadConfiguration(
            f'[lepton] runner={text!r}: expected a name such as Subprocess, or {{"Subprocess": {{"grace_s": 5}}}}.'
        )
    ((name, options),) = value.items()
    if name not in _FILES:
        raise BadConfiguration(f"[lepton] runner={name!r}: {did_you_mean(name, _FILES)}")
    try:
        runner: Runner = __getattr__(name)(**options)
    except TypeError as error:
        raise BadConfiguration(f"[lepton] runner={text!r}: {error}") from None
    return runner


def __getattr__(name: str) -> Any:
    """The runner of that name, imported when it is first used, so that parsing a DAG imports no other runner."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)


# A file is named after its runner: in_process.py has InProcess.
_FILES = {
    "".join(word.capitalize() for word in file.name.split("_")): file.name
    for file in pkgutil.iter_modules(__path__)
}
__all__ = ["Runner", "default_runner", "settle", *_FILES]  # noqa: PLE0604 - names all
