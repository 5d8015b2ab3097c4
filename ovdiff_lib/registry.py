"""What a registry of exchangeable parts holds: how a part is built, and what its results depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovdiff_lib.profiles import Profile


@dataclass(frozen=True)
class Part:
    """An entry of ``EXTRACTORS`` or ``SEGMENTERS``: ``part(profile)`` builds it.

    ``models`` are the fields of ``profile.models`` it loads, ``settings`` the fields of its section that change its results ("sd_" stands
    for every field that begins so). Both go into the prototype library's keys. None, the default, counts all of them: always right, but
    then a change of any one builds the classes again.
    """

    build: Callable[[Profile], Any]
    models: tuple[str, ...] | None = None
    settings: tuple[str, ...] | None = None

    def __call__(self, profile: Profile) -> Any:
        return self.build(profile)

    def depends_on(self, profile: Profile, section: str) -> tuple[dict[str, str], dict[str, Any]]:
        """(models, settings): the identifiers of its models by field, and its fields of ``section`` with their values."""
        models = {f.name: getattr(profile.models, f.name) for f in dataclasses.fields(profile.models)
                  if f.name not in NOT_MODELS and (
                      f.name in self.models if self.models is not None else _is_here(getattr(profile.models, f.name)))}
        table = dataclasses.asdict(getattr(profile, section))
        if self.settings is not None:
            table = {k: v for k, v in table.items() if any(k == s or (s.endswith("_") and k.startswith(s)) for s in self.settings)}
        return models, table


def _is_here(identifier: str) -> bool:
    """Whether a field names a model that could have been loaded: a part that declares none needs none that it does not use."""
    from ovdiff_lib.errors import ModelNotAvailable
    from ovdiff_lib.models import resolve_model

    try:
        return bool(identifier and resolve_model(identifier))
    except ModelNotAvailable:
        return False


NOT_MODELS = ("device", "dtype", "download")
"""Fields of ``profile.models`` that name no model."""
