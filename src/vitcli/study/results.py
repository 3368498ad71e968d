"""What a study's runs left behind: every number of every cell, the choices of the search, results.csv.

Everything here is read from the runs' own files, so it may be asked at any moment, by any process; what is not there yet is
left out.
"""

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitcli.config import DataConfig
from vitcli.data.sources import open_source
from vitcli.errors import UserError
from vitcli.predictions import VAL_PREDICTIONS, load_predictions, reading_file
from vitcli.run_record import read_rows
from vitcli.rundir import read_json
from vitcli.study.cells import UPSTREAM, Cell, Measurement, Stage
from vitcli.study.plan import Group, Study
from vitcli.train import SUMMARY

__all__ = ["Answers", "Trial", "as_csv", "choose", "chosen_of", "measure", "measure_cell", "read_answers", "trials_of"]

METRICS, FAILED = "metrics.jsonl", "failed.json"
COLUMNS = (
    *("variant", "family", "examples", "seed", "metric", "value", "count", "images_seen", "flops"),
    *("parameters", "forward_flops", "settings", "folder", "predictions"),
)


# ---------------------------------------------------------------- the search


@dataclass(frozen=True)
class Trial:
    """A run of the search, and how it came out on the development split."""

    cell: Cell
    top1: float | None  # None until it is finished, and where it diverged
    loss: float | None
    over: bool

    @property
    def merit(self) -> tuple[float, float]:
        """Return what is compared: top-1, of equal ones the loss."""
        return (-math.inf if self.top1 is None else self.top1, -math.inf if self.loss is None else -self.loss)


def trials_of(study: Study) -> dict[Group, list[Trial]]:
    """Return the trials that each group's settings are chosen from, in the order of the plan."""
    found: dict[Group, list[Trial]] = {}
    for cell in study.trials():
        summary = read_json(cell.run / SUMMARY)
        if summary is None:  # one that diverged does so again with the same settings, and has lost
            failed = read_json(cell.folder / FAILED) or {}
            trial = Trial(cell, None, None, over=failed.get("diverged") is True)
        else:
            trial = Trial(cell, summary["top1"], summary["loss"], over=True)
        found.setdefault(Group(cell.variant, cell.family, cell.examples), []).append(trial)
    return found


def choose(study: Study) -> dict[Group, Mapping[str, Any]]:
    """Return the settings that the search chooses, of every group for which it is over; {} without a search."""
    return chosen_of(trials_of(study))


def chosen_of(trials: Mapping[Group, Sequence[Trial]]) -> dict[Group, Mapping[str, Any]]:
    """Return the settings with the highest top-1 on the development split, of every group whose trials are all over.

    Of equal ones those with the lower loss, then those stated first. A group is left out while one of its trials is to be run,
    or failed for another reason than its settings, and where none came to its end.
    """
    chosen: dict[Group, Mapping[str, Any]] = {}
    for group, tried in trials.items():
        best = max(tried, key=lambda trial: trial.merit)
        if all(trial.over for trial in tried) and best.top1 is not None:
            chosen[group] = best.cell.point
    return chosen


# ---------------------------------------------------------------- what was measured


def measure(study: Study) -> list[Measurement]:
    """Return every number that the reported cells have yielded so far.

    Raises:
        UserError: a file of theirs is damaged.
    """
    return [one for cell in study.finals(choose(study)) for one in measure_cell(study, cell)]


def measure_cell(study: Study, cell: Cell) -> list[Measurement]:
    """Return every number that a cell has yielded so far; raise UserError where a file of it is damaged."""
    found = from_run(study, cell)
    for stage in cell.stages:
        if stage.done.is_file():
            found += from_stage(cell, stage)
    return found


def from_run(study: Study, cell: Cell) -> list[Measurement]:
    """Return what a pretraining run measured itself: upstream accuracy and few-shot probes, at its end or at each reading."""
    summary = read_json(cell.run / SUMMARY)
    if summary is None and not cell.readings:
        return []
    rows = logged(cell.run / METRICS)
    # where early stopping looks at a development split, the evaluation split has a stage of its own
    judges_itself = not any(stage.name == UPSTREAM for stage in cell.stages)
    found = []
    for examples in cell.readings or [cell.examples]:
        if cell.readings:
            step = step_at(cell, examples)
            judged, answers = rows.get(("eval", step)), cell.run / reading_file(step)
        else:
            assert summary is not None
            step, judged, answers = summary["step"], summary, cell.run / VAL_PREDICTIONS
        record = partial(measurement, cell, examples=examples, step=step if cell.readings else trained(cell, summary))
        if judges_itself and judged is not None and answers.is_file():
            found.append(record(UPSTREAM, judged["top1"], len(read_answers(answers).correct), predictions=answers))
        probes = rows.get(("fewshot", step), {})
        for dataset in dict.fromkeys(each.dataset for each in study.config.transfer):
            for key, value in probes.items():
                name, _, shots = key.rpartition("/")
                if name == probe_name(dataset):
                    whole = study.settings(cell).data.model_copy(update={"examples": None, "dev_fraction": None})
                    count = test_images(dataset, whole.model_dump_json())
                    found.append(record(f"fewshot:{dataset}:{shots.removesuffix('shot')}", value, count))
    return found


