"""What a study will do, in words: the text of `vit study --dry-run`."""

import shlex
from collections.abc import Iterator, Sequence

from vitcli.device import flops_per_second, hardware
from vitcli.study.cells import PLAIN, Cell
from vitcli.study.config import points_of
from vitcli.study.plan import Study, cost

__all__ = ["all_finals", "describe_study"]

MOST_ROWS = 60  # a table of this many lines is read, a longer one scrolls away


def describe_study(study: Study) -> list[str]:
    """Return the plan as lines for a person: families, cells, operations of pretraining, and hours of one device."""
    trials, finals = study.trials(), all_finals(study)
    speed = flops_per_second(study.device)
    total = sum(cost(cell) for cell in (*trials, *finals))
    tried = f" and {len(trials)} trials" if trials else ""
    first = (trials or finals)[0].stages[0]
    return [
        f"{study.config.title}: {study.out}",
        *form_lines(study, finals[0]),
        "",
        *family_lines(study),
        "",
        f"  {'cells':<36}{'images':>25}{'runs':>6}{'images seen':>16}{'FLOPs':>11}{'hours':>11}",
        *cell_rows(study, trials, finals),
        "",
        f"in all {len(finals)} cells{tried}, {total:.3g} FLOPs, about {total / speed / 3600:,.3g} h of pretraining on a device "
        f"like this ({hardware(study.device)}, taken for {speed / 1e9:,.0f} GFLOP/s); the rest comes on top",
        f"the first begins with: vit {shlex.join(first.words)}",
    ]


def all_finals(study: Study) -> list[Cell]:
    """Return every reported cell, as if a search had chosen the first of its points: what they cost hardly depends on it."""
    chosen = {
        searched: points_of(study.config, group.family)[0] for group in study.groups() if (searched := study.searched(group))
    }
    return study.finals(chosen)


def form_lines(study: Study, one: Cell) -> Iterator[str]:
    """Yield what the study does and measures."""
    config, upstream = study.config, study.upstreams[PLAIN]
    length = config.length
    if length is None:
        form = f"one pass over {config.sizes[-1]:,} fresh images, read at {len(config.sizes)} points"
    else:
        amounts = {"epochs": length.epochs, "images": length.examples, "steps": length.steps}
        form = "grid; every run takes " + next(f"{n:,.10g} {unit}" for unit, n in amounts.items() if n is not None)
        if length.early_stop_evals:
            form += f", or ends after {length.early_stop_evals} evaluations clearly below the best"
            form += f" (on {100 * length.dev_fraction:g} % of its images)"
    yield f"  form      {form}"
    sizes = f"{upstream.train_examples:,} training and {upstream.val_examples:,} evaluation images"
    classes = f"{upstream.num_classes:,} classes" if upstream.num_classes else "without labels"
    known = f"{sizes}, {classes}" if upstream.problem is None else "not here"
    yield f"  data      {study.settings(one).data.source}: {known}"
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
    elif config.first_arm is not None and len(config.families) > 1:
        yield f"  compared  every family with {config.first_arm}"


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
                f"  {variant:<16}{family:<18}{cell.parameters:>13,}{mega(cell.forward_flops):>16}"
                f"{mega(cell.training_flops):>13}{cost(cell) / cost(cells[base]):>8.2f} x"
            )


def mega(flops: float) -> str:
    """Write operations in millions."""
    return f"{flops / 1e6:,.0f}" if flops >= 1e9 else f"{flops / 1e6:.2f}"


def cell_rows(study: Study, trials: Sequence[Cell], finals: Sequence[Cell]) -> Iterator[str]:
    """Yield a line for cells that differ in seed, or in what is tried, alone; in size too, where that would make too many."""
    speed = flops_per_second(study.device)
    for by_size in (True, False):
        groups: dict[tuple[str, int], list[Cell]] = {}
        for cell in (*trials, *finals):
            name = f"{'search ' if cell.trial else ''}{cell.variant} / {cell.family}"
            groups.setdefault((name, cell.examples if by_size else 0), []).append(cell)
        if len(groups) <= MOST_ROWS:
            break
    for (name, _), cells in groups.items():
        first, last = f"{cells[0].examples:,}", f"{max(cell.examples for cell in cells):,}"
        images = sum(cell.steps * cell.batch_size for cell in cells)
        flops = sum(map(cost, cells))
        yield (
            f"  {name:<36}{first if first == last else f'{first} to {last}':>25}{len(cells):>6}{images:>16,}{flops:>11.3g}"
            f"{flops / speed / 3600:>11,.3g}"
        )
