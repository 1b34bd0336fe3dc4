"""Going back: to which champion, what follows it, kills in between, races, and what the next promotion does."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from lepton_airflow.__main__ import main
from lepton_airflow.contract import RunIdentity, split_pin
from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.delivery.endpoints import Desired, DesiredLog
from lepton_airflow.errors import BadConfiguration, BadInput, IntegrityError, LeptonError, Preempted, Skipped
from lepton_airflow.packaging.card import Touched
from lepton_airflow.registry.ledger import Ledger, LedgerEntry, Registration, Registrations, find_version
from lepton_airflow.registry.mlflow import MlflowRegistry
from lepton_airflow.stages import RunInfo, rollback_model
from lepton_airflow.stages.deploy_model import DeployModel
from lepton_airflow.stages.promote_model import PromoteModel
from lepton_airflow.stages.rollback_model import RollbackModel
from lepton_airflow.testing import LocalEndpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
REASON = "It called every flight of carrier B6 late."


def rows(n: int = 3000) -> pd.DataFrame:
    """Flights of May whose delay depends on hour and wind."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"hour": rng.normal(size=n), "wind": rng.normal(size=n)})
    frame["day"] = [f"2013-05-{d:02}" for d in rng.integers(1, 29, n)]
    frame["late"] = (rng.random(n) < 1 / (1 + np.exp(-frame.hour - 0.5 * frame.wind))).astype(int)
    return frame


class Desk:
    """One model name, its versions and champions, and an endpoint."""

    def __init__(self, run: RunInfo, tracking: str, put_model: Callable[..., Artifact]) -> None:
        self.run, self.tracking, self.put_model = run, tracking, put_model

    def register(self, wind: float, package: str | None = None) -> int:
        """Record a version trained on April as RegisterModel does, and show it in MLflow."""
        window = {"start": "2013-04-01", "end": "2013-05-01"}
        if package is None:
            seen = [Touched("train", "0" * 64, "train", "s", "day", ["2013-04-01", "2013-04-28"], 100)]
            package = self.put_model(self.run.store, INFO, [1.0, wind], window, touched=seen).uri
        mlflow = self.mlflow()
        if not mlflow.search_registered_models():
            mlflow.create_registered_model("late")
        tags = {"lepton.package": split_pin(package)[1]}
        version = int(mlflow.create_model_version("late", source="file:///unused", tags=tags).version)
        records = Registrations(self.run.store, "late")
        made = Registration("late", version, package, f"register-{version}", "", None, window)
        assert records.append_after(records.newest(), made)
        return version

    def champions(self, count: int) -> None:
        """Register versions, each better than the one before, and make each champion as PromoteModel does."""
        for _ in range(count):
            self.crown(self.register(-1.5 + 0.5 * len(self.moves())))

    def crown(self, version: int) -> None:
        ledger = Ledger(self.run.store, "late")
        before = ledger.newest()
        sequence, previous = (before.sequence + 1, before.version) if before else (1, None)
        made = find_version(self.run.store, "late", version)
        assert ledger.append(
            LedgerEntry(
                "late", sequence, "promote", version, made.package, previous, f"p{sequence}", "better.", made.window
            )
        )  # fmt: skip

    def info(self, key: str, run_type: str = "scheduled", **more: Any) -> RunInfo:
        folder = self.run.workdir / key
        folder.mkdir(exist_ok=True)
        identity = RunIdentity(run_type=run_type)
        return replace(self.run, run_key=key, workdir=folder, identity=identity, **more)

    def stage(self, **fields: Any) -> RollbackModel:
        defaults = {"name": "late", "reason": REASON, "tracking_uri": self.tracking, "timeout_s": 60}
        return RollbackModel(**defaults | fields)

    def back(self, key: str = "back", run_type: str = "scheduled", **fields: Any) -> Result:
        return self.stage(**fields).run(self.info(key, run_type))

    def deploy(self, key: str, **fields: Any) -> Result:
        defaults = {"endpoint": "late", "name": "late", "timeout_s": 60, "max_latency_ms": 5000}
        return DeployModel(**defaults | fields).run(self.info(key))

    def moves(self) -> list[tuple[str, int, int | None]]:
        return [(e.action, e.version, e.previous) for e in Ledger(self.run.store, "late").entries()]

    def asked(self) -> list[str]:
        return [desired.version for desired in DesiredLog(self.run.store, "late").entries()]

    def mlflow(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.tracking, registry_uri=self.tracking)

    def aliases(self) -> dict[str, int]:
        return {k: int(v) for k, v in self.mlflow().get_registered_model("late").aliases.items()}

    def package_file(self, version: int) -> Path:
        package = find_version(self.run.store, "late", version).package
        return Path(split_pin(package)[0].removeprefix("file://")) / "model.onnx"


