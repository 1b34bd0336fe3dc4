from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

from lepton_airflow.contract import split_pin
from lepton_airflow.data.dataset import DatasetInfo, read_info
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError, OutOfMemory, Preempted
from lepton_airflow.packaging.package import ModelPackage
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.train_model import TrainModel

pytestmark = pytest.mark.slow

CATEGORIES = ["a b", "a_b"]  # two columns that one safe name would merge


def save(frame: pd.DataFrame, info: DatasetInfo, path: Path) -> str:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    info = replace(info, rows=len(frame))
    pq.write_table(table.replace_schema_metadata({b"lepton": json.dumps(asdict(info)).encode()}), path)
    return str(path)


def real_frame(task: str, classes: int = 2) -> tuple[pd.DataFrame, DatasetInfo]:
    """A real table of scikit-learn's, in a fixed shuffle, with categories and missing values of awkward names."""
    loaders = {
        ("regression", 2): load_diabetes,
        ("classification", 2): load_breast_cancer,
        ("classification", 3): load_wine,
    }
    frame = loaders[task, classes](as_frame=True).frame.sample(frac=1, random_state=1).reset_index(drop=True)
    frame = frame[[*frame.columns[:5], "target"]].rename(columns={frame.columns[1]: "größe (mm)"})
    first = frame.columns[0]
    frame["a b"] = np.where(frame[first] > frame[first].median(), "hoch", "low")
    frame.loc[::9, "a b"] = None
    frame["a_b"] = np.random.default_rng(1).choice(["é x", "y", "label"], len(frame))
    frame.loc[::7, first] = np.nan
    labels = sorted(set(frame["target"].tolist())) if task == "classification" else []
    features = [c for c in frame if c != "target"]
    info = DatasetInfo(
        target="target",
        task=task,
        features=features,
        categorical=CATEGORIES,
        classes=labels,
        split_id="one run",
    )
    return frame, info


def splits(folder: Path, task: str = "classification", classes: int = 2) -> tuple[str, str]:
    frame, info = real_frame(task, classes)
    cut = len(frame) * 3 // 4
    train = save(frame[:cut], replace(info, split="train"), folder / "train.parquet")
    return train, save(frame[cut:], replace(info, split="valid"), folder / "valid.parquet")


def package_of(result: Any) -> ModelPackage:
    return ModelPackage.open(Path(split_pin(result.artifacts["model"].uri)[0].removeprefix("file://")))


@pytest.mark.parametrize(
    ("trainer", "task", "classes", "metric", "at_least"),
    [
        ("logistic_regression", "classification", 2, "roc_auc", 0.95),
        ("logistic_regression", "classification", 3, "accuracy", 0.75),
        ("linear_regression", "regression", 2, "r2", 0.25),
        ("hist_gradient_boosting", "classification", 3, "accuracy", 0.75),
        ("hist_gradient_boosting", "regression", 2, "r2", 0.25),
        ("mlp", "classification", 2, "roc_auc", 0.9),
        ("mlp", "regression", 2, "r2", 0.2),
    ],
)
def test_a_standard_model_learns_converts_exactly_and_has_one_digest(
    tmp_path: Path, trainer: str, task: str, classes: int, metric: str, at_least: float
) -> None:
    train, valid = splits(tmp_path, task, classes)
    stage = TrainModel(dataset=train, valid=valid, trainer=trainer)
    result = stage.run(RunInfo.local(tmp_path / "1", run_key="one"))
    value = result.metrics[f"valid_{metric}"]
    assert value is not None
    assert value > at_least
    package = package_of(result)
    assert package.card.parity["difference"] < 1e-5
    assert set(package.card.parity["tried"]) >= {"train", "valid", "missing numbers", "unseen categories"}
    raw = pq.read_table(valid).to_pandas()
    predicted = package.predict(raw)
    assert predicted.shape == ((len(raw), classes) if task == "classification" else (len(raw),))
    label = {"classification": ["probabilities", "label"], "regression": ["prediction"]}[task]
    assert [o.name for o in package.session.get_outputs()] == label
    assert [i.name for i in package.session.get_inputs()] == [f.input for f in package.card.features]
    if trainer == "mlp":
        return  # its export takes seconds; test_a_stopped_mlp_resumes_to_the_same_bytes compares two of its digests
    again = stage.run(RunInfo.local(tmp_path / "2", run_key="two"))
    assert again.artifacts["model"].sha256 == result.artifacts["model"].sha256


