"""Works through the cells of a study, side by side with any number of other processes that do the same in the same folder.

What lies in the folder is all that is known: a stage is over when its file is there, a cell is taken while it is claimed
(`claims`), and a failure is a file that the others see. So whatever is killed at whatever moment, the next one goes on there.
"""

import errno
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vitcli.errors import UserError
from vitcli.interrupts import StopSignals
from vitcli.jobs import Child, begin, end_all
from vitcli.logs import duration
from vitcli.rundir import read_json, write_json
from vitcli.study.cells import Cell, Stage, label
from vitcli.study.claims import Claim, Claims

__all__ = ["FAILED", "Job", "Runner", "is_over", "remaining"]

Say = Callable[[str], None]

FAILED = "failed.json"  # in a cell's folder, after the last attempt failed
TICK_SECONDS = 0.2
LOOK_SECONDS = 5.0  # between two looks at what other processes have done
NO_ROOM = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
DIVERGED = "not finite"  # in the message of a run whose steps cannot be applied; the same settings end in the same way again


@dataclass
class Job:
    """A cell that this process works on."""

    cell: Cell
    slot: int
    claim: Claim
    stages: Iterator[Stage]
    stage: Stage
    child: Child
    started: float = field(default_factory=time.monotonic)


def remaining(cell: Cell) -> tuple[Stage, ...]:
    """Return the stages that are still to be run."""
    return tuple(stage for stage in cell.stages if not stage.done.exists())


def is_over(cell: Cell) -> bool:
    """Tell whether all of a cell's stages are."""
    return not remaining(cell)


def command(stage: Stage) -> list[str]:
    """Return the command of a process that carries a stage out."""
    return [sys.executable, "-m", "vitcli", *stage.words]


def log_of(cell: Cell, out: Path) -> Path:
    """Return where the commands of a cell print, named after its folder."""
    return out / "logs" / f"{'-'.join(cell.folder.relative_to(out).parts)}.txt"


