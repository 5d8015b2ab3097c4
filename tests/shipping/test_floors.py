"""The floors of the house: an import goes down, never up and never in a circle; and lines that fit a screen."""

import ast
import functools
import json
from pathlib import Path

import ovdiff_lib
from ovdiff_lib.workbench.reproduce import NOT_READ

PACKAGE = Path(ovdiff_lib.__file__).parent

FLOORS = ["errors overlay mini code", "profiles categories files", "networks registry images types",
          "support masks features prototypes filters matching segmentation", "library", "keys explain", "pipeline", "workbench",
          "cli recipes"]
"""Rooms (folders and single modules), the ground floor first. A room imports from itself and from the floors below."""

MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip("."): p for p in PACKAGE.rglob("*.py")}


def named(tree: ast.AST) -> set[str]:
    """The package's modules that the imports below a node name; "" is the package itself."""
    found = set()
    for node in ast.walk(tree):
        names = [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else \
                [a.name for a in node.names] if isinstance(node, ast.Import) else []
        inside = [name.partition(".")[2] for name in names if name.partition(".")[0] == PACKAGE.name]
        found |= {name if name in MODULES else name.rpartition(".")[0] for name in inside}
    return found


@functools.cache
def imports(module: str) -> set[str]:
    """The package's modules that an import in ``module`` runs, wherever in the file it stands; "" is the package itself.

    Those it names, and the ``__init__`` of the folders they lie in, but for folders that ``module`` lies in, too.
    """
    found = named(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    folders = {name.rsplit(".", n)[0] for name in found for n in range(1, name.count(".") + 1)}
    found |= {folder for folder in folders if not f"{module}.".startswith(f"{folder}.")}
    return found - {module}


def floor(module: str) -> int:
    """The number of a module's floor; the package's own ``__init__``, through which users come in, is above all."""
    room = module.partition(".")[0]
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms.split()), len(FLOORS))


def reached(module: str) -> set[str]:
    """Every module that a module imports, or one of those, and so on."""
    found, waiting = set(), [module]
    while waiting:
        new = imports(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def test_every_room_has_a_floor():
    assert {module for module in MODULES if floor(module) == len(FLOORS)} == {""}


def test_imports_go_down_and_never_in_a_circle():
    arrows = {(module, other) for module in MODULES for other in imports(module)}
    up = {(a, b) for a, b in arrows if a.partition(".")[0] != b.partition(".")[0] and a and floor(b) >= floor(a)}
    circles = {(a, b) for a, b in arrows if a in reached(b)}
    assert {f"{a} -> {b}" for a, b in up | circles} == set()


def test_no_notebook_reaches_what_does_not_make_it_stale():
    """:data:`NOT_READ` is left out when a notebook's results are asked whether they are fresh."""
    found = set()
    for path in sorted((PACKAGE.parent / "notebooks").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            found |= named(ast.parse("".join(cell["source"]))) if cell["cell_type"] == "code" else set()
    found |= set().union(*map(reached, found))
    paths = {MODULES[name].relative_to(PACKAGE) for name in found}
    assert {Path("pipeline.py"), Path("workbench/tables/tables.py")} <= paths
    assert not [path for path in paths for folder in NOT_READ if path.is_relative_to(folder)]
    assert all((PACKAGE / folder).exists() for folder in NOT_READ)


def test_lines_fit_a_screen():
    wide = [f"{path.relative_to(PACKAGE)}:{number}" for path in MODULES.values()
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not wide
