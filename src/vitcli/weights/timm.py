"""timm's Vision Transformers, hybrids, distilled DeiTs and BiT ResNets: read, and written with timm's own config.json.

Our names are timm's, so little has to be renamed. What differs: timm may give the class token no position and registers one,
and may average the patches of a model that also has a class token. A token that nobody reads and that has a position is a
register whose value is their sum, so all of these are read exactly. Numbers that no
tensor holds (GELU, epsilons, preprocessing) come from the config.json beside the file, else from timm's defaults.
Sources: timm's vision_transformer.py, deit.py, resnetv2.py and _hub.py.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.model_config import HEADS, RESNET_UNITS, ModelConfig
from vitcli.pretrained import Pretrained
from vitcli.weights.files import RawWeights
from vitcli.weights.layout import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    assemble,
    blocks_in,
    grid_of,
    heads_of,
    json_beside,
    mapping_in,
    model_of,
    only_ours,
    pair_of,
    positions_of,
    refuse,
    rows_of,
    sequence_in,
    square_patch,
    stride_of,
    tokens_in,
    unusual,
)

__all__ = ["export_timm", "is_timm", "read_timm", "timm_config", "timm_differences"]

STEM = "patch_embed.backbone."
WRAPPER = "timm_model."  # Hugging Face's, around any model of timm's
# names of DINOv2's and DeiT III's authors, which timm renames likewise
RENAMED = (
    (r"^register_tokens$", "reg_token"),
    (r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"),
    (rf"^{re.escape(STEM)}(conv|norm)\.", rf"{STEM}stem.\1."),  # a stem that is a root alone
)
PRETRAINING_ONLY = ("mask_token",)
ASSUMED_SIDE = 224  # px, where neither tensors nor a config tell
ASSUMED_LAYER_SCALE = 1e-5  # the initial value in timm's models; what was learned since is in the tensors
LAYER_NORM_EPS, GROUP_NORM_EPS = 1e-6, 1e-5  # timm's defaults
ACTIVATIONS = {"gelu": "exact", "gelu_tanh": "tanh"}
# SigLIP's models that timm builds with the tanh approximation; the others have the exact one
TANH_MODELS = re.compile(r"patch32_siglip|so400m_patch16_siglip|giantopt_patch16_siglip|large_patch16_siglip_(gap_)?512")
# timm's functions that build a hybrid, by their units: there is none for others
HYBRIDS = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
RESNETS = {(50, 1), (50, 3), (101, 1), (101, 3), (152, 2), (152, 4)}  # layers and width factor, likewise
# width, depth, patch side: names of timm's for plain sizes; any other is vit_base with arguments
NAMES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
DISTILLED = ("tiny", "small", "base")  # sizes of a distilled DeiT by name
NAMED_PATCHES = {"tiny": (16,), "small": (16, 32, 8), "base": (16, 32, 8, 14), "large": (16, 32, 14), "huge": (14,)}


def is_timm(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors have timm's names of a Vision Transformer or a BiT ResNet."""
    names = {name.removeprefix(WRAPPER) for name in tensors}
    return {"patch_embed.proj.weight", "blocks.0.norm1.weight"} <= names or (
        {"stem.conv.weight", "stages.0.blocks.0.norm1.weight"} <= names
    )


def read_timm(raw: RawWeights, path: Path) -> Pretrained:
    """Turn timm's tensors into ours, with what a config.json beside them says.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape, or the model is one that ours cannot be.
    """
    said = json_beside(path, "config.json")
    if "architecture" not in said:  # some other library's
        said = {}
    tensors = {renamed(name): tensor for name, tensor in raw.tensors.items()}
    if len(tensors) < len(raw.tensors):
        raise CheckpointError(f"{path}: some tensor is there by two names")
    notes = [] if said else ["no config.json of timm's beside the file"]
    dropped = [tensors.pop(name, None) is not None and name for name in PRETRAINING_ONLY]
    notes += [f"left out {name}, which is for pretraining alone" for name in dropped if name]
    read = read_resnet if "stem.conv.weight" in tensors else read_vit
    return read(raw, path, tensors, said, notes)


