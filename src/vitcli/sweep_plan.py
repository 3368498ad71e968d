"""What a sweep will do: which runs, with which settings, in which folders.

The paper's protocol (ViT, 2010.11929, Table 4 and appendix B.1.1): learning rates are tried on a development split of the
training images, and the best is trained again on all of them. A `Target` is that for one start and one data set; each of its
trials is an ordinary run of `vit finetune`.
"""

import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitcli.config import Config, DataConfig, LogConfig
from vitcli.config_file import dump_config
from vitcli.data.named import NAMED_SETS, data_root, present_sets
from vitcli.data.sources import open_source
from vitcli.device import choose_device, flops_per_second, hardware
from vitcli.errors import ConfigError, DataError, RunExistsError
from vitcli.models.flops import training_flops
from vitcli.plan import describe_model, resolve, tune
from vitcli.recipes import NOT_MIRRORED
from vitcli.rundir import differing_keys, read_json, write_json, write_text
from vitcli.train import begun, finetune_config, keys_free_to_change, run_name, short_name, value_at, with_defaults

__all__ = ["Start", "Target", "Trial", "best_rates_first", "describe_target", "name_starts", "plan_target", "vtab_sets"]

Say = Callable[[str], None]

# ViT (2010.11929) Table 4
RATES = {"imagenet": (0.003, 0.01, 0.03, 0.06)}
OTHER_RATES = (0.001, 0.003, 0.01, 0.03)
DEV_FRACTIONS = {"imagenet": 0.01, "cifar10": 0.02, "cifar100": 0.02, "pets": 0.1, "flowers102": 0.1}
OTHER_DEV_FRACTION, OTHER_DEV_EXAMPLES = 0.1, 2000  # what the table says nothing about: the smaller of the two
OTHER_FACTORS = (0.1, 0.3, 1.0, 3.0)  # of the recipe's own rate: Table 4's rates are for SGD
# VTAB-1k: Table 4's last row, and the 800 + 200 examples of the benchmark (1910.04867)
VTAB_EXAMPLES, VTAB_DEV_FRACTION, VTAB_STEPS, VTAB_RATES = 1000, 0.2, 2500, (0.01,)

PLAN, SETTINGS = "plan.json", "settings.yaml"


@dataclass(frozen=True)
class Start:
    """Weights to start from, or the same model without them."""

    name: str
    ckpt: Path
    from_scratch: bool


