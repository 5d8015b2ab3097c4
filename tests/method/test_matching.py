"""Step 3b: Eq. 4 over windows, against a slow version written from the definition, with extractors that read pixels; PAMR likewise."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.matching import pamr as refine
from ovdiff_lib.matching.matcher import Matcher
from ovdiff_lib.matching.pamr import affinity, pamr
from ovdiff_lib.matching.windows import window_seeds, windows
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.types import PrototypeBank, Prototypes

D = 6


class Pixels:
    """Averages ``step`` x ``step`` pixels and mixes their colours into D channels; ``noise`` adds what the seeds say."""

    def __init__(self, step=4, mix=0, noise=0.0):
        self.step, self.noise, self.calls = step, noise, []
        self.matrix = torch.from_numpy(np.random.default_rng(mix).normal(size=(3, D)).astype(np.float32))
        self.name, self.channels = f"pixels{mix}", D

    def __call__(self, images, seeds):
        assert images.dtype == np.uint8 and seeds.dtype == np.int64 and len(images) == len(seeds)
        self.calls.append((images.shape, seeds.tolist()))
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.4
        features = F.avg_pool2d(x, self.step).permute(0, 2, 3, 1) @ self.matrix
        if self.noise:
            features = features + self.noise * torch.stack([
                torch.randn(features.shape[1:], generator=torch.Generator().manual_seed(int(s))) for s in seeds])
        return features


def prototypes(foreground, background, seed):
    rng, n = np.random.default_rng(seed), foreground + background
    order = rng.permutation(["foreground"] * foreground + ["background"] * background)  # rows of both regions may be mixed
    return Prototypes((rng.normal(size=(n, D)) * 3).astype(np.float32), np.array(["part"] * n), order, np.full(n, -1, np.int32),
                      np.arange(n, dtype=np.int32), np.zeros((1, 2, 2), np.int16))


def make_bank(names="abc", extractors=("one",), background=4, seed=0):
    return PrototypeBank(Vocabulary.of(list(names)), {
        name: tuple(prototypes(5 + i, background, 100 * seed + 10 * e + i) for i in range(len(names)))
        for e, name in enumerate(extractors)})


def make_profile(**matching):
    settings = {"short_side": 24, "windows": [24, 16], "stride": 8, "batch_size": 3, "background_threshold": None, **matching}
    return load_profile("mini", {f"matching.{k}": v for k, v in settings.items()})


def match(image, bank, extractors=None, **matching):
    """(scores, winner) by an extractor of pixels, or by several."""
    return next(Matcher(extractors or {"one": Pixels()}, make_profile(**matching)).scores([(image, bank)]))


def enlarged(scores, *shape):
    return F.interpolate(torch.from_numpy(scores)[None], size=shape, mode="bilinear", align_corners=False)[0].numpy()


def picture(height=30, width=41, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def slow_window(image, bank, extractors):
    """Mean over extractors of each cell's highest cosine to each class, one class at a time, at the size of the image."""
    found = []
    for name, extractor in extractors.items():
        features = extractor(image[None], np.zeros(1, np.int64))[0].numpy().astype(np.float64)
        unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
        front, behind = ([p.vectors[p.region == r] for p in bank.prototypes[name]] for r in ("foreground", "background"))
        classes = [np.concatenate(behind), *front]
        cosines = np.stack([(unit @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T.astype(np.float64)).max(-1) for v in classes])
        found.append(enlarged(cosines, *image.shape[:2]))
    return np.mean(found, axis=0)


def slow_scores(image, bank, extractors, sizes, stride, short):
    """Eq. 4 as the words say it: one window, one class, one extractor at a time."""
    scale = short / min(image.shape[:2])
    height, width = (int(side * scale + 0.5) for side in image.shape[:2])
    resized = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    result = np.zeros((len(bank.vocabulary) + 1, height, width))
    for size in sizes:
        total, cover = np.zeros_like(result), np.zeros((height, width))
        for top in sorted({min(t, height - size) for t in range(0, height, stride)}):
            for left in sorted({min(t, width - size) for t in range(0, width, stride)}):
                place = slice(top, top + size), slice(left, left + size)
                total[:, *place] += slow_window(resized[place], bank, extractors)
                cover[place] += 1
        result += total / cover / len(sizes)
    return enlarged(result, *image.shape[:2])


