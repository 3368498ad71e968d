"""`pretrain` and `finetune`: from files and words to a resolved config, sources and starting weights, for one `fit`."""

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from vitcli.checkpoint import latest_checkpoint
from vitcli.config import Config, Section
from vitcli.config_file import LENGTHS, dump_config, read_config, stored_config
from vitcli.data.loader import choose_workers
from vitcli.data.sources import open_source
from vitcli.device import choose_device, flops_per_second, hardware, keep_freed_memory
from vitcli.distributed import Ranks, process_group
from vitcli.errors import ConfigError, DataError, RunExistsError
from vitcli.evaluate import map_classes
from vitcli.fit import Job, fit
from vitcli.interrupts import StopSignals
from vitcli.model_config import resolve_model
from vitcli.objectives import build_learner
from vitcli.opened import flops_of
from vitcli.own_data import class_sizes, on_both_sides, short_side, split_record
from vitcli.plan import build_plan, describe, resolve, tune
from vitcli.pretrained import Pretrained
from vitcli.recipes import OWN, finetune_recipe
from vitcli.recovery import ROLLBACKS
from vitcli.rundir import build_manifest, differing_keys, lock_run, read_json, without_places, write_json, write_text
from vitcli.teacher import digest_of, open_teacher
from vitcli.weights import LoadReport, check_architecture, load_start
from vitcli.weights.files import FOLDER_NAMES
from vitcli.weights.load import differing_settings, section_of
from vitcli.weights.open import open_weights

__all__ = ["finetune", "pretrain"]

Say = Callable[[str], None]
CONFIG, MANIFEST, SUMMARY, WEIGHTS = "config.yaml", "manifest.json", "summary.json", "weights_report.json"
SPLIT = "split.json"
# settings that a recipe's note is about; given by the user, they leave it nothing to say
NOTED_SETTINGS = {
    "time": [f"train.{unit}" for unit in LENGTHS],
    "weights": ["train.class_weights"],
    "ends early": ["train.early_stop_evals"],
}


# ---------------------------------------------------------------- two set-ups


def pretrain(config_path: Path, overrides: Sequence[str], *, dry_run: bool, say: Say) -> None:
    """Train what a config file says, from scratch or from its `ckpt`, into runs/ and the file's name."""
    config, _ = read_config(config_path, overrides)
    if config.out is None:
        config = config.model_copy(update={"out": Path("runs") / config_path.stem})
    start = open_weights(config.ckpt, say=say) if config.ckpt and not config.from_scratch else None
    run(config, start=start, recipe=None, dry_run=dry_run, say=say)


def finetune(
    ckpt: Path, dataset: str, config_path: Path | None, overrides: Sequence[str], *, from_scratch: bool, dry_run: bool, say: Say
) -> None:
    """Fine-tune a checkpoint on a data set, into runs/ and a name made of both, with a recipe where no config is given."""
    config, pretrained, recipe = finetune_config(ckpt, dataset, config_path, overrides, from_scratch=from_scratch, say=say)
    run(config, start=None if from_scratch else pretrained, recipe=recipe, dry_run=dry_run, say=say)


