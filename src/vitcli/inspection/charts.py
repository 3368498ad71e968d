"""Figures of what was measured of a model: filters, positions, attention distances, lengths, CKA, receptive fields."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from vitcli.figures import BLUE, COLOURS, GRID, ORANGE, drawing, shorten
from vitcli.inspection.embeddings import position_similarity, spread_places
from vitcli.inspection.fields import field_radius
from vitcli.inspection.sheet import Sheet
from vitcli.inspection.tokens import OUTLIER, Lengths
from vitcli.inspection.views import Fields

__all__ = [
    "draw_alike",
    "draw_distances",
    "draw_fields",
    "draw_filters",
    "draw_lengths",
    "draw_positions",
    "draw_reach",
    "ticks",
]

Floats = NDArray[np.float64]
MOST_CELLS = 16  # of a grid of grids, along a side
MOST_TICKS = 16
FIELD_PX = 256  # the longest side of a receptive field that is drawn


def draw_filters(components: Floats, shares: Floats) -> Figure:
    """Draw principal components of filters (n, 3, h, w) as colours, grey where they are 0, and their shares of variance."""
    columns = min(7, len(components))
    tall = components.shape[2] / components.shape[3]
    with drawing():
        sheet = Sheet(-(-len(components) // columns), columns, cell=0.8, tall=tall, above=1)
        for place, (component, share) in enumerate(zip(components.transpose(0, 2, 3, 1), shares, strict=True)):
            picture = 0.5 + 0.5 * component / max(float(np.abs(component).max()), 1e-12)
            sheet.put(*divmod(place, columns), picture, title=f"{100 * share:.2g} %")
        return sheet.figure


def draw_positions(positions: Floats, grid_size: tuple[int, int]) -> Figure:
    """Draw, for each place of the grid, how similar the positions (P, D) of all places are to its own: a grid of grids."""
    rows, columns = spread_places(grid_size, most=MOST_CELLS)
    asking = (rows[:, None] * grid_size[1] + columns).ravel()
    found = position_similarity(positions, asking).reshape(len(rows), len(columns), *grid_size)
    gap = max(1, round(max(grid_size) / 8))
    mosaic = np.full((len(rows) * (grid_size[0] + gap) - gap, len(columns) * (grid_size[1] + gap) - gap), np.nan)
    tops, lefts = (np.arange(len(some)) * (side + gap) for some, side in zip((rows, columns), grid_size))
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            mosaic[top : top + grid_size[0], left : left + grid_size[1]] = found[row, column]
    with drawing():
        figure = Figure(figsize=(5.4, 4.7 * mosaic.shape[0] / mosaic.shape[1] + 0.3), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(mosaic, vmin=-1, vmax=1, cmap="viridis", interpolation="none")
        axes.set_xticks(lefts + (grid_size[1] - 1) / 2, [f"{one + 1}" for one in columns])
        axes.set_yticks(tops + (grid_size[0] - 1) / 2, [f"{one + 1}" for one in rows])
        axes.set_xlabel("input patch column")
        axes.set_ylabel("input patch row")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, shrink=0.85, label="cosine similarity")
        bar.outline.set_visible(False)
        return figure


def draw_distances(distances: Floats, names: Sequence[str], *, uniform: float, width: int) -> Figure:
    """Draw the mean attention distance of each head (layers, heads), px, by layer; `uniform` is attention to all alike."""
    layers, heads = distances.shape
    with drawing():
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        places = np.arange(1, layers + 1)
        axes.axhline(uniform, color=GRID, linestyle="--", linewidth=1.1, zorder=1)
        axes.set_title("dashed: attention to all patches alike", fontsize=8.5, loc="right")
        axes.plot(np.repeat(places, heads), distances.ravel(), "o", color=BLUE, markersize=5, alpha=0.65, markeredgewidth=0)
        axes.plot(places, distances.mean(1), "-", color=ORANGE, linewidth=1.5)
        axes.set_ylabel("mean attention distance, px")
        axes.set_xlabel(f"layer (dots: its {heads} heads; line: their mean)")
        axes.set_ylim(0, max(uniform, float(distances.max())) * 1.12)
        axes.set_xlim(0.5, layers + 0.5)
        ticks(axes, [name.removeprefix("block ") for name in names], at=places, along="x")
        axes.grid(True)
        share = axes.secondary_yaxis(
            "right", functions=(lambda px: as_share(px, width), lambda share: as_share(share, 1 / width))
        )
        share.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        share.set_ylabel("of the image's width")
        share.spines["right"].set_visible(False)
        return figure


def as_share(px: Any, width: float) -> Any:
    """Return pixels as a share of a width."""
    return px / width


def ticks(axes: Axes, names: Sequence[str], *, at: Sequence[float] | NDArray[np.int64], along: str) -> None:
    """Name places along an axis, some of them where they are many."""
    chosen = np.unique(np.linspace(0, len(names) - 1, min(len(names), MOST_TICKS)).round().astype(int))
    set_ticks = axes.set_xticks if along == "x" else axes.set_yticks
    set_ticks([float(at[one]) for one in chosen], [shorten(names[one], 14) for one in chosen])


def short_names(names: Sequence[str]) -> list[str]:
    """Return layers' names as ticks: blocks by their numbers, units with a u."""
    short = {"embedding": "emb", "root": "root"}
    return [short.get(name, name.replace("block ", "").replace("unit ", "u")) for name in names]


