"""timm's layouts, against timm's own models, saved by timm's own saver."""

import inspect
import json
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import HybridEmbed, StdConv2d, StdConv2dSame
from timm.models import save_for_hf
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
from timm.models.vision_transformer import VisionTransformer

from tests.oracles import TOLERANCE, difference, our_model, our_weights, randomise, same_tensors
from vitcli.errors import CheckpointError
from vitcli.weights.open import open_weights
from vitcli.weights.timm import TANH_MODELS, export_timm, timm_config, timm_differences

SMALL = dict(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=7, mlp_ratio=1.5)


def save(model, folder, **config):
    """Save as timm does for its hub: weights and config.json."""
    save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return folder


def created(**arguments):
    """Build by timm's factory, which keeps the arguments for config.json."""
    return randomise(timm.create_model("vit_base_patch16_224", **SMALL | arguments))


# --------------------------------------------------------------------------------------------------------------- reading


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "48 px": {"img_size": 48},
    "not square": {"img_size": (32, 48)},
    "average": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "average beside a class token": {"global_pool": "avg", "fc_norm": False},
    "norm of one token": {"fc_norm": True},
    "map": {"global_pool": "map", "class_token": False},
    "map beside a class token": {"global_pool": "map"},
    "registers": {"reg_tokens": 3},
    "registers without positions": {"reg_tokens": 4, "no_embed_class": True},
    "registers, average": {"reg_tokens": 4, "no_embed_class": True, "global_pool": "avg", "fc_norm": False},
    "class token without position": {"no_embed_class": True},
    "no positions": {"pos_embed": "none"},
    "layer scale": {"init_values": 0.1},
    "qk norm": {"qk_norm": True},
    "tanh": {"act_layer": "gelu_tanh"},
    "no bias": {"qkv_bias": False},
}


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_timms(tmp_path, arguments):
    theirs = created(**arguments)
    read = open_weights(save(theirs, tmp_path))
    assert difference(read, theirs) < TOLERANCE
    assert read.model["gelu"] == ("tanh" if "act_layer" in arguments else "exact")
    assert read.model["layer_norm_eps"] == 1e-6


@pytest.mark.parametrize("name", ["plain", "48 px", "map", "registers without positions", "layer scale", "qk norm"])
def test_a_bare_file_is_read_by_what_its_tensors_tell(tmp_path, name):
    theirs = created(**VARIANTS[name])
    torch.save({"state_dict": {f"module.{key}": value for key, value in theirs.state_dict().items()}}, tmp_path / "x.pth.tar")
    read = open_weights(tmp_path / "x.pth.tar")
    assert difference(read, theirs) < TOLERANCE
    assert any("no config.json" in note for note in read.notes) and any("preprocessing" in note for note in read.notes)
    assert read.preprocessing["mean"] == [0.5] * 3 and read.preprocessing["eval_crop_fraction"] is None


def test_averaged_weights_are_preferred(tmp_path):
    first, averaged = created(), randomise(created(), seed=9)
    torch.save({"state_dict": first.state_dict(), "state_dict_ema": averaged.state_dict(), "epoch": 2}, tmp_path / "x.pth")
    read = open_weights(tmp_path / "x.pth")
    assert difference(read, averaged) < TOLERANCE
    assert read.is_ema


def test_the_config_beside_says_preprocessing_and_names(tmp_path):
    theirs = created()
    theirs.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.95, "crop_mode": "center"}
    read = open_weights(save(theirs, tmp_path, label_names=[*"abcdef", "a"]))
    assert read.preprocessing == {
        "image_size": [32, 32],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "eval_crop_fraction": 0.95,
    }
    assert read.classes == [*"abcdef", "a (6)"] and read.named
    assert read.manifest["source"] == "vit_base_patch16_224" and read.manifest["format"] == "timm"
    assert any("bicubic" in note for note in read.notes)


@pytest.mark.parametrize("image_size", [32, 48])
def test_a_distilled_deit_gives_the_mean_of_both_heads(tmp_path, image_size):
    theirs = randomise(VisionTransformerDistilled(**SMALL | {"img_size": image_size}))
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit.pth")  # as Facebook's files are
    read = open_weights(tmp_path / "deit.pth")
    assert difference(read, theirs) < 1e-5
    theirs.set_distilled_training()
    ours, images = our_model(read), torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images, apart=True), torch.stack(theirs.train()(images), dim=1), atol=1e-5, rtol=0)
        assert (ours(images) - ours(images, apart=True)[:, 0]).abs().max() > 0.1  # a head alone would show
    assert read.model["distill_token"] and read.model["registers"] == 0
    assert read.preprocessing["mean"] == [0.485, 0.456, 0.406]


