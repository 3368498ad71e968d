"""Weights into another model: positions against scipy and timm, and every tensor reported or refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from tests.harness import Result, vit
from vitcli.checkpoint import write_weights
from vitcli.errors import CheckpointError
from vitcli.model_config import ModelConfig, resolve_model
from vitcli.models import build_model
from vitcli.models.vit import VisionTransformer
from vitcli.opened import open_model
from vitcli.pretrained import Pretrained
from vitcli.weights import check_architecture, load_start, load_weights, resize_pos_embed
from vitcli.weights.official import write_official
from vitcli.weights.open import open_weights

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


def test_weights_of_a_grid_that_is_no_square_are_opened_at_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(image_size=(16, 48), num_classes=3)  # 2 x 6 patches
    section = {"patch_size": 8, "width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2, "representation_size": None}
    preprocessing = {"image_size": [16, 48], "mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop_fraction": 1.0}
    found = Pretrained(source.state_dict(), section, ["a", "b", "c"], preprocessing, Path("w"), 0, False, {"source": "digits"})
    monkeypatch.setattr("vitcli.opened.open_weights", lambda ckpt, say: found)
    opened = open_model(Path("w"), overrides=["data.image_size=[32, 48]"], say=print)
    before, after = source.state_dict()["pos_embed"], opened.model.state_dict()["pos_embed"]
    expected = resize_pos_embed(before, old_grid=(2, 6), new_grid=(4, 6), num_prefix_tokens=1)
    assert torch.equal(after, expected)


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


# ------------------------------------------------------------------------------------------------------- every kind of model

TINY: dict[str, Any] = {"patch_size": 8, "width": 64, "depth": 2, "mlp_dim": 32, "num_heads": 2}


def pretrained(image_size: tuple[int, int] = (32, 32), **settings: Any) -> Pretrained:
    """Return random weights of a model and what they are."""
    section = resolve_model(ModelConfig(**({} if settings.get("kind") == "resnet" else TINY) | settings))
    model = build_model(section, image_size=image_size, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    about = {"image_size": list(image_size), "mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop_fraction": None}
    state, classes = model.state_dict(), [str(number) for number in range(5)]
    described = section.model_dump(mode="json")
    return Pretrained(state, described, classes, about, Path("start.npz"), 0, False, {"source": None, "seed": 0}, named=False)


def load_into(start: Pretrained, image_size: tuple[int, int]) -> tuple[Any, Any]:
    model = build_model(ModelConfig(**start.model), image_size=image_size, num_classes=3)
    return model, load_start(model, start)


def test_positions_of_every_layer_are_resized_each_for_itself() -> None:
    start = pretrained(pos_embed_at="every_layer", registers=3)
    model, report = load_into(start, (48, 24))
    assert report.summary().startswith(
        f"{len(start.state)} tensors: {len(start.state) - 3} taken, 1 resized: pos_embed 4x4 -> 6x3"
    )
    for block in range(2):
        expected = resize_pos_embed(
            start.state["pos_embed"][block : block + 1], old_grid=(4, 4), new_grid=(6, 3), num_prefix_tokens=1
        )
        assert torch.equal(model.pos_embed[block : block + 1], expected)


@pytest.mark.parametrize("at", ["stem", "every_layer"])
def test_learned_2d_positions_are_resized_along_each_axis_as_scipy_does(at: str) -> None:
    start = pretrained(pos_embed="learned2d", pos_embed_at=at)
    model, report = load_into(start, (56, 24))
    assert report.resized == ["pos_embed_rows", "pos_embed_columns"]
    assert "pos_embed_rows, pos_embed_columns 4x4 -> 7x3" in report.summary()
    for name, new in (("pos_embed_rows", 7), ("pos_embed_columns", 3)):
        zoomed = ndimage.zoom(start.state[name].numpy(), (1, new / 4, 1), order=1)
        np.testing.assert_allclose(getattr(model, name).detach().numpy(), zoomed, atol=1e-6)


def test_relative_positions_are_not_resized() -> None:
    start = pretrained(pos_embed="relative")
    with pytest.raises(CheckpointError, match=r"relative positions .* cannot be resized: blocks.0.attn.relative .*image size"):
        load_into(start, (48, 48))
    assert load_into(start, (32, 32))[1].resized == []


def test_stems_count_for_the_grid_and_resnets_have_none() -> None:
    stem = {"patch_size": 1, "resnet_units": (1, 1), "resnet_width": 32}
    report = load_into(pretrained((32, 64), **stem), (64, 64))[1]
    assert report.grids == ((4, 8), (8, 8))
    start = pretrained(kind="resnet", resnet_units=(1, 1), resnet_width=32)
    report = load_into(start, (64, 48))[1]
    assert report.summary() == f"{len(start.state)} tensors: {len(start.state) - 2} taken, 2 new: head; 2 dropped: head"


def test_the_report_names_every_tensor() -> None:
    start = pretrained()
    report = load_into(start, (48, 48))[1]
    written = json.loads(json.dumps(report.as_dict()))
    assert written["summary"] == report.summary()
    assert set(written["taken"] + written["resized"] + written["new"]) == set(start.state)
    assert (written["old_grid"], written["new_grid"]) == ([4, 4], [6, 6])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 32}, r"the weights are a ViT of width 64, depth 2, patch 8; the config says a ViT of width 32, depth 2"),
        ({"gelu": "exact"}, r"for these weights set model.gelu=\"tanh\", not \"exact\""),
        ({"num_heads": 4}, r"model.num_heads=2, not 4"),
        ({"layer_norm_eps": 1e-5}, r"model.layer_norm_eps=1e-06, not 1e-05"),
        ({"layer_scale": 0.1}, r"model.layer_scale=false, not true"),
        ({"patch_size": 1, "resnet_units": (1, 1), "resnet_width": 32}, "after a ResNet stem of units 1-1"),
    ],
)
def test_another_architecture_is_refused_with_both_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        check_architecture(pretrained(), resolve_model(ModelConfig(**{**TINY, **settings})))
    assert "\n" not in str(caught.value)


def test_what_a_run_may_choose_anew_is_no_other_architecture() -> None:
    free = {"dropout": 0.1, "stochastic_depth": 0.1, "representation_size": 7, "head_bias": -10.0}
    check_architecture(pretrained(), resolve_model(ModelConfig(**TINY, **free)))
    check_architecture(pretrained(layer_scale=0.1), resolve_model(ModelConfig(**TINY, layer_scale=1e-5)))
    stem = {"patch_size": 1, "resnet_units": (1, 1), "resnet_width": 32}
    written_out = {"weight_standardisation": "std", "group_norm_eps": 1e-6}
    check_architecture(pretrained(**stem), resolve_model(ModelConfig(**{**TINY, **stem, **written_out})))


# --------------------------------------------------------------------------------------------------------------- our own files


def own_file(path: Path, start: Pretrained, **changes: Any) -> Path:
    """Write a signed weights file, with a description that lacks what is None in `changes`."""
    about = {
        "model": start.model,
        "classes": start.classes,
        "preprocessing": start.preprocessing,
        "source": "shapes",
        "seed": 0,
    }
    about = {**about, "layout": 1, "step": 3, "is_ema": False, **changes}
    write_weights(path, start.state, about=about)
    return path


def test_files_of_ours_open_with_a_whole_model_section(tmp_path: Path) -> None:
    start = pretrained()
    before = {
        key: start.model[key] for key in ("variant", "patch_size", "width", "depth", "mlp_dim", "num_heads", "pool", "gelu")
    }
    found = open_weights(
        own_file(tmp_path / "a.safetensors", start, model=before)
    )  # as written before there were more settings
    assert found.model == start.model
    assert found.named and found.step == 3
    folder = tmp_path / "folder"
    folder.mkdir()
    own_file(folder / "model.safetensors", start)
    assert open_weights(folder).step == 3


@pytest.mark.parametrize("key", ["patch_size", "width", "depth", "mlp_dim", "num_heads"])
def test_a_signed_file_that_lacks_a_size_is_one_line(key: str, tmp_path: Path) -> None:
    start = pretrained()
    model = {name: value for name, value in start.model.items() if name != key}
    path = own_file(tmp_path / "a.safetensors", start, model=model)
    for command in (("eval",), ("finetune", "--dataset", "shapes")):
        fails_with(vit(command[0], "--ckpt", str(path), *command[1:], cwd=tmp_path), str(path), f"lacks {key}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**TINY, "colour": 3}}, "colour: Extra inputs"),
        ({"model": {**TINY, "width": "wide"}}, "width: "),
        ({"preprocessing": {"image_size": [32, 32], "mean": [0.5] * 3}}, "`preprocessing` lacks std, eval_crop_fraction"),
        ({"data": 5}, "`data` must be a dict"),
    ],
)
def test_a_signed_file_that_says_nonsense_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = own_file(tmp_path / "a.safetensors", pretrained(), **changes)
    fails_with(vit("eval", "--ckpt", str(path), cwd=tmp_path), str(path), message)


# ----------------------------------------------------------------------------------------------------------- the command line

DATA = "data: {source: shapes, image_size: 16, shapes: {classes: 5, train_examples: 40, val_examples: 20}}"
SHAPES = ("--set", "data.shapes.classes=5")


def fails_with(result: Result, *said: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    for words in said:
        assert words in last, last


def succeeds(result: Result) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """An .npz of the authors' layout: 16 px, patches of 8, 10 classes without names."""
    start = pretrained((16, 16))
    head = {"head.weight": torch.randn(10, 64), "head.bias": torch.zeros(10)}
    classes = [str(number) for number in range(10)]
    path = tmp_path / "B_8.npz"
    write_official(replace(start, state={**start.state, **head}, classes=classes), path)
    return path


