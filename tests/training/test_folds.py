"""Which rows are held out together: every rule of folds, on rows that can be counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadConfiguration, BadInput
from lepton_airflow.packaging.schema import Schema
from lepton_airflow.training.folds import make_folds
from lepton_airflow.training.rows import Rows


def rows(y: Any, *, task: str = "classification", clusters: Any = None, moments: Any = None) -> Rows:
    info = DatasetInfo(target="y", task=task, cluster_column="day" if clusters is not None else None)
    return Rows(
        "train",
        info,
        Schema([], task, []),
        pd.DataFrame({"y": y}),
        None if clusters is None else np.asarray(clusters),
        None if moments is None else np.asarray(moments),
    )


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("clustered", [True, False])
def test_every_row_is_held_out_once_and_clusters_stay_whole(task: str, clustered: bool) -> None:
    y = np.arange(60) % 3
    clusters = np.arange(60) // 4
    folds = make_folds(rows(y, task=task, clusters=clusters if clustered else None), 5, "row", seed=0)
    assert sorted(np.concatenate([held for _, held in folds])) == list(range(60))
    for train, held in folds:
        assert sorted([*train, *held]) == list(range(60))
        if clustered:
            assert not set(clusters[train]) & set(clusters[held])


def test_classes_have_their_shares_in_every_fold() -> None:
    folds = make_folds(rows(np.repeat([0, 1], [90, 10])), 5, "row", seed=0)
    y = np.repeat([0, 1], [90, 10])
    assert [int(y[held].sum()) for _, held in folds] == [2] * 5


def test_folds_depend_on_the_seed_alone() -> None:
    def held(seed: int) -> list[list[int]]:
        return [h.tolist() for _, h in make_folds(rows(np.arange(40) % 2), 4, "row", seed)]

    assert held(1) == held(1) != held(2)


def test_classes_that_are_all_rarer_than_folds_are_split_without_strata() -> None:
    folds = make_folds(rows(np.arange(12) % 4), 4, "row", seed=0)  # three rows of each class
    assert sorted(np.concatenate([held for _, held in folds])) == list(range(12))


def test_no_fold_by_time_sees_its_future() -> None:
    moments = np.random.default_rng(0).permutation(np.arange(100) // 5)
    folds = make_folds(rows(np.arange(100) % 2, moments=moments), 4, "time", seed=0)
    assert len(folds) == 4
    for train, held in folds:
        assert moments[train].max() < moments[held].min()
    held_out = np.concatenate([held for _, held in folds])
    assert len(set(held_out)) == len(held_out) == 80
    assert moments.min() not in moments[held_out]  # the first of the five blocks is never held out
    assert {len(held) for _, held in folds} == {20}


def test_equal_times_are_never_on_both_sides() -> None:
    moments = np.repeat([0, 1, 2, 3], [40, 20, 20, 20])  # a third of the rows ends inside the first time
    for train, held in make_folds(rows(np.arange(100) % 2, moments=moments), 2, "time", seed=0):
        assert not set(moments[train]) & set(moments[held])


@pytest.mark.parametrize("kind", ["datetime64[ns]", "date", "zone"])
def test_a_fold_by_time_does_not_train_on_labels_that_reach_into_it(kind: str) -> None:
    moments = pd.Series(pd.date_range("2024-01-01", periods=40, freq="D"))
    moments = {"date": moments.dt.date, "zone": moments.dt.tz_localize("UTC")}.get(kind, moments)
    data = rows(np.arange(40) % 2, moments=moments.to_numpy())
    data = replace(data, info=replace(data.info, label_horizon_s=3 * 86400.0))
    for train, held in make_folds(data, 3, "time", seed=0):
        assert (
            train.max() == held.min() - 4
        )  # the label of the day three before is known on the first day held out


def test_a_fold_by_time_trains_on_clusters_that_are_known() -> None:
    data = rows(np.arange(40) % 2, clusters=np.arange(40) % 4, moments=np.arange(40) // 4)
    data = replace(data, info=replace(data.info, known_clusters=True))
    for train, _ in make_folds(data, 3, "time", seed=0):
        assert set(train % 4) == {0, 1, 2, 3}


def test_a_fold_by_time_does_not_train_on_the_clusters_that_it_holds_out() -> None:
    moments, clusters = np.arange(60), np.arange(60) % 10
    clusters[20:40] = 99  # one cluster reaches over a cut
    folds = make_folds(rows(np.arange(60) % 2, moments=moments, clusters=clusters), 3, "time", seed=0)
    for train, held in folds:
        assert len(train)
        assert not set(clusters[train]) & set(clusters[held])


@pytest.mark.parametrize(
    ("about", "folds", "fold_by", "message"),
    [
        ({}, 1, "row", "folds=1: expected at least 2"),
        ({"y": [0, 1, 0]}, 4, "row", "3 rows cannot be split into folds=4"),
        ({"clusters": np.arange(20) // 10}, 3, "row", "2 values of cluster column 'day' cannot be split into folds=3"),
        ({}, 3, "time", "fold_by='time' needs a time column"),
        ({"moments": np.repeat([0, 1], 10)}, 3, "time", "fold 1 of 3 is empty; set fewer folds"),
        (
            {"y": np.repeat([0, 1], 10), "moments": np.arange(20)},
            3,
            "time",
            "fold 1 of 3 leaves one class only to train on; set fewer folds or fold_by='row'",
        ),
        ({"y": [0] * 19 + [1]}, 2, "row", r"fold \d of 2 leaves one class only to train on; set fewer folds\."),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_split_get_a_sentence(
    about: dict[str, Any], folds: int, fold_by: Any, message: str
) -> None:
    with pytest.raises((BadInput, BadConfiguration), match=message):
        make_folds(rows(**{"y": np.arange(20) % 2} | about), folds, fold_by, seed=0)
