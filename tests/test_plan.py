"""Plans and recipes: what is left open gets its value once, and the numbers agree with arithmetic done by hand."""

from typing import Any

import pytest
import torch

from vitcli.config import Config
from vitcli.device import bf16_speedup, choose_device, choose_precision, hardware, memory_bytes
from vitcli.errors import ConfigError
from vitcli.plan import build_plan, describe, lr_of_step, resolve
from vitcli.recipes import finetune_recipe

CPU = torch.device("cpu")


def config(**train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"variant": "Ti/16"},
            "data": {"source": "shapes", "image_size": 224},
            "train": {"batch_size": 100, "precision": "float32", **train},
            "out": "runs/x",
        }
    )


@pytest.mark.parametrize(
    ("length", "steps"), [({"steps": 7}, 7), ({"epochs": 2}, 21), ({"epochs": 0.5}, 6), ({"examples": 1001}, 11)]
)
def test_every_unit_of_length_becomes_steps(length: dict[str, float], steps: int) -> None:
    resolved = resolve(config(**length), train_examples=1050, val_examples=50, device=CPU)
    assert (resolved.train.steps, resolved.train.epochs, resolved.train.examples) == (steps, None, None)


def test_what_is_left_open_gets_a_value_and_what_is_given_keeps_it() -> None:
    resolved = resolve(config(steps=4000), train_examples=1050, val_examples=50, device=CPU)
    assert resolved.optim.warmup_steps == 200
    assert resolved.model.width == 192
    assert resolved.model.mlp_dim == 768
    assert (resolved.log.log_every_steps, resolved.log.eval_every_steps, resolved.log.checkpoint_every_steps) == (40, 400, 400)
    assert (
        resolve(
            config(steps=4000, micro_batch_size=33), train_examples=1050, val_examples=50, device=CPU
        ).train.micro_batch_size
        == 33
    )
    assert resolve(resolved, train_examples=1050, val_examples=50, device=CPU) == resolved


def test_the_micro_batch_divides_a_large_batch_until_it_fits() -> None:
    micro = resolve(config(steps=10, batch_size=4096), train_examples=1050, val_examples=50, device=CPU).train.micro_batch_size
    assert micro is not None
    assert micro <= 128


def test_a_warm_up_longer_than_the_resolved_run_is_refused() -> None:
    long = config(epochs=1).model_copy(update={"optim": config(epochs=1).optim.model_copy(update={"warmup_steps": 11})})
    with pytest.raises(ConfigError, match="warmup_steps is 11, but the run has 11 steps"):
        resolve(long, train_examples=1050, val_examples=50, device=CPU)


def test_the_plan_says_what_it_costs() -> None:
    resolved = resolve(config(steps=4000, micro_batch_size=10), train_examples=1050, val_examples=50, device=CPU)
    plan = build_plan(resolved, num_classes=1000, train_examples=1050, val_examples=50, device=CPU)
    assert plan.parameters == 5_717_416  # timm's vit_tiny_patch16_224
    assert 2.4e9 < plan.flops_per_image < 2.7e9  # 1.26 G multiply-adds
    assert plan.memory_estimate_bytes > 16 * plan.parameters
    text = "\n".join(describe(plan))
    for word in ("5,717,416", "4,000 steps of 100", "381 epochs", "400,000 images", "runs/x"):
        assert word in text
    assert lr_of_step(resolved, 200) == resolved.optim.lr
    frozen = resolved.model_copy(update={"train": resolved.train.model_copy(update={"freeze_backbone": True})})
    less = build_plan(frozen, num_classes=1000, train_examples=1050, val_examples=50, device=CPU)
    assert less.memory_estimate_bytes < plan.memory_estimate_bytes


def test_precision_follows_the_wish_and_auto_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_precision("bf16", CPU, width=64) == "bf16"
    measured = bf16_speedup(64)
    assert 0.001 < measured < 1000
    assert bf16_speedup(64) == measured  # not measured again
    for speedup, precision in ((1.5, "float32"), (1.8, "bf16")):
        monkeypatch.setattr("vitcli.device.bf16_speedup", lambda width, speedup=speedup: speedup)
        assert choose_precision("auto", CPU, width=64) == precision
        assert choose_precision("float32", CPU, width=64) == "float32"


def test_what_the_machine_is() -> None:
    assert choose_device("cpu") == CPU
    assert "threads" in hardware(CPU)
    available = memory_bytes(CPU)
    assert available is None or available > 1e8


def test_float32_is_float32_in_convolutions_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    try:
        cudnn.conv.fp32_precision = "tf32"
        assert choose_device("cpu") == CPU and cudnn.conv.fp32_precision == "tf32"
        assert choose_device("auto").type == "cuda" and cudnn.conv.fp32_precision == "ieee"
    finally:
        cudnn.conv.fp32_precision = before


def recipe(dataset: str, *, side: int = 32, num_examples: int = 50_000, speed: float = 1e13, width: int = 96) -> Any:
    return finetune_recipe(
        dataset,
        model={"patch_size": 4 if side < 224 else 16, "width": width},
        preprocessing={"image_size": [side, side], "mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop_fraction": None},
        num_examples=num_examples,
        forward_flops=50_000_000,
        flops_per_second=speed,
    )


@pytest.mark.parametrize(
    ("dataset", "steps", "warmup_steps"),
    [("cifar10", 10_000, 500), ("cifar100", 10_000, 500), ("pets", 500, 100), ("imagenet", 20_000, 500)],
)
def test_table_4_for_the_papers_data_sets(dataset: str, steps: int, warmup_steps: int) -> None:
    settings = recipe(dataset, side=224).settings
    assert settings["train"] == {"steps": steps, "batch_size": 512}
    assert settings["data"]["image_size"] == [384, 384]
    optim = settings["optim"]
    assert (optim["name"], optim["momentum"], optim["weight_decay"], optim["grad_clip"]) == ("sgd", 0.9, 0.0, 1.0)
    assert (optim["schedule"], optim["warmup_steps"]) == ("cosine", warmup_steps)


def test_small_models_keep_their_resolution_and_slow_machines_get_a_hint() -> None:
    made = recipe("cifar10", speed=1e10)
    assert made.settings["data"]["image_size"] == [32, 32]
    assert any("384 px are for models pretrained at 224 px" in note for note in made.notes)
    assert any("for half an hour add train.steps=" in note for note in made.notes)
    assert not any("half an hour" in note for note in recipe("cifar10").notes)


def test_an_unknown_set_gets_a_recipe_for_its_size_and_machine() -> None:
    few, many = recipe("folder:photos", num_examples=300), recipe("folder:photos", num_examples=1_000_000)
    assert few.settings["train"] == {"steps": 562, "batch_size": 16, "early_stop_evals": 8}
    assert many.settings["train"] == {"steps": 20_000, "batch_size": 512, "early_stop_evals": 8}
    assert "300 images" in few.notes[0]
    slow = recipe("folder:photos", num_examples=1_000_000, speed=4e10)
    assert slow.settings["train"]["steps"] == int(1800 * 4e10 / (512 * 3 * 50e6))
    assert "shortened from 20,000 steps" in slow.notes[0]
    assert recipe("folder:photos", width=768).settings["optim"]["lr"] < few.settings["optim"]["lr"]
    assert recipe("folder:photos").settings["augment"]["flip"]
    assert not recipe("digits", num_examples=1400).settings["augment"]["flip"]