class Runner:
    """Runs the stages of cells, as many cells at a time as there are slots.

    Args:
        out: holds the folders of all cells.
        slots: what is added to the environment of a process, one for each place.
        prepare: writes what a cell's commands read; called while the cell is claimed.
        report: is called whenever a cell has ended here (with True), and every few seconds.
    """

    def __init__(
        self,
        out: Path,
        *,
        slots: Sequence[Mapping[str, str]],
        prepare: Callable[[Cell], None],
        report: Callable[[bool], None],
        say: Say,
    ) -> None:
        self.out = out
        self.slots = slots
        self.prepare = prepare
        self.report = report
        self.say = say
        self.claims = Claims()
        self.jobs: list[Job] = []
        self.over: set[Path] = set()
        self.failed_before: dict[Path, int | None] = {}  # time of a cell's failure when it was first looked at
        self.is_waiting = False

    def run(self, todo: Callable[[], Sequence[Cell]], *, stop: StopSignals) -> dict[Path, str]:
        """Run all that `todo` names, which it is asked anew whenever a cell has ended; return why some failed, by folder.

        Cells that other processes work on are waited for, and taken over if these die.

        Raises:
            Interrupted: a signal arrived; the commands that were running have saved and ended.
            UserError: the disk is full, or the folder cannot be written; likewise.
        """
        cells: Sequence[Cell] = ()
        ended, settled, looked = True, False, 0.0
        try:
            while True:
                ended = self.look_after_jobs(stop) or ended
                stop.check()
                if ended or time.monotonic() - looked >= LOOK_SECONDS:
                    if ended or len(self.jobs) < len(self.slots):  # else nothing new could begin
                        cells = todo()
                    self.report(ended)
                    left, looked = self.left(cells), time.monotonic()
                    ended = self.begin_some(left)
                    if not (self.jobs or ended or left):
                        if settled:
                            return self.failures(cells)
                        settled = ended = True  # ask once more: another process may have ended a cell after `todo` had looked
                    else:
                        settled = False
                time.sleep(TICK_SECONDS)
        finally:
            self.end()

    def left(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells with something left to do that nobody here works on."""
        busy = {job.cell.folder for job in self.jobs}
        found = []
        for cell in cells:
            if cell.folder in self.over or cell.folder in busy:
                continue
            if is_over(cell):
                self.over.add(cell.folder)
            elif self.failure(cell) is None:
                found.append(cell)
        return found

    # ------------------------------------------------------------ failures, which all processes share

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """Return what is known of a failure that need not be tried again by this process.

        One from before it started is, unless the training diverged: memory, disk or settings may have been mended since.
        """
        path = cell.folder / FAILED
        try:
            time_there = path.stat().st_mtime_ns
        except FileNotFoundError:
            self.failed_before.setdefault(cell.folder, None)
            return None
        before = self.failed_before.setdefault(cell.folder, time_there)
        record = read_json(path)
        return record if record is not None and (time_there != before or record["diverged"]) else None

    def failures(self, cells: Sequence[Cell]) -> dict[Path, str]:
        """Return why cells failed, by folder."""
        found = {cell.folder: self.failure(cell) for cell in cells if cell.folder not in self.over}
        return {folder: f"{record['stage']}: {record['reason']}" for folder, record in found.items() if record is not None}

    # ------------------------------------------------------------ one cell

    def begin_some(self, left: Sequence[Cell]) -> bool:
        """Fill the free slots with cells that nobody works on; tell whether one turned out to be over."""
        elsewhere: list[Cell] = []
        found_over = False
        for cell in left:
            free = set(range(len(self.slots))) - {job.slot for job in self.jobs}
            if not free:
                break
            signs = (log_of(cell, self.out), cell.run / "metrics.jsonl")
            claim = self.claims.take(cell.folder, signs=signs)
            if claim is None:
                elsewhere.append(cell)
                continue
            try:
                stages = iter(remaining(cell))
                if (first := next(stages, None)) is not None and self.failure(cell) is None:
                    self.begin(cell, min(free), claim, first, stages)
                    continue
            except BaseException:
                claim.release()
                raise
            claim.release()  # another process ended it since it was looked at
            found_over = True
        self.tell_waiting(elsewhere)
        return found_over

    def tell_waiting(self, elsewhere: Sequence[Cell]) -> None:
        """Say once that there is nothing to do here while others work on what is left."""
        waiting = bool(elsewhere) and not self.jobs
        if waiting and not self.is_waiting:
            count = "a cell" if len(elsewhere) == 1 else f"{len(elsewhere)} cells"
            self.say(f"waiting for {count} that other processes work on, such as {elsewhere[0].folder}")
        self.is_waiting = waiting

    def begin(self, cell: Cell, slot: int, claim: Claim, first: Stage, stages: Iterator[Stage]) -> None:
        """Start a cell's first stage."""
        begun = first is not cell.stages[0] or any((cell.run / "checkpoints").glob("step_*"))
        self.prepare(cell)
        (cell.folder / FAILED).unlink(missing_ok=True)
        child = self.begin_stage(cell, first, slot, claim)
        self.jobs.append(Job(cell, slot, claim, stages, first, child))
        self.say(f"{label(cell)}: {'goes on' if begun else 'begins'}, {cell.steps:,} steps")

    def begin_stage(self, cell: Cell, stage: Stage, slot: int, claim: Claim) -> Child:
        """Start a stage's process."""
        log = log_of(cell, self.out)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"$ vit {shlex.join(stage.words)}\n")
            return begin(
                command(stage),
                log,
                environment=self.slots[slot],
                output=None if stage.output is None else unfinished(stage.output),
                inherited=(claim.descriptor,),
            )
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror}); the same command goes on from there") from error

    def look_after_jobs(self, stop: StopSignals) -> bool:
        """Take in what the processes have come to; tell whether a cell has ended."""
        ended = False
        for job in list(self.jobs):
            code = job.child.process.poll()
            if not job.claim.beat():
                self.say(f"{label(job.cell)}: another process has taken it over, or its folder is gone; left to that")
                end_all([job.child])
            elif code is None:
                continue
            elif stop.pending() is not None:
                self.drop_output(job)
            elif self.stage_succeeded(job, code):
                following = next(job.stages, None)
                if following is not None:
                    job.stage = following
                    job.child = self.begin_stage(job.cell, following, job.slot, job.claim)
                    continue
                self.say(f"{label(job.cell)}: done in {duration(time.monotonic() - job.started)}{headline(job.cell)}")
            else:
                self.note_failure(job, code)
            self.jobs.remove(job)
            job.claim.release()
            ended = True
        return ended

    def stage_succeeded(self, job: Job, code: int) -> bool:
        """Tell whether a process did what it was started for, and put what it printed into its place if so."""
        if code != 0:
            return False
        if (output := job.stage.output) is not None:
            sync_rename(unfinished(output), output)
        return job.stage.done.exists()

    def note_failure(self, job: Job, code: int) -> None:
        """Say why a cell failed, and write it down for the other processes.

        Raises:
            UserError: the disk is full, so that every other cell would fail too.
        """
        cell, stage = job.cell, job.stage
        self.drop_output(job)
        reason = job.child.reason() if code else f"ended without an error, but {stage.done} is not there"
        if any(text in reason for text in NO_ROOM):
            raise UserError(f"{self.out}: no room left ({label(cell)}: {reason}); free some, and the same command goes on")
        self.say(f"{label(cell)}: {stage.name} failed: {reason} (all of it: {job.child.log})")
        record = {
            "stage": stage.name,
            "reason": reason,
            "diverged": DIVERGED in reason,
            "log": str(job.child.log),
            "machine": os.uname().nodename,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.failed_before[cell.folder] = None
        write_json(cell.folder / FAILED, record)

    def drop_output(self, job: Job) -> None:
        """Delete what a process that did not succeed has printed, where that was meant for a file."""
        if job.stage.output is not None:
            unfinished(job.stage.output).unlink(missing_ok=True)

    def end(self) -> None:
        """Let the commands that are running save and end, and let others have their cells."""
        running = [job.child for job in self.jobs if job.child.process.poll() is None]
        if running:
            self.say(f"stopping {len(running)} cell{'s' if len(running) > 1 else ''}; what is training saves first")
        end_all(running)
        for job in self.jobs:
            with suppress(OSError):
                self.drop_output(job)
            job.claim.release()
        self.jobs = []


def unfinished(output: Path) -> Path:
    """Return where a command's output grows; what a kill leaves of it goes when the cell is claimed again."""
    return output.with_name(f".tmp-{output.name}")


def sync_rename(source: Path, target: Path) -> None:
    """Rename a file whose content is on disk before its name is."""
    with open(source, "rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)


def headline(cell: Cell) -> str:
    """Return the accuracy that a pretraining run ended with, to put behind a sentence; nothing where there is none."""
    try:
        summary = json.loads((cell.run / "summary.json").read_bytes())
        return f", top-1 {100 * summary['top1']:.2f} %"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
