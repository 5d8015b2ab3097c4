"""Reading: whatever a user has becomes upright RGB or one sentence. Writing: whole files or none."""

import errno
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sentences import refused

from ovdiff_lib import images
from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.images import list_images, read_image, resize_short_side

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


# ---- reading

def test_rgb_comes_back_exactly_from_path_pil_and_array(tmp_path):
    path = save(tmp_path / "ä b.png", RGB)
    for source in (path, str(path), Image.open(path), RGB):
        read = read_image(source)
        assert read.dtype == np.uint8 and read.shape == (5, 7, 3) and (read == RGB).all()
        read[:] = 0  # writable, and not the caller's memory
    assert RGB.any()


@pytest.mark.parametrize(("orientation", "undo"), [
    (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud), (5, lambda a: a.transpose(1, 0, 2)),
    (6, lambda a: np.rot90(a, -1)), (7, lambda a: np.rot90(a.transpose(1, 0, 2), 2)), (8, lambda a: np.rot90(a, 1))])
def test_exif_rotation(tmp_path, orientation, undo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = read_image(save(tmp_path / "turned.png", RGB, exif=exif))
    assert read.shape == undo(RGB).shape and (read == undo(RGB)).all()


def test_grey_and_16_bit_grey(tmp_path):
    grey = RGB[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    assert (read_image(save(tmp_path / "8.png", grey)) == expected).all()
    assert (read_image(grey) == expected).all()
    assert (read_image(save(tmp_path / "16.png", grey.astype(np.uint16) * 257)) == expected).all()
    assert (read_image(save(tmp_path / "16.tif", grey.astype(np.uint16) * 257)) == expected).all()
    assert (read_image(Image.fromarray(grey.astype(np.int32) * 257)) == expected).all()


def test_alpha_is_composited_on_white():
    alpha = np.array([[0, 255, 51]], np.uint8)
    rgba = np.dstack([np.full((1, 3, 3), 100, np.uint8), alpha])
    expected = [255, 100, 224]  # 224 = 255 + (100 - 255) * 51 / 255
    assert read_image(rgba)[0, :, 1].tolist() == expected
    assert read_image(Image.fromarray(rgba).convert("LA"))[0, :, 0].tolist() == expected


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode="L")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png")[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    image.save(tmp_path / "t.png", transparency=1)
    assert read_image(tmp_path / "t.png")[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_cmyk_bilevel_and_ycbcr(tmp_path):
    Image.fromarray(np.full((4, 6, 4), (0, 255, 255, 0), np.uint8), mode="CMYK").save(tmp_path / "c.jpg", quality=100)
    red = read_image(tmp_path / "c.jpg")
    assert red.shape == (4, 6, 3) and red[0, 0, 0] > 240 and red[0, 0, 1:].max() < 15
    assert read_image(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))[0, :, 0].tolist() == [0, 255]
    assert np.abs(read_image(Image.fromarray(RGB).convert("YCbCr")).astype(int) - RGB).max() <= 3


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (7, 5), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
        assert Image.open(tmp_path / f"a.{suffix}").n_frames == 2
        assert (read_image(tmp_path / f"a.{suffix}") == (255, 0, 0)).all()


@pytest.mark.parametrize("content", [
    b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\x00\x10JFIF", b"RIFF\x00\x00\x00\x00WEBP"])
def test_files_that_are_no_image(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    for name in ("x.png", "gone.png", ""):  # the last is the folder
        with refused(InputError, name):
            read_image(tmp_path / name)


def test_too_many_pixels(tmp_path, monkeypatch):
    for width, height in ((20_000, 20_000), (11_000, 10_000)):  # for the first Pillow's own limit is met before ours
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, b"IDAT", b"IEND"))
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        with refused(InputError, "100 million"):
            read_image(tmp_path / "bomb.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 34)
    with refused(InputError, "7 x 5 pixels"):
        read_image(RGB)
    monkeypatch.setattr(images, "MAX_PIXELS", 35)
    read_image(RGB)


def test_list_images(tmp_path):
    for name in ("b.PNG", "a.jpeg", "c.webp", "notes.txt", "d.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "e.png").mkdir()
    assert [p.name for p in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "c.webp", "d.jpg"]
    assert list_images(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]  # named outright: read_image decides
    for path, what in ((tmp_path / "e.png", "holds no image"), (tmp_path / "gone", "does not exist")):
        with refused(InputError, what):
            list_images(path)


@pytest.mark.parametrize(("shape", "short", "expected"), [
    ((128, 160), 64, (64, 80)), ((160, 128), 64, (80, 64)), ((375, 500), 448, (448, 597)), ((100, 149), 64, (64, 95)),
    ((1, 1), 64, (64, 64)), ((64, 99), 64, (64, 99))])
def test_resize_short_side_shapes(shape, short, expected):
    assert resize_short_side(np.zeros((*shape, 3), np.uint8), short).shape == (*expected, 3)


def test_resize_halves_by_a_triangle_filter():
    ramp = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    halved = resize_short_side(ramp, 4)
    # Antialiased bilinear at scale 1/2: weights 1 3 3 1 (over 8) keep a straight ramp straight between the borders.
    assert halved[1, 1:-1, 0].tolist() == [25, 45, 65, 85, 105, 125]
    checker = (np.indices((8, 16)).sum(0) % 2 * 200).astype(np.uint8)[..., None].repeat(3, axis=2)
    assert np.abs(resize_short_side(checker, 4).astype(int) - 100).max() <= 2  # plain bilinear would alias: 0 or 200


# ---- writing

def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with refused(InputError, "cannot be written"):
        write_atomic(tmp_path / "file" / "l.png", b"")
    write_atomic(tmp_path / "new" / "l.png", b"new")
    assert os.listdir(tmp_path / "new") == ["l.png"] and sorted(os.listdir(tmp_path)) == ["file", "new"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    def fail(_handle):
        raise error

    path = tmp_path / "x.json"
    write_atomic(path, b"old")
    (tmp_path / "y").touch()
    assert path.stat().st_mode == (tmp_path / "y").stat().st_mode  # not private, as temporary files are
    (tmp_path / "y").unlink()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.json"]
