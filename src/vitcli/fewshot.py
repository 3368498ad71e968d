"""The paper's few-shot probe: least squares from frozen features of a few images per class to targets of -1 and 1.

Closed form, as in big_vision's `fewshot_lsr.py` (ViT (2010.11929) 4.1): features are whitened by the mean and standard
deviation of the shots, a constant of 100 makes the bias next to unregularised, and L2 is 2^10 unless chosen. In float64.

N images, D features, P = min(N, D + 1) eigenvalues, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["L2", "L2_CHOICES", "Decomposition", "Ridge", "choose_l2", "decompose", "draw_shots", "first_shots", "ridge"]

L2 = 2.0**10
L2_CHOICES = tuple(2.0**exponent for exponent in range(-10, 21))
BIAS = 100.0  # large, so that its weight costs next to nothing
MOST_FOLDS = 5
CHUNK_BYTES = 64 << 20  # of float64 scores at a time

Array = NDArray[np.float64]


# ---------------------------------------------------------------- which images


def draw_shots(labels: NDArray[np.int64], *, num_classes: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the positions of every class's images, K arrays, in the order in which shots are taken from them.

    big_vision's draw: one `np.random.default_rng(seed)` permutes class after class. Fewer shots are among more shots.
    """
    order = np.argsort(labels, kind="stable")  # positions ascend within a class
    ends = np.cumsum(np.bincount(labels, minlength=num_classes))
    chance = np.random.default_rng(seed)
    return [chance.permutation(members) for members in np.split(order, ends[:-1])]


def first_shots(drawn: Sequence[NDArray[np.int64]], shots: int) -> NDArray[np.int64]:
    """Return the first `shots` of every class; all that a smaller class has."""
    return np.concatenate([members[:shots] for members in drawn])


# ---------------------------------------------------------------- least squares


@dataclass(frozen=True)
class Ridge:
    """A linear classifier on whitened features."""

    mean: Array  # (D,)
    std: Array  # (D,)
    weights: Array  # (D + 1, K), the bias's last, of the constant 100

    def scores(self, features: NDArray[np.floating]) -> Array:
        """Return the scores (M, K) of features (M, D)."""
        scores: Array = whiten(features, self.mean, self.std) @ self.weights
        return scores

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.int64]:
        """Return the class (M,) with the highest score for each of features (M, D); of equal ones the lowest number."""
        rows = max(1, CHUNK_BYTES // (8 * sum(self.weights.shape)))
        parts = [self.scores(features[start : start + rows]).argmax(1) for start in range(0, len(features), rows)]
        return np.concatenate([np.zeros(0, np.int64), *parts])


@dataclass(frozen=True)
class Decomposition:
    """Least squares prepared for any L2: X^T X, or X X^T where that is smaller, in its eigenvectors."""

    mean: Array  # (D,)
    std: Array  # (D,)
    eigenvalues: Array  # (P,)
    left: Array  # (D + 1, P)
    right: Array  # (P, K)

    def solve(self, l2: float) -> Ridge:
        """Return the minimum of |X W - Y|^2 + l2 |W|^2."""
        return Ridge(self.mean, self.std, (self.left / (self.eigenvalues + l2)) @ self.right)


def ridge(features: NDArray[np.floating], labels: NDArray[np.int64], *, num_classes: int, l2: float = L2) -> Ridge:
    """Fit features (N, D) to one target per class, 1 for an image's own class (N,) and -1 for the others."""
    return decompose(features, labels, num_classes=num_classes).solve(l2)


def decompose(features: NDArray[np.floating], labels: NDArray[np.int64], *, num_classes: int) -> Decomposition:
    """Prepare the least squares of features (N, D) and labels (N,).

    X is (N, D + 1). With X^T X = Q E Q^T the solution is Q (E + l2)^-1 Q^T X^T Y; with X X^T = Q E Q^T it is
    X^T Q (E + l2)^-1 Q^T Y. Targets of N x K numbers are never made: Y is 2 for the own class, less 1 everywhere.
    """
    exact = np.asarray(features, np.float64)
    mean, std = exact.mean(0), exact.std(0) + 1e-5
    X = whiten(exact, mean, std)
    if X.shape[0] >= X.shape[1]:
        eigenvalues, left = np.linalg.eigh(X.T @ X)
        right = left.T @ targets_sum(X, labels, num_classes=num_classes)
    else:
        eigenvalues, vectors = np.linalg.eigh(X @ X.T)
        left = X.T @ vectors
        right = targets_sum(vectors, labels, num_classes=num_classes)
    return Decomposition(mean, std, np.maximum(eigenvalues, 0.0), left, right)  # those of 0 come out a little below it


def whiten(features: NDArray[np.floating], mean: Array, std: Array) -> Array:
    """Return features (M, D) whitened, with the constant, (M, D + 1)."""
    return np.concatenate([(features - mean) / std, np.full((len(features), 1), BIAS)], axis=1)


def targets_sum(rows: Array, labels: NDArray[np.int64], *, num_classes: int) -> Array:
    """Return rows^T Y, (P, K), for rows (N, P) and the targets Y of labels (N,)."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    of_class = np.zeros((num_classes, rows.shape[1]))
    of_class[present] = np.add.reduceat(rows[order], starts, axis=0)
    return (2.0 * of_class - rows.sum(0)).T


# ---------------------------------------------------------------- L2 from the shots themselves


def choose_l2(features: NDArray[np.floating], drawn: Sequence[NDArray[np.int64]], *, shots: int) -> float:
    """Return the L2 of 2^-10 to 2^20 that classifies held-out shots best, by cross-validation over at most 5 folds.

    Only the shots themselves are looked at, so k shots stay k shots. With one shot there is none to hold out, and it is 2^10;
    of equal ones it is the one nearest to that.

    Args:
        features: (N, D) of the images that `drawn` numbers.
        drawn: from `draw_shots`.
        shots: of each class.
    """
    hits = np.zeros(len(L2_CHOICES), np.int64)
    for fit, held_out in folds(drawn, shots=shots):
        fit_labels, held_labels = ([np.full(len(part), k) for k, part in enumerate(side)] for side in (fit, held_out))
        prepared = decompose(features[np.concatenate(fit)], np.concatenate(fit_labels), num_classes=len(drawn))
        X, truth = whiten(features[np.concatenate(held_out)], prepared.mean, prepared.std), np.concatenate(held_labels)
        projected = X @ prepared.left  # (M, P)
        for number, l2 in enumerate(L2_CHOICES):
            scores = (projected / (prepared.eigenvalues + l2)) @ prepared.right
            hits[number] += (scores.argmax(1) == truth).sum()
    best = np.flatnonzero(hits == hits.max())
    distance = np.abs(np.log2(np.array(L2_CHOICES)[best] / L2))
    return L2_CHOICES[best[np.argmin(distance)]]


def folds(
    drawn: Sequence[NDArray[np.int64]], *, shots: int
) -> Iterator[tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]]:
    """Yield what to fit and what to hold out, class by class; shot s of a class is held out in fold s modulo their number."""
    number = min(MOST_FOLDS, shots)
    if number < 2:
        return
    for fold in range(number):
        held = [members[:shots][fold::number] for members in drawn]
        fit = [np.delete(members[:shots], np.s_[fold::number]) for members in drawn]
        if sum(map(len, fit)) and sum(map(len, held)):  # of classes that have fewer images than shots
            yield fit, held
