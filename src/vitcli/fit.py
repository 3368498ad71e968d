"""The training loop, read from top to bottom; pretraining and fine-tuning are two set-ups of it.

Steps are the only clock: after step s a run is a function of (config, s) alone, so a checkpoint holds {model, optimizer, step}
and a resumed run ends with the weights of one that was never interrupted, bit for bit.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.checkpoint import EMA, MODEL, latest_checkpoint, load_checkpoint, step_of
from vitcli.config import Config
from vitcli.config_file import flatten
from vitcli.data.loader import Batch, train_batches
from vitcli.data.protocol import Source
from vitcli.data.sampler import build_order
from vitcli.data.transforms import TrainTransform
from vitcli.device import AUTOCAST
from vitcli.distributed import SOLO, Engine, Ranks, States, is_agreed
from vitcli.ending import is_stalled, return_to_best, scores_of
from vitcli.errors import DataError, Interrupted, UserError
from vitcli.evaluate import EvalResult
from vitcli.interrupts import StopSignals
from vitcli.lanes import Lanes
from vitcli.logs import RunLog
from vitcli.models import VisionTransformer
from vitcli.objectives import ObjectiveResult, build_learner, evaluate_objective, training_masks, units_of
from vitcli.optim import averages, build_optimizer, ema_start, trained_names, weight_norm
from vitcli.plan import Plan, count_lanes, head_alone, lr_of_step, reading_steps
from vitcli.predictions import VAL_PREDICTIONS, Predictions, collect_source, reading_file, save_predictions
from vitcli.pretrained import Pretrained
from vitcli.probe_sets import ProbeSet
from vitcli.probes import open_probe_sets, probe_live
from vitcli.randomness import derive_seed
from vitcli.recovery import LossScale, Streak, add_rollback, data_step, read_rollbacks
from vitcli.retention import Keep, discard_after
from vitcli.saving import AsyncSaver
from vitcli.step import State, is_out_of_memory, train_step
from vitcli.teacher import Answers, Teacher
from vitcli.tuning import Choice
from vitcli.watch import NotFinite, Watch
from vitcli.weights import load_start

__all__ = ["Finished", "Job", "answers_of", "batches_of", "class_weights_of", "fit", "preprocessing_of"]

Say = Callable[[str], None]
Result = EvalResult | ObjectiveResult
Judgement = tuple[Result, Predictions | None]  # without labels there are no answers


# what, beside the source's name, says which images an evaluation of this run is about
DATA_IDENTITY = ("shapes", "mosaic", "val_fraction", "val_source", "mix", "mix_classes", "label_key", "dev_fraction")
DEV_IDENTITY = ("examples", "subset_seed")  # and of which part of the training split a development split is a share


@dataclass(frozen=True)
class Finished:
    """What came out of a run."""

    result: Result
    step: int  # whose weights these are: the last one, or with early stopping the best
    trained_steps: int
    train_seconds: float


@dataclass(frozen=True)
class Job:
    """Everything `fit` needs."""

    config: Config  # resolved
    plan: Plan
    train_source: Source
    val_source: Source
    start: Pretrained | None  # weights of --ckpt, unless from scratch
    val_classes: Tensor | None = None  # the model's number for each class of val_source; None where they are the same
    ranks: Ranks = SOLO
    tuning: Choice | None = None  # what was measured to settle the config, if anything was
    teacher: Teacher | None = None


def fit(job: Job, *, stop: StopSignals, say: Say) -> Finished:
    """Train to the end and return the evaluation of the weights that the run ends with.

    Raises:
        Interrupted: a signal arrived; the checkpoint of the last whole step is on disk.
        UserError: the loss is not finite time and again, or the disk is full; earlier checkpoints are untouched.
    """
    while True:
        try:
            finished = train_on(job, stop=stop, say=say)
            if finished is not None:
                return finished
        except NotFinite as found:  # a run that goes back is one that is resumed: everything is built anew, from the disk
            roll_back(job, found, say=say)
        except RuntimeError as error:
            if str(error).startswith("DataLoader worker"):  # raised wherever the training was: nothing of it can be saved
                raise UserError(
                    f"{job.config.out}: a loader process ended unexpectedly, perhaps for want of memory (data.workers="
                    f"{job.config.data.workers}; fewer need less); the same command goes on from the last checkpoint"
                ) from error
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"{job.config.out}: out of memory, even with fewer images at once: set train.activation_checkpointing=true or "
                "a smaller train.eval_batch_size, which an existing run may change too, or train a smaller model or on more "
                "devices (train.parallel=fsdp)"
            ) from error


def train_on(job: Job, *, stop: StopSignals, say: Say) -> Finished | None:
    """Do as `fit`, from where the run directory is; raise NotFinite when too many steps in a row could not be applied.

    None where the head has learned alone so far: for the rest everything is built anew, as for a run that is resumed.
    """
    config, train, every, ranks = job.config, job.config.train, job.config.log, job.ranks
    assert config.out and train.steps and train.micro_batch_size
    assert every.log_every_steps and every.eval_every_steps and every.checkpoint_every_steps
    rollbacks = ranks.broadcast(read_rollbacks(config.out) if ranks.main else [])
    probe_sets = open_probe_sets(config, ranks=ranks)
    state, engine, streak = start_state(job, say=say)
    log = RunLog(config.out, start_step=state.step, total_steps=train.steps, batch_size=train.batch_size, writes=ranks.main)
    evaluated, probed, inspected = ranks.broadcast((set(log.evals), log.probed, log.inspected))
    warn_once = cache(log.message)  # every evaluation meets the same bad images
    micro_batches = batches_of(
        job, start_step=state.step, batch_of_step=partial(data_step, rollbacks=rollbacks), warn=warn_once
    )
    micro_per_step = math.ceil(train.batch_size / (train.micro_batch_size * ranks.ranks))
    class_weights = weights_of_classes(job)
    teacher = answers_of(job)
    sums = torch.zeros(3, dtype=torch.float64, device=job.plan.device)  # loss x images, hits, images since the last row
    watch = Watch(
        config.out,
        job.train_source,
        rollbacks=rollbacks,
        streak=streak,
        limit=train.nonfinite_limit,
        about={"precision": train.precision, "lr": config.optim.lr},
        rank=ranks.rank,
        say=log.message,
    )
    best = every.keep_best if train.early_stop_evals is None else max(1, every.keep_best)
    readings = reading_steps(config)
    keep = Keep(every.keep_checkpoints, best, every_steps=every.keep_every_steps, steps=readings)
    saver = AsyncSaver(config.out / "checkpoints", keep=keep, say=log.message)
    evaluate = partial(evaluate_now, state, job, engine, log, stop, warn=warn_once)
    with stop.deferred(), log, closing(micro_batches), saver:
        try:
            while True:
                judged: Judgement | None = None  # of the weights as they are
                last = state.step == train.steps
                due = state.step > 0 and state.step % every.eval_every_steps == 0
                reading = state.step in readings
                if (due or last or reading) and state.step not in evaluated:
                    judged = evaluate()
                    evaluated.add(state.step)
                due_probe = state.step > 0 and state.step % (config.fewshot.every_steps or every.eval_every_steps) == 0
                if probe_sets and (due_probe or last or reading) and state.step not in probed:
                    probe_now(probe_sets, state, job, engine, log, stop, warn=warn_once)
                    probed.add(state.step)
                due_look = state.step > 0 and every.inspect_every_steps and state.step % every.inspect_every_steps == 0
                if every.inspect_every_steps and (due_look or last) and state.step not in inspected:
                    inspect_now(state, job, engine, log)
                    inspected.add(state.step)
                if last or (due and ranks.broadcast(is_stalled(config, log.evals, examples=job.plan.val_examples))):
                    return finish(state, job, engine, log, judged, evaluate, say=log.message)
                parts = next_parts(micro_batches, micro_per_step, stop=stop, ranks=ranks)
                outcome = train_step(
                    state,
                    parts,
                    config=config,
                    num_classes=job.plan.num_classes,
                    engine=engine,
                    class_weights=class_weights,
                    teacher=teacher,
                    sums=sums,
                    say=log.message,
                )
                if state.step == 1 and every.sample_images:  # afterwards: TensorBoard takes a while to import
                    log.images(0, "train/samples", parts[0]["images"][: every.sample_images])
                log.tick(state.step)
                watch.add(state.step - 1, outcome, parts)
                saver.check()
                save_now = state.step % every.checkpoint_every_steps == 0 or state.step == train.steps
                save_now |= best > 0 and state.step % every.eval_every_steps == 0
                save_now |= state.step == train.head_first_steps or state.step in readings
                if save_now or state.step % every.log_every_steps == 0:
                    watch.settle()
                    write_row(state, job, log, sums, outcome.gradient_norm)
                if save_now:
                    save(state, job, engine, saver, watch, log)
                if state.step == train.head_first_steps:
                    return None
        except (Interrupted, DataError) as error:
            if ranks.ranks > 1 and not is_agreed(error):  # the others are in the middle of something
                raise
            watch.settle()
            if state.step > 0:
                if log.row_step < state.step:
                    write_row(state, job, log, sums, outcome.gradient_norm)
                save(state, job, engine, saver, watch, log)
                saver.close()
                say(f"stopped at step {state.step:,}, saved; the same command goes on from there")
            else:
                say("stopped before the first step; there was nothing to save")
            raise


def finish(
    state: State,
    job: Job,
    engine: Engine,
    log: RunLog,
    judged: Judgement | None,
    evaluate: Callable[[], Judgement],
    *,
    say: Say,
) -> Finished:
    """Settle which weights the run ends with, and return what they are worth.

    Args:
        judged: the evaluation of the weights as they are, where that was just made.
    """
    config, trained_steps = job.config, state.step
    if config.train.early_stop_evals is not None:
        moved = return_to_best(state, engine, config, log.evals, examples=job.plan.val_examples, say=say)
        judged = None if moved else judged
    result, predictions = judged or evaluate()
    store_predictions(job, predictions, step=state.step, path=VAL_PREDICTIONS)
    numbers = {f"eval/{key}": value for key, value in result.row().items() if key in ("top1", "accuracy", "loss")}
    log.hparams(flatten(config.model_dump(mode="json")), numbers)
    return Finished(result, state.step, trained_steps, log.train_seconds)


def batches_of(
    job: Job, *, start_step: int, batch_of_step: Callable[[int], int] | None = None, warn: Callable[[str], object]
) -> Generator[Batch, None, None]:
    """Yield this rank's share of the run's training images, micro-batch by micro-batch, as `train_batches` does."""
    config, train, ranks = job.config, job.config.train, job.ranks
    assert train.steps and train.micro_batch_size
    return train_batches(
        job.train_source,
        TrainTransform(config.augment, image_size=config.data.image_size),
        order=build_order(job.train_source, config.data, seed=config.seed),
        batch_size=train.batch_size,
        micro_batch_size=train.micro_batch_size * ranks.ranks,
        start_step=start_step,
        total_steps=train.steps,
        seed=config.seed,
        workers=config.data.workers or 0,
        pin_memory=job.plan.device.type == "cuda",
        on_error=config.data.on_error,
        skip_limit=config.data.skip_limit,
        warn=warn,
        rank=ranks.rank,
        ranks=ranks.ranks,
        batch_of_step=batch_of_step,
    )


def next_parts(micro_batches: Iterator[Batch], count: int, *, stop: StopSignals, ranks: Ranks) -> list[Batch]:
    """Take a step's micro-batches; raise on all ranks what any of them met: a signal, or an image that cannot be read."""
    problem: Interrupted | DataError | None = stop.pending()
    parts: list[Batch] = []
    if problem is None:
        try:
            parts = list(islice(micro_batches, count))
        except DataError as error:
            problem = error
    ranks.agree(problem)
    return parts


