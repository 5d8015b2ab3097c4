"""GroupViT against its own modules run by hand, and the published rule pixel by pixel; its mini model."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import PETS
from oracles import blocks as picture
from tiny import text_settings
from transformers import CLIPTokenizer, GroupViTConfig, GroupViTModel

import ovdiff_lib
from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.recipes import train_groupvit
from ovdiff_lib.workbench.baselines.common import TextEmbeddings
from ovdiff_lib.workbench.baselines.groupvit import GroupViT, group_scores, load_groupvit
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.evaluation.measure import Method, above, evaluate, measure

TEMPLATE = "a good picture of a {name}"
SHIPPED = Path(ovdiff_lib.__file__).parent / "mini" / "weights"


def make_model(tokenizer):
    """A random GroupViTModel of 40 px, patch 8: stages of 2, 1, 1 and 1 blocks, 7, 5 and 3 groups, all of it far from its start."""
    text = text_settings(tokenizer)
    vision = {"hidden_size": 32, "intermediate_size": 64, "depths": [2, 1, 1, 1], "num_hidden_layers": 5, "num_attention_heads": 2,
              "num_group_tokens": [7, 5, 3, 0], "num_output_groups": [7, 5, 3, 3], "image_size": 40, "patch_size": 8}
    model = GroupViTModel(GroupViTConfig(text_config=text, vision_config=vision, projection_dim=16, projection_intermediate_dim=24))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that places, groups, words and biases make a difference
            if name.endswith(("group_token", "bias")) or "position" in name:
                parameter.normal_(std=0.1 if name.endswith("bias") else 1)
            elif "assign." in name or "mlp_inter" in name:
                parameter.normal_(std=0.5)
            elif parameter.ndim >= 2:
                parameter.mul_(2)
        # Batch norms that know their inputs, as after training: else all texts, and all groups, would be embedded alike.
        prompts = [TEMPLATE.replace("{name}", word) for word in ("cat", "dog", "sofa", "boat", "water")]
        texts = model.eval().text_model(torch.tensor(tokenizer(prompts).input_ids))
        pixels = torch.from_numpy(np.stack([picture(40, 40, seed=i) for i in range(20, 30)])).permute(0, 3, 1, 2) / 127.5 - 1
        rows = {"visual_projection": model.vision_model(pixels).last_hidden_state.flatten(0, 1), "text_projection": texts.pooler_output}
        for name, inputs in rows.items():
            first, norm = getattr(model, name)[:2]
            norm.running_mean.copy_(first(inputs).mean(0))
            norm.running_var.copy_(first(inputs).var(0))
    return model.eval()


def save_model(tiny_models, path):
    """The tiny GroupViT as a model folder, with the tiny CLIP's tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tokenizer = CLIPTokenizer.from_pretrained(tiny_models / "clip")
        make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_models):
    return save_model(tiny_models, tmp_path_factory.mktemp("groupvit"))


@pytest.fixture(scope="module")
def profile(tiny_profile, folder):
    return tiny_profile.override({"models.groupvit": str(folder)})


@pytest.fixture(scope="module")
def make(profile):
    def build(**fields):
        matching = profile.override({f"matching.{k}": v for k, v in fields.items()}).matching
        return GroupViT(TextEmbeddings(*load_groupvit(profile), [TEMPLATE]), matching)

    return build


# ---------------------------------------------------------------------- the groups

def by_modules(model, pixels):
    """Soft assignments of all stages and the last tokens, from the sub-modules and the equations of the paper's Sec. 3.2."""
    vision, soft, prev = model.vision_model, [], None
    x = vision.embeddings(pixels)
    for stage in vision.encoder.stages:
        own = stage.num_group_token
        if own:
            tokens = stage.group_token + (stage.group_projector(prev) if stage.group_projector is not None else 0)
            x = torch.cat([x, tokens.expand(len(x), -1, -1)], 1)
        for layer in stage.layers:
            x = layer(x, None)
        if not own:
            continue
        x, prev = x[:, :-own], x[:, -own:]
        down, assign = stage.downsample, stage.downsample.assign
        keys = down.norm_x(x)
        queries = down.pre_assign_attn(down.project_group_token(down.norm_tokens(prev)), keys)
        logits = torch.einsum("ngd,ntd->ngt", assign.q_proj(queries), assign.k_proj(keys)) / math.sqrt(x.shape[-1])
        soft.append(logits.exp() / logits.exp().sum(1, keepdim=True))
        hard = F.one_hot(logits.argmax(1), logits.shape[1]).float().transpose(1, 2)
        merged = torch.einsum("ngt,ntd->ngd", hard, assign.v_proj(keys)) / (hard.sum(2, keepdim=True) + 1)
        x = queries + assign.proj(merged)
        x = x + down.mlp_channels(down.norm_new_x(x))
    return soft, vision.layernorm(x)


