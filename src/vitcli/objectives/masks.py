"""Which patches of an image are hidden: a function of a seed and the image's index, as every random choice of a run.

So a resumed run hides what an uninterrupted one would have, and ranks, lanes and micro-batches agree without a word. For each
image a row of numbers says what the encoder is shown at each patch's place: its own number, another patch's, or `HIDDEN`.
`UNCHANGED` is its own, but it is to be predicted as well (masked patch prediction, paper B.1.2).
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vitcli.objective_config import ObjectiveConfig, hidden_patches
from vitcli.randomness import derive_seed, uniform

__all__ = ["HIDDEN", "UNCHANGED", "draw_masks", "evaluation_masks", "shares", "training_masks"]

HIDDEN = -1
UNCHANGED = -2


def training_masks(
    objective: ObjectiveConfig, *, grid_size: tuple[int, int], seed: int, step: int, indices: ArrayLike
) -> Tensor:
    """Return the masks (B, P) of a training step; row b depends on (seed, step, indices[b]) alone."""
    return draw_masks(objective, grid_size=grid_size, seed=derive_seed(seed, "mask", step), indices=indices)


def evaluation_masks(objective: ObjectiveConfig, *, grid_size: tuple[int, int], indices: ArrayLike) -> Tensor:
    """Return the masks (B, P) of an evaluation: the same for every run and step, so that losses can be compared."""
    return draw_masks(objective, grid_size=grid_size, seed=derive_seed("mask", "evaluation"), indices=indices)


def shares(count: int) -> tuple[int, int, int]:
    """Return how many of the corrupted patches are hidden, replaced and left as they are: 80, 10 and 10 % (B.1.2).

    The paper does not say whether each patch draws its fate or the shares are kept; here every image has the same numbers.
    """
    hidden, replaced = round(0.8 * count), round(0.1 * count)
    return hidden, replaced, count - hidden - replaced


def draw_masks(objective: ObjectiveConfig, *, grid_size: tuple[int, int], seed: int, indices: ArrayLike) -> Tensor:
    """Return what the encoder is shown at each patch's place, int64 (B, P); as many patches to predict in each image.

    Args:
        objective: a resolved section.
        grid_size: (rows, columns) of patches.
        seed: from `derive_seed`.
        indices: (B,) of the images in their source.
    """
    unit = objective.mask_unit or 1
    rows, columns = grid_size[0] // unit, grid_size[1] // unit
    cells, count = rows * columns, hidden_patches(objective, grid_size) // unit**2
    chosen = uniform(seed, indices, cells).argsort(axis=1, kind="stable")[:, :count]  # (B, count)
    masks = np.tile(np.arange(cells), (len(chosen), 1))  # (B, cells)
    if objective.name != "masked_patch":
        np.put_along_axis(masks, chosen, HIDDEN, axis=1)
    else:
        hidden, replaced, _ = shares(count)
        np.put_along_axis(masks, chosen[:, :hidden], HIDDEN, axis=1)
        np.put_along_axis(masks, chosen[:, hidden + replaced :], UNCHANGED, axis=1)
        places = chosen[:, hidden : hidden + replaced]
        # another patch of the same image, whichever of the others: so a mask does not depend on who else is in the batch
        ahead = 1 + (uniform(derive_seed(seed, "other"), indices, replaced) * (cells - 1)).astype(np.int64)
        np.put_along_axis(masks, places, (places + ahead) % cells, axis=1)
    if unit > 1:
        gone = (masks == HIDDEN).reshape(-1, rows, columns).repeat(unit, axis=1).repeat(unit, axis=2)
        masks = np.where(gone.reshape(len(gone), -1), HIDDEN, np.arange(grid_size[0] * grid_size[1]))
    return torch.from_numpy(masks)
