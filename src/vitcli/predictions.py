"""A model's answer to every image of an evaluation, kept: what intervals, calibration, mistakes and comparisons are made of.

A few numbers per image, in a safetensors file with a description of what they are about. Shapes: `N` images, `K` classes.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from vitcli.config import Config
from vitcli.data.protocol import Source
from vitcli.distributed import SOLO, Ranks
from vitcli.errors import DataError
from vitcli.evaluate import EvalResult, Tally, judge
from vitcli.forward import Forward, source_answers
from vitcli.forward import logits as own_logits
from vitcli.rundir import write_bytes

__all__ = [
    "VAL_PREDICTIONS",
    "Predictions",
    "collect_predictions",
    "collect_source",
    "load_predictions",
    "reading_file",
    "save_predictions",
]

VAL_PREDICTIONS = Path("predictions/val.safetensors")  # in the directory of every finished run


def reading_file(step: int) -> Path:
    """Return where a run keeps its answers at a reading (`log.readings`), in its directory."""
    return Path(f"predictions/step_{step:08d}.safetensors")


TOP = 5  # guesses kept of each image
METADATA = "vit_predictions"
MOST_HEADER_BYTES = 64 << 20
MOST_FILE_BYTES = 64 << 30
DTYPES = {
    "indices": np.int64,
    "labels": np.int64,
    "ranks": np.int32,
    "losses": np.float32,
    "top_classes": np.int32,
    "top_probabilities": np.float32,
    "logits": np.float32,
}
ABOUT: dict[str, type | tuple[type, ...]] = {
    "dataset": str, "fingerprint": str, "classes": list, "checkpoint": str, "step": int,
}  # fmt: skip


@dataclass(frozen=True)
class Predictions:
    """Answers to N images of a source, in its order; images that could not be read are left out."""

    indices: NDArray[np.int64]  # (N,) of the source, ascending
    labels: NDArray[np.int64]  # (N,) the model's class numbers
    ranks: NDArray[np.int32]  # (N,) classes ahead of the label: 0 is right; K and more where logits are not numbers
    losses: NDArray[np.float32]  # (N,) nats
    top_classes: NDArray[np.int32]  # (N, k) the k = min(5, K) first guesses; -1 where logits are not numbers
    top_probabilities: NDArray[np.float32]  # (N, k) theirs, softmax or sigmoid as trained; NaN where logits are not numbers
    logits: NDArray[np.float32] | None = None  # (N, K)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Tell, (N,), which first guesses are right."""
        return self.ranks == 0

    @property
    def predicted(self) -> NDArray[np.int32]:
        """Return the first guesses, (N,)."""
        return self.top_classes[:, 0]


# ---------------------------------------------------------------- from a model


def collect_predictions(
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
    *,
    num_classes: int,
    device: torch.device,
    loss: Literal["softmax", "sigmoid"] = "softmax",
    class_map: Tensor | None = None,
    ranks: Ranks = SOLO,
    keep_logits: bool = False,
) -> tuple[EvalResult, Predictions]:
    """Evaluate as `evaluate.evaluate` does and keep every answer, in one pass; every rank returns those of all.

    Args:
        batches: as of `evaluate`, with `indices` int64 (b,) of the source.
        keep_logits: keep N x K of them too.

    Raises:
        DataError: there are no examples, or a label is not one of the model's classes.
        UserError, Interrupted: what making a batch raised.
    """
    top = min(TOP, num_classes)
    tally = Tally(num_classes=num_classes, device=device)
    parts: list[dict[str, Tensor]] = []
    for batch, answered in batches:
        judged = judge(batch["labels"], answered, num_classes=num_classes, loss=loss, class_map=class_map)
        tally.add(judged)
        guesses = first_guesses(judged.logits, top)  # (b, k)
        probabilities = judged.logits.softmax(1) if loss == "softmax" else judged.logits.sigmoid()
        unknown = judged.logits.isnan().any(1, keepdim=True)  # (b, 1)
        part = {
            "indices": batch["indices"].to(device),
            "labels": judged.labels,
            "ranks": judged.ranks.int(),
            "losses": judged.losses.float(),
            "top_classes": guesses.masked_fill(unknown, -1).int(),
            "top_probabilities": probabilities.gather(1, guesses).masked_fill(unknown, torch.nan).float(),
        }
        if keep_logits:
            part["logits"] = judged.logits.float().cpu()
        parts.append(part)  # on the device: a copy to the CPU would wait for it
    result = tally.result(ranks)
    mine = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]} if parts else {}
    shares = [share for share in ranks.gather(mine) if share]
    whole = {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}
    return result, Predictions(**whole)


