"""Run directories made without training, for what reads them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.config import Config
from vitcli.config_file import dump_config
from vitcli.data.protocol import Source
from vitcli.data.shapes import ShapesSource
from vitcli.data.sources import open_source
from vitcli.model_config import resolve_model
from vitcli.predictions import VAL_PREDICTIONS, Predictions, save_predictions

STEPS = 100


def make_run(
    path: Path,
    *,
    accuracy: float = 0.7,
    seed: int = 0,
    source: str = "shapes",
    classes: Sequence[str] | None = None,
    finished: bool = True,
    predictions: bool = True,
    rows: bool = True,
    train: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
) -> Path:
    """Write a run whose model is right in about `accuracy` of the images, by chance; the same seed makes the same mistakes.

    Without `rows` nothing was logged, so there are no curves to draw, which takes a while.
    """
    config = Config.model_validate(
        {
            "out": str(path),
            "model": {"patch_size": 8, "width": 32, "depth": 1, "num_heads": 2},
            "data": {
                "source": source,
                "image_size": 16,
                "shapes": {"classes": 6, "train_examples": 60, "val_examples": 240},
                **(data or {}),
            },
            "train": {"steps": STEPS, "batch_size": 8, "micro_batch_size": 8, "eval_batch_size": 8, **(train or {})},
            "optim": {"warmup_steps": 5, **(optim or {})},
        }
    )
    config = config.model_copy(update={"model": resolve_model(config.model)})
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(config))
    images = open_source(source, split="val", data=config.data)
    names = list(classes or images.classes)
    found = answers(images, num_classes=len(names), accuracy=accuracy, seed=seed)
    if predictions:
        about = {
            "dataset": source,
            "fingerprint": images.fingerprint,
            "classes": names,
            "checkpoint": f"checkpoints/step_{STEPS:08d}/model.safetensors",
            "step": STEPS,
        }
        save_predictions(path / VAL_PREDICTIONS, found, about=about)
    correct = int(found.correct.sum())
    numbers = {"loss": float(found.losses.mean()), "top1": correct / len(found), "top5": float((found.ranks < 5).mean())}
    logged: list[dict[str, Any]] = []
    for step in range(10, STEPS + 1 if finished else STEPS // 2, 10) if rows else ():
        common = {
            "step": step,
            "lr": 1e-3 * (1 - step / STEPS),
            "gradient_norm": 1.0,
            "seconds": 0.5,
            "images_per_second": 160.0,
        }
        logged.append({"kind": "train", "loss": 2.0 - step / STEPS, "accuracy": step / STEPS / 2, **common})
        logged.append({"kind": "eval", **numbers, "top1": numbers["top1"] * step / STEPS, "step": step, "seconds": 0.1})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    requested = config.model_dump(mode="json") | {"optim": {**config.optim.model_dump(mode="json"), "warmup_steps": None}}
    manifest = {
        "command": ["vit", "pretrain", "--config", "a file.yaml"],
        "started": "2026-01-01T00:00:00+00:00",
        "versions": {"python": "3.11", "torch": "2"},
        "git_revision": "abc-dirty",
        "hardware": {"device": "a processor", "cpu_cores": 2},
        "data": {"source": source, "train": "t", "val": images.fingerprint},
        "requested": requested,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    if finished:
        support = np.bincount(found.labels, minlength=len(names))
        right = np.bincount(found.labels[found.correct], minlength=len(names))
        per_class = [
            {"class": name, "accuracy": r / n if n else None, "correct": r, "examples": n}
            for name, r, n in zip(names, right.tolist(), support.tolist(), strict=True)
        ]
        counted = {"correct": correct, "correct_top5": int((found.ranks < 5).sum()), "examples": len(found)}
        summary = {"step": STEPS, "train_seconds": 5.0, **numbers, **counted, "per_class": per_class}
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def answers(images: Source, *, num_classes: int, accuracy: float, seed: int) -> Predictions:
    """Answer every image of a source, rightly with a probability of `accuracy`."""
    generator = np.random.default_rng(seed)
    count = len(images)
    if isinstance(images, ShapesSource):
        labels = images.label_of(np.arange(count))
    else:
        labels = np.asarray(images.labels, np.int64)
    logits = generator.normal(size=(count, num_classes))
    wrong = (labels + generator.integers(1, num_classes, count)) % num_classes
    first = np.where(generator.random(count) < accuracy, labels, wrong)
    logits[np.arange(count), first] = logits.max(1) + generator.random(count) * 3
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    top = min(5, num_classes)
    return Predictions(
        indices=np.arange(count),
        labels=labels,
        ranks=np.argmax(order == labels[:, None], axis=1).astype(np.int32),
        losses=-np.log(probabilities[np.arange(count), labels]).astype(np.float32),
        top_classes=order[:, :top].astype(np.int32),
        top_probabilities=np.take_along_axis(probabilities, order[:, :top], axis=1).astype(np.float32),
    )
