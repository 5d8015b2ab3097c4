"""Profiles from YAML files and NAME=VALUE words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.profiles.schema import Profile, from_dict

FOLDER = Path(__file__).parent


def available() -> list[str]:
    """Names of the profiles that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_profile(source: str | Path | Profile = "mini", overrides: dict[str, Any] | None = None) -> Profile:
    """The profile called ``source``, or read from the YAML file at that path, with ``overrides`` applied.

    Raises ``ProfileError`` for an unknown name, a missing or broken file, a field that is unknown or named twice, and a value of the wrong
    type or out of its field's range.
    """
    if isinstance(source, Profile):
        return source.override(overrides)
    path = Path(source)
    if str(source) in available():
        path = FOLDER / f"{source}.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        raise ProfileError(f"There is no profile {str(source)!r}; choose one of {', '.join(available())}, "
                           "or give the path of a .yaml file.")
    try:
        table = _read_yaml(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise ProfileError(f"The profile file {path} does not exist; check the path, or choose one of {', '.join(available())}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"The profile file {path} cannot be read as YAML ({str(error).splitlines()[0]}); correct it.") from None
    return from_dict(table, f"profile file {path.name}").override(overrides)


def parse_assignments(pairs: list[str], option: str = "--set") -> dict[str, Any]:
    """Overrides (or notebook parameters) from NAME=VALUE of a command line, values read as YAML. Raises ``InputError``."""
    table = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"{option} {pair!r} is not of the form NAME=VALUE; write for example {option} support.size=8.")
        try:
            table[name] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            raise InputError(f"The value of {option} {pair!r} cannot be read; write a number, true, a [list, of, values] or text."
                             ) from None
    return table


def _read_yaml(text: str, path: Path) -> Any:
    """The document as ``yaml.safe_load`` gives it, which would let the last of equal keys win; ``ProfileError`` for a key named twice."""
    loader = yaml.SafeLoader(text)
    try:
        document = loader.get_single_node()
        nodes, seen = [document], set()
        while nodes:
            node = nodes.pop()
            if id(node) in seen or not isinstance(node, yaml.CollectionNode):
                continue
            seen.add(id(node))  # an alias is its anchor's node again
            if not isinstance(node, yaml.MappingNode):
                nodes += node.value
                continue
            names = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in names:
                    raise ProfileError(f"In the profile file {path.name}, {key.value!r} is named twice in one table, again in line "
                                       f"{key.start_mark.line + 1}; keep one of them.")
                names.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
                nodes.append(value)
        return None if document is None else loader.construct_document(document)
    finally:
        loader.dispose()
