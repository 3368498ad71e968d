"""What is to be predicted of a patch: its colours in 3 bits a channel (paper B.1.2), or its pixels, perhaps normalised (MAE).

B batch, h w grid sides, P = h w patches, s side of a patch, px.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["COLOURS", "colour_classes", "normalised", "patches_of", "pixels_of"]

BITS = 3  # of each channel
COLOURS = (1 << BITS) ** 3  # 512


def patches_of(images: Tensor, side: int) -> Tensor:
    """Cut images (B, C, H, W) into patches (B, P, s s C), row by row; in a patch by row, column and channel, as MAE does."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // side, side, width // side, side).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, -1, side * side * channels)


def pixels_of(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the 8-bit pixels, whole numbers 0 to 255 as float32, that normalised images (B, 3, H, W) were made from."""
    centre, spread = (images.new_tensor(numbers)[:, None, None] for numbers in (mean, std))
    return ((images.float() * spread + centre) * 255).round().clamp(0, 255)


def colour_classes(pixels: Tensor, side: int, *, parts: int = 1) -> Tensor:
    """Return the mean colours of patches as class numbers below 512, int64 (B, P, parts x parts).

    Each channel's mean falls into one of 8 equal bins of 0 to 256, and the class is 64 red + 8 green + blue. The sums are of
    whole numbers, so no mean falls into the wrong bin by rounding.

    Args:
        pixels: (B, 3, H, W), whole numbers 0 to 255.
        parts: along each side of a patch; 4 for the paper's "4 x 4 downsized version".
    """
    small = side // parts
    rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
    sums = patches_of(pixels, small).unflatten(2, (-1, 3)).sum(2, dtype=torch.float64)  # (B, h parts x w parts, 3)
    bins = (sums * (1 << BITS) / (256 * small**2)).floor().long()
    classes = (bins[..., 0] << 2 * BITS) + (bins[..., 1] << BITS) + bins[..., 2]  # (B, h parts x w parts)
    grid = classes.unflatten(1, (rows, parts, columns, parts)).transpose(2, 3)  # (B, h, w, parts, parts)
    return grid.reshape(len(pixels), rows * columns, parts**2)


def normalised(patches: Tensor) -> Tensor:
    """Return patches (B, P, s s C), each with mean 0 and variance 1: MAE (2111.06377), `norm_pix_loss`."""
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)  # over n - 1, as the authors' code
    return (patches - mean) / (variance + 1e-6).sqrt()
