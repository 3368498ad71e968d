"""Shards that are not on this machine: anything fsspec can open, copied whole to a folder of limited size.

Loader processes share the copies, and any of them may be killed at any time. fsspec's own file caches write straight to the
final name, know no lock and no limit of size, so here its `get_file` writes to a temporary name under a lock, which is then
renamed; the least recently used copies make room.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from vitcli.errors import DataError

__all__ = ["RemoteCopies", "is_remote", "list_remote", "locked", "read_if_there", "stat_remote"]

# What different stores call a version of a file; the first that is there is taken.
STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
)
ATTEMPTS = 3  # a network fails now and then, and a run lasts for weeks
PAUSE_SECONDS = 1.0  # before the second attempt; four times that before the third
WAIT_SECONDS = 0.1  # until asking again whether others' copies have left room
ABSENT = (403, 404, 410)  # HTTP statuses; stores that do not list say 403 for what is not there


def is_remote(url: str) -> bool:
    """Tell a URL from a path."""
    return "://" in url or "::" in url


def connect(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, made anew in a forked process, and the path there."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0]
        extra = "http" if protocol == "https" else protocol
        raise DataError(f"{url}: {one_line(error)}; pip install 'fsspec[{extra}]'") from error
    except Exception as error:
        raise DataError(f"{url}: cannot open this place: {one_line(error)}") from error
    return filesystem, str(path)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def stat_remote(url: str) -> tuple[int, str]:
    """Return a remote file's size, bytes, and a text that changes when it does.

    Raises:
        DataError: not there, not reachable, or of unknown size.
    """
    filesystem, path = connect(url)
    try:
        found = filesystem.info(path)
    except FileNotFoundError as error:
        raise DataError(f"{url}: there is no such shard; check the pattern") from error
    except Exception as error:
        raise DataError(f"{url}: cannot reach this shard: {one_line(error)}") from error
    if found.get("type") == "directory":
        raise DataError(f"{url}: this is a folder, expected a tar file")
    if not isinstance(found.get("size"), int):
        raise DataError(f"{url}: the server does not tell the size of this shard, which is needed; copy it to a disk")
    return found["size"], next((f"{key}={found[key]}" for key in STAMPS if found.get(key)), "")


def list_remote(pattern: str) -> list[str]:
    """Return the URLs of the files that match a glob, sorted; none if nothing does."""
    if "::" in pattern:
        raise DataError(f"{pattern}: a glob does not go together with chained URLs; list the shards in braces")
    filesystem, path = connect(pattern)
    try:
        found = filesystem.glob(path, detail=True)
    except FileNotFoundError:
        return []
    except Exception as error:
        raise DataError(f"{pattern}: cannot list this place: {one_line(error)}") from error
    names = sorted(name for name, entry in found.items() if entry.get("type") != "directory")
    if pattern.endswith(path):  # so that user and host stay in the address
        return [pattern.removesuffix(path) + name for name in names]
    return [str(filesystem.unstrip_protocol(name)) for name in names]


def read_if_there(url: str) -> bytes | None:
    """Return a small remote file, or None if there is none."""
    filesystem, path = connect(url)
    try:
        return bytes(filesystem.cat_file(path))
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return None
    except Exception as error:
        if getattr(error, "status", None) in ABSENT:
            return None
        raise DataError(f"{url}: cannot read this file: {one_line(error)}") from error


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that ends with the process; yield whether it could be had. Nothing is locked where the disk cannot."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # taken; or a network disk that knows no locks, where the renames still keep files whole
            held = wait
        yield held
    finally:
        os.close(descriptor)


class RemoteCopies:
    """Copies of remote shards in a folder, together at most `limit_bytes`.

    A copy that a process has open when it is removed takes up space until that process opens other shards.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def open(self, url: str, *, size: int, stamp: str) -> int:
        """Return a descriptor of the copy of a shard, fetched if need be.

        Raises:
            DataError: it cannot be fetched, is not of that size any more, or is larger than the limit.
        """
        while True:
            path = self.fetch(url, size=size, stamp=stamp)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process needed the room just now
                continue
            with contextlib.suppress(OSError):
                os.utime(path)  # what is removed goes by this time
            return descriptor

    def fetch(self, url: str, *, size: int, stamp: str) -> Path:
        """Return the path of the copy; another process may remove it at any time."""
        name = hashlib.sha256(f"{url}\n{size}\n{stamp}".encode()).hexdigest()[:32]
        path = self.folder / f"{name}.tar"
        if path.exists():
            return path
        if size > self.limit_bytes:
            raise DataError(
                f"{url}: this shard has {size / 2**30:.3g} GiB, more than "
                f"data.remote_cache_gib={self.limit_bytes / 2**30:.3g}; raise that"
            )
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with locked(self.lock_of(name)):
                if path.exists():  # another process had the lock before us
                    return path
                partial = self.folder / f"{name}.{size}.part"  # its name says how much room it will take
                partial.unlink(missing_ok=True)
                self.reserve(partial, size)
                try:
                    download(url, partial, size=size)
                    with locked(self.folder / "locks" / "room"):  # who counts meanwhile might see neither name
                        os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot keep a copy of {url} here: {error.strerror or error}; "
                "set VIT_CACHE to a folder with room"
            ) from error
        return path

    def lock_of(self, name: str) -> Path:
        """Return where whoever fetches a shard holds a lock; these files stay, empty."""
        return self.folder / "locks" / name

    def reserve(self, partial: Path, size: int) -> None:
        """Create the file that is going to be fetched once there is room for it."""
        while True:
            with locked(self.folder / "locks" / "room"):
                if self.make_room(size):
                    partial.touch()
                    return
            time.sleep(WAIT_SECONDS)  # others' copies under way need it all; they will be done

    def make_room(self, size: int) -> bool:
        """Remove the least recently used copies until `size` more bytes are within the limit."""
        used, copies = 0, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".part"):
                    used += self.under_way(entry)
                elif entry.name.endswith(".tar"):
                    status = entry.stat()
                    used += status.st_size
                    copies.append((status.st_mtime_ns, entry.path, status.st_size))
        for _, path, freed in sorted(copies):
            if used + size <= self.limit_bytes:
                break
            Path(path).unlink(missing_ok=True)
            used -= freed
        return used + size <= self.limit_bytes

    def under_way(self, entry: os.DirEntry[str]) -> int:
        """Return the bytes that a copy under way will take; remove what a killed process left."""
        name, size, _ = entry.name.split(".")
        with locked(self.lock_of(name), wait=False) as free:
            if free:
                Path(entry.path).unlink(missing_ok=True)
                return 0
        return int(size)


def download(url: str, path: Path, *, size: int) -> None:
    """Copy a remote file of known size; raise DataError after the last of a few attempts."""
    filesystem, remote = connect(url)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * 4 ** (attempt - 1))
        try:
            filesystem.get_file(remote, str(path))
            found = path.stat().st_size
            if found == size:
                return
            failure = f"got {found:,} bytes, expected {size:,}"
        except Exception as error:
            if isinstance(error, OSError) and error.filename == str(path):
                raise  # our own disk
            failure = one_line(error)
    raise DataError(f"{url}: cannot fetch this shard: {failure}; tried {ATTEMPTS} times")
