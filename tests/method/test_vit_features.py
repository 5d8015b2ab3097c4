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
from tiny import VIT, make_dino, make_mae

from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.features.clip import ClipExtractor
from ovdiff_lib.features.dino import DinoExtractor
from ovdiff_lib.features.mae import MaeExtractor, from_timm, load_mae
from ovdiff_lib.features.open_clip import OpenClipExtractor, from_transformers, load_open_clip, resize_positions
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

def bicubic_matrix(inputs, outputs):
    """(outputs, inputs) weights of cubic convolution with a = -0.75 and pixel centres at half integers, edges repeated."""
    def kernel(x):
        x, a = abs(x), -0.75
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = np.zeros((outputs, inputs))
    for i in range(outputs):
        centre = (i + 0.5) * inputs / outputs - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), inputs - 1)] += kernel(centre - j)
    return torch.from_numpy(matrix).float()


def positions_by_hand(table, grid):
    """(1 + h w, D) from (1 + side^2, D)."""
    side = math.isqrt(len(table) - 1)
    if grid == (side, side):
        return table
    down, across = bicubic_matrix(side, grid[0]), bicubic_matrix(side, grid[1])
    patches = torch.einsum("yr,xc,rcd->yxd", down, across, table[1:].reshape(side, side, -1))
    return torch.cat([table[:1], patches.flatten(0, 1)])


def keys_by_hand(state, images, patch, heads, layers, eps=1e-6):
    """Keys (n, h, w, D) of the last layer: patches cut out one by one in reading order, one head at a time, keys side by side."""
    pixels = normalised(images, IMAGENET)
    h, w = pixels.shape[1] // patch, pixels.shape[2] // patch
    kernel, bias = state["embeddings.patch_embeddings.projection.weight"], state["embeddings.patch_embeddings.projection.bias"]
    rows = [torch.einsum("nyxc,dcyx->nd", pixels[:, r * patch:(r + 1) * patch, c * patch:(c + 1) * patch], kernel) + bias
            for r in range(h) for c in range(w)]
    stream = torch.stack([state["embeddings.cls_token"][0, 0].expand(len(images), -1), *rows], dim=1)
    stream = stream + positions_by_hand(state["embeddings.position_embeddings"][0], (h, w))
    size = stream.shape[-1] // heads
    for i in range(layers):
        part = {name.removeprefix(f"layers.{i}."): value for name, value in state.items() if name.startswith(f"layers.{i}.")}

        def linear(name, x, part=part):
            return x @ part[name + ".weight"].T + part[name + ".bias"]

        def norm(name, x, part=part):
            centred = x - x.mean(-1, keepdim=True)
            return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * part[name + ".weight"] + part[name + ".bias"]

        normed = norm("layernorm_before", stream)
        keys = torch.cat([normed @ part["attention.k_proj.weight"][a:a + size].T + part["attention.k_proj.bias"][a:a + size]
                          for a in range(0, heads * size, size)], dim=-1)
        query, value = linear("attention.q_proj", normed), linear("attention.v_proj", normed)
        mixed = []
        for a in range(0, heads * size, size):
            scores = query[..., a:a + size] @ keys[..., a:a + size].transpose(1, 2) / math.sqrt(size)
            mixed.append(scores.softmax(-1) @ value[..., a:a + size])
        stream = stream + linear("attention.o_proj", torch.cat(mixed, dim=-1))
        inner = linear("mlp.fc1", norm("layernorm_after", stream))
        stream = stream + linear("mlp.fc2", inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))
    return keys[:, 1:].reshape(len(images), h, w, -1)


@pytest.mark.parametrize("name", ["dino", "mae"])
@pytest.mark.parametrize("shape", [(64, 64), (48, 48), (64, 104), (88, 64)])
def test_keys_equal_a_vit_computed_by_hand(tiny_profile, name, shape):
    extractor, images = EXTRACTORS[name](tiny_profile), pictures(2, *shape)
    expected = keys_by_hand(extractor.model.state_dict(), images, 8, 2, 3)
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


