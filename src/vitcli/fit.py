"""The training loop, read from top to bottom; pretraining and fine-tuning are two set-ups of it.

Steps are the only clock: after step s a run is a function of (config, s) alone, so a checkpoint holds {model, optimizer, step}
and a resumed run ends with the weights of one that was never interrupted, bit for bit.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.checkpoint import Pretrained, latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from vitcli.config import Config
from vitcli.config_file import flatten
from vitcli.data.loader import eval_batches, train_batches
from vitcli.data.sources import Source
from vitcli.data.transforms import EvalTransform, TrainTransform, mix_batch, normalise
from vitcli.errors import Interrupted, UserError
from vitcli.evaluate import EvalResult, evaluate
from vitcli.interrupts import StopSignals
from vitcli.logs import RunLog
from vitcli.models import build_model
from vitcli.optim import build_optimizer, clip_gradients, ema_start, ema_update, weight_norm
from vitcli.plan import Plan, lr_of_step
from vitcli.randomness import derive_seed
from vitcli.weights import load_weights

__all__ = ["Job", "classification_loss", "evaluate_source", "fit", "soft_targets"]


@dataclass(frozen=True)
class Job:
    """Everything `fit` needs."""

    config: Config  # resolved
    plan: Plan
    train_source: Source
    val_source: Source
    start: Pretrained | None  # weights of --ckpt, unless from scratch


def fit(job: Job, *, stop: StopSignals, say: Callable[[str], None]) -> tuple[EvalResult, float]:
    """Train to the last step and return the final evaluation and the seconds spent training.

    Raises:
        Interrupted: a signal arrived; the checkpoint of the last whole step is on disk.
        UserError: the loss is not finite, or the disk is full; earlier checkpoints are untouched.
    """
    config, device = job.config, job.plan.device
    train, log_settings = config.train, config.log
    assert config.out is not None and train.steps is not None and train.micro_batch_size is not None
    assert log_settings.log_every_steps and log_settings.eval_every_steps and log_settings.checkpoint_every_steps
    micro_batch_size, num_classes = train.micro_batch_size, job.plan.num_classes
    checkpoints = config.out / "checkpoints"
    about = {
        "model": config.model.model_dump(mode="json"),
        "classes": list(job.train_source.classes),
        "preprocessing": preprocessing_of(config),
        "source": config.data.source,
        "data": config.data.model_dump(mode="json", include={"shapes", "val_fraction"}),
        "loss": train.loss,
        "seed": config.seed,
    }

    torch.manual_seed(derive_seed(config.seed, "init"))
    model = build_model(config.model, image_size=config.data.image_size, num_classes=num_classes).to(device)
    # Start precedence: this run's own checkpoint, then --ckpt, then scratch.
    resume_from = latest_checkpoint(config.out, say=say)
    if resume_from is None and job.start is not None:
        height, width = job.start.preprocessing["image_size"]
        patch = job.start.model["patch_size"]
        report = load_weights(model, job.start.state, reset_head=True, old_grid=(height // patch, width // patch))
        say(f"weights from {job.start.source_path}: {report.summary()}")
    if train.freeze_backbone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head."))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(config.optim, model)
    ema = ema_start(model) if train.ema_decay is not None else None
    step = 0
    if resume_from is not None:
        saved = load_checkpoint(resume_from)
        model.load_state_dict(saved.model_state)
        optimizer.load_state_dict(saved.optimizer_state)
        if ema is not None and saved.ema_state is not None:
            ema = {name: saved.ema_state[name].to(device) for name in ema}
        step = saved.step
        say(f"resuming {config.out} from step {step:,}")
    forward = torch.compile(model) if train.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16")

    micro_batches = train_batches(
        job.train_source,
        TrainTransform(config.augment, image_size=config.data.image_size),
        batch_size=train.batch_size,
        micro_batch_size=micro_batch_size,
        start_step=step,
        total_steps=train.steps,
        seed=config.seed,
        workers=config.data.workers or 0,
        pin_memory=device.type == "cuda",
    )
    micro_per_step = -(-train.batch_size // micro_batch_size)
    log = RunLog(config.out, start_step=step, total_steps=train.steps, batch_size=train.batch_size)

    def save() -> None:
        with log.paused():
            save_checkpoint(
                checkpoints, step=step, model_state=model.state_dict(), ema_state=ema, optimizer_state=optimizer.state_dict(),
                manifest=about,
            )  # fmt: skip
        prune_checkpoints(checkpoints, keep=log_settings.keep_checkpoints, step=step)

    def write_row() -> None:
        loss_sum, hit_sum, images_seen = sums.tolist()  # the only place that waits for the device
        sums.zero_()
        row = {
            "loss": loss_sum / images_seen,
            "accuracy": hit_sum / images_seen,
            "lr": lr,
            "gradient_norm": gradient_norm.item(),
            "weight_norm": weight_norm(parameters).item(),
            "epoch": step * train.batch_size / job.plan.train_examples,
        }
        log.train_row(step, row)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
            raise UserError(
                f"{config.out}: loss {row['loss']} and gradient norm {row['gradient_norm']} by step {step} are not finite; nothing of it "
                "was saved: lower optim.lr or lengthen optim.warmup_steps, with another --out"
            )

    def evaluate_now() -> EvalResult:
        judged = model
        if ema is not None:
            judged = copy.deepcopy(model)
            judged.load_state_dict(ema)
        with log.paused():
            result = evaluate_source(
                judged, job.val_source, config, device=device, batch_size=2 * micro_batch_size, num_classes=num_classes, check=stop.check
            )
        log.eval_row(step, {"loss": result.loss, "top1": result.top1, "top5": result.top5, "seconds": result.seconds})
        return result

    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss x images, hits, images since the last row
    with stop.deferred():
        try:
            while True:
                last = step == train.steps
                if last or (step > 0 and step % log_settings.eval_every_steps == 0 and not log.has_eval(step)):
                    result = evaluate_now()
                if last:
                    log.hparams(flatten(config.model_dump(mode="json")), {"eval/top1": result.top1, "eval/loss": result.loss})
                    return result, log.train_seconds
                stop.check()
                lr = lr_of_step(config, step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                torch.manual_seed(derive_seed(config.seed, "dropout", step))
                model.train(not train.freeze_backbone)  # a frozen backbone must not drop what the head reads
                optimizer.zero_grad(set_to_none=True)
                for part, batch in enumerate(islice(micro_batches, micro_per_step)):
                    images = batch["images"].to(device, non_blocking=True)
                    labels = batch["labels"].to(device, non_blocking=True)
                    if step == 0 and part == 0 and log_settings.sample_images:
                        log.images(step, "train/samples", images[: log_settings.sample_images])
                    inputs = normalise(images, mean=config.data.mean, std=config.data.std)
                    targets = soft_targets(labels, num_classes=num_classes, label_smoothing=train.label_smoothing)
                    if config.augment.mixup or config.augment.cutmix:
                        seed = derive_seed(config.seed, "mix", step, part)
                        inputs, targets = mix_batch(inputs, targets, seed=seed, mixup=config.augment.mixup, cutmix=config.augment.cutmix)
                    with autocast:
                        logits = forward(inputs)  # (B, K)
                    loss = classification_loss(logits.float(), targets, kind=train.loss)
                    (loss * (len(labels) / train.batch_size)).backward()
                    with torch.no_grad():
                        hits = (logits.argmax(1) == targets.argmax(1)).sum()
                        sums += torch.stack([loss.double() * len(labels), hits.double(), hits.new_tensor(len(labels)).double()])
                gradient_norm = clip_gradients(parameters, config.optim.grad_clip)
                optimizer.step()
                if ema is not None and train.ema_decay is not None:
                    ema_update(ema, model, train.ema_decay)
                step += 1
                log.tick(step)
                save_now = step % log_settings.checkpoint_every_steps == 0 or step == train.steps
                if save_now or step % log_settings.log_every_steps == 0:
                    write_row()
                if save_now:
                    save()
        except Interrupted:
            if step > 0:
                if sums[2] > 0:
                    write_row()
                save()
                say(f"stopped at step {step:,}, saved; the same command goes on from there")
            raise
        finally:
            log.close()
            close = getattr(micro_batches, "close", None)
            if close is not None:
                close()


def soft_targets(labels: Tensor, *, num_classes: int, label_smoothing: float) -> Tensor:
    """Turn labels (B,) into target distributions (B, K), with a share spread over all classes."""
    targets = F.one_hot(labels, num_classes).float()
    return targets * (1.0 - label_smoothing) + label_smoothing / num_classes if label_smoothing else targets


def classification_loss(logits: Tensor, targets: Tensor, *, kind: str) -> Tensor:
    """Return the batch's mean loss for logits and targets (B, K): cross-entropy, or the sum of K binary ones (big_vision)."""
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
    return F.cross_entropy(logits, targets)


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
    check: Callable[[], None] | None = None,
    num_classes: int,
    class_map: Tensor | None = None,
) -> EvalResult:
    """Evaluate on every image of a source once, with the config's preprocessing, loss and precision."""
    data = config.data
    transform = EvalTransform(image_size=data.image_size, crop_fraction=data.eval_crop_fraction)
    batches: Iterator[dict[str, Tensor]] = eval_batches(source, transform, batch_size=batch_size, workers=data.workers or 0)
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