def test_a_distillation_token_without_both_heads_is_a_register(tmp_path):
    theirs = randomise(VisionTransformerDistilled(**SMALL))
    state = theirs.state_dict()
    del state["head_dist.weight"], state["head_dist.bias"]
    torch.save(state, tmp_path / "deit.pth")
    read = open_weights(tmp_path / "deit.pth")
    assert difference(read, lambda images: theirs.head(theirs.forward_features(images)[:, 0])) < 1e-5
    assert read.model["registers"] == 1 and not read.model["distill_token"]


def test_a_distilled_deit_without_heads_is_read(tmp_path):
    theirs = randomise(VisionTransformerDistilled(**SMALL | {"num_classes": 0}))
    torch.save(theirs.state_dict(), tmp_path / "deit.pth")
    read = open_weights(tmp_path / "deit.pth")
    assert read.classes == [] and read.model["distill_token"] and difference(read, theirs) < 1e-5


def test_deit_3s_and_dinov2s_own_names_are_read(tmp_path):
    theirs = created(init_values=0.1, reg_tokens=4, no_embed_class=True)
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2").replace("reg_token", "register_tokens"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    assert "blocks.1.gamma_2" in state
    torch.save({**state, "mask_token": torch.zeros(1, 128)}, tmp_path / "weights.pth")
    read = open_weights(tmp_path / "weights.pth")
    assert difference(read, theirs) < TOLERANCE
    assert any("mask_token" in note for note in read.notes)


def test_without_a_head_the_rest_is_read(tmp_path):
    read = open_weights(save(created(num_classes=0), tmp_path))
    assert read.classes == [] and not read.named and "head.weight" not in read.state
    assert any("no head" in note for note in read.notes)


def hybrid(units, image_size):
    """Build as timm's vision_transformer_hybrid does, with any units."""
    conv = partial(StdConv2dSame, eps=1e-8)
    if units:
        channels = [256 * 2**stage for stage in range(len(units))]
        backbone = ResNetV2(
            layers=units, channels=channels, num_classes=0, global_pool="", preact=False, stem_type="same", conv_layer=conv
        )
    else:
        backbone = create_resnetv2_stem(3, stem_type="same", preact=False, conv_layer=conv)
    embed = partial(HybridEmbed, backbone=backbone)
    arguments = SMALL | {"img_size": image_size, "patch_size": 1 if units else 8}
    return randomise(VisionTransformer(**arguments, embed_layer=embed))


