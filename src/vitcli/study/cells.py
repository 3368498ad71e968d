"""What a study is made of: cells, the commands that are run for each, and what is measured.

A cell is one pretraining run and what is done with its weights. Names of metrics: `upstream` (top-1 on the pretraining set's
evaluation split), `fewshot:SET:SHOTS`, `finetune:SET`, `translate:PIXELS` (upstream, the evaluation images moved) and
`unchanged:PIXELS` (share of their first guesses that are those of the images as they were).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PLAIN", "UPSTREAM", "Cell", "Measurement", "Stage", "label"]

PLAIN = "plain"  # the variant without settings of its own
UPSTREAM = "upstream"


@dataclass(frozen=True)
class Stage:
    """One command of a cell. It is over when its file is there, and whoever runs it again finds that out by itself."""

    name: str
    words: tuple[str, ...]  # of the command line, after `vit`
    done: Path  # exists once the command has succeeded
    output: Path | None = None  # takes what the command prints, whole or not at all; then the same as `done`


@dataclass(frozen=True)
class Cell:
    """One model, pretrained on one amount of data with one seed, under one variant of the settings."""

    variant: str
    family: str
    examples: int  # in the pretraining set; in the one-pass form, what the whole run sees
    seed: int
    trial: bool  # one that a search compares, on a development split, as against one that is reported
    point: Mapping[str, Any]  # the settings that the search chooses, by dotted key
    folder: Path  # of the cell; its run directory is `run` in there
    stages: tuple[Stage, ...]  # in order
    steps: int
    batch_size: int
    readings: tuple[int, ...]  # images seen at which a one-pass run is read, ascending; () in the grid form
    parameters: int
    forward_flops: int  # per image, a multiply-add counts 2
    training_flops: int  # per image, forward and backward

    @property
    def run(self) -> Path:
        """Return the directory of the pretraining run."""
        return self.folder / "run"


@dataclass(frozen=True)
class Measurement:
    """One number that a reported cell yielded: what it was trained on so far, and how good it is."""

    variant: str
    family: str
    examples: int  # different images pretrained on: the set's size, or in the one-pass form the images seen so far
    seed: int
    metric: str
    value: float  # in [0, 1]
    count: int  # evaluation images behind it; 0 if that is not known
    images_seen: int  # repetitions count
    flops: float  # of all training so far
    predictions: Path | None = None  # the answer to every evaluation image, where they are kept


def label(cell: Cell) -> str:
    """Name a cell in a line of text."""
    which = f"trial {cell.folder.name.removeprefix('p')}" if cell.trial else f"seed {cell.seed}"
    return f"{cell.variant} / {cell.family} / n={cell.examples:,} / {which}"
