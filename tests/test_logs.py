"""The log: same numbers everywhere, valid JSON, nothing twice after a resume."""

import contextlib
import io
import itertools
import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from vitcli import logs
from vitcli.errors import UserError
from vitcli.logs import RunLog, duration


class Clock:
    """A clock that moves when told."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def seconds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each event file be a second younger than the one before: TensorBoard reads them in the order of their names.

    A process opens one, and a restart takes longer than a second to get there; a test does not.
    """
    seconds = itertools.count(round(time.time()))
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(seconds)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


def open_log(run_dir: Path, *, start_step: int = 0, stream: io.StringIO | None = None, quiet: bool = False) -> RunLog:
    stream = io.StringIO() if stream is None else stream
    return RunLog(run_dir, start_step=start_step, total_steps=1000, batch_size=100, stream=stream, quiet=quiet)


def rows_in(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def scalars_in(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_plain_lines(tmp_path: Path, clock: Clock) -> None:
    stream = io.StringIO()
    with open_log(tmp_path, stream=stream) as log:
        clock.now += 12.0
        assert log.train_row(120, {"loss": 3.2123, "accuracy": 0.123, "lr": 1e-3}) == pytest.approx(1000.0)
        log.eval_row(120, {"top1": 0.5, "top5": 0.9, "loss": 1.25})
        log.message("saved")
    assert stream.getvalue().splitlines() == [
        "step 120/1000 (12 %) loss 3.212 acc 12.3 % 1000 img/s ETA 01:28",
        "eval step 120/1000: top-1 50.00 %, top-5 90.00 %, loss 1.25",
        "saved",
    ]


def test_speed_leaves_pauses_out(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path) as log:
        clock.now += 2.0
        with log.paused(), log.paused():
            clock.now += 50.0
        with contextlib.suppress(KeyError), log.paused():
            clock.now += 7.0
            raise KeyError
        assert log.train_row(10, {}) == pytest.approx(500.0)
        clock.now += 1.0
        assert log.train_row(20, {}) == pytest.approx(1000.0)  # the pauses are not taken off twice
        with pytest.raises(ValueError, match="forward"):
            log.train_row(20, {})
    assert [row["images_per_second"] for row in rows_in(tmp_path)] == pytest.approx([500.0, 1000.0])


def test_rows_go_to_both_files(tmp_path: Path) -> None:
    with open_log(tmp_path, quiet=True) as log:
        log.train_row(10, {"loss": 2.5, "accuracy": None, "lr": 1e-3, "epoch": 0.5})
        log.eval_row(10, {"top1": 0.25, "per_class": [0.5, None], "loss": 2.0})
    train, evaluation = rows_in(tmp_path)
    assert (train["kind"], train["step"], train["loss"], train["accuracy"]) == ("train", 10, 2.5, None)
    assert evaluation == {"kind": "eval", "step": 10, "top1": 0.25, "per_class": [0.5, None], "loss": 2.0}
    assert scalars_in(tmp_path, "train/loss") == [(10, 2.5)]
    assert scalars_in(tmp_path, "eval/top1") == [(10, 0.25)]
    with pytest.raises(KeyError):
        scalars_in(tmp_path, "train/accuracy")


def test_rows_are_valid_json_whatever_the_numbers(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_log(tmp_path, stream=stream) as log:
        log.train_row(1, {"loss": math.nan, "grad_norm": math.inf, "nested": {"a": [-math.inf, 1.0]}})
    (row,) = rows_in(tmp_path)
    assert (row["loss"], row["grad_norm"], row["nested"]) == (None, None, {"a": [None, 1.0]})
    assert "loss nan" in stream.getvalue()


def test_quiet_says_nothing(tmp_path: Path) -> None:
    stream = Terminal()
    with open_log(tmp_path, stream=stream, quiet=True) as log:
        log.train_row(1, {"loss": 1.0})
        log.eval_row(1, {"top1": 0.5})
        log.message("hello")
        log.tick(1)
    assert stream.getvalue() == ""


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    stream = Terminal()
    with open_log(tmp_path, stream=stream, start_step=100) as log:
        log.tick(120)
        log.train_row(120, {"loss": 3.21, "accuracy": 0.123})
        log.message("saved checkpoint")
        log.train_row(1000, {"loss": 1.0})
    shown = stream.getvalue()
    assert "step 100/1000" in shown
    assert re.search(r"step 120/1000  12 %\|.*loss 3\.21, acc 12\.3 %, \d+ img/s, ETA [\d:]+", shown)
    assert "saved checkpoint\n" in shown
    assert "step 1000/1000 100 %" in shown


# ---------------------------------------------------------------- resume


def write_run(run_dir: Path, last_step: int) -> None:
    with open_log(run_dir, quiet=True) as log:
        for step in range(10, last_step + 1, 10):
            log.train_row(step, {"loss": float(step)})
            if step % 20 == 0:
                log.eval_row(step, {"top1": step / 1000})


def test_resume_cuts_back_and_repeats_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, 50)
    with open_log(tmp_path, start_step=30, quiet=True) as log:
        assert [log.has_eval(step) for step in (10, 20, 30, 40)] == [False, True, False, False]
        assert [row["step"] for row in rows_in(tmp_path)] == [10, 20, 20, 30]
        log.train_row(40, {"loss": -40.0})
        log.eval_row(40, {"top1": 0.9})
        assert log.has_eval(40)
    assert [(row["kind"], row["step"]) for row in rows_in(tmp_path)][-2:] == [("train", 40), ("eval", 40)]
    assert scalars_in(tmp_path, "train/loss") == [(10, 10.0), (20, 20.0), (30, 30.0), (40, -40.0)]
    assert [step for step, _ in scalars_in(tmp_path, "eval/top1")] == [20, 40]


def test_the_same_evaluation_twice_is_one_row(tmp_path: Path) -> None:
    write_run(tmp_path, 20)  # killed after its last evaluation, before its summary
    with open_log(tmp_path, start_step=20, quiet=True) as log:
        log.eval_row(20, {"top1": 0.02})
    assert [(row["kind"], row["step"]) for row in rows_in(tmp_path)] == [("train", 10), ("train", 20), ("eval", 20)]
    assert [step for step, _ in scalars_in(tmp_path, "eval/top1")] == [20]


def test_resume_from_the_beginning(tmp_path: Path) -> None:
    write_run(tmp_path, 30)  # killed before its first checkpoint
    write_run(tmp_path, 20)
    assert [row["step"] for row in rows_in(tmp_path)] == [10, 20, 20]
    assert [step for step, _ in scalars_in(tmp_path, "train/loss")] == [10, 20]


@pytest.mark.parametrize(
    "tail",
    ['{"kind": "train", "st', '{"kind": "train", "step": 40}', "{}\n", "[]\n", "\x00\x00\x00\n", '{"kind": "train"}\n'],
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, tail: str) -> None:
    write_run(tmp_path, 30)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + tail)
    with open_log(tmp_path, start_step=40, quiet=True) as log:
        log.train_row(50, {"loss": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith(whole)
    assert [row["step"] for row in rows_in(tmp_path)] == [10, 20, 20, 30, 50]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_whole_file_is_not_rewritten(tmp_path: Path) -> None:
    write_run(tmp_path, 30)
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    open_log(tmp_path, start_step=30, quiet=True).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written"):
        open_log(tmp_path / "file")


# ---------------------------------------------------------------- pictures and settings


def test_images_and_hparams(tmp_path: Path) -> None:
    with open_log(tmp_path, quiet=True) as log:
        log.images(0, "train/samples", torch.randint(0, 256, (5, 3, 8, 12), dtype=torch.uint8))
        log.hparams({"optim.lr": 1e-3, "model.variant": None, "data.mean": [0.5]}, {"eval/top1": 0.5, "eval/loss": math.nan})
        log.eval_row(10, {"top1": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("train/samples")
    assert (image.width, image.height) == (5 * 12, 8)  # up to 8 in a row
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optim.lr" in content
    assert [path.is_dir() for path in (tmp_path / "tensorboard").iterdir()] == [False]  # no second run beside


def test_close_twice(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.close()
    log.close()


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (-1, "00:00"), (59.6, "01:00"), (190, "03:10"), (3725, "1:02:05")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
