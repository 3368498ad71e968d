"""How many images per second does the loader give, beside timm's, torchvision's reference pipeline and webdataset?

    python scripts/bench_data.py --tiny '/data/tiny-imagenet/train-{0000..0029}.tar' --cifar /data --json data.json

Four tasks: (a) CIFAR-10 in memory, pad-crop and flip; (b) shards at 64 px, inception crop and flip; (c) the same and
RandAugment (2 operations, magnitude 10); (d) a folder of 500 x 400 JPEGs at 224 px, inception crop and flip, made here. Each
ends with a normalised float32 batch on the CPU, from as many loader processes. timm's loader is `create_loader` with its
prefetcher, which normalises whole batches as it would on a GPU; torchvision's is `references/classification`, from an
ImageFolder; webdataset's is `decode("pil")` and the same transform, collated in its processes. Everybody decodes every image
every time: "decoded once" is what our loader does by default with a set this small. Rounds alternate; medians are printed.
Where other work keeps the machine busy, look at "per processor-second", of all processes together.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitcli.config import AugmentConfig, DataConfig
from vitcli.data.loader import train_batches
from vitcli.data.sampler import build_order
from vitcli.data.shards import expand_shards, iter_members
from vitcli.data.sources import open_source
from vitcli.data.transforms import TrainTransform, normalise
from vitcli.device import keep_freed_memory

MEAN = STD = (0.5, 0.5, 0.5)
MIN_AREA = 0.08  # of an inception crop: timm's and torchvision's default
LAYERS, MAGNITUDE = 2, 10  # of RandAugment
WIDTH, HEIGHT, QUALITY = 500, 400, 90  # of the JPEGs of task d, typical of ImageNet
CLASSES = 4  # folders of task d
BIG = 2**40  # steps: more than anyone waits for

Batches = Iterator[Tensor]  # float32 (B, 3, H, W)


# ---------------------------------------------------------------- ours


def ours(spec: str, augment: AugmentConfig, side: int, args: argparse.Namespace, *, decoded_once: bool) -> Batches:
    keep_freed_memory()  # as `vit train` does
    data = DataConfig(source=spec, image_size=(side, side), root=args.cifar, memory_cache_gib=4.0 if decoded_once else 0.0)
    source = open_source(spec, split="train", data=data)
    batches = train_batches(
        source,
        TrainTransform(augment, image_size=(side, side)),
        order=build_order(source, data, seed=0),
        batch_size=args.batch_size,
        micro_batch_size=args.batch_size,
        start_step=0,
        total_steps=BIG,
        seed=0,
        workers=args.workers,
    )
    with contextlib.closing(batches):
        for batch in batches:
            yield normalise(batch["images"], mean=MEAN, std=STD)


# ---------------------------------------------------------------- the others


class Arrays(torch.utils.data.Dataset[Any]):
    """CIFAR-10 as torchvision gives it: an array in memory, each image as a PIL image to the transform."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels.tolist()
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        assert self.transform is not None
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def cifar10(args: argparse.Namespace) -> Arrays:
    source: Any = open_source("cifar10", split="train", data=DataConfig(source="cifar10", image_size=(32, 32), root=args.cifar))
    return Arrays(*source.batch(np.arange(len(source))))


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def timm_batches(dataset: Any, side: int, args: argparse.Namespace, *, randaugment: bool = False, pad: bool = False) -> Batches:
    from timm.data import create_loader
    from timm.data.transforms import MaybePILToTensor
    from torchvision import transforms

    loader = create_loader(
        dataset,
        input_size=(3, side, side),
        batch_size=args.batch_size,
        is_training=True,
        scale=(MIN_AREA, 1.0),
        color_jitter=None,
        auto_augment=f"rand-m{MAGNITUDE}-n{LAYERS}" if randaugment else None,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=args.workers,
        device=torch.device("cpu"),
        use_prefetcher=True,
    )
    if pad:  # timm has no such crop of its own
        dataset.transform = transforms.Compose(
            [transforms.RandomCrop(side, padding=4), transforms.RandomHorizontalFlip(), MaybePILToTensor()]
        )
    for images, _ in endless(loader):
        yield images


