"""Other views of an image: several of each with the answers averaged (test-time augmentation), or one that has moved.

Averaged are probabilities, as Krizhevsky et al. (2012, section 4.1) do with ten crops; what comes out is their logarithm (of a
sigmoid head the logit), which works like logits wherever these are expected.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcli.errors import ConfigError
from vitcli.forward import Forward

__all__ = ["TTA_KINDS", "moved_forward", "tta_forward", "tta_views"]

TTA_KINDS = ("flip", "crops5", "flip+crops5")
CROP_SHARE = 7 / 8  # of each side: 224 out of 256
TINY = torch.finfo(torch.float32).tiny  # a probability of 0 has no logarithm


def tta_views(kind: str) -> int:
    """Return how often the model runs on each image. Raises ConfigError: an unknown kind."""
    views = {"flip": 2, "crops5": 5, "flip+crops5": 10}
    if kind not in views:
        raise ConfigError(f"--tta {kind}: unknown; expected one of {', '.join(TTA_KINDS)}")
    return views[kind]


def tta_forward(kind: str, *, loss: Literal["softmax", "sigmoid"] = "softmax") -> Forward:
    """Return a function of (model, images (b, 3, H, W)) to averaged answers (b, K), float32, to be used like logits.

    Args:
        kind: `flip`: the image and its mirror image; `crops5`: corners and centre, 7/8 of each side, enlarged to the full size;
            `flip+crops5`: the crops and their mirror images.
        loss: what the head was trained with.

    Raises:
        ConfigError: an unknown kind.
    """
    count = tta_views(kind)

    def forward(model: Any, images: Tensor) -> Tensor:
        total: Tensor | None = None
        for view in views_of(images, kind):  # one after the other: no more memory than without
            logits = model(view).float()
            probabilities = logits.softmax(1) if loss == "softmax" else logits.sigmoid()
            total = probabilities if total is None else total + probabilities
        assert total is not None
        mean = total / count
        if loss == "softmax":
            return mean.clamp_min(TINY).log()
        return torch.logit(mean, eps=1e-7)

    return forward


def moved_forward(forward: Forward, *, down: int, right: int) -> Forward:
    """Return a function that asks about images (b, 3, H, W) moved by so many px, edges repeated; negative is up and left."""

    def moved(model: Any, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        rows = (torch.arange(height, device=images.device) - down).clamp(0, height - 1)
        columns = (torch.arange(width, device=images.device) - right).clamp(0, width - 1)
        return forward(model, images[:, :, rows][:, :, :, columns])

    return moved


def views_of(images: Tensor, kind: str) -> Iterator[Tensor]:
    """Yield the views (b, 3, H, W) of images (b, 3, H, W)."""
    crops = (images,) if kind == "flip" else five_crops(images)
    for crop in crops:
        yield crop
        if kind != "crops5":
            yield crop.flip(3)


def five_crops(images: Tensor) -> Iterator[Tensor]:
    """Yield the four corners and the centre of images (b, 3, H, W), enlarged to (b, 3, H, W)."""
    size = height, width = images.shape[2], images.shape[3]
    rows, columns = max(1, round(height * CROP_SHARE)), max(1, round(width * CROP_SHARE))
    bottom, right = height - rows, width - columns
    for top, left in ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)):
        crop = images[:, :, top : top + rows, left : left + columns]
        yield F.interpolate(crop, size, mode="bilinear", align_corners=False)
