"""The log of records: what the newest one tells, what is found missing, who wins, and what that costs on S3."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lepton_airflow.connections import Connection
from lepton_airflow.errors import BadConfiguration, IntegrityError
from lepton_airflow.store import Store
from lepton_airflow.store.records import Log, refuse_old_layout, to_json
from lepton_airflow.testing.local_s3 import LocalS3


@dataclass(frozen=True)
class Move:
    sequence: int
    who: str
    note: dict[str, int] = field(default_factory=dict)


def log_of(store: Store, name: str = "moves/späte Flüge") -> Log[Move]:
    return Log(store, name, Move, find_by=("who",))


def key(sequence: int) -> str:
    return f"records/moves/späte Flüge/{sequence // 1000:03d}/{sequence:06d}.json"


def fill(store: Store, last: int, first: int = 1, s3: LocalS3 | None = None) -> Log[Move]:
    """A log as its writers have left it, without waiting for each of them."""
    records = {key(n): to_json(Move(n, f"run-{n}")) for n in range(first, last + 1)}
    if s3:
        s3.put(store, records)
        return log_of(store)
    for name, content in records.items():
        path = Path(store.root.removeprefix("file://"), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return log_of(store)


def test_records_come_back_in_order(exact_store: Store) -> None:
    log = log_of(exact_store)
    assert log.newest() is None
    assert log.entries() == log.after(0) == log.find("who", "anybody") == []
    moves = [Move(n, f"run-{n % 2}", {"n": n}) for n in range(1, 6)]
    assert all(log.append(move) for move in moves)
    assert log.newest() == log.record(5) == log.existing(5) == moves[-1]
    assert log.entries() == moves
    assert log.after(3) == moves[3:]
    assert log.find("who", "run-1") == [moves[0], moves[2], moves[4]]
    assert log.record(6) is None


def test_two_logs_know_nothing_of_each_other(exact_store: Store) -> None:
    assert log_of(exact_store, "moves/one").append(Move(1, "a"))
    assert log_of(exact_store, "moves/another").newest() is None
    assert log_of(exact_store, "moves").newest() is None  # the folder above is no log


def test_a_number_is_given_once_and_the_loser_leaves_nothing_to_be_found(exact_store: Store) -> None:
    log = log_of(exact_store)
    assert log.append(Move(1, "first"))
    assert not log.append(Move(1, "second"))
    assert log.find("who", "second") == []
    assert log.find("who", "first") == [Move(1, "first")]


def append_fifteen(root: str, process: int) -> None:
    log = log_of(Store(root))
    for number in range(15):
        while True:
            newest = log.newest()
            if log.append(Move(newest.sequence + 1 if newest else 1, f"{process}", {"n": number})):
                break


def test_six_writers_make_one_log_over_the_end_of_a_segment(tmp_path: Path) -> None:
    log = fill(Store(str(tmp_path / "store")), 960)
    with ProcessPoolExecutor(6, mp_context=multiprocessing.get_context("fork")) as pool:
        for done in [pool.submit(append_fifteen, str(tmp_path / "store"), n) for n in range(6)]:
            done.result()
    written = log.entries()
    assert [move.sequence for move in written] == list(range(1, 1051))
    for process in range(6):
        mine = [move for move in written[960:] if move.who == f"{process}"]
        assert [move.note["n"] for move in mine] == list(range(15))
        assert log.find("who", f"{process}") == mine
    assert log.newest() == written[-1]


@pytest.mark.parametrize("last", [998, 999, 1000, 1001, 2000])
def test_the_newest_is_found_around_the_end_of_a_segment(tmp_path: Path, last: int) -> None:
    log = fill(Store(str(tmp_path)), last)
    assert log.newest() == Move(last, f"run-{last}")
    assert log.append(Move(last + 1, "next"))
    assert log.newest() == Move(last + 1, "next")
    assert len(log.entries()) == last + 1


def test_a_segment_that_was_only_begun_is_passed_over(tmp_path: Path) -> None:
    """A writer was killed after it had made the folder, before its record was in its place."""
    log = log_of(Store(str(tmp_path)))
    begun = tmp_path / Path(key(1)).parent
    begun.mkdir(parents=True)
    (begun / f".tmp-{'0' * 16}").write_bytes(b"{")
    assert log.newest() is None
    assert log.entries() == []
    fill(log.store, 999)
    (tmp_path / Path(key(1000)).parent).mkdir()
    assert log.newest() == Move(999, "run-999")
    assert len(log.entries()) == 999
    log.store.delete(key(999))  # the next segment was begun, so this one was there
    for call in (log.newest, log.entries):
        with pytest.raises(IntegrityError, match=r"000/000999\.json is missing"):
            call()


@pytest.mark.parametrize("lost", [1000, 1005, 1019])
def test_a_gap_in_the_newest_segment_is_found_by_whoever_asks_for_the_state(
    tmp_path: Path, lost: int
) -> None:
    log = fill(Store(str(tmp_path)), 1020)
    log.store.delete(key(lost))
    for call in (log.newest, log.entries):
        with pytest.raises(IntegrityError, match=f"{lost:06d}.json is missing, later ones exist: restore it"):
            call()


@pytest.mark.parametrize("lost", [1, 500, 999])
def test_a_gap_in_an_older_segment_changes_no_state_and_is_found_by_the_history(
    tmp_path: Path, lost: int
) -> None:
    log = fill(Store(str(tmp_path)), 1020)
    log.store.delete(key(lost))
    assert log.newest() == Move(1020, "run-1020")
    assert log.append(Move(1021, "next"))
    with pytest.raises(IntegrityError, match=f"{lost:06d}.json is missing, later ones exist"):
        log.entries()


def test_a_whole_segment_that_is_gone_is_found_by_everybody(tmp_path: Path) -> None:
    log = fill(Store(str(tmp_path)), 2010)
    log.store.delete(str(Path(key(1000)).parent))
    for call in (log.newest, log.entries):
        with pytest.raises(IntegrityError, match=r"001/001000\.json is missing, later ones exist"):
            call()


@pytest.mark.parametrize("hidden", ["001002.json", "000999.json", "001/"])
def test_a_listing_that_is_older_than_the_newest_records_hides_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    """NFS shows a listing for some seconds after it has changed, but not an old state of a file that is opened."""
    log = fill(Store(str(tmp_path)), 1002)
    children = Store.children
    monkeypatch.setattr(
        Store, "children", lambda self, key: [name for name in children(self, key) if name != hidden]
    )
    assert log.newest() == Move(1002, "run-1002")
    if hidden == "000999.json":
        assert len(log.entries()) == 1002


def test_a_record_that_is_looked_for_by_a_field_and_gone_is_named(tmp_path: Path) -> None:
    log = log_of(Store(str(tmp_path)))
    for number in range(1, 4):
        assert log.append(Move(number, f"run-{number}"))
    log.store.delete(key(2))
    with pytest.raises(IntegrityError, match=r"000002\.json is missing"):
        log.find("who", "run-2")
    log.store.write("records/moves/späte Flüge/by/who/killed/000004", b"")  # before it could append
    assert log.find("who", "run-3") == [Move(3, "run-3")]
    log.store.delete(key(3))
    log.store.delete(key(1))
    assert log.find("who", "killed") == []


@pytest.mark.parametrize("text", [b"", b'{"sequence": 2', b"[]", b"7", b'{"sequence": 2}', b'"x"', b"\xff"])
def test_a_damaged_record_is_named(tmp_path: Path, text: bytes) -> None:
    log = fill(Store(str(tmp_path)), 2)
    log.store.write(key(2), text)
    for call in (log.newest, log.entries, lambda: log.after(1)):
        with pytest.raises(
            IntegrityError, match=r"000002\.json is damaged .*: restore it from a backup of the store"
        ):
            call()


def test_fields_of_a_later_version_of_this_package_are_passed_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write(key(1), b'{"sequence": 1, "who": "later", "mood": "good"}')
    assert log_of(store).newest() == Move(1, "later")


def test_records_from_before_the_first_release_are_a_sentence_and_no_empty_log(exact_store: Store) -> None:
    log = log_of(exact_store, "ledger/late")
    refuse_old_layout(exact_store)
    exact_store.write("ledger/late/000001.json", to_json(Move(1, "old")))
    for call in (log.newest, log.entries, lambda: refuse_old_layout(exact_store)):
        with pytest.raises(BadConfiguration, match=r"holds records in ledger/.*use a new store"):
            call()
    assert log_of(exact_store, "ledger/another").newest() is None


def test_a_long_log_costs_no_more_requests_than_a_short_one(
    s3: LocalS3, bucket: tuple[str, Connection]
) -> None:
    store = Store(*bucket)
    log = fill(store, 3, s3=s3)
    log.append(Move(4, "one"))
    log_ends_at = 4
    calls = {
        "state": (log.newest, 4),
        "nothing new": (lambda: log.after(log_ends_at), 1),
        "one value": (lambda: log.find("who", "one"), 2),
        "a value of none": (lambda: log.find("who", "nobody"), 3),
    }
    short = {name: s3.count(call) for name, (call, _) in calls.items()}
    fill(store, 1100, first=5, s3=s3)
    log_ends_at = 1100
    assert {name: s3.count(call) for name, (call, _) in calls.items()} == short
    assert short == {name: most for name, (_, most) in calls.items()}


def test_the_history_is_read_sixteen_at_a_time(s3: LocalS3, bucket: tuple[str, Connection]) -> None:
    store = Store(*bucket)
    log = fill(store, 200, s3=s3)
    s3.most_at_once, s3.latency_s = 0, 0.02
    try:
        assert s3.count(lambda: store_sequences(log)) == 202  # two lists and every record
    finally:
        s3.latency_s = 0.0
    assert 8 <= s3.most_at_once <= 16


def store_sequences(log: Log[Move]) -> None:
    assert [move.sequence for move in log.entries()] == list(range(1, 201))
