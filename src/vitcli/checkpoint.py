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
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitcli.config_file import shown
from vitcli.errors import CheckpointError
from vitcli.in_use import held, unread
from vitcli.optimizer_file import read_optimizer, write_optimizer
from vitcli.pretrained import Pretrained

__all__ = [
    "Checkpoint",
    "save_checkpoint",
    "latest_checkpoint",
    "verify_checkpoint",
    "load_checkpoint",
    "load_weights_file",
    "save_weights_file",
    "step_of",
]

LAYOUT = 1  # raised when a reader of today could not understand the files any more
MODEL, EMA, OPTIMIZER, MANIFEST = "model.safetensors", "ema.safetensors", "optimizer.pt", "manifest.json"
SUMMARY = "summary.json"  # of a finished run, beside the checkpoints
# what every manifest says; no source: converted from a file that does not say what it was trained on
PORTABLE: dict[str, type | UnionType] = {
    "model": dict,
    "classes": list,
    "preprocessing": dict,
    "source": str | None,
    "seed": int,
}
STEP_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,17})")
TEMPORARY = ".tmp-step_"
# A file may claim any size; what is read whole into memory is bounded. ViT-H with 21,843 classes needs 2 MB.
MOST_MANIFEST_BYTES = MOST_HEADER_BYTES = 64 << 20


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: `step` updates are done, tensors are on the CPU."""

    step: int
    model_state: dict[str, Tensor]
    ema_state: dict[str, Tensor] | None
    optimizer_state: dict[str, Any]
    manifest: dict[str, Any]
    extra: dict[str, Any]  # JSON values, say a loss scale; empty where none were given


# ---------------------------------------------------------------- saving


def save_checkpoint(
    checkpoints_dir: Path,
    *,
    step: int,
    model_state: Mapping[str, Tensor],
    ema_state: Mapping[str, Tensor] | None,
    optimizer_state: Mapping[str, Any],
    manifest: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write `checkpoints_dir`/step_XXXXXXXX so that it appears whole or not at all, and return it.

    A sound checkpoint of that step is kept as it is (a resumed run reaches the same weights), a damaged one replaced.

    Args:
        checkpoints_dir: made if missing; leftovers of killed saves in it are removed.
        step: updates done.
        model_state, ema_state: tensors on any device; ones that share memory are written apart.
        optimizer_state: must be loadable with `weights_only=True`.
        manifest: JSON values, with at least model, classes, preprocessing, source and seed; goes into the weights files too.
        extra: JSON values that a run needs to go on, beside the tensors.

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
        remove_leftovers(checkpoints_dir)
        if is_sound(final):
            return final
        temporary.mkdir()
        write_weights(temporary / MODEL, model_state, about={**about, "is_ema": False})
        if ema_state is not None:
            write_weights(temporary / EMA, ema_state, about={**about, "is_ema": True})
        write_optimizer(temporary / OPTIMIZER, optimizer_state)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(temporary.iterdir())}
        body = {**about, "extra": json.loads(json.dumps(dict(extra or {}), allow_nan=False)), "files": files}
        text = json.dumps({**body, "sha256": sha256_of_json(body)}, indent=2) + "\n"
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        for path in sorted(temporary.iterdir()):
            flush_to_disk(path)
        flush_to_disk(temporary)
        if final.exists():  # damaged, or it would have been kept; a directory cannot be renamed onto a full one
            os.rename(final, hidden_name(final))
        os.rename(temporary, final)
        flush_to_disk(checkpoints_dir)
        remove_leftovers(checkpoints_dir)
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


def hidden_name(path: Path) -> Path:
    """Return a new name for what is to be deleted, under which nobody takes it for a checkpoint."""
    return path.with_name(f"{TEMPORARY}{step_of(path):08d}-{os.getpid()}-{os.urandom(4).hex()}")


def remove_leftovers(checkpoints_dir: Path) -> None:
    """Delete what killed saves and unfinished deletions left behind, but for what somebody still reads."""
    for leftover in checkpoints_dir.glob(f"{TEMPORARY}*"):
        with suppress(OSError):  # the next save tries again
            if leftover.is_symlink():
                leftover.unlink()
                continue
            with unread(leftover) as nobody_reads:
                free = nobody_reads()
            if free:
                shutil.rmtree(leftover)


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


def save_weights_file(path: Path, weights: Pretrained) -> None:
    """Write one .safetensors file that says what it holds, as those of checkpoints do; `load_weights_file` reads it.

    Raises:
        OSError, SafetensorError: the disk is full or not writable.
    """
    about = {
        **weights.manifest,
        "model": weights.model,
        "classes": weights.classes,
        "named": weights.named,
        "preprocessing": weights.preprocessing,
        "layout": LAYOUT,
        "step": weights.step,
        "is_ema": weights.is_ema,
    }
    write_weights(path, weights.state, about=json.loads(json.dumps(about)))


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
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    with reading(path):
        manifest = read_manifest(path / MANIFEST)
        if STEP_NAME.fullmatch(path.name) and step_of(path) != manifest["step"]:
            raise damaged(path / MANIFEST, f"is of step {manifest['step']}, which the directory's name contradicts")
        for name, expected in manifest["files"].items():
            file = path / name
            with naming(file):
                size = plain_size(file)
                if size != expected["bytes"]:
                    raise damaged(file, f"has {size:,} bytes, {expected['bytes']:,} were written")
                if sha256_of(file) != expected["sha256"]:
                    raise damaged(file, "its content is not what was written (SHA-256 differs)")
    return manifest


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep a checkpoint directory from being deleted inside the block; raises CheckpointError if it is none."""
    with ExitStack() as stack:
        with naming(path / MANIFEST):
            stack.enter_context(held(path / MANIFEST))
        yield


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turn what the system says of a file into an error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise damaged(file, "the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error


def plain_size(file: Path, *, most: int | None = None) -> int:
    """Return the size in bytes of a file that can be read whole: no pipe, no device, not larger than `most` or the memory."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise damaged(file, "is not a plain file")
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if most is None else most
    if status.st_size > limit:
        raise CheckpointError(f"{file}: has {status.st_size:,} bytes; at most {limit:,} can be read here")
    return status.st_size


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.json and check it against its own checksum."""
    with naming(path):
        plain_size(path, most=MOST_MANIFEST_BYTES)
        text = path.read_bytes()
    try:
        body = signed_json(text)
    except ValueError as error:
        raise damaged(path, str(error)) from None
    complaint = malformed(body)
    if complaint:
        raise damaged(path, complaint)
    files = body.get("files")
    if not isinstance(files, dict) or not {MODEL, OPTIMIZER} <= files.keys() <= {MODEL, EMA, OPTIMIZER}:
        raise damaged(path, "does not list the checkpoint's files")
    if not all(
        isinstance(entry, dict) and is_count(entry.get("bytes")) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    ):
        raise damaged(path, "does not give the size and SHA-256 of every file")
    if not isinstance(body.get("extra", {}), dict):
        raise damaged(path, "`extra` must be a dict")
    return body


def signed_json(text: str | bytes) -> dict[str, Any]:
    """Read a JSON object that holds its own SHA-256 and return it without; raises ValueError saying what is wrong."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("is not a JSON object")
        said = value.pop("sha256", None)
        if said != sha256_of_json(value):
            raise ValueError("its content is not what was written (SHA-256 differs)")
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    except UnicodeError as error:  # not UTF-8, or half a surrogate pair
        raise ValueError(f"is not JSON ({error})") from None
    except RecursionError:
        raise ValueError("is not JSON of ours (nested too deeply)") from None
    return value


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
        if key not in manifest or not isinstance(manifest[key], kind):
            return f"`{key}` must be a {getattr(kind, '__name__', kind)}"
    if not all(isinstance(name, str) for name in manifest["classes"]):
        return "`classes` must hold names"
    size = manifest["preprocessing"].get("image_size")
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(is_count(side) and side > 0 for side in size)):
        return "`preprocessing.image_size` must be [height, width]"
    return None


def malformed(about: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a description read from disk, if anything is."""
    if about.get("layout") != LAYOUT:
        return f"has layout {shown(repr(about.get('layout')))}, this version of vit reads {LAYOUT}"
    if not is_count(about.get("step")):
        return "`step` must be an int, at least 0"
    return missing_in(about)


def is_count(value: Any) -> bool:
    """Tell whether a JSON value is an integer, at least 0, of 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


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


def latest_checkpoint(
    run_dir: Path, *, up_to: int | None = None, every_steps: int = 1, say: Callable[[str], None] | None = None
) -> Path | None:
    """Return the run's newest checkpoint that verifies, or None; each damaged one passed over is told to `say`.

    Args:
        up_to: none of a later step.
        every_steps: only of multiples of it, so that where an interruption made one makes no difference.
    """
    with newest_sound(run_dir, up_to=up_to, every_steps=every_steps, say=say) as path:
        return path


@contextmanager
def newest_sound(
    run_dir: Path, *, up_to: int | None = None, every_steps: int = 1, say: Callable[[str], None] | None = None
) -> Iterator[Path | None]:
    """Find what `latest_checkpoint` returns, and keep it from being deleted inside the block."""
    for path in checkpoints_in(run_dir / "checkpoints"):
        if step_of(path) % every_steps or (up_to is not None and step_of(path) > up_to):
            continue
        with ExitStack() as stack:
            try:
                stack.enter_context(reading(path))
                verify_checkpoint(path)
            except CheckpointError as error:
                if say is not None:
                    say(f"warning: {error}; falling back to the checkpoint before {path.name}")
                continue
            yield path
            return
    yield None


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint directory and read all of it, onto the CPU.

    Raises:
        CheckpointError: anything in it is missing, damaged or malformed.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    with reading(path):
        manifest = verify_checkpoint(path)
        model_state, _ = read_weights(path / MODEL)
        ema_state = read_weights(path / EMA)[0] if EMA in manifest["files"] else None
        with naming(path / OPTIMIZER):
            optimizer_state = read_optimizer(path / OPTIMIZER)
    return Checkpoint(manifest["step"], model_state, ema_state, optimizer_state, manifest, manifest.get("extra", {}))


def load_weights_file(path: Path, *, say: Callable[[str], None] | None = None) -> Pretrained:
    """Read weights and what they are from a run directory, a checkpoint directory or a .safetensors file.

    A finished run gives the weights its summary is about, which early stopping may have gone back to; any other run its newest
    sound checkpoint. A checkpoint gives its averaged (EMA) weights where it has them.

    Raises:
        CheckpointError: `path` is none of the three, or damaged.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or directory; expected a run directory, a checkpoint or a .safetensors file"
        )
    if (path / "checkpoints").is_dir():
        with newest_sound(path, up_to=finished_step(path), say=say) as latest:
            if latest is None:
                raise CheckpointError(f"{path}: this run has no sound checkpoint yet; train it longer, or give another path")
            return from_checkpoint(latest, read_manifest(latest / MANIFEST))
    if path.is_dir():
        if STEP_NAME.fullmatch(path.name) or (path / MODEL).exists() or (path / OPTIMIZER).exists():
            with reading(path):
                return from_checkpoint(path, verify_checkpoint(path))
        raise CheckpointError(f"{path}: neither a run directory (no checkpoints/ in it) nor a checkpoint (no {MODEL} in it)")
    return from_file(path)


