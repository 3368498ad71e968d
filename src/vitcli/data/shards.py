"""`shards:PATTERN`: images in tar files as webdataset and img2dataset write them, read at random by an index.

`shard_sets` says which files a pattern and a split mean, `shard_build` finds where each image lies, `remote` brings shards
that are not on this machine. Members are read in memory and never extracted, so no name of one can make us write anywhere.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.config import DataConfig
from vitcli.data.folders import Split
from vitcli.data.images import decode
from vitcli.data.protocol import UNLABELLED, Labels, SourceDefaults
from vitcli.data.remote import RemoteCopies, is_remote
from vitcli.data.shard_build import build_index
from vitcli.data.shard_index import ShardIndex
from vitcli.data.shard_scan import NoLabelError
from vitcli.data.shard_sets import ShardChoice, choose_shards, expand_shards, spelt_alike
from vitcli.data.subset import held_out
from vitcli.data.tar import Member, iter_members, name_at
from vitcli.errors import DataError

__all__ = ["Member", "ShardIndex", "ShardSource", "build_index", "expand_shards", "iter_members", "open_shards"]

OPEN_FILES = 64  # per process: far below the usual limit of 1,024, and opening again takes microseconds
OPEN_COPIES = 8  # of remote shards; an open one takes up space even after it was removed to make room
SOME = 5  # names in a message


class OpenShard:
    """A descriptor that is closed when the last who reads from it lets go, so never while another thread reads."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound now: modules are gone when Python ends
        close(self.descriptor)


