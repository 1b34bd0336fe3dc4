from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from lepton_airflow import stages
from lepton_airflow.contract import Artifact, Window
from lepton_airflow.errors import BadConfiguration, BadInput, Preempted
from lepton_airflow.sdk.code import code_digest, load_code
from lepton_airflow.sdk.description import describe, param_texts
from lepton_airflow.sdk.fingerprint import cache_key
from lepton_airflow.sdk.stage import choices
from lepton_airflow.sdk.values import typed
from lepton_airflow.stages import (
    ArtifactUri,
    CodeRef,
    ConnectionId,
    Result,
    RunInfo,
    Stage,
    all_stages,
    build,
    get_stage,
    stage_name,
)

EVERY = pytest.mark.parametrize("stage", all_stages().values(), ids=all_stages())


@dataclass(kw_only=True)
class Sample(Stage):
    """Do nothing.

    :param count: how many,
        over two lines [rows].
    :param data: an input.
    """

    outputs: ClassVar[tuple[str, ...]] = ("x",)

    count: int
    share: float = 0.5
    flag: bool = False
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    table: dict[str, Any] = field(default_factory=dict)
    items: list[int] | None = None
    data: ArtifactUri | None = None
    more: dict[str, ArtifactUri] = field(default_factory=dict)
    code: CodeRef | None = None
    database: ConnectionId | None = None
    others: list[ConnectionId] = field(default_factory=list)

    def run(self, run: RunInfo) -> Result:
        return Result(summary="nothing.")


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "all_stages", lambda: {"Sample": Sample})


# -- every stage there is ------------------------------------------------------------------------------------------------


@EVERY
def test_every_field_is_documented(stage: type[Stage]) -> None:
    undocumented = [p.name for p in describe(stage) if not p.text]
    assert undocumented == [], f"{stage.__name__}: write a :param line for each"
    invented = set(param_texts(stage.__doc__ or "")) - {f.name for f in fields(stage)}
    assert invented == set(), f"{stage.__name__}: documents parameters that it does not have"


@EVERY
def test_every_stage_says_what_it_does_and_what_it_gives(stage: type[Stage]) -> None:
    first = (stage.__doc__ or "").splitlines()[0]
    assert first.endswith(".")
    assert first[0].isupper()
    assert stage.outputs
    assert stage.extra, "the extra of pyproject.toml that brings its engines"
    assert stage.engines, "a new version of an engine must not hit what an old one computed"


@EVERY
def test_seconds_and_the_like_stand_in_the_names(stage: type[Stage]) -> None:
    for parameter in describe(stage):
        if parameter.unit in ("seconds", "s"):
            assert parameter.name.endswith("_s")
        if parameter.unit == "MiB":
            assert parameter.name.endswith("_mb")


@EVERY
def test_every_default_is_a_value_of_its_type(stage: type[Stage]) -> None:
    hints = typing.get_type_hints(stage)
    for f in fields(stage):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if default is not MISSING:
            assert typed(default, hints[f.name], f.name) == default


def test_every_extra_exists() -> None:
    known = set(importlib.metadata.metadata("lepton-airflow").get_all("Provides-Extra") or ())
    assert {extra for stage in all_stages().values() for extra in stage.extra.split(",")} <= known


# -- registry ------------------------------------------------------------------------------------------------------------


def test_names_lead_to_stages_and_back() -> None:
    for name, stage in all_stages().items():
        assert get_stage(name) is stage
        assert stage_name(stage) == name
    reference = "lepton_airflow.testing.probe_stages:Copy"
    assert stage_name(get_stage(reference)) == reference


def test_an_unknown_name_gets_did_you_mean() -> None:
    with pytest.raises(BadConfiguration, match="no stage 'TrainModle'; did you mean 'TrainModel'"):
        get_stage("TrainModle")


