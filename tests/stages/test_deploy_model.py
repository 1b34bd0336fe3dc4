"""Deployment: which version is asked for, what a task waits for, and what it says when that does not come."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from lepton_airflow.contract import RunIdentity, canonical_json, split_pin
from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, DesiredLog, Status
from lepton_airflow.errors import BadConfiguration, BadInput, IntegrityError, LeptonError, Preempted, Skipped
from lepton_airflow.packaging.package import ModelPackage
from lepton_airflow.registry.deployment import Deployment
from lepton_airflow.registry.ledger import Ledger, LedgerEntry
from lepton_airflow.serving.model import ServedModel, measure
from lepton_airflow.serving.reconcile import Reconciler
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.deploy_model import DeployModel
from lepton_airflow.testing import LocalEndpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lepton_airflow.contract import Artifact
    from lepton_airflow.stages import Result

INFO = DatasetInfo(
    target="late",
    task="classification",
    features=["hour", "wind", "carrier"],
    categorical=["carrier"],
    classes=[0, 1],
)


class Desk:
    """One endpoint, packages for it, and the deployments asked for."""

    def __init__(self, run: RunInfo, put_model: Callable[..., Artifact]) -> None:
        self.run, self.put_model = run, put_model
        self.endpoint = "late"

    def package(self, weight: float, month: int | None = None) -> str:
        window = {"start": f"2013-{month - 1:02}-01", "end": f"2013-{month:02}-01"} if month else None
        return self.put_model(self.run.store, INFO, [weight, 0.5], window).uri

    def promote(self, package: str, name: str = "late") -> int:
        """Move the champion as PromoteModel does; returns the number of the move, which is the version too."""
        ledger = Ledger(self.run.store, name)
        champion = ledger.newest()
        number = champion.sequence + 1 if champion else 1
        assert ledger.append(
            LedgerEntry(name, number, "promote", number, package, number - 1 or None, "promote", "")
        )
        return number

    def info(self, key: str, run_type: str = "scheduled", **more: Any) -> RunInfo:
        folder = self.run.workdir / key
        folder.mkdir(exist_ok=True)
        identity = RunIdentity(run_type=run_type)
        return replace(self.run, run_key=key, workdir=folder, identity=identity, **more)

    def stage(self, **fields: Any) -> DeployModel:
        return DeployModel(**{"endpoint": self.endpoint, "timeout_s": 60, "max_latency_ms": 5000} | fields)

    def deploy(self, key: str = "task", run_type: str = "scheduled", **fields: Any) -> Result:
        return self.stage(**fields).run(self.info(key, run_type))

    def asked(self) -> list[Desired]:
        return DesiredLog(self.run.store, self.endpoint).entries()

    def server(self, name: str = "here") -> Reconciler:
        """A server without a process: it acts when ``step`` is called."""
        return Reconciler(
            self.run.store, self.endpoint, Status(server=name, url=f"http://{name}"), Here(), 0.05
        )


class Here:
    """A fleet without processes, which accepts what loads."""

    def try_out(
        self, desired: Desired, files: Mapping[str, bytes], golden: Mapping[str, Any]
    ) -> dict[str, float]:
        return measure(ServedModel.of(desired, files), golden)

    def put(self, *given: Any) -> None:
        given[-1]()


@pytest.fixture
def desk(tmp_path: Path, put_model: Callable[..., Artifact]) -> Desk:
    return Desk(RunInfo.local(tmp_path, should_stop=bool), put_model)


@pytest.fixture
def served(desk: Desk) -> Iterator[LocalEndpoint]:
    """A real server of the desk's endpoint."""
    options = ("--poll-s", "0.1")
    with LocalEndpoint(
        desk.endpoint, desk.run.store.root, desk.run.workdir / "server", options=options
    ) as server:
        yield server


@pytest.fixture
def following(desk: Desk) -> Iterator[Reconciler]:
    """A server in a thread of this process: all of it but HTTP."""
    reconciler = desk.server()
    reconciler.report()
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(1):
            reconciler.report()

    threads = [threading.Thread(target=call) for call in (reconciler.run, beat)]
    for thread in threads:
        thread.start()
    try:
        yield reconciler
    finally:
        ended.set()
        reconciler.stop()
        for thread in threads:
            thread.join()


