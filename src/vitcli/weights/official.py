"""The authors' .npz files of ViT, AugReg, hybrids and BiT: every generation of names read, the original one written.

Names of all generations are first rewritten to the original one; then one table, made from the architecture, says which leaves
each of our tensors is made of, and serves both ways. Architecture, image size and number of heads come from the shapes.
Sources: google-research/vision_transformer, big_vision (`fix_old_checkpoints`), flax (`convert_pre_linen`), big_transfer.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.model_config import ModelConfig, model_problem, resolve_model, stem_stride
from vitcli.models import build_model
from vitcli.pretrained import Pretrained
from vitcli.weights.files import RawWeights
from vitcli.weights.layout import only_ours, refuse
from vitcli.weights.load import in_a_line, listed

__all__ = ["is_official", "official_problem", "read_official", "write_official"]

ASSUMED_SIDE = 224  # px, where nothing in a file tells
PREFIXES = ("", "opt/target/", "params/img/", "params/", "target/")  # before every leaf: optimisers', SigLIP's, big_vision's
MHA = "MultiHeadDotProductAttention"
POSITIONS = "Transformer/posembed_input/pos_embedding"
ROOT, TF_CONV = "resnet/root_block/standardized_conv2d/kernel", "standardized_conv2d"
ANCHORS = ("embedding/kernel", ROOT, "root_block/conv_root/kernel")  # one of these is in every file, behind the prefix
NUMBERED = re.compile(r"(standardized_conv2d|group_norm|conv2d)_\d+/")  # as TensorFlow counts them in some files

# From later names to the original ones. Old code counts all sub-modules of a block together (LayerNorm_0, Attention_1,
# LayerNorm_2, MlpBlock_3), Linen each kind for itself.
RENAMES = (
    (re.compile(rf"(Transformer/encoderblock_\d+)/{MHA}_0/"), rf"\1/{MHA}_1/"),
    (re.compile(r"(Transformer/encoderblock_\d+)/LayerNorm_1/"), r"\1/LayerNorm_2/"),
    (re.compile(r"(Transformer/encoderblock_\d+)/MlpBlock_0/"), r"\1/MlpBlock_3/"),
    (re.compile(r"(?:Transformer/)?pos_embedding$"), POSITIONS),
    (re.compile(rf"(probe$|{MHA}_0/|LayerNorm_0/|MlpBlock_0/)"), r"MAPHead_0/\1"),
    (re.compile(r"(block\d+/unit)0+"), r"\1"),
)
# big_vision's names of a BiT ResNet, in which a unit's parts are numbered and TensorFlow's are lettered
BIT_RENAMES = (
    (re.compile(r"root_block/conv_root/kernel$"), ROOT),
    (re.compile(r"norm-pre-head/scale$"), "resnet/group_norm/gamma"),
    (re.compile(r"norm-pre-head/bias$"), "resnet/group_norm/beta"),
    (re.compile(r"head/"), "resnet/head/conv2d/"),
    *((re.compile(rf"(block\d+/unit\d+)/conv{n}/"), rf"resnet/\1/{letter}/{TF_CONV}/") for n, letter in zip("123", "abc")),
    *(
        (re.compile(rf"(block\d+/unit\d+)/gn{n}/scale"), rf"resnet/\1/{letter}/group_norm/gamma")
        for n, letter in zip("123", "abc")
    ),
    *(
        (re.compile(rf"(block\d+/unit\d+)/gn{n}/bias"), rf"resnet/\1/{letter}/group_norm/beta")
        for n, letter in zip("123", "abc")
    ),
    (re.compile(r"(block\d+/unit\d+)/conv_proj/"), rf"resnet/\1/a/proj/{TF_CONV}/"),
)


@dataclass(frozen=True)
class Leaf:
    """How one of our tensors lies in a file: as which arrays, and turned how."""

    ours: str
    theirs: tuple[str, ...]  # q, k and v are one tensor here
    turned: Literal["same", "dense", "conv", "norm", "norm4", "conv_head", "to_heads", "to_heads_bias", "from_heads"]


# ---------------------------------------------------------------- names


def is_official(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether these are the names of one of the authors' files."""
    return prefix_of(tensors) is not None


