"""Several sources as one: their examples one after the other, their class lists merged or kept apart."""

from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from vitcli.data.protocol import EncodedSource, Group, Labels, Source, SourceDefaults, UniformSource
from vitcli.errors import DataError
from vitcli.randomness import derive_seed

__all__ = ["MixSource"]


class MixSource(SourceDefaults):
    """The examples of all parts; how often each part is shown is its group's weight.

    Args:
        weights: one for each part.
        classes: `merge` makes one class of equal names, in the order in which they first appear; `apart` puts the part's name
            before each class.

    Raises:
        DataError: two parts of a mix kept apart have one name.
    """

    def __init__(self, parts: Sequence[Source], *, weights: Sequence[float], classes: Literal["merge", "apart"]) -> None:
        self.name = "mix"
        self.parts = list(parts)
        names = [part.name for part in parts]
        if classes == "apart" and len(set(names)) < len(names):
            raise DataError(f"mix: {', '.join(names)} cannot be kept apart, because two have one name; use mix_classes: merge")
        prefixes = [f"{name}/" if classes == "apart" else "" for name in names]
        spelt = [[f"{prefix}{name}" for name in part.classes] for prefix, part in zip(prefixes, parts, strict=True)]
        self.classes = list(dict.fromkeys(name for listed in spelt for name in listed))
        position = {name: i for i, name in enumerate(self.classes)}
        self.maps = [np.array([position[name] for name in listed], np.int64) for listed in spelt]  # (K of the part,)
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])  # (P + 1,)
        self.fingerprint = f"{derive_seed(*(part.fingerprint for part in parts), *weights_as_text(weights), classes):016x}"
        self.labels: Labels | None = None
        if all(part.labels is not None for part in parts):
            mapped = [table[np.asarray(part.labels)] for table, part in zip(self.maps, parts, strict=True)]
            self.labels = np.concatenate(mapped)
        shapes = {part[0][0].shape for part in parts if part.uniform}
        self.uniform = all(part.uniform for part in parts) and len(shapes) == 1
        self.encoded = all(part.encoded for part in parts)
        self.remote = any(part.remote for part in parts)
        self.groups = [
            Group(int(start), int(start) + len(part), weight, None if part.block_starts is None else part.block_starts + start)
            for start, part, weight in zip(self.starts[:-1], parts, weights, strict=True)
        ]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Return the part an example is in, and its index there."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, index - int(self.starts[part])

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        part, within = self.locate(index)
        image, label = self.parts[part][within]
        return image, int(self.maps[part][label])

    def where(self, index: int) -> str:
        """Say where an example lies."""
        part, within = self.locate(index)
        return self.parts[part].where(within)

    def read(self, index: int) -> bytes:
        """Return a file as it is stored; only if all parts are encoded."""
        part, within = self.locate(index)
        return cast(EncodedSource, self.parts[part]).read(within)

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images (B, H, W, 3) and labels (B,); only if all parts are uniform and of one size."""
        which = np.searchsorted(self.starts, indices, side="right") - 1
        images: NDArray[np.uint8] | None = None
        labels = np.empty(len(indices), np.int64)
        for part in np.unique(which).tolist():
            members = which == part
            some, local = cast(UniformSource, self.parts[part]).batch(indices[members] - self.starts[part])
            if images is None:
                images = np.empty((len(indices), *some.shape[1:]), np.uint8)
            images[members] = some
            labels[members] = self.maps[part][local]
        assert images is not None
        return images, labels


def weights_as_text(weights: Sequence[float]) -> list[str]:
    return [repr(float(weight)) for weight in weights]
