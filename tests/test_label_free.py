"""The page on pretraining without labels: made from a sweep with planted answers."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitcli.predictions import Predictions, save_predictions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
ABOUT = {"dataset": "made", "fingerprint": "f", "classes": ["a", "b"], "checkpoint": "none", "step": 750}
results: Any = importlib.import_module("label_free_results")


def final(folder: Path, *, right: int, images: int = 400) -> dict[str, Any]:
    """Write a run's answers, the first `right` of them right."""
    ranks = (np.arange(images) >= right).astype(np.int32)
    answers = Predictions(
        indices=np.arange(images),
        labels=np.zeros(images, np.int64),
        ranks=ranks,
        losses=np.ones(images, np.float32),
        top_classes=ranks[:, None].repeat(2, axis=1),
        top_probabilities=np.full((images, 2), 0.5, np.float32),
    )
    (folder / "predictions").mkdir(parents=True)
    save_predictions(folder / "predictions" / "val.safetensors", answers, about=ABOUT)
    return {"run": str(folder), "train_seconds": 36.0, "state": "finished"}


def write_runs(runs: Path, reached: dict[str, int]) -> None:
    swept = [
        {
            "start": start,
            "from_scratch": start == "mae-scratch",
            "train_examples": 1000,
            "dev_examples": 200,
            "test_examples": 400,
            "steps": 750,
            "batch_size": 64,
            "trials": [{"lr": lr, "train_seconds": None} for lr in (3e-4, 1e-3, 3e-3)],
            "lr": 3e-3 if start == "mae-scratch" else 1e-3,
            "finals": [final(runs / start / str(seed), right=right + seed) for seed in range(3)],
        }
        for start, right in reached.items()
    ]
    about = {"hardware": {"device": "a machine, 2 threads"}, "versions": {"torch": "9.9"}, "started": "2026-01-02T03:04:05"}
    (runs / "sweep-1000").mkdir()
    (runs / "sweep-1000" / "sweep.json").write_text(json.dumps({"results": swept, **about}))
    shots = [{"shots": 5, "accuracy_mean": 0.25, "accuracy_std": 0.01}]
    (runs / "probes-mae.json").write_text(json.dumps({"probes": {"fewshot": shots, "linear": {"accuracy": 0.5}}}))


def test_every_start_stands_beside_random_weights(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    write_runs(tmp_path / "runs", {"mae": 240, "mae-scratch": 160, "masked-patch": 161})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- made -->\nold\n<!-- made: end -->\nafter\n")
    rows = results.finetuned(json.loads((tmp_path / "runs" / "sweep-1000" / "sweep.json").read_text()))
    assert [row[0] for row in rows] == ["", "from scratch", "masked-patch", "mae"]
    assert rows[1][2:] == ["", "0.003, the largest"]
    assert rows[2][2].startswith("+0.3 (\N{MINUS SIGN}")  # a single image more is not sure
    assert rows[3][1].startswith("60.2 (") and rows[3][2].startswith("**+20** (") and rows[3][3] == "0.001"
    unfinished = {"results": [{"start": "mae", "train_examples": 5000, "finals": []}]}
    (tmp_path / "runs" / "sweep-5000").mkdir()
    (tmp_path / "runs" / "sweep-5000" / "sweep.json").write_text(json.dumps(unfinished))  # is left out
    sys.argv = ["label_free_results.py", str(tmp_path / "runs"), "--page", str(page)]
    results.main()
    text = page.read_text()
    assert text.startswith("before\n<!-- made -->\n\nFine-tuned with 1,000 labels, 750 steps:") and text.endswith(
        "<!-- made: end -->\nafter\n"
    )
    assert "| mae | 25.0 ± 1.0 | 50.0 |" in text and "0.09 hours of training, a machine; torch 9.9; 2026-01-02." in text
    assert "tried on 800 of the images and judged by the other 200" in text and "old" not in text


def test_runs_that_answered_other_images_are_not_compared(tmp_path: Path) -> None:
    a, b = final(tmp_path / "a", right=3, images=10), final(tmp_path / "b", right=3, images=9)
    with pytest.raises(SystemExit, match="different images"):
        results.answers({"start": "mae", "train_examples": 10, "finals": [a, b]})