def renamed(name: str) -> str:
    """Return a tensor's name in timm's present form."""
    name = name.removeprefix(WRAPPER)
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def read_vit(raw: RawWeights, path: Path, tensors: dict[str, Tensor], said: dict[str, Any], notes: list[str]) -> Pretrained:
    """Read a Vision Transformer, plain or after a ResNet."""
    arguments = mapping_in(said, "model_args")
    patch = tensors["patch_embed.proj.weight"]
    patch_size, width, depth = square_patch(patch, path), len(patch), blocks_in(tensors, "blocks.")
    mlp_dim = rows_of(tensors.get("blocks.0.mlp.fc1.weight"))
    section: dict[str, Any] = {
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "gelu": gelu_of(said, path),
        "layer_norm_eps": LAYER_NORM_EPS,
    }
    if f"{STEM}stem.conv.weight" in tensors:
        section |= resnet_section(tensors, STEM)
    channels = rows_of(tensors.get("blocks.0.attn.q_norm.weight"))
    section["qk_norm"] = channels > 0
    if type(arguments.get("num_heads")) is int:
        section["num_heads"] = arguments["num_heads"]
    elif channels:
        section["num_heads"] = width // channels
    else:
        section["num_heads"] = heads_of(width, depth, mlp_dim, notes, path)
    if "blocks.0.ls1.gamma" in tensors:
        initial = arguments.get("init_values")
        section["layer_scale"] = initial if isinstance(initial, float) and initial > 0 else ASSUMED_LAYER_SCALE
    if depth and not any(name.endswith(".attn.qkv.bias") for name in tensors):
        tensors |= {f"blocks.{number}.attn.qkv.bias": patch.new_zeros(3 * width) for number in range(depth)}
        notes.append("its queries, keys and values have no bias: zeros stand for it")

    section["pool"] = pool = pool_of(tensors, said, path)
    if pool == "token" and "fc_norm.weight" in tensors and "norm.weight" not in tensors:  # of one token, the same
        tensors |= {
            f"norm.{leaf}": tensors.pop(f"fc_norm.{leaf}") for leaf in ("weight", "bias") if f"fc_norm.{leaf}" in tensors
        }
    distilled = "dist_token" in tensors
    heads = [f"{head}.weight" in tensors for head in HEADS]
    section["distill_token"] = distilled and pool == "token" and "cls_token" in tensors and heads[0] == heads[1]
    image_size = fold_tokens(tensors, section, said, stride_of(section), path, notes)
    if not section["distill_token"] and tensors.pop("head_dist.weight", None) is not None:
        tensors.pop("head_dist.bias", None)
        notes.append(
            "a distilled DeiT without the class token's head: its distillation token is kept, as a register, and the head on "
            "it is left out"
        )
    return assemble(
        raw,
        path,
        state=tensors,
        section=section,
        preprocessing={"image_size": list(image_size), **preprocessing_of(said, notes, deit=distilled)},
        classes=class_names(said),
        layout="timm",
        source=architecture_of(said) or None,
        notes=notes,
    )


