"""The explain panel: for every pixel of a few images, which prototype decided it and which support regions that
prototype came from, as :func:`ovdiff_lib.segmentation.explain` says it.

``panel_data`` computes it once, ``write_panel`` saves it as JSON, the report embeds that JSON and a page's script only
looks it up.
"""

from __future__ import annotations

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

FORMAT = "ovdiff panel 1"
"""What the JSON calls itself; a reader refuses others."""

NONE = 65535
"""In the maps: no prototype (a constant background score decided), or no other class that was considered."""

MAX_SUPPORT = 3
"""Support regions shown of a prototype, those of most features."""


def panel_data(results: Mapping[str, Segmentation] | Sequence[Segmentation],
               supports: Mapping[str, SupportSet] | Iterable[SupportSet],
               filters: Filters | None = None, *, caption: str = "", thumbnail: int = 64,
               longest: int = 640) -> dict[str, Any]:
    """What the panel shows of segmented images, as plain data for JSON.

    Args:
        results: segmentations that keep their bank (those of ``OVDiff.segment``), by title or in order.
        supports: the support sets that the prototypes were built from, one for each class that the pre-filter kept in
            some image; by class name, or the sets themselves.
        filters: the profile's filter settings, for :func:`~ovdiff_lib.explain.absent_classes`.
        caption: a sentence shown above the panel.
        thumbnail: long side of a support image in the panel, pixels.
        longest: of a larger image so many pixels along the long side are shown, evenly spaced.

    Per image: ``labels``, ``winner`` (index into ``prototypes``) and ``runner_up`` (a label) u16 and ``margin`` u8 in
    units of ``step``, each (H, W) deflated and in base64, :data:`NONE` where there is none; the picture; and every
    queried class. Raises ``InputError`` for a segmentation without its bank and a support set that is missing or does
    not fit.
    """
    titled = dict(results) if isinstance(results, Mapping) else {f"image {i}": r for i, r in enumerate(results, 1)}
    sets = supports.values() if isinstance(supports, Mapping) else supports
    pool = _Pool({support.category.name: support for support in sets}, thumbnail)
    images = [_image(title, result, pool, filters, longest) for title, result in titled.items()]
    return {"format": FORMAT, "caption": caption, "images": images, "prototypes": pool.prototypes,
            "pictures": pool.pictures}


def chosen_images(shown: Sequence[Sequence[str]], kept: Sequence[Sequence[str]], dropped: int = 1,
                  most: int = 20) -> list[int]:
    """Numbers of the images worth a panel, ascending, at most ``most``: first ``dropped`` in which a class that is
    there was dropped, then, for every class that none of these shows, the first that shows it. ``shown`` and ``kept``
    hold for each image the classes it shows and those the pre-filter kept."""
    chosen = [i for i, (there, left) in enumerate(zip(shown, kept, strict=True)) if set(there) - set(left)][:dropped]
    seen = {name for i in chosen for name in shown[i]}
    for i, there in enumerate(shown):
        if set(there) - seen and len(chosen) < most:
            chosen.append(i)
            seen |= set(there)
    return sorted(chosen)


def write_panel(path: str | Path, data: dict[str, Any]) -> Path:
    """Write :func:`panel_data` as JSON; the report embeds every such file in ``<outputs>/explain``."""
    write_atomic(path, json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode())
    return Path(path)