@pytest.mark.parametrize("kind", ["dino", "mae", "open-clip-keys", "open-clip-tokens", "clip-keys"])
def test_a_patch_of_the_image_is_that_cell_of_the_grid(tiny_profile, kind):
    """In the first layer keys know their own patch alone, so only the painted cell may change."""
    if kind in ("dino", "mae"):
        model = (make_dino, make_mae)[kind == "mae"]()
        del model.layers[1:]
        model.config.mask_ratio = 0.0
        extractor = (DinoExtractor, MaeExtractor)[kind == "mae"](model, tiny_profile.features)
    else:
        extractor = EXTRACTORS[kind](tiny_profile.override({"features.clip_layer": 0}))
    images = pictures(1, 64, 104)
    painted = images.copy()
    painted[:, 24:32, 80:88] = 255 - painted[:, 24:32, 80:88]  # row 3, column 10 of 8 x 13
    change = (features(extractor, images) - features(extractor, painted))[0].norm(dim=-1)
    assert change.shape == (8, 13) and int(change.argmax()) == 3 * 13 + 10
    if not kind.endswith("tokens"):
        assert change[3, 10] > 0.1 and torch.allclose(change.flatten().sum() - change[3, 10], torch.tensor(0.0), atol=1e-3)


def test_mae_hides_nothing_and_refuses_a_model_that_would(tiny_profile, tiny_models):
    assert json.loads((tiny_models / "mae" / "config.json").read_text())["mask_ratio"] == 0.75
    assert load_mae(tiny_profile).config.mask_ratio == 0
    with pytest.raises(ValueError, match=r"0\.75"):
        MaeExtractor(make_mae(), tiny_profile.features)


# ---- sizes

@pytest.mark.parametrize(("name", "field"), [("dino", "dino_input_size"), ("mae", "mae_input_size"), ("open-clip-keys", "clip_input_size")])
@pytest.mark.parametrize(("shape", "expected"), [
    ((448, 448), (448, 448)), ((336, 336), (336, 336)), ((340, 340), (344, 344)), ((512, 512), (448, 448)), ((512, 768), (448, 672)),
    ((100, 200), (448, 896)), ((200, 101), (888, 448))])
def test_input_size(tiny_profile, name, field, shape, expected):
    assert EXTRACTORS[name](tiny_profile.override({f"features.{field}": 448})).input_size(*shape) == expected


def test_a_layer_that_is_not_there(tiny_profile):
    with pytest.raises(ProfileError, match=r"features\.clip_layer"):
        EXTRACTORS["open-clip-keys"](tiny_profile.override({"features.clip_layer": 3}))


def test_settings_of_one_model_leave_the_others_alone(tiny_profile):
    images = pictures(1, 72, 72)
    changed = tiny_profile.override({"features.dino_input_size": 40})
    assert features(EXTRACTORS["dino"](changed), images).shape[1:3] == (5, 5)
    assert features(EXTRACTORS["mae"](changed), images).shape[1:3] == (8, 8)


def official(kind, depth, size=224):
    """DINO ViT-B/8, MAE ViT-L/16 or CLIP ViT-B/16 as published, with random weights; ``depth`` layers."""
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

    if kind == "dino":
        return ViTModel(ViTConfig(patch_size=8, image_size=size, num_hidden_layers=depth), add_pooling_layer=False).eval()
    if kind == "mae":
        return ViTMAEModel(ViTMAEConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=depth, num_attention_heads=16,
                                        image_size=size, mask_ratio=0.0)).eval()
    vision = {"patch_size": 16, "image_size": size, "num_hidden_layers": depth, "hidden_size": 768, "intermediate_size": 3072,
              "num_attention_heads": 12}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config={"num_hidden_layers": 1, "vocab_size": 99})).eval()


def official_extractor(kind, depth, settings, size=224):
    if kind in ("dino", "mae"):
        return (DinoExtractor, MaeExtractor)[kind == "mae"](official(kind, depth, size), settings)
    model = official("clip", depth, size)
    if kind == "clip":
        return ClipExtractor(model, settings, "keys")
    return OpenClipExtractor(from_transformers(model).eval(), settings, "keys")


