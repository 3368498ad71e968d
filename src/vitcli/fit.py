"""The training loop, read from top to bottom; pretraining and fine-tuning are two set-ups of it.

Steps are the only clock: after step s a run is a function of (config, s) alone, so a checkpoint holds {model, optimizer, step}
and a resumed run ends with the weights of one that was never interrupted, bit for bit.
"""

import copy
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vitcli.checkpoint import Pretrained, latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from vitcli.config import Config
from vitcli.config_file import flatten
from vitcli.data.loader import Batch, eval_batches, train_batches
from vitcli.data.protocol import Source
from vitcli.data.sampler import build_order
from vitcli.data.transforms import EvalTransform, TrainTransform, mix_batch, normalise
from vitcli.errors import DataError, Interrupted, UserError
from vitcli.evaluate import EvalResult, evaluate
from vitcli.interrupts import StopSignals
from vitcli.logs import RunLog
from vitcli.models import build_model
from vitcli.models.vit import VisionTransformer
from vitcli.optim import build_optimizer, clip_gradients, ema_start, ema_update, weight_norm
from vitcli.plan import Plan, lr_of_step
from vitcli.randomness import derive_seed
from vitcli.weights import LoadReport, load_weights

__all__ = ["Job", "class_weights_of", "classification_loss", "evaluate_source", "fit", "load_start", "soft_targets"]


# what, beside the source's name, says which images an evaluation of this run is about
DATA_IDENTITY = ("shapes", "val_fraction", "val_source", "mix", "mix_classes", "label_key")


@dataclass(frozen=True)
class Job:
    """Everything `fit` needs."""

    config: Config  # resolved
    plan: Plan
    train_source: Source
    val_source: Source
    start: Pretrained | None  # weights of --ckpt, unless from scratch
    val_classes: Tensor | None = None  # the model's number for each class of val_source; None where they are the same


