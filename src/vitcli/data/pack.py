"""Any source to tar shards in the WebDataset convention: `000000000.jpg` + `000000000.cls`, `_info.json`, `classnames.txt`.

Images in no classes have neither labels nor a list of names. What is written is a function of the source and the settings:
order by seed, no times and no owners in the tars. Each shard is written under a temporary name, flushed, read back, renamed;
`_pack.json` remembers the settings and what is done, so the same call goes on where a killed one stopped, and another one is
refused.
"""

import hashlib
import io
import itertools
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from vitcli.data.images import decode
from vitcli.data.parallel import in_processes
from vitcli.data.protocol import EncodedSource, Source, UniformSource, is_labelled
from vitcli.data.tar import iter_members
from vitcli.errors import DataError
from vitcli.randomness import derive_seed, permute

__all__ = ["SPLIT_NAMES", "PackSettings", "PackedSplit", "pack", "pack_order", "suffix_by_content"]

FORMAT_VERSION = 1
INFO, NAMES, STATE = "_info.json", "classnames.txt", "_pack.json"
SPLIT_NAMES = {"train": "train", "val": "validation"}  # as in published shards
SAMPLE = 200  # images encoded to estimate their size
DECODED_OF_A_SHARD = 8  # images decoded when a shard is read back, unless all are
BATCH = 64  # images of a uniform source made at a time
JPEG_QUALITY = 95  # of images that only had to be scaled
TAR_BLOCK, TAR_RECORD = 512, 10_240  # bytes; a tar file is whole records
SAVE_SECONDS = 1.0  # of work that a killed process does again


@dataclass(frozen=True)
class PackSettings:
    """What the shards' bytes depend on, besides the source."""

    shard_bytes: int
    examples_per_shard: int | None = None  # None: as many as make shard_bytes
    resize: int | None = None  # largest short side, px
    quality: int | None = None  # of JPEG; None keeps files that need no scaling
    seed: int = 0


@dataclass(frozen=True)
class PackedSplit:
    """What a split has become."""

    shards: list["Shard"]
    left_out: int  # examples that the caller's list names
    written: int  # shards of this call; the others were there

    @property
    def examples(self) -> int:
        """Return the number of images."""
        return sum(shard.examples for shard in self.shards)


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    name: str
    examples: int
    bytes: int