def prefix_of(names: Iterable[str]) -> str | None:
    plain = {NUMBERED.sub(r"\1/", name) for name in names}
    return next((prefix for prefix in PREFIXES for anchor in ANCHORS if prefix + anchor in plain), None)


def original_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the model's leaves by their original names, and the names of what else the file holds.

    Raises:
        ValueError: two leaves are the same one, or those in scan layout differ in depth.
    """
    prefix = prefix_of(tensors)
    assert prefix is not None
    # behind a prefix anything else is another part: an optimizer's state, a text tower
    others = [name for name in tensors if not name.startswith(prefix) or (not prefix and name.startswith(("opt/", "state/")))]
    tensors = {NUMBERED.sub(r"\1/", name.removeprefix(prefix)): t for name, t in tensors.items() if name not in set(others)}
    native_bit = "root_block/conv_root/kernel" in tensors
    leaves: dict[str, Tensor] = {}
    for name, tensor in unscanned(tensors):
        for pattern, replacement in BIT_RENAMES if native_bit else RENAMES:
            if pattern.match(name):
                name = pattern.sub(replacement, name, count=1)
                break
        if name.startswith("resnet/"):  # unit1 and unit01 alike
            name = re.sub(r"/unit0*(\d+)/", lambda found: f"/unit{int(found[1]):02d}/", name)
        if name in leaves:
            raise ValueError(f"it holds {name} twice, by names of two generations")
        leaves[name] = tensor
    return leaves, others


def unscanned(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield all leaves, those of the scan layout, whose first axis is the depth, one by one."""
    scan = "Transformer/encoderblock/"
    depths = {tensor.shape[0] if tensor.ndim else 0 for name, tensor in tensors.items() if name.startswith(scan)}
    if len(depths) > 1 or 0 in depths:
        raise ValueError(f"its leaves in scan layout have depths {sorted(depths)}; expected one")
    for name, tensor in tensors.items():
        if name.startswith(scan):
            for block, part in enumerate(tensor):
                yield f"Transformer/encoderblock_{block}/{name.removeprefix(scan)}", part
        else:
            yield name, tensor


def leaves_of(model: ModelConfig, *, has_head: bool = True) -> Iterator[Leaf]:
    """Yield how every tensor of a resolved section's model lies in a file of the original naming."""
    if model.kind == "resnet":
        yield from leaves_of_bit(model, has_head=has_head)
        return
    if model.resnet_units is not None:
        yield from leaves_of_stem(model.resnet_units)
    yield from layer("patch_embed.proj", "embedding", "conv")
    if model.pool == "token":
        yield Leaf("cls_token", ("cls",), "same")
    if model.pos_embed == "learned":
        yield Leaf("pos_embed", (POSITIONS,), "same")
    assert model.depth is not None
    for block in range(model.depth):
        ours, theirs = f"blocks.{block}", f"Transformer/encoderblock_{block}"
        yield from norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0")
        yield from heads(f"{ours}.attn.qkv", f"{theirs}/{MHA}_1", ("query", "key", "value"))
        yield from layer(f"{ours}.attn.proj", f"{theirs}/{MHA}_1/out", "from_heads")
        yield from norm(f"{ours}.norm2", f"{theirs}/LayerNorm_2")
        for number in (0, 1):
            yield from layer(f"{ours}.mlp.fc{number + 1}", f"{theirs}/MlpBlock_3/Dense_{number}", "dense")
    yield from norm("norm", "Transformer/encoder_norm")
    if model.pool == "map":
        yield Leaf("attn_pool.latent", ("MAPHead_0/probe",), "same")
        yield from heads("attn_pool.q", f"MAPHead_0/{MHA}_0", ("query",))
        yield from heads("attn_pool.kv", f"MAPHead_0/{MHA}_0", ("key", "value"))
        yield from layer("attn_pool.proj", f"MAPHead_0/{MHA}_0/out", "from_heads")
        yield from norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        for number in (0, 1):
            yield from layer(f"attn_pool.mlp.fc{number + 1}", f"MAPHead_0/MlpBlock_0/Dense_{number}", "dense")
    if model.representation_size is not None:
        yield from layer("pre_logits", "pre_logits", "dense")
    if has_head:
        yield from layer("head", "head", "dense")


