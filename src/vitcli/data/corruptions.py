"""Images made worse on the fly: blur, noise, JPEG artefacts and lost contrast, at five strengths.

The strengths are those of Hendrycks and Dietterich (1903.12261), whose code has tables for pictures of 224 px (ImageNet-C),
64 px (Tiny-ImageNet-C) and 32 px (CIFAR-10-C), because what hardly shows in a large picture ruins a small one. In between they
are interpolated in the logarithm of the shorter side. Of a larger picture, noise and artefacts are made on a copy of 224 px
and enlarged with it, and blur grows with it, so that the picture suffers as its copy would.
Differences: values are rounded where theirs are truncated, and a corrupted picture is not stored as JPEG once more.
"""

import io
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.data.protocol import Labels, Source, SourceDefaults, UniformSource
from vitcli.errors import ConfigError
from vitcli.randomness import derive_seed

__all__ = ["CORRUPTIONS", "STRENGTHS", "CorruptedSource", "corrupt"]

CORRUPTIONS = ("blur", "noise", "jpeg", "contrast")
STRENGTHS = (1, 2, 3, 4, 5)
SIDES = (32, 64, 224)  # px, of the pictures that the tables below were made for
# Their gaussian_blur, gaussian_noise, jpeg_compression and contrast: by strength, for each of the sides.
BLUR_SIGMA = ((0.4, 0.6, 0.7, 0.8, 1.0), (0.5, 0.75, 1.0, 1.25, 1.5), (1.0, 2.0, 3.0, 4.0, 6.0))  # px
NOISE_STD = ((0.04, 0.06, 0.08, 0.09, 0.10), (0.04, 0.08, 0.12, 0.15, 0.18), (0.08, 0.12, 0.18, 0.26, 0.38))  # of [0, 1]
JPEG_QUALITY = ((80, 65, 58, 50, 40), (65, 58, 50, 40, 25), (25, 18, 15, 10, 7))
CONTRAST_KEPT = ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05), (0.4, 0.3, 0.2, 0.1, 0.05))
TABLES = {"blur": BLUR_SIGMA, "noise": NOISE_STD, "jpeg": JPEG_QUALITY, "contrast": CONTRAST_KEPT}


class CorruptedSource(SourceDefaults):
    """Another source's examples, made worse as they are stored, before they are resized for the model.

    What is done to an image is a function of its pixels, its index and the seed; noise is the same pattern at every strength.

    Args:
        kind: one of CORRUPTIONS.
        strength: 1 to 5.

    Raises:
        ConfigError: another kind or strength.
    """

    def __init__(self, source: Source, kind: str, strength: int, *, seed: int = 0) -> None:
        check(kind, strength)
        self.source = source
        self.kind = kind
        self.strength = strength
        self.seed = seed
        self.name = source.name
        self.classes = source.classes
        self.labels: Labels | None = source.labels
        self.fingerprint = f"{source.fingerprint}-{kind}-{strength}" + (f"-{seed}" if kind == "noise" else "")
        self.uniform = source.uniform
        self.remote = source.remote
        self.block_starts = source.block_starts
        self.groups = source.groups

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        image, label = self.source[index]
        return self.corrupted(image, index), label

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images (B, H, W, 3) and labels (B,); only of a uniform source."""
        images, labels = cast(UniformSource, self.source).batch(indices)
        worse = [self.corrupted(image, index) for image, index in zip(images, indices.tolist(), strict=True)]
        return (np.stack(worse) if worse else images), labels

    def where(self, index: int) -> str:
        """Say where an example lies."""
        return self.source.where(index)

    def corrupted(self, image: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        """Return the image (H, W, 3) of an index, made worse."""
        return corrupt(image, self.kind, self.strength, seed=derive_seed("corruption", self.seed, index))


def corrupt(image: NDArray[np.uint8], kind: str, strength: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) made worse; arguments as of `CorruptedSource`."""
    check(kind, strength)
    side = min(image.shape[:2])
    amount = strength_at(kind, strength, side)
    if kind == "contrast":
        return lowered_contrast(image, amount)
    if kind == "blur":
        return blurred(image, amount)
    if side <= SIDES[-1]:
        return noisy(image, amount, seed) if kind == "noise" else recompressed(image, round(amount))
    shrink = SIDES[-1] / side
    height, width = (max(1, round(length * shrink)) for length in image.shape[:2])
    small = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BOX))
    worse = noisy(small, amount, seed) if kind == "noise" else recompressed(small, round(amount))
    change = worse.astype(np.int16) - small
    rows = np.arange(image.shape[0]) * height // image.shape[0]
    columns = np.arange(image.shape[1]) * width // image.shape[1]
    return np.clip(image + change[rows][:, columns], 0, 255).astype(np.uint8)


def check(kind: str, strength: int) -> None:
    if kind not in CORRUPTIONS:
        raise ConfigError(f"corruption {kind!r}: unknown; expected one of {', '.join(CORRUPTIONS)}")
    if strength not in STRENGTHS:
        raise ConfigError(f"corruption {kind}: strength is {strength}, expected 1 to 5")


def strength_at(kind: str, strength: int, side: int) -> float:
    """Return the number that a strength stands for in pictures whose shorter side is `side` px."""
    column = [row[strength - 1] for row in TABLES[kind]]
    amount = float(np.interp(np.log2(side), np.log2(SIDES), column))
    if kind == "blur":  # of a larger picture it covers the same share
        amount *= max(1.0, side / SIDES[-1])
    return amount


def blurred(image: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Blur with a Gaussian of standard deviation `sigma` px, repeating the border, as scikit-image's `gaussian` does."""
    from scipy.ndimage import gaussian_filter

    return rounded(gaussian_filter(image.astype(np.float32), (sigma, sigma, 0), mode="nearest", truncate=4.0))


def noisy(image: NDArray[np.uint8], std: float, seed: int) -> NDArray[np.uint8]:
    """Add Gaussian noise to every value, `std` as a share of the full range."""
    grain = np.random.Generator(np.random.Philox(seed)).standard_normal(image.shape, dtype=np.float32)
    return rounded(image + (255 * std) * grain)


def recompressed(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Store as JPEG, chroma at half resolution, and read again."""
    stored = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stored, "JPEG", quality=quality)
    return np.array(Image.open(stored))


def lowered_contrast(image: NDArray[np.uint8], kept: float) -> NDArray[np.uint8]:
    """Bring values nearer to their channel's mean; `kept` is the share of the distance that is left."""
    mean = image.mean(axis=(0, 1), dtype=np.float64)
    return rounded((image - mean) * kept + mean)


def rounded(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
