"""Promotion: the verdicts, what may not be compared, backfills, races, and what a crash leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from lepton_airflow.contract import RunIdentity
from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadConfiguration, BadInput, IntegrityError, LeptonError, Skipped
from lepton_airflow.packaging.card import Touched
from lepton_airflow.packaging.touched import id_fingerprints
from lepton_airflow.registry.ledger import Ledger, Registration, Registrations, find_version
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.promote_model import PromoteModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from lepton_airflow.contract import Artifact
    from lepton_airflow.stages import Result

pytestmark = pytest.mark.slow

INFO = DatasetInfo(
    target="late",
    task="classification",
    features=["hour", "wind"],
    classes=[0, 1],
    time_column="day",
    cluster_column="day",
)
GOOD, WEAK, BAD = [1.0, 0.5], [1.0, -1.0], [-1.0, -0.5]


def rows(month: int = 5, n: int = 3000, seed: int = 0) -> pd.DataFrame:
    """Flights of one month whose delay depends on hour and wind, and on the day as a whole."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"hour": rng.normal(size=n), "wind": rng.normal(size=n)})
    day = rng.integers(1, 29, n)
    frame["day"] = [f"2013-{month:02}-{d:02}" for d in day]
    score = frame.hour + 0.5 * frame.wind + 0.3 * rng.normal(size=29)[day]
    frame["late"] = (rng.random(n) < 1 / (1 + np.exp(-score))).astype(int)
    return frame


class Desk:
    """One model name, its registered versions and the promotions asked for."""

    def __init__(
        self, run: RunInfo, tracking: str, put_model: Callable[..., Artifact], dataset: Artifact
    ) -> None:
        self.run, self.tracking, self.put_model, self.dataset = run, tracking, put_model, dataset

    def register(self, weights: list[float], month: int, info: DatasetInfo = INFO, **card: Any) -> int:
        """Record a version trained on the month before ``month`` as RegisterModel does, and show it in MLflow."""
        window = {"start": f"2013-{month - 1:02}-01", "end": f"2013-{month:02}-01"}
        seen = [f"2013-{month - 1:02}-01", f"2013-{month - 1:02}-28"]
        card.setdefault("touched", [Touched("train", "0" * 64, "train", f"split-{month}", "day", seen, 100)])
        model = self.put_model(self.run.store, info, weights, window, **card)
        mlflow = self.mlflow()
        if not mlflow.search_registered_models():
            mlflow.create_registered_model("late")
        tags = {"lepton.package": model.sha256}
        version = int(mlflow.create_model_version("late", source="file:///unused", tags=tags).version)
        records = Registrations(self.run.store, "late")
        made = Registration("late", version, model.uri, f"register-{version}", "", "candidate", window)
        assert records.append_after(records.newest(), made)
        return version

    def promote(
        self, version: int, key: str | None = None, run_type: str = "scheduled", **fields: Any
    ) -> Result:
        stage = self.stage(version, **fields)
        return stage.run(self.info(key or f"promote-{version}", run_type))

    def stage(self, version: int | None, **fields: Any) -> PromoteModel:
        defaults = {"dataset": self.dataset.uri, "tracking_uri": self.tracking, "resamples": 200}
        return PromoteModel(**{"name": "late", "version": version} | defaults | fields)

    def info(self, key: str, run_type: str = "scheduled") -> RunInfo:
        folder = self.run.workdir / key
        folder.mkdir(exist_ok=True)
        return replace(self.run, run_key=key, workdir=folder, identity=RunIdentity(run_type=run_type))

    def mlflow(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.tracking, registry_uri=self.tracking)

    def aliases(self) -> dict[str, int]:
        return {
            k: int(v)
            for k, v in self.mlflow().get_registered_model("late").aliases.items()
            if k != "candidate"
        }

    def moves(self) -> list[tuple[str, int, int | None]]:
        return [(e.action, e.version, e.previous) for e in Ledger(self.run.store, "late").entries()]


