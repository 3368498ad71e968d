"""Figures: curves, a confusion matrix, a reliability diagram; as PNG or SVG files, or as SVG inside a page.

Drawn with matplotlib's objects alone: no pyplot, so no global state and no window. Names are shown as they are, never as
mathematics, and colours are those of Okabe and Ito, told apart by everybody and legible on light and dark ground.
"""

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from vitcli.errors import UserError
from vitcli.rundir import write_bytes

__all__ = [
    "Panel",
    "draw_confusion",
    "draw_panels",
    "draw_reliability",
    "inline_svg",
    "pixels_of",
    "save_curves",
    "save_figure",
    "shorten",
]

Series = Mapping[str, Sequence[tuple[float, float]]]

INK, GRID = "#2b2f36", "#8b929c"
BLUE, ORANGE = "#0072b2", "#d55e00"
COLOURS = (
    BLUE,
    ORANGE,
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8c6bb1",
    "#7f7f7f",
)  # Okabe and Ito (2008), then two more
SCREEN_DPI = 100
MOST_POINTS = 600  # of a line; more of them show nothing else
MOST_NUMBERED, MOST_NAMED = 15, 40  # classes of a confusion matrix with a number in each cell, with a name at each row
SETTINGS: Any = {
    "font.size": 9,
    "text.parse_math": False,  # a class may be called $x$
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 160,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes with lines: a name and its points (x, y) each; y that are not finite are left out."""

    series: Series
    x_label: str
    y_label: str
    title: str | None = None
    percent: bool = False  # y are shares of 1, shown as per cent
    log_x: bool = False  # with a tick at each x where they are few, as of a sweep
    log_y: bool = False
    points: bool = False  # a mark at each point


# ---------------------------------------------------------------- files


def save_curves(
    path: Path,
    series: Series,
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
    percent: bool = False,
    log_x: bool = False,
    log_y: bool = False,
    points: bool = False,
) -> None:
    """Write lines, a name and its points (x, y) each, as PNG or SVG by the path's suffix; see `Panel` for the rest.

    Raises:
        UserError: another suffix, or the file cannot be written; what was there is as it was.
    """
    panel = Panel(series, x_label, y_label, title, percent=percent, log_x=log_x, log_y=log_y, points=points)
    save_figure(path, draw_panels([panel]))


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG or SVG by the path's suffix, beside its name first and then renamed.

    Raises:
        UserError: another suffix, or the file cannot be written; what was there is as it was.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise UserError(f"{path}: figures are written as PNG or SVG; name it {path.stem}.png or {path.stem}.svg")
    content = rendered(figure, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    write_bytes(path, content)


def pixels_of(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure as pixels, (H, W, 3), for a place that takes pictures alone; less fine than a file."""
    with drawing():
        figure.set_dpi(SCREEN_DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def inline_svg(figure: Figure, *, name: str, description: str) -> str:
    """Return a figure as an `<svg>` element for an HTML page: in the page's font and text colour, as wide as its place.

    Args:
        name: letters and digits; sets its ids apart from those of other figures of the page.
        description: for those who do not see it.
    """
    text = rendered(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # its `*` would mean everything in the page
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", lambda tag: for_page(tag[0], name), text)  # what stands between tags is the strangers'
    label = html.escape(shorten(description, 200))
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{label}">{rest}'


def for_page(tag: str, name: str) -> str:
    """Return a tag with ids of its own, the page's font and, for ink, the page's colour."""
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r"font(-family)?: ?([0-9.]+px )?'DejaVu Sans'[^;\"]*", kept_size, tag)
    tag = re.sub(rf"(: ?){BLUE}", rf"\g<1>var(--blue, {BLUE})", tag)  # which may be brighter on dark ground
    return re.sub(INK, "currentColor", tag, flags=re.IGNORECASE)


def kept_size(found: re.Match[str]) -> str:
    """Leave of a CSS font its size."""
    return f"font-size: {found[2].strip()}" if found[2] else "font-family: inherit"


def rendered(figure: Figure, kind: str) -> bytes:
    with drawing():
        # the same figure gives the same bytes
        matplotlib.rcParams["svg.hashsalt"] = "vit"
        buffer = io.BytesIO()
        plain = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, transparent=kind == "svg", metadata=plain)
        return buffer.getvalue()


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with our settings, whatever the user's are, and without a word about letters that the font lacks."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


# ---------------------------------------------------------------- curves


def draw_panels(panels: Sequence[Panel], *, columns: int = 2) -> Figure:
    """Draw panels in rows of `columns`; a single one fills the figure."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    with drawing():
        figure = Figure(figsize=(5.2 * columns, 3.2 * rows), layout="constrained")
        for place, panel in enumerate(panels, 1):
            draw_panel(figure.add_subplot(rows, columns, place), panel)
        return figure


def draw_panel(axes: Axes, panel: Panel) -> None:
    lines, names = [], []
    for position, (name, points) in enumerate(panel.series.items()):
        x, y = thinned(points)
        # beyond the colours dashes tell the lines apart
        style = ("-", "--", ":", "-.")[position // len(COLOURS) % 4]
        marker = "o" if panel.points or len(x) == 1 else ""
        colour = COLOURS[position % len(COLOURS)]
        lines += axes.plot(x, y, style, color=colour, marker=marker, markersize=4, linewidth=1.5)
        names.append(shorten(name))
    axes.set_xlabel(shorten(panel.x_label))
    axes.set_ylabel(shorten(panel.y_label))
    if panel.title:
        axes.set_title(shorten(panel.title, 80))
    axes.grid(True)
    if panel.log_y and any(value > 0 for line in lines for value in np.asarray(line.get_ydata())):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    elif panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    if panel.log_x:
        xs = sorted({float(value) for line in lines for value in np.asarray(line.get_xdata()) if value > 0})
        axes.set_xscale("log")
        if 0 < len(xs) <= 10:
            axes.set_xticks(xs, [f"{value:g}" for value in xs])
        else:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if len(lines) > 1:
        axes.legend(lines, names, ncols=1 if len(names) <= 8 else 2)


def thinned(points: Sequence[tuple[float, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return x and y, (n,) each, in the order of x and finite; of many the means of neighbours."""
    pairs = np.array([point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])], dtype=np.float64)
    pairs = pairs.reshape(-1, 2)[np.argsort(pairs.reshape(-1, 2)[:, 0], kind="stable")]
    if len(pairs) > MOST_POINTS:
        group = math.ceil(len(pairs) / MOST_POINTS)
        starts = np.arange(0, len(pairs), group)
        sizes = np.diff(np.append(starts, len(pairs)))
        pairs = np.add.reduceat(pairs, starts) / sizes[:, None]
    return pairs[:, 0], pairs[:, 1]


