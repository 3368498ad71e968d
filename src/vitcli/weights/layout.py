"""What the readers and writers of other libraries' layouts share: sizes from tensors, what JSON files say, and refusals."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.model_config import VARIANTS, ModelConfig, resolve_model, stem_stride
from vitcli.models.positions import learned2d_positions, sincos2d_positions
from vitcli.pretrained import Pretrained
from vitcli.weights.files import RawWeights

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "assemble",
    "blocks_in",
    "grid_of",
    "heads_of",
    "json_beside",
    "mapping_in",
    "model_of",
    "numbered",
    "pair_of",
    "positions_of",
    "refuse",
    "rows_of",
    "sequence_in",
    "square_patch",
    "stride_of",
    "tokens_in",
    "unusual",
]

# of ImageNet's training images, in [0, 1]: what most libraries subtract and divide by
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CHANNELS_PER_HEAD = 64  # in every published size but a few, which VARIANTS lists
HEADS = {(width, depth, mlp_dim): heads for width, depth, mlp_dim, heads in VARIANTS.values()}
MOST_JSON_BYTES = 64 << 20


# --------------------------------------------------------------------------------------------------------------- reading


def json_beside(path: Path, name: str) -> dict[str, Any]:
    """Return what a JSON file of that name says in a folder, or beside a file; nothing where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    place = (path if path.is_dir() else path.parent) / name
    try:
        if not place.is_file():
            return {}
        if place.stat().st_size > MOST_JSON_BYTES:
            raise ValueError
        content = json.loads(place.read_bytes())
        if not isinstance(content, dict):
            raise ValueError
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError):
        raise CheckpointError(f"{place}: no JSON object; mend it, or take it away to read the weights without it") from None
    return content


