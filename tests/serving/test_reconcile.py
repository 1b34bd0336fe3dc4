"""What lets a version in and what keeps it out, and what a server does that starts again. No process, no HTTP."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from lepton_airflow.contract import canonical_json, split_pin
from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, DesiredLog, LoadVerdict, Status
from lepton_airflow.serving import reconcile
from lepton_airflow.serving.model import scale_of
from lepton_airflow.serving.reconcile import Reconciler
from lepton_airflow.store import Store

if TYPE_CHECKING:
    from lepton_airflow.serving.model import ServedModel
    from lepton_airflow.stages import RunInfo

ENDPOINT = "wine"


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

    def server(self, name: str = "a") -> Reconciler:
        served: list[ServedModel] = []
        return Reconciler(
            self.store, ENDPOINT, Status(server=name, url=f"http://{name}"), served.append, 0.05
        )

    def alter(self, uri: str, name: str = "") -> None:
        path = Path(split_pin(uri)[0].removeprefix("file://")) / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def verdict(self, sequence: int) -> LoadVerdict:
        verdict = endpoints.read_verdict(self.store, ENDPOINT, sequence)
        assert verdict is not None
        return verdict


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
    assert bench.verdict(2).error == status.errors["2"]

    again = bench.server()  # it does not try what was rejected, whatever became of it
    again.step()
    assert (again.status.state, again.status.serving) == ("rejected", 1)


def test_what_is_in_service_does_not_depend_on_the_files_any_more(bench: Bench) -> None:
    served: list[ServedModel] = []
    bench.ask_good()
    server = Reconciler(bench.store, ENDPOINT, Status(server="a", url=""), served.append, 0.05)
    server.step()
    bench.alter(bench.good, "model.onnx")
    inputs = [
        {
            "name": f.name,
            "datatype": "BYTES" if f.kind == "category" else "FP32",
            "shape": [1],
            "data": [None],
        }
        for f in served[0].card.features
    ]
    content, rows = served[0].answer(json.dumps({"inputs": inputs}).encode(), 1)
    assert rows == 1
    assert json.loads(content)["model_version"] == "v1"


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


def test_a_version_that_kills_the_server_is_tried_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """Like a signal: nothing of this process comes after it."""

    def killed(*_: Any) -> None:
        raise Killed

    bench.ask_good()
    bench.server().step()
    bench.ask_other()
    monkeypatch.setattr(reconcile, "measure", killed)
    for _ in range(2):  # the second one as a new server would: it is killed too
        with pytest.raises(Killed):
            bench.server("elsewhere").step()
    monkeypatch.undo()
    again = bench.server("elsewhere")
    again.recover()
    again.step()
    assert (again.status.state, again.status.serving) == ("rejected", 1)
    assert "was killed while it loaded this version" in again.status.reason
    again.recover()
    assert bench.verdict(1).accepted


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
