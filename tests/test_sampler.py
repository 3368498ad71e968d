"""Order: every epoch a permutation, exact quotas, the same for any way of asking, and as mixed as it claims to be."""

import pickle
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from vitcli.config import DataConfig
from vitcli.data import sampler
from vitcli.data.protocol import Group, SourceDefaults
from vitcli.data.sampler import (
    BlockShuffle,
    ClassShuffle,
    FullShuffle,
    GroupShuffle,
    Order,
    Planned,
    Turns,
    build_order,
    quotas_of,
)
from vitcli.errors import DataError
from vitcli.randomness import mix, permute, permute_each

deterministic = settings(derandomize=True, deadline=None, max_examples=60)
seeds = st.integers(0, 2**40)


class Listed(SourceDefaults):
    """A source that is asked for nothing but its shape."""

    name = "listed"

    def __init__(self, size: int, **facts: Any) -> None:
        self.size = size
        self.labels = None
        vars(self).update(facts)

    def __len__(self) -> int:
        return self.size


def config(**settings: Any) -> DataConfig:
    return DataConfig(source="digits", image_size=(8, 8), **settings)


def starts_of(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])


def sequence(order: Order, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return order.at(np.arange(start, stop))


def long_tail(classes: int = 12, *, seed: int = 0) -> NDArray[np.int64]:
    """Return labels, mixed, of classes with 1, 2, 3, ... examples; class 4 has none."""
    labels = np.repeat(np.arange(classes), [0 if k == 4 else k + 1 for k in range(classes)])
    return labels[np.random.default_rng(seed).permutation(len(labels))]


def orders() -> dict[str, Order]:
    """Return one order of each kind, small enough for several epochs."""
    blocks = BlockShuffle(starts_of([7, 1, 30, 12, 12, 12, 5, 40]), window=30, seed=1)
    return {
        "full": FullShuffle(119, seed=1),
        "blocks": blocks,
        "balanced": ClassShuffle(long_tail(), sampling="balanced", seed=1),
        "sqrt": ClassShuffle(long_tail(), sampling="sqrt", seed=1),
        "groups": GroupShuffle([FullShuffle(50, seed=2), blocks], starts=[0, 50], weights=[1, 3], seed=1),
    }


# ---------------------------------------------------------------- one after the other


def test_full_shuffle_keeps_the_numbers_of_earlier_versions() -> None:
    epochs, indices = sequence(FullShuffle(1438, seed=7), 1434, 1442)
    assert epochs.tolist() == [0] * 4 + [1] * 4
    assert indices.tolist() == [397, 1304, 149, 1275, 137, 705, 1196, 392]  # as before there were other orders


@pytest.mark.parametrize("kind", orders())
def test_any_way_of_asking_gives_the_same_order(kind: str) -> None:
    whole = sequence(orders()[kind], 0, 1500)
    rng = np.random.default_rng(0)
    for ranks in (1, 2, 3, 64):
        cuts = [1500 * rank // ranks for rank in range(ranks + 1)]
        order = orders()[kind]
        parts = [sequence(order, *pair) for pair in pairwise(cuts)]
        for got, expected in zip(map(np.concatenate, zip(*parts, strict=True)), whole, strict=True):
            assert (got == expected).all()
    scattered = rng.permutation(1500)[:500]
    for order in (orders()[kind], pickle.loads(pickle.dumps(orders()[kind]))):  # as loader processes may get it
        for got, expected in zip(order.at(scattered), whole, strict=True):
            assert got.dtype == np.int64 and (got == expected[scattered]).all()
    assert all(len(part) == 0 for part in orders()[kind].at(np.arange(0)))


@pytest.mark.parametrize("kind", orders())
def test_resume_at_any_position_is_the_tail_of_the_whole(kind: str) -> None:
    whole = sequence(orders()[kind], 0, 1000)
    for start in (1, 118, 119, 120, 500, 999):
        for got, expected in zip(sequence(orders()[kind], start, 1000), whole, strict=True):
            assert (got == expected[start:]).all()


@pytest.mark.parametrize("kind", orders())
def test_an_example_is_never_augmented_the_same_way_twice(kind: str) -> None:
    pairs = np.stack(sequence(orders()[kind], 0, 5000), axis=1)
    assert len(np.unique(pairs, axis=0)) == len(pairs)


@pytest.mark.parametrize("kind", orders())
def test_another_seed_is_another_order(kind: str) -> None:
    first = sequence(orders()[kind], 0, 100)[1]
    other = {
        "full": FullShuffle(119, seed=2),
        "blocks": BlockShuffle(starts_of([7, 1, 30, 12, 12, 12, 5, 40]), window=30, seed=2),
        "balanced": ClassShuffle(long_tail(), sampling="balanced", seed=2),
        "sqrt": ClassShuffle(long_tail(), sampling="sqrt", seed=2),
        "groups": GroupShuffle([FullShuffle(50, seed=2), FullShuffle(119, seed=3)], starts=[0, 50], weights=[1, 3], seed=2),
    }[kind]
    assert (sequence(other, 0, 100)[1] != first).mean() > 0.8


# ---------------------------------------------------------------- blocks


@deterministic
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any), st.integers(1, 400), seeds, st.integers(0, 10**6))
def test_every_epoch_of_blocks_shows_everything_once(lengths: list[int], window: int, seed: int, epoch: int) -> None:
    order = BlockShuffle(starts_of(lengths), window=window, seed=seed)
    size = sum(lengths)
    epochs, indices = sequence(order, epoch * size, (epoch + 1) * size)
    assert (epochs == epoch).all()
    assert sorted(indices.tolist()) == list(range(size))


