"""What `vit inspect` computes, against plain computations written out here, and against other libraries."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from vitcli.inspection import attention as attending
from vitcli.inspection.attention import (
    FUSIONS,
    attention_distances,
    attention_of_image,
    head_maps,
    patch_centres,
    pool_maps,
    reading,
    rollout,
)
from vitcli.inspection.embeddings import (
    filter_components,
    filters_of,
    neighbour_similarity,
    position_similarity,
    positions_of,
    spread_places,
)
from vitcli.inspection.fields import effective_fields, field_centre, field_radius
from vitcli.inspection.layers import attention_names, attentions, layer_names, run, split_tokens
from vitcli.inspection.similarity import Alignment, as_vectors, gram
from vitcli.inspection.tokens import feature_colours, lengths_of
from vitcli.models import PixelMlp, ResNet, ResNetStem, VisionTransformer, attention_maps
from vitcli.models.positions import sincos2d_positions

OPTIONS: list[dict[str, Any]] = [
    {"pool": "token"},
    {"pool": "token", "registers": 2},
    {"pool": "gap"},
    {"pool": "map", "registers": 1},
    {"pool": "gap", "pos_embed": "relative"},
    {"pool": "gap", "attention": "axial"},
]


def named(options: dict[str, Any]) -> str:
    return " ".join(str(value) for value in options.values())


def transformer(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": (16, 24), "patch_size": 8, "width": 32, "depth": 2, "num_heads": 4, "mlp_dim": 48, "num_classes": 3}
    model = VisionTransformer(**{**sizes, **options}).eval()  # 2 x 3 patches
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def pixels(count: int, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("most", [1, 3, 5, 100])
def test_weights_by_rows_are_the_weights(options: dict[str, Any], most: int) -> None:
    model = transformer(**options)
    given, _ = attention_of_image(model, pixels(2))
    for (attention, x), whole in zip(given, attention_maps(model, pixels(2)), strict=True):
        parts = list(attention.weight_rows(x, most=most))
        assert all(part.shape[2] <= most for part in parts)
        torch.testing.assert_close(torch.cat(parts, dim=2), whole)


def plain_distance(weights: Tensor, before: int) -> list[list[float]]:
    """Return the distances, [image][head], of weights (B, A, N, N) among 2 x 3 patches of 8 px, as the words say it."""
    result = []
    for image in weights.tolist():
        heads = []
        for head in image:
            total = 0.0
            for asking in range(6):
                row = head[before + asking][before:]
                for other in range(6):
                    down = 8 * (asking // 3 - other // 3)
                    across = 8 * (asking % 3 - other % 3)
                    total += row[other] / sum(row) * math.sqrt(down**2 + across**2)
            heads.append(total / 6)
        result.append(heads)
    return result


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("most_bytes", [1, 700, 1 << 20])
def test_distance_is_the_plain_one(options: dict[str, Any], most_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "MOST_BYTES", most_bytes)
    model = transformer(**options)
    before = model.num_prefix_tokens + model.num_registers
    given, _ = attention_of_image(model, pixels(2))
    centres = patch_centres((2, 3), (16, 24))
    for (attention, x), weights in zip(given, attention_maps(model, pixels(2)), strict=True):
        found, elsewhere = attention_distances(attention, x, centres=centres, before=before)
        torch.testing.assert_close(found, torch.tensor(plain_distance(weights, before)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(elsewhere, weights[:, :, before:, :before].sum(-1).mean(-1), rtol=1e-4, atol=1e-5)


def test_distance_of_attention_to_oneself_is_zero_and_to_all_is_that_of_a_grid() -> None:
    model = transformer(pool="gap")
    attention = attentions(model)[0]
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.bias.zero_()
    found, _ = attention_distances(attention, torch.randn(1, 6, 32), centres=patch_centres((2, 3), (16, 24)), before=0)
    pairs = [math.dist(a, b) for a in itertools.product((0, 8), (0, 8, 16)) for b in itertools.product((0, 8), (0, 8, 16))]
    torch.testing.assert_close(found, torch.full((1, 4), sum(pairs) / 36))
    with torch.no_grad():  # queries and keys are the input, far apart: each patch sees itself
        attention.qkv.weight[:64] = 40.0 * torch.eye(32).repeat(2, 1)
    alone = torch.zeros(1, 6, 32)
    alone[0, :, :6] = torch.eye(6)
    alone = alone.repeat(1, 1, 1) + alone.roll(8, 2) + alone.roll(16, 2) + alone.roll(24, 2)
    found, _ = attention_distances(attention, alone, centres=patch_centres((2, 3), (16, 24)), before=0)
    assert float(found.max()) < 1e-4


def plain_rollout(maps: list[Tensor], fuse: str, residual: bool) -> NDArray[np.float64]:
    """Return the product of all layers' matrices (N, N) of one image, made head by head and row by row."""
    tokens = maps[0].shape[-1]
    product = np.eye(tokens)
    for weights in maps:
        heads = weights[0].double().numpy()
        fused = np.zeros((tokens, tokens))
        for row, column in np.ndindex(tokens, tokens):
            values = [head[row, column] for head in heads]
            fused[row, column] = {"mean": sum(values) / len(values), "max": max(values), "min": min(values)}[fuse]
        if residual:
            fused = fused + np.eye(tokens)
        product = (fused / fused.sum(axis=1, keepdims=True)) @ product
    return product


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("residual", [True, False])
def test_rollout_is_the_plain_product(
    options: dict[str, Any], fuse: Any, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attending, "MOST_BYTES", 600)  # a few rows at a time
    model, images = transformer(**options), pixels(1)
    given, last = attention_of_image(model, images)
    start = reading(model, last)
    torch.testing.assert_close(start.sum(1), torch.ones(1))
    found = rollout(given, start, fuse=fuse, residual=residual)
    expected = start[0].double().numpy() @ plain_rollout(attention_maps(model, images), fuse, residual)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-3, atol=1e-6)
    if not (options.get("attention") == "axial" and fuse == "min" and not residual):
        assert float(found.sum()) == pytest.approx(1.0, abs=1e-4)