def fold_tokens(
    tensors: dict[str, Tensor], section: dict[str, Any], said: dict[str, Any], stride: int, path: Path, notes: list[str]
) -> tuple[int, int]:
    """Bring tokens and positions into our form, in place: registers without positions, a class token always with one.

    Returns:
        The image size (height, width), px.

    Raises:
        CheckpointError: tokens do not fit one another, or nothing tells the image size.
    """
    before = [name for name in ("cls_token", "dist_token", "reg_token") if name in tensors]
    count = sum(tokens_in(tensors[name], path) for name in before)
    # tokens that stay as they are, with their position
    kept = int(section["pool"] == "token" and "cls_token" in before) + section["distill_token"]
    positions = tensors.pop("pos_embed", None)
    widths = {tensor.shape[-1] for tensor in (positions, *(tensors[name] for name in before)) if tensor is not None}
    if widths - {section["width"]}:
        raise CheckpointError(f"{path}: its tokens and positions are of another width than its patches, {section['width']}")
    sizes = [pair_of(mapping_in(said, "model_args").get("img_size")), pair_of(sequence_in(cfg_of(said), "input_size")[1:])]
    if positions is None:
        section["pos_embed"] = "none"
        image_size = next((size for size in sizes if size and size[0] % stride == size[1] % stride == 0), None)
        if image_size is None:
            image_size = (max(1, ASSUMED_SIDE // stride) * stride,) * 2
            notes.append(f"without positions, nothing says its image size: took {image_size[0]} px")
    else:
        found = tokens_in(positions, path)
        apart = are_apart(found, count, sizes, stride, said, registers="reg_token" in before)
        image_size = grid_of(found if apart else found - count, sizes, stride, path)
        if apart:
            nothing = positions.new_zeros(1, count, positions.shape[2])
            positions = torch.cat([nothing, positions], dim=1)
        tensors["pos_embed"] = torch.cat([positions[:, :kept], positions[:, count:]], dim=1)
    if count > kept:
        others = torch.cat([tensors.pop(name) for name in before[kept:]], dim=1)
        tensors["reg_token"] = others if positions is None else others.float() + positions[:, kept:count].float()
        section["registers"] = count - kept
        if "cls_token" in before[kept:]:
            notes.append("its class token, which the head does not read, is kept as a register")
    return image_size


def are_apart(
    found: int, count: int, sizes: list[tuple[int, int] | None], stride: int, said: dict[str, Any], *, registers: bool
) -> bool:
    """Tell whether `found` positions are for patches alone (timm's no_embed_class), not for `count` tokens before them too."""
    stated = mapping_in(said, "model_args").get("no_embed_class")
    if type(stated) is bool:
        return stated
    patches = {size[0] * size[1] // stride**2 for size in sizes if size}
    if found - count in patches or found in patches:
        return found in patches
    squares = [places > 0 and math.isqrt(places) ** 2 == places for places in (found, found - count)]
    return squares[0] and (registers or not squares[1])  # timm's models with registers have positions for patches alone


def pool_of(tensors: Mapping[str, Tensor], said: dict[str, Any], path: Path) -> str:
    """Return what the head reads: by the tensors, and where they do not tell, by the config.

    Raises:
        CheckpointError: something that ours cannot.
    """
    arguments = mapping_in(said, "model_args")
    stated = arguments.get("global_pool", said.get("global_pool")) or None
    if stated not in (None, "token", "avg", "map"):
        raise CheckpointError(f"{path}: its head reads {stated!r} of the tokens, expected token, avg or map")
    if arguments.get("pool_include_prefix"):
        raise CheckpointError(f"{path}: its head reads class token and patches alike, expected one or the other")
    if "attn_pool.latent" in tensors:
        return "map"
    pool = {"token": "token", "avg": "gap"}.get(stated or "")
    if pool is None:
        pool = "token" if "cls_token" in tensors and "fc_norm.weight" not in tensors else "gap"
    if pool == "gap" and "fc_norm.weight" in tensors:
        raise CheckpointError(
            f"{path}: it averages the patches before its last norm (timm's fc_norm), and this model's norm comes first; "
            "such weights cannot be read"
        )
    return pool


def gelu_of(said: dict[str, Any], path: Path) -> str:
    """Return which GELU the model was built with: timm's is exact unless its config or its name says otherwise.

    Raises:
        CheckpointError: another activation, or another norm.
    """
    arguments, name = mapping_in(said, "model_args"), architecture_of(said)
    implied = "quick_gelu" if "quickgelu" in name else "gelu_tanh" if TANH_MODELS.search(name) else "gelu"
    activation = arguments.get("act_layer") or implied
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"{path}: its activation is {activation!r}, expected {' or '.join(ACTIVATIONS)}")
    if arguments.get("norm_layer") not in (None, "layernorm"):
        raise CheckpointError(f"{path}: its norms are {arguments['norm_layer']!r}, expected layernorm")
    return ACTIVATIONS[activation]


def read_resnet(raw: RawWeights, path: Path, tensors: dict[str, Tensor], said: dict[str, Any], notes: list[str]) -> Pretrained:
    """Read a BiT ResNet, whose head is a 1x1 convolution in timm."""
    head = tensors.pop("head.fc.weight", None)
    if head is not None:
        tensors["head.weight"] = head.flatten(1) if head.ndim == 4 else head
    if "head.fc.bias" in tensors:
        tensors["head.bias"] = tensors.pop("head.fc.bias")
    image_size = pair_of(sequence_in(cfg_of(said), "input_size")[1:])
    if image_size is None:
        image_size = (ASSUMED_SIDE, ASSUMED_SIDE)
        notes.append(f"nothing says its image size: took {ASSUMED_SIDE} px")
    return assemble(
        raw,
        path,
        state=tensors,
        section={"kind": "resnet", **resnet_section(tensors, "")},
        preprocessing={"image_size": list(image_size), **preprocessing_of(said, notes)},
        classes=class_names(said),
        layout="timm",
        source=architecture_of(said) or None,
        notes=notes,
    )


def resnet_section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Return the settings of a ResNet, by its tensors; numerics are timm's."""
    units = []
    for stage in range(blocks_in(tensors, f"{prefix}stages.")):
        units.append(blocks_in(tensors, f"{prefix}stages.{stage}.blocks."))
    conv = tensors[f"{prefix}stem.conv.weight"]
    return {
        "resnet_units": units,
        "resnet_width": rows_of(conv),
        "resnet_root": "small" if conv.shape[2:] == (3, 3) else "large",
        "weight_standardisation": "timm",
        "group_norm_eps": GROUP_NORM_EPS,
    }


# ---------------------------------------------------------------------------------------------------------------- config


def cfg_of(said: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json about pretraining, which old ones have at their top."""
    return mapping_in(said, "pretrained_cfg") or said


def architecture_of(said: Mapping[str, Any]) -> str:
    """Return the name of the function that builds the model, or "" where none is given."""
    name = said.get("architecture")
    return name if isinstance(name, str) else ""


def preprocessing_of(said: dict[str, Any], notes: list[str], *, deit: bool = False) -> dict[str, Any]:
    """Return mean, std and crop fraction of a config; without one, images in [-1, 1], whole, and a note."""
    cfg = cfg_of(said)
    mean, std = sequence_in(cfg, "mean"), sequence_in(cfg, "std")
    if len(mean) != 3 or len(std) != 3 or not all(isinstance(value, int | float) for value in (*mean, *std)) or 0 in std:
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if deit else ([0.5] * 3, [0.5] * 3)
        shown = "ImageNet's mean and deviation" if deit else "mean and std 0.5 (images in [-1, 1])"
        notes.append(
            f"nothing says its preprocessing and numerics: took {shown}, the whole image, and timm's defaults; "
            "put the model's config.json beside the file if they are others"
        )
        return {"mean": mean, "std": std, "eval_crop_fraction": None}
    share = cfg.get("crop_pct")
    whole = cfg.get("crop_mode") == "squash" or not isinstance(share, int | float) or not 0 < share <= 1
    if cfg.get("interpolation", "bilinear") != "bilinear":
        notes.append(f"its images were resized by {cfg['interpolation']} interpolation; here it is bilinear")
    return {"mean": mean, "std": std, "eval_crop_fraction": None if whole else float(share or 1.0)}


def class_names(said: Mapping[str, Any]) -> list[str] | None:
    """Return the class names of a config, in the order of the classes."""
    names = said.get("label_names")
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return names


# --------------------------------------------------------------------------------------------------------------- writing


def export_timm(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the state dict of the timm model that `timm_config` describes.

    Raises:
        CheckpointError: timm has no such model.
    """
    model = model_of(pretrained)
    check(pretrained, model)
    state = dict(pretrained.state)
    if model.kind == "resnet":
        if "head.weight" in state:
            state["head.fc.weight"], state["head.fc.bias"] = state.pop("head.weight")[:, :, None, None], state.pop("head.bias")
        return {name: tensor.contiguous() for name, tensor in state.items()}
    positions = positions_of(pretrained)
    for name in ("pos_embed_prefix", "pos_embed_rows", "pos_embed_columns"):
        state.pop(name, None)
    if positions is None and model.distill_token:  # timm's distilled models always have some
        tokens = 2 + math.prod(pretrained.preprocessing["image_size"]) // stride_of(pretrained.model) ** 2
        positions = state["cls_token"].new_zeros(1, tokens, model.width or 1)
    if positions is not None:
        first = int(model.pool == "token") + int(model.distill_token)
        none = positions.new_zeros(1, model.registers, positions.shape[2])  # timm's registers have positions where classes do
        state["pos_embed"] = torch.cat([positions[:, :first], none, positions[:, first:]], dim=1)
    if model.resnet_units == ():
        state = {name.replace(f"{STEM}stem.", STEM): tensor for name, tensor in state.items()}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def timm_config(pretrained: Pretrained) -> dict[str, Any]:
    """Return timm's config.json of the exported weights: beside them, "local-dir:FOLDER" is a model's name in timm.

    Raises:
        CheckpointError: timm has no such model.
    """
    model = model_of(pretrained)
    check(pretrained, model)
    height, width = pretrained.preprocessing["image_size"]
    share = pretrained.preprocessing["eval_crop_fraction"]
    name, arguments = architecture(model)
    if model.kind == "vit":
        arguments |= {
            "img_size": [height, width],
            "patch_size": model.patch_size,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "mlp_ratio": mlp_ratio(model.width or 1, model.mlp_dim or 1),
            "class_token": model.pool == "token",
            "global_pool": {"token": "token", "gap": "avg", "map": "map"}[model.pool],
            "fc_norm": False,
            "pos_embed": "none" if model.pos_embed == "none" and not model.distill_token else "learn",
            "no_embed_class": False,
            "reg_tokens": model.registers,
            "qk_norm": model.qk_norm,
            "act_layer": "gelu_tanh" if model.gelu == "tanh" else "gelu",
        }
        if model.layer_scale:
            arguments["init_values"] = model.layer_scale
    preprocessing = {
        "input_size": [3, height, width],
        "fixed_input_size": model.kind == "vit",
        "interpolation": "bilinear",
        "crop_pct": 1.0 if share is None else share,
        "crop_mode": "squash" if share is None else "center",
        "mean": list(pretrained.preprocessing["mean"]),
        "std": list(pretrained.preprocessing["std"]),
    }
    layers = ("stem.conv", "head.fc") if model.kind == "resnet" else ("patch_embed.proj", "head")
    if model.resnet_units is not None and model.kind == "vit":
        layers = ("patch_embed.backbone.stem.conv" if model.resnet_units else "patch_embed.backbone.conv", "head")
    first_conv, classifier = layers
    config = {
        "architecture": name,
        "num_classes": len(pretrained.classes),
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": len(pretrained.classes),
            **preprocessing,
            "first_conv": first_conv,
            "classifier": list(HEADS) if model.distill_token else classifier,
        },
    }
    if model.kind == "vit":
        config["global_pool"] = arguments["global_pool"]
    if pretrained.named and pretrained.classes:
        config["label_names"] = list(pretrained.classes)
    return config


def timm_differences(pretrained: Pretrained) -> list[str]:
    """Return what timm's model does a little otherwise, and cannot be told."""
    model = model_of(pretrained)
    found = []
    if model.kind == "vit" and model.layer_norm_eps != LAYER_NORM_EPS:
        found.append(f"LayerNorm's epsilon is {LAYER_NORM_EPS:g} in timm, not {model.layer_norm_eps:g}")
    if model.resnet_units is not None:
        resnet = model.kind == "resnet"
        eps = model.group_norm_eps or (1e-5 if resnet else 1e-6)
        standardised = model.weight_standardisation
        standardised = ("bit" if resnet else "std") if standardised == "auto" else standardised
        if eps != GROUP_NORM_EPS:
            found.append(f"GroupNorm's epsilon is {GROUP_NORM_EPS:g} in timm, not {eps:g}")
        if standardised != "timm":
            shown = "std + 1e-5" if standardised == "std" else "sqrt(var + 1e-10)"
            found.append(f"kernels are divided by sqrt(var + 1e-8) in timm, not by {shown}")
    return found


def check(pretrained: Pretrained, model: ModelConfig) -> None:
    """Raise CheckpointError where timm has no such model."""
    refuse("timm", only_ours(pretrained))
    if model.kind == "resnet":
        refuse("timm", ["BiT ResNet of these sizes" if resnet_name(model) is None else None])
        return
    hybrid = model.resnet_units is not None
    known = not hybrid or (model.resnet_units in HYBRIDS and model.resnet_width == 64 and model.resnet_root == "large")
    refuse(
        "timm",
        [
            *unusual(model),
            "hidden layer before the head (pre_logits)" if model.representation_size else None,
            None if known else "hybrid with such a ResNet",
            "hybrid with a distillation token" if hybrid and model.distill_token else None,
            "registers beside a distillation token" if model.registers and model.distill_token else None,
        ],
    )


def resnet_name(model: ModelConfig) -> str | None:
    layers = next((layers for layers, units in RESNET_UNITS.items() if units == model.resnet_units), 0)
    factor = (model.resnet_width or 0) // 64
    if (layers, factor) not in RESNETS or model.resnet_width != 64 * factor or model.resnet_root != "large":
        return None
    return f"resnetv2_{layers}x{factor}_bit"


def architecture(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return timm's function for a model, and the arguments that are yet to be filled in."""
    if model.kind == "resnet":
        name = resnet_name(model)
        assert name is not None
        return name, {}
    if model.resnet_units is not None:
        return HYBRIDS[model.resnet_units], {}
    size = NAMES.get((model.width or 0, model.depth or 0), "base")
    if model.distill_token:
        return f"deit_{size if size in DISTILLED else 'base'}_distilled_patch16_224", {}
    patch = model.patch_size if model.patch_size in NAMED_PATCHES[size] else NAMED_PATCHES[size][0]
    return f"vit_{size}_patch{patch}_224", {}


def mlp_ratio(width: int, mlp_dim: int) -> float:
    """Return a ratio r with int(width * r) == mlp_dim, as timm computes it."""
    ratio = mlp_dim / width
    while int(width * ratio) < mlp_dim:
        ratio = math.nextafter(ratio, math.inf)
    return ratio
