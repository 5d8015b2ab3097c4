"""Profiles: the values of a run (``mini``, ``paper``) and their validation."""

from ovdiff_lib.profiles.profile import Profile, available, load_profile

__all__ = ["Profile", "available", "load_profile"]
