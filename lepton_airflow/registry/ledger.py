"""What was registered and what is champion, as the store decides it.

Two logs of records for each model (see :mod:`~lepton_airflow.store.records`)::

    records/registrations/<model>/…     this run's package is version N of the model
    records/ledger/<model>/…            the champion moved

The newest record of the ledger is the champion; the newest registration says what each alias means. MLflow shows the same
and decides nothing: tags are not unique there and the last writer of an alias wins. The records name their packages by
pinned URI, which also keeps those from eviction.

A run key has one version. When a task is cleared and its package differs from the one it registered (or its version
was deleted in MLflow), a second record follows, its version *supersedes* the first one's, and from then on it is the
version of that run key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lepton_airflow.contract import Window, split_pin
from lepton_airflow.errors import BadConfiguration
from lepton_airflow.store.files import Store, at_once
from lepton_airflow.store.records import ROOT, Log


@dataclass(frozen=True)
class Registration:
    """One package that became a version of a model.

    :ivar package: pinned URI of the model package.
    :ivar alias: the alias that this version asked for.
    :ivar window: the data window of the run, ``{"start", "end"}``, or None.
    :ivar supersedes: the version that this run key had before and that this one replaces.
    :ivar sequence: its number among the registrations of the model.
    :ivar aliases: what each alias means from here on, as ``{"version", "sequence", "window"}`` of a registration.
    :ivar highest: the highest version up to here.
    """

    name: str
    version: int
    package: str
    run_key: str
    mlflow_run_id: str
    alias: str | None = None
    window: dict[str, str] | None = None
    supersedes: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    sequence: int = 0
    aliases: dict[str, dict[str, Any]] = field(default_factory=dict)
    highest: int = 0

    @property
    def sha256(self) -> str:
        """The digest of the package."""
        return split_pin(self.package)[1] or ""

    @property
    def alias_versions(self) -> dict[str, int]:
        """The version that each alias means from here on."""
        return {alias: target["version"] for alias, target in self.aliases.items()}


@dataclass(frozen=True)
class LedgerEntry:
    """One move of the champion.

    :ivar action: ``bootstrap``, ``promote`` or ``rollback``.
    :ivar package: pinned URI of the champion's package.
    :ivar previous: the version that was champion before, None after a bootstrap.
    :ivar sentence: why.
    :ivar evidence: pinned URI of what the decision rests on.
    :ivar rolled_back: of a rollback: the digest of the package that it took out.
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
    rolled_back: str | None = None

    @property
    def sha256(self) -> str:
        """The digest of the champion's package."""
        return split_pin(self.package)[1] or ""


def check_model_name(name: str) -> None:
    """Raise BadConfiguration for a name that MLflow or a path cannot have."""
    if not name.strip() or re.search(r"[/:\\\x00-\x1f]", name) or name.startswith("."):
        raise BadConfiguration(
            f"name={name!r} cannot name a model: expected text without '/', ':' or '\\' that does not start with '.'."
        )


def check_alias(alias: str) -> None:
    """Raise BadConfiguration for an alias that MLflow does not take; it would say so only once the version is made."""
    if not re.fullmatch(r"[\w-]{1,255}", alias) or re.fullmatch(r"(?i)v\d+|latest", alias):
        raise BadConfiguration(
            f"alias={alias!r}: expected letters, digits, _ and -, at most 255, and neither 'latest' nor a version such as 'v1', "
            "which MLflow keeps for itself; None for no alias."
        )


class Registrations(Log[Registration]):
    """The registrations of one model, in the order in which they were made; the newest one knows the aliases."""

    def __init__(self, store: Store, name: str) -> None:
        super().__init__(store, f"registrations/{name}", Registration, find_by=("run_key", "version"))

    def of_run(self, run_key: str) -> Registration | None:
        """What a run key registered last, or None."""
        found = self.find("run_key", run_key)
        return found[-1] if found else None

    def append_after(self, newest: Registration | None, registration: Registration) -> Registration | None:
        """Register after the newest that the caller knows of; None when that is not the newest any more."""
        before = newest.sequence if newest else 0
        registration = replace(registration, sequence=before + 1)
        highest = newest.highest if newest else 0
        if registration.supersedes or registration.version < highest:
            # An alias may fall back to any earlier version when the one it meant is replaced, so all are looked through.
            aliases = alias_targets([*self.entries()[:before], registration])
        else:
            aliases = _with(newest.aliases if newest else {}, registration)
        registration = replace(registration, aliases=aliases, highest=max(highest, registration.version))
        return registration if self.append(registration) else None


