"""From what a config says to what a run will do: every `null` gets its value once, before the first step.

Steps, epochs and examples become steps; micro-batch, precision and intervals are chosen. The resolved config is written to the
run directory and is all that a resumed run needs. `describe` is what `--dry-run` prints.
"""

import math
from dataclasses import dataclass

import torch

from vitcli.config import Config
from vitcli.device import choose_precision, hardware, memory_bytes
from vitcli.distillation_config import resolve_distillation
from vitcli.distributed import SOLO, Parallel, Ranks, choose_parallel
from vitcli.errors import ConfigError
from vitcli.lanes import choose_lanes
from vitcli.model_config import ModelConfig, receptive_field, resolve_model, stem_stride
from vitcli.models.flops import forward_flops
from vitcli.objective_config import resolve_objective
from vitcli.objectives import build_learner, describe_objective, flops_per_image, kept_bytes
from vitcli.optim import averages, lr_at, trained_names
from vitcli.teacher import Teacher
from vitcli.tuning import Choice, choose_settings, product_width, worth_measuring

__all__ = ["Plan", "build_plan", "count_lanes", "describe", "head_alone", "lr_of_step", "reading_steps", "resolve", "tune"]

GIB = 2**30
MICRO_BATCH_CAP = {"cpu": 128, "cuda": 1024}  # images; beyond it a step gains nothing and leaves the CPU's caches


@dataclass(frozen=True)
class Plan:
    """A run before its first step. Sizes in images, FLOPs (a multiply-add counts 2) and bytes."""

    config: Config
    num_classes: int
    train_examples: int
    val_examples: int
    parameters: int
    trained_parameters: int  # those that are not frozen to the end
    flops_per_image: int  # forward
    training_flops_per_image: int  # forward and backward, and the teacher's answer
    memory_estimate_bytes: int  # of one device
    device: torch.device
    parallel: Parallel
    ranks: int
    teacher: Teacher | None = None


def head_alone(config: Config, step: int) -> bool:
    """Tell whether step 0, 1, ... trains nothing but the head."""
    return config.train.freeze_backbone or step < config.train.head_first_steps


def reading_steps(config: Config) -> frozenset[int]:
    """Return the steps of a resolved config after which a run has seen as many images as each of `log.readings` says.

    The first step that reaches a number counts for it; numbers beyond the run's length are left out.
    """
    assert config.train.steps is not None
    steps = {math.ceil(images / config.train.batch_size) for images in config.log.readings}
    return frozenset(step for step in steps if step <= config.train.steps)


