"""Optimisers, the learning rate and averages, against tables, plain formulas and torch's own schedulers."""

import math
from typing import Any, Literal

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnetv2 import ResNetV2
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from vitcli.config import OptimConfig
from vitcli.models.resnet import ResNet, ResNetStem
from vitcli.models.vit import VisionTransformer
from vitcli.optim import (
    Muon,
    build_optimizer,
    clip_gradients,
    ema_start,
    ema_update,
    layer_numbers,
    lr_at,
    orthogonal_factor,
    param_groups,
    trained_names,
    weight_norm,
)


def build(**changes: Any) -> VisionTransformer:
    """Build a tiny model with a representation layer."""
    torch.manual_seed(0)
    sizes = {"image_size": (16, 16), "patch_size": 8, "width": 16, "depth": 2, "mlp_dim": 32, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**sizes, "representation_size": 8, **changes})


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Tensor]:
    """Take a few steps on fixed data; return the weights."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        images = torch.randn(8, 3, 16, 16, generator=generator)
        labels = torch.randint(0, 5, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------------ groups


def test_only_kernels_decay() -> None:
    model = build()
    decayed, others = param_groups(model, weight_decay=0.1)
    kernels = {name for name, _ in decayed["params"]}
    blocks = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert kernels == {"patch_embed.proj.weight", "pre_logits.weight", "head.weight"} | blocks
    rest = {name for name, _ in others["params"]}
    assert {"cls_token", "pos_embed", "norm.weight", "norm.bias", "head.bias", "blocks.0.norm1.weight"} <= rest
    assert kernels | rest == {name for name, _ in model.named_parameters()}
    assert not kernels & rest
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out() -> None:
    model = build(representation_size=None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("head.")
    assert [[name for name, _ in group["params"]] for group in param_groups(model, weight_decay=0.1)] == [
        ["head.weight"],
        ["head.bias"],
    ]


# -------------------------------------------------------------------------------------------------------------- optimisers


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_update_equals_the_formula(name: Literal["adam", "adamw", "sgd"]) -> None:
    """Three steps of the update rules as published, in float64."""
    model = build().double()
    with torch.no_grad():
        model.head.weight.normal_()
    section = OptimConfig(name=name, lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6, momentum=0.9)
    optimizer = build_optimizer(section, model)
    decay = {n: g["weight_decay"] for g in param_groups(model, weight_decay=0.1) for n, _ in g["params"]}
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = {n: torch.zeros_like(p) for n, p in expected.items()}
    second = {n: torch.zeros_like(p) for n, p in expected.items()}
    for step in range(1, 4):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 16, 16, dtype=torch.float64)).square().mean().backward()
        for n, p in model.named_parameters():
            assert p.grad is not None
            gradient = p.grad.clone()
            if name == "adamw":
                expected[n] *= 1 - 0.01 * decay[n]
            else:
                gradient += decay[n] * expected[n]
            if name == "sgd":
                first[n] = 0.9 * first[n] + gradient
                expected[n] -= 0.01 * first[n]
            else:
                first[n] = 0.8 * first[n] + 0.2 * gradient
                second[n] = 0.95 * second[n] + 0.05 * gradient**2
                corrected = (second[n] / (1 - 0.95**step)).sqrt() + 1e-6
                expected[n] -= 0.01 * first[n] / (1 - 0.8**step) / corrected
        optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_steps_are_the_same_bits_again_and_after_a_saved_state(name: Any, tmp_path: Any) -> None:
    section = OptimConfig(name=name, lr=0.01, weight_decay=0.1)
    models = [build() for _ in range(3)]
    optimizers = [build_optimizer(section, model) for model in models]
    whole = take_steps(models[0], optimizers[0], 4)
    again = take_steps(models[1], optimizers[1], 4)
    assert all(torch.equal(whole[n], again[n]) for n in whole)

    torch.save(optimizers[1].state_dict(), tmp_path / "optimizer.pt")
    models[2].load_state_dict(models[1].state_dict())
    optimizers[2].load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    whole, resumed = take_steps(models[1], optimizers[1], 2), take_steps(models[2], optimizers[2], 2)
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_muon_splits_hidden_matrices_from_the_rest() -> None:
    groups = build_optimizer(OptimConfig(name="muon", weight_decay=0.1), build()).param_groups
    by_kind: dict[int, set[str]] = {}
    for group in groups:
        by_kind.setdefault(group["orthogonal"], set()).update(group["param_names"])
    assert by_kind[3] == {f"blocks.{i}.attn.qkv.weight" for i in (0, 1)}
    assert by_kind[1] == {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {"patch_embed.proj.weight", "head.weight", "blocks.0.attn.qkv.bias", "norm.weight"} <= by_kind[0]


def test_muon_takes_the_kernels_inside_a_resnets_units() -> None:
    """One kernel is a matrix of as many rows as output channels: the same step as for the matrix it is read as."""
    model = ResNet(image_size=(16, 16), units=(1, 1), num_classes=3, width=32)
    groups = build_optimizer(OptimConfig(name="muon"), model).param_groups
    names = {name: group["orthogonal"] for group in groups for name in group["param_names"]}
    inside = {name for name, parameter in model.named_parameters() if name.startswith("stages.") and parameter.ndim == 4}
    assert {name for name, count in names.items() if count} == inside
    assert len(inside) == 8
    assert not names["stem.conv.weight"]

    generator = torch.Generator().manual_seed(2)
    start, gradient = torch.randn(8, 4, 3, 3, generator=generator), torch.randn(8, 4, 3, 3, generator=generator)
    kernel, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    kernel.grad, matrix.grad = gradient.clone(), gradient.flatten(1).clone()
    for parameter in (kernel, matrix):
        group = {"params": [("w", parameter)], "weight_decay": 0.1, "orthogonal": 1}
        Muon([group], lr=0.02, momentum=0.9, betas=(0.9, 0.999), eps=1e-8).step()
    assert not torch.equal(kernel.detach(), start)
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), atol=1e-6, rtol=1e-6)


def test_muon_equals_torchs_on_a_matrix() -> None:
    """Torch computes in bfloat16, 8 bits: directions agree to a few per cent, and no better is asked."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((48, 16), (16, 48), (32, 32)):
        start = torch.randn(shape, generator=generator)
        ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        group = {"params": [("w", ours)], "weight_decay": 0.1, "orthogonal": 1}
        optimizers = [
            Muon([group], lr=0.02, momentum=0.9, betas=(0.9, 0.999), eps=1e-8),
            torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        ]
        for _ in range(4):
            gradient = torch.randn(shape, generator=generator)
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
        moved, expected = ours.detach() - start, theirs.detach() - start
        assert (moved - expected).norm() / expected.norm() < 0.03
        assert (moved + expected).norm() / expected.norm() > 1.9  # the same way, not the opposite one


