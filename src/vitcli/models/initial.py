"""Initial weights as the authors' code draws them, where torch has no function for it; and the head that begins with zeros."""

import math
from typing import cast

from torch import Tensor, nn

__all__ = ["build_head", "lecun_normal_"]

# Standard deviation of a unit normal cut off at 2; flax's lecun_normal divides by it to end at variance 1/fan_in.
TRUNCATED_NORMAL_STD = 0.87962566103423978


def lecun_normal_(weight: Tensor) -> None:
    """Fill in place as flax's default initialiser: a normal of variance 1/fan_in, cut off at two standard deviations."""
    std = 1.0 / (math.sqrt(weight[0].numel()) * TRUNCATED_NORMAL_STD)
    nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std)


def build_head(inputs: int, num_classes: int) -> nn.Linear:
    """Return a linear layer to so many logits; for 0 classes what hands on its input, so that a model gives its features."""
    return nn.Linear(inputs, num_classes) if num_classes else cast(nn.Linear, nn.Identity())
