"""Weights into another model: positions against scipy and timm, and every tensor reported or refused."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.models.vit import VisionTransformer
from vitcli.weights import load_weights, resize_pos_embed

GRIDS = [((14, 14), (24, 24)), ((4, 4), (8, 8)), ((14, 14), (7, 7)), ((6, 10), (9, 5)), ((5, 5), (16, 11)), ((3, 4), (1, 8))]


def build(**changes: Any) -> VisionTransformer:
    """Build a tiny model whose every tensor is random."""
    sizes = {"image_size": (32, 32), "patch_size": 8, "width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(**{**sizes, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def copied(model: VisionTransformer) -> dict[str, Tensor]:
    """Return the model's tensors as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --------------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize("prefix", [0, 1])
def test_zoom_equals_scipy(old: tuple[int, int], new: tuple[int, int], prefix: int) -> None:
    positions = torch.randn(1, prefix + old[0] * old[1], 8)
    grid = positions[0, prefix:].reshape(*old, 8).numpy()
    zoomed = ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)  # as google-research/vision_transformer does
    resized = resize_pos_embed(positions, old_grid=old, new_grid=new, num_prefix_tokens=prefix)
    assert resized.dtype == torch.float32
    assert torch.equal(resized[:, :prefix], positions[:, :prefix])
    np.testing.assert_allclose(resized[0, prefix:].numpy(), zoomed.reshape(-1, 8), atol=1e-6)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_bicubic_equals_timm(old: tuple[int, int], new: tuple[int, int]) -> None:
    positions = torch.randn(1, 1 + old[0] * old[1], 8)
    theirs = resample_abs_pos_embed(positions, new_size=list(new), old_size=list(old), num_prefix_tokens=1)
    ours = resize_pos_embed(positions, old_grid=old, new_grid=new, num_prefix_tokens=1, method="bicubic")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_two_methods_differ_and_the_same_grid_changes_nothing() -> None:
    positions = torch.randn(1, 17, 8)
    sizes: dict[str, Any] = {"old_grid": (4, 4), "num_prefix_tokens": 1}
    zoom, bicubic = (resize_pos_embed(positions, new_grid=(6, 6), method=method, **sizes) for method in ("zoom", "bicubic"))
    assert (zoom - bicubic).abs().max() > 1e-2
    assert torch.equal(resize_pos_embed(positions, new_grid=(4, 4), **sizes), positions)


def test_positions_of_another_grid_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(1, 26, D\), got \(1, 17, 8\)"):
        resize_pos_embed(torch.zeros(1, 17, 8), old_grid=(5, 5), new_grid=(6, 6), num_prefix_tokens=1)


# ----------------------------------------------------------------------------------------------------------------- loading


def test_same_model_takes_everything() -> None:
    source, model = build(), build()
    report = load_weights(model, source.state_dict(), reset_head=False)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert report.taken == list(model.state_dict())
    assert not (report.resized)
    assert not (report.new)
    assert not (report.dropped)
    assert report.summary() == "20 tensors: 20 taken"


def test_fine_tuning_at_a_higher_non_square_resolution() -> None:
    source = build(representation_size=12)
    model = build(image_size=(48, 64), num_classes=3)
    before, state = copied(model), copied(source)
    report = load_weights(model, state, reset_head=True, old_grid=(4, 4))
    after = model.state_dict()
    assert report.summary() == "20 tensors: 17 taken, 1 resized: pos_embed 4x4 -> 6x8, 2 new: head; 4 dropped: pre_logits, head"
    assert report.resized == ["pos_embed"]
    assert report.new == ["head.weight", "head.bias"]
    assert report.dropped == ["pre_logits.weight", "pre_logits.bias", "head.weight", "head.bias"]
    for name in report.taken:
        assert torch.equal(after[name], source.state_dict()[name])
    for name in report.new:
        assert torch.equal(after[name], before[name])
    expected = resize_pos_embed(state["pos_embed"], old_grid=(4, 4), new_grid=(6, 8), num_prefix_tokens=1)
    assert torch.equal(after["pos_embed"], expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in source.state_dict().items()), "the input was changed"


def test_head_of_equal_shape_is_still_replaced() -> None:
    source, model = build(), build()
    before = copied(model)
    report = load_weights(model, source.state_dict(), reset_head=True)
    assert torch.equal(model.state_dict()["head.weight"], before["head.weight"])
    assert report.new == ["head.weight", "head.bias"] == report.dropped


def test_new_head_may_bring_or_keep_the_representation_layer() -> None:
    report = load_weights(build(representation_size=12), build().state_dict(), reset_head=True)
    assert report.new == ["pre_logits.weight", "pre_logits.bias", "head.weight", "head.bias"]
    source, model = build(representation_size=12), build(representation_size=12)
    report = load_weights(model, source.state_dict(), reset_head=True)
    assert "pre_logits.weight" in report.taken
    headless = {name: tensor for name, tensor in build().state_dict().items() if not name.startswith("head.")}
    assert load_weights(build(), headless, reset_head=True).dropped == []


def test_a_square_grid_is_recognised_and_equal_counts_in_another_grid_are_resized() -> None:
    source = build()
    report = load_weights(build(image_size=(48, 48)), source.state_dict(), reset_head=True)
    assert report.grids == ((4, 4), (6, 6))
    wide = build(image_size=(16, 64))  # 2 x 8 patches: as many as 4 x 4
    report = load_weights(wide, source.state_dict(), reset_head=False, old_grid=(4, 4))
    assert report.resized == ["pos_embed"]
    assert not torch.equal(wide.state_dict()["pos_embed"], source.state_dict()["pos_embed"])


def test_values_are_converted_to_the_models_dtype() -> None:
    source, model = build().to(torch.bfloat16), build()
    load_weights(model, source.state_dict(), reset_head=False)
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.norm.weight, source.norm.weight.float())


def test_sincos_models_and_gap_models_load() -> None:
    source = build(pos_embed="sincos2d", pool="gap")
    report = load_weights(build(pos_embed="sincos2d", pool="gap", image_size=(64, 64)), source.state_dict(), reset_head=True)
    assert not report.resized
    assert "cls_token" not in report.taken


@pytest.mark.parametrize(
    ("source", "reset_head", "message"),
    [
        ({"num_classes": 7}, False, r"2 of another shape: head.weight \(7, 16\) where the model has \(5, 16\), .*new head"),
        ({"representation_size": 16}, False, "2 not in the model: pre_logits.weight, pre_logits.bias; start with a new head"),
        ({"depth": 2}, True, r"12 not in the model: blocks.1.* and 6 more; use the model settings"),
        ({"width": 32}, True, r"of another shape: cls_token \(1, 1, 32\) where the model has \(1, 1, 16\)"),
        ({"pos_embed": "sincos2d"}, True, "1 missing: pos_embed"),
        ({"mlp_dim": 16}, True, "3 of another shape: blocks.0.mlp.fc1.weight"),
        ({"pool": "gap"}, True, "1 missing: cls_token"),
        ({"image_size": (32, 40)}, True, r"20 patches are no square"),
    ],
)
def test_what_was_not_asked_for_is_refused_and_changes_nothing(source: dict[str, Any], reset_head: bool, message: str) -> None:
    model = build()
    before = copied(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(model, build(**source).state_dict(), reset_head=reset_head)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_wrong_grid_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"cannot resize pos_embed: .*\(5, 5\) grid"):
        load_weights(build(), build().state_dict(), reset_head=True, old_grid=(5, 5))
