from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadConfiguration, Preempted, StoreError
from lepton_airflow.store import Store
from lepton_airflow.store.checkpoints import Checkpoints
from lepton_airflow.training.trainer import TrainerRun


def checkpoints(folder: Path, every_s: float = 0.0, **overrides: Any) -> Checkpoints:
    """As a new try on another machine sees them: the same store, an empty scratch directory."""
    scratch = folder / f"scratch-{len(list(folder.iterdir()))}"
    scratch.mkdir()
    return Checkpoints(
        overrides.get("store") or Store(str(folder / "store")), "checkpoints/k/fit", scratch, every_s
    )


def writes(text: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "state.txt").write_text(text)
        (folder / "part").mkdir()
        (folder / "part" / "big.bin").write_bytes(text.encode() * 1000)

    return write


def read(found: Any) -> str | None:
    return found and (found.path / "state.txt").read_text()


def run_of(checkpoints: Checkpoints | None, **about: Any) -> TrainerRun:
    info = DatasetInfo(target="y", task="regression", features=["x"])
    about = {"info": info, "features": ["x"], "target": "y", "task": "regression", "classes": []} | about
    return TrainerRun(**about, seed=0, threads=1, checkpoints=checkpoints)


def test_the_next_try_gets_the_newest_and_two_are_kept(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    assert kept.latest() is None
    for step in range(1, 6):
        assert kept.save(step, writes(f"state {step}"), {"points": [step]})
    kept.settle()
    again = checkpoints(tmp_path)
    found = again.latest()
    assert found is not None
    assert (found.step, read(found), found.notes) == (5, "state 5", {"points": [5]})
    assert (found.path / "part" / "big.bin").stat().st_size == 7000
    names = {k.split("/")[3] for k in again.store.keys("checkpoints")}
    assert len(names) == 5  # two folders, two records, the pointer
    again.drop()
    assert again.store.keys("checkpoints") == []


@pytest.mark.parametrize("damage", ["truncated", "altered", "a file gone", "its record truncated"])
def test_a_damaged_newest_is_passed_over_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = checkpoints(tmp_path)
    for step in (1, 2):
        kept.save(step, writes(f"state {step}"), {}, wait=True)
    root = tmp_path / "store" / "checkpoints" / "k" / "fit"
    newest = root / (root / "latest").read_text()
    if damage == "its record truncated":
        record = newest.with_name(newest.name + ".json")
        record.write_text(record.read_text()[:20])
    elif damage == "a file gone":
        (newest / "state.txt").unlink()
    else:
        content = (newest / "part" / "big.bin").read_bytes()
        (newest / "part" / "big.bin").write_bytes(
            content[:-1] + b"" if damage == "truncated" else content[:-1] + b"!"
        )
    again = checkpoints(tmp_path)
    assert read(again.latest()) == "state 1"
    assert "is damaged, so the one before it is used" in caplog.text
    again.save(3, writes("state 3"), {}, wait=True)
    assert read(checkpoints(tmp_path).latest()) == "state 3"
    assert not newest.exists()  # the damaged one goes first: the last good one stays beside the new one
    assert len([p for p in root.iterdir() if p.is_dir()]) == 2


class Dies(Exception):
    """The process is gone: nothing after this happens."""


class Dying(Store):
    """A store whose process dies at the n-th write."""

    left = 10**9

    def write(self, key: str, content: bytes | Path) -> None:
        Dying.left -= 1
        if Dying.left < 0:
            raise Dies
        super().write(key, content)


@pytest.mark.parametrize("writes_done", range(4))  # two files, the record, the pointer
def test_a_kill_in_the_middle_of_an_upload_leaves_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes_done: int
) -> None:
    kept = checkpoints(tmp_path, store=Dying(str(tmp_path / "store")))
    kept.save(1, writes("state 1"), {}, wait=True)
    monkeypatch.setattr(Dying, "left", writes_done)
    with pytest.raises(Dies):
        kept.save(2, writes("state 2"), {}, wait=True)
    again = checkpoints(tmp_path)
    assert read(again.latest()) == "state 1"
    for step in (3, 4):
        again.save(step, writes(f"state {step}"), {}, wait=True)
    folders = [p for p in (tmp_path / "store" / "checkpoints" / "k" / "fit").iterdir() if p.is_dir()]
    assert len(folders) == 2  # what the upload that broke off left is gone too


def test_the_work_goes_on_while_a_checkpoint_is_uploaded(tmp_path: Path) -> None:
    gate, inside = threading.Event(), threading.Event()

    class Slow(Store):
        def write(self, key: str, content: bytes | Path) -> None:
            inside.set()
            assert gate.wait(30)
            super().write(key, content)

    kept = checkpoints(tmp_path, store=Slow(str(tmp_path / "store")))
    assert kept.due()
    kept.save(1, writes("state 1"), {})
    assert inside.wait(30)
    assert not kept.due()  # one at a time: nothing is offered, and nothing waits
    gate.set()
    assert kept.settle()
    assert kept.due()
    assert read(checkpoints(tmp_path).latest()) == "state 1"