def draw_lengths(lengths: Sequence[Lengths], names: Sequence[str], before: Sequence[str]) -> Figure:
    """Draw how long the tokens of each layer are: the patches' quantiles, the class token and registers, and outliers."""
    places = np.arange(len(lengths))
    quantiles = {name: np.array([each.quantiles[name] for each in lengths]) for name in lengths[0].quantiles}
    with drawing():
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.fill_between(places, quantiles["1 %"], quantiles["99 %"], color=BLUE, alpha=0.2, linewidth=0, label="1 to 99 %")
        above.plot(places, quantiles["50 %"], "o-", color=BLUE, markersize=3.5, label="patches, median")
        above.plot(places, quantiles["100 %"], "^", color=BLUE, markersize=4, label="longest patch", alpha=0.8)
        for number, name in enumerate(before):
            values = [each.before[number] for each in lengths]
            above.plot(places, values, "s--", color=COLOURS[1 + number % 7], markersize=3.5, linewidth=1.2, label=name)
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        above.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        above.set_ylabel("length of a token")
        above.legend(ncols=2)
        shares = np.array([each.outliers for each in lengths])
        below.bar(places, shares, color=ORANGE, width=0.6, linewidth=0)
        below.set_ylim(0, max(0.01, float(shares.max()) * 1.15))
        if not shares.any():
            below.text(0.5, 0.5, "none", transform=below.transAxes, ha="center", va="center")
        below.set_ylabel(f"over {OUTLIER:g} ×\nthe median")
        below.yaxis.set_major_locator(MaxNLocator(3))
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        ticks(below, short_names(names), at=places, along="x")
        below.set_xlabel("layer")
        for axes in (above, below):
            axes.grid(True)
        return figure


def draw_alike(alike: Floats, rows: Sequence[str], columns: Sequence[str], *, of: str, against: str | None) -> Figure:
    """Draw CKA of layers with layers, (I, J), the first layers at the lower left."""
    tall = alike.shape[0] / alike.shape[1]
    with drawing():
        figure = Figure(figsize=(5.0, float(np.clip(4.1 * tall, 2.2, 8.0)) + 0.2), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(alike, vmin=0, vmax=1, cmap="magma", interpolation="none", origin="lower", aspect="equal")
        ticks(axes, short_names(columns), at=np.arange(alike.shape[1]), along="x")
        ticks(axes, short_names(rows), at=np.arange(alike.shape[0]), along="y")
        if max(map(len, short_names(columns))) * len(columns) > 44:
            axes.tick_params(axis="x", rotation=90)
        axes.set_xlabel(f"layer of {shorten(against or of, 44)}")
        axes.set_ylabel(f"layer of {shorten(of, 44)}" if against else "layer")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if alike.size <= 100:
            for (row, column), value in np.ndenumerate(alike):
                if np.isfinite(value):
                    ink = "white" if value < 0.6 else "#101010"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
        bar = figure.colorbar(image, ax=axes, shrink=0.85, label="CKA")
        bar.outline.set_visible(False)
        return figure


def draw_fields(models: Sequence[Fields]) -> Figure:
    """Draw effective receptive fields: a row for each model, its layers from left to right; a circle holds half of a field."""
    columns = max(len(each.fields) for each in models)
    height, width = models[0].fields[0].shape
    with drawing():
        sheet = Sheet(len(models), columns, cell=1.4, tall=height / width, above=3)
        for row, model in enumerate(models):
            sheet.say(row, shorten(model.name, 70))
            for column, (name, centre, field) in enumerate(zip(model.layers, model.centres, model.fields, strict=True)):
                shown = field**0.25  # of a squared length: its plain root shows the nearest pixels alone
                scale = max(1, round(max(shown.shape) / FIELD_PX))
                radius = field_radius(field, centre, share=0.5)
                title = f"{name}\n{radius:.1f} px"
                sheet.put(row, column, shown[::scale, ::scale] / max(float(shown.max()), 1e-300), title=title)
                sheet.ring(row, column, centre, max(radius, 0.5), field.shape)
        return sheet.figure


def draw_reach(models: Sequence[Fields]) -> Figure:
    """Draw within which radius half, and nine tenths, of a receptive field lie, over the depth of each model."""
    with drawing():
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for number, model in enumerate(models):
            for share, style in ((0.5, "-"), (0.9, "--")):
                radii = radii_of(model, share)
                label = f"{shorten(model.name, 34)}: {100 * share:.0f} %"
                axes.plot(
                    model.depths, radii, style, color=COLOURS[number], marker="o", markersize=4, linewidth=1.5, label=label
                )
        axes.set_xlabel("depth, from the first layer to the last")
        axes.set_ylabel("radius, share of the image's width")
        axes.set_ylim(bottom=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.grid(True)
        axes.legend()
        return figure


def radii_of(model: Fields, share: float) -> list[float]:
    """Return the radius that holds a share of each of a model's fields, as a share of the image's width."""
    found = zip(model.fields, model.centres, strict=True)
    return [field_radius(field, centre, share=share) / field.shape[1] for field, centre in found]