def roll_back(job: Job, found: NotFinite, *, say: Callable[[str], None]) -> None:
    """Go back to the newest checkpoint before the streak, and let the data go on behind it.

    Raises:
        UserError: on all ranks, when the run went back often enough.
    """
    out, most = job.config.out, job.config.train.max_rollbacks
    assert out is not None
    problem = None
    if job.ranks.main:
        # not one that an interruption left between: the path must not depend on when a run was stopped
        every = job.config.log.checkpoint_every_steps
        assert every is not None
        back_to = latest_checkpoint(out, up_to=found.streak.first_step, every_steps=every, say=say)
        step = 0 if back_to is None else step_of(back_to)
        try:
            if len(read_rollbacks(out)) < most:
                discard_after(out / "checkpoints", step)
            rollbacks = add_rollback(out, back_to=step, step=found.step, most=most, streak=found.streak.length)
            say(
                f"{found.streak.length} steps in a row were not finite: back to step {step:,}, and on from there with other "
                f"images ({len(rollbacks)} of at most {most} times)"
            )
        except UserError as error:
            problem = error
    job.ranks.agree(problem)


def start_state(job: Job, *, say: Callable[[str], None]) -> tuple[State, Engine, Streak]:
    """Build model and optimiser, and fill them from where the run starts."""
    config, device, ranks = job.config, job.plan.device, job.ranks
    assert config.out is not None and config.train.micro_batch_size is not None
    torch.manual_seed(derive_seed(config.seed, "init"))
    model = build_learner(config, num_classes=job.plan.num_classes)
    # Start precedence: this run's own checkpoint, then --ckpt, then scratch.
    resume_from = latest_checkpoint(config.out, say=say) if ranks.main else None
    step = ranks.broadcast(0 if resume_from is None else step_of(resume_from))
    if job.start is not None and step == 0:
        say(f"weights from {job.start.source_path}: {load_start(model, job.start).summary()}")
    names = [name for name, _ in model.named_parameters()]
    learning = set(trained_names(names, head_alone=head_alone(config, step), frozen=config.train.freeze))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    engine = Engine(
        model,
        blocks=units_of(model),
        input_shape=(3, *config.data.image_size),
        beside=masks_of_one(model, config),
        parallel=ranks.broadcast(job.plan.parallel),
        ranks=ranks,
        device=device,
        compute_dtype=AUTOCAST.get(config.train.precision, torch.float32),
        activation_checkpointing=config.train.activation_checkpointing,
        compile=config.train.compile,
    )
    optimizer = build_optimizer(config.optim, model)
    ema = ema_start(model) if averages(config.train) else None
    saved = None if resume_from is None else load_checkpoint(resume_from)
    extra = ranks.broadcast({} if saved is None else saved.extra)
    if step > 0:
        joining = step == config.train.head_first_steps  # what learns from here on: with an optimiser that knows nothing yet
        say(f"from step {step:,} on everything is trained" if joining else f"resuming {config.out} from step {step:,}")
        states = None
        if saved is not None:
            optimizer_state = optimizer.state_dict() if joining else saved.optimizer_state
            states = States(saved.model_state, optimizer_state, saved.ema_state)
        engine.load_states(states, optimizer, ema)
    scale = LossScale.from_dict(extra.get("loss_scale")) if config.train.precision == "fp16" else None
    at_once = config.train.micro_batch_size
    if isinstance(stored := extra.get("images_at_once"), int) and 1 <= stored < at_once:  # memory ran out before
        at_once = stored
    count = count_lanes(config, flops_per_image=job.plan.flops_per_image, device=device, ranks=ranks.ranks)
    lanes = Lanes(model, count=count) if count > 1 else None
    return State(model, optimizer, ema, scale, step, at_once, lanes), engine, Streak.from_dict(extra.get("streak"))


