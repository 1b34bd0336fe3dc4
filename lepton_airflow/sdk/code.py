"""The user's code by reference, ``module:function``: loading it, and the digest of all that it is made of."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import sysconfig
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lepton_airflow.contract import digest_of
from lepton_airflow.errors import BadConfiguration, did_you_mean
from lepton_airflow.sdk.closure import PACKAGE, package_digest, source_file, taken_from

_CODE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def is_code(value: str) -> bool:
    """Whether a string is a reference ``module:function``."""
    return bool(_CODE.match(value))


def load_code(reference: str, wanted: str) -> Callable[..., Any]:
    """Import the user's function ``module:function``; raises BadConfiguration with what was looked for and where."""
    module_name, _, attribute = reference.partition(":")
    _import_from_source(module_name.partition(".")[0])
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name != error.name and not module_name.startswith(error.name + "."):
            raise  # the user's module was found; something that it imports was not
        raise BadConfiguration(
            f"{wanted}={reference!r}: no module {error.name!r} where the stage runs. Put it beside the DAG file; for a pod, "
            "into the image, on PYTHONPATH."
        ) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        # What the module re-exports from its own package is a candidate; what it imports from elsewhere is not.
        package = module_name.partition(".")[0]
        functions = {n: v for n, v in vars(module).items() if inspect.isfunction(v)}
        names = [n for n, v in functions.items() if v.__module__.partition(".")[0] == package]
        raise BadConfiguration(
            f"{wanted}={reference!r}: module {module_name!r} has no function {attribute!r}; "
            f"{did_you_mean(attribute, names)}"
        )
    return typing.cast("Callable[..., Any]", function)


class _FromSource(importlib.machinery.SourceFileLoader):
    """Compiles a module whenever it is imported, and leaves no bytecode behind.

    Python takes a module's bytecode for that of its source when both have the same second and size, so a file that was edited
    twice in a second would run as it was before, under the cache key of what it is now.
    """

    def path_stats(self, path: Any) -> Any:
        # For importlib this means that there is no bytecode, and that none may be written.
        raise OSError("bytecode does not count")


_from_source: set[Path] = set()  # the folders whose modules are imported so


def _import_from_source(top: str) -> None:
    """Import from source what lies in the folders of a module or package of the user's; installed libraries stay as they are.

    Compiling takes a second for 100,000 lines, so what is large is better installed.
    """
    if top == PACKAGE:
        return
    new = {folder.resolve() for folder in _folders_of(top)} - _installed() - _from_source
    if not new:
        return
    if not _from_source:
        sys.path_hooks.insert(0, _finder_from_source)
    _from_source.update(new)
    for entry in list(sys.path_importer_cache):
        if _is_from_source(entry):
            del sys.path_importer_cache[entry]


def _finder_from_source(entry: str) -> importlib.machinery.FileFinder:
    if not Path(entry).is_dir() or not _is_from_source(entry):
        raise ImportError("another finder's")
    machinery = importlib.machinery
    extensions = (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES)
    return machinery.FileFinder(entry, extensions, (_FromSource, machinery.SOURCE_SUFFIXES))


def _is_from_source(entry: str) -> bool:
    path = Path(entry).resolve()
    return any(folder in _from_source for folder in (path, *path.parents)) and not any(
        folder in _installed() for folder in (path, *path.parents)
    )


@cache
def _installed() -> frozenset[Path]:
    """The folders of Python's own libraries and of installed ones."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return frozenset(Path(sysconfig.get_path(name)).resolve() for name in names)


# Modules of this package that only start stages: what user code imports of them decides where it runs, and no result.
_STARTS_STAGES = frozenset(
    {"airflow", "cli", "operators", "pods", "runners", "settings", "testing", "triggers"}
)


def code_digest(reference: str) -> str:
    """sha256 of the source that ``module:function`` is made of: its module or package, and all it imports from beside it.

    Of this package, the modules that it imports count, with those that they import. Of another installed library only
    its own files count. Nothing of it is imported.

    :raises BadConfiguration: there is no such module, or no source file of it.
    """
    module = reference.partition(":")[0]
    top = module.partition(".")[0]
    if top == PACKAGE:
        return package_digest(module)
    folders = _folders_of(top)
    if not folders:
        raise BadConfiguration(
            f"{reference!r}: no module {top!r} where the stage runs. Put it beside the DAG file; for a pod, into the image, on "
            "PYTHONPATH."
        )
    found: list[tuple[str, str]] = []
    ours: set[str] = set()
    for folder in folders:
        for file in _files_of(folder, top):
            source = file.read_bytes()
            found.append((str(file.relative_to(folder)), hashlib.sha256(source).hexdigest()))
            ours |= _imports(source)[1]
    if not found:
        raise BadConfiguration(
            f"{reference!r}: there is no source file of {top!r} in {folders[0]}, so results cannot be named by the code that "
            "made them: install it as files, not in a zip or as bytecode alone."
        )
    return digest_of([*sorted(found), package_digest(*sorted(ours))])


def _folders_of(top: str) -> list[Path]:
    """The folders on ``sys.path`` that hold a top-level module or package; several hold parts of a namespace package."""
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # __main__ in a notebook
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(place).parent for place in spec.submodule_search_locations]
    return [Path(spec.origin).parent] if spec.has_location and spec.origin else []


def _files_of(folder: Path, top: str) -> Iterator[Path]:
    """The sources of a module or package, and of what these import from the same folder, unless libraries lie there."""
    installed = _installed()
    todo, seen = [top], {top}
    while todo:
        name = todo.pop()
        package, module = folder / name, folder / f"{name}.py"
        for file in sorted(package.rglob("*.py")) if package.is_dir() else [module] * module.is_file():
            yield file
            if folder.resolve() not in installed:
                beside = {n for n in _imports(file.read_bytes())[0] if _lies_in(folder, n)} - seen
                todo += sorted(beside)
                seen |= beside


def _lies_in(folder: Path, name: str) -> bool:
    return (folder / name).exists() or (folder / f"{name}.py").exists()


def _imports(source: bytes) -> tuple[set[str], set[str]]:
    """What a module's source imports: the top-level names, and the modules of this package that may change a result."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # the import itself will report the error
        return set(), set()
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    whole = [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level and node.module]
    modules = plain | {taken_from(str(node.module), alias.name) for node in whole for alias in node.names}
    ours = {
        module
        for module in modules
        if module.startswith(f"{PACKAGE}.")
        and module.split(".")[1] not in _STARTS_STAGES
        and source_file(module)
    }
    return {name.partition(".")[0] for name in modules}, ours
