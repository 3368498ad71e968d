"""Votes of the nearest neighbours against scikit-learn's."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from vitcli import neighbours
from vitcli.neighbours import KNN_TEMPERATURE, nearest_classes

CPU = torch.device("cpu")


def problem(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 6, 300)
    centres = chance.normal(size=(6, 16))
    train = centres[labels] + 1.2 * chance.normal(size=(300, 16))
    test = centres[chance.integers(0, 6, 120)] + 1.2 * chance.normal(size=(120, 16))
    lengths = chance.uniform(0.1, 50, (300, 1))  # cosine looks at directions alone
    return (train * lengths).astype(np.float32), labels, test.astype(np.float32)


@pytest.mark.parametrize("k", [1, 5, 20, 300])
def test_votes_are_scikit_learns(k: int) -> None:
    train, labels, test = problem()
    weighted, plain = nearest_classes(train, labels, test, num_classes=6, neighbours=[k], device=CPU)[k]
    for found, weights in ((weighted, lambda distance: np.exp(-distance / KNN_TEMPERATURE)), (plain, "uniform")):
        judge = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(train.astype(np.float64), labels)
        expected = judge.predict_proba(test.astype(np.float64))
        np.testing.assert_allclose(expected[np.arange(len(test)), found], expected.max(1), rtol=1e-4)
        assert (found == expected.argmax(1)).mean() > 0.99


def test_several_numbers_at_once_and_in_pieces_are_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test = problem(1)
    alone = {k: nearest_classes(train, labels, test, num_classes=6, neighbours=[k], device=CPU)[k] for k in (1, 10, 50)}
    monkeypatch.setattr(neighbours, "CHUNK", 2000)  # six test images at a time
    together = nearest_classes(train, labels, test, num_classes=6, neighbours=[10, 1, 50], device=CPU)
    for k, votes in alone.items():
        for found, expected in zip(together[k], votes):
            np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(alone[1][0], alone[50][0])


def test_near_neighbours_outvote_many_far_ones() -> None:
    train = np.array([[1, 0.01], [0, 1], [0.05, 1], [0.1, 1]], np.float32)
    votes = nearest_classes(
        train, np.array([0, 1, 1, 1]), np.array([[1, 0]], np.float32), num_classes=2, neighbours=[4], device=CPU
    )
    weighted, plain = votes[4]
    assert (weighted.tolist(), plain.tolist()) == ([0], [1])


@pytest.mark.parametrize("k", [0, 301])
def test_more_neighbours_than_images_are_refused(k: int) -> None:
    train, labels, test = problem()
    with pytest.raises(ValueError, match="1 to 300"):
        nearest_classes(train, labels, test, num_classes=6, neighbours=[k], device=CPU)
