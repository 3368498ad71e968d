"""The Vision Transformer of Dosovitskiy et al. (arXiv 2010.11929), Eq. 1-4, with the variations it ablates.

Pre-norm blocks, learned 1-D position embeddings, a class token, and a head that is a hidden tanh layer at pretraining and one
zero-initialised linear layer at fine-tuning; as options the mean over patches and fixed sin-cos positions ("Better plain ViT
baselines", arXiv 2205.01580). Tensor names are timm's, so its weights load without a table.

B batch, H W image sides, h w grid sides, p patch side, P = h w patches, N tokens (P, plus 1 with a class token),
D width, M mlp_dim, A attention heads, R representation size, K classes.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["VisionTransformer", "sincos2d_positions"]

# Standard deviation of a unit normal cut off at 2; flax's lecun_normal divides by it to end at variance 1/fan_in.
TRUNCATED_NORMAL_STD = 0.87962566103423978


def sincos2d_positions(*, grid_size: tuple[int, int], width: int, temperature: float = 10_000.0) -> Tensor:
    """Return fixed 2-D sin-cos positions, (1, h*w, width) float32 in [-1, 1]: big_vision's `posemb_sincos_2d`.

    Raises:
        ValueError: the width is not a multiple of 4, or below 8.
    """
    if width % 4 or width < 8:
        raise ValueError(f"sincos2d positions need a width that is a multiple of 4 and at least 8, got {width}")
    rows, columns = grid_size
    # On the CPU also where a model is built without memory: torch would import its compiler for a range on its meta device.
    y, x = torch.meshgrid(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"), indexing="ij")
    frequencies = temperature ** -torch.linspace(0.0, 1.0, width // 4, dtype=torch.float64, device="cpu")  # (D/4,)
    y, x = (axis.flatten()[:, None] * frequencies for axis in (y, x))  # (P, D/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None].float()  # (1, P, D)


# ---------------------------------------------------------------------------------------------------------------- layers


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each one (Eq. 1: x_p E)."""

    def __init__(self, *, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, P, D), row by row from the top left."""
        batch, channels, height, width = images.shape
        p = self.patch_size
        x = images.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(batch, -1, channels * p * p)  # (B, P, 3pp)
        # Patches do not overlap, so the convolution is one matrix product: faster on CPUs, and never TF32 behind one's back.
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def attend(q: Tensor, k: Tensor, v: Tensor, *, dropout: float) -> Tensor:
    """Return softmax(q k^T / sqrt(D/A)) v, (B, A, Q, D/A), for Q queries and N keys and values.

    Through `scaled_dot_product_attention`, which keeps no (Q, N) weights, but for 16-bit numbers on a CPU: its kernel there is
    3 to 6 times slower backward than the products written out, where the CPU multiplies bf16 by itself.
    """
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    with torch.autocast("cpu", enabled=False):  # which would take the softmax through float32
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1)  # (B, A, Q, N)
        return F.dropout(weights, dropout) @ v


class Attention(nn.Module):
    """Multi-head self-attention (Eq. 5-8 in the paper's appendix A)."""

    def __init__(self, *, width: int, num_heads: int, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, first_only: bool = False) -> Tensor:
        """Map (B, N, D) to (B, N, D); with `first_only` to the first token's row, (B, 1, D): it alone asks, all answer."""
        batch, tokens, width = x.shape
        dropout = self.attention_dropout if self.training else 0.0
        if first_only:
            q = F.linear(x[:, :1], self.qkv.weight[:width], self.qkv.bias[:width]).reshape(batch, 1, 1, self.num_heads, -1)
            kv = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:]).reshape(batch, tokens, 2, self.num_heads, -1)
            parts = [*q.unbind(2), *kv.unbind(2)]
        else:
            # Taken apart on axis 2, the gradient is put together in the order `qkv` lies in memory: no transposing copy.
            parts = list(self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).unbind(2))
        q, k, v = (part.transpose(1, 2) for part in parts)  # (B, A, N, D/A) each
        x = attend(q, k, v, dropout=dropout)  # (B, A, N, D/A)
        output: Tensor = self.proj(x.transpose(1, 2).reshape(batch, -1, width))
        return output


