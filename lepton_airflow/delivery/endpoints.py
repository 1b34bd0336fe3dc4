"""What an endpoint should serve and what its servers say: the records that DeployModel and the servers share.

::

    endpoints/<endpoint>/desired/000001.json, …     a version that should be served; appended, never changed
    endpoints/<endpoint>/verdicts/000001.json, …    whether that one passed its checks; made once, never changed
    endpoints/<endpoint>/status/<server>.json       what a server does now; rewritten every few seconds

An endpoint serves the newest desired version that was not rejected. So a rejection leaves the former version in
service, and a server that starts again finds it by the same rule. Of several servers the first one's verdict stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, TypeVar

from lepton_airflow.contract import canonical_json, split_pin
from lepton_airflow.errors import BadConfiguration, IntegrityError, LeptonError, from_record
from lepton_airflow.store.files import Store

BEAT_S = 3.0  # how often a server rewrites its status
DEAD_S = 20.0  # a status older than this is that of a server that is gone
_FORGET_S = 24 * 3600.0  # … and is removed when this old, by the next server that starts


@dataclass(frozen=True, kw_only=True)
class Desired:
    """One version that an endpoint should serve.

    :ivar package: pinned URI of the model package.
    :ivar version: what clients see: the registered version, else the first digits of the package's digest.
    :ivar golden: pinned URI of the golden requests, rows with the answers that a server must give.
    :ivar max_difference: of an answer from the golden one [probability; regression: of the largest golden answer].
    :ivar name: the registered model whose champion this was, and ``ledger`` the number of its move; None when pinned.
    :ivar window: the data window that the model was trained on, ``{"start", "end"}``, or None.
    """

    endpoint: str
    sequence: int
    package: str
    version: str
    golden: str
    max_difference: float
    max_latency_ms: float
    max_memory_mb: float
    run_key: str
    name: str | None = None
    ledger: int | None = None
    window: dict[str, str] | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    decided: str = ""

    @property
    def sha256(self) -> str:
        """The digest of the package."""
        return split_pin(self.package)[1] or ""

    def asks_as(self, other: Desired) -> bool:
        """Whether both ask for the same package under the same conditions."""
        return all(getattr(self, n) == getattr(other, n) for n in _CONDITIONS) and self.sha256 == other.sha256


_CONDITIONS = (
    *("endpoint", "version", "golden", "name", "ledger"),
    *("max_difference", "max_latency_ms", "max_memory_mb"),
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a desired version passed its checks.

    :ivar numbers: what was measured: ``latency_p50_ms``, ``latency_p95_ms``, ``memory_mib``, ``difference``, ``load_s``.
    :ivar error: ``{"kind", "message", "exit_code"}`` when it was rejected.
    """

    sequence: int
    accepted: bool
    server: str
    numbers: dict[str, float] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    decided: str = ""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What one server does.

    :ivar state: ``idle`` (nothing was ever asked for), or about the newest desired version: ``loading``, ``serving``,
        ``rejected``.
    :ivar reason: why it is not serving, in one sentence.
    :ivar serving: sequence of the desired version in service, whose version, digest and numbers these are.
    :ivar refused: errors by sequence, of versions that this server cannot serve; see :attr:`Verdict.error`.
    :ivar beat: when this was written, ISO 8601, by the server's clock.
    """

    server: str
    url: str
    state: str = "idle"
    reason: str = ""
    desired: int | None = None
    serving: int | None = None
    version: str | None = None
    sha256: str | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)
    beat: str = ""

    @property
    def age_s(self) -> float:
        """Seconds since it was written."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.beat)).total_seconds()

    @property
    def alive(self) -> bool:
        """Whether the server has given a sign of life lately."""
        return self.age_s < DEAD_S


