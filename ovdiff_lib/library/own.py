"""Own pictures as support: a user's photographs of a class in place of drawings, with masks of the object or without.

The library keeps of each the square around the object, as drawings show theirs. Without masks the profile's segmenter
proposes some and CLIP says which is the class, by the object alone on grey. Chosen on scenes of the mini world: what
agrees best with other pictures' proposals was right less often, needs several, and takes shared surroundings.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.files import shown
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.images import list_images, read_image, resize_short_side
from ovdiff_lib.masks import Segmenter
from ovdiff_lib.masks.select import proposals
from ovdiff_lib.matching.windows import Box, crop
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.prototypes.build import resize_masks
from ovdiff_lib.types import ForegroundBackground, SupportSet

MASK = "_mask.png"
"""In a folder ``room_mask.png`` is the mask of ``room.jpg``."""


@dataclass(frozen=True)
class OwnPictures:
    """Pictures of a category, of any sizes, as :func:`~ovdiff_lib.images.read_image` takes them, and the mask of each,
    a file or whole numbers or bool (H, W), 0 where the object is not; None if they have none. They are read whenever
    they are gone through. ``InputError`` for what cannot be read or does not fit together."""

    category: Category
    pictures: list[Any]
    masks: list[Any] | None

    @classmethod
    def of(cls, category: Category, pictures: Any, masks: Any = None) -> OwnPictures:
        """From lists, or the path of a folder of pictures with masks beside them (:data:`MASK`) or none."""
        if isinstance(pictures, (str, Path)):
            pictures = [path for path in list_images(pictures) if not path.name.endswith(MASK)]
            beside = [path.with_name(path.stem + MASK) for path in pictures]
            masks = beside if masks is None and any(path.exists() for path in beside) else masks
        if not isinstance(pictures, Iterable) or getattr(pictures, "ndim", 4) < 4:
            raise InputError(f"The pictures of {category.name!r} must be a list, even of one, or a folder.")
        own = cls(category, list(pictures), None if masks is None else list(masks))
        if not own.pictures:
            raise InputError(f"There is no picture of {category.name!r}; give one, or only words to have it drawn.")
        if own.masks is not None and len(own.masks) != len(own.pictures):
            raise InputError(f"There are {len(own.masks)} masks of {len(own.pictures)} pictures of {category.name!r}; "
                             "give each picture its own, in the same order, or none of them.")
        return own

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Pixels u8 (H, W, 3) and mask bool (H, W) of each."""
        for number, source in enumerate(self.pictures):
            image, mask = read_image(source), None
            if self.masks is not None:
                named = shown(source) if isinstance(source, (str, Path)) else f"{number} of {self.category.name!r}"
                mask = self.masks[number]
                whole = isinstance(mask, np.ndarray) and mask.dtype.kind in "biu"
                mask = read_image((mask != 0).astype(np.uint8) if whole else mask).any(2)
                if mask.shape != image.shape[:2]:
                    raise InputError(f"The mask of picture {named} is {mask.shape[0]} x {mask.shape[1]} pixels and the "
                                     f"picture {image.shape[0]} x {image.shape[1]}; give one of the same size.")
                if not mask.any():
                    raise InputError(f"The mask of picture {named} is 0 everywhere; mark the object, or leave "
                                     "the picture out.")
            yield image, mask

    def digest(self) -> str:
        """Hash of all pixels and masks, whatever files they come from."""
        found = hashlib.sha256()
        for array in (array for both in self for array in both):
            found.update(repr(np.shape(array)).encode() + (b"" if array is None else array.tobytes()))
        return found.hexdigest()


