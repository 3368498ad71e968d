"""Exact evaluation: every image counts once, whatever the batch size and however many processes share the batches.

Hits are counted as integers and losses summed in float64, on the model's device, so that nothing depends on how examples
were batched but the model's own rounding; the sums of batches are added without rounding, so nothing depends on who had which.
Sigmoid loss as big_vision's `sigmoid_xent`: sum over classes, mean over images.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcli.distributed import SOLO, Ranks
from vitcli.errors import DataError

__all__ = ["EvalResult", "Judged", "Tally", "evaluate", "judge", "map_classes"]


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found; accuracies are in [0, 1], class lists in the order of the model's outputs."""

    top1: float
    top5: float  # top-K where the model has K < 5 classes
    loss: float  # nats per image
    correct: int
    correct_top5: int
    examples: int
    per_class: list[float | None]  # (K,) accuracy; None for a class without examples
    per_class_correct: list[int]  # (K,)
    per_class_examples: list[int]  # (K,)
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Speed of the whole evaluation, reading the images included."""
        return self.examples / max(self.seconds, 1e-9)

    def row(self) -> dict[str, Any]:
        """Return what metrics.jsonl and TensorBoard keep of it."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5, "seconds": self.seconds}

    def as_dict(self, classes: Sequence[str] | None = None) -> dict[str, Any]:
        """Return JSON values: numbers, and one entry per class, with its name where `classes` gives it.

        A loss that is not finite becomes None, which JSON can write.
        """
        names = [None] * len(self.per_class) if classes is None else list(classes)
        if len(names) != len(self.per_class):
            raise ValueError(f"expected {len(self.per_class)} class names, got {len(names)}")
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "correct": self.correct,
            "correct_top5": self.correct_top5,
            "examples": self.examples,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "per_class": [
                {**({} if name is None else {"class": name}), "accuracy": accuracy, "correct": correct, "examples": examples}
                for name, accuracy, correct, examples in zip(
                    names, self.per_class, self.per_class_correct, self.per_class_examples
                )
            ],
        }


@dataclass(frozen=True)
class Judged:
    """A batch's answers held against its labels, on the model's device."""

    labels: Tensor  # (b,) int64 the model's class numbers
    logits: Tensor  # (b, K) float64
    ranks: Tensor  # (b,) int64 classes ahead of the label: 0 is right; K and more where logits are not numbers
    losses: Tensor  # (b,) float64


def judge(
    labels: Tensor, answered: Tensor, *, num_classes: int, loss: Literal["softmax", "sigmoid"], class_map: Tensor | None
) -> Judged:
    """Hold logits (b, K) against labels int64 (b,); arguments as of `evaluate`.

    Raises:
        DataError: a label is not one of the model's classes.
    """
    device = answered.device
    labels = target_labels(labels, num_classes=num_classes, class_map=class_map).to(device)  # (b,)
    logits = answered.double()  # (b, K)
    own = logits.gather(1, labels[:, None])  # (b, 1)
    # The rank of the label among all classes; a tie goes to the lower class number, as argmax does, so a head
    # of zeros scores what chance scores. Logits that are not numbers are never right.
    ahead = (logits > own) | ((logits == own) & (torch.arange(num_classes, device=device) < labels[:, None]))
    rank = ahead.sum(1) + num_classes * logits.isnan().any(1)  # (b,)
    if loss == "softmax":
        losses = F.cross_entropy(logits, labels, reduction="none")
    else:
        targets = F.one_hot(labels, num_classes).double()
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    return Judged(labels, logits, rank, losses)


