"""Answers kept of every image: the same numbers as an evaluation, and files that are whole or refused."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from vitcli.errors import DataError, UserError
from vitcli.evaluate import evaluate
from vitcli.predictions import Predictions, collect_predictions, load_predictions, save_predictions

CPU = torch.device("cpu")
ABOUT = {
    "dataset": "digits",
    "fingerprint": "abc",
    "classes": list("abcdefg"),
    "checkpoint": "run/model.safetensors",
    "step": 3,
}


def problem(images: int = 90, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(images, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    logits[torch.arange(images), labels] += 1
    return logits, labels


def answered(logits: Tensor, labels: Tensor, size: int = 32) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        yield {"labels": labels[rows], "indices": 2 * torch.arange(len(labels))[rows]}, logits[rows]


def collect(logits: Tensor, labels: Tensor, **how: Any) -> Predictions:
    return collect_predictions(answered(logits, labels), num_classes=logits.shape[1], device=CPU, **how)[1]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("classes", [3, 7])
def test_they_are_what_the_evaluation_counted(loss: Literal["softmax", "sigmoid"], classes: int) -> None:
    logits, labels = problem(classes=classes)
    found, kept = collect_predictions(answered(logits, labels), num_classes=classes, device=CPU, loss=loss, keep_logits=True)
    plain = evaluate(answered(logits, labels), num_classes=classes, device=CPU, loss=loss)
    assert replace(found, seconds=0.0) == replace(plain, seconds=0.0)
    top = min(5, classes)
    assert kept.top_classes.shape == (90, top)
    assert kept.correct.mean() == found.top1
    assert (kept.ranks < top).mean() == found.top5
    assert kept.losses.mean() == pytest.approx(found.loss, rel=1e-6)
    np.testing.assert_array_equal(kept.indices, 2 * np.arange(90))
    np.testing.assert_array_equal(kept.labels, labels)
    np.testing.assert_array_equal(kept.logits, logits)
    order = logits.argsort(1, descending=True)[:, :top]
    np.testing.assert_array_equal(kept.top_classes, order)
    probabilities = logits.softmax(1) if loss == "softmax" else logits.sigmoid()
    np.testing.assert_allclose(kept.top_probabilities, probabilities.gather(1, order), rtol=1e-5)
    rows = np.arange(90)
    places = np.array([np.flatnonzero(np.argsort(-logits[i].numpy()) == int(labels[i]))[0] for i in rows])
    np.testing.assert_array_equal(kept.ranks, places)


def test_ranks_and_guesses_agree_also_where_logits_are_equal() -> None:
    labels = torch.arange(7).repeat(2)
    logits = torch.zeros(14, 7)
    logits[3:5, 2] = -math.inf  # as an output that is not asked about
    kept = collect(logits, labels)
    assert kept.top_classes[0].tolist() == [0, 1, 2, 3, 4]
    assert kept.top_classes[3].tolist() == [0, 1, 3, 4, 5]
    places = (kept.top_classes == kept.labels[:, None]).argmax(1)
    listed = (kept.top_classes == kept.labels[:, None]).any(1)
    np.testing.assert_array_equal(listed, kept.ranks < 5)
    np.testing.assert_array_equal(places[listed], kept.ranks[listed])
    few = torch.full((2, 7), -math.inf)
    few[:, 3:5] = 0
    assert [len(set(row)) for row in collect(few, torch.tensor([3, 4])).top_classes.tolist()] == [5, 5]


def test_logits_that_are_not_numbers_are_no_answer() -> None:
    logits, labels = problem()
    logits[4, 2] = math.nan
    kept = collect(logits, labels)
    assert kept.predicted[4] == -1
    assert not kept.correct[4] and kept.ranks[4] >= 7
    assert np.isnan(kept.top_probabilities[4]).all()
    assert (kept.predicted[5:] >= 0).all()


def test_the_data_sets_classes_become_the_models() -> None:
    logits, labels = problem()
    mapped = collect(logits, labels % 2, class_map=torch.tensor([5, 1]))
    assert set(mapped.labels.tolist()) == {1, 5}


def test_without_images_there_is_nothing() -> None:
    with pytest.raises(DataError, match="no examples"):
        collect(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("keep_logits", [False, True])
def test_a_file_gives_back_what_was_written(tmp_path: Path, keep_logits: bool) -> None:
    kept = collect(*problem(), keep_logits=keep_logits)
    path = tmp_path / "predictions" / "val.safetensors"
    save_predictions(path, kept, about={**ABOUT, "labels": "real.json"})
    again, about = load_predictions(path)
    assert about == {**ABOUT, "labels": "real.json"}
    for name, array in vars(kept).items():
        other = getattr(again, name)
        assert (array is None) == (other is None)
        if array is not None:
            assert array.dtype == other.dtype
            np.testing.assert_array_equal(array, other)
    save_predictions(tmp_path / "other.safetensors", kept, about={**ABOUT, "labels": "real.json"})
    assert (tmp_path / "other.safetensors").read_bytes() == path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["val.safetensors"]


BROKEN: list[tuple[str, Any, str]] = [
    ("labels", np.full(90, 7), "numbers of classes"),
    ("labels", np.full(90, -1), "numbers of classes"),
    ("top_classes", np.full((90, 5), -2, np.int32), "numbers of classes"),
    ("top_classes", np.zeros((90, 4), np.int32), "top_classes is int32 (90, 4)"),
    ("indices", np.zeros(90, np.int64), "not in order"),
    ("indices", np.arange(-1, 89), "not in order"),
    ("ranks", np.full(90, -1, np.int32), "negative rank"),
    ("losses", np.zeros(89, np.float32), "losses is float32 (89,)"),
    ("losses", np.zeros(90, np.float64), "losses is float64"),
    ("logits", np.zeros((90, 6), np.float32), "logits is float32 (90, 6)"),
    ("stranger", np.zeros(1), "stranger"),
]


@pytest.mark.parametrize(("name", "array", "says"), BROKEN)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, name: str, array: Any, says: str) -> None:
    path = tmp_path / "val.safetensors"
    save_predictions(path, collect(*problem()), about=ABOUT)
    save_file({**load_file(path), name: array}, path, {"vit_predictions": json.dumps(ABOUT)})
    with pytest.raises(DataError) as refused:
        load_predictions(path)
    assert says in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "about",
    [
        "[]",
        "{",
        "[" * 100_000,
        json.dumps({**ABOUT, "classes": []}),
        json.dumps({**ABOUT, "classes": [1] * 7}),
        json.dumps({**ABOUT, "step": "3"}),
        json.dumps({**ABOUT, "step": True}),
        json.dumps({key: value for key, value in ABOUT.items() if key != "fingerprint"}),
    ],
)
def test_descriptions_that_say_too_little_are_refused(tmp_path: Path, about: str) -> None:
    path = tmp_path / "val.safetensors"
    save_predictions(path, collect(*problem()), about=ABOUT)
    save_file(load_file(path), path, {"vit_predictions": about})
    with pytest.raises(DataError, match=r"val\.safetensors: no predictions"):
        load_predictions(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "val.safetensors"
    with pytest.raises(DataError, match="no such file"):
        load_predictions(path)
    with pytest.raises(DataError, match="not a plain file"):
        load_predictions(tmp_path)
    save_predictions(path, collect(*problem()), about=ABOUT)
    whole = path.read_bytes()
    for content in (b"", whole[:7], whole[:100], whole[:-1], b"\xff" * 100, b"{}", (10).to_bytes(8, "little") + b"x" * 10):
        path.write_bytes(content)
        with pytest.raises(DataError) as refused:
            load_predictions(path)
        assert "\n" not in str(refused.value)
    save_file({"weights": np.zeros(3)}, path)
    with pytest.raises(DataError, match="no predictions"):
        load_predictions(path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises((UserError, OSError)):
        save_predictions(tmp_path / "taken", collect(*problem()), about=ABOUT)
    assert list((tmp_path / "taken").iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
