"""Kill a run anywhere, start it again: it ends with the weights of one that was never interrupted, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vitcli.checkpoint import load_checkpoint
from vitcli.errors import Interrupted
from vitcli.predictions import collect_source
from vitcli.train import pretrain

STEPS = 60
CONFIG = f"""
seed: 3
model: {{patch_size: 8, width: 32, depth: 2, num_heads: 2, dropout: 0.1, representation_size: width}}
data: {{source: shapes, image_size: 32, shapes: {{classes: 5, train_examples: 500, val_examples: 64}}}}
augment: {{crop: inception, min_area: 0.3, randaugment_layers: 1, mixup: 0.2, cutmix: 1.0}}
optim: {{lr: 3e-3, weight_decay: 0.1}}
train: {{steps: {STEPS}, batch_size: 24, micro_batch_size: 10, ema_decay: 0.9, label_smoothing: 0.1}}
log: {{log_every_steps: 1, eval_every_steps: 7, checkpoint_every_steps: 4}}
"""


def start(config: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vitcli", "pretrain", "--config", str(config), "--out", str(out), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def last_step(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(rows[-1])["step"] if rows and rows[-1].endswith("}") else 0


def wait_for(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Return once the run has logged `step`; fail if it ends before."""
    deadline = time.monotonic() + 120
    while last_step(out) < step:
        if process.poll() is not None:
            pytest.fail(f"ended before step {step}: {process.communicate()[0]}")
        assert time.monotonic() < deadline
        time.sleep(0.003)


def tensors(out: Path) -> dict[str, bytes]:
    saved = load_checkpoint(out / "checkpoints" / f"step_{STEPS:08d}")
    assert saved.ema_state is not None
    named = {f"model.{k}": v for k, v in saved.model_state.items()} | {f"ema.{k}": v for k, v in saved.ema_state.items()}
    for number, state in saved.optimizer_state["state"].items():
        named |= {f"optimizer.{number}.{k}": v for k, v in state.items()}
    return {key: value.numpy().tobytes() for key, value in named.items()}


def rows(out: Path) -> list[dict[str, object]]:
    timed = ("images_per_second", "seconds")
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = folder / "tiny.yaml"
    config.write_text(CONFIG)
    pretrain(config, [f"out={folder / 'run'}"], dry_run=False, say=lambda text: None)
    return folder / "run"


def kill(config: Path, out: Path, *, step: int, workers: int) -> None:
    """Start the command and kill it about when it has done a step."""
    process = start(config, out, f"data.workers={workers}")
    wait_for(process, out, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def interrupt(config: Path, out: Path, *, signum: int, code: int) -> None:
    """Start the command and end it by a signal that it can answer: it saves first, long before a checkpoint is due."""
    process = start(config, out, "log.checkpoint_every_steps=1000")
    wait_for(process, out, 10)
    process.send_signal(signum)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    stopped_at = last_step(out)
    assert (out / "checkpoints" / f"step_{stopped_at:08d}" / "manifest.json").exists()
    assert f"step {stopped_at}, saved" in output


def go_on(config: Path, out: Path, *overrides: str) -> None:
    """Give the command once more, and let it end."""
    process = start(config, out, *overrides)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert "resuming" in output


def test_interrupted_killed_and_resumed_with_other_worker_counts(uninterrupted: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    interrupt(config, out, signum=signal.SIGINT, code=130)
    kill(config, out, step=max(33, last_step(out) + 5), workers=2)
    go_on(config, out, "data.workers=1")
    assert tensors(out) == tensors(uninterrupted)
    assert rows(out) == rows(uninterrupted)


@pytest.mark.slow
def test_killed_at_random_points_and_resumed_with_other_worker_counts(uninterrupted: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    points = sorted(random.Random(20261122).sample(range(2, STEPS - 2), 3))  # test_faults.py has many more
    for point, workers in zip(points, (0, 2, 3), strict=True):
        kill(config, out, step=point, workers=workers)
    go_on(config, out, "data.workers=1")
    assert tensors(out) == tensors(uninterrupted)
    assert rows(out) == rows(uninterrupted)


@pytest.mark.slow
def test_the_signal_of_a_scheduler_saves_first(uninterrupted: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    interrupt(config, out, signum=signal.SIGTERM, code=143)
    go_on(config, out)
    assert tensors(out) == tensors(uninterrupted)


@pytest.mark.slow
def test_another_seed_gives_other_weights(uninterrupted: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    process = start(config, out, "seed=4")
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert tensors(out) != tensors(uninterrupted)


def test_a_signal_during_evaluation_saves_and_the_evaluation_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    overrides = [f"out={out}", "train.steps=9", "log.eval_every_steps=3", "log.checkpoint_every_steps=100"]

    def evaluate_under_fire(*arguments: Any, **settings: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return collect_source(*arguments, **settings)

    monkeypatch.setattr("vitcli.fit.collect_source", evaluate_under_fire)
    with pytest.raises(Interrupted):
        pretrain(config, overrides, dry_run=False, say=lambda text: None)
    assert (out / "checkpoints" / "step_00000003" / "manifest.json").exists()
    assert not any(row["kind"] == "eval" for row in rows(out))
    monkeypatch.setattr("vitcli.fit.collect_source", collect_source)
    pretrain(config, overrides, dry_run=False, say=lambda text: None)
    assert [row["step"] for row in rows(out) if row["kind"] == "eval"] == [3, 6, 9]
