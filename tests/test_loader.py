"""Loader: which examples form a step, and the same batches from a thread and from any number of processes."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from vitcli.config import AugmentConfig, DataConfig
from vitcli.data.loader import choose_workers, eval_batches, examples_of_step, train_batches
from vitcli.data.sources import ArraySource, Source, open_source
from vitcli.data.transforms import EvalTransform, TrainTransform
from vitcli.errors import DataError

TRANSFORM = TrainTransform(AugmentConfig(crop="inception", randaugment_layers=1), image_size=(16, 16))


def digits() -> Source:
    return open_source("digits", split="val", data=DataConfig(source="digits", image_size=(8, 8)))


def mixed_files(tmp_path: Path) -> Source:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (10 + i, 20 - i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    data = DataConfig(source="digits", image_size=(8, 8), memory_cache_gib=0)
    return open_source(f"folder:{tmp_path / 'set'}", split="train", data=data)


def run(source: Source, *, workers: int, start: int = 0, total: int = 4, batch: int = 10, micro: int = 4, seed: int = 5):  # type: ignore[no-untyped-def]
    return train_batches(
        source,
        TRANSFORM,
        batch_size=batch,
        micro_batch_size=micro,
        start_step=start,
        total_steps=total,
        seed=seed,
        workers=workers,
    )


@pytest.mark.parametrize("size", [1, 7, 64, 100])
@pytest.mark.parametrize("batch_size", [1, 5, 64, 130])
def test_every_epoch_is_a_shuffle_of_everything(size: int, batch_size: int) -> None:
    steps = -(-3 * size // batch_size)
    parts = [examples_of_step(step, batch_size=batch_size, num_examples=size, seed=1) for step in range(steps)]
    epochs, indices = (np.concatenate(column) for column in zip(*parts, strict=True))
    orders: list[NDArray[np.int64]] = [indices[epochs == epoch] for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    assert (np.diff(epochs) >= 0).all()
    if size >= 64:
        assert (orders[0] != orders[1]).any() and (orders[0] != np.arange(size)).any()
        assert (examples_of_step(0, batch_size=size, num_examples=size, seed=2)[1] != orders[0]).any()


def test_batch_size_does_not_change_the_order() -> None:
    small = np.concatenate([examples_of_step(s, batch_size=3, num_examples=50, seed=0)[1] for s in range(20)])
    large = np.concatenate([examples_of_step(s, batch_size=30, num_examples=50, seed=0)[1] for s in range(2)])
    assert (small == large).all()


@pytest.mark.parametrize("kind", ["uniform", "mixed"])
def test_batches_are_bit_identical_for_any_number_of_workers(tmp_path: Path, kind: str) -> None:
    source = digits() if kind == "uniform" else mixed_files(tmp_path)
    state = torch.get_rng_state()
    reference = list(run(source, workers=0))
    assert [len(batch["labels"]) for batch in reference] == [4, 4, 2] * 4
    for workers in (1, 3):
        got = list(run(source, workers=workers))
        assert len(got) == len(reference)
        for batch, expected in zip(got, reference, strict=True):
            assert batch.keys() == expected.keys() == {"images", "labels", "indices"}
            assert all(torch.equal(batch[name], expected[name]) for name in batch)
    for batch, expected in zip(run(source, workers=0, start=2), reference[6:], strict=True):  # as a resumed run does
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert torch.equal(torch.get_rng_state(), state)  # the model's random numbers are not touched
    first = reference[0]
    assert first["images"].shape == (4, 3, 16, 16) and first["images"].dtype == torch.uint8
    assert [source[i][1] for i in first["indices"].tolist()] == first["labels"].tolist()


def test_micro_batches_do_not_change_the_images() -> None:
    whole = torch.cat([batch["images"] for batch in run(digits(), workers=0, micro=10)])
    parts = torch.cat([batch["images"] for batch in run(digits(), workers=0, micro=3)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_example_once_in_order(workers: int) -> None:
    source = digits()
    batches = list(eval_batches(source, EvalTransform(image_size=(8, 8)), batch_size=50, workers=workers))
    assert torch.cat([batch["indices"] for batch in batches]).tolist() == list(range(359))
    assert len(batches[-1]["labels"]) == 9
    assert (batches[0]["images"][3].permute(1, 2, 0).numpy() == source[3][0]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_line_wherever_it_is_met(tmp_path: Path, workers: int) -> None:
    source = mixed_files(tmp_path)
    for name in ("a", "b"):
        for path in (tmp_path / "set" / name).iterdir():
            path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"set/[ab]/\d+.png: cannot read this image") as error:
        list(run(source, workers=workers))
    assert "\n" not in str(error.value)


class Broken(ArraySource):
    """A source with a defect of ours."""

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        raise RuntimeError("a defect")


@pytest.mark.parametrize("workers", [0, 1])
def test_defects_surface_too(workers: int) -> None:
    source = Broken(np.zeros((4, 8, 8), np.uint8), np.zeros(4, np.int64), ["x"], name="x", fingerprint="")
    with pytest.raises(RuntimeError, match="a defect"):
        list(run(source, workers=workers))


def test_closing_the_iterator_ends_its_thread_and_processes() -> None:
    before = threading.active_count()
    batches = run(digits(), workers=0, total=10_000)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
    others = set(torch.multiprocessing.active_children())  # of failed iterators that a traceback still refers to
    batches = run(digits(), workers=2, total=10_000)
    next(batches)
    children = set(torch.multiprocessing.active_children()) - others
    assert len(children) == 2
    batches.close()
    deadline = time.monotonic() + 10
    while children & set(torch.multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children & set(torch.multiprocessing.active_children())


def test_signals_to_the_group_do_not_reach_loader_processes() -> None:
    batches = run(digits(), workers=2, total=60)
    seen = [next(batches)]
    for child in torch.multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    seen.extend(batches)
    assert len(seen) == 180


def test_choose_workers(tmp_path: Path) -> None:
    assert choose_workers(digits(), "cpu") == 0
    assert 1 <= choose_workers(digits(), "cuda") <= 8
    assert 1 <= choose_workers(mixed_files(tmp_path), "cpu") <= 8


def test_nothing_left_to_do() -> None:
    assert list(run(digits(), workers=0, start=4, total=4)) == []
    assert list(run(digits(), workers=1, start=4, total=4)) == []