@pytest.mark.parametrize(("shape", "size", "stride", "tops", "lefts"), [
    ((448, 448), 448, 224, [0], [0]), ((448, 448), 336, 224, [0, 112], [0, 112]), ((448, 597), 448, 224, [0], [0, 149]),
    ((700, 448), 336, 224, [0, 224, 364], [0, 112]), ((64, 85), 48, 32, [0, 16], [0, 32, 37])])
def test_windows_of_the_paper(shape, size, stride, tops, lefts):
    assert windows(shape, size, stride) == [(top, left, size, size) for top in tops for left in lefts]


@pytest.mark.parametrize("shape", [(30, 41), (53, 30), (24, 24), (10, 11)])
@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_scores_follow_equation_4(shape, names):
    extractors = {name: Pixels(step=4 * (1 + i), mix=i) for i, name in enumerate(names)}
    bank, image = make_bank(extractors=names), picture(*shape)
    scores, winner = match(image, bank, extractors)
    expected = slow_scores(image, bank, extractors, [24, 16], 8, 24)
    assert scores.dtype == np.float32 and winner.dtype == np.int32 and scores.shape == (4, *shape) and winner.shape == (2, *shape)
    assert np.allclose(scores, expected, atol=1e-5) and len(np.unique(expected.argmax(0))) > 1


def test_the_batch_size_changes_nothing():
    bank, image = make_bank(background=30), picture()
    scores, winner = match(image, bank, {"one": Pixels(noise=0.3)})
    for batch in (1, 100):
        again, same = match(image, bank, {"one": Pixels(noise=0.3)}, batch_size=batch)
        assert np.allclose(scores, again, atol=1e-6) and (winner == same).all()


def test_of_equal_cosines_the_first_counts():
    twice = make_bank().map(lambda e, i, p: p.select(np.repeat(np.arange(len(p)), 2)))
    assert (match(picture(), twice)[1][1] % 2 == 0).all()


def test_winner_points_at_the_best_prototype_of_the_winning_class():
    bank, image, extractor = make_bank(), picture(24, 40), Pixels(step=1)
    scores, winner = match(image, bank, {"one": extractor}, windows=[24])
    labels = scores.argmax(0)
    # Grid and window are the pixels themselves, so the score is the cosine of the winner.
    features = F.normalize(extractor(image[None], np.zeros(1, np.int64))[0], dim=-1).numpy()
    for y, x in np.ndindex(labels.shape):
        category, row = winner[:, y, x]
        prototypes = bank.prototypes["one"][category]
        assert prototypes.region[row] == ("foreground" if labels[y, x] else "background") and labels[y, x] in (0, category + 1)
        cosine = prototypes.vectors[row] @ features[y, x] / np.linalg.norm(prototypes.vectors[row])
        assert cosine == pytest.approx(scores[labels[y, x], y, x], abs=1e-5)
    assert len(np.unique(labels)) > 2 and len(np.unique(winner[0][labels == 0])) > 1


def test_noise_seeds_depend_on_pixels_and_window_alone():
    image = picture()
    seeds = window_seeds(0, image, 9)
    assert seeds.dtype == np.int64 and len(set(seeds.tolist())) == 9 and (seeds >= 0).all()
    assert (window_seeds(0, image.copy(), 12)[:9] == seeds).all()
    other = image.copy()
    other[0, 0, 0] ^= 1
    for changed in (window_seeds(0, other, 9), window_seeds(1, image, 9), window_seeds(0, image.reshape(41, 30, 3), 9)):
        assert not set(changed.tolist()) & set(seeds.tolist())
    extractor = Pixels(noise=0.3)
    matcher, bank = Matcher({"one": extractor}, make_profile()), make_bank()
    first, _, again = (next(matcher.scores([(shown, bank)]))[0] for shown in (image, picture(seed=5), image))
    assert np.array_equal(again, first)
    used = [seed for _, seeds in extractor.calls for seed in seeds]
    assert len(set(used)) == len(used) * 2 // 3  # the two pictures, the first of them twice