def from_stage(cell: Cell, stage: Stage) -> list[Measurement]:
    """Return what a stage after the pretraining measured."""
    name, _, reading = stage.name.rpartition("@") if cell.readings and "@" in stage.name else (stage.name, "", "")
    examples = int(reading) if reading else cell.examples
    step = step_at(cell, examples) if cell.readings else trained(cell, read_json(cell.run / SUMMARY))
    record = partial(measurement, cell, examples=examples, step=step)
    if name == UPSTREAM:
        correct = read_answers(stage.done).correct
        return [record(UPSTREAM, float(correct.mean()), len(correct), predictions=stage.done)]
    if name.startswith("finetune:"):
        summary = read_json(stage.done) or {}
        answers = stage.done.parent / VAL_PREDICTIONS
        kept = answers if answers.is_file() else None
        return [record(name, summary["top1"], summary["examples"], predictions=kept)]
    if name != "translate":
        return []
    table = read_json(stage.done) or {}
    return [
        record(f"{kind}:{row['px']}", row[key], table["examples"])
        for row in table["translation"]
        for kind, key in (("translate", "top1"), ("unchanged", "unchanged"))
    ]


def measurement(
    cell: Cell, metric: str, value: float, count: int, *, examples: int, step: int, predictions: Path | None = None
) -> Measurement:
    """Return a number that a cell yielded after so many steps of training."""
    images = step * cell.batch_size
    return Measurement(
        variant=cell.variant,
        family=cell.family,
        examples=examples,
        seed=cell.seed,
        metric=metric,
        value=float(value),
        count=count,
        images_seen=images,
        flops=float(cell.training_flops) * images,
        predictions=predictions,
    )


def step_at(cell: Cell, reading: int) -> int:
    """Return the step after which a one-pass run has seen so many images."""
    return math.ceil(reading / cell.batch_size)


def trained(cell: Cell, summary: Mapping[str, Any] | None) -> int:
    """Return the steps that a run took; early stopping goes back to the weights of an earlier one, which cost as much."""
    return cell.steps if summary is None else int(summary["trained_steps"])


def probe_name(dataset: str) -> str:
    """Return a data set's name in metrics.jsonl."""
    return re.sub(r"[^\w.-]+", "-", dataset).strip("-.")


def logged(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the evaluations and probes of metrics.jsonl by kind and step; {} where there is none."""
    return read_log(path, path.stat().st_mtime_ns) if path.is_file() else {}


@lru_cache(maxsize=4096)
def read_log(path: Path, _changed: int) -> dict[tuple[str, int], dict[str, Any]]:
    """Read them once for each state of the file."""
    return {(row["kind"], row["step"]): row for row in read_rows(path) if row["kind"] in ("eval", "fewshot")}


@lru_cache(maxsize=256)
def test_images(dataset: str, data: str) -> int:
    """Return the size of a data set's evaluation split, which a log of probes does not say; 0 where it is not here.

    Args:
        data: the run's section `data`, as JSON.
    """
    try:
        return len(open_source(dataset, split="val", data=DataConfig.model_validate_json(data)))
    except UserError:
        return 0


# ---------------------------------------------------------------- answers to single images


class Answers(NamedTuple):
    """Which images a model got right."""

    images: str  # a digest of which they are
    correct: NDArray[np.bool_]  # (N,)


def read_answers(path: Path) -> Answers:
    """Read which images were answered rightly, once for each state of the file; raise DataError if it is damaged."""
    return answers_in(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4096)
def answers_in(path: Path, _changed: int) -> Answers:
    found, about = load_predictions(path)
    digest = hashlib.sha256(found.indices.tobytes() + found.labels.tobytes() + str(about["fingerprint"]).encode())
    return Answers(digest.hexdigest(), found.correct)


# ---------------------------------------------------------------- as a table


def as_csv(cells: Sequence[tuple[Cell, Sequence[Measurement]]], *, out: Path) -> str:
    """Return what cells measured as CSV, a number in a line; paths are those below the study's folder."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for cell, found in cells:
        about = {
            "parameters": cell.parameters,
            "forward_flops": cell.forward_flops,
            "settings": json.dumps(dict(cell.point)) if cell.point else "",
            "folder": below(out, cell.folder),
        }
        for one in found:
            kept = "" if one.predictions is None else below(out, one.predictions)
            writer.writerow({**asdict(one), **about, "predictions": kept})
    return buffer.getvalue()


def below(out: Path, path: Path) -> str:
    """Return a path as seen from the study's folder."""
    return path.relative_to(out).as_posix() if path.is_relative_to(out) else str(path)
