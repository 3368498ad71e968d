"""Figures of a study's controls: what a variant takes from whom, moved images, families by what they know of space.

A study's whole set of figures is put together here too.
"""

from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from vitcli.figures import COLOURS, INK, drawing, shorten
from vitcli.study.axes import FULL, End, compact, end_labels, log_images, panels, per_cent, points
from vitcli.study.cells import PLAIN, UPSTREAM
from vitcli.study.figures import (
    colour_of,
    curves_of,
    draw_accuracy,
    draw_curve,
    draw_estimates,
    draw_flops,
    draw_gap,
    draw_laws,
    draw_rows,
)
from vitcli.study.summary import Mean, Summary, metric_words

__all__ = ["Drawn", "draw_arms", "draw_control", "draw_families", "draw_gaps", "draw_study", "draw_translation"]

MOST_COLUMNS = 3
MOVED = {"translate": "upstream top-1", "unchanged": "answers unchanged"}
Drawn = tuple[str, str, str, Figure]  # the metric or "" for several, a file's stem, a caption, the figure


def draw_study(summary: Summary) -> Iterator[Drawn]:
    """Draw everything that there are numbers for."""
    for metric in summary.headline:
        if curves_of(summary, metric):
            yield from ((metric, *drawn) for drawn in draw_metric(summary, metric))
    if figure := draw_translation(summary):
        caption = "Evaluation images moved, the edge repeated: accuracy, and the share of answers that stay the same"
        yield "", "translation", caption, figure


def draw_metric(summary: Summary, metric: str) -> Iterator[tuple[str, str, Figure]]:
    """Draw one metric: against images and FLOPs, as a gap, as a power law, and what the controls do to it."""
    stem = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in metric)
    words = metric_words(metric)
    caption = words[0].upper() + words[1:]
    if figure := draw_arms(summary, metric):
        yield f"arms-{stem}", f"{caption}: every family less {summary.first_arm}", figure
    yield f"accuracy-{stem}", f"{caption} against pretraining images", draw_accuracy(summary, metric)
    spent = {round(mean.flops) for curve in curves_of(summary, metric).values() for mean in curve}
    if len(spent) > 1:  # else all of it lies above one point
        yield f"flops-{stem}", f"{caption} against training FLOPs", draw_flops(summary, metric)
    if summary.compare and (metric, PLAIN) in summary.gaps:
        a, b = summary.compare
        yield f"gap-{stem}", f"{caption}, {a} minus {b}, against pretraining images", draw_gap(summary, metric)
    if any((key.metric, key.variant) == (metric, PLAIN) for key in summary.laws):
        yield f"law-{stem}", f"Error of {words} against pretraining images, with power laws", draw_laws(summary, metric)
    curves = curves_of(summary, metric)
    if len(curves) > 2 and max(map(len, curves.values())) > 1:
        yield f"families-{stem}", f"{caption} by family, in the order stated", draw_families(summary, metric)
    others = [variant for variant in summary.variants if variant != PLAIN and curves_of(summary, metric, variant)]
    for variant in others:
        under = f"{caption}: the variant {variant} (open marks) against plain (filled)"
        yield f"control-{variant}-{stem}", under, draw_control(summary, metric, variant)
    if any((metric, variant) in summary.gaps for variant in others):
        yield f"gaps-{stem}", f"{caption}: the gap under every variant", draw_gaps(summary, metric)


# ---------------------------------------------------------------- a variant against plain


