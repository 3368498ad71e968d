"""`vit inspect`: a model looked at from the inside; figures, the page and the numbers, written into a folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitcli.errors import UserError
from vitcli.figures import save_figure
from vitcli.inspection.gallery import FIGURES, gallery
from vitcli.inspection.looking import look
from vitcli.inspection.numbers import numbers
from vitcli.inspection.page import GENERATOR, render
from vitcli.inspection.samples import Samples, file_samples, source_samples
from vitcli.inspection.words import Inspection
from vitcli.opened import OpenedModel, open_model, open_split
from vitcli.plan import describe_model
from vitcli.rundir import write_json, write_text
from vitcli.weights.open import open_weights

__all__ = ["Asked", "inspect"]

Say = Callable[[str], None]

PAGE, NUMBERS = "index.html", "inspection.json"


@dataclass(frozen=True)
class Asked:
    """What a user asked for."""

    ckpt: Path
    images: Sequence[str] = ()
    dataset: str | None = None
    against: Path | None = None
    examples: int = 128
    pictures: int = 4
    overrides: Sequence[str] = ()
    kind: Literal["png", "svg"] = "png"


def inspect(asked: Asked, *, out: Path, say: Say) -> dict[str, Any]:
    """Look at a model, write figures, page and numbers into `out`, and return the numbers.

    Without images, and from weights that do not say what they were trained on, only the weights are looked at.

    Raises:
        UserError: the model or the images cannot be opened, or `out` holds something else.
    """
    refuse_other_folder(out)
    opened, samples = open_all(asked, say=say)
    against = None
    if asked.against is not None:
        if samples is None:
            raise UserError(f"{asked.against}: models are compared on images; give some with --images or --dataset")
        against = open_model(asked.against, dataset="images", head=False, say=say)
    if samples is not None:
        say(f"looking at {samples.description}")
    result = look(opened, samples, against=against, say=say)
    return write(result, out=out, kind=asked.kind)


def open_all(asked: Asked, *, say: Say) -> tuple[OpenedModel, Samples | None]:
    """Open the model and the images it is looked at with, if there are any."""
    dataset = asked.dataset
    if asked.images or (dataset is None and open_weights(asked.ckpt).manifest["source"] is None):
        dataset = "images"
    opened = open_model(asked.ckpt, dataset=dataset, overrides=asked.overrides, head=False, say=say)
    if asked.images:
        return opened, file_samples(asked.images, most=asked.examples, pictures=asked.pictures, say=say)
    if dataset == "images":
        say(f"{asked.ckpt}: does not say which images it knows, and none were given (--images, --dataset): weights alone")
        return opened, None
    opened, source = open_split(opened, "val", labels=False)  # images are looked at, not judged
    return opened, source_samples(source, most=asked.examples, pictures=asked.pictures)


def name_of(ckpt: Path) -> str:
    """Return a model's name: its run's or file's."""
    return ckpt.name or str(ckpt)


def refuse_other_folder(out: Path) -> None:
    """Raise UserError if a folder holds something that `vit inspect` did not write."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: this is a file; --out takes a folder")
    if out.is_dir() and any(out.iterdir()):
        try:
            with open(out / PAGE, "rb") as file:
                ours = GENERATOR.encode() in file.read(4096)
        except OSError:
            ours = False
        if not ours:
            raise UserError(f"{out}: holds something that is no inspection; choose another --out")


def write(result: Inspection, *, out: Path, kind: str) -> dict[str, Any]:
    """Write figures, numbers and, last, the page; figures of an earlier inspection that are no more are deleted."""
    pictures = gallery(result)
    opened = result.opened
    about = numbers(result)
    page = render(
        pictures,
        name=name_of(opened.ckpt),
        headline=describe_model(opened.config.model, opened.config.data.image_size),
        images="Weights alone: no images were looked at."
        if result.samples is None
        else f"Looked at {result.samples.description}.",
        notes=result.notes(),
    )
    about["figures"] = [f"{picture.name}.{kind}" for picture in pictures]
    for picture in pictures:
        save_figure(out / f"{picture.name}.{kind}", picture.figure)
    for name in {f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")} - set(about["figures"]):
        (out / name).unlink(missing_ok=True)
    write_json(out / NUMBERS, about)
    write_text(out / PAGE, page.encode("utf-8", "replace").decode("utf-8"))
    return about
