"""From a config to the model that a run trains, and what that costs; where it learns from labels, a model like any other."""

from torch import nn

from vitcli.config import Config
from vitcli.model_config import ModelConfig
from vitcli.models import Model, VisionTransformer, build_model
from vitcli.models.flops import Cost, activation_bytes, block_cost, forward_flops, linear, norm, training_flops
from vitcli.objective_config import hidden_patches
from vitcli.objectives.modules import MaskedAutoencoder, MaskedPrediction, Target
from vitcli.objectives.targets import COLOURS

__all__ = ["build_learner", "describe_objective", "flops_per_image", "kept_bytes", "units_of"]

ERROR: dict[str, Target] = {"mean_colour": "mean_colour", "colours": "colours", "pixels": "squared"}


def build_learner(config: Config, *, num_classes: int) -> Model:
    """Build what a resolved config trains: the model, and with an objective that needs no labels what predicts patches.

    Encoder tensors are the same, name by name and number by number, as of the model alone; the others are `objective.*`.
    """
    data, objective = config.data, config.objective
    model = build_model(
        config.model,
        image_size=data.image_size,
        num_classes=num_classes if objective.needs_labels else 0,
        patch_permutation=data.patch_permutation,
    )
    if not objective.needs_labels:
        assert isinstance(model, VisionTransformer)
        model.objective = build_objective(config, model)
    return model


def build_objective(config: Config, model: VisionTransformer) -> nn.Module:
    """Build what predicts patches."""
    section, objective = config.model, config.objective
    assert section.width and section.patch_size
    count = hidden_patches(objective, model.grid_size)
    if objective.name == "mae":
        assert objective.decoder_width and objective.decoder_depth and objective.decoder_heads
        return MaskedAutoencoder(
            width=section.width,
            patch_size=section.patch_size,
            count=count,
            grid_size=model.grid_size,
            first_tokens=model.num_prefix_tokens + model.num_registers,
            decoder_width=objective.decoder_width,
            decoder_depth=objective.decoder_depth,
            decoder_heads=objective.decoder_heads,
            gelu=section.gelu,
            layer_norm_eps=section.layer_norm_eps,
        )
    return MaskedPrediction(
        width=section.width,
        patch_size=section.patch_size,
        count=count,
        target="absolute" if objective.target is None else ERROR[objective.target],
        mean=config.data.mean,
        std=config.data.std,
    )


def units_of(model: Model) -> list[nn.Module]:
    """Return the repeated parts of a model and of its decoder, for sharding and for computing activations again."""
    objective = model.objective if isinstance(model, VisionTransformer) else None
    return [*model.units(), *(objective.blocks if isinstance(objective, MaskedAutoencoder) else ())]


# ---------------------------------------------------------------- what it costs


def flops_per_image(config: Config, *, num_classes: int) -> tuple[int, int]:
    """Return the operations of a forward pass and of a training step on one image, by a resolved config."""
    size = config.data.image_size
    if config.objective.needs_labels:
        return (
            forward_flops(config.model, image_size=size, num_classes=num_classes),
            training_flops(config.model, image_size=size, num_classes=num_classes),
        )
    step = training_flops(shown(config), image_size=size, num_classes=0) + 6 * predictor_cost(config).multiply_adds
    return step // 3, step


def kept_bytes(config: Config, model: ModelConfig, *, checkpointing: bool) -> int:
    """Estimate what an image keeps in memory between forward and backward pass, in float32; `model` is resolved."""
    size, objective = config.data.image_size, config.objective
    if objective.needs_labels:
        return activation_bytes(model, image_size=size, checkpointing=checkpointing)
    config = config.model_copy(update={"model": model})
    return activation_bytes(shown(config), image_size=size, checkpointing=checkpointing) + predictor_cost(config).bytes(4)


def shown(config: Config) -> ModelConfig:
    """Return the model section of an encoder that sees as many patches as the objective shows: MAE's visible ones alone."""
    hidden = config.objective.mask_ratio if config.objective.name == "mae" else 0.0
    return config.model.model_copy(update={"patch_dropout": hidden})


def predictor_cost(config: Config) -> Cost:
    """Cost what predicts patches, for one image."""
    section, objective = config.model, config.objective
    assert section.patch_size and section.width
    rows, columns = (side // section.patch_size for side in config.data.image_size)
    patches, count = rows * columns, hidden_patches(objective, (rows, columns))
    pixels = 3 * section.patch_size**2
    if objective.name != "mae":
        outputs = {None: pixels, "pixels": pixels, "mean_colour": COLOURS, "colours": 16 * COLOURS}[objective.target]
        return linear(section.width, outputs, times=count) + Cost(kept=count * outputs)  # the logits
    width, heads = objective.decoder_width, objective.decoder_heads
    assert width and heads and objective.decoder_depth
    first = (section.pool == "token") + section.registers
    decoder = ModelConfig(width=width, mlp_dim=4 * width, num_heads=heads)
    block = block_cost(decoder, tokens=first + patches, seen=first + patches)
    cost = linear(section.width, width, times=first + patches - count)
    for _ in range(objective.decoder_depth):
        cost += block
    return cost + norm(width, times=patches) + linear(width, pixels, times=count) + Cost(kept=count * pixels)


def describe_objective(config: Config) -> str:
    """Say in a few words what a resolved config makes a model learn without labels."""
    objective, side = config.objective, config.model.patch_size
    assert side
    rows, columns = (length // side for length in config.data.image_size)
    share = f"{hidden_patches(objective, (rows, columns))} of {rows * columns} patches"
    if objective.name == "masked_patch":
        colour = {"mean_colour": "their mean colour in 9 bits", "colours": "4 x 4 colours of 9 bits", "pixels": "their pixels"}
        return f"masked_patch: {share} corrupted, to predict {colour[objective.target or 'mean_colour']}"
    if objective.name == "simmim":
        return f"simmim: {share} hidden, in squares of {objective.mask_unit} x {objective.mask_unit}, to predict their pixels"
    decoder = f"width {objective.decoder_width}, depth {objective.decoder_depth}, {objective.decoder_heads} heads"
    return f"mae: {share} hidden, to predict their pixels from the others; decoder of {decoder}"
