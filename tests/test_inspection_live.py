"""A run that is looked at while it trains: the figures are there, and the run does not notice."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from vitcli.checkpoint import load_checkpoint
from vitcli.config_file import load_config
from vitcli.data.sources import open_source
from vitcli.inspection import live
from vitcli.inspection.gallery import gallery, of_attention, of_weights
from vitcli.inspection.page import Picture
from vitcli.inspection.words import Inspection
from vitcli.train import pretrain

CONFIG = """
seed: 2
model: {patch_size: 4, width: 24, depth: 2, num_heads: 2, dropout: 0.1, stochastic_depth: 0.1}
data: {source: shapes, image_size: 16, shapes: {classes: 4, train_examples: 200, val_examples: 40}, workers: 0}
train: {steps: 6, batch_size: 16, precision: float32, tune: false, ema_decay: 0.8, device: cpu}
log: {log_every_steps: 1, eval_every_steps: 3, checkpoint_every_steps: 2, keep_checkpoints: 9, sample_images: 0}
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the weights' figures alone."""
    monkeypatch.setattr(live, "gallery", of_weights)


def train(folder: Path, *overrides: str, out: str) -> Path:
    config = folder / "tiny.yaml"
    config.write_text(CONFIG)
    pretrain(config, [f"out={folder / out}", *overrides], dry_run=False, say=lambda _: None)
    return folder / out


def bytes_of(run: Path, step: int = 6) -> dict[str, bytes]:
    saved = load_checkpoint(run / "checkpoints" / f"step_{step:08d}")
    states = {"model": saved.model_state, "ema": saved.ema_state or {}}
    return {f"{kind}.{name}": tensor.numpy().tobytes() for kind, state in states.items() for name, tensor in state.items()}


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] == kind]


@pytest.mark.usefixtures("quick")
def test_training_does_not_notice_and_tensorboard_has_the_figures(tmp_path: Path) -> None:
    seen = train(tmp_path, "log.inspect_every_steps=4", out="seen")
    unseen = train(tmp_path, out="unseen")
    assert bytes_of(seen) == bytes_of(unseen)
    numbers = [[(row["step"], row["loss"]) for row in rows(run, "train")] for run in (seen, unseen)]
    assert numbers[0] == numbers[1]
    assert rows(unseen, "inspect") == []
    found = rows(seen, "inspect")
    assert [row["step"] for row in found] == [4, 6]  # and at the end
    assert all(row["figures"] == 2 and row["seconds"] > 0 for row in found)
    events = EventAccumulator(str(seen / "tensorboard"))
    events.Reload()
    assert {"inspect/filters", "inspect/positions"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Images("inspect/filters")] == [4, 6]
    (seen / "summary.json").unlink()  # killed after its last figures: the same ones are not drawn again
    train(tmp_path, "log.inspect_every_steps=2", out="seen")
    assert [row["step"] for row in rows(seen, "inspect")] == [4, 6]


def test_figures_are_those_of_the_weights_given_and_cost_no_random_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them once, of a run's averaged weights; few images, however many there are."""
    run = train(tmp_path, out="run")
    looked: list[Inspection] = []
    monkeypatch.setattr(live, "IMAGES", 6)

    def draw(found: Inspection) -> list[Picture]:
        looked.append(found)
        return gallery(found)

    monkeypatch.setattr(live, "gallery", draw)
    config = load_config(run / "config.yaml")
    saved = load_checkpoint(run / "checkpoints" / "step_00000006")
    assert saved.ema_state is not None
    before = torch.get_rng_state()
    figures = live.live_figures(
        {**saved.ema_state, "of.something.else": torch.zeros(1)},
        open_source("shapes", split="val", data=config.data),
        config,
        num_classes=4,
        step=6,
        device=torch.device("cpu"),
        say=pytest.fail,
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert {"filters", "positions", "distances", "rollout", "features", "lengths", "alike", "fields"} <= set(figures)
    for pixels in figures.values():
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.std() > 5
    assert looked[0].survey is not None and looked[0].survey.images == 6 and len(looked[0].views) == 2
    own = looked[0].opened.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in saved.ema_state.items())
    assert [picture.name for picture in of_attention(looked[0])][:1] == ["distances"]


def test_a_device_without_room_loses_the_figures_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(live, "live_figures", full)
    run = train(tmp_path, "log.inspect_every_steps=3", out="run")
    assert rows(run, "inspect") == [] and (run / "summary.json").exists()
