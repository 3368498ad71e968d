"""What a model costs, from its config alone: floating-point operations, parameters, and memory for activations.

A multiply-add counts as two operations, as in `torch.utils.flop_counter`, and only matrix products and convolutions count;
norms, GELU, softmax and the standardising of kernels are left out. Training takes three times the forward pass, the backward
pass being two products for each: the paper's exaFLOPs (2010.11929, Table 6) are that, for every image shown.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from vitcli.model_config import ModelConfig, kept_patches, stem_stride

__all__ = ["activation_bytes", "count_parameters", "count_tokens", "forward_flops", "training_flops"]


@dataclass(frozen=True)
class Cost:
    """Of one part of a model, for one image; `kept` is what stays in memory between forward and backward pass.

    Attributes:
        kept: values in the precision of training.
        kept_bytes: of indices, whose size does not depend on it.
        first: the values among `kept` that the part begins with; all that stays of a part that is computed again.
    """

    multiply_adds: int = 0
    parameters: int = 0
    kept: int = 0
    kept_bytes: int = 0
    first: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Add two parts that follow each other."""
        return Cost(
            self.multiply_adds + other.multiply_adds,
            self.parameters + other.parameters,
            self.kept + other.kept,
            self.kept_bytes + other.kept_bytes,
            self.first,
        )

    def bytes(self, bytes_per_value: int) -> int:
        """Return the memory that stays."""
        return self.kept * bytes_per_value + self.kept_bytes


@dataclass(frozen=True)
class Costs:
    """Of a whole model: its repeated units, and everything else."""

    units: Sequence[Cost]
    outside: Cost

    def total(self) -> Cost:
        """Return the sum."""
        return sum(self.units, self.outside)


# --------------------------------------------------------------------------------------------------------------- answers


