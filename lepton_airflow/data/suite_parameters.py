"""Fill the ``{"$PARAMETER": …}`` of a suite: with values, or with what Great Expectations computes from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from lepton_airflow.errors import BadConfiguration, first_line

_SIGN = "$PARAMETER"
# A name in an expression: no function, no argument's name, no exponent of a number.
_NAME = re.compile(r"(?<![\w.$])[A-Za-z][\w$]*(?![\w$]|\s*[=(])")
_CONSTANTS = ("e", "pi")


def filled(value: Any, parameters: Mapping[str, Any], where: str) -> Any:
    """The arguments of an expectation with their parameters filled, at any depth.

    An expression such as ``0.1 * mean`` or ``now() - timedelta(weeks=1)`` is computed by Great Expectations; ``now()`` is in UTC.

    :param where: which expectation it is, for the message.
    :raises BadConfiguration: a parameter is not given, or the expression cannot be computed.
    """
    if isinstance(value, list):
        return [filled(item, parameters, where) for item in value]
    if not isinstance(value, dict):
        return value
    if _SIGN not in value:
        return {key: filled(item, parameters, where) for key, item in value.items()}
    expression = str(value[_SIGN]).strip()
    if f"{_SIGN}.{expression}" in value:  # a value beside its name, as Great Expectations allows it
        return value[f"{_SIGN}.{expression}"]
    asked = f"{where} needs {_SIGN} {expression[:80]!r}"
    found = parameters[expression] if expression in parameters else _computed(expression, parameters, asked)
    if isinstance(found, float) and not math.isfinite(found):
        raise BadConfiguration(f"{asked}, which is {found}: every value would meet such a bound, or none.")
    return found


def asks_for_now(value: Any) -> bool:
    """Whether what a suite asks for depends on when it is asked."""
    return any(re.search(r"\bnow\s*\(", expression) for expression in _expressions(value))


def _computed(expression: str, parameters: Mapping[str, Any], asked: str) -> Any:
    from great_expectations.core import suite_parameters as library

    names = _NAME.findall(expression)
    for name in names:
        if name not in parameters and name.lower() not in _CONSTANTS:
            raise BadConfiguration(f"{asked}: pass suite_parameters={{{name!r}: …}}.")
        if name in parameters and name.lower() in _CONSTANTS:
            raise BadConfiguration(
                f"{asked}, in which {name!r} is a number of mathematics: rename the parameter."
            )
    # The worker's clock may be in any time zone; windows, and times without an offset, are in UTC.
    library.EXPR.fn = library.SuiteParameterParser.fn | {"now": lambda: datetime.now(UTC)}
    try:
        return library.parse_suite_parameter(expression, dict(parameters))
    except Exception as error:  # noqa: BLE001 - the parser's and Great Expectations' own share no base
        reason = re.sub(
            r"^(Parse Failure|Error while evaluating suite parameter expression): ", "", first_line(error)
        )
        raise BadConfiguration(f"{asked}, which Great Expectations cannot compute: {reason}") from None


def _expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if _SIGN in value:
            yield str(value[_SIGN])
        for item in value.values():
            yield from _expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _expressions(item)
