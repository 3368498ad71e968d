"""What a place in a layer sees: its effective receptive field, by gradients with respect to the image (1701.04128).

The same for a Transformer and a ResNet, so that they can be compared, as "Do Vision Transformers See Like Convolutional Neural
Networks?" (2108.08810) does.

B images, H W their sides, D width, h w a layer's places.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.inspection.layers import passing, split_tokens
from vitcli.models import Model, ResNet, VisionTransformer
from vitcli.randomness import derive_seed, normal

__all__ = ["effective_fields", "field_centre", "field_radius"]


def effective_fields(
    model: Model, images: Tensor, *, layers: Sequence[int], first: int, seed: int
) -> list[NDArray[np.float64]]:
    """Return what the middle place of each layer owes to each pixel, (H, W), 1 in sum, the mean over images (B, 3, H, W).

    It is the squared length of the gradient of the place's features: of their sum with random normal weights, as the square of
    that is in the mean the sum of the squares of all. Each image counts the same.

    Args:
        layers: numbers of `layer_names`, ascending.
        first: number of the first image, which random weights depend on.
    """
    images = images.detach().requires_grad_(True)
    sums: dict[int, Tensor] = {}

    def weigh(number: int, output: Tensor) -> None:
        if number in layers:
            places = split_tokens(model, output)[1]
            middle = places[:, :, places.shape[2] // 2, places.shape[3] // 2]  # (B, D)
            counters = np.arange(first, first + len(middle))
            weights = normal(derive_seed(seed, "field", number), counters, middle.shape[1])
            sums[number] = (middle * torch.from_numpy(weights).to(middle)).sum()

    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad(), passing(model, layer=weigh):
            model.features(images)
        fields = []
        for number in layers:
            (slope,) = torch.autograd.grad(sums[number], images, retain_graph=number != layers[-1])
            energy = slope.double().square().sum(1)  # (B, H, W)
            energy = energy / energy.sum(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            fields.append(energy.mean(0).cpu().numpy())
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
    return fields


def field_centre(model: Model, places: tuple[int, int], *, convolved: bool) -> tuple[float, float]:
    """Return where the middle one of a layer's places (h, w) lies in the image, px from the top and from the left.

    Args:
        convolved: whether the layer is a convolution's, whose padding moves its places: BiT's, even on all sides, to the upper
            left, and TensorFlow's SAME, which hybrids have, to the lower right.
    """
    found = []
    for count, length in zip(places, model.image_size, strict=True):
        step, middle = length / count, count // 2
        if isinstance(model, ResNet):
            found.append(step * middle + 0.5)
        elif isinstance(model, VisionTransformer) and model.patch_embed.backbone is not None:
            patch = 1 if convolved else model.patch_embed.patch_size
            stride = step / patch  # of the convolutions
            found.append(stride * (patch * middle + (patch - 1) / 2) + stride - 0.5)
        else:
            found.append(step * (middle + 0.5))
    return found[0], found[1]


def field_radius(field: NDArray[np.float64], centre: tuple[float, float], *, share: float) -> float:
    """Return how far from `centre` a share of a field (H, W) lies, px."""
    rows, columns = (np.arange(side) + 0.5 - middle for side, middle in zip(field.shape, centre, strict=True))
    distances = np.hypot(rows[:, None], columns[None, :]).ravel()
    order = np.argsort(distances, kind="stable")
    reached = np.cumsum(field.ravel()[order])
    total = float(reached[-1])
    return float(distances[order][min(len(order) - 1, int(np.searchsorted(reached, share * total)))])
