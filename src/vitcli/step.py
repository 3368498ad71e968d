"""One update of the weights from one batch: forward and backward in portions, clip, step; unless a gradient is not finite.

A step in several processes adds their gradients up, so its result does not depend on how many there are but for rounding.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitcli.config import Config
from vitcli.data.loader import Batch
from vitcli.data.transforms import mix_batch, normalise
from vitcli.device import AUTOCAST
from vitcli.distributed import Engine, Ranks
from vitcli.lanes import Lanes
from vitcli.losses import classification_loss, distillation_loss, soft_targets
from vitcli.models import VisionTransformer
from vitcli.objectives import training_masks
from vitcli.optim import SGD, Adam, AdamW, clip_gradients, decay_at, ema_update
from vitcli.plan import head_alone, lr_of_step
from vitcli.randomness import derive_seed
from vitcli.recovery import LossScale, Verdict, judge
from vitcli.teacher import Answers

__all__ = ["Outcome", "State", "is_out_of_memory", "train_step"]

SKIPPING = (AdamW, Adam, SGD)  # where fused, on a GPU


@dataclass
class State:
    """What changes while training, and so what a checkpoint holds: after `step` updates."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] | None
    scale: LossScale | None  # of fp16
    step: int
    images_at_once: int  # through the model; smaller than a micro-batch where memory ran out
    lanes: Lanes | None = None  # threads side by side; None where the cores share every operation
    overlap: bool = False  # of computing gradients with summing them over the processes, where memory is known to suffice


@dataclass(frozen=True)
class Outcome:
    """What a step found; the numbers stay on the device until somebody asks."""

    gradient_norm: Tensor  # before clipping, 0-d
    seen: Tensor  # (parts, 3) loss x images, hits and images of each micro-batch of this process
    verdict: Verdict | None  # None where it is the gradient norm's alone


def train_step(
    state: State,
    parts: list[Batch],
    *,
    config: Config,
    num_classes: int,
    engine: Engine,
    class_weights: Tensor | None,
    teacher: Answers | None = None,
    sums: Tensor,
    say: Callable[[str], object],
) -> Outcome:
    """Make one update from this process's share of a batch, and add to `sums`.

    Where the norm is not finite, nothing but the step counter (and the loss scale of fp16) changes.

    Args:
        parts: micro-batches of images, uint8 (b, 3, H, W), and labels (b,); with the other processes' the step's batch.
        num_classes: K; not read where the objective needs no labels.
        class_weights: (K,) weights in the loss, or None for equal ones.
        teacher: answers to be learned beside the labels, or None.
        sums: (3,) loss x images, hits and images of the steps applied since the last log row.
        say: is told when memory runs out and fewer images go through the model at once from then on.
    """
    optimizer, ranks = state.optimizer, engine.ranks
    for group in optimizer.param_groups:
        group["lr"] = lr_of_step(config, state.step) * group.get("lr_scale", 1.0)
    set_modes(state.model, head_alone=head_alone(config, state.step), some_frozen=bool(config.train.freeze))
    while True:
        problem = None
        try:
            seen = accumulate_gradients(
                state,
                parts,
                config=config,
                num_classes=num_classes,
                engine=engine,
                class_weights=class_weights,
                teacher=teacher,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error) or state.overlap or engine.in_step or state.images_at_once == 1:
                raise
            problem = str(error)  # the exception itself would keep the activations alive
        if state.overlap or not ranks.any(problem is not None):
            break
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
        state.images_at_once = -(-state.images_at_once // 2)
        say(
            f"out of memory in step {state.step + 1:,}: {state.images_at_once:,} images go through the model at once from now "
            "on; batch and result are the same"
        )
    engine.reduce()
    state.overlap = ranks.ranks > 1  # from now on gradients are summed over the processes while the last ones are computed
    parameters = list(state.model.parameters())
    if state.scale is not None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / state.scale.scale)
    norm = clip_gradients(parameters, config.optim.grad_clip)
    verdict = update(state, norm, seen, ranks=ranks, decay=decay_at(config.train, state.step))
    sums += torch.where(norm.isfinite(), seen.sum(0), 0.0)
    state.step += 1
    return Outcome(norm, seen, verdict)


def set_modes(model: nn.Module, *, head_alone: bool, some_frozen: bool) -> None:
    """Put a model into training mode, but for what is frozen, which must not drop what others read."""
    model.train(not head_alone)
    for part in model.children() if some_frozen and not head_alone else ():
        for module in part.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()