def finetune_config(
    ckpt: Path,
    dataset: str,
    config_path: Path | None,
    overrides: Sequence[str],
    *,
    from_scratch: bool,
    recipe: dict[str, Any] | None = None,
    recipe_of: str | None = None,
    say: Say,
) -> tuple[Config, Pretrained, dict[str, Any] | None]:
    """Return the settings of a fine-tuning run, the weights it starts from, and the recipe where no config is given.

    Args:
        recipe: one made earlier, perhaps on another machine, to be kept.
        recipe_of: the data set whose recipe to take; by default `dataset`.
    """
    pretrained = open_weights(ckpt, say=say)
    out = Path("runs") / f"{run_name(pretrained.source_path)}-{short_name(dataset)}"
    out = out.with_name(f"{out.name}-scratch") if from_scratch else out
    facts: dict[str, Any] = {
        "ckpt": str(ckpt),
        "from_scratch": from_scratch,
        "out": str(out),
        **checkpoint_facts(pretrained, dataset),
    }
    if config_path is None:
        # a first reading, for the data and the run directory it names; the numbers stand in for the recipe's
        draft_length = {"steps": 1 << 40, "batch_size": 1 << 26}
        draft, _ = read_config(None, overrides, base={**facts, "train": draft_length}, base_name="checkpoint")
        assert draft.out is not None
        # a resumed run keeps its recipe, also on another machine
        if recipe is None and begun(draft.out):
            recipe = (read_json(draft.out / MANIFEST) or {}).get("recipe")
        if recipe is None:
            settled = {word.partition("=")[0] for word in overrides}
            # of the whole training split, so that what is chosen on a development split holds for all of it
            whole = draft.data.model_copy(update={"dev_fraction": None})
            train_source = open_source(dataset, split="train", data=whole)
            made = finetune_recipe(
                recipe_of or dataset,
                model=pretrained.model,
                preprocessing=pretrained.preprocessing,
                num_examples=len(train_source),
                forward_flops=flops_of(pretrained, image_size=draft.data.image_size),
                flops_per_second=flops_per_second(choose_device(draft.train.device)),
                class_sizes=class_sizes(train_source),
                picture_side=None if "data.image_size" in settled else short_side(train_source),
            )
            recipe = made.settings
            for note in made.notes:
                if not settled.intersection(NOTED_SETTINGS.get(note.partition(":")[0], ())):
                    say(note)
        base, name = {**facts, **recipe, "data": {**facts["data"], **recipe["data"]}}, "recipe"
    else:
        base, name = facts, "checkpoint"
    config, layers = read_config(config_path, overrides, base=base, base_name=name)
    if config.data.source != dataset:
        raise ConfigError(
            f"{layers.where('data.source')}: data.source is {config.data.source}, but --dataset is {dataset}; drop one"
        )
    if config.ckpt != ckpt or config.from_scratch != from_scratch:
        raise ConfigError("ckpt and from_scratch are given by --ckpt and --from-scratch here; drop them from the settings")
    if not config.objective.needs_labels:
        where = layers.where("objective.name")
        raise ConfigError(f"{where}: objective.name is {config.objective.name}; fine-tuning learns from labels, so drop it")
    there, here = section_of(pretrained), resolve_model(config.model)
    for key in differing_settings(there, here):
        found, expected = (json.dumps(section.model_dump(mode="json")[key]) for section in (here, there))
        raise ConfigError(
            f"{layers.where(f'model.{key}')}: model.{key} is {found}, but the checkpoint {ckpt} has {expected}; "
            "leave the model's sizes and numerics to the checkpoint"
        )
    return config, pretrained, recipe


def checkpoint_facts(pretrained: Pretrained, dataset: str) -> dict[str, Any]:
    """Return what a checkpoint says about a run that starts from it: architecture without the head, and preprocessing."""
    model = {**pretrained.model, "variant": None, "representation_size": None, "head_bias": 0.0}
    return {"model": model, "data": {"source": dataset, **pretrained.preprocessing}}


def short_name(dataset: str) -> str:
    """Name a data set in a run directory's name: of shards the folder they lie in, else its name or path."""
    kind, _, place = dataset.partition(":")
    if kind == "shards":
        place = Path(place).parent.name if Path(place).suffix else Path(place).name
    return re.sub(r"[^\w.]+", "-", place if kind in ("folder", "shards", "hf") and place else dataset).strip("-.")


def run_name(weights: Path) -> str:
    """Name a run after the weights it starts from: the run directory's name, else the file's, or its folder's."""
    place = weights.resolve()
    if len(place.parents) > 2 and place.parents[1].name == "checkpoints":
        return place.parents[2].name
    # such as Hugging Face's model.safetensors, which all have that name
    return place.parent.name if place.name in FOLDER_NAMES and place.parent.name else weights.stem


# ---------------------------------------------------------------- from a config to a job, and its run directory


