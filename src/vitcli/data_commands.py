"""`vit data ...`: from words to sources and calls of the rooms in `data`, and from their results to lines."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from vitcli.config import Config, DataConfig
from vitcli.config_file import read_config
from vitcli.data.cache import default_cache_dir
from vitcli.data.check import CheckedSet, check
from vitcli.data.examine import IndexReader, Reader
from vitcli.data.examine_folders import read_folder
from vitcli.data.examine_shards import read_shards
from vitcli.data.folders import EVALUATION_FOLDERS, Split
from vitcli.data.loader import choose_workers
from vitcli.data.pack import SPLIT_NAMES, PackSettings, pack
from vitcli.data.preview import preview
from vitcli.data.protocol import UNLABELLED, is_labelled
from vitcli.data.sampler import build_order
from vitcli.data.shard_scan import NoLabelError
from vitcli.data.shards import build_index, expand_shards
from vitcli.data.sources import open_source
from vitcli.data.stages import bottleneck, measure_stages
from vitcli.data.stats import measure_pixels
from vitcli.data.transforms import EvalTransform, TrainTransform
from vitcli.device import choose_device
from vitcli.errors import ConfigError, DataError, RunExistsError, UserError
from vitcli.rundir import lock_run

__all__ = [
    "bench_data",
    "check_data",
    "index_data",
    "pack_data",
    "preview_data",
    "report_lines",
    "stage_lines",
    "stats_data",
]

Say = Callable[[str], None]
SHOWN = 20  # findings of a kind that are listed; --json and --write-list have them all
SHOWN_COPIES = 6  # of a group
DEFAULT_SIZE = 64  # px, for sources that make their images


def read_settings(source: str, config_path: Path | None, overrides: Sequence[str]) -> Config:
    """Return a config for a source; what no file and no word says stays as a small model would have it."""
    base = {"data": {"image_size": DEFAULT_SIZE}, "model": {"variant": "mu/1"}, "train": {"steps": 1}}
    named = f"data.source={json.dumps(source, ensure_ascii=False)}"
    return read_config(config_path, [*overrides, named], base=base, base_name="defaults")[0]


def are_labels_needed(config: Config, *, unlabelled: bool) -> bool:
    """Tell whether images must be in classes: not where the command, or what the config's runs learn, does without."""
    return config.objective.needs_labels and not unlabelled


def as_files(data: DataConfig) -> DataConfig:
    """Return the section for a source that is read once: files stay files."""
    return data.model_copy(update={"memory_cache_gib": 0.0})


# ---------------------------------------------------------------- pack, index


def pack_data(
    source: str,
    dest: Path,
    config_path: Path | None,
    overrides: Sequence[str],
    *,
    splits: Sequence[str],
    shard_bytes: int,
    examples_per_shard: int | None,
    resize: int | None,
    quality: int | None,
    exclude: Path | None,
    seed: int,
    verify: bool,
    unlabelled: bool,
    jobs: int | None,
    say: Say,
) -> None:
    """Pack splits of a source into tar shards in `dest`, and say what came of each.

    Args:
        unlabelled: images may be in no classes; then the shards say nothing of any.

    Raises:
        DataError: the source or the folder does not do, or an image cannot be read.
    """
    config = read_settings(source, config_path, overrides)
    data, labels = as_files(config.data), are_labels_needed(config, unlabelled=unlabelled)
    settings = PackSettings(shard_bytes, examples_per_shard, resize, quality, seed)
    left_out = frozenset() if exclude is None else read_list(exclude)
    opened = {split: open_source(source, split=cast(Split, split), data=data, labels=labels) for split in splits}
    with ExitStack() as stack:
        try:
            dest.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_run(dest))
        except RunExistsError:
            raise DataError(
                f"{dest}: another process is packing into this folder; wait for it, or choose another one"
            ) from None
        except (OSError, UserError) as error:
            raise DataError(f"{dest}: cannot be written; choose another folder ({error})") from error
        for split in splits:
            packed = pack(
                opened[split],
                dest,
                split=cast(Split, split),
                settings=settings,
                left_out=left_out,
                decode_all=verify,
                jobs=jobs,
            )
            sizes = [shard.bytes for shard in packed.shards]
            each = f" ({in_bytes(min(sizes))} to {in_bytes(max(sizes))} each)" if len(sizes) > 1 else ""
            parts = [
                f"{SPLIT_NAMES[split]:<10} {packed.examples:,} images in {some(len(sizes), 'shard')}",
                f"{in_bytes(sum(sizes))}{each}",
            ]
            if packed.left_out:
                parts.append(f"{packed.left_out:,} left out")
            if packed.written < len(sizes):
                parts.append(f"{some(len(sizes) - packed.written, 'shard')} there already")
            say(", ".join(parts))
    pattern = f"shards:{dest}/{SPLIT_NAMES[splits[0]]}-*.tar"
    say(f"shuffled by seed {seed}; written, read back and compared, {'every image' if verify else 'a sample'} decoded")
    objective = "" if all(map(is_labelled, opened.values())) else " objective.name=mae"
    say(f"next: vit pretrain ...{objective} data.source='{pattern}'")


