"""Which models the config takes, and what it says about those that make no sense."""

from pathlib import Path
from typing import Any

import pytest

from vitcli.config_file import load_config
from vitcli.errors import ConfigError
from vitcli.model_config import ModelConfig, kept_patches, model_problem, parse_variant, resolve_model, stem_stride

TINY: dict[str, Any] = {"patch_size": 8, "width": 32, "depth": 2, "num_heads": 4}
AXIAL: dict[str, Any] = {"attention": "axial", "pool": "gap"}
HYBRID: dict[str, Any] = {"resnet_units": (1, 1), "resnet_root": "small", "patch_size": 4}
RESNET: dict[str, Any] = {"kind": "resnet", "resnet_units": (1, 1)}
MLP: dict[str, Any] = {"kind": "mlp", "width": 30, "depth": 2}


def problem(image_size: tuple[int, int] = (32, 24), **settings: Any) -> tuple[str, str] | None:
    """Say what is wrong with a tiny model."""
    base = {} if settings.get("kind") in ("resnet", "mlp") else TINY
    return model_problem(resolve_model(ModelConfig(**{**base, **settings})), image_size)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pos_embed": "learned2d", "pos_embed_at": "every_layer", "registers": 2, "patch_dropout": 0.5},
        {"pos_embed": "learned", "pos_embed_at": "shared", "pool": "map"},
        {"pos_embed": "relative", "registers": 4, "qk_norm": True, "layer_scale": 1e-5},
        {"pos_embed": "none", "pool": "gap", "stochastic_depth": 0.1},
        {**AXIAL, "pos_embed": "learned2d", "pos_embed_at": "every_layer", "stochastic_depth": 0.1},
        HYBRID,
        {**HYBRID, **AXIAL, "group_norm_eps": 1e-5, "weight_standardisation": "timm"},
        {"resnet_units": (), "patch_size": 2},
        RESNET,
        {**RESNET, "resnet_width": 96, "head_bias": -10.0},
        {**RESNET, "resnet_width": 24, "group_norm_groups": 8, "resnet_spatial_units": (1, 0)},
        {**HYBRID, "resnet_width": 16, "group_norm_groups": 16},
        MLP,
        {**MLP, "mlp_dim": 100, "dropout": 0.1, "gelu": "exact", "layer_norm_eps": 1e-5, "head_bias": -10.0},
    ],
)
def test_models_that_make_sense_are_taken(settings: dict[str, Any]) -> None:
    assert problem(**settings) is None


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"patch_size": 5}, "patch_size", "is 5: data.image_size 32 x 24 is no multiple of 5 px"),
        ({**HYBRID, "patch_size": 8}, "patch_size", "no multiple of 16 px"),
        ({"num_heads": 5}, "num_heads", "is 5, which does not divide model.width (32)"),
        ({"pos_embed": "sincos2d", "width": 6, "num_heads": 1}, "pos_embed", "a width of 8 or more that 4 divides, not 6"),
        ({"pos_embed": "learned2d", "width": 9, "num_heads": 1}, "pos_embed", "an even width, not 9"),
        ({"pos_embed": "none", "pos_embed_at": "every_layer"}, "pos_embed_at", "is every_layer, which is for learned and"),
        ({"pos_embed": "relative", "pos_embed_at": "shared"}, "pos_embed_at", "not relative; take stem"),
        ({"pos_embed": "sincos2d", "pos_embed_at": "shared"}, "pos_embed_at", "not sincos2d; take stem"),
        ({"pos_embed": "relative", "patch_dropout": 0.5}, "patch_dropout", "which need every patch in its place; take 0"),
        ({"patch_dropout": 0.04}, "patch_dropout", "is 0.04, which leaves out none of 12 patches; take more, or 0"),
        ({"stochastic_depth": 0.1, "depth": 1}, "stochastic_depth", "has no effect on a single block"),
        ({"qk_norm": True, "num_heads": 32}, "qk_norm", "heads of a single channel"),
        ({**AXIAL, "pool": "token"}, "pool", "is token, but a class token lies in no row or column; take gap or map"),
        ({**AXIAL, "registers": 1}, "registers", "lie in no row or column"),
        ({**AXIAL, "pos_embed": "relative"}, "pos_embed", "relative is along one sequence"),
        ({**AXIAL, "patch_dropout": 0.5}, "patch_dropout", "breaks the rows and columns of model.attention axial"),
        ({**AXIAL, "image_size": (32, 8)}, "attention", "is axial, but the grid is 4 x 1"),
        ({"resnet_width": 64}, "resnet_width", "is about a ResNet, and there is none without model.resnet_units"),
        ({"resnet_root": "small"}, "resnet_root", "is about a ResNet"),
        ({"weight_standardisation": "std"}, "weight_standardisation", "is about a ResNet"),
        ({"group_norm_eps": 1e-5}, "group_norm_eps", "is about a ResNet"),
        ({**HYBRID, "resnet_width": 48}, "resnet_width", "is 48, which the 32 groups of a GroupNorm do not divide"),
        ({**RESNET, "resnet_width": 48}, "resnet_width", "is 48, which the 32 groups of a GroupNorm do not divide"),
        ({**RESNET, "resnet_width": 8}, "resnet_width", "do not divide; take model.group_norm_groups: 8"),
        ({**RESNET, "resnet_units": ()}, "resnet_units", "is empty: a ResNet needs a block"),
        ({**RESNET, "resnet_spatial_units": (1,)}, "resnet_spatial_units", "has 1 numbers for 2 blocks; give one for each"),
        ({**RESNET, "resnet_spatial_units": (2, 0)}, "resnet_spatial_units", "is [2, 0], but the blocks have [1, 1] units"),
        ({**HYBRID, "resnet_spatial_units": (1, 0)}, "resnet_spatial_units", "is about model.kind resnet"),
        ({"group_norm_groups": 8}, "group_norm_groups", "is about a ResNet"),
        *(
            ({**MLP, key: value}, key, "says nothing about an MLP, but model.kind is mlp; leave it out")
            for key, value in {
                "patch_size": 4,
                "num_heads": 2,
                "pool": "gap",
                "resnet_units": (1,),
                "resnet_root": "small",
                "group_norm_groups": 8,
                "stochastic_depth": 0.1,
                "representation_size": 8,
            }.items()
        ),
        *(
            ({**RESNET, key: value}, key, "is about a Transformer, but model.kind is resnet; leave it out")
            for key, value in {
                "patch_size": 4,
                "num_heads": 2,
                "pool": "gap",
                "pos_embed": "none",
                "attention": "axial",
                "registers": 1,
                "layer_scale": 0.1,
                "qk_norm": True,
                "stochastic_depth": 0.1,
                "patch_dropout": 0.1,
                "dropout": 0.1,
                "gelu": "exact",
                "representation_size": 8,
                "layer_norm_eps": 1e-5,
            }.items()
        ),
    ],
)
def test_models_that_make_no_sense_are_refused(settings: dict[str, Any], key: str, message: str) -> None:
    found = problem(**settings)
    assert found is not None
    assert found[0] == key
    assert message in found[1]
    assert "\n" not in found[1]


