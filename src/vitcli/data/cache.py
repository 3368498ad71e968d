"""Decoded pixels on disk: a data set is decoded once, then memory-mapped by every run and loader process.

One raw file of bytes, image after image, and a table of sizes, in a folder named after everything the pixels depend on.
The folder is written under a temporary name and renamed: two processes may race, a killed one leaves no half cache.
"""

import contextlib
import hashlib
import io
import logging
import os
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vitcli.data.folders import ImageFiles
from vitcli.data.images import decode, read_size
from vitcli.data.protocol import EncodedSource

__all__ = ["Pixels", "cache_key", "decode_once", "default_cache_dir", "estimate_decoded_bytes"]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # goes into the key: raise it when `to_rgb` or the file layout changes
SAMPLE = 64  # headers read for the estimate
CHUNK = 64  # images per task: enough to hide the hand-over, little enough to bound what waits in memory
MOST_DECODERS = 8  # threads or processes
WORTH_PROCESSES = 2000  # images; below, starting processes takes longer than it saves
STALE_SECONDS = 24 * 3600  # a temporary folder this old belongs to a process that was killed


class Pixels:
    """The decoded images of a set: one flat uint8 array and (N, 2) heights and widths; memory-mapped when it has a path."""

    def __init__(self, flat: NDArray[np.uint8], sizes: NDArray[np.int64], *, path: Path | None) -> None:
        self.flat = flat
        self.sizes = sizes  # (N, 2)
        self.path = path
        self.starts = np.concatenate([[0], np.cumsum(3 * sizes[:, 0] * sizes[:, 1])])  # (N + 1,) bytes

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        height, width = self.sizes[index]
        return self.flat[self.starts[index] : self.starts[index + 1]].reshape(height, width, 3)

    @property
    def uniform(self) -> bool:
        """Whether all images have one size."""
        return bool((self.sizes == self.sizes[0]).all())

    def stacked(self) -> NDArray[np.uint8]:
        """View a uniform set as (N, H, W, 3)."""
        height, width = self.sizes[0]
        return self.flat.reshape(len(self.sizes), height, width, 3)

    def __getstate__(self) -> dict[str, object]:
        """Leave mapped bytes out: a loader process maps the file again instead of receiving a copy."""
        return {**self.__dict__, "flat": None if self.path else self.flat}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if self.path:
            self.flat = np.memmap(self.path, np.uint8, mode="r").view(np.ndarray)


def default_cache_dir() -> Path:
    """Return $VIT_CACHE, or ~/.cache/vit."""
    return Path(os.environ.get("VIT_CACHE") or "~/.cache/vit").expanduser()


def estimate_decoded_bytes(source: EncodedSource) -> int:
    """Estimate the decoded size of a set from the headers of a few images spread over it."""
    sample = np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(np.int64)).tolist()
    shapes = [read_size(source.read(i), where=source.where(i)) for i in sample]
    return round(float(np.mean([3 * height * width for height, width in shapes])) * len(source))


def cache_key(files: ImageFiles) -> str:
    """Hash what the decoded pixels depend on: each file's relative path, size and time."""
    digest = hashlib.sha256(f"{files.root.resolve()}\n".encode())
    digest.update("\n".join(files.relative).encode(errors="surrogateescape"))
    digest.update(files.bytes.tobytes())
    digest.update(files.mtimes.tobytes())
    return digest.hexdigest()[:24]


def decode_once(source: EncodedSource, *, key: str, cache_dir: Path, name: str) -> Pixels:
    """Return the decoded set: mapped from `cache_dir` when it is there, else decoded now and stored.

    `key` stands for everything the pixels depend on but our own format. Where the cache cannot be written (no permission, disk
    full) the pixels stay in memory, and a notice says so.

    Raises:
        DataError: an image is damaged; nothing is stored then.
    """
    folder = cache_dir / "decoded" / hashlib.sha256(f"v{FORMAT_VERSION}\n{key}".encode()).hexdigest()[:24]
    pixels = open_cache(folder, count=len(source))
    if pixels is not None:
        return pixels
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
        try:
            with open(temporary / "pixels.bin", "wb") as sink:
                sizes = decode_into(sink, source, name=name)
                sink.flush()
                os.fsync(sink.fileno())
            np.save(temporary / "sizes.npy", sizes)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.is_dir():
                    raise  # otherwise another process was faster, and its pixels are the same
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        pixels = open_cache(folder, count=len(source))
        if pixels is not None:
            return pixels
        notice = "the file read back is damaged"
    except OSError as error:
        notice = error.strerror or str(error)
    logger.warning("%s: cannot keep decoded images in %s (%s); decoding into memory for this run", name, cache_dir, notice)
    memory = io.BytesIO()
    sizes = decode_into(memory, source, name=name)
    return Pixels(np.frombuffer(memory.getbuffer(), np.uint8), sizes, path=None)


def open_cache(folder: Path, *, count: int) -> Pixels | None:
    """Map a stored set; None (and the folder gone) when it is absent or damaged."""
    if not folder.is_dir():
        return None
    try:
        sizes = np.load(folder / "sizes.npy", allow_pickle=False)
        flat = np.memmap(folder / "pixels.bin", np.uint8, mode="r").view(np.ndarray)
        if sizes.shape == (count, 2) and flat.size == int((3 * sizes[:, 0] * sizes[:, 1]).sum()):
            return Pixels(flat, sizes, path=folder / "pixels.bin")
    except (OSError, ValueError, EOFError):
        pass
    logger.warning("%s: damaged cache of decoded images, decoding again", folder)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def remove_stale(folder: Path) -> None:
    for leftover in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):  # another process may be removing it too
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def decode_into(sink: BinaryIO, source: EncodedSource, *, name: str) -> NDArray[np.int64]:
    """Write all pixels in order to `sink`; return (N, 2) heights and widths."""
    sizes: list[tuple[int, int]] = []
    bar = tqdm(total=len(source), desc=f"decoding {name} (once)", unit="img", leave=False, delay=1.0, disable=None)
    with bar, decoders(len(source)) as pool:
        for pixels, shapes in in_order(pool, source):
            sink.write(pixels)
            sizes.extend(shapes)
            bar.update(len(shapes))
    return np.array(sizes, np.int64)


def decoders(images: int) -> Executor:
    """Return threads for a small set; processes for a large one, because Pillow holds the interpreter lock on small images."""
    workers = min(MOST_DECODERS, os.cpu_count() or 1)
    if images < WORTH_PROCESSES:
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, initializer=leave_interrupts)


def leave_interrupts() -> None:
    """Let Ctrl-C, which reaches all processes, end the main one only; it ends these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler, which forked processes inherit


def decode_chunk(files: list[tuple[bytes, str]]) -> tuple[bytes, list[tuple[int, int]]]:
    """Return the pixels of some files, one after the other, and their heights and widths."""
    images = [decode(data, where=where) for data, where in files]
    return b"".join(image.tobytes() for image in images), [image.shape[:2] for image in images]


def in_order(pool: Executor, source: EncodedSource) -> Iterator[tuple[bytes, list[tuple[int, int]]]]:
    """Decode chunks of images on the pool, yield them in order, with a bounded number waiting."""
    waiting: deque[Future[tuple[bytes, list[tuple[int, int]]]]] = deque()
    try:
        for start in range(0, len(source), CHUNK):
            some = range(start, min(start + CHUNK, len(source)))
            waiting.append(pool.submit(decode_chunk, [(source.read(i), source.where(i)) for i in some]))
            if len(waiting) > 2 * MOST_DECODERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
