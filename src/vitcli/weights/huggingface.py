"""Hugging Face's ViT, DeiT, hybrid ViT and BiT: read from a folder or a file, and written as a folder it loads.

On disk the names are those of transformers 4 (`encoder.layer.N.attention.attention.query`) in every version; the names that
version 5 has in memory are read too. A DeiT's distillation token that no head reads is a register, and so is read and written
exactly. config.json beside the weights says what no tensor does (heads, activation, epsilon, class names),
preprocessor_config.json how images are prepared. Sources: transformers' models vit, deit, bit and vit_hybrid, and
image_processing_*.py.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.model_config import HEADS, ModelConfig
from vitcli.pretrained import Pretrained
from vitcli.weights.files import RawWeights
from vitcli.weights.layout import (
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

__all__ = [
    "export_huggingface",
    "huggingface_config",
    "huggingface_differences",
    "huggingface_preprocessor",
    "is_huggingface",
    "read_huggingface",
]

PREFIX = re.compile(r"^(?:vit|deit|vit_hybrid)\.(?=embeddings\.|encoder\.|layers\.|layernorm\.|pooler\.)")
# names of transformers 5 in memory, and of a distilled DeiT's head, as a ViT's are on disk
ON_DISK = (
    (r"^layers\.", "encoder.layer."),
    (r"^(encoder\.layer\.\d+\.attention)\.q_proj\.", r"\1.attention.query."),
    (r"^(encoder\.layer\.\d+\.attention)\.k_proj\.", r"\1.attention.key."),
    (r"^(encoder\.layer\.\d+\.attention)\.v_proj\.", r"\1.attention.value."),
    (r"^(encoder\.layer\.\d+\.attention)\.o_proj\.", r"\1.output.dense."),
    (r"^(encoder\.layer\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"^(encoder\.layer\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
    (r"^cls_classifier\.", "classifier."),
)
# ours, and theirs that make it up; both have a weight and a bias
LAYERS = {
    "patch_embed.proj": ["embeddings.patch_embeddings.projection"],
    "norm": ["layernorm"],
    "pre_logits": ["pooler.dense"],
    "head": ["classifier"],
    "head_dist": ["distillation_classifier"],
}
BLOCK_LAYERS = {
    "norm1": ["layernorm_before"],
    "attn.qkv": [f"attention.attention.{part}" for part in ("query", "key", "value")],
    "attn.proj": ["attention.output.dense"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["intermediate.dense"],
    "mlp.fc2": ["output.dense"],
}
STEM, THEIR_STEM = "patch_embed.backbone.", "embeddings.patch_embeddings.backbone."
FROM_BIT = (
    (r"^bit\.", ""),
    (r"^embedder\.convolution\.", "stem.conv."),
    (r"^embedder\.norm\.", "stem.norm."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^classifier\.1\.", "head."),
)
TO_BIT = (
    (r"^stem\.conv\.", "bit.embedder.convolution."),
    (r"^stem\.norm\.", "bit.embedder.norm."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"bit.encoder.stages.\1.layers.\2."),
    (r"^norm\.", "bit.norm."),
    (r"^head\.", "classifier.1."),
)
ACTIVATIONS = {"gelu": "exact", "gelu_python": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}
LAYER_NORM_EPS = 1e-12  # where no config says so
GROUP_NORM_EPS = 1e-5  # which no config says
ASSUMED_SIDE = 224  # px, of a BiT's images: its config does not say
BILINEAR = 2  # PIL's number of it


def is_huggingface(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors have Hugging Face's names of a ViT, DeiT, hybrid or BiT."""
    names = {PREFIX.sub("", name) for name in tensors}
    return {"embeddings.cls_token", "embeddings.patch_embeddings.projection.weight"} <= names or is_bit(names)


def is_bit(names: Iterable[str]) -> bool:
    return any(name.removeprefix("bit.") == "embedder.convolution.weight" for name in names)


