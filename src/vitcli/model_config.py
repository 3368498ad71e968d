"""The `model` section: a Transformer, one after a ResNet stem, a ResNet, or an MLP; by a variant's name or by sizes."""

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from vitcli.section import Count, Fraction, Section, Size

__all__ = [
    *("HEADS", "RESNET_UNITS", "SIZES", "VARIANTS", "ModelConfig"),
    *("kept_patches", "model_problem", "parse_variant", "receptive_field", "resolve_model", "stem_stride"),
]

# name: (width, depth, mlp_dim, num_heads); ViT (2010.11929) Table 1, AugReg (2106.10270) and big_vision's decode_variant
VARIANTS = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}
# layers: units of each block; big_vision's bit.get_block_desc, and 14 as the smallest of the kind
RESNET_UNITS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
SIZES = ("patch_size", "width", "depth", "mlp_dim", "num_heads", "kind", "resnet_units", "resnet_width")  # a variant gives
HEADS = ("head", "head_dist")  # the layers that give logits; timm's names
# options that say nothing about another kind of model, with the value that leaves them out
TRANSFORMER_ONLY = (
    *("representation_size", "pool", "pos_embed", "pos_embed_at", "attention", "distill_token", "registers"),
    *("layer_scale", "qk_norm", "stochastic_depth", "patch_dropout", "dropout", "attention_dropout", "gelu", "layer_norm_eps"),
)
SHARED_BY_MLP = ("dropout", "gelu", "layer_norm_eps")
RESNET_ONLY = ("resnet_width", "resnet_root", "weight_standardisation", "group_norm_eps", "group_norm_groups")


class ModelConfig(Section):
    """The architecture: a variant by name, or explicit sizes; explicit sizes win over the variant's."""

    variant: str | None = Field(
        None,
        description="size and patch by name, such as B/16, R50+B/16 or R50x1; as an override it replaces a file's sizes",
    )
    kind: Literal["vit", "resnet", "mlp"] | None = Field(
        None,
        description="a Vision Transformer, or to compare with a BiT ResNet or an MLP on pixels; null is the variant's, or vit",
    )
    patch_size: Size | None = Field(
        None, description="side of a square patch, px, or of the stem's output where there is one; divides both sides"
    )
    width: Size | None = Field(None, description="hidden size D; a multiple of num_heads")
    depth: Annotated[int, Field(ge=1, le=1_000)] | None = Field(None, description="number of Transformer blocks")
    mlp_dim: Size | None = Field(None, description="hidden size of the MLP blocks; default 4 x width")
    num_heads: Size | None = Field(None, description="attention heads")
    resnet_units: Annotated[tuple[Annotated[int, Field(ge=1, le=1_000)], ...], Field(max_length=8)] | None = Field(
        None, description="units of each block of a ResNet, or of the stem before a Transformer; [] is a stem's root alone"
    )
    resnet_width: Size | None = Field(None, description="channels of a ResNet's root: 64 x its width factor; default 64")
    resnet_root: Literal["large", "small"] = Field(
        "large", description="7x7 convolution and pooling, a quarter of the sides; or one 3x3 convolution, for small images"
    )
    resnet_spatial_units: Annotated[tuple[Count, ...], Field(max_length=8)] | None = Field(
        None, description="how many units of each of a ResNet's blocks look at neighbours: 3x3 kernels, then 1x1; null for all"
    )
    weight_standardisation: Literal["auto", "std", "bit", "timm"] = Field(
        "auto",
        description="kernels divided by std + 1e-5 (auto for a stem), sqrt(var + 1e-10) (for a ResNet) or sqrt(var + 1e-8)",
    )
    group_norm_eps: Annotated[float, Field(gt=0)] | None = Field(
        None, description="epsilon of every GroupNorm; null takes 1e-5 in a ResNet and 1e-6 in a stem, as the originals"
    )
    group_norm_groups: Size = Field(32, description="groups of every GroupNorm; fewer for a ResNet narrower than 32 channels")
    representation_size: Size | Literal["width"] | None = Field(
        None, description="hidden tanh layer before the head at pretraining; 'width' as in the paper, null for none"
    )
    pool: Literal["token", "gap", "map"] = Field(
        "token", description="read the class token, average all patch tokens, or ask them with a learned query (MAP)"
    )
    pos_embed: Literal["none", "learned", "learned2d", "relative", "sincos2d"] = Field(
        "learned", description="learned 1-D or 2-D, relative, fixed 2-D sin-cos positions, or none (paper D.4)"
    )
    pos_embed_at: Literal["stem", "every_layer", "shared"] = Field(
        "stem", description="learned positions are added once, before every block anew, or the same ones before every block"
    )
    attention: Literal["full", "axial"] = Field(
        "full", description="among all tokens; or along rows, MLP, along columns, MLP (paper D.6)"
    )
    distill_token: bool = Field(
        False, description="a second class token with a head of its own, to learn from a teacher (DeiT, 2012.12877)"
    )
    registers: Annotated[int, Field(ge=0, le=1_000)] = Field(0, description="tokens without a patch or position (2309.16588)")
    layer_scale: Annotated[float, Field(gt=0)] | None = Field(
        None, description="initial factor of each branch, learned per channel (2103.17239); null for none"
    )
    qk_norm: bool = Field(False, description="LayerNorm on each head's queries and keys (2302.05442)")
    stochastic_depth: Fraction = Field(
        0.0, description="how often the last block's branches are left out in training; rises linearly from 0 at the first"
    )
    patch_dropout: Fraction = Field(0.0, description="share of the patches left out in training")
    dropout: Fraction = Field(0.0, description="after every dense layer but qkv, and after adding positions (paper B.1)")
    attention_dropout: Fraction = Field(0.0, description="on the attention weights")
    gelu: Literal["tanh", "exact"] = Field("tanh", description="the original uses the tanh approximation")
    layer_norm_eps: Annotated[float, Field(gt=0)] = Field(1e-6, description="epsilon of every LayerNorm")
    head_bias: float = Field(0.0, description="initial bias of the head; -10 in the ImageNet-21k runs with sigmoid loss")


