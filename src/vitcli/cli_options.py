"""Options that many commands share, and how a command prints."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Ckpt", "DataRoot", "Debug", "Overrides", "as_overrides", "say", "warn"]

Ckpt = Annotated[Path, typer.Option("--ckpt", help="run directory, checkpoint directory or weights file", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]", help="settings on top of the file, such as optim.lr=3e-4", show_default=False),
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", help="where data sets are looked for; else $VIT_DATA, else ~/.cache/vit", show_default=False),
]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]


def say(text: str) -> None:
    """Print a line; who stops reading, as `| head` does, does not stop the training."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(text: str) -> None:
    """Print a line on stderr, where it is not taken for a result."""
    typer.echo(text, err=True)


def as_overrides(words: list[str] | None, **options: Path | None) -> list[str]:
    """Put options that are short for a setting behind the overrides, so that they win."""
    said = [
        f"{key.replace('__', '.')}={json.dumps(str(value), ensure_ascii=False)}"
        for key, value in options.items()
        if value is not None
    ]
    return [*(words or []), *said]
