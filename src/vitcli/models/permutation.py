"""A fixed permutation of an image's patches: what shows how much a model owes to neighbours lying beside one another.

The same for every image, in training and evaluation. A Transformer with learned positions is unharmed by construction, as each
position can be learned where it came from; a convolution finds strangers at the borders, and one whose field is larger than a
patch sees little else. It is inside the model, behind all that is done to an image: crops, mixup, moved and mirrored views.
"""

import numpy as np
import torch
from torch import Tensor, nn

from vitcli.randomness import derive_seed, permute

__all__ = ["PatchPermutation", "as_seen", "patch_order"]


def patch_order(*, rows: int, columns: int) -> list[int]:
    """Return which patch, counted row by row, is shown at each place of a grid; a function of the grid alone."""
    places = np.arange(rows * columns)
    order: list[int] = permute(places, rows * columns, derive_seed("patch permutation", rows, columns)).tolist()
    return order


class PatchPermutation(nn.Module):
    """Put the squares that an image consists of into another order.

    Args:
        image_size: (height, width), px.
        side: of a square, px; divides both.

    Attributes:
        grid_size: (rows, columns) of squares.

    Raises:
        ValueError: the side does not divide the image's.
    """

    def __init__(self, *, image_size: tuple[int, int], side: int) -> None:
        super().__init__()
        height, width = image_size
        if height % side or width % side:
            raise ValueError(f"patch_permutation {side} does not divide image_size {height}x{width}")
        self.grid_size = rows, columns = height // side, width // side
        # numbers of pixels, row by row, cut into squares: (rows x columns, side, side)
        pixels = torch.arange(height * width, device="cpu").view(rows, side, columns, side).transpose(1, 2).flatten(0, 1)
        shown = pixels[torch.tensor(patch_order(rows=rows, columns=columns), device="cpu")]
        order = shown.view(rows, columns, side, side).transpose(1, 2).flatten()
        self.register_buffer("order", order.to(torch.empty(0).device), persistent=False)  # (H W,) computed, so not stored
        self.order: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, 3, H, W)."""
        return images.flatten(2).index_select(2, self.order).view(images.shape)


def as_seen(images: Tensor, *, image_size: tuple[int, int], permutation: PatchPermutation | None) -> Tensor:
    """Return images (B, 3, H, W) as a model looks at them.

    Raises:
        ValueError: the images are not of the size the model was built for.
    """
    if images.shape[-2:] != image_size:
        raise ValueError(f"the model takes images of {image_size} px, got {tuple(images.shape[-2:])}")
    seen: Tensor = images if permutation is None else permutation(images)
    return seen
