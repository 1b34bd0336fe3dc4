from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.datasets import load_breast_cancer

from lepton_airflow.sdk import closure as closures
from lepton_airflow.sdk.closure import closure, modules_named, package_digest
from lepton_airflow.sdk.code import code_digest
from lepton_airflow.stages import RunInfo, all_stages
from lepton_airflow.stages.prepare_data import PrepareData
from lepton_airflow.stages.train_model import TrainModel
from lepton_airflow.stages.tune_model import TuneModel

PACKAGE = Path(closures.__file__).parents[1]
FILES = sorted(PACKAGE.rglob("*.py"))
OWN = [stage for stage in all_stages().values() if stage.__module__.startswith("lepton_airflow.stages.")]


def names(modules: tuple[Path, ...]) -> set[str]:
    return {file.relative_to(PACKAGE).as_posix() for file in modules}


def is_module(name: str) -> bool:
    place = PACKAGE.joinpath(*name.split(".")[1:])
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def parsed(source: str) -> set[str]:
    """What :func:`modules_named` should find, by Python's own parser."""
    found = set()
    tree = ast.parse(source)
    types_only = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    skipped = {inner for node in types_only for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "lepton_airflow"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lepton_airflow":
            assert node.module is not None
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {dotted if is_module(dotted) else node.module for dotted in inner.values()}
    return found - {"lepton_airflow"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_the_text_names_what_python_imports(file: Path) -> None:
    source = file.read_text()
    assert modules_named(source) == parsed(source)
    assert not [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.level], (
        "a relative import is not seen"
    )


@pytest.mark.parametrize("stage", OWN, ids=lambda stage: stage.__name__)
def test_a_stage_is_made_of_the_contract_and_of_no_other_stage(stage: type) -> None:
    found = names(closure(stage.__module__))
    own = stage.__module__.removeprefix("lepton_airflow.").replace(".", "/") + ".py"
    # What turns a parameter's text into its value, and what a stage knows of its run, decide what it computes.
    assert {own, "sdk/stage.py", "sdk/values.py", "store/files.py"} <= found
    assert {file for file in found if file.startswith("stages/")} == {own}
    assert not {file.partition("/")[0] for file in found} & {
        "runners",
        "pods",
        "triggers",
        "airflow",
        "execution",
    }
    assert not found & {"operators.py", "settings.py", "__main__.py", "__init__.py"}


def test_what_draws_a_report_is_no_part_of_what_ingests() -> None:
    evaluate, ingest = (
        closure("lepton_airflow.stages.evaluate_model"),
        closure("lepton_airflow.stages.ingest_data"),
    )
    assert "evaluation/report.py" in names(evaluate)
    assert not {file for file in names(ingest) if file.startswith(("evaluation/", "training/", "packaging/"))}


def test_a_model_s_file_changes_the_digest_of_that_model_alone() -> None:
    mlp, boosting = (
        closure("lepton_airflow.models.mlp"),
        closure("lepton_airflow.models.hist_gradient_boosting"),
    )
    assert "models/mlp.py" in names(mlp) - names(boosting)
    assert "training/torch_loop.py" in names(mlp)
    assert package_digest("lepton_airflow.models.mlp") != package_digest(
        "lepton_airflow.models.hist_gradient_boosting"
    )


RUN = """
import json, sys, tempfile
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.evaluate_model import EvaluateModel
from lepton_airflow.stages.prepare_data import PrepareData
from lepton_airflow.stages.train_model import TrainModel

run = RunInfo.local(tempfile.mkdtemp())
data = PrepareData(snapshot=sys.argv[1], target="target", split="random").run(run).artifacts
model = TrainModel(dataset=data["train"].uri, trainer="hist_gradient_boosting").run(run).artifacts["model"]
EvaluateModel(model=model.uri, dataset=data["test"].uri).run(run)
print(json.dumps([m for m in sys.modules if m.startswith("lepton_airflow.")]))
"""


def test_nothing_is_loaded_at_run_time_that_the_text_does_not_name(tmp_path: Path) -> None:
    load_breast_cancer(as_frame=True).frame.to_parquet(tmp_path / "tumours.parquet")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "tumours.parquet")],
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = {
        file.relative_to(PACKAGE).as_posix()
        for name in json.loads(done.stdout.splitlines()[-1])
        if (file := PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")).is_file()
    }
    modules = [f"lepton_airflow.stages.{name}" for name in ("evaluate_model", "prepare_data", "train_model")]
    named = names(closure(*modules, "lepton_airflow.models.hist_gradient_boosting"))
    # What only a folder's face re-exports is loaded with the folder; nobody here has taken a name from it.
    faces = {f"lepton_airflow.{file.partition('/')[0]}" for file in named if "/" in file}
    assert loaded - named <= names(closure(*faces))
    assert len(named) > 20


def test_the_model_that_is_named_is_part_of_the_key_of_what_trains_it(tmp_path: Path) -> None:
    run = RunInfo.local(tmp_path)
    data = run.save("train.parquet", b"").uri
    for stage in (TrainModel, TuneModel):
        digests = {
            name: (stage(dataset=data, trainer=name).input_digests(run) or {})["trainer[0]"]
            for name in ("mlp", "linear_regression")
        }
        assert digests["mlp"] == package_digest("lepton_airflow.models.mlp")
        assert digests["linear_regression"] != digests["mlp"]


@pytest.mark.parametrize(
    "text",
    [
        "SELECT t, y, " + ", ".join(f"coalesce(x{n}, 0) AS x{n}" for n in range(40)) + " FROM snapshot",
        "SELECT y, 1./ x AS inverse FROM snapshot",
        "SELECT y, 2./",
        "x" * 300,
    ],
    ids=["long", "absolute", "no name", "long name"],
)
def test_sql_is_no_name_of_a_file(tmp_path: Path, text: str) -> None:
    run = RunInfo.local(tmp_path)
    data = run.save("snapshot.parquet", b"").uri
    assert list(PrepareData(snapshot=data, features=text).input_digests(run) or {}) == ["snapshot[0]"]


def test_user_code_counts_with_what_it_takes_of_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "standing.py").write_text("from lepton_airflow.models import fit_torch\n\ndef fit(): ...\n")
    (tmp_path / "alone.py").write_text("def fit(): ...\n")
    before = code_digest("standing:fit"), code_digest("alone:fit")
    # As if one of the files behind fit_torch had changed.
    monkeypatch.setattr(
        "lepton_airflow.sdk.code.package_digest", lambda *modules: "changed" if modules else package_digest()
    )
    after = code_digest("standing:fit"), code_digest("alone:fit")
    assert after[0] != before[0]
    assert after[1] == before[1]