def test_a_refusal_is_one_line_with_file_line_and_key(tmp_path: Path) -> None:
    path = tmp_path / "axial.yaml"
    path.write_text(
        "model:\n  patch_size: 4\n  width: 32\n  depth: 2\n  num_heads: 2\n  attention: axial\n  pool: token\n"
        "data: {source: digits, image_size: 16}\ntrain: {steps: 1, batch_size: 2}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == (f"{path}:7: model.pool is token, but a class token lies in no row or column; take gap or map")
    assert load_config(path, ["model.pool=map"]).model.pool == "map"
    with pytest.raises(ConfigError, match="model.registers lie in no row or column"):
        load_config(path, ["model.pool=map", "model.registers=1"])


@pytest.mark.parametrize(
    ("patches", "rate", "kept"), [(196, 0.5, 98), (196, 0.9, 20), (12, 0.04, 12), (4, 0.99, 1), (10, 0.9, 1), (9, 0.0, 9)]
)
def test_patches_that_stay(patches: int, rate: float, kept: int) -> None:
    assert kept_patches(patches, rate) == kept


@pytest.mark.parametrize(
    ("name", "units", "patch_size", "width", "pixels"),
    [
        ("R+Ti/16", (), 8, 192, 32),  # as published, whatever its name says
        ("R26+S/32", (2, 2, 2, 2), 1, 384, 32),
        ("R26+B/32", (2, 2, 2, 2), 1, 768, 32),
        ("R50+B/16", (3, 4, 9), 1, 768, 16),
        ("R50+B/32", (3, 4, 6, 3), 1, 768, 32),
        ("R50+L/16", (3, 4, 9), 1, 1024, 16),
        ("R50+L/32", (3, 4, 6, 3), 1, 1024, 32),
    ],
)
def test_hybrids_by_name(name: str, units: tuple[int, ...], patch_size: int, width: int, pixels: int) -> None:
    model = resolve_model(ModelConfig(variant=name))
    assert (model.kind, model.resnet_units, model.resnet_width) == ("vit", units, 64)
    assert (model.patch_size, model.width) == (patch_size, width)
    assert stem_stride(model) * patch_size == pixels
    assert model_problem(model, (224, 224)) is None


@pytest.mark.parametrize(
    ("name", "units", "width"), [("R50x1", (3, 4, 6, 3), 64), ("R152x4", (3, 8, 36, 3), 256), ("R26x2", (2, 2, 2, 2), 128)]
)
def test_resnets_by_name(name: str, units: tuple[int, ...], width: int) -> None:
    model = resolve_model(ModelConfig(variant=name))
    assert (model.kind, model.resnet_units, model.resnet_width) == ("resnet", units, width)
    assert model_problem(model, (224, 224)) is None


@pytest.mark.parametrize("name", ["R49+B/16", "R50+B/24", "R50+B/8", "R+Ti/32", "R50x0", "R50x", "R7x1", "R50+R50/16", "x1"])
def test_wrong_hybrids_and_resnets_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="is not a variant"):
        parse_variant(name)
