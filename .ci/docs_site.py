"""What mkdocs.yml cannot say: which files outside docs/ are pages, where links out of docs/ lead, how docstrings are read."""

# ruff: noqa: INP001 - loaded by path, no package
from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SOURCE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
# Files of the repository's root that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages to those of docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Lead each relative link to the page of the site that it means, or else to the file in the repository."""
    own = page.file.src_uri
    written_in = next((name for name, uri in PAGES.items() if uri == own), f"docs/{own}")

    def lead(link: re.Match[str]) -> str:
        target, sign, anchor = link[1].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(written_in), target))
        inside = PAGES.get(path, path.removeprefix("docs/"))
        if not target or not (ROOT / path).exists():
            return link[0]  # within the page; or nowhere, of which the strict build complains
        for uri in (inside, f"{inside}/README.md"):
            if files.get_file_from_path(uri):
                return f"]({posixpath.relpath(uri, posixpath.dirname(own) or '.')}{sign}{anchor})"
        return f"]({SOURCE}/blob/main/{path}{sign}{anchor})"

    return re.sub(r"\]\(([^):\s]+)\)", lead, markdown)


class Docstrings(griffe.Extension):
    """Reads reStructuredText in docstrings as the Markdown that it stands for: references, literal blocks, tables."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of each object that is loaded."""
        if obj.docstring is not None:
            text = _markdown(obj.docstring.value)
            # A module has no parameters: what it describes as such are those of what it makes.
            obj.docstring.value = (
                re.sub(r"^:param (\w+):", r"- `\1`:", text, flags=re.M) if obj.is_module else text
            )


def _markdown(text: str) -> str:
    text = re.sub(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"^( *)=+(?: +=+)+\n(.*?)\n *=+(?: +=+)+$", _table, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(
        r"^::\n", "", text, flags=re.MULTILINE
    )  # the indented lines after it are a literal block in both
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _table(table: re.Match[str]) -> str:
    """A list of a table's rows, each by what stands in its first column."""
    rows = re.sub(r"\n +(?=\S)", " ", table[2])  # a row's further lines begin with spaces
    return re.sub(r"^(\S+) +", r"- `\1`: ", rows, flags=re.MULTILINE)
