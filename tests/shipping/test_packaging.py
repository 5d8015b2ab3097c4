"""The house in order: dependencies declared once and alike, data that ships, commands that exist, nothing of one machine in the tree."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ovdiff_lib.recipes.art import PACKAGES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
*FROM_PIP, INSTALL = next(line["pip"] for line in CONDA["dependencies"] if isinstance(line, dict))
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
"""conda-forge's name -> the Python package index's, where canonical spelling is not enough."""

CONDA_ONLY = {"python", "pip", "setuptools", "detectron2"}


def requirements(lines):
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


RUNTIME = requirements(PROJECT["dependencies"])
EXTRAS = {extra: requirements(lines) for extra, lines in PROJECT["optional-dependencies"].items()}


def conda_specs():
    """Package -> version range, by the index's canonical names."""
    found = {}
    for line in [line for line in CONDA["dependencies"] if isinstance(line, str)] + FROM_PIP:
        name, wanted = re.fullmatch(r"([A-Za-z0-9_.-]+?)\s*([<>=!~].*)?", line).groups()
        found[canonicalize_name(CONDA_NAMES.get(name, name))] = (wanted or "").replace(" ", "")
    return found


def tracked():
    """Files of the repository, new ones that git does not ignore included."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()]


# ---- environment.yml and pyproject.toml

def test_environment_is_conda_forge_and_installs_the_project():
    assert CONDA["name"] == "ovdiff" and CONDA["channels"] == ["conda-forge", "nodefaults"] and INSTALL == "-e ."
    # Not compiled, so they do not have to match the PyTorch of conda-forge, and not in both places.
    assert {line.split(">=")[0] for line in FROM_PIP} == {"diffusers"} <= set(RUNTIME)
    assert not any(str(line).startswith("diffusers") for line in CONDA["dependencies"])
    assert set(CONDA) == {"name", "channels", "dependencies"}


def test_environment_has_every_dependency_in_the_same_range_and_no_other():
    conda, known = conda_specs(), {**RUNTIME, **{name: r for extra in EXTRAS.values() for name, r in extra.items()}}
    assert set(RUNTIME) <= set(conda) <= set(known) | CONDA_ONLY
    for name in set(conda) - CONDA_ONLY:
        assert set(conda[name].split(",")) == set(str(known[name].specifier).split(",")), name
    assert PROJECT["requires-python"] == ">=3.11.4" and conda["python"] == "=3.11"
    assert conda["setuptools"] == "<81"  # detectron2 imports pkg_resources, gone in 82


def test_the_stack_that_users_asked_for_is_declared():
    asked = {"jupyterlab", "papermill", "torch", "diffusers", "transformers", "open-clip-torch", "matplotlib", "pandas", "scikit-learn"}
    assert asked <= set(RUNTIME)
    assert "detectron2" in conda_specs()


def test_what_is_installed_lies_within_the_ranges_which_name_no_host_and_no_pin():
    for requirement in [*RUNTIME.values(), *EXTRAS["dev"].values()]:
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement
        assert requirement.url is None and "==" not in str(requirement.specifier)


# ---- imports

def imports(path):
    """Top-level names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_every_import_is_declared():
    distributions = {module: {canonicalize_name(n) for n in names} for module, names in packages_distributions().items()}
    optional = {"detectron2": {"detectron2"}, "ray": {"ray"}}  # not in every environment
    declared = {"ovdiff_lib": set(RUNTIME) | set(EXTRAS["ray"]) | {"detectron2"}, "tests": set(RUNTIME) | set(EXTRAS["dev"])}
    local = {"ovdiff_lib", *(p.stem for p in (ROOT / "tests").rglob("*.py"))}
    for folder, allowed in declared.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            # Training the mini world is development: it may use what only the extra has.
            extra = set(EXTRAS["dev"]) if "recipes" in path.parts else set()
            for module in set(imports(path)) - local - set(sys.stdlib_module_names):
                names = distributions.get(module) or optional.get(module, set())
                assert names & (allowed | extra), f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not declare"


@pytest.mark.parametrize(("modules", "heavy"), [
    ("ovdiff_lib.cli.main; from ovdiff_lib import Vocabulary", "torch diffusers transformers sklearn skimage scipy matplotlib papermill"),
    ("ovdiff_lib.cli.main, ovdiff_lib.workbench.parallel as p; p.RayEngine(2)", "ray"),
    ("ovdiff_lib.pipeline", "diffusers transformers torchvision open_clip")])
