"""A study's results as files: results.csv, study.json, study.md and figures, all derived from the runs and written anew."""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from vitcli.config_file import flatten
from vitcli.errors import UserError
from vitcli.figures import save_figure
from vitcli.rundir import read_json, write_json, write_text
from vitcli.study.cells import PLAIN, Cell, Measurement, label
from vitcli.study.controls import draw_study
from vitcli.study.laws import PowerLaw
from vitcli.study.page import accuracy_table, arms_table, as_text, page
from vitcli.study.plan import Study
from vitcli.study.results import Trial, as_csv, chosen_of, measure_cell, trials_of
from vitcli.study.summary import Summary, metric_words, summarise
from vitcli.train import MANIFEST, SUMMARY

__all__ = ["record_of", "write_study"]

Say = Callable[[str], None]


def write_study(study: Study, *, say: Say, figures: bool = False, failed: Mapping[Path, str] | None = None) -> list[str]:
    """Write all that is known of a study's results, and return the answer as lines of text.

    Args:
        figures: draw them too, which takes some seconds each; else those of an earlier call stay as they are.
        failed: why cells failed, by their folders.

    Raises:
        UserError: the folder cannot be written.
    """
    trials = trials_of(study)
    cells = study.finals(chosen_of(trials))
    measured = [(cell, measured_now(study, cell, say=say)) for cell in cells]
    write_text(study.out / "results.csv", as_csv(measured, out=study.out))
    summary = summary_of(study, [one for _, found in measured for one in found])
    record = record_of(study, cells, trials=trials, failed=failed or {})
    drawn = []
    for metric, stem, caption, figure in draw_study(summary) if figures else ():
        for suffix in ("png", "svg"):
            save_figure(study.out / "figures" / f"{stem}.{suffix}", figure)
        drawn.append((metric, stem, caption))
    write_json(study.out / "study.json", {**record, **as_json(summary)})
    write_text(study.out / "study.md", page(summary, record, drawn))
    return answer(summary, study.out, drawn=bool(drawn))


def measured_now(study: Study, cell: Cell, *, say: Say) -> list[Measurement]:
    """Return what a cell measured; one with a damaged file has measured nothing, which is said."""
    try:
        return measure_cell(study, cell)
    except UserError as error:
        say(f"warning: {label(cell)} is left out of the results: {error}")
        return []


def summary_of(study: Study, measurements: Sequence[Measurement]) -> Summary:
    """Return what measurements say about the study's question."""
    config = study.config
    return summarise(
        measurements,
        title=config.title,
        families=list(config.families),
        compare=config.pair,
        variants=[PLAIN, *config.variants],
        metrics=study.metrics(),
        one_pass=config.form == "one_pass",
        first_arm=config.first_arm,
    )


def answer(summary: Summary, out: Path, *, drawn: bool) -> list[str]:
    """Return the first metric's table, the words for every metric, and where the rest is."""
    lines = []
    for metric in summary.headline[:1]:
        table = accuracy_table(summary, metric, PLAIN) if summary.first_arm is None else arms_table(summary, metric, PLAIN)
        lines += [f"{metric_words(metric)}, %, with 95 % intervals", *as_text(table), ""]
    for metric in summary.headline:
        if gap := summary.gaps.get((metric, PLAIN)):
            lines += [gap.words, ""]
    return [*lines, f"{out}: study.md, study.json, results.csv{', figures/' if drawn else ''}"]


# ---------------------------------------------------------------- study.json


def record_of(
    study: Study, cells: Sequence[Cell], *, trials: Mapping[Any, Sequence[Trial]], failed: Mapping[Path, str]
) -> dict[str, Any]:
    """Return what was run and what it took, as JSON values.

    Args:
        cells: the reported ones whose settings are known.
    """
    config = study.config
    searched = [trial.cell for group in trials.values() for trial in group]
    runs = [*cells, *searched]
    finetuned = [stage.done.parent for cell in cells for stage in cell.stages if stage.name.startswith("finetune:")]
    return {
        "title": config.title,
        "form": config.form,
        "command": shlex.join(["vit", *sys.argv[1:]]),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "sizes": list(config.sizes),
        "seeds": list(config.seeds),
        "compare": config.pair,
        "first_arm": config.first_arm,
        "families": {name: about_family(name, settings, cells) for name, settings in config.families.items()},
        "variants": {name: flatten(variant.settings) for name, variant in config.variants.items()},
        "cells": {
            "done": len([cell for cell in cells if all(stage.done.exists() for stage in cell.stages)]),
            "all": sum(len(config.seeds_of(group.variant)) for group in study.groups()),
        },
        "failed": [{"cell": label(cell), "reason": failed[cell.folder]} for cell in runs if cell.folder in failed],
        "notes": list(study.notes),
        "hours": {
            "reported": hours(cell.run for cell in cells),
            "search": hours(cell.run for cell in searched),
            "finetune": hours(finetuned),
        },
        "runs": runs_together([cell.run for cell in runs]),
        "search": [about_search(group, each, study.out) for group, each in trials.items()],
    }


