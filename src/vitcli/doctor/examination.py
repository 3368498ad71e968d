"""All looks in order, each as far as what came before allows: an installation alone, or a run and its data as well."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from vitcli.checkpoint import latest_checkpoint, step_of
from vitcli.config import Config
from vitcli.config_file import Layers, read_config
from vitcli.data_commands import read_settings
from vitcli.device import keep_freed_memory, memory_bytes
from vitcli.distributed import SOLO
from vitcli.doctor.checks import Check, Issue, Status, first_line, gather, left_open, problem_of, worst
from vitcli.doctor.forecast import check_disk, check_memory, check_time, estimate_checkpoint_bytes, memory_of
from vitcli.doctor.installation import USUAL_WIDTH, check_device, check_machine, check_precision, check_versions
from vitcli.doctor.look import check_classes, check_images
from vitcli.doctor.trial import check_speed, images_at_once, try_out
from vitcli.errors import ConfigError, DataError, RunExistsError, UserError
from vitcli.fit import Job
from vitcli.model_config import resolve_model
from vitcli.plan import describe_model
from vitcli.pretrained import Pretrained
from vitcli.rundir import LOCK_NAME, lock_run, read_json
from vitcli.step import is_out_of_memory
from vitcli.train import SUMMARY, begun, finetune_config, headline, refuse_other, rehearse, settle_job
from vitcli.tuning import product_width
from vitcli.weights.open import open_weights

__all__ = ["Examination", "Wish", "examine"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """The run that is to be examined, as `vit pretrain` or, with a data set, `vit finetune` would be told."""

    config: Path | None
    overrides: Sequence[str]
    ckpt: Path | None = None
    dataset: str | None = None
    typed: Sequence[str] | None = None  # the overrides as the user gave them, some as options

    def words(self) -> list[str]:
        """Return the command that would start the run."""
        given = (("--ckpt", self.ckpt), ("--dataset", self.dataset), ("--config", self.config))
        options = [str(word) for flag, value in given if value is not None for word in (flag, value)]
        rest = self.overrides if self.typed is None else self.typed
        return ["vit", "finetune" if self.dataset else "pretrain", *options, *rest]


@dataclass(frozen=True)
class Examination:
    """What was found."""

    wish: Wish | None  # None: the installation alone
    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """Return ok, warning or problem, whichever is the gravest."""
        found = worst([check.status for check in self.checks])
        return "ok" if found == "skipped" else found

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        command = None if self.wish is None else self.wish.words()
        return {"status": self.status, "command": command, "checks": [check.as_dict() for check in self.checks]}


def examine(wish: Wish | None, *, say: Say) -> Examination:
    """Look at the installation and, where a run is named, at all that it needs; what is found is returned, never raised.

    Args:
        say: is told how long it takes.

    Raises:
        ConfigError: the words make no sense: no such file, or an override that is none.
    """
    if wish is not None:
        check_words(wish)
        say("examining; this takes about half a minute, longer where data must be decoded or indexed first ...")
    versions, machine = check_versions(), check_machine()
    if wish is None:
        check, device = check_device()
        return Examination(None, (versions, machine, check, check_precision(device)))
    try:
        config, start = read_wish(wish)
    except UserError as error:
        check, device = check_device()
        return Examination(wish, (versions, machine, check, check_precision(device), *without_config(wish, error)))
    check, device = check_device(config.train.device)
    width = product_width(resolve_model(config.model))
    precision = check_precision(device, wanted=config.train.precision, width=width or USUAL_WIDTH)
    return Examination(wish, (versions, machine, check, precision, *checks_of_run(config, start, device)))


def check_words(wish: Wish) -> None:
    """Raise ConfigError for words that name no run."""
    if wish.config is not None and not wish.config.is_file():
        raise ConfigError(f"{wish.config}: there is no such config file; `vit schema` lists what one may say")
    Layers().add_overrides(wish.overrides)


def read_wish(wish: Wish) -> tuple[Config, Pretrained | None]:
    """Return the settings of the run and the weights it starts from, as `train.pretrain` and `train.finetune` settle them."""
    if wish.dataset is not None and wish.ckpt is not None:
        config, start, _ = finetune_config(
            wish.ckpt, wish.dataset, wish.config, wish.overrides, from_scratch=False, say=say_nothing
        )
        return config, start
    assert wish.config is not None
    config, _ = read_config(wish.config, wish.overrides)
    if config.out is None:
        config = config.model_copy(update={"out": Path("runs") / wish.config.stem})
    return config, open_weights(config.ckpt, say=say_nothing) if config.ckpt and not config.from_scratch else None


def without_config(wish: Wish, error: UserError) -> list[Check]:
    """Say why a run's settings cannot be settled; a recipe needs the pictures, so these are looked at all the same."""
    found, rest = problem_of(error), left_open("run", "like everything after it, it needs what is missing above")
    if wish.dataset is not None and isinstance(error, DataError):
        config = read_settings(wish.dataset, wish.config, wish.overrides)
        images = attempt("images", lambda: check_images(config), config)
        return [images, *([] if images.status == "problem" else [found]), rest]
    return [found, rest]


def say_nothing(text: str) -> None:
    """Leave what others would print out of the screen."""


# ---------------------------------------------------------------- a run


