"""What a model computes on the way: each layer's output, and what its attention is given, seen while they pass and not kept.

B batch, T class tokens, S registers, P = h w places, N = T + S + P tokens, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitcli.models import Model, PixelMlp, VisionTransformer
from vitcli.models.attention import Attention

__all__ = ["attention_names", "attentions", "layer_names", "passing", "run", "split_tokens", "tokens_before"]

SeeLayer = Callable[[int, Tensor], None]  # the layer's number, its output
SeeAttention = Callable[[int, Attention, Tensor], None]  # its number, the module, and its input (B, N, D)


def layer_names(model: Model) -> list[str]:
    """Return the names of what `passing` shows, in order: the input's embedding and each block or residual unit."""
    if isinstance(model, VisionTransformer):
        backbone = model.patch_embed.backbone
        units = 0 if backbone is None else len(backbone.units())
        blocks = [f"block {number}" for number in range(1, len(model.blocks) + 1)]
        return [*(f"unit {number}" for number in range(1, units + 1)), "embedding", *blocks]
    first, part = ("embedding", "block") if isinstance(model, PixelMlp) else ("root", "unit")
    return [first, *(f"{part} {number}" for number in range(1, len(model.units()) + 1))]


def attentions(model: VisionTransformer) -> list[Attention]:
    """Return the model's attention modules, in order; an axial block has two."""
    return [module for module in model.blocks.modules() if isinstance(module, Attention)]


def attention_names(model: VisionTransformer) -> list[str]:
    """Return a name for each of `attentions`."""
    each = len(attentions(model)) // len(model.blocks)
    parts = [""] if each == 1 else [" rows", " columns"]
    return [f"block {number}{part}" for number in range(1, len(model.blocks) + 1) for part in parts]


def tokens_before(model: Model) -> int:
    """Return how many tokens come before those of the patches: T + S."""
    return model.num_prefix_tokens + model.num_registers if isinstance(model, VisionTransformer) else 0


@contextmanager
def passing(model: Model, *, layer: SeeLayer | None = None, attention: SeeAttention | None = None) -> Iterator[None]:
    """Show `layer` and `attention` what passes while the model, in evaluation mode, looks at images.

    The last block then makes all its tokens, also where the head reads one alone. Afterwards the model is as it was.
    """
    with ExitStack() as stack:

        def hook(handle: Any) -> None:
            stack.callback(handle.remove)

        if isinstance(model, VisionTransformer):
            hook(model.blocks[-1].register_forward_pre_hook(lambda module, inputs: inputs[:1]))
            if attention is not None:
                for number, module in enumerate(attentions(model)):
                    hook(module.register_forward_pre_hook(given(number, attention)))
        if layer is not None:
            for number, (part, before) in enumerate(parts_of(model)):
                if before:
                    hook(part.register_forward_pre_hook(lambda module, inputs, number=number: layer(number, inputs[0])))
                else:
                    hook(part.register_forward_hook(lambda module, inputs, output, number=number: layer(number, output)))
        yield


def given(number: int, see: SeeAttention) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def show(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Attention)
        see(number, module, inputs[0])

    return show


def parts_of(model: Model) -> list[tuple[nn.Module, bool]]:
    """Return the module of each layer, and whether the layer is its input, not its output."""
    if not isinstance(model, VisionTransformer):
        return [(model.stem, False), *((unit, False) for unit in model.units())]
    backbone = model.patch_embed.backbone
    units = [] if backbone is None else backbone.units()
    return [*((unit, False) for unit in units), (model.blocks[0], True), *((block, False) for block in model.blocks)]


def split_tokens(model: Model, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's output as tokens before the patches (B, T + S, D) and a map of places (B, D, h, w).

    Of a ResNet there is the map alone; an MLP has one place.
    """
    if output.ndim == 4:
        return output.new_zeros(len(output), 0, output.shape[1]), output
    if output.ndim == 2:
        return output.new_zeros(len(output), 0, output.shape[1]), output[:, :, None, None]
    assert isinstance(model, VisionTransformer)
    before = tokens_before(model)
    return output[:, :before], output[:, before:].transpose(1, 2).unflatten(2, model.grid_size)


@torch.no_grad()
def run(model: Model, images: Tensor, *, layer: SeeLayer | None = None, attention: SeeAttention | None = None) -> None:
    """Show a model images (B, 3, H, W), and what passes to `layer` and `attention`; without gradients."""
    with passing(model, layer=layer, attention=attention):
        model.features(images)