def test_without_background_prototypes():
    image, bank = picture(), make_bank(background=0)
    scores, winner = match(image, bank, background_threshold=0.8)
    assert (scores[0] == np.float32(0.8)).all()
    background = scores.argmax(0) == 0
    assert background.any() and not background.all()
    assert (winner[:, background] == -1).all() and (winner[:, ~background] >= 0).all()
    never, _ = match(image, bank)  # filters may remove every background prototype
    assert (never[0] == -np.inf).all() and np.allclose(never[1:], scores[1:])
    for given, value in ((0.8, np.float32(0.8)), (None, -np.inf)):  # PAMR leaves a constant alone
        scores, winner = match(image, bank, refine="pamr", background_threshold=given)
        assert (scores[0] == value).all() and np.isfinite(scores[1:]).all() and (winner[:, scores.argmax(0) == 0] == -1).all()


def one_without_background():
    """A bank of two extractors, the first without background prototypes; the whole bank; the extractors."""
    both = make_bank(extractors=("one", "two"))
    bank = PrototypeBank(both.vocabulary, {**both.without_background().prototypes, "two": both.prototypes["two"]})
    return bank, both, {"one": Pixels(), "two": Pixels(mix=1)}


@pytest.mark.parametrize("given", [0.7, {"one": 0.7, "two": -0.4}])
def test_an_extractor_without_background_prototypes_votes_with_its_constant(given):
    image, (bank, both, extractors) = picture(), one_without_background()
    scores, winner = match(image, bank, extractors, background_threshold=given)
    alone, full = (match(image, both, chosen)[0] for chosen in ({"two": extractors["two"]}, extractors))
    assert np.allclose(scores[0], (alone[0] + 0.7) / 2, atol=1e-6) and np.allclose(scores[1:], full[1:], atol=1e-6)
    background = scores.argmax(0) == 0
    assert background.any() and (winner[:, background] == -1).all()  # the first extractor has no prototype to show
    none = match(image, both.without_background(), extractors, background_threshold=given)[0]
    assert (none[0] == np.float32(0.7 if given == 0.7 else 0.15)).all() and np.allclose(none[1:], full[1:], atol=1e-6)


def test_without_a_constant_it_has_no_vote_for_any_class():
    image, (bank, both, extractors) = picture(), one_without_background()
    scores, winner = match(image, bank, extractors)
    alone = match(image, both, {"two": extractors["two"]})[0]
    assert np.allclose(scores, alone, atol=1e-6) and (winner[:, scores.argmax(0) == 0] == -1).all()
    never, full = (match(image, one, extractors)[0] for one in (both.without_background(), both))
    assert (never[0] == -np.inf).all() and np.allclose(never[1:], full[1:], atol=1e-6)


def test_a_mapping_without_the_extractor_is_refused():
    bank, both, extractors = one_without_background()
    with pytest.raises(ProfileError, match=r"matching\.background_threshold names two but not 'one'"):
        match(picture(), bank, extractors, background_threshold={"two": 0.5})
    match(picture(), both, extractors, background_threshold={"two": 0.5})  # nobody asks for it


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_whole_image_is_one_more_scale(shape):
    image, bank = picture(*shape), make_bank()
    plain, with_whole = (match(image, bank, windows=[24], whole_image=whole, batch_size=9)[0] for whole in (False, True))
    squashed = np.array(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR))
    alone = match(image, bank, windows=[], whole_image=True)[0]
    assert np.allclose(with_whole, (plain + alone) / 2, atol=1e-5)
    extractor = Pixels(step=1)  # cells are pixels, so that no resizing comes in between
    alone = match(image, bank, {"one": extractor}, windows=[], whole_image=True)[0]
    assert np.allclose(alone, enlarged(slow_window(squashed, bank, {"one": extractor}), *shape), atol=1e-5)


def test_a_dropped_category_takes_its_prototypes_along():
    image, bank = picture(), make_bank("abcd")
    (scores, _), (full, _) = match(image, bank.restrict([1, 3])), match(image, bank)
    assert np.allclose(scores[1:], full[[2, 4]], atol=1e-6) and (scores[0] < full[0] - 1e-6).any()


