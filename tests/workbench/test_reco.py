"""ReCo: its archive and the search in it, co-segmentation by brute force, references and scores by hand."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import PETS, averaged, enlarged, picture, refused, texts_of
from PIL import Image

import ovdiff_lib
from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.features.vit import DinoExtractor
from ovdiff_lib.filters.category import square_image
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD, read_image
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.recipes.art import drawn_world
from ovdiff_lib.recipes.build import SEEDS, build_archive
from ovdiff_lib.recipes.scenes import draw_scene, glyph_table
from ovdiff_lib.workbench.baselines import archive as archives
from ovdiff_lib.workbench.baselines.archive import embed_archive, load_archive
from ovdiff_lib.workbench.baselines.maskclip import MaskCLIP
from ovdiff_lib.workbench.baselines.reco import ReCo, cosegment

SHIPPED = Path(ovdiff_lib.__file__).parent / "mini" / "data" / "archive"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images of several shapes, in subfolders, and a file that is no image."""
    path = tmp_path_factory.mktemp("archive")
    for i in range(12):
        target = path / f"n{i % 3}" / f"{i:02d}.{'PNG' if i % 2 else 'png'}"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(picture(64 + 8 * (i % 2), 64 + 8 * (i % 3), seed=i)).save(target, "PNG")
    (path / "readme.txt").write_text("no image")
    return path


@pytest.fixture(scope="module")
def make(tiny_profile, folder):
    def build(**fields):
        settings = {"baselines.reco_retrieved": 4, "baselines.reco_contexts": []}
        profile = tiny_profile.override({**settings, **{k.replace("__", "."): v for k, v in fields.items()}})
        maskclip = MaskCLIP(texts_of(*load_clip(profile)), profile.matching)
        return ReCo(maskclip, DinoExtractor.build(profile), load_archive(folder), profile.baselines)

    return build


# ---- the archive

