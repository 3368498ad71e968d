"""`vit convert`: every layout there and back, graphs for other runtimes, and nothing kept that computes something else."""

import json
import math
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.harness import Result, vit
from vitcli.checkpoint import save_weights_file
from vitcli.cli import WhichLayout
from vitcli.errors import CheckpointError, ConfigError, Interrupted
from vitcli.model_config import ModelConfig, resolve_model
from vitcli.models import Model, build_model
from vitcli.pretrained import Pretrained
from vitcli.weights import convert as room
from vitcli.weights import graphs
from vitcli.weights.convert import ENDINGS, Target, choose_target, convert, fitted, parse_size
from vitcli.weights.huggingface import export_huggingface
from vitcli.weights.open import open_weights

SIZES: dict[str, Any] = {"patch_size": 8, "width": 128, "depth": 2, "mlp_dim": 96, "num_heads": 2}
CLASSES = ["ant", "bee", "cow", "dog", "emu"]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "eval_crop_fraction": 0.8}


def made(folder: Path, *, image_size: tuple[int, int] = (16, 16), classes: bool = True, **settings: Any) -> Path:
    """Write a weights file of ours whose every tensor matters, and return its path."""
    sizes = {} if settings.get("kind") == "resnet" else SIZES
    section = resolve_model(ModelConfig(**{**sizes, **settings}))
    model = random_model(section, image_size=image_size)
    state = {name: tensor for name, tensor in model.state_dict().items() if classes or not name.startswith("head.")}
    pretrained = Pretrained(
        state=state,
        model=section.model_dump(mode="json"),
        classes=CLASSES if classes else [],
        preprocessing={"image_size": list(image_size), **IMAGENET},
        source_path=folder / "own.safetensors",
        step=7,
        is_ema=True,
        manifest={"source": "shapes", "seed": 3},
    )
    save_weights_file(pretrained.source_path, pretrained)
    return pretrained.source_path


def random_model(section: ModelConfig, *, image_size: tuple[int, int]) -> Model:
    generator = torch.Generator().manual_seed(1)
    model = build_model(section, image_size=image_size, num_classes=len(CLASSES)).eval()
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean=centre, std=0.1, generator=generator)
    return model


def logits_of(weights: Pretrained, images: Tensor) -> Tensor:
    with torch.no_grad():
        return fitted(weights, image_size=(images.shape[2], images.shape[3]))(images)


