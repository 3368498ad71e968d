"""Batches ahead of time, made by a thread or by processes: which examples they hold is `sampler`'s to say.

One micro-batch, the item of the stream, is a pure function of (step, part): the number of loader processes changes no pixel,
and the ranks' shares of a micro-batch, one after the other, are what a single rank would see. An image that cannot be read
ends the run, or another one takes its place: which one is a function of its index alone.
"""

import contextlib
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitcli.data.protocol import EncodedSource, Source, UniformSource
from vitcli.data.sampler import Order, Planned
from vitcli.data.transforms import EvalTransform, TrainTransform
from vitcli.errors import DataError, UserError
from vitcli.randomness import derive_seed, permute

__all__ = ["Batch", "OnError", "choose_workers", "eval_batches", "train_batches"]

Batch = dict[str, Tensor]  # images uint8 (b, 3, H, W), labels int64 (b,), indices int64 (b,)
OnError = Literal["raise", "skip"]
Key = TypeVar("Key")

PREFETCH = 2  # batches ready ahead of time: per loader process, or in all without one
MOST_WORKERS = 8  # more are seldom faster and cost memory
MOST_REPLACEMENTS = 100  # images tried in the place of one; where that many are bad, the set is


class Unreadable(NamedTuple):
    """An example that cannot be read."""

    example: int
    message: str  # names it and says why


class Made(NamedTuple):
    """What comes out of a loader process. A named tuple, because DataLoader pins the memory of what is in one."""

    batch: Batch | None  # None: too few examples of it can be read
    unreadable: list[Unreadable]  # met while making it, in order


# ---------------------------------------------------------------- training


