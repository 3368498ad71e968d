"""The statistics of a study against scipy and on planted data: intervals and their coverage, what they cover, and refusals."""

from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from vitcli.study.stats import Curve, Scores, Series, accuracies, contrast, gaps

Floats = NDArray[np.float64]

SIZES = (1_000, 4_000, 16_000, 64_000)


def means_only(rows: list[list[float]], count: int = 10**9) -> Series:
    """Return a series without answers, one row of seeds for each size; of so many images that they do not matter."""
    return [Scores(size, np.array(row), count) for size, row in zip(SIZES, rows)]


def planted(generator: np.random.Generator, expected: Floats, *, seeds: int, images: int, seed_sd: float) -> list[list[Scores]]:
    """Return answers of families, (F, K) expected accuracies: images are easy or hard for all, for a family, or by chance.

    `expected` is exact over other seeds and images; `seed_sd` is that of a seed's expected accuracy.
    """
    for_all, for_family, by_chance = np.sqrt([0.5, 0.2, 0.3])
    easy = for_all * generator.standard_normal(images)
    table = []
    for row in expected:
        mine = easy + for_family * generator.standard_normal(images)
        cells = []
        for size, p in zip(SIZES, row):
            spread = seed_sd / stats.norm.pdf(stats.norm.ppf(p))
            level = stats.norm.ppf(p) * np.sqrt(1 + spread**2) + spread * generator.standard_normal((seeds, 1))
            cells.append(Scores.from_answers(size, level + mine + by_chance * generator.standard_normal((seeds, images)) > 0))
        table.append(cells)
    return table


def ends(curve: Curve) -> tuple[Floats, Floats]:
    return np.array([each.low for each in curve.estimates]), np.array([each.high for each in curve.estimates])


# ---------------------------------------------------------------- against scipy


def test_one_seed_agrees_with_scipys_paired_bootstrap() -> None:
    (a,), (b,) = planted(np.random.default_rng(0), np.array([[0.6], [0.55]]), seeds=1, images=1_500, seed_sd=0.0)
    (found,) = gaps([a], [b], resamples=20_000).estimates
    assert a.answers is not None and b.answers is not None
    theirs = stats.bootstrap(
        (a.answers[0].astype(float) - b.answers[0],),
        np.mean,
        n_resamples=2_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.value == pytest.approx(a.mean - b.mean)
    np.testing.assert_allclose((found.low, found.high), (theirs.low, theirs.high), atol=0.07 * width)
    unpaired = gaps([Scores(1_000, a.means, 1_500)], [Scores(1_000, b.means, 1_500)]).estimates[0]
    assert unpaired.high - unpaired.low > 1.15 * width  # the negative control: pairing is seen


def test_seed_means_at_one_size_agree_with_scipys_welch_interval() -> None:
    a, b = [0.61, 0.63, 0.605, 0.64], [0.58, 0.582, 0.575]
    (found,) = gaps(means_only([a]), means_only([b]), resamples=20_000).estimates
    theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), (theirs.low, theirs.high), atol=0.03 * (theirs.high - theirs.low))
    assert found.seed_sd == pytest.approx((np.std(a, ddof=1), np.std(b, ddof=1)))


def test_one_family_agrees_with_scipys_t_interval() -> None:
    values = [0.61, 0.63, 0.605]
    (found,) = accuracies(means_only([values]), resamples=20_000).estimates
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), (theirs.low, theirs.high), atol=0.03 * (theirs.high - theirs.low))


def test_a_pooled_variance_brings_its_degrees_of_freedom() -> None:
    """Equal spread at every size: 4 sizes x 2 degrees, and so much narrower than 3 seeds alone."""
    rows = [[p - 0.01, p, p + 0.01] for p in (0.5, 0.5, 0.5, 0.5)]
    estimate = accuracies(means_only(rows), resamples=20_000).estimates[0]
    half = stats.t.ppf(0.975, 8) * 0.01 / np.sqrt(3)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.03)
    reading = accuracies(means_only(rows), readings=True, resamples=20_000).estimates[0]
    half = stats.t.ppf(0.975, 2 * 2 * 4 / 5) * 0.01 / np.sqrt(3)
    assert (reading.high - reading.low) / 2 == pytest.approx(half, rel=0.04)  # readings of the same runs add fewer degrees


