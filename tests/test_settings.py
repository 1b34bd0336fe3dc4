from __future__ import annotations

import sys

import pytest

from lepton_airflow import settings
from lepton_airflow.errors import BadConfiguration


def test_defaults_need_no_configuration() -> None:
    from airflow.configuration import AIRFLOW_HOME

    assert settings.default_store() == f"{AIRFLOW_HOME}/lepton"
    assert settings.default_ttl_s() is None


def test_the_lepton_section_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__LEPTON__STORE", "s3://bucket/lepton")
    monkeypatch.setenv("AIRFLOW__LEPTON__CACHE_TTL_S", "3600")
    assert settings.default_store() == "s3://bucket/lepton"
    assert settings.default_ttl_s() == 3600.0


def test_without_airflow_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__LEPTON__CONSTRAINTS", "pins.txt")
    monkeypatch.setitem(sys.modules, "airflow.configuration", None)
    assert settings.setting("constraints") == "pins.txt"
    assert settings.setting("environments", "here") == "here"


def test_a_ttl_that_is_none_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__LEPTON__CACHE_TTL_S", "1h")
    with pytest.raises(BadConfiguration, match="cache_ttl_s='1h' is not a number of seconds"):
        settings.default_ttl_s()
