"""The images a model is looked at with: files, or a part of its data set, read one at a time and prepared for each model."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from vitcli.data.protocol import EncodedSource, Source
from vitcli.data.transforms import EvalTransform, normalise
from vitcli.errors import DataError
from vitcli.opened import OpenedModel
from vitcli.predict import find_images, read_file

__all__ = ["Samples", "batches", "file_samples", "prepare", "source_samples", "transform_of"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Samples:
    """Images by number."""

    description: str
    names: list[str]
    pictured: list[int]  # those that are shown by themselves
    read: Callable[[int, EvalTransform], Tensor]  # number and a model's preprocessing to uint8 (1, 3, H, W); raises DataError


def file_samples(words: Sequence[str], *, most: int, pictures: int, say: Say) -> Samples:
    """Take the first images that files, folders and globs mean.

    Raises:
        DataError: there is none.
    """
    names: list[str] = []
    for found in find_images([word for word in words if word != "-"], stdin=io.BytesIO()):
        if found.problem is not None:
            say(f"vit: {found.path}: {found.problem}")
        elif len(names) == most:
            say(f"looking at the first {most:,} images; --examples takes more")
            break
        else:
            names.append(found.path)
    if not names:
        raise DataError(f"{' '.join(words)}: no images found; give files or folders with images to --images")

    def read(number: int, transform: EvalTransform) -> Tensor:
        return transform.from_encoded([read_file(names[number])], where=[names[number]])

    return Samples(
        f"{len(names):,} image file{'s' if len(names) > 1 else ''}", names, list(range(min(pictures, len(names)))), read
    )


def source_samples(source: Source, *, most: int, pictures: int) -> Samples:
    """Take images of a source, evenly spread over it, as classes often lie one behind the other."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).round().astype(np.int64)).tolist()

    def read(number: int, transform: EvalTransform) -> Tensor:
        index = indices[number]
        if source.encoded:
            return transform.from_encoded([cast(EncodedSource, source).read(index)], where=[source.where(index)])
        return transform([source[index][0]])

    pictured = np.unique(np.linspace(0, len(indices) - 1, min(pictures, len(indices)) + 2).round().astype(np.int64))[1:-1]
    names = [source.where(index) for index in indices]
    return Samples(f"{len(indices):,} images of {source.name}", names, pictured.tolist() or [0], read)


def transform_of(opened: OpenedModel) -> EvalTransform:
    """Return a model's preprocessing up to uint8 pixels."""
    data = opened.config.data
    return EvalTransform(image_size=data.image_size, crop_fraction=data.eval_crop_fraction)


def prepare(opened: OpenedModel, pixels: Tensor) -> Tensor:
    """Return uint8 pixels (B, 3, H, W) as the model takes them, on its device."""
    data = opened.config.data
    return normalise(pixels.to(opened.device), mean=data.mean, std=data.std)


def batches(
    samples: Samples, transforms: Sequence[EvalTransform], *, size: int, numbers: Sequence[int] | None = None, say: Say
) -> Iterator[list[Tensor]]:
    """Yield `size` images at a time, all or those of `numbers`: uint8 (B, 3, H, W) for each preprocessing.

    Of what cannot be read `say` is told; the others move up.
    """
    kept: list[list[Tensor]] = []
    for number in range(len(samples.names)) if numbers is None else numbers:
        try:
            kept.append([samples.read(number, transform) for transform in transforms])
        except DataError as error:
            say(f"vit: {error}")
        if len(kept) == size:
            yield [torch.cat(each) for each in zip(*kept, strict=True)]
            kept = []
    if kept:
        yield [torch.cat(each) for each in zip(*kept, strict=True)]