def run(config: Config, *, start: Pretrained | None, recipe: dict[str, Any] | None, dry_run: bool, say: Say) -> None:
    """Carry a config out, in this process or in all that torchrun started: refuse, report, resume, or start a new run."""
    keep_freed_memory()
    device_type = choose_device(config.train.device).type
    with process_group(device_type=device_type, timeout_seconds=config.train.timeout_seconds) as ranks:
        carry_out(config, start=start, recipe=recipe, dry_run=dry_run, say=say if ranks.main else say_nothing, ranks=ranks)


def say_nothing(text: str) -> None:
    """Leave it to the main process."""


def carry_out(
    config: Config, *, start: Pretrained | None, recipe: dict[str, Any] | None, dry_run: bool, say: Say, ranks: Ranks
) -> None:
    """Do as `run`, once it is known who takes part."""
    assert config.out is not None
    out = config.out
    if start is None and (config.train.freeze_backbone or config.train.head_first_steps):
        key = "freeze_backbone" if config.train.freeze_backbone else "head_first_steps"
        raise ConfigError(f"train.{key} keeps random weights when nothing is loaded; give a checkpoint, or drop it")

    def look() -> dict[str, Any] | None:
        if out.exists() and not out.is_dir():
            raise RunExistsError(f"{out}: this is a file, expected a directory for the run; choose another --out")
        refuse_other(out, config)
        return read_json(out / SUMMARY)

    summary = ranks.on_main(look)
    if dry_run:
        job = prepare(config, start=start, ranks=ranks)
        checkpoint = latest_checkpoint(out, say=say)
        origin = "scratch"
        if start is not None:
            origin = f"{start.source_path} (step {start.step:,}): {rehearse(job, start).summary()}"
        if checkpoint is not None:
            origin = f"{checkpoint}, {'finished' if summary else 'to resume'}"
        say("\n".join([*describe(job.plan), f"start       {origin}"]))
        return
    if summary is not None:
        say(f"{out} is finished: {headline(summary)}; nothing to do (another --out starts a new run)")
        return
    stop = StopSignals()
    with stop.installed(), lock_run(out) if ranks.main else nullcontext():
        job = prepare(config, start=start, ranks=ranks)
        if ranks.main and not begun(out):
            if (out / MANIFEST).exists():
                say(f"{out}: no checkpoint of an earlier start here, so this one begins at the first step")
            (out / ROLLBACKS).unlink(missing_ok=True)
            origin = "scratch" if start is None else str(start.source_path)
            say("\n".join([*describe(job.plan), f"start       {origin}"]))
            sources = {"train": job.train_source.fingerprint, "val": job.val_source.fingerprint}
            manifest = build_manifest(hardware=hardware(job.plan.device), data={"source": config.data.source, **sources})
            write_text(out / CONFIG, dump_config(job.config))
            tuning = None if job.tuning is None else job.tuning.as_dict()
            requested = {"requested": config.model_dump(mode="json"), "recipe": recipe, "tuning": tuning}
            requested["teacher"] = None if job.teacher is None else job.teacher.identity()
            if start is not None:
                write_json(out / WEIGHTS, {"source": str(start.source_path), **rehearse(job, start).as_dict()})
            record = split_record(job.train_source, job.val_source, config.data)
            if record is not None:
                write_json(out / SPLIT, record)
            write_json(out / MANIFEST, {**manifest, **requested})
            if recipe is not None and config.data.source.partition(":")[0] in OWN:
                warn_of_copies(job, say=say)
        done = fit(job, stop=stop, say=say)
        summary = {
            "step": done.step,
            "trained_steps": done.trained_steps,
            "stopped_early": done.trained_steps < (job.config.train.steps or 0),
            "train_seconds": round(done.train_seconds, 1),
            **done.result.as_dict(job.train_source.classes),
        }
        if ranks.main:
            write_json(out / SUMMARY, summary)
    say(f"finished: {headline(summary)}")
    quoted, root = shlex.quote(str(out)), config.data.root
    data_root = f" --data-root {shlex.quote(str(root))}" if root else ""
    say(f"run directory {out}; curves: tensorboard --logdir {quoted}")
    if config.objective.needs_labels:
        say(f"next: vit eval --ckpt {quoted}{data_root}")
        say(f"      vit predict --ckpt {quoted} PICTURE ...")
    else:
        say(f"next: vit finetune --ckpt {quoted} --dataset NAME{data_root}")
        say(f"      vit eval --ckpt {quoted} --dataset NAME{data_root} --fewshot 5 --linear")
    say(f"      vit report {quoted}")


