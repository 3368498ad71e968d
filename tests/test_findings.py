"""What is said of answers: the numbers of `metrics`, under the right names, and the mistakes that are surest."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from vitcli.findings import confident_mistakes, findings
from vitcli.metrics import bootstrap_interval, expected_calibration_error
from vitcli.predictions import Predictions, collect_predictions

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def predictions(images: int = 400, *, scale: float = 3.0, keep_logits: bool = True, spoil: int = 0) -> Predictions:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, 6, generator=generator)
    labels = torch.randint(6, (images,), generator=generator)
    logits[torch.arange(images), labels] += 1.0  # so that softmax gives the true probabilities
    logits = torch.cat([scale * logits, torch.full((images, 1), -20.0)], dim=1)  # a class that never is
    logits[:spoil, 0] = torch.nan
    batch = {"labels": labels, "indices": torch.arange(images) * 3}
    return collect_predictions([(batch, logits)], num_classes=7, device=torch.device("cpu"), keep_logits=keep_logits)[1]


def test_scores_and_intervals() -> None:
    kept = predictions()
    found = findings(kept, classes=CLASSES, where="photos/{}.png".format)
    assert found["macro_f1"] == pytest.approx(f1_score(kept.labels, kept.predicted, average="macro"))
    assert found["intervals"]["top1"] == list(bootstrap_interval(kept.correct))
    low, high = found["intervals"]["top1"]
    assert low < accuracy_score(kept.labels, kept.predicted) < high
    low, high = found["intervals"]["loss"]
    assert low < kept.losses.mean() < high
    cat = found["per_class"][2]
    of_cat = kept.labels == 2
    assert cat["class"] == "cat"
    assert (cat["examples"], cat["correct"]) == (of_cat.sum(), (kept.correct & of_cat).sum())
    assert cat["interval"] == list(bootstrap_interval(kept.correct[of_cat]))
    assert found["per_class"][6] == {
        "class": "gnu", "accuracy": None, "interval": [None, None], "correct": 0, "examples": 0, "predicted": 0,
        "precision": None, "f1": None,
    }  # fmt: skip
    json.dumps(found, allow_nan=False)


def test_the_temperature_is_fitted_on_one_half_and_judged_on_the_other() -> None:
    kept = predictions(2000)
    found = findings(kept, classes=CLASSES)["calibration"]
    assert found["ece"] == expected_calibration_error(kept.top_probabilities[:, 0], kept.correct)
    assert (found["fitted_on"], found["judged_on"]) == (1000, 1000)
    assert found["temperature"] == pytest.approx(3.0, rel=0.15)  # by which they were made too sure
    assert found["ece_after"] < 0.5 * found["ece_before"]
    assert sum(row["examples"] for row in found["bins"]) == 2000
    again, other = (findings(kept, classes=CLASSES, seed=seed)["calibration"] for seed in (0, 1))
    assert again == found
    assert other["temperature"] != found["temperature"]
    assert "temperature" not in findings(predictions(keep_logits=False), classes=CLASSES)["calibration"]
    assert "temperature" not in findings(predictions(1), classes=CLASSES)["calibration"]


def test_the_surest_mistakes_come_first() -> None:
    kept = predictions(scale=1.0)
    rows = confident_mistakes(kept, count=10)
    sure = kept.top_probabilities[:, 0]
    wrong = np.flatnonzero(~kept.correct)
    assert sorted(sure[rows], reverse=True) == sure[rows].tolist()
    assert set(rows) <= set(wrong.tolist())
    assert sure[rows].min() >= np.sort(sure[wrong])[-10]
    found = findings(kept, classes=CLASSES, where="photos/{}.png".format, mistakes=10, confused=3)
    first = found["mistakes"][0]
    assert first["index"] == kept.indices[rows[0]] == 3 * rows[0]
    assert first["where"] == f"photos/{3 * rows[0]}.png"
    assert first["label"] == CLASSES[kept.labels[rows[0]]] != first["predicted"]
    assert len(found["mistakes"]) == 10 and len(found["confused"]) == 3
    pair = found["confused"][0]
    cell = (kept.labels == CLASSES.index(pair["label"])) & (kept.predicted == CLASSES.index(pair["predicted"]))
    assert pair["images"] == cell.sum()
    assert len(confident_mistakes(kept, count=10_000)) == len(wrong)
    assert findings(kept, classes=CLASSES, mistakes=0)["mistakes"] == []


def test_equally_sure_mistakes_come_in_the_order_of_the_images() -> None:
    batch = {"labels": torch.full((9,), 1), "indices": torch.arange(9)}
    kept = collect_predictions([(batch, torch.zeros(9, 7))], num_classes=7, device=torch.device("cpu"))[1]
    assert confident_mistakes(kept, count=4) == [0, 1, 2, 3]


def test_answers_that_are_no_numbers_are_no_sure_mistakes_and_spoil_nothing() -> None:
    found: dict[str, Any] = findings(predictions(spoil=30), classes=CLASSES, mistakes=400)
    assert min(row["index"] for row in found["mistakes"]) >= 90
    assert found["intervals"]["loss"] == [None, None]
    assert found["calibration"]["temperature"] == pytest.approx(3.0, rel=0.5)
    nothing = findings(predictions(spoil=400), classes=CLASSES)
    assert nothing["macro_f1"] == 0.0 and nothing["calibration"]["ece"] is None
    json.dumps(nothing, allow_nan=False)
