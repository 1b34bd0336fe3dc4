"""Values in and out: text that a template rendered becomes what a field asks for, and results become plain JSON."""

from __future__ import annotations

import ast
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from lepton_airflow.contract import Artifact
from lepton_airflow.errors import BadConfiguration


def is_union(hint: Any) -> bool:
    """Whether a type hint is a union, in either of the two ways to write one."""
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def typed(value: Any, hint: Any, where: str) -> Any:
    """Check a JSON value against a field's type; text from a template becomes the number or flag it spells."""
    optional = type(None) in typing.get_args(hint)
    if hint is Any or (optional and value is None):
        return value
    if optional and value == "None":  # Jinja renders None as Python writes it
        return None
    options = typing.get_args(hint) if is_union(hint) else (hint,)
    kinds = [o for o in options if o is not type(None)]
    for option in kinds:
        if _fits(value, option):
            return float(value) if option is float else value
    if isinstance(value, str):
        for option in kinds:
            converted = _from_text(value, option)
            if converted is not None:
                return converted
        if optional and not value:
            return None
    names = " or ".join(_type_name(o) for o in options)
    advice = " Pass its .uri." if isinstance(value, Artifact) else ""
    lists = any((typing.get_origin(kind) or kind) is list for kind in kinds)
    if lists and isinstance(value, str) and not value.lstrip().startswith("["):
        advice = f" Write [{value!r}]."
    raise BadConfiguration(f"{where}={value!r} is not {names}.{advice}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, dict, str, bool):
        return isinstance(value, origin)
    return True


def _from_text(text: str, hint: Any) -> Any:
    origin = typing.get_origin(hint) or hint
    try:
        if origin is bool:
            return {"true": True, "false": False}[text.strip().lower()]
        if origin in (int, float):
            return origin(text)
        if origin in (list, dict):
            value = _literal(text)
            return value if isinstance(value, origin) else None
    except (KeyError, ValueError, SyntaxError, TypeError, RecursionError):
        return None
    return None


def _literal(text: str) -> Any:
    """What a text spells: JSON (``{{ x | tojson }}``), or Python as Jinja renders a list or a dict."""
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return "null" if hint is type(None) else str(getattr(hint, "__name__", hint))


def plain_json(value: Any) -> Any:
    """JSON values: numpy's scalars and arrays become numbers and lists, NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v) for v in value]
    if hasattr(value, "tolist"):
        return plain_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
