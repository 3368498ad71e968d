"""Numbers about answers: confusion, calibration, intervals, tests. Pure functions of arrays, without models and files.

Shapes: `N` images, `K` classes. A predicted class of -1 is no answer, which is never right: of logits that are not numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

__all__ = [
    "ClassScores",
    "Reliability",
    "bootstrap_interval",
    "class_scores",
    "confidences_at",
    "confusion_matrix",
    "expected_calibration_error",
    "fit_temperature",
    "mcnemar",
    "most_confused",
    "paired_bootstrap",
    "reliability",
    "share_interval",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Loss = Literal["softmax", "sigmoid"]

LEVEL = 0.95  # of intervals
TEMPERATURES = (0.01, 100.0)  # between which one is looked for
CHUNK_VALUES = 1 << 24  # logits at a time in float64: 128 MiB


# ---------------------------------------------------------------- confusion


def confusion_matrix(labels: ArrayLike, predicted: ArrayLike, *, num_classes: int) -> Integers:
    """Count, (K, K), how often images of each class (row) were taken for each (column); no answer is in no column.

    Raises:
        ValueError: the lengths differ, or a number is not a class.
    """
    truth, guesses = class_numbers(labels, predicted, num_classes=num_classes)
    answered = guesses >= 0
    cells = np.bincount(truth[answered] * num_classes + guesses[answered], minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


@dataclass(frozen=True)
class ClassScores:
    """Per class, (K,): what a class's precision and recall are made of, and they; NaN where there is nothing to divide by."""

    support: Integers  # images of the class
    predicted: Integers  # images taken for it
    right: Integers  # both
    precision: Floats
    recall: Floats
    f1: Floats  # 2 right / (support + predicted)

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that have images; a class that is never predicted counts 0."""
        return float(self.f1[self.support > 0].mean()) if self.support.any() else float("nan")


def class_scores(labels: ArrayLike, predicted: ArrayLike, *, num_classes: int) -> ClassScores:
    """Return precision, recall and F1 of every class, without a (K, K) table.

    Raises:
        ValueError: the lengths differ, or a number is not a class.
    """
    truth, guesses = class_numbers(labels, predicted, num_classes=num_classes)
    support = np.bincount(truth, minlength=num_classes)
    taken = np.bincount(guesses[guesses >= 0], minlength=num_classes)
    right = np.bincount(truth[truth == guesses], minlength=num_classes)
    return ClassScores(support, taken, right, ratio(right, taken), ratio(right, support), ratio(2 * right, support + taken))


def most_confused(labels: ArrayLike, predicted: ArrayLike, *, num_classes: int, count: int) -> list[tuple[int, int, int]]:
    """Return the `count` most frequent mistakes as (label, predicted, images), the most frequent first."""
    truth, guesses = class_numbers(labels, predicted, num_classes=num_classes)
    wrong = (guesses >= 0) & (guesses != truth)
    cells, images = np.unique(truth[wrong] * num_classes + guesses[wrong], return_counts=True)
    order = np.argsort(-images, kind="stable")[:count]
    return [(int(cell // num_classes), int(cell % num_classes), int(n)) for cell, n in zip(cells[order], images[order])]


def class_numbers(labels: ArrayLike, predicted: ArrayLike, *, num_classes: int) -> tuple[Integers, Integers]:
    truth, guesses = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    if truth.ndim != 1 or truth.shape != guesses.shape:
        raise ValueError(f"expected labels and predictions (N,), found {truth.shape} and {guesses.shape}")
    for numbers, least in ((truth, 0), (guesses, -1)):
        if numbers.size and not least <= numbers.min() <= numbers.max() < num_classes:
            raise ValueError(f"found class numbers {numbers.min()} to {numbers.max()}, expected {least} to {num_classes - 1}")
    return truth, guesses


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


# ---------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Reliability:
    """Images in bins of equal width by the confidence of their first guess; NaN where a bin is empty."""

    edges: Floats  # (bins + 1,) from 0 to 1; a bin holds its upper edge
    counts: Integers  # (bins,)
    confidence: Floats  # (bins,) mean
    accuracy: Floats  # (bins,)

    @property
    def ece(self) -> float:
        """The expected calibration error: the mean of |accuracy - confidence| over the images' bins (1706.04599, Eq. 3)."""
        filled = self.counts > 0
        if not filled.any():
            return float("nan")
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float(np.average(gaps, weights=self.counts[filled]))


def reliability(confidences: ArrayLike, correct: ArrayLike, *, bins: int = 15) -> Reliability:
    """Return the table behind a reliability diagram; confidences (N,) in [0, 1], `correct` (N,) bool.

    Confidences that are not numbers are left out.
    """
    sure, right = np.asarray(confidences, np.float64), np.asarray(correct, np.float64)
    if sure.ndim != 1 or sure.shape != right.shape:
        raise ValueError(f"expected confidences and hits (N,), found {sure.shape} and {right.shape}")
    known = ~np.isnan(sure)
    sure, right = sure[known], right[known]
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.searchsorted(edges[1:-1], sure, side="left")  # (lower, upper]
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (sure, right)]
    return Reliability(edges, counts, ratio(sums[0], counts), ratio(sums[1], counts))


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike, *, bins: int = 15) -> float:
    """Return how far confidence and accuracy lie apart, in [0, 1] (Guo et al., 1706.04599, Eq. 3); NaN without an answer."""
    return reliability(confidences, correct, bins=bins).ece


