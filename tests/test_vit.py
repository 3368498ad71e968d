"""The model: its numbers against timm, transformers and plain references; its initial weights; where dropout sits."""

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from vitcli.model_config import VARIANTS, ModelConfig, parse_variant
from vitcli.models import build_model
from vitcli.models.attention import attend
from vitcli.models.positions import sincos2d_positions
from vitcli.models.vit import VisionTransformer

TINY: dict[str, Any] = {"image_size": (32, 32), "patch_size": 8, "width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 4}


def build(**changes: Any) -> VisionTransformer:
    """Build a tiny model in evaluation mode."""
    torch.manual_seed(0)
    return VisionTransformer(**{**TINY, "num_classes": 10, **changes}).eval()


@torch.no_grad()
def randomise(model: nn.Module) -> dict[str, Tensor]:
    """Give every parameter values that matter, zero-initialised heads and biases too; return the state dict."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = 0.5 / math.sqrt(parameter.shape[-1]) if parameter.ndim == 2 else 0.2
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.state_dict()


def pixels(batch: int, *size: int) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1]."""
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(2)) * 2 - 1


# ------------------------------------------------------------------------------------------------- against other people's


@torch.no_grad()
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
@pytest.mark.parametrize("image_size", [(224, 224), (64, 96)])
def test_logits_equal_timm(gelu: str, image_size: tuple[int, int]) -> None:
    layer = nn.GELU if gelu == "exact" else (lambda: nn.GELU(approximate="tanh"))
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=image_size, act_layer=layer, num_classes=7).eval()
    state = randomise(theirs)
    sizes = {name: size for name, size in parse_variant("Ti/16").items() if name != "kind"}
    ours = build(**sizes, image_size=image_size, num_classes=7, gelu=gelu)
    ours.load_state_dict(state, strict=True)  # no table: the names are the same
    images = pixels(2, *image_size)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mean_over_patches_equals_timm() -> None:
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        depth=2,
        num_classes=7,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    ).eval()
    ours = build(
        image_size=(64, 64), patch_size=16, width=192, mlp_dim=768, num_heads=3, num_classes=7, pool="gap", gelu="exact"
    )
    ours.load_state_dict(randomise(theirs), strict=True)
    torch.testing.assert_close(ours(pixels(2, 64, 64)), theirs(pixels(2, 64, 64)), atol=1e-5, rtol=1e-5)


def from_hugging_face(state: dict[str, Tensor], *, depth: int) -> dict[str, Tensor]:
    """Rename a ViTForImageClassification state dict and join query, key and value."""
    state = {name.replace("vit.encoder.layer.", "vit.layers."): tensor for name, tensor in state.items()}
    out = {
        "cls_token": state["vit.embeddings.cls_token"],
        "pos_embed": state["vit.embeddings.position_embeddings"],
    }
    names = {
        "patch_embed.proj": ["vit.embeddings.patch_embeddings.projection"],
        "norm": ["vit.layernorm"],
        "head": ["classifier"],
    }
    for index in range(depth):
        prefix = f"vit.layers.{index}"
        attention = [f"{prefix}.attention.{old}" for old in ("attention.query", "attention.key", "attention.value")]
        projection, fc1, fc2 = f"{prefix}.attention.output.dense", f"{prefix}.intermediate.dense", f"{prefix}.output.dense"
        if f"{prefix}.attention.q_proj.weight" in state:  # transformers 5 renamed them
            attention = [f"{prefix}.attention.{new}" for new in ("q_proj", "k_proj", "v_proj")]
            projection, fc1, fc2 = f"{prefix}.attention.o_proj", f"{prefix}.mlp.fc1", f"{prefix}.mlp.fc2"
        names[f"blocks.{index}.attn.qkv"] = attention
        names[f"blocks.{index}.attn.proj"] = [projection]
        names[f"blocks.{index}.mlp.fc1"] = [fc1]
        names[f"blocks.{index}.mlp.fc2"] = [fc2]
        names[f"blocks.{index}.norm1"] = [f"{prefix}.layernorm_before"]
        names[f"blocks.{index}.norm2"] = [f"{prefix}.layernorm_after"]
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            out[f"{ours}.{kind}"] = torch.cat([state[f"{name}.{kind}"] for name in theirs])
    return out


