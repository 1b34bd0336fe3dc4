"""Each kind of value, from each format, as each stated type: what Python's exact arithmetic says fits is kept as it is, all else is
rejected and counted; and no type that is found from the values loses anything."""

from __future__ import annotations

import itertools
import json
import re
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.data.sources import text_types
from lepton_airflow.data.sql import connect
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.ingest_data import IngestData

NUMBERS = [
    "0", "7", "-7", "+7", "007", " 7", "7 ", "12.0", "12.", "12.7", "-0.5", ".5", "5.", "1e3", "1E-2", "1_000", "0x1F", "1,5", "127",
    "128", "255", "256", "-128", "-129", "32768", "2147483648", "9007199254740993", "9223372036854775807", "9223372036854775808",
    "18446744073709551615", "18446744073709551616", "12345678901234567890", "12345678901234567890123", "123456789012345678.91",
    "0.125", "0.10", "99999999.99", "999999999.99", "1e400", "nan", "inf", "-Infinity", "--1", "1 2", "", "x", "١٢",
]  # fmt: skip
WORDS = ["true", "FALSE", "t", "F", "yes", "No", "1.0", "maybe", "naïve", "NULL"]
MOMENTS = [
    "2013-05-01", "2013-5-1", "2013-02-30", "13-05-01", "01/02/2013", "2013-05-01 14:38", "2013-05-01T14:38:09", "2013-05-01 00:00:00",
    "2013-05-01T14:38:09.123456", "2013-05-01T14:38:09.123456789", "2013-05-01T14:38:09.120000000", "2013-05-01T14:38:00Z",
    "2013-05-01T14:38:00+02:00", "2013-05-01 14:38:00+0200", "2013-05-01T14:38:00-05", "2013-05-01 24:00", "2013-05-01 25:00",
    "2013-05-01 14:60", "14:38", "14:38:09.5", "infinity", "epoch", "2013-05-01 14:38:00 Europe/Berlin", "2013-05-01T14:38:00.123Z",
]  # fmt: skip
VALUES = [*NUMBERS, *WORDS, *MOMENTS]
WHOLE = {
    "TINYINT": (-(2**7), 2**7), "SMALLINT": (-(2**15), 2**15), "INTEGER": (-(2**31), 2**31), "BIGINT": (-(2**63), 2**63),
    "UTINYINT": (0, 2**8), "USMALLINT": (0, 2**16), "UINTEGER": (0, 2**32), "UBIGINT": (0, 2**64),
}  # fmt: skip
KINDS = [
    *WHOLE, "DOUBLE", "DECIMAL(10,2)", "DECIMAL(20,2)", "DECIMAL(38,0)", "BOOLEAN", "DATE", "TIMESTAMP", "TIMESTAMPTZ", "TIME", "VARCHAR",
]  # fmt: skip
ABSENT = object()


def exact(text: str, kind: str) -> Any:
    """What a text says as a value of a type, by Python's own exact types; ABSENT when the type cannot hold it."""
    plain = text.strip(" ")
    if kind == "VARCHAR":
        return text
    if kind in WHOLE:
        if re.fullmatch(r"[+-]?[0-9]+(\.0*)?", plain):
            low, above = WHOLE[kind]
            number = int(Decimal(plain))
            return number if low <= number < above else ABSENT
    elif kind == "DOUBLE":
        if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", plain):
            number = float(plain)
            return number if abs(number) != float("inf") else ABSENT
        if re.fullmatch(r"(?i)[+-]?(nan|inf|infinity)", plain):
            return float(plain)
    elif kind.startswith("DECIMAL"):
        precision, scale = map(int, re.findall(r"\d+", kind))
        if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)", plain):
            number = Decimal(plain)
            if number == round(number, scale) and abs(number) < Decimal(10) ** (precision - scale):
                return number
    elif kind == "BOOLEAN":
        yes = plain.lower() in ("true", "t", "yes", "y", "1")
        return yes if yes or plain.lower() in ("false", "f", "no", "n", "0") else ABSENT
    else:
        return exact_moment(plain, kind)
    return ABSENT