def collect_source(
    model: nn.Module,
    source: Source,
    config: Config,
    *,
    forward: Forward = own_logits,
    device: torch.device,
    batch_size: int,
    num_classes: int,
    warn: Callable[[str], object],
    check: Callable[[], None] | None = None,
    flops_per_image: int,
    class_map: Tensor | None = None,
    ranks: Ranks = SOLO,
    keep_logits: bool = False,
) -> tuple[EvalResult, Predictions]:
    """Evaluate on every image of a source once, with the config's preprocessing, loss and precision, and keep the answers."""
    with closing(
        source_answers(
            model,
            source,
            config,
            forward=forward,
            device=device,
            batch_size=batch_size,
            warn=warn,
            check=check,
            flops_per_image=flops_per_image,
            ranks=ranks,
        )
    ) as answered:
        return collect_predictions(
            answered,
            num_classes=num_classes,
            device=device,
            loss=config.train.loss,
            class_map=class_map,
            ranks=ranks,
            keep_logits=keep_logits,
        )


def first_guesses(logits: Tensor, count: int) -> Tensor:
    """Return the classes of the `count` largest logits (b, K), (b, count), the largest first; of equal ones the lower first.

    `topk` would take any of equal ones, and then a label's rank would not say whether it is among these.
    """
    lowest = torch.finfo(logits.dtype).min
    left = logits.nan_to_num(nan=lowest, neginf=lowest)
    guesses = []
    for _ in range(count):
        guesses.append(left.argmax(1, keepdim=True))  # the first of equal ones
        left = left.scatter(1, guesses[-1], -torch.inf)
    return torch.cat(guesses, dim=1)


# ---------------------------------------------------------------- files


def save_predictions(path: Path, predictions: Predictions, *, about: Mapping[str, Any]) -> None:
    """Write predictions so that the file is there whole or not at all.

    Args:
        about: JSON values: dataset, fingerprint (of the source), classes (the model's), checkpoint, step, and more if you like.

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {name: getattr(predictions, name) for name in DTYPES}
    kept = {name: np.ascontiguousarray(array) for name, array in tensors.items() if array is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(kept, {METADATA: json.dumps(dict(about), allow_nan=False)}))


def load_predictions(path: Path) -> tuple[Predictions, dict[str, Any]]:
    """Read predictions and what they are about; every number that serves as an index is checked.

    Raises:
        DataError: there is no such file, or it is damaged or of something else; one line.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file" if not path.exists() else f"{path}: is not a plain file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MOST_HEADER_BYTES or size > MOST_FILE_BYTES:
            raise ValueError(f"{size:,} bytes, {header_bytes:,} of them a header")
        with safe_open(path, framework="np") as stored:
            about = json.loads((stored.metadata() or {})[METADATA])
            names = set(stored.keys())
            if not set(DTYPES) - {"logits"} <= names <= set(DTYPES):
                raise ValueError(f"holds {', '.join(sorted(names))[:200]}")
            arrays = {name: np.array(stored.get_tensor(name)) for name in sorted(names)}
        check_about(about)
        check_arrays(arrays, num_classes=len(about["classes"]))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError:
        raise DataError(f"{path}: does not fit into the memory") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        detail = (str(error).splitlines() or [""])[0][:200]
        raise DataError(
            f"{path}: no predictions that `vit` wrote, or a damaged file ({detail}); delete it, and `vit eval` makes a new one"
        ) from error
    return Predictions(**arrays), about


def check_about(about: Any) -> None:
    """Raise ValueError unless a description says what everybody reads."""
    if not isinstance(about, dict):
        raise ValueError("its description is no JSON object")
    for key, kind in ABOUT.items():
        if not isinstance(about.get(key), kind) or isinstance(about[key], bool):
            raise ValueError(f"its description has no {key}")
    if not about["classes"] or not all(isinstance(name, str) for name in about["classes"]):
        raise ValueError("its classes are no names")


def check_arrays(arrays: Mapping[str, NDArray[Any]], *, num_classes: int) -> None:
    """Raise ValueError unless arrays fit each other and hold no number that is not an image's or a class's."""
    count, top = len(arrays["indices"]), min(TOP, num_classes)
    shapes = {"top_classes": (count, top), "top_probabilities": (count, top), "logits": (count, num_classes)}
    for name, array in arrays.items():
        if array.dtype != DTYPES[name] or array.shape != shapes.get(name, (count,)):
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}, expected {DTYPES[name].__name__} {shapes.get(name, (count,))}"
            )
    indices, labels, guesses = arrays["indices"], arrays["labels"], arrays["top_classes"]
    if not count:
        raise ValueError("no images")
    if indices[0] < 0 or (np.diff(indices) <= 0).any():
        raise ValueError("its images are not in order")
    if labels.min() < 0 or labels.max() >= num_classes or guesses.min() < -1 or guesses.max() >= num_classes:
        raise ValueError("numbers of classes that are none")
    if arrays["ranks"].min() < 0:
        raise ValueError("a negative rank")
