"""The fixed permutation of patches: the same for all, harmless to whom it must be, and part of what a checkpoint is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.harness import vit
from vitcli.checkpoint import load_weights_file
from vitcli.config_file import load_config
from vitcli.errors import CheckpointError, ConfigError
from vitcli.model_config import ModelConfig, resolve_model
from vitcli.models import Model, VisionTransformer, build_model
from vitcli.models.permutation import PatchPermutation, patch_order
from vitcli.opened import open_model
from vitcli.views import tta_forward
from vitcli.weights.convert import convert, fitted
from vitcli.weights.load import load_start

SIZE = (32, 48)
VIT: dict[str, Any] = {"patch_size": 8, "width": 32, "depth": 2, "num_heads": 4}
RESNET: dict[str, Any] = {"kind": "resnet", "resnet_units": (1, 1), "resnet_width": 32, "resnet_root": "small"}
MLP: dict[str, Any] = {"kind": "mlp", "width": 32, "depth": 1}
ORDER_4_4 = [6, 0, 15, 3, 1, 7, 11, 4, 9, 12, 10, 5, 13, 8, 14, 2]


def build(settings: dict[str, Any], *, side: int | None, size: tuple[int, int] = SIZE) -> Model:
    """Build a model in float64 whose every weight matters."""
    section = resolve_model(ModelConfig(**settings))
    torch.manual_seed(0)
    model = build_model(section, image_size=size, num_classes=5, patch_permutation=side).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def pixels(batch: int, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_squares_move_as_a_whole_and_each_is_shown_once() -> None:
    images, side = pixels(2), 8
    shown = PatchPermutation(image_size=SIZE, side=side)(images)
    order = patch_order(rows=4, columns=6)
    assert sorted(order) == list(range(24))
    for place, patch in enumerate(order):
        (row, column), (old_row, old_column) = divmod(place, 6), divmod(patch, 6)
        expected = images[:, :, side * old_row :, side * old_column :][:, :, :side, :side]
        assert torch.equal(shown[:, :, side * row :, side * column :][:, :, :side, :side], expected)


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 4), (8, 8), (16, 16), (3, 5), (14, 14)])
def test_few_squares_stay_and_few_neighbours_do(rows: int, columns: int) -> None:
    order = np.array(patch_order(rows=rows, columns=columns))
    assert (order != np.arange(rows * columns)).any()
    grid = order.reshape(rows, columns)
    beside = (np.diff(grid, axis=1) == 1) & (grid[:, :-1] % columns < columns - 1)
    if rows * columns >= 16:
        assert (order == np.arange(len(order))).mean() < 0.2
        assert beside.mean() < 0.2
    assert patch_order(rows=rows, columns=columns) == order.tolist()


def test_the_order_is_as_it_was() -> None:
    """Checkpoints do not hold it."""
    assert patch_order(rows=4, columns=4) == ORDER_4_4


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "gap", "map"])
def test_a_transformer_with_learned_positions_is_unharmed(pool: str) -> None:
    plain, permuted = (build({**VIT, "pool": pool, "registers": 2}, side=side) for side in (None, 8))
    assert isinstance(plain, VisionTransformer) and isinstance(permuted, VisionTransformer)
    images, first = pixels(3), plain.num_prefix_tokens
    assert not torch.allclose(permuted(images), plain(images), rtol=1e-3)
    assert isinstance(plain.pos_embed, nn.Parameter) and isinstance(permuted.pos_embed, nn.Parameter)
    # what stands at a place now came from another: it gets that place's position
    permuted.pos_embed[:, first:] = plain.pos_embed[:, first:][:, patch_order(rows=4, columns=6)]
    torch.testing.assert_close(permuted(images), plain(images), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{**VIT, "pos_embed": "sincos2d"}, {**VIT, "pos_embed": "learned2d"}, {**VIT, "patch_size": 16}, RESNET, MLP]
)
def test_others_see_something_else(settings: dict[str, Any]) -> None:
    """A fixed position cannot follow a patch, nor can a patch of 16 px that is cut in four."""
    plain, permuted = (build(settings, side=side).float() for side in (None, 8))
    images = pixels(3).float()
    assert not torch.allclose(permuted(images), plain(images), rtol=1e-3)


@torch.no_grad()
def test_an_mlp_is_unharmed_too_and_any_model_without_positions() -> None:
    plain, permuted = (build(MLP, side=side) for side in (None, 8))
    assert permuted.permutation is not None and isinstance(plain.stem, nn.Linear) and isinstance(permuted.stem, nn.Linear)
    permuted.stem.weight.copy_(plain.stem.weight.unflatten(1, (3, -1))[:, :, permuted.permutation.order].flatten(1))
    torch.testing.assert_close(permuted(pixels(3)), plain(pixels(3)), rtol=1e-10, atol=1e-12)
    plain, permuted = (build({**VIT, "pos_embed": "none"}, side=side) for side in (None, 8))
    torch.testing.assert_close(permuted(pixels(3)), plain(pixels(3)), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_it_comes_after_everything_that_is_done_to_an_image() -> None:
    plain, permuted = (build(VIT, side=side).float() for side in (None, 8))
    seen = PatchPermutation(image_size=SIZE, side=8)
    images = pixels(3).float()
    mirrored = tta_forward("flip")(permuted, images)
    mean = (plain(seen(images)).softmax(1) + plain(seen(images.flip(3))).softmax(1)) / 2
    torch.testing.assert_close(mirrored.exp(), mean)


def test_it_adds_no_tensor_to_the_weights() -> None:
    plain, permuted = (build(VIT, side=side) for side in (None, 8))
    assert plain.state_dict().keys() == permuted.state_dict().keys()


# ---------------------------------------------------------------- settings


CONFIG = """
model: {patch_size: 8, width: 32, depth: 1, num_heads: 2}
data: {source: shapes, image_size: 16, patch_permutation: 8, shapes: {classes: 4, train_examples: 40, val_examples: 20}}
optim: {lr: 0.003}
train: {steps: 4, batch_size: 8}
"""


@pytest.mark.parametrize("side", [5, 16, 32])
def test_sides_that_cut_no_four_squares_are_refused(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError, match=rf"data.patch_permutation is {side}; it must cut the image of 16 x 16 px into 4"):
        load_config(tmp_path / "a.yaml", [f"data.patch_permutation={side}"])
    assert load_config(tmp_path / "a.yaml", ["data.patch_permutation=4"]).data.patch_permutation == 4


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("permuted")
    (folder / "a.yaml").write_text(CONFIG)
    result = vit("pretrain", "--config", "a.yaml", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "a"


def weights_of(run: Path) -> Path:
    return run / "checkpoints" / "step_00000004" / "model.safetensors"


def test_a_checkpoint_says_so_and_is_opened_so(run: Path) -> None:
    stored = load_weights_file(weights_of(run))
    assert stored.preprocessing["patch_permutation"] == 8
    opened = open_model(run, say=print)
    assert opened.model.permutation is not None
    assert opened.model.permutation.grid_size == (2, 2)
    assert open_model(run, overrides=["data.patch_permutation=null"], say=print).model.permutation is None
    with pytest.raises(CheckpointError, match="trained on patches in the order of a 2 x 2 grid, here it would be 4 x 4"):
        open_model(run, overrides=["data.image_size=32"], say=print)
    twice = open_model(run, overrides=["data.image_size=16"], say=print)
    torch.testing.assert_close(twice.model(torch.ones(1, 3, 16, 16)), opened.model(torch.ones(1, 3, 16, 16)))


def test_fine_tuning_keeps_it_or_is_told_otherwise(run: Path) -> None:
    start = load_weights_file(weights_of(run))
    section = resolve_model(ModelConfig.model_validate(start.model))
    for side, size in ((8, (16, 16)), (16, (32, 32)), (None, (32, 32))):
        load_start(build_model(section, image_size=size, num_classes=3, patch_permutation=side), start)
    with pytest.raises(CheckpointError, match="keep data.image_size 16 x 16 px and data.patch_permutation 8"):
        load_start(build_model(section, image_size=(32, 32), num_classes=3, patch_permutation=8), start)


def test_graphs_and_own_files_carry_it_and_others_refuse(run: Path, tmp_path: Path) -> None:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = open_model(run, say=print).model
    convert(run, tmp_path / "own.safetensors", to="vit", say=print)
    assert load_weights_file(tmp_path / "own.safetensors").preprocessing["patch_permutation"] == 8
    again = fitted(load_weights_file(tmp_path / "own.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(again.features(images), expected.features(images))
    for name, target in (("a.npz", "npz"), ("a.pth", "torchvision"), ("timm", "timm"), ("hf", "hf")):
        with pytest.raises(CheckpointError, match="it has no fixed permutation of patches"):
            convert(run, tmp_path / name, to=target, say=print)  # type: ignore[arg-type]  # one of them
    with pytest.raises(ConfigError, match="a learned order, which has no other size"):
        convert(run, tmp_path / "b.safetensors", to="vit", image_size=(32, 32), say=print)
