"""Say in words what failed expectations found, as short as a receipt needs it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.row_conditions import condition_text
from lepton_airflow.errors import cut_quoted

if TYPE_CHECKING:
    from great_expectations.core import ExpectationValidationResult

# A receipt has at most 8 KB and holds the message twice; the two addresses at its end must not be cut off.
_MAX_LIST_BYTES = 2000
_MAX_LINE = 300
_MAX_ARGUMENTS = 140
_MAX_EXAMPLES_SHOWN = 5


def call_text(kind: str, kwargs: dict[str, Any], length: int | None = None) -> str:
    """An expectation as it would be called.

    :param length: longest text of the arguments [characters]; None: no limit.
    """
    arguments = _arguments(kwargs)
    return f"{kind}({_shorten(arguments, length) if length else arguments})"


def severity(result: ExpectationValidationResult) -> str:
    """``critical``, ``warning`` or ``info``."""
    found = result.expectation_config.severity if result.expectation_config else "critical"
    return str(getattr(found, "value", found))


def failure_text(failed: list[ExpectationValidationResult], total: int, where: str) -> str:
    """One line for each failed expectation, critical ones first, as many as fit into a receipt."""
    ordered = sorted(failed, key=lambda r: severity(r) != "critical")
    lines = [f"{len(failed)} of {total} expectations failed: {where}."]
    room = _MAX_LIST_BYTES
    for shown, result in enumerate(ordered):
        line = _shorten(f"- {_line(result)}", _MAX_LINE)
        room -= len(json.dumps(line))
        if room < 0:
            lines.append(f"- and {len(ordered) - shown} more, in the full result.")
            break
        lines.append(line)
    return "\n".join(lines)


def _line(result: ExpectationValidationResult) -> str:
    config = result.expectation_config
    assert config is not None
    name = call_text(config.type, config.kwargs, _MAX_ARGUMENTS)
    if severity(result) != "critical":
        name = f"[{severity(result)}] {name}"
    error = _why_not_evaluated(result)
    if error:
        return f"{name}: could not be evaluated: {error}"
    found = result.result
    if found.get("unexpected_count"):
        count, total = found["unexpected_count"], found.get("element_count") or 0
        share = f" of {total} ({100 * count / total:.3g}%)" if total else ""
        examples = dict.fromkeys(
            _shorten(_as_written(v), 40) for v in found.get("partial_unexpected_list", [])
        )
        shown = ", ".join(list(examples)[:_MAX_EXAMPLES_SHOWN])
        return f"{name}: {count}{share} unexpected" + (f", e.g. {shown}" if shown else "")
    mismatched = (found.get("details") or {}).get("mismatched")
    if isinstance(mismatched, dict) and mismatched:
        return f"{name}: {_shorten(_arguments(dict(sorted(mismatched.items()))), _MAX_ARGUMENTS)}"
    if mismatched:  # a list of positions, each with what was expected and found there
        return f"{name}: {_shorten(_as_written(mismatched), _MAX_ARGUMENTS)}"
    if "observed_value" in found:
        return f"{name}: observed {_shorten(_as_written(found['observed_value']), 100)}"
    return name


def _arguments(kwargs: dict[str, Any]) -> str:
    return ", ".join(
        f"{k}={condition_text(v) if k == 'row_condition' and isinstance(v, dict) else _as_written(v)}"
        for k, v in kwargs.items()
        if k not in ("batch_id", "catch_exceptions")
    )


def _as_written(value: Any) -> str:
    """A value as a person would write it: scalars of numpy and pandas without their class names."""
    if isinstance(value, dict):
        return "{" + _arguments(value) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_as_written, value)) + "]"
    if isinstance(value, str):
        return repr(value)
    return str(value)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _why_not_evaluated(result: ExpectationValidationResult) -> str | None:
    """Why an expectation could not be evaluated, in one sentence; None when it was."""
    info = result.exception_info or {}
    records = [info] if "raised_exception" in info else list(info.values())
    messages = [str(r.get("exception_message")) for r in records if r.get("raised_exception")]
    if not messages:
        return None
    message = messages[0]
    missing = re.search(r'The column "(.*)" in BatchData does not exist', message)
    if missing:
        return f"column {missing[1]!r} is not in the data"
    if "No provider found" in message or "not implemented for SQL" in message:
        other = "pandas" if "DuckDB" in message or "SQL" in message else "duckdb"
        return f"it does not exist for this engine; set engine={other!r}"
    if "Out of Memory Error" in message:
        return "DuckDB needs more memory: raise memory_limit_mb"
    database = re.search(r"duckdb\.\w+\) (.*)", message)
    return cut_quoted((database[1] if database else message.splitlines()[0]).strip())
