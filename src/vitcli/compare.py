"""`vit compare`: runs side by side: what was set differently, how they went, and whether the same images tell them apart."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.assess import predictions_of_run
from vitcli.config import Config
from vitcli.config_file import flatten
from vitcli.errors import UserError
from vitcli.figures import Panel, draw_panels, save_figure
from vitcli.logs import duration, finite
from vitcli.metrics import bootstrap_interval, mcnemar, paired_bootstrap, share_interval
from vitcli.predictions import VAL_PREDICTIONS, Predictions
from vitcli.run_record import RunRecord, read_run
from vitcli.rundir import read_json, write_json
from vitcli.train import keys_free_to_change

__all__ = ["comparison_lines", "compare_runs"]

Say = Callable[[str], None]

TABLE, CURVES = "compare.json", "curves.png"
MADE_BY = "vit compare"
WIDEST = 28  # characters of a setting in the table


@dataclass(frozen=True)
class Contender:
    """A run and its answers to its evaluation images."""

    name: str
    record: RunRecord
    predictions: Predictions | None
    about: Mapping[str, Any] | None
    problem: str | None  # why there are no predictions


def compare_runs(run_dirs: Sequence[Path], *, out: Path | None, data_root: Path | None, say: Say) -> dict[str, Any]:
    """Compare runs and return JSON values: `runs`, `settings` that differ, and `pairs` with what tells them apart.

    Args:
        out: a folder for compare.json and curves.png.
        data_root: where evaluation images are, of a run that has no predictions stored.
        say: is told which runs are evaluated anew.

    Raises:
        UserError: one of them is no run directory, or one stands there twice, or `out` holds something else.
    """
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise UserError(f"{', '.join(map(str, run_dirs))}: one of them is there twice; give each run once")
    if len(run_dirs) < 2:
        raise UserError(f"{run_dirs[0]}: one run alone; give at least two to compare, or see it with vit report")
    if out is not None:
        refuse_other_folder(out)
    records = [read_run(path) for path in run_dirs]
    contenders = [
        contender(name, record, data_root=data_root, say=say) for name, record in zip(names_of(records), records, strict=True)
    ]
    result = {
        "made_by": MADE_BY,
        "runs": [facts(each) for each in contenders],
        "settings": differing_settings(contenders),
        "pairs": with_holm([pair(a, b) for a, b in combinations(contenders, 2)]),
    }
    result = dict(finite(result))
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{out}: cannot be made ({error.strerror}); choose another --out") from error
        write_json(out / TABLE, result)
        save_figure(out / CURVES, draw_panels(panels(contenders)))
    return result


def refuse_other_folder(out: Path) -> None:
    """Raise UserError if a folder holds something that `vit compare` did not write."""
    if out.is_file():
        raise UserError(f"{out}: this is a file; expected a folder for {TABLE} and {CURVES}")
    if out.is_dir() and any(out.iterdir()) and (read_json(out / TABLE) or {}).get("made_by") != MADE_BY:
        raise UserError(f"{out}: holds other files; choose a new folder with --out")


def names_of(records: Sequence[RunRecord]) -> list[str]:
    """Return the runs' own names, or, where two have the same, what their paths do not share."""
    names = [record.name for record in records]
    if len(set(names)) == len(names):
        return names
    paths = [record.path.resolve() for record in records]
    if len(set(paths)) < len(paths):  # a run beside itself
        return [str(record.path) for record in records]
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


def contender(name: str, record: RunRecord, *, data_root: Path | None, say: Say) -> Contender:
    """Load a run's answers, or make them; where that cannot be done the run still has its settings and curves."""
    if not record.config.objective.needs_labels:
        return Contender(name, record, None, None, "it learned without labels, so it gives no answers")
    if not record.checkpoints and not (record.path / VAL_PREDICTIONS).exists():
        return Contender(name, record, None, None, "it has no checkpoint yet")
    try:
        if not (record.path / VAL_PREDICTIONS).exists():
            say(f"{record.path}: no predictions are stored; evaluating its newest checkpoint")
        predictions, about = predictions_of_run(record.path, data_root=data_root, say=say)
    except UserError as error:
        say(f"{record.path}: {error}")
        return Contender(name, record, None, None, str(error))
    return Contender(name, record, predictions, about, None)


