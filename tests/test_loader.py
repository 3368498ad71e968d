"""Loader: the same batches from a thread, from any processes, and in shares; bad images end the run or are replaced."""

import io
import itertools
import os
import signal
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitcli.config import AugmentConfig, DataConfig
from vitcli.data.loader import MOST_REPLACEMENTS, Batch, choose_workers, eval_batches, replacement, train_batches
from vitcli.data.protocol import Source, SourceDefaults
from vitcli.data.sampler import BlockShuffle, FullShuffle, build_order
from vitcli.data.sources import ArraySource, open_source
from vitcli.data.transforms import EvalTransform, TrainTransform
from vitcli.errors import DataError

TRANSFORM = TrainTransform(AugmentConfig(crop="inception", randaugment_layers=1), image_size=(16, 16))
WHOLE = EvalTransform(image_size=(8, 8))


def digits() -> Source:
    return open_source("digits", split="val", data=DataConfig(source="digits", image_size=(8, 8)))


def mixed_files(tmp_path: Path, **settings: Any) -> Source:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (10 + i, 20 - i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    data = DataConfig(source="digits", image_size=(8, 8), memory_cache_gib=0, **settings)
    return open_source(f"folder:{tmp_path / 'set'}", split="train", data=data)


class Files(SourceDefaults):
    """30 image files in memory, of two classes and several sizes; those in `missing` cannot be read, `broken` are no images."""

    name = "files"
    encoded = True
    classes = ["x", "y"]
    fingerprint = ""

    def __init__(self, size: int = 30, *, broken: frozenset[int] = frozenset(), missing: frozenset[int] = frozenset()) -> None:
        self.labels = np.arange(size, dtype=np.int32) % 2
        self.broken = broken
        self.missing = missing

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        if index in self.missing:
            raise DataError(f"{self.where(index)}: there is no such file")
        file = io.BytesIO()
        rng = np.random.default_rng(index)
        Image.fromarray(rng.integers(0, 256, (9 + index % 3, 12, 3), dtype=np.uint8)).save(file, "png")
        return b"nonsense" if index in self.broken else file.getvalue()

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        raise AssertionError("files are decoded by the transform")


def run(
    source: Source,
    *,
    workers: int = 0,
    start: int = 0,
    total: int = 4,
    batch: int = 10,
    micro: int = 4,
    seed: int = 5,
    **settings: Any,
) -> Generator[Batch, None, None]:
    return train_batches(
        source,
        TRANSFORM,
        order=FullShuffle(len(source), seed=seed),
        batch_size=batch,
        micro_batch_size=micro,
        start_step=start,
        total_steps=total,
        seed=seed,
        workers=workers,
        **settings,
    )


def joined(batches: Any, name: str) -> Tensor:
    return torch.cat([batch[name] for batch in batches])


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys() == {"images", "labels", "indices"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def source_of(kind: str, tmp_path: Path) -> Source:
    return {"uniform": digits, "folder": lambda: mixed_files(tmp_path), "files": Files}[kind]()


# ---------------------------------------------------------------- the same batches


def test_a_step_holds_the_next_examples_of_the_order() -> None:
    source = digits()
    expected = FullShuffle(len(source), seed=5).at(np.arange(20, 40))[1]
    for micro in (10, 3):
        assert joined(run(source, start=2, total=4, micro=micro), "indices").tolist() == expected.tolist()
    assert joined(run(source, start=4, total=8, batch=5, micro=2), "indices").tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["uniform", "folder", "files"])
def test_batches_are_bit_identical_for_any_number_of_workers(tmp_path: Path, kind: str) -> None:
    source = source_of(kind, tmp_path)
    state = torch.get_rng_state()
    reference = list(run(source))
    assert [len(batch["labels"]) for batch in reference] == [4, 4, 2] * 4
    for workers in (1, 3):
        assert_same(list(run(source, workers=workers)), reference)
    assert_same(list(run(source, start=2)), reference[6:])  # as a resumed run does
    assert torch.equal(torch.get_rng_state(), state)  # the model's random numbers are not touched
    first = reference[0]
    assert first["images"].shape == (4, 3, 16, 16) and first["images"].dtype == torch.uint8
    assert first["labels"].dtype == first["indices"].dtype == torch.int64
    if kind != "files":
        assert [source[i][1] for i in first["indices"].tolist()] == first["labels"].tolist()


def test_micro_batches_do_not_change_the_images() -> None:
    whole = joined(run(digits(), micro=10), "images")
    parts = joined(run(digits(), micro=3), "images")
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [*itertools.product((2, 3), ("uniform", "files")), (64, "uniform"), pytest.param(64, "files", marks=pytest.mark.slow)],
)
def test_the_shares_of_all_ranks_are_what_one_rank_sees(tmp_path: Path, kind: str, ranks: int) -> None:
    source = source_of(kind, tmp_path)
    reference = list(run(source, total=3, batch=11, micro=8))
    shares = [list(run(source, total=3, batch=11, micro=8, rank=rank, ranks=ranks)) for rank in range(ranks)]
    for parts, expected in zip(zip(*shares, strict=True), reference, strict=True):
        sizes = [len(part["labels"]) for part in parts]
        assert sum(sizes) == len(expected["labels"]) and max(sizes) - min(sizes) <= 1
        assert all(part["images"].shape[1:] == (3, 16, 16) for part in parts)  # of an empty share, too
        for name in expected:
            assert torch.equal(joined(parts, name), expected[name])


