"""The order of a run: which example is shown at which position, as a pure function of (seed, position).

Nothing is stored to resume, and ranks and loader processes only divide the positions among themselves: the order is the same
for any number of them. Any position is reached without the ones before it; the tables some orders need are made per epoch
or period, from the seed alone, and are as long as there are shards or classes, not images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitcli.config import DataConfig
from vitcli.data.protocol import Source
from vitcli.errors import DataError
from vitcli.randomness import derive_seed, mix, permute, permute_each, words

__all__ = ["BlockShuffle", "ClassShuffle", "FullShuffle", "GroupShuffle", "Order", "Planned", "build_order"]

Integers = NDArray[np.int64]
Table = TypeVar("Table")

REMOTE_WINDOW = 65_536  # images shuffled among each other, where shards have to be fetched: about 64 usual shards
STRETCH = 8_192  # positions worked out at once
TABLES_KEPT = 3  # a batch may touch two epochs or periods
EVEN_PERIOD = 4_096  # positions at least, in which groups of equal weight come equally often
SHORTEST_PERIOD, LONGEST_PERIOD = 1 << 16, 1 << 20  # positions in which groups of unequal weight get their quotas
DRAWS_PER_GROUP = 32  # in such a period, on average, within those limits


class Order(Protocol):
    """Which example comes when."""

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """Return (epochs (B,), indices (B,)) of the examples at `positions` (B,), counted from the run's beginning.

        The epoch is the number of times the example has been shown before, so that no (epoch, index) comes twice.
        """
        ...

    def ahead(self, positions: Integers) -> Integers:
        """Return indices (n,) whose blocks are to be fetched at `positions` (B,), well before they are needed; often none."""
        ...


def build_order(source: Source, data: DataConfig, *, seed: int) -> Order:
    """Choose the order for a source.

    The parts of a mixture come by their weights; within a part, or a whole source, classes come by `data.sampling`. Where that
    is natural, everything is shuffled; or blocks, then images within a window, if `data.shuffle_window` or remoteness asks.
    Balancing reads everywhere, so remote shards are then best cached whole.

    Raises:
        DataError: classes of a mixture are to be balanced, but not all of its parts tell their labels.
    """
    if source.groups is None:
        return order_within(len(source), source.labels, source.block_starts, remote=source.remote, data=data, seed=seed)
    if source.labels is None and data.sampling != "natural":
        raise DataError(
            f"{source.name}: data.sampling={data.sampling} needs the labels of all parts, but one computes its labels; "
            "take data.sampling=natural, or leave that part out"
        )
    orders = [
        order_within(
            group.stop - group.start,
            None if source.labels is None else source.labels[group.start : group.stop],
            group.block_starts,
            remote=source.remote,
            data=data,
            seed=derive_seed(seed, "group", number),
        )
        for number, group in enumerate(source.groups)
    ]
    starts, weights = [group.start for group in source.groups], [group.weight for group in source.groups]
    return GroupShuffle(orders, starts=starts, weights=weights, seed=seed)


def order_within(
    size: int, labels: NDArray[Any] | None, block_starts: Integers | None, *, remote: bool, data: DataConfig, seed: int
) -> Order:
    """Choose the order of `size` examples that are no mixture; computed labels (None) are balanced as they are."""
    if data.sampling != "natural" and labels is not None:
        return ClassShuffle(labels, sampling=data.sampling, seed=seed)
    window = data.shuffle_window or (REMOTE_WINDOW if remote else None)
    if block_starts is None or window is None or window >= size:
        return FullShuffle(size, seed=seed)
    return BlockShuffle(block_starts - block_starts[0], window=window, seed=seed)


@dataclass(frozen=True)
class FullShuffle:
    """Every epoch is another shuffle of all examples; O(B) time and memory."""

    num_examples: int
    seed: int

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """See `Order`."""
        epochs, within = np.divmod(positions, self.num_examples)
        indices = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            members = epochs == epoch
            indices[members] = permute(within[members], self.num_examples, derive_seed(self.seed, "order", epoch))
        return epochs, indices

    def ahead(self, positions: Integers) -> Integers:
        """Return nothing: every block is needed at any time."""
        return positions[:0]


class BlockShuffle:
    """Shuffle blocks anew each epoch, gather consecutive ones into windows, and shuffle the examples within each window.

    Every epoch shows every example once. At any time no more than a window's blocks are read, two windows' at their border,
    and the next window's are fetched while one is shown: what keeps copies of remote blocks should hold two windows.
    `scripts/shuffle_quality.py` measures what a window costs against a full shuffle.

    Args:
        block_starts: (K + 1,) the first example of each block, then their number; blocks may differ in length.
        window: examples in a window, about: windows are made of whole blocks, as equal in length as these allow.
    """

    def __init__(self, block_starts: Integers, *, window: int, seed: int) -> None:
        lengths = np.diff(block_starts)
        self.first = np.asarray(block_starts[:-1][lengths > 0], np.int64)  # (K,)
        self.lengths = np.asarray(lengths[lengths > 0], np.int64)  # (K,)
        self.num_examples = int(self.lengths.sum())
        self.windows = max(1, round(self.num_examples / window))
        self.seed = seed
        self.epochs = Recent(self.plan_epoch)

    def plan_epoch(self, epoch: int) -> "EpochOfBlocks":
        """Lay out an epoch, in O(K) time and memory."""
        blocks = len(self.lengths)
        order = permute(np.arange(blocks), blocks, derive_seed(self.seed, "order", epoch, "blocks"))
        lengths = self.lengths[order]
        starts = np.cumsum(lengths) - lengths
        window_of = (2 * starts + lengths) * self.windows // (2 * self.num_examples)  # the one a block's middle falls into
        begins = np.flatnonzero(np.diff(window_of, prepend=-1))
        return EpochOfBlocks(starts, self.first[order] - starts, np.append(starts[begins], self.num_examples))

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """See `Order`."""
        epochs, within = np.divmod(positions, self.num_examples)
        indices = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            members = epochs == epoch
            indices[members] = self.shuffled(epoch, within[members])
        return epochs, indices

    def shuffled(self, epoch: int, within: Integers) -> Integers:
        """Return the examples at places `within` (B,) of an epoch."""
        plan = self.epochs[epoch]
        windows = np.searchsorted(plan.window_starts, within, side="right") - 1
        places = np.empty_like(within)  # where the example lies if the blocks are laid one after the other
        for window in np.unique(windows).tolist():
            start, stop = plan.window_starts[window : window + 2].tolist()
            members = windows == window
            seed = derive_seed(self.seed, "order", epoch, "window", window)
            places[members] = start + permute(within[members] - start, stop - start, seed)
        return places + plan.shifts[np.searchsorted(plan.starts, places, side="right") - 1]

    def ahead(self, positions: Integers) -> Integers:
        """Return the first example of each block of the next window, one after the other while this window is shown."""
        epochs, within = np.divmod(positions, self.num_examples)
        due: list[Integers] = []
        for epoch in np.unique(epochs).tolist():
            places = within[epochs == epoch]
            starts = self.epochs[epoch].window_starts
            for window in np.unique(np.searchsorted(starts, places, side="right") - 1).tolist():
                start, stop = starts[window : window + 2].tolist()
                coming = self.firsts_of(epoch, window + 1) if window + 2 < len(starts) else self.firsts_of(epoch + 1, 0)
                turns = start + np.arange(len(coming)) * (stop - start) // len(coming)
                due.append(coming[np.isin(turns, places)])
        return np.concatenate(due) if due else positions[:0]

    def firsts_of(self, epoch: int, window: int) -> Integers:
        """Return the index of the first example of each block of a window."""
        plan = self.epochs[epoch]
        begin, end = np.searchsorted(plan.starts, plan.window_starts[window : window + 2]).tolist()
        return plan.starts[begin:end] + plan.shifts[begin:end]


@dataclass(frozen=True)
class EpochOfBlocks:
    """The blocks of an epoch, one after the other in its order."""

    starts: Integers  # (K,) the place where each begins
    shifts: Integers  # (K,) from the place of an example to its index
    window_starts: Integers  # (W + 1,) places, then the number of examples


class GroupShuffle:
    """Show groups, each an order of its own, by their weights: the k-th time a group's turn comes, its k-th example.

    Args:
        orders: of each group's examples, counted from 0.
        starts: the index of each group's example 0.
        weights: positive, relative to each other.
    """

    def __init__(self, orders: Sequence[Order], *, starts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.orders = list(orders)
        self.starts = list(starts)
        self.turns = Turns(weights, seed=seed)

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """See `Order`; the epoch is the group's."""
        groups, draws = self.turns.at(positions)
        epochs, indices = np.empty_like(positions), np.empty_like(positions)
        for group in np.unique(groups).tolist():
            members = groups == group
            epochs[members], within = self.orders[group].at(draws[members])
            indices[members] = self.starts[group] + within
        return epochs, indices

    def ahead(self, positions: Integers) -> Integers:
        """See `Order`."""
        groups, draws = self.turns.at(positions)
        due = [self.starts[group] + self.orders[group].ahead(draws[groups == group]) for group in np.unique(groups).tolist()]
        return np.concatenate(due) if due else positions[:0]


