"""What a study plans: cells, their settings and commands, what is chosen for whom; planning trains and writes nothing."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from tests.harness import vit
from tests.test_study_file import STUDY
from vitcli.config_file import load_config
from vitcli.errors import ConfigError, DataError, RunExistsError
from vitcli.models.flops import count_parameters
from vitcli.study.cells import Cell, label
from vitcli.study.plan import Group, Study, begin_cell, begin_study, plan_study
from vitcli.study.words import describe_study

DATA = "  data: {source: shapes, image_size: 16, shapes: {classes: 4, train_examples: 40, val_examples: 8}}"
GRID = STUDY.replace("  data: {source: shapes, image_size: 16}", DATA)
ONE_PASS = GRID.replace("grid", "one_pass").replace("length:\n  epochs: 2\n", "")
PLAIN_GRID = GRID[: GRID.index("search:")] + GRID[GRID.index("transfer:") :]


def plan(folder: Path, text: str = GRID, words: Sequence[str] = (), **options: bool) -> Study:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return plan_study(path, words, out=folder / "out", say=lambda _: None, **options)


def names(cells: Sequence[Cell], out: Path) -> list[str]:
    return [str(cell.folder.relative_to(out)) for cell in cells]


def test_cells_of_a_grid(tmp_path: Path) -> None:
    study = plan(tmp_path, PLAIN_GRID)
    assert study.trials() == []
    finals = study.finals({})
    first = [
        *("cells/plain/wide/n000000020/s0", "cells/plain/narrow/n000000020/s0"),
        *("cells/plain/wide/n000000040/s0", "cells/plain/narrow/n000000040/s0"),
        *("cells/rough/wide/n000000040/s0", "cells/rough/narrow/n000000040/s0"),
    ]
    assert names(finals, study.out) == [*first, *(name.replace("s0", "s1") for name in first)]
    assert label(finals[0]) == "plain / wide / n=20 / seed 0"
    assert [(cell.steps, cell.batch_size, cell.readings) for cell in finals[:3]] == [(5, 8, ()), (5, 8, ()), (10, 8, ())]
    assert finals[0].parameters > finals[1].parameters and finals[0].training_flops == 3 * finals[0].forward_flops
    assert not (tmp_path / "out").exists()


def test_settings_of_a_cell(tmp_path: Path) -> None:
    study = plan(tmp_path, PLAIN_GRID)
    wide, _, _, narrow, rough, _, wide_again, *_ = study.finals({})
    config = study.settings(wide)
    assert (config.model.width, config.model.mlp_dim, config.optim.lr, config.seed, config.out) == (32, 128, 1e-3, 0, None)
    assert (config.data.examples, config.train.epochs, config.train.steps, config.augment.flip) == (20, 2, None, True)
    assert (config.fewshot.datasets, config.fewshot.shots, config.fewshot.seeds) == (["digits"], [1, 5], 3)
    # evaluated at the end alone; measured for by nobody; no pictures
    assert (config.log.eval_every_steps, config.train.tune, config.log.sample_images) == (5, False, 0)
    assert (study.settings(narrow).optim.lr, study.settings(narrow).data.examples) == (2e-3, 40)
    assert study.settings(rough).augment.flip is False
    assert study.settings(wide_again).seed == 1
    stated = plan(tmp_path, PLAIN_GRID, ["base.log.eval_every_steps=2", "base.train.tune=true"])
    settings = stated.settings(stated.finals({})[0])
    assert (settings.log.eval_every_steps, settings.train.tune) == (2, True)


def test_commands_of_a_cell(tmp_path: Path) -> None:
    study = plan(tmp_path, PLAIN_GRID, [f"base.data.root={tmp_path}"])
    cell = study.finals({})[-1]
    folder, root = cell.folder, ("--data-root", str(tmp_path))
    run = str(folder / "run")
    pretrain, finetune, translate = cell.stages
    assert pretrain.words == ("pretrain", "--config", str(folder / "settings.yaml"), "--out", run)
    assert (pretrain.done, pretrain.output) == (folder / "run" / "summary.json", None)
    tuned = folder / "finetune-digits"
    words = ("finetune", "--ckpt", run, "--dataset", "digits", *root, "--out", str(tuned))
    own = ('train.precision="float32"', "train.steps=5", "seed=1")
    assert (finetune.name, finetune.words, finetune.done) == ("finetune:digits", (*words, *own), tuned / "summary.json")
    rates = ["transfer=[{dataset: digits, finetune: {train: {steps: 5}, optim: {lr: 1}}, families: {narrow: {optim.lr: 2}}}]"]
    stages = [each.stages[1] for each in plan(tmp_path, PLAIN_GRID, rates).finals({}) if each.seed == 1 and each.examples == 40]
    assert {stage.words[-3:-1] for stage in stages} == {("train.steps=5", "optim.lr=1"), ("train.steps=5", "optim.lr=2")}
    assert translate.words == ("eval", "--ckpt", run, *root, "--translate", "1,2", "--json")
    assert translate.done == translate.output == folder / "translate-1-2.json"


def test_cells_share_one_precision(tmp_path: Path) -> None:
    """`auto` is measured on a CPU, so it could come to another answer in every process of a study."""
    cell = plan(tmp_path, PLAIN_GRID, ["base.train.precision=auto", "base.train.device=cpu"])
    assert {cell.settings(each).train.precision for each in cell.finals({})} == {"float32"}
    other = plan(tmp_path, PLAIN_GRID, ["base.train.precision=bf16"])
    assert {other.settings(each).train.precision for each in other.finals({})} == {"bf16"}
    assert 'train.precision="bf16"' in other.finals({})[0].stages[1].words
    own = ["base.train.precision=bf16", "transfer=[{dataset: digits, finetune: {train: {steps: 5, precision: float32}}}]"]
    words = plan(tmp_path, PLAIN_GRID, own).finals({})[0].stages[1].words
    assert [word for word in words if word.startswith("train.precision")] == ['train.precision="float32"']


def test_a_search_comes_first(tmp_path: Path) -> None:
    study = plan(tmp_path)
    trials = study.trials()
    assert names(trials, study.out) == [
        f"search/plain/{family}/n{size:09d}/p{number}"
        for size in (20, 40)
        for family in ("wide", "narrow")
        for number in range(4)
    ]
    assert all(cell.trial and cell.seed == 0 and [stage.name for stage in cell.stages] == ["pretrain"] for cell in trials)
    config = study.settings(trials[3])
    assert (config.optim.weight_decay, config.train.label_smoothing) == (0.1, 0.1) == tuple(trials[3].point.values())
    assert (config.data.examples, config.data.dev_fraction, config.fewshot.datasets) == (20, 0.1, [])
    assert trials[3].steps == 5  # two epochs of the 18 that are left
    assert study.finals({}) == []
    chosen = {Group("plain", "wide", 40): trials[9].point}
    finals = study.finals(chosen)
    assert names(finals, study.out) == [f"cells/{v}/wide/n000000040/s{seed}" for seed in (0, 1) for v in ("plain", "rough")]
    assert all(study.settings(cell).train.label_smoothing == 0.1 and cell.point == trials[9].point for cell in finals)
    assert study.settings(finals[0]).data.dev_fraction is None
    assert study.finals({("plain", "wide", 40): trials[9].point}) == finals  # a tuple will do


def test_whose_choice_counts(tmp_path: Path) -> None:
    some = plan(tmp_path, GRID.replace("search:\n", "search:\n  sizes: [20]\n  share: 0.5\n"))
    assert some.searched(Group("plain", "wide", 40)) == some.searched(Group("rough", "wide", 40)) == ("plain", "wide", 20)
    assert [cell.steps for cell in some.trials()] == [3] * 8  # one epoch of 18
    own = plan(tmp_path, GRID.replace("    sizes: [40]", "    sizes: [40]\n    search: true"))
    assert own.searched(Group("rough", "wide", 40)) == ("rough", "wide", 40)
    assert own.searched(Group("plain", "wide", 20)) == ("plain", "wide", 20)
    assert len(own.trials()) == 4 * 2 * 3
    assert plan(tmp_path, PLAIN_GRID).searched(Group("plain", "wide", 20)) is None


def test_lengths(tmp_path: Path) -> None:
    for unit, steps in (("examples: 60", [8, 8]), ("steps: 7", [7, 7]), ("epochs: 0.5", [2, 3])):
        study = plan(tmp_path, PLAIN_GRID.replace("epochs: 2", unit))
        assert [cell.steps for cell in study.finals({}) if cell.variant == "plain" and cell.family == "wide"][:2] == steps
    share = GRID.replace("epochs: 2", "steps: 20").replace("search:\n", "search:\n  share: 0.25\n")
    study = plan(tmp_path, share, ["base.optim.warmup_steps=8"])
    assert {study.settings(cell).optim.warmup_steps for cell in study.trials()} == {2}
    assert {cell.steps for cell in study.trials()} == {5}


def test_to_convergence(tmp_path: Path) -> None:
    text = PLAIN_GRID.replace("  epochs: 2", "  epochs: 2\n  early_stop_evals: 3\n  dev_fraction: 0.2")
    study = plan(tmp_path, text)
    cell = study.finals({})[0]
    config = study.settings(cell)
    assert (config.train.early_stop_evals, config.data.dev_fraction, config.log.eval_every_steps) == (3, 0.2, None)
    assert cell.steps == 4  # of 16 images
    upstream = next(stage for stage in cell.stages if stage.name == "upstream")
    answers, run = cell.folder / "upstream.safetensors", str(cell.folder / "run")
    assert upstream.words == ("eval", "--ckpt", run, "--dataset", "shapes", "--save-predictions", str(answers))
    assert upstream.done == answers
    assert "--dataset" in cell.stages[-1].words  # moved images are those of the evaluation split as well


def test_one_pass(tmp_path: Path) -> None:
    study = plan(tmp_path, ONE_PASS)
    assert {group.examples for group in study.groups()} == {40}
    trial = study.trials()[0]
    assert (trial.readings, study.settings(trial).log.readings) == ((), [])
    chosen: dict[Group, dict[str, object]] = {group: {} for group in study.groups() if group.variant == "plain"}
    cell, *_ = study.finals(chosen)
    config = study.settings(cell)
    assert (cell.readings, cell.steps, config.log.readings) == ((20, 40), 5, [20, 40])
    assert (config.data.examples, config.train.examples) == (40, 40)
    assert (config.optim.schedule, config.train.ema_share, config.train.ema_decay) == ("constant", 0.1, None)
    assert [stage.name for stage in cell.stages] == [
        *("pretrain", "finetune:digits@20", "translate@20", "finetune:digits", "translate"),
    ]
    early, late = cell.stages[2], cell.stages[4]
    assert early.words[2] == str(cell.run / "checkpoints" / "step_00000003") and late.words[2] == str(cell.run)
    assert (early.done.name, late.done.name) == ("translate-1-2-n000000020.json", "translate-1-2.json")
    assert cell.stages[1].done.parent.name == "finetune-digits-n000000020"
    rough = [cell for cell in study.finals(chosen) if cell.variant == "rough"]
    assert {cell.readings for cell in rough} == {(40,)}
    averaged = plan(tmp_path, ONE_PASS, ["base.train.ema_decay=0.9"])
    assert averaged.settings(averaged.trials()[0]).train.ema_share is None


WRONG = [
    (GRID, ["base.optim.lrr=1"], r"^base\.optim\.lrr=1: optim\.lrr is not a setting; did you mean optim\.lr\?"),
    (GRID.replace("width: 32", "width: 33"), [], r"study\.yaml:11: model\.num_heads is 2|study\.yaml:4: model\.num_heads is 2"),
    (GRID.replace("      lr: 2e-3", "      lr: fast"), [], r"study\.yaml:14: optim\.lr is 'fast'; expected a valid number"),
    (
        GRID.replace("weight_decay: [0.0, 0.1]", "weight_decay: [0.0, -1]"),
        [],
        r"study\.yaml:24: optim\.weight_decay is -1; expected",
    ),
    (GRID.replace("flip: false", "flip: maybe"), [], r"study\.yaml:17: augment\.flip is 'maybe'; expected a valid boolean"),
    (
        GRID,
        ["families.wide.data.source=digits"],
        r"data\.source is shapes for narrow and digits",
    ),
    (
        GRID,
        ["base.optim.warmup_steps=9"],
        r"warmup_steps=9: plain, wide, 20: optim\.warmup_steps is 9, but the run has 5 steps",
    ),
    (
        ONE_PASS,
        ["base.optim.schedule=cosine"],
        r"schedule=cosine: optim\.schedule is cosine; a one_pass run is read on its way",
    ),
    (ONE_PASS, ["base.train.batch_size=64"], r"batch_size=64: train\.batch_size is 64, so 20 images and another of `sizes`"),
]


@pytest.mark.parametrize(("text", "words", "said"), WRONG)
def test_a_mistake_in_a_runs_settings_is_pointed_at(tmp_path: Path, text: str, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        plan(tmp_path, text, words)
    assert "\n" not in str(error.value)


def test_a_variant_may_learn_without_labels(tmp_path: Path) -> None:
    text = PLAIN_GRID.replace("{augment: {flip: false}}", "{objective: {name: mae}}").replace("translate_px: [1, 2]\n", "")
    study = plan(tmp_path, text)
    plain, unlabelled = (next(cell for cell in study.finals({}) if cell.variant == name) for name in ("plain", "rough"))
    assert study.settings(unlabelled).objective.decoder_width == 16
    assert unlabelled.training_flops != plain.training_flops
    with pytest.raises(ConfigError, match="objective.name is mae, but translate_px goes by the accuracy of a classifier"):
        plan(tmp_path, text + "translate_px: [1, 2]\n")


def test_a_study_without_labels_needs_no_classes(tmp_path: Path) -> None:
    (tmp_path / "heap").mkdir()
    for number in range(45):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "heap" / f"{number}.png")
    words = [f"base.data.source=folder:{tmp_path / 'heap'}", "base.objective.name=mae", "translate_px=[]"]
    study = plan(tmp_path, PLAIN_GRID, words)
    cell = study.finals({})[0]
    encoder = count_parameters(study.settings(cell).model, image_size=(16, 16), num_classes=0)
    assert cell.parameters == encoder and any("without labels" in line for line in describe_study(study))
    with pytest.raises(DataError, match="no class folders"):
        plan(tmp_path, PLAIN_GRID, words[:1])


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"study\.yaml:19: sizes goes up to 40 images, but shapes has 39 .*base\.data\.shapes\.train"
    ):
        plan(tmp_path, PLAIN_GRID.replace("train_examples: 40", "train_examples: 39"))


def test_data_that_is_not_here(tmp_path: Path) -> None:
    text = PLAIN_GRID.replace("source: shapes", "source: folder:/nowhere/to/be/found")
    with pytest.raises(DataError, match="/nowhere/to/be/found"):
        plan(tmp_path, text)
    study = plan(tmp_path, text, needs_data=False)
    assert [cell.steps for cell in study.finals({})[:3]] == [5, 5, 10]
    assert any("folder:/nowhere/to/be/found: not here" in line for line in describe_study(study))
    with pytest.raises(DataError, match="missing"):
        plan(tmp_path, PLAIN_GRID.replace("dataset: digits", "dataset: folder:/missing"))


def test_families_of_unequal_cost_are_noted(tmp_path: Path) -> None:
    notes = plan(tmp_path, PLAIN_GRID).notes
    assert [note.partition(":")[0] for note in notes] == ["plain", "rough"]
    assert "equal within 10 %" in notes[0]
    assert plan(tmp_path, PLAIN_GRID.replace("width: 32", "width: 16")).notes == ()


def test_the_plan_in_words(tmp_path: Path) -> None:
    study = plan(tmp_path)
    text = "\n".join(describe_study(study))
    assert "in all 12 cells and 16 trials" in text and "gap       wide less narrow" in text
    assert "search plain / wide" in text and "rough / narrow" in text
    assert "vit pretrain --config" in text
    work = sum(cell.training_flops * cell.steps * cell.batch_size for cell in study.trials())
    work += sum(
        cell.training_flops * cell.steps * cell.batch_size
        for cell in study.finals({group: {} for group in study.groups() if group.variant == "plain"})
    )
    assert f"{work:.3g} FLOPs" in text
    assert study.metrics() == [
        "upstream",
        "fewshot:digits:1",
        "fewshot:digits:5",
        "finetune:digits",
        "translate:1",
        "translate:2",
    ]


def test_what_the_commands_read(tmp_path: Path) -> None:
    """The words of a cell, as `vit` understands them: the same settings, length and images as planned."""
    study = plan(tmp_path)
    begin_study(study)
    again = plan_study(study.out / "study.yaml", [], out=study.out, say=lambda _: None)
    assert again.config == study.config
    trial = study.trials()[0]
    final = study.finals({("plain", "narrow", 40): {"optim.weight_decay": 0.05, "train.label_smoothing": 0.0}})[0]
    for cell in (trial, final):
        begin_cell(study, cell)
        assert load_config(cell.folder / "settings.yaml") == study.settings(cell)
        done = vit(*cell.stages[0].words, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert f"{cell.steps:,} steps" in done.stdout
    assert "18 training and 2 evaluation images" in vit(*trial.stages[0].words, "--dry-run").stdout
    run = study.finals({("plain", "wide", 20): {}})[0].run
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps({}))
    with pytest.raises(RunExistsError, match=r"this study has other settings: base\.train\.batch_size"):
        plan(tmp_path, GRID, ["base.train.batch_size=4"])
