"""What an inspection found, and what it says of a model in words."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitcli.inspection.samples import Samples
from vitcli.inspection.survey import Survey
from vitcli.inspection.views import Fields, View
from vitcli.models import Model, VisionTransformer
from vitcli.opened import OpenedModel

__all__ = ["Inspection", "before_names", "reader_words"]


@dataclass(frozen=True)
class Inspection:
    """All that was found of a model."""

    opened: OpenedModel
    against: OpenedModel | None
    filters: NDArray[np.float64]  # (F, 3, h, w)
    filters_words: str
    positions: NDArray[np.float64] | None  # (P, D)
    positions_words: str
    samples: Samples | None
    survey: Survey | None
    views: list[View]
    coloured: list[str]  # the layers whose features are shown as colours
    fields: list[Fields]  # of the model, and of the one it is compared with

    def notes(self) -> list[str]:
        """Return what to know before reading the figures."""
        notes = []
        if self.positions is None:
            notes.append(self.positions_words)
        if not isinstance(self.opened.model, VisionTransformer):
            notes.append("This model has no attention: there are no distances, no rollout and no heads to show.")
        if self.survey is not None and self.survey.alike is None:
            notes.append("Fewer than 4 images: too few to say how alike layers are.")
        elif self.survey is not None and self.survey.images < 32:
            notes.append(f"{self.survey.images} images are few: distances, lengths and likeness are those of these alone.")
        if self.opened.model.permutation is not None:
            notes.append("This model looks at images whose squares are in another order; pictures are shown as it sees them.")
        return notes


def before_names(model: VisionTransformer) -> list[str]:
    """Return the names of the tokens before the patches."""
    registers = model.num_registers
    names = [f"register {number}" for number in range(1, registers + 1)] if registers > 1 else ["register"] * registers
    return [*["class token", "distillation token"][: model.num_prefix_tokens], *names]


def reader_words(model: Model) -> tuple[str, str]:
    """Return what rollout starts from, and what a head's map shows, in words."""
    assert isinstance(model, VisionTransformer)
    if model.dist_token is not None:
        return (
            "class token and distillation token, half each, as a head reads either",
            "what the class token takes of each patch",
        )
    if model.cls_token is not None:
        return "the class token, which alone the head reads", "what the class token takes of each patch"
    if model.attn_pool is None:
        return (
            "the mean over all patches, which the head reads in place of a class token",
            "what the patches, in their mean, take of each patch: the model averages them and has no class token",
        )
    return (
        "what the learned query (MAP) takes of the patches, as it stands in place of a class token",
        "what the patches, in their mean, take of each patch: there is no class token before the learned query",
    )
