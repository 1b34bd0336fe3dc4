"""What is kept of the reports of a fit, and drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lepton_airflow.training.curves import Curves, _panels, draw


def test_very_many_reports_are_thinned_out() -> None:
    curves = Curves()
    for step in range(20_000):
        curves.add(step, {"loss": 1 / (step + 1)})
    steps = [p["step"] for p in curves.points]
    assert 2000 <= len(steps) <= 4000
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 19_999)


def test_train_and_valid_share_a_panel_and_no_more_than_four_are_drawn() -> None:
    curves = Curves()
    curves.add(1, {"train_loss": 1.0, "rate": 0.1})
    curves.add(2, {"train_loss": 0.5, "valid_loss": 0.7, "a": 1, "b": 2, "c": 3})
    panels = _panels(curves)
    assert len(panels) == 4
    assert _panels(Curves(points=[p for p in curves.points if "a" not in p])) == {
        "rate": ["rate"],
        "loss": ["train_loss"],
    }
    curves.points[1] = {"step": 2.0, "train_loss": 0.5, "valid_loss": 0.7}
    assert _panels(curves)["loss"] == ["train_loss", "valid_loss"]


def test_what_was_never_reported_is_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw(Curves(), tmp_path / "c.png", "m") is None
    curves = Curves()
    curves.add(1, {})
    assert draw(curves, tmp_path / "c.png", "m") is None
    curves.add(2, {"loss": 1.0})
    assert draw(curves, tmp_path / "c.png", "m") == tmp_path / "c.png"
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # type: ignore[arg-type]
    assert draw(curves, tmp_path / "d.png", "m") is None
