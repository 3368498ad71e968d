"""A model's answers to the images of a source, batch by batch: what evaluation, probes and predictions are made of.

The last bits of an answer depend on the batch it was computed in, so batches do not depend on who computes them.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from vitcli.config import Config
from vitcli.data.loader import Batch, eval_batches
from vitcli.data.protocol import Source
from vitcli.data.transforms import EvalTransform, normalise
from vitcli.device import AUTOCAST
from vitcli.distributed import SOLO, Ranks
from vitcli.errors import Interrupted, UserError
from vitcli.lanes import Lanes, choose_lanes

__all__ = ["Forward", "answers", "features", "logits", "source_answers"]

# a model (or its twin in another lane), images (b, 3, H, W) and what `beside` makes of a batch, to answers (b, ...)
Forward = Callable[..., Tensor]
Beside = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]


def logits(model: Any, images: Tensor) -> Tensor:
    """Return the model's logits, (b, K)."""
    answer: Tensor = model(images)
    return answer


def features(model: Any, images: Tensor) -> Tensor:
    """Return what the model's head reads, (b, D)."""
    answer: Tensor = model.features(images)
    return answer


def answers(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    forward: Forward = logits,
    beside: Beside | None = None,
    preprocess: Callable[[Tensor], Tensor],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    should_stop: Callable[[], object] | None = None,
    ranks: Ranks = SOLO,
    lanes: int = 1,
) -> Generator[tuple[Mapping[str, Tensor], Tensor], None, None]:
    """Yield each batch of this rank and `forward`'s answers (b, ...), on `device`, without gradients and in evaluation mode.

    The model's training modes are as before when the iterator is closed; close it.

    Args:
        model: on `device`.
        batches: of `images` uint8 (b, 3, H, W) and more; this rank's share of them.
        beside: what else the model is given with a batch's images, such as masks: tensors (b, ...).
        preprocess: uint8 images on `device` to what the model takes.
        dtype: of the forward pass; bfloat16 runs under autocast.
        should_stop: called before each batch; raises to end the iteration (`Interrupted`).
        ranks: those who share the work.
        lanes: parts of a batch that go through the model side by side, a thread each (CPU).

    Raises:
        UserError, Interrupted: what reading a batch or `should_stop` raised, on every rank whoever met it.
    """

    def answer(net: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return forward(net, *inputs)

    modes = [(module, module.training) for module in model.modules()]
    side_by_side = Lanes(model, count=lanes)
    model.eval()
    try:
        for batch in in_step(batches, ranks=ranks, should_stop=should_stop):
            # not inference_mode: a tensor the model caches there could not take part in training later
            with torch.no_grad():
                others = () if beside is None else beside(batch)
                inputs = (preprocess(batch["images"].to(device, non_blocking=True)), *(each.to(device) for each in others))
                parts = list(zip(*(each.tensor_split(lanes) for each in inputs))) if len(inputs[0]) >= lanes else [inputs]
                found = torch.cat(side_by_side.run(answer, parts))
            if len(batch["labels"]):
                yield batch, found
    finally:
        side_by_side.close()
        for module, training in modes:
            module.training = training


def source_answers(
    model: nn.Module,
    source: Source,
    config: Config,
    *,
    forward: Forward = logits,
    beside: Beside | None = None,
    device: torch.device,
    batch_size: int,
    warn: Callable[[str], object],
    check: Callable[[], None] | None = None,
    flops_per_image: int,
    ranks: Ranks = SOLO,
) -> Generator[tuple[Batch, Tensor], None, None]:
    """Yield batches (`images`, `labels`, `indices` of the source) of this rank and the answers to them; close it.

    Every image once, in order, with the config's preprocessing and precision.
    """
    alone = device.type == "cpu" and ranks.ranks == 1 and not config.train.compile
    data = config.data
    batches = eval_batches(
        source,
        EvalTransform(image_size=data.image_size, crop_fraction=data.eval_crop_fraction),
        batch_size=batch_size,
        workers=data.workers or 0,
        pin_memory=device.type == "cuda",
        on_error=data.on_error,
        skip_limit=data.skip_limit,
        warn=warn,
        rank=ranks.rank,
        ranks=ranks.ranks,
    )
    with closing(batches):
        made = answers(
            model,
            batches,
            forward=forward,
            beside=beside,
            preprocess=lambda images: normalise(images, mean=data.mean, std=data.std),
            device=device,
            dtype=AUTOCAST.get(config.train.precision, torch.float32),
            should_stop=check,
            ranks=ranks,
            lanes=choose_lanes(flops=flops_per_image * batch_size, images=batch_size) if alone else 1,
        )
        with closing(made):
            for batch, found in made:
                yield dict(batch), found


def in_step(
    batches: Iterable[Mapping[str, Tensor]], *, ranks: Ranks, should_stop: Callable[[], object] | None
) -> Iterator[Mapping[str, Tensor]]:
    """Yield this rank's batches while any rank has one; whoever has none left gets one image without a label.

    So every rank runs the model equally often, which one that is held in parts needs, and an end comes to all at once.
    """
    remaining = iter(batches)
    while True:
        batch, problem = None, None
        try:
            if should_stop is not None:
                should_stop()
            batch = next(remaining, None)
        except (UserError, Interrupted) as error:
            problem = error
        ranks.agree(problem)
        if ranks.any(batch is None):
            shapes = [shape for shape in ranks.gather(None if batch is None else tuple(batch["images"].shape)) if shape]
            if not shapes:
                return
            if batch is None:
                images = torch.zeros(1, *shapes[0][1:], dtype=torch.uint8)
                batch = {"images": images, "labels": torch.zeros(0, dtype=torch.int64), "indices": torch.zeros(1).long()}
        assert batch is not None
        yield batch
