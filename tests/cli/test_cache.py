from __future__ import annotations

from pathlib import Path

import pytest

from lepton_airflow.__main__ import main
from lepton_airflow.contract import Receipt
from lepton_airflow.store import Store, cache


def test_ls_lists_oldest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(tmp_path))
    assert main(["cache", "ls", "--store", store.root]) == 0
    assert capsys.readouterr().err == f"nothing is cached in {store.root}\n"
    made = store.put("loud.txt", "HELLO??????????")
    for stage, created in (("Whisper", "2013-02-01T00:00:00+00:00"), ("Shout", "2013-01-01T00:00:00+00:00")):
        receipt = Receipt(stage, "run", "0" * 64, "done", "", {"loud": made}, created=created, seconds=1.5)
        cache.record(store, receipt)
    store.write("cache/Shout/damaged.json", b"{")
    assert main(["cache", "ls", "--store", store.root]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["2013-01-01T00:00:00+00:00", "Shout", "0" * 12, "15", "B", "1.5", "s"]
    assert "Whisper" in second
    assert main(["cache", "ls", "--store", store.root, "--stage", "Other"]) == 0
    assert capsys.readouterr().out == ""


def test_which_store_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("AIRFLOW__LEPTON__STORE", raising=False)
    assert main(["cache", "ls"]) == 80
    assert "Pass --store URI" in capsys.readouterr().err


@pytest.mark.parametrize("age", ["-5", "nan", "inf", "a week"])
@pytest.mark.parametrize("command", ["cache evict", "envs prune", "pods sweep"])
def test_an_age_that_is_none_removes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, age: str
) -> None:
    made = Store(str(tmp_path)).put("x", "hello")
    store = ["--store", str(tmp_path)] if command == "cache evict" else []
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), f"--older-than-s={age}", *store])
    assert ended.value.code == 2
    assert f"{age!r} is no length of time: expected seconds, zero or more" in capsys.readouterr().err
    assert Store(str(tmp_path)).intact(made)