def lr_of_step(config: Config, step: int) -> float:
    """Return the learning rate of step 0, 1, ... of a resolved config; where the head goes first, each part has a schedule."""
    optim, head_first_steps = config.optim, config.train.head_first_steps
    assert config.train.steps is not None and optim.warmup_steps is not None
    if step < head_first_steps:
        total_steps, warmup_steps = head_first_steps, min(optim.warmup_steps, head_first_steps // 20)
    else:
        step, total_steps, warmup_steps = step - head_first_steps, config.train.steps - head_first_steps, optim.warmup_steps
    return lr_at(
        step,
        lr=optim.lr,
        end_lr=optim.end_lr,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        schedule=optim.schedule,
    )


def resolve(config: Config, *, train_examples: int, val_examples: int, device: torch.device, ranks: int = 1) -> Config:
    """Return the config with every `null` that planning decides replaced by its value."""
    model = resolve_model(config.model)
    train, optim, log = config.train, config.optim, config.log
    if train.steps is not None:
        steps = train.steps
    elif train.examples is not None:
        steps = math.ceil(train.examples / train.batch_size)
    else:
        assert train.epochs is not None
        steps = math.ceil(train.epochs * train_examples / train.batch_size)
    whole_model_steps = steps - train.head_first_steps
    if whole_model_steps <= 0:
        raise ConfigError(
            f"train.head_first_steps is {train.head_first_steps}, but the run has {steps} steps; make it shorter, or set "
            "train.freeze_backbone to train the head alone"
        )
    warmup_steps = optim.warmup_steps if optim.warmup_steps is not None else min(10_000, whole_model_steps // 20)
    if warmup_steps >= whole_model_steps:
        after = " after train.head_first_steps" if train.head_first_steps else ""
        raise ConfigError(
            f"optim.warmup_steps is {warmup_steps}, but the run has {whole_model_steps} steps{after}; make it shorter"
        )
    alone = train.micro_batch_size or _micro_batch_size(config, device)
    micro = min(alone, math.ceil(train.batch_size / ranks))
    # An image costs a third at evaluation of what it costs in training: ten evaluations, or twenty for early stopping to go by,
    # unless they would take over 15 %
    most = 10 if train.early_stop_evals is None else 20
    evaluations = min(most, max(1, int(0.15 * 3 * steps * train.batch_size / val_examples)))
    return config.model_copy(
        update={
            "model": model,
            "objective": resolve_objective(config.objective, model, config.data.image_size),
            "distillation": resolve_distillation(config.distillation),
            "optim": optim.model_copy(update={"warmup_steps": warmup_steps}),
            "train": train.model_copy(
                update={
                    "steps": steps,
                    "epochs": None,
                    "examples": None,
                    "micro_batch_size": micro,
                    # without gradients twice as many fit; the same for any number of processes, and so the same numbers
                    "eval_batch_size": train.eval_batch_size or 2 * alone,
                    "precision": choose_precision(train.precision, device, width=product_width(model)),
                }
            ),
            "log": log.model_copy(
                update={
                    "log_every_steps": log.log_every_steps or max(1, min(100, steps // 100)),
                    "eval_every_steps": log.eval_every_steps or math.ceil(steps / evaluations),
                    "checkpoint_every_steps": log.checkpoint_every_steps or max(1, min(1000, math.ceil(steps / 10))),
                }
            ),
        }
    )


def tune(
    config: Config, *, num_classes: int, train_examples: int, val_examples: int, device: torch.device, ranks: int = 1
) -> tuple[Config, Choice | None]:
    """Settle `auto` precision and a micro-batch of null by a measurement, if the config allows one and the run is long.

    What is measured is a classifier: a run without labels keeps to the plan.
    """
    train = config.train
    draft = resolve(config, train_examples=train_examples, val_examples=val_examples, device=device, ranks=ranks)
    assert draft.train.steps is not None and draft.train.micro_batch_size is not None
    flops = forward_flops(draft.model, image_size=config.data.image_size, num_classes=num_classes)
    images = draft.train.steps * train.batch_size // ranks
    worth = train.tune and worth_measuring(images=images, flops_per_image=flops, device=device)
    if not worth or not config.objective.needs_labels:
        return config, None
    choice = choose_settings(
        draft.model,
        image_size=config.data.image_size,
        num_classes=num_classes,
        device=device,
        precision=train.precision,
        micro_batch_size=train.micro_batch_size,
        largest=draft.train.micro_batch_size,
        lanes=count_lanes(draft, flops_per_image=flops, device=device, ranks=ranks),
    )
    settled = {"precision": choice.precision, "micro_batch_size": choice.micro_batch_size}
    return config.model_copy(update={"train": train.model_copy(update=settled)}), choice


def count_lanes(config: Config, *, flops_per_image: int, device: torch.device, ranks: int) -> int:
    """Return how many portions of a micro-batch go through the model side by side, in threads of their own."""
    model, train = config.model, config.train
    shares = (model.dropout, model.attention_dropout, model.stochastic_depth, model.patch_dropout)
    random = any(share > 0 for share in shares)  # the threads would race for torch's generator
    if device.type != "cpu" or ranks > 1 or random or train.compile or train.activation_checkpointing:
        return 1
    assert train.micro_batch_size is not None
    return choose_lanes(flops=3 * flops_per_image * train.micro_batch_size, images=train.micro_batch_size)


def _micro_batch_size(config: Config, device: torch.device) -> int:
    """Halve the batch until it is under the device's useful size and its activations fit in half of the free memory."""
    micro, available = config.train.batch_size, memory_bytes(device)
    model = resolve_model(config.model)
    objective = resolve_objective(config.objective, model, config.data.image_size)
    per_image = _activation_bytes(config.model_copy(update={"objective": objective}), model)
    while micro > 1 and (micro > MICRO_BATCH_CAP[device.type] or (available is not None and micro * per_image > available / 2)):
        micro = math.ceil(micro / 2)
    return micro


def _activation_bytes(config: Config, model: ModelConfig) -> int:
    """Estimate what an image keeps in memory between forward and backward pass; a resolved precision of 16 bits counts."""
    checkpointing = config.train.activation_checkpointing
    whole = kept_bytes(config, model, checkpointing=checkpointing)
    return whole if config.train.precision in ("auto", "float32") else whole * 9 // 16  # autocast keeps some in float32


def build_plan(
    config: Config,
    *,
    num_classes: int,
    train_examples: int,
    val_examples: int,
    device: torch.device,
    ranks: Ranks = SOLO,
    teacher: Teacher | None = None,
) -> Plan:
    """Work out what a resolved config costs; builds the model without memory to count its parameters."""
    with torch.device("meta"):
        model = build_learner(config, num_classes=num_classes)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    parameters, trained = sum(sizes.values()), sum(sizes[name] for name in checked_names(config, list(sizes)))
    moments = 1 if config.optim.name == "sgd" else 2
    copies = 1 + averages(config.train)
    assert config.train.micro_batch_size is not None
    state_bytes = 4 * parameters * copies + 4 * trained * (1 + moments)
    answering = 0 if teacher is None else teacher.answering_bytes()
    activations = config.train.micro_batch_size * max(answering, _activation_bytes(config, config.model))
    whole = activations + (0 if teacher is None else teacher.weight_bytes())  # on each device, however many share the rest
    parallel = choose_parallel(
        config.train.parallel,
        ranks=ranks.ranks,
        state_bytes=state_bytes,
        activation_bytes=whole,
        memory_bytes=memory_bytes(device),
    )
    memory = state_bytes // (ranks.ranks if parallel == "fsdp" else 1) + whole
    forward, step = flops_per_image(config, num_classes=num_classes)
    return Plan(
        config,
        num_classes,
        train_examples,
        val_examples,
        parameters,
        trained,
        forward,
        step + (0 if teacher is None else teacher.flops_per_image),
        memory,
        device,
        parallel,
        ranks.ranks,
        teacher,
    )


def checked_names(config: Config, names: list[str]) -> list[str]:
    """Return which of a model's parameters a run trains.

    Raises:
        ConfigError: a pattern of `train.freeze` matches none of them, or nothing is left to train.
    """
    frozen, head_first = config.train.freeze, config.train.head_first_steps > 0
    examples = f"parameters are called {names[0]}, {names[len(names) // 2]}, {names[-1]}"
    for pattern in frozen:
        if len(trained_names(names, head_alone=False, frozen=[pattern])) == len(names):
            raise ConfigError(f"train.freeze: {pattern!r} matches no parameter of this model; {examples}")
    if not trained_names(names, head_alone=config.train.freeze_backbone or head_first, frozen=frozen):
        first = " in the first steps, which train the head alone" if head_first else ""
        raise ConfigError(f"train.freeze: {list(frozen)} leaves nothing to train{first}; {examples}")
    return trained_names(names, head_alone=config.train.freeze_backbone, frozen=frozen)


def describe(plan: Plan) -> list[str]:
    """Return the plan as lines for a person."""
    config = plan.config
    model, train, optim = config.model, config.train, config.optim
    steps, batch = train.steps, train.batch_size
    assert steps is not None and optim.warmup_steps is not None
    images = steps * batch
    work = images * plan.training_flops_per_image
    first = train.head_first_steps
    points = sorted({0, first, first + optim.warmup_steps, steps // 4, steps // 2, 3 * steps // 4, steps - 1})
    curve = ", ".join(f"{step:,}: {lr_of_step(config, step):.2e}" for step in points)
    passes = images / plan.train_examples
    trained = f", of which {plan.trained_parameters:,} are trained" if plan.trained_parameters < plan.parameters else ""
    layers = f", layer decay {optim.layer_decay:g}" if optim.layer_decay < 1 else ""
    labels = config.objective.needs_labels
    metric = config.log.best_metric if labels else "loss"
    patience = f"after {train.early_stop_evals} evaluations clearly below the best by {metric}"
    classes = f", {plan.num_classes:,} classes" if labels else ", without a head"
    return [
        f"model       {describe_model(model, config.data.image_size)}{classes}",
        *([] if labels else [f"objective   {describe_objective(config)}"]),
        *([] if plan.teacher is None else [f"teacher     {plan.teacher.words()}; {describe_distillation(config)}"]),
        f"parameters  {plan.parameters:,}{trained}",
        f"FLOPs       {plan.flops_per_image / 1e9:.4g} G per image forward, {work:.3g} in all",
        f"data        {config.data.source}: {plan.train_examples:,} training and {plan.val_examples:,} evaluation images",
        f"length      {steps:,} steps of {batch:,} ({train.micro_batch_size} at once), {passes:.3g} epochs, {images:,} images",
        *([f"head first  {first:,} steps train the head alone"] if first else []),
        *([f"ends early  {patience}, with the best weights"] if train.early_stop_evals else []),
        f"optimiser   {optim.name}, weight decay {optim.weight_decay:g}, gradient clip {optim.grad_clip}{layers}",
        f"lr          {optim.schedule}; by step: {curve}",
        f"precision   {train.precision} on {hardware(plan.device)}",
        *([f"processes   {plan.ranks}, {plan.parallel}"] if plan.ranks > 1 else []),
        f"memory      about {plan.memory_estimate_bytes / GIB:.2f} GiB for weights, optimiser and activations",
        f"run         {config.out}",
    ]


def describe_distillation(config: Config) -> str:
    """Say in a few words what a resolved config learns from its teacher, and where."""
    section = config.distillation
    what = "the class it chooses" if section.kind == "hard" else f"its probabilities at temperature {section.tau:g}"
    where = "a token of its own" if config.model.distill_token else "the only head"
    return f"{where} learns {what}, {section.alpha:g} of the loss"


def describe_model(model: ModelConfig, image_size: tuple[int, int]) -> str:
    """Say in a few words what a resolved section's model is."""
    units = "" if model.resnet_units is None else "-".join(map(str, model.resnet_units)) or "no"
    resnet = f"ResNet, {units} units from {model.resnet_width} channels on"
    if model.kind == "resnet":
        looking = model.resnet_spatial_units
        if looking is not None:
            resnet += f", {'-'.join(map(str, looking))} of them 3x3: a field of {receptive_field(model)} px"
        return f"{resnet}, {image_size[0]} x {image_size[1]} px"
    if model.kind == "mlp":
        return f"MLP, width {model.width}, depth {model.depth}, {image_size[0]} x {image_size[1]} px"
    assert model.patch_size is not None
    side = model.patch_size * stem_stride(model)
    rows, columns = (length // side for length in image_size)
    patches = f"width {model.width}, depth {model.depth}, {model.num_heads} heads, {rows} x {columns} patches of {side} px"
    token = ", a distillation token" if model.distill_token else ""
    return f"ViT, {patches}{token}" + (f", after a {resnet}" if units else "")
