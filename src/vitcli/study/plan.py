"""What a study will do: which runs, with which settings and commands, in which folders.

A reported cell lies in OUT/cells/VARIANT/FAMILY/nEXAMPLES/sSEED, a trial of the search in OUT/search/VARIANT/FAMILY/nEXAMPLES/
pNUMBER. Nothing here trains; `begin_study` and `begin_cell` write the settings that the commands read.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vitcli.config import Config
from vitcli.config_file import Layers, dump_config
from vitcli.device import choose_device
from vitcli.models.flops import count_parameters
from vitcli.objectives import flops_per_image
from vitcli.rundir import write_text
from vitcli.study.cells import PLAIN, UPSTREAM, Cell, label
from vitcli.study.config import StudyConfig, nearest_size, points_of
from vitcli.study.data import open_all, open_transfer, refuse_other_images
from vitcli.study.file import dump_study, read_study
from vitcli.study.folder import STATED, refuse_other_study
from vitcli.study.settings import SETTINGS, Group, Upstream, run_settings, settle, stages

__all__ = ["Group", "Study", "Upstream", "begin_cell", "begin_study", "label", "plan_study"]

Say = Callable[[str], None]

FLOPS_TOLERANCE = 0.1

Chosen = Mapping[Group, Mapping[str, Any]] | Mapping[tuple[str, str, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Study:
    """A study whose every run is settled, but for what a search chooses."""

    path: Path  # of its YAML
    out: Path
    config: StudyConfig
    overrides: tuple[str, ...]  # words of the command line
    layers: Layers  # where each setting was said
    device: torch.device
    upstreams: Mapping[str, Upstream]  # by variant
    notes: tuple[str, ...] = ()  # what a reader of the results should know
    known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # cells and settings made before

    # ------------------------------------------------------------ which cells

    def groups(self) -> list[Group]:
        """Return what is reported: `plain` first, in each variant sizes ascending, families in the file's order."""
        found = []
        for variant in self.config.all_variants:
            sizes = self.config.sizes_of(variant)
            for size in sizes[-1:] if self.config.form == "one_pass" else sizes:
                found += [Group(variant, family, size) for family in self.config.families_of(variant)]
        return found

    def searched(self, group: Group) -> Group | None:
        """Return the group whose trials choose the settings of this one; None without a search."""
        search = self.config.search
        if search is None:
            return None
        own = group.variant != PLAIN and self.config.variants[group.variant].search
        variant = group.variant if own else PLAIN
        if self.config.form == "one_pass":
            return Group(variant, group.family, self.config.sizes_of(variant)[-1])
        sizes = [size for size in self.config.sizes_of(variant) if search.sizes is None or size in search.sizes]
        return Group(variant, group.family, nearest_size(group.examples, sizes or self.config.sizes_of(variant)))

    def trials(self) -> list[Cell]:
        """Return the runs of the search, small sizes first; [] without one."""
        searched = dict.fromkeys(found for group in self.groups() if (found := self.searched(group)) is not None)
        return [
            self.cell(group, seed=self.config.seeds_of(group.variant)[0], point=point, trial=number)
            for group in sorted(searched, key=lambda group: group.examples)
            for number, point in enumerate(points_of(self.config, group.family))
        ]

    def finals(self, chosen: Chosen) -> list[Cell]:
        """Return the reported cells whose settings are known, first seeds first.

        Args:
            chosen: settings by `searched` group, from among the points of its trials; groups that it lacks are left out.
        """
        points: dict[tuple[str, str, int], Mapping[str, Any]] = dict(chosen)  # type: ignore[arg-type]  # a Group is a tuple
        cells = []
        for place in range(max(len(self.config.seeds_of(variant)) for variant in self.config.all_variants)):
            for group in self.groups():
                seeds, searched = self.config.seeds_of(group.variant), self.searched(group)
                point = {} if searched is None else points.get(searched)
                if place < len(seeds) and point is not None:
                    cells.append(self.cell(group, seed=seeds[place], point=point, trial=None))
        return cells

    def metrics(self) -> list[str]:
        """Return the names of everything that is measured, in the order to report it."""
        transfer = self.config.transfer
        fewshot = [f"fewshot:{each.dataset}:{shots}" for each in transfer for shots in each.shots]
        finetuned = [f"finetune:{each.dataset}" for each in transfer if each.finetune is not None]
        return [UPSTREAM, *fewshot, *finetuned, *(f"translate:{px}" for px in self.config.translate_px)]

    # ------------------------------------------------------------ one cell

    def settings(self, cell: Cell) -> Config:
        """Return the whole config of a cell's pretraining run, but for its directory."""
        group = Group(cell.variant, cell.family, cell.examples)
        config = self.resolved(group, point=cell.point, trial=cell.trial)[0]
        return config.model_copy(update={"seed": cell.seed})

    def cell(self, group: Group, *, seed: int, point: Mapping[str, Any], trial: int | None) -> Cell:
        """Return a reported cell, or the trial of a number."""
        key = (group, seed, json.dumps(point, sort_keys=True), trial)
        if key not in self.known:
            self.known[key] = self.make_cell(group, seed=seed, point=point, trial=trial)
        made: Cell = self.known[key]
        return made

    def largest(self, variant: str, family: str) -> Cell:
        """Return a variant's cell at its largest size, with the first seed and the first point of a search."""
        group = Group(variant, family, self.config.sizes_of(variant)[-1])
        return self.cell(group, seed=self.config.seeds_of(variant)[0], point=points_of(self.config, family)[0], trial=None)

    def make_cell(self, group: Group, *, seed: int, point: Mapping[str, Any], trial: int | None) -> Cell:
        """Work a cell out."""
        config, steps = self.resolved(group, point=point, trial=trial is not None)
        place = Path(group.variant) / group.family / f"n{group.examples:09d}"
        folder = self.out / ("cells" if trial is None else "search") / place / (f"s{seed}" if trial is None else f"p{trial}")
        readings = tuple(config.log.readings)
        num_classes = self.upstreams[group.variant].num_classes
        forward, training = flops_per_image(config, num_classes=num_classes)
        return Cell(
            *group,
            seed=seed,
            trial=trial is not None,
            point=dict(point),
            folder=folder,
            stages=tuple(stages(self.config, config, folder, family=group.family, seed=seed, trial=trial is not None)),
            steps=steps,
            batch_size=config.train.batch_size,
            readings=readings,
            parameters=count_parameters(config.model, image_size=config.data.image_size, num_classes=num_classes),
            forward_flops=forward,
            training_flops=training,
        )

    def resolved(self, group: Group, *, point: Mapping[str, Any], trial: bool) -> tuple[Config, int]:
        """Return a run's settings, but for its seed, with a model whose sizes are numbers, and its number of steps."""
        key = (group, json.dumps(point, sort_keys=True), trial)
        if key not in self.known:
            config, layers = run_settings(self.config, self.layers, group, point=point, trial=trial, path=self.path)
            self.known[key] = settle(config, layers, group, self.upstreams[group.variant], device=self.device)
        made: tuple[Config, int] = self.known[key]
        return made


