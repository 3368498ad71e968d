"""A teacher: a trained classifier whose answers to a run's pictures are learned beside their labels (DeiT, 2012.12877).

It is shown what the student is shown, after augmentation and mixup, brought to its own size and normalisation. It learns
nothing, is in no checkpoint, and every process holds all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcli.checkpoint import sha256_of_tensors
from vitcli.config import Config
from vitcli.device import AUTOCAST
from vitcli.errors import CheckpointError
from vitcli.models import build_model
from vitcli.models.flops import activation_bytes, forward_flops
from vitcli.pretrained import Pretrained
from vitcli.weights import load_weights
from vitcli.weights.load import in_words, listed, section_of, trained_grid
from vitcli.weights.open import open_weights

__all__ = ["Answers", "Teacher", "digest_of", "open_teacher"]


@dataclass(frozen=True)
class Teacher:
    """Weights that fit a run's classes, and what asking them costs."""

    pretrained: Pretrained
    order: Tensor | None  # (K,) its number of each of the run's classes; None where they are the same
    sha256: str  # of its tensors
    flops_per_image: int  # forward

    def identity(self) -> dict[str, Any]:
        """Return JSON values: by which weights a run is taught, wherever they lie."""
        return {"path": str(self.pretrained.source_path), "sha256": self.sha256, "step": self.pretrained.step}

    def words(self) -> str:
        """Say in a few words what it is."""
        height, width = self.pretrained.preprocessing["image_size"]
        unnamed = "" if self.pretrained.named else ", its classes in the data's order"
        return f"{self.pretrained.source_path}: {in_words(section_of(self.pretrained))}, {height} x {width} px{unnamed}"

    def weight_bytes(self) -> int:
        """Return the memory its weights take."""
        return sum(tensor.numel() * 4 for tensor in self.pretrained.state.values())

    def answering_bytes(self) -> int:
        """Return, roughly, what an image takes while it is answered: what a training step with recomputation would keep."""
        height, width = self.pretrained.preprocessing["image_size"]
        return activation_bytes(section_of(self.pretrained), image_size=(height, width), checkpointing=True)


def open_teacher(config: Config, classes: Sequence[str]) -> Teacher | None:
    """Open the teacher that a config names, if it names one.

    Args:
        classes: the names of the run's classes.

    Raises:
        CheckpointError: it cannot be read, has no classifier, other classes, or probabilities of another kind.
    """
    path = config.distillation.teacher
    if path is None:
        return None
    pretrained = open_weights(path)
    if config.distillation.kind == "soft" and pretrained.manifest.get("train", {}).get("loss") == "sigmoid":
        raise CheckpointError(
            f"{path}: distillation.kind is soft, which learns a softmax, but this teacher was trained with train.loss sigmoid; "
            "take hard"
        )
    height, width = pretrained.preprocessing["image_size"]
    order = order_of(pretrained, classes, data=config.data.source)
    flops = forward_flops(section_of(pretrained), image_size=(height, width), num_classes=len(classes))
    return Teacher(pretrained, order, sha256_of_tensors(pretrained.state), flops)


def digest_of(path: Path) -> str:
    """Return the digest by which weights are known to be the same wherever they lie; raises CheckpointError."""
    return sha256_of_tensors(open_weights(path).state)


def order_of(pretrained: Pretrained, classes: Sequence[str], *, data: str) -> Tensor | None:
    """Return the teacher's number of each class, by name, or by order where it has no names; None where that is the same.

    Raises:
        CheckpointError: the classes are not the same ones.
    """
    path, theirs = pretrained.source_path, pretrained.classes
    if not theirs:
        raise CheckpointError(
            f"{path}: distillation.teacher has no classifier; take one of {data}'s classes (vit finetune makes one of it)"
        )
    if set(theirs) == set(classes):
        order = [theirs.index(name) for name in classes]
        return None if order == list(range(len(order))) else torch.tensor(order)
    if not pretrained.named and len(theirs) == len(classes):
        return None
    lacking, others = (sorted(set(some) - set(rest)) for some, rest in ((classes, theirs), (theirs, classes)))
    parts = [f"lacks {listed(lacking)}"] if lacking else []
    parts += [f"has {listed(others)} besides"] if others else []
    differ = " and ".join(parts) if pretrained.named else "does not name them"
    raise CheckpointError(
        f"{path}: distillation.teacher has {len(theirs):,} classes, {data} {len(classes):,}, and they differ: it {differ}; "
        "take a teacher of the same classes"
    )


class Answers:
    """The teacher at work on a device: from images as the student is given them to logits in the order of the run's classes.

    Args:
        teacher: weights.
        config: resolved; of the run, for its normalisation and precision.
        device: where to.
    """

    def __init__(self, teacher: Teacher, config: Config, *, device: torch.device) -> None:
        pretrained = teacher.pretrained
        height, width = pretrained.preprocessing["image_size"]
        with torch.random.fork_rng(devices=[]):  # its initial weights must not move the student's random numbers
            model = build_model(
                section_of(pretrained),
                image_size=(height, width),
                num_classes=len(pretrained.classes),
                patch_permutation=pretrained.preprocessing.get("patch_permutation"),
            )
        load_weights(model, pretrained.state, reset_head=False, old_grid=trained_grid(pretrained))
        self.model = model.requires_grad_(False).eval().to(device)
        self.order = None if teacher.order is None else teacher.order.to(device)
        self.image_size = (height, width)
        self.device = device
        self.dtype = AUTOCAST.get(config.train.precision)
        mean, std = (torch.tensor(pretrained.preprocessing[key]) for key in ("mean", "std"))
        own_mean, own_std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
        # (x own_std + own_mean - mean) / std
        self.scale = (own_std / std).view(1, 3, 1, 1).to(device)
        self.shift = ((own_mean - mean) / std).view(1, 3, 1, 1).to(device)
        self.normalised_alike = bool((self.scale == 1).all() and (self.shift == 0).all())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (b, K), float32, for images (b, 3, H, W) normalised as the student's."""
        if not self.normalised_alike:
            images = images * self.scale + self.shift
        if images.shape[2:] != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="bilinear", antialias=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits: Tensor = self.model(images)
        logits = logits.float()
        return logits if self.order is None else logits[:, self.order]
