"""RandAugment (Cubuk et al., 1909.13719) as the AugReg runs used it (big_vision `pp/autoaugment.py`), for whole batches.

16 operations, each layer picks one per image. Magnitude 10 is full strength; AugReg goes up to 20. Vectorised by grouping the
images of a batch by operation; half of the operations are tables of 256 entries. Integer or strictly element-wise arithmetic,
so a result does not depend on the rest of the batch. Deviations: distances are shares of the image side (the original's pixels
at 224), posterize keeps at least one bit as TensorFlow's shift does, and contrast uses the true mean (the original divides by
256 instead of the number of pixels).
"""

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["DRAWS_PER_LAYER", "OPERATIONS", "randaugment"]

Images = NDArray[np.uint8]  # (B, 3, H, W): planes, because numpy is several times faster along long rows than along 3 channels
Tables = NDArray[np.uint8]  # (..., 256)

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness",
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
)  # fmt: skip
DRAWS_PER_LAYER = 4  # operation, sign, and a place (row, column) for Cutout
FULL_LEVEL = 10.0  # magnitude at which an operation has the strength written beside it below
GREY = 128  # fills what rotation, shear, translation and cutout uncover
VALUES = np.arange(256)


def randaugment(images: Images, draws: NDArray[np.float64], *, magnitude: float) -> Images:
    """Return augmented copies of images (B, 3, H, W).

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
    height, width = images.shape[2:]
    factor = level * 1.8 + 0.1
    if name == "AutoContrast":
        return autocontrast(images)
    if name == "Equalize":
        return equalize(images)
    if name == "Invert":
        return look_up(images, 255 - VALUES)
    if name == "Posterize":
        shift = min(7, max(0, 8 - int(level * 4)))
        return look_up(images, (VALUES >> shift) << shift)
    if name == "Solarize":
        return look_up(images, np.where(int(level * 256) <= VALUES, 255 - VALUES, VALUES))
    if name == "SolarizeAdd":
        return look_up(images, np.where(VALUES < 128, np.minimum(VALUES + int(level * 110), 255), VALUES))
    if name == "Color":
        return blend(to_grey(images)[:, None], images, factor=factor)
    if name == "Contrast":
        grey = to_grey(images).reshape(len(images), -1)
        mean = (grey.sum(axis=1, dtype=np.int64) / grey.shape[1] + 0.5).astype(np.uint8)
        return look_up(images, blend(mean[:, None, None], VALUES[None, None], factor=factor))
    if name == "Brightness":
        return look_up(images, blend(np.zeros(1), VALUES, factor=factor))
    if name == "Sharpness":
        return blend(smooth(images), images, factor=factor)
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


def look_up(images: Images, tables: NDArray[np.integer]) -> Images:
    """Replace every value by its entry: in one table (256,), or in one for each image (B, 1, 256) or plane (B, 3, 256).

    By `bytes.translate`, which takes a third of the time of numpy's indexing.
    """
    tables = tables.astype(np.uint8)
    if tables.ndim == 1:
        return np.frombuffer(images.tobytes().translate(tables.tobytes()), np.uint8).reshape(images.shape)
    pieces = images.reshape(-1, images[0].size // tables.shape[1])
    mapped = b"".join(
        piece.tobytes().translate(table.tobytes()) for piece, table in zip(pieces, tables.reshape(-1, 256), strict=True)
    )
    return np.frombuffer(mapped, np.uint8).reshape(images.shape)


def to_grey(images: Images) -> NDArray[np.uint8]:
    """Return luma (B, H, W) by ITU-R 601, in Pillow's fixed-point arithmetic."""
    total = images[:, 0].astype(np.int32)
    total *= 19595
    total += images[:, 1] * np.int32(38470)
    total += images[:, 2] * np.int32(7471)
    total += 0x8000
    return (total >> 16).astype(np.uint8)


def blend(degenerate: NDArray[np.generic], images: NDArray[np.integer], *, factor: float) -> Images:
    """Interpolate from `degenerate` (factor 0) over the images (1) to beyond them; truncated as the reference does."""
    start = degenerate.astype(np.float32)
    mixed = images.astype(np.float32) - start
    mixed *= np.float32(factor)
    mixed += start
    np.clip(mixed, 0.0, 255.0, out=mixed)
    return mixed.astype(np.uint8)


def autocontrast(images: Images) -> Images:
    """Stretch each channel to the full range."""
    planes = images.reshape(*images.shape[:2], -1)
    low = planes.min(axis=2, keepdims=True).astype(np.float32)  # (B, 3, 1)
    high = planes.max(axis=2, keepdims=True).astype(np.float32)
    scale = np.float32(255) / np.maximum(high - low, 1)
    stretched = np.clip((VALUES.astype(np.float32) - low) * scale, 0.0, 255.0)
    return look_up(images, np.where(high > low, stretched, VALUES))


def equalize(images: Images) -> Images:
    """Flatten each channel's histogram, with Pillow's rounding."""
    planes = images.reshape(-1, images[0, 0].size)  # (3B, HW)
    counts = np.stack([np.bincount(plane, minlength=256) for plane in planes])
    step = (planes.shape[1] - counts[np.arange(len(planes)), planes.max(axis=1)]) // 255  # (3B,)
    before = np.cumsum(counts, axis=1) - counts
    tables = np.minimum((before + step[:, None] // 2) // np.maximum(step, 1)[:, None], 255)
    tables[step == 0] = VALUES
    return look_up(images, tables.reshape(-1, 3, 256))


def smooth(images: Images) -> Images:
    """Filter with Pillow's SMOOTH kernel (1 1 1, 1 5 1, 1 1 1) / 13; the border pixels stay."""
    result = images.copy()
    if min(images.shape[2:]) < 3:
        return result
    wide = images.astype(np.uint16)  # 13 * 255 fits
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    total += 4 * wide[:, :, 1:-1, 1:-1]
    result[:, :, 1:-1, 1:-1] = total // 13
    return result


def cutout(images: Images, places: NDArray[np.float64], *, share: float) -> Images:
    """Cover a rectangle of half side `share` of the image around a place (B, 2) in [0, 1)."""
    height, width = images.shape[2:]
    down, right = round(share * height), round(share * width)
    result = images.copy()
    for image, place in zip(result, places.tolist(), strict=True):
        row, column = math.floor(place[0] * height), math.floor(place[1] * width)
        image[:, max(0, row - down) : row + down, max(0, column - right) : column + right] = GREY
    return result


def warp(images: Images, matrix: tuple[float, float, float, float, float, float]) -> Images:
    """Map output pixel (x, y) to input (a x + b y + c, d x + e y + f), nearest neighbour; grey outside."""
    height, width = images.shape[2:]
    a, b, c, d, e, f = matrix
    x, y = np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64)[:, None]
    from_x = np.rint(a * x + b * y + c).astype(np.int64).ravel()
    from_y = np.rint(d * x + e * y + f).astype(np.int64).ravel()
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    source = np.where(inside, from_y * width + from_x, height * width)
    planes = np.full((images.size // (height * width), height * width + 1), GREY, np.uint8)  # one pixel of grey behind each
    planes[:, :-1] = images.reshape(-1, height * width)
    return planes.take(source, axis=1, mode="clip").reshape(images.shape)
