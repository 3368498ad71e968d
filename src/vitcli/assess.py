"""`vit eval`: everything that is measured of a model without training it, in one process or in all that torchrun started."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitcli.config_file import stored_config
from vitcli.data.corruptions import CORRUPTIONS, STRENGTHS, CorruptedSource
from vitcli.device import choose_device
from vitcli.distributed import Ranks, process_group
from vitcli.errors import ConfigError, DataError, UserError
from vitcli.evaluate import evaluate
from vitcli.findings import findings
from vitcli.forward import logits, source_answers
from vitcli.label_sets import LabelSet, open_label_set
from vitcli.metrics import confusion_matrix, share_interval
from vitcli.opened import Images, OpenedModel, open_images, open_model
from vitcli.predictions import VAL_PREDICTIONS, Predictions, collect_predictions, load_predictions, save_predictions
from vitcli.probes import probe_checkpoint
from vitcli.rundir import write_bytes
from vitcli.speed import measure_speed
from vitcli.translation import check_pixels, judge_translation
from vitcli.views import tta_forward, tta_views

__all__ = ["Questions", "assess", "open_run", "predictions_of_run"]

Say = Callable[[str], None]

BATCH_SIZE = 256
TIMEOUT_SECONDS = 600  # of several processes, how long one may keep the others waiting
MOST_LOGITS = 1 << 27  # kept for the temperature: 512 MiB
MOST_MATRIX_CLASSES = 2048  # a table of these by these has 4 million cells
SETTINGS = ("data.", "train.precision=")  # what may be changed of a model that is only looked at


@dataclass(frozen=True)
class Questions:
    """What is asked about a model."""

    labels: Path | None = None  # other labels than the data set's
    all_outputs: bool = False  # of a set of some of ImageNet's classes, let the others compete
    tta: str | None = None  # one of views.TTA_KINDS
    mistakes: int = 5
    confusion: Path | None = None  # a CSV file to write
    predictions: Path | None = None  # a file to write
    robustness: bool = False
    translate: Sequence[int] = ()  # px
    speed: bool = False
    shots: Sequence[int] = ()
    linear: bool = False
    knn: Sequence[int] = ()
    seeds: int = 3
    l2: float | None = 1024.0  # of few-shot probes; None: chosen on held-out shots

    @property
    def probes(self) -> bool:
        """Whether the features are asked about."""
        return bool(self.shots or self.linear or self.knn)

    @property
    def classifier(self) -> bool:
        """Whether the model's own answers are asked about: always, but where it is the features alone."""
        files = (self.labels, self.tta, self.confusion, self.predictions)
        return not self.probes or self.robustness or bool(self.translate) or any(each is not None for each in files)


def assess(
    ckpt: Path,
    *,
    dataset: str | None = None,
    overrides: Sequence[str] = (),
    batch_size: int = BATCH_SIZE,
    ask: Questions = Questions(),
    say: Say,
) -> dict[str, Any] | None:
    """Answer questions about a run, checkpoint or weights file on a data set's evaluation split.

    Returns:
        JSON values; None in all processes but the first.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has no classifier although one is asked about.
        ConfigError: a setting that would change the model, or questions that do not go together.
        DataError: the data set is missing, or has classes the checkpoint does not know.
        UserError: a file that is to be written is there already.
    """
    for word in overrides:
        if not word.startswith(SETTINGS):
            raise ConfigError(f"{word}: `vit eval` takes settings of data.* and train.precision; the model is what it is")
    with process_group(device_type=choose_device("auto").type, timeout_seconds=TIMEOUT_SECONDS) as ranks:
        if not ranks.main:
            say = say_nothing
        ranks.on_main(lambda: refuse_existing(ask.confusion, ask.predictions))
        result: dict[str, Any] = {}
        if ask.classifier or ask.speed:
            opened = ranks.main_first(
                lambda: open_model(ckpt, dataset=dataset, overrides=overrides, head=ask.classifier, say=say)
            )
            result |= {
                "checkpoint": str(opened.pretrained.source_path),
                "step": opened.pretrained.step,
                "dataset": opened.config.data.val_source or opened.config.data.source,
            }
            if ask.classifier:
                result |= judge_classifier(opened, batch_size=batch_size, ask=ask, ranks=ranks, say=say)
            if ask.speed and ranks.main:
                result["speed"] = measure_speed(opened, batch_size=batch_size)
            ranks.barrier()
        if ask.probes:
            probes = probe_checkpoint(
                ckpt,
                dataset=dataset,
                overrides=overrides,
                shots=ask.shots,
                linear=ask.linear,
                knn=ask.knn,
                seeds=ask.seeds,
                l2=ask.l2,
                batch_size=batch_size,
                say=say,
                ranks=ranks,
            )
            result = {key: probes[key] for key in ("checkpoint", "step", "dataset")} | result | {"probes": probes}
        return result if ranks.main else None


