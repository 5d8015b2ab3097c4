"""Loading: the right objects once, one sentence for whatever is wrong with the weights, identities that follow the content."""

import json
import os
import shutil

import numpy as np
import pytest
import sentences
import torch
import transformers
from safetensors.torch import load_file, save_file

from ovdiff_lib.errors import ModelNotAvailable, OVDiffError, ProfileError
from ovdiff_lib.features.open_clip import OpenClipExtractor
from ovdiff_lib.features.vit import DinoExtractor
from ovdiff_lib.masks.segmenters.maskcut import MaskCut
from ovdiff_lib.networks import identity
from ovdiff_lib.networks import loading as models
from ovdiff_lib.networks.identity import model_identity
from ovdiff_lib.networks.instruments import attention_grid, captured, gathered
from ovdiff_lib.networks.loading import load_clip, load_diffusion, load_dino, load_mae

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def with_model(profile, **paths):
    return profile.override({f"models.{name}": str(path) for name, path in paths.items()})


def refused(load, given, *words) -> ModelNotAvailable:
    """The error of ``load(given)``: one sentence with these words."""
    with sentences.refused(ModelNotAvailable, *words) as caught:
        load(given)
    return caught.value


def test_diffusion_is_ready_to_sample(tiny_profile):
    pipe = load_diffusion(tiny_profile)
    assert type(pipe).__name__ == "StableDiffusionPipeline" and pipe.safety_checker is None
    config = pipe.scheduler.config
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert (config.algorithm_type, config.solver_order, config.timestep_spacing) == ("dpmsolver++", 2, "linspace")
    assert (config.beta_start, config.beta_schedule) == (0.00085, "scaled_linear")  # the pipeline's own schedule
    assert not any(m.training for m in (pipe.unet, pipe.vae, pipe.text_encoder))
    assert pipe._progress_bar_config == {"disable": True}


def test_clip_pairs_model_and_tokenizer(tiny_profile):
    model, tokenizer = load_clip(tiny_profile)
    assert not model.training and model.device.type == "cpu"
    assert tokenizer("cat").input_ids[-1] == model.config.text_config.eos_token_id == len(tokenizer) - 1


def test_weights_are_those_on_disk_and_loaded_once_per_folder_and_dtype(tiny_profile, tiny_models):
    stored, pipe = load_file(tiny_models / "stable-diffusion" / UNET_FILE), load_diffusion(tiny_profile)
    loaded = pipe.unet.state_dict()
    assert stored.keys() == loaded.keys() and all(torch.equal(stored[k], loaded[k]) for k in stored)
    assert pipe is load_diffusion(tiny_profile.override({"support.steps": 7}))
    half = tiny_profile.override({"models.dtype": "bfloat16"})
    assert load_clip(tiny_profile)[0].dtype == torch.float32 and load_clip(half)[0].dtype == torch.bfloat16
    assert load_diffusion(half).unet.dtype == torch.bfloat16


@pytest.mark.parametrize("load", [load_diffusion, load_clip, load_dino, load_mae, OpenClipExtractor.load])
def test_missing_models_are_named(tiny_profile, tmp_path, load):
    (tmp_path / "own.pth").write_bytes(b"x")
    for source in ("package:no-such-model", "/no/such/folder", "./gone", "a/b/c", "nobody/no-model", tmp_path, tmp_path / "own.pth"):
        remedy = (f"hf download {source}", "models.download") if source == "nobody/no-model" else ()  # not in the hub's cache
        named = dict.fromkeys(("diffusion", "clip", "dino", "mae", "open_clip"), source)
        refused(load, with_model(tiny_profile, **named), str(source), *remedy)


@pytest.mark.parametrize(("field", "wrong", "load", "told"), [
    ("diffusion", "clip", load_diffusion, ""), ("clip", "stable-diffusion", load_clip, ""),
    ("clip", "stable-diffusion/unet", load_clip, ""), ("mae", "dino", load_mae, "model_type 'vit'"),
    ("dino", "mae", load_dino, "model_type 'vit_mae'"), ("clip", "dino", load_clip, "model_type 'vit'"),
    ("mae", "mae/model.safetensors", load_mae, "folders in the format of transformers")])
def test_weights_of_another_architecture_are_refused(tiny_profile, tiny_models, capfd, field, wrong, load, told):
    """A ViT loads into a ViTMAEModel and the other way round without a tensor missing."""
    capfd.readouterr()
    refused(load, with_model(tiny_profile, **{field: tiny_models / wrong}), told)
    assert "".join(capfd.readouterr()) == ""  # no report of the library


