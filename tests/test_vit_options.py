"""The Transformer's options: against timm where timm has them, against formulas written out, and what each does in training."""

import math
from itertools import product
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.test_vit import TINY, build, pixels, randomise
from vitcli.model_config import ModelConfig, kept_patches, model_problem, resolve_model
from vitcli.models import build_model
from vitcli.models.resnet import ResNetStem
from vitcli.models.vit import AxialBlock, Block, VisionTransformer, attention_maps

SIZE = (32, 24)  # a grid of 4 rows and 3 columns

# One of everything that has weights or draws; what timm does not have is in the second half.
OPTIONS: list[dict[str, Any]] = [
    {"pool": "gap"},
    {"pool": "map"},
    {"pool": "map", "representation_size": 16},
    {"registers": 3},
    {"layer_scale": 0.1},
    {"qk_norm": True},
    {"pos_embed": "none"},
    {"stochastic_depth": 0.5},
    {"patch_dropout": 0.5},
    {"pos_embed": "learned2d"},
    {"pos_embed": "learned2d", "pos_embed_at": "every_layer"},
    {"pos_embed": "learned2d", "pos_embed_at": "shared", "pool": "gap"},
    {"pos_embed": "learned", "pos_embed_at": "every_layer", "registers": 1},
    {"pos_embed": "learned", "pos_embed_at": "shared"},
    {"pos_embed": "relative"},
    {"pos_embed": "relative", "pool": "gap"},
    {"pos_embed": "sincos2d", "registers": 2},
    {"attention": "axial", "pool": "gap"},
    {"attention": "axial", "pool": "map", "pos_embed": "none"},
    {"distill_token": True},
    # together
    {"distill_token": True, "registers": 1, "pos_embed": "learned2d", "pos_embed_at": "every_layer"},
    {"pos_embed": "relative", "registers": 2, "qk_norm": True, "layer_scale": 0.5},
    {"attention": "axial", "pool": "map", "pos_embed": "learned2d", "pos_embed_at": "every_layer", "qk_norm": True},
    {"attention": "axial", "pool": "gap", "stochastic_depth": 0.3, "layer_scale": 1e-5, "dropout": 0.1},
    {"pos_embed": "learned2d", "pos_embed_at": "shared", "patch_dropout": 0.4, "registers": 2, "representation_size": 8},
]


def named(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


def tiny(**changes: Any) -> VisionTransformer:
    """Build a tiny model of non-square images, in evaluation mode."""
    return build(**{"image_size": SIZE, "depth": 3, **changes})


# ------------------------------------------------------------------------------------------------------------ against timm


def theirs_and_ours(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[timm.models.VisionTransformer, VisionTransformer]:
    """Build timm's model, random, and ours with its weights."""
    norm_first = {"class_token": False, "fc_norm": False} if "pool" in ours else {}
    other = timm.models.VisionTransformer(
        img_size=SIZE,
        patch_size=8,
        embed_dim=32,
        depth=3,
        mlp_ratio=2,
        num_heads=4,
        num_classes=10,
        **norm_first,
        **theirs,
    ).eval()
    state = randomise(other)
    if theirs.get("no_embed_class") and "pool" not in ours:  # ours has a place for the class token
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    model = tiny(gelu="exact", **ours)
    model.load_state_dict(state, strict=True)  # no table: the names are the same
    return other, model


TIMM: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"global_pool": "avg"}, {"pool": "gap"}),
    ({"global_pool": "map"}, {"pool": "map"}),
    ({"global_pool": "map", "reg_tokens": 2, "no_embed_class": True}, {"pool": "map", "registers": 2}),
    ({"global_pool": "avg", "reg_tokens": 2, "no_embed_class": True}, {"pool": "gap", "registers": 2}),
    ({"reg_tokens": 4, "no_embed_class": True}, {"registers": 4}),
    ({"init_values": 1e-5}, {"layer_scale": 1e-5}),
    ({"qk_norm": True}, {"qk_norm": True}),
    ({"pos_embed": "none"}, {"pos_embed": "none"}),
    (
        {"global_pool": "map", "reg_tokens": 1, "no_embed_class": True, "init_values": 0.1, "qk_norm": True},
        {"pool": "map", "registers": 1, "layer_scale": 0.1, "qk_norm": True},
    ),
]


