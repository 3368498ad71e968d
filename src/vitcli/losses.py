"""What training makes smaller: losses against labels, and against a teacher's answers (DeiT, 2012.12877, Eq. 2 and 3)."""

import torch.nn.functional as F
from torch import Tensor

from vitcli.config import DistillationConfig

__all__ = ["classification_loss", "distillation_loss", "soft_targets"]


def soft_targets(labels: Tensor, *, num_classes: int, label_smoothing: float) -> Tensor:
    """Turn labels (B,) into target distributions (B, K), with a share spread over all classes."""
    targets = F.one_hot(labels, num_classes).float()
    return targets * (1.0 - label_smoothing) + label_smoothing / num_classes if label_smoothing else targets


def classification_loss(logits: Tensor, targets: Tensor, *, kind: str, class_weights: Tensor | None = None) -> Tensor:
    """Return the batch's mean loss for logits and targets (B, K): cross-entropy, or the sum of K binary ones (big_vision).

    With class weights (K,), an image counts as much as its target's classes do, in their shares; the mean stays one over B.
    """
    if kind == "softmax" and class_weights is None:
        return F.cross_entropy(logits, targets)
    return weighted_mean(losses_of(logits, targets, kind=kind), targets, class_weights)


def distillation_loss(
    logits: Tensor,
    targets: Tensor,
    answers: Tensor,
    *,
    section: DistillationConfig,
    kind: str,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the batch's mean of (1 - alpha) x the loss against labels + alpha x the loss against a teacher's answers.

    Hard (Eq. 3): the second is the same loss against the class that the teacher chooses, which is not smoothed. Soft (Eq. 2):
    tau^2 KL(teacher || student) of the softmaxes at temperature tau, summed over classes; DeiT's code divides by K as well.

    Args:
        logits: (B, K); or (B, 2, K) of the class token, which learns from labels, and of the distillation token, which learns
            from the teacher.
        targets: (B, K) distributions.
        answers: (B, K) the teacher's logits.
        section: resolved, with a teacher.
        kind: softmax or sigmoid, as for `classification_loss`; likewise class weights, by the labels in both terms.
    """
    assert section.alpha is not None
    of_class, of_teacher = logits.unbind(1) if logits.ndim == 3 else (logits, logits)
    if section.kind == "hard":
        chosen = F.one_hot(answers.argmax(1), answers.shape[1]).to(targets.dtype)
        taught = losses_of(of_teacher, chosen, kind=kind)  # (B,)
    else:
        assert section.tau is not None
        ours, theirs = (F.log_softmax(each / section.tau, dim=1) for each in (of_teacher, answers))
        taught = section.tau**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)  # (B,)
    labelled = losses_of(of_class, targets, kind=kind)
    return weighted_mean((1.0 - section.alpha) * labelled + section.alpha * taught, targets, class_weights)


def losses_of(logits: Tensor, targets: Tensor, *, kind: str) -> Tensor:
    """Return the loss of each image, (B,)."""
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    return F.cross_entropy(logits, targets, reduction="none")


def weighted_mean(losses: Tensor, targets: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return the mean of losses (B,), each times the weight (K,) of its target's classes, in their shares."""
    return losses.mean() if class_weights is None else (losses * (targets @ class_weights)).mean()
