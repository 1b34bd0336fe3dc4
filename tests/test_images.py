"""What the images are made of agrees with what the package says, and the script that builds them does what it is asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lepton_airflow.execution import environments

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lines(extras: str) -> set[Requirement]:
    """What an image with these extras installs."""
    done = subprocess.run(
        [sys.executable, ROOT / "images" / "requirements.py", extras],
        check=True,
        input=(ROOT / "pyproject.toml").read_bytes(),
        stdout=subprocess.PIPE,
    )
    return {Requirement(line) for line in done.stdout.decode().splitlines()}


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_an_image_gets_what_an_environment_gets(extra: str) -> None:
    """Both leave Airflow out: one reads pyproject.toml, the other the metadata of what is installed."""
    assert lines(extra) == {Requirement(line) for line in environments.extra_lines([extra])}


def test_the_validate_image_holds_no_torch_and_no_image_holds_airflow() -> None:
    assert not {r.name for r in lines("validate")} & {"torch", "onnxscript", "scikit-learn"}
    assert not [r.name for r in lines("all") if "airflow" in r.name]


def test_an_unknown_extra_is_named() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "images" / "requirements.py", "trian"],
        check=False,
        input=(ROOT / "pyproject.toml").read_bytes(),
        capture_output=True,
    )
    assert done.returncode == 1
    assert done.stderr.decode().startswith("pyproject.toml has no extra 'trian'. Known: all, ")


def build(**env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "images" / "build"],
        check=False,
        env={"PATH": os.environ["PATH"]} | env,
        capture_output=True,
        text=True,
    )


def test_one_image_for_each_word_of_the_extras() -> None:
    done = build(
        BUILD="echo",
        EXTRAS="validate train,torch",
        IMAGE="r.example/stage",
        TORCH_INDEX="https://torch.example/cu130",
    )
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("-f")]
    assert len(commands) == 2
    assert all(
        "--build-arg TORCH_INDEX=https://torch.example/cu130" in command and "BASE=" not in command
        for command in commands
    )
    assert "EXTRAS=train,torch " in commands[1]
    assert done.stdout.splitlines()[1::2] == ["r.example/stage:validate", "r.example/stage:train-torch"]


def test_without_docker_and_podman_one_sentence(tmp_path: Path) -> None:
    for program in ("bash", "dirname"):
        (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    done = build(PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("images: neither a docker that answers nor podman was found: install one")


@pytest.mark.parametrize("file", sorted((ROOT / "images").glob("*.Dockerfile")), ids=lambda f: f.stem)
def test_what_is_copied_is_there_and_not_ignored(file: Path) -> None:
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", file.read_text(), re.MULTILINE)
    names = {name for copy in copies for name in copy.split()}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert names
    assert names <= allowed
    assert all((ROOT / name).exists() for name in names)
