"""DINO, MAE and both CLIP libraries as extractors, against a ViT computed by hand, timm's ViT, and each other."""

import argparse
import copy
import json
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sentences import refused
from tiny import VIT, make_dino, make_mae

from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.features.clip import ClipExtractor
from ovdiff_lib.features.dino import DinoExtractor
from ovdiff_lib.features.mae import MaeExtractor, from_timm, load_mae
from ovdiff_lib.features.open_clip import OpenClipExtractor, from_transformers
from ovdiff_lib.networks.instruments import captured
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.profiles.reading import load_profile

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def pictures(n, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def features(extractor, images):
    return extractor(images, np.zeros(len(images), np.int64))


def normalised(images, statistics):
    mean, std = (np.array(values, np.float32) for values in statistics)
    return torch.from_numpy((images.astype(np.float32) / 255 - mean) / std)  # (n, H, W, 3)


# ---- a ViT by hand: numbers and names of a state dict, nothing of the libraries' code

def positions_by_hand(table, grid):
    """(1 + h w, D) from (1 + side^2, D)."""
    side = math.isqrt(len(table) - 1)
    patches = table[1:].unflatten(0, (side, side)).movedim(2, 0)[None]
    return torch.cat([table[:1], F.interpolate(patches, grid, mode="bicubic")[0].movedim(0, 2).flatten(0, 1)])


def keys_by_hand(state, images, patch=8, heads=2, layers=3):
    """Keys (n, h, w, D) of the last layer: patches cut out one by one in reading order, heads side by side."""
    pixels = normalised(images, IMAGENET)
    h, w = pixels.shape[1] // patch, pixels.shape[2] // patch
    kernel, bias = (state[f"embeddings.patch_embeddings.projection.{name}"] for name in ("weight", "bias"))
    rows = [torch.einsum("nyxc,dcyx->nd", pixels[:, r * patch:(r + 1) * patch, c * patch:(c + 1) * patch], kernel) + bias
            for r in range(h) for c in range(w)]
    stream = torch.stack([state["embeddings.cls_token"][0, 0].expand(len(images), -1), *rows], dim=1)
    stream = stream + positions_by_hand(state["embeddings.position_embeddings"][0], (h, w))
    for i in range(layers):
        def linear(name, x, i=i):
            return x @ state[f"layers.{i}.{name}.weight"].T + state[f"layers.{i}.{name}.bias"]

        def norm(name, x, i=i):
            return F.layer_norm(x, x.shape[-1:], state[f"layers.{i}.{name}.weight"], state[f"layers.{i}.{name}.bias"], 1e-6)

        normed = norm("layernorm_before", stream)
        query, keys, value = (linear(f"attention.{part}_proj", normed) for part in "qkv")
        split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, keys, value)]
        mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        stream = stream + linear("attention.o_proj", mixed)
        stream = stream + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("layernorm_after", stream))))
    return keys[:, 1:].reshape(len(images), h, w, -1)


