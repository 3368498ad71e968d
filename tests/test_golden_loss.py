"""Golden losses: a refactor keeps them; who changes the numerics on purpose changes them here and says why."""

import json
from pathlib import Path

import pytest

from vitcli.train import pretrain

VIT = "patch_size: 4, width: 32, depth: 2, num_heads: 2"
STEM = "resnet_units: [1, 1], resnet_width: 32, resnet_root: small"
CONFIG = """
seed: 1
model: {{{kind}, {model}}}
data: {{source: digits, image_size: 16}}
augment: {{crop: pad, pad: 2, flip: false, {augment}}}
optim: {{name: {optimiser}, lr: {lr}, weight_decay: 0.05}}
train: {{steps: 20, batch_size: 16, precision: float32, {train}}}
log: {{log_every_steps: 20, checkpoint_every_steps: 20}}
"""


@pytest.mark.parametrize(
    ("settings", "golden"),
    [
        ({"model": "representation_size: width", "optimiser": "adamw", "lr": "2e-3"}, 2.304805),
        ({"optimiser": "muon", "lr": "2e-3"}, 2.295361),
        ({"model": "pool: gap, pos_embed: sincos2d, gelu: exact", "optimiser": "sgd", "lr": "0.1"}, 2.34441),
        ({"model": "dropout: 0.1, head_bias: -2", "train": "loss: sigmoid", "optimiser": "adam", "lr": "1e-3"}, 3.265644),
        (
            {
                "augment": "mixup: 0.5, randaugment_layers: 1",
                "train": "label_smoothing: 0.1",
                "optimiser": "adamw",
                "lr": "2e-3",
            },
            2.310392,
        ),
        (
            {
                "model": "pool: map, pos_embed: relative, registers: 2, qk_norm: true, layer_scale: 0.1, stochastic_depth: 0.2",
                "optimiser": "adamw",
                "lr": "2e-3",
            },
            2.297861,
        ),
        (
            {
                "model": "pool: gap, attention: axial, pos_embed: learned2d, pos_embed_at: every_layer",
                "optimiser": "adamw",
                "lr": "2e-3",
            },
            2.305407,
        ),
        ({"kind": f"patch_size: 2, width: 32, depth: 2, num_heads: 2, {STEM}", "optimiser": "adamw", "lr": "2e-3"}, 2.311286),
        ({"kind": f"kind: resnet, {STEM}", "optimiser": "sgd", "lr": "0.03"}, 2.35503),
    ],
)
def test_the_mean_loss_of_the_first_twenty_steps(tmp_path: Path, settings: dict[str, str], golden: float) -> None:
    path = tmp_path / "golden.yaml"
    path.write_text(CONFIG.format(**{"kind": VIT, "model": "", "augment": "", "train": "", **settings}).replace(", }", "}"))
    pretrain(path, [f"out={tmp_path / 'run'}"], dry_run=False, say=lambda text: None)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [20]
    assert next(row["loss"] for row in rows if row["kind"] == "train") == pytest.approx(golden, rel=2e-4)
