from __future__ import annotations

import re

import pytest

from lepton_airflow import errors
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError, MissingExtra, Preempted, Skipped


def _kinds() -> dict[str, type[LeptonError]]:
    return {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, LeptonError)
    }


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = {
        name: (depth, int(code))
        for depth, name, code in re.findall(
            r"^    ([│ ├└─]*)(\w+) +(\d+)  ", errors.__doc__ or "", re.MULTILINE
        )
    }
    assert {name: code for name, (_, code) in drawn.items()} == {n: k.exit_code for n, k in _kinds().items()}
    assert {name: len(depth) // 4 for name, (depth, _) in drawn.items()} == {
        n: k.__mro__.index(LeptonError) for n, k in _kinds().items()
    }


@pytest.mark.parametrize("kind", sorted(_kinds()))
def test_a_recorded_error_comes_back_as_its_kind(kind: str) -> None:
    error = errors.from_record(kind, "the sentence", _kinds()[kind].exit_code)
    assert type(error) is _kinds()[kind]
    assert str(error) == "the sentence"


@pytest.mark.parametrize(
    ("exit_code", "kind"),
    [(80, BadInput), (75, Preempted), (99, Skipped), (1, LeptonError), (7, LeptonError)],
)
def test_a_kind_unknown_here_still_tells_whether_to_retry(exit_code: int, kind: type[LeptonError]) -> None:
    assert type(errors.from_record("SomebodysError", "x", exit_code)) is kind


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("connection to server at 10.0.0.7 failed: Connection refused", True),
        ("could not translate host name: Temporary failure in name resolution", True),
        ("FATAL: the database system is starting up", True),
        ("FATAL: sorry, too many clients already", True),
        ("database is locked", True),
        ("Please reduce your request rate: SlowDown", True),
        ("HTTP 429: Too Many Requests", True),
        ("error sending request for url", True),
        ("FATAL: password authentication failed for user me", False),
        ('relation "orders" does not exist', False),
        ("no such bucket", False),
    ],
)
def test_what_may_be_over_at_the_next_try_is_told_from_what_stays_wrong(message: str, wanted: bool) -> None:
    assert errors.is_transient(message) is wanted


def test_did_you_mean() -> None:
    assert errors.did_you_mean("hyperparams", ["target", "hyperparameters"]).startswith(
        "did you mean 'hyperparameters'?"
    )
    assert errors.did_you_mean("BAD", ["bad", "good"]) == "did you mean 'bad'? Known: bad, good."
    assert errors.did_you_mean("zzz", ["b", "a"]) == "known: a, b."
    assert errors.did_you_mean("zzz", []) == "known: none."


def test_missing_extra_says_what_where_and_how(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_engine").mkdir()  # a folder of that name would import as an empty namespace package
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        MissingExtra, match=r"TrainModel needs no_such_engine, .*pip install 'lepton-airflow\[train\]'"
    ):
        errors.require("no_such_engine", "TrainModel", "train")
    assert issubclass(MissingExtra, BadConfiguration)
    errors.require("fsspec", "the store", "s3")
