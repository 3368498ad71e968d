"""What a sweep plans: Table 4's numbers, every trial's words, what a later call may change."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.harness import vit
from vitcli.config import Config
from vitcli.errors import ConfigError, DataError, RunExistsError
from vitcli.rundir import differing_keys
from vitcli.sweep_plan import (
    Start,
    Target,
    best_rates_first,
    default_rates,
    name_starts,
    plan_target,
    refuse_other_settings,
    settings_of,
    vtab_sets,
    write_plan,
)
from vitcli.sweep_results import outcome

TINY = """
model: {patch_size: 4, width: 16, depth: 1, num_heads: 2}
data: {source: digits, image_size: 8, workers: 0}
augment: {crop: resize, flip: false}
train: {steps: 1, batch_size: 16, precision: float32, tune: false}
log: {sample_images: 0}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    (folder / "tiny.yaml").write_text(TINY)
    assert vit("pretrain", "--config", str(folder / "tiny.yaml"), "--out", str(folder / "tiny")).returncode == 0
    return folder / "tiny"


def plan(checkpoint: Path, folder: Path, *overrides: str, dataset: str = "digits", **options: object) -> Target:
    settings = {"lrs": None, "seeds": 3, "trial_steps": None, "vtab": False, "config_path": None, "precision": None, **options}
    start = Start("tiny", checkpoint, from_scratch=False)
    return plan_target(start, dataset, folder, overrides=overrides, say=lambda _: None, **settings)  # type: ignore[arg-type]


def fake_cifar10(root: Path, images: int) -> None:
    """Make class folders named cifar10, of 5 classes: `images` to train on, 5 to test on."""
    for split, count in (("train", images), ("test", 5)):
        for index in range(count):
            path = root / "cifar10" / split / f"class-{index % 5}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), index % 251, np.uint8)).save(path)


def test_table_4_of_a_named_set(checkpoint: Path, tmp_path: Path) -> None:
    fake_cifar10(tmp_path, 100)
    target = plan(checkpoint, tmp_path / "out", f"data.root={tmp_path}", dataset="cifar10")
    assert (target.lrs, target.dev_fraction, target.dev_examples) == ((0.001, 0.003, 0.01, 0.03), 0.02, 2)
    assert (target.steps, target.trial_steps, target.config.train.batch_size) == (10_000, 10_000, 512)
    assert (target.config.optim.name, target.config.optim.momentum, target.config.optim.warmup_steps) == ("sgd", 0.9, 500)
    assert (target.train_examples, target.test_examples, target.num_classes) == (100, 5, 5)
    part = plan(checkpoint, tmp_path / "part", f"data.root={tmp_path}", "data.examples=50", dataset="cifar10")
    assert (part.dev_fraction, part.dev_examples, part.train_examples) == (0.1, 5, 50)


