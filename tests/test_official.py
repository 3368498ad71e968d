"""The authors' .npz files: names and shapes as published, every generation the same tensors, logits as timm reads them."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.layers import GELUTanh, StdConv2d, StdConv2dSame
from timm.models import resnetv2
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from vitcli.errors import CheckpointError
from vitcli.model_config import SIZES, ModelConfig, resolve_model
from vitcli.models import build_model
from vitcli.pretrained import Pretrained
from vitcli.weights import load_weights
from vitcli.weights.files import RawWeights
from vitcli.weights.official import read_official, write_official
from vitcli.weights.open import open_weights

Shapes = dict[str, tuple[int, ...]]
Arrays = dict[str, NDArray[Any]]

# SHA-256 over the sorted names and shapes of the published files, as listed by their authors' code
PUBLISHED = {
    "ViT-B_16.imagenet21k": "c26528c7dac32899e11d8d456d2f694eb2cc72abdf2d247cf9d76af5d29076af",
    "ViT-B_16.imagenet21k+imagenet2012": "8fb49af768231660931758fa05e82312d7be6e4690892600e409c2ab48952db1",
    "R50+ViT-B_16.imagenet21k": "9b7a069ea3913a27f51dafd1adb3085e6d89d4bea81c9db5f46aa785aca14269",
    "BiT-M-R50x1": "0bac99cebeb7b954b407f3f10179fed05a79bc7a014963b476cf2d755705999d",
}


def vit_shapes(
    *,
    width: int = 64,
    depth: int = 2,
    mlp_dim: int = 48,
    heads: int = 4,
    patch: int = 4,
    tokens: int = 17,
    classes: int = 5,
    hidden: int | None = None,
    units: tuple[int, ...] | None = None,
    root_width: int = 32,
) -> Shapes:
    """Return names and shapes of a file of the first generation."""
    inputs = 3 if units is None else root_width * 4 * 2 ** (len(units) - 1) if units else root_width
    shapes: Shapes = {
        "cls": (1, 1, width),
        "embedding/kernel": (patch, patch, inputs, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, tokens, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (hidden or width, classes),
        "head/bias": (classes,),
    }
    if hidden:
        shapes |= {"pre_logits/kernel": (width, hidden), "pre_logits/bias": (hidden,)}
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
        for part in ("query", "key", "value"):
            attention = f"{block}/MultiHeadDotProductAttention_1/{part}"
            shapes |= {f"{attention}/kernel": (width, heads, width // heads), f"{attention}/bias": (heads, width // heads)}
        out = f"{block}/MultiHeadDotProductAttention_1/out"
        shapes |= {f"{out}/kernel": (heads, width // heads, width), f"{out}/bias": (width,)}
        mlp = f"{block}/MlpBlock_3/Dense_"
        shapes |= {f"{mlp}0/kernel": (width, mlp_dim), f"{mlp}0/bias": (mlp_dim,)}
        shapes |= {f"{mlp}1/kernel": (mlp_dim, width), f"{mlp}1/bias": (width,)}
    if units is not None:
        shapes["conv_root/kernel"] = (7, 7, 3, root_width)
        norms = {"gn_root": root_width}
        inputs = root_width
        for b, count in enumerate(units):
            middle = root_width * 2**b
            for u in range(count):
                unit = f"block{b + 1}/unit{u + 1}"
                shapes[f"{unit}/conv1/kernel"] = (1, 1, inputs, middle)
                shapes[f"{unit}/conv2/kernel"] = (3, 3, middle, middle)
                shapes[f"{unit}/conv3/kernel"] = (1, 1, middle, 4 * middle)
                norms |= {f"{unit}/gn1": middle, f"{unit}/gn2": middle, f"{unit}/gn3": 4 * middle}
                if u == 0:
                    shapes[f"{unit}/conv_proj/kernel"] = (1, 1, inputs, 4 * middle)
                    norms[f"{unit}/gn_proj"] = 4 * middle
                inputs = 4 * middle
        for name, channels in norms.items():
            shapes |= {f"{name}/scale": (1, 1, 1, channels), f"{name}/bias": (1, 1, 1, channels)}
    return shapes


def bit_shapes(*, units: tuple[int, ...] = (1, 2), root_width: int = 32, classes: int = 5) -> Shapes:
    """Return names and shapes of a BiT ResNet's file, by TensorFlow's names."""
    conv = "standardized_conv2d/kernel"
    shapes: Shapes = {f"resnet/root_block/{conv}": (7, 7, 3, root_width)}
    norms: dict[str, int] = {}
    inputs = root_width
    for b, count in enumerate(units):
        middle = root_width * 2**b
        for u in range(count):
            unit = f"resnet/block{b + 1}/unit{u + 1:02d}"
            shapes[f"{unit}/a/{conv}"] = (1, 1, inputs, middle)
            shapes[f"{unit}/b/{conv}"] = (3, 3, middle, middle)
            shapes[f"{unit}/c/{conv}"] = (1, 1, middle, 4 * middle)
            norms |= {f"{unit}/a": inputs, f"{unit}/b": middle, f"{unit}/c": middle}
            if u == 0:
                shapes[f"{unit}/a/proj/{conv}"] = (1, 1, inputs, 4 * middle)
            inputs = 4 * middle
    norms["resnet"] = inputs
    for name, channels in norms.items():
        shapes |= {f"{name}/group_norm/gamma": (channels,), f"{name}/group_norm/beta": (channels,)}
    return shapes | {"resnet/head/conv2d/kernel": (1, 1, inputs, classes), "resnet/head/conv2d/bias": (classes,)}


BASE: dict[str, Any] = {"width": 768, "depth": 12, "mlp_dim": 3072, "heads": 12, "patch": 16, "tokens": 197, "classes": 21843}
FULL_SIZE = {
    "ViT-B_16.imagenet21k": vit_shapes(**BASE, hidden=768),
    "ViT-B_16.imagenet21k+imagenet2012": vit_shapes(**{**BASE, "tokens": 577, "classes": 1000}),
    "R50+ViT-B_16.imagenet21k": vit_shapes(**{**BASE, "patch": 1}, hidden=768, units=(3, 4, 9), root_width=64),
    "BiT-M-R50x1": bit_shapes(units=(3, 4, 6, 3), root_width=64, classes=21843),
}


def random_arrays(shapes: Shapes, seed: int = 0) -> Arrays:
    """Fill a file's arrays with values that keep activations of ordinary size."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in sorted(shapes.items()):
        scale = 0.1 if len(shape) < 2 or "conv" not in name else 1.0
        array = rng.standard_normal(shape).astype(np.float32) * scale
        arrays[name] = array + 1 if name.endswith(("scale", "gamma")) else array
    return arrays


