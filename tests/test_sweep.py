"""A sweep's decisions and its running of trials, on stand-ins that take milliseconds, and once on real ones."""

import csv
import json
import signal
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness import vit
from vitcli.config import Config
from vitcli.errors import Interrupted
from vitcli.interrupts import StopSignals
from vitcli.rundir import lock_run
from vitcli.sweep import hopeless, run_trials
from vitcli.sweep_plan import Start, Target, Trial
from vitcli.sweep_results import best_rate, outcome, panels_of, result_lines, results, write_results

CONFIG: dict[str, Any] = {"data": {"source": "digits", "image_size": 16}, "train": {"steps": 10, "batch_size": 4}}
RATES = (0.001, 0.003, 0.01, 0.03)

# a run directory as a trial leaves it, an evaluation a step; it goes on where it was killed
STAND_IN = """
import json, os, pathlib, sys, time
folder, steps, top1, pause = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
if top1 < 0:
    sys.exit(print("one line", "vit: no such thing; mend it", sep=chr(10)) or 2)
folder.mkdir(parents=True, exist_ok=True)
rows = folder / "metrics.jsonl"
done = len(rows.read_text().splitlines()) if rows.exists() else 0
with open(folder / "starts", "a") as file:
    print(done, os.environ.get("SLOT"), file=file)
for step in range(done + 1, steps + 1):
    time.sleep(pause)
    with open(rows, "a") as file:
        print(json.dumps({"kind": "eval", "step": step, "top1": top1 * step / steps}), file=file)
summary = {"step": steps, "top1": top1, "top5": 1.0, "loss": 1 - top1, "train_seconds": 1.0}
(folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitcli.sweep.TICK_SECONDS", 0.02)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figure, which is drawn whenever a trial ends and takes longer than a stand-in does."""
    monkeypatch.setattr("vitcli.sweep_results.save_figure", lambda path, figure: None)


def make_target(out: Path, **changes: Any) -> Target:
    target = Target(
        start=Start("tiny", Path("tiny.npz"), from_scratch=False),
        dataset="digits",
        folder=out / "digits",
        config=Config.model_validate(CONFIG),
        lrs=RATES,
        seeds=(0, 1, 2),
        dev_fraction=0.1,
        steps=10,
        trial_steps=10,
        num_classes=10,
        train_examples=1438,
        test_examples=359,
        recipe=None,
        seconds_per_image=0.001,
    )
    return replace(target, **changes)


def stand_in(
    monkeypatch: pytest.MonkeyPatch, top1: dict[float, float], *, pause: float = 0.0, slow: float | None = None
) -> None:
    """Let trials be stand-ins that reach an accuracy by their rate; final ones a little more with each seed.

    Args:
        pause: seconds per step.
        slow: the rate of the only trials that take them; None for all.
    """

    def command(trial: Trial) -> list[str]:
        reached = top1[trial.lr] + (0.01 * trial.seed if trial.final else 0.0)
        waits = pause if slow in (None, trial.lr) else 0.0
        return [sys.executable, "-S", "-c", STAND_IN, str(trial.folder), str(trial.steps), str(reached), str(waits)]

    monkeypatch.setattr(Trial, "command", command)


def run(
    targets: list[Target], out: Path, *, jobs: int = 1, early_stop: bool = True, stop: StopSignals | None = None
) -> list[str]:
    """Run a sweep's trials; return what was said, problems last."""
    said: list[str] = []
    slots = [{"SLOT": str(place)} for place in range(jobs)]
    out.mkdir(exist_ok=True)
    stop = stop or StopSignals()
    problems = run_trials(targets, out, slots=slots, early_stop=early_stop, about={}, stop=stop, say=said.append)
    return [*said, *(f"PROBLEM {folder.name}: {why}" for folder, why in problems.items())]