def fit_temperature(logits: NDArray[Any], labels: ArrayLike, *, loss: Loss = "softmax") -> float:
    """Return the temperature T for which logits (N, K) / T give the labels (N,) the smallest mean loss.

    The loss is convex in 1/T, so there is one minimum; it is looked for between 0.01 and 100 (temperature scaling, 1706.04599).
    NaN where no label has a finite logit.
    """
    truth = np.asarray(labels, np.int64)
    own = logits[np.arange(len(truth)), truth]
    usable = np.isfinite(own) & ~np.isnan(logits).any(1)
    if not usable.any():
        return float("nan")
    logits, truth = logits[usable], truth[usable]

    def mean_loss(log_temperature: float) -> float:
        total = 0.0
        for rows in chunks(logits):
            scaled = logits[rows].astype(np.float64) * np.exp(-log_temperature)
            mine = scaled[np.arange(len(scaled)), truth[rows]]
            if loss == "softmax":
                total += float((special.logsumexp(scaled, axis=1) - mine).sum())
            else:  # log(1 + exp x) of every class, less the label's own logit
                total += float(np.logaddexp(0.0, scaled).sum() - mine.sum())
        return total / len(truth)

    found = optimize.minimize_scalar(mean_loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def confidences_at(logits: NDArray[Any], *, temperature: float, loss: Loss = "softmax") -> Floats:
    """Return the probability of the first guess, (N,), from logits (N, K) divided by a temperature."""
    found = []
    for rows in chunks(logits):
        scaled = logits[rows].astype(np.float64) / temperature
        top = scaled.max(1)
        found.append(np.exp(top - special.logsumexp(scaled, axis=1)) if loss == "softmax" else special.expit(top))
    return np.concatenate(found) if found else np.empty(0)


def chunks(logits: NDArray[Any]) -> Sequence[slice]:
    rows = max(1, CHUNK_VALUES // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


# ---------------------------------------------------------------- how sure a number is


def bootstrap_interval(values: ArrayLike, *, level: float = LEVEL, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of values (N,); NaN where a value is not finite.

    Of values that are 0 or 1 the resampled mean is binomial, so its quantiles are exact and nothing is drawn.

    Raises:
        ValueError: there are no values.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"expected values (N,), found shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        return float("nan"), float("nan")
    if ((numbers == 0) | (numbers == 1)).all():
        low, high = share_interval(numbers.sum(), len(numbers), level=level)
        return float(low), float(high)
    generator = np.random.default_rng(seed)
    size = len(numbers)
    means = [numbers[generator.integers(0, size, size, dtype=np.int32)].mean() for _ in range(resamples)]
    return percentiles(means, level=level)


def share_interval(right: ArrayLike, of: ArrayLike, *, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Return the percentile bootstrap interval of shares right / of, arrays of one shape; NaN where there is nothing.

    It is that of infinitely many resamples: quantiles of the binomial distribution.
    """
    hits, trials = np.broadcast_arrays(np.asarray(right, np.float64), np.asarray(of, np.float64))
    share = ratio(hits, trials)
    tails = ((1 - level) / 2, (1 + level) / 2)
    low, high = (ratio(np.maximum(stats.binom.ppf(tail, trials, share), 0.0), trials) for tail in tails)
    return low, high


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Return the two-sided p-value of equal accuracy of two models on the same N images (McNemar's test, exact binomial).

    Only images that one of them gets right count; without any, 1.
    """
    a, b = paired(correct_a, correct_b)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_bootstrap(
    correct_a: ArrayLike, correct_b: ArrayLike, *, level: float = LEVEL, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return accuracy of `a` less that of `b` on the same N images, and its percentile bootstrap interval (low, high).

    An image's difference is -1, 0 or 1, so how often each is drawn into a resample is multinomial.
    """
    a, b = paired(correct_a, correct_b)
    size, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    shares = np.array([only_a, only_b, size - only_a - only_b]) / size
    drawn = np.random.default_rng(seed).multinomial(size, shares, size=resamples)  # (resamples, 3)
    return (only_a - only_b) / size, *percentiles((drawn[:, 0] - drawn[:, 1]) / size, level=level)


def paired(correct_a: ArrayLike, correct_b: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    a, b = np.asarray(correct_a, np.bool_), np.asarray(correct_b, np.bool_)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"expected two lists of hits (N,) on the same images, found shapes {a.shape} and {b.shape}")
    return a, b


def percentiles(means: ArrayLike, *, level: float) -> tuple[float, float]:
    low, high = np.quantile(np.asarray(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