@pytest.fixture
def put_rows(tmp_path: Path, write_dataset) -> Callable[..., Artifact]:
    def put(run: RunInfo, frame: pd.DataFrame, info: DatasetInfo = INFO) -> Artifact:
        path = tmp_path / "test.parquet"
        write_dataset(path, frame, replace(info, split="test", split_id="split-of-the-test"))
        return run.store.put("test.parquet", path)

    return put


@pytest.fixture
def desk(tmp_path: Path, mlflow_sqlite: str, put_model, put_rows) -> Desk:
    run = RunInfo.local(tmp_path, should_stop=bool)
    return Desk(run, mlflow_sqlite, put_model, put_rows(run, rows()))


def evidence(desk: Desk, result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(desk.run.fetch(result.artifacts["evidence"].uri).read_bytes())
    return found


def test_the_first_version_bootstraps(desk: Desk) -> None:
    version = desk.register(WEAK, 4)
    result = desk.promote(version)
    assert result.values["decision"] == "bootstrap"
    assert result.values["moved"] is True
    assert (result.values["champion"], result.values["previous"]) == (version, None)
    assert "has no champion yet" in result.summary
    assert desk.aliases() == {"champion": version}
    assert desk.moves() == [("bootstrap", version, None)]


def test_a_better_candidate_is_promoted_with_evidence(desk: Desk) -> None:
    first, second = desk.register(WEAK, 4), desk.register(GOOD, 5)
    desk.promote(first)
    result = desk.promote(second)
    assert result.values["decision"] == "promote"
    assert desk.aliases() == {"champion": second, "previous": first}
    found = evidence(desk, result)
    assert found["comparison"]["n"] == 3000
    assert found["comparison"]["n_clusters"] == 28
    assert found["comparison"]["low"] > 0
    assert found["dataset"]["sha256"] == desk.dataset.sha256
    assert found["champion"]["version"] == first
    assert found["sentence"] == result.summary
    entry = Ledger(desk.run.store, "late").entries()[-1]
    assert entry.evidence == result.artifacts["evidence"].uri
    assert entry.package == find_version(desk.run.store, "late", second).package


def test_a_worse_candidate_is_rejected_and_an_equal_one_held(desk: Desk) -> None:
    desk.promote(desk.register(GOOD, 4))
    assert desk.promote(desk.register(BAD, 5)).values["decision"] == "reject"
    almost = desk.promote(desk.register([1.0, 0.51], 5))
    assert almost.values["decision"] == "hold"
    assert almost.values["champion"] == 1
    same = desk.promote(desk.register(GOOD, 4))
    assert same.values["decision"] == "hold"
    assert "same package as version 1" in same.summary
    assert desk.moves() == [("bootstrap", 1, None)]


def test_min_effect_and_metric_reach_the_test(desk: Desk) -> None:
    desk.promote(desk.register(WEAK, 4))
    better = desk.register(GOOD, 5)
    assert desk.promote(better, "strict", min_effect=0.4).values["decision"] == "hold"
    by_loss = desk.promote(better, "loss", metric="log_loss")
    assert by_loss.values["decision"] == "promote"
    assert "log loss" in by_loss.summary


def test_a_backfill_judges_and_moves_nothing_unless_told(desk: Desk) -> None:
    first = desk.register(WEAK, 4)
    result = desk.promote(first, "b0", "backfill")
    assert (result.values["decision"], result.values["moved"]) == ("bootstrap", False)
    assert "this is a backfill" in result.summary
    assert desk.aliases() == {}
    with pytest.raises(Skipped):
        desk.promote(first, "b1", "backfill", on_backfill="skip")
    assert desk.promote(first, "b2", "backfill", on_backfill="full").values["moved"] is True
    second = desk.register(GOOD, 5)
    judged = desk.promote(second, "b3", "backfill")
    assert (judged.values["decision"], judged.values["moved"], judged.values["champion"]) == (
        "promote",
        False,
        first,
    )
    assert desk.moves() == [("bootstrap", first, None)]


def test_a_champion_of_newer_data_stays(desk: Desk) -> None:
    newer = desk.register(WEAK, 5)
    desk.promote(newer)
    result = desk.promote(desk.register(GOOD, 4), run_type="backfill", on_backfill="full")
    assert result.values["decision"] == "hold"
    assert "newer data (2013-04-01 to 2013-05-01)" in result.summary
    assert desk.aliases() == {"champion": newer}


def test_a_champion_that_has_touched_the_rows_stays(desk: Desk) -> None:
    seen = [Touched("tuning", "0" * 64, "valid", "elsewhere", "day", ["2013-05-01", "2013-05-10"], 10)]
    desk.promote(desk.register(WEAK, 4))  # so that the touched one becomes champion on rows of another month
    entry = Ledger(desk.run.store, "late").entries()[0]
    touched = find_version(desk.run.store, "late", desk.register([1.0, -0.9], 4, touched=seen))
    assert Ledger(desk.run.store, "late").append(
        replace(entry, sequence=2, version=touched.version, package=touched.package, run_key="x", previous=1)
    )
    result = desk.promote(desk.register(GOOD, 5))
    assert result.values["decision"] == "hold"
    assert f"champion version {touched.version} may not be compared on this dataset" in result.summary
    assert "2013-05-01 to 2013-05-10" in result.summary


def test_ids_leave_out_only_the_rows_that_the_champion_has_touched(desk: Desk, put_rows, tmp_path) -> None:
    """A table of customers that grows, without times: some rows of each test were among those of an earlier training."""
    info = replace(INFO, time_column=None, id_columns=["id"])
    frame = rows().assign(id=range(3000))
    desk.dataset = put_rows(desk.run, frame, info)
    frame[:500].to_parquet(tmp_path / "seen.parquet")
    timeless = Touched("train", "0" * 64, "train", "elsewhere", None, None, 500)
    seen = id_fingerprints(tmp_path / "seen.parquet", ["id"])
    champion = desk.register(WEAK, 4, touched=[timeless], row_identity=["id"], rows=seen)
    entry = {"package": find_version(desk.run.store, "late", champion).package}
    first = desk.register(WEAK, 4, touched=[])
    desk.promote(first)
    ledger = Ledger(desk.run.store, "late")
    assert ledger.append(replace(ledger.entries()[0], sequence=2, version=champion, run_key="x", **entry))
    result = desk.promote(desk.register(GOOD, 5, touched=[]))
    assert result.values["decision"] == "promote"
    assert "Judged on the 2,500 of 3,000 rows whose ids the champion has not touched." in result.summary
    assert result.metrics["rows_judged"] == 2500
    apart = result.metrics["candidate_roc_auc"] - result.metrics["champion_roc_auc"]
    assert apart == pytest.approx(result.metrics["difference"])
    frame[:2999].to_parquet(tmp_path / "seen.parquet")
    seen = id_fingerprints(tmp_path / "seen.parquet", ["id"])
    knows_all = desk.register(WEAK, 4, touched=[timeless], row_identity=["id"], rows=seen)
    entry = {"package": find_version(desk.run.store, "late", knows_all).package}
    newest = ledger.entries()[-1]
    assert ledger.append(
        replace(newest, sequence=newest.sequence + 1, version=knows_all, run_key="y", **entry)
    )
    held = desk.promote(desk.register([1.0, 0.4], 5, touched=[]))
    assert held.values["decision"] == "hold"
    assert f"the rows that champion version {knows_all} has not touched decide nothing" in held.summary


def test_a_candidate_that_has_touched_the_rows_is_refused(desk: Desk) -> None:
    with pytest.raises(
        BadConfiguration, match=r"version 1 of 'late' may not be judged on this dataset: .*2013-05-01"
    ) as error:
        desk.promote(desk.register(GOOD, 6))
    assert error.value.exit_code == 80
    assert desk.moves() == []


def test_other_classes_or_targets_are_not_compared(desk: Desk, put_rows) -> None:
    desk.promote(desk.register(GOOD, 4))
    three = replace(INFO, classes=[0, 1, 2])
    other = desk.register([[1, 0, 0], [0, 1, 0]], 5, three)
    with pytest.raises(BadConfiguration, match=r"classes of version 2 is \[0, 1, 2\], of the champion"):
        desk.promote(other)
    regression = replace(INFO, task="regression", classes=[])
    with pytest.raises(
        BadConfiguration, match="the model's task is 'regression', the dataset's is 'classification'"
    ):
        desk.promote(desk.register(GOOD, 5, regression))
    assert desk.moves() == [("bootstrap", 1, None)]


def test_another_positive_class_is_judged_by_that_of_the_candidate(desk: Desk) -> None:
    first = desk.promote(desk.register(WEAK, 4), metric="recall")
    assert first.summary.endswith("on 3,000 rows. The positive class is 1.")
    turned = replace(INFO, classes=[1, 0])
    same = desk.promote(desk.register([-w for w in WEAK], 5, turned), metric="recall")
    assert same.metrics["difference"] == 0  # the champion's probabilities in the order of the candidate's
    assert same.metrics["champion_recall"] != pytest.approx(first.metrics["candidate_recall"], abs=1e-6)
    assert same.summary.endswith(
        "Both are judged by the candidate's positive class 0; the champion was trained with 1."
    )
    assert evidence(desk, same)["positive_class"] == 0


def test_a_champion_of_other_features_is_judged_on_columns_that_the_split_carries(
    desk: Desk, put_rows
) -> None:
    gusts = replace(INFO, features=["hour", "wind", "gust"])
    frame = rows().assign(gust=0.0)
    carried = put_rows(desk.run, frame, replace(INFO, carried=["gust"])).uri
    desk.promote(desk.register([*WEAK, 1.0], 4, gusts), dataset=carried)
    candidate = desk.register(GOOD, 5)
    with pytest.raises(
        BadInput, match=r"^champion version 1 of 'late' needs the column 'gust', which test.parquet"
    ):
        desk.promote(candidate)
    assert desk.promote(candidate, "carried", dataset=carried).values["decision"] == "promote"
    with pytest.raises(BadInput, match=r"^candidate version 3 of 'late' needs the column 'gust'"):
        desk.promote(desk.register([*WEAK, 2.0], 5, gusts))


def test_a_regression_is_judged_by_rmse(desk: Desk, put_rows) -> None:
    info = replace(INFO, task="regression", classes=[])
    frame = rows().assign(late=lambda f: f.hour + 0.5 * f.wind + 1.0)
    dataset = put_rows(desk.run, frame, info).uri
    desk.promote(desk.register([0.5, 0.0], 4, info), dataset=dataset)
    result = desk.promote(desk.register([1.0, 0.5], 5, info), dataset=dataset)
    assert result.values["decision"] == "promote"
    assert result.metrics["candidate_rmse"] == pytest.approx(1.0, abs=1e-5)


def test_rows_that_cannot_decide_are_said(desk: Desk, put_rows) -> None:
    one_class = put_rows(desk.run, rows().assign(late=0)).uri
    with pytest.raises(BadInput, match=r"ROC AUC is not defined on these 3,000 rows"):
        desk.promote(desk.register(GOOD, 4), dataset=one_class)


def test_an_altered_champion_decides_nothing(desk: Desk) -> None:
    first = desk.register(WEAK, 4)
    desk.promote(first)
    file = desk.run.fetch(find_version(desk.run.store, "late", first).package) / "model.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="was altered"):
        desk.promote(desk.register(GOOD, 5))
    assert desk.moves() == [("bootstrap", 1, None)]


def test_unknown_models_and_versions_are_named(desk: Desk) -> None:
    with pytest.raises(BadConfiguration, match="no version of model 'late' is registered"):
        desk.promote(1)
    desk.register(GOOD, 4)
    with pytest.raises(BadConfiguration, match=r"has no version 7 in .*known: 1"):
        desk.promote(7)


def test_without_a_version_the_candidate_is_judged(desk: Desk) -> None:
    desk.register(WEAK, 4)
    desk.register(GOOD, 5)
    result = desk.stage(None).run(desk.info("by alias"))
    assert result.values["champion"] == 2


def test_a_task_moves_the_champion_once_also_after_others_have(desk: Desk) -> None:
    first, second = desk.register(WEAK, 4), desk.register(GOOD, 5)
    desk.promote(first, "a")
    moved = desk.promote(second, "b")
    again = desk.promote(first, "a")  # cleared after b has promoted
    assert again.values["decision"] == "bootstrap"
    assert "Moved by this task before" in again.summary
    assert (again.values["champion"], again.values["previous"]) == (second, first)
    assert desk.promote(second, "b").artifacts == moved.artifacts
    assert desk.moves() == [("bootstrap", first, None), ("promote", second, first)]


def test_a_crash_between_ledger_and_alias_is_repaired_by_the_retry(desk: Desk, monkeypatch) -> None:
    from lepton_airflow.registry.mlflow import MlflowRegistry

    version = desk.register(GOOD, 4)

    def away(self, name: str, aliases: Any, package_of: Any) -> None:
        raise LeptonError("MLflow is away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowRegistry, "point", away)
        with pytest.raises(LeptonError, match="MLflow is away"):
            desk.promote(version)
    assert desk.moves() == [("bootstrap", version, None)]
    assert desk.aliases() == {}
    assert desk.promote(version).values["moved"] is True
    assert desk.moves() == [("bootstrap", version, None)]
    assert desk.aliases() == {"champion": version}


def test_an_alias_is_shown_for_no_other_version_when_its_own_was_deleted(desk: Desk, caplog) -> None:
    first, second = desk.register(WEAK, 4), desk.register(GOOD, 5)
    desk.promote(first)
    assert desk.aliases() == {"champion": first}
    desk.mlflow().delete_model_version("late", str(second))
    promoted = desk.promote(second)
    assert (promoted.values["decision"], promoted.values["champion"]) == ("promote", second)
    assert desk.aliases() == {"previous": first}  # not that the first were champion still
    assert (
        f"version {second} of 'late', which should have the alias 'champion', is not in MLflow" in caplog.text
    )

    desk.mlflow().delete_registered_model("late")
    assert desk.promote(second).values["champion"] == second
    assert "model 'late' is not in MLflow any more" in caplog.text

    # Somebody's own versions have the numbers now.
    desk.mlflow().create_registered_model("late")
    for _ in (first, second):
        desk.mlflow().create_model_version("late", source="file:///unused")
    assert desk.promote(second).values["champion"] == second
    assert desk.aliases() == {}


def test_one_task_in_six_processes_moves_once(desk: Desk, at_once) -> None:
    desk.promote(desk.register(WEAK, 4))
    better = desk.register(GOOD, 5)
    stage = desk.stage(better)
    infos = [replace(desk.info(f"copy-{i}"), run_key="the same") for i in range(6)]
    results = at_once([stage.run] * 6, infos)
    assert {r.values["decision"] for r in results} == {"promote"}
    assert all(r.values["moved"] for r in results)
    assert desk.moves() == [("bootstrap", 1, None), ("promote", better, 1)]


def test_six_tasks_at_once_make_one_chain(desk: Desk, at_once) -> None:
    """Each is judged against the champion that it replaces, and the aliases show the end of the chain."""
    versions = [desk.register([1.0, w], 4) for w in (-3.0, -1.5, -0.7, -0.2, 0.1, 0.5)]
    results = at_once([desk.stage(v).run for v in versions], [desk.info(f"p{v}") for v in versions])
    moves = desk.moves()
    assert moves[0][0] == "bootstrap"
    assert [m[2] for m in moves] == [None, *[m[1] for m in moves[:-1]]]
    moved = {r.values["champion"] for r in results if r.values["moved"]}
    assert len(moves) == sum(r.values["moved"] for r in results)
    assert moves[-1][1] == versions[-1]  # the best one beats whoever is champion when it is judged
    assert moves[-1][1] in moved
    assert desk.aliases() == {"champion": versions[-1]} | ({"previous": moves[-1][2]} if moves[-1][2] else {})
