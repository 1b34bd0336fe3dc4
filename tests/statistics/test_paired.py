"""The paired test: against slow references, and by simulation (type-I error, power, and what clusters change)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from lepton_airflow.errors import BadConfiguration, BadInput
from lepton_airflow.statistics import (
    METRICS,
    classification_metrics,
    metrics_of,
    paired_test,
    paired_verdict,
    regression_metrics,
)

RUNS = 400


def slow_components(y, p):
    """DeLong's structural components by comparing every positive with every negative."""
    won = (p[y == 1][:, None] > p[y == 0]) + 0.5 * (p[y == 1][:, None] == p[y == 0])
    return won.mean(axis=1), won.mean(axis=0)


def standard_error(result):
    return (result.high - result.low) / 2 / stats.t.ppf((1 + result.confidence) / 2, result.df)


def test_delong_agrees_with_all_pairs(simulation):
    y, signal = simulation.outcome(np.arange(300))
    champion = (signal + simulation.rng.normal(size=300)).round(1)  # rounded: with ties
    candidate = (signal + simulation.rng.normal(size=300)).round(1)
    positive, negative = (
        after - before
        for before, after in zip(slow_components(y, champion), slow_components(y, candidate), strict=True)
    )
    error = np.sqrt(positive.var(ddof=1) / len(positive) + negative.var(ddof=1) / len(negative))

    found = paired_test(y, champion, candidate)

    assert found.difference == pytest.approx(positive.mean())
    assert found.champion == pytest.approx(slow_components(y, champion)[0].mean())
    assert standard_error(found) == pytest.approx(error)
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(found.difference) / error, found.df))
    assert found.n_clusters is None


def test_clustered_auc_agrees_with_obuchowski(simulation):
    day = simulation.days(12, 40)
    # Every day has as many positives, so all small-sample factors are 12 / 11.
    y = np.tile([1] * 10 + [0] * 30, 12)
    champion, candidate = simulation.rng.normal(y[None, :] * 0.5, 1, (2, len(y)))
    candidate += simulation.rng.normal(0, 0.5, 12)[day]
    sums = {}
    for label, before, after in zip(
        (1, 0), slow_components(y, champion), slow_components(y, candidate), strict=True
    ):
        part = after - before
        sums[label] = np.bincount(day[y == label], weights=part - part.mean()) / len(part)
    error = np.sqrt(12 / 11 * np.square(sums[1] + sums[0]).sum())

    found = paired_test(y, champion, candidate, clusters=day)

    assert standard_error(found) == pytest.approx(error)
    assert found.n_clusters == 12
    assert found.df == pytest.approx(11)


def test_mean_losses_without_clusters_are_the_paired_t_test(simulation):
    y, signal = simulation.outcome(np.arange(200))
    champion, candidate = (simulation.model(np.arange(200), signal) for _ in range(2))
    expected = stats.ttest_rel(np.square(y - champion), np.square(y - candidate))
    interval = expected.confidence_interval(0.9)

    found = paired_test(y, champion, candidate, metric="brier", confidence=0.9)

    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_equal_clusters_are_a_t_test_on_cluster_means(simulation):
    day = simulation.days(8, 50)
    y, signal = simulation.outcome(day)
    champion, candidate = (simulation.model(day, signal) for _ in range(2))
    means = (np.square(y - champion) - np.square(y - candidate)).reshape(8, 50).mean(axis=1)

    found = paired_test(y, champion, candidate, metric="brier", clusters=day)

    assert found.p_value == pytest.approx(stats.ttest_1samp(means, 0).pvalue)


@pytest.mark.parametrize(
    ("metric", "classes"),
    [
        *((m, 2) for m in metrics_of("classification")),
        *((m, 3) for m in metrics_of("classification")),
        *((m, None) for m in metrics_of("regression")),
    ],
)
def test_values_are_those_of_the_metrics_and_the_error_that_of_the_jackknife(simulation, metric, classes):
    day = simulation.days(60, 30)
    n = len(day)
    if classes is None:
        y = simulation.rng.normal(size=n)
        champion, candidate = y + simulation.rng.normal(0, 0.7, (2, n))
        point = regression_metrics
    elif classes == 2:
        y, signal = simulation.outcome(day)
        champion, candidate = (simulation.model(day, signal, spread=0.2) for _ in range(2))
        point = classification_metrics
    else:
        y = simulation.rng.integers(0, 3, n)
        champion, candidate = (simulation.rng.dirichlet(np.ones(3), n) for _ in range(2))
        candidate = 0.7 * candidate + 0.3 * np.eye(3)[y]
        point = classification_metrics

    found = paired_test(y, champion, candidate, metric=metric, clusters=day)

    before, after = point(y, champion)[metric], point(y, candidate)[metric]
    assert (found.champion, found.candidate) == pytest.approx((before, after))
    assert found.difference == pytest.approx(
        (after - before) * (1 if METRICS[metric].higher_is_better else -1)
    )
    # An independent way to the same standard error: leave out one day at a time (Efron & Tibshirani 1993).
    without = [
        point(y[day != d], candidate[day != d])[metric] - point(y[day != d], champion[day != d])[metric]
        for d in range(60)
    ]
    assert standard_error(found) == pytest.approx(np.sqrt(59 * np.var(without)), rel=0.05)


