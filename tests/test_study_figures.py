"""A study's figures: ticks that read, names that do not overlap, everything inside its axes, whatever was measured."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vitcli.figures import shorten
from vitcli.study.axes import chosen_ticks, compact, round_ticks, spread
from vitcli.study.cells import Measurement
from vitcli.study.controls import draw_control, draw_families, draw_study, draw_translation
from vitcli.study.crossover import Crossover
from vitcli.study.figures import crossover_words, draw_accuracy, draw_gap, draw_laws, law_words
from vitcli.study.summary import Curve, Summary, metric_words, summarise

FAMILIES = ["mlp", "vit", "hybrid", "resnet-restricted", "resnet", "a-family-with-a-rather-long-name"]
SIZES = [1000, 3000, 10_000, 31_250, 100_000, 300_000, 1_000_000]


def made(families: int, sizes: int, seeds: int, *, variants: Sequence[str] = ("plain",), moved: bool = False) -> Summary:
    """Summarise planted accuracies: the first family starts lower and ends higher than the second."""
    names, used = FAMILIES[-families:], SIZES[:sizes]
    found = []
    for (place, family), size, seed, variant in itertools.product(enumerate(names), used, range(seeds), variants):
        share = np.log(size / 500) / np.log(3000)
        value = 0.3 + 0.05 * place + (0.6 - 0.1 * place) * share - 0.2 * share * (variant != "plain") + 0.01 * seed
        metrics = {"upstream": value} | ({f"translate:{px}": value - 0.03 * px for px in (1, 2)} if moved else {})
        found += [
            Measurement(variant, family, size, seed, metric, float(number), 20_000, size, size * 2e7 * (1 + place / 10))
            for metric, number in metrics.items()
        ]
    return summarise(
        found,
        title="t",
        families=names,
        compare=(names[0], names[1]),
        variants=variants,
        metrics=["upstream"],
        one_pass=False,
    )


def names_of(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def check_readable(figure: Figure) -> None:
    """Fail where names at line ends overlap or leave the figure, ticks run into each other, or marks lie outside their axes."""
    figure.draw_without_rendering()
    page = figure.bbox
    for axes in (each for each in figure.axes if each.get_visible()):
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        for a, b in itertools.combinations(boxes, 2):
            assert min(a.y1, b.y1) - max(a.y0, b.y0) <= 0.25 * a.height or a.x1 < b.x0 or b.x1 < a.x0
        assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
        ticks = [tick.get_window_extent() for tick in axes.get_xticklabels() if tick.get_text()]
        if not any(tick.get_rotation() for tick in axes.get_xticklabels()):
            assert all(left.x1 < right.x0 for left, right in itertools.pairwise(sorted(ticks, key=lambda box: box.x0)))
        low, high = axes.get_ylim()
        for line in axes.lines:
            if line.get_marker() == "o":
                y = np.asarray(line.get_ydata(), float)
                assert ((min(low, high) <= y) & (y <= max(low, high))).all()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (800, "800"),
        (1000, "1k"),
        (31_250, "31.2k"),
        (999_999, "1M"),
        (1_281_167, "1.28M"),
        (3e8, "300M"),
        (2.5e9, "2.5G"),
        (0, "0"),
    ],
)
def test_large_numbers_are_short(number: float, text: str) -> None:
    assert compact(number) == text


def test_ticks_are_the_sizes_where_there_is_room() -> None:
    assert chosen_ticks([1e3, 1e4, 1e5], 900, 1.1e5, nearest=0.1) == [1e3, 1e4, 1e5]
    assert chosen_ticks([1e3, 2e3, 4e3, 8e3], 900, 9e3, nearest=0.4) == [2e3, 8e3]  # every other one, the last among them
    assert chosen_ticks([*range(1000, 1010), 9000], 900, 9e3, nearest=0.1) == [1000, 1500, 2000, 3000, 5000, 7000]


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.2), (0.71, 0.79), (1, 9), (1e3, 1e6), (1, 1e12)])
def test_round_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)


def test_names_are_moved_apart_as_little_as_can_be() -> None:
    assert spread([0.1, 0.9], 0.1) == [0.1, 0.9]
    assert spread([0.52, 0.5, 0.1], 0.1) == pytest.approx([0.56, 0.46, 0.1])  # around where they would be, in their order
    assert spread([1.0, 0.99, 0.98], 0.1) == pytest.approx([1.0, 0.9, 0.8])  # inside
    assert spread([], 0.1) == []


@pytest.mark.parametrize(("families", "sizes", "seeds"), [(2, 2, 1), (6, 7, 3), (3, 1, 3)])
def test_accuracy_is_readable(families: int, sizes: int, seeds: int) -> None:
    summary = made(families, sizes, seeds)
    figure = draw_accuracy(summary, "upstream")
    check_readable(figure)
    axes = figure.axes[0]
    named = names_of(axes) if sizes > 1 else [tick.get_text() for tick in axes.get_yticklabels()]
    assert sorted(named) == sorted(shorten(name, 40 if sizes > 1 else 26) for name in FAMILIES[-families:])
    if sizes > 1:
        marks = [line for line in axes.lines if line.get_marker() == "o"]
        assert [np.asarray(line.get_ydata()).tolist() for line in marks] == [
            pytest.approx([mean.estimate.value for mean in summary.curve("upstream", family)]) for family in summary.families
        ]


def test_the_gap_shows_its_crossover() -> None:
    summary = made(2, 7, 3)
    crossing = summary.gaps["upstream", "plain"].crossover
    assert crossing.kind == "measured"
    figure = draw_gap(summary, "upstream")
    check_readable(figure)
    upright = [line for line in figure.axes[0].lines if is_upright(line)]
    assert [np.asarray(line.get_xdata())[0] for line in upright] == [crossing.examples]
    assert figure.axes[0].get_title(loc="left").startswith(f"crossover at {compact(crossing.examples or 0)} images (")


def is_upright(line: Line2D) -> bool:
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    return len(x) == 2 and x[0] == x[1] and list(y) == [0, 1]


@pytest.mark.parametrize(
    ("crossing", "words"),
    [
        (Crossover("none"), "no crossover in range"),
        (Crossover("measured", 12_345.0, 9000.0, 20_000.0), "crossover at 12.3k images (9k to 20k), measured"),
        (Crossover("extrapolated", 5e6, 2e6, None), "crossover at 5M images (from 2M on), extrapolated"),
        (Crossover("unsure", 5e4, None, 9e4), "crossover at 50k images (up to 90k), unsure"),
        (Crossover("unsure", 5e4, None, None), "crossover at 50k images (not bounded), unsure"),
    ],
)
def test_a_crossover_in_a_few_words(crossing: Crossover, words: str) -> None:
    assert crossover_words(crossing) == words


def test_laws_are_named_beside_their_lines() -> None:
    figure = draw_laws(made(3, 7, 3), "upstream")
    check_readable(figure)
    assert len(names_of(figure.axes[0])) == 3
    assert law_words(0.23, 0.018) == "n⁻⁰·²³ + 1.8 %"
    assert law_words(0.23, 0.0) == "n⁻⁰·²³"


@pytest.mark.parametrize(("families", "sizes"), [pytest.param(6, 3, marks=pytest.mark.slow), (2, 1)])
def test_a_control_stands_against_plain(families: int, sizes: int) -> None:
    summary = made(families, sizes, 3, variants=("plain", "permuted"))
    figure = draw_control(summary, "upstream", "permuted")
    check_readable(figure)
    marks = [
        line for axes in figure.axes for line in axes.lines if line.get_marker() == "o" and len(np.atleast_1d(line.get_xdata()))
    ]
    faces = [line.get_markerfacecolor() == "white" for line in marks]
    assert faces.count(True) == faces.count(False) == families
    assert summary.changes[Curve("upstream", "permuted", "resnet" if families == 6 else FAMILIES[-1])][-1].value < 0


def test_moved_images_and_families_side_by_side() -> None:
    summary = made(3, 4, 1, moved=True)
    figure = draw_translation(summary)
    assert figure is not None
    check_readable(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["1k images", "3k images", "31.2k images"]
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [np.asarray(line.get_xdata()).tolist() for line in marks] == [[0, 1, 2]] * 3
    assert draw_translation(made(2, 1, 1)) is None
    check_readable(draw_families(summary, "upstream"))


def test_what_is_drawn_is_what_was_measured() -> None:
    stems = [stem for _, stem, _, _ in draw_study(made(2, 1, 1))]
    assert stems == ["accuracy-upstream", "flops-upstream", "gap-upstream"]
    assert [metric_words(metric) for metric in ("fewshot:folder:/data/birds:5", "finetune:cifar10", "upstream")] == [
        "birds 5-shot top-1",
        "cifar10 fine-tuned top-1",
        "upstream top-1",
    ]