def test_a_store_that_fails_costs_a_warning_and_the_former_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = checkpoints(tmp_path)
    kept.save(1, writes("state 1"), {}, wait=True)

    def full(*_: Any) -> None:
        raise StoreError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(kept.store, "write", full)
        assert not kept.save(2, writes("state 2"), {}, wait=True)
        run = run_of(kept, should_stop=lambda: True)
        with pytest.raises(Preempted, match="from an earlier checkpoint"):
            run.save_checkpoint(2, writes("state 2"))
    assert "the checkpoint of step 2 may not be kept, the one before it is: no space left" in caplog.text
    assert read(checkpoints(tmp_path).latest()) == "state 1"
    assert kept.save(3, writes("state 3"), {}, wait=True)
    assert read(checkpoints(tmp_path).latest()) == "state 3"


def test_what_a_failed_upload_left_goes_with_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = checkpoints(tmp_path)
    kept.save(1, writes("state 1"), {}, wait=True)
    write = kept.store.write

    def full(key: str, content: bytes | Path) -> None:
        if key.endswith(".json"):
            raise StoreError("no space left")
        write(key, content)

    with monkeypatch.context() as patch:
        patch.setattr(kept.store, "write", full)
        for step in (2, 3):
            assert not kept.save(step, writes(f"state {step}"), {}, wait=True)
    kept.save(4, writes("state 4"), {}, wait=True)
    folders = [p.name for p in (tmp_path / "store" / "checkpoints" / "k" / "fit").iterdir() if p.is_dir()]
    assert sorted(int(name.partition("-")[0]) for name in folders) == [1, 4]


def test_a_step_is_a_whole_number_of_any_library(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    assert kept.save(np.int64(3), writes("state 3"), {}, wait=True)
    found = checkpoints(tmp_path).latest()
    assert found is not None
    assert found.step == 3
    with pytest.raises(BadConfiguration, match=r"step=0\.5, expected a whole number"):
        kept.save(0.5, writes("never written"), {})  # type: ignore[arg-type]


def test_a_store_that_is_away_is_no_reason_to_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = checkpoints(tmp_path)
    kept.save(1, writes("state 1"), {}, wait=True)

    def away(*_: Any) -> None:
        raise StoreError("does not answer")

    again = checkpoints(tmp_path)
    monkeypatch.setattr(again.store, "fetch", away)
    with pytest.raises(StoreError, match="does not answer"):
        again.latest()


def test_on_an_object_store_the_files_come_back_verified_and_leave_the_disk(tmp_path: Path) -> None:
    def on(name: str) -> Checkpoints:
        (tmp_path / name).mkdir()
        return Checkpoints(Store("memory://checkpoints-test"), "checkpoints/k/fit", tmp_path / name, 0.0)

    first = on("one")
    for step in (1, 2):
        first.save(step, writes(f"state {step}"), {}, wait=True)
    second = on("two")
    found = second.latest()
    assert found is not None
    assert read(found) == "state 2"
    assert found.path.is_relative_to(tmp_path / "two")
    second.save(3, writes("state 3"), {}, wait=True)
    assert not [p for p in (tmp_path / "two").rglob("*") if p.is_file()]
    second.drop()
    assert second.store.keys("checkpoints") == []


def test_a_checkpoint_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfiguration, match="at step 7 left no file in the folder it was given"):
        checkpoints(tmp_path).save(7, lambda folder: None, {})


# -- what a trainer sees -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_when_one_is_due_or_a_stop_was_asked_for(tmp_path: Path) -> None:
    kept, stop = checkpoints(tmp_path, every_s=3600), False
    run = run_of(kept, should_stop=lambda: stop)
    assert run.latest_checkpoint() is None
    run.report(1, of=10, train_loss=0.5)
    assert not run.save_checkpoint(1, writes("never written"))
    stop = True
    run.report(2, of=10, train_loss=0.4)  # does not raise: the checkpoint is still to be written
    with pytest.raises(Preempted, match=r"after step 2; the next try goes on from there\."):
        run.save_checkpoint(2, writes("state 2"))
    said: list[str] = []
    again = run_of(checkpoints(tmp_path, every_s=0), say=said.append)
    assert read(again.latest_checkpoint()) == "state 2"
    assert said == ["resuming after step 2 from the checkpoint of an earlier try"]
    assert [p["train_loss"] for p in again.curves.points] == [0.5, 0.4]
    assert again.curves.resumed == [2.0]
    assert again.save_checkpoint(3, writes("state 3"))


def test_what_is_in_the_store_leaves_the_local_disk(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    kept.save(1, writes("state 1"), {}, wait=True)
    assert list(kept.directory.iterdir()) == []
