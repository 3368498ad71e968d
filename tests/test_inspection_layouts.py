"""`vit inspect` on other people's files: the authors' .npz, timm's and Hugging Face's, against what their own code sees."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from tests.harness import vit
from tests.oracles import randomise
from tests.test_inspection_command import made
from vitcli.inspection import command
from vitcli.inspection.gallery import of_weights
from vitcli.weights.convert import convert

SIDE, PATCH = 32, 8


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a picture of the model's own size, which no preprocessing resizes; figures of weights alone are drawn."""
    monkeypatch.setattr(command, "gallery", of_weights)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def look(ckpt: Path, photo: Path, out: Path) -> dict[str, Any]:
    result = vit("inspect", "--ckpt", str(ckpt), "--images", str(photo), "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert {"filters.png", "positions.png", "index.html"} <= {path.name for path in out.iterdir()}
    found: dict[str, Any] = json.loads((out / "inspection.json").read_text())
    return found


def as_input(photo: Path, mean: float = 0.5, std: float = 0.5) -> Tensor:
    with Image.open(photo) as image:
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    return (pixels / 255 - mean) / std


def distances(attentions: list[Tensor]) -> NDArray[np.float64]:
    """Return each head's mean attention distance (L, A), px, from weights (1, A, N, N) with a class token first."""
    places = torch.cartesian_prod(*[torch.arange(SIDE // PATCH) * PATCH + PATCH / 2] * 2)
    apart = torch.cdist(places, places)
    found = []
    for weights in attentions:
        seen = weights[0, :, 1:, 1:]
        found.append(((seen * apart).sum(-1) / seen.sum(-1)).mean(-1))
    return torch.stack(found).double().numpy()


def test_hugging_face(tmp_path: Path, photo: Path) -> None:
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 150, "num_labels": 7}
    config = ViTConfig(**sizes, image_size=SIDE, patch_size=PATCH, attn_implementation="eager")
    theirs = randomise(ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path / "theirs")
    found = look(tmp_path / "theirs", photo, tmp_path / "inside")
    with torch.no_grad():
        expected = theirs(as_input(photo), output_attentions=True).attentions
    np.testing.assert_allclose(found["attention"]["mean_distance_px"], distances(list(expected)), rtol=1e-4)


def test_timm(tmp_path: Path, photo: Path) -> None:
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 7}
    theirs = randomise(timm.models.VisionTransformer(**sizes))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")  # no config: heads are taken as 64 wide, as timm's are
    found = look(tmp_path / "theirs.pth", photo, tmp_path / "inside")
    expected: list[Tensor] = []
    for block in theirs.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: expected.append(output))
    with torch.no_grad():
        theirs(as_input(photo))
    np.testing.assert_allclose(found["attention"]["mean_distance_px"], distances(expected), rtol=1e-4)


def test_the_authors_npz(tmp_path: Path, photo: Path) -> None:
    """The same weights in our own file, which the other tests look at."""
    sizes = {"patch_size": PATCH, "width": 128, "depth": 2, "num_heads": 2, "mlp_dim": 96}
    own = made(tmp_path, size=(SIDE, SIDE), source=None, **sizes)
    convert(own, tmp_path / "theirs.npz", say=lambda _: None)
    expected, found = (look(ckpt, photo, tmp_path / ckpt.suffix[1:]) for ckpt in (own, tmp_path / "theirs.npz"))
    assert found["model"]["width"] == 128 and found["positions"] == expected["positions"]
    for key in ("filters", "attention", "rollout", "tokens", "receptive_fields"):
        given, wanted = (json.dumps(one[key]).replace(name, "") for one, name in ((found, "theirs.npz"), (expected, own.name)))
        assert given == wanted
