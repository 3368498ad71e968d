"""The images and labels of one shard, found in one pass over its tar headers."""

import contextlib
import json
import logging
import re
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vitcli.data.tar import BLOCK, Member, iter_members, printable
from vitcli.errors import DataError

__all__ = ["DEFAULT_LABEL_KEY", "IMAGES", "NoKeyError", "NoLabelError", "Part", "read_label", "scan_shard", "split_name"]

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
DEFAULT_LABEL_KEY = "label"
LONGEST_LABEL = 1 << 20  # bytes of a cls or json member
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")  # 007 is a name
LARGEST_IMAGE = 2**31 - 1  # bytes: what an int32 holds
MOST_CLASSES = 1_000_000  # a larger label is damage; without a list, there are as many classes as labels go up to
EXPECTED_LABEL = f"expected a class as a number from 0 to {MOST_CLASSES - 1:,}, or its name"


class NoLabelError(DataError):
    """An image without a label, where labels are needed."""


class NoKeyError(ValueError):
    """A json member that says nothing of a label."""


@dataclass(frozen=True)
class Part:
    """What a scan finds in one shard, in the order of the tar file; (n,) each."""

    offsets: NDArray[np.int64]  # of the images' bytes
    sizes: NDArray[np.int32]
    gaps: NDArray[np.uint16]  # blocks from where a member's headers begin to its content
    labels: NDArray[np.int64]  # a number; or -1 - k for names[k]
    names: list[str]


def scan_shard(shard: str | BinaryIO, *, where: str, label_key: str | None = DEFAULT_LABEL_KEY) -> Part:
    """Find the images and labels of one shard.

    Members belong together that have the same path up to the first dot of its last part, as in webdataset; the rest, in small
    letters, says what they are: an image, `cls` or `json` for the label, anything else is passed over. With a `label_key` of
    None labels are passed over too, and all images are of class 0.

    Raises:
        NoLabelError: an image has no label.
        DataError: no tar file, cut off or damaged, without images, or with a second image or label of a name.
    """
    images: dict[str, Member] = {}
    labels: dict[str, dict[str, Member]] = {"cls": {}, "json": {}}
    for member in iter_members(shard, where=where):
        key, kind = split_name(member.name)
        if kind in IMAGES:
            table = images
        elif kind in labels:
            table = labels[kind]
        else:
            continue
        if key in table:
            what = "image" if kind in IMAGES else f"{kind} member"
            raise DataError(
                f"{where}:{printable(member.name)}: a second {what} of this name, after {printable(table[key].name)}; "
                "names must differ before the first dot"
            )
        table[key] = member
    if not images:
        raise DataError(
            f"{where}: no images in this shard; expected members such as 0001.jpg with 0001.cls ({', '.join(IMAGES)})"
        )
    alone = next((key for table in labels.values() for key in table if key not in images), None)
    if alone is not None and label_key is not None:
        logger.warning("%s: %s has a label but no image (%s); passed over", where, printable(alone), ", ".join(IMAGES))
    kinds = ("cls", "json") if label_key == DEFAULT_LABEL_KEY else ("json", "cls")  # who names a key means json
    codes: list[int] = []
    names: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(shard, "rb", buffering=0)) if isinstance(shard, str) else shard
        for key, image in images.items():
            if image.size > LARGEST_IMAGE:
                raise DataError(f"{where}:{printable(image.name)}: an image of {image.size:,} bytes; expected less than 2 GiB")
            if label_key is None:
                codes.append(0)
                continue
            found_in = next((kind for kind in kinds if key in labels[kind]), None)
            if found_in is None:
                expected = f"expected {printable(key)}.cls or {printable(key)}.json beside it in the shard"
                raise NoLabelError(f"{where}:{printable(image.name)}: no label; {expected}")
            member = labels[found_in][key]
            try:
                label = read_label(file, member, found_in, label_key=label_key)
            except (ValueError, RecursionError, OSError) as error:
                reason = " ".join(str(error).split())
                kind_of = NoLabelError if isinstance(error, NoKeyError) else DataError
                raise kind_of(f"{where}:{printable(member.name)}: {reason}; {EXPECTED_LABEL}") from error
            codes.append(label if isinstance(label, int) else -1 - names.setdefault(label, len(names)))
    found = list(images.values())
    return Part(
        np.array([image.offset for image in found], np.int64),
        np.array([image.size for image in found], np.int32),
        np.array([(image.offset - image.head) // BLOCK for image in found], np.uint16),
        np.array(codes, np.int64),
        list(names),
    )


def split_name(name: str) -> tuple[str, str]:
    """Return what a member belongs to and what it is; both empty for hidden and webdataset's own members."""
    folder, slash, file = name.rpartition("/")
    base, _, extension = file.partition(".")
    if not base or not extension or (base.startswith("__") and base.endswith("__")):
        return "", ""
    return f"{folder}{slash}{base}", extension.lower()


def read_label(file: BinaryIO, member: Member, kind: str, *, label_key: str) -> int | str:
    """Return a label, a number from 0 or a class name; raise ValueError if it is neither."""
    if member.size > LONGEST_LABEL:
        raise ValueError(f"a label of {member.size:,} bytes")
    file.seek(member.offset)
    content = file.read(member.size)
    if kind == "cls":
        value: Any = content.decode("utf-8").strip()
    else:
        stated = json.loads(content)
        value = stated.get(label_key) if isinstance(stated, dict) else None
        if value is None:
            keys = ", ".join(map(printable, list(stated)[:8])) if isinstance(stated, dict) and stated else "none"
            raise NoKeyError(f"no label: no key {label_key!r} (set data.label_key), but {keys}")
    shown = printable(str(value))[:80]
    if isinstance(value, str):
        value = value.strip()
        if not value:
            raise ValueError("this label is empty")
        if not value.isprintable():
            raise ValueError(f"label {shown} is not text")
        if not NUMBER.fullmatch(value):
            return value
        value = int(value) if len(value) < 20 else MOST_CLASSES
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"label {shown} is neither a number nor text")
    if not 0 <= value < MOST_CLASSES:
        raise ValueError(f"label {shown} is out of range")
    return value
