"""RandAugment (Cubuk et al., 1909.13719) as the AugReg runs used it (big_vision `pp/autoaugment.py`), for whole batches.

16 operations, each layer picks one per image. Magnitude 10 is full strength; AugReg goes up to 20. Vectorised by grouping the
images of a batch by operation. Integer or strictly element-wise arithmetic, so a result does not depend on the rest of the
batch. Deviations: distances are shares of the image side (the original's pixels at 224), posterize keeps at least one bit as
TensorFlow's shift does, and contrast uses the true mean (the original divides by 256 instead of the number of pixels).
"""

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["DRAWS_PER_LAYER", "OPERATIONS", "randaugment"]

Images = NDArray[np.uint8]  # (B, H, W, 3)

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness",
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
)  # fmt: skip
DRAWS_PER_LAYER = 4  # operation, sign, and a place (row, column) for Cutout
FULL_LEVEL = 10.0  # magnitude at which an operation has the strength written beside it below
GREY = 128  # fills what rotation, shear, translation and cutout uncover


def randaugment(images: Images, draws: NDArray[np.float64], *, magnitude: float) -> Images:
    """Return augmented copies of images (B, H, W, 3).

    Args:
        draws: (B, layers, 4) in [0, 1); one operation is applied per layer.
        magnitude: 0 to 30; 10 is the reference's full strength.
    """
    images = images.copy()
    for layer in range(draws.shape[1]):
        chosen = (draws[:, layer, 0] * len(OPERATIONS)).astype(np.int64)
        for operation in np.unique(chosen):
            members = np.flatnonzero(chosen == operation)
            images[members] = apply(
                OPERATIONS[operation], images[members], draws[members, layer, 1:], level=magnitude / FULL_LEVEL
            )
    return images


def apply(name: str, images: Images, draws: NDArray[np.float64], *, level: float) -> Images:
    """Apply one operation at `level` (1 is full strength); draws (B, 3) give sign, row and column."""
    height, width = images.shape[1:3]
    if name == "AutoContrast":
        return autocontrast(images)
    if name == "Equalize":
        return equalize(images)
    if name == "Invert":
        return 255 - images
    if name == "Posterize":
        shift = np.uint8(min(7, max(0, 8 - int(level * 4))))
        return ((images >> shift) << shift).astype(np.uint8)
    if name == "Solarize":
        return np.where(images < int(level * 256), images, 255 - images)
    if name == "SolarizeAdd":
        return np.where(images < 128, np.minimum(images.astype(np.int32) + int(level * 110), 255).astype(np.uint8), images)
    if name == "Color":
        return blend(np.repeat(to_grey(images)[..., None], 3, axis=3), images, factor=level * 1.8 + 0.1)
    if name == "Contrast":
        grey = to_grey(images).reshape(len(images), -1).astype(np.int64)
        mean = (grey.sum(axis=1) / grey.shape[1] + 0.5).astype(np.uint8)
        return blend(np.broadcast_to(mean[:, None, None, None], images.shape), images, factor=level * 1.8 + 0.1)
    if name == "Brightness":
        return blend(np.zeros_like(images), images, factor=level * 1.8 + 0.1)
    if name == "Sharpness":
        return blend(smooth(images), images, factor=level * 1.8 + 0.1)
    if name == "Cutout":
        return cutout(images, draws[:, 1:], share=level * 40 / 224)
    positive = draws[:, 0] < 0.5
    result = np.empty_like(images)
    for members, sign in ((positive, 1.0), (~positive, -1.0)):
        if name == "Rotate":
            angle = math.radians(sign * level * 30)
            cos, sin = math.cos(angle), math.sin(angle)
            x, y = (width - 1) / 2, (height - 1) / 2
            matrix = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
        elif name == "ShearX":
            matrix = (1.0, sign * level * 0.3, 0.0, 0.0, 1.0, 0.0)
        elif name == "ShearY":
            matrix = (1.0, 0.0, 0.0, sign * level * 0.3, 1.0, 0.0)
        elif name == "TranslateX":
            matrix = (1.0, 0.0, sign * level * 100 / 224 * width, 0.0, 1.0, 0.0)
        elif name == "TranslateY":
            matrix = (1.0, 0.0, 0.0, 0.0, 1.0, sign * level * 100 / 224 * height)
        else:
            raise ValueError(f"{name} is not one of the operations")
        result[members] = warp(images[members], matrix)
    return result


