"""`vit sweep`: the paper's fine-tuning protocol (ViT, 2010.11929, Table 4) as one command.

Every trial is a process that runs `vit finetune` in a run directory of its own; what lies there is all that is known of it, so
a sweep that was stopped at any moment goes on from there. One that fails is reported, and the others go on.
"""

import math
import os
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitcli.device import choose_device, hardware
from vitcli.errors import ConfigError, RunExistsError
from vitcli.interrupts import StopSignals
from vitcli.jobs import Child, begin, end_all, is_held, slots_of
from vitcli.logs import duration
from vitcli.rundir import build_manifest, lock_run, write_json
from vitcli.sweep_plan import (
    Start,
    Target,
    Trial,
    best_rates_first,
    describe_target,
    hours,
    name_starts,
    plan_target,
    vtab_sets,
    write_plan,
)
from vitcli.sweep_results import STOPPED, best_rate, evaluations, is_over, outcome, result_lines, results, share, write_results
from vitcli.train import short_name

__all__ = ["hopeless", "sweep"]

Say = Callable[[str], None]

GRACE = 0.3  # of a trial's steps, before which it is not compared
MARGIN = 0.05  # of accuracy below the others' median, and twice the standard error of such a difference
LEAST_OTHERS = 2
TICK_SECONDS = 0.2