def answer(server: LocalEndpoint, hour: float) -> tuple[str, list[float]]:
    """The version that answers, and its probabilities."""
    inputs = [
        {"name": "hour", "shape": [1], "datatype": "FP32", "data": [hour]},
        {"name": "wind", "shape": [1], "datatype": "FP32", "data": [0.0]},
        {"name": "carrier", "shape": [1], "datatype": "BYTES", "data": ["UA"]},
    ]
    found = server.infer({"inputs": inputs})
    return found["model_version"], found["outputs"][0]["data"]


# -- with a real server ------------------------------------------------------------------------------------------------


def test_the_champion_is_deployed_and_the_next_one_and_nothing_twice(
    desk: Desk, served: LocalEndpoint
) -> None:
    desk.promote(desk.package(1.0))
    first = desk.deploy("one", name="late")
    assert first.values["deployed"] is True
    assert (first.values["version"], first.values["url"]) == ("1", served.url)
    assert first.links == {"endpoint": f"{served.url}/v2/models/late"}
    assert set(first.metrics) >= {
        "difference",
        "latency_p50_ms",
        "latency_p95_ms",
        "memory_mib",
        "load_s",
        "ready_s",
    }
    assert "version 1 is in service" in first.summary
    version, probabilities = answer(served, 2.0)
    assert version == "1"
    assert probabilities == pytest.approx([1 - 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-2))], abs=1e-6)

    desk.promote(desk.package(-1.0))
    assert desk.deploy("two", name="late").values["version"] == "2"
    assert answer(served, 2.0)[1] == pytest.approx(probabilities[::-1], abs=1e-6)
    again = desk.deploy("three", name="late")
    assert again.values["deployed"] is True
    assert [d.version for d in desk.asked()] == ["1", "2"]


def test_two_months_at_once_end_with_the_newer_one(
    desk: Desk, served: LocalEndpoint, at_once: Callable[..., list[Result]]
) -> None:
    stages = [desk.stage(model=desk.package(float(month), month)) for month in (4, 5, 6)]
    stages += [desk.stage(model=stages[2].model)]
    results = at_once([s.run for s in stages], [desk.info(f"month-{i}") for i in range(len(stages))])
    newest = split_pin(stages[2].model or "")[1]
    assert [r.values["sha256"] for r in results[2:]] == [newest, newest]
    assert [r.values["deployed"] for r in results[2:]] == [True, True]
    windows = [d.window["end"] for d in desk.asked() if d.window]
    assert windows == sorted(set(windows))  # never back, and none twice
    assert answer(served, 1.0)[0] == (newest or "")[:12]


def test_all_tasks_that_come_at_once_deploy_the_one_champion(
    desk: Desk, served: LocalEndpoint, at_once: Callable[..., list[Result]]
) -> None:
    desk.promote(desk.package(1.0))
    results = at_once([desk.stage(name="late").run] * 4, [desk.info(f"task-{i}") for i in range(4)])
    assert [r.values["deployed"] for r in results] == [True] * 4
    assert len(desk.asked()) == 1


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_an_older_move_of_the_champion_is_refused(desk: Desk, following: Reconciler) -> None:
    for weight in (1.0, 2.0):
        desk.promote(desk.package(weight))
    desk.deploy("one", name="late")
    desk.deploy("pinned", model=desk.package(3.0))
    desk.run.store.delete(
        "records/ledger/late/000/000002.json"
    )  # a store that was restored from too old a backup
    with pytest.raises(
        IntegrityError, match=r"asked for move 2 .* now for the older move 1: it never goes back"
    ):
        desk.deploy("late comer", name="late")
    assert [d.ledger for d in desk.asked()] == [2, None]