def check_endpoint_name(endpoint: str) -> None:
    """Refuse a name that a URL or a path would refuse."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", endpoint):
        raise BadConfiguration(
            f"endpoint={endpoint!r} cannot name an endpoint: expected letters, digits, '.', '_' and '-', as in "
            "'flights-late'."
        )


def desired_after(store: Store, endpoint: str, sequence: int = 0) -> list[Desired]:
    """The desired versions after a number, oldest first; raises IntegrityError when one of all is gone."""
    listed = 0
    if not sequence:  # whoever follows the records from the start on needs no list of them again
        keys = store.keys(f"endpoints/{endpoint}/desired")
        listed = max((int(key[-11:-5]) for key in keys), default=0)
    found: list[Desired] = []
    while True:
        key = _key(endpoint, "desired", sequence + len(found) + 1)
        text = store.read(key)
        if text is not None:
            found.append(_parse(key, text, Desired))
        elif len(found) >= listed:
            return found
        else:
            raise IntegrityError(
                f"record {key} is missing, later ones exist: restore it from a backup of the store."
            )


def append_desired(store: Store, known: Sequence[Desired], desired: Desired) -> bool:
    """Ask for a version after all those known; False when another task took its number, so that the caller looks again.

    :raises IntegrityError: a later move of the same champion was asked for before.
    """
    latest = max((_move(d) for d in known if d.name and d.name == desired.name), default=0)
    if latest > _move(desired):
        raise IntegrityError(
            f"endpoint {desired.endpoint!r} was asked for move {latest} of the champion of {desired.name!r}, and now for "
            f"the older move {desired.ledger}: it never goes back. If the ledger in {store.root} has lost moves, restore "
            "it from a backup."
        )
    content = canonical_json(asdict(desired)).encode()
    return store.create_exclusive(_key(desired.endpoint, "desired", desired.sequence), content)


def _move(desired: Desired) -> int:
    return desired.ledger or 0


def read_verdict(store: Store, endpoint: str, sequence: int) -> Verdict | None:
    """The verdict about a desired version, or None as long as there is none."""
    key = _key(endpoint, "verdicts", sequence)
    text = store.read(key)
    return _parse(key, text, Verdict) if text is not None else None


def decide(store: Store, endpoint: str, verdict: Verdict) -> Verdict:
    """Give a verdict; returns the one that stands, which is an earlier one if there was one."""
    key = _key(endpoint, "verdicts", verdict.sequence)
    store.create_exclusive(key, canonical_json(asdict(verdict)).encode())
    text = store.read(key)
    if text is None:
        raise IntegrityError(f"record {key} is missing, it was just there: restore it from a backup.")
    return _parse(key, text, Verdict)


def read_statuses(store: Store, endpoint: str) -> list[Status]:
    """What all servers of an endpoint say, those that are gone included."""
    keys = store.keys(f"endpoints/{endpoint}/status")
    return [_parse(key, text, Status) for key in keys if (text := store.read(key)) is not None]


def write_status(store: Store, endpoint: str, status: Status) -> None:
    """Say what a server does."""
    store.write(_status_key(endpoint, status.server), canonical_json(asdict(status)).encode())


def remove_status(store: Store, endpoint: str, server: str) -> None:
    """Take a server's status away: it has ended."""
    store.delete(_status_key(endpoint, server))


def forget_the_dead(store: Store, endpoint: str) -> None:
    """Remove what servers said that are long gone: containers come back under another name."""
    for status in read_statuses(store, endpoint):
        if status.age_s > _FORGET_S:
            remove_status(store, endpoint, status.server)


def precise_now() -> str:
    """The time in UTC as ISO 8601, for a heartbeat."""
    return datetime.now(UTC).isoformat()


def error_record(error: LeptonError) -> dict[str, Any]:
    """An error as it stands in records."""
    return {"kind": type(error).__name__, "message": str(error), "exit_code": error.exit_code}


def error_of(record: dict[str, Any]) -> LeptonError:
    """The error that a record tells of."""
    return from_record(record["kind"], record["message"], record["exit_code"])


def _key(endpoint: str, kind: str, sequence: int) -> str:
    return f"endpoints/{endpoint}/{kind}/{sequence:06d}.json"


def _status_key(endpoint: str, server: str) -> str:
    return f"endpoints/{endpoint}/status/{server}.json"


_T = TypeVar("_T", Desired, Verdict, Status)


def _parse(key: str, text: bytes, kind: type[_T]) -> _T:
    known = {f.name for f in fields(kind)}
    try:
        return kind(**{k: v for k, v in json.loads(text).items() if k in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"record {key} is damaged ({error}): restore it from a backup of the store."
        ) from None