def test_out_of_fold_predictions_come_from_models_that_did_not_see_the_cluster(tmp_path: Path) -> None:
    frame, info = real_frame("classification")
    frame["patient"] = np.arange(len(frame)) // 4
    frame["secret"] = np.random.default_rng(0).normal(size=len(frame) // 4 + 1)[frame["patient"]]
    frame["target"] = (frame["secret"] > 0).astype(int)  # only the cluster's identity tells the target
    info = replace(
        info, features=["mean radius", "secret_id"], categorical=["secret_id"], cluster_column="patient"
    )
    frame["secret_id"] = frame["patient"].astype(str)
    path = save(frame, info, tmp_path / "train.parquet")
    hyper = {"min_frequency": 1, "max_categories": 1000}
    stage = TrainModel(dataset=path, trainer="logistic_regression", hyperparameters=hyper, folds=4)
    result = stage.run(RunInfo.local(tmp_path))
    out = pd.read_parquet(split_pin(result.artifacts["out_of_fold"].uri)[0].removeprefix("file://"))
    assert out["row"].tolist() == list(range(len(frame)))
    assert (out.groupby(frame["patient"])["fold"].nunique() == 1).all()
    assert result.metrics["train_roc_auc"] == pytest.approx(1.0, abs=0.01)
    assert result.metrics["out_of_fold_roc_auc"] == pytest.approx(0.5, abs=0.12)
    grouped = package_of(result).card
    assert grouped.cluster_column == "patient"


def test_a_class_too_rare_for_every_fold_gets_probability_zero_there(tmp_path: Path) -> None:
    frame, info = real_frame("classification", 3)
    frame = pd.concat([frame[frame["target"] != 2], frame[frame["target"] == 2].head(2)], ignore_index=True)
    path = save(frame, info, tmp_path / "train.parquet")
    result = TrainModel(dataset=path, trainer="logistic_regression", folds=5).run(RunInfo.local(tmp_path))
    out = pd.read_parquet(split_pin(result.artifacts["out_of_fold"].uri)[0].removeprefix("file://"))
    np.testing.assert_allclose(out[["p_0", "p_1", "p_2"]].sum(axis=1), 1.0)


@pytest.mark.slow
def test_a_stopped_mlp_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    train, valid = splits(tmp_path)
    hyper = {"epochs": 6, "hidden": 8, "batch_size": 100}
    stage = TrainModel(dataset=train, valid=valid, trainer="mlp", hyperparameters=hyper, folds=2)
    whole = stage.run(RunInfo.local(tmp_path / "whole"))
    asked = iter([False] * 30 + [True])  # a question a batch: in the middle of an epoch of the second fold
    with pytest.raises(Preempted, match=r"after step .*; the next try goes on from there"):
        stage.run(RunInfo.local(tmp_path / "cut", should_stop=lambda: next(asked, True)))
    run = RunInfo.local(tmp_path / "cut")
    kept = run.store.keys("checkpoints")
    assert any(k.endswith("fold-0.npy") for k in kept)
    assert any(k.endswith("fold-1/latest") for k in kept)
    assert not any("/fold-0/" in k for k in kept)  # what is finished needs none
    fits = []
    run.should_stop = lambda: bool(fits.append(1))
    run.workdir = tmp_path / "elsewhere"  # what a try left on its own disk is gone
    run.workdir.mkdir()
    resumed = stage.run(run)
    assert len(fits) < 60  # a whole run asks 78 times
    assert resumed.artifacts["model"].sha256 == whole.artifacts["model"].sha256
    assert resumed.artifacts["out_of_fold"].sha256 == whole.artifacts["out_of_fold"].sha256
    assert run.store.keys("checkpoints") == []


# -- the refit ---------------------------------------------------------------------------------------------------------


def test_a_refit_learns_from_both_and_stops_where_valid_settled(tmp_path: Path) -> None:
    train, valid = splits(tmp_path)
    stage = TrainModel(dataset=train, valid=valid)
    before = stage.run(RunInfo.local(tmp_path / "before"))
    result = replace(stage, refit="train+valid").run(RunInfo.local(tmp_path / "refit"))
    package = package_of(result)
    assert package.card.refit is not None
    trees = package.card.refit["settled"]["max_iter"]
    assert package.card.refit["rows"] == "train+valid"
    assert 1 < trees < 200
    # It is the fit that a person would make who joins both by hand and takes that number of trees.
    frame, info = real_frame("classification")
    both = save(frame, replace(info, split="train"), tmp_path / "both.parquet")
    by_hand = TrainModel(dataset=both, hyperparameters={"max_iter": trees}).run(
        RunInfo.local(tmp_path / "hand")
    )
    graphs = [
        (p.path / "model.onnx").read_bytes() for p in (package, package_of(by_hand), package_of(before))
    ]
    assert graphs[0] == graphs[1] != graphs[2]
    # What valid says is said of the model before; the rows of both are touched.
    assert package.card.metrics["valid"] == package_of(before).card.metrics["valid"]
    assert package.card.metrics["train"] == by_hand_on(package, train)
    assert [t.role for t in package.card.touched] == ["train", "valid"]
    assert result.summary.startswith(
        "Trained hist_gradient_boosting on 569 rows of train and valid and 7 features: valid"
    )
    assert f", of the model before the refit (max_iter={trees}); the positive class is 1;" in result.summary
    assert package.rows is not None
    assert len(package.rows) == len(np.unique(package.rows)) >= 569 - 5


def by_hand_on(package: ModelPackage, uri: str) -> dict[str, float | None]:
    from lepton_airflow.statistics import classification_metrics

    raw = pq.read_table(uri).to_pandas()
    found = classification_metrics(raw["target"], package.predict(raw))
    return {name: pytest.approx(value, abs=1e-6) for name, value in found.items()}


@pytest.mark.slow
def test_a_refit_killed_in_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    train, valid = splits(tmp_path)
    hyper = {"epochs": 8, "hidden": 8, "batch_size": 100, "learning_rate": 0.05, "patience": 2}
    stage = TrainModel(dataset=train, valid=valid, trainer="mlp", hyperparameters=hyper, refit="train+valid")
    asked: list[int] = []
    whole = stage.run(RunInfo.local(tmp_path / "whole", should_stop=lambda: bool(asked.append(1))))
    with pytest.raises(Preempted, match="the next try goes on from there"):
        stage.run(RunInfo.local(tmp_path / "cut", should_stop=Stopping(len(asked) - 4)))
    run = RunInfo.local(tmp_path / "cut")
    kept = run.store.keys("checkpoints")
    assert any(k.endswith("/settled.json") for k in kept)
    assert any(k.endswith("/refit/latest") for k in kept)
    assert not any("/final/" in k for k in kept)  # what is settled is not fitted again
    again: list[int] = []
    run.should_stop = lambda: bool(again.append(1))
    resumed = stage.run(run)
    assert len(again) < len(asked) // 2
    assert resumed.artifacts["model"].sha256 == whole.artifacts["model"].sha256
    assert resumed.artifacts["curves"].sha256 == whole.artifacts["curves"].sha256
    assert resumed.metrics == whole.metrics
    assert resumed.summary == whole.summary
    assert run.store.keys("checkpoints") == []


def test_what_was_settled_and_is_damaged_is_settled_again(
    tmp_path: Path, user_module: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    train, valid = splits(tmp_path)
    stage = TrainModel(dataset=train, valid=valid, trainer=user_module("settles"), refit="train+valid")
    run = RunInfo.local(tmp_path)
    with pytest.raises(Preempted):
        stage.run(replace(run, should_stop=Stopping(0)))
    (kept,) = [k for k in run.store.keys("checkpoints") if k.endswith("settled.json")]
    assert json.loads(run.store.read(kept) or b"")["numbers"] == {"c": 0.5}
    run.store.write(kept, b"{")
    result = stage.run(run)
    assert "what an earlier try kept is damaged" in caplog.text
    assert package_of(result).card.refit == {"rows": "train+valid", "settled": {"c": 0.5}}


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("plain", "plain does not say what valid has decided. Call run.settle"),
        ("settles_twice", r"run.settle\(trees=4\): it was 3 before in the same fit"),
    ],
)
def test_a_trainer_that_does_not_say_what_valid_decides_is_not_refitted(
    tmp_path: Path, user_module: Callable[[str], str], function: str, sentence: str
) -> None:
    path = numbers_only(tmp_path)
    frame, info = pd.read_parquet(path), read_info(Path(path))
    halves = [save(frame[k::2], replace(info, split=f"{k}"), tmp_path / f"{k}.parquet") for k in (0, 1)]
    with pytest.raises(BadConfiguration, match=sentence):
        TrainModel(
            dataset=halves[0], valid=halves[1], trainer=user_module(function), refit="train+valid"
        ).run(RunInfo.local(tmp_path))