@dataclass
class State:
    """What changes while training, and so what a checkpoint holds: after `step` updates."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] | None
    step: int


def fit(job: Job, *, stop: StopSignals, say: Callable[[str], None]) -> tuple[EvalResult, float]:
    """Train to the last step and return the final evaluation and the seconds spent training.

    Raises:
        Interrupted: a signal arrived; the checkpoint of the last whole step is on disk.
        UserError: the loss is not finite, or the disk is full; earlier checkpoints are untouched.
    """
    config, train, every = job.config, job.config.train, job.config.log
    assert config.out and train.steps and train.micro_batch_size
    assert every.log_every_steps and every.eval_every_steps and every.checkpoint_every_steps
    state = start_state(job, say=say)
    forward = torch.compile(state.model) if train.compile else state.model
    log = RunLog(config.out, start_step=state.step, total_steps=train.steps, batch_size=train.batch_size)
    warn_once = cache(log.message)  # every evaluation meets the same bad images
    micro_batches = train_batches(
        job.train_source,
        TrainTransform(config.augment, image_size=config.data.image_size),
        batch_size=train.batch_size,
        micro_batch_size=train.micro_batch_size,
        order=build_order(job.train_source, config.data, seed=config.seed),
        start_step=state.step,
        total_steps=train.steps,
        seed=config.seed,
        on_error=config.data.on_error,
        skip_limit=config.data.skip_limit,
        warn=warn_once,
        workers=config.data.workers or 0,
        pin_memory=job.plan.device.type == "cuda",
    )
    micro_per_step = math.ceil(train.batch_size / train.micro_batch_size)
    class_weights = weights_of_classes(job)
    sums = torch.zeros(3, dtype=torch.float64, device=job.plan.device)  # loss x images, hits, images since the last row
    gradient_norm = torch.zeros(())
    with stop.deferred(), log, closing(micro_batches):
        try:
            while True:
                last = state.step == train.steps
                if last or (state.step > 0 and state.step % every.eval_every_steps == 0 and not log.has_eval(state.step)):
                    result = evaluate_now(state, job, log, stop, warn=warn_once)
                if last:
                    log.hparams(flatten(config.model_dump(mode="json")), {"eval/top1": result.top1, "eval/loss": result.loss})
                    return result, log.train_seconds
                stop.check()
                parts = list(islice(micro_batches, micro_per_step))
                if state.step == 0 and every.sample_images:
                    log.images(0, "train/samples", parts[0]["images"][: every.sample_images])
                gradient_norm = train_step(state, parts, job, forward, class_weights, sums)
                log.tick(state.step)
                save_now = state.step % every.checkpoint_every_steps == 0 or state.step == train.steps
                if save_now or state.step % every.log_every_steps == 0:
                    write_row(state, job, log, sums, gradient_norm)
                if save_now:
                    save(state, job, log)
        except (Interrupted, DataError):
            if state.step > 0:
                if sums[2] > 0:
                    write_row(state, job, log, sums, gradient_norm)
                save(state, job, log)
                say(f"stopped at step {state.step:,}, saved; the same command goes on from there")
            else:
                say("stopped before the first step; there was nothing to save")
            raise
        except torch.OutOfMemoryError as error:
            half = max(1, train.micro_batch_size // 2)
            raise UserError(
                f"{config.out}: out of memory with {train.micro_batch_size} images at once after step {state.step}; "
                f"set train.micro_batch_size={half} (with another --out once there is a checkpoint)"
            ) from error


def start_state(job: Job, *, say: Callable[[str], None]) -> State:
    """Build model and optimiser, and fill them from where the run starts."""
    config, device = job.config, job.plan.device
    assert config.out is not None
    torch.manual_seed(derive_seed(config.seed, "init"))
    model = build_model(config.model, image_size=config.data.image_size, num_classes=job.plan.num_classes).to(device)
    # Start precedence: this run's own checkpoint, then --ckpt, then scratch.
    resume_from = latest_checkpoint(config.out, say=say)
    if resume_from is None and job.start is not None:
        say(f"weights from {job.start.source_path}: {load_start(model, job.start).summary()}")
    if config.train.freeze_backbone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head."))
    optimizer = build_optimizer(config.optim, model)
    ema = ema_start(model) if config.train.ema_decay is not None else None
    if resume_from is None:
        return State(model, optimizer, ema, step=0)
    saved = load_checkpoint(resume_from)
    model.load_state_dict(saved.model_state)
    optimizer.load_state_dict(saved.optimizer_state)
    if ema is not None and saved.ema_state is not None:
        ema = {name: saved.ema_state[name].to(device) for name in ema}
    say(f"resuming {config.out} from step {saved.step:,}")
    return State(model, optimizer, ema, saved.step)


def load_start(model: VisionTransformer, start: Pretrained) -> LoadReport:
    """Load weights to start from into a model with a new head, resizing position embeddings; raises CheckpointError."""
    height, width = start.preprocessing["image_size"]
    patch = start.model["patch_size"]
    return load_weights(model, start.state, reset_head=True, old_grid=(height // patch, width // patch))


def train_step(
    state: State,
    parts: list[Batch],
    job: Job,
    forward: Callable[[Tensor], Tensor],
    class_weights: Tensor | None,
    sums: Tensor,
) -> Tensor:
    """Make one update from a batch in micro-batches, add to `sums`, and return the gradient norm before clipping.

    Args:
        parts: of images, uint8 (b, 3, H, W), and labels (b,); together the step's batch.
        forward: the model, compiled or not.
        class_weights: (K,) weights in the loss, or None for equal ones.
        sums: (3,) loss x images, hits and images since the last log row.
    """
    config, train, device, model = job.config, job.config.train, job.plan.device, state.model
    for group in state.optimizer.param_groups:
        group["lr"] = lr_of_step(config, state.step)
    torch.manual_seed(derive_seed(config.seed, "dropout", state.step))
    model.train(not train.freeze_backbone)  # a frozen backbone must not drop what the head reads
    state.optimizer.zero_grad(set_to_none=True)
    for number, part in enumerate(parts):
        labels = part["labels"].to(device, non_blocking=True)
        inputs = normalise(part["images"].to(device, non_blocking=True), mean=config.data.mean, std=config.data.std)
        targets = soft_targets(labels, num_classes=job.plan.num_classes, label_smoothing=train.label_smoothing)
        if config.augment.mixup or config.augment.cutmix:
            seed = derive_seed(config.seed, "mix", state.step, number)
            inputs, targets = mix_batch(inputs, targets, seed=seed, mixup=config.augment.mixup, cutmix=config.augment.cutmix)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            logits = forward(inputs)  # (b, K)
        loss = classification_loss(logits.float(), targets, kind=train.loss, class_weights=class_weights)
        (loss * (len(labels) / train.batch_size)).backward()
        with torch.no_grad():
            sums[0] += loss.double() * len(labels)
            sums[1] += (logits.argmax(1) == targets.argmax(1)).sum()
            sums[2] += len(labels)
    gradient_norm = clip_gradients(model.parameters(), config.optim.grad_clip)
    state.optimizer.step()
    if state.ema is not None and train.ema_decay is not None:
        ema_update(state.ema, model, train.ema_decay)
    state.step += 1
    return gradient_norm


def write_row(state: State, job: Job, log: RunLog, sums: Tensor, gradient_norm: Tensor) -> None:
    """Log what happened since the last row and reset the sums; raise UserError if it is not finite."""
    loss_sum, hits, images = sums.tolist()  # the only place that waits for the device
    sums.zero_()
    row = {
        "loss": loss_sum / images,
        "accuracy": hits / images,
        "lr": lr_of_step(job.config, state.step - 1),
        "gradient_norm": gradient_norm.item(),
        "weight_norm": weight_norm(p for p in state.model.parameters() if p.requires_grad).item(),
        "epoch": state.step * job.config.train.batch_size / job.plan.train_examples,
    }
    log.train_row(state.step, row)
    if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
        raise UserError(
            f"{job.config.out}: loss {row['loss']}, gradient norm {row['gradient_norm']} by step {state.step}: not finite; "
            "nothing of it was saved: lower optim.lr or lengthen optim.warmup_steps, with another --out"
        )


def save(state: State, job: Job, log: RunLog) -> None:
    """Write a checkpoint of the state, and delete those beyond `keep_checkpoints`."""
    config = job.config
    assert config.out is not None
    checkpoints = config.out / "checkpoints"
    manifest = {
        "model": config.model.model_dump(mode="json"),
        "classes": list(job.train_source.classes),
        "preprocessing": preprocessing_of(config),
        "source": config.data.source,
        "data": config.data.model_dump(mode="json", include=set(DATA_IDENTITY)),
        "train": config.train.model_dump(mode="json", include={"loss", "precision"}),
        "seed": config.seed,
    }
    with log.paused():
        save_checkpoint(
            checkpoints,
            step=state.step,
            model_state=state.model.state_dict(),
            ema_state=state.ema,
            optimizer_state=state.optimizer.state_dict(),
            manifest=manifest,
        )
        prune_checkpoints(checkpoints, keep=config.log.keep_checkpoints, step=state.step)


def evaluate_now(state: State, job: Job, log: RunLog, stop: StopSignals, *, warn: Callable[[str], object]) -> EvalResult:
    """Evaluate the weights, averaged ones where there are any, and log the result."""
    judged = state.model
    if state.ema is not None:
        judged = copy.deepcopy(state.model)
        judged.load_state_dict(state.ema)
    micro = job.config.train.micro_batch_size
    assert micro is not None
    with log.paused():
        result = evaluate_source(
            judged,
            job.val_source,
            job.config,
            device=job.plan.device,
            batch_size=2 * micro,  # without gradients twice as many fit
            num_classes=job.plan.num_classes,
            warn=warn,
            check=stop.check,
            class_map=job.val_classes,
        )
    log.eval_row(state.step, {"loss": result.loss, "top1": result.top1, "top5": result.top5, "seconds": result.seconds})
    return result


# ---------------------------------------------------------------- losses


def soft_targets(labels: Tensor, *, num_classes: int, label_smoothing: float) -> Tensor:
    """Turn labels (B,) into target distributions (B, K), with a share spread over all classes."""
    targets = F.one_hot(labels, num_classes).float()
    return targets * (1.0 - label_smoothing) + label_smoothing / num_classes if label_smoothing else targets


def classification_loss(logits: Tensor, targets: Tensor, *, kind: str, class_weights: Tensor | None = None) -> Tensor:
    """Return the batch's mean loss for logits and targets (B, K): cross-entropy, or the sum of K binary ones (big_vision).

    With class weights (K,), an image counts as much as its target's classes do, in their shares; the mean stays one over B.
    """
    if kind == "sigmoid":
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)  # (B,)
    elif class_weights is None:
        return F.cross_entropy(logits, targets)
    else:
        losses = F.cross_entropy(logits, targets, reduction="none")  # (B,)
    return losses.mean() if class_weights is None else (losses * (targets @ class_weights)).mean()


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


# ---------------------------------------------------------------- evaluation


def preprocessing_of(config: Config) -> dict[str, Any]:
    """Return what turns a picture into this model's input; it travels with the weights."""
    return {key: config.data.model_dump(mode="json")[key] for key in ("image_size", "mean", "std", "eval_crop_fraction")}


def evaluate_source(
    model: nn.Module,
    source: Source,
    config: Config,
    *,
    device: torch.device,
    batch_size: int,
    num_classes: int,
    warn: Callable[[str], object],
    check: Callable[[], None] | None = None,
    class_map: Tensor | None = None,
) -> EvalResult:
    """Evaluate on every image of a source once, with the config's preprocessing, loss and precision."""
    data = config.data
    transform = EvalTransform(image_size=data.image_size, crop_fraction=data.eval_crop_fraction)
    batches = eval_batches(
        source,
        transform,
        batch_size=batch_size,
        workers=data.workers or 0,
        pin_memory=device.type == "cuda",
        on_error=data.on_error,
        skip_limit=data.skip_limit,
        warn=warn,
    )
    return evaluate(
        model,
        batches,
        preprocess=lambda images: normalise(images, mean=data.mean, std=data.std),
        num_classes=num_classes,
        device=device,
        dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
        loss=config.train.loss,
        should_stop=check,
        class_map=class_map,
    )
