"""Which settings a fine-tuning run takes when nobody gives them.

For the paper's data sets its Table 4; for any other a recipe scaled to the data and to what the machine can do in half an hour.
A recipe is a plain nested mapping below the user's file and overrides, and a few sentences that say what was chosen and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitcli.model_config import ModelConfig, stem_stride

__all__ = ["Recipe", "finetune_recipe"]

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
) -> Recipe:
    """Return the recipe for fine-tuning a checkpoint on a data set.

    Args:
        dataset: a name or `folder:PATH`.
        model: the checkpoint's model section (sizes as numbers).
        preprocessing: the checkpoint's image_size (height, width) px, mean, std, eval_crop_fraction.
        num_examples: images in the training split.
        forward_flops: of one image at the checkpoint's resolution.
        flops_per_second: what this machine sustains in training.
    """
    height, width = preprocessing["image_size"]
    section = ModelConfig.model_validate(dict(model))
    side = (section.patch_size or 1) * stem_stride(section)  # a ResNet would take any, but its own stride wastes nothing
    notes = []
    if dataset in TABLE_4 and min(height, width) >= 224:
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
        affordable = int(UNKNOWN_BUDGET_SECONDS * flops_per_second / (batch_size * 3 * forward_flops))
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
    settings["train"] = {"steps": steps, "batch_size": batch_size}
    return Recipe(settings, notes)


def typical_width(section: ModelConfig) -> int:
    """Return the width of a resolved section's products: a Transformer's, or a ResNet's inside its last block."""
    assert section.width or (section.resnet_width and section.resnet_units)
    return section.width or (section.resnet_width or 0) * 2 ** (len(section.resnet_units or ()) - 1)


def _area(preprocessing: Mapping[str, Any]) -> int:
    height, width = preprocessing["image_size"]
    return int(height) * int(width)


def _power_of_two(value: float, low: int, high: int) -> int:
    return max(low, min(high, 1 << max(0, int(value).bit_length() - 1)))