def finished_step(run_dir: Path) -> int | None:
    """Return the step whose weights a finished run ended with; None where it does not say."""
    try:
        plain_size(run_dir / SUMMARY, most=MOST_MANIFEST_BYTES)
        summary = json.loads((run_dir / SUMMARY).read_bytes())
    except (CheckpointError, OSError, ValueError, RecursionError):  # unfinished, or damaged: then the newest
        return None
    step = summary.get("step") if isinstance(summary, dict) else None
    return step if is_count(step) else None


def from_checkpoint(path: Path, manifest: Mapping[str, Any]) -> Pretrained:
    """Read the weights of one checkpoint directory, verified before."""
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
        named=about.get("named") is not False,
    )


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file that vit wrote: its tensors, on the CPU, and its description."""
    try:
        size = plain_size(path)
        with open(path, "rb") as file:
            start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if header_bytes > min(size, MOST_HEADER_BYTES):
            raise SafetensorError(f"a header of {header_bytes:,} bytes in a file of {size:,}")
        with safe_open(path, framework="pt") as weights:
            metadata = weights.metadata() or {}
            # Copies: the library's tensors are the file itself, which somebody may delete or cut short.
            tensors = {name: weights.get_tensor(name).clone() for name in weights.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        if start[:2] == b"PK" or start[:1] == b"\x80":  # torch.save's zip, or a bare pickle
            raise CheckpointError(
                f"{path}: a pickle or zip archive, and unpickling can run anything; expected a .safetensors file"
            ) from None
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged one ({shown(error)})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if "vit" not in metadata:
        raise CheckpointError(
            f"{path}: does not say which model and classes it holds (no `vit` metadata); expected a file vit wrote"
        )
    try:
        about = signed_json(metadata["vit"])
    except ValueError as error:
        raise damaged(path, f"its `vit` metadata {error}") from None
    complaint = malformed(about)
    if complaint is None and not isinstance(about.get("is_ema"), bool):
        complaint = "`is_ema` must be a bool"
    if complaint:
        raise damaged(path, f"its `vit` metadata: {complaint}")
    if about.pop("tensors_sha256", None) != sha256_of_tensors(tensors):
        raise damaged(path, "its tensors are not what was written (SHA-256 differs)")
    return tensors, about
