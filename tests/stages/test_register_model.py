"""Registration against real MLflow: a database and a server, many processes, kills in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.connections import Connection
from lepton_airflow.contract import RunIdentity, Window, split_pin
from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadConfiguration, IntegrityError, LeptonError, Skipped
from lepton_airflow.registry.ledger import Registrations, registrations
from lepton_airflow.registry.mlflow import open_registry
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.register_model import RegisterModel
from lepton_airflow.store import eviction

pytestmark = pytest.mark.slow

INFO = DatasetInfo(
    target="late",
    task="classification",
    features=["distance", "dép heure", "origin"],
    categorical=["origin"],
    classes=[0, 1],
)
WINDOW = {"start": "2013-01-01T00:00:00+00:00", "end": "2013-04-01T00:00:00+00:00"}


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    # bool() is False and, unlike the default, can be sent to another process
    return RunInfo.local(tmp_path, run_key="run-1", should_stop=bool)


@pytest.fixture(params=["sqlite", "server"])
def tracking(request: pytest.FixtureRequest) -> str:
    """Both kinds of MLflow."""
    if request.param == "sqlite":
        uri: str = request.getfixturevalue("mlflow_sqlite")
        return uri
    return str(request.getfixturevalue("mlflow_server").uri)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A model of its own for each test, as the server is shared; not plain ASCII on purpose."""
    return f"flüge {request.node.name}".replace("/", "-").replace(":", "-")


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def versions(uri: str, name: str) -> list[Any]:
    return sorted(
        (v for v in client(uri).search_model_versions() if v.name == name), key=lambda v: int(v.version)
    )


def runs(uri: str, experiment: str) -> list[Any]:
    mlflow = client(uri)
    return list(mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id]))


def test_a_version_carries_package_metrics_window_digests_and_signature(
    tracking, run, name, put_model
) -> None:
    import mlflow
    import numpy as np
    import pandas as pd

    from lepton_airflow.packaging.package import ModelPackage

    model = put_model(run.store, INFO, [0.002, -0.1], WINDOW, data={"train": "ab" * 32}, code="cd" * 32)
    result = RegisterModel(
        model=model.uri, name=name, metrics={"roc_auc": 0.71, "roc_auc_low": None}, tracking_uri=tracking
    ).run(run)

    assert result.values == {"name": name, "version": 1, "model_uri": f"models:/{name}/1"}
    (version,) = versions(tracking, name)
    assert version.tags["lepton.run_key"] == "run-1"
    assert version.tags["lepton.package"] == model.sha256
    assert version.tags["lepton.window"] == f"{WINDOW['start']} to {WINDOW['end']}"
    assert version.tags["lepton.data.train"] == "ab" * 32
    assert version.tags["metric.roc_auc"] == "0.71"
    (mlflow_run,) = runs(tracking, name)
    assert mlflow_run.data.metrics == {"roc_auc": 0.71}
    assert mlflow_run.data.params["weights"] == "[0.002, -0.1]"
    assert mlflow_run.info.status == "FINISHED"
    assert version.source.startswith(mlflow_run.info.artifact_uri)

    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(tracking)
    loaded = mlflow.pyfunc.load_model(f"models:/{name}@candidate")
    assert loaded.metadata.signature.inputs.input_names() == ["distance", "d_p_heure", "origin"]
    frame = pd.DataFrame({"distance": [100.0, 900.0], "dép heure": [6.0, 22.0], "origin": ["JFK", None]})
    served = loaded.predict(
        {
            "distance": np.array([[100], [900]], np.float32),
            "d_p_heure": np.array([[6], [22]], np.float32),
            "origin": np.array([["JFK"], [""]]),
        }
    )
    package = ModelPackage.open(run.fetch(model.uri))
    np.testing.assert_array_equal(served["probabilities"], package.predict(frame))
    assert not list(Path(mlflow_run.info.artifact_uri.removeprefix("file://")).rglob("*.pkl"))


def test_six_processes_at_once_make_one_version(tracking, run, name, put_model, at_once) -> None:
    model = put_model(run.store, INFO, [1.0, 2.0])
    stage = RegisterModel(model=model.uri, name=name, tracking_uri=tracking)
    results = at_once([stage.run] * 6, [replace(run, workdir=_folder(run, i)) for i in range(6)])
    assert {r.values["version"] for r in results} == {1}
    assert len(versions(tracking, name)) == 1
    assert len(runs(tracking, name)) == 1
    assert sum("registered as version 1" in r.summary for r in results) == 1


