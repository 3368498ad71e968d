"""torchvision's Vision Transformers (`vit_b_16` and its like): read and written; exact GELU, ImageNet's mean and deviation.

The layout is torchvision.models.vision_transformer's; `linear_1` and `linear_2` are its names of the MLP before 0.13.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vitcli.pretrained import Pretrained
from vitcli.weights.files import RawWeights
from vitcli.weights.layout import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    assemble,
    blocks_in,
    grid_of,
    heads_of,
    model_of,
    only_ours,
    positions_of,
    refuse,
    rows_of,
    square_patch,
    tokens_in,
    unusual,
)

__all__ = ["export_torchvision", "is_torchvision", "read_torchvision", "torchvision_arguments", "torchvision_differences"]

LAYER = "encoder.layers.encoder_layer_"
OLD_NAMES = ((".mlp.linear_1.", ".mlp.0."), (".mlp.linear_2.", ".mlp.3."))
# ours, theirs; of the blocks within one
NAMES = {
    "cls_token": "class_token",
    "patch_embed.proj.weight": "conv_proj.weight",
    "patch_embed.proj.bias": "conv_proj.bias",
    "pos_embed": "encoder.pos_embedding",
    "norm.weight": "encoder.ln.weight",
    "norm.bias": "encoder.ln.bias",
    "pre_logits.weight": "heads.pre_logits.weight",
    "pre_logits.bias": "heads.pre_logits.bias",
    "head.weight": "heads.head.weight",
    "head.bias": "heads.head.bias",
}
BLOCK_NAMES = {
    "norm1.weight": "ln_1.weight",
    "norm1.bias": "ln_1.bias",
    "attn.qkv.weight": "self_attention.in_proj_weight",
    "attn.qkv.bias": "self_attention.in_proj_bias",
    "attn.proj.weight": "self_attention.out_proj.weight",
    "attn.proj.bias": "self_attention.out_proj.bias",
    "norm2.weight": "ln_2.weight",
    "norm2.bias": "ln_2.bias",
    "mlp.fc1.weight": "mlp.0.weight",
    "mlp.fc1.bias": "mlp.0.bias",
    "mlp.fc2.weight": "mlp.3.weight",
    "mlp.fc2.bias": "mlp.3.bias",
}
# Published: from scratch at 224 px, the centre of a resize to 256; fine-tuned at larger sizes (SWAG), a resize to the size.
SCRATCH_SIDE, SCRATCH_SHARE = 224, 0.875


def is_torchvision(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors have torchvision's names."""
    return {"class_token", "conv_proj.weight", "encoder.pos_embedding"} <= tensors.keys()


def read_torchvision(raw: RawWeights, path: Path) -> Pretrained:
    """Turn torchvision's tensors into ours.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape.
    """
    tensors = {}
    for name, tensor in raw.tensors.items():
        for old, new in OLD_NAMES:
            name = name.replace(old, new)
        tensors[name] = tensor
    depth = blocks_in(tensors, LAYER)
    ours = {theirs: own for own, theirs in names_of(depth).items()}
    state = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    notes: list[str] = []

    patch_size = square_patch(state["patch_embed.proj.weight"], path)
    width = int(state["patch_embed.proj.weight"].shape[0])
    mlp_dim = rows_of(state.get("blocks.0.mlp.fc1.weight"))
    image_size = grid_of(tokens_in(state["pos_embed"], path) - 1, [], patch_size, path)
    hidden = state.get("pre_logits.weight")
    share = SCRATCH_SHARE if image_size[0] <= SCRATCH_SIDE else None
    shown = f"the central {share:.1%} of the image" if share else "the whole image"
    notes.append(
        f"the file does not say its preprocessing: took {shown} and ImageNet's mean and deviation, as torchvision does"
    )
    section = {
        "patch_size": patch_size,
        "width": width,
        "depth": max(1, depth),
        "mlp_dim": mlp_dim,
        "num_heads": heads_of(width, depth, mlp_dim, notes, path),
        "representation_size": None if hidden is None else rows_of(hidden),
        "gelu": "exact",
    }
    return assemble(
        raw,
        path,
        state=state,
        section=section,
        preprocessing={
            "image_size": list(image_size),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "eval_crop_fraction": share,
        },
        classes=None,
        layout="torchvision",
        source=None,
        notes=notes,
    )


def export_torchvision(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the state dict of torchvision's `VisionTransformer` for these weights.

    Raises:
        CheckpointError: torchvision has no such model.
    """
    model = model_of(pretrained)
    height, width = pretrained.preprocessing["image_size"]
    refuse("torchvision", only_ours(pretrained))
    refuse(
        "torchvision",
        [
            "ResNet of this kind" if model.kind == "resnet" else None,
            "ResNet before the Transformer" if model.resnet_units is not None else None,
            *unusual(model),
            "head but on a class token" if model.pool != "token" else None,
            "distillation token" if model.distill_token else None,
            "registers" if model.registers else None,
            "LayerScale" if model.layer_scale else None,
            "norm of queries and keys" if model.qk_norm else None,
            "tanh GELU" if model.gelu == "tanh" else None,
            "image size that is no square" if height != width else None,
            None if "head.weight" in pretrained.state else "model without a head",
        ],
    )
    positions = positions_of(pretrained)
    state = dict(pretrained.state)
    patches = (height // (model.patch_size or 1)) ** 2
    state["pos_embed"] = state["cls_token"].new_zeros(1, 1 + patches, model.width or 1) if positions is None else positions
    return {theirs: state[own].contiguous() for own, theirs in names_of(model.depth or 0).items() if own in state}


def torchvision_arguments(pretrained: Pretrained) -> dict[str, Any]:
    """Return the arguments of `torchvision.models.VisionTransformer` that build the model of the exported state dict."""
    model = model_of(pretrained)
    return {
        "image_size": pretrained.preprocessing["image_size"][0],
        "patch_size": model.patch_size,
        "num_layers": model.depth,
        "num_heads": model.num_heads,
        "hidden_dim": model.width,
        "mlp_dim": model.mlp_dim,
        "num_classes": len(pretrained.classes),
        "representation_size": model.representation_size,
    }


def torchvision_differences(pretrained: Pretrained) -> list[str]:
    """Return what torchvision's model does otherwise unless told so when it is built."""
    eps = model_of(pretrained).layer_norm_eps
    if eps == 1e-6:
        return []
    return [f"LayerNorm's epsilon is {eps:g}: build torchvision's model with norm_layer=partial(nn.LayerNorm, eps={eps:g})"]


def names_of(depth: int) -> dict[str, str]:
    """Return torchvision's name for each of ours."""
    blocks = {
        f"blocks.{number}.{own}": f"{LAYER}{number}.{theirs}" for number in range(depth) for own, theirs in BLOCK_NAMES.items()
    }
    return {**NAMES, **blocks}
