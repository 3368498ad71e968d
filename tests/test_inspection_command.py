"""`vit inspect` as a user meets it: files, page and numbers, for every kind of model and weights, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.harness import Result, vit
from vitcli.checkpoint import save_weights_file
from vitcli.inspection import attention as attending
from vitcli.inspection import command
from vitcli.inspection.attention import attention_of_image, reading, rollout
from vitcli.inspection.gallery import of_weights
from vitcli.inspection.overlays import heat_over
from vitcli.inspection.page import GENERATOR
from vitcli.model_config import ModelConfig, resolve_model
from vitcli.models import VisionTransformer, build_model
from vitcli.pretrained import Pretrained

ROOT = Path(__file__).parents[1]
VIT: dict[str, Any] = {"patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48}
RESNET: dict[str, Any] = {"kind": "resnet", "resnet_units": (1, 1), "resnet_width": 8, "group_norm_groups": 4}
MLP: dict[str, Any] = {"kind": "mlp", "width": 24, "depth": 2}
HYBRID: dict[str, Any] = {**VIT, "patch_size": 2, "resnet_units": (1,), "resnet_width": 32}
WEIGHTS_ONLY = {"filters.png", "positions.png"}
MEASURED = {"alike.png", "features.png", "fields.png", "filters.png", "reach.png"}
ATTENDED = {"distances.png", "rollout.png", "heads.png", "layers.png", "lengths.png"}


def made(
    folder: Path, *, source: str | None = "shapes", name: str = "own", size: tuple[int, int] = (24, 32), **settings: Any
) -> Path:
    """Write a weights file with random weights, and return its path."""
    section = resolve_model(ModelConfig(**settings))
    torch.manual_seed(0)
    model = build_model(section, image_size=size, num_classes=3)
    pretrained = Pretrained(
        state=dict(model.state_dict()),
        model=section.model_dump(mode="json"),
        classes=["ant", "bee", "cow"],
        preprocessing={"image_size": list(size), "mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop_fraction": None},
        source_path=folder / f"{name}.safetensors",
        step=0,
        is_ema=False,
        manifest={"source": source, "seed": 0},
    )
    save_weights_file(pretrained.source_path, pretrained)
    return pretrained.source_path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of five pictures and one that is damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the weights' figures alone, where a test is about numbers."""
    monkeypatch.setattr(command, "gallery", of_weights)


def look(ckpt: Path, *words: str, out: Path) -> tuple[Result, dict[str, Any]]:
    result = vit("inspect", "--ckpt", str(ckpt), "--out", str(out), *words)
    assert result.returncode == 0, result.stderr
    return result, json.loads((out / "inspection.json").read_text())


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({**VIT, "registers": 1}, MEASURED | ATTENDED | {"positions.png"}),
        pytest.param(
            {**VIT, "pool": "gap", "attention": "axial", "pos_embed": "sincos2d"},
            MEASURED | ATTENDED | {"positions.png"},
            marks=pytest.mark.slow,
        ),
        pytest.param({**VIT, "pool": "map", "pos_embed": "relative"}, MEASURED | ATTENDED, marks=pytest.mark.slow),
        pytest.param(HYBRID, MEASURED | ATTENDED | {"positions.png"}, marks=pytest.mark.slow),
        (RESNET, MEASURED),
        (MLP, {"filters.png", "alike.png"}),
    ],
    ids=["token", "axial", "map", "hybrid", "resnet", "mlp"],
)
def test_every_kind_of_model_has_its_figures(
    tmp_path: Path, photos: Path, settings: dict[str, Any], expected: set[str]
) -> None:
    out = tmp_path / "inside"
    result, found = look(made(tmp_path, **settings), "--images", str(photos), "--pictures", "2", out=out)
    assert "broken.png" in result.stderr
    assert files(out) == expected | {"index.html", "inspection.json"} and set(found["figures"]) == expected
    assert found["images"] == 5 and len(found["layers"]) == len(found["cka"])
    np.testing.assert_allclose(np.diag(np.array(found["cka"], dtype=float)), 1.0)
    for name in expected:
        with Image.open(out / name) as image:
            assert np.asarray(image.convert("L")).std() > 5  # something is drawn
    if "distances.png" in expected:
        heads = np.array(found["attention"]["mean_distance_px"])
        assert heads.shape == (len(found["attention"]["layers"]), 2)
        assert (heads > 0).all() and (heads < 40).all()
        assert np.mean(found["rollout"][0]["per_mean_patch"]["max"]) == pytest.approx(1.0, abs=1e-4)
    page = (out / "index.html").read_text()
    assert GENERATOR in page and page.count("<svg") == len(expected)
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)  # nothing from elsewhere
    assert "<script" not in page


