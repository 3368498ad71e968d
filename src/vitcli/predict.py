"""`vit predict`: a model's first guesses for image files, in constant memory, however many there are.

Names come from a thread, files are read, decoded and resized by more of them, and batches are made of what comes, in the order
of the names. A file that cannot be read is a result too and stops nothing. A batch holds the next `batch_size` names, so what
is in it, and with it the last bits of an answer, does not depend on which thread was faster.
"""

import glob
import os
import queue
import stat
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

import torch
from torch import Tensor

from vitcli.data.images import IMAGE_SUFFIXES
from vitcli.data.transforms import EvalTransform, normalise
from vitcli.device import AUTOCAST
from vitcli.errors import DataError, UserError
from vitcli.forward import Forward, answers, logits
from vitcli.lanes import choose_lanes
from vitcli.opened import OpenedModel
from vitcli.predictions import first_guesses

__all__ = ["Found", "Prediction", "find_images", "new_file", "predict_images"]

MOST_THREADS = 8  # more are seldom faster
MOST_FILE_BYTES = 2 << 30
CHUNK_BYTES = 1 << 16  # of names
NOT_FINITE = "the model's answer is not a number"

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Found:
    """A file to look at, or why there is none."""

    path: str
    problem: str | None = None


@dataclass(frozen=True)
class Prediction:
    """What a model makes of a file."""

    path: str
    top: list[tuple[int, float]]  # number of a class and its probability, the best first; empty where there is a problem
    problem: str | None = None


# ---------------------------------------------------------------- which files


def find_images(words: Iterable[str], *, stdin: BinaryIO, separator: bytes = b"\n") -> Iterator[Found]:
    """Yield the files that words mean, as they are found.

    Args:
        words: files, taken whatever they are called; folders, for all images in them and below, sorted; globs, with `**` for
            any folders, sorted; `-` for names in `stdin`, files or folders.
        separator: between the names in `stdin`.
    """
    for word in words:
        if word == "-":
            for name in names_in(stdin, separator):
                yield from within(name) if os.path.isdir(name) else (Found(name),)
        elif os.path.isdir(word):
            yield from within(word)
        elif os.path.lexists(word) or not glob.has_magic(word):
            yield Found(word)
        else:
            matches = sorted(glob.iglob(word, recursive=True))
            if not matches:
                yield Found(word, "no file fits this pattern")
            for path in matches:
                if not os.path.isdir(path):
                    yield Found(path)
                elif "**" not in word:  # which finds what is in the folders by itself
                    yield from within(path)


def within(folder: str) -> Iterator[Found]:
    """Yield the images in and below a folder; hidden ones, links to folders and other files are passed over."""
    some = False
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                seen = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        except OSError as error:
            yield Found(place, f"cannot list this folder: {error.strerror}")
            some = True
            continue
        waiting.extend(entry.path for entry in reversed(seen) if entry.is_dir(follow_symlinks=False))
        for entry in seen:
            if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and not entry.is_dir():
                some = True
                yield Found(entry.path)
    if not some:
        yield Found(folder, "no images in this folder or below it")


def names_in(stream: BinaryIO, separator: bytes) -> Iterator[str]:
    """Yield the names in a stream, each as soon as it is complete; empty ones are passed over."""
    # Not through Python's buffer: a thread that waits in there would hold its lock when the process ends.
    raw = getattr(stream, "raw", stream)
    left = b""
    while chunk := raw.read(CHUNK_BYTES):
        *names, left = (left + chunk).split(separator)
        yield from (os.fsdecode(name) for name in names if name)
    if left:
        yield os.fsdecode(left)


# ---------------------------------------------------------------- what they show


