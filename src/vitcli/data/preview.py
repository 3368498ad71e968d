"""Contact sheets: what a source holds, and what augmentation makes of it, as one labelled picture."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vitcli.data.painting import PaintedSource
from vitcli.data.protocol import Source
from vitcli.data.transforms import TrainTransform
from vitcli.randomness import derive_seed, permute

__all__ = ["contact_sheet", "preview"]

CELL = 96  # px, side of a picture on the sheet
CAPTION = 16  # px, height of the line below it
GAP = 4  # px
LOOKED_AT = 2000  # examples made to find some of each class, where labels are computed


def preview(
    source: Source, *, rows: int = 8, columns: int = 8, transform: TrainTransform | None = None, seed: int = 0
) -> Image.Image:
    """Draw a sheet of examples: a row for each of `rows` classes spread over all, `columns` examples of each.

    Args:
        transform: below each row, show the same images after this augmentation; an image that stands there twice, because its
            class has too few, is augmented differently each time.
    """
    picked = pick(source, rows=rows, columns=columns, seed=seed)
    images, captions = [], []
    for start in range(0, len(picked), columns):
        examples = [source[index] for index in picked[start : start + columns].tolist()]
        images += [image for image, _ in examples]
        captions += [source.classes[label] for _, label in examples]
        if transform is not None:
            for position, (image, _) in enumerate(examples, start):
                epochs, indices = np.array([position]), picked[position : position + 1]
                tensor = transform([image], seed=seed, epochs=epochs, indices=indices)
                images.append(tensor[0].permute(1, 2, 0).numpy())
            captions += ["augmented"] * len(examples)
    return contact_sheet(images, captions, columns=columns)


def pick(source: Source, *, rows: int, columns: int, seed: int) -> NDArray[np.int64]:
    """Choose the indices to show, (n,)."""
    if len(source.classes) == 1:  # as many rows of it as there are different images for
        columns *= min(rows, max(1, len(source) // columns))
    labels = source.labels
    if isinstance(source, PaintedSource):  # in every block of as many examples as classes each class comes once
        labels = source.label_of(np.arange(min(len(source), columns * len(source.classes))))
    elif labels is None:  # computed by a part of a mix: look at some
        labels = np.array([source[index][1] for index in range(min(len(source), LOOKED_AT))])
    shown = np.unique(np.linspace(0, len(source.classes) - 1, rows).astype(np.int64))
    picked = []
    for label in shown.tolist():
        members = np.flatnonzero(labels == label)
        if len(members):
            order = permute(np.arange(min(columns, len(members))), len(members), derive_seed(seed, "preview", label))
            picked.append(np.resize(members[order], columns))  # repeats them when there are too few
    return np.concatenate(picked)


def contact_sheet(images: Sequence[NDArray[np.uint8]], captions: Sequence[str], *, columns: int) -> Image.Image:
    """Draw images (H, W, 3) of any size in a grid, each with its caption below; pixels enlarged, not smoothed."""
    rows = -(-len(images) // columns)
    across, down = CELL + GAP, CELL + CAPTION + GAP
    sheet = Image.new("RGB", (columns * across + GAP, rows * down + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for i, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + i % columns * across, GAP + i // columns * down
        picture = Image.fromarray(pixels)
        scale = CELL / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BILINEAR)
        sheet.paste(picture, (left, top))
        while caption and pen.textlength(caption, font=font) > CELL:
            caption = caption[:-1]
        pen.text((left, top + CELL + 1), caption, fill="black", font=font)
    return sheet
