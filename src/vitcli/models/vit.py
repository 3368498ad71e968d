"""The Vision Transformer of Dosovitskiy et al. (arXiv 2010.11929), Eq. 1-4, with the variations it ablates.

Pre-norm blocks, learned 1-D position embeddings, a class token, and a head that is a hidden tanh layer at pretraining and one
zero-initialised linear layer at fine-tuning. Options: what Table 8 and appendix D compare (positions, where they are added,
mean over patches, Axial attention), and what later work has shown to matter. Tensor names are timm's where timm has the part.

B batch, H W image sides, h w grid sides, p patch side, P = h w patches, T class tokens (of two, the second
is for distillation), S registers, N = T + S + P tokens in this order, D width, M mlp_dim, A attention heads,
R representation size, K classes.
"""

from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.model_config import kept_patches
from vitcli.models.attention import Attention, AttentionPool, AxialAttention, Mlp, reset_mlp
from vitcli.models.initial import build_head, lecun_normal_
from vitcli.models.permutation import PatchPermutation, as_seen
from vitcli.models.positions import learned2d_positions, sincos2d_positions

if TYPE_CHECKING:
    from vitcli.models.resnet import ResNetStem

__all__ = ["VisionTransformer", "attention_maps"]

POSITION_STD = 0.02  # of initial position embeddings: google-research/vision_transformer, models_vit.py


# ---------------------------------------------------------------------------------------------------------------- layers


class PatchEmbed(nn.Module):
    """Cut the image, or what a ResNet makes of it, into patches and project each one (Eq. 1: x_p E)."""

    def __init__(self, *, patch_size: int, width: int, backbone: "ResNetStem | None" = None) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.backbone = backbone
        channels = 3 if backbone is None else backbone.out_channels
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, P, D), row by row from the top left."""
        if self.backbone is not None:
            images = self.backbone(images)  # (B, C, H / stride, W / stride)
        batch, channels, height, width = images.shape
        p = self.patch_size
        x = images.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(batch, -1, channels * p * p)  # (B, P, 3pp)
        # Patches do not overlap, so the convolution is one matrix product: faster on CPUs, and never TF32 behind one's back.
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class LayerScale(nn.Module):
    """Multiply each channel by a factor that is learned (CaiT, 2103.17239)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        return x * self.gamma


class Block(nn.Module):
    """One pre-norm encoder layer: attention (Eq. 2), then the MLP (Eq. 3), each added to its input.

    Args:
        layer_scale: initial factor of both branches, or None for none.
        stochastic_depth: how often a branch of an image is left out in training; the others count for it (1603.09382).
        relative_tokens: N, for relative positions among N tokens.
        axis: attend along "rows" or "columns" of a grid of `grid_size`; None among all tokens.
    """

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
        layer_scale: float | None = None,
        qk_norm: bool = False,
        stochastic_depth: float = 0.0,
        relative_tokens: int | None = None,
        axis: Literal["rows", "columns"] | None = None,
        grid_size: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        self.stochastic_depth = stochastic_depth
        attention = Attention if axis is None else partial(AxialAttention, axis=axis, grid_size=grid_size)
        self.norm1 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.attn = attention(
            width=width,
            num_heads=num_heads,
            attention_dropout=attention_dropout,
            qk_norm_eps=layer_norm_eps if qk_norm else None,
            relative_tokens=relative_tokens,
        )
        self.drop = nn.Dropout(dropout)
        self.ls1 = None if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.mlp = Mlp(width=width, mlp_dim=mlp_dim, dropout=dropout, gelu=gelu)
        self.ls2 = None if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor, only_first: int = 0) -> Tensor:
        """Map (B, N, D) to (B, N, D); with `only_first` n to the first n tokens, (B, n, D), for about a sixth of it."""
        attended = self.drop(self.attn(self.norm1(x), only_first))
        x = (x[:, :only_first] if only_first else x) + self.branch(attended, self.ls1)
        return x + self.branch(self.mlp(self.norm2(x)), self.ls2)

    def branch(self, x: Tensor, scale: LayerScale | None) -> Tensor:
        """Return what of a branch (B, N, D) is added."""
        if scale is not None:
            x = scale(x)
        if self.training and self.stochastic_depth:
            kept = 1.0 - self.stochastic_depth
            x = x * x.new_empty(x.shape[0], 1, 1).bernoulli_(kept).div_(kept)
        return x