@dataclass(frozen=True)
class Target:
    """One start on one data set."""

    start: Start
    dataset: str
    folder: Path
    config: Config  # of the final runs, but for seed and rate
    lrs: tuple[float, ...]  # ascending
    seeds: tuple[int, ...]
    dev_fraction: float
    steps: int
    trial_steps: int
    num_classes: int
    train_examples: int  # all of the training split, or of the part that data.examples takes
    test_examples: int
    recipe: dict[str, Any] | None
    seconds_per_image: float  # in training, measured or estimated

    @property
    def label(self) -> str:
        """Name it in a line of text."""
        return f"{short_name(self.dataset)}, {self.start.name}"

    @property
    def dev_examples(self) -> int:
        """Return the size of the development split."""
        return max(1, round(self.train_examples * self.dev_fraction))

    @property
    def trials(self) -> list["Trial"]:
        """Return the runs that the rate is chosen by; none where there is nothing to choose."""
        if len(self.lrs) == 1:
            return []
        return [Trial(self, lr, self.seeds[0], False, self.folder / f"lr-{lr:g}") for lr in self.lrs]

    def finals(self, lr: float) -> list["Trial"]:
        """Return the runs on all training images with a rate, one for each seed."""
        return [Trial(self, lr, seed, True, final_folder(self.folder, lr, seed)) for seed in self.seeds]

    @property
    def seconds(self) -> float:
        """Estimate the training time of everything, on one device."""
        images = self.config.train.batch_size * (len(self.trials) * self.trial_steps + len(self.seeds) * self.steps)
        return images * self.seconds_per_image


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: on the rest of the training split, judged by its share, or (`final`) on all of it."""

    target: Target
    lr: float
    seed: int
    final: bool
    folder: Path

    @property
    def label(self) -> str:
        """Name it in a line of text."""
        return f"{self.target.label}, lr {self.lr:g}" + (f", seed {self.seed}" if self.final else "")

    @property
    def steps(self) -> int:
        """Return its length."""
        return self.target.steps if self.final else self.target.trial_steps

    def words(self) -> list[str]:
        """Return the words after `vit` that carry it out."""
        target, config = self.target, self.target.config
        words = ["finetune", "--ckpt", str(target.start.ckpt), "--dataset", target.dataset]
        words += ["--config", str(target.folder / SETTINGS), "--out", str(self.folder)]
        words += ["--from-scratch"] if target.start.from_scratch else []
        words += [f"optim.lr={self.lr!r}", f"seed={self.seed}"]
        if self.final:
            return words
        words += [f"data.dev_fraction={target.dev_fraction!r}"]
        if config.data.val_source is not None:
            words += ["data.val_source=null"]
        if target.trial_steps != target.steps:
            words += [f"train.steps={target.trial_steps}"]
            if config.optim.warmup_steps is not None:
                words += [f"optim.warmup_steps={config.optim.warmup_steps * target.trial_steps // target.steps}"]
        # what a trial is resumed from, and no more: it serves for one number
        return words if config.log.keep_checkpoints != LogConfig().keep_checkpoints else [*words, "log.keep_checkpoints=1"]

    def command(self) -> list[str]:
        """Return the command of a process that carries it out."""
        return [sys.executable, "-m", "vitcli", *self.words()]


def final_folder(folder: Path, lr: float, seed: int) -> Path:
    """Return where a final run lies; its name has the rate where a run with another one was there before."""
    plain = folder / f"final-seed-{seed}"
    there = value_at(read_json(plain / "manifest.json"), "requested.optim.lr") if begun(plain) else None
    return plain if there is None or math.isclose(there, lr) else folder / f"final-lr-{lr:g}-seed-{seed}"


# ---------------------------------------------------------------- planning


def name_starts(ckpts: Sequence[Path], *, from_scratch: bool) -> list[Start]:
    """Name the checkpoints, and put their models without weights behind them as baselines.

    Raises:
        ConfigError: two of one name.
    """
    starts: list[Start] = []
    for ckpt in ckpts:
        name = start_name(ckpt)
        if same := next((start for start in starts if start.name == name), None):
            raise ConfigError(
                f"--ckpt: {same.ckpt} and {ckpt} would both be called {name}; sweep them in two calls, with an --out each"
            )
        starts.append(Start(name, ckpt, False))
    return starts + (
        [replace(start, name=f"{start.name}-scratch", from_scratch=True) for start in starts] if from_scratch else []
    )


def start_name(ckpt: Path) -> str:
    """Name a start after its run, run and step, or file."""
    place = ckpt.resolve()
    if place.parent.name == "checkpoints" and len(place.parents) > 1:
        return f"{place.parents[1].name}-{place.name}"
    return short_name(place.name if (place / "checkpoints").is_dir() else run_name(place))


def vtab_sets(root: Path | None, *, say: Say) -> list[str]:
    """Return the named data sets under the data root with enough images, without ImageNet, which is no task of VTAB.

    Raises:
        DataError: there is none.
    """
    place = data_root(root)
    found = []
    for name in present_sets(place):
        if name == "imagenet":
            continue
        images = len(open_source(name, split="train", data=DataConfig(source=name, image_size=(32, 32), root=root)))
        if images >= VTAB_EXAMPLES:
            found.append(name)
        else:
            say(f"{name}: left out, it has {images:,} training images of {VTAB_EXAMPLES:,}")
    if not found:
        raise DataError(f"{place}: no data set for --vtab lies here ({', '.join(NAMED_SETS)}); give --data-root or --dataset")
    return found


def plan_target(
    start: Start,
    dataset: str,
    folder: Path,
    *,
    config_path: Path | None,
    overrides: Sequence[str],
    lrs: Sequence[float] | None,
    seeds: int,
    trial_steps: int | None,
    vtab: bool,
    precision: str | None,
    say: Say,
) -> Target:
    """Settle everything that the trials of one start on one data set have in common; nothing is written.

    A sweep that has begun keeps its recipe and what was measured, also on another machine.

    Args:
        precision: what `auto` comes to, where another target has settled it: they are compared with each other.

    Raises:
        ConfigError: settings that cannot be, or that the sweep chooses itself.
        DataError: the data set is missing or too small.
        RunExistsError: the folder holds a sweep with other settings.
    """
    for word in overrides:
        if word.startswith("optim.lr="):
            raise ConfigError(f"{word}: the learning rate is what a sweep chooses; give --lrs {word.partition('=')[2]}")
    kept = read_json(folder / PLAN) if any(begun(run) for run in folder.glob("*") if run.is_dir()) else None
    if vtab:
        overrides = [f"train.steps={VTAB_STEPS}", f"data.examples={VTAB_EXAMPLES}", *overrides]
        if dataset in NOT_MIRRORED:
            overrides = ["augment.flip=false", *overrides]
    place = f"out={json.dumps(str(folder / 'settings'), ensure_ascii=False)}"  # where no run can be
    config, _, recipe = finetune_config(
        start.ckpt,
        dataset,
        config_path,
        [*overrides, place],
        from_scratch=start.from_scratch,
        recipe=None if kept is None else kept["recipe"],
        recipe_of="cifar10" if vtab else dataset,  # Table 4's rows differ in their lengths alone
        say=lambda note: None if note.startswith(("recipe:", "time:", "ends early:")) else say(note),  # the plan says it better
    )
    fraction = config.data.dev_fraction
    if config.train.early_stop_evals is not None:
        say(f"{dataset}: train.early_stop_evals is off in a sweep, whose final runs are judged on the test split at their end")
    data = config.data.model_copy(update={"dev_fraction": None})
    train_settings = config.train.model_copy(update={"early_stop_evals": None})
    config = config.model_copy(update={"data": data, "train": train_settings, "out": None})
    train = open_source(dataset, split="train", data=data)
    test = open_source(data.val_source or dataset, split="val", data=data)
    if len(train) < 2:
        raise DataError(f"{dataset}: has {len(train):,} training images; a rate cannot be chosen on a share of them")
    if fraction is None and vtab:
        fraction = VTAB_DEV_FRACTION
    if fraction is None and data.examples is None:
        fraction = DEV_FRACTIONS.get(dataset)  # of all its images: of a few, 2 % would be too few to tell rates apart
    if fraction is None:
        fraction = float(f"{min(OTHER_DEV_FRACTION, OTHER_DEV_EXAMPLES / len(train)):.3g}")
    if kept is None and precision is not None and config.train.precision == "auto":
        config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    config, seconds_per_image = settle(config, kept, num_classes=len(train.classes), train=len(train), test=len(test))
    device = choose_device(config.train.device)
    resolved = resolve(config, train_examples=len(train), val_examples=len(test), device=device)
    assert resolved.train.steps is not None
    target = Target(
        start,
        dataset,
        folder,
        config,
        tuple(sorted(set(lrs or default_rates(config, dataset, vtab=vtab)))),
        tuple(range(config.seed, config.seed + seeds)),
        fraction,
        resolved.train.steps,
        trial_steps or resolved.train.steps,
        len(train.classes),
        len(train),
        len(test),
        recipe,
        seconds_per_image,
    )
    if kept is not None:
        refuse_other_settings(folder, kept["settings"], settings_of(target))
    return target


def default_rates(config: Config, dataset: str, *, vtab: bool) -> Sequence[float]:
    """Return the rates of Table 4 for its optimiser, and multiples of the recipe's for another."""
    if config.optim.name == "sgd":
        return VTAB_RATES if vtab else RATES.get(dataset, OTHER_RATES)
    return [float(f"{config.optim.lr * factor:.2g}") for factor in OTHER_FACTORS]


