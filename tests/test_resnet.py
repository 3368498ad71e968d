"""BiT ResNets and the hybrids' stems against timm, which has both; initial weights, padding, and no dead weights."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GroupNormAct, StdConv2d, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer_hybrid import _resnetv2
from torch import Tensor, nn

from vitcli.model_config import ModelConfig, receptive_field, resolve_model
from vitcli.models import ResNet, ResNetStem, VisionTransformer, build_model
from vitcli.models.resnet import StandardisedConv, same_padding, standardise
from vitcli.optim import param_groups

SIZES = [(64, 64), (33, 47)]  # px; odd ones show on which side padding is
TIMM_BIT: dict[str, Any] = {"conv_layer": partial(StdConv2d, eps=1e-8), "stem_type": "fixed"}


def filled(model: nn.Module) -> Any:
    """Give a model random weights: as built, its branches and its head are zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.5 * noise)
    return model.eval()


def as_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the head, timm's only difference: it is a 1x1 convolution there."""
    names = {"head.weight": "head.fc.weight", "head.bias": "head.fc.bias"}
    return {names.get(name, name): value[..., None, None] if name == "head.weight" else value for name, value in state.items()}


def largest_difference(ours: nn.Module, theirs: nn.Module, image_size: tuple[int, int]) -> float:
    images = torch.randn(2, 3, *image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = theirs(images), ours(images)
    assert got.shape == expected.shape and expected.abs().mean() > 0.1
    return float((got - expected).abs().max())


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize(("units", "width"), [((1, 1, 1, 1), 32), ((2, 1), 64), ((1, 3, 2), 32)])
def test_bit_is_timms(units: tuple[int, ...], width: int, image_size: tuple[int, int]) -> None:
    ours = filled(ResNet(image_size=image_size, units=units, width=width, num_classes=7, standardisation="timm"))
    channels = [4 * width * 2**block for block in range(len(units))]
    theirs = ResNetV2(list(units), channels=channels, stem_chs=width, num_classes=7, **TIMM_BIT).eval()
    theirs.load_state_dict(as_timm(ours.state_dict()))
    assert largest_difference(ours, theirs, image_size) < 1e-4


@pytest.mark.slow
def test_r50x1_is_timms() -> None:
    section = resolve_model(ModelConfig(variant="R50x1", weight_standardisation="timm"))
    ours = filled(build_model(section, image_size=(64, 64), num_classes=10))
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=10).eval()
    theirs.load_state_dict(as_timm(ours.state_dict()))
    assert largest_difference(ours, theirs, (64, 64)) < 1e-4


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("units", [(2, 2), (1, 2, 1)])
def test_stem_is_timms(units: tuple[int, ...], image_size: tuple[int, int]) -> None:
    ours = filled(ResNetStem(units=units, width=64, standardisation="timm", group_norm_eps=1e-5))
    theirs = _resnetv2(units).eval()
    theirs.load_state_dict(ours.state_dict())
    assert largest_difference(ours, theirs, image_size) < 1e-4
    assert theirs.num_features == ours.out_channels


@pytest.mark.parametrize("image_size", SIZES)
def test_root_alone_is_timms(image_size: tuple[int, int]) -> None:
    ours = filled(ResNetStem(units=(), standardisation="timm", group_norm_eps=1e-5))
    theirs = _resnetv2(()).eval()
    theirs.load_state_dict({name.removeprefix("stem."): value for name, value in ours.state_dict().items()})
    assert largest_difference(ours, theirs, image_size) < 1e-4
    assert (ours.out_channels, ours.stride) == (64, 4)


@pytest.mark.parametrize(("variant", "name"), [("R50+B/16", "vit_base_r50_s16_224"), ("R26+S/32", "vit_small_r26_s32_224")])
def test_hybrids_have_timms_names_and_shapes(variant: str, name: str) -> None:
    with torch.device("meta"):
        ours = build_model(resolve_model(ModelConfig(variant=variant)), image_size=(224, 224), num_classes=1000)
        theirs = timm.create_model(name, num_classes=1000)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert isinstance(ours, VisionTransformer)
    assert len(ours.units()) == 12 + (16 if variant == "R50+B/16" else 8)


@pytest.mark.parametrize("side", [64, pytest.param(96, marks=pytest.mark.slow)])
def test_hybrid_is_timms(side: int) -> None:
    section = ModelConfig(variant="R26+S/32", weight_standardisation="timm", group_norm_eps=1e-5, gelu="exact")
    ours = filled(build_model(resolve_model(section), image_size=(side, side), num_classes=10))
    theirs = timm.create_model("vit_small_r26_s32_224", num_classes=10, img_size=side).eval()
    theirs.load_state_dict(ours.state_dict())
    assert largest_difference(ours, theirs, (side, side)) < 1e-4


