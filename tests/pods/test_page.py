from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import yaml

from lepton_airflow.pods import diagnosis
from lepton_airflow.runners import Pod

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "pods.md").read_text()


def _column(heading: str, column: int) -> list[str]:
    """The cells of one column of the first table after a heading."""
    _, _, rest = PAGE.partition(heading)
    table = rest.partition("\n\n|")[2].partition("\n\n")[0]
    return [row.strip("|").split("|")[column].strip() for row in table.splitlines()[2:]]


def test_every_setting_is_on_the_page() -> None:
    documented = {name for cell in _column("## Settings", 0) for name in re.findall(r"`(\w+)`", cell)}
    assert documented == {f.name for f in fields(Pod) if f.init}


def test_every_right_of_the_role_is_on_the_page_and_no_other() -> None:
    role = yaml.safe_load((DOCS / "kubernetes" / "role.yaml").read_text())
    granted = {
        (verb, resource) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]
    }
    cells = zip(_column("## Before the first run", 0), _column("## Before the first run", 1), strict=True)
    assert {(verb.strip("`"), resource.strip("`")) for verb, resource in cells} == granted


def test_every_reason_is_on_the_page() -> None:
    source = Path(diagnosis.__file__).read_text()
    used = set(re.findall(r'Diagnosis\(\s*"(\w+)"', source)) | set(diagnosis._HAPPENED)
    assert set(re.findall(r"`(\w+)`", " ".join(_column("## When it fails", 0)))) == used
