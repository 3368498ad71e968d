"""Checkpoints: written whole or not at all, verified before they are read, never unpickled unsafely.

A checkpoint is a directory `step_00001000/` with `model.safetensors`, optionally `ema.safetensors`, `optimizer.pt` (read with
`weights_only=True`) and `manifest.json` (sizes and SHA-256 of the others, and of itself). It is written beside its final name,
flushed to disk, then renamed: half a checkpoint never has a checkpoint's name. Randomness is derived, so {model, optimizer,
step} is everything a run needs to go on bit for bit. Each weights file also carries the manifest and a digest of its tensors,
so it is of use alone.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitcli.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "Pretrained",
    "save_checkpoint",
    "prune_checkpoints",
    "latest_checkpoint",
    "verify_checkpoint",
    "load_checkpoint",
    "load_weights_file",
    "step_of",
]

LAYOUT = 1  # raised when a reader of today could not understand the files any more
MODEL, EMA, OPTIMIZER, MANIFEST = "model.safetensors", "ema.safetensors", "optimizer.pt", "manifest.json"
PORTABLE = {"model": dict, "classes": list, "preprocessing": dict, "source": str, "seed": int}  # what every manifest says
STEP_NAME = re.compile(r"step_(\d{8,})")
TEMPORARY = ".tmp-step_"
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: `step` updates are done, tensors are on the CPU."""

    step: int
    model_state: dict[str, Tensor]
    ema_state: dict[str, Tensor] | None
    optimizer_state: dict[str, Any]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Pretrained:
    """Weights to start from or to evaluate, and what they are: tensors on the CPU, `model` the resolved model section."""

    state: dict[str, Tensor]
    model: dict[str, Any]
    classes: list[str]
    preprocessing: dict[str, Any]  # image_size (H, W), mean, std, eval_crop_fraction
    source_path: Path  # the weights file
    step: int
    is_ema: bool
    manifest: dict[str, Any]


# ---------------------------------------------------------------- saving


def save_checkpoint(
    checkpoints_dir: Path,
    *,
    step: int,
    model_state: Mapping[str, Tensor],
    ema_state: Mapping[str, Tensor] | None,
    optimizer_state: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> Path:
    """Write `checkpoints_dir`/step_XXXXXXXX so that it appears whole or not at all, and return it.

    A sound checkpoint of that step is kept as it is (a resumed run reaches the same weights), a damaged one replaced.

    Args:
        checkpoints_dir: made if missing; leftovers of killed saves in it are removed.
        step: updates done.
        model_state, ema_state: tensors on any device; ones that share memory are written apart.
        optimizer_state: must be loadable with `weights_only=True`.
        manifest: JSON values, with at least model, classes, preprocessing, source and seed.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are as they were.
        ValueError: the manifest lacks a key.
    """
    complaint = missing_in(manifest)
    if complaint:
        raise ValueError(f"checkpoint manifest: {complaint}")
    final = checkpoints_dir / f"step_{step:08d}"
    temporary = checkpoints_dir / f"{TEMPORARY}{step:08d}-{os.getpid()}"
    about = {**json.loads(json.dumps(manifest)), "layout": LAYOUT, "step": step}
    try:
        checkpoints_dir.mkdir(parents=True, exist_ok=True)
        for leftover in checkpoints_dir.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
        if is_sound(final):
            return final
        temporary.mkdir()
        write_weights(temporary / MODEL, model_state, about={**about, "is_ema": False})
        if ema_state is not None:
            write_weights(temporary / EMA, ema_state, about={**about, "is_ema": True})
        write_optimizer(temporary / OPTIMIZER, optimizer_state)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(temporary.iterdir())}
        body = {**about, "files": files}
        text = json.dumps({**body, "sha256": sha256_of_json(body)}, indent=2) + "\n"
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        for path in sorted(temporary.iterdir()):
            flush_to_disk(path)
        flush_to_disk(temporary)
        if final.exists():  # damaged, or it would have been kept; a directory cannot be renamed onto a full one
            os.rename(final, checkpoints_dir / f"{temporary.name}-damaged")
        os.rename(temporary, final)
        flush_to_disk(checkpoints_dir)
        shutil.rmtree(checkpoints_dir / f"{temporary.name}-damaged", ignore_errors=True)
    except (OSError, SafetensorError) as error:  # SafetensorError is how its writer reports a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CheckpointError(
            f"{final}: cannot save this checkpoint ({reason}); earlier ones are untouched: "
            "free some space or mend the directory, then run the same command again"
        ) from error
    except BaseException:  # Ctrl-C at a bad moment leaves nothing behind either
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def prune_checkpoints(checkpoints_dir: Path, *, keep: int, step: int) -> list[Path]:
    """Delete all but the `keep` newest checkpoints up to `step`, the one just saved, and return what was deleted.

    Later ones are left alone: a run never passes over a sound checkpoint, so they are damaged and will be replaced in time;
    counting them could delete the very one just saved.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    old = [path for path in checkpoints_in(checkpoints_dir) if step_of(path) <= step][keep:]
    for path in old:
        hidden = checkpoints_dir / f"{TEMPORARY}{step_of(path):08d}-{os.getpid()}-old"
        try:
            os.rename(path, hidden)  # first, so that a kill halfway leaves no half checkpoint behind
            shutil.rmtree(hidden)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot delete this old checkpoint ({error.strerror})") from error
    return old


def write_weights(path: Path, state: Mapping[str, Tensor], *, about: Mapping[str, Any]) -> None:
    """Write a safetensors file whose metadata says what it is; the same input gives the same bytes."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()  # safetensors refuses tensors that share memory, and a slice would drag its whole along
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    description = {**about, "tensors_sha256": sha256_of_tensors(tensors)}
    description["sha256"] = sha256_of_json(description)
    save_file(tensors, path, metadata={"format": "pt", "vit": json.dumps(description)})
    # The library writes the two metadata keys in random order; sorting them keeps equal checkpoints equal byte for byte.
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        settled = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(settled) == length
        file.seek(8)
        file.write(settled)


