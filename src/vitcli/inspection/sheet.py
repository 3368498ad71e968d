"""A sheet of pictures: equal cells with words above and below, on one pair of axes, as many are slow to lay out."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from numpy.typing import NDArray

from vitcli.figures import INK

__all__ = ["Sheet"]

GAP, LINE = 0.05, 0.15  # inches between cells, and for a line of words
WORDS = 7.5  # points


class Sheet:
    """A figure of cells; make it inside `figures.drawing`.

    Args:
        cell: width of a picture, inches.
        tall: its height, of its width.
        above: lines of words above each cell, or with `head` above the first row alone.
        below: lines below each cell.
    """

    def __init__(
        self, rows: int, columns: int, *, cell: float, tall: float = 1.0, above: int = 0, head: int = 0, below: int = 0
    ) -> None:
        self.cell, self.height = cell, cell * tall
        self.above, self.top = above * LINE, head * LINE
        self.step = self.above + self.height + below * LINE + GAP
        size = columns * (cell + GAP) + GAP, self.top + rows * self.step + GAP
        self.figure = Figure(figsize=size)
        self.axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.axes.set_axis_off()
        self.axes.set_xlim(0, size[0])
        self.axes.set_ylim(size[1], 0)

    def put(
        self, row: int, column: int, picture: NDArray[np.uint8] | NDArray[np.float64], *, title: str = "", below: str = ""
    ) -> None:
        """Put a picture (H, W, 3), or (H, W) in [0, 1] as heat, into a cell."""
        left, top = self.corner(row, column)
        self.axes.imshow(
            picture,
            extent=(left, left + self.cell, top + self.height, top),
            interpolation="none",
            aspect="auto",
            cmap="magma",
            vmin=0,
            vmax=1,
        )
        middle = left + self.cell / 2
        if title:
            self.axes.text(middle, top - 0.03, title, ha="center", va="bottom", fontsize=WORDS, linespacing=1.1)
        if below:
            self.axes.text(middle, top + self.height + 0.03, below, ha="center", va="top", fontsize=WORDS)

    def say(self, row: int, text: str) -> None:
        """Write a line above a row, before the words of its cells."""
        left, top = self.corner(row, 0)
        self.axes.text(left, top - self.above + 0.02, text, ha="left", va="top", fontsize=9, color=INK)

    def ring(self, row: int, column: int, centre: tuple[float, float], radius: float, size: tuple[int, ...]) -> None:
        """Draw a circle around a point (from the top, from the left) of a picture of `size` (H, W), all in its pixels."""
        left, top = self.corner(row, column)
        scale = self.cell / size[1]
        middle = left + centre[1] * scale, top + centre[0] * scale
        ring = Circle(middle, radius * scale, fill=False, color="white", linewidth=1.0)
        self.axes.add_patch(ring)
        box = Rectangle((left, top), self.cell, self.height, transform=self.axes.transData)
        ring.set_clip_path(box)

    def corner(self, row: int, column: int) -> tuple[float, float]:
        """Return the upper left of a cell's picture, inches from the left and from the top."""
        return GAP + column * (self.cell + GAP), self.top + row * self.step + self.above
