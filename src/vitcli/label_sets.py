"""Images and the labels they are held against, where these are not simply a data set's classes.

ImageNet's companions: class folders that are some of the model's wnids (ImageNet-A, -R: only those outputs count, as their
authors have it) or numbers of its classes (ImageNet-V2), files of labels with several right ones for an image (ReaL), and
models that number their 1,000 or 21,843 outputs without naming them. Ordinary sets come out as `opened` has them.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.data.cache import cache_key
from vitcli.data.folders import ImageFiles, collect, scan, subfolders
from vitcli.data.imagenet import NOT_IN_21K, imagenet_classes, wnids_of
from vitcli.data.label_file import LabelFile, match_images, read_label_file
from vitcli.data.loader import Batch
from vitcli.data.protocol import Source
from vitcli.data.sources import FileSource, decoded
from vitcli.data.subset import SubsetSource
from vitcli.errors import DataError
from vitcli.evaluate import map_classes, target_labels
from vitcli.opened import OpenedModel, match_classes, open_split, settle_workers
from vitcli.pretrained import Pretrained

__all__ = ["Accepted", "LabelSet", "class_names", "open_label_set"]

Say = Callable[[str], None]
ILSVRC, IN_21K = 1000, 21843  # classes


@dataclass(frozen=True)
class Accepted:
    """Right answers for each of N images, one or several: those of image i are numbers[starts[i] : starts[i + 1]]."""

    starts: NDArray[np.int64]  # (N + 1,)
    numbers: NDArray[np.int64]  # (M,) of classes

    def mask(self, indices: Tensor, *, num_classes: int) -> Tensor:
        """Tell, (b, num_classes), which answers are right for images `indices` (b,)."""
        mask = torch.zeros(len(indices), num_classes, dtype=torch.bool)
        for row, index in enumerate(indices.tolist()):
            mask[row, self.numbers[self.starts[index] : self.starts[index + 1]]] = True
        return mask


@dataclass(frozen=True)
class LabelSet:
    """Images to show a model, which of its answers count, and which of them are right; K outputs, R answers that count."""

    source: Source
    classes: list[str]  # (R,) names of the answers
    outputs: Tensor | None  # (R,) int64, ascending: the outputs that count; None: all of them, R = K
    class_map: Tensor | None  # (data set's classes,) to answers; None: they are the same, or `accepted` says
    accepted: Accepted | None = None  # None: one label for each image, the source's
    about: dict[str, Any] = field(default_factory=dict)  # JSON values: what was left out or restricted

    def judged(self, answered: Iterable[tuple[Batch, Tensor]]) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches with labels (b,) in the order of `classes`, and logits (b, R), from batches and logits (b, K).

        Of several right answers the label is the one with the highest logit, of equal ones the first. So a first guess counts
        as right when it is one of them, five guesses when one of them is among the five; loss and class are that label's.
        """
        for batch, logits in answered:
            if self.outputs is not None:
                logits = logits[:, self.outputs.to(logits.device)]
            if self.accepted is None:
                labels = target_labels(batch["labels"], num_classes=len(self.classes), class_map=self.class_map)
            else:
                right = self.accepted.mask(batch["indices"], num_classes=len(self.classes)).to(logits.device)
                labels = logits.double().nan_to_num().masked_fill(~right, -torch.inf).argmax(1).cpu()
            yield {**batch, "labels": labels}, logits


def class_names(pretrained: Pretrained, *, say: Say) -> list[str]:
    """Return the names of a model's outputs; where 1,000 or 21,843 have none, they are taken as ImageNet's, by wnid."""
    known = imagenet_classes(len(pretrained.classes))
    if pretrained.named:
        return pretrained.classes
    if not known:
        say(f"{pretrained.source_path}: the file does not name its {len(pretrained.classes):,} classes; they are numbered")
        return pretrained.classes
    say(f"{pretrained.source_path}: {unnamed(pretrained)}")
    return list(known)


