"""Metrics against scikit-learn and scipy, and what cannot be divided."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import f1_score, log_loss, precision_recall_fscore_support

from vitcli.metrics import (
    bootstrap_interval,
    class_scores,
    confidences_at,
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    mcnemar,
    most_confused,
    paired_bootstrap,
    reliability,
    share_interval,
)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def answers(images: int = 500, classes: int = 7, seed: int = 0) -> tuple[Ints, Ints]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    guesses = np.where(generator.random(images) < 0.6, labels, generator.integers(0, classes, images))
    return labels, guesses


def logits_and_labels(images: int = 400, classes: int = 6, seed: int = 0) -> tuple[Floats, Ints]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    logits = generator.normal(size=(images, classes))
    logits[np.arange(images), labels] += 1.5
    return logits, labels


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


# ---------------------------------------------------------------- confusion


def test_confusion_and_scores_agree_with_scikit_learn() -> None:
    labels, guesses = answers()
    every = np.arange(7)
    np.testing.assert_array_equal(confusion_matrix(labels, guesses, num_classes=7), sklearn_confusion(labels, guesses))
    scores = class_scores(labels, guesses, num_classes=7)
    precision, recall, f1, support = precision_recall_fscore_support(labels, guesses, labels=every)
    np.testing.assert_allclose(scores.precision, precision, rtol=1e-15)
    np.testing.assert_allclose(scores.recall, recall, rtol=1e-15)
    np.testing.assert_allclose(scores.f1, f1, rtol=1e-15)
    np.testing.assert_array_equal(scores.support, support)
    assert scores.macro_f1 == pytest.approx(f1_score(labels, guesses, average="macro"), rel=1e-15)


def test_classes_without_images_and_images_without_an_answer() -> None:
    labels = np.array([0, 0, 1, 1, 4])
    guesses = np.array([0, -1, 1, 2, 1])  # the second has no answer; 3 occurs nowhere; 2 is only predicted; 4 never
    scores = class_scores(labels, guesses, num_classes=5)
    present = [0, 1, 4]
    precision, recall, f1, _ = precision_recall_fscore_support(labels, guesses, labels=present, zero_division=0)
    np.testing.assert_allclose(np.nan_to_num(scores.precision[present]), precision)
    np.testing.assert_allclose(scores.recall[present], recall)
    np.testing.assert_allclose(scores.f1[present], f1)
    assert scores.macro_f1 == pytest.approx(f1_score(labels, guesses, labels=present, average="macro", zero_division=0))
    assert math.isnan(scores.recall[3]) and math.isnan(scores.f1[3]) and scores.f1[2] == 0
    table = confusion_matrix(labels, guesses, num_classes=5)
    assert (table.sum(), table[0].sum()) == (4, 1)
    assert math.isnan(class_scores([], [], num_classes=2).macro_f1)


def test_most_confused_pairs() -> None:
    labels = np.array([0] * 5 + [1] * 5 + [2] * 5)
    guesses = np.array([1, 1, 1, 0, 0, 1, 1, 1, 2, -1, 0, 0, 0, 2, 2])
    assert most_confused(labels, guesses, num_classes=3, count=2) == [(0, 1, 3), (2, 0, 3)]
    assert most_confused(labels, guesses, num_classes=3, count=9)[2:] == [(1, 2, 1)]
    assert most_confused(labels, labels, num_classes=3, count=9) == []


@pytest.mark.parametrize(("labels", "guesses"), [([3], [0]), ([0], [3]), ([-1], [0]), ([0], [-2]), ([0, 1], [0])])
def test_numbers_that_are_no_classes(labels: list[int], guesses: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        confusion_matrix(labels, guesses, num_classes=3)
    with pytest.raises(ValueError, match="expected"):
        class_scores(labels, guesses, num_classes=3)


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_reliability_agrees_with_scikit_learn(bins: int) -> None:
    generator = np.random.default_rng(1)
    sure = generator.uniform(0.2, 1.0, 2000)
    right = generator.random(2000) < sure**2
    table = reliability(sure, right, bins=bins)
    accuracy, confidence = calibration_curve(right, sure, n_bins=bins)
    filled = table.counts > 0
    np.testing.assert_allclose(table.accuracy[filled], accuracy, rtol=1e-12)
    np.testing.assert_allclose(table.confidence[filled], confidence, rtol=1e-12)
    assert table.counts.sum() == 2000
    expected = sum(abs(a - c) * n for a, c, n in zip(accuracy, confidence, table.counts[filled])) / 2000
    assert table.ece == pytest.approx(expected, rel=1e-12)


def test_ece_of_what_is_known() -> None:
    assert expected_calibration_error([0.8] * 10, [True] * 8 + [False] * 2) == pytest.approx(0.0, abs=1e-15)
    assert expected_calibration_error([1.0] * 4, [True, True, False, False]) == 0.5
    assert expected_calibration_error([0.0, 1.0], [False, True]) == 0.0  # both ends belong to a bin
    assert expected_calibration_error([1.0, np.nan], [True, False]) == 0.0
    assert math.isnan(expected_calibration_error([np.nan], [False]))
    with pytest.raises(ValueError, match="expected confidences"):
        expected_calibration_error([0.5], [True, False])


def test_a_bin_holds_its_upper_edge() -> None:
    assert reliability([0.2, 0.4, 0.41], [True, True, False], bins=5).counts.tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("factor", [0.25, 1.0, 6.0])
def test_the_temperature_is_where_the_loss_is_smallest(factor: float) -> None:
    logits, labels = logits_and_labels()
    logits = logits * factor
    temperature = fit_temperature(logits.astype(np.float32), labels)
    losses = [log_loss(labels, softmax(logits / each)) for each in temperature * np.array([0.97, 1.0, 1.03])]
    assert losses[1] == min(losses)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(factor * fit_temperature(logits / factor, labels), rel=1e-3)


def test_the_temperature_of_a_sigmoid_model_is_that_of_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    logits, labels = logits_and_labels()
    targets = np.eye(6)[labels].ravel()
    fitted = LogisticRegression(C=1e12, fit_intercept=False, tol=1e-10).fit(logits.reshape(-1, 1), targets)
    assert fit_temperature(logits, labels, loss="sigmoid") == pytest.approx(1 / fitted.coef_[0, 0], rel=1e-4)


def test_temperatures_that_are_not_to_be_found() -> None:
    logits, labels = logits_and_labels(50)
    spoilt = logits.copy()
    spoilt[:10] = np.nan
    assert fit_temperature(spoilt, labels) == pytest.approx(fit_temperature(logits[10:], labels[10:]), rel=1e-9)
    spoilt[:] = np.nan
    assert math.isnan(fit_temperature(spoilt, labels))
    perfect = 10 * np.eye(6)[labels]
    assert 0.01 < fit_temperature(perfect, labels) < 0.2  # where the loss is no more than 0 in float64
    restricted = np.concatenate([logits, np.full((50, 1), -np.inf)], axis=1)  # an output that cannot be
    assert fit_temperature(restricted, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-9)


def test_confidences() -> None:
    logits, _ = logits_and_labels()
    np.testing.assert_allclose(confidences_at(logits, temperature=2.0), softmax(logits / 2).max(1), rtol=1e-12)
    expected = 1 / (1 + np.exp(-logits.max(1) / 3))
    np.testing.assert_allclose(confidences_at(logits, temperature=3.0, loss="sigmoid"), expected, rtol=1e-12)


# ---------------------------------------------------------------- intervals and tests


def test_the_interval_of_a_mean_agrees_with_scipy() -> None:
    values = np.random.default_rng(2).exponential(size=300)
    low, high = bootstrap_interval(values, resamples=4000)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=3).confidence_interval
    assert low == pytest.approx(expected.low, abs=0.01)
    assert high == pytest.approx(expected.high, abs=0.01)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


@pytest.mark.parametrize(("right", "of"), [(70, 100), (3, 9), (995, 1000)])
def test_the_interval_of_an_accuracy_agrees_with_scipy(right: int, of: int) -> None:
    hits = np.arange(of) < right
    found = bootstrap_interval(hits)
    expected = stats.bootstrap((hits,), np.mean, method="percentile", n_resamples=9999, rng=0).confidence_interval
    assert found == pytest.approx(tuple(expected), abs=1.01 / of)  # one image more or less
    lows, highs = share_interval([right, 0], [of, 0])
    assert (lows[0], highs[0]) == found
    assert np.isnan([lows[1], highs[1]]).all()


def test_intervals_cover_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    hits = generator.binomial(400, 0.7, 2000)
    lows, highs = share_interval(hits, np.full(2000, 400))
    covered = ((lows <= 0.7) & (highs >= 0.7)).mean()
    assert 0.93 < covered < 0.97
    narrow = share_interval(hits, np.full(2000, 400), level=0.5)
    assert 0.45 < ((narrow[0] <= 0.7) & (narrow[1] >= 0.7)).mean() < 0.58


def test_intervals_at_the_ends() -> None:
    assert bootstrap_interval([1.0] * 20) == (1.0, 1.0)
    assert bootstrap_interval([False] * 20) == (0.0, 0.0)
    assert np.isnan(bootstrap_interval([1.0, np.nan])).all()
    assert np.isnan(bootstrap_interval([1.0, np.inf])).all()
    with pytest.raises(ValueError, match="expected values"):
        bootstrap_interval([])


def test_mcnemar_is_the_exact_binomial_test() -> None:
    a = np.array([True] * 12 + [False] * 3 + [True] * 50 + [False] * 35)
    b = np.array([False] * 12 + [True] * 3 + [True] * 50 + [False] * 35)
    expected = 2 * stats.binom.cdf(3, 15, 0.5)
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-12) == pytest.approx(0.03515625)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar(a, a) == 1.0
    with pytest.raises(ValueError, match="same images"):
        mcnemar(a, b[1:])


def test_the_paired_bootstrap_agrees_with_scipy() -> None:
    generator = np.random.default_rng(4)
    a = generator.random(600) < 0.8
    b = np.where(generator.random(600) < 0.9, a, generator.random(600) < 0.4)
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(a.mean() - b.mean(), abs=1e-15)
    gaps = a.astype(float) - b
    expected = stats.bootstrap((gaps,), np.mean, method="percentile", n_resamples=9999, rng=0).confidence_interval
    assert (low, high) == pytest.approx(tuple(expected), abs=2.01 / 600)
    assert paired_bootstrap(a, a) == (0.0, 0.0, 0.0)
