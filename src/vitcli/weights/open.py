"""Whatever `--ckpt` names, opened: our own runs and checkpoints, or anybody's weights, recognised by content, not by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitcli.checkpoint import MANIFEST, MODEL, MOST_HEADER_BYTES, OPTIMIZER, STEP_NAME, load_weights_file
from vitcli.errors import CheckpointError
from vitcli.model_config import HEADS, model_problem
from vitcli.models import build_model
from vitcli.pretrained import Pretrained
from vitcli.weights.files import RawWeights, read_tensors, weights_file_in
from vitcli.weights.huggingface import is_huggingface, read_huggingface
from vitcli.weights.load import in_words, listed, section_of, shape_of
from vitcli.weights.official import is_official, read_official
from vitcli.weights.timm import is_timm, read_timm
from vitcli.weights.torchvision import is_torchvision, read_torchvision

__all__ = ["open_weights"]

PREPROCESSING = ("image_size", "mean", "std", "eval_crop_fraction")


def open_weights(path: Path, *, say: Callable[[str], None] | None = None) -> Pretrained:
    """Read weights and what they are: from our runs, checkpoints and files, or from anybody's file or folder.

    Tensors come as float32, all that the model needs and no others (the head may be missing); `model` is a whole, resolved
    section. What was dropped or assumed is told to `say`, and is in the result's `notes`.

    Raises:
        CheckpointError: `path` is none of these, is damaged, or holds something else than one of our models; one line.
    """
    if path.is_dir() and not is_ours(path) and is_signed(path / MODEL):
        path = path / MODEL  # a folder of ours without the rest of a checkpoint
    if is_ours(path):
        pretrained = load_weights_file(path, say=say)
        section = section_of(pretrained)
        check_description(pretrained)
        return replace(pretrained, model=section.model_dump(mode="json"))
    file = weights_file_in(path)
    pretrained = as_float32(read_foreign(read_tensors(file), file))
    check_whole(pretrained)
    pretrained = replace(pretrained, model=section_of(pretrained).model_dump(mode="json"))
    if say is not None:
        for note in pretrained.notes:
            say(f"{path}: {note}")
    return pretrained


def is_ours(path: Path) -> bool:
    """Tell whether to read `path` as one of our runs, checkpoints or signed files; also where there is nothing at all."""
    if not path.exists():
        return True
    if path.is_dir():
        if (path / "checkpoints").is_dir() or STEP_NAME.fullmatch(path.name):
            return True
        # a folder of Hugging Face's has a model.safetensors too
        return any((path / name).exists() for name in (MANIFEST, OPTIMIZER))
    return is_signed(path)


def is_signed(file: Path) -> bool:
    """Tell whether a safetensors file carries a description of ours, whole or damaged."""
    try:
        if not file.is_file():
            return False
        with open(file, "rb") as start:
            header_bytes = int.from_bytes(start.read(8), "little")
        if header_bytes > min(file.stat().st_size, MOST_HEADER_BYTES):
            return False
        with safe_open(file, framework="pt") as weights:
            return "vit" in (weights.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read_foreign(raw: RawWeights, path: Path) -> Pretrained:
    """Recognise a layout by its names and read it."""
    if is_official(raw.tensors):
        return read_official(raw, path)
    if is_torchvision(raw.tensors):
        return read_torchvision(raw, path)
    if is_huggingface(raw.tensors):
        return read_huggingface(raw, path)
    if is_timm(raw.tensors):
        return read_timm(raw, path)
    raise CheckpointError(
        f"{path}: {len(raw.tensors)} tensors by names of no layout known here ({listed(sorted(raw.tensors)[:3])}, ...); "
        "expected a ViT, hybrid or BiT ResNet of ours, of the authors' .npz files, timm, Hugging Face or torchvision"
    )


def as_float32(pretrained: Pretrained) -> Pretrained:
    """Return the same with every tensor in float32, and a note where that changed the type."""
    others = [name for name, tensor in pretrained.state.items() if not tensor.is_floating_point()]
    if others:
        kinds = sorted({str(pretrained.state[name].dtype).removeprefix("torch.") for name in others})
        raise CheckpointError(
            f"{pretrained.source_path}: {listed(others)}: {', '.join(kinds)}, expected floating point (no quantised weights)"
        )
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in pretrained.state.values()} - {"float32"})
    if not kinds:
        return pretrained
    state = {name: tensor.float() for name, tensor in pretrained.state.items()}
    return replace(pretrained, state=state, notes=[*pretrained.notes, f"stored in {' and '.join(kinds)}, read as float32"])


def check_whole(pretrained: Pretrained) -> None:
    """Raise CheckpointError unless the tensors, by name and shape, are those of the model they come with, its head aside."""
    section = section_of(pretrained)
    height, width = pretrained.preprocessing["image_size"]
    problem = model_problem(section, (height, width))
    if problem is not None:
        raise CheckpointError(f"{pretrained.source_path}: {in_words(section)}, but model.{problem[0]} {problem[1]}")
    with torch.device("meta"):
        own: dict[str, Tensor] = build_model(
            section, image_size=(height, width), num_classes=len(pretrained.classes) or 1
        ).state_dict()
    if not pretrained.classes:
        own = {name: tensor for name, tensor in own.items() if name.partition(".")[0] not in HEADS}
    state = pretrained.state
    reshaped = [
        f"{name} {shape_of(state[name])} where {shape_of(own[name])} belongs"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = (
        ("missing", [name for name in own if name not in state]),
        ("not known", [name for name in state if name not in own]),
        ("of another shape", reshaped),
    )
    if any(names for _, names in faults):
        detail = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in faults if names)
        raise CheckpointError(f"{pretrained.source_path}: looks like {in_words(section)}, but of its tensors are {detail}")


def check_description(pretrained: Pretrained) -> None:
    """Raise CheckpointError where one of our own files says less than a run or an evaluation needs."""
    lacking = [key for key in PREPROCESSING if key not in pretrained.preprocessing]
    wrong = [key for key in ("data", "train") if not isinstance(pretrained.manifest.get(key, {}), dict)]
    problem: Any = None
    if lacking:
        problem = f"`preprocessing` lacks {', '.join(lacking)}"
    elif wrong:
        problem = f"`{wrong[0]}` must be a dict"
    if problem is not None:
        raise CheckpointError(f"{pretrained.source_path}: {problem}; take a fresh copy, or another checkpoint")