class Mlp(nn.Module):
    """Two dense layers with GELU between them; dropout after each (appendix B.1)."""

    def __init__(self, *, width: int, mlp_dim: int, dropout: float, gelu: Literal["tanh", "exact"]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_dim)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = nn.Linear(mlp_dim, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        x = self.drop(self.act(self.fc1(x)))  # (B, N, M)
        output: Tensor = self.drop(self.fc2(x))
        return output


class Block(nn.Module):
    """One pre-norm encoder layer: attention (Eq. 2), then the MLP (Eq. 3), each added to its input."""

    def __init__(
        self,
        *,
        width: int,
        mlp_dim: int,
        num_heads: int,
        dropout: float,
        attention_dropout: float,
        gelu: Literal["tanh", "exact"],
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.attn = Attention(width=width, num_heads=num_heads, attention_dropout=attention_dropout)
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.mlp = Mlp(width=width, mlp_dim=mlp_dim, dropout=dropout, gelu=gelu)

    def forward(self, x: Tensor, first_only: bool = False) -> Tensor:
        """Map (B, N, D) to (B, N, D); with `first_only` to the first token's row, (B, 1, D), for about a sixth of the work."""
        attended = self.attn(self.norm1(x), first_only)
        x = (x[:, :1] if first_only else x) + self.drop(attended)
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


# ----------------------------------------------------------------------------------------------------------------- model


class VisionTransformer(nn.Module):
    """Classify images with a Transformer over their patches, ViT (2010.11929) Eq. 1-4.

    Initial weights come from torch's global generator; seed it before building. With a zero-initialised head, every first
    logit is exactly `head_bias`.

    Args:
        image_size: (height, width), px; the patch size divides both.
        representation_size: width of the hidden tanh layer before the head, or None for a single linear head.
        pool: what the head reads: the class token, or the mean over patch tokens after the last norm (no class token then).
        pos_embed: learned 1-D positions, or fixed 2-D sin-cos ones, which the class token goes without and no checkpoint holds.
        dropout: after adding positions and after every dense layer but qkv (appendix B.1).
        attention_dropout: on the attention weights.
        gelu: the original uses the tanh approximation; timm and Hugging Face default to the exact one.
        head_bias: initial bias of the head; -10 in the ImageNet-21k runs with sigmoid loss.

    Attributes:
        grid_size: (rows, columns) of patches.
        num_prefix_tokens: tokens before the patches: 1 with a class token, else 0.

    Raises:
        ValueError: sizes that do not divide one another.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        mlp_dim: int,
        num_heads: int,
        num_classes: int,
        representation_size: int | None = None,
        pool: Literal["token", "gap"] = "token",
        pos_embed: Literal["learned", "sincos2d"] = "learned",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        gelu: Literal["tanh", "exact"] = "tanh",
        layer_norm_eps: float = 1e-6,
        head_bias: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size[0] % patch_size or image_size[1] % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size[0]}x{image_size[1]}")
        if width % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide width {width}")
        self.image_size = image_size
        self.grid_size = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.num_prefix_tokens = 1 if pool == "token" else 0
        self.head_bias = head_bias
        self.random = dropout > 0 or attention_dropout > 0  # in training
        patches = self.grid_size[0] * self.grid_size[1]

        self.patch_embed = PatchEmbed(patch_size=patch_size, width=width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if pool == "token" else None
        self.pos_embed: Tensor
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, self.num_prefix_tokens + patches, width))
        else:
            positions = sincos2d_positions(grid_size=self.grid_size, width=width)
            positions = F.pad(positions, (0, 0, self.num_prefix_tokens, 0))  # nothing is added to the class token
            self.register_buffer("pos_embed", positions, persistent=False)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                width=width,
                mlp_dim=mlp_dim,
                num_heads=num_heads,
                dropout=dropout,
                attention_dropout=attention_dropout,
                gelu=gelu,
                layer_norm_eps=layer_norm_eps,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.pre_logits = nn.Linear(width, representation_size) if representation_size else None
        self.head = nn.Linear(representation_size or width, num_classes)
        self.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, 3, H, W) in [-1, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Return what the head reads, (B, D) or (B, R), for images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: the images are not of the size the model was built for.
        """
        if images.shape[-2:] != self.image_size:
            raise ValueError(f"the model takes images of {self.image_size} px, got {tuple(images.shape[-2:])}")
        x = self.patch_embed(images)  # (B, P, D)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, N, D)
        x = self.drop(x + self.pos_embed)  # Eq. 1
        *blocks, last_block = self.blocks
        for block in blocks:
            x = block(x)  # Eq. 2 and 3
        # Eq. 4 reads one token, and nobody what the last block makes of the others: in training that is 10/12 of its products.
        # With dropout at work they stay, for the sake of the random masks.
        x = last_block(x, self.cls_token is not None and not (self.training and self.random))
        x = self.norm(x[:, 0]) if self.cls_token is not None else self.norm(x).mean(dim=1)  # (B, D)
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))  # (B, R)
        return x

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial weights as the authors' code does (google-research/vision_transformer, models_vit.py)."""
        if self.head.weight.is_meta:  # nothing to fill; torch would import its compiler for a random number there
            return
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]  # torch types a bias as optional
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, Attention):
                for part in module.qkv.weight.chunk(3):  # three dense layers in the original: the fan-out is D, not 3D
                    nn.init.xavier_uniform_(part)
                nn.init.xavier_uniform_(module.proj.weight)
                nn.init.zeros_(module.qkv.bias)
                nn.init.zeros_(module.proj.bias)
            elif isinstance(module, Mlp):
                for dense in (module.fc1, module.fc2):
                    nn.init.xavier_uniform_(dense.weight)
                    nn.init.normal_(dense.bias, std=1e-6)
        if self.pre_logits is not None:
            lecun_normal_(self.pre_logits.weight)
            nn.init.zeros_(self.pre_logits.bias)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, self.head_bias)


def lecun_normal_(weight: Tensor) -> None:
    """Fill in place as flax's default initialiser: a normal of variance 1/fan_in, cut off at two standard deviations."""
    std = 1.0 / (math.sqrt(weight[0].numel()) * TRUNCATED_NORMAL_STD)
    nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std)
