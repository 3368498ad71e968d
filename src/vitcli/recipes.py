"""Which settings a fine-tuning run takes when nobody gives them.

For the paper's data sets its Table 4; for any other a recipe scaled to the data and to what the machine can do in half an hour.
A recipe is a plain nested mapping below the user's file and overrides, and a few sentences that say what was chosen and why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitcli.model_config import ModelConfig, stem_stride

__all__ = ["OWN", "Recipe", "finetune_recipe"]

# ViT (2010.11929) Table 4: steps; warm-up as in the authors' vit.py and big_vision's transfer.py
TABLE_4 = {
    "imagenet": (20_000, 500),
    "cifar10": (10_000, 500),
    "cifar100": (10_000, 500),
    "pets": (500, 100),
    "flowers102": (500, 100),
}
TABLE_4_LR = 0.01  # inside every sweep of Table 4; the authors' choice for CIFAR-10
HIGH_RESOLUTION = 384  # px, for models pretrained at 224 px or more (Table 4)
NOT_MIRRORED = ("digits", "mnist")  # a mirrored digit is another sign
UNKNOWN_BUDGET_SECONDS = 1800.0  # what a recipe nobody asked for may take on this machine
OWN = ("folder", "shards", "hf")  # kinds whose evaluation split is the user's own to choose a checkpoint by
PATIENCE_EVALS = 8  # of 20
UNEQUAL = 5.0  # largest class over the smallest: from here on the loss weighs them
FEW = 5  # training images, below which a class is learned by luck


@dataclass(frozen=True)
class Recipe:
    """Settings below the user's own, and why they are what they are."""

    settings: dict[str, Any]
    notes: list[str]