def masks_of_one(model: torch.nn.Module, config: Config) -> Tensor | None:
    """Return the masks (1, P) of some image, or None where the model is given images alone."""
    if config.objective.needs_labels:
        return None
    assert isinstance(model, VisionTransformer)
    return training_masks(config.objective, grid_size=model.grid_size, seed=config.seed, step=0, indices=[0])


def write_row(state: State, job: Job, log: RunLog, sums: Tensor, gradient_norm: Tensor) -> None:
    """Log what happened since the last row, over all ranks, and reset the sums."""
    job.ranks.sum_(sums)
    loss_sum, hits, images = sums.tolist()  # the only place that waits for the device
    sums.zero_()
    row = {
        "loss": loss_sum / images if images else None,  # no step was applied
        "accuracy": hits / images if images and has_accuracy(job.config) else None,
        "lr": lr_of_step(job.config, state.step - 1),
        "gradient_norm": gradient_norm.item(),
        "weight_norm": weight_norm(p for p in state.model.parameters() if p.requires_grad).item(),
        "epoch": state.step * job.config.train.batch_size / job.plan.train_examples,
    }
    log.train_row(state.step, row)


def has_accuracy(config: Config) -> bool:
    """Tell whether predictions of a resolved config are right or wrong: classes and colours, not pixels."""
    return config.objective.needs_labels or config.objective.target in ("mean_colour", "colours")


