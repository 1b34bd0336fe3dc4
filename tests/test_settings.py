from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lepton_airflow import settings
from lepton_airflow.errors import BadConfiguration
from lepton_airflow.runners import InProcess, Subprocess, Venv


def test_defaults_need_no_configuration() -> None:
    from airflow.configuration import AIRFLOW_HOME

    assert settings.default_store() == f"{AIRFLOW_HOME}/lepton"
    assert settings.default_ttl_s() is None
    assert settings.default_runner() == Subprocess()


def test_the_lepton_section_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__LEPTON__STORE", "s3://bucket/lepton")
    monkeypatch.setenv("AIRFLOW__LEPTON__CACHE_TTL_S", "3600")
    assert settings.default_store() == "s3://bucket/lepton"
    assert settings.default_ttl_s() == 3600.0


def test_environments_lie_in_the_users_cache_or_where_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings.environments() == tmp_path / "lepton_airflow" / "environments"
    monkeypatch.setenv("AIRFLOW__LEPTON__ENVIRONMENTS", "~/envs")
    assert settings.environments() == Path.home() / "envs"


def test_without_airflow_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__LEPTON__CONSTRAINTS", "pins.txt")
    monkeypatch.setitem(sys.modules, "airflow.configuration", None)
    assert settings.setting("constraints") == "pins.txt"
    assert settings.setting("environments", "here") == "here"


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
    assert settings.default_runner() == runner


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Subproces", "did you mean 'Subprocess'"),
        ("Runner", "Known: .*Subprocess"),
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
        settings.default_runner()


def test_a_ttl_that_is_none_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__LEPTON__CACHE_TTL_S", "1h")
    with pytest.raises(BadConfiguration, match="cache_ttl_s='1h' is not a number of seconds"):
        settings.default_ttl_s()