def some(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}{'es' if what.endswith('s') else 's'}"


def in_bytes(size: int) -> str:
    power = 0 if size < 2**20 else 1 if size < 2**30 else 2
    return f"{size / 2 ** (10 * power + 10):,.{power}f} {('KiB', 'MiB', 'GiB')[power]}"


def read_list(path: Path) -> frozenset[str]:
    """Read the places of a list as `vit data check --write-list` writes it: one a line, up to the first tab.

    Raises:
        DataError: there is no such file, or it names nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot read this list: {error.strerror}") from error
    return frozenset(line.partition("\t")[0] for line in lines if line.strip())


def index_data(
    pattern: str, config_path: Path | None, overrides: Sequence[str], *, beside: bool, unlabelled: bool, jobs: int | None
) -> str:
    """Build or refresh the index of shards, with labels where all images have some, and describe it in a line."""
    pattern = pattern.removeprefix("shards:")
    config = read_settings(f"shards:{pattern}", config_path, overrides)
    make = partial(
        build_index,
        expand_shards(pattern),
        cache_dir=default_cache_dir(),
        workers=jobs,
        beside=beside,
        remote_cache_gib=config.data.remote_cache_gib,
    )
    try:
        index = make(label_key=config.data.label_key)
        classes = f"{len(index.classes):,} classes"
    except NoLabelError:
        if are_labels_needed(config, unlabelled=unlabelled):
            raise
        index, classes = make(label_key=None, classes=[UNLABELLED]), "without labels"
    counts = f"{some(len(index), 'image')} in {some(len(index.urls), 'shard')}, {classes}"
    return f"{pattern}: {counts}; index in {index.folder}"


# ---------------------------------------------------------------- check


def check_data(
    source: str,
    config_path: Path | None,
    overrides: Sequence[str],
    *,
    splits: Sequence[str],
    against: Sequence[str],
    near: int,
    write_list: Path | None,
    unlabelled: bool,
    jobs: int | None,
) -> dict[str, Any]:
    """Check splits of a source, also against other sets, and return all that was found as JSON values.

    Args:
        unlabelled: images may be in no classes; those of the other sets may always.

    Raises:
        DataError: a set cannot be opened at all, or the list cannot be written.
    """
    config = read_settings(source, config_path, overrides)
    data, labels = as_files(config.data), are_labels_needed(config, unlabelled=unlabelled)
    readers = open_readers(source, [cast(Split, split) for split in splits], data, labels=labels)
    sets = [CheckedSet(split, reader, training=split == "train") for split, reader in readers.items()]
    for other in dict.fromkeys(against):
        whole = data.model_copy(update={"examples": None})
        others = open_readers(other, evaluation_splits(other), whole, labels=False)
        sets += [CheckedSet(f"{other} ({split})", reader, own=False) for split, reader in others.items()]
    report = check(sets, near=near, jobs=jobs)
    if write_list is not None:
        lines = [f"{one_line(found.place)}\t{found.kind}\t{one_line(found.reason)}\n" for found in report.leave_out]
        try:
            write_list.parent.mkdir(parents=True, exist_ok=True)
            write_list.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise DataError(f"{write_list}: cannot be written: {error.strerror}") from error
    left_out = None if write_list is None else {"list": str(write_list), "images": len(report.leave_out)}
    return {"source": source, **report.as_dict(), "leave_out": left_out, "near_bits": near}


def open_readers(spec: str, splits: Sequence[Split], data: DataConfig, *, labels: bool) -> dict[Split, Reader]:
    """Open splits of a set for reading with all its faults; a split that is not there is left out where the other one is.

    Args:
        labels: whether images need them, as for `open_source`.
    """
    kind, _, place = spec.partition(":")
    if kind == "folder" and place:
        folders = read_folder(Path(place), val_fraction=data.val_fraction, labels=labels)
        return {split: folders[split] for split in splits if split in folders} or dict(folders)
    if kind == "shards" and place:
        shards = read_shards(
            place,
            splits=splits,
            label_key=data.label_key,
            cache_dir=default_cache_dir(),
            remote_cache_gib=data.remote_cache_gib,
            labels=labels,
        )
        return dict(shards.items())
    return {split: IndexReader(open_source(spec, split=split, data=data, labels=labels)) for split in splits}


def evaluation_splits(spec: str) -> list[Split]:
    """Return the splits of a set that training must not have seen: all of a folder that has no evaluation split of its own."""
    kind, _, place = spec.partition(":")
    path = Path(place).expanduser()
    if kind == "folder" and not any((path / name).is_dir() for name in EVALUATION_FOLDERS):
        return ["train", "val"]
    return ["val"]


def one_line(text: str) -> str:
    return re.sub(r"[\t\r\n]+", " ", text)


def report_lines(report: dict[str, Any]) -> list[str]:
    """Put a report into words."""
    lines = []
    for each in report["sets"]:
        lines += set_lines(each)
    by_kind: dict[str, list[str]] = {}
    for found in report["findings"]:
        by_kind.setdefault(found["kind"], []).append(f"{found['place']}: {found['reason']}")
    for group in report["duplicates"]:
        copies = [f"{copy['place']} [{copy['set']}, {copy['label'] or 'no label'}]" for copy in group["copies"]]
        more = f" and {len(copies) - SHOWN_COPIES} more" if len(copies) > SHOWN_COPIES else ""
        differ = "labels differ: " if group["labels_differ"] else ""
        by_kind.setdefault(group["kind"], []).append(f"{differ}{' = '.join(copies[:SHOWN_COPIES])}{more}")
    for kind, places in by_kind.items():
        lines.append(f"{kind}: {len(places):,}")
        lines += [f"  {place}" for place in places[:SHOWN]]
        if len(places) > SHOWN:
            lines.append(f"  ... and {len(places) - SHOWN:,} more; --json has them all")
    if report["leave_out"]:
        lines.append(f"{report['leave_out']['list']}: {report['leave_out']['images']:,} images to leave out")
    near = f"; near duplicates: perceptual hash within {report['near_bits']} of 64 bits, similar thumbnails"
    lines.append(f"exact duplicates: SHA-256 of the decoded pixels{near if report['near_bits'] >= 0 else ''}")
    counts = ", ".join(f"{count:,} {kind}" for kind, count in report["counts"].items())
    lines.append(f"found: {counts}" if counts else "nothing found: every image is readable, in its place and there once")
    return lines


def set_lines(each: dict[str, Any]) -> list[str]:
    """Describe one set."""
    counts = {name: count for name, count in each["classes"].items() if count}
    images, classless = each["images"], list(each["classes"]) in ([], [UNLABELLED])
    classes = "without classes" if classless else f"in {len(each['classes']):,} classes"
    lines = [f"{each['name']}: {images:,} readable images {classes}"]
    if counts and not classless:
        smallest, largest = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
        times = counts[largest] / counts[smallest]
        lines.append(
            f"  classes: largest {largest} with {counts[largest]:,}, smallest {smallest} with {counts[smallest]:,}: "
            f"{times:.1f} times; empty: {len(each['classes']) - len(counts):,}"
        )
    if images:
        sizes = ", ".join(
            f"{size['width']}x{size['height']} {100 * size['images'] / images:.1f} %" for size in each["sizes"][:5]
        )
        sides = ", ".join(f"{name} {100 * count / images:.1f} %" for name, count in each["short_side"].items())
        lines += [f"  sizes: {sizes}", f"  short side, px: {sides}", f"  grey: {100 * each['grey'] / images:.1f} %"]
    return lines


# ---------------------------------------------------------------- stats, preview, bench


def stats_data(
    source: str, config_path: Path | None, overrides: Sequence[str], *, examples: int | None, jobs: int | None
) -> dict[str, Any]:
    """Measure mean and standard deviation of a source's training images, as JSON values.

    Images are taken as they are, unless a config or an override says which size they are shown at.
    """
    config = read_settings(source, config_path, overrides)
    data = config.data
    resized = config_path is not None or any(word.startswith("data.image_size=") for word in overrides)
    transform = EvalTransform(image_size=data.image_size, crop_fraction=data.eval_crop_fraction) if resized else None
    opened = open_source(source, split="train", data=as_files(data), labels=False)
    found = measure_pixels(opened, examples=examples, transform=transform, seed=config.seed, jobs=jobs)
    height, width = data.image_size
    return {
        "source": source,
        **asdict(found),
        "mean": [round(value, 6) for value in found.mean],
        "std": [round(value, 6) for value in found.std],
        "of": len(opened),
        "measured": f"resized to {height} x {width} as evaluation shows them" if resized else "at their own sizes",
    }


def preview_data(
    source: str,
    config_path: Path | None,
    overrides: Sequence[str],
    *,
    out: Path | None,
    augmented: bool,
    rows: int,
    columns: int,
    unlabelled: bool,
) -> str:
    """Write a contact sheet of a source's training split and say where; settings come from the config where one is given."""
    config = read_settings(source, config_path, overrides)
    labels = are_labels_needed(config, unlabelled=unlabelled)
    opened = open_source(source, split="train", data=as_files(config.data), labels=labels)
    path = out or Path(f"preview-{re.sub(r'[^A-Za-z0-9._-]+', '-', source.removeprefix('folder:')).strip('-')}.png")
    transform = TrainTransform(config.augment, image_size=config.data.image_size) if augmented else None
    path.parent.mkdir(parents=True, exist_ok=True)
    preview(opened, rows=rows, columns=columns, transform=transform, seed=config.seed).save(path, format="PNG")
    classes = f"in {len(opened.classes):,} classes" if is_labelled(opened) else "without classes"
    return f"{path}: {source}, {len(opened):,} training images {classes}"


