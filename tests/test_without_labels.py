"""Runs that learn without labels: resumed, by several lanes and ranks, on pictures without classes, and what comes after."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitcli.checkpoint import load_checkpoint
from vitcli.compare import compare_runs
from vitcli.errors import CheckpointError, DataError, Interrupted
from vitcli.opened import open_model
from vitcli.report import write_report
from vitcli.train import finetune, pretrain

CONFIG = """
model: {patch_size: 4, width: 32, depth: 2, num_heads: 2}
data: {source: digits, image_size: 16}
augment: {crop: pad, flip: false}
objective: {name: masked_patch}
optim: {lr: 1e-3}
train: {steps: 6, batch_size: 12, micro_batch_size: 6, precision: float32}
log: {log_every_steps: 1, eval_every_steps: 3, checkpoint_every_steps: 2, keep_checkpoints: 3, sample_images: 0}
"""


def quiet(text: str) -> None:
    """Say nothing."""


def train(folder: Path, *words: str, say: object = quiet) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "a.yaml"
    path.write_text(CONFIG)
    pretrain(path, [f"out={folder / 'run'}", *words], dry_run=False, say=say)  # type: ignore[arg-type]
    return folder / "run"


def weights(run: Path) -> dict[str, bytes]:
    state = load_checkpoint(run / "checkpoints" / "step_00000006").model_state
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def rows(run: Path) -> list[dict[str, object]]:
    timed = ("images_per_second", "seconds")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole"), "fewshot.datasets=[digits]", "fewshot.shots=[5]", "fewshot.seeds=1")


def test_a_run_is_logged_evaluated_probed_and_summed_up(whole: Path) -> None:
    logged = rows(whole)
    evals = [row for row in logged if row["kind"] == "eval"]
    assert [row["step"] for row in evals] == [3, 6]
    assert all(set(row) == {"kind", "step", "loss", "accuracy"} for row in evals)
    assert evals[1]["loss"] < evals[0]["loss"] < np.log(512) + 0.5  # type: ignore[operator]
    assert [row["step"] for row in logged if row["kind"] == "fewshot" and "digits/5shot" in row] == [3, 6]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["loss"] == evals[1]["loss"] and summary["examples"] == 359 and "top1" not in summary
    assert not (whole / "predictions").exists()


def test_a_resumed_run_is_the_same_bit_for_bit(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitcli import fit, step

    original, steps = step.train_step, 0

    def interrupted(*given: object, **how: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Interrupted(2)
        return original(*given, **how)  # type: ignore[arg-type]

    probes = ("fewshot.datasets=[digits]", "fewshot.shots=[5]", "fewshot.seeds=1")
    monkeypatch.setattr(fit, "train_step", interrupted)
    with pytest.raises(Interrupted):
        train(tmp_path, *probes)
    monkeypatch.setattr(fit, "train_step", original)
    said: list[str] = []
    run = train(tmp_path, *probes, say=said.append)
    assert any("resuming" in line for line in said)
    assert weights(run) == weights(whole) and rows(run) == rows(whole)


def test_lanes_give_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = rows(train(tmp_path / "alone", "objective.name=mae"))
    monkeypatch.setattr("vitcli.fit.count_lanes", lambda *given, **how: 2)
    together = rows(train(tmp_path / "lanes", "objective.name=mae"))
    losses = [[row["loss"] for row in found if "loss" in row] for found in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_fine_tuning_takes_the_encoder_and_names_what_it_leaves(whole: Path, tmp_path: Path) -> None:
    said: list[str] = []
    words = [f"out={tmp_path / 'tuned'}", "train.steps=2", "train.batch_size=8", "log.sample_images=0"]
    finetune(whole, "digits", None, words, from_scratch=False, dry_run=False, say=said.append)
    report = json.loads((tmp_path / "tuned" / "weights_report.json").read_text())
    assert report["new"] == ["head.weight", "head.bias"]
    assert set(report["dropped"]) == {"objective.mask_token", "objective.predict.weight", "objective.predict.bias"}
    saved = load_checkpoint(tmp_path / "tuned" / "checkpoints" / "step_00000002")
    assert not any(name.startswith("objective.") for name in saved.model_state)
    assert any("dropped: objective.mask_token, objective.predict" in line for line in said)


def test_there_is_no_classifier_to_evaluate_but_features_to_read(whole: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no classifier yet: fine-tune them \(vit finetune\), or probe"):
        open_model(whole, say=quiet)
    opened = open_model(whole, head=False, say=quiet)
    assert opened.model.features(torch.zeros(1, 3, 16, 16, device=opened.device)).shape == (1, 32)


def test_its_report_asks_for_no_predictions(whole: Path, tmp_path: Path) -> None:
    said: list[str] = []
    path = write_report(whole, out=tmp_path / "a.html", data_root=None, mistakes=4, stored_only=False, say=said.append)
    page = path.read_text()
    assert not said and "redictions" not in page
    again = shutil.copytree(whole, tmp_path / "again")
    pair = compare_runs([whole, again], out=None, data_root=None, say=said.append)["pairs"][0]
    assert not said and pair["why"].endswith("it learned without labels, so it gives no answers")
    assert "share of hidden patches whose colour is right" in page


def test_a_run_starts_from_another_objectives_weights(whole: Path, tmp_path: Path) -> None:
    said: list[str] = []
    train(tmp_path / "mae", "objective.name=mae", f"ckpt={whole}", "train.steps=1", say=said.append)
    line = next(line for line in said if line.startswith("weights from"))
    assert "new: objective.mask_token, objective.embed" in line and "3 dropped: objective.mask_token, objective.predict" in line
    said.clear()
    train(tmp_path / "same", f"ckpt={whole}", "train.steps=1", say=said.append)
    assert "dropped" not in next(line for line in said if line.startswith("weights from"))


# ---------------------------------------------------------------- pictures without classes


def picture(number: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def test_a_folder_of_pictures_without_classes(tmp_path: Path) -> None:
    for number in range(24):
        path = tmp_path / "photos" / ("2024/may" if number % 2 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    source = f"data.source=folder:{tmp_path / 'photos'}"
    run = train(tmp_path / "a", source, "data.val_fraction=0.25", "train.steps=1")
    assert json.loads((run / "summary.json").read_text())["examples"] == 6
    assert json.loads((run / "checkpoints/step_00000001/manifest.json").read_text())["classes"] == []
    with pytest.raises(DataError, match="class folder"):  # where labels are needed
        train(tmp_path / "b", source, "objective.name=classification", "train.steps=1")


@pytest.mark.parametrize("beside", ["", "json"])
def test_shards_without_labels(tmp_path: Path, beside: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for number in range(16):
            members = {"png": picture(number)} | ({beside: b'{"caption": "a thing"}'} if beside else {})
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{kind}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    source = f"data.source=shards:{tmp_path / 'a.tar'}"
    run = train(tmp_path / "a", source, "data.val_fraction=0.25", "train.steps=1")
    assert json.loads((run / "summary.json").read_text())["examples"] == 4
    with pytest.raises(DataError, match="no label"):
        train(tmp_path / "b", source, "objective.name=classification", "train.steps=1")


# ---------------------------------------------------------------- ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked_patch", "mae"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_does(tmp_path: Path, name: str, parallel: str) -> None:
    words = (f"objective.name={name}", "train.micro_batch_size=3", f"train.parallel={parallel}")
    alone = rows(train(tmp_path / "alone", words[0]))
    (tmp_path / "two").mkdir()
    config = tmp_path / "two" / "a.yaml"
    config.write_text(CONFIG)
    out = tmp_path / "two" / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vitcli"]
    command = [*torchrun, "pretrain", "--config", str(config), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [[row["loss"] for row in found if "loss" in row] for found in (alone, rows(out))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
