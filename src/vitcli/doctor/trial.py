"""A few seconds of the run itself: real steps on images that are ready, the loader alone, and both together.

The model begins as the run would, learns nothing worth keeping, and is thrown away. Where a micro-batch would take long (a
large model on a CPU) fewer images go through at once; speed hardly depends on it there.
"""

import math
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.data.loader import Batch
from vitcli.data.sampler import build_order
from vitcli.data.stages import Speeds, bottleneck, measure_stages
from vitcli.device import flops_per_second
from vitcli.distributed import States
from vitcli.doctor.checks import Check, Issue, gather
from vitcli.fit import Job, answers_of, batches_of, start_state
from vitcli.step import train_step

__all__ = ["DISTURBED", "Trial", "bytes_of", "check_speed", "images_at_once", "try_out"]

STEP_SECONDS = 1.0  # that a step on the CPU may take
MEASURE_SECONDS = 2.0  # for each of the two
STAGE_SECONDS = 0.5  # for each stage of the loader
MOST_LOADED = 128  # images of a batch when the loader is measured: it prepares several before it is timed
PIXELS_LOADED = 128 * 64 * 64
DISTURBED = 0.75  # of the CPU's time: with less, other programs are at work
SLOWED = 0.8  # of the model's own speed: below that the loader is worth a word
ANY_FASTER = "give the loader more cores (data.workers), or store smaller images in shards (vit data pack --resize)"
FOREVER = 1 << 40  # steps


@dataclass(frozen=True)
class Trial:
    """What was measured. Speeds in images/s."""

    at_once: int  # images through the model
    model_speed: float  # forward, backward and update on images that are ready
    speed: float  # likewise, on the run's own images as the loader brings them
    loader_speed: float  # of the loader alone
    stages: Speeds | None  # of it, where they are worth a look
    loss: float  # of the first images
    checkpoint_bytes: int
    peak_bytes: int | None  # of GPU memory
    cpu_share: float  # of the time that torch's threads could have had; 1 on a GPU
    said: tuple[str, ...]  # by the step, such as that memory ran out


def images_at_once(job: Job) -> int:
    """Return how many images to try: the run's micro-batch on a GPU, fewer where a CPU would take long."""
    plan, micro = job.plan, job.config.train.micro_batch_size
    assert micro is not None
    if plan.device.type != "cpu":
        return micro
    return max(1, min(micro, int(STEP_SECONDS * flops_per_second(plan.device) / plan.training_flops_per_image)))


