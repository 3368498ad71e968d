"""Images per second of a training step and of a forward pass.

Each number is the median of a few repeats on this machine, for `configs/jft-like.yaml` or the config given.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from vitcli.config_file import load_config
from vitcli.device import choose_device, choose_precision, hardware, keep_freed_memory
from vitcli.model_config import resolve_model
from vitcli.models import build_model
from vitcli.optim import build_optimizer
from vitcli.tuning import product_width


def images_per_second(work: Callable[[], object], *, images: int, repeats: int) -> str:
    """Time `work`, which handles `images` images, after one untimed call; return median and range."""
    work()
    speeds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        speeds.append(images / (time.perf_counter() - start))
    return f"{statistics.median(speeds):>10,.0f} img/s   ({min(speeds):,.0f} to {max(speeds):,.0f}, {repeats} repeats)"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=Path("configs/jft-like.yaml"))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    repeats: int = arguments.repeats

    keep_freed_memory()
    config = load_config(arguments.config)
    device = choose_device(config.train.device)
    model_section = resolve_model(config.model)
    precision = choose_precision(config.train.precision, device, width=product_width(model_section))
    height, width = config.data.image_size
    batch_size = config.train.micro_batch_size or min(128, config.train.batch_size)
    print(f"{hardware(device)}; {arguments.config}: {height} x {width} px, batches of {batch_size}, {precision}")

    torch.manual_seed(0)
    classes = config.data.shapes.classes
    model = build_model(model_section, image_size=config.data.image_size, num_classes=classes).to(device)
    optimizer = build_optimizer(config.optim, model)
    images = torch.randn(batch_size, 3, height, width, device=device)
    labels = torch.randint(classes, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    print(f"  training step       {images_per_second(step, images=batch_size, repeats=repeats)}")

    def predict() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()

    print(f"  forward pass        {images_per_second(predict, images=batch_size, repeats=repeats)}")


if __name__ == "__main__":
    main()
