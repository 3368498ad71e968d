"""A data set to probe on: which images the shots are, and which test images they get right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitcli.data.protocol import Source
from vitcli.data.subset import SubsetSource
from vitcli.errors import DataError
from vitcli.evaluate import map_classes
from vitcli.features import Features
from vitcli.fewshot import choose_l2, decompose, draw_shots, first_shots

__all__ = ["ProbeSet", "few_shot", "shot_pool"]

POOL_SHOTS = 4  # of a set that computes its labels, images per class and shot to draw from: it may have billions


@dataclass(frozen=True)
class ProbeSet:
    """A data set to probe on."""

    name: str
    train: Source
    test: Source
    class_map: NDArray[np.int64] | None  # (test classes,) to the training split's; None where they are the same

    @classmethod
    def matched(cls, name: str, train: Source, test: Source) -> "ProbeSet":
        """Match the classes of the splits by name; raise DataError if the training split lacks one."""
        lacking = sorted(set(test.classes) - set(train.classes))
        if lacking:
            listed = ", ".join(map(repr, lacking[:5])) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
            raise DataError(
                f"{test.name}: to probe on, has classes that its training split lacks: {listed}; add images of them"
            )
        class_map = map_classes(train.classes, test.classes, test.name)
        return cls(name, train, test, None if class_map is None else class_map.numpy())

    @property
    def num_classes(self) -> int:
        """K, of the training split."""
        return len(self.train.classes)

    def targets(self, found: Features) -> NDArray[np.int64]:
        """Return the training split's class numbers (M,) of test images."""
        return found.labels if self.class_map is None else self.class_map[found.labels]


def shot_pool(source: Source, *, num_classes: int, shots: Sequence[int], seeds: int) -> tuple[Source, NDArray[np.int64]]:
    """Return the part of a training split that the draws take shots from, and its images' numbers in the whole, ascending."""
    if source.groups is not None:  # of a mix no part may vanish
        return source, np.arange(len(source))
    if source.labels is None:  # computed labels come in rounds of all classes
        keep = np.arange(pool_end(source, num_classes=num_classes, shots=shots))
        name = f"first-{len(keep)}"
    else:
        labels = np.asarray(source.labels)
        drawn = (draw_shots(labels, num_classes=num_classes, seed=seed) for seed in range(seeds))
        keep = np.unique(np.concatenate([first_shots(each, max(shots)) for each in drawn]))
        name = f"shots-{max(shots)}-{seeds}"
    return SubsetSource(source, keep, fingerprint=f"{source.fingerprint}-{name}"), keep


def pool_end(source: Source, *, num_classes: int, shots: Sequence[int]) -> int:
    """Return how many images of a set that computes its labels shots are drawn from; all of a mix, whose parts lie apart."""
    whole = source.groups is not None or not shots
    return len(source) if whole else min(len(source), POOL_SHOTS * max(shots) * num_classes)


def few_shot(
    probed: ProbeSet,
    train: Features,
    numbers: NDArray[np.int64],
    test: Features,
    *,
    shots: Sequence[int],
    seeds: int,
    l2: float | None,
) -> dict[int, tuple[NDArray[np.bool_], list[float]]]:
    """Return for each number of shots which test images each draw gets right, (seeds, M), and the L2 of each draw.

    Args:
        train: of the training images that the shots are drawn from, or all of them.
        numbers: of those images in the training split, in the order that `train.indices` refers to.
    """
    K, targets = probed.num_classes, probed.targets(test)
    rows = numbers[train.indices]  # (N,) the training split's number of each row
    if probed.train.labels is not None:
        labels, places = np.asarray(probed.train.labels), np.arange(len(probed.train))
    else:
        usable = rows < pool_end(probed.train, num_classes=K, shots=shots)
        labels, places = train.labels[usable], rows[usable]
    hits: dict[int, list[NDArray[np.bool_]]] = {s: [] for s in shots}
    used: dict[int, list[float]] = {s: [] for s in shots}
    for seed in range(seeds if shots else 0):
        drawn = draw_shots(labels, num_classes=K, seed=seed)
        members = [rows_of(places[each[: max(shots)]], rows) for each in drawn]
        for s in shots:
            chosen = choose_l2(train.values, members, shots=s) if l2 is None else l2
            taken = first_shots(members, s)
            fitted = decompose(train.values[taken], train.labels[taken], num_classes=K).solve(chosen)
            hits[s].append(fitted.predict(test.values) == targets)
            used[s].append(chosen)
    return {s: (np.stack(hits[s]), used[s]) for s in shots}


def rows_of(numbers: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where numbers stand among `rows`, which ascend; those of images that could not be read are left out."""
    places = np.minimum(np.searchsorted(rows, numbers), len(rows) - 1)
    return places[rows[places] == numbers]