@torch.no_grad()
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_logits_equal_transformers(gelu: str) -> None:
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=192,
        hidden_act="gelu" if gelu == "exact" else "gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        image_size=64,
        patch_size=16,
        id2label={index: str(index) for index in range(5)},
    )
    theirs = ViTForImageClassification(config).eval()
    state = from_hugging_face(randomise(theirs), depth=3)
    sizes = {"image_size": (64, 64), "patch_size": 16, "width": 96, "depth": 3, "mlp_dim": 192, "num_heads": 3}
    ours = build(**sizes, num_classes=5, gelu=gelu)
    ours.load_state_dict(state, strict=True)
    images = pixels(2, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", [{"gelu": "exact"}, {"layer_norm_eps": 1e-3}, {"num_heads": 2}])
def test_agreement_is_not_vacuous(change: dict[str, Any]) -> None:
    model, other = build(), build(**change)
    other.load_state_dict(randomise(model))
    difference = (model(pixels(2, 32, 32)) - other(pixels(2, 32, 32))).abs().max()
    assert difference > 5e-5, f"{change} changes logits by {difference:.1e} only"


@torch.no_grad()
@pytest.mark.parametrize("image_size", [(32, 32), (16, 40)])
def test_representation_layer_and_non_square_image_against_plain_formula(image_size: tuple[int, int]) -> None:
    """Eq. 1-4 once more, in float64 and written out: convolution, one head at a time, softmax."""
    model = build(image_size=image_size, representation_size=24).double()
    w = randomise(model)
    images = pixels(2, *image_size).double()

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].repeat(2, 1, 1), x], dim=1) + w["pos_embed"]
    for i in range(2):
        q, k, v = dense(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(32, dim=-1)
        heads = []
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(8)
            heads.append(scores.softmax(-1) @ v[..., part])
        x = x + dense(torch.cat(heads, dim=-1), f"blocks.{i}.attn.proj")
        hidden = dense(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + dense(hidden, f"blocks.{i}.mlp.fc2")
    features = torch.tanh(dense(norm(x, "norm")[:, 0], "pre_logits"))
    torch.testing.assert_close(model.features(images), features, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(model(images), dense(features, "head"), atol=1e-12, rtol=1e-12)


def test_gradients_equal_timm() -> None:
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "mlp_ratio": 2,
        "num_heads": 4,
        "num_classes": 10,
    }
    theirs = timm.models.VisionTransformer(**sizes).eval()
    ours = build(gelu="exact")
    ours.load_state_dict(randomise(theirs), strict=True)
    for model in (ours, theirs):
        F.cross_entropy(model(pixels(4, 32, 32)), torch.arange(4)).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=f"gradient of {name}")


# --------------------------------------------------------------------------------------------------------- sin-cos and gap


@pytest.mark.parametrize(("grid", "width"), [((4, 4), 32), ((3, 7), 64), ((1, 5), 8)])
def test_sincos2d_equals_big_vision(grid: tuple[int, int], width: int) -> None:
    y, x = np.mgrid[: grid[0], : grid[1]]  # the lines of big_vision's models/vit.py posemb_sincos_2d, with numpy for jax
    omega = np.arange(width // 4) / (width // 4 - 1)
    omega = 1.0 / (10_000.0**omega)
    y = np.einsum("m,d->md", y.flatten(), omega)
    x = np.einsum("m,d->md", x.flatten(), omega)
    expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None]
    np.testing.assert_allclose(sincos2d_positions(grid_size=grid, width=width).numpy(), expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "gap"])
def test_fixed_positions_are_in_no_checkpoint_and_leave_the_class_token_alone(pool: str) -> None:
    model = build(pos_embed="sincos2d", pool=pool)
    assert "pos_embed" not in model.state_dict()
    assert not any(name == "pos_embed" for name, _ in model.named_parameters())
    positions = sincos2d_positions(grid_size=(4, 4), width=32)
    assert model.pos_embed is not None
    assert torch.equal(model.pos_embed[:, model.num_prefix_tokens :], positions)
    assert not model.pos_embed[:, : model.num_prefix_tokens].any()
    learned = build(pool=pool)
    learned.load_state_dict({**randomise(model), "pos_embed": model.pos_embed})
    assert torch.equal(model(pixels(2, 32, 32)), learned(pixels(2, 32, 32)))