def open_label_set(
    opened: OpenedModel, *, labels: Path | None = None, restrict: bool = True, say: Say
) -> tuple[OpenedModel, LabelSet]:
    """Open what a model is evaluated on, and match labels with its outputs.

    Args:
        labels: a label file; the data set's own classes then do not matter, and `folder:PATH` may be a folder of images.
        restrict: of classes that are some of the model's ImageNet classes, leave the other outputs out.

    Returns:
        The opened model with its number of loader processes settled, and the images.

    Raises:
        DataError: the data set or the label file is missing or damaged, or has classes that the model does not know.
    """
    pretrained, config = opened.pretrained, opened.config
    known = output_wnids(pretrained)
    if labels is not None:
        return open_labelled(opened, read_label_file(labels), known=known, say=say)
    spec = config.data.val_source or config.data.source
    whole = whole_folder(opened, known, say=say)
    opened, source = open_split(opened, "val") if whole is None else (settle_workers(opened, whole), whole)
    shown = None if known is None else wnids_among(source.classes, known)
    if known is None or shown is None:
        images = match_classes(opened, source, say=say)
        return opened, LabelSet(source, images.classes, None, images.class_map)
    if not pretrained.named:
        say(f"{opened.ckpt}: {unnamed(pretrained)}")
    about: dict[str, Any] = {}
    gone = shown.index(NOT_IN_21K) if NOT_IN_21K in shown and NOT_IN_21K not in known else None
    if gone is not None:
        shown = shown[:gone] + shown[gone + 1 :]
        keep = np.flatnonzero(np.asarray(source.labels) != gone)
        about["left_out"] = len(source) - len(keep)
        say(f"{spec}: without the {about['left_out']:,} images of {NOT_IN_21K}, a class that ImageNet-21k does not have")
        source = SubsetSource(source, keep, fingerprint=f"{source.fingerprint}-without-{NOT_IN_21K}")
    class_map = map_classes(known, shown, f"{spec} for {opened.ckpt}")
    classes, outputs = pretrained.classes if pretrained.named else known, None
    if restrict and class_map is not None and len(shown) < len(known):
        outputs = class_map.sort().values
        class_map = torch.searchsorted(outputs, class_map)
        classes = [classes[i] for i in outputs.tolist()]
        about["restricted_to"] = len(outputs)
        say(f"{spec}: only the outputs of its {len(outputs):,} classes count, not all of the model's {len(known):,}")
    if gone is not None and class_map is not None:  # a place for the class that no image has now
        class_map = torch.cat([class_map[:gone], torch.zeros(1, dtype=torch.int64), class_map[gone:]])
    return opened, LabelSet(source, classes, outputs, class_map, None, about)


def unnamed(pretrained: Pretrained) -> str:
    outputs = len(pretrained.classes)
    which = "ImageNet-1k" if outputs == ILSVRC else "ImageNet-21k"
    return f"the file does not name its {outputs:,} classes; taken as {which}'s in their usual order"


def output_wnids(pretrained: Pretrained) -> list[str] | None:
    """Return the wnids of a model's outputs; None where they are something else."""
    if pretrained.named:
        return wnids_of(pretrained.classes)
    return list(imagenet_classes(len(pretrained.classes))) or None


def wnids_among(classes: list[str], known: list[str]) -> list[str] | None:
    """Return the wnids of a data set's classes where all of them are `known`: wnids, ImageNet's names, or "0" to "999"."""
    ilsvrc = list(imagenet_classes(ILSVRC))
    if len(classes) == ILSVRC and set(classes) == {str(number) for number in range(ILSVRC)}:
        shown: list[str] | None = [ilsvrc[int(name)] for name in classes]
    else:
        shown = wnids_of(classes)
    allowed = {*known, NOT_IN_21K} if len(known) == len(imagenet_classes(IN_21K)) else set(known)
    return shown if shown is not None and set(shown) <= allowed else None


# ---------------------------------------------------------------- folders


def whole_folder(opened: OpenedModel, known: list[str] | None, *, say: Say) -> Source | None:
    """Open all of a folder whose class folders are ImageNet classes of the model; None where the usual split should be taken.

    Of a folder without `train` and `val` a share is held out, but a set made for evaluation is to be evaluated whole. A run
    that may have learnt from the rest of the folder keeps to the share.
    """
    data = opened.config.data
    spec = data.val_source or data.source
    kind, _, place = spec.partition(":")
    path = Path(place).expanduser()
    if known is None or kind != "folder" or not path.is_dir():
        return None
    below = subfolders(path)
    shown = wnids_among(below, known)
    trained_on = opened.pretrained.manifest["source"]
    if shown is None:
        return None
    if isinstance(trained_on, str) and trained_on.startswith("folder:"):
        same_place = Path(trained_on.partition(":")[2]).expanduser().resolve() == path.resolve()
        if same_place or len(shown) == len(known):
            return None
    files = scan(path, below)
    say(f"{spec}: its folders are ImageNet classes and no split; all of its {len(files.relative):,} images are evaluated")
    return decoded(FileSource(files, name=spec), key=cache_key(files), split="val", data=data)