def draw_control(summary: Summary, metric: str, variant: str) -> Figure:
    """Draw a variant (open marks) against the plain settings (filled), a panel for each family."""
    curves = curves_of(summary, metric, variant)
    sizes = sorted({mean.examples for curve in curves.values() for mean in curve})
    with drawing():
        if len(sizes) == 1:
            return draw_rows(
                summary, control_rows(summary, metric, variant, sizes[0]), control_label(metric, variant, sizes[0])
            )
        figure, axes = panels(len(curves), columns=MOST_COLUMNS)
        plain = {family: summary.curve(metric, family) for family in curves}
        everything = sorted({mean.examples for found in (curves, plain) for curve in found.values() for mean in curve})
        for panel, (family, curve) in zip(axes, curves.items()):
            colour = colour_of(summary, family)
            log_images(panel, everything, few=True)
            for means, filled in ((plain[family], True), (curve, False)):
                draw_curve(panel, [mean.examples for mean in means], means, colour, band=False, filled=filled)
            panel.set_title(shorten(family, 26), color=colour)
            panel.set_xlabel("")
        for panel in axes:  # which share their limits, so only now
            per_cent(panel)
        figure.supxlabel("pretraining images", fontsize=9)
        figure.supylabel(metric_words(metric), fontsize=9)
        marks = axes[0].plot([], [], "o-", color=INK, markersize=4.5)
        marks += axes[0].plot([], [], "o", linestyle=(0, (4, 2)), markerfacecolor="white", color=INK, markersize=4.5)
        figure.legend(marks, [PLAIN, shorten(variant, 26)], loc="outside upper right", ncols=2)
        return figure


def control_rows(summary: Summary, metric: str, variant: str, size: int) -> list[tuple[str, list[tuple[Mean, bool]]]]:
    """Return, for each family, its plain mean at a size and the variant's."""
    return [
        (family, [*((mean, True) for mean in at(summary, metric, family, size)), (curve[0], False)])
        for family, curve in curves_of(summary, metric, variant).items()
    ]


def control_label(metric: str, variant: str, size: int) -> str:
    return f"{metric_words(metric)}, after {compact(size)} images; filled: {PLAIN}, open: {shorten(variant, 26)}"


def at(summary: Summary, metric: str, family: str, size: int) -> list[Mean]:
    """Return a family's mean at a size with the plain settings, or nothing."""
    return [mean for mean in summary.curve(metric, family) if mean.examples == size]


