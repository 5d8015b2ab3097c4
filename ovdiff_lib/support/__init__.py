"""Step 1, Sec. 3.1 and 3.2: draw the support images of a category and record which pixels its name attends to."""

from ovdiff_lib.support.attribution import class_token_positions, record_attribution
from ovdiff_lib.support.sampler import sample_support

__all__ = ["class_token_positions", "record_attribution", "sample_support"]
