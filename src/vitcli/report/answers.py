"""What a run's answers say, as rows and figures of the page: measures, classes, confusion, calibration, mistakes."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitcli.figures import draw_confusion, draw_reliability, inline_svg, shorten
from vitcli.metrics import confusion_matrix, share_interval
from vitcli.predictions import Predictions
from vitcli.report.pictures import Pictures
from vitcli.report.words import ordinal, percent, shown_interval
from vitcli.run_record import RunRecord

__all__ = [
    "CONFUSED",
    "Answers",
    "calibration",
    "classes",
    "confusion",
    "evaluated",
    "few_images",
    "metrics",
    "mistakes_of",
    "pairs",
]

MOST_CLASSES = 200  # rows of the table of classes
MOST_IN_MATRIX = 1000  # classes; of more a pixel each would not fit on a screen
CONFUSED = 10  # pairs of classes
PAIR_PICTURES = 4  # of each
FEW = 10  # images of a class, below which its accuracy says little


@dataclass(frozen=True)
class Answers:
    """A run's predictions and what they say."""

    predictions: Predictions
    about: Mapping[str, Any]
    found: Mapping[str, Any]  # of `findings`


def evaluated(record: RunRecord, answers: Answers | None) -> str:
    """Say which images and weights the numbers are of."""
    train = record.config.train
    averaged = "" if train.ema_decay is None else f", averaged weights (decay {train.ema_decay:g})"
    if train.ema_share is not None:
        averaged = f", weights averaged over about {100 * train.ema_share:g} % of the run"
    if answers is not None:
        about = answers.about
        return f"{len(answers.predictions):,} images of {about['dataset']}, weights of step {about['step']:,}{averaged}"
    row = record.summary or record.last_eval()
    images = f"{row['examples']:,} images of " if row is not None and "examples" in row else ""
    step = "" if row is None else f", weights of step {row['step']:,}"
    return f"{images}{record.config.data.val_source or record.config.data.source}{step}{averaged}"


def metrics(record: RunRecord, answers: Answers | None) -> list[dict[str, str]]:
    """Return the rows of the table of measures: name, value, interval, meaning."""
    rows = []

    def add(name: str, value: str, interval: Iterable[float | None] | None, meaning: str) -> None:
        rows.append({"name": name, "value": value, "interval": shown_interval(name, interval), "meaning": meaning})

    if answers is None:
        row = record.summary or record.last_eval() or {}
        known = "correct" in row and row.get("examples")
        for key, name in (("top1", "top-1"), ("top5", "top-5"), ("accuracy", "colours"), ("loss", "loss")):
            if isinstance(row.get(key), int | float):
                hits = row.get({"top1": "correct", "top5": "correct_top5"}.get(key, ""))
                interval = share_interval_of(hits, row["examples"]) if known and hits is not None else None
                labels = record.config.objective.needs_labels or key != "loss"
                meaning = MEANINGS[name if labels else "loss without labels"]
                add(name, percent(row[key]) if key != "loss" else f"{row[key]:.4f}", interval, meaning)
        return rows
    predictions, found = answers.predictions, answers.found
    guesses = predictions.top_classes.shape[1]
    add("top-1", percent(float(predictions.correct.mean())), found["intervals"]["top1"], MEANINGS["top-1"])
    if len(answers.about["classes"]) > guesses:
        add("top-5", percent(float((predictions.ranks < guesses).mean())), found["intervals"]["top5"], MEANINGS["top-5"])
    loss = float(predictions.losses.astype(np.float64).mean())
    add("loss", f"{loss:.4f}" if np.isfinite(loss) else "not finite", found["intervals"]["loss"], MEANINGS["loss"])
    if found["macro_f1"] is not None:
        add("macro F1", percent(found["macro_f1"]), None, MEANINGS["macro F1"])
    if found["calibration"]["ece"] is not None:
        add("ECE", percent(found["calibration"]["ece"]), None, MEANINGS["ECE"])
    return rows


MEANINGS = {
    "top-1": "the first guess is right",
    "top-5": "the label is among the first five guesses",
    "colours": "share of hidden patches whose colour is right",
    "loss": "nats per image",
    "loss without labels": "of what is predicted of hidden patches, with the same patches hidden at every evaluation",
    "macro F1": "harmonic mean of precision and recall, averaged over classes",
    "ECE": "expected calibration error: how far confidence and accuracy lie apart",
}


def share_interval_of(hits: int, examples: int) -> tuple[float, float]:
    low, high = share_interval(hits, examples)
    return float(low), float(high)