class Stopping:
    """Asks a fit to stop at its n-th question."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("changed", ["data", "hyperparameters", "seed", "code", "release", "nothing"])
def test_another_fit_does_not_go_on_from_the_checkpoint_of_this_one(
    tmp_path: Path,
    user_module: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changed: str,
) -> None:
    caplog.set_level("INFO")
    trainer = user_module("counting")
    parameters: dict[str, Any] = {
        "dataset": numbers_only(tmp_path),
        "trainer": trainer,
        "hyperparameters": {"steps": 20},
    }
    with pytest.raises(Preempted, match="after step 11"):
        TrainModel(**parameters).run(RunInfo.local(tmp_path, should_stop=Stopping(10)))
    if changed == "data":
        table = pq.read_table(parameters["dataset"])
        pq.write_table(table.slice(1), parameters["dataset"])
    elif changed == "hyperparameters":
        parameters["hyperparameters"] = {"steps": 21}
    elif changed == "seed":
        parameters["seed"] = 1
    elif changed == "code":
        path = tmp_path / "code" / f"{trainer.partition(':')[0]}.py"
        path.write_text(path.read_text() + "\n# a fix\n")
    elif changed == "release":
        monkeypatch.setattr("lepton_airflow.stages.train_model.package_digest", lambda *_: "another")
    run = RunInfo.local(tmp_path)
    TrainModel(**parameters).run(run)
    assert ("final: resuming after step 11" in caplog.text) == (changed == "nothing")
    assert run.store.keys("checkpoints") == []  # also what the fit that was given up had left


def test_the_curves_show_both_losses_and_where_a_fit_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[str, Any]] = []
    for name in ("plot", "axvline", "set"):
        original = getattr(Axes, name)

        def watched(
            self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any
        ) -> Any:
            drawn.append((_name, kwargs.get("label") or kwargs.get("ylabel") or kwargs.get("xlabel") or args))
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(Axes, name, watched)
    train, valid = splits(tmp_path)
    hyper = {"epochs": 4, "hidden": 4}
    stage = TrainModel(dataset=train, valid=valid, trainer="mlp", hyperparameters=hyper)
    with pytest.raises(Preempted):
        stage.run(RunInfo.local(tmp_path, should_stop=Stopping(7)))
    result = stage.run(RunInfo.local(tmp_path))
    picture = Path(split_pin(result.artifacts["curves"].uri)[0].removeprefix("file://"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {("plot", "train_loss"), ("plot", "valid_loss"), ("set", "loss"), ("set", "epoch")} <= set(drawn)
    assert ("axvline", "resumed") in drawn


def test_after_the_training_a_picture_is_no_reason_to_fail(
    tmp_path: Path,
    user_module: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = TrainModel(dataset=numbers_only(tmp_path), trainer=user_module("counting")).run(
        RunInfo.local(tmp_path)
    )
    assert set(result.artifacts) == {"model"}
    assert "curves.png is not drawn: matplotlib is not installed" in caplog.text


def test_what_a_users_trainer_raises_is_told_with_its_traceback(
    tmp_path: Path, user_module: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    path, trainer = numbers_only(tmp_path), user_module("raises")
    with pytest.raises(
        LeptonError, match=f"trainer {trainer}, which is your code, failed in line .*: KeyError: 'deep'"
    ) as e:
        TrainModel(dataset=path, trainer=trainer).run(RunInfo.local(tmp_path))
    assert e.value.exit_code == 1
    assert 'return {}["deep"]' in caplog.text
    with pytest.raises(BadInput, match=r"^said by the trainer itself$"):
        TrainModel(dataset=path, trainer=user_module("refuses")).run(RunInfo.local(tmp_path))
    with pytest.raises(
        OutOfMemory, match=r"the GPU's memory is full: CUDA out of memory\. Lower the batch size"
    ):
        TrainModel(dataset=path, trainer=user_module("fills_the_gpu")).run(RunInfo.local(tmp_path))


def test_the_gpus_figures_are_among_the_metrics(
    tmp_path: Path, user_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = TrainModel(dataset=numbers_only(tmp_path), trainer=user_module("plain"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    without = stage.run(RunInfo.local(tmp_path / "1")).metrics
    monkeypatch.setattr("lepton_airflow.training.gpu.Readings.metrics", lambda self: {"gpu_count": 1.0})
    assert stage.run(RunInfo.local(tmp_path / "2")).metrics == without | {"gpu_count": 1.0}


@pytest.mark.slow
def test_a_users_torch_trainer_is_seeded_also_where_it_imports_torch_itself(tmp_path: Path) -> None:
    """In a process of its own: here torch is loaded, and seeding that is easy."""
    (tmp_path / "late.py").write_text(TRAINERS)
    code = (
        "import sys; from pathlib import Path; from lepton_airflow.stages import RunInfo\n"
        "from lepton_airflow.stages.train_model import TrainModel\n"
        "stage = TrainModel(dataset=sys.argv[1], trainer='late:unseeded', seed=7)\n"
        "for number in '12': print(stage.run(RunInfo.local(sys.argv[2] + number)).artifacts['model'].sha256)\n"
        "assert 'torch' in sys.modules\n"
    )
    command = [sys.executable, "-c", code, numbers_only(tmp_path), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    first, second = done.stdout.split()
    assert first == second


def test_a_hundred_thousand_categories_stay_small(tmp_path: Path) -> None:
    n = 100_000
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.normal(size=n), "id": [f"id {i}" for i in range(n)]})
    frame.loc[: n // 4, "id"] = "common"
    frame["y"] = ((frame["x"] > 0) ^ (frame["id"] == "common")).astype(int)
    info = DatasetInfo(
        target="y",
        task="classification",
        features=["x", "id"],
        categorical=["id"],
        classes=[0, 1],
        time_column="t",
        time_range=["2013-01-01", "2013-01-02"],
    )
    frame["t"] = pd.Timestamp("2013-01-01")
    path = save(frame, info, tmp_path / "train.parquet")
    hyper = {"max_iter": 20}
    result = TrainModel(dataset=path, hyperparameters=hyper).run(RunInfo.local(tmp_path))
    assert result.artifacts["model"].bytes < 100_000
    assert result.metrics["train_roc_auc"] > 0.99


# -- the user's own trainers ---------------------------------------------------------------------------------------------

TRAINERS = """
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler


