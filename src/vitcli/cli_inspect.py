"""`vit inspect`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vitcli.cli_options import Ckpt, DataRoot, Debug, as_overrides, say, warn
from vitcli.errors import ConfigError

__all__ = ["inspect"]


class FigureKind(StrEnum):
    """The words for --format."""

    png = "png"
    svg = "svg"


def inspect(
    ckpt: Ckpt,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", help="files, folders or globs; default its evaluation images", show_default=False),
    ] = None,
    more: Annotated[
        list[str] | None, typer.Argument(help="more images, as --images a.jpg b.jpg", metavar="[IMAGE...]", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder; default runs/inspect- and the checkpoint's name", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="look at a data set's evaluation images instead", show_default=False)
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="another checkpoint to compare layers with", show_default=False)
    ] = None,
    examples: Annotated[int, typer.Option("--examples", min=1, help="images that means are taken over")] = 128,
    pictures: Annotated[int, typer.Option("--pictures", min=1, max=32, help="images that are shown by themselves")] = 4,
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="show images at 384 or HEIGHTxWIDTH px", show_default=False)
    ] = None,
    kind: Annotated[FigureKind, typer.Option("--format", help="of the figures' files")] = FigureKind.png,
    as_json: Annotated[bool, typer.Option("--json", help="print the numbers instead of where they are")] = False,
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Look inside a model: filters, positions, attention, rollout, features, likeness of layers, receptive fields.

    Writes figures, one page with all of them and how to read them (index.html), and the numbers (inspection.json).
    """
    words = [*(images or []), *(more or [])]
    if words and dataset is not None:
        raise ConfigError("--images and --dataset: one or the other says what the model is shown")
    from vitcli.cli_predict import as_size
    from vitcli.inspection import Asked
    from vitcli.inspection import inspect as run

    overrides = as_overrides(None, data__root=data_root)
    overrides += [] if image_size is None else [f"data.image_size={as_size(image_size)}"]
    place = out or Path("runs") / f"inspect-{ckpt.resolve().stem}"
    asked = Asked(
        ckpt=ckpt,
        images=words,
        dataset=dataset,
        against=against,
        examples=examples,
        pictures=pictures,
        overrides=overrides,
        kind=kind.value,
    )
    found = run(asked, out=place, say=warn)
    if as_json:
        say(json.dumps(found))
        return
    say(f"{place}: {len(found['figures'])} figures, inspection.json, and index.html with all of them; open it in any browser")
