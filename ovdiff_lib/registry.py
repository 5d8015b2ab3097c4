"""What a registry of exchangeable parts holds: how a part is built, and what its results depend on.

The shortest entry is ``"name": Part(Mine)``, where ``Mine(profile)`` is the part; every default is right.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ovdiff_lib.errors import ProfileError, legal

if TYPE_CHECKING:
    from ovdiff_lib.profiles.schema import Profile

NOT_MODELS = ("device", "dtype", "download")
"""Fields of ``profile.models`` that name no model."""


@dataclass(frozen=True)
class Part:
    """An entry of ``EXTRACTORS`` or ``SEGMENTERS``: ``part(profile)`` builds it.

    ``models`` are the fields of ``profile.models`` it loads, ``settings`` the fields of its section that change its
    results ("sd_": all that begin so). Both go into the library's keys, as does the code of the module that defines
    ``build``. None counts all of them: always right, but then a change of any one builds the classes again, and
    ``ovdiff doctor`` cannot say which models it needs. ``version`` takes the code's place; change it with the results.
    """

    build: Callable[[Profile], Any]
    models: tuple[str, ...] | None = None
    settings: tuple[str, ...] | None = None
    version: str | None = None
    defined: tuple[str, str] = field(init=False, repr=False, compare=False)
    """Name and text of the module that defines ``build``, as it is when the entry is made."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "defined", _defined(self.build))

    def __call__(self, profile: Profile) -> Any:
        return self.build(profile)

    def depends_on(self, profile: Profile, section: str) -> tuple[dict[str, str], dict[str, Any]]:
        """(models, settings): its models by field, and its fields of ``section`` with their values.

        Raises ``ProfileError`` if the part declares a model or a setting that no profile has.
        """
        models = {k: v for k, v in dataclasses.asdict(profile.models).items() if k not in NOT_MODELS}
        used = {k: v for k, v in models.items() if v} if self.models is None else chosen_fields(models, self.models)
        settings = dataclasses.asdict(getattr(profile, section))
        return used, settings if self.settings is None else chosen_fields(settings, self.settings)


def chosen_fields(table: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a section's ``table`` that ``names`` stand for, as in :class:`Part`, with their values."""
    chosen = {}
    for name in names:
        found = {k: v for k, v in table.items() if k == name or (name.endswith("_") and k.startswith(name))}
        if not found:
            raise ProfileError(f"A part declares {name!r}, which no profile has; {legal(name, table)}")
        chosen |= found
    return chosen


def chosen_part(field: str, name: str, registry: dict[str, Part]) -> Part:
    """The part in ``registry`` that a profile's ``field`` calls ``name``. ``ProfileError`` if none, or no ``Part``."""
    if name not in registry:
        raise ProfileError(f"{field} names {name!r}; {legal(name, registry)}")
    if not isinstance(part := registry[name], Part):
        shown = getattr(part, "__name__", None) or type(part).__name__
        raise ProfileError(f"{field} names {name!r}, which is {shown} and not a Part; register Part({shown}).")
    return part


def _defined(build: Any) -> tuple[str, str]:
    build = getattr(build, "func", build)  # of a partial what it calls
    thing = getattr(build, "__self__", None) or build  # of a classmethod its class
    thing = thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)
    methods = [it for it in vars(thing).values() if inspect.isfunction(it)] if inspect.isclass(thing) else []
    # A notebook has no file, and Python 3.11 finds no class there: its functions have to do.
    for texts in ([inspect.getmodule(thing)], [thing], methods):
        with suppress(OSError, TypeError):
            return thing.__module__, "\n".join(textwrap.dedent(inspect.getsource(text)) for text in texts)
    return thing.__module__, ""