def test_six_run_keys_at_once_make_six_versions(tracking, run, name, put_model, at_once) -> None:
    stages, infos = [], []
    for i in range(6):
        model = put_model(run.store, INFO, [1.0, float(i)])
        stages.append(RegisterModel(model=model.uri, name=name, tracking_uri=tracking).run)
        infos.append(replace(run, run_key=f"run-{i}", workdir=_folder(run, i)))
    results = at_once(stages, infos)
    assert sorted(r.values["version"] for r in results) == [1, 2, 3, 4, 5, 6]
    assert [int(v.version) for v in versions(tracking, name)] == [1, 2, 3, 4, 5, 6]
    assert client(tracking).get_registered_model(name).aliases == {
        "candidate": versions(tracking, name)[-1].version
    }


def test_six_processes_make_a_new_database_at_once(run, put_model, at_once, tmp_path) -> None:
    tracking = f"sqlite:///{tmp_path}/not yet/mlflow.db"
    model = put_model(run.store, INFO, [1.0, 2.0])
    stage = RegisterModel(model=model.uri, name="late", tracking_uri=tracking)
    results = at_once([stage.run] * 6, [replace(run, workdir=_folder(run, i)) for i in range(6)])
    assert {r.values["version"] for r in results} == {1}
    (version,) = versions(tracking, "late")
    assert f"{tmp_path}/not yet/mlartifacts" in version.source.replace("%20", " ")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_around_the_creation_of_the_version(moment, mlflow_sqlite, run, name, put_model) -> None:
    model = put_model(run.store, INFO, [1.0, 2.0])
    script = textwrap.dedent(
        """
        import os, signal, sys
        from mlflow import MlflowClient
        from lepton_airflow.stages import RunInfo
        from lepton_airflow.stages.register_model import RegisterModel

        folder, model, name, tracking, moment = sys.argv[1:]
        create = MlflowClient.create_model_version

        def create_and_die(*args, **kwargs):
            if moment == "after":
                create(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        MlflowClient.create_model_version = create_and_die
        RegisterModel(model=model, name=name, tracking_uri=tracking).run(RunInfo.local(folder, run_key="run-1"))
        """
    )
    folder = run.workdir.parent
    died = subprocess.run(
        [sys.executable, "-c", script, folder, model.uri, name, mlflow_sqlite, moment], check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert len(versions(mlflow_sqlite, name)) == (moment == "after")
    assert Registrations(run.store, name).of_run("run-1") is None

    result = RegisterModel(model=model.uri, name=name, tracking_uri=mlflow_sqlite).run(run)

    assert result.values["version"] == 1
    assert len(versions(mlflow_sqlite, name)) == 1
    (mlflow_run,) = runs(mlflow_sqlite, name)
    assert mlflow_run.info.status == "FINISHED"


def test_mlflow_goes_away_between_upload_and_version(
    mlflow_server, run, name, put_model, monkeypatch
) -> None:
    from lepton_airflow.registry.mlflow import MlflowRegistry

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    upload = MlflowRegistry._upload

    def upload_and_lose(self, *args: Any) -> None:
        upload(self, *args)
        mlflow_server.stop()

    model = put_model(run.store, INFO, [1.0, 2.0])
    stage = RegisterModel(model=model.uri, name=name, tracking_uri=mlflow_server.uri)
    monkeypatch.setattr(MlflowRegistry, "_upload", upload_and_lose)
    try:
        with pytest.raises(LeptonError, match="a retry goes on") as away:
            stage.run(run)
    finally:
        monkeypatch.setattr(MlflowRegistry, "_upload", upload)
        mlflow_server.start()
    assert away.value.exit_code == 1
    assert versions(mlflow_server.uri, name) == []
    assert stage.run(run).values["version"] == 1
    assert len(runs(mlflow_server.uri, name)) == 1


def test_a_changed_package_supersedes_the_version_of_its_run_key(mlflow_sqlite, run, name, put_model) -> None:
    old, new = (put_model(run.store, INFO, [1.0, w]) for w in (2.0, 3.0))
    for model, expected in ((old, 1), (old, 1), (new, 2), (new, 2)):
        result = RegisterModel(model=model.uri, name=name, tracking_uri=mlflow_sqlite).run(run)
        assert result.values["version"] == expected
    first, second = versions(mlflow_sqlite, name)
    assert first.tags["lepton.superseded_by"] == "2"
    assert "lepton.superseded_by" not in second.tags
    current = Registrations(run.store, name).of_run("run-1")
    assert current is not None
    assert (current.version, current.supersedes, current.sha256) == (2, 1, new.sha256)


def delete(uri: str, name: str, what: str, version: str) -> None:
    """Delete what belongs to a version, as a person does in MLflow's pages and with ``mlflow gc``."""
    mlflow = client(uri)
    run_id = mlflow.get_model_version(name, version).run_id
    experiment = mlflow.get_run(run_id).info.experiment_id
    store = mlflow._tracking_client.store
    {
        "alias": lambda: mlflow.delete_registered_model_alias(name, "candidate"),
        "version": lambda: mlflow.delete_model_version(name, version),
        "run": lambda: mlflow.delete_run(run_id),
        "run, gc": lambda: (mlflow.delete_run(run_id), store._hard_delete_run(run_id)),
        "version and run": lambda: (mlflow.delete_model_version(name, version), mlflow.delete_run(run_id)),
        "model": lambda: mlflow.delete_registered_model(name),
        "model and run, gc": lambda: (
            mlflow.delete_registered_model(name),
            mlflow.delete_run(run_id),
            store._hard_delete_run(run_id),
        ),
        "experiment": lambda: mlflow.delete_experiment(experiment),
    }[what]()


@pytest.mark.parametrize(
    ("what", "expected", "shown"),
    [
        ("alias", 2, [1, 2]),
        ("version", 3, [1, 3]),
        ("run", 2, [1, 2]),
        ("run, gc", 3, [1, 3]),
        ("version and run", 3, [1, 3]),
        ("model", 2, [2]),  # the first version that MLflow makes of it has the number of another package
        ("model and run, gc", 2, [2]),
    ],
)
def test_what_was_deleted_in_mlflow_is_back_when_its_task_is_cleared(
    mlflow_sqlite, run, name, put_model, what: str, expected: int, shown: list[int]
) -> None:
    infos = [replace(run, run_key=f"run-{number}") for number in (1, 2)]
    stages = [
        RegisterModel(
            model=put_model(run.store, INFO, [1.0, weight]).uri, name=name, tracking_uri=mlflow_sqlite
        )
        for weight in (2.0, 3.0)
    ]
    for stage, info in zip(stages, infos, strict=True):
        stage.run(info)
    delete(mlflow_sqlite, name, what, "2")
    for _ in range(2):  # the second time there is nothing left to do
        assert stages[1].run(infos[1]).values["version"] == expected
        assert [int(v.version) for v in versions(mlflow_sqlite, name)] == shown
    mlflow = client(mlflow_sqlite)
    assert {k: int(v) for k, v in mlflow.get_registered_model(name).aliases.items()} == {
        "candidate": expected
    }
    found = mlflow.get_run(mlflow.get_model_version(name, str(expected)).run_id)
    assert (found.info.lifecycle_stage, found.info.status) == ("active", "FINISHED")
    assert Path(mlflow.download_artifacts(found.info.run_id, "model/model.onnx")).is_file()
    assert len(runs(mlflow_sqlite, name)) == 2

    # Whoever was not cleared, and whoever comes next, keeps a number of its own.
    again = stages[0].run(infos[0]).values["version"]
    assert again == (3 if "model" in what else 1)
    new = replace(stages[0], model=put_model(run.store, INFO, [1.0, 4.0]).uri).run(
        replace(run, run_key="run-3")
    )
    assert new.values["version"] == max(expected, again) + 1


def test_a_deleted_experiment_is_said_and_another_one_taken(mlflow_sqlite, run, name, put_model) -> None:
    model = put_model(run.store, INFO, [1.0, 2.0])
    stage = RegisterModel(model=model.uri, name=name, tracking_uri=mlflow_sqlite)
    stage.run(run)
    delete(mlflow_sqlite, name, "experiment", "1")
    for info in (run, replace(run, run_key="run-2")):
        with pytest.raises(BadConfiguration, match="was deleted in MLflow: restore it or name another one"):
            stage.run(info)
    assert replace(stage, experiment="another").run(run).values["version"] == 2
    mlflow = client(mlflow_sqlite)
    mlflow.restore_experiment(mlflow.get_experiment_by_name(name).experiment_id)
    assert stage.run(replace(run, run_key="run-2")).values["version"] == 3


def test_what_a_server_shows_already_is_only_glanced_at(
    mlflow_server, run, name, put_model, monkeypatch
) -> None:
    model = put_model(run.store, INFO, [1.0, 2.0])
    stage = RegisterModel(model=model.uri, name=name, tracking_uri=mlflow_server.uri, metrics={"rmse": 1.5})
    first = stage.run(run)
    opened = []

    def counted(*args: Any) -> Any:
        opened.append(args)
        return open_registry(*args)

    monkeypatch.setattr("lepton_airflow.stages.register_model.open_registry", counted)
    again = stage.run(run)
    assert (again.values, again.links, opened) == (first.values, first.links, [])

    client(mlflow_server.uri).delete_registered_model_alias(name, "candidate")
    assert stage.run(run).values == first.values
    assert len(opened) == 1
    assert client(mlflow_server.uri).get_registered_model(name).aliases == {"candidate": "1"}

    (mlflow_run,) = runs(mlflow_server.uri, name)
    client(mlflow_server.uri).delete_run(mlflow_run.info.run_id)
    assert stage.run(run).values == first.values
    assert len(runs(mlflow_server.uri, name)) == 1

    replace(stage, metrics={"rmse": 2.5}).run(run)
    assert versions(mlflow_server.uri, name)[0].tags["metric.rmse"] == "2.5"


def test_the_loser_of_a_takeover_removes_its_double(mlflow_sqlite, run, name, put_model, monkeypatch) -> None:
    """A process that stood still past its lease finds that another one has registered for its run key."""
    from lepton_airflow.registry.mlflow import MlflowRegistry
    from lepton_airflow.store.lease import Lease

    model = put_model(run.store, INFO, [1.0, 2.0])
    stage = RegisterModel(model=model.uri, name=name, tracking_uri=mlflow_sqlite)
    publish = MlflowRegistry.publish

    def publish_late(self, *args: Any, **kwargs: Any) -> tuple[int, str]:
        monkeypatch.setattr(MlflowRegistry, "publish", publish)
        other = Lease(run.store, "another", 1)  # ours is held by the caller, who stands still here
        first, _ = stage._register(run, self, other, run.fetch(model.uri), args[2], model.uri, {})
        tags = {"lepton.run_key": "run-1", "lepton.package": model.sha256}
        source = f"{self.client.get_run(first.mlflow_run_id).info.artifact_uri}/model"
        double = self.client.create_model_version(name, source, run_id=first.mlflow_run_id, tags=tags)
        return int(double.version), first.mlflow_run_id

    monkeypatch.setattr(MlflowRegistry, "publish", publish_late)
    assert stage.run(run).values["version"] == 1
    assert [int(v.version) for v in versions(mlflow_sqlite, name)] == [1]


def test_the_candidate_alias_never_goes_back_to_older_data(mlflow_sqlite, run, name, put_model) -> None:
    for month in (3, 5, 4):
        window = {"start": "2013-01-01", "end": f"2013-{month:02}-01"}
        model = put_model(run.store, INFO, [1.0, float(month)], window)
        identity = RunIdentity(run_type="backfill")
        RegisterModel(model=model.uri, name=name, tracking_uri=mlflow_sqlite).run(
            replace(run, run_key=f"run-{month}", identity=identity)
        )
    assert {k: int(v) for k, v in client(mlflow_sqlite).get_registered_model(name).aliases.items()} == {
        "candidate": 2
    }
    client(mlflow_sqlite).set_registered_model_alias(name, "candidate", "1")
    RegisterModel(model=model.uri, name=name, tracking_uri=mlflow_sqlite).run(replace(run, run_key="run-4"))
    assert {k: int(v) for k, v in client(mlflow_sqlite).get_registered_model(name).aliases.items()} == {
        "candidate": 2
    }


def test_the_record_pins_the_package_and_eviction_keeps_it(
    mlflow_sqlite, run, name, put_model, monkeypatch
) -> None:
    model = put_model(run.store, INFO, [1.0, 2.0])
    other = put_model(run.store, INFO, [1.0, 3.0])
    RegisterModel(model=split_pin(model.uri)[0], name=name, tracking_uri=mlflow_sqlite).run(
        replace(run, window=Window(**WINDOW))
    )
    (registration,) = registrations(run.store, name)
    assert registration.package == model.uri
    assert registration.window == WINDOW
    monkeypatch.setattr(eviction, "GRACE_S", -1)
    eviction.evict(run.store, older_than_s=0)
    assert run.store.intact(model)
    assert not run.store.intact(other)


def test_one_altered_byte_registers_nothing(mlflow_sqlite, run, name, put_model) -> None:
    model = put_model(run.store, INFO, [1.0, 2.0])
    file = run.store.fetch(model.uri, run.workdir) / "model.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="was altered"):
        RegisterModel(model=model.uri, name=name, tracking_uri=mlflow_sqlite).run(run)
    assert registrations(run.store, name) == []
    assert versions(mlflow_sqlite, name) == []


def test_a_backfill_that_skips(run, put_model) -> None:
    model = put_model(run.store, INFO, [1.0, 2.0])
    stage = RegisterModel(model=model.uri, name="late", tracking_uri="http://127.0.0.1:9", on_backfill="skip")
    with pytest.raises(Skipped, match="this is a backfill"):
        stage.run(replace(run, identity=RunIdentity(run_type="backfill")))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "neither tracking_uri nor mlflow is set"),
        ({"tracking_uri": "./mlruns"}, "file store"),
        ({"tracking_uri": "file:///data/mlruns"}, "sqlite:////data/mlflow.db"),
        ({"tracking_uri": "databricks://x"}, "not a database or a server"),
        ({"tracking_uri": "sqlite:////x.db", "mlflow": "server"}, "both set"),
        ({"tracking_uri": "sqlite:////x.db", "name": "a/b"}, "cannot name a model"),
        ({"tracking_uri": "sqlite:////x.db", "alias": "champion"}, "PromoteModel and RollbackModel alone"),
        *(
            ({"tracking_uri": "sqlite:////x.db", "alias": alias}, "which MLflow keeps for itself")
            for alias in ("v1", "V22", "Latest", "release-2024.01", "", "a b", "x" * 256)
        ),
        (
            {"tracking_uri": "sqlite:////x.db", "metrics": {"roc": "high"}},
            r"metrics\['roc'\]='high' is not a number",
        ),
        ({"mlflow": "absent"}, "Connection 'absent' did not reach the stage"),
    ],
)
def test_what_cannot_be_registered_is_refused_in_a_sentence(fields, sentence, run, put_model) -> None:
    model = put_model(run.store, INFO, [1.0, 2.0])
    run.connections = {"server": Connection(id="server", type="http", host="mlflow.example")}
    with pytest.raises(BadConfiguration, match=sentence):
        RegisterModel(**{"model": model.uri, "name": "late"} | fields).run(run)
    assert registrations(run.store, "late") == []