@pytest.mark.parametrize(("theirs", "ours"), TIMM, ids=[named(ours) or "plain" for _, ours in TIMM])
def test_logits_and_gradients_equal_timm(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    other, model = theirs_and_ours(theirs, ours)
    images, weights = pixels(3, *SIZE), torch.randn(3, 10, generator=torch.Generator().manual_seed(3))
    expected, found = other(images), model(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for logits in (expected, found):
        (logits * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        if gradient.shape != parameter.shape or name == "pos_embed":
            gradient = gradient[:, -12:]
            gradients[name] = gradients[name][:, -12:]
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradient, gradients[name], atol=2e-5 * scale, rtol=1e-4, msg=name)


@torch.no_grad()
def test_position_of_a_register_in_timm_is_part_of_the_register_here() -> None:
    other = timm.models.VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=32, depth=3, mlp_ratio=2, num_heads=4, num_classes=10, reg_tokens=2
    ).eval()
    state = randomise(other)
    model = tiny(gelu="exact", registers=2)
    positions = state["pos_embed"]  # class token, registers, patches
    moved = {
        "reg_token": state["reg_token"] + positions[:, 1:3],
        "pos_embed": torch.cat([positions[:, :1], positions[:, 3:]], dim=1),
    }
    model.load_state_dict({**state, **moved}, strict=True)
    torch.testing.assert_close(model(pixels(2, *SIZE)), other(pixels(2, *SIZE)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_rates_of_stochastic_depth_equal_timm(depth: int) -> None:
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=4, drop_path_rate=0.3
    )
    expected = [getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks]
    found = [block.stochastic_depth for block in build(depth=depth, stochastic_depth=0.3).blocks]
    assert found == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------ against the formulas


def written_out(w: dict[str, Tensor], images: Tensor, options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Compute logits and attention weights from a tiny model's tensors: one token, one pair, one line at a time."""
    depth, heads, (rows, columns) = 3, 4, (SIZE[0] // 8, SIZE[1] // 8)

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attention(x: Tensor, name: str, axis: str | None) -> tuple[Tensor, Tensor]:
        q, k, v = dense(x, f"{name}.qkv").unflatten(-1, (3, heads, -1)).unbind(2)  # (B, N, A, d)
        if options.get("qk_norm"):
            q, k = norm(q, f"{name}.q_norm"), norm(k, f"{name}.k_norm")
        tokens = x.shape[1]
        logits = x.new_full((len(x), heads, tokens, tokens), -math.inf)
        for i, j in product(range(tokens), repeat=2):
            if axis is None or (i // columns == j // columns if axis == "rows" else i % columns == j % columns):
                key = k[:, j]
                if f"{name}.relative" in w:  # Shaw et al. (1803.02155), Eq. 4
                    key = key + w[f"{name}.relative"][i - j + tokens - 1]
                logits[:, :, i, j] = (q[:, i] * key).sum(-1) / math.sqrt(q.shape[-1])
        weights = logits.softmax(-1)
        return dense(torch.einsum("baij,bjad->biad", weights, v).flatten(2), f"{name}.proj"), weights

    def block(x: Tensor, name: str, axis: str | None) -> tuple[Tensor, Tensor]:
        y, weights = attention(norm(x, f"{name}.norm1"), f"{name}.attn", axis)
        x = x + y * w.get(f"{name}.ls1.gamma", 1.0)
        hidden = F.gelu(dense(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"), approximate="tanh")
        return x + dense(hidden, f"{name}.mlp.fc2") * w.get(f"{name}.ls2.gamma", 1.0), weights

    first = ("cls_token" in w) + ("dist_token" in w)

    def positions(layer: int) -> Tensor:
        table = []
        for place in range(first):
            table.append(w["pos_embed_prefix"][layer, place] if "pos_embed_rows" in w else w["pos_embed"][layer, place])
        table += [torch.zeros_like(token) for token in w.get("reg_token", [[]])[0]]
        for y, x in product(range(rows), range(columns)):
            if "pos_embed_rows" in w:
                table.append(torch.cat([w["pos_embed_columns"][layer, x], w["pos_embed_rows"][layer, y]]))
            else:
                table.append(w["pos_embed"][layer, columns * y + x + first])
        return torch.stack(table)

    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([*(w[name].repeat(len(x), 1, 1) for name in ("cls_token", "dist_token", "reg_token") if name in w), x], dim=1)
    maps, at = [], options.get("pos_embed_at", "stem")
    for number in range(depth):
        if ("pos_embed" in w or "pos_embed_rows" in w) and (number == 0 or at != "stem"):
            x = x + positions(number if at == "every_layer" else 0)
        axes = {"rows": "rows", "columns": "columns"} if options.get("attention") == "axial" else {"": None}
        for part, axis in axes.items():
            x, weights = block(x, f"blocks.{number}.{part}".rstrip("."), axis)
            maps.append(weights)
    x = norm(x, "norm")
    if "dist_token" in w:
        return (dense(x[:, 0], "head") + dense(x[:, 1], "head_dist")) / 2, maps
    x = x[:, 0] if "cls_token" in w else x[:, options.get("registers", 0) :].mean(1)
    return dense(x, "head"), maps


FORMULAS: list[dict[str, Any]] = [
    options for options in OPTIONS if options.get("pool") != "map" and not {"representation_size"} & set(options)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # torch's kernel for attention, and the products written out
@pytest.mark.parametrize("options", FORMULAS, ids=named)
def test_logits_maps_and_gradients_equal_the_formulas(options: dict[str, Any], dtype: torch.dtype) -> None:
    if options.get("pos_embed") == "sincos2d":
        options = {**options, "pos_embed": "learned"}
    model = tiny(**options).to(dtype)
    randomise(model)
    w = {name: tensor.detach().double().requires_grad_() for name, tensor in model.named_parameters()}
    images = pixels(2, *SIZE)
    found, (expected, expected_maps) = model(images.to(dtype)), written_out(w, images.double(), options)
    close = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 1e-11, "rtol": 1e-11}
    torch.testing.assert_close(found.double(), expected, **close)
    weights = torch.randn(2, 10, generator=torch.Generator().manual_seed(3))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        tensor = w[name].grad
        assert tensor is not None
        scale = max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(parameter.grad.double() / scale, tensor / scale, **close, msg=name)
    maps = attention_maps(model, images.to(dtype))
    assert len(maps) == len(expected_maps)
    for found_map, expected_map in zip(maps, expected_maps):
        torch.testing.assert_close(found_map.double(), expected_map, **close)


@torch.no_grad()
def test_relative_positions_see_distance_and_nothing_else() -> None:
    """Attention from a token to the one d places on does not change when both move."""
    model = tiny(pos_embed="relative", pool="gap", depth=1)
    block = model.blocks[0]
    assert isinstance(block, Block)
    randomise(model)
    same = torch.randn(32).expand(1, 12, 32)  # every token has the same content
    q, k, _, bias = block.attn.heads(same, False)
    assert bias is not None
    logits = ((q * q.shape[-1] ** -0.5) @ k.mT + bias)[0]
    for offset in range(-11, 12):
        line = logits.diagonal(offset, dim1=1, dim2=2)
        torch.testing.assert_close(line, line[:, :1].expand_as(line), atol=1e-5, rtol=1e-5)
    assert logits[:, 0].std() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "gap", "map"])
def test_hidden_layer_reads_what_the_pool_gives(pool: str) -> None:
    model, plain = tiny(pool=pool, representation_size=12), tiny(pool=pool)
    state = randomise(model)
    plain.load_state_dict(
        {name: tensor for name, tensor in state.items() if name in plain.state_dict() and "head" not in name}, strict=False
    )
    expected = torch.tanh(plain.features(pixels(2, *SIZE)) @ state["pre_logits.weight"].T + state["pre_logits.bias"])
    torch.testing.assert_close(model.features(pixels(2, *SIZE)), expected)


@torch.no_grad()
def test_axial_attention_mixes_rows_then_columns_only() -> None:
    model = tiny(attention="axial", pool="gap", depth=1)
    randomise(model)
    block, x = model.blocks[0], torch.randn(1, 12, 32)
    assert isinstance(block, AxialBlock)
    changed = x.clone()
    changed[0, 4, 0] += 1.0  # row 1, column 1 of 4 x 3
    after_rows = (block.rows(x) - block.rows(changed)).abs().amax(-1)[0] > 1e-6
    assert after_rows.nonzero().flatten().tolist() == [3, 4, 5]
    after_columns = (block.columns(x) - block.columns(changed)).abs().amax(-1)[0] > 1e-6
    assert after_columns.nonzero().flatten().tolist() == [1, 4, 7, 10]
    assert ((block(x) - block(changed)).abs().amax(-1) > 1e-7).all()


# ------------------------------------------------------------------------------------------------------- attention, read out


@torch.no_grad()
@pytest.mark.parametrize("case", [0, 3, 5, 7], ids=["plain", "map and registers", "registers", "qk_norm"])
def test_attention_maps_equal_what_timm_drops_out(case: int) -> None:
    other, model = theirs_and_ours(*TIMM[case])
    expected: list[Tensor] = []
    for block in other.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: expected.append(output))
    images = pixels(2, *SIZE)
    other(images)
    found = attention_maps(model, images)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.sum(-1), torch.ones(ours.shape[:-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_attention_maps_are_those_of_evaluation_and_leave_no_trace(options: dict[str, Any]) -> None:
    model = tiny(**{"attention_dropout": 0.5, **options})
    randomise(model)
    images = pixels(2, *SIZE)
    expected = attention_maps(model, images)
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    found = attention_maps(model, images)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    tokens = model.num_prefix_tokens + model.num_registers + 12
    assert len(found) == (6 if options.get("attention") == "axial" else 3)
    for one, other in zip(found, expected):
        assert torch.equal(one, other)
        assert one.shape == (2, 4, tokens, tokens)
        assert not one.requires_grad
        assert one.min() >= 0
        torch.testing.assert_close(one.sum(-1), torch.ones(2, 4, tokens), atol=1e-5, rtol=0)


def test_attention_maps_mend_the_model_after_an_error() -> None:
    model = tiny().train()
    with pytest.raises(ValueError, match="px"):
        attention_maps(model, pixels(1, 8, 8))
    assert all(module.training and not module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------------------------- training


STEM: dict[str, Any] = {"resnet_units": (1, 1), "resnet_width": 32, "resnet_root": "small", "patch_size": 4}


@pytest.mark.parametrize("options", [{}, *OPTIONS, STEM, {**STEM, "attention": "axial", "pool": "map"}], ids=named)
def test_one_step_moves_every_parameter(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "width": 32, "depth": 3, "num_heads": 4, "mlp_dim": 64}
    section = resolve_model(ModelConfig(**{**sizes, **options}))
    assert model_problem(section, SIZE) is None
    dtype = torch.float32 if section.resnet_units else torch.float64  # to tell little from nothing; a stem has its own
    model = build_model(section, image_size=SIZE, num_classes=10).to(dtype).train()
    nn.init.normal_(model.head.weight)  # at zero, it would hold all gradients back in the first step
    for name, parameter in model.named_parameters():
        if name.endswith("norm3.weight"):  # of a stem's units: zero at first, for the same reason
            nn.init.ones_(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    F.cross_entropy(model(pixels(10, *SIZE).to(dtype)), torch.arange(10)).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        largest = float(parameter.grad.abs().max())
        if name.endswith("k_norm.bias"):  # adds the same to all of a query's logits, which the softmax does not see
            assert largest < 1e-15, name
        else:
            assert largest > 1e-8, f"{name}: gradient {largest}"
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_bf16_is_close_to_float32(options: dict[str, Any]) -> None:
    model = tiny(**options)
    randomise(model)
    images, logits, gradients = pixels(4, *SIZE), [], []
    for low in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits.append(model(images).float())
        F.cross_entropy(logits[-1], torch.arange(4)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[0].norm()
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"stochastic_depth": 0.5},
        {"patch_dropout": 0.5},
        {"patch_dropout": 0.5, "pos_embed_at": "every_layer"},
        {"attention": "axial", "pool": "gap", "stochastic_depth": 0.5},
    ],
    ids=named,
)
def test_what_is_left_out_in_training_is_there_in_evaluation_and_repeats_with_the_seed(options: dict[str, Any]) -> None:
    plain = {name: value for name, value in options.items() if name not in ("stochastic_depth", "patch_dropout")}
    model, whole = tiny(**options), tiny(**plain)
    whole.load_state_dict(randomise(model))
    images = pixels(4, *SIZE)
    assert model.random
    assert not whole.random
    assert torch.equal(model(images), whole(images))
    model.train()
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(model(images))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@torch.no_grad()
@pytest.mark.parametrize("axial", [False, True])
def test_stochastic_depth_leaves_out_whole_branches_of_images(axial: bool) -> None:
    grid: dict[str, Any] = {"axis": "columns", "grid_size": (2, 3)} if axial else {}
    block = Block(
        width=16,
        mlp_dim=32,
        num_heads=2,
        dropout=0.0,
        attention_dropout=0.0,
        gelu="tanh",
        layer_norm_eps=1e-6,
        stochastic_depth=0.3,
        **grid,
    )
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)  # leaves the first branch alone
    torch.manual_seed(1)
    x = torch.randn(2000, 6, 16)
    branch = block.attn(block.norm1(x))
    added = block.train()(x) - x
    left_out = (added == 0).flatten(1).all(1)
    torch.testing.assert_close(added[~left_out], branch[~left_out] / 0.7, atol=1e-5, rtol=1e-4)
    assert int(left_out.sum()) == pytest.approx(600, abs=4 * math.sqrt(2000 * 0.3 * 0.7))


@torch.no_grad()
def test_both_branches_are_left_out_independently() -> None:
    model = tiny(stochastic_depth=0.5, depth=2, pool="gap")
    randomise(model)
    block = model.blocks[1].train()
    x = torch.randn(1, 5, 32).expand(400, -1, -1)
    torch.manual_seed(2)
    kinds, counts = torch.unique(block(x).flatten(1).mul(1e4).round(), dim=0, return_counts=True)
    assert len(kinds) == 4
    assert counts.tolist() == pytest.approx([100] * 4, abs=4 * math.sqrt(400 * 3 / 16))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "gap"])
def test_patch_dropout_draws_patches_and_keeps_what_comes_before_them(pool: str) -> None:
    model = tiny(patch_dropout=0.6, registers=2, pool=pool).train()
    first = 3 if pool == "token" else 2
    torch.manual_seed(3)
    kept = model.draw_tokens(torch.zeros(4000, first + 12, 32))
    assert kept.shape == (4000, first + 5)  # 40 % of 12
    assert torch.equal(kept[:, :first], torch.arange(first).expand(4000, -1))
    patches = kept[:, first:].sort(dim=1).values
    assert (patches.diff(dim=1) > 0).all()  # each at most once
    assert patches.min() == first
    assert patches.max() == first + 11
    counts = torch.bincount(patches.flatten() - first, minlength=12).tolist()
    assert counts == pytest.approx([4000 * 5 / 12] * 12, abs=4 * math.sqrt(4000 * 5 / 12 * 7 / 12))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        *({"pos_embed": kind} for kind in ("none", "learned", "learned2d", "sincos2d")),
        *({"pos_embed": kind, "pos_embed_at": at} for kind in ("learned", "learned2d") for at in ("every_layer", "shared")),
        {"pos_embed_at": "every_layer", "registers": 2, "pool": "map"},
    ],
    ids=named,
)
def test_patches_that_stay_take_their_positions_along(options: dict[str, Any]) -> None:
    """A share too small to leave any patch out still shuffles them, and nothing else may tell."""
    model = tiny(patch_dropout=0.01, **options)
    randomise(model)
    assert kept_patches(12, 0.01) == 12
    images = pixels(3, *SIZE)
    expected = model(images)
    torch.testing.assert_close(model.train()(images), expected, atol=1e-5, rtol=1e-5)
    model.draw_tokens = lambda x: torch.arange(x.shape[1]).expand(len(x), -1)[:, :-1]  # type: ignore[method-assign]
    assert (model(images) - expected).abs().max() > 1e-4


def test_what_is_random_is_said() -> None:
    for options in OPTIONS:
        drawn = any(options.get(name) for name in ("stochastic_depth", "patch_dropout", "dropout"))
        assert tiny(**options).random == drawn, options


# ------------------------------------------------------------------------------------------------- building and initial state


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_first_logits_are_the_head_bias(options: dict[str, Any]) -> None:
    model = tiny(head_bias=-6.9, **options)
    assert torch.equal(model(pixels(3, *SIZE)), torch.full((3, 10), -6.9))


def test_initial_weights_of_the_options() -> None:
    torch.manual_seed(0)
    sizes = {**TINY, "width": 128, "num_classes": 4, "image_size": (256, 256)}
    model = VisionTransformer(**sizes, registers=8, layer_scale=0.25, pool="map", pos_embed="relative")
    state = model.state_dict()
    assert (state["blocks.1.ls2.gamma"] == 0.25).all()
    assert state["reg_token"].std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.unique(state["reg_token"][0], dim=0).shape[0] == 8  # nothing but their values tells registers apart
    assert state["blocks.0.attn.relative"].shape == (2 * (8 + 32 * 32) - 1, 32)
    assert state["blocks.0.attn.relative"].std().item() == pytest.approx(0.02, rel=0.05)
    limit = math.sqrt(6 / 256)
    for name in ("q", "kv", "proj"):
        assert 0.98 * limit < state[f"attn_pool.{name}.weight"].abs().max() <= limit
        assert not state[f"attn_pool.{name}.bias"].any()
    assert 0.9 * math.sqrt(6 / 129) < state["attn_pool.latent"].abs().max() <= math.sqrt(6 / 129)  # flax's fans of (1, 1, D)
    learned = VisionTransformer(**sizes, pos_embed="learned2d", pos_embed_at="every_layer").state_dict()
    assert learned["pos_embed_rows"].shape == learned["pos_embed_columns"].shape == (2, 32, 64)
    assert learned["pos_embed_prefix"].shape == (2, 1, 128)
    assert learned["pos_embed_columns"].std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_weights_are_drawn_again_as_at_first(options: dict[str, Any]) -> None:
    model = tiny(**options)
    torch.manual_seed(7)
    model.reset_parameters()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        nn.init.constant_(parameter, 3.0)
    torch.manual_seed(7)
    model.reset_parameters()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, first[name]), name


