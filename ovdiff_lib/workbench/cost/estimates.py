"""What a class and an image of the paper's size will take, from operation counts, beside the profile's own count and what it measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.cost import flops as operations
from ovdiff_lib.workbench.cost.architectures import Networks, networks_of, published_networks
from ovdiff_lib.workbench.cost.drawing import ClassSteps
from ovdiff_lib.workbench.cost.flops import prototype_bytes, support_bytes
from ovdiff_lib.workbench.cost.instruments import measured
from ovdiff_lib.workbench.cost.scene import Scene

PAPER_SHAPE = (375, 500)
"""Of PASCAL VOC's images, the most frequent, on its side or not."""

CLASSES = 20


@dataclass(frozen=True)
class Estimate:
    """A quantity of ``unit`` "FLOP" or "bytes" by operation counts and shapes: of the profile's networks and of Stable Diffusion v1.5;
    ``seconds`` is what the profile's took when it ran (None where nothing ran)."""

    name: str
    unit: str
    profile: float
    paper: float
    seconds: float | None = None

    @property
    def rate(self) -> float | None:
        """FLOP/s that the profile's run reached."""
        return self.profile / self.seconds if self.seconds and self.unit == "FLOP" else None

    @property
    def paper_seconds(self) -> float | None:
        """Seconds of the paper's size on this machine at the rate that the profile reached: a lower bound where small networks leave the
        machine idle, and no claim about a GPU."""
        return self.paper / self.rate if self.rate else None


def estimates(scene: Scene) -> list[Estimate]:
    """Operations of the steps of a class and of an image with the extractor sd, and bytes of weights, features and prototypes."""
    own, theirs = networks_of(scene.profile), published_networks()
    paper = load_profile("paper", {"features.extractors": ["sd"]})
    counted = [operations.class_operations(networks, profile, ["sd"]) for networks, profile in ((own, scene.profile), (theirs, paper))]
    building = ClassSteps(scene)
    for _ in range(1 + scene.repeats):
        building()
    steps = building.medians()
    groups = {"class: drawing": ("prompt", "support images: UNet", "support images: attribution", "support images: VAE decoder"),
              "class: features": ("features: sd",), "class: k-means, at most": ("k-means: sd, at most",)}
    times = dict(zip(groups, (steps["drawing"], steps["features"], steps["prototypes"]), strict=True))
    rows = [Estimate(name, "FLOP", *(sum(table.get(part, 0) for part in parts) for table in counted), times[name])
            for name, parts in groups.items()]
    image = scene.image(0)
    seen = [operations.image_operations(networks, profile, shape, CLASSES, ["sd"]) for networks, profile, shape in (
        (own, scene.profile, image.shape[:2]), (theirs, paper, PAPER_SHAPE))]
    bank = scene.made_up(CLASSES)
    plain = scene.method({"filters.category": False})
    plain.segment(image, bank)
    seconds = measured(plain.segment, [(scene.image(0), bank)] * scene.repeats, device=scene.device).median
    rows.append(Estimate(f"image: features and matching with {CLASSES} classes", "FLOP",
                         *(table["features: sd"] + table["matching: sd"] for table in seen), seconds))
    return rows + [Estimate(name, "bytes", *(function(*pair) for pair in ((own, scene.profile), (theirs, paper))))
                   for name, function in BYTES.items()]


def _weights(networks: Networks, _: Profile) -> int:
    return 4 * sum(p.numel() for network in (networks.unet, networks.vae, networks.text_encoder) for p in network.parameters())


def _features(networks: Networks, profile: Profile) -> int:
    cost = operations.feature_cost(networks, profile, "sd", profile.support.image_size)
    return 4 * profile.support.size * cost.cells * cost.channels


def _prototypes(networks: Networks, profile: Profile) -> int:
    return prototype_bytes(profile, operations.feature_cost(networks, profile, "sd", profile.support.image_size).channels)


def _support(networks: Networks, profile: Profile) -> int:
    return support_bytes(profile, profile.support.image_size // networks.vae_factor)


def _widest_activation(networks: Networks, profile: Profile) -> int:
    """Of one image with guidance: the largest output of a layer of the UNet."""
    largest, side = 0, profile.support.image_size // networks.vae_factor

    def note(_module: torch.nn.Module, _inputs: tuple, output: object) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    handles = [module.register_forward_hook(note) for module in networks.unet.modules()]
    try:
        operations.unet_operations(networks, side, 2)
    finally:
        for handle in handles:
            handle.remove()
    return 4 * largest


BYTES = {
    "class: weights of Stable Diffusion in float32": _weights,
    "class: largest output of a UNet layer, an image with guidance": _widest_activation,
    "class: features of the support set": _features,
    "class: support set": _support,
    "class: prototypes": _prototypes,
}
