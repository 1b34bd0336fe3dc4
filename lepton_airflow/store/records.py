"""Numbered, append-only logs of records: who decided what, in which order, and what holds now.

Layout::

    records/<log>/000/000001.json … 000999.json     records 1 to 999
    records/<log>/001/001000.json … 001999.json     the next thousand, and so on: each is a segment
    records/<log>/by/<field>/<value>/000007         record 7 may have this value in this field

A record is made once, by :meth:`~lepton_airflow.store.files.Store.create_exclusive`, and never changed. It carries what follows
from all before it (who was champion, what each alias means), so the newest one is the state. On S3 that takes four requests
however long the log is: the list of the segments, the list of the newest one, the record, and a look for the next one. Older
records are read for the history only, 16 at a time.

A record that is lost is found: in the newest segment by whoever asks for the state, in an older one by whoever asks for the
history. The state does not depend on older records, so their loss does not change it.

Everything under ``records/`` keeps the artifacts that it names from :mod:`~lepton_airflow.store.eviction`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from lepton_airflow.contract import canonical_json
from lepton_airflow.errors import BadConfiguration, IntegrityError
from lepton_airflow.store.files import Store, at_once

ROOT = "records"
_SEGMENT = 1000  # records: as many keys as S3 lists in one request
_BEFORE_0_1 = ("endpoints/", "ledger/", "registrations/")  # where records lay before the first release


class Record(Protocol):
    """A frozen dataclass of JSON values that knows its number in its log, from 1 on."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def sequence(self) -> int:
        """The number of this record in its log."""
        ...


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


_R = TypeVar("_R", bound=Record)
_D = TypeVar("_D", bound=_Dataclass)