def test_entry_points_are_found_and_a_broken_one_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [
        importlib.metadata.EntryPoint(
            "Copied", "lepton_airflow.testing.probe_stages:Copy", "lepton_airflow.stages"
        ),
        importlib.metadata.EntryPoint("Broken", "no_such_package:Stage", "lepton_airflow.stages"),
    ]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: entries if group == "lepton_airflow.stages" else []
    )
    all_stages.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            found = all_stages()
    finally:
        all_stages.cache_clear()
    assert "Copied" in found
    assert "Broken" not in found
    assert "stage Broken of no_such_package:Stage is left out" in caplog.text


# -- parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("sample")
class TestBuild:
    @pytest.mark.parametrize(
        ("name", "given", "wanted"),
        [
            ("count", 3, 3),
            ("count", " 3 ", 3),
            ("share", 1, 1.0),
            ("share", "0.25", 0.25),
            ("flag", "True", True),
            ("flag", "false", False),
            ("name", "None", None),
            ("name", None, None),
            ("name", "", ""),
            ("kind", "b", "b"),
            ("table", "{'a': None, 'b': [1]}", {"a": None, "b": [1]}),
            ("table", '{"a": null, "b": true}', {"a": None, "b": True}),
            ("items", "[1, 2]", [1, 2]),
            ("items", "", None),
        ],
    )
    def test_a_value_or_the_text_that_spells_it(self, name: str, given: Any, wanted: Any) -> None:
        value = getattr(build("Sample", {"count": 1} | {name: given}), name)
        assert value == wanted
        assert type(value) is type(wanted)

    @pytest.mark.parametrize(
        ("parameters", "sentence"),
        [
            ({}, "Sample needs count: python -m lepton_airflow describe Sample"),
            ({"count": 1, "shares": 1}, "Sample has no parameter 'shares'; did you mean 'share'"),
            ({"count": "many"}, "Sample: count='many' is not int"),
            ({"count": 1.5}, "Sample: count=1.5 is not int"),
            ({"count": True}, "Sample: count=True is not int"),
            ({"count": None}, "Sample: count=None is not int"),
            ({"count": 1, "flag": "maybe"}, "flag='maybe' is not bool"),
            ({"count": 1, "kind": "c"}, "kind='c' is not one of 'a', 'b'"),
            ({"count": 1, "table": "[1]"}, r"table='\[1\]' is not dict"),
            ({"count": 1, "table": "{[]: 1}"}, "is not dict"),
            ({"count": 1, "table": "__import__('os')"}, "is not dict"),
            ({"count": 1, "items": 5}, r"items=5 is not list or null\.$"),
            (
                {"count": 1, "items": "balance"},
                r"items='balance' is not list or null\. Write \['balance'\]\.$",
            ),
            ({"count": 1, "items": "[balance"}, r"items='\[balance' is not list or null\.$"),
        ],
    )
    def test_anything_else_is_a_sentence(self, parameters: dict[str, Any], sentence: str) -> None:
        with pytest.raises(BadConfiguration, match=sentence):
            build("Sample", parameters)

    def test_a_stage_made_in_python_is_checked_too(self) -> None:
        artifact = Artifact(uri="file:///a@sha256:0", sha256="0", bytes=1)
        with pytest.raises(BadConfiguration, match=r"Sample: database=Artifact\(.*is not .*Pass its \.uri\."):
            Sample(count=1, database=artifact)


def test_describe_joins_lines_and_finds_the_unit() -> None:
    count, share, *_ = describe(Sample)
    assert (count.name, count.type, count.default, count.unit) == ("count", "int", "required", "rows")
    assert count.text == "how many, over two lines [rows]."
    assert (share.default, share.text) == ("0.5", "")


def test_choices_and_connections() -> None:
    assert choices(Sample) == {"kind": ("a", "b")}
    assert Sample(count=1, database="db", others=["s3", "mail"]).connection_ids() == ["db", "s3", "mail"]
    assert Sample(count=1).connection_ids() == []


# -- what a result depends on --------------------------------------------------------------------------------------------