@pytest.fixture
def desk(tmp_path: Path, mlflow_sqlite: str, put_model: Callable[..., Artifact]) -> Desk:
    return Desk(RunInfo.local(tmp_path, should_stop=bool), mlflow_sqlite, put_model)


@pytest.fixture
def dataset(desk: Desk, tmp_path: Path, write_dataset: Callable[..., DatasetInfo]) -> str:
    path = tmp_path / "test.parquet"
    write_dataset(path, rows(), replace(INFO, split="test", split_id="split-of-the-test"))
    return desk.run.store.put("test.parquet", path).uri


@pytest.fixture
def served(desk: Desk) -> Iterator[LocalEndpoint]:
    """A real server of the endpoint ``late``."""
    options = ("--poll-s", "0.1")
    with LocalEndpoint("late", desk.run.store.root, desk.run.workdir / "server", options=options) as server:
        yield server


# -- to which champion -------------------------------------------------------------------------------------------------


def test_the_former_champion_comes_back_with_a_reason_that_stays(desk: Desk) -> None:
    desk.champions(2)
    result = desk.back()
    assert result.values == {
        "champion": 1,
        "rolled_back": 2,
        "reason": REASON,
        "deployed": False,
        "url": None,
    }
    assert result.summary == f"version 1 of late is champion again, version 2 was taken out: {REASON}"
    first, taken_out, move = Ledger(desk.run.store, "late").entries()
    assert (move.action, move.version, move.previous, move.sentence) == ("rollback", 1, 2, REASON)
    assert (move.package, move.window, move.rolled_back) == (first.package, first.window, taken_out.sha256)
    assert desk.aliases() == {"champion": 1, "previous": 2}


def test_two_in_a_row_go_two_champions_back_and_a_third_has_nothing(desk: Desk) -> None:
    desk.champions(3)
    assert desk.back("one").values["champion"] == 2
    assert desk.back("two").values["champion"] == 1
    assert desk.aliases() == {"champion": 1, "previous": 2}
    with pytest.raises(
        BadConfiguration, match=r"nothing to go back to: before champion version 1 of 'late'"
    ) as e:
        desk.back("three")
    assert e.value.exit_code == 80
    # A new champion is taken out, and then it is the first one again, not one of those that were bad.
    desk.crown(desk.register(1.0))
    assert desk.back("four").values == {
        "champion": 1,
        "rolled_back": 4,
        "reason": REASON,
        "deployed": False,
        "url": None,
    }


def test_a_version_that_is_named_may_be_any_former_champion(desk: Desk) -> None:
    desk.champions(3)
    desk.register(2.0)
    assert desk.back("one", version=1).values["rolled_back"] == 3
    with pytest.raises(BadConfiguration, match="nothing to go back to"):
        desk.back("two")  # what came after version 1 is not before it
    assert desk.back("three", version=3).values["champion"] == 3  # it was not bad after all
    assert desk.moves()[-1] == ("rollback", 3, 1)
    with pytest.raises(BadConfiguration, match=r"version 4 of 'late' was never champion, .* were: 1, 2, 3"):
        desk.back("four", version=4)
    with pytest.raises(BadConfiguration, match=r"has no version 9 in .*known: 1, 2, 3, 4"):
        desk.back("five", version=9)
    desk.crown(4)
    with pytest.raises(BadConfiguration, match="version 4 of 'late' is champion now: name a former one"):
        desk.back("six", version=4)
    assert len(desk.moves()) == 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reason": " "}, "reason has 0 characters: expected a sentence of 1 to 500"),
        ({"reason": "x" * 501}, "reason has 501 characters"),
        ({"name": "Late"}, "model 'Late' has no champion in .*, so there is nothing to go back to; did you mean 'late'"),
        ({"tracking_uri": None}, "neither tracking_uri nor mlflow is set"),
        ({"endpoint": "a/b"}, "cannot name an endpoint"),
        ({"endpoint": "lat"}, "endpoint 'lat' was never asked for a version in .*; did you mean 'late'"),
        ({"endpoint": "other"}, "endpoint 'other' serves the champion of 'another', not of 'late'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_moves(
    desk: Desk, fields: dict[str, Any], words: str
) -> None:
    desk.champions(2)
    for endpoint, name in (("late", "late"), ("other", "another")):
        wanted = Desired(
            endpoint=endpoint, package="x", version="1", golden="x", max_difference=1, max_latency_ms=1, max_memory_mb=1,
            run_key="x", name=name, ledger=1,
        )  # fmt: skip
        assert DesiredLog(desk.run.store, endpoint).append_after(None, wanted)
    with pytest.raises(BadConfiguration, match=words):
        desk.back(**fields)
    assert len(desk.moves()) == 2


