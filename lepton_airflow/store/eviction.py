"""Make room in a store: mark what is still named, sweep the rest.

An artifact stays as long as one of these names it:

- anything under ``records/``, where :class:`~lepton_airflow.store.records.Log` writes whatever it is used for;
- a cache entry that stays;
- a receipt that stays, as the next task may be about to read what it names.

Eviction knows no kind of record. So a new kind keeps its artifacts without being entered here, also from a process that has
never imported the module that writes it.

The age of everything comes from the listings. Only what may name an artifact is read, 16 at a time, and on an object store only
what was written since the last eviction. Each thing is listed once more just before it is removed, as it may have been written
again in the meantime.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lepton_airflow.contract import digest_of
from lepton_airflow.errors import IntegrityError
from lepton_airflow.store.files import Listed, Store, at_once, is_temporary, sweep_mark
from lepton_airflow.store.records import ROOT, refuse_old_layout

# What is younger always stays: a task may be about to name the artifact, to read its receipt, or to resume.
GRACE_S = 3600.0
_INDEX = "index/names.json"
_RECORD = re.compile(rf"{ROOT}/.*/\d+/\d+\.json")  # of a log; what else lies there may be anything


def evict(store: Store, *, older_than_s: float, stage: str | None = None) -> tuple[int, int]:
    """Remove cache entries, receipts and checkpoints of at least that age, then the artifacts that nothing names any more.

    Artifacts, receipts and checkpoints younger than an hour stay in any case. What killed writers have left half written goes
    after an hour. With ``stage``, only that stage's entries, receipts and checkpoints go.
    Returns how many cache entries and how many bytes were removed.
    """
    refuse_old_layout(store)
    now = time.time()
    young = now - GRACE_S
    if store.is_local:  # the marks of evictions that were killed
        store.delete_files([e.key for e in _files(store.listing("sweeping")) if e.modified <= young])
    cache = store.listing("cache")
    dropped = {
        entry.key
        for entry in _files(cache)
        if entry.modified <= now - older_than_s and stage in (None, entry.key.split("/")[1])
    }
    store.delete_files(sorted(dropped))
    # List receipts only after the entries are deleted: a task that had just read a deleted entry has probably written its
    # receipt by now, and that names the same artifacts.
    prefixes = ("receipts", "checkpoints", ROOT, "artifacts")
    receipts, checkpoints, records, artifacts = at_once(store.listing, prefixes)
    removed = _remove_runs(store, receipts, checkpoints, min(now - older_than_s, young), stage)
    naming = [
        e for e in _files([*cache, *receipts, *records]) if e.key not in dropped and e.key not in removed
    ]
    named = _named(store, naming, young)
    unnamed = [key for key in _old(_by_folder(artifacts), young) if key.partition("/")[2] not in named]
    removed |= _remove(store, unnamed, young)
    elsewhere = at_once(store.listing, _other_folders(store, ("cache", *prefixes)))
    listed = [
        *cache,
        *receipts,
        *checkpoints,
        *records,
        *artifacts,
        *(e for found in elsewhere for e in found),
    ]
    broken_off = _old(_temporaries(listed), young)
    removed |= _remove(store, broken_off, young)
    return len(dropped), sum(removed.values())


def _remove_runs(
    store: Store, receipts: Sequence[Listed], checkpoints: Sequence[Listed], before: float, stage: str | None
) -> dict[str, int]:
    """Remove the receipts of runs that ended before a time, and checkpoints that no try has resumed from since then."""
    keys = [
        *_old(_by_folder(checkpoints), before),
        *(e.key for e in _files(receipts) if e.modified <= before),
    ]
    if stage is not None:
        run_keys = [key.split("/")[1].removesuffix(".json") for key in keys]
        found = at_once(store.receipt, run_keys)
        keys = [key for key, r in zip(keys, found, strict=True) if r is not None and r.stage == stage]
    return _remove(store, keys, before)


def _remove(store: Store, keys: Iterable[str], before: float) -> dict[str, int]:
    """Remove files and folders that were not written since that time; returns the bytes of each that was removed."""

    def remove(key: str) -> tuple[str, int] | None:
        with _marked(store, key) as alone:
            found = store.listing(key) if alone else []
            if not found or max(e.modified for e in found) > before:
                return None
            if [e.key for e in found] == [key]:
                store.delete_files([key])
            else:
                store.delete(key)
        return key, sum(max(e.bytes, 0) for e in found)

    return dict(done for done in at_once(remove, keys) if done is not None)


@contextmanager
def _marked(store: Store, key: str) -> Iterator[bool]:
    """Let whoever writes this key see that it may go, and write it again then; gives whether no other eviction is at it.

    On a local disk, where a look costs nothing. An object store has only the moment between listing and removing.
    """
    if (
        not store.is_local or key.count("/") > 1
    ):  # deeper lies only what was broken off, which nobody writes again
        yield True
        return
    mark = sweep_mark(key)
    alone = store.create_exclusive(mark, b"")
    try:
        yield alone
    finally:
        if alone:
            store.delete_files([mark])


# -- what is named -------------------------------------------------------------------------------------------------------


def _named(store: Store, naming: Sequence[Listed], settled: float) -> set[str]:
    """The folders of ``artifacts/`` that these files name.

    An object whose ETag and time of writing are those in the index is not read again. The index is this function's own
    cache: without it everything is read. An object is entered only when it was written long before it was listed. If it is
    overwritten between the listing and the read, its time of writing is another one from then on, and it is read again.
    """
    index = _read_index(store)
    known = {
        e.key: index[e.key] for e in naming if e.etag and index.get(e.key, [])[:2] == [e.etag, e.modified]
    }
    for e in naming:
        if not e.bytes and _RECORD.fullmatch(e.key):
            raise _damaged(e.key)
    unread = [e for e in naming if e.key not in known and e.bytes]
    read = dict(
        zip(
            (e.key for e in unread),
            at_once(lambda e: _names_of(store, e.key), unread),
            strict=True,
        )
    )
    settled_now = {
        e.key: [e.etag, e.modified, sorted(read[e.key])] for e in unread if e.etag and e.modified <= settled
    }
    if settled_now or len(known) < len(index):
        _write_index(store, known | settled_now)
    return {name for *_, names in known.values() for name in names}.union(*read.values())


def _names_of(store: Store, key: str) -> set[str]:
    """What a file names; raises IntegrityError for a record that cannot be read: nobody knows what it would keep."""
    text = store.read(key) or b""
    if text and _RECORD.fullmatch(key):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            raise _damaged(key) from None
    return names_in(text)


def _damaged(key: str) -> IntegrityError:
    return IntegrityError(
        f"{key} is damaged, and so nobody knows which artifacts it keeps: none is removed. Restore it from a backup of the store, or "
        "delete it if what it decided may be forgotten."
    )


def names_in(text: bytes) -> set[str]:
    """What may name a folder of ``artifacts/`` in a text: of every run of 32 or more hex digits, its first 32 and its last 32.

    A digest begins with the folder's name; in an encoded URI, the ``2f`` of ``%2f`` stands before it.
    """
    runs = re.findall(rb"[0-9a-f]{32,}", text)
    return {part.decode() for run in runs for part in (run[:32], run[-32:])}


def _read_index(store: Store) -> dict[str, list[Any]]:
    try:
        index = json.loads(store.read(_INDEX) or b"{}")
        read: dict[str, list[Any]] = index.get("read", {})
        return read if index.get("sha256") == digest_of(read) else {}
    except (ValueError, AttributeError, TypeError):
        return {}


def _write_index(store: Store, read: dict[str, list[Any]]) -> None:
    store.write(_INDEX, json.dumps({"sha256": digest_of(read), "read": read}).encode())


# -- listings ------------------------------------------------------------------------------------------------------------


def _files(listed: Iterable[Listed]) -> list[Listed]:
    return [e for e in listed if not e.key.endswith("/") and not is_temporary(e.key)]


def _by_folder(listed: Iterable[Listed]) -> dict[str, float]:
    """The folders of a prefix, with the time at which each, or anything in it, was last written.

    The folder itself counts, as a writer may have made it and not yet the file in it.
    """
    newest: dict[str, float] = {}
    for e in listed:
        prefix, _, rest = e.key.partition("/")
        if rest:
            folder = f"{prefix}/{rest.partition('/')[0]}"
            newest[folder] = max(newest.get(folder, 0.0), e.modified)
    return newest


def _temporaries(listed: Iterable[Listed]) -> dict[str, float]:
    """What writers have begun under a temporary name, with the time of the last write to each.

    The files of an artifact may have any name, so in ``artifacts/`` only what lies directly in a folder counts.
    """
    newest: dict[str, float] = {}
    for e in listed:
        if "/.tmp-" not in e.key:
            continue
        parts = e.key.rstrip("/").split("/")
        depth = 3 if parts[0] == "artifacts" else len(parts)
        key = "/".join(parts[:depth])
        if len(parts) >= depth and re.fullmatch(r"\.tmp-[0-9a-f]{16}", parts[depth - 1]):
            newest[key] = max(newest.get(key, 0.0), e.modified)
    return newest


def _other_folders(store: Store, known: Sequence[str]) -> list[str]:
    """The further folders of a store on a local disk; on object stores nothing is half written."""
    names = store.children("") if store.is_local else []
    return [name[:-1] for name in names if name.endswith("/") and name[:-1] not in known]


def _old(written: dict[str, float], before: float) -> list[str]:
    return [key for key, modified in written.items() if modified <= before]
