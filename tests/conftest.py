"""Fixtures that several test files share."""

import sys
from pathlib import Path

import pytest
import torch
from sentences import assigned
from tiny import make_tiny_models, tiny_overrides

from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile

# Tiny models gain nothing from threads, and on a busy machine two threads wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """A folder with ``stable-diffusion`` and ``clip``: random weights, real classes. Read only."""
    return make_tiny_models(tmp_path_factory.mktemp("tiny_models"))


@pytest.fixture(scope="session")
def tiny_profile(tiny_models) -> Profile:
    """The mini profile with the tiny models and small sizes."""
    return load_profile("mini", tiny_overrides(tiny_models))


@pytest.fixture
def tiny(tiny_models, tmp_path) -> list[str]:
    """Options of a command that select the tiny models and a library of this test."""
    settings = {**tiny_overrides(tiny_models), "support.size": 2, "prototypes.clusters": 3}
    return [*assigned(settings), "--library", str(tmp_path / "library")]


@pytest.fixture
def without(monkeypatch):
    """``without(package)``: as where it is not installed, whether it is or not, and whatever of it was imported before."""
    def block(package: str) -> None:
        loaded = [name for name in sys.modules if name.partition(".")[0] == package]
        for name in [package, *loaded]:
            monkeypatch.setitem(sys.modules, name, None)  # how Python notes a module that cannot be imported

    return block