@pytest.mark.usefixtures("undrawn")
def test_the_best_rate_is_trained_again_with_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, {0.001: 0.5, 0.003: 0.7, 0.01: 0.6, 0.03: 0.55})
    target = make_target(tmp_path)
    said = run([target], tmp_path)
    assert not any(line.startswith("PROBLEM") for line in said)
    found = json.loads((tmp_path / "sweep.json").read_text())["results"][0]
    assert found["lr"] == 0.003
    assert [Path(final["run"]).name for final in found["finals"]] == ["final-seed-0", "final-seed-1", "final-seed-2"]
    expected = [0.7, 0.71, 0.72]
    assert found["test"]["top1"] == pytest.approx(expected)
    assert found["test"]["top1_mean"] == pytest.approx(statistics.mean(expected))
    assert found["test"]["top1_std"] == pytest.approx(statistics.stdev(expected))
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [(row["phase"], float(row["lr"]), row["seed"]) for row in rows] == [
        *(("dev", lr, "0") for lr in RATES),
        *(("test", 0.003, str(seed)) for seed in range(3)),
    ]
    assert {row["dataset"] for row in rows} == {"digits"} and all(row["state"] == "finished" for row in rows)
    text = "\n".join(result_lines([found]))
    assert "lr 0.003     70.00 %  best" in text and "71.00 ± 1.00 % (3 seeds)" in text


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    target = make_target(tmp_path, seeds=(0,))
    for trial in [*target.trials, *target.finals(0.03)]:
        finish(trial, trial.lr, 1.0)
        rows = [{"kind": "eval", "step": step, "top1": step / 10} for step in (5, 10)]
        (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = results([target], {}, early_stop=True)
    write_results(tmp_path, found, about={})
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    by_rate, by_step = panels_of("digits", found)
    assert by_rate.series == {"tiny": [(lr, lr) for lr in RATES]} and by_step.series == {"tiny": [(5, 0.5), (10, 1.0)]}


@pytest.mark.usefixtures("undrawn")
def test_a_finished_sweep_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, dict.fromkeys(RATES, 0.5))
    target = make_target(tmp_path, lrs=RATES[:2], seeds=(0,))
    run([target], tmp_path)
    before = {path: path.read_bytes() for path in target.folder.rglob("starts")}
    assert len(before) == 3
    assert run([target], tmp_path) == []
    assert {path: path.read_bytes() for path in target.folder.rglob("starts")} == before


@pytest.mark.usefixtures("undrawn")
def test_more_seeds_and_rates_may_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, {0.003: 0.5, 0.01: 0.4, 0.03: 0.9})
    target = make_target(tmp_path, lrs=(0.003, 0.01), seeds=(0,))
    run([target], tmp_path)
    (target.folder / "final-seed-0" / "manifest.json").write_text(json.dumps({"requested": {"optim": {"lr": 0.003}}}))
    said = run([replace(target, seeds=(0, 1))], tmp_path)
    assert [line for line in said if "begins" in line] == ["digits, tiny, lr 0.003, seed 1: begins, 10 steps"]
    wider = replace(target, lrs=(0.003, 0.01, 0.03))
    run([wider], tmp_path)
    found = results([wider], {}, early_stop=True)[0]
    assert found["lr"] == 0.03 and Path(found["finals"][0]["run"]).name == "final-lr-0.03-seed-0"  # nothing is overwritten
    assert outcome(target.finals(0.003)[0], {}).top1 == 0.5


@pytest.mark.usefixtures("undrawn")
def test_a_failed_trial_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, {0.001: 0.5, 0.003: -1.0, 0.01: 0.6, 0.03: 0.55})
    target = make_target(tmp_path, seeds=(0,))
    said = run([target], tmp_path)
    assert said[-1] == "PROBLEM lr-0.003: no such thing; mend it"
    found = json.loads((tmp_path / "sweep.json").read_text())["results"][0]
    assert [trial["state"] for trial in found["trials"]] == ["finished", "failed", "finished", "finished"]
    assert found["lr"] == 0.01 and found["test"] == {"seeds": 1, "top1_mean": 0.6, "top1_std": None, "top1": [0.6]}
    stand_in(monkeypatch, {0.001: 0.5, 0.003: 0.9, 0.01: 0.6, 0.03: 0.55})  # mended: only what is missing is run
    (target.folder / "final-seed-0" / "manifest.json").write_text(json.dumps({"requested": {"optim": {"lr": 0.01}}}))
    begun = [line for line in run([target], tmp_path) if "begins" in line or "goes on" in line]
    assert begun == ["digits, tiny, lr 0.003: begins, 10 steps", "digits, tiny, lr 0.003, seed 0: begins, 10 steps"]


@pytest.mark.usefixtures("undrawn")
def test_when_every_trial_fails_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, dict.fromkeys(RATES, -1.0))
    target = make_target(tmp_path)
    said = run([target], tmp_path)
    assert sum(line.startswith("PROBLEM") for line in said) == 4
    problems = {trial.folder: "x" for trial in target.trials}
    assert "no rate came to its end" in result_lines(results([target], problems, early_stop=True))[-1]


@pytest.mark.usefixtures("undrawn")
def test_a_hopeless_trial_is_stopped_and_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, {0.001: 0.1, 0.003: 0.8, 0.01: 0.8, 0.03: 0.78}, pause=0.5, slow=0.001)
    target = make_target(tmp_path, seeds=(0,))
    run([target], tmp_path)
    states = {trial.lr: outcome(trial, {}) for trial in target.trials}
    assert {lr: end.state for lr, end in states.items()} == {
        0.001: "stopped", 0.003: "finished", 0.01: "finished", 0.03: "finished",
    }  # fmt: skip
    assert 3 <= states[0.001].step < 10
    assert "the others' median was" in "\n".join(result_lines(results([target], {}, early_stop=True)))
    assert run([target], tmp_path) == []
    stand_in(monkeypatch, dict.fromkeys(RATES, 0.5))
    said = run([target], tmp_path, early_stop=False)
    assert said[0] == "digits, tiny, lr 0.001: goes on, 10 steps"
    assert outcome(target.trials[0], {}).state == "finished"


