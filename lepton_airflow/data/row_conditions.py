"""Read an expectation's row_condition to its end.

Great Expectations' parser reads one comparison and ignores what follows: of ``col("a") == 1 OR col("b") == 2`` it keeps the rows of the
first alone. Its conditions in JSON may be joined, and hold dates, so a text becomes one of these.
"""

from __future__ import annotations

import re
from typing import Any

from lepton_airflow.errors import BadConfiguration

# A text in quotes; or a word that joins two comparisons.
_JOINT = re.compile(r"""("[^"]*"|'[^']*')|(?<![\w"'])(AND|OR)(?![\w"'])|(&&?|\|\|?)""", re.IGNORECASE)
_PARSERS = (None, "great_expectations", "great_expectations__experimental__")


def whole_condition(kwargs: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments of an expectation, with a row_condition that holds all that its text says.

    :param where: which expectation it is, for the message.
    :raises BadConfiguration: a part of it is no comparison that Great Expectations knows.
    """
    text = kwargs.get("row_condition")
    if not isinstance(text, str) or not text.strip() or kwargs.get("condition_parser") not in _PARSERS:
        return kwargs
    alternatives = [[_comparison(part, text, where) for part in parts] for parts in _split(text)]
    joined = [_join("and", comparisons) for comparisons in alternatives]
    rest = {k: v for k, v in kwargs.items() if k != "condition_parser"}
    return rest | {"row_condition": _join("or", joined)}


def obey_conditions() -> None:
    """Have each metric of rows ask for the row_condition; Great Expectations registers that of pairs in a set without it."""
    from great_expectations.expectations.registry import _registered_metrics

    for name, metric in _registered_metrics.items():
        if name.startswith("column_pair_values.in_set."):
            keys = (*metric["metric_domain_keys"], "row_condition", "condition_parser")
            metric["metric_domain_keys"] = tuple(dict.fromkeys(keys))


def _split(text: str) -> list[list[str]]:
    """The comparisons of a text: AND binds more closely than OR."""
    alternatives, start = [list[str]()], 0
    for found in _JOINT.finditer(text):
        joint = (found[2] or found[3] or "").lower()
        if joint:
            alternatives[-1].append(text[start : found.start()])
            start = found.end()
            if joint in ("or", "|", "||"):
                alternatives.append([])
    alternatives[-1].append(text[start:])
    return alternatives


def _comparison(part: str, text: str, where: str) -> dict[str, Any]:
    from great_expectations.compatibility.pyparsing import ParseException
    from great_expectations.expectations.legacy_row_conditions import condition

    if re.search(r"""["']\s|\t|\s["'](?!\))\s*$""", part.strip()):  # the parser would drop or change them
        raise BadConfiguration(
            f"{where}: row_condition {text!r}: a value or column in {part.strip()!r} begins or ends with a space, or holds a tab, which "
            "Great Expectations would not compare as written; use a condition in JSON."
        )
    try:
        found = condition.parse_string(part.strip(), parse_all=True)
    except ParseException:
        raise BadConfiguration(
            f'{where}: row_condition {text!r}: {part.strip()!r} is no comparison such as col("a") == 1, col("a") > "x" or '
            'col("a").notNull(), joined by AND and OR; without parentheses.'
        ) from None
    column = {"name": found["column"]}
    if found.get("notnull"):
        return {"type": "nullity", "column": column, "is_null": False}
    if "fnumber" in found:
        number = found["fnumber"]
        value: Any = int(number) if re.fullmatch(r"[+-]?\d+", number) else float(number)
    else:
        value = found["condition_value"]
    return {"type": "comparison", "column": column, "operator": found["op"], "parameter": value}


def _join(kind: str, conditions: list[dict[str, Any]]) -> dict[str, Any]:
    return conditions[0] if len(conditions) == 1 else {"type": kind, "conditions": conditions}


def condition_text(condition: dict[str, Any]) -> str:
    """What a row_condition in JSON says, as a person would write it; what is none, as it is."""
    try:
        kind = condition["type"]
        if kind in ("and", "or"):
            parts = condition["conditions"]
            texts = (f"({condition_text(c)})" if c["type"] == "or" else condition_text(c) for c in parts)
            return f" {kind.upper()} ".join(texts)
        column = f'col("{condition["column"]["name"]}")'
        if kind == "nullity":
            return f"{column}.{'isNull' if condition['is_null'] else 'notNull'}()"
        value = condition["parameter"]
        return f"{column} {condition['operator']} " + (f'"{value}"' if isinstance(value, str) else str(value))
    except (KeyError, TypeError):
        return str(condition)
