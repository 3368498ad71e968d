"""Costs from sizes alone, against torch's counter, published numbers and the tensors autograd really keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitcli.model_config import parse_variant
from vitcli.models.flops import activation_bytes, forward_flops
from vitcli.models.vit import VisionTransformer

HEADS = "num_heads"


def count_parameters(name: str, **changes: Any) -> int:
    """Count a variant's parameters without allocating them."""
    with torch.device("meta"):
        model = VisionTransformer(**{**parse_variant(name), "image_size": (224, 224), "num_classes": 1000, **changes})
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pool": "gap"},
        {"representation_size": 24},
        {"image_size": (16, 40), "patch_size": 4},
        {"width": 48, "mlp_dim": 100, "depth": 3, "num_heads": 3, "num_classes": 1},
    ],
)
def test_forward_equals_torchs_counter(changes: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"image_size": (32, 32), "patch_size": 8, "width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 4}
    sizes |= {"num_classes": 10, **changes}
    model = VisionTransformer(**sizes)
    model.random = True  # as with dropout: the last block makes every token, as in the paper's count
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not know the CPU's fused attention
        model(torch.randn(2, 3, *sizes["image_size"]))
    sizes.pop(HEADS)
    assert counter.get_total_flops() == 2 * forward_flops(**sizes)


def test_published_numbers() -> None:
    sizes: dict[str, Any] = {key: value for key, value in parse_variant("B/16").items() if key != HEADS}
    flops = forward_flops(image_size=(224, 224), num_classes=1000, **sizes)
    assert flops == pytest.approx(
        2 * 17.56e9, rel=0.005
    )  # torchvision's vit_b_16: 17.56 G multiply-adds, attention products included
    assert count_parameters("B/16") == 86_567_656  # torchvision and timm
    assert (
        count_parameters("B/16", num_classes=21_843, representation_size=768) == 103_186_515
    )  # the authors' ImageNet-21k file
    assert count_parameters("L/16") == 304_326_632  # torchvision's vit_l_16
    assert count_parameters("B/32") == 88_224_232  # torchvision's vit_b_32


@pytest.mark.parametrize(
    "changes", [{}, {"pool": "gap"}, {"image_size": (64, 32), "patch_size": 4, "mlp_dim": 192, "depth": 4}]
)
def test_activation_estimate_is_close_to_what_autograd_keeps(changes: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"image_size": (32, 32), "patch_size": 4, "width": 64, "depth": 3, "mlp_dim": 128, "num_heads": 2}
    sizes |= changes
    model = VisionTransformer(**sizes, num_classes=10)
    model.random = True  # an estimate for models with dropout too, which make every token in the last block
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(torch.randn(4, 3, *sizes["image_size"])).sum()
    assert loss.requires_grad
    sizes.pop(HEADS)
    assert 4 * activation_bytes(**sizes) == pytest.approx(sum(kept.values()), rel=0.05)
