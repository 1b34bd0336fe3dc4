"""Airflow Connections as they reach a stage, and texts without their secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from lepton_airflow.errors import ContractError


@dataclass(frozen=True)
class Connection:
    """The plain contents of an Airflow Connection, as it reaches a stage. Its repr shows no secret."""

    id: str
    type: str
    host: str | None = None
    login: str | None = None
    password: str | None = field(default=None, repr=False)
    schema: str | None = None
    port: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)


def connections_from_json(text: str | bytes) -> dict[str, Connection]:
    """Read the JSON in which a runner hands Connections over: ``[{"id", "type", "host", …}]``."""
    try:
        return {item["id"]: Connection(**item) for item in json.loads(text or "[]")}
    except (ValueError, KeyError, TypeError):  # no word of the text itself: it holds secrets
        raise ContractError('the Connections are no JSON list of {"id", "type", "host", …}.') from None


def redact(text: str, connections: Mapping[str, Connection]) -> str:
    """The text without any secret of the given Connections: a driver's message may quote its whole URL."""
    return redactor(connections)(text)


def redactor(connections: Mapping[str, Connection]) -> Callable[[str], str]:
    """A function that takes the secrets of the given Connections out of a text, also where they are quoted or escaped."""
    found = {
        form
        for connection in connections.values()
        for secret in _secrets(connection)
        for line in secret.splitlines()  # a key of several lines reaches the log line by line
        for form in (line, quote(line, safe=""), quote_plus(line), json.dumps(line)[1:-1], repr(line)[1:-1])
        if len(line) >= _SHORTEST_SECRET
    }
    if not found:
        return lambda text: text
    pattern = re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))))
    return lambda text: pattern.sub("***", text)


def _secrets(connection: Connection) -> Iterator[str]:
    if connection.password:
        yield connection.password
    yield from _secrets_in([connection.host, connection.extra], secret=False)


def _secrets_in(value: Any, *, secret: bool) -> Iterator[str]:
    """Strings under names that sound secret, as Airflow tells them, and the passwords inside URLs."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _secrets_in(item, secret=secret or bool(_SECRET_NAME.search(str(name))))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _secrets_in(item, secret=secret)
    elif isinstance(value, str):
        if secret:
            yield value
        for password in _URL_PASSWORD.findall(value):
            yield from (password, unquote(password))  # a driver may tell the one or the other
        if value.lstrip().startswith("{"):  # Google's keyfile_dict is JSON in JSON
            with suppress(ValueError):
                yield from _secrets_in(json.loads(value), secret=False)


_SHORTEST_SECRET = 5  # shorter ones would blank ordinary words
_SECRET_NAME = re.compile(
    r"pass(wd|word|phrase)|secret|token|key|credential|auth|connection_string|sas", re.IGNORECASE
)
_URL_PASSWORD = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")