def exact_moment(plain: str, kind: str) -> Any:
    """The same of dates and times."""
    clock = r"(\d{1,2}):(\d{2})(?::(\d{2})(?:\.(\d{1,6})0*)?)?"
    if kind == "TIME":
        found = re.fullmatch(clock, plain)
        return made(time, *parts(found.groups())) if found else ABSENT
    offset = r"(?: ?(Z|[+-]\d{2}(?::?\d{2})?))?"
    found = re.fullmatch(rf"([1-9]\d{{3}})-(\d{{1,2}})-(\d{{1,2}})(?:[ T]{clock}{offset})?", plain)
    if not found:
        return ABSENT
    *numbers, zone = found.groups()
    moment = made(datetime, *map(int, numbers[:3]), *parts(numbers[3:]))
    if moment is ABSENT or (zone and kind != "TIMESTAMPTZ"):
        return ABSENT
    if kind == "DATE":
        return moment.date() if moment.time() == time() else ABSENT
    if kind == "TIMESTAMP":
        return moment
    if zone and zone != "Z":
        zone = zone.replace(":", "").ljust(5, "0")
        return datetime.strptime(
            f"{moment.isoformat()}{zone}", f"%Y-%m-%dT%H:%M:%S{'.%f' * bool(moment.microsecond)}%z"
        ).astimezone(UTC)
    return moment.replace(tzinfo=UTC)


def parts(numbers: Any) -> list[int]:
    hour, minute, second, fraction = numbers
    return [int(hour or 0), int(minute or 0), int(second or 0), int((fraction or "0").ljust(6, "0"))]


def made(kind: Any, *numbers: int) -> Any:
    try:
        return kind(*numbers)
    except ValueError:
        return ABSENT


def is_number(text: str) -> bool:
    """Whether a text is a number of JSON."""
    return re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", text) is not None


def landed(
    tmp_path: Path, form: str, kind: str | None, texts: list[str], **options: Any
) -> tuple[dict[int, Any], int, Any]:
    """A column of texts in a file of this form, ingested: value by row, how many rows were rejected, and the result."""
    source = tmp_path / f"s.{form.partition(' ')[0]}"
    if form == "csv":
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
        source.write_text("row,value\n" + "".join(f"{n},{text}\n" for n, text in enumerate(quoted)))
    elif form == "jsonl":
        source.write_text(
            "".join(json.dumps({"row": n, "value": text}) + "\n" for n, text in enumerate(texts))
        )
    elif form == "jsonl of numbers":
        source.write_text("".join(f'{{"row": {n}, "value": {text}}}\n' for n, text in enumerate(texts)))
    else:
        pq.write_table(pa.table({"row": pa.array(range(len(texts)), pa.int64()), "value": texts}), source)
    spec = {"uri": str(source), "types": {"row": "BIGINT"} | ({"value": kind} if kind else {})} | options
    stage = IngestData(sources={"s": spec}, query="FROM s", max_rejected_share=1.0, on_empty="keep")
    run = RunInfo.local(tmp_path)
    result = stage.run(run)
    table = pq.read_table(run.fetch(result.artifacts["snapshot"].uri))
    rows = dict(zip(table["row"].to_pylist(), table["value"].to_pylist(), strict=True))
    return rows, result.values["sources"]["s"]["rejected"], result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["csv", "jsonl", "jsonl of numbers", "parquet"])
