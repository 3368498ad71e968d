"""Where one family overtakes another: measured, extrapolated from power laws, or not at all; and the verdict in words.

All of it works on the replicates of a gap (`stats`), so its intervals mean what the gap's do. Shapes: `K` sizes,
`R` replicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vitcli.study.laws import PARAMETERS, PowerLaw
from vitcli.study.stats import Curve, Estimate, tails

__all__ = ["Crossover", "crossover", "verdict"]

Floats = NDArray[np.float64]

HORIZON = 100.0  # times the largest size: as far as a law is followed
STEPS = 200  # on the way there, evenly in log n
LEAST_SHARE = 0.5  # of the replicates must cross, for an extrapolation to be told


@dataclass(frozen=True)
class Crossover:
    """Where the gap `a` less `b` changes its sign.

    measured: an interval on either side of zero, at two sizes; between them the mean gap is interpolated in log n.
    unsure: the mean gap changes sign from the first size to the last, the intervals do not show it.
    extrapolated: the power laws meet beyond the last size. none: none in range, and none that could be extrapolated.
    """

    kind: Literal["measured", "unsure", "extrapolated", "none"]
    examples: float | None = None
    low: float | None = None  # None: not bounded on this side
    high: float | None = None
    between: tuple[int, int] | None = None  # measured: the sizes nearest to it whose intervals have opposite signs
    ahead: Literal["a", "b"] | None = None  # beyond it; of none: at the largest size, None if its interval holds zero
    share: float | None = None  # of replicates that cross; unsure: in the range, extrapolated: within the horizon or before
    changes: int = 0  # of sign between sizes whose intervals do not hold zero; of several the last is described
    horizon: float = HORIZON  # times the largest size


# ---------------------------------------------------------------- crossover


def crossover(curve: Curve, laws: Sequence[PowerLaw] | None = None, *, horizon: float = HORIZON) -> Crossover:
    """Say where a gap (`gaps(a, b)`) changes its sign: measured, else extrapolated from the families' laws, else none.

    Only beyond the largest size is it extrapolated: below the smallest, a power law has no meaning (it passes 1).
    Raises:
        ValueError: laws of another number of series.
    """
    if laws is not None and len(laws) != 2:
        raise ValueError(f"expected the laws of 2 families, found {len(laws)}")
    if not curve.sizes:
        return Crossover("none", horizon=horizon)
    sure = [(place, estimate.sign) for place, estimate in enumerate(curve.estimates) if estimate.sign]
    changes = [(i, j, sign) for (i, before), (j, sign) in pairwise(sure) if before != sign]
    if changes:
        return measured(curve, *changes[-1], changes=len(changes), horizon=horizon)
    first, last = np.sign(curve.values[[0, -1]])
    if first * last < 0:
        return unsure(curve, first, horizon=horizon)
    behind_somewhere = laws is not None and any(sign == last for _, sign in sure)  # or there is no gap that could close
    beyond = extrapolated(curve, laws, last, horizon=horizon) if laws is not None and behind_somewhere else None
    return beyond or Crossover("none", ahead=leader(curve.estimates[-1].sign), horizon=horizon)


def measured(curve: Curve, i: int, j: int, sign: int, *, changes: int, horizon: float) -> Crossover:
    """Describe a change of sign from size i to size j that the intervals show."""
    x = np.log(curve.sizes[i : j + 1])
    where = np.exp(x[0] + held(x, -sign * curve.values[None, i : j + 1])[0])
    drawn = np.exp(x[0] + held(x, -sign * curve.value_replicates[:, i : j + 1]))
    low, high = np.quantile(drawn, tails(curve.level))
    return Crossover(
        "measured",
        float(where),
        float(low),
        float(high),
        (curve.sizes[i], curve.sizes[j]),
        leader(sign),
        None,
        changes,
        horizon,
    )


def unsure(curve: Curve, first: float, *, horizon: float) -> Crossover:
    """Describe a change of sign of the mean gap that the intervals do not show."""
    x = np.log(curve.sizes)
    where = float(np.exp(x[0] + held(x, first * curve.values[None])[0]))
    gap = first * curve.value_replicates  # (R, K)
    drawn = np.exp(x[0] + held(x, gap))
    begins, stays = gap[:, 0] > 0, gap[:, -1] > 0  # as the mean does at first; and still does at last
    drawn[stays], drawn[~begins] = np.inf, -np.inf
    reversed_ones = np.flatnonzero(stays & ~begins)  # say nothing: half of them on either side
    drawn[reversed_ones[::2]] = np.inf
    low, high = ends(drawn, curve.level)
    share = float((begins & ~stays).mean())
    return Crossover("unsure", where, low, high, None, leader(-first), share, 0, horizon)


def extrapolated(curve: Curve, laws: Sequence[PowerLaw], last: float, *, horizon: float) -> Crossover | None:
    """Describe where the laws meet beyond the last size; None if they do not, or not in most replicates."""
    path = curve.sizes[-1] * np.geomspace(1.0, horizon, STEPS)

    def meeting(gap: Floats) -> Floats:  # (R, STEPS) to (R,): -inf is before the last size, inf beyond the horizon
        over = gap <= 0
        found = path[over.argmax(axis=1)]
        return np.where(over[:, 0], -np.inf, np.where(over.any(axis=1), found, np.inf))

    where = float(meeting(last * (laws[0].accuracy(path) - laws[1].accuracy(path))[None])[0])
    drawn = meeting(last * (laws[0].accuracy_replicates(path) - laws[1].accuracy_replicates(path)))
    share = float((drawn < np.inf).mean())
    if where == np.inf or share < LEAST_SHARE:
        return None
    low, high = ends(drawn, curve.level)
    return Crossover("extrapolated", max(where, path[0]), low, high, None, leader(-last), share, 0, horizon)


def held(x: Floats, gap: Floats) -> Floats:
    """Return on what length of the axis x (K,) a gap (R, K), linear between the sizes, is above zero, (R,).

    Of a gap that is positive first and crosses once, that is how far along x it does. Of one that crosses to and fro by noise,
    it is a place in the midst of that.
    """
    left, right = gap[:, :-1], gap[:, 1:]
    rise = np.abs(right - left)
    part = np.divide(np.maximum(left, right), rise, out=np.ones_like(rise), where=rise > 0)  # of a stretch on which it crosses
    inside = np.where((left > 0) & (right > 0), 1.0, np.where((left <= 0) & (right <= 0), 0.0, part.clip(0.0, 1.0)))
    return inside @ np.diff(x)


def leader(sign: float) -> Literal["a", "b"] | None:
    return None if sign == 0 else "a" if sign > 0 else "b"


def ends(drawn: Floats, level: float) -> tuple[float | None, float | None]:
    """Return quantiles of numbers of which some are infinite; None for an infinite one."""
    low, high = np.quantile(drawn, tails(level), method="inverted_cdf")
    return (float(low) if np.isfinite(low) else None), (float(high) if np.isfinite(high) else None)


# ---------------------------------------------------------------- words


def verdict(curve: Curve, crossing: Crossover, *, a: str, b: str, metric: str, laws: Sequence[PowerLaw] | None = None) -> str:
    """Say in one paragraph what was found, at what sizes, and how sure it is.

    Args:
        curve, crossing: `gaps(a, b)` and its crossover.
        a, b: the families' names.
        metric: as a person says it, say "top-1 on the pretraining classes".
        laws: those that `crossing` was made with.
    """
    if not curve.estimates:
        return f"{a} against {b}, {metric}: no size has results of both yet."
    first, last = curve.estimates[0], curve.estimates[-1]
    said = [f"{a} against {b}, {metric}, {basis(curve)}."]
    said.append(f"After {first.examples:,} images {gap_words(first, a, b, curve.level)}.")
    if len(curve.estimates) > 1:
        said.append(f"After {last.examples:,} images {gap_words(last, a, b, curve.level)}.")
        said.append(crossing_words(curve, crossing, a, b, laws))
    said.append(sureness(curve, a, b))
    return " ".join(said)


def basis(curve: Curve) -> str:
    sizes, counts = curve.sizes, [number for estimate in curve.estimates for number in estimate.seeds]
    where = f"{len(sizes)} sizes from {sizes[0]:,} to {sizes[-1]:,} images" if len(sizes) > 1 else f"{sizes[0]:,} images"
    few, many = min(counts), max(counts)
    seeds = f"{few} to {many} seeds" if few < many else f"{few} seed{'s' if few > 1 else ''}"
    return f"{where}, {seeds}, {curve.estimates[0].images:,} evaluation images"


def gap_words(estimate: Estimate, a: str, b: str, level: float) -> str:
    gap, low, high = (100 * number for number in (estimate.value, estimate.low, estimate.high))
    if not estimate.sign:
        interval = f"{100 * level:g} % interval {low:+.1f} to {high:+.1f}"
        return f"they cannot be told apart: {a} less {b} is {gap:+.1f} points ({interval})"
    if estimate.sign < 0:
        gap, low, high = -gap, -high, -low
    side = "ahead of" if estimate.sign > 0 else "behind"
    return f"{a} is {gap:.1f} points {side} {b} ({100 * level:g} % interval {low:.1f} to {high:.1f})"


def crossing_words(curve: Curve, crossing: Crossover, a: str, b: str, laws: Sequence[PowerLaw] | None) -> str:
    ahead = a if crossing.ahead == "a" else b
    interval = f"{100 * curve.level:g} % interval {bounds(curve, crossing)}"
    if crossing.kind == "measured":
        assert crossing.examples is not None and crossing.between is not None
        more = (
            "" if crossing.changes == 1 else f" It is the last of {crossing.changes} changes of sign that the intervals show."
        )
        return (
            f"Measured crossover: beyond about {rounded(crossing.examples)} images {ahead} is ahead ({interval}), "
            f"interpolated between {crossing.between[0]:,} and {crossing.between[1]:,}, where the intervals lie on opposite "
            f"sides of zero.{more}"
        )
    if crossing.kind == "unsure":
        assert crossing.examples is not None and crossing.share is not None
        return (
            f"Not sure: the mean gap changes sign near {rounded(crossing.examples)} images in favour of {ahead} ({interval}), "
            f"but no two intervals lie on opposite sides of zero; {percent(crossing.share)} of the replicates cross in this "
            "range."
        )
    if crossing.kind == "extrapolated":
        assert crossing.examples is not None and crossing.share is not None
        tested = "" if len(curve.sizes) > PARAMETERS else " Three sizes determine such a law exactly, so nothing tests it."
        missed = "" if laws is None or tested else f" They miss the points by {misses(laws)} points."
        return (
            f"No crossover in range. Extrapolated from power laws of the error, {ahead} is ahead beyond about "
            f"{rounded(crossing.examples)} images ({interval}; {percent(crossing.share)} of the replicates get there within "
            f"{crossing.horizon:g} times the largest size), provided that the laws hold that far.{missed}{tested}"
        )
    signs = {estimate.sign for estimate in curve.estimates}
    where = f"between {curve.sizes[0]:,} and {curve.sizes[-1]:,} images"
    none = f"No crossover {where}"
    if signs == {0}:
        return f"{none}: at no size does the interval exclude zero, so neither family can be called better."
    if len(signs) == 1:
        return f"{none}: {a if signs == {1} else b} is ahead at every size, and no crossover can be extrapolated."
    return f"{none} that the intervals show, and none that can be extrapolated; at some sizes they hold zero."


def bounds(curve: Curve, crossing: Crossover) -> str:
    """Say an interval whose ends may be missing."""
    within = crossing.kind == "unsure"
    low = f"below {curve.sizes[0 if within else -1]:,}" if crossing.low is None else rounded(crossing.low)
    far = curve.sizes[-1] * (1.0 if within else crossing.horizon)
    high = f"beyond {rounded(far)}" if crossing.high is None else rounded(crossing.high)
    return f"{low} to {high}"


def sureness(curve: Curve, a: str, b: str) -> str:
    """Say what the intervals speak about."""
    if curve.estimates[0].covers == "seeds and images":
        return "The intervals speak about other training seeds and other evaluation images of the same kind."
    single = [name for name, sd in zip((a, b), curve.estimates[0].seed_sd) if sd is None]
    return (
        f"There is one seed only of {' and of '.join(single)}, so the intervals speak about the evaluation images only: "
        "another training seed may change more than they show."
    )


def misses(laws: Sequence[PowerLaw]) -> str:
    return " and ".join(f"{100 * each.misfit:.1f}" for each in laws)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def rounded(examples: float) -> str:
    """Say a number of images with two digits that count."""
    return f"{float(f'{examples:.1e}'):,.0f}"
