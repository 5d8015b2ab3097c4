"""What a registry of exchangeable parts holds: how a part is built, and what its results depend on.

The shortest entry is ``"name": Part(Mine)``, where ``Mine(profile)`` is the part; everything else has a default that is right.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ovdiff_lib.errors import ModelNotAvailable, ProfileError

if TYPE_CHECKING:
    from ovdiff_lib.profiles.schema import Profile

NOT_MODELS = ("device", "dtype", "compile", "channels_last", "download")
"""Fields of ``profile.models`` that name no model."""

NEVER_HUB_IDS = ("open_clip", "open_clip_pretrained", "cutler_sha256")
"""Fields of ``profile.models`` whose text, where it is no path, is an architecture, a tag or a checksum."""


@dataclass(frozen=True)
class Part:
    """An entry of ``EXTRACTORS`` or ``SEGMENTERS``: ``part(profile)`` builds it.

    ``models`` are the fields of ``profile.models`` it loads, ``settings`` the fields of its section that change its results ("sd_" stands
    for every field that begins so). Both go into the prototype library's keys. None, the default, counts all of them: always right, but
    then a change of any one builds the classes again, and ``ovdiff doctor`` cannot say which models the part needs.

    ``version`` stands for the part's own code in those keys. By default that is the text of the module that defines ``build`` (for a class
    or its classmethod: the module that defines the class), as it is when the entry is made, so that classes are built again after an edit;
    where there is no such file, as in a notebook, the text of ``build`` alone. Give a ``version``, and change it with the results, where
    the code is spread over several modules or its text cannot be had. Parts of ``ovdiff_lib`` itself have none.
    """

    build: Callable[[Profile], Any]
    models: tuple[str, ...] | None = None
    settings: tuple[str, ...] | None = None
    version: str | None = None
    code: str | None = field(init=False, repr=False, compare=False, default=None)
    """What stands for the part's own code in keys; None for parts of the package and for code whose text cannot be had."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", f"version:{self.version}" if self.version is not None else _code_of(self.build))

    def __call__(self, profile: Profile) -> Any:
        return self.build(profile)

    def depends_on(self, profile: Profile, section: str) -> tuple[dict[str, str], dict[str, Any]]:
        """(models, settings): the identifiers of its models by field, and its fields of ``section`` with their values.

        Raises ``ProfileError`` if the part declares a model or a setting that no profile has.
        """
        fields = {f.name: getattr(profile.models, f.name) for f in dataclasses.fields(profile.models) if f.name not in NOT_MODELS}
        table = dataclasses.asdict(getattr(profile, section))
        for name in self.models or ():
            if name not in fields:
                raise ProfileError(f"A part declares the model {name!r}, which no profile has; name one of {', '.join(fields)}.")
        for name in self.settings or ():
            if not any(_matches(name, key) for key in table):
                raise ProfileError(f"A part declares the setting {name!r}, which {section} does not have; name one of {', '.join(table)}, "
                                   "or how several begin, up to an underscore.")
        models = {name: value for name, value in fields.items()
                  if (name in self.models if self.models is not None else _is_here(name, value))}
        if self.settings is not None:
            table = {key: value for key, value in table.items() if any(_matches(name, key) for name in self.settings)}
        return models, table


def check_part(registry: str, name: str, part: Any) -> None:
    """``ProfileError`` if an entry of a registry is no :class:`Part`."""
    if not isinstance(part, Part):
        shown = getattr(part, "__name__", None) or type(part).__name__
        raise ProfileError(f"{registry}[{name!r}] is {shown}, which is not a Part; wrap it: Part({shown}).")


def _matches(declared: str, key: str) -> bool:
    return key == declared or (declared.endswith("_") and key.startswith(declared))


def _is_here(name: str, identifier: str) -> bool:
    """Whether a field names a model that could have been loaded: a part that declares none needs none that it does not use."""
    from ovdiff_lib.networks.identity import model_identity, resolve_model

    try:
        if not identifier or not isinstance(resolve_model(identifier), str):
            return bool(identifier)
        return name in NEVER_HUB_IDS or not model_identity(identifier).endswith("@not-cached")
    except (ModelNotAvailable, ValueError):  # the hub's library: no such id can be
        return False


def _code_of(build: Any) -> str | None:
    """Hash of the text that defines ``build``; None within this package, and where there is no text."""
    build = getattr(build, "func", build)  # of functools.partial
    owner = getattr(build, "__self__", None)  # of a classmethod the class, of a method the object
    defined = build if owner is None else owner
    if not inspect.isroutine(defined) and not inspect.isclass(defined):
        defined = type(defined)
    module = getattr(defined, "__module__", None) or ""
    if build is None or module.partition(".")[0] == __name__.partition(".")[0]:
        return None
    methods = [vars(defined)[name] for name in sorted(vars(defined))] if inspect.isclass(defined) else []
    methods = [getattr(method, "__func__", method) for method in methods]
    text = _source(inspect.getmodule(defined)) or _source(defined) or "\n".join(_source(m) for m in methods if inspect.isfunction(m))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}" if text else None


def _source(thing: Any) -> str:
    """The text of a module, class or function; "" if it cannot be had."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""