@pytest.mark.parametrize(("kind", "depth", "channels", "patch", "source"), [
    ("dino", 12, 768, 8, "layers.11.attention.k_proj"), ("mae", 24, 1024, 16, "layers.23.attention.k_proj"),
    ("clip", 12, 768, 16, "vision_model.encoder.layers.10.self_attn.k_proj"), ("open_clip", 12, 768, 16, "transformer.resblocks.10.ln_1")])
def test_official_sizes_and_layers(kind, depth, channels, patch, source):
    settings = load_profile("paper").features
    with torch.device("meta"):
        if kind == "open_clip":
            import open_clip

            config = open_clip.get_model_config("ViT-B-16-quickgelu")
            extractor = OpenClipExtractor(open_clip.CLIP(**config).visual, settings, "keys")
            assert extractor.attention.num_heads == 12 and extractor.attention.in_proj_weight.shape == (3 * 768, 768)
        else:
            extractor = official_extractor(kind, depth, settings)
    named = {module: name for name, module in extractor.model.named_modules()}
    assert (named[extractor.source], extractor.channels, extractor.patch) == (source, channels, patch)
    for image, grid in (((448, 448), 448), ((336, 336), 336), ((512, 512), 448)):
        assert extractor.input_size(*image) == (grid, grid) and grid % patch == 0


@pytest.mark.parametrize(("kind", "patch", "channels", "size"), [
    ("dino", 8, 768, 224), ("mae", 16, 1024, 224), ("mae", 16, 1024, 448), ("clip", 16, 768, 224), ("open_clip", 16, 768, 224)])
@pytest.mark.parametrize("shape", [(336, 336), (448, 448), (336, 200)])
def test_grids_at_official_width(kind, patch, channels, size, shape):
    short = 448 if shape[0] == shape[1] else min(shape)
    sizes = {f"features.{f}_input_size": short for f in ("clip", "dino", "mae")}
    settings = load_profile("paper", {"features.clip_layer": -1, **sizes}).features
    h, w = (math.ceil(side / patch) for side in shape)
    assert features(official_extractor(kind, 1, settings, size), pictures(1, *shape)).shape == (1, h, w, channels)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "depth", "size", "grid"), [("dino", 12, 224, 64), ("mae", 24, 448, 32), ("clip", 12, 224, 32),
                                                             ("open_clip", 12, 224, 32)])
def test_official_networks_at_512(kind, depth, size, grid):
    settings = load_profile("paper", {f"features.{f}_input_size": 512 for f in ("clip", "dino", "mae")}).features
    found = features(official_extractor(kind, depth, settings, size), pictures(1, 512, 512))
    assert found.shape == (1, grid, grid, 1024 if kind == "mae" else 768) and torch.isfinite(found).all()


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
    decoder = {name: torch.zeros(shape) for name, shape in decoder.items()}
    return vit, state | decoder


def timm_keys(vit, images):
    kept = []
    handle = vit.blocks[-1].attn.qkv.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    with torch.no_grad():
        vit.forward_features(normalised(images, IMAGENET).permute(0, 3, 1, 2))
    handle.remove()
    queries_keys_values = kept[0].reshape(len(images), 65, 3, -1)
    return queries_keys_values[:, 1:, 1].reshape(len(images), 8, 8, -1)


def mae(profile, source):
    return EXTRACTORS["mae"](profile.override({"models.mae": str(source)}))


@pytest.mark.parametrize("k_bias", [True, False])
def test_mae_file_of_the_original_code_equals_timm(tiny_profile, tmp_path, k_bias):
    vit, state = legacy(k_bias=k_bias)
    path = tmp_path / "vitl_img448.pth"
    torch.save({"model": state, "epoch": 1599, "scaler": {}, "args": argparse.Namespace(no_k_bias_in_vit=not k_bias, lr=1e-3)}, path)
    extractor, images = mae(tiny_profile, path), pictures(3, 64, 64)
    assert extractor.channels == 128 and extractor.model.config.image_size == 64 and not extractor.model.training
    torch.testing.assert_close(features(extractor, images), timm_keys(vit, images), **CLOSE)
    assert bool(extractor.model.layers[1].attention.k_proj.bias.any()) == k_bias
    extractor.model.save_pretrained(tmp_path / "folder")
    images = pictures(2, 64, 104)
    assert torch.equal(features(mae(tiny_profile, tmp_path / "folder"), images), features(extractor, images))