def settle(config: Config, kept: dict[str, Any] | None, *, num_classes: int, train: int, test: int) -> tuple[Config, float]:
    """Settle precision and micro-batch once, so that trials differ in nothing but the rate.

    Returns:
        The settings, and the seconds that an image costs in training.
    """
    device = choose_device(config.train.device)
    sizes: dict[str, Any] = {"train_examples": train, "val_examples": test, "device": device}
    if kept is None:
        tuned, choice = tune(config, num_classes=num_classes, **sizes)
        resolved = resolve(tuned, **sizes)
        speeds = [row["images_per_second"] for row in choice.table] if choice is not None else []
        flops = training_flops(resolved.model, image_size=config.data.image_size, num_classes=num_classes)
        seconds = 1 / max(speeds) if speeds else flops / flops_per_second(device)
        settled = {"precision": resolved.train.precision, "micro_batch_size": resolved.train.micro_batch_size}
    else:
        open_keys = {"precision": config.train.precision == "auto", "micro_batch_size": config.train.micro_batch_size is None}
        settled = {key: kept["measured"][key] for key, is_open in open_keys.items() if is_open}
        seconds = kept["seconds_per_image"]
    return config.model_copy(update={"train": config.train.model_copy(update={**settled, "tune": False})}), seconds


def settings_of(target: Target) -> dict[str, Any]:
    """Return what must not change between two calls of one sweep; rates and seeds may come in addition."""
    return {
        **target.config.model_dump(mode="json", exclude={"optim": {"lr"}}),
        "dev_fraction": target.dev_fraction,
        "trial_steps": target.trial_steps,
    }


