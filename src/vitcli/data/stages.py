"""How fast each stage of the loader is, one after the other in this process, and all of them together as training runs them."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.config import AugmentConfig
from vitcli.data.loader import OnError, train_batches
from vitcli.data.parallel import available_cores
from vitcli.data.protocol import EncodedSource, Source, SourceDefaults
from vitcli.data.sampler import FullShuffle, Order
from vitcli.data.transforms import TrainTransform
from vitcli.errors import DataError

__all__ = ["Speeds", "bottleneck", "measure_stages"]

ADVICE = {
    "read": "put the data on a faster disk, or pack many small files into shards (vit data pack)",
    "decode": "store smaller images (vit data pack --resize), or give the loader more cores",
    "augment": "use fewer or cheaper augmentations, or give the loader more cores",
    "hand-over": "use larger batches, or fewer loader processes",
}


@dataclass(frozen=True)
class Speeds:
    """Images per second of each stage; those up to `augment` in one process, the others as training runs."""

    read: float
    decode: float | None  # None where the source has pixels, not files
    augment: float
    hand_over: float
    loader: float
    workers: int
    cores: int

    @property
    def stages(self) -> dict[str, float]:
        """Return the stages that there are, in their order."""
        found = {"read": self.read, "decode": self.decode, "augment": self.augment, "hand-over": self.hand_over}
        return {name: speed for name, speed in found.items() if speed is not None}


def measure_stages(
    source: Source,
    *,
    augment: AugmentConfig,
    image_size: tuple[int, int],
    order: Order,
    workers: int,
    batch_size: int,
    seconds: float,
    seed: int = 0,
    on_error: OnError = "raise",
    skip_limit: int = 0,
    warn: Callable[[str], object] = warnings.warn,
) -> Speeds:
    """Measure for about `seconds` each stage.

    `read` fetches files, or pixels where the source has these; `decode` makes pixels of files and cuts and scales the crop,
    which is one step where JPEGs are decoded at reduced scale; `augment` is the rest. `hand-over` sends ready batches through
    the loader; `loader` is all of it.

    Args:
        on_error, skip_limit, warn: as for `train_batches`; stage by stage, an image that cannot be read is left out.

    Raises:
        DataError: an image cannot be read, or more than may be skipped.
    """
    batch_size = min(batch_size, len(source))
    whole = TrainTransform(augment, image_size=image_size)
    limit = skip_limit if on_error == "skip" else 0
    in_one = measure_in_one(source, whole, order, batch_size=batch_size, seconds=seconds, seed=seed, skip_limit=limit)
    ready = ReadySource(source.classes)
    hand_over = loader_speed(
        ready,
        ReadyTransform(torch.zeros((batch_size, 3, *image_size), dtype=torch.uint8)),
        FullShuffle(len(ready), seed=seed),
        workers=workers,
        batch_size=batch_size,
        seconds=seconds,
        seed=seed,
    )
    loader = loader_speed(
        source,
        whole,
        order,
        workers=workers,
        batch_size=batch_size,
        seconds=seconds,
        seed=seed,
        on_error=on_error,
        skip_limit=skip_limit,
        warn=warn,
    )
    return Speeds(*in_one, hand_over=hand_over, loader=loader, workers=workers, cores=available_cores())


def measure_in_one(
    source: Source, whole: TrainTransform, order: Order, *, batch_size: int, seconds: float, seed: int, skip_limit: int
) -> tuple[float, float | None, float]:
    """Return the images per second of reading, decoding (None where nothing is decoded) and augmenting."""
    crop_only = TrainTransform(
        whole.augment.model_copy(update={"flip": False, "randaugment_layers": 0}), image_size=whole.image_size
    )
    spent = np.zeros(3)  # seconds
    images = 0
    unreadable: set[int] = set()
    for round_number, (epochs, indices) in enumerate(batches_of(order, batch_size)):
        try:
            part = seconds_of(source, crop_only, whole, seed=seed, epochs=epochs, indices=indices)
        except DataError:
            if not skip_limit:
                raise
            keep = readable(source, indices, unreadable, limit=skip_limit)
            if not keep.any():
                continue
            epochs, indices = epochs[keep], indices[keep]
            part = seconds_of(source, crop_only, whole, seed=seed, epochs=epochs, indices=indices)
        if round_number:  # the first batch warms up
            spent += part
            images += len(indices)
        if spent.sum() >= 2 * seconds:
            break
    read_s, decode_s, augment_s = np.maximum(spent, 1e-9).tolist()
    return images / read_s, images / decode_s if source.encoded else None, images / augment_s


def seconds_of(
    source: Source,
    crop_only: TrainTransform,
    whole: TrainTransform,
    *,
    seed: int,
    epochs: NDArray[np.int64],
    indices: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return the seconds, (3,), that reading, decoding and augmenting some images take; raise DataError as they do."""
    started = time.perf_counter()
    if not source.encoded:
        pixels = pixels_of(source, indices)
        read = time.perf_counter()
        whole(pixels, seed=seed, epochs=epochs, indices=indices)
        return np.array([read - started, 0.0, time.perf_counter() - read])
    encoded = cast(EncodedSource, source)
    files, where = (
        [encoded.read(index) for index in indices.tolist()],
        [encoded.where(index) for index in indices.tolist()],
    )
    read = time.perf_counter()
    crop_only.from_encoded(files, where=where, seed=seed, epochs=epochs, indices=indices)
    decoded = time.perf_counter()
    whole.from_encoded(files, where=where, seed=seed, epochs=epochs, indices=indices)
    done = time.perf_counter()
    return np.array([read - started, decoded - read, max(0.0, (done - decoded) - (decoded - read))])


