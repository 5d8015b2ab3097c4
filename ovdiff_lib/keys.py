"""What a result depends on: its words, settings, models and code. The library, shared networks and stored measurements
all ask here.

Code counts by its statements, not by comments, docstrings and layout. Which modules make a step's result is read from
their own imports: whatever :data:`STEPS` reach within the package, but for :data:`NOT_CODE`. A registry names many
parts and only the chosen one counts, so editing MaskCut makes no mask of the detector anew.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import ModelNotAvailable
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.library.codec import identify
from ovdiff_lib.masks import COMMON_SETTINGS, SEGMENTERS
from ovdiff_lib.networks.identity import model_identity
from ovdiff_lib.profiles.schema import UNUSED_BY_THE_METHOD, Profile
from ovdiff_lib.registry import NOT_MODELS, Part, chosen_settings

NAME = __name__.partition(".")[0]
PACKAGE = Path(__file__).parent

STEPS = {"support": (f"{NAME}.support.sampler", f"{NAME}.networks.loading"), "masks": (f"{NAME}.masks.select",),
         "prototypes": (f"{NAME}.prototypes.build",)}
"""The modules that a step begins in; what they import belongs to it."""

SPEED_ONLY = {"batch_size"}
"""Fields that change how fast a result comes, not the result."""

NOT_CODE = ("errors", "files", "profiles", "registry")  # sentences, places, and values that are in the keys themselves
DATA = (".csv", ".json", ".yaml")

Need = tuple[str, str]
"""A module, and the name that is wanted of it ("" if none)."""


# ------------------------------------------------------------------ what is asked for

def for_words(table: dict[str, Any], prompt: str) -> tuple[str, dict[str, Any]]:
    """The library's key for one category, and what it is the hash of: ``table`` of :func:`made_from` with the
    category's words."""
    table = {**table, "prompt": prompt}
    return identify(table), table


def made_from(profile: Profile, step: str) -> dict[str, Any]:
    """What the result of a step ("support", "masks" or the name of an extractor, for its prototypes) is made from, but
    for the words.

    The settings that the step and those before it stand on, and the identity of the models and of the code that they
    run. Fields of parts that are not used do not count.
    """
    models, code = {"diffusion": model_identity(profile.models.diffusion)}, {"support": code_digest(*STEPS["support"])}
    settings = {"support": dataclasses.asdict(profile.support)}
    if step == "support":
        settings["support"].pop("size")  # a support set grows; what it holds does not change
    else:
        part = of_part(profile, "masks", profile.masks.segmenter)
        settings["masks"] = chosen_settings(profile, "masks", COMMON_SETTINGS) | part["settings"]
        models |= part["models"]
        code |= {"masks": code_digest(*STEPS["masks"]), "segmenter": part["code"]}
    if step == "masks":
        settings["masks"].pop("resize")  # how they meet a feature grid is the prototypes' matter
    if step not in ("support", "masks"):
        part = of_part(profile, "features", step)
        settings |= {"prototypes": dataclasses.asdict(profile.prototypes), "features": part["settings"]}
        models |= part["models"]
        code |= {"prototypes": code_digest(*STEPS["prototypes"]), "extractor": part["code"]}
    settings = {section: {k: v for k, v in table.items() if k not in SPEED_ONLY} for section, table in settings.items()}
    return {"step": step, "settings": settings, "models": {**models, "dtype": profile.models.dtype}, "code": code}


def of_part(profile: Profile, section: str, name: str) -> dict[str, Any]:
    """What the results of an extractor (``section`` "features") or a segmenter ("masks") depend on: models, settings,
    code."""
    registry, table = {"features": ("EXTRACTORS", EXTRACTORS), "masks": ("SEGMENTERS", SEGMENTERS)}[section]
    part = table[name]
    models, settings = part.depends_on(profile, section)
    settings.pop("extractors", None)  # results do not depend on which others run
    return {"models": {field: _identity(value) for field, value in models.items()}, "settings": settings,
            "code": _code_of(part, f"{NAME}.{section}", f"{registry}.{name}")}


def of_labels(profile: Profile, all_models: bool = False) -> dict[str, Any]:
    """What the label maps of a profile depend on, as plain data; ``all_models``: a baseline's, which may load any
    model."""
    table = {section: {k: v for k, v in fields.items() if k not in SPEED_ONLY}
             for section, fields in profile.to_dict().items() if section not in (*UNUSED_BY_THE_METHOD, "models")}
    used = {"diffusion": _identity(profile.models.diffusion)}
    if profile.filters.category:
        used["clip"] = _identity(profile.models.clip)
    code = {"pipeline": code_digest(f"{NAME}.pipeline")}
    parts = [("features", name) for name in profile.features.extractors]
    for section, name in [*parts, ("masks", profile.masks.segmenter)]:
        part = of_part(profile, section, name)
        used |= part["models"]
        code[f"{section} {name}"] = part["code"]
    if all_models:
        used = {k: _identity(v) for k, v in dataclasses.asdict(profile.models).items()
                if k not in NOT_MODELS and isinstance(v, str) and v}
    return {"profile": table, "dtype": profile.models.dtype, "models": used, "code": code}


