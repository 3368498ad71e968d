"""How many images of the embedded corpus are made per second?

    python scripts/bench_corpus.py --image-size 32 --workers 1 2

Prints a table, or one JSON line per row with --json. A worker is a process with one thread, as in the data loader. On a busy
machine, "per processor-second" tells what one core would do if it had nothing else to do.
"""

import argparse
import json
import multiprocessing
import platform
import time

import numpy as np
import torch

from vitcli.data.shapes import ShapesSource


def make(task: tuple[int, int, int, int, int]) -> tuple[float, float]:
    """Make images as one worker would; return the seconds it took, and the processor's seconds."""
    worker, side, classes, images, batch_size = task
    torch.set_num_threads(1)
    corpus = ShapesSource(classes=classes, examples=1_000_000, image_size=(side, side), seed=0, split="train")
    first = worker * images
    corpus.batch(np.arange(batch_size))  # warm-up
    began, busy = time.perf_counter(), time.process_time()
    for start in range(first, first + images, batch_size):
        corpus.batch(np.arange(start, start + batch_size))
    return time.perf_counter() - began, time.process_time() - busy


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--image-size", type=int, nargs="+", default=[32], help="px")
    cli.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    cli.add_argument("--classes", type=int, default=100)
    cli.add_argument("--images", type=int, default=8192, help="per worker at 32 px; fewer at larger sizes")
    cli.add_argument("--batch-size", type=int, default=128)
    cli.add_argument("--repeats", type=int, default=3, help="the best is reported: others' load only slows")
    cli.add_argument("--json", action="store_true")
    args = cli.parse_args()
    if not args.json:
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, numpy {np.__version__}")
    for side in args.image_size:
        batches = max(1, args.images * 32 * 32 // (side * side) // args.batch_size)
        for workers in args.workers:
            tasks = [(w, side, args.classes, batches * args.batch_size, args.batch_size) for w in range(workers)]
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                repeats = [pool.map(make, tasks, chunksize=1) for _ in range(args.repeats)]
            images = batches * args.batch_size
            rate = max(round(workers * images / max(wall for wall, _ in repeat)) for repeat in repeats)
            core = max(round(workers * images / sum(busy for _, busy in repeat)) for repeat in repeats)
            if args.json:
                row = {"image_size": side, "workers": workers, "images_per_second": rate, "images_per_processor_second": core}
                print(json.dumps(row))
            else:
                print(f"{side:4d} px, {workers} workers: {rate:6,d} images/s, {core:6,d} per processor-second")


if __name__ == "__main__":
    main()
