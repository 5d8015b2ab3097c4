"""Profiles: the values of a run (``mini``, ``paper``) and their validation."""

from ovdiff_lib.profiles.reading import available, load_profile
from ovdiff_lib.profiles.schema import Profile

__all__ = ["Profile", "available", "load_profile"]
