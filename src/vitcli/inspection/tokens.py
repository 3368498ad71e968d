"""What the tokens of a layer are like: their first principal components as colours, their lengths, and outliers among them.

Colours are those of DINOv2 (2304.07193); outliers are what "Vision Transformers Need Registers" (2309.16588) is about.

B images, D width, h w places.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["OUTLIER", "Lengths", "feature_colours", "lengths_of"]

OUTLIER = 3.0  # times the median length of a layer's patches
KEPT = 0.01  # of the places at either end take the end's colour, so that a few do not decide all


@dataclass(frozen=True)
class Lengths:
    """How long a layer's tokens are, over images."""

    quantiles: dict[str, float]  # of the patches: "1 %", "50 %", "99 %", "100 %"
    outliers: float  # share of the patches longer than OUTLIER medians
    before: list[float]  # mean of each token before the patches: class token, registers


@torch.no_grad()
def feature_colours(features: Tensor) -> NDArray[np.float64]:
    """Return the first three principal components of features (B, D, h, w) as colours, (B, h, w, 3) in [0, 1].

    All images together, so that a colour means the same in each. Fewer dimensions leave the last colours 0.5.
    """
    batch, _, height, width = features.shape
    rows = features.permute(0, 2, 3, 1).flatten(0, 2).double()  # (B h w, D)
    rows = rows - rows.mean(0)
    _, axes = torch.linalg.eigh(rows.T @ rows)  # ascending
    axes = axes.flip(1)[:, :3]
    axes = axes * torch.where(axes.gather(0, axes.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    found = (rows @ axes).cpu().numpy()
    low, high = np.quantile(found, [KEPT, 1 - KEPT], axis=0)
    spread = high - low
    colours = np.full((len(found), 3), 0.5)
    seen = spread > 1e-9 * max(1e-300, float(np.abs(found).max()))
    colours[:, : found.shape[1]][:, seen] = np.clip((found[:, seen] - low[seen]) / spread[seen], 0.0, 1.0)
    return colours.reshape(batch, height, width, 3)


def lengths_of(patches: NDArray[np.float32], before: NDArray[np.float32]) -> Lengths:
    """Return what the lengths of a layer's patches (B, P) and of the tokens before them (B, T + S) are like."""
    found = np.quantile(patches, [0.01, 0.5, 0.99, 1.0])
    return Lengths(
        quantiles=dict(zip(("1 %", "50 %", "99 %", "100 %"), map(float, found), strict=True)),
        outliers=float((patches > OUTLIER * found[1]).mean()),
        before=before.mean(0).tolist(),
    )
