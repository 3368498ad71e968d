"""Folders with everything that is wrong in them: files that are no images, images in no class, classes of one split alone."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitcli.data.examine import CHUNK, Finding, Notes, Seen, examine, format_by_content
from vitcli.data.folders import (
    EVALUATION_FOLDERS,
    ImageFiles,
    Split,
    class_names,
    has_class_folders,
    hold_out,
    no_images,
    subfolders,
)
from vitcli.data.images import IMAGE_SUFFIXES
from vitcli.data.protocol import UNLABELLED
from vitcli.errors import DataError

__all__ = ["FolderReader", "read_folder"]


@dataclass(frozen=True)
class FolderReader:
    """The files of a folder, those that training passes over included; task n is the nth chunk."""

    root: Path
    relative: list[str]
    labels: list[int]
    classes: list[str]
    findings: list[Finding]

    @property
    def total(self) -> int:
        """Return the number of files."""
        return len(self.relative)

    @property
    def tasks(self) -> Sequence[int]:
        """Return the numbers of the chunks."""
        return range(-(-len(self.relative) // CHUNK))

    def __call__(self, task: int) -> Seen:
        """Look at a chunk."""
        notes = Notes()
        for number in range(task * CHUNK, min((task + 1) * CHUNK, len(self.relative))):
            place = os.path.join(self.root, self.relative[number])
            suffix = os.path.splitext(place)[1].lower()
            try:
                with open(place, "rb") as file:
                    data = file.read()
            except OSError as error:
                gone = "a link to nothing" if os.path.islink(place) and not os.path.exists(place) else error.strerror
                notes.findings.append(Finding("unreadable", place, str(gone)))
                notes.tally[self.labels[number]] += 1
                continue
            if suffix in IMAGE_SUFFIXES:
                notes.file(data, place=place, suffix=suffix, label=self.labels[number])
                continue
            form = format_by_content(data)  # training passes over such a file, whatever it holds
            if form is not None and examine(data, place=place, suffix="")[0] is not None:
                notes.findings.append(Finding("misnamed", place, f"its content is {form}; training passes over this suffix"))
            else:
                notes.findings.append(Finding("not-an-image", place, "no image by name or content; training passes over it"))
        return notes.seen()


def read_folder(path: Path, *, val_fraction: float, labels: bool = True) -> dict[Split, FolderReader]:
    """List a folder of class folders, split as `open_folder` does, but for everything that stops that.

    Args:
        labels: whether classes are needed; where they are not and there are none, a folder is listed as `open_unlabelled` does.

    Raises:
        DataError: no such folder, or neither class folders nor, where they will do, images in it.
    """
    path = path.expanduser()
    if not path.is_dir():
        raise DataError(f"{path}: there is no such folder; expected {path}/<class>/*.jpg or {path}/train/<class>/*.jpg")
    classless = not labels and not has_class_folders(path)
    roots = roots_of(path, classless=classless)
    names = {split: [UNLABELLED] if classless else class_names(root) for split, root in roots.items()}
    readers: dict[Split, FolderReader] = {}
    for split, root in roots.items():
        findings: list[Finding] = []
        if not classless:
            findings += [*stray_images(path, root), *(unmatched(names, roots, split) if len(roots) == 2 else ())]
        relative: list[str] = []
        of_file: list[int] = []
        for label, name in enumerate(names[split]):
            found = sorted(each.removeprefix("./") for each in files_below(root, "." if classless else name, findings))
            if not any(is_image(each) for each in found):
                if classless:
                    raise no_images(root, others=len(found))
                findings.append(Finding("empty-class", str(root / name), "no images in this class folder"))
            relative += found
            of_file += [label] * len(found)
        readers[split] = FolderReader(root, relative, of_file, names[split], findings)
    if set(readers) == {"train"}:
        return split_by_hash(readers["train"], val_fraction=val_fraction)
    return readers


def roots_of(path: Path, *, classless: bool) -> dict[Split, Path]:
    """Return the folder of each split; that of training alone where the other one is held out from it."""
    below = subfolders(path)
    held_out = next((name for name in EVALUATION_FOLDERS if name in below), None)
    if classless and ("train" not in below or held_out is None):
        return {"train": path}
    if "train" in below:
        roots: dict[Split, Path] = {"train": path / "train"}
        return roots if held_out is None else {**roots, "val": path / held_out}
    if held_out is not None and set(below) <= set(EVALUATION_FOLDERS):
        return {"val": path / held_out}
    return {"train": path}


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def stray_images(path: Path, root: Path) -> Iterator[Finding]:
    """Yield images that lie beside class folders, where training does not look."""
    for folder in dict.fromkeys((path, root) if root.name == "train" or root == path else (root,)):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if is_image(entry.name) and not entry.name.startswith(".") and not entry.is_dir():
                yield Finding("outside-classes", entry.path, "in no class folder; training does not see it")


def unmatched(names: dict[Split, list[str]], roots: dict[Split, Path], split: Split) -> Iterator[Finding]:
    """Yield the classes that the other split has not."""
    other: Split = "val" if split == "train" else "train"
    for name in sorted(set(names[split]) - set(names[other])):
        yield Finding("class-mismatch", str(roots[split] / name), f"{roots[other].name}/ has no such class folder")


def files_below(root: Path, below: str, findings: list[Finding]) -> Iterator[str]:
    """Yield the files of a class folder, relative to root; hidden ones are passed over, as training does."""
    try:
        entries = list(os.scandir(root / below))
    except OSError as error:
        findings.append(Finding("unreadable", str(root / below), f"cannot list this folder: {error.strerror}"))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name = f"{below}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(root, name, findings)
        elif entry.is_dir():
            findings.append(Finding("not-an-image", str(root / name), "a link to a folder; training passes over it"))
        elif entry.is_file() or entry.is_symlink():
            yield name
        else:
            findings.append(Finding("not-an-image", str(root / name), "no regular file; training passes over it"))


def split_by_hash(reader: FolderReader, *, val_fraction: float) -> dict[Split, FolderReader]:
    """Divide a folder without evaluation split as training does; files that are no images stay with the training split."""
    image = [
        number
        for number, name in enumerate(reader.relative)
        if is_image(name) and os.path.isfile(os.path.join(reader.root, name))
    ]
    nothing = np.zeros(len(image), np.int64)
    files = ImageFiles(
        reader.root,
        [reader.relative[number] for number in image],
        np.array([reader.labels[number] for number in image], np.int64),
        reader.classes,
        nothing,
        nothing,
    )
    try:
        held = set(hold_out(files, split="val", val_fraction=val_fraction).relative)
    except DataError:  # every class has a single image
        return {"train": reader}
    parts: dict[Split, FolderReader] = {}
    for split in ("train", "val"):
        mine = [number for number, name in enumerate(reader.relative) if (name in held) == (split == "val")]
        parts[split] = FolderReader(
            reader.root,
            [reader.relative[number] for number in mine],
            [reader.labels[number] for number in mine],
            reader.classes,
            reader.findings if split == "train" else [],
        )
    return parts
