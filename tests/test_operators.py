from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections import UserList
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pendulum
import pytest
from airflow.providers.common.compat.sdk import AirflowFailException, AirflowSkipException, XComNotFound
from airflow.sdk import DAG

from lepton_airflow import operators
from lepton_airflow.contract import split_pin
from lepton_airflow.errors import BadConfiguration, LeptonError, Preempted, RunnerError
from lepton_airflow.operators import StageOperator, TrainModelOperator
from lepton_airflow.runners import InProcess, Subprocess
from lepton_airflow.stages import Result, RunInfo, Stage, all_stages, get_stage
from lepton_airflow.store import Store
from lepton_airflow.testing import until
from lepton_airflow.testing.probe_stages import Copy, Fail, Hang, Look, Resume

ROOT = Path(__file__).parents[1]


@dataclass(kw_only=True)
class Choose(Stage):
    """Take one of two, or none."""

    mode: Literal["a", "b"] | None = "a"


@dataclass(kw_only=True)
class Join(Stage):
    """Join words."""

    outputs: ClassVar[tuple[str, ...]] = ("text",)

    words: list[str]

    def run(self, run: RunInfo) -> Result:
        return Result(summary="joined.", values={"text": " ".join(self.words)})


class CopyOperator(StageOperator, stage=Copy):
    pass


class FailOperator(StageOperator, stage=Fail):
    pass


class HangOperator(StageOperator, stage=Hang):
    pass


class LookOperator(StageOperator, stage=Look):
    pass


class ResumeOperator(StageOperator, stage=Resume):
    pass


class TaskInstance(SimpleNamespace):
    """As much of Airflow's as an operator sees: its ids, and XComs shared with the other tasks of the run."""

    def xcom_push(self, key: str, value: Any) -> None:
        self.xcoms[self.task_id, key] = json.loads(json.dumps(value))

    def xcom_pull(self, task_ids: str, key: str = "return_value", default: Any = None, **_: Any) -> Any:
        return self.xcoms.get((task_ids, key), default)


@pytest.fixture
def xcoms() -> dict[tuple[str, str], Any]:
    return {}