@pytest.mark.parametrize("name", ["dino", "mae"])
@pytest.mark.parametrize("shape", [(64, 64), (48, 48), (64, 104), (88, 64)])
def test_keys_equal_a_vit_computed_by_hand(tiny_profile, name, shape):
    extractor, images = EXTRACTORS[name](tiny_profile), pictures(2, *shape)
    expected = keys_by_hand(extractor.model.state_dict(), images)
    assert expected.shape == (2, shape[0] // 8, shape[1] // 8, 32)
    torch.testing.assert_close(features(extractor, images), expected, **CLOSE)


@pytest.mark.parametrize("name", ["dino", "mae", "clip-keys", "open-clip-keys"])
def test_scale_enlarges_what_the_model_sees(tiny_profile, name):
    """A doubled grid; and on an even colour, where interpolation has no say, the features of an image drawn twice as large."""
    images = np.kron(pictures(2, 6, 9), np.ones((1, 8, 8, 1), np.uint8))  # 48 x 72, resized to short side 64
    flat = np.broadcast_to(np.array([200, 90, 30], np.uint8), (1, 64, 64, 3)).copy()
    plain, scaled = (EXTRACTORS[name](tiny_profile.override({"features.vit_scale": s})) for s in (1.0, 2.0))
    assert features(scaled, images).shape == (2, 16, 24, scaled.channels)  # 64 x 96, doubled, patches of 8
    assert features(plain, images).shape == (2, 8, 12, plain.channels)
    big = features(scaled, flat)
    plain.short = 128
    torch.testing.assert_close(big, features(plain, np.repeat(np.repeat(flat, 2, 1), 2, 2)), **CLOSE)


def test_mae_hides_nothing_and_refuses_a_model_that_would(tiny_profile, tiny_models):
    assert json.loads((tiny_models / "mae" / "config.json").read_text())["mask_ratio"] == 0.75
    assert load_mae(tiny_profile).config.mask_ratio == 0
    with pytest.raises(ValueError, match=r"0\.75"):
        MaeExtractor(make_mae(), tiny_profile.features)


# ---- the published sizes, without their weights

def published(kind, settings):
    """DINO ViT-B/8, MAE ViT-L/16 trained at 448, CLIP ViT-B/16 of both libraries."""
    import open_clip
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

    if kind == "dino":
        return DinoExtractor(ViTModel(ViTConfig(patch_size=8), add_pooling_layer=False), settings)
    if kind == "mae":
        large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        return MaeExtractor(ViTMAEModel(ViTMAEConfig(**large, image_size=448, mask_ratio=0.0)), settings)
    if kind == "clip":
        config = CLIPConfig(vision_config={"patch_size": 16}, text_config={"num_hidden_layers": 1})
        return ClipExtractor(CLIPModel(config), settings, "keys")
    return OpenClipExtractor(open_clip.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu")).visual, settings, "keys")


@pytest.mark.parametrize(("kind", "channels", "patch", "source"), [
    ("dino", 768, 8, "layers.11.attention.k_proj"), ("mae", 1024, 16, "layers.23.attention.k_proj"),
    ("clip", 768, 16, "vision_model.encoder.layers.10.self_attn.k_proj"), ("open_clip", 768, 16, "transformer.resblocks.10.ln_1")])
def test_published_networks_have_their_layers_and_run_at_every_size(kind, channels, patch, source):
    """At full depth on the device that computes shapes alone."""
    with torch.device("meta"), torch.no_grad():
        extractor = published(kind, load_profile("paper").features)
        named = {module: name for name, module in extractor.model.named_modules()}
        assert (named[extractor.source], extractor.channels, extractor.patch) == (source, channels, patch)
        for image, size in (((448, 448), (448, 448)), ((336, 336), (336, 336)), ((512, 512), (448, 448)), ((512, 336), (688, 448))):
            assert extractor.input_size(*image) == size
        for height, width in ((448, 448), (512, 336)):  # not square, and larger than it was trained with
            with captured({"source": extractor.source}) as outputs:
                extractor.run(torch.empty(1, 3, height, width))
            found = extractor.features_of(outputs["source"])
            assert found.shape == (1, 1 + height // patch * (width // patch), channels)


# ---- MAE's published files

def legacy(width=128, k_bias=True):
    """timm's own ViT of two heads of 64 channels, and the state dict that long_seq_mae would store for it."""
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(img_size=64, patch_size=8, embed_dim=width, depth=2, num_heads=2, num_classes=0, qkv_bias=True).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if not k_bias:
            for block in vit.blocks:
                block.attn.qkv.bias[width:2 * width] = 0
    state = {name: value.clone() for name, value in vit.state_dict().items()}
    if not k_bias:
        for name in [name for name in state if name.endswith("qkv.bias")]:
            bias = state.pop(name)
            state[name.replace("qkv.bias", "q_bias")], state[name.replace("qkv.bias", "v_bias")] = bias[:width], bias[2 * width:]
    decoder = {"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 65, 16), "decoder_embed.weight": (16, width),
               "decoder_blocks.0.attn.qkv.weight": (48, 16), "decoder_downsample.weight": (16, 16, 2, 2)}
    return vit, state | {name: torch.zeros(shape) for name, shape in decoder.items()}


def timm_keys(vit, images):
    with captured({"qkv": vit.blocks[-1].attn.qkv}) as outputs, torch.no_grad():
        vit.forward_features(normalised(images, IMAGENET).permute(0, 3, 1, 2))
    return outputs["qkv"].reshape(len(images), 65, 3, -1)[:, 1:, 1].reshape(len(images), 8, 8, -1)


def mae(profile, source):
    return EXTRACTORS["mae"](profile.override({"models.mae": str(source)}))


@pytest.mark.parametrize("k_bias", [True, False])
def test_mae_file_of_the_original_code_equals_timm(tiny_profile, tmp_path, k_bias):
    vit, state = legacy(k_bias=k_bias)
    path = tmp_path / "vitl_img448.pth"
    torch.save({"model": state, "epoch": 1599, "scaler": {}, "args": argparse.Namespace(no_k_bias_in_vit=not k_bias, lr=1e-3)}, path)
    extractor, images = mae(tiny_profile, path), pictures(3, 64, 64)
    assert extractor.channels == 128 and extractor.model.config.image_size == 64 and not extractor.model.training
    found = features(extractor, images)
    torch.testing.assert_close(found, timm_keys(vit, images), **CLOSE)
    assert bool(extractor.model.layers[1].attention.k_proj.bias.any()) == k_bias
    extractor.model.save_pretrained(tmp_path / "folder")
    assert torch.equal(features(mae(tiny_profile, tmp_path / "folder"), images), found)
    torch.save(state, tmp_path / "bare.pth")  # without its wrapping, and in half precision
    half = mae(tiny_profile.override({"models.dtype": "float16"}), tmp_path / "bare.pth")
    assert {p.dtype for p in half.model.parameters()} == {torch.float16}
    assert F.cosine_similarity(features(half, images), found, dim=-1).min() > 0.999


def test_long_sequence_checkpoint_at_its_true_size():
    """ViT-L/16 with 785 positions, one layer of the 24."""
    shapes = {"cls_token": (1, 1, 1024), "pos_embed": (1, 785, 1024), "patch_embed.proj.weight": (1024, 3, 16, 16),
              "patch_embed.proj.bias": (1024,), "norm.weight": (1024,), "norm.bias": (1024,), "mask_token": (1, 1, 512),
              "decoder_pred.weight": (768, 512)}
    shapes |= {f"blocks.0.{k}": v for k, v in {
        "norm1.weight": (1024,), "norm1.bias": (1024,), "norm2.weight": (1024,), "norm2.bias": (1024,), "attn.qkv.weight": (3072, 1024),
        "attn.q_bias": (1024,), "attn.v_bias": (1024,), "attn.proj.weight": (1024, 1024), "attn.proj.bias": (1024,),
        "mlp.fc1.weight": (4096, 1024), "mlp.fc1.bias": (4096,), "mlp.fc2.weight": (1024, 4096), "mlp.fc2.bias": (1024,)}.items()}
    config = from_timm({name: torch.zeros(shape) for name, shape in shapes.items()}).config
    assert (config.image_size, config.patch_size, config.hidden_size, config.num_attention_heads) == (448, 16, 1024, 16)
    assert (config.num_hidden_layers, config.intermediate_size, config.mask_ratio) == (1, 4096, 0)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_mae_files_that_are_no_such_checkpoint(tiny_profile, tmp_path):
    (_, state), harmful = legacy(), Harmful(tmp_path / "made")
    cases = {
        "harmful": ({"model": state, "extra": harmful}, "not a checkpoint of tensors"),
        "no-table": ({"model": {"a": 1}}, "no table of tensors"), "list": ([1, 2], "no table of tensors"),
        "half": ({"model": {k: v for k, v in state.items() if k != "blocks.1.mlp.fc2.bias"}}, "lack 1 tensors, layers.1.mlp.fc2.bias"),
        "no-v": ({"model": {k: v for k, v in legacy(k_bias=False)[1].items() if not k.endswith("v_bias")}}, "lack 2 tensors"),
        "beyond": ({"model": state | {"blocks.0.ls1.gamma": torch.ones(128)}}, "layers.0.ls1.gamma"),
        "other": ({"model": {"conv1.weight": torch.ones(1)}}, "of a ViT"),
        "positions": ({"model": state | {"pos_embed": torch.zeros(1, 64, 128)}}, "64 positions"),
        "shape": ({"model": state | {"norm.bias": torch.zeros(64)}}, "[64], not [128]"),
        "nan": ({"model": state | {"norm.bias": torch.full((128,), torch.nan)}}, "not finite")}
    for name, (content, words) in cases.items():
        torch.save(content, tmp_path / f"{name}.pth")
        cases[name] = words
    for name, data in (("empty", b""), ("cut", (tmp_path / "nan.pth").read_bytes()[:5000]), ("text", b"<html>not found</html>"),
                       ("pickle", pickle.dumps({"model": harmful}))):
        (tmp_path / f"{name}.pth").write_bytes(data)
        cases[name] = "damaged"
    for name, words in (cases | {"absent": "does not exist"}).items():
        with refused(ModelNotAvailable, f"{name}.pth", words):
            mae(tiny_profile, tmp_path / f"{name}.pth")
    assert not harmful.path.exists()


def test_mae_with_its_decoder_as_it_is_on_the_hub(tiny_profile, tmp_path):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    whole = ViTMAEForPreTraining(ViTMAEConfig(**VIT, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                                              decoder_intermediate_size=32)).eval()
    whole.save_pretrained(tmp_path)
    images = pictures(1, 64, 64)
    expected = keys_by_hand(whole.vit.state_dict(), images)
    torch.testing.assert_close(features(mae(tiny_profile, tmp_path), images), expected, **CLOSE)


# ---- CLIP in two libraries

@pytest.fixture(scope="module")
def biased_profile(tiny_profile, tmp_path_factory):
    """The tiny CLIP with biases and scales other than 0 and 1, so that one left out or swapped is seen."""
    model = copy.deepcopy(load_clip(tiny_profile)[0])
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("biased") / "clip"
    shutil.copytree(tiny_profile.models.clip, folder)
    model.save_pretrained(folder)
    return tiny_profile.override({"models.clip": str(folder), "models.open_clip": str(folder)})


@pytest.mark.parametrize("kind", ["keys", "tokens"])
@pytest.mark.parametrize("layer", [0, -2, -1])
def test_open_clip_equals_transformers(biased_profile, kind, layer):
    profile = biased_profile.override({"features.clip_layer": layer})
    expected, extractor = EXTRACTORS[f"clip-{kind}"](profile), EXTRACTORS[f"open-clip-{kind}"](profile)
    for shape, grid in (((64, 64), (8, 8)), ((48, 48), (6, 6)), ((50, 90), (8, 15))):
        images = pictures(2, *shape)
        found, wanted = features(extractor, images), features(expected, images)
        assert found.shape == wanted.shape == (2, *grid, 32) and extractor.channels == expected.channels and wanted.std() > 0.1
        assert (found - wanted).abs().max() < 1e-4 * wanted.std()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "relu"])
def test_converted_clip_gives_the_same_embedding(biased_profile, activation):
    """Or is refused, where open_clip does not have its activation."""
    trained = load_clip(biased_profile)[0]
    config = trained.config.to_dict()
    config["vision_config"]["hidden_act"] = activation
    model = type(trained)(type(trained.config)(**config)).eval()
    model.load_state_dict(trained.state_dict())
    if activation == "relu":
        with pytest.raises(ValueError, match="relu"):
            from_transformers(model)
        return
    pixels = normalised(pictures(3, 64, 64), OPENAI).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        torch.testing.assert_close(from_transformers(model)(pixels), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["clip-tokens", "open-clip-tokens"])
def test_clip_normalisation(tiny_profile, kind):
    images, model = np.full((2, 64, 64, 3), [[[[80, 120, 90]]], [[[150, 60, 200]]]], np.uint8), load_clip(tiny_profile)[0]
    for name, statistics in (("clip", OPENAI), ("imagenet", IMAGENET)):
        pixels = normalised(images, statistics).permute(0, 3, 1, 2)
        with torch.no_grad():
            hidden = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        found = features(EXTRACTORS[kind](tiny_profile.override({"features.clip_normalisation": name})), images)
        torch.testing.assert_close(found, hidden[2][:, 1:].reshape(2, 8, 8, 32), **CLOSE)
        assert torch.equal(found, features(EXTRACTORS[kind](tiny_profile), images)) == (name == "clip")  # the default


TOY = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
       "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}}


@pytest.fixture
def toy(monkeypatch, tmp_path, tiny_profile):
    """``build(architecture, weights)`` for "toy" and "toy-quickgelu", which have a tag, and the tag's file, in no cache yet."""
    import huggingface_hub
    import open_clip
    from open_clip import factory, pretrained

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: None)
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", {**factory._MODEL_CONFIGS, "toy": TOY, "toy-quickgelu": {**TOY, "quick_gelu": True}})
    tag = {"hf_hub": "nobody/toy/", "quick_gelu": True}
    monkeypatch.setattr(pretrained, "_PRETRAINED", {**pretrained._PRETRAINED, "toy": {"quick": tag}, "toy-quickgelu": {"quick": tag}})
    torch.manual_seed(5)
    model = open_clip.create_model("toy", pretrained_text=False)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    file = tmp_path / "toy.pt"
    torch.save(model.state_dict(), file)

    def build(name, weights, **fields):
        return EXTRACTORS["open-clip-keys"](tiny_profile.override({
            "models.open_clip": name, "models.open_clip_pretrained": str(weights), "features.clip_layer": -1,
            "features.clip_input_size": 32, **fields}))

    return build, file


