"""OVDiff: training-free open-vocabulary segmentation from words, as a small library and a set of notebooks.

    from ovdiff_lib import OVDiff
    ovdiff = OVDiff("mini")
    bank = ovdiff.build(["cat", "sofa"])
    result = ovdiff.segment("room.jpg", bank)

Importing the package loads no model and opens no file.
"""

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError, ModelNotAvailable, OVDiffError, ProfileError
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import PrototypeBank, SupportSet

__version__ = "0.1.0"
__all__ = ["Category", "InputError", "ModelNotAvailable", "OVDiff", "OVDiffError", "ProfileError", "PrototypeBank",
           "Segmentation", "SupportSet", "Vocabulary"]


def __getattr__(name: str):
    if name == "OVDiff":  # loaded when first asked for: it imports torch
        from ovdiff_lib.pipeline import OVDiff

        return OVDiff
    raise AttributeError(f"module 'ovdiff_lib' has no attribute {name!r}")
