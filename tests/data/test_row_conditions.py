from __future__ import annotations

from typing import Any

import pytest

from lepton_airflow.data.row_conditions import condition_text, whole_condition
from lepton_airflow.errors import BadConfiguration


def read(text: str, parser: str | None = "great_expectations") -> Any:
    return whole_condition({"row_condition": text, "condition_parser": parser}, "here")["row_condition"]


def compare(column: str, operator: str, parameter: Any) -> dict[str, Any]:
    return {"type": "comparison", "column": {"name": column}, "operator": operator, "parameter": parameter}


A, B, C = compare("a", "==", 1), compare("b c", ">", "x"), compare("d", "<=", -2.5)
TEXTS = {"A": 'col("a") == 1', "B": 'col("b c")>"x"', "C": 'col("d") <= -2.5'}


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("A AND B", {"type": "and", "conditions": [A, B]}),
        ("A or B", {"type": "or", "conditions": [A, B]}),
        ("A & B && C", {"type": "and", "conditions": [A, B, C]}),
        ("A AND B OR C", {"type": "or", "conditions": [{"type": "and", "conditions": [A, B]}, C]}),
        ("A | B and C", {"type": "or", "conditions": [A, {"type": "and", "conditions": [B, C]}]}),
    ],
)
def test_joined_comparisons_become_a_condition_of_json(text: str, meaning: dict[str, Any]) -> None:
    assert read("".join(TEXTS.get(sign, sign) for sign in text.replace("AND", "and"))) == meaning


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (TEXTS["A"], A),
        ('col("a") == "x AND y"', compare("a", "==", "x AND y")),
        ('col("a").notNull()', {"type": "nullity", "column": {"name": "a"}, "is_null": False}),
        ('col("and") == "or"', compare("and", "==", "or")),
        ('col("a") >= date("2013-05-01")', compare("a", ">=", "2013-05-01")),
    ],
)
def test_one_comparison_is_read_as_one(text: str, meaning: dict[str, Any]) -> None:
    assert read(text) == meaning


def test_a_condition_is_said_as_it_is_written() -> None:
    for text in (
        'col("a") == 1 AND col("b c") > "x" OR col("d") <= -2.5',
        'col("a").notNull() OR col("b") == 2',
    ):
        assert read(condition_text(read(text))) == read(text)
    assert condition_text(read('col("a")==1 and col("b c")>"x"')) == 'col("a") == 1 AND col("b c") > "x"'
    both = {"type": "and", "conditions": [A, {"type": "or", "conditions": [B, C]}]}
    assert condition_text(both) == 'col("a") == 1 AND (col("b c") > "x" OR col("d") <= -2.5)'
    assert condition_text({"type": "comparison"}) == "{'type': 'comparison'}"


def test_what_another_parser_reads_stays_as_it_is() -> None:
    assert read("a == 1 and b == 2", "pandas") == "a == 1 and b == 2"
    assert whole_condition({"column": "a"}, "here") == {"column": "a"}


@pytest.mark.parametrize(
    "text", ['col("a") == " x" AND col("b") == 1', 'col("a\\tb") == 1', 'col("a") == "x "']
)
def test_what_the_parser_would_change_is_refused(text: str) -> None:
    with pytest.raises(BadConfiguration, match="begins or ends with a space, or holds a tab"):
        read(text.replace("\\t", "\t"))


@pytest.mark.parametrize(
    "text", ['col("a") == 1 AND', "a == 1", '(col("a") == 1)', 'col("a") == 1 col("b") == 2']
)
def test_what_is_not_read_to_its_end_is_refused(text: str) -> None:
    with pytest.raises(BadConfiguration, match=r"^here: row_condition .* is no comparison such as"):
        read(text)
