"""What a model's first weights look like: principal components of its filters, and which positions resemble which.

ViT (2010.11929) figure 7, left and centre, and figure 10. P = h w patches, D width, F filters.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitcli.models import Model, PixelMlp, ResNet
from vitcli.models.resnet import standardise

__all__ = ["filter_components", "filters_of", "neighbour_similarity", "position_similarity", "positions_of", "spread_places"]

Floats = NDArray[np.float64]


@torch.no_grad()
def filters_of(model: Model) -> tuple[Floats, str]:
    """Return the weights that read pixels, (F, 3, height, width), and what they are in words."""
    if isinstance(model, PixelMlp):
        weight = model.stem.weight.unflatten(1, (3, *model.image_size))
        return as_array(weight), "the first dense layer, a filter as large as the image for each of its outputs"
    root = model if isinstance(model, ResNet) else model.patch_embed.backbone
    if root is not None:
        convolution: Any = root.stem.conv
        weight = standardise(convolution.weight, convolution.standardisation)
        of = "the ResNet's first convolution" if isinstance(model, ResNet) else "the first convolution before the patches"
        return as_array(weight), f"{of}, its kernels standardised as they are used"
    assert not isinstance(model, ResNet)
    return as_array(model.patch_embed.proj.weight), "the linear embedding of the patches"


@torch.no_grad()
def positions_of(model: Model) -> tuple[Floats | None, str]:
    """Return the position embeddings of the patches, (P, D), of the first layer that has them, or None; and why, in words."""
    if isinstance(model, ResNet):
        return None, "A ResNet has no position embeddings: its convolutions know places by their neighbours."
    if isinstance(model, PixelMlp):
        return None, "An MLP on pixels has no position embeddings: each pixel has weights of its own."
    added = model.positions()[0]
    if added is None:
        relative = any(getattr(module, "relative", None) is not None for module in model.blocks.modules())
        kind = "relative positions, inside its attention" if relative else "no position embeddings"
        return None, f"This model has {kind}: there is nothing to compare."
    fixed = "fixed sines and cosines" if isinstance(model.pos_embed, torch.Tensor) and not learned(model) else "learned"
    words = {
        "every_layer": f"{fixed}, those added before the first block; later blocks have their own",
        "shared": f"{fixed}, the same before each block",
    }
    return as_array(added[0, -(model.grid_size[0] * model.grid_size[1]) :]), words.get(model.pos_embed_at, fixed)


def learned(model: Model) -> bool:
    return isinstance(getattr(model, "pos_embed", None), torch.nn.Parameter)


def as_array(tensor: torch.Tensor) -> Floats:
    return tensor.double().cpu().numpy()


def filter_components(filters: Floats, *, most: int) -> tuple[Floats, Floats]:
    """Return the first principal components of filters (F, 3, h, w), (n, 3, h, w) of length 1, and their shares of variance.

    At most `most`, and no more than there are. The largest weight of each is positive, as the sign says nothing.
    """
    rows = filters.reshape(len(filters), -1)
    _, spread, found = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    count = min(most, len(found), max(1, len(filters) - 1))
    found = found[:count]
    largest = np.take_along_axis(found, np.abs(found).argmax(1)[:, None], axis=1)
    variances = spread**2
    shares = variances / max(float(variances.sum()), np.finfo(np.float64).tiny)
    return (found * np.where(largest < 0, -1.0, 1.0)).reshape(count, *filters.shape[1:]), shares[:count]


def position_similarity(positions: Floats, asking: NDArray[np.int64] | None = None) -> Floats:
    """Return cosine similarities of the positions `asking`, all by default, to all, (Q, P), in [-1, 1]."""
    lengths = np.linalg.norm(positions, axis=1, keepdims=True)
    plain = positions / np.maximum(lengths, np.finfo(np.float64).tiny)
    return np.clip((plain if asking is None else plain[asking]) @ plain.T, -1.0, 1.0)


def spread_places(grid_size: tuple[int, int], *, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and columns of a grid, evenly spread, at most `most` of each: what is shown of a large one."""
    return tuple(np.unique(np.linspace(0, side - 1, min(side, most)).round().astype(np.int64)) for side in grid_size)  # type: ignore[return-value]


def neighbour_similarity(positions: Floats, grid_size: tuple[int, int]) -> dict[str, float]:
    """Return mean cosine similarities: of neighbours, in the same row, the same column, and of places that share neither.

    A group without a pair is left out. At most about 1,000 places, evenly spread, are compared with all.
    """
    count = grid_size[0] * grid_size[1]
    asking = np.unique(np.linspace(0, count - 1, min(count, 1_000)).round().astype(np.int64))
    found = position_similarity(positions, asking)  # (Q, P)
    row, column = np.divmod(np.arange(count), grid_size[1])
    down = np.abs(row[asking][:, None] - row)
    across = np.abs(column[asking][:, None] - column)
    groups = {
        "neighbours": down + across == 1,
        "same_row": (down == 0) & (across > 0),
        "same_column": (across == 0) & (down > 0),
        "neither": (down > 0) & (across > 0),
    }
    return {name: float(found[which].mean()) for name, which in groups.items() if which.any()}
