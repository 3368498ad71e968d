"""Costs from the config alone, against torch's counter, published numbers and the tensors autograd really keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitcli.model_config import ModelConfig, resolve_model
from vitcli.models import Model, VisionTransformer, build_model, build_stem
from vitcli.models.flops import activation_bytes, count_parameters, count_tokens, forward_flops, training_flops
from vitcli.models.resnet import StandardisedConv, same_padding

VIT: dict[str, Any] = {"patch_size": 8, "width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 4}
HYBRID: dict[str, Any] = {**VIT, "patch_size": 1, "resnet_width": 32}
RESNET: dict[str, Any] = {"kind": "resnet", "resnet_width": 32}
MLP: dict[str, Any] = {"kind": "mlp", "width": 64, "depth": 2}
JFT_IMAGES = 303e6  # what the paper calls JFT-300M
JFT_CLASSES = 18_000

VITS = {
    "plain": VIT,
    "gap": {**VIT, "pool": "gap"},
    "map": {**VIT, "pool": "map", "registers": 2},
    "hidden layer": {**VIT, "representation_size": 24},
    "small patches": {**VIT, "patch_size": 4},
    "odd sizes": {**VIT, "width": 48, "mlp_dim": 100, "depth": 3, "num_heads": 3},
    "no positions": {**VIT, "pos_embed": "none"},
    "2-D positions": {**VIT, "pos_embed": "learned2d"},
    "2-D positions at every layer": {**VIT, "pos_embed": "learned2d", "pos_embed_at": "every_layer"},
    "1-D positions at every layer": {**VIT, "pos_embed_at": "every_layer"},
    "shared positions": {**VIT, "pos_embed_at": "shared"},
    "sin-cos": {**VIT, "pos_embed": "sincos2d"},
    "relative": {**VIT, "pos_embed": "relative"},
    "axial": {**VIT, "attention": "axial", "pool": "gap"},
    "registers": {**VIT, "registers": 3},
    "distilled": {**VIT, "distill_token": True, "registers": 1},
    "layer scale": {**VIT, "layer_scale": 0.1},
    "qk norm": {**VIT, "qk_norm": True},
    "stochastic depth": {**VIT, "stochastic_depth": 0.5},
    "dropout": {**VIT, "dropout": 0.1},
    "attention dropout": {**VIT, "attention_dropout": 0.1},
}
OTHERS = {
    "hybrid": {**HYBRID, "resnet_units": (1, 2)},
    "hybrid of three blocks, patches of 2": {**HYBRID, "patch_size": 2, "resnet_units": (1, 1, 1)},
    "hybrid with a small root": {**HYBRID, "resnet_units": (2, 1, 1), "resnet_root": "small"},
    "hybrid of the root alone": {**HYBRID, "resnet_units": ()},
    "hybrid of the root alone, patches of 8": {**HYBRID, "patch_size": 8, "resnet_units": ()},
    "hybrid of a small root alone": {**HYBRID, "patch_size": 4, "resnet_units": (), "resnet_root": "small"},
    "resnet": {**RESNET, "resnet_units": (1, 2, 1)},
    "resnet with a small root": {**RESNET, "resnet_units": (2, 1), "resnet_root": "small"},
    "wide resnet": {**RESNET, "resnet_width": 64, "resnet_units": (1, 1)},
    "narrow resnet": {**RESNET, "resnet_width": 16, "group_norm_groups": 8, "resnet_units": (2, 1), "resnet_root": "small"},
    "resnet of 1x1 kernels": {**RESNET, "resnet_units": (2, 2, 1), "resnet_spatial_units": (1, 2, 0)},
    "narrow hybrid": {**HYBRID, "resnet_width": 16, "group_norm_groups": 8, "resnet_units": (1, 1), "resnet_root": "small"},
    "mlp": MLP,
    "mlp with dropout": {**MLP, "dropout": 0.1, "depth": 3, "mlp_dim": 50},
}
EVERY = {**VITS, **OTHERS}


def resolved(settings: dict[str, Any]) -> ModelConfig:
    return resolve_model(ModelConfig(**settings))


def build(section: ModelConfig, image_size: tuple[int, int]) -> Model:
    """Build a model that makes every token in the last block, as the paper's count and the estimates do."""
    model = build_model(section, image_size=image_size, num_classes=10)
    if isinstance(model, VisionTransformer):
        model.masks_tokens = True
    return model.train()


