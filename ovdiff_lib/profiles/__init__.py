"""Profiles: the values of a run (``mini``, ``paper``) and their validation."""