def pack(
    source: Source,
    folder: Path,
    *,
    split: Literal["train", "val"],
    settings: PackSettings,
    left_out: frozenset[str] = frozenset(),
    decode_all: bool = False,
    jobs: int | None = None,
) -> PackedSplit:
    """Write a split's shards into `folder`, as far as they are not there; the caller keeps other processes out of it.

    Args:
        left_out: places (`source.where`) of examples that are not to be packed.
        decode_all: decode everything when a shard is read back, not only a sample.
        jobs: processes; None takes one for each core.

    Raises:
        DataError: the folder holds something else, an example cannot be read, the disk is full, or what is read back is wrong.
    """
    check_classes(source, folder)
    keep, named = np.arange(len(source)), ""
    if left_out:
        places = [source.where(i) for i in range(len(source))]
        keep = np.array([i for i, place in enumerate(places) if place not in left_out], np.int64)
        named = "\0".join(sorted(left_out.intersection(places)))
    if not len(keep):
        raise DataError(f"{source.name}: nothing to pack; the list to leave out names all {len(source):,} images")
    order = pack_order(source, keep, seed=settings.seed)
    per_shard = settings.examples_per_shard or examples_that_fill(source, order, settings)
    recipe = {
        "format": FORMAT_VERSION,
        "source": source.name,
        "fingerprint": source.fingerprint,
        "images": len(order),
        "left_out": hashlib.sha256(named.encode(errors="surrogateescape")).hexdigest()[:16] if named else None,
        "examples_per_shard": per_shard,
        "resize": settings.resize,
        "quality": settings.quality,
        "seed": settings.seed,
    }
    state = PackState.open(folder, SPLIT_NAMES[split], recipe)
    names = [f"{SPLIT_NAMES[split]}-{number:06d}.tar" for number in range(-(-len(order) // per_shard))]
    missing = [number for number, name in enumerate(names) if not state.has(name)]
    writer = ShardWriter(source, order, names, folder, per_shard, settings, decode_all)
    bar = tqdm(total=len(order), desc=f"packing {SPLIT_NAMES[split]}", unit="img", leave=False, delay=1.0, disable=None)
    saved = time.monotonic()
    with bar:
        bar.update(sum(shard.examples for shard in state.shards.values()))
        try:
            with closing(in_processes(writer, missing, jobs=jobs)) as done:
                for shard in done:
                    state.shards[shard.name] = shard
                    bar.update(shard.examples)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        state.save()
                        saved = time.monotonic()
        finally:
            for leftover in folder.glob(f".tmp-{SPLIT_NAMES[split]}-*.tar"):  # of processes that were ended
                leftover.unlink()
            state.save()
    shards = [state.shards[name] for name in names]
    if is_labelled(source):
        write_whole(folder / NAMES, "".join(f"{name}\n" for name in source.classes))
    write_info(folder, SPLIT_NAMES[split], shards)
    return PackedSplit(shards, left_out=len(source) - len(order), written=len(missing))


def pack_order(source: Source, keep: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Return the indices `keep` in the order in which they are written: shuffled, so that shuffling blocks later is enough.

    Of a remote source its blocks are shuffled, then each block within itself: reading all over it would fetch every shard
    again and again.
    """
    shuffled = permute(np.arange(len(keep)), len(keep), derive_seed(seed, "pack"))
    if not source.remote or source.block_starts is None:
        return keep[shuffled]
    blocks = len(source.block_starts) - 1
    block = np.searchsorted(source.block_starts, keep, side="right") - 1
    turn = permute(np.arange(blocks), blocks, derive_seed(seed, "pack-blocks"))
    return keep[np.lexsort((shuffled, turn[block]))]


def examples_that_fill(source: Source, order: NDArray[np.int64], settings: PackSettings) -> int:
    """Return how many examples make a shard of about `shard_bytes`, from the size of some."""
    spread = order[np.unique(np.linspace(0, len(order) - 1, SAMPLE).astype(np.int64))]
    label = entry_bytes(1) if is_labelled(source) else 0
    sizes = [entry_bytes(len(item.data)) + label for item in items(source, spread, settings)]
    return max(1, round(settings.shard_bytes / float(np.mean(sizes))))


def entry_bytes(length: int) -> int:
    """Return what a member of this length takes up in a tar."""
    return TAR_BLOCK + -(-length // TAR_BLOCK) * TAR_BLOCK


# ---------------------------------------------------------------- from examples to files


@dataclass(frozen=True)
class Item:
    """An image file and its label, as they are stored."""

    where: str
    suffix: str
    data: bytes
    label: int


def items(source: Source, indices: NDArray[np.int64], settings: PackSettings) -> Iterator[Item]:
    """Yield examples as files."""
    if source.uniform and not source.encoded:
        for start in range(0, len(indices), BATCH):
            part = indices[start : start + BATCH]
            images, labels = cast(UniformSource, source).batch(part)
            for index, image, label in zip(part.tolist(), images, labels.tolist(), strict=True):
                yield Item(source.where(index), *file_of(image, "png", settings), label)
        return
    for index in indices.tolist():
        where = source.where(index)
        if not source.encoded:
            image, label = source[index]
            yield Item(where, *file_of(image, "png", settings), label)
            continue
        encoded = cast(EncodedSource, source)
        yield Item(where, *stored_file(encoded.read(index), where, settings), int(encoded.labels[index]))


def stored_file(data: bytes, where: str, settings: PackSettings) -> tuple[str, bytes]:
    """Return suffix and content for a file: its own, where nothing is to be changed."""
    suffix = suffix_by_content(data)
    if suffix is not None and settings.resize is None and settings.quality is None:
        return suffix, data
    image = decode(data, where=where)
    if (
        suffix is not None
        and settings.quality is None
        and settings.resize is not None
        and min(image.shape[:2]) <= settings.resize
    ):
        return suffix, data
    return file_of(image, "jpg" if suffix in ("jpg", "webp") else "png", settings)


def suffix_by_content(data: bytes) -> str | None:
    """Return jpg, png or webp for a file that begins as one, else None."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def file_of(image: NDArray[np.uint8], suffix: str, settings: PackSettings) -> tuple[str, bytes]:
    """Scale an image (H, W, 3) down, if it is to be, and encode it; grey ones with one channel, which decodes to the same."""
    grey = bool((image == image[:, :, :1]).all())
    picture = Image.fromarray(np.ascontiguousarray(image[:, :, 0]) if grey else image)
    short = min(picture.size)
    if settings.resize is not None and short > settings.resize:
        width, height = (max(1, round(side * settings.resize / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if settings.quality is not None or suffix == "jpg":
        picture.save(out, format="JPEG", quality=settings.quality or JPEG_QUALITY)
        return "jpg", out.getvalue()
    picture.save(out, format="PNG")
    return "png", out.getvalue()


# ---------------------------------------------------------------- one shard


@dataclass(frozen=True)
class ShardWriter:
    """Write shard number n, in whichever process."""

    source: Source
    order: NDArray[np.int64]
    names: list[str]
    folder: Path
    per_shard: int
    settings: PackSettings
    decode_all: bool

    def __call__(self, number: int) -> Shard:
        path = self.folder / self.names[number]
        temporary = path.with_name(f".tmp-{path.name}")
        first = number * self.per_shard
        indices = self.order[first : first + self.per_shard]
        written: list[tuple[str, int, int]] = []  # name, length and checksum of every member
        places, labelled = [], is_labelled(self.source)
        try:
            with open(temporary, "wb") as sink:
                for position, item in zip(itertools.count(first), items(self.source, indices, self.settings)):
                    label = [("cls", str(item.label).encode())] if labelled else []
                    for suffix, data in [(item.suffix, item.data), *label]:
                        name = f"{position:09d}.{suffix}"
                        sink.write(member_header(name, len(data)) + data + bytes(-len(data) % TAR_BLOCK))
                        written.append((name, len(data), zlib.crc32(data)))
                    places.append(item.where)
                end = sink.tell() + 2 * TAR_BLOCK
                sink.write(bytes(2 * TAR_BLOCK + -end % TAR_RECORD))
                sink.flush()
                os.fsync(sink.fileno())
            read_back(temporary, written, places, step=1 if self.decode_all else max(1, len(places) // DECODED_OF_A_SHARD))
            size = temporary.stat().st_size
            os.replace(temporary, path)
            sync_folder(self.folder)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error.strerror}); free some space or choose another folder"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return Shard(path.name, len(indices), size)


def member_header(name: str, size: int) -> bytes:
    """Return the POSIX ustar header of a file that says nothing of when and by whom: time 0, user 0, mode 644.

    The standard library writes the same bytes; it takes longer for them than reading and writing a small image does.
    """
    fields = (name.encode().ljust(100, b"\0"), b"0000644\0" + 2 * b"0000000\0", b"%011o\0" % size, b"00000000000\0")
    front, back = b"".join(fields), (b"0" + bytes(100) + b"ustar\x0000").ljust(TAR_BLOCK - 156, b"\0")
    checksum = sum(front) + 8 * ord(" ") + sum(back)
    return front + b"%06o\0 " % checksum + back


def read_back(path: Path, written: list[tuple[str, int, int]], places: list[str], *, step: int) -> None:
    """Compare a shard with what was to be written: names, lengths, checksums; decode every `step`-th image.

    Raises:
        DataError: it differs, or an image cannot be decoded; names the place the image came from.
    """
    found: list[tuple[str, int, int]] = []
    members = len(written) // len(places)  # of each image
    with open(path, "rb") as shard, open(path, "rb") as contents:
        for member in iter_members(shard, where=str(path)):
            contents.seek(member.offset)
            data = contents.read(member.size)
            image, is_label = divmod(len(found), members)
            if not is_label and image % step == 0 and image < len(places):
                decode(data, where=places[image])
            found.append((member.name, len(data), zlib.crc32(data)))
    if found != written:
        wrong = next((a[0] for a, b in zip(written, found) if a != b), "its end")
        raise DataError(f"{path}: read back, {wrong} is not what was written; check the disk, then run the command again")


# ---------------------------------------------------------------- the folder


@dataclass
class PackState:
    """What `_pack.json` remembers of a split."""

    path: Path
    split: str
    recipe: dict[str, Any]
    shards: dict[str, Shard]

    @classmethod
    def open(cls, folder: Path, split: str, recipe: dict[str, Any]) -> "PackState":
        """Read the state of a split in a folder, or begin it.

        Raises:
            DataError: the split was packed from something else, or by something else.
        """
        path = folder / STATE
        stored = read_object(path).get(split)
        if stored is not None:
            before = stored["recipe"]
            differing = [
                key for key in recipe if key != "source" and before.get(key) != recipe[key]
            ]  # one set has many spellings
            if differing:
                said = ", ".join(f"{key} ({before.get(key)} there, {recipe[key]} now)" for key in differing)
                raise DataError(
                    f"{folder}: the {split} shards there were packed otherwise: {said}; choose another folder, or take the "
                    "settings back"
                )
            return cls(path, split, recipe, {name: Shard(**shard) for name, shard in stored["shards"].items()})
        strangers = sorted(path.name for path in folder.glob(f"{split}-*.tar"))
        if strangers or (split in read_object(folder / INFO).get("splits", {})):
            raise DataError(f"{folder}: has {split} shards that this command has not written; choose another folder")
        state = cls(path, split, recipe, {})
        state.save()
        return state

    def has(self, name: str) -> bool:
        """Tell whether a shard is there as it was written; forget one that is not."""
        shard = self.shards.get(name)
        path = self.path.with_name(name)
        if shard is not None and path.is_file() and path.stat().st_size == shard.bytes:
            return True
        self.shards.pop(name, None)
        return False

    def save(self) -> None:
        """Write the state, beside that of other splits."""
        shards = {name: asdict(self.shards[name]) for name in sorted(self.shards)}
        states = read_object(self.path) | {self.split: {"recipe": self.recipe, "shards": shards}}
        write_whole(self.path, json.dumps(states, indent=1) + "\n")


def write_info(folder: Path, split: str, shards: list[Shard]) -> None:
    """Add a split to `_info.json`: the file names, how many images each holds, and their sum."""
    info = read_object(folder / INFO)
    entry = {
        "name": split,
        "filenames": [shard.name for shard in shards],
        "shard_lengths": [shard.examples for shard in shards],
        "num_samples": sum(shard.examples for shard in shards),
    }
    write_whole(folder / INFO, json.dumps({"splits": {**info.get("splits", {}), split: entry}}, indent=1) + "\n")


def check_classes(source: Source, folder: Path) -> None:
    """Raise DataError if the classes cannot be listed line by line, or differ from those of the split already packed."""
    path = folder / NAMES
    if not is_labelled(source):
        if path.exists():
            raise DataError(f"{path}: lists classes, and the images of {source.name} are in none; choose another folder")
        return
    broken = [name for name in source.classes if not name or name != name.strip() or "\t" in name or len(name.splitlines()) > 1]
    if broken:
        raise DataError(f"{source.name}: {NAMES} has one class name a line, which {broken[0]!r} cannot be; rename the class")
    if path.exists() and path.read_text(encoding="utf-8").splitlines() != source.classes:
        raise DataError(f"{path}: lists other classes than {source.name} has; choose another folder")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); remove the folder, and pack again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object; remove the folder, and pack again")
    return value


def write_whole(path: Path, text: str) -> None:
    """Put text into a file so that a kill at any moment leaves the old content or all of the new."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); free some space or choose another folder") from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
