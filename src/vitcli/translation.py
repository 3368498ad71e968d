"""How a model takes it when the evaluation images move by a few pixels: is what it has learned bound to places?

A convolution answers a moved image with moved features, but for strides and borders; a Transformer has to learn that from data,
and an MLP on pixels each place for itself.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from vitcli.distributed import Ranks
from vitcli.errors import ConfigError
from vitcli.forward import Forward, source_answers
from vitcli.label_sets import LabelSet
from vitcli.metrics import bootstrap_interval
from vitcli.opened import OpenedModel
from vitcli.predictions import Predictions, collect_predictions
from vitcli.views import moved_forward

__all__ = ["DIRECTIONS", "check_pixels", "judge_translation"]

DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # (rows, columns) of one px


def check_pixels(pixels: Sequence[int], *, image_size: tuple[int, int]) -> None:
    """Raise ConfigError for a distance at which little of the images would be left."""
    most = min(image_size) // 2
    if pixels and max(pixels) > most:
        raise ConfigError(
            f"--translate: {max(pixels)} px, of images shown at {image_size[0]} x {image_size[1]} px; expected at most {most}"
        )


def judge_translation(
    opened: OpenedModel,
    label_set: LabelSet,
    unmoved: Predictions,
    *,
    pixels: Sequence[int],
    forward: Forward,
    batch_size: int,
    ranks: Ranks,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Evaluate on images moved by each of `pixels` px in four directions, their edges repeated where nothing is left.

    Args:
        unmoved: the answers to the images as they are.
        forward: what asks the model.

    Returns:
        For each distance JSON values: accuracy with its interval, and the share of first guesses that stay what they were, both
        means over the directions; and both for each direction.
    """
    rows = []
    for distance in pixels:
        directions: dict[str, dict[str, float]] = {}
        right = np.zeros(len(unmoved))
        for direction, (down, along) in DIRECTIONS.items():
            with closing(
                source_answers(
                    opened.model,
                    label_set.source,
                    opened.config,
                    forward=moved_forward(forward, down=down * distance, right=along * distance),
                    device=opened.device,
                    batch_size=batch_size,
                    warn=lambda text: None,  # the same images as before
                    flops_per_image=opened.flops_per_image,
                    ranks=ranks,
                )
            ) as answered:
                result, found = collect_predictions(
                    label_set.judged(answered),
                    num_classes=len(label_set.classes),
                    device=opened.device,
                    loss=opened.config.train.loss,
                    ranks=ranks,
                )
            right += found.correct
            directions[direction] = {"top1": result.top1, "unchanged": float(np.mean(found.predicted == unmoved.predicted))}
        low, high = bootstrap_interval(right / len(DIRECTIONS))  # of an image's four answers together
        means = {key: sum(each[key] for each in directions.values()) / len(DIRECTIONS) for key in ("top1", "unchanged")}
        rows.append({"px": distance, **means, "interval": [low, high], "examples": len(unmoved), "directions": directions})
        say(f"moved by {distance} px: top-1 {100 * means['top1']:.1f} %, {100 * means['unchanged']:.1f} % of answers unchanged")
    return rows