class ClassShuffle:
    """Show classes equally often (`balanced`) or by the root of their size (`sqrt`); each goes through its own shuffles.

    No example of a class is shown again before all of the class were.

    Memory: 4 bytes an example, 56 MB for 14 million, which forked loader processes share; about four times that for the
    moment in which the examples are sorted by class.

    Args:
        labels: (N,) classes from 0; those without examples are left out.
    """

    def __init__(self, labels: NDArray[Any], *, sampling: Literal["balanced", "sqrt"], seed: int) -> None:
        narrow = labels.astype(np.uint16) if int(labels.max()) < 1 << 16 else np.asarray(labels)  # 16 bits are radix-sorted
        by_class = np.argsort(narrow, kind="stable")
        self.members = by_class.astype(np.int32) if len(labels) < 1 << 31 else by_class
        counts = np.bincount(narrow)
        classes = np.flatnonzero(counts)
        self.sizes = counts[classes].astype(np.int64)  # (C,)
        self.starts = np.cumsum(self.sizes) - self.sizes  # (C,)
        self.keys = words(derive_seed(seed, "order", "classes"), classes, 1)[:, 0]  # (C,)
        self.turns = Turns([1.0 if sampling == "balanced" else math.sqrt(size) for size in self.sizes.tolist()], seed=seed)

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """See `Order`; the epoch is the class's."""
        classes, draws = self.turns.at(positions)
        sizes = self.sizes[classes]
        epochs, within = np.divmod(draws, sizes)
        keys = mix(self.keys[classes] ^ mix(epochs.astype(np.uint64)))
        return epochs, self.members[self.starts[classes] + permute_each(within, sizes, keys)].astype(np.int64)

    def ahead(self, positions: Integers) -> Integers:
        """Return nothing: every block is needed at any time."""
        return positions[:0]