def few_images(answers: Answers | None) -> list[str]:
    """Return a warning about classes whose accuracy rests on a handful of images."""
    if answers is None:
        return []
    few = [row["class"] for row in answers.found["per_class"] if row["examples"] < FEW]
    if not few:
        return []
    named = ", ".join(shorten(name, 30) for name in few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
    return [f"Fewer than {FEW} evaluation images, so their own accuracies say little: {named}."]


def classes(record: RunRecord, answers: Answers | None) -> dict[str, Any]:
    """Return `classes`, the rows of the table of classes, the worst ones where they are many, and `classes_left_out`."""
    if answers is not None:
        entries = list(answers.found["per_class"])
    else:
        entries = [dict(row) for row in (record.summary or {}).get("per_class", ())]
        for row in entries:
            row["interval"] = share_interval_of(row["correct"], row["examples"]) if row["examples"] else (None, None)
    left_out = max(0, len(entries) - MOST_CLASSES)
    if left_out:
        entries = sorted(entries, key=lambda row: 2.0 if row["accuracy"] is None else row["accuracy"])[:MOST_CLASSES]
    rows = []
    for row in entries:
        low, high = row["interval"]
        band = None
        if row["accuracy"] is not None and low is not None:
            band = {"left": f"{100 * low:.1f}", "width": f"{100 * (high - low):.1f}", "at": f"{100 * row['accuracy']:.1f}"}
        rows.append(
            {
                "name": shorten(str(row.get("class", "")), 60),
                "examples": f"{row['examples']:,}",
                "accuracy": percent(row["accuracy"]),
                "interval": shown_interval("accuracy", (low, high)),
                "band": band,
                "precision": percent(row.get("precision")),
                "f1": percent(row.get("f1")),
            }
        )
    return {"classes": rows, "classes_left_out": left_out}


def confusion(answers: Answers) -> dict[str, Any] | None:
    """Return the confusion matrix as SVG and the width below which it is scrolled, px; None where it has too many cells."""
    names = list(answers.about["classes"])
    if len(names) > MOST_IN_MATRIX:
        return None
    predictions = answers.predictions
    matrix = confusion_matrix(predictions.labels, predictions.predicted, num_classes=len(names))
    figure = draw_confusion(matrix, names)
    least = 0 if len(names) <= 12 else 480 if len(names) <= 20 else 620
    return {
        "svg": inline_svg(figure, name="confusion", description=f"confusion matrix of {len(names)} classes"),
        "least": least,
    }


def pairs(answers: Answers | None, pictures: Pictures | None) -> dict[str, Any]:
    """Return `pairs`, the most frequent mistakes with a few pictures each, and whether there are any pictures."""
    rows: list[dict[str, Any]] = []
    if answers is not None:
        predictions = answers.predictions
        numbers = {name: number for number, name in enumerate(answers.about["classes"])}
        for pair in answers.found["confused"]:
            members = np.flatnonzero(
                (predictions.labels == numbers[pair["label"]]) & (predictions.predicted == numbers[pair["predicted"]])
            )
            indices = predictions.indices[members[:PAIR_PICTURES]].tolist()
            shown = [] if pictures is None else [picture for index in indices if (picture := pictures.small(index))]
            rows.append(
                {
                    "label": shorten(pair["label"]),
                    "predicted": shorten(pair["predicted"]),
                    "count": f"{pair['images']:,}",
                    "share": percent(pair["images"] / pair["of"], digits=1),
                    "pictures": shown,
                }
            )
    return {"pairs": rows, "pairs_pictured": any(row["pictures"] for row in rows)}


def calibration(answers: Answers) -> dict[str, Any] | None:
    """Return the reliability diagram as SVG and a sentence about it."""
    found = answers.found["calibration"]
    if found["ece"] is None:
        return None
    columns = {
        key: np.array([np.nan if part[key] is None else part[key] for part in found["bins"]], dtype=np.float64)
        for key in ("confidence", "accuracy", "examples")
    }
    sure = float(np.nanmean(answers.predictions.top_probabilities[:, 0]))
    right = float(answers.predictions.correct.mean())
    verdict = (
        f"On average it is {percent(sure)} sure of its first guess, and right in {percent(right)}: "
        f"{'too sure of itself' if sure > right else 'not sure enough of itself'} by {abs(sure - right) * 100:.1f} points. "
        f"Expected calibration error {percent(found['ece'])}, in {len(found['bins'])} bins."
    )
    if "temperature" in found:
        verdict += (
            f" Dividing the logits by {found['temperature']:.3g}, fitted on half of the images, changes it on the other half "
            f"from {percent(found['ece_before'])} to {percent(found['ece_after'])}."
        )
    figure = draw_reliability(columns["confidence"], columns["accuracy"], columns["examples"].astype(np.int64))
    return {"svg": inline_svg(figure, name="calibration", description="reliability diagram"), "verdict": verdict}


def mistakes_of(answers: Answers | None, pictures: Pictures | None) -> dict[str, Any]:
    """Return `mistakes`, the most confident ones, with pictures where there are, and `below`, the folder they all lie in."""
    found = [] if answers is None else answers.found["mistakes"]
    places = [] if pictures is None else [pictures.where(mistake["index"]) for mistake in found]
    shared = os.path.commonpath(places) if places and all(map(os.path.isabs, places)) else ""
    below = "" if shared in ("", os.sep) or shared in places else shared
    rows = []
    for number, mistake in enumerate(found):
        index, rank = mistake["index"], mistake["rank"]
        where = "" if not places else os.path.relpath(places[number], below) if below else places[number]
        rows.append(
            {
                "picture": None if pictures is None else pictures.large(index),
                "where": shorten(where, 120),
                "label": shorten(mistake["label"]),
                "predicted": shorten(mistake["predicted"]),
                "confidence": percent(mistake["confidence"], digits=1),
                "own": f"came {ordinal(rank + 1)}" if answers is not None and 0 < rank < len(answers.about["classes"]) else "",
            }
        )
    return {"mistakes": rows, "below": shorten(below, 300)}
