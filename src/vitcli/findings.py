"""What a model's answers say: intervals, scores per class, calibration, what it confuses and where it is surely wrong.

Everything here is computed from stored predictions, so `vit eval` and reports give the same numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from vitcli.logs import finite
from vitcli.metrics import (
    LEVEL,
    bootstrap_interval,
    class_scores,
    confidences_at,
    expected_calibration_error,
    fit_temperature,
    most_confused,
    reliability,
    share_interval,
)
from vitcli.predictions import Predictions
from vitcli.randomness import derive_seed

__all__ = ["BINS", "calibration", "confident_mistakes", "findings"]

BINS = 15  # of the calibration table, as in Guo et al. 2017
MOST_FITTED = 20_000  # images a temperature is fitted on: more do not change one number


def findings(
    predictions: Predictions,
    *,
    classes: Sequence[str],
    loss: Literal["softmax", "sigmoid"] = "softmax",
    where: Callable[[int], str] | None = None,
    mistakes: int = 5,
    confused: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Return JSON values: `intervals`, `macro_f1`, `per_class`, `calibration`, `confused` and `mistakes`.

    Args:
        classes: (K,) the names of the model's outputs.
        where: says where the image of an index lies.
        mistakes, confused: how many of each.
        seed: of what is drawn: resamples, and the half that a temperature is fitted on.
    """
    num_classes = len(classes)
    top = predictions.top_classes.shape[1]
    scores = class_scores(predictions.labels, predictions.predicted, num_classes=num_classes)
    lows, highs = share_interval(scores.right, scores.support)
    found = {
        "intervals": {
            "level": LEVEL,
            "method": "percentile bootstrap over the images",
            "top1": list(bootstrap_interval(predictions.correct)),
            "top5": list(bootstrap_interval(predictions.ranks < top)),
            "loss": list(bootstrap_interval(predictions.losses, seed=derive_seed("bootstrap", seed))),
        },
        "macro_f1": scores.macro_f1,
        "per_class": [
            {
                "class": name,
                "accuracy": float(scores.recall[number]),
                "interval": [float(lows[number]), float(highs[number])],
                "correct": int(scores.right[number]),
                "examples": int(scores.support[number]),
                "predicted": int(scores.predicted[number]),
                "precision": float(scores.precision[number]),
                "f1": float(scores.f1[number]),
            }
            for number, name in enumerate(classes)
        ],
        "calibration": calibration(predictions, loss=loss, seed=seed),
        "confused": [
            {"label": classes[label], "predicted": classes[guess], "images": images, "of": int(scores.support[label])}
            for label, guess, images in most_confused(
                predictions.labels, predictions.predicted, num_classes=num_classes, count=confused
            )
        ],
        "mistakes": [
            {
                "index": int(predictions.indices[row]),
                **({} if where is None else {"where": where(int(predictions.indices[row]))}),
                "label": classes[predictions.labels[row]],
                "predicted": classes[predictions.predicted[row]],
                "confidence": float(predictions.top_probabilities[row, 0]),
                "rank": int(predictions.ranks[row]),
            }
            for row in confident_mistakes(predictions, count=mistakes)
        ],
    }
    return dict(finite(found))


def confident_mistakes(predictions: Predictions, *, count: int) -> list[int]:
    """Return the rows of the wrong first guesses with the highest probability, the highest first."""
    wrong = np.flatnonzero(~predictions.correct & (predictions.predicted >= 0))
    order = np.argsort(-predictions.top_probabilities[wrong, 0], kind="stable")
    return [int(row) for row in wrong[order[:count]]]


def calibration(predictions: Predictions, *, loss: Literal["softmax", "sigmoid"] = "softmax", seed: int = 0) -> dict[str, Any]:
    """Return JSON values: the expected calibration error, its table, and, where logits are kept, what a temperature does to it.

    The temperature is fitted on a seeded half of the images and judged on the other, before and after.
    """
    table = reliability(predictions.top_probabilities[:, 0], predictions.correct, bins=BINS)
    found: dict[str, Any] = {
        "ece": table.ece,
        "bins": [
            {
                "low": float(table.edges[number]),
                "high": float(table.edges[number + 1]),
                "examples": int(table.counts[number]),
                "confidence": float(table.confidence[number]),
                "accuracy": float(table.accuracy[number]),
            }
            for number in range(BINS)
        ],
    }
    if predictions.logits is None or len(predictions) < 2:
        return found
    order = np.random.default_rng(derive_seed("calibration", seed)).permutation(len(predictions))
    half = len(order) // 2
    fitted, judged = np.sort(order[:half][:MOST_FITTED]), np.sort(order[half:])
    temperature = fit_temperature(predictions.logits[fitted], predictions.labels[fitted], loss=loss)
    if math.isnan(temperature):
        return found
    logits, right = predictions.logits[judged], predictions.correct[judged]
    before, after = (
        expected_calibration_error(confidences_at(logits, temperature=each, loss=loss), right, bins=BINS)
        for each in (1.0, temperature)
    )
    return {
        **found,
        "temperature": temperature,
        "ece_before": before,
        "ece_after": after,
        "fitted_on": len(fitted),
        "judged_on": len(judged),
    }
