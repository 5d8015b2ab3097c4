"""Profiles from YAML files."""

from pathlib import Path
from typing import Any

import yaml

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.profiles.schema import Profile, from_dict

FOLDER = Path(__file__).parent

UNREADABLE = (yaml.YAMLError, ValueError, AttributeError, RecursionError)
"""What PyYAML raises for a text that is no YAML, or names a thing that cannot be, such as the day 2024-13-45."""


def available() -> list[str]:
    """Names of the profiles that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_profile(source: str | Path | Profile = "mini", overrides: dict[str, Any] | None = None) -> Profile:
    """The profile called ``source``, or read from the YAML file at that path, with ``overrides`` applied.

    Raises ``ProfileError`` for an unknown name or field, a missing or broken file, and a value its field cannot hold.
    """
    if isinstance(source, Profile):
        return source.override(overrides)
    path = FOLDER / f"{source}.yaml" if str(source) in available() else Path(source)
    if path.suffix not in (".yaml", ".yml"):
        raise ProfileError(f"There is no profile {str(source)!r}; choose one of {', '.join(available())}, "
                           "or give the path of a .yaml file.")
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, *UNREADABLE) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProfileError(f"The profile file {path} cannot be read as YAML ({reason}); correct it, or choose one of "
                           f"{', '.join(available())}.") from None
    return from_dict(table, f"profile file {path.name}").override(overrides)
