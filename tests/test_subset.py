"""Subsets: balanced, nested, and the same source behind them."""

from itertools import pairwise

import numpy as np
import pytest

from vitcli.config import DataConfig, ShapesConfig
from vitcli.data.sources import ArraySource, open_source
from vitcli.data.subset import SubsetSource, balanced_prefix, held_out, stratified_share, take_subset
from vitcli.errors import DataError


def labels_of(counts: list[int]) -> np.ndarray:
    labels = np.repeat(np.arange(len(counts)), counts)
    return labels[np.random.default_rng(0).permutation(len(labels))]


def source_with(labels: np.ndarray) -> ArraySource:
    images = np.zeros((len(labels), 2, 2, 3), np.uint8) + (np.arange(len(labels)) % 251).astype(np.uint8)[:, None, None, None]
    return ArraySource(images, labels, [str(k) for k in range(labels.max() + 1)], name="set", fingerprint="f")


def test_prefixes_are_nested_and_balanced() -> None:
    labels = labels_of([50, 30, 70])
    chosen = [balanced_prefix(labels, examples=n, seed=3) for n in range(1, 151)]
    for smaller, larger in pairwise(chosen):
        assert set(smaller.tolist()) < set(larger.tolist())
    for n, keep in enumerate(chosen, start=1):
        assert len(keep) == n and (np.diff(keep) > 0).all()
        counts = np.bincount(labels[keep], minlength=3)
        if n <= 90:  # until the smallest class is used up
            assert counts.max() - counts.min() <= 1
    assert np.bincount(labels[chosen[129]]).tolist() == [50, 30, 50]


def test_the_choice_depends_on_the_seed_alone() -> None:
    labels = labels_of([50, 50])
    first, again, other = (balanced_prefix(labels, examples=20, seed=seed).tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_a_subset_shows_its_source() -> None:
    source = source_with(labels_of([10, 10, 10]))
    subset = take_subset(source, examples=12, seed=0)
    assert isinstance(subset, SubsetSource) and len(subset) == 12 and subset.uniform
    images, labels = subset.batch(np.arange(12))
    for i, kept in enumerate(subset.keep.tolist()):
        image, label = source[kept]
        assert np.array_equal(image, images[i]) and np.array_equal(image, subset[i][0])
        assert label == labels[i] == np.asarray(subset.labels)[i]
        assert subset.where(i) == source.where(kept)
    assert subset.fingerprint != take_subset(source, examples=11, seed=0).fingerprint


def test_blocks_shrink_with_the_subset() -> None:
    source = source_with(labels_of([10, 10, 10]))
    source.block_starts = np.array([0, 10, 20, 30])
    subset = take_subset(source, examples=9, seed=0)
    assert isinstance(subset, SubsetSource)
    starts = subset.block_starts
    assert starts is not None and starts[0] == 0 and starts[-1] == 9
    for i in range(9):
        block = np.searchsorted(starts, i, side="right") - 1
        assert subset.keep[i] // 10 == subset.keep[starts[block]] // 10  # one block of the part lies in one of the whole


def test_too_large_a_part_is_refused() -> None:
    with pytest.raises(DataError, match="data.examples is 31, but there are 30 training images"):
        take_subset(source_with(labels_of([10, 10, 10])), examples=31, seed=0)


def test_the_setting_limits_training_and_not_evaluation() -> None:
    data = DataConfig(source="digits", image_size=(8, 8), examples=100)
    train, val = (open_source("digits", split=split, data=data) for split in ("train", "val"))
    assert (len(train), len(val)) == (100, 359)
    assert np.bincount(np.asarray(train.labels)).tolist() == [10] * 10
    shapes = open_source("shapes", split="train", data=DataConfig(source="shapes", image_size=(16, 16), examples=200))
    labels = shapes.batch(np.arange(200))[1]  # type: ignore[attr-defined]
    assert np.bincount(labels).tolist() == [2] * 100


def test_held_out_takes_a_share_of_every_class_and_never_all() -> None:
    labels = labels_of([100, 10, 2, 1])
    out = held_out(labels, fraction=0.1, name="set")
    assert np.bincount(labels[out], minlength=4).tolist() == [10, 1, 1, 0]
    assert np.array_equal(out, held_out(labels, fraction=0.1, name="set"))
    with pytest.raises(DataError, match="every class has a single image"):
        held_out(np.arange(4), fraction=0.5, name="set")


@pytest.mark.parametrize(
    ("counts", "fraction", "expected"),
    [
        ([5000] * 10, 0.02, [100] * 10),  # CIFAR-10, as in ViT (2010.11929) Table 4
        ([500] * 100, 0.02, [10] * 100),  # CIFAR-100
        ([20] * 102, 0.1, [2] * 102),  # Flowers-102
    ],
)
def test_dev_splits_of_the_paper(counts: list[int], fraction: float, expected: list[int]) -> None:
    labels = labels_of(counts)
    assert np.bincount(labels[stratified_share(labels, fraction=fraction, name="set")]).tolist() == expected


@pytest.mark.parametrize("counts", [[100, 93, 99, 88], [7, 1, 1, 3], [1300, 732, 1000], [2, 2, 2, 2, 2]])
@pytest.mark.parametrize("fraction", [0.01, 0.02, 0.1, 0.2, 0.5])
def test_a_dev_split_has_its_exact_size_and_every_class_its_share(counts: list[int], fraction: float) -> None:
    labels = labels_of(counts)
    taken = np.bincount(labels[stratified_share(labels, fraction=fraction, name="set")], minlength=len(counts))
    most = np.array(counts) - 1
    assert taken.sum() == min(max(1, round(sum(counts) * fraction)), most.sum())
    assert (taken <= most).all()
    if (np.array(counts) > 3).all():
        assert np.abs(taken - np.array(counts) * fraction).max() < 1


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(DataError, match="single image"):
        stratified_share(np.arange(5), fraction=0.5, name="set")


def test_a_dev_split_and_the_rest_are_the_training_split() -> None:
    whole = open_source("digits", split="train", data=DataConfig(source="digits", image_size=(8, 8)))
    data = DataConfig(source="digits", image_size=(8, 8), dev_fraction=0.1)
    rest, dev = open_source("digits", split="train", data=data), open_source("digits", split="val", data=data)
    assert isinstance(rest, SubsetSource) and isinstance(dev, SubsetSource)
    assert len(dev) == 144 and not set(rest.keep) & set(dev.keep) and len(rest) + len(dev) == len(whole)
    assert len({whole.fingerprint, rest.fingerprint, dev.fingerprint}) == 3
    image, label = dev[3]
    there, label_there = whole[int(dev.keep[3])]
    assert np.array_equal(image, there) and label == label_there


def test_a_dev_split_is_a_share_of_the_subset() -> None:
    data = DataConfig(source="digits", image_size=(8, 8), dev_fraction=0.2, examples=1000)
    rest, dev = open_source("digits", split="train", data=data), open_source("digits", split="val", data=data)
    assert (len(rest), len(dev)) == (800, 200)
    assert np.bincount(np.asarray(dev.labels)).tolist() == [20] * 10


def test_computed_labels_give_their_last_rounds() -> None:
    shapes = ShapesConfig(classes=4, train_examples=40)
    data = DataConfig(source="shapes", image_size=(16, 16), shapes=shapes, dev_fraction=0.2)
    rest, dev = open_source("shapes", split="train", data=data), open_source("shapes", split="val", data=data)
    assert (len(rest), len(dev)) == (32, 8)
    assert np.bincount([dev[i][1] for i in range(8)]).tolist() == [2] * 4
