"""What a registry of exchangeable parts holds: how a part is built, and what its results depend on.

The shortest entry is ``"name": Part(Mine)``, where ``Mine(profile)`` is the part; everything else has a default that is
right.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ovdiff_lib.errors import ProfileError

if TYPE_CHECKING:
    from ovdiff_lib.profiles.schema import Profile

NOT_MODELS = ("device", "dtype", "download")
"""Fields of ``profile.models`` that name no model."""


@dataclass(frozen=True)
class Part:
    """An entry of ``EXTRACTORS`` or ``SEGMENTERS``: ``part(profile)`` builds it.

    ``models`` are the fields of ``profile.models`` it loads, ``settings`` the fields of its section that change its
    results ("sd_" stands for every field that begins so). Both go into the prototype library's keys. None, the default,
    counts all of them: always right, but then a change of any one builds the classes again, and ``ovdiff doctor``
    cannot say which models the part needs.

    The code of a part is in those keys, too (:mod:`~ovdiff_lib.keys`): classes are built again after an edit of the
    module that defines it. ``version`` takes the code's place; give one, and change it with the results, where the text
    cannot be had.
    """

    build: Callable[[Profile], Any]
    models: tuple[str, ...] | None = None
    settings: tuple[str, ...] | None = None
    version: str | None = None
    module: str = field(init=False, repr=False, compare=False)
    """Name of the module that defines the part."""
    source: str = field(init=False, repr=False, compare=False)
    """Text of that module as it is when the entry is made; in a notebook that of the function or class, "" where there
    is none."""

    def __post_init__(self) -> None:
        module, source = _defined(self.build)
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "source", source)

    def __call__(self, profile: Profile) -> Any:
        return self.build(profile)

    def depends_on(self, profile: Profile, section: str) -> tuple[dict[str, str], dict[str, Any]]:
        """(models, settings): the identifiers of its models by field, and its fields of ``section`` with their values.

        Raises ``ProfileError`` if the part declares a model or a setting that no profile has.
        """
        models = {k: v for k, v in dataclasses.asdict(profile.models).items() if k not in NOT_MODELS}
        if unknown := set(self.models or ()) - set(models):
            raise ProfileError(f"A part declares the model {min(unknown)!r}, which no profile has; name one of "
                               f"{', '.join(models)}.")
        models = {k: v for k, v in models.items() if (k in self.models if self.models is not None else v)}
        return models, chosen_settings(profile, section, self.settings)


def chosen_settings(profile: Profile, section: str, names: tuple[str, ...] | None) -> dict[str, Any]:
    """The fields of a section that ``names`` stand for, as in :class:`Part`, with their values."""
    table = dataclasses.asdict(getattr(profile, section))
    if names is None:
        return table
    chosen = {}
    for name in names:
        found = {k: v for k, v in table.items() if k == name or (name.endswith("_") and k.startswith(name))}
        if not found:
            raise ProfileError(f"A part declares the setting {name!r}, which {section} does not have; name one of "
                               f"{', '.join(table)}, or how several begin, up to an underscore.")
        chosen |= found
    return chosen


def check_part(registry: str, name: str, part: Any) -> None:
    """``ProfileError`` if an entry of a registry is no :class:`Part`."""
    if not isinstance(part, Part):
        shown = getattr(part, "__name__", None) or type(part).__name__
        raise ProfileError(f"{registry}[{name!r}] is {shown}, which is not a Part; wrap it: Part({shown}).")


def _defined(build: Any) -> tuple[str, str]:
    """Name and text of the module that defines ``build``; of a notebook, which has no file, the text of the function or
    class alone."""
    build = build.func if isinstance(build, functools.partial) else build
    thing = getattr(build, "__self__", None) or build  # of a classmethod its class
    thing = thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)
    methods = vars(thing).values() if inspect.isclass(thing) else ()
    for texts in ([inspect.getmodule(thing)], [thing], [method for method in methods if inspect.isfunction(method)]):
        with suppress(OSError, TypeError):
            return thing.__module__ or "", "\n".join(textwrap.dedent(inspect.getsource(text)) for text in texts)
    return thing.__module__ or "", ""
