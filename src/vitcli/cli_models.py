"""`vit models`: what each variant, or a config's model, costs."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from vitcli.cli_options import Debug, say
from vitcli.errors import ConfigError

__all__ = ["models"]

# What the table shows: the Transformers of the paper and of AugReg and those that came later, hybrids, ResNets
LISTED = (
    *("Ti/16", "S/32", "S/16", "M/32", "M/16", "B/32", "B/16", "B/8", "L/32", "L/16", "H/14"),
    *("So400m/14", "g/14", "g-opt/14", "G/14", "G-opt/14", "e/14"),
    *("R+Ti/16", "R26+S/32", "R26+B/32", "R50+B/32", "R50+B/16", "R50+L/32", "R50+L/16"),
    *("R14x1", "R26x1", "R50x1", "R50x2", "R50x3", "R101x1", "R101x3", "R152x1", "R152x2", "R152x4", "R200x3"),
)
HEAD = ("model", "parameters", "GFLOPs forward", "in training", "MiB activations", "tokens")


def models(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME] [KEY=VALUE]",
            help="variants such as B/16, R50+B/16 or R50x1; default many; and settings such as model.pool=gap",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="the model of this file instead of variants", show_default=False)
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option("--image-size", help="px, such as 224, or 192x256; default the file's, else 224", show_default=False),
    ] = None,
    classes: Annotated[int, typer.Option("--classes", min=1, max=10**9, help="outputs of the head")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
    debug: Debug = False,
) -> None:
    """List models with their parameters, FLOPs, memory for activations, and tokens, per image.

    Computed from the settings alone. A multiply-add counts as two FLOPs; training takes three forward passes. Activations are
    what a float32 training step keeps of each image for the backward pass.
    """
    names = [word for word in words or [] if "=" not in word]
    overrides = [word for word in words or [] if "=" in word]
    if config is not None and names:
        raise ConfigError(f"{names[0]}: --config {config} says which model; drop one of them, or add model.variant={names[0]}")
    sides = None if image_size is None else as_sides(image_size)
    chosen = [str(config)] if config is not None else names or [name for name in LISTED if fits(name, sides)]
    settings = overrides if sides is None else [*overrides, f"data.image_size=[{sides[0]},{sides[1]}]"]
    rows = [row_of(name, config, settings, classes=classes) for name in chosen]
    left_out = [name for name in LISTED if name not in chosen] if config is None and not names else []
    if as_json:
        say(json.dumps({"classes": classes, "models": rows, "left_out": left_out}))
        return
    for line in table(rows):
        say(line)
    if left_out:
        say(f"left out at {image_size} px, which their patches do not divide: {', '.join(left_out)}")


def as_sides(text: str) -> tuple[int, int]:
    """Read 224 or 192x256 as (height, width), px."""
    match = re.fullmatch(r"(\d{1,7})(?:x(\d{1,7}))?", text, re.ASCII)
    if match is None:
        raise ConfigError(f"--image-size {text!r}: expected px such as 224, or height x width such as 192x256")
    return int(match[1]), int(match[2] or match[1])


def fits(name: str, sides: tuple[int, int] | None) -> bool:
    """Tell whether a variant's patches divide an image."""
    from vitcli.model_config import ModelConfig, resolve_model, stem_stride

    model = resolve_model(ModelConfig(variant=name))
    patch = (model.patch_size or 1) * stem_stride(model)
    return sides is None or model.kind == "resnet" or not (sides[0] % patch or sides[1] % patch)


def row_of(name: str, path: Path | None, overrides: list[str], *, classes: int) -> dict[str, Any]:
    """Return a model's costs as plain numbers; raises ConfigError where the settings are wrong."""
    from vitcli.config_file import read_config
    from vitcli.model_config import resolve_model
    from vitcli.models import flops

    # what a whole config needs besides the model; nothing is opened
    base = {
        "model": {} if path else {"variant": name},
        "data": {"source": "folder:.", "image_size": 224},
        "train": {"steps": 1},
    }
    config, _ = read_config(path, overrides, base=base, base_name=name)
    model, sides = resolve_model(config.model), config.data.image_size
    sizes: dict[str, Any] = {"image_size": sides, "num_classes": classes}
    return {
        "model": name,
        "image_size": list(sides),
        "parameters": flops.count_parameters(model, **sizes),
        "forward_flops": flops.forward_flops(model, **sizes),
        "training_flops": flops.training_flops(model, **sizes),
        "activation_bytes": flops.activation_bytes(model, image_size=sides),
        "tokens": flops.count_tokens(model, image_size=sides),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return rows as lines with columns that line up."""
    cells = [
        (
            row["model"],
            f"{row['parameters']:,}",
            f"{row['forward_flops'] / 1e9:,.2f}",
            f"{row['training_flops'] / 1e9:,.2f}",
            f"{row['activation_bytes'] / 2**20:,.1f}",
            "-" if row["tokens"] is None else f"{row['tokens']:,}",
        )
        for row in rows
    ]
    first, *others = (max(len(line[column]) for line in (HEAD, *cells)) for column in range(len(HEAD)))
    return [
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
        for line in (HEAD, *cells)
    ]
