"""The full linear probe: multinomial logistic regression on frozen features, to convergence.

Minimises mean cross-entropy + l2 / 2 |W|^2 in float64 by scipy's L-BFGS-B, with loss and gradient on the model's device; the
bias is not regularised. It is scikit-learn's `LogisticRegression(C=1 / (N l2))`, and runs on a GPU where there is one.

N images, D features, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.data.subset import held_out

__all__ = ["L2_CHOICES", "Logistic", "LinearProbe", "fit_logistic", "linear_probe"]

L2_CHOICES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)  # strongest first: each starts where the last one ended
DEV_FRACTION = 0.1
MOST_ITERATIONS = 1000
LARGEST_GRADIENT = 1e-6  # of any weight, where a fit has converged
CHUNK = 1 << 24  # logits at a time: 128 MiB

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Logistic:
    """A fitted model."""

    weights: Tensor  # (D + 1, K) float64, the bias's last
    iterations: int
    converged: bool

    def predict(self, features: Tensor) -> NDArray[np.int64]:
        """Return the classes (M,) of whitened features (M, D) float64."""
        rows = max(1, CHUNK // self.weights.shape[1])
        parts = [(part @ self.weights[:-1] + self.weights[-1]).argmax(1) for part in features.split(rows)]
        return torch.cat(parts).cpu().numpy()


@dataclass(frozen=True)
class LinearProbe:
    """What a probe found."""

    predicted: NDArray[np.int64]  # (M,) classes of the test images
    l2: float
    dev_accuracy: float | None  # with it, on the held-out part; None where it was not chosen
    iterations: int  # of the last fit, on everything
    converged: bool


def linear_probe(
    train_features: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test_features: NDArray[np.float32],
    *,
    num_classes: int,
    l2: float | None,
    device: torch.device,
    name: str,
) -> LinearProbe:
    """Fit on features (N, D), whitened by their mean and standard deviation, and classify test features (M, D).

    Args:
        l2: None chooses it: on a tenth of every class that is held out, in decades from 1 down to 1e-6, or until two in a
            row are no help, then half a decade to either side; of equal ones the strongest. The final fit is on everything.
        name: of the data, for messages.

    Raises:
        DataError: L2 is to be chosen and every class has a single image.
    """
    known = torch.from_numpy(train_features).to(device).double()
    mean, std = known.mean(0), known.std(0, correction=0) + 1e-5
    known, labels = (known - mean) / std, torch.from_numpy(train_labels).to(device)
    start, dev_accuracy = None, None
    if l2 is None:
        dev = held_out(train_labels, fraction=DEV_FRACTION, name=name)
        l2, dev_accuracy, start = choose_l2(known, labels, torch.from_numpy(dev).to(device), num_classes=num_classes)
    fitted = fit_logistic(known, labels, num_classes=num_classes, l2=l2, start=start)
    asked = (torch.from_numpy(test_features).to(device).double() - mean) / std
    return LinearProbe(fitted.predict(asked), l2, dev_accuracy, fitted.iterations, fitted.converged)


def choose_l2(features: Tensor, labels: Tensor, dev: Tensor, *, num_classes: int) -> tuple[float, float, Tensor]:
    """Return the L2 that classifies the held-out images `dev`, (N,) bool, best, their accuracy with it, and the weights."""
    fit_features, fit_labels = features[~dev], labels[~dev]
    dev_features, truth = features[dev], labels[dev].cpu().numpy()
    found: list[tuple[float, float, Tensor]] = []  # accuracy, L2, weights

    def attempt(l2: float, start: Tensor | None) -> Tensor:
        fitted = fit_logistic(fit_features, fit_labels, num_classes=num_classes, l2=l2, start=start)
        found.append((float((fitted.predict(dev_features) == truth).mean()), l2, fitted.weights))
        return fitted.weights

    def best() -> tuple[float, float, Tensor]:
        return max(found, key=lambda each: each[:2])

    weights = None
    for l2 in L2_CHOICES:
        weights = attempt(l2, weights)
        if len(found) > 2 and max(found[-1][0], found[-2][0]) < best()[0]:  # weak ones take longest
            break
    _, decade, weights = best()
    for l2 in (decade * 10**0.5, decade / 10**0.5):
        attempt(l2, weights)
    accuracy, l2, weights = best()
    return l2, accuracy, weights


def fit_logistic(features: Tensor, labels: Tensor, *, num_classes: int, l2: float, start: Tensor | None = None) -> Logistic:
    """Fit features (N, D) float64 and labels (N,), from `start`, (D + 1, K), or from zeros."""
    from scipy.optimize import minimize  # takes a while, and no training needs it

    shape = (features.shape[1] + 1, num_classes)
    rows = max(1, CHUNK // num_classes)
    parts = list(zip(features.split(rows), labels.split(rows)))

    def objective(flat: Array) -> tuple[float, Array]:
        weights = torch.from_numpy(flat).to(features.device).view(shape)
        gradient, loss = torch.zeros_like(weights), weights.new_zeros(())
        for x, y in parts:
            log_probabilities = (x @ weights[:-1] + weights[-1]).log_softmax(1)  # (n, K)
            loss -= log_probabilities.gather(1, y[:, None]).sum()
            error = log_probabilities.exp_()
            error[torch.arange(len(y), device=y.device), y] -= 1.0
            gradient[:-1] += x.T @ error
            gradient[-1] += error.sum(0)
        loss, gradient = loss / len(labels), gradient / len(labels)
        loss += 0.5 * l2 * weights[:-1].square().sum()
        gradient[:-1] += l2 * weights[:-1]
        return float(loss), gradient.flatten().cpu().numpy()

    first = np.zeros(shape[0] * shape[1]) if start is None else start.flatten().cpu().numpy()
    found = minimize(
        objective,
        first,
        jac=True,
        method="L-BFGS-B",
        # by the gradient alone: a loss that hardly falls says little about how far the weights have to go
        options={"maxiter": MOST_ITERATIONS, "maxfun": 2 * MOST_ITERATIONS, "gtol": LARGEST_GRADIENT, "ftol": 0.0},
    )
    weights = torch.from_numpy(np.asarray(found.x)).to(features.device).view(shape)
    converged = bool(np.abs(found.jac).max() <= 10 * LARGEST_GRADIENT)  # rounding may end the line search just before
    return Logistic(weights, int(found.nit), converged)
