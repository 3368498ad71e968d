"""Power laws against scipy, crossovers that were planted (in range, beyond it, nowhere), and what is said about them."""

from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize

from vitcli.study.crossover import Crossover, crossover, verdict
from vitcli.study.laws import power_laws
from vitcli.study.stats import Curve, Scores, Series, accuracies, gaps

Floats = NDArray[np.float64]

SIZES = np.array([1_000, 2_000, 4_000, 8_000, 16_000, 32_000])
NAMES = {"a": "ViT", "b": "ResNet", "metric": "top-1"}


def series(values: Floats, *, noise: float = 0.004, seeds: int = 3, count: int = 100_000) -> Series:
    """Return seeds evenly around planted accuracies, with `noise` as their standard deviation."""
    away = np.linspace(-1, 1, seeds) if seeds > 1 else np.zeros(1)
    away = noise * away / (away.std(ddof=1) if seeds > 1 else 1)
    return [Scores(int(size), value + away, count) for size, value in zip(SIZES, values)]


def law(a: float, b: float, c: float) -> Floats:
    return 1 - (a * SIZES.astype(float) ** -b + c)


def planted(gap: Floats, **settings) -> Curve:
    """Return the curve of a gap around an accuracy of one half."""
    return gaps(series(0.5 + gap / 2, **settings), series(0.5 - gap / 2, **settings))


def found(curve: Curve) -> tuple[Crossover, str]:
    laws = power_laws(curve)
    crossing = crossover(curve, laws)
    return crossing, verdict(curve, crossing, laws=laws, **NAMES)


# ---------------------------------------------------------------- power laws


@pytest.mark.parametrize("parameters", [(6.0, 0.34, 0.02), (3.0, 0.2, 0.0), (200.0, 1.0, 0.3)])
def test_a_planted_law_is_found(parameters) -> None:
    laws = power_laws(accuracies(series(law(*parameters), noise=0.001)))
    assert laws is not None
    (fitted,) = laws
    np.testing.assert_allclose(fitted.accuracy(SIZES), law(*parameters), atol=1e-4)
    assert fitted.b == pytest.approx(parameters[1], rel=5e-3) and fitted.c == pytest.approx(parameters[2], abs=2e-3)
    assert fitted.misfit < 1e-4 and fitted.sizes == (1_000, 32_000)
    for name, value in zip("abc", parameters):
        low, high = fitted.intervals[name]
        assert low <= value * 1.005 + 1e-3 and value * 0.995 <= high
    below, above = fitted.band([64_000])
    assert below < fitted.accuracy([64_000]) < above


def test_a_fit_agrees_with_scipys_curve_fit() -> None:
    wobble = np.random.default_rng(0).normal(0, 0.005, len(SIZES))
    curve = accuracies(series(law(5.0, 0.3, 0.05) + wobble))
    (fitted,) = power_laws(curve) or ()
    theirs, _ = optimize.curve_fit(
        lambda n, a, b, c: a * (n / 1000) ** -b + c,
        SIZES.astype(float),
        1 - curve.means[0],
        p0=(0.5, 0.3, 0.05),
        sigma=curve.errors[0],
        bounds=([0, 0.01, 0], [np.inf, 3, 1]),
        xtol=1e-14,
        ftol=1e-14,
    )
    expected = theirs[0] * (SIZES / 1000) ** -theirs[1] + theirs[2]
    # weights differ by the excess that the fit adds to the noise, so not to rounding
    np.testing.assert_allclose(1 - fitted.accuracy(SIZES), expected, atol=1e-3)


def test_the_floor_stays_at_zero_where_the_points_bend_the_other_way() -> None:
    bent = 1 - np.exp(-(np.log(SIZES / 500.0) ** 2) / 20)  # falls faster and faster in log-log, as no law with a floor does
    (fitted,) = power_laws(accuracies(series(bent, noise=0.001))) or ()
    assert fitted.c == 0 and fitted.misfit > 0.01  # and it says that it does not fit
    straight = accuracies(series(law(5.0, 0.3, 0.0), noise=0.001))
    (good,) = power_laws(straight) or ()
    width, narrow = (np.ptp(each.band([64_000])) for each in (fitted, good))
    assert width > 3 * narrow


def test_an_error_that_does_not_fall_gives_a_flat_law() -> None:
    (fitted,) = power_laws(accuracies(series(np.linspace(0.6, 0.5, len(SIZES))))) or ()
    assert np.ptp(fitted.accuracy(SIZES)) < 1e-9