def mapping_in(said: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a mapping from a config, empty where there is none."""
    found = said.get(key)
    return found if isinstance(found, dict) else {}


def sequence_in(said: Mapping[str, Any], key: str) -> list[Any]:
    """Return a list from a config, empty where there is none."""
    found = said.get(key)
    return list(found) if isinstance(found, list | tuple) else []


def pair_of(value: Any) -> tuple[int, int] | None:
    """Return a size, given as one side or as height and width; None where it is neither."""
    sides = [value, value] if type(value) is int else value
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        return None
    return sides[0], sides[1]


def blocks_in(names: Iterable[str], prefix: str) -> int:
    """Return how many numbered parts there are below a prefix: 1 + the largest N of "prefixN."."""
    numbers = [name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 5), default=-1)


def rows_of(tensor: Tensor | None) -> int:
    """Return the first side of a tensor; 0 where there is none."""
    return tensor.shape[0] if tensor is not None and tensor.ndim else 0


def square_patch(weight: Tensor, path: Path) -> int:
    """Return the side of the patches that a convolution's weights (D, C, p, p) cut.

    Raises:
        CheckpointError: they are not square.
    """
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or not weight.numel():
        raise CheckpointError(f"{path}: its patch embedding has shape {tuple(weight.shape)}, expected (D, 3, p, p)")
    return int(weight.shape[2])


def heads_of(width: int, depth: int, mlp_dim: int, notes: list[str], path: Path) -> int:
    """Return the number of attention heads, which no tensor says, of a published size; elsewhere one for 64 channels.

    Raises:
        CheckpointError: the width does not tell.
    """
    known = HEADS.get((width, depth, mlp_dim))
    if known is not None:
        return known
    if width % CHANNELS_PER_HEAD:
        raise CheckpointError(
            f"{path}: how many attention heads its width of {width} is for does not show; "
            "put the config.json of the library that wrote it beside it"
        )
    notes.append(f"nothing says how many attention heads it has: took {width // CHANNELS_PER_HEAD}, of 64 channels each")
    return width // CHANNELS_PER_HEAD


def grid_of(patches: int, sizes: Iterable[tuple[int, int] | None], stride: int, path: Path) -> tuple[int, int]:
    """Return the image size (height, width) px that has so many patches: of those given the first that fits, else a square.

    Raises:
        CheckpointError: none fits, and the patches are no square.
    """
    for size in sizes:
        if size and size[0] % stride == size[1] % stride == 0 and size[0] * size[1] == patches * stride * stride:
            return size
    side = math.isqrt(patches)
    if side * side != patches or not patches:
        raise CheckpointError(
            f"{path}: positions of {patches} patches, which make no square, and no config.json beside it that says the "
            "image size; put it there"
        )
    return side * stride, side * stride


def tokens_in(positions: Tensor, path: Path) -> int:
    """Return how many tokens position embeddings (1, N, D) are for.

    Raises:
        CheckpointError: they have another form.
    """
    if positions.ndim != 3 or len(positions) != 1:
        raise CheckpointError(f"{path}: its position embeddings have shape {tuple(positions.shape)}, expected (1, N, D)")
    return positions.shape[1]


def stride_of(section: Mapping[str, Any]) -> int:
    """Return how many px wide a patch is, after the ResNet where there is one; the section may be incomplete."""
    units, root = section.get("resnet_units"), section.get("resnet_root", "large")
    patch_size: int = section["patch_size"]
    return patch_size * stem_stride(ModelConfig.model_construct(resnet_units=units, resnet_root=root))


def numbered(classes: int) -> list[str]:
    """Return names for classes that have none: "0", "1", ..."""
    return [str(number) for number in range(classes)]


def assemble(
    raw: RawWeights,
    path: Path,
    *,
    state: Mapping[str, Tensor],
    section: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    classes: list[str] | None,
    layout: str,
    source: str | None,
    notes: list[str],
) -> Pretrained:
    """Return weights with what they are; whether the tensors are all that the model has, and no more, is yet to be seen.

    Args:
        state: tensors by our names, and by the file's own what nothing was made of.
        section: the settings of the `model` section that differ from its defaults.
        preprocessing: image_size, mean, std and eval_crop_fraction.
        classes: None where the file names none.
        layout: the library's name, for messages.
        source: the name the library gives the model, if it is told.

    Raises:
        CheckpointError: the sizes are not those of a model.
    """
    try:
        model = resolve_model(ModelConfig.model_validate(section))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise CheckpointError(f"{path}: its names are {layout}'s, but model.{key} would be {fault['input']!r}") from None
    head = state.get("head.weight")
    num_classes = rows_of(head)
    if head is None:
        notes.append("the file has no head: it can be fine-tuned, or its features read, but it cannot classify yet")
    if classes is not None and len(classes) != num_classes:
        notes.append(f"the class names beside it do not fit its {num_classes} classes, which are numbered instead")
        classes = None
    return Pretrained(
        state={name: tensor.contiguous() for name, tensor in state.items()},
        model=model.model_dump(mode="json"),
        classes=numbered(num_classes) if classes is None else told_apart(classes),
        preprocessing=dict(preprocessing),
        source_path=path,
        step=0,
        is_ema="ema" in str(raw.metadata.get("part", "")),
        manifest={"source": source, "seed": 0, "format": layout},
        named=classes is not None,
        notes=notes,
    )


def told_apart(classes: list[str]) -> list[str]:
    """Return names of which no two are equal: ImageNet's two cranes become "crane" and "crane (517)"."""
    seen: set[str] = set()
    names = []
    for number, name in enumerate(classes):
        names.append(name if name not in seen else f"{name} ({number})")
        seen |= {name, names[-1]}
    return names


# --------------------------------------------------------------------------------------------------------------- writing


def model_of(pretrained: Pretrained) -> ModelConfig:
    """Return the resolved model section of weights."""
    return ModelConfig.model_validate(pretrained.model)


def refuse(target: str, reasons: Iterable[str | None]) -> None:
    """Raise CheckpointError where there are reasons that a library cannot hold a model."""
    found = [reason for reason in reasons if reason]
    if found:
        raise CheckpointError(
            f"cannot be written for {target}: it has no {', nor '.join(found)}; `vit convert` has other formats"
        )


def only_ours(pretrained: Pretrained) -> list[str | None]:
    """Return what weights have that no other library's model of any kind does."""
    model = model_of(pretrained)
    return [
        "MLP on pixels" if model.kind == "mlp" else None,
        "units without neighbours" if model.resnet_spatial_units is not None else None,
        f"GroupNorm of {model.group_norm_groups} groups" if model.group_norm_groups != 32 else None,
        "fixed permutation of patches" if pretrained.preprocessing.get("patch_permutation") is not None else None,
    ]


def unusual(model: ModelConfig) -> list[str | None]:
    """Return what a model has that no other library's Vision Transformer does."""
    return [
        "relative positions" if model.pos_embed == "relative" else None,
        f"positions added at {model.pos_embed_at.replace('_', ' ')}" if model.pos_embed_at != "stem" else None,
        "Axial attention" if model.attention == "axial" else None,
    ]


def positions_of(pretrained: Pretrained) -> Tensor | None:
    """Return what is added to class token and patches, (1, T + P, D), for positions of any kind added at the stem; or None."""
    model, state = model_of(pretrained), pretrained.state
    if model.pos_embed == "sincos2d":
        assert model.width
        height, width = pretrained.preprocessing["image_size"]
        side = stride_of(pretrained.model)
        positions = sincos2d_positions(grid_size=(height // side, width // side), width=model.width)
        first = positions.new_zeros(1, int(model.pool == "token") + int(model.distill_token), model.width)
        return torch.cat([first, positions], dim=1)
    if model.pos_embed == "learned2d":
        positions = learned2d_positions(state["pos_embed_rows"], state["pos_embed_columns"])
        return torch.cat([state["pos_embed_prefix"], positions], dim=1) if model.pool == "token" else positions
    return state.get("pos_embed")