def forward_flops(section: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> int:
    """Return the operations of a forward pass on one image, of any model: every block for every token, as the paper counts.

    A class token lets the last block leave out most of its products, in evaluation and without dropout; they count here.
    """
    return 2 * costs(section, image_size=image_size, num_classes=num_classes, training=False).total().multiply_adds


def training_flops(section: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> int:
    """Return the operations of a training step on one image: forward and backward, of the patches that are not left out."""
    return 6 * costs(section, image_size=image_size, num_classes=num_classes, training=True).total().multiply_adds


def count_parameters(section: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> int:
    """Return how many numbers are trained."""
    return costs(section, image_size=image_size, num_classes=num_classes, training=False).total().parameters


def activation_bytes(
    section: ModelConfig, *, image_size: tuple[int, int], bytes_per_value: int = 4, checkpointing: bool = False
) -> int:
    """Return an estimate of what one image keeps in memory between forward and backward pass.

    Attention weights are kept only where no fused kernel is there for them: with relative positions, or dropout on them.
    Dropout's masks count as on a CPU; on a GPU each takes a byte. What a step keeps whatever the number of images, such as
    standardised kernels, is not in it.

    Args:
        bytes_per_value: 4 for float32, 2 for bf16 (a lower bound then: autocast keeps some values in float32).
        checkpointing: each unit's input stays, and all of one unit at a time.
    """
    found = costs(section, image_size=image_size, num_classes=1, training=True)
    if not checkpointing:
        return found.total().bytes(bytes_per_value)
    inside = max((unit.bytes(bytes_per_value) - unit.first * bytes_per_value for unit in found.units), default=0)
    return found.outside.bytes(bytes_per_value) + inside + sum(unit.first for unit in found.units) * bytes_per_value


def count_tokens(section: ModelConfig, *, image_size: tuple[int, int]) -> int | None:
    """Return the length of the Transformer's sequence, or None for a ResNet or an MLP."""
    if section.kind != "vit":
        return None
    rows, columns = grid(section, image_size)
    return class_tokens(section) + section.registers + rows * columns


def costs(section: ModelConfig, *, image_size: tuple[int, int], num_classes: int, training: bool) -> Costs:
    """Return what a resolved section's model costs; in training, patch dropout leaves tokens out."""
    if section.kind == "resnet":
        return resnet_costs(section, image_size=image_size, num_classes=num_classes)
    if section.kind == "mlp":
        return mlp_costs(section, image_size=image_size, num_classes=num_classes)
    return transformer_costs(section, image_size=image_size, num_classes=num_classes, training=training)


# ----------------------------------------------------------------------------------------------------------- transformer


def grid(section: ModelConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    assert section.patch_size is not None
    side = section.patch_size * stem_stride(section)
    return image_size[0] // side, image_size[1] // side


def transformer_costs(section: ModelConfig, *, image_size: tuple[int, int], num_classes: int, training: bool) -> Costs:
    width, depth, mlp_dim, patch = section.width, section.depth, section.mlp_dim, section.patch_size
    assert width and depth and mlp_dim and patch
    rows, columns = grid(section, image_size)
    patches, prefix = rows * columns, class_tokens(section)
    seen = kept_patches(patches, section.patch_dropout) if training and section.patch_dropout else patches
    tokens = prefix + section.registers + seen
    units: list[Cost] = []
    outside, channels = Cost(), 3
    if section.resnet_units is not None:
        units, outside, channels = stem_costs(section, image_size)

    positions = 0
    if section.pos_embed == "learned":
        positions = (prefix + patches) * width
    elif section.pos_embed == "learned2d":
        positions = prefix * width + (rows + columns) * (width // 2)
    outside += linear(channels * patch**2, width, times=patches)
    if patch == 1 and (section.resnet_units or section.resnet_root == "small"):
        outside += Cost(kept=-patches * channels)  # a ReLU's output, which it keeps as well
    outside += Cost(parameters=(prefix + section.registers) * width)
    outside += Cost(parameters=positions * (depth if section.pos_embed_at == "every_layer" else 1))
    if section.dropout:
        outside += Cost(kept=(prefix + section.registers + patches) * width)
    if seen < patches:  # all tokens, and where the ones that stay lay
        outside += Cost(kept=(prefix + section.registers + patches) * width, kept_bytes=8 * tokens * width)

    block = partial(block_cost, section, tokens=tokens)
    one = block(seen=columns) + block(seen=rows) if section.attention == "axial" else block(seen=tokens)
    units = [*units, *[one] * depth]

    read = seen if section.pool == "map" else 1
    outside += norm(width, times=prefix or tokens)
    if prefix:
        outside += Cost(kept=(tokens - prefix) * width)  # the others lie in the same memory
    if section.pool == "map":
        # the query, from its own layer, asks the patches' keys and values
        outside += linear(width, width) + linear(width, 2 * width, times=read)
        outside += Cost(parameters=width, multiply_adds=2 * read * width, kept=2 * read * width + width)
        outside += linear(width, width) + norm(width) + linear(width, mlp_dim) + Cost(kept=mlp_dim) + linear(mlp_dim, width)
    hidden = section.representation_size
    assert hidden != "width"  # resolved
    if hidden:
        outside += linear(width, hidden)
    for _ in range(1 + section.distill_token):
        outside += linear(hidden or width, num_classes)
    return Costs(units, outside)


def class_tokens(section: ModelConfig) -> int:
    """Return how many tokens are read by a head: the class token and the distillation token."""
    return (section.pool == "token") + section.distill_token


def block_cost(section: ModelConfig, *, tokens: int, seen: int) -> Cost:
    """Cost a block of `tokens`, each of which attends to `seen`."""
    width, mlp_dim, heads = section.width, section.mlp_dim, section.num_heads
    assert width and mlp_dim and heads
    relative, pairs = section.pos_embed == "relative", tokens * seen
    cost = norm(width, times=tokens)
    cost += linear(width, 3 * width, times=tokens)
    cost += Cost(multiply_adds=2 * pairs * width, kept=3 * tokens * width)  # queries, keys and values
    if section.qk_norm:  # queries and keys anew, and the output, which comes out in another order than the projection's
        cost += Cost(parameters=4 * (width // heads), kept=tokens * (3 * width + 4 * heads))
    if relative:  # every query times every offset
        cost += Cost(multiply_adds=pairs * width, parameters=(2 * tokens - 1) * (width // heads), kept=tokens * width)
    if not relative and not section.attention_dropout:
        cost += Cost(kept=heads * tokens)  # fused: a sum for each query
    else:
        cost += Cost(kept=heads * pairs * (3 if section.attention_dropout else 1))  # the weights, their masks, their products
    cost += linear(width, width, times=tokens)
    cost += norm(width, times=tokens)
    cost += linear(width, mlp_dim, times=tokens) + Cost(kept=tokens * mlp_dim) + linear(mlp_dim, width, times=tokens)
    if section.layer_scale is not None:
        cost += Cost(parameters=2 * width, kept=2 * tokens * width)
    if section.dropout:
        cost += Cost(kept=tokens * (2 * width + mlp_dim))
    return Cost(cost.multiply_adds, cost.parameters, cost.kept, cost.kept_bytes, first=tokens * width)


def linear(inputs: int, outputs: int, *, times: int = 1) -> Cost:
    """Cost a dense layer with bias, applied `times`; it keeps what it is given."""
    return Cost(times * inputs * outputs, (inputs + 1) * outputs, times * inputs)


def norm(width: int, *, times: int = 1) -> Cost:
    """Cost a LayerNorm, which keeps what it is given, and its mean and deviation."""
    return Cost(parameters=2 * width, kept=times * (width + 2))


# ------------------------------------------------------------------------------------------------------------------- mlp


def mlp_costs(section: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> Costs:
    width, depth, mlp_dim = section.width, section.depth, section.mlp_dim
    assert width and depth and mlp_dim
    block = norm(width) + linear(width, mlp_dim) + Cost(kept=mlp_dim) + linear(mlp_dim, width)
    if section.dropout:
        block += Cost(kept=mlp_dim + width)
    block = Cost(block.multiply_adds, block.parameters, block.kept, block.kept_bytes, first=width)
    outside = linear(3 * math.prod(image_size), width) + norm(width) + linear(width, num_classes)
    return Costs([block] * depth, outside)


# ---------------------------------------------------------------------------------------------------------------- resnet


def halved(size: tuple[int, int], times: int = 1) -> tuple[int, int]:
    """Return sides after strides of 2, rounded up, as both ways of padding do."""
    height, width = size
    return -(-height // 2**times), -(-width // 2**times)


def convolution(inputs: int, outputs: int, *, side: int, size: tuple[int, int]) -> Cost:
    """Cost a convolution without bias to a map of `size`; what it keeps is for the caller to say."""
    weights = inputs * outputs * side**2
    return Cost(weights * math.prod(size), weights)


def group_norm(channels: int, *, size: tuple[int, int], groups: int, active: bool = True) -> Cost:
    """Cost a GroupNorm, which keeps what it is given, with mean and deviation of each group, and a ReLU's result behind it."""
    values = channels * math.prod(size)
    return Cost(parameters=2 * channels, kept=values * (2 if active else 1) + 2 * groups)


def resnet_costs(section: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> Costs:
    assert section.resnet_units and section.resnet_width
    width, size, norm_of = section.resnet_width, image_size, partial(group_norm, groups=section.group_norm_groups)
    spatial = section.resnet_spatial_units or section.resnet_units
    outside = Cost(kept=3 * math.prod(size))
    if section.resnet_root == "large":
        size = halved(size)
        outside += convolution(3, width, side=7, size=size)
        padded, size = width * (size[0] + 2) * (size[1] + 2), halved(size)
        outside += Cost(kept=padded, kept_bytes=8 * width * math.prod(size))  # what is pooled, and where the largest lay
    else:
        outside += convolution(3, width, side=3, size=size)
    units: list[Cost] = []
    inputs = width
    for block, count in enumerate(section.resnet_units):
        middle = width * 2**block
        for unit in range(count):
            new = halved(size) if block and not unit else size
            cost = norm_of(inputs, size=size) + convolution(inputs, middle, side=1, size=size)
            cost += norm_of(middle, size=size) + convolution(middle, middle, side=3 if unit < spatial[block] else 1, size=new)
            cost += norm_of(middle, size=new) + convolution(middle, 4 * middle, side=1, size=new)
            if not unit:
                cost += convolution(inputs, 4 * middle, side=1, size=new)
            first = inputs * math.prod(size)
            units.append(Cost(cost.multiply_adds, cost.parameters, cost.kept, cost.kept_bytes, first))
            size, inputs = new, 4 * middle
    outside += norm_of(inputs, size=size) + linear(inputs, num_classes)
    return Costs(units, outside)


def stem_costs(section: ModelConfig, image_size: tuple[int, int]) -> tuple[list[Cost], Cost, int]:
    """Return the units of a hybrid's ResNet, what lies around them, and the channels it ends with."""
    assert section.resnet_units is not None and section.resnet_width
    width, size, norm_of = section.resnet_width, image_size, partial(group_norm, groups=section.group_norm_groups)
    outside = Cost(kept=3 * math.prod(size))
    if section.resnet_root == "large":
        size = halved(size)
        outside = Cost(kept=padding(3, image_size, side=7) or 3 * math.prod(image_size))
        outside += convolution(3, width, side=7, size=size) + norm_of(width, size=size)
        size = halved(size)
        outside += Cost(kept_bytes=8 * width * math.prod(size))  # where the largest lay
    else:
        outside += convolution(3, width, side=3, size=size) + norm_of(width, size=size)
    units: list[Cost] = []
    inputs = width
    for block, count in enumerate(section.resnet_units):
        middle = width * 2**block
        for unit in range(count):
            new = halved(size) if block and not unit else size
            first = inputs * math.prod(size)
            cost = Cost(kept=0 if not units and section.resnet_root == "small" else first)  # then the root's ReLU keeps it
            cost += convolution(inputs, middle, side=1, size=size) + norm_of(middle, size=size)
            cost += Cost(kept=padding(middle, size, side=3) if new != size else 0)
            cost += convolution(middle, middle, side=3, size=new) + norm_of(middle, size=new)
            cost += convolution(middle, 4 * middle, side=1, size=new) + norm_of(4 * middle, size=new, active=False)
            if not unit:
                cost += convolution(inputs, 4 * middle, side=1, size=new) + norm_of(4 * middle, size=new, active=False)
            units.append(Cost(cost.multiply_adds, cost.parameters, cost.kept, cost.kept_bytes, first))
            size, inputs = new, 4 * middle
    return units, outside + Cost(kept=inputs * math.prod(size) if units else 0), inputs


def padding(channels: int, size: tuple[int, int], *, side: int) -> int:
    """Return the values of a padded copy for a stride of 2, or 0 where both ends get the same and torch pads by itself."""
    totals = [max(0, (-(-length // 2) - 1) * 2 + side - length) for length in size]
    if all(total % 2 == 0 for total in totals):
        return 0
    return channels * math.prod(length + total for length, total in zip(size, totals, strict=True))
