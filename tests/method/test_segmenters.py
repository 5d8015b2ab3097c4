"""What every registered segmenter must keep, and the adapters of CutLER, SAM and Grounded SAM."""

import pickle
import types

import numpy as np
import pytest
import torch
from segmenter_models import make_segmenter_models, segmenter_overrides
from sentences import refused
from tiny import noise as picture
from torchvision.ops import masks_to_boxes, nms

from ovdiff_lib.errors import InputError, ModelNotAvailable, OVDiffError, ProfileError
from ovdiff_lib.masks import COMMON_SETTINGS, SEGMENTERS
from ovdiff_lib.masks.segmenters import cutler
from ovdiff_lib.masks.segmenters.cutler import CONFIG, CutLER, input_size, read_checkpoint
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Masks, Models

NEEDS = {"cutler": "detectron2"}
"""Segmenters that an optional library provides."""


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return make_segmenter_models(tmp_path_factory.mktemp("segmenters"))


def profile(models, name, **fields):
    return load_profile("mini", {**segmenter_overrides(models, name), **fields})


@pytest.fixture(scope="session")
def built(models, tmp_path_factory):
    """name -> segmenter, built once."""
    made = {}

    def build(name):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        if name not in made:
            fields = cutler_fields(tmp_path_factory.mktemp("cutler")) if name == "cutler" else {}
            made[name] = SEGMENTERS[name](profile(models, name, **fields))
        return made[name]

    return build