def test_rollout_of_each_image_is_that_of_the_image_alone() -> None:
    model = transformer(registers=1)
    given, last = attention_of_image(model, pixels(3))
    together = rollout(given, reading(model, last), fuse="mean")
    for number in range(3):
        given, last = attention_of_image(model, pixels(3)[number : number + 1])
        torch.testing.assert_close(rollout(given, reading(model, last), fuse="mean")[0], together[number])


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_maps_of_heads_are_rows_of_the_weights(options: dict[str, Any]) -> None:
    model = transformer(**options)
    before = model.num_prefix_tokens + model.num_registers
    given, last = attention_of_image(model, pixels(2))
    for (attention, x), weights in zip(given, attention_maps(model, pixels(2)), strict=True):
        expected = weights[:, :, 0, before:] if options["pool"] == "token" else weights[:, :, before:, before:].mean(2)
        torch.testing.assert_close(head_maps(model, attention, x), expected.unflatten(2, (2, 3)))
    pool = pool_maps(model, last)
    assert (pool is None) == (options["pool"] != "map")
    if pool is not None and model.attn_pool is not None:
        shares = reading(model, last)
        torch.testing.assert_close(pool.flatten(2).mean(1), shares[:, before:])
        asked: list[Tensor] = []  # what the pool takes of one-hot values is what it weighs them with
        tokens = model.norm(last[:, before:])
        q, k, _ = model.attn_pool.heads(tokens)
        scores = torch.einsum("baqd,bakd->baqk", q, k) / math.sqrt(8)
        asked.append(scores.softmax(-1)[:, :, 0])
        torch.testing.assert_close(asked[0], pool.flatten(2))


def test_looking_leaves_the_model_as_it_was() -> None:
    model, images = transformer(), pixels(2)
    expected = model(images)
    attention_of_image(model, images)
    effective_fields(model, images, layers=[0, 2], first=0, seed=0)
    assert torch.equal(model(images), expected)
    hooks = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="px"):
        attention_of_image(model, pixels(1, 8, 8))
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


# ---------------------------------------------------------------- layers


def test_layers_are_what_the_blocks_make_with_all_tokens() -> None:
    model, images = transformer(registers=1), pixels(2)
    seen: dict[int, Tensor] = {}
    run(model, images, layer=seen.__setitem__)
    assert layer_names(model) == ["embedding", "block 1", "block 2"] and sorted(seen) == [0, 1, 2]
    with torch.no_grad():
        torch.testing.assert_close(seen[1], model.blocks[0](seen[0]))
        torch.testing.assert_close(seen[2], model.blocks[1](seen[1]))
        torch.testing.assert_close(model.head(model.norm(seen[2][:, 0])), model(images))
    before, places = split_tokens(model, seen[2])
    assert before.shape == (2, 2, 32) and places.shape == (2, 32, 2, 3)
    assert torch.equal(places[:, :, 1, 2], seen[2][:, -1])