def test_digests_of_artifacts_and_code_at_any_depth(tmp_path: Path) -> None:
    run = RunInfo.local(tmp_path)
    uri = run.save("x.txt", "x").uri
    (tmp_path / "plain.txt").write_text("plain")
    stage = Sample(count=1, data=uri, more={"a": str(tmp_path / "plain.txt"), "b": uri}, code="json:dumps")
    digests = stage.input_digests(run)
    assert set(digests) == {"data[0]", "more[0]", "more[1]", "code[0]"}
    assert digests["data[0]"] == digests["more[1]"] == uri[-64:]
    with pytest.raises(BadInput, match="does not exist"):
        Sample(count=1, data=str(tmp_path / "none")).input_digests(run)


@pytest.mark.slow
def test_the_key_counts_window_and_parameters_and_swapped_inputs(tmp_path: Path) -> None:
    run = RunInfo.local(tmp_path)
    one, two = (run.save("x.txt", text).uri for text in "ab")
    window = Window("2013-01-01T00:00:00+00:00", "2013-02-01T00:00:00+00:00")
    keys = [
        cache_key(Sample(count=1, more={"a": one, "b": two}), run),
        cache_key(Sample(count=1, more={"a": two, "b": one}), run),
        cache_key(Sample(count=2, more={"a": one, "b": two}), run),
        cache_key(Sample(count=1, more={"a": one, "b": two}), RunInfo.local(tmp_path, window=window)),
    ]
    assert len(set(keys)) == 4
    assert keys[0] == cache_key(Sample(count=1, more={"b": two, "a": one}), run)


def test_code_is_digested_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "explosive.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "no_init").mkdir()
    (tmp_path / "no_init" / "part.py").write_text("import explosive\n")
    first = code_digest("no_init.part:f"), code_digest("explosive:f")
    (tmp_path / "explosive.py").write_text("raise SystemExit('changed')\n")
    second = code_digest("no_init.part:f"), code_digest("explosive:f")
    assert all(a != b for a, b in zip(first, second, strict=True))
    with pytest.raises(BadConfiguration, match="no module 'nowhere' where the stage runs"):
        code_digest("nowhere:f")


def test_loading_code_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_ab.py").write_text("import mine_a\n")
    (tmp_path / "mine_ok.py").write_text("def train(): ...\n")
    with pytest.raises(
        BadConfiguration, match="trainer='mine_zz:f': no module 'mine_zz' where the stage runs"
    ):
        load_code("mine_zz:f", "trainer")
    with pytest.raises(
        BadConfiguration, match="module 'mine_ok' has no function 'trian'; did you mean 'train'"
    ):
        load_code("mine_ok:trian", "trainer")
    with pytest.raises(ModuleNotFoundError, match="mine_a"):  # found, but what it imports is not there
        load_code("mine_ab:f", "trainer")
    (tmp_path / "mine_im.py").write_text("from textwrap import dedent\ndef train(): ...\n")
    (tmp_path / "mine_pk").mkdir()
    (tmp_path / "mine_pk" / "__init__.py").write_text("from mine_pk.model import fit\n")
    (tmp_path / "mine_pk" / "model.py").write_text("def fit(): ...\n")
    for module, known in (("mine_im", "train"), ("mine_pk", "fit")):
        with pytest.raises(BadConfiguration, match=rf"no function 'xyz'; known: {known}\.$"):
            load_code(f"{module}:xyz", "trainer")


# -- run -----------------------------------------------------------------------------------------------------------------


def test_a_connection_that_did_not_come_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        BadConfiguration, match="Connection 'db' did not reach the stage: create it in Airflow"
    ):
        RunInfo.local(tmp_path).connection("db")


def test_check_stop(tmp_path: Path) -> None:
    RunInfo.local(tmp_path).check_stop()
    with pytest.raises(Preempted, match="what is finished is kept"):
        RunInfo.local(tmp_path, should_stop=lambda: True).check_stop()


def test_a_stage_is_found_without_importing_the_others() -> None:
    code = (
        "import sys; from lepton_airflow.stages import get_stage; get_stage('TrainModel')\n"
        "print(sorted(m.rpartition('.')[2] for m in sys.modules if m.startswith('lepton_airflow.stages.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "['train_model']"
