"""One update: in portions, out of memory, with a gradient that is not finite; and what a run makes of such steps."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitcli import step as step_module
from vitcli.config import Config
from vitcli.data.loader import Batch
from vitcli.distributed import SOLO, Engine
from vitcli.errors import Interrupted, UserError
from vitcli.losses import classification_loss
from vitcli.models import build_model
from vitcli.optim import build_optimizer, ema_start
from vitcli.plan import resolve
from vitcli.recovery import LossScale
from vitcli.step import Outcome, State, train_step
from vitcli.train import pretrain

CPU = torch.device("cpu")
MODEL = {"patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}


def make(*, images_at_once: int = 32, micro: int = 32, batch: int = 32, **settings: Any) -> tuple[State, Engine, Config]:
    """Build a small model and its optimiser, the same weights every time."""
    config = Config.model_validate(
        {
            "model": MODEL,
            "data": {"source": "digits", "image_size": 16},
            "optim": {"lr": 0.01, "warmup_steps": 0, "schedule": "constant", **settings.pop("optim", {})},
            "augment": settings.pop("augment", {}),
            "train": {"steps": 10, "batch_size": batch, "micro_batch_size": micro, "precision": "float32", **settings},
        }
    )
    config = resolve(config, train_examples=100, val_examples=10, device=CPU)
    torch.manual_seed(0)
    model = build_model(config.model, image_size=(16, 16), num_classes=10)
    torch.nn.init.normal_(model.head.weight, std=0.1)  # of zeros, no gradient would reach the blocks
    engine = Engine(model, blocks=list(model.blocks), input_shape=(3, 16, 16), parallel="single", ranks=SOLO, device=CPU)
    optimizer = build_optimizer(config.optim, model)
    scale = LossScale(scale=2.0**8, interval=2) if config.train.precision == "fp16" else None
    ema = ema_start(model) if config.train.ema_decay else None
    return State(model, optimizer, ema, scale, 0, images_at_once), engine, config


def batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(0, 256, (sum(sizes), 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (sum(sizes),), generator=generator)
    rows = zip(whole.split(sizes), labels.split(sizes), torch.arange(sum(sizes)).split(sizes), strict=True)
    return [{"images": images, "labels": label, "indices": index} for images, label, index in rows]


def one_step(
    state: State, engine: Engine, config: Config, parts: list[Batch], said: list[str] | None = None
) -> tuple[Outcome, Tensor]:
    sums = torch.zeros(3, dtype=torch.float64)
    say = (said if said is not None else []).append
    outcome = train_step(state, parts, config=config, num_classes=10, engine=engine, class_weights=None, sums=sums, say=say)
    return outcome, sums


def weights(state: State) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


@pytest.mark.parametrize(("at_once", "micro"), [(32, 8), (8, 32), (5, 32), (3, 16), (1, 32)])
@pytest.mark.parametrize("augment", [{}, {"mixup": 0.4}])
def test_portions_change_a_step_by_rounding_alone(at_once: int, micro: int, augment: dict[str, float]) -> None:
    if augment and micro != 32:
        pytest.skip("images are mixed within a micro-batch")
    optim = {"name": "sgd"}  # Adam would make a small gradient's rounding as large as the step
    state, engine, config = make(optim=optim, augment=augment)
    outcome, sums = one_step(state, engine, config, batches(32))
    other, other_engine, other_config = make(images_at_once=at_once, micro=micro, optim=optim, augment=augment)
    parts = batches(*[micro] * (32 // micro))
    other_outcome, other_sums = one_step(other, other_engine, other_config, parts)
    torch.testing.assert_close(other_sums, sums, rtol=1e-6, atol=0)
    torch.testing.assert_close(other_outcome.gradient_norm, outcome.gradient_norm, rtol=1e-5, atol=0)
    for name, tensor in weights(state).items():
        torch.testing.assert_close(other.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


def test_memory_that_runs_out_halves_the_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    state, engine, config = make(optim={"name": "sgd"})
    expected, _ = one_step(state, engine, config, batches(32))
    short, short_engine, _ = make(optim={"name": "sgd"})
    model, calls = short_engine.forward, []

    def limited(images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(images) > 10:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        output: Tensor = model(images)
        return output

    monkeypatch.setattr(short_engine, "forward", limited)
    said: list[str] = []
    outcome, _ = one_step(short, short_engine, config, batches(32), said)
    assert calls == [32, 16, 8, 8, 8, 8] and short.images_at_once == 8
    assert [text.split(":")[0] for text in said] == ["out of memory in step 1"] * 2 and "8 images" in said[1]
    torch.testing.assert_close(outcome.gradient_norm, expected.gradient_norm, rtol=1e-5, atol=0)
    for name, tensor in weights(state).items():
        torch.testing.assert_close(short.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


def test_other_errors_and_a_single_image_too_many_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    for message, at_once in (("a defect", 32), ("DefaultCPUAllocator: not enough memory", 1)):
        state, engine, config = make(images_at_once=at_once)

        def fail(images: Tensor, message: str = message) -> Tensor:
            raise RuntimeError(message)

        monkeypatch.setattr(engine, "forward", fail)
        with pytest.raises(RuntimeError, match=message):
            one_step(state, engine, config, batches(32))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, engine, config = make(optim={"name": name}, ema_decay=0.9)
    one_step(state, engine, config, batches(32))
    before, ema = weights(state), {key: tensor.clone() for key, tensor in (state.ema or {}).items()}
    moments = json.dumps(plain(state.optimizer.state_dict()))
    real = classification_loss
    monkeypatch.setattr(step_module, "classification_loss", lambda *a, **k: real(*a, **k) * float("nan"))
    outcome, sums = one_step(state, engine, config, batches(32))
    assert outcome.verdict == "nonfinite" and state.step == 2 and sums.tolist() == [0, 0, 0]
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(state).items())
    assert state.ema is not None and all(torch.equal(ema[key], tensor) for key, tensor in state.ema.items())
    assert json.dumps(plain(state.optimizer.state_dict())) == moments
    monkeypatch.undo()
    outcome, sums = one_step(state, engine, config, batches(32))
    assert outcome.verdict == "apply" and sums[2] == 32
    assert not all(torch.equal(before[key], tensor) for key, tensor in weights(state).items())


def plain(value: Any) -> Any:
    """Turn tensors into lists, to compare nested states by value."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_fp16_learns_lowers_its_scale_and_tells_an_overflow_from_a_broken_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    state, engine, config = make(precision="fp16", optim={"lr": 0.003})
    losses = []
    for _ in range(6):
        _, sums = one_step(state, engine, config, batches(32))
        losses.append(float(sums[0] / sums[2]))
    assert losses[-1] < 0.9 * losses[0]
    assert state.scale is not None and state.scale.scale == 2.0**11  # doubled every second step
    before = weights(state)
    state.scale = LossScale(scale=2.0**24)  # beyond fp16's 65,504 in the backward pass
    outcome, _ = one_step(state, engine, config, batches(32))
    assert outcome.verdict == "overflow" and state.scale.scale == 2.0**23
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(state).items())
    real = classification_loss
    monkeypatch.setattr(step_module, "classification_loss", lambda *a, **k: real(*a, **k) * float("nan"))
    outcome, _ = one_step(state, engine, config, batches(32))
    assert outcome.verdict == "nonfinite"