def test_every_kind_of_model_has_layers() -> None:
    torch.manual_seed(0)
    resnet = ResNet(image_size=(32, 32), units=(1, 2), width=8, group_norm_groups=4, num_classes=2).eval()
    mlp = PixelMlp(image_size=(8, 8), width=16, depth=2, mlp_dim=16, num_classes=2).eval()
    for model, size, names in (
        (resnet, 32, ["root", "unit 1", "unit 2", "unit 3"]),
        (mlp, 8, ["embedding", "block 1", "block 2"]),
    ):
        seen: dict[int, Tensor] = {}
        run(model, pixels(2, size, size), layer=seen.__setitem__)
        assert layer_names(model) == names and sorted(seen) == list(range(len(names)))
        assert all(split_tokens(model, output)[1].ndim == 4 for output in seen.values())
    assert attention_names(transformer(attention="axial", pool="gap"))[:2] == ["block 1 rows", "block 1 columns"]


# ---------------------------------------------------------------- weights


def test_components_are_those_of_scikit_learn() -> None:
    filters = np.random.default_rng(0).normal(size=(60, 3, 4, 4)) @ np.diag([4.0, 2.0, 1.0, 0.5])
    found, shares = filter_components(filters, most=28)
    oracle = PCA(28, svd_solver="full").fit(filters.reshape(60, -1))
    np.testing.assert_allclose(shares, oracle.explained_variance_ratio_, rtol=1e-9)
    similar = np.abs((found.reshape(28, -1) * oracle.components_).sum(1))
    np.testing.assert_allclose(similar, 1.0, atol=1e-8)
    assert filter_components(filters[:5], most=28)[0].shape == (4, 3, 4, 4)


def test_positions_are_compared_as_scikit_learn_does() -> None:
    positions, words = positions_of(transformer(pool="token", registers=2))
    assert positions is not None and positions.shape == (6, 32) and words == "learned"
    np.testing.assert_allclose(position_similarity(positions), cosine_similarity(positions), atol=1e-12)
    some = np.array([4, 1])
    np.testing.assert_allclose(position_similarity(positions, some), cosine_similarity(positions)[some], atol=1e-12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pos_embed": "sincos2d"}, "fixed sines and cosines"),
        ({"pos_embed": "learned2d"}, "learned"),
        ({"pos_embed_at": "every_layer"}, "before the first block"),
        ({"pos_embed": "none"}, "no position embeddings"),
        ({"pos_embed": "relative"}, "relative positions"),
    ],
)
def test_what_positions_a_model_has_is_said(options: dict[str, Any], said: str) -> None:
    positions, words = positions_of(transformer(**options))
    assert said in words
    assert (positions is None) == (options.get("pos_embed") in ("none", "relative"))


def test_neighbours_are_alike_where_positions_are_smooth_and_not_where_they_are_random() -> None:
    smooth = sincos2d_positions(grid_size=(8, 8), width=64)[0].double().numpy()
    found = neighbour_similarity(smooth, (8, 8))
    assert found["neighbours"] > found["same_row"] > found["neither"]
    random = neighbour_similarity(np.random.default_rng(0).normal(size=(64, 64)), (8, 8))
    assert all(abs(value) < 0.05 for value in random.values())
    assert set(neighbour_similarity(smooth[:8], (1, 8))) == {"neighbours", "same_row"}
    rows, columns = spread_places((32, 7), most=16)
    assert len(rows) == 16 and rows[0] == 0 and rows[-1] == 31 and len(columns) == 7


def test_filters_are_those_that_read_pixels() -> None:
    assert filters_of(transformer())[0].shape == (32, 3, 8, 8)
    resnet = ResNet(image_size=(32, 32), units=(1,), width=8, group_norm_groups=4, num_classes=2)
    filters, words = filters_of(resnet)
    assert filters.shape == (8, 3, 7, 7) and "ResNet" in words
    np.testing.assert_allclose(filters.mean((1, 2, 3)), 0, atol=1e-6)  # as they are used: standardised
    assert filters_of(PixelMlp(image_size=(8, 8), width=16, depth=1, mlp_dim=16, num_classes=2))[0].shape == (16, 3, 8, 8)