# ---------------------------------------------------------------- planning


def plan_study(path: Path, overrides: Sequence[str], *, out: Path | None, needs_data: bool = True, say: Say) -> Study:
    """Settle every run of a study; nothing is written.

    Args:
        out: the study's folder; None for runs/ and the file's name.
        needs_data: False to plan on without data that does not lie here, for a dry run.

    Raises:
        ConfigError: settings that cannot be, with file and line.
        DataError: the data is missing or too small.
        RunExistsError: the folder holds a study with other settings or of other images, or something else.
    """
    config, layers = read_study(path, overrides)
    out = Path("runs") / path.stem if out is None else out
    refuse_other_study(out, config)
    opened = open_all(config, layers, path=path, needs_data=needs_data, say=say)
    upstreams = {variant: upstream for variant, (upstream, _) in opened.items()}
    run = opened[PLAIN][1]
    open_transfer(config, run.data, needs_data=needs_data, say=say)
    study = Study(path, out, config, tuple(overrides), layers, choose_device(run.train.device), upstreams)
    study.trials()  # every run once, so that what is wrong with one is found now
    for group in study.groups():
        for point in points_of(config, group.family):
            study.cell(group, seed=study.config.seeds_of(group.variant)[0], point=point, trial=None)
    if needs_data:
        refuse_other_images((cell.folder / "run", study.settings(cell)) for cell in study.trials() or study.finals({}))
    study = replace(study, notes=tuple(unequal_operations(study)))
    for note in study.notes:
        say(f"note: {note}")
    return study


def unequal_operations(study: Study) -> Iterator[str]:
    """Yield where the compared families differ in operations by more than a tenth."""
    pair = study.config.pair
    for variant in study.config.all_variants:
        if pair is None or not set(pair) <= set(study.config.families_of(variant)):
            continue
        a, b = (study.largest(variant, family) for family in pair)
        ratio = cost(a) / cost(b)
        if max(ratio, 1 / ratio) > 1 + FLOPS_TOLERANCE:
            yield (
                f"{variant}: a run of {pair[0]} takes {ratio:.2f} times the operations of one of {pair[1]} "
                f"({a.training_flops / 1e6:,.4g} and {b.training_flops / 1e6:,.4g} MFLOPs per image, "
                f"{a.steps * a.batch_size:,} and {b.steps * b.batch_size:,} images); equal within 10 % is a fair comparison"
            )


def cost(cell: Cell) -> float:
    """Return the operations of a cell's pretraining."""
    return float(cell.training_flops) * cell.steps * cell.batch_size


# ---------------------------------------------------------------- what the commands read


def begin_study(study: Study) -> None:
    """Make the study's folder and write its settings there; checks the folder as `plan_study` does."""
    refuse_other_study(study.out, study.config)
    study.out.mkdir(parents=True, exist_ok=True)
    write_text(study.out / STATED, dump_study(study.config))


def begin_cell(study: Study, cell: Cell) -> None:
    """Make a cell's folder and write the settings that its commands read."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_text(cell.folder / SETTINGS, dump_config(study.settings(cell)))