def test_network_libraries_are_imported_where_they_are_used(modules, heavy):
    """They take seconds: a program that needs none of them does not wait."""
    script = f"import sys, {modules}; print([name for name in {heavy.split()} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---- what ships

def test_every_file_of_the_package_ships(monkeypatch):
    from setuptools import Distribution

    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    command.manifest_files = {}  # only what pyproject.toml says; asking setuptools for its manifest would write into the tree
    shipped = set()
    for package in command.packages:
        folder = Path(package.replace(".", "/"))
        shipped |= {os.path.relpath(path) for path in command.find_data_files(package, str(folder))}
        shipped |= {str(path) for path in folder.glob("*.py")}
    for name in tracked():
        if name.startswith("ovdiff_lib/"):
            assert name in shipped, f"{name} is in the package's folder but would not be installed"


def test_the_command_line_entry_exists():
    module, function = PROJECT["scripts"]["ovdiff"].split(":")
    assert callable(getattr(import_module(module), function))


def test_nothing_of_one_machine_is_in_the_tree():
    # Taken apart, so that this file does not match itself.
    machine = re.compile(r"(^|[^\w.])/(" + "|".join(["ro" + "ot", "wo" + "rk", "ho" + "me"]) + r")/\w|file:" + "//")
    for name in tracked():
        path = ROOT / name
        if path.suffix in (".py", ".yaml", ".yml", ".toml", ".md", ".ipynb", ".json", ".txt", "") and path.stat().st_size < 2**20:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert not machine.search(line), f"{name}:{number}"


def test_no_large_files():
    sizes = {name: (ROOT / name).stat().st_size for name in tracked()}
    assert max(sizes.values()) < 50 * 2**20 and sum(sizes.values()) < 60 * 2**20


def test_nothing_is_unfinished_or_swallowed():
    words = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "XXX", "NotImplemented" + "Error"]))
    for path in sorted((ROOT / "ovdiff_lib").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not words.search(text), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno} catches everything"
                assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"{path}:{node.lineno} swallows an exception"


def test_licence_and_notice():
    licence, notice = ((ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "NOTICE"))
    assert PROJECT["license"] == "Apache-2.0" and "Apache License" in licence and PROJECT["license-files"] == ["LICENSE", "NOTICE"]
    for style in ("fluent-3d", "fluent-flat", "noto", "twemoji"):  # those of which something ships
        name, _, number = PACKAGES[style].rpartition("@")
        assert f"{name} {number}" in notice  # the art that is drawn is the art that is named


def make(*arguments, cwd=ROOT):
    # The tests are themselves run by make; what it hands down would have this one report the folders it enters.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, check=True, env=environment).stdout


def test_every_make_target_is_described_and_has_commands():
    for target, _ in (line.split(maxsplit=1) for line in make("help").splitlines()):
        assert make("--dry-run", "--always-make", target).strip(), target


def test_make_clean_keeps_tables_and_figures(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    kept = ["outputs/mini/tables/t.csv", "outputs/mini/figures/f.png", "notebooks/00_a.ipynb", ".venv/lib/__pycache__/a.pyc"]
    gone = ["outputs/mini/cache/x", "outputs/mini/00_a.ipynb", "outputs/mini/00_a.failed.ipynb", "outputs/mini/00_a.stamp.json",
            "tests/__pycache__/a.pyc", "notebooks/.ipynb_checkpoints/a.ipynb"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    make("clean", cwd=tmp_path)
    assert [n for n in kept if not (tmp_path / n).exists()] == [] and [n for n in gone if (tmp_path / n).exists()] == []


def test_git_ignores_runs_but_not_their_tables():
    def ignored(name):
        return subprocess.run(["git", "check-ignore", "--quiet", "--no-index", name], cwd=ROOT).returncode == 0

    for name in ("outputs/mini/tables/t.csv", "outputs/mini/figures/f.png", "ovdiff_lib/mini/weights/clip/model.safetensors",
                 "ovdiff_lib/mini/data/val/labels/0000.png", "notebooks/00_quickstart.ipynb"):
        assert not ignored(name), name
    for name in ("outputs/mini/00_quickstart.ipynb", "outputs/mini/cache/x", "outputs/paper/tables/t.csv", ".venv/bin/python",
                 "ovdiff_lib/__pycache__/a.pyc", "ovdiff_lib.egg-info/PKG-INFO"):
        assert ignored(name), name
