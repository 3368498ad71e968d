"""Steps that are not finite: which ones, how many, where a run goes on, and what is kept of them."""

import errno
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vitcli import recovery, retention
from vitcli.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, step_of
from vitcli.errors import RunExistsError, UserError
from vitcli.recovery import (
    LossScale,
    Part,
    Rollback,
    Streak,
    Verdict,
    add_rollback,
    data_step,
    judge,
    read_rollbacks,
    store_batch,
)
from vitcli.retention import Keep, discard_after, prune

# ---------------------------------------------------------------- one step


@pytest.mark.parametrize(
    ("loss_finite", "gradient_finite", "loss_scale", "verdict"),
    [
        (True, True, 1.0, "apply"),
        (True, True, 1024.0, "apply"),
        (True, False, 1.0, "nonfinite"),
        (True, False, 2.0, "overflow"),
        (False, False, 1.0, "nonfinite"),
        (False, False, 1024.0, "nonfinite"),  # the scale touches the gradient alone
        (False, True, 1024.0, "nonfinite"),
    ],
)
def test_judge(loss_finite: bool, gradient_finite: bool, loss_scale: float, verdict: Verdict) -> None:
    assert judge(loss_finite=loss_finite, gradient_finite=gradient_finite, loss_scale=loss_scale) == verdict


def test_loss_scale() -> None:
    scale = LossScale(8.0, 0, interval=3)
    seen = []
    for overflow in (False, False, False, True, False, False, True, True, True, True, True, False):
        scale = scale.after(overflow=overflow)
        seen.append((scale.scale, scale.good_steps))
    assert seen == [(8, 1), (8, 2), (16, 0), (8, 0), (8, 1), (8, 2), (4, 0), (2, 0), (1, 0), (1, 0), (1, 0), (1, 1)]


@given(st.lists(st.booleans(), max_size=200))
def test_loss_scale_is_that_of_torch(overflows: list[bool]) -> None:
    """Against GradScaler's own kernel, within our limits."""
    ours, theirs, growth = LossScale(interval=3), torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    for overflow in overflows:
        ours = ours.after(overflow=overflow)
        torch._amp_update_scale_(theirs, growth, torch.tensor(float(overflow)), 2.0, 0.5, 3)
        theirs.clamp_(1.0, 2.0**24)
        assert (ours.scale, ours.good_steps) == (theirs.item(), growth.item())


def test_an_overflow_comes_to_an_end() -> None:
    scale, streak, steps = LossScale(2.0**24), Streak(), 0
    while streak.length < 3:
        verdict = judge(loss_finite=True, gradient_finite=False, loss_scale=scale.scale)
        scale, streak = scale.after(overflow=True), streak.after(steps, verdict)
        steps += 1
    assert (steps, streak) == (27, Streak(3, 24))


@pytest.mark.parametrize("scale", [LossScale(), LossScale(2.0, 5, 100), LossScale(1.0), LossScale(2.0**24, 1999)])
def test_loss_scale_comes_back(scale: LossScale) -> None:
    assert LossScale.from_dict(json.loads(json.dumps(scale.as_dict()))) == scale


@pytest.mark.parametrize(
    "stored",
    [
        None,
        [],
        {},
        {"scale": "x", "good_steps": 0, "interval": 1},
        {"scale": 0.5, "good_steps": 0, "interval": 9},
        {"scale": 3.0, "good_steps": 0, "interval": 9},
        {"scale": float("nan"), "good_steps": 0, "interval": 9},
        {"scale": float("inf"), "good_steps": 0, "interval": 9},
        {"scale": 2.0, "good_steps": 9, "interval": 9},
        {"scale": 2.0, "good_steps": -1, "interval": 9},
        {"scale": 2.0, "good_steps": float("inf"), "interval": 9},
        {"scale": 2.0**25, "good_steps": 0, "interval": 9},
    ],
)
def test_a_scale_that_no_run_stored_gives_the_first_one(stored: Any) -> None:
    assert LossScale.from_dict(stored) == LossScale()