def test_two_sizes_make_no_law() -> None:
    assert power_laws(accuracies(series(law(5.0, 0.3, 0.0))[:2])) is None


# ---------------------------------------------------------------- crossovers


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_crossover_is_measured(sign: int) -> None:
    gap = sign * 0.04 * np.log2(SIZES / 5_000)
    crossing, words = found(planted(gap))
    assert crossing.kind == "measured" and crossing.changes == 1
    assert crossing.examples == pytest.approx(5_000, rel=1e-6)
    assert crossing.between == (4_000, 8_000) and crossing.ahead == ("a" if sign > 0 else "b")
    assert crossing.low is not None and crossing.high is not None and 4_000 <= crossing.low < 5_000 < crossing.high <= 8_000
    winner = "ViT" if sign > 0 else "ResNet"
    assert f"Measured crossover: beyond about 5,000 images {winner} is ahead (95 % interval 4," in words
    assert "other training seeds and other evaluation images" in words
    assert f"After 1,000 images ViT is 9.3 points {'behind' if sign > 0 else 'ahead of'} ResNet (95 % interval " in words
    assert "100,000 evaluation images" in words and "3 seeds" in words and "6 sizes from 1,000 to 32,000" in words


def test_an_interval_of_a_crossover_is_the_gaps_over_its_slope() -> None:
    gap = 0.01 * np.log2(SIZES / 5_600)
    curve = planted(gap, noise=0.004)
    crossing, _ = found(curve)
    assert crossing.kind == "measured" and crossing.low is not None and crossing.high is not None
    half = (np.log2(crossing.high) - np.log2(crossing.low)) / 2
    alone = np.mean([each.high - each.low for each in curve.estimates]) / 2 / 0.01  # of one size; of two it is narrower
    assert 0.6 * alone < half < 1.1 * alone


def test_a_change_of_sign_that_noise_may_have_made_is_not_called_measured() -> None:
    crossing, words = found(planted(0.002 * np.log2(SIZES / 5_000)))
    assert crossing.kind == "unsure" and crossing.changes == 0 and crossing.between is None
    assert crossing.examples == pytest.approx(5_000, rel=1e-6) and crossing.ahead == "a"
    assert crossing.low is None and crossing.high is None and crossing.share is not None and 0.2 < crossing.share < 0.9
    assert "Not sure: the mean gap changes sign near 5,000 images in favour of ViT" in words
    assert "below 1,000 to beyond 32,000" in words and "they cannot be told apart" in words


@pytest.mark.parametrize(("shift", "winner"), [(0.05, "ViT"), (-0.05, "ResNet")])
def test_no_crossover_where_one_is_ahead_for_good(shift: float, winner: str) -> None:
    base = law(5.0, 0.3, 0.1)
    crossing, words = found(gaps(series(base + shift / 2), series(base - shift / 2)))
    assert crossing.kind == "none" and crossing.examples is None and crossing.ahead == ("a" if shift > 0 else "b")
    assert f"No crossover between 1,000 and 32,000 images: {winner} is ahead at every size" in words


def test_no_crossover_where_they_are_equal() -> None:
    base = law(5.0, 0.3, 0.1)
    crossing, words = found(gaps(series(base), series(base)))
    assert crossing.kind == "none" and crossing.ahead is None
    assert "neither family can be called better" in words


def test_a_trend_is_extrapolated() -> None:
    """1.5 n^-0.2 + 0.06 and 2.1 n^-0.2: the second overtakes where 0.6 n^-0.2 is 0.06, after 100,000 images."""
    curve = gaps(series(law(2.1, 0.2, 0.0), noise=0.001), series(law(1.5, 0.2, 0.06), noise=0.001))
    crossing, words = found(curve)
    assert crossing.kind == "extrapolated" and crossing.ahead == "a" and crossing.share is not None and crossing.share > 0.9
    assert crossing.examples == pytest.approx(100_000, rel=0.1)
    assert crossing.low is not None and 32_000 <= crossing.low < 100_000
    assert crossing.high is None or crossing.high > 100_000
    assert "No crossover in range. Extrapolated from power laws of the error, ViT is ahead beyond about" in words
    assert "provided that the laws hold that far. They miss the points by 0.0 and 0.0 points." in words
    three = [list(each)[-3:] for each in (series(law(2.1, 0.2, 0.0), noise=0.001), series(law(1.5, 0.2, 0.06), noise=0.001))]
    assert "Three sizes determine such a law exactly, so nothing tests it." in found(gaps(*three))[1]
    assert crossover(curve).kind == "none"  # without laws
    assert crossover(curve, power_laws(curve), horizon=2.0).kind == "none"  # beyond the horizon


