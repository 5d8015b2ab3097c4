"""Whatever bytes are offered as an image and whatever text as class names: a valid result, or ``InputError`` with one sentence.

Normal runs try the same 500 examples of each kind every time; ``OVDIFF_FUZZ=10000`` tries that many new ones.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import signal
import struct
import unicodedata
import zlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features
from PIL.PngImagePlugin import PngInfo
from sentences import one_sentence

from ovdiff_lib import pipeline
from ovdiff_lib.categories import MAX_NAME, Vocabulary
from ovdiff_lib.cli.main import main
from ovdiff_lib.errors import InputError
from ovdiff_lib.images import FORMATS, MAX_PIXELS, read_image

COUNT = os.environ.get("OVDIFF_FUZZ", "")
FUZZ = settings(max_examples=int(COUNT or 500), deadline=None, derandomize=not COUNT, database=None, print_blob=True,
                suppress_health_check=list(HealthCheck))
SECONDS = 60
"""No image may take longer; the machine may be busy, and the largest image allowed takes seconds."""


class Hang(BaseException):
    """No ``Exception``, which a reader could take for a damaged file."""


@pytest.fixture(scope="module", autouse=True)
def alarm():
    def stop(*_):
        raise Hang(f"still busy after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.signal(signal.SIGALRM, before)


def check_image(source) -> np.ndarray | None:
    """What :func:`read_image` makes of ``source``, checked; None where it refuses it, in one sentence."""
    try:
        signal.alarm(SECONDS)
        pixels = read_image(source)
    except InputError as error:
        return one_sentence(str(error))
    finally:
        signal.alarm(0)
    assert type(pixels) is np.ndarray and pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS and pixels.flags.writeable and pixels.flags.c_contiguous
    return pixels


# ---------------------------------------------------------------------- images

def _written(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _samples() -> dict[str, bytes]:
    """Small files of every format that is read, in the variants that decoders treat apart."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((37, 23), Image.BICUBIC))
    rgb, grey = Image.fromarray(smooth), Image.fromarray(smooth[..., 0])
    rgba = Image.fromarray(np.dstack([smooth, smooth[..., 1]]))
    deep = Image.fromarray(smooth[..., 0].astype(np.uint16) * 257)
    exif, note = Image.Exif(), PngInfo()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    note.add_text("comment", "text " * 20, zip=True)
    frames = [rgb.rotate(90 * i) for i in range(1, 3)]
    made = {
        "png": _written(rgb, "PNG", pnginfo=note, exif=exif), "png-alpha": _written(rgba, "PNG"), "png-16": _written(deep, "PNG"),
        "png-palette": _written(rgb.quantize(16), "PNG", transparency=3), "png-bits": _written(grey.convert("1"), "PNG"),
        "apng": _written(rgb, "PNG", save_all=True, append_images=frames), "jpeg": _written(rgb, "JPEG", exif=exif),
        "jpeg-progressive": _written(rgb, "JPEG", progressive=True, quality=50), "jpeg-grey": _written(grey, "JPEG"),
        "jpeg-cmyk": _written(rgb.convert("CMYK"), "JPEG"), "webp": _written(rgb, "WEBP", exif=exif),
        "webp-lossless": _written(rgba, "WEBP", lossless=True), "webp-animated": _written(rgb, "WEBP", save_all=True, append_images=frames),
        "gif": _written(rgb, "GIF"), "gif-animated": _written(rgb, "GIF", save_all=True, append_images=frames, transparency=0),
        "tiff": _written(rgb, "TIFF", exif=exif), "tiff-lzw": _written(rgb, "TIFF", compression="tiff_lzw"),
        "tiff-deflate": _written(rgba, "TIFF", compression="tiff_adobe_deflate"), "tiff-16": _written(deep, "TIFF"),
        "tiff-float": _written(grey.convert("F"), "TIFF"), "bmp": _written(rgb, "BMP"), "bmp-palette": _written(rgb.quantize(16), "BMP"),
        "ppm": _written(rgb, "PPM"), "pgm-text": b"P2 3 2 255\n" + b" ".join(b"%d" % v for v in range(6)), "ico": _written(rgba, "ICO"),
        "tga": _written(rgb, "TGA"), "tga-rle": _written(rgba, "TGA", compression="tga_rle"), "pcx": _written(rgb, "PCX"),
        "mpo": _written(rgb, "MPO", save_all=True, append_images=frames), "dib": _written(rgb, "DIB")}
    return made | {kind: _written(rgb, kind) for kind, name in (("JPEG2000", "jpg_2000"), ("AVIF", "avif")) if features.check(name)}


SAMPLES = _samples()

files = st.sampled_from(sorted(SAMPLES)).map(SAMPLES.get)
place = st.floats(0, 1)
byte = st.sampled_from([0, 1, 0x7F, 0x80, 0xFE, 0xFF]) | st.integers(0, 255)
edits = st.lists(st.one_of(
    st.lists(byte, min_size=1, max_size=8).flatmap(lambda new: st.tuples(place, st.just(len(new)), st.just(bytes(new)))),
    st.tuples(place, st.integers(0, 60) | st.just(10**9), st.just(b"") | st.binary(max_size=40) | files)), min_size=1, max_size=6)
