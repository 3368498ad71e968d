"""What the run will need: memory, time and disk space; pure arithmetic on the plan and on what was measured."""

import math
import os
import shutil
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from vitcli.config import Config
from vitcli.doctor.checks import Check, Issue, Status, gather, in_bytes, in_words
from vitcli.doctor.installation import existing_parent
from vitcli.doctor.trial import DISTURBED, Trial
from vitcli.fit import Job
from vitcli.plan import Plan, build_plan, reading_steps

__all__ = ["check_disk", "check_memory", "check_time", "estimate_checkpoint_bytes", "kept_at_most", "memory_of"]

LONG_DAYS = 3.0
DAY_SECONDS = 86_400.0
MOST_LOST_SECONDS = 3600.0  # by a power cut: the time between two checkpoints
GOOD_INTERVAL_SECONDS = 1200.0
EVALUATION_COST = 1 / 3  # of an image, relative to training on it
MUCH_EVALUATION = 0.25  # of the time
TIGHT = 0.9  # of what is free


# ---------------------------------------------------------------- memory


def memory_of(plan: Plan) -> tuple[int, int]:
    """Return the plan's estimate in two parts, bytes: weights and optimiser, and each image that goes through at once."""

    def estimate(images: int) -> int:
        train = plan.config.train.model_copy(update={"micro_batch_size": images})
        config = plan.config.model_copy(update={"train": train})
        return build_plan(
            config,
            num_classes=plan.num_classes,
            train_examples=plan.train_examples,
            val_examples=plan.val_examples,
            device=plan.device,
            teacher=plan.teacher,
        ).memory_estimate_bytes

    one = estimate(1)
    each = estimate(2) - one
    return one - each, each


