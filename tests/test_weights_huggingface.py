"""Hugging Face's layouts, against transformers' own models, saved and loaded by transformers."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitBackbone,
    BitConfig,
    BitForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from tests.oracles import TOLERANCE, difference, our_model, our_weights, randomise, same_tensors
from vitcli.data.transforms import EvalTransform, normalise
from vitcli.errors import CheckpointError
from vitcli.weights.huggingface import (
    export_huggingface,
    huggingface_config,
    huggingface_differences,
    huggingface_preprocessor,
)
from vitcli.weights.open import open_weights

SMALL = dict(
    hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=150, image_size=32, patch_size=8, num_labels=7
)
BIT = dict(embedding_size=32, hidden_sizes=[128, 256, 512], depths=[1, 2, 1], num_labels=7)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def test_logits_of_every_variant_equal_transformers(tmp_path):
    variants: list[dict[str, Any]] = [
        {},
        {"image_size": 48},
        {"image_size": [32, 48]},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu_new"},
        {"layer_norm_eps": 1e-2},
        {"qkv_bias": False},
    ]
    for number, changes in enumerate(variants):
        theirs = randomise(ViTForImageClassification(ViTConfig(**SMALL | changes)))
        folder = tmp_path / str(number)
        theirs.save_pretrained(folder)
        read = open_weights(folder)
        assert difference(read, lambda images: theirs(images).logits) < TOLERANCE, changes  # noqa: B023 (called at once)
        assert read.model["layer_norm_eps"] == changes.get("layer_norm_eps", 1e-12)
        assert read.model["gelu"] == ("tanh" if "hidden_act" in changes else "exact")
        assert read.classes == list("0123456") and not read.named
        assert any("preprocessor_config.json" in note for note in read.notes)


@pytest.mark.parametrize("form", ["bin", "sharded", "in memory", "bare"])
def test_every_form_of_file_is_read(tmp_path, form):
    changes = {"hidden_size": 192} if form == "bare" else {}  # 3 heads of 64, which is what is assumed
    theirs = randomise(ViTForImageClassification(ViTConfig(**SMALL | changes)))
    if form == "sharded":
        theirs.save_pretrained(tmp_path, max_shard_size="200KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
        path = tmp_path
    else:
        theirs.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        path = tmp_path / "pytorch_model.bin"
        if form == "in memory":  # as transformers 5 names them
            state = dict(theirs.state_dict())
            assert any(".q_proj." in name for name in state)
        torch.save(state, path)
        path = tmp_path if form == "bin" else path
        if form == "bare":
            (tmp_path / "config.json").unlink()
    read = open_weights(path)
    assert difference(read, lambda images: theirs(images).logits) < TOLERANCE
    assert any("no config.json" in note for note in read.notes) == (form == "bare")


def test_a_model_without_a_head_keeps_its_pooler(tmp_path):
    theirs = randomise(ViTModel(ViTConfig(**SMALL)))
    theirs.save_pretrained(tmp_path)
    read = open_weights(tmp_path)
    assert read.classes == [] and any("no head" in note for note in read.notes)
    assert read.model["representation_size"] == 96

    head = torch.zeros(7, 96)  # for the comparison
    read.state.update({"head.weight": head, "head.bias": head[:, 0]})
    read.classes.extend("0123456")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(our_model(read).features(images), theirs(images).pooler_output, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("image_size", [32, 48])
@pytest.mark.parametrize("kind", [DeiTForImageClassification, DeiTForImageClassificationWithTeacher])
def test_logits_of_deits_equal_transformers(tmp_path, kind, image_size):
    theirs = randomise(kind(DeiTConfig(**SMALL | {"image_size": image_size})))
    theirs.save_pretrained(tmp_path)
    read = open_weights(tmp_path)
    both = kind is DeiTForImageClassificationWithTeacher
    assert difference(read, lambda images: theirs(images).logits) < TOLERANCE
    assert (read.model["registers"], read.model["distill_token"]) == ((0, True) if both else (1, False))


@pytest.mark.parametrize("image_size", [64, 96])
def test_logits_of_bit_equal_transformers(tmp_path, image_size):
    theirs = randomise(BitForImageClassification(BitConfig(**BIT)))
    theirs.save_pretrained(tmp_path)
    processor = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, "do_center_crop": True}))
    read = open_weights(tmp_path)
    assert read.preprocessing["image_size"] == [image_size, image_size] and read.preprocessing["eval_crop_fraction"] == 1.0
    assert difference(read, lambda images: theirs(images).logits) < TOLERANCE


def test_logits_of_a_hybrid_equal_its_parts_in_transformers(tmp_path):
    """ViTHybrid left transformers with version 5; its parts, the BiT backbone and the ViT, are there still."""
    stem = BitConfig(
        embedding_size=64, hidden_sizes=[256, 512], depths=[1, 2], layer_type="bottleneck", global_padding="same",
        embedding_dynamic_padding=True, out_features=["stage2"],
    )  # fmt: skip
    backbone = randomise(BitBackbone(stem))
    vit = randomise(ViTForImageClassification(ViTConfig(**SMALL | {"image_size": 4, "patch_size": 1, "num_channels": 512})))
    vit.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state |= {f"vit.embeddings.patch_embeddings.backbone.{name}": value for name, value in backbone.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "vit-hybrid", "image_size": 32, "backbone_config": stem.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = open_weights(tmp_path)
    assert difference(read, lambda images: vit(backbone(images).feature_maps[0]).logits) < TOLERANCE


# --------------------------------------------------------------------------------------------------------- what is said


def test_names_and_preprocessing_come_from_the_files_beside(tmp_path):
    names = dict(enumerate([*"abcdef", "a"]))
    ViTForImageClassification(ViTConfig(**SMALL, id2label=names)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(
        tmp_path
    )
    read = open_weights(tmp_path)
    assert read.classes == [*"abcdef", "a (6)"] and read.named
    assert read.preprocessing == {
        "image_size": [32, 32],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "eval_crop_fraction": None,
    }
    assert read.notes == []


@pytest.mark.parametrize(
    ("settings", "mean", "std", "share"),
    [
        ({}, [0.5] * 3, [0.5] * 3, None),
        ({"do_normalize": False}, [0.0] * 3, [1.0] * 3, None),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, [0.5] * 3, [0.5] * 3, None),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}, [0.5] * 3, [0.5] * 3, None),
        ({"size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, [0.5] * 3, [0.5] * 3, None),
        ({"do_center_crop": True, "size": {"shortest_edge": 40}, "crop_size": 32}, [0.5] * 3, [0.5] * 3, 0.8),
    ],
)
def test_every_way_to_say_a_preprocessing(tmp_path, settings, mean, std, share):
    ViTForImageClassification(ViTConfig(**SMALL)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    if settings:
        found = open_weights(tmp_path).preprocessing
        assert found["mean"] == pytest.approx(mean) and found["std"] == pytest.approx(std)
        assert found["eval_crop_fraction"] == share


def test_another_interpolation_is_said(tmp_path):
    DeiTForImageClassification(DeiTConfig(**SMALL)).save_pretrained(tmp_path)
    DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    read = open_weights(tmp_path)
    assert read.preprocessing["eval_crop_fraction"] == 0.8 and any("interpolation" in note for note in read.notes)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state, config: config.update(hidden_act="quick_gelu"), "quick_gelu"),
        (lambda state, config: config.update(num_attention_heads=5), "5"),
        (lambda state, config: state.pop("vit.encoder.layer.1.attention.attention.key.bias"), "blocks.1.attn.qkv.bias"),
        (lambda state, config: state.update({"decoder.weight": torch.zeros(3)}), "decoder.weight"),
        (lambda state, config: state.update({"vit.layernorm.weight": torch.zeros(3)}), r"norm.weight \(3,\)"),
        (lambda state, config: state.update({"vit.embeddings.position_embeddings": torch.zeros(1, 12, 96)}), "no square"),
        (
            lambda state, config: state.update({"vit.encoder.layer.0.attention.attention.key.weight": torch.zeros(3)}),
            "key.weight",
        ),
    ],
)
def test_what_ours_cannot_be_is_refused_in_words(tmp_path, spoil, words):
    ViTForImageClassification(ViTConfig(**SMALL)).save_pretrained(tmp_path)
    state, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    spoil(state, config)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        open_weights(tmp_path)


@pytest.mark.parametrize("changes", [{"global_padding": "same"}, {"output_stride": 8}, {"layer_type": "bottleneck"}])
def test_a_bit_that_computes_otherwise_is_refused(tmp_path, changes):
    BitForImageClassification(BitConfig(**BIT, **changes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        open_weights(tmp_path)


# --------------------------------------------------------------------------------------------------------------- writing


def write(pretrained, folder):
    """Write what `vit convert` writes for Hugging Face."""
    save_file(export_huggingface(pretrained), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(huggingface_config(pretrained)))
    (folder / "preprocessor_config.json").write_text(json.dumps(huggingface_preprocessor(pretrained)))
    return folder


EXPORTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact": {"gelu": "exact", "layer_norm_eps": 1e-12},
    "not square": {},
    "one register": {"registers": 1},
    "distilled": {"distill_token": True},
    "sincos2d": {"pos_embed": "sincos2d"},
    "learned2d": {"pos_embed": "learned2d"},
    "none": {"pos_embed": "none"},
    "bit": {"kind": "resnet", "resnet_units": [1, 2], "resnet_width": 32, "weight_standardisation": "timm"},
}


@pytest.mark.parametrize("name", EXPORTS)
def test_auto_model_loads_exported_weights(tmp_path, name):
    section = EXPORTS[name]
    if "kind" not in section:
        section = {"patch_size": 8, "width": 96, "depth": 2, "num_heads": 3, "mlp_dim": 150} | section
    ours = our_weights((32, 48) if name == "not square" else (32, 32), **section)
    if name == "not square":
        ours.preprocessing["eval_crop_fraction"] = None
    theirs, report = AutoModelForImageClassification.from_pretrained(write(ours, tmp_path), output_loading_info=True)
    assert not any(report.values()), report
    assert difference(ours, lambda images: theirs.eval()(images).logits) < TOLERANCE
    assert theirs.config.id2label[3] == "class 3"

    back = open_weights(tmp_path)
    assert back.classes == ours.classes and back.named
    assert back.preprocessing == ours.preprocessing and back.notes == []
    if section.get("pos_embed") is None:
        assert same_tensors(ours, back)
        assert {**back.model, "group_norm_eps": None} == ours.model
    assert huggingface_differences(ours) == []


@pytest.mark.parametrize("share", [None, 0.8])
def test_the_exported_processor_prepares_images_as_ours(tmp_path, share):
    ours = our_weights((32, 32), patch_size=8, width=64, depth=1, num_heads=2)
    ours.preprocessing["eval_crop_fraction"] = share
    processor = AutoImageProcessor.from_pretrained(write(ours, tmp_path))
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)).resize(
        (135, 90), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(smooth)
    expected = normalise(
        EvalTransform(image_size=(32, 32), crop_fraction=share)([pixels]), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)
    )
    found = processor(smooth, return_tensors="pt")["pixel_values"]
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.02  # a grey level is about 0.015
    assert (found - expected).abs().max() < 0.1
    assert expected.std() > 0.5


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"pool": "gap"}, "class token"),
        ({"registers": 2}, "registers"),
        ({"registers": 1, "distill_token": True}, "registers"),
        ({"layer_scale": 0.1}, "LayerScale"),
        ({"qk_norm": True}, "queries and keys"),
        ({"representation_size": 24}, "pre_logits"),
        ({"pos_embed": "relative"}, "relative positions"),
        ({"resnet_units": [1], "resnet_width": 32, "patch_size": 4}, "ResNet before"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_hugging_face_has_not_is_refused(section, words):
    ours = our_weights((32, 32), **{"patch_size": 8, "width": 64, "depth": 1, "num_heads": 2} | section)
    for export in (export_huggingface, huggingface_config, huggingface_preprocessor):
        with pytest.raises(CheckpointError, match=f"Hugging Face.*{words}"):
            export(ours)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "depth", "heads", "patch"), [(384, 12, 6, 32), (768, 12, 12, 16), (1024, 24, 16, 32)])
@pytest.mark.parametrize("image_size", [224, 96])
def test_full_sizes(tmp_path, width, depth, heads, patch, image_size):
    sizes = dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width)
    config = ViTConfig(**sizes, patch_size=patch, image_size=image_size, num_labels=1000)
    theirs = randomise(ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    assert difference(open_weights(tmp_path), lambda images: theirs(images).logits) < TOLERANCE