def _identity(source: str) -> str:
    try:
        return model_identity(source)
    except (ModelNotAvailable, ValueError):  # what needs it will say so; the name of an architecture is no hub id
        return f"not here: {source}"


# ------------------------------------------------------------------ code

@dataclass(frozen=True)
class _Module:
    """A module as :func:`code_digest` sees it: its ``statements`` and what they need; ``names`` that others may want of
    it, by name.

    Those are what it imports and does not use itself, and its registries, as a whole and entry by entry.
    """

    statements: str
    needs: frozenset[Need]
    names: dict[str, tuple[str, frozenset[Need]]]


_parsed: dict[Path, tuple[int, Any, _Module]] = {}
_texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
"""The package as it was when this module, and with it the pipeline, was loaded: what runs, whatever is edited since."""


def code_digest(*roots: str) -> str:
    """Hash (16 hex digits) of the statements of these modules of the package and of all that they need of it, tables
    beside them included."""
    return _digest([(root, "") for root in roots], {})


def _code_of(part: Part, home: str, entry: str) -> str:
    if part.version is not None:
        return f"version:{part.version}"
    if part.module.partition(".")[0] == NAME:
        return _digest([(home, entry), (part.module, "")], {})
    try:
        outside = _read(part.source)
    except SyntaxError:  # the lines of a lambda are no statement of their own
        outside = _Module(part.source, frozenset(), {})
    return _digest(list(outside.needs), {"": outside.statements})


def _digest(todo: list[Need], texts: dict[str, str]) -> str:
    """Of the modules and names in ``todo``, of what they need and of ``texts``."""
    seen: set[Need] = set()
    while todo:
        need = todo.pop()
        if need in seen:
            continue
        seen.add(need)
        module, name = need
        if name and _file(f"{module}.{name}"):
            todo.append((f"{module}.{name}", ""))
            continue
        path = _file(module)
        if path is None or path.relative_to(PACKAGE).parts[0].removesuffix(".py") in NOT_CODE:
            continue
        found = _module(module, path)
        text, needs = found.names.get(name, ("", frozenset()))
        texts |= {module: found.statements, f"{module}:{name}": text}
        texts |= {str(data.relative_to(PACKAGE)): hashlib.sha256(data.read_bytes()).hexdigest()
                  for data in path.parent.glob("*") if data.suffix in DATA}
        todo += [*found.needs, *needs]
    return hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:16]


def _file(module: str) -> Path | None:
    """The file of a module of this package, None of another."""
    first, *rest = module.split(".")
    if first != NAME:
        return None
    path = PACKAGE.joinpath(*rest)
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _module(module: str, path: Path) -> _Module:
    """The module in a file, read once for each time that Python loads it: what runs is what was loaded, whatever was
    written since."""
    loaded = sys.modules.get(module)
    spec = loaded.__spec__ if getattr(loaded, "__file__", None) == str(path) else None
    stamp = id(spec) if spec else path.stat().st_mtime_ns  # loading a module again gives it another spec
    if path not in _parsed or _parsed[path][0] != stamp:
        text = _texts.pop(path, None)
        _parsed[path] = stamp, spec, _read(text if spec and text else path.read_text(encoding="utf-8"))
    return _parsed[path][2]


def statements(source: str) -> str:
    """What a module does: its text without comments, docstrings and layout."""
    return ast.unparse(_parse(source))


def _parse(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _read(source: str) -> _Module:
    tree = _parse(source)
    registries, rest = [], []
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else None
        known = isinstance(target, ast.Name) and target.id in ("EXTRACTORS", "SEGMENTERS")
        (registries if known and isinstance(node.value, ast.Dict) else rest).append(node)
    imported: dict[str, set[Need]] = {}
    for name, need in (pair for node in rest for pair in _imports(node)):
        imported.setdefault(name, set()).add(need)

    def needs(*nodes: ast.AST) -> frozenset[Need]:
        used = {child.id for node in nodes for child in ast.walk(node) if isinstance(child, ast.Name)}
        return frozenset(need for name in used & imported.keys() for need in imported[name])

    names = {name: ("", frozenset(wanted)) for name, wanted in imported.items()}
    for node in registries:
        names[node.target.id] = ast.unparse(node), needs(node)
        for entry, value in zip(node.value.keys, node.value.values, strict=True):
            names[f"{node.target.id}.{ast.literal_eval(entry)}"] = ast.unparse(value), needs(value)
    # Imports of the package count by what they bring; those of others are statements like any.
    body = [node for node in rest if not isinstance(node, (ast.Import, ast.ImportFrom))
            or (not any(_imports(node)) and getattr(node, "module", "") != "__future__")]
    return _Module("\n".join(map(ast.unparse, body)), needs(*body), names)


def _imports(tree: ast.AST) -> Iterator[tuple[str, Need]]:
    """Every import of this package below a node: the name that it binds, and what it needs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == NAME:
            yield from ((alias.asname or alias.name, (node.module, alias.name)) for alias in node.names)
        elif isinstance(node, ast.Import):
            own = [alias for alias in node.names if alias.name.partition(".")[0] == NAME]
            yield from ((alias.asname or NAME, (alias.name, "")) for alias in own)
