"""Write lepton_airflow/operators.pyi: the operators are made from the stages when they are asked for, which type checkers do not see.

    .venv/bin/python .ci/make_stub.py

Run it after a stage's fields changed; tests/test_operators.py fails while the stub on disk is not this one.
"""

# ruff: noqa: INP001 - a script, no package
from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator

from lepton_airflow.stages import Stage, all_stages

STUB = Path(__file__).parents[1] / "lepton_airflow" / "operators.pyi"

HEAD = '''\
# Made by .ci/make_stub.py; do not edit.
# ruff: noqa: PYI021, PYI051 - editors show the docstrings, and offer what a Literal names beside any template
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal, TypedDict, Unpack

from airflow.sdk import DAG, BaseOperator, XComArg
from airflow.sdk.definitions.xcom_arg import PlainXComArg

from lepton_airflow.runners import Runner
from lepton_airflow.stages import ArtifactUri, CodeRef, ConnectionId, Stage

class _TaskArguments(TypedDict, total=False):
{task}

class StageOperator(BaseOperator):
    """Run one stage; the base of all named operators and of those for your own stages."""

    stage: ClassVar[type[Stage]]
    def __init_subclass__(cls, stage: type[Stage] | None = None, **kwargs: Any) -> None: ...
    @property
    def output(self) -> PlainXComArg: ...
    def execute(self, context: Mapping[str, Any]) -> dict[str, Any]: ...
'''
COMMON = """\
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
"""
KNOWN = {
    *("Any", "Literal", "Mapping", "None", "Sequence", "bool", "dict", "float", "int", "list", "str"),
    *("ArtifactUri", "CodeRef", "ConnectionId", "DAG", "datetime", "timedelta"),
}


def stub() -> str:
    """The whole stub."""
    task = "\n".join(
        f"    {name}: {_annotation(str(p.annotation))}"
        for name, p in inspect.signature(BaseOperator.__init__).parameters.items()
        if name not in ("self", "task_id", "kwargs")
    )
    text = "\n".join(
        [HEAD.format(task=task), *(_operator(name, stage) for name, stage in all_stages().items())]
    )
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(STUB), "-"]
    return subprocess.run(ruff, input=text, check=True, capture_output=True, text=True).stdout


def _operator(name: str, stage: type[Stage]) -> str:
    arguments = ["        self,", "        *,", "        task_id: str,"]
    for f in sorted(fields(stage), key=_has_default):
        kind = _annotation(str(f.type)).replace("ArtifactUri", "ArtifactUri | XComArg")
        # Every argument is templated: text that renders to the value, or an XComArg that brings it.
        kinds = dict.fromkeys([*kind.split(" | "), "str", "XComArg"])
        optional = kinds.pop("None", "") is None
        kind = " | ".join([*kinds, *(["None"] if optional else [])]) if kind != "Any" else kind
        arguments.append(f"        {f.name}: {kind}{' = ...' if _has_default(f) else ''},")
    doc = (inspect.getdoc(stage) or "").splitlines()[0]
    return (
        f'class {name}Operator(StageOperator):\n    """{doc}"""\n\n    def __init__(\n'
        + "\n".join(arguments)
        + f"\n{COMMON}        **kwargs: Unpack[_TaskArguments],\n    ) -> None: ...\n"
    )


def _has_default(f: Field[Any]) -> bool:
    return f.default is not MISSING or f.default_factory is not MISSING


def _annotation(text: str) -> str:
    """An annotation in terms of what the stub imports; ``Any`` for one that needs more."""
    text = text.replace("collections.abc.", "").replace("typing.", "")
    names = set(re.findall(r"[A-Za-z_][\w.]*", re.sub(r"'[^']*'|\"[^\"]*\"", "", text)))
    if not names <= KNOWN:
        return "Any"
    text = re.sub(r"\bdict\b(?!\[)", "dict[str, Any]", text)
    # A dict or a list of fewer kinds of values is one of more kinds only if nobody writes to it.
    return re.sub(r"\blist\[", "Sequence[", re.sub(r"\bdict\[", "Mapping[", text))


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
    print(STUB)
