"""Hugging Face sets saved to disk, written by the library itself."""

import io

import numpy as np
import pytest
from PIL import Image

from vitcli.config import DataConfig
from vitcli.data.sources import open_source
from vitcli.errors import DataError

datasets = pytest.importorskip("datasets")


def rows(count: int) -> dict[str, object]:
    images = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6), (20 * i % 256, 0, 255)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    return {"image": images, "label": [i % 2 for i in range(count)]}


def saved(path, splits, *, names=("cat", "dog"), **columns):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    made = {split: datasets.Dataset.from_dict(rows(count) | columns, features=features) for split, count in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(path))
    return f"hf:{path}"


def settings(**changes):
    return DataConfig(source="digits", image_size=(8, 8), **changes)


def test_a_saved_set_opens_with_its_own_split(tmp_path) -> None:
    spec = saved(tmp_path / "set", {"train": 10, "validation": 4})
    train, val = (open_source(spec, split=split, data=settings()) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (10, 4, ["cat", "dog"])
    image, label = train[3]
    assert image.shape == (6, 8, 3) and image[0, 0].tolist() == [60, 0, 255] and label == 1
    assert train.encoded and train.fingerprint != val.fingerprint
    assert train.where(3) == f"{spec}[3]"


def test_without_a_split_a_share_is_held_out(tmp_path) -> None:
    spec = saved(tmp_path / "set", {"train": 20})
    train, val = (open_source(spec, split=split, data=settings(val_fraction=0.2)) for split in ("train", "val"))
    assert (len(train), len(val)) == (16, 4)
    seen = {train[i][0].tobytes() for i in range(16)} & {val[i][0].tobytes() for i in range(4)}
    assert not seen
    assert np.bincount(np.asarray(val.labels)).tolist() == [2, 2]


def test_a_missing_column_names_the_others(tmp_path) -> None:
    spec = saved(tmp_path / "set", {"train": 4})
    with pytest.raises(DataError, match="no column 'fine_label', only image, label; did you mean data.label_key=label"):
        open_source(spec, split="train", data=settings(label_key="fine_label"))


def test_nothing_there_is_one_line(tmp_path) -> None:
    with pytest.raises(DataError, match="cannot open this Hugging Face set") as caught:
        open_source(f"hf:{tmp_path / 'nothing'}", split="train", data=settings())
    assert "\n" not in str(caught.value)
