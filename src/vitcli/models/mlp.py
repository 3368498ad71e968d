"""A multilayer perceptron on flattened pixels: the end of the scale, where nothing says which pixels are neighbours.

"Scaling MLPs" (2306.13575): a dense layer on all pixels, then residual blocks of LayerNorm and an inverted bottleneck. It is a
Transformer whose only patch is the image and that has no attention, which one token does not need: the same blocks without it.

B batch, H W image sides, D width, M mlp_dim, K classes.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from vitcli.models.attention import Mlp, reset_mlp
from vitcli.models.initial import build_head, lecun_normal_
from vitcli.models.permutation import PatchPermutation, as_seen

__all__ = ["PixelMlp"]


class MlpBlock(nn.Module):
    """A pre-norm residual block: the half of an encoder layer that mixes no tokens (ViT Eq. 3)."""

    def __init__(
        self, *, width: int, mlp_dim: int, dropout: float, gelu: Literal["tanh", "exact"], layer_norm_eps: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.mlp = Mlp(width=width, mlp_dim=mlp_dim, dropout=dropout, gelu=gelu)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D) to (B, D)."""
        output: Tensor = x + self.mlp(self.norm(x))
        return output


class PixelMlp(nn.Module):
    """Classify images with dense layers on all their pixels.

    Initial weights come from torch's global generator; seed it before building. With a zero-initialised head, every first
    logit is exactly `head_bias`.

    Args:
        image_size: (height, width), px; the first layer has weights for each pixel, so no other size will do later.
        dropout: after every dense layer of the blocks.
        head_bias: initial bias of the head.
        patch_permutation: side of the squares that images are cut into and shown in another order, px; None as they are.

    Attributes:
        random: whether training draws random numbers.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        width: int,
        depth: int,
        mlp_dim: int,
        num_classes: int,
        dropout: float = 0.0,
        gelu: Literal["tanh", "exact"] = "tanh",
        layer_norm_eps: float = 1e-6,
        head_bias: float = 0.0,
        patch_permutation: int | None = None,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.head_bias = head_bias
        self.random = dropout > 0
        side = patch_permutation
        self.permutation = None if side is None else PatchPermutation(image_size=image_size, side=side)
        self.stem = nn.Linear(3 * image_size[0] * image_size[1], width)
        self.blocks = nn.ModuleList(
            MlpBlock(width=width, mlp_dim=mlp_dim, dropout=dropout, gelu=gelu, layer_norm_eps=layer_norm_eps)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.head = build_head(width, num_classes)
        self.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, 3, H, W) in [-1, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Return what the head reads, (B, D), for images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: the images are not of the size the model was built for.
        """
        images = as_seen(images, image_size=self.image_size, permutation=self.permutation)
        x = self.stem(images.flatten(1))  # (B, D)
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.norm(x)
        return output

    def units(self) -> list[nn.Module]:
        """Return the blocks in order."""
        return list(self.blocks)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial weights as the Transformer's: of its patch embedding, and of its MLP blocks."""
        if self.stem.weight.is_meta:  # nothing to fill; torch would import its compiler for a random number there
            return
        lecun_normal_(self.stem.weight)
        nn.init.zeros_(self.stem.bias)
        for module in self.blocks.modules():
            if isinstance(module, Mlp):
                reset_mlp(module)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, self.head_bias)
