"""The embedded corpus: images are pure functions of (seed, split, index), labels are balanced, bad sizes are refused."""

import pickle

import numpy as np
import pytest

from vitcli.data.painting import fractal_noise
from vitcli.data.shapes import ShapesSource


def source(**changes) -> ShapesSource:
    settings = dict(classes=10, examples=5000, image_size=(32, 32), seed=0, split="train")
    return ShapesSource(**{**settings, **changes})


def test_an_image_is_the_same_alone_and_in_any_batch():
    corpus = source()
    indices = np.arange(600)
    images, labels = corpus.batch(indices)
    assert images.shape == (600, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    for i in (0, 1, 30, 31, 255, 256, 599):  # around the borders of what is painted together
        image, label = corpus[i]
        assert np.array_equal(image, images[i]) and label == labels[i] and isinstance(label, int)
    shuffled = np.random.default_rng(0).permutation(600)
    again, again_labels = corpus.batch(shuffled)
    assert np.array_equal(again, images[shuffled]) and np.array_equal(again_labels, labels[shuffled])
    for size in (3, 7, 64):
        assert np.array_equal(corpus.batch(indices[100 : 100 + size])[0], images[100 : 100 + size])


def test_a_repeated_index_repeats_the_image():
    images, _ = source().batch([7, 8, 7])
    assert np.array_equal(images[0], images[2]) and not np.array_equal(images[0], images[1])


def test_a_smaller_corpus_is_a_prefix():
    small, large = source(examples=50), source(examples=10_000_000)
    indices = np.arange(50)
    assert all(np.array_equal(a, b) for a, b in zip(small.batch(indices), large.batch(indices)))
    assert large[9_999_999][0].any()


def test_another_process_makes_the_same_images():
    corpus = source()
    copy = pickle.loads(pickle.dumps(corpus))
    assert np.array_equal(copy[11][0], corpus[11][0]) and np.array_equal(source()[11][0], corpus[11][0])
    assert len(pickle.dumps(corpus)) < 10_000_000


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"split": "val"}, {"image_size": (32, 40)}, {"classes": 20}, {"examples": 4999}]
)
def test_every_setting_changes_the_fingerprint(change):
    assert source(**change).fingerprint != source().fingerprint
    assert source().fingerprint == source().fingerprint


def test_splits_and_seeds_show_other_images():
    ours = source()[0][0]
    assert not np.array_equal(source(split="val")[0][0], ours) and not np.array_equal(source(seed=1)[0][0], ours)


@pytest.mark.parametrize("classes", [2, 10, 97, 21_000])
def test_labels_are_balanced_and_not_in_order(classes):
    corpus = source(classes=classes, examples=classes * 4)
    labels = corpus.label_of(np.arange(classes * 4))
    assert np.array_equal(np.bincount(labels, minlength=classes), np.full(classes, 4))
    if classes > 10:
        blocks = labels.reshape(4, classes)
        assert not any(np.array_equal(blocks[0], block) for block in blocks[1:])
        assert abs(np.corrcoef(np.arange(len(labels)), labels)[0, 1]) < 0.2
        assert len(set(np.diff(labels).tolist())) > classes // 4
    assert len(corpus.classes) == classes == len(set(corpus.classes))


def test_two_classes_do_not_alternate():
    labels = source(classes=2).label_of(np.arange(400))
    assert 50 < (np.diff(labels) == 0).sum() < 150  # half of the 200 borders between blocks


@pytest.mark.parametrize("image_size", [(16, 16), (32, 48), (48, 32), (224, 224), (17, 33)])
def test_sizes(image_size):
    corpus = source(image_size=image_size)
    images, _ = corpus.batch([0, 1, 2])
    assert images.shape == (3, *image_size, 3)
    assert np.array_equal(corpus[1][0], images[1])
    assert images.std() > 20 and 60 < images.mean() < 200


def test_an_image_shows_the_same_scene_at_every_size():
    small = source(image_size=(32, 32)).batch(np.arange(40))[0].astype(float)
    large = source(image_size=(128, 128)).batch(np.arange(40))[0].astype(float)
    shrunk = large.reshape(40, 32, 4, 32, 4, 3).mean((2, 4))
    same = np.median([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, shrunk)])
    other = np.median([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, shrunk[::-1])])
    assert same > 0.75 and other < 0.4


def nearest_mean_accuracy(train: ShapesSource, val: ShapesSource) -> float:
    """Classify small colour thumbnails by the nearest class mean."""

    def thumbnails(corpus: ShapesSource) -> tuple[np.ndarray, np.ndarray]:
        images, labels = corpus.batch(np.arange(len(corpus)))
        return images.reshape(len(images), 4, 8, 4, 8, 3).mean((2, 4)).reshape(len(images), -1), labels

    x, y = thumbnails(train)
    means = np.stack([x[y == k].mean(0) for k in range(10)])
    x, y = thumbnails(val)
    return float((((x[:, None] - means) ** 2).sum(-1).argmin(1) == y).mean())


def test_splits_share_classes_which_pixels_alone_hardly_tell():
    accuracy = nearest_mean_accuracy(source(examples=2000), source(examples=500, split="val"))
    assert 0.15 < accuracy < 0.9  # chance is 0.1: labels mean something, and something is left to learn
    assert nearest_mean_accuracy(source(examples=2000), source(examples=500, split="val", seed=1)) < 0.25  # other classes


def test_a_class_is_the_same_however_many_there_are():
    few, many = source(classes=10), source(classes=1000)
    assert few.class_seed == many.class_seed and few.classes == many.classes[:10]


def test_fractal_noise_repeats_without_a_seam():
    plane = fractal_noise(64, 0)
    step = np.abs(np.diff(plane, axis=0)).max()
    assert np.abs(plane[0] - plane[-1]).max() <= 1.5 * step and np.abs(plane).max() == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"classes": 1}, "classes"),
        ({"classes": 21_001}, "classes"),
        ({"examples": 0}, "examples"),
        ({"image_size": (8, 32)}, "image_size"),
        ({"split": "test"}, "split"),
    ],
)
def test_bad_settings_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        source(**change)


@pytest.mark.parametrize("index", [-1, 5000])
def test_an_index_outside_is_refused(index):
    with pytest.raises(IndexError, match="0 to 4999"):
        source()[index]


def test_an_empty_batch_is_empty():
    images, labels = source().batch([])
    assert images.shape == (0, 32, 32, 3) and labels.shape == (0,)