def test_blocks_and_workers(tmp_path: Path) -> None:
    source = mixed_files(tmp_path)
    order = BlockShuffle(np.array([0, 7, 12, len(source)]), window=8, seed=0)
    settings: dict[str, Any] = dict(order=order, batch_size=8, micro_batch_size=8, start_step=0, total_steps=5, seed=0)
    reference = list(train_batches(source, TRANSFORM, **settings))
    assert_same(list(train_batches(source, TRANSFORM, **settings, workers=2)), reference)
    assert joined(reference, "indices").tolist() == order.at(np.arange(40))[1].tolist()


def test_remote_blocks_are_fetched_before_they_are_needed() -> None:
    class Remote(Files):
        remote = True

        def __init__(self) -> None:
            super().__init__(120, missing=frozenset({60}))  # the first of a block: fetched ahead in vain
            self.by_thread: dict[str, list[int]] = {}

        def read(self, index: int) -> bytes:
            self.by_thread.setdefault(threading.current_thread().name, []).append(index // 10)
            return super().read(index)

    source = Remote()
    order = BlockShuffle(np.arange(0, 121, 10), window=40, seed=0)
    settings: dict[str, Any] = dict(order=order, batch_size=10, micro_batch_size=10, start_step=0, total_steps=9, seed=0)
    list(train_batches(source, TRANSFORM, **settings, on_error="skip", skip_limit=1, warn=lambda text: None))
    deadline = time.monotonic() + 10
    while len(source.by_thread.get("vit-fetch", [])) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    shown = list(dict.fromkeys((order.at(np.arange(90))[1] // 10).tolist()))
    fetched = source.by_thread["vit-fetch"]
    assert set(shown[4:]) <= set(fetched) and not set(fetched[:8]) & set(shown[:4])  # the first window came unannounced


def test_the_order_of_a_config_is_the_full_shuffle_it_was() -> None:
    source = digits()
    order = build_order(source, DataConfig(source="digits", image_size=(8, 8)), seed=5)
    assert order == FullShuffle(len(source), seed=5)


def test_nothing_left_to_do() -> None:
    assert list(run(digits(), start=4, total=4)) == []
    assert list(run(digits(), workers=1, start=4, total=4)) == []


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_example_once_in_order(workers: int) -> None:
    source = digits()
    batches = list(eval_batches(source, WHOLE, batch_size=50, workers=workers))
    assert joined(batches, "indices").tolist() == list(range(359))
    assert len(batches[-1]["labels"]) == 9
    assert (batches[0]["images"][3].permute(1, 2, 0).numpy() == source[3][0]).all()


@pytest.mark.parametrize(("ranks", "size"), [(2, 30), (3, 31), (7, 30), (64, 30)])
def test_ranks_divide_the_evaluation_among_themselves(ranks: int, size: int) -> None:
    parts = [list(eval_batches(Files(size), WHOLE, batch_size=4, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert [index for part in parts for batch in part for index in batch["indices"].tolist()] == list(range(size))
    assert max(map(len, parts)) <= -(-(size // ranks + 1) // 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_what_cannot_be_read_and_says_so(workers: int) -> None:
    told: list[str] = []
    source = Files(broken=frozenset({3, 4}), missing=frozenset({16, 17, 18, 19}))
    settings: dict[str, Any] = dict(batch_size=4, workers=workers, on_error="skip", skip_limit=6, warn=told.append)
    batches = list(eval_batches(source, WHOLE, **settings))
    assert joined(batches, "indices").tolist() == [i for i in range(30) if i not in (3, 4, 16, 17, 18, 19)]
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 4, 4, 4, 4, 2]  # a batch of which nothing is left is none
    assert told[0].startswith("evaluation leaves out an image that cannot be read (1 of at most 6): files[3]: cannot read")
    assert told[2] == "evaluation leaves out an image that cannot be read (3 of at most 6): files[16]: there is no such file"
    assert told[6:] == ["files: evaluated without 6 of 30 images, which cannot be read"]
    with pytest.raises(DataError, match=r"files: 6 different images cannot be read, more than data.skip_limit=5; .*s\[19\]"):
        list(eval_batches(source, WHOLE, **{**settings, "skip_limit": 5}))
    with pytest.raises(DataError, match=r"files\[3\]: cannot read this image"):
        list(eval_batches(source, WHOLE, batch_size=4, workers=workers))


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_line_wherever_it_is_met(tmp_path: Path, workers: int) -> None:
    source = mixed_files(tmp_path)
    for name in ("a", "b"):
        for path in (tmp_path / "set" / name).iterdir():
            path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"set/[ab]/\d+.png: cannot read this image") as error:
        list(run(source, workers=workers))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_file_is_one_line_wherever_it_is_met(workers: int) -> None:
    with pytest.raises(DataError, match=r"^files\[7\]: there is no such file$"):
        list(run(Files(missing=frozenset({7})), workers=workers))


def test_another_image_takes_the_place_of_a_bad_one_whoever_meets_it(tmp_path: Path) -> None:
    broken, missing = frozenset({3, 11}), frozenset({20})
    whole = joined(run(Files(), total=9), "indices")
    told: list[str] = []
    source = Files(broken=broken, missing=missing)
    reference = list(run(source, total=9, on_error="skip", skip_limit=3, warn=told.append))
    indices = joined(reference, "indices")
    tried = {index: [replacement(index, attempt, 30) for attempt in range(1, 9)] for index in broken | missing}
    place = {index: next(new for new in tried[index] if new not in broken | missing) for index in tried}
    assert indices.tolist() == [place.get(index, index) for index in whole.tolist()]
    assert joined(reference, "labels").tolist() == (indices % 2).tolist()
    assert len(told) == 3  # in three epochs each is met three times, and told once
    assert sorted(line.split(": ", 1)[1].split(":")[0] for line in told) == ["files[11]", "files[20]", "files[3]"]
    assert told[0].startswith("another image takes the place of one that cannot be read (1 of at most 3): files[")
    for workers in (1, 3):
        again: list[str] = []
        got = list(run(source, total=9, workers=workers, on_error="skip", skip_limit=3, warn=again.append))
        assert_same(got, reference)
        assert again == told
    shares = [list(run(source, total=9, on_error="skip", skip_limit=3, warn=told.append, rank=r, ranks=2)) for r in range(2)]
    for parts, expected in zip(zip(*shares, strict=True), reference, strict=True):
        assert torch.equal(joined(parts, "images"), expected["images"])


def test_good_images_of_a_batch_with_a_bad_one_are_what_they_were() -> None:
    good = {name: joined(run(Files(), total=3), name) for name in ("images", "indices")}
    told: list[str] = []
    source = Files(broken=frozenset({3}))
    got = {name: joined(run(source, total=3, on_error="skip", skip_limit=1, warn=told.append), name) for name in good}
    same = good["indices"] != 3
    assert torch.equal(got["images"][same], good["images"][same]) and not same.all()


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_end_the_run(workers: int) -> None:
    told: list[str] = []
    source = Files(300, broken=frozenset(range(0, 300, 10)))
    batches = run(source, workers=workers, total=30, on_error="skip", skip_limit=7, warn=told.append)
    seen: list[Batch] = []
    with pytest.raises(DataError) as error:
        seen.extend(batches)
    assert len(told) == 7 and seen
    message = str(error.value)
    assert message.startswith(
        "files: 8 different images cannot be read, more than data.skip_limit=7; run `vit data check files` to list them all; "
        "the last: files["
    )
    assert "cannot read this image" in message and "\n" not in message


def test_no_image_may_be_skipped_by_default() -> None:
    with pytest.raises(DataError, match="files: 1 different images cannot be read, more than data.skip_limit=0"):
        list(run(Files(broken=frozenset({3})), on_error="skip"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_a_good_image_ends_at_once(workers: int) -> None:
    source = Files(4, broken=frozenset(range(4)))
    with pytest.raises(DataError, match=rf"files: no image found .* place of files\[\d\], {MOST_REPLACEMENTS} tried; run `vit"):
        list(run(source, workers=workers, on_error="skip", skip_limit=100))
    with pytest.raises(DataError, match="files: 4 different images cannot be read, more than data.skip_limit=3"):
        list(run(source, workers=workers, on_error="skip", skip_limit=3, warn=lambda text: None))


def test_files_of_a_folder_are_replaced_too(tmp_path: Path) -> None:
    source = mixed_files(tmp_path, on_error="skip")
    cut_off, lost = Path(source.where(2)), Path(source.where(15))
    cut_off.write_bytes(cut_off.read_bytes()[:60])
    lost.unlink()
    told: list[str] = []
    batches = list(run(source, total=5, on_error="skip", skip_limit=2, warn=told.append))
    assert set(joined(batches, "indices").tolist()) == set(range(len(source))) - {2, 15}
    assert len(told) == 2 and {line.split(": ")[1] for line in told} == {str(cut_off), str(lost)}


class Broken(ArraySource):
    """A source with a defect of ours."""

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        raise RuntimeError("a defect")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_defects_surface_too(workers: int, on_error: str) -> None:
    source = Broken(np.zeros((4, 8, 8), np.uint8), np.zeros(4, np.int64), ["x"], name="x", fingerprint="")
    with pytest.raises(RuntimeError, match="a defect"):
        list(run(source, workers=workers, on_error=on_error, skip_limit=9))


# ---------------------------------------------------------------- threads and processes


def test_closing_the_iterator_ends_its_thread_and_processes() -> None:
    before = set(threading.enumerate())  # other tests' threads may end at any moment
    batches = run(digits(), total=10_000)
    next(batches)
    assert len(set(threading.enumerate()) - before) == 1
    batches.close()
    assert not set(threading.enumerate()) - before
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


def test_batches_are_prepared_ahead_of_time_but_not_without_end() -> None:
    class Counting(ArraySource):
        asked = 0

        def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
            self.asked += 1
            return super().batch(indices)

    source = Counting(np.zeros((40, 8, 8), np.uint8), np.zeros(40, np.int64), ["x"], name="x", fingerprint="")
    with_ahead = run(source, total=100, batch=4, micro=4)
    next(with_ahead)
    deadline = time.monotonic() + 10
    while source.asked < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert source.asked == 3
    with_ahead.close()


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