def parse_variant(variant: str) -> dict[str, Any]:
    """Turn a name such as "B/16" into what it says: width, depth, mlp_dim, num_heads and patch_size.

    "R50+B/16", a Transformer after a ResNet stem, also gives resnet_units and resnet_width; its patch_size is the side on the
    stem's output, whose stride is 32, or 16 where the last of four blocks is folded into the third (paper 4.1, appendix B.1).
    "R+Ti/16" is the stem's root alone with patches of 8, as published, though they are then 32 px wide. "R50x1" is a ResNet.

    Raises:
        ValueError: the name is not of one of these forms, with known sizes.
    """
    match = re.fullmatch(r"R(\d+)x(\d+)", variant, re.ASCII)
    if match and int(match[1]) in RESNET_UNITS and 1 <= int(match[2]) <= 64:
        return {"kind": "resnet", "resnet_units": RESNET_UNITS[int(match[1])], "resnet_width": 64 * int(match[2])}
    match = re.fullmatch(r"(?:R(\d*)\+)?([A-Za-z]+[\w-]*)/(\d+)", variant, re.ASCII)
    sizes = VARIANTS.get(match[2]) if match else None
    patch_size = int(match[3]) if match and len(match[3]) < 7 else 0
    units: tuple[int, ...] | None = None
    if match and match[1] is not None and patch_size:
        units = RESNET_UNITS.get(int(match[1])) if match[1] else ()
        if not match[1]:
            patch_size = 8 if patch_size == 16 else 0
        elif units and patch_size == 16:
            units, patch_size = (*units[:2], units[2] + units[3]), 1
        else:
            patch_size = patch_size // 32 if patch_size % 32 == 0 else 0
        sizes = None if units is None else sizes
    if sizes is None or not patch_size:
        raise ValueError(
            f"{variant!r} is not a variant; expected NAME/PATCH such as B/16, with NAME one of {', '.join(VARIANTS)}; "
            "R50+B/16 with a ResNet stem, or R50x1 for a ResNet, with R14, R26, R50, R101, R152 or R200"
        )
    width, depth, mlp_dim, num_heads = sizes
    result = {"kind": "vit", "width": width, "depth": depth, "mlp_dim": mlp_dim, "num_heads": num_heads}
    stem = {} if units is None else {"resnet_units": units, "resnet_width": 64}
    return {**result, "patch_size": patch_size, **stem}


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Return the section with every size a number: explicit sizes first, then the variant's, then mlp_dim = 4 x width.

    Sizes that the kind of model does not have stay None.

    Raises:
        ValueError: the variant is unknown, or a size is neither given nor implied.
    """
    sizes: dict[str, Any] = parse_variant(model.variant) if model.variant else {}
    sizes = {key: given if (given := getattr(model, key)) is not None else sizes.get(key) for key in SIZES}
    sizes["kind"] = sizes["kind"] or "vit"
    if sizes["resnet_units"] is not None and sizes["resnet_width"] is None:
        sizes["resnet_width"] = 64
    if sizes["kind"] == "resnet":
        needed = ["resnet_units"]
        advice = "give a variant such as R50x1, or resnet_units such as [3, 4, 6, 3]"
    else:
        needed = ["patch_size", "width", "depth", "num_heads"]
        advice = "give a variant such as B/16, or all of patch_size, width, depth, num_heads"
        if sizes["kind"] == "mlp":
            needed, advice = ["width", "depth"], "give both, such as width 512 and depth 4"
        if sizes["mlp_dim"] is None and sizes["width"] is not None:
            sizes["mlp_dim"] = 4 * sizes["width"]
    missing = [key for key in needed if sizes[key] is None]
    if missing:
        raise ValueError(f"needs {', '.join(missing)}; {advice}")
    hidden = sizes["width"] if model.representation_size == "width" else model.representation_size
    return model.model_copy(update={**sizes, "representation_size": hidden})


def stem_stride(model: ModelConfig) -> int:
    """Return how many image pixels one pixel of the ResNet's output is wide; 1 without one."""
    if model.resnet_units is None:
        return 1
    return (4 if model.resnet_root == "large" else 1) * 2 ** max(0, len(model.resnet_units) - 1)