def test_without_answers_images_count_as_independent() -> None:
    (found,) = gaps([Scores(1, np.array([0.6]), 2_000)], [Scores(1, np.array([0.5]), 2_000)], resamples=50_000).estimates
    half = 1.96 * np.sqrt((0.6 * 0.4 + 0.5 * 0.5) / 2_000)
    np.testing.assert_allclose((found.low, found.high), (0.1 - half, 0.1 + half), atol=0.002)


# ---------------------------------------------------------------- what the numbers are of


def test_a_noisier_size_is_not_hidden_by_the_others() -> None:
    quiet = [0.499, 0.5, 0.501]
    curve = accuracies(means_only([quiet, quiet, [0.4, 0.5, 0.6], quiet]))
    low, high = ends(curve)
    widths = high - low
    assert curve.estimates[2].seed_sd == pytest.approx((0.1,))
    assert widths[2] > 1.5 * widths[0] > 0.02  # and the quiet ones are not trusted to be that quiet


def test_seeds_that_agree_by_luck_leave_the_noise_of_their_answers() -> None:
    """Two seeds of equal accuracy, right on different images: their accuracies would differ on other images."""
    half = np.arange(1_000) % 2 == 0
    (found,) = accuracies([Scores.from_answers(1_000, np.stack([half, ~half]))]).estimates
    assert found.seed_sd == pytest.approx((np.sqrt(0.5 / 1_000),))
    assert found.low < 0.46 and found.high > 0.54


def test_what_the_interval_covers() -> None:
    three, one = [[0.5, 0.51, 0.52]] * 2, [[0.6], [0.61]]
    assert {each.covers for each in gaps(means_only(three), means_only(three)).estimates} == {"seeds and images"}
    lacking = gaps(means_only(three), means_only(one)).estimates
    assert {each.covers for each in lacking} == {"images"}
    assert lacking[0].seed_sd[1] is None and lacking[0].seeds == (3, 1)
    mixed = gaps(means_only(three), means_only([[0.6], [0.61, 0.62]])).estimates
    assert {each.covers for each in mixed} == {"seeds and images"}  # the other size knows about seeds


def test_a_difference_of_differences() -> None:
    table = planted(np.random.default_rng(1), np.array([[0.6], [0.7], [0.5], [0.9]]), seeds=3, images=2_000, seed_sd=0.005)
    curve = contrast(table, [1, -1, -1, 1])
    (found,) = curve.estimates
    assert found.value == pytest.approx(sum(w * row[0].mean for w, row in zip((1, -1, -1, 1), table)))
    assert found.sign == 1 and found.low < 0.3 < found.high
    assert asdict(found)["images"] == 2_000
    np.testing.assert_allclose(curve.value_replicates.mean(axis=0), curve.values, atol=1e-12)


def test_errors_are_the_spread_of_the_replicates() -> None:
    table = planted(np.random.default_rng(1), np.array([[0.4, 0.6], [0.5, 0.7]]), seeds=5, images=2_000, seed_sd=0.005)
    curve = gaps(*table, resamples=20_000)
    ratio = curve.replicates.std(axis=0) / curve.errors
    assert ((ratio > 0.98) & (ratio < 1.25)).all()  # t's spread is a little larger


def test_the_same_seed_gives_the_same_numbers() -> None:
    table = planted(np.random.default_rng(1), np.array([[0.4, 0.6], [0.5, 0.7]]), seeds=2, images=500, seed_sd=0.005)
    assert gaps(*table).estimates == gaps(*table).estimates != gaps(*table, seed=1).estimates


def test_only_shared_sizes_count_in_any_order() -> None:
    a = means_only([[0.1, 0.12], [0.2, 0.22], [0.3, 0.32]])
    curve = gaps(a[::-1], means_only([[0.1, 0.12], [0.2, 0.22]]))
    assert curve.sizes == SIZES[:2]
    assert curve.values == pytest.approx([0.0, 0.0])
    assert gaps(a[:1], a[1:]).estimates == ()


