"""What does `vit predict` cost for an image beyond the model itself?

    python scripts/bench_predict.py --images 2000 --side 64 --json bench_predict.json

Makes small JPEG files and a small model with random weights, then measures, after a first round that counts for nothing: the
whole way from file names to lines of JSON, and batches of the same size, ready in memory, through the model alone: median of
several rounds, ms per image. The difference is the cost of names, reading, decoding, resizing and writing; `cpu` counts the
time of all cores, which other programs on the machine change less. Loading weights and Python's start are left out;
`--side 224` shows what larger files cost.
"""

import argparse
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitcli.cli_predict import writer
from vitcli.config import Config
from vitcli.data.transforms import normalise
from vitcli.forward import answers
from vitcli.lanes import choose_lanes
from vitcli.models import build_model
from vitcli.models.flops import forward_flops
from vitcli.opened import OpenedModel
from vitcli.predict import find_images, predict_images
from vitcli.pretrained import Pretrained


def make_images(folder: Path, *, count: int, side: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        place = folder / f"{number % 10}"
        place.mkdir(exist_ok=True)
        picture.save(place / f"{number:06d}.jpg", quality=90)


def make_model(*, image_size: int, classes: int) -> OpenedModel:
    """Return a small ViT with random weights, on the CPU."""
    settings = {"patch_size": image_size // 8, "width": 96, "depth": 4, "num_heads": 3, "mlp_dim": 384}
    config = Config.model_validate(
        {"model": settings, "data": {"source": "images", "image_size": image_size}, "train": {"precision": "float32"}}
    )
    model = build_model(config.model, image_size=(image_size, image_size), num_classes=classes).eval()
    names = [f"class {number}" for number in range(classes)]
    pretrained = Pretrained({}, {}, names, {}, Path("random"), 0, False, {"source": None})
    flops = forward_flops(config.model, image_size=(image_size, image_size), num_classes=classes)
    return OpenedModel(Path("random"), model, pretrained, config, torch.device("cpu"), flops)


def timed(work: Callable[[], None], *, images: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return milliseconds per image of each round, by the clock and of all cores' time, the first round left out."""
    clock, cores = [], []
    for _ in range(rounds + 1):
        began, began_cores = time.perf_counter(), time.process_time()
        work()
        clock.append(1000 * (time.perf_counter() - began) / images)
        cores.append(1000 * (time.process_time() - began_cores) / images)
    return clock[1:], cores[1:]


def measure(*, images: int, side: int, image_size: int, batch_size: int, rounds: int, folder: Path) -> dict[str, Any]:
    make_images(folder, count=images, side=side)
    opened = make_model(image_size=image_size, classes=1000)
    names = opened.pretrained.classes
    batch = {
        "images": torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8),
        "labels": torch.zeros(batch_size, dtype=torch.int64),
    }

    def whole() -> None:
        write = writer(io.StringIO(), names, names, top=5, kind="json")
        with closing(
            predict_images(opened, find_images([str(folder)], stdin=io.BytesIO()), top=5, batch_size=batch_size)
        ) as found:
            for prediction in found:
                write(prediction)

    def alone() -> None:
        batches: list[Mapping[str, Tensor]] = [batch] * (images // batch_size)
        mean, std = opened.config.data.mean, opened.config.data.std
        lanes = choose_lanes(flops=opened.flops_per_image * batch_size, images=batch_size)
        with closing(
            answers(
                opened.model,
                batches,
                preprocess=lambda pixels: normalise(pixels, mean=mean, std=std),
                device=opened.device,
                lanes=lanes,
            )
        ) as answered:
            for _, logits in answered:
                logits.sum().item()

    end_to_end, end_to_end_cores = timed(whole, images=images, rounds=rounds)
    model, model_cores = timed(alone, images=images // batch_size * batch_size, rounds=rounds)
    return {
        "images": images,
        "side_px": side,
        "image_size_px": image_size,
        "batch_size": batch_size,
        "rounds": rounds,
        "end_to_end_ms": median(end_to_end),
        "model_ms": median(model),
        "beyond_model_ms": median(end_to_end) - median(model),
        "beyond_model_cpu_ms": median(end_to_end_cores) - median(model_cores),
        "slowest_round_beyond_ms": max(end_to_end) - median(model),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1920)
    parser.add_argument("--side", type=int, default=64, help="of the files, px")
    parser.add_argument("--image-size", type=int, default=64, help="that the model is shown, px")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            images=words.images,
            side=words.side,
            image_size=words.image_size,
            batch_size=words.batch_size,
            rounds=words.rounds,
            folder=Path(folder),
        )
    for name, value in found.items():
        print(f"{name:<24} {value:.3f}" if isinstance(value, float) else f"{name:<24} {value}")
    if words.json is not None:
        words.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
