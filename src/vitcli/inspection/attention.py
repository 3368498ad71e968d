"""How far attention looks, and what of the image reaches the head: distances, class-token attention and rollout.

ViT (2010.11929) figures 7, 11, 13, 14 and appendix D.7-D.8; rollout is that of Abnar and Zuidema (2005.00928). Weights are made
from what a block's attention was given, a part of the rows at a time, so no N x N x A of them is ever held.

B batch, A heads, P = h w patches, T + S tokens before them, N tokens, Q some of the rows.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from vitcli.inspection.layers import run, split_tokens, tokens_before
from vitcli.models import VisionTransformer
from vitcli.models.attention import Attention

__all__ = [
    *("FUSIONS", "Fusion", "attention_distances", "attention_of_image", "head_maps", "patch_centres", "pool_maps", "reading"),
    "rollout",
]

Fusion = Literal["mean", "max", "min"]
FUSIONS: tuple[Fusion, ...] = ("mean", "max", "min")
MOST_BYTES = 64 << 20  # of weights held at a time


def rows_of(attention: Attention, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of a first row, and weights from it on, (B, A, Q, N), of at most about `MOST_BYTES`."""
    row_bytes = len(x) * attention.num_heads * x.shape[1] * x.element_size()
    first = 0
    for weights in attention.weight_rows(x, most=max(1, MOST_BYTES // row_bytes)):
        yield first, weights
        first += weights.shape[2]


# ---------------------------------------------------------------- distances


def patch_centres(grid_size: tuple[int, int], image_size: tuple[int, int], *, device: torch.device | None = None) -> Tensor:
    """Return where the patches' centres are, (P, 2), px from the top and from the left."""
    sides = [
        (torch.arange(count, device=device) + 0.5) * (length / count)
        for count, length in zip(grid_size, image_size, strict=True)
    ]
    return torch.cartesian_prod(*sides)


@torch.no_grad()
def attention_distances(attention: Attention, x: Tensor, *, centres: Tensor, before: int) -> tuple[Tensor, Tensor]:
    """Return how far each head's patches look, (B, A) px, and the share they take of tokens that are no patches, (B, A).

    The distance from a patch to the others and itself, weighted by its attention to them (which is divided by its sum, as some
    goes to the class token and registers), is averaged over the patches.

    Args:
        x: what the attention is given, (B, N, D).
        centres: of the patches, (P, 2).
        before: tokens before the patches.
    """
    total = x.new_zeros(len(x), attention.num_heads)
    elsewhere = torch.zeros_like(total)
    patches = len(centres)
    for first, weights in rows_of(attention, x):
        asking = weights[:, :, max(0, before - first) :]  # (B, A, Q, N), of patches
        if not asking.shape[2]:
            continue
        start = max(first, before) - before
        apart = torch.cdist(centres[start : start + asking.shape[2]], centres)  # (Q, P)
        seen = asking[..., before:]
        inside = seen.sum(-1)  # (B, A, Q)
        weighted = torch.einsum("baqp,qp->baq", seen, apart)
        total += (weighted / inside.clamp_min(torch.finfo(inside.dtype).tiny)).sum(-1)
        elsewhere += (1 - inside).sum(-1)
    return total / patches, elsewhere / patches


# ---------------------------------------------------------------- what reaches the head


@torch.no_grad()
def attention_of_image(model: VisionTransformer, images: Tensor) -> tuple[list[tuple[Attention, Tensor]], Tensor]:
    """Return each attention module with its input (B, N, D), in order, and what the last block makes, (B, N, D).

    That is all that maps and rollout need: L N D numbers for an image, where its weights would be L A N N.
    """
    given: list[tuple[Attention, Tensor]] = []
    last: list[Tensor] = []

    def keep_last(number: int, output: Tensor) -> None:
        last[:] = [output]

    run(model, images, layer=keep_last, attention=lambda number, module, x: given.append((module, x)))
    return given, last[0]


@torch.no_grad()
def reading(model: VisionTransformer, last: Tensor) -> Tensor:
    """Return how much the head reads of each of the last block's tokens (B, N, D): (B, N), 1 in sum.

    The class token alone, or with a distillation token half of each; without one the mean over patches, or what the learned
    query takes of them, over all heads.
    """
    before = tokens_before(model)
    shares = last.new_zeros(last.shape[:2])
    if model.cls_token is not None:
        shares[:, : model.num_prefix_tokens] = 1.0 / model.num_prefix_tokens
    elif model.attn_pool is None:
        shares[:, before:] = 1.0 / (last.shape[1] - before)
    else:
        shares[:, before:] = model.attn_pool.weights(model.norm(last[:, before:])).mean(1)
    return shares


@torch.no_grad()
def rollout(given: Sequence[tuple[Attention, Tensor]], start: Tensor, *, fuse: Fusion, residual: bool = True) -> Tensor:
    """Return how much of each input token reaches the head, (B, N), 1 in sum: rollout of attention through all layers.

    start A_L ... A_1, where A is a layer's weights over all heads, plus the identity for the residual connection, with rows
    divided by their sum. From the last layer to the first, so that a row is multiplied and no matrices.

    Args:
        given: from `attention_of_image`.
        start: what the head reads of the last tokens, (B, N).
        fuse: the heads' mean, or the largest or smallest weight of any.
        residual: False leaves the identity out.
    """
    flow = start
    for attention, x in reversed(given):
        taken = torch.zeros_like(flow)
        for first, weights in rows_of(attention, x):
            fused = weights.mean(1) if fuse == "mean" else weights.amax(1) if fuse == "max" else weights.amin(1)  # (B, Q, N)
            rows = slice(first, first + fused.shape[1])
            sums = fused.sum(-1) + float(residual)  # (B, Q)
            through = flow[:, rows] / sums.clamp_min(torch.finfo(sums.dtype).tiny)
            taken += (through[:, None] @ fused)[:, 0]
            if residual:
                taken[:, rows] += through
        flow = taken
    return flow


@torch.no_grad()
def head_maps(model: VisionTransformer, attention: Attention, x: Tensor) -> Tensor:
    """Return what each head takes of each patch, (B, A, h, w): the class token's attention; without one, the patches' mean.

    Args:
        x: what the attention is given, (B, N, D).
    """
    before = tokens_before(model)
    if model.cls_token is not None:
        found = next(attention.weight_rows(x, most=1))[:, :, 0, before:]
    else:
        found = x.new_zeros(len(x), attention.num_heads, x.shape[1] - before)
        for first, weights in rows_of(attention, x):
            found += weights[:, :, max(0, before - first) :, before:].sum(2)
        found /= x.shape[1] - before
    return found.unflatten(2, model.grid_size)


@torch.no_grad()
def pool_maps(model: VisionTransformer, last: Tensor) -> Tensor | None:
    """Return what each head of a learned query takes of each patch, (B, A, h, w), or None where the head reads otherwise."""
    if model.attn_pool is None:
        return None
    tokens = split_tokens(model, last)[1].flatten(2).transpose(1, 2)  # (B, P, D)
    return model.attn_pool.weights(model.norm(tokens)).unflatten(2, model.grid_size)
