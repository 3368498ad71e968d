"""What `cifar10`, `digits`, `folder:PATH` and `shapes` mean: every source is map-style, `len()` and `[index]`.

Sets small enough are decoded once (see `cache`); larger ones are decoded image by image by the loader's processes.
"""

import difflib
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.config import DataConfig
from vitcli.data.cache import Pixels, cache_key, decode_once, default_cache_dir, estimate_decoded_bytes
from vitcli.data.folders import ImageFiles, Split, has_class_folders, open_folder, open_unlabelled
from vitcli.data.images import decode
from vitcli.data.mix import MixSource
from vitcli.data.named import NAMED_SETS, Arrays, data_root, load_named
from vitcli.data.protocol import EncodedSource, Labels, Source, SourceDefaults
from vitcli.data.shards import open_shards
from vitcli.data.subset import take_dev_split, take_subset
from vitcli.errors import DataError
from vitcli.randomness import derive_seed, permute

__all__ = ["ArraySource", "DecodedSource", "FileSource", "open_source"]

DIGITS_VAL_FRACTION = 0.2  # scikit-learn publishes no split: 1,438 to train on, 359 to evaluate on


class ArraySource(SourceDefaults):
    """Images of one size held as an array, (N, H, W, 3) or grey (N, H, W)."""

    uniform = True

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: list[str], *, name: str, fingerprint: str
    ) -> None:
        self.images = images
        self.labels: Labels | None = labels
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


class DecodedSource(SourceDefaults):
    """Decoded images of any size, usually memory-mapped from the cache."""

    def __init__(self, pixels: Pixels, source: EncodedSource) -> None:
        self.pixels = pixels
        self.labels: Labels | None = source.labels
        self.classes = source.classes
        self.name = source.name
        self.fingerprint = source.fingerprint
        self.uniform = pixels.uniform
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.pixels[index], int(self._source.labels[index])

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images (B, H, W, 3) and labels (B,); only where all images have one size."""
        return self.pixels.stacked()[indices], self._source.labels[indices].astype(np.int64)

    def where(self, index: int) -> str:
        """Say where an example lies."""
        return self._source.where(index)


class FileSource(SourceDefaults):
    """Image files, decoded each time they are asked for."""

    encoded = True

    def __init__(self, files: ImageFiles, *, name: str) -> None:
        self.files = files
        self.labels: Labels = files.labels
        self.classes = files.classes
        self.name = name
        self.fingerprint = fingerprint_of(files)

    def __len__(self) -> int:
        return len(self.files.relative)

    def where(self, index: int) -> str:
        """Return the file's path."""
        return os.path.join(self.files.root, self.files.relative[index])

    def read(self, index: int) -> bytes:
        """Return the file's content."""
        path = self.where(index)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{path}: cannot read this image: {error.strerror}; repair or remove it") from error

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return decode(self.read(index), where=self.where(index)), int(self.files.labels[index])


def open_source(spec: str, *, split: Split, data: DataConfig, labels: bool = True) -> Source:
    """Open one split of the set that `spec` names; `val` is the split to evaluate on, the test set where one is published.

    Args:
        spec: a name, kind:PLACE, or mix.
        data: where to look, how large to cache, which part of the training split, and whether a share of that takes the place
            of the evaluation split; `data.source` and `data.val_source` are not read, so that several sets may share a section.
        labels: whether they are needed. Where they are not, a folder, shards or a Hugging Face set may say nothing of classes,
            and then all their images are of one; a set with classes is read as always, with the same split.

    Raises:
        DataError: unknown name, nothing found, or content that makes no labelled set.
    """
    part: Split = "train" if data.dev_fraction is not None else split
    if spec == "mix":
        assert data.mix is not None
        parts = [open_whole(each.source, split=part, data=data, labels=labels) for each in data.mix]
        source: Source = MixSource(parts, weights=[each.weight for each in data.mix], classes=data.mix_classes)
    else:
        source = open_whole(spec, split=part, data=data, labels=labels)
    if part == "train" and data.examples is not None:
        source = take_subset(source, examples=data.examples, seed=data.subset_seed)
    if data.dev_fraction is not None:
        source = take_dev_split(source, fraction=data.dev_fraction, split=split)
    return source