def warn_of_copies(job: Job, *, say: Say) -> None:
    """Say which pictures are there both to train on and to evaluate on, where looking is cheap."""
    groups = on_both_sides(job.train_source, job.val_source)
    if groups:
        first = [next(copy.place for copy in groups[0].copies if copy.set == name) for name in groups[0].sets]
        say(
            f"copies: {len(groups)} of the pictures to evaluate on are in training too, the same or nearly ("
            f"{' and '.join(first)}): the accuracy will flatter; `vit data check` lists them"
        )


def rehearse(job: Job, start: Pretrained) -> LoadReport:
    """Return the report of loading weights to start from, without the memory or the work; raises CheckpointError."""
    with torch.device("meta"):
        model = build_learner(job.config, num_classes=job.plan.num_classes)
    return load_start(model, start)


def headline(summary: dict[str, Any]) -> str:
    minutes, seconds = divmod(int(summary["train_seconds"]), 60)
    steps, trained = summary["step"], summary.get("trained_steps", summary["step"])
    after = f"{trained:,} steps" if trained == steps else f"{steps:,} of {trained:,} steps"
    loss = "not finite" if summary.get("loss") is None else f"{summary['loss']:.4g}"
    found = f"top-1 {100 * summary['top1']:.2f} %" if "top1" in summary else f"loss {loss}"  # the latter without labels
    return f"{found}, {after}, {minutes} min {seconds} s of training"


def begun(out: Path) -> bool:
    """Tell whether a run has something to lose: a checkpoint, damaged or not, or a summary.

    One that ended before its first checkpoint, say for want of memory, must not bind the corrected command.
    """
    return (out / SUMMARY).exists() or any((out / "checkpoints").glob("step_*"))


def refuse_other(out: Path, config: Config) -> None:
    """Raise RunExistsError if the directory holds a run with another config, or something that is no run."""
    manifest = read_json(out / MANIFEST)
    if manifest is not None and not begun(out):
        return
    if manifest is None:
        strangers = [p.name for p in out.iterdir() if not p.name.startswith(".")] if out.is_dir() else []
        known = {CONFIG, ROLLBACKS, SPLIT, WEIGHTS, "checkpoints", "nonfinite", "predictions", "tensorboard"}
        known |= {"metrics.jsonl", "report.html"}
        if set(strangers) - known:
            raise RunExistsError(f"{out}: holds files but no run ({strangers[0]}, ...); choose another --out")
        return
    before, now = with_defaults(manifest["requested"]), config.model_dump(mode="json")
    free = {"out", *keys_free_to_change(Config)}
    if config.train.early_stop_evals is not None:
        free.remove("log.best_metric")  # the run ends by it
    teacher = config.distillation.teacher
    if manifest.get("teacher") is not None and teacher is not None:
        free.add("distillation.teacher")  # the same weights, wherever they lie now
        if value_at(before, "distillation.teacher") != str(teacher):
            refuse_other_teacher(config, manifest, digest_of(teacher))
    # data that has moved is known by its fingerprint, once it is opened
    differing = [key for key in differing_keys(without_places(before), without_places(now)) if key not in free]
    if differing:
        said = ", ".join(
            f"{key} ({json.dumps(value_at(before, key))} there, {json.dumps(value_at(now, key))} now)" for key in differing[:6]
        )
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise RunExistsError(
            f"{out}: this run has another config: {said}{more}; choose another --out, or take the settings back"
        )