def checks_of_run(config: Config, start: Pretrained | None, device: torch.device | None) -> list[Check]:
    """Look at everything that belongs to one run."""
    keep_freed_memory()
    done: list[Check] = [check_config(config), attempt("run", lambda: check_run_dir(config), config)]
    done.append(attempt("images", lambda: check_images(config), config))
    available = None if device is None else memory_bytes(device)
    if device is None:
        return [*done, left_open("speed", "like memory, time and disk space it needs a device")]
    try:
        job = settle_job(config, start=start, ranks=SOLO)
        report = None if start is None else rehearse(job, start)
    except UserError as error:
        # what the look at the pictures has met as well was said there, with all of its kind
        if not (isinstance(error, DataError) and done[-1].status == "problem"):
            done = with_problem(done, problem_of(error))
        return [*done, left_open("speed", "like memory, time and disk space it needs what is missing above")]
    if report is not None:
        done.append(gather("weights", f"{config.ckpt}: {report.summary()}"))
    if job.teacher is not None:
        done.append(gather("teacher", job.teacher.words()))
    return [*done, check_classes(job.config, job.train_source, job.val_source), *measured(job, available)]


def with_problem(done: Sequence[Check], found: Check) -> list[Check]:
    """Put a problem in the place of what was fine of that name, or leave it out behind one that is known."""
    if any(check.name == found.name and check.status == "problem" for check in done):
        return list(done)
    return [*(check for check in done if check.name != found.name), found]


def attempt(name: str, look: Callable[[], Check], config: Config) -> Check:
    """Return what a look finds, or the error it ends with as a problem."""
    try:
        return look()
    except UserError as error:
        found = problem_of(error)
        if found.name != "data":
            return Check(name, found.status, found.text)
        return Check("data", found.status, found.text, tuple(hints(config)))


def hints(config: Config) -> Iterator[str]:
    """Say how a place that is not there was understood."""
    for key, spec in (("data.source", config.data.source), ("data.val_source", config.data.val_source)):
        kind, _, place = (spec or "").partition(":")
        if kind in ("folder", "shards") and place and not re.match(r"[a-z0-9]+://|[/~]", place):
            yield f"{key} is {spec}, looked for below {Path.cwd()}; for another place say {key}={kind}:PATH"


def check_config(config: Config) -> Check:
    """Say what is to be trained, and what a config can get wrong that is no contradiction."""
    issues = []
    if config.ckpt is None and (config.train.freeze_backbone or config.train.head_first_steps):
        key = "freeze_backbone" if config.train.freeze_backbone else "head_first_steps"
        text = f"train.{key} keeps random weights when nothing is loaded"
        issues.append(Issue("problem", text, f"give a checkpoint, or drop train.{key}"))
    return gather("config", describe_model(resolve_model(config.model), config.data.image_size), issues)


def check_run_dir(config: Config) -> Check:
    """Say whether the run directory is new, goes on, or would be refused.

    Raises:
        RunExistsError: it holds another run, or a process is writing to it.
    """
    out = config.out
    assert out is not None
    if out.exists() and not out.is_dir():
        raise RunExistsError(f"{out}: this is a file, expected a directory for the run; choose another --out")
    refuse_other(out, config)
    if (out / LOCK_NAME).exists():
        with lock_run(out):
            pass
    summary = read_json(out / SUMMARY)
    if summary is not None:
        text = f"{out} is finished ({headline(summary)}): the same command would change nothing"
        return gather("run", "", [Issue("warning", text, "choose another --out for a new run")], finished=True)
    if not begun(out):
        return gather("run", f"{out}, new", done_steps=0)
    damaged: list[str] = []
    newest = latest_checkpoint(out, say=damaged.append)
    issues = [Issue("warning", text.removeprefix("warning: "), "") for text in damaged]
    step = 0 if newest is None else step_of(newest)
    return gather("run", f"{out} goes on from step {step:,}", issues, done_steps=step)


def measured(job: Job, available: int | None) -> list[Check]:
    """Try the run for a few seconds, and work out what all of it needs."""
    assert job.config.out is not None
    fixed, each = memory_of(job.plan)
    trial, trouble = None, None
    if available is not None and job.plan.device.type == "cpu" and fixed + images_at_once(job) * each > available:
        trouble = left_open("speed", "the model does not fit into memory")
    else:
        try:
            trial = try_out(job)
        except (RuntimeError, UserError) as error:
            trouble = trouble_of(error, workers=job.config.data.workers)
    memory = check_memory(job.plan, available=available, trial=trial)
    if trial is None:
        assert trouble is not None
        disk = check_disk(job.config, checkpoint_bytes=estimate_checkpoint_bytes(job.plan))
        return [memory, trouble, left_open("time", "no step could be tried"), disk]
    newest = latest_checkpoint(job.config.out)
    time = check_time(job, trial, done_steps=0 if newest is None else step_of(newest), now=datetime.now())
    return [memory, check_speed(job, trial), time, check_disk(job.config, checkpoint_bytes=trial.checkpoint_bytes)]


def trouble_of(error: RuntimeError | UserError, *, workers: int | None) -> Check:
    """Make a check of what ended the trial; what is a defect of ours is raised again."""
    if isinstance(error, UserError):
        return problem_of(error)
    if is_out_of_memory(error):
        advice = "train.activation_checkpointing=true, or a smaller model or image size"
        return gather("speed", "", [Issue("problem", f"the first step ran out of memory ({first_line(error)})", advice)])
    if str(error).startswith("DataLoader worker"):
        text = f"a loader process ended unexpectedly ({first_line(error)})"
        advice = f"fewer data.workers (now {workers}), or more shared memory (docker run --shm-size=4g)"
        return gather("speed", "", [Issue("problem", text, advice)])
    raise error