@pytest.mark.parametrize("kind", ["std", "bit", "timm"])
def test_standardised_kernels_are_the_formula(kind: Any) -> None:
    weight = torch.randn(5, 3, 2, 2, dtype=torch.float64) * torch.tensor([1e-6, 1e-3, 1.0, 10.0, 0.1])[:, None, None, None]
    centred = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    variance = centred.square().mean(dim=(1, 2, 3), keepdim=True)
    divisor = {"std": variance.sqrt() + 1e-5, "bit": (variance + 1e-10).sqrt(), "timm": (variance + 1e-8).sqrt()}[kind]
    torch.testing.assert_close(standardise(weight.float(), kind), (centred / divisor).float(), rtol=1e-4, atol=1e-5)
    assert standardise(weight.bfloat16(), kind).dtype == torch.float32
    still = torch.zeros(2, 3, 1, 1, requires_grad=True)
    standardise(still, kind).square().sum().backward()
    assert still.grad is not None and still.grad.isfinite().all()


@pytest.mark.parametrize(
    ("size", "side", "padding"), [(8, 3, (0, 1)), (7, 3, (1, 1)), (224, 7, (2, 3)), (33, 7, (3, 3)), (8, 1, (0, 0))]
)
def test_same_padding_is_tensorflows(size: int, side: int, padding: tuple[int, int]) -> None:
    assert same_padding(size, side=side, stride=2) == padding


@pytest.mark.parametrize("size", [8, 9])
def test_the_stem_pools_over_padding_of_minus_infinity_and_bit_of_zeros(size: int) -> None:
    stem, bit = ResNetStem(units=()), ResNet(image_size=(size, size), units=(1,), num_classes=2)
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        stem.stem.norm.bias.fill_(1.0)  # type: ignore[union-attr]  # the stem's root has one
        x = F.relu(stem.stem.norm(stem.stem.conv(images)))  # type: ignore[misc]
        before, after = same_padding(x.shape[-1], side=3, stride=2)
        expected = F.max_pool2d(F.pad(x, (before, after) * 2, value=-torch.inf), 3, 2)
        torch.testing.assert_close(stem(images), expected)
        pooled = bit.stem(images)
        torch.testing.assert_close(pooled, F.max_pool2d(F.pad(bit.stem.conv(images), (1, 1, 1, 1)), 3, 2))
        assert (pooled >= 0).sum() >= (F.max_pool2d(bit.stem.conv(images), 3, 2, 1) >= 0).sum()


