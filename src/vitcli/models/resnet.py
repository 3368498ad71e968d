"""ResNets of "Big Transfer" (BiT, arXiv 1912.11370), and the ResNet before the Transformer of a hybrid (ViT, 2010.11929, 4.1).

Both have bottleneck units of three convolutions, GroupNorm instead of BatchNorm, and kernels standardised per output channel
(1903.10520). BiT activates before each convolution and pads evenly on all sides, as torch does; the hybrids activate after it
and pad as TensorFlow's SAME. Numerics are the authors' (google-research/big_vision, bit_paper.py; vision_transformer,
models_resnet.py). Tensor names are timm's, but for the head, which here is a linear layer.

B batch, H W sides, C channels, M channels inside a unit (a quarter of its output's), K classes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.models.initial import build_head, lecun_normal_
from vitcli.models.permutation import PatchPermutation, as_seen

__all__ = ["ResNet", "ResNetStem", "standardise"]

EXPANSION = 4  # a unit's output channels, of its inner ones

Standardisation = Literal["std", "bit", "timm"]
Norm = Callable[[int], nn.GroupNorm]  # of so many channels


# ---------------------------------------------------------------------------------------------------------------- layers


def standardise(weight: Tensor, kind: Standardisation) -> Tensor:
    """Return kernels (O, I, h, w) with mean 0 and variance about 1 for each output channel, in float32.

    Args:
        kind: what the deviation is kept from 0 by: std + 1e-5, as in the authors' hybrids; sqrt(var + 1e-10), as in BiT;
            sqrt(var + 1e-8), as in timm's hybrids.
    """
    rows = weight.float().flatten(1)
    if kind != "std":
        # A LayerNorm over a channel's kernel is the same sum, in one pass forward and one backward.
        return F.layer_norm(rows, rows.shape[1:], eps=1e-10 if kind == "bit" else 1e-8).view_as(weight)
    rows = rows - rows.mean(dim=1, keepdim=True)
    # The norm, unlike the root of a mean of squares, has a gradient of 0 for a kernel that is 0.
    deviations = torch.linalg.vector_norm(rows, dim=1, keepdim=True) * rows.shape[1] ** -0.5
    return (rows / (deviations + 1e-5)).view_as(weight)


def same_padding(size: int, *, side: int, stride: int) -> tuple[int, int]:
    """Return what TensorFlow's SAME puts before and after `size` pixels: as little as covers them, the odd one after."""
    total = max(0, (-(-size // stride) - 1) * stride + side - size)
    return total // 2, total - total // 2


class StandardisedConv(nn.Conv2d):
    """A convolution without bias whose kernel is standardised on the way.

    Args:
        same: pad as TensorFlow's SAME, which is uneven for a stride of 2 and an even input; else by side // 2 everywhere.
    """

    def __init__(
        self, inputs: int, outputs: int, *, side: int, stride: int = 1, same: bool, standardisation: Standardisation
    ) -> None:
        super().__init__(inputs, outputs, kernel_size=side, stride=stride, padding=side // 2, bias=False)
        self.same = same
        self.standardisation: Standardisation = standardisation

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H / stride, W / stride), rounded up."""
        side, stride, padding = self.kernel_size[0], self.stride[0], self.padding
        if self.same and stride > 1:
            (top, bottom), (left, right) = (same_padding(size, side=side, stride=stride) for size in x.shape[-2:])
            if top == bottom and left == right:
                padding = (top, left)
            else:
                x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.conv2d(x, standardise(self.weight, self.standardisation), None, self.stride, padding)

    def reset_parameters(self) -> None:
        """Draw nothing: the model does, once."""


class Downsample(nn.Module):
    """The shortcut of a block's first unit: a 1x1 convolution to the new size and number of channels, normed in the stem."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int, standardisation: Standardisation, same: bool, norm: Norm | None
    ) -> None:
        super().__init__()
        self.conv = StandardisedConv(inputs, outputs, side=1, stride=stride, same=same, standardisation=standardisation)
        self.norm = nn.Identity() if norm is None else norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H / stride, W / stride)."""
        output: Tensor = self.norm(self.conv(x))
        return output


class PreActivationUnit(nn.Module):
    """BiT's residual unit: norm and ReLU before each convolution; the shortcut's convolution reads the first ReLU.

    Args:
        side: of the kernel in the middle: 3, or 1 for a unit that looks at no neighbours (BagNet, 1904.00760).
    """

    def __init__(
        self, inputs: int, middle: int, *, stride: int, first: bool, side: int, standardisation: Standardisation, norm: Norm
    ) -> None:
        super().__init__()
        outputs = EXPANSION * middle
        convolution = partial(StandardisedConv, same=False, standardisation=standardisation)
        self.norm1 = norm(inputs)
        self.conv1 = convolution(inputs, middle, side=1)
        self.norm2 = norm(middle)
        self.conv2 = convolution(middle, middle, side=side, stride=stride)
        self.norm3 = norm(middle)
        self.conv3 = convolution(middle, outputs, side=1)
        shortcut = partial(Downsample, same=False, standardisation=standardisation, norm=None)
        self.downsample = shortcut(inputs, outputs, stride=stride) if first else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, 4M, H / stride, W / stride)."""
        active = F.relu_(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        x = self.conv1(active)
        x = self.conv2(F.relu_(self.norm2(x)))  # (B, M, H / stride, W / stride)
        x = self.conv3(F.relu_(self.norm3(x)))  # (B, 4M, H / stride, W / stride)
        return x + shortcut


class PostActivationUnit(nn.Module):
    """The hybrids' residual unit: norm and ReLU after each convolution, the last ReLU after the sum; SAME padding."""

    def __init__(
        self, inputs: int, middle: int, *, stride: int, first: bool, side: int, standardisation: Standardisation, norm: Norm
    ) -> None:
        super().__init__()
        outputs = EXPANSION * middle
        convolution = partial(StandardisedConv, same=True, standardisation=standardisation)
        self.conv1 = convolution(inputs, middle, side=1)
        self.norm1 = norm(middle)
        self.conv2 = convolution(middle, middle, side=side, stride=stride)
        self.norm2 = norm(middle)
        self.conv3 = convolution(middle, outputs, side=1)
        self.norm3 = norm(outputs)
        shortcut = partial(Downsample, same=True, standardisation=standardisation, norm=norm)
        self.downsample = shortcut(inputs, outputs, stride=stride) if first else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, 4M, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu_(self.norm1(self.conv1(x)))
        x = F.relu_(self.norm2(self.conv2(x)))  # (B, M, H / stride, W / stride)
        x = self.norm3(self.conv3(x))  # (B, 4M, H / stride, W / stride)
        return F.relu_(x + shortcut)


class Root(nn.Module):
    """The first convolution: 7x7 and pooling to a quarter of the sides, or, for small images, 3x3 at full size.

    In BiT neither norm nor ReLU follows, and zeros pad what is pooled, as in the published code and timm's "fixed" stem.
    """

    def __init__(
        self,
        width: int,
        *,
        root: Literal["large", "small"],
        same: bool,
        standardisation: Standardisation,
        norm: Norm | None,
    ) -> None:
        super().__init__()
        self.pool = root == "large"
        self.same = same
        side, stride = (7, 2) if root == "large" else (3, 1)
        self.conv = StandardisedConv(3, width, side=side, stride=stride, same=same, standardisation=standardisation)
        self.norm = None if norm is None else norm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, C, H / 4, W / 4), or to (B, C, H, W)."""
        # Channels side by side in memory, from here to the end: on a CPU convolutions take two thirds of the time then, and a
        # step 7 to 20 % less in all, as GroupNorm takes twice as long (docs/models.md).
        x: Tensor = self.conv(images.contiguous(memory_format=torch.channels_last))
        if self.norm is not None:
            x = F.relu_(self.norm(x))
        if not self.pool:
            return x
        if self.same:
            # SAME pads one pixel on both sides of an odd length, and one after an even one: what `ceil_mode` adds, all -inf.
            return F.max_pool2d(x, 3, 2, padding=[size % 2 for size in x.shape[-2:]], ceil_mode=True)
        return F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)


class Stage(nn.Module):
    """One block of residual units; the first one changes size and channels, the first `spatial` ones look at neighbours."""

    def __init__(
        self,
        kind: type[PreActivationUnit] | type[PostActivationUnit],
        *,
        units: int,
        spatial: int,
        inputs: int,
        middle: int,
        stride: int,
        standardisation: Standardisation,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            kind(
                EXPANSION * middle if unit else inputs,
                middle,
                stride=1 if unit else stride,
                first=unit == 0,
                side=3 if unit < spatial else 1,
                standardisation=standardisation,
                norm=norm,
            )
            for unit in range(units)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, 4M, H / stride, W / stride)."""
        for unit in self.blocks:
            x = unit(x)
        return x


def build_stages(
    kind: type[PreActivationUnit] | type[PostActivationUnit],
    *,
    units: Sequence[int],
    width: int,
    standardisation: Standardisation,
    norm: Norm,
    spatial_units: Sequence[int] | None = None,
) -> nn.ModuleList:
    """Build the blocks: each halves the sides and doubles the channels, but for the first one's sides.

    Args:
        spatial_units: units of each block, from its first on, with 3x3 kernels, the others' being 1x1; None for all.
    """
    return nn.ModuleList(
        Stage(
            kind,
            units=count,
            spatial=count if spatial_units is None else spatial_units[block],
            inputs=2 * width * 2**block if block else width,
            middle=width * 2**block,
            stride=2 if block else 1,
            standardisation=standardisation,
            norm=norm,
        )
        for block, count in enumerate(units)
    )


@torch.no_grad()
def reset_layers(model: nn.Module) -> None:
    """Draw initial weights as flax does by default; in a stem the branches begin at zero, as in the authors' code."""
    for module in model.modules():
        if isinstance(module, StandardisedConv):
            lecun_normal_(module.weight)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, PostActivationUnit):
            nn.init.zeros_(module.norm3.weight)


