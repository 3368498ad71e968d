"""Weights from one model into another: a new head, another resolution, and a report of every tensor.

Fine-tuning drops the pretrained head and interpolates position embeddings to the new grid (ViT, 2010.11929, section 3.2).
Nothing is left out in silence: a tensor is taken, resized, new or dropped as asked for, or loading fails and names it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.models.vit import VisionTransformer

__all__ = ["LoadReport", "load_weights", "resize_pos_embed"]

MAX_LISTED = 6  # tensors named in an error or summary before "and N more"


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor, by state-dict name.

    `taken`, `resized` and `new` together are the model's tensors; `dropped` are those of the weights it has no use for.
    """

    taken: list[str]
    resized: list[str]
    new: list[str]
    dropped: list[str]
    grids: tuple[tuple[int, int], tuple[int, int]]  # old and new (rows, columns) of position embeddings

    def summary(self) -> str:
        """Return one line: "152 tensors: 149 taken, 1 resized: pos_embed 14x14 -> 24x24, 2 new: head; 2 dropped: head"."""
        parts = [f"{len(self.taken)} taken"]
        if self.resized:
            old, new = (f"{rows}x{columns}" for rows, columns in self.grids)
            parts.append(f"{len(self.resized)} resized: {listed(self.resized)} {old} -> {new}")
        if self.new:
            parts.append(f"{len(self.new)} new: {listed(layers(self.new))}")
        line = f"{len(self.taken) + len(self.resized) + len(self.new)} tensors: {', '.join(parts)}"
        return f"{line}; {len(self.dropped)} dropped: {listed(layers(self.dropped))}" if self.dropped else line


def resize_pos_embed(
    pos_embed: Tensor,
    *,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix_tokens: int,
    method: Literal["zoom", "bicubic"] = "zoom",
) -> Tensor:
    """Interpolate position embeddings (1, T + h*w, D) to another grid, (1, T + h'*w', D), in their dtype.

    Args:
        old_grid: (h, w), rows and columns the embeddings were learned for.
        new_grid: (h', w').
        num_prefix_tokens: T leading tokens, which are kept as they are.
        method: "zoom", the original's `scipy.ndimage.zoom(order=1)`, bilinear with corners on corners; or "bicubic", timm's
            `resample_abs_pos_embed`, antialiased.

    Raises:
        ValueError: the embeddings do not have T + h*w tokens.
    """
    expected = num_prefix_tokens + old_grid[0] * old_grid[1]
    if pos_embed.ndim != 3 or pos_embed.shape[:2] != (1, expected):
        raise ValueError(f"position embeddings of a {old_grid} grid have shape (1, {expected}, D), got {shape_of(pos_embed)}")
    if old_grid == new_grid:
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    image = grid.unflatten(1, old_grid).permute(0, 3, 1, 2).double()  # (1, D, h, w)
    if method == "zoom":
        image = F.interpolate(image, size=new_grid, mode="bilinear", align_corners=True)
    else:
        image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def load_weights(
    model: VisionTransformer,
    state: dict[str, Tensor],
    *,
    reset_head: bool,
    old_grid: tuple[int, int] | None = None,
    method: Literal["zoom", "bicubic"] = "zoom",
) -> LoadReport:
    """Copy a state dict into the model, with position embeddings resized to its grid; report every tensor.

    Either all of it happens or the model is left as it was. Values are converted to the model's dtype and device.

    Args:
        state: tensors by the names of `VisionTransformer`.
        reset_head: keep the model's initial `head`, whatever the weights hold, and drop or keep initial `pre_logits` where
            only one side has it. Otherwise both must be there and fit.
        old_grid: (rows, columns) of patches the weights were trained with; None for a square.
        method: as for `resize_pos_embed`.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape, beyond what was asked for.
    """
    own = model.state_dict()
    source = dict(state)
    dropped: list[str] = []
    allowed_new: set[str] = set()
    if reset_head:
        dropped = [name for name in source if is_layer(name, "head") or (is_layer(name, "pre_logits") and name not in own)]
        allowed_new = {name for name in own if is_layer(name, "head") or (is_layer(name, "pre_logits") and name not in source)}
        for name in dropped:
            del source[name]

    missing = [name for name in own if name not in source and name not in allowed_new]
    extra = [name for name in source if name not in own]
    resized: list[str] = []
    grid = model.grid_size if old_grid is None else old_grid
    if "pos_embed" in own and not missing and not extra:
        if old_grid is None:
            grid = square_grid(source["pos_embed"], num_prefix_tokens=model.num_prefix_tokens, own_grid=model.grid_size)
        if grid != model.grid_size:
            try:
                source["pos_embed"] = resize_pos_embed(
                    source["pos_embed"],
                    old_grid=grid,
                    new_grid=model.grid_size,
                    num_prefix_tokens=model.num_prefix_tokens,
                    method=method,
                )
            except ValueError as error:
                raise CheckpointError(
                    f"cannot resize pos_embed: {error}; give the grid these weights were trained with"
                ) from error
            resized = ["pos_embed"]
    reshaped = [
        f"{name} {shape_of(source[name])} where the model has {shape_of(own[name])}"
        for name in own
        if name in source and source[name].shape != own[name].shape
    ]
    if missing or extra or reshaped:
        faults = [("missing", missing), ("not in the model", extra), ("of another shape", reshaped)]
        detail = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in faults if names)
        head_only = all(is_layer(name, "head") or is_layer(name, "pre_logits") for name in missing + extra + reshaped)
        advice = "start with a new head" if head_only else "use the model settings these weights were trained with"
        raise CheckpointError(f"weights do not fit the model: {detail}; {advice}")

    with torch.no_grad():
        for name, tensor in source.items():
            own[name].copy_(tensor)
    return LoadReport(
        taken=[name for name in own if name in source and name not in resized],
        resized=resized,
        new=[name for name in own if name not in source],
        dropped=dropped,
        grids=(grid, model.grid_size),
    )


# ------------------------------------------------------------------------------------------------------- names and grids


def is_layer(name: str, layer: str) -> bool:
    """Tell whether a tensor belongs to the top-level layer; reads "head.weight" and error lines that start so."""
    return name.startswith(f"{layer}.")


def layers(names: list[str]) -> list[str]:
    """Return the layers the tensors belong to, each once: head.weight and head.bias are "head"."""
    return list(dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in names))


def listed(names: list[str]) -> str:
    """Join names with commas; beyond `MAX_LISTED` only their number."""
    shown = ", ".join(names[:MAX_LISTED])
    return f"{shown} and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else shown


def shape_of(tensor: Tensor) -> str:
    """Return a shape as text: (1, 197, 768)."""
    return str(tuple(tensor.shape))


def square_grid(pos_embed: Tensor, *, num_prefix_tokens: int, own_grid: tuple[int, int]) -> tuple[int, int]:
    """Guess the grid of embeddings (1, T + h*w, D): the model's own when the number of tokens is equal, else a square.

    Raises:
        CheckpointError: the number of patches is not a square.
    """
    patches = (pos_embed.shape[1] if pos_embed.ndim == 3 else 0) - num_prefix_tokens
    if patches == own_grid[0] * own_grid[1]:
        return own_grid
    side = math.isqrt(max(0, patches))
    if side == 0 or side * side != patches:
        raise CheckpointError(
            f"cannot resize pos_embed {shape_of(pos_embed)}: {patches} patches are no square; "
            "give the grid these weights were trained with"
        )
    return side, side