def cutler_fields(folder):
    """Overrides that name a checkpoint of random weights, in CutLER's layout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save({"model": cutler.build_network("cpu").state_dict()}, folder / "cutler.pth")
    return {"models.cutler": str(folder / "cutler.pth"), "masks.cutler_score": 0.0}


# ---- the contract: what every entry of the registry keeps

SHAPES = [(36, 60), (61, 33)]
EXTREMES = [(1, 1), (2, 3), (3, 3), (1, 200), (200, 1)]


def check_proposals(segmenter, shape):
    """Boolean masks of the image, none empty, the same whenever asked for, and the image left alone."""
    image = picture(*shape)
    masks = segmenter.propose(image, "cat")
    assert isinstance(masks, np.ndarray) and masks.dtype == bool and masks.ndim == 3 and masks.shape[1:] == shape
    assert masks.any(axis=(1, 2)).all()
    segmenter.propose(picture(40, 40, seed=1), "dog")  # nothing of another image may remain
    assert np.array_equal(masks, segmenter.propose(image, "cat"))
    if hasattr(segmenter, "propose_many"):
        others = np.stack([picture(*image.shape[:2], seed=seed) for seed in range(3)])
        for other, found in zip(others, segmenter.propose_many(others, "cat"), strict=True):
            alone = segmenter.propose(other, "cat")
            assert found.shape == alone.shape and (found != alone).mean() < 1e-3  # rounding moves a pixel at a mask's edge
    assert np.array_equal(image, picture(*shape))


def check_extreme_size(segmenter, shape):
    """Masks or one sentence."""
    try:
        masks = segmenter.propose(picture(*shape), "cat")
    except OVDiffError as error:
        assert len(str(error)) < 300
    else:
        assert masks.dtype == bool and masks.shape[1:] == shape


def check_one_colour(segmenter):
    """An image that shows nothing is no trouble."""
    masks = segmenter.propose(np.full((40, 56, 3), 128, np.uint8), "cat")
    assert masks.dtype == bool and masks.shape[1:] == (40, 56)


def check_dependencies(part):
    """What its results depend on are profile fields, or it declares nothing."""
    for model in part.models or ():
        assert model in Models.__dataclass_fields__
    for setting in (*(part.settings or ()), *COMMON_SETTINGS):
        assert any(field == setting or (setting.endswith("_") and field.startswith(setting)) for field in Masks.__dataclass_fields__)


def check_contract(segmenter, name):
    assert segmenter.name == name
    check_dependencies(SEGMENTERS[name])
    for shape in SHAPES:
        check_proposals(segmenter, shape)
    for shape in EXTREMES:
        check_extreme_size(segmenter, shape)
    check_one_colour(segmenter)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_the_contract(built, name):
    check_contract(built(name), name)


@pytest.mark.parametrize("name", [name for name in SEGMENTERS if SEGMENTERS[name].models and name not in NEEDS])
def test_a_model_that_is_not_set_or_not_there_is_named(models, name):
    field = SEGMENTERS[name].models[0]
    for source, error, told in (("", ProfileError, f"models.{field}"), ("/no/such/folder", ModelNotAvailable, "does not exist"),
                                (str(models), ModelNotAvailable, str(models))):  # the last is no folder of a model
        with refused(error, told):
            SEGMENTERS[name](profile(models, name, **{f"models.{field}": source}))


# ---- CutLER

def test_the_resize_rule_by_hand():
    for shape, expected in {
            (512, 512): (800, 800), (480, 640): (800, 1067), (640, 480): (1067, 800), (300, 900): (444, 1333), (1, 1): (800, 800),
            (2, 3): (800, 1200), (1, 5000): (1, 1333), (800, 1333): (800, 1333), (1600, 3000): (711, 1333)}.items():
        assert input_size(*shape) == expected


def test_the_resize_rule_is_detectron2s():
    transforms = pytest.importorskip("detectron2.data.transforms")
    for shape in [(a, b) for a in (37, 480, 512, 1000, 2111) for b in (41, 600, 640, 1777)]:
        assert input_size(*shape) == tuple(transforms.ResizeShortestEdge.get_output_shape(*shape, 800, 1333))


class Instances(types.SimpleNamespace):
    def to(self, device):
        return self


def fake_network(scores, masks, seen):
    """A network that returns these and keeps in ``seen`` what it was given."""
    def call(batch):
        seen.extend(batch)
        return [{"instances": Instances(scores=torch.tensor(scores), pred_masks=torch.from_numpy(masks))}]

    return call


def test_cutler_gives_rgb_pixels_of_the_resized_image_and_takes_scores_from_the_threshold_up():
    masks, seen = np.random.default_rng(0).random((5, 20, 30)) < 0.3, []
    masks[3] = False  # pasting may leave nothing
    image = np.zeros((20, 30, 3), np.uint8)
    image[..., 0], image[..., 2] = 200, 10
    found = CutLER(fake_network([0.2, 0.35, 0.9, 0.8, 0.5], masks, seen), 0.35).propose(image, "")
    assert np.array_equal(found, masks[[2, 4, 1]])
    (given,) = seen
    assert given["image"].shape == (3, 800, 1200) and given["image"].dtype == torch.float32
    assert (given["height"], given["width"]) == (20, 30)
    assert [channel.unique().tolist() for channel in given["image"]] == [[200], [0], [10]]
    none = CutLER(fake_network(np.zeros(0, np.float32), masks[:0], []), 0.35).propose(image, "")
    assert none.shape == (0, 20, 30) and none.dtype == bool


def test_without_detectron2_one_sentence_says_what_to_do(without, models):
    without("detectron2")
    with refused(ProfileError, "detectron2", "environment.yml", "maskcut", "detector", "threshold"):
        SEGMENTERS["cutler"](profile(models, "cutler"))


@pytest.fixture
def cutler_of(monkeypatch, models):
    """``build(checkpoint)``: CutLER where there is no detectron2, whose network is two layers."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    monkeypatch.setattr(cutler, "_detectron2", lambda: None)
    monkeypatch.setattr(cutler, "build_network", lambda device: network)
    return lambda path: SEGMENTERS["cutler"](profile(models, "cutler", **{"models.cutler": str(path)}))


class Trap:
    def __reduce__(self):
        return print, ("a pickle was run",)


def test_a_checkpoint_is_read_without_running_it(tmp_path, capsys, cutler_of):
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": np.arange(4, dtype=np.float32), "c": np.int64(3)}
    torch.save({"model": weights, "optimizer": {"step": 3, "lr": np.float64(0.1)}, "iteration": 5}, tmp_path / "good.pth")
    read = read_checkpoint(tmp_path / "good.pth")
    assert {name: (value.shape, value.dtype) for name, value in read.items()} == {
        "a.weight": ((2, 3), torch.float32), "b": ((4,), torch.float32), "c": ((), torch.int64)}
    assert torch.equal(read["b"], torch.arange(4.0))
    for number, content in enumerate((b"", b"no checkpoint", b"PK\x03\x04" + bytes(40), bytes(range(256)), pickle.dumps(Trap()),
                                      weights["a.weight"], {"model": {"a": "text"}}, {"model": {"a": Trap()}})):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with refused(ModelNotAvailable, path, "of tensors"):
            cutler_of(path)
    assert "a pickle was run" not in capsys.readouterr().out