def save(state: State, job: Job, engine: Engine, saver: AsyncSaver, watch: Watch, log: RunLog) -> None:
    """Begin to write a checkpoint of the state; those that need not stay are deleted after it."""
    config = job.config
    identity = set(DATA_IDENTITY) | (set() if config.data.dev_fraction is None else set(DEV_IDENTITY))
    manifest = {
        "model": config.model.model_dump(mode="json"),
        "classes": list(job.train_source.classes) if config.objective.needs_labels else [],
        "preprocessing": preprocessing_of(config),
        "source": config.data.source,
        "data": config.data.model_dump(mode="json", include=identity),
        "train": config.train.model_dump(mode="json", include={"loss", "precision"}),
        "seed": config.seed,
    }
    every, streak = config.log.checkpoint_every_steps, watch.streak
    assert every is not None
    extra: dict[str, Any] = {"streak": watch.streak.as_dict(), "images_at_once": state.images_at_once}
    if state.scale is not None:
        extra["loss_scale"] = state.scale.as_dict()
    with log.paused():
        states = engine.states(state.optimizer, state.ema)
        if states is None:
            return
        saver.save(
            step=state.step,
            model_state=states.model,
            ema_state=states.ema,
            optimizer_state=states.optimizer,
            manifest=manifest,
            extra=extra,
            scores=scores_of(config, log.evals, examples=job.plan.val_examples),
            also_keep={(streak.first_step if streak.length else state.step) // every * every},  # where a rollback would go
            owned=engine.in_step,  # put together for us
        )


def evaluate_now(
    state: State, job: Job, engine: Engine, log: RunLog, stop: StopSignals, *, warn: Callable[[str], object]
) -> Judgement:
    """Evaluate the weights, averaged ones where there are any, and log the result; return the answers too."""
    batch_size = job.config.train.eval_batch_size
    assert batch_size is not None
    how: dict[str, Any] = {
        "device": job.plan.device,
        "batch_size": batch_size,
        "warn": warn,
        "check": stop.check,
        "ranks": job.ranks,
        "flops_per_image": job.plan.flops_per_image,
    }
    result: Result
    predictions: Predictions | None = None
    with log.paused(), engine.averaged(state.ema) as judged:
        if job.config.objective.needs_labels:
            result, predictions = collect_source(
                judged, job.val_source, job.config, num_classes=job.plan.num_classes, class_map=job.val_classes, **how
            )
        else:
            result = evaluate_objective(judged, job.val_source, job.config, **how)
    if state.step in reading_steps(job.config):  # before the row that says it is done
        store_predictions(job, predictions, step=state.step, path=reading_file(state.step))
    log.eval_row(state.step, result.row())
    return result, predictions


def probe_now(
    sets: list[ProbeSet],
    state: State,
    job: Job,
    engine: Engine,
    log: RunLog,
    stop: StopSignals,
    *,
    warn: Callable[[str], object],
) -> None:
    """Probe the features, of averaged weights where there are any, and log the accuracies."""
    batch_size = job.config.train.eval_batch_size
    assert batch_size is not None
    with log.paused(), engine.averaged(state.ema) as judged:
        accuracies = probe_live(
            judged,
            sets,
            job.config,
            device=job.plan.device,
            batch_size=batch_size,
            warn=warn,
            check=stop.check,
            flops_per_image=job.plan.flops_per_image,
            ranks=job.ranks,
        )
    log.fewshot_row(state.step, accuracies)


def inspect_now(state: State, job: Job, engine: Engine, log: RunLog) -> None:
    """Put the figures of `vit inspect` into TensorBoard, from a copy of the weights: averaged ones where there are any.

    One rank looks; the others wait for it. A device without room for a copy leaves this step's figures out.
    """
    from vitcli.inspection.live import live_figures  # with matplotlib, which a run that is not looked at need not import

    def look() -> None:
        assert weights is not None
        start = time.monotonic()
        try:
            figures = live_figures(
                weights,
                job.val_source,
                job.config,
                num_classes=job.plan.num_classes,
                step=state.step,
                device=job.plan.device,
                say=log.message,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.message(f"inspect step {state.step}: no memory on {job.plan.device} for a copy of the model; left out")
            return
        pictures = {name: torch.from_numpy(pixels).permute(2, 0, 1)[None] for name, pixels in figures.items()}
        log.inspect_row(state.step, pictures, seconds=time.monotonic() - start)

    with log.paused():
        weights = engine.weights(state.ema)
        job.ranks.on_main(look)


def store_predictions(job: Job, predictions: Predictions | None, *, step: int, path: Path) -> None:
    """Write the answers of the weights of `step`, if it gives any, to every evaluation image to a path of the run directory."""
    if not job.ranks.main or predictions is None:
        return
    config = job.config
    assert config.out is not None
    weights = EMA if averages(config.train) else MODEL
    about = {
        "dataset": config.data.val_source or config.data.source,
        "fingerprint": job.val_source.fingerprint,
        "classes": list(job.train_source.classes),
        "checkpoint": f"checkpoints/step_{step:08d}/{weights}",
        "step": step,
        "loss": config.train.loss,
    }
    save_predictions(config.out / path, predictions, about=about)


# ---------------------------------------------------------------- what the loss needs


def answers_of(job: Job) -> Answers | None:
    """Return the teacher, ready to answer, where the run has one."""
    return None if job.teacher is None else Answers(job.teacher, job.config, device=job.plan.device)


def weights_of_classes(job: Job) -> Tensor | None:
    """Return the weights (K,) of the classes in the loss, or None for equal ones."""
    kind, labels = job.config.train.class_weights, job.train_source.labels
    if kind == "none" or labels is None:  # computed labels are balanced
        return None
    counts = np.bincount(labels, minlength=job.plan.num_classes)
    return class_weights_of(counts, kind=kind).to(job.plan.device)


def class_weights_of(counts: NDArray[np.int64], *, kind: str) -> Tensor:
    """Return weights (K,) by the inverse size of each class, or its root; 1 on average over the images, 0 for empty classes."""
    sizes = np.maximum(counts, 1).astype(np.float64)
    weights = np.where(counts > 0, sizes ** (-1.0 if kind == "balanced" else -0.5), 0.0)
    return torch.from_numpy(weights * counts.sum() / (weights * counts).sum()).float()


def preprocessing_of(config: Config) -> dict[str, Any]:
    """Return what turns a picture into this model's input; it travels with the weights."""
    data = config.data.model_dump(mode="json")
    permuted = () if config.data.patch_permutation is None else ("patch_permutation",)
    return {key: data[key] for key in ("image_size", "mean", "std", "eval_crop_fraction", *permuted)}