def open_whole(spec: str, *, split: Split, data: DataConfig, labels: bool) -> Source:
    """Open one split of a single set."""
    if spec == "shapes":
        from vitcli.data.shapes import ShapesSource

        shapes = data.shapes
        examples = shapes.train_examples if split == "train" else shapes.val_examples
        return ShapesSource(
            classes=shapes.classes, examples=examples, image_size=data.image_size, seed=shapes.seed, split=split
        )
    if spec == "mosaic" or spec.startswith("mosaic:"):
        return open_mosaic(spec, split=split, data=data)
    if spec == "digits":
        return from_arrays(load_digits(split), name="digits")
    if spec in NAMED_SETS:
        found = load_named(spec, split=split, root=data_root(data.root), val_fraction=data.val_fraction)
        if isinstance(found, Arrays):
            return from_arrays(found, name=spec)
        return decoded(FileSource(found, name=spec), key=cache_key(found), split=split, data=data)
    kind, _, place = spec.partition(":")
    if kind == "folder" and place:
        classless = not labels and not has_class_folders(Path(place).expanduser())
        files = (open_unlabelled if classless else open_folder)(Path(place), split=split, val_fraction=data.val_fraction)
        return decoded(FileSource(files, name=spec), key=cache_key(files), split=split, data=data)
    if kind == "shards" and place:
        shards = open_shards(place, split=split, data=data, cache_dir=default_cache_dir(), labels=labels)
        return shards if shards.remote else decoded(shards, key=shards.cache_key, split=split, data=data)
    if kind == "hf" and place:
        from vitcli.data.hub import open_hub

        return open_hub(place, split=split, label_key=data.label_key, val_fraction=data.val_fraction, need_labels=labels)
    names = ["shapes", "mosaic", "digits", *NAMED_SETS]
    close = difflib.get_close_matches(spec, names, n=1)
    if not close and Path(spec).is_dir():
        close = [f"folder:{spec}"]
    elif not close and spec.endswith(".tar"):
        close = [f"shards:{spec}"]
    hint = f"; did you mean {close[0]}?" if close else ""
    raise DataError(f"{spec}: no such data set; known are {', '.join(names)}, folder:PATH, shards:PATTERN and hf:NAME{hint}")


def open_mosaic(spec: str, *, split: Split, data: DataConfig) -> Source:
    """Open `mosaic`, or as `mosaic:NUMBER` its layouts from that number on."""
    from vitcli.data.mosaic import MosaicSource

    _, colon, first = spec.partition(":")
    if colon and not (first.isascii() and first.isdecimal() and len(first) <= 6):
        raise DataError(f"{spec}: expected mosaic:NUMBER, the first of its layouts, 0 to 999999, such as mosaic:100")
    settings = data.mosaic.model_dump(exclude={"train_examples", "val_examples"})
    examples = data.mosaic.train_examples if split == "train" else data.mosaic.val_examples
    return MosaicSource(examples=examples, image_size=data.image_size, split=split, first=int(first or 0), **settings)


def from_arrays(arrays: Arrays, *, name: str) -> ArraySource:
    digest = hashlib.sha256(repr((arrays.images.shape, arrays.classes)).encode())
    digest.update(arrays.labels.tobytes())
    digest.update(arrays.images[:: max(1, len(arrays.images) // 997)].tobytes())  # a spread of 1,000: all would cost seconds
    fingerprint = digest.hexdigest()[:24]
    return ArraySource(arrays.images, arrays.labels, arrays.classes, name=name, fingerprint=fingerprint)


def decoded(source: EncodedSource, *, key: str, split: Split, data: DataConfig) -> Source:
    """Return the source decoded, if it is small enough; with bad images to skip it stays files, because they have no pixels."""
    limit_bytes = data.memory_cache_gib * 2**30
    if not limit_bytes or data.on_error == "skip" or estimate_decoded_bytes(source) > limit_bytes:
        return source
    pixels = decode_once(source, key=key, cache_dir=default_cache_dir(), name=f"{source.name} {split}")
    return DecodedSource(pixels, source)


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