def to_grey(images: Images) -> NDArray[np.uint8]:
    """Return luma (B, H, W) by ITU-R 601, in Pillow's fixed-point arithmetic."""
    wide = images.astype(np.int32)
    return ((wide[..., 0] * 19595 + wide[..., 1] * 38470 + wide[..., 2] * 7471 + 0x8000) >> 16).astype(np.uint8)


def blend(degenerate: Images, images: Images, *, factor: float) -> Images:
    """Interpolate from `degenerate` (factor 0) over the images (1) to beyond them; truncated as the reference does."""
    start = degenerate.astype(np.float32)
    mixed = start + np.float32(factor) * (images.astype(np.float32) - start)
    return np.clip(mixed, 0.0, 255.0).astype(np.uint8)


def autocontrast(images: Images) -> Images:
    """Stretch each channel to the full range."""
    low = images.min(axis=(1, 2), keepdims=True).astype(np.float32)
    high = images.max(axis=(1, 2), keepdims=True).astype(np.float32)
    scale = np.float32(255) / np.maximum(high - low, 1)
    stretched = np.clip((images.astype(np.float32) - low) * scale, 0.0, 255.0).astype(np.uint8)
    return np.where(high > low, stretched, images)


def equalize(images: Images) -> Images:
    """Flatten each channel's histogram, with Pillow's rounding."""
    batch, height, width, _ = images.shape
    planes = 3 * batch
    values = images.transpose(0, 3, 1, 2).reshape(planes, -1).astype(np.int64)  # (3B, HW)
    rows = np.arange(planes)[:, None]
    counts = np.bincount((rows * 256 + values).ravel(), minlength=planes * 256).reshape(planes, 256)
    step = (height * width - counts[np.arange(planes), values.max(axis=1)]) // 255  # (3B,)
    before = np.cumsum(counts, axis=1) - counts
    table = np.minimum((before + step[:, None] // 2) // np.maximum(step, 1)[:, None], 255)
    table[step == 0] = np.arange(256)
    mapped = table[rows, values].astype(np.uint8).reshape(batch, 3, height, width)
    return np.ascontiguousarray(mapped.transpose(0, 2, 3, 1))


def smooth(images: Images) -> Images:
    """Filter with Pillow's SMOOTH kernel (1 1 1, 1 5 1, 1 1 1) / 13; the border pixels stay."""
    wide = images.astype(np.int32)
    height, width = images.shape[1:3]
    result = images.copy()
    if height < 3 or width < 3:
        return result
    total = 4 * wide[:, 1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total += wide[:, row : height - 2 + row, column : width - 2 + column]
    result[:, 1:-1, 1:-1] = total // 13
    return result


def cutout(images: Images, places: NDArray[np.float64], *, share: float) -> Images:
    """Cover a rectangle of half side `share` of the image around a place (B, 2) in [0, 1)."""
    height, width = images.shape[1:3]
    row = np.floor(places[:, 0] * height)[:, None]
    column = np.floor(places[:, 1] * width)[:, None]
    rows = (np.arange(height) >= row - round(share * height)) & (np.arange(height) < row + round(share * height))  # (B, H)
    columns = (np.arange(width) >= column - round(share * width)) & (np.arange(width) < column + round(share * width))
    covered = rows[:, :, None] & columns[:, None, :]
    return np.where(covered[..., None], np.uint8(GREY), images)


def warp(images: Images, matrix: tuple[float, float, float, float, float, float]) -> Images:
    """Map output pixel (x, y) to input (a x + b y + c, d x + e y + f), nearest neighbour; grey outside."""
    batch, height, width, _ = images.shape
    a, b, c, d, e, f = matrix
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    from_x = np.rint(a * x + b * y + c).astype(np.int64).ravel()
    from_y = np.rint(d * x + e * y + f).astype(np.int64).ravel()
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    source = np.where(inside, from_y * width + from_x, 0)
    result = images.reshape(batch, height * width, 3)[:, source]
    result[:, ~inside] = GREY
    return result.reshape(images.shape)