@pytest.mark.parametrize(
    ("units", "image_size"), [((1, 2), 32), ((1, 2), (48, 32)), ((), 64), ((1, 1, 1), 64), ((2, 1, 1, 1), 96)]
)
def test_logits_of_hybrids_equal_timms(tmp_path, units, image_size):
    theirs = hybrid(units, image_size)
    torch.save(theirs.state_dict(), tmp_path / "hybrid.pth")
    if isinstance(image_size, tuple):
        config = {"architecture": "vit_some_r", "pretrained_cfg": {"input_size": [3, *image_size]}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    read = open_weights(tmp_path / "hybrid.pth")
    assert difference(read, theirs) < TOLERANCE
    assert read.model["weight_standardisation"] == "timm" and read.model["group_norm_eps"] == 1e-5
    assert tuple(read.model["resnet_units"]) == units


@pytest.mark.parametrize(
    ("units", "factor", "image_size"), [((1, 2), 1, 64), pytest.param((1, 1, 1, 1), 2, 224, marks=pytest.mark.slow)]
)
def test_logits_of_resnets_equal_timms(tmp_path, units, factor, image_size):
    theirs = randomise(
        ResNetV2(
            layers=units,
            channels=[256 * 2**stage for stage in range(len(units))],
            width_factor=factor,
            num_classes=7,
            stem_type="fixed",
            conv_layer=partial(StdConv2d, eps=1e-8),
        )
    )
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    if image_size != 224:  # which is assumed
        config = {"architecture": "resnetv2", "pretrained_cfg": {"input_size": [3, image_size, image_size]}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    read = open_weights(tmp_path / "resnet.pth")
    assert difference(read, theirs) < TOLERANCE
    assert read.model["resnet_width"] == 64 * factor


def test_the_models_with_tanh_are_those_of_timm():
    for name in timm.list_models("vit_*siglip*"):
        source = inspect.getsource(timm.model_entrypoint(name))
        assert bool(TANH_MODELS.search(name)) == ("gelu_tanh" in source), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"global_pool": "avg"}, "fc_norm"),
        ({"global_pool": "max", "fc_norm": False}, "'max'"),
        ({"act_layer": "quick_gelu"}, "'quick_gelu'"),
        ({"pre_norm": True}, "norm_pre.weight"),
        ({"scale_mlp_norm": True}, "mlp.norm.weight"),
        ({"norm_layer": "rmsnorm"}, "'rmsnorm'"),
        ({"in_chans": 1}, "of another shape: patch_embed.proj.weight"),
        ({"embed_dim": 100}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_ours_cannot_be_is_refused_in_words(tmp_path, arguments, words):
    theirs = timm.create_model("vit_base_patch16_224", **SMALL | arguments)
    save(theirs, tmp_path)
    if words is None:  # the number of heads is in the config alone
        (tmp_path / "config.json").unlink()
        words = "attention heads"
    with pytest.raises(CheckpointError, match=words):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.pop("blocks.1.attn.proj.bias"), "1 missing: blocks.1.attn.proj.bias"),
        (lambda state: state.update({"decoder.weight": torch.zeros(3)}), "decoder.weight"),
        (lambda state: state.update({"cls_token": torch.zeros(1, 1, 64)}), "another width"),
        (lambda state: state.update({"cls_token": torch.zeros(64)}), "position embeddings|shape"),
        (lambda state: state.update({"norm.weight": torch.zeros(3)}), r"norm.weight \(3,\)"),
        (lambda state: state.update({"blocks.0.mlp.fc1.weight": torch.zeros(())}), "mlp_dim"),
        (lambda state: state.update({"patch_embed.proj.weight": torch.zeros(128, 3, 0, 0)}), "patch embedding"),
        (lambda state: state.update({"pos_embed": torch.zeros(1, 12, 128)}), "no square"),
    ],
)
def test_other_tensors_are_refused_with_their_names(tmp_path, spoil, words):
    state = dict(created().state_dict())
    spoil(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=words):
        open_weights(tmp_path / "weights.pth")


def test_a_broken_config_is_named(tmp_path):
    save(created(), tmp_path)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(CheckpointError, match=r"config\.json: no JSON object"):
        open_weights(tmp_path)


# --------------------------------------------------------------------------------------------------------------- writing


def write(pretrained, folder):
    """Write what `vit convert` writes for timm."""
    from safetensors.torch import save_file

    save_file(export_timm(pretrained), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(timm_config(pretrained)))
    return folder


EXPORTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact": {"gelu": "exact"},
    "not square": {},
    "gap": {"pool": "gap"},
    "map": {"pool": "map"},
    "registers": {"registers": 3},
    "gap with registers": {"pool": "gap", "registers": 2},
    "sincos2d": {"pos_embed": "sincos2d"},
    "learned2d": {"pos_embed": "learned2d"},
    "learned2d gap": {"pos_embed": "learned2d", "pool": "gap"},
    "none": {"pos_embed": "none"},
    "layer scale": {"layer_scale": 0.25},
    "qk norm": {"qk_norm": True},
    "odd mlp": {"mlp_dim": 83},
    "distilled": {"distill_token": True, "layer_scale": 0.1},
    "distilled, sin-cos": {"distill_token": True, "pos_embed": "sincos2d"},
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_weights_are_timms(tmp_path, name):
    section = {"patch_size": 8, "width": 128, "depth": 2, "num_heads": 2, "mlp_dim": 200} | EXPORTS[name]
    ours = our_weights((32, 48) if name == "not square" else (32, 32), **section)
    theirs = timm.create_model(f"local-dir:{write(ours, tmp_path)}", pretrained=True).eval()
    assert difference(ours, theirs) < TOLERANCE
    back = open_weights(tmp_path)
    assert back.classes == ours.classes and back.named and back.preprocessing == ours.preprocessing
    if section.get("pos_embed") not in ("sincos2d", "learned2d"):  # which timm has as learned ones
        assert same_tensors(ours, back)
        assert back.model == ours.model
    assert timm_differences(ours) == []