QUERY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"


def edited(change):
    """Damages a file of weights by ``change(tensors)``."""
    def damage(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    return damage


@pytest.mark.parametrize(("damage", "told"), [
    (edited(lambda tensors: tensors.pop(QUERY)), f"lack 1 tensors, {QUERY}"),
    (edited(lambda tensors: tensors["conv_in.bias"].__setitem__(0, float("nan"))), "not finite, in conv_in.bias"),
    (edited(lambda tensors: tensors.update({"conv_in.bias": torch.zeros(99)})), ""),
    (lambda path: os.truncate(path, path.stat().st_size // 2), ""), (os.remove, "")])
def test_damaged_weights_are_refused(tiny_profile, tiny_models, tmp_path, damage, told):
    folder = shutil.copytree(tiny_models / "stable-diffusion", tmp_path / "damaged")
    damage(folder / UNET_FILE)
    refused(load_diffusion, with_model(tiny_profile, diffusion=folder), told, str(folder))


# ---- libraries of other versions

@pytest.fixture
def reload(monkeypatch):
    """Nothing is loaded yet."""
    monkeypatch.setattr(models, "_loaded", {})


@pytest.fixture
def installed(monkeypatch, reload):
    """Sets versions of libraries, and the lines that this package requires."""
    def pretend(requires, **versions):
        known = models.importlib.metadata.version
        monkeypatch.setattr(models.importlib.metadata, "version", lambda name: versions.get(name) or known(name))
        monkeypatch.setattr(models.importlib.metadata, "requires", lambda name: {"ovdiff-lib": requires}[name])
    return pretend


RANGES = ["diffusers<1,>=0.40; python_version > '3'", "transformers<6,>=5.9", "open-clip-torch<4,>=3"]


@pytest.mark.parametrize(("library", "version", "floor", "load"), [
    ("diffusers", "0.39.0", ">=0.40", load_diffusion), ("transformers", "5.8.1", ">=5.9", load_dino),
    ("transformers", "6.0.0", ">=5.9", load_mae), ("open-clip-torch", "2.32.0", ">=3", OpenClipExtractor.load)])
def test_a_library_outside_its_range_is_refused_before_it_is_used(tiny_profile, monkeypatch, installed, library, version, floor, load):
    installed(RANGES, **{library: version})
    for kind in ("transformers.PreTrainedModel", "diffusers.ModelMixin"):
        monkeypatch.setattr(f"{kind}.from_pretrained", lambda *_, **__: pytest.fail("it was used"))
    refused(load, tiny_profile, f"{library} {version} is installed", f"{floor}\"`")  # what pip is to install


def raising(error):
    def fail(*_arguments, **_options):
        raise error

    return fail


@pytest.mark.parametrize("error", [
    TypeError("got an unexpected keyword argument 'x'"), AttributeError("no attribute 'layers'"), KeyError("vision_config"),
    ImportError("cannot import name 'ViTModel'", name="transformers"), ModuleNotFoundError("No module named 'y'", name="y"),
    ImportError("")])
@pytest.mark.parametrize(("load", "where"), [(load_diffusion, "diffusers.AutoencoderKL"), (load_clip, "transformers.CLIPModel"),
                                             (load_dino, "transformers.ViTModel"), (load_mae, "transformers.ViTMAEModel")])
def test_what_libraries_that_do_not_fit_raise_becomes_a_sentence(tiny_profile, monkeypatch, reload, error, load, where):
    monkeypatch.setattr(f"{where}.from_pretrained", raising(error))
    raised = refused(load, tiny_profile, f"{type(error).__name__} in ", str(error).strip("'"))
    assert raised.__cause__ is error  # with its traceback, for whoever calls from Python


def small_vit():
    return transformers.ViTModel(transformers.ViTConfig(hidden_size=4, num_attention_heads=2, num_hidden_layers=1))


def test_where_it_happened_is_named_with_the_libraries_versions(tiny_profile, tiny_models, tmp_path, reload):
    folder = shutil.copytree(tiny_models / "dino", tmp_path / "dino")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "no-such-activation"}))
    library = f"transformers {transformers.__version__}"
    refused(load_dino, with_model(tiny_profile, dino=folder), "KeyError in transformers.", library, str(folder))


def test_layers_that_an_installed_version_names_otherwise(tiny_profile):
    """What transformers before 5.9 called `encoder.layer`, and a projection that is fused."""
    network = small_vit()
    assert models.last_projection(network, "q_proj") is network.layers[0].attention.q_proj
    del network.layers[0].attention.k_proj
    for build in (lambda model: DinoExtractor(model, tiny_profile.features),
                  lambda model: MaskCut(model, tiny_profile.override({"masks.maskcut_facet": "keys"}).masks)):
        refused(build, network, "ViTModel", "k_proj")
    del network.layers
    refused(lambda model: models.last_projection(model, "v_proj"), network, "'layers'", "transformers")


def test_identity_follows_content_not_place_and_reads_a_file_once(tiny_models, tmp_path, monkeypatch):
    first = model_identity(str(tiny_models / "clip"))
    copy = shutil.copytree(tiny_models / "clip", tmp_path / "elsewhere")
    assert model_identity(str(copy)) == first != model_identity(str(tiny_models / "stable-diffusion"))
    (copy / "README.md").write_text("not part of the model")
    assert model_identity(str(copy)) == first
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (1, 1))
    assert model_identity(str(copy)) != first
    assert model_identity("owner/name") == "hub:owner/name@not-cached"
    monkeypatch.setattr(identity.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert model_identity(str(tiny_models / "clip")) == first


@pytest.mark.parametrize("value", ["toaster", "cuda:99"])
def test_impossible_device(tiny_profile, value):
    with pytest.raises(ProfileError, match=value):
        load_clip(tiny_profile.override({"models.device": value}))


@pytest.mark.parametrize(("here", "expected"), [({"cuda", "mps"}, "cuda"), ({"mps"}, "mps"), (set(), "cpu")])
def test_auto_is_the_gpu_that_is_here(tiny_profile, monkeypatch, here, expected):
    for kind, place in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(place, "is_available", lambda kind=kind: kind in here)
    assert models.resolve_device(tiny_profile.override({"models.device": "auto"})).type == expected


def test_on_a_gpu_the_vae_takes_an_image_at_a_time(tiny_profile):
    sliced = [load_diffusion(tiny_profile.override({"models.device": device})).vae.use_slicing for device in ("cpu", "meta")]
    assert sliced == [False, True]


def test_a_device_too_small_for_a_model_is_not_the_models_fault(tiny_profile):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.44 GiB.\nGPU 0 has none")

    with pytest.raises(OVDiffError, match=r"ran out of memory .*3\.44 GiB.*a device with more") as caught:
        models.load_network(tiny_profile.override({"models.device": "meta"}), "detector", full)
    assert not isinstance(caught.value, ModelNotAvailable)


def test_attention_grid_is_that_of_strided_convolutions():
    down = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1)  # diffusers' Downsample2D
    for latent in [(16, 16), (64, 64), (56, 56), (9, 13), (10, 14), (7, 64), (42, 30)]:
        x = torch.zeros(1, 1, *latent)
        for _ in range(4):
            assert attention_grid(x.shape[-2] * x.shape[-1], latent) == tuple(x.shape[-2:])
            x = down(x)
    with pytest.raises(ValueError, match="halving"):
        attention_grid(17, (16, 16))


def test_captured_hands_out_outputs_may_stop_at_the_last_and_removes_its_hooks():
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 5), torch.nn.Linear(7, 1))  # which cannot run
    with captured({"first": layers[0], "third": layers[2]}, stop=True) as outputs:
        layers(torch.ones(1, 3))
        raise AssertionError("the block goes on")
    assert torch.equal(outputs["first"], layers[0](torch.ones(1, 3)))
    assert outputs["third"].shape == (1, 5) and torch.equal(layers[2](outputs["first"].relu()), outputs["third"])
    with pytest.raises(RuntimeError, match="shapes"), captured({"third": layers[2]}):
        layers(torch.ones(1, 3))
    assert not any(layer._forward_hooks for layer in layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found(value):
    def gather(values, size):
        images = np.zeros((len(values), 2, 4, 3), np.uint8)
        return gathered(lambda _, seeds: values[seeds], images, np.arange(len(values)), values.shape[1:], size, "It")

    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    for fine in (values, torch.full((4,), 3e38), torch.zeros(0)):  # a sum that overflows is no proof
        assert torch.equal(gather(fine, 2), fine)
    for place, wrong in (((1, 2, 3), value), ((2, 0, 0), -value)):
        values[place] = wrong
        for size in (2, 3):
            with pytest.raises(OVDiffError, match="It gave features that are not finite"):
                gather(values, size)
