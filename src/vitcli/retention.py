"""Which checkpoints stay: the newest, the best by a metric, milestones; and whatever somebody reads, until it is read.

What is to go is renamed first and deleted then, so that a kill halfway leaves no half checkpoint behind.
"""

import math
import os
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vitcli.checkpoint import checkpoints_in, flush_to_disk, hidden_name, remove_leftovers, step_of
from vitcli.errors import CheckpointError
from vitcli.in_use import unread

__all__ = ["Keep", "Pruned", "discard_after", "kept_steps", "prune"]

PAUSE_SECONDS = 0.05  # a copy that is between two files comes to the next one meanwhile


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay; one that a single rule keeps stays."""

    last: int = 2  # newest ones, at least 1
    best: int = 0  # of those evaluated
    higher_is_better: bool = True
    every_steps: int | None = None  # milestones: the multiples of it
    steps: frozenset[int] = frozenset()  # and these

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"the newest checkpoint is always kept: last must be at least 1, got {self.last}")


@dataclass(frozen=True)
class Pruned:
    """What became of the checkpoints that no rule keeps."""

    deleted: list[Path]
    in_use: list[Path]  # somebody reads them: left for the next time
    failed: list[str]  # one line for each that could not be deleted


def kept_steps(steps: Iterable[int], keep: Keep, scores: Mapping[int, float]) -> set[int]:
    """Return those of `steps` that stay, by the scores of the steps evaluated; of equal scores the newer one is better."""
    newest_first = sorted(steps, reverse=True)
    sign = 1.0 if keep.higher_is_better else -1.0
    scored = [step for step in newest_first if math.isfinite(scores.get(step, math.nan))]
    best = sorted(scored, key=lambda step: sign * scores[step], reverse=True)  # stable: newer first
    milestones = {step for step in newest_first if step in keep.steps or (keep.every_steps and step % keep.every_steps == 0)}
    return {*newest_first[: keep.last], *best[: keep.best], *milestones}


def prune(
    checkpoints_dir: Path, *, keep: Keep, step: int, scores: Mapping[int, float] | None = None, also: Collection[int] = ()
) -> Pruned:
    """Delete the checkpoints up to `step` that no rule keeps.

    Later ones are left alone: a run never passes over a sound checkpoint, so they are damaged and will be replaced in time;
    counting them could delete the very one just saved.

    Args:
        step: that of the checkpoint just saved, the newest sound one; without it nothing is deleted.
        scores: of the steps evaluated, by the metric that `keep` is about.
        also: further steps to keep.
    """
    done = Pruned([], [], [])
    paths = [path for path in checkpoints_in(checkpoints_dir) if step_of(path) <= step and not path.is_symlink()]
    if not paths or step_of(paths[0]) != step:
        return done
    stay = kept_steps(map(step_of, paths), keep, scores or {}) | set(also)
    for path in paths:
        if step_of(path) in stay:
            continue
        try:
            (done.deleted if delete_unread(path) else done.in_use).append(path)
        except OSError as error:
            done.failed.append(f"{path}: cannot delete this old checkpoint ({error.strerror or error})")
    return done


def delete_unread(path: Path) -> bool:
    """Delete a checkpoint unless somebody reads it; say whether it is gone."""
    hidden = hidden_name(path)
    with unread(path) as nobody_reads:
        if nobody_reads():
            time.sleep(PAUSE_SECONDS)
        if not nobody_reads():
            return False
        os.rename(path, hidden)
        if not nobody_reads():  # who came between the look and the renaming finds all as it was
            os.rename(hidden, path)
            return False
    shutil.rmtree(hidden)
    return True


def discard_after(checkpoints_dir: Path, step: int) -> list[Path]:
    """Take away the checkpoints later than `step`, which a run that goes back there has undone; return what is gone.

    None of them may be resumed from, so one that somebody reads goes too: its files stay until then, under a hidden name.

    Raises:
        CheckpointError: one cannot be renamed.
    """
    later = [path for path in checkpoints_in(checkpoints_dir) if step_of(path) > step]
    for path in later:
        try:
            os.rename(path, hidden_name(path))
            flush_to_disk(checkpoints_dir)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot take this checkpoint back ({error.strerror or error})") from error
    remove_leftovers(checkpoints_dir)
    return later
