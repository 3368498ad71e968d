"""Parameter groups, optimisers, the learning rate as a pure function of the step, and averages of the weights.

Adam with decoupled decay or SGD with momentum, as in the paper (2010.11929, Tables 3 and 4); decay on kernels only, as in the
authors' code. Optimisers are torch's fused ones: one pass over memory, and bit-reproducible.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitcli.config import OptimConfig

__all__ = ["build_optimizer", "clip_gradients", "ema_start", "ema_update", "lr_at", "param_groups", "weight_norm"]

# ------------------------------------------------------------------------------------------------------------ optimisers


def param_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters in two: kernels, which decay, and the rest, which do not.

    Kernels are the weights of linear and convolution layers; biases, norms, class token and position embeddings are not
    (big_vision's mask `.*/kernel$`). Groups hold (name, parameter) pairs in the model's order; empty groups are left out.
    """
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [pair for pair in trainable if id(pair[1]) in kernels]
    others = [pair for pair in trainable if id(pair[1]) not in kernels]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(section: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser a section describes over the model's trainable parameters, where they are now.

    The learning rate in its groups is the peak; set `group["lr"] = lr_at(step, ...)` before every step. `adamw` decays by
    lr * weight_decay (torch's convention; big_vision's number divided by its lr). `adam` and `sgd` add the decay to the
    gradient. Its groups carry `param_names`, so a saved state says which parameter each entry belongs to.
    """
    groups = param_groups(model, weight_decay=section.weight_decay)
    betas = (section.beta1, section.beta2)
    if section.name == "adamw":
        return torch.optim.AdamW(groups, lr=section.lr, betas=betas, eps=section.eps, fused=True)
    if section.name == "adam":
        return torch.optim.Adam(groups, lr=section.lr, betas=betas, eps=section.eps, fused=True)
    return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum, fused=True)


# --------------------------------------------------------------------------------------------------------- learning rate


def lr_at(
    step: int,
    *,
    lr: float,
    end_lr: float,
    total_steps: int,
    warmup_steps: int,
    schedule: Literal["linear", "cosine", "rsqrt", "constant"],
) -> float:
    """Return the learning rate of a step; step 0 is the first, total_steps - 1 the last.

    It rises linearly and is `lr` at step == warmup_steps; (step + 1) / (warmup_steps + 1), where the reference has
    step / warmup_steps, so that no step is spent at 0. From there on:

    - linear, cosine: falls and would be `end_lr` at step == total_steps, as in google-research/vision_transformer.
    - rsqrt: lr * sqrt(warmup_steps / step), never below `end_lr` (Scaling ViT, 2106.04560, with the warm-up as timescale).
    - constant: stays `lr`.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return end_lr + (lr - end_lr) * (1.0 - progress)
    if schedule == "cosine":
        return end_lr + (lr - end_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "rsqrt":
        timescale = max(1, warmup_steps)
        return max(end_lr, lr / math.sqrt(1.0 + (step - warmup_steps) / timescale))
    return lr


# ------------------------------------------------------------------------------------------------- norms and averages


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale the gradients so that their global norm is at most `max_norm`; return the norm before, a 0-d tensor.

    None leaves the gradients as they are. Parameters without a gradient are skipped. The number stays on the device.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def weight_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the global 2-norm of the parameters, a 0-d tensor on their device."""
    return torch.nn.utils.get_total_norm(list(parameters))


def ema_start(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the model's tensors to start an average from, by state-dict name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def ema_update(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move the average towards the model in place: ema = decay * ema + (1 - decay) * weight (Polyak; the paper has 0.9999)."""
    state = model.state_dict()
    torch._foreach_lerp_(list(ema.values()), [state[name] for name in ema], 1.0 - decay)
