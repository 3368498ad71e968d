"""How a study stands, as a table that is drawn anew in its place on a terminal; elsewhere there are only lines."""

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vitcli.logs import duration
from vitcli.study.cells import Cell, Measurement, label
from vitcli.study.claims import is_claimed

__all__ = ["Standing", "View", "last_step", "open_view", "operations_of", "table_of"]

Say = Callable[[str], None]
TAIL_BYTES = 16 << 10


@dataclass(frozen=True)
class Standing:
    """How far a study is."""

    cells: Sequence[Cell]  # all that are known of by now
    over: frozenset[Path]  # folders of those that are done
    failed: frozenset[Path]
    measured: Sequence[Measurement]
    sizes: Sequence[int]  # of the pretraining set, images
    metrics: Sequence[str]  # the first one that has a number is shown
    seconds: float  # since this process began
    operations: float  # of training in cells that have ended meanwhile, here and elsewhere


class View:
    """Where a study's lines go when there is no terminal."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.is_live = False

    def show(self, standing: Standing) -> None:
        """Draw the table anew; nothing without a terminal."""


class LiveView(View):
    """A terminal, with the table below all lines."""

    def __init__(self, live: Live) -> None:
        super().__init__(lambda text: live.console.print(text, markup=False, highlight=False, soft_wrap=True))
        self.live = live
        self.is_live = True

    def show(self, standing: Standing) -> None:
        self.live.update(table_of(standing), refresh=True)


@contextmanager
def open_view(say: Say, *, console: Console | None = None) -> Iterator[View]:
    """Show a study inside the block: a live table on a terminal, else lines alone."""
    console = console or Console(file=sys.stdout)
    if not console.is_terminal:
        yield View(say)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield LiveView(live)


def table_of(standing: Standing) -> Group:
    """Draw results by family and size, what runs just now, and how long the rest may take."""
    shown = next((metric for metric in standing.metrics if any(m.metric == metric for m in standing.measured)), None)
    reported = [cell for cell in standing.cells if not cell.trial]
    table = Table(title=None if shown is None else f"{shown}, % (mean over seeds)", title_justify="left")
    table.add_column("variant")
    table.add_column("family")
    for size in standing.sizes:
        table.add_column(f"n={size:,}", justify="right", no_wrap=True)
    for variant, family in dict.fromkeys((cell.variant, cell.family) for cell in reported):
        row = [cell for cell in reported if (cell.variant, cell.family) == (variant, family)]
        texts = [entry(row, size, shown, standing) for size in standing.sizes]
        table.add_row(*map(Text, (variant, family, *texts)))
    return Group(table, *map(Text, [*running_lines(standing), summary_line(standing)]))


def entry(row: Sequence[Cell], size: int, shown: str | None, standing: Standing) -> str:
    """Return what is known of one family at one size: a mean, and how many seeds it is of while some are missing."""
    here = [cell for cell in row if size in (cell.readings or (cell.examples,))]
    if not here:
        return ""
    group = here[0].variant, here[0].family, size, shown
    values = [m.value for m in standing.measured if (m.variant, m.family, m.examples, m.metric) == group]
    marks = "!" if any(cell.folder in standing.failed for cell in here) else ""
    if len(values) < len(here):
        marks = f"{len(values)}/{len(here)}{marks}"
    return " ".join(filter(None, [f"{100 * statistics.mean(values):.1f}" if values else "", marks]))


def running_lines(standing: Standing) -> list[str]:
    """Return a line for every cell that somebody works on."""
    lines = []
    for cell in standing.cells:
        if cell.folder in standing.over or cell.folder in standing.failed or not is_claimed(cell.folder):
            continue
        stage = next((stage.name for stage in cell.stages if not stage.done.exists()), "ending")
        step = min(last_step(cell.run), cell.steps)
        at = f"step {step:,} of {cell.steps:,}" if stage == cell.stages[0].name else ""
        lines.append(f"  {label(cell)}  {stage}  {at}".rstrip())
    return lines


def summary_line(standing: Standing) -> str:
    """Return how many cells are done, and about how long the others may take."""
    done = sum(cell.folder in standing.over for cell in standing.cells)
    parts = [f"{done} of {len(standing.cells)} cells done"]
    if standing.failed:
        parts.append(f"{len(standing.failed)} failed")
    parts.append(f"{duration(standing.seconds)} so far")
    left = sum(operations_of(cell) for cell in standing.cells if cell.folder not in standing.over | standing.failed)
    if standing.operations and left:
        parts.append(f"about {duration(left * standing.seconds / standing.operations)} to go at this pace")
    return ", ".join(parts)


def operations_of(cell: Cell) -> float:
    """Return the floating-point operations of a cell's pretraining."""
    return float(cell.steps) * cell.batch_size * cell.training_flops


def last_step(run_dir: Path) -> int:
    """Return the step that the last whole row of metrics.jsonl came after; 0 where there is none."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