def readable(source: Source, indices: NDArray[np.int64], met: set[int], *, limit: int) -> NDArray[np.bool_]:
    """Return which of some images, (B,), can be read; those that cannot are added to `met`, and DataError ends too many."""
    for index in dict.fromkeys(indices.tolist()):
        if index in met:
            continue
        try:
            source[index]
        except DataError:
            met.add(index)
            if len(met) > limit or len(met) == len(source):
                raise
    return ~np.isin(indices, list(met))


def batches_of(order: Order, batch_size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    for number in count():
        yield order.at(np.arange(number * batch_size, (number + 1) * batch_size))


def pixels_of(source: Source, indices: NDArray[np.int64]) -> Any:
    if source.uniform:
        return cast(Any, source).batch(indices)[0]
    return [source[index][0] for index in indices.tolist()]


def loader_speed(
    source: Source, transform: Any, order: Order, *, workers: int, batch_size: int, seconds: float, seed: int, **skipping: Any
) -> float:
    """Return the images per second that the loader delivers, after its first batches; `skipping` is for `train_batches`."""
    stream = train_batches(
        source,
        transform,
        order=order,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        start_step=0,
        total_steps=1 << 40,
        seed=seed,
        workers=workers,
        **skipping,
    )
    with closing(stream):
        for _ in range(2 * max(1, workers) + 1):  # what was prepared while processes started says nothing
            next(stream)
        images, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds or not images:
            images += len(next(stream)["labels"])
        return images / spent


class ReadySource(SourceDefaults):
    """Nothing, at once: what remains is the loader's own work."""

    uniform = True
    labels = None
    fingerprint = ""
    name = "ready"

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return np.zeros((1, 1, 3), np.uint8), 0

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return one pixel for each image."""
        return np.zeros((len(indices), 1, 1, 3), np.uint8), np.zeros(len(indices), np.int64)


@dataclass(frozen=True)
class ReadyTransform:
    """Gives the same batch again and again."""

    images: Tensor

    def __call__(self, images: Any, **_: Any) -> Tensor:
        """Return a copy, as a transform's result is new memory, too."""
        return self.images.clone()


def bottleneck(speeds: Speeds) -> str:
    """Name the slowest stage in one sentence."""
    per_image = {name: 1 / speed for name, speed in speeds.stages.items() if name != "hand-over"}
    total = sum(per_image.values())
    processes = max(1, min(speeds.workers, speeds.cores))
    if 1 / speeds.hand_over > total / processes:
        slowest, share = "hand-over", "which is slower than the loader processes together"
    else:
        slowest = max(per_image, key=lambda name: per_image[name])
        share = f"{100 * per_image[slowest] / total:.0f} % of the time that an image takes"
    return f"bottleneck: {slowest}, {share}; to go faster, {ADVICE[slowest]}"