def receptive_field(model: ModelConfig) -> int:
    """Return how many image pixels a feature of a resolved section's ResNet is made of, in height and in width.

    Convolutions and pooling count, norms do not, though their means and deviations are of the whole image. Of a hybrid it is
    what a patch of the ResNet's output is made of, before attention mixes all of them; without a ResNet a patch's side.
    """
    assert model.kind != "mlp"  # it is the whole image from the first layer on
    field, step = 1, 1  # px, and between two neighbours of the map
    if model.resnet_units is not None:
        field, step = (3, 1) if model.resnet_root == "small" else (7 + 2 * 2, 4)  # 7x7 at stride 2, pooling 3x3 at 2
        spatial = model.resnet_spatial_units or model.resnet_units
        for block, (count, looking) in enumerate(zip(model.resnet_units, spatial, strict=True)):
            if block and not looking:
                step *= 2
            for unit in range(min(count, looking)):
                field += 2 * step
                step *= 2 if block and not unit else 1
    return field + ((model.patch_size or 1) - 1) * step


def kept_patches(patches: int, patch_dropout: float) -> int:
    """Return how many of an image's patches a training step sees."""
    return max(1, round(patches * (1.0 - patch_dropout)))


def model_problem(model: ModelConfig, image_size: tuple[int, int]) -> tuple[str, str] | None:
    """Say which setting of a resolved section makes no sense, by its key, and why; None where all do."""
    if model.kind == "resnet":
        return resnet_problem(model)
    if model.kind == "mlp":
        return mlp_problem(model)
    assert model.patch_size and model.width and model.num_heads
    height, width = image_size
    side = model.patch_size * stem_stride(model)
    if height % side or width % side:
        return "patch_size", f"is {model.patch_size}: data.image_size {height} x {width} is no multiple of {side} px"
    if model.width % model.num_heads:
        return "num_heads", f"is {model.num_heads}, which does not divide model.width ({model.width})"
    return option_problem(model, grid_size=(height // side, width // side)) or stem_problem(model)


def option_problem(model: ModelConfig, *, grid_size: tuple[int, int]) -> tuple[str, str] | None:
    """Say which option does not go with a Transformer's sizes or other options, as `model_problem`."""
    assert model.width and model.num_heads
    patches = grid_size[0] * grid_size[1]
    fixed = model.pos_embed not in ("learned", "learned2d")
    axial = model.attention == "axial"
    for wrong, key, why in (
        (
            model.pos_embed == "sincos2d" and (model.width % 4 or model.width < 8),
            "pos_embed",
            f"sincos2d needs a width of 8 or more that 4 divides, not {model.width}",
        ),
        (
            model.pos_embed == "learned2d" and model.width % 2,
            "pos_embed",
            f"learned2d needs an even width, not {model.width}: half of it for rows, half for columns",
        ),
        (
            model.pos_embed_at != "stem" and fixed,
            "pos_embed_at",
            f"is {model.pos_embed_at}, which is for learned and learned2d positions, not {model.pos_embed}; take stem",
        ),
        (
            model.pos_embed == "relative" and model.patch_dropout,
            "patch_dropout",
            "cannot be used with relative positions, which need every patch in its place; take 0",
        ),
        (
            model.patch_dropout and kept_patches(patches, model.patch_dropout) == patches,
            "patch_dropout",
            f"is {model.patch_dropout}, which leaves out none of {patches} patches; take more, or 0",
        ),
        (
            model.stochastic_depth and model.depth == 1,
            "stochastic_depth",
            "has no effect on a single block, as it rises from 0 at the first; take 0",
        ),
        (
            model.qk_norm and model.width == model.num_heads,
            "qk_norm",
            "would norm heads of a single channel to a constant; take fewer model.num_heads",
        ),
        (
            model.distill_token and model.pool != "token",
            "distill_token",
            f"stands beside a class token, and there is none with model.pool {model.pool}; take token, or distil without it",
        ),
        (
            model.distill_token and model.representation_size is not None,
            "distill_token",
            "is read by one linear layer, as the class token is; drop model.representation_size",
        ),
        (axial and model.pool == "token", "pool", "is token, but a class token lies in no row or column; take gap or map"),
        (axial and model.registers, "registers", "lie in no row or column, so not with model.attention axial; take 0"),
        (
            axial and model.pos_embed == "relative",
            "pos_embed",
            "relative is along one sequence, not model.attention axial; take another",
        ),
        (axial and model.patch_dropout, "patch_dropout", "breaks the rows and columns of model.attention axial; take 0"),
        (
            axial and min(grid_size) == 1,
            "attention",
            f"is axial, but the grid is {grid_size[0]} x {grid_size[1]}: one patch alone in its row or column; take full",
        ),
    ):
        if wrong:
            return key, why
    return None


def stem_problem(model: ModelConfig) -> tuple[str, str] | None:
    """Say which setting of the ResNet before a Transformer, or without one, makes no sense, as `model_problem`."""
    if model.resnet_spatial_units is not None:
        return "resnet_spatial_units", "is about model.kind resnet: attention looks at every place anyway; leave it out"
    if model.resnet_units is not None:
        return width_problem(model)
    found = given(model, RESNET_ONLY)
    return None if found is None else (found, "is about a ResNet, and there is none without model.resnet_units")


def resnet_problem(model: ModelConfig) -> tuple[str, str] | None:
    """Say which setting of a ResNet makes no sense, as `model_problem`."""
    if not model.resnet_units:
        return "resnet_units", "is empty: a ResNet needs a block"
    found = given(model, ("patch_size", "width", "depth", "mlp_dim", "num_heads", *TRANSFORMER_ONLY))
    if found is not None:
        return found, "is about a Transformer, but model.kind is resnet; leave it out"
    units, spatial = model.resnet_units, model.resnet_spatial_units
    if spatial is not None and len(spatial) != len(units):
        return "resnet_spatial_units", f"has {len(spatial)} numbers for {len(units)} blocks; give one for each"
    if spatial is not None and any(looking > count for looking, count in zip(spatial, units)):
        return "resnet_spatial_units", f"is {list(spatial)}, but the blocks have {list(units)} units"
    return width_problem(model)


def mlp_problem(model: ModelConfig) -> tuple[str, str] | None:
    """Say which setting of an MLP makes no sense, as `model_problem`."""
    others = ("patch_size", "num_heads", "resnet_units", "resnet_spatial_units", *RESNET_ONLY, *TRANSFORMER_ONLY)
    found = given(model, [key for key in others if key not in SHARED_BY_MLP])
    return None if found is None else (found, "says nothing about an MLP, but model.kind is mlp; leave it out")


def given(model: ModelConfig, keys: Sequence[str]) -> str | None:
    """Return the first of some settings that is not as the schema has it, or None."""
    defaults = ModelConfig()
    return next((key for key in keys if getattr(model, key) != getattr(defaults, key)), None)


def width_problem(model: ModelConfig) -> tuple[str, str] | None:
    width, groups = model.resnet_width, model.group_norm_groups
    assert width is not None
    if width % groups:
        advice = f"; take model.group_norm_groups: {math.gcd(width, groups)}" if width < groups else ""
        return "resnet_width", f"is {width}, which the {groups} groups of a GroupNorm do not divide{advice}"
    return None