def with_pictures(ovdiff: Any, classes: dict[str, Any], masks: dict[str, Any], stuff: Iterable[str] | str,
                  key_of: Callable[[Any, OwnPictures], tuple[str, dict]]) -> Vocabulary:
    """The vocabulary of ``classes``, of which each is words, to be drawn, a category as it is, or pictures with
    ``masks`` or none, which the library of ``ovdiff`` then keeps under the key that ``key_of`` says."""
    if lost := [name for name in masks if isinstance(classes.get(name, ""), str)]:
        raise InputError(f"There are masks of {lost[0]!r} and no pictures; give both, or neither to have it drawn.")
    made = []
    for category, (name, given) in zip(Vocabulary.of(classes, stuff), classes.items(), strict=True):
        if isinstance(given, (str, Category)):
            made.append(given if isinstance(given, Category) else replace(category, prompt=given))
            continue
        own = OwnPictures.of(category, given, masks.get(name))
        key, made_from = key_of(ovdiff.profile, own)
        support = cache(partial(own_support, category, own, ovdiff))
        ovdiff.library.get_or_make("support", key, lambda made=support: made()[0], made_from)
        ovdiff.library.get_or_make("masks", key, lambda made=support: made()[1], made_from)
        made.append(replace(category, pictures=key))
    return Vocabulary(tuple(made))


@undisturbed()
def own_support(category: Category, pictures: Iterable[Sequence[np.ndarray | None]], ovdiff: Any
                ) -> tuple[SupportSet, ForegroundBackground]:
    """Pictures u8 (H, W, 3) of any sizes, each with its foreground bool (H, W), or None to have it chosen, and its
    background, or all the rest: for ``OVDiff.prototypes``, as if drawn, the square around each object and its masks."""
    side, squares, sources = ovdiff.profile.support.image_size, [], []
    for number, (image, front, *behind) in enumerate(pictures):
        chosen = front is None
        if chosen:
            front = choose_mask(image, category.prompt, side, ovdiff.segmenter, ovdiff.category_filter)
        if front is None:
            warnings.warn(f"{ovdiff.segmenter.name!r} proposes no mask in picture {number} of {category.name!r}, which "
                          "is left out; give it a mask, or choose another masks.segmenter.", stacklevel=3)
            continue
        top, left, height, width = box = square_around(front)
        masks = np.stack([front, *(behind or [~front])])[:, top : top + height, left : left + width]
        small = resize_masks(masks, (side, side)).numpy()
        squares.append((crop(image, box, side), small[0], small[1] & ~small[0]))
        sources.append(ovdiff.segmenter.name if chosen else "given")
    if not squares:
        raise InputError(f"{ovdiff.segmenter.name!r} proposes no mask in any picture of {category.name!r}; give masks, "
                         "or choose another masks.segmenter.")
    pixels, inside, around = map(np.stack, zip(*squares, strict=True))
    support = SupportSet(category, pixels, None, np.arange(len(pixels), dtype=np.int64))
    return support, ForegroundBackground(inside, around, tuple(sources))


@undisturbed()
def choose_mask(image: np.ndarray, words: str, side: int, segmenter: Segmenter,
                judge: CategoryFilter) -> np.ndarray | None:
    """Of what the segmenter proposes in an image u8 (H, W, 3) the mask bool (H, W) that CLIP finds most like ``words``;
    None without a proposal. Large images are looked at in twice the size of drawings, ``side``."""
    small = resize_short_side(image, min(2 * side, *image.shape[:2]))
    masks = [mask for mask in np.asarray(next(proposals(segmenter, small[None], words)), bool) if mask.any()]
    if not masks:
        return None
    text = judge.text([judge.settings.category_prompt.replace("{names}", words)])[0]
    alone = (crop(np.where(mask[..., None], small, np.uint8(127)), square_around(mask), side) for mask in masks)
    best = int(np.argmax([float(judge.embed_image(one) @ text) for one in alone]))
    return np.asarray(Image.fromarray(masks[best]).resize(image.shape[1::-1], Image.Resampling.NEAREST))


def square_around(mask: np.ndarray) -> Box:
    """The square that shows a mask bool (H, W) as drawings show their object: half as wide again as it, or as wide as
    fits, and there where it holds the most of it, of equal places the middle one."""
    extent = max(int(np.ptp(np.flatnonzero(mask.any(axis)))) + 1 for axis in (0, 1))
    side, starts = min(*mask.shape, -(-3 * extent // 2)), []
    for axis in (1, 0):
        held = np.convolve(mask.sum(axis), np.ones(side, int), "valid")
        best = np.flatnonzero(held == held.max())
        starts.append(int(best[len(best) // 2]))
    return starts[0], starts[1], side, side
