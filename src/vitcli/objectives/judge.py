"""What a model that learns without labels is worth on the evaluation split: its loss, with the same masks every time."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vitcli.config import Config
from vitcli.data.protocol import Source
from vitcli.distributed import SOLO, Ranks
from vitcli.errors import DataError
from vitcli.forward import source_answers
from vitcli.models import VisionTransformer
from vitcli.objectives.masks import evaluation_masks

__all__ = ["ObjectiveResult", "evaluate_objective"]


@dataclass(frozen=True)
class ObjectiveResult:
    """What an evaluation without labels found."""

    loss: float  # mean over the images
    accuracy: float | None  # share of colours that are right, in [0, 1]; None where pixels are predicted
    examples: int
    seconds: float

    def row(self) -> dict[str, Any]:
        """Return what metrics.jsonl and TensorBoard keep of it."""
        right = {} if self.accuracy is None else {"accuracy": self.accuracy}
        return {"loss": self.loss, **right, "seconds": self.seconds}

    def as_dict(self, classes: Sequence[str] | None = None) -> dict[str, Any]:
        """Return JSON values; a loss that is not finite becomes None. There are no classes to name."""
        del classes
        return {**asdict(self), "loss": self.loss if math.isfinite(self.loss) else None}


def evaluate_objective(
    model: nn.Module,
    source: Source,
    config: Config,
    *,
    device: torch.device,
    batch_size: int,
    warn: Callable[[str], object],
    check: Callable[[], None] | None = None,
    flops_per_image: int,
    ranks: Ranks = SOLO,
) -> ObjectiveResult:
    """Show a learner every image of a source once, with the masks of its index, and return what it predicted right.

    Sums are exact over batches, so the result does not depend on how many ranks share the work.

    Raises:
        DataError: there are no images.
        UserError, Interrupted: on every rank, what reading an image or `check` raised on any.
    """
    assert isinstance(model, VisionTransformer)
    objective, grid_size = config.objective, model.grid_size

    def masks_of(batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (evaluation_masks(objective, grid_size=grid_size, indices=batch["indices"].numpy()),)

    started = time.perf_counter()
    sums: list[Tensor] = []
    with closing(
        source_answers(
            model,
            source,
            config,
            forward=judged,
            beside=masks_of,
            device=device,
            batch_size=batch_size,
            warn=warn,
            check=check,
            flops_per_image=flops_per_image,
            ranks=ranks,
        )
    ) as answered:
        for _, found in answered:
            share = found.double()
            sums.append(torch.cat([share.sum(0), share.new_full((1,), len(share))]))  # on the device: nobody waits for it
    per_rank = ranks.gather(torch.stack(sums).tolist() if sums else [])
    loss, right, images = (math.fsum(column) for column in zip(*chain.from_iterable(per_rank))) if any(per_rank) else (0, 0, 0)
    if not images:
        raise DataError("evaluation: the split has no examples; expected at least one")
    colours = objective.target in ("mean_colour", "colours")
    return ObjectiveResult(loss / images, right / images if colours else None, int(images), time.perf_counter() - started)


def judged(model: Any, images: Tensor, masks: Tensor) -> Tensor:
    """Return what a learner's objective says of images, (b, 2)."""
    answer: Tensor = model(images, masks)
    return answer
