"""A class-balanced part of a source, nested by size: what a comparison over data sizes needs."""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from vitcli.data.folders import Split
from vitcli.data.protocol import EncodedSource, Group, Labels, Source, SourceDefaults, UniformSource
from vitcli.errors import DataError
from vitcli.randomness import derive_seed, permute, permute_each, words

__all__ = ["SubsetSource", "balanced_prefix", "held_out", "stratified_share", "take_dev_split", "take_subset"]

CHUNK = 1 << 20  # examples at a time


class SubsetSource(SourceDefaults):
    """The examples `keep`, ascending indices, of another source."""

    def __init__(self, source: Source, keep: NDArray[np.int64], *, fingerprint: str) -> None:
        self.source = source
        self.keep = keep
        self.name = source.name
        self.classes = source.classes
        self.labels: Labels | None = None if source.labels is None else np.asarray(source.labels)[keep]
        self.fingerprint = fingerprint
        self.uniform = source.uniform
        self.encoded = source.encoded
        self.remote = source.remote
        self.block_starts = None if source.block_starts is None else self.moved(source.block_starts)
        if source.groups is not None:
            groups = []
            for group in source.groups:
                start, stop = self.moved(np.array([group.start, group.stop])).tolist()
                blocks = None if group.block_starts is None else self.moved(group.block_starts)
                groups.append(Group(start, stop, group.weight, blocks))
            if not all(group.stop > group.start for group in groups):
                raise DataError(f"{self.name}: {len(keep):,} images of it leave nothing of a part of the mix; take more")
            self.groups = groups

    def moved(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where stretches of the whole source begin in this part of it; empty ones vanish."""
        return np.unique(np.searchsorted(self.keep, starts)) if len(starts) > 2 else np.searchsorted(self.keep, starts)

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.source[int(self.keep[index])]

    def where(self, index: int) -> str:
        """Say where an example lies."""
        return self.source.where(int(self.keep[index]))

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images (B, H, W, 3) and labels (B,); only of a uniform source."""
        return cast(UniformSource, self.source).batch(self.keep[indices])

    def read(self, index: int) -> bytes:
        """Return a file as it is stored; only of an encoded source."""
        return cast(EncodedSource, self.source).read(int(self.keep[index]))


def take_subset(source: Source, *, examples: int, seed: int) -> Source:
    """Return a class-balanced part of a source with `examples` examples.

    Raises:
        DataError: the source is smaller than that.
    """
    if examples > len(source):
        raise DataError(
            f"{source.name}: data.examples is {examples:,}, but there are {len(source):,} training images; take fewer"
        )
    if source.labels is None and source.groups is not None:
        raise DataError(f"{source.name}: data.examples cannot balance a mix whose parts compute their labels; limit the parts")
    if source.labels is None:  # computed labels come in rounds of all classes
        keep = np.arange(examples)
    else:
        keep = balanced_prefix(source.labels, examples=examples, seed=seed)
    return SubsetSource(source, keep, fingerprint=f"{source.fingerprint}-{examples}-{seed}")


def balanced_prefix(labels: NDArray[Any], *, examples: int, seed: int) -> NDArray[np.int64]:
    """Choose `examples` indices, ascending: one of every class, then a second of every class, and so on.

    A smaller choice is contained in every larger one. Classes differ by at most one example until the smallest is used up;
    from there on the others go on.
    """
    labels = np.asarray(labels)
    turn = shuffled_within_class(labels, seed=derive_seed("subset", seed))  # how many of its class come before an example
    in_round = np.bincount(turn)  # (rounds,) examples that come in each
    rounds = int(np.searchsorted(np.cumsum(in_round), examples, side="right"))  # whole ones
    last = np.flatnonzero(turn == rounds)
    first_classes = permute(labels[last], int(labels.max()) + 1, derive_seed("subset-classes", seed))
    left = examples - int(in_round[:rounds].sum())
    return np.sort(np.concatenate([np.flatnonzero(turn < rounds), last[np.argsort(first_classes)[:left]]]))


def held_out(labels: NDArray[Any], *, fraction: float, name: str) -> NDArray[np.bool_]:
    """Tell, (N,), which examples are held out: `fraction` of every class, at least one, never all of it.

    Raises:
        DataError: every class has a single example.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    shares = np.minimum(counts - 1, np.maximum(1, np.rint(counts * fraction).astype(np.int64)))  # (K,) held out of each class
    out: NDArray[np.bool_] = shuffled_within_class(labels, seed=derive_seed("held-out")) < shares[labels]
    if not out.any():
        raise DataError(f"{name}: every class has a single image, so none can be held out; give data.val_source")
    return out


def take_dev_split(source: Source, *, fraction: float, split: Split) -> Source:
    """Return the share of a training split that is held out to choose settings on (`val`), or the rest (`train`).

    The share is `fraction` of all images exactly, rounded to whole ones, as in ViT (2010.11929) Table 4; which ones depends on
    nothing but the labels.

    Raises:
        DataError: too few images, or a mix whose labels are computed.
    """
    if source.labels is None and source.groups is not None:
        raise DataError(f"{source.name}: data.dev_fraction cannot divide a mix whose parts compute their labels")
    if source.labels is None:  # computed labels come in rounds of all classes
        in_dev = np.arange(len(source)) >= len(source) - max(1, min(len(source) - 1, round(len(source) * fraction)))
    else:
        in_dev = stratified_share(source.labels, fraction=fraction, name=source.name)
    keep = np.flatnonzero(in_dev if split == "val" else ~in_dev)
    return SubsetSource(source, keep, fingerprint=f"{source.fingerprint}-{'dev' if split == 'val' else 'rest'}-{fraction:g}")


def stratified_share(labels: NDArray[Any], *, fraction: float, name: str) -> NDArray[np.bool_]:
    """Tell, (N,), which examples are in a share of round(N * fraction), classes in proportion to their sizes.

    What is left over after rounding down goes to the classes that lost most by it. No class gives its last example.

    Raises:
        DataError: every class has a single example.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    most = np.maximum(counts - 1, 0)  # (K,)
    wanted = counts * fraction
    shares = np.minimum(np.floor(wanted).astype(np.int64), most)  # (K,) taken of each class
    examples = min(max(1, round(len(labels) * fraction)), int(most.sum()))
    if examples == 0:
        raise DataError(f"{name}: every class has a single image, so none can be held out; give data.val_source")
    by_chance = permute(np.arange(len(counts)), len(counts), derive_seed("dev-classes"))
    order = np.lexsort((by_chance, shares - wanted))  # (K,) classes, the largest remainder first
    while (left := examples - int(shares.sum())) > 0:
        shares[[label for label in order if shares[label] < most[label]][:left]] += 1
    taken: NDArray[np.bool_] = shuffled_within_class(labels, seed=derive_seed("dev")) < shares[labels]
    return taken


def shuffled_within_class(labels: NDArray[Any], *, seed: int) -> NDArray[np.int64]:
    """Return, (N,), each example's place in a shuffle of its class, from 0."""
    counts = np.bincount(labels)
    narrow = labels.astype(np.uint16) if len(counts) <= 1 << 16 else labels  # 16 bits are radix-sorted
    by_class = np.argsort(narrow, kind="stable")
    starts = np.cumsum(counts) - counts
    keys = words(seed, np.arange(len(counts)), 1)[:, 0]  # (K,)
    turns = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), CHUNK):  # what is computed on the way is many times larger than the result
        members = by_class[start : start + CHUNK]
        classes = labels[members]
        places = start + np.arange(len(members)) - starts[classes]
        turns[members] = permute_each(places, counts[classes], keys[classes])
    return turns