def write_optimizer(path: Path, state: Mapping[str, Any]) -> None:
    """Write an optimizer's state as torch does."""
    try:
        with open(path, "wb") as file:
            torch.save(dict(state), file)
    except RuntimeError as error:
        # torch's zip writer closes itself after a failed write, fails at that too, and hides the reason
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def flush_to_disk(path: Path) -> None:
    """Make a file's or a directory's content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- verifying


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose every byte is as it was written.

    Raises:
        CheckpointError: a file is missing, cut short or changed, or the manifest is malformed; names the file.
    """
    manifest_path = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    manifest = read_manifest(manifest_path)
    for name, expected in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                raise damaged(file, f"has {size:,} bytes, {expected['bytes']:,} were written")
            if sha256_of(file) != expected["sha256"]:
                raise damaged(file, "its content is not what was written (SHA-256 differs)")
        except FileNotFoundError:
            raise damaged(file, "the file is missing") from None
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.json and check it against its own checksum."""
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise damaged(path, "the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # not JSON, or not even UTF-8
        raise damaged(path, f"is not JSON ({error})") from None
    if not isinstance(manifest, dict):
        raise damaged(path, "is not a JSON object")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != sha256_of_json(body):
        raise damaged(path, "its content is not what was written (SHA-256 differs)")
    complaint = malformed(body)
    if complaint:
        raise damaged(path, complaint)
    files = body.get("files")
    if not isinstance(files, dict) or not {MODEL, OPTIMIZER} <= files.keys() <= {MODEL, EMA, OPTIMIZER}:
        raise damaged(path, "does not list the checkpoint's files")
    if any(not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys() for entry in files.values()):
        raise damaged(path, "does not give the size and SHA-256 of every file")
    return body


def is_sound(path: Path) -> bool:
    """Tell whether `path` is a checkpoint that verifies."""
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def missing_in(manifest: Mapping[str, Any]) -> str | None:
    """Name a key that every manifest must have and this one lacks."""
    for key, kind in PORTABLE.items():
        if not isinstance(manifest.get(key), kind):
            return f"`{key}` must be a {kind.__name__}"
    return None


def malformed(about: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a description read from disk, if anything is."""
    if about.get("layout") != LAYOUT:
        return f"has layout {about.get('layout')!r}, this version of vit reads {LAYOUT}"
    if not isinstance(about.get("step"), int):
        return "`step` must be an int"
    return missing_in(about)


def damaged(file: Path, what: str) -> CheckpointError:
    """Build the error for a file that is not as it was written."""
    return CheckpointError(f"{file}: {what}; the checkpoint is damaged, take another one or a fresh copy")


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever its keys' order and indentation."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return one SHA-256 over names, dtypes, shapes and bytes of contiguous CPU tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------- loading


