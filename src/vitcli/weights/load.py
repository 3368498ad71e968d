"""Weights from one model into another: a new head, another resolution, and a report of every tensor.

Fine-tuning drops the pretrained head and interpolates position embeddings to the new grid (ViT, 2010.11929, section 3.2).
Nothing is left out in silence: a tensor is taken, resized, new or dropped as asked for, or loading fails and names it.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.model_config import HEADS, ModelConfig, resolve_model, stem_stride
from vitcli.models import Model
from vitcli.models.vit import VisionTransformer
from vitcli.pretrained import Pretrained

__all__ = [
    *("LoadReport", "check_architecture", "differing_settings", "load_start", "load_weights", "resize_pos_embed"),
    *("section_of", "trained_grid"),
]

MAX_LISTED = 6  # tensors named in an error or summary before "and N more"
# what a run may choose anew for weights it starts from: the head, and what only training knows
FREE = ("variant", "representation_size", "head_bias", "dropout", "attention_dropout", "stochastic_depth", "patch_dropout")
Method = Literal["zoom", "bicubic"]
POSITIONS = ("pos_embed", "pos_embed_rows", "pos_embed_columns")  # what a grid's size shows in


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

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values: the summary, and every tensor by what became of it."""
        old, new = (list(grid) for grid in self.grids)
        fates = {"taken": self.taken, "resized": self.resized, "new": self.new, "dropped": self.dropped}
        return {"summary": self.summary(), **fates, "old_grid": old, "new_grid": new}

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
    method: Method = "zoom",
) -> Tensor:
    """Interpolate position embeddings (L, T + h*w, D), one set or one per block, to another grid, in their dtype.

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
    if pos_embed.ndim != 3 or pos_embed.shape[1] != expected:
        raise ValueError(f"position embeddings of a {old_grid} grid have shape (1, {expected}, D), got {shape_of(pos_embed)}")
    if old_grid == new_grid:
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    image = grid.unflatten(1, old_grid).permute(0, 3, 1, 2).double()  # (L, D, h, w)
    if method == "zoom":
        image = F.interpolate(image, size=new_grid, mode="bilinear", align_corners=True)
    else:
        image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def resize_positions(
    name: str, tensor: Tensor, own: Tensor, *, old_grid: tuple[int, int], new_grid: tuple[int, int], method: Method
) -> Tensor:
    """Interpolate one of the model's position tensors: of the whole grid, or of its rows or columns alone.

    Raises:
        ValueError: the tensor is not of the old grid.
    """
    if name == "pos_embed":
        prefix = own.shape[1] - new_grid[0] * new_grid[1]
        return resize_pos_embed(tensor, old_grid=old_grid, new_grid=new_grid, num_prefix_tokens=prefix, method=method)
    axis = 0 if name == "pos_embed_rows" else 1
    line = {"old_grid": (old_grid[axis], 1), "new_grid": (new_grid[axis], 1)}
    return resize_pos_embed(tensor, **line, num_prefix_tokens=0, method=method)


def load_start(model: Model, start: Pretrained) -> LoadReport:
    """Load weights to start from into a model with a new head, resizing position embeddings; raises CheckpointError."""
    check_permutation(model, start)
    return load_weights(model, start.state, reset_head=True, old_grid=trained_grid(start))


def trained_grid(weights: Pretrained) -> tuple[int, int] | None:
    """Return the (rows, columns) of patches that weights were trained with; None for a model without patches."""
    section = section_of(weights)
    if section.patch_size is None:
        return None
    height, width = weights.preprocessing["image_size"]
    side = section.patch_size * stem_stride(section)
    return height // side, width // side


def load_weights(
    model: Model,
    state: dict[str, Tensor],
    *,
    reset_head: bool,
    old_grid: tuple[int, int] | None = None,
    method: Method = "zoom",
) -> LoadReport:
    """Copy a state dict into the model, with position embeddings resized to its grid; report every tensor.

    Either all of it happens or the model is left as it was. Values are converted to the model's dtype and device.

    Args:
        state: tensors by the model's names.
        reset_head: keep the model's initial heads, whatever the weights hold, and drop or keep initial `pre_logits` where
            only one side has it. Otherwise both must be there and fit.
        old_grid: (rows, columns) of patches the weights were trained with; None for a square.
        method: as for `resize_pos_embed`.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape, beyond what was asked for.
    """
    own = model.state_dict()
    source = dict(state)
    # what learned without labels hung on it: of use only to a run that goes on with the same
    left = {name for name in source if is_layer(name, "objective")}
    mine = {name: tensor for name, tensor in own.items() if is_layer(name, "objective")}
    same = left == mine.keys() and all(source[name].shape == tensor.shape for name, tensor in mine.items())
    dropped = [] if same else sorted(left)
    for name in dropped:
        del source[name]
    allowed_new = set() if same else set(mine)
    if reset_head:
        without_head = [name for name in source if is_head(name) or (is_layer(name, "pre_logits") and name not in own)]
        allowed_new |= {name for name in own if is_head(name) or (is_layer(name, "pre_logits") and name not in source)}
        for name in without_head:
            del source[name]
        dropped = [*without_head, *dropped]

    missing = [name for name in own if name not in source and name not in allowed_new]
    extra = [name for name in source if name not in own]
    resized: list[str] = []
    own_grid = model.grid_size if isinstance(model, VisionTransformer) else (1, 1)  # a ResNet has none
    grid = own_grid if old_grid is None else old_grid
    if not missing and not extra:
        if old_grid is None and "pos_embed" in own:
            prefix = own["pos_embed"].shape[1] - own_grid[0] * own_grid[1]
            grid = square_grid(source["pos_embed"], num_prefix_tokens=prefix, own_grid=own_grid)
        elif old_grid is None and "pos_embed_rows" in own:
            grid = (source["pos_embed_rows"].shape[1], source["pos_embed_columns"].shape[1])
        for name in POSITIONS if grid != own_grid else ():
            if name in own:
                try:
                    source[name] = resize_positions(
                        name, source[name], own[name], old_grid=grid, new_grid=own_grid, method=method
                    )
                except ValueError as error:
                    raise CheckpointError(
                        f"cannot resize {name}: {error}; give the grid these weights were trained with"
                    ) from error
                resized.append(name)
    reshaped = [
        f"{name} {shape_of(source[name])} where the model has {shape_of(own[name])}"
        for name in own
        if name in source and source[name].shape != own[name].shape
    ]
    if missing or extra or reshaped:
        if not missing and not extra and all(name.split(" ")[0].endswith(".relative") for name in reshaped):
            raise CheckpointError(
                f"relative positions are of one length of sequence and cannot be resized: {listed(reshaped)}; "
                "keep the image size these weights were trained with"
            )
        if not missing and not extra and all(name.startswith("stem.weight ") for name in reshaped):  # a convolution would fit
            raise CheckpointError(
                f"an MLP has weights for each pixel and cannot be resized: {listed(reshaped)}; "
                "keep the image size these weights were trained with"
            )
        faults = [("missing", missing), ("not in the model", extra), ("of another shape", reshaped)]
        detail = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in faults if names)
        head_only = all(is_head(name) or is_layer(name, "pre_logits") for name in missing + extra + reshaped)
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
        grids=(grid, own_grid),
    )


# ------------------------------------------------------------------------------------------------------------ architecture


def check_permutation(model: Model, weights: Pretrained) -> None:
    """Raise CheckpointError where a model would look at patches in another order than its weights were trained on.

    An image of another size is cut into another grid, which has another order; and positions that were learned in an order
    cannot be interpolated. A model that looks at images as they are is let pass: to ask for that is the user's to decide.
    """
    side = weights.preprocessing.get("patch_permutation")
    if side is None or model.permutation is None:
        return
    height, width = weights.preprocessing["image_size"]
    trained, own = (height // side, width // side), model.permutation.grid_size
    if trained != own:
        raise CheckpointError(
            f"{weights.source_path}: trained on patches in the order of a {trained[0]} x {trained[1]} grid, here it would be "
            f"{own[0]} x {own[1]}, which is another order; keep data.image_size {height} x {width} px and "
            f"data.patch_permutation {side}"
        )


def section_of(pretrained: Pretrained) -> ModelConfig:
    """Return the resolved model section that weights come with.

    Raises:
        CheckpointError: it lacks a size or holds what is no setting.
    """
    try:
        section = ModelConfig.model_validate(pretrained.model)
        if section.kind != "resnet":
            needed = ("width", "depth", "mlp_dim", *(() if section.kind == "mlp" else ("patch_size", "num_heads")))
            lacking = [key for key in needed if getattr(section, key) is None]
            if lacking and section.variant is None:
                raise ValueError(f"lacks {', '.join(lacking)}")
        return resolve_model(section)
    except ValueError as error:
        raise CheckpointError(
            f"{pretrained.source_path}: what it says of its model makes no sense ({in_a_line(error)}); take a fresh copy"
        ) from None


def differing_settings(weights: ModelConfig, config: ModelConfig) -> list[str]:
    """Return the keys by which two resolved sections are different functions of the same tensors, or of other tensors."""
    there, here = computed(weights), computed(config)
    return [key for key in there if there[key] != here[key]]


def computed(section: ModelConfig) -> dict[str, Any]:
    """Return the settings that what a model computes depends on, defaults that follow from others written out."""
    settings = {key: value for key, value in section.model_dump(mode="json").items() if key not in FREE}
    settings["layer_scale"] = section.layer_scale is not None  # how large its factors began is no matter
    if section.resnet_units is not None:
        bit = section.kind == "resnet"
        if section.weight_standardisation == "auto":
            settings["weight_standardisation"] = "bit" if bit else "std"
        if section.group_norm_eps is None:
            settings["group_norm_eps"] = 1e-5 if bit else 1e-6
    return settings


def check_architecture(start: Pretrained, model: ModelConfig) -> None:
    """Raise CheckpointError, with both in words, where weights are of another architecture than a resolved section."""
    weights = section_of(start)
    differing = differing_settings(weights, model)
    if not differing:
        return
    there, here = computed(weights), computed(model)
    keys = "; ".join(f"model.{key}={json.dumps(there[key])}, not {json.dumps(here[key])}" for key in differing[:MAX_LISTED])
    raise CheckpointError(
        f"{start.source_path}: the weights are {in_words(weights)}; the config says {in_words(model)}; "
        f"for these weights set {keys}" + (f" and {len(differing) - MAX_LISTED} more" if len(differing) > MAX_LISTED else "")
    )


def in_words(section: ModelConfig) -> str:
    """Name an architecture by its main sizes: "a ViT of width 768, depth 12, patch 16"."""
    units = "-".join(map(str, section.resnet_units or ()))
    if section.kind == "resnet":
        return f"a ResNet of units {units}, root width {section.resnet_width}"
    if section.kind == "mlp":
        return f"an MLP of width {section.width}, depth {section.depth}"
    stem = "" if section.resnet_units is None else f" after a ResNet stem of units {units or 'none (its root alone)'}"
    return f"a ViT of width {section.width}, depth {section.depth}, patch {section.patch_size}{stem}"


def in_a_line(error: Exception) -> str:
    """Return what an error says, of the config's library only the first complaint, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------------------------------- names and grids


def is_layer(name: str, layer: str) -> bool:
    """Tell whether a tensor belongs to the top-level layer; reads "head.weight" and error lines that start so."""
    return name.startswith(f"{layer}.")


def is_head(name: str) -> bool:
    """Tell whether a tensor belongs to a layer that gives logits."""
    return any(is_layer(name, head) for head in HEADS)


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
