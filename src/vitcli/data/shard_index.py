"""Where every image of a set of shards lies: flat arrays in a folder, memory-mapped by whoever reads."""

import hashlib
import json
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vitcli.data.shard_scan import Part
from vitcli.data.tar import BLOCK

__all__ = ["IndexWriter", "ShardIndex", "Stat"]

# (N,) each, as in Part
COLUMNS: dict[str, type[np.generic]] = {"offsets": np.int64, "sizes": np.int32, "gaps": np.uint16, "labels": np.int32}

Stat = tuple[int, str]  # a shard's bytes, and a text that changes with its content


class ShardIndex:
    """The images of a set of shards; arrays are mapped again, not copied, where an index is unpickled.

    An index may have come with the shards, so what it says is checked as far as a wrong place or label could go unnoticed.

    Raises:
        OSError, ValueError, KeyError: it is not there, or damaged.
    """

    def __init__(self, folder: Path, urls: Sequence[str]) -> None:
        self.folder = folder
        self.urls = list(urls)
        stored = read_description(folder / "index.json")
        self.stats: list[Stat] = [(size, stamp) for size, stamp in stored["stats"]]
        self.names: list[str] = stored["names"]  # of the shards, as the index knows them
        self.listed: list[str] | None = stored["listed"]  # the class list it was made with
        self.named: bool = stored["named"]  # whether labels are class names, not numbers
        self.fingerprint: str = stored["fingerprint"]  # of names, sizes and labels
        self.starts: NDArray[np.int64] = np.array(map_array(folder / "starts.npy", np.int64))  # (shards + 1,)
        self.counts: NDArray[np.int64] = np.array(map_array(folder / "counts.npy", np.int64))  # (K,) images by class
        self.boundaries: list[int] = self.starts.tolist()
        self.map_columns()
        if not len(self.stats) == len(self.names) == len(self.urls) == len(self.boundaries) - 1:
            raise ValueError("not one name, size and place for each shard")
        if {len(getattr(self, name)) for name in COLUMNS} != {self.boundaries[-1]}:
            raise ValueError("arrays of different lengths")
        num_classes = stored["num_classes"] if stored["classes"] is None else len(stored["classes"])
        if num_classes != len(self.counts):
            raise ValueError("not one count for each class")
        self.classes: list[str] = stored["classes"] or [str(number) for number in range(num_classes)]
        if self.boundaries[0] != 0 or (np.diff(self.starts) < 0).any() or int(self.counts.sum()) != len(self):
            raise ValueError("counts that contradict one another")
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < num_classes:
            raise ValueError("labels that are no class")

    def map_columns(self) -> None:
        """Map the arrays of all images."""
        columns = {name: map_array(self.folder / f"{name}.npy", dtype) for name, dtype in COLUMNS.items()}
        self.offsets: NDArray[np.int64] = columns["offsets"]
        self.sizes: NDArray[np.int32] = columns["sizes"]
        self.gaps: NDArray[np.uint16] = columns["gaps"]
        self.labels: NDArray[np.int32] = columns["labels"]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in COLUMNS}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.map_columns()

    def __len__(self) -> int:
        return self.boundaries[-1]

    def shard_of(self, position: int) -> int:
        """Return the number of the shard that an image lies in."""
        return bisect_right(self.boundaries, position) - 1

    def head(self, position: int) -> int:
        """Return where in its shard the headers of an image's member begin, bytes."""
        return int(self.offsets[position]) - BLOCK * int(self.gaps[position])

    def part(self, shard: int) -> Part:
        """Return what was found in a shard, as if it had been scanned again."""
        here = slice(self.boundaries[shard], self.boundaries[shard + 1])
        labels, names = self.labels[here].astype(np.int64), list[str]()
        if self.named and self.listed is None:
            used, places = np.unique(labels, return_inverse=True)
            labels, names = -1 - places, [self.classes[label] for label in used.tolist()]
        return Part(self.offsets[here], self.sizes[here], self.gaps[here], labels, names)


