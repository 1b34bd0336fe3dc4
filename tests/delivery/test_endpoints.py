"""The records of an endpoint: appended once, in order, never back; statuses that come and go."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, DesiredLog, LoadVerdict, Status
from lepton_airflow.errors import BadConfiguration, IntegrityError
from lepton_airflow.store import Store, eviction
from lepton_airflow.testing.local_s3 import LocalS3

FIRST = Desired(
    endpoint="late",
    package="file:///model@sha256:" + "0" * 64,
    version="1",
    golden="file:///golden.json@sha256:" + "1" * 64,
    max_difference=1e-4,
    max_latency_ms=50,
    max_memory_mb=512,
    run_key="key",
    name="late",
    ledger=1,
    window={"start": "2013-01-01", "end": "2013-02-01"},
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def ask(store: Store, desired: Desired) -> Desired:
    records = DesiredLog(store, "late")
    asked = records.append_after(records.newest(), desired)
    assert asked is not None
    return asked


def reject(store: Store, sequence: int) -> None:
    error = {"kind": "LeptonError", "message": "too slow.", "exit_code": 1}
    endpoints.decide(store, "late", LoadVerdict(sequence=sequence, accepted=False, server="a", error=error))


def accept(store: Store, sequence: int) -> None:
    endpoints.decide(store, "late", LoadVerdict(sequence=sequence, accepted=True, server="a"))


def test_of_all_who_append_at_once_one_does(store: Store) -> None:
    def append(number: int) -> Desired | None:
        return DesiredLog(store, "late").append_after(None, replace(FIRST, run_key=str(number)))

    with ThreadPoolExecutor(16) as pool:
        asked = [desired for desired in pool.map(append, range(16)) if desired]
    assert DesiredLog(store, "late").entries() == asked
    (one,) = asked
    assert replace(one, run_key="key") == replace(FIRST, sequence=1, moves={"late": 1})


def test_a_champion_never_goes_back(store: Store) -> None:
    for desired in (FIRST, replace(FIRST, ledger=7), replace(FIRST, name=None, ledger=None)):
        ask(store, desired)
    with pytest.raises(IntegrityError, match=r"move 7 .* the older move 6: it never goes back"):
        ask(store, replace(FIRST, ledger=6))
    assert ask(store, replace(FIRST, name="another", ledger=2)).moves == {"late": 7, "another": 2}
    assert ask(store, replace(FIRST, ledger=7)).sequence == 5
    assert [d.ledger for d in DesiredLog(store, "late").after(3)] == [2, 7]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"run_key": "x", "sequence": 9, "decided": "now", "package": "s3://moved@sha256:" + "0" * 64}, True),
        ({"package": "file:///model@sha256:" + "2" * 64}, False),
        ({"golden": "file:///golden.json@sha256:" + "2" * 64}, False),
        ({"max_latency_ms": 1.0}, False),
        ({"ledger": 2}, False),
    ],
)
def test_two_records_ask_for_the_same_when_package_and_conditions_are_equal(
    change: dict[str, object], same: bool
) -> None:
    assert replace(FIRST, **change).asks_as(FIRST) is same  # type: ignore[arg-type]


def test_a_record_that_is_gone_or_damaged_is_named(store: Store) -> None:
    for _ in range(3):
        ask(store, FIRST)
    key = "records/endpoints/late/desired/000/000002.json"
    store.delete(key)
    with pytest.raises(IntegrityError, match=r"desired/000/000002\.json is missing, later ones exist"):
        DesiredLog(store, "late").newest()
    store.write(key, b'{"endpoint": ')
    with pytest.raises(IntegrityError, match=r"desired/000/000002\.json is damaged"):
        DesiredLog(store, "late").entries()


def test_the_first_verdict_stands(store: Store) -> None:
    first = LoadVerdict(sequence=1, accepted=True, server="a", numbers={"load_s": 0.5})
    assert endpoints.read_verdict(store, "late", 1) is None
    assert endpoints.decide(store, "late", first) == first
    error = {"kind": "BadInput", "message": "no.", "exit_code": 80}
    assert endpoints.decide(store, "late", replace(first, server="b", accepted=False, error=error)) == first
    assert endpoints.read_verdict(store, "late", 1) == first


def test_the_newest_that_was_not_rejected_stands(store: Store) -> None:
    def standing(upto: int) -> int:
        return endpoints.not_rejected(store, "late", upto)

    assert standing(0) == 0
    for _ in range(6):
        ask(store, FIRST)
    assert standing(6) == 6  # nobody has judged any
    reject(store, 1)
    assert standing(1) == 0
    accept(store, 2)
    reject(store, 6)  # before those between were judged
    assert standing(6) == 5
    for sequence in (4, 3, 5):
        reject(store, sequence)
    assert standing(6) == standing(5) == standing(4) == 2


def test_a_long_row_of_rejected_versions_is_not_read_again() -> None:
    with LocalS3() as s3:
        store = s3.store("endpoints")
        ask(store, FIRST)
        accept(store, 1)
        for sequence in range(2, 12):
            ask(store, FIRST)
            reject(store, sequence)
        records = DesiredLog(store, "late")

        def what_to_serve() -> None:
            newest = records.newest()
            assert newest is not None
            standing = endpoints.not_rejected(store, "late", newest.sequence)
            assert records.existing(standing).sequence == 1

        assert s3.count(what_to_serve) == 7
        assert s3.count(lambda: records.after(11)) == 1  # what a server asks every second


def test_statuses_live_die_and_are_forgotten(store: Store) -> None:
    moments = {"new": 0.0, "dead": endpoints.DEAD_S + 5, "long gone": 30 * 24 * 3600.0}
    for name, age_s in moments.items():
        beat = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
        endpoints.write_status(store, "late", Status(server=name, url="", beat=beat))
    assert {s.server: s.alive for s in endpoints.read_statuses(store, "late")} == {
        "new": True,
        "dead": False,
        "long gone": False,
    }
    endpoints.forget_the_dead(store, "late")
    assert [s.server for s in endpoints.read_statuses(store, "late")] == ["dead", "new"]
    endpoints.remove_status(store, "late", "new")
    assert [s.server for s in endpoints.read_statuses(store, "late")] == ["dead"]


def test_what_an_endpoint_names_is_kept_from_eviction(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, dropped = store.put("model", b"served"), store.put("model", b"not served")
    ask(store, replace(FIRST, package=kept.uri))
    monkeypatch.setattr(eviction, "GRACE_S", -1.0)
    eviction.evict(store, older_than_s=0)
    assert (store.present(kept), store.present(dropped)) == (True, False)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "ä", "a" * 101])
def test_a_name_that_no_url_takes_is_refused(name: str) -> None:
    with pytest.raises(BadConfiguration, match="cannot name an endpoint"):
        endpoints.check_endpoint_name(name)