def leaves_of_stem(units: tuple[int, ...]) -> Iterator[Leaf]:
    stem = "patch_embed.backbone"
    yield Leaf(f"{stem}.stem.conv.weight", ("conv_root/kernel",), "conv")
    yield from norm(f"{stem}.stem.norm", "gn_root", "norm4")
    for stage, count in enumerate(units):
        for unit in range(count):
            ours, theirs = f"{stem}.stages.{stage}.blocks.{unit}", f"block{stage + 1}/unit{unit + 1}"
            for number in (1, 2, 3):
                yield Leaf(f"{ours}.conv{number}.weight", (f"{theirs}/conv{number}/kernel",), "conv")
                yield from norm(f"{ours}.norm{number}", f"{theirs}/gn{number}", "norm4")
            if unit == 0:
                yield Leaf(f"{ours}.downsample.conv.weight", (f"{theirs}/conv_proj/kernel",), "conv")
                yield from norm(f"{ours}.downsample.norm", f"{theirs}/gn_proj", "norm4")


def leaves_of_bit(model: ModelConfig, *, has_head: bool) -> Iterator[Leaf]:
    yield Leaf("stem.conv.weight", (ROOT,), "conv")
    for stage, count in enumerate(model.resnet_units or ()):
        for unit in range(count):
            ours, theirs = f"stages.{stage}.blocks.{unit}", f"resnet/block{stage + 1}/unit{unit + 1:02d}"
            for number, letter in zip((1, 2, 3), "abc"):
                yield Leaf(f"{ours}.conv{number}.weight", (f"{theirs}/{letter}/{TF_CONV}/kernel",), "conv")
                yield Leaf(f"{ours}.norm{number}.weight", (f"{theirs}/{letter}/group_norm/gamma",), "norm")
                yield Leaf(f"{ours}.norm{number}.bias", (f"{theirs}/{letter}/group_norm/beta",), "norm")
            if unit == 0:
                yield Leaf(f"{ours}.downsample.conv.weight", (f"{theirs}/a/proj/{TF_CONV}/kernel",), "conv")
    yield Leaf("norm.weight", ("resnet/group_norm/gamma",), "norm")
    yield Leaf("norm.bias", ("resnet/group_norm/beta",), "norm")
    if has_head:
        yield from layer("head", "resnet/head/conv2d", "conv_head")


def layer(ours: str, theirs: str, turned: Literal["dense", "conv", "conv_head", "from_heads"]) -> Iterator[Leaf]:
    yield Leaf(f"{ours}.weight", (f"{theirs}/kernel",), turned)
    yield Leaf(f"{ours}.bias", (f"{theirs}/bias",), "same")


def norm(ours: str, theirs: str, turned: Literal["norm", "norm4"] = "norm") -> Iterator[Leaf]:
    yield Leaf(f"{ours}.weight", (f"{theirs}/scale",), turned)
    yield Leaf(f"{ours}.bias", (f"{theirs}/bias",), turned)


def heads(ours: str, theirs: str, parts: tuple[str, ...]) -> Iterator[Leaf]:
    yield Leaf(f"{ours}.weight", tuple(f"{theirs}/{part}/kernel" for part in parts), "to_heads")
    yield Leaf(f"{ours}.bias", tuple(f"{theirs}/{part}/bias" for part in parts), "to_heads_bias")


# ---------------------------------------------------------------- axes