@pytest.mark.parametrize("root", ["large", "small"])
def test_sizes_follow_the_units(root: Any) -> None:
    side = 4 if root == "large" else 1
    for units, channels, stride in (((), 32, side), ((1,), 128, side), ((1, 1, 1), 512, 4 * side)):
        stem = ResNetStem(units=units, width=32, root=root)
        assert (stem.out_channels, stem.stride) == (channels, stride)
        assert stem(torch.zeros(1, 3, 32, 64)).shape == (1, channels, 32 // stride, 64 // stride)


# ------------------------------------------------------------------------------------------------------- receptive field


def seen_by_the_middle(section: ModelConfig, side: int) -> tuple[int, int]:
    """Return how many rows and columns of an image the feature in the middle of the map depends on, norms aside."""
    model = filled(build_model(section, image_size=(side, side), num_classes=2))
    images = torch.rand(1, 3, side, side, requires_grad=True)
    x = images
    for part in (model.stem, *model.stages):
        for unit in (part,) if part is model.stem else part.blocks:
            for name in ("norm1", "norm2", "norm3"):
                if hasattr(unit, name):
                    setattr(unit, name, nn.Softplus())  # no mean over the image, and no ReLU that would hide a pixel
        x = part(x)
    x[0, :, x.shape[2] // 2, x.shape[3] // 2].sum().backward()
    assert images.grad is not None
    touched = images.grad[0].abs().sum(0) > 0
    return int(touched.any(1).sum()), int(touched.any(0).sum())


@pytest.mark.parametrize(
    ("root", "units", "spatial", "field"),
    [
        ("small", (1, 1), (0, 0), 3),
        ("small", (2, 2), (1, 0), 5),
        ("small", (2, 2), (1, 1), 7),
        ("small", (2, 2), None, 3 + 2 + 2 + 2 + 4),
        ("small", (1, 2, 1), (1, 2, 1), 3 + 2 + 2 + 4 + 4),
        ("small", (3, 4, 6), (1, 1, 1), 3 + 2 + 2 + 4),
        ("large", (1, 1), (1, 0), 11 + 8),
        ("large", (2, 1), None, 11 + 8 + 8 + 8),
    ],
)
def test_the_receptive_field_is_what_a_feature_depends_on(
    root: Any, units: tuple[int, ...], spatial: tuple[int, ...] | None, field: int
) -> None:
    settings = ModelConfig(
        kind="resnet", resnet_units=units, resnet_width=8, group_norm_groups=4, resnet_root=root, resnet_spatial_units=spatial
    )
    section = resolve_model(settings)
    assert receptive_field(section) == field
    found = seen_by_the_middle(section, side=64)
    if root == "small":
        assert found == (field, field)
    else:  # pooling takes the largest of nine, so a gradient shows most of it
        assert field - 4 <= min(found) and max(found) <= field


def test_bagnets_fields() -> None:
    """As published for R50 with a 3x3 root at full size: 9, 17 and 33 px (1904.00760), whose first block halves the sides.

    Here the second does, so that fields of the same units are about half as large.
    """
    fields = []
    for spatial in ((1, 1, 0, 0), (1, 1, 1, 0), (1, 1, 1, 1), None):
        section = ModelConfig(kind="resnet", resnet_units=(3, 4, 6, 3), resnet_root="small", resnet_spatial_units=spatial)
        fields.append(receptive_field(resolve_model(section)))
    assert fields[:3] == [7, 11, 19] and fields[3] > 100
    assert receptive_field(resolve_model(ModelConfig(variant="B/16"))) == 16


# ------------------------------------------------------------------------------------------------------------- training

VARIANTS: dict[str, dict[str, Any]] = {
    "resnet": {"kind": "resnet", "resnet_units": (1, 2, 1), "resnet_width": 32},
    "small resnet": {"kind": "resnet", "resnet_units": (2, 2), "resnet_width": 32, "resnet_root": "small"},
    "one block": {"kind": "resnet", "resnet_units": (1,), "resnet_width": 32, "weight_standardisation": "std"},
    "narrow resnet": {"kind": "resnet", "resnet_units": (1, 1), "resnet_width": 8, "group_norm_groups": 4},
    "1x1 kernels": {
        **{"kind": "resnet", "resnet_units": (2, 2), "resnet_width": 32, "resnet_root": "small"},
        "resnet_spatial_units": (1, 0),
    },
    "narrow hybrid": {
        **{"patch_size": 2, "width": 32, "depth": 1, "num_heads": 2, "resnet_units": (1, 1), "resnet_width": 16},
        **{"resnet_root": "small", "group_norm_groups": 8},
    },
    "hybrid": {"patch_size": 1, "width": 32, "depth": 1, "num_heads": 2, "resnet_units": (1, 2), "resnet_width": 32},
    "small hybrid": {
        **{"patch_size": 2, "width": 32, "depth": 1, "num_heads": 2, "resnet_units": (2, 1), "resnet_width": 32},
        **{"resnet_root": "small", "weight_standardisation": "bit"},
    },
    "root alone": {"patch_size": 4, "width": 32, "depth": 1, "num_heads": 2, "resnet_units": (), "resnet_width": 32},
}


def built(name: str) -> Any:
    return build_model(resolve_model(ModelConfig(**VARIANTS[name], head_bias=-3.0)), image_size=(32, 48), num_classes=5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_moves_every_parameter(name: str) -> None:
    model = filled(built(name)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    F.cross_entropy(model(torch.randn(4, 3, 32, 48)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    still = [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]
    assert not still


@pytest.mark.parametrize("name", VARIANTS)
def test_first_logits_are_the_heads_bias(name: str) -> None:
    torch.manual_seed(0)
    model = built(name)
    assert torch.equal(model(torch.randn(2, 3, 32, 48)), torch.full((2, 5), -3.0))
    assert model.features(torch.randn(2, 3, 32, 48)).std() > 0.02
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    model.reset_parameters()
    assert all(torch.equal(value, before[key]) for key, value in built_again(name).items())


def built_again(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return built(name).state_dict()  # type: ignore[no-any-return]  # `built` returns models of two kinds


def test_initial_weights_are_the_authors() -> None:
    torch.manual_seed(0)
    stem = ResNetStem(units=(1, 1), width=64)
    for unit in stem.units():
        assert not unit.norm3.weight.any() and (unit.norm2.weight == 1).all()  # type: ignore[operator, union-attr]
    kernel = stem.stages[1].blocks[0].conv2.weight  # type: ignore[index, union-attr]
    assert float(kernel.detach().std()) == pytest.approx((128 * 9) ** -0.5, rel=0.02)  # type: ignore[union-attr, operator, arg-type]
    bit = ResNet(image_size=(32, 32), units=(1,), num_classes=3)
    assert all((module.weight == 1).all() for module in bit.modules() if isinstance(module, nn.GroupNorm))
    assert not bit.head.weight.any() and not bit.random


def test_kernels_decay_and_norms_do_not() -> None:
    model = built("resnet")
    decayed, others = param_groups(model, weight_decay=0.1)
    convolutions = sum(isinstance(module, StandardisedConv) for module in model.modules())
    assert len(decayed["params"]) == convolutions + 1
    assert all("norm" in name or name == "head.bias" for name, _ in others["params"])


def test_a_photograph_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes images of \(32, 48\) px"):
        built("resnet")(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="32 groups"):
        ResNetStem(units=(1,), width=48)
    with pytest.raises(ValueError, match="needs a block"):
        ResNet(image_size=(32, 32), units=(), num_classes=2)
    with pytest.raises(ValueError, match="not resolved"):
        build_model(ModelConfig(variant="R50x1", kind="resnet"), image_size=(32, 32), num_classes=2)


def test_timms_norm_is_ours() -> None:
    x = torch.randn(2, 64, 5, 5).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(F.relu_(nn.GroupNorm(32, 64)(x)), GroupNormAct(64, num_groups=32)(x))
    assert StdConv2dSame(3, 4, 3, 2).same_pad  # the judge of the stems pads by the input's size
