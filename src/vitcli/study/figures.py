"""A study's figures of one metric: what ViT (2010.11929) shows in its figures 3, 4 and 5, and the gap with its crossover.

Lines are named where they end, axes of images and FLOPs are logarithmic, intervals are those of 95 %, and a family has one
colour in all of them. With a single size there is no line to draw, so families stand below each other.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitcli.figures import COLOURS, GRID, INK, drawing, shorten
from vitcli.study.axes import FULL, End, compact, end_labels, log_error, log_flops, log_images, per_cent, points
from vitcli.study.cells import PLAIN
from vitcli.study.crossover import Crossover
from vitcli.study.stats import Estimate
from vitcli.study.summary import Curve, Mean, Summary, metric_words

__all__ = [
    *("colour_of", "curves_of", "draw_accuracy", "draw_curve", "draw_estimates", "draw_flops", "draw_gap", "draw_laws"),
    *("crossover_words", "draw_rows"),
]

FEW = 3  # families with a band each; of more, bands hide each other, and bars are drawn
MOST_REACH = 30.0  # times beyond the data that an extrapolated crossover is still drawn
DODGE = 0.008  # of the axis: bars of several lines at one size stand beside each other
BROKEN = (0, (4, 2))
RAISED = str.maketrans("0123456789.", "⁰¹²³⁴⁵⁶⁷⁸⁹·")


def colour_of(summary: Summary, family: str) -> str:
    """Return a family's colour."""
    return COLOURS[summary.families.index(family) % len(COLOURS)]


def curves_of(summary: Summary, metric: str, variant: str = PLAIN) -> dict[str, tuple[Mean, ...]]:
    """Return the curves of the families that have one, in the order of the families."""
    found = {family: summary.curve(metric, family, variant) for family in summary.families}
    return {family: curve for family, curve in found.items() if curve}


def ends_of(summary: Summary, curves: dict[str, tuple[Mean, ...]]) -> list[End]:
    return [End(curve[-1].estimate.value, family, colour_of(summary, family)) for family, curve in curves.items()]


# ---------------------------------------------------------------- accuracy


def draw_accuracy(summary: Summary, metric: str) -> Figure:
    """Draw accuracy against images by family, as figures 3 and 4 of the paper; dots are seeds."""
    curves = curves_of(summary, metric)
    sizes = sorted({mean.examples for curve in curves.values() for mean in curve})
    with drawing():
        if len(sizes) == 1:
            rows = [(family, [(curve[0], True)]) for family, curve in curves.items()]
            return draw_rows(summary, rows, f"{metric_words(metric)}, after {compact(sizes[0])} images")
        figure = Figure(figsize=FULL, layout="constrained")
        axes = figure.add_subplot()
        log_images(axes, sizes)
        for place, (family, curve) in enumerate(curves.items()):
            few = len(curves) <= FEW
            xs = dodged(axes, [mean.examples for mean in curve], 0 if few else place, 1 if few else len(curves))
            draw_curve(axes, xs, curve, colour_of(summary, family), band=few)
        axes.set_ylabel(metric_words(metric))
        per_cent(axes)
        end_labels(figure, {axes: ends_of(summary, curves)})
        return figure


def draw_flops(summary: Summary, metric: str) -> Figure:
    """Draw accuracy against training FLOPs by family, as figure 5 of the paper."""
    curves = {
        family: tuple(sorted(curve, key=lambda mean: (mean.flops, mean.examples)))
        for family, curve in curves_of(summary, metric).items()
    }
    with drawing():
        figure = Figure(figsize=FULL, layout="constrained")
        axes = figure.add_subplot()
        log_flops(axes, [mean.flops for curve in curves.values() for mean in curve])
        for family, curve in curves.items():
            grows = len(curve) == 1 or curve[-1].flops > 1.05 * curve[0].flops  # else every size had the same compute
            xs = [mean.flops for mean in curve]
            draw_curve(axes, xs, curve, colour_of(summary, family), band=False, line=grows)
        axes.set_ylabel(metric_words(metric))
        per_cent(axes)
        end_labels(figure, {axes: ends_of(summary, curves)})
        return figure


