"""What a source is: labelled images by index, of one of three kinds.

`uniform` sources give whole batches of images of one size; `encoded` ones give files, decoded by the loader's processes at the
scale and in the part that is needed; all give single images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["UNLABELLED", "EncodedSource", "Group", "Source", "SourceDefaults", "UniformSource", "is_labelled"]

UNLABELLED = "unlabelled"  # the one class of images that nobody has put into classes
Labels = NDArray[Any]  # (N,) integers; perhaps a read-only map of a file


@dataclass(frozen=True)
class Group:
    """Examples [start, stop) of a mixture, shown as often as their weight says."""

    start: int
    stop: int
    weight: float
    block_starts: NDArray[np.int64] | None = None  # indices of the whole source, from `start` to `stop`


class Source(Protocol):
    """Labelled images by index."""

    name: str
    classes: list[str]
    fingerprint: str  # equal for equal content, wherever it is stored
    uniform: bool
    encoded: bool
    remote: bool  # reading at random is expensive
    block_starts: NDArray[np.int64] | None  # (K + 1,): where stretches that lie together begin, such as shards, then N
    groups: Sequence[Group] | None  # of a mixture

    @property
    def labels(self) -> Labels | None:
        """Return all labels, (N,); None where they are computed."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Return the image, (H, W, 3), and its label."""
        ...

    def where(self, index: int) -> str:
        """Say where an example lies, for messages: a path, shard:member or name[index]."""
        ...


def is_labelled(source: Source) -> bool:
    """Tell whether somebody has put a source's images into classes."""
    return source.classes != [UNLABELLED]


class UniformSource(Source, Protocol):
    """A source with images of one size, for vectorised augmentation."""

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images (B, H, W, 3) and labels (B,)."""
        ...


class EncodedSource(Source, Protocol):
    """A source of image files."""

    @property
    def labels(self) -> Labels:
        """Return all labels, (N,)."""
        ...

    def read(self, index: int) -> bytes:
        """Return the file as it is stored; raise DataError, naming it, if that fails."""
        ...


class SourceDefaults:
    """What most sources say of themselves."""

    name: str
    uniform: bool = False
    encoded: bool = False
    remote: bool = False
    block_starts: NDArray[np.int64] | None = None
    groups: Sequence[Group] | None = None

    def where(self, index: int) -> str:
        """Say where an example lies."""
        return f"{self.name}[{index}]"