@pytest.mark.usefixtures("undrawn")
def test_trials_side_by_side_have_a_place_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, dict.fromkeys(RATES, 0.5), pause=0.05)
    targets = [make_target(tmp_path), make_target(tmp_path, dataset="mnist", folder=tmp_path / "mnist", lrs=(0.01,))]
    run(targets, tmp_path, jobs=3)
    places = {path.parent.name: path.read_text().split()[1] for path in tmp_path.rglob("digits/*/starts")}
    assert len(places) == 7 and set(places.values()) == {"0", "1", "2"}
    assert len(list((tmp_path / "mnist").glob("final-seed-*"))) == 3 and not list((tmp_path / "mnist").glob("lr-*"))


@pytest.mark.usefixtures("undrawn")
def test_a_signal_ends_all_and_the_next_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, dict.fromkeys(RATES, 0.5), pause=0.05)
    target = make_target(tmp_path, seeds=(0,))
    stop = StopSignals()

    def interrupt() -> None:
        while not list(target.folder.glob("*/metrics.jsonl")):
            time.sleep(0.01)
        stop.received = signal.SIGTERM

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        run([target], tmp_path, jobs=2, stop=stop)
    thread.join()
    begun = list(target.folder.rglob("starts"))
    assert 1 <= len(begun) <= 2 and not list(target.folder.rglob("summary.json"))
    run([target], tmp_path, jobs=2)
    assert len(list(target.folder.rglob("summary.json"))) == 5
    starts = begun[0].read_text().splitlines()
    assert len(starts) == 2 and int(starts[1].split()[0]) >= 0


@pytest.mark.usefixtures("undrawn")
def test_a_trial_that_another_process_trains_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, dict.fromkeys(RATES, 0.5))
    target = make_target(tmp_path, lrs=RATES[:2], seeds=(0,))
    held = target.trials[0].folder
    released = threading.Event()

    def hold() -> None:
        with lock_run(held):
            released.wait(1.0)

    thread = threading.Thread(target=hold)
    thread.start()
    while not (held / ".lock").exists():
        time.sleep(0.01)
    said = run([target], tmp_path)
    thread.join()
    assert any("another process is training it" in line for line in said)
    assert len(list(target.folder.rglob("summary.json"))) == 3


# ---------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    ("own", "others", "stopped_at"),
    [
        ({5: 0.2}, [{5: 0.6}, {5: 0.5}], 5),
        ({2: 0.0}, [{2: 0.6}, {2: 0.5}], None),  # in its grace
        ({10: 0.0}, [{10: 0.6}, {10: 0.5}], None),  # at its end
        ({5: 0.2}, [{5: 0.6}], None),  # one other is no median
        ({5: 0.2}, [{5: 0.6}, {4: 0.6}], None),  # others at other steps do not count
        ({5: 0.52}, [{5: 0.6}, {5: 0.6}], None),  # within the margin
        ({4: 0.2, 6: 0.2}, [{4: 0.6}, {4: 0.6, 6: 0.6}], 4),  # the last step that the others have too
        ({4: 0.1, 6: 0.6}, [{4: 0.6, 6: 0.6}, {4: 0.6, 6: 0.6}], None),  # it has recovered
    ],
)
def test_the_median_rule(own: dict[int, float], others: list[dict[int, float]], stopped_at: int | None) -> None:
    reason = hopeless(own, others, steps=10, images=1000)
    assert (None if reason is None else reason["step"]) == stopped_at


def test_few_images_widen_the_margin() -> None:
    own, others = {5: 0.45}, [{5: 0.6}, {5: 0.6}]
    assert hopeless(own, others, steps=10, images=10_000) and not hopeless(own, others, steps=10, images=100)


def finish(trial: Trial, top1: float, loss: float | None) -> None:
    trial.folder.mkdir(parents=True)
    summary = {"step": 10, "top1": top1, "top5": 1.0, "loss": loss, "train_seconds": 1.0}
    (trial.folder / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("ends", "best"),
    [
        ([(0.5, 1.0), (0.6, 2.0), (0.4, 0.1)], 0.003),
        ([(0.6, 1.0), (0.6, 2.0), (0.6, 0.5)], 0.01),  # equal accuracy: the lower loss
        ([(0.6, 1.0), (0.6, 1.0), (0.6, None)], 0.001),  # and the lower rate; a loss that is not finite is no lower one
    ],
)
def test_the_best_rate(tmp_path: Path, ends: list[tuple[float, float | None]], best: float) -> None:
    target = make_target(tmp_path, lrs=RATES[:3])
    for trial, (top1, loss) in zip(target.trials, ends, strict=True):
        finish(trial, top1, loss)
    assert best_rate(target, {}) == best


