"""A user's own pictures: what a recipe wants to know of them, the split that was made, and pictures on both sides of it."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from vitcli.config import DataConfig
from vitcli.data.check import CheckedSet, Group, check
from vitcli.data.examine import IndexReader
from vitcli.data.folders import evaluation_folder
from vitcli.data.images import read_size
from vitcli.data.protocol import EncodedSource, Source
from vitcli.errors import DataError

__all__ = ["MOST_COMPARED", "class_sizes", "on_both_sides", "short_side", "split_record"]

SAMPLE = 64  # pictures whose size is looked at
MOST_COMPARED = 3_000  # pictures; more take longer than a run's first minute
MOST_COMPARED_PIXELS = 10**9
MOST_LISTED = 100_000  # names in a record; of more there is the digest
NEAR_BITS = 6  # of 64, in which the hashes of near duplicates may differ; `vit data check`'s default


# ---------------------------------------------------------------- before a recipe


def class_sizes(source: Source) -> dict[str, int] | None:
    """Return how many images each class has, by its name; None where labels are computed."""
    if source.labels is None:
        return None
    counts = np.bincount(np.asarray(source.labels), minlength=len(source.classes))
    return dict(zip(source.classes, counts.tolist(), strict=True))


def short_side(source: Source) -> int | None:
    """Return the median length of the pictures' shorter sides, px, by a sample of them; None where reading is expensive."""
    if source.remote:
        return None
    sides = []
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int)).tolist():
        try:
            if source.encoded:
                sides.append(min(read_size(cast(EncodedSource, source).read(index), where=source.where(index))))
            else:
                sides.append(min(source[index][0].shape[:2]))
        except DataError:  # the run will say so, or pass over it, as it is told to
            continue
    return int(np.median(sides)) if sides else None


# ---------------------------------------------------------------- before a run


def split_record(train: Source, val: Source, data: DataConfig) -> dict[str, Any] | None:
    """Return which files of a folder are held out, and by what rule, as JSON values; None where no split was made.

    Names are relative to the folder, so the digest is the same wherever a copy of it lies.
    """
    kind, _, place = data.source.partition(":")
    if kind != "folder" or data.val_source is not None or data.dev_fraction is not None:
        return None
    root = Path(place).expanduser()
    if evaluation_folder(root) is not None:
        return None
    held_out = sorted(os.path.relpath(val.where(index), root) for index in range(len(val)))
    trained, kept = class_sizes(train) or {}, class_sizes(val) or {}
    listed: Mapping[str, Any] = {"held_out": held_out} if len(held_out) <= MOST_LISTED else {}
    return {
        "rule": f"{data.val_fraction:g} of every class, at least one image, never all: the first by the SHA-256 of class/name",
        "training_images": len(train),
        "held_out_images": len(val),
        "held_out_sha256": hashlib.sha256("\n".join(held_out).encode(errors="surrogateescape")).hexdigest(),
        "classes": {name: {"training": count, "held_out": kept.get(name, 0)} for name, count in trained.items()},
        **listed,
    }


def on_both_sides(train: Source, val: Source) -> list[Group]:
    """Return the pictures that are there to train on and to evaluate on, the same or nearly; none where looking takes long."""
    count, side = len(train) + len(val), short_side(train)
    if side is None or count > MOST_COMPARED or count * side * side > MOST_COMPARED_PIXELS:
        return []
    sets = [CheckedSet("training", IndexReader(train), training=True), CheckedSet("evaluation", IndexReader(val))]
    return [group for group in check(sets, near=NEAR_BITS, jobs=1).groups if len(group.sets) > 1]
