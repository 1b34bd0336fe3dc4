from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lepton_airflow import stages
from lepton_airflow.contract import Receipt, Request, RunIdentity, Window, split_pin
from lepton_airflow.execution.run_stage import recall, run_stage
from lepton_airflow.sdk.fingerprint import cache_key
from lepton_airflow.stages import ArtifactUri, CodeRef, Result, RunInfo, Stage
from lepton_airflow.stages.prepare_data import PrepareData
from lepton_airflow.stages.validate_data import ValidateData
from lepton_airflow.store import Store

pytestmark = pytest.mark.slow


@dataclass(kw_only=True)
class Shout(Stage):
    """Store a text in capitals, by the user's function if there is one."""

    engines: ClassVar[tuple[str, ...]] = ("fsspec",)
    outputs: ClassVar[tuple[str, ...]] = ("loud", "calls")
    calls: ClassVar[int] = 0

    text: ArtifactUri
    mark: str = "!"
    by: CodeRef | None = None

    def run(self, run: RunInfo) -> Result:
        type(self).calls += 1
        text = run.fetch(self.text).read_text().upper() + self.mark
        return Result(
            summary=f"{text}.", artifacts={"loud": run.save("loud.txt", text)}, values={"calls": self.calls}
        )


@dataclass(kw_only=True)
class Announce(Shout):
    """As Shout, but it changes the world outside."""

    cacheable: ClassVar[bool] = False


@dataclass(kw_only=True)
class Listen(Shout):
    """As Shout, but of a source that has no digest."""

    def input_digests(self, run: RunInfo) -> None:
        return None


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {kind.__name__: kind for kind in (Shout, Announce, Listen)}
    monkeypatch.setattr(stages, "all_stages", lambda: known)
    for kind in known.values():
        kind.calls = 0


class Bench:
    """A store with one input, and requests that differ in one thing at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(str(folder / "store"))
        self.text = self.store.put("text.txt", "hello").uri

    def __call__(
        self, stage: str = "Shout", cache: str = "use", ttl_s: float | None = None, **changes: Any
    ) -> Receipt:
        window = changes.pop("window", None)
        run_id = changes.pop("run_id", "one")
        request = Request(
            stage=stage,
            parameters={"text": self.text} | changes,
            store=self.store.root,
            cache=cache,
            cache_ttl_s=ttl_s,
            window=window,
            identity=RunIdentity(run_id=run_id),
        )
        receipt = run_stage(request)
        assert receipt.status in ("done", "cached"), receipt.summary
        assert self.store.receipt(request.run_key) == receipt
        return receipt

    def blob(self, receipt: Receipt) -> Path:
        return Path(split_pin(receipt.artifacts["loud"].uri)[0].removeprefix("file://"))


@pytest.fixture
def run(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_hit_is_known_before_anything_is_started(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(text: str = run.text, cache: str = "use", stage: str = "Shout") -> Receipt | None:
        identity = RunIdentity(run_id="two")
        request = Request(stage, {"text": text}, run.store.root, identity, cache=cache)
        receipt = recall(request, {})
        assert receipt is None or run.store.receipt(request.run_key) == receipt
        return receipt

    assert asked() is None  # nothing was computed yet, and nothing is computed here
    assert Shout.calls == 0
    first = run()
    known = asked()
    assert known is not None
    assert (known.status, known.artifacts) == ("cached", first.artifacts)
    assert asked(text=split_pin(run.text)[0]) == known  # quickly read
    with monkeypatch.context() as less:  # as many bytes would have to be read twice on a miss
        less.setattr("lepton_airflow.execution.run_stage._QUICKLY_READ", 1)
        assert asked() == known
        assert asked(text=split_pin(run.text)[0]) is None
    assert asked(cache="refresh") is None
    assert asked(stage="Announce") is None
    assert asked(stage="Shuot") is None  # run_stage says it
    run.blob(first).write_text("altered")
    assert asked() is None


def test_an_equal_run_is_a_hit_with_the_same_outputs(run: Bench) -> None:
    first, again = run(), run(run_id="two")
    assert (first.status, again.status, Shout.calls) == ("done", "cached", 1)
    assert first.run_key != again.run_key
    assert replace(again, run_key=first.run_key, status="done") == first


@pytest.mark.parametrize(
    "change",
    [
        {"mark": "?"},
        {"window": Window("2013-01-01T00:00:00+00:00", "2013-02-01T00:00:00+00:00")},
        {"by": "json:dumps"},
    ],
)
def test_a_changed_parameter_or_window_is_a_miss(run: Bench, change: dict[str, Any]) -> None:
    run()
    assert run(**change).status == "done"
    assert run(**change).status == "cached"


def test_changed_input_is_a_miss_pinned_or_plain(run: Bench) -> None:
    run()
    assert run(text=run.store.put("text.txt", "other").uri).status == "done"
    plain = run.folder / "text.txt"
    plain.write_text("hello")
    assert run(text=str(plain)).status == "cached"
    plain.write_text("changed")
    assert run(text=str(plain)).values == {"calls": 3}


def test_the_same_content_elsewhere_is_a_hit(run: Bench) -> None:
    run()
    elsewhere = run.folder / "other place"
    shutil.copytree(run.folder / "store", elsewhere)
    assert run(text=run.text.replace("/store/", "/other place/")).status == "cached"


def test_changed_user_code_is_a_miss_also_in_a_module_it_imports(
    run: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = run.folder / "code"
    (code / "my_parts").mkdir(parents=True)
    monkeypatch.syspath_prepend(code)
    (code / "my_shout.py").write_text("import json\nfrom my_parts.deep import louder\n\ndef shout(): ...\n")
    (code / "my_parts" / "deep.py").write_text("louder = 1\n")
    (code / "unrelated.py").write_text("x = 1\n")
    assert run(by="my_shout:shout").status == "done"
    (code / "unrelated.py").write_text("x = 2\n")
    assert run(by="my_shout:shout").status == "cached"
    (code / "my_parts" / "deep.py").write_text("louder = 2\n")
    assert run(by="my_shout:shout").status == "done"
    with (code / "my_shout.py").open("a") as file:
        file.write("# changed\n")
    assert run(by="my_shout:shout").status == "done"


def test_a_changed_engine_is_a_miss(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + ".post1")
    assert run().status == "done"


def test_changed_stage_code_is_a_miss(tmp_path: Path) -> None:
    """A stage of one's own, in processes of their own, as its code is digested once a process."""
    code = tmp_path / "code"
    code.mkdir()
    source = (
        "from dataclasses import dataclass\nfrom lepton_airflow.stages import Result, Stage\n\n\n"
        "@dataclass(kw_only=True)\nclass Mine(Stage):\n    x: int = 1\n\n"
        "    def run(self, run):\n        return Result(summary='version {}.')\n"
    )
    request = tmp_path / "request.json"
    request.write_text(Request(stage="mine:Mine", parameters={}, store=str(tmp_path / "store")).to_json())
    # Python takes compiled code for that of a file of the same size and second; nobody edits twice in a second but this test.
    environment = os.environ | {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    seen = []
    for version in (1, 1, 2):
        (code / "mine.py").write_text(source.format(version))
        command = [
            sys.executable,
            "-m",
            "lepton_airflow",
            "run",
            str(request),
            str(tmp_path / "receipt.json"),
        ]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        receipt = json.loads((tmp_path / "receipt.json").read_text())
        seen.append((receipt["status"], receipt["summary"]))
    assert seen == [("done", "version 1."), ("cached", "version 1."), ("done", "version 2.")]


@pytest.mark.parametrize("damage", ["missing", "altered", "cut"])
def test_a_damaged_blob_is_a_miss_and_healed(run: Bench, damage: str) -> None:
    blob = run.blob(run())
    if damage == "missing":
        blob.unlink()
    else:
        blob.write_bytes(blob.read_bytes()[:-1] + (b"?" if damage == "altered" else b""))
    assert run().status == "done"
    assert blob.read_text() == "HELLO!"
    assert run().status == "cached"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"protocol": 99}', None])