def test_muon_moves_the_three_matrices_of_qkv_one_by_one() -> None:
    generator = torch.Generator().manual_seed(1)
    start, gradient = torch.randn(24, 8, generator=generator), torch.randn(24, 8, generator=generator)
    whole = nn.Parameter(start.clone())
    apart = [nn.Parameter(part.clone()) for part in start.chunk(3)]
    whole.grad = gradient.clone()
    for part, piece in zip(apart, gradient.chunk(3), strict=True):
        part.grad = piece.clone()
    settings = {"lr": 0.1, "momentum": 0.9, "betas": (0.9, 0.999), "eps": 1e-8}
    Muon([{"params": [whole], "weight_decay": 0.1, "orthogonal": 3}], **settings).step()  # type: ignore[arg-type]
    Muon([{"params": apart, "weight_decay": 0.1, "orthogonal": 1}], **settings).step()  # type: ignore[arg-type]
    torch.testing.assert_close(whole.detach(), torch.cat([part.detach() for part in apart]), atol=1e-6, rtol=1e-6)


def test_orthogonal_factor_flattens_singular_values_and_keeps_singular_vectors() -> None:
    matrices = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(1))
    factor = orthogonal_factor(matrices)
    values = torch.linalg.svdvals(factor)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    diagonal = u.mT @ factor @ vt.mT  # diagonal if the singular vectors are the same
    torch.testing.assert_close(diagonal, torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1)), atol=2e-4, rtol=0)
    torch.testing.assert_close(orthogonal_factor(matrices.mT), factor.mT, atol=1e-5, rtol=1e-5)