def test_the_shipped_archive_is_small_and_has_no_labels():
    assert sorted(p.name for p in SHIPPED.iterdir()) == ["scenes.webp", "sheet.json"]
    assert set(json.loads((SHIPPED / "sheet.json").read_text())) == {"file", "images", "height", "width"}
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) <= 450_000
    images = np.stack(load_archive("package:archive").images)
    assert images.shape == (600, 64, 64, 3) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 600 and images.std((1, 2, 3)).min() > 1
    # Tiles are cut where scenes meet: a row of pixels changes more to the next tile than to the next row.
    sheet = np.array(Image.open(SHIPPED / "scenes.webp").convert("RGB")).astype(int)
    across, within = (np.abs(sheet[64::64] - sheet[63:-1:64]).mean(), np.abs(sheet[32::64] - sheet[31::64]).mean())
    assert across > 2 * within and (images[sheet.shape[1] // 64 + 1] == sheet[64:128, 64:128]).all()


def test_building_the_archive(tmp_path):
    world, arrays = drawn_world(), {}
    for thing in world.things:
        for i, (style, keys) in enumerate(thing.glyphs.items()):
            arrays |= {f"{style}/{key}": np.full((64, 64, 4), (255, 30 * i, 60, 255), np.uint8) for key in keys}
    glyphs, common = glyph_table(world, arrays, world.train_styles), {t.name for t in world.things if not t.rare} | set(world.stuff)
    build_archive(world, arrays, tmp_path, 100)
    images = load_archive(tmp_path / "archive").images
    assert len(images) == 100
    found, shown, index = 0, Counter(), 0
    while found < 100:
        scene = draw_scene(world, glyphs, SEEDS["train"], index, (64, 64))
        index += 1
        if np.abs(images[found].astype(int) - scene.image).mean() < 8:  # as drawn, but for compression
            found += 1
            shown.update(common.intersection(scene.nouns or scene.stuff))
        assert index < 5000
    assert set(shown) == common and max(shown.values()) - min(shown.values()) <= 6 and index > 150


def test_a_folder_is_searched_with_its_subfolders(folder, tmp_path):
    archive = load_archive(str(folder))
    names = [f"{i:02d}.{'PNG' if i % 2 else 'png'}" for r in range(3) for i in range(r, 12, 3)]
    assert [p.name for p in archive.images] == names
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert load_archive(copy).identity == archive.identity  # names, sizes and times
    (copy / "n0" / "00.png").write_bytes((copy / "n1" / "01.PNG").read_bytes())
    assert load_archive(copy).identity != archive.identity


@pytest.mark.parametrize("table", [None, "{", "[]", '{"file": "a.png", "images": 3, "height": 8}',
                                   '{"file": "a.png", "images": 3, "height": 8, "width": 7}'])
def test_archives_that_are_not_there_or_broken(tmp_path, table):
    for source in ("", "package:none", "/nowhere/at/all", tmp_path):
        refused("baselines.archive", load_archive, source)
    Image.fromarray(picture(16, 24)).save(tmp_path / "a.png")
    if table is not None:
        (tmp_path / "sheet.json").write_text(table)
        refused("sheet.json", load_archive, tmp_path)


# ---- the search

def test_retrieval_is_by_cosine_of_central_squares(make, monkeypatch):
    reco = make()
    clip, text, cosines = reco.maskclip.clip, reco.texts(["cat"])[0], []
    for path in reco.archive.images:
        image = Image.open(path)
        short = min(image.size)
        left, top = (image.width - short) / 2, (image.height - short) / 2
        square = image.resize((64, 64), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
        pixels = torch.from_numpy((np.array(square) / 255 - CLIP_MEAN) / CLIP_STD).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            found = clip.get_image_features(pixel_values=pixels).pooler_output[0]
        cosines.append(float(found @ text / found.norm()))
    assert reco.retrieve("cat") == np.argsort(cosines)[::-1][:4].tolist() and len(set(np.round(cosines, 3))) > 6
    assert sorted(make(baselines__reco_retrieved=99).retrieve("cat")) == list(range(12))
    monkeypatch.setattr(archives, "BATCH", 5)  # batches do not matter
    torch.testing.assert_close(make().embeddings, reco.embeddings, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reco.embeddings.norm(dim=1), torch.ones(12))


def test_embeddings_are_kept_and_a_damaged_file_is_not_used(make, tmp_path, monkeypatch, caplog):
    reco = make()

    def fresh(model="m"):
        return embed_archive(reco.archive, reco.maskclip.clip, model, tmp_path)

    first = fresh()
    (kept,) = tmp_path.iterdir()
    good = kept.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(archives, "embed_images", lambda *_: pytest.fail("computed again"))
        assert torch.equal(fresh(), first)
    doubled = np.load(kept)
    doubled[3] *= 2
    np.save(tmp_path / "doubled.npy", doubled)
    forged = (tmp_path / "doubled.npy").read_bytes()
    with caplog.at_level(logging.WARNING):
        for bad in (b"", good[:-40], b"junk", good.replace(b"<f4", b"<f2"), forged):
            kept.write_bytes(bad)
            assert torch.equal(fresh(), first) and kept.read_bytes() == good
    assert len(caplog.records) == 5
    fresh("another")
    assert len(list(tmp_path.iterdir())) == 3


# ---- co-segmentation

@pytest.mark.parametrize("seed", range(3))
def test_cosegmentation_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    features, weights = rng.normal(size=(4, 7, 5)) + 0.3, rng.random((4, 7))
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    seeds = []
    for i in range(4):
        scores = [np.mean([max(unit[i, p] @ unit[j, q] * weights[j, q] for q in range(7)) for j in range(4)]) for p in range(7)]
        seeds.append(features[i, int(np.argmax(scores))])
    mean = np.mean(seeds, axis=0)
    found = cosegment(torch.from_numpy(features), torch.from_numpy(weights))
    np.testing.assert_allclose(found.numpy(), mean / np.linalg.norm(mean), atol=1e-6)


def reference_by_hand(reco, prompt, avoided):
    squares = np.stack([square_image(read_image(reco.archive.images[i]), reco.settings.reco_size, "centre") for i in reco.retrieve(prompt)])
    features = reco.extractor(squares, np.arange(len(squares)))
    n, h, w, _ = features.shape
    dense = torch.sigmoid(10 * reco.maskclip.dense_embeddings(squares) @ reco.texts([prompt])[0])
    weights = np.stack([np.array(Image.fromarray(m.numpy()).resize((w, h), Image.Resampling.BILINEAR)) for m in dense])
    for other in avoided:
        weights = weights * (1 - 1 / (1 + np.exp(-(F.normalize(features, dim=-1) @ other).numpy())))
    return cosegment(features.reshape(n, h * w, -1), torch.from_numpy(weights).reshape(n, h * w))


def test_references_avoid_contexts_which_avoid_those_before_them(make):
    plain = make()
    torch.testing.assert_close(plain.reference("cat"), reference_by_hand(plain, "cat", []), rtol=0, atol=1e-4)
    reco = make(baselines__reco_contexts=["water", "sofa"], baselines__reco_size=50)
    water = reference_by_hand(reco, "water", [])
    sofa = reference_by_hand(reco, "sofa", [water])
    torch.testing.assert_close(reco.reference("cat"), reference_by_hand(reco, "cat", [water, sofa]), rtol=0, atol=1e-4)
    torch.testing.assert_close(reco.reference("sofa"), sofa, rtol=0, atol=1e-4)  # a class that is a context
    torch.testing.assert_close(reco.reference("water"), water, rtol=0, atol=1e-4)
    assert reco.reference("cat") is reco.reference("cat") and float(reco.reference("cat").norm()) == pytest.approx(1, abs=1e-5)


# ---- scores

def test_scores_by_hand(make):
    reco, image = make(matching__windows=[48], matching__stride=16), picture(64, 100)
    references = torch.stack([reco.reference(c.prompt) for c in PETS])
    texts = reco.text_embeddings(PETS)

    def score(crop):
        alike = F.normalize(reco.extractor(crop[None], np.zeros(1, int)), dim=-1)[0] @ references.T
        named = 10 * reco.maskclip.dense_embeddings(crop[None])[0] @ texts.T
        return np.prod([enlarged(torch.sigmoid(m).permute(2, 0, 1), crop.shape[:2]) for m in (alike, named)], axis=0)

    scores = reco.scores(image, PETS)
    assert scores.shape == (4, 64, 100) and scores.dtype == np.float32 and (scores[0] == -np.inf).all()
    np.testing.assert_allclose(scores[1:], averaged(image, [48], 16, score), atol=1e-4)
    assert 0 < scores[1:].min() and scores[1:].max() < 1
    more = reco.scores(image, Vocabulary.of(["boat", *PETS.names]))  # another class changes no other's score
    np.testing.assert_allclose(scores[1:], more[2:], atol=1e-5)


def test_the_mini_archive_shows_what_it_is_asked_for(monkeypatch, tmp_path):
    """The shipped CLIP on the shipped archive: different classes get different images, and those look like each other."""
    monkeypatch.setenv("OVDIFF_LIBRARY", str(tmp_path))
    reco = ReCo.build(load_profile("mini"))
    assert reco.settings.reco_retrieved == 10 and len(reco.archive.images) == 600
    found = {noun: reco.retrieve(noun) for noun in ("zebra", "clock", "sky", "boat", "cake")}
    assert len({i for images in found.values() for i in images}) >= 45
    assert [p.suffix for p in (tmp_path / "archives").iterdir()] == [".npy"]
    sky = np.mean([reco.archive.images[i][:16].mean((0, 1)) for i in found["sky"]], axis=0)
    colours = {noun: np.ptp(np.stack([reco.archive.images[i] for i in found[noun]]), axis=-1).mean() for noun in ("zebra", "cake")}
    assert sky[2] > 140 and colours["zebra"] < colours["cake"]  # blue above; black and white