def plain(train, valid, hyperparameters, run):
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(train[run.features], train[run.target])


def columns(train, valid, hyperparameters, run):
    parts = [("n", StandardScaler(), run.numbers), ("c", OneHotEncoder(handle_unknown="ignore"), run.categorical)]
    return make_pipeline(ColumnTransformer(parts), LogisticRegression()).fit(train[run.features], train[run.target])


def some_columns(train, valid, hyperparameters, run):
    model = make_pipeline(ColumnTransformer([("n", "passthrough", run.numbers[:2])]), LogisticRegression())
    return model.fit(train[run.features], train[run.target])


def inexact(train, valid, hyperparameters, run):
    encode = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    parts = ColumnTransformer([("c", encode, run.categorical)])
    boosted = HistGradientBoostingClassifier(max_iter=5, categorical_features=[0, 1])
    return make_pipeline(parts, boosted).fit(train[run.features], train[run.target])


def module(train, valid, hyperparameters, run):
    import torch

    torch.manual_seed(run.seed)
    x = torch.tensor(train[run.features].to_numpy("float32"))
    scale = x.std(0)
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(x.shape[1]), torch.nn.Linear(x.shape[1], 2), torch.nn.Softmax(1))
    net(x)
    return net, x[:2]


def logits(train, valid, hyperparameters, run):
    import torch

    net = torch.nn.Linear(len(run.features), 2)
    net.example_input = torch.zeros(2, len(run.features))
    return net