def about_family(name: str, settings: Mapping[str, Any], cells: Sequence[Cell]) -> dict[str, Any]:
    """Return what a family is and costs; nothing of its cost before its settings are known."""
    found: dict[str, Any] = {"settings": flatten(dict(settings))}
    for cell in cells:
        if (cell.variant, cell.family) == (PLAIN, name):
            found |= {key: getattr(cell, key) for key in ("parameters", "forward_flops", "training_flops")}
            break
    return found


def about_search(group: Any, trials: Sequence[Trial], out: Path) -> dict[str, Any]:
    """Return what was tried for a group, and what was chosen; null as long as it is not."""
    chosen = chosen_of({group: trials}).get(group)
    tried = [
        {"settings": dict(trial.cell.point), "top1": trial.top1, "folder": str(trial.cell.folder.relative_to(out))}
        for trial in trials
    ]
    return {**group._asdict(), "chosen": None if chosen is None else dict(chosen), "trials": tried}


def hours(runs: Iterator[Path] | Sequence[Path]) -> float:
    """Return the hours of training in runs that are finished."""
    return sum((read_json(run / SUMMARY) or {}).get("train_seconds", 0.0) for run in runs) / 3600


def runs_together(runs: Sequence[Path]) -> dict[str, Any]:
    """Return on what, by which version and when runs were made, each answer once."""
    known = [found for run in runs if (found := manifest_of(run)) is not None]
    versions = ({name: each["versions"].get(name) for name in ("torch", "python")} for each in known)
    return {
        "hardware": unique(f"{each['hardware']['device']}, {each['hardware']['cpu_cores']} cores" for each in known),
        "git_revisions": unique(str(each["git_revision"]) for each in known if each["git_revision"]),
        "versions": unique(", ".join(f"{name} {found}" for name, found in each.items()) for each in versions),
        "data": unique(f"{each['data'].get('source')}, {each['data'].get('val')}" for each in known),
        "started": min((each["started"] for each in known), default=None),
    }


def manifest_of(run: Path) -> dict[str, Any] | None:
    path = run / MANIFEST
    return read_once(path, path.stat().st_mtime_ns) if path.is_file() else None


@lru_cache(maxsize=4096)
def read_once(path: Path, _changed: int) -> dict[str, Any] | None:
    return read_json(path)


def unique(texts: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def as_json(summary: Summary) -> dict[str, Any]:
    """Return means, gaps, crossovers and laws as JSON values."""
    means = [
        {**key._asdict(), **asdict(mean.estimate), "values": mean.values, "flops": mean.flops}
        for key, curve in summary.curves.items()
        for mean in curve
    ]
    changes = [{**key._asdict(), **asdict(each)} for key, found in summary.changes.items() for each in found]
    gaps = [
        {
            "metric": metric,
            "variant": variant,
            "gaps": [asdict(each) for each in gap.estimates],
            "crossover": asdict(gap.crossover),
            "words": gap.words,
            "change": [asdict(each) for each in summary.gap_changes.get((metric, variant), ())],
        }
        for (metric, variant), gap in summary.gaps.items()
    ]
    laws = [{**key._asdict(), **law_json(law)} for key, law in summary.laws.items()]
    leads = [{**key._asdict(), **asdict(each)} for key, each in summary.leads.items()]
    return {"means": means, "against_first": leads, "changes": changes, "comparison": gaps, "power_laws": laws}


def law_json(law: PowerLaw) -> dict[str, Any]:
    """Return a power law, without its replicates."""
    return {key: getattr(law, key) for key in ("a", "b", "c", "intervals", "misfit", "sizes", "level")}