def test_streak() -> None:
    verdicts: list[Verdict] = ["apply", "nonfinite", "overflow", "nonfinite", "nonfinite", "apply", "overflow", "nonfinite"]
    streak, seen = Streak(), []
    for step, verdict in enumerate(verdicts, start=10):
        streak = streak.after(step, verdict)
        seen.append((streak.length, streak.first_step))
    assert seen == [(0, 0), (1, 11), (1, 11), (2, 11), (3, 11), (0, 0), (0, 0), (1, 17)]
    assert Streak.from_dict(json.loads(json.dumps(Streak(2, 11).as_dict()))) == Streak(2, 11)
    strange: list[Any] = [None, [], {}, {"length": "x", "first_step": 1}, {"length": float("inf"), "first_step": 1}]
    for stored in strange:
        assert Streak.from_dict(stored) == Streak()


# ---------------------------------------------------------------- going back


@pytest.mark.parametrize(
    ("rollbacks", "expected"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        ([Rollback(0, 3)], [3, 4, 5, 6, 7, 8]),
        ([Rollback(2, 3)], [0, 1, 5, 6, 7, 8]),
        ([Rollback(2, 3), Rollback(4, 1)], [0, 1, 5, 6, 8, 9]),
        ([Rollback(2, 3), Rollback(2, 10)], [0, 1, 15, 16, 17, 18]),
        ([Rollback(4, 1), Rollback(2, 3)], [0, 1, 5, 6, 8, 9]),
    ],
)
def test_data_step(rollbacks: list[Rollback], expected: list[int]) -> None:
    assert [data_step(step, rollbacks) for step in range(6)] == expected


def test_no_batch_is_met_again(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    assert add_rollback(tmp_path, back_to=10, step=17, most=3, streak=3) == [Rollback(10, 7)]
    assert data_step(10, read_rollbacks(tmp_path)) == 17
    assert add_rollback(tmp_path, back_to=10, step=14, most=3, streak=3) == [Rollback(10, 7), Rollback(10, 4)]
    assert data_step(10, read_rollbacks(tmp_path)) == 21
    rollbacks = add_rollback(tmp_path, back_to=20, step=24, most=3, streak=3)
    assert rollbacks[-1] == Rollback(20, 4)
    assert [data_step(step, rollbacks) for step in (9, 10, 19, 20)] == [9, 21, 30, 35]
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row before step 1,030, after 3 of 3 rollbacks") as caught:
        add_rollback(tmp_path, back_to=20, step=1030, most=3, streak=3)
    assert "\n" not in str(caught.value)
    assert read_rollbacks(tmp_path) == rollbacks


def test_no_rollback_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="after 0 of 0 rollbacks"):
        add_rollback(tmp_path, back_to=0, step=3, most=0, streak=3)
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=6))
def test_the_data_never_stands_still_or_goes_back(jumps: list[tuple[int, int]]) -> None:
    rollbacks: list[Rollback] = []
    for back_to, ahead in jumps:
        met = data_step(back_to + ahead - 1, rollbacks)  # by the last step before going back
        skip = data_step(back_to + ahead, rollbacks) - data_step(back_to, rollbacks)
        rollbacks.append(Rollback(back_to, skip))
        assert data_step(back_to, rollbacks) > met
    batches = [data_step(step, rollbacks) for step in range(100)]
    assert batches == sorted(set(batches))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "{",
        '{"rollbacks": 3}',
        '{"rollbacks": [3]}',
        '{"rollbacks": [{"step": 1}]}',
        '{"rollbacks": [{"step": 1, "skip": 0}]}',
        '{"rollbacks": [{"step": -1, "skip": 1}]}',
        '{"rollbacks": [{"step": 1.0, "skip": 1}]}',
        '{"rollbacks": [{"step": true, "skip": 1}]}',
        '{"rollbacks": [{"step": 1, "skip": 1e999}]}',
        '{"rollbacks": [{"step": 1, "skip": 99999999999999999999}]}',
        '{"rollbacks": [{"step": 1, "skip": 1, "more": 1}]}',
        "[" * 100_000,
    ],
)
def test_rollbacks_that_no_run_wrote(tmp_path: Path, text: str) -> None:
    (tmp_path / "rollbacks.json").write_text(text)
    with pytest.raises(RunExistsError, match=r"rollbacks\.json"):
        read_rollbacks(tmp_path)


