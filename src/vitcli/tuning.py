"""Precision and micro-batch by a short measurement: this model, this machine, a few seconds, kept for the next run.

What is timed is forward and backward on random images. Candidates take turns, so that a machine that slows down slows down for
all of them, and a choice other than the plan's must win clearly. A run keeps what was chosen in its resolved config: another
measurement may choose otherwise, and sums in another order.
"""

import contextlib
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcli.data.cache import default_cache_dir
from vitcli.device import choose_precision, flops_per_second, hardware
from vitcli.lanes import Lanes
from vitcli.model_config import ModelConfig
from vitcli.models import Model, build_model

__all__ = ["Choice", "choose_settings", "product_width", "worth_measuring"]

FORMAT_VERSION = 1  # goes into the key: raise it when what is measured, or how one is chosen, changes
CLEARLY = 1.1  # times as fast: less may be noise
LONG_RUN_SECONDS = 180.0  # shorter runs are over before a measurement has paid
SMALLEST = {"cpu": 8, "cuda": 32}  # images at once that are tried, in each lane


@dataclass(frozen=True)
class Choice:
    """What was chosen and why; `table` has a row for each candidate measured, for the manifest."""

    precision: str
    micro_batch_size: int
    table: tuple[dict[str, Any], ...] = ()  # precision, micro_batch_size, images_per_second: forward and backward, median
    seconds: float = 0.0  # of measuring
    kept: bool = False  # from an earlier measurement

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def worth_measuring(*, images: int, flops_per_image: int, device: torch.device) -> bool:
    """Tell whether training on so many images will take long enough for a measurement to pay; an estimate from FLOPs alone."""
    return 3 * flops_per_image * images / flops_per_second(device) > LONG_RUN_SECONDS


def product_width(model: ModelConfig) -> int:
    """Return the width of a model's typical matrix product: a Transformer's, or of a unit inside a ResNet's second block."""
    return model.width or 2 * (model.resnet_width or 64)


