"""Parameter groups, optimisers, the learning rate as a pure function of the step, and averages of the weights.

Adam with decoupled decay or SGD with momentum, as in the paper (2010.11929, Tables 3 and 4), and Muon; decay on kernels only,
as in the authors' code. The element-wise ones are torch's fused ones: one pass over memory, and bit-reproducible.
"""

import inspect
import math
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitcli.config import OptimConfig, TrainConfig
from vitcli.model_config import HEADS

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Muon",
    "averages",
    "build_optimizer",
    "clip_gradients",
    "decay_at",
    "ema_start",
    "ema_update",
    "layer_numbers",
    "lr_at",
    "param_groups",
    "trained_names",
    "weight_norm",
]

EMBEDDINGS = ("patch_embed.", "cls_token", "dist_token", "reg_token", "pos_embed", "stem.")  # a ResNet's root is its stem
BLOCK = re.compile(r"(?:stages\.(\d+)\.)?blocks\.(\d+)\.")  # of a Transformer, or a residual unit of a ResNet

# ------------------------------------------------------------------------------------------------- what learns, how fast


def trained_names(names: Iterable[str], *, head_alone: bool, frozen: Sequence[str]) -> list[str]:
    """Return which of a model's parameters learn: those of its heads, or all, without those that match a pattern.

    Patterns are a shell's, for whole names: `blocks.[0-3].*`, `patch_embed.*`, `*norm*`.
    """
    learning = (name for name in names if name.partition(".")[0] in HEADS or not head_alone)
    return [name for name in learning if not any(fnmatchcase(name, pattern) for pattern in frozen)]


def layer_numbers(names: Iterable[str]) -> dict[str, int]:
    """Return which layer each of a model's parameters belongs to, from the input on.

    Embeddings are 0 (a hybrid's ResNet too, as it makes the patches), then come the blocks, the last one together with the norm
    after it, and what else there is, the head, is the last; timm's `group_matcher`.
    """
    places: dict[str, tuple[int, ...]] = {}
    for name in names:
        block = BLOCK.match(name)
        if name.startswith(EMBEDDINGS):
            places[name] = (0,)
        elif block is not None:
            places[name] = (1, int(block[1] or 0), int(block[2]))
        else:
            places[name] = (2,)
    numbers = {place: number for number, place in enumerate(sorted(set(places.values())))}
    head = numbers.get((2,), len(numbers))
    return {name: head - 1 if name.startswith("norm.") else numbers[place] for name, place in places.items()}