def list_images(path: Path) -> ImageFiles:
    """List all images in and below a folder, without labels.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    path = path.expanduser()
    if not path.is_dir():
        raise DataError(f"{path}: there is no such folder; expected a folder of images")
    found: list[tuple[str, int, int]] = []
    collect(path, ".", found)
    if not found:
        raise DataError(f"{path}: no images in this folder or below it")
    found.sort()
    sizes, mtimes = (np.array([item[column] for item in found], np.int64) for column in (1, 2))
    return ImageFiles(path, [item[0].removeprefix("./") for item in found], np.zeros(len(found), np.int64), [], sizes, mtimes)


# ---------------------------------------------------------------- label files


def open_labelled(opened: OpenedModel, file: LabelFile, *, known: list[str] | None, say: Say) -> tuple[OpenedModel, LabelSet]:
    """Open the images that a label file is about."""
    data, pretrained = opened.config.data, opened.pretrained
    spec = data.val_source or data.source
    answers = answers_by_name(opened, file, known)
    classes = pretrained.classes if pretrained.named or known is None else known
    outputs = None
    if file.numbered and len(answers) < len(classes):  # an ImageNet-21k model on ILSVRC's images
        outputs = torch.tensor(sorted(answers.values()))
        place = {output: answer for answer, output in enumerate(outputs.tolist())}
        answers = {name: place[output] for name, output in answers.items()}
        classes = [classes[i] for i in outputs.tolist()]
    found = {key: resolve(key, file, answers, opened.ckpt) for key in file.labels}
    right = {key: numbers for key, numbers in found.items() if len(numbers)}
    kind, _, folder = spec.partition(":")
    if kind == "folder":
        files = list_images(Path(folder))
        paths = files.relative
    else:
        opened, whole = open_split(opened, "val")
        # of a member of a shard, what follows the colon is its name
        paths = [whole.where(index).replace(":", "/") for index in range(len(whole))]
    keys = match_images(paths, file)
    keep = np.array([index for index, key in enumerate(keys) if key in right], np.int64)
    chosen = [right[key] for key in keys if key in right]
    if not chosen:
        raise DataError(f"{file.path}: none of the labels of these images is a class of {opened.ckpt}")
    accepted = Accepted(np.cumsum([0, *map(len, chosen)]), np.concatenate(chosen))
    digest = hashlib.sha256(keep.tobytes() + accepted.starts.tobytes() + accepted.numbers.tobytes()).hexdigest()[:24]
    if kind == "folder":
        part = replace(files, classes=classes).take(keep)
        part = replace(part, labels=accepted.numbers[accepted.starts[:-1]])
        source: Source = decoded(FileSource(part, name=spec), key=cache_key(part), split="val", data=data)
        source.fingerprint = f"{source.fingerprint}-{digest}"
        opened = settle_workers(opened, source)
    else:
        source = SubsetSource(whole, keep, fingerprint=f"{whole.fingerprint}-{digest}")
    several = int((np.diff(accepted.starts) > 1).sum())
    missing = len(file.labels) - len([key for key in keys if key is not None])
    absent = f"; {missing:,} images it names are not there" if missing else ""
    say(f"{file.path}: labels for {len(chosen):,} of {len(keys):,} images, {several:,} with several; others left out{absent}")
    about = {
        "labels": str(file.path),
        "left_out": len(keys) - len(chosen),
        "several_labels": several,
        "not_there": missing,
        **({} if outputs is None else {"restricted_to": len(outputs)}),
    }
    return opened, LabelSet(source, classes, outputs, None, accepted, about)


def answers_by_name(opened: OpenedModel, file: LabelFile, known: list[str] | None) -> dict[str, int]:
    """Return what a label may say to the model's output it means: a class name, a wnid, or a number.

    Raises:
        DataError: the file is about ImageNet's classes and the model is not.
    """
    pretrained = opened.pretrained
    by_wnid = {wnid: output for output, wnid in enumerate(known or ())}
    ilsvrc = {str(number): by_wnid[wnid] for number, wnid in enumerate(imagenet_classes(ILSVRC)) if wnid in by_wnid}
    if file.numbered:
        if len(ilsvrc) < ILSVRC - 1:
            raise DataError(
                f"{file.path}: these are labels of ImageNet's 1,000 classes, of which {opened.ckpt} has {len(ilsvrc):,}; "
                "expected a model of ImageNet-1k or -21k"
            )
        return ilsvrc
    by_name = {name: output for output, name in enumerate(pretrained.classes)}  # of an unnamed model these are numbers
    return {**(ilsvrc if known is not None and len(known) == ILSVRC else {}), **by_wnid, **by_name}


def resolve(key: str, file: LabelFile, answers: dict[str, int], ckpt: Path) -> NDArray[np.int64]:
    """Return the answers that are right for an image, ascending; perhaps none where numbers are ILSVRC's.

    Raises:
        DataError: a label is no class of the model's.
    """
    said = file.labels[key]
    if file.numbered:  # of ILSVRC's classes the model may lack one
        said = [label for label in said if label in answers]
    else:
        said = said if said[0] in answers else [part.strip() for part in said[0].split(",") if part.strip()]
    unknown = [label for label in said if label not in answers]
    if unknown or not (said or file.numbered):
        wrong = unknown[0] if unknown else file.labels[key][0]
        close = difflib.get_close_matches(wrong, answers, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; expected one such as {next(iter(answers))!r}"
        raise DataError(f"{file.place(key)}: {wrong!r} is no class of {ckpt}{hint}")
    return np.unique(np.array([answers[label] for label in said], np.int64))