def test_what_fits_a_stated_type_is_kept_exactly_and_all_else_is_rejected(
    tmp_path: Path, form: str, kind: str
) -> None:
    texts = [text for text in VALUES if form != "jsonl of numbers" or is_number(text)]
    if form == "jsonl of numbers":
        texts.remove("1e400")  # no double: the line is no JSON to DuckDB
    rows, rejected, _ = landed(tmp_path, form, kind, texts)
    wrong = {}
    for number, text in enumerate(texts):
        # An empty text means "no value" in a CSV file.
        wanted = None if form == "csv" and not text else exact(text, kind)
        got = rows.get(number, ABSENT)
        if isinstance(got, datetime) and got.tzinfo:
            got = got.astimezone(UTC)
        if repr(got) != repr(wanted) and got != wanted:
            wrong[text] = (got, wanted)
    assert wrong == {}
    assert rejected == len(texts) - len(rows)


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["1", "2"], "BIGINT"),
        (["1", " 2", "-3 "], "BIGINT"),
        (["+4912345", "+4998765"], "VARCHAR"),
        (["0000-01-01", "2013-05-01"], "VARCHAR"),
        (["2013-05-01T14:38+25:00"], "VARCHAR"),
        (["1", "2.0"], "DOUBLE"),
        (["1", "nan"], "DOUBLE"),
        (["9007199254740993", "1"], "BIGINT"),
        (["9007199254740993", "1.5"], "VARCHAR"),
        (["12345678901234567890", "12345678901234567891"], "VARCHAR"),
        (["02134", "10001"], "VARCHAR"),
        (["0", "0.5"], "DOUBLE"),
        (["1_000"], "VARCHAR"),
        (["0x1F"], "VARCHAR"),
        (["1e400"], "VARCHAR"),
        (["F", "F"], "VARCHAR"),
        (["t", "f"], "VARCHAR"),
        (["true", "FALSE"], "BOOLEAN"),
        (["yes", "no"], "VARCHAR"),
        (["2013-05-01", "2013-05-02"], "DATE"),
        (["2013-05-01 00:00", "2013-05-02 00:00"], "TIMESTAMP"),
        (["2013-05-01", "2013-05-02 14:38"], "TIMESTAMP"),
        (["2013-05-01T14:38Z", "2013-05-01T14:38+02:00"], "TIMESTAMP WITH TIME ZONE"),
        (["2013-05-01T14:38", "2013-05-01T14:38+02:00"], "VARCHAR"),
        (["2013-05-01", "2013-05-01T14:38+02:00"], "VARCHAR"),
        (["2013-05-01T14:38:00.123456789"], "VARCHAR"),
        (["01/02/2013"], "VARCHAR"),
        (["14:38"], "VARCHAR"),
        (["infinity", "2013-05-01"], "VARCHAR"),
        (["", ""], "VARCHAR"),
        (["", "3"], "BIGINT"),
    ],
)
def test_the_type_that_is_found_holds_what_every_value_says(
    tmp_path: Path, texts: list[str], kind: str
) -> None:
    for ordered in itertools.permutations(texts):
        rows, rejected, result = landed(tmp_path, "csv", None, list(ordered))
        assert result.values["schema"]["value"] == kind
        assert result.values["sources"]["s"]["types"] == {"value": kind}
        assert rejected == 0
        if kind == "VARCHAR":
            assert rows == {n: text or None for n, text in enumerate(ordered)}


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["1", "2"], "BIGINT"),
        (["1", "2.5"], "DOUBLE"),
        (["12345678901234567890", "12345678901234567891"], "VARCHAR"),
        (["12345678901234567890123456789012345678901", "1"], "VARCHAR"),
        (["9007199254740993", "1.5"], "VARCHAR"),
        (["true", "false"], "BOOLEAN"),
        (['"2013-05-01"'], "DATE"),
        (['"2013-05-01T14:38"', '"2013-05-01T14:38+02:00"'], "VARCHAR"),
        (['"2013-05-01T14:38Z"', '"2013-05-01T14:38+02:00"'], "TIMESTAMP WITH TIME ZONE"),
        (['"7"', '"8"'], "VARCHAR"),  # who writes JSON says which values are numbers
    ],
)
def test_the_same_in_json(tmp_path: Path, texts: list[str], kind: str) -> None:
    for ordered in itertools.permutations(texts):
        rows, rejected, result = landed(tmp_path, "jsonl of numbers", None, list(ordered))
        assert (result.values["schema"]["value"], rejected) == (kind, 0)
        if kind == "VARCHAR":
            assert rows == {n: text.strip('"') for n, text in enumerate(ordered)}


def test_whole_numbers_deep_in_json_are_not_rounded(tmp_path: Path) -> None:
    source = tmp_path / "s.jsonl"
    source.write_text('{"user": {"id": 12345678901234567890}}\n{"user": {"id": 12345678901234567891}}\n')
    run = RunInfo.local(tmp_path)
    result = IngestData(sources={"s": str(source)}, query="SELECT user.id AS id FROM s").run(run)
    found = pq.read_table(run.fetch(result.artifacts["snapshot"].uri))["id"].to_pylist()
    assert found == ["12345678901234567890", "12345678901234567891"]


@pytest.mark.parametrize("other", ["n,d\n", "n,d\n,\n", "d,n\n,\n"])
def test_a_file_without_values_changes_no_type(tmp_path: Path, other: str) -> None:
    (tmp_path / "1.csv").write_text(other)
    (tmp_path / "2.csv").write_text("n,d\n10,2013-05-01\n9,2013-05-02\n")
    (tmp_path / "3.csv").write_text(other)
    result = IngestData(
        sources={"s": f"{tmp_path}/*.csv"}, query="SELECT max(n) AS n, max(d) AS d FROM s"
    ).run(RunInfo.local(tmp_path))
    assert result.values["schema"] == {"n": "BIGINT", "d": "DATE"}


