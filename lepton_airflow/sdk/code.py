"""The user's code by reference, ``module:function``: loading it, and the digest of all that it is made of."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sysconfig
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lepton_airflow.contract import digest_of
from lepton_airflow.errors import BadConfiguration, did_you_mean
from lepton_airflow.sdk.closure import PACKAGE, modules_named, package_digest

_CODE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def is_code(value: str) -> bool:
    """Whether a string is a reference ``module:function``."""
    return bool(_CODE.match(value))


def load_code(reference: str, wanted: str) -> Callable[..., Any]:
    """Import the user's function ``module:function``; raises BadConfiguration with what was looked for and where."""
    module_name, _, attribute = reference.partition(":")
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


def code_digest(reference: str) -> str:
    """sha256 of the source that ``module:function`` is made of: its module or package, and all it imports from beside it.

    Of this package, the modules that it imports count, with those that they import. Of another installed library only
    its own files count. Nothing of it is imported.
    """
    module = reference.partition(":")[0]
    top = module.partition(".")[0]
    if top == PACKAGE:
        return package_digest(module)
    folder = _folder_of(top)
    if folder is None:
        raise BadConfiguration(
            f"{reference!r}: no module {top!r} where the stage runs. Put it beside the DAG file; for a pod, into the image, on "
            "PYTHONPATH."
        )
    installed = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    todo, seen = [top], {top}
    ours: set[str] = set()
    found: dict[str, str] = {}
    while todo:
        for file in _sources(folder, todo.pop()):
            source = file.read_bytes()
            found[str(file.relative_to(folder))] = hashlib.sha256(source).hexdigest()
            ours |= modules_named(source.decode(errors="replace"))
            if folder not in installed:
                beside = {
                    name
                    for name in _imports(source)
                    if (folder / name).exists() or (folder / f"{name}.py").exists()
                }
                todo += sorted(beside - seen)
                seen |= beside
    return digest_of([*sorted(found.items()), package_digest(*sorted(ours))])


def _folder_of(top: str) -> Path | None:
    """The folder on ``sys.path`` that holds a top-level module or package."""
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # __main__ in a notebook
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:  # a package, with or without __init__.py
        return Path(next(iter(spec.submodule_search_locations))).parent
    return Path(spec.origin).parent if spec.has_location and spec.origin else None


def _sources(folder: Path, top: str) -> list[Path]:
    package = folder / top
    return sorted(package.rglob("*.py")) if package.is_dir() else [folder / f"{top}.py"]


def _imports(source: bytes) -> set[str]:
    """Top-level names that a module's source imports."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # whoever imports it is told
        return set()
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    whole = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in plain | whole} - {""}
