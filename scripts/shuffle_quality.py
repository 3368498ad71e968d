"""How much does a block shuffle cost against a full shuffle?

    python scripts/shuffle_quality.py --shards 300 --shard-size 1000 --classes 1000

Two sets of shards, one sorted by class on disk and one shuffled there, are gone through with windows of several lengths.
Columns: different classes and shards in a batch; the chi-square of a batch's class counts over what it is for a batch drawn
from the whole set (1: as good as a full shuffle); the correlation of labels of neighbouring images and of images one batch
apart (0: as good as a full shuffle). Prints a table, or one JSON line per row with --json.
"""

import argparse
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.sampler import BlockShuffle, FullShuffle, Order


def measure(order: Order, labels: NDArray[np.int64], *, shard_size: int, batch_size: int, epochs: int) -> dict[str, float]:
    """Go through an order from its beginning and return how mixed its batches are."""
    size, classes = len(labels), int(labels.max()) + 1
    batches = epochs * size // batch_size
    indices = order.at(np.arange(batches * batch_size))[1].reshape(batches, batch_size)
    shown = labels[indices]  # (batches, batch)
    rows = np.arange(batches)[:, None] * classes
    counts = np.bincount((rows + shown).ravel(), minlength=batches * classes).reshape(batches, classes)
    expected = batch_size * np.bincount(labels, minlength=classes) / size  # (classes,)
    chi_square = ((counts - expected) ** 2 / expected).sum(1).mean()
    hypergeometric = (classes - 1) * (size - batch_size) / (size - 1)  # what it is for draws without replacement
    shards = np.sort(indices // shard_size, axis=1)
    flat = (shown.ravel() - labels.mean()) / labels.std()
    return {
        "classes_per_batch": float((counts > 0).sum(1).mean()),
        "shards_per_batch": float((1 + (np.diff(shards, axis=1) > 0).sum(1)).mean()),
        "chi_square_ratio": float(chi_square / hypergeometric),
        "correlation_of_neighbours": float((flat[:-1] * flat[1:]).mean()),
        "correlation_of_batches": float((flat[:-batch_size] * flat[batch_size:]).mean()),
    }


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--shards", type=int, default=300)
    cli.add_argument("--shard-size", type=int, default=1000, help="images")
    cli.add_argument("--classes", type=int, default=1000)
    cli.add_argument("--batch-size", type=int, default=256)
    cli.add_argument("--windows", type=int, nargs="+", default=[1, 4, 16, 64], help="shards")
    cli.add_argument("--epochs", type=int, default=2)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--json", action="store_true")
    args = cli.parse_args()
    size = args.shards * args.shard_size
    by_class = np.arange(size) * args.classes // size
    starts = np.arange(0, size + 1, args.shard_size)
    if not args.json:
        print(f"{args.shards} shards of {args.shard_size:,} images, {args.classes:,} classes, batches of {args.batch_size}")
        print("on disk        window   classes   shards  chi-square  neighbours   batches")
    for on_disk, labels in (("sorted", by_class), ("shuffled", np.random.default_rng(args.seed).permutation(by_class))):
        for window in [*args.windows, args.shards]:
            order: Order = FullShuffle(size, seed=args.seed)
            if window < args.shards:
                order = BlockShuffle(starts, window=window * args.shard_size, seed=args.seed)
            row: dict[str, Any] = {"on_disk": on_disk, "window_shards": window}
            row |= measure(order, labels, shard_size=args.shard_size, batch_size=args.batch_size, epochs=args.epochs)
            if args.json:
                print(json.dumps(row))
                continue
            name = "all" if window >= args.shards else f"{window} shards"
            print(
                f"{on_disk:10s} {name:>10s} {row['classes_per_batch']:9.1f} {row['shards_per_batch']:8.1f} "
                f"{row['chi_square_ratio']:11.2f} {row['correlation_of_neighbours']:11.3f} {row['correlation_of_batches']:9.3f}"
            )


if __name__ == "__main__":
    main()
