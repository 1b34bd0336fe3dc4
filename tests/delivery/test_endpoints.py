"""The records of an endpoint: appended once, in order, never back; statuses that come and go."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, Status, Verdict
from lepton_airflow.errors import BadConfiguration, IntegrityError
from lepton_airflow.store import Store

FIRST = Desired(
    endpoint="late",
    sequence=1,
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


def test_of_all_who_append_at_once_one_does(store: Store) -> None:
    def append(number: int) -> bool:
        return endpoints.append_desired(store, [], replace(FIRST, run_key=str(number)))

    with ThreadPoolExecutor(16) as pool:
        assert sorted(pool.map(append, range(16))) == [False] * 15 + [True]
    (found,) = endpoints.desired_after(store, "late")
    assert replace(found, run_key="key") == FIRST


def test_a_champion_never_goes_back(store: Store) -> None:
    second = replace(FIRST, sequence=2, ledger=7)
    pinned = replace(FIRST, sequence=3, name=None, ledger=None)
    assert all(endpoints.append_desired(store, known, d) for known, d in (([], FIRST), ([FIRST], second)))
    assert endpoints.append_desired(store, [FIRST, second], pinned)
    known = endpoints.desired_after(store, "late")
    with pytest.raises(IntegrityError, match=r"move 7 .* the older move 6: it never goes back"):
        endpoints.append_desired(store, known, replace(FIRST, sequence=4, ledger=6))
    assert endpoints.append_desired(store, known, replace(FIRST, sequence=4, ledger=7))
    assert endpoints.desired_after(store, "late", 3)[0].ledger == 7


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
    for number in (1, 2, 3):
        endpoints.append_desired(store, [], replace(FIRST, sequence=number))
    store.delete("endpoints/late/desired/000002.json")
    with pytest.raises(IntegrityError, match=r"desired/000002\.json is missing, later ones exist"):
        endpoints.desired_after(store, "late")
    store.write("endpoints/late/desired/000002.json", b'{"endpoint": ')
    with pytest.raises(IntegrityError, match=r"desired/000002\.json is damaged"):
        endpoints.desired_after(store, "late")


def test_the_first_verdict_stands(store: Store) -> None:
    first = Verdict(sequence=1, accepted=True, server="a", numbers={"load_s": 0.5})
    assert endpoints.read_verdict(store, "late", 1) is None
    assert endpoints.decide(store, "late", first) == first
    error = {"kind": "BadInput", "message": "no.", "exit_code": 80}
    assert endpoints.decide(store, "late", replace(first, server="b", accepted=False, error=error)) == first
    assert endpoints.read_verdict(store, "late", 1) == first


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
    endpoints.append_desired(store, [], replace(FIRST, package=kept.uri))
    monkeypatch.setattr("lepton_airflow.store.files._GRACE_S", -1.0)
    store.cache_evict(older_than_s=0)
    assert (store.present(kept), store.present(dropped)) == (True, False)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "ä", "a" * 101])
def test_a_name_that_no_url_takes_is_refused(name: str) -> None:
    with pytest.raises(BadConfiguration, match="cannot name an endpoint"):
        endpoints.check_endpoint_name(name)