def choose_settings(
    model: ModelConfig,
    *,
    image_size: tuple[int, int],
    num_classes: int,
    device: torch.device,
    precision: str,
    micro_batch_size: int | None,
    largest: int,
    lanes: int = 1,
    budget_seconds: float = 6.0,
    cache_dir: Path | None = None,
) -> Choice:
    """Settle `auto` precision and a micro-batch of None, by measuring or from an earlier measurement.

    Args:
        model: resolved.
        precision, micro_batch_size: as configured; what is given is not measured.
        largest: micro-batch that memory allows and that the plan would take, at most a step's images on a device.
        lanes: threads that share a micro-batch, as in training.
        budget_seconds: about how long to measure; candidates that would not fit into it are left out.
        cache_dir: default $VIT_CACHE, or ~/.cache/vit.
    """
    if micro_batch_size is not None and precision != "auto":
        return Choice(precision, micro_batch_size)
    key = {
        "version": FORMAT_VERSION,
        "hardware": hardware(device),
        "torch": torch.__version__,
        "model": model.model_dump(mode="json"),
        "image_size": list(image_size),
        "num_classes": num_classes,
        "precision": precision,
        "micro_batch_size": micro_batch_size,
        "largest": largest,
        "lanes": lanes,
    }
    path = (cache_dir or default_cache_dir()) / "tuning" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"
    kept = read_choice(path, key)
    if kept is not None:
        return kept
    started = time.perf_counter()
    smallest = lanes * SMALLEST[device.type]
    sizes = [micro_batch_size] if micro_batch_size is not None else sizes_to_try(largest, smallest=smallest)
    wanted = precisions_to_try(precision, device, width=product_width(model))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        step = build_step(model, image_size=image_size, num_classes=num_classes, device=device, lanes=lanes)
        # precision first, at a middling size, then the size
        middling = sizes[len(sizes) // 2]
        share = budget_seconds / 3 if len(wanted) > 1 else 0.0
        first = measure(step, [(kind, middling) for kind in wanted], share)
        kind = choose(first, default=(wanted[0], middling))[0]
        second = measure(step, [(kind, size) for size in sizes], budget_seconds - share)
    table = tuple(
        {"precision": kind, "micro_batch_size": size, "images_per_second": round(rate, 1)}
        for (kind, size), rate in {**first, **second}.items()
    )
    kind, size = choose(second, default=(kind, sizes[0]))
    made = Choice(kind, size, table, seconds=round(time.perf_counter() - started, 2))
    write_choice(path, key, made)
    return made


def sizes_to_try(largest: int, *, smallest: int) -> list[int]:
    """Return micro-batches to try: the largest, and halves of it that are not below the smallest."""
    sizes = [largest]
    while sizes[-1] // 2 >= smallest and len(sizes) < 4:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def precisions_to_try(wanted: str, device: torch.device, *, width: int) -> list[str]:
    """Return precisions to try, the default first: both on a CPU where bf16 products are not slower, else one."""
    if wanted != "auto" or device.type == "cuda":
        return [choose_precision(wanted, device, width=width)]
    return ["float32", "bf16"] if choose_precision("auto", device, width=width) == "bf16" else ["float32"]


# ---------------------------------------------------------------- measuring

Candidate = tuple[str, int]  # precision, micro-batch
Step = Callable[[str, int], float]  # of a candidate; returns seconds


def build_step(model: ModelConfig, *, image_size: tuple[int, int], num_classes: int, device: torch.device, lanes: int) -> Step:
    """Return a function that runs a model of this kind forward and backward once."""
    net = build_model(model, image_size=image_size, num_classes=num_classes).to(device).train()
    side_by_side = Lanes(net, count=lanes)

    def step(precision: str, size: int) -> float:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        images = torch.randn(size, 3, *image_size, device=device)

        def backward(net: Model, portion: Tensor) -> None:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = net(portion)
            F.cross_entropy(logits.float(), torch.zeros(len(portion), dtype=torch.int64, device=device)).backward()

        wait(device)
        started = time.perf_counter()
        side_by_side.run(backward, images.tensor_split(lanes))
        wait(device)
        seconds = time.perf_counter() - started
        net.zero_grad(set_to_none=True)
        return seconds

    return step


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(step: Step, candidates: Sequence[Candidate], budget_seconds: float) -> dict[Candidate, float]:
    """Return images/s of each candidate that fits into the time, taking turns; 0 where memory did not suffice.

    The first call of each is not counted.
    """
    end = time.perf_counter() + budget_seconds
    rates: dict[Candidate, float] = {}
    times: dict[Candidate, list[float]] = {}
    slowest_image = 0.0  # seconds
    for candidate in sorted(candidates, key=lambda each: each[1]):
        if time.perf_counter() + 3 * slowest_image * candidate[1] > end:
            break
        try:
            slowest_image = max(step(*candidate) / candidate[1], slowest_image)
            times[candidate] = []
        except torch.OutOfMemoryError:
            rates[candidate] = 0.0
    while times and time.perf_counter() < end:
        for candidate, found in times.items():
            found.append(step(*candidate))
    return rates | {candidate: candidate[1] / statistics.median(found) for candidate, found in times.items() if found}


def choose(rates: dict[Candidate, float], *, default: Candidate) -> Candidate:
    """Return the fastest candidate if it is clearly faster than the default; without a measurement of that, the default."""
    best = max(rates, key=lambda candidate: rates[candidate], default=default)
    return best if default in rates and rates[best] >= CLEARLY * rates[default] else default


# ---------------------------------------------------------------- kept for the next run


def read_choice(path: Path, key: dict[str, Any]) -> Choice | None:
    """Return what was chosen for the key before; None where there is nothing, or nothing readable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] != key:
            return None
        choice = Choice(**{**found["choice"], "table": tuple(found["choice"]["table"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = choice.precision in ("float32", "bf16", "fp16") and isinstance(choice.micro_batch_size, int)
    return replace(choice, kept=True) if known and choice.micro_batch_size >= 1 else None


def write_choice(path: Path, key: dict[str, Any], choice: Choice) -> None:
    """Keep a choice; where that cannot be done, the next run measures again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tuning-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"key": key, "choice": choice.as_dict()}, file)
        os.replace(temporary, path)