def test_targets_share_what_auto_comes_to(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto, steps = "train.precision=auto", "train.steps=1"
    monkeypatch.setattr("vitcli.device.bf16_speedup", lambda width: 2.0)
    first = plan(checkpoint, tmp_path / "first", auto, steps)
    assert first.config.train.precision == "bf16"
    monkeypatch.setattr("vitcli.device.bf16_speedup", lambda width: 1.0)
    settled = first.config.train.precision
    assert plan(checkpoint, tmp_path / "later", auto, steps, precision=settled).config.train.precision == "bf16"
    assert (
        plan(checkpoint, tmp_path / "stated", "train.precision=float32", steps, precision=settled).config.train.precision
        == "float32"
    )
    assert plan(checkpoint, tmp_path / "alone", auto, steps).config.train.precision == "float32"


def test_rates_by_set_and_optimiser() -> None:
    sgd = Config.model_validate({"data": {"source": "x", "image_size": 8}, "optim": {"name": "sgd"}})
    assert default_rates(sgd, "imagenet", vtab=False) == (0.003, 0.01, 0.03, 0.06)
    assert default_rates(sgd, "pets", vtab=False) == (0.001, 0.003, 0.01, 0.03)
    assert default_rates(sgd, "pets", vtab=True) == (0.01,)
    adamw = Config.model_validate({"data": {"source": "x", "image_size": 8}, "optim": {"name": "adamw", "lr": 5e-4}})
    assert default_rates(adamw, "x", vtab=False) == [5e-5, 1.5e-4, 5e-4, 1.5e-3]


def test_the_words_of_trials(checkpoint: Path, tmp_path: Path) -> None:
    target = plan(checkpoint, tmp_path, "train.steps=100", "optim.warmup_steps=10", lrs=[0.1, 0.025], trial_steps=50)
    first, second = (trial.words() for trial in target.trials)
    assert [word for word in first if word not in second] == [str(tmp_path / "lr-0.025"), "optim.lr=0.025"]
    assert {"data.dev_fraction=0.1", "train.steps=50", "optim.warmup_steps=5", "seed=0"} <= set(first)
    finals = [trial.words() for trial in target.finals(0.1)]
    assert [next(word for word in words if word.startswith("seed=")) for words in finals] == ["seed=0", "seed=1", "seed=2"]
    assert not any(word.startswith(("data.dev_fraction", "train.steps")) for words in finals for word in words)
    assert [words[words.index("--out") + 1] for words in finals] == [str(tmp_path / f"final-seed-{seed}") for seed in range(3)]


def test_trials_read_the_settings_as_planned(checkpoint: Path, tmp_path: Path) -> None:
    """What the words say, a run's plan says too: the recipe with the overrides, on the rest of the training split."""
    target = plan(checkpoint, tmp_path / "out", "train.steps=20", "augment.min_area=0.5", lrs=[0.1, 0.2])
    write_plan(target)
    done = vit(*target.trials[0].words(), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "1,294 training and 144 evaluation images" in done.stdout and "20 steps" in done.stdout
    settings = (tmp_path / "out" / "settings.yaml").read_text()
    assert "min_area: 0.5" in settings and "dev_fraction: null" in settings and "tune: false" in settings


def test_trials_are_runs(checkpoint: Path, tmp_path: Path) -> None:
    """The words, carried out: trials on the rest and judged by the share, also by `vit eval`; final runs by the test split."""
    target = plan(checkpoint, tmp_path, "train.steps=3", "log.sample_images=0", "data.workers=0", lrs=[0.1, 0.2], seeds=2)
    write_plan(target)
    for trial in [*target.trials, *target.finals(0.1)]:
        done = vit(*trial.words())
        assert done.returncode == 0, done.stderr
        assert outcome(trial, {}).state == "finished"
    first, final = target.trials[0].folder, target.finals(0.1)[0].folder
    judged = json.loads((first / "summary.json").read_text())
    assert judged["examples"] == 144 and json.loads((final / "summary.json").read_text())["examples"] == 359
    again = json.loads(vit("eval", "--ckpt", str(first), "--json").stdout)
    assert (again["examples"], again["correct"]) == (144, judged["correct"])
    assert json.loads(vit("eval", "--ckpt", str(first), "--dataset", "digits", "--json").stdout)["examples"] == 359
    settings = [json.loads((run / "manifest.json").read_text())["requested"] for run in (first, final)]
    assert differing_keys(*settings) == ["data.dev_fraction", "log.keep_checkpoints", "out"]
    assert vit(*target.trials[0].words()).stdout.startswith(f"{first} is finished")


def begin(target: Target) -> None:
    write_plan(target)
    (target.trials[0].folder / "checkpoints" / "step_00000001").mkdir(parents=True)


def test_a_sweep_that_has_begun_keeps_its_recipe(checkpoint: Path, tmp_path: Path) -> None:
    target = plan(checkpoint, tmp_path)
    begin(target)
    kept = json.loads((tmp_path / "plan.json").read_text())
    kept["recipe"]["train"]["steps"] = kept["settings"]["train"]["steps"] = kept["settings"]["trial_steps"] = 123
    (tmp_path / "plan.json").write_text(json.dumps(kept))  # as another, slower machine would have made it
    assert plan(checkpoint, tmp_path).steps == 123


def test_other_settings_are_refused_once_it_has_begun(checkpoint: Path, tmp_path: Path) -> None:
    write_plan(plan(checkpoint, tmp_path))
    plan(checkpoint, tmp_path, "augment.flip=true")  # nothing to lose yet
    begin(plan(checkpoint, tmp_path))
    plan(checkpoint, tmp_path, "data.workers=1", "log.keep_checkpoints=3", lrs=[0.5], seeds=7)
    for change, options in ((["augment.flip=true"], {}), ([], {"trial_steps": 7}), (["data.dev_fraction=0.2"], {})):
        with pytest.raises(RunExistsError, match=r"flip|trial_steps|dev_fraction"):
            plan(checkpoint, tmp_path, *change, **options)


def test_a_rate_among_the_settings_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give --lrs 0\.1"):
        plan(checkpoint, tmp_path, "optim.lr=0.1")


def test_the_middle_rates_come_first(checkpoint: Path, tmp_path: Path) -> None:
    target = plan(checkpoint, tmp_path, lrs=[0.03, 0.001, 0.01, 0.003])
    assert [trial.lr for trial in best_rates_first(target.trials)] == [0.003, 0.01, 0.001, 0.03]
    assert plan(checkpoint, tmp_path, lrs=[0.01]).trials == []


def test_vtab_takes_1000_images_of_what_the_data_root_has(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set for --vtab"):
        vtab_sets(tmp_path, say=print)
    fake_cifar10(tmp_path, 1010)
    assert vtab_sets(tmp_path, say=print) == ["cifar10"]
    target = plan(checkpoint, tmp_path / "out", f"data.root={tmp_path}", dataset="cifar10", vtab=True)
    assert (target.lrs, target.trials) == ((0.01,), [])
    assert (target.train_examples, target.steps, target.config.train.batch_size) == (1000, 2500, 512)
    assert (target.config.optim.name, target.config.data.examples) == ("sgd", 1000)
    several = plan(checkpoint, tmp_path / "out", f"data.root={tmp_path}", dataset="cifar10", vtab=True, lrs=[0.01, 0.1])
    assert (several.dev_examples, len(several.trials)) == (200, 2)


def test_a_sweep_that_began_before_a_setting_was_there_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    now = settings_of(plan(checkpoint, tmp_path / "out"))
    before = json.loads(json.dumps(now))
    del before["distillation"], before["model"]["distill_token"]
    refuse_other_settings(tmp_path, before, now)
    before["model"]["registers"] = 1
    with pytest.raises(RunExistsError, match=r"other settings: model\.registers \(1 there, 0 now\);"):
        refuse_other_settings(tmp_path, before, now)


def test_a_small_set_is_no_vtab_task(tmp_path: Path) -> None:
    fake_cifar10(tmp_path, 20)
    said: list[str] = []
    with pytest.raises(DataError):
        vtab_sets(tmp_path, say=said.append)
    assert said == ["cifar10: left out, it has 20 training images of 1,000"]


def test_starts_have_names(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    weights = tmp_path / "B_16.npz"
    starts = name_starts([run, run / "checkpoints" / "step_00000004", weights], from_scratch=True)
    names = ["run", "run-step_00000004", "B_16"]
    assert [start.name for start in starts] == [*names, *(f"{name}-scratch" for name in names)]
    assert [start.from_scratch for start in starts] == [False] * 3 + [True] * 3