class AxialBlock(nn.Module):
    """Attention along rows, MLP, attention along columns, MLP (paper D.6)."""

    def __init__(self, *, rows: Block, columns: Block) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns

    def forward(self, x: Tensor, only_first: int = 0) -> Tensor:
        """Map (B, P, D) to (B, P, D)."""
        output: Tensor = self.columns(self.rows(x), only_first)
        return output


# ----------------------------------------------------------------------------------------------------------------- model


class VisionTransformer(nn.Module):
    """Classify images with a Transformer over their patches, ViT (2010.11929) Eq. 1-4.

    Initial weights come from torch's global generator; seed it before building. With a zero-initialised head, every first
    logit is exactly `head_bias`.

    Args:
        image_size: (height, width), px; the patch size, times the backbone's stride, divides both.
        representation_size: width of the hidden tanh layer before the head, or None for a single linear head.
        pool: what the head reads after the last norm: the class token, the mean over patches, or what a learned query finds
            in them (MAP). Only "token" has a class token.
        pos_embed: learned 1-D positions; learned 2-D or fixed sin-cos ones (no checkpoint holds them); relative ones, inside
            attention; or none. Registers have no position, nor has the class token a fixed one.
        pos_embed_at: learned positions are added to the patch embeddings, or to every block's input: others each time, or
            the same ones ("shared").
        attention: among all tokens, or axial: along rows, then along columns.
        distill_token: a token behind the class token, with a position and a head of its own, which is to agree with a teacher
            (DeiT, 2012.12877, section 4).
        registers: S learned tokens that stand for no patch (2309.16588).
        layer_scale: initial factor of each branch, learned per channel, or None.
        qk_norm: LayerNorm on each head's queries and keys.
        stochastic_depth: how often the last block's branches are left out; rises linearly from 0 at the first (1603.09382).
        patch_dropout: share of an image's patches left out in training (2208.07220).
        dropout: after adding positions to patches and after every dense layer but qkv (appendix B.1).
        attention_dropout: on the attention weights.
        gelu: the original uses the tanh approximation; timm and Hugging Face default to the exact one.
        head_bias: initial bias of the head; -10 in the ImageNet-21k runs with sigmoid loss.
        backbone: a ResNet whose feature map is cut into patches, instead of the image (section 3.1, hybrids).
        patch_permutation: side of the squares that images are cut into and shown in another order, px; None as they are.
        num_classes: K; 0 for a model without a head, whose outputs are its features; their mean where there are two tokens.

    Attributes:
        grid_size: (rows, columns) of patches.
        objective: what it learns to predict of patches that it is not shown, where it learns without labels (`objectives`).
        num_prefix_tokens: T, tokens with a place before the patches' in `pos_embed`, which are those that heads read: the class
            token, and the distillation token.
        num_registers: S.
        random: whether training draws random numbers.

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
        pool: Literal["token", "gap", "map"] = "token",
        pos_embed: Literal["none", "learned", "learned2d", "relative", "sincos2d"] = "learned",
        pos_embed_at: Literal["stem", "every_layer", "shared"] = "stem",
        attention: Literal["full", "axial"] = "full",
        distill_token: bool = False,
        registers: int = 0,
        layer_scale: float | None = None,
        qk_norm: bool = False,
        stochastic_depth: float = 0.0,
        patch_dropout: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        gelu: Literal["tanh", "exact"] = "tanh",
        layer_norm_eps: float = 1e-6,
        head_bias: float = 0.0,
        backbone: "ResNetStem | None" = None,
        patch_permutation: int | None = None,
    ) -> None:
        super().__init__()
        stride = patch_size * (1 if backbone is None else backbone.stride)
        if image_size[0] % stride or image_size[1] % stride:
            what = f"patch_size {patch_size}" if backbone is None else f"patch_size x the backbone's stride, {stride},"
            raise ValueError(f"{what} does not divide image_size {image_size[0]}x{image_size[1]}")
        if width % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide width {width}")
        if distill_token and (pool != "token" or representation_size is not None):
            raise ValueError("a distillation token stands beside a class token, and linear heads read both")
        self.image_size = image_size
        self.grid_size = (image_size[0] // stride, image_size[1] // stride)
        self.num_prefix_tokens = int(pool == "token") + int(distill_token)
        self.num_registers = registers
        self.pos_embed_at = pos_embed_at
        self.patch_dropout = patch_dropout
        self.head_bias = head_bias
        self.masks_tokens = dropout > 0 or attention_dropout > 0  # each with random numbers of its own, in training
        self.random = self.masks_tokens or stochastic_depth > 0 or patch_dropout > 0
        rows, columns = self.grid_size
        tokens = self.num_prefix_tokens + registers + rows * columns
        side = patch_permutation
        self.permutation = None if side is None else PatchPermutation(image_size=image_size, side=side)

        self.patch_embed = PatchEmbed(patch_size=patch_size, width=width, backbone=backbone)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if pool == "token" else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, width)) if distill_token else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        layers = depth if pos_embed_at == "every_layer" else 1
        self.pos_embed: Tensor | None
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.empty(layers, self.num_prefix_tokens + rows * columns, width))
        elif pos_embed == "sincos2d":
            positions = sincos2d_positions(grid_size=self.grid_size, width=width)
            positions = positions.to(self.patch_embed.proj.weight.device)
            positions = F.pad(positions, (0, 0, self.num_prefix_tokens, 0))  # nothing is added to class tokens
            self.register_buffer("pos_embed", positions, persistent=False)
        else:
            self.pos_embed = None
        both = pos_embed == "learned2d"
        before = self.num_prefix_tokens if both else 0
        self.pos_embed_prefix = nn.Parameter(torch.empty(layers, before, width)) if before else None
        self.pos_embed_rows = nn.Parameter(torch.empty(layers, rows, width // 2)) if both else None
        self.pos_embed_columns = nn.Parameter(torch.empty(layers, columns, width // 2)) if both else None
        self.drop = nn.Dropout(dropout)
        block = partial(
            Block,
            width=width,
            mlp_dim=mlp_dim,
            num_heads=num_heads,
            dropout=dropout,
            attention_dropout=attention_dropout,
            gelu=gelu,
            layer_norm_eps=layer_norm_eps,
            layer_scale=layer_scale,
            qk_norm=qk_norm,
            relative_tokens=tokens if pos_embed == "relative" else None,
            grid_size=self.grid_size,
        )
        self.blocks = nn.ModuleList()
        for number in range(depth):
            rate = stochastic_depth * number / max(1, depth - 1)
            if attention == "full":
                self.blocks.append(block(stochastic_depth=rate))
            else:
                along_rows, along_columns = (block(stochastic_depth=rate, axis=axis) for axis in ("rows", "columns"))
                self.blocks.append(AxialBlock(rows=along_rows, columns=along_columns))
        self.norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.attn_pool = None
        if pool == "map":
            self.attn_pool = AttentionPool(
                width=width, mlp_dim=mlp_dim, num_heads=num_heads, gelu=gelu, layer_norm_eps=layer_norm_eps
            )
        self.pre_logits = nn.Linear(width, representation_size) if representation_size else None
        self.head = build_head(representation_size or width, num_classes)
        self.head_dist = build_head(width, num_classes) if distill_token else None
        self.objective: nn.Module | None = None
        self.reset_parameters()

    def forward(self, images: Tensor, masks: Tensor | None = None, *, apart: bool = False) -> Tensor:
        """Return logits (B, K) for images (B, 3, H, W) in [-1, 1]; with masks (B, P) what `objective` makes of the images.

        Of two heads it is the mean of their logits, as in DeiT's code, timm and transformers; the paper's words are the sum of
        their softmaxes. With `apart` it is both heads' logits, (B, 2, K): the class token's, then the distillation token's.
        """
        if masks is not None:
            assert self.objective is not None
            judged: Tensor = self.objective(self, images, masks)
            return judged
        x = self.features(images)
        if self.head_dist is None:
            assert not apart
            logits: Tensor = self.head(x)
            return logits
        of_class, of_teacher = x.chunk(2, dim=1)  # (B, D) each
        both = torch.stack([self.head(of_class), self.head_dist(of_teacher)], dim=1)  # (B, 2, K)
        return both if apart else both.mean(dim=1)

    def features(self, images: Tensor) -> Tensor:
        """Return what the head reads, (B, D) or (B, R), or two heads, (B, 2D), for images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: the images are not of the size the model was built for.
        """
        # Eq. 4 reads one token, and nobody what the last block makes of the others: in training that is 10/12 of its products.
        # With dropout at work they stay, for the sake of the random masks.
        read = 0 if self.training and self.masks_tokens else self.num_prefix_tokens
        x = self.pooled(self.encoded(self.embedded(images), only_first=read))  # (B, D), Eq. 4
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))  # (B, R)
        return x

    def embedded(self, images: Tensor) -> Tensor:
        """Return the patches' embeddings (B, P, D), without positions, for images (B, 3, H, W)."""
        x: Tensor = self.patch_embed(as_seen(images, image_size=self.image_size, permutation=self.permutation))
        return x

    def encoded(self, x: Tensor, *, visible: Tensor | None = None, only_first: int = 0) -> Tensor:
        """Return what the blocks make of patch embeddings (B, P, D) and the tokens before them, (B, N, D), not normed.

        Args:
            visible: (B, V) numbers of the patches to be seen, in this order; the others are left out. None for all, or in
                training for those that `patch_dropout` leaves.
            only_first: n, to let the last block make the first n tokens alone, (B, n, D); 0 for all.
        """
        tokens = (self.cls_token, self.dist_token, self.reg_token)
        before = [token.expand(x.shape[0], -1, -1) for token in tokens if token is not None]
        x = torch.cat([*before, x], dim=1) if before else x  # (B, N, D)
        positions = self.positions()
        x = self.drop(x if positions[0] is None else x + positions[0])  # Eq. 1
        kept = None  # (B, N') numbers of the tokens that stay
        if visible is not None:
            kept = self.with_first_tokens(visible)
        elif self.training and self.patch_dropout:
            kept = self.draw_tokens(x)
        if kept is not None:
            x = torch.take_along_dim(x, kept[:, :, None], dim=1)  # (B, N', D)
        for number, (block, position) in enumerate(zip(self.blocks, positions, strict=True)):
            if number and position is not None:
                x = x + (position if kept is None else position[0][kept])
            x = block(x, only_first if number == len(self.blocks) - 1 else 0)  # Eq. 2 and 3
        return x

    def positions(self) -> list[Tensor | None]:
        """Return what is added to the tokens before each block, (1, N, D), or None for nothing."""
        depth, prefix = len(self.blocks), self.num_prefix_tokens
        x = self.pos_embed
        if self.pos_embed_rows is not None and self.pos_embed_columns is not None:
            x = learned2d_positions(self.pos_embed_rows, self.pos_embed_columns)  # (L, P, D)
            x = x if self.pos_embed_prefix is None else torch.cat([self.pos_embed_prefix, x], dim=1)  # (L, T + P, D)
        if x is None:
            return [None] * depth
        if self.num_registers:
            x = torch.cat([x[:, :prefix], x.new_zeros(x.shape[0], self.num_registers, x.shape[2]), x[:, prefix:]], dim=1)
        if self.pos_embed_at == "every_layer":
            return list(x.split(1))
        return [x, *[x if self.pos_embed_at == "shared" else None] * (depth - 1)]

    def draw_tokens(self, x: Tensor) -> Tensor:
        """Draw which of the tokens (B, N, D) stay in this step, (B, N'): some patches, and all that come before them."""
        first = self.num_prefix_tokens + self.num_registers
        patches = torch.rand(x.shape[0], x.shape[1] - first, device=x.device).argsort(dim=1)
        return self.with_first_tokens(patches[:, : kept_patches(patches.shape[1], self.patch_dropout)])

    def with_first_tokens(self, patches: Tensor) -> Tensor:
        """Turn numbers of patches (B, V) into numbers of tokens (B, T + S + V), those before all patches included."""
        first = self.num_prefix_tokens + self.num_registers
        before = torch.arange(first, device=patches.device).expand(patches.shape[0], -1)
        return torch.cat([before, patches + first], dim=1)

    def pooled(self, x: Tensor) -> Tensor:
        """Return the image's representation (B, T D) or (B, D) from its tokens (B, N, D), normed: class tokens, mean or MAP."""
        if self.num_prefix_tokens:
            output: Tensor = self.norm(x[:, : self.num_prefix_tokens]).flatten(1)
            return output
        x = self.norm(x[:, self.num_registers :] if self.num_registers else x)  # (B, P, D)
        return x.mean(dim=1) if self.attn_pool is None else self.attn_pool(x)

    def units(self) -> list[nn.Module]:
        """Return the repeated parts in order, which are what is sharded, or computed again in the backward pass, at a time."""
        backbone = self.patch_embed.backbone
        return [*([] if backbone is None else backbone.units()), *self.blocks]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial weights as the authors' code does (google-research/vision_transformer, models_vit.py)."""
        if self.patch_embed.proj.weight.is_meta:  # nothing to fill; torch would import its compiler for a random number there
            return
        if self.patch_embed.backbone is not None:
            self.patch_embed.backbone.reset_parameters()
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]  # torch types a bias as optional
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        positions = [self.pos_embed, self.pos_embed_prefix, self.pos_embed_rows, self.pos_embed_columns]
        for drawn in [*positions, self.reg_token, self.dist_token]:  # tokens too: without positions nothing tells them apart
            if isinstance(drawn, nn.Parameter):
                nn.init.normal_(drawn, std=POSITION_STD)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()  # ones and zeros
        for module in self.blocks.modules():
            if isinstance(module, Attention):
                reset_dense(module.qkv, parts=3)  # three dense layers in the original: the fan-out is D, not 3D
                reset_dense(module.proj)
                if module.relative is not None:
                    nn.init.normal_(module.relative, std=POSITION_STD)
            elif isinstance(module, Mlp):
                reset_mlp(module)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.initial)
        if self.attn_pool is not None:  # big_vision, models/vit.py, MAPHead
            nn.init.xavier_uniform_(self.attn_pool.latent[0])
            for dense, parts in ((self.attn_pool.q, 1), (self.attn_pool.kv, 2), (self.attn_pool.proj, 1)):
                reset_dense(dense, parts=parts)
            reset_mlp(self.attn_pool.mlp)
        if self.pre_logits is not None:
            lecun_normal_(self.pre_logits.weight)
            nn.init.zeros_(self.pre_logits.bias)
        for head in (self.head, self.head_dist):
            if isinstance(head, nn.Linear):
                nn.init.zeros_(head.weight)
                nn.init.constant_(head.bias, self.head_bias)


def reset_dense(dense: nn.Linear, *, parts: int = 1) -> None:
    """Draw Xavier-uniform weights of `parts` dense layers in one; biases become zero."""
    for part in dense.weight.chunk(parts):
        nn.init.xavier_uniform_(part)
    nn.init.zeros_(dense.bias)


# ------------------------------------------------------------------------------------------------------------- inspection


@torch.no_grad()
def attention_maps(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Return each block's softmax weights, (B, A, N, N), for images (B, 3, H, W): row q says how much token q takes of each.

    As in evaluation, whatever mode the model is in. An axial block has two, along rows and along columns, with 0 in between.
    They are made from what the blocks' attention is given on the way: the model itself keeps none and does nothing for them.
    """
    maps: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del output
        assert isinstance(module, Attention)
        maps.append(module.weights(inputs[0]))

    training = [module for module in model.modules() if module.training]
    handles = [module.register_forward_hook(keep) for module in model.blocks.modules() if isinstance(module, Attention)]
    try:
        model.eval().features(images)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return maps
