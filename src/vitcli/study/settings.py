"""One cell of a study: the settings of its run, and the commands of its stages.

What the study decides itself (length, data size, splits, probes, readings) lies on top of what its file says of the runs.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitcli.config import Config
from vitcli.config_file import Layers, check_config
from vitcli.config_file import validate as validate_run
from vitcli.errors import ConfigError
from vitcli.plan import resolve
from vitcli.study.cells import UPSTREAM, Stage
from vitcli.study.config import StudyConfig
from vitcli.study.file import run_layers
from vitcli.train import short_name

__all__ = ["SETTINGS", "Group", "Upstream", "run_settings", "settle", "stages"]

SETTINGS = "settings.yaml"
# of every run, where the study says nothing: what would else be paid for in every cell
DEFAULTS: dict[str, Any] = {"train": {"tune": False}, "log": {"keep_checkpoints": 1, "sample_images": 0}}
ONE_PASS_DEFAULTS: dict[str, Any] = {**DEFAULTS, "optim": {"schedule": "constant"}}
EMA_SHARE = 0.1  # of a one-pass run that says nothing about averages


class Group(NamedTuple):
    """What cells that differ in seed, or in what a search tries, have in common."""

    variant: str
    family: str
    examples: int


@dataclass(frozen=True)
class Upstream:
    """The data to pretrain on; of data that does not lie here nothing is known but why."""

    train_examples: int
    val_examples: int
    num_classes: int  # 0 where no labels are needed
    problem: str | None = None


# ---------------------------------------------------------------- settings of a run


def run_settings(
    study: StudyConfig, stated: Layers, group: Group, *, point: Mapping[str, Any], trial: bool, path: Path
) -> tuple[Config, Layers]:
    """Put together what base, family, variant, search and the study itself say of a run.

    Raises:
        ConfigError: with the file and line of what is wrong.
    """
    defaults = ONE_PASS_DEFAULTS if study.form == "one_pass" else DEFAULTS
    layers = run_layers(stated, defaults=defaults, family=group.family, variant=group.variant, point=point)
    share = study.search.share if trial and study.search is not None else 1.0
    own: dict[str, Any] = {"data.examples": group.examples}
    if study.form == "one_pass":
        own["train.examples"] = math.ceil(group.examples * share)
        if not trial:
            own["log.readings"] = study.sizes_of(group.variant)
        if all(layers.values.get(f"train.{key}") is None for key in ("ema_decay", "ema_share")):
            own["train.ema_share"] = EMA_SHARE
        schedule = layers.values["optim.schedule"]
        if schedule not in ("constant", "rsqrt"):
            raise ConfigError(
                f"{layers.where('optim.schedule')}: optim.schedule is {schedule}; a one_pass run is read on its way, where "
                "only constant and rsqrt treat every reading alike"
            )
    else:
        length = study.length
        assert length is not None
        unit, amount = next((key, value) for key in ("epochs", "examples", "steps") if (value := getattr(length, key)))
        own[f"train.{unit}"] = amount * share if unit == "epochs" else math.ceil(amount * share)
        if length.early_stop_evals is not None:
            own |= {"train.early_stop_evals": length.early_stop_evals, "data.dev_fraction": length.dev_fraction}
    if trial and study.search is not None:
        own["data.dev_fraction"] = study.search.dev_fraction
        if share < 1 and layers.values.get("optim.warmup_steps"):
            own["optim.warmup_steps"] = int(layers.values["optim.warmup_steps"] * share)
    probed = [each for each in study.transfer if each.shots and not trial]
    if probed:
        own |= {"fewshot.datasets": [each.dataset for each in probed]}
        own |= {"fewshot.shots": probed[0].shots, "fewshot.seeds": probed[0].seeds}
    if "data.dev_fraction" in own and layers.values.get("data.val_source") is not None:
        own["data.val_source"] = None  # its accuracy is the stage `upstream`'s to measure
    layers.add(own, {}, str(path))
    config = validate_run(layers)
    check_config(config, layers)
    refuse_without_labels(config, layers, study, trial=trial)
    return config, layers


def refuse_without_labels(config: Config, layers: Layers, study: StudyConfig, *, trial: bool) -> None:
    """Raise ConfigError where a run that learns without labels is asked for what only a classifier can tell."""
    asked = {
        "search": trial,
        "length.early_stop_evals": study.length is not None and study.length.early_stop_evals is not None,
        "translate_px": bool(study.translate_px),
    }
    key = next((key for key, is_asked in asked.items() if is_asked), None)
    if key is not None and not config.objective.needs_labels:
        raise ConfigError(
            f"{layers.where('objective.name')}: objective.name is {config.objective.name}, but {key} goes by the accuracy of a "
            "classifier, which is not there before a fine-tuning; drop one"
        )


def settle(config: Config, layers: Layers, group: Group, upstream: Upstream, *, device: torch.device) -> tuple[Config, int]:
    """Resolve a run's sizes and length, as it will itself.

    Raises:
        ConfigError: a run of this length cannot have these settings.
    """
    images = group.examples
    if config.data.dev_fraction is not None:
        images -= max(1, min(images - 1, round(images * config.data.dev_fraction)))
    # a precision that is given is not measured for
    draft = config.model_copy(update={"train": config.train.model_copy(update={"precision": "float32"})})
    try:
        found = resolve(draft, train_examples=images, val_examples=upstream.val_examples, device=device)
    except ConfigError as error:
        raise ConfigError(f"{layers.where('optim.warmup_steps')}: {', '.join(map(str, group))}: {error}") from None
    steps = found.train.steps
    assert steps is not None
    at = [math.ceil(images / config.train.batch_size) for images in config.log.readings]
    if twice := next((one for one, other in zip(config.log.readings, at) if at.count(other) > 1), None):
        raise ConfigError(
            f"{layers.where('train.batch_size')}: train.batch_size is {config.train.batch_size}, so {twice:,} images and "
            "another of `sizes` would be read at the same step; take sizes further apart"
        )
    log = config.log
    if log.eval_every_steps is None and config.train.early_stop_evals is None:
        log = log.model_copy(update={"eval_every_steps": steps})  # a curve that nobody reads would be paid for in every cell
    train = config.train
    if train.precision == "auto" and device.type == "cpu":  # measured in every process, it could differ from cell to cell
        train = train.model_copy(update={"precision": "float32"})
    settled = {"model": found.model, "objective": found.objective, "log": log, "train": train}
    return config.model_copy(update=settled), steps


# ---------------------------------------------------------------- stages


def stages(study: StudyConfig, config: Config, folder: Path, *, family: str, seed: int, trial: bool) -> Iterator[Stage]:
    """Yield the commands of a cell, in order."""
    run = folder / "run"
    yield Stage("pretrain", ("pretrain", "--config", str(folder / SETTINGS), "--out", str(run)), done=run / "summary.json")
    if trial:
        return
    root = [] if config.data.root is None else ["--data-root", str(config.data.root)]
    # named, a data set is taken with its own evaluation split, whatever the run was evaluated on
    dataset = [] if config.data.dev_fraction is None else ["--dataset", config.data.source]
    if config.data.dev_fraction is not None:
        answers = folder / "upstream.safetensors"
        words = ("eval", "--ckpt", str(run), *dataset, *root, "--save-predictions", str(answers))
        yield Stage(UPSTREAM, words, done=answers)
    for images in config.log.readings or [0]:
        last = images in (0, *config.log.readings[-1:])
        mark, suffix = ("", "") if last else (f"@{images}", f"-n{images:09d}")
        step = math.ceil(images / config.train.batch_size)
        ckpt = run if last else run / "checkpoints" / f"step_{step:08d}"
        for each in study.transfer:
            if each.finetune is not None:
                place = folder / f"finetune-{short_name(each.dataset)}{suffix}"
                asked = {"train.precision": config.train.precision, **each.finetune_of(family)}
                settings = [f"{key}={json.dumps(value)}" for key, value in asked.items()]
                words = ("finetune", "--ckpt", str(ckpt), "--dataset", each.dataset, *root, "--out", str(place), *settings)
                yield Stage(f"finetune:{each.dataset}{mark}", (*words, f"seed={seed}"), done=place / "summary.json")
        if study.translate_px:
            far = [str(px) for px in study.translate_px]
            table = folder / f"translate-{'-'.join(far)}{suffix}.json"
            words = ("eval", "--ckpt", str(ckpt), *dataset, *root, "--translate", ",".join(far), "--json")
            yield Stage(f"translate{mark}", words, done=table, output=table)
