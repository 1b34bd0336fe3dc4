"""What was registered and what is champion, as the store decides it.

Two kinds of records, each made once by :meth:`~lepton_airflow.store.files.Store.create_exclusive` and never changed::

    registrations/<model>/<run key>/000001.json    this run's package is version N of the model
    ledger/<model>/000001.json, 000002.json, …     the champion moved

The state is a fold of the records: the last entry of the ledger is the champion, the last registration of a run key is
its version. MLflow shows the same and decides nothing: tags are not unique there and the last writer of an alias wins.
The records name their packages by pinned URI, which is also what keeps those from eviction.

A run key has one version. When a task is cleared and its package differs from the one it registered (or its version
was deleted in MLflow), a second record follows the first, its version *supersedes* the first one's, and from then on
it is the version of that run key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from lepton_airflow.contract import Window, canonical_json, split_pin
from lepton_airflow.errors import BadConfiguration, IntegrityError
from lepton_airflow.store.files import Store


@dataclass(frozen=True)
class Registration:
    """One package that became a version of a model.

    :ivar package: pinned URI of the model package.
    :ivar sequence: 1 for the first registration of this run key, 2 for the one that superseded it, …
    :ivar window: the data window of the run, ``{"start", "end"}``, or None.
    :ivar alias: the alias that this version asked for.
    """

    name: str
    version: int
    package: str
    run_key: str
    sequence: int
    mlflow_run_id: str
    alias: str | None = None
    window: dict[str, str] | None = None
    supersedes: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    created: str = ""

    @property
    def sha256(self) -> str:
        """The digest of the package."""
        return split_pin(self.package)[1] or ""


@dataclass(frozen=True)
class LedgerEntry:
    """One move of the champion.

    :ivar action: ``bootstrap``, ``promote`` or ``rollback``.
    :ivar package: pinned URI of the champion's package.
    :ivar previous: the version that was champion before, None after a bootstrap.
    :ivar evidence: pinned URI of what the decision rests on.
    """

    name: str
    sequence: int
    action: str
    version: int
    package: str
    previous: int | None
    run_key: str
    sentence: str
    window: dict[str, str] | None = None
    evidence: str | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    decided: str = ""

    @property
    def sha256(self) -> str:
        """The digest of the champion's package."""
        return split_pin(self.package)[1] or ""


def check_model_name(name: str) -> None:
    """Refuse a name that MLflow or a path would refuse."""
    if not name.strip() or re.search(r"[/:\\\x00-\x1f]", name) or name.startswith("."):
        raise BadConfiguration(
            f"name={name!r} cannot name a model: expected text without '/', ':' or '\\' that does not start with '.'."
        )


def registrations(store: Store, name: str) -> list[Registration]:
    """All registrations of a model, oldest version first."""
    found = _registrations(store, f"registrations/{name}")
    return sorted(found, key=lambda r: (r.version, r.created, r.sequence))


def registration_of(store: Store, name: str, run_key: str) -> Registration | None:
    """What a run key registered last, or None."""
    found = _registrations(store, f"registrations/{name}/{run_key}")
    return max(found, key=lambda r: r.sequence, default=None)


def find_version(store: Store, name: str, version: int | None) -> Registration:
    """The registration of a version, or with None that of the current candidate; raises BadConfiguration."""
    known = registrations(store, name)
    if not known:
        raise BadConfiguration(
            f"no version of model {name!r} is registered in {store.root}: run RegisterModel before, with the same "
            "name and store."
        )
    if version is None:
        version = alias_targets(known).get("candidate", known[-1].version)
    matching = [r for r in known if r.version == version]
    if not matching:
        raise BadConfiguration(
            f"model {name!r} has no version {version} in {store.root}; known: "
            f"{', '.join(str(r.version) for r in known[-10:])}. Pass register.output['version']."
        )
    return matching[-1]


def record_registration(store: Store, registration: Registration) -> bool:
    """Make a registration the next one of its run key; False when somebody else made that one."""
    key = f"registrations/{registration.name}/{registration.run_key}/{registration.sequence:06d}.json"
    return store.create_exclusive(key, canonical_json(asdict(registration)).encode())


def alias_targets(known: Iterable[Registration]) -> dict[str, int]:
    """Which version each alias stands for: the newest one that asked for it, but never one of older data.

    A backfill registers past months in any order; it must not turn ``candidate`` back to an old window.
    """
    current = {r.run_key: r for r in sorted(known, key=lambda r: r.sequence)}  # without those superseded
    targets: dict[str, Registration] = {}
    for registration in sorted(current.values(), key=lambda r: r.version):
        if registration.alias is None:
            continue
        before = targets.get(registration.alias)
        if before is None or not is_newer(before.window, registration.window):
            targets[registration.alias] = registration
    return {alias: registration.version for alias, registration in targets.items()}


def is_newer(window: dict[str, str] | None, other: dict[str, str] | None) -> bool:
    """Whether a data window ends after another one; False when either is not known."""
    return bool(window and other) and _instant(window["end"]) > _instant(other["end"])  # type: ignore[index]


def as_window(window: Window | dict[str, str] | None) -> dict[str, str] | None:
    """A window as it stands in records."""
    return {"start": window.start, "end": window.end} if isinstance(window, Window) else window


class Ledger:
    """The moves of one model's champion, in order."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name

    def entries(self) -> list[LedgerEntry]:
        """All moves, the first one first; raises IntegrityError when one of them is gone."""
        listed = max((int(key[-11:-5]) for key in self.store.keys(f"ledger/{self.name}")), default=0)
        found: list[LedgerEntry] = []
        while True:
            key = self._key(len(found) + 1)
            text = self.store.read(key)
            if text is not None:
                found.append(_parse(key, text, LedgerEntry))
            elif len(found) >= listed:
                return found
            else:
                raise IntegrityError(
                    f"record {key} is missing, later ones exist: restore it from a backup of the store."
                )

    def append(self, entry: LedgerEntry) -> bool:
        """Write a move; False when another one took its number, so that the caller looks again and decides anew."""
        return self.store.create_exclusive(self._key(entry.sequence), canonical_json(asdict(entry)).encode())

    def _key(self, sequence: int) -> str:
        return f"ledger/{self.name}/{sequence:06d}.json"


def _registrations(store: Store, prefix: str) -> list[Registration]:
    return [
        _parse(key, text, Registration) for key in store.keys(prefix) if (text := store.read(key)) is not None
    ]


_T = TypeVar("_T", Registration, LedgerEntry)


def _parse(key: str, text: bytes, kind: type[_T]) -> _T:
    known = {f.name for f in fields(kind)}
    try:
        return kind(**{k: v for k, v in json.loads(text).items() if k in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"record {key} is damaged ({error}): restore it from a backup of the store."
        ) from None


def _instant(text: str) -> float:
    from datetime import UTC, datetime

    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
