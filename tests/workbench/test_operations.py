"""Counted operations: against products by hand, published numbers, and what the counter sees while the method really runs."""

import pytest
import torch
import torch.nn.functional as F

from ovdiff_lib.categories import Category
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.networks.loading import load_diffusion
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.workbench.cost import flops
from ovdiff_lib.workbench.cost.architectures import networks_of, published_networks
from ovdiff_lib.workbench.cost.flops import flop_of


@pytest.fixture(scope="module")
def paper():
    return load_profile("paper")


@pytest.fixture(scope="module")
def published():
    return published_networks()


def test_products_by_hand():
    m, k, n = 3, 5, 7
    assert flop_of(torch.mm, torch.rand(m, k), torch.rand(k, n)) == 2 * m * k * n
    assert flop_of(F.linear, torch.rand(2, 4, k), torch.rand(n, k), torch.rand(n)) == 2 * 8 * k * n
    assert flop_of(F.conv2d, torch.rand(2, 3, 6, 10), torch.rand(4, 3, 3, 3), padding=1) == 2 * (2 * 4 * 6 * 10) * (3 * 3 * 3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_counted_on_every_device(device):
    """PyTorch's counter passes over the CPU's attention: the total would be 0 without a word."""
    q, k, v = (torch.zeros(2, 4, length, width, device=device) for length, width in ((16, 8), (9, 8), (9, 8)))
    assert flop_of(F.scaled_dot_product_attention, q, k, v) == 2 * (2 * 4) * 16 * 9 * 8 * 2


def test_a_vit_by_hand(published, paper):
    """DINO ViT-B/8 on 448 pixels: 3,136 patches and the class token through twelve layers."""
    patches, d = 56 * 56, 768
    n = patches + 1
    by_hand = 2 * patches * d * 3 * 8 * 8 + 12 * (2 * n * d * d * 4 + 4 * n * n * d + 2 * 2 * n * d * 4 * d)
    assert flops.class_operations(published, paper)["features: dino"] == 32 * by_hand


@pytest.mark.parametrize("changes", [{}, {"support.guidance_scale": 1.0, "support.size": 1, "features.sd_noise_samples": 2}])
def test_a_class_takes_what_the_counter_sees(tiny_profile, changes):
    """Prompt, drawing and attribution of the real sampler; features of the real extractors."""
    profile = tiny_profile.override(changes)
    table, made = flops.class_operations(networks_of(profile), profile), []
    drawn = flop_of(lambda: made.append(sample_support(load_diffusion(profile), Category("dog"), profile, progress=False)))
    assert drawn == table["prompt"] + sum(flop for step, flop in table.items() if step.startswith("support images"))
    assert table["support images: attribution"] > 0
    for name in ("sd", "dino", "clip-keys"):
        assert flop_of(EXTRACTORS[name](profile), made[0].images, made[0].seeds) == table[f"features: {name}"]


def test_bytes_of_a_class(paper):
    assert flops.prototype_rows(paper) == 130 and flops.prototype_bytes(paper, 768) == 399_360
    assert flops.prototype_rows(paper.override({"prototypes.background": False, "prototypes.kinds": ["class", "part"]})) == 33


def test_the_paper_counts(published, paper):
    """The numbers that the notebook's text stands on: 0.8 TFLOP a UNet call (as published of SD v1.5), 60 of them an image."""
    call = flops.unet_operations(published.pipe, 64)
    assert call == pytest.approx(0.803e12, rel=1e-3)
    assert flops.class_operations(published, paper)["support images: UNet"] == 32 * 30 * 2 * call