def read_panel(path: str | Path) -> dict[str, Any]:
    """The data that :func:`write_panel` wrote. Raises ``InputError`` for any other file."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"The file {Path(path).name} is no explain panel that this version can read; run its notebook "
                         "again.")
    return data


class _Pool:
    """Prototypes and support thumbnails of all images, each kept once."""

    def __init__(self, supports: dict[str, SupportSet], side: int) -> None:
        self.supports, self.side = supports, side
        self.prototypes: list[dict[str, Any]] = []
        self.pictures: list[str] = []
        self._known: dict[str, int] = {}

    def prototype(self, why: Explanation) -> int:
        """Number of the prototype that ``why`` names; :data:`NONE` for a constant background score."""
        if why.kind is None:
            return NONE
        support = self.supports.get(why.category)
        if support is None or max(why.images, default=-1) >= len(support):
            raise InputError(f"The panel needs the support set that the prototypes of {why.category!r} were built "
                             f"from, with image {max(why.images, default=0)}; add it to supports.")
        regions = [{"picture": self._once(_picture(support.images[n], self.side), self.pictures), "image": n,
                    "features": int(mask.sum()), "mask": _text(np.packbits(mask).tobytes())}  # eight pixels a byte
                   for n, mask in list(zip(why.images, why.masks, strict=True))[:MAX_SUPPORT]]
        return self._once({"category": why.category, "kind": why.kind, "region": why.region, "index": why.index,
                           "extractor": why.extractor, "images": len(why.images), "of": len(support),
                           "grid": list(why.masks.shape[1:]), "support": regions}, self.prototypes)

    def _once(self, entry: Any, entries: list[Any]) -> int:
        # By content: banks of two images are other objects, and two runs may call different prototypes by one number.
        key = json.dumps(entry)
        if key not in self._known:
            self._known[key] = len(entries)
            entries.append(entry)
        return self._known[key]


def _image(title: str, result: Segmentation, pool: _Pool, filters: Filters | None, longest: int) -> dict[str, Any]:
    """One image's entry: its maps, its picture, its queried classes."""
    height, width = result.labels.shape
    grid = [max(1, round(side * min(1, longest / max(height, width)))) for side in (height, width)]
    # The centre of each shown pixel, as nearest-neighbour resizing takes it; the identity for a small image.
    rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int)
                     for n, side in zip(grid, (height, width), strict=True))
    shown = np.ix_(rows, columns)
    labels = result.labels[shown]
    runner_up, margin = _seconds(result.scores[(slice(None), *shown)], labels)
    step = max(float(margin.max(initial=0)), 1e-6) / 255
    maps = {"labels": labels, "winner": _winners(result, rows, columns, pool), "runner_up": runner_up}
    return {"title": title, "size": [height, width], "grid": grid, "picture": _picture(result.image, longest),
            "classes": list(result.class_names), "colours": colours_of(result.class_names).tolist(),
            **{name: _text(zlib.compress(values.astype("<u2").tobytes(), 9)) for name, values in maps.items()},
            "margin": _text(zlib.compress(np.round(margin / step).astype(np.uint8).tobytes(), 9)), "step": step,
            "queried": _queried(result, filters)}


def _winners(result: Segmentation, rows: np.ndarray, columns: np.ndarray, pool: _Pool) -> np.ndarray:
    """Number in the pool of the prototype that decided each shown pixel: one explanation for each of them."""
    shown = np.ix_(rows, columns)
    pairs = result.winner[:, *shown].reshape(2, -1)
    _, first, inverse = np.unique(pairs, axis=1, return_index=True, return_inverse=True)
    numbers = [pool.prototype(result.explain(int(rows[p // len(columns)]), int(columns[p % len(columns)])))
               for p in first]
    if len(pool.prototypes) >= NONE:
        raise InputError(f"More than {NONE - 1} prototypes decided pixels of these images; put fewer images into one "
                         "panel.")
    return np.array(numbers)[inverse].reshape(len(rows), len(columns))


def _seconds(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The label that came second at each pixel (:data:`NONE` where none was considered) and how far behind, both (H,
    W)."""
    first = np.take_along_axis(scores, labels[None], 0)[0].astype(np.float64)
    others = scores.copy()
    np.put_along_axis(others, labels[None], -np.inf, 0)
    value = others.max(0).astype(np.float64)
    alone = ~np.isfinite(value)
    return np.where(alone, NONE, others.argmax(0)), np.where(alone, 0, first - np.where(alone, 0, value)).clip(min=0)


def _queried(result: Segmentation, filters: Filters | None) -> list[dict[str, Any]]:
    """Every queried class, the most probable first: CLIP's probability (None where the pre-filter did not run), and the
    reason for which it was dropped ("" where it was kept)."""
    ran = np.isfinite(result.filter_scores).all()
    dropped = {absent.name: absent.reason for absent in absent_classes(result, filters)} if ran else {}
    order = sorted(range(len(result.vocabulary)), key=lambda i: (-float(result.filter_scores[i]) if ran else 0, i))
    return [{"name": result.vocabulary.names[i], "label": i + 1,
             "probability": float(f"{result.filter_scores[i]:.3g}") if ran else None,
             "kept": i in result.kept, "reason": dropped.get(result.vocabulary.names[i], "")} for i in order]


def _picture(image: np.ndarray, side: int) -> str:
    """A data URI of u8 (H, W, 3), scaled down so that the long side is at most ``side``."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85, method=6)
    return "data:image/webp;base64," + _text(buffer.getvalue())


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
