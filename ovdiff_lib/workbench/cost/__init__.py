"""``ovdiff benchmark``: speed and memory as ratios against a named alternative that runs in the same session, side by side.

A ratio of two things measured in turns says the same on a slow and on a fast machine, which seconds do not. :func:`ratios` gives those of
some scenarios as data; :mod:`~ovdiff_lib.workbench.cost.catalogue` lists the scenarios, :mod:`~ovdiff_lib.workbench.cost.plain` holds what
OVDiff is compared with.
"""

from ovdiff_lib.workbench.cost.ratio import Bound, Check, Ratio, Side

__all__ = ["Bound", "Check", "Ratio", "Side", "ratios"]


def __getattr__(name: str):
    if name == "ratios":  # the scenarios import the networks' libraries; the dataclasses above need none of them
        from ovdiff_lib.workbench.cost.catalogue import ratios

        return ratios
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