def test_a_best_rate_at_the_edge_is_pointed_out(tmp_path: Path) -> None:
    target = make_target(tmp_path)
    for trial, top1 in zip(target.trials, (0.1, 0.2, 0.3, 0.4), strict=True):
        finish(trial, top1, 1.0)
    assert any("0.09 may be better" in line for line in result_lines(results([target], {}, early_stop=True)))


def test_several_data_sets_have_a_mean(tmp_path: Path) -> None:
    targets = [make_target(tmp_path, dataset=name, folder=tmp_path / name, lrs=(0.01,), seeds=(0,)) for name in ("a", "b")]
    finish(targets[0].finals(0.01)[0], 0.5, 1.0)
    assert not any("average" in line for line in result_lines(results(targets, {}, early_stop=True)))
    finish(targets[1].finals(0.01)[0], 0.7, 1.0)
    assert result_lines(results(targets, {}, early_stop=True))[-1] == "tiny: 60.00 % on average of 2 data sets"


# ---------------------------------------------------------------- the command


TINY = """
model: {patch_size: 4, width: 16, depth: 1, num_heads: 2}
data: {source: digits, image_size: 8, workers: 0}
augment: {crop: resize, flip: false}
train: {steps: 4, batch_size: 16, precision: float32, tune: false}
log: {sample_images: 0}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    (folder / "tiny.yaml").write_text(TINY)
    done = vit("pretrain", "--config", str(folder / "tiny.yaml"), "--out", str(folder / "tiny"))
    assert done.returncode == 0, done.stderr
    return folder / "tiny"


def test_dry_run_prints_the_plan_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    words = ["sweep", "--ckpt", str(checkpoint), "--dataset", "digits", "--from-scratch", "train.steps=6", "--lrs", "0.1,0.2"]
    done = vit(*words, "--out", str(tmp_path / "out"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    for part in (
        "2 rates (0.1, 0.2), 6 steps",
        "judged by 144 others",
        "digits, tiny-scratch",
        "all 1,438 images",
        "in all about",
    ):
        assert part in done.stdout, part


def test_wrong_words_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    words = ["sweep", "--ckpt", str(checkpoint), "--dataset", "digits", "--out", str(tmp_path / "out")]
    for more, message in (
        (["optim.lr=0.1"], "--lrs 0.1"),
        (["--lrs", "0.1,x"], "'x' is no number"),
        (["--lrs", "0.1,-1"], "no learning rate"),
        (["--ckpt", str(checkpoint)], "would both be called tiny"),
        (["--dataset", "cifar11"], "no such data set"),
    ):
        done = vit(*words, *more)
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out").exists(), (more, done.stderr)
    done = vit("sweep", "--ckpt", str(checkpoint))
    assert done.returncode == 2 and "--dataset is missing" in done.stderr
    done = vit(*words[:-1], str(checkpoint))
    assert done.returncode == 2 and "this is a run" in done.stderr


@pytest.mark.slow  # four processes that import torch
def test_a_sweep_from_end_to_end(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "sweep",
        "--ckpt",
        str(checkpoint),
        "--dataset",
        "digits",
        "--out",
        str(out),
        "--seeds",
        "1",
        "--lrs",
        "0.01,0.003",
    ]
    settings = ["train.steps=4", "train.batch_size=16", "data.workers=0", "log.sample_images=0"]
    done = vit(*words, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "sweep.json").read_text())["results"][0]
    runs = [out / "digits" / name for name in ("lr-0.003", "lr-0.01", "final-seed-0")]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    assert [summary["examples"] for summary in summaries] == [144, 144, 359]
    best = max(zip(summaries[:2], (0.003, 0.01)), key=lambda pair: (pair[0]["top1"], -pair[0]["loss"]))[1]
    assert found["lr"] == best and found["test"]["top1"] == [summaries[2]["top1"]]
    manifest = json.loads((runs[2] / "manifest.json").read_text())
    assert manifest["requested"]["optim"]["lr"] == best and manifest["requested"]["data"]["dev_fraction"] is None
    again = vit(*words, *settings)
    assert again.returncode == 0 and "begins" not in again.stdout and "goes on" not in again.stdout
    other = vit(*words, *settings, "train.batch_size=8")
    assert other.returncode == 2 and "train.batch_size (16 there, 8 now)" in other.stderr
