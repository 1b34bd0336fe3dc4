"""Registrations and the champion's ledger, as the store alone decides them."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from lepton_airflow.errors import BadConfiguration, IntegrityError
from lepton_airflow.registry.ledger import (
    Ledger,
    LedgerEntry,
    Registration,
    alias_targets,
    check_model_name,
    find_version,
    is_newer,
    record_registration,
    registration_of,
    registrations,
)
from lepton_airflow.store import Store

PACKAGE = "file:///store/artifacts/aa/model@sha256:" + "a" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def registration(version: int, key: str = "", end: str | None = None, **fields: object) -> Registration:
    window = {"start": "2013-01-01", "end": end} if end else None
    base = Registration(
        "late", version, PACKAGE, key or f"run-{version}", 1, "mlflow-run", "candidate", window
    )
    return replace(base, **fields)  # type: ignore[arg-type]


def entry(sequence: int, version: int, previous: int | None = None) -> LedgerEntry:
    return LedgerEntry(
        "late", sequence, "promote", version, PACKAGE, previous, f"run-{version}", "promote: better."
    )


def test_a_registration_is_made_once(store: Store) -> None:
    assert record_registration(store, registration(1, "run"))
    assert not record_registration(store, registration(2, "run"))
    assert registration_of(store, "late", "run") == registration(1, "run")
    assert registration_of(store, "late", "another run") is None
    assert registration(1).sha256 == "a" * 64


def test_the_last_registration_of_a_run_key_counts(store: Store) -> None:
    record_registration(store, registration(1, "run"))
    record_registration(store, registration(2))
    record_registration(store, registration(3, "run", sequence=2, supersedes=1))
    current = registration_of(store, "late", "run")
    assert current is not None
    assert current.version == 3
    assert [r.version for r in registrations(store, "late")] == [1, 2, 3]
    assert alias_targets([registration(9, "run"), registration(3, "run", sequence=2)]) == {"candidate": 3}


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (["2013-04-01", "2013-05-01", "2013-06-01"], 3),
        (["2013-06-01", "2013-05-01", "2013-04-01"], 1),
        (["2013-05-01", "2013-05-01"], 2),  # the same data again: the newer version
        ([None, None], 2),
        (["2013-05-01", None, "2013-04-01"], 3),  # a version without a window is taken by its number
    ],
)
def test_an_alias_stands_for_the_newest_version_but_never_for_older_data(ends, expected) -> None:
    known = [registration(number, end=end) for number, end in enumerate(ends, 1)]
    assert alias_targets(reversed(known)) == {"candidate": expected}


def test_each_alias_is_its_own(store: Store) -> None:
    known = [registration(1), registration(2, alias="challenger"), registration(3, alias=None)]
    assert alias_targets(known) == {"candidate": 1, "challenger": 2}


def test_versions_are_found_and_unknown_ones_named(store: Store) -> None:
    with pytest.raises(BadConfiguration, match="no version of model 'late' is registered in file://"):
        find_version(store, "late", 1)
    record_registration(store, registration(4))
    record_registration(store, registration(5, alias=None))
    assert find_version(store, "late", 4).version == 4
    assert find_version(store, "late", None).version == 4  # by the alias candidate
    with pytest.raises(BadConfiguration, match=r"has no version 6 in .*; known: 4, 5"):
        find_version(store, "late", 6)


def test_windows_are_compared_as_instants() -> None:
    berlin = {"start": "2013-01-01", "end": "2013-05-01T00:00:00+02:00"}
    utc = {"start": "2013-01-01", "end": "2013-05-01"}
    assert is_newer(utc, berlin)
    assert not is_newer(berlin, utc)
    assert not is_newer(None, utc)
    assert not is_newer(utc, None)


def test_a_damaged_record_is_named(store: Store) -> None:
    store.write("ledger/late/000001.json", b'{"name": "late"')
    with pytest.raises(IntegrityError, match=r"ledger/late/000001\.json is damaged"):
        Ledger(store, "late").entries()


def test_a_missing_move_is_named(store: Store) -> None:
    ledger = Ledger(store, "late")
    for number in (1, 2, 3):
        assert ledger.append(entry(number, number))
    store.delete("ledger/late/000002.json")
    with pytest.raises(IntegrityError, match=r"ledger/late/000002\.json is missing"):
        ledger.entries()


def test_a_record_of_a_later_version_of_this_package_is_read(store: Store) -> None:
    import json
    from dataclasses import asdict

    store.write("ledger/late/000001.json", json.dumps(asdict(entry(1, 1)) | {"canary": True}).encode())
    assert Ledger(store, "late").entries() == [entry(1, 1)]


def append_ten(root: str, process: int) -> list[int]:
    """Append ten moves, looking again whenever another process was first; returns the versions moved to."""
    ledger = Ledger(Store(root), "late")
    mine = [100 * process + i for i in range(10)]
    for version in mine:
        while True:
            seen = ledger.entries()
            if ledger.append(entry(len(seen) + 1, version, seen[-1].version if seen else None)):
                break
    return mine


def test_moves_of_six_processes_make_one_chain(store: Store, tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    with ProcessPoolExecutor(6, mp_context=multiprocessing.get_context("fork")) as pool:
        moved = [
            version
            for done in [pool.submit(append_ten, root, i) for i in range(6)]
            for version in done.result()
        ]
    entries = Ledger(store, "late").entries()
    assert sorted(e.version for e in entries) == sorted(moved)
    assert [e.sequence for e in entries] == list(range(1, 61))
    assert [e.previous for e in entries[1:]] == [e.version for e in entries[:-1]]


@pytest.mark.parametrize("name", ["", "  ", "a/b", "a:b", "a\\b", "../up", ".hidden", "a\nb"])
def test_names_that_mlflow_or_a_path_would_refuse(name: str) -> None:
    with pytest.raises(BadConfiguration, match="cannot name a model"):
        check_model_name(name)


def test_names_with_spaces_and_umlauts_are_fine() -> None:
    check_model_name("Verspätete Flüge 2013.v2")
