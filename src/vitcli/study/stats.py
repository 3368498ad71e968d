"""How sure a study is: accuracies, gaps and other contrasts of families, with intervals over training seeds and images.

The replicates are a parametric bootstrap. Images: normal draws with the covariance that the answers to the same images have.
Seeds: a few make a plain bootstrap too narrow (of 3 seeds it sees two thirds of the variance, and does not know how little it
knows), so their draws are Student's t, with Welch's degrees of freedom and a variance pooled over the study's sizes.
Shapes: `F` series, `K` sizes, `S` seeds, `I` images, `R` replicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vitcli.metrics import LEVEL

__all__ = ["Curve", "Estimate", "Scores", "Series", "accuracies", "contrast", "gaps", "tails"]

Floats = NDArray[np.float64]

RESAMPLES = 4000


@dataclass(frozen=True, eq=False)
class Scores:
    """What the seeds of one family reached at one size, under one variant, by one metric."""

    examples: int
    means: Floats  # (S,) accuracy by seed, in [0, 1]
    count: int  # evaluation images behind each of them
    answers: NDArray[np.bool_] | None = None  # (S, I) right or wrong, the same images in one order in all that is compared

    def __post_init__(self) -> None:
        if self.means.ndim != 1 or not len(self.means) or not ((self.means >= 0) & (self.means <= 1)).all():
            raise ValueError(f"expected accuracies (S,) in [0, 1], found {self.means}")
        if self.answers is not None and self.answers.shape != (len(self.means), self.count):
            raise ValueError(f"expected answers {(len(self.means), self.count)}, found {self.answers.shape}")

    @classmethod
    def from_answers(cls, examples: int, answers: NDArray[np.bool_]) -> "Scores":
        """Take accuracies from answers (S, I)."""
        return cls(examples, answers.mean(axis=1), answers.shape[1], answers)

    @property
    def mean(self) -> float:
        """Return the mean accuracy of the seeds."""
        return float(self.means.mean())

    @property
    def answer_noise(self) -> float:
        """Return the variance of one seed's accuracy that comes from which images it happens to get right, as seeds disagree.

        It is in the differences of the seeds' accuracies anyway. 0 where it is not known.
        """
        seeds = len(self.means)
        if self.answers is None or seeds < 2:
            return 0.0
        shares = self.answers.mean(axis=0)  # (I,)
        return float((shares * (1 - shares)).mean() * seeds / (seeds - 1) / self.count)


Series = Sequence[Scores]  # one family over the sizes


@dataclass(frozen=True)
class Estimate:
    """A contrast at one size and its interval, in shares of 1."""

    examples: int
    value: float
    low: float
    high: float
    seeds: tuple[int, ...]  # of each series
    images: int  # the smallest count
    covers: Literal["images", "seeds and images"]  # what the interval speaks about: images alone where a series has one seed
    seed_sd: tuple[float | None, ...]  # of each series: of one seed's accuracy on these images, as used; None: not known

    @property
    def sign(self) -> int:
        """Tell on which side of zero the whole interval lies: -1, 1, or 0 if it holds zero."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True, eq=False)
class Curve:
    """A contrast over the sizes, and what it is made of."""

    weights: tuple[float, ...]  # (F,)
    estimates: tuple[Estimate, ...]  # (K,) by size, ascending
    means: Floats  # (F, K) accuracy
    errors: Floats  # (F, K) their standard errors
    replicates: Floats  # (R, F, K) of `means`
    level: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the sizes, ascending."""
        return tuple(estimate.examples for estimate in self.estimates)

    @property
    def values(self) -> Floats:
        """Return the contrast, (K,)."""
        return np.asarray(self.weights) @ self.means

    @property
    def value_replicates(self) -> Floats:
        """Return replicates of the contrast, (R, K)."""
        return np.einsum("f,rfk->rk", np.asarray(self.weights), self.replicates)


def accuracies(
    series: Series, *, readings: bool = False, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Curve:
    """Return a family's accuracy at every size; arguments as for `contrast`."""
    return contrast([series], [1.0], readings=readings, level=level, resamples=resamples, seed=seed)