@torch.no_grad()
def test_gap_without_positions_does_not_see_the_order_of_patches() -> None:
    model = build(pool="gap")
    randomise(model)
    assert model.pos_embed is not None
    model.pos_embed.zero_()
    images = pixels(2, 32, 32)
    rolled = images.roll(shifts=(8, 16), dims=(2, 3))
    torch.testing.assert_close(model(images), model(rolled), atol=1e-5, rtol=1e-5)
    model.pos_embed.normal_()
    assert (model(images) - model(rolled)).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------- initial state


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "gap"])
@pytest.mark.parametrize("representation_size", [None, 16])
def test_first_logits_are_the_head_bias(pool: str, representation_size: int | None) -> None:
    model = build(pool=pool, representation_size=representation_size, head_bias=-6.9)
    assert torch.equal(model(pixels(3, 32, 32)), torch.full((3, 10), -6.9))
    assert model.features(pixels(3, 32, 32)).std() > 0.01


def test_initial_weights_follow_the_authors_code() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(**{**TINY, "image_size": (128, 128), "width": 128, "mlp_dim": 512, "num_classes": 4})
    state = model.state_dict()
    square, mlp = math.sqrt(6 / (128 + 128)), math.sqrt(6 / (128 + 512))  # xavier_uniform's limits
    for name, limit in [("attn.qkv", square), ("attn.proj", square), ("mlp.fc1", mlp), ("mlp.fc2", mlp)]:
        weight, bias = state[f"blocks.1.{name}.weight"], state[f"blocks.1.{name}.bias"]
        assert 0.99 * limit < weight.abs().max() <= limit
        assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
        assert bias.abs().max() == 0 if "attn" in name else 1e-7 < bias.std() < 3e-6
    patch = state["patch_embed.proj.weight"]
    assert patch.std().item() == pytest.approx(1 / math.sqrt(3 * 8 * 8), rel=0.03)
    assert patch.abs().max() <= 2 / (math.sqrt(3 * 8 * 8) * 0.8796)
    assert state["pos_embed"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not state["cls_token"].any()
    assert not state["head.weight"].any()
    assert not state["patch_embed.proj.bias"].any()


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first, again = build().state_dict(), build().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


# ------------------------------------------------------------------------------------------------------------ less work


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"depth": 1},
        {"pool": "gap"},
        {"representation_size": 8},
        {"registers": 2, "qk_norm": True, "layer_scale": 0.5},
        {"distill_token": True, "registers": 1},
        {"pos_embed": "relative"},
        {"pos_embed_at": "every_layer", "patch_dropout": 0.5},
        {"stochastic_depth": 0.5},
    ],
)
def test_leaving_out_what_nobody_reads_changes_no_logit_and_no_gradient(changes: dict[str, Any]) -> None:
    short, whole = build(**changes).train(), build(**changes).train()
    randomise(short)
    whole.load_state_dict(short.state_dict())
    whole.masks_tokens = True  # as with dropout: the last block makes every token
    images, weights = pixels(3, 32, 32), torch.randn(3, 10, generator=torch.Generator().manual_seed(3))
    logits = []
    for model in (short, whole):
        torch.manual_seed(5)
        logits.append(model(images))
        (logits[-1] * weights).sum().backward()
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    gradients = [{name: parameter.grad for name, parameter in model.named_parameters()} for model in (short, whole)]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_attention_in_16_bits_on_a_cpu_is_close_to_that_in_32() -> None:
    generator = torch.Generator().manual_seed(4)
    qkv = torch.randn(3, 2, 4, 17, 8, generator=generator)  # (3, B, A, N, D/A)
    weights = torch.randn(2, 4, 17, 8, generator=generator)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        parts = qkv.to(dtype, copy=True).requires_grad_()
        out = attend(*parts, dropout=0.0)
        assert out.dtype == dtype
        (out.float() * weights).sum().backward()
        assert parts.grad is not None
        found.append((out.float(), parts.grad.float()))
    for exact, rounded in zip(*found):
        assert (exact - rounded).abs().max() < 0.03 * exact.abs().max()


