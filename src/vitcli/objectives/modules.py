"""What hangs on a Vision Transformer while it learns without labels: mask token, decoder, prediction.

Each module is given the encoder, normalised images (B, 3, H, W) and masks (B, P), and returns (B, 2): an image's loss, and the
share of its predictions that are right, where right and wrong can be told (colours).

B batch, P patches, M of them to be predicted, V visible, N tokens, D width, d the decoder's width, s side of a patch, px.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.models import VisionTransformer
from vitcli.models.attention import Attention, Mlp, reset_mlp
from vitcli.models.positions import sincos2d_positions
from vitcli.models.vit import Block, reset_dense
from vitcli.objectives.masks import HIDDEN
from vitcli.objectives.targets import COLOURS, colour_classes, normalised, patches_of, pixels_of

__all__ = ["MaskedAutoencoder", "MaskedPrediction"]

TOKEN_STD = 0.02  # of initial mask tokens: BERT's, SimMIM's and MAE's

Target = Literal["mean_colour", "colours", "squared", "absolute"]
PARTS = {"mean_colour": 1, "colours": 4}  # along each side of a patch, of a colour each


class MaskedPrediction(nn.Module):
    """Corrupt patch embeddings and predict what was there with one linear layer: masked patch prediction, or SimMIM.

    Masked patch prediction (ViT, 2010.11929, B.1.2) shows a learned [mask] embedding, another patch's or the patch itself, and
    asks for colours or pixels; SimMIM (2111.09886) shows the mask token alone and asks for pixels by their absolute error.

    Args:
        width: D.
        patch_size: s.
        count: M.
        target: what is predicted, and by which error where it is pixels.
        mean, std: of the images' normalisation.
    """

    def __init__(
        self, *, width: int, patch_size: int, count: int, target: Target, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.count = count
        self.target: Target = target
        self.mean, self.std = tuple(mean), tuple(std)
        self.parts = PARTS.get(target)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        outputs = 3 * patch_size**2 if self.parts is None else COLOURS * self.parts**2
        self.predict = nn.Linear(width, outputs)
        if not self.mask_token.is_meta:
            nn.init.normal_(self.mask_token, std=TOKEN_STD)
            reset_dense(self.predict, parts=1 if self.parts is None else self.parts**2)

    def forward(self, encoder: VisionTransformer, images: Tensor, masks: Tensor) -> Tensor:
        """Return (B, 2), loss and share of right predictions of each image."""
        own = torch.arange(masks.shape[1], device=masks.device)
        places = first_places(masks != own, self.count)  # (B, M)
        x = encoder.embedded(images)  # (B, P, D)
        x = torch.take_along_dim(x, torch.where(masks < 0, own, masks)[:, :, None], dim=1)
        x = torch.where((masks == HIDDEN)[:, :, None], self.mask_token.to(x.dtype), x)
        x = encoder.encoded(x)[:, encoder.num_prefix_tokens + encoder.num_registers :]  # (B, P, D)
        predicted = self.predict(encoder.norm(torch.take_along_dim(x, places[:, :, None], dim=1))).float()  # (B, M, outputs)
        if self.parts is not None:
            return self.judge_colours(encoder, images, predicted, places)
        wanted = torch.take_along_dim(patches_of(seen(encoder, images), self.patch_size), places[:, :, None], dim=1)
        loss = F.mse_loss if self.target == "squared" else F.l1_loss
        losses = loss(predicted, wanted, reduction="none").mean((1, 2))  # (B,)
        return torch.stack([losses, torch.zeros_like(losses)], dim=1)

    def judge_colours(self, encoder: VisionTransformer, images: Tensor, predicted: Tensor, places: Tensor) -> Tensor:
        """Hold predictions (B, M, parts x parts x 512) at `places` (B, M) against the colours that were there."""
        assert self.parts is not None
        with torch.no_grad():
            pixels = pixels_of(seen(encoder, images), mean=self.mean, std=self.std)
            classes = colour_classes(pixels, self.patch_size, parts=self.parts)  # (B, P, parts x parts)
            classes = torch.take_along_dim(classes, places[:, :, None], dim=1)
        logits = predicted.unflatten(2, (-1, COLOURS))  # (B, M, parts x parts, 512)
        losses = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view(classes.shape)
        right = (logits.argmax(3) == classes).float()
        return torch.stack([losses.mean((1, 2)), right.mean((1, 2))], dim=1)


class MaskedAutoencoder(nn.Module):
    """Show the encoder the visible patches alone, and let a small Transformer predict the others' pixels: MAE (2111.06377).

    The decoder is given what the encoder makes of the visible patches and of the tokens before them, and a mask token for each
    hidden patch, all with fixed sin-cos positions. Targets are pixels normalised patch by patch; the error is squared.

    Args:
        width: D.
        patch_size: s.
        count: M.
        grid_size: (rows, columns) of patches.
        first_tokens: class token and registers before the patches.
        decoder_width, decoder_depth, decoder_heads: d, blocks and heads of the decoder; its MLPs are 4 d wide.
        gelu, layer_norm_eps: as the encoder's.
    """

    def __init__(
        self,
        *,
        width: int,
        patch_size: int,
        count: int,
        grid_size: tuple[int, int],
        first_tokens: int,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        gelu: Literal["tanh", "exact"],
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.count = count
        self.first_tokens = first_tokens
        self.embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        positions = F.pad(sincos2d_positions(grid_size=grid_size, width=decoder_width), (0, 0, first_tokens, 0))
        self.register_buffer("positions", positions.to(self.embed.weight.device), persistent=False)  # (1, N, d)
        self.positions: Tensor
        self.blocks = nn.ModuleList(
            Block(
                width=decoder_width,
                mlp_dim=4 * decoder_width,
                num_heads=decoder_heads,
                dropout=0.0,
                attention_dropout=0.0,
                gelu=gelu,
                layer_norm_eps=layer_norm_eps,
            )
            for _ in range(decoder_depth)
        )
        self.norm = nn.LayerNorm(decoder_width, eps=layer_norm_eps)
        self.predict = nn.Linear(decoder_width, 3 * patch_size**2)
        if not self.mask_token.is_meta:
            self.reset_parameters()

    def forward(self, encoder: VisionTransformer, images: Tensor, masks: Tensor) -> Tensor:
        """Return (B, 2), loss of each image and 0: of pixels, right and wrong cannot be told."""
        hidden = masks == HIDDEN
        order = first_places(~hidden, masks.shape[1])  # (B, P) the visible patches, then the hidden ones
        visible, places = order[:, : -self.count], order[:, -self.count :]
        latents = encoder.norm(encoder.encoded(encoder.embedded(images), visible=visible))  # (B, T + S + V, D)
        x = self.decoded(self.embed(latents), order)  # (B, P, d)
        predicted = self.predict(torch.take_along_dim(x, places[:, :, None], dim=1)).float()  # (B, M, s s 3)
        wanted = torch.take_along_dim(patches_of(seen(encoder, images), self.patch_size), places[:, :, None], dim=1)
        losses = F.mse_loss(predicted, normalised(wanted), reduction="none").mean((1, 2))  # (B,)
        return torch.stack([losses, torch.zeros_like(losses)], dim=1)

    def decoded(self, x: Tensor, order: Tensor) -> Tensor:
        """Return what the decoder makes of all patches, (B, P, d), normed.

        Args:
            x: (B, T + S + V, d), the visible patches in their order.
            order: (B, P) numbers of the visible patches, then of the hidden ones.
        """
        before, shown = x[:, : self.first_tokens], x[:, self.first_tokens :]
        hidden = self.mask_token.to(x.dtype).expand(len(x), self.count, -1)
        patches = torch.take_along_dim(torch.cat([shown, hidden], dim=1), order.argsort(1)[:, :, None], dim=1)
        x = torch.cat([before, patches], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.norm(x[:, self.first_tokens :])
        return output

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial weights as the encoder's, and the mask token as the authors' code."""
        nn.init.normal_(self.mask_token, std=TOKEN_STD)
        for dense in (self.embed, self.predict):
            reset_dense(dense)
        for module in self.blocks.modules():
            if isinstance(module, Attention):
                reset_dense(module.qkv, parts=3)
                reset_dense(module.proj)
            elif isinstance(module, Mlp):
                reset_mlp(module)


def seen(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) as the encoder looks at them: perhaps with patches in another order."""
    shown: Tensor = images if encoder.permutation is None else encoder.permutation(images)
    return shown


def first_places(chosen: Tensor, count: int) -> Tensor:
    """Return the places, (B, count), ascending, where `chosen` (B, P) is true, then those where it is not.

    By sorting, not by `nonzero`, whose result has a size that a GPU would have to be waited for.
    """
    return chosen.int().argsort(dim=1, descending=True, stable=True)[:, :count]
