"""The code in the keys: an edited step makes its results anew, and those below it, and no others."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

from ovdiff_lib import OVDiff, code, keys
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
    shutil.copytree(code.PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__", "weights", "*.webp", "*.png", "*.npz"))
    monkeypatch.setattr(code, "PACKAGE", folder)
    return folder


@pytest.fixture(scope="module")
def profile():
    """With MaskCut as segmenter, whose network is DINO."""
    return load_profile("mini", {"masks.segmenter": "maskcut"})


def edit(path: Path, text: str = "\nEDITED = 1\n") -> None:
    path.write_text(path.read_text() + text)


def changed(profile, do) -> set[str]:
    """The steps whose keys ``do`` changes."""
    before = {step: keys.made_from(profile, step) for step in ALL}
    do()
    return {step for step in ALL if keys.made_from(profile, step) != before[step]}


CHANGES = {  # written from what each module does, not from what it imports
    "support/sampler.py": ALL, "support/attribution.py": ALL, "networks/instruments.py": ALL, "networks/loading.py": ALL,
    "masks/select.py": BUILT, "masks/threshold.py": BUILT, "masks/segmenters/maskcut.py": BUILT, "masks/segmenters/refine.py": BUILT,
    "prototypes/build.py": EXTRACTORS, "prototypes/kmeans.py": EXTRACTORS,
    "features/diffusion.py": SD, "features/vit.py": VITS, "features/open_clip.py": {"open-clip-keys"},
    **dict.fromkeys(("masks/segmenters/detector.py", "masks/segmenters/sam.py", "features/__init__.py", "pipeline.py",
                     "filters/category.py", "matching/matcher.py", "explain.py", "errors.py", "profiles/schema.py",
                     "library/store.py", "cli/main.py"), NOTHING)}


def test_an_edited_module_changes_the_keys_of_its_step_and_of_those_below(copy, profile):
    before, found = {step: keys.made_from(profile, step) for step in ALL}, {}
    for name in CHANGES:
        text = (copy / name).read_text()
        edit(copy / name)
        found[name] = {step for step in ALL if keys.made_from(profile, step) != before[step]}
        (copy / name).write_text(text)
    assert found == CHANGES


def test_statements_count_and_comments_docstrings_and_layout_do_not(copy, profile):
    path = copy / "masks" / "select.py"
    text = path.read_text()

    def becomes(edited: str) -> set[str]:
        path.write_text(text)
        assert edited != text
        return changed(profile, lambda: path.write_text(edited))

    assert becomes("# why\n" + text.replace('"""Eq. 1', '"""Says more. Eq. 1').replace("    if bare:", "    if (\n\n    bare):")) == NOTHING
    assert becomes(text.replace("mean.argmax()", "mean.argmin()")) == BUILT
    assert becomes(text.replace("\nimport numpy as np\n", "\nimport cupy as np\n")) == BUILT


def test_what_a_line_of_the_registry_says_counts_for_its_entry(profile):
    """Two parts of one class are told apart by what the registry builds them with."""
    code = {name: keys.of_part(profile, "features", name)["code"] for name in CLIP}
    assert len(set(code.values())) == 2


def test_masks_are_made_anew_after_an_edit_and_drawings_are_not(copy, tiny_profile, tmp_path):
    def build() -> list[str]:
        ovdiff = OVDiff(tiny_profile, library=tmp_path / "library", progress=False)
        ovdiff.build_class("cat")
        return [entry.kind for entry in ovdiff.library.entries()]

    assert build() == ["support", "masks", "prototypes"]
    edit(copy / "masks" / "select.py")
    assert build() == ["support", "masks", "masks", "prototypes", "prototypes"]
    edit(copy / "prototypes" / "kmeans.py")
    assert build() == ["support", "masks", "masks", "prototypes", "prototypes", "prototypes"]


def test_a_count_depends_on_all_that_can_change_a_label_and_on_nothing_else(copy, profile):
    def state():
        return code_digest(), keys.of_labels(profile)

    expected = {
        **dict.fromkeys(("matching/pamr.py", "filters/stuff.py", "masks/segmenters/maskcut.py", "features/diffusion.py",
                         "workbench/baselines/reco.py", "workbench/evaluation/measure.py", "workbench/data/metrics.py",
                         "workbench/data/things_c8.csv"), True),
        **dict.fromkeys(("masks/segmenters/sam.py", "features/open_clip.py", "features/__init__.py", "workbench/figures/charts.py",
                         "workbench/tables/claims.py", "cli/main.py", "recipes/art.py"), False)}
    found = {}
    for name in expected:
        before = state()
        edit(copy / name)
        found[name] = state() != before
    assert found == expected


def test_what_runs_is_what_was_loaded(tmp_path, monkeypatch):
    """A file that is written while the process runs is not its code, until it is loaded again."""
    path = tmp_path / "loaded_once.py"
    path.write_text("X = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("loaded_once")
    assert code._text("loaded_once", path) == "X = 1\n"
    path.write_text("X = 22\n")
    assert code._text("loaded_once", path) == "X = 1\n"
    importlib.reload(module)
    assert code._text("loaded_once", path) == "X = 22\n" and module.X == 22
    sys.modules.pop("loaded_once")