def no_example(train, valid, hyperparameters, run):
    import torch

    return torch.nn.Linear(len(run.features), 2)


def one_probability(train, valid, hyperparameters, run):
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(len(run.features), 1), torch.nn.Sigmoid())
    return net, torch.zeros(2, len(run.features))


def own_onnx(train, valid, hyperparameters, run):
    from skl2onnx import to_onnx

    model = plain(train, valid, hyperparameters, run)
    x = train[run.features].to_numpy("float32")
    return to_onnx(model, x[:1], options={"zipmap": False})


def text(train, valid, hyperparameters, run):
    return "a model"


def counting(train, valid, hyperparameters, run):
    found = run.latest_checkpoint()
    done = found.step if found else 0
    while done < hyperparameters.get("steps", 3):
        done += 1
        run.report(done, train_loss=1 / done)
        run.save_checkpoint(done, lambda folder: (folder / "done").write_text(str(done)))
    return plain(train, valid, hyperparameters, run)


def raises(train, valid, hyperparameters, run):
    return {}["deep"]


def refuses(train, valid, hyperparameters, run):
    from lepton_airflow.errors import BadInput

    raise BadInput("said by the trainer itself")


def fills_the_gpu(train, valid, hyperparameters, run):
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory.\\nTried to allocate much")


