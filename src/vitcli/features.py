"""What a model's head reads of the images of a source: extracted once, by all ranks together, and kept on disk.

An entry of the cache is a file named after everything the features depend on: weights, images, preprocessing, precision. It is
written beside its name and renamed, verified when it is read, and may be deleted at any time; the oldest go when it gets large.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from tqdm import tqdm

from vitcli.checkpoint import sha256_of_json, sha256_of_tensors
from vitcli.config import Config
from vitcli.data.cache import default_cache_dir
from vitcli.data.folders import Split
from vitcli.data.protocol import EncodedSource, Source
from vitcli.distributed import SOLO, Ranks
from vitcli.errors import DataError
from vitcli.forward import Forward, features, source_answers
from vitcli.model_config import HEADS
from vitcli.opened import OpenedModel

__all__ = ["Features", "cached_features", "extract_features", "feature_file", "head_inputs", "weights_digest"]

Say = Callable[[str], object]

FORMAT_VERSION = 1  # goes into the name: raise it when preprocessing, a model's arithmetic or the file's layout changes
MOST_CACHE_BYTES = 16 << 30
MOST_HEADER_BYTES = 1 << 20
PIECE_BYTES = 64 << 20  # sent at a time, by all ranks together
SAMPLE = 32  # images looked at for a name
STALE_SECONDS = 24 * 3600  # a temporary file this old belongs to a process that was killed


@dataclass(frozen=True)
class Features:
    """Features of a source's images, in its order; those that could not be read are left out."""

    values: NDArray[np.float32]  # (N, D)
    labels: NDArray[np.int64]  # (N,) the source's class numbers
    indices: NDArray[np.int64]  # (N,) of the source, ascending


# ---------------------------------------------------------------- extraction


def head_inputs(model: Any, images: Tensor) -> Tensor:
    """Return what the model's heads read, (b, D) each, side by side, by running all of it, as one held in parts needs."""
    read: list[Tensor] = []
    with ExitStack() as stack:
        for name, layer in model.named_children():
            if name in HEADS:
                watching = layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
                stack.callback(watching.remove)
        model(images)
    return torch.cat(read, dim=1)


def extract_features(
    model: nn.Module,
    source: Source,
    config: Config,
    *,
    device: Any,
    batch_size: int,
    warn: Say,
    check: Callable[[], None] | None = None,
    flops_per_image: int,
    forward: Forward = features,
    ranks: Ranks = SOLO,
) -> Features | None:
    """Show a model every image of a source once; return the features on the main rank and None on the others.

    They are the same bits however many ranks share the work.

    Raises:
        UserError, Interrupted: on every rank, what reading an image or `check` raised on any.
    """
    values, labels, indices = [], [], []
    silent = None if ranks.main else True
    bar = tqdm(total=len(source), desc=f"features of {source.name}", unit="img", leave=False, delay=2.0, disable=silent)
    made = source_answers(
        model,
        source,
        config,
        forward=forward,
        device=device,
        batch_size=batch_size,
        warn=warn,
        check=check,
        flops_per_image=flops_per_image,
        ranks=ranks,
    )
    with bar, closing(made):
        for batch, found in made:
            values.append(found.float().cpu().numpy())
            labels.append(batch["labels"].numpy())
            indices.append(batch["indices"].numpy())
            bar.update(ranks.ranks * len(found))
    width = ranks.largest(values[0].shape[1] if values else 0)
    whole = gather_rows(np.concatenate([np.zeros((0, width), np.float32), *values]), ranks)
    beside = ranks.gather([np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (labels, indices)])
    if whole is None:
        return None
    return Features(whole, np.concatenate([of for of, _ in beside]), np.concatenate([at for _, at in beside]))