@deterministic
@given(st.integers(1, 1500), seeds, st.integers(0, 10**6))
def test_every_epoch_of_a_full_shuffle_shows_everything_once(size: int, seed: int, epoch: int) -> None:
    epochs, indices = sequence(FullShuffle(size, seed=seed), epoch * size, (epoch + 1) * size)
    assert (epochs == epoch).all()
    assert sorted(indices.tolist()) == list(range(size))


def test_a_window_is_made_of_whole_blocks_and_blocks_change_their_company() -> None:
    starts = starts_of([100] * 60 + [37] * 5)
    order = BlockShuffle(starts, window=800, seed=0)
    company = []
    for epoch in range(2):
        _, indices = sequence(order, epoch * starts[-1], (epoch + 1) * starts[-1])
        blocks = np.searchsorted(starts, indices, side="right") - 1
        first = [int(np.flatnonzero(blocks == block)[0]) for block in range(65)]
        last = [int(np.flatnonzero(blocks == block)[-1]) for block in range(65)]
        assert max(np.subtract(last, first)) < 1000
        cuts = [place for place in range(starts[-1]) if all(b >= place or e < place for b, e in zip(first, last, strict=True))]
        windows = np.diff([*cuts, starts[-1]])
        assert 7 <= len(windows) <= 9 and min(windows) >= 600 and max(windows) <= 1000
        company.append(np.searchsorted(cuts, first, side="right"))
    together = [row[:, None] == row[None] for row in company]
    assert (together[0] & together[1]).sum() < 0.5 * together[0].sum()


@deterministic
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 400), seeds, st.integers(1, 50))
def test_a_windows_blocks_are_asked_for_once_while_the_one_before_is_shown(
    lengths: list[int], window: int, seed: int, batch: int
) -> None:
    starts, size = starts_of(lengths), sum(lengths)
    order = BlockShuffle(starts, window=window, seed=seed)
    cuts = [epoch * size + int(place) for epoch in range(3) for place in order.epochs[epoch].window_starts[:-1]]
    for begin, middle, end in zip(cuts, cuts[1:], cuts[2:], strict=False):
        parts = [np.arange(first, min(first + batch, middle)) for first in range(begin, middle, batch)]
        asked = np.concatenate([order.ahead(part) for part in parts])
        shown = sequence(order, middle, end)[1]
        blocks, asked_blocks = (np.searchsorted(starts, indices, side="right") for indices in (shown, asked))
        assert sorted(asked_blocks.tolist()) == np.unique(blocks).tolist()


