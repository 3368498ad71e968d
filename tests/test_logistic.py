"""Logistic regression against scikit-learn's, and the choice of its L2."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from vitcli import logistic
from vitcli.data.subset import held_out
from vitcli.logistic import fit_logistic, linear_probe

CPU = torch.device("cpu")


def problem(images: int = 400, *, noise: float = 1.0, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 4, images)
    centres = np.random.default_rng(99).normal(size=(4, 12))
    features = 2.0 + centres[labels] + noise * chance.normal(size=(images, 12)) * np.linspace(0.1, 3, 12)
    return features.astype(np.float32), labels


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_weights_equal_scikit_learns(l2: float) -> None:
    features, labels = problem()
    X = features.astype(np.float64)
    X = (X - X.mean(0)) / X.std(0)
    found = fit_logistic(torch.from_numpy(X), torch.from_numpy(labels), num_classes=4, l2=l2)
    judge = LogisticRegression(C=1 / (len(X) * l2), tol=1e-9, max_iter=10_000).fit(X, labels)
    assert found.converged
    weights = found.weights.numpy()
    near = max(2e-4, 2 * np.sqrt(weights.size) * logistic.LARGEST_GRADIENT / l2)  # what a gradient that small leaves open
    np.testing.assert_allclose(weights[:-1], judge.coef_.T, atol=near)
    # the bias is free up to a number that all classes share
    np.testing.assert_allclose(weights[-1] - weights[-1].mean(), judge.intercept_ - judge.intercept_.mean(), atol=near)
    np.testing.assert_array_equal(found.predict(torch.from_numpy(X)), judge.predict(X))
    theirs = np.vstack([judge.coef_.T, judge.intercept_])
    values = [log_loss(labels, softmax(X @ w[:-1] + w[-1], axis=1)) + l2 / 2 * (w[:-1] ** 2).sum() for w in (weights, theirs)]
    assert values[0] == pytest.approx(values[1], abs=1e-8)


def test_a_start_changes_where_a_fit_begins_and_not_where_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem()
    x, y = torch.from_numpy(features).double(), torch.from_numpy(labels)
    x = (x - x.mean(0)) / x.std(0)
    cold = fit_logistic(x, y, num_classes=4, l2=1e-3)
    warm = fit_logistic(x, y, num_classes=4, l2=1e-3, start=cold.weights)
    assert warm.iterations < 3 < cold.iterations
    torch.testing.assert_close(warm.weights, cold.weights, atol=1e-4, rtol=0)
    monkeypatch.setattr(logistic, "CHUNK", 4 * 30)  # 30 images at a time
    torch.testing.assert_close(fit_logistic(x, y, num_classes=4, l2=1e-3).weights, cold.weights, atol=1e-4, rtol=0)


def test_a_fit_that_is_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem()
    monkeypatch.setattr(logistic, "MOST_ITERATIONS", 2)
    found = fit_logistic(torch.from_numpy(features).double(), torch.from_numpy(labels), num_classes=4, l2=1e-3)
    assert (found.iterations, found.converged) == (2, False)


def test_the_probe_chooses_l2_on_the_part_it_holds_out_and_fits_everything() -> None:
    features, labels = problem(noise=1.5)
    test, truth = problem(2000, noise=1.5, seed=1)
    found = linear_probe(features, labels, test, num_classes=4, l2=None, device=CPU, name="blobs")
    X = features.astype(np.float64)
    mean, std = X.mean(0), X.std(0) + 1e-5
    X, asked = (X - mean) / std, (test - mean) / std
    dev = held_out(labels, fraction=0.1, name="blobs")

    def judge(l2: float, rows: NDArray[np.bool_]) -> LogisticRegression:
        return LogisticRegression(C=1 / (rows.sum() * l2), tol=1e-9, max_iter=10_000).fit(X[rows], labels[rows])

    assert found.dev_accuracy == pytest.approx(judge(found.l2, ~dev).score(X[dev], labels[dev]), abs=1e-9)
    decades = [judge(l2, ~dev).score(X[dev], labels[dev]) for l2 in logistic.L2_CHOICES]
    assert found.dev_accuracy >= max(decades[:3])
    assert (found.predicted == judge(found.l2, np.ones(len(X), bool)).predict(asked)).mean() > 0.999
    assert found.converged
    assert (found.predicted == truth).mean() > 0.7

    given = linear_probe(features, labels, test, num_classes=4, l2=0.5, device=CPU, name="blobs")
    assert (given.l2, given.dev_accuracy) == (0.5, None)
    assert (given.predicted == judge(0.5, np.ones(len(X), bool)).predict(asked)).mean() > 0.999
