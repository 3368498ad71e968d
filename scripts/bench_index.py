"""What does a set of 14 million images in shards cost before the first image is read, and in memory?

    python scripts/bench_index.py --examples 1400000 14000000 --workers 4 --json bench_index.json

Makes shards of the right names and sizes that hold no data (sparse files) and, by the writer that real sets use, their index.
Then, in fresh processes: seconds to open the source, to make its order, and to land on the batch at a random position of the
run; and memory (smaps_rollup) of the main process and of forked ones that look up random entries, as loader processes do.
Columns: the index on disk; seconds to open, and to land (median and longest of 20 positions); memory that is nobody's file:
of Python with its modules, what source and order add, and what a worker adds; then, of all processes, mapped file pages (common
to all, and the system may take them back at any time) and the whole. Only mapped pages may grow with the number of images.
"""

import argparse
import json
import multiprocessing
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.config import DataConfig
from vitcli.data.sampler import Order, build_order
from vitcli.data.shard_build import Plan, stat_shards
from vitcli.data.shard_index import IndexWriter
from vitcli.data.shard_scan import DEFAULT_LABEL_KEY, Part
from vitcli.data.shards import ShardSource, open_shards
from vitcli.randomness import permute, uniform

ORDERS = {"full": None, "window": 65_536}  # data.shuffle_window
LANDINGS = 20  # random positions to resume at
BATCH = 1024
EPOCHS = 90
MIB = 2**20


