from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from lepton_airflow.pods.logs import is_later, lines_of, since_s

STAMP = "2026-11-22T16:21:20.123456789Z"


def test_lines_come_with_their_time_however_the_bytes_are_cut() -> None:
    log = f"{STAMP} one\n{STAMP} zwei: grün\n{STAMP} \n".encode()
    whole = list(lines_of([log]))
    assert whole == [(STAMP, "one"), (STAMP, "zwei: grün"), (STAMP, "")]
    for size in (1, 7, 40):
        assert list(lines_of(log[i : i + size] for i in range(0, len(log), size))) == whole


@pytest.mark.parametrize(
    "zone", [UTC, timezone(timedelta(hours=8)), timezone(timedelta(hours=-3, minutes=-30))]
)
def test_the_age_of_a_line_knows_its_time_zone(zone: timezone) -> None:
    stamp = (datetime.now(zone) - timedelta(seconds=100)).isoformat()
    ((found, text),) = lines_of([f"{stamp} hello\n".encode()])
    assert (found, text) == (stamp, "hello")
    assert 130 <= since_s(found) <= 140


def test_what_the_kubelet_says_in_place_of_a_log_is_no_line() -> None:
    said = b'rpc error: code = NotFound desc = an error occurred when try to find container "0e99": not found'
    assert list(lines_of([said])) == []
    assert list(lines_of([f"{STAMP} last\n".encode() + said])) == [(STAMP, "last")]


def test_times_compare_to_the_nanosecond() -> None:
    assert is_later(STAMP, "")
    assert is_later("2026-11-22T16:21:20.123456790Z", STAMP)
    assert not is_later(STAMP, STAMP)
    assert not is_later("2026-11-22T16:21:20Z", STAMP)
