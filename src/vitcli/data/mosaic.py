"""A second embedded corpus: what makes a class is only where things stand (source `mosaic`).

All classes share one small set of parts. A class is a layout: which part lies in each cell of a grid; an image keeps each
of them with some probability, else has a random one there, and the layout may lie some pixels off the grid. So no part, colour
or texture tells a class, and neither does any neighbourhood alone: evidence is spread over the image and bound to places. That
is what a study of inductive bias needs; it is no likeness of photographs. Parts, instances and painting are those of `shapes`;
image and label are a pure function of (seed, split, index), and a smaller corpus is a prefix of a larger one.
"""

import hashlib
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from vitcli.data.painting import (
    JITTER_DRAWS,
    NOISE_BANK,
    PART_DRAWS,
    Canvas,
    Floats,
    PaintedSource,
    Scenes,
    Things,
    muted,
    pack,
    place,
    plane_period,
    things_from,
    vary,
)
from vitcli.randomness import derive_seed, normal, uniform

__all__ = ["MosaicSource"]

# One shape legend: B images, T cells of the canvas (a grid of one cell more than the image's where the layout may move).
VERSION = 1  # of the images: raise it whenever a pixel changes, so that no result is taken for one on the new images
MOSAICS_AT_ONCE = 64  # images whose numbers are derived together
IMAGE_DRAWS = 18  # uniform numbers that make an image's offset, light, background and noise
CELL_DRAWS = 5  # and those of each cell
SPREAD = 0.25  # how far a part lies from the middle of its cell, in half cells
SIZE = 1.5  # of a part in its cell, of what `things_from` makes


