"""Put a stage into a DAG: one named operator per stage, ``<Stage>Operator``, with the stage's fields as arguments.

The stage is the single source: signature, docstring and template fields are made from it, so ``help()``, completion,
``default_args``, templates, XComArgs and ``.partial().expand()`` work. Every operator takes besides, keyword-only:

:param runner: where the stage runs, such as ``Subprocess(memory_limit_mb=4096)``; default: the installation's.
:param store: URI of the artifact store (templated); default: the installation's.
:param store_conn_id: id of the Connection that opens the store; default: the installation's for its own store, else
    ambient identity.
:param cache: ``use`` an equal earlier result, ``refresh`` it, or keep the cache ``off`` (templated). The run param
    ``refresh_cache`` set to true refreshes every task of a run.
:param cache_ttl_s: age above which an earlier result is not used [seconds]; default: the installation's.
:param window: ``{"start": …, "end": …}`` (templated) to use instead of the run's own window.

A task pushes its receipt as ``return_value`` and one XCom per artifact and named value, so that
``prepare.output["train"]`` is a pinned URI; ``metrics`` is the flat dict of its metrics. A stage that ``emits`` a value
sends an event with the run's window to every ``AssetAlias`` among the task's ``outlets`` when that value is true.
"""

from __future__ import annotations

from typing import Any

from lepton_airflow.airflow.operator import StageOperator
from lepton_airflow.errors import BadConfiguration
from lepton_airflow.stages import all_stages, get_stage


def __getattr__(name: str) -> Any:
    """The operator of a stage, made when it is asked for: a DAG file then imports only the stages that it uses."""
    if name == "__all__":
        return __dir__()
    stage_of = name.removesuffix("Operator")
    if stage_of == name or name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        stage = get_stage(stage_of)
        namespace = {"__module__": __name__, "__qualname__": name}
        made = type(StageOperator)(name, (StageOperator,), namespace, stage=stage)
    except BadConfiguration as error:
        raise AttributeError(f"there is no {name}: {error}") from None
    return globals().setdefault(name, made)


def __dir__() -> list[str]:
    return ["StageOperator", *(f"{name}Operator" for name in all_stages() if name.isidentifier())]
