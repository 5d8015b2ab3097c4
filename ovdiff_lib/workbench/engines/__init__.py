"""Engines: one worker's code run over many tasks, in this process, in several, or on the machines of a Ray cluster.

:class:`LocalEngine` and :class:`RayEngine` have one method, :meth:`~ovdiff_lib.workbench.engines.base.Engine.run`; :func:`build_classes` builds
prototypes with either, :func:`~ovdiff_lib.workbench.evaluation.parallel.evaluate_on` segments and counts. Ray is imported when a RayEngine starts.
"""

from ovdiff_lib.workbench.engines.base import Engine, Outcome
from ovdiff_lib.workbench.engines.local import LocalEngine
from ovdiff_lib.workbench.engines.ray import RayEngine

__all__ = ["Engine", "LocalEngine", "Outcome", "RayEngine"]