def test_mae_file_without_its_wrapping_and_in_half_precision(tiny_profile, tmp_path):
    _, state = legacy()
    torch.save(state, tmp_path / "bare.pth")
    extractor = mae(tiny_profile.override({"models.dtype": "float16"}), tmp_path / "bare.pth")
    assert {p.dtype for p in extractor.model.parameters()} == {torch.float16}
    full = features(mae(tiny_profile, tmp_path / "bare.pth"), pictures(1, 64, 64))
    assert F.cosine_similarity(features(extractor, pictures(1, 64, 64)), full, dim=-1).min() > 0.999


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
    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def one_sentence(error, *words):
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "?")) and all(word in text for word in words), text


def test_mae_files_that_are_no_such_checkpoint(tiny_profile, tmp_path):
    _, state = legacy()
    harmful = Harmful()
    harmful.path = tmp_path / "made"
    cases = {
        "harmful": ({"model": state, "extra": harmful}, "not a checkpoint of tensors"),
        "no-table": ({"model": {"a": 1}}, "no table of tensors"), "list": ([1, 2], "no table of tensors"),
        "half": ({"model": {k: v for k, v in state.items() if k != "blocks.1.mlp.fc2.bias"}}, "lacks 1 tensors, layers.1.mlp.fc2.bias"),
        "no-v": ({"model": {k: v for k, v in legacy(k_bias=False)[1].items() if not k.endswith("v_bias")}}, "lacks 2 tensors"),
        "beyond": ({"model": state | {"blocks.0.ls1.gamma": torch.ones(128)}}, "blocks.0.ls1.gamma"),
        "other": ({"model": {"conv1.weight": torch.ones(1)}}, "of a ViT"),
        "positions": ({"model": state | {"pos_embed": torch.zeros(1, 64, 128)}}, "64 positions"),
        "nan": ({"model": state | {"norm.bias": torch.full((128,), torch.nan)}}, "not finite")}
    for name, (content, words) in cases.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        with pytest.raises(ModelNotAvailable) as caught:
            mae(tiny_profile, path)
        one_sentence(caught, words, path.name)
    for name, data in (("empty", b""), ("cut", (tmp_path / "nan.pth").read_bytes()[:5000]), ("text", b"<html>not found</html>"),
                       ("pickle", pickle.dumps({"model": harmful}))):
        (tmp_path / f"{name}.pth").write_bytes(data)
        with pytest.raises(ModelNotAvailable) as caught:
            mae(tiny_profile, tmp_path / f"{name}.pth")
        one_sentence(caught, f"{name}.pth", "damaged")
    assert not harmful.path.exists()
    with pytest.raises(ModelNotAvailable, match=r"absent\.pth"):
        mae(tiny_profile, tmp_path / "absent.pth")


