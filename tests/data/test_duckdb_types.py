from __future__ import annotations

import duckdb
import pytest

from lepton_airflow.data.duckdb_types import has_zone, in_microseconds, is_number, is_time, portable


def type_of(sql: str) -> str:
    return str(duckdb.sql(f"SELECT {sql} AS x").types[0])


@pytest.mark.parametrize(
    ("sql", "number", "time", "zone"),
    [
        ("1::UTINYINT", True, False, False),
        ("1::HUGEINT", True, False, False),
        ("1.5::DECIMAL(9, 2)", True, False, False),
        ("1::FLOAT", True, False, False),
        ("true", True, False, False),
        ("'1'", False, False, False),
        ("[1]", False, False, False),
        ("INTERVAL 1 DAY", False, False, False),
        ("TIME '12:00'", False, False, False),
        ("DATE '2024-01-01'", False, True, False),
        ("TIMESTAMP '2024-01-01'", False, True, False),
        ("TIMESTAMP_NS '2024-01-01'", False, True, False),
        ("TIMESTAMPTZ '2024-01-01 00:00:00+00'", False, True, True),
    ],
)
def test_a_type_says_what_its_values_are(sql: str, number: bool, time: bool, zone: bool) -> None:
    kind = type_of(sql)
    assert (is_number(kind), is_time(kind), has_zone(kind)) == (number, time, zone), kind


@pytest.mark.parametrize(
    ("sql", "wanted"),
    [
        ("true", "TINYINT"),
        ("1.5::DECIMAL(9, 2)", "DOUBLE"),
        ("1::HUGEINT", "DOUBLE"),
        ("'a'::ENUM('a', 'b')", "VARCHAR"),
        ("uuid()", "VARCHAR"),
        ("1::BIGINT", "BIGINT"),
        ("'text'", "VARCHAR"),
        ("TIMESTAMP_NS '2024-01-01'", "TIMESTAMP"),
        ("DATE '2024-01-01'", "DATE"),
    ],
)
def test_every_framework_can_read_a_portable_column(sql: str, wanted: str) -> None:
    assert type_of(portable(f"({sql})", type_of(sql))) == wanted


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("12345678901234567::HUGEINT", "12345678901234567"),
        ("12::DECIMAL(18, 3)", "12"),
        ("100::DECIMAL(18, 3)", "100"),
        ("-12.50::DECIMAL(38, 2)", "-12.5"),
        ("100::DECIMAL(38, 0)", "100"),
    ],
)
def test_an_id_is_one_text_whatever_its_type(sql: str, text: str) -> None:
    # Without a result that is left open on the connection that all tests of a process share.
    assert duckdb.sql(f"SELECT {portable(f'({sql})', type_of(sql), exact=True)}").fetchall() == [(text,)]


def test_only_nanoseconds_are_cast() -> None:
    column = "(TIMESTAMP_NS '2024-01-01')"
    assert type_of(in_microseconds(column, type_of(column))) == "TIMESTAMP"
    assert in_microseconds("t", "DATE") == "t"
