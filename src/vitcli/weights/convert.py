"""Weights from any layout into any other, never unverified.

What was written is read back, by our own reader or by the runtime it is for, and has to give the logits of the weights it was
made from on random images. Only then it gets its name. What a format has no place for is found by comparing, and told.
"""

import io
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vitcli.checkpoint import flush_to_disk, save_weights_file
from vitcli.errors import CheckpointError, ConfigError
from vitcli.model_config import HEADS, model_problem
from vitcli.models import Model, build_model
from vitcli.pretrained import Pretrained
from vitcli.weights.graphs import OPSET, open_onnx, open_program, require_onnx, write_onnx, write_program
from vitcli.weights.huggingface import (
    export_huggingface,
    huggingface_config,
    huggingface_differences,
    huggingface_preprocessor,
)
from vitcli.weights.load import computed, load_weights, section_of, trained_grid
from vitcli.weights.official import write_official
from vitcli.weights.open import open_weights
from vitcli.weights.timm import export_timm, timm_config, timm_differences
from vitcli.weights.torchvision import export_torchvision, torchvision_differences

__all__ = ["Conversion", "Target", "convert", "parse_size"]

Target = Literal["vit", "npz", "timm", "hf", "torchvision", "onnx", "torch-export"]
TARGETS: tuple[Target, ...] = get_args(Target)
FOLDER = "a folder"
# what OUT may be; of layouts that share an ending, --to must say which, but for a folder, which is Hugging Face's
ENDINGS: dict[Target, tuple[str, ...]] = {
    "vit": (".safetensors",),
    "npz": (".npz",),
    "timm": (FOLDER, ".safetensors"),
    "hf": (FOLDER,),
    "torchvision": (".safetensors", ".pth"),
    "onnx": (".onnx",),
    "torch-export": (".pt2",),
}
FILES = {".safetensors", ".npz", ".onnx", ".pt2", ".pth", ".pt", ".bin", ".ckpt", ".h5", ".tar", ".zip", ".msgpack", ".pb"}
BATCHES = (3, 1)  # images compared at a time: two sizes, because an exported graph may have kept the one it was traced with


@dataclass(frozen=True)
class Conversion:
    """What was written, and how far it is from what it was made from."""

    path: Path
    target: Target
    largest_difference: float  # of logits, and of what the head reads where that can be seen
    notes: list[str]


def convert(
    path_in: Path,
    path_out: Path,
    *,
    to: Target | None = None,
    image_size: tuple[int, int] | None = None,
    tolerance: float = 1e-4,
    say: Callable[[str], None],
) -> Conversion:
    """Read weights from any layout, write them in another, and keep that only if both compute the same.

    Args:
        path_in: whatever `open_weights` reads.
        path_out: a file or folder that is not there yet.
        to: the layout; None takes the one that `path_out` ends in.
        image_size: (height, width) px to resize position embeddings to; None for the size the weights have.
        tolerance: largest absolute difference of logits on random images.
        say: takes a line for the user.

    Raises:
        CheckpointError: the weights cannot be read or written so, or compute something else afterwards.
        ConfigError: the layout is not clear, or the image size does not fit the model.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(f"--tolerance is {tolerance:g}, expected a number from 0")
    target = choose_target(path_out, to)
    if target == "onnx":
        require_onnx()
    for path in (path_out, path_out.with_name(f"{path_out.name}.data")) if target == "onnx" else (path_out,):
        if path.exists() or path.is_symlink():
            raise CheckpointError(f"{path}: is there already; give another name, or delete it first")
    source = open_weights(path_in, say=say)
    model = fitted(source, image_size=image_size)
    height, width = model.image_size
    source = replace(source, state=model.state_dict(), preprocessing={**source.preprocessing, "image_size": [height, width]})
    parameters = sum(p.numel() for p in model.parameters())
    classes = f"{len(source.classes):,} classes" if source.classes else "no head"
    say(f"{path_in}: {parameters:,} parameters, {height} x {width} px, {classes}")
    with beside(path_out) as temporary:
        differences = write(target, temporary, source, model)
        difference, lost = verify(target, temporary, source, model)
        notes = [*lost, *differences]
        if not difference <= tolerance:
            because = f"; {'; '.join(notes)}" if notes else ""
            raise CheckpointError(
                f"{path_out}: read back as {target}, these weights give other logits: they differ by up to {difference:.2g}, "
                f"more than {tolerance:g}{because}; nothing was kept"
            )
        for note in notes:
            say(f"note: {note}")
    graph = {"onnx": f" (opset {OPSET}, any batch size)", "torch-export": " (any batch size)"}.get(target, "")
    say(
        f"{path_out}: written as {target}{graph} and read back; logits of {sum(BATCHES)} random images differ by at most "
        f"{difference:.2g} (tolerance {tolerance:g})"
    )
    return Conversion(path_out, target, difference, notes)


def choose_target(path_out: Path, to: Target | None) -> Target:
    """Return the layout for a path, by its ending where `to` does not say.

    Raises:
        ConfigError: the ending is unknown, stands for several layouts, or is not the given layout's.
    """
    ending = ending_of(path_out)
    if to is not None:
        if ending not in ENDINGS[to]:
            raise ConfigError(f"{path_out}: --to {to} writes {' or '.join(ENDINGS[to])}; give OUT such a name")
        return to
    if ending == FOLDER:
        return "hf"
    fitting = [target for target in TARGETS if ending in ENDINGS[target]]
    if not fitting:
        known = ", ".join(f"{' or '.join(endings)} ({target})" for target, endings in ENDINGS.items())
        raise ConfigError(f"{path_out}: nothing is written that ends in {ending}; expected one of: {known}")
    if len(fitting) > 1:
        raise ConfigError(f"{path_out}: {ending} may hold several layouts; say which: --to {' or --to '.join(fitting)}")
    return fitting[0]


def ending_of(path: Path) -> str:
    """Return how a file's name ends, or `FOLDER` where it does not end like a file's."""
    return path.suffix if path.suffix in FILES else FOLDER


def parse_size(text: str) -> tuple[int, int]:
    """Read an image size, "384" or "HEIGHTxWIDTH".

    Raises:
        ConfigError: it is neither.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text, re.ASCII)
    if match is None:
        raise ConfigError(f"--image-size is {text!r}, expected pixels such as 384, or HEIGHTxWIDTH such as 384x256")
    return int(match[1]), int(match[2] or match[1])


