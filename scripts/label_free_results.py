"""The tables of docs/results/without-labels.md, from what scripts/label_free_results.sh has left.

python scripts/label_free_results.py runs/label-free

What stands between the page's marks `<!-- made -->` and `<!-- made: end -->` is replaced; the words around it are written by
people.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.predictions import load_predictions
from vitcli.rundir import write_text
from vitcli.study.page import as_markdown, difference, share
from vitcli.study.stats import Estimate, Scores, accuracies, gaps

PAGE = Path(__file__).parents[1] / "docs" / "results" / "without-labels.md"
MADE = re.compile(r"(<!-- made -->\n).*(<!-- made: end -->)", re.DOTALL)
Table = list[list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="holds sweep-NUMBER, probes-START.json and the pretraining runs")
    parser.add_argument("--page", type=Path, default=PAGE)
    words = parser.parse_args()
    found = [read(path) for path in words.runs.glob("sweep-*/sweep.json")]
    sweeps = {
        (sweep["results"][0]["train_examples"], sweep["results"][0]["steps"]): sweep for sweep in found if is_whole(sweep)
    }
    if not sweeps:
        raise SystemExit(
            f"{words.runs}: no sweep-*/sweep.json of a sweep that has ended; scripts/label_free_results.sh makes them"
        )
    parts = []
    for (labels, steps), sweep in sorted(sweeps.items(), key=lambda item: item[0]):
        parts += [f"Fine-tuned with {labels:,} labels, {steps:,} steps:", as_markdown(finetuned(sweep)), facts(sweep)]
    parts += ["Frozen features, with labels of CIFAR-10's whole training split to draw from:", as_markdown(probed(words.runs))]
    text = MADE.sub(lambda found: "\n\n".join([found[1].rstrip(), *parts, found[2]]), words.page.read_text(encoding="utf-8"))
    write_text(words.page, text)
    print(f"{words.page}: {', '.join(f'{labels:,} labels, {steps:,} steps' for labels, steps in sorted(sweeps))}")


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def is_whole(sweep: dict[str, Any]) -> bool:
    """Tell whether every start has its final runs."""
    return all(result["finals"] and all(run["state"] == "finished" for run in result["finals"]) for result in sweep["results"])


def finetuned(sweep: dict[str, Any]) -> Table:
    """Return a start in a line: its accuracy, and what it has over random weights."""
    scores = {result["start"]: answers(result) for result in sweep["results"]}
    scratch = next(result["start"] for result in sweep["results"] if result["from_scratch"])
    rows = [["", "top-1, %", "less scratch, points", "rate chosen"]]
    for result in sorted(sweep["results"], key=lambda one: scores[one["start"]].mean):
        start = result["start"]
        lead = None if start == scratch else only(gaps([scores[start]], [scores[scratch]]).estimates)
        name = "from scratch" if start == scratch else start
        rates = sorted(trial["lr"] for trial in result["trials"])  # none where there was nothing to choose
        edge = {rates[0]: ", the smallest", rates[-1]: ", the largest"}.get(result["lr"], "") if rates else ", given"
        rows.append([name, share(only(accuracies([scores[start]]).estimates)), difference(lead), f"{result['lr']:g}{edge}"])
    return rows


def answers(result: dict[str, Any]) -> Scores:
    """Return what the final runs of one start, a seed each, got right."""
    found = [load_predictions(Path(run["run"]) / "predictions" / "val.safetensors")[0] for run in result["finals"]]
    if any(not np.array_equal(each.indices, found[0].indices) for each in found):
        raise SystemExit(f"{result['start']}: its runs answered different images; evaluate them again")
    return Scores.from_answers(result["train_examples"], np.stack([each.correct for each in found]))


def only(estimates: tuple[Estimate, ...]) -> Estimate:
    (estimate,) = estimates
    return estimate


def probed(runs: Path) -> Table:
    """Return what few-shot and linear probes read from the features, a start in a line."""
    files = {path.stem.removeprefix("probes-"): read(path)["probes"] for path in runs.glob("probes-*.json")}
    shots = sorted({shot["shots"] for probes in files.values() for shot in probes["fewshot"]})
    rows = [["", *(f"{number}-shot, %" for number in shots), "linear probe, %"]]
    for name, probes in sorted(files.items(), key=lambda item: item[1]["linear"]["accuracy"]):
        few = {
            each["shots"]: f"{100 * each['accuracy_mean']:.1f} ± {100 * each['accuracy_std']:.1f}" for each in probes["fewshot"]
        }
        rows.append([name, *(few.get(number, "") for number in shots), f"{100 * probes['linear']['accuracy']:.1f}"])
    return rows


def facts(sweep: dict[str, Any]) -> str:
    """Say what made the numbers."""
    first = sweep["results"][0]
    seconds = sum(run["train_seconds"] or 0.0 for result in sweep["results"] for run in (*result["trials"], *result["finals"]))
    judges, device = first["dev_examples"], sweep["hardware"]["device"].split(",")[0]
    searched = (
        f"{len(first['trials'])} rates, tried on {first['train_examples'] - judges:,} of the images and judged by the other "
        f"{judges:,}; the best with "
    )
    return (
        f"{first['steps']:,} steps of {first['batch_size']}; {searched if first['trials'] else ''}"
        f"{len(first['finals'])} seeds on all, tested on {first['test_examples']:,}; 95 % intervals over seeds and images. "
        f"{seconds / 3600:.2f} hours of training, {device}; torch {sweep['versions']['torch']}; {sweep['started'][:10]}."
    )


if __name__ == "__main__":
    main()