@pytest.fixture
def run(tmp_path: Path, xcoms: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Renders and executes a task as the task runner does; returns the receipt."""
    monkeypatch.setenv("AIRFLOW__LEPTON__STORE", str(tmp_path / "store"))
    monkeypatch.setenv("AIRFLOW__LEPTON__RUNNER", "InProcess")

    def execute(
        task: Any, params: dict[str, Any] | None = None, map_index: int = -1, **dag_run: Any
    ) -> dict[str, Any]:
        ti = TaskInstance(
            dag_id="d",
            task_id=task.task_id,
            run_id="r",
            map_index=map_index,
            try_number=1,
            xcoms=xcoms,
            task=task,
        )
        context: dict[str, Any] = {
            "ti": ti,
            "task": task,
            "dag": task.dag,
            "params": params or {},
            "dag_run": SimpleNamespace(run_type="manual", conf={}, **dag_run),
        }
        task.render_template_fields(context)
        task = ti.task = context["task"]
        receipt = task.execute(context)
        ti.xcom_push("return_value", receipt)
        return receipt

    return execute


@pytest.fixture
def dag(tmp_path: Path) -> Any:
    with DAG("d", schedule=None) as dag:
        dag.fileloc = str(tmp_path / "dags" / "d.py")
        yield dag


# -- how an operator looks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", sorted(all_stages()))
def test_every_stage_has_its_operator_with_its_fields_and_its_documentation(stage: str) -> None:
    operator, kind = getattr(operators, f"{stage}Operator"), all_stages()[stage]
    assert operator.stage is kind
    parameters = inspect.signature(operator).parameters
    own = list(inspect.signature(kind).parameters)
    assert list(parameters) == [
        *own,
        "runner",
        "store",
        "store_conn_id",
        "cache",
        "cache_ttl_s",
        "window",
        "kwargs",
    ]
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "kwargs")
    assert set(own) | {"store", "cache", "window"} == set(operator.template_fields)
    text = help_text(operator)
    assert (inspect.getdoc(kind) or "").splitlines()[0] in text
    assert all(f":param {name}:" in text for name in own)
    assert all(f"``{name}``" in text for name in kind.outputs)


def help_text(operator: type) -> str:
    import pydoc

    return pydoc.plain(pydoc.render_doc(operator))


@pytest.mark.usefixtures("dag")
class TestConstruction:
    def test_a_missing_argument_is_named(self) -> None:
        with pytest.raises(TypeError, match="dataset"):
            TrainModelOperator(task_id="train")

    def test_an_unknown_argument_gets_did_you_mean(self) -> None:
        with pytest.raises(
            TypeError, match="TrainModelOperator has no argument 'datset'; did you mean 'dataset'"
        ):
            TrainModelOperator(task_id="train", datset="x", dataset="y")

    def test_positional_arguments_are_refused(self) -> None:
        with pytest.raises(TypeError):
            TrainModelOperator("train", "x")

    def test_one_of_a_few_is_checked_at_once_but_not_a_template(self) -> None:
        class ChooseOperator(StageOperator, stage=Choose):
            pass

        with pytest.raises(BadConfiguration, match="Choose: mode='c'; known: a, b"):
            ChooseOperator(task_id="x", mode="c")
        with pytest.raises(BadConfiguration, match="cache='refreshed'; did you mean 'refresh'"):
            ChooseOperator(task_id="x", cache="refreshed")
        assert ChooseOperator(task_id="y", mode="{{ params.mode }}", cache="{% if true %}off{% endif %}").mode
        assert ChooseOperator(task_id="z", mode=None).mode is None

    def test_a_field_must_not_hide_an_argument_of_every_operator(self) -> None:
        @dataclass(kw_only=True)
        class Clash(Stage):
            retries: int = 0

        with pytest.raises(BadConfiguration, match="Clash: field 'retries' is an argument of every operator"):

            class ClashOperator(StageOperator, stage=Clash):
                pass

    def test_mutable_defaults_are_not_shared(self) -> None:
        one, two = (TrainModelOperator(task_id=name, dataset="x") for name in "ab")
        assert one.hyperparameters == two.hyperparameters
        assert one.hyperparameters is not two.hyperparameters

    def test_a_subclass_of_a_named_operator_works(self) -> None:
        class MyTrainOperator(TrainModelOperator):
            def execute(self, context: Any) -> dict[str, Any]:
                return {"mine": self.dataset}

        assert MyTrainOperator(task_id="x", dataset="y").execute({}) == {"mine": "y"}


def test_default_args_reach_fields_common_arguments_and_airflows_own() -> None:
    with DAG(
        "d", schedule=None, default_args={"dataset": "x", "runner": InProcess(), "retries": 3, "seed": 7}
    ):
        task = TrainModelOperator(task_id="train", seed=8)
    assert (task.dataset, task.runner, task.retries, task.seed) == ("x", InProcess(), 3, 8)


def test_outputs_of_other_tasks_make_dependencies_at_any_depth(dag: DAG) -> None:
    one, two, three = (CopyOperator(task_id=name) for name in ("one", "two", "three"))
    task = TrainModelOperator(
        task_id="train",
        dataset=one.output["copy"],
        hyperparameters={"nested": [{"deep": two.output["length"]}]},
        window=three.output["window"],
    )
    assert task.upstream_task_ids == {"one", "two", "three"}


# -- how it runs ---------------------------------------------------------------------------------------------------------


def test_outputs_travel_from_task_to_task_as_pinned_uris(run: Any, dag: DAG, xcoms: dict[Any, Any]) -> None:
    one = CopyOperator(task_id="one", text="{{ params.word }}")
    two = CopyOperator(task_id="two", source=one.output["copy"])
    receipt = run(one, params={"word": "grün"})
    assert run(two)["artifacts"] == receipt["artifacts"]
    uri = xcoms["one", "copy"]
    assert split_pin(uri)[1] == receipt["artifacts"]["copy"]["sha256"]
    assert xcoms["two", "length"] == 4
    assert len(json.dumps(receipt)) < 8192


def test_an_output_that_was_not_made_is_none(run: Any, dag: DAG, xcoms: dict[Any, Any]) -> None:
    one = CopyOperator(task_id="one", text="a")
    run(one)
    del xcoms["one", "copy"]  # as `valid` is absent where a split has no such rows
    two = CopyOperator(task_id="two", text="b", source=one.output["copy"])
    assert run(two)["values"] == {"length": 1}
    wrong = CopyOperator(task_id="three", text="b", source=one.output["other"])
    with pytest.raises(XComNotFound):
        run(wrong)


def test_mapped_instances_run_each_for_itself(run: Any, dag: DAG) -> None:
    mapped = CopyOperator.partial(task_id="many").expand(text=["a", "bcd"])
    receipts = [run(mapped, map_index=index) for index in range(2)]
    assert [r["values"] for r in receipts] == [{"length": 1}, {"length": 3}]
    assert receipts[0]["run_key"] != receipts[1]["run_key"]


def test_outputs_of_a_mapped_task_arrive_as_a_list(run: Any, dag: DAG) -> None:
    class JoinOperator(StageOperator, stage=Join):
        pass

    class Lazy(UserList[str]):
        """Airflow's own sequence of a mapped task's outputs is no list either."""

    assert run(JoinOperator(task_id="x", words=Lazy(["a", "bcd"])))["values"] == {"text": "a bcd"}


def test_dates_and_times_of_native_rendering_arrive_as_texts(run: Any) -> None:
    class JoinOperator(StageOperator, stage=Join):
        pass

    with DAG("d", schedule=None, render_template_as_native_obj=True):
        task = JoinOperator(
            task_id="x", words=[f"{{{{ params.{name} }}}}" for name in ("start", "local", "day")]
        )
    start = pendulum.datetime(2013, 5, 1, 2, tz="Europe/Berlin")
    values = {"start": start, "local": datetime.fromisoformat("2013-05-01T02:30:00"), "day": start.date()}
    assert run(task, params=values)["values"] == {
        "text": "2013-05-01T00:00:00+00:00 2013-05-01T02:30:00 2013-05-01"
    }


def test_paths_beside_the_dag_file(run: Any, dag: DAG, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("beside")
    (tmp_path / "dags").mkdir()
    assert run(CopyOperator(task_id="x", source="../data.txt"))["values"] == {"length": 6}
    (tmp_path / "dags" / "here.txt").write_text("here")
    assert run(CopyOperator(task_id="y", source="./here.txt"))["values"] == {"length": 4}


class Elsewhere(InProcess):
    local: ClassVar[bool] = False  # as in a pod

    def run(self, request: Any, connections: Any, context: Any) -> Any:
        uri, sha256 = split_pin(request.parameters["source"])
        assert uri.startswith(f"file://{request.store}/artifacts/")
        assert sha256
        return super().run(request, connections, context)


def test_files_beside_the_dag_go_through_the_store_to_a_stage_elsewhere(
    run: Any, dag: DAG, tmp_path: Path
) -> None:
    (tmp_path / "data.txt").write_text("beside")
    task = CopyOperator(task_id="x", source="../data.txt", runner=Elsewhere())
    assert run(task)["values"] == {"length": 6}
    (tmp_path / "data.txt").write_text("edited beside")
    assert run(task)["values"] == {"length": 13}
    with pytest.raises(AirflowFailException, match=r"there is no file .*/none\.txt beside the DAG"):
        run(CopyOperator(task_id="y", source="../none.txt", runner=Elsewhere()))


def test_window_argument_wins_over_the_run(run: Any, dag: DAG) -> None:
    parameters = {"start": "{{ params.start }}", "end": "2013-02-01"}
    first = run(CopyOperator(task_id="x"), params={"start": "2013-01-01"})
    again = run(CopyOperator(task_id="x2"))
    windowed = run(CopyOperator(task_id="y", window=parameters), params={"start": "2013-01-01"})
    assert (first["status"], again["status"], windowed["status"]) == ("done", "cached", "done")
    assert windowed["cache_key"] != first["cache_key"]
    for wrong in ({"start": "2013"}, "2013", {"start": "2013-02-01", "end": "2013-01-01"}):
        with pytest.raises(AirflowFailException, match="window"):
            run(CopyOperator(task_id=f"z{len(str(wrong))}", window=wrong))


def test_refresh_for_one_task_or_one_run(run: Any, dag: DAG) -> None:
    assert [run(CopyOperator(task_id=f"a{n}"))["status"] for n in range(2)] == ["done", "cached"]
    assert run(CopyOperator(task_id="b", cache="refresh"))["status"] == "done"
    assert run(CopyOperator(task_id="c"), params={"refresh_cache": True})["status"] == "done"
    assert run(CopyOperator(task_id="d"), params={"refresh_cache": False})["status"] == "cached"
    assert run(CopyOperator(task_id="e", cache="off"))["status"] == "done"


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("Skipped", AirflowSkipException),
        ("BadInput", AirflowFailException),
        ("ContractError", AirflowFailException),
        ("Preempted", Preempted),
        ("StoreError", LeptonError),
        ("ValueError", LeptonError),
    ],
)
def test_failures_reach_airflow_as_what_they_mean(
    run: Any, dag: DAG, how: str, kind: type, xcoms: dict[Any, Any]
) -> None:
    with pytest.raises(kind, match="as asked"):
        run(FailOperator(task_id="x", how=how))
    assert xcoms == {}


@pytest.mark.parametrize("given", ["{{ params.steps }}", 5, "5"])
def test_text_becomes_the_type_of_the_field(run: Any, dag: DAG, tmp_path: Path, given: Any) -> None:
    task = ResumeOperator(task_id="x", file=str(tmp_path / "count"), steps=given)
    assert run(task, params={"steps": 5})["values"] == {"start": 0, "steps": 5}


def test_an_unknown_connection_is_a_sentence_and_not_retried(run: Any, dag: DAG) -> None:
    with pytest.raises(
        AirflowFailException, match=r"Connection 'nowhere' does not exist: create it .* AIRFLOW_CONN_NOWHERE"
    ):
        run(LookOperator(task_id="x", connection="nowhere"))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, "of_the_installation"),
        ({"store": "memory://x"}, None),  # not the keys of another store
        ({"store": "memory://x", "store_conn_id": "of_the_team"}, "of_the_team"),
        ({"store_conn_id": "of_the_team"}, "of_the_team"),
    ],
)
def test_which_connection_opens_the_store(
    run: Any, dag: DAG, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str], wanted: str | None
) -> None:
    monkeypatch.setenv("AIRFLOW__LEPTON__STORE_CONN_ID", "of_the_installation")
    for name in ("OF_THE_INSTALLATION", "OF_THE_TEAM"):
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps({"conn_type": "aws"}))
    asked: list[tuple[Any, list[str]]] = []

    class Asking(InProcess):
        def run(self, request: Any, connections: Any, context: Any) -> Any:
            asked.append((request.store_connection, [c.id for c in connections]))
            return super().run(request, connections, context)

    run(CopyOperator(task_id="x", runner=Asking(), **arguments))
    assert asked == [(wanted, [wanted] if wanted else [])]


# -- evidence ------------------------------------------------------------------------------------------------------------


class Tampering(InProcess):
    """Runs the stage, then spoils what it left."""

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def run(self, request: Any, connections: Any, context: Any) -> Any:
        receipt = super().run(request, connections, context)
        return self.spoil(Store(request.store), request, receipt) or receipt


def _blob(receipt: Any) -> Path:
    return Path(split_pin(receipt.artifacts["copy"].uri)[0].removeprefix("file://"))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda store, request, receipt: store.delete(f"receipts/{request.run_key}.json"),
            "does not hold the receipt",
        ),
        (
            lambda store, request, receipt: store.write(f"receipts/{request.run_key}.json", b"{"),
            "does not hold the receipt",
        ),
        (
            lambda store, request, receipt: store.write(
                f"receipts/{request.run_key}.json",
                receipt.to_json().replace(receipt.cache_key, "0" * 64).encode(),
            ),
            "does not hold the receipt",
        ),
        (
            lambda store, request, receipt: store.write(
                f"receipts/{request.run_key}.json",
                receipt.to_json().replace('"length": 5}', '"length": 6}').encode(),
            ),
            "does not hold the receipt",
        ),
        (lambda store, request, receipt: _blob(receipt).unlink(), "artifact 'copy' is not in the store"),
        (
            lambda store, request, receipt: _blob(receipt).write_text("cut") and None,
            "artifact 'copy' is not in the store",
        ),
    ],
    ids=[
        "receipt removed",
        "receipt damaged",
        "another run's receipt",
        "values altered",
        "blob removed",
        "blob cut",
    ],
)
def test_no_green_without_evidence(
    run: Any, dag: DAG, xcoms: dict[Any, Any], spoil: Any, sentence: str
) -> None:
    with pytest.raises(RunnerError, match=sentence):
        run(CopyOperator(task_id="x", runner=Tampering(lambda *a: (spoil(*a), None)[1])))
    assert xcoms == {}


# -- processes and secrets -----------------------------------------------------------------------------------------------


def test_on_kill_cancels_the_stage(run: Any, dag: DAG, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    task = HangOperator(task_id="hang", pids=str(pids), runner=Subprocess(grace_s=10))
    task.on_kill()  # nothing runs yet
    raised: list[BaseException] = []

    def work() -> None:
        try:
            run(task)
        except BaseException as error:  # noqa: BLE001 - looked at below
            raised.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    until(pids.exists, "the stage to run")
    task.on_kill()
    worker.join(20)
    assert [type(error) for error in raised] == [Preempted]


def test_a_password_is_in_no_channel(
    run: Any,
    dag: DAG,
    tmp_path: Path,
    xcoms: dict[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import hashlib

    password = "correct-horse-battery"
    monkeypatch.setenv(
        "AIRFLOW_CONN_SECRET_DB", json.dumps({"conn_type": "postgres", "login": "me", "password": password})
    )
    wanted = hashlib.sha256(password.encode()).hexdigest()
    tasks = [
        LookOperator(
            task_id=f"look{n}", connection="secret_db", password_is=wanted, say=bool(n), runner=Subprocess()
        )
        for n in range(2)
    ]
    with caplog.at_level(logging.DEBUG):
        receipt = run(tasks[0])  # the stage itself looks into its environment, arguments and files
        with pytest.raises(LeptonError) as caught:
            run(tasks[1])
    assert receipt["values"]["password_arrived"] is True
    rendered = [getattr(task, name) for task in tasks for name in task.template_fields]
    told = [str(caught.value), caplog.text, repr(xcoms), repr(receipt), repr(rendered), repr(tasks[0].runner)]
    assert "***" in str(caught.value)
    assert [text for text in told if password in text] == []
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or password.encode() not in file.read_bytes(), file


# -- stages of one's own -------------------------------------------------------------------------------------------------


def test_a_stage_beside_the_dag_runs_in_a_process_of_its_own(
    run: Any, dag: DAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "team"
    folder.mkdir()
    (folder / "team_stages.py").write_text(
        "from dataclasses import dataclass\nfrom lepton_airflow.stages import Result, Stage\n\n\n"
        "@dataclass(kw_only=True)\nclass Score(Stage):\n    '''Score.'''\n\n    outputs = ('score',)\n    x: int = 1\n\n"
        "    def run(self, run):\n        return Result(summary='scored.', values={'score': self.x * 2})\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    score = importlib.import_module("team_stages").Score

    class ScoreOperator(StageOperator, stage=score):
        pass

    assert run(ScoreOperator(task_id="x", x="{{ 21 }}", runner=Subprocess()))["values"] == {"score": 42}


def test_a_stage_that_no_other_process_can_import_is_refused(run: Any, dag: DAG) -> None:
    @dataclass(kw_only=True)
    class Local(Stage):
        """Local."""

    class LocalOperator(StageOperator, stage=Local):
        pass

    with pytest.raises(
        AirflowFailException, match="put the class at the top level of a module beside the DAG file"
    ):
        run(LocalOperator(task_id="x"))


# -- types ---------------------------------------------------------------------------------------------------------------


def test_the_stub_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_stub", ROOT / ".ci" / "make_stub.py")
    assert spec is not None
    assert spec.loader is not None
    make_stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_stub)
    assert make_stub.STUB.read_text() == make_stub.stub(), "run: .venv/bin/python .ci/make_stub.py"


def test_mypy_knows_the_operators(tmp_path: Path) -> None:
    lines = {
        "right": 'TrainModelOperator(task_id="a", dataset=copy.output["copy"], folds="{{ params.folds }}", retries=2)',
        "unknown": 'TrainModelOperator(task_id="b", datset="x", dataset="x")',
        "missing": 'TrainModelOperator(task_id="c")',
        "airflow": 'TrainModelOperator(task_id="e", dataset="x", retrys=2)',
    }
    dag = tmp_path / "typed_dag.py"
    dag.write_text(
        "from lepton_airflow.operators import TrainModelOperator\n\n"
        'copy = TrainModelOperator(task_id="z", dataset="x")\n' + "\n".join(lines.values())
    )
    config = tmp_path / "mypy.ini"  # Airflow itself takes mypy a minute to read, and says nothing here
    config.write_text(
        "[mypy]\nfollow_imports = silent\n[mypy-airflow.*]\nfollow_imports = skip\nignore_missing_imports = true\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), "--no-error-summary", str(dag)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"MYPY_CACHE_DIR": str(ROOT / ".cache" / "mypy-dag")},
        cwd=ROOT,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [int(line.split(":")[1]) for line in errors] == [5, 6, 7], done.stdout + done.stderr
    assert 'Unexpected keyword argument "datset"' in errors[0]
    assert 'Missing named argument "dataset"' in errors[1]
    assert 'Unexpected keyword argument "retrys"' in errors[2]


def test_every_operator_can_be_imported_at_once() -> None:
    everything: dict[str, Any] = {}
    exec("from lepton_airflow.operators import *", everything)
    assert {"StageOperator", *(f"{name}Operator" for name in all_stages())} <= set(everything)
    assert pickle.loads(pickle.dumps(TrainModelOperator)) is TrainModelOperator
    with pytest.raises(ImportError):
        from lepton_airflow.operators import NoSuchOperator  # noqa: F401


def test_stages_of_other_packages_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(kw_only=True)
    class Clash(Stage):
        runner: str = ""  # an argument of every operator

    theirs = {"score": get_stage("TrainModel"), "acme-score": Stage, "Clash": Clash}
    monkeypatch.setattr("lepton_airflow.stages.all_stages", lambda: theirs)
    monkeypatch.setattr("lepton_airflow.operators.all_stages", lambda: theirs)
    assert operators.scoreOperator.stage is get_stage("TrainModel")  # type: ignore[attr-defined]
    assert dir(operators) == ["ClashOperator", "StageOperator", "scoreOperator"]
    assert not hasattr(operators, "ClashOperator")
    monkeypatch.delattr(operators, "scoreOperator")
