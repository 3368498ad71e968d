"""Learning without labels: which patches are hidden, what is predicted of them, and what that is worth.

A Vision Transformer keeps its tensors' names; what predicts hangs on it as `objective.*`, which fine-tuning leaves behind.
"""

from vitcli.objectives.build import build_learner, describe_objective, flops_per_image, kept_bytes, units_of
from vitcli.objectives.judge import ObjectiveResult, evaluate_objective
from vitcli.objectives.masks import training_masks

__all__ = [
    "ObjectiveResult",
    "build_learner",
    "describe_objective",
    "evaluate_objective",
    "flops_per_image",
    "kept_bytes",
    "training_masks",
    "units_of",
]
