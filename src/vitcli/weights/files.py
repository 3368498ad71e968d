"""Tensors out of a file of any format in use, recognised by its content, never executing anything and never beyond the memory.

safetensors (also in shards, by their index.json), torch.save's archives, and numpy's .npz. A torch file is walked through
before torch reads it, with `weights_only=True`: it may hold tensors, numbers and words in plain containers. What an archive
says of its sizes is checked before anything is allocated.
"""

import io
import json
import math
import os
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.optimizer_file import (
    BYTES_PER_ELEMENT,
    END,
    MOST_PICKLE_BYTES,
    Outline,
    Stored,
    outline_of_tensor,
    refuse_two_directories,
)

__all__ = ["FOLDER_NAMES", "RawWeights", "read_tensors", "weights_file_in"]

Kind = Literal["safetensors", "torch", "npz"]
# what a folder of weights may hold, in the order of preference: Hugging Face's names, and timm's are among them
FOLDER_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MOST_INDEX_BYTES = 64 << 20
MOST_TENSORS = 100_000  # ViT-e has 900
MOST_INFLATED = (
    64 << 20
)  # bytes that any archive may hold; beyond it, no more than MOST_TIMES its size: weights do not compress
MOST_TIMES = 20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER, of torch.save before 1.6
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # where training scripts keep the weights: averaged ones first


@dataclass(frozen=True)
class RawWeights:
    """Tensors on the CPU by the names the file gives them, in its dtypes, and whatever else it says as plain values."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    kind: Kind


def weights_file_in(path: Path) -> Path:
    """Return the weights file that stands for `path`: itself, or the one a folder holds by a customary name.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        return path
    for name in FOLDER_NAMES:
        if (path / name).exists():
            return path / name
    raise CheckpointError(f"{path}: a folder without weights; expected one of {', '.join(FOLDER_NAMES)} in it, or give a file")


def read_tensors(path: Path) -> RawWeights:
    """Read a weights file, or the one a folder holds; of a sharded one, by its index.json, all parts.

    Raises:
        CheckpointError: it is of no known format, damaged, larger than the memory, or holds more than data; one line.
    """
    path = weights_file_in(path)
    with one_line(path):
        start = head_of(path)
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8:
            return read_safetensors(path)  # first: the length it begins with may look like the beginning of anything
        if start[:4] == b"PK\3\4":
            with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                names = [record.filename for record in archive.infolist()]
                is_npz = bool(names) and all(name.endswith(".npy") for name in names)
                if is_npz:
                    return RawWeights(read_npz(archive, os.path.getsize(path)), {}, "npz")
            if any(PurePosixPath(name).name == "data.pkl" for name in names):
                return read_torch(path, outline_archive)
            raise ValueError("a zip archive of neither arrays (.npz) nor torch's; expected a weights file")
        if start[:2] in (b"PK", b"\x1f\x8b", b"BZ"):
            raise ValueError("an empty or packed archive; unpack it and give the weights file in it")
        if start[:6] == npy.MAGIC_PREFIX:
            raise ValueError("one array (.npy); expected an archive of named ones (.npz)")
        if start[:1] == b"\x80":
            return read_torch(path, outline_legacy)
        if start[:1] == b"{":
            return read_shards(path)
        raise ValueError("not a weights file, or a damaged one; expected .safetensors, a torch file or an .npz")


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn whatever the readers of archives and pickles raise into one line that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError:
        raise CheckpointError(f"{path}: does not fit into the memory") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, SafetensorError, pickle.UnpicklingError),
        *(RuntimeError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError, SyntaxError),
    ) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({first_line(error)}); take a fresh copy") from error


def first_line(error: BaseException) -> str:
    """Return the beginning of what an error says."""
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__


