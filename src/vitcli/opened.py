"""A model opened to be looked at, not trained: weights of any layout, on a device, and the images it is shown.

Evaluation, probes, predictions and reports all begin here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.config import Config
from vitcli.config_file import read_config
from vitcli.data.folders import Split
from vitcli.data.loader import choose_workers
from vitcli.data.protocol import Source
from vitcli.data.sources import open_source
from vitcli.device import choose_device, keep_freed_memory
from vitcli.errors import CheckpointError, DataError
from vitcli.evaluate import map_classes
from vitcli.models import Model, build_model
from vitcli.models.flops import forward_flops
from vitcli.pretrained import Pretrained
from vitcli.weights import load_weights
from vitcli.weights.load import check_permutation, section_of, trained_grid
from vitcli.weights.open import open_weights

__all__ = ["Images", "OpenedModel", "flops_of", "match_classes", "open_images", "open_model", "open_split", "settle_workers"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class OpenedModel:
    """A model with its weights, and what is needed to show it images."""

    ckpt: Path  # as the user gave it
    model: Model  # on `device`, in evaluation mode
    pretrained: Pretrained  # its weights' origin, class names and preprocessing
    config: Config  # model section, preprocessing, precision, loss; `data.source` is the data set to be shown
    device: torch.device
    flops_per_image: int  # forward


@dataclass(frozen=True)
class Images:
    """Images to show a model, with labels that are known to fit it."""

    source: Source
    classes: list[str]  # the names of the model's outputs
    class_map: Tensor | None  # (data set's classes,) to the model's; None where they are the same


def open_model(
    ckpt: Path, *, dataset: str | None = None, overrides: Sequence[str] = (), head: bool = True, say: Say
) -> OpenedModel:
    """Open a run, checkpoint or weights file of any layout, and put it on a device.

    Args:
        dataset: what it will be shown, as `--dataset`; default what it was trained on.
        overrides: `key=value` settings, such as data.root=... or data.image_size=48; only what does not change the model.
        head: whether its classifier is needed; without one features can still be read.

    Raises:
        CheckpointError: it cannot be read, or has no classifier although one is needed.
        ConfigError: an override that cannot be.
        DataError: no data set is given and the file does not say which it was trained on.
    """
    keep_freed_memory()
    pretrained = open_weights(ckpt, say=say)
    if head and not pretrained.classes:
        raise CheckpointError(
            f"{ckpt}: these weights have no classifier yet: fine-tune them (vit finetune), or probe their "
            "features (vit eval --fewshot 5 --linear)"
        )
    if dataset is None and pretrained.manifest["source"] is None:
        raise DataError(f"{ckpt}: the file does not say which data its classes are of; give the data set with --dataset")
    data_settings: dict[str, Any] = {
        **pretrained.manifest.get("data", {}),
        **pretrained.preprocessing,
        "source": dataset or str(pretrained.manifest["source"]),
    }
    if dataset is not None:
        data_settings |= {"val_source": None, "dev_fraction": None, "examples": None}
        data_settings |= {} if dataset == "mix" else {"mix": None}
    base = {"model": pretrained.model, "data": data_settings, "train": {"steps": 1, **pretrained.manifest.get("train", {})}}
    config, _ = read_config(None, list(overrides), base=base, base_name=str(ckpt))
    device = choose_device("auto")
    model = build_model(
        config.model,
        image_size=config.data.image_size,
        num_classes=len(pretrained.classes),
        patch_permutation=config.data.patch_permutation,
    )
    check_permutation(model, pretrained)
    load_weights(model, pretrained.state, reset_head=False, old_grid=trained_grid(pretrained))
    model = model.to(device).eval()
    flops = flops_of(pretrained, image_size=config.data.image_size)
    return OpenedModel(ckpt, model, pretrained, config, device, flops)


def open_images(opened: OpenedModel, *, say: Say) -> tuple[OpenedModel, Images]:
    """Open the evaluation split of the model's data set and match its classes with the model's outputs by name.

    Returns:
        The opened model with its number of loader processes settled, and the images.

    Raises:
        DataError: the data set is missing, or has classes that the model does not know.
    """
    opened, source = open_split(opened, "val")
    return opened, match_classes(opened, source, say=say)


def match_classes(opened: OpenedModel, source: Source, *, say: Say) -> Images:
    """Match a source's classes with the model's outputs by name; where these have none, by number or by order.

    Raises:
        DataError: the source has classes that the model does not know.
    """
    config, pretrained, ckpt = opened.config, opened.pretrained, opened.ckpt
    classes = pretrained.classes
    unnamed = f"{ckpt}: the file does not name its {len(classes):,} classes"
    if not pretrained.named and set(source.classes) == set(classes):  # folders "0", "1", "10", ... are numbers
        say(f"{unnamed}; taken as {config.data.source}'s, by their numbers")
    elif not pretrained.named:
        classes = list(source.classes)
        if len(classes) != len(pretrained.classes):
            raise DataError(
                f"{config.data.source} for {ckpt}: the file has {len(pretrained.classes):,} classes and does not name them; "
                f"this data set has {len(classes):,}: evaluate on the data it was trained on, or fine-tune it on this first"
            )
        say(f"{unnamed}; taken as {config.data.source}'s, in its order")
    class_map = map_classes(classes, source.classes, f"{config.data.source} for {ckpt}")
    return Images(source, classes, class_map)


def open_split(opened: OpenedModel, split: Split, *, labels: bool = True) -> tuple[OpenedModel, Source]:
    """Open a split of the model's data set, whatever its classes are, and settle the number of loader processes.

    Args:
        labels: whether images need them, as for `open_source`.
    """
    data = opened.config.data
    spec = data.val_source or data.source if split == "val" else data.source
    source = open_source(spec, split=split, data=data, labels=labels)
    return settle_workers(opened, source), source


def settle_workers(opened: OpenedModel, source: Source) -> OpenedModel:
    """Settle the number of loader processes for a source."""
    data = opened.config.data
    workers = data.workers if data.workers is not None else choose_workers(source, opened.device.type)
    config = opened.config.model_copy(update={"data": data.model_copy(update={"workers": workers})})
    return replace(opened, config=config)


def flops_of(pretrained: Pretrained, *, image_size: tuple[int, int]) -> int:
    """Return the operations of a forward pass of the checkpoint's model on one image, without a hidden layer at the end."""
    section = section_of(pretrained).model_copy(update={"representation_size": None})
    return forward_flops(section, image_size=image_size, num_classes=len(pretrained.classes))
