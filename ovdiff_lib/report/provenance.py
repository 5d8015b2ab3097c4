"""Where numbers come from: versions of the libraries, the git commit of the code, the settings of the profile."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.profiles import Profile, load_profile

PACKAGE = Path(__file__).parent.parent

LIBRARIES = {"ovdiff_lib": "ovdiff-lib", "torch": "torch", "diffusers": "diffusers", "transformers": "transformers",
             "open_clip": "open_clip_torch", "numpy": "numpy"}
"""Shown name -> the distribution's."""


def versions() -> dict[str, str]:
    """Versions of Python and the libraries here, read without importing them; "not installed" where there is none."""
    found = {"python": platform.python_version()}
    for name, distribution in LIBRARIES.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit(package: Path = PACKAGE) -> str:
    """The commit that the code in ``package`` is at, marked where files differ from it; "" outside a checkout or without git.

    A package installed into someone else's checkout (a virtual environment within a project) is not that project's: git must know its
    files.
    """
    def git(*arguments: str) -> str | None:
        try:
            # --no-optional-locks: reading must not write to the index while someone else commits.
            run = subprocess.run(["git", "--no-optional-locks", "-C", str(package), *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit or git("ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    return commit + (" with uncommitted changes" if git("status", "--porcelain", "--", ".") else "")


def hidden(text: str, folder: Path) -> str:
    """Text without the folders of this machine, since a report is sent to others: the outputs folder as notebooks write it, where Python
    keeps its packages, the checkout and the home folder by a name. ``text`` may be JSON."""
    places = {folder.resolve(): f"../outputs/{folder.name}", Path(sysconfig.get_path("purelib")): "site-packages",
              PACKAGE.parent: "<project>", Path.home(): "~"}
    for place, name in sorted(places.items(), key=lambda item: -len(str(item[0]))):  # inner folders before those that hold them
        if len(place.parts) > 1:  # a home that is the root of the disk would take away every slash
            text = re.sub(re.escape(json.dumps(str(place))[1:-1]) + r"(?![\w.-])", lambda _, name=name: name, text)
    return text


def settings(profile: Profile) -> list[tuple[str, Any, Any]]:
    """Every field of the profile as (section.field, value, shipped value): the last differs from the value where it was overridden, and
    equals it where no profile of that name ships."""
    table = profile.to_dict()
    try:
        shipped = load_profile(profile.name).to_dict()
    except ProfileError:
        shipped = table
    return [(f"{section}.{name}", value, shipped[section][name])
            for section, fields in table.items() if isinstance(fields, dict) for name, value in fields.items()]


def stands_in(profile: Profile) -> bool:
    """Whether the profile runs models that ship with the package instead of the paper's, so that its numbers are not the paper's."""
    return profile.models.diffusion.startswith("package:")
