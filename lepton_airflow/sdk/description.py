"""A stage's parameters as people read them: from its fields and the ``:param`` lines of its docstring."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, dataclass, fields

from lepton_airflow.sdk.stage import Stage


@dataclass(frozen=True)
class Parameter:
    """One parameter of a stage, as ``describe`` shows it."""

    name: str
    type: str
    default: str  # "required" when there is none
    unit: str  # from "[unit]" in the text; empty when the value has none
    text: str


def describe(stage: type[Stage]) -> list[Parameter]:
    """The parameters of a stage, from its fields and the ``:param`` lines of its docstring."""
    texts = param_texts(inspect.getdoc(stage) or "")
    result = []
    for f in fields(stage):
        default = (
            f.default
            if f.default is not MISSING
            else f.default_factory()
            if f.default_factory is not MISSING
            else MISSING
        )
        text = texts.get(f.name, "")
        unit = re.search(r"\[([^\]]+)\]", text)
        kind = re.sub(
            r"typing\.|^Annotated\[(.*)\]$", r"\1", f.type if isinstance(f.type, str) else str(f.type)
        )
        result.append(
            Parameter(
                f.name,
                kind,
                "required" if default is MISSING else repr(default),
                unit[1] if unit else "",
                text,
            )
        )
    return result


def param_texts(doc: str) -> dict[str, str]:
    """The ``:param name: text`` entries of a docstring, each with its continuation lines joined."""
    found = re.findall(r"^:param (\w+):\s*(.*(?:\n[ \t]+.*)*)", doc, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
