"""Mixtures: class lists, locations and batches, against plain concatenation."""

import numpy as np
import pytest
from PIL import Image

from vitcli.config import DataConfig
from vitcli.config_file import read_config
from vitcli.data.mix import MixSource
from vitcli.data.sources import ArraySource, open_source
from vitcli.errors import ConfigError, DataError


def arrays(name: str, classes: list[str], count: int, *, side: int = 4, first: int = 0) -> ArraySource:
    images = np.full((count, side, side, 3), 0, np.uint8) + np.arange(first, first + count, dtype=np.uint8)[:, None, None, None]
    return ArraySource(images, np.arange(count) % len(classes), classes, name=name, fingerprint=f"{name}{count}")


def test_merged_classes_are_joined_by_name() -> None:
    mix = MixSource([arrays("a", ["cat", "dog"], 4), arrays("b", ["owl", "cat"], 6, first=4)], weights=[1, 3], classes="merge")
    assert mix.classes == ["cat", "dog", "owl"]
    assert mix.labels is not None
    assert mix.labels.tolist() == [0, 1, 0, 1, 2, 0, 2, 0, 2, 0]
    assert [mix[i][1] for i in range(10)] == mix.labels.tolist()
    assert [int(mix[i][0][0, 0, 0]) for i in range(10)] == list(range(10))
    assert (mix.where(5), len(mix)) == ("b[1]", 10)
    assert [(group.start, group.stop, group.weight) for group in mix.groups or ()] == [(0, 4, 1), (4, 10, 3)]


def test_classes_kept_apart_carry_their_part() -> None:
    mix = MixSource([arrays("a", ["cat", "dog"], 4), arrays("b", ["owl", "cat"], 6)], weights=[1, 1], classes="apart")
    assert mix.classes == ["a/cat", "a/dog", "b/owl", "b/cat"]
    assert mix.labels is not None
    assert mix.labels.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    with pytest.raises(DataError, match="two have one name"):
        MixSource([arrays("a", ["cat"], 4), arrays("a", ["cat"], 4)], weights=[1, 1], classes="apart")


def test_a_batch_from_several_parts_equals_single_examples() -> None:
    mix = MixSource([arrays("a", ["cat", "dog"], 4), arrays("b", ["owl", "cat"], 6, first=4)], weights=[1, 1], classes="merge")
    assert mix.uniform
    indices = np.array([7, 0, 3, 9, 4])
    images, labels = mix.batch(indices)
    for row, index in enumerate(indices.tolist()):
        assert np.array_equal(images[row], mix[index][0]) and labels[row] == mix[index][1]


def test_parts_of_other_sizes_make_no_uniform_mix() -> None:
    assert not MixSource([arrays("a", ["x"], 2), arrays("b", ["x"], 2, side=6)], weights=[1, 1], classes="merge").uniform


def test_weights_and_parts_are_part_of_the_fingerprint() -> None:
    parts = [arrays("a", ["x"], 2), arrays("b", ["x"], 3)]
    prints = {
        MixSource(parts, weights=[1, 1], classes="merge").fingerprint,
        MixSource(parts, weights=[1, 2], classes="merge").fingerprint,
        MixSource(parts, weights=[1, 1], classes="apart").fingerprint,
        MixSource(parts[::-1], weights=[1, 1], classes="merge").fingerprint,
    }
    assert len(prints) == 4


def test_a_mix_of_folders_opens_by_name(tmp_path) -> None:
    for part, names in (("first", ("ant", "bee")), ("second", ("bee", "cow"))):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (i, 2 * i, 3)).save(tmp_path / part / name / f"{i}.png")
    parts = [{"source": f"folder:{tmp_path / part}", "weight": 2} for part in ("first", "second")]
    data = DataConfig(source="mix", image_size=8, mix=parts)
    train, val = (open_source("mix", split=split, data=data) for split in ("train", "val"))
    assert train.classes == val.classes == ["ant", "bee", "cow"]
    assert (len(train), len(val)) == (12, 4)
    half = open_source("mix", split="train", data=data.model_copy(update={"examples": 6}))
    assert np.bincount(np.asarray(half.labels)).tolist() == [2, 2, 2]
    assert half.groups is not None and half.groups[-1].stop == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "mix"}, "give both or neither"),
        ({"source": "digits", "mix": [{"source": "shapes"}]}, "give both or neither"),
        ({"source": "mix", "mix": [{"source": "mix"}]}, "none of them a mix"),
        ({"source": "mix", "mix": []}, "none of them a mix"),
        ({"source": "mix", "mix": [{"source": "digits", "wait": 2}]}, "data.mix"),
        ({"source": "digits", "val_source": "mix"}, "data.val_source is mix"),
    ],
)
def test_contradictions_are_refused(settings, message) -> None:
    base = {"model": {"variant": "mu/4"}, "train": {"steps": 1}, "data": {"image_size": 8, **settings}}
    with pytest.raises(ConfigError, match=message):
        read_config(None, base=base)