def test_only_blocks_are_asked_for_ahead() -> None:
    positions = np.arange(500)
    for kind in ("full", "balanced"):
        assert len(orders()[kind].ahead(positions)) == 0
    through_groups = orders()["groups"].ahead(positions)
    assert len(through_groups) >= 8 and (through_groups >= 50).all()
    assert len(orders()["groups"].ahead(positions[:0])) == 0


def test_a_block_longer_than_the_window_is_a_window() -> None:
    order = BlockShuffle(starts_of([10, 500, 10, 500, 10]), window=50, seed=3)
    indices = sequence(order, 0, 1030)[1]
    assert sorted(indices.tolist()) == list(range(1030))


# ---------------------------------------------------------------- groups


@deterministic
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_quotas_are_the_largest_remainders(weights: list[float]) -> None:
    quotas = quotas_of(weights)
    exact = np.array(weights) / sum(weights) * quotas.sum()
    assert quotas.min() >= 1
    if exact.min() >= 1:
        assert abs(quotas - exact).max() < 1
    if len(set(weights)) == 1:
        assert len(set(quotas.tolist())) == 1


def test_rare_groups_still_have_their_turn() -> None:
    quotas = quotas_of([1e-9] * 100 + [1.0])
    assert quotas[:100].tolist() == [1] * 100


@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 1], [0.2, 0.3, 0.5, 7]])
def test_turns_keep_their_quotas_in_every_period_and_are_counted_in_order(weights: list[float]) -> None:
    turns = Turns(weights, seed=4)
    groups, draws = turns.at(np.arange(3 * turns.period))
    for number in range(3):
        part = groups[number * turns.period : (number + 1) * turns.period]
        assert np.bincount(part).tolist() == turns.quotas.tolist()
    for group in range(len(weights)):
        assert draws[groups == group].tolist() == list(range(3 * turns.quotas[group]))
    assert (groups[: turns.period] != groups[turns.period : 2 * turns.period]).any()


