"""Registrations and the champion's ledger, as the store alone decides them."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from lepton_airflow.errors import BadConfiguration, IntegrityError
from lepton_airflow.registry.ledger import (
    Ledger,
    LedgerEntry,
    Registration,
    Registrations,
    alias_targets,
    champion_before,
    check_model_name,
    find_version,
    is_newer,
    models_with_champion,
    registrations,
)
from lepton_airflow.store import Store
from lepton_airflow.testing.local_s3 import LocalS3

PACKAGE = "file:///store/artifacts/aa/model@sha256:" + "a" * 64


@pytest.fixture
def store_on_s3() -> Iterator[tuple[LocalS3, Store]]:
    with LocalS3() as s3:
        yield s3, s3.store("models")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def registration(version: int, key: str = "", end: str | None = None, **fields: object) -> Registration:
    window = {"start": "2013-01-01", "end": end} if end else None
    base = Registration("late", version, PACKAGE, key or f"run-{version}", "mlflow-run", "candidate", window)
    return replace(base, **fields)  # type: ignore[arg-type]


def entry(sequence: int, version: int, previous: int | None = None) -> LedgerEntry:
    return LedgerEntry(
        "late", sequence, "promote", version, PACKAGE, previous, f"run-{version}", "promote: better."
    )


def register(store: Store, *made: Registration) -> Registrations:
    """Register one after the other, each on a fresh look."""
    log = Registrations(store, "late")
    for one in made:
        assert log.append_after(log.newest(), one)
    return log


def versions(targets: dict[str, dict[str, object]]) -> dict[str, object]:
    return {alias: target["version"] for alias, target in targets.items()}


def test_of_two_who_saw_the_same_one_registers(store: Store) -> None:
    log = register(store)
    assert log.append_after(None, registration(1, "run"))
    assert not log.append_after(None, registration(2, "run"))
    found = log.of_run("run")
    assert found is not None
    assert (found.version, found.sequence, found.alias_versions) == (1, 1, {"candidate": 1})
    assert log.of_run("another run") is None
    assert registration(1).sha256 == "a" * 64


def test_the_last_registration_of_a_run_key_counts(store: Store) -> None:
    log = register(store, registration(1, "run"), registration(2), registration(3, "run", supersedes=1))
    current = log.of_run("run")
    assert current is not None
    assert current.version == 3
    assert [r.version for r in registrations(store, "late")] == [1, 2, 3]
    known = [registration(9, "run", sequence=1), registration(3, "run", sequence=2)]
    assert versions(alias_targets(known)) == {"candidate": 3}


@pytest.mark.parametrize("seed", range(30))
def test_the_newest_registration_knows_what_all_of_them_say(store: Store, seed: int) -> None:
    """Runs that are cleared, versions that come out of order, other data windows, aliases given up."""
    draw = random.Random(seed)
    log = register(store)
    versions_left = sorted(range(1, 25), key=lambda version: version + draw.uniform(0, 3))
    for version in versions_left[:8]:
        key = draw.choice(["", "", "a", "b"])
        end = draw.choice([None, "2013-04-01", "2013-05-01", "2013-06-01"])
        newest, before = log.newest(), log.of_run(key) if key else None
        alias = draw.choice([None, "candidate", "candidate", "challenger"])
        made = registration(version, key, end, alias=alias, supersedes=before and before.version)
        assert log.append_after(newest, made)
        state = log.newest()
        assert state is not None
        assert state.aliases == alias_targets(log.entries())
        assert state.highest == max(r.version for r in log.entries())


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
    assert versions(alias_targets(reversed(known))) == {"candidate": expected}


def test_each_alias_is_its_own(store: Store) -> None:
    known = [registration(1), registration(2, alias="challenger"), registration(3, alias=None)]
    assert versions(alias_targets(known)) == {"candidate": 1, "challenger": 2}


def test_versions_are_found_and_unknown_ones_named(store: Store) -> None:
    with pytest.raises(BadConfiguration, match="no version of model 'late' is registered in file://"):
        find_version(store, "late", 1)
    register(store, registration(4), registration(5, alias=None))
    assert find_version(store, "late", 4).version == 4
    assert find_version(store, "late", None).version == 4  # by the alias candidate
    with pytest.raises(BadConfiguration, match=r"has no version 6 in .*; known: 4, 5"):
        find_version(store, "late", 6)


def test_without_a_candidate_the_highest_version_is_meant(store: Store) -> None:
    register(store, registration(2, alias=None), registration(5, alias="other"), registration(3, alias=None))
    assert find_version(store, "late", None).version == 5


def test_what_is_known_of_a_model_costs_few_requests(store_on_s3: tuple[LocalS3, Store]) -> None:
    s3, store = store_on_s3
    register(store, *(registration(number) for number in range(1, 6)))
    assert Ledger(store, "late").append(entry(1, 1))
    for call, limit in (
        (lambda: find_version(store, "late", None), 5),
        (lambda: find_version(store, "late", 3), 6),
        (lambda: Registrations(store, "late").of_run("run-2"), 2),
        (lambda: Ledger(store, "late").newest(), 4),
    ):
        assert s3.count(call) <= limit


def test_the_models_with_a_champion_are_named(store: Store) -> None:
    assert models_with_champion(store) == []
    Ledger(store, "late").append(entry(1, 1))
    Ledger(store, "Verspätete Flüge").append(entry(1, 1))
    assert models_with_champion(store) == ["Verspätete Flüge", "late"]


def test_windows_are_compared_as_instants() -> None:
    berlin = {"start": "2013-01-01", "end": "2013-05-01T00:00:00+02:00"}
    utc = {"start": "2013-01-01", "end": "2013-05-01"}
    assert is_newer(utc, berlin)
    assert not is_newer(berlin, utc)
    assert not is_newer(None, utc)
    assert not is_newer(utc, None)


def test_a_damaged_record_is_named(store: Store) -> None:
    store.write("records/ledger/late/000/000001.json", b'{"name": "late"')
    with pytest.raises(IntegrityError, match=r"records/ledger/late/000/000001\.json is damaged"):
        Ledger(store, "late").entries()


def test_a_missing_move_is_named(store: Store) -> None:
    ledger = Ledger(store, "late")
    for number in (1, 2, 3):
        assert ledger.append(entry(number, number))
    store.delete("records/ledger/late/000/000002.json")
    with pytest.raises(IntegrityError, match=r"records/ledger/late/000/000002\.json is missing"):
        ledger.entries()


def test_a_record_of_a_later_version_of_this_package_is_read(store: Store) -> None:
    import json
    from dataclasses import asdict

    store.write(
        "records/ledger/late/000/000001.json", json.dumps(asdict(entry(1, 1)) | {"canary": True}).encode()
    )
    assert Ledger(store, "late").entries() == [entry(1, 1)]


def line(*moves: int) -> list[LedgerEntry]:
    """A ledger of these versions, each of a package of its own; a negative one was brought back by a rollback."""
    found: list[LedgerEntry] = []
    for version in moves:
        package = f"file:///store/model@sha256:{abs(version):064}"
        made = replace(entry(len(found) + 1, abs(version)), package=package, run_key=f"run-{len(found)}")
        if version < 0:
            made = replace(made, action="rollback", rolled_back=found[-1].sha256, previous=found[-1].version)
        found.append(made)
    return found


@pytest.mark.parametrize(
    ("moves", "before"),
    [
        ([], None),
        ([1], None),
        ([1, 2], 1),
        ([1, 2, 3, -2], 1),
        ([1, 2, 3, -2, -1], None),
        ([1, 2, 3, -1], None),  # to a version that was named: what came after it is not before it
        ([1, 2, -1, 3], 1),
        ([1, 2, -1, 3, 4], 3),
        ([1, 2, -1, 3, 2, 4], 2),  # promoted again, it is as good as any
        ([1, 2, 3, -2, 3, -2], 1),
        ([1, 2, 3, -2, -3], 1),  # named again: now the other one is the bad one
        ([1, 2, 1, 3, -1], 2),  # the later of two times
        ([1, 2, 1], 2),
    ],
)
def test_the_champion_before(store: Store, moves: list[int], before: int | None) -> None:
    found = champion_before(line(*moves))
    assert (found and found.version) == before
    ledger = Ledger(store, "late")
    assert all(ledger.append(move) for move in line(*moves))
    for version in range(1, 5):
        taken_out = ledger.taken_out(line(version)[0].sha256)
        last = max((n for n, m in enumerate(moves) if abs(m) == version), default=0)
        assert bool(taken_out) == (last + 1 < len(moves) and moves[last + 1] < 0)


def test_who_was_taken_out_is_told_without_reading_all(store_on_s3: tuple[LocalS3, Store]) -> None:
    s3, store = store_on_s3
    ledger = Ledger(store, "taken out")
    for move in line(*range(1, 31), -29):
        assert ledger.append(move)
    assert s3.count(lambda: ledger.taken_out(line(5)[0].sha256)) <= 3
    assert s3.count(lambda: ledger.taken_out(line(30)[0].sha256)) <= 6


def append_ten(root: str, process: int) -> list[int]:
    """Append ten moves, looking again whenever another process was first; returns the versions moved to."""
    ledger = Ledger(Store(root), "late")
    mine = [100 * process + i for i in range(10)]
    for version in mine:
        while True:
            last = ledger.newest()
            if ledger.append(entry(last.sequence + 1, version, last.version) if last else entry(1, version)):
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
