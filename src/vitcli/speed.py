"""How fast a model answers: images per second in batches, and how long one image takes. The model alone, nothing is read."""

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitcli.device import AUTOCAST, hardware
from vitcli.errors import UserError
from vitcli.forward import answers
from vitcli.lanes import choose_lanes
from vitcli.opened import OpenedModel

__all__ = ["measure_speed"]

WARM_UP = 3  # batches that are not counted, and at least a third of a second
LEAST, MOST = 5, 1000  # batches that are


def measure_speed(opened: OpenedModel, *, batch_size: int, seconds: float = 3.0) -> dict[str, Any]:
    """Time the model's forward pass, as evaluation runs it, on images of noise that already lie on its device.

    Args:
        seconds: to measure each of the two for, at least five batches.

    Returns:
        JSON values: `images_per_second` of batches (the median), `latency_ms` of one image (median and 90th percentile), and
        under which circumstances.

    Raises:
        UserError: the memory does not suffice for the batch.
    """
    batches = batch_seconds(opened, batch_size=batch_size, seconds=seconds)
    singles = batches if batch_size == 1 else batch_seconds(opened, batch_size=1, seconds=seconds)
    return {
        "images_per_second": batch_size / statistics.median(batches),
        "batch_size": batch_size,
        "batches": len(batches),
        "latency_ms": {
            "median": 1e3 * statistics.median(singles),
            "p90": 1e3 * float(np.quantile(singles, 0.9)),
            "images": len(singles),
        },
        "image_size": list(opened.config.data.image_size),
        "precision": opened.config.train.precision if opened.config.train.precision in AUTOCAST else "float32",
        "gflops_per_image": opened.flops_per_image / 1e9,
        "device": hardware(opened.device),
    }


def batch_seconds(opened: OpenedModel, *, batch_size: int, seconds: float) -> list[float]:
    """Return how long each of several batches took after the warm-up."""
    device, config = opened.device, opened.config
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, *config.data.image_size, generator=generator).to(device)
    labels = torch.zeros(batch_size, dtype=torch.int64)
    lanes = choose_lanes(flops=opened.flops_per_image * batch_size, images=batch_size) if device.type == "cpu" else 1

    def repeated() -> Iterator[dict[str, Tensor]]:
        for _ in itertools.count():
            yield {"images": images, "labels": labels}

    made = answers(
        opened.model,
        repeated(),
        preprocess=lambda batch: batch,
        device=device,
        dtype=AUTOCAST.get(config.train.precision, torch.float32),
        lanes=lanes,
    )
    times: list[float] = []
    began, before = None, time.perf_counter()
    warm_from = before
    try:
        with closing(made):
            for number in itertools.count(1):
                next(made)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                now = time.perf_counter()
                if began is not None:
                    times.append(now - before)
                elif number >= WARM_UP and now - warm_from > 1 / 3:
                    began = now
                before = now
                if began is not None and len(times) >= LEAST and (now - began > seconds or len(times) >= MOST):
                    return times
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--speed: {batch_size} images do not fit into {hardware(device)}'s memory; take a smaller --batch-size"
        ) from error
    raise AssertionError("without an end")