def draw_curve(
    axes: Axes,
    xs: Sequence[float],
    curve: Sequence[Mean],
    colour: str,
    *,
    band: bool,
    line: bool = True,
    filled: bool = True,
) -> None:
    """Draw means over x with their intervals.

    Args:
        band: intervals as a band, with the seeds as faint dots; else as bars.
        line: join the means.
        filled: filled marks and a whole line; else open marks and a broken one.
    """
    estimates = [mean.estimate for mean in curve]
    low, high = [each.low for each in estimates], [each.high for each in estimates]
    if band and len(curve) > 1:
        axes.fill_between(xs, low, high, color=colour, alpha=0.13, linewidth=0, zorder=1)
        for x, mean in zip(xs, curve):
            axes.plot([x] * len(mean.values), mean.values, ".", color=colour, markersize=2.5, alpha=0.5, zorder=2)
    else:
        axes.vlines(xs, low, high, color=colour, linewidth=1, zorder=2)
    style = ("-" if filled else BROKEN) if line else "none"
    draw_marks(axes, xs, [each.value for each in estimates], colour, style=style, filled=filled)


def draw_estimates(
    axes: Axes, estimates: Sequence[Estimate], colour: str, *, place: int = 0, count: int = 1, filled: bool = True
) -> None:
    """Draw differences over the sizes with their intervals as bars, the `place`-th of `count` lines on these axes."""
    xs = dodged(axes, [each.examples for each in estimates], place, count)
    axes.vlines(xs, [each.low for each in estimates], [each.high for each in estimates], color=colour, linewidth=1.3, zorder=2)
    draw_marks(axes, xs, [each.value for each in estimates], colour, style="-" if filled else BROKEN, filled=filled)


def draw_marks(axes: Axes, xs: Sequence[float], ys: Sequence[float], colour: str, *, style: Any, filled: bool) -> None:
    axes.plot(
        xs,
        ys,
        marker="o",
        linestyle=style,
        color=colour,
        markersize=4.5,
        linewidth=1.5,
        markerfacecolor=colour if filled else "white",
        markeredgewidth=1.2,
        zorder=3,
    )


def dodged(axes: Axes, xs: Sequence[float], place: int, count: int) -> list[float]:
    """Return x, on a logarithmic axis, moved aside a little for the `place`-th of `count` lines."""
    low, high = axes.get_xlim()
    return [x * (high / low) ** (DODGE * (place - (count - 1) / 2)) for x in xs]


