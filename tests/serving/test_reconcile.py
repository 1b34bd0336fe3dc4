"""What lets a version in and what keeps it out, and what a server does that starts again. No process, no HTTP."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from lepton_airflow.contract import canonical_json, split_pin
from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, DesiredLog, LoadVerdict, Status
from lepton_airflow.errors import LeptonError, StoreError
from lepton_airflow.serving import reconcile
from lepton_airflow.serving.model import ServedModel, measure, scale_of
from lepton_airflow.serving.reconcile import Died, NotNow, Reconciler
from lepton_airflow.store import Store
from lepton_airflow.store.identity import identity_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lepton_airflow.stages import RunInfo

ENDPOINT = "wine"


class Here:
    """A fleet without processes: it loads a version, and remembers what was put into service."""

    def __init__(self) -> None:
        self.served: list[ServedModel] = []
        self.dies: list[bool] = []  # of the next trials
        self.puts: list[LeptonError | None] = []  # what becomes of the next ones

    def try_out(
        self, desired: Desired, files: Mapping[str, bytes], golden: Mapping[str, Any]
    ) -> dict[str, float]:
        if self.dies and self.dies.pop(0):
            raise Died("the process that tried it ended by SIGSEGV.")
        return measure(ServedModel.of(desired, files), golden)

    def put(
        self,
        desired: Desired,
        files: Mapping[str, bytes],
        numbers: dict[str, float],
        accept: Callable[[], bool],
    ) -> None:
        if self.puts and (error := self.puts.pop(0)) is not None:
            raise error
        if accept():
            self.served.append(ServedModel.of(desired, files, numbers))


class Bench:
    """An endpoint in a store of its own, and the records that DeployModel would write."""

    def __init__(self, folder: Path, shelf: Any) -> None:
        self.store = Store(str(folder / "store"))
        self.folder = folder
        self.shelf = shelf
        self.good = self.put(shelf.wine)
        self.other = self.put(shelf.other_wine)
        self.golden = {name: self.answers(getattr(shelf, name)) for name in ("wine", "other_wine")}

    def put(self, trained: Any) -> str:
        return self.store.put("model", trained.package.path).uri

    def answers(self, trained: Any, off: float = 0.0) -> str:
        rows = trained.rows.head(5).astype(object).where(trained.rows.head(5).notna(), None)
        content = {
            "rows": rows[[f.name for f in trained.package.card.features]].to_dict("records"),
            "answers": (trained.package.predict(trained.rows.head(5)) + np.float32(off)).tolist(),
        }
        return self.store.put("golden.json", canonical_json(content)).uri

    def ask(self, package: str, golden: str, **changes: Any) -> Desired:
        records = DesiredLog(self.store, ENDPOINT)
        newest = records.newest()
        desired = Desired(
            endpoint=ENDPOINT,
            package=package,
            version=f"v{newest.sequence + 1 if newest else 1}",
            golden=golden,
            max_difference=1e-5,
            max_latency_ms=1000,
            max_memory_mb=100_000,
            run_key="key",
        )
        asked = records.append_after(newest, replace(desired, **changes))
        assert asked is not None
        return asked

    def ask_good(self, **changes: Any) -> Desired:
        return self.ask(self.good, self.golden["wine"], **changes)

    def ask_other(self, **changes: Any) -> Desired:
        return self.ask(self.other, self.golden["other_wine"], **changes)

    def server(self, name: str = "a", fleet: Here | None = None) -> Reconciler:
        status = Status(server=name, url=f"http://{name}")
        return Reconciler(self.store, ENDPOINT, status, fleet or Here(), 0.05)

    def alter(self, uri: str, name: str = "") -> None:
        path = Path(split_pin(uri)[0].removeprefix("file://")) / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def desired(self, sequence: int) -> Desired:
        return DesiredLog(self.store, ENDPOINT).existing(sequence)

    def verdict(self, sequence: int) -> LoadVerdict:
        verdict = endpoints.read_verdict(self.store, ENDPOINT, sequence)
        assert verdict is not None
        return verdict


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "_PAUSE_S", 0.0)


@pytest.fixture
def bench(tmp_path: Path, shelf: Any) -> Bench:
    return Bench(tmp_path, shelf)


def test_an_endpoint_that_nobody_asked_for_is_idle(bench: Bench) -> None:
    server = bench.server()
    server.step()
    server.report()
    assert [s.state for s in endpoints.read_statuses(bench.store, ENDPOINT)] == ["idle"]


def test_a_heartbeat_that_comes_late_does_not_bring_an_ended_server_back(bench: Bench) -> None:
    server = bench.server()
    server.report()
    server.leave()
    server.report()
    assert endpoints.read_statuses(bench.store, ENDPOINT) == []


def test_a_good_version_is_let_in_with_its_numbers(bench: Bench) -> None:
    bench.ask_good()
    server = bench.server()
    server.step()
    (status,) = endpoints.read_statuses(bench.store, ENDPOINT)
    assert (status.state, status.serving, status.version) == ("serving", 1, "v1")
    assert status.sha256 == split_pin(bench.good)[1]
    assert status.numbers["difference"] < 1e-6
    assert 0 < status.numbers["latency_p50_ms"] <= status.numbers["latency_p95_ms"] < 1000
    assert status.numbers["memory_mib"] > 20
    assert bench.verdict(1).accepted


def test_only_the_newest_of_several_is_loaded(bench: Bench) -> None:
    bench.ask_good()
    bench.ask_other()
    server = bench.server()
    server.step()
    assert server.status.serving == 2
    assert endpoints.read_verdict(bench.store, ENDPOINT, 1) is None


def wrong_golden(bench: Bench) -> Desired:
    return bench.ask(bench.other, bench.golden["wine"])


def almost_right_golden(bench: Bench) -> Desired:
    return bench.ask(bench.other, bench.answers(bench.shelf.other_wine, off=1e-3))


def altered_model(bench: Bench) -> Desired:
    bench.alter(bench.other, "model.onnx")
    return bench.ask_other()


def altered_card(bench: Bench) -> Desired:
    bench.alter(bench.other, "model.json")
    return bench.ask_other()


def file_added(bench: Bench) -> Desired:
    (Path(split_pin(bench.other)[0].removeprefix("file://")) / "more.bin").write_bytes(b"x")
    return bench.ask_other()


def altered_golden(bench: Bench) -> Desired:
    bench.alter(bench.golden["other_wine"])
    return bench.ask_other()


def gone(bench: Bench) -> Desired:
    bench.store.delete(f"artifacts/{split_pin(bench.other)[1][:32]}")  # type: ignore[index]
    return bench.ask_other()


def not_pinned(bench: Bench) -> Desired:
    return bench.ask(split_pin(bench.other)[0], bench.golden["other_wine"])


def not_onnx(bench: Bench) -> Desired:
    return bench.ask(_package(bench, b"no model"), bench.golden["other_wine"])


def weights_elsewhere(bench: Bench) -> Desired:
    """A model whose weights lie in a file beside it, which no digest covers."""
    model = onnx.load(Path(split_pin(bench.other)[0].removeprefix("file://")) / "model.onnx")
    graph = model.graph
    wide = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "elsewhere")
    graph.initializer.append(wide)
    graph.node.append(onnx.helper.make_node("MatMul", ["elsewhere", "elsewhere"], ["unused"]))
    graph.output.append(onnx.helper.make_tensor_value_info("unused", onnx.TensorProto.FLOAT, [64, 64]))
    path = bench.folder / "elsewhere.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    assert (bench.folder / "weights.bin").exists()
    return bench.ask(_package(bench, path.read_bytes()), bench.golden["other_wine"])


def another_signature(bench: Bench) -> Desired:
    model = bench.shelf.diabetes.package.path / "model.onnx"
    return bench.ask(_package(bench, model.read_bytes()), bench.golden["other_wine"])


def no_package(bench: Bench) -> Desired:
    return bench.ask(bench.golden["wine"], bench.golden["wine"])


def too_slow(bench: Bench) -> Desired:
    return bench.ask_other(max_latency_ms=1e-6)


def too_large(bench: Bench) -> Desired:
    return bench.ask_other(max_memory_mb=1)


def _package(bench: Bench, model: bytes) -> str:
    folder = bench.folder / "package"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model)
    card = bench.shelf.other_wine.package.path / "model.json"
    (folder / "model.json").write_bytes(card.read_bytes())
    return bench.store.put("model", folder).uri


@pytest.mark.parametrize(
    ("ask", "kind", "words"),
    [
        (wrong_golden, "BadInput", "5 golden requests differ by up to"),
        (almost_right_golden, "BadInput", "differ by up to 0.001, the limit is max_difference=1e-05"),
        (altered_model, "IntegrityError", "it was altered or is damaged"),
        (altered_card, "IntegrityError", "it was altered or is damaged"),
        (file_added, "IntegrityError", "it was altered or is damaged"),
        (altered_golden, "IntegrityError", "golden.json has sha256"),
        (gone, "BadInput", "does not exist"),
        (not_pinned, "IntegrityError", "names no digest"),
        (not_onnx, "BadInput", "cannot be run by ONNX Runtime"),
        (weights_elsewhere, "BadInput", "External data path"),
        (another_signature, "BadInput", "the package is not whole"),
        (no_package, "BadInput", "has no model.json"),
        (too_slow, "LeptonError", "max_latency_ms=1e-06"),
        (too_large, "LeptonError", "max_memory_mb=1"),
    ],
)
def test_a_bad_version_is_kept_out_and_the_former_one_stays(
    bench: Bench, ask: Any, kind: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench.folder)  # where weights_elsewhere has put its file
    bench.ask_good()
    server = bench.server()
    server.step()
    ask(bench)
    server.step()
    (status,) = endpoints.read_statuses(bench.store, ENDPOINT)
    assert (status.state, status.serving, status.version, status.desired) == ("rejected", 1, "v1", 2)
    assert status.errors["2"]["kind"] == kind
    assert words in status.reason
    error = dict(status.errors["2"])
    assert error.pop("sha256") == bench.desired(2).sha256
    assert bench.verdict(2).error == error

    again = bench.server()  # it does not try what was rejected, whatever became of it
    again.step()
    assert (again.status.state, again.status.serving) == ("rejected", 1)


def test_what_is_in_service_does_not_depend_on_the_files_any_more(bench: Bench) -> None:
    fleet = Here()
    bench.ask_good()
    bench.server(fleet=fleet).step()
    bench.alter(bench.good, "model.onnx")
    inputs = [
        {
            "name": f.name,
            "datatype": "BYTES" if f.kind == "category" else "FP32",
            "shape": [1],
            "data": [None],
        }
        for f in fleet.served[0].card.features
    ]
    answer = fleet.served[0].answer(json.dumps({"inputs": inputs}).encode(), 1)
    assert answer.rows == 1
    assert json.loads(answer.content)["model_version"] == "v1"


def test_a_server_that_starts_again_falls_back_when_the_newest_is_damaged(bench: Bench) -> None:
    bench.ask_good()
    bench.server().step()
    bench.ask_other()
    bench.server().step()
    bench.alter(bench.other, "model.onnx")
    again = bench.server()
    again.step()
    assert (again.status.state, again.status.serving) == ("rejected", 1)
    assert "altered" in again.status.reason
    assert bench.verdict(2).accepted  # it was good when it was judged; this server cannot serve it


def test_a_version_that_ends_the_process_that_tries_it_is_rejected_after_three_times(bench: Bench) -> None:
    fleet = Here()
    fleet.dies = [True, True, False]  # somebody killed it, twice
    bench.ask_good()
    server = bench.server(fleet=fleet)
    server.step()
    assert (server.status.state, server.status.serving) == ("serving", 1)
    fleet.dies = [True] * 3
    bench.ask_other()
    server.step()
    assert (server.status.state, server.status.serving) == ("rejected", 1)
    assert "ended by SIGSEGV. So it was 3 times" in server.status.reason
    assert bench.verdict(2).error


def test_a_version_that_ends_workers_is_rejected_after_three_times_and_not_accepted_before(
    bench: Bench,
) -> None:
    fleet = Here()
    bench.ask_good()
    server = bench.server(fleet=fleet)
    died = Died("a worker that held it beside what is in service ended by SIGKILL.")
    fleet.puts = [died, died, None]
    server.step()
    assert (server.status.state, server.status.serving) == ("serving", 1)
    fleet.puts = [died, died, died]
    bench.ask_other()
    server.step()
    assert (server.status.state, server.status.serving) == ("rejected", 1)
    assert "in service ended by SIGKILL. So it was 3 times" in server.status.reason
    assert not bench.verdict(2).accepted
    assert [model.desired.version for model in fleet.served] == ["v1"]


def test_a_version_that_the_workers_cannot_load_is_rejected(bench: Bench) -> None:
    fleet = Here()
    bench.ask_good()
    server = bench.server(fleet=fleet)
    server.step()
    fleet.puts = [LeptonError("a worker cannot load it: MemoryError: ")]
    bench.ask_other()
    server.step()
    assert (server.status.state, server.status.serving) == ("rejected", 1)
    assert bench.verdict(2).error
    assert bench.verdict(2).numbers


def test_a_server_that_is_killed_while_it_loads_rejects_the_version_the_third_time(bench: Bench) -> None:
    class Killed(BaseException):
        """Like a signal: nothing of this process comes after it."""

    class KilledHere(Here):
        def try_out(self, *_: Any) -> dict[str, float]:
            raise Killed

    bench.ask_good()
    bench.server().step()
    bench.ask_other()
    for _ in range(3):
        server = bench.server("elsewhere", KilledHere())
        server.recover()
        with pytest.raises(Killed):
            server.step()
    again = bench.server("elsewhere")
    again.recover()
    again.step()
    assert (again.status.state, again.status.serving) == ("rejected", 1)
    assert "killed 3 times while it loaded this version" in again.status.reason
    again.recover()
    assert bench.verdict(1).accepted


def test_a_good_version_survives_the_death_of_a_server_that_loads_it(bench: Bench) -> None:
    bench.ask_good()
    endpoints.write_status(
        bench.store,
        ENDPOINT,
        Status(
            server="a",
            url="",
            state="loading",
            reason="version v1 is being loaded.",
            desired=1,
            beat=endpoints.precise_now(),
        ),
    )
    again = bench.server()
    again.recover()
    assert again.status.tries == 1
    again.step()
    assert (again.status.state, again.status.serving, again.status.tries) == ("serving", 1, 0)


def test_a_server_that_is_killed_while_it_cannot_read_or_try_a_version_rejects_nothing(bench: Bench) -> None:
    fleet = Here()
    bench.ask_good()
    bench.server().step()
    bench.ask_other()
    for _ in range(4):
        fleet.puts = [NotNow("not all of 2 workers run.")]
        server = bench.server("elsewhere", fleet)
        server.recover()
        server.step()
        assert server.status.problems == ["version v2 waits: not all of 2 workers run."]
    server._look_again = 1e-9
    server.step()
    assert (server.status.state, server.status.serving, server.status.problems) == ("serving", 2, [])


def test_a_server_that_was_killed_on_its_way_back_rejects_nothing(bench: Bench) -> None:
    bench.ask_good()
    bench.server().step()
    endpoints.write_status(
        bench.store,
        ENDPOINT,
        Status(server="a", url="", state="loading", desired=1, beat=endpoints.precise_now()),
    )
    again = bench.server()
    again.recover()
    again.step()
    assert (again.status.state, again.status.serving) == ("serving", 1)


def test_a_budget_decides_about_a_change_and_not_about_a_restart(bench: Bench) -> None:
    desired = bench.ask_good(max_latency_ms=1e-6)
    endpoints.decide(bench.store, ENDPOINT, LoadVerdict(sequence=1, accepted=True, server="on a quiet day"))
    again = bench.server()
    again.step()
    assert (again.status.state, again.status.serving) == ("serving", 1)
    assert again.status.numbers["latency_p95_ms"] > desired.max_latency_ms


def test_the_first_verdict_stands_for_all_servers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.ask_good()
    a, b = bench.server("a"), bench.server("b")
    a.step()
    b.step()
    bench.ask_other()
    ours = endpoints.read_verdict

    def as_other_rejects(store: Store, endpoint: str, sequence: int) -> LoadVerdict | None:
        """b has rejected the version just after a had looked."""
        found = ours(store, endpoint, sequence)
        if found is None:
            error = {"kind": "LeptonError", "message": "too slow at b.", "exit_code": 1}
            theirs = LoadVerdict(sequence=sequence, accepted=False, server="b", error=error)
            assert endpoints.decide(store, endpoint, theirs) == replace(theirs, instead=1)
        return found

    monkeypatch.setattr(endpoints, "read_verdict", as_other_rejects)
    a.step()
    monkeypatch.undo()
    b.step()
    assert (a.status.serving, b.status.serving) == (1, 1)
    assert a.status.reason == b.status.reason == "too slow at b."


def test_a_store_that_fails_says_nothing_about_the_version(bench: Bench) -> None:
    folder = Path(bench.store.root.removeprefix("file://")) / "records" / "endpoints" / ENDPOINT / "verdicts"
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where a folder should be")
    bench.ask_good()
    server = bench.server()
    with pytest.raises(endpoints.LeptonError, match="verdicts"):
        server.step()
    assert server.status.state == "loading"
    folder.unlink()
    server._set_status(reason="the store failed.")  # as run does
    server.step()
    assert (server.status.state, server.status.reason, server.status.errors) == ("serving", "", {})


def test_a_server_that_starts_goes_past_a_row_of_rejected_versions(bench: Bench) -> None:
    bench.ask_good()
    bench.server().step()
    for _ in range(3):
        bench.ask_other(max_latency_ms=1e-6)
        bench.server("b").step()
    again = bench.server()
    again.step()
    assert (again.status.state, again.status.serving) == ("rejected", 1)
    assert set(again.status.errors) == {"4"}  # the others were not even looked at


def test_a_server_asks_the_store_once_a_look(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read, asked = Store.read, []

    def counted(self: Store, key: str) -> bytes | None:
        if key != "identity":  # which is read in a folder alone, where that costs little
            asked.append(key)
        return read(self, key)

    server = bench.server()
    server.step()
    monkeypatch.setattr(Store, "read", counted)
    monkeypatch.setattr(Store, "children", None)  # nothing is listed any more
    server.step()
    assert [key.rpartition("/")[2] for key in asked] == ["000001.json"]
    monkeypatch.undo()
    bench.ask_good()
    server.step()
    monkeypatch.setattr(Store, "read", counted)
    monkeypatch.setattr(Store, "children", None)
    asked.clear()
    server.step()
    assert [key.rpartition("/")[2] for key in asked] == ["000002.json"]


def test_a_regression_is_compared_on_its_own_scale(bench: Bench, run_at: RunInfo) -> None:
    diabetes = bench.shelf.diabetes
    largest = abs(diabetes.package.predict(diabetes.rows.head(5))).max()
    assert largest > 100
    package = bench.put(diabetes)

    def answers(share: float) -> str:
        content = json.loads(bench.store.load(bench.answers(diabetes, off=share * largest))[""])
        content["answers"] = [[value] for value in content["answers"]]
        return bench.store.put("golden.json", canonical_json(content)).uri

    bench.ask(package, answers(0.5e-3), max_difference=1e-3)
    bench.ask(package, answers(2e-3), max_difference=1e-3)
    server = bench.server()
    server.step()
    assert (server.status.state, server.status.serving) == ("rejected", 1)


@pytest.mark.parametrize(
    ("answers", "scale"), [([1e-5, -3e-5], 3e-5), ([0.0, None], 1.0), ([250.0, 1.0], 250.0)]
)
def test_a_difference_counts_in_shares_of_the_largest_answer(
    answers: list[float | None], scale: float
) -> None:
    assert scale_of([[a] for a in answers]) == scale


def _path(bench: Bench, *parts: str) -> Path:
    return Path(bench.store.root.removeprefix("file://"), "records", "endpoints", ENDPOINT, *parts)


def two_versions(bench: Bench) -> Bench:
    """Both accepted."""
    bench.ask_good()
    bench.server().step()
    bench.ask_other()
    bench.server().step()
    return bench


def no_longer_json(path: Path) -> None:
    path.write_bytes(b"{")


def a_folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_types(path: Path) -> None:
    path.write_bytes(b'{"sequence": "x", "accepted": 7}')


@pytest.mark.parametrize("damage", [no_longer_json, a_folder_in_its_place, other_types])
@pytest.mark.parametrize("record", ["desired/000/000002.json", "verdicts/000002.json"])
def test_a_damaged_newest_record_takes_nothing_out_of_service(bench: Bench, damage: Any, record: str) -> None:
    two_versions(bench)
    damage(_path(bench, *record.split("/")))
    server = bench.server()
    try:
        server.step()
    except endpoints.LeptonError as error:  # as run() goes on
        pytest.fail(str(error))
    server.step()
    assert server.status.serving == 1
    assert server.status.problems
    assert all(len(problem) < 1000 for problem in server.status.problems)


def of_another_version(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"@sha256:", b"@sha256:0"))


@pytest.mark.parametrize("damage", [no_longer_json, a_folder_in_its_place, other_types, of_another_version])
def test_a_record_that_is_damaged_while_its_version_is_in_service_moves_nothing(
    bench: Bench, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Here()
    bench.ask_good()
    bench.server().step()
    asked = bench.ask_other()
    server = bench.server(fleet=fleet)
    server.step()
    path = _path(bench, "desired", "000", "000002.json")
    whole = path.read_bytes()
    damage(path)
    for _ in range(3):
        server._look_again = 1e-9
        server.step()
        server.step()
    assert (server.status.serving, server.status.version) == (2, "v2")
    assert server.status.problems
    said = [record.getMessage() for record in caplog.records if "000002" in record.getMessage()]
    assert len(said) == len(set(said))
    if path.is_dir():
        path.rmdir()
    path.write_bytes(whole)
    server._look_again = 1e-9
    server.step()
    assert (server.status.state, server.status.serving, server.status.problems) == ("serving", 2, [])
    assert fleet.served[-1].desired == asked
    assert len(fleet.served) == 1
    bench.ask_good()
    server.step()
    assert server.status.serving == 3


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("instead", ["empty", "another", "gone"])
def test_a_store_that_is_unmounted_while_it_is_served_stops_nothing_and_gets_nothing(
    bench: Bench, instead: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(bench.store.root.removeprefix("file://"))
    bench.ask_good()
    server = bench.server()
    server.step()
    server.report()
    root.rename(tmp_path / "away")
    if instead != "gone":
        root.mkdir()
    if instead == "another":
        identity_of(Store(str(root)))
    before = files_of(root)
    for _ in range(3):
        server._look_again = 1e-9
        with pytest.raises(StoreError, match=r"holds (no store any more|another store than before): mount"):
            server.step()
        with pytest.raises(StoreError, match="mount the one that was there again"):
            server.report()
    assert files_of(root) == before
    assert (server.status.serving, server.status.version) == (1, "v1")
    assert server.beat_failures == 3
    if root.exists():
        shutil.rmtree(root)
    (tmp_path / "away").rename(root)
    server.step()
    server.report()
    assert (server.status.state, server.status.serving) == ("serving", 1)


def test_a_verdict_is_not_written_to_another_store(bench: Bench, tmp_path: Path) -> None:
    root = Path(bench.store.root.removeprefix("file://"))

    class Slow(Here):
        def try_out(self, *given: Any) -> dict[str, float]:
            numbers = super().try_out(*given)
            root.rename(tmp_path / "away")
            root.mkdir()
            return numbers

    bench.ask_good()
    with pytest.raises(StoreError, match="no store any more"):
        bench.server(fleet=Slow()).step()
    assert files_of(root) == []


def test_a_store_whose_identity_is_damaged_is_served(bench: Bench) -> None:
    bench.ask_good()
    file = Path(bench.store.root.removeprefix("file://")) / "identity"
    file.write_bytes(b"?")
    server = bench.server()
    server.step()
    server.report()
    assert (server.status.state, server.status.serving) == ("serving", 1)
    file.unlink()  # as the sentence about it says
    server.step()
    server.report()


def test_an_empty_folder_on_which_a_store_is_mounted_later_serves_it(bench: Bench, tmp_path: Path) -> None:
    bench.ask_good()
    identity_of(bench.store)
    root = Path(bench.store.root.removeprefix("file://"))
    root.rename(tmp_path / "away")
    root.mkdir()
    server = bench.server()
    server.step()
    assert server.status.state == "idle"
    shutil.rmtree(root)
    (tmp_path / "away").rename(root)
    server.step()
    assert (server.status.state, server.status.serving) == ("serving", 1)


def test_a_package_that_cannot_be_read_takes_nothing_out_of_service(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_versions(bench)
    load = Store.load

    def failing(self: Store, uri: str) -> dict[str, bytes]:
        if uri == bench.other:
            raise StoreError("reading model.onnx: Input/output error.")
        return load(self, uri)

    monkeypatch.setattr(Store, "load", failing)
    server = bench.server()
    server.step()
    assert (server.status.serving, server.status.version) == (1, "v1")
    assert "Input/output error" in server.status.reason
    monkeypatch.undo()  # the disk is mended
    monkeypatch.setattr(reconcile, "_AGAIN_S", 0.0)
    server._look_again = 1e-9
    server.step()
    assert (server.status.state, server.status.serving, server.status.problems) == ("serving", 2, [])


def test_a_package_whose_file_is_gone_is_served_again_when_it_is_back(bench: Bench) -> None:
    two_versions(bench)
    model = Path(split_pin(bench.other)[0].removeprefix("file://")) / "model.onnx"
    model.rename(model.with_suffix(".away"))
    server = bench.server()
    server.step()
    assert server.status.serving == 1
    model.with_suffix(".away").rename(model)
    server._look_again = 1e-9
    server.step()
    assert (server.status.state, server.status.serving, server.status.errors) == ("serving", 2, {})


def test_a_version_that_fails_here_alone_is_tried_ever_more_rarely_and_logged_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    two_versions(bench)
    caplog.set_level("INFO")
    caplog.clear()
    server = bench.server()
    model = Path(split_pin(bench.other)[0].removeprefix("file://")) / "model.onnx"
    model.rename(model.with_suffix(".away"))
    tried, loaded, load = [], [], Store.load

    def counted(store: Store, uri: str) -> dict[str, bytes]:
        loaded.append(uri)
        return load(store, uri)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "load", counted)
        for look in range(80):
            loaded.clear()
            server._look_again = 1e-9
            server.step()
            server.step()  # one between two looks
            tried.extend([look] * loaded.count(bench.other))
            assert (server.status.state, server.status.serving) == ("rejected", 1)
            assert "does not exist" in server.status.reason or "altered" in server.status.reason
            assert server.status.problems == [
                f"version v2 was accepted and fails here: {server.status.reason}"
            ]
    assert tried == [0, 1, 3, 7, 15, 31, 51, 71]
    said = [r.getMessage() for r in caplog.records if "v2" in r.getMessage()]
    assert len(said) == 2  # that it is loaded, and why it is not
    model.with_suffix(".away").rename(model)
    for _ in range(20):
        server._look_again = 1e-9
        server.step()
    assert (server.status.state, server.status.serving, server.status.errors) == ("serving", 2, {})


def test_a_verdict_that_rejects_is_logged_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.ask_good()
    server = bench.server()
    server.step()
    bench.ask_other(max_latency_ms=1e-6)
    for _ in range(3):
        server.step()
        server._look_again = 1e-9
    assert len([r for r in caplog.records if "is rejected" in r.getMessage()]) == 1


def test_a_version_that_fails_here_is_tried_again_though_nothing_is_in_service(bench: Bench) -> None:
    two_versions(bench)
    for uri in (bench.good, bench.other):
        bench.alter(uri, "model.onnx")
    server = bench.server()
    server.step()
    assert (server.status.state, server.status.serving) == ("rejected", None)
    assert set(server.status.errors) == {"1", "2"}
    for uri in (bench.good, bench.other):
        bench.alter(uri, "model.onnx")  # as it was
    server._look_again = 1e-9
    server.step()
    assert (server.status.state, server.status.serving) == ("serving", 2)


def test_a_log_that_was_restored_from_a_backup_is_followed_again(bench: Bench, tmp_path: Path) -> None:
    fleet = Here()
    bench.ask_good()
    server = bench.server(fleet=fleet)
    server.step()
    backup = tmp_path / "backup"
    shutil.copytree(_path(bench), backup)
    bench.ask_other()
    server.step()
    assert server.status.serving == 2
    shutil.rmtree(_path(bench))
    shutil.copytree(backup, _path(bench))
    server._look_again = 1e-9
    server.step()
    assert (server.status.state, server.status.version) == ("serving", "v1")
    bench.ask_other(version="another 2")
    server.step()
    assert (server.status.state, server.status.version) == ("serving", "another 2")
    assert [model.desired.version for model in fleet.served] == ["v1", "v2", "v1", "another 2"]


def test_a_store_that_is_mounted_elsewhere_serves(bench: Bench, tmp_path: Path) -> None:
    bench.ask_good()
    moved = tmp_path / "elsewhere"
    Path(bench.store.root.removeprefix("file://")).rename(moved)
    server = Reconciler(Store(str(moved)), ENDPOINT, Status(server="a", url=""), Here(), 0.05)
    server.step()
    assert (server.status.state, server.status.serving) == ("serving", 1)


def test_a_damaged_report_of_another_server_stops_nobody(bench: Bench) -> None:
    bench.server("b").report()
    for name, content in (("c", b"{"), ("d", b'{"server": "d", "url": "", "beat": 7}'), ("e", b"[]")):
        (_path(bench, "status") / f"{name}.json").write_bytes(content)
    assert [status.server for status in endpoints.read_statuses(bench.store, ENDPOINT)] == ["b"]
    endpoints.forget_the_dead(bench.store, ENDPOINT)
    server = bench.server()
    server.recover()


@pytest.mark.parametrize("damage", [no_longer_json, a_folder_in_its_place, Path.unlink])
def test_a_server_goes_past_a_record_that_it_cannot_read_while_it_serves(bench: Bench, damage: Any) -> None:
    bench.ask_good()
    server = bench.server()
    server.step()
    bench.ask_good()
    bench.ask_other()
    damage(_path(bench, "desired", "000", "000002.json"))
    server.step()
    server._look_again = 1e-9
    server.step()
    assert (server.status.state, server.status.serving, server.status.version) == ("serving", 3, "v3")


def test_a_server_whose_clock_is_an_hour_ahead_does_not_live_an_hour_longer() -> None:
    ahead = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert not Status(server="a", url="", beat=ahead).alive
    assert Status(server="a", url="", beat=endpoints.precise_now()).alive


def test_heartbeats_that_fail_are_counted(bench: Bench) -> None:
    server = bench.server()
    server.report()
    shutil.rmtree(_path(bench, "status"))
    _path(bench, "status").write_text("a file where a folder should be")
    for _ in range(2):
        with pytest.raises(endpoints.LeptonError):
            server.report()
    assert server.beat_failures == 2
    assert time.time() - server.beaten < 60
