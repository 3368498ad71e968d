"""Which checkpoints stay, and that none is deleted under a reader."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from vitcli.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from vitcli.in_use import held
from vitcli.retention import Keep, discard_after, kept_steps, prune

MANIFEST = {
    "model": {},
    "classes": ["a"],
    "preprocessing": {"image_size": (8, 8)},
    "source": "digits",
    "seed": 0,
}


def save(directory: Path, *steps: int) -> list[Path]:
    state = {"w": torch.ones(3)}
    return [
        save_checkpoint(directory, step=step, model_state=state, ema_state=None, optimizer_state={}, manifest=MANIFEST)
        for step in steps
    ]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("keep", "scores", "expected"),
    [
        (Keep(last=1), {}, {60}),
        (Keep(last=2), {}, {60, 50}),
        (Keep(last=9), {}, {10, 20, 30, 40, 50, 60}),
        (Keep(last=1, every_steps=20), {}, {20, 40, 60}),
        (Keep(last=1, every_steps=7), {}, {60}),
        (Keep(last=1, best=1), {10: 0.5, 20: 0.9, 30: 0.1}, {20, 60}),
        (Keep(last=1, best=2), {10: 0.5, 20: 0.9, 30: 0.1}, {10, 20, 60}),
        (Keep(last=1, best=1, higher_is_better=False), {10: 0.5, 20: 0.9, 30: 0.1}, {30, 60}),
        (Keep(last=1, best=1), {10: 0.5, 20: 0.5}, {20, 60}),  # equal: the newer
        (Keep(last=1, best=1, higher_is_better=False), {10: 0.5, 20: 0.5}, {20, 60}),
        (Keep(last=1, best=1), {10: float("nan"), 20: -1.0, 30: float("inf")}, {20, 60}),
        (Keep(last=1, best=1), {15: 0.9}, {60}),  # of a step without a checkpoint
        (Keep(last=1, best=1, every_steps=30), {60: 0.9, 50: 0.8}, {30, 60}),
    ],
)
def test_kept_steps(keep: Keep, scores: dict[int, float], expected: set[int]) -> None:
    assert kept_steps([10, 20, 30, 40, 50, 60], keep, scores) == expected


def test_the_newest_is_always_kept() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Keep(last=0)


def test_prune(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3, 4, 5)
    done = prune(tmp_path, keep=Keep(last=1, best=1), step=5, scores={2: 0.9}, also=[4])
    assert (done.deleted, done.in_use, done.failed) == ([paths[2], paths[0]], [], [])
    assert names(tmp_path) == ["step_00000002", "step_00000004", "step_00000005"]


def test_later_ones_are_damaged_and_do_not_count(tmp_path: Path) -> None:
    save(tmp_path, 3, 4)
    save(tmp_path, 2)  # resumed at 2: what was just saved must outlive the others
    assert prune(tmp_path, keep=Keep(last=1), step=2).deleted == []
    assert len(names(tmp_path)) == 3


def test_nothing_is_deleted_without_the_newest(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3)
    shutil.rmtree(paths[2])
    assert prune(tmp_path, keep=Keep(last=1), step=3).deleted == []
    assert prune(tmp_path / "nothing", keep=Keep(), step=3).deleted == []


def test_one_that_we_read_is_left_until_we_are_done(tmp_path: Path) -> None:
    old, _ = save(tmp_path, 1, 2)
    with held(old / "manifest.json"):
        assert prune(tmp_path, keep=Keep(last=1), step=2).in_use == [old]
        verify_checkpoint(old)
    assert prune(tmp_path, keep=Keep(last=1), step=2).deleted == [old]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "manifest.json"])
def test_one_that_is_copied_is_left_until_it_is_done(tmp_path: Path, name: str) -> None:
    old, _ = save(tmp_path, 1, 2)
    code = "import sys; file = open(sys.argv[1]); print('open', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, str(old / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as copy:
        assert copy.stdout is not None
        assert copy.stdout.readline() == b"open\n"
        assert prune(tmp_path, keep=Keep(last=1), step=2).in_use == [old]
        copy.communicate(b"\n")
    verify_checkpoint(old)
    assert prune(tmp_path, keep=Keep(last=1), step=2).deleted == [old]


def test_what_was_loaded_is_nobodys_file(tmp_path: Path) -> None:
    old, _ = save(tmp_path, 1, 2)
    loaded = load_checkpoint(old)
    os.truncate(old / "model.safetensors", 0)  # would end the process if the tensors were the file itself
    assert loaded.model_state["w"].tolist() == [1.0, 1.0, 1.0]
    assert prune(tmp_path, keep=Keep(last=1), step=2).deleted == [old]
    assert loaded.model_state["w"].tolist() == [1.0, 1.0, 1.0]


def test_a_copy_between_two_files_is_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = save(tmp_path, 1, 2)
    copies: list[bytes] = []
    copy = threading.Thread(target=lambda: copies.append((old / "model.safetensors").read_bytes()))

    def until_it_opens_the_next(seconds: float) -> None:
        assert seconds > 0
        copy.start()
        while not breaking_leases((old / "model.safetensors").stat().st_ino):
            os.sched_yield()

    monkeypatch.setattr(time, "sleep", until_it_opens_the_next)
    assert prune(tmp_path, keep=Keep(last=1), step=2).in_use == [old]
    copy.join(30)
    assert copies == [(old / "model.safetensors").read_bytes()]


def test_who_comes_at_the_renaming_finds_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = save(tmp_path, 1, 2)
    rename = os.rename
    held_open: list[subprocess.Popen[bytes]] = []

    def with_a_comer(source: Path, target: Path) -> None:
        if not held_open:
            # opens the file and is made to wait by the lease, as cp would at this moment
            held_open.append(subprocess.Popen([sys.executable, "-c", f"open({str(source / 'optimizer.pt')!r}).close()"]))
            while not breaking_leases((source / "optimizer.pt").stat().st_ino):
                time.sleep(0.01)
        rename(source, target)

    monkeypatch.setattr(os, "rename", with_a_comer)
    assert prune(tmp_path, keep=Keep(last=1), step=2).in_use == [old]
    assert held_open[0].wait(30) == 0
    verify_checkpoint(old)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def breaking_leases(inode: int) -> list[str]:
    """Return the kernel's lines on leases of a file that somebody waits for."""
    lines = Path("/proc/locks").read_text().splitlines()
    return [line for line in lines if "LEASE" in line and "BREAK" in line and f":{inode} " in line]


