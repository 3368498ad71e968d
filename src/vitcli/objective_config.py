"""The `objective` section: what pretraining learns from, labels or the patches that a model is not shown."""

from typing import Annotated, Literal

from pydantic import Field

from vitcli.model_config import ModelConfig, kept_patches
from vitcli.section import Section, Size

__all__ = ["ObjectiveConfig", "hidden_patches", "objective_problem", "resolve_objective"]

# paper B.1.2 (15 % was worse), SimMIM (2111.09886) section 4.1, MAE (2111.06377) section 4
MASK_RATIOS = {"masked_patch": 0.5, "simmim": 0.6, "mae": 0.75}
ABOUT = {  # which objective reads a field, of those that not all do
    "target": "masked_patch",
    "mask_unit": "simmim",
    "decoder_width": "mae",
    "decoder_depth": "mae",
    "decoder_heads": "mae",
}


class ObjectiveConfig(Section):
    """What a model learns to do in pretraining; all but classification need no labels."""

    name: Literal["classification", "masked_patch", "simmim", "mae"] = Field(
        "classification",
        description="labels; or colours of corrupted patches (paper 4.6), pixels of hidden ones (SimMIM), or these by an "
        "encoder that sees the others alone (MAE)",
    )
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of the patches to be predicted; null takes 0.5, for simmim 0.6 and for mae 0.75, as published"
    )
    mask_unit: Size | None = Field(
        None, description="simmim: patches along each side of the squares that are hidden as one; null takes 2 where it divides"
    )
    target: Literal["mean_colour", "colours", "pixels"] | None = Field(
        None,
        description="masked_patch: the mean colour in 3 bits a channel (null), such colours of 4 x 4 parts, or pixels by their "
        "squared error",
    )
    decoder_width: Size | None = Field(None, description="mae: hidden size of the decoder; null takes half of the encoder's")
    decoder_depth: Annotated[int, Field(ge=1, le=1_000)] | None = Field(
        None, description="mae: blocks of the decoder; null takes a third of the encoder's"
    )
    decoder_heads: Size | None = Field(None, description="mae: attention heads of the decoder; null takes the encoder's")

    @property
    def needs_labels(self) -> bool:
        """Whether a source must say what its images show."""
        return self.name == "classification"


def resolve_objective(objective: ObjectiveConfig, model: ModelConfig, image_size: tuple[int, int]) -> ObjectiveConfig:
    """Return the section with every `null` that its objective reads replaced by a value; `model` is resolved."""
    if objective.needs_labels or model.kind != "vit":
        return objective
    assert model.patch_size and model.width and model.depth and model.num_heads
    chosen: dict[str, object] = {"mask_ratio": MASK_RATIOS[objective.name]}
    if objective.name == "masked_patch":
        chosen["target"] = "mean_colour"
    elif objective.name == "simmim":
        chosen["mask_unit"] = 1 if any(side // model.patch_size % 2 for side in image_size) else 2
    else:  # MAE's own of ViT-L: width 512 of 1024, 8 of 24 blocks, 16 heads of 16
        chosen |= {"decoder_width": model.width // 2, "decoder_depth": max(1, model.depth // 3)}
        chosen["decoder_heads"] = model.num_heads
    return objective.model_copy(update={key: value for key, value in chosen.items() if getattr(objective, key) is None})


def hidden_patches(objective: ObjectiveConfig, grid_size: tuple[int, int]) -> int:
    """Return how many of an image's patches are to be predicted, by a resolved section."""
    assert objective.mask_ratio is not None
    unit = objective.mask_unit or 1
    cells = (grid_size[0] // unit) * (grid_size[1] // unit)
    return (cells - kept_patches(cells, objective.mask_ratio)) * unit**2


def objective_problem(objective: ObjectiveConfig, model: ModelConfig, image_size: tuple[int, int]) -> tuple[str, str] | None:
    """Say which setting makes no sense with a resolved model, by its dotted key, and why; None where all do."""
    name = objective.name
    for field in ("mask_ratio", *ABOUT):
        if getattr(objective, field) is not None and ABOUT.get(field, name) != name:
            return f"objective.{field}", f"is for objective.name: {ABOUT[field]}, which is {name} here; leave it out"
    if objective.needs_labels:
        unread = objective.mask_ratio is not None
        return ("objective.mask_ratio", "hides patches, but objective.name is classification; leave it out") if unread else None
    if model.kind != "vit" or model.resnet_units is not None:
        what = f"model.kind: {model.kind}"
        if model.kind == "vit":
            what = "a hybrid, whose ResNet lets a patch's neighbours see it"
        return "objective.name", f"is {name}, which hides patches of a Vision Transformer, not of {what}; take classification"
    for wrong, key, why in (
        (model.pool == "map", "model.pool", f"is map, which learns from labels alone, and {name} uses none; take token or gap"),
        (model.representation_size is not None, "model.representation_size", f"is of a head, and {name} has none; drop it"),
        (model.distill_token, "model.distill_token", f"learns from a teacher's classes, and {name} has none; drop it"),
        (model.head_bias != 0, "model.head_bias", f"is of a head, and {name} has none; drop it"),
        (model.patch_dropout > 0, "model.patch_dropout", f"leaves out patches that {name} is to predict; take 0"),
        (
            name == "mae" and model.attention == "axial",
            "model.attention",
            "is axial, but the patches that mae shows make no rows and columns; take full",
        ),
        (
            name == "mae" and model.pos_embed == "relative",
            "model.pos_embed",
            "is relative, which needs every patch in its place, and mae shows some alone; take another",
        ),
    ):
        if wrong:
            return key, why
    return size_problem(resolve_objective(objective, model, image_size), model, image_size)


def size_problem(objective: ObjectiveConfig, model: ModelConfig, image_size: tuple[int, int]) -> tuple[str, str] | None:
    """Say which size of a resolved section does not fit the patches or the decoder, as `objective_problem`."""
    assert model.patch_size
    rows, columns = (side // model.patch_size for side in image_size)
    unit, width, heads = objective.mask_unit or 1, objective.decoder_width, objective.decoder_heads
    if rows % unit or columns % unit:
        return "objective.mask_unit", f"is {unit}, which does not divide the grid of {rows} x {columns} patches"
    if hidden_patches(objective, (rows, columns)) == 0:
        return "objective.mask_ratio", f"is {objective.mask_ratio}, which hides none of {rows} x {columns} patches; take more"
    if objective.target == "colours" and model.patch_size % 4:
        return "objective.target", f"is colours, of 4 x 4 parts of a patch, but model.patch_size is {model.patch_size}"
    if width is not None and heads is not None and (width % 4 or width < 8 or width % heads):
        return "objective.decoder_width", f"is {width}; expected 8 or more that 4 and objective.decoder_heads ({heads}) divide"
    return None
