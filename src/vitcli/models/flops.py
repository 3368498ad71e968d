"""What a Vision Transformer costs, from its sizes alone: floating-point operations and memory for activations.

A multiply-add counts as two operations, as in `torch.utils.flop_counter`, and only matrix products count; norms, GELU and
softmax are left out. The paper's exaFLOPs (Table 6) are for training, about three times the forward pass.
"""

from typing import Literal

__all__ = ["activation_bytes", "forward_flops"]


def forward_flops(
    *,
    image_size: tuple[int, int],
    patch_size: int,
    width: int,
    depth: int,
    mlp_dim: int,
    num_classes: int,
    representation_size: int | None = None,
    pool: Literal["token", "gap"] = "token",
) -> int:
    """Return the operations of one forward pass on one image; a training step takes three times as many.

    The number of heads does not matter: their products have the same total size.
    """
    patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
    tokens = patches + (pool == "token")
    multiply_adds = patches * 3 * patch_size**2 * width
    dense = 4 * width**2 + 2 * width * mlp_dim  # per token: qkv, output projection, MLP
    attention = 2 * tokens * width  # per token: its scores, then the weighted sum of values
    multiply_adds += depth * tokens * (dense + attention)
    if representation_size:
        multiply_adds += width * representation_size
    multiply_adds += (representation_size or width) * num_classes
    return 2 * multiply_adds


def activation_bytes(
    *,
    image_size: tuple[int, int],
    patch_size: int,
    width: int,
    depth: int,
    mlp_dim: int,
    pool: Literal["token", "gap"] = "token",
    bytes_per_value: int = 4,
) -> int:
    """Return an estimate of what one image keeps in memory between forward and backward pass, without dropout.

    Per block and token: 2 residual sums, 2 norm outputs, q, k and v, and the attention's output, D each; the hidden layer
    before and after GELU, M each. Attention weights are not kept (`scaled_dot_product_attention`).

    Args:
        bytes_per_value: 4 for float32, 2 for bf16 (a lower bound then: autocast keeps some values in float32).
    """
    patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
    tokens = patches + (pool == "token")
    values = depth * tokens * (8 * width + 2 * mlp_dim) + patches * 3 * patch_size**2 + tokens * width
    return values * bytes_per_value
