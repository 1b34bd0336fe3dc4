"""Which files of this package a module is made of: itself, what it imports of the package, what that imports, and so on.

The imports are read from the text, so nothing is imported: 22 files take 12 ms, a tenth of what parsing them would. An import
inside a function counts like one at the top; one under ``if TYPE_CHECKING`` does not count. A package's ``__init__.py`` is
included only if a name is imported from it that is not a submodule.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cache
from os.path import isfile
from pathlib import Path

from lepton_airflow.contract import digest_of
from lepton_airflow.errors import BadConfiguration

PACKAGE = __name__.partition(".")[0]
_ROOT = Path(__file__).parent.parent
_TYPES_ONLY = re.compile(r"^if TYPE_CHECKING:\n(?:[ \t]+.*\n|\n)+", re.MULTILINE)
_FROM = re.compile(rf"^[ \t]*from ({PACKAGE}[\w.]*) import (\([^)]*\)|.*)", re.MULTILINE)
_PLAIN = re.compile(rf"^[ \t]*import ({PACKAGE}[\w.]*)", re.MULTILINE)


@cache
def closure(*modules: str) -> tuple[Path, ...]:
    """The files that modules of this package, given by dotted name, are made of.

    :raises BadConfiguration: there is no source file of one of them: without it, no change of the code could be seen.
    """
    todo = []
    for module in modules:
        file = source_file(module)
        if file is None:
            raise BadConfiguration(
                f"there is no source file of {module} in {_ROOT}, so results cannot be named by the code that made them: "
                f"install {PACKAGE.replace('_', '-')} as files, not in a zip or as bytecode alone."
            )
        todo.append(file)
    found = set(todo)
    while todo:
        for module in modules_named(todo.pop().read_text(encoding="utf-8")):
            file = source_file(module)
            if file is not None and file not in found:
                found.add(file)
                todo.append(file)
    return tuple(sorted(found))


@cache
def package_digest(*modules: str) -> str:
    """sha256 of the files that modules of this package are made of."""
    return digest_of(
        [
            [file.relative_to(_ROOT).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()]
            for file in closure(*modules)
        ]
    )


def modules_named(source: str) -> set[str]:
    """The modules of this package that a source of this package imports, or takes names from."""
    text = re.sub("#.*", "", _TYPES_ONLY.sub("", source))
    found = set(_PLAIN.findall(text))
    for module, names in _FROM.findall(text):
        for name in _names(names):
            found.add(taken_from(module, name))
    return found - {PACKAGE}  # lepton_airflow/__init__.py defines only the version, which changes no result


def taken_from(module: str, name: str) -> str:
    """The module that ``from module import name`` takes something from: the submodule of that name, else the module."""
    inner = f"{module}.{name}"
    return inner if source_file(inner) else module


def _names(text: str) -> Iterable[str]:
    return (part.split()[0] for part in text.strip("()\n ").split(",") if part.strip())


def source_file(module: str) -> Path | None:
    """The source file of a module of this package; None where there is none."""
    parts = module.split(".")[1:]
    plain = _ROOT.joinpath(*parts).with_suffix(".py") if parts else None
    if plain is not None and isfile(plain):  # False, too, for a name that is longer than a file's may be
        return plain
    face = _ROOT.joinpath(*parts, "__init__.py")
    return face if parts and isfile(face) else None