def test_open_clip_file_and_activation(toy, tmp_path, monkeypatch):
    import huggingface_hub
    from open_clip.transformer import QuickGELU

    build, file = toy
    images = pictures(1, 32, 48)
    plain, quick = (build(name, file) for name in ("toy", "toy-quickgelu"))
    state = torch.load(file)
    assert torch.equal(plain.model.conv1.weight, state["visual.conv1.weight"]) and not plain.model.training
    assert features(plain, images).shape == (1, 4, 6, 64)
    assert (features(plain, images) - features(quick, images)).abs().mean() > 1e-3  # the two are not taken for one another
    torch.save({name: value * 1.5 for name, value in state.items()}, tmp_path / "other.pt")  # nor two files
    torch.testing.assert_close(plain.model.conv1.weight * 1.5, build("toy", tmp_path / "other.pt").model.conv1.weight)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache",
                        lambda repository, name: str(file) if (repository, name) == ("nobody/toy", "open_clip_pytorch_model.bin") else None)
    tagged = build("toy", "quick")  # trained with QuickGELU, which the bare architecture does not have
    assert isinstance(tagged.model.transformer.resblocks[0].mlp.gelu, QuickGELU)
    torch.testing.assert_close(features(tagged, images), features(quick, images), **CLOSE)


