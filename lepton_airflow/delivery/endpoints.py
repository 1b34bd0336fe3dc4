"""What an endpoint should serve and what its servers say: the records that DeployModel and the servers share.

::

    records/endpoints/<endpoint>/desired/…                  a log of the versions that should be served (store/records.py)
    records/endpoints/<endpoint>/verdicts/000001.json, …    whether that one passed its checks; made once, never changed
    records/endpoints/<endpoint>/status/<server>.json       what a server does now; rewritten every few seconds

An endpoint serves the newest desired version that was not rejected. So a rejection leaves the former version in
service, and a server that starts again finds it by the same rule. Of several servers the first one's verdict stands.
"""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from lepton_airflow.contract import split_pin
from lepton_airflow.errors import BadConfiguration, IntegrityError, LeptonError, from_record
from lepton_airflow.store.files import Store
from lepton_airflow.store.records import ROOT, Log, parse, to_json

log = logging.getLogger(__name__)

BEAT_S = 3.0  # between two writes of a server's status
DEAD_S = 20.0  # a server whose status is older than this has ended
_FORGET_S = 24 * 3600.0  # the next server that starts removes a status older than this


@dataclass(frozen=True, kw_only=True)
class Desired:
    """One version that an endpoint should serve.

    :ivar package: pinned URI of the model package.
    :ivar version: what clients see: the registered version, else the first digits of the package's digest.
    :ivar golden: pinned URI of the golden requests, rows with the answers that a server must give.
    :ivar max_difference: of an answer from the golden one [probability; regression: of the largest golden answer].
    :ivar name: the registered model whose champion this was, and ``ledger`` the number of its move; None when pinned.
    :ivar window: the data window that the model was trained on, ``{"start", "end"}``, or None.
    :ivar sequence: its number among the records of the endpoint.
    :ivar moves: the last move of each registered model's champion that was asked for, up to here.
    """

    endpoint: str
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
    sequence: int = 0
    moves: dict[str, int] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """The digest of the package."""
        return split_pin(self.package)[1] or ""

    def asks_as(self, other: Desired) -> bool:
        """Whether both ask for the same package on the same conditions."""
        return all(getattr(self, n) == getattr(other, n) for n in _CONDITIONS) and self.sha256 == other.sha256


_CONDITIONS = (
    *("endpoint", "version", "golden", "name", "ledger"),
    *("max_difference", "max_latency_ms", "max_memory_mb"),
)


@dataclass(frozen=True, kw_only=True)
class LoadVerdict:
    """Whether a desired version passed the checks that a server makes when it loads it.

    :ivar numbers: what was measured: ``latency_p50_ms``, ``latency_p95_ms``, ``memory_mib``, ``difference``, ``load_s``.
    :ivar error: ``{"kind", "message", "exit_code"}`` when it was rejected.
    :ivar instead: when it was rejected, the number of the newest one before it that was not; 0: there is none.
    """

    sequence: int
    accepted: bool
    server: str
    numbers: dict[str, float] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    instead: int = 0
    decided: str = ""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What one server does.

    :ivar state: ``idle`` (nothing was ever asked for), or about the newest desired version: ``loading``, ``serving``,
        ``rejected``.
    :ivar reason: why it is not serving, in one sentence.
    :ivar serving: sequence of the desired version in service, whose version, digest and numbers these are.
    :ivar errors: why this server does not serve a version, by its sequence; see :attr:`LoadVerdict.error`.
    :ivar problems: what is damaged in the store, in sentences, though something is served.
    :ivar tries: how often the server was ended while it loaded the newest desired version.
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
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    tries: int = 0
    beat: str = ""

    @property
    def age_s(self) -> float:
        """Seconds since it was written."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.beat)).total_seconds()

    @property
    def alive(self) -> bool:
        """Whether the server has written its status lately. One from the future says as little as an old one."""
        return abs(self.age_s) < DEAD_S


def check_endpoint_name(endpoint: str) -> None:
    """Raise BadConfiguration for a name that a URL or a path cannot have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", endpoint):
        raise BadConfiguration(
            f"endpoint={endpoint!r} cannot name an endpoint: expected letters, digits, '.', '_' and '-', as in "
            "'flights-late'."
        )


