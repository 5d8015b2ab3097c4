"""The benchmark: its arithmetic by hand, the alternatives against OVDiff's own results, scenarios and command. No times."""

import functools
import math

import numpy as np
import pytest
import torch
from sentences import assigned
from tiny import tiny_overrides

from ovdiff_lib.categories import Category
from ovdiff_lib.cli.main import main
from ovdiff_lib.matching.windows import windows
from ovdiff_lib.networks.clip_text import TextEncoder
from ovdiff_lib.networks.loading import load_clip, load_diffusion
from ovdiff_lib.prototypes.kmeans import kmeans
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.workbench.cost import plain, scenarios
from ovdiff_lib.workbench.cost.cells import DIGITS, Check, Ratio, prototype_rows, ratio_cells
from ovdiff_lib.workbench.cost.instruments import Measured
from ovdiff_lib.workbench.cost.scenarios import SCENARIOS, Session, difference

SHAPE = (52, 88)


def ratio(ours=(1.0,), theirs=(2.0,), limit=None, check=None, added=(10, 20), name="a", **more):
    sides = [Measured(tuple(seconds), None, 100, 100 + plus) for seconds, plus in zip((ours, theirs), added, strict=True)]
    return Ratio(name, "what", "other", *sides, limit, check, **more)


@pytest.fixture(scope="module")
def small(tiny_profile):
    return Session(tiny_profile, repeats=1)


@pytest.fixture
def image():
    return np.random.default_rng(5).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


# ---- arithmetic

def test_a_ratio_is_of_medians_and_its_spread_of_rounds():
    found = ratio((3.0, 1.0, 2.2), (2.0, 4.0, 2.0))
    assert found.value == 2.2 / 2.0 and found.spread == (1 / 4, 3 / 2) and found.met is None
    assert ratio().spread is None


@pytest.mark.parametrize("limit, difference, met", [
    (1.15, None, True), (0.5, None, True), (0.49, None, False), (1, 1e-6, True), (1, 2e-5, False), (0.1, 0, False),
    (None, math.nan, False), (None, 1e-5, True)])
def test_a_limit_and_a_check_beside_it(limit, difference, met):
    assert ratio((1.0,), (2.0,), limit, None if difference is None else Check("difference", difference, 1e-5)).met is met


def test_differences_see_where_infinite_values_stand():
    inf = math.inf
    assert difference(np.array([-inf, 1.0]), torch.tensor([-inf, 1.5])) == 0.5
    assert difference(np.array([-inf, 1.0]), np.array([0.0, 1.0])) > 1e300
    assert math.isnan(difference(np.array([math.nan]), np.array([math.nan])))


def test_made_up_classes_have_prompts_of_their_own_and_all_prototypes_of_a_class(small):
    bank = small.made_up(2000)
    assert bank.vocabulary.names[:2] == ("w0001", "w0002") and len({category.prompt for category in bank.vocabulary}) == 2000
    support, clusters = small.profile.support.size, small.profile.prototypes.clusters
    for made in bank.prototypes["sd"][:3]:
        assert made.vectors.dtype == np.float32 and np.sum(made.region == "foreground") == 1 + support + clusters == len(made) / 2
    assert not np.array_equal(bank.prototypes["sd"][0].vectors, bank.prototypes["sd"][1].vectors)
    assert prototype_rows(small.profile.override({"prototypes.background": False, "prototypes.kinds": ["class", "part"]})) == 1 + clusters


def test_points_have_few_directions():
    points = scenarios.spread_points(3000, 150)
    spectrum = np.linalg.svd(points - points.mean(0), compute_uv=False) ** 2
    assert points.shape == (3000, 150) and points.dtype == np.float32 and spectrum[:64].sum() / spectrum.sum() > 0.9


# ---- alternatives give what OVDiff gives

def test_the_bare_pipeline_draws_the_same_images(tiny_profile):
    pipe, profile = load_diffusion(tiny_profile), tiny_profile.override({"support.batch_size": 2})
    processors = {name: id(p) for name, p in pipe.unet.attn_processors.items()}
    support = sample_support(pipe, Category("dog"), profile, 3, progress=False)
    drawn = plain.draw(pipe, Category("dog"), profile, 3)
    assert drawn.shape == support.images.shape and difference(drawn, support.images) <= 2
    assert difference(plain.draw(pipe, Category("cat"), profile, 3), support.images) > 20
    assert {name: id(p) for name, p in pipe.unet.attn_processors.items()} == processors


def test_bare_features_are_one_pass_of_the_networks(tiny_profile, image):
    pipe = load_diffusion(tiny_profile)
    seen, encoded = [], []
    hooks = [pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape))),
             pipe.vae.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(tuple(inputs[0].shape)))]
    crops = plain.window_crops(image, tiny_profile)
    try:
        bare = plain.bare_features(pipe, tiny_profile.features, crops, 4)
        assert not seen
        bare()
    finally:
        for hook in hooks:
            hook.remove()
    expected = len(windows((64, 108), 64, 32)) + len(windows((64, 108), 48, 32))  # 52 x 88 with a short side of 64
    assert len(crops) == expected and sum(shape[0] for shape in seen) == sum(shape[0] for shape in encoded) == expected
    assert {shape[1:] for shape in encoded} == {(3, 64, 64)} and {shape[1:] for shape in seen} == {(4, 16, 16)}
    assert max(shape[0] for shape in seen) == 4


