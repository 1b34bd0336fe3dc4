"""Two Airflows on one store are told apart. (With a real Airflow: ``tests/dags/test_on_airflow.py``.)"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import airflow.sdk
import pytest

from lepton_airflow.airflow.installation import VARIABLE, check_deployment
from lepton_airflow.errors import BadConfiguration
from lepton_airflow.store import Store
from lepton_airflow.store.identity import owner_of


class Variables:
    """The Variables of one Airflow, in place of those that a task asks the API server for."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def get(self, key: str, default: Any = None) -> Any:
        time.sleep(0.002)
        return self.kept.get(key, default)

    def set(self, key: str, value: str, description: str = "") -> None:
        time.sleep(0.002)
        self.kept[key] = value


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``use(variables)``: from here on this is a task of the Airflow with these."""
    monkeypatch.setattr("lepton_airflow.airflow.installation._LOOKS", (0.0, 0.02))
    monkeypatch.setattr(airflow.sdk, "get_current_context", dict)
    return lambda variables: monkeypatch.setattr(airflow.sdk, "Variable", variables)


def test_the_second_airflow_is_refused_until_it_has_a_name_of_its_own(tmp_path: Path, use: Any) -> None:
    store = Store(str(tmp_path / "store"))
    one, other = Variables(), Variables()
    use(one)
    for _ in range(2):
        check_deployment(store, "airflow")
    check_deployment(store, "airflow of the night")
    check_deployment(Store(str(tmp_path / "another")), "airflow")
    assert set(one.kept) == {VARIABLE}

    use(other)
    for _ in range(2):
        with pytest.raises(
            BadConfiguration, match=r"deployment='airflow'.* set \[lepton\] deployment to ano"
        ):
            check_deployment(store, "airflow")
    check_deployment(store, "staging")
    assert other.kept[VARIABLE] != one.kept[VARIABLE]
    use(one)
    check_deployment(store, "airflow")
    with pytest.raises(BadConfiguration, match="another Airflow"):
        check_deployment(store, "staging")


def test_an_airflow_with_a_new_database_says_who_it_is(tmp_path: Path, use: Any) -> None:
    store, fresh = Store(str(tmp_path)), Variables()
    use(Variables())
    check_deployment(store, "airflow")
    use(fresh)
    owner = owner_of(store, "airflow")
    with pytest.raises(BadConfiguration, match=f"set its Variable {VARIABLE} to {owner}"):
        check_deployment(store, "airflow")
    fresh.kept[VARIABLE] = str(owner)
    check_deployment(store, "airflow")


def test_tasks_that_are_the_first_at_the_same_time_agree(
    tmp_path: Path, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lepton_airflow.airflow.installation._LOOKS", (0.0, 0.2, 0.5, 1.0))
    for attempt in range(5):
        store, refused = Store(str(tmp_path / str(attempt))), []

        def task(store: Store = store, refused: list[str] = refused) -> None:
            try:
                check_deployment(store, "airflow")
            except BadConfiguration as error:
                refused.append(str(error))

        use(variables := Variables())
        tasks = [threading.Thread(target=task) for _ in range(8)]
        for each in tasks:
            each.start()
        for each in tasks:
            each.join()
        assert refused == []
        assert owner_of(store, "airflow") == variables.kept[VARIABLE]


def test_a_variable_that_cannot_be_read_is_warned_of(
    tmp_path: Path, use: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Denied(Variables):
        def get(self, key: str, default: Any = None) -> Any:
            raise PermissionError("not this one")

    use(Denied())
    check_deployment(Store(str(tmp_path)), "airflow")
    assert "not checked whether another Airflow uses the store" in caplog.text


def test_a_variable_that_the_api_failed_to_give_is_not_made_anew(
    tmp_path: Path, use: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Variables):
        def get(self, key: str, default: Any = None) -> Any:
            return default  # as Airflow answers when its API has failed

        def keys(self, prefix: str) -> list[str]:
            return [key for key in self.kept if key.startswith(prefix)]

    variables = Failing()
    variables.kept[VARIABLE] = "mine"
    use(variables)
    store = Store(str(tmp_path))
    check_deployment(store, "airflow")
    assert "not checked whether another Airflow uses the store" in caplog.text
    assert variables.kept == {VARIABLE: "mine"}
    assert owner_of(store, "airflow") is None


def test_outside_a_task_nothing_is_asked(tmp_path: Path) -> None:
    check_deployment(Store(str(tmp_path)), "airflow")
    assert list(tmp_path.iterdir()) == []
