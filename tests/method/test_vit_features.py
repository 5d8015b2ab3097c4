"""DINO, MAE and both CLIP libraries as extractors, against a ViT computed by hand, timm's ViT, and each other."""

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sentences import refused
from tiny import VIT, make_dino, make_mae, make_open_clip

from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.features.open_clip import OpenClipExtractor
from ovdiff_lib.features.vit import ClipExtractor, DinoExtractor, MaeExtractor
from ovdiff_lib.networks.instruments import captured
from ovdiff_lib.profiles.reading import load_profile

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPEN_CLIP = "open_clip_model.safetensors"
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
        return ClipExtractor(CLIPModel(config).vision_model, settings, "keys")
    return OpenClipExtractor(open_clip.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu")).visual, settings, "keys")


@pytest.mark.parametrize(("kind", "channels", "patch", "source"), [
    ("dino", 768, 8, "layers.11.attention.k_proj"), ("mae", 1024, 16, "layers.23.attention.k_proj"),
    ("clip", 768, 16, "encoder.layers.10.self_attn.k_proj"), ("open_clip", 768, 16, "transformer.resblocks.10.ln_1")])
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


def mae(profile, source):
    return EXTRACTORS["mae"](profile.override({"models.mae": str(source)}))


def test_mae_with_its_decoder_as_it_is_on_the_hub(tiny_profile, tmp_path):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    whole = ViTMAEForPreTraining(ViTMAEConfig(**VIT, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                                              decoder_intermediate_size=32)).eval()
    whole.save_pretrained(tmp_path)
    images = pictures(1, 64, 64)
    expected = keys_by_hand(whole.vit.state_dict(), images)
    torch.testing.assert_close(features(mae(tiny_profile, tmp_path), images), expected, **CLOSE)


# ---- CLIP in two libraries

@pytest.mark.parametrize("layer", [0, -2, -1])
@pytest.mark.parametrize(("shape", "grid"), [((64, 64), (8, 8)), ((48, 48), (6, 6)), ((64, 120), (8, 15))])
def test_open_clip_equals_what_the_library_gives_of_its_layers(tiny_profile, tiny_models, layer, shape, grid):
    import open_clip

    images, profile = pictures(2, *shape), tiny_profile.override({"features.clip_layer": layer})
    visual = open_clip.create_model(f"local-dir:{tiny_models / 'open_clip'}").visual
    blocks, index = visual.transformer.resblocks, layer % 3
    with torch.no_grad():
        visual.positional_embedding = torch.nn.Parameter(positions_by_hand(visual.positional_embedding, grid))
        pixels = normalised(images, OPENAI).permute(0, 3, 1, 2)
        before, after = (visual.forward_intermediates(pixels, [i], output_fmt="NLC")["image_intermediates"][0]
                         for i in (max(index - 1, 0), index))
        keys = blocks[index].ln_1(before) @ blocks[index].attn.in_proj_weight[32:64].T + blocks[index].attn.in_proj_bias[32:64]
    assert after.std() > 0.1
    torch.testing.assert_close(features(EXTRACTORS["open-clip-tokens"](profile), images), after.reshape(2, *grid, 32), **CLOSE)
    if index:  # before the first there is none
        torch.testing.assert_close(features(EXTRACTORS["open-clip-keys"](profile), images), keys.reshape(2, *grid, 32), **CLOSE)


@pytest.mark.parametrize("name", ["clip-tokens", "open-clip-tokens"])
def test_clip_normalisation(tiny_profile, name):
    images = pictures(1, 64, 64)
    clip, imagenet = (EXTRACTORS[name](tiny_profile.override({"features.clip_normalisation": n})) for n in ("clip", "imagenet"))
    assert (clip.statistics, imagenet.statistics) == (OPENAI, IMAGENET)
    assert not torch.equal(features(clip, images), features(imagenet, images))
    clip.statistics = IMAGENET
    assert torch.equal(features(clip, images), features(imagenet, images))


def test_open_clip_folders_that_are_wrong(tiny_profile, tiny_models, tmp_path):
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    make_open_clip(tmp_path / "resnet", resnet)
    for name in ("lacking", "empty", "text", "no-config", "nan"):
        shutil.copytree(tiny_models / "open_clip", tmp_path / name)
    weights = load_file(tmp_path / "nan" / OPEN_CLIP)
    save_file({key: value for key, value in weights.items() if key != "visual.ln_post.bias"}, tmp_path / "lacking" / OPEN_CLIP)
    save_file({}, tmp_path / "empty" / OPEN_CLIP)
    (tmp_path / "text" / OPEN_CLIP).write_text("<html>")
    (tmp_path / "no-config" / "open_clip_config.json").unlink()
    save_file(weights | {"visual.ln_post.bias": torch.full((32,), torch.nan)}, tmp_path / "nan" / OPEN_CLIP)
    for name, told in (("resnet", "plain ViT"), ("lacking", "visual.ln_post.bias"), ("empty", "empty"), ("text", ""),
                       ("no-config", "open_clip_config.json"), ("nan", "not finite, in ln_post.bias")):
        with refused(ModelNotAvailable, tmp_path / name, told):
            EXTRACTORS["open-clip-keys"](tiny_profile.override({"models.open_clip": str(tmp_path / name)}))
    with refused(ProfileError, "models.open_clip", "not set"):
        EXTRACTORS["open-clip-keys"](tiny_profile.override({"models.open_clip": ""}))


# ---- models that are not there, or not whole

@pytest.mark.parametrize("name", ["dino", "mae"])
def test_a_model_that_is_not_set_or_lacks_its_last_keys(tiny_profile, tmp_path, name):
    with refused(ProfileError, f"models.{name}", "not set"):
        EXTRACTORS[name](tiny_profile.override({f"models.{name}": ""}))
    (make_dino if name == "dino" else make_mae)().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[next(key for key in sorted(state) if key.endswith(("k_proj.weight", "key.weight")))]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with refused(ModelNotAvailable, "lack", "k_proj"):
        EXTRACTORS[name](tiny_profile.override({f"models.{name}": str(tmp_path)}))
