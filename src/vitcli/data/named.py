"""Data sets by name: looked for under the data root, read by torchvision's classes, downloaded when they are not there.

Splits: `train` is everything the paper's transfer runs train on, `val` is the published test set. Flowers-102 and Pets
therefore train on their train and validation images (2,040 and 3,680), as BiT and ViT do (2010.11929, section 4.1).
"""

import contextlib
import io
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.folders import ImageFiles, Split, has_class_folders, open_folder
from vitcli.errors import DataError

__all__ = ["NAMED_SETS", "Arrays", "data_root", "load_named", "present_sets"]

NETWORK_TIMEOUT_SECONDS = 15.0  # torchvision sets none; without a network the answer should not take minutes
TEST_FIRST = ("test", "val", "validation")  # a named set is evaluated on its published test set


@dataclass(frozen=True)
class Arrays:
    """A labelled set that is already pixels: (N, H, W, 3) or grey (N, H, W), uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: list[str]


@dataclass(frozen=True)
class NamedSet:
    """How torchvision stores a set: its class, and the files by which it is recognised."""

    torchvision_class: str
    recognised_by: tuple[str, ...]  # any of these in the folder; archives count, torchvision unpacks them
    downloadable: bool = True


NAMED_SETS = {
    "cifar10": NamedSet("CIFAR10", ("cifar-10-batches-py", "cifar-10-python.tar.gz")),
    "cifar100": NamedSet("CIFAR100", ("cifar-100-python", "cifar-100-python.tar.gz")),
    "mnist": NamedSet("MNIST", ("MNIST/raw",)),
    "fashion-mnist": NamedSet("FashionMNIST", ("FashionMNIST/raw",)),
    "flowers102": NamedSet("Flowers102", ("flowers-102",)),
    "pets": NamedSet("OxfordIIITPet", ("oxford-iiit-pet",)),
    "imagenet": NamedSet("ImageNet", ("meta.bin", "ILSVRC2012_devkit_t12.tar.gz"), downloadable=False),
}


def data_root(root: Path | None) -> Path:
    """Return the configured data root, else $VIT_DATA, else ~/.cache/vit."""
    return Path(root or os.environ.get("VIT_DATA") or "~/.cache/vit").expanduser()


def present_sets(root: Path) -> list[str]:
    """Return the names of the sets that lie under a data root, in torchvision's files or in class folders."""
    return [
        name
        for name, known in NAMED_SETS.items()
        if any((place / mark).exists() for place in (root / name, root) for mark in known.recognised_by)
        or has_class_folders(root / name)
    ]


def load_named(name: str, *, split: Split, root: Path, val_fraction: float) -> Arrays | ImageFiles:
    """Find a named set under `root` (torchvision's files, then class folders), else download it to root/name.

    Raises:
        DataError: not there and not to be had; names the places looked at and what to put where.
    """
    known = NAMED_SETS[name]
    own = root / name
    for place in (own, root):
        if any((place / mark).exists() for mark in known.recognised_by):
            return read_present(name, known, place, split=split)
    if has_class_folders(own):
        return open_folder(own, split=split, val_fraction=val_fraction, evaluation_folders=TEST_FIRST)
    expected = f"put {own}/train/<class>/* and {own}/test/<class>/* there, or torchvision's {known.recognised_by[0]} in {own}"
    if not known.downloadable:
        expected = (
            f"put {own}/train/<wnid>/* and {own}/val/<wnid>/* there, or ILSVRC2012_devkit_t12.tar.gz with"
            f" ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in {own}; its licence allows no automatic download"
        )
        raise DataError(f"{name}: not found in {own} or {root}; {expected}")
    try:
        return download(name, known, own, split=split)
    except Exception as error:  # whatever urllib, tarfile, pickle or torchvision make of a bad network or disk
        raise DataError(
            f"{name}: not found in {own} or {root}, and the download failed ({one_line(error)}); {expected}"
        ) from error


def read_present(name: str, known: NamedSet, place: Path, *, split: Split) -> Arrays | ImageFiles:
    """Read torchvision's files in `place`; where some are missing, let torchvision unpack or fetch them there."""
    try:
        with quiet():
            return read(known, place, split=split, download=False)
    except Exception as error:
        first = error
    if not known.downloadable:
        raise DataError(f"{name}: found in {place}, but it cannot be read: {one_line(first)}") from first
    try:
        with quiet():
            return read(known, place, split=split, download=True)
    except Exception as error:
        raise DataError(
            f"{name}: the files in {place} are incomplete or damaged ({one_line(first)}), and fetching them again failed"
            f" ({one_line(error)}); complete them, or remove {place / known.recognised_by[0]}"
        ) from error


def download(name: str, known: NamedSet, own: Path, *, split: Split) -> Arrays | ImageFiles:
    """Download into a temporary folder beside `own` and rename it, so that half a download is never taken for a set."""
    own.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=own.parent))
    try:
        with quiet():
            read(known, temporary, split=split, download=True)
        if own.is_dir() and not any(own.iterdir()):
            own.rmdir()
        if own.exists():  # a folder with other things in it: ours go beside them
            for part in temporary.iterdir():
                part.rename(own / part.name)
        else:
            temporary.chmod(0o755)  # mkdtemp makes it private
            temporary.rename(own)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read(known, own, split=split, download=False)


def read(known: NamedSet, place: Path, *, split: Split, download: bool) -> Arrays | ImageFiles:
    """Open one of torchvision's classes on `place` and take its content over."""
    import torch
    from torchvision import datasets

    build = getattr(datasets, known.torchvision_class)
    if known.torchvision_class in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"):
        stored = build(place, train=split == "train", download=download)
        images = torch.as_tensor(stored.data).contiguous().numpy()  # arrays in one class, tensors in another
        return Arrays(images, torch.as_tensor(stored.targets, dtype=torch.int64).numpy(), list(stored.classes))
    if known.torchvision_class == "Flowers102":
        parts = [build(place, split=part, download=download) for part in (("train", "val") if split == "train" else ("test",))]
        return list_files(
            place,
            [path for part in parts for path in part._image_files],
            [label for part in parts for label in part._labels],
            list(parts[0].classes),
        )
    if known.torchvision_class == "OxfordIIITPet":
        stored = build(place, split="trainval" if split == "train" else "test", download=download)
        return list_files(place, stored._images, stored._labels, list(stored.classes))
    stored = build(place, split=split)
    names = [synonyms[0] for synonyms in stored.classes]  # not unique: "crane" is a bird and a machine
    classes = [f"{name} ({wnid})" if names.count(name) > 1 else name for name, wnid in zip(names, stored.wnids, strict=True)]
    return list_files(place, [path for path, _ in stored.samples], stored.targets, classes)


def list_files(root: Path, paths: list[Any], labels: list[int], classes: list[str]) -> ImageFiles:
    stats = [os.stat(path) for path in paths]
    return ImageFiles(
        root,
        [os.path.relpath(path, root).replace(os.sep, "/") for path in paths],
        np.array(labels, np.int64),
        classes,
        np.array([stat.st_size for stat in stats], np.int64),
        np.array([stat.st_mtime_ns for stat in stats], np.int64),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Give downloads a time limit, and show torchvision's progress bar on a terminal only."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
            if not sys.stderr.isatty():
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        socket.setdefaulttimeout(before)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
