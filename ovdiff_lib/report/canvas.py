"""Blank figures: drawn without pyplot, so that a notebook's state stays untouched, and still shown by it."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(size: tuple[float, float], dpi: int, **options: Any) -> Figure:
    """An empty figure of ``size`` (width, height) in inches with a canvas of its own; a notebook cell that ends in it shows it."""
    return _kind()(figsize=size, dpi=dpi, **options)


@functools.cache
def _kind() -> type:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure with a picture for IPython, which knows only those of pyplot."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            FigureCanvasAgg(self)

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.06, facecolor="white")
            return buffer.getvalue()

    return ShownFigure