def write(path: Path, arrays: Arrays) -> Path:
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return path


def run(pretrained: Pretrained, images: Tensor, **changes: Any) -> Tensor:
    """Return the logits of weights in the model they come with."""
    section = ModelConfig(**{**pretrained.model, **changes})
    height, width = pretrained.preprocessing["image_size"]
    model = build_model(section, image_size=(height, width), num_classes=len(pretrained.classes))
    load_weights(model, pretrained.state, reset_head=False)
    with torch.no_grad():
        logits: Tensor = model.eval()(images)
    return logits


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# ----------------------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize("name", FULL_SIZE)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    listing = json.dumps(sorted((key, list(shape)) for key, shape in FULL_SIZE[name].items()))
    assert hashlib.sha256(listing.encode()).hexdigest() == PUBLISHED[name]


TI: dict[str, Any] = {"width": 192, "depth": 12, "mlp_dim": 768, "heads": 3, "tokens": 50}
S: dict[str, Any] = {"width": 384, "depth": 12, "mlp_dim": 1536, "heads": 6, "tokens": 50}
L: dict[str, Any] = {"width": 1024, "depth": 24, "mlp_dim": 4096, "heads": 16}
H: dict[str, Any] = {"width": 1280, "depth": 32, "mlp_dim": 5120, "heads": 16}
VARIANTS = {
    "B/16": (FULL_SIZE["ViT-B_16.imagenet21k"], 224, 103_186_515),
    "B/16 at 384": (FULL_SIZE["ViT-B_16.imagenet21k+imagenet2012"], 384, 86_859_496),
    "R50+B/16": (FULL_SIZE["R50+ViT-B_16.imagenet21k"], 224, 115_277_971),
    "R50x1": (FULL_SIZE["BiT-M-R50x1"], 224, 68_256_659),
    "R50x3": (bit_shapes(units=(3, 4, 6, 3), root_width=192, classes=21843), 224, 345_399_315),
    "R101x1": (bit_shapes(units=(3, 4, 23, 3), root_width=64, classes=21843), 224, 87_248_787),
    "R152x2": (bit_shapes(units=(3, 8, 36, 3), root_width=128, classes=21843), 224, 321_728_979),
    "R+Ti/16": (vit_shapes(**TI, patch=8, classes=1000, units=(), root_width=64), 224, None),
    "R26+S/32": (vit_shapes(**S, patch=1, classes=1000, units=(2, 2, 2, 2), root_width=64), 224, None),
    "R50+L/32": (vit_shapes(**L, tokens=50, patch=1, classes=1000, units=(3, 4, 6, 3), root_width=64), 224, None),
    "L/16": (vit_shapes(**L, tokens=197, patch=16, classes=21843, hidden=1024), 224, None),
    "H/14": (vit_shapes(**H, tokens=257, patch=14, classes=21843, hidden=1280), 224, None),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_of_full_size_are_recognised_whole(variant: str) -> None:
    shapes, side, parameters = VARIANTS[variant]
    raw = RawWeights({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, {}, "npz")
    found = read_official(raw, Path("x.npz"))
    sizes = resolve_model(ModelConfig(variant=variant.split(" ")[0])).model_dump(mode="json", include=set(SIZES))
    assert {key: found.model[key] for key in sizes} == sizes
    assert found.preprocessing["image_size"] == [side, side]
    assert parameters in (None, sum(tensor.numel() for tensor in found.state.values()))
    assert sum(t.numel() for t in found.state.values()) == sum(t.numel() for t in raw.tensors.values())


@pytest.mark.slow
def test_a_file_of_full_size_and_random_values_loads_completely(tmp_path: Path) -> None:
    arrays = random_arrays(FULL_SIZE["ViT-B_16.imagenet21k"])
    found = open_weights(write(tmp_path / "B_16.npz", arrays))
    model = build_model(ModelConfig(**found.model), image_size=(224, 224), num_classes=21843)
    report = load_weights(model, found.state, reset_head=False)
    assert report.summary() == "154 tensors: 154 taken"  # 202 arrays; q, k and v are one tensor of 12 blocks each
    assert torch.equal(model.state_dict()["pre_logits.weight"], torch.from_numpy(arrays["pre_logits/kernel"].T.copy()))


# --------------------------------------------------------------------------------------------------------------- generations


def linen(arrays: Arrays) -> Arrays:
    """Count the parts of a block each kind for itself, and put the positions where later code has them."""
    names = (
        ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
        ("LayerNorm_2", "LayerNorm_1"),
        ("MlpBlock_3", "MlpBlock_0"),
        ("posembed_input/", ""),
    )
    result = {}
    for name, array in arrays.items():
        for old, new in names:
            name = name.replace(old, new)
        result[name] = array
    return result


def big_vision(arrays: Arrays) -> Arrays:
    """Put positions at the top, under params/."""
    result = {f"params/{name}": array for name, array in linen(arrays).items()}
    result["params/pos_embedding"] = result.pop("params/Transformer/pos_embedding")
    return result


def scanned(arrays: Arrays) -> Arrays:
    """Stack the leaves of all blocks along a leading axis."""
    result = {name: array for name, array in arrays.items() if "encoderblock_" not in name}
    for name in arrays:
        if "encoderblock_0/" in name:
            depth = sum(name.replace("encoderblock_0/", f"encoderblock_{i}/") in arrays for i in range(99))
            parts = [arrays[name.replace("encoderblock_0/", f"encoderblock_{i}/")] for i in range(depth)]
            result[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(parts)
    return result


def prefixed(prefix: str, arrays: Arrays) -> Arrays:
    return {prefix + name: array for name, array in arrays.items()}


def squeezed(arrays: Arrays) -> Arrays:
    return {name: array.reshape(-1) if "gn" in name else array for name, array in arrays.items()}


def with_optimizer(arrays: Arrays) -> Arrays:
    state = {"opt/state/step": np.array(7), "opt/state/param_states/cls/grad_ema": np.zeros((1, 1, 64), np.float32)}
    return prefixed("opt/target/", arrays) | state


def transposed(arrays: Arrays) -> Arrays:
    return {name: np.asfortranarray(array) for name, array in arrays.items()}


GENERATIONS: dict[str, Callable[[Arrays], Arrays]] = {
    "opt/target/ with the optimizer's state": with_optimizer,
    "params/": partial(prefixed, "params/"),
    "Linen": linen,
    "Linen under opt/target/": lambda arrays: prefixed("opt/target/", linen(arrays)),
    "big_vision": big_vision,
    "SigLIP's prefix": lambda arrays: prefixed("params/img/", linen(arrays)) | {"params/t": np.zeros(1, np.float32)},
    "scan": scanned,
    "scan of Linen": lambda arrays: scanned(linen(arrays)),
    "squeezed norms": squeezed,
    "Fortran order": transposed,
    "float64": lambda arrays: {name: array.astype(np.float64) for name, array in arrays.items()},
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_gives_the_same_tensors(generation: str, tmp_path: Path) -> None:
    arrays = random_arrays(vit_shapes(hidden=24, units=(1, 2), patch=1, tokens=17))
    expected = open_weights(write(tmp_path / "a.npz", arrays))
    found = open_weights(write(tmp_path / "b.npz", GENERATIONS[generation](arrays)))
    assert_same(found.state, expected.state)
    assert found.model == expected.model
    assert found.preprocessing == expected.preprocessing


def test_positions_without_the_class_tokens_become_the_same_function(tmp_path: Path) -> None:
    arrays = random_arrays(vit_shapes())
    newer = big_vision(arrays)
    positions = newer["params/pos_embedding"]
    newer["params/cls"] = newer["params/cls"] + positions[:, :1]
    newer["params/pos_embedding"] = positions[:, 1:]
    old, new = open_weights(write(tmp_path / "a.npz", arrays)), open_weights(write(tmp_path / "b.npz", newer))
    assert new.state["pos_embed"].shape == (1, 17, 64)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(run(new, images), run(old, images), atol=1e-5, rtol=1e-5)


def native_bit(arrays: Arrays, *, four_axes: bool) -> Arrays:
    """Rename to big_vision's own names."""
    result = {}
    for name, array in arrays.items():
        name = name.removeprefix("resnet/").replace("gamma", "scale").replace("beta", "bias")
        name = name.replace("root_block/standardized_conv2d", "root_block/conv_root").replace("head/conv2d", "head")
        name = name.replace("a/proj/standardized_conv2d", "conv_proj")
        for number, letter in zip("123", "abc"):
            name = name.replace(f"/{letter}/standardized_conv2d", f"/conv{number}").replace(
                f"/{letter}/group_norm", f"/gn{number}"
            )
        name = name.replace("group_norm", "norm-pre-head")
        if name == "head/kernel":
            array = array[0, 0]
        if four_axes and ("gn" in name or "norm-" in name):
            array = array.reshape(1, 1, 1, -1)
        result[name] = array
    return result


def numbered(arrays: Arrays) -> Arrays:
    """Number the convolutions, as TensorFlow does in some files."""
    return {
        name.replace("standardized_conv2d/", f"standardized_conv2d_{i}/"): array
        for i, (name, array) in enumerate(arrays.items())
    }


@pytest.mark.parametrize(
    "generation",
    [
        partial(native_bit, four_axes=True),
        partial(native_bit, four_axes=False),
        lambda arrays: prefixed("params/", native_bit(arrays, four_axes=True)),
        numbered,
    ],
    ids=["big_vision", "big_vision, squeezed", "params/", "numbered"],
)
def test_both_names_of_a_bit_resnet_give_the_same_tensors(generation: Callable[[Arrays], Arrays], tmp_path: Path) -> None:
    arrays = random_arrays(bit_shapes())
    expected = open_weights(write(tmp_path / "a.npz", arrays))
    found = open_weights(write(tmp_path / "b.npz", generation(arrays)))
    assert_same(found.state, expected.state)
    assert found.model == expected.model
    assert any("224 px assumed" in note for note in found.notes)


def map_head(shapes: Shapes, width: int = 64, heads: int = 4, mlp_dim: int = 48) -> Shapes:
    """Put a MAP head in the class token's place."""
    each = width // heads
    result = {name: shape for name, shape in shapes.items() if name != "cls"} | {"MAPHead_0/probe": (1, 1, width)}
    attention = "MAPHead_0/MultiHeadDotProductAttention_0"
    for part in ("query", "key", "value"):
        result |= {f"{attention}/{part}/kernel": (width, heads, each), f"{attention}/{part}/bias": (heads, each)}
    result |= {f"{attention}/out/kernel": (heads, each, width), f"{attention}/out/bias": (width,)}
    result |= {"MAPHead_0/LayerNorm_0/scale": (width,), "MAPHead_0/LayerNorm_0/bias": (width,)}
    result |= {"MAPHead_0/MlpBlock_0/Dense_0/kernel": (width, mlp_dim), "MAPHead_0/MlpBlock_0/Dense_0/bias": (mlp_dim,)}
    return result | {"MAPHead_0/MlpBlock_0/Dense_1/kernel": (mlp_dim, width), "MAPHead_0/MlpBlock_0/Dense_1/bias": (width,)}


def test_a_map_head_is_found_in_its_place_and_inlined(tmp_path: Path) -> None:
    arrays = random_arrays(map_head(vit_shapes(tokens=16)))
    inlined = {name.removeprefix("MAPHead_0/"): array for name, array in arrays.items()}
    first, second = open_weights(write(tmp_path / "a.npz", arrays)), open_weights(write(tmp_path / "b.npz", linen(inlined)))
    assert first.model["pool"] == "map"
    assert_same(second.state, first.state)


def test_gap_files_have_no_class_token_and_sincos_files_no_positions(tmp_path: Path) -> None:
    shapes = vit_shapes(tokens=16)
    del shapes["cls"]
    gap = open_weights(write(tmp_path / "a.npz", random_arrays(shapes)))
    assert (gap.model["pool"], gap.model["pos_embed"], gap.preprocessing["image_size"]) == ("gap", "learned", [16, 16])
    del shapes["Transformer/posembed_input/pos_embedding"]
    said: list[str] = []
    fixed = open_weights(write(tmp_path / "b.npz", random_arrays(shapes)), say=said.append)
    assert (fixed.model["pos_embed"], fixed.preprocessing["image_size"]) == ("sincos2d", [224, 224])
    assert "sin-cos" in said[0]


def test_bfloat16_leaves_are_read(tmp_path: Path) -> None:
    arrays = random_arrays(vit_shapes())
    halves = {name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}
    expected = open_weights(write(tmp_path / "a.npz", {name: half.float().numpy() for name, half in halves.items()}))
    as_void = {name: half.view(torch.int16).numpy().view("V2") for name, half in halves.items()}
    found = open_weights(write(tmp_path / "b.npz", as_void))
    assert_same(found.state, expected.state)
    assert found.notes == ["stored in bfloat16, read as float32"]
    numbers = {name: array.astype(np.float16) for name, array in arrays.items()}
    assert open_weights(write(tmp_path / "c.npz", numbers)).notes == ["stored in float16, read as float32"]


def test_a_file_without_a_head_gives_features(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in vit_shapes().items() if not name.startswith("head/")}
    found = open_weights(write(tmp_path / "a.npz", random_arrays(shapes)))
    assert found.classes == []
    assert "no head" in found.notes[0]


# ------------------------------------------------------------------------------------------------------------------- judges


def timm_vit(**changes: Any) -> TimmViT:
    settings: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 5}
    numerics = {"mlp_ratio": 0.75, "act_layer": GELUTanh, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    return TimmViT(**{**settings, **numerics, **changes}).eval()


@pytest.mark.parametrize("generation", ["as published", "big_vision", "scan of Linen"])
def test_logits_equal_timms_from_the_same_file(generation: str, tmp_path: Path) -> None:
    arrays = random_arrays(vit_shapes())
    if generation == "scan of Linen":
        arrays = scanned(big_vision(arrays))
    elif generation == "big_vision":
        arrays = big_vision(arrays)
    path = write(tmp_path / "a.npz", arrays)
    theirs = timm_vit()
    theirs.load_pretrained(str(path))
    images = torch.randn(3, 3, 16, 16)
    ours = run(open_weights(path), images)
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs(images).detach(), atol=1e-5, rtol=1e-5)


def test_the_hidden_layer_that_timm_drops_is_kept(tmp_path: Path) -> None:
    arrays = random_arrays(vit_shapes(hidden=24))
    path = write(tmp_path / "a.npz", arrays)
    theirs = timm_vit(num_classes=0)
    theirs.load_pretrained(str(path))
    images = torch.randn(3, 3, 16, 16)
    features = theirs(images).detach().numpy()
    hidden = np.tanh(features @ arrays["pre_logits/kernel"] + arrays["pre_logits/bias"])
    logits = hidden @ arrays["head/kernel"] + arrays["head/bias"]
    np.testing.assert_allclose(run(open_weights(path), images).numpy(), logits, atol=1e-5)


def for_transformers(arrays: Arrays) -> dict[str, Tensor]:
    """Rename and turn a file's arrays into transformers' ViTModel, whose pooler is the hidden layer."""

    def dense(kernel: NDArray[Any], rows: int) -> NDArray[Any]:
        return kernel.reshape(rows, -1).T

    result = {
        "embeddings.cls_token": arrays["cls"],
        "embeddings.position_embeddings": arrays["Transformer/posembed_input/pos_embedding"],
        "embeddings.patch_embeddings.projection.weight": arrays["embedding/kernel"].transpose(3, 2, 0, 1),
        "embeddings.patch_embeddings.projection.bias": arrays["embedding/bias"],
        "layernorm.weight": arrays["Transformer/encoder_norm/scale"],
        "layernorm.bias": arrays["Transformer/encoder_norm/bias"],
        "pooler.dense.weight": arrays["pre_logits/kernel"].T,
        "pooler.dense.bias": arrays["pre_logits/bias"],
    }
    for i in range(2):
        ours, theirs = f"layers.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for short, part, rows in (("q", "query", 64), ("k", "key", 64), ("v", "value", 64), ("o", "out", 64)):
            result[f"{ours}.attention.{short}_proj.weight"] = dense(arrays[f"{attention}/{part}/kernel"], rows)
            result[f"{ours}.attention.{short}_proj.bias"] = arrays[f"{attention}/{part}/bias"].reshape(-1)
        for norm, place in (("LayerNorm_0", "before"), ("LayerNorm_2", "after")):
            result[f"{ours}.layernorm_{place}.weight"] = arrays[f"{theirs}/{norm}/scale"]
            result[f"{ours}.layernorm_{place}.bias"] = arrays[f"{theirs}/{norm}/bias"]
        for number in (0, 1):
            result[f"{ours}.mlp.fc{number + 1}.weight"] = arrays[f"{theirs}/MlpBlock_3/Dense_{number}/kernel"].T
            result[f"{ours}.mlp.fc{number + 1}.bias"] = arrays[f"{theirs}/MlpBlock_3/Dense_{number}/bias"]
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in result.items()}


def test_hidden_layer_and_logits_equal_those_of_transformers(tmp_path: Path) -> None:
    arrays = random_arrays(vit_shapes(hidden=24))
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    numerics = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "pooler_output_size": 24, "pooler_act": "tanh"}
    theirs = ViTModel(ViTConfig(image_size=16, patch_size=4, **sizes, **numerics)).eval()
    theirs.load_state_dict(for_transformers(arrays))
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        hidden = theirs(images).pooler_output
    logits = hidden @ torch.from_numpy(arrays["head/kernel"]) + torch.from_numpy(arrays["head/bias"])
    ours = run(open_weights(write(tmp_path / "a.npz", arrays)), images)
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["map", "gap"])
def test_other_pooling_equals_timms(pool: str, tmp_path: Path) -> None:
    shapes = vit_shapes(tokens=16)
    del shapes["cls"]
    path = write(tmp_path / "a.npz", big_vision(random_arrays(map_head(shapes) if pool == "map" else shapes)))
    theirs = timm_vit(class_token=False, global_pool="map" if pool == "map" else "avg", fc_norm=False)
    theirs.load_pretrained(str(path))
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(run(open_weights(path), images), theirs(images).detach(), atol=1e-5, rtol=1e-5)


