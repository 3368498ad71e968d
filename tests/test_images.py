"""Image files: every mode and orientation, every kind of damage, and crops that decode only what they need."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from vitcli.config import AugmentConfig
from vitcli.data.images import MAX_PIXELS, EncodedImage, decode, read_size, to_rgb
from vitcli.data.transforms import EvalTransform, TrainTransform
from vitcli.errors import DataError, ExampleError

ORIENTATION = 0x0112


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Draw coarse structure, edges and a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse).astype(int)
    rows, columns = np.mgrid[0:height, 0:width]
    pixels[(rows // 19 + columns // 27) % 5 == 0] //= 2
    return Image.fromarray((pixels + rng.integers(-6, 7, pixels.shape)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "jpeg", orientation: int | None = None, **options: Any) -> bytes:
    """Write an image to memory."""
    if orientation is not None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def every_kind(height: int, width: int) -> dict[str, bytes]:
    """Return a file of every mode and format there is, each with another picture."""
    pictures = iter([photograph(height, width, seed) for seed in range(40)])
    alpha = Image.fromarray(np.linspace(0, 255, height * width).reshape(height, width).astype(np.uint8))
    wide = np.linspace(0, 65535, height * width).reshape(height, width).astype(np.uint16)
    transparent = next(pictures).copy()
    transparent.putalpha(alpha)
    files = {
        "jpeg": encode(next(pictures), quality=90),
        "jpeg 444": encode(next(pictures), subsampling=0),
        "jpeg progressive": encode(next(pictures), progressive=True),
        "jpeg grey": encode(next(pictures).convert("L")),
        "jpeg cmyk": encode(next(pictures).convert("CMYK")),
        "png": encode(next(pictures), "png"),
        "png grey": encode(next(pictures).convert("L"), "png"),
        "png 16 bit": encode(Image.fromarray(wide), "png"),
        "png bits": encode(next(pictures).convert("1"), "png"),
        "png palette": encode(next(pictures).quantize(20), "png"),
        "png palette transparent": encode(next(pictures).quantize(20), "png", transparency=3),
        "png rgb transparent": encode(next(pictures).quantize(5).convert("RGB"), "png", transparency=(0, 0, 0)),
        "png alpha": encode(transparent, "png"),
        "png grey alpha": encode(transparent.convert("LA"), "png"),
        "webp": encode(next(pictures), "webp"),
        "webp alpha": encode(transparent, "webp"),
        "gif": encode(next(pictures).quantize(20), "gif"),
        "bmp": encode(next(pictures), "bmp"),
        "ppm": encode(next(pictures), "ppm"),
        "tiff": encode(next(pictures), "tiff"),
    }
    for orientation in range(1, 9):
        files[f"jpeg turned {orientation}"] = encode(next(pictures), orientation=orientation)
    for kind in ("png", "webp", "tiff"):
        files[f"{kind} turned"] = encode(next(pictures), kind, orientation=6)
    return files


def full_turn(image: Image.Image) -> NDArray[np.uint8]:
    """Return what `to_rgb` makes of a file opened by Pillow alone, which applies the orientation of some formats itself."""
    image.load()
    return to_rgb(image)


AUGMENTS = {
    "inception": AugmentConfig(crop="inception"),
    "pad": AugmentConfig(crop="pad"),
    "random": AugmentConfig(crop="random"),
    "resize": AugmentConfig(crop="resize", flip=False),
    "randaugment": AugmentConfig(crop="inception", randaugment_layers=2, randaugment_magnitude=15),
}


def transformed(transform: TrainTransform, images: Any, where: list[str] | None = None) -> torch.Tensor:
    """Call a transform for pixels, or for files where these are given."""
    epochs, indices = np.zeros(len(images), np.int64), np.arange(len(images))
    if where is None:
        return transform(images, seed=3, epochs=epochs, indices=indices)
    return transform.from_encoded(images, where=where, seed=3, epochs=epochs, indices=indices)


def test_decode_is_to_rgb_and_tells_the_upright_size() -> None:
    for name, data in every_kind(21, 34).items():
        pixels = decode(data, where=name)
        assert pixels.dtype == np.uint8 and pixels.flags.writeable, name
        with Image.open(io.BytesIO(data)) as image:
            assert (pixels == full_turn(image)).all(), name
        assert read_size(data, where=name) == pixels.shape[:2], name
        sideways = name.endswith(("turned", "5", "6", "7", "8"))
        assert pixels.shape == ((34, 21, 3) if sideways else (21, 34, 3)), name


def test_orientation_after_the_pixels_of_a_png() -> None:
    plain = encode(photograph(10, 20), "png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    late = plain[:-12] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + plain[-12:]
    assert decode(plain, where="plain").shape == (10, 20, 3)
    assert decode(late, where="late").shape == (20, 10, 3) and read_size(late, where="late") == (20, 10)


@pytest.mark.parametrize("name", AUGMENTS)
def test_files_and_pixels_give_the_same_bit_for_bit(name: str) -> None:
    files = every_kind(50, 44)
    transform = TrainTransform(AUGMENTS[name], image_size=(32, 28))  # no crop is twice as large: nothing is left out
    got = transformed(transform, list(files.values()), list(files))
    pixels = [decode(data, where="") for data in files.values()]
    expected = transformed(transform, pixels)
    assert got.dtype == torch.uint8 and got.shape == (len(files), 3, 32, 28) and got.is_contiguous()
    different = [kind for kind, one, other in zip(files, got, expected, strict=True) if not torch.equal(one, other)]
    assert not different


@pytest.mark.parametrize("fraction", [None, 0.875, 1.0])
def test_evaluation_of_files_and_pixels_is_the_same(fraction: float | None) -> None:
    files = every_kind(50, 44)
    transform = EvalTransform(image_size=(32, 28), crop_fraction=fraction)
    got = transform.from_encoded(list(files.values()), where=list(files))
    assert torch.equal(got, transform([decode(data, where="") for data in files.values()]))


def test_files_that_are_no_jpeg_are_exact_at_any_size() -> None:
    files = {name: data for name, data in every_kind(300, 410).items() if "jpeg" not in name}
    transform = TrainTransform(AUGMENTS["inception"], image_size=(16, 16))
    got = transformed(transform, list(files.values()), list(files))
    assert torch.equal(got, transformed(transform, [decode(data, where="") for data in files.values()]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(32, 32), (100, 70)])  # an eighth or a quarter, and a half
def test_reduced_decoding_is_close(orientation: int, size: tuple[int, int]) -> None:
    data = encode(photograph(403, 517, orientation), orientation=orientation, quality=92)  # sides that no reduction divides
    pixels = decode(data, where="")
    height, width = pixels.shape[:2]
    for box, clip in (
        ((0.0, 0.0, height, width), True),
        ((0.0, 0.0, height, width), False),
        ((height - 241.0, width - 259.0, height, width), True),
        ((77.5, 33.25, 77.5 + 300, 33.25 + 211), False),
        ((101.0, 55.0, 101 + 287, 55 + 271), True),
    ):
        part, (top, left, bottom, right) = EncodedImage(data).part(box, size=size, clip=clip)
        picture = Image.fromarray(np.ascontiguousarray(part))
        assert picture.height * picture.width < height * width / 3
        assert 0 <= top < bottom <= picture.height and 0 <= left < right <= picture.width
        ours = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))
        whole = Image.fromarray(pixels)
        place = (box[1], box[0], box[3], box[2])
        expected = np.asarray(whole.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=place))
        difference = np.abs(ours.astype(int) - expected).mean()
        shifted = np.asarray(
            whole.transform(whole.size, Image.Transform.AFFINE, (1, 0, 3, 0, 1, 3)).resize(
                (size[1], size[0]), Image.Resampling.BILINEAR, box=place
            )
        )
        control = np.abs(shifted.astype(int) - expected).mean()  # three pixels to the side
        assert difference < 3.0 and difference < control / 3, (box, difference, control)


def test_the_result_keeps_the_crop_whatever_the_reduction() -> None:
    files = [encode(photograph(600, 450, seed), quality=92) for seed in range(12)]
    for name in ("inception", "random", "resize"):
        transform = TrainTransform(AUGMENTS[name], image_size=(48, 48))
        got = transformed(transform, files, [""] * 12).int()
        expected = transformed(transform, [decode(data, where="") for data in files]).int()
        each = (got - expected).abs().float().mean((1, 2, 3))
        assert 0 < float(each.max()) < 3.0 and float(each.mean()) < 2.2


def test_a_file_does_not_depend_on_its_batch() -> None:
    files = list(every_kind(90, 120).values())
    transform = TrainTransform(AUGMENTS["randaugment"], image_size=(24, 24))
    together = transformed(transform, files, [""] * len(files))
    for i in (0, 3, 14, len(files) - 1):
        alone = transform.from_encoded([files[i]], where=[""], seed=3, epochs=np.zeros(1, np.int64), indices=np.array([i]))
        assert torch.equal(alone[0], together[i])


def bomb_png(width: int, height: int) -> bytes:
    """Return the beginning of a PNG that claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def bomb_jpeg() -> bytes:
    data = bytearray(encode(photograph(16, 16)))
    start = data.index(b"\xff\xc0")  # SOF0: marker, length, precision, height, width
    data[start + 5 : start + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


def damaged() -> dict[str, tuple[bytes, str]]:
    """Return files that cannot be read, and why."""
    jpeg, png = encode(photograph(90, 70)), encode(photograph(90, 70), "png")
    webp = encode(photograph(90, 70), "webp")
    return {
        "empty": (b"", "the file is empty"),
        "text": (b"<html>404 Not Found</html>", "no image format recognises it"),
        "zeros": (bytes(5000), "no image format recognises it"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image format recognises it"),
        "half a jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "a jpeg's beginning": (jpeg[:40], ""),
        "two bytes": (jpeg[:2], "no image format recognises it"),
        "half a png": (png[: len(png) // 2], "truncated"),
        "a png's header": (png[:40], ""),
        "half a webp": (webp[: len(webp) // 2], ""),
        "changed png": (png[:200] + bytes(100) + png[300:], ""),
        "png bomb": (bomb_png(200_000, 200_000), "200000 x 200000 pixels are more than 300,000,000: a decompression bomb"),
        "jpeg bomb": (bomb_jpeg(), "65000 x 65000 pixels are more than 300,000,000: a decompression bomb"),
        "float": (encode(Image.fromarray(np.zeros((9, 9), np.float32)), "tiff"), "floating point pixels"),
    }


def test_damage_is_told_in_one_line() -> None:
    for name, (data, reason) in damaged().items():
        with pytest.raises(DataError) as error:
            decode(data, where=f"set/{name}.jpg")
        message = str(error.value)
        assert message.startswith(f"set/{name}.jpg: cannot read this image: "), message
        assert message.endswith("; repair or remove it") and reason in message and "\n" not in message, message
        assert type(error.value) is DataError


def test_large_images_below_the_limit_are_read_without_a_warning() -> None:
    side = int(MAX_PIXELS**0.5)
    assert read_size(bomb_png(side, side), where="large") == (side, side)  # Pillow alone would raise at 179 megapixels
    with pytest.raises(DataError, match="bomb"):
        read_size(bomb_png(side + 1, side + 1), where="larger")


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_file_is_told_by_its_position(kind: str) -> None:
    bad, _ = damaged()[kind]
    files = [encode(photograph(90, 70, seed)) for seed in range(5)]
    files[3] = bad
    where = [f"shard.tar:{i}.jpg" for i in range(5)]
    with pytest.raises(DataError) as alone:
        decode(bad, where=where[3])
    for transform in (
        TrainTransform(AUGMENTS["inception"], image_size=(8, 8)),
        TrainTransform(AUGMENTS["random"], image_size=(80, 60)),
    ):
        with pytest.raises(ExampleError) as error:
            transformed(transform, files, where)
        assert error.value.position == 3 and str(error.value) == str(alone.value)
    with pytest.raises(ExampleError) as error:
        EvalTransform(image_size=(32, 32)).from_encoded(files, where=where)
    assert error.value.position == 3 and str(error.value) == str(alone.value)
