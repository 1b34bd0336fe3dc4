"""The page of a comparison, read back as HTML: what was measured, what was decided, and where each speedup lies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lepton_airflow.packaging.compression.compare import Candidate, Comparison
from lepton_airflow.packaging.compression.convert import Graph
from lepton_airflow.packaging.compression.latency import Latency
from lepton_airflow.packaging.compression.quality import Quality
from lepton_airflow.packaging.compression.report import render

FP32 = Candidate(
    "fp32",
    "original",
    "",
    12_345,
    Graph({"Gemm": 3, "Relu": 2}, 3, 0),
    Quality("roc_auc", 0.8, 0.7, 0.9),
    [Latency(1, 20.4, 31.6), Latency(256, 2000.0, 2500.0)],
)
INT8 = Candidate(
    "static_int8",
    "better",
    "2.00 times as fast",
    4_000,
    Graph({"Gemm": 3, "QuantizeLinear": 4}, 3, 3),
    Quality("roc_auc", 0.799, 0.69, 0.89, -0.001, -0.002, 0.0005),
    [Latency(1, 10.2, 15.0, 2.0, 1.9, 2.1), Latency(256, 500.0, 600.0, 4.0, 3.5, 4.5)],
)
FP16 = Candidate("fp16", "failed", "it cannot be made or run: <no kernel>")
FOUND = Comparison("static_int8", "2.00 times as fast", [FP32, INT8, FP16], {})
RECORD: dict[str, Any] = {
    "summary": "Chose static_int8: a < b.",
    "rules": {
        "metric": "roc_auc",
        "positive_class": "late",
        "threshold": 0.5,
        "max_loss": 0.005,
        "min_speedup": 1.1,
        "max_slowdown": 0.03,
        "min_shrink": 2.0,
    },
    "machine": {"cpu": "Some CPU", "flags": ["avx2"], "threads": 1, "rounds": 12},
    "model": {"sha256": "m" * 64},
    "calibration": {"sha256": "c" * 64},
    "dataset": {
        "sha256": "d" * 64,
        "rows": 1200,
        "time_range": ["2013-01-01", "2013-01-31"],
        "cluster_column": "day",
    },
    "versions": {"onnx": "1.18"},
}


@pytest.fixture
def page(read_html: Any) -> Any:
    return read_html(render(RECORD, FOUND))


def test_the_table_holds_every_candidate_with_its_numbers_and_verdict(page: Any) -> None:
    table, operators = page.all("table")
    rows = [[str(cell) for cell in row.all("th") + row.all("td")] for row in table.all("tr")]
    assert rows[0][:4] == ["", "kB", "roc_auc", "difference"]
    assert rows[1:] == [
        ["fp32", "12.3", "0.8000[0.7000, 0.9000]", "", "20, 32", "2,000, 2,500", "original"],
        ["static_int8", "4.0", "0.7990[0.6900, 0.8900]", "-0.0010[-0.0020, +0.0005]", "10, 15", "500, 600",
         "better: 2.00 times as fast"],
        ["fp16", "", "", "", "", "", "failed: it cannot be made or run: <no kernel>"],
    ]  # fmt: skip
    assert [str(row.all("td")[0]) for row in table.all("tr", **{"class": "chosen"})] == ["static_int8"]
    counts = [[str(cell) for cell in row.all("th") + row.all("td")] for row in operators.all("tr")]
    assert counts == [
        ["", "fp32", "static_int8"],
        ["Gemm", "3", "3"],
        ["QuantizeLinear", "0", "4"],
        ["Relu", "2", "0"],
    ]


def test_speedups_lie_at_their_places_on_a_logarithmic_scale(page: Any) -> None:
    (drawing,) = page.all("svg")
    texts = [str(text) for text in drawing.all("text")]
    assert texts == ["1", "1.1", "static_int8, batch 1: 2.00", "static_int8, batch 256: 4.00"]

    def place(speedup: float) -> float:  # between 0.5 and 4.5, the ends of what is shown
        return 270 + 710 * math.log(speedup / 0.5) / math.log(4.5 / 0.5)

    assert [float(c.attributes["cx"]) for c in drawing.all("circle")] == pytest.approx(
        [place(2), place(4)], abs=0.06
    )
    bars = [
        (float(e.attributes["x1"]), float(e.attributes["x2"]))
        for e in drawing.all("line", stroke="var(--bar)")
    ]
    assert bars == [
        pytest.approx((place(1.9), place(2.1)), abs=0.06),
        pytest.approx((place(3.5), place(4.5)), abs=0.06),
    ]


def test_without_a_timed_candidate_there_is_no_drawing(read_html: Any) -> None:
    untimed = replace(FOUND, candidates=[replace(FP32, latency=[]), FP16])
    page = read_html(render(RECORD, untimed))
    assert page.all("svg") == []
    assert [str(e) for e in page.all("h2")] == ["Candidates", "Operators", "How it was measured"]


def test_the_facts_say_how_it_was_measured_and_required(page: Any) -> None:
    facts = dict(zip(map(str, page.all("dt")), map(str, page.all("dd")), strict=True))
    assert facts["CPU"] == "Some CPU (avx2)"
    assert facts["Required"] == (
        "roc_auc not worse by 0.005 (whole interval), nowhere slower by 3%, and 1.1 times as fast or 2 times smaller"
    )
    assert facts["Judged on"] == "1,200 rows, 2013-01-01 to 2013-01-31, dependent by day"
    assert (facts["Model package"], facts["Calibration"], facts["Dataset"]) == ("m" * 64, "c" * 64, "d" * 64)
    assert str(page.all("p")[0]) == "Chose static_int8: a < b."