# ---------------------------------------------------------------- CKA


def plain_hsic(k: NDArray[np.float64], m: NDArray[np.float64]) -> float:
    """Return HSIC as the mean over all ordered quadruples of images (Song et al., 2012, eq. 4 and 5)."""
    found = [
        k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
        for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]  # fmt: skip
    return sum(found) / len(found)


def test_cka_is_the_plain_one() -> None:
    draws = np.random.default_rng(0)
    cross, own_a, own_b = 0.0, 0.0, 0.0
    found = Alignment(1, 1)
    for count in (6, 7):
        x = draws.normal(size=(count, 5)) + 2.0
        y = x @ draws.normal(size=(5, 3)) + draws.normal(size=(count, 3))
        k, m = x @ x.T, y @ y.T  # not centred: the quadruples take a mean away by themselves
        cross, own_a, own_b = cross + plain_hsic(k, m), own_a + plain_hsic(k, k), own_b + plain_hsic(m, m)
        found.add(gram(torch.from_numpy(x))[None], gram(torch.from_numpy(y))[None])
    assert found.result()[0, 0] == pytest.approx(cross / math.sqrt(own_a * own_b), rel=1e-9)


def test_cka_of_many_images_nears_the_usual_formula_and_knows_no_rotation() -> None:
    draws = np.random.default_rng(1)
    x = draws.normal(size=(600, 8))
    y = np.tanh(x @ draws.normal(size=(8, 6))) + 0.3 * draws.normal(size=(600, 6))
    turn = np.linalg.qr(draws.normal(size=(8, 8)))[0]
    other = draws.normal(size=(600, 8))
    grams = [gram(torch.from_numpy(one))[None] for one in (x, y, 3 * x @ turn + 1, other)]
    values = []
    for one in grams:
        alignment = Alignment(1, 1)
        alignment.add(grams[0], one)
        values.append(float(alignment.result()[0, 0]))
    a, b = x - x.mean(0), y - y.mean(0)
    usual = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert values[1] == pytest.approx(usual, abs=0.01)
    assert values[0] == pytest.approx(1.0) and values[2] == pytest.approx(1.0)
    assert abs(values[3]) < 0.02


def test_a_layer_that_says_the_same_of_all_is_like_nothing() -> None:
    alignment = Alignment(1, 2)
    same = np.zeros((1, 5, 5))
    alignment.add(gram(torch.randn(5, 3, dtype=torch.float64))[None], np.concatenate([same, same + 0.0]))
    assert np.isnan(alignment.result()).all()


def test_vectors_hold_all_tokens_and_stay_small_for_large_images() -> None:
    before, places = torch.randn(2, 1, 4), torch.randn(2, 4, 16, 16)
    vectors = as_vectors(before, places)
    assert vectors.shape == (2, 4 + 4 * 256)
    assert torch.equal(vectors[:, :4], before[:, 0])
    assert as_vectors(before, torch.randn(2, 4, 96, 64)).shape == (2, 4 + 4 * 20 * 13)


# ---------------------------------------------------------------- tokens


def test_colours_are_the_components_of_scikit_learn() -> None:
    features = (
        torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([5, 3, 2, 1, 1, 1])[:, None, None]
    )
    found = feature_colours(features)
    assert found.shape == (2, 4, 5, 3) and found.min() >= 0 and found.max() <= 1
    oracle = PCA(3).fit_transform(features.permute(0, 2, 3, 1).reshape(-1, 6).numpy())
    for colour in range(3):
        assert abs(np.corrcoef(found.reshape(-1, 3)[:, colour], oracle[:, colour])[0, 1]) > 0.99
    assert (feature_colours(torch.ones(1, 2, 3, 3)) == 0.5).all()  # nothing to tell apart, nor three dimensions


def test_outliers_are_found() -> None:
    patches = np.ones((2, 50), np.float32)
    patches[0, 3] = 3.5
    found = lengths_of(patches, np.array([[2.0], [4.0]], np.float32))
    assert found.outliers == pytest.approx(0.01) and found.before == [3.0]
    assert found.quantiles["50 %"] == 1.0 and found.quantiles["100 %"] == 3.5
    patches[0, 3] = 2.9
    assert lengths_of(patches, np.zeros((2, 0), np.float32)).outliers == 0.0


