"""torchvision's layout, against torchvision's own model."""

from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, vit_b_32

from tests.oracles import TOLERANCE, difference, our_weights, randomise, same_tensors
from vitcli.errors import CheckpointError
from vitcli.weights.open import open_weights
from vitcli.weights.torchvision import export_torchvision, torchvision_arguments, torchvision_differences

SMALL = dict(image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=100, num_classes=7)


@pytest.mark.parametrize("changes", [{}, {"image_size": 48}, {"representation_size": 24}])
def test_logits_equal_torchvisions(tmp_path, changes):
    theirs = randomise(VisionTransformer(**SMALL | changes))
    torch.save(theirs.state_dict(), tmp_path / "weights.bin")
    read = open_weights(tmp_path / "weights.bin")
    assert difference(read, theirs) < TOLERANCE
    assert read.model["gelu"] == "exact" and read.model["layer_norm_eps"] == 1e-6
    assert read.preprocessing["mean"] == [0.485, 0.456, 0.406] and read.preprocessing["eval_crop_fraction"] == 0.875
    assert read.classes == list("0123456") and not read.named
    assert any("3, of 64 channels" in note for note in read.notes) and any("preprocessing" in note for note in read.notes)
    assert {name: tuple(t.shape) for name, t in export_torchvision(read).items()} == {
        name: tuple(t.shape) for name, t in theirs.state_dict().items()
    }
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in export_torchvision(read).items())


def test_names_of_old_versions_are_read(tmp_path):
    theirs = randomise(VisionTransformer(**SMALL))
    state = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for name, tensor in theirs.state_dict().items()
    }
    assert any("linear_2" in name for name in state)
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, tmp_path / "old.pth")
    assert difference(open_weights(tmp_path / "old.pth"), theirs) < TOLERANCE


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"representation_size": 24},
        {"pos_embed": "sincos2d"},
        {"pos_embed": "learned2d"},
        {"pos_embed": "none"},
        {"layer_norm_eps": 1e-3},
    ],
    ids=lambda section: next(iter(section), "plain"),
)
def test_exported_weights_are_torchvisions(tmp_path, section):
    ours = our_weights((32, 32), patch_size=8, width=128, depth=2, num_heads=2, mlp_dim=200, gelu="exact", **section)
    eps = section.get("layer_norm_eps", 1e-6)
    theirs = VisionTransformer(**torchvision_arguments(ours), norm_layer=partial(nn.LayerNorm, eps=eps)).eval()
    theirs.load_state_dict(export_torchvision(ours), strict=True)
    assert difference(ours, theirs) < TOLERANCE
    assert bool(torchvision_differences(ours)) == (eps != 1e-6)

    torch.save(export_torchvision(ours), tmp_path / "weights.pth")
    back = open_weights(tmp_path / "weights.pth")
    assert same_tensors(ours, back) or "pos_embed" in section


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"gelu": "tanh"}, "tanh GELU"),
        ({"pool": "gap"}, "class token"),
        ({"registers": 2}, "registers"),
        ({"layer_scale": 0.1}, "LayerScale"),
        ({"qk_norm": True}, "queries and keys"),
        ({"pos_embed": "relative"}, "relative positions"),
        ({"pos_embed_at": "shared"}, "shared"),
        ({"resnet_units": [1], "resnet_width": 32, "patch_size": 4}, "ResNet before"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_torchvision_has_not_is_refused(section, words):
    ours = our_weights((32, 32), **{"patch_size": 8, "width": 64, "depth": 1, "num_heads": 2, "gelu": "exact"} | section)
    with pytest.raises(CheckpointError, match=f"torchvision.*{words}"):
        export_torchvision(ours)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.pop("encoder.layers.encoder_layer_1.ln_1.bias"), "1 missing: blocks.1.norm1.bias"),
        (lambda state: state.update({"extra.weight": torch.zeros(3)}), "extra.weight"),
        (lambda state: state.update({"encoder.ln.weight": torch.zeros(3)}), r"norm.weight \(3,\) where \(192,\)"),
        (lambda state: state.update({"encoder.pos_embedding": torch.zeros(1, 12, 192)}), "11 patches"),
        (lambda state: state.update({"encoder.pos_embedding": torch.zeros(192)}), "position embeddings"),
        (lambda state: state.update({"conv_proj.weight": torch.zeros(192, 3, 8, 4)}), "patch embedding"),
    ],
)
def test_other_tensors_are_refused_with_their_names(tmp_path, spoil, words):
    state = dict(randomise(VisionTransformer(**SMALL)).state_dict())
    spoil(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=words):
        open_weights(tmp_path / "weights.pth")


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [224, 96])
def test_full_size(tmp_path, image_size):
    theirs = randomise(vit_b_32(image_size=image_size))
    torch.save(theirs.state_dict(), tmp_path / "vit_b_32.pth")
    assert difference(open_weights(tmp_path / "vit_b_32.pth"), theirs) < TOLERANCE