class Torn(Pixels):
    """One of its values is not finite."""

    def __call__(self, images, seeds):
        features = super().__call__(images, seeds)
        features[0, 0, 0, 0] = torch.nan
        return features


def narrow():
    extractor = Pixels()
    extractor.matrix = extractor.matrix[:, :4]
    return extractor


@pytest.mark.parametrize(("shape", "extractors", "told"), [
    ((1, 65), {"one": Pixels()}, "64 times"), ((30, 41), {"two": Pixels()}, "'two'"),
    ((30, 41), {"one": narrow()}, "6 channels"), ((30, 41), {"one": Torn()}, "not finite")])
def test_what_cannot_be_matched_is_refused(shape, extractors, told):
    with pytest.raises(InputError, match=told):
        match(picture(*shape), make_bank(), extractors)


def test_lanczos_brings_the_image_to_size():
    image, bank, one = picture(), make_bank(), {"windows": [24], "stride": 24}
    resized = np.array(Image.fromarray(image).resize((33, 24), Image.Resampling.LANCZOS))
    scores = match(image, bank, **one, resample="lanczos")[0]
    assert np.allclose(scores, enlarged(match(resized, bank, **one)[0], 30, 41), atol=1e-5)
    assert np.abs(scores - match(image, bank, **one)[0]).max() > 0.01


def test_pamr_refines_the_merged_scores_at_the_size_of_the_resized_image():
    image, bank = picture(), make_bank()
    resized = np.array(Image.fromarray(image).resize((33, 24), Image.Resampling.BILINEAR))
    expected = pamr(resized, torch.from_numpy(match(resized, bank)[0]), 3, [1, 2]).numpy()
    scores, winner = match(image, bank, refine="pamr", pamr_iterations=3, pamr_dilations=[1, 2])
    assert np.allclose(scores, enlarged(expected, 30, 41), atol=1e-5)
    plain, plain_winner = match(image, bank)
    assert np.abs(scores - plain).max() > 0.01
    same = scores.argmax(0) == plain.argmax(0)
    assert not same.all() and (winner[:, same] == plain_winner[:, same]).all() and (winner >= 0).all()


def test_pixels_without_a_good_score_become_background():
    image, bank = picture(), make_bank()
    plain, plain_winner = match(image, bank)
    best = plain.max(0)
    bar = float(np.median(best))
    scores, winner = match(image, bank, minimum_score=bar)
    low = best <= np.float32(bar)
    assert 0.3 < low.mean() < 0.7 and (plain.argmax(0)[low] > 0).any()
    assert np.array_equal(scores.argmax(0), np.where(low, 0, plain.argmax(0)))
    assert np.array_equal(winner, np.where(low, -1, plain_winner))
    assert np.array_equal(scores[1:], plain[1:]) and np.array_equal(scores[0], np.where(low, best, plain[0]))
    # Not above: a pixel whose score is the minimum itself is background too.
    assert (match(image, bank, minimum_score=float(plain.max()))[0].argmax(0) == 0).all()
    never = match(image, bank, minimum_score=-2.0)
    assert np.array_equal(never[0], plain) and np.array_equal(never[1], plain_winner)
    scores, winner = match(image, make_bank(background=0), minimum_score=bar)  # the minimum alone makes background
    assert (scores.argmax(0) == 0).any() and (winner[:, scores.argmax(0) == 0] == -1).all()


def test_a_long_strip_is_scaled_until_its_long_side_fits():
    strip = np.random.default_rng(0).integers(0, 255, (10, 100, 3), dtype=np.uint8)
    for long_side, shape in ((None, (40, 400, 3)), (200, (20, 200, 3)), (400, (40, 400, 3))):
        assert resize_short_side(strip, 40, long_side=long_side).shape == shape
    assert resize_short_side(strip.transpose(1, 0, 2), 40, long_side=150).shape == (150, 15, 3)
    # Long side 120: scaled by 1.2 to 12 x 120, where windows of 24 and 16 do not fit, and become 12.
    bank, image, extractors = make_bank(), picture(10, 100), {"one": Pixels(step=1)}
    found, _ = match(image, bank, extractors, long_side=120)
    np.testing.assert_allclose(found, slow_scores(image, bank, extractors, [12, 12], 8, 12), atol=1e-4)


