from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.connections import Connection
from lepton_airflow.contract import split_pin
from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadConfiguration, BadInput, Preempted, StoreError
from lepton_airflow.stages import Result, RunInfo
from lepton_airflow.stages.tune_model import TuneModel
from lepton_airflow.store import Store
from lepton_airflow.store.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

SPACE = {"C": {"low": 1e-4, "high": 1e2, "log": True}}


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(400, 5)), columns=[f"x {i}" for i in range(5)])
    frame["y"] = (frame["x 0"] - frame["x 1"] + rng.normal(size=400) > 0).astype(int)
    info = DatasetInfo(
        target="y",
        task="classification",
        features=list(frame.columns[:5]),
        classes=[0, 1],
        split="train",
        rows=400,
    )
    path = tmp_path / "train.parquet"
    table = pa.Table.from_pandas(frame, preserve_index=False)
    pq.write_table(table.replace_schema_metadata({b"lepton": json.dumps(asdict(info)).encode()}), path)
    return str(path)


def tune(dataset: str, **parameters: Any) -> TuneModel:
    defaults = {"trainer": "logistic_regression", "search_space": SPACE, "folds": 3, "trials": 6}
    return TuneModel(dataset=dataset, **(defaults | parameters))


def trials_of(result: Result) -> list[dict[str, Any]]:
    path = Path(split_pin(result.artifacts["trials"].uri)[0].removeprefix("file://"))
    trials: list[dict[str, Any]] = json.loads(path.read_text())["trials"]
    return trials