def test_a_kill_while_writing_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = add_rollback(tmp_path, back_to=1, step=3, most=3, streak=2)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"rollbacks\.json: cannot be written"):
        add_rollback(tmp_path, back_to=1, step=3, most=3, streak=2)
    assert read_rollbacks(tmp_path) == before


# ---------------------------------------------------------------- a run in small


class Killed(Exception):
    pass


class Run:
    """A run whose weights are one number that tells every step and batch that made it, and where some batches are bad.

    It saves every 10 steps and goes back as a training run should; an interrupted one saves where it stands, a killed one dies.
    """

    every, limit, most, steps = 10, 3, 9, 60

    def __init__(self, directory: Path, bad: frozenset[int]) -> None:
        self.directory, self.bad = directory, bad
        self.dies_at: frozenset[tuple[str, int]] = frozenset()  # a place and how often it was passed
        self.passed: dict[str, int] = {}

    def place(self, name: str) -> bool:
        """Note that a place is passed; say whether something is to happen there."""
        self.passed[name] = self.passed.get(name, 0) + 1
        return (name, self.passed[name]) in self.dies_at

    def may_die(self, name: str) -> None:
        if self.place(name):
            raise Killed

    def save(self, step: int, value: int, streak: Streak) -> None:
        directory = self.directory / "checkpoints"
        save_checkpoint(
            directory,
            step=step,
            model_state={"w": torch.tensor(value)},
            ema_state=None,
            optimizer_state={},
            manifest={"model": {}, "classes": [], "preprocessing": {"image_size": [8, 8]}, "source": "s", "seed": 0},
            extra={"streak": streak.as_dict()},
        )
        self.may_die("saved")
        back = (streak.first_step if streak.length else step) // self.every * self.every
        prune(directory, keep=Keep(last=1), step=step, also={back})

    def go(self) -> int | None:
        """Run to the end and return the weights, or None after an interruption."""
        value, step, streak = 1, 0, Streak()
        newest = latest_checkpoint(self.directory)
        if newest is not None:
            loaded = load_checkpoint(newest)
            value, step, streak = int(loaded.model_state["w"]), loaded.step, Streak.from_dict(loaded.extra["streak"])
        rollbacks = read_rollbacks(self.directory)
        while step < self.steps:
            batch = data_step(step, rollbacks)
            verdict: Verdict = "nonfinite" if batch in self.bad else "apply"
            if verdict == "apply":
                value = (value * 31 + 7 * step + batch) % (10**9 + 7)
            streak = streak.after(step, verdict)
            step += 1
            if streak.length == self.limit:
                target = latest_checkpoint(self.directory, up_to=streak.first_step, every_steps=self.every)
                back_to = 0 if target is None else step_of(target)
                self.may_die("before")
                discard_after(self.directory / "checkpoints", back_to)
                self.may_die("between")
                add_rollback(self.directory, back_to=back_to, step=step, most=self.most, streak=streak.length)
                self.may_die("after")
                return self.go()
            if step % self.every == 0:
                self.save(step, value, streak)
            self.may_die("step")
            if self.place("stop"):
                self.save(step, value, streak)
                return None
        return value


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 6)), min_size=1, max_size=4),
    st.frozensets(st.integers(1, 80), max_size=8),
    st.frozensets(
        st.tuples(st.just("step"), st.integers(1, 80))
        | st.tuples(st.sampled_from(["saved", "before", "between", "after"]), st.integers(1, 4)),
        max_size=4,
    ),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_kills_and_interruptions_do_not_change_the_path(
    stretches: list[tuple[int, int]], stops: frozenset[int], deaths: frozenset[tuple[str, int]]
) -> None:
    bad = frozenset(batch for start, length in stretches for batch in range(start, start + length))
    with TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # no power cuts here
        patch.setattr(retention, "PAUSE_SECONDS", 0)
        whole, broken = (Run(Path(place) / name, bad) for name in ("whole", "broken"))
        for run in (whole, broken):
            run.directory.mkdir()
        expected = whole.go()
        broken.dies_at = deaths | {("stop", time) for time in stops}
        found = None
        while found is None:
            with suppress(Killed):
                found = broken.go()
        assert found == expected
        assert read_rollbacks(broken.directory) == read_rollbacks(whole.directory)