def param_groups(model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Split the trainable parameters in two: kernels, which decay, and the rest, which do not; and with layer decay by layer.

    Kernels are the weights of linear and convolution layers, here whatever is called `weight` and has more than one axis;
    biases, norms, class token and position embeddings are not (big_vision's mask `.*/kernel$`). Groups hold (name, parameter)
    pairs in the model's order; empty groups are left out. With a `layer_decay` below 1 each group has an `lr_scale`, by which
    to multiply the learning rate: 1 for the head, and that much less for every layer below (BEiT, 2106.08254).
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    kernels = {id(parameter) for name, parameter in trainable if name.endswith("weight") and parameter.ndim > 1}
    decayed = [pair for pair in trainable if id(pair[1]) in kernels]
    others = [pair for pair in trainable if id(pair[1]) not in kernels]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    if layer_decay != 1.0:
        layers = layer_numbers(name for name, _ in model.named_parameters())  # frozen ones count
        last = max(layers.values())
        groups = [
            {**group, "params": pairs, "lr_scale": layer_decay ** (last - layer)}
            for group in groups
            for layer in range(last + 1)
            if (pairs := [pair for pair in group["params"] if layers[pair[0]] == layer])
        ]
    return [group for group in groups if group["params"]]


# ------------------------------------------------------------------------------------------------------------ optimisers


def build_optimizer(section: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser a section describes over the model's trainable parameters, where they are now.

    The learning rate in its groups is the peak; set `group["lr"] = lr_at(step, ...)`, times the group's `lr_scale` where it has
    one, before every step. `adamw` decays by lr * weight_decay (torch's convention; big_vision's number divided by its lr), and
    so does `muon`. `adam` and `sgd` add the decay to the gradient. Its groups carry `param_names`, so a saved state says which
    parameter each entry belongs to.
    """
    groups = param_groups(model, weight_decay=section.weight_decay, layer_decay=section.layer_decay)
    betas = (section.beta1, section.beta2)
    if section.name == "muon":
        groups = split_matrices(groups)
        return Muon(groups, lr=section.lr, momentum=section.momentum, betas=betas, eps=section.eps)
    if section.name == "adamw":
        return AdamW(groups, lr=section.lr, betas=betas, eps=section.eps, fused=True)
    if section.name == "adam":
        return Adam(groups, lr=section.lr, betas=betas, eps=section.eps, fused=True)
    split = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())  # by FSDP; torch has no fused SGD for it
    return SGD(groups, lr=section.lr, momentum=section.momentum, fused=not split)


def split_matrices(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split the matrices inside the blocks from each group and mark them `orthogonal`: how many matrices lie in one tensor.

    That is 3 for `qkv`, three dense layers in the original, and 1 for the others. A convolution's kernel counts as a matrix of
    as many rows as it has output channels (K. Jordan, 2024). The first and the last layer are not hidden ones: Muon leaves
    them to Adam.
    """
    split = []
    for group in groups:
        parts: dict[int, list[tuple[str, Tensor]]] = {0: [], 1: [], 3: []}
        for name, parameter in group["params"]:
            hidden = BLOCK.search(name) is not None and name.endswith(".weight") and parameter.ndim in (2, 4)
            parts[(3 if name.endswith("qkv.weight") else 1) if hidden else 0].append((name, parameter))
        split += [{**group, "params": pairs, "orthogonal": count} for count, pairs in parts.items() if pairs]
    return split


class Uncompiled(torch.optim.Optimizer):
    """A first base before one of torch's optimisers: the same, without importing torch's compiler, which takes seconds.

    torch wraps these methods so that its compiler leaves them alone. Here it is given models, never optimisers.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Do as torch's."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do as torch's."""
        inspect.unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Do as torch's."""
        state: dict[str, Any] = inspect.unwrap(torch.optim.Optimizer.state_dict)(self)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do as torch's."""
        inspect.unwrap(torch.optim.Optimizer.load_state_dict)(self, state_dict)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: the loop computes the gradients
        """Do as torch's."""
        inspect.unwrap(super().step.__func__)(self, closure)  # type: ignore[attr-defined]  # a bound method has one


class AdamW(Uncompiled, torch.optim.AdamW):
    """Adam with decoupled weight decay."""


class Adam(Uncompiled, torch.optim.Adam):
    """Adam; weight decay is added to the gradient."""


class SGD(Uncompiled, torch.optim.SGD):
    """Gradient descent with momentum; weight decay is added to the gradient."""


class Muon(AdamW):
    """Momentum made orthogonal for the matrices and kernels of hidden layers (K. Jordan, 2024), AdamW for everything else.

    A matrix moves along the orthogonal factor of its momentum: every direction by the same amount, however small its gradient.
    Its step is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW step (Moonlight, 2502.16982,
    section 2.2), so both kinds share one learning rate and one decoupled weight decay.

    `torch.optim.Muon` is the same rule for matrices alone, computed in bfloat16 on every device; here the precision is the
    weights', which is many times faster on a CPU, and matrices of one shape are computed together.

    Args:
        params: groups of parameters with `orthogonal`: 0 for AdamW, else how many (rows, columns) matrices each tensor stacks.
        lr: step size; an entry of an orthogonal step has a root mean square of about 0.2 lr.
        momentum: of the matrices, with Nesterov's look-ahead.
        betas, eps: AdamW's.
    """

    def __init__(
        self, params: list[dict[str, Any]], *, lr: float, momentum: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        for group in self.param_groups:
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: the loop computes the gradients
        """Apply one update from the gradients; those of the matrices are used up."""
        for group in self.param_groups:
            if group["orthogonal"]:
                self.step_matrices(group)
        super().step(closure)  # passes over parameters without a gradient

    def step_matrices(self, group: dict[str, Any]) -> None:
        """Move the matrices of a group, and take their gradients away."""
        same_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # Adam's loader looks for one
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1.0 - group["momentum"])
            ahead = parameter.grad.lerp_(momentum, group["momentum"])  # Nesterov
            parameter.grad = None
            same_shape.setdefault(parameter.shape, []).append((parameter, ahead))
        for shape, pairs in same_shape.items():
            rows, columns = shape[0] // group["orthogonal"], math.prod(shape[1:])
            matrices = torch.stack([whole(ahead) for _, ahead in pairs]).reshape(-1, rows, columns)
            directions = orthogonal_factor(matrices).reshape(len(pairs), *shape)
            parameters = [parameter for parameter, _ in pairs]
            torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
            scale = 0.2 * math.sqrt(max(rows, columns))
            moves = [part_like(direction, parameter) for direction, parameter in zip(directions.unbind(), parameters)]
            torch._foreach_add_(parameters, moves, alpha=-group["lr"] * scale)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which this process may hold a part (FSDP's DTensor); all processes must call it then."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor, which every process has, that `like` is in this one."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor  # takes a second to import

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def orthogonal_factor(matrices: Tensor) -> Tensor:
    """Return, nearly, U V^T for matrices U S V^T, (n, rows, columns): five Newton-Schulz steps after scaling to norm 1.

    The coefficients (K. Jordan, 2024) trade the limit for speed: singular values end between 0.7 and 1.2, not at 1; ones below
    about 1e-3 of the norm end lower.
    """
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


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
    norm = whole(torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def weight_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the global 2-norm of the parameters, a 0-d tensor on their device."""
    return whole(torch.nn.utils.get_total_norm(list(parameters)))


def averages(train: TrainConfig) -> bool:
    """Tell whether a run averages its weights."""
    return train.ema_decay is not None or train.ema_share is not None


def decay_at(train: TrainConfig, step: int) -> float | None:
    """Return the average's decay in step 0, 1, ...; None where a run keeps none.

    With `ema_share` it is (1 - 1/t)^(1/share) in the t-th step, so that weights count by a power of when they were there, and
    at any moment about the last `share` of the run dominates: a power-function average (2312.02696, section 3.1).
    """
    if train.ema_share is None:
        return train.ema_decay
    return (1.0 - 1.0 / (step + 1)) ** (1.0 / train.ema_share)


def ema_start(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the model's tensors to start an average from, by state-dict name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def ema_update(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move the average towards the model in place: ema = decay * ema + (1 - decay) * weight (Polyak; the paper has 0.9999)."""
    state = model.state_dict()
    torch._foreach_lerp_(list(ema.values()), [state[name] for name in ema], 1.0 - decay)