# ---------------------------------------------------------------- matrices and calibration


def draw_confusion(matrix: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Draw how often an image of a class (row) was taken for another (column), (K, K).

    A cell's shade is its share of the row: right ones blue, mistakes orange by the root of the share, so that rare ones show.
    """
    count = len(classes)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    pixels = np.zeros((count, count, 4))
    pixels[..., :3] = rgb(ORANGE)
    pixels[..., 3] = 0.85 * np.sqrt(shares)
    right = np.arange(count)
    pixels[right, right, :3] = rgb(BLUE)
    pixels[right, right, 3] = 0.75 * shares[right, right]
    side = 5.2 if count <= MOST_NUMBERED else max(5.2, 1.6 + 0.17 * count) if count <= MOST_NAMED else 6.0
    with drawing():
        figure = Figure(figsize=(side, 0.94 * side), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(pixels, interpolation="nearest", aspect="equal")
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")
        axes.spines[:].set_visible(False)
        if count <= MOST_NAMED:
            names = [shorten(name, 14) for name in classes]
            axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0)
            axes.set_yticks(range(count), names)
        axes.tick_params(length=0)
        if count <= MOST_NUMBERED:
            size = 8 if count <= 10 and matrix.max() < 10_000 else 6
            for row, column in np.argwhere(matrix > 0).tolist():
                number = int(matrix[row, column])
                axes.text(column, row, f"{number}", ha="center", va="center", fontsize=size)
        return figure


def draw_reliability(
    confidences: NDArray[np.float64], accuracies: NDArray[np.float64], counts: NDArray[np.int64], *, title: str | None = None
) -> Figure:
    """Draw how right a model is where it is how sure, and how often it is that sure.

    Args:
        confidences: mean of each of B equal parts of [0, 1], (B,); what stands for an empty part is not looked at.
        accuracies: share that was right, (B,).
        counts: images, (B,).
    """
    bins, filled = len(counts), counts > 0
    edges = np.linspace(0.0, 1.0, bins + 1)
    with drawing():
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], "--", color=GRID, linewidth=1)
        where = edges[:-1][filled]
        above.bar(where, accuracies[filled], width=1 / bins, align="edge", color=BLUE, alpha=0.55, linewidth=0)
        above.plot(confidences[filled], accuracies[filled], "o-", color=ORANGE, markersize=3.5, linewidth=1)
        above.set_ylabel("right")
        above.set_ylim(0, 1)
        below.bar(edges[:-1], counts / max(1, int(counts.sum())), width=1 / bins, align="edge", color=GRID, linewidth=0)
        below.set_ylabel("images")
        below.set_xlabel("confidence in the first guess")
        below.set_xlim(0, 1)
        for axes in (above, below):
            axes.grid(True)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        if title:
            above.set_title(title)
        return figure


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def shorten(name: str, most: int = 40) -> str:
    """Return a name in one line of at most `most` characters, what cannot be printed replaced; never with a leading _.

    A legend leaves out names that begin so.
    """
    plain = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    plain = plain if len(plain) <= most else f"{plain[: most - 1]}…"
    return f" {plain}" if plain.startswith("_") else plain
