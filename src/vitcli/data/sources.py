"""What `cifar10`, `digits`, `folder:PATH` and `shapes` mean: every source is map-style, `len()` and `[index]`.

A source whose images all have one size, in memory or procedural, is `uniform` and also gives whole batches at once.
Sets small enough are decoded once (see `cache`); larger ones are decoded image by image by the loader's processes.
"""

import difflib
import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vitcli.config import DataConfig
from vitcli.data.cache import Pixels, decode_once, default_cache_dir, estimate_decoded_bytes
from vitcli.data.folders import ImageFiles, Split, open_folder
from vitcli.data.images import read_image
from vitcli.data.named import NAMED_SETS, Arrays, data_root, load_named
from vitcli.errors import DataError
from vitcli.randomness import derive_seed, permute

__all__ = ["ArraySource", "DecodedSource", "FileSource", "Source", "UniformSource", "open_source"]

DIGITS_VAL_FRACTION = 0.2  # scikit-learn publishes no split: 1,438 to train on, 359 to evaluate on


class Source(Protocol):
    """Labelled images by index."""

    name: str
    classes: list[str]
    labels: NDArray[np.int64] | None  # (N,), None where they are computed
    fingerprint: str  # equal for equal content, wherever it is stored
    uniform: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Return the image, (H, W, 3), and its label."""
        ...


class UniformSource(Source, Protocol):
    """A source with images of one size, for vectorised augmentation."""

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images (B, H, W, 3) and labels (B,)."""
        ...


class ArraySource:
    """Images of one size held as an array, (N, H, W, 3) or grey (N, H, W)."""

    uniform = True

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: list[str], *, name: str, fingerprint: str
    ) -> None:
        self.images = images
        self.labels: NDArray[np.int64] | None = labels
        self.classes = classes
        self.name = name
        self.fingerprint = fingerprint
        self._labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        images, labels = self.batch(np.array([index]))
        return images[0], int(labels[0])

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images (B, H, W, 3) and labels (B,)."""
        images = self.images[indices]
        if images.ndim == 3:  # grey is kept as one channel: a third of the memory
            images = np.repeat(images[..., None], 3, axis=3)
        return images, self._labels[indices]


class DecodedSource:
    """Decoded images of any size, usually memory-mapped from the cache."""

    def __init__(self, pixels: Pixels, files: ImageFiles, *, name: str, fingerprint: str) -> None:
        self.pixels = pixels
        self.labels: NDArray[np.int64] | None = files.labels
        self.classes = files.classes
        self.name = name
        self.fingerprint = fingerprint
        self.uniform = pixels.uniform
        self._labels = files.labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.pixels[index], int(self._labels[index])

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images (B, H, W, 3) and labels (B,); only where all images have one size."""
        return self.pixels.stacked()[indices], self._labels[indices]


class FileSource:
    """Image files, decoded each time they are asked for."""

    uniform = False

    def __init__(self, files: ImageFiles, *, name: str, fingerprint: str) -> None:
        self.files = files
        self.labels: NDArray[np.int64] | None = files.labels
        self.classes = files.classes
        self.name = name
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.files.relative)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        path = os.path.join(self.files.root, self.files.relative[index])
        return read_image(path), int(self.files.labels[index])


def open_source(spec: str, *, split: Split, data: DataConfig) -> Source:
    """Open one split of the set that `spec` names; `val` is the split to evaluate on, the test set where one is published.

    Args:
        spec: a name, or folder:PATH.
        data: where to look, how large to cache; `data.source` is not read, so that two sets may share a section.

    Raises:
        DataError: unknown name, nothing found, or content that makes no labelled set.
    """
    if spec == "shapes":
        from vitcli.data.shapes import ShapesSource

        shapes = data.shapes
        examples = shapes.train_examples if split == "train" else shapes.val_examples
        return ShapesSource(
            classes=shapes.classes, examples=examples, image_size=data.image_size, seed=shapes.seed, split=split
        )
    if spec == "digits":
        return from_arrays(load_digits(split), name="digits")
    if spec in NAMED_SETS:
        found = load_named(spec, split=split, root=data_root(data.root), val_fraction=data.val_fraction)
        if isinstance(found, Arrays):
            return from_arrays(found, name=spec)
        return from_files(found, name=spec, split=split, data=data)
    kind, _, path = spec.partition(":")
    if kind == "folder" and path:
        files = open_folder(Path(path), split=split, val_fraction=data.val_fraction)
        return from_files(files, name=spec, split=split, data=data)
    names = ["shapes", "digits", *NAMED_SETS]
    close = difflib.get_close_matches(spec, names, n=1)
    if not close and Path(spec).is_dir():
        close = [f"folder:{spec}"]
    hint = f"; did you mean {close[0]}?" if close else ""
    raise DataError(f"{spec}: no such data set; known are {', '.join(names)} and folder:PATH{hint}")


def from_arrays(arrays: Arrays, *, name: str) -> ArraySource:
    digest = hashlib.sha256(repr((arrays.images.shape, arrays.classes)).encode())
    digest.update(arrays.labels.tobytes())
    digest.update(arrays.images[:: max(1, len(arrays.images) // 997)].tobytes())  # a spread of 1,000: all would cost seconds
    fingerprint = digest.hexdigest()[:24]
    return ArraySource(arrays.images, arrays.labels, arrays.classes, name=name, fingerprint=fingerprint)


def from_files(files: ImageFiles, *, name: str, split: Split, data: DataConfig) -> Source:
    fingerprint = fingerprint_of(files)
    limit_bytes = data.memory_cache_gib * 2**30
    if limit_bytes and estimate_decoded_bytes(files) <= limit_bytes:
        pixels = decode_once(files, cache_dir=default_cache_dir(), name=f"{name} {split}")
        return DecodedSource(pixels, files, name=name, fingerprint=fingerprint)
    return FileSource(files, name=name, fingerprint=fingerprint)


def fingerprint_of(files: ImageFiles) -> str:
    """Hash names, sizes and labels; not the times or the place, which a copy changes."""
    digest = hashlib.sha256(repr(files.classes).encode())
    digest.update("\n".join(files.relative).encode(errors="surrogateescape"))
    digest.update(files.bytes.tobytes())
    digest.update(files.labels.tobytes())
    return digest.hexdigest()[:24]


def load_digits(split: Split) -> Arrays:
    """Read scikit-learn's handwritten digits: 1,797 grey 8x8 images with values 0 to 16; every fifth of a class is held out."""
    from sklearn.datasets import load_digits as read_digits

    stored: Any = read_digits()
    images = np.floor(stored.images * (255 / 16) + 0.5).astype(np.uint8)  # (1797, 8, 8)
    labels = stored.target.astype(np.int64)
    keep = []
    for label in range(10):
        members = np.flatnonzero(labels == label)
        order = members[permute(np.arange(len(members)), len(members), derive_seed("digits", label))]
        held_out = round(len(members) * DIGITS_VAL_FRACTION)
        keep.append(order[:held_out] if split == "val" else order[held_out:])
    chosen = np.sort(np.concatenate(keep))
    return Arrays(images[chosen], labels[chosen], [str(digit) for digit in range(10)])
