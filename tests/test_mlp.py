"""The MLP on flattened pixels: its formula, its initial weights, its parts by name, and what it cannot do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitcli.checkpoint import save_weights_file
from vitcli.errors import CheckpointError
from vitcli.model_config import ModelConfig, resolve_model
from vitcli.models import PixelMlp, build_model
from vitcli.optim import layer_numbers, param_groups
from vitcli.pretrained import Pretrained
from vitcli.recipes import finetune_recipe
from vitcli.weights.convert import convert, fitted
from vitcli.weights.load import load_start

SIZE = (8, 12)
MLP: dict[str, Any] = {"kind": "mlp", "width": 16, "depth": 3, "mlp_dim": 20, "head_bias": -2.0}


def build(size: tuple[int, int] = SIZE, **changes: Any) -> PixelMlp:
    torch.manual_seed(0)
    model = build_model(resolve_model(ModelConfig(**{**MLP, **changes})), image_size=size, num_classes=5)
    assert isinstance(model, PixelMlp)
    return model


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def pretrained(model: PixelMlp) -> Pretrained:
    return Pretrained(
        state=model.state_dict(),
        model=resolve_model(ModelConfig(**MLP)).model_dump(mode="json"),
        classes=list("abcde"),
        preprocessing={"image_size": list(SIZE), "mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop_fraction": None},
        source_path=Path("mlp.safetensors"),
        step=1,
        is_ema=False,
        manifest={"source": "shapes", "seed": 0},
    )


@torch.no_grad()
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_it_is_the_formula(gelu: str) -> None:
    model = build(gelu=gelu).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    state = model.state_dict()

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (16,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    x = dense(images().reshape(4, -1), "stem")
    for block in range(3):
        hidden = dense(norm(x, f"blocks.{block}.norm"), f"blocks.{block}.mlp.fc1")
        x = x + dense(F.gelu(hidden, approximate="tanh" if gelu == "tanh" else "none"), f"blocks.{block}.mlp.fc2")
    torch.testing.assert_close(model.features(images()), norm(x, "norm"))
    torch.testing.assert_close(model(images()), dense(norm(x, "norm"), "head"))


def test_first_logits_and_what_learns() -> None:
    model = build()
    assert torch.equal(model(images()), torch.full((4, 5), -2.0))
    assert 0.5 < model.features(images()).std().item() < 1.5
    assert float(model.stem.weight.detach().std()) == pytest.approx(model.stem.in_features**-0.5, rel=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # the head is zero at first
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    assert not [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    numbers = layer_numbers(before)
    assert (numbers["stem.weight"], numbers["blocks.0.norm.bias"], numbers["norm.weight"], numbers["head.bias"]) == (0, 1, 3, 4)
    decayed, _ = param_groups(model, weight_decay=0.1)
    assert len(decayed["params"]) == 1 + 2 * 3 + 1
    assert (model.random, build(dropout=0.1).random, len(model.units())) == (False, True, 3)


def test_it_has_one_size(tmp_path: Path) -> None:
    start = pretrained(build())
    load_start(build(), start)
    with pytest.raises(CheckpointError, match="an MLP has weights for each pixel and cannot be resized: stem.weight"):
        load_start(build(size=(16, 12)), start)
    with pytest.raises(ValueError, match=r"takes images of \(8, 12\) px"):
        build()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="not resolved"):
        build_model(ModelConfig(kind="mlp"), image_size=SIZE, num_classes=2)
    large = {"image_size": [224, 224]}
    for dataset, picture_side in (("cifar10", None), ("folder:photos", 500)):
        recipe = finetune_recipe(
            dataset, model=start.model, preprocessing=large, num_examples=100, forward_flops=1, flops_per_second=1e12,
            picture_side=picture_side,
        )  # fmt: skip
        assert recipe.settings["data"]["image_size"] == [224, 224]


def test_other_libraries_have_none(tmp_path: Path) -> None:
    start = pretrained(build())
    save_weights_file(tmp_path / "mlp.safetensors", start)
    for name, target in (("a.npz", "npz"), ("a.pth", "torchvision"), ("timm", "timm"), ("hf", "hf")):
        with pytest.raises(CheckpointError, match="it has no MLP on pixels"):
            convert(tmp_path / "mlp.safetensors", tmp_path / name, to=target, say=print)  # type: ignore[arg-type]  # one of them
    convert(tmp_path / "mlp.safetensors", tmp_path / "again.safetensors", to="vit", say=print)
    with torch.no_grad():
        torch.testing.assert_close(fitted(start)(images()), build().eval()(images()))
