"""`vit study`: a grid of pretraining runs and what is measured of each, as one command that any number of processes may share.

Every cell is a few `vit` commands in a folder of its own; what lies there is all that is known of it, so a study that was
stopped at any moment goes on from there. A cell that fails is reported, and the others go on.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from vitcli.device import choose_device
from vitcli.errors import ConfigError, RunExistsError, UserError
from vitcli.interrupts import StopSignals
from vitcli.jobs import slots_of
from vitcli.rundir import lock_run
from vitcli.study.cells import Cell, Measurement, label
from vitcli.study.plan import Study, begin_cell, begin_study, plan_study
from vitcli.study.record import write_study
from vitcli.study.results import choose, measure
from vitcli.study.runner import Runner, is_over
from vitcli.study.table import Standing, View, open_view, operations_of
from vitcli.study.words import describe_study

__all__ = ["study"]

Say = Callable[[str], None]

FOLDER_SECONDS = 600.0  # that another process may take to write results and draw figures


def study(path: Path, overrides: Sequence[str], *, out: Path | None, jobs: int | None, dry_run: bool, say: Say) -> bool:
    """Run what is left of a study, and write and say what came out.

    Args:
        out: the study's folder; None for runs/ and the file's name.
        jobs: cells side by side; None for as many as there are GPUs, or one.

    Returns:
        Whether every cell to report is there.

    Raises:
        Interrupted: a signal arrived; every run of this process is saved.
        UserError: settings or data that cannot be, or a disk without room.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("vit study starts processes of its own, one for each cell: run it without torchrun; see --jobs")
    plan = plan_study(path, overrides, out=out, needs_data=not dry_run, say=say)
    say("\n".join(describe_study(plan)))
    if dry_run:
        return True
    trials = plan.trials()
    first = (trials or plan.finals({}))[0]
    slots = slots_of(jobs, choose_device(plan.settings(first).train.device))
    say(f"{len(slots)} cell{'s' if len(slots) > 1 else ''} at a time here; the same command elsewhere takes part")
    stop = StopSignals()
    with stop.installed(), stop.deferred():
        with folder_alone(plan.out, stop):
            begin_study(plan)
        with open_view(say) as view:
            desk = Desk(plan, trials, view)
            runner = Runner(plan.out, slots=slots, prepare=partial(begin_cell, plan), report=desk.report, say=view.say)
            desk.runner = runner
            try:
                problems = runner.run(desk.cells, stop=stop)
            except BaseException:
                desk.write()
                raise
        with folder_alone(plan.out, stop):
            lines = write_study(plan, say=say, figures=True, failed=problems)
    say("\n".join(["", *lines]))
    for cell in desk.known:
        if (problem := problems.get(cell.folder)) is not None:
            say(f"failed: {label(cell)}: {problem}")
    return is_complete(plan, say=say)


class Desk:
    """What a running study knows of itself: which cells there are by now, and what was written and shown of them."""

    def __init__(self, plan: Study, trials: Sequence[Cell], view: View) -> None:
        self.plan = plan
        self.trials = trials
        self.view = view
        self.runner: Runner | None = None
        self.known: list[Cell] = []
        self.measured: list[Measurement] = []
        self.unwritten = False
        self.started = time.monotonic()
        self.operations_before: float | None = None

    def cells(self) -> list[Cell]:
        """Return what is to be run as far as it is known: the trials of a search, and the cells whose settings are chosen."""
        chosen = choose(self.plan) if self.trials else {}
        self.known = [*self.trials, *self.plan.finals(chosen)]
        return self.known

    def report(self, ended: bool) -> None:
        """Write the results after a cell has ended, and show how the study stands."""
        self.unwritten = self.unwritten or ended
        if self.unwritten:
            self.write()
        if self.view.is_live:
            self.show()

    def write(self) -> None:
        """Write the results as they are, unless another process is doing that just now.

        What may go wrong with numbers that are not complete must not end the training.
        """
        assert self.runner is not None
        try:
            with lock_run(self.plan.out):
                write_study(self.plan, say=self.view.say, failed=self.runner.failures(self.known))
            self.unwritten = False
        except RunExistsError:
            pass  # the next time
        except Exception as error:
            self.unwritten = False
            self.view.say(f"warning: the results so far could not be written: {error}")

    def show(self) -> None:
        """Draw the live table."""
        assert self.runner is not None
        with suppress(UserError):  # a damaged file of a cell, which `write` tells of
            self.measured = measure(self.plan)
        over = frozenset(cell.folder for cell in self.known if cell.folder in self.runner.over or is_over(cell))
        done = sum(operations_of(cell) for cell in self.known if cell.folder in over)
        if self.operations_before is None:
            self.operations_before = done
        standing = Standing(
            cells=self.known,
            over=over,
            failed=frozenset(self.runner.failures(self.known)),
            measured=self.measured,
            sizes=self.plan.config.sizes,
            metrics=self.plan.metrics(),
            seconds=time.monotonic() - self.started,
            operations=done - self.operations_before,
        )
        self.view.show(standing)


@contextmanager
def folder_alone(out: Path, stop: StopSignals) -> Iterator[None]:
    """Write to a study's folder while no other process does; cells are none of its business.

    Raises:
        Interrupted: a signal arrived while waiting.
        RunExistsError: another process takes longer than writing ever should.
    """
    deadline = time.monotonic() + FOLDER_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock_run(out))
                break
            except RunExistsError:
                if time.monotonic() > deadline:
                    raise
            stop.check()
            time.sleep(0.1)
        yield


def is_complete(plan: Study, *, say: Say) -> bool:
    """Tell whether every reported cell is over, and say what waits for a choice that failed trials leave open."""
    chosen = choose(plan) if plan.trials() else {}
    open_groups = [group for group in plan.groups() if plan.searched(group) not in (None, *chosen)]
    if open_groups:
        first = open_groups[0]
        say(
            f"not run for want of a choice, in {len(open_groups)} of {len(plan.groups())} groups such as {first.variant} / "
            f"{first.family} / n={first.examples:,}: their trials failed; once these are mended, the same command goes on"
        )
    return not open_groups and all(is_over(cell) for cell in plan.finals(chosen))
