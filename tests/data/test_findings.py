"""Findings in words: as much as a receipt has room for, the worst first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lepton_airflow.data.findings import call_text, failure_text, severity


def found(
    result: dict[str, Any] | None = None, severity: str = "critical", error: str = "", **kwargs: Any
) -> Any:
    config = SimpleNamespace(type="expect_x", kwargs=kwargs, severity=severity)
    info = {"raised_exception": bool(error), "exception_message": error}
    return SimpleNamespace(expectation_config=config, result=result or {}, exception_info=info)


def line(*args: Any, **kwargs: Any) -> str:
    return failure_text([found(*args, **kwargs)], 9, "suite 's'").splitlines()[1]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (
            {"unexpected_count": 3, "element_count": 1000, "partial_unexpected_list": [np.int64(7), "a", "a", None]},
            "- expect_x(column='c'): 3 of 1000 (0.3%) unexpected, e.g. 7, 'a', None",
        ),
        ({"unexpected_count": 3}, "- expect_x(column='c'): 3 unexpected"),
        (
            {"details": {"mismatched": {"unexpected": ["b"], "missing": ["a"]}}},
            "- expect_x(column='c'): missing=['a'], unexpected=['b']",
        ),
        ({"observed_value": np.float64(1.5)}, "- expect_x(column='c'): observed 1.5"),
        ({"observed_value": {"a": (1, "x")}}, "- expect_x(column='c'): observed {a=[1, 'x']}"),
        ({}, "- expect_x(column='c')"),
    ],
)  # fmt: skip
def test_each_kind_of_result_has_its_words(result: dict[str, Any], text: str) -> None:
    assert line(result, column="c", batch_id="of no interest") == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ('Error: The column "c d" in BatchData does not exist.', "column 'c d' is not in the data"),
        ("No provider found for x using DuckDBExecutionEngine", "it does not exist for this engine; set engine='pandas'"),
        ("No provider found for x using PandasExecutionEngine", "it does not exist for this engine; set engine='duckdb'"),
        ("(duckdb.OutOfMemoryException) Out of Memory Error: …", "DuckDB needs more memory: raise memory_limit_mb"),
        ("(duckdb.BinderException) no such function\n[SQL: …]", "no such function"),
        ("anything else\nof many lines", "anything else"),
        (f"cannot read '{'Dear Ann ' * 99}' as a number", "cannot read 'Dear Ann Dear Ann Dear Ann Dear Ann Dear…' as a number"),
    ],
)  # fmt: skip
def test_why_an_expectation_could_not_be_evaluated(error: str, text: str) -> None:
    assert line(error=error) == f"- expect_x(): could not be evaluated: {text}"


def test_critical_findings_come_first_and_the_text_fits_into_a_receipt() -> None:
    many = [found({"observed_value": "x" * 500}, severity="warning", column=str(i)) for i in range(30)]
    many.append(found({"observed_value": 1}, column="c"))
    first, second, *lines = failure_text(many, 40, "suite 's'").splitlines()
    assert first == "31 of 40 expectations failed: suite 's'."
    assert second == "- expect_x(column='c'): observed 1"
    assert lines[0].startswith("- [warning] expect_x(column='0'): observed 'xxx")
    assert all(len(text) <= 300 for text in lines)
    assert lines[-1] == f"- and {31 - len(lines)} more, in the full result."
    assert len("\n".join(lines)) < 2300


def test_long_arguments_are_cut() -> None:
    assert call_text("expect_x", {"a": 1, "b": "text"}) == "expect_x(a=1, b='text')"
    assert call_text("expect_x", {"a": "y" * 200}, length=10) == "expect_x(a='yyyyyy…)"
    assert severity(SimpleNamespace(expectation_config=None)) == "critical"  # type: ignore[arg-type]