# ---------------------------------------------------------------- the model between


def fitted(weights: Pretrained, *, image_size: tuple[int, int] | None = None) -> Model:
    """Build the model that weights are of, for images of another size where one is given, in evaluation mode.

    Weights without a head give a model whose outputs are its features.
    """
    section = section_of(weights)
    height, width = weights.preprocessing["image_size"]
    size = (height, width) if image_size is None else image_size
    problem = model_problem(section, size)
    if problem is not None:
        raise ConfigError(f"{weights.source_path}: --image-size {size[0]}x{size[1]}: model.{problem[0]} {problem[1]}")
    permuted = weights.preprocessing.get("patch_permutation")
    if permuted is not None and size != (height, width):
        raise ConfigError(f"{weights.source_path}: --image-size: patches are in a learned order, which has no other size")
    model = build_model(section, image_size=size, num_classes=len(weights.classes) or 1, patch_permutation=permuted)
    load_weights(model, weights.state, reset_head=not weights.classes, old_grid=trained_grid(weights))
    if not weights.classes:
        for name in [name for name, _ in model.named_children() if name in HEADS]:
            setattr(model, name, nn.Identity())
    return model.eval()


# ---------------------------------------------------------------- writing


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give a path of the same name in a folder beside it; what was written there is moved to `path` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        try:
            yield Path(folder) / path.name
        except CheckpointError as error:
            said = str(error).replace(str(Path(folder) / path.name), str(path))  # by the name it would have had
            raise CheckpointError(said if str(path) in said else f"{path}: {said}") from error
        written = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)  # what belongs to it comes first
        for file in written:
            for part in [*file.rglob("*"), file]:
                flush_to_disk(part)
        for file in written:
            os.rename(file, path.with_name(file.name))
    flush_to_disk(path.parent)


def write(target: Target, path: Path, weights: Pretrained, model: Model) -> list[str]:
    """Write weights, or the model they are in, as `target`; return what its library computes otherwise."""
    try:
        if target == "vit":
            save_weights_file(path, weights)
        elif target == "npz":
            write_official(weights, path)
        elif target == "timm":
            write_tensors(path, export_timm(weights), {"config.json": timm_config(weights)})
            return timm_differences(weights)
        elif target == "hf":
            beside_it = {
                "config.json": huggingface_config(weights),
                "preprocessor_config.json": huggingface_preprocessor(weights),
            }
            write_tensors(path, export_huggingface(weights), beside_it)
            return huggingface_differences(weights)
        elif target == "torchvision":
            write_tensors(path, export_torchvision(weights), {})
            return torchvision_differences(weights)
        elif target == "onnx":
            write_onnx(path, model, about=description(weights))
        else:
            write_program(path, model, about=description(weights))
    except (OSError, SafetensorError) as error:  # SafetensorError is how its writer reports a full disk
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CheckpointError(f"{path}: cannot be written ({reason})") from error
    return []


