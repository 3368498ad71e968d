"""`vit data`: look at a data set, check it and bring it into shape, before training on it."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vitcli.cli_options import DataRoot, Debug, Overrides, as_overrides, say, warn

__all__ = ["data_app"]

data_app = typer.Typer(help="Look at the data, check it and pack it, before training on it.", no_args_is_help=True)


class WhichSplit(StrEnum):
    """The words for --split."""

    train = "train"
    val = "val"
    both = "both"


Source = Annotated[
    str, typer.Argument(help="data set by name, folder:PATH, shards:PATTERN or hf:NAME", show_default=False, metavar="SOURCE")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="take data and augmentation settings from this file", show_default=False)
]
Split = Annotated[WhichSplit, typer.Option("--split", help="which part of the source")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="processes; default one for each core", show_default=False)]
Unlabelled = Annotated[bool, typer.Option("--unlabelled", help="take images that are in no classes, too")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")]


@data_app.command(
    epilog="Example: vit data pack folder:photos packed --examples-per-shard 5000 --resize 256   "
    "Then train on it: vit pretrain --config my.yaml data.source='shards:packed/train-*.tar'"
)
def pack(
    source: Source,
    dest: Annotated[Path, typer.Argument(help="folder for the shards", show_default=False, metavar="DEST")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    split: Split = WhichSplit.both,
    shard_mib: Annotated[float, typer.Option("--shard-mib", min=0.1, help="size of a shard, about, MiB")] = 256.0,
    examples_per_shard: Annotated[
        int | None, typer.Option("--examples-per-shard", min=1, help="images of a shard, instead", show_default=False)
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option("--resize", min=1, help="scale larger images down to this short side, px", show_default=False),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option("--quality", min=1, max=95, help="encode every image anew as JPEG of this quality", show_default=False),
    ] = None,
    exclude: Annotated[
        Path | None,
        typer.Option("--exclude", help="leave out what this list names (vit data check --write-list)", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the order in which images are written")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="decode every image that was written, not only a sample")] = False,
    unlabelled: Unlabelled = False,
    jobs: Jobs = None,
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Pack a data set into tar shards, which read fast from any disk or store.

    Files are stored as they are, byte for byte; pixels that lie in no file, and files that are neither JPEG nor PNG nor WebP,
    as PNG without loss. --resize encodes what it scales as JPEG of quality 95 where it was JPEG or WebP, else as PNG. Images
    are shuffled by the seed; the same command writes the same bytes. Interrupted, the same command goes on with the shards
    that are missing. With --unlabelled, or a --config that learns without labels, images in no classes get no labels.
    """
    from vitcli.data_commands import pack_data

    words = as_overrides(overrides, data__root=data_root)
    pack_data(
        source,
        dest,
        config,
        words,
        splits=splits_of(split),
        shard_bytes=round(shard_mib * 2**20),
        examples_per_shard=examples_per_shard,
        resize=resize,
        quality=quality,
        exclude=exclude,
        seed=seed,
        verify=verify,
        unlabelled=unlabelled,
        jobs=jobs,
        say=say,
    )


@data_app.command(epilog="Example: vit data index 'packed/train-*.tar' --beside")
def index(
    pattern: Annotated[
        str, typer.Argument(help="path or URL of shards, with {000..127} or *; quote it", show_default=False, metavar="PATTERN")
    ],
    overrides: Overrides = None,
    config: ConfigFile = None,
    beside: Annotated[bool, typer.Option("--beside", help="keep the index beside the shards, not in the cache")] = False,
    unlabelled: Unlabelled = False,
    jobs: Jobs = None,
    debug: Debug = False,
) -> None:
    """Build the index of tar shards that training reads by, or bring it up to date.

    Training does so by itself; this does it ahead of time, on the machine that is near the data. With --unlabelled, shards
    whose images have no labels are indexed without.
    """
    from vitcli.data_commands import index_data

    say(index_data(pattern, config, as_overrides(overrides), beside=beside, unlabelled=unlabelled, jobs=jobs))


