"""The documentation is one site: it builds without a warning, loads nothing from elsewhere, and describes every public name."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lepton_airflow import runners, testing
from lepton_airflow.stages import all_stages

ROOT = Path(__file__).parent.parent
# The attributes from which a browser loads something by itself; of <link>, what it loads depends on rel.
LOADED = {"src", "srcset", "poster", "data"}
LINKS_NOT_LOADED = {"canonical", "next", "prev"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(build, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loads(HTMLParser):
    """Collects what a page loads, and the names of its places."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors.add(found.get("id", ""))
        self.loads += [found[name] for name in LOADED & found.keys()]
        if tag == "link" and found.get("rel") not in LINKS_NOT_LOADED:
            self.loads.append(found["href"])


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loads = {load for page in site.rglob("*.html") for load in Loads(page).loads}
    assert any(load.endswith(".css") for load in loads)
    assert [load for load in loads if re.match(r"(\w+:)?//", load)] == []
    styles = [*site.rglob("*.css"), *site.rglob("*.html")]
    assert [
        page for page in styles if re.search(r"(url\(|@import)\s*[\"']?(\w+:)?//", page.read_text())
    ] == []


def test_no_page_asks_for_a_diagram_or_a_formula(site: Path) -> None:
    """The theme's script would load what draws them from a server."""
    assert [
        page for page in site.rglob("*.html") if re.search(r'class="(mermaid|arithmatex)', page.read_text())
    ] == []


def test_every_public_name_is_described(site: Path) -> None:
    described = set().union(*(Loads(page).anchors for page in (site / "reference").glob("*.html")))
    names = [
        *(f"{stage.__module__}.{name}" for name, stage in all_stages().items()),
        *(f"lepton_airflow.operators.{name}Operator" for name in all_stages()),
        *(getattr(runners, name).__module__ + f".{name}" for name in runners.__all__ if name[0].isupper()),
        *(getattr(testing, name).__module__ + f".{name}" for name in testing.__all__),
        *(f"lepton_airflow.stages.{name}" for name in ("Stage", "Result", "RunInfo", "ArtifactUri")),
        *(
            "lepton_airflow.operators.StageOperator",
            "lepton_airflow.models.fit_torch",
            "lepton_airflow.training.TrainerRun",
        ),
    ]
    assert [name for name in names if name not in described] == []


def test_every_page_is_reached_by_a_link(site: Path) -> None:
    """Of the decisions only the list is in the navigation; it names each."""
    listed = (site / "decisions" / "index.html").read_text()
    decisions = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    assert [page.stem for page in decisions if f'href="{page.stem}.html"' not in listed] == []