@pytest.mark.parametrize("sampling", ["balanced", "sqrt"])
def test_classes_have_their_shares_and_repeat_nothing_before_all_was_shown(sampling: Any) -> None:
    labels = long_tail()
    order = ClassShuffle(labels, sampling=sampling, seed=0)
    epochs, indices = sequence(order, 0, 2 * order.turns.period)
    shown = labels[indices]
    counts = np.bincount(labels)
    share = (counts > 0) * 1.0 if sampling == "balanced" else np.sqrt(counts)
    assert np.allclose(np.bincount(shown) / len(shown), share / share.sum(), atol=1e-4)
    for label in np.flatnonzero(counts).tolist():
        members = np.flatnonzero(labels == label)
        mine = shown == label
        assert epochs[mine].tolist() == (np.arange(mine.sum()) // len(members)).tolist()
        passes = indices[mine][: mine.sum() // len(members) * len(members)].reshape(-1, len(members))
        assert (np.sort(passes, axis=1) == members).all()
        if len(members) > 4:
            assert len(np.unique(passes[:50], axis=0)) > 40


def test_mixtures_keep_their_weights_and_go_through_each_part_by_its_own_epochs() -> None:
    blocks = starts_of([10, 20, 30])
    groups = [Group(0, 100, 1.0), Group(100, 160, 3.0, blocks + 100)]
    source = Listed(160, groups=groups, block_starts=None)
    order = build_order(source, config(shuffle_window=20), seed=3)
    assert isinstance(order, GroupShuffle) and isinstance(order.orders[1], BlockShuffle)
    epochs, indices = sequence(order, 0, 4000)
    small = indices < 100
    assert abs(small.mean() - 0.25) < 0.02
    for members, start, size in ((small, 0, 100), (~small, 100, 60)):
        mine = indices[members]
        passes = mine[: len(mine) // size * size].reshape(-1, size)
        assert (np.sort(passes, axis=1) == np.arange(start, start + size)).all()
        assert epochs[members].tolist() == (np.arange(len(mine)) // size).tolist()


def test_classes_are_balanced_within_each_part_of_a_mixture() -> None:
    labels = np.concatenate([np.repeat([0, 1], [90, 10]), np.repeat([0, 1, 2], [10, 20, 30])])
    source = Listed(160, groups=[Group(0, 100, 1.0), Group(100, 160, 1.0)], labels=labels)
    order = build_order(source, config(sampling="balanced"), seed=3)
    assert isinstance(order, GroupShuffle)
    _, indices = sequence(order, 0, 70_000)
    first = indices < 100
    assert abs(first.mean() - 0.5) < 0.01
    assert np.allclose(np.bincount(labels[indices[first]]) / first.sum(), [0.5, 0.5], atol=0.01)
    assert np.allclose(np.bincount(labels[indices[~first]]) / (~first).sum(), [1 / 3] * 3, atol=0.01)


def test_a_mixture_that_cannot_be_balanced_says_so() -> None:
    source = Listed(160, groups=[Group(0, 100, 1.0), Group(100, 160, 3.0)])
    with pytest.raises(
        DataError, match=r"listed: data.sampling=sqrt needs the labels of all parts, .* take data.sampling=natu"
    ):
        build_order(source, config(sampling="sqrt"), seed=0)


# ---------------------------------------------------------------- which order


@pytest.mark.parametrize(
    ("facts", "settings", "expected"),
    [
        ({}, {}, FullShuffle),
        ({}, {"shuffle_window": 10}, FullShuffle),  # an array has no blocks
        ({"block_starts": starts_of([100] * 10)}, {}, FullShuffle),
        ({"block_starts": starts_of([100] * 10)}, {"shuffle_window": 300}, BlockShuffle),
        ({"block_starts": starts_of([100] * 10)}, {"shuffle_window": 1000}, FullShuffle),
        ({"block_starts": starts_of([100] * 10), "remote": True}, {}, FullShuffle),  # smaller than a window
        ({"block_starts": starts_of([100_000] * 10), "remote": True}, {}, BlockShuffle),
        ({"block_starts": starts_of([100] * 10), "labels": np.arange(1000) % 10}, {"sampling": "sqrt"}, ClassShuffle),
        ({}, {"sampling": "balanced"}, FullShuffle),  # computed labels are balanced
    ],
)
def test_build_order(facts: dict[str, Any], settings: dict[str, Any], expected: type) -> None:
    starts = facts.get("block_starts")
    source = Listed(1000 if starts is None else int(starts[-1]), **facts)
    assert type(build_order(source, config(**settings), seed=0)) is expected


def test_without_new_settings_the_order_is_the_seeds_own() -> None:
    expected = sequence(FullShuffle(1000, seed=9), 5000, 5064)
    got = sequence(build_order(Listed(1000), config(), seed=9), 5000, 5064)
    assert all((a == b).all() for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------- far positions, and quality


def test_a_far_position_of_14_million_costs_a_batch_and_a_table_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counting(positions: Any, size: int, seed: int) -> NDArray[np.int64]:
        asked.append(len(positions))
        return permute(positions, size, seed)

    monkeypatch.setattr(sampler, "permute", counting)
    size, far = 14_000_000, np.arange(14_000_000 * 89 + 6_999_900, 14_000_000 * 89 + 7_000_156)
    full = FullShuffle(size, seed=0)
    assert len(set(full.at(far)[1].tolist())) == 256 and asked == [256]
    asked.clear()
    blocks = BlockShuffle(np.arange(0, size + 1, 1000), window=64_000, seed=0)
    epochs, indices = blocks.at(far)
    assert set(epochs.tolist()) == {89} and len(set(indices.tolist())) == 256
    assert asked[0] == 14_000 and sum(asked[1:]) == 256  # the epoch's table, then the batch
    asked.clear()
    blocks.at(far + 256)
    assert sum(asked) == 256  # the table is kept
    asked.clear()
    mixed = GroupShuffle([full, blocks], starts=[0, size], weights=[1, 2], seed=0)
    mixed.at(far)
    assert sum(asked) <= 2 * mixed.turns.period + 14_000 + 256


def test_permute_each_is_permute_with_many_sizes() -> None:
    for size in (1, 2, 3, 5, 100, 1000, 70_000):
        positions = np.arange(min(size, 300))
        key = mix(mix(np.array([11], np.uint64)))[0]
        got = permute_each(positions, np.full(len(positions), size), np.full(len(positions), key))
        assert (got == permute(positions, size, 11)).all()
    sizes = np.repeat([1, 3, 17, 400], [1, 3, 17, 400])
    positions = np.concatenate([np.arange(n) for n in (1, 3, 17, 400)])
    got = permute_each(positions, sizes, np.full(len(sizes), np.uint64(5)))
    assert all(sorted(got[sizes == n].tolist()) == list(range(n)) for n in (1, 3, 17, 400))


def excess(order: Order, labels: NDArray[np.int64], *, batches: int = 100, batch_size: int = 256) -> float:
    """Return the chi-square of the batches' class counts over what it is if every batch were drawn from the whole set."""
    share = np.bincount(labels) / len(labels)
    expected = batch_size * share
    values = []
    for start in range(0, batches * batch_size, batch_size):
        counts = np.bincount(labels[order.at(np.arange(start, start + batch_size))[1]], minlength=len(share))
        values.append(((counts - expected) ** 2 / expected).sum())
    spread = (len(share) - 1) * (len(labels) - batch_size) / (len(labels) - 1)  # of the hypergeometric distribution
    return float(np.mean(values) / spread)


def test_a_block_shuffle_is_as_good_as_its_window() -> None:
    size, classes = 60_000, 100
    by_class = np.arange(size) * classes // size
    mixed = by_class[np.random.default_rng(0).permutation(size)]
    starts = np.arange(0, size + 1, 200)  # 300 shards
    assert abs(excess(FullShuffle(size, seed=1), by_class) - 1) < 0.03
    assert abs(excess(BlockShuffle(starts, window=200, seed=1), mixed) - 1) < 0.03  # mixed on disk: any window does
    assert abs(excess(BlockShuffle(starts, window=12_800, seed=1), mixed) - 1) < 0.03
    sorted_excess = [excess(BlockShuffle(starts, window=200 * n, seed=1), by_class) for n in (1, 4, 16, 64)]
    assert sorted_excess[0] > 100  # a window of one class: the negative control
    assert sorted_excess == sorted(sorted_excess, reverse=True) and sorted_excess[-1] < 6


def test_over_epochs_an_example_comes_anywhere() -> None:
    order = BlockShuffle(starts_of([20] * 20), window=100, seed=5)
    places = np.flatnonzero(sequence(order, 0, 120 * 400)[1] == 123) % 400 / 400
    assert len(places) == 120
    assert stats.kstest(places, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.25


def test_a_planned_order_is_the_order_itself() -> None:
    order = FullShuffle(1000, seed=3)
    planned = Planned(order)
    for start, stop in ((0, 5), (8190, 8200), (8192, 8192), (5, 30_000), (123_456_789, 123_456_900)):
        for got, expected in zip(planned.between(start, stop), order.at(np.arange(start, stop)), strict=True):
            assert np.array_equal(got, expected)