def refuse_other_teacher(config: Config, manifest: Mapping[str, Any], sha256: str | None) -> None:
    """Raise RunExistsError if a run that has begun was taught by other weights than those with this digest."""
    before = manifest.get("teacher")
    if before is not None and before["sha256"] != sha256:
        raise RunExistsError(
            f"{config.out}: distillation.teacher is {config.distillation.teacher}, but its weights are not those that this run "
            f"began with ({before['path']}, step {before['step']:,}); bring them back, or choose another --out"
        )


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that a run was asked for, those included that its version of vit did not have yet."""
    try:
        return Config.model_validate(settings).model_dump(mode="json")
    except ValidationError:  # of a later version, or damaged: the comparison says where
        return settings


def keys_free_to_change(section: type[Section], prefix: str = "") -> list[str]:
    """Return the dotted keys of settings that cannot change a result."""
    keys = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += keys_free_to_change(field.annotation, f"{prefix}{name}.")
        elif isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("may_change_on_resume"):
            keys.append(f"{prefix}{name}")
    return keys


def value_at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def prepare(config: Config, *, start: Pretrained | None, ranks: Ranks) -> Job:
    """Open the data and settle every choice, which the main process does for all."""
    settled: list[Job] = []

    def settle() -> Config:
        settled.append(settle_job(config, start=start, ranks=ranks))
        return settled[0].config

    agreed = ranks.on_main(settle)
    # the others come second: the first one to open a source may have to download, decode or index it
    return settled[0] if ranks.main else settle_job(agreed, start=start, ranks=ranks)


def settle_job(config: Config, *, start: Pretrained | None, ranks: Ranks) -> Job:
    """Open the data and settle every choice that is still open; a run that has begun keeps the choices it made."""
    assert config.out is not None
    device = choose_device(config.train.device)
    labels = config.objective.needs_labels
    train_source = open_source(config.data.source, split="train", data=config.data, labels=labels)
    val_source = open_source(config.data.val_source or config.data.source, split="val", data=config.data, labels=labels)
    num_classes = len(train_source.classes) if labels else 0
    unknown = sorted(set(val_source.classes) - set(train_source.classes)) if labels else []
    if unknown:
        listed = ", ".join(map(repr, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise DataError(
            f"{val_source.name}: to evaluate on, has classes that {train_source.name} does not train: {listed}; "
            "take them out, or add training images of them"
        )
    val_classes = map_classes(train_source.classes, val_source.classes, val_source.name) if labels else None
    teacher = open_teacher(config, train_source.classes)
    tuning = None
    manifest = read_json(config.out / MANIFEST)
    if manifest is not None and begun(config.out):
        before = stored_config(config.out / CONFIG)
        log = before.log.model_copy(update={key: value for key, value in config.log if value is not None})
        kept = {name: getattr(before, name) for name in ("model", "objective", "optim", "train")}
        distillation = before.distillation.model_copy(update={"teacher": config.distillation.teacher})
        config = config.model_copy(update={**kept, "log": log, "distillation": distillation})
        refuse_other_teacher(config, manifest, None if teacher is None else teacher.sha256)
        found = {"train": train_source.fingerprint, "val": val_source.fingerprint}
        changed = [split for split in found if found[split] != manifest["data"][split]]
        if changed:
            raise RunExistsError(
                f"{config.out}: the {' and '.join(changed)} images of {config.data.source} are not those the run began with; "
                "bring them back, or choose another --out"
            )
    else:
        sizes = {"train_examples": len(train_source), "val_examples": len(val_source), "ranks": ranks.ranks}
        if ranks.main:
            config, tuning = tune(config, num_classes=num_classes, device=device, **sizes)
        config = resolve(config, device=device, **sizes)
        if start is not None:
            check_architecture(start, config.model)
    workers = config.data.workers
    if workers is None:
        together = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks.ranks > 1 else 1
        workers = choose_workers(train_source, device.type, processes=together)
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    plan = build_plan(
        config,
        num_classes=num_classes,
        train_examples=len(train_source),
        val_examples=len(val_source),
        device=device,
        ranks=ranks,
        teacher=teacher,
    )
    return Job(config, plan, train_source, val_source, start, val_classes, ranks, tuning, teacher)