def test_replicates_of_readings_keep_the_seeds_correlation() -> None:
    """A seed that is ahead at every reading moves the whole curve; in a grid, sizes are independent."""
    rows = [[0.48, 0.5, 0.52], [0.58, 0.6, 0.62], [0.72, 0.7, 0.68]]
    shared, apart = (accuracies(means_only(rows), readings=readings).replicates[:, 0] for readings in (True, False))
    np.testing.assert_allclose(np.sign(stats.spearmanr(shared).statistic), [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    assert abs(stats.spearmanr(shared).statistic[0, 1]) > 0.99 and abs(stats.spearmanr(apart).statistic[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: contrast([], []), "at least one series"),
        (lambda: contrast([means_only([[0.5]])], [1, -1]), "expected 1 weights, found 2"),
        (lambda: accuracies([*means_only([[0.5]]), *means_only([[0.5]])]), "a size twice"),
        (lambda: Scores(1, np.array([1.2]), 10), "in \\[0, 1\\]"),
        (lambda: Scores(1, np.array([np.nan]), 10), "in \\[0, 1\\]"),
        (lambda: Scores(1, np.array([0.5]), 10, np.zeros((1, 9), bool)), "expected answers"),
        (
            lambda: gaps([Scores.from_answers(1, np.ones((1, 9), bool))], [Scores.from_answers(1, np.ones((1, 8), bool))]),
            "the same images",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------- coverage

GAPS = np.array([[0.30, 0.55, 0.80, 0.95], [0.40, 0.58, 0.78, 0.92]])  # planted accuracies, 4 sizes


def coverage(
    seeds: int, *, studies: int, images: int, seed_sd: float, expected: Floats = GAPS, answers: bool = True
) -> tuple[float, float]:
    """Return in what share of planted studies and sizes the 95 % interval holds the gap, and its mean width over the ideal.

    The ideal is that of somebody who knows how much the measured gap varies from study to study.
    """
    generator = np.random.default_rng(seeds)
    truth = expected[0] - expected[1]
    held, widths, values = [], [], []
    for _ in range(studies):
        table = planted(generator, expected, seeds=seeds, images=images, seed_sd=seed_sd)
        if not answers:
            table = [[Scores(cell.examples, cell.means, cell.count) for cell in row] for row in table]
        curve = gaps(*table, resamples=1_000)
        low, high = ends(curve)
        held.append((low <= truth) & (truth <= high))
        widths.append(high - low)
        values.append(curve.values)
    return float(np.mean(held)), float((np.mean(widths, axis=0) / (2 * 1.96 * np.std(values, axis=0))).mean())


def test_coverage_at_three_seeds_in_short() -> None:
    held, width = coverage(3, studies=30, images=1_000, seed_sd=0.01)
    assert held >= 0.92  # 120 intervals, and those of a study hang together
    assert 1.0 < width < 1.8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "least", "widest"),
    [(2, 0.945, 1.7), (3, 0.945, 1.45), (5, 0.935, 1.45)],
)
@pytest.mark.parametrize(("images", "seed_sd"), [(2_000, 0.003), (2_000, 0.01), (10_000, 0.003), (10_000, 0.01)])
def test_coverage(seeds: int, least: float, widest: float, images: int, seed_sd: float) -> None:
    held, width = coverage(seeds, studies=150, images=images, seed_sd=seed_sd)
    assert least <= held and width <= widest, f"{seeds} seeds: {held:.3f} of the intervals hold the gap, {width:.2f} x ideal"


@pytest.mark.slow
def test_coverage_of_one_seed_is_of_the_images_alone() -> None:
    """Honest where seeds do not differ but by chance, image by image; far too narrow where they do: hence `covers`."""
    (quiet, _), (noisy, _) = (coverage(1, studies=150, images=2_000, seed_sd=sd) for sd in (1e-6, 0.01))
    assert quiet > 0.92 and noisy < 0.85
