"""Early stopping: when a run ends, which weights are its result, and that being interrupted changes neither."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.harness import vit
from vitcli.checkpoint import load_weights_file
from vitcli.config import Config
from vitcli.ending import best_step, evals_since_best, is_stalled, scores_of
from vitcli.errors import Interrupted
from vitcli.predictions import load_predictions
from vitcli.retention import Keep, kept_steps
from vitcli.step import train_step
from vitcli.train import pretrain

# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("scores", "best", "since"),
    [
        ([], None, 0),
        ([0.5], 1, 0),
        ([0.5, 0.6, 0.7], 3, 0),
        ([0.5, 0.7, 0.6, 0.6], 2, 2),
        ([0.5, 0.7, 0.6, 0.7, 0.6], 4, 1),
        ([math.nan, 0.2, math.nan], 2, 1),
        ([math.nan, math.nan], None, 2),
    ],
)
def test_the_best_step_and_the_evaluations_since(scores: list[float], best: int | None, since: int) -> None:
    by_step = dict(enumerate(scores, start=1))
    assert best_step(by_step) == best
    assert evals_since_best(by_step) == since
    if best is not None:  # a best checkpoint that was deleted would be of no use
        assert best in kept_steps(by_step, Keep(last=1, best=1), by_step)


def config(**train: Any) -> Config:
    return Config.model_validate({"data": {"source": "digits", "image_size": 16}, "train": {"steps": 10, **train}})


def test_patience_counts_from_where_everything_learns() -> None:
    evals = {step: {"top1": 0.8 if step == 2 else 0.5, "loss": None} for step in (2, 4, 6, 8)}
    assert not is_stalled(config(), evals, examples=1000)
    assert is_stalled(config(early_stop_evals=3), evals, examples=1000)
    assert not is_stalled(config(early_stop_evals=4), evals, examples=1000)
    assert not is_stalled(config(early_stop_evals=3, head_first_steps=4), evals, examples=1000)
    assert is_stalled(config(early_stop_evals=2, head_first_steps=4), evals, examples=1000)


@pytest.mark.parametrize(
    ("examples", "accuracies", "best"),
    [
        (30, [0.3, 0.4, 0.3, 0.33], 4),  # one picture more or less says nothing
        (30, [0.3, 0.4, 0.3, 0.3], 2),
        (3000, [0.3, 0.4, 0.3, 0.33], 2),
        (7, [0.5, 1.0, 0.857, 0.714], 3),
        (30, [0.1, 0.4, 0.8, 0.9], 4),
        (10**9, [0.3, 0.4, 0.4, 0.3999], 3),
    ],
)
def test_of_accuracies_within_a_standard_error_the_last_is_taken(examples: int, accuracies: list[float], best: int) -> None:
    evals = {step: {"top1": top1, "loss": 1.0} for step, top1 in enumerate(accuracies, start=1)}
    now: int | None = None
    for number in range(1, len(evals) + 1):  # what is kept on disk on the way has to be what is returned to in the end
        so_far = {step: evals[step] for step in range(1, number + 1)}
        scores = scores_of(config(early_stop_evals=9), so_far, examples=examples)
        before, now = now, best_step(scores)
        assert now in (before, number)
    assert now == best
    plain = scores_of(config(), evals, examples=examples)
    assert plain == {step: row["top1"] for step, row in evals.items()}


def test_losses_are_taken_as_they_are() -> None:
    evals = {2: {"top1": 0.5, "loss": 0.4}, 4: {"top1": 0.5, "loss": 0.41}, 6: {"top1": 0.9, "loss": None}}
    patient = config(early_stop_evals=9)
    by_loss = patient.model_copy(update={"log": patient.log.model_copy(update={"best_metric": "loss"})})
    scores = scores_of(by_loss, evals, examples=10)
    assert best_step(scores) == 2 and math.isnan(scores[6])
    assert best_step(scores_of(patient, {2: {"top1": math.nan, "loss": None}}, examples=10)) is None


# ---------------------------------------------------------------- runs

CONFIG = """
seed: 2
model: {patch_size: 4, width: 32, depth: 2, num_heads: 2, dropout: 0.1}
data: {source: digits, image_size: 16}
augment: {crop: pad, pad: 2, flip: false}
optim: {lr: 0.03, schedule: constant, warmup_steps: 0}
train: {steps: 60, batch_size: 16, precision: float32, early_stop_evals: 3, ema_decay: 0.5}
log: {log_every_steps: 5, eval_every_steps: 4, checkpoint_every_steps: 10, keep_checkpoints: 1, best_metric: loss}
"""


def run(folder: Path, name: str, *overrides: str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(CONFIG)
    pretrain(path, [f"out={folder / name}", *overrides], dry_run=False, say=lambda text: None)
    return folder / name


def summary_of(out: Path) -> dict[str, Any]:
    """Return what a run ended with, but for the clock."""
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return {key: value for key, value in summary.items() if "seconds" not in key and "per_second" not in key}


def weights_of(out: Path) -> dict[str, Tensor]:
    return load_weights_file(out).state


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("stopped"), "run")


def evals_of(out: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "eval"}


def test_a_run_ends_when_it_gets_no_better_and_gives_its_best_weights(stopped: Path) -> None:
    evals, summary = evals_of(stopped), summary_of(stopped)
    best = min(evals, key=lambda step: (evals[step], -step))
    last = max(evals)
    assert best < last < 60  # it would be no test else
    assert last == best + 3 * 4
    assert (summary["step"], summary["trained_steps"]) == (best, last)
    assert summary["loss"] == evals[best]
    found = load_weights_file(stopped)
    assert (found.step, found.is_ema) == (best, True)
    predictions, about = load_predictions(stopped / "predictions" / "val.safetensors")
    assert about["step"] == best
    assert (predictions.ranks == 0).mean() == summary["top1"]


def test_the_result_is_what_evaluation_and_later_runs_begin_with(stopped: Path) -> None:
    result = json.loads(vit("eval", "--ckpt", str(stopped), "--json").stdout)
    summary = summary_of(stopped)
    assert (result["step"], result["top1"]) == (summary["step"], summary["top1"])
    said = vit("pretrain", "--config", str(stopped.parent / "tiny.yaml"), "--out", str(stopped)).stdout
    assert f"is finished: top-1 {100 * summary['top1']:.2f} %, {summary['step']} of {summary['trained_steps']} steps" in said


def test_interrupted_anywhere_it_ends_at_the_same_step(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_at(at: int) -> Any:
        original = train_step

        def step(state: Any, *arguments: Any, **settings: Any) -> Any:
            if state.step == at:
                raise Interrupted(15)
            return original(state, *arguments, **settings)

        return step

    last = summary_of(stopped)["trained_steps"]
    for at in (3, last - 5, last - 1):
        with monkeypatch.context() as patched:
            patched.setattr("vitcli.fit.train_step", stop_at(at))
            with pytest.raises(Interrupted):
                run(tmp_path, "run")
    out = run(tmp_path, "run")
    assert summary_of(out) == summary_of(stopped)
    assert {name: tensor.tolist() for name, tensor in weights_of(out).items()} == {
        name: tensor.tolist() for name, tensor in weights_of(stopped).items()
    }


@pytest.mark.slow
def test_killed_before_its_summary_it_ends_the_same(stopped: Path, tmp_path: Path) -> None:
    out = run(tmp_path, "run")
    before = summary_of(out)
    (out / "summary.json").unlink()
    run(tmp_path, "run")
    assert summary_of(out) == before == summary_of(stopped)


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_said_and_the_last_weights_are_the_result(tmp_path: Path) -> None:
    out = run(tmp_path, "run")
    best = out / "checkpoints" / f"step_{summary_of(out)['step']:08d}"
    (best / "model.safetensors").write_bytes(b"damaged")
    (out / "summary.json").unlink()
    said: list[str] = []
    path = tmp_path / "tiny.yaml"
    pretrain(path, [f"out={out}"], dry_run=False, say=said.append)
    summary = summary_of(out)
    assert summary["step"] == summary["trained_steps"] == max(evals_of(out))


def test_what_decides_the_end_cannot_change_on_the_way(stopped: Path) -> None:
    words = ("pretrain", "--config", str(stopped.parent / "tiny.yaml"), "--out", str(stopped))
    assert vit(*words, "log.best_metric=top1").returncode == 2
    assert vit(*words, "log.keep_checkpoints=3").returncode == 0


def test_a_run_to_its_last_step_gives_its_best_weights_too(tmp_path: Path) -> None:
    out = run(tmp_path, "run", "train.steps=14", "train.early_stop_evals=50")
    evals, summary = evals_of(out), summary_of(out)
    assert set(evals) == {4, 8, 12, 14}
    assert summary["trained_steps"] == 14
    assert summary["step"] == min(evals, key=lambda step: (evals[step], -step))