def to_theirs(leaf: Leaf, tensor: Tensor, num_heads: int) -> list[Tensor]:
    """Turn one of our tensors into the arrays it lies as in a file, H heads of E channels."""
    if leaf.turned == "dense":
        return [tensor.T]
    if leaf.turned == "conv":
        return [tensor.permute(2, 3, 1, 0)]
    if leaf.turned == "norm4":
        return [tensor.reshape(1, 1, 1, -1)]
    if leaf.turned == "conv_head":
        return [tensor.T[None, None]]
    if leaf.turned == "to_heads":  # (k D, D) to k times (D, H, E)
        return [part.T.unflatten(1, (num_heads, -1)) for part in tensor.chunk(len(leaf.theirs))]
    if leaf.turned == "to_heads_bias":
        return [part.unflatten(0, (num_heads, -1)) for part in tensor.chunk(len(leaf.theirs))]
    if leaf.turned == "from_heads":  # (D, D) to (H, E, D)
        return [tensor.T.unflatten(0, (num_heads, -1))]
    return [tensor]


def to_ours(leaf: Leaf, arrays: list[Tensor]) -> Tensor:
    """Undo `to_theirs`; arrays of the shapes it gives, or norms and heads with fewer axes of length 1."""
    array = arrays[0]
    if leaf.turned in ("norm", "norm4"):
        return array.reshape(-1)
    if leaf.turned in ("dense", "conv_head"):
        return array.reshape(-1, array.shape[-1]).T.contiguous()
    if leaf.turned == "conv":
        return array.permute(3, 2, 0, 1).contiguous()
    if leaf.turned == "to_heads":
        return torch.cat([part.flatten(1).T for part in arrays])
    if leaf.turned == "to_heads_bias":
        return torch.cat([part.flatten() for part in arrays])
    if leaf.turned == "from_heads":
        return array.flatten(0, 1).T.contiguous()
    return array