def test_padded_texts_are_those_of_the_filter(tiny_profile):
    clip, tokenizer = load_clip(tiny_profile)
    texts = ["cat", "cat and dog", "cat and dog and sofa", "boat"]
    padded = plain.padded_texts(clip, tokenizer, texts, batch=3)
    assert difference(padded, TextEncoder(clip, tokenizer)(texts)) < 1e-5
    assert float((padded[0] - padded[3]).norm()) > 0.01


# ---- scenarios

def test_inertia_is_compared_with_scikit_learns(small, monkeypatch):
    from sklearn.cluster import KMeans

    points = scenarios.spread_points(600, 40)
    monkeypatch.setattr(scenarios, "PAPER_POINTS", points.shape)
    monkeypatch.setattr(small, "repeats", 2)
    found, = scenarios.clusters(small, full=True)
    k = small.profile.prototypes.clusters
    theirs = [KMeans(k, n_init="auto", random_state=seed).fit(points).inertia_ for seed in (1, 2)]
    made = [kmeans(points, k, seed=seed) for seed in (1, 2)]
    ours = [float(((points - centroids.numpy()[assignment]).astype(float) ** 2).sum()) for centroids, assignment in made]
    assert found.check.value == pytest.approx(np.mean(ours) / np.mean(theirs) - 1, abs=1e-6)
    assert found.check.limit == 0.01 and found.ours.n == found.theirs.n == 2 and found.limit == 0.1


@pytest.mark.parametrize("name, checked", [
    ("sampling", ["the drawings, of 255 levels"]), ("building", [None]), ("kmeans", ["share of mean inertia above the alternative's"]),
    ("texts", ["the embeddings"]), ("segmenting", [None, None, "a score"]), ("vocabulary-2000", [None, None])])
def test_scenarios_run_with_tiny_networks(small, monkeypatch, name, checked):
    """``checked``: by row, which results are compared; times depend on the machine and are not asked for here."""
    for constant, value in {"TOGETHER": 2, "FEW": 3, "MANY": 5, "NAMES": ("cat", "dog", "boat")}.items():
        monkeypatch.setattr(scenarios, constant, value)
    found = SCENARIOS[name](small)
    assert all(min(one.ours.seconds + one.theirs.seconds) > 0 for one in found)
    assert [one.check and one.check.what.removeprefix("largest difference of ") for one in found] == checked
    assert name == "kmeans" or all(one.check.value <= one.check.limit for one in found if one.check)
    assert name != "segmenting" or "2 images against 3 classes" in found[2].measures


# ---- running them

@pytest.fixture
def made_scenarios(monkeypatch):
    def fails(problem, _):
        raise problem

    made = {"good": lambda _: [ratio(limit=1)], "missed": lambda _: [ratio(limit=0)],
            "bad": functools.partial(fails, RuntimeError("out of\nmemory")), "stopped": functools.partial(fails, KeyboardInterrupt)}
    monkeypatch.setattr(scenarios, "SCENARIOS", made)
    monkeypatch.setattr(scenarios, "BY_NAME", ("bad", "stopped"))


def test_the_command(tiny_models, made_scenarios, capsys):
    def benchmark(*options):
        return main(["benchmark", *options, *assigned(tiny_overrides(tiny_models))]), *capsys.readouterr()

    code, shown, _ = benchmark("--only", "good")
    assert code == 0 and "profile mini" in shown and "a: 0.5x the time, at most 1: met" in shown and "against other" in shown
    code, shown, _ = benchmark()
    assert code == 1 and shown.count("met\n") == shown.count("MISSED\n") == 1
    code, shown, error = benchmark("--only", "good,bad")
    assert code == 2 and "met\n" in shown and "The scenario bad failed: RuntimeError('out of" in error and "Traceback" not in error
    assert benchmark("--only", "stopped")[0] == 130
    for options, word in ((["--only", "god"], "good"), (["--only", "zzzz"], "good, missed"), (["--only", ""], "good, missed")):
        code, _, error = benchmark(*options)
        assert code == 2 and word in error and "\n" not in error.strip()


# ---- what is shown

def test_cells_of_a_notebook():
    made = ratio_cells([ratio((1.0, 2.0), (2.0, 2.0), 1.15, name="one"), ratio(name="two")])
    by_place = {(cell.row, cell.column): cell.measured for cell in made}
    assert by_place["one, against other", "ratio"] == 0.75 and by_place["one, against other", "met (1) or missed (0)"] == 1
    assert [by_place["one, against other", column] for column in ("lowest", "highest", "bound")] == [0.5, 1, 1.15]
    assert by_place["two, against other", "ovdiff, peak MB"] == 110 / 1e6 and ("two, against other", "bound") not in by_place
    assert by_place["two, against other", "alternative, added MB"] == 20 / 1e6
    assert {column for _, column in by_place} == set(DIGITS)