@pytest.mark.parametrize(
    "section",
    [
        {"resnet_units": [], "patch_size": 8},
        pytest.param({"resnet_units": [2, 2, 2, 2], "patch_size": 1}, marks=pytest.mark.slow),
    ],
    ids=["root", "R26"],
)
def test_exported_hybrids_are_timms(tmp_path, section):
    sizes = {"width": 64, "depth": 1, "num_heads": 2, "mlp_dim": 100, "weight_standardisation": "timm", "group_norm_eps": 1e-5}
    ours = our_weights((64, 64), **sizes | section)
    theirs = timm.create_model(f"local-dir:{write(ours, tmp_path)}", pretrained=True).eval()
    assert difference(ours, theirs) < TOLERANCE
    assert same_tensors(ours, open_weights(tmp_path)) and timm_differences(ours) == []
    assert len(timm_differences(our_weights((64, 64), **{"width": 64, "depth": 1, "num_heads": 2} | section))) == 2


@pytest.mark.slow
def test_an_exported_resnet_is_timms(tmp_path):
    ours = our_weights((64, 64), variant="R50x1", weight_standardisation="timm")
    theirs = timm.create_model(f"local-dir:{write(ours, tmp_path)}", pretrained=True).eval()
    assert difference(ours, theirs) < TOLERANCE
    assert same_tensors(ours, open_weights(tmp_path)) and timm_differences(ours) == []


def test_transformers_loads_a_folder_of_timms_too(tmp_path, monkeypatch):
    from transformers import AutoModelForImageClassification

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ours = our_weights((32, 32), patch_size=8, width=64, depth=1, num_heads=2, pool="gap")
    (tmp_path / "timm").mkdir()
    theirs = AutoModelForImageClassification.from_pretrained(write(ours, tmp_path / "timm")).eval()
    assert difference(ours, lambda images: theirs(images).logits) < TOLERANCE

    theirs.save_pretrained(tmp_path / "again")  # with a wrapper's prefix
    again = open_weights(tmp_path / "again")
    assert same_tensors(ours, again) and again.model == ours.model and again.classes == ours.classes


def test_timm_prepares_images_as_told(tmp_path):
    write(our_weights((32, 32), patch_size=8, width=64, depth=1, num_heads=2), tmp_path)
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    assert data["input_size"] == (3, 32, 32) and data["crop_pct"] == 0.8 and data["crop_mode"] == "center"
    assert tuple(data["mean"]) == (0.4, 0.5, 0.6) and tuple(data["std"]) == (0.2, 0.25, 0.3)
    assert data["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"representation_size": 24}, "pre_logits"),
        ({"pos_embed": "relative"}, "relative positions"),
        ({"distill_token": True, "registers": 1}, "registers beside"),
        ({"pos_embed_at": "every_layer"}, "every layer"),
        ({"attention": "axial", "pool": "gap"}, "Axial"),
        ({"resnet_units": [1], "patch_size": 4}, "hybrid"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_timm_has_not_is_refused(section, words):
    ours = our_weights((32, 32), **{"patch_size": 8, "width": 64, "depth": 1, "num_heads": 2} | section)
    for export in (export_timm, timm_config):
        with pytest.raises(CheckpointError, match=f"timm.*{words}"):
            export(ours)


def test_a_resnet_of_other_sizes_is_refused():
    with pytest.raises(CheckpointError, match="timm.*BiT ResNet of these sizes"):
        export_timm(our_weights((32, 32), kind="resnet", resnet_units=[1, 1], resnet_width=32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_small_patch32_224", "vit_base_patch16_224", "vit_large_patch32_224", "vit_base_r50_s16_224"],
)
@pytest.mark.parametrize("image_size", [224, 96])
def test_full_sizes(tmp_path, name, image_size):
    theirs = randomise(timm.create_model(name, num_classes=1000, img_size=image_size))  # some have no head unless asked
    read = open_weights(save(theirs, tmp_path))
    assert difference(read, theirs) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnetv2_50x1_bit", "resnetv2_101x1_bit"])
def test_full_sizes_of_resnets(tmp_path, name):
    theirs = randomise(timm.create_model(name, num_classes=1000))  # some have no head unless asked
    assert difference(open_weights(save(theirs, tmp_path)), theirs) < TOLERANCE