def test_a_damaged_entry_is_a_miss(run: Bench, text: str | None) -> None:
    run()
    (key,) = run.store.keys("cache")
    entry = json.loads(run.store.read(key) or b"")
    run.store.write(
        key, (json.dumps(entry | {"created": "?", "cache_key": "other"}) if text is None else text).encode()
    )
    assert run().status == "done"
    assert run().status == "cached"


def test_an_entry_without_a_time_is_older_than_any_ttl(run: Bench) -> None:
    run()
    (key,) = run.store.keys("cache")
    run.store.write(key, json.dumps(json.loads(run.store.read(key) or b"") | {"created": ""}).encode())
    assert run(ttl_s=1e6).status == "done"


def test_entries_age(run: Bench) -> None:
    run()
    (key,) = run.store.keys("cache")
    entry = json.loads(run.store.read(key) or b"")
    old = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - 7200))
    run.store.write(key, json.dumps(entry | {"created": old}).encode())
    assert run(ttl_s=9000).status == "cached"
    assert run().status == "cached"
    assert run(ttl_s=3600).status == "done"
    assert run(ttl_s=3600).status == "cached"


def test_refresh_runs_again_and_records(run: Bench) -> None:
    run()
    assert run(cache="refresh").values == {"calls": 2}
    again = run()
    assert (again.status, again.values) == ("cached", {"calls": 2})


def test_off_neither_looks_nor_records(run: Bench) -> None:
    assert run(cache="off").status == "done"
    assert run.store.keys("cache") == []
    run()
    assert run(cache="off").values == {"calls": 3}
    assert run().values == {"calls": 2}


@pytest.mark.parametrize("stage", ["Announce", "Listen"])
def test_what_must_not_be_reused_never_is(run: Bench, stage: str) -> None:
    assert [run(stage).status, run(stage).status] == ["done", "done"]
    assert run.store.keys("cache") == []


def test_a_failure_is_not_cached(run: Bench, tmp_path: Path) -> None:
    receipt = run_stage(Request(stage="Shout", parameters={"text": "/no/such/file"}, store=run.store.root))
    assert receipt.status == "refused"
    assert run.store.keys("cache") == []


def test_the_window_counts_only_for_stages_that_depend_on_it(tmp_path: Path) -> None:
    data = tmp_path / "data.parquet"
    data.write_bytes(b"any bytes: only their digest counts here")
    may, june = (
        RunInfo.local(
            tmp_path,
            window=Window(f"2013-0{month}-01T00:00:00+00:00", f"2013-0{month + 1}-01T00:00:00+00:00"),
        )
        for month in (5, 6)
    )
    validate = ValidateData(
        dataset=str(data),
        suite={"name": "s", "expectations": [{"type": "expect_column_to_exist", "kwargs": {"column": "y"}}]},
    )
    prepare = PrepareData(snapshot=str(data), target="y")
    assert cache_key(validate, may) == cache_key(validate, june)
    assert cache_key(prepare, may) != cache_key(prepare, june)