def step_of(path: Path) -> int:
    """Return the step a checkpoint directory is named after."""
    match = STEP_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name!r} is not a checkpoint's name")
    return int(match[1])


def checkpoints_in(directory: Path) -> list[Path]:
    """Return the checkpoint directories in `directory`, newest first."""
    try:
        found = [path for path in directory.iterdir() if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error.strerror})") from error
    return sorted(found, key=step_of, reverse=True)


def latest_checkpoint(run_dir: Path, *, say: Callable[[str], None] | None = None) -> Path | None:
    """Return the run's newest checkpoint that verifies, or None; each damaged one passed over is told to `say`."""
    for path in checkpoints_in(run_dir / "checkpoints"):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            if say is not None:
                say(f"warning: {error}; falling back to the checkpoint before {path.name}")
        else:
            return path
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint directory and read all of it, onto the CPU.

    Raises:
        CheckpointError: anything in it is missing, damaged or malformed.
    """
    manifest = verify_checkpoint(path)
    model_state, _ = read_weights(path / MODEL)
    ema_state = read_weights(path / EMA)[0] if EMA in manifest["files"] else None
    try:
        optimizer_state = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    except Exception as error:  # the zip reader and the restricted unpickler raise whatever they meet
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path / OPTIMIZER}: not an optimizer state that loads safely ({reason})") from error
    return Checkpoint(manifest["step"], model_state, ema_state, optimizer_state, manifest)


def load_weights_file(path: Path, *, say: Callable[[str], None] | None = None) -> Pretrained:
    """Read weights and what they are from a run directory, a checkpoint directory or a .safetensors file.

    A run directory gives its newest sound checkpoint; a checkpoint gives its averaged (EMA) weights where it has them.

    Raises:
        CheckpointError: `path` is none of the three, or damaged.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or directory; expected a run directory, a checkpoint or a .safetensors file"
        )
    if (path / "checkpoints").is_dir():
        latest = latest_checkpoint(path, say=say)
        if latest is None:
            raise CheckpointError(f"{path}: this run has no sound checkpoint yet; train it longer, or give another path")
        return from_checkpoint(latest, verified=True)
    if path.is_dir():
        if STEP_NAME.fullmatch(path.name) or (path / MODEL).exists() or (path / OPTIMIZER).exists():
            return from_checkpoint(path, verified=False)
        raise CheckpointError(f"{path}: neither a run directory (no checkpoints/ in it) nor a checkpoint (no {MODEL} in it)")
    return from_file(path)


def from_checkpoint(path: Path, *, verified: bool) -> Pretrained:
    """Read the weights of one checkpoint directory."""
    manifest = read_manifest(path / MANIFEST) if verified else verify_checkpoint(path)
    return from_file(path / (EMA if EMA in manifest["files"] else MODEL))


def from_file(path: Path) -> Pretrained:
    """Read a weights file by the description it carries."""
    state, about = read_weights(path)
    return Pretrained(
        state=state,
        model=about["model"],
        classes=about["classes"],
        preprocessing=about["preprocessing"],
        source_path=path,
        step=about["step"],
        is_ema=about["is_ema"],
        manifest=about,
    )


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file that vit wrote: its tensors, on the CPU, and its description."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        with safe_open(path, framework="pt") as weights:
            metadata = weights.metadata() or {}
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        if start[:2] == b"PK" or start[:1] == b"\x80":  # torch.save's zip, or a bare pickle
            raise CheckpointError(
                f"{path}: a pickle or zip archive, and unpickling can run anything; expected a .safetensors file"
            ) from None
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged one ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if "vit" not in metadata:
        raise CheckpointError(
            f"{path}: does not say which model and classes it holds (no `vit` metadata); expected a file vit wrote"
        )
    try:
        about = json.loads(metadata["vit"])
    except ValueError:
        raise damaged(path, "its `vit` metadata is not JSON") from None
    if not isinstance(about, dict) or about.pop("sha256", None) != sha256_of_json(about):
        raise damaged(path, "its `vit` metadata is not what was written (SHA-256 differs)")
    complaint = malformed(about)
    if complaint:
        raise damaged(path, f"its `vit` metadata: {complaint}")
    if about.pop("tensors_sha256", None) != sha256_of_tensors(tensors):
        raise damaged(path, "its tensors are not what was written (SHA-256 differs)")
    return tensors, about