def unseeded(train, valid, hyperparameters, run):
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(len(run.features), 2), torch.nn.Softmax(1))
    return net, torch.zeros(2, len(run.features))


def settles(train, valid, hyperparameters, run):
    from sklearn.linear_model import LogisticRegression

    if valid is None and run.should_stop():
        from lepton_airflow.errors import Preempted

        raise Preempted("stopped in the refit.")
    run.settle(c=0.5)
    names = [n for n in run.numbers if not train[n].isna().any()]
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    columns = ColumnTransformer([("n", StandardScaler(), names)])
    c = run.settled["c"] if run.settled else 1.0
    return make_pipeline(columns, LogisticRegression(C=c)).fit(train[run.features], train[run.target])


def settles_twice(train, valid, hyperparameters, run):
    run.settle(trees=3)
    run.settle(trees=4)
    return plain(train, valid, hyperparameters, run)


def decides(train, valid, hyperparameters, run):
    from sklearn.svm import LinearSVC

    return LinearSVC().fit(train[run.numbers], train[run.target])
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    folder = tmp_path / "code"
    folder.mkdir()
    name = f"trainers_{tmp_path.name}".replace("-", "_").replace("[", "_").replace("]", "_")
    (folder / f"{name}.py").write_text(TRAINERS)
    monkeypatch.syspath_prepend(str(folder))
    return lambda function: f"{name}:{function}"


def numbers_only(folder: Path) -> str:
    frame, info = real_frame("classification")
    frame = frame.drop(columns=CATEGORIES).dropna().reset_index(drop=True)
    features = [c for c in frame if c != "target"]
    return save(frame, replace(info, features=features, categorical=[]), folder / "numbers.parquet")


@pytest.mark.parametrize(
    ("function", "framework"),
    [("plain", "scikit-learn"), ("module", "torch"), ("one_probability", "torch"), ("own_onnx", "onnx")],
)
def test_a_users_trainer_over_numbers_is_packaged(
    tmp_path: Path, user_module: Callable[[str], str], function: str, framework: str
) -> None:
    path = numbers_only(tmp_path)
    result = TrainModel(dataset=path, trainer=user_module(function)).run(RunInfo.local(tmp_path))
    package = package_of(result)
    assert package.card.framework == framework
    assert package.card.parity["difference"] < 1e-5
    raw = pq.read_table(path).to_pandas()
    np.testing.assert_allclose(package.predict(raw).sum(axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("function", ["columns", "some_columns"])
def test_a_users_pipeline_over_raw_columns_is_packaged(
    tmp_path: Path, user_module: Callable[[str], str], function: str
) -> None:
    frame, info = real_frame("classification")
    path = save(frame.dropna(), info, tmp_path / "train.parquet")
    result = TrainModel(dataset=path, trainer=user_module(function)).run(RunInfo.local(tmp_path))
    assert "unseen categories" in package_of(result).card.parity["tried"]


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("inexact", "ONNX and native predictions differ by"),
        ("text", "it returned str; expected a fitted scikit-learn estimator"),
        ("no_example", "without an example input"),
        ("logits", "takes numbers, and 'a b' is a category"),
        ("decides", "LinearSVC has no predict_proba"),
        (
            "plain",
            r"which is your code, failed in line \d+ of trainers_\w+\.py: ValueError: could not convert",
        ),
    ],
)
def test_what_a_trainer_may_not_return_is_refused(
    tmp_path: Path, user_module: Callable[[str], str], function: str, sentence: str
) -> None:
    frame, info = real_frame("classification")
    path = save(frame.dropna(), info, tmp_path / "train.parquet")
    with pytest.raises(LeptonError, match=sentence):
        TrainModel(dataset=path, trainer=user_module(function)).run(RunInfo.local(tmp_path))
    assert RunInfo.local(tmp_path).store.keys("artifacts") == []


