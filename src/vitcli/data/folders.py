"""Class folders: `PATH/train/<class>/*.jpg` beside `val` or `test`, or `PATH/<class>/*.jpg` with a deterministic split.

The split goes by a hash of each file's relative path, class by class: it needs no stored list, does not depend on the order
of the files on disk, and never takes a class's last training image.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vitcli.data.images import IMAGE_SUFFIXES
from vitcli.data.protocol import UNLABELLED
from vitcli.errors import DataError

__all__ = [
    *("EVALUATION_FOLDERS", "ImageFiles", "Split", "evaluation_folder", "has_class_folders"),
    *("open_folder", "open_unlabelled"),
]

Split = Literal["train", "val"]
EVALUATION_FOLDERS = ("val", "validation", "test")  # in order of preference


@dataclass(frozen=True)
class ImageFiles:
    """A labelled list of image files; (N,) each, in a fixed order."""

    root: Path
    relative: list[str]  # below root, "/" between parts
    labels: NDArray[np.int64]
    classes: list[str]
    bytes: NDArray[np.int64]  # file sizes
    mtimes: NDArray[np.int64]  # nanoseconds

    def take(self, keep: NDArray[np.int64]) -> "ImageFiles":
        """Return the files at positions `keep`."""
        relative = [self.relative[i] for i in keep]
        return ImageFiles(self.root, relative, self.labels[keep], self.classes, self.bytes[keep], self.mtimes[keep])


def open_folder(
    path: Path, *, split: Split, val_fraction: float, evaluation_folders: Sequence[str] = EVALUATION_FOLDERS
) -> ImageFiles:
    """List one split of a folder of class folders, classes by name and files by path.

    With a `train` folder and one of `evaluation_folders` (the first that is there), these are the splits. With `train`
    alone, or with class folders directly in `path`, `val_fraction` of every class is held out.

    Raises:
        DataError: nothing there, not a folder, no class folders, a class without images, classes that differ by split.
    """
    path = path.expanduser()
    if not path.exists():
        raise DataError(f"{path}: there is no such folder; expected {path}/<class>/*.jpg or {path}/train/<class>/*.jpg")
    if not path.is_dir():
        raise DataError(f"{path}: this is a file, expected a folder with one folder of images per class")
    below = subfolders(path)
    held_out = next((name for name in evaluation_folders if name in below), None)
    if "train" in below and held_out is not None:
        train_classes, val_classes = class_names(path / "train"), class_names(path / held_out)
        if train_classes != val_classes:
            raise DataError(describe_mismatch(path, held_out, train_classes, val_classes))
        return scan(path / ("train" if split == "train" else held_out), train_classes)
    if "train" in below:
        return hold_out(scan(path / "train", class_names(path / "train")), split=split, val_fraction=val_fraction)
    if held_out is not None and set(below) <= set(EVALUATION_FOLDERS):
        if split == "val":
            return scan(path / held_out, class_names(path / held_out))
        raise DataError(f"{path}: has {held_out}/ but no train/; add {path}/train/<class>/*.jpg")
    return hold_out(scan(path, class_names(path)), split=split, val_fraction=val_fraction)


def open_unlabelled(path: Path, *, split: Split, val_fraction: float) -> ImageFiles:
    """List one split of a folder of pictures that are in no classes, however deep they lie: all of one class.

    `train` and one of `EVALUATION_FOLDERS` are the splits where both are there; else `val_fraction` of all is held out.

    Raises:
        DataError: nothing there, not a folder, no pictures.
    """
    path = path.expanduser()
    if not path.is_dir():
        found = "this is a file" if path.exists() else "there is no such folder"
        raise DataError(f"{path}: {found}; expected a folder of images")
    below = subfolders(path)
    held_out = next((name for name in EVALUATION_FOLDERS if name in below), None)
    if "train" in below and held_out is not None:
        return scan_flat(path / ("train" if split == "train" else held_out))
    return hold_out(scan_flat(path), split=split, val_fraction=val_fraction)


def scan_flat(path: Path) -> ImageFiles:
    """List every image below a folder as one class."""
    found: list[tuple[str, int, int]] = []
    others = collect(path, ".", found)
    if not found:
        raise no_images(path, others=others)
    found.sort()
    names = [name.removeprefix("./") for name, _, _ in found]
    sizes, mtimes = (np.array([item[place] for item in found], dtype=np.int64) for place in (1, 2))
    return ImageFiles(path, names, np.zeros(len(found), np.int64), [UNLABELLED], sizes, mtimes)


def no_images(path: Path, *, others: int) -> DataError:
    """Return the error of a folder that holds other files alone."""
    ignored = f" ({others} files of other types)" if others else ""
    return DataError(f"{path}: no images in this folder{ignored}; expected some ({', '.join(sorted(IMAGE_SUFFIXES))})")


def evaluation_folder(path: Path) -> str | None:
    """Return the name of the folder in `path` that is evaluated on; None where a share of every class is held out."""
    below = subfolders(path)
    found = next((name for name in EVALUATION_FOLDERS if name in below), None)
    return found if "train" in below or set(below) <= set(EVALUATION_FOLDERS) else None


def has_class_folders(path: Path) -> bool:
    """Tell whether `path` holds class folders, by themselves or in `train`, `val` or `test`."""
    if any((path / name).is_dir() and subfolders(path / name) for name in ("train", *EVALUATION_FOLDERS)):
        return True
    with_images = (name for name in (subfolders(path) if path.is_dir() else ()) if holds_images(path / name))
    return len(list(islice(with_images, 2))) == 2


def holds_images(path: Path) -> bool:
    """Tell whether an image lies directly in a folder; stops at the first."""
    with os.scandir(path) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES for entry in entries)


def subfolders(path: Path) -> list[str]:
    """Return the names of the visible folders in `path`, sorted."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path}: cannot list this folder: {error.strerror}") from error