def predict_images(
    opened: OpenedModel,
    images: Iterable[Found],
    *,
    top: int,
    batch_size: int,
    forward: Forward = logits,
    flops_per_image: int | None = None,
) -> Generator[Prediction, None, None]:
    """Yield the `top` likeliest classes of each image, in order; close it.

    Args:
        images: read by another thread, a few batches ahead.
        batch_size: names that go through the model at a time; results come when it is full, or the names are at an end.
        forward: what the model is asked, `logits` or one of `views.tta_forward`.
        flops_per_image: of `forward`; default the model's.
    """
    data, train = opened.config.data, opened.config.train
    classes = len(opened.pretrained.classes)
    transform = EvalTransform(image_size=data.image_size, crop_fraction=data.eval_crop_fraction)
    flops = opened.flops_per_image if flops_per_image is None else flops_per_image
    on_cpu = opened.device.type == "cpu"
    lanes = choose_lanes(flops=flops * batch_size, images=batch_size) if on_cpu else 1
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

    def prepare(found: Found) -> tuple[Found, Tensor | None]:
        if found.problem is not None:
            return found, None
        try:
            return found, transform.from_encoded([read_file(found.path)], where=[found.path])
        except DataError as error:
            return Found(found.path, str(error).removeprefix(f"{found.path}: ").partition(";")[0]), None

    ready: list[Mapping[str, Tensor]] = []
    with (
        closing(in_order(prepare, images, threads=threads, ahead=2 * batch_size + threads)) as prepared,
        closing(
            answers(
                opened.model,
                iter(ready.pop, None),  # asked for one batch at a time, when it is there
                forward=forward,
                preprocess=lambda pixels: normalise(pixels, mean=data.mean, std=data.std),
                device=opened.device,
                dtype=AUTOCAST.get(train.precision, torch.float32),
                lanes=lanes,
            )
        ) as answered,
    ):
        while rows := list(islice(prepared, batch_size)):
            pixels = [image for _, image in rows if image is not None]
            guesses: Iterator[list[tuple[int, float]]] = iter(())
            if pixels:
                ready.append({"images": torch.cat(pixels), "labels": torch.zeros(len(pixels), dtype=torch.int64)})
                _, found_logits = next(answered)
                guesses = iter(likeliest(found_logits.double(), top=min(top, classes), loss=train.loss))
            for found, image in rows:
                if image is None:
                    yield Prediction(found.path, [], found.problem)
                    continue
                best = next(guesses)
                yield Prediction(found.path, best, None if best else NOT_FINITE)


def likeliest(logits: Tensor, *, top: int, loss: str) -> list[list[tuple[int, float]]]:
    """Return the first guesses of each row of logits (b, K), the best first; none where a logit is not a number."""
    probabilities = logits.softmax(1) if loss == "softmax" else logits.sigmoid()
    guesses = first_guesses(logits, top)  # (b, top)
    values = probabilities.gather(1, guesses).tolist()
    known = probabilities.isfinite().all(1).tolist()
    return [list(zip(row, value)) if ok else [] for row, value, ok in zip(guesses.tolist(), values, known, strict=True)]


def read_file(path: str) -> bytes:
    """Return a file's content. Raises DataError: there is none to be had."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would keep us waiting
            raise DataError(f"{path}: cannot read this image: this is not a file")
        if status.st_size > MOST_FILE_BYTES:
            raise DataError(f"{path}: cannot read this image: its {status.st_size:,} bytes are too many")
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot read this image: {error.strerror}") from error
    except ValueError as error:  # a name with a NUL in it
        raise DataError(f"{path}: cannot read this image: {error}") from error


def in_order(work: Callable[[Given], Made], given: Iterable[Given], *, threads: int, ahead: int) -> Generator[Made, None, None]:
    """Yield work(item) of each item, in order, made by threads, at most `ahead` of what is asked for.

    Another thread draws from `given`, so that what is made is there even while the next item keeps it waiting.
    """
    slots = threading.Semaphore(ahead)
    made: queue.SimpleQueue[Future[Made] | Exception | None] = queue.SimpleQueue()
    stopped = threading.Event()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="vit-decode", initializer=torch.set_num_threads, initargs=(1,))

    def feed() -> None:
        try:
            for item in given:
                slots.acquire()
                if stopped.is_set():
                    return
                made.put(pool.submit(work, item))
            made.put(None)
        except Exception as error:  # raised to whoever asks for the results
            made.put(error)

    threading.Thread(target=feed, name="vit-names", daemon=True).start()  # a daemon: it may be waiting for names
    try:
        while (one := made.get()) is not None:
            if isinstance(one, Exception):
                raise one
            result = one.result()
            slots.release()
            yield result
    finally:
        stopped.set()
        slots.release()
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- where it goes


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Open a file to write that is there when all of it is; until then, and after an error, what there is is in PATH.part.

    Raises:
        UserError: it is there already, or cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        raise UserError(f"{path}: is there already; choose another --out, or delete it")
    try:
        file = open(part, "w", encoding="utf-8", newline="")  # noqa: SIM115 (closed below, before it is renamed)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        if not part.stat().st_size:
            part.unlink()
        raise
    os.replace(part, path)
