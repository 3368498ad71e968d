"""The loss and the class weights, against scikit-learn and torch; what a run does without."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from vitcli.fit import class_weights_of
from vitcli.losses import classification_loss, soft_targets


def test_balanced_weights_equal_scikit_learns() -> None:
    labels = np.repeat([0, 1, 2], [5, 50, 200])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = class_weights_of(np.bincount(labels), kind="balanced")
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["balanced", "sqrt"])
def test_weights_are_one_on_average_over_the_images(kind: str) -> None:
    counts = np.array([3, 0, 40, 700])
    weights = class_weights_of(counts, kind=kind).double().numpy()
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1.0, rel=1e-6)
    assert weights[1] == 0
    power = 1.0 if kind == "balanced" else 0.5
    assert weights[0] / weights[3] == pytest.approx((700 / 3) ** power, rel=1e-5)


def test_the_weighted_loss_is_torchs_with_its_sum_over_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 3, 0])
    targets = soft_targets(labels, num_classes=4, label_smoothing=0.0)
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])
    expected = F.cross_entropy(logits, labels, weight=weights, reduction="sum") / 6
    torch.testing.assert_close(classification_loss(logits, targets, kind="softmax", class_weights=weights), expected)
    equal = classification_loss(logits, targets, kind="softmax", class_weights=torch.ones(4))
    torch.testing.assert_close(equal, classification_loss(logits, targets, kind="softmax"))
    sigmoid = classification_loss(logits, targets, kind="sigmoid", class_weights=torch.ones(4))
    torch.testing.assert_close(sigmoid, classification_loss(logits, targets, kind="sigmoid"))


TINY = """
model: {patch_size: 8, width: 16, depth: 1, num_heads: 2}
data: {source: shapes, image_size: 16, shapes: {classes: 2, train_examples: 8, val_examples: 4}, workers: 0}
train: {steps: 2, batch_size: 4, precision: float32, tune: false}
"""


def test_no_run_imports_the_compiler_or_torchvision(tmp_path: Path) -> None:
    """They take longer than everything else up to the first step together."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    code = (
        "import sys\n"
        "from vitcli.cli import app\n"
        "for name in ('adamw', 'adam', 'sgd', 'muon'):\n"
        "    words = ['pretrain', '--config', 'tiny.yaml', '--out', name, f'optim.name={name}']\n"
        "    app(words, standalone_mode=False)\n"
        "    late = {'torch._dynamo', 'torchvision', 'torch.fx.experimental.symbolic_shapes'} & sys.modules.keys()\n"
        "    assert not late, (name, late)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
