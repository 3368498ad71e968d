"""From stored pixels to what the model sees: crops, flips, RandAugment, normalisation, mixup and CutMix.

What happens to an image is a function of (seed, epoch, index) alone: not of the batch it is in, nor of who prepares it.
Images stay uint8 until they are on the device; `normalise` and `mix_batch` run there.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.config import AugmentConfig
from vitcli.data.images import EncodedImage, ImageError, unreadable
from vitcli.data.randaugment import DRAWS_PER_LAYER, randaugment
from vitcli.data.resample import Box, crop_resize, crop_resize_each, resize_part
from vitcli.errors import ExampleError
from vitcli.randomness import derive_seed, uniform

__all__ = ["EvalTransform", "TrainTransform", "mix_batch", "normalise"]

Images = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]  # (B, H, W, 3), or (H, W, 3) each with different sizes
Cutter = Callable[..., NDArray[np.uint8]]  # `cut` or `cut_files` with its images given

INCEPTION_ATTEMPTS = 10  # torchvision's RandomResizedCrop
INCEPTION_ASPECTS = (3 / 4, 4 / 3)  # width / height; Szegedy et al. 2014, section 6
RANDOM_CROP_SHARE = 7 / 8  # of the resized short side: 224 out of 256
PAD_REFERENCE_SIDE = 32  # `pad` is given for images of this side, px


class TrainTransform:
    """Crop, flip and RandAugment, drawn anew for each (seed, epoch, index)."""

    def __init__(self, augment: AugmentConfig, *, image_size: tuple[int, int]) -> None:
        self.augment = augment
        self.image_size = image_size

    def __call__(self, images: Images, *, seed: int, epochs: NDArray[np.int64], indices: NDArray[np.int64]) -> Tensor:
        """Return augmented images, uint8 (B, 3, *image_size).

        Args:
            images: uint8 (B, H, W, 3), or a list of (H, W, 3).
            epochs, indices: (B,) which pass each image is seen in, and which example of the source it is.
        """
        heights, widths = sides(images)
        return self._augmented(partial(cut, images), heights, widths, seed=seed, epochs=epochs, indices=indices)

    def from_encoded(
        self,
        files: Sequence[bytes],
        *,
        where: Sequence[str],
        seed: int,
        epochs: NDArray[np.int64],
        indices: NDArray[np.int64],
    ) -> Tensor:
        """Do as `__call__` for image files, decoding only what the crops need (see `EncodedImage.part`).

        Args:
            files: (B,) contents of image files.
            where: (B,) where each was found, for messages.

        Raises:
            ExampleError: a file is damaged; its `position` is the place in `files`.
        """
        opened = open_all(files, where)
        heights, widths = sides_of(opened)
        return self._augmented(partial(cut_files, opened, where), heights, widths, seed=seed, epochs=epochs, indices=indices)

    def _augmented(
        self,
        cut: Cutter,
        heights: NDArray[np.int64],
        widths: NDArray[np.int64],
        *,
        seed: int,
        epochs: NDArray[np.int64],
        indices: NDArray[np.int64],
    ) -> Tensor:
        augment = self.augment
        draws = draw(seed, "crop", epochs, indices, 4 * INCEPTION_ATTEMPTS if augment.crop == "inception" else 2)
        if augment.crop == "inception":
            boxes = inception_boxes(heights, widths, draws, min_area=augment.min_area)
            cropped = cut(boxes, size=self.image_size, clip=True)
        elif augment.crop == "random":
            boxes = covering_boxes(heights, widths, draws, size=self.image_size, share=RANDOM_CROP_SHARE)
            cropped = cut(boxes, size=self.image_size, clip=False)
        else:
            cropped = cut(whole_boxes(heights, widths), size=self.image_size, clip=True)
            if augment.crop == "pad":
                cropped = pad_crop(cropped, draws, pad=augment.pad)
            cropped = np.ascontiguousarray(cropped)
        if augment.flip:
            mirrored = np.flatnonzero(draw(seed, "flip", epochs, indices, 1)[:, 0] < 0.5)
            cropped[mirrored] = torch.from_numpy(cropped[mirrored]).flip(3).numpy()  # numpy's takes five times as long
        if augment.randaugment_layers:
            layers = augment.randaugment_layers
            choices = draw(seed, "randaugment", epochs, indices, DRAWS_PER_LAYER * layers).reshape(-1, layers, DRAWS_PER_LAYER)
            cropped = randaugment(cropped, choices, magnitude=augment.randaugment_magnitude)
        return torch.from_numpy(cropped)


class EvalTransform:
    """Resize the whole image, or its central part with the aspect ratio kept."""

    def __init__(self, *, image_size: tuple[int, int], crop_fraction: float | None = None) -> None:
        self.image_size = image_size
        self.crop_fraction = crop_fraction

    def __call__(self, images: Images) -> Tensor:
        """Return images, uint8 (B, 3, *image_size), from uint8 (B, H, W, 3) or a list of (H, W, 3)."""
        return self._shown(partial(cut, images), *sides(images))

    def from_encoded(self, files: Sequence[bytes], *, where: Sequence[str]) -> Tensor:
        """Do as `__call__` for image files; see `TrainTransform.from_encoded`."""
        opened = open_all(files, where)
        return self._shown(partial(cut_files, opened, where), *sides_of(opened))

    def _shown(self, cut: Cutter, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> Tensor:
        if self.crop_fraction is None:
            return torch.from_numpy(np.ascontiguousarray(cut(whole_boxes(heights, widths), size=self.image_size, clip=True)))
        centre = np.full((len(heights), 2), 0.5)
        boxes = covering_boxes(heights, widths, centre, size=self.image_size, share=self.crop_fraction)
        return torch.from_numpy(cut(boxes, size=self.image_size, clip=False))


def normalise(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images / 255 - mean) / std as float32, from uint8 (B, 3, H, W) on any device."""
    inputs = images.float()
    for channel, (centre, spread) in enumerate(zip(mean, std, strict=True)):  # numbers, not tensors: no copy to wait for
        inputs[:, channel].mul_(1 / (255 * spread)).sub_(centre / spread)  # one division and one pass less than as written
    return inputs


