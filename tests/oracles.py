"""What tests against other libraries share: random weights that matter, and the comparison of logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitcli.model_config import ModelConfig, resolve_model
from vitcli.models import Model, build_model
from vitcli.pretrained import Pretrained

TOLERANCE = 1e-4
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@torch.no_grad()
def randomise(model: AnyModule, seed: int = 0) -> AnyModule:
    """Fill every parameter with random numbers that leave outputs near 1, so that each of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "token" in name or "pos" in name or "latent" in name or "probe" in name:
            parameter.copy_(0.5 * noise)
        elif parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.3 * noise + (1.0 if name.endswith(("weight", "gamma")) else 0.0))
    return model.eval()


def our_model(pretrained: Pretrained) -> Model:
    """Build the model that weights describe, with them; every tensor must be there and no more."""
    height, width = pretrained.preprocessing["image_size"]
    section = ModelConfig.model_validate(pretrained.model)
    model = build_model(section, image_size=(height, width), num_classes=len(pretrained.classes))
    model.load_state_dict(pretrained.state, strict=True)
    return model.eval()


def our_weights(image_size: tuple[int, int], num_classes: int = 7, **section: Any) -> Pretrained:
    """Return random weights of one of our models."""
    settings = resolve_model(ModelConfig(**section))
    model = randomise(build_model(settings, image_size=image_size, num_classes=num_classes), seed=1)
    return Pretrained(
        state={name: tensor.clone() for name, tensor in model.state_dict().items()},
        model=settings.model_dump(mode="json"),
        classes=[f"class {number}" for number in range(num_classes)],
        preprocessing={
            "image_size": list(image_size),
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.25, 0.3],
            "eval_crop_fraction": 0.8,
        },
        source_path=Path("ours.safetensors"),
        step=0,
        is_ema=False,
        manifest={"source": None, "seed": 0},
    )


@torch.no_grad()
def difference(pretrained: Pretrained, theirs: Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference of logits on random images, after a look that the images show in them."""
    height, width = pretrained.preprocessing["image_size"]
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))
    ours, expected = our_model(pretrained)(images), theirs(images)
    assert expected.shape == ours.shape
    assert (expected[0] - expected[1]).abs().max() > 0.05
    return float((ours - expected).abs().max())


def same_tensors(one: Pretrained, other: Pretrained) -> bool:
    """Tell whether two have the same tensors, bit for bit."""
    return one.state.keys() == other.state.keys() and all(torch.equal(one.state[name], other.state[name]) for name in one.state)