def sizes_of(settings: dict[str, Any]) -> list[tuple[int, int]]:
    """Return a square, another shape, and for a ResNet, which takes any, odd sides."""
    return [(32, 32), (32, 64), *([(37, 45)] if settings.get("kind") == "resnet" else [])]


@pytest.mark.parametrize("name", EVERY)
def test_forward_and_parameters_are_torchs(name: str) -> None:
    section = resolved(EVERY[name])
    for image_size in sizes_of(EVERY[name]):
        model = build(section, image_size)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not know the CPU's fused one
            model(torch.randn(1, 3, *image_size))
        sizes: dict[str, Any] = {"image_size": image_size, "num_classes": 10}
        assert forward_flops(section, **sizes) == counter.get_total_flops()
        assert training_flops(section, **sizes) == 3 * counter.get_total_flops()
        assert count_parameters(section, **sizes) == sum(parameter.numel() for parameter in model.parameters())


def test_patch_dropout_costs_less_in_training_alone() -> None:
    section, whole = resolved({**VIT, "patch_dropout": 0.5}), resolved(VIT)
    sizes: dict[str, Any] = {"image_size": (64, 64), "num_classes": 10}
    assert forward_flops(section, **sizes) == forward_flops(whole, **sizes)
    model = build(section, (64, 64))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, 64, 64))
    assert training_flops(section, **sizes) == 3 * counter.get_total_flops() < training_flops(whole, **sizes)


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Return the size of every storage, but the parameters', that a forward pass leaves for the backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}  # holding the tensors: a freed address may come again

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(images).sum()
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", [*EVERY, "patch dropout"])
def test_activation_estimate_is_what_autograd_keeps(name: str) -> None:
    image_size = (64, 64)
    settings = EVERY.get(name, {**VIT, "patch_dropout": 0.5})
    section = resolved({**settings, **({} if settings.get("kind") else {"width": 64, "mlp_dim": 128, "num_heads": 2})})
    model = build(section, image_size)
    few, many = (kept_bytes(model, torch.randn(count, 3, *image_size)) for count in (2, 6))
    each = (many - few) / 4  # without what a step keeps once
    assert activation_bytes(section, image_size=image_size) == pytest.approx(each, rel=0.002)
    assert activation_bytes(section, image_size=image_size, bytes_per_value=2) < 0.6 * each


@pytest.mark.parametrize("name", ["plain", "hybrid", "resnet"])
def test_checkpointing_keeps_the_units_inputs_and_one_unit(name: str) -> None:
    settings = EVERY[name] | ({"depth": 8} if "depth" in EVERY[name] else {"resnet_units": (4, 4)})
    whole = activation_bytes(resolved(settings), image_size=(64, 64))
    assert activation_bytes(resolved(settings), image_size=(64, 64), checkpointing=True) < 0.55 * whole


# ------------------------------------------------------------------------------------------------- published numbers


def test_published_numbers() -> None:
    flops = forward_flops(resolved({"variant": "B/16"}), image_size=(224, 224), num_classes=1000)
    assert flops == pytest.approx(2 * 17.56e9, rel=0.005)  # torchvision's vit_b_16: 17.56 G multiply-adds, with attention's
    for variant, classes, hidden, parameters in (
        ("B/16", 1000, None, 86_567_656),  # torchvision and timm
        ("L/16", 1000, None, 304_326_632),  # torchvision
        ("B/32", 1000, None, 88_224_232),  # torchvision
        ("B/16", 21_843, "width", 103_186_515),  # the authors' ImageNet-21k files, this and those below
        ("R50+B/16", 21_843, "width", 115_277_971),
        ("R50x1", 21_843, None, 68_256_659),
        ("R50x3", 21_843, None, 345_399_315),
        ("R101x1", 21_843, None, 87_248_787),
        ("R152x2", 21_843, None, 321_728_979),
        ("R152x4", 21_843, None, 1_107_299_923),
    ):
        section = resolved({"variant": variant, "representation_size": hidden})
        assert count_parameters(section, image_size=(224, 224), num_classes=classes) == parameters


