"""Fine-tuning in parts: the head alone first, frozen parameters, layers at their own learning rates; from one checkpoint."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import vit
from vitcli.checkpoint import load_checkpoint, load_weights_file
from vitcli.config import Config
from vitcli.config_file import stored_config
from vitcli.errors import ConfigError, Interrupted
from vitcli.plan import lr_of_step, resolve
from vitcli.step import set_modes, train_step
from vitcli.train import finetune

PRETRAIN = """
model: {patch_size: 8, width: 32, depth: 3, num_heads: 2}
data: {source: shapes, image_size: 16, shapes: {classes: 3, train_examples: 60, val_examples: 30}}
train: {steps: 2, batch_size: 8, precision: float32, tune: false}
"""
SETTINGS = (
    *("train.steps=20", "train.batch_size=8", "optim.lr=3e-3", "optim.warmup_steps=2", "optim.weight_decay=0.1"),
    *("log.log_every_steps=4", "log.eval_every_steps=10", "log.checkpoint_every_steps=8", "log.keep_checkpoints=9"),
    *("train.precision=float32", "data.image_size=16", "augment.min_area=0.5", "augment.flip=false"),
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "tiny.yaml").write_text(PRETRAIN)
    assert vit("pretrain", "--config", "tiny.yaml", cwd=folder).returncode == 0
    return folder / "runs" / "tiny"


def tune(pretrained: Path, out: Path, *overrides: str, said: list[str] | None = None) -> Path:
    say = (said if said is not None else []).append
    words = [*SETTINGS, f"out={out}", *overrides]
    finetune(pretrained, "digits", None, words, from_scratch=False, dry_run=False, say=say)
    return out


def state_after(out: Path, step: int) -> dict[str, Tensor]:
    return load_checkpoint(out / "checkpoints" / f"step_{step:08d}").model_state


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


def digest(out: Path, step: int = 20) -> dict[str, str]:
    folder = out / "checkpoints" / f"step_{step:08d}"
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != "manifest.json"
    }


HEAD = {"head.weight", "head.bias"}

# ---------------------------------------------------------------- the head first


@pytest.fixture(scope="module")
def head_first(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(pretrained, tmp_path_factory.mktemp("head-first") / "run", "train.head_first_steps=6")


def test_the_head_moves_first_and_then_everything(pretrained: Path, head_first: Path) -> None:
    before = load_weights_file(pretrained).state
    alone, after = state_after(head_first, 6), state_after(head_first, 20)
    assert changed(before, alone) == HEAD
    assert changed(alone, after) == set(after)
    assert set(load_checkpoint(head_first / "checkpoints" / "step_00000006").optimizer_state["state"]) == {0, 1}
    rows = [json.loads(line) for line in (head_first / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [4, 6, 8, 12, 16, 20]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [10, 20]


def test_each_part_has_a_schedule_of_its_own(head_first: Path) -> None:
    config = stored_config(head_first / "config.yaml")
    rates = [lr_of_step(config, step) for step in range(20)]
    assert rates[0] == config.optim.lr  # no warm-up in six steps
    assert rates[:6] == sorted(rates[:6], reverse=True) and rates[5] < 0.1 * config.optim.lr
    assert rates[6] < rates[7] < rates[8] == config.optim.lr > rates[19]


@pytest.mark.parametrize(
    ("points", "ema"),
    [
        ((6,), True),
        pytest.param((6,), False, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in product([(2, 5), (7, 12)], [False, True])),
    ],
)
def test_interrupted_in_either_part_it_ends_with_the_same_bits(
    pretrained: Path, head_first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: tuple[int, ...], ema: bool
) -> None:
    words = ["train.head_first_steps=6", *(["train.ema_decay=0.9"] if ema else [])]
    whole = tune(pretrained, tmp_path / "whole", *words) if ema else head_first
    original = train_step
    for point in points:

        def step(state: Any, *arguments: Any, at: int = point, **settings: Any) -> Any:
            if state.step == at:
                raise Interrupted(2)
            return original(state, *arguments, **settings)

        with monkeypatch.context() as patched:
            patched.setattr("vitcli.fit.train_step", step)
            with pytest.raises(Interrupted):
                tune(pretrained, tmp_path / "run", *words)
    said: list[str] = []
    tune(pretrained, tmp_path / "run", *words, said=said)
    assert digest(tmp_path / "run") == digest(whole)
    assert any("resuming" in text or "everything is trained" in text for text in said)


def test_a_run_cannot_be_all_head_first(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"head_first_steps is 20, but the run has 20 steps.*freeze_backbone"):
        tune(pretrained, tmp_path / "run", "train.head_first_steps=20")
    with pytest.raises(ConfigError, match=r"warmup_steps is 2, but the run has 2 steps after train.head_first_steps"):
        tune(pretrained, tmp_path / "run", "train.head_first_steps=18")
    with pytest.raises(ConfigError, match="train.freeze_backbone trains the head alone to the end"):
        tune(pretrained, tmp_path / "run", "train.head_first_steps=5", "train.freeze_backbone=true")
    words = [*SETTINGS, f"out={tmp_path / 'run'}", "train.head_first_steps=5"]
    with pytest.raises(ConfigError, match="head_first_steps keeps random weights"):
        finetune(pretrained, "digits", None, words, from_scratch=True, dry_run=False, say=lambda text: None)


# ---------------------------------------------------------------- frozen by pattern


def test_what_a_pattern_names_stays_as_it_is(pretrained: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = tune(pretrained, tmp_path / "run", "train.freeze=['patch_embed.*', pos_embed, 'blocks.[01].*']", said=said)
    before, after = load_weights_file(pretrained).state, load_weights_file(out).state
    frozen = {name for name in before if name.startswith(("patch_embed.", "pos_embed", "blocks.0.", "blocks.1."))}
    assert changed(before, after) == set(after) - frozen
    assert any("of which" in text and "are trained" in text for text in said)


def test_one_pattern_needs_no_list(pretrained: Path, tmp_path: Path) -> None:
    out = tune(pretrained, tmp_path / "run", "train.freeze=blocks.*")
    before, after = load_weights_file(pretrained).state, load_weights_file(out).state
    assert not {name for name in changed(before, after) if name.startswith("blocks.")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.freeze=blokcs.*"], r"train.freeze: 'blokcs.\*' matches no parameter.*called cls_token"),
        (["train.freeze='*'"], "leaves nothing to train"),
        (["train.freeze=head.*", "train.head_first_steps=3"], "leaves nothing to train in the first steps"),
        (["train.freeze=head.bias", "train.freeze_backbone=true"], "train.freeze_backbone trains the head alone"),
    ],
)
def test_patterns_that_make_no_sense(pretrained: Path, tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tune(pretrained, tmp_path / "run", *words)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_is_frozen_does_not_drop() -> None:
    dropouts = [nn.Dropout(0.5), nn.Dropout(0.5)]
    block, other = (nn.Sequential(nn.Linear(2, 2), dropout) for dropout in dropouts)
    model = nn.Sequential(block, other)
    for parameter in block.parameters():
        parameter.requires_grad = False
    set_modes(model, head_alone=False, some_frozen=True)
    assert model.training and other.training and not block.training
    assert [dropout.training for dropout in dropouts] == [False, True]
    set_modes(model, head_alone=False, some_frozen=False)
    assert all(module.training for module in model.modules())
    set_modes(model, head_alone=True, some_frozen=False)
    assert not any(module.training for module in model.modules())


# ---------------------------------------------------------------- everything at once


def test_regularisation_may_change_at_fine_tuning(pretrained: Path, tmp_path: Path) -> None:
    said: list[str] = []
    words = ("model.stochastic_depth=0.2", "model.dropout=0.1", "optim.layer_decay=0.7", "train.ema_decay=0.9")
    out = tune(pretrained, tmp_path / "run", *words, said=said)
    model = stored_config(out / "config.yaml").model
    assert (model.stochastic_depth, model.dropout) == (0.2, 0.1)
    assert any("layer decay 0.7" in text for text in said)
    groups = load_checkpoint(out / "checkpoints" / "step_00000020").optimizer_state["param_groups"]
    scales = {name: group["lr_scale"] for group in groups for name in group["param_names"]}
    assert scales["head.weight"] == 1.0
    assert scales["patch_embed.proj.weight"] == pytest.approx(0.7**4)


def test_null_settings_of_the_length_follow_the_part_with_everything() -> None:
    settings = {
        "model": {"variant": "mu/16"},
        "data": {"source": "digits", "image_size": 32},
        "train": {"steps": 1000, "head_first_steps": 200, "precision": "float32"},
    }
    config = resolve(Config.model_validate(settings), train_examples=1000, val_examples=100, device=torch.device("cpu"))
    assert config.optim.warmup_steps == 40
    assert lr_of_step(config, 240) == config.optim.lr == lr_of_step(config, 10)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_in_parts_as_one_does(pretrained: Path, tmp_path: Path, parallel: str) -> None:
    words = [
        *("finetune", "--ckpt", str(pretrained), "--dataset", "digits", *SETTINGS, "log.eval_every_steps=4"),
        *("train.head_first_steps=6", "train.freeze=patch_embed.*", "optim.layer_decay=0.8", "train.early_stop_evals=9"),
    ]
    found = {}
    for count in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if count == 2 else []
        out = tmp_path / f"run-{count}"
        done = subprocess.run(
            [sys.executable, *launch, "-m", "vitcli", *words, "--out", str(out), f"train.parallel={parallel}"],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [(row["kind"], row["step"]) for row in rows]
        found[count] = (
            steps,
            [row["loss"] for row in rows],
            json.loads((out / "summary.json").read_text())["step"],
            load_weights_file(out).state,
        )
    assert found[1][0] == found[2][0] and found[1][2] == found[2][2]
    assert found[1][1] == pytest.approx(found[2][1], abs=1e-4)
    for name, tensor in found[1][3].items():
        torch.testing.assert_close(found[2][3][name], tensor, atol=1e-3, rtol=1e-3)
    before = load_weights_file(pretrained).state["patch_embed.proj.weight"]
    assert torch.equal(before, found[2][3]["patch_embed.proj.weight"])
