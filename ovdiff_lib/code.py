"""The statements of the package's code, which the keys of results count: a changed line makes anew what it made.

Comments, docstrings and layout do not count. Nothing is imported here: asking whether code changed loads no library.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

NAME = __name__.partition(".")[0]
PACKAGE = Path(__file__).parent

NOT_CODE = ("errors.py", "files.py", "profiles", "registry.py", "features/__init__.py", "masks/__init__.py")
"""Sentences, places, registries, and values that are in the keys themselves."""

DATA = (".csv", ".json", ".yaml")
"""Tables beside a module count with it."""

_texts: dict[Path, tuple[Any, str]] = {path: (None, path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
"""Of each file the spec with which Python loaded it and its text then; at first the package as this module found it."""


def code_digest(*modules: str, texts: tuple[str, ...] = ()) -> str:
    """Hash (16 hex digits) of ``texts``, these modules' statements, those they import of the package, tables beside."""
    found: dict[str, str] = {}
    waiting, folders = list(modules), set()
    while waiting:
        module = waiting.pop()
        path = _file(module)
        if path is None or module in found or any(path.is_relative_to(PACKAGE / name) for name in NOT_CODE):
            continue
        found[module], imported = parsed(_text(module, path))
        waiting += imported
        folders.add(path.parent)
    for path in (path for folder in folders for path in folder.iterdir() if path.suffix in DATA):
        found[str(path.relative_to(PACKAGE))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(repr([*texts, *sorted(found.items())]).encode()).hexdigest()[:16]


def _file(module: str) -> Path | None:
    """The file of a module of this package, None of another."""
    first, *rest = module.split(".")
    path = PACKAGE.joinpath(*rest)
    files = (path / "__init__.py", path.with_suffix(".py")) if first == NAME else ()
    return next((file for file in files if file.is_file()), None)


def _text(module: str, path: Path) -> str:
    """The text that runs: a loaded module's is that with which it was loaded, whatever was written since."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    if spec is None or spec.origin != str(path):
        return path.read_text(encoding="utf-8")
    known, text = _texts.get(path, (None, ""))
    if known is not spec:  # loading a module again gives it another spec
        _texts[path] = spec, text if text and known is None else path.read_text(encoding="utf-8")
    return _texts[path][1]


@functools.cache
def parsed(source: str) -> tuple[str, tuple[str, ...]]:
    """What a module does, its text without comments, docstrings, layout; the package's modules it imports to run."""
    tree, imported = ast.parse(source), set()
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            imported |= {name if _file(name) else node.module for name in names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    return ast.unparse(tree), tuple(name for name in imported if name.partition(".")[0] == NAME)