def test_links_are_left_alone(tmp_path: Path) -> None:
    (elsewhere,) = save(tmp_path / "elsewhere", 1)
    save(tmp_path / "checkpoints", 2)
    (tmp_path / "checkpoints" / "step_00000001").symlink_to(elsewhere)
    assert prune(tmp_path / "checkpoints", keep=Keep(last=1), step=2).deleted == []
    verify_checkpoint(elsewhere)


def test_one_that_cannot_be_deleted_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = save(tmp_path, 1, 2)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        done = prune(tmp_path, keep=Keep(last=1), step=2)
    assert done.failed == [f"{old}: cannot delete this old checkpoint (Permission denied)"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        assert len(prune(tmp_path, keep=Keep(last=1), step=2).failed) == 1
    assert len(names(tmp_path)) == 2  # renamed, so nobody takes it for a checkpoint
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_discard_after(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3, 4)
    assert discard_after(tmp_path, 2) == [paths[3], paths[2]]
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert discard_after(tmp_path, 2) == []
    assert discard_after(tmp_path / "nothing", 0) == []


def test_a_discarded_one_is_no_checkpoint_even_if_somebody_reads_it(tmp_path: Path) -> None:
    _, undone = save(tmp_path, 1, 2)
    with open(undone / "optimizer.pt", "rb") as file:
        discard_after(tmp_path, 1)
        assert not undone.exists()
        assert len(names(tmp_path)) == 2
        save(tmp_path, 2)
        assert discard_after(tmp_path, 1) == [undone]  # a second one of that step
        assert file.read(2) == b"PK"
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