def test_a_hybrid_equals_timms(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", random_arrays(vit_shapes(units=(1, 2), patch=1, tokens=17)))
    norm = partial(resnetv2.GroupNormAct, num_groups=32, eps=1e-6)
    stem = {"preact": False, "stem_type": "same", "conv_layer": partial(StdConv2dSame, eps=1e-8), "norm_layer": norm}
    backbone = resnetv2.ResNetV2([1, 2], channels=(128, 256), stem_chs=32, num_classes=0, global_pool="", **stem)
    theirs = timm_vit(img_size=32, patch_size=1, embed_layer=partial(HybridEmbed, backbone=backbone))
    theirs.load_pretrained(str(path))
    images = torch.randn(3, 3, 32, 32)
    found = open_weights(path)
    assert found.preprocessing["image_size"] == [32, 32]
    ours = run(found, images, weight_standardisation="timm")
    torch.testing.assert_close(ours, theirs(images).detach(), atol=1e-5, rtol=1e-5)
    # as published the divisor is std + 1e-5; that is another function only in the last places
    torch.testing.assert_close(run(found, images), ours, atol=1e-2, rtol=1e-2)


def test_a_bit_resnet_equals_timms(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", random_arrays(bit_shapes()))
    layers = {"conv_layer": partial(StdConv2d, eps=1e-10), "stem_type": "fixed"}
    theirs = resnetv2.ResNetV2([1, 2], channels=(128, 256), stem_chs=32, num_classes=5, **layers).eval()
    theirs.load_pretrained(str(path))
    images = torch.randn(2, 3, 224, 224)
    found = open_weights(path)
    torch.testing.assert_close(run(found, images), theirs(images).detach(), atol=1e-4, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ writing


MODELS: dict[str, Shapes] = {
    "ViT with a hidden layer": vit_shapes(hidden=24),
    "hybrid": vit_shapes(units=(1, 2), patch=1),
    "stem of a root alone": vit_shapes(units=(), patch=2, tokens=17),
    "BiT": bit_shapes(),
    "MAP": map_head(vit_shapes(tokens=16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_was_read(name: str, tmp_path: Path) -> None:
    arrays = random_arrays(MODELS[name])
    found = open_weights(write(tmp_path / "a.npz", arrays))
    write_official(found, tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as written:
        assert set(written.files) == set(arrays)
        for leaf, array in arrays.items():
            assert written[leaf].shape == array.shape
            assert np.array_equal(written[leaf], array), leaf
    assert_same(open_weights(tmp_path / "b.npz").state, found.state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_timm_reads_what_we_write(tmp_path: Path) -> None:
    torch.manual_seed(0)
    section = resolve_model(ModelConfig(width=64, depth=2, mlp_dim=48, num_heads=4, patch_size=4))
    model = build_model(section, image_size=(16, 16), num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    found = open_weights(write(tmp_path / "a.npz", random_arrays(vit_shapes())))
    own = Pretrained(**{**vars(found), "state": model.state_dict(), "model": section.model_dump(mode="json")})
    write_official(own, tmp_path / "b.npz")
    theirs = timm_vit()
    theirs.load_pretrained(str(tmp_path / "b.npz"))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), theirs(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "image_size", "message"),
    [
        ({"gelu": "exact"}, [16, 16], "model.gelu is exact, and an official .npz always means tanh"),
        ({"layer_norm_eps": 1e-5}, [16, 16], "model.layer_norm_eps is 1e-05"),
        ({"registers": 2}, [16, 16], "model.registers is 2"),
        ({"pos_embed": "none"}, [16, 16], "model.pos_embed is none"),
        ({}, [8, 32], "not square"),
        ({"representation_size": 12}, [16, 16], "pre_logits.bias, pre_logits.weight: not as the model's settings say"),
    ],
)
def test_what_such_a_file_cannot_say_is_not_written(
    changes: dict[str, Any], image_size: list[int], message: str, tmp_path: Path
) -> None:
    found = open_weights(write(tmp_path / "a.npz", random_arrays(vit_shapes())))
    about = {"model": {**found.model, **changes}, "preprocessing": {**found.preprocessing, "image_size": image_size}}
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        write_official(Pretrained(**{**vars(found), **about}), tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()


# ------------------------------------------------------------------------------------------------------------------- faults

Q = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"


def without(name: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {key: array for key, array in arrays.items() if key != name}


def replaced(name: str, shape: tuple[int, ...]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("hurt", "message"),
    [
        (without("cls"), "positions? .*|missing|no square"),
        (without("head/bias"), "it has no head/bias"),
        (without(Q), f"1 missing: {Q}"),
        (without("Transformer/encoderblock_0/LayerNorm_0/scale"), "1 missing: Transformer/encoderblock_0/LayerNorm_0/scale"),
        (without("Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"), "it has no Transformer/encoderblock_0/MlpBlock_3"),
        (replaced("Transformer/encoderblock_1/LayerNorm_9/scale", (64,)), "1 unknown: .*LayerNorm_9/scale"),
        (replaced("Transformer/encoderblock_5/LayerNorm_0/scale", (64,)), "missing: .* and "),
        (replaced("Transformer/encoderblock_987654/LayerNorm_0/scale", (64,)), "depth: "),
        (replaced("Transformer/encoderblock_1/LayerNorm_1/scale", (64,)), "twice, by names of two generations"),
        (replaced(Q, (64, 2, 32)), r"1 of another shape: .*\(64, 2, 32\) where \(64, 4, 16\) belongs"),
        (
            replaced("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel", (64, 3, 20)),
            "another shape|divide",
        ),
        (replaced("embedding/kernel", (4, 4, 1, 64)), r"of another shape: embedding/kernel \(4, 4, 1, 64\)"),
        (replaced("embedding/kernel", (48, 64)), "expected 4 axes"),
        (replaced("embedding/kernel", (4, 2, 3, 64)), "expected square ones"),
        (replaced("embedding/kernel", (4, 4, 3, 0)), "expected 4 axes"),
        (replaced("Transformer/posembed_input/pos_embedding", (1, 19, 64)), "no square grid"),
        (replaced("Transformer/encoderblock/LayerNorm_0/scale", ()), "scan layout"),
        (replaced("head/bias", ()), "expected 1 axes"),
    ],
)
def test_damage_is_one_line_that_names_it(hurt: Callable[[Arrays], Arrays], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", hurt(random_arrays(vit_shapes())))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_weights(path)
    assert str(caught.value).startswith(f"{path}: looks like one of the authors' .npz files, but ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("hurt", "message"),
    [
        (without("resnet/block2/unit02/b/standardized_conv2d/kernel"), "1 missing: resnet/block2/unit02/b/"),
        (without("resnet/group_norm/gamma"), "1 missing: resnet/group_norm/gamma"),
        (lambda arrays: {k: v for k, v in arrays.items() if "block1" not in k}, r"blocks are \[2\]; expected 1 to 2"),
        (replaced("resnet/root_block/standardized_conv2d/kernel", (5, 5, 3, 32)), "root is 5 x 5"),
        (replaced("resnet/root_block/standardized_conv2d/kernel", (7, 7, 3, 64)), "of another shape"),
    ],
)
def test_a_damaged_resnet_is_one_line_too(hurt: Callable[[Arrays], Arrays], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_weights(write(tmp_path / "a.npz", hurt(random_arrays(bit_shapes()))))
    assert "\n" not in str(caught.value)
