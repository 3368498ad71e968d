"""The `distillation` section: a teacher whose answers are learned beside the labels, and how (DeiT, 2012.12877)."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vitcli.section import Section

__all__ = ["DistillationConfig", "distillation_problem", "resolve_distillation"]

# DeiT, Eq. 3 (the mean of both terms) and, below Eq. 2, "typical values tau = 3.0 and lambda = 0.1"
ALPHAS = {"hard": 0.5, "soft": 0.1}
TAU = 3.0


class DistillationConfig(Section):
    """Learning from a teacher; with `model.distill_token` it is a token of its own that does."""

    teacher: Path | None = Field(
        None,
        description="a trained classifier of the same classes, whose answers are learned beside the labels: whatever --ckpt "
        "takes; a run that goes on may find the same weights elsewhere",
    )
    kind: Literal["hard", "soft"] = Field(
        "hard", description="what is learned of its answers: the class it chooses, or its probabilities"
    )
    alpha: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of the teacher's term in the loss; null takes 0.5, for soft 0.1, as published"
    )
    tau: Annotated[float, Field(gt=0)] | None = Field(
        None, description="soft: both sides' logits are divided by it before they are compared; null takes 3, as published"
    )


def resolve_distillation(section: DistillationConfig) -> DistillationConfig:
    """Return the section with every `null` that is read replaced by a value."""
    if section.teacher is None:
        return section
    chosen: dict[str, float] = {"alpha": ALPHAS[section.kind], **({"tau": TAU} if section.kind == "soft" else {})}
    return section.model_copy(update={key: value for key, value in chosen.items() if getattr(section, key) is None})


def distillation_problem(section: DistillationConfig, *, objective: str, loss: str) -> tuple[str, str] | None:
    """Say which setting makes no sense, by its dotted key, and why; None where all do.

    Args:
        objective: its name.
        loss: `train.loss`.
    """
    if section.teacher is None:
        for field in ("kind", "alpha", "tau"):
            if getattr(section, field) != DistillationConfig.model_fields[field].default:
                return f"distillation.{field}", "says how to learn from a teacher; give distillation.teacher, or drop it"
        return None
    if objective != "classification":
        return "distillation.teacher", f"answers with classes, and objective.name {objective} learns none; drop one of them"
    if section.kind == "hard" and section.tau is not None:
        return "distillation.tau", "is for distillation.kind: soft, which is hard here; leave it out"
    if section.kind == "soft" and loss == "sigmoid":
        return "distillation.kind", "is soft, which compares softmaxes, but train.loss is sigmoid; take hard"
    return None
