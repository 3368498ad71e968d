"""Cut a box out of each image and scale it: Pillow's antialiased bilinear filter, for a whole batch at once.

Every image has its own box. The arithmetic is Pillow's own (`Resample.c`: 22-bit fixed-point weights, columns first, 8 bits
between the passes), in integers: results equal Pillow's bit for bit, so a batch, a single image and a file decoded by a
loader process all give the same pixels on every machine.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Box", "crop_resize", "crop_resize_each", "resize_part"]

PRECISION_BITS = 22  # Pillow: 32 - 8 bits of the pixel - 2 bits of room for the sum
LARGE_PIXELS = 40 * 40  # of input or result; above it Pillow's loop in C is faster than our passes over arrays
CHUNK_ELEMENTS = 1 << 17  # elements per block: int32 intermediates then stay in the second-level cache

Box = NDArray[np.float32]  # (B, 4): top, left, bottom, right, px; Pillow's box has this precision too


def crop_resize(images: NDArray[np.uint8], boxes: Box, *, size: tuple[int, int], clip: bool) -> NDArray[np.uint8]:
    """Resize boxes of images (B, H, W, 3) to (B, *size, 3).

    Args:
        boxes: (B, 4) top, left, bottom, right; inside the image.
        size: (height, width) of the result.
        clip: whether the filter stops at the box (crop, then resize) or may look at pixels just outside of it (resize, then
            crop); boxes are whole numbers in the first case.
    """
    height, width = images.shape[1:3]
    if max(height * width, size[0] * size[1]) > LARGE_PIXELS:
        return crop_resize_each(list(images), boxes, size=size, clip=clip)
    out = np.empty((len(images), *size, 3), np.uint8)
    step = max(1, CHUNK_ELEMENTS // (3 * max(height, size[0]) * max(width, size[1])))
    for first in range(0, len(images), step):
        part = slice(first, first + step)
        top, left, bottom, right = boxes[part].T
        wide = images[part].transpose(0, 2, 1, 3)  # (b, W, H, 3): columns are rows now
        narrow = filter_rows(wide, left, right, out=size[1], clip=clip)
        out[part] = filter_rows(narrow.transpose(0, 2, 1, 3), top, bottom, out=size[0], clip=clip)
    return out


def crop_resize_each(images: list[NDArray[np.uint8]], boxes: Box, *, size: tuple[int, int], clip: bool) -> NDArray[np.uint8]:
    """Do as `crop_resize`, for images (H, W, 3) of different sizes."""
    out = np.empty((len(images), *size, 3), np.uint8)
    for i, (image, box) in enumerate(zip(images, boxes, strict=True)):
        top, left, bottom, right = box.tolist()
        if clip:
            image = image[int(top) : int(bottom), int(left) : int(right)]
            top, left, bottom, right = 0.0, 0.0, float(image.shape[0]), float(image.shape[1])
        picture = Image.fromarray(np.ascontiguousarray(image))
        out[i] = np.asarray(resize_part(picture, (top, left, bottom, right), size=size))
    return out


def resize_part(picture: Image.Image, box: tuple[float, float, float, float], *, size: tuple[int, int]) -> Image.Image:
    """Resize a box (top, left, bottom, right) of a picture to `size`, (height, width); the filter may look beyond the box."""
    top, left, bottom, right = box
    # Two calls, because Pillow's own order of the passes depends on its version and on the shape.
    picture = picture.resize((size[1], picture.height), Image.Resampling.BILINEAR, box=(left, 0, right, picture.height))
    return picture.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=(0, top, size[1], bottom))


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
