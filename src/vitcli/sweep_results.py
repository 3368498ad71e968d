"""What a sweep's trials left in their run directories, and what follows from it: the best rate, tables, CSV, JSON, a figure.

Everything here is read from the runs; the sweep's own files are derived from them and written anew whenever one ends.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vitcli.figures import Panel, draw_panels, save_figure
from vitcli.rundir import read_json, write_json, write_text
from vitcli.sweep_plan import Target, Trial

__all__ = [
    "STOPPED",
    "Outcome",
    "best_rate",
    "evaluations",
    "is_over",
    "outcome",
    "panels_of",
    "result_lines",
    "results",
    "write_results",
]

STOPPED = "stopped.json"  # in the run directory of a trial that was stopped early: at which step, and why
COLUMNS = (
    "dataset", "start", "from_scratch", "checkpoint", "phase", "lr", "seed", "state", "step", "steps", "top1", "top5", "loss",
    "train_seconds", "run", "problem",
)  # fmt: skip
Problems = Mapping[Path, str]  # by run directory: why it failed in this call


@dataclass(frozen=True)
class Outcome:
    """How far a trial came; accuracies are shares of 1, on the development split or, of a final run, on the test split."""

    state: Literal["finished", "stopped", "failed", "begun", "waiting"]
    step: int = 0
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    train_seconds: float | None = None
    problem: str | None = None


def outcome(trial: Trial, problems: Problems) -> Outcome:
    """Read what became of a trial."""
    if (summary := read_json(trial.folder / "summary.json")) is not None:
        numbers = {key: summary.get(key) for key in ("top1", "top5", "loss", "train_seconds")}
        return Outcome("finished", summary["step"], **numbers)
    if trial.folder in problems:
        return Outcome("failed", last_step(trial.folder), problem=problems[trial.folder])
    if (stopped := read_json(trial.folder / STOPPED)) is not None:
        own, median = (share(stopped[key]).strip() for key in ("top1", "median"))
        why = f"{own} at step {stopped['step']:,}, where the others' median was {median}"
        return Outcome("stopped", stopped["step"], stopped["top1"], problem=why)
    step = last_step(trial.folder)
    return Outcome("begun" if step else "waiting", step)


def is_over(trial: Trial, problems: Problems, *, early_stop: bool) -> bool:
    """Tell whether nothing is left to do for a trial; one stopped early may go on where that is turned off."""
    state = outcome(trial, problems).state
    return state in ("finished", "failed") or (state == "stopped" and early_stop)


def evaluations(run_dir: Path) -> dict[int, float]:
    """Return top-1 by step from a run's metrics.jsonl; what is half written is left out."""
    found: dict[int, float] = {}
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return found
    for line in lines:
        if '"eval"' not in line:
            continue
        try:
            row = json.loads(line)
            if row["kind"] == "eval":
                found[int(row["step"])] = float(row["top1"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def last_step(run_dir: Path) -> int:
    """Return the last evaluated step, or that of the newest checkpoint."""
    names = [path.name.removeprefix("step_") for path in (run_dir / "checkpoints").glob("step_*")]
    return max([0, *evaluations(run_dir), *(int(name) for name in names if name.isdecimal())])


def best_rate(target: Target, problems: Problems) -> float | None:
    """Return the rate with the highest top-1 on the development split, of equal ones that with the lower loss, then the lower.

    None if no trial has finished.
    """
    if not target.trials:
        return target.lrs[0]
    ended = [(trial, outcome(trial, problems)) for trial in target.trials]
    finished = [(trial, end) for trial, end in ended if end.state == "finished"]

    def merit(pair: tuple[Trial, Outcome]) -> tuple[float, float, float]:
        trial, end = pair
        return end.top1 or 0.0, -(math.inf if end.loss is None else end.loss), -trial.lr

    return max(finished, key=merit)[0].lr if finished else None


# ---------------------------------------------------------------- numbers


def results(targets: Sequence[Target], problems: Problems, *, early_stop: bool) -> list[dict[str, Any]]:
    """Return all that is known, as JSON values, one object for each start and data set."""
    return [result(target, problems, early_stop=early_stop) for target in targets]


def result(target: Target, problems: Problems, *, early_stop: bool) -> dict[str, Any]:
    """Return what is known of one start on one data set."""
    chosen = best_rate(target, problems) if all(is_over(t, problems, early_stop=early_stop) for t in target.trials) else None
    trials = [row(trial, problems) for trial in target.trials]
    finals = [] if chosen is None else [row(trial, problems) for trial in target.finals(chosen)]
    top1 = [final["top1"] for final in finals if final["state"] == "finished"]
    return {
        "dataset": target.dataset,
        "start": target.start.name,
        "from_scratch": target.start.from_scratch,
        "checkpoint": str(target.start.ckpt),
        "train_examples": target.train_examples,
        "dev_examples": target.dev_examples if trials else 0,
        "test_examples": target.test_examples,
        "steps": target.steps,
        "trial_steps": target.trial_steps,
        "batch_size": target.config.train.batch_size,
        "image_size": list(target.config.data.image_size),
        "settings": str(target.folder / "settings.yaml"),
        "trials": trials,
        "lr": chosen,
        "finals": finals,
        "test": {
            "seeds": len(top1),
            "top1_mean": statistics.mean(top1) if top1 else None,
            "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,  # n - 1
            "top1": top1,
        },
    }


def row(trial: Trial, problems: Problems) -> dict[str, Any]:
    """Return what is known of one run."""
    known = {"lr": trial.lr, "seed": trial.seed, "steps": trial.steps, "run": str(trial.folder)}
    return {**known, **asdict(outcome(trial, problems))}


# ---------------------------------------------------------------- words


def result_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of every rate, and one of the results."""
    lines: list[str] = []
    for each in found:
        if not each["trials"]:
            continue
        lines.append(f"{each['dataset']}, {each['start']}: top-1 on {each['dev_examples']:,} images of the training split")
        for trial in each["trials"]:
            mark = "  best" if trial["lr"] == each["lr"] else ""
            lines.append(f"  lr {trial['lr']:<8g} {said(trial)}{mark}")
        if (edge := edge_note(each)) is not None:
            lines.append(f"  {edge}")
    names = [(each["dataset"], each["start"]) for each in found]
    wide, long = (max(map(len, column)) for column in zip(("data set", "start"), *names))
    lines += [
        *([""] if lines else []),
        f"{'data set':<{wide}}  {'start':<{long}}  {'lr':<8}  test top-1, mean and standard deviation",
    ]
    for each in found:
        lr = "-" if each["lr"] is None else f"{each['lr']:g}"
        lines.append(f"{each['dataset']:<{wide}}  {each['start']:<{long}}  {lr:<8}  {verdict(each)}")
    for start in dict.fromkeys(each["start"] for each in found):
        means = [each["test"]["top1_mean"] for each in found if each["start"] == start]
        if len(means) > 1 and None not in means:
            lines.append(f"{start}: {100 * statistics.mean(means):.2f} % on average of {len(means)} data sets")
    return lines


def said(trial: Mapping[str, Any]) -> str:
    if trial["state"] == "finished":
        return share(trial["top1"])
    if trial["state"] in ("stopped", "failed"):
        return f"{trial['state']}: {trial['problem']}"
    return "not begun" if trial["state"] == "waiting" else f"at step {trial['step']:,} of {trial['steps']:,}"


def verdict(each: Mapping[str, Any]) -> str:
    """Say how the final runs of one start on one data set came out."""
    test, finals = each["test"], each["finals"]
    failed = [f"seed {final['seed']} failed: {final['problem']}" for final in finals if final["state"] == "failed"]
    left = sum(final["state"] in ("begun", "waiting") for final in finals)
    parts = []
    if test["seeds"]:
        spread = "" if test["top1_std"] is None else f" ± {100 * test['top1_std']:.2f}"
        parts.append(f"{100 * test['top1_mean']:.2f}{spread} % ({test['seeds']} seed{'s' if test['seeds'] > 1 else ''})")
    if left:
        parts.append(f"{left} to go")
    if each["lr"] is None:
        over = all(trial["state"] in ("failed", "stopped") for trial in each["trials"])
        parts.append("no rate came to its end" if over else "no rate chosen yet")
    return "; ".join([*parts, *failed])


def edge_note(each: Mapping[str, Any]) -> str | None:
    """Say so if the best rate is the last one tried on its side: beyond it may be a better one."""
    rates = [trial["lr"] for trial in each["trials"]]
    if each["lr"] is None or len(rates) < 3 or min(rates) < each["lr"] < max(rates):
        return None
    side, beyond = ("largest", each["lr"] * 3) if each["lr"] == max(rates) else ("smallest", each["lr"] / 3)
    return f"the best rate is the {side} tried; {beyond:.1g} may be better still (--lrs)"


def share(accuracy: float | None) -> str:
    return "      -" if accuracy is None else f"{100 * accuracy:6.2f} %"


# ---------------------------------------------------------------- files


def write_results(out: Path, found: Sequence[Mapping[str, Any]], *, about: Mapping[str, Any]) -> None:
    """Write sweep.json, sweep.csv and sweep.png."""
    write_json(out / "sweep.json", {**about, "results": list(found)})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for each in found:
        for phase, rows in (("dev", each["trials"]), ("test", each["finals"])):
            writer.writerows({**each, **one, "phase": phase} for one in rows)
    write_text(out / "sweep.csv", buffer.getvalue())
    panels = [panel for dataset in dict.fromkeys(each["dataset"] for each in found) for panel in panels_of(dataset, found)]
    if panels:
        save_figure(out / "sweep.png", draw_panels(panels))


def panels_of(dataset: str, found: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Return a data set's figures: accuracy by rate on the development split, and by step on the test split."""
    here = [each for each in found if each["dataset"] == dataset]
    by_rate = {
        each["start"]: [(trial["lr"], trial["top1"]) for trial in each["trials"] if trial["state"] == "finished"]
        for each in here
    }
    by_step = {each["start"]: mean_curve([Path(final["run"]) for final in each["finals"]]) for each in here}
    panels = []
    if any(by_rate.values()):
        shown = {name: points for name, points in by_rate.items() if points}
        title = f"{dataset}, development split"
        panels.append(Panel(shown, "learning rate", "top-1", title, percent=True, log_x=True, points=True))
    if any(by_step.values()):
        shown = {name: points for name, points in by_step.items() if points}
        panels.append(Panel(shown, "step", "top-1", f"{dataset}, test split, mean of the seeds", percent=True))
    return panels


def mean_curve(runs: Sequence[Path]) -> list[tuple[float, float]]:
    """Return the mean top-1 of several runs at the steps that all of those that have any have in common."""
    curves = [curve for curve in map(evaluations, runs) if curve]
    steps = set.intersection(*map(set, curves)) if curves else set()
    return [(step, statistics.mean(curve[step] for curve in curves)) for step in sorted(steps)]
