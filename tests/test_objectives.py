"""Pretraining without labels: masks, targets, what reaches what, and the same losses as transformers."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.oracles import randomise
from vitcli.config import Config
from vitcli.config_file import load_config
from vitcli.data.transforms import normalise
from vitcli.errors import ConfigError
from vitcli.models import VisionTransformer
from vitcli.objective_config import hidden_patches
from vitcli.objectives import build_learner, flops_per_image, training_masks
from vitcli.objectives.masks import HIDDEN, UNCHANGED, evaluation_masks, shares
from vitcli.objectives.targets import colour_classes, normalised, patches_of, pixels_of
from vitcli.plan import resolve

CPU = torch.device("cpu")
MODEL = {"patch_size": 4, "width": 32, "depth": 2, "num_heads": 2}
NAMES = ["masked_patch", "simmim", "mae"]


def settled(name: str, *, model: dict[str, Any] | None = None, size: Any = (16, 24), **objective: Any) -> Config:
    config = Config.model_validate(
        {
            "model": MODEL | (model or {}),
            "data": {"source": "shapes", "image_size": size, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
            "objective": {"name": name, **objective},
            "train": {"steps": 2, "batch_size": 4},
        }
    )
    return resolve(config, train_examples=100, val_examples=10, device=CPU)


def learner(config: Config) -> VisionTransformer:
    model = build_learner(config, num_classes=0)
    assert isinstance(model, VisionTransformer)
    return randomise(model)


def pixels(count: int, size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def images_of(config: Config, count: int = 3) -> Tensor:
    return normalise(pixels(count, config.data.image_size), mean=config.data.mean, std=config.data.std)


def masks_for(config: Config, count: int = 3, *, step: int = 0) -> Tensor:
    grid_size = tuple(side // 4 for side in config.data.image_size)
    return training_masks(config.objective, grid_size=grid_size, seed=0, step=step, indices=np.arange(count))  # type: ignore[arg-type]


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(("grid", "count"), [((14, 14), 98), ((8, 8), 32), ((3, 5), 7)])
def test_masked_patch_corrupts_exactly_the_papers_shares(grid: tuple[int, int], count: int) -> None:
    objective = settled("masked_patch").objective
    masks = training_masks(objective, grid_size=grid, seed=1, step=2, indices=np.arange(500))
    own = torch.arange(grid[0] * grid[1])
    hidden, unchanged = (masks == HIDDEN).sum(1), (masks == UNCHANGED).sum(1)
    others = ((masks >= 0) & (masks != own)).sum(1)
    assert hidden_patches(objective, grid) == count
    for found, expected in zip((hidden, others, unchanged), shares(count), strict=True):
        assert (found == expected).all()
    assert abs(hidden[0] / count - 0.8) < 0.06 and abs(others[0] / count - 0.1) < 0.06
    assert masks.max() < len(own) and ((masks != own).float().mean(0) - count / len(own)).abs().max() < 0.12  # everywhere alike
    shown = masks[(masks >= 0) & (masks != own)]
    assert torch.bincount(shown, minlength=len(own)).min() > 0  # any patch may stand for another


def test_masks_depend_on_seed_step_and_index_alone() -> None:
    objective = settled("mae").objective

    def draw(indices: Any, seed: int = 0, step: int = 0) -> Tensor:
        return training_masks(objective, grid_size=(4, 6), seed=seed, step=step, indices=np.array(indices))

    whole = draw([5, 7, 9, 5])
    assert torch.equal(torch.cat([draw([5, 7]), draw([9, 5])]), whole) and torch.equal(whole[0], whole[3])
    for other in (draw([5], seed=1), draw([5], step=1), draw([6])):
        assert not torch.equal(other[0], whole[0])
    assert ((whole == HIDDEN).sum(1) == 18).all()  # 75 % of 24
    fixed = evaluation_masks(objective, grid_size=(4, 6), indices=[5])
    assert torch.equal(fixed, evaluation_masks(objective, grid_size=(4, 6), indices=[4, 5])[1:])


def test_simmim_hides_whole_squares() -> None:
    objective = settled("simmim").objective
    assert (objective.mask_unit, objective.mask_ratio) == (2, 0.6)
    hidden = training_masks(objective, grid_size=(4, 6), seed=0, step=0, indices=np.arange(50)).unflatten(1, (2, 2, 3, 2)) < 0
    assert (hidden == hidden[:, :, :1, :, :1]).all() and (hidden.sum((1, 2, 3, 4)) == 16).all()  # 4 of 6 squares


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("parts", [1, 4])
def test_colours_are_those_of_a_plain_loop(parts: int) -> None:
    found = colour_classes(pixels(2).float(), 8, parts=parts)
    array = pixels(2).numpy().transpose(0, 2, 3, 1).astype(np.int64)
    small = 8 // parts
    for image, row, column, i, j in itertools.product(range(2), range(2), range(3), range(parts), range(parts)):
        top, left = row * 8 + i * small, column * 8 + j * small
        mean = array[image, top : top + small, left : left + small].mean((0, 1))
        red, green, blue = (int(channel // 32) for channel in mean)
        assert found[image, row * 3 + column, i * parts + j] == 64 * red + 8 * green + blue
    edges = torch.tensor([0.0, 31, 32, 255])[:, None, None, None].expand(4, 3, 8, 8)
    assert colour_classes(edges, 8).flatten().tolist() == [0, 0, 73, 511]


def test_pixels_come_back_whole() -> None:
    config = settled("masked_patch")
    back = pixels_of(images_of(config), mean=config.data.mean, std=config.data.std)
    assert torch.equal(back, pixels(3).float())
    cut = patches_of(back, 4)
    assert torch.equal(cut[0, 7].view(4, 4, 3), back[0, :, 4:8, 4:8].permute(1, 2, 0))  # row 1, column 1 of 6 columns
    assert normalised(cut).mean(2).abs().max() < 1e-5 and (normalised(cut).var(2) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("target", ["mean_colour", "colours", "pixels"])
def test_only_corrupted_patches_are_asked_for(target: str) -> None:
    """A frozen encoder and one changed pixel: the loss changes where that patch is to be predicted, and else does not."""
    config = settled("masked_patch", target=target)
    model, images, masks = learner(config), images_of(config, 1), masks_for(config, 1)
    model.embedded = lambda images: torch.zeros(1, 24, 32)  # type: ignore[method-assign]  # so that nothing is seen of them
    before = model(images, masks)[0, 0]
    for patch in range(24):
        changed = images.clone()
        row, column = divmod(patch, 6)
        changed[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] *= -1
        assert (model(changed, masks)[0, 0] == before) == (masks[0, patch] == patch)


# ---------------------------------------------------------------- what reaches what


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "extra", [{}, {"pool": "gap", "registers": 2, "pos_embed": "learned2d", "pos_embed_at": "every_layer"}]
)
def test_gradients_reach_every_tensor_and_names_stay(name: str, extra: dict[str, Any]) -> None:
    config = settled(name, model=extra)
    model = learner(config)
    model.train()(images_of(config), masks_for(config))[:, 0].mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    alone = set(build_learner(settled("classification", model=extra), num_classes=5).state_dict())
    names = set(model.state_dict())
    assert {each for each in names if not each.startswith("objective.")} == {e for e in alone if not e.startswith("head.")}


def test_corrupted_embeddings_are_what_the_masks_say() -> None:
    config = settled("masked_patch", mask_ratio=0.9)
    model, images, masks = learner(config), images_of(config), masks_for(config)
    given: list[Tensor] = []
    encoded = model.encoded
    model.encoded = lambda x, **how: given.append(x) or encoded(x, **how)  # type: ignore[method-assign,func-returns-value]
    model(images, masks)
    x, token = model.embedded(images), model.objective.mask_token[0, 0]  # type: ignore[union-attr,index]
    for image, patch in itertools.product(range(3), range(24)):
        source = int(masks[image, patch])
        expected = token if source == HIDDEN else x[image, patch if source == UNCHANGED else source]
        assert torch.equal(given[0][image, patch], expected)


@pytest.mark.parametrize("name", ["simmim", "mae"])
def test_the_encoder_does_not_see_hidden_patches(name: str) -> None:
    config = settled(name)
    model, images, masks = learner(config), images_of(config), masks_for(config)
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    hidden = (masks == HIDDEN).view(-1, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for shown in (images, torch.where(hidden, noise, images), torch.where(hidden, images, noise)):
        model(shown, masks)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    if name == "mae":
        assert seen[0].shape == (3, 1 + 6, 32)  # the class token and a quarter of 24 patches


# ---------------------------------------------------------------- against transformers

THEIRS: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=16, patch_size=4
)
ORACLE = {"gelu": "exact", "layer_norm_eps": 1e-12}


def block_from(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return a block of theirs by our names."""
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    found = {f"{ours}.{kind}": state[f"{prefix}.{name}.{kind}"] for ours, name in names.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        found[f"attn.qkv.{kind}"] = torch.cat([state[f"{prefix}.attention.{part}_proj.{kind}"] for part in "qkv"])
    return found


def encoder_from(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"cls_token": state["vit.embeddings.cls_token"], "pos_embed": state["vit.embeddings.position_embeddings"]}
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = state[f"vit.embeddings.patch_embeddings.projection.{kind}"]
        found[f"norm.{kind}"] = state[f"vit.layernorm.{kind}"]
    for number in range(2):
        found |= {f"blocks.{number}.{key}": value for key, value in block_from(state, f"vit.layers.{number}").items()}
    return found


@pytest.mark.slow
def test_mae_is_transformers_vit_mae() -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    decoder = dict(decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=4)
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**THEIRS, **decoder, decoder_intermediate_size=64, norm_pix_loss=True))
    randomise(theirs)
    config = settled("mae", model=ORACLE, size=16, decoder_width=16, decoder_depth=2, decoder_heads=4)
    model, state = learner(config), theirs.state_dict()
    ours = encoder_from(state) | {"objective.mask_token": state["decoder.mask_token"]}
    for kind in ("weight", "bias"):
        for name, theirs_name in (("embed", "embed"), ("norm", "norm"), ("predict", "pred")):
            ours[f"objective.{name}.{kind}"] = state[f"decoder.decoder_{theirs_name}.{kind}"]
    for number in range(2):
        block = block_from(state, f"decoder.decoder_layers.{number}")
        ours |= {f"objective.blocks.{number}.{key}": value for key, value in block.items()}
    model.load_state_dict(ours, strict=True)
    model.objective.positions = state["decoder.decoder_pos_embed"]  # type: ignore[union-attr]  # theirs have other frequencies
    images, masks = images_of(config, 5), masks_for(config, 5)
    noise = (masks == HIDDEN).float() + torch.arange(16) / 100  # they show the patches with the least
    expected = theirs(images, noise=noise)
    assert torch.equal(expected.mask.bool(), masks == HIDDEN)
    torch.testing.assert_close(model(images, masks)[:, 0].mean(), expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_simmim_is_transformers_masked_image_modelling() -> None:
    from transformers import ViTConfig, ViTForMaskedImageModeling

    theirs = randomise(ViTForMaskedImageModeling(ViTConfig(**THEIRS, encoder_stride=4)))
    config = settled("simmim", model=ORACLE, size=16)
    model, state = learner(config), theirs.state_dict()
    ours = encoder_from(state) | {"objective.mask_token": state["vit.embeddings.mask_token"]}
    # their convolution's outputs are by channel, row and column (PixelShuffle), ours by row, column and channel
    ours["objective.predict.weight"] = state["decoder.0.weight"].view(3, 4, 4, 32).permute(1, 2, 0, 3).reshape(48, 32)
    ours["objective.predict.bias"] = state["decoder.0.bias"].view(3, 4, 4).permute(1, 2, 0).reshape(48)
    model.load_state_dict(ours, strict=True)
    images, masks = images_of(config, 5), masks_for(config, 5)
    expected = theirs(images, bool_masked_pos=masks == HIDDEN).loss
    torch.testing.assert_close(model(images, masks)[:, 0].mean(), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- settings and costs


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    config = settled(name, size=(32, 32), model={"pool": "gap"})
    model = learner(config).train()
    images, masks = images_of(config, 1), masks_for(config, 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not know the CPU's fused one
        model(images, masks)
    assert flops_per_image(config, num_classes=0)[0] == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.variant=R50x1"],
            r"objective.name is mae, which hides patches of a Vision Transformer, not of model.kind: resnet",
        ),
        (["model.variant=R50+B/16", "data.image_size=64"], r"objective.name is mae, .* a hybrid"),
        (["model.pool=map"], r"model.pool is map, .*token or gap"),
        (["train.label_smoothing=0.1"], r"train.label_smoothing is about labels"),
        (["augment.mixup=0.2"], r"augment.mixup is about labels"),
        (["objective.target=pixels"], r"objective.target is for objective.name: masked_patch"),
        (["objective.name=classification"], r"objective.decoder_depth is for objective.name: mae"),
        (["objective.mask_ratio=0.01"], r"objective.mask_ratio is 0.01, which hides none of 4 x 4 patches"),
        (["objective.decoder_width=18"], r"objective.decoder_width is 18; expected"),
        (["objective.decoder_depth=null", "objective.name=simmim", "objective.mask_unit=3"], r"mask_unit is 3, which does not"),
        (["model.pos_embed=relative"], r"model.pos_embed is relative"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], message: str, tmp_path: Any) -> None:
    path = tmp_path / "mae.yaml"
    path.write_text(
        "model: {patch_size: 4, width: 32, depth: 2, num_heads: 2}\ndata: {source: shapes, image_size: 16}\n"
        "objective: {name: mae, decoder_depth: 2}\ntrain: {steps: 2}\n"
    )
    load_config(path)
    kinds = [f"model.{key}=null" for key in MODEL] if "variant" in words[0] else []
    with pytest.raises(ConfigError, match=message):
        load_config(path, [*kinds, *words])


def test_a_learner_without_masks_is_its_encoder() -> None:
    config = settled("mae")
    model, images = learner(config), images_of(config)
    bare = copy.deepcopy(model)
    bare.objective = None
    assert torch.equal(model(images), bare.features(images)) and model(images).shape == (3, 32)
