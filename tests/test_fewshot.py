"""The closed form against scikit-learn's Ridge, the draw of shots against big_vision's, and the choice of L2."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import Ridge as ScikitRidge

from vitcli.fewshot import L2, L2_CHOICES, choose_l2, decompose, draw_shots, first_shots, ridge

Array = NDArray[np.float64]


def problem(images: int, width: int, classes: int, *, spread: float = 1.0, seed: int = 0) -> tuple[Array, NDArray[np.int64]]:
    """Return features and labels of classes that overlap more the larger the spread."""
    chance = np.random.default_rng(seed)
    labels = chance.permutation(np.arange(images) % classes)
    centres = chance.normal(size=(classes, width))
    return 5.0 + 3.0 * (centres[labels] + spread * chance.normal(size=(images, width))), labels


def scikit(features: Array, labels: NDArray[np.int64], classes: int, l2: float) -> Array:
    """Return weights (D + 1, K) of the same problem by somebody else."""
    mean, std = features.mean(0), features.std(0) + 1e-5
    X = np.column_stack([(features - mean) / std, np.full(len(features), 100.0)])
    fitted = ScikitRidge(alpha=l2, fit_intercept=False, solver="svd").fit(X, 2.0 * np.eye(classes)[labels] - 1.0)
    return fitted.coef_.T


@pytest.mark.parametrize(("images", "width"), [(200, 12), (13, 12), (12, 12), (20, 50), (3, 40)])
@pytest.mark.parametrize("l2", [2.0**-10, 1.0, L2, 2.0**20])
def test_weights_equal_scikit_learns(images: int, width: int, l2: float) -> None:
    features, labels = problem(images, width, 3)
    fitted = ridge(features, labels, num_classes=3, l2=l2)
    expected = scikit(features, labels, 3, l2)
    np.testing.assert_allclose(fitted.weights, expected, atol=1e-8 * max(1.0, np.abs(expected).max()), rtol=0)
    whitened = np.column_stack([(features - features.mean(0)) / (features.std(0) + 1e-5), np.full(images, 100.0)])
    np.testing.assert_allclose(fitted.scores(features), whitened @ expected, atol=1e-8, rtol=1e-8)
    np.testing.assert_array_equal(fitted.predict(features), (whitened @ expected).argmax(1))


def test_one_decomposition_serves_every_l2() -> None:
    features, labels = problem(40, 25, 4)
    prepared = decompose(features, labels, num_classes=4)
    for l2 in (0.5, 64.0):
        np.testing.assert_array_equal(prepared.solve(l2).weights, ridge(features, labels, num_classes=4, l2=l2).weights)


def test_a_feature_that_never_changes_and_a_class_without_images_do_no_harm() -> None:
    features, labels = problem(60, 8, 3)
    features[:, 2] = 7.0
    fitted = ridge(features, labels, num_classes=5)
    assert np.isfinite(fitted.weights).all()
    assert set(fitted.predict(features)) <= {0, 1, 2}
    np.testing.assert_allclose(fitted.weights, scikit(features, labels, 5, L2), atol=1e-8)


def test_features_in_float32_are_computed_with_in_float64() -> None:
    features, labels = problem(90, 30, 3)
    single = features.astype(np.float32)
    found = ridge(single, labels, num_classes=3).weights
    np.testing.assert_array_equal(found, ridge(single.astype(np.float64), labels, num_classes=3).weights)
    assert found.dtype == np.float64


def test_few_classes_are_told_apart_and_shuffled_labels_are_not() -> None:
    features, labels = problem(600, 20, 3, spread=0.5)
    taken = first_shots(draw_shots(labels, num_classes=3, seed=0), 10)
    fitted = ridge(features[taken], labels[taken], num_classes=3)
    assert (fitted.predict(features) == labels).mean() > 0.95
    lost = ridge(features[taken], np.random.default_rng(1).permutation(labels[taken]), num_classes=3)
    assert (lost.predict(features) == labels).mean() < 0.7


def test_prediction_in_pieces_is_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem(50, 6, 3)
    fitted = ridge(features, labels, num_classes=3)
    whole = fitted.predict(features)
    monkeypatch.setattr("vitcli.fewshot.CHUNK_BYTES", 500)
    np.testing.assert_array_equal(fitted.predict(features), whole)
    assert fitted.predict(features[:0]).shape == (0,)


# ---------------------------------------------------------------- shots


@pytest.mark.parametrize("seed", [0, 7])
def test_shots_are_those_of_big_vision(seed: int) -> None:
    labels = np.random.default_rng(3).integers(0, 6, 500)
    chance = np.random.default_rng(seed)
    expected = [chance.permutation(np.where(labels == label)[0]) for label in range(7)]  # class 6 has no images
    drawn = draw_shots(labels, num_classes=7, seed=seed)
    assert len(drawn) == 7
    for found, wanted in zip(drawn, expected):
        np.testing.assert_array_equal(found, wanted)


def test_fewer_shots_are_among_more_and_a_small_class_gives_all_it_has() -> None:
    labels = np.repeat([0, 1, 2], [100, 3, 50])
    drawn = draw_shots(labels, num_classes=3, seed=0)
    one, five = first_shots(drawn, 1), first_shots(drawn, 5)
    assert np.bincount(labels[one]).tolist() == [1, 1, 1]
    assert np.bincount(labels[five]).tolist() == [5, 3, 5]
    assert set(one) <= set(five)
    assert not np.array_equal(five, first_shots(draw_shots(labels, num_classes=3, seed=1), 5))


# ---------------------------------------------------------------- the choice of L2


def test_l2_is_chosen_by_the_shots_alone() -> None:
    """Noise in most features asks for more regularisation than clean ones, and images that are no shots change nothing."""
    chance = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 60)
    drawn = draw_shots(labels, num_classes=4, seed=0)
    chosen = {}
    for name, noise in (("clean", 0.0), ("noisy", 1.5)):
        features = np.eye(4)[labels] + 0.05 * chance.normal(size=(240, 4))
        features = np.column_stack([features, noise * chance.normal(size=(240, 40))])
        chosen[name] = choose_l2(features, drawn, shots=20)
        spoilt = features.copy()
        spoilt[np.setdiff1d(np.arange(240), first_shots(drawn, 20))] = np.nan
        assert choose_l2(spoilt, drawn, shots=20) == chosen[name]
    assert set(chosen.values()) <= set(L2_CHOICES)
    assert chosen["clean"] == L2  # everything is right whatever it is, so it stays
    features = np.column_stack([np.eye(4)[labels] + 0.3 * chance.normal(size=(240, 4)), 3 * chance.normal(size=(240, 60))])
    best = choose_l2(features, drawn, shots=20)
    train, test = first_shots(drawn, 20), np.concatenate([members[20:] for members in drawn])
    accuracies = {
        l2: (ridge(features[train], labels[train], num_classes=4, l2=l2).predict(features[test]) == labels[test]).mean()
        for l2 in L2_CHOICES
    }
    assert accuracies[best] >= max(accuracies.values()) - 0.1
    assert accuracies[best] > min(accuracies.values())


def test_with_nothing_to_hold_out_l2_is_the_usual_one() -> None:
    features, labels = problem(40, 5, 4)
    drawn = draw_shots(labels, num_classes=4, seed=0)
    assert choose_l2(features, drawn, shots=1) == L2
    assert choose_l2(features, [members[:1] for members in drawn], shots=5) == L2  # classes with a single image