def random_images(batch: int, image_size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.randn(batch, 3, *image_size, generator=torch.Generator().manual_seed(batch))


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def fails_with(result: Result, *said: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    for words in said:
        assert words in lines[0]


# ---------------------------------------------------------------- every layout


@pytest.mark.parametrize(
    ("target", "name", "settings"),
    [
        ("vit", "out.safetensors", {"pos_embed": "relative", "pool": "gap"}),
        ("npz", "out.npz", {"representation_size": "width"}),
        ("npz", "resnet.npz", {"kind": "resnet", "resnet_units": (1, 1), "resnet_width": 32}),
        ("timm", "folder", {"pool": "map", "gelu": "exact"}),
        ("timm", "out.safetensors", {"gelu": "exact"}),
        ("hf", "folder", {"layer_norm_eps": 1e-12}),
        ("torchvision", "out.safetensors", {"gelu": "exact"}),
        ("torchvision", "out.pth", {"gelu": "exact"}),
        ("vit", "out.safetensors", {"distill_token": True, "registers": 1}),
        ("timm", "out.safetensors", {"distill_token": True, "gelu": "exact"}),
    ],
)
def test_a_layout_read_back_gives_the_same_logits(target: Target, name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path_in = made(tmp_path, **settings)
    before = open_weights(path_in)
    result = convert(path_in, tmp_path / name, to=target, say=lambda line: None)
    after = open_weights(tmp_path / name)
    images = random_images(2)
    assert (logits_of(before, images) - logits_of(after, images)).abs().max() <= 1e-4
    assert result.largest_difference <= 1e-4
    assert after.named == (target in ("vit", "hf") or name == "folder")  # a folder has a config.json, a file has none
    assert contents(tmp_path) >= {"own.safetensors", name}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_our_own_file_keeps_everything(tmp_path: Path) -> None:
    path_in = made(tmp_path)
    convert(path_in, tmp_path / "again.safetensors", to="vit", say=lambda line: None)
    assert (tmp_path / "again.safetensors").read_bytes() == path_in.read_bytes()


def test_a_way_through_every_layout_changes_no_bit(tmp_path: Path) -> None:
    path = first = made(tmp_path)
    steps: list[tuple[Target, str]] = [("npz", "a.npz"), ("hf", "b"), ("timm", "c"), ("vit", "d.safetensors")]
    for target, name in steps:
        convert(path, tmp_path / name, to=target, say=lambda line: None)
        path = tmp_path / name
    before, after = open_weights(first), open_weights(path)
    assert before.state.keys() == after.state.keys()
    assert all(torch.equal(before.state[name], after.state[name]) for name in before.state)


def test_what_a_layout_has_no_place_for_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    convert(made(tmp_path), tmp_path / "out.npz", say=said.append)
    notes = [line for line in said if line.startswith("note: ")]
    assert any("class names are not kept" in note for note in notes)
    assert any("mean is not kept: [0.485, 0.456, 0.406] here" in note for note in notes)
    assert any("eval_crop_fraction is not kept: 0.8" in note for note in notes)


def test_a_folder_for_hugging_face_keeps_names_and_preprocessing(tmp_path: Path) -> None:
    said: list[str] = []
    convert(made(tmp_path), tmp_path / "folder", say=said.append)
    parameters = sum(tensor.numel() for tensor in open_weights(tmp_path / "folder").state.values())
    assert f"{parameters:,} parameters" in said[0]
    assert [line for line in said if line.startswith("note: ")] == []
    assert contents(tmp_path / "folder") == {"config.json", "model.safetensors", "preprocessor_config.json"}
    back = open_weights(tmp_path / "folder")
    assert (back.classes, back.named) == (CLASSES, True)
    assert back.preprocessing["mean"] == IMAGENET["mean"]


def test_weights_without_a_head_stay_without(tmp_path: Path) -> None:
    path_in = made(tmp_path, classes=False, pool="map")
    convert(path_in, tmp_path / "out.npz", say=lambda line: None)
    back = open_weights(tmp_path / "out.npz")
    assert back.classes == [] and "head.weight" not in back.state
    assert torch.equal(back.state["attn_pool.q.weight"], open_weights(path_in).state["attn_pool.q.weight"])


def test_positions_are_resized_on_the_way(tmp_path: Path) -> None:
    path_in = made(tmp_path)
    result = vit("convert", str(path_in), str(tmp_path / "large.safetensors"), "--to", "vit", "--image-size", "32x24")
    assert result.returncode == 0, result.stderr
    back = open_weights(tmp_path / "large.safetensors")
    assert back.preprocessing["image_size"] == [32, 24]
    assert back.state["pos_embed"].shape == (1, 1 + 4 * 3, 128)
    with torch.no_grad():
        expected = fitted(open_weights(path_in), image_size=(32, 24))(random_images(1, (32, 24)))
    torch.testing.assert_close(logits_of(back, random_images(1, (32, 24))), expected)


# ---------------------------------------------------------------- graphs for other runtimes


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    path_in = made(folder, image_size=(16, 24))
    for name in ("out.onnx", "out.pt2"):
        result = vit("convert", str(path_in), str(folder / name))
        assert result.returncode == 0, result.stderr
        assert f"{name}: written as" in result.stdout and "any batch size" in result.stdout
    return folder


@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_gives_the_same_logits_for_any_batch_size(exported: Path, batch: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported / "out.onnx", providers=["CPUExecutionProvider"])
    images = random_images(batch, (16, 24))
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    expected = logits_of(open_weights(exported / "own.safetensors"), images).numpy()
    assert expected.std() > 0.1
    assert np.abs(logits - expected).max() <= 1e-4
    assert [axis if isinstance(axis, int) else "any" for axis in session.get_inputs()[0].shape] == ["any", 3, 16, 24]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_program_gives_the_same_logits_for_any_batch_size(exported: Path, batch: int) -> None:
    images = random_images(batch, (16, 24))
    program = torch.export.load(exported / "out.pt2").module()
    expected = logits_of(open_weights(exported / "own.safetensors"), images)
    assert (program(images) - expected).abs().max() <= 1e-4


def test_graphs_say_what_they_are(exported: Path) -> None:
    import onnx

    model = onnx.load(exported / "out.onnx")
    onnx.checker.check_model(model)
    assert [(opset.domain, opset.version) for opset in model.opset_import if not opset.domain] == [("", graphs.OPSET)]
    extra = {"vit": ""}
    torch.export.load(exported / "out.pt2", extra_files=extra)
    for text in ({prop.key: prop.value for prop in model.metadata_props}["vit"], extra["vit"]):
        about = json.loads(text)
        assert about["classes"] == CLASSES
        assert about["preprocessing"] == {"image_size": [16, 24], **IMAGENET}
        assert (about["model"]["gelu"], about["model"]["layer_norm_eps"]) == ("tanh", 1e-6)


def test_graphs_do_not_name_files_of_the_machine_they_were_made_on(exported: Path, root: Path) -> None:
    for name in ("out.onnx", "out.pt2"):
        content = (exported / name).read_bytes()
        assert str(root / "src").encode() not in content and b"attention.py" not in content


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"pool": "gap", "registers": 2, "layer_scale": 0.1, "qk_norm": True},
        {"pool": "map", "gelu": "exact"},
        {"pos_embed": "relative"},
        {"pos_embed": "learned2d", "pos_embed_at": "every_layer"},
        {"attention": "axial", "pool": "gap", "pos_embed": "sincos2d"},
        {"patch_size": 1, "resnet_units": (1, 1), "resnet_width": 32},
        {"kind": "resnet", "resnet_units": (1, 1), "resnet_width": 32},
    ],
)
def test_every_kind_of_model_becomes_a_graph(settings: dict[str, Any], tmp_path: Path) -> None:
    path_in = made(tmp_path, **settings)
    for name in ("out.onnx", "out.pt2"):
        assert convert(path_in, tmp_path / name, say=lambda line: None).largest_difference <= 1e-4


