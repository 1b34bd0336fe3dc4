"""What the installation's configuration makes of a runner."""

from __future__ import annotations

import pytest

from lepton_airflow.errors import BadConfiguration
from lepton_airflow.runners import InProcess, Subprocess, Venv, default_runner


def test_without_configuration_stages_run_in_a_process_of_the_worker() -> None:
    assert default_runner() == Subprocess()


@pytest.mark.parametrize(
    ("text", "runner"),
    [
        ("InProcess", InProcess()),
        (
            '{"Subprocess": {"memory_limit_mb": 4096, "grace_s": 5}}',
            Subprocess(memory_limit_mb=4096, grace_s=5),
        ),
        ("Venv", Venv()),
        ('{"Venv": {"extras": "train", "requirements": ["toolz"]}}', Venv("train", requirements=["toolz"])),
    ],
)
def test_runner(monkeypatch: pytest.MonkeyPatch, text: str, runner: object) -> None:
    monkeypatch.setenv("AIRFLOW__LEPTON__RUNNER", text)
    assert default_runner() == runner


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Subproces", "did you mean 'Subprocess'"),
        ("Runner", "known: .*Subprocess"),
        ('{"Subprocess": {"memory": 1}}', "memory"),
        ('{"Subprocess": {"memory_limit_mb": 1}}', "at least 64 MiB"),
        ('{"Subprocess": {"grace_s": -1}}', "zero or more"),
        ('{"Subprocess": 3}', "runner="),
        ('{"Venv": {"extras": "trian"}}', "did you mean 'train'"),
        ('{"Venv": {"extra": "train"}}', "extra"),
        ('{"Subprocess"', "expected a name such as Subprocess"),
        ('{"Subprocess": {}, "InProcess": {}}', "expected a name such as Subprocess"),
    ],
)
def test_a_runner_that_is_none_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, text: str, sentence: str
) -> None:
    monkeypatch.setenv("AIRFLOW__LEPTON__RUNNER", text)
    with pytest.raises(BadConfiguration, match=sentence):
        default_runner()