class DesiredLog(Log[Desired]):
    """The versions that an endpoint should serve, in the order in which they were asked for."""

    def __init__(self, store: Store, endpoint: str) -> None:
        super().__init__(store, f"endpoints/{endpoint}/desired", Desired, find_by=("run_key",))

    def append_after(self, newest: Desired | None, desired: Desired) -> Desired | None:
        """Ask for a version after the newest that the caller knows of; None when that is not the newest any more.

        :raises IntegrityError: a later move of the same champion was asked for before.
        """
        moves = dict(newest.moves) if newest else {}
        if desired.name is not None:
            latest, move = moves.get(desired.name, 0), desired.ledger or 0
            if latest > move:
                raise IntegrityError(
                    f"endpoint {desired.endpoint!r} was asked for move {latest} of the champion of {desired.name!r}, and "
                    f"now for the older move {move}: it never goes back. If the ledger in {self.store.root} has lost moves, "
                    "restore it from a backup."
                )
            moves[desired.name] = move
        desired = replace(desired, sequence=newest.sequence + 1 if newest else 1, moves=moves)
        return desired if self.append(desired) else None

    def whole(self, sequence: int) -> Desired | None:
        """The record of that number, or None where there is none or it is damaged."""
        with suppress(IntegrityError):
            return self.record(sequence)
        return None

    def newest_whole(self) -> tuple[Desired | None, list[str]]:
        """The newest record that can be read, for a server, which has to serve something; and what is wrong with the log."""
        damaged: list[str] = []
        try:
            return self.newest(), damaged
        except LeptonError as error:
            damaged.append(str(error))
        for number in range(self.highest(), 0, -1):
            try:
                if (record := self.record(number)) is not None:
                    return record, damaged
            except LeptonError as error:
                if str(error) not in damaged:
                    damaged.append(str(error))
        return None, damaged


def endpoints_asked(store: Store) -> list[str]:
    """The names of the endpoints that were asked for a version, or have a server."""
    return [name.rstrip("/") for name in store.children(f"{ROOT}/endpoints")]


def read_verdict(store: Store, endpoint: str, sequence: int) -> LoadVerdict | None:
    """The verdict about a desired version, or None as long as there is none."""
    key = _verdict_key(endpoint, sequence)
    text = store.read(key)
    return parse(key, text, LoadVerdict) if text is not None else None


def decide(store: Store, endpoint: str, verdict: LoadVerdict) -> LoadVerdict:
    """Record a verdict unless there is one already; returns the one that is recorded."""
    key = _verdict_key(endpoint, verdict.sequence)
    if verdict.error:
        verdict = replace(verdict, instead=not_rejected(store, endpoint, verdict.sequence - 1))
    store.create_exclusive(key, to_json(verdict))
    text = store.read(key)
    if text is None:
        raise IntegrityError(f"record {key} is missing, it was just there: restore it from a backup.")
    return parse(key, text, LoadVerdict)


def not_rejected(store: Store, endpoint: str, sequence: int) -> int:
    """The number of the newest desired version up to this one that was not rejected; 0: there is none.

    A rejection names the one before it, and a verdict is never revised: of a row of rejected versions only the last is read.
    """
    while sequence:
        verdict = read_verdict(store, endpoint, sequence)
        if verdict is None or not verdict.error:
            return sequence
        sequence = verdict.instead
    return 0


def read_statuses(store: Store, endpoint: str) -> list[Status]:
    """The status of every server of an endpoint, also of those that have ended."""
    found = []
    for key in store.keys(f"{ROOT}/endpoints/{endpoint}/status"):
        try:
            text = store.read(key)
            if text is not None:
                status = parse(key, text, Status)
                if not isinstance(status.errors, dict) or not isinstance(status.serving, int | None):
                    raise TypeError(f"{key} holds values of other types")
                _ = status.age_s  # raises where its time is none
                found.append(status)
        except (LeptonError, TypeError, ValueError) as error:  # a report decides nothing, so it stops nobody
            log.warning("a server's report was passed over: %s", error)
    return found


def write_status(store: Store, endpoint: str, status: Status) -> None:
    """Record what a server does."""
    store.write(_status_key(endpoint, status.server), to_json(status))


def remove_status(store: Store, endpoint: str, server: str) -> None:
    """Remove the status of a server that has ended."""
    store.delete(_status_key(endpoint, server))


def forget_the_dead(store: Store, endpoint: str) -> None:
    """Remove the statuses of servers that ended long ago: a container that starts again has another name."""
    for status in read_statuses(store, endpoint):
        if abs(status.age_s) > _FORGET_S:
            remove_status(store, endpoint, status.server)


def precise_now() -> str:
    """The time in UTC as ISO 8601, for a heartbeat."""
    return datetime.now(UTC).isoformat()


def error_record(error: LeptonError) -> dict[str, Any]:
    """An error as records hold it."""
    return {"kind": type(error).__name__, "message": str(error), "exit_code": error.exit_code}


def error_of(record: dict[str, Any]) -> LeptonError:
    """The error that a record holds."""
    return from_record(record["kind"], record["message"], record["exit_code"])


def _verdict_key(endpoint: str, sequence: int) -> str:
    return f"{ROOT}/endpoints/{endpoint}/verdicts/{sequence:06d}.json"


def _status_key(endpoint: str, server: str) -> str:
    return f"{ROOT}/endpoints/{endpoint}/status/{server}.json"