def test_mae_with_its_decoder_as_it_is_on_the_hub(tiny_profile, tmp_path):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    whole = ViTMAEForPreTraining(ViTMAEConfig(**VIT, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                                              decoder_intermediate_size=32)).eval()
    whole.save_pretrained(tmp_path)
    images = pictures(1, 64, 64)
    expected = keys_by_hand(whole.vit.state_dict(), images, 8, 2, 3)
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
@pytest.mark.parametrize(("shape", "grid"), [((64, 64), (8, 8)), ((48, 48), (6, 6)), ((50, 90), (8, 15))])
def test_open_clip_equals_transformers(biased_profile, kind, layer, shape, grid):
    profile = biased_profile.override({"features.clip_layer": layer})
    expected, images = EXTRACTORS[f"clip-{kind}"](profile), pictures(2, *shape)
    extractor = EXTRACTORS[f"open-clip-{kind}"](profile)
    found, wanted = features(extractor, images), features(expected, images)
    assert found.shape == wanted.shape == (2, *grid, 32) and extractor.channels == expected.channels and wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_converted_clip_gives_the_same_embedding(biased_profile, activation):
    from transformers import CLIPModel

    config = load_clip(biased_profile)[0].config.to_dict()
    config["vision_config"]["hidden_act"] = activation
    model = CLIPModel(type(load_clip(biased_profile)[0].config)(**config)).eval()
    model.load_state_dict(load_clip(biased_profile)[0].state_dict())
    pixels = normalised(pictures(3, 64, 64), OPENAI).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        torch.testing.assert_close(from_transformers(model).eval()(pixels), expected, **CLOSE)


def test_activation_that_open_clip_does_not_have(tiny_profile):
    model = official("clip", 1)
    model.config.vision_config.hidden_act = "relu"
    with pytest.raises(ValueError, match="relu"):
        from_transformers(model)


@pytest.mark.parametrize("grid", [(8, 8), (4, 11), (16, 5)])
def test_positions_are_resized_row_by_row(grid):
    table = torch.randn(65, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(resize_positions(table, grid), positions_by_hand(table, grid), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip-tokens", "open-clip-tokens"])
def test_clip_normalisation(tiny_profile, kind):
    """Pixels that ImageNet's statistics map to where CLIP's own map other pixels give the same features."""
    (mean, std), (other_mean, other_std) = IMAGENET, OPENAI
    colours = np.array([[80, 120, 90], [150, 60, 200]])
    images = np.broadcast_to(colours[:, None, None], (2, 64, 64, 3)).astype(np.uint8)
    states = {name: features(EXTRACTORS[kind](tiny_profile.override({"features.clip_normalisation": name})), images)
              for name in ("clip", "imagenet")}
    default = features(EXTRACTORS[kind](tiny_profile), images)
    assert torch.equal(default, states["clip"]) and (states["clip"] - states["imagenet"]).abs().mean() > 1e-3
    model = load_clip(tiny_profile)[0]
    for name, statistics in (("clip", (other_mean, other_std)), ("imagenet", (mean, std))):
        pixels = normalised(images, statistics).permute(0, 3, 1, 2)
        with torch.no_grad():
            hidden = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[name], hidden[2][:, 1:].reshape(2, 8, 8, 32), **CLOSE)


TOY = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
       "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}}


@pytest.fixture
def toy(monkeypatch, tmp_path, tiny_profile):
    """Architectures "toy" and "toy-quickgelu" with a tag, and the tag's file, which is in no cache yet."""
    import open_clip
    from open_clip import factory, pretrained

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
    return tiny_profile.override({"models.open_clip": "toy"}), file


def with_weights(profile, name, weights):
    return EXTRACTORS["open-clip-keys"](profile.override({"models.open_clip": name, "models.open_clip_pretrained": str(weights),
                                                          "features.clip_layer": -1, "features.clip_input_size": 32}))


def test_open_clip_file_and_activation(toy, monkeypatch):
    import huggingface_hub
    from open_clip.transformer import QuickGELU

    profile, file = toy
    images = pictures(1, 32, 48)
    plain, quick = (with_weights(profile, name, file) for name in ("toy", "toy-quickgelu"))
    state = torch.load(file)
    assert torch.equal(plain.model.conv1.weight, state["visual.conv1.weight"]) and not plain.model.training
    assert features(plain, images).shape == (1, 4, 6, 64)
    assert (features(plain, images) - features(quick, images)).abs().mean() > 1e-3  # the two are not taken for one another
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache",
                        lambda repository, name: str(file) if (repository, name) == ("nobody/toy", "open_clip_pytorch_model.bin") else None)
    tagged = with_weights(profile, "toy", "quick")  # trained with QuickGELU, which the bare architecture does not have
    assert isinstance(tagged.model.transformer.resblocks[0].mlp.gelu, QuickGELU)
    torch.testing.assert_close(features(tagged, images), features(quick, images), **CLOSE)


