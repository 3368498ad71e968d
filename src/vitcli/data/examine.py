"""What a set's images are like, piece by piece and in parallel: sizes, hashes, thumbnails, and what is wrong with each.

Unlike a source, which stops at the first thing that training could not use, a reader here goes on, and says what it met.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.data.duplicates import HASH_SIDE, perceptual_hash, thumbnails
from vitcli.data.images import IMAGE_SUFFIXES, decode
from vitcli.data.protocol import EncodedSource, Source, UniformSource
from vitcli.errors import DataError

__all__ = ["CHUNK", "Finding", "IndexReader", "Notes", "Reader", "Seen", "examine", "format_by_content"]

CHUNK = 64  # images per task
FORMATS = {  # suffix: what such a file holds
    ".bmp": "BMP", ".gif": "GIF", ".jpe": "JPEG", ".jpeg": "JPEG", ".jpg": "JPEG", ".pbm": "PNM", ".pgm": "PNM", ".png": "PNG",
    ".pnm": "PNM", ".ppm": "PNM", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WebP",
}  # fmt: skip
MAGIC = (
    (b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF8", "GIF"), (b"BM", "BMP"), (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"), *((b"P%d" % kind + blank, "PNM") for kind in range(1, 7) for blank in (b"\n", b" ", b"\t", b"\r")),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Something wrong with one file, member, shard or class."""

    kind: str
    place: str
    reason: str


# ---------------------------------------------------------------- one file


def format_by_content(data: bytes) -> str | None:
    """Return the name of the format that a file begins as."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    return next((name for magic, name in MAGIC if data.startswith(magic)), None)


def examine(data: bytes, *, place: str, suffix: str) -> tuple[NDArray[np.uint8] | None, list[Finding]]:
    """Decode a file as training would: return the image (H, W, 3), or None, and what is wrong.

    Args:
        suffix: in lower case, with its dot; empty where the place has none to go by.
    """
    if not data:
        return None, [Finding("empty", place, "the file is empty")]
    form = format_by_content(data)
    try:
        image = decode(data, where=place)
    except DataError as error:
        reason = str(error).removeprefix(f"{place}: cannot read this image: ").removesuffix("; repair or remove it")
        return None, [Finding(kind_of_damage(form, reason, data), place, reason)]
    if ends_early(data, form):
        return image, [Finding("truncated", place, f"ends without {form}'s end mark; the lower part may be grey")]
    if suffix and form != FORMATS.get(suffix):
        return image, [Finding("misnamed", place, f"its content is {form or 'another image format'}")]
    return image, []


def kind_of_damage(form: str | None, reason: str, data: bytes) -> str:
    if form is None:
        return "not-an-image"
    if "bomb" in reason:
        return "too-large"
    if "truncated" in reason.lower() or ends_early(data, form):
        return "truncated"
    return "corrupt"


def ends_early(data: bytes, form: str | None) -> bool:
    """Tell whether the mark that ends a JPEG's last scan, or a PNG, is missing; decoders may pass over that."""
    if form == "JPEG":
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    return form == "PNG" and b"IEND" not in data


# ---------------------------------------------------------------- many of them


@dataclass(frozen=True)
class Seen:
    """The readable images of a piece of a set, (n,) each, and what was wrong in it."""

    places: bytes  # joined by \0, which no path or member's name can hold
    labels: NDArray[np.int32]  # -1 where there is none
    names: list[str] | None  # what labels stand for in this piece; None: for the reader's classes
    sizes: NDArray[np.int32]  # (n, 2) height, width
    grey: NDArray[np.bool_]
    digests: NDArray[np.uint64]  # (n, 2) of the pixels
    hashes: NDArray[np.uint64]
    contrast: NDArray[np.bool_]  # whether the hash means anything
    thumbs: NDArray[np.uint8]  # (n, 16, 16)
    findings: list[Finding]
    tally: dict[int, int]  # images by label, readable or not


