"""Portions of a batch side by side on a CPU: threads with a core each, instead of cores that share every operation.

A small model's operations are too short to be cut in pieces: cores wait for one another at the end of each. Here every lane
takes whole portions through a model of its own that shares its weights' memory, and the gradients are added up at the end, in
the lanes' order. So a result depends on the number of lanes, by rounding, but never on which thread was faster.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["Lanes", "choose_lanes", "twin"]

WORTH_FLOPS = 1e9  # of a lane's portion; with less, the interpreter holds the lanes up

Portion = TypeVar("Portion")
Result = TypeVar("Result")


def choose_lanes(*, flops: float, images: int) -> int:
    """Return how many lanes suit work on this CPU: one for each of torch's threads, or 1 where their portions are too small.

    Args:
        flops: of all the images.
        images: to be shared among the lanes.
    """
    threads = torch.get_num_threads()
    return threads if images >= threads and flops / threads >= WORTH_FLOPS else 1


def twin(model: nn.Module) -> Any:
    """Return a model with the same weights, in the same memory, and gradients of its own."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


class Lanes:
    """Run work on portions in several threads, the caller's among them.

    Args:
        model: on the CPU, without random layers at work: the lanes would race for torch's generator.
        count: threads; each computes with one core.
    """

    def __init__(self, model: nn.Module, *, count: int) -> None:
        self.count = count
        self.models = [model, *(twin(model) for _ in range(count - 1))]
        self.pool = ThreadPoolExecutor(max(1, count - 1), thread_name_prefix="vit-lane")  # starts threads when it has work

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown()

    def run(self, work: Callable[[Any, Portion], Result], portions: Sequence[Portion]) -> list[Result]:
        """Return work(model, portion) of each portion; gradients that it leaves in its model end up in the first one's.

        Lane i takes portions i, i + count, ... in order. An error is raised when all lanes have ended.
        """
        count, threads, grad = self.count, torch.get_num_threads(), torch.is_grad_enabled()
        if count == 1:
            return [work(self.models[0], portion) for portion in portions]

        def lane(number: int) -> list[Result]:
            torch.set_num_threads(1)  # of this thread
            with torch.set_grad_enabled(grad):
                return [work(self.models[number], portion) for portion in portions[number::count]]

        for other in self.models[1:]:
            other.train(self.models[0].training)
            other.zero_grad(set_to_none=True)  # of a run that failed
        others = [self.pool.submit(lane, number) for number in range(1, count)]
        try:
            done = [lane(0)]
        finally:
            torch.set_num_threads(threads)
            wait(others)
        done += [future.result() for future in others]
        self.gather_gradients()
        return [done[position % count][position // count] for position in range(len(portions))]

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Add the others' gradients to the first model's, and take them away."""
        mine = list(self.models[0].parameters())
        for other in self.models[1:]:
            pairs = [(p, q) for p, q in zip(mine, other.parameters()) if q.grad is not None]
            for p, q in pairs:
                if p.grad is None:  # no portion came the first lane's way
                    p.grad = torch.zeros_like(p)
                q.grad, q_grad = None, q.grad
                p.grad += q_grad