def test_a_connection_brings_its_password_and_takes_it_away_again(
    mlflow_server, run, name, put_model
) -> None:
    model = put_model(run.store, INFO, [1.0, 2.0])
    run.connections = {
        "registry": Connection("registry", "http", "127.0.0.1", "ada", "geheim-41", port=mlflow_server.port)
    }
    before = dict(os.environ)
    result = RegisterModel(model=model.uri, name=name, mlflow="registry").run(run)
    assert dict(os.environ) == before
    assert result.links["mlflow"].startswith(f"{mlflow_server.uri}/#/models/fl%C3%BCge")
    written = [p.read_bytes() for p in run.workdir.parent.rglob("*") if p.is_file()]
    assert written
    assert not any(b"geheim-41" in content for content in written)


def test_a_server_that_is_not_there_is_said_and_may_be_retried(run, put_model, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    model = put_model(run.store, INFO, [1.0, 2.0])
    with pytest.raises(LeptonError, match=r"MLflow failed at opening http://127\.0\.0\.1:9") as error:
        RegisterModel(model=model.uri, name="late", tracking_uri="http://ada:geheim@127.0.0.1:9").run(run)
    assert error.value.exit_code == 1
    assert "geheim" not in str(error.value)
    assert registrations(run.store, "late") == []


def _folder(run: RunInfo, number: int) -> Path:
    folder = run.workdir / str(number)
    folder.mkdir()
    return folder