"""Where in [0, 1], how many bytes go, and which come instead."""


def edited(data: bytes, changes) -> bytes:
    for where, removed, new in changes:
        at = int(where * max(0, len(data) - 1))
        data = data[:at] + new + data[at + removed:]
    return data


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    at, found = 8, []
    while at < len(data):
        length = int.from_bytes(data[at:at + 4], "big")
        found.append((data[at + 4:at + 8], data[at + 8:at + 8 + length]))
        at += 12 + length
    return found


def png_of(chunks) -> bytes:
    parts = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def offer(tmp_path_factory):
    """``offer(data)``: :func:`check_image` of a file with that content. All of them together may not take gigabytes."""
    before, path = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, tmp_path_factory.mktemp("fuzz") / "offered.png"

    def check(data: bytes) -> np.ndarray | None:
        path.write_bytes(data)
        return check_image(path)

    yield check
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * 2**20  # KiB; an image of 100 million pixels takes most of it


def test_the_samples_are_images_of_every_format(offer):
    assert offer(SAMPLES["tiff-float"]) is None  # of unknown range
    shapes = {"pgm-text": (2, 3), **dict.fromkeys(("png", "jpeg", "webp", "tiff"), (37, 23))}  # the four are turned
    for name in SAMPLES.keys() - {"tiff-float"}:
        pixels = offer(SAMPLES[name])
        assert pixels is not None and (name == "ico" or pixels.shape[:2] == shapes.get(name, (23, 37))), name
    kinds = {Image.open(io.BytesIO(data)).format for data in SAMPLES.values()}
    assert kinds - {"MPO"} == set(FORMATS) & set(Image.OPEN)  # which is how Pillow calls a JPEG of several pictures