def memory_bytes() -> int:
    """Return how much memory this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def head_of(path: Path) -> bytes:
    """Return the first 16 bytes of a plain file that is not larger than the memory."""
    if not path.is_file():  # a pipe would wait for ever
        if path.exists():
            raise ValueError("is not a plain file")
        raise FileNotFoundError
    size = path.stat().st_size
    if size > memory_bytes():
        raise ValueError(f"has {size:,} bytes; at most {memory_bytes():,} can be read here")
    with open(path, "rb") as file:
        start = file.read(16)
    if size < 8 and start[:1] != b"{":  # an index of parts, that is a damaged one
        raise ValueError(f"has {size} bytes; expected a weights file")
    return start


def refuse_bomb(total: int, size: int) -> None:
    """Raise ValueError where an archive of `size` bytes says it holds `total` that no weights would."""
    if total > memory_bytes():
        raise ValueError(f"holds {total:,} bytes; at most {memory_bytes():,} can be read here")
    if total > max(MOST_INFLATED, MOST_TIMES * size):
        raise ValueError(f"{size:,} bytes that inflate to {total:,}, which weights never do")


# ---------------------------------------------------------------- numpy


def read_npz(archive: zipfile.ZipFile, size: int) -> dict[str, Tensor]:
    """Read an archive of arrays, after a look at what it says of their sizes."""
    records = archive.infolist()
    if len(records) > MOST_TENSORS:
        raise ValueError(f"{len(records):,} arrays, at most {MOST_TENSORS:,} can be read")
    if len({record.filename for record in records}) < len(records):
        raise ValueError("two arrays of one name")
    refuse_bomb(sum(record.file_size for record in records), size)
    tensors = {}
    for record in records:
        name = record.filename.removesuffix(".npy")
        with archive.open(record) as file:
            tensors[name] = read_array(file, name, record.file_size)
    return tensors


def read_array(file: IO[bytes], name: str, size: int) -> Tensor:
    """Read one array of `size` bytes, header included; bfloat16, which numpy has not, is kept there as plain 2-byte values."""
    counted = Counting(file)
    version = npy.read_magic(counted)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name!r} is written in version {version} of numpy's format, expected 1.0 or 2.0")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(counted)
    if dtype.hasobject:
        raise ValueError(f"{name!r} holds pickled objects, and unpickling can run anything; expected numbers")
    if dtype.kind not in "fiub" and dtype.str != "|V2":
        raise ValueError(f"{name!r} holds {dtype}, expected numbers")
    expected = math.prod(shape) * dtype.itemsize
    if any(side < 0 for side in shape) or expected != size - counted.read_bytes:
        raise ValueError(f"{name!r} of shape {shape} has {size - counted.read_bytes:,} bytes where {expected:,} belong")
    content = bytearray(file.read())  # which checks its checksum too
    if len(content) != expected:
        raise ValueError(f"{name!r} is cut short")
    array = np.frombuffer(content, dtype)
    if dtype.str == "|V2":
        flat = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        flat = torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))
    return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape)))) if fortran else flat.reshape(shape)


class Counting(io.RawIOBase):
    """Counts what is read of an array's header, which may not be long."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.read_bytes = 0

    def read(self, size: int = -1) -> bytes:
        """Read as the file does, up to 64 KiB in all."""
        if size < 0 or self.read_bytes + size > 1 << 16:
            raise ValueError("an array's header of more than 64 KiB")
        content = self.file.read(size)
        self.read_bytes += len(content)
        return content


# ---------------------------------------------------------------- safetensors


def read_safetensors(path: Path) -> RawWeights:
    """Read a safetensors file; its tensors are copies, for the library's are the file, which somebody may cut short."""
    try:
        with safe_open(path, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name).clone() for name in weights.keys()}  # noqa: SIM118 (not a mapping)
            return RawWeights(tensors, dict(weights.metadata() or {}), "safetensors")
    except SafetensorError as error:
        raise ValueError(f"a damaged safetensors file ({first_line(error)}); take a fresh copy") from error


def read_shards(path: Path) -> RawWeights:
    """Read all parts that an index names: {"weight_map": {tensor: file}}, files beside the index."""
    if path.stat().st_size > MOST_INDEX_BYTES:
        raise ValueError("a text of that length is no index of weights")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError("neither weights nor the index.json of sharded ones") from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError("not the index of sharded weights: it has no `weight_map`; expected a weights file")
    files = sorted(set(places.values()))
    for name in files:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or name.endswith(".json"):
            raise ValueError(f"a part {name[:100]!r}; expected weights beside the index")
    sizes = [(path.parent / name).stat().st_size for name in files if (path.parent / name).exists()]
    if sum(sizes) > memory_bytes():
        raise ValueError(f"its parts have {sum(sizes):,} bytes; at most {memory_bytes():,} can be read here")
    tensors: dict[str, Tensor] = {}
    kind: Kind = "safetensors"
    for name in files:
        part = read_tensors(path.parent / name)
        kind = part.kind
        expected = {tensor for tensor, place in places.items() if place == name}
        if expected != part.tensors.keys():
            differing = sorted(expected ^ part.tensors.keys())
            raise ValueError(f"the part {name} is not as the index says: {differing[0]!r} and {len(differing) - 1} more differ")
        tensors |= part.tensors
    return RawWeights(tensors, index.get("metadata") if isinstance(index.get("metadata"), dict) else {}, kind)


# ---------------------------------------------------------------- torch


def read_torch(path: Path, look_through: Callable[[Path], None]) -> RawWeights:
    """Read what torch.save wrote, once `look_through` has found nothing in it but data."""
    try:
        look_through(path)
    except (ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"a torch file that cannot be read safely ({first_line(error)}); save the tensors alone, "
            "with torch.save(model.state_dict(), ...), or as .safetensors"
        ) from error
    with torch.no_grad():
        # mapped, not read: what training scripts keep beside the weights, an optimizer's state say, costs nothing
        mapped = look_through is outline_archive and ".safetensors" not in path.name.lower()
        try:
            with open(path, "rb") as file:  # torch goes by the name where it is given one that ends so
                content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # it raises whatever it meets, failed assertions too
            raise ValueError(f"damaged or cut short ({first_line(error)}); take a fresh copy") from error
    state, around = weights_in(content)
    return RawWeights({name: tensor.detach().clone() for name, tensor in state.items()}, around, "torch")