@torch.no_grad()
def test_a_hybrid_cuts_its_patches_from_the_backbones_map() -> None:
    stem = ResNetStem(units=(1, 1), width=32, root="small")
    model = tiny(backbone=stem, patch_size=2, image_size=(24, 16))
    randomise(model)
    assert model.grid_size == (6, 4)
    images = pixels(2, 24, 16)
    projection = model.patch_embed.proj
    expected = F.conv2d(stem(images), projection.weight, projection.bias, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.patch_embed(images), expected, atol=1e-5, rtol=1e-5)
    assert model.units() == [*stem.units(), *model.blocks]
    assert model(images).shape == (2, 10)
    with pytest.raises(ValueError, match="stride, 4, does not divide image_size 24x18"):
        tiny(backbone=stem, patch_size=2, image_size=(24, 18))


def test_units_are_the_blocks() -> None:
    for options in ({}, {"attention": "axial", "pool": "gap"}):
        model = tiny(**options)
        assert model.units() == list(model.blocks)


@torch.no_grad()
def test_every_combination_that_the_config_takes_runs() -> None:
    """And those it refuses are known; both by the thousand."""
    axes: dict[str, list[Any]] = {
        "pos_embed": ["none", "learned", "learned2d", "relative", "sincos2d"],
        "pos_embed_at": ["stem", "every_layer", "shared"],
        "pool": ["token", "gap", "map"],
        "attention": ["full", "axial"],
        "registers": [0, 2],
        "patch_dropout": [0.0, 0.5],
        "qk_norm": [False, True],
    }
    images, taken, refused = pixels(2, 16, 16), 0, 0
    for values in product(*axes.values()):
        options = dict(zip(axes, values))
        section = resolve_model(ModelConfig(patch_size=8, width=8, depth=2, num_heads=2, mlp_dim=8, **options))
        if model_problem(section, (16, 16)) is not None:
            refused += 1
            continue
        model = build_model(section, image_size=(16, 16), num_classes=2).train()
        assert model(images).shape == (2, 2), options
        taken += 1
    everywhere, stem_only = 2 * 3, 3  # (kind, place) pairs of learned positions; kinds that are for the stem
    full = 3 * 2 * 2 * ((everywhere + stem_only) * 2 - 1)  # pools x registers x qk_norm; relative ones take no patch dropout
    axial = 2 * 2 * (everywhere + stem_only - 1)  # gap and map x qk_norm; no relative ones
    assert taken == full + axial
    assert taken + refused == 5 * 3 * 3 * 2 * 2 * 2 * 2