# ---------------------------------------------------------------- each run


def facts(each: Contender) -> dict[str, Any]:
    """Return a run's final numbers, with 95 % bootstrap intervals where its answers, or their counts, are known."""
    record, config = each.record, each.record.config
    row = record.summary or record.last_eval() or {}
    seconds = record.train_seconds()
    found: dict[str, Any] = {
        "run": str(record.path),
        "name": each.name,
        "finished": record.summary is not None,
        "step": record.step,
        "of_steps": config.train.steps,
        "dataset": config.data.val_source or config.data.source,
        "examples": row.get("examples"),
        "train_seconds": seconds or None,
        "images_per_second": record.step * config.train.batch_size / seconds if seconds and record.summary else None,
        "problem": each.problem,
    }
    found |= {key: {"value": row.get(key), "interval": None} for key in ("top1", "top5", "loss")}
    if each.predictions is not None and each.about is not None:
        predictions = each.predictions
        guesses = predictions.top_classes.shape[1]
        answers = {"top1": predictions.correct, "top5": predictions.ranks < guesses, "loss": predictions.losses}
        for key, values in answers.items():
            mean = float(np.asarray(values, np.float64).mean())
            found[key] = {"value": mean, "interval": list(bootstrap_interval(values))}
        found |= {"examples": len(predictions), "dataset": each.about["dataset"], "evaluated_step": each.about["step"]}
    elif row.get("examples") and "correct" in row:  # without labels nothing is right or wrong
        for key, hits in (("top1", "correct"), ("top5", "correct_top5")):
            low, high = share_interval(row[hits], row["examples"])
            found[key]["interval"] = [float(low), float(high)]
    return found


def differing_settings(contenders: Sequence[Contender]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, a value for each run; without those that change no result."""
    free = {"out", *keys_free_to_change(Config)}
    flat = [flatten(each.record.config.model_dump(mode="json")) for each in contenders]
    keys = list(dict.fromkeys(key for settings in flat for key in settings if key not in free))
    values = {key: [settings.get(key) for settings in flat] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row[1:])}


def panels(contenders: Sequence[Contender]) -> list[Panel]:
    """Return the curves side by side; by images seen where steps are of different sizes."""
    sizes = {each.record.config.train.batch_size for each in contenders}
    by_images = len(sizes) > 1
    x_label = "images seen" if by_images else "step"

    def curve(kind: str, key: str) -> dict[str, list[tuple[float, float]]]:
        return {
            each.name: [
                (x * (each.record.config.train.batch_size if by_images else 1), y) for x, y in each.record.curve(kind, key)
            ]
            for each in contenders
        }

    return [
        Panel(curve("eval", "top1"), x_label, "top-1", "Evaluation: top-1", percent=True, points=True),
        Panel(curve("eval", "loss"), x_label, "loss", "Evaluation: loss", points=True),
        Panel(curve("train", "loss"), x_label, "loss", "Training: loss"),
        Panel(curve("train", "lr"), x_label, "learning rate", "Learning rate"),
    ]


# ---------------------------------------------------------------- each pair


def pair(a: Contender, b: Contender) -> dict[str, Any]:
    """Compare the first guesses of two runs on the images that both answered.

    `difference` is top-1 of b less that of a, with its paired 95 % bootstrap interval; `p` is McNemar's, exact.
    """
    said: dict[str, Any] = {"a": a.name, "b": b.name}
    if a.predictions is None or b.predictions is None or a.about is None or b.about is None:
        lacking = a if a.predictions is None else b
        return {**said, "comparable": False, "why": f"no predictions of {lacking.name}: {lacking.problem}"}
    if a.about["fingerprint"] != b.about["fingerprint"]:
        datasets = a.about["dataset"], b.about["dataset"]
        other = f"{datasets[0]} and {datasets[1]}" if datasets[0] != datasets[1] else f"two versions or parts of {datasets[0]}"
        return {**said, "comparable": False, "why": f"evaluated on different images: {other}"}
    shared, in_a, in_b = np.intersect1d(a.predictions.indices, b.predictions.indices, assume_unique=True, return_indices=True)
    if not len(shared):
        return {**said, "comparable": False, "why": "no image was answered by both"}
    right_a, right_b = a.predictions.correct[in_a], b.predictions.correct[in_b]
    difference, low, high = paired_bootstrap(right_b, right_a)
    return {
        **said,
        "comparable": True,
        "images": len(shared),
        "only_a": int((right_a & ~right_b).sum()),
        "only_b": int((right_b & ~right_a).sum()),
        "difference": difference,
        "interval": [low, high],
        "p": mcnemar(right_a, right_b),
    }


def with_holm(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add `p_holm`: p of each pair, adjusted for how many pairs were looked at (Holm 1979)."""
    tested = sorted((found["p"], place) for place, found in enumerate(pairs) if found["comparable"])
    adjusted: dict[int, float] = {}
    highest = 0.0
    for done, (p, place) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - done)))
        adjusted[place] = highest
    return [{**found, **({"p_holm": adjusted[place]} if place in adjusted else {})} for place, found in enumerate(pairs)]