@pytest.mark.parametrize(
    ("count", "rows", "unequal", "metric", "at_least"),
    [
        (30, 60, False, "roc_auc", 0.05),
        (8, 100, False, "roc_auc", 0.05),
        (8, 100, False, "log_loss", 0.05),
        (30, 60, False, "f1", 0.05),
        (30, 60, True, "roc_auc", 0.02),  # conservative where a few days hold most rows
        (300, 1, False, "roc_auc", 0.05),
    ],
)
def test_equally_good_models_are_told_apart_at_the_nominal_rate(
    simulation, chance, count, rows, unequal, metric, at_least
):
    rejected = 0
    for _ in range(RUNS):
        day = simulation.days(count, rows, unequal)
        y, signal = simulation.outcome(day)
        champion, candidate = (simulation.model(day, signal) for _ in range(2))
        clusters = None if rows == 1 else day
        rejected += paired_test(y, champion, candidate, metric, clusters).p_value < 0.05
    assert at_least - chance(at_least, RUNS) <= rejected / RUNS <= 0.05 + chance(0.05, RUNS)


def test_ignoring_the_days_finds_differences_that_are_not_there(simulation):
    rejected = 0
    for _ in range(100):
        day = simulation.days(30, 60)
        y, signal = simulation.outcome(day)
        champion, candidate = (simulation.model(day, signal) for _ in range(2))
        rejected += paired_test(y, champion, candidate, "roc_auc").p_value < 0.05
    assert rejected > 15


@pytest.mark.parametrize("metric", ["roc_auc", "log_loss", "f1"])
def test_a_better_candidate_is_found(simulation, metric):
    decisions = []
    for _ in range(60):
        day = simulation.days(30, 60)
        y, signal = simulation.outcome(day)
        champion = simulation.model(day, signal, slope=0.2, spread=0.2)
        candidate = simulation.model(day, signal, slope=0.9, spread=0.2)
        decisions.append(paired_verdict(paired_test(y, champion, candidate, metric, day)).decision)
        assert paired_verdict(paired_test(y, candidate, champion, metric, day)).decision != "promote"
    assert decisions.count("promote") >= 50


def test_the_p_value_and_the_interval_agree_on_the_required_effect(simulation):
    day = simulation.days(20, 30)
    y, signal = simulation.outcome(day)
    champion, candidate = (simulation.model(day, signal) for _ in range(2))
    found = paired_test(y, champion, candidate, clusters=day)
    for edge in (found.low, found.high):
        assert paired_test(y, champion, candidate, clusters=day, min_effect=edge).p_value == pytest.approx(
            0.05
        )


def test_swapping_the_models_turns_the_result_round(simulation):
    day = simulation.days(20, 30)
    y, signal = simulation.outcome(day)
    one, other = (simulation.model(day, signal) for _ in range(2))
    there, back = (paired_test(y, a, b, "log_loss", day) for a, b in ((one, other), (other, one)))
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-there.difference, -there.high, -there.low)
    )
    assert back.p_value == pytest.approx(there.p_value)


@pytest.mark.parametrize("metric", metrics_of("classification"))
def test_a_model_against_itself_is_held(simulation, metric):
    day = simulation.days(8, 40)
    y, signal = simulation.outcome(day)
    p = simulation.model(day, signal)
    found = paired_test(y, p, p, metric, day)
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert paired_verdict(found).decision == "hold"


def test_the_verdict_follows_the_interval_and_says_so(simulation):
    day = simulation.days(30, 60)
    y, signal = simulation.outcome(day)
    found = paired_test(y, simulation.model(day, signal), simulation.model(day, signal), clusters=day)
    found = dataclasses.replace(
        found,
        champion=0.668,
        candidate=0.712,
        difference=0.044,
        low=0.036,
        high=0.052,
        n=27161,
        n_clusters=30,
    )
    assert paired_verdict(found).sentence == (
        "promote: ROC AUC 0.712 against 0.668 of the champion on 27,161 rows in 30 clusters; "
        "the difference +0.044 has the 95% interval [+0.036, +0.052], above the required +0.000."
    )
    assert paired_verdict(found, min_effect=0.04).decision == "hold"
    assert "does not lie above the required +0.040" in paired_verdict(found, min_effect=0.04).sentence
    worse = dataclasses.replace(
        found, metric="log_loss", difference=-0.02, low=-0.03, high=-0.01, n_clusters=None
    )
    assert paired_verdict(worse).decision == "reject"
    assert "27,161 rows; the difference -0.020 (positive is better)" in paired_verdict(worse).sentence
    assert paired_verdict(worse, min_effect=-0.05).decision == "promote"  # a non-inferiority margin


