"""A study's folder made without training: what its runs would have left, with planted numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.predictions import VAL_PREDICTIONS, Predictions, reading_file, save_predictions
from vitcli.study.cells import Cell, Stage
from vitcli.study.plan import Study

CLASSES = 4
Accuracy = Callable[[Cell, str], float]  # of a cell by metric; in the one-pass form of the cell's last reading


def make_cell(study: Study, cell: Cell, *, accuracy: Accuracy, images: int = 200, early_stop: bool = False) -> None:
    """Write what a cell's commands write, as far as results are read from it; exactly so many answers are right."""
    places = [(-(-reading // cell.batch_size), reading) for reading in cell.readings] or [(cell.steps, cell.examples)]
    judged = not any(stage.name == "upstream" for stage in cell.stages)
    rows: list[dict[str, Any]] = [{"kind": "train", "step": 1, "loss": 2.0}]
    for place, (step, _) in enumerate(places, 1):
        share = place / len(places)
        found = predictions(accuracy(cell, "upstream") * share, images=images, seed=cell.seed)
        if judged and not cell.trial:
            kept = (reading_file(step),) if cell.readings and step != cell.steps else (VAL_PREDICTIONS, reading_file(step))
            for path in kept if cell.readings else (VAL_PREDICTIONS,):
                write_predictions(cell.run / path, found)
        rows.append({"kind": "eval", "step": step, "loss": 1.0, "top1": float(found.correct.mean()), "top5": 1.0})
        probes = {f"{name}/5shot": accuracy(cell, f"fewshot:{name}:5") * share for name in transfer_sets(study)}
        if not cell.trial and probes:
            rows.append({"kind": "fewshot", "step": step, **probes})
    write(cell.run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "eval", "st')
    step = cell.steps
    summary = {"step": step, "trained_steps": step + (10 if early_stop else 0), "train_seconds": 36.0, "loss": 1.0}
    write_json(cell.run / "summary.json", {**summary, "top1": float(found.correct.mean()), "examples": images})
    hardware = {"device": "a processor", "cpu_cores": 2}
    manifest = {
        "hardware": hardware,
        "git_revision": "abc",
        "versions": {"torch": "2", "python": "3"},
        "data": {"source": "shapes"},
        "requested": study.settings(cell).model_dump(mode="json"),
    }
    write_json(cell.run / "manifest.json", {**manifest, "started": "2026-01-01T00:00:00+00:00"})
    for stage in cell.stages:
        make_stage(cell, stage, accuracy=accuracy, images=images)


def make_stage(cell: Cell, stage: Stage, *, accuracy: Accuracy, images: int) -> None:
    """Write what a stage after the pretraining leaves."""
    name = stage.name.partition("@")[0]
    if name == "upstream":
        write_predictions(stage.done, predictions(accuracy(cell, "upstream"), images=images, seed=cell.seed))
    elif name.startswith("finetune:"):
        write_json(stage.done, {"top1": accuracy(cell, name), "examples": images, "train_seconds": 72.0})
    elif name == "translate":
        rows = [
            {"px": px, "top1": accuracy(cell, f"translate:{px}"), "unchanged": accuracy(cell, f"unchanged:{px}")}
            for px in (1, 2)
        ]
        write_json(stage.done, {"top1": 0.5, "examples": images, "translation": rows})


def transfer_sets(study: Study) -> list[str]:
    return [each.dataset for each in study.config.transfer if each.shots]


def predictions(accuracy: float, *, images: int, seed: int) -> Predictions:
    """Return answers of which `accuracy` are right, which ones by chance."""
    right = np.random.default_rng(seed).permutation(images) < round(accuracy * images)
    labels = np.arange(images) % CLASSES
    first = np.where(right, labels, (labels + 1) % CLASSES)
    guesses = (first[:, None] + np.arange(CLASSES)) % CLASSES
    return Predictions(
        indices=np.arange(images),
        labels=labels,
        ranks=np.where(right, 0, 1).astype(np.int32),
        losses=np.ones(images, np.float32),
        top_classes=guesses.astype(np.int32),
        top_probabilities=np.full((images, CLASSES), 1 / CLASSES, np.float32),
    )


def write_predictions(path: Path, found: Predictions, *, fingerprint: str = "f") -> None:
    about = {"dataset": "shapes", "fingerprint": fingerprint, "classes": list("abcd"), "checkpoint": "c", "step": 1}
    save_predictions(path, found, about=about)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value))
