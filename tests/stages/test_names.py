"""Columns may have any name: the same data under other names give the same results."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.check_drift import CheckDrift
from lepton_airflow.stages.ingest_data import IngestData
from lepton_airflow.stages.prepare_data import PrepareData
from lepton_airflow.stages.train_model import TrainModel
from lepton_airflow.stages.validate_data import ValidateData

# What our own SQL calls something, what SQL keeps for itself, and what only quotes can hold.
NUMBERS = [
    "x", "v", "n", "g", "b", "h", "rank", "place", "number", "line", "raw", "every", "first_byte", "value", "count", "select", "from",
    'say "hi"', "it's; -- DROP", "%s $1 {0}", "👩‍🔬 größe", "l" * 500, " space ", "a.b", "true", "1",
]  # fmt: skip
CATEGORIES = ["columns", "error", "source", "file", "train", "known", "dataset", "current_rows", "groups"]
TARGET, DAY = "target", "time"


def write(path: Path, names: list[str], seed: int, shift: float = 0.0) -> str:
    draw = random.Random(seed)
    with path.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow([*names, DAY, TARGET])
        for row in range(400):
            numbers = [f"{draw.gauss(shift * (i == 2), 1):.3f}" for i in range(len(NUMBERS))]
            labels = [draw.choice(["red", "blue", "green", ""]) for _ in CATEGORIES]
            table.writerow(
                [
                    *numbers,
                    *labels,
                    f"2013-05-{1 + row % 28:02}",
                    int(float(numbers[0]) + draw.gauss(0, 1) > 0),
                ]
            )
    return str(path)


def life(folder: Path, numbers: list[str], categories: list[str]) -> dict[str, Any]:
    """What comes of the data, without their names."""
    folder.mkdir()
    run = RunInfo.local(folder)
    names = [*numbers, *categories]
    snapshots = []
    for seed, shift in ((1, 0.0), (2, 3.0)):
        spec = {
            "uri": write(folder / f"{seed}.csv", names, seed, shift),
            "types": {names[0]: "DECIMAL(9,3)", names[1]: "DECIMAL(9,2)"},
        }
        ingested = IngestData(sources={"s": spec}, query="FROM s", max_rejected_share=1.0).run(run)
        snapshots.append(ingested.artifacts["snapshot"].uri)
    prepare = {"target": TARGET, "split": "group", "cluster_column": DAY, "leak_check": True}
    first, second = (PrepareData(snapshot=uri, **prepare).run(run) for uri in snapshots)
    model = TrainModel(
        dataset=first.artifacts["train"].uri,
        valid=first.artifacts["valid"].uri,
        trainer="logistic_regression",
    ).run(run)
    drift = CheckDrift(dataset=second.artifacts["train"].uri, reference=first.artifacts["profile"].uri).run(
        run
    )
    verdict = json.loads(run.fetch(drift.artifacts["verdict"].uri).read_text())
    suite = ValidateData(dataset=snapshots[0], suite="infer").run(run)
    proposed = json.loads(run.fetch(suite.artifacts["suite"].uri).read_text())
    checked = ValidateData(dataset=snapshots[0], suite=proposed).run(run)
    profile = json.loads(run.fetch(first.artifacts["profile"].uri).read_text())
    place = {name: n for n, name in enumerate([*names, DAY, TARGET])}
    return {
        "ingested": [ingested.metrics, list(ingested.values["schema"].values())[:3]],
        "prepared": [first.values, first.metrics, [profile["columns"][name] for name in names]],
        "trained": model.metrics,
        "drifted": {place[c["name"]]: c["distance"] for c in verdict["columns"]},
        "validated": [checked.values, checked.metrics, len(proposed["expectations"])],
    }


@pytest.mark.slow
def test_names_change_nothing(tmp_path: Path) -> None:
    hostile = life(tmp_path / "hostile", NUMBERS, CATEGORIES)
    plain = life(
        tmp_path / "plain",
        [f"number_{n}" for n in range(len(NUMBERS))],
        [f"category_{n}" for n in range(len(CATEGORIES))],
    )
    assert hostile == plain
    assert hostile["ingested"][0]["rows_rejected"] > 0