def bench_data(
    source: str,
    config_path: Path | None,
    overrides: Sequence[str],
    *,
    workers: int | None,
    batch_size: int,
    seconds: float,
    say: Say,
) -> dict[str, Any]:
    """Measure the stages of the loader for a source, as JSON values."""
    config = read_settings(source, config_path, overrides)
    if workers is not None and config.data.workers not in (None, workers):
        raise ConfigError(f"data.workers={config.data.workers} and --workers {workers} are both given; drop one")
    opened = open_source(source, split="train", data=config.data, labels=False)
    if workers is None:
        workers = config.data.workers
    if workers is None:
        workers = choose_workers(opened, choose_device(config.train.device).type)
    say(f"measuring about {6 * seconds:.0f} s ...")
    speeds = measure_stages(
        opened,
        augment=config.augment,
        image_size=config.data.image_size,
        order=build_order(opened, config.data, seed=config.seed),
        workers=workers,
        batch_size=batch_size,
        seconds=seconds,
        seed=config.seed,
        on_error=config.data.on_error,
        skip_limit=config.data.skip_limit,
        warn=say,
    )
    return {
        "source": source,
        "images": len(opened),
        "image_size": list(config.data.image_size),
        "batch_size": batch_size,
        "workers": speeds.workers,
        "cores": speeds.cores,
        "images_per_second": {
            **{name: round(speed, 1) for name, speed in speeds.stages.items()},
            "loader": round(speeds.loader, 1),
        },
        "bottleneck": bottleneck(speeds),
    }


def stage_lines(result: dict[str, Any]) -> list[str]:
    """Put measured stages into words."""
    height, width = result["image_size"]
    lines = [
        f"{result['source']}: {result['images']:,} images, shown at {height} x {width}, batches of {result['batch_size']}, "
        f"{some(result['workers'], 'loader process')} on {some(result['cores'], 'core')}"
    ]
    meaning = {
        "read": "in one process",
        "decode": "in one process, with crop and scaling",
        "augment": "in one process, the rest" if "decode" in result["images_per_second"] else "in one process, crop included",
        "hand-over": "ready batches through the loader",
        "loader": "all of it, as training runs it",
    }
    lines += [f"  {name:<10} {speed:>12,.0f} images/s  {meaning[name]}" for name, speed in result["images_per_second"].items()]
    return [*lines, result["bottleneck"]]