def test_fp16_and_float32_agree() -> None:
    norms = []
    for precision in ("float32", "fp16"):
        state, engine, config = make(precision=precision)
        outcome, _ = one_step(state, engine, config, batches(32))
        norms.append(float(outcome.gradient_norm))
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


# ---------------------------------------------------------------- whole runs


CONFIG = """
model: {patch_size: 8, width: 32, depth: 1, num_heads: 2, pool: gap}
data: {source: digits, image_size: 16, workers: 0}
augment: {crop: resize, flip: false}
optim: {name: sgd, lr: 0.1, warmup_steps: 0, schedule: constant}
train: {steps: 30, batch_size: 32, max_rollbacks: 1}
log: {checkpoint_every_steps: 5, eval_every_steps: 30, log_every_steps: 5, keep_checkpoints: 3, sample_images: 0}
"""


def run(tmp_path: Path, name: str, *settings: str) -> list[str]:
    (tmp_path / "c.yaml").write_text(CONFIG)
    said: list[str] = []
    pretrain(tmp_path / "c.yaml", [f"out={tmp_path / name}", *settings], dry_run=False, say=said.append)
    return said


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "checkpoints/step_00000030/model.safetensors").read_bytes()).hexdigest()


def spoil(monkeypatch: pytest.MonkeyPatch, bad: Callable[[State, set[int]], bool]) -> None:
    """Make the loss not a number in the steps, or for the images, that `bad` says."""
    real = classification_loss

    def spoilt(state: State, parts: list[Batch], **rest: Any) -> Outcome:
        seen = {index for part in parts for index in part["indices"].tolist()}
        factor = float("nan") if bad(state, seen) else 1.0
        monkeypatch.setattr(step_module, "classification_loss", lambda *a, **k: real(*a, **k) * factor)
        return train_step(state, parts, **rest)

    monkeypatch.setattr("vitcli.fit.train_step", spoilt)