class Turns:
    """Whose turn it is: at each position a group, in a period that repeats with the same quotas in another order.

    Args:
        weights: (G,) positive; a group's quota is its share of the period, rounded by the largest remainder, at least 1.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self.quotas = quotas_of(weights)  # (G,)
        self.period = int(self.quotas.sum())
        self.seed = seed
        self.periods = Recent(self.plan_period)

    def plan_period(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return, for each of the period's positions, its group and how many turns that group had in it before."""
        sorted_groups = np.repeat(np.arange(len(self.quotas), dtype=np.int32), self.quotas)
        seed = derive_seed(self.seed, "order", "turns", number)
        groups = sorted_groups[permute(np.arange(self.period), self.period, seed)]
        before = np.empty(self.period, np.int32)
        firsts = np.cumsum(self.quotas) - self.quotas
        before[np.argsort(groups, kind="stable")] = np.arange(self.period) - np.repeat(firsts, self.quotas)
        return groups, before

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """Return (groups (B,), draws (B,)): whose turn it is at `positions` (B,), and its how-manieth turn that is, from 0."""
        numbers, within = np.divmod(positions, self.period)
        groups, draws = np.empty_like(within), np.empty_like(within)
        for number in np.unique(numbers).tolist():
            members = numbers == number
            table, before = self.periods[number]
            groups[members] = table[within[members]]
            draws[members] = number * self.quotas[groups[members]] + before[within[members]]
        return groups, draws


def quotas_of(weights: Sequence[float]) -> Integers:
    """Return how often each group comes in a period, (G,)."""
    shares = np.array(weights, np.float64)
    if len(set(weights)) == 1:
        period = len(weights) * -(-EVEN_PERIOD // len(weights))
    else:
        period = max(len(weights), min(LONGEST_PERIOD, max(SHORTEST_PERIOD, DRAWS_PER_GROUP * len(weights))))
    exact = shares / math.fsum(weights) * period  # fsum: the same on every machine
    quotas = np.maximum(1, np.floor(exact).astype(np.int64))
    left = period - int(quotas.sum())  # below 0 where many had to be raised to 1: the period is then as much longer
    if left > 0:
        quotas[np.argsort(quotas - exact, kind="stable")[:left]] += 1
    return quotas


class Planned:
    """An order worked out in stretches: in most, a hundred positions take as long as thousands."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.stretches = Recent(self.plan_stretch)

    def plan_stretch(self, number: int) -> tuple[Integers, Integers]:
        """Work out STRETCH positions."""
        return self.order.at(np.arange(number * STRETCH, (number + 1) * STRETCH))

    def between(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """Return (epochs, indices) of positions start to stop - 1."""
        parts = []
        for number in range(start // STRETCH, -(-stop // STRETCH)):
            first = number * STRETCH
            part = slice(max(start - first, 0), stop - first)
            epochs, indices = self.stretches[number]
            parts.append((epochs[part], indices[part]))
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate([epochs for epochs, _ in parts]), np.concatenate([indices for _, indices in parts])


class Recent(Generic[Table]):
    """The tables asked for last, each made by a pure function of its number."""

    def __init__(self, make: Callable[[int], Table]) -> None:
        self.make = make
        self.kept: dict[int, Table] = {}

    def __getitem__(self, number: int) -> Table:
        table = self.kept.get(number)
        if table is None:
            table = self.make(number)
            newest = list(self.kept.items())[-(TABLES_KEPT - 1) :]
            self.kept = {**dict(newest), number: table}  # replaced, not changed: another thread may be reading it
        return table
