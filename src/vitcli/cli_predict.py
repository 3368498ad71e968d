"""`vit predict`."""

import csv
import io
import json
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from vitcli.cli_options import Ckpt, Debug, warn
from vitcli.errors import ConfigError

if TYPE_CHECKING:
    from vitcli.predict import Prediction

__all__ = ["predict"]

Write = Callable[["Prediction"], None]


class WhichViews(StrEnum):
    """The words for --tta."""

    flip = "flip"
    crops5 = "crops5"
    both = "flip+crops5"


def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            help="files, folders with all below, globs, or - for names on stdin", metavar="IMAGE...", show_default=False
        ),
    ],
    ckpt: Ckpt,
    top: Annotated[int, typer.Option("--top", min=1, help="classes named for each image")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON for each image instead of a table")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="write to a new file; .jsonl and .csv are written as such", show_default=False)
    ] = None,
    null: Annotated[bool, typer.Option("--null", help="names on stdin end with NUL, as `find -print0` prints them")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="images at a time")] = 64,
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="show images at 384 or HEIGHTxWIDTH px", show_default=False)
    ] = None,
    tta: Annotated[
        WhichViews | None, typer.Option("--tta", help="average over mirror images, five crops, or both", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Name what images show: the likeliest classes and their probabilities, in the order of the images.

    A file that cannot be read does not stop the others: it is reported on stderr and in the results, and makes the exit code 1.
    """
    if null and "-" not in images:
        raise ConfigError("--null: says how names on stdin end; expected - among the images")
    from vitcli.data.imagenet import readable
    from vitcli.label_sets import class_names
    from vitcli.opened import open_model
    from vitcli.predict import find_images, new_file, predict_images
    from vitcli.views import tta_forward, tta_views

    with nullcontext(sys.stdout) if out is None else new_file(out) as file:  # an --out that cannot be is told before the work
        overrides = [] if image_size is None else [f"data.image_size={as_size(image_size)}"]
        opened = open_model(ckpt, dataset="images", overrides=overrides, say=warn)
        classes = class_names(opened.pretrained, say=warn)
        write = writer(file, classes, readable(classes), top=min(top, len(classes)), kind=kind_of(out, as_json=as_json))
        asked: dict[str, Any] = {}
        if tta is not None:
            asked["forward"] = tta_forward(tta.value, loss=opened.config.train.loss)
            asked["flops_per_image"] = opened.flops_per_image * tta_views(tta.value)
        found = find_images(
            images, stdin=sys.stdin.buffer if "-" in images else io.BytesIO(), separator=b"\0" if null else b"\n"
        )
        total = failed = 0
        with closing(predict_images(opened, found, top=top, batch_size=batch_size, **asked)) as predictions:
            for prediction in predictions:
                total += 1
                if prediction.problem is not None:
                    failed += 1
                    warn(f"vit: {printable(prediction.path)}: {prediction.problem}")
                write(prediction)
                if out is None:
                    file.flush()  # whoever reads them on the other side of a pipe may be waiting
    if out is not None:
        warn(f"{total - failed:,} predictions written to {out}")
    if failed:
        warn(f"vit: no prediction for {failed:,} of {total:,} images")
        raise typer.Exit(1)


def as_size(text: str) -> str:
    """Turn 384 or 384x512 into what the setting takes. Raises ConfigError."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError(f"--image-size {text}: expected a number of pixels or HEIGHTxWIDTH, such as 384 or 384x512")
    return sides[0] if len(sides) == 1 else f"[{sides[0]}, {sides[1]}]"


def kind_of(out: Path | None, *, as_json: bool) -> str:
    """Say what is written: json, csv or table."""
    suffix = "" if out is None else out.suffix.lower()
    if as_json or suffix in (".jsonl", ".json", ".ndjson"):
        return "json"
    return "csv" if suffix == ".csv" else "table"


def writer(file: TextIO, classes: list[str], shown: list[str], *, top: int, kind: str) -> Write:
    """Return a function that writes a prediction; `shown` are the classes as people read them."""

    def write_json(prediction: "Prediction") -> None:
        if prediction.problem is not None:
            row: dict[str, Any] = {"path": prediction.path, "error": prediction.problem}
        else:
            row = {"path": prediction.path, "top": [named(number, share) for number, share in prediction.top]}
        file.write(json.dumps(row) + "\n")

    def named(number: int, share: float) -> dict[str, Any]:
        name = {} if shown[number] == classes[number] else {"name": shown[number].removeprefix(f"{classes[number]} ")}
        return {"class": classes[number], **name, "probability": share}

    def write_table(prediction: "Prediction") -> None:
        path, problem = printable(prediction.path), prediction.problem
        lines = [f"{100 * share:6.2f} %  {printable(shown[number])}" for number, share in prediction.top]
        lines = lines or [f"       -  {problem}"]
        file.write(f"{lines[0]}  {path}\n" if top == 1 else "".join([f"{path}\n", *(f"  {line}\n" for line in lines)]))

    rows = csv.writer(file, lineterminator="\n")

    def write_csv(prediction: "Prediction") -> None:
        cells = [cell for number, share in prediction.top for cell in (shown[number], f"{share:.6g}")]
        cells += [""] * (2 * top - len(cells))
        rows.writerow([printable(prediction.path), *cells, prediction.problem or ""])

    if kind == "json":
        return write_json
    if kind == "table":
        return write_table
    rows.writerow(["path", *(f"{what}_{place}" for place in range(1, top + 1) for what in ("class", "probability")), "error"])
    return write_csv


def printable(text: str) -> str:
    """Write what a terminal or a text file cannot show, or would obey, as escapes."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