def unpadded(leaf: Leaf, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the axes of length 1 that some generations store and others do not."""
    if leaf.turned in ("norm", "norm4", "conv_head"):
        while len(shape) > (2 if leaf.turned == "conv_head" else 1) and shape[0] == 1:
            shape = shape[1:]
    return shape


# ---------------------------------------------------------------- reading


def read_official(raw: RawWeights, path: Path) -> Pretrained:
    """Read one of the authors' files, whatever its generation, with its hidden layer before the head where it has one.

    Raises:
        CheckpointError: leaves are missing, left over or of shapes that do not belong together; names them.
    """
    try:
        leaves, others = original_names(raw.tensors)
        model, image_size, notes = architecture_of(leaves)
        has_head = any(name.startswith(("head/", "resnet/head/")) for name in leaves)
        if model.kind == "vit" and model.pool == "token" and model.pos_embed == "learned":
            leaves = with_class_position(leaves)
        bias = "resnet/head/conv2d/bias" if model.kind == "resnet" else "head/bias"
        num_classes = axes(leaves, bias, 1)[0] if has_head else 0
        state = state_of(leaves, model, image_size=image_size, num_classes=num_classes)
    except (ValueError, LookupError) as error:
        reason = f"it has no {error.args[0]}" if isinstance(error, KeyError) else in_a_line(error)
        raise CheckpointError(f"{path}: looks like one of the authors' .npz files, but {reason}") from None
    if others:
        notes.append(f"{len(others)} arrays of other parts left out: {listed(sorted(others))}")
    if not has_head:
        notes.append("the file has no head: features only, until a fine-tuning gives it one")
    return Pretrained(
        state=state,
        model=model.model_dump(mode="json"),
        classes=[str(number) for number in range(num_classes)],
        preprocessing={"image_size": list(image_size), "mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop_fraction": None},
        source_path=path,
        step=0,
        is_ema=False,
        manifest={"source": None, "seed": 0, "format": "official npz"},
        named=False,
        notes=notes,
    )


def architecture_of(leaves: Mapping[str, Tensor]) -> tuple[ModelConfig, tuple[int, int], list[str]]:
    """Return the resolved model section, the image size (H, W) and what had to be assumed.

    Raises:
        KeyError: a leaf that tells is not there.
        ValueError: shapes say no architecture.
    """
    if ROOT in leaves:
        root = axes(leaves, ROOT, 4)
        model = ModelConfig(kind="resnet", resnet_units=count_units(leaves, "resnet/block"), **root_of(root))
        side = ASSUMED_SIDE
        return resolve_model(model), (side, side), [f"a ResNet's file says no image size: {side} px assumed (data.image_size)"]
    notes: list[str] = []
    embedding = axes(leaves, "embedding/kernel", 4)
    query = axes(leaves, f"Transformer/encoderblock_0/{MHA}_1/query/kernel", 3)
    depth = 1 + max(int(match[1]) for name in leaves if (match := re.match(r"Transformer/encoderblock_(\d+)/", name)))
    pool = "map" if "MAPHead_0/probe" in leaves else "token" if "cls" in leaves else "gap"
    stem = {}
    if "conv_root/kernel" in leaves:
        stem = {"resnet_units": count_units(leaves, "block"), **root_of(axes(leaves, "conv_root/kernel", 4))}
    if embedding[0] != embedding[1]:
        raise ValueError(f"its patches are {embedding[0]} x {embedding[1]}; expected square ones")
    model = ModelConfig(
        kind="vit",
        patch_size=embedding[0],
        width=embedding[3],
        depth=depth,
        mlp_dim=axes(leaves, "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel", 2)[1],
        num_heads=query[1],
        representation_size=axes(leaves, "pre_logits/kernel", 2)[1] if "pre_logits/kernel" in leaves else None,
        pool=pool,
        pos_embed="learned" if POSITIONS in leaves else "sincos2d",
        **stem,
    )
    model = resolve_model(model)
    side = embedding[0] * stem_stride(model)
    if POSITIONS in leaves:
        rows = square_root_of_tokens(axes(leaves, POSITIONS, 3)[1], has_class="cls" in leaves)
        image_side = rows * side
    else:
        image_side = ASSUMED_SIDE // side * side or side
        notes.append(
            "no position embeddings in the file: fixed sin-cos ones assumed, "
            f"at {image_side} px (model.pos_embed, data.image_size)"
        )
    problem = model_problem(model, (image_side, image_side))
    if problem is not None:
        raise ValueError(f"{problem[0]} {problem[1]}")
    return model, (image_side, image_side), notes


def axes(leaves: Mapping[str, Tensor], name: str, count: int) -> tuple[int, ...]:
    """Return a leaf's shape, of that many axes."""
    shape = tuple(leaves[name].shape)
    if len(shape) != count or 0 in shape:
        raise ValueError(f"{name} has shape {shape}, expected {count} axes")
    return shape


def root_of(kernel: tuple[int, ...]) -> dict[str, Any]:
    if kernel[:2] not in ((7, 7), (3, 3)):
        raise ValueError(f"a ResNet's root is {kernel[0]} x {kernel[1]}; expected 7 x 7 or 3 x 3")
    return {"resnet_width": kernel[3], "resnet_root": "large" if kernel[0] == 7 else "small"}


def count_units(leaves: Mapping[str, Tensor], start: str) -> tuple[int, ...]:
    """Return how many units each block of a ResNet has."""
    found: dict[int, int] = {}
    for name in leaves:
        match = re.match(rf"{start}([1-9]\d{{0,3}})/unit0*([1-9]\d{{0,3}})/", name)
        if match:
            found[int(match[1])] = max(found.get(int(match[1]), 0), int(match[2]))
    if sorted(found) != list(range(1, len(found) + 1)):
        raise ValueError(f"a ResNet's blocks are {sorted(found)}; expected 1 to {max(found)}")
    return tuple(found[block] for block in sorted(found))


def square_root_of_tokens(tokens: int, *, has_class: bool) -> int:
    """Return the rows of a square grid of patches, whether or not the class token has a position among them."""
    for patches in (tokens - 1, tokens) if has_class else (tokens,):
        side = math.isqrt(patches)
        if side > 0 and side * side == patches:
            return side
    raise ValueError(f"{tokens} position embeddings are no square grid of patches; such a file does not say which")


def with_class_position(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the class token a position of zero where it has none, as big_vision, which adds positions before the token comes."""
    positions = leaves[POSITIONS]
    rows = square_root_of_tokens(positions.shape[1], has_class=True)
    if positions.shape[1] == rows * rows + 1:
        return leaves
    return {**leaves, POSITIONS: torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)}


def state_of(
    leaves: Mapping[str, Tensor], model: ModelConfig, *, image_size: tuple[int, int], num_classes: int
) -> dict[str, Tensor]:
    """Return our tensors; every leaf is used, once, and has the shape that the model asks for."""
    with torch.device("meta"):
        own = build_model(model, image_size=image_size, num_classes=num_classes or 1).state_dict()
    table = list(leaves_of(model, has_head=num_classes > 0))
    wanted = {theirs for leaf in table for theirs in leaf.theirs}
    reshaped = []
    for leaf in table:
        for name, expected in zip(leaf.theirs, to_theirs(leaf, own[leaf.ours], model.num_heads or 1)):
            shape, fitting = (tuple(leaves[name].shape) if name in leaves else None), tuple(expected.shape)
            if shape is not None and unpadded(leaf, shape) != unpadded(leaf, fitting):
                reshaped.append(f"{name} {shape} where {fitting} belongs")
    faults = (
        ("missing", sorted(wanted - leaves.keys())),
        ("unknown", sorted(leaves.keys() - wanted)),
        ("of another shape", reshaped),
    )
    if any(names for _, names in faults):
        raise ValueError("; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in faults if names))
    return {leaf.ours: to_ours(leaf, [leaves[name] for name in leaf.theirs]) for leaf in table}


# ---------------------------------------------------------------- writing


def official_problem(model: ModelConfig, image_size: tuple[int, int]) -> str | None:
    """Say why weights of a resolved section cannot be written so that a reader of the authors' files computes the same."""
    expected: dict[str, tuple[Any, ...]]
    if model.kind == "resnet":
        expected = {"weight_standardisation": ("auto", "bit"), "group_norm_eps": (None, 1e-5)}
    else:
        expected = {
            "pos_embed": ("learned", "sincos2d"),
            "pos_embed_at": ("stem",),
            "attention": ("full",),
            "distill_token": (False,),
            "registers": (0,),
            "layer_scale": (None,),
            "qk_norm": (False,),
            "gelu": ("tanh",),
            "layer_norm_eps": (1e-6,),
            "weight_standardisation": ("auto", "std"),
            "group_norm_eps": (None, 1e-6),
        }
        if model.pos_embed == "learned" and image_size[0] != image_size[1]:
            return f"an official .npz does not say which grid its positions are of, and this one is not square: {image_size} px"
    for key, values in expected.items():
        if getattr(model, key) not in values:
            means = " or ".join(str(value) for value in values if value is not None and value != "auto") or "none"
            return f"model.{key} is {getattr(model, key)}, and an official .npz always means {means}"
    return None


def write_official(pretrained: Pretrained, path: Path) -> None:
    """Write weights as the authors' .npz in the original naming, as float32; the file appears whole or not at all.

    Raises:
        CheckpointError: such a file cannot say what this model is, a tensor is missing, or the disk is full.
    """
    refuse("the authors' .npz", only_ours(pretrained))
    model = resolve_model(ModelConfig.model_validate(pretrained.model))
    height, width = pretrained.preprocessing["image_size"]
    problem = official_problem(model, (height, width))
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}; take another format")
    table = list(leaves_of(model, has_head="head.weight" in pretrained.state))
    differing = {leaf.ours for leaf in table} ^ pretrained.state.keys()
    if differing:
        raise CheckpointError(f"{path}: {listed(sorted(differing))}: not as the model's settings say, so it cannot be written")
    arrays: dict[str, Any] = {}
    for leaf in table:
        for name, tensor in zip(leaf.theirs, to_theirs(leaf, pretrained.state[leaf.ours].float(), model.num_heads or 1)):
            arrays[name] = tensor.contiguous().numpy()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