def test_the_weights_must_be_complete(tmp_path, cutler_of):
    weights = {"0.weight": torch.ones(2, 3), "0.bias": torch.zeros(2), "beyond": torch.ones(2),
               **{f"1.{name}": torch.ones(2) for name in ("weight", "bias", "running_mean", "running_var")}}
    for name, kept in (("good", weights), ("bad", {k: v for k, v in weights.items() if "mean" not in k}),
                       ("other", weights | {"0.weight": torch.ones(4, 3)})):
        torch.save({"model": kept}, tmp_path / f"{name}.pth")
    assert torch.equal(cutler_of(tmp_path / "good.pth").model[0].weight, weights["0.weight"])
    for source, told in (("bad.pth", "lack 1 tensors, 1.running_mean"), ("other.pth", "size mismatch for 0.weight"), ("", "")):
        with refused(ModelNotAvailable, tmp_path / source, told):
            cutler_of(tmp_path / source)
    with refused(ProfileError, "models.cutler is not set"):
        cutler_of("")


class Settings(dict):
    """Keeps what is set, as detectron2's configuration does."""

    def merge_from_list(self, items):
        self.update(zip(items[::2], items[1::2], strict=True))


def test_the_network_is_built_by_cutlers_configuration(monkeypatch):
    monkeypatch.setattr(cutler, "_detectron2", lambda: (Settings, lambda given: types.SimpleNamespace(eval=lambda: given)))
    given = cutler.build_network("cpu", {"MODEL.FPN.NORM": "GN"})
    assert len(given) == sum(map(len, CONFIG.values())) + 2 and given["MODEL.PIXEL_MEAN"][0] > given["MODEL.PIXEL_MEAN"][2]  # red first
    named = {"INPUT.FORMAT": "RGB", "MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", "MODEL.FPN.NORM": "GN", "MODEL.RPN.NMS_THRESH": 0.65}
    assert named.items() <= given.items()


