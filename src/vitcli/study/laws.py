"""Power laws of the error against pretraining images, fitted to a study's accuracies and to their replicates.

Their intervals come from the replicates of `stats`. Shapes: `K` sizes, `R` replicates, `G` trial values.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitcli.study.stats import Curve, tails

__all__ = ["PARAMETERS", "PowerLaw", "power_laws"]

Floats = NDArray[np.float64]

PARAMETERS = 3  # of a power law: so many sizes determine one
EXPONENTS = (0.01, 3.0)  # between which one is looked for
MOST_REPLICATES = 2000  # are fitted


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """A family's error, 1 - accuracy, after `n` images: a n^-b + c with a, c >= 0 and b > 0 (Hestness et al., 1712.00409)."""

    a: float
    b: float
    c: float
    intervals: dict[str, tuple[float, float]]  # of each
    misfit: float  # root mean square distance of the points from it, in accuracy
    sizes: tuple[int, int]  # first and last that it was fitted on
    replicates: Floats  # (R, 3): a, b, c
    level: float

    def accuracy(self, examples: ArrayLike) -> Floats:
        """Return the accuracy after `examples` images, (G,) to (G,)."""
        return 1 - law(np.array([self.a, self.b, self.c]), np.asarray(examples, np.float64))

    def accuracy_replicates(self, examples: ArrayLike) -> Floats:
        """Return replicates of it, (G,) to (R, G)."""
        return 1 - law(self.replicates[:, None, :], np.asarray(examples, np.float64))

    def band(self, examples: ArrayLike) -> tuple[Floats, Floats]:
        """Return the ends of its interval, (G,) each."""
        low, high = np.quantile(self.accuracy_replicates(examples), tails(self.level), axis=0)
        return low, high


def power_laws(curve: Curve) -> tuple[PowerLaw, ...] | None:
    """Fit a power law to each series of a curve; None with fewer than 3 sizes.

    Least squares, weighted by the points' variances. Where the points lie farther from the law than their noise explains, the
    excess is added to it, in the weights and in the replicates. That makes the interval honest about a law that holds on
    average, not about one that bends beyond the last size.
    """
    if len(curve.sizes) < PARAMETERS:
        return None
    sizes = np.asarray(curve.sizes, np.float64)
    generator = np.random.default_rng(0)
    found = []
    for means, errors, replicates in zip(curve.means, curve.errors, np.moveaxis(curve.replicates[:MOST_REPLICATES], 1, 0)):
        points = 1 - means  # (K,)
        variances = np.maximum(errors, 1e-4) ** 2  # a point that is always right is not known without end
        first = fit(points[None], sizes, 1 / variances)[0]
        beyond = max(0, len(sizes) - PARAMETERS)
        squares = ((points - law(first, sizes)) ** 2).sum()
        excess = max(0.0, squares / beyond - variances.mean()) if beyond else 0.0
        noisy = 1 - replicates + generator.normal(0.0, np.sqrt(excess), replicates.shape)
        best = fit(points[None], sizes, 1 / (variances + excess))[0]
        drawn = fit(noisy.clip(0.0), sizes, 1 / (variances + excess))  # (R, 3)
        a, b, c = best.tolist()
        ends = np.quantile(drawn, tails(curve.level), axis=0).T.tolist()
        found.append(
            PowerLaw(
                a,
                b,
                c,
                intervals={name: (low, high) for name, (low, high) in zip("abc", ends)},
                misfit=float(np.sqrt(((points - law(best, sizes)) ** 2).mean())),
                sizes=(curve.sizes[0], curve.sizes[-1]),
                replicates=drawn,
                level=curve.level,
            )
        )
    return tuple(found)


def law(parameters: Floats, examples: Floats) -> Floats:
    """Return a n^-b + c; parameters (..., 3), examples broadcast against (...)."""
    a, b, c = np.moveaxis(parameters, -1, 0)
    return a * examples**-b + c


def fit(points: Floats, sizes: Floats, weights: Floats) -> Floats:
    """Return a, b and c, (R, 3), that fit points (R, K) at sizes (K,) best, by weighted least squares.

    For a given b the best a and c have a closed form, so only b is looked for: on a grid, then finer around the best (variable
    projection, Golub and Pereyra 1973). Of thousands of replicates at once, which scipy's optimisers take one at a time.
    """
    unit = float(np.exp(np.log(sizes).mean()))  # keeps the powers near 1
    shares = weights / weights.sum()
    low, high = np.log(EXPONENTS)
    tried = np.linspace(low, high, 24)
    step = tried[1] - tried[0]
    best = tried[solve(points, np.exp(tried)[None], sizes / unit, shares)[2].argmin(axis=1)]  # (R,)
    for _ in range(5):
        near = (best[:, None] + step * np.linspace(-1, 1, 9)).clip(low, high)  # (R, G)
        losses = solve(points, np.exp(near), sizes / unit, shares)[2]
        best = near[np.arange(len(near)), losses.argmin(axis=1)]
        step /= 4
    slope, offset, _ = solve(points, np.exp(best)[:, None], sizes / unit, shares)
    b = np.exp(best)
    return np.stack([slope[:, 0] * unit**b, b, offset[:, 0]], axis=-1)


def solve(points: Floats, exponents: Floats, sizes: Floats, shares: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the best a >= 0 and c >= 0, and the loss, (R, G) each, for exponents (R or 1, G)."""
    x, y = sizes ** -exponents[..., None], points[:, None, :]  # (R, G, K), (R, 1, K)
    mean_x, mean_y = x @ shares, y @ shares
    slope = ((x * y) @ shares - mean_x * mean_y) / ((x * x) @ shares - mean_x**2)
    slope = np.maximum(slope, 0.0)
    offset = mean_y - slope * mean_x
    through_zero = ((x * y) @ shares) / ((x * x) @ shares)
    slope, offset = np.where(offset < 0, through_zero, slope), np.maximum(offset, 0.0)
    return slope, offset, (y - slope[..., None] * x - offset[..., None]) ** 2 @ shares
