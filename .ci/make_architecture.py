"""Write the two lists of docs/architecture.md that are made from the sources: the layers, and every file.

    .venv/bin/python .ci/make_architecture.py

Run it after a file came, went or got another docstring; tests/test_repository.py fails while the page is not this one.
"""

# ruff: noqa: INP001 - a script, no package
from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lepton_airflow"
PAGE = ROOT / "docs" / "architecture.md"


def page() -> str:
    """The whole page, with both lists as the sources have them now."""
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in (("layers", _layers()), ("files", _files())):
        begin, end = f"<!-- {name}: made by .ci/make_architecture.py -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = "\n".join([head + begin, *lines, end + tail])
    return text


def _layers() -> Iterator[str]:
    """The layers that import-linter checks, from the top down, and what each folder is for."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    (layers,) = [c["layers"] for c in tools["importlinter"]["contracts"] if c["type"] == "layers"]
    yield "```text"
    for index, layer in enumerate(layers):
        if index:
            yield "─" * 16
        for name in layer.split(" | "):
            folder = PACKAGE / name
            file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            shown = f"{name}/" if folder.is_dir() else file.name
            about = re.split(r"(?<=\?) |[:.](?= |$)", _about(file).replace("`", ""), maxsplit=1)[0]
            yield f"{shown:<17}{about}"
    yield "```"


def _files() -> Iterator[str]:
    """Every file, folder by folder; a folder's own docstring comes first."""
    for folder in sorted({file.parent for file in PACKAGE.rglob("*.py")}):
        yield f"\n**`{folder.relative_to(ROOT).as_posix()}/`** {_about(folder / '__init__.py')}\n"
        for file in sorted(folder.glob("*.py")):
            if file.name != "__init__.py":
                yield f"- [`{file.name}`](../{file.relative_to(ROOT).as_posix()}) {_about(file)}"


def _about(file: Path) -> str:
    """The first paragraph of a file's docstring, as Markdown."""
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", paragraph).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