def train_batches(
    source: Source,
    transform: TrainTransform,
    *,
    order: Order,
    batch_size: int,
    micro_batch_size: int,
    start_step: int,
    total_steps: int,
    seed: int,
    workers: int = 0,
    pin_memory: bool = False,
    on_error: OnError = "raise",
    skip_limit: int = 0,
    warn: Callable[[str], object] = warnings.warn,
    rank: int = 0,
    ranks: int = 1,
    batch_of_step: Callable[[int], int] | None = None,
) -> Generator[Batch, None, None]:
    """Yield the micro-batches of steps start_step to total_steps - 1 in order, ceil(batch / micro) per step.

    Args:
        order: of the whole run; from `build_order`.
        batch_size: examples per step, over all ranks.
        micro_batch_size: examples per micro-batch, over all ranks.
        workers: loader processes; 0 prepares batches in a background thread of this one.
        on_error: `raise` an example's error, or `skip` it: another one of the source takes its place.
        skip_limit: how many different examples may be skipped, counted from `start_step`, by each rank for itself.
        warn: is told of every example skipped, once, in this process.
        rank, ranks: take this contiguous share of every micro-batch; shares differ by one example at most and may be empty.
        batch_of_step: the number of the batch that a step sees, where that is not the step's own; for runs that left some out.

    Raises:
        DataError: an example cannot be read, or more than may be skipped; raised here wherever it was met.
    """
    maker = TrainBatchMaker(
        source, transform, Planned(order), batch_size, micro_batch_size, seed, rank, ranks, on_error == "skip", skip_limit
    )
    keys = StepParts(start_step, total_steps, -(-batch_size // micro_batch_size), batch_of_step)
    made = stream(maker, keys, workers=workers, pin_memory=pin_memory)
    return account(made, source, limit=skip_limit, say=lambda text: warn(f"another image takes the place of one {text}"))


@dataclass(frozen=True)
class TrainBatchMaker:
    """Make this rank's share of micro-batch (batch, part)."""

    source: Source
    transform: TrainTransform
    planned: Planned
    batch_size: int
    micro_batch_size: int
    seed: int
    rank: int
    ranks: int
    skip: bool
    skip_limit: int

    def __call__(self, key: tuple[int, int]) -> Made:
        number, part = key
        first = number * self.batch_size
        start = first + part * self.micro_batch_size
        stop = min(start + self.micro_batch_size, first + self.batch_size)
        if self.source.remote and self.source.encoded:
            fetch_ahead(cast(EncodedSource, self.source), self.planned.order.ahead(np.arange(start, stop)))
        mine = share(start, stop, self.rank, self.ranks)
        epochs, indices = self.planned.between(mine.start, mine.stop)
        if len(indices) == 0:
            images = torch.empty((0, 3, *self.transform.image_size), dtype=torch.uint8)
            return Made(as_batch(images, indices, indices), [])
        try:
            return Made(self.prepare(epochs, indices), [])
        except DataError:
            if not self.skip:
                raise
        return self.replacing(epochs, indices)

    def prepare(self, epochs: NDArray[np.int64], indices: NDArray[np.int64]) -> Batch:
        """Return the examples `indices` (b,), each augmented as in its epoch; raise DataError for one that cannot be read."""
        if self.source.encoded:
            files, labels, where = read_files(self.source, indices)
            images = self.transform.from_encoded(files, where=where, seed=self.seed, epochs=epochs, indices=indices)
        else:
            pixels, labels = fetch(self.source, indices)
            images = self.transform(pixels, seed=self.seed, epochs=epochs, indices=indices)
        return as_batch(images, labels, indices)

    def replacing(self, epochs: NDArray[np.int64], indices: NDArray[np.int64]) -> Made:
        """Prepare examples one by one, and others in the place of those that cannot be read."""
        rows: list[Batch] = []
        unreadable: dict[int, Unreadable] = {}
        for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True):
            for attempt in range(MOST_REPLACEMENTS + 1):
                chosen = replacement(index, attempt, len(self.source))
                if chosen in unreadable:
                    continue
                try:
                    rows.append(self.prepare(np.array([epoch]), np.array([chosen])))
                    break
                except DataError as error:
                    unreadable[chosen] = Unreadable(chosen, str(error))
                if len(unreadable) > self.skip_limit:  # the run ends here, whatever came before
                    return Made(None, list(unreadable.values()))
            else:
                raise DataError(
                    f"{self.source.name}: no image found that can be read in the place of {self.source.where(index)}, "
                    f"{MOST_REPLACEMENTS} tried; run `vit data check {self.source.name}` to list what is damaged"
                )
        batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return Made(batch, list(unreadable.values()))


def fetch_ahead(source: EncodedSource, indices: NDArray[np.int64]) -> None:
    """Read one example of each remote shard that is needed later, in the background, so that a copy is there by then.

    All ranks do this for all of a micro-batch: those of one machine share the copies, those of others need their own.
    """

    def fetch_each() -> None:
        for index in indices.tolist():
            with contextlib.suppress(DataError):  # whoever needs it for a batch says what is wrong
                source.read(index)

    if len(indices):
        threading.Thread(target=fetch_each, name="vit-fetch", daemon=True).start()  # a daemon does not hold up the end of a run


def replacement(index: int, attempt: int, size: int) -> int:
    """Return the example to take at the given attempt to find one in the place of `index`; attempt 0 is the example itself."""
    if attempt == 0:
        return index
    return int(permute([index], size, derive_seed("replacement", attempt))[0])


class StepParts(Sequence[tuple[int, int]]):
    """The keys (batch, part) of a run's steps in order, without storing them."""

    def __init__(
        self, start_step: int, total_steps: int, parts: int, batch_of_step: Callable[[int], int] | None = None
    ) -> None:
        self.start_step = start_step
        self.total_steps = total_steps
        self.parts = parts
        self.batch_of_step = batch_of_step

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * self.parts

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < len(self):
            raise IndexError(position)
        step = self.start_step + position // self.parts
        return step if self.batch_of_step is None else self.batch_of_step(step), position % self.parts


# ---------------------------------------------------------------- evaluation


def eval_batches(
    source: Source,
    transform: EvalTransform,
    *,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
    on_error: OnError = "raise",
    skip_limit: int = 0,
    warn: Callable[[str], object] = warnings.warn,
    rank: int = 0,
    ranks: int = 1,
) -> Generator[Batch, None, None]:
    """Yield every example exactly once, in order; the last batch may be smaller. Otherwise like `train_batches`.

    No example takes another's place: with on_error `skip`, one that cannot be read is left out, so that batches become smaller,
    and at the end `warn` is told how many of how many were left out.

    Args:
        rank, ranks: yield this contiguous share of the batches; each is one of those of a single rank, so that a model's
            rounding, which depends on what lies in a batch, is the same.
    """
    starts = range(0, len(source), batch_size)
    mine = share(0, len(starts), rank, ranks)
    maker = EvalBatchMaker(source, transform, batch_size, on_error == "skip", skip_limit)
    made = stream(maker, starts[mine.start : mine.stop], workers=workers, pin_memory=pin_memory)
    images = min(mine.stop * batch_size, len(source)) - min(mine.start * batch_size, len(source))

    def say(text: str) -> None:
        warn(f"evaluation leaves out an image {text}")

    def finish(left_out: int) -> None:
        warn(f"{source.name}: evaluated without {left_out:,} of {images:,} images, which cannot be read")

    return account(made, source, limit=skip_limit, say=say, finish=finish)


@dataclass(frozen=True)
class EvalBatchMaker:
    """Make the batch that begins at an example."""

    source: Source
    transform: EvalTransform
    batch_size: int
    skip: bool
    skip_limit: int

    def __call__(self, start: int) -> Made:
        indices = np.arange(start, min(start + self.batch_size, len(self.source)))
        try:
            return Made(self.prepare(indices), [])
        except DataError:
            if not self.skip:
                raise
        rows: list[Batch] = []
        unreadable: list[Unreadable] = []
        for index in indices.tolist():
            try:
                rows.append(self.prepare(np.array([index])))
            except DataError as error:
                unreadable.append(Unreadable(index, str(error)))
            if len(unreadable) > self.skip_limit:
                break
        batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if rows else None
        return Made(batch, unreadable)

    def prepare(self, indices: NDArray[np.int64]) -> Batch:
        """Return the examples `indices` (b,); raise DataError for one that cannot be read."""
        if self.source.encoded:
            files, labels, where = read_files(self.source, indices)
            return as_batch(self.transform.from_encoded(files, where=where), labels, indices)
        pixels, labels = fetch(self.source, indices)
        return as_batch(self.transform(pixels), labels, indices)


# ---------------------------------------------------------------- both


def choose_workers(source: Source, device_type: str, *, processes: int = 1) -> int:
    """Return how many loader processes suit: none where images come as arrays and the model needs the cores itself.

    Args:
        processes: training on this machine, which share its cores.
    """
    if source.uniform and device_type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // processes))


def share(start: int, stop: int, rank: int, ranks: int) -> range:
    """Return the positions of [start, stop) that fall to a rank; one after the other, the shares are the whole."""
    size = stop - start
    return range(start + size * rank // ranks, start + size * (rank + 1) // ranks)


def fetch(source: Source, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8] | list[NDArray[np.uint8]], NDArray[np.int64]]:
    """Return images, (B, H, W, 3) or a list of (H, W, 3), and labels (B,)."""
    if source.uniform:
        return cast(UniformSource, source).batch(indices)
    examples = [source[index] for index in indices.tolist()]
    return [image for image, _ in examples], np.array([label for _, label in examples], np.int64)


class Places(Sequence[str]):
    """Where each of some examples lies, worked out when it is asked for: only messages need it."""

    def __init__(self, source: Source, indices: NDArray[np.int64]) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: Any) -> Any:
        return self.source.where(int(self.indices[position]))