def draw_arms(summary: Summary, metric: str) -> Figure | None:
    """Draw what each family of a study of one size is ahead of the first, below each other, with its interval.

    Returns:
        None in a study of several sizes, and where there is no other family.
    """
    leads = {key.family: lead for key, lead in summary.leads.items() if (key.metric, key.variant) == (metric, PLAIN)}
    others = [family for family in summary.families if family in leads]
    if not others:
        return None
    with drawing():
        figure = Figure(figsize=(FULL[0], 1.0 + 0.36 * len(others)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
        for place, family in enumerate(others):
            colour, lead = colour_of(summary, family), leads[family]
            axes.hlines(place, lead.low, lead.high, color=colour, linewidth=1.6, zorder=2)
            axes.plot(lead.value, place, "o", color=colour, markersize=6, zorder=3)
        axes.set_yticks(range(len(others)), [shorten(family, 26) for family in others])
        axes.set_ylim(len(others) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{metric_words(metric)}, points: less {shorten(str(summary.first_arm), 26)}")
        points(axes, x=True)
        axes.yaxis.grid(False)
        return figure


def draw_gaps(summary: Summary, metric: str) -> Figure:
    """Draw the gap between the compared families under every variant: take its cause away, and it goes."""
    assert summary.compare is not None
    a, b = summary.compare
    lines = {variant: summary.gaps[metric, variant] for variant in summary.variants if (metric, variant) in summary.gaps}
    sizes = sorted({each.examples for gap in lines.values() for each in gap.estimates})
    with drawing():
        figure = Figure(figsize=FULL, layout="constrained")
        axes = figure.add_subplot()
        log_images(axes, sizes)
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
        ends = []
        for place, (variant, gap) in enumerate(lines.items()):
            colour = INK if variant == PLAIN else COLOURS[(place + 1) % len(COLOURS)]
            draw_estimates(axes, gap.estimates, colour, place=place, count=len(lines), filled=variant == PLAIN)
            ends.append(End(gap.estimates[-1].value, variant, colour))
        axes.set_ylabel(f"{metric_words(metric)}, points:\n{shorten(a, 20)} − {shorten(b, 20)}")
        points(axes)
        end_labels(figure, {axes: ends})
        return figure


# ---------------------------------------------------------------- space


def draw_translation(summary: Summary) -> Figure | None:
    """Draw accuracy and unchanged answers by how far images are moved, at the smallest, a middle and the largest size.

    Returns:
        None where nobody measured it.
    """
    moved = {kind: [m for m in summary.metrics if m.startswith(f"{kind}:")] for kind in MOVED}
    found = {mean.examples for m in moved["translate"] for curve in curves_of(summary, m).values() for mean in curve}
    if not found:
        return None
    sizes = sorted(found)
    sizes = sizes if len(sizes) <= MOST_COLUMNS else [sizes[0], sizes[(len(sizes) - 1) // 2], sizes[-1]]
    kinds = [kind for kind in MOVED if moved[kind]]
    with drawing():
        figure, axes = panels(len(sizes) * len(kinds), columns=len(sizes), shared_y="row")
        for row, kind in enumerate(kinds):
            distances = sorted(int(metric.partition(":")[2]) for metric in moved[kind])
            for column, size in enumerate(sizes):
                panel = axes[row * len(sizes) + column]
                draw_moved(panel, summary, kind, distances, size)
                if row == 0:
                    panel.set_title(f"{compact(size)} images")
                if column == 0:
                    panel.set_ylabel(MOVED[kind])
        for panel in axes:  # which share their limits, so only now
            per_cent(panel)
        figure.supxlabel("evaluation images moved by, px", fontsize=9)
        last = [axes[(row + 1) * len(sizes) - 1] for row in range(len(kinds))]
        end_labels(figure, {panel: line_ends(summary, panel) for panel in last})
        return figure


def draw_moved(axes: Axes, summary: Summary, kind: str, distances: Sequence[int], size: int) -> None:
    """Draw a line for each family; images that were not moved are the upstream metric itself."""
    for family in summary.families:
        still = [(0, mean) for mean in at(summary, UPSTREAM, family, size)] if kind == "translate" else []
        line = [*still, *((d, mean) for d in distances for mean in at(summary, f"{kind}:{d}", family, size))]
        if line:
            draw_curve(axes, [x for x, _ in line], [mean for _, mean in line], colour_of(summary, family), band=False)
    axes.set_xticks([0, *distances])


def line_ends(summary: Summary, axes: Axes) -> list[End]:
    """Return the ends of the lines on axes that have one for each family, told by their colours."""
    ends = {line.get_color(): float(line.get_ydata()[-1]) for line in axes.lines}  # type: ignore[index,arg-type]
    return [End(ends[colour], family, colour) for family in summary.families if (colour := colour_of(summary, family)) in ends]


def draw_families(summary: Summary, metric: str) -> Figure:
    """Draw the families side by side in the order stated, a line for each size: who gains how much from more data."""
    curves = curves_of(summary, metric)
    sizes = sorted({mean.examples for curve in curves.values() for mean in curve})
    shades = matplotlib.colormaps["viridis_r"]
    with drawing():
        figure = Figure(figsize=FULL, layout="constrained")
        axes = figure.add_subplot()
        ends = []
        for place, size in enumerate(sizes):
            colour = to_hex(shades(0.2 + 0.8 * place / max(1, len(sizes) - 1)))
            line = [(x, mean) for x, family in enumerate(curves) for mean in at(summary, metric, family, size)]
            draw_curve(axes, [x for x, _ in line], [mean for _, mean in line], colour, band=False)
            ends.append(End(line[-1][1].estimate.value, f"{compact(size)} images", colour))
        names = [shorten(family, 26) for family in curves]
        crowded = sum(map(len, names)) > 48
        axes.set_xticks(range(len(names)), names, rotation=20 if crowded else 0, ha="right" if crowded else "center")
        axes.set_xlim(-0.3, len(names) - 0.7)
        axes.set_ylabel(metric_words(metric))
        per_cent(axes)
        axes.xaxis.grid(False)
        end_labels(figure, {axes: ends})
        return figure