@dataclass
class Notes:
    """What a reader writes down while it goes through a piece."""

    places: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    grey: list[bool] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    small: list[NDArray[np.uint8]] = field(default_factory=list)  # (32, 32) each
    findings: list[Finding] = field(default_factory=list)
    tally: Counter[int] = field(default_factory=Counter)

    def image(self, place: str, label: int, image: NDArray[np.uint8]) -> None:
        """Take down a readable image (H, W, 3)."""
        self.places.append(place)
        self.labels.append(label)
        self.sizes.append((image.shape[0], image.shape[1]))
        red, green, blue = image[:, :, 0], image[:, :, 1], image[:, :, 2]
        self.grey.append(np.array_equal(red, green) and np.array_equal(green, blue))
        digest = hashlib.sha256(repr(image.shape).encode())
        digest.update(np.ascontiguousarray(image).data)
        self.digests.append(digest.digest()[:16])
        picture = Image.fromarray(np.ascontiguousarray(image)).convert("L")
        self.small.append(np.asarray(picture.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BILINEAR)))

    def file(self, data: bytes, *, place: str, suffix: str, label: int) -> None:
        """Look at a file; take down the image, if it is one, and what is wrong."""
        self.tally[label] += 1
        image, findings = examine(data, place=place, suffix=suffix)
        self.findings += findings
        if image is not None:
            self.image(place, label, image)

    def seen(self, names: list[str] | None = None) -> Seen:
        """Return everything, compact."""
        count = len(self.places)
        small = np.array(self.small, np.uint8).reshape(count, HASH_SIDE, HASH_SIDE)
        hashes, contrast = perceptual_hash(small)
        return Seen(
            "\0".join(self.places).encode(errors="surrogateescape"),
            np.array(self.labels, np.int32),
            names,
            np.array(self.sizes, np.int32).reshape(count, 2),
            np.array(self.grey, np.bool_),
            np.frombuffer(b"".join(self.digests), np.uint64).reshape(count, 2),
            hashes,
            contrast,
            thumbnails(small),
            self.findings,
            dict(self.tally),
        )


class Reader(Protocol):
    """A way to go through one split of a set; calling it with a task looks at a piece."""

    @property
    def classes(self) -> list[str] | None:
        """Return the class names; None where only the labels tell them."""
        ...

    @property
    def findings(self) -> list[Finding]:
        """Return what was found before any image was read."""
        ...

    @property
    def total(self) -> int | None:
        """Return the number of images, where that is known beforehand."""
        ...

    @property
    def tasks(self) -> Sequence[int]:
        """Return the numbers of the pieces."""
        ...

    def __call__(self, task: int) -> Seen:
        """Look at a piece."""
        ...


# ---------------------------------------------------------------- any source


@dataclass(frozen=True)
class IndexReader:
    """Any source, by index; task n is the nth chunk."""

    source: Source
    findings: list[Finding] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Return the class names."""
        return self.source.classes

    @property
    def total(self) -> int:
        """Return the number of images."""
        return len(self.source)

    @property
    def tasks(self) -> Sequence[int]:
        """Return the numbers of the chunks."""
        return range(-(-len(self.source) // CHUNK))

    def __call__(self, task: int) -> Seen:
        """Look at a chunk."""
        notes = Notes()
        indices = np.arange(task * CHUNK, min((task + 1) * CHUNK, len(self.source)))
        if self.source.encoded:
            encoded = cast(EncodedSource, self.source)
            for index in indices.tolist():
                place, label = encoded.where(index), int(encoded.labels[index])
                try:
                    data = encoded.read(index)
                except DataError as error:
                    notes.findings.append(Finding("unreadable", place, str(error).removeprefix(f"{place}: ")))
                    notes.tally[label] += 1
                    continue
                suffix = os.path.splitext(place)[1].lower()
                notes.file(data, place=place, suffix=suffix if suffix in IMAGE_SUFFIXES else "", label=label)
                self.check_label(notes, place, label)
            return notes.seen()
        for index, image, label in self.images(indices, notes):
            place = self.source.where(index)
            notes.tally[label] += 1
            notes.image(place, label, image)
            self.check_label(notes, place, label)
        return notes.seen()

    def images(self, indices: NDArray[np.int64], notes: Notes) -> Iterator[tuple[int, NDArray[np.uint8], int]]:
        """Yield index, image and label of what is no file."""
        if self.source.uniform:
            images, labels = cast(UniformSource, self.source).batch(indices)
            yield from zip(indices.tolist(), images, labels.tolist(), strict=True)
            return
        for index in indices.tolist():
            try:
                image, label = self.source[index]
            except DataError as error:
                place = self.source.where(index)
                notes.tally[-1] += 1
                notes.findings.append(Finding("unreadable", place, str(error).removeprefix(f"{place}: ")))
                continue
            yield index, image, label

    def check_label(self, notes: Notes, place: str, label: int) -> None:
        """Note a label that is not a class."""
        if not 0 <= label < len(self.classes):
            notes.findings.append(Finding("label-out-of-range", place, f"label {label}, expected 0 to {len(self.classes) - 1}"))
