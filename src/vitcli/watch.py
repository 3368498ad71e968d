"""Watches the gradient norms of a run: which steps were not applied, and when the run has to go back.

On a GPU a norm is looked at while the next step is under way, so nothing waits for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitcli.data.loader import Batch
from vitcli.data.protocol import Source
from vitcli.recovery import Part, Rollback, Streak, Verdict, data_step, store_batch
from vitcli.step import Outcome

__all__ = ["NotFinite", "Watch"]


class NotFinite(Exception):
    """Too many steps in a row were not finite; `step` is the first one not done."""

    def __init__(self, step: int, streak: Streak) -> None:
        super().__init__(step, streak)
        self.step = step
        self.streak = streak


class Number:
    """The value of a 0-d tensor, on its way from the device."""

    def __init__(self, tensor: Tensor) -> None:
        self.arrived: torch.cuda.Event | None = None
        self.copy = tensor.detach()
        if tensor.is_cuda:
            self.copy = torch.empty((), dtype=tensor.dtype, pin_memory=True)
            self.copy.copy_(tensor.detach(), non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def value(self) -> float:
        """Wait for this number alone, not for what the device was given to do since."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return float(self.copy)


@dataclass(frozen=True)
class Pending:
    """A step that nobody has looked at."""

    step: int
    norm: Number
    outcome: Outcome
    parts: list[Batch]


class Watch:
    """Judges the steps of a run in order, stores the batches of bad ones, and counts those in a row.

    Args:
        run_dir: where batches are stored.
        source: says where their images came from.
        rollbacks: of the run so far.
        streak: as the checkpoint left it.
        limit: steps in a row that end in NotFinite.
        about: what to note with a batch.
        rank: of this process.
        say: is told of every step that is not applied.
    """

    def __init__(
        self,
        run_dir: Path,
        source: Source,
        *,
        rollbacks: list[Rollback],
        streak: Streak,
        limit: int,
        about: dict[str, object],
        rank: int,
        say: Callable[[str], object],
    ) -> None:
        self.run_dir = run_dir
        self.source = source
        self.rollbacks = rollbacks
        self.streak = streak
        self.limit = limit
        self.about = about
        self.rank = rank
        self.say = say
        self.pending: Pending | None = None

    def add(self, step: int, outcome: Outcome, parts: list[Batch]) -> None:
        """Take in `step` (updates before it), and judge the one before, or this one where its numbers are there already."""
        self.settle()
        self.pending = Pending(step, Number(outcome.gradient_norm), outcome, parts)
        if not outcome.gradient_norm.is_cuda:
            self.settle()

    def settle(self) -> None:
        """Judge what is pending. Raises NotFinite."""
        if self.pending is None:
            return
        found, self.pending = self.pending, None
        norm = found.norm.value()
        verdict: Verdict = found.outcome.verdict or ("apply" if torch.tensor(norm).isfinite() else "nonfinite")
        self.streak = self.streak.after(found.step, verdict)
        if verdict != "nonfinite":
            return
        losses = (found.outcome.seen[:, 0] / found.outcome.seen[:, 2].clamp(min=1)).tolist()
        stored = store_batch(
            self.run_dir,
            step=found.step,
            batch=data_step(found.step, self.rollbacks),
            parts=[
                Part(
                    part["images"],
                    part["labels"],
                    part["indices"],
                    [self.source.where(index) for index in part["indices"].tolist()],
                    loss,
                )
                for part, loss in zip(found.parts, losses, strict=True)
            ],
            gradient_norm=norm,
            rank=self.rank,
            about=self.about,
        )
        self.say(
            f"step {found.step + 1:,}: gradient norm {norm}, loss {', '.join(f'{loss:.4g}' for loss in losses)}: not applied "
            f"({self.streak.length} of {self.limit} in a row)" + (f"; the batch is in {stored}" if stored else "")
        )
        if self.streak.length >= self.limit:
            raise NotFinite(found.step + 1, self.streak)