def accumulate_gradients(
    state: State,
    parts: list[Batch],
    *,
    config: Config,
    num_classes: int,
    engine: Engine,
    class_weights: Tensor | None,
    teacher: Answers | None,
) -> Tensor:
    """Leave this process's part of the batch's gradient in the parameters; return `Outcome.seen`."""
    train, device, rank = config.train, engine.device, engine.ranks.rank
    # Each process draws its own dropout masks.
    torch.manual_seed(derive_seed(config.seed, "dropout", state.step, *([rank] if rank else [])))
    state.optimizer.zero_grad(set_to_none=True)
    scale = 1.0 if state.scale is None else state.scale.scale
    seen = torch.zeros(len(parts), 3, dtype=torch.float64, device=device)
    for number, part in enumerate(parts):
        inputs = normalise(part["images"].to(device, non_blocking=True), mean=config.data.mean, std=config.data.std)
        if config.objective.needs_labels:
            labels = part["labels"].to(device, non_blocking=True)
            targets = soft_targets(labels, num_classes=num_classes, label_smoothing=train.label_smoothing)
            if (config.augment.mixup or config.augment.cutmix) and len(labels):
                seed, augment = derive_seed(config.seed, "mix", state.step, number), config.augment
                inputs, targets = mix_batch(inputs, targets, seed=seed, mixup=augment.mixup, cutmix=augment.cutmix)
        else:
            targets = masks_of(state, part, config).to(device, non_blocking=True)
        # Every process makes as many portions as the others, be its share smaller by one: some of them meet in each.
        portions = -(-largest_share(config, number, engine.ranks) // state.images_at_once)
        weight = scale / train.batch_size
        learn = partial(backward, config=config, device=device, class_weights=class_weights, teacher=teacher, weight=weight)
        if state.lanes is not None:
            portions = state.lanes.count * -(-portions // state.lanes.count)  # as many for each
            split = zip(inputs.tensor_split(portions), targets.tensor_split(portions), strict=True)
            for found in state.lanes.run(learn, list(split)):
                seen[number] += found
            continue
        for position, (x, y) in enumerate(zip(inputs.tensor_split(portions), targets.tensor_split(portions), strict=True)):
            if len(x) == 0:
                engine.idle()
                continue
            last = number == len(parts) - 1 and position == portions - 1
            with engine.accumulating(overlap=last and state.overlap):
                seen[number] += learn(engine, (x, y))
    return seen


def masks_of(state: State, part: Batch, config: Config) -> Tensor:
    """Return the masks (b, P) of a micro-batch, by this step and the images' indices."""
    assert isinstance(state.model, VisionTransformer)
    return training_masks(
        config.objective,
        grid_size=state.model.grid_size,
        seed=config.seed,
        step=state.step,
        indices=part["indices"].numpy(),
    )


def backward(
    model: Callable[..., Tensor],
    portion: tuple[Tensor, Tensor],
    *,
    config: Config,
    device: torch.device,
    class_weights: Tensor | None,
    teacher: Answers | None,
    weight: float,
) -> Tensor:
    """Add the gradient of a portion's losses x weight to the model's; return (3,) loss x images, hits and images.

    Args:
        portion: images (b, 3, H, W) and target distributions (b, K); or masks (b, P), and then an image's hits are the share
            of its predictions that are right.
    """
    train, (x, y) = config.train, portion
    if len(x) == 0:
        return torch.zeros(3, dtype=torch.float64, device=device)
    answers = None if teacher is None else teacher(x)  # first: while the student keeps nothing yet
    with torch.autocast(device.type, AUTOCAST.get(train.precision), enabled=train.precision in AUTOCAST):
        if not config.objective.needs_labels:
            logits = model(x, y)  # (b, 2)
        elif answers is not None and config.model.distill_token:
            logits = model(x, apart=True)  # (b, 2, K)
        else:
            logits = model(x)  # (b, K)
    if not config.objective.needs_labels:
        (logits[:, 0].mean() * (weight * len(x))).backward()
        sums = logits.detach().double().sum(0)
        return torch.cat([sums, torch.full_like(sums[:1], len(x))])
    if answers is None:
        loss = classification_loss(logits.float(), y, kind=train.loss, class_weights=class_weights)
    else:
        shares: dict[str, Any] = {"section": config.distillation, "kind": train.loss, "class_weights": class_weights}
        loss = distillation_loss(logits.float(), y, answers, **shares)
        logits = logits.mean(1) if logits.ndim == 3 else logits  # what evaluation goes by
    (loss * (weight * len(x))).backward()
    with torch.no_grad():
        hits = (logits.argmax(1) == y.argmax(1)).sum()
        return torch.stack([loss.double() * len(x), hits.double(), torch.full_like(hits, len(x)).double()])


def update(state: State, norm: Tensor, seen: Tensor, *, ranks: Ranks, decay: float | None) -> Verdict | None:
    """Change weights, optimiser, average and loss scale as the gradient norm allows; say what it was, where that is known."""
    verdict: Verdict | None = None
    if norm.is_cuda and state.scale is None and skips(state.optimizer):
        # These leave everything as it is where this number is 1, so nobody has to wait for it.
        optimizer: Any = state.optimizer
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
    else:
        verdict = "apply"
        if not norm.isfinite():
            loss_finite = not ranks.any(not seen.isfinite().all())
            scale = 1.0 if state.scale is None else state.scale.scale
            verdict = judge(loss_finite=loss_finite, gradient_finite=False, loss_scale=scale)
        if state.scale is not None:
            state.scale = state.scale.after(overflow=verdict != "apply")
        if verdict != "apply":
            return verdict
        state.optimizer.step()
    if state.ema is not None and decay is not None:
        ema_update(state.ema, state.model, decay)
    return verdict


def skips(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimiser looks at `found_inf` by itself."""
    return type(optimizer) in SKIPPING and all(group["fused"] for group in optimizer.param_groups)


def largest_share(config: Config, number: int, ranks: Ranks) -> int:
    """Return how many images of micro-batch `number` the process with most of them has."""
    train = config.train
    assert train.micro_batch_size is not None
    together = train.micro_batch_size * ranks.ranks
    return -(-min(together, train.batch_size - number * together) // ranks.ranks)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that the device, or the machine, has no more memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
    )
