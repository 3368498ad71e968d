"""One schema for every command: what a YAML file may say, of which type, in which range.

A config is read from YAML (see `config_file`), validated once, and never mutated. Sections are handed to the rooms that need
them; the root goes to none of the leaves. `null` means "chosen when the run is planned", and the choice is written to the run.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vitcli.distillation_config import DistillationConfig
from vitcli.model_config import ModelConfig
from vitcli.objective_config import ObjectiveConfig
from vitcli.section import Count, Fraction, ImageSize, Length, Patterns, PositiveInt, Section, Size, machine

__all__ = [
    "AugmentConfig",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "FewshotConfig",
    "LogConfig",
    "MixPart",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ShapesConfig",
    "Section",
    "TrainConfig",
]


class ShapesConfig(Section):
    """The embedded, formula-driven corpus (source `shapes`)."""

    classes: Annotated[int, Field(ge=2, le=21_000)] = Field(100, description="number of classes, 2 to 21,000")
    train_examples: PositiveInt = Field(100_000, description="length of the training split: any number, nothing is stored")
    val_examples: PositiveInt = Field(2_000, description="length of the held-out split")
    seed: Count = Field(0, description="another seed is another corpus")


class MosaicConfig(Section):
    """The embedded corpus of layouts (source `mosaic`), whose classes differ in nothing but where parts stand."""

    classes: Annotated[int, Field(ge=2, le=21_000)] = Field(100, description="number of classes, 2 to 21,000")
    train_examples: PositiveInt = Field(100_000, description="length of the training split: any number, nothing is stored")
    val_examples: PositiveInt = Field(2_000, description="length of the held-out split")
    grid: Annotated[int, Field(ge=1, le=64)] = Field(
        4, description="cells along each side; the image's sides are multiples of it"
    )
    parts: Annotated[int, Field(ge=2, le=10_000)] = Field(16, description="different parts that all classes share")
    keep: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="how often a cell shows its class's part; else it shows any"
    )
    shift: Count = Field(0, description="px by which the layout may lie off the grid, at most a cell")
    seed: Count = Field(0, description="another seed is another corpus")


class MixPart(Section):
    """One source of a mixture."""

    source: str = Field(description="any source but mix")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="its share of the training images, relative to the others'")


class DataConfig(Section):
    """Where examples come from and how large they are shown to the model."""

    source: str = Field(
        description="shapes, mosaic, digits, cifar10, cifar100, mnist, fashion-mnist, flowers102, pets, imagenet, folder:PATH, "
        "shards:PATTERN, hf:NAME_OR_PATH or mix"
    )
    val_source: str | None = Field(None, description="evaluate on this source's evaluation split instead")
    image_size: ImageSize = Field(description="height and width shown to the model, px; one number for a square")
    shapes: ShapesConfig = Field(default_factory=ShapesConfig, description="settings of the source `shapes`")
    mosaic: MosaicConfig = Field(default_factory=MosaicConfig, description="settings of the source `mosaic`")
    mix: list[MixPart] | None = Field(None, description="the parts of the source `mix`, each a source and a weight")
    mix_classes: Literal["merge", "apart"] = Field(
        "merge", description="classes of equal name in several parts of a mix are one class, or kept apart by their part"
    )
    examples: PositiveInt | None = Field(
        None, description="train on a class-balanced part of this size; a smaller one is contained in every larger one"
    )
    subset_seed: Count = Field(0, description="another seed takes another part; the same for every run and model")
    sampling: Literal["natural", "sqrt", "balanced"] = Field(
        "natural", description="how often a class is shown: by its size, by the root of its size, or all equally often"
    )
    shuffle_window: PositiveInt | None = Field(
        None,
        description="images shuffled among each other, in whole shards; null shuffles all, or 65,536 of remote shards",
    )
    label_key: str = Field("label", description="where a shard's json members, or a Hugging Face set, keep the label")
    on_error: Literal["raise", "skip"] = Field("raise", description="an image that cannot be read ends the run, or is replaced")
    skip_limit: Count = Field(100, description="on_error: skip ends the run when more images than this cannot be read")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="held out where a source has no val or test split"
    )
    dev_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="development split: train on the rest of the training split and evaluate on this share of it",
    )
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="subtracted from pixels in [0, 1]")
    std: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="then divided by; .5/.5 gives [-1, 1] as the paper")
    eval_crop_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="central share kept at evaluation, aspect ratio kept; null resizes the whole image as the reference does",
    )
    patch_permutation: Size | None = Field(
        None,
        description="control: every image is cut into squares of so many px, shown in one other order; null shows it as it is",
    )
    root: Path | None = machine(None, "data root; else $VIT_DATA, else ~/.cache/vit")
    workers: Count | None = machine(None, "loader processes; null chooses by source and machine")
    remote_cache_gib: Annotated[float, Field(gt=0)] = machine(100.0, "disk space for copies of remote shards, GiB")
    memory_cache_gib: Annotated[float, Field(ge=0)] = Field(
        4.0,  # a JPEG that is read again each time may be decoded at reduced scale, which shows in the last bits of a pixel
        description="decode a set once and keep it if it is smaller than this, GiB",
    )


class AugmentConfig(Section):
    """Training-time augmentation."""

    crop: Literal["inception", "pad", "random", "resize"] = Field(
        "inception",
        description="random area and aspect; pad then random crop; resize short side x 8/7 then random crop; plain resize",
    )
    min_area: Annotated[float, Field(gt=0, le=1)] = Field(
        0.05, description="smallest share of the image an inception crop keeps"
    )
    pad: Count = Field(4, description="px added on each side by crop: pad, at a 32 px image; scaled with the image")
    flip: bool = Field(True, description="mirror half of the images")
    randaugment_layers: Count = Field(0, description="RandAugment operations per image; 0 turns it off")
    randaugment_magnitude: Annotated[float, Field(ge=0, le=30)] = Field(10.0, description="strength of each, 0 to 30")
    mixup: Annotated[float, Field(ge=0)] = Field(0.0, description="alpha of the Beta distribution; 0 turns it off")
    cutmix: Annotated[float, Field(ge=0)] = Field(0.0, description="likewise; with both on, each step takes one of them")


class OptimConfig(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd", "muon"] = Field(
        "adamw",
        description="the paper's Adam with decoupled decay is adamw here; muon learns faster from scratch",
    )
    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate")
    end_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="learning rate that the decay ends at")
    schedule: Literal["linear", "cosine", "rsqrt", "constant"] = Field("cosine", description="decay after the warm-up")
    warmup_steps: Count | None = Field(None, description="linear warm-up; null takes 5 % of the run, at most 10,000")
    beta1: Fraction = Field(0.9, description="Adam's first-moment decay")
    beta2: Fraction = Field(0.999, description="Adam's second-moment decay")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam's epsilon")
    momentum: Fraction = Field(0.9, description="of SGD and Muon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="on kernels only; torch's convention, multiplied by lr"
    )
    grad_clip: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest global gradient norm; null for none")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="learning rate of each layer relative to the one above it, from the head down; 1 for equal ones"
    )


class TrainConfig(Section):
    """How long, in what portions, towards which loss."""

    steps: Length | None = Field(None, description="length of the run; give steps, epochs or examples")
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = Field(None, description="length in passes over the training split")
    examples: Length | None = Field(None, description="length in images seen")
    batch_size: Annotated[int, Field(ge=1, le=10**8)] = Field(256, description="images per step, over all devices")
    micro_batch_size: PositiveInt | None = Field(
        None, description="images a device holds at a time; gradients accumulate over the rest"
    )
    eval_batch_size: PositiveInt | None = machine(
        None, "images a device holds at a time at evaluation; null takes twice as many"
    )
    loss: Literal["softmax", "sigmoid"] = Field("softmax", description="cross-entropy over classes, or one per class")
    label_smoothing: Fraction = Field(0.0, description="share of the target spread over all classes")
    class_weights: Literal["none", "sqrt", "balanced"] = Field(
        "none", description="weight of an image in the loss: equal, or by the inverse (root) of its class's size, 1 on average"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="evaluate averaged weights; 0.9999 in the paper"
    )
    ema_share: Annotated[float, Field(gt=0, le=0.5)] | None = Field(
        None,
        description="in its place: average over about this share of the steps so far, so that a run can be read at any moment",
    )
    freeze_backbone: bool = Field(False, description="train the head alone (linear probe)")
    freeze: Patterns = Field(
        (), description="parameters to leave as they are, by patterns of their names, such as [patch_embed.*, 'blocks.[0-3].*']"
    )
    head_first_steps: Count = Field(
        0, description="train the head alone for so many of the steps, then everything, with a schedule for each part"
    )
    early_stop_evals: PositiveInt | None = Field(
        None,
        description="end after so many evaluations clearly below the best, by log.best_metric; the result is the best one",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU when there is one")
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto", description="auto takes bf16 where it is faster on this device; fp16 scales the loss as needed"
    )
    tune: bool = Field(
        True, description="settle precision: auto and the micro-batch by a short measurement, kept for next time"
    )
    compile: bool = Field(False, description="torch.compile the model")
    parallel: Literal["auto", "ddp", "fsdp"] = machine(
        "auto", "several processes hold the whole model each, or parts of it (FSDP2); auto by what fits in memory"
    )
    activation_checkpointing: bool = machine(
        False, "compute activations again in the backward pass: a third more work, a fraction of the memory"
    )
    timeout_seconds: PositiveInt = machine(600, "of several processes, how long one may keep the others waiting")
    nonfinite_limit: PositiveInt = Field(
        3, description="steps in a row without finite loss and gradient that go back to a checkpoint"
    )
    max_rollbacks: Count = Field(3, description="how often a run may go back before it gives up")


class FewshotConfig(Section):
    """Few-shot probes of a model while it trains (`probes.probe_live`): whether its features become more useful elsewhere."""

    datasets: list[str] = machine([], "data sets to probe on, such as cifar10 or folder:PATH; empty for no probes")
    shots: list[PositiveInt] = machine([5, 10], "images per class to learn from", min_length=1)
    every_steps: PositiveInt | None = machine(None, "null probes whenever the run is evaluated; always also at the end")
    seeds: PositiveInt = machine(3, "draws of the shots; accuracies are their mean")
    l2: Annotated[float, Field(gt=0)] = machine(1024.0, "regularisation of the least squares; 2^10 in the paper's code")


class LogConfig(Section):
    """How often numbers, evaluations and checkpoints are written."""

    log_every_steps: PositiveInt | None = machine(None, "null takes 1/100 of the run, at most 100")
    eval_every_steps: PositiveInt | None = Field(
        None, description="null takes 1/10 of the run, or more where evaluation is costly"
    )
    checkpoint_every_steps: PositiveInt | None = machine(None, "null takes 1/10 of the run, at most 1,000")
    keep_checkpoints: PositiveInt = machine(2, "newest checkpoints kept")
    keep_every_steps: PositiveInt | None = machine(None, "checkpoints kept for good: every so many steps")
    readings: list[Length] = machine(
        [], "images seen at which the run is evaluated and probed, and its answers and checkpoint are kept for good"
    )
    keep_best: Count = machine(0, "best checkpoints kept, by best_metric; then one is written at every evaluation")
    best_metric: Literal["top1", "top5", "loss"] = machine(
        "top1", "of an evaluation; what keep_best goes by; the loss where a run learns without labels"
    )
    inspect_every_steps: PositiveInt | None = machine(
        None, "the figures of vit inspect in TensorBoard every so many steps and at the end; null for none"
    )
    sample_images: Count = machine(16, "training images in TensorBoard's sample grid; 0 turns it off")


class Config(Section):
    """Everything a run depends on."""

    seed: Count = Field(0, description="order, augmentation, initial weights and dropout derive from it")
    out: Path | None = Field(None, description="run directory; default runs/ and the config's name")
    ckpt: Path | None = Field(None, description="weights to start from: run directory, checkpoint directory or weights file")
    from_scratch: bool = Field(False, description="take architecture and preprocessing from ckpt, but not its weights")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    distillation: DistillationConfig = Field(default_factory=DistillationConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    fewshot: FewshotConfig = Field(default_factory=FewshotConfig)
    log: LogConfig = Field(default_factory=LogConfig)
