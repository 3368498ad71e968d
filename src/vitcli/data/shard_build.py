"""Making the index of a set of shards: scan what is new or has changed, merge, check every label.

An index is a folder named after the shards' names, sizes and time stamps, written under a temporary name first. While it is
made, each scanned shard is a file of its own, so a killed scan goes on where it was; of a set that has changed, only the
changed shards are scanned again. Names of members are not stored: the tar file tells them when a message needs one.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from vitcli.data.parallel import available_cores, in_processes
from vitcli.data.remote import RemoteCopies, is_remote, locked, stat_remote
from vitcli.data.shard_index import IndexWriter, ShardIndex, Stat
from vitcli.data.shard_scan import DEFAULT_LABEL_KEY, Part, scan_shard
from vitcli.data.shard_sets import SetInfo, folder_of, read_set_info, spelt_alike
from vitcli.data.tar import BLOCK, name_at, printable
from vitcli.errors import DataError

__all__ = ["BESIDE", "build_index"]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # goes into the names of indexes: raise it when the files or the scan change
BESIDE = ".vit-index"  # where an index lies that belongs to the shards, not to a user
ALONE_SECONDS = 2.0  # a scan that takes longer than this gets processes; starting them takes long, too
MANY = 1000  # files; asking a network disk about so many takes seconds unless it is asked about several at a time
THREADS = 32  # that wait for a network
TWO_KINDS = "write all labels one way, or all class names to classnames.txt beside the shards"


def build_index(
    urls: Sequence[str],
    *,
    cache_dir: Path,
    label_key: str | None = DEFAULT_LABEL_KEY,
    classes: Sequence[str] | None = None,
    workers: int | None = None,
    beside: bool = False,
    remote_cache_gib: float = 100.0,
    info: SetInfo | None = None,
) -> ShardIndex:
    """Return the index of some shards: the stored one if they have not changed since, else make and store it.

    Args:
        urls: paths or URLs, in the order that numbers the images.
        cache_dir: below it lie indexes, unless a folder `.vit-index` beside the shards has or takes them.
        label_key: where json members keep the label; None for images without labels, all of class 0.
        classes: class names by label; else a list beside the shards, else what the labels say.
        workers: processes; else as many as there are cores.
        beside: create that folder beside the shards.
        info: what lies beside the shards, if that has been read.

    Raises:
        DataError: a shard is missing, empty, damaged, of another length than `_info.json` says, or has an image without a
            label, with one that is no class, or two images of one name; names shard:member.
    """
    place = folder_of(urls)
    if info is None:
        info = SetInfo("") if place is None else read_set_info(place)
    listed = list(classes) if classes is not None else info.classes
    stats = stat_shards(urls)
    spelt = spelt_alike(urls)
    roots = [(cache_dir / "shards", spelt)]
    if place is not None and not is_remote(place):
        folder = Path(place) / BESIDE
        if beside:
            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise DataError(f"{folder}: cannot keep the index beside the shards: {error.strerror}") from error
        if folder.is_dir():
            roots.insert(0, (folder, [os.path.basename(url) for url in urls]))  # such an index may move with its shards
    elif beside:
        raise DataError(f"{urls[0]}: an index can lie beside shards only if they are in one folder on this machine")
    planned = [Plan(root, list(urls), names, stats, label_key, listed) for root, names in roots]
    wanted = planned[:1] if beside else planned
    index = next((found for plan in wanted if (found := plan.open()) is not None), None)
    if index is None:
        # A folder beside the shards may be read-only for this user.
        plan = next((plan for plan in wanted if os.access(plan.root, os.W_OK)), wanted[-1])
        copies = RemoteCopies(cache_dir / "remote", limit_bytes=int(remote_cache_gib * 2**30))
        try:
            plan.root.mkdir(parents=True, exist_ok=True)
            with locked(plan.root / f"{plan.key}.lock"):
                index = plan.open() or plan.build(planned, copies, info, workers=workers or available_cores())
        except OSError as error:
            raise DataError(
                f"{plan.root}: cannot write the index of the shards here: {error.strerror or error}; "
                "set VIT_CACHE to a folder with room"
            ) from error
    check_lengths(index, info, spelt)
    return index


def stat_shards(urls: Sequence[str]) -> list[Stat]:
    """Return each shard's size and time stamp; raise DataError if one is missing or empty."""
    if len(urls) < MANY and not any(map(is_remote, urls)):
        return [stat_shard(url) for url in urls]
    share = -(-len(urls) // THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        shares = pool.map(lambda start: [stat_shard(url) for url in urls[start : start + share]], range(0, len(urls), share))
        return [stat for some in shares for stat in some]


def stat_shard(url: str) -> Stat:
    if is_remote(url):
        size, stamp = stat_remote(url)
    else:
        try:
            status = os.stat(url)
        except OSError as error:
            if os.path.lexists(url):
                raise DataError(f"{url}: cannot open this shard: {error.strerror}") from error
            raise DataError(f"{url}: there is no such shard; check the pattern, or copy the shard there") from error
        if os.path.isdir(url):
            raise DataError(f"{url}: this is a folder, expected a tar file")
        size, stamp = status.st_size, str(status.st_mtime_ns)
    if size == 0:
        raise DataError(f"{url}: this shard is empty (0 bytes); write it again, or leave it out")
    return size, stamp


def check_lengths(index: ShardIndex, info: SetInfo, spelt: Sequence[str]) -> None:
    """Raise DataError if a shard holds more or fewer images than `_info.json` says."""
    stated = dict(zip(spelt_alike(info.lengths), info.lengths.values()))
    for url, place, length in zip(index.urls, spelt, np.diff(index.starts).tolist(), strict=True):
        expected = stated.get(place, length)
        if length != expected:
            raise DataError(
                f"{url}: this shard holds {length:,} images, but {info.folder}/_info.json says {expected:,}; "
                "copy the shard again, or correct the list"
            )
    for split, total in info.totals.items():
        if set(spelt) == set(spelt_alike(info.splits[split])) and total != len(index):
            raise DataError(
                f"{info.folder}/_info.json: says that split {split} has {total:,} examples, but its shards hold "
                f"{len(index):,}; correct the list"
            )


@dataclass(frozen=True)
class Plan:
    """An index to be opened or made."""

    root: Path
    urls: list[str]
    names: list[str]
    stats: list[Stat]
    label_key: str | None
    listed: list[str] | None

    @cached_property
    def key(self) -> str:
        """Return what all indexes of the shards in one place have in common."""
        return shorten(FORMAT_VERSION, self.label_key, self.names[0].rpartition("/")[0])

    @cached_property
    def folder(self) -> Path:
        return self.root / f"{self.key}-{shorten(self.names, self.stats, self.listed)}"

    def open(self) -> ShardIndex | None:
        """Open it; None (and the folder gone) when it is absent or damaged."""
        if not self.folder.is_dir():
            return None
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, TypeError):
            return ShardIndex(self.folder, self.urls)
        logger.warning("%s: damaged index of shards, making it again", self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        return None

    def build(self, planned: Sequence["Plan"], copies: RemoteCopies, info: SetInfo, *, workers: int) -> ShardIndex:
        """Make it of what older indexes know of these shards, what a killed scan has left, and a scan of the others."""
        known = {shard: found for plan in planned for shard, found in plan.known_parts().items()}
        parts = self.root / f"{self.key}.parts"
        parts.mkdir(exist_ok=True)
        for leftover in [*self.root.glob(f".tmp-{self.key}-*"), *parts.glob(".tmp-*")]:  # of killed builds: we hold the lock
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        files = [parts / f"{shorten(name, stat)}.npz" for name, stat in zip(self.names, self.stats, strict=True)]
        missing = [i for i, file in enumerate(files) if i not in known and load_part(file) is None]
        tasks = [Task(self.urls[i], self.stats[i], files[i], self.label_key, copies) for i in missing]
        scan_all(tasks, done=len(files) - len(missing), workers=workers)

        def part(shard: int) -> Part:
            if shard in known:
                index, number = known[shard]
                return index.part(number)
            found = load_part(files[shard])
            if found is None:
                raise DataError(f"{files[shard]}: vanished while the index was made; start again")
            return found

        write_index(self, part, copies, info)
        for file in files:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            parts.rmdir()  # unless another set of shards in this place is being scanned
        return ShardIndex(self.folder, self.urls)

    def known_parts(self) -> dict[int, tuple[ShardIndex, int]]:
        """Return, by shard, an older index and the shard's number there; of shards that have not changed."""
        wanted = {(name, *stat): i for i, (name, stat) in enumerate(zip(self.names, self.stats, strict=True))}
        known: dict[int, tuple[ShardIndex, int]] = {}
        for folder in sorted(self.root.glob(f"{self.key}-*")):
            with contextlib.suppress(OSError, ValueError, KeyError, EOFError, TypeError):
                names = json.loads((folder / "index.json").read_text(encoding="utf-8"))["names"]
                older = ShardIndex(folder, names)
                if older.listed is not None and older.listed != self.listed:
                    continue  # its labels may have been looked up in that list
                for number, (name, stat) in enumerate(zip(older.names, older.stats, strict=True)):
                    if (name, *stat) in wanted:
                        known[wanted[name, *stat]] = older, number
        return known


def shorten(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def write_index(plan: Plan, part: Callable[[int], Part], copies: RemoteCopies, info: SetInfo) -> None:
    """Merge the shards' parts: labels become those of the whole set, each checked."""
    shards = range(len(plan.urls))
    examples, highest, names = 0, -1, set[str]()
    for shard in shards:
        found = part(shard)
        examples += len(found.labels)
        highest = max(highest, int(found.labels.max()))
        names.update(found.names)
    if plan.listed is not None:
        classes: list[str] | None = plan.listed
    elif names:
        classes = sorted(names)
    else:
        classes = None
    num_classes = highest + 1 if classes is None else len(classes)
    position = {name: number for number, name in enumerate(classes or ())}
    list_name = info.class_list or "the class list"
    counts = np.zeros(num_classes, np.int64)

    def refuse(shard: int, found: Part, example: int, reason: str) -> NoReturn:
        head = int(found.offsets[example]) - BLOCK * int(found.gaps[example])
        place = f"{plan.urls[shard]}:{member_of(plan, shard, head, copies)}"
        raise DataError(f"{place}: {reason}")

    with IndexWriter(plan.folder, examples=examples) as writer:
        for shard in shards:
            found = part(shard)
            labels = found.labels.copy()
            if found.names:
                table = np.array(
                    [position.get(name, -1) for name in reversed(found.names)], np.int64
                )  # name k stands at -1 - k
                by_name = labels < 0
                labels[by_name] = table[labels[by_name]]
                if (labels < 0).any():
                    example = int(np.argmax(labels < 0))
                    name = printable(found.names[-1 - int(found.labels[example])])
                    refuse(shard, found, example, f"label {name!r} is none of the {num_classes:,} classes in {list_name}")
                if plan.listed is None and not by_name.all():
                    example = int(np.argmax(by_name))
                    name = printable(found.names[-1 - int(found.labels[example])])
                    refuse(shard, found, example, f"label {name!r} is not a number, as other labels are; {TWO_KINDS}")
            elif plan.listed is None and classes is not None:
                reason = f"label {int(labels[0])} is a number, but other shards name their classes; {TWO_KINDS}"
                refuse(shard, found, 0, reason)
            if (labels >= num_classes).any():
                example = int(np.argmax(labels >= num_classes))
                reason = (
                    f"label {int(labels[example])} is out of range: {list_name} has {num_classes:,} classes, numbered from 0"
                )
                refuse(shard, found, example, reason)
            counts += np.bincount(labels, minlength=num_classes)
            writer.append(Part(found.offsets, found.sizes, found.gaps, labels, []))
        writer.finish(names=plan.names, stats=plan.stats, counts=counts, classes=classes, listed=plan.listed)


def member_of(plan: Plan, shard: int, head: int, copies: RemoteCopies) -> str:
    url, (size, stamp) = plan.urls[shard], plan.stats[shard]
    descriptor = copies.open(url, size=size, stamp=stamp) if is_remote(url) else os.open(url, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return name_at(descriptor, head)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Task:
    """A shard to scan, and where to keep what is found."""

    url: str
    stat: Stat
    target: Path
    label_key: str | None
    copies: RemoteCopies

    def run(self) -> None:
        """Scan it; the part is written beside its name and renamed."""
        if is_remote(self.url):
            with open(self.copies.open(self.url, size=self.stat[0], stamp=self.stat[1]), "rb") as file:
                part = scan_shard(file, where=self.url, label_key=self.label_key)
        else:
            part = scan_shard(self.url, where=self.url, label_key=self.label_key)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.target.parent, prefix=".tmp-", delete=False) as file:
            try:
                names = np.frombuffer(json.dumps(part.names).encode(), np.uint8)
                np.savez(file, offsets=part.offsets, sizes=part.sizes, gaps=part.gaps, labels=part.labels, names=names)
                file.flush()
                os.replace(file.name, self.target)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def load_part(file: Path) -> Part | None:
    """Read what a scan has kept; None when it is absent or damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            names = json.loads(stored["names"].tobytes())
            return Part(stored["offsets"], stored["sizes"], stored["gaps"], stored["labels"], names)
    except FileNotFoundError:
        return None
    except Exception:  # zipfile, numpy and json each raise their own on a damaged file
        return None


def scan_all(tasks: list[Task], *, done: int, workers: int) -> None:
    """Scan shards in parallel, with a progress bar if it takes long."""
    bar = tqdm(
        total=done + len(tasks), initial=done, desc="indexing shards (once)", unit="shard", leave=False, delay=1.0, disable=None
    )
    with bar:
        if any(is_remote(task.url) for task in tasks):  # the network is what takes time; and only we see memory://
            pool = ThreadPoolExecutor(min(2 * workers, THREADS))
            try:
                for future in [pool.submit(task.run) for task in tasks]:
                    future.result()
                    bar.update()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
            return
        waiting = deque(tasks)
        began = time.monotonic()
        while waiting and time.monotonic() - began < ALONE_SECONDS:
            waiting.popleft().run()
            bar.update()
        if waiting:
            for _ in in_processes(Task.run, list(waiting), jobs=workers):
                bar.update()