def test_logits_are_no_probabilities(tmp_path: Path, user_module: Callable[[str], str]) -> None:
    with pytest.raises(BadInput, match="no probabilities; end the network with softmax"):
        TrainModel(dataset=numbers_only(tmp_path), trainer=user_module("logits")).run(RunInfo.local(tmp_path))


# -- bad input -----------------------------------------------------------------------------------------------------------

BREAKS: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "no feature": (
        lambda f: f.drop(columns="a_b"),
        "column 'a_b' is not in train.parquet; did you mean 'a b'",
    ),
    "no target": (lambda f: f.drop(columns="target"), "column 'target' is not in"),
    "all null": (lambda f: f.assign(**{"a b": None}), "feature 'a b' is missing in all 569 rows"),
    "zero rows": (lambda f: f.head(0), "0 rows, expected some"),
    "one class": (lambda f: f.assign(target=1), "has no row of|is 1 in all rows"),
    "null target": (lambda f: f.assign(target=f["target"].where(f.index > 2)), "missing in 3 of 569 rows"),
    "new class": (lambda f: f.assign(target=f["target"] * 7), "value '7', which is none of train's classes"),
    "infinite": (lambda f: f.assign(**{"mean area": np.inf}), "'mean area' is infinite"),
    "text": (lambda f: f.assign(**{"mean area": "wide"}), "'mean area' should hold numbers"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_bad_rows_get_a_sentence_and_leave_the_store_alone(tmp_path: Path, case: str) -> None:
    change, sentence = BREAKS[case]
    frame, info = real_frame("classification")
    path = save(change(frame), info, tmp_path / "train.parquet")
    with pytest.raises(BadInput, match=sentence):
        TrainModel(dataset=path, trainer="logistic_regression").run(RunInfo.local(tmp_path))
    assert RunInfo.local(tmp_path).store.keys("") == []


def test_categories_that_are_all_rare_leave_nothing_to_learn_from(tmp_path: Path) -> None:
    frame = pd.DataFrame({"c": list("abcde") * 2, "y": [0, 1] * 5})
    info = DatasetInfo(target="y", task="classification", features=["c"], categorical=["c"], classes=[0, 1])
    path = save(frame, info, tmp_path / "train.parquet")
    for trainer in ("logistic_regression", "hist_gradient_boosting"):
        with pytest.raises(
            BadInput, match="no value of the features 'c' occurs in min_frequency=10 of the 10 rows"
        ):
            TrainModel(dataset=path, trainer=trainer).run(RunInfo.local(tmp_path))


def test_validation_rows_of_another_preparation_must_not_be_learned_from(tmp_path: Path) -> None:
    frame, info = real_frame("classification")
    info = replace(info, split_id=None, split="train")

    def train(rows: pd.DataFrame, valid: pd.DataFrame, /, **about: Any) -> None:
        save(rows, replace(info, **about.get("train", {})), tmp_path / "train.parquet")
        save(valid, replace(info, **about.get("valid", {})), tmp_path / "valid.parquet")
        paths = {"dataset": str(tmp_path / "train.parquet"), "valid": str(tmp_path / "valid.parquet")}
        TrainModel(**paths, trainer="logistic_regression").run(RunInfo.local(tmp_path))

    with pytest.raises(
        BadInput, match=r"^valid shares rows with dataset: 31 of its 200 distinct rows are in"
    ):
        train(frame[:400], frame[369:])
    with pytest.raises(BadInput, match="both are the split 'train' of one preparation"):
        train(frame[:400], frame[400:], train={"split_id": "one"}, valid={"split_id": "one"})
    may, late_may, june = (
        ["2013-05-01", "2013-05-31"],
        ["2013-05-31T23:00:00", "2013-06-30"],
        ["2013-06-01", "2013-06-30"],
    )
    with pytest.raises(
        BadInput, match="its rows span 2013-05-31T23:00:00 to 2013-06-30, those of dataset 2013-05-01 to"
    ):
        train(frame[:400], frame[400:], train={"time_range": may}, valid={"time_range": late_may})
    train(frame[:400], frame[:400], train={"time_range": may}, valid={"time_range": june})
    train(frame[:400], frame[400:], train={"time_range": may})  # one side has no time: its rows are compared


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        (
            "valid",
            "valid: train has the feature, take both from one PrepareData: column 'a_b' is not in other.parquet",
        ),
        (
            "also_touched",
            "known again by the model's features and target: column 'a_b' is not in other.parquet",
        ),
    ],
)
def test_who_needs_a_column_that_another_dataset_lacks_is_said(
    tmp_path: Path, field: str, sentence: str
) -> None:
    train, _ = splits(tmp_path)
    frame, info = real_frame("classification")
    other = save(frame.drop(columns="a_b"), replace(info, split="other"), tmp_path / "other.parquet")
    stage = TrainModel(dataset=train, trainer="logistic_regression")
    with pytest.raises(LeptonError, match=sentence) as caught:
        replace(stage, **{field: [other] if field == "also_touched" else other}).run(RunInfo.local(tmp_path))
    assert caught.value.exit_code == 80