def test_formats_beyond_the_list_are_not_even_tried(offer):
    """PostScript is a program; that a file of it is called .png must not start Ghostscript."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 5\n%%EndComments\n(made) (w) file closefile\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(program)) as image:
        assert image.format == "EPS"  # so it is the list that refuses it
    assert offer(program) is None


@FUZZ
@given(data=files, changes=edits)
def test_damaged_images(offer, data, changes):
    offer(edited(data, changes))


@FUZZ
@given(data=st.sampled_from([name for name in sorted(SAMPLES) if "png" in name]).map(SAMPLES.get), which=place, changes=edits,
       order=st.randoms(use_true_random=False))
def test_damaged_png_chunks_with_sums_that_hold(offer, data, which, changes, order):
    """Damage that the sums of the format would reveal at once hides what comes after; here they are made anew."""
    chunks = png_chunks(data)
    index = int(which * (len(chunks) - 1))
    name, body = chunks[index]
    chunks[index] = (name, edited(body, changes) if body else body)
    if order.random() < 0.3:
        chunks.insert(order.randrange(1, len(chunks)), chunks[order.randrange(len(chunks))])
    offer(png_of(chunks))


MAGIC = [
    b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\x20\0\0\0WEBPVP8 ", b"RIFF\x20\0\0\0WEBPVP8X", b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08", b"II+\0\x08\0\0\0", b"BM", b"P6 ", b"P7\n", b"\0\0\1\0\1\0", b"\x0a\x05\x01\x08", b"\0\0\0\x0cjP  \r\n\x87\n",
    b"\xff\x4f\xff\x51\0\x2f", b"\0\0\0\x1cftypavif", b"%!PS-Adobe-3.0 EPSF-3.0\n"]


@FUZZ
@given(start=st.sampled_from(MAGIC), data=st.binary(max_size=600))
@example(start=b"", data=b"")
@example(start=b"P6 ", data=b"99999 99999 255 ")
@example(start=b"BM", data=bytes(12) + struct.pack("<IIiiHH", 54, 40, 9999, -9999, 1, 24) + bytes(24))
def test_random_bytes(offer, start, data):
    offer(start + data)


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B"]


@FUZZ
@given(mode=st.sampled_from(MODES), width=st.integers(0, 60), height=st.integers(0, 60), noise=st.binary(min_size=1, max_size=64))
def test_pil_images_of_every_mode_and_size(mode, width, height, noise):
    image = Image.new(mode, (width, height))
    if width and height:
        with contextlib.suppress(ValueError):  # modes that cannot be filled from bytes stay black
            size = len(image.tobytes())
            image.frombytes((noise * (size // len(noise) + 1))[:size])
    pixels = check_image(image)
    if pixels is not None:
        assert pixels.shape == (height, width, 3)
    else:
        assert not width or not height or mode in ("F", "I", "La", "LAB")  # ranges and spaces that nobody says


@FUZZ
@given(shape=st.lists(st.integers(0, 9), max_size=4).map(tuple), dtype=st.sampled_from("?bBhHiIqQefdFDSUOmM"))
def test_arrays_of_every_shape_and_type(shape, dtype):
    array = np.zeros(shape, dtype)
    fits = dtype == "B" and array.size and (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4)))
    pixels = check_image(array)
    assert (pixels is not None) == bool(fits)
    if fits:
        assert pixels.shape == (*shape[:2], 3)


@pytest.mark.parametrize(("error", "words"), [
    (MemoryError(), "MemoryError"), (zlib.error("line 1\nline 2"), "line 1 line 2"), (OverflowError("y " * 5000), "y y y y"),
    (Image.DecompressionBombError("more"), "100 million"), (RecursionError("deep"), "deep")])
def test_what_decoders_raise_is_one_sentence(monkeypatch, tmp_path, error, words):
    (tmp_path / "image.png").write_bytes(SAMPLES["png-alpha"])
    monkeypatch.setattr(ImageFile.ImageFile, "load", mock.Mock(side_effect=error))
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read_image(tmp_path / "image.png")
    one_sentence(str(caught.value))


# ---------------------------------------------------------------------- class names

TRICKY = [
    "cat", " cat ", "Cat", "CAT", "background", " Background", "", " ", "\t", "\u200b", "\u202ecat", "cafe\u0301", "caf\u00e9", "\ufb01sh",
    "Straße", "STRASSE", "\u0130", "i\u0307", "\u0390", "\u0958", "\u212b", "\U0001f469\u200d\U0001f680",
    "../../etc/passwd", "a\0b", "a\nb", "a\x85b", "a\u2028b", "x" * 80, "x" * 81, "e\u0301" * 80,
    "\ud800", "\udcff", "--help", "a,b", "{name}", "%s", "\ufeff", "\uffff", "\U0010ffff", "\x1b[31m", "\u202e", "\u0345"]
text = st.text(st.characters(), max_size=90) | st.sampled_from(TRICKY) | st.lists(st.sampled_from(TRICKY), max_size=4).map(",".join)
anything = st.one_of(text, st.none(), st.integers(), st.floats(), st.binary(max_size=5), st.lists(text, max_size=2), st.booleans())
vocabularies = st.one_of(text, st.lists(text, max_size=6), st.lists(anything, max_size=4))


def check_vocabulary(made: Vocabulary) -> None:
    """What every vocabulary promises, and that its names make it again."""
    assert len(made) == len(made.names) >= 1
    for category in made:
        name = category.name
        assert unicodedata.is_normalized("NFC", name) and name == category.prompt and re.sub(r"\s+", " ", name).strip() == name
        assert 1 <= len(name) <= MAX_NAME and category.kind in ("thing", "stuff")
        assert re.search(r"\S", name) and not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", name)
        name.encode()  # what cannot be written to a file is no name
    folded = [name.casefold() for name in made.names]
    assert len(set(folded)) == len(folded) and "background" not in folded
    stuff = [category.name for category in made if category.kind == "stuff"]
    assert Vocabulary.of(list(made.names), stuff) == made == Vocabulary.of(made)
    if not any("," in name for name in made.names):
        assert Vocabulary.of(",".join(made.names), stuff) == made
        assert Vocabulary.of(" ,\t".join(made.names), stuff) == made


@FUZZ
@given(classes=vocabularies, stuff=st.just(()) | text | st.lists(text, max_size=3))
def test_vocabularies_of_anything(classes, stuff):
    try:
        made = Vocabulary.of(classes, stuff)
    except InputError as error:
        one_sentence(str(error))
        return
    check_vocabulary(made)
    given_names = classes.split(",") if isinstance(classes, str) else classes
    # Nothing is dropped or split: one category for each name given, in order, alike but for spaces and composition.
    assert [unicodedata.normalize("NFD", n) for n in made.names] == [
        unicodedata.normalize("NFD", re.sub(r"[\s\x1c-\x1f]+", " ", n).strip()) for n in given_names]


@pytest.fixture(scope="module")
def parse(tmp_path_factory):
    """``parse(*arguments)``: the vocabulary that ``ovdiff build`` would build, or its sentence on stderr."""
    library = tmp_path_factory.mktemp("unused") / "library"
    with mock.patch.object(pipeline.OVDiff, "build", side_effect=KeyboardInterrupt) as build:
        def run(*arguments: str) -> Vocabulary | str:
            build.reset_mock()
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
                code = main(["build", *arguments, "--library", str(library)])
            if build.called:
                assert code == 130
                return build.call_args.args[0]
            assert code == 2 and said.getvalue().startswith("ovdiff: ") and said.getvalue().endswith("\n")
            return said.getvalue()[:-1]

        yield run
    assert not library.exists()


def check_parsed(made: Vocabulary | str) -> bool:
    if isinstance(made, str):
        one_sentence(made)
    else:
        check_vocabulary(made)
    return not isinstance(made, str)


@FUZZ
@given(classes=text, stuff=st.just("") | text)
def test_classes_on_the_command_line(parse, classes, stuff):
    made = parse(f"--classes={classes}", f"--stuff={stuff}")
    if check_parsed(made):
        assert len(made) == classes.count(",") + 1
        stuff_names = {s.strip() for s in stuff.split(",")} - {""}
        assert sum(c.kind == "stuff" for c in made) <= len(stuff_names)