def test_the_runs_above_do_go_back(tmp_path: Path) -> None:
    """A negative control: a streak of three in a row is behind some of them."""
    run = Run(tmp_path, frozenset({14, 15, 16, 38, 39, 40}))
    run.go()
    assert read_rollbacks(tmp_path) == [Rollback(10, 7), Rollback(30, 4)]


# ---------------------------------------------------------------- for a look


def part(seed: int, size: int, loss: float = math.nan) -> Part:
    generator = torch.Generator().manual_seed(seed)
    return Part(
        images=torch.randint(256, (size, 3, 4, 4), dtype=torch.uint8, generator=generator),
        labels=torch.arange(size),
        indices=torch.arange(size) + 100 * seed,
        where=[f"train/cat/{seed}-{number}.png" for number in range(size)],
        loss=loss,
    )


def test_store_batch(tmp_path: Path) -> None:
    parts = [part(1, 3, 0.5), part(2, 2, math.inf), part(3, 0, math.nan)]
    folder = store_batch(tmp_path, step=7, batch=7, parts=parts, gradient_norm=-math.inf, about={"precision": "bf16"})
    assert folder == tmp_path / "nonfinite" / "step_00000007"
    assert sorted(path.name for path in folder.iterdir()) == ["rank_000.json", "rank_000.safetensors"]
    stored = load_file(folder / "rank_000.safetensors")
    assert torch.equal(stored["images"], torch.cat([p.images for p in parts]))
    assert stored["labels"].tolist() == [0, 1, 2, 0, 1]
    assert stored["indices"].tolist() == [100, 101, 102, 200, 201]
    assert stored["part"].tolist() == [0, 0, 0, 1, 1]
    said = json.loads((folder / "rank_000.json").read_text())
    assert said["losses"] == [0.5, "inf", "nan"]
    assert (said["gradient_norm"], said["precision"], said["step"], said["batch"]) == ("-inf", "bf16", 7, 7)
    assert said["examples"][3] == {"where": "train/cat/2-0.png", "index": 200, "label": 0, "part": 1}


def test_ranks_store_beside_each_other_and_a_step_after_a_rollback_too(tmp_path: Path) -> None:
    for rank in (0, 3):
        store_batch(tmp_path, step=7, batch=7, parts=[part(rank, 1)], gradient_norm=1.0, rank=rank, about={})
    again = store_batch(tmp_path, step=7, batch=12, parts=[part(1, 1)], gradient_norm=1.0, about={})
    assert again == tmp_path / "nonfinite" / "step_00000007-batch_00000012"
    assert len(list((tmp_path / "nonfinite" / "step_00000007").iterdir())) == 4
    # a resumed run meets the same step again
    assert store_batch(tmp_path, step=7, batch=12, parts=[part(1, 1)], gradient_norm=1.0, about={}) == again


def test_a_run_that_fails_all_the_time_does_not_fill_the_disk(tmp_path: Path) -> None:
    folders = [
        store_batch(tmp_path, step=step, batch=step, parts=[part(1, 1)], gradient_norm=1.0, about={}) for step in range(15)
    ]
    assert [folder is not None for folder in folders] == [True] * recovery.MOST_STORED + [False] * 5
    assert store_batch(tmp_path, step=3, batch=3, parts=[part(1, 1)], gradient_norm=1.0, rank=1, about={}) is not None


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "nonfinite").write_text("")
    with pytest.raises(UserError, match=r"nonfinite/step_00000001: cannot be written"):
        store_batch(tmp_path, step=1, batch=1, parts=[part(1, 1)], gradient_norm=1.0, about={})