def test_noise_widens_an_extrapolation() -> None:
    highs = []
    for noise in (0.0005, 0.01):
        curve = gaps(series(law(2.1, 0.2, 0.0), noise=noise), series(law(1.5, 0.2, 0.06), noise=noise))
        crossing = crossover(curve, power_laws(curve))
        highs.append(np.inf if crossing.high is None else crossing.high)
        assert crossing.kind in ("extrapolated", "none")
    assert highs[1] > 1.5 * highs[0]


def test_of_several_changes_the_last_is_told() -> None:
    crossing, words = found(planted(np.array([-0.05, 0.05, 0.05, -0.05, -0.05, 0.05])))
    assert crossing.kind == "measured" and crossing.changes == 3 and crossing.between == (16_000, 32_000)
    assert "the last of 3 changes of sign" in words


def test_one_seed_says_that_it_speaks_about_images_only() -> None:
    curve = planted(0.04 * np.log2(SIZES / 5_000), seeds=1, count=2_000)
    crossing, words = found(curve)
    assert crossing.kind == "measured"
    assert "one seed only of ViT and of ResNet" in words and "the evaluation images only" in words
    assert "other training seeds and" not in words and ", 1 seed, 2,000 evaluation images" in words


def test_one_size_and_none_at_all() -> None:
    one = gaps(series(law(5.0, 0.3, 0.1))[:1], series(law(5.0, 0.3, 0.2))[:1])
    crossing, words = found(one)
    assert crossing.kind == "none" and crossing.ahead == "a"
    assert words.startswith("ViT against ResNet, top-1, 1,000 images, 3 seeds") and "crossover" not in words
    nothing = gaps(series(law(5.0, 0.3, 0.1))[:1], series(law(5.0, 0.3, 0.2))[1:])
    assert found(nothing)[0].kind == "none" and "no size has results of both yet" in found(nothing)[1]


def test_a_crossover_is_plain_numbers() -> None:
    values = asdict(found(planted(0.04 * np.log2(SIZES / 5_000)))[0]).values()
    assert all(value is None or type(value) in (str, int, float, tuple) for value in values)


def test_laws_of_other_families_are_refused() -> None:
    curve = planted(0.04 * np.log2(SIZES / 5_000))
    with pytest.raises(ValueError, match="2 families"):
        crossover(curve, power_laws(accuracies(series(law(5.0, 0.3, 0.0)))))


# ---------------------------------------------------------------- how often it is right


def drawn(
    generator: np.random.Generator, a: Floats, b: Floats, *, seeds: int = 3, sd: float = 0.005
) -> tuple[Curve, Crossover]:
    """Return a study of planted accuracies, each seed with noise of its own."""
    rows = [[Scores(int(n), p + generator.normal(0, sd, seeds), 10**9) for n, p in zip(SIZES, row)] for row in (a, b)]
    curve = gaps(*rows, resamples=600)
    return curve, crossover(curve, power_laws(curve))


@pytest.mark.slow
def test_intervals_of_crossovers_hold_what_was_planted() -> None:
    generator = np.random.default_rng(0)
    gap = 0.012 * np.log2(SIZES / 6_500)
    inside = [drawn(generator, 0.5 + gap / 2, 0.5 - gap / 2)[1] for _ in range(50)]
    measured = [each for each in inside if each.kind == "measured"]
    assert len(measured) > 44
    assert sum((each.low or 0) <= 6_500 <= (each.high or 0) for each in measured) >= 0.92 * len(measured)
    beyond = [drawn(generator, law(2.1, 0.2, 0.0), law(1.5, 0.2, 0.06))[1] for _ in range(30)]
    told = [each for each in beyond if each.kind == "extrapolated"]
    assert len(told) > 20 and not any(each.kind == "measured" for each in beyond)
    assert sum((each.low or 0) <= 100_000 <= (each.high or np.inf) for each in told) >= 0.9 * len(told)


@pytest.mark.slow
def test_equal_families_hardly_ever_cross_for_sure() -> None:
    generator = np.random.default_rng(0)
    kinds = [drawn(generator, law(5.0, 0.3, 0.1), law(5.0, 0.3, 0.1))[1].kind for _ in range(50)]
    assert kinds.count("measured") <= 3