@pytest.mark.slow
def test_weights_too_large_for_one_onnx_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1_000)
    convert(made(tmp_path), tmp_path / "out.onnx", say=lambda line: None)
    assert contents(tmp_path) == {"own.safetensors", "out.onnx", "out.onnx.data"}
    logits, _ = graphs.open_onnx(tmp_path / "out.onnx")
    expected = logits_of(open_weights(tmp_path / "own.safetensors"), random_images(2))
    assert (logits(random_images(2)) - expected).abs().max() <= 1e-4


def test_a_head_that_is_not_trained_yet_is_said(tmp_path: Path) -> None:
    path_in = made(tmp_path)
    weights = open_weights(path_in)
    zeros = {name: torch.zeros_like(weights.state[name]) for name in ("head.weight", "head.bias")}
    path_in.unlink()
    save_weights_file(path_in, replace(weights, state={**weights.state, **zeros}))
    said: list[str] = []
    convert(path_in, tmp_path / "out.pt2", say=said.append)
    assert any("the same logits" in line for line in said)


# ---------------------------------------------------------------- nothing is kept that computes something else


def spoilt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 0.01 if name.endswith("norm1.bias") else tensor for name, tensor in state.items()}


def test_a_wrong_tensor_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path_in = made(tmp_path)
    monkeypatch.setattr(room, "save_weights_file", lambda path, w: save_weights_file(path, replace(w, state=spoilt(w.state))))
    result = vit("convert", str(path_in), str(tmp_path / "out.safetensors"), "--to", "vit")
    fails_with(result, f"vit: {tmp_path}/out.safetensors: read back as vit", "differ by up to 0.", "more than 0.0001")
    assert contents(tmp_path) == {"own.safetensors"}
    result = vit("convert", str(path_in), str(tmp_path / "out.safetensors"), "--to", "vit", "--tolerance", "10")
    assert result.returncode == 0, result.stderr


