"""Loading: the right objects once, one sentence for whatever is wrong with the weights, identities that follow the content."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.features.mae import load_mae
from ovdiff_lib.features.open_clip import load_open_clip
from ovdiff_lib.networks import identity
from ovdiff_lib.networks import loading as models
from ovdiff_lib.networks.identity import model_identity, resolve_model
from ovdiff_lib.networks.instruments import all_finite, attention_grid, captured
from ovdiff_lib.networks.loading import load_clip, load_diffusion, load_dino
from ovdiff_lib.networks.published import MODEL_TYPES

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def with_model(profile, **paths):
    return profile.override({f"models.{name}": str(path) for name, path in paths.items()})


def sentence(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 560
    return text


def test_diffusion_is_ready_to_sample(tiny_profile):
    pipe = load_diffusion(tiny_profile)
    assert type(pipe).__name__ == "StableDiffusionPipeline" and pipe.safety_checker is None
    scheduler = pipe.scheduler
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert (scheduler.config.algorithm_type, scheduler.config.solver_order) == ("dpmsolver++", 2)
    assert (scheduler.config.beta_start, scheduler.config.beta_schedule) == (0.00085, "scaled_linear")  # the pipeline's own schedule
    assert not any(m.training for m in (pipe.unet, pipe.vae, pipe.text_encoder))
    assert pipe._progress_bar_config == {"disable": True}


def test_clip_pairs_model_and_tokenizer(tiny_profile):
    model, tokenizer = load_clip(tiny_profile)
    assert not model.training and model.device.type == "cpu"
    assert tokenizer("cat").input_ids[-1] == model.config.text_config.eos_token_id == len(tokenizer) - 1


def test_weights_survive_the_round_trip(tiny_profile, tiny_models):
    stored = load_file(tiny_models / "stable-diffusion" / UNET_FILE)
    loaded = load_diffusion(tiny_profile).unet.state_dict()
    assert stored.keys() == loaded.keys() and all(torch.equal(stored[k], loaded[k]) for k in stored)


def test_models_are_loaded_once_per_folder_and_dtype(tiny_profile):
    assert load_diffusion(tiny_profile) is load_diffusion(tiny_profile.override({"support.steps": 7}))
    half = tiny_profile.override({"models.dtype": "bfloat16"})
    assert load_clip(tiny_profile)[0].dtype == torch.float32 and load_clip(half)[0].dtype == torch.bfloat16
    assert load_diffusion(half).unet.dtype == torch.bfloat16


@pytest.mark.parametrize("identifier", ["package:no-such-model", "/no/such/folder", "./gone", "a/b/c"])
def test_missing_folder(tiny_profile, identifier):
    with pytest.raises(ModelNotAvailable) as caught:
        load_diffusion(with_model(tiny_profile, diffusion=identifier))
    assert repr(identifier) in sentence(caught)


@pytest.mark.parametrize("load", [load_diffusion, load_clip])
def test_hub_model_that_is_not_cached_says_how_to_fetch_it(tiny_profile, load):
    with pytest.raises(ModelNotAvailable) as caught:
        load(with_model(tiny_profile, diffusion="nobody/no-model", clip="nobody/no-model"))
    assert "hf download nobody/no-model" in sentence(caught) and "models.download" in str(caught.value)


def test_shipped_models_resolve_inside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "SHIPPED", tmp_path)
    (tmp_path / "clip").mkdir()
    assert resolve_model("package:clip") == tmp_path / "clip"
    assert resolve_model("owner/name") == "owner/name"


def test_folders_of_another_kind_are_refused(tiny_profile, tiny_models, tmp_path):
    profile = with_model(tiny_profile, diffusion=tiny_models / "clip", clip=tiny_models / "stable-diffusion")
    for load in (load_diffusion, load_clip):
        with pytest.raises(ModelNotAvailable) as caught:
            load(profile)
        assert sentence(caught)
    with pytest.raises(ModelNotAvailable):
        load_clip(with_model(tiny_profile, clip=tiny_models / "stable-diffusion" / "unet"))


@pytest.mark.parametrize(("field", "wrong", "load"), [
    ("mae", "dino", load_mae), ("dino", "mae", load_dino), ("open_clip", "dino", load_open_clip), ("clip", "dino", load_clip)])
def test_weights_of_another_architecture_are_refused(tiny_profile, tiny_models, capfd, field, wrong, load):
    """A ViT loads into a ViTMAEModel and the other way round without a tensor missing."""
    capfd.readouterr()
    with pytest.raises(ModelNotAvailable, match="model_type") as caught:
        load(with_model(tiny_profile, **{field: tiny_models / wrong}))
    assert repr({"dino": "vit", "mae": "vit_mae"}[wrong]) in sentence(caught)
    assert "".join(capfd.readouterr()) == ""  # no report of the library


def test_every_shipped_and_tiny_model_has_the_expected_type(tiny_models):
    for folder in (identity.SHIPPED, tiny_models):
        for name in ("clip", "dino", "mae", "groupvit"):
            if (folder / name).is_dir():
                assert models.wrong_type(folder / name, MODEL_TYPES[name]) == ""


def test_expected_types_are_those_of_the_classes():
    from transformers import CLIPConfig, GroundingDinoConfig, GroupViTConfig, SamConfig, ViTConfig, ViTMAEConfig

    kinds = {"clip": CLIPConfig, "dino": ViTConfig, "mae": ViTMAEConfig, "open_clip": CLIPConfig, "sam": SamConfig,
             "grounding": GroundingDinoConfig, "groupvit": GroupViTConfig}
    assert {name: kind.model_type for name, kind in kinds.items()} == MODEL_TYPES


def drop_a_tensor(path):
    tensors = load_file(path)
    tensors.pop("mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight")
    save_file(tensors, path)


def poison(path):
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, path)


def widen(path):
    tensors = load_file(path)
    tensors["conv_in.bias"] = torch.zeros(99)
    save_file(tensors, path)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(("damage", "told"), [
    (drop_a_tensor, "lack 1 tensors, mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"),
    (poison, "not finite, in conv_in.bias"), (widen, ""), (truncate, ""), (os.remove, "")])
def test_damaged_weights_are_refused(tiny_profile, tiny_models, tmp_path, damage, told):
    folder = shutil.copytree(tiny_models / "stable-diffusion", tmp_path / "damaged")
    damage(folder / UNET_FILE)
    with pytest.raises(ModelNotAvailable) as caught:
        load_diffusion(with_model(tiny_profile, diffusion=folder))
    assert told in sentence(caught) and str(folder) in str(caught.value)


# ---- libraries of other versions

@pytest.fixture
def reload(monkeypatch):
    """Nothing is loaded yet, and no version was asked for."""
    monkeypatch.setattr(models, "_loaded", {})
    models._versions.cache_clear()
    yield
    models._versions.cache_clear()


@pytest.fixture
def installed(monkeypatch, reload):
    """Sets what the metadata say: versions of libraries, and the lines that this package requires."""
    def pretend(requires, **versions):
        known = models.importlib.metadata.version
        monkeypatch.setattr(models.importlib.metadata, "version", lambda name: versions.get(name) or known(name))
        monkeypatch.setattr(models.importlib.metadata, "requires", lambda name: {"ovdiff-lib": requires}[name])
    return pretend


RANGES = ["diffusers<1,>=0.40", "transformers<6,>=5.9", "open-clip-torch<4,>=3"]


@pytest.mark.parametrize(("library", "version", "load"), [
    ("diffusers", "0.39.0", load_diffusion), ("transformers", "5.8.1", load_dino), ("transformers", "6.0.0", load_mae),
    ("open_clip_torch", "2.32.0", load_open_clip)])
def test_a_library_outside_its_range_is_refused_before_it_is_used(tiny_profile, monkeypatch, installed, library, version, load):
    from transformers import PreTrainedModel

    installed(RANGES, **{library: version})
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("it was used"))
    monkeypatch.setattr(models, "_build_diffusion", lambda *_: pytest.fail("it was used"))
    with pytest.raises(ModelNotAvailable, match="pip install") as caught:
        load(tiny_profile)
    floor = {"diffusers": ">=0.40", "transformers": ">=5.9", "open_clip_torch": ">=3"}[library]
    assert f"{library} {version} is installed" in sentence(caught) and floor in sentence(caught)


def test_ranges_are_those_of_this_package(tiny_profile, installed):
    installed(["diffusers<1,>=0.41.5; python_version > '3'", "transformers>=5"], diffusers="0.41.4", transformers="7.1.dev0")
    with pytest.raises(ModelNotAvailable, match=r"0\.41\.4 .*diffusers<1,>=0\.41\.5;"):
        load_diffusion(tiny_profile)
    models._versions.cache_clear()
    installed(["diffusers", "transformers>=5"], diffusers="0.1", transformers="7.1.dev0")
    assert load_diffusion(tiny_profile)


def test_without_an_installation_there_is_no_range_to_keep(tiny_profile, reload, monkeypatch):
    def unknown(name):
        raise models.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models.importlib.metadata, "requires", unknown)
    assert load_clip(tiny_profile)


class Old:
    """A network of diffusers before 0.40: what it is not told of goes to its constructor."""

    def __init__(self, *, torch_dtype=None):
        pass

    @classmethod
    def from_pretrained(cls, source, subfolder=None, torch_dtype=None, output_loading_info=False, **options):
        return cls(torch_dtype=torch_dtype, **{k: v for k, v in options.items() if k not in ("local_files_only", "low_cpu_mem_usage")}), {}


def test_an_old_diffusers_that_does_not_know_dtype(tiny_profile, monkeypatch, installed):
    import diffusers

    installed(["diffusers"], diffusers="0.39.0")  # even where nobody named a range
    monkeypatch.setattr(diffusers, "UNet2DConditionModel", Old)
    with pytest.raises(ModelNotAvailable, match="unexpected keyword argument 'dtype'") as caught:
        load_diffusion(tiny_profile)
    assert "TypeError" in sentence(caught) and "pip check" in str(caught.value)
    assert isinstance(caught.value.__cause__, TypeError)


def raising(error):
    def fail(*_arguments, **_options):
        raise error

    return fail


@pytest.mark.parametrize("error", [
    TypeError("got an unexpected keyword argument 'x'"), AttributeError("no attribute 'layers'"), KeyError("vision_config"),
    ImportError("cannot import name 'ViTModel'", name="transformers"), ModuleNotFoundError("No module named 'y'", name="y"),
    ImportError("")])
@pytest.mark.parametrize(("load", "where"), [
    (load_diffusion, ("diffusers", "AutoencoderKL")), (load_clip, ("transformers", "CLIPModel")),
    (load_dino, ("transformers", "ViTModel")), (load_mae, ("transformers", "ViTMAEModel"))])
def test_what_libraries_that_do_not_fit_raise_becomes_a_sentence(tiny_profile, monkeypatch, reload, error, load, where):
    module, name = where
    monkeypatch.setattr(getattr(__import__(module), name), "from_pretrained", raising(error))
    with pytest.raises(ModelNotAvailable) as caught:
        load(tiny_profile)
    assert f"{type(error).__name__} in " in sentence(caught) and "could not be loaded" in str(caught.value)
    assert caught.value.__cause__ is error  # with its traceback, for whoever calls from Python
    if str(error):
        assert str(error).strip("'") in str(caught.value)


def test_the_library_in_which_it_happened_is_named_with_its_version(tiny_profile, tiny_models, tmp_path, reload):
    import transformers

    folder = shutil.copytree(tiny_models / "dino", tmp_path / "dino")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "no-such-activation"}))
    with pytest.raises(ModelNotAvailable, match=r"KeyError in transformers\.") as caught:
        load_dino(with_model(tiny_profile, dino=folder))
    assert f"transformers {transformers.__version__} of <" in sentence(caught) and str(folder) in str(caught.value)


def test_the_library_of_what_lacks_an_attribute_is_named(tiny_profile, reload):
    import open_clip
    import transformers

    def lacking(source, device, dtype, options):
        return transformers.ViTModel(transformers.ViTConfig(hidden_size=4, num_attention_heads=2, num_hidden_layers=1)).no_such_layers

    with pytest.raises(ModelNotAvailable, match=f"AttributeError in .*transformers {transformers.__version__}"):
        models.load_network(tiny_profile, "dino", lacking)
    with pytest.raises(ModelNotAvailable, match=f"open_clip_torch {models.importlib.metadata.version('open_clip_torch')}"):
        models.load_network(tiny_profile, "dino", lambda *_: open_clip.no_such_function)
    with pytest.raises(ModelNotAvailable, match=r"ImportError in .*, with open_clip_torch"):
        models.load_network(tiny_profile, "dino", lambda *_: exec("from open_clip import no_such_name"))


def test_layers_that_an_installed_version_names_otherwise(tiny_profile):
    """What transformers before 5.9 called `encoder.layer`, and a projection that is fused."""
    from transformers import ViTConfig, ViTModel

    from ovdiff_lib.features.dino import DinoExtractor
    from ovdiff_lib.masks.segmenters.maskcut import MaskCut

    network = ViTModel(ViTConfig(hidden_size=4, num_attention_heads=2, num_hidden_layers=1))
    assert models.last_attention(network) is network.layers[0].attention
    del network.layers[0].attention.k_proj
    for build in (models.last_attention, lambda model: DinoExtractor(model, tiny_profile.features),
                  lambda model: MaskCut(model, tiny_profile.masks)):
        with pytest.raises(ModelNotAvailable, match=r"ViTModel.*k_proj") as caught:
            build(network)
        sentence(caught)
    del network.layers
    with pytest.raises(ModelNotAvailable, match=r"no attribute 'layers'.*transformers \d.* of <") as caught:
        models.last_attention(network)
    sentence(caught)


def test_identity_follows_content_not_place(tiny_models, tmp_path):
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


def test_identity_reads_a_file_once(tiny_models, monkeypatch):
    first = model_identity(str(tiny_models / "clip"))
    monkeypatch.setattr(identity.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert model_identity(str(tiny_models / "clip")) == first


@pytest.mark.parametrize(("field", "value"), [("device", "toaster"), ("device", "cuda:99")])
def test_impossible_device(tiny_profile, field, value):
    with pytest.raises(ProfileError, match=value):
        load_clip(tiny_profile.override({f"models.{field}": value}))


def test_attention_grid_is_that_of_strided_convolutions():
    down = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1)  # diffusers' Downsample2D
    for latent in [(16, 16), (64, 64), (56, 56), (9, 13), (10, 14), (7, 64), (42, 30)]:
        x = torch.zeros(1, 1, *latent)
        for _ in range(4):
            assert attention_grid(x.shape[-2] * x.shape[-1], latent) == tuple(x.shape[-2:])
            x = down(x)
    with pytest.raises(ValueError, match="halving"):
        attention_grid(17, (16, 16))


def test_captured_hands_out_outputs_and_removes_its_hooks():
    layer = torch.nn.Linear(3, 2)
    with captured({"layer": layer}) as outputs:
        expected = layer(torch.ones(1, 3))
    assert torch.equal(outputs["layer"], expected)
    with pytest.raises(RuntimeError, match="stop"), captured({"layer": layer}):
        raise RuntimeError("stop")
    assert not layer._forward_hooks


def test_captured_may_stop_at_the_last_module_wanted():
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 5), torch.nn.Linear(7, 1))  # which cannot run
    with captured({"first": layers[0], "third": layers[2]}, stop=True) as outputs:
        layers(torch.ones(1, 3))
        raise AssertionError("the block goes on")
    assert outputs["third"].shape == (1, 5) and torch.equal(layers[2](outputs["first"].relu()), outputs["third"])
    with pytest.raises(RuntimeError, match="shapes"), captured({"third": layers[2]}):
        layers(torch.ones(1, 3))
    assert not any(layer._forward_hooks for layer in layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found(value):
    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    assert all_finite(values) and all_finite(torch.full((4,), 3e38)) and all_finite(torch.zeros(0))  # a sum that overflows is no proof
    values[1, 2, 3] = value
    assert not all_finite(values)
    values[2, 0, 0] = -value
    assert not all_finite(values)