def test_open_clip_weights_do_not_mix(toy, tmp_path):
    profile, file = toy
    other = tmp_path / "other.pt"
    torch.save({name: value * 1.5 for name, value in torch.load(file).items()}, other)
    first, second = (with_weights(profile, "toy", path).model.conv1.weight for path in (file, other))
    torch.testing.assert_close(first * 1.5, second)


def test_open_clip_names_and_weights_that_are_wrong(toy, tmp_path, monkeypatch):
    import huggingface_hub

    profile, file = toy
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: None)
    for name, weights, words in (("ViT-B-16-quickgellu", "openai", ("ViT-B-16-quickgelu",)), ("RN50", "openai", ("plain ViT",)),
                                 ("toy", "openai", ("tag (quick)",)), ("toy", "", ("open_clip_pretrained", "toy")), ("", "", ("not set",))):
        with pytest.raises(ProfileError) as caught:
            with_weights(profile, name, weights)
        one_sentence(caught, "models.open_clip", *words)
    with pytest.raises(ModelNotAvailable) as caught:
        with_weights(profile, "toy", "quick")
    one_sentence(caught, "`hf download nobody/toy`", "models.download")
    lacking = {name: value for name, value in torch.load(file).items() if name != "visual.ln_post.bias"}
    for name, save in (("lacking", lambda path: torch.save(lacking, path)), ("text", lambda path: path.write_text("<html>")),
                       ("nothing", lambda path: torch.save({}, path))):
        save(tmp_path / f"{name}.pt")
        with pytest.raises(ModelNotAvailable) as caught:
            with_weights(profile, "toy", tmp_path / f"{name}.pt")
        one_sentence(caught, f"{name}.pt")


def test_published_tags_are_known_to_open_clip():
    """The names that the profiles and messages use; the GELU variant of the architecture would run these weights wrongly."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    assert open_clip.get_model_config("ViT-B-16-quickgelu")["quick_gelu"] and "quick_gelu" not in open_clip.get_model_config("ViT-B-16")
    for architecture in ("ViT-B-16", "ViT-B-16-quickgelu"):
        assert get_pretrained_cfg(architecture, "openai")["quick_gelu"]


# ---- models that are not there, or not whole

@pytest.mark.parametrize("name", ["dino", "mae", "open_clip"])
def test_missing_models(tiny_profile, tmp_path, name):
    extractor = "open-clip-tokens" if name == "open_clip" else name
    with pytest.raises(ProfileError) as caught:
        EXTRACTORS[extractor](tiny_profile.override({f"models.{name}": ""}))
    one_sentence(caught, f"models.{name}", "not set")
    for source in (tmp_path / "absent", tmp_path):  # no folder; an empty one
        with pytest.raises(ModelNotAvailable) as caught:
            EXTRACTORS[extractor](tiny_profile.override({f"models.{name}": str(source)}))
        one_sentence(caught, str(source))


@pytest.mark.parametrize("name", ["dino", "mae"])
def test_folder_that_lacks_a_tensor(tiny_profile, tmp_path, name):
    from safetensors.torch import load_file, save_file

    (make_dino if name == "dino" else make_mae)().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in sorted(state) if key.endswith("k_proj.weight") or key.endswith("key.weight"))
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotAvailable) as caught:
        EXTRACTORS[name](tiny_profile.override({f"models.{name}": str(tmp_path)}))
    one_sentence(caught, "lack", "k_proj")


def test_clip_folder_is_shared_by_nobody(tiny_profile):
    """open_clip's converted copy is cached beside transformers' model, not instead of it."""
    assert load_open_clip(tiny_profile) is load_open_clip(tiny_profile)
    assert type(load_clip(tiny_profile)[0]).__name__ == "CLIPModel"


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
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}
    extractor = mae(tiny_profile, tmp_path / "out")
    assert features(extractor, pictures(1, 64, 104)).shape == (1, 8, 13, 32)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16} and not any("decoder" in name for name in state)