def test_muon_leaves_the_other_parameters_to_adamw() -> None:
    models = [build(), build()]
    for model, name in zip(models, ("muon", "adamw"), strict=True):
        take_steps(model, build_optimizer(OptimConfig(name=name, lr=0.01, weight_decay=0.1), model), 1)  # type: ignore[arg-type]
    first, second = (dict(model.named_parameters()) for model in models)
    assert torch.equal(first["patch_embed.proj.weight"], second["patch_embed.proj.weight"])
    assert torch.equal(first["head.weight"], second["head.weight"])
    assert not torch.equal(first["head.weight"], build().head.weight)


def test_state_names_its_parameters() -> None:
    groups = build_optimizer(OptimConfig(), build()).state_dict()["param_groups"]
    assert groups[0]["param_names"][0] == "patch_embed.proj.weight"


# ----------------------------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("linear", 0, 1 / 11),
        ("linear", 4, 5 / 11),
        ("linear", 9, 10 / 11),
        ("linear", 10, 1.0),
        ("linear", 60, 0.55),
        ("linear", 110, 0.1),
        ("linear", 500, 0.1),
        ("cosine", 0, 1 / 11),
        ("cosine", 10, 1.0),
        ("cosine", 35, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4),
        ("cosine", 60, 0.55),
        ("cosine", 110, 0.1),
        ("rsqrt", 10, 1.0),
        ("rsqrt", 40, 0.5),
        ("rsqrt", 90, 1 / 3),
        ("rsqrt", 100_000, 0.1),
        ("constant", 4, 5 / 11),
        ("constant", 10, 1.0),
        ("constant", 109, 1.0),
    ],
)
def test_lr_table(schedule: Literal["linear", "cosine", "rsqrt", "constant"], step: int, expected: float) -> None:
    lr = lr_at(step, lr=1.0, end_lr=0.1, total_steps=110, warmup_steps=10, schedule=schedule)
    assert lr == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "rsqrt", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 40])
def test_lr_is_positive_at_every_step_and_largest_after_the_warmup(schedule: Any, warmup_steps: int) -> None:
    rates = [lr_at(s, lr=2e-3, end_lr=0.0, total_steps=40, warmup_steps=warmup_steps, schedule=schedule) for s in range(40)]
    assert min(rates) > 0
    assert max(rates) == rates[min(warmup_steps, 39)]
    assert max(rates) <= 2e-3
    assert lr_at(warmup_steps, lr=2e-3, end_lr=0.0, total_steps=100, warmup_steps=warmup_steps, schedule=schedule) == 2e-3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_equals_torchs_schedulers(schedule: Literal["linear", "cosine"]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.03)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-4)
    else:
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=1e-4 / 0.03, total_iters=50)
    for step in range(50):
        ours = lr_at(step, lr=0.03, end_lr=1e-4, total_steps=50, warmup_steps=0, schedule=schedule)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


# ------------------------------------------------------------------------------------------------------ norms and averages


def test_clipping_scales_to_the_norm_and_reports_the_one_before() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((4,), 1.0)  # norm sqrt(12 + 4) = 4
    assert clip_gradients(parameters, None).item() == 4.0
    assert clip_gradients(parameters, 8.0).item() == 4.0
    assert torch.equal(parameters[0].grad, torch.full((3,), 2.0))
    assert clip_gradients(iter(parameters), 1.0).item() == 4.0
    torch.testing.assert_close(parameters[0].grad, torch.full((3,), 0.5))
    torch.testing.assert_close(parameters[1].grad, torch.full((4,), 0.25))


def test_weight_norm() -> None:
    model = build()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(weight_norm(model.parameters()), expected)
    assert not weight_norm(model.parameters()).requires_grad


def test_ema_is_the_weighted_mean_of_the_weights_seen() -> None:
    model = build()
    ema = ema_start(model)
    expected = {name: tensor.double() for name, tensor in ema.items()}
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        ema_update(ema, model, 0.9)
        expected = {name: 0.9 * tensor + 0.1 * model.state_dict()[name].double() for name, tensor in expected.items()}
    for name in ema:
        torch.testing.assert_close(ema[name].double(), expected[name], atol=1e-6, rtol=1e-5)
    assert not any(tensor.requires_grad for tensor in ema.values())


# --------------------------------------------------------------------------------------------- layer decay and freezing


