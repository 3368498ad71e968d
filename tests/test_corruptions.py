"""Corrupted images against torchvision, Pillow and the published strengths."""

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

from vitcli.config import DataConfig
from vitcli.data.corruptions import CORRUPTIONS, STRENGTHS, CorruptedSource, corrupt, strength_at
from vitcli.data.loader import eval_batches
from vitcli.data.sources import open_source
from vitcli.data.transforms import EvalTransform
from vitcli.errors import ConfigError


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return smooth random colours away from black and white, so that little is clipped."""
    coarse = np.random.default_rng(seed).integers(60, 196, (6, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(np.float64) - b).mean())


@pytest.mark.parametrize(
    ("kind", "side", "expected"),
    [
        ("blur", 224, [1, 2, 3, 4, 6]),
        ("blur", 64, [0.5, 0.75, 1, 1.25, 1.5]),
        ("blur", 32, [0.4, 0.6, 0.7, 0.8, 1]),
        ("blur", 448, [2, 4, 6, 8, 12]),
        ("blur", 8, [0.4, 0.6, 0.7, 0.8, 1]),
        ("noise", 224, [0.08, 0.12, 0.18, 0.26, 0.38]),
        ("noise", 32, [0.04, 0.06, 0.08, 0.09, 0.10]),
        ("noise", 8, [0.04, 0.06, 0.08, 0.09, 0.10]),
        ("jpeg", 224, [25, 18, 15, 10, 7]),
        ("jpeg", 64, [65, 58, 50, 40, 25]),
        ("jpeg", 1000, [25, 18, 15, 10, 7]),
        ("contrast", 224, [0.4, 0.3, 0.2, 0.1, 0.05]),
        ("contrast", 32, [0.75, 0.5, 0.4, 0.3, 0.15]),
    ],
)
def test_strengths_are_the_published_ones(kind: str, side: int, expected: list[float]) -> None:
    assert [strength_at(kind, strength, side) for strength in STRENGTHS] == pytest.approx(expected)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [(8, 8), (32, 40), (64, 64), (100, 90), (224, 224), (300, 400)])
def test_every_strength_is_worse_than_the_one_before(kind: str, size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(40, 216, (*size, 3), dtype=np.uint8)
    if kind == "jpeg":
        image = picture(*size)
    found = [distance(corrupt(image, kind, strength), image) for strength in STRENGTHS]
    assert found[0] > 0
    assert all(a <= 1.05 * b for a, b in pairwise(found)), found  # 8 px of JPEG have few coefficients to lose
    assert found[0] < found[-1]
    assert corrupt(image, kind, 3).shape == image.shape


def test_blur_is_a_gaussian() -> None:
    image = np.random.default_rng(0).integers(0, 256, (224, 230, 3), dtype=np.uint8)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    theirs = gaussian_blur(tensor.float(), kernel_size=[25, 25], sigma=[3.0, 3.0]).permute(1, 2, 0).numpy()
    inside = np.s_[13:-13, 13:-13]  # they continue the picture in another way
    assert np.abs(corrupt(image, "blur", 3)[inside] - theirs[inside]).max() <= 0.51


@pytest.mark.parametrize("side", [32, 224])
def test_noise_has_the_standard_deviation_that_is_said_and_repeats(side: int) -> None:
    grey = np.full((side, side, 3), 128, np.uint8)
    noise = corrupt(grey, "noise", 1, seed=5).astype(np.float64) - 128
    assert abs(noise.mean()) < 4 * noise.std() / noise.size**0.5
    assert noise.std() == pytest.approx(255 * strength_at("noise", 1, side), rel=0.05)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.1
    assert (corrupt(grey, "noise", 1, seed=5) == corrupt(grey, "noise", 1, seed=5)).all()
    assert (corrupt(grey, "noise", 1, seed=5) != corrupt(grey, "noise", 1, seed=6)).any()
    stronger = corrupt(grey, "noise", 2, seed=5).astype(np.float64) - 128
    assert np.corrcoef(noise.ravel(), stronger.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(("side", "quality"), [(224, 10), (64, 40), (32, 50)])
def test_jpeg_is_pillows(side: int, quality: int) -> None:
    image = picture(side, side)
    stored = io.BytesIO()
    Image.fromarray(image).save(stored, "JPEG", quality=quality)
    assert (corrupt(image, "jpeg", 4) == np.asarray(Image.open(stored))).all()


def test_contrast_goes_to_the_mean_of_each_channel() -> None:
    image = picture(224, 224)
    worse = corrupt(image, "contrast", 2).astype(np.float64)
    assert worse.mean(axis=(0, 1)) == pytest.approx(image.mean(axis=(0, 1)), abs=0.1)
    assert worse.std(axis=(0, 1)) == pytest.approx(0.3 * image.std(axis=(0, 1)), rel=0.03)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_large_picture_suffers_as_its_smaller_copy(kind: str) -> None:
    def halve(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.asarray(Image.fromarray(image).resize((250, 224), Image.Resampling.BOX))

    image = picture(448, 500)
    of_copy = corrupt(halve(image), kind, 2, seed=3)
    assert distance(halve(corrupt(image, kind, 2, seed=3)), of_copy) < 1.0
    assert distance(halve(image), of_copy) > 3.0 or kind in ("blur", "jpeg")


def folder_of(path: Path, count: int) -> str:
    for name in ("a", "b"):
        (path / "val" / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(picture(20 + number, 24, seed=number)).save(path / "val" / name / f"{number}.png")
    return f"folder:{path}"


def shown(source: Any, **how: Any) -> torch.Tensor:
    transform = EvalTransform(image_size=(16, 16))
    return torch.cat([batch["images"] for batch in eval_batches(source, transform, batch_size=3, **how)])


@pytest.mark.parametrize("memory_cache_gib", [0, 4])
def test_a_corrupted_source_is_that_source_made_worse(tmp_path: Path, memory_cache_gib: int) -> None:
    data = DataConfig(source=folder_of(tmp_path, 4), image_size=(16, 16), memory_cache_gib=memory_cache_gib)
    source = open_source(data.source, split="val", data=data)
    worse = CorruptedSource(source, "noise", 3)
    assert (len(worse), worse.classes, worse.encoded, worse.uniform) == (8, ["a", "b"], False, False)
    assert worse.where(5) == source.where(5)
    assert worse.labels is not None
    assert worse.labels.tolist() == [0] * 4 + [1] * 4
    image, label = worse[5]
    assert label == 1
    assert (image != source[5][0]).any()
    assert (image == worse[5][0]).all()
    assert (image != worse[1][0]).any()  # the same picture at another index has other noise
    assert (shown(worse) == shown(worse, workers=1)).all()
    prints = {CorruptedSource(source, kind, strength).fingerprint for kind in CORRUPTIONS for strength in STRENGTHS}
    assert len(prints | {source.fingerprint, CorruptedSource(source, "noise", 3, seed=1).fingerprint}) == 22


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_uniform_source_stays_one(kind: str) -> None:
    data = DataConfig(source="digits", image_size=(16, 16))
    worse = CorruptedSource(open_source("digits", split="val", data=data), kind, 5)
    assert worse.uniform
    images, labels = worse.batch(np.array([3, 300]))
    for row, index in enumerate((3, 300)):
        image, label = worse[index]
        assert (images[row] == image).all()
        assert labels[row] == label
    assert shown(worse).shape == (359, 3, 16, 16)
    assert worse.batch(np.array([], np.int64))[0].shape == (0, 8, 8, 3)


@pytest.mark.parametrize(("kind", "strength"), [("fog", 1), ("blur", 0), ("blur", 6)])
def test_what_there_is_not_is_refused(kind: str, strength: int) -> None:
    source = open_source("digits", split="val", data=DataConfig(source="digits", image_size=(16, 16)))
    with pytest.raises(ConfigError, match="expected"):
        CorruptedSource(source, kind, strength)