def write_tensors(path: Path, state: Mapping[str, Tensor], described_by: Mapping[str, Any]) -> None:
    """Write tensors in a file by its ending; or in a folder, as model.safetensors, with JSON files that describe them."""
    state = {name: tensor.detach().clone() for name, tensor in state.items()}  # parts of one tensor share its memory
    if path.suffix == ".pth":
        archive = io.BytesIO()  # torch's zip writer does not survive a full disk
        torch.save(state, archive)
        path.write_bytes(archive.getbuffer())
        return
    if ending_of(path) == FOLDER:
        path.mkdir()
        for name, value in described_by.items():
            (path / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        path = path / "model.safetensors"
    save_file(state, path, metadata={"format": "pt"})


def description(weights: Pretrained) -> dict[str, Any]:
    """Return what a graph's user has to know, as JSON values; the order of patches is not for them, the graph sees to it."""
    classes = weights.classes if weights.named else None
    preprocessing = {key: value for key, value in weights.preprocessing.items() if key != "patch_permutation"}
    about = {"classes": classes, "preprocessing": preprocessing, "model": weights.model, "step": weights.step}
    return {**about, "source": weights.manifest.get("source")}


# ---------------------------------------------------------------- verifying


def verify(target: Target, path: Path, weights: Pretrained, model: Model) -> tuple[float, list[str]]:
    """Read back what was written; return the largest difference from `model` on random images, and what got lost.

    Where our reader gives a model back, what the head reads is compared too: a head of zeros would hide every difference.
    """
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, 3, *model.image_size, generator=generator) for size in BATCHES]
    with torch.no_grad():
        if target in ("onnx", "torch-export"):
            logits, about = (open_onnx if target == "onnx" else open_program)(path)
            if about != description(weights):
                raise CheckpointError(f"{path}: the description that was written is not what is read back")
            notes = [] if weights.classes else ["the weights have no head: the outputs are what a head would read"]
            before = [model(images) for images in batches]
            if float(torch.cat(before).std(dim=0).max()) == 0.0:
                notes.append("the head gives every image the same logits, so the comparison says little: it is not trained yet")
            after = [logits(images) for images in batches]
        else:
            back = open_weights(path)
            notes = losses(weights, back)
            again = fitted(back, image_size=model.image_size)  # which some layouts do not say
            before, after = ([outputs(each, images) for images in batches] for each in (model, again))
    return max(largest_difference(old, new) for old, new in zip(before, after)), notes


def outputs(model: Model, images: Tensor) -> Tensor:
    """Return what the head reads and the logits, side by side (B, D + K)."""
    return torch.cat([model.features(images), model(images)], dim=1)


def largest_difference(before: Tensor, after: Tensor) -> float:
    """Return the largest absolute difference; infinite for other shapes, and where a number is none."""
    if before.shape != after.shape:
        return math.inf
    difference = float((before.double() - after.double()).abs().max())
    return math.inf if math.isnan(difference) else difference


def losses(before: Pretrained, after: Pretrained) -> list[str]:
    """Say what a reader of the file will not know, or will take to be otherwise."""
    notes = []
    if before.named and after.classes != before.classes:
        kept = "classes are read back as numbers" if not after.named else "other ones are read back"
        notes.append(f"class names are not kept: {kept}")
    for key, value in before.preprocessing.items():
        if not alike(value, after.preprocessing.get(key)):
            notes.append(f"{key} is not kept: {value} here, {after.preprocessing.get(key)} is how it is read back")
    there, here = computed(section_of(before)), computed(section_of(after))
    for key, value in there.items():
        if not alike(value, here[key]):
            notes.append(f"model.{key} is not kept: {value} here, {here[key]} is how it is read back")
    return notes


def alike(before: Any, after: Any) -> bool:
    """Tell whether two settings are equal, lists and tuples alike, numbers but for their rounding."""
    if isinstance(before, list | tuple) and isinstance(after, list | tuple):
        return len(before) == len(after) and all(map(alike, before, after))
    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=1e-6)
    return bool(before == after)
