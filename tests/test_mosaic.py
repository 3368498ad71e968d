"""The corpus of layouts: images are pure functions of (seed, split, index), and only where parts stand tells a class."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vitcli.config import DataConfig
from vitcli.config_file import read_config
from vitcli.data.mosaic import MosaicSource
from vitcli.data.sources import open_source
from vitcli.errors import ConfigError, DataError


def source(**changes: Any) -> MosaicSource:
    settings = dict(classes=10, examples=5000, image_size=(32, 32), seed=0, split="train", grid=4, parts=6, keep=0.5, shift=0)
    return MosaicSource(**{**settings, **changes})


@pytest.mark.parametrize("shift", [0, 3])
def test_an_image_is_the_same_alone_and_in_any_batch(shift: int) -> None:
    corpus = source(shift=shift)
    indices = np.arange(130)
    images, labels = corpus.batch(indices)
    assert images.shape == (130, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    for i in (0, 1, 30, 31, 63, 64, 129):  # around the borders of what is painted together
        image, label = corpus[i]
        assert np.array_equal(image, images[i]) and label == labels[i]
    shuffled = np.random.default_rng(0).permutation(130)
    again, again_labels = corpus.batch(shuffled)
    assert np.array_equal(again, images[shuffled]) and np.array_equal(again_labels, labels[shuffled])
    copy = pickle.loads(pickle.dumps(corpus))
    assert np.array_equal(copy[11][0], images[11])


def test_a_smaller_corpus_is_a_prefix_and_classes_are_balanced() -> None:
    small, large = source(examples=50), source(examples=10_000_000)
    assert np.array_equal(small.batch(np.arange(50))[0], large.batch(np.arange(50))[0])
    assert np.bincount(large.label_of(np.arange(200)), minlength=10).tolist() == [20] * 10


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 1}, {"split": "val"}, {"image_size": (32, 40)}, {"classes": 20}, {"examples": 4999}),
        *({"grid": 2}, {"parts": 7}, {"keep": 0.6}, {"shift": 1}, {"first": 10}),
    ],
)
def test_every_setting_changes_the_fingerprint(change: dict[str, Any]) -> None:
    assert source(**change).fingerprint != source().fingerprint


def test_later_layouts_are_another_task_with_the_same_parts() -> None:
    early, late, both = source(), source(first=10), source(classes=20)
    assert np.array_equal(late.layout_of(np.arange(10)), both.layout_of(np.arange(10, 20)))
    assert late.classes == both.classes[10:] and not set(late.classes) & set(early.classes)
    assert np.array_equal(late.vocabulary.phase, early.vocabulary.phase)
    assert not (late.batch(np.arange(64))[0] == early.batch(np.arange(64))[0]).all(axis=(1, 2, 3)).any()


def test_later_layouts_have_a_name() -> None:
    data = DataConfig.model_validate({"source": "mosaic", "image_size": 32, "mosaic": {"classes": 10}})
    late = open_source("mosaic:10", split="val", data=data)
    assert late.name == "mosaic:10" and late.classes[0] == "layout_00010"
    for wrong in ("mosaic:", "mosaic:-1", "mosaic:1e3", "mosaic:\u0663", "mosaic:1234567"):
        with pytest.raises(DataError, match="mosaic:NUMBER"):
            open_source(wrong, split="val", data=data)


def test_splits_share_layouts_and_no_image() -> None:
    train, val = source(), source(split="val")
    assert np.array_equal(train.layout_of(np.arange(10)), val.layout_of(np.arange(10)))
    assert not np.array_equal(source(seed=1).layout_of(np.arange(10)), train.layout_of(np.arange(10)))
    assert not (train.batch(np.arange(64))[0] == val.batch(np.arange(64))[0]).all(axis=(1, 2, 3)).any()


def test_a_cell_keeps_its_part_as_often_as_is_said() -> None:
    corpus = source(parts=50, keep=0.7)
    labels = corpus.label_of(np.arange(4000))
    cells = np.random.default_rng(0).random((4000, 16, 5))
    kept = (corpus.shown_parts(labels, cells) == corpus.layout_of(labels)).mean()
    assert kept == pytest.approx(0.7 + 0.3 / 50, abs=0.01)


def test_the_layout_moves_as_a_whole_by_up_to_shift() -> None:
    """Without noise and jitter of their own, cells would be equal; here the border rows tell how far a layout has moved."""
    corpus = source(shift=8, keep=1.0)
    offsets = np.array([corpus_offset(corpus, i) for i in range(60)])
    assert offsets.min() == 0 and offsets.max() == 8
    assert abs(offsets.mean() - 4) < 1.0


def corpus_offset(corpus: MosaicSource, index: int) -> int:
    """Return how far down an image's layout lies: where the canvas' first row of cells ends in it."""
    whole = source(shift=8, keep=1.0)
    image = corpus[index][0]
    canvas = painted_canvas(whole, index)
    places = [
        (top, left) for top in range(9) for left in range(9) if np.array_equal(canvas[top : top + 32, left : left + 32], image)
    ]
    assert len(places) == 1
    return 8 - places[0][0]


def painted_canvas(corpus: MosaicSource, index: int) -> NDArray[np.uint8]:
    """Paint all 40 x 40 px, of which an image shows 32 x 32."""
    corpus.shift, corpus.image_size = 0, (40, 40)
    return corpus.paint(np.array([index]), corpus.label_of([index]))[0]


def nearest_mean(train: tuple[NDArray[Any], NDArray[Any]], test: tuple[NDArray[Any], NDArray[Any]]) -> float:
    means = np.stack([train[0][train[1] == k].mean(0) for k in range(10)])
    distances = ((test[0][:, None] - means) ** 2).sum(-1)
    return float((distances.argmin(1) == test[1]).mean())


def test_places_tell_a_class_and_what_is_there_does_not() -> None:
    """Layouts are learned at once from which part lies where, and not at all from how many there are of each part."""
    corpus, counts = source(keep=0.6), {}
    for name, first in (("train", 0), ("test", 2000)):
        labels = corpus.label_of(np.arange(first, first + 2000))
        cells = np.random.default_rng(first).random((2000, 16, 5))
        shown = np.eye(6)[corpus.shown_parts(labels, cells)]  # (N, 16, 6)
        counts[name] = (shown.reshape(2000, -1), labels)
    assert nearest_mean(counts["train"], counts["test"]) > 0.95
    # every class has its parts moved round: the same numbers of each for all
    shuffled = {}
    for name, (shown, labels) in counts.items():
        places = np.random.default_rng(7).permuted(np.tile(np.arange(16), (len(labels), 1)), axis=1)
        shuffled[name] = (np.take_along_axis(shown.reshape(-1, 16, 6), places[:, :, None], 1).reshape(len(labels), -1), labels)
    assert nearest_mean(shuffled["train"], shuffled["test"]) < 0.5


@pytest.mark.parametrize(
    "change", [{"image_size": (30, 32)}, {"grid": 16}, {"shift": 9}, {"shift": -1}, {"image_size": (12, 12)}]
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        source(**change)


CONFIG = """
model: {variant: mu/8}
data: {source: mosaic, image_size: 32, mosaic: {classes: 5, train_examples: 70, val_examples: 20, shift: 2}}
train: {steps: 3, batch_size: 8}
"""


def test_it_is_a_source_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    config, _ = read_config(path, [])
    train, val = (open_source("mosaic", split=split, data=config.data) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (70, 20, 5)
    for words, message in (
        (["data.mosaic.grid=5"], "data.mosaic.grid is 5, but 32 x 32 px"),
        (["data.mosaic.grid=16"], "data.mosaic.grid is 16"),
        (["data.mosaic.shift=9"], "data.mosaic.shift is 9 px, more than a cell of 8 px"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_config(path, words)
