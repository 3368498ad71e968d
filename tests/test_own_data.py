"""Fine-tuning on a folder of one's own pictures, with nothing said but where they are."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.harness import vit
from vitcli.checkpoint import load_weights_file
from vitcli.config import DataConfig
from vitcli.config_file import stored_config
from vitcli.data.sources import open_source
from vitcli.own_data import class_sizes, on_both_sides, short_side, split_record

SIZES = {"fern": 40, "moss": 12, "oak": 6, "yew": 2, "ash": 1}
COLOURS = {"fern": (30, 160, 60), "moss": (90, 110, 20), "oak": (140, 90, 40), "yew": (20, 60, 90), "ash": (150, 150, 150)}


def picture(name: str, number: int, *, side: int = 24) -> Image.Image:
    """Draw a picture of a class: its colour, and noise of its own."""
    chance = np.random.default_rng([number, *name.encode()])
    noise = chance.normal(0, 45, (side, side + 8, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own") / "photos"
    for name, count in SIZES.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(name, number).save(root / name / f"{number:03}.png")
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "tiny.yaml").write_text(
        "model: {patch_size: 8, width: 32, depth: 1, num_heads: 2}\n"
        "data: {source: shapes, image_size: 16, shapes: {classes: 3, train_examples: 60, val_examples: 30}}\n"
        "train: {steps: 2, batch_size: 8, precision: float32, tune: false}\n"
    )
    assert vit("pretrain", "--config", "tiny.yaml", cwd=folder).returncode == 0
    return folder / "runs" / "tiny"


def settings(root: Path, **changes: object) -> DataConfig:
    return DataConfig.model_validate({"source": f"folder:{root}", "image_size": 16, **changes})


@pytest.fixture(scope="module")
def tuned(photos: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("tuned") / "run"
    result = vit("finetune", "--ckpt", str(pretrained), "--dataset", f"folder:{photos}", "--out", str(out))
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_one_command_says_what_it_chose_and_what_to_type_next(tuned: tuple[Path, str]) -> None:
    out, said = tuned
    for words in (
        "recipe: for 54 images (",
        "resolution: 24 x 24 px, more than the checkpoint's 16 x 16 px",
        "classes: 5, of 1 (ash) to 36 (fern) training images",
        "weights: classes are unequal",
        "few images: ash (1), yew (1); with fewer than 5",
        "ends early: after 8 evaluations",
        f"next: vit eval --ckpt {out}",
        f"vit predict --ckpt {out} ",
        f"vit report {out}",
    ):
        assert words in said, said
    config = stored_config(out / "config.yaml")
    assert (config.train.class_weights, config.train.early_stop_evals) == ("sqrt", 8)
    assert config.log.eval_every_steps is not None and config.train.steps is not None
    assert round(config.train.steps / config.log.eval_every_steps) == 20


def test_the_pictures_are_learned_and_the_best_weights_are_the_result(tuned: tuple[Path, str]) -> None:
    out, _ = tuned
    summary = json.loads((out / "summary.json").read_text())
    assert summary["top1"] > 0.8
    result = json.loads(vit("eval", "--ckpt", str(out), "--json").stdout)
    assert (result["top1"], result["step"], result["examples"]) == (summary["top1"], summary["step"], 7)
    assert load_weights_file(out).step == summary["step"]


def test_the_split_is_on_record_and_another_machine_makes_the_same(
    tuned: tuple[Path, str], photos: Path, tmp_path: Path
) -> None:
    record = json.loads((tuned[0] / "split.json").read_text())
    assert record["classes"]["ash"] == {"training": 1, "held_out": 0}  # a class's last image is to learn from
    assert record["classes"]["yew"] == {"training": 1, "held_out": 1}
    assert record["training_images"] + record["held_out_images"] == sum(SIZES.values())
    copy = tmp_path / "elsewhere" / "pictures"
    shutil.copytree(photos, copy)
    data = settings(copy)
    train, val = (open_source(data.source, split=split, data=data) for split in ("train", "val"))  # type: ignore[arg-type]
    assert split_record(train, val, data) == record
    digest = hashlib.sha256("\n".join(record["held_out"]).encode()).hexdigest()
    assert digest == record["held_out_sha256"]
    for name in SIZES:  # the rule, as it is written there
        files = sorted(path.name for path in (copy / name).iterdir())
        by_hash = sorted(files, key=lambda file: hashlib.sha256(f"{name}/{file}".encode()).digest())
        share = min(len(files) - 1, max(1, round(0.1 * len(files))))
        assert {f"{name}/{file}" for file in by_hash[:share]} == {e for e in record["held_out"] if e.startswith(f"{name}/")}


def test_no_record_where_no_split_was_made(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "set" / "train")
    shutil.copytree(photos, tmp_path / "set" / "val")
    data = settings(tmp_path / "set")
    train = open_source(data.source, split="train", data=data)
    assert split_record(train, train, data) is None
    shutil.rmtree(tmp_path / "set" / "val")
    record = split_record(train, train, data)
    assert record is not None and record["held_out"][0].startswith("train/ash/")
    assert split_record(train, train, settings(tmp_path / "set", dev_fraction=0.1)) is None


def test_what_a_recipe_is_told(photos: Path) -> None:
    data = settings(photos)
    train = open_source(data.source, split="train", data=data)
    assert class_sizes(train) == {"ash": 1, "fern": 36, "moss": 11, "oak": 5, "yew": 1}
    assert short_side(train) == 24
    files = open_source(data.source, split="train", data=settings(photos, memory_cache_gib=0))
    assert files.encoded and short_side(files) == 24
    digits = open_source("digits", split="train", data=data)
    assert short_side(digits) == 8
    shapes = open_source("shapes", split="train", data=data)
    assert class_sizes(shapes) is None


def test_copies_on_both_sides_are_said(photos: Path, pretrained: Path, tmp_path: Path) -> None:
    for split, first in (("train", 0), ("val", 20)):
        for name in ("fern", "oak"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(first, first + 8):
                picture(name, number).save(tmp_path / "set" / split / name / f"{number}.png")
    data = settings(tmp_path / "set")

    def both() -> list[list[str]]:
        train, val = (open_source(data.source, split=split, data=data) for split in ("train", "val"))  # type: ignore[arg-type]
        return [[Path(copy.place).name for copy in group.copies] for group in on_both_sides(train, val)]

    assert both() == []
    picture("fern", 3).save(tmp_path / "set" / "val" / "fern" / "again.png")
    assert both() == [["3.png", "again.png"]]
    words = ("--out", str(tmp_path / "run"), "train.steps=2", "optim.warmup_steps=0")
    result = vit("finetune", "--ckpt", str(pretrained), "--dataset", data.source, *words)
    assert result.returncode == 0, result.stderr
    assert "copies: 1 of the pictures to evaluate on are in training too" in result.stdout


def test_what_the_user_sets_is_not_chosen(photos: Path, pretrained: Path, tmp_path: Path) -> None:
    words = ("train.class_weights=none", "train.early_stop_evals=null", "train.steps=3", "data.image_size=24")
    command = ("finetune", "--ckpt", str(pretrained), "--dataset", f"folder:{photos}", "--out", str(tmp_path / "run"))
    result = vit(*command, *words)
    assert result.returncode == 0, result.stderr
    assert not {"weights", "ends early", "resolution"} & {line.partition(":")[0] for line in result.stdout.splitlines()}
    config = stored_config(tmp_path / "run" / "config.yaml")
    assert (config.train.class_weights, config.train.early_stop_evals, config.data.image_size) == ("none", None, (24, 24))


@pytest.mark.parametrize("count", [2, 3])
def test_classes_of_two_or_three_pictures(pretrained: Path, tmp_path: Path, count: int) -> None:
    for name in ("fern", "oak", "yew"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for number in range(count):
            picture(name, number).save(tmp_path / "few" / name / f"{number}.png")
    command = ("finetune", "--ckpt", str(pretrained), "--dataset", f"folder:{tmp_path / 'few'}", "--out", str(tmp_path / "run"))
    result = vit(*command, "train.steps=4")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "run" / "split.json").read_text())
    assert (record["training_images"], record["held_out_images"]) == (3 * (count - 1), 3)


def test_one_picture_of_each_class_cannot_be_divided(pretrained: Path, tmp_path: Path) -> None:
    for name in ("fern", "oak"):
        (tmp_path / "one" / name).mkdir(parents=True)
        picture(name, 0).save(tmp_path / "one" / name / "0.png")
    result = vit(
        "finetune", "--ckpt", str(pretrained), "--dataset", f"folder:{tmp_path / 'one'}", "--out", str(tmp_path / "run")
    )
    assert result.returncode == 2
    assert "every class has a single image" in result.stderr
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_the_same_command_goes_on_with_the_recipe_it_began_with(
    tuned: tuple[Path, str], photos: Path, pretrained: Path
) -> None:
    out, _ = tuned
    result = vit("finetune", "--ckpt", str(pretrained), "--dataset", f"folder:{photos}", "--out", str(out))
    assert result.returncode == 0
    assert "is finished" in result.stdout and "recipe:" not in result.stdout


def test_runs_of_an_older_vit_are_known_by_their_defaults(
    tuned: tuple[Path, str], photos: Path, pretrained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "older"
    shutil.copytree(tuned[0], out)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["requested"]["optim"]["layer_decay"], manifest["requested"]["train"]["freeze"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    command = ("finetune", "--ckpt", str(pretrained), "--dataset", f"folder:{photos}", "--out", str(out))
    assert vit(*command).returncode == 0
    refused = vit(*command, "optim.layer_decay=0.5")
    assert refused.returncode == 2 and "optim.layer_decay (1.0 there, 0.5 now)" in refused.stderr


def test_it_begins_with_anybodys_weights_as_well(photos: Path, pretrained: Path, tmp_path: Path) -> None:
    assert vit("convert", str(pretrained), str(tmp_path / "tiny_8.npz")).returncode == 0
    words = ("--dataset", f"folder:{photos}", "--out", str(tmp_path / "run"), "train.steps=3")
    result = vit("finetune", "--ckpt", str(tmp_path / "tiny_8.npz"), *words)
    assert result.returncode == 0, result.stderr
    assert "recipe: for 54 images" in result.stdout
    assert json.loads(vit("eval", "--ckpt", str(tmp_path / "run"), "--json").stdout)["examples"] == 7
