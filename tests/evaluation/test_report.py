"""The page of an evaluation, read back as HTML: every number of the result, nothing from elsewhere, nothing of the data's."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.data.features import Feature
from lepton_airflow.evaluation.report import render
from lepton_airflow.packaging.card import ModelCard
from lepton_airflow.statistics import METRICS, metrics_of

CARD = ModelCard(
    task="classification",
    target="late",
    classes=["no", "yes"],
    features=[Feature("hour", "number", "hour"), Feature("origin", "category", "origin")],
    outputs=["probabilities", "label"],
    trainer="mlp",
    framework="torch",
    hyperparameters={"layers": 2, "rate": 0.1},
    seed=0,
    window={"start": "2013-01-01", "end": "2013-04-01"},
)


def result(**changes: Any) -> dict[str, Any]:
    """What metrics.json holds for 1,200 rows."""
    metrics = {name: {"value": 0.5, "low": 0.25, "high": 0.75} for name in metrics_of("classification")}
    dataset = {
        "rows": 1200,
        "time_range": ["2013-05-01", "2013-05-31"],
        "sha256": "d" * 64,
        "cluster_column": "day",
    }
    return {
        "summary": "ROC AUC 0.500.",
        "metrics": metrics,
        "intervals": "95%, bootstrap over rows.",
        "slices": {},
        "threshold": 0.5,
        "dataset": dataset,
        "model": {"sha256": "m" * 64},
    } | changes


@pytest.fixture
def read(read_html: Callable[[str], Any]) -> Callable[..., Any]:
    """``read(pictures, card, **changes)``: the page of that result, as a tree."""

    def call(pictures: Sequence[Path] = (), card: ModelCard = CARD, **changes: Any) -> Any:
        return read_html(render(result(**changes), card, pictures))

    return call


def test_every_metric_has_a_card_with_its_title_value_and_interval(read: Any) -> None:
    values = {name: i / 10 for i, name in enumerate(metrics_of("classification"))}
    metrics = {n: {"value": v, "low": v - 0.0421, "high": v + 0.0421} for n, v in values.items()}
    cards = read(metrics=metrics).all("div", **{"class": "metric"})
    shown = [[str(part) for part in (card.all("span") + card.all("b"))] for card in cards]
    about = {"precision", "recall", "f1"}  # of the positive class
    assert shown == [
        [
            METRICS[n].title + (" of yes" if n in about else ""),
            f"{v - 0.0421:.3f} to {v + 0.0421:.3f}",
            f"{v:.3f}",
        ]
        for n, v in values.items()
    ]


def test_only_shares_have_a_bar_and_it_lies_where_the_interval_is(read: Any) -> None:
    cards = read(
        metrics={
            "roc_auc": {"value": 0.7, "low": 0.65, "high": 0.72},
            "f1": {"value": 0.99, "low": 0.98, "high": 1.02},
            "recall": {"value": 0.0, "low": -0.1, "high": 0.001},
            "log_loss": {"value": 0.7, "low": 0.6, "high": 0.8},
        }
    ).all("div", **{"class": "metric"})
    bars = [[(e.tag, e.attributes["style"]) for e in card.all("i") + card.all("u")] for card in cards]
    assert bars == [
        [("i", "left:65.0%;width:7.0%"), ("u", "left:70.0%")],
        [("i", "left:98.0%;width:2.0%"), ("u", "left:99.0%")],  # an end beyond the scale stays on it
        [("i", "left:0.0%;width:0.5%"), ("u", "left:0.0%")],  # and a short one can still be seen
        [],
    ]


def test_a_metric_without_value_or_interval_says_so_and_large_numbers_are_grouped(read: Any) -> None:
    cards = read(
        metrics={
            "roc_auc": {"value": None, "low": None, "high": None},
            "mae": {"value": 12345.678, "low": None, "high": None},
        }
    ).all("div", **{"class": "metric"})
    assert [str(card) for card in cards] == ["ROC AUC–", "MAE12,346"]


def test_slices_are_a_table_with_the_interval_at_the_main_metric(read: Any) -> None:
    rows = [
        {
            "slice": "JFK",
            "rows": 1000,
            "metrics": {"roc_auc": 0.7, "f1": 0.5},
            "interval": {"metric": "roc_auc", "low": 0.6, "high": 0.8},
        },
        {"slice": "(missing)", "rows": 1, "metrics": {"roc_auc": None, "f1": 0.0}, "interval": None},
    ]
    page = read(slices={"origin": rows})
    assert "By origin" in [str(e) for e in page.all("h2")]
    table = [[str(cell) for cell in row.all("th") + row.all("td")] for row in page.all("tr")]
    assert table == [
        ["", "Rows", "ROC AUC", "F1"],
        ["JFK", "1,000", "0.700 [0.600, 0.800]", "0.500"],
        ["(missing)", "1", "–", "0.000"],
    ]


def test_the_facts_say_which_model_and_which_rows(read: Any) -> None:
    page = read()
    facts = dict(zip(map(str, page.all("dt")), map(str, page.all("dd")), strict=True))
    assert facts == {
        "Trainer": "mlp (torch)",
        "Task": "classification, classes no, yes",
        "Positive class": "yes, predicted from a probability of 0.5 on",
        "Features": "hour, origin",
        "Hyperparameters": "layers=2, rate=0.1",
        "Model window": "2013-01-01 to 2013-04-01",
        "Model package": "m" * 64,
        "Rows evaluated": "1,200, 2013-05-01 to 2013-05-31",
        "Dataset": "d" * 64,
        "Dependent rows": "by day",
    }


def test_a_refit_is_said_with_what_was_settled(read: Any) -> None:
    def fitted_on(settled: dict[str, Any]) -> str:
        page = read(card=replace(CARD, refit={"rows": "train+valid", "settled": settled}))
        facts = dict(zip(map(str, page.all("dt")), map(str, page.all("dd")), strict=True))
        return facts["Fitted on"]

    assert fitted_on({"epochs": 7}) == "train+valid, with epochs=7 as early stopping on valid had settled"
    assert fitted_on({}) == "train+valid"


def test_pictures_are_in_the_page_byte_for_byte_and_nothing_comes_from_elsewhere(
    read: Any, tmp_path: Path
) -> None:
    picture = tmp_path / "precision_recall.png"
    picture.write_bytes(b"\x89PNG the bytes of a picture")
    page = read([picture])
    (image,) = page.all("img")
    source = image.attributes["src"] or ""
    assert image.attributes["alt"] == "precision recall"
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == picture.read_bytes()
    for tag in ("link", "script", "iframe", "object"):
        assert page.all(tag) == []
    (style,) = page.all("style")
    assert "url(" not in str(style)
    assert "@import" not in str(style)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b < c"])
def test_text_of_the_data_stays_text(read: Any, text: str) -> None:
    card = ModelCard(
        task="classification",
        target=text,
        classes=["other", text],
        features=[Feature(text, "category", "x")],
        outputs=[],
        trainer=text,
        framework=text,
        hyperparameters={text: text},
        seed=0,
    )
    row = {"slice": text, "rows": 1, "metrics": {"roc_auc": 0.5}, "interval": None}
    page = read(card=card, summary=text, intervals=text, slices={text: [row]})
    assert page.all("script") == page.all("img") == []
    assert str(page.all("title")[0]) == f"Evaluation: {text}"
    assert str(page).count(text) == 16