@pytest.mark.parametrize(("positives", "negatives"), [(2, 2), (3, 3), (4, 4), (6, 6), (3, 20), (2, 60)])
def test_few_rows_are_told_apart_no_more_often_than_many(chance, positives, negatives):
    """Scores drawn at random, against a champion that says the same of every row: where the error is often estimated as 0."""
    draw, runs = np.random.default_rng(positives + 100 * negatives), 1000
    y = np.repeat([1, 0], [positives, negatives])
    champion = np.full(len(y), 0.5)
    promoted = [
        paired_verdict(paired_test(y, champion, draw.random(len(y)))).decision == "promote"
        for _ in range(runs)
    ]
    assert np.mean(promoted) <= 0.05 + chance(
        0.05, runs
    )  # nominal is 0.025; the t quantiles are not exact for so few


@pytest.mark.parametrize(
    ("rows", "metric", "decision"),
    [(2, "brier", "hold"), (5, "accuracy", "hold"), (6, "accuracy", "promote")],
)
def test_so_few_rows_decide_nothing_though_all_agree(rows, metric, decision):
    y = np.arange(rows) % 2
    found = paired_test(y, np.where(y, 0.4, 0.6), np.where(y, 0.9, 0.1), metric)
    verdict = paired_verdict(found)
    assert verdict.decision == decision
    assert found.p_value == 2.0 ** (1 - rows)
    if decision == "hold":
        assert (found.low, found.high, found.enough) == (-np.inf, np.inf, 6)
        assert verdict.sentence.endswith(
            "is of too few rows to be told from chance at 95%: at least 6 rows could; widen the window."
        )


def test_too_few_clusters_or_labels_are_named():
    y, p = np.arange(40) % 2, np.linspace(0.1, 0.9, 40)
    found = paired_test(y, p, 0.9 * y, "log_loss", clusters=np.arange(40) // 8, confidence=0.99)
    assert "at 99%: at least 8 clusters could" in paired_verdict(found).sentence
    found = paired_test([1, 1, 0, 0], [0.5] * 4, [0.9, 0.8, 0.2, 0.1])
    assert "at least 4 rows of each label could" in paired_verdict(found).sentence


def test_the_digits_show_what_was_compared(simulation):
    day = simulation.days(10, 10)
    y, signal = simulation.outcome(day)
    found = paired_test(y, simulation.model(day, signal), simulation.model(day, signal), clusters=day)
    close = dataclasses.replace(found, difference=0.0012, low=0.0003, high=0.0021)
    assert "[+0.0003, +0.0021], above the required +0.0000" in paired_verdict(close).sentence
    below = dataclasses.replace(found, difference=-0.001, low=-0.002, high=-0.00004)
    assert "[-0.00200, -0.00004], below zero" in paired_verdict(below).sentence


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"y": [0, 0, 0, 0]}, "all 4 rows have the label 0"),
        ({"y": [0, 0, 0, 0], "metric": "recall"}, "none of the 4 rows is labelled 1"),
        ({"y": [0, 0, 1, 0]}, r"a class\) has a single row, expected at least 2 rows"),
        ({"clusters": ["a", "b", "c", "b"]}, "has 2 rows, all in one cluster, expected at least 2 clusters"),
        ({"clusters": ["a", "a", "a", "a"]}, "expected at least 2 clusters"),
        ({"p_candidate": [0.1, np.nan, 0.3, 0.4]}, "1 of 4 values are missing"),
        ({"p_candidate": [0.1, 0.2]}, "expected one label per row"),
        ({"p_candidate": np.full((4, 3), 1 / 3)}, "of the candidate differ"),
        ({"y": [1.0, 1.0, 1.0, 1.0], "metric": "r2"}, "all 4 targets are 1"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_sentence(change, sentence):
    fine = {"y": [0, 1, 0, 1], "p_champion": [0.1, 0.2, 0.3, 0.4], "p_candidate": [0.4, 0.6, 0.1, 0.7]}
    paired_test(**fine)
    with pytest.raises(BadInput, match=sentence):
        paired_test(**(fine | change))


def test_a_wrong_setting_is_refused():
    with pytest.raises(BadConfiguration, match="did you mean 'roc_auc'"):
        paired_test([0, 1], [0.1, 0.2], [0.1, 0.2], metric="rocauc")
    with pytest.raises(BadConfiguration, match="confidence=95"):
        paired_test([0, 1], [0.1, 0.2], [0.1, 0.2], confidence=95)
    for nothing in (np.nan, np.inf):
        with pytest.raises(BadConfiguration, match=f"min_effect={nothing}, expected a difference"):
            paired_test([0, 1] * 9, [0.1, 0.2] * 9, [0.1, 0.3] * 9, min_effect=nothing)
    found = paired_test([0, 1] * 9, [0.1, 0.2] * 9, [0.1, 0.3] * 9)
    with pytest.raises(BadConfiguration, match="min_effect=nan, expected a difference"):
        paired_verdict(found, min_effect=float("nan"))