def preset(side: int, *, randaugment: bool = False, pad: bool = False) -> Callable[[Image.Image], Tensor]:
    """Build torchvision's references/classification/presets.py, ClassificationPresetTrain."""
    from torchvision.transforms import InterpolationMode, autoaugment, transforms

    bilinear = InterpolationMode.BILINEAR
    steps: list[Any] = [transforms.RandomResizedCrop(side, scale=(MIN_AREA, 1.0), interpolation=bilinear)]
    if pad:
        steps = [transforms.RandomCrop(side, padding=4)]
    steps.append(transforms.RandomHorizontalFlip(0.5))
    if randaugment:
        steps.append(autoaugment.RandAugment(num_ops=LAYERS, magnitude=MAGNITUDE, interpolation=bilinear))
    steps += [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float), transforms.Normalize(MEAN, STD)]
    return transforms.Compose(steps)


def torchvision_batches(dataset: Any, args: argparse.Namespace) -> Batches:
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        drop_last=True,
        persistent_workers=args.workers > 0,
    )
    for images, _ in endless(loader):
        yield images


def webdataset_batches(shards: list[str], transform: Callable[[Image.Image], Tensor], args: argparse.Namespace) -> Batches:
    import webdataset

    dataset = (
        webdataset.WebDataset(shards, shardshuffle=100, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform)
        .batched(args.batch_size, partial=False)
    )
    loader = webdataset.WebLoader(
        dataset, batch_size=None, shuffle=False, num_workers=args.workers, persistent_workers=args.workers > 0
    )
    for images, _ in endless(loader):
        yield images


# ---------------------------------------------------------------- pictures