def test_two_models_are_compared_on_the_same_images(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt, other = made(tmp_path, **VIT), made(tmp_path, name="other", source=None, **RESNET)
    out = tmp_path / "inside"
    _, found = look(ckpt, "--against", str(other), "--images", str(photos), "--format", "svg", out=out)
    assert {"alike-against.svg", "reach.svg"} <= files(out)
    assert np.array(found["against"]["cka"], dtype=float).shape == (3, 3)
    assert [one["model"] for one in found["receptive_fields"]] == ["own.safetensors", "other.safetensors"]
    monkeypatch.setattr(command, "gallery", of_weights)
    _, found = look(ckpt, "--against", str(ckpt), "--images", str(photos), out=out)  # again, into the same folder
    assert found["against"]["cka"] == found["cka"]
    assert not [name for name in files(out) if name.endswith(".svg")]


@pytest.mark.usefixtures("quick")
def test_a_data_set_is_looked_at_evenly_and_the_same_every_time(tmp_path: Path) -> None:
    ckpt = made(tmp_path, **VIT)
    first, second = (look(ckpt, "--examples", "9", out=tmp_path / name)[1] for name in ("a", "b"))
    assert first == second and first["images"] == 9
    assert first["rollout"][0]["image"] != first["rollout"][1]["image"]
    asked = vit("inspect", "--ckpt", str(ckpt), "--examples", "9", "--out", str(tmp_path / "a"), "--json")
    assert json.loads(asked.stdout) == first


def test_weights_that_do_not_say_what_they_know_are_looked_at_alone(tmp_path: Path) -> None:
    result, found = look(made(tmp_path, source=None, **VIT), out=tmp_path / "inside")
    assert "weights alone" in result.stderr
    assert set(found["figures"]) == WEIGHTS_ONLY and found["images"] == 0
    assert "cka" not in found and "attention" not in found


@pytest.mark.usefixtures("quick")
def test_few_images_are_said_to_be_few(tmp_path: Path, photos: Path) -> None:
    words = ["--images", str(photos / "0.png"), str(photos / "1.png")]
    _, found = look(made(tmp_path, **VIT), *words, out=tmp_path / "inside")
    assert found["images"] == 2 and "cka" not in found
    assert any("too few" in note for note in found["notes"])


@pytest.mark.usefixtures("quick")
def test_another_image_size_has_other_patches(tmp_path: Path, photos: Path) -> None:
    _, found = look(
        made(tmp_path, size=(32, 32), **VIT), "--images", str(photos), "--image-size", "64x48", out=tmp_path / "inside"
    )
    assert found["image_size"] == [64, 48]
    assert np.array(found["rollout"][0]["per_mean_patch"]["mean"]).shape == (8, 6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images", "nothing-here.png"], "can be read"),
        (["--images", "a.png", "--dataset", "digits"], "one or the other"),
        (["--image-size", "big"], "--image-size big"),
        (["--image-size", "20"], "patch_size"),
        (["--out", "taken"], "no inspection"),
        (["--out", "own.safetensors"], "takes a folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    ckpt = made(tmp_path, **VIT)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    result = vit("inspect", "--ckpt", str(ckpt), *words, cwd=tmp_path)
    assert result.returncode == 2
    assert re.search(said, result.stderr.splitlines()[-1])
    assert "Traceback" not in result.stderr
    assert files(tmp_path / "taken") == {"thesis.txt"}


def test_against_needs_images(tmp_path: Path) -> None:
    ckpt = made(tmp_path, source=None, **VIT)
    result = vit("inspect", "--ckpt", str(ckpt), "--against", str(ckpt), "--out", str(tmp_path / "x"))
    assert result.returncode == 2 and "give some with --images" in result.stderr


@pytest.mark.usefixtures("quick")
def test_names_from_strangers_are_only_shown(tmp_path: Path, photos: Path) -> None:
    evil = photos / "<script>alert(1)<"
    evil.mkdir()
    (photos / "0.png").rename(evil / "x.png")
    ckpt = made(tmp_path, name="<b>&own", **VIT)
    look(ckpt, "--images", str(photos), out=tmp_path / "inside")
    page = (tmp_path / "inside" / "index.html").read_text()
    assert "<script" not in page and "<b>&own" not in page and "&lt;b&gt;&amp;own" in page


# ---------------------------------------------------------------- memory and pictures


def test_rollout_never_holds_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 x 32 patches: a layer's weights are 32 MB for 8 heads, and never more than 1 MB of them are there."""
    monkeypatch.setattr(attending, "MOST_BYTES", 1 << 20)
    sizes = {"patch_size": 4, "width": 16, "depth": 1, "num_heads": 8, "mlp_dim": 16, "num_classes": 2}
    model = VisionTransformer(image_size=(128, 128), **sizes).eval()
    given, last = attention_of_image(model, torch.zeros(1, 3, 128, 128))
    largest = 0
    original = type(given[0][0]).weight_rows

    def watched(self: Any, x: Any, *, most: int) -> Any:
        nonlocal largest
        for part in original(self, x, most=most):
            largest = max(largest, part.numel() * part.element_size())
            yield part

    monkeypatch.setattr(type(given[0][0]), "weight_rows", watched)
    flow = rollout(given, reading(model, last), fuse="max")
    assert float(flow.sum()) == pytest.approx(1.0, abs=1e-4)
    assert 0 < largest <= 1 << 20


def test_heat_lies_where_it_is_most() -> None:
    picture = np.full((20, 30, 3), 128, np.uint8)
    heat = np.zeros((2, 3))
    heat[1, 2] = 1.0
    found = heat_over(picture, heat, side=120).astype(int)
    assert found.shape == (80, 120, 3)
    assert found[70, 110].sum() > found[10, 10].sum() + 100
    flat = heat_over(picture, np.ones((2, 3)))
    assert (flat == flat[0, 0]).all()
