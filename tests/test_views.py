"""Test-time augmentation: what the views are, and that their probabilities are averaged; moved images."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import five_crop

from vitcli.errors import ConfigError
from vitcli.views import TTA_KINDS, five_crops, moved_forward, tta_forward, tta_views

CLASSES = 4


def linear(size: tuple[int, int] = (16, 16)) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size[0] * size[1], CLASSES))


def images(count: int = 5, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def ask(kind: str, model: Any, batch: Tensor, **how: Any) -> Tensor:
    return tta_forward(kind, **how)(model, batch)


@torch.no_grad()
def test_flip_averages_the_probabilities_of_an_image_and_its_mirror_image() -> None:
    model, batch = linear(), images()
    mean = (model(batch).softmax(1) + model(batch.flip(3)).softmax(1)) / 2
    torch.testing.assert_close(ask("flip", model, batch).exp(), mean)
    torch.testing.assert_close(ask("flip", model, batch), ask("flip", model, batch.flip(3)))
    assert not torch.allclose(model(batch).softmax(1), mean, atol=1e-3)


@torch.no_grad()
def test_crops_are_the_corners_and_the_centre() -> None:
    batch = images(size=(16, 32))
    theirs = five_crop(batch, [14, 28])
    for mine, crop in zip(five_crops(batch), theirs, strict=True):
        torch.testing.assert_close(mine, nn.functional.interpolate(crop, (16, 32), mode="bilinear"))
    model = linear((16, 32))
    mean = torch.stack([model(crop).softmax(1) for crop in five_crops(batch)]).mean(0)
    torch.testing.assert_close(ask("crops5", model, batch).exp(), mean)
    mirrored = torch.stack([model(crop.flip(3)).softmax(1) for crop in five_crops(batch)]).mean(0)
    torch.testing.assert_close(ask("flip+crops5", model, batch).exp(), (mean + mirrored) / 2)


@torch.no_grad()
def test_a_sigmoid_head_averages_its_own_probabilities() -> None:
    model, batch = linear(), images()
    mean = (model(batch).sigmoid() + model(batch.flip(3)).sigmoid()) / 2
    torch.testing.assert_close(ask("flip", model, batch, loss="sigmoid").sigmoid(), mean)


@pytest.mark.parametrize("kind", TTA_KINDS)
def test_views_that_are_all_alike_change_nothing(kind: str) -> None:
    flat = images()[:, :, :1, :1].expand(-1, -1, 16, 16).contiguous()
    model = linear()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(ask(kind, model, flat), model(flat).log_softmax(1), atol=1e-5, rtol=1e-5)
    assert len(calls) == tta_views(kind) + 1


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_certainty_stays_finite(loss: str) -> None:
    certain = nn.Sequential(linear(), nn.Hardtanh(), nn.Linear(CLASSES, CLASSES))
    nn.init.constant_(certain[2].weight, 0.0)
    certain[2].bias.data = torch.tensor([300.0, -300.0, 0.0, -1000.0])
    found = ask("flip", certain, images(), loss=loss)
    assert found.isfinite().all()
    assert (found.argmax(1) == 0).all()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="crops5"):
        tta_forward("zoom")


@torch.no_grad()
@pytest.mark.parametrize(("down", "right"), [(1, 0), (-3, 0), (0, 2), (0, -5), (0, 0), (2, -1)])
def test_a_moved_image_is_the_image_with_its_edges_repeated(down: int, right: int) -> None:
    batch = images(size=(16, 24))
    moved = moved_forward(lambda model, x: x, down=down, right=right)(None, batch)
    reach = max(abs(down), abs(right), 1)
    padded = nn.functional.pad(batch, (reach,) * 4, mode="replicate")
    expected = padded[:, :, reach - down : reach - down + 16, reach - right : reach - right + 24]
    assert torch.equal(moved, expected)
    assert moved.equal(batch) == (down == right == 0)


@torch.no_grad()
def test_a_sum_over_places_does_not_mind_and_a_weight_for_each_does() -> None:
    batch = torch.zeros(5, 3, 16, 16)
    batch[:, :, 5:11, 5:11] = images()[:, :, 5:11, 5:11]  # nothing leaves the picture
    everywhere = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for model, alike in ((everywhere, True), (linear(), False)):
        found = moved_forward(lambda net, x: net(x), down=2, right=-1)(model, batch)
        assert torch.allclose(found, model(batch), atol=1e-6) == alike
