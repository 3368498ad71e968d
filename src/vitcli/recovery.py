"""Steps whose loss or gradient is not finite: not applied, counted, stored for a look, and after a few in a row undone.

A run goes back to a checkpoint and from there on takes other data: `rollbacks.json` in the run directory says where from and
how far the data jumps, so a resumed run takes the same path. Under fp16 a gradient beyond the range calls for a smaller loss
scale, not for a rollback.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vitcli.errors import RunExistsError, UserError
from vitcli.rundir import read_json, write_json

__all__ = [
    "ROLLBACKS",
    "LossScale",
    "Part",
    "Rollback",
    "Streak",
    "Verdict",
    "add_rollback",
    "data_step",
    "judge",
    "read_rollbacks",
    "store_batch",
]

Verdict = Literal["apply", "overflow", "nonfinite"]

ROLLBACKS, STORE = "rollbacks.json", "nonfinite"
MOST_STORED = 10  # batches of one run; more of the same tell nothing and fill the disk


# ---------------------------------------------------------------- one step


def judge(*, loss_finite: bool, gradient_finite: bool, loss_scale: float = 1.0) -> Verdict:
    """Say what to do with a step: apply it, lower the loss scale (fp16), or count it as not finite.

    The loss is scaled after the forward pass, so a loss that is not finite has another cause than the scale.
    """
    if loss_finite and gradient_finite:
        return "apply"
    return "overflow" if loss_finite and loss_scale > 1.0 else "nonfinite"


@dataclass(frozen=True)
class LossScale:
    """Keeps the small gradients of fp16 from vanishing: as large a power of two as they bear (1710.03740, section 3.2).

    It doubles after `interval` steps without overflow and halves at each one, between 1 and 2^24.
    """

    scale: float = 2.0**16
    good_steps: int = 0  # since it last changed
    interval: int = 2000

    def after(self, *, overflow: bool) -> "LossScale":
        """Return the scale of the next step."""
        if overflow:
            return LossScale(max(1.0, self.scale / 2), 0, self.interval)
        if self.good_steps + 1 < self.interval:
            return LossScale(self.scale, self.good_steps + 1, self.interval)
        return LossScale(min(2.0**24, self.scale * 2), 0, self.interval)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values, for a checkpoint's `extra`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Any) -> "LossScale":
        """Return what `as_dict` gave; anything else gives the first scale."""
        try:
            scale, good_steps, interval = float(stored["scale"]), int(stored["good_steps"]), int(stored["interval"])
        except (KeyError, TypeError, ValueError, OverflowError):
            return cls()
        sound = 1.0 <= scale <= 2.0**24 and math.frexp(scale)[0] == 0.5 and 0 <= good_steps < interval
        return cls(scale, good_steps, interval) if sound else cls()


@dataclass(frozen=True)
class Streak:
    """Steps in a row that were not finite."""

    length: int = 0
    first_step: int = 0  # of the streak

    def after(self, step: int, verdict: Verdict) -> "Streak":
        """Return the streak once `step` has its verdict; an overflow neither ends nor lengthens it."""
        if verdict == "overflow":
            return self
        if verdict == "apply":
            return Streak()
        return Streak(self.length + 1, self.first_step if self.length else step)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values, for a checkpoint's `extra`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Any) -> "Streak":
        """Return what `as_dict` gave; anything else gives an empty streak."""
        try:
            return cls(max(0, int(stored["length"])), max(0, int(stored["first_step"])))
        except (KeyError, TypeError, ValueError, OverflowError):
            return cls()


# ---------------------------------------------------------------- going back


@dataclass(frozen=True)
class Rollback:
    """From the training step `step` on, the data is `skip` batches further than it was."""

    step: int
    skip: int


def data_step(step: int, rollbacks: Sequence[Rollback]) -> int:
    """Return the number of the batch that a training step takes."""
    return step + sum(rollback.skip for rollback in rollbacks if rollback.step <= step)


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """Read the rollbacks of a run, in the order they happened; none where there is no file.

    Raises:
        RunExistsError: the file is not one that a run wrote.
    """
    path = run_dir / ROLLBACKS
    found = read_json(path)
    if found is None:
        return []
    entries = found.get("rollbacks")
    if not isinstance(entries, list) or not all(is_rollback(entry) for entry in entries):
        raise RunExistsError(
            f'{path}: expected {{"rollbacks": [{{"step": 0, "skip": 1}}, ...]}}; bring it back, or choose another --out'
        )
    return [Rollback(entry["step"], entry["skip"]) for entry in entries]


def is_rollback(entry: Any) -> bool:
    """Tell whether a JSON value is one rollback."""
    if not isinstance(entry, dict) or entry.keys() != {"step", "skip"}:
        return False
    return all(type(entry[key]) is int and least <= entry[key] < 1 << 53 for key, least in (("step", 0), ("skip", 1)))


def add_rollback(run_dir: Path, *, back_to: int, step: int, most: int, streak: int) -> list[Rollback]:
    """Note that a run goes from `step` back to the checkpoint `back_to`, and return all its rollbacks.

    Its next batch is the one that `step` would have had: none of the batches between is met again. Call it after
    `retention.discard_after`, so that a kill between the two repeats the rollback.

    Args:
        back_to: step of the checkpoint, 0 for the start.
        step: the first one not done.
        most: rollbacks a run may make.
        streak: steps in a row that were not finite, for the message.

    Raises:
        UserError: this would be one rollback too many; nothing is noted.
    """
    assert 0 <= back_to < step
    rollbacks = read_rollbacks(run_dir)
    if len(rollbacks) >= most:
        raise UserError(
            f"{run_dir}: loss or gradient not finite in {streak} steps in a row before step {step:,}, after {len(rollbacks)} "
            f"of {most} rollbacks (train.max_rollbacks); the batches are in {run_dir / STORE}: lower optim.lr, lengthen "
            "optim.warmup_steps or train in float32, with another --out"
        )
    new = Rollback(back_to, data_step(step, rollbacks) - data_step(back_to, rollbacks))
    rollbacks = [*rollbacks, new]
    write_json(run_dir / ROLLBACKS, {"rollbacks": [asdict(rollback) for rollback in rollbacks]})
    return rollbacks


# ---------------------------------------------------------------- for a look


@dataclass(frozen=True)
class Part:
    """A micro-batch of a step that was not finite."""

    images: Tensor  # uint8 (b, 3, H, W), augmented, before mixup
    labels: Tensor  # int64 (b,)
    indices: Tensor  # int64 (b,), in the training set
    where: Sequence[str]  # where each image came from
    loss: float


def store_batch(
    run_dir: Path,
    *,
    step: int,
    batch: int,
    parts: Sequence[Part],
    gradient_norm: float,
    rank: int = 0,
    about: Mapping[str, Any],
) -> Path | None:
    """Store the batch of a step that was not finite in a folder under nonfinite/, named after the step, and return the folder.

    `rank_000.safetensors` holds `images`, `labels`, `indices` and `part`, the number of each image's micro-batch;
    `rank_000.json` says where each image came from, the losses, the gradient norm and `about`.

    Args:
        step: the training step.
        batch: the number of the batch, after rollbacks another one than the step's.
        about: JSON values, say precision and learning rate.

    Returns:
        None where the run has stored enough of them, `MOST_STORED`.

    Raises:
        UserError: the disk is full or not writable.
    """
    folder = run_dir / STORE / (f"step_{step:08d}" if batch == step else f"step_{step:08d}-batch_{batch:08d}")
    part = torch.cat([torch.full((len(p.labels),), number) for number, p in enumerate(parts)])
    tensors = {
        name: torch.cat([getattr(p, name).cpu() for p in parts]).contiguous() for name in ("images", "labels", "indices")
    }
    examples = [
        {"where": where, "index": index, "label": label, "part": number}
        for where, index, label, number in zip(
            [where for p in parts for where in p.where],
            tensors["indices"].tolist(),
            tensors["labels"].tolist(),
            part.tolist(),
            strict=True,
        )
    ]
    description = {
        "step": step,
        "batch": batch,
        "losses": [number_or_word(p.loss) for p in parts],
        "gradient_norm": number_or_word(gradient_norm),
        **about,
        "examples": examples,
    }
    try:
        stored = {path.name for path in (run_dir / STORE).glob("step_*")}
        if folder.name not in stored and len(stored) >= MOST_STORED:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-rank_{rank:03d}"
        save_file({**tensors, "part": part}, temporary)
        temporary.replace(folder / f"rank_{rank:03d}.safetensors")
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"{folder}: cannot be written ({reason}); free some space and run again") from error
    write_json(folder / f"rank_{rank:03d}.json", json.loads(json.dumps(description)))
    return folder


def number_or_word(value: float) -> float | str:
    """Return a number that JSON can hold, or the name of one that it cannot: nan, inf, -inf."""
    return value if math.isfinite(value) else str(value)
