"""What a study's figures share: logarithmic axes with ticks that read 1k, 10k, 1M, lines named where they end, panels.

Nothing in here knows of a study.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from vitcli.figures import shorten

__all__ = [
    "FULL",
    "End",
    "compact",
    "end_labels",
    "log_error",
    "log_flops",
    "log_images",
    "panels",
    "per_cent",
    "points",
    "spread",
]

FULL = (5.2, 3.5)  # inches of one pair of axes; at 9 points of lettering it prints in a column and a half
PANEL = (2.6, 2.5)  # of one among several
LABEL_POINTS = 8.5
LINE = 1.25  # times the lettering, from one label to the next
LETTERS, LETTER = 40, 0.065  # of a label beside a line, and the width of one, inches
NEAREST_TICKS = 0.085  # of the axis: nearer ones run into each other
SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
FLOPS = ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))


class End(NamedTuple):
    """The end of a line: where it is, its name and its colour."""

    y: float
    name: str
    colour: str


# ---------------------------------------------------------------- numbers


def compact(number: float) -> str:
    """Write a number in at most three digits: 800, 31.2k, 1.28M."""
    for size, suffix in SUFFIXES:
        if float(f"{number:.3g}") >= size:
            return f"{float(f'{number / size:.3g}'):g}{suffix}"
    return f"{number:.3g}"


def round_ticks(low: float, high: float) -> list[float]:
    """Return round numbers of [low, high], 0 < low < high, at most 7: of a wide range few of every power of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leading in ((1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in powers for digit in leading]
        found = [tick for tick in found if low * 0.999 <= tick <= high * 1.001]
        if len(found) <= 7:
            break
    if len(found) < 2:  # a narrow range between round numbers
        return evenly(low, high)
    return found[:: math.ceil(len(found) / 7)]


def evenly(low: float, high: float) -> list[float]:
    """Return at most 6 round numbers of [low, high] in equal steps."""
    return [float(tick) for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]


def chosen_ticks(values: Sequence[float], low: float, high: float, *, nearest: float) -> list[float]:
    """Return `values` as ticks of a logarithmic axis, every second or third of them if they stand too near, or round numbers.

    Args:
        nearest: share of the axis that two ticks are apart.
    """
    span = math.log(high / low)
    for every in (1, 2, 3):
        taken = values[(len(values) - 1) % every :: every]  # the last is among them
        if all(math.log(b / a) / span >= nearest for a, b in itertools.pairwise(taken)):
            return list(taken)
    return round_ticks(low, high)


# ---------------------------------------------------------------- axes


def log_images(axes: Axes, sizes: Sequence[float], *, also: Sequence[float] = (), few: bool = False) -> None:
    """Make x logarithmic, in images, with a tick at every size where there is room.

    Args:
        sizes: ascending, positive.
        also: further values that must lie on it, which get no tick.
        few: there is room for a few ticks only, in one of several panels.
    """
    everything = [*sizes, *also]
    low, high = min(everything), max(everything)
    room = (high / low) ** 0.05 if high > low else 2.0
    low, high = low / room, high * room
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = chosen_ticks(sizes, low, high, nearest=NEAREST_TICKS * (2 if few else 1))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([compact(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("pretraining images")


def log_flops(axes: Axes, values: Sequence[float]) -> None:
    """Make x logarithmic, in a fitting unit of FLOPs."""
    low, high = min(values), max(values)
    room = (high / low) ** 0.06 if high > 1.5 * low else 1.5
    low, high = low / room, high * room
    unit, name = next((pair for pair in FLOPS if pair[0] <= high), FLOPS[-1])
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = round_ticks(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick / unit:,.3g}" for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"training {name}")


def log_error(axes: Axes, errors: Sequence[float]) -> None:
    """Make y logarithmic, errors in per cent."""
    low, high = min(errors), max(errors)
    room = max((high / low) ** 0.08, 1.05)
    low, high = low / room, high * room
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = round_ticks(low, high)
    if len(ticks) < 3:
        ticks = evenly(low, high)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{100 * tick:.3g} %" for tick in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True)


def per_cent(axes: Axes, *, x: bool = False) -> None:
    """Show shares of 1 as per cent and keep the axis within what shares can be."""
    axis = axes.xaxis if x else axes.yaxis
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g} %"))
    low, high = axes.get_xlim() if x else axes.get_ylim()
    limits = (max(low, -0.01), min(high, 1.01))
    axes.set_xlim(*limits) if x else axes.set_ylim(*limits)
    axes.grid(True)


def points(axes: Axes, *, x: bool = False) -> None:
    """Show differences of shares as percentage points with their sign."""
    axis = axes.xaxis if x else axes.yaxis
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(signed))
    axes.grid(True)


def signed(value: float, _: object = None) -> str:
    """Write a difference of shares in points."""
    return "0" if abs(value) < 1e-9 else f"{100 * value:+.10g}".replace("-", "\N{MINUS SIGN}")


# ---------------------------------------------------------------- panels and names


def panels(count: int, *, columns: int, shared_y: Literal["all", "row"] = "all") -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels in rows, with the same axes, or of y those of their row."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    width, height = PANEL
    figure = Figure(figsize=(max(FULL[0] * 0.7, width * columns + 0.5), height * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=shared_y, squeeze=False)
    flat: list[Axes] = list(grid.flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    for axes in flat[:count]:
        axes.tick_params(labelbottom=True)  # the last row may have empty places below it
    return figure, flat[:count]


def end_labels(figure: Figure, ends: Mapping[Axes, Sequence[End]]) -> None:
    """Write the names of lines to the right of their axes, apart from each other; the last thing to do to a figure."""
    longest = max((len(shorten(end.name, LETTERS)) for all_of_them in ends.values() for end in all_of_them), default=0)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + longest * LETTER, height)  # so that the axes keep their width
    figure.draw_without_rendering()  # only now it is known how high they are
    for axes, all_of_them in ends.items():
        high = axes.bbox.height / figure.dpi * 72  # points
        left = axes.get_xlim()[0]
        shown = axes.transData.transform([(left, end.y) for end in all_of_them]) if all_of_them else np.empty((0, 2))
        placed = axes.transAxes.inverted().transform(shown)[:, 1].tolist()
        for end, wanted, y in zip(all_of_them, placed, spread(placed, LABEL_POINTS * LINE / high)):
            if abs(y - wanted) > 0.25 * LABEL_POINTS / high:
                axes.plot(
                    [1.0, 1.025],
                    [wanted, y],
                    color=end.colour,
                    linewidth=0.6,
                    transform=axes.transAxes,
                    clip_on=False,
                    zorder=1,
                )
            axes.text(
                1.03,
                y,
                shorten(end.name, LETTERS),
                color=end.colour,
                fontsize=LABEL_POINTS,
                va="center",
                transform=axes.transAxes,
            )


def spread(wanted: Sequence[float], apart: float) -> list[float]:
    """Return places in [0, 1] at least `apart` from each other, in the same order and as near to the wanted ones as can be.

    Least squares: neighbours that would be too near form a block around the mean of where they would be.
    """
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    blocks: list[list[float]] = []  # of wanted places, less what those below take
    for rank, place in enumerate(order):
        blocks.append([wanted[place] - rank * apart])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    settled = [float(np.mean(block)) for block in blocks for _ in block]
    room = max(0.0, 1 - apart * (len(wanted) - 1))
    found = [0.0] * len(wanted)
    for rank, place in enumerate(order):
        found[place] = min(max(settled[rank], 0.0), room) + rank * apart
    return found