def gaps(
    a: Series, b: Series, *, readings: bool = False, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Curve:
    """Return accuracy of `a` less that of `b` at every size that both have; arguments as for `contrast`."""
    return contrast([a, b], [1.0, -1.0], readings=readings, level=level, resamples=resamples, seed=seed)


def contrast(
    series: Sequence[Series],
    weights: Sequence[float],
    *,
    readings: bool = False,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Curve:
    """Return the weighted sum of accuracies at every size that all series have, with intervals.

    An interval says where the contrast would be over other training seeds and other evaluation images of the same kind. It
    assumes that

    - seeds are independent of each other, also those of different series, and about normal; where seeds are shared, say with
      the order of images, the interval of a gap is too wide rather than too narrow;
    - one seed's variance is, within a series, about the same share of p (1 - p) at every size (p is the accuracy). Each size
      uses the larger of this pooled variance and its own, so that a size that is noisier than the others still shows it;
    - images are independent of each other, some hundreds at least, and neither all right nor all wrong;
    - where no answers are kept, series have nothing to do with each other on an image, which is wider than the truth.

    It does not speak about another set of pretraining images, where all seeds had the same, nor about other settings. A series
    without a second seed at any size adds nothing for its seeds: `covers` is then `images`.

    Args:
        series: F families, or variants of them.
        weights: F numbers.
        readings: the sizes are readings of the same runs (one-pass form). Their seed noise is then not independent from size to
            size: pooling at most doubles the degrees of freedom, and replicates keep its correlation.
        resamples: replicates, rounded up to an even number.
        seed: of the replicates.

    Raises:
        ValueError: no series, a size twice in a series, or answers to different numbers of images.
    """
    sizes, table = aligned(series)
    if len(weights) != len(series):
        raise ValueError(f"expected {len(series)} weights, found {len(weights)}")
    if not sizes:
        empty = np.empty((len(series), 0))
        return Curve(tuple(weights), (), empty, empty, np.empty((resamples, len(series), 0)), level)
    generator = np.random.default_rng(seed)
    factor = np.asarray(weights, np.float64)
    means = np.array([[scores.mean for scores in row] for row in table])  # (F, K)
    seeds = np.array([[len(scores.means) for scores in row] for row in table])  # (F, K)
    known = [seed_variances(row, readings=readings) for row in table]
    spread, freedom = np.array([each[0] for each in known]), np.array([each[1] for each in known])  # (F, K), (F,)
    covariance = image_covariance(table)  # (F * K, F * K)
    half = (resamples + 1) // 2
    draws = normal_draws(covariance, half, generator).reshape(half, *means.shape)
    directions = seed_draws(table, half, generator, readings=readings) * np.sqrt(spread / seeds)  # (R / 2, F, K)
    draws += directions * heavy_tails(factor[:, None] ** 2 * spread / seeds, freedom, half, generator)[:, None, :]
    both = np.stack([draws, -draws], axis=1).reshape(2 * half, *means.shape)  # of opposite sign: less noise for the price
    replicates = np.clip(means + both, 0.0, 1.0)
    errors = np.sqrt(np.diag(covariance).clip(0.0).reshape(means.shape) + spread / seeds)
    values = np.einsum("f,rfk->rk", factor, replicates)
    lows, highs = np.quantile(values, tails(level), axis=0)
    covers: Literal["images", "seeds and images"] = "seeds and images" if freedom[factor != 0].all() else "images"
    estimates = tuple(
        Estimate(
            examples=size,
            value=float(factor @ means[:, k]),
            low=float(lows[k]),
            high=float(highs[k]),
            seeds=tuple(int(number) for number in seeds[:, k]),
            images=min(row[k].count for row in table),
            covers=covers,
            seed_sd=tuple(float(np.sqrt(spread[f, k])) if freedom[f] else None for f in range(len(table))),
        )
        for k, size in enumerate(sizes)
    )
    return Curve(tuple(weights), estimates, means, errors, replicates, level)


def aligned(series: Sequence[Series]) -> tuple[list[int], list[list[Scores]]]:
    """Return the sizes that all series have, ascending, and their scores, F rows of K."""
    if not series:
        raise ValueError("expected at least one series")
    by_size = [{scores.examples: scores for scores in row} for row in series]
    if any(len(known) != len(row) for known, row in zip(by_size, series)):
        raise ValueError("a series has a size twice")
    sizes = sorted(set.intersection(*(set(known) for known in by_size)))
    table = [[known[size] for size in sizes] for known in by_size]
    counts = {scores.count for row in table for scores in row if scores.answers is not None}
    if len(counts) > 1:
        raise ValueError(f"expected answers to the same images, found answers to {sorted(counts)} of them")
    return sizes, table


def tails(level: float) -> tuple[float, float]:
    """Return which quantiles are the ends of an interval."""
    return (1 - level) / 2, (1 + level) / 2


# ---------------------------------------------------------------- images


def image_covariance(table: Sequence[Series]) -> Floats:
    """Return the covariance, (F * K, F * K), that the choice of images gives the mean accuracies.

    Without what comes from seeds disagreeing about an image: the differences of the seeds' accuracies have that already.
    """
    cells = [scores for row in table for scores in row]
    covariance = np.diag([scores.mean * (1 - scores.mean) / scores.count for scores in cells])
    kept = [place for place, scores in enumerate(cells) if scores.answers is not None]
    if kept:
        shares = np.array([answers.mean(axis=0) for place in kept if (answers := cells[place].answers) is not None])  # (C, I)
        noise = [cells[place].answer_noise / len(cells[place].means) for place in kept]
        covariance[np.ix_(kept, kept)] = np.atleast_2d(np.cov(shares)) / shares.shape[1] - np.diag(noise)
    return covariance


def normal_draws(covariance: Floats, draws: int, generator: np.random.Generator) -> Floats:
    """Return normal numbers (draws, n) with a covariance (n, n), estimated by a difference and so perhaps not quite one."""
    values, vectors = np.linalg.eigh(covariance)
    return generator.standard_normal((draws, len(values))) @ (vectors * np.sqrt(values.clip(0.0))).T


# ---------------------------------------------------------------- seeds


def seed_variances(row: Series, *, readings: bool) -> tuple[Floats, float]:
    """Return the variance of one seed's accuracy at each size, (K,), and its degrees of freedom; 0 and zeros if not known."""
    freedom = np.array([len(scores.means) - 1 for scores in row])
    if not freedom.any():
        return np.zeros(len(row)), 0.0
    own = np.array([scores.means.var(ddof=1) if len(scores.means) > 1 else 0.0 for scores in row])
    shares = np.array([(scores.mean * scores.count + 1) / (scores.count + 2) for scores in row])  # off 0 and 1
    binomial = shares * (1 - shares)
    pooled = (freedom * own / binomial).sum() / freedom.sum() * binomial
    least = np.array([scores.answer_noise for scores in row])  # what is there even if the seeds' accuracies agree by luck
    # Of K variances that correlate with r, the mean has K / (1 + (K - 1) r) times the degrees of one: here r is taken as 1/2.
    degrees = freedom.max() * 2 * len(row) / (len(row) + 1) if readings else freedom.sum()
    return np.maximum.reduce([own, pooled, least]), float(degrees)


def seed_draws(table: Sequence[Series], draws: int, generator: np.random.Generator, *, readings: bool) -> Floats:
    """Return standard normal numbers (draws, F, K), of the seeds' part of each replicate.

    Independent, but for readings of the same runs, where they are correlated over the sizes as the seeds' deviations are.
    """
    if not readings:
        return generator.standard_normal((draws, len(table), len(table[0])))
    found = np.empty((draws, len(table), len(table[0])))
    for f, row in enumerate(table):
        most = max(len(scores.means) for scores in row)
        shared = generator.standard_normal((draws, most))
        for k, scores in enumerate(row):
            away = scores.means - scores.mean
            if not away.any():
                away = np.ones(len(away))
            found[:, f, k] = shared[:, : len(away)] @ (away / np.linalg.norm(away))
    return found


def heavy_tails(variances: Floats, freedom: Floats, draws: int, generator: np.random.Generator) -> Floats:
    """Return factors (draws, K) that turn normal numbers into Student's t: the seeds' variance is itself known from few seeds.

    Args:
        variances: (F, K) parts of the contrast's variance that seeds make.
        freedom: (F,) degrees of freedom of each part; Welch (1947) and Satterthwaite (1946) give those of the sum.
    """
    known = freedom > 0
    total, squares = variances.sum(axis=0), (variances[known] ** 2 / freedom[known, None]).sum(axis=0)  # (K,)
    ratio = np.divide(total**2, squares, out=np.full(total.shape, np.inf), where=squares > 0)
    # One draw for all sizes: where their variance is pooled, it is too small at all of them or at none.
    chance = generator.uniform(size=draws)[:, None]
    finite = np.where(np.isfinite(ratio), ratio, 1.0)
    factors = np.sqrt(finite / stats.chi2.ppf(chance, finite))
    return np.where(np.isfinite(ratio), factors, 1.0)