def test_a_profile_that_is_none_is_refused(tmp_path: Path) -> None:
    train, _ = splits(tmp_path)
    with pytest.raises(BadInput, match=r"train\.parquet is no reference profile: pass prepare"):
        TrainModel(dataset=train, trainer="logistic_regression", profile=train).run(RunInfo.local(tmp_path))


def test_a_target_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    frame, info = real_frame("regression")
    frame.loc[3, "target"] = np.inf
    path = save(frame, info, tmp_path / "train.parquet")
    with pytest.raises(BadInput, match="missing or infinite in 1 of 442 rows, first in row 3"):
        TrainModel(dataset=path, trainer="linear_regression").run(RunInfo.local(tmp_path))


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"trainer": "logistic_regresion"}, "did you mean 'logistic_regression'"),
        ({"trainer": "linear_regression"}, "does regression, the dataset asks for classification"),
        ({"hyperparameters": {"learning_rat": 0.1}}, "did you mean 'learning_rate'"),
        ({"hyperparameters": {"max_iter": "many"}}, "max_iter='many' is not a number"),
        ({"hyperparameters": {"max_iter": 1.5}}, "not a whole number"),
        ({"hyperparameters": {"learning_rate": -1.0}}, "learning_rate"),
        ({"trainer": "mlp", "hyperparameters": {"layers": 0}}, "layers=0, expected at least 1"),
        ({"trainer": "mlp", "hyperparameters": {"dropout": 1.0}}, "expected a dropout from 0 to below 1"),
        ({"hyperparameters": {"max_categories": 0}}, "max_categories=0, expected at least 1"),
        ({"trainer": "mlp", "hyperparameters": {"compile": 1}}, "compile=1 is not true or false"),
        ({"trainer": "mlp", "hyperparameters": {"precision": "fp8"}}, "precision='fp8', expected one of"),
        ({"trainer": "mlp", "device": "cuda:9"}, "device='cuda:9' cannot be used here"),
        ({"checkpoint_s": -1.0}, "checkpoint_s=-1.0: expected 0 or more"),
        ({"trainer": "no_such_module_here:fit"}, "no module 'no_such_module_here'"),
        ({"folds": 1}, "folds=1: expected at least 2"),
        ({"refit": "train+valid"}, r"refit='train\+valid' needs valid"),
        ({"folds": 3, "fold_by": "time"}, "needs a time column"),
    ],
)
def test_a_wrong_parameter_gets_a_sentence(tmp_path: Path, parameters: dict[str, Any], sentence: str) -> None:
    train, _ = splits(tmp_path)
    with pytest.raises(BadConfiguration, match=sentence):
        TrainModel(dataset=train, **parameters).run(RunInfo.local(tmp_path))