# ---------------------------------------------------------------- receptive fields


def test_field_is_the_mean_of_the_whole_jacobian() -> None:
    torch.manual_seed(0)
    model = ResNet(image_size=(12, 12), units=(1,), width=4, root="small", group_norm_groups=2, num_classes=2).eval()
    image = pixels(1, 12, 12)

    def middle(x: Tensor) -> Tensor:
        y = model.stem(x)
        for stage in model.stages:
            y = stage(y)
        return y[0, :, 6, 6]

    jacobian = torch.autograd.functional.jacobian(middle, image)  # (16, 1, 3, 12, 12)
    expected = jacobian.double().square().sum(dim=(0, 1, 2)).numpy()
    expected = expected / expected.sum()
    drawn = [effective_fields(model, image, layers=[1], first=0, seed=seed)[0] for seed in range(60)]
    assert all(one.sum() == pytest.approx(1.0) for one in drawn)
    assert np.abs(np.mean(drawn, axis=0) - expected).sum() < 0.12
    assert np.abs(drawn[0] - expected).sum() > 0.02  # one draw is not the mean of many


def test_fields_grow_in_a_convolution_and_are_whole_in_a_transformer() -> None:
    torch.manual_seed(0)
    model = ResNet(image_size=(32, 32), units=(2, 2), width=8, root="small", group_norm_groups=4, num_classes=2).eval()
    fields = effective_fields(model, pixels(2, 32, 32), layers=[0, 1, 2, 4], first=0, seed=0)
    assert (fields[0] > 0).sum() == 9  # the root is one 3 x 3 convolution
    assert fields[0][15:18, 15:18].min() > 0
    centres = [field_centre(model, (side, side), convolved=True) for side in (32, 32, 32, 16)]
    radii = [field_radius(field, centre, share=0.5) for field, centre in zip(fields, centres)]
    assert radii == sorted(radii) and radii[-1] > radii[0]
    vit = transformer(pool="gap")
    embedding, block = effective_fields(vit, pixels(2), layers=[0, 1], first=0, seed=0)
    assert (embedding[8:, 8:16] > 0).all() and embedding[8:, 8:16].sum() == pytest.approx(1.0)
    assert (block > 0).all()


def test_the_centre_is_that_of_the_pixels_that_a_place_reads() -> None:
    torch.manual_seed(0)
    resnet = ResNet(image_size=(48, 64), units=(1, 1), width=8, group_norm_groups=4, num_classes=2).eval()
    root = effective_fields(resnet, pixels(1, 48, 64), layers=[0], first=0, seed=0)[0]
    assert middle_of(root) == field_centre(resnet, (12, 16), convolved=True)
    stem = ResNetStem(units=(), width=8, group_norm_groups=4)
    stem.stem.norm = None  # which would tell each place a little of all others
    for patch in (1, 2):
        hybrid = transformer(image_size=(48, 64), patch_size=patch, backbone=stem, pool="gap")
        embedding = effective_fields(hybrid, pixels(1, 48, 64), layers=[0], first=0, seed=0)[0]
        assert middle_of(embedding) == field_centre(hybrid, hybrid.grid_size, convolved=False)
    plain = transformer(pool="gap")
    assert middle_of(effective_fields(plain, pixels(1), layers=[0], first=0, seed=0)[0]) == (12.0, 12.0)
    assert field_centre(plain, (2, 3), convolved=False) == (12.0, 12.0)


def middle_of(field: NDArray[np.float64]) -> tuple[float, float]:
    """Return the middle of the box of the pixels that count."""
    rows, columns = (np.flatnonzero(field.sum(axis=axis) > 0) for axis in (1, 0))
    return (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2


def test_radius_holds_its_share() -> None:
    field, centre = np.full((20, 20), 1 / 400), (10.0, 10.0)
    radius = field_radius(field, centre, share=0.5)
    assert math.pi * radius**2 == pytest.approx(200, rel=0.08)
    point = np.zeros((20, 20))
    point[10, 10] = 1.0
    assert field_radius(point, centre, share=0.9) == pytest.approx(math.sqrt(0.5))
