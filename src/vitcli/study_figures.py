"""A study's figures: what ViT (2010.11929) shows in its figures 3, 4 and 5, the gap with its crossover, and the controls.

Lines are named where they end, axes of images and FLOPs are logarithmic, intervals are those of 95 % over the seeds, and a
family has one colour in all of them. With a single size there is no line to draw, so families stand below each other.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import matplotlib.colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from vitcli.figures import COLOURS, GRID, INK, drawing, shorten
from vitcli.study_cells import PLAIN, UPSTREAM
from vitcli.study_summary import Crossing, Gap, Mean, Summary, metric_words

__all__ = ["compact", "draw_study", "spread"]

WIDE, HIGH = 5.6, 3.6  # inches of one pair of axes, lettering of 9 points: a column and a half of a paper
LABEL_POINTS = 8.5
MOST_TICKS = 9
MOST_COLUMNS = 3
FEW = 3  # families with a band each; of more, bands hide each other, and bars are drawn
SHORT = 18  # letters of a family's name beside its line
FLOPS_UNITS = ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"))
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.10g} %")
POINTS = FuncFormatter(lambda value, _: f"{100 * value:+.10g}" if abs(value) > 1e-9 else "0")


def draw_study(summary: Summary) -> Iterator[tuple[str, str, Figure]]:
    """Draw everything that there are numbers for; yield a file's stem, a caption and the figure."""
    for metric in summary.metrics:
        if metric.startswith(("translate:", "unchanged:")):
            continue
        yield from draw_metric(summary, metric)
    if figure := draw_translation(summary):
        yield "translation", "Accuracy, and share of unchanged answers, when evaluation images are moved by so many pixels.", figure


def draw_metric(summary: Summary, metric: str) -> Iterator[tuple[str, str, Figure]]:
    """Draw one metric: against images, against FLOPs, as a gap, as a power law, and what the controls do to it."""
    stem, words = metric.replace(":", "-").replace("/", "-"), metric_words(metric)
    plain = [m for m in summary.means if m.metric == metric and m.variant == PLAIN]
    if not plain:
        return
    sizes = {m.examples for m in plain}
    yield f"accuracy-{stem}", f"{words} against pretraining images.", draw_accuracy(summary, metric)
    yield f"flops-{stem}", f"{words} against training FLOPs.", draw_flops(summary, metric)
    if gaps := summary.gap_curve(metric, PLAIN):
        a, b = summary.compare or ("", "")
        yield f"gap-{stem}", f"{words}: {a} minus {b} against pretraining images.", draw_gap(summary, metric, gaps)
    if any(law.metric == metric and law.variant == PLAIN for law in summary.laws):
        yield f"law-{stem}", f"Error in {words} against pretraining images, and power laws.", draw_laws(summary, metric)
    others = [v for v in summary.variants if v != PLAIN and any(m.variant == v and m.metric == metric for m in summary.means)]
    for variant in others:
        yield (
            f"control-{variant}-{stem}",
            f"{words} under {variant}, and with the plain settings.",
            draw_control(summary, metric, variant),
        )
    if others and any(summary.gap_curve(metric, variant) for variant in others):
        yield f"controls-gap-{stem}", f"{words}: the gap under every variant.", draw_gaps(summary, metric)
    if len(summary.families) > 2:
        yield f"families-{stem}", f"{words} by family.", draw_families(summary, metric, sorted(sizes))