def test_a_package_that_is_damaged_or_gone_moves_nothing(desk: Desk) -> None:
    desk.champions(2)
    file = desk.package_file(1)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\0")
    with pytest.raises(
        IntegrityError, match=r"^version 1 of 'late' cannot come back, and nothing was moved: .*altered"
    ):
        desk.back()
    for path in (*file.parent.iterdir(), file.parent):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(BadInput, match=r"^version 1 of 'late' cannot come back, .*does not exist"):
        desk.back()
    assert len(desk.moves()) == 2
    assert desk.aliases() == {}


def test_a_backfill_says_what_it_would_do(desk: Desk) -> None:
    desk.champions(2)
    result = desk.back("one", "backfill")
    assert (result.values["champion"], result.values["rolled_back"]) == (2, None)
    assert "version 2 of late stays, and version 1 would come back: this is a backfill" in result.summary
    with pytest.raises(Skipped, match="on_backfill='skip'"):
        desk.back("two", "backfill", on_backfill="skip")
    assert len(desk.moves()) == 2
    assert desk.back("three", "backfill", on_backfill="full").values["champion"] == 1


# -- what follows, and kills in between --------------------------------------------------------------------------------


def test_the_endpoint_gets_it_too(desk: Desk, served: LocalEndpoint) -> None:
    desk.champions(2)
    desk.deploy("deploy")
    assert served.metadata()["versions"] == ["2"]
    result = desk.back(endpoint="late")
    assert (result.values["deployed"], result.values["url"]) == (True, served.url)
    assert result.links == {"endpoint": f"{served.url}/v2/models/late"}
    assert result.summary.endswith(f" Version 1 is in service at {served.url}.")
    assert served.metadata()["versions"] == ["1"]
    again = desk.back(endpoint="late")  # cleared
    assert again.values == result.values
    assert (desk.asked(), len(desk.moves())) == (["2", "1"], 3)
    former, mine = DesiredLog(desk.run.store, "late").entries()
    assert mine.max_latency_ms == former.max_latency_ms == 5000
    # Cleared once more after the next champion, it takes nothing away from that.
    desk.crown(desk.register(1.0))
    desk.deploy("next")
    late = desk.back(endpoint="late")
    assert (late.values["champion"], late.values["rolled_back"], late.values["deployed"]) == (3, 2, False)
    assert "Version 3 became champion since" in late.summary
    assert (desk.asked(), len(desk.moves())) == (["2", "1", "3"], 4)
    assert desk.aliases() == {"champion": 3, "previous": 1}