def sweep(
    ckpts: Sequence[Path],
    datasets: Sequence[str],
    config_path: Path | None,
    overrides: Sequence[str],
    *,
    out: Path | None,
    root: Path | None,
    from_scratch: bool = False,
    lrs: Sequence[float] | None = None,
    seeds: int = 3,
    trial_steps: int | None = None,
    jobs: int | None = None,
    early_stop: bool = True,
    vtab: bool = False,
    dry_run: bool = False,
    say: Say,
) -> bool:
    """Choose a rate for each start and data set, train with it on everything, and write and say what came out.

    Args:
        datasets: as `--dataset`; none with `vtab` for those that lie under the data root.
        root: the data root, also in `overrides`.
        from_scratch: also sweep the same models from random weights.
        jobs: trials side by side; None for as many as there are GPUs, or one.

    Returns:
        Whether every trial came to its end, or was stopped early.

    Raises:
        Interrupted: a signal arrived; every trial that was running is saved.
        UserError: settings or data that cannot be, before anything is trained.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("vit sweep starts processes of its own, one for each trial: run it without torchrun; see --jobs")
    if not datasets and not vtab:
        raise ConfigError("--dataset is missing; name one or more data sets to sweep")
    starts = name_starts(ckpts, from_scratch=from_scratch)
    out = out or Path("runs") / f"{starts[0].name if len(ckpts) == 1 else 'several'}-{'vtab' if vtab else 'sweep'}"
    refuse_run(out)
    targets: list[Target] = []
    for start, dataset, folder in places(starts, datasets or vtab_sets(root, say=say), out):
        target = plan_target(
            start,
            dataset,
            folder,
            config_path=config_path,
            overrides=overrides,
            lrs=lrs,
            seeds=seeds,
            trial_steps=trial_steps,
            vtab=vtab,
            precision=targets[0].config.train.precision if targets else None,
            say=silent if start.from_scratch else say,
        )
        if twin := next((other for other in targets if are_equal(other, target)), None):
            say(f"{target.start.name}: the same model and settings as {twin.start.name}, swept once")
        else:
            targets.append(target)
    device = choose_device(targets[0].config.train.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what measuring took belongs to the trials
    slots = slots_of(jobs, device)
    say("\n".join(line for target in targets for line in describe_target(target)))
    side_by_side = len(slots) if any("CUDA_VISIBLE_DEVICES" in slot for slot in slots) else 1  # jobs on a CPU share its cores
    total = sum(target.seconds for target in targets) / side_by_side
    say(f"in all about {hours(total)} of training, {len(slots)} trial{'s' if len(slots) > 1 else ''} at a time, in {out}")
    if dry_run:
        return True
    stop = StopSignals()
    with stop.installed(), lock_run(out), stop.deferred():
        for target in targets:
            write_plan(target)
        manifest = build_manifest(hardware=hardware(device), data={"sources": list(dict.fromkeys(t.dataset for t in targets))})
        about = {**manifest, "jobs": len(slots), "early_stop": early_stop}
        problems = run_trials(targets, out, slots=slots, early_stop=early_stop, about=about, stop=stop, say=say)
    say("\n".join(["", *result_lines(results(targets, problems, early_stop=early_stop))]))
    say(f"{out}: sweep.json, sweep.csv, sweep.png; curves: tensorboard --logdir {shlex.quote(str(out))}")
    return not problems


def silent(text: str) -> None:
    """Leave it to the start that has the weights."""


def refuse_run(out: Path) -> None:
    """Raise RunExistsError where a sweep must not go: into a file, or into a run."""
    if out.exists() and not out.is_dir():
        raise RunExistsError(f"{out}: this is a file, expected a directory for the sweep; choose another --out")
    if (out / "manifest.json").exists() or (out / "checkpoints").exists():
        raise RunExistsError(f"{out}: this is a run; choose another --out for the sweep, such as {out}-sweep")


def places(starts: Sequence[Start], datasets: Sequence[str], out: Path) -> list[tuple[Start, str, Path]]:
    """Return every start and data set with its folder: OUT/SET, or OUT/START/SET where there are several starts."""
    names: dict[str, str] = {}
    for dataset in datasets:
        same = names.setdefault(short_name(dataset), dataset)
        if same != dataset:
            raise ConfigError(f"--dataset: {same} and {dataset} would share the folder {short_name(dataset)}; sweep them apart")
    base = [(start, out / start.name if len(starts) > 1 else out) for start in starts]
    return [(start, dataset, folder / name) for start, folder in base for name, dataset in names.items()]


def are_equal(a: Target, b: Target) -> bool:
    """Tell whether two baselines are the same: without weights, what a checkpoint says of its model is all that matters."""
    if not (a.start.from_scratch and b.start.from_scratch and a.dataset == b.dataset):
        return False
    return a.config.model_copy(update={"ckpt": None}) == b.config.model_copy(update={"ckpt": None})


# ---------------------------------------------------------------- trials as processes


@dataclass
class Running:
    """A trial that is running."""

    trial: Trial
    slot: int
    child: Child
    told: int = 0  # the last evaluation that was spoken of
    is_stopped: bool = False


def run_trials(
    targets: Sequence[Target],
    out: Path,
    *,
    slots: Sequence[Mapping[str, str]],
    early_stop: bool,
    about: Mapping[str, Any],
    stop: StopSignals,
    say: Say,
) -> dict[Path, str]:
    """Run what is left of every target, as many trials at a time as there are slots; return why some failed, by run directory.

    Raises:
        Interrupted: all that were running are saved.
    """
    problems: dict[Path, str] = {}
    running: list[Running] = []
    waiting: list[Trial] = []
    told_of: set[Path] = set()
    changed = True
    try:
        while True:
            for one in list(running):
                watch(one, early_stop=early_stop, say=say)
                if one.child.process.poll() is not None:
                    running.remove(one)
                    changed = True
                    if stop.pending() is None:
                        conclude(one, problems, say=say)
            stop.check()
            if changed:
                write_results(out, results(targets, problems, early_stop=early_stop), about=about)
                waiting = [trial for target in targets for trial in left_to_do(target, problems, early_stop=early_stop)]
                changed = False
            busy = {one.trial.folder for one in running}
            elsewhere = False
            for trial in waiting:
                free = [slot for slot in range(len(slots)) if slot not in {one.slot for one in running}]
                if trial.folder in busy or not free:
                    continue
                if is_held(trial.folder):  # by a trial whose sweep was killed: it is going on by itself
                    elsewhere = True
                    if trial.folder not in told_of:
                        say(f"{trial.label}: another process is training it; waiting for that")
                        told_of.add(trial.folder)
                    continue
                if trial.folder in told_of:
                    told_of.discard(trial.folder)
                    changed = True  # it has ended, one way or the other
                    continue
                running.append(begin_trial(trial, free[0], slots[free[0]], say=say))
                busy.add(trial.folder)
            if not (running or elsewhere or changed):
                return problems
            time.sleep(TICK_SECONDS)
    finally:
        if running:
            say(f"stopping {len(running)} trial{'s' if len(running) > 1 else ''}, which save first")
            end_all([one.child for one in running])
            write_results(out, results(targets, problems, early_stop=early_stop), about=about)
            say("stopped; the same command goes on from there")


def left_to_do(target: Target, problems: Mapping[Path, str], *, early_stop: bool) -> list[Trial]:
    """Return the trials of a target that may run now: those that choose the rate, and the final ones once it is chosen."""
    trials = [trial for trial in target.trials if not is_over(trial, problems, early_stop=early_stop)]
    if trials:
        return best_rates_first(trials)
    rate = best_rate(target, problems)
    finals = [] if rate is None else target.finals(rate)
    return [trial for trial in finals if not is_over(trial, problems, early_stop=early_stop)]


def begin_trial(trial: Trial, slot: int, environment: Mapping[str, str], *, say: Say) -> Running:
    """Start a trial's process; what it prints goes to a file beside its run directory."""
    before = evaluations(trial.folder)
    log = trial.folder.parent / "logs" / f"{trial.folder.name}.txt"
    child = begin(trial.command(), log, environment=environment)
    say(f"{trial.label}: {'goes on' if before or last_begun(trial) else 'begins'}, {trial.steps:,} steps")
    return Running(trial, slot, child, told=max(before, default=0))