def try_out(job: Job) -> Trial:
    """Train for a few seconds, in no run directory.

    Raises:
        DataError: an image cannot be read.
        RuntimeError: memory does not suffice, or a loader process ended.
    """
    at_once, device, said = images_at_once(job), job.plan.device, list[str]()
    train = job.config.train.model_copy(
        # the head alone, at the beginning, is cheaper than the rest; compiling takes minutes
        update={"batch_size": at_once, "micro_batch_size": at_once, "head_first_steps": 0, "compile": False}
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as nowhere:  # a run that has not begun
        config = job.config.model_copy(update={"out": Path(nowhere), "train": train})
        state, engine, _ = start_state(replace(job, config=config), say=lambda text: None)
        teacher = answers_of(job)
        losses: list[float] = []

        def step(parts: list[Batch]) -> None:
            sums = torch.zeros(3, dtype=torch.float64, device=device)
            outcome = train_step(
                state,
                parts,
                config=config,
                num_classes=job.plan.num_classes,
                engine=engine,
                class_weights=None,
                teacher=teacher,
                sums=sums,
                say=said.append,
            )
            state.step = 0  # the learning rate of the first one, again and again
            seen = outcome.seen.sum(0).tolist()  # waits for the device
            losses.append(seen[0] / max(seen[2], 1.0) if outcome.gradient_norm.isfinite() else math.nan)

        images = torch.randint(0, 256, (at_once, 3, *config.data.image_size), dtype=torch.uint8)
        numbers = torch.arange(at_once)
        ready = [{"images": images, "labels": numbers % max(1, job.plan.num_classes), "indices": numbers}]
        loaded = loader_batch(job, at_once)
        loader = loader_speed(job, images=loaded)
        with closing(endless_batches(job, at_once)) as stream:
            step([next(stream)])
            first_loss, losses[:] = losses[0], []
            began, worked = time.perf_counter(), time.process_time()
            model_speed = images_per_second(lambda: step(ready), images=at_once)
            share = (time.process_time() - worked) / ((time.perf_counter() - began) * torch.get_num_threads())
            saved = engine.states(state.optimizer, state.ema)
            assert saved is not None
            speed = images_per_second(lambda: step([next(stream)]), images=at_once)
    held_up = loader < model_speed or speed < SLOWED * model_speed
    stages = measure_loader(job, images=loaded) if held_up else None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    share = min(1.0, share) if device.type == "cpu" else 1.0
    size, told = bytes_of(saved), tuple(dict.fromkeys(said))
    return Trial(at_once, model_speed, speed, loader, stages, first_loss, size, peak, share, told)


def endless_batches(job: Job, images: int) -> Generator[Batch, None, None]:
    """Return the run's own stream of training images, so many at a time, without an end."""
    train = job.config.train.model_copy(update={"batch_size": images, "micro_batch_size": images, "steps": FOREVER})
    endless = replace(job, config=job.config.model_copy(update={"train": train}))
    return batches_of(endless, start_step=0, warn=lambda text: None)


def images_per_second(step: Callable[[], object], *, images: int) -> float:
    """Time steps of so many images each; the first one warms up, unless it alone takes longer than there is time."""
    started = time.perf_counter()
    step()
    now = time.perf_counter()
    if now - started > MEASURE_SECONDS:
        return images / (now - started)
    began, steps = now, 0
    while now - began < MEASURE_SECONDS or steps < 2:
        step()
        steps, now = steps + 1, time.perf_counter()
    return steps * images / (now - began)


def loader_batch(job: Job, at_once: int) -> int:
    """Return how many images make a batch when the loader is measured."""
    height, width = job.config.data.image_size
    return max(1, min(at_once, MOST_LOADED, PIXELS_LOADED // (height * width)))


def loader_speed(job: Job, *, images: int) -> float:
    """Return the images per second that the loader alone delivers, after the batches that it prepares while it starts."""
    with closing(endless_batches(job, images)) as stream:
        for _ in range(2 * max(1, job.config.data.workers or 0) + 1):
            next(stream)
        return images_per_second(lambda: next(stream), images=images)


def measure_loader(job: Job, *, images: int) -> Speeds:
    """Measure the loader stage by stage."""
    config = job.config
    return measure_stages(
        job.train_source,
        augment=config.augment,
        image_size=config.data.image_size,
        order=build_order(job.train_source, config.data, seed=config.seed),
        workers=config.data.workers or 0,
        batch_size=images,
        seconds=STAGE_SECONDS,
        seed=config.seed,
        on_error=config.data.on_error,
        skip_limit=config.data.skip_limit,
        warn=lambda text: None,
    )


def bytes_of(states: States) -> int:
    """Return the size of what a checkpoint stores, but for its manifest."""
    tensors = [*states.model.values(), *(states.ema or {}).values()]
    tensors += [value for entry in states.optimizer["state"].values() for value in tensors_in(entry)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def tensors_in(entry: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in entry.values() if isinstance(value, Tensor)]


def check_speed(job: Job, trial: Trial) -> Check:
    """Say how fast the run is, and which of model and loader holds the other up."""
    speed, stages = trial.speed, trial.stages
    issues = []
    if not math.isfinite(trial.loss):
        advice = "train.precision=float32 tells whether it is the precision; else look at data.mean, data.std and the weights"
        issues.append(Issue("problem", "loss or gradient of the first images is not finite", advice))
    issues += [Issue("warning", said, f"train.micro_batch_size={trial.at_once // 2}") for said in trial.said]
    # where the CPU computes, loader and model share its cores: then the loader costs time without ever being waited for
    shared = job.plan.device.type == "cpu"
    behind = trial.loader_speed < trial.model_speed
    slowest = "" if stages is None else bottleneck(stages).removeprefix("bottleneck: ")
    stage, _, advice = slowest.partition("; to go faster, ")
    if behind:
        verdict = "the loader is the bottleneck" + (f" ({stage})" if stage else "")
    elif shared and trial.cpu_share >= DISTURBED and speed < SLOWED * trial.model_speed:
        verdict = "the model is the bottleneck, and shares the cores with the loader"
    else:
        verdict = "the model is the bottleneck"
    numbers = f"model alone {rate(trial.model_speed)}, loader alone {rate(trial.loader_speed)}, together {rate(speed)} images/s"
    # what others took, they may have taken from one measurement alone
    if behind or (speed < SLOWED * trial.model_speed and trial.cpu_share >= DISTURBED):
        lost = f"the loader costs {100 * (1 - speed / trial.model_speed):.0f} % of the model's speed"
        issues.append(Issue("warning", lost, f"to go faster, {advice or ANY_FASTER}"))
    if trial.cpu_share < DISTURBED:
        text = f"other programs left it {100 * trial.cpu_share:.0f} % of the CPU's time"
        issues.append(Issue("warning", text, "look again when the machine is idle"))
    compiled = ", without torch.compile" if job.config.train.compile else ""
    return gather(
        "speed",
        f"{numbers}{compiled}: {verdict}",
        issues,
        model_images_per_second=round(trial.model_speed, 2),
        loader_images_per_second=round(trial.loader_speed, 2),
        images_per_second=round(speed, 2),
        bottleneck="loader" if behind else "model",
        loader_stages=None if stages is None else {name: round(value, 1) for name, value in stages.stages.items()},
        workers=job.config.data.workers,
        images_at_once=trial.at_once,
        cpu_share=round(trial.cpu_share, 3),
        first_loss=trial.loss if math.isfinite(trial.loss) else None,
    )


def rate(images: float) -> str:
    return f"{images:,.0f}" if images >= 10 else f"{images:.2g}"