def read_huggingface(raw: RawWeights, path: Path) -> Pretrained:
    """Turn Hugging Face's tensors into ours, with what the JSON files beside them say.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape, or the model is one that ours cannot be.
    """
    said = json_beside(path, "config.json")
    if "architecture" in said:  # timm's
        said = {}
    tensors = {replaced(PREFIX.sub("", name), ON_DISK): tensor for name, tensor in raw.tensors.items()}
    if len(tensors) < len(raw.tensors):
        raise CheckpointError(f"{path}: some tensor is there by two names")
    notes: list[str] = []
    return (read_bit if is_bit(tensors) else read_vit)(raw, path, tensors, said, notes)


def replaced(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    """Return a name after all replacements, in order."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def names_of(depth: int, *, distilled: bool) -> dict[str, list[str]]:
    """Return Hugging Face's names on disk, without the model's prefix, of each tensor of ours; three are a `qkv`.

    Args:
        distilled: whether a head reads the distillation token, which is a register else.
    """
    layers = LAYERS | {
        f"blocks.{number}.{own}": [f"encoder.layer.{number}.{part}" for part in theirs]
        for number in range(depth)
        for own, theirs in BLOCK_LAYERS.items()
    }
    return {
        "cls_token": ["embeddings.cls_token"],
        "dist_token" if distilled else "reg_token": ["embeddings.distillation_token"],
        "pos_embed": ["embeddings.position_embeddings"],
        **{
            f"{own}.{leaf}": [f"{part}.{leaf}" for part in theirs]
            for own, theirs in layers.items()
            for leaf in ("weight", "bias")
        },
    }


def read_vit(raw: RawWeights, path: Path, tensors: dict[str, Tensor], said: dict[str, Any], notes: list[str]) -> Pretrained:
    """Read a ViT, DeiT or hybrid."""
    if not said:
        notes.append("no config.json beside the file: took Hugging Face's defaults, an exact GELU and an epsilon of 1e-12")
    if tensors.pop("embeddings.mask_token", None) is not None:
        notes.append("left out the mask token, which is for pretraining alone")
    distilled = {"classifier.weight", "distillation_classifier.weight", "embeddings.distillation_token"} <= tensors.keys()
    if not distilled and tensors.pop("distillation_classifier.weight", None) is not None:
        tensors.pop("distillation_classifier.bias", None)
        notes.append(
            "a DeiT without the class token's head: its distillation token is kept, as a register, and the head on it left out"
        )
    depth = blocks_in(tensors, "encoder.layer.")
    names = names_of(depth, distilled=distilled)
    state = {}
    for own, theirs in names.items():
        parts = [tensors[name] for name in theirs if name in tensors]
        if len(parts) == len(theirs) and all(part.ndim and part.shape == parts[0].shape for part in parts):
            state[own] = parts[0] if len(parts) == 1 else torch.cat(parts)
            tensors = {name: tensor for name, tensor in tensors.items() if name not in theirs}
    for name in [name for name in tensors if name.startswith(THEIR_STEM)]:
        state[STEM + replaced(name.removeprefix(THEIR_STEM), FROM_BIT)] = tensors.pop(name)

    patch = state["patch_embed.proj.weight"]
    patch_size, width = square_patch(patch, path), len(patch)
    mlp_dim = rows_of(state.get("blocks.0.mlp.fc1.weight"))
    heads, activation, eps = said.get("num_attention_heads"), said.get("hidden_act", "gelu"), said.get("layer_norm_eps")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"{path}: its activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    section: dict[str, Any] = {
        "patch_size": patch_size,
        "width": width,
        "depth": max(1, depth),
        "mlp_dim": mlp_dim,
        "num_heads": heads if type(heads) is int else heads_of(width, depth, mlp_dim, notes, path),
        "representation_size": rows_of(state["pre_logits.weight"]) if "pre_logits.weight" in state else None,
        "distill_token": distilled,
        "gelu": ACTIVATIONS[activation],
        "layer_norm_eps": eps if isinstance(eps, float) else LAYER_NORM_EPS,
    }
    if "pre_logits.weight" in state and said.get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(f"{path}: its pooler's activation is {said['pooler_act']!r}, expected tanh")
    if said.get("qkv_bias") is False:
        state |= {f"blocks.{number}.attn.qkv.bias": patch.new_zeros(3 * width) for number in range(depth)}
        notes.append("its queries, keys and values have no bias: zeros stand for it")
    if f"{STEM}stem.conv.weight" in state:
        check_bit(
            {"layer_type": "bottleneck", "global_padding": "same", **mapping_in(said, "backbone_config")}, path, hybrid=True
        )
        section |= resnet_section(state, STEM)

    if "reg_token" in state and "pos_embed" in state:
        section["registers"] = 1
        positions = state["pos_embed"]
        if tokens_in(positions, path) > 2 and state["reg_token"].shape == positions[:, 1:2].shape:
            # What nobody reads and has a position is a register, and their sum its value.
            state["reg_token"] = state["reg_token"].float() + positions[:, 1:2].float()
            state["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    patches = tokens_in(state["pos_embed"], path) - 1 - int(distilled) if "pos_embed" in state else 0
    image_size = grid_of(patches, [pair_of(said.get("image_size"))], stride_of(section), path)
    return assemble(
        raw,
        path,
        state=state | tensors,
        section=section,
        preprocessing={"image_size": list(image_size), **preprocessing_of(path, image_size, notes)},
        classes=class_names(said),
        layout="Hugging Face",
        source=source_of(said),
        notes=notes,
    )


def read_bit(raw: RawWeights, path: Path, tensors: dict[str, Tensor], said: dict[str, Any], notes: list[str]) -> Pretrained:
    """Read a BiT ResNet."""
    check_bit(said, path, hybrid=False)
    state = {replaced(name, FROM_BIT): tensor for name, tensor in tensors.items()}
    processor = json_beside(path, "preprocessor_config.json")
    size = size_in(processor, "crop_size") or size_in(processor, "size")
    if size is None:
        size = (ASSUMED_SIDE, ASSUMED_SIDE)
        notes.append(f"nothing says its image size: took {ASSUMED_SIDE} px")
    return assemble(
        raw,
        path,
        state=state,
        section={"kind": "resnet", **resnet_section(state, "")},
        preprocessing={"image_size": list(size), **preprocessing_of(path, size, notes)},
        classes=class_names(said),
        layout="Hugging Face",
        source=source_of(said),
        notes=notes,
    )


def check_bit(said: Mapping[str, Any], path: Path, *, hybrid: bool) -> None:
    """Raise CheckpointError where a BiT's config says that it computes otherwise than ours."""
    expected = {
        "layer_type": "bottleneck" if hybrid else "preactivation",
        "global_padding": "SAME" if hybrid else None,
        "embedding_dynamic_padding": hybrid,
        "num_groups": 32,
        "hidden_act": "relu",
    }
    for key, value in expected.items():
        found = said.get(key, value)
        if (found.upper() if key == "global_padding" and isinstance(found, str) else found) != value:
            raise CheckpointError(f"{path}: its ResNet has {key} {found!r}, expected {value!r}")
    stride, stages = said.get("output_stride", 32), len(sequence_in(said, "depths")) or 4
    if type(stride) is not int or stride < 2 ** (stages + 1):
        raise CheckpointError(
            f"{path}: its ResNet has output_stride {stride!r}, so its last blocks are dilated, and ours are not"
        )


def resnet_section(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Return the settings of a ResNet, by its tensors; numerics are Hugging Face's, which has timm's."""
    conv = state[f"{prefix}stem.conv.weight"]
    stages = blocks_in(state, f"{prefix}stages.")
    return {
        "resnet_units": [blocks_in(state, f"{prefix}stages.{stage}.blocks.") for stage in range(stages)],
        "resnet_width": rows_of(conv),
        "weight_standardisation": "timm",
        "group_norm_eps": GROUP_NORM_EPS,
    }


# ---------------------------------------------------------------------------------------------------------- what is said


def source_of(said: Mapping[str, Any]) -> str | None:
    """Return the name a config gives its model."""
    name = said.get("_name_or_path")
    return name if isinstance(name, str) and name else None


def size_in(processor: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Return a size from a processor's config: a number, height and width, or the shortest edge."""
    size = processor.get(key)
    if isinstance(size, dict):
        size = size["shortest_edge"] if "shortest_edge" in size else [size.get("height"), size.get("width")]
    return pair_of(size)


def class_names(said: Mapping[str, Any]) -> list[str] | None:
    """Return the class names of a config; None where they are the placeholders LABEL_0, LABEL_1, ... or numbers."""
    names = mapping_in(said, "id2label")
    listed = [names.get(str(number)) for number in range(len(names))]
    if not listed or not all(isinstance(name, str) for name in listed):
        return None
    if all(name in (f"LABEL_{number}", str(number)) for number, name in enumerate(listed)):
        return None
    return [str(name) for name in listed]


def preprocessing_of(path: Path, image_size: tuple[int, int], notes: list[str]) -> dict[str, Any]:
    """Return mean, std and crop fraction of a preprocessor_config.json; without one, images in [-1, 1], whole, and a note."""
    processor = json_beside(path, "preprocessor_config.json")
    if not processor:
        notes.append(
            "no preprocessor_config.json beside the file: took mean and std 0.5 (images in [-1, 1]) and the whole image; "
            "put the model's there if it was trained otherwise"
        )
        return {"mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop_fraction": None}
    mean, std = processor.get("image_mean", [0.5] * 3), processor.get("image_std", [0.5] * 3)
    if processor.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    numbers = [*mean, *std, factor] if isinstance(mean, list) and isinstance(std, list) else []
    if len(numbers) != 7 or not all(isinstance(value, int | float) for value in numbers) or 0 in (*std, factor):
        raise CheckpointError(f"{path}: preprocessor_config.json beside it has no three numbers as image_mean and image_std")
    scale = 1.0 if abs(255 * factor - 1) < 1e-6 else 255 * factor  # (factor x - mean) / std in terms of x / 255
    share = None
    whole, cropped = size_in(processor, "size"), size_in(processor, "crop_size")
    if processor.get("do_center_crop") and whole and cropped and cropped[0] <= whole[0]:
        share = cropped[0] / whole[0]
    elif "shortest_edge" in mapping_in(processor, "size"):
        share = 1.0
    if processor.get("resample", BILINEAR) != BILINEAR:
        notes.append("its images were resized by another interpolation than the bilinear one used here")
    return {
        "mean": [value / scale for value in mean],
        "std": [value / scale for value in std],
        "eval_crop_fraction": share,
    }


# --------------------------------------------------------------------------------------------------------------- writing


def check(pretrained: Pretrained) -> ModelConfig:
    """Return the model section of weights that Hugging Face has a model for.

    Raises:
        CheckpointError: it has none.
    """
    model = model_of(pretrained)
    height, width = pretrained.preprocessing["image_size"]
    share = pretrained.preprocessing["eval_crop_fraction"]
    refuse("Hugging Face", only_ours(pretrained))
    reasons = [
        None if "head.weight" in pretrained.state else "classifier without a head",
        "crop of images that are no squares" if share is not None and height != width else None,
    ]
    if model.kind == "resnet":
        reasons.append("BiT with a 3x3 root" if model.resnet_root != "large" else None)
    else:
        reasons += [
            *unusual(model),
            "ResNet before the Transformer" if model.resnet_units is not None else None,
            "head but on a class token" if model.pool != "token" else None,
            "registers (but for one, a DeiT's)" if model.registers + model.distill_token > 1 else None,
            "LayerScale" if model.layer_scale else None,
            "norm of queries and keys" if model.qk_norm else None,
            "hidden layer before the head (pre_logits)" if model.representation_size else None,
        ]
    refuse("Hugging Face", reasons)
    return model


def export_huggingface(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the tensors of the Hugging Face model that `huggingface_config` describes, by their names on disk.

    Raises:
        CheckpointError: Hugging Face has no such model.
    """
    model = check(pretrained)
    state = dict(pretrained.state)
    if model.kind == "resnet":
        return {replaced(name, TO_BIT): tensor.contiguous() for name, tensor in state.items()}
    height, width = pretrained.preprocessing["image_size"]
    patches = height * width // (model.patch_size or 1) ** 2
    positions = positions_of(pretrained)
    if positions is None:
        positions = state["cls_token"].new_zeros(1, 1 + int(model.distill_token) + patches, model.width or 1)
    if model.registers:
        positions = torch.cat([positions[:, :1], torch.zeros_like(positions[:, :1]), positions[:, 1:]], dim=1)
    state["pos_embed"] = positions
    prefix = "deit." if model.registers or model.distill_token else "vit."
    result = {}
    for own, theirs in names_of(model.depth or 0, distilled=model.distill_token).items():
        if own in state:
            for name, part in zip(theirs, state[own].chunk(len(theirs)), strict=True):
                is_head = own.partition(".")[0] in HEADS
                name = f"cls_{name}" if model.distill_token and own.startswith("head.") else name
                result[name if is_head else prefix + name] = part.contiguous()
    return result


def huggingface_config(pretrained: Pretrained) -> dict[str, Any]:
    """Return the config.json with which `AutoModelForImageClassification.from_pretrained` loads the exported tensors.

    Raises:
        CheckpointError: Hugging Face has no such model.
    """
    model = check(pretrained)
    classes = list(pretrained.classes)
    labels = {
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        "num_channels": 3,
        "dtype": "float32",
    }
    if model.kind == "resnet":
        width, units = model.resnet_width or 64, model.resnet_units or ()
        return {
            "architectures": ["BitForImageClassification"],
            "model_type": "bit",
            "embedding_size": width,
            "hidden_sizes": [4 * width * 2**stage for stage in range(len(units))],
            "depths": list(units),
            "layer_type": "preactivation",
            "global_padding": None,
            "embedding_dynamic_padding": False,
            "num_groups": 32,
            "hidden_act": "relu",
            "output_stride": 2 ** (len(units) + 1),
            "width_factor": 1,
            **labels,
        }
    height, width = pretrained.preprocessing["image_size"]
    kind = "DeiT" if model.registers or model.distill_token else "ViT"
    return {
        "architectures": [f"{kind}ForImageClassification{'WithTeacher' if model.distill_token else ''}"],
        "model_type": kind.lower(),
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": "gelu_pytorch_tanh" if model.gelu == "tanh" else "gelu",
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "layer_norm_eps": model.layer_norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "qkv_bias": True,
        **labels,
    }


def huggingface_preprocessor(pretrained: Pretrained) -> dict[str, Any]:
    """Return the preprocessor_config.json with which Hugging Face prepares images as these weights expect them.

    Raises:
        CheckpointError: Hugging Face has no such model.
    """
    check(pretrained)
    preprocessing = pretrained.preprocessing
    height, width = preprocessing["image_size"]
    share = preprocessing["eval_crop_fraction"]
    resized: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    if share is not None:
        resized = {
            "image_processor_type": "BitImageProcessor",  # ViT's crops nothing in old versions
            "size": {"shortest_edge": round(height / share)},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_convert_rgb": True,
        }
    return {
        **resized,
        "do_resize": True,
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
    }


def huggingface_differences(pretrained: Pretrained) -> list[str]:
    """Return what Hugging Face's model does a little otherwise, and cannot be told."""
    model = model_of(pretrained)
    if model.kind != "resnet":
        return []
    found = []
    eps = model.group_norm_eps or 1e-5
    if eps != GROUP_NORM_EPS:
        found.append(f"GroupNorm's epsilon is {GROUP_NORM_EPS:g} in Hugging Face's BiT, not {eps:g}")
    if model.weight_standardisation != "timm":
        found.append("kernels are divided by sqrt(var + 1e-8) in Hugging Face's BiT, not by sqrt(var + 1e-10)")
    return found