def check_memory(plan: Plan, *, available: int | None, trial: Trial | None) -> Check:
    """Say whether the run fits, and the largest micro-batch that would.

    Args:
        available: bytes that were free before anything was tried; None where that is not known.
        trial: whose peak of GPU memory takes the place of the estimate.
    """
    fixed, each = memory_of(plan)
    micro = plan.config.train.micro_batch_size
    assert micro is not None
    measured = trial is not None and trial.peak_bytes is not None
    if trial is not None and trial.peak_bytes is not None:
        each = max(1, (trial.peak_bytes - fixed) // trial.at_once)
    need = fixed + micro * each
    origin = "measured" if measured else "by estimate"
    text = f"{in_bytes(need)} {origin} for weights, optimiser and {micro:,} images at once"
    if available is None:
        return gather("memory", text, need_bytes=need, image_bytes=each)
    largest = max(0, int((TIGHT * available - fixed) // max(1, each)))
    text += f"; {in_bytes(available)} free, enough for {largest:,} at once" if largest else f"; {in_bytes(available)} free"
    issues = []
    if largest == 0:
        advice = "a smaller model or image size, another device, or several (train.parallel=fsdp, docs/scale-out.md)"
        issues.append(Issue("problem", "not even one image fits", advice))
    elif micro > largest:
        # a GPU says that it is full, and the run goes on with half as many; Linux ends a process instead
        status: Status = "warning" if plan.device.type == "cuda" else "problem"
        advice = f"train.micro_batch_size={largest} or less, the result is the same; or train.activation_checkpointing=true"
        issues.append(Issue(status, f"{micro:,} do not fit", advice))
    return gather(
        "memory", text, issues, need_bytes=need, available_bytes=available, image_bytes=each, largest_micro_batch=largest
    )


# ---------------------------------------------------------------- time


def check_time(job: Job, trial: Trial, *, done_steps: int, now: datetime) -> Check:
    """Say when the run will be finished, and what its evaluations and checkpoints cost or save.

    Args:
        done_steps: of an earlier start of the run.
    """
    config, log = job.config, job.config.log
    steps = config.train.steps
    assert steps is not None and log.eval_every_steps is not None and log.checkpoint_every_steps is not None
    step_seconds = config.train.batch_size / trial.speed
    left = max(0, steps - done_steps)
    training = left * step_seconds
    between = sum(1 for step in reading_steps(config) if step % log.eval_every_steps and step < steps)
    times = ((steps - 1) // log.eval_every_steps + between + 1) * left / steps
    evaluating = times * len(job.val_source) * EVALUATION_COST / trial.model_speed
    total = training + evaluating
    share = evaluating / total if total else 0.0
    end = now + timedelta(seconds=min(total, 1e9))
    when = end.strftime("%H:%M") if total < 0.5 * DAY_SECONDS else end.strftime("%a %d %b, %H:%M")
    most = "at most " if config.train.early_stop_evals is not None else ""
    idle = f" (undisturbed perhaps {in_words(total * trial.cpu_share)})" if trial.cpu_share < DISTURBED else ""
    text = f"{most}{in_words(total)}{idle} for {left:,} steps of {config.train.batch_size:,}"
    text += f" ({100 * share:.0f} % of it evaluation)"
    text += f": until {when}" if total < 365 * DAY_SECONDS else ""
    lost = log.checkpoint_every_steps * step_seconds
    text += f"; a checkpoint every {in_words(lost)}" if log.checkpoint_every_steps < steps else ""
    issues = []
    if total > LONG_DAYS * DAY_SECONDS:
        fit = max(1, int((1 - share) * DAY_SECONDS / step_seconds))
        more = "a GPU" if job.plan.device.type == "cpu" else "more GPUs (torchrun, docs/scale-out.md)"
        advice = f"{more}, or a smaller model or image size; in a day fits train.steps={fit}"
        issues.append(Issue("warning", "long for this machine", advice))
    if share > MUCH_EVALUATION and times > 1:
        every = min(steps, math.ceil(log.eval_every_steps * share / (1 - share) * 8))
        issues.append(Issue("warning", "that is much evaluation", f"log.eval_every_steps={every}, or fewer images for it"))
    if lost > MOST_LOST_SECONDS and log.checkpoint_every_steps < left:
        every = max(1, int(GOOD_INTERVAL_SECONDS / step_seconds))
        issues.append(Issue("warning", "a power cut costs all since the last one", f"log.checkpoint_every_steps={every}"))
    return gather(
        "time",
        text,
        issues,
        seconds=round(total, 1),
        evaluation_seconds=round(evaluating, 1),
        steps=left,
        checkpoint_every_seconds=round(lost, 1),
    )


# ---------------------------------------------------------------- disk


def estimate_checkpoint_bytes(plan: Plan) -> int:
    """Return about the size of a checkpoint, where none could be tried: the plan's state without its gradients."""
    return memory_of(plan)[0] - 4 * plan.trained_parameters


def kept_at_most(config: Config) -> int:
    """Return how many checkpoints of a resolved config lie on disk at a time, the one being written included."""
    log, train = config.log, config.train
    steps, every = train.steps, log.checkpoint_every_steps
    assert steps is not None and every is not None and log.eval_every_steps is not None
    best = log.keep_best if train.early_stop_evals is None else max(1, log.keep_best)
    periods = [every, log.eval_every_steps] if best else [every]
    readings = reading_steps(config)
    singles = readings | {steps} | ({train.head_first_steps} if train.head_first_steps else frozenset())
    milestones = set(readings)
    count = len(readings)
    if log.keep_every_steps:
        kept = log.keep_every_steps
        milestones |= {step for step in singles if step % kept == 0}
        regular = multiples(steps, kept, periods)
        count = regular + sum(1 for step in milestones if step % kept or all(step % period for period in periods))
    saved = multiples(steps, 1, periods) + sum(1 for step in singles if all(step % period for period in periods))
    # where a rollback would go stays too; with evaluations between checkpoints it need not be one of the newest
    return min(saved, count + log.keep_checkpoints + best + 1) + 1


def multiples(steps: int, of: int, periods: Sequence[int]) -> int:
    """Return how many of the steps 1 to `steps` are multiples of `of` and of one of one or two periods."""
    count = sum(steps // math.lcm(of, period) for period in periods)
    return count if len(periods) == 1 else count - steps // math.lcm(of, *periods)


def check_disk(config: Config, *, checkpoint_bytes: int) -> Check:
    """Say whether what the run keeps will fit on its disk."""
    assert config.out is not None
    place = config.out.absolute() if config.out.is_dir() else existing_parent(config.out.absolute().parent)
    free = shutil.disk_usage(place).free
    kept = kept_at_most(config)
    there = sum(entry.stat().st_size for entry in (config.out / "checkpoints").glob("step_*/*"))
    need = max(0, kept * checkpoint_bytes - there)
    text = f"up to {kept:,} checkpoints of {in_bytes(checkpoint_bytes)}, {in_bytes(need)} in all; "
    text += f"{in_bytes(free)} free in {shown(place)}"
    issues = []
    if not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
        issues.append(Issue("problem", f"{shown(place)} cannot be written", "choose another run directory with --out"))
    if need > TIGHT * free:
        fewer = "log.keep_every_steps" if config.log.keep_every_steps else "log.keep_checkpoints and log.keep_best"
        advice = f"--out on a larger disk, or {'a larger' if config.log.keep_every_steps else 'smaller'} {fewer}"
        issues.append(Issue("problem", "that will not fit", advice) if need > free else Issue("warning", "tight", advice))
    return gather("disk", text, issues, checkpoint_bytes=checkpoint_bytes, checkpoints=kept, need_bytes=need, free_bytes=free)


def shown(place: Path) -> str:
    """Write a folder as short as it can be said."""
    if place == Path.cwd():
        return "this folder"
    return os.path.relpath(place) if place.is_relative_to(Path.cwd()) else str(place)
