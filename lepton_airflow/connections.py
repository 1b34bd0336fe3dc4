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

    @classmethod
    def of_airflow(cls, conn_id: str, found: Any) -> Connection:
        """What an Airflow Connection object says, without Airflow."""
        return cls(
            id=conn_id,
            type=found.conn_type or "",
            host=found.host,
            login=found.login,
            password=found.password,
            schema=found.schema,
            port=found.port,
            extra=dict(found.extra_dejson),
        )


@dataclass(frozen=True)
class AwsAccess:
    """Keys, region and endpoint of AWS, or of a server that speaks its protocol; None for what a Connection does not say.

    Only this class knows where Airflow's Amazon provider keeps them. s3fs, Delta Lake and Iceberg name them differently:
    each mapping stands where the library is called.
    """

    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region: str | None = None
    endpoint_url: str | None = None

    @classmethod
    def of(cls, connection: Connection) -> AwsAccess:
        """Read a Connection: login, password, host, and the fields of ``extra`` that the Amazon provider knows."""
        extra = connection.extra
        found = {
            "access_key_id": connection.login or extra.get("aws_access_key_id"),
            "secret_access_key": connection.password or extra.get("aws_secret_access_key"),
            "session_token": extra.get("aws_session_token"),
            "region": extra.get("region_name"),
            "endpoint_url": extra.get("endpoint_url") or connection.host,
        }
        return cls(**{name: str(value) for name, value in found.items() if value})


def connections_from_json(text: str | bytes) -> dict[str, Connection]:
    """Read the JSON in which a runner hands Connections over: ``[{"id", "type", "host", …}]``."""
    try:
        return {item["id"]: Connection(**item) for item in json.loads(text or "[]")}
    except (ValueError, KeyError, TypeError):  # the text itself is not shown: it holds secrets
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


def hide_logins(text: str) -> str:
    """The text without the logins in its URLs: ``https://token@host`` and ``https://me:password@host``."""
    return _URL_LOGIN.sub("://***@", text)


def is_secret(name: str, value: Any) -> bool:
    """Whether a setting is a secret, which no DAG may hold: by its name, by a name inside it, or as a URL with a password."""
    if isinstance(value, Mapping):
        return any(is_secret(inner, item) for inner, item in value.items())
    return bool(_SECRET_NAME.search(name) or _URL_PASSWORD.search(str(value)))


def _secrets(connection: Connection) -> Iterator[str]:
    if connection.password:
        yield connection.password
    yield from _secrets_in([connection.host, connection.extra], secret=False)


def _secrets_in(value: Any, *, secret: bool) -> Iterator[str]:
    """Strings under names that sound secret, as Airflow tells them, and the passwords inside URLs."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _secrets_in(item, secret=secret or bool(_PERHAPS_SECRET_NAME.search(str(name))))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _secrets_in(item, secret=secret)
    elif isinstance(value, str):
        if secret:
            yield value
        for password in _URL_PASSWORD.findall(value):
            yield from (password, unquote(password))  # a driver's message may hold either form
        if value.lstrip().startswith("{"):  # Google's keyfile_dict is JSON in JSON
            with suppress(ValueError):
                yield from _secrets_in(json.loads(value), secret=False)


_SHORTEST_SECRET = 5  # shorter ones would blank ordinary words
# A setting with such a name is a secret: a DAG that holds it is refused.
_CERTAIN = (
    r"pass(wd|word|phrase)|secret|token|credential|(access|account|api|private)[-_]?key|connection[-_]string"
    r"|authorization$"
)
_SECRET_NAME = re.compile(_CERTAIN, re.IGNORECASE)
# A value under one of these names may be a secret. It is taken out of log lines and messages, which does no harm if it is
# none. In a DAG it is allowed: Iceberg's ``oauth2-server-uri`` matches, too.
_PERHAPS_SECRET_NAME = re.compile(rf"{_CERTAIN}|key|auth|sas", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")
# A login without a password counts, since many hosts take a token there. What an Azure URL has there is its container.
_URL_LOGIN = re.compile(r"(?<!abfs)(?<!abfss)(?<!wasb)(?<!wasbs)://[^/\s@]+@")