def registrations(store: Store, name: str) -> list[Registration]:
    """All registrations of a model, oldest version first."""
    return sorted(Registrations(store, name).entries(), key=lambda r: (r.version, r.sequence))


def find_version(store: Store, name: str, version: int | None) -> Registration:
    """The registration of a version, or with None that of the current candidate; raises BadConfiguration."""
    log = Registrations(store, name)
    newest = log.newest()
    if newest is None:
        raise BadConfiguration(
            f"no version of model {name!r} is registered in {store.root}: run RegisterModel before, with the same "
            "name and store."
        )
    if version is None and "candidate" in newest.aliases:
        return log.existing(newest.aliases["candidate"]["sequence"])
    matching = log.find("version", newest.highest if version is None else version)
    if not matching:
        last = at_once(log.existing, range(max(newest.sequence - 9, 1), newest.sequence + 1))
        raise BadConfiguration(
            f"model {name!r} has no version {version} in {store.root}; known: "
            f"{', '.join(str(r.version) for r in last)}. Pass register.output['version']."
        )
    return matching[-1]


def alias_targets(known: Iterable[Registration]) -> dict[str, dict[str, Any]]:
    """What each alias means: the newest version that asked for it, but never one of older data.

    A backfill registers past months in any order; it must not turn ``candidate`` back to an old window.
    """
    current = {r.run_key: r for r in sorted(known, key=lambda r: r.sequence)}  # without those superseded
    targets: dict[str, dict[str, Any]] = {}
    for registration in sorted(current.values(), key=lambda r: r.version):
        targets = _with(targets, registration)
    return targets


def _with(targets: dict[str, dict[str, Any]], registration: Registration) -> dict[str, dict[str, Any]]:
    """What each alias means once this version is registered, the highest so far."""
    alias = registration.alias
    if alias is None or (alias in targets and is_newer(targets[alias]["window"], registration.window)):
        return targets
    target = {n: getattr(registration, n) for n in ("version", "sequence", "window")}
    return targets | {alias: target}


def is_newer(window: dict[str, str] | None, other: dict[str, str] | None) -> bool:
    """Whether a data window ends after another one; False when either is not known."""
    return bool(window and other) and _instant(window["end"]) > _instant(other["end"])  # type: ignore[index]


def as_window(window: Window | dict[str, str] | None) -> dict[str, str] | None:
    """A window as it stands in records."""
    return {"start": window.start, "end": window.end} if isinstance(window, Window) else window


class Ledger(Log[LedgerEntry]):
    """The moves of one model's champion, in order; the newest one says who is champion."""

    def __init__(self, store: Store, name: str) -> None:
        super().__init__(store, f"ledger/{name}", LedgerEntry, find_by=("run_key", "rolled_back"))

    def taken_out(self, sha256: str) -> LedgerEntry | None:
        """The rollback that took this package out, unless it became champion again since."""
        found = self.find("rolled_back", sha256)
        if not found or any(move.sha256 == sha256 for move in self.after(found[-1].sequence)):
            return None
        return found[-1]


def champion_before(moves: Sequence[LedgerEntry]) -> LedgerEntry | None:
    """The move that made the champion before the present one; None when there is none to go back to.

    A rollback cuts off what came after the champion that it brought back. A package that one took out is passed over until
    it becomes champion again.

    :param moves: the whole ledger, oldest move first.
    """
    # The present champion is the last; before each stands the one that it followed.
    line: list[LedgerEntry] = []
    taken_out: set[str] = set()
    for move in moves:
        if move.rolled_back:
            taken_out.add(move.rolled_back)
            places = [place for place, before in enumerate(line) if before.version == move.version]
            line = line[: places[-1]] if places else line
        taken_out.discard(move.sha256)
        line.append(move)
    passed_over = taken_out | {move.sha256 for move in line[-1:]}
    return next((move for move in reversed(line) if move.sha256 not in passed_over), None)


def models_with_champion(store: Store) -> list[str]:
    """The names of the models that have a champion."""
    return [name.rstrip("/") for name in store.children(f"{ROOT}/ledger")]


def _instant(text: str) -> float:
    from datetime import UTC, datetime

    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