def read_files(source: Source, indices: NDArray[np.int64]) -> tuple[list[bytes], NDArray[np.int64], Places]:
    """Return files, labels (B,) and where each file lies."""
    encoded = cast(EncodedSource, source)
    files = [encoded.read(index) for index in indices.tolist()]
    return files, np.asarray(encoded.labels[indices], np.int64), Places(source, indices)


def as_batch(images: Tensor, labels: NDArray[np.int64], indices: NDArray[np.int64]) -> Batch:
    return {"images": images, "labels": torch.from_numpy(labels), "indices": torch.from_numpy(indices)}


def account(
    made: Generator[Made, None, None],
    source: Source,
    *,
    limit: int,
    say: Callable[[str], object],
    finish: Callable[[int], object] | None = None,
) -> Generator[Batch, None, None]:
    """Yield the batches, tell of each example that could not be read once, and raise DataError when there are too many."""
    met: set[int] = set()
    with contextlib.closing(made):
        for batch, unreadable in made:
            for example, message in unreadable:
                if example in met:
                    continue
                met.add(example)
                if len(met) > limit:
                    raise DataError(
                        f"{source.name}: {len(met):,} different images cannot be read, more than data.skip_limit={limit}; run "
                        f"`vit data check {source.name}` to list them all; the last: {message}"
                    )
                say(f"that cannot be read ({len(met):,} of at most {limit:,}): {message}")
            if batch is not None:
                yield batch
    if met and finish is not None:
        finish(len(met))


def stream(make: Callable[[Key], Made], keys: Sequence[Key], *, workers: int, pin_memory: bool) -> Generator[Made, None, None]:
    """Yield make(key) for every key, in order, prepared ahead of time."""
    pin_memory = pin_memory and torch.cuda.is_available()
    if workers == 0:
        return in_thread(make, keys, pin_memory=pin_memory)
    return in_processes(make, keys, workers=workers, pin_memory=pin_memory)


def in_thread(make: Callable[[Key], Made], keys: Sequence[Key], *, pin_memory: bool) -> Generator[Made, None, None]:
    """Prepare batches in one background thread; it ends with the iterator, and its exceptions are raised to the consumer."""

    def prepare(key: Key) -> Made:
        batch, unreadable = made = make(key)
        if not pin_memory or batch is None:
            return made
        return Made({name: tensor.pin_memory() for name, tensor in batch.items()}, unreadable)

    ahead: deque[Future[Made]] = deque()
    thread = ThreadPoolExecutor(1, thread_name_prefix="vit-batches")
    try:
        for position in range(len(keys)):
            ahead.append(thread.submit(prepare, keys[position]))
            if len(ahead) > PREFETCH:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


class MadeBatches(Dataset[Made | UserError]):
    """A map-style data set whose items are whole micro-batches."""

    def __init__(self, make: Callable[[Any], Made]) -> None:
        self.make = make

    def __getitem__(self, key: Any) -> Made | UserError:
        try:
            return self.make(key)
        except UserError as error:  # returned, not raised: DataLoader would wrap its one line in a traceback
            return error


def in_processes(
    make: Callable[[Key], Made], keys: Sequence[Key], *, workers: int, pin_memory: bool
) -> Generator[Made, None, None]:
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
            batches: Any = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        for item in batches:
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        batches._shutdown_workers()  # by itself it waits for the last reference, which an exception on its way holds
        for process in batches._workers:
            if process.is_alive():  # one died, and the others wait for it; SIGTERM means nothing to them
                process.kill()


def prepare_worker(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach the whole process group, to the main process; it ends the loader in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    torch.set_num_threads(1)