class Tally:
    """Counts what was judged, batch by batch, and adds up what all ranks counted."""

    def __init__(self, *, num_classes: int, device: torch.device) -> None:
        self.top = min(5, num_classes)
        self.hits = torch.zeros(num_classes, dtype=torch.int64, device=device)  # (K,) right at the first guess
        self.hits_top5 = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)  # (K,)
        self.losses: list[Tensor] = []  # 0-d float64, one per batch
        self.started = time.perf_counter()

    def add(self, judged: Judged) -> None:
        """Count a batch."""
        self.hits.index_add_(0, judged.labels, (judged.ranks == 0).long())
        self.hits_top5 += (judged.ranks < self.top).sum()
        self.counts.index_add_(0, judged.labels, torch.ones_like(judged.labels))
        self.losses.append(judged.losses.sum())

    def result(self, ranks: Ranks) -> EvalResult:
        """Return the result of all ranks.

        Raises:
            DataError: there were no examples.
        """
        for counted in (self.hits, self.hits_top5, self.counts):
            ranks.sum_(counted)
        per_rank = ranks.gather(torch.stack(self.losses).tolist() if self.losses else [])
        per_class_correct, per_class_examples = self.hits.tolist(), self.counts.tolist()
        examples, correct, correct_top5 = sum(per_class_examples), sum(per_class_correct), int(self.hits_top5)
        if examples == 0:
            raise DataError("evaluation: the split has no examples; expected at least one")
        return EvalResult(
            top1=correct / examples,
            top5=correct_top5 / examples,
            loss=math.fsum(chain.from_iterable(per_rank)) / examples,
            correct=correct,
            correct_top5=correct_top5,
            examples=examples,
            per_class=[right / count if count else None for right, count in zip(per_class_correct, per_class_examples)],
            per_class_correct=per_class_correct,
            per_class_examples=per_class_examples,
            seconds=time.perf_counter() - self.started,
        )


def evaluate(
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
    *,
    num_classes: int,
    device: torch.device,
    loss: Literal["softmax", "sigmoid"] = "softmax",
    class_map: Tensor | None = None,
    ranks: Ranks = SOLO,
) -> EvalResult:
    """Count what a model got right.

    Args:
        batches: of `labels` int64 (b,) and the model's logits (b, K) on `device`, every example exactly once; this rank's share
            of them, as `answers` yields it.
        num_classes: K, the model's outputs.
        class_map: (data set's classes,) to the model's, from `map_classes`.
        ranks: those who share the evaluation; each returns the result of all.

    Raises:
        DataError: there are no examples, or a label is not one of the model's classes.
        UserError, Interrupted: what making a batch raised.
    """
    tally = Tally(num_classes=num_classes, device=device)
    for batch, answered in batches:
        tally.add(judge(batch["labels"], answered, num_classes=num_classes, loss=loss, class_map=class_map))
    return tally.result(ranks)


def target_labels(labels: Tensor, *, num_classes: int, class_map: Tensor | None) -> Tensor:
    """Turn the data set's labels (b,) into the model's, and refuse any that has no output."""
    limit = num_classes if class_map is None else len(class_map)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < limit:
        raise DataError(f"evaluation: found labels {int(labels.min())} to {int(labels.max())}, expected 0 to {limit - 1}")
    return labels if class_map is None else class_map.to(labels.device)[labels]


def map_classes(checkpoint_classes: Sequence[str], dataset_classes: Sequence[str], where: str) -> Tensor | None:
    """Return (data set's classes,) int64, the model's number for each of the data set's; None where the lists are equal.

    The data set may order its classes differently and may lack some of the model's.

    Raises:
        DataError: the model lacks a class of the data set's, or a name stands twice; `where` says which data set.
    """
    known, wanted = list(checkpoint_classes), list(dataset_classes)
    if known == wanted:
        return None
    lacking = [name for name in wanted if name not in set(known)]
    if lacking:
        named = ", ".join(map(repr, lacking[:5])) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        if len(lacking) < len(wanted):
            found = f"the checkpoint has no class {named}"
        elif len(known) == len(wanted):
            found = f"the checkpoint also has {len(known)} classes, but other ones: no {named}"
        else:
            found = f"the checkpoint has {len(known)} other classes, none of this data set's {len(wanted)}: no {named}"
        raise DataError(f"{where}: {found}; evaluate on the data the checkpoint was trained on, or fine-tune it on this first")
    for whose, names in (("the checkpoint's", known), (f"{where}'s", wanted)):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"{where}: {twice!r} stands twice among {whose} classes, so the two lists cannot be matched by name"
            )
    place = {name: number for number, name in enumerate(known)}
    return torch.tensor([place[name] for name in wanted], dtype=torch.int64)
