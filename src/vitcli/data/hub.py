"""Hugging Face image sets as a source: `hf:PATH` of one saved to disk, or `hf:NAME[:CONFIG]` of the hub.

The `datasets` library reads, downloads and caches; images stay files until the loader decodes them.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.folders import EVALUATION_FOLDERS, Split
from vitcli.data.images import decode
from vitcli.data.protocol import UNLABELLED, Labels, SourceDefaults
from vitcli.data.subset import held_out
from vitcli.errors import DataError

__all__ = ["HubSource", "open_hub"]


class HubSource(SourceDefaults):
    """The rows of a `datasets.Dataset` with an image and a label column."""

    encoded = True

    def __init__(self, rows: Any, *, image_key: str, labels: NDArray[np.int64], classes: list[str], name: str) -> None:
        self.rows = rows
        self.image_key = image_key
        self.labels: Labels = labels
        self.classes = classes
        self.name = name
        digest = hashlib.sha256(repr((len(labels), classes)).encode())
        digest.update(labels.tobytes())
        for index in np.unique(np.linspace(0, len(labels) - 1, 100).astype(np.int64)).tolist():
            digest.update(self.read(index))
        self.fingerprint = digest.hexdigest()[:24]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        """Return the image's file; raise DataError if there is none."""
        stored = self.rows[index][self.image_key]
        data = stored and stored["bytes"]
        if data is None and stored and stored["path"]:
            try:
                return Path(stored["path"]).read_bytes()
            except OSError as error:
                raise DataError(f"{self.where(index)}: cannot read {stored['path']}: {error.strerror}") from error
        if not isinstance(data, bytes):
            raise DataError(f"{self.where(index)}: this row has no image; remove the row")
        return data

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return decode(self.read(index), where=self.where(index)), int(self.labels[index])


def open_hub(spec: str, *, split: Split, label_key: str, val_fraction: float, need_labels: bool = True) -> HubSource:
    """Open one split of a set; the evaluation split is `validation`, `val` or `test`, else a held-out share of `train`.

    Raises:
        DataError: the library is missing, nothing is found, or there is no image or label column.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"hf:{spec}: needs the package `datasets`; install it with: pip install 'vitcli[hf]'") from error
    name = f"hf:{spec}"
    found = read_splits(datasets, spec, name)
    evaluation = next((each for each in EVALUATION_FOLDERS if each in found), None)
    held = False
    if split == "val" and evaluation is not None:
        rows = found[evaluation]
    elif "train" in found:
        rows, held = found["train"], evaluation is None
    elif split == "val" and len(found) == 1:
        rows = next(iter(found.values()))
    else:
        raise DataError(f"{name}: has no split `train`, only {', '.join(found)}; name another set")
    features = rows.features
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1:
        raise DataError(f"{name}: expected one image column, found {', '.join(images) or 'none'} among {', '.join(features)}")
    if label_key not in features and need_labels:
        guesses = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        hint = f"; did you mean data.label_key={guesses[0]}?" if guesses else "; set data.label_key"
        raise DataError(f"{name}: no column {label_key!r}, only {', '.join(features)}{hint}")
    labels, classes = np.zeros(len(rows), np.int64), [UNLABELLED]
    if label_key in features:
        labels, classes = read_labels(datasets, rows, label_key, name)
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    if held:
        mine = held_out(labels, fraction=val_fraction, name=name)
        keep = np.flatnonzero(mine if split == "val" else ~mine)
        rows, labels = rows.select(keep), labels[keep]
    return HubSource(rows, image_key=images[0], labels=labels, classes=classes, name=name)


def read_splits(datasets: Any, spec: str, name: str) -> dict[str, Any]:
    """Return the splits of a set by name."""
    path = Path(spec).expanduser()
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            found = datasets.load_from_disk(str(path))
        else:
            hub_name, _, config = (str(path), "", "") if path.is_dir() else spec.partition(":")
            found = datasets.load_dataset(hub_name, config or None)
    except Exception as error:  # the library raises anything from its own errors to OSError and ValueError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{name}: cannot open this Hugging Face set: {reason}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def read_labels(datasets: Any, rows: Any, label_key: str, name: str) -> tuple[NDArray[np.int64], list[str]]:
    """Return the labels (N,) and the class names."""
    column = rows.with_format(None)[label_key][:]
    if any(value is None for value in column):
        raise DataError(f"{name}[{list(column).index(None)}]: no label in column {label_key!r}; give it one, or remove the row")
    kind = rows.features[label_key]
    if isinstance(kind, datasets.ClassLabel):
        labels = np.array(column, np.int64)
        outside = np.flatnonzero((labels < 0) | (labels >= kind.num_classes))
        if len(outside):
            raise DataError(
                f"{name}[{outside[0]}]: label {labels[outside[0]]}, expected 0 to {kind.num_classes - 1}; "
                "repair or remove the row"
            )
        return labels, list(kind.names)
    if not all(isinstance(value, str | int) for value in column):
        raise DataError(f"{name}: column {label_key!r} holds {type(column[0]).__name__}, expected class names or numbers")
    values = sorted(set(column))
    position = {value: i for i, value in enumerate(values)}
    return np.array([position[value] for value in column], np.int64), [str(value) for value in values]