def class_names(path: Path) -> list[str]:
    names = subfolders(path)
    if not names:
        heap = "; pictures in no classes are for objective.name=mae and the like, and vit data takes --unlabelled"
        raise DataError(f"{path}: no class folders here; expected {path}/<class>/*.jpg{heap if holds_images(path) else ''}")
    if len(names) == 1:
        deeper = f"; did you mean folder:{path / names[0]}?" if subfolders(path / names[0]) else ""
        raise DataError(f"{path}: only one class folder, {names[0]}; expected one for each class{deeper}")
    return names


def describe_mismatch(path: Path, held_out: str, train: list[str], val: list[str]) -> str:
    def some(names: set[str]) -> str:
        listed = sorted(names)
        return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")

    parts = []
    if only_train := set(train) - set(val):
        parts.append(f"only in train/: {some(only_train)}")
    if only_val := set(val) - set(train):
        parts.append(f"only in {held_out}/: {some(only_val)}")
    return f"{path}: train/ and {held_out}/ must have the same class folders; {'; '.join(parts)}"


def scan(path: Path, classes: list[str]) -> ImageFiles:
    """List every image below the class folders of `path`; hidden files and other types are passed over."""
    relative: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    mtimes: list[int] = []
    for label, name in enumerate(classes):
        found: list[tuple[str, int, int]] = []
        others = collect(path, name, found)
        if not found:
            ignored = f" ({others} files of other types)" if others else ""
            raise DataError(
                f"{path / name}: no images in this class folder{ignored}; add some ({', '.join(sorted(IMAGE_SUFFIXES))})"
                " or remove the folder"
            )
        found.sort()
        relative.extend(item[0] for item in found)
        sizes.extend(item[1] for item in found)
        mtimes.extend(item[2] for item in found)
        labels.extend([label] * len(found))
    as_int64 = [np.array(values, dtype=np.int64) for values in (labels, sizes, mtimes)]
    return ImageFiles(path, relative, as_int64[0], classes, as_int64[1], as_int64[2])


def collect(root: Path, below: str, found: list[tuple[str, int, int]]) -> int:
    """Append (relative path, bytes, mtime) of every image under root/below; return how many other files there are.

    Strings and scandir, not pathlib: 60,000 files have to be listed before every run.
    """
    others = 0
    try:
        with os.scandir(os.path.join(root, below)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    others += collect(root, f"{below}/{entry.name}", found)
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file():
                    stat = entry.stat()
                    found.append((f"{below}/{entry.name}", stat.st_size, stat.st_mtime_ns))
                else:
                    others += 1
    except OSError as error:
        raise DataError(f"{os.path.join(root, below)}: cannot list this folder: {error.strerror}") from error
    return others


def hold_out(files: ImageFiles, *, split: Split, val_fraction: float) -> ImageFiles:
    """Return one side of the split by hash: per class, `val_fraction` of the images (at least one, never all of them)."""
    keep: list[NDArray[np.int64]] = []
    for label in range(len(files.classes)):
        members = np.flatnonzero(files.labels == label)
        order = sorted(members.tolist(), key=lambda i: hashlib.sha256(files.relative[i].encode()).digest())
        held_out = min(len(order) - 1, max(1, round(len(order) * val_fraction)))
        chosen = order[:held_out] if split == "val" else order[held_out:]
        keep.append(np.sort(np.array(chosen, dtype=np.int64)))
    if not sum(map(len, keep)):
        raise DataError(f"{files.root}: every class has a single image, so none can be held out; add a val/ folder")
    return files.take(np.concatenate(keep))