def test_a_version_of_other_inputs_is_refused_before_anything_moves(
    desk: Desk, served: LocalEndpoint
) -> None:
    desk.champions(1)
    gusts = replace(INFO, features=["hour", "wind", "gust"])
    desk.crown(desk.register(0.0, desk.put_model(desk.run.store, gusts, [1.0, 0.0, 0.5]).uri))
    desk.deploy("deploy")
    words = r"version 1 has other inputs \('gust'\) than version 2, which endpoint 'late' serves"
    with pytest.raises(BadConfiguration, match=words):
        desk.back(endpoint="late")
    assert len(desk.moves()) == 2
    assert desk.back(endpoint="late", allow_other_inputs=True).values["deployed"] is True
    assert served.metadata()["versions"] == ["1"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (Ledger, "append"),
        (MlflowRegistry, "point"),
        (DesiredLog, "append_after"),
        (rollback_model, "wait_until_served"),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_a_try_that_was_killed_is_taken_up_by_the_next(
    desk: Desk, served: LocalEndpoint, monkeypatch: pytest.MonkeyPatch, kind: Any, method: str, after: bool
) -> None:
    desk.champions(3)
    desk.deploy("deploy")
    real = getattr(kind, method)

    def killed(*args: Any) -> None:
        if after:
            real(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, killed)
        if method == "whole":  # while it waits
            patch.setattr("lepton_airflow.delivery.waiting.time.sleep", killed)
        with pytest.raises(Killed):
            desk.back(endpoint="late")
    result = desk.back(endpoint="late")
    assert result.values == {
        "champion": 2,
        "rolled_back": 3,
        "reason": REASON,
        "deployed": True,
        "url": served.url,
    }
    assert (desk.moves()[3:], desk.asked()) == ([("rollback", 2, 3)], ["3", "2"])
    assert desk.aliases() == {"champion": 2, "previous": 3}
    assert served.metadata()["versions"] == ["2"]


def test_the_endpoint_does_not_wait_for_mlflow(
    desk: Desk, served: LocalEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.champions(2)
    desk.deploy("deploy")

    def away(*_: Any) -> None:
        raise LeptonError("MLflow is away.")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowRegistry, "point", away)
        with pytest.raises(
            LeptonError, match=r"version 1 of 'late' is champion again by move 3 .*: MLflow is away"
        ) as e:
            desk.back(endpoint="late")
    assert e.value.exit_code == 1
    assert served.metadata()["versions"] == ["1"]
    assert desk.back("by another task", version=1, endpoint="late").values["rolled_back"] == 2
    assert (len(desk.moves()), desk.asked()) == (3, ["2", "1"])
    assert desk.aliases() == {"champion": 1, "previous": 2}


def test_a_stop_while_it_waits_is_taken_up_by_the_retry(desk: Desk) -> None:
    desk.champions(2)
    with pytest.raises(LeptonError, match="no server"):
        desk.deploy("deploy", timeout_s=0)
    with pytest.raises(
        LeptonError, match=r"champion again by move 3 .* rollback with version=1.*: no server"
    ):
        desk.back("back", endpoint="late", timeout_s=0)
    with pytest.raises(Preempted, match="champion again by move 3"):
        desk.stage(endpoint="late").run(desk.info("back", should_stop=lambda: True))
    assert (len(desk.moves()), desk.asked()) == (3, ["2", "1"])


# -- several at once ---------------------------------------------------------------------------------------------------


def test_one_task_in_four_processes_moves_once(desk: Desk, at_once: Callable[..., list[Result]]) -> None:
    desk.champions(3)
    infos = [replace(desk.info(f"copy-{i}"), run_key="the same") for i in range(4)]
    results = at_once([desk.stage().run] * 4, infos)
    assert [r.values["champion"] for r in results] == [2] * 4
    assert desk.moves()[3:] == [("rollback", 2, 3)]


def test_a_copy_of_the_task_that_comes_a_moment_later_does_not_go_back_further(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.champions(3)
    read = Ledger.entries

    def overtaken(*args: Any) -> list[LedgerEntry]:
        monkeypatch.undo()
        desk.back("the same")
        return read(*args)

    monkeypatch.setattr(Ledger, "entries", overtaken)
    assert desk.back("the same").values["champion"] == 2
    assert desk.moves()[3:] == [("rollback", 2, 3)]


def test_a_task_that_was_overtaken_moves_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.champions(2)
    better = desk.register(1.0)
    append = Ledger.append

    def overtaken(*args: Any) -> bool:
        monkeypatch.undo()
        desk.crown(better)
        return append(*args)

    monkeypatch.setattr(Ledger, "append", overtaken)
    words = (
        "another task moved the champion of 'late' from version 2 to 3 meanwhile, and this one moved nothing"
    )
    with pytest.raises(BadConfiguration, match=words):
        desk.back()
    assert [move[0] for move in desk.moves()] == ["promote"] * 3


def test_a_promotion_that_was_overtaken_by_a_rollback_judges_again(
    desk: Desk, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is judged against the champion that came back; and the one that was just taken out is held."""
    desk.champions(2)
    again = desk.register(0.0, find_version(desk.run.store, "late", 2).package)
    better = desk.register(0.5)
    append = Ledger.append

    def overtaken(*args: Any) -> bool:
        monkeypatch.undo()
        desk.back()
        return append(*args)

    monkeypatch.setattr(Ledger, "append", overtaken)
    promote = PromoteModel(
        name="late", dataset=dataset, version=better, tracking_uri=desk.tracking, resamples=200
    )
    assert promote.run(desk.info("promote")).values["decision"] == "promote"
    assert desk.moves()[2:] == [("rollback", 1, 2), ("promote", better, 1)]
    assert desk.aliases() == {"champion": better, "previous": 1}
    held = replace(promote, version=again).run(desk.info("held"))
    assert held.values["decision"] == "hold"


def test_a_deployment_that_waits_ends_with_the_version_that_came_back(desk: Desk) -> None:
    desk.champions(1)
    options = ("--poll-s", "0.1")
    server = LocalEndpoint("late", desk.run.store.root, desk.run.workdir / "server", options=options)
    with server:
        desk.deploy("first")
    desk.champions(1)
    results: list[Result] = []
    waiting = threading.Thread(target=lambda: results.append(desk.deploy("second")))
    waiting.start()
    while desk.asked() != ["1", "2"]:
        assert waiting.is_alive()
    back = threading.Thread(target=lambda: results.append(desk.back(endpoint="late")))
    back.start()
    while desk.asked() != ["1", "2", "1"]:
        assert back.is_alive()
    with server:
        back.join()
        waiting.join()
        assert server.metadata()["versions"] == ["1"]
    deployed, rolled_back = sorted(results, key=lambda result: "champion" in result.values)
    assert (deployed.values["version"], deployed.values["deployed"]) == ("1", False)
    assert (rolled_back.values["champion"], rolled_back.values["deployed"]) == (1, True)


# -- what the next run does --------------------------------------------------------------------------------------------


def test_what_was_taken_out_is_held_until_it_is_champion_again(desk: Desk, dataset: str) -> None:
    desk.champions(2)
    desk.back()
    same = desk.register(0.0, find_version(desk.run.store, "late", 2).package)
    stage = PromoteModel(name="late", dataset=dataset, version=2, tracking_uri=desk.tracking, resamples=200)
    held = stage.run(desk.info("p2"))
    assert (held.values["decision"], held.values["moved"], held.values["champion"]) == ("hold", False, 1)
    assert held.summary.startswith(f"hold: version 2 was champion and was rolled back: {REASON}")
    held = replace(stage, version=same).run(desk.info("p3"))
    assert held.summary.startswith(
        "hold: version 3 has the same package as version 2, which was champion and was rolled back"
    )
    allowed = replace(stage, version=same, allow_rolled_back=True).run(desk.info("p4"))
    assert (allowed.values["decision"], allowed.values["champion"]) == ("promote", same)
    # Champion again, and then replaced by a better one: nobody has anything against it any more.
    desk.crown(desk.register(-3.0))
    assert replace(stage, version=same).run(desk.info("p5")).values["decision"] == "promote"


# -- from a shell ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets for its process does not outlive the test."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.usefixtures("shell")
def test_from_a_shell(desk: Desk, served: LocalEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    desk.champions(3)
    desk.deploy("deploy")
    where = ["--store", desk.run.store.root, "--tracking-uri", desk.tracking]
    assert main(["rollback", "late", "--reason", REASON, "--endpoint", "late", *where]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"version 2 of late is champion again, version 3 was taken out: {REASON} Version 2 is in service at {served.url}.",
        f"endpoint: {served.url}/v2/models/late",
    ]
    assert served.metadata()["versions"] == ["2"]
    assert main(["rollback", "late", "--reason", REASON, *where]) == 0  # the same words, and one more back
    assert desk.moves()[3:] == [("rollback", 2, 3), ("rollback", 1, 2)]
    capsys.readouterr()
    assert main(["rollback", "late", "--reason", REASON, *where]) == 80
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("lepton_airflow: there is nothing to go back to")


@pytest.mark.usefixtures("shell")
def test_a_shell_says_what_is_missing(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.champions(2)
    rollback = ["rollback", "late", "--reason", REASON, "--store"]
    assert main([*rollback, desk.run.store.root]) == 80
    assert "which MLflow? Pass --tracking-uri" in capsys.readouterr().err
    assert main([*rollback, desk.run.store.root + "-not", "--tracking-uri", desk.tracking]) == 80
    assert "is not there" in capsys.readouterr().err

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowRegistry, "point", interrupted)
    assert main([*rollback, desk.run.store.root, "--tracking-uri", desk.tracking]) == 80
    assert "interrupted when version 1 was champion again: --version 1 goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*rollback, desk.run.store.root, "--tracking-uri", desk.tracking, "--version", "1"]) == 0
    assert desk.aliases() == {"champion": 1, "previous": 2}
    assert len(desk.moves()) == 3