def test_the_best_of_the_trials_is_found_drawn_and_repeatable(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = tune(
        dataset,
        search_space=SPACE | {"max_iter": {"low": 50, "high": 200, "step": 50}},
        hyperparameters={"min_frequency": 5},
        trials=5,
    )
    with caplog.at_level(logging.INFO):
        result = stage.run(RunInfo.local(tmp_path / "1"))
    complete = [t for t in trials_of(result) if t["state"] == "complete"]
    best = min(complete, key=lambda t: t["value"])
    assert result.metrics["best_log_loss"] == best["value"] == pytest.approx(np.mean(best["folds"]))
    assert result.values["best"] == {"min_frequency": 5, **best["hyperparameters"]}
    assert best["hyperparameters"]["max_iter"] in (50, 100, 150, 200)
    for name in ("history", "importance"):
        picture = Path(split_pin(result.artifacts[name].uri)[0].removeprefix("file://"))
        assert picture.read_bytes().startswith(b"\x89PNG")
    lines = [r.getMessage() for r in caplog.records if "of 5)" in r.getMessage()]
    assert len(lines) == 5
    assert "s left" in lines[0]
    again = stage.run(RunInfo.local(tmp_path / "2"))
    assert again.values["best"] == result.values["best"]


DRIVER = """
import sys
from pathlib import Path
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.tune_model import TuneModel

if __name__ == "__main__":
    dataset, folder, workers = sys.argv[1:]
    stage = TuneModel(
        dataset=dataset, trainer="slow_trainer:fit", search_space={"C": {"low": 1e-4, "high": 1e2, "log": True}},
        folds=2, trials=4, workers=int(workers), pruner="none",
    )
    print(stage.run(RunInfo.local(folder, run_key="killed")).summary)
"""

# From the sixth fit on, and as long as the flag file exists, a fit says that it began and then never ends.
SLOW_TRAINER = """
import os, pathlib, threading
from sklearn.linear_model import LogisticRegression

def fit(train, valid, hyperparameters, run):
    flag = pathlib.Path(os.environ["HANG"])
    with flag.with_name("fits").open("a") as fits:
        print(hyperparameters["C"], os.getpid(), file=fits)
    if flag.exists() and len(flag.with_name("fits").read_text().splitlines()) > 5:
        threading.Event().wait()
    return LogisticRegression(C=hyperparameters["C"]).fit(train[run.features], train[run.target])
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool], seconds: float) -> bool:
    import threading
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        threading.Event().wait(0.05)
    return condition()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_study_goes_on_without_losing_or_repeating_a_finished_trial(
    dataset: str, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "drive.py").write_text(DRIVER)
    (tmp_path / "slow_trainer.py").write_text(SLOW_TRAINER)
    flag, fits = tmp_path / "hang", tmp_path / "fits"
    flag.touch()
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "HANG": str(flag), "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    command = [sys.executable, str(tmp_path / "drive.py"), dataset, str(tmp_path / "run"), str(workers)]
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert until(lambda: fits.exists() and len(fits.read_text().splitlines()) > 5, 120)
        children = {int(line.split()[1]) for line in fits.read_text().splitlines()}
        os.kill(first.pid, signal.SIGKILL)
    finally:
        first.kill()
        first.wait()
    assert until(lambda: not any(map(alive, children)), 5)  # no worker outlives its parent

    store = Store(str(tmp_path / "run" / "store"))
    (database,) = (tmp_path / "run" / "store" / "studies").glob("*.db")
    storage = f"sqlite:///{database}"
    (name,) = optuna.get_all_study_names(storage)
    before = optuna.load_study(study_name=name, storage=storage).trials
    finished = [t for t in before if t.state.name == "COMPLETE"]
    running = [t for t in before if t.state.name == "RUNNING"]
    assert finished
    assert 0 < len(running) <= workers

    flag.unlink()
    fitted_before = len(fits.read_text().splitlines())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert "4 trials complete, 0 pruned, 0 failed" in done.stdout
    after = optuna.load_study(study_name=name, storage=storage).trials
    assert [(t.number, t.params, t.value) for t in after[: len(before)] if t in finished] == [
        (t.number, t.params, t.value) for t in finished
    ]
    complete = [t.params["C"] for t in after if t.state.name == "COMPLETE"]
    assert len(complete) == len(set(complete)) == 4
    # What was cut short was run again; one that had only just begun had no parameters yet.
    assert {t.params["C"] for t in running if t.params} <= set(complete)
    fitted_after = len(fits.read_text().splitlines()) - fitted_before
    assert fitted_after == 2 * (4 - len(finished))
    assert store.keys("artifacts")


def test_two_workers_share_a_study_in_postgresql(dataset: str, tmp_path: Path, postgres: Any) -> None:
    connection = Connection(
        id="studies",
        type="postgres",
        host=postgres["host"],
        port=postgres["port"],
        login=postgres["user"],
        password=postgres["password"],
        schema=postgres["dbname"],
    )
    run = RunInfo.local(tmp_path, connections={"studies": connection})
    stage = tune(dataset, workers=2, trials=3, storage_connection="studies", pruner="none")
    result = stage.run(run)
    assert result.metrics["trials_complete"] == 3
    assert len({t["hyperparameters"]["C"] for t in trials_of(result)}) == 3
    # With a larger budget, the study goes on.
    more = tune(dataset, trials=4, storage_connection="studies", pruner="none").run(run)
    assert more.metrics["trials_complete"] == 4
    assert trials_of(more)[:3] == trials_of(result)
    wrong = Connection(**(asdict(connection) | {"port": 1}))
    with pytest.raises(StoreError, match=r"storage 127\.0\.0\.1:1/postgres cannot be used") as error:
        stage.run(RunInfo.local(tmp_path, connections={"studies": wrong}))
    assert postgres["password"] not in str(error.value)


def without_times(result: Result) -> dict[str, Any]:
    """All that a search came to, but for how long its trials took and what the study is called."""
    trials = [{k: v for k, v in trial.items() if k != "seconds"} for trial in trials_of(result)]
    drawn = {name: a.sha256 for name, a in result.artifacts.items() if name != "trials"}
    return {
        "trials": trials,
        "drawn": drawn,
        "best": result.values,
        "metrics": result.metrics,
        "said": result.summary,
    }


SPACE_OF_TWO = SPACE | {"max_iter": {"low": 50, "high": 90}}


@pytest.fixture
def undisturbed(dataset: str, tmp_path: Path) -> dict[str, Any]:
    """What a short search comes to that nobody stops."""
    stage = tune(dataset, folds=2, trials=2, search_space=SPACE_OF_TWO)
    return without_times(stage.run(RunInfo.local(tmp_path / "undisturbed")))


def test_a_search_that_is_stopped_wherever_it_asks_comes_to_the_same(
    dataset: str, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    stage = tune(dataset, folds=2, trials=2, search_space=SPACE_OF_TWO)
    asked, stopped = 0, True
    while stopped:
        asked, folder = asked + 1, tmp_path / str(asked)
        answers = iter([False] * (asked - 1))
        try:
            result = stage.run(RunInfo.local(folder, should_stop=partial(next, answers, True)))
            stopped = False
        except Preempted:
            result = stage.run(RunInfo.local(folder))
        assert without_times(result) == undisturbed, f"asked to stop at its question {asked}"
    assert asked > 4  # between any two folds


def test_a_search_killed_while_it_draws_parameters_comes_to_the_same(
    dataset: str, tmp_path: Path, undisturbed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    stage = tune(dataset, folds=2, trials=2, search_space=SPACE_OF_TWO)
    with caplog.at_level(logging.INFO), pytest.raises(Preempted):
        stage.run(RunInfo.local(tmp_path, should_stop=lambda: "(1 of 2)" in caplog.text))
    storage = f"sqlite:///{next((tmp_path / 'store' / 'studies').glob('*.db'))}"
    study = optuna.load_study(study_name=optuna.get_all_study_names(storage)[0], storage=storage)
    study.ask({"C": optuna.distributions.FloatDistribution(1e-4, 1e2, log=True)})  # max_iter was to come
    assert [t.state.name for t in study.trials].count("RUNNING") == 1
    assert without_times(stage.run(RunInfo.local(tmp_path))) == undisturbed


def test_a_refresh_makes_a_finished_study_anew(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = tune(dataset, trials=2)
    stage.run(RunInfo.local(tmp_path))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        stage.run(RunInfo.local(tmp_path))
        assert "of 2)" not in caplog.text  # nothing is left to do
        stage.run(RunInfo.local(tmp_path, refresh=True))
    assert "(2 of 2)" in caplog.text


def test_bad_trials_are_pruned_after_their_first_fold(dataset: str, tmp_path: Path) -> None:
    space = {"C": {"choices": [1e-7, 1.0]}}
    result = tune(dataset, search_space=space, trials=9, hyperparameters={"max_iter": 50}).run(
        RunInfo.local(tmp_path)
    )
    pruned = [t for t in trials_of(result) if t["state"] == "pruned"]
    assert pruned
    assert all(len(t["folds"]) < 3 for t in pruned)
    assert result.values["best"]["C"] == 1.0


def test_a_study_is_not_taken_up_for_another_pruner_or_fewer_trials(dataset: str, tmp_path: Path) -> None:
    kept, changes = RunInfo.local(tmp_path / "kept"), [{}, {"pruner": "none"}, {"trials": 6}]

    def found(run: RunInfo, changed: dict[str, Any]) -> list[Any]:
        space = {"C": {"choices": [1e-7, 1.0]}}
        parameters = {"search_space": space, "trials": 9, "hyperparameters": {"max_iter": 50}} | changed
        return [
            (t["state"], t["value"], t["hyperparameters"], t["folds"])
            for t in trials_of(tune(dataset, **parameters).run(run))
        ]

    for n, changed in enumerate(changes):  # the task is cleared, and does something else
        assert found(kept, changed) == found(RunInfo.local(tmp_path / str(n)), changed)


def test_two_stores_that_share_a_database_have_a_study_each(dataset: str, tmp_path: Path) -> None:
    stage = tune(dataset, trials=2, storage=f"sqlite:///{tmp_path}/shared.db")
    names = set()
    for store in ("staging", "production", "production"):  # whose runs have the same key
        result = stage.run(RunInfo.local(tmp_path / store))
        path = Path(split_pin(result.artifacts["trials"].uri)[0].removeprefix("file://"))
        names.add(json.loads(path.read_text())["study"])
    assert len(names) == 2


def test_the_time_budget_ends_the_search_once_a_trial_is_complete(dataset: str, tmp_path: Path) -> None:
    result = tune(dataset, timeout_s=0.0).run(RunInfo.local(tmp_path))
    assert result.metrics["trials_complete"] == 1


def test_a_metric_of_the_positive_class_says_which_one(dataset: str, tmp_path: Path) -> None:
    result = tune(dataset, metric="recall", trials=1).run(RunInfo.local(tmp_path))
    assert result.summary.endswith("failed. The positive class is 1.")


def test_a_set_that_cannot_be_fitted_fails_alone(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fragile_trainer.py").write_text(
        "from sklearn.linear_model import LogisticRegression\n"
        "SEARCH_SPACE = {'kind': {'choices': ['good', 'bad']}}\n"
        "def fit(train, valid, hyperparameters, run):\n"
        "    if hyperparameters['kind'] == 'bad':\n"
        "        raise ArithmeticError('it diverged')\n"
        "    return LogisticRegression().fit(train[run.features], train[run.target])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    stage = tune(dataset, trainer="fragile_trainer:fit", search_space=None)
    result = stage.run(RunInfo.local(tmp_path))
    assert result.values["best"] == {"kind": "good"}
    assert result.metrics["trials_failed"] > 0
    assert sum(result.metrics[f"trials_{s}"] or 0 for s in ("complete", "pruned", "failed")) == 6
    hopeless = tune(
        dataset, trainer="fragile_trainer:fit", search_space={"kind": {"choices": ["bad"]}}, trials=50
    )
    with pytest.raises(
        BadInput,
        match=r"none of 3 trials gave a value; the last one: trainer fragile_trainer:fit, which is your code, failed in "
        r"line 5 of fragile_trainer\.py: ArithmeticError: it diverged",
    ):
        hopeless.run(RunInfo.local(tmp_path))


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"search_space": {"max_itr": {"low": 1, "high": 2}}}, "has no 'max_itr'; did you mean 'max_iter'"),
        ({"search_space": {"C": {"low": 2.0, "high": 1.0}}}, "low"),
        ({"search_space": {"C": {"low": 0.0, "high": 1.0, "log": True}}}, "low"),
        ({"search_space": {"C": {"low": 1.0, "hihg": 2.0}}}, "did you mean 'high'"),
        ({"search_space": {"C": {"choices": []}}}, "choices must be a list"),
        ({"search_space": {"max_iter": {"low": 1.5, "high": 2.5}}}, "max_iter is a whole number"),
        ({"search_space": {"C": 3}}, "is not a range"),
        ({"hyperparameters": {"C": 1.0}}, "'C' is fixed in hyperparameters and searched"),
        ({"metric": "roc_acu"}, "did you mean 'roc_auc'"),
        ({"metric": "rmse"}, "does not fit classification"),
        ({"max_rows": 0}, "max_rows=0: expected at least 1"),
        ({"trials": 0}, "trials=0: expected at least 1"),
        ({"storage": "postgresql://u:secret@h/d"}, "holds a password"),
        ({"storage": "somewhere"}, "is no database URL"),
        ({"storage": "nosuchdb://h/d"}, "is no database URL"),
        ({"storage_connection": "studies"}, "did not reach the stage"),
        ({"storage": "sqlite:///x.db", "storage_connection": "studies"}, "keep one"),
    ],
)
def test_a_wrong_parameter_gets_a_sentence(
    dataset: str, tmp_path: Path, parameters: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadConfiguration, match=sentence) as error:
        tune(dataset, **parameters).run(RunInfo.local(tmp_path))
    assert "secret" not in str(error.value)


def test_a_remote_store_keeps_the_study_trial_by_trial(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(f"memory://{tmp_path.name}-tuning")
    stage = tune(dataset, trials=5, pruner="none")

    def values(folder: str) -> list[float]:
        copies = Checkpoints(store, store.keys("checkpoints")[0].rpartition("/")[0], tmp_path / folder, 0.0)
        found = copies.latest()
        assert found is not None
        storage = f"sqlite:///{found.path / 'study.db'}"
        (name,) = optuna.get_all_study_names(storage)
        return [t.value for t in optuna.load_study(study_name=name, storage=storage).trials if t.value]

    with caplog.at_level(logging.INFO):
        two = lambda: sum("of 5)" in r.getMessage() for r in caplog.records) >= 2  # noqa: E731
        with pytest.raises(Preempted):
            stage.run(RunInfo.local(tmp_path / "one", store=store, should_stop=two))
    before = values("before")
    assert len(before) == 2
    with caplog.at_level(logging.INFO):  # on another machine: nothing but the store is left
        result = stage.run(RunInfo.local(tmp_path / "two", store=store))
    assert "taken up with 2 finished trials" in caplog.text
    assert result.metrics["trials_complete"] == 5
    assert values("after")[:2] == before
    assert len(values("again")) == 5


@pytest.mark.parametrize("store", ["odd a%20b?#/store", "memory://odd-tuning"])
def test_a_second_run_in_the_same_folder_goes_on_with_the_study(
    dataset: str, tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Store(store if "://" in store else str(tmp_path / store))
    for trials in (2, 3):  # an empty storage is none
        stage = tune(dataset, trials=trials, storage="", storage_connection="", pruner="none")
        with caplog.at_level(logging.INFO):
            result = stage.run(RunInfo.local(tmp_path / "a%20b?#", store=kept))
        assert result.metrics["trials_complete"] == trials
    assert "taken up with 2 finished trials" in caplog.text
    assert len(kept.keys("studies")) + len(kept.keys("checkpoints")) > 0