def test_a_wrong_tensor_is_found_behind_a_head_of_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path_in = made(tmp_path)
    weights = open_weights(path_in)
    zeros = {name: torch.zeros_like(weights.state[name]) for name in ("head.weight", "head.bias")}
    path_in.unlink()
    save_weights_file(path_in, replace(weights, state={**weights.state, **zeros}))
    monkeypatch.setattr(
        room,
        "export_huggingface",
        lambda w: {k: v + 0.01 * k.endswith("layernorm.bias") for k, v in export_huggingface(w).items()},
    )
    with pytest.raises(CheckpointError, match="other logits"):
        convert(path_in, tmp_path / "folder", say=lambda line: None)
    assert contents(tmp_path) == {"own.safetensors"}


@pytest.mark.parametrize(
    ("name", "writer"), [("out.pt2", "write_program"), pytest.param("out.onnx", "write_onnx", marks=pytest.mark.slow)]
)
def test_a_graph_of_other_weights_leaves_nothing_behind(
    name: str, writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path_in = made(tmp_path, depth=1)
    write = getattr(room, writer)

    def wrong(path: Path, model: Model, *, about: dict[str, Any]) -> None:
        other = fitted(open_weights(path_in))
        with torch.no_grad():
            other.head.bias.add_(0.01)
        write(path, other, about=about)

    monkeypatch.setattr(room, writer, wrong)
    with pytest.raises(CheckpointError, match="differ by up to 0.01"):
        convert(path_in, tmp_path / name, say=lambda line: None)
    assert contents(tmp_path) == {"own.safetensors"}


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path_in = made(tmp_path)
    weights = open_weights(path_in)
    path_in.unlink()
    broken = torch.full_like(weights.state["norm.weight"], math.nan)
    save_weights_file(path_in, replace(weights, state={**weights.state, "norm.weight": broken}))
    with pytest.raises(CheckpointError, match="differ by up to inf"):
        convert(path_in, tmp_path / "out.npz", tolerance=1e9, say=lambda line: None)
    assert contents(tmp_path) == {"own.safetensors"}


@pytest.mark.parametrize(
    ("error", "kind"), [(OSError(28, "No space left on device"), CheckpointError), (Interrupted(2), Interrupted)]
)
def test_whatever_goes_wrong_leaves_nothing_behind(
    error: BaseException, kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path_in = made(tmp_path)

    def half(path: Path, weights: Pretrained) -> None:
        path.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(room, "save_weights_file", half)
    with pytest.raises(kind):
        convert(path_in, tmp_path / "out.safetensors", to="vit", say=lambda line: None)
    assert contents(tmp_path) == {"own.safetensors"}


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("out.safetensors", "vit"),
        ("out.npz", None),
        ("folder", "hf"),
        ("out.pth", None),
        ("out.pt2", None),
        pytest.param("out.onnx", None, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(name: str, to: Target | None, tmp_path: Path) -> None:
    path_in = made(tmp_path, gelu="exact" if name == "out.pth" else "tanh")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be written \(.*File too large"):
            convert(path_in, tmp_path / name, to=to, say=lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == {"own.safetensors"}


# ---------------------------------------------------------------- refused in one line


def test_an_existing_file_or_folder_is_refused(tmp_path: Path) -> None:
    path_in = made(tmp_path)
    (tmp_path / "out.npz").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "out.onnx.data").write_text("mine")
    for out, there in (("out.npz", "out.npz"), ("folder", "folder"), ("out.onnx", "out.onnx.data")):
        fails_with(vit("convert", str(path_in), str(tmp_path / out)), f"{there}: is there already; give another name")
    assert (tmp_path / "out.npz").read_text() == "mine"
    fails_with(vit("convert", str(path_in), str(path_in), "--to", "vit"), "is there already")
    fails_with(vit("convert", str(path_in), ".", cwd=tmp_path), ".: is there already")


@pytest.mark.parametrize(
    ("name", "to", "found"),
    [
        ("a.npz", None, "npz"),
        ("a.onnx", None, "onnx"),
        ("a.pt2", None, "torch-export"),
        ("a", None, "hf"),
        ("vit-b.16", None, "hf"),
        ("a", "timm", "timm"),
        ("a.safetensors", "timm", "timm"),
        ("a.safetensors", "vit", "vit"),
        ("a.pth", None, "torchvision"),
    ],
)
def test_the_ending_says_the_layout(name: str, to: Target | None, found: str) -> None:
    assert choose_target(Path(name), to) == found


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("a.safetensors", None, "say which: --to vit or --to timm or --to torchvision"),
        ("a.h5", None, "nothing is written that ends in .h5; expected one of: .safetensors (vit), .npz (npz), a folder"),
        ("a.npz", "onnx", "--to onnx writes .onnx"),
        ("a", "vit", "--to vit writes .safetensors"),
        ("a.safetensors", "hf", "--to hf writes a folder"),
    ],
)
def test_an_ending_that_does_not_say_it_lists_the_choices(name: str, to: Target | None, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_target(Path(name), to)
    assert said in str(error.value)


def test_the_command_line_knows_every_layout() -> None:
    assert {layout.value for layout in WhichLayout} == set(get_args(Target)) == set(ENDINGS)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "PACKAGES", ("onnx", "onnx_of_next_year"))
    result = vit("convert", str(made(tmp_path)), str(tmp_path / "out.onnx"))
    fails_with(result, "onnx_of_next_year; install with: pip install 'vitcli[onnx]'")
    assert contents(tmp_path) == {"own.safetensors"}


def test_a_damaged_or_missing_input_is_refused(tmp_path: Path) -> None:
    path_in = made(tmp_path)
    content = path_in.read_bytes()
    path_in.write_bytes(content[: len(content) // 2])
    fails_with(vit("convert", str(path_in), str(tmp_path / "out.npz")), str(path_in))
    path_in.unlink()
    fails_with(vit("convert", str(path_in), str(tmp_path / "out.npz")), f"{path_in}: no such file")
    assert contents(tmp_path) == set()


def test_a_model_that_a_layout_cannot_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    path_in = made(tmp_path, pos_embed="relative")
    for name in ("out.npz", "folder"):
        fails_with(vit("convert", str(path_in), str(tmp_path / name)), f"vit: {tmp_path / name}: ", "relative")
    assert contents(tmp_path) == {"own.safetensors"}


@pytest.mark.parametrize("words", ["0", "-1", "12.5", "16x", "16x16x16", "large"])
def test_a_size_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="--image-size is"):
        parse_size(words)


def test_sizes_and_tolerances_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    words = ("convert", str(made(tmp_path)), str(tmp_path / "out.npz"))
    fails_with(vit(*words, "--image-size", "20"), "--image-size 20x20: model.patch_size is 8")
    fails_with(vit(*words, "--tolerance", "-1"), "--tolerance is -1")
    fails_with(vit(*words, "--tolerance", "nan"), "--tolerance is nan")
    assert contents(tmp_path) == {"own.safetensors"}