def open_shard(index: ShardIndex, copies: RemoteCopies, shard: int) -> OpenShard:
    """Open a shard for reading; raise DataError if it is gone or has changed."""
    url, (size, stamp) = index.urls[shard], index.stats[shard]
    if is_remote(url):
        return OpenShard(copies.open(url, size=size, stamp=stamp))
    try:
        opened = OpenShard(os.open(url, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise DataError(f"{url}: cannot open this shard: {error.strerror}") from error
    found = os.fstat(opened.descriptor).st_size
    if found != size:
        raise DataError(
            f"{url}: this shard had {size:,} bytes when it was indexed and has {found:,} now; "
            "start again, which indexes it anew"
        )
    return opened


class ShardSource(SourceDefaults):
    """The images of an index, or a part of them, as files.

    Reading is safe in threads and in forked processes. Arrays are memory-mapped, and mapped again where a source is unpickled:
    a process holds no memory of its own for each image.

    Args:
        classes: names by label.
        side: .npy files of the positions that belong to this source, ascending, and of their labels; None for all.
    """

    encoded = True

    def __init__(
        self, index: ShardIndex, *, name: str, classes: list[str], copies: RemoteCopies, side: tuple[Path, Path] | None = None
    ) -> None:
        self.index = index
        self.name = name
        self.classes = classes
        self.copies = copies
        self.side = side
        self.remote = any(map(is_remote, index.urls))
        self.attach()
        part = "" if side is None else side[0].name
        self.fingerprint = hashlib.sha256(repr((index.fingerprint, classes, part)).encode()).hexdigest()[:24]
        # What decoded pixels depend on; unlike the fingerprint it changes with place and time.
        places = repr((index.fingerprint, spelt_alike(index.urls), index.stats, part))
        self.cache_key = hashlib.sha256(places.encode(errors="surrogateescape")).hexdigest()[:24]
        starts = index.starts if self.keep is None else np.unique(np.searchsorted(self.keep, index.starts))
        self.block_starts = starts.astype(np.int64)

    def attach(self) -> None:
        """Map and open what a pickled source leaves behind."""
        self.keep: NDArray[np.int64] | None = None
        self.labels: Labels = self.index.labels
        if self.side is not None:
            self.keep, self.labels = (np.load(path, mmap_mode="r").view(np.ndarray) for path in self.side)
        files = OPEN_COPIES if self.remote else OPEN_FILES
        self.opened = lru_cache(files)(partial(open_shard, self.index, self.copies))  # thread-safe; not of self: no circle

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("keep", "labels", "opened")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.attach()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return decode(self.read(index), where=self.where(index)), int(self.labels[index])

    def position(self, index: int) -> int:
        """Return an example's place in the index."""
        if not 0 <= index < len(self.labels):
            raise IndexError(index)
        return index if self.keep is None else int(self.keep[index])

    def read(self, index: int) -> bytes:
        """Return an image as it is stored.

        Raises:
            DataError: the shard is gone, cannot be read or fetched, or was changed since it was indexed.
        """
        position = self.position(index)
        shard = self.index.shard_of(position)
        opened = self.opened(shard)
        size, offset = int(self.index.sizes[position]), int(self.index.offsets[position])
        try:
            content = os.pread(opened.descriptor, size, offset)
        except OSError as error:
            raise DataError(f"{self.where(index)}: cannot read this image: {error.strerror}") from error
        if len(content) != size:
            raise DataError(
                f"{self.where(index)}: the shard ends inside this image; it was cut since it was indexed, so copy it again"
            )
        return content

    def where(self, index: int) -> str:
        """Return shard:member."""
        position = self.position(index)
        shard, head = self.index.shard_of(position), self.index.head(position)
        try:
            opened = self.opened(shard)
            member = name_at(opened.descriptor, head)
        except DataError:
            member = f"byte {head:,}"
        return f"{self.index.urls[shard]}:{member}"


def open_shards(pattern: str, *, split: Split, data: DataConfig, cache_dir: Path, labels: bool = True) -> ShardSource:
    """Open one split of the set that a pattern names; the first time its shards are scanned.

    Args:
        pattern: as for `expand_shards`; see `choose_shards` for what the split means.
        data: label_key, val_fraction and remote_cache_gib are read.
        cache_dir: for the index and for copies of remote shards.
        labels: whether images need them; where they do not and one has none, all are of one class.

    Raises:
        DataError: what `expand_shards`, `choose_shards` and `build_index` raise it for, or a class without training images.
    """
    choice = choose_shards(pattern, split)
    try:
        index, classes = open_index(choice, split=split, data=data, cache_dir=cache_dir)
    except NoLabelError:
        if labels:
            raise
        index = build_index(
            choice.urls,
            cache_dir=cache_dir,
            label_key=None,
            classes=[UNLABELLED],
            remote_cache_gib=data.remote_cache_gib,
            info=choice.info,
        )
        classes = index.classes
    name = f"shards:{pattern}"
    if split == "train" or choice.hold_out:
        empty = np.flatnonzero(index.counts == 0).tolist()
        if empty:
            some = ", ".join(classes[label] for label in empty[:SOME]) + (", ..." if len(empty) > SOME else "")
            raise DataError(
                f"{name}: {len(empty):,} of {len(classes):,} classes have no images in {len(index.urls):,} shards: {some}; "
                "add their shards, or number the classes without gaps"
            )
    side = split_files(index, split, fraction=data.val_fraction, cache_dir=cache_dir, name=name) if choice.hold_out else None
    copies = RemoteCopies(cache_dir / "remote", limit_bytes=int(data.remote_cache_gib * 2**30))
    return ShardSource(index, name=name, classes=classes, copies=copies, side=side)


def open_index(choice: ShardChoice, *, split: Split, data: DataConfig, cache_dir: Path) -> tuple[ShardIndex, list[str]]:
    """Return the index of the chosen shards and the class names; those of evaluation shards are the training shards'."""
    make = partial(
        build_index,
        cache_dir=cache_dir,
        label_key=data.label_key,
        remote_cache_gib=data.remote_cache_gib,
        info=choice.info,
    )
    index = make(choice.urls)
    if split == "train" or choice.hold_out or choice.train is None or index.listed is not None:
        return index, index.classes
    try:
        train = make(choice.train)
    except DataError:  # to evaluate, the training shards need not be here or in order
        return index, index.classes
    if not (train.named or index.named) and len(index.classes) <= len(train.classes):
        return index, train.classes
    if train.classes != index.classes:
        index = make(choice.urls, classes=train.classes)
    return index, train.classes


def split_files(index: ShardIndex, split: Split, *, fraction: float, cache_dir: Path, name: str) -> tuple[Path, Path]:
    """Return .npy files, (n,), of the positions of one side of a split class by class, and of their labels.

    The split depends on positions and labels alone. It is made once, in memory linear in the number of images, and kept.
    """
    folders = [index.folder, cache_dir / "shards" / f"{index.folder.name}-split"]  # the first may be read-only
    for folder in folders:
        files = side_files(folder, split, fraction)
        if all(map(is_whole, files)):
            return files
    folder = next((folder for folder in folders if os.access(folder, os.W_OK)), folders[-1])
    out = held_out(index.labels, fraction=fraction, name=name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for side, chosen in (("train", ~out), ("val", out)):
            positions = np.flatnonzero(chosen)
            positions_file, labels_file = side_files(folder, side, fraction)
            save(positions_file, positions)
            save(labels_file, index.labels[positions])
    except OSError as error:
        raise DataError(
            f"{folder}: cannot keep the split here: {error.strerror or error}; set VIT_CACHE to a folder with room"
        ) from error
    return side_files(folder, split, fraction)


def side_files(folder: Path, side: str, fraction: float) -> tuple[Path, Path]:
    return folder / f"{side}-{fraction!r}.npy", folder / f"{side}-{fraction!r}-labels.npy"


def is_whole(file: Path) -> bool:
    try:
        np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return True


def save(file: Path, values: NDArray[Any]) -> None:
    """Write an array beside its name, then rename it."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".tmp-", delete=False) as target:
        try:
            np.save(target, values)
            target.flush()
            os.chmod(target.name, 0o644)
            os.replace(target.name, file)
        except BaseException:
            Path(target.name).unlink(missing_ok=True)
            raise
