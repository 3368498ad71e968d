"""Where the tokens are: the paper's 2-D positions (ViT, 2010.11929, D.4), learned, and fixed ones of sines and cosines.

h w grid sides, P = h w patches, D width, L layers: 1, or the model's depth where each block has positions of its own.
"""

import torch
from torch import Tensor

__all__ = ["learned2d_positions", "sincos2d_positions"]


def sincos2d_positions(*, grid_size: tuple[int, int], width: int, temperature: float = 10_000.0) -> Tensor:
    """Return fixed 2-D sin-cos positions, (1, h*w, width) float32 in [-1, 1]: big_vision's `posemb_sincos_2d`.

    Raises:
        ValueError: the width is not a multiple of 4, or below 8.
    """
    if width % 4 or width < 8:
        raise ValueError(f"sincos2d positions need a width that is a multiple of 4 and at least 8, got {width}")
    rows, columns = grid_size
    # On the CPU also where a model is built without memory: torch would import its compiler for a range on its meta device.
    y, x = torch.meshgrid(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"), indexing="ij")
    frequencies = temperature ** -torch.linspace(0.0, 1.0, width // 4, dtype=torch.float64, device="cpu")  # (D/4,)
    y, x = (axis.flatten()[:, None] * frequencies for axis in (y, x))  # (P, D/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None].float()  # (1, P, D)


def learned2d_positions(rows: Tensor, columns: Tensor) -> Tensor:
    """Join embeddings of rows (L, h, D/2) and columns (L, w, D/2) to those of the patches, (L, h*w, D): X, then Y (D.4)."""
    x = columns[:, None, :].expand(-1, rows.shape[1], -1, -1)  # (L, h, w, D/2)
    y = rows[:, :, None].expand(-1, -1, columns.shape[1], -1)  # (L, h, w, D/2)
    return torch.cat([x, y], dim=-1).flatten(1, 2)