def finetune_recipe(
    dataset: str,
    *,
    model: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    num_examples: int,
    forward_flops: int,
    flops_per_second: float,
    class_sizes: Mapping[str, int] | None = None,
    picture_side: int | None = None,
) -> Recipe:
    """Return the recipe for fine-tuning a checkpoint on a data set.

    Args:
        dataset: a name or `folder:PATH`.
        model: the checkpoint's model section (sizes as numbers).
        preprocessing: the checkpoint's image_size (height, width) px, mean, std, eval_crop_fraction.
        num_examples: images in the training split.
        forward_flops: of one image at the checkpoint's resolution.
        flops_per_second: what this machine sustains in training.
        class_sizes: training images of each class, by its name, where that is known.
        picture_side: median of the pictures' shorter sides, px, where that is known.
    """
    height, width = preprocessing["image_size"]
    section = ModelConfig.model_validate(dict(model))
    side = (section.patch_size or 1) * stem_stride(section)  # a ResNet would take any, but its own stride wastes nothing
    notes: list[str] = []
    resizable = section.kind != "mlp" and preprocessing.get("patch_permutation") is None
    if dataset in TABLE_4 and min(height, width) >= 224 and resizable:
        height = width = HIGH_RESOLUTION // side * side
    settings: dict[str, Any] = {
        "data": {"image_size": [height, width]},
        "augment": {"crop": "inception", "min_area": 0.05, "flip": True},
    }
    if dataset in TABLE_4:
        steps, warmup_steps = TABLE_4[dataset]
        batch_size = 512
        settings["optim"] = {
            "name": "sgd", "momentum": 0.9, "lr": TABLE_4_LR, "schedule": "cosine", "warmup_steps": warmup_steps,
            "weight_decay": 0.0, "grad_clip": 1.0,
        }  # fmt: skip
        notes.append(
            f"recipe: the paper's Table 4 for {dataset} (SGD, {steps:,} steps of 512, lr {TABLE_4_LR}, {height} x {width} px)"
        )
        if min(preprocessing["image_size"]) < 224:
            notes.append(
                f"resolution: the checkpoint's {height} x {width} px; Table 4's 384 px are for models pretrained at 224 px"
            )
        seconds = steps * batch_size * 3 * forward_flops * (height * width) / _area(preprocessing) / flops_per_second
        if seconds > 2 * UNKNOWN_BUDGET_SECONDS:
            affordable = max(1, int(steps * UNKNOWN_BUDGET_SECONDS / seconds))
            notes.append(f"time: about {seconds / 3600:.1f} h on this machine; for half an hour add train.steps={affordable}")
    else:
        batch_size = _power_of_two(num_examples / 20, 16, 512)
        # a few hundred images want many passes, a million want few: as many steps as 30 passes, between 500 and 20,000
        wanted = min(20_000, max(500, 30 * num_examples // batch_size))
        own = dataset.partition(":")[0] in OWN
        step_flops = batch_size * 3 * forward_flops
        if own and picture_side is not None and resizable:
            seconds = wanted * step_flops / flops_per_second
            height, width = suitable_size(section, (height, width), picture_side=picture_side, side=side, seconds=seconds)
            settings["data"]["image_size"] = [height, width]
            step_flops = step_flops * height * width // _area(preprocessing)
        affordable = int(UNKNOWN_BUDGET_SECONDS * flops_per_second / step_flops)
        steps = max(100, min(wanted, affordable))
        lr = min(1e-3, 0.1 / typical_width(section))
        settings["augment"] |= {"min_area": 0.25, "flip": dataset not in NOT_MIRRORED}
        settings["optim"] = {
            "name": "adamw",
            "lr": float(f"{lr:.2g}"),
            "schedule": "cosine",
            "weight_decay": 0.05,
            "grad_clip": 1.0,
        }
        settings["optim"]["warmup_steps"] = steps // 10
        notes.append(
            f"recipe: for {num_examples:,} images ({steps:,} steps of {batch_size}, AdamW, lr {lr:.2g}, {height} x {width} px)"
            + (f", shortened from {wanted:,} steps to half an hour on this machine" if steps < wanted else "")
        )
        if own and picture_side is not None:
            notes.append(size_note((height, width), preprocessing["image_size"], picture_side))
    settings["train"] = {"steps": steps, "batch_size": batch_size}
    if dataset not in TABLE_4 and class_sizes:
        unequal = inequality(class_sizes) > UNEQUAL
        settings["train"] |= {"class_weights": "sqrt"} if unequal else {}
        notes += class_notes(class_sizes, unequal=unequal)
    if dataset.partition(":")[0] in OWN:
        settings["train"] |= {"early_stop_evals": PATIENCE_EVALS}
        notes.append(
            f"ends early: after {PATIENCE_EVALS} evaluations (of 20) clearly below the best; the best checkpoint is the result"
        )
    return Recipe(settings, notes)


def suitable_size(
    section: ModelConfig, size: tuple[int, int], *, picture_side: int, side: int, seconds: float
) -> tuple[int, int]:
    """Return the size (height, width) to fine-tune at: the checkpoint's, or, as from 224 to 384 px in Table 4, a larger one.

    That is where the pictures have so many pixels, positions can be interpolated and it takes half of the time there is.

    Args:
        size: the checkpoint's.
        side: of a patch, px.
        seconds: that the run takes at the checkpoint's size.
    """
    height, width = (max(1, round(length * HIGH_RESOLUTION / 224 / side)) * side for length in size)
    dearer = height * width / (size[0] * size[1])
    if section.pos_embed == "relative" or picture_side < min(height, width) or seconds * dearer > UNKNOWN_BUDGET_SECONDS / 2:
        return size
    return height, width


def size_note(size: tuple[int, int], checkpoint: Sequence[int], picture_side: int) -> str:
    """Say why an image size was chosen."""
    chosen, before = (f"{height} x {width} px" for height, width in (size, tuple(checkpoint)))
    if size != tuple(checkpoint):
        return f"resolution: {chosen}, more than the checkpoint's {before}: the pictures have {picture_side} px and more"
    enlarged = f"; the pictures, of about {picture_side} px, are enlarged" if picture_side < min(size) else ""
    return f"resolution: the checkpoint's {chosen}{enlarged}"


def inequality(class_sizes: Mapping[str, int]) -> float:
    """Return how many times larger the largest class is than the smallest; classes without images do not count."""
    sizes = [count for count in class_sizes.values() if count]
    return max(sizes) / min(sizes) if sizes else 1.0


def class_notes(class_sizes: Mapping[str, int], *, unequal: bool) -> list[str]:
    """Say how large the classes are, and what that means."""
    by_size = sorted(class_sizes.items(), key=lambda entry: entry[1])
    (smallest, least), (largest, most) = by_size[0], by_size[-1]
    span = f"{least:,} ({smallest}) to {most:,} ({largest}) training images"
    span = f"{least:,} training images each" if least == most else span
    notes = [f"classes: {len(by_size):,}, of {span}"]
    if unequal:
        notes.append(
            "weights: classes are unequal, so an image counts by the inverse root of its class's size (class_weights=sqrt)"
        )
    few = [f"{name} ({count})" for name, count in by_size if count < FEW]
    if few:
        listed = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        notes.append(f"few images: {listed}; with fewer than {FEW} a class is learned by luck: add some")
    return notes


def typical_width(section: ModelConfig) -> int:
    """Return the width of a resolved section's products: a Transformer's, or a ResNet's inside its last block."""
    assert section.width or (section.resnet_width and section.resnet_units)
    return section.width or (section.resnet_width or 0) * 2 ** (len(section.resnet_units or ()) - 1)


def _area(preprocessing: Mapping[str, Any]) -> int:
    height, width = preprocessing["image_size"]
    return int(height) * int(width)


def _power_of_two(value: float, low: int, high: int) -> int:
    return max(low, min(high, 1 << max(0, int(value).bit_length() - 1)))