def mix_batch(images: Tensor, targets: Tensor, *, seed: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mix each image and its target with its neighbour in the batch, by one share for the whole batch.

    Mixup (1710.09412) blends, CutMix (1905.04899) pastes a rectangle; with both on, each batch takes one of them. The partner
    is the batch rolled by one and mixup's share is a = max(a, 1 - a), a ~ Beta(alpha, alpha), as in big_vision.

    Args:
        images: float (B, 3, H, W); targets: float (B, K).
        seed: derived from the run's seed and the step; the draws are made on the CPU and are the same for every device.
        mixup, cutmix: alpha of the Beta distributions; 0 turns one off.
    """
    if not mixup and not cutmix:
        return images, targets
    which, quantile, row, column = uniform(derive_seed(seed, "mix"), [0], 4)[0].tolist()
    if mixup and (not cutmix or which < 0.5):
        share = beta_quantile(quantile, alpha=mixup)
        share = max(share, 1.0 - share)
        mixed = images * share + images.roll(1, 0) * (1.0 - share)
    else:
        height, width = images.shape[2:]
        side = (1.0 - beta_quantile(quantile, alpha=cutmix)) ** 0.5  # of the rectangle, as a share of the image's
        top, bottom = span(row, side, height)
        left, right = span(column, side, width)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.roll(1, 0)[:, :, top:bottom, left:right]
        share = 1.0 - (bottom - top) * (right - left) / (height * width)  # what is left of it at the border
    return mixed, targets * share + targets.roll(1, 0) * (1.0 - share)


def beta_quantile(probability: float, *, alpha: float) -> float:
    """Return the number below which a share `probability` of Beta(alpha, alpha) lies."""
    from scipy.special import betaincinv

    return float(betaincinv(alpha, alpha, probability))


def span(place: float, side: float, length: int) -> tuple[int, int]:
    """Return [start, stop) of `side * length` px around `place * length`, cut off at the border."""
    centre, half = place * length, side * length / 2
    return max(0, round(centre - half)), min(length, round(centre + half))


def draw(seed: int, purpose: str, epochs: NDArray[np.int64], indices: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Return (B, draws) numbers in [0, 1) that depend on (seed, purpose, epoch, index) of each row."""
    out = np.empty((len(indices), draws))
    for epoch in np.unique(epochs).tolist():
        members = epochs == epoch
        out[members] = uniform(derive_seed(seed, "augment", purpose, epoch), indices[members], draws)
    return out


def sides(images: Images) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return heights (B,) and widths (B,), px."""
    if isinstance(images, np.ndarray):
        return np.full(len(images), images.shape[1]), np.full(len(images), images.shape[2])
    shapes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    return shapes[:, 0], shapes[:, 1]


def cut(images: Images, boxes: Box, *, size: tuple[int, int], clip: bool) -> NDArray[np.uint8]:
    """Resize boxes to planes (B, 3, *size); for batches and lists the same pixels."""
    if not isinstance(images, np.ndarray):
        return crop_resize_each(list(images), boxes, size=size, clip=clip)
    height, width = images.shape[1:3]
    if (height, width) == size and (boxes == whole_boxes(np.array([height]), np.array([width]))).all():
        return images.transpose(0, 3, 1, 2)
    return crop_resize(images, boxes, size=size, clip=clip)


def open_all(files: Sequence[bytes], where: Sequence[str]) -> list[EncodedImage]:
    """Read the headers of image files. Raises ExampleError."""
    opened = []
    for position, data in enumerate(files):
        try:
            opened.append(EncodedImage(data))
        except ImageError as error:
            raise ExampleError(str(unreadable(where[position], error)), position) from error
    return opened


def sides_of(files: Sequence[EncodedImage]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return heights (B,) and widths (B,), px."""
    shapes = np.array([(file.height, file.width) for file in files], np.int64).reshape(-1, 2)
    return shapes[:, 0], shapes[:, 1]


def cut_files(
    files: Sequence[EncodedImage], where: Sequence[str], boxes: Box, *, size: tuple[int, int], clip: bool
) -> NDArray[np.uint8]:
    """Do as `cut` for image files, decoding them. Raises ExampleError."""
    out = np.empty((len(files), 3, *size), np.uint8)
    for position, (file, box) in enumerate(zip(files, boxes.tolist(), strict=True)):
        try:
            pixels, part = file.part(box, size=size, clip=clip)
        except ImageError as error:
            raise ExampleError(str(unreadable(where[position], error)), position) from error
        out[position] = resize_part(pixels, part, size=size)
    return out


def whole_boxes(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> Box:
    return np.stack([0 * heights, 0 * widths, heights, widths], axis=1).astype(np.float32)


def inception_boxes(
    heights: NDArray[np.int64], widths: NDArray[np.int64], draws: NDArray[np.float64], *, min_area: float
) -> Box:
    """Draw crops of random area and aspect ratio, (B, 4), whole pixels: torchvision's RandomResizedCrop in closed form.

    The first of 10 attempts that fits is taken; if none does, the largest central crop within the allowed aspect ratios.

    Args:
        draws: (B, 40) in [0, 1): area, aspect, row, column for each attempt.
        min_area: smallest share of the image; the largest is 1.
    """
    u = draws.reshape(-1, INCEPTION_ATTEMPTS, 4)
    rows, columns = heights[:, None], widths[:, None]
    area = (rows * columns) * (min_area + (1.0 - min_area) * u[:, :, 0])  # (B, attempts)
    low, high = np.log(INCEPTION_ASPECTS)
    aspect = np.exp(low + (high - low) * u[:, :, 1])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= columns) & (h > 0) & (h <= rows)
    first = np.argmax(fits, axis=1)  # 0 when none fits
    each = np.arange(len(u))
    w, h, place = w[each, first], h[each, first], u[each, first]
    none = ~fits.any(axis=1)
    narrow, wide = INCEPTION_ASPECTS
    w = np.where(none, np.maximum(1, np.minimum(widths, np.rint(heights * wide).astype(np.int64))), w)
    h = np.where(none, np.maximum(1, np.minimum(heights, np.rint(widths / narrow).astype(np.int64))), h)
    top = np.where(none, (heights - h) // 2, (place[:, 2] * (heights - h + 1)).astype(np.int64))
    left = np.where(none, (widths - w) // 2, (place[:, 3] * (widths - w + 1)).astype(np.int64))
    return np.stack([top, left, top + h, left + w], axis=1).astype(np.float32)


def covering_boxes(
    heights: NDArray[np.int64], widths: NDArray[np.int64], places: NDArray[np.float64], *, size: tuple[int, int], share: float
) -> Box:
    """Return the boxes (B, 4) that a resize of the short side to `size / share`, then a crop of `size`, would show.

    Args:
        places: (B, 2) in [0, 1]: where the box lies between top and bottom, left and right; 0.5 is the centre.
        size: (height, width) of the result, which sets the box's aspect ratio.
    """
    scale = np.minimum(heights / size[0], widths / size[1]) * share  # input px per output px
    h, w = scale * size[0], scale * size[1]
    top, left = places[:, 0] * (heights - h), places[:, 1] * (widths - w)
    boxes = np.stack([top, left, top + h, left + w], axis=1).astype(np.float32)
    limits = whole_boxes(heights, widths)
    boxes[:, 2:] = np.minimum(boxes[:, 2:], limits[:, 2:])  # float32 may round a hair beyond the border
    return boxes


def pad_crop(images: NDArray[np.uint8], draws: NDArray[np.float64], *, pad: int) -> NDArray[np.uint8]:
    """Pad images (B, 3, H, W) with black and cut out a window of the old size; `pad` px at 32 px, in proportion elsewhere."""
    batch, _, height, width = images.shape
    down, right = round(pad * height / PAD_REFERENCE_SIDE), round(pad * width / PAD_REFERENCE_SIDE)
    padded = np.zeros((batch, height + 2 * down, width + 2 * right, 3), np.uint8)
    padded[:, down : down + height, right : right + width] = images.transpose(0, 2, 3, 1)
    tops = (draws[:, 0] * (2 * down + 1)).astype(np.int64)
    lefts = (draws[:, 1] * (2 * right + 1)).astype(np.int64)
    # A row of a window is one item of 3 * width bytes, at each place where it may begin: one call gathers all of them.
    shape = (batch, height + 2 * down, 2 * right + 1)
    rows = np.ndarray(shape, f"V{3 * width}", buffer=padded, strides=padded.strides[:3])
    windows = rows[np.arange(batch)[:, None], tops[:, None] + np.arange(height), lefts[:, None]]  # (B, H)
    return windows.view(np.uint8).reshape(batch, height, width, 3).transpose(0, 3, 1, 2)
