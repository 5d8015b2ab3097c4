"""Step 3a, Sec. 3.4: filters between the bank and the matching: categories that the image does not show, prototypes that are stuff."""

from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.filters.stuff import StuffFilter, filter_stuff
from ovdiff_lib.workbench.data.things import kinds, with_kinds

__all__ = ["CategoryFilter", "StuffFilter", "filter_stuff", "kinds", "with_kinds"]