def map_array(file: Path, dtype: type[np.generic]) -> NDArray[Any]:
    """Map a .npy file of one dimension; raise ValueError, or OSError, if it is anything else."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # numpy evaluates the header's literal and lets through what that raises
        raise ValueError(f"{file.name}: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
        raise ValueError(f"{file.name}: expected one dimension of {dtype.__name__}")
    return array.view(np.ndarray)


def read_description(file: Path) -> dict[str, Any]:
    """Read index.json; raise ValueError, KeyError or OSError if it is not what `IndexWriter` writes."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(stored, dict) or not isinstance(stored["named"], bool) or not isinstance(stored["fingerprint"], str):
        raise ValueError("not an index's description")
    for key, optional in (("names", False), ("listed", True), ("classes", True)):
        if not (is_texts(stored[key]) or (optional and stored[key] is None)):
            raise ValueError(f"{key} is no list of texts")
    if type(stored["num_classes"]) is not int or not isinstance(stored["stats"], list):
        raise ValueError("no number of classes, or no shards")
    for stat in stored["stats"]:
        if not isinstance(stat, list) or [type(each) for each in stat] != [int, str]:
            raise ValueError("a shard without a size and a time stamp")
    return stored


def is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


class IndexWriter:
    """Writes an index shard by shard, in memory constant in the number of images; a context that leaves nothing half.

    Args:
        folder: of the finished index; what is there already stays, because it was made of the same shards.
        examples: how many there will be.
    """

    def __init__(self, folder: Path, *, examples: int) -> None:
        self.folder = folder
        self.examples = examples
        self.starts = [0]
        self.digest = hashlib.sha256()

    def __enter__(self) -> "IndexWriter":
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{self.folder.name}-", dir=self.folder.parent))
        self.files = {name: self.create(name, dtype) for name, dtype in COLUMNS.items()}
        return self

    def create(self, name: str, dtype: DTypeLike) -> BinaryIO:
        """Begin a .npy file; what is appended follows its header."""
        file = open(self.temporary / f"{name}.npy", "wb")  # noqa: SIM115 (closed in finish or __exit__)
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (self.examples,)}
        np.lib.format.write_array_header_1_0(file, header)
        return file

    def append(self, part: Part) -> None:
        """Add the next shard; its labels are those of the set, all of them numbers."""
        for name, file in self.files.items():
            column = np.ascontiguousarray(getattr(part, name), COLUMNS[name])
            file.write(column.data)
            if name in ("sizes", "labels"):
                self.digest.update(column.data)
        self.starts.append(self.starts[-1] + len(part.offsets))

    def finish(
        self,
        *,
        names: Sequence[str],
        stats: Sequence[Stat],
        counts: NDArray[np.int64],
        classes: Sequence[str] | None,
        listed: Sequence[str] | None,
    ) -> None:
        """Write the rest and give the index its name.

        Args:
            names: of the shards; stats: their sizes and time stamps.
            counts: (K,) images by class.
            classes: names that the labels stand for; None where they are plain numbers.
            listed: the class list that `classes` are from, if it was one.
        """
        assert self.starts[-1] == self.examples, (self.starts[-1], self.examples)
        for shard, (size, _) in zip(names, stats, strict=True):
            self.digest.update(f"{shard.rpartition('/')[2]} {size}\n".encode(errors="surrogateescape"))
        description = {
            "names": list(names),
            "stats": list(stats),
            "num_classes": len(counts),
            "classes": None if classes is None else list(classes),
            "listed": None if listed is None else list(listed),
            "named": classes is not None,
            "fingerprint": self.digest.hexdigest()[:24],
        }
        np.save(self.temporary / "starts.npy", np.array(self.starts, np.int64))
        np.save(self.temporary / "counts.npy", counts)
        (self.temporary / "index.json").write_text(json.dumps(description), encoding="utf-8")
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        os.chmod(self.temporary, 0o755)  # mkdtemp's 0700 would lock others out of an index beside the shards
        try:
            os.rename(self.temporary, self.folder)
        except OSError:
            if not self.folder.is_dir():
                raise  # otherwise another process was faster, and its index is the same

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)
