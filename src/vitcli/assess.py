"""`vit eval`: everything that is measured of a model without training it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitcli.evaluate import evaluate_source
from vitcli.opened import open_images, open_model

__all__ = ["evaluate_checkpoint"]


def evaluate_checkpoint(
    ckpt: Path, *, dataset: str | None, data_root: Path | None, batch_size: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Evaluate a run, checkpoint or weights file on a data set's evaluation split; return plain numbers.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        DataError: the data set is missing, or has classes the checkpoint does not know.
    """
    overrides = [] if data_root is None else [f"data.root={json.dumps(str(data_root), ensure_ascii=False)}"]
    opened, images = open_images(open_model(ckpt, dataset=dataset, overrides=overrides, say=say), say=say)
    result = evaluate_source(
        opened.model,
        images.source,
        opened.config,
        device=opened.device,
        batch_size=batch_size,
        num_classes=len(images.classes),
        warn=say,
        class_map=images.class_map,
        flops_per_image=opened.flops_per_image,
    )
    head = {
        "checkpoint": str(opened.pretrained.source_path),
        "step": opened.pretrained.step,
        "dataset": opened.config.data.source,
    }
    return {**head, **result.as_dict(images.classes)}