# ---- PAMR against a loop over pixels and neighbours

SHAPE = (9, 14)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def scores():
    return torch.from_numpy(np.random.default_rng(1).normal(size=(4, *SHAPE)).astype(np.float32))


def at(y, x):
    """The position that padding by repetition puts at (y, x)."""
    return min(max(y, 0), SHAPE[0] - 1), min(max(x, 0), SHAPE[1] - 1)


def slow_weights(image, dilations):
    """(neighbours, H, W) one pixel after another, in double precision."""
    image = image.astype(np.float64)
    offsets = [(y * d, x * d) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1)]
    around = [o for o in offsets if o != (0, 0)]
    weights = np.zeros((len(around), *SHAPE))
    for y, x in np.ndindex(SHAPE):
        samples = np.array([image[at(y + dy, x + dx)] for dy, dx in offsets])
        assert len(samples) == 9 * len(dilations)
        deviation = samples.std(0, ddof=1)
        alike = [np.mean(-np.abs(image[at(y + dy, x + dx)] - image[y, x]) / (1e-8 + 0.1 * deviation)) for dy, dx in around]
        exponentials = np.exp(np.array(alike) - max(alike))
        weights[:, y, x] = exponentials / exponentials.sum()
    return weights, around


def slow_pamr(image, scores, iterations, dilations):
    weights, around = slow_weights(image, dilations)
    values = scores.numpy().astype(np.float64)
    for _ in range(iterations):
        new = np.zeros_like(values)
        for y, x in np.ndindex(SHAPE):
            for weight, (dy, dx) in zip(weights[:, y, x], around, strict=True):
                new[:, y, x] += weight * values[(slice(None), *at(y + dy, x + dx))]
        values = new
    return values


@pytest.mark.parametrize(("iterations", "dilations"), [(1, [1]), (3, [1, 2, 4]), (10, [1, 2, 4, 8, 12, 24])])
def test_against_a_loop_over_pixels(image, scores, iterations, dilations):
    found = pamr(image, scores, iterations, dilations)
    assert found.dtype == torch.float32 and found.shape == scores.shape
    assert np.allclose(found.numpy(), slow_pamr(image, scores, iterations, dilations), atol=1e-5)
    assert (found - scores).abs().max() > 0.5


def test_weights_of_the_published_dilations_in_blocks_of_any_size(image, scores, monkeypatch):
    weights, whole = affinity(image), pamr(image, scores)
    assert torch.equal(whole, pamr(image, scores, 10, [1, 2, 4, 8, 12, 24]))
    assert weights.shape == (48, *SHAPE) and torch.allclose(weights.sum(0), torch.ones(SHAPE), atol=1e-5) and (weights >= 0).all()
    assert np.allclose(weights.numpy(), slow_weights(image, (1, 2, 4, 8, 12, 24))[0], atol=1e-5)
    for block in (48 * SHAPE[1] * 2, 1):
        monkeypatch.setattr(refine, "BLOCK_VALUES", block)
        assert torch.allclose(pamr(image, scores), whole, atol=1e-6)


def test_brightness_and_contrast_of_a_channel_do_not_matter(image, scores):
    plain = pamr(image, scores)
    changed = image.astype(np.float32) * np.float32([0.004, -2.5, 30]) + np.float32([-1.7, 200, 0.3])
    assert torch.allclose(pamr(changed, scores), plain, atol=1e-4)
    mixed = image[:, :, [1, 2, 0]]
    assert torch.allclose(pamr(mixed, scores), plain, atol=1e-5)  # channels count alike
    other = image.copy()
    other[4, 7] ^= 255
    assert not torch.allclose(pamr(other, scores), plain, atol=1e-3)


def test_scores_that_come_in_stay_as_they_are_and_broken_ones_are_not_hidden(image, scores):
    before = scores.clone()
    pamr(image, scores)
    assert torch.equal(scores, before)
    assert torch.isnan(pamr(image, scores / 0 * 0)).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (30, 2)])
def test_small_images(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = pamr(image, torch.rand(2, *shape))
    assert found.shape == (2, *shape) and torch.isfinite(found).all()