# ViT (2010.11929) Table 6: variant, epochs, exaFLOPs
TABLE_6 = [
    ("B/32", 7, 55),
    ("B/16", 7, 224),
    ("L/32", 7, 196),
    ("L/16", 7, 783),
    ("L/16", 14, 1567),
    ("H/14", 14, 4262),
    ("R50x1", 7, 50),
    ("R50x2", 7, 199),
    ("R101x1", 7, 96),
    ("R152x1", 7, 141),
    ("R152x2", 7, 563),
    ("R152x2", 14, 1126),
    ("R200x3", 14, 3306),
    ("R50+B/32", 7, 106),
    ("R50+B/16", 7, 274),
    ("R50+L/32", 7, 246),
    ("R50+L/16", 7, 859),
    ("R50+L/16", 14, 1668),
]


def products_with_padding(model: nn.Module) -> int:
    """Return the multiply-adds of an image's convolutions that multiply padding, which some counters leave out."""
    wasted = 0

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal wasted
        assert isinstance(module, StandardisedConv)
        inside, kernel = torch.ones(1, 1, *inputs[0].shape[-2:]), torch.ones(1, 1, *module.kernel_size)
        if module.same and module.stride[0] > 1:
            (top, bottom), (left, right) = (
                same_padding(size, side=module.kernel_size[0], stride=2) for size in inside.shape[-2:]
            )
            taps = F.conv2d(F.pad(inside, (left, right, top, bottom)), kernel, None, module.stride)
        else:
            taps = F.conv2d(inside, kernel, None, module.stride, module.padding)
        wasted += int(taps.numel() * kernel.numel() - taps.sum()) * module.in_channels * module.out_channels

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, StandardisedConv)]
    model(torch.empty(1, 3, 224, 224, device="meta"))
    for handle in handles:
        handle.remove()
    return wasted


@pytest.mark.parametrize(
    ("variant", "epochs", "exaflops"),
    [pytest.param(*row, marks=pytest.mark.slow if row[0].startswith(("R101", "R152", "R200")) else ()) for row in TABLE_6],
)
def test_the_papers_exaflops(variant: str, epochs: int, exaflops: int) -> None:
    hidden = None if "x" in variant else "width"
    section = resolved({"variant": variant, "representation_size": hidden})
    sizes: dict[str, Any] = {"image_size": (224, 224), "num_classes": JFT_CLASSES}
    images = epochs * JFT_IMAGES
    ours = training_flops(section, **sizes) * images / 1e18
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    assert f"| {variant}, {epochs} | {exaflops:,} | {ours:,.1f} (" in page
    if (variant, epochs) == ("R50+L/16", 7):
        exaflops = 1668 // 2  # the paper's 859 for 7 epochs is more than half of its 1668 for 14, of the same model
    assert ours == pytest.approx(exaflops, rel={"B/32": 0.025}.get(variant, 0.05 if "x" in variant else 0.018))
    if section.resnet_units:
        # the rest is padding, which the paper's counter leaves out, and rounding
        with torch.device("meta"):
            resnet = build_model(section, **sizes) if section.kind == "resnet" else build_stem(section)
        assert resnet is not None
        less = ours - 6 * products_with_padding(resnet) * images / 1e18
        assert less == pytest.approx(exaflops, rel=0.0075, abs=0.7)


def test_tokens() -> None:
    for variant, tokens in (("B/16", 197), ("R50+B/16", 197), ("R26+S/32", 50), ("R+Ti/16", 50), ("R50x1", None)):
        assert count_tokens(resolved({"variant": variant}), image_size=(224, 224)) == tokens
    assert count_tokens(resolved({**VIT, "registers": 3, "pool": "map"}), image_size=(16, 24)) == 3 + 6
