"""Image files to RGB: whatever a folder or a shard holds comes out as uint8 (H, W, 3), upright.

Greyscale, palette, CMYK, transparent and 16-bit images are converted as described at `to_rgb`. `EncodedImage` reads a file in
two steps, header first, so that a crop can be chosen before any pixel is decoded and only what it needs is decoded. Ordinary
JPEGs go straight to libjpeg-turbo, in a third (small ones) to two thirds of Pillow's time; Pillow, which uses the same
library with the same settings, gives the same pixels, reads everything else, and judges what is damaged.
"""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vitcli.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "EncodedImage", "ImageError", "decode", "read_size", "to_rgb", "unreadable"]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
# What these suffixes stand for, whatever a file is called: Pillow knows formats that start other programs to be read (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
MAX_PIXELS = 300_000_000  # 2.1 GB while it is decoded; twice the largest cameras, while a bomb's header claims billions
BAND_PIXELS = 1 << 20  # converted at a time: the steps in between take up to 24 bytes for a pixel
# The limit above is checked on every header. Pillow's own would warn, at 89 megapixels, before it raises.
Image.MAX_IMAGE_PIXELS = None

EXIF_ORIENTATION = 0x0112  # Exif 2.3, tag 274; 1 is upright
UPRIGHT = {  # EXIF orientation: what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNTURNED: dict[Image.Transpose, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {  # views of a picture as it was before
    Image.Transpose.FLIP_LEFT_RIGHT: lambda upright: upright[:, ::-1],
    Image.Transpose.ROTATE_180: lambda upright: upright[::-1, ::-1],
    Image.Transpose.FLIP_TOP_BOTTOM: lambda upright: upright[::-1],
    Image.Transpose.TRANSPOSE: lambda upright: upright.swapaxes(0, 1),
    Image.Transpose.ROTATE_270: lambda upright: np.rot90(upright),
    Image.Transpose.TRANSVERSE: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    Image.Transpose.ROTATE_90: lambda upright: np.rot90(upright, -1),
}
SIDEWAYS = (5, 6, 7, 8)  # rows become columns
ENDS_LEFT = (2, 3, 6, 7)  # the stored picture's end, right or bottom, comes to lie at the left
ENDS_TOP = (3, 4, 7, 8)  # or at the top
LATE_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # PNG chunks that may follow the pixels
JPEG_START = b"\xff\xd8\xff"
JPEG_TURNED = (b"Exif\x00", b"http://ns.adobe.com/xap/")  # where a JPEG's orientation may stand
PLAIN_COLOURS = ("YCbCr", "Gray", "RGB")  # of JPEGs; CMYK and YCCK go to Pillow
REDUCTIONS = (8, 4, 2)  # what libjpeg's inverse DCT can leave out: 7/8, 3/4 or half of the rows and columns


class ImageError(Exception):
    """Why a file cannot be read; `unreadable` makes a message of it."""