def draw_rows(summary: Summary, rows: Sequence[tuple[str, Sequence[tuple[Mean, bool]]]], x_label: str) -> Figure:
    """Draw families below each other: means with intervals and seeds; call it inside `drawing`.

    Args:
        rows: a family, and its means, each with whether its mark is filled.
    """
    figure = Figure(figsize=(FULL[0], 1.0 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, (family, means) in enumerate(rows):
        colour = colour_of(summary, family)
        for mean, filled in means:
            value = mean.estimate.value
            axes.hlines(place, mean.estimate.low, mean.estimate.high, color=colour, linewidth=1.4)
            axes.plot(mean.values, [place] * len(mean.values), "|", color=colour, markersize=8, alpha=0.6)
            face = colour if filled else "white"
            axes.plot(value, place, "o", color=colour, markersize=6, markerfacecolor=face, markeredgewidth=1.3, zorder=3)
        if len(means) > 1:
            first, last = means[0][0].estimate.value, means[-1][0].estimate.value
            axes.hlines(place, first, last, color=colour, linewidth=5, alpha=0.2, zorder=1)
    axes.set_yticks(range(len(rows)), [shorten(family, 26) for family, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(x_label)
    per_cent(axes, x=True)
    axes.yaxis.grid(False)
    return figure


# ---------------------------------------------------------------- the gap


def draw_gap(summary: Summary, metric: str) -> Figure:
    """Draw what the first of the compared families is ahead of the second, with its interval, and where they cross."""
    gap = summary.gaps[metric, PLAIN]
    assert summary.compare is not None
    a, b = summary.compare
    sizes = [each.examples for each in gap.estimates]
    reach = reach_of(gap.crossover, sizes)
    with drawing():
        figure = Figure(figsize=FULL, layout="constrained")
        axes = figure.add_subplot()
        log_images(axes, sizes, also=reach)
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
        if reach:
            mark_crossover(axes, gap.crossover)
        draw_estimates(axes, gap.estimates, INK)
        bounds = [bound for each in gap.estimates for bound in (each.low, each.high)]
        room = 0.16 * (max(*bounds, 0.0) - min(*bounds, 0.0)) + 1e-4  # for the words
        axes.set_ylim(min(*bounds, 0.0) - room, max(*bounds, 0.0) + room)
        for y, ahead, edge in ((0.98, a, "top"), (0.02, b, "bottom")):
            colour = colour_of(summary, ahead)
            words = f"{shorten(ahead, 26)} ahead"
            axes.text(0.012, y, words, color=colour, va=edge, fontsize=8.5, transform=axes.transAxes)
        axes.set_ylabel(f"{metric_words(metric)}, points:\n{shorten(a, 20)} − {shorten(b, 20)}")
        if len(sizes) > 1:
            axes.set_title(crossover_words(gap.crossover), fontsize=9)
        points(axes)
        return figure


def reach_of(crossing: Crossover, sizes: Sequence[int]) -> list[float]:
    """Return where on the axis of images a crossover must be seen; nothing where it lies too far off, or nowhere."""
    least, most = min(sizes) / MOST_REACH, max(sizes) * MOST_REACH
    if crossing.examples is None or not least <= crossing.examples <= most:
        return []
    ends = [end for end in (crossing.low, crossing.high) if end is not None and least <= end <= most]
    return [crossing.examples, *ends]


def mark_crossover(axes: Axes, crossing: Crossover) -> None:
    """Mark a crossover: a line where it is, whole if it was measured, on its interval as a shade."""
    assert crossing.examples is not None
    left, right = axes.get_xlim()
    axes.axvline(
        crossing.examples, color=GRID, linewidth=1.1, linestyle="-" if crossing.kind == "measured" else BROKEN, zorder=1
    )
    low = left if crossing.low is None else max(crossing.low, left)
    high = right if crossing.high is None else min(crossing.high, right)
    axes.axvspan(low, high, color=GRID, alpha=0.16, linewidth=0, zorder=0)


def crossover_words(crossing: Crossover) -> str:
    """Return a crossover in a few words, for a figure or a table."""
    if crossing.examples is None:
        return "no crossover in range"
    low = "" if crossing.low is None else compact(crossing.low)
    high = "" if crossing.high is None else compact(crossing.high)
    interval = f"{low} to {high}" if low and high else f"from {low} on" if low else f"up to {high}" if high else "not bounded"
    return f"crossover at {compact(crossing.examples)} images ({interval}), {crossing.kind}"


# ---------------------------------------------------------------- power laws


def draw_laws(summary: Summary, metric: str) -> Figure:
    """Draw the error against images on logarithmic axes, with the power law of each family, broken where nobody measured."""
    curves = curves_of(summary, metric)
    sizes = sorted({mean.examples for curve in curves.values() for mean in curve})
    beyond = sizes[-1] * (sizes[-1] / sizes[0]) ** 0.15
    with drawing():
        figure = Figure(figsize=FULL, layout="constrained")
        axes = figure.add_subplot()
        log_images(axes, sizes, also=[beyond])
        shown, ends = [], []
        for family, curve in curves.items():
            colour, end, name = colour_of(summary, family), 1 - curve[-1].estimate.value, family
            draw_errors(axes, curve, colour)
            shown += [1 - mean.estimate.value for mean in curve]
            if law := summary.laws.get(Curve(metric, PLAIN, family)):
                for xs, style in (
                    (np.geomspace(*law.sizes, 60), "-"),
                    (np.geomspace(law.sizes[-1], beyond, 20), BROKEN),
                ):
                    ys = 1 - law.accuracy(xs)
                    axes.plot(xs, ys, color=colour, linewidth=1.4, linestyle=style)
                    shown += ys.tolist()
                end, name = float(ys[-1]), f"{family}: {law_words(law.b, law.c)}"
            ends.append(End(end, name, colour))
        axes.set_ylabel(f"error, {metric_words(metric)}")
        log_error(axes, [error for error in shown if error > 0])
        end_labels(figure, {axes: ends})
        return figure


def draw_errors(axes: Axes, curve: Sequence[Mean], colour: str) -> None:
    wrong = [(mean.examples, 1 - mean.estimate.value, mean.estimate) for mean in curve if mean.estimate.value < 1]
    for x, _, estimate in wrong:
        axes.vlines(x, max(1 - estimate.high, 1e-9), 1 - estimate.low, color=colour, linewidth=1, zorder=2)
    axes.plot([x for x, _, _ in wrong], [error for _, error, _ in wrong], "o", color=colour, markersize=4.5, zorder=3)


def law_words(exponent: float, floor: float) -> str:
    """Return the form of a power law: how fast more data helps, and what error is left however much there is."""
    power = f"{exponent:.2f}".translate(RAISED)
    return f"n⁻{power}" + ("" if floor < 5e-4 else f" + {100 * floor:.1f} %")