@pytest.mark.slow
def test_the_real_cascade_finds_instances():
    """Batch norm without statistics overflows in random weights, group norm does not."""
    pytest.importorskip("detectron2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = cutler.build_network("cpu", {"MODEL.RESNETS.NORM": "GN", "MODEL.FPN.NORM": "GN"})
    assert type(network.roi_heads).__name__ == "CascadeROIHeads" and network.input_format == "RGB"
    assert len(network.roi_heads.box_predictor) == 3
    masks = CutLER(network, 0.0).propose(picture(96, 144), "")
    assert len(masks) and masks.shape[1:] == (96, 144)


# ---- Segment Anything, by points and by words

def parts(built):
    assert built("sam").generate.model is built("grounded-sam").model  # loaded once
    return built("grounded-sam").model, built("grounded-sam").processor


def masks_by_hand(model, processor, image, point):
    """The three masks (f32, at the image) and scores of one point (x, y), resized by the processor's own conventions but step by step."""
    height, width = image.shape[:2]
    side = processor.image_processor.size["longest_edge"]
    scale = side / max(height, width)
    rows, columns = int(height * scale + 0.5), int(width * scale + 0.5)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    tensor = torch.nn.functional.interpolate(tensor, (rows, columns), mode="bilinear", antialias=True).round() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pixels = torch.zeros(1, 3, side, side)
    pixels[..., :rows, :columns] = (tensor - mean) / std
    where = torch.tensor([[[[point[0] * columns / width, point[1] * rows / height]]]])
    with torch.no_grad():
        output = model(pixel_values=pixels, input_points=where, input_labels=torch.ones(1, 1, 1, dtype=torch.long))
    large = torch.nn.functional.interpolate(output.pred_masks[0], (side, side), mode="bilinear")[..., :rows, :columns]
    return torch.nn.functional.interpolate(large, (height, width), mode="bilinear")[0], output.iou_scores[0, 0]


def test_sam_prompts_a_grid_and_keeps_what_passes_every_filter(models, built):
    image = picture(40, 60)
    made = [masks_by_hand(*parts(built), image, (x, y)) for y in (10, 30) for x in (15, 45)]
    logits, scores = (torch.cat([pair[n] for pair in made]) for n in range(2))
    stable = (logits > 1).sum((1, 2)) / (logits > -1).sum((1, 2))
    iou, stability = (float(np.quantile(values, 0.22)) for values in (scores, stable))
    masks = logits > 0
    kept = (scores > iou) & (stable > stability) & masks.any(2).any(1)
    assert 0 < kept.sum() < len(masks)
    masks, scores = masks[kept], scores[kept]
    expected = masks[nms(masks_to_boxes(masks), scores, 0.7)].numpy()
    fields = {"masks.sam_points": 2, "masks.sam_iou": iou, "masks.sam_stability": stability}
    found = SEGMENTERS["sam"](profile(models, "sam", **fields)).propose(image, "")
    assert found.shape == expected.shape and (found == expected).mean((1, 2)).min() > 0.99


def test_sam_computes_in_float32_whatever_the_profile_says(models, built):
    found = SEGMENTERS["sam"](profile(models, "sam", **{"models.dtype": "float16"})).propose(picture(40, 60), "")
    assert len(found) and np.array_equal(found, built("sam").propose(picture(40, 60), ""))


def test_grounded_sam_reads_the_words(built, monkeypatch):
    segmenter, image, given = built("grounded-sam"), picture(40, 60), []
    reader = type(segmenter.read)
    read = reader.__call__
    monkeypatch.setattr(reader, "__call__", lambda *arguments, **options: given.append(options["text"]) or read(*arguments, **options))
    boxes = segmenter.boxes(image, "cat")
    assert boxes.shape == (6, 4) and boxes.dtype == np.float32
    assert np.array_equal(boxes, segmenter.boxes(image, " Cat. "))  # lower case, one full stop
    assert not np.array_equal(boxes, segmenter.boxes(image, "A  Dog and sofa."))
    assert given == ["cat.", "cat.", "a dog and sofa."]
    segmenter.boxes(image, "cat " * 100)  # longer than the model reads
    for empty in ("", "  ", "."):
        with refused(InputError, "words"):
            segmenter.propose(image, empty)


def test_boxes_come_in_pixels_by_score_and_thresholds_cut_them(models, built):
    segmenter, image = built("grounded-sam"), picture(40, 60)
    inputs = segmenter.read(images=image, text="cat.", return_tensors="pt")
    with torch.no_grad():
        output = segmenter.detector(**inputs)
    words = torch.sigmoid(output.logits[0])
    scores = words.max(-1).values
    x, y, w, h = (output.pred_boxes[0] * torch.tensor([60, 40, 60, 40])).unbind(-1)
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)[scores.argsort(descending=True)].numpy()
    assert np.allclose(segmenter.boxes(image, "cat"), corners, atol=1e-4)
    threshold = float(scores.sort(descending=True).values[1:3].mean())
    cut = SEGMENTERS["grounded-sam"](profile(models, "grounded-sam", **{"masks.grounding_box": threshold}))
    assert np.allclose(cut.boxes(image, "cat"), corners[:2], atol=1e-4)
    assert len(cut.propose(image, "cat")) <= 2
    none = SEGMENTERS["grounded-sam"](profile(models, "grounded-sam", **{"masks.grounding_text": 1.0}))
    assert none.boxes(image, "cat").shape == (0, 4) and none.propose(image, "cat").shape == (0, 40, 60)


def test_each_box_becomes_one_mask(built, monkeypatch):
    """Two boxes prompt like two calls with one each, and a box is given in the pixels that the network sees."""
    segmenter, image = built("grounded-sam"), picture(40, 60)
    boxes = np.array([[5, 5, 30, 30], [20.5, 10, 55, 38]], np.float32)
    given, forward = [], segmenter.model.forward

    def spy(*arguments, **options):
        given.append(options["input_boxes"])
        return forward(*arguments, **options)

    monkeypatch.setattr(segmenter.model, "forward", spy)
    found = []
    for chosen in (boxes, boxes[:1], boxes[1:]):
        monkeypatch.setattr(segmenter, "boxes", lambda image, words, chosen=chosen: chosen)
        found.append(segmenter.propose(image, "cat"))
    assert np.array_equal(found[0], np.concatenate(found[1:])) and len(found[0]) == 2
    assert torch.allclose(given[0][0], torch.from_numpy(boxes) * torch.tensor([64 / 60, 43 / 40, 64 / 60, 43 / 40]))


def test_an_elongated_image_is_refused_by_its_size(built):
    for name in ("sam", "grounded-sam"):
        with refused(InputError, "1 x 200 pixels"):
            built(name).propose(picture(1, 200), "cat")
        assert built(name).propose(picture(2, 200), "cat").shape[1:] == (2, 200)