def projected(sequence, rows):
    """Linear, batch norm with stored statistics, ReLU, linear, to unit length."""
    first, norm, _, last = sequence
    x = F.linear(rows, first.weight, first.bias)
    x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    x = F.linear(x.clamp(min=0), last.weight, last.bias)
    return x / x.norm(dim=-1, keepdim=True)


def test_groups_equal_the_modules_by_hand(make):
    groupvit, images = make(), np.stack([picture(40, 40, seed=i) for i in range(3)])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        soft, tokens = by_modules(groupvit.model, pixels)
        assert [a.shape[1:] for a in soft] == [(7, 25), (5, 7), (3, 5)]
        assignment, embeddings, whole = groupvit.groups(images)
        expected = torch.einsum("nab,nbc,nct->nat", soft[2], soft[1], soft[0]).reshape(3, 3, 5, 5)
        torch.testing.assert_close(assignment, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(embeddings, projected(groupvit.model.visual_projection, tokens), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole, projected(groupvit.model.visual_projection, tokens.mean(1)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(assignment.sum(1), torch.ones(3, 5, 5))
    assert len(set(assignment.argmax(1).flatten().tolist())) > 1 and assignment.std((2, 3)).max() > 0.05  # it does depend on the place


@pytest.mark.parametrize("classes", [1, 3, 5, 8])
def test_group_scores_by_brute_force(classes):
    draw = np.random.default_rng(classes)
    unit = [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (draw.normal(size=s) for s in ((4, 6), (6,), (classes, 6)))]
    groups, whole, texts = unit
    nearest = sorted(range(classes), key=lambda c: -float(whole @ texts[c]))[:5]
    expected = np.zeros((4, classes))
    for g in range(4):
        powers = [math.exp(12 * float(groups[g] @ texts[c])) for c in range(classes)]
        for c in nearest:
            expected[g, c] = powers[c] / sum(powers) * powers[c] / sum(powers[k] for k in nearest)
    expected[np.unravel_index(expected.argmax(), expected.shape)] = 1
    if classes == 1:
        expected[:] = 1
    found = group_scores(*(torch.from_numpy(v) for v in unit), 12.0)
    np.testing.assert_allclose(found, expected, atol=1e-9)


# ---------------------------------------------------------------------- segmentation

def published_labels(groupvit, image, vocabulary, threshold):
    """The published rule for one window of the image's own size, pixel by pixel; 0 = background."""
    assignment, embeddings, whole = (t[0] for t in groupvit.groups(image[None]))
    texts = groupvit.text_embeddings(vocabulary)
    maps = F.interpolate(assignment[None], image.shape[:2], mode="bilinear")[0]
    logits = min(math.exp(float(groupvit.model.logit_scale.detach())), 100) * embeddings @ texts.T
    mask = torch.full((len(texts),), -torch.inf)
    mask[(whole @ texts.T).argsort(descending=True)[:5]] = 0
    affinity = logits.softmax(1) * (logits + mask).softmax(1)
    labels = np.zeros(image.shape[:2], int)
    for y, x in np.ndindex(*labels.shape):
        row = affinity[maps[:, y, x].argmax()]
        if row.max() >= min(threshold, float(affinity.max())):
            labels[y, x] = 1 + int(row.argmax())
    return labels


def test_one_window_is_labelled_by_the_published_rule(make):
    names, image = Vocabulary.of("cat, dog, chest of drawers, boat, water, picture"), picture(64, 64, seed=7)
    groupvit, shares = make(windows=[64]), []
    for threshold in (0.05, 0.3, 0.9):
        labels, = above(groupvit.scores(image, names), [threshold])
        np.testing.assert_array_equal(labels, published_labels(groupvit, image, names, threshold))
        shares.append((labels == 0).mean())
    assert shares[0] < shares[-1] < 1  # the best group stays, however high the threshold


def test_the_logit_scale_is_capped(make):
    groupvit, image = make(windows=[64]), picture(64, 64)
    scale = groupvit.model.logit_scale
    before, kept = groupvit.scores(image, PETS), scale.detach().clone()
    try:
        results = []
        for value in (math.log(100), 7.0):
            scale.data.fill_(value)
            results.append(groupvit.window_scores(image[None], PETS))
    finally:
        scale.data.copy_(kept)
    torch.testing.assert_close(*results)
    np.testing.assert_array_equal(groupvit.scores(image, PETS), before)
    assert np.abs(before[1:] - results[0][0].numpy()).max() > 0.01


def test_text_is_pooled_at_the_end_token(make, profile):
    """The model's own end token: what stands behind it, padding or anything else, changes nothing, and every word before it counts."""
    groupvit = make()
    assert groupvit.model.config.text_config.eos_token_id == groupvit.texts.tokenizer.eos_token_id == load_clip(profile)[1].eos_token_id
    texts = groupvit.text_embeddings(PETS)
    for name, row in zip(PETS.names, texts, strict=True):
        ids = groupvit.texts.tokenizer(TEMPLATE.replace("{name}", name)).input_ids
        with torch.no_grad():
            states = groupvit.model.text_model(torch.tensor([[*ids, 5, 6]])).last_hidden_state[0, len(ids) - 1]
        torch.testing.assert_close(row, projected(groupvit.model.text_projection, states[None])[0], rtol=1e-4, atol=1e-5)
    assert (texts @ texts.T).fill_diagonal_(0).max() < 0.999


# ---------------------------------------------------------------------- the mini model and its training

def test_multi_label_loss_by_hand():
    draw = torch.Generator().manual_seed(0)
    image, text = F.normalize(torch.randn(4, 6, generator=draw), dim=1), F.normalize(torch.randn(5, 6, generator=draw), dim=1)
    shows = [(0, 2), (2,), (1, 2, 3), (0,)]  # prompt 4 is shown by none
    named = torch.tensor([[float(p in row) for p in range(5)] for row in shows])
    cosine = [[7 * float(i @ t) for t in text] for i in image]
    to_text = np.mean([np.mean([np.log(sum(map(math.exp, cosine[b]))) - cosine[b][p] for p in row]) for b, row in enumerate(shows)])
    by_prompt = []
    for p in range(4):
        total = math.log(sum(math.exp(cosine[b][p]) for b in range(4)))
        by_prompt.append(np.mean([total - cosine[b][p] for b, row in enumerate(shows) if p in row]))
    loss = train_groupvit.multi_label_loss(image, text, named, torch.tensor(7.0))
    assert float(loss) == pytest.approx((to_text + np.mean(by_prompt)) / 2, rel=1e-5)


def test_a_fresh_model_tells_groups_apart(tiny_models):
    """Zero group tokens and faint assignments, which transformers starts from, would put every patch into every group alike."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = train_groupvit.build_groupvit(CLIPTokenizer.from_pretrained(tiny_models / "clip")).eval()
    pixels = torch.from_numpy(np.stack([picture(64, 64, seed=i) for i in range(4)])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        soft = model.vision_model(pixels, output_attentions=True).attentions
    for assignment in soft:
        groups = assignment.shape[1]
        entropy = -(assignment * assignment.clamp(min=1e-9).log()).sum(1).mean()
        assert entropy < 0.6 * math.log(groups)
        assert np.mean([len(set(row.tolist())) for row in assignment.argmax(1)]) > groups / 3


def test_the_shipped_model_is_small_and_segments():
    """The mini GroupViT: the mini CLIP's tokenizer, and far better than chance on images it was not trained on."""
    clip, own = (CLIPTokenizer.from_pretrained(SHIPPED / name).backend_tokenizer.to_str() for name in ("clip", "groupvit"))
    assert clip == own
    assert (SHIPPED / "groupvit" / "model.safetensors").stat().st_size <= 900_000
    mini = load_profile("mini")
    groupvit, dataset = GroupViT.build(mini), load_dataset("mini-voc")
    assert groupvit.model.config.text_config.eos_token_id == groupvit.texts.tokenizer.eos_token_id
    searched = Method({}, lambda data: lambda sample: above(groupvit.scores(sample.image, data.vocabulary), (0.3, 0.5, 0.7)), 3)
    found = measure({"": searched}, dataset, limit=24, progress=False)[""]
    chance = evaluate(lambda i: np.ones(i.shape[:2], int), dataset, limit=24, progress=False)
    assert max(result.miou for result in found) > 0.1 > 2 * chance.miou
