"""Tar shards with everything that is wrong in them: members, labels, and the shards themselves."""

import contextlib
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from vitcli.data.examine import Finding, Notes, Seen
from vitcli.data.folders import Split
from vitcli.data.remote import RemoteCopies, is_remote, stat_remote
from vitcli.data.shard_scan import DEFAULT_LABEL_KEY, IMAGES, NoKeyError, read_label, split_name
from vitcli.data.shard_sets import SetInfo, choose_shards, folder_of, read_set_info
from vitcli.data.tar import Member, iter_members, printable
from vitcli.errors import DataError

__all__ = ["ShardReader", "read_shards"]

LABELS = ("cls", "json")
TAR_BLOCK = 512


@dataclass(frozen=True)
class ShardReader:
    """The members of some shards; task n is the nth shard."""

    urls: list[str]
    classes: list[str] | None
    lengths: dict[str, int]  # images that `_info.json` says a shard has, by absolute path or URL
    label_key: str
    copies: RemoteCopies
    labels: bool = True  # whether an image without one is at fault
    findings: list[Finding] = field(default_factory=list)

    @property
    def total(self) -> int | None:
        """Return the number of images if `_info.json` says it for all shards."""
        stated = [self.lengths.get(spelt(url)) for url in self.urls]
        return sum(length for length in stated if length is not None) if None not in stated else None

    @property
    def tasks(self) -> Sequence[int]:
        """Return the numbers of the shards."""
        return range(len(self.urls))

    def __call__(self, task: int) -> Seen:
        """Look at a shard."""
        url, notes, names = self.urls[task], Notes(), dict[str, int]()
        try:
            descriptor = self.open(url)
        except (DataError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{url}: ")
            notes.findings.append(Finding("unreadable", url, reason or "cannot open this shard"))
            return notes.seen([])
        with open(descriptor, "rb") as shard:
            self.look_at(shard, url, notes, names)
        return notes.seen(None if self.classes is not None else list(names))

    def open(self, url: str) -> int:
        """Return a descriptor of a shard, fetched if it is remote."""
        if not is_remote(url):
            return os.open(url, os.O_RDONLY | os.O_CLOEXEC)
        size, stamp = stat_remote(url)
        return self.copies.open(url, size=size, stamp=stamp)

    def look_at(self, shard: BinaryIO, url: str, notes: Notes, names: dict[str, int]) -> None:
        """Go through an open shard."""
        members: list[Member] = []
        whole = True
        try:
            for member in iter_members(shard, where=url):
                members.append(member)  # one by one: what came before the damage stays
        except DataError as error:
            whole = False
            notes.findings.append(shard_damage(url, str(error)))
        notes.findings += unsafe_members(shard, url, members, whole=whole)
        images: dict[str, Member] = {}
        labels: dict[str, dict[str, Member]] = {kind: {} for kind in LABELS}
        last, twice = "", set[str]()
        for member in members:
            key, kind = split_name(member.name)
            table = images if kind in IMAGES else labels.get(kind)
            if table is None:
                continue
            if key in table:
                if key not in twice:
                    before = printable(table[key].name)
                    notes.findings.append(
                        Finding("name-twice", f"{url}:{printable(member.name)}", f"belongs together with {before}")
                    )
                    twice.add(key)
                continue
            table[key], last = member, key
        for kind in LABELS:
            for key in labels[kind].keys() - images.keys():
                if whole or key != last:
                    place = f"{url}:{printable(labels[kind][key].name)}"
                    notes.findings.append(Finding("label-without-image", place, "no image of this name in the shard"))
        if not images and whole:
            notes.findings.append(Finding("empty", url, "no images in this shard"))
        stated = self.lengths.get(spelt(url))
        if whole and stated is not None and stated != len(images):
            notes.findings.append(Finding("count-mismatch", url, f"{len(images):,} images, but _info.json says {stated:,}"))
        kinds = LABELS if self.label_key == DEFAULT_LABEL_KEY else LABELS[::-1]
        for key, image in images.items():
            place = f"{url}:{printable(image.name)}"
            labelled = next((kind for kind in kinds if key in labels[kind]), None)
            label = -1
            if labelled is not None:
                label = self.label_of(shard, url, labels[labelled][key], labelled, notes, names)
            elif self.labels and (whole or key != last):
                notes.findings.append(Finding("missing-label", place, "no .cls or .json of this name in the shard"))
            shard.seek(image.offset)
            notes.file(shard.read(image.size), place=place, suffix=f".{split_name(image.name)[1]}", label=label)

    def label_of(self, shard: BinaryIO, url: str, member: Member, kind: str, notes: Notes, names: dict[str, int]) -> int:
        """Return a label as a number, -1 for one that is wrong; note what is wrong."""
        place = f"{url}:{printable(member.name)}"
        try:
            value = read_label(shard, member, kind, label_key=self.label_key)
        except (ValueError, RecursionError, OSError) as error:
            reason = " ".join(str(error).split())
            what = "missing-label" if isinstance(error, NoKeyError) else "bad-label"
            if self.labels or not isinstance(error, NoKeyError):
                notes.findings.append(Finding("label-out-of-range" if "out of range" in reason else what, place, reason))
            return -1
        if self.classes is None:
            return names.setdefault(str(value), len(names))
        if isinstance(value, int) and value < len(self.classes):
            return value
        if isinstance(value, str) and value in self.classes:
            return self.classes.index(value)
        expected = f"label {printable(str(value))[:80]}, expected one of {len(self.classes):,} classes, numbered from 0"
        notes.findings.append(Finding("label-out-of-range", place, expected))
        return -1


def spelt(url: str) -> str:
    """Return one spelling for all that mean one place."""
    return url if is_remote(url) else os.path.abspath(url)


def shard_damage(url: str, message: str) -> Finding:
    """Turn a tar reader's message, `url: reason` or `url:member: reason`, into a finding."""
    rest = message.removeprefix(url)
    place, reason = (
        (url, rest.removeprefix(": ")) if rest.startswith(": ") else (url + rest.partition(": ")[0], rest.partition(": ")[2])
    )
    kind = "empty" if "is empty (0 bytes)" in reason else "truncated" if reason.startswith("truncated") else "corrupt"
    return Finding(kind, place, reason)


def unsafe_members(shard: BinaryIO, url: str, members: Sequence[Member], *, whole: bool) -> list[Finding]:
    """Find members that would write outside a folder if somebody unpacked the shard: by their name, or as links and devices.

    Training unpacks nothing. Our reader yields regular files alone; where it has passed over something, tarfile says what.
    """
    findings = []
    for member in members:
        parts = member.name.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
            findings.append(Finding("unsafe-member", f"{url}:{printable(member.name)}", "its name leads out of the folder"))
    expected, gap = 0, False
    for member in members:
        gap = gap or member.head != expected
        expected = member.offset + -(-member.size // TAR_BLOCK) * TAR_BLOCK
    shard.seek(expected)
    if not gap and (not whole or not any(shard.read(TAR_BLOCK))):
        return findings
    shard.seek(0)
    # The rest of a damaged file is not worth more than this reader, which raises many errors of its own, makes of it.
    with contextlib.suppress(Exception), tarfile.open(fileobj=shard, mode="r:") as tar:
        read_to = -1
        for entry in tar:
            if entry.offset <= read_to:  # a negative size leads it back, for ever
                break
            read_to = entry.offset
            if entry.issym() or entry.islnk():
                findings.append(
                    Finding("unsafe-member", f"{url}:{printable(entry.name)}", f"a link to {printable(entry.linkname)}")
                )
            elif not entry.isreg() and not entry.isdir():
                findings.append(Finding("unsafe-member", f"{url}:{printable(entry.name)}", "a device or pipe"))
    return findings


def read_shards(
    pattern: str, *, splits: Sequence[Split], label_key: str, cache_dir: Path, remote_cache_gib: float, labels: bool = True
) -> dict[Split, ShardReader]:
    """Find the shards of each split; those that a part is held out of count as training shards.

    Args:
        labels: whether every image needs one.

    Raises:
        DataError: nothing matches the pattern, none of the shards is there, or what describes the set is damaged.
    """
    copies = RemoteCopies(cache_dir / "remote", limit_bytes=int(remote_cache_gib * 2**30))
    found: dict[Split, list[str]] = {}
    try:
        if "train" in splits:
            found["train"] = choose_shards(pattern, "train").urls
    except DataError:
        if splits == ["train"]:
            raise
    if "val" in splits:
        choice = choose_shards(pattern, "val")
        if not choice.hold_out:
            found["val"] = choice.urls
        elif "train" not in found:
            found["train"] = choice.urls
    readers: dict[Split, ShardReader] = {}
    for split, urls in found.items():
        if not any(is_remote(url) or os.path.exists(url) for url in urls):  # a wrong path, not a damaged set
            raise DataError(f"{pattern}: none of these {len(urls):,} shards is there; expected tar files such as {urls[0]}")
        place = folder_of(urls)
        info = SetInfo("") if place is None else read_set_info(place)
        lengths = {spelt(url): length for url, length in info.lengths.items()}
        absent = []
        listed = info.train if split == "train" else info.evaluation
        if listed is not None and {spelt(url) for url in urls} <= {spelt(url) for url in listed}:
            known = {spelt(url) for url in urls}
            absent = [
                Finding("unreadable", url, "listed in _info.json, but not there")
                for url in listed
                if spelt(url) not in known and not is_remote(url) and not os.path.exists(url)
            ]
        readers[split] = ShardReader(urls, info.classes, lengths, label_key, copies, labels, absent)
    return readers