class Log(Generic[_R]):
    """A log of records of one kind.

    To append: look at :meth:`newest`, decide, give the record the next number, :meth:`append`. Whoever appended in between
    has taken the number, so what was decided on an old state is never written.

    :param name: where it lies under ``records/``.
    :param kind: the dataclass of its records. It may get further fields with defaults; fields it does not know are passed over.
    :param find_by: fields by whose values, other than None, :meth:`find` finds records; each costs a request more to append.
    """

    def __init__(self, store: Store, name: str, kind: type[_R], find_by: Sequence[str] = ()) -> None:
        self.store = store
        self.name = name
        self._kind = kind
        self._find_by = find_by

    def newest(self) -> _R | None:
        """The last record, or None where there is none yet; raises IntegrityError when one of its segment is gone."""
        number = self._last()
        # A listing may be older than the newest record (NFS keeps it for seconds); a record that is read is not.
        later = self.after(number)
        if later:
            return later[-1]
        return self.existing(number) if number else None

    def highest(self) -> int:
        """The highest number of which there is a record, whatever is missing before it; 0 where there is none."""
        names = self.store.children(f"{ROOT}/{self.name}")
        for segment in sorted((int(n[:-1]) for n in names if re.fullmatch(r"\d{3,}/", n)), reverse=True):
            if numbers := self._numbers(segment):
                return numbers[-1]
        return 0

    def record(self, sequence: int) -> _R | None:
        """The record of that number, or None where there is none."""
        text = self.store.read(self._key(sequence))
        return parse(self._key(sequence), text, self._kind) if text is not None else None

    def existing(self, sequence: int) -> _R:
        """The record of that number; raises IntegrityError when it is gone."""
        record = self.record(sequence)
        if record is None:
            raise self._missing(sequence)
        return record

    def after(self, sequence: int) -> list[_R]:
        """The records after one number, oldest first. One request when there is none: for whoever follows the log."""
        found: list[_R] = []
        while (record := self.record(sequence + len(found) + 1)) is not None:
            found.append(record)
        return found

    def entries(self) -> list[_R]:
        """All records, the first one first; raises IntegrityError when one of them is gone."""
        segments = self._segments()
        numbers = [number for listed in at_once(self._numbers, segments) for number in listed]
        return at_once(self.existing, range(1, self._unbroken(numbers, 1, segments) + 1))

    def find(self, field: str, value: object) -> list[_R]:
        """The records with that value in one of the fields given as ``find_by``, oldest first."""
        # keys(), as children() of a folder that is not there lists all of its neighbours on S3.
        names = (key.rpartition("/")[2] for key in self.store.keys(self._mark(field, value)))
        numbers = sorted(int(name) for name in names if name.isdigit())
        found = at_once(self.record, numbers)
        if None in found:  # marked, and then the writer was killed; or the record is lost
            last = self._last()
            found = [
                self.existing(n) if r is None and n <= last else r
                for n, r in zip(numbers, found, strict=True)
            ]
        # A number that was marked may have been taken by another writer, whose record has another value.
        return [record for record in found if record is not None and getattr(record, field) == value]

    def append(self, record: _R) -> bool:
        """Write a record under its number; False when another writer took that, so that the caller decides again."""
        self.store.check_exclusive()
        # The marks come first: a writer that is killed in between leaves a mark too many, and never a record without one.
        for field in self._find_by:
            if (value := getattr(record, field)) is not None:
                self.store.write(f"{self._mark(field, value)}/{record.sequence:06d}", b"")
        return self.store.create_exclusive(self._key(record.sequence), to_json(record))

    def _last(self) -> int:
        """The highest number, 0 where there is none; raises IntegrityError when an earlier one of its segment is gone."""
        segments = self._segments()
        for segment in reversed(segments):
            numbers = self._numbers(segment)
            if numbers or segment == 0:  # none: a writer was killed when it had made the folder alone
                return self._unbroken(numbers, max(segment * _SEGMENT, 1), segments)
        return 0

    def _unbroken(self, numbers: Sequence[int], first: int, segments: Sequence[int]) -> int:
        """The last of the numbers that were listed; raises IntegrityError unless all from the first one on are there."""
        last = max(numbers, default=first - 1)
        # A segment is started only by a writer that has read the last record of the one before.
        last = max(last, (segments[-1] * _SEGMENT - 1) if segments else 0)
        for absent in sorted(set(range(first, last + 1)) - set(numbers)):
            # A listing that several requests made may lack a record that is there.
            if self.record(absent) is None:
                raise self._missing(absent)
        return last

    def _segments(self) -> list[int]:
        names = self.store.children(f"{ROOT}/{self.name}")
        segments = sorted(int(name[:-1]) for name in names if re.fullmatch(r"\d{3,}/", name))
        for expected, segment in enumerate(segments):
            if segment != expected:
                raise self._missing(max(expected * _SEGMENT, 1))
        if not segments and self.store.children(self.name):
            raise _old_layout(self.store, f"{self.name}/")
        return segments

    def _numbers(self, segment: int) -> list[int]:
        names = self.store.children(f"{ROOT}/{self.name}/{segment:03d}")
        return sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d{6,}\.json", name))

    def _missing(self, sequence: int) -> IntegrityError:
        return IntegrityError(
            f"record {self._key(sequence)} is missing, later ones exist: restore it from a backup of the store."
        )

    def _key(self, sequence: int) -> str:
        return f"{ROOT}/{self.name}/{sequence // _SEGMENT:03d}/{sequence:06d}.json"

    def _mark(self, field: str, value: object) -> str:
        return f"{ROOT}/{self.name}/by/{field}/{value}"


def to_json(record: Any) -> bytes:
    """A record as it is stored."""
    return canonical_json(asdict(record)).encode()


def parse(key: str, text: bytes, kind: type[_D]) -> _D:
    """The record that was read from a key; raises IntegrityError when it is none of that kind."""
    known = {f.name for f in fields(kind)}
    try:
        return kind(**{name: value for name, value in json.loads(text).items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"record {key} is damaged ({error}): restore it from a backup of the store."
        ) from None


def refuse_old_layout(store: Store) -> None:
    """Raise BadConfiguration when the store has records that lie as they did before the first release."""
    for name in store.children(""):
        if name in _BEFORE_0_1:
            raise _old_layout(store, name)


def _old_layout(store: Store, folder: str) -> BadConfiguration:
    return BadConfiguration(
        f"store {store.root} holds records in {folder}, where lepton_airflow wrote them before its first release and reads "
        "them no more: use a new store, and register, promote and deploy there again."
    )