def last_begun(trial: Trial) -> bool:
    return any((trial.folder / "checkpoints").glob("step_*"))


def watch(one: Running, *, early_stop: bool, say: Say) -> None:
    """Tell of new evaluations, and stop a trial that is hopeless."""
    trial = one.trial
    own = evaluations(trial.folder)
    for step in sorted(step for step in own if one.told < step < trial.steps):  # the last one comes with the result
        say(f"{trial.label}: step {step:,} of {trial.steps:,}, top-1 {share(own[step]).strip()}")
        one.told = step
    if not early_stop or trial.final or one.is_stopped:
        return
    others = [evaluations(other.folder) for other in trial.target.trials if other.folder != trial.folder]
    reason = hopeless(own, others, steps=trial.steps, images=trial.target.dev_examples)
    if reason is not None:
        write_json(trial.folder / STOPPED, reason)  # first, so that a kill in between changes nothing
        one.is_stopped = True
        one.child.process.terminate()


def hopeless(
    own: Mapping[int, float], others: Sequence[Mapping[int, float]], *, steps: int, images: int
) -> dict[str, Any] | None:
    """Say why a trial need not go on, if that is so: the median rule (Golovin et al., "Google Vizier", 2017), with a margin.

    After `GRACE` of its steps, at its last evaluation that at least two others have as well, it is below their median by more
    than 5 points and twice the standard error of the difference of two accuracies on so many images: rates that are slow at
    first and overtake the others later should not be lost.

    Args:
        own, others: accuracy in [0, 1] by step.
        steps: of a whole trial.
        images: in the development split.
    """
    for step in sorted((step for step in own if GRACE * steps <= step < steps), reverse=True):
        theirs = [other[step] for other in others if step in other]
        if len(theirs) < LEAST_OTHERS:
            continue
        median = statistics.median(theirs)
        margin = MARGIN + 2 * math.sqrt(2 * median * (1 - median) / images)
        return {"step": step, "top1": own[step], "median": median, "margin": margin} if own[step] < median - margin else None
    return None


def conclude(one: Running, problems: dict[Path, str], *, say: Say) -> None:
    """Say how a process ended, and keep why if it failed."""
    trial, child = one.trial, one.child
    end = outcome(trial, problems)
    if end.state == "finished":
        say(f"{trial.label}: top-1 {share(end.top1).strip()}, in {duration(child.seconds)}")
    elif one.is_stopped:
        say(f"{trial.label}: stopped early, {end.problem}")
    else:
        problems[trial.folder] = child.reason()
        say(f"{trial.label}: failed: {problems[trial.folder]} (all of it: {child.log})")
