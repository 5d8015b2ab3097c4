"""The explain panel: for every pixel of a few images, which prototype decided it and which support regions that
prototype came from, as ``Segmentation.explain`` says it. The report embeds it as JSON, which a script looks up."""

import base64
import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovdiff_lib.errors import InputError
from ovdiff_lib.explain import absent_classes
from ovdiff_lib.files import write_atomic
from ovdiff_lib.overlay import colours_of
from ovdiff_lib.profiles.schema import Filters
from ovdiff_lib.segmentation import Explanation, Segmentation
from ovdiff_lib.types import SupportSet
from ovdiff_lib.workbench.reproduce import read_json

FORMAT = "ovdiff panel 2"  # a reader refuses others
NONE = 65535  # in the maps: no prototype (a constant background score decided), or no other class that was considered

MOST_IMAGES, MOST_REGIONS, THUMBNAIL = 20, 3, 64
"""Images of a panel; support regions shown of a prototype, those of most features; long side of a support image."""


def panel_data(results: Mapping[str, Segmentation], supports: Iterable[SupportSet], filters: Filters,
               caption: str) -> dict[str, Any]:
    """What the panel shows of segmented images, as plain data for JSON.

    ``results`` are the segmentations by title, ``supports`` the support sets of each class that the pre-filter kept in
    some image. Of each image: its picture, every queried class, and four maps u16 (H, W), deflated and in base64:
    ``labels``, ``winner`` (a number in ``prototypes``), ``runner_up`` (a label) and ``margin`` (in thousandths),
    :data:`NONE` where there is none. Raises ``InputError`` without a bank or a support set that fits.
    """
    pool = _Pool({support.category.name: support for support in supports})
    images = [_image(title, result, pool, filters) for title, result in results.items()]
    return {"format": FORMAT, "caption": caption, "images": images, "pictures": list(pool.pictures),
            "prototypes": [json.loads(text) for text in pool.prototypes]}


def chosen_images(shown: Sequence[Sequence[str]], kept: Sequence[Sequence[str]]) -> list[int]:
    """Numbers of the images worth a panel, ascending, by the classes each has ``shown`` and the filter ``kept``: the
    first in which one that is there was dropped, then, for every class that none of these shows, the first with it."""
    chosen = [i for i, (there, left) in enumerate(zip(shown, kept, strict=True)) if set(there) - set(left)][:1]
    seen = {name for i in chosen for name in shown[i]}
    for i, there in enumerate(shown):
        if set(there) - seen and len(chosen) < MOST_IMAGES:
            chosen.append(i)
            seen |= set(there)
    return sorted(chosen)


def write_panel(path: Path, data: dict[str, Any]) -> None:
    """Write :func:`panel_data` as JSON; the report embeds every such file in ``<outputs>/explain``."""
    write_atomic(path, json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode())


def read_panel(path: Path) -> dict[str, Any]:
    """The data that :func:`write_panel` wrote. Raises ``InputError`` for any other file."""
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise InputError(f"{path.name} is no explain panel that this version can read; run its notebook again.")
    return data


class _Pool:
    """Prototypes (as JSON) and support pictures of all images, each once and by its number."""

    def __init__(self, supports: Mapping[str, SupportSet]) -> None:
        self.supports, self.prototypes, self.pictures = supports, {}, {}

    def number(self, why: Explanation) -> int:
        """The number of the prototype that ``why`` names; :data:`NONE` for a constant background score."""
        if why.kind is None:
            return NONE
        support = self.supports.get(why.category)
        if support is None or max(why.images, default=-1) >= len(support):
            raise InputError(f"The panel needs the support set that the prototypes of {why.category!r} were built "
                             f"from, with image {max(why.images, default=0)}; add it to supports.")
        regions = []
        for image, mask in zip(why.images[:MOST_REGIONS], why.masks, strict=False):
            picture = self.pictures.setdefault(_picture(support.images[image], THUMBNAIL), len(self.pictures))
            regions.append({"picture": picture, "image": image, "features": int(mask.sum()),
                            "mask": base64_of(np.packbits(mask).tobytes())})  # eight pixels a byte
        # Found again by content: two runs may call different prototypes by one number.
        entry = json.dumps({"category": why.category, "kind": why.kind, "region": why.region, "index": why.index,
                            "extractor": why.extractor, "images": len(why.images), "grid": why.masks.shape[1:],
                            "support": regions})
        return self.prototypes.setdefault(entry, len(self.prototypes))


def _image(title: str, result: Segmentation, pool: _Pool, filters: Filters) -> dict[str, Any]:
    """One image's entry: its maps, its picture, its queried classes."""
    labels, scores = result.labels, result.scores
    best = np.take_along_axis(scores, labels[None], 0)[0]
    np.put_along_axis(scores, labels[None], -np.inf, 0)
    alone = np.isinf(scores.max(0))
    margin = np.where(alone, 0, best - scores.max(0)).clip(min=0)
    # One explanation for each prototype that decided something: that of its first pixel.
    _, first, inverse = np.unique(result.winner.reshape(2, -1), axis=1, return_index=True, return_inverse=True)
    numbers = [pool.number(result.explain(*divmod(int(pixel), labels.shape[1]))) for pixel in first]
    maps = {"labels": labels, "winner": np.array(numbers)[inverse], "margin": np.round(1000 * margin),
            "runner_up": np.where(alone, NONE, scores.argmax(0))}
    return {"title": title, "size": labels.shape, "picture": _picture(result.image, max(labels.shape)),
            "classes": result.class_names, "colours": colours_of(result.class_names).tolist(),
            **{name: base64_of(zlib.compress(values.astype("<u2").tobytes(), 9)) for name, values in maps.items()},
            "queried": _queried(result, filters)}


def _queried(result: Segmentation, filters: Filters) -> list[dict[str, Any]]:
    """Every queried class, the most probable first, CLIP's probability (None without filter), why it was dropped."""
    dropped = {absent.name: absent.reason for absent in absent_classes(result, filters)}
    found = zip(result.vocabulary.names, result.filter_scores, strict=True)
    queried = [{"name": name, "label": label, "reason": dropped.get(name, ""),
                "probability": float(f"{probability:.3g}") if np.isfinite(probability) else None}
               for label, (name, probability) in enumerate(found, 1)]
    return sorted(queried, key=lambda entry: -(entry["probability"] or 0))


def _picture(image: np.ndarray, side: int) -> str:
    """A data URI of u8 (H, W, 3), scaled down so that the long side is at most ``side``."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85, method=6)
    return "data:image/webp;base64," + base64_of(buffer.getvalue())


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()
