"""Cut a box out of each image and scale it with an antialiased bilinear filter.

Every image has its own box. Small boxes: Pillow's arithmetic (`Resample.c`: 22-bit fixed-point weights, columns first, 8 bits
between the passes), bit for bit, whether for a whole batch in arrays or by Pillow itself. Large ones: torch's filter, which
does the same with vector instructions and 15-bit weights, in half the time; the two differ by one level at most. Which one
it is depends on the box and the result alone, so that a batch, a single image and a file give the same pixels.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

__all__ = ["Box", "crop_resize", "crop_resize_each", "resize_part"]

PRECISION_BITS = 22  # Pillow: 32 - 8 bits of the pixel - 2 bits of room for the sum
LARGE_PIXELS = 40 * 40  # of input or result; above it a loop in C over one image is faster than our passes over arrays
CHUNK_ELEMENTS = 1 << 17  # elements per block: int32 intermediates then stay in the second-level cache

Box = NDArray[np.float32]  # (B, 4): top, left, bottom, right, px; Pillow's box has this precision too


def crop_resize(images: NDArray[np.uint8], boxes: Box, *, size: tuple[int, int], clip: bool) -> NDArray[np.uint8]:
    """Resize boxes of images (B, H, W, 3) to planes (B, 3, *size).

    Args:
        boxes: (B, 4) top, left, bottom, right; inside the image.
        size: (height, width) of the result.
        clip: whether the filter stops at the box (crop, then resize) or may look at pixels just outside of it (resize, then
            crop); boxes are whole numbers in the first case.
    """
    height, width = images.shape[1:3]
    if max(height * width, size[0] * size[1]) > LARGE_PIXELS:
        return crop_resize_each(list(images), boxes, size=size, clip=clip)
    out = np.empty((len(images), 3, *size), np.uint8)
    step = max(1, CHUNK_ELEMENTS // (3 * max(height, size[0]) * max(width, size[1])))
    for first in range(0, len(images), step):
        part = slice(first, first + step)
        top, left, bottom, right = boxes[part].T
        wide = images[part].transpose(0, 2, 1, 3)  # (b, W, H, 3): columns are rows now
        narrow = filter_rows(wide, left, right, out=size[1], clip=clip)
        out[part] = filter_rows(narrow.transpose(0, 2, 1, 3), top, bottom, out=size[0], clip=clip).transpose(0, 3, 1, 2)
    return out


def crop_resize_each(images: list[NDArray[np.uint8]], boxes: Box, *, size: tuple[int, int], clip: bool) -> NDArray[np.uint8]:
    """Do as `crop_resize`, for images (H, W, 3) of different sizes."""
    out = np.empty((len(images), 3, *size), np.uint8)
    for i, (image, (top, left, bottom, right)) in enumerate(zip(images, boxes.tolist(), strict=True)):
        if clip:
            image = image[int(top) : int(bottom), int(left) : int(right)]
            top, left, bottom, right = 0.0, 0.0, float(image.shape[0]), float(image.shape[1])
        out[i] = resize_part(image, (top, left, bottom, right), size=size)
    return out


def resize_part(
    image: NDArray[np.uint8], box: tuple[float, float, float, float], *, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Resize a box (top, left, bottom, right) of an image (H, W, 3) to planes (3, *size); the filter may look beyond it."""
    height, width = image.shape[:2]
    top, left, bottom, right = box
    if top == left == 0 and (bottom, right) == (height, width):
        if (height, width) == size:
            return image.transpose(2, 0, 1)
        if max(height * width, size[0] * size[1]) > LARGE_PIXELS:
            writeable = image if image.flags.writeable else image.copy()  # torch warns of others
            pixels = torch.from_numpy(writeable).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last in memory
            planes = interpolate(pixels, size, mode="bilinear", antialias=True)[0]
            return planes.numpy()
    top, left, bottom, right = box
    picture = Image.fromarray(np.ascontiguousarray(image))
    # Two calls, because Pillow's own order of the passes depends on its version and on the shape.
    picture = picture.resize((size[1], height), Image.Resampling.BILINEAR, box=(left, 0, right, height))
    picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=(0, top, size[1], bottom))
    return np.asarray(picture).transpose(2, 0, 1)


def filter_rows(
    images: NDArray[np.uint8], start: NDArray[np.float32], stop: NDArray[np.float32], *, out: int, clip: bool
) -> NDArray[np.uint8]:
    """Resample the first image axis, (B, R, S, 3) to (B, out, S, 3), from each image's own [start, stop)."""
    batch, rows, columns, channels = images.shape
    if clip:  # coordinates count from the box, as if it had been cut out: the same roundings
        origin, length = start.astype(np.int64), (stop - start).astype(np.int64)
        start, stop = 0 * start, stop - start
    else:
        origin, length = np.zeros(batch, np.int64), np.full(batch, rows)
    index, weight = taps(start, stop, out=out, length=length)  # (T, B, out)
    flat = np.ascontiguousarray(images).reshape(batch * rows, columns * channels)
    index = index + (rows * np.arange(batch) + origin)[:, None]
    total = np.full((batch, out, columns * channels), 1 << (PRECISION_BITS - 1), np.int32)
    for i in range(len(index)):
        total += flat[index[i]].astype(np.int32) * weight[i][:, :, None]
    total >>= PRECISION_BITS
    return total.astype(np.uint8).reshape(batch, out, columns, channels)


def taps(
    start: NDArray[np.float32], stop: NDArray[np.float32], *, out: int, length: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return input rows (T, B, out) and their fixed-point weights (T, B, out), from [start, stop) of `length` rows.

    Rows beyond an image's own filter have weight 0: T, which the batch's strongest reduction sets, changes no result.
    """
    scale = (stop - start).astype(np.float64)[:, None] / out  # input px per output px
    support = np.maximum(scale, 1.0)
    centre = start.astype(np.float64)[:, None] + (np.arange(out) + 0.5) * scale  # (B, out)
    from_row = np.maximum((centre - support + 0.5).astype(np.int64), 0)  # astype truncates, as C's cast does
    to_row = np.minimum((centre + support + 0.5).astype(np.int64), length[:, None])
    count = int((to_row - from_row).max())
    row = from_row + np.arange(count)[:, None, None]  # (T, B, out)
    weight = np.maximum(1.0 - np.abs((row - centre + 0.5) * (1.0 / support)), 0.0)
    weight[row >= to_row] = 0.0
    total = np.zeros_like(centre)
    for part in weight:  # in this order: a vectorised sum would associate differently for another T
        total += part
    fixed = (weight / total * (1 << PRECISION_BITS) + 0.5).astype(np.int32)
    return np.minimum(row, length[:, None] - 1), fixed