@pytest.mark.parametrize(
    ("date_format", "texts", "kind", "values"),
    [
        ("%d/%m/%Y", ["01/02/2013", "13/02/2013"], "DATE", [date(2013, 2, 1), date(2013, 2, 13)]),
        ("%d/%m/%Y %H:%M", ["01/02/2013 14:38"], "TIMESTAMP", [datetime.fromisoformat("2013-02-01 14:38")]),
        ("%Y%m%d", ["20130201"], "DATE", [date(2013, 2, 1)]),
        ("%d/%m/%Y", ["01/02/13"], "VARCHAR", ["01/02/13"]),  # not the year 13
        ("%d.%m.%Y %H:%M%z", ["01.02.2013 14:38+0200"], "TIMESTAMP WITH TIME ZONE", [datetime(2013, 2, 1, 12, 38, tzinfo=UTC)]),
    ],
)  # fmt: skip
def test_dates_in_another_format_keep_their_time(
    tmp_path: Path, date_format: str, texts: list[str], kind: str, values: list[Any]
) -> None:
    rows, rejected, result = landed(tmp_path, "csv", None, texts, date_format=date_format)
    assert (result.values["schema"]["value"], rejected, list(rows.values())) == (kind, 0, values)
    if kind == "TIMESTAMP":  # stated as a DATE, times would be dropped
        assert landed(tmp_path, "csv", "DATE", texts, date_format=date_format)[1] == len(texts)


@pytest.mark.parametrize(
    ("value", "of", "kind", "fits"),
    [
        ("12.7", "DOUBLE", "BIGINT", False),
        ("12.0", "DOUBLE", "BIGINT", True),
        ("9007199254740993", "BIGINT", "DOUBLE", False),
        ("0.1", "DOUBLE", "FLOAT", True),
        ("0.1", "DOUBLE", "DECIMAL(10,2)", True),
        ("0.125", "DOUBLE", "DECIMAL(10,2)", False),
        ("300", "BIGINT", "TINYINT", False),
        ("2", "BIGINT", "BOOLEAN", False),
        ("2013-05-01 14:38", "TIMESTAMP", "DATE", False),
        ("2013-05-01 00:00", "TIMESTAMP", "DATE", True),
        ("2013-05-01 14:38", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE", True),
        ("2013-05-01 14:38:00.000000001", "TIMESTAMP_NS", "TIMESTAMP", False),
        ("0.10", "DECIMAL(10,2)", "DOUBLE", True),
        ("[1.5, 2]", "DOUBLE[]", "INTEGER[]", False),
        ("[1, 2]", "DOUBLE[]", "INTEGER[]", True),
    ],
)  # fmt: skip
def test_typed_values_fit_another_type_when_nothing_is_lost(
    tmp_path: Path, value: str, of: str, kind: str, fits: bool
) -> None:
    con = connect(tmp_path)
    condition = text_types.fits_again("x", kind, of)
    assert con.execute(f"SELECT {condition} FROM (SELECT '{value}'::{of} AS x)").fetchall() == [(fits,)]


def test_a_misfit_has_its_line_beside_quoted_line_ends_and_ragged_lines(tmp_path: Path) -> None:
    source = tmp_path / "s.csv"
    source.write_text('a,n\n"two\nlines",1\nx,oops\nragged\n\n"1 ""2""",12.7\ny,2\n')
    run = RunInfo.local(tmp_path)
    stage = IngestData(
        sources={"s": {"uri": str(source), "types": {"n": "BIGINT"}}}, query="FROM s", max_rejected_share=0.9
    )
    result = stage.run(run)
    rejected = pq.read_table(run.fetch(result.artifacts["rejected"].uri)).to_pylist()
    assert {
        (row["line"], row["column"], row["raw"])
        for row in rejected
        if row["column"] == "n" and "CAST" in row["error"]
    } == {
        (4, "n", "x,oops"),
        (7, "n", '"1 ""2""",12.7'),
    }
    assert result.values["sources"]["s"]["rejected"] == 3


def test_a_type_that_parquet_would_round_is_refused(tmp_path: Path) -> None:
    from lepton_airflow.errors import BadConfiguration

    with pytest.raises(
        BadConfiguration,
        match=r"types\['value'\]='HUGEINT': Parquet would hold it as a DOUBLE.*DECIMAL\(38,0\)",
    ):
        landed(tmp_path, "csv", "HUGEINT", ["1"])
