"""Which examples form a step, and batches of them ahead of time.

Step s of a run is a pure function of (seed, s), so nothing has to be stored to go on in the middle of an epoch. One
micro-batch, the item of the stream, is a pure function of (step, part): the number of loader processes changes no pixel.
"""

import contextlib
import os
import queue
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitcli.data.sources import Source, UniformSource
from vitcli.data.transforms import EvalTransform, TrainTransform
from vitcli.errors import UserError
from vitcli.randomness import derive_seed, permute

__all__ = ["Batch", "choose_workers", "eval_batches", "examples_of_step", "train_batches"]

Batch = dict[str, Tensor]  # images uint8 (b, 3, H, W), labels int64 (b,), indices int64 (b,)
Key = TypeVar("Key")

PREFETCH = 2  # batches ready ahead of time: per loader process, or in all without one
MOST_WORKERS = 8  # more are seldom faster and cost memory


def examples_of_step(
    step: int, *, batch_size: int, num_examples: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (epochs (B,), indices (B,)) of the examples that form `step`, the first being 0.

    Every epoch is another shuffle of all examples; a step may end one epoch and begin the next.
    """
    return examples_at(np.arange(step * batch_size, (step + 1) * batch_size), num_examples=num_examples, seed=seed)


def examples_at(positions: NDArray[np.int64], *, num_examples: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (epochs, indices) of the run's examples number `positions`, counted from its beginning."""
    epochs, within = np.divmod(positions, num_examples)
    indices = np.empty_like(within)
    for epoch in np.unique(epochs).tolist():
        members = epochs == epoch
        indices[members] = permute(within[members], num_examples, derive_seed(seed, "order", epoch))
    return epochs, indices


@dataclass(frozen=True)
class TrainBatchMaker:
    """Make micro-batch (step, part)."""

    source: Source
    transform: TrainTransform
    batch_size: int
    micro_batch_size: int
    seed: int

    def __call__(self, key: tuple[int, int]) -> Batch:
        step, part = key
        start = step * self.batch_size + part * self.micro_batch_size
        stop = min(start + self.micro_batch_size, (step + 1) * self.batch_size)
        epochs, indices = examples_at(np.arange(start, stop), num_examples=len(self.source), seed=self.seed)
        images, labels = fetch(self.source, indices)
        tensor = self.transform(images, seed=self.seed, epochs=epochs, indices=indices)
        return as_batch(tensor, labels, indices)


@dataclass(frozen=True)
class EvalBatchMaker:
    """Make the batch that begins at an example."""

    source: Source
    transform: EvalTransform
    batch_size: int

    def __call__(self, start: int) -> Batch:
        indices = np.arange(start, min(start + self.batch_size, len(self.source)))
        images, labels = fetch(self.source, indices)
        return as_batch(self.transform(images), labels, indices)


def train_batches(
    source: Source,
    transform: TrainTransform,
    *,
    batch_size: int,
    micro_batch_size: int,
    start_step: int,
    total_steps: int,
    seed: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Yield the micro-batches of steps start_step to total_steps - 1 in order, ceil(batch / micro) per step.

    Args:
        workers: loader processes; 0 prepares batches in a background thread of this one.

    Raises:
        UserError: an example cannot be read; raised here wherever it was met.
    """
    maker = TrainBatchMaker(source, transform, batch_size, micro_batch_size, seed)
    keys = StepParts(start_step, total_steps, -(-batch_size // micro_batch_size))
    return stream(maker, keys, workers=workers, pin_memory=pin_memory)


def eval_batches(
    source: Source, transform: EvalTransform, *, batch_size: int, workers: int = 0, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """Yield every example exactly once, in order; the last batch may be smaller. Otherwise like `train_batches`."""
    starts = range(0, len(source), batch_size)
    return stream(EvalBatchMaker(source, transform, batch_size), starts, workers=workers, pin_memory=pin_memory)


def choose_workers(source: Source, device_type: str) -> int:
    """Return how many loader processes suit: none where images come as arrays and the model needs the cores itself."""
    if source.uniform and device_type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)


class StepParts(Sequence[tuple[int, int]]):
    """The keys (step, part) of a run in order, without storing them."""

    def __init__(self, start_step: int, total_steps: int, parts: int) -> None:
        self.start_step = start_step
        self.total_steps = total_steps
        self.parts = parts

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * self.parts

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < len(self):
            raise IndexError(position)
        return self.start_step + position // self.parts, position % self.parts


def fetch(source: Source, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8] | list[NDArray[np.uint8]], NDArray[np.int64]]:
    """Return images, (B, H, W, 3) or a list of (H, W, 3), and labels (B,)."""
    if source.uniform:
        return cast(UniformSource, source).batch(indices)
    examples = [source[index] for index in indices.tolist()]
    return [image for image, _ in examples], np.array([label for _, label in examples], np.int64)


def as_batch(images: Tensor, labels: NDArray[np.int64], indices: NDArray[np.int64]) -> Batch:
    return {"images": images, "labels": torch.from_numpy(labels), "indices": torch.from_numpy(indices)}


def stream(
    make: Callable[[Key], Batch], keys: Sequence[Key], *, workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Yield make(key) for every key, in order, prepared ahead of time."""
    pin_memory = pin_memory and torch.cuda.is_available()
    if workers == 0:
        return in_thread(make, keys, pin_memory=pin_memory)
    return in_processes(make, keys, workers=workers, pin_memory=pin_memory)


def in_thread(make: Callable[[Key], Batch], keys: Sequence[Key], *, pin_memory: bool) -> Generator[Batch, None, None]:
    """Prepare batches in one background thread; it ends with the iterator, and its exceptions are raised to the consumer."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCH)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def produce() -> None:
        try:
            for position in range(len(keys)):
                if stop.is_set():
                    return
                batch = make(keys[position])
                put({name: tensor.pin_memory() for name, tensor in batch.items()} if pin_memory else batch)
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="vit-batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


class MadeBatches(Dataset[Batch | UserError]):
    """A map-style data set whose items are whole micro-batches."""

    def __init__(self, make: Callable[[Any], Batch]) -> None:
        self.make = make

    def __getitem__(self, key: Any) -> Batch | UserError:
        try:
            return self.make(key)
        except UserError as error:  # returned, not raised: DataLoader would wrap its one line in a traceback
            return error


def in_processes(
    make: Callable[[Key], Batch], keys: Sequence[Key], *, workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Prepare batches in loader processes; they end with the iterator."""
    held_back = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)  # until a new process has said that it ignores them
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores: the user's choice
            loader = DataLoader(
                MadeBatches(make),
                batch_size=None,
                sampler=cast(Any, keys),
                num_workers=workers,
                prefetch_factor=PREFETCH,
                pin_memory=pin_memory,
                worker_init_fn=prepare_worker,
                generator=torch.Generator(),  # its own: the default one's state belongs to the model
            )
            batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        for item in batches:
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        del batches  # the last reference: ends the processes


def prepare_worker(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach the whole process group, to the main process; it ends the loader in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    torch.set_num_threads(1)
