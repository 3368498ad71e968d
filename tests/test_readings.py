"""A run that is read on its way (`log.readings`) and averages a share of it (`train.ema_share`)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from vitcli.config import TrainConfig
from vitcli.errors import UserError
from vitcli.optim import decay_at
from vitcli.predictions import load_predictions, reading_file
from vitcli.train import pretrain

CONFIG = """
model: {patch_size: 8, width: 16, depth: 1, num_heads: 2}
data: {source: shapes, image_size: 16, shapes: {classes: 4, train_examples: 800, val_examples: 40}, workers: 0}
optim: {schedule: constant, warmup_steps: 2, lr: 3e-3}
train: {steps: 20, batch_size: 8, precision: float32, tune: false, ema_share: 0.2}
log: {log_every_steps: 5, eval_every_steps: 20, checkpoint_every_steps: 20, keep_checkpoints: 1, readings: [17, 80, 9999]}
"""
STEPS = (3, 10)  # that have seen 17 and 80 images; the run ends before 9,999


def say(text: str) -> None:
    """Keep quiet."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readings") / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    pretrain(config, [f"out={config.parent / 'whole'}"], dry_run=False, say=say)
    return config.parent / "whole"


def evaluations(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["kind"] == "eval"]


def test_a_reading_is_an_evaluation_a_checkpoint_and_the_answers(whole: Path) -> None:
    assert evaluations(whole) == [*STEPS, 20]
    kept = sorted(int(path.name.removeprefix("step_")) for path in (whole / "checkpoints").iterdir())
    assert kept == [*STEPS, 20]
    for step in STEPS:
        predictions, about = load_predictions(whole / reading_file(step))
        assert about["step"] == step
        assert len(predictions) == 40
    assert not (whole / reading_file(20)).exists()


def test_reading_changes_nothing_and_a_stopped_run_reads_again(config: Path, whole: Path) -> None:
    again = config.parent / "again"
    shutil.copytree(whole, again)
    for step in (10, 20):  # as if killed after the checkpoint of step 3 and its reading
        shutil.rmtree(again / "checkpoints" / f"step_{step:08d}")
    for name in ("summary.json", str(reading_file(10)), "predictions/val.safetensors"):
        (again / name).unlink()
    pretrain(config, [f"out={again}"], dry_run=False, say=say)
    plain = config.parent / "plain"
    pretrain(config, [f"out={plain}", "log.readings=[]"], dry_run=False, say=say)
    assert evaluations(plain) == [20]
    for run in (again, plain):
        for name in ("model", "ema"):
            place = f"checkpoints/step_00000020/{name}.safetensors"
            expected, found = load_file(whole / place), load_file(run / place)
            assert all(np.array_equal(expected[key], found[key]) for key in expected)
    assert (again / reading_file(10)).read_bytes() == (whole / reading_file(10)).read_bytes()


def test_the_average_is_a_power_of_the_time() -> None:
    """The weight of step s in the average after t steps is that of s^(1/share) - (s - 1)^(1/share), over t^(1/share)."""
    train = TrainConfig(steps=1, ema_share=0.25)
    average = torch.zeros(())
    for step in range(9):
        decay = decay_at(train, step)
        assert decay is not None
        average = decay * average + (1 - decay) * (step + 1)
    s = np.arange(1, 10)
    weights = (s**4.0 - (s - 1) ** 4.0) / 9**4.0
    assert weights.sum() == pytest.approx(1)
    assert average.item() == pytest.approx((weights * s).sum(), rel=1e-6)
    assert decay_at(TrainConfig(steps=1, ema_decay=0.9), 5) == 0.9
    assert decay_at(TrainConfig(steps=1), 5) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train.ema_decay=0.9", "train.ema_share is another way to average than train.ema_decay"),
        ("train.ema_share=0.9", "train.ema_share.*0.5"),
        ("log.readings=[0]", "log.readings"),
    ],
)
def test_what_makes_no_sense_is_refused(config: Path, settings: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(config, [settings], dry_run=True, say=say)