def weights_in(content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Find the state dict in what a training script saved; return it and the plain values around it."""
    around: dict[str, Any] = {}
    for _ in range(3):
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, expected a state dict")
        if content and all(isinstance(value, Tensor) for value in content.values()):
            break
        inner = next((key for key in NESTED if isinstance(content.get(key), dict) and content[key]), None)
        if inner is None:
            break
        around |= {key: value for key, value in content.items() if isinstance(value, bool | int | float | str | None)}
        around["part"] = inner
        content = content[inner]
    state = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if not state:
        raise ValueError(f"holds no tensors by name; expected a state dict, alone or as one of {', '.join(NESTED)}")
    for wrapper in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state, around


def outline_archive(path: Path) -> None:
    """Raise ValueError unless an archive of torch's holds plain tensors no larger than its records."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        size = path.stat().st_size
        file.seek(max(0, size - END.size))
        refuse_two_directories(file.read(), size)
        if len({info.filename for info in infos}) < len(infos):
            raise ValueError("two records of one name")
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError("a compressed record, which torch never writes")
        if sum(info.file_size for info in infos) > size:
            raise ValueError("records larger than the file")
        folders = {info.filename.split("/")[0] for info in infos}
        if len(folders) != 1:
            raise ValueError("records in several folders")
        folder = folders.pop()
        if f"{folder}/constants.pkl" in archive.namelist() or any("/code/" in info.filename for info in infos):
            raise ValueError("a TorchScript program; expected tensors alone")
        # named as in an optimizer's file of ours, whose outline is shared
        records = {f"archive{info.filename.removeprefix(folder)}": info.file_size for info in infos}
        if records.get("archive/data.pkl", 0) > MOST_PICKLE_BYTES:
            raise ValueError(f"a pickle of more than {MOST_PICKLE_BYTES >> 20} MB")
        content = archive.read(f"{folder}/data.pkl")
    refuse_large_memo(content)
    WeightsOutline(content, records).load()


def outline_legacy(path: Path) -> None:
    """Raise ValueError unless a file of torch before 1.6, pickles and then the storages, holds tensors no larger than it is."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        # a length that a pickle gives for a word of its own is read at once, so the pickles alone may not be long
        content = file.read(min(size, 2 * MOST_PICKLE_BYTES))
    position = 0
    outlines = []
    for _ in range(5):  # magic number, version, machine, the state, the storages' keys
        stream = io.BytesIO(content[position:])
        length = 0
        for _opcode, _argument, place in pickletools.genops(stream):
            length = (place or 0) + 1
        part = content[position : position + length]
        refuse_large_memo(part)
        outline = LegacyOutline(part, size)
        outlines.append(outline.load())
        if len(outlines) == 1 and outlines[0] != LEGACY_MAGIC:
            raise ValueError("a bare pickle, and unpickling can run anything")
        position += length


def refuse_large_memo(content: bytes) -> None:
    """Raise unless a pickle's memo is no larger than the pickle: the reader allocates up to the largest index it names."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(content):
            raise ValueError("an index beyond the end")


class Plain(dict[Any, Any]):
    """Stands for an ordered dict and takes the attributes that state dicts carry."""

    def __setstate__(self, state: object) -> None:
        """Leave them out: versions of modules, which say nothing here."""


class WeightsOutline(Outline):
    """As for an optimiser's state, with what state dicts need besides."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for one of the few names that weights need."""
        if (module, name) == ("collections", "OrderedDict"):
            return Plain
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return outline_of_parameter
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return outline_of_tensor
        if module == "torch" and name in BYTES_PER_ELEMENT:
            return name
        if (module, name) == ("torch", "Size"):
            return tuple
        raise ValueError(f"it holds {shown(module)}.{shown(name)}, expected tensors, numbers and words alone")


class LegacyOutline(WeightsOutline):
    """Walks through a pickle of the old format, whose storages follow it in the file.

    Args:
        size: of the file in bytes.
    """

    def __init__(self, content: bytes, size: int) -> None:
        super().__init__(content, {})
        self.size = size
        self.seen: dict[str, int] = {}

    def persistent_load(self, pid: Any) -> Stored:
        """Check that all storages together are no larger than the file."""
        kind, storage, key, _, elements, *view = pid
        if kind != "storage" or not isinstance(key, str) or type(elements) is not int or elements < 0 or any(view):
            raise ValueError("a reference to something that is no tensor's storage")
        self.seen[key] = elements * BYTES_PER_ELEMENT[storage]
        if sum(self.seen.values()) > self.size:
            raise ValueError("tensors larger than the file")
        return Stored(elements)


def outline_of_parameter(data: object, requires_grad: object, hooks: object) -> None:
    """Take the arguments of torch's `_rebuild_parameter`, whose tensor is checked by now."""


def shown(word: str) -> str:
    """Return a name from a pickle as it may be shown."""
    return re.sub(r"[^\w.]", "?", word)[:80]