# ---------------------------------------------------------------- in the terminal


def comparison_lines(result: Mapping[str, Any]) -> list[str]:
    """Return a comparison as lines for a person."""
    runs = result["runs"]
    head = ["run", "data", "images", "top-1", "95 % interval", "top-5", "loss", "steps", "training"]
    rows = [head]
    for run in runs:
        top1, top5, loss = run["top1"], run["top5"], run["loss"]
        rows.append(
            [
                run["name"],
                cut(str(run["dataset"])),
                "-" if run["examples"] is None else f"{run['examples']:,}",
                percent(top1["value"]),
                "-" if top1["interval"] is None else "{:.1f} to {:.1f}".format(*(100 * end for end in top1["interval"])),
                percent(top5["value"]),
                "-" if loss["value"] is None else f"{loss['value']:.4f}",
                f"{run['step']:,}" if run["finished"] else f"{run['step']:,} of {run['of_steps']:,}",
                "-" if run["train_seconds"] is None else duration(run["train_seconds"]),
            ]
        )
    lines = aligned(rows, right=range(2, len(head)))
    settings = result["settings"]
    lines += ["", "settings that differ" if settings else "no setting differs"]
    if settings:
        names = [["", *(cut_front(run["name"]) for run in runs)]]
        lines += aligned(names + [[key, *(cut(in_json(value)) for value in row)] for key, row in settings.items()])
    lines += [""]
    tests = sum(found["comparable"] for found in result["pairs"])
    for found in result["pairs"]:
        if not found["comparable"]:
            lines.append(f"{found['a']} and {found['b']}: not comparable, {found['why']}")
            continue
        low, high = (100 * end for end in found["interval"])
        lines += [
            f"{found['b']} less {found['a']}: {100 * found['difference']:+.2f} points of top-1, p = {found['p_holm']:.2g}",
            f"  95 % interval {low:+.2f} to {high:+.2f}; on the same {found['images']:,} images {found['only_b']:,} against "
            f"{found['only_a']:,} that the other got wrong",
        ]
    if tests:
        adjusted = f", adjusted for {tests} pairs (Holm)" if tests > 1 else ""
        lines.append(
            f"intervals: paired bootstrap over images; p: McNemar's exact test{adjusted}. One training run each: another"
        )
        lines.append("seed may change more than these images do; compare several seeds before you conclude (vit sweep).")
    return lines


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def cut(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def cut_front(text: str) -> str:
    """Shorten a name, whose end says more."""
    return text if len(text) <= WIDEST else f"…{text[1 - WIDEST :]}"


def percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.2f} %"


def in_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