def test_open_clip_names_and_weights_that_are_wrong(toy, tmp_path, monkeypatch):
    import open_clip

    build, file = toy
    for name, weights, told in (("ViT-B-16-quickgellu", "openai", "ViT-B-16-quickgelu"), ("RN50", "openai", "plain ViT"),
                                ("toy", "openai", "tag (quick)"), ("toy", "", "open_clip_pretrained"), ("", "", "not set")):
        with refused(ProfileError, "models.open_clip", told):
            build(name, weights)
    with refused(ModelNotAvailable, "`hf download nobody/toy", "models.download"):
        build("toy", "quick")

    def offline(trained):
        raise FileNotFoundError("no route to the hub\nand more")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with refused(ModelNotAvailable, "no route to the hub"):
        build("toy", "quick", **{"models.download": True})
    torch.save({name: value for name, value in torch.load(file).items() if name != "visual.ln_post.bias"}, tmp_path / "lacking.pt")
    torch.save({}, tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("<html>")
    for name in ("lacking", "nothing", "text"):
        with refused(ModelNotAvailable, f"{name}.pt"):
            build("toy", tmp_path / f"{name}.pt")


def test_published_tags_are_known_to_open_clip():
    """The names that profiles and messages use, and where weights lie; the GELU variant would run OpenAI's wrongly."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    assert open_clip.get_model_config("ViT-B-16-quickgelu")["quick_gelu"] and "quick_gelu" not in open_clip.get_model_config("ViT-B-16")
    for architecture in ("ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-H-14"):
        for tag in open_clip.list_pretrained_tags_by_model(architecture):
            found = get_pretrained_cfg(architecture, tag)
            assert found["hf_hub"].endswith("/") and (tag != "openai" or found["quick_gelu"])  # a repository, no file


# ---- models that are not there, or not whole

@pytest.mark.parametrize("name", ["dino", "mae", "open_clip"])
def test_missing_models(tiny_profile, tmp_path, name):
    extractor = EXTRACTORS["open-clip-tokens" if name == "open_clip" else name]
    with refused(ProfileError, f"models.{name}", "not set"):
        extractor(tiny_profile.override({f"models.{name}": ""}))
    for source in (tmp_path / "absent", tmp_path):  # no folder; an empty one
        with refused(ModelNotAvailable, source):
            extractor(tiny_profile.override({f"models.{name}": str(source)}))
    if name == "open_clip":
        return
    (make_dino if name == "dino" else make_mae)().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[next(key for key in sorted(state) if key.endswith(("k_proj.weight", "key.weight")))]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with refused(ModelNotAvailable, "lack", "k_proj"):
        extractor(tiny_profile.override({f"models.{name}": str(tmp_path)}))


# ---- the mini world's MAE

def test_mae_training_saves_an_encoder_that_the_extractor_reads(tiny_profile, tmp_path):
    from ovdiff_lib.recipes import train_mae

    np.save(tmp_path / "train_images.npy", pictures(8, 64, 64))
    np.save(tmp_path / "eval_images.npy", pictures(12, 64, 64, seed=1))
    np.save(tmp_path / "eval_labels.npy", np.arange(12) % 2)
    (tmp_path / "train_captions.json").write_text("[]")
    (tmp_path / "nouns.json").write_text("[]")
    threads = torch.get_num_threads()
    train_mae.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--steps", "2",
                    "--batch", "4", "--width", "32", "--layers", "1"])
    torch.set_num_threads(threads)
    assert features(mae(tiny_profile, tmp_path / "out"), pictures(1, 64, 104)).shape == (1, 8, 13, 32)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16} and not any("decoder" in name for name in state)
