"""Transforms: against torchvision and Pillow, and the same pixels whoever prepares an image and beside whatever others."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as F

from vitcli.config import AugmentConfig
from vitcli.data.randaugment import OPERATIONS, apply, randaugment
from vitcli.data.resample import crop_resize, crop_resize_each
from vitcli.data.transforms import (
    EvalTransform,
    TrainTransform,
    inception_boxes,
    mix_batch,
    normalise,
)


def random_images(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Images with edges, gradients and noise: half of each."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (count, height, width, 3))
    smooth = np.linspace(0, 255, width)[None, None, :, None] * rng.random((count, 1, 1, 3))
    return np.where(rng.random((count, 1, 1, 1)) < 0.5, noise, smooth + noise / 16).clip(0, 255).astype(np.uint8)


def random_boxes(count: int, height: int, width: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    return inception_boxes(np.full(count, height), np.full(count, width), rng.random((count, 40)), min_area=0.05)


@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (45, 60), (64, 31)])
@pytest.mark.parametrize("size", [(32, 32), (16, 24), (64, 64)])
def test_batch_resampling_equals_pillow_bit_for_bit(
    shape: tuple[int, int], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitcli.data.resample.LARGE_PIXELS", 10**6)  # torch would do the larger of these
    images, boxes = random_images(24, *shape), random_boxes(24, *shape)
    assert (
        crop_resize(images, boxes, size=size, clip=True) == crop_resize_each(list(images), boxes, size=size, clip=True)
    ).all()
    rng = np.random.default_rng(2)
    fraction = rng.random((24, 4)).astype(np.float32)
    free = np.empty_like(fraction)  # boxes between pixels
    for axis, length in ((0, shape[0]), (1, shape[1])):
        extent = (0.3 + 0.6 * fraction[:, axis]) * length
        free[:, axis] = fraction[:, axis + 2] * (length - extent)
        free[:, axis + 2] = free[:, axis] + extent
    assert (
        crop_resize(images, free, size=size, clip=False) == crop_resize_each(list(images), free, size=size, clip=False)
    ).all()


def test_crop_resize_is_torchvisions_resized_crop() -> None:
    images, boxes = random_images(24, 48, 40), random_boxes(24, 48, 40)
    ours = crop_resize(images, boxes, size=(32, 24), clip=True)
    for image, box, got in zip(images, boxes.astype(int).tolist(), ours, strict=True):
        top, left, bottom, right = box
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        expected = F.resized_crop(tensor, top, left, bottom - top, right - left, [32, 24], antialias=True)
        assert np.abs(expected.numpy().astype(int) - got).max() <= 1


def test_inception_boxes_lie_inside_and_cover_the_range() -> None:
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 400, 4000), rng.integers(1, 400, 4000)
    boxes = inception_boxes(heights, widths, rng.random((4000, 40)), min_area=0.05)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= heights).all() and (boxes[:, 3] <= widths).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    square = inception_boxes(np.full(4000, 200), np.full(4000, 200), rng.random((4000, 40)), min_area=0.05)
    h, w = (square[:, 2] - square[:, 0]), (square[:, 3] - square[:, 1])
    area, aspect = h * w / 200**2, w / h
    assert 0.04 < area.min() < 0.07 and area.max() > 0.9
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4
    assert abs(float((square[:, 0] / (200 - h).clip(1)).mean()) - 0.5) < 0.03  # every place alike


AUGMENTS = {
    "inception": AugmentConfig(crop="inception"),
    "pad": AugmentConfig(crop="pad"),
    "random": AugmentConfig(crop="random"),
    "resize": AugmentConfig(crop="resize", flip=False),
    "randaugment": AugmentConfig(crop="pad", randaugment_layers=2, randaugment_magnitude=15),
}


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS.keys())
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_an_image_does_not_depend_on_its_batch(augment: AugmentConfig, size: tuple[int, int]) -> None:
    images = random_images(61, 32, 32)
    epochs, indices = np.arange(61) // 20, np.arange(61) * 7 % 61
    transform = TrainTransform(augment, image_size=size)
    together = transform(images, seed=3, epochs=epochs, indices=indices)
    assert together.shape == (61, 3, *size) and together.dtype == torch.uint8 and together.is_contiguous()
    for i in (0, 1, 30, 60):
        alone = transform(images[i : i + 1], seed=3, epochs=epochs[i : i + 1], indices=indices[i : i + 1])
        assert torch.equal(alone[0], together[i])
    as_list = transform(list(images), seed=3, epochs=epochs, indices=indices)  # decoded one by one: still the same pixels
    assert torch.equal(as_list, together)
    reversed_order = transform(images[::-1], seed=3, epochs=epochs[::-1], indices=indices[::-1])
    assert torch.equal(reversed_order.flip(0), together)


@pytest.mark.parametrize("name", ["inception", "pad", "random", "randaugment"])
def test_augmentation_differs_by_seed_epoch_and_index(name: str) -> None:
    transform = TrainTransform(AUGMENTS[name], image_size=(32, 32))
    images = np.repeat(random_images(1, 32, 32), 8, axis=0)
    zeros, indices = np.zeros(8, np.int64), np.arange(8)
    first = transform(images, seed=0, epochs=zeros, indices=indices)
    assert len({image.numpy().tobytes() for image in first}) > 4
    assert not torch.equal(first, transform(images, seed=1, epochs=zeros, indices=indices))
    assert not torch.equal(first, transform(images, seed=0, epochs=zeros + 1, indices=indices))


def test_lists_of_different_sizes() -> None:
    images = [random_images(1, h, w)[0] for h, w in ((20, 30), (200, 100), (32, 32), (1, 1), (5, 300))]
    for augment in AUGMENTS.values():
        out = TrainTransform(augment, image_size=(32, 32))(images, seed=0, epochs=np.zeros(5, np.int64), indices=np.arange(5))
        assert out.shape == (5, 3, 32, 32)
    for fraction in (None, 0.875, 1.0):
        assert EvalTransform(image_size=(32, 24), crop_fraction=fraction)(images).shape == (5, 3, 32, 24)


def test_pad_crop_shifts_by_whole_pixels_over_black() -> None:
    image = np.full((1, 32, 32, 3), 200, np.uint8)
    image[0, 10, 20] = 7
    transform = TrainTransform(AugmentConfig(crop="pad", pad=4, flip=False), image_size=(32, 32))
    shifts = set()
    for index in range(300):
        out = transform(image, seed=0, epochs=np.zeros(1, np.int64), indices=np.array([index]))[0, 0].numpy()
        row, column = np.argwhere(out == 7)[0].tolist()
        assert np.isin(out, (0, 7, 200)).all()
        shifts.add((row - 10, column - 20))
    assert {row for row, _ in shifts} == set(range(-4, 5)) == {column for _, column in shifts}
    doubled = TrainTransform(AugmentConfig(crop="pad", pad=4, flip=False), image_size=(64, 64))
    white = np.full((200, 64, 64, 3), 255, np.uint8)
    padded = doubled(white, seed=0, epochs=np.zeros(200, np.int64), indices=np.arange(200))
    assert int((padded[:, 0] == 0).all(dim=2).sum(dim=1).max()) == 8  # rows of black: in proportion to the image


def test_flip_mirrors_half_of_the_images() -> None:
    images = random_images(1, 32, 32).repeat(400, axis=0)
    transform = TrainTransform(AugmentConfig(crop="resize"), image_size=(32, 32))
    out = transform(images, seed=0, epochs=np.zeros(400, np.int64), indices=np.arange(400)).permute(0, 2, 3, 1).numpy()
    same, mirrored = (out == images).all((1, 2, 3)), (out == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all() and 160 < mirrored.sum() < 240


def test_inputs_are_not_changed() -> None:
    images = random_images(16, 32, 32)
    before = images.copy()
    for augment in AUGMENTS.values():
        TrainTransform(augment, image_size=(32, 32))(images, seed=0, epochs=np.zeros(16, np.int64), indices=np.arange(16))
    assert (images == before).all()


@pytest.mark.parametrize(("shape", "most"), [((30, 41), 0), ((50, 70), 1), ((400, 500), 1)])  # levels off: torch's 15 bits
def test_eval_transform_is_pillows_resize(shape: tuple[int, int], most: int) -> None:
    image = random_images(1, *shape)[0]
    expected = np.asarray(Image.fromarray(image).resize((32, 24), Image.Resampling.BILINEAR)).astype(int)
    for given in (image[None], [image]):
        got = EvalTransform(image_size=(24, 32))(given)[0].permute(1, 2, 0).numpy()
        assert np.abs(got - expected).max() <= most and (got != expected).mean() <= 0.01
    tensor = F.resize(torch.from_numpy(image).permute(2, 0, 1), [24, 32], antialias=True)
    assert np.abs(tensor.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_eval_centre_crop_is_resize_then_central_crop() -> None:
    image = random_images(1, 64, 128)[0]
    got = EvalTransform(image_size=(28, 28), crop_fraction=0.875)([image])[0].permute(1, 2, 0).numpy()
    resized = F.resize(torch.from_numpy(image).permute(2, 0, 1), [32, 64], antialias=True)  # short side 28 / 0.875
    expected = F.center_crop(resized, [28, 28]).permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_normalise() -> None:
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    got = normalise(images, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.25)).flatten()
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0, (0.2 - 0.5) / 0.25]))
    assert images.flatten().tolist() == [0, 255, 51]


def planes(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(B, H, W, 3) to (B, 3, H, W)."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def draws_for(count: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((count, 3))


def test_randaugment_operations_equal_pillow() -> None:
    images = random_images(12, 30, 20)
    level = 0.6  # enhancement factor 1.18, 2 bits, threshold 153
    factor = level * 1.8 + 0.1
    oracles: dict[str, Any] = {
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Invert": ImageOps.invert,
        "Posterize": lambda image: ImageOps.posterize(image, 2),
        "Solarize": lambda image: ImageOps.solarize(image, int(level * 256)),
        "Color": lambda image: ImageEnhance.Color(image).enhance(factor),
        "Contrast": lambda image: ImageEnhance.Contrast(image).enhance(factor),
        "Brightness": lambda image: ImageEnhance.Brightness(image).enhance(factor),
        "Sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(factor),
        "ShearX": lambda image: image.transform(
            image.size, Image.Transform.AFFINE, (1, 0.18, 0, 0, 1, 0), fillcolor=(128,) * 3
        ),
        "TranslateY": lambda image: image.transform(
            image.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, round(0.6 * 100 / 224 * 30)), fillcolor=(128,) * 3
        ),
        "Rotate": lambda image: image.rotate(18, fillcolor=(128,) * 3),
    }
    draws = np.zeros((12, 3))  # positive sign
    for name, oracle in oracles.items():
        ours = apply(name, planes(images), draws, level=level).transpose(0, 2, 3, 1).astype(int)
        expected = np.stack([np.asarray(oracle(Image.fromarray(image))) for image in images]).astype(int)
        different = np.abs(ours - expected) > 1
        # nearest-neighbour lookups round differently by half a pixel where Pillow samples at pixel centres
        assert different.mean() <= (0.35 if name in ("ShearX", "Rotate") else 0.0), name


def test_randaugment_geometry_goes_both_ways_and_fills_with_grey() -> None:
    images = np.zeros((2, 3, 33, 33), np.uint8)
    images[:, :, 16, 20] = 255
    draws = np.array([[0.1, 0, 0], [0.9, 0, 0]])  # + and -
    moved = apply("TranslateX", images, draws, level=0.2)
    assert [np.argwhere(image[0] == 255)[0].tolist() for image in moved] == [[16, 17], [16, 23]]
    assert (moved[0, :, :, -1] == 128).all() and (moved[1, :, :, 0] == 128).all()
    turned = apply("Rotate", images, draws, level=3.0)  # 90 degrees about the centre
    assert sorted(np.argwhere(image[0] == 255)[0].tolist() for image in turned) == [[12, 16], [20, 16]]
    cut = apply("Cutout", images, np.array([[0, 0.5, 0.5]] * 2), level=1.0)
    assert (cut[0] == 128).all(axis=0).sum() == 12 * 12
    for name in OPERATIONS:
        assert apply(name, images, draws, level=0.0).shape == images.shape
        assert apply(name, images, draws, level=3.0).dtype == np.uint8


def test_randaugment_is_independent_of_the_batch_and_uses_every_operation() -> None:
    images = planes(random_images(400, 16, 16))
    draws = np.random.default_rng(5).random((400, 2, 4))
    out = randaugment(images, draws, magnitude=10)
    for i in range(0, 400, 7):
        assert (randaugment(images[i : i + 1], draws[i : i + 1], magnitude=10)[0] == out[i]).all()
    assert len(np.unique((draws[:, :, 0] * len(OPERATIONS)).astype(int))) == len(OPERATIONS)


def targets_of(labels: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels), 5).float()


def test_mixup_blends_with_the_rolled_batch() -> None:
    images, targets = torch.rand(5, 3, 8, 8), targets_of([0, 1, 2, 3, 4])
    mixed, soft = mix_batch(images, targets, seed=11, mixup=0.8, cutmix=0.0)
    share = float(soft[0, 0])
    assert 0.5 <= share <= 1.0
    torch.testing.assert_close(mixed, images * share + images.roll(1, 0) * (1 - share))
    torch.testing.assert_close(soft, targets * share + targets.roll(1, 0) * (1 - share))
    again, _ = mix_batch(images, targets, seed=11, mixup=0.8, cutmix=0.0)
    assert torch.equal(mixed, again)
    shares = [float(mix_batch(images, targets, seed=s, mixup=0.2, cutmix=0.0)[1][0, 0]) for s in range(400)]
    assert min(shares) >= 0.5 and abs(np.mean(shares) - 0.899) < 0.02  # E max(a, 1 - a), a ~ Beta(.2, .2)


def test_cutmix_pastes_a_rectangle_of_the_share_in_the_targets() -> None:
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 20, 30).clone()
    targets = targets_of([0, 1, 2, 3, 4])
    shares = []
    for seed in range(300):
        mixed, soft = mix_batch(images, targets, seed=seed, mixup=0.0, cutmix=1.0)
        pasted = mixed[1, 0] == 0
        shares.append(float(soft[1, 1]))
        assert abs(float(pasted.float().mean()) - (1 - shares[-1])) < 1e-6
        rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
        assert int(pasted.sum()) == int(rows * columns)
        torch.testing.assert_close(soft.sum(1), torch.ones(5))
    assert min(shares) < 0.15 and max(shares) > 0.9
    assert images.unique().tolist() == [0, 1, 2, 3, 4]  # the input is not written to


def test_mix_batch_off_both_and_single() -> None:
    images, targets = torch.rand(5, 3, 8, 8), targets_of([0, 1, 2, 3, 4])
    same, soft = mix_batch(images, targets, seed=1, mixup=0.0, cutmix=0.0)
    assert same is images and soft is targets
    kinds = set()
    for seed in range(20):
        mixed, _ = mix_batch(images, targets, seed=seed, mixup=0.8, cutmix=1.0)
        kinds.add(bool(((mixed == images) | (mixed == images.roll(1, 0))).all()))
    assert kinds == {True, False}
    alone, soft = mix_batch(images[:1], targets[:1], seed=1, mixup=0.8, cutmix=1.0)
    torch.testing.assert_close(alone, images[:1])
    torch.testing.assert_close(soft, targets[:1])
