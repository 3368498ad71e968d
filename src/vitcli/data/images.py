"""Image files to RGB: whatever a folder holds comes out as uint8 (H, W, 3), upright.

Greyscale, palette, CMYK, transparent and 16-bit images are converted as described at `to_rgb`.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vitcli.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "read_image", "read_size", "to_rgb"]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
EXIF_ORIENTATION = 0x0112  # Exif 2.3, tag 274; 1 is upright


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert any image to uint8 (H, W, 3), turned upright as its EXIF orientation says.

    16-bit grey is scaled to 8 bits (not clipped). Transparent pixels are composited on white, as a page would show them;
    dropping alpha instead would show whatever colour the file happens to store there. Of animations the first frame is taken.

    Raises:
        ValueError: the pixels are floating point numbers, whose range the file does not tell.
    """
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16 and its byte orders; Pillow reads some 16-bit files, such as PGM, as 32-bit I
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        grey = ((wide + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(page, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read one image file as uint8 (H, W, 3).

    Raises:
        DataError: it is missing or damaged; names the file and the reason.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow's readers raise anything from OSError to struct.error on damaged files
        raise DataError(f"{Path(path)}: cannot read this image: {reason(error, path)}; repair or remove it") from error


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read (height, width) from an image's header, px; orientation not applied. Raises DataError like `read_image`."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:
        raise DataError(f"{Path(path)}: cannot read this image: {reason(error, path)}; repair or remove it") from error


def reason(error: Exception, path: str | os.PathLike[str]) -> str:
    """Say in one line why reading failed."""
    try:
        if os.path.getsize(path) == 0:
            return "the file is empty"
    except OSError:
        return "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return "no image format recognises it"
    return " ".join(str(error).split()) or type(error).__name__