@data_app.command(
    epilog="Example: vit data check shards:pretraining/*.tar --against cifar10 --against folder:photos --write-list bad.tsv"
)
def check(
    source: Source,
    overrides: Overrides = None,
    config: ConfigFile = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", help="also look for images of this set's evaluation split; may be repeated", show_default=False
        ),
    ] = None,
    split: Split = WhichSplit.both,
    near: Annotated[
        int,
        typer.Option(
            "--near", min=-1, max=16, help="bits of 64 in which near duplicates may differ; more is slower; -1: exact only"
        ),
    ] = 6,
    write_list: Annotated[
        Path | None,
        typer.Option("--write-list", help="file for the images to leave out: place, kind, reason", show_default=False),
    ] = None,
    unlabelled: Unlabelled = False,
    as_json: AsJson = False,
    jobs: Jobs = None,
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Decode every image, and list what is damaged, misplaced or there twice.

    Exit code 0: nothing found; 1: something found; 2: the command cannot be carried out. Exact duplicates have equal pixels
    (SHA-256 of the decoded image), near ones a similar perceptual hash and similar thumbnails: copies that were recompressed,
    scaled or brightened, not crops or mirror images. Both are looked for within the training split, within the evaluation
    split, between them, and between them and every --against set. With --unlabelled, or a --config that
    learns without labels, a folder need have no class folders, and shards no labels.
    """
    from vitcli.data_commands import check_data, report_lines

    words = as_overrides(overrides, data__root=data_root)
    report = check_data(
        source,
        config,
        words,
        splits=splits_of(split),
        against=against or [],
        near=near,
        write_list=write_list,
        unlabelled=unlabelled,
        jobs=jobs,
    )
    if as_json:
        say(json.dumps(report))
    else:
        for line in report_lines(report):
            say(line)
    if not report["clean"]:
        raise typer.Exit(1)


@data_app.command(epilog="Example: vit data stats folder:photos --examples 20000")
def stats(
    source: Source,
    overrides: Overrides = None,
    config: ConfigFile = None,
    examples: Annotated[
        int | None, typer.Option("--examples", min=1, help="measure a random part of this size", show_default=False)
    ] = None,
    as_json: AsJson = False,
    jobs: Jobs = None,
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Measure mean and standard deviation of the training images, ready to paste as data.mean and data.std.

    Every pixel counts once. Images are taken as they are; with --config or data.image_size=N, as evaluation shows them.
    """
    from vitcli.data_commands import stats_data

    words = as_overrides(overrides, data__root=data_root)
    result = stats_data(source, config, words, examples=examples, jobs=jobs)
    if as_json:
        say(json.dumps(result))
        return
    part = "" if result["examples"] == result["of"] else f" of {result['of']:,}"
    say(f"{source}: {result['examples']:,}{part} training images, {result['pixels']:,} pixels, {result['measured']}")
    say(f"data.mean={json.dumps(result['mean'])} data.std={json.dumps(result['std'])}".replace(", ", ","))


@data_app.command(epilog="Example: vit data preview shapes --out shapes.png")
def preview(
    source: Source,
    overrides: Overrides = None,
    config: ConfigFile = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="PNG to write; default preview-SOURCE.png", show_default=False)
    ] = None,
    augmented: Annotated[
        bool, typer.Option("--augmented", help="below each row of images, the same ones as training sees them")
    ] = False,
    rows: Annotated[int, typer.Option("--rows", min=1, help="classes shown, a row each")] = 10,
    columns: Annotated[int, typer.Option("--columns", min=1, help="images of each class")] = 8,
    unlabelled: Unlabelled = False,
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Write a labelled contact sheet of a data set as PNG."""
    from vitcli.data_commands import preview_data

    words = as_overrides(overrides, data__root=data_root)
    sheet = preview_data(source, config, words, out=out, augmented=augmented, rows=rows, columns=columns, unlabelled=unlabelled)
    say(sheet)


@data_app.command(epilog="Example: vit data bench 'shards:packed/train-*.tar' data.image_size=224 --workers 4")
def bench(
    source: Source,
    overrides: Overrides = None,
    config: ConfigFile = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=0, help="loader processes; default what training would take", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="images at a time")] = 128,
    seconds: Annotated[float, typer.Option("--seconds", min=0.05, help="how long each stage is measured")] = 3.0,
    as_json: AsJson = False,
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Measure images per second of each stage of the loader, and name the slowest."""
    from vitcli.data_commands import bench_data, stage_lines

    words = as_overrides(overrides, data__root=data_root)
    result = bench_data(source, config, words, workers=workers, batch_size=batch_size, seconds=seconds, say=warn)
    if as_json:
        say(json.dumps(result))
        return
    for line in stage_lines(result):
        say(line)


def splits_of(split: WhichSplit) -> list[str]:
    return ["train", "val"] if split is WhichSplit.both else [split.value]