def batch_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """Return the images of each step of a run that nothing happens to."""
    order: list[set[int]] = []

    def look(state: State, seen: set[int]) -> bool:
        order.append(seen)
        return False

    spoil(monkeypatch, look)
    run(tmp_path, "plain")
    return order


def test_a_run_goes_back_and_leaves_out_what_led_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = batch_order(tmp_path, monkeypatch)
    poison = set().union(*order[12:15])
    met: list[set[int]] = []

    def bad(state: State, seen: set[int]) -> bool:
        met.append(seen)
        return bool(seen & poison)

    spoil(monkeypatch, bad)
    run(tmp_path, "whole")
    assert met[:15] == order[:15] and met[15:30] == order[15:30]  # back to step 10, on with the batch after the streak
    assert len(met) == 15 + 20
    assert json.loads((tmp_path / "whole/rollbacks.json").read_text()) == {"rollbacks": [{"step": 10, "skip": 5}]}
    stored = sorted((tmp_path / "whole/nonfinite").iterdir())
    assert [path.name for path in stored] == ["step_00000012", "step_00000013", "step_00000014"]
    assert set(load_file(stored[0] / "rank_000.safetensors")["indices"].tolist()) == order[12]
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [5, 10, 15, 20, 25, 30]
    assert digest(tmp_path / "whole") != digest(tmp_path / "plain")

    fired: list[int] = []

    def bad_and_stopped(state: State, seen: set[int]) -> bool:
        if len(seen & order[22]) and not fired:  # after the rollback
            fired.append(state.step)
            os.kill(os.getpid(), signal.SIGTERM)
        return bool(seen & poison)

    spoil(monkeypatch, bad_and_stopped)
    with pytest.raises(Interrupted):
        run(tmp_path, "stopped")
    assert fired
    run(tmp_path, "stopped")
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


def test_a_run_that_goes_back_too_often_gives_up_and_can_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda state, seen: state.step >= 2)
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row before step 5.*after 1 of 1 rollbacks.*nonfinite"):
        run(tmp_path, "bad")
    monkeypatch.undo()
    run(tmp_path, "bad")  # nothing was worth keeping: no checkpoint binds this command
    run(tmp_path, "good")
    assert digest(tmp_path / "bad") == digest(tmp_path / "good")


def test_a_step_now_and_then_is_left_out_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda state, seen: state.step in (3, 4, 9, 20))
    run(tmp_path, "some")
    assert not (tmp_path / "some/rollbacks.json").exists()
    rows = [json.loads(line) for line in (tmp_path / "some/metrics.jsonl").read_text().splitlines()]
    assert all(row["loss"] is not None and row["loss"] < 10 for row in rows)
    assert rows[-1]["step"] == 30


def test_the_best_checkpoints_and_milestones_stay(tmp_path: Path) -> None:
    run(tmp_path, "kept", "log.keep_checkpoints=1", "log.keep_best=1", "log.eval_every_steps=4", "log.keep_every_steps=10")
    rows = [json.loads(line) for line in (tmp_path / "kept/metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["top1"] for row in rows if row["kind"] == "eval" and row["step"] < 30}
    best = max(sorted(scores, reverse=True), key=lambda step: scores[step])
    names = {path.name for path in (tmp_path / "kept/checkpoints").iterdir()}
    assert names == {f"step_{step:08d}" for step in {best, 10, 20, 30}}