def test_a_task_that_looked_too_early_looks_again(
    desk: Desk, following: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at the ledger and its record, the champion moves and another task deploys it."""
    desk.promote(desk.package(1.0))
    append = DesiredLog.append_after

    def overtaken(*args: Any) -> Desired | None:
        monkeypatch.undo()
        desk.promote(desk.package(2.0))
        desk.deploy("faster", name="late")
        return append(*args)

    monkeypatch.setattr(DesiredLog, "append_after", overtaken)
    result = desk.deploy("slower", name="late")
    assert (result.values["version"], result.values["deployed"]) == ("2", True)
    assert [d.ledger for d in desk.asked()] == [2]


def test_a_package_of_older_data_stays_out(desk: Desk, following: Reconciler) -> None:
    may, april, june = desk.package(1.0, 5), desk.package(2.0, 4), desk.package(3.0, 6)
    desk.deploy("may", model=may)
    result = desk.deploy("april", model=april)
    assert result.values["deployed"] is False
    assert result.values["sha256"] == split_pin(may)[1]
    assert "trained on newer data, until 2013-05-01, than this package, until 2013-04-01" in result.summary
    assert desk.deploy("june", model=june).values["deployed"] is True


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (replace(INFO, features=["hour", "carrier"]), r"other inputs \('wind'\) than version"),
        (replace(INFO, categorical=["carrier", "wind"]), r"other inputs \('wind'\)"),
        (replace(INFO, classes=[0, 2]), "other classes than version"),
    ],
)
def test_a_model_that_the_clients_cannot_ask_is_refused(
    desk: Desk, following: Reconciler, put_model: Callable[..., Artifact], info: DatasetInfo, words: str
) -> None:
    desk.deploy("one", model=desk.package(1.0))
    other = put_model(
        desk.run.store, info, [2.0] * sum(c not in info.categorical for c in info.features), None
    ).uri
    with pytest.raises(BadConfiguration, match=f"{words}.*or pass allow_other_inputs=True"):
        desk.deploy("two", model=other)
    assert len(desk.asked()) == 1
    assert desk.deploy("three", model=other, allow_other_inputs=True).values["deployed"] is True


def test_a_damaged_verdict_keeps_no_champion_out(desk: Desk, following: Reconciler) -> None:
    desk.promote(desk.package(1.0))
    desk.deploy("one", name="late")
    root = Path(desk.run.store.root.removeprefix("file://"))
    (root / f"records/endpoints/{desk.endpoint}/verdicts/000001.json").write_bytes(b"?")
    desk.promote(desk.package(2.0))
    assert desk.deploy("two", name="late").values["version"] == "2"


def test_a_package_from_outside_the_store_is_copied_into_it(
    desk: Desk, following: Reconciler, tmp_path: Path
) -> None:
    inside = desk.run.fetch(desk.package(1.0))
    outside = tmp_path / "elsewhere" / "model"
    outside.parent.mkdir()
    inside.rename(outside)
    result = desk.deploy(model=str(outside))
    assert result.values["deployed"] is True
    assert desk.asked()[0].package.startswith(desk.run.store.root + "/artifacts/")


def test_golden_answers_are_computed_once_a_package(
    desk: Desk, following: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    compute = Deployment._computed
    monkeypatch.setattr(Deployment, "_computed", lambda self, p: (computed.append(p), compute(self, p))[1])
    first, second = desk.package(1.0), desk.package(2.0)

    def deploy(package: str, key: str, **more: Any) -> Artifact:
        info = desk.info(key, cache_key="0" * 64, **more)
        return desk.stage(model=package).run(info).artifacts["golden"]

    golden = deploy(first, "one")
    assert deploy(first, "two") == golden
    assert deploy(second, "three") != golden
    assert computed == [first, second]
    deploy(second, "four", refresh=True)
    assert computed == [first, second, second]


def test_golden_rows_come_from_all_over_a_dataset(
    desk: Desk, following: Reconciler, tmp_path: Path, write_dataset: Callable[..., Any]
) -> None:
    frame = pd.DataFrame({"hour": np.arange(1000) / 7, "wind": np.nan, "carrier": ["AA", None] * 500})
    write_dataset(tmp_path / "test.parquet", frame, replace(INFO, target="wind"))
    package = desk.package(1.0)
    result = desk.deploy(model=package, golden=str(tmp_path / "test.parquet"))
    golden = json.loads(desk.run.fetch(result.artifacts["golden"].uri).read_bytes())
    assert len(golden["rows"]) == 32
    assert golden["rows"][0] == {"hour": 0.0, "wind": None, "carrier": "AA"}
    assert golden["rows"][-1]["hour"] > 130
    full = frame.assign(wind=1.0)
    write_dataset(tmp_path / "test.parquet", full, INFO)
    again = desk.deploy(model=package, golden=str(tmp_path / "test.parquet"))
    golden = json.loads(desk.run.fetch(again.artifacts["golden"].uri).read_bytes())
    model = ModelPackage.open(desk.run.fetch(package))
    np.testing.assert_array_equal(np.float32(golden["answers"]), model.predict(pd.DataFrame(golden["rows"])))
    assert len(desk.asked()) == 2  # other golden requests are another question

    write_dataset(
        tmp_path / "test.parquet", frame.rename(columns={"hour": "huor"}), replace(INFO, target="wind")
    )
    with pytest.raises(
        BadInput, match=r"^golden: the model to deploy needs the column 'hour', .* did you mean 'huor'\?"
    ):
        desk.deploy(model=package, golden=str(tmp_path / "test.parquet"))
    write_dataset(tmp_path / "test.parquet", frame[:0], INFO)
    with pytest.raises(BadInput, match="has no rows"):
        desk.deploy(model=package, golden=str(tmp_path / "test.parquet"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "name=None and model=None: pass one of them"),
        ({"name": "late", "model": "/model"}, "pass one of them"),
        ({"name": "late", "endpoint": "a/b"}, "endpoint='a/b' cannot name an endpoint"),
        ({"name": "late"}, "model 'late' has no champion in .*: run PromoteModel before"),
        ({"name": "../late"}, "cannot name a model"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_asked_for(
    desk: Desk, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadConfiguration, match=words):
        desk.deploy(**fields)
    assert desk.asked() == []


def test_a_backfill_leaves_the_endpoint_alone_unless_told(desk: Desk, following: Reconciler) -> None:
    desk.promote(desk.package(1.0))
    result = desk.deploy("one", "backfill", name="late")
    assert (result.values["deployed"], result.values["version"]) == (False, None)
    assert "stays as it is: this is a backfill and on_backfill='register_only'" in result.summary
    with pytest.raises(Skipped, match="on_backfill='skip'"):
        desk.deploy("two", "backfill", name="late", on_backfill="skip")
    assert desk.asked() == []
    assert desk.deploy("three", "backfill", name="late", on_backfill="full").values["deployed"] is True
    desk.promote(desk.package(2.0))
    assert desk.deploy("four", "backfill", name="late").values["version"] == "1"


# -- what is waited for ------------------------------------------------------------------------------------------------


def test_a_task_says_that_nobody_serves_and_its_retry_asks_no_second_time(desk: Desk) -> None:
    package = desk.package(1.0)
    with pytest.raises(
        LeptonError, match=r"no server reported .* start one with: python -m lepton_airflow serve late"
    ) as e:
        desk.deploy(model=package, timeout_s=0.3)
    assert e.value.exit_code == 1
    gone = asdict(Status(server="gone", url="", beat=(datetime.now(UTC) - timedelta(seconds=77)).isoformat()))
    desk.run.store.write("records/endpoints/late/status/gone.json", canonical_json(gone).encode())
    with pytest.raises(
        LeptonError, match=r"no server .* reports: the last heartbeat, of gone, is 7[78] s old"
    ):
        desk.deploy(model=package, timeout_s=0.3)
    endpoints.write_status(
        desk.run.store, "late", Status(server="slow", url="", state="loading", reason="version x is being loaded.",
                                       beat=endpoints.precise_now()),
    )  # fmt: skip
    with pytest.raises(LeptonError, match=r"server slow .* within timeout_s=0.3: version x is being loaded"):
        desk.deploy(model=package, timeout_s=0.3)
    assert len(desk.asked()) == 1
    desk.run.store.delete("records/endpoints/late/status/slow.json")
    server = desk.server()
    server.step()
    assert desk.deploy(model=package).values["deployed"] is True
    assert len(desk.asked()) == 1


def test_a_stop_while_waiting_is_taken_up_by_the_retry(desk: Desk) -> None:
    package = desk.package(1.0)
    stops = iter([False, False, True])
    with pytest.raises(Preempted):
        desk.stage(model=package).run(desk.info("task", should_stop=lambda: next(stops)))
    desk.server().step()
    assert desk.deploy("task", model=package).values["deployed"] is True
    assert len(desk.asked()) == 1


def test_a_rejected_version_leaves_the_former_one_and_a_retry_asks_again(
    desk: Desk, following: Reconciler
) -> None:
    good, bad = desk.package(1.0), desk.package(2.0)
    desk.deploy("good", model=good)
    with pytest.raises(
        LeptonError, match=r"rejected the version, version \w+ stays in service: the 95th"
    ) as e:
        desk.deploy("slow", model=bad, max_latency_ms=1e-6)
    assert e.value.exit_code == 1
    with pytest.raises(LeptonError, match="max_latency_ms=1e-06"):
        desk.deploy("slow", model=bad, max_latency_ms=1e-6)
    assert len(desk.asked()) == 3
    assert following.status.sha256 == split_pin(good)[1]
    assert desk.deploy("good", model=good).values["deployed"] is True  # what is in service is in service
    assert desk.deploy("patient", model=bad).values["deployed"] is True


def test_bytes_that_were_altered_on_the_way_to_the_server_fail_without_a_retry(desk: Desk) -> None:
    good, bad = desk.package(1.0), desk.package(2.0)
    server = desk.server()
    server.report()
    failures: list[LeptonError] = []

    def task() -> None:
        try:
            desk.deploy("altered", model=bad)
        except LeptonError as error:
            failures.append(error)

    assert DesiredLog(desk.run.store, desk.endpoint).append_after(None, _record(desk, good))
    server.step()
    thread = threading.Thread(target=task)
    thread.start()
    while len(desk.asked()) < 2:  # it has verified and asked, and waits now
        assert thread.is_alive()
    path = Path(split_pin(bad)[0].removeprefix("file://")) / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    server.step()
    thread.join()
    (error,) = failures
    assert isinstance(error, IntegrityError)
    assert error.exit_code == 80
    assert "server here of endpoint 'late' rejected the version" in str(error)
    assert "it was altered or is damaged" in str(error)
    assert server.status.sha256 == split_pin(good)[1]


def test_a_package_that_was_damaged_and_healed_is_deployed_again(desk: Desk) -> None:
    package = desk.package(1.0)
    with pytest.raises(LeptonError, match="no server"):
        desk.deploy(model=package, timeout_s=0)
    desk.server().step()  # accepted, and the server ends
    path = Path(split_pin(package)[0].removeprefix("file://")) / "model.onnx"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\0")
    again = desk.server()
    again.step()
    again.report()
    assert again.status.state == "rejected"
    path.write_bytes(content)
    with pytest.raises(LeptonError, match=r"server here .* does not serve version 2"):
        desk.deploy(model=package, timeout_s=0)
    again.step()
    assert desk.deploy(model=package).values["deployed"] is True
    assert len(desk.asked()) == 2


def _record(desk: Desk, package: str) -> Desired:
    """What DeployModel would ask for, taken from an endpoint that nobody serves."""
    with pytest.raises(LeptonError, match="no server reported"):
        desk.deploy("other", endpoint="other", model=package, timeout_s=0)
    (desired,) = DesiredLog(desk.run.store, "other").entries()
    return replace(desired, endpoint=desk.endpoint)


def test_every_living_server_must_serve_it(desk: Desk) -> None:
    servers = [desk.server("a"), desk.server("b")]
    package = desk.package(1.0)
    for name, server in zip("ab", servers, strict=True):
        for waiting in servers:
            waiting.report()
        with pytest.raises(LeptonError, match=f"server {name} .* does not serve version 1"):
            desk.deploy(model=package, timeout_s=0)
        server.step()
    assert desk.deploy(model=package, timeout_s=0).values["deployed"] is True


def test_a_version_that_another_one_followed_at_once_is_not_called_deployed(desk: Desk) -> None:
    first, second = desk.package(1.0), desk.package(2.0)
    for key, package in (("first", first), ("second", second)):
        with pytest.raises(LeptonError, match="no server"):
            desk.deploy(key, model=package, timeout_s=0)
    desk.server().step()
    result = desk.deploy("first", model=first)
    assert result.values["deployed"] is False
    assert result.values["sha256"] == split_pin(second)[1]
    assert "was asked for and then version" in result.summary