def judge_classifier(opened: OpenedModel, *, batch_size: int, ask: Questions, ranks: Ranks, say: Say) -> dict[str, Any]:
    """Evaluate a model's own answers, and write the files that were asked for."""

    def open_labels() -> tuple[OpenedModel, LabelSet]:
        return open_label_set(opened, labels=ask.labels, restrict=not ask.all_outputs, say=say)

    check_pixels(ask.translate, image_size=opened.config.data.image_size)
    opened, label_set = ranks.main_first(open_labels)
    source, classes, loss = label_set.source, label_set.classes, opened.config.train.loss
    if ask.confusion is not None and len(classes) > MOST_MATRIX_CLASSES:
        raise ConfigError(
            f"--confusion: a table of {len(classes):,} by {len(classes):,} classes; expected at most {MOST_MATRIX_CLASSES:,} "
            "(--save-predictions keeps what it is made of)"
        )
    if ask.tta is not None:
        opened = replace(opened, flops_per_image=opened.flops_per_image * tta_views(ask.tta))
    forward = logits if ask.tta is None else tta_forward(ask.tta, loss=loss)
    keep_logits = len(source) * len(classes) <= MOST_LOGITS
    with closing(
        source_answers(
            opened.model,
            source,
            opened.config,
            forward=forward,
            device=opened.device,
            batch_size=batch_size,
            warn=say,
            flops_per_image=opened.flops_per_image,
            ranks=ranks,
        )
    ) as answered:
        result, predictions = collect_predictions(
            label_set.judged(answered),
            num_classes=len(classes),
            device=opened.device,
            loss=loss,
            ranks=ranks,
            keep_logits=keep_logits,
        )
    found = {
        "fingerprint": source.fingerprint,
        **label_set.about,
        "tta": ask.tta,
        **result.as_dict(classes),
        **findings(predictions, classes=classes, loss=loss, where=source.where, mistakes=ask.mistakes),
    }
    if ranks.main:
        if ask.confusion is not None:
            matrix = confusion_matrix(predictions.labels, predictions.predicted, num_classes=len(classes))
            write_bytes(ask.confusion, matrix_csv(matrix.tolist(), classes).encode(errors="surrogateescape"))
        if ask.predictions is not None:
            about = about_of(opened, source.fingerprint, classes) | {"tta": ask.tta, **label_set.about}
            save_predictions(ask.predictions, replace(predictions, logits=None), about=about)
    if ask.robustness:
        found["robustness"] = judge_robustness(opened, label_set, batch_size=batch_size, ask=ask, ranks=ranks, say=say)
    if ask.translate:
        found["translation"] = judge_translation(
            opened,
            label_set,
            predictions,
            pixels=ask.translate,
            forward=forward,
            batch_size=batch_size,
            ranks=ranks,
            say=say,
        )
    return found