def timms_scales(model: nn.Module) -> dict[str, float]:
    """Return learning-rate factor and weight decay of each of a timm model's parameters, by its name and which it is."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(
        model, weight_decay=0.1, layer_decay=0.75, no_weight_decay_list=("pos_embed", "cls_token", "reg_token")
    )
    keys = ("lr_scale", "weight_decay")
    return {f"{names[id(p)]} {key}": group[key] for group in groups for p in group["params"] for key in keys}


def our_scales(model: nn.Module) -> dict[str, float]:
    """Return the same of one of our models."""
    groups = param_groups(model, weight_decay=0.1, layer_decay=0.75)
    keys = ("lr_scale", "weight_decay")
    return {f"{name} {key}": group[key] for group in groups for name, _ in group["params"] for key in keys}


def test_layer_decay_is_timms() -> None:
    theirs = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2, num_classes=5, reg_tokens=2
    )
    assert our_scales(build(depth=3, representation_size=None, registers=2)) == pytest.approx(timms_scales(theirs))


def test_layer_decay_of_a_resnet_is_timms() -> None:
    theirs = ResNetV2(layers=(2, 1), channels=(128, 256), stem_chs=32, num_classes=5, preact=True, stem_type="fixed")
    expected = {name.replace("head.fc.", "head."): scales for name, scales in timms_scales(theirs).items()}
    assert our_scales(ResNet(image_size=(32, 32), units=(2, 1), width=32, num_classes=5)) == pytest.approx(expected)


def test_layers_of_other_models_have_their_place() -> None:
    stem = ResNetStem(units=(1,), width=32, root="small")
    hybrid = build(backbone=stem, patch_size=2, representation_size=8)
    numbers = layer_numbers(name for name, _ in hybrid.named_parameters())
    assert {numbers[name] for name in numbers if name.startswith(("patch_embed.", "cls_token", "pos_embed"))} == {0}
    assert (numbers["blocks.0.norm1.weight"], numbers["blocks.1.mlp.fc2.bias"], numbers["norm.weight"]) == (1, 2, 2)
    assert {numbers[name] for name in numbers if name.startswith(("pre_logits.", "head."))} == {3}
    mapped = layer_numbers(name for name, _ in build(pool="map", pos_embed="learned2d").named_parameters())
    assert mapped["pos_embed_rows"] == 0 and mapped["attn_pool.latent"] == mapped["head.weight"] == 3
    axial = build(pool="gap", attention="axial", depth=2)
    layers = layer_numbers(name for name, _ in axial.named_parameters())
    assert layers["blocks.1.rows.attn.qkv.weight"] == layers["blocks.1.columns.attn.qkv.weight"] == 2


def test_freezing_does_not_change_which_layer_is_which() -> None:
    model = build(depth=4)
    whole = our_scales(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(("head.", "blocks.3."))
    assert our_scales(model) == {name: scale for name, scale in whole.items() if name.startswith(("head.", "blocks.3."))}


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_layer_moves_by_its_own_learning_rate(name: Any) -> None:
    """One step with layer decay against one for each layer alone, at that layer's learning rate."""

    def with_a_head() -> VisionTransformer:
        model = build()
        nn.init.normal_(model.head.weight, std=0.1)  # one of zeros would stop every gradient
        return model

    section = OptimConfig(name=name, lr=0.01, weight_decay=0.1, layer_decay=0.5)
    model = with_a_head()
    optimizer = build_optimizer(section, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
    after = take_steps(model, optimizer, 1)
    numbers = layer_numbers(name for name, _ in model.named_parameters())
    for layer in range(4):
        alone = with_a_head()
        same = section.model_copy(update={"lr": 0.01 * 0.5 ** (3 - layer), "layer_decay": 1.0})
        moved = take_steps(alone, build_optimizer(same, alone), 1)
        for each in (each for each, number in numbers.items() if number == layer):
            torch.testing.assert_close(after[each], moved[each])


def test_without_layer_decay_groups_are_as_ever() -> None:
    assert [sorted(group) for group in param_groups(build(), weight_decay=0.1)] == [["params", "weight_decay"]] * 2


def test_patterns_name_what_is_frozen() -> None:
    names = [name for name, _ in build(representation_size=None).named_parameters()]
    assert trained_names(names, head_alone=False, frozen=[]) == names
    assert trained_names(names, head_alone=True, frozen=[]) == ["head.weight", "head.bias"]
    left = trained_names(names, head_alone=False, frozen=["patch_embed.*", "blocks.[0-1].*", "*_embed", "cls_token"])
    assert left == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert trained_names(names, head_alone=True, frozen=["head.bias"]) == ["head.weight"]