def refuse_other_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise RunExistsError if a sweep that has begun had other settings, but for those that change no result."""
    free = {"out", "optim.lr", *keys_free_to_change(Config)}
    stated = with_defaults({key: value for key, value in before.items() if key in Config.model_fields})
    differing = [key for key in differing_keys({**before, **stated}, now) if key not in free]
    if differing:
        said = ", ".join(
            f"{key} ({json.dumps(value_at(before, key))} there, {json.dumps(value_at(now, key))} now)" for key in differing[:6]
        )
        raise RunExistsError(
            f"{folder}: this sweep has other settings: {said}; choose another --out, or take the settings back"
        )


def write_plan(target: Target) -> None:
    """Write the settings that the trials read, and what a later call keeps."""
    target.folder.mkdir(parents=True, exist_ok=True)
    start, config = target.start, target.config
    stated = config.model_copy(update={"ckpt": start.ckpt, "from_scratch": start.from_scratch})
    write_text(target.folder / SETTINGS, dump_config(stated))
    measured = {"precision": config.train.precision, "micro_batch_size": config.train.micro_batch_size}
    plan = {"recipe": target.recipe, "measured": measured, "seconds_per_image": target.seconds_per_image}
    write_json(target.folder / PLAN, {**plan, "settings": settings_of(target)})


def best_rates_first(trials: Sequence[Trial]) -> list[Trial]:
    """Sort trials by how near they are to the middle of their rates: what the others are compared with comes first."""
    if not trials:
        return []
    middle = sum(math.log(trial.lr) for trial in trials) / len(trials)
    return sorted(trials, key=lambda trial: (round(abs(math.log(trial.lr) - middle), 6), trial.lr))


# ---------------------------------------------------------------- words


def describe_target(target: Target) -> list[str]:
    """Return the plan of one start on one data set as lines for a person."""
    config, rest = target.config, target.train_examples - target.dev_examples
    batch = f"steps of {config.train.batch_size:,}"
    size = config.data.image_size
    rates = ", ".join(f"{lr:g}" for lr in target.lrs)
    if target.trials:
        trials = (
            f"{len(target.trials)} rates ({rates}), {target.trial_steps:,} {batch} on {rest:,} images, "
            f"judged by {target.dev_examples:,} others of the training split"
        )
    else:
        trials = f"none: {rates} is the only rate"
    origin = "random weights" if target.start.from_scratch else str(target.start.ckpt)
    return [
        f"{target.label}: {target.folder}",
        f"  start     {origin}",
        f"  model     {describe_model(config.model, size)}, {target.num_classes:,} classes",
        f"  settings  {config.optim.name}, {size[0]} x {size[1]} px, {config.train.precision} on "
        f"{hardware(choose_device(config.train.device))}",
        f"  trials    {trials}",
        f"  final     {len(target.seeds)} seed{'s' if len(target.seeds) > 1 else ''}, {target.steps:,} {batch} on all "
        f"{target.train_examples:,} images, tested on {target.test_examples:,}",
        f"  cost      about {hours(target.seconds)} of training on one device",
        f"  a trial   vit {shlex.join((target.trials or target.finals(target.lrs[0]))[0].words())}",
    ]


def hours(seconds: float) -> str:
    """Write a long time in words."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{math.ceil(seconds / 60)} min"