def judge_robustness(
    opened: OpenedModel, label_set: LabelSet, *, batch_size: int, ask: Questions, ranks: Ranks, say: Say
) -> dict[str, Any]:
    """Return the accuracy under every corruption at every strength, and its means."""
    loss = opened.config.train.loss
    table: dict[str, list[dict[str, Any]]] = {}
    for kind in CORRUPTIONS:
        table[kind] = []
        for strength in STRENGTHS:
            with closing(
                source_answers(
                    opened.model,
                    CorruptedSource(label_set.source, kind, strength),
                    opened.config,
                    forward=logits if ask.tta is None else tta_forward(ask.tta, loss=loss),
                    device=opened.device,
                    batch_size=batch_size,
                    warn=say_nothing,  # the same images as before
                    flops_per_image=opened.flops_per_image,
                    ranks=ranks,
                )
            ) as answered:
                result = evaluate(
                    label_set.judged(answered), num_classes=len(label_set.classes), device=opened.device, loss=loss, ranks=ranks
                )
            low, high = share_interval(result.correct, result.examples)
            table[kind].append({"strength": strength, "top1": result.top1, "interval": [float(low), float(high)]})
        say(f"{kind}: top-1 " + ", ".join(f"{100 * cell['top1']:.1f}" for cell in table[kind]) + " % at strengths 1 to 5")
    means = {kind: sum(cell["top1"] for cell in cells) / len(cells) for kind, cells in table.items()}
    return {"corruptions": table, "means": means, "mean": sum(means.values()) / len(means)}


def matrix_csv(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Write a confusion matrix: a row per class of the labels, a column per class that was predicted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label \\ predicted", *classes])
    for name, row in zip(classes, matrix, strict=True):
        writer.writerow([name, *row])
    return text.getvalue()


# ---------------------------------------------------------------- runs


def predictions_of_run(
    run_dir: Path, *, data_root: Path | None = None, batch_size: int = BATCH_SIZE, say: Say
) -> tuple[Predictions, dict[str, Any]]:
    """Return the answers of a run's model to its evaluation images, and what they are about: stored ones, or computed now.

    A run that is not finished, and one that an older version wrote, has none stored.

    Raises:
        CheckpointError: there is no run, or no checkpoint in it.
        DataError: its data set is not here.
    """
    path = run_dir / VAL_PREDICTIONS
    if path.exists():
        try:
            return load_predictions(path)
        except DataError as error:
            say(f"{error}; evaluating {run_dir} anew")
    opened, images = open_run(run_dir, data_root=data_root, say=say)
    with closing(
        source_answers(
            opened.model,
            images.source,
            opened.config,
            device=opened.device,
            batch_size=batch_size,
            warn=say,
            flops_per_image=opened.flops_per_image,
        )
    ) as answered:
        _, predictions = collect_predictions(
            answered,
            num_classes=len(images.classes),
            device=opened.device,
            loss=opened.config.train.loss,
            class_map=images.class_map,
        )
    return predictions, about_of(opened, images.source.fingerprint, images.classes)


def open_run(run_dir: Path, *, data_root: Path | None = None, say: Say) -> tuple[OpenedModel, Images]:
    """Open a run's model and the images it is evaluated on, at the data root given, or that of the run if it is here.

    Raises:
        CheckpointError: there is no run, or no checkpoint in it.
        DataError: its data set is not here.
    """
    config = run_dir / "config.yaml"
    if data_root is None and config.exists():
        stored = stored_config(config).data.root
        data_root = stored if stored is not None and stored.is_dir() else None
    overrides = [] if data_root is None else [f"data.root={json.dumps(str(data_root), ensure_ascii=False)}"]
    return open_images(open_model(run_dir, overrides=overrides, say=say), say=say)


def about_of(opened: OpenedModel, fingerprint: str, classes: Sequence[str]) -> dict[str, Any]:
    """Describe what predictions are about."""
    data = opened.config.data
    return {
        "dataset": data.val_source or data.source,
        "fingerprint": fingerprint,
        "classes": list(classes),
        "checkpoint": str(opened.pretrained.source_path),
        "step": opened.pretrained.step,
        "loss": opened.config.train.loss,
    }


def refuse_existing(*files: Path | None) -> None:
    """Raise UserError for a file that cannot be written or would be overwritten, before hours are spent."""
    for file in files:
        if file is not None and file.exists():
            raise UserError(f"{file}: exists already; choose another name, or delete it")
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file}: there is no folder {file.parent}; make it first, or choose another place")


def say_nothing(text: str) -> None:
    """Leave it to the main process, or to an earlier pass."""
