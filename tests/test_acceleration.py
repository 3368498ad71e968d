"""bf16, compilation and GPUs change the speed, not the result: losses stay close to plain float32 on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from vitcli.train import pretrain

CONFIG = """
model: {patch_size: 4, width: 32, depth: 2, num_heads: 2}
data: {source: digits, image_size: 16}
augment: {crop: pad, pad: 2, flip: false}
optim: {lr: 2e-3}
train: {steps: 12, batch_size: 32}
log: {log_every_steps: 4, checkpoint_every_steps: 4, eval_every_steps: 100}
"""


def losses(folder: Path, name: str, *overrides: str) -> list[float]:
    config = folder / "tiny.yaml"
    config.write_text(CONFIG)
    pretrain(config, [f"out={folder / name}", *overrides], dry_run=False, say=lambda text: None)
    return [row["loss"] for row in map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())]


@pytest.fixture
def plain(tmp_path: Path) -> list[float]:
    return losses(tmp_path, "plain", "train.precision=float32", "train.device=cpu")


def test_bf16_stays_close_and_is_recorded(tmp_path: Path, plain: list[float]) -> None:
    mixed = losses(tmp_path, "bf16", "train.precision=bf16", "train.device=cpu")
    assert mixed == pytest.approx(plain, rel=2e-2)
    assert mixed != plain
    assert "precision: bf16" in (tmp_path / "bf16" / "config.yaml").read_text()


def test_micro_batches_add_up_to_the_batch(tmp_path: Path, plain: list[float]) -> None:
    assert losses(
        tmp_path, "micro", "train.precision=float32", "train.device=cpu", "train.micro_batch_size=5"
    ) == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own libraries warn
def test_a_compiled_model_learns_the_same(tmp_path: Path, plain: list[float]) -> None:
    compiled = losses(tmp_path, "compiled", "train.precision=float32", "train.device=cpu", "train.compile=true")
    assert compiled == pytest.approx(plain, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("overrides", [["train.precision=float32"], ["train.precision=bf16"], ["train.compile=true"]])
def test_a_gpu_learns_the_same(tmp_path: Path, plain: list[float], overrides: list[str]) -> None:
    on_gpu = losses(tmp_path, "gpu", "train.device=cuda", "data.workers=2", *overrides)
    assert on_gpu == pytest.approx(plain, rel=3e-2)
