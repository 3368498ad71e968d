"""What a study will do, in words: the text of `vit study --dry-run`."""

import shlex
from collections.abc import Iterator, Sequence

from vitcli.device import flops_per_second, hardware
from vitcli.study_cells import Cell
from vitcli.study_config import points_of
from vitcli.study_plan import Study, cost
from vitcli.sweep_plan import hours

__all__ = ["describe_study"]

MOST_ROWS = 60  # a table of this many lines is read, a longer one scrolls away


def describe_study(study: Study) -> list[str]:
    """Return the plan as lines for a person: families, cells, operations of pretraining, and hours of one device."""
    config = study.config
    trials, finals = study.trials(), all_finals(study)
    rows = list(cell_rows(study, trials, finals))
    shown = rows if len(rows) <= MOST_ROWS else [*rows[: MOST_ROWS - 1], f"  ... and {len(rows) - MOST_ROWS + 1} more"]
    total = sum(cost(cell) for cell in (*trials, *finals))
    speed = flops_per_second(study.device)
    probes = "; probes, fine-tuning and evaluation come on top"
    first = next((stage for stage in (trials or finals)[0].stages), None)
    return [
        f"{config.title}: {study.out}",
        *form_lines(study, trials),
        "",
        *family_lines(study),
        "",
        f"  {'cells':<34}{'images':>13}{'runs':>6}{'steps':>11}{'images seen':>15}{'FLOPs each':>13}{'h each':>9}{'h in all':>9}",
        *shown,
        "",
        f"in all {len(finals)} cells" + (f" and {len(trials)} trials" if trials else "") + f", {total:.3g} FLOPs, about "
        f"{hours(total / speed)} of pretraining on one device like this: {hardware(study.device)}, taken for "
        f"{speed / 1e9:,.0f} GFLOP/s{probes}",
        *([] if first is None else [f"the first begins with: vit {shlex.join(first.words)}"]),
    ]


def all_finals(study: Study) -> list[Cell]:
    """Return every reported cell, as if a search had chosen the first of its points: what they cost hardly depends on it."""
    chosen = {
        searched: points_of(study.config, group.family)[0] for group in study.groups() if (searched := study.searched(group))
    }
    return study.finals(chosen)


def form_lines(study: Study, trials: Sequence[Cell]) -> Iterator[str]:
    config, upstream = study.config, study.upstreams["plain"]
    length = config.length
    if length is None:
        form = f"one pass over {config.sizes[-1]:,} fresh images, read at {len(config.sizes)} points"
    else:
        amounts = {"epochs": length.epochs, "images seen": length.examples, "steps": length.steps}
        form = next(f"{amount:,} {unit}" for unit, amount in amounts.items() if amount is not None)
        form = f"grid; every run has {form}" + (
            f" or ends early, after {length.early_stop_evals} evaluations clearly below the best on "
            f"{100 * length.dev_fraction:g} % of its images"
            if length.early_stop_evals
            else ""
        )
    yield f"  form      {form}"
    source = study.settings(trials[0] if trials else all_finals(study)[0]).data.source
    if upstream.problem is None:
        yield (
            f"  data      {source}: {upstream.train_examples:,} training and {upstream.val_examples:,} evaluation images, "
            f"{upstream.num_classes:,} classes"
        )
    else:
        yield f"  data      {source}: not here"
    yield f"  seeds     {', '.join(map(str, config.seeds))}"
    yield f"  measured  {', '.join(study.metrics())}"
    if config.search is not None:
        counts = len(points_of(config, next(iter(config.families))))
        yield (
            f"  search    {counts} combinations for every family, each {100 * config.search.share:g} % of a run long, judged "
            f"by {100 * config.search.dev_fraction:g} % of its images"
        )
    if config.pair is not None:
        yield f"  gap       {config.pair[0]} less {config.pair[1]}"


def family_lines(study: Study) -> Iterator[str]:
    """Yield what the families of every variant cost, relative to the second of the compared ones."""
    config = study.config
    yield f"  {'variant':<16}{'family':<18}{'parameters':>13}{'MFLOPs forward':>16}{'in training':>13}{'of a run':>10}"
    for variant in config.all_variants:
        families = config.families_of(variant)
        cells = {family: study.largest(variant, family) for family in families}
        base = config.pair[1] if config.pair is not None and config.pair[1] in cells else families[0]
        for family, cell in cells.items():
            yield (
                f"  {variant:<16}{family:<18}{cell.parameters:>13,}{cell.forward_flops / 1e6:>16,.4g}"
                f"{cell.training_flops / 1e6:>13,.4g}{cost(cell) / cost(cells[base]):>8.2f} x"
            )


def cell_rows(study: Study, trials: Sequence[Cell], finals: Sequence[Cell]) -> Iterator[str]:
    """Yield a line for every group of cells that differ in seed, or point, alone."""
    speed = flops_per_second(study.device)
    for name, cells in (("search ", trials), ("", finals)):
        groups: dict[tuple[str, str, int], list[Cell]] = {}
        for cell in cells:
            groups.setdefault((cell.variant, cell.family, cell.examples), []).append(cell)
        for (variant, family, examples), members in groups.items():
            one, seconds = members[0], cost(members[0]) / speed
            yield (
                f"  {f'{name}{variant} / {family}':<34}{examples:>13,}{len(members):>6}{one.steps:>11,}"
                f"{one.steps * one.batch_size:>15,}{cost(one):>13.3g}{seconds / 3600:>9.2f}"
                f"{seconds * len(members) / 3600:>9.2f}"
            )
