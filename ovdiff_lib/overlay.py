"""Label maps as pictures: one colour a class, by its name, in every figure, overlay, label map and page."""

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DARK_GREY = (40, 40, 46)

TABLE = np.frombuffer(bytes.fromhex(
    "6900ff00ff00ff0000ffd200ff00a50078f00f780000f0c3a55a0fffa5f0a53c5ad2e187ff00ff00c3ff872db4a5e11eff005a00e169"
    "008769785a96ffa59678782dff7800004bf0f0b45a006996ff78ff78e1e1c32d1ec3c3ffa5a500a52d87ff69a5b487ff69c378875a3c"
    "c387a50096a5a50fe13cb400a5f0785aa5ffff875ab4e1b4ffa500ffd2a5e100c3ff69785a4bb4c30069b496697896692d692d78a53c"
    "c35a4b1e5aa5b40f3c69f03ce1e13c965affb487004bc3a5b469c3ff5a2d7887c3f05ac3f0002dd2875aff96b4e1872db4a54b874b69"
    "b4a5ff2db44b87b40fc37878ffc3f069f096d24bf0785a006969f0f0d25a96d2ff5a3cffd269a500d2f07878d2ff1e87b41ea5c396d2"
    "2d96d200965ac34b0087f0b44b6900c3c387c3e15ab4873c2df0e1964b87964b4b788700c369f0873c965ab4d296b46900c387f096ff"
    "ff695ad26987d2b4005a964bc30087e13c6978f069ffc33c4b9600d20f00b43c780f695ae13c4bf0d287964b2dff8778a5e196ffb487"
    "78c34b5aa578a500ff877800ffb4c300ff4ba53c1e00b4b4a5d269782dd2a500b49678a5c3c34bd20fffd25ad296965aff4bff1ed23c"
    "00782d00f0ff96e14bff87e1784bd27887ff87b4f00078d24b693cc34b5a695a1e96f00087963cff4ba5f0782d1e5ac3d200e187e1c3"
    "ff7896ff87c32d87a52d4bd20069ff00960f9669d2e1b4fff0870000d27878c300a5693cff2dc3d2693cffa55ad287d200d200b4d21e"
    "b487e13cb4ffb46996963cff3c9687ff4b005a87b4d24b786996ff00f0a5c3a52d1e963c"), np.uint8).reshape(-1, 3)
"""Colours u8 (192, 3), each farthest, in CIELAB, from all before, background, white and greys; then the first again."""

NAMED = (
    "airplane,bicycle,bird,boat,bottle,bus,car,cat,chair,clock,cow,dog,horse,motorcycle,person,potted plant,"
    "sheep,sofa,television,train,sky,grass,water,road,sand,snow,wall,floor,apple,ball,balloon,banana,bed,"
    "butterfly,cactus,cake,crab,elephant,fish,giraffe,guitar,helicopter,pig,rabbit,rocket,tiger,truck,turtle,"
    "umbrella,zebra").split(",")
"""Classes that have the first colours of the table: the words of the mini world, most of Pascal VOC among them."""


def colours_of(class_names: Sequence[str]) -> np.ndarray:
    """Colours u8 (n, 3) of the class names of a segmentation, background first.

    A name has one colour everywhere: its place in :data:`NAMED`, else its hash. Where two names of a vocabulary would
    share a colour, the one whose hash is larger takes the next that is free.
    """
    names = [name.casefold() for name in class_names[1:]]
    places = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") for name in names}
    places |= {name: NAMED.index(name) for name in names if name in NAMED}
    slots: dict[str, int] = {}
    for name in sorted(places, key=lambda name: (name not in NAMED, places[name], name)):
        slot = places[name] % len(TABLE)
        while slot in slots.values() and len(slots) < len(TABLE):
            slot = (slot + 1) % len(TABLE)
        slots[name] = slot
    return np.array([DARK_GREY, *(TABLE[slots[name]] for name in names)], np.uint8)


def paint(image: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """The image u8 (H, W, 3) under labels (H, W); background (0), the first of ``class_names``, is only dimmed."""
    colours, bare = colours_of(class_names)[labels].astype(np.float32), (labels == 0)[..., None]
    # Under a class the image fades to grey, for its colours would change that of the class.
    grey = np.where(bare, 0, 0.65)
    below = image.astype(np.float32) * (1 - grey) + image.mean(-1, keepdims=True, dtype=np.float32) * grey
    weight = np.where(bare, 0.45, 0.6)
    mixed = below * (1 - weight) + colours * weight
    edge = np.zeros(labels.shape, bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    mixed[edge] = 255
    return mixed.round().astype(np.uint8)


def draw_overlay(image: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """The image u8 (H, W, 3) under its labels int (H, W), small ones enlarged, with a legend of the classes found and
    the share of pixels of each. ``class_names``, background first."""
    height, width = (side * max(1, round(512 / max(labels.shape))) for side in labels.shape)
    enlarged = labels.repeat(height // labels.shape[0], 0).repeat(width // labels.shape[1], 1)
    picture = np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))
    share = np.bincount(labels.ravel(), minlength=len(class_names)) / labels.size
    found = [int(i) for i in np.argsort(-share, kind="stable") if i > 0 and share[i] > 0]
    entries = [(i, f"{class_names[i]}  {100 * share[i]:.0f} %") for i in found] or [(0, "no class found: background")]
    size = max(13, width // 28)
    font, pad = ImageFont.load_default(size), size // 2
    # A long name widens a narrow sheet rather than being cut.
    widest = max(width, *(int(font.getlength(text)) + size + 3 * pad for _, text in entries))
    sheet = Image.new("RGB", (widest, height + pad + len(entries) * (size + pad)), "white")
    sheet.paste(Image.fromarray(paint(picture, enlarged, class_names)))
    draw, colours = ImageDraw.Draw(sheet), colours_of(class_names)
    for y, (index, text) in zip(range(height + pad, sheet.height, size + pad), entries, strict=True):
        draw.rectangle([pad, y + 1, pad + size - 2, y + size - 1], fill=tuple(colours[index].tolist()))
        draw.text((pad + size + pad // 2, y), text, fill="black", font=font, anchor="la")
    return sheet