def texture(seed: int) -> Image.Image:
    """Draw noise at every scale, strong where it is coarse, as in photographs; (HEIGHT, WIDTH)."""
    rng = np.random.default_rng(seed)
    total = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cell in (1, 2, 4, 8, 16, 32, 64, 128):
        size = (WIDTH // cell + 2, HEIGHT // cell + 2)
        noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
        smooth = noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        total += (np.asarray(smooth, np.float32) - 127.5) * cell**0.8
    low, high = np.quantile(total, (0.01, 0.99))
    return Image.fromarray(((total - low) / (high - low) * 255).clip(0, 255).astype(np.uint8))


def write_folder(folder: Path, pictures: int) -> int:
    """Write class folders of JPEGs; return their size in bytes."""
    written = 0
    for number in range(pictures):
        path = folder / f"class{number % CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        texture(number).save(path, quality=QUALITY)
        written += path.stat().st_size
    return written


def unpack(shards: list[str], folder: Path) -> None:
    """Write the images of shards into class folders, for those who read folders."""
    for shard in shards:
        with open(shard, "rb") as tar:
            content = tar.read()
        members = {member.name: content[member.offset : member.offset + member.size] for member in iter_members(shard)}
        for name, data in members.items():
            if name.endswith(".jpg"):
                label = members[name.removesuffix("jpg") + "cls"].decode().strip()
                path = folder / f"{int(label):04d}" / f"{Path(shard).stem}-{Path(name).name}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


def pack(folder: Path, target: Path, *, shards: int) -> list[str]:
    """Write a folder's images into tar shards, for those who read shards."""
    files = sorted(folder.rglob("*.jpg"))
    paths = []
    for number in range(shards):
        path = target / f"folder-{number:04d}.tar"
        paths.append(str(path))
        with tarfile.open(path, "w") as tar:
            for file in files[number::shards]:
                label = file.parent.name.removeprefix("class").encode()
                for suffix, data in (("jpg", file.read_bytes()), ("cls", label)):
                    member = tarfile.TarInfo(f"{file.stem}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


# ---------------------------------------------------------------- measuring


def processor_seconds() -> float:
    """Return the processor time of this process and its loader processes so far; not a number where the system hides it."""
    total = time.process_time()
    for process in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return math.nan
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure(make: Callable[[], Batches], args: argparse.Namespace) -> tuple[float, float]:
    """Measure in a process of its own, so that no pipeline leaves anything behind for the next; see `measure_here`."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: send.send(measure_here(make, args)))
    child.start()
    send.close()  # so that `recv` ends if the child does
    result: tuple[float, float] = receive.recv()
    child.join()
    return result


def measure_here(make: Callable[[], Batches], args: argparse.Namespace) -> tuple[float, float]:
    """Return images per second and images per second of processor time, after as many batches as are made ahead of time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the others' deprecations
        batches = make()
        for _ in range(3 * max(1, args.workers)):
            next(batches)
        busy, began, seen = processor_seconds(), time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < args.seconds:
            seen += len(next(batches))
        busy = processor_seconds() - busy
        del batches  # ends its processes
        gc.collect()
    return seen / elapsed, seen / busy


Pipelines = dict[str, Callable[[], Batches]]


def small_tasks(args: argparse.Namespace, place: Path) -> dict[str, Pipelines]:
    """Tasks a, b and c, those that are asked for."""
    tasks: dict[str, Pipelines] = {}
    if "a" in args.tasks:
        augment = AugmentConfig(crop="pad", pad=4)
        arrays = cifar10(args)

        def reference() -> Batches:
            arrays.transform = preset(32, pad=True)
            return torchvision_batches(arrays, args)

        tasks["a: CIFAR-10 in memory, 32 px, pad-crop, flip"] = {
            "vit": partial(ours, "cifar10", augment, 32, args, decoded_once=True),
            "timm": partial(timm_batches, arrays, 32, args, pad=True),
            "torchvision": reference,
        }
    if {"b", "c"} & set(args.tasks):
        from timm.data import create_dataset
        from torchvision.datasets import ImageFolder

        shards = expand_shards(args.tiny)
        folder = place / "tiny"
        unpack(shards, folder)
        count = len(list(folder.rglob("*.jpg")))
        names = "{" + ",".join(os.path.basename(shard) for shard in shards) + "}"
        for task, title, randaugment in (("b", "", False), ("c", ", RandAugment", True)):
            if task not in args.tasks:
                continue
            augment = AugmentConfig(
                min_area=MIN_AREA, randaugment_layers=LAYERS if randaugment else 0, randaugment_magnitude=MAGNITUDE
            )

            def timm_shards(randaugment: bool = randaugment) -> Batches:
                dataset = create_dataset(
                    "wds/shards",
                    root=os.path.dirname(shards[0]),
                    split=f"{names}|{count}",
                    is_training=True,
                    batch_size=args.batch_size,
                )
                return timm_batches(dataset, 64, args, randaugment=randaugment)

            def timm_folder(randaugment: bool = randaugment) -> Batches:
                return timm_batches(create_dataset("", root=str(folder)), 64, args, randaugment=randaugment)

            def reference_folder(randaugment: bool = randaugment) -> Batches:
                return torchvision_batches(ImageFolder(str(folder), preset(64, randaugment=randaugment)), args)

            tasks[f"{task}: shards of {count:,} images, 64 px, inception crop, flip{title}"] = {
                "vit": partial(ours, f"shards:{args.tiny}", augment, 64, args, decoded_once=False),
                "timm, shards": timm_shards,
                "timm, folder": timm_folder,
                "torchvision, folder": reference_folder,
                "webdataset": partial(webdataset_batches, shards, preset(64, randaugment=randaugment), args),
                "vit, decoded once": partial(ours, f"shards:{args.tiny}", augment, 64, args, decoded_once=True),
            }
    return tasks


def large_task(args: argparse.Namespace, place: Path) -> dict[str, Pipelines]:
    """Task d."""
    from timm.data import create_dataset
    from torchvision.datasets import ImageFolder

    args = argparse.Namespace(**{**vars(args), "batch_size": args.large_batch_size})
    folder = place / "folder"
    size = write_folder(folder, args.pictures)
    shards = pack(folder, place, shards=4)
    augment = AugmentConfig(min_area=MIN_AREA)
    title = f"d: folder of {args.pictures:,} JPEGs, {WIDTH} x {HEIGHT}, {size // args.pictures // 1000} kB each, 224 px, "
    return {
        title + "inception crop, flip": {
            "vit": partial(ours, f"folder:{folder}", augment, 224, args, decoded_once=False),
            "timm, folder": lambda: timm_batches(create_dataset("", root=str(folder)), 224, args),
            "torchvision, folder": lambda: torchvision_batches(ImageFolder(str(folder), preset(224)), args),
            "webdataset": partial(webdataset_batches, shards, preset(224), args),
        }
    }


def summary(title: str, found: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Print the results of a task; return them for the JSON file."""
    print(f"\n{title}")
    rates = {name: statistics.median(rate for rate, _ in measured) for name, measured in found.items()}
    per_core = {name: statistics.median(rate for _, rate in measured) for name, measured in found.items()}
    others = [name for name in found if not name.startswith("vit")]
    best, best_per_core = max(rates[name] for name in others), max(per_core[name] for name in others)
    for name, measured in found.items():
        spread = f"({min(measured)[0]:,.0f} to {max(measured)[0]:,.0f})"
        ratios = f"{rates[name] / best:5.2f} x the best other"
        core = f"{per_core[name]:8,.0f} per processor-second, {per_core[name] / best_per_core:5.2f} x"
        print(f"  {name:20s} {rates[name]:8,.0f} images/s {spread:>19s} {ratios}; {core}", flush=True)
    return {
        "task": title,
        "images_per_second": {name: [rate for rate, _ in measured] for name, measured in found.items()},
        "images_per_processor_second": {name: [rate for _, rate in measured] for name, measured in found.items()},
        "ratio": rates["vit"] / best,
        "ratio_per_processor_second": per_core["vit"] / best_per_core,
    }


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--tasks", default="abcd", help="which, by letter")
    cli.add_argument("--tiny", help="pattern of the shards of tasks b and c, with jpg and cls members")
    cli.add_argument("--cifar", type=Path, help="data root with CIFAR-10, for task a")
    cli.add_argument("--pictures", type=int, default=1024, help="JPEGs of task d")
    cli.add_argument("--workers", type=int, default=2, help="loader processes; 0 for none")
    cli.add_argument("--batch-size", type=int, default=512, help="of tasks a to c; the paper's for fine-tuning")
    cli.add_argument("--large-batch-size", type=int, default=128, help="of task d")
    cli.add_argument("--seconds", type=float, default=5.0, help="for each measurement")
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--json", type=Path, help="write all measurements here")
    args = cli.parse_args()
    if {"b", "c"} & set(args.tasks) and not args.tiny:
        cli.error("tasks b and c need --tiny")
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    batches = f"batches of {args.batch_size} (d: {args.large_batch_size})"
    print(f"{cores} cores, {args.workers} loader processes, {batches}, median of {args.rounds} rounds", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-data-", ignore_cleanup_errors=True) as place:
        os.environ["VIT_CACHE"] = os.path.join(place, "cache")
        tasks = small_tasks(args, Path(place))
        if "d" in args.tasks:
            tasks |= large_task(args, Path(place))
        for title, pipelines in tasks.items():
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
            for _, (name, make) in itertools.product(range(args.rounds), pipelines.items()):
                found[name].append(measure(make, args))
            rows.append(summary(title, found))
    if args.json:
        about = {
            "cores": cores,
            "machine": platform.processor() or platform.machine(),
            "workers": args.workers,
            "batch_size": {"abc": args.batch_size, "d": args.large_batch_size},
            "seconds": args.seconds,
            "torch": torch.__version__,
        }
        args.json.write_text(json.dumps({**about, "tasks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