def make(folder: Path, cache: Path, *, examples: int, shard_size: int, classes: int) -> float:
    """Write shards without data and their index; return the seconds the index took."""
    lengths = [min(shard_size, examples - start) for start in range(0, examples, shard_size)]
    names = [f"train-{shard:06d}.tar" for shard in range(len(lengths))]
    folder.mkdir(parents=True)
    for name in [*names, "validation-000000.tar"]:
        with open(folder / name, "wb") as file:
            file.truncate(shard_size * 200_000)
    splits = {"train": {"filenames": names, "shard_lengths": lengths}, "validation": {"filenames": ["validation-000000.tar"]}}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    (folder / "classnames.txt").write_text("\n".join(f"class {label}" for label in range(classes)))
    urls = [str(folder / name) for name in names]
    listed = [f"class {label}" for label in range(classes)]
    plan = Plan(cache / "shards", urls, urls, stat_shards(urls), DEFAULT_LABEL_KEY, listed)
    began = time.perf_counter()
    counts = np.zeros(classes, np.int64)
    with IndexWriter(plan.folder, examples=examples) as writer:
        start = 0
        for length in lengths:
            positions = np.arange(start, start + length)
            sizes = (20_000 + 160_000 * uniform(0, positions, 1)[:, 0]).astype(np.int32)
            offsets = 512 + np.concatenate([[0], np.cumsum(-(-sizes[:-1].astype(np.int64) // 512) * 512 + 1536)])
            labels = permute(positions, examples, seed=1) % classes
            counts += np.bincount(labels, minlength=classes)
            writer.append(Part(offsets, sizes, np.ones(length, np.uint16), labels, []))
            start += length
        writer.finish(names=plan.names, stats=plan.stats, counts=counts, classes=listed, listed=listed)
    return time.perf_counter() - began


def memory() -> dict[str, float]:
    """Return this process's memory in MiB."""
    kib: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, value = line.split(":")
        kib[key] = int(value.split()[0])
    return {
        "rss_mib": kib["Rss"] / 1024,
        "pss_mib": kib["Pss"] / 1024,
        "anonymous_mib": (kib["Anonymous"] + kib.get("Swap", 0)) / 1024,
        "private_mib": kib["Private_Dirty"] / 1024,
        "mapped_pss_mib": kib.get("Pss_File", 0) / 1024,
    }


def look_up(source: ShardSource, order: Order, *, batches: int, seed: int) -> None:
    """Do what a loader process does before it reads: random batches, each image's shard, offset, size and label."""
    index = source.index
    last = EPOCHS * len(source) - BATCH
    for start in (uniform(seed, np.arange(batches), 1)[:, 0] * last).astype(np.int64).tolist():
        _, indices = order.at(np.arange(start, start + BATCH))
        for position in indices.tolist():
            index.shard_of(position)
            int(index.offsets[position]), int(index.sizes[position]), int(source.labels[position])


def work(source: ShardSource, order: Order, batches: int, seed: int, done: Barrier, answer: Connection) -> None:
    look_up(source, order, batches=batches, seed=seed)
    done.wait()  # all are alive while each is measured, so that shared pages count as shared
    answer.send(memory())
    done.wait()


def measure(folder: Path, cache: Path, window: int | None, workers: int, batches: int, answer: Connection) -> None:
    """Measure one order in this process, which must be a fresh one."""
    before = memory()
    data = DataConfig.model_validate(
        {"source": f"shards:{folder}", "image_size": 224, "memory_cache_gib": 0, "shuffle_window": window}
    )
    times: list[float] = [time.perf_counter()]
    source = open_shards(str(folder), split="train", data=data, cache_dir=cache)
    times.append(time.perf_counter())
    order = build_order(source, data, seed=0)
    times.append(time.perf_counter())
    opened = memory()
    landings = []
    for start in (uniform(7, np.arange(LANDINGS), 1)[:, 0] * (EPOCHS * len(source) - BATCH)).astype(np.int64).tolist():
        began = time.perf_counter()
        _, indices = order.at(np.arange(start, start + BATCH))
        [(source.index.shard_of(i), int(source.index.offsets[i]), int(source.labels[i])) for i in indices.tolist()]
        landings.append(time.perf_counter() - began)
    done = multiprocessing.get_context("fork").Barrier(workers + 1)
    lines, processes = [], []
    for worker in range(workers):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=work, args=(source, order, batches, worker, done, theirs))
        process.start()
        lines.append(ours)
        processes.append(process)
    done.wait()
    mine = memory()
    theirs_mib = [line.recv() for line in lines]
    done.wait()
    for process in processes:
        process.join()
    answer.send(
        {
            "open_seconds": times[1] - times[0],
            "order_seconds": times[2] - times[1],
            "land_seconds_first": landings[0],
            "land_seconds_median": float(np.median(landings)),
            "land_seconds_max": max(landings),
            "lookups_per_worker": batches * BATCH,
            "before": before,
            "opened": opened,
            "main": mine,
            "workers": theirs_mib,
            "total_pss_mib": mine["pss_mib"] + sum(one["pss_mib"] for one in theirs_mib),
        }
    )


def in_fresh_process(function: Any, *arguments: Any) -> dict[str, Any]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=function, args=(*arguments, theirs))
    process.start()
    theirs.close()
    result: dict[str, Any] = ours.recv()
    process.join()
    return result


def table(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("images", "order", "index", "open", "land", "longest", "python", "source", "worker", "all: mapped", "all: pss")
    print("".join(f"{column:>14}" for column in columns))
    for row in rows:
        workers = row["workers"]
        cells = (
            f"{row['examples']:,}",
            row["order"],
            f"{row['index_mib']:,.0f} MiB",
            f"{row['open_seconds'] + row['order_seconds']:.2f} s",
            f"{1000 * row['land_seconds_median']:.1f} ms",
            f"{1000 * row['land_seconds_max']:.1f} ms",
            f"{row['before']['anonymous_mib']:.0f} MiB",
            f"{row['opened']['anonymous_mib'] - row['before']['anonymous_mib']:.0f} MiB",
            f"{max(one['private_mib'] for one in workers):.0f} MiB",
            f"{sum(one['mapped_pss_mib'] for one in [row['main'], *workers]):.0f} MiB",
            f"{row['total_pss_mib']:.0f} MiB",
        )
        print("".join(f"{cell:>14}" for cell in cells))


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--examples", type=int, nargs="+", default=[1_400_000, 14_000_000])
    cli.add_argument("--shard-size", type=int, default=1000, help="images per shard")
    cli.add_argument("--classes", type=int, default=21_841, help="as ImageNet-21k")
    cli.add_argument("--workers", type=int, default=4)
    cli.add_argument("--batches", type=int, default=200, help="of 1,024 random look-ups, per worker")
    cli.add_argument("--json", type=Path, help="write the numbers here, too")
    args = cli.parse_args()
    rows = []
    place = Path(tempfile.mkdtemp(prefix="vit-bench-index-"))
    try:
        for examples in args.examples:
            folder, cache = place / str(examples), place / f"cache-{examples}"
            seconds = make(folder, cache, examples=examples, shard_size=args.shard_size, classes=args.classes)
            size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / MIB
            for order, window in ORDERS.items():
                row = {"examples": examples, "shards": -(-examples // args.shard_size), "order": order}
                row |= {"make_seconds": seconds, "index_mib": size}
                rows.append(row | in_fresh_process(measure, folder, cache, window, args.workers, args.batches))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}, {args.workers} forked workers")
    table(rows)
    if args.json:
        args.json.write_text(json.dumps({"machine": platform.platform(), "workers": args.workers, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
