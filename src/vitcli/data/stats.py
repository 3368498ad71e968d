"""Mean and standard deviation of a set's pixels, exactly: counts of the 256 values, summed in whole numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from vitcli.data.parallel import in_processes
from vitcli.data.protocol import Source, UniformSource
from vitcli.data.transforms import EvalTransform
from vitcli.randomness import derive_seed, permute

__all__ = ["PixelStats", "from_histogram", "measure_pixels", "sample_of"]

CHUNK = 64  # images per task


@dataclass(frozen=True)
class PixelStats:
    """Of pixels in [0, 1], one number for each of red, green and blue."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    examples: int
    pixels: int


def measure_pixels(
    source: Source,
    *,
    examples: int | None = None,
    transform: EvalTransform | None = None,
    seed: int = 0,
    jobs: int | None = None,
) -> PixelStats:
    """Measure a source, every pixel counting once.

    Args:
        examples: take a random part of this size, chosen by the seed; None takes all.
        transform: measure images after it, all of one size; None measures them as they are, where a large image counts more.
        jobs: processes; None takes one for each core.

    Raises:
        DataError: an image cannot be read.
    """
    indices = sample_of(source, examples=examples, seed=seed)
    chunks = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    counts = np.zeros((3, 256), np.int64)
    with tqdm(total=len(indices), desc="measuring", unit="img", leave=False, delay=1.0, disable=None) as bar:
        for chunk, found in zip(chunks, in_processes(CountValues(source, transform), chunks, jobs=jobs), strict=True):
            counts += found
            bar.update(len(chunk))
    return from_histogram(counts, examples=len(indices))


def sample_of(source: Source, *, examples: int | None, seed: int) -> NDArray[np.int64]:
    """Return indices, ascending: all, or a random choice of `examples`; smaller choices are contained in larger ones."""
    if examples is None or examples >= len(source):
        return np.arange(len(source))
    return np.sort(permute(np.arange(examples), len(source), derive_seed(seed, "stats")))


def from_histogram(counts: NDArray[np.int64], *, examples: int) -> PixelStats:
    """Turn counts of values (3, 256) into mean and standard deviation (of the population); exact up to the last rounding."""
    means, deviations = [], []
    for row in counts.tolist():
        total = sum(row)
        mean = Fraction(sum(value * count for value, count in enumerate(row)), total)
        square = Fraction(sum(value * value * count for value, count in enumerate(row)), total)
        means.append(float(mean / 255))
        deviations.append(sqrt((square - mean * mean) / 255**2))
    return PixelStats(as_three(means), as_three(deviations), examples, int(counts[0].sum()))


def as_three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


@dataclass(frozen=True)
class CountValues:
    """Count how often each value occurs in some examples, (3, 256)."""

    source: Source
    transform: EvalTransform | None

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        images: NDArray[np.uint8] | list[NDArray[np.uint8]]
        if self.source.uniform:
            images, _ = cast(UniformSource, self.source).batch(indices)
        else:
            images = [self.source[index][0] for index in indices.tolist()]
        if self.transform is not None:
            images = self.transform(images).permute(0, 2, 3, 1).contiguous().numpy()
        if isinstance(images, np.ndarray):
            images = [images.reshape(-1, *images.shape[2:])]  # one tall image
        counts = np.zeros((3, 256), np.int64)
        for image in images:
            counts += np.array(Image.fromarray(np.ascontiguousarray(image)).histogram(), np.int64).reshape(3, 256)
        return counts
