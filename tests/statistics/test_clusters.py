"""Which rows belong together: keys of any type, and none missing."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest

from lepton_airflow.errors import BadInput
from lepton_airflow.statistics.clusters import cluster_codes


@pytest.mark.parametrize(
    "keys",
    [
        ["b", "a", "b"],
        [2, 1, 2],
        np.array(["2013-01-02", "2013-01-01", "2013-01-02"], dtype="datetime64[D]"),
        np.array([dt.date(2013, 1, 2), dt.date(2013, 1, 1), dt.date(2013, 1, 2)]),
        np.array(["b", 1, "b"], dtype=object),
    ],
)
def test_clusters_may_have_any_keys(keys):
    codes, count = cluster_codes(keys, 3)
    assert count == 2
    assert codes[0] == codes[2] != codes[1]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["a", "a", "a"], "all 3 rows have the key a"),
        (["a", "b"], "expected one key per row"),
        (np.array(["a", None, "b"], dtype=object), "1 of 3 keys are missing, first in row 1"),
        ([1.0, 2.0, np.nan], "first in row 2"),
        (np.array(["2013-01-02", "NaT", "NaT"], dtype="datetime64[D]"), "2 of 3 keys are missing"),
    ],
)
def test_bad_clusters_are_refused_in_one_sentence(keys, sentence):
    with pytest.raises(BadInput, match=sentence):
        cluster_codes(keys, 3)


def test_pandas_missing_keys_are_seen():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(BadInput, match="1 of 3 keys are missing"):
        cluster_codes(pandas.array(["a", None, "b"], dtype="string"), 3)
