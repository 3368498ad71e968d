"""Weights and what they are, whoever wrote them: what every reader of weights returns, and what a run starts from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Pretrained"]


@dataclass(frozen=True)
class Pretrained:
    """Weights to start from or to evaluate, and what they are: tensors on the CPU, `model` the resolved model section."""

    state: dict[str, Tensor]
    model: dict[str, Any]
    classes: list[str]
    preprocessing: dict[str, Any]  # image_size (H, W), mean, std, eval_crop_fraction
    source_path: Path  # the weights file
    step: int
    is_ema: bool
    manifest: dict[str, Any]
    named: bool = True  # False: the file says no names, so `classes` are numbers "0", "1", ...
    notes: list[str] = field(default_factory=list)  # lines for the user: what was dropped or assumed