# ---------------------------------------------------------------------------------------------------------------- models


class ResNetStem(nn.Module):
    """The ResNet of a hybrid, up to the feature map that the Transformer's patches are cut from.

    Args:
        units: residual units of each block; empty for the root alone.
        width: channels of the root; a multiple of the groups.
        root: "large" as published, or "small" for small images.
        standardisation: "std" as in the authors' code, or "timm".
        group_norm_groups: of every GroupNorm; 32 as published, fewer for narrower ones.

    Attributes:
        out_channels: of the feature map.
        stride: image pixels to one pixel of the feature map.

    Raises:
        ValueError: the groups do not divide the width.
    """

    def __init__(
        self,
        *,
        units: Sequence[int],
        width: int = 64,
        root: Literal["large", "small"] = "large",
        standardisation: Standardisation = "std",
        group_norm_eps: float = 1e-6,
        group_norm_groups: int = 32,
    ) -> None:
        super().__init__()
        norm = build_norm(width, groups=group_norm_groups, eps=group_norm_eps)
        self.out_channels = width * EXPANSION * 2 ** (len(units) - 1) if units else width
        self.stride = (4 if root == "large" else 1) * 2 ** max(0, len(units) - 1)
        self.stem = Root(width, root=root, same=True, standardisation=standardisation, norm=norm)
        self.stages = build_stages(PostActivationUnit, units=units, width=width, standardisation=standardisation, norm=norm)
        self.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) in [-1, 1] to (B, out_channels, H / stride, W / stride), rounded up."""
        x: Tensor = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return x

    def units(self) -> list[nn.Module]:
        """Return the residual units in order."""
        return [module for module in self.stages.modules() if isinstance(module, (PreActivationUnit, PostActivationUnit))]

    def reset_parameters(self) -> None:
        """Draw initial weights as google-research/vision_transformer, models_resnet.py."""
        reset_layers(self)


class ResNet(nn.Module):
    """Classify images with a pre-activation ResNet: BiT (1912.11370), which the paper compares with.

    Initial weights come from torch's global generator; seed it before building. With a zero-initialised head, every first
    logit is exactly `head_bias`.

    Args:
        image_size: (height, width), px, of any size; only `features` looks at it.
        units: residual units of each block, such as (3, 4, 6, 3).
        width: channels of the root, 64 x the width factor; a multiple of the groups.
        root: "large" as published, or "small" for small images.
        standardisation: "bit" as published.
        group_norm_groups: of every GroupNorm; 32 as published, fewer for narrower ones.
        spatial_units: units of each block, from its first on, whose kernels are 3x3, the others' being 1x1: so a feature sees
            only a part of the image (BagNet, 1904.00760), but for what the norms' means and deviations tell it; None for all.
        head_bias: initial bias of the head; -10 in the ImageNet-21k runs with sigmoid loss.
        patch_permutation: side of the squares that images are cut into and shown in another order, px; None as they are.

    Raises:
        ValueError: no blocks, or the groups do not divide the width.
    """

    random = False  # nothing is drawn in training

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        units: Sequence[int],
        num_classes: int,
        width: int = 64,
        root: Literal["large", "small"] = "large",
        standardisation: Standardisation = "bit",
        group_norm_eps: float = 1e-5,
        group_norm_groups: int = 32,
        spatial_units: Sequence[int] | None = None,
        head_bias: float = 0.0,
        patch_permutation: int | None = None,
    ) -> None:
        super().__init__()
        norm = build_norm(width, groups=group_norm_groups, eps=group_norm_eps)
        if not units:
            raise ValueError("a ResNet needs a block of residual units, got none")
        self.image_size = image_size
        self.head_bias = head_bias
        side = patch_permutation
        self.permutation = None if side is None else PatchPermutation(image_size=image_size, side=side)
        channels = width * EXPANSION * 2 ** (len(units) - 1)
        self.stem = Root(width, root=root, same=False, standardisation=standardisation, norm=None)
        self.stages = build_stages(
            PreActivationUnit,
            units=units,
            width=width,
            standardisation=standardisation,
            norm=norm,
            spatial_units=spatial_units,
        )
        self.norm = norm(channels)
        self.head = build_head(channels, num_classes)
        self.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, 3, H, W) in [-1, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Return what the head reads, (B, C), for images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: the images are not of the size the model was built for.
        """
        x: Tensor = self.stem(as_seen(images, image_size=self.image_size, permutation=self.permutation))
        for stage in self.stages:
            x = stage(x)
        return F.relu_(self.norm(x)).mean(dim=(2, 3))

    def units(self) -> list[nn.Module]:
        """Return the residual units in order."""
        return [module for module in self.stages.modules() if isinstance(module, (PreActivationUnit, PostActivationUnit))]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial weights as big_vision's bit_paper.py."""
        if next(self.parameters()).is_meta:  # nothing to fill; torch would import its compiler for a random number there
            return
        reset_layers(self)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, self.head_bias)


def build_norm(width: int, *, groups: int, eps: float) -> Norm:
    """Return a function of a number of channels, a multiple of the root's `width`, to their GroupNorm."""
    if width % groups:
        raise ValueError(f"resnet_width is {width}, which the {groups} groups of a GroupNorm do not divide")
    return lambda channels: nn.GroupNorm(groups, channels, eps=eps)