def test_evaluating_a_foreign_file(foreign: Path) -> None:
    fails_with(vit("eval", "--ckpt", str(foreign), cwd=foreign.parent), "--dataset")
    said = succeeds(vit("eval", "--ckpt", str(foreign), "--dataset", "digits", cwd=foreign.parent))
    assert "does not name its 10 classes; taken as digits's, by their numbers" in said
    fails_with(
        vit("eval", "--ckpt", str(foreign), "--dataset", "shapes", cwd=foreign.parent), "has 10 classes and does not name"
    )


def test_training_from_a_foreign_file_writes_the_full_report(foreign: Path) -> None:
    folder = foreign.parent
    (folder / "tiny.yaml").write_text(f"{DATA}\ntrain: {{steps: 2, batch_size: 8}}\n")
    tune = ("finetune", "--ckpt", str(foreign), "--dataset", "shapes", "--config", "tiny.yaml")
    said = succeeds(vit(*tune, "out=tuned", "data.image_size=24", cwd=folder))
    assert "1 resized: pos_embed 2x2 -> 3x3, 2 new: head; 2 dropped: head" in said
    report = json.loads((folder / "tuned" / "weights_report.json").read_text())
    assert report["source"] == str(foreign)
    assert report["resized"] == ["pos_embed"]
    assert set(report["new"]) == {"head.weight", "head.bias"} == set(report["dropped"])
    fails_with(vit(*tune, "model.gelu=exact", cwd=folder), "model.gelu", '"exact", but the checkpoint')
    fails_with(vit(*tune, "model.depth=3", cwd=folder), "model.depth is 3, but the checkpoint")


def test_a_config_of_another_architecture_than_its_weights(foreign: Path) -> None:
    folder = foreign.parent
    model = "model: {patch_size: 8, width: 32, depth: 1, num_heads: 2}"
    (folder / "other.yaml").write_text(f"{model}\n{DATA}\ntrain: {{steps: 2, batch_size: 8}}\nckpt: {foreign}\n")
    expected = ("the weights are a ViT of width 64, depth 2, patch 8; the config says a ViT of width 32, depth 1, patch 8",)
    fails_with(vit("pretrain", "--config", "other.yaml", cwd=folder), *expected)
    fails_with(vit("pretrain", "--config", "other.yaml", "--dry-run", cwd=folder), *expected)
    assert not (folder / "runs").exists() or not list((folder / "runs").glob("*/manifest.json"))
