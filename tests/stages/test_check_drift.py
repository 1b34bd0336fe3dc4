"""The drift stage: the champion's profile or a given one, the report, what starts a retraining and what does not."""

from __future__ import annotations

import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pandas as pd
import pytest

from lepton_airflow.contract import Artifact, Receipt, RunIdentity, split_pin
from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.profile import reference_profile
from lepton_airflow.errors import BadConfiguration, BadInput, Skipped
from lepton_airflow.packaging.card import ModelCard, Touched
from lepton_airflow.packaging.package import write_package
from lepton_airflow.packaging.schema import features_of
from lepton_airflow.registry.ledger import Ledger, LedgerEntry
from lepton_airflow.stages import RunInfo, check_drift
from lepton_airflow.stages.check_drift import CheckDrift
from lepton_airflow.stages.rollback_model import RollbackModel
from lepton_airflow.store.files import digest_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from lepton_airflow.stages import Result

INFO = DatasetInfo(
    target="late",
    task="classification",
    features=["hour", "wind", "origin"],
    categorical=["origin"],
    classes=[0, 1],
    time_column="day",
    cluster_column="day",
)


def rows(month: int, days: int = 28, wind: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(month)
    n = days * 40
    frame = pd.DataFrame({"hour": rng.integers(5, 24, n).astype(float), "wind": wind + rng.normal(size=n)})
    frame["origin"] = rng.choice(["JFK", "EWR", "LGA", None], n, p=[0.5, 0.3, 0.15, 0.05])
    frame["day"] = [f"2013-{month:02}-{1 + i % days:02}" for i in range(n)]
    frame["late"] = (rng.random(n) < 0.2).astype(int)
    return frame


class Bench:
    """A store with a model that was trained in March, and datasets to hold against it."""

    def __init__(self, folder: Path, write_dataset: Callable[..., DatasetInfo]) -> None:
        self.folder = folder
        self.write_dataset = write_dataset
        self.run = RunInfo.local(folder)
        self.trained_on = self.put(rows(3), "train.parquet")
        con = duckdb.connect()
        con.register("train", rows(3))
        profile = reference_profile(con, "train", replace(INFO, rows=28 * 40), None)
        self.profile = self.run.save("profile.json", json.dumps(profile))

    def put(self, frame: pd.DataFrame, name: str = "test.parquet") -> Artifact:
        path = self.folder / name
        self.write_dataset(path, frame, INFO)
        return self.run.save(name, path)

    def package(self, profile: bool = True) -> Artifact:
        """A model package; drift asks nothing of the model itself."""
        card = ModelCard(
            task="classification",
            target="late",
            features=features_of(INFO),
            outputs=["probabilities"],
            trainer="none",
            framework="onnx",
            hyperparameters={},
            seed=0,
            touched=[Touched.by("train", self.trained_on.sha256, replace(INFO, split="train"))],
        )
        folder = self.folder / f"package-{profile}"
        local = Path(split_pin(self.profile.uri)[0].removeprefix("file://")) if profile else None
        write_package(folder, b"", card, profile=local)
        return self.run.save("model", folder)

    def crown(self, package: Artifact, version: int = 7) -> None:
        """Make a package the champion of ``flights``."""
        entry = LedgerEntry("flights", 1, "bootstrap", version, package.uri, None, "r", "first.")
        assert Ledger(self.run.store, "flights").append(entry)

    def check(self, frame: pd.DataFrame, run_type: str = "scheduled", **fields: Any) -> Result:
        run = replace(self.run, identity=RunIdentity(run_type=run_type))
        return CheckDrift(dataset=self.put(frame).uri, sample_rows=200, **fields).run(run)

    def read(self, artifact: Artifact) -> str:
        return self.run.fetch(artifact.uri).read_text()


@pytest.fixture
def bench(tmp_path: Path, write_dataset: Callable[..., DatasetInfo]) -> Bench:
    return Bench(tmp_path, write_dataset)


def receipt_of(result: Result) -> Receipt:
    return Receipt(
        "CheckDrift", "k", None, "done", result.summary, result.artifacts, result.values, result.metrics
    )


def test_drift_from_the_champion_is_named_drawn_and_starts_a_retraining(bench: Bench) -> None:
    bench.crown(bench.package())
    result = bench.check(rows(7, wind=2.0), name="flights")
    assert result.values["drifted"] is result.values["retrain"] is True
    assert result.values["columns"] == ["wind"]
    assert result.summary.startswith(
        "Drifted: 1 of 4 columns moved away from champion version 7 of flights over 1,120 rows. Most: wind: PSI"
    )
    assert "not in the store" not in result.summary
    verdict = json.loads(bench.read(result.artifacts["verdict"]))
    assert verdict["columns"][0]["name"] == "wind"
    assert {c["name"]: c["drifted"] for c in verdict["columns"]} == {
        "wind": True,
        "hour": False,
        "origin": False,
        "late": False,
    }
    assert result.metrics["largest_distance"] == verdict["columns"][0]["distance"] > 1
    page = bench.read(result.artifacts["report"])
    assert "Dataset Drift is detected" in page  # a quarter of the columns, as we asked
    shown = re.findall(r'"column_name": "(\w+)".*?"data_drift": "([\w ]+)", "drift_score": ([\d.e-]+)', page)
    assert {name: (drifted, float(score)) for name, drifted, score in shown} == {
        c["name"]: ("Detected" if c["drifted"] else "Not Detected", c["distance"]) for c in verdict["columns"]
    }
    assert f"<p>{result.summary.partition(' The report')[0]}</p>" in page
    assert receipt_of(result).to_json()


def test_the_report_says_what_the_verdict_says_where_a_sample_would_say_otherwise(bench: Bench) -> None:
    """Five rows differ from the reference by chance alone, and two of the columns that have drifted cannot be drawn."""
    few = bench.check(rows(4)[:5], reference=bench.profile.uri, reference_rows=bench.put(rows(0)).uri)
    page = bench.read(few.artifacts["report"])
    assert few.values["drifted"] is False
    assert "Dataset Drift is NOT detected" in page
    assert '"data_drift": "Detected"' not in page
    text = bench.run.save("rows.csv", "wind\n1\n").uri
    with pytest.raises(BadInput, match=r"rows\.csv is no Parquet file: land it with IngestData first"):
        bench.check(rows(4)[:5], reference=bench.profile.uri, reference_rows=text)
    gone = rows(4).drop(columns=["wind"]).assign(origin=None)
    two = bench.check(gone, reference=bench.profile.uri, reference_rows=bench.put(rows(0)).uri, min_columns=2)
    page = bench.read(two.artifacts["report"])
    assert two.values["drifted"] is True
    assert "Dataset Drift is detected" in page
    assert "<b>wind</b> has drifted: the column is gone" in page
    assert "<b>origin</b> has drifted: every value is missing" in page


def test_without_drift_nothing_starts_and_equal_rows_give_an_equal_verdict(bench: Bench) -> None:
    first, second = (bench.check(rows(4), reference=bench.profile.uri) for _ in range(2))
    assert first.values["drifted"] is first.values["retrain"] is False
    assert first.values["columns"] == []
    assert first.summary.startswith("Not drifted: 0 of 4 columns moved away from the reference")
    assert first.artifacts["verdict"] == second.artifacts["verdict"]


def test_the_page_is_drawn_where_a_stop_can_end_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal raises in the main thread alone; Evidently, in another one, would be waited for, for seconds."""
    import evidently

    drawn_in = []

    class Watched(evidently.Report):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            drawn_in.append(threading.current_thread())
            return super().run(*args, **kwargs)

    monkeypatch.setattr(evidently, "Report", Watched)
    bench.crown(bench.package())
    bench.check(rows(7), name="flights")
    assert drawn_in == [threading.main_thread()]


def test_how_many_columns_must_drift(bench: Bench) -> None:
    moved = rows(7, wind=2.0)
    moved["hour"] += 6
    for needed, drifted in ((2, True), (3, False)):
        result = bench.check(moved, reference=bench.profile.uri, min_columns=needed)
        assert result.values["drifted"] is drifted
        assert f"2 of 4 columns ({needed} needed)" in result.summary
        assert result.metrics["drifted_share"] == 0.5


@pytest.mark.parametrize(
    ("on_backfill", "run_type", "retrain"),
    [("register_only", "backfill", False), ("full", "backfill", True), ("skip", "asset_triggered", True)],
)
def test_a_backfill_starts_nothing_unless_told(
    bench: Bench, on_backfill: Any, run_type: str, retrain: bool
) -> None:
    result = bench.check(rows(7, wind=2.0), run_type, reference=bench.profile.uri, on_backfill=on_backfill)
    assert result.values["drifted"] is True
    assert result.values["retrain"] is retrain
    assert ("Nothing is started" in result.summary) is not retrain


def test_a_skipping_backfill_does_nothing(bench: Bench) -> None:
    with pytest.raises(Skipped, match="on_backfill='skip'"):
        bench.check(rows(4), "backfill", reference=bench.profile.uri, on_backfill="skip")


def test_the_report_goes_without_training_rows_that_are_gone_or_altered(bench: Bench) -> None:
    package = bench.package()
    found = bench.check(rows(4), reference=package.uri)
    blob = Path(split_pin(bench.trained_on.uri)[0].removeprefix("file://"))
    blob.write_bytes(blob.read_bytes()[:-1])
    altered = bench.check(rows(4), reference=package.uri)
    blob.unlink()
    gone = bench.check(rows(4), reference=package.uri)
    assert "not in the store" not in found.summary
    for result in (altered, gone):
        assert "The report shows the current rows only" in result.summary
        assert result.values == found.values | {"reason": result.summary}
        assert result.artifacts["report"].bytes > 100_000


def test_columns_that_cannot_be_drawn_do_not_stop_the_report(bench: Bench) -> None:
    broken = rows(7).drop(columns="origin")
    broken["hour"] = None
    broken["wind"] = "calm"
    result = bench.check(broken, reference=bench.package().uri)
    assert sorted(result.values["columns"]) == ["hour", "origin", "wind"]
    assert result.artifacts["report"].bytes > 100_000


def test_rows_without_labels_are_watched_from_a_plain_snapshot(bench: Bench) -> None:
    package = bench.package().uri
    july = rows(7, wind=2.0)
    for number, frame in enumerate(
        (
            july.drop(columns="late"),
            july.assign(late=pd.Series(None, index=july.index, dtype="Int64")),
            july.assign(
                late=july.late.where(july.index < 40).astype("Int64")
            ),  # the labels of one day have come
        )
    ):
        path = bench.folder / f"plain-{number}.parquet"
        frame.to_parquet(path, index=False)
        result = CheckDrift(
            dataset=bench.run.save(path.name, path).uri, reference=package, cluster_column="day"
        ).run(bench.run)
        verdict = json.loads(bench.read(result.artifacts["verdict"]))
        assert result.values["columns"] == ["wind"]
        assert result.metrics["rows"] == len(july)
        judged = {column["name"] for column in verdict["columns"]}
        assert ("late" in judged) == (number == 2)
        said = "The target 'late' is not compared: no row has a label yet." in result.summary
        assert said == (number < 2)
        same = bench.check(
            frame, reference=package
        )  # the same rows as a split, which names its clusters itself
        assert same.values["columns"] == ["wind"]
        split = json.loads(bench.read(same.artifacts["verdict"]))
        assert split["columns"] == verdict["columns"]


def test_rows_without_any_feature_of_the_reference_are_not_its_rows(bench: Bench) -> None:
    path = bench.folder / "others.parquet"
    pd.DataFrame({"late": [0, 1], "x": [1, 2]}).to_parquet(path)
    with pytest.raises(
        BadInput, match=r"has none of the 3 features of .*, such as 'hour': prepare these rows as"
    ):
        CheckDrift(dataset=str(path), reference=bench.package().uri).run(bench.run)


def test_a_day_on_which_everything_broke_has_drifted(bench: Bench) -> None:
    """All columns under other names, all columns empty, and a category that has become a time."""
    package = bench.package().uri
    renamed = rows(7).rename(columns=str.upper).rename(columns={"DAY": "day"})
    empty = rows(7).assign(hour=np.nan, wind=np.nan, origin=None).drop(columns="late")
    times = rows(7).assign(origin=pd.Timestamp(2013, 7, 1))
    for frame, names in (
        (renamed, ["hour", "origin", "wind"]),
        (empty, ["hour", "origin", "wind"]),
        (times, ["origin"]),
    ):
        result = bench.check(frame, reference=package)
        assert sorted(result.values["columns"]) == names
        assert result.artifacts["report"].bytes > 100
    alone = bench.check(renamed, reference=bench.profile.uri)
    assert "nothing to draw" in bench.read(alone.artifacts["report"])


def test_the_receipt_stays_small_in_any_script(bench: Bench) -> None:
    wide = rows(3)[["day", "late"]].assign(**{f"{i}" + "漂" * 90: "漂" for i in range(30)})
    info = replace(INFO, features=list(wide)[2:], categorical=list(wide)[2:])
    con = duckdb.connect()
    con.register("train", wide)
    profile = bench.run.save(
        "wide.json", json.dumps(reference_profile(con, "train", replace(info, rows=len(wide)), None))
    )
    labels = np.array([c * 190 for c in "移流動"])[np.arange(len(wide)) % 3]
    result = bench.check(wide.assign(**dict.fromkeys(info.features, labels)), reference=profile.uri)
    assert result.metrics["drifted_columns"] == 30
    assert receipt_of(result).to_json()


def test_receipt_and_report_stay_small_however_many_columns_drift(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_drift, "_DRAWN", 2)
    names = [f"{i:03}" + "x" * 200 for i in range(60)]
    wide = rows(3)[["day", "late"]].assign(**dict.fromkeys(names, 1.0))
    info = replace(INFO, features=names, categorical=[])
    con = duckdb.connect()
    con.register("train", wide)
    profile = bench.run.save(
        "wide.json", json.dumps(reference_profile(con, "train", replace(info, rows=len(wide)), None))
    )
    result = bench.check(wide.assign(**dict.fromkeys(names, 2.0)), reference=profile.uri)
    assert result.metrics["drifted_columns"] == 60
    assert len(result.values["columns"]) == 20
    assert receipt_of(result).to_json()
    verdict = json.loads(bench.read(result.artifacts["verdict"]))
    page = bench.read(result.artifacts["report"])
    assert [c["name"] in page for c in verdict["columns"][:60]] == [True] * 4 + [False] * 56


def test_without_a_champion_there_is_nothing_to_do(bench: Bench) -> None:
    with pytest.raises(Skipped, match=r"'flights' has no champion in .*promote one first.*known: none"):
        bench.check(rows(4), name="flights")
    bench.crown(bench.package())
    with pytest.raises(Skipped, match="did you mean 'flights'"):
        bench.check(rows(4), name="flihgts")


def test_what_cannot_be_compared_is_refused_in_a_sentence(bench: Bench) -> None:
    profile = bench.profile.uri
    bare, data = bench.package(profile=False).uri, bench.put(rows(4)).uri
    for fields, error, sentence in (
        ({}, BadConfiguration, "either name .* or reference"),
        ({"name": "flights", "reference": profile}, BadConfiguration, "either name .* or reference"),
        ({"reference": profile, "alpha": 1.0}, BadConfiguration, "alpha=1.0: expected a number above 0 and"),
        (
            {"reference": profile, "min_columns": 0},
            BadConfiguration,
            "min_columns=0: expected a number above 0",
        ),
        (
            {"reference": profile, "min_columns": 5},
            BadConfiguration,
            "has 4 columns to judge, so this many can never",
        ),
        ({"reference": profile, "cluster_column": "dya"}, BadConfiguration, "did you mean 'day'"),
        ({"reference": bare}, BadInput, "no reference profile: pass profile=prepare.output"),
        ({"reference": data}, BadInput, "is no reference profile: expected prepare.output"),
    ):
        with pytest.raises(error, match=sentence):
            bench.check(rows(4), **fields)
    with pytest.raises(BadInput, match="has no rows: check that the data of this window have arrived"):
        bench.check(rows(4)[:0].astype({"hour": float, "origin": str, "day": str}), reference=profile)


def test_the_package_of_the_ledger_must_be_the_one_that_was_promoted(bench: Bench) -> None:
    package = bench.package()
    assert digest_path(bench.run.fetch(package.uri))[0] == package.sha256
    bench.crown(package)
    stored = Path(split_pin(package.uri)[0].removeprefix("file://")) / "profile.json"
    stored.write_text(stored.read_text().replace("JFK", "XXX"))
    with pytest.raises(Exception, match="was altered or is damaged"):
        bench.check(rows(4), name="flights")


def test_the_reference_is_that_of_the_champion_that_came_back(bench: Bench, mlflow_sqlite: str) -> None:
    calm = bench.package()
    bench.crown(calm)
    con = duckdb.connect()
    con.register("train", rows(3, wind=2.0))
    profile = reference_profile(con, "train", replace(INFO, rows=28 * 40), None)
    bench.profile = bench.run.save("windy.json", json.dumps(profile))
    shutil.rmtree(bench.folder / "package-True")
    ledger, windy = Ledger(bench.run.store, "flights"), bench.package()
    assert ledger.append(LedgerEntry("flights", 2, "promote", 8, windy.uri, 7, "p", "better."))
    assert "from champion version 8" in bench.check(rows(7, wind=2.0), name="flights").summary
    assert bench.check(rows(7, wind=2.0), name="flights").values["drifted"] is False
    RollbackModel(name="flights", reason="Too windy.", tracking_uri=mlflow_sqlite).run(bench.run)
    result = bench.check(rows(7, wind=2.0), name="flights")
    assert result.values["columns"] == ["wind"]
    assert "from champion version 7" in result.summary


def test_excluded_columns_are_not_judged_and_are_named(bench: Bench) -> None:
    reference = {"reference": bench.profile.uri}
    assert bench.check(rows(4, wind=3.0), **reference).values["columns"] == ["wind"]
    result = bench.check(rows(4, wind=3.0), **reference, exclude_columns=["wind", "day"])
    assert (result.values["drifted"], result.metrics["columns"]) == (False, 3)
    assert "Not judged, by exclude_columns: 'wind'." in result.values["reason"]
    verdict = json.loads(bench.read(result.artifacts["verdict"]))
    assert verdict["excluded_columns"] == ["wind"]
    assert "wind" not in [column["name"] for column in verdict["columns"]]
    assert "Not judged, by exclude_columns: &#x27;wind&#x27;." in bench.read(result.artifacts["report"])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"exclude_columns": ["winds"]}, "exclude_columns: column 'winds' is not there; did you mean 'wind'"),
        (
            {"exclude_columns": ["hour", "wind", "origin", "late"]},
            "names all 4 columns of the reference: leave some",
        ),
        (
            {"exclude_columns": ["hour"], "min_columns": 4},
            "the reference has 3 columns to judge, so this many can never",
        ),
    ],
)
def test_exclusions_that_leave_nothing_to_judge_are_refused(
    bench: Bench, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadConfiguration, match=sentence):
        bench.check(rows(4), reference=bench.profile.uri, **fields)


def test_an_excluded_target_is_not_waited_for_and_cannot_be_all_that_is_judged(bench: Bench) -> None:
    unlabelled = rows(4).drop(columns="late")
    result = bench.check(unlabelled, reference=bench.profile.uri, exclude_columns=["late"])
    assert "Not judged, by exclude_columns: 'late'." in result.summary
    assert "no row has a label yet" not in result.summary
    with pytest.raises(
        BadConfiguration, match="leaves only the target 'late' to judge, and no row has a label yet"
    ):
        bench.check(unlabelled, reference=bench.profile.uri, exclude_columns=["hour", "wind", "origin"])


@pytest.mark.parametrize("missing", [28, 3])
def test_rows_without_a_cluster_do_not_hide_a_drift(bench: Bench, missing: int) -> None:
    moved = rows(7, wind=9.0)
    moved["day"] = moved["day"].astype(object)
    moved.loc[moved.index[: missing * len(moved) // 28], "day"] = None
    path = bench.run.workdir / "plain.parquet"
    moved.to_parquet(path)
    package = bench.package().uri
    with pytest.raises(BadInput, match=r"cluster_column 'day' is missing in \d+ of \d+ rows"):
        CheckDrift(dataset=bench.run.save(path.name, path).uri, reference=package, cluster_column="day").run(
            bench.run
        )
