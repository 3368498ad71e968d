"""Files that say which classes are right for which images, for images that do not lie in class folders.

Two kinds: a text file with a line `path<TAB>label[,label...]` for each image, and ReaL's JSON (2006.07159): a list with a list
of class numbers for each of ImageNet's validation images, in the order of their numbers.
"""

import json
import os
import stat
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitcli.errors import DataError

__all__ = ["LabelFile", "match_images", "read_label_file"]

MOST_BYTES = 1 << 30
SHAPE = "expected lines of an image's path, a tab, and its label (several with commas), or ReaL's JSON"


@dataclass(frozen=True)
class LabelFile:
    """Which classes are right for an image; images with none are left out."""

    path: Path
    labels: dict[str, list[str]]  # image's path, or the end of it, perhaps without its suffix, to names or numbers of classes
    lines: dict[str, int]  # the same paths to the line, or number of the entry, that says so
    unlabelled: int  # images for which the file says that no class is right
    numbered: bool  # labels are numbers of ILSVRC2012's classes

    def place(self, key: str) -> str:
        """Say where an entry stands, for messages."""
        return f"{self.path}: entry {self.lines[key]}" if self.numbered else f"{self.path}:{self.lines[key]}"


def read_label_file(path: Path) -> LabelFile:
    """Read a label file of either kind.

    Raises:
        DataError: there is no such file, or it is none; names the line.
    """
    path = path.expanduser()
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise DataError(f"{path}: this is no label file; {SHAPE}")
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot read these labels: {error.strerror}") from error
    if text.lstrip()[:1] == "[":
        return read_real(path, text)
    return read_lines(path, text)


def read_real(path: Path, text: str) -> LabelFile:
    """Read ReaL's list of lists; entry i is about ILSVRC2012_val_{i + 1:08d}."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); {SHAPE}") from None
    labels: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, list) or not all(type(label) is int and 0 <= label < 1000 for label in entry):
            raise DataError(f"{path}: entry {number} is {str(entry)[:80]}, expected a list of class numbers from 0 to 999")
        if entry:
            key = f"ILSVRC2012_val_{number:08d}"
            labels[key], lines[key] = [str(label) for label in entry], number
    if not labels:
        raise DataError(f"{path}: no image has a label in it; {SHAPE}")
    return LabelFile(path, labels, lines, len(entries) - len(labels), numbered=True)


def read_lines(path: Path, text: str) -> LabelFile:
    """Read lines of path, tab and labels; empty lines and those that begin with # are passed over."""
    labels: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    unlabelled = 0
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        name, tab, said = line.partition("\t")
        if not tab or not name:
            raise DataError(f"{path}:{number}: found {line[:80]!r}; {SHAPE}")
        key = os.path.normpath(name).replace(os.sep, "/")
        if key in lines:
            raise DataError(f"{path}:{number}: {name} stands in line {lines[key]} too; expected each image once")
        lines[key] = number
        if said.strip():
            labels[key] = [said.strip()]  # a class name may have commas in it: who knows the classes takes it apart
        else:
            unlabelled += 1
    if not labels:
        raise DataError(f"{path}: no image has a label in it; {SHAPE}")
    return LabelFile(path, labels, lines, unlabelled, numbered=False)


def match_images(paths: Sequence[str], file: LabelFile) -> list[str | None]:
    """Return, for each image, the path in the file that means it: the same, or the longer of the two ends with the other.

    Args:
        paths: of the images, "/" between parts; the file may leave their suffixes out.

    Raises:
        DataError: none of the images is in the file, or a path in it means several of them.
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    for key in file.labels:
        by_name[key.rpartition("/")[2]].append(key)
    found: list[str | None] = []
    taken: dict[str, int] = {}
    for number, path in enumerate(paths):
        ways = dict.fromkeys((path, os.path.splitext(path)[0]))
        alike = [(way, key) for way in ways for key in by_name.get(way.rpartition("/")[2], ())]
        shorter = [key for way, key in alike if ends(way, key)]
        longer = [key for way, key in alike if ends(key, way)]
        if not shorter and len(longer) > 1:
            raise DataError(f"{file.path}: {longer[0]} and {longer[1]} both mean {path}; give the folder that they lie in")
        best = max(shorter, key=len) if shorter else longer[0] if longer else None
        if best is not None and best in taken:
            raise DataError(f"{file.place(best)}: {best} means {paths[taken[best]]} and {path}; write more of the path")
        if best is not None:
            taken[best] = number
        found.append(best)
    if not taken:
        wanted = next(iter(file.labels))
        raise DataError(f"{file.path}: none of its {len(file.labels):,} images is there: it names {wanted}, found {paths[0]}")
    return found


def ends(path: str, end: str) -> bool:
    """Tell whether a path ends with whole parts of another one, or is the same."""
    return path == end or path.endswith(f"/{end}")