# ----------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_sits_after_positions_output_projection_gelu_and_second_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    dropout, linear, gelu, attention = F.dropout, F.linear, F.gelu, F.scaled_dot_product_attention

    def record(name: str, function: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            rate = f" {args[1]}" if name == "dropout" else f" {kwargs['dropout_p']}" if name == "attention" else ""
            events.append(name + rate)
            return function(*args, **kwargs)

        return recorded

    for name, function in (("dropout", dropout), ("linear", linear), ("gelu", gelu)):
        monkeypatch.setattr(F, name, record(name, function))
    monkeypatch.setattr(F, "scaled_dot_product_attention", record("attention", attention))
    model = build(dropout=0.25, attention_dropout=0.5, depth=1, representation_size=8).train()
    model(pixels(2, 32, 32))
    block = ["linear", "attention 0.5", "linear", "dropout 0.25", "linear", "gelu", "dropout 0.25", "linear", "dropout 0.25"]
    assert events == ["linear", "dropout 0.25", *block, "linear", "linear"]


@torch.no_grad()
def test_dropout_acts_in_training_only_and_repeats_with_the_seed() -> None:
    model = build(dropout=0.3, attention_dropout=0.3)
    plain = build()
    plain.load_state_dict(randomise(model))
    images = pixels(2, 32, 32)
    assert torch.equal(model(images), plain(images))
    model.train()
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(model(images))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# ------------------------------------------------------------------------------------------------------- building, errors


@pytest.mark.parametrize(
    ("name", "width", "patch_size"),
    [
        ("Ti/16", 192, 16),
        ("S/32", 384, 32),
        ("B/8", 768, 8),
        ("H/14", 1280, 14),
        ("g-opt/14", 1536, 14),
        ("So400m/14", 1152, 14),
    ],
)
def test_variants_by_name(name: str, width: int, patch_size: int) -> None:
    sizes = parse_variant(name)
    assert (sizes["width"], sizes["patch_size"]) == (width, patch_size)
    assert set(sizes) == {"kind", "width", "depth", "mlp_dim", "num_heads", "patch_size"}
    assert all(entry[0] % entry[3] == 0 for entry in VARIANTS.values())


@pytest.mark.parametrize(
    "name", ["B", "B/", "B/0", "B/x", "B/-16", "X/16", "b/16", "", "/16", "B/16/2", "B/\N{SUPERSCRIPT TWO}"]
)
def test_wrong_variants_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="is not a variant"):
        parse_variant(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (32, 30)}, "does not divide image_size 32x30"),
        ({"num_heads": 5}, "does not divide width 32"),
        ({"width": 30, "num_heads": 2, "pos_embed": "sincos2d"}, "multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_images_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match="32, 32"):
        build()(pixels(1, 40, 32))


def test_build_model_reads_the_section() -> None:
    section = ModelConfig(
        patch_size=8,
        width=32,
        depth=1,
        num_heads=2,
        representation_size="width",
        pool="gap",
        dropout=0.1,
        layer_norm_eps=1e-5,
        gelu="exact",
    )
    model = build_model(section, image_size=(16, 24), num_classes=3)
    assert isinstance(model, VisionTransformer)
    assert model.grid_size == (2, 3)
    assert model.num_prefix_tokens == 0
    assert model.state_dict()["blocks.0.mlp.fc1.weight"].shape == (128, 32)
    assert model.pre_logits is not None
    assert model.pre_logits.out_features == 32
    assert model.norm.eps == 1e-5
    assert model.drop.p == 0.1
    assert model(pixels(2, 16, 24)).shape == (2, 3)
    with pytest.raises(ValueError, match="not resolved"):
        build_model(ModelConfig(variant="B/16"), image_size=(16, 16), num_classes=3)
