"""An optimiser's state on disk: `torch.save`'s archive, read with `weights_only=True` after a look at what it asks for.

That reader runs no code of a file's, but it may allocate what a hostile file names: a record that inflates, a `bytearray` of
any length, a tensor larger than its record. So the archive's directory and pickle are walked first, and only plain tensors,
no larger than what is stored, in plain containers pass.
"""

import io
import math
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import CheckpointError

__all__ = ["read_optimizer", "write_optimizer"]

MOST_PICKLE_BYTES = 8 << 20  # ViT-H's is 0.1 MB
MOST_DIMENSIONS = 16
BYTES_PER_ELEMENT = {
    "BoolStorage": 1,
    "ByteStorage": 1,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "FloatStorage": 4,
    "IntStorage": 4,
    "DoubleStorage": 8,
    "LongStorage": 8,
}
RECORD = re.compile(
    r"archive/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+)"
)
# How every archive of torch's ends (APPNOTE 4.3.14 to 4.3.16): where the directory is said to be, in two ways
END = struct.Struct("<4sQ2H2L4Q 4sLQL 4s4H2LH")


def write_optimizer(path: Path, state: Mapping[str, Any]) -> None:
    """Write an optimiser's state as torch does; equal states give equal bytes."""
    try:
        with open(path, "wb") as file:
            torch.save(settled(dict(state)), file)
    except RuntimeError as error:
        # torch's zip writer closes itself after a failed write, fails at that too, and hides the reason
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def settled(value: Any) -> Any:
    """Rebuild containers in one order and with one pattern of sharing, both of which pickle writes down."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {settled(key): settled(value[key]) for key in sorted(value, key=lambda key: (type(key).__name__, key))}
    if isinstance(value, list | tuple):
        return type(value)([settled(item) for item in value])
    return sys.intern(value) if isinstance(value, str) else value


def read_optimizer(path: Path) -> dict[str, Any]:
    """Read an optimiser's state onto the CPU.

    Raises:
        CheckpointError: it is damaged, or holds anything but tensors, numbers, words and plain containers.
        OSError: it cannot be read.
    """
    try:
        look_through(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}, expected a dict")
    except OSError:
        raise
    except (Exception, MemoryError, RecursionError) as error:  # the readers of zips and pickles raise whatever they meet
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not an optimizer state that loads safely ({reason})") from error
    return state


# ---------------------------------------------------------------- before anything is built


def look_through(path: Path) -> None:
    """Raise ValueError or an unpickling error unless an archive holds plain tensors no larger than its records."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - END.size))
        refuse_two_directories(file.read(), size)
        with zipfile.ZipFile(file) as archive:
            records = {record.filename: record.file_size for record in archive.infolist()}
            for name in records:
                if RECORD.fullmatch(name) is None:
                    raise ValueError(f"a record {name!r}")
            if len(records) != len(archive.infolist()):
                raise ValueError("two records of one name")
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("a compressed record, which torch never writes")
            if sum(records.values()) > size:
                raise ValueError("records larger than the file")
            if records.get("archive/data.pkl", 0) > MOST_PICKLE_BYTES:
                raise ValueError("a pickle of more than 8 MB")
            content = archive.read("archive/data.pkl")
    refuse_large_numbers(content)
    Outline(content, records).load()


def refuse_two_directories(end: bytes, size: int) -> None:
    """Raise ValueError unless the end of an archive leaves one reading of where its directory is: torch's reader is another."""
    if len(end) < END.size:
        raise ValueError("no archive of torch's")
    fields = END.unpack(end)
    magic, directory_bytes, directory_start = (fields[0], fields[10], fields[14]), fields[8], fields[9]
    if magic != (b"PK\6\6", b"PK\6\7", b"PK\5\6") or fields[-1] != 0:
        raise ValueError("no archive of torch's")
    if not directory_start + directory_bytes == fields[12] == size - END.size:
        raise ValueError("a directory in another place than the archive's end says")


def refuse_large_numbers(content: bytes) -> None:
    """Raise unless a pickle's memo is no larger than the pickle: the reader allocates up to the largest index it names."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(content):
            raise ValueError("an index beyond the end")
        if opcode.name.startswith("EXT") or opcode.name in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"):
            raise ValueError(f"the instruction {opcode.name}, expected data alone")


class Stored:
    """Stands for a record that a pickle refers to."""

    __slots__ = ("elements",)

    def __init__(self, elements: int) -> None:
        self.elements = elements


class Outline(pickle.Unpickler):
    """Walks through a pickle and checks every tensor in it without building any.

    Args:
        records: sizes in bytes, by name in the archive.
    """

    def __init__(self, content: bytes, records: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(content))
        self.records = records

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for one of the few names a state needs."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return outline_of_tensor
        if module == "torch" and name in BYTES_PER_ELEMENT:
            return name
        raise ValueError(f"{module}.{name}, expected tensors, numbers and words alone")

    def persistent_load(self, pid: Any) -> Stored:
        """Check that a tensor's record is as large as the pickle says; one too short would be read beyond its end."""
        kind, storage, key, _, elements = pid
        if kind != "storage" or not isinstance(key, str) or type(elements) is not int:
            raise ValueError("a reference to something that is no tensor's record")
        if self.records.get(f"archive/data/{key}") != elements * BYTES_PER_ELEMENT[storage]:
            raise ValueError(f"the record {key!r} has not the size of its tensor")
        return Stored(elements)


def outline_of_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> None:
    """Check the arguments of torch's `_rebuild_tensor_v2`: a tensor holds no more elements than its record."""
    del rest  # requires_grad and hooks: torch checks them
    if not isinstance(storage, Stored) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor of something else than its record")
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise ValueError("a tensor whose sizes are no counts")
    if len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(size)} dimensions and {len(stride)} strides")
    elements = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if elements > storage.elements or (elements and last >= storage.elements):
        raise ValueError(f"a tensor of {elements} elements in a record of {storage.elements}")