class EncodedImage:
    """An image file of which only the header has been read; the pixels are decoded when they are asked for, once.

    Attributes:
        height, width: px, upright.
    """

    def __init__(self, data: bytes) -> None:
        """Read the header of a file. Raises ImageError."""
        self._file: bytes | Image.Image | None  # what is still to be decoded: a plain JPEG, or anything as Pillow opened it
        self._orientation = 1
        try:
            if (plain := plain_jpeg_size(data)) is not None:
                self._file = data
                self.height, self.width = plain
            else:
                self._file = Image.open(io.BytesIO(data), formats=FORMATS)
                self.width, self.height = self._file.size
            if self.width * self.height > MAX_PIXELS:
                raise ValueError(f"{self.width} x {self.height} pixels are more than {MAX_PIXELS:,}: a decompression bomb?")
            if isinstance(self._file, Image.Image):
                self._orientation = orientation(self._file, data)
        except Exception as error:  # Pillow's readers raise anything from OSError to struct.error on damaged files
            raise ImageError("the file is empty" if not data else reason_of(error)) from error
        if self._orientation in SIDEWAYS:
            self.height, self.width = self.width, self.height

    def pixels(self) -> NDArray[np.uint8]:
        """Decode all of it, (H, W, 3). Raises ImageError."""
        return self._decoded(1)

    def part(
        self, box: Sequence[float], *, size: tuple[int, int], clip: bool
    ) -> tuple[NDArray[np.uint8], tuple[float, float, float, float]]:
        """Decode what resizing a box to `size` needs: return RGB pixels (H, W, 3) and where in them the box lies.

        Of a JPEG at least twice as large as `size` only every second (fourth, eighth) row and column is made, by the inverse
        DCT itself, averaged; after resizing that differs by one to two levels on average from decoding in full. Anything
        else is exact.

        Args:
            box: top, left, bottom, right, px of the upright image.
            size: (height, width) that the box will be resized to.
            clip: whether nothing outside of the box is needed.

        Raises:
            ImageError: the file is damaged.
        """
        top, left, bottom, right = box
        shrink = next((r for r in REDUCTIONS if bottom - top >= r * size[0] and right - left >= r * size[1]), 1)
        if isinstance(self._file, Image.Image) and self._file.format not in ("JPEG", "MPO"):
            shrink = 1
        pixels = self._decoded(shrink)
        if shrink > 1:
            # The last row and column of the reduced picture may be incomplete; turned, they may come first.
            above = pixels.shape[0] * shrink - self.height if self._orientation in ENDS_TOP else 0
            before = pixels.shape[1] * shrink - self.width if self._orientation in ENDS_LEFT else 0
            top, bottom = (top + above) / shrink, (bottom + above) / shrink
            left, right = (left + before) / shrink, (right + before) / shrink
        if clip:
            row, column = math.floor(top), math.floor(left)
            pixels = pixels[row : math.ceil(bottom), column : math.ceil(right)]
            top, left, bottom, right = top - row, left - column, bottom - row, right - column
        return pixels, (top, left, bottom, right)

    def _decoded(self, shrink: int) -> NDArray[np.uint8]:
        """Decode, upright, each side divided by `shrink` and rounded up; once."""
        file, self._file = self._file, None  # a batch of files must not become a batch of pictures in memory
        assert file is not None
        try:
            if isinstance(file, bytes):
                try:
                    return reduced_jpeg(file, height=self.height, width=self.width, shrink=shrink)
                except ValueError:  # damaged: Pillow decides whether enough of it can be read, and says what is wrong
                    file = Image.open(io.BytesIO(file), formats=FORMATS)
            if shrink > 1:
                file.draft(None, (file.width // shrink, file.height // shrink))
            file.load()
            return rgb_pixels(file, UPRIGHT.get(self._orientation))
        except Exception as error:
            raise ImageError(reason_of(error)) from error


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that needs no turning and has RGB or grey pixels; None for any other file."""
    if not data.startswith(JPEG_START) or any(mark in data for mark in JPEG_TURNED):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if colours in PLAIN_COLOURS else None


def reduced_jpeg(data: bytes, *, height: int, width: int, shrink: int) -> NDArray[np.uint8]:
    """Decode a JPEG of the given size, each side divided by `shrink` and rounded up. Raises ValueError: it is damaged."""
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        data, min_height=-(-height // shrink), min_width=-(-width // shrink), min_factor=shrink
    )
    return pixels


def orientation(image: Image.Image, data: bytes | None = None) -> int:
    """Return the EXIF orientation, 1 for upright; given the file's content, without decoding a PNG where that is avoidable."""
    if image.format == "TIFF":  # Pillow turns these upright itself, and tells their upright size
        silent = True
    elif image.format in ("JPEG", "MPO", "WEBP"):  # their headers are complete
        silent = "exif" not in image.info and "xmp" not in image.info
    else:
        silent = image.format == "PNG" and data is not None and not any(mark in data for mark in LATE_EXIF)
    return 1 if silent else int(image.getexif().get(EXIF_ORIENTATION, 1))


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to mode RGB, pixel by pixel, as described at `to_rgb`; orientation is not looked at."""
    if image.mode == "F":
        raise ValueError("floating point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16 and its byte orders; Pillow reads some 16-bit files, such as PGM, as 32-bit I
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(page, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert any image to uint8 (H, W, 3), turned upright as its EXIF orientation says.

    16-bit grey is scaled to 8 bits (not clipped). Transparent pixels are composited on white, as a page would show them;
    dropping alpha instead would show whatever colour the file happens to store there. Of animations the first frame is taken.

    Raises:
        ValueError: the pixels are floating point numbers, whose range the file does not tell.
    """
    return rgb_pixels(image, UPRIGHT.get(orientation(image)))


def rgb_pixels(image: Image.Image, turn: Image.Transpose | None) -> NDArray[np.uint8]:
    """Convert to uint8 (H, W, 3) and turn, large images band by band: less than half of the memory, and the same pixels."""
    width, height = image.size
    if width * height <= BAND_PIXELS:
        return np.array(as_rgb(image if turn is None else image.transpose(turn)))
    pixels = np.empty((width, height, 3) if turn in map(UPRIGHT.get, SIDEWAYS) else (height, width, 3), np.uint8)
    stored = pixels if turn is None else UNTURNED[turn](pixels)  # a view of it that lies as the file does
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        stored[top : top + rows] = np.asarray(as_rgb(image.crop((0, top, width, min(top + rows, height)))))
    return pixels


def decode(data: bytes, *, where: str) -> NDArray[np.uint8]:
    """Decode the content of one image file to uint8 (H, W, 3).

    Raises:
        DataError: it is empty, damaged, no image, or larger than MAX_PIXELS; says where it was found and the reason.
    """
    try:
        return EncodedImage(data).pixels()
    except ImageError as error:
        raise unreadable(where, error) from error


def read_size(data: bytes, *, where: str) -> tuple[int, int]:
    """Read (height, width) from an image's header, px, upright. Raises DataError like `decode`."""
    try:
        image = EncodedImage(data)
    except ImageError as error:
        raise unreadable(where, error) from error
    return image.height, image.width


def reason_of(error: Exception) -> str:
    """Say in one line why reading failed."""
    if isinstance(error, UnidentifiedImageError):
        return "no image format recognises it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def unreadable(where: str, error: ImageError) -> DataError:
    """Return the error to show for a file, given where it was found."""
    return DataError(f"{where}: cannot read this image: {error}; repair or remove it")
