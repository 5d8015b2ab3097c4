"""The code in the keys: an edited step makes its results anew, and those below it, and no others."""

import shutil
from pathlib import Path

import pytest

from ovdiff_lib import OVDiff, keys
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.workbench.evaluation.results import code_digest

NOTHING, SD, CLIP = set(), {"sd"}, {"clip-keys", "clip-tokens"}
VITS = {*CLIP, "dino", "mae", "open-clip-keys"}
EXTRACTORS = {*SD, *VITS}
BUILT = {"masks", *EXTRACTORS}
ALL = {"support", *BUILT}


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A copy of the package whose code the keys are of, to be edited."""
    folder = tmp_path / "ovdiff_lib"
    shutil.copytree(keys.PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__", "weights", "*.webp", "*.png", "*.npz"))
    monkeypatch.setattr(keys, "PACKAGE", folder)
    return folder


def edit(path: Path, text: str = "\nEDITED = 1\n") -> None:
    path.write_text(path.read_text() + text)


def changed(profile, do) -> set[str]:
    """The steps whose keys ``do`` changes."""
    before = {step: keys.made_from(profile, step) for step in ALL}
    do()
    return {step for step in ALL if keys.made_from(profile, step) != before[step]}


# With MaskCut as segmenter, whose network is DINO; written from what each module does, not from what it imports.
CHANGES = {
    "support/sampler.py": ALL, "support/attribution.py": ALL, "networks/instruments.py": ALL, "networks/loading.py": ALL,
    "masks/select.py": BUILT, "masks/threshold.py": BUILT, "masks/segmenters/maskcut.py": BUILT, "masks/segmenters/refine.py": BUILT,
    "masks/segmenters/detector.py": NOTHING, "masks/segmenters/sam.py": NOTHING,
    "prototypes/build.py": EXTRACTORS, "prototypes/kmeans.py": EXTRACTORS,
    "features/diffusion.py": SD, "features/vit.py": VITS, "features/clip.py": {*CLIP, "open-clip-keys"}, "features/mae.py": {"mae"},
    "features/dino.py": {"dino"}, "features/open_clip.py": {"open-clip-keys"},
    **dict.fromkeys(("pipeline.py", "filters/category.py", "filters/stuff.py", "matching/matcher.py", "matching/pamr.py", "overlay.py",
                     "explain.py", "errors.py", "profiles/schema.py", "library/store.py", "cli/main.py",
                     "workbench/evaluation/rows.py"), NOTHING)}


def test_an_edited_module_changes_the_keys_of_its_step_and_of_those_below(copy):
    profile = load_profile("mini", {"masks.segmenter": "maskcut"})
    found = {name: changed(profile, lambda name=name: edit(copy / name)) for name in CHANGES}
    assert found == CHANGES


def test_imports_of_other_packages_count(copy):
    path, profile = copy / "masks" / "select.py", load_profile("mini")
    text = path.read_text()
    assert "\nimport numpy as np\n" in text
    assert changed(profile, lambda: path.write_text(text.replace("import numpy as np", "import cupy as np"))) == BUILT


def test_comments_docstrings_and_layout_do_not_count(copy):
    path, profile = copy / "masks" / "select.py", load_profile("mini")
    text = path.read_text()
    relaid = "# why\n" + text.replace('"""Eq. 1', '"""Says more. Eq. 1').replace("    if bare:", "    if (\n\n    bare):")
    assert changed(profile, lambda: path.write_text(relaid)) == NOTHING and len(relaid) > len(text) + 20
    assert changed(profile, lambda: path.write_text(text.replace("mean.argmax()", "mean.argmin()"))) == BUILT


def test_a_line_of_a_registry_counts_for_its_entry_alone(copy):
    path, profile = copy / "features" / "__init__.py", load_profile("mini")
    text = path.read_text()
    edited = text.replace('profile: ClipExtractor.build(profile, "keys")', "profile: None")
    assert changed(profile, lambda: path.write_text(edited)) == {"clip-keys"}
    added = path.read_text().replace('"sd": Part(', '"new": Part(print),\n    "sd": Part(')
    assert changed(profile, lambda: path.write_text(added)) == NOTHING


def test_masks_are_made_anew_after_an_edit_and_drawings_are_not(copy, tiny_profile, tmp_path, monkeypatch):
    def build():
        return OVDiff(tiny_profile, library=tmp_path / "library", progress=False).build_class("cat")["sd"].vectors

    def count():
        return [entry.kind for entry in OVDiff(tiny_profile, library=tmp_path / "library").library.entries()]

    build()
    assert count() == ["support", "masks", "prototypes"]
    edit(copy / "masks" / "select.py")
    build()
    assert count() == ["support", "masks", "masks", "prototypes", "prototypes"]
    edit(copy / "prototypes" / "kmeans.py")
    build()
    assert count() == ["support", "masks", "masks", "prototypes", "prototypes", "prototypes"]


@pytest.mark.parametrize("name, counts", [
    ("matching/pamr.py", True), ("filters/stuff.py", True), ("masks/segmenters/sam.py", True), ("workbench/baselines/reco.py", True),
    ("workbench/evaluation/measure.py", True), ("workbench/data/metrics.py", True), ("workbench/data/things_c8.csv", True),
    ("workbench/figures/charts.py", False), ("workbench/tables/claims.py", False), ("cli/main.py", False), ("recipes/art.py", False)])
def test_a_count_depends_on_all_that_can_change_a_label(copy, name, counts):
    before = code_digest()
    edit(copy / name)
    assert (code_digest() != before) == counts and len(before) == 16


def test_what_runs_is_what_was_loaded(tmp_path, monkeypatch):
    """A file that is written while the process runs is not its code, until it is loaded again."""
    import importlib
    import sys

    (tmp_path / "loaded_once.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("loaded_once")
    path = tmp_path / "loaded_once.py"
    first = keys._module("loaded_once", path)
    path.write_text("X = 22\n")
    assert keys._module("loaded_once", path) == first
    importlib.reload(module)
    assert keys._module("loaded_once", path).statements == "X = 22" and module.X == 22
    sys.modules.pop("loaded_once")