class MosaicSource(PaintedSource):
    """The corpus of layouts as a map-style source: any example of any split, made on request.

    Classes are balanced in every run of `classes` consecutive examples; both splits show the same layouts; class k of one seed
    is the same layout however many classes there are.

    Args:
        classes: 2 to 21,000.
        examples: length; examples 0 to n-1 are the same for every length of n or more.
        image_size: (height, width), px; multiples of `grid`.
        seed: another seed is another corpus.
        split: "train" or "val".
        grid: cells along each side.
        parts: different ones.
        keep: how often a cell shows its layout's part, in (0, 1].
        shift: px by which a layout may lie off the grid, downwards and to the right, at most a cell.
        first: the number of the first layout. Two sources that share none are two tasks of one world: the same parts stand in
            other places, which is what transfer from one to the other is about.
    """

    def __init__(
        self,
        *,
        classes: int,
        examples: int,
        image_size: tuple[int, int],
        seed: int,
        split: str,
        grid: int,
        parts: int,
        keep: float,
        shift: int,
        first: int = 0,
    ) -> None:
        cell = (image_size[0] // grid, image_size[1] // grid)
        if any(side % grid for side in image_size) or min(cell) < 4:
            raise ValueError(f"image_size must be multiples of the grid's {grid} cells, 4 px or more each, got {image_size}")
        if not 0 <= shift <= min(cell):
            raise ValueError(f"shift must be 0 to {min(cell)} px, a cell, got {shift}")
        super().__init__(
            name="mosaic",
            version=VERSION,
            classes=[f"layout_{k:05d}" for k in range(first, first + classes)],
            examples=examples,
            image_size=image_size,
            seed=seed,
            split=split,
            at_once=MOSAICS_AT_ONCE,
        )
        self.name = f"mosaic:{first}" if first else self.name
        self.cell, self.grid, self.shift, self.keep, self.parts, self.first = cell, grid, shift, keep, parts, first
        self.side = grid + (shift > 0)  # cells along each side of the canvas
        own = (first,) if first else ()  # no seed is another one for it where the layouts are the first
        identity = (VERSION, seed, split, classes, examples, image_size, grid, parts, keep, shift, *own)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        part_seed, self.layout_seed = (derive_seed(*self.identity, use) for use in ("parts", "layouts"))
        self.image_seed, self.cell_seed, self.jitter_seed = (
            derive_seed(*self.split_identity, use, *own) for use in ("image", "cell", "jitter")
        )
        self.vocabulary = things_from(uniform(part_seed, np.arange(parts), PART_DRAWS))  # fields are (parts,) or (parts, n)
        self.canvas = Canvas(
            cell,
            period=plane_period(image_size),
            fractal_seed=derive_seed(*self.identity, "fractal"),
            grain_seed=derive_seed(*self.identity, "grain"),
        )

    def layout_of(self, labels: ArrayLike) -> NDArray[np.int64]:
        """Return the parts, (B, grid x grid) row by row, of classes (B,)."""
        return (uniform(self.layout_seed, np.asarray(labels) + self.first, self.grid**2) * self.parts).astype(np.int64)

    def paint(self, i: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Paint examples (B,) with these labels, uint8 (B, H, W, 3): the canvas cell by cell, then the part of it in sight."""
        B, side, (high, wide) = len(i), self.side, self.cell
        u = uniform(self.image_seed, i, IMAGE_DRAWS)
        cells = uniform(self.cell_seed, i, side * side * CELL_DRAWS).reshape(B, side * side, CELL_DRAWS)
        shown = self.shown_parts(labels, cells)
        painted = self.canvas.paint_all(self.scenes(i, shown, u, cells))  # (B T, high, wide, 3)
        whole = (
            painted.reshape(B, side, side, high, wide, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, side * high, side * wide, 3)
        )
        if not self.shift:
            return whole
        # An arrangement that lies `offset` further down and to the right shows that much of what is above and left of it.
        top, left = ((self.cell[axis] - (u[:, axis] * (self.shift + 1)).astype(np.int64)) for axis in (0, 1))
        windows = sliding_window_view(whole, self.image_size, axis=(1, 2))  # (B, ..., ..., 3, H, W), not copied
        return windows[np.arange(B), top, left].transpose(0, 2, 3, 1)

    def shown_parts(self, labels: NDArray[np.int64], cells: Floats) -> NDArray[np.int64]:
        """Return which part is in each cell of the canvas, (B, T); the layout lies in its lower right, the rest is random."""
        B, side = len(labels), self.side
        random = (cells[:, :, 0] * self.parts).astype(np.int64)
        layout = np.full((B, side, side), -1)
        layout[:, side - self.grid :, side - self.grid :] = self.layout_of(labels).reshape(B, self.grid, self.grid)
        wanted = layout.reshape(B, side * side)
        return np.where((cells[:, :, 1] < self.keep) & (wanted >= 0), wanted, random)

    def scenes(self, i: NDArray[np.int64], shown: NDArray[np.int64], u: Floats, cells: Floats) -> Scenes:
        """Return the numbers that the cells of all canvases, B x T of them, are painted from."""
        B, T = shown.shape
        chosen: dict[str, Any] = {each.name: getattr(self.vocabulary, each.name)[shown] for each in fields(Things)}
        z = normal(self.jitter_seed, i, T * JITTER_DRAWS).reshape(B, T, JITTER_DRAWS)
        things = vary(Things(**{**chosen, "centre": np.zeros((B, T, 2))}), z, np.ones((B, T), bool))
        light = 0.2 * (u[:, None, 2:5] - 0.5)
        layers = pack_cells(things, cells, light, pixels=self.canvas.pixels)

        first, second = muted(u[:, 5:8]), muted(u[:, 8:11])
        down, across = np.divmod(np.arange(T), self.side)
        # the same background runs through all cells of an image
        corners = (u[:, None, 11:15] * self.canvas.period).astype(np.int64) + 0 * down[None, :, None]
        corners[:, :, 0] += down * self.cell[0]
        corners[:, :, 1] += across * self.cell[1]
        corners %= self.canvas.period

        def of_cells(values: Floats) -> NDArray[np.float32]:
            """Repeat what an image's cells share, (B, n), as (n, B T)."""
            return np.repeat(values, T, axis=0).T.astype(np.float32)

        return Scenes(
            middle=of_cells((first + second) / 2),
            swing=of_cells((first - second) / 2),
            slope=of_cells(np.zeros((B, 2))),
            grain=of_cells(0.08 * u[:, 15:16] ** 2),
            corners=np.ascontiguousarray(corners.reshape(B * T, 4).T),
            starts=(cells[:, :, 2] * NOISE_BANK).astype(np.int64).reshape(1, B * T),
            layers=layers,
        )


def pack_cells(things: Things, cells: Floats, light: Floats, *, pixels: float) -> NDArray[np.float32]:
    """Place each cell's part, (B, T), in a frame of its own and return the layers, (1, n, B T), of all cells."""
    B, T = things.phase.shape
    alone = Things(
        **{
            each.name: getattr(things, each.name).reshape(B * T, 1, *getattr(things, each.name).shape[2:])
            for each in fields(Things)
        }
    )
    rows = cells.reshape(B * T, CELL_DRAWS)
    placed = place(
        alone,
        centre=SPREAD * (2 * rows[:, 3:5] - 1),
        scale=np.full(B * T, SIZE),
        angle=np.zeros(B * T),
        flip=np.ones(B * T),
    )
    packed = pack(placed, np.repeat(light, T, axis=0).reshape(B * T, 1, 3), pixels)  # (B T, 1, n)
    return np.ascontiguousarray(packed.transpose(1, 2, 0), np.float32)