def gather_rows(rows: NDArray[np.float32], ranks: Ranks) -> NDArray[np.float32] | None:
    """Return all ranks' rows (n, D), one rank's after another's, on the main rank; in pieces, so that no other holds them."""
    if ranks.ranks == 1:
        return rows
    size = max(1, PIECE_BYTES // (ranks.ranks * 4 * max(1, rows.shape[1])))
    kept: list[list[NDArray[np.float32]]] = [[] for _ in range(ranks.ranks)]
    for start in range(0, ranks.largest(len(rows)), size):
        for parts, part in zip(kept, ranks.gather(rows[start : start + size])):
            if ranks.main:
                parts.append(part)
    return np.concatenate([part for parts in kept for part in parts]) if ranks.main else None


# ---------------------------------------------------------------- the cache


def weights_digest(state: dict[str, Tensor]) -> str:
    """Return a digest of all weights that features depend on: not the heads'."""
    return sha256_of_tensors({name: tensor for name, tensor in state.items() if name.partition(".")[0] not in HEADS})


def feature_file(opened: OpenedModel, source: Source, *, split: Split, weights: str) -> Path:
    """Return where the features of a split are kept; the name says everything that they depend on.

    Args:
        weights: from `weights_digest`.
    """
    data = opened.config.data
    about = {
        "version": FORMAT_VERSION,
        "weights": weights,
        "model": opened.config.model.model_dump(mode="json"),
        "source": [source.fingerprint, split, len(source), sample_digest(source)],
        # a JPEG that is read again each time may be decoded at another scale than one that was decoded once
        "encoded": source.encoded,
        "preprocessing": [list(data.image_size), list(data.mean), list(data.std), data.eval_crop_fraction],
        "patch_permutation": data.patch_permutation,
        "precision": [opened.config.train.precision, opened.device.type],
    }
    return default_cache_dir() / "features" / f"{sha256_of_json(about)[:32]}.safetensors"


def sample_digest(source: Source) -> str:
    """Return a digest of a few images spread over a source: its fingerprint may go by names and sizes of files alone."""
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(np.int64)).tolist():
        with contextlib.suppress(DataError):  # an image that cannot be read is the extraction's to tell
            digest.update(cast(EncodedSource, source).read(index) if source.encoded else source[index][0].tobytes())
    return digest.hexdigest()


def cached_features(
    opened: OpenedModel,
    source: Source,
    *,
    split: Split,
    weights: str | None,
    batch_size: int,
    say: Say,
    ranks: Ranks = SOLO,
) -> Features | None:
    """Return features as `extract_features`, read from the cache where they are in it, else extracted and put there.

    Where the cache cannot be written `say` is told, and nothing else changes.

    Args:
        weights: from `weights_digest`, on the main rank; None leaves the cache alone.
    """
    path = None if weights is None else feature_file(opened, source, split=split, weights=weights)
    found = None if path is None else load_features(path, most=len(source), say=say)
    if ranks.broadcast(found is not None):
        return found
    found = extract_features(
        opened.model,
        source,
        opened.config,
        device=opened.device,
        batch_size=batch_size,
        warn=say,
        flops_per_image=opened.flops_per_image,
        ranks=ranks,
    )
    # a set with images that cannot be read may be mended, which its fingerprint need not show
    if path is not None and found is not None and len(found.values) == len(source):
        save_features(path, found, say=say)
    return found


def load_features(path: Path, *, most: int, say: Say) -> Features | None:
    """Read an entry, of at most `most` images; None, and the file gone, if it is damaged, and None if there is none."""
    try:
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(path.stat().st_size, MOST_HEADER_BYTES):
            raise SafetensorError(f"a header of {header_bytes:,} bytes")
        with safe_open(path, framework="np") as stored:
            digest = json.loads((stored.metadata() or {})["vit_features"])["sha256"]
            values, labels, indices = (np.array(stored.get_tensor(name)) for name in ("values", "labels", "indices"))
        found = Features(values, labels, indices)
        shapes = values.ndim == 2 and labels.shape == indices.shape == values.shape[:1] and len(values) <= most
        types = [str(array.dtype) for array in (values, labels, indices)] == ["float32", "int64", "int64"]
        if shapes and types and digest == digest_of(found):
            with contextlib.suppress(OSError):
                os.utime(path)  # the oldest by use go first
            return found
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        pass
    say(f"{path}: damaged cache of features, extracting again")
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def save_features(path: Path, found: Features, *, say: Say) -> None:
    """Put an entry into the cache as a whole file, and take the oldest out if it has become too large."""
    tensors: dict[str, NDArray[Any]] = {"values": found.values, "labels": found.labels, "indices": found.indices}
    if sum(array.nbytes for array in tensors.values()) > MOST_CACHE_BYTES:
        return
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, metadata={"vit_features": json.dumps({"sha256": digest_of(found)})})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        trim(path.parent, keep=path)
    except (OSError, SafetensorError) as error:  # the library wraps what the system said
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        say(f"{path.parent}: cannot keep features here ({said}); they are extracted again next time")


def digest_of(found: Features) -> str:
    """Return one SHA-256 over an entry's bytes."""
    digest = hashlib.sha256(repr(found.values.shape).encode())
    for array in (found.values, found.labels, found.indices):
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return digest.hexdigest()


def trim(folder: Path, *, keep: Path) -> None:
    """Delete the entries that were used longest ago until the rest fit, and what killed processes left."""
    entries = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may be deleting it too
            stat = path.stat()
            if path.name.startswith(".tmp-"):
                if time.time() - stat.st_mtime > STALE_SECONDS:
                    path.unlink()
            elif path.suffix == ".safetensors":
                entries.append((path == keep, stat.st_mtime, stat.st_size, path))
    total = sum(size for _, _, size, _ in entries)
    for _, _, size, path in sorted(entries):
        if total <= MOST_CACHE_BYTES:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
