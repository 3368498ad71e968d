"""`vit data` as a user meets it: each command's output, exit codes, and one line for what cannot be done."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.harness import Result, vit
from vitcli.config import DataConfig
from vitcli.data.sources import open_source
from vitcli.data.stages import Speeds, bottleneck
from vitcli.data.stats import measure_pixels, sample_of

COMMANDS = ("pack", "index", "check", "stats", "preview", "bench")


def fails_with(result: Result, *said: str) -> None:
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for words in said:
        assert words in result.stderr


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write three classes, 6 training and 2 evaluation images each, in several formats."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        for split, count in (("train", 6), ("val", 2)):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                suffix = "webp" if split == "val" else ("png", "jpg")[i % 2]
                coarse.resize((48, 40), Image.Resampling.BICUBIC).save(tmp_path / "photos" / split / name / f"{i}.{suffix}")
    return tmp_path / "photos"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = vit("data", command, "--help")
    assert result.returncode == 0
    assert f"vit data {command}" in result.stdout


def test_help_lists_the_commands_and_is_fast() -> None:
    listed = vit("data", "--help").stdout
    assert all(f" {command} " in listed for command in COMMANDS)
    code = "import sys, vitcli.cli_data; print(sorted({'torch', 'numpy', 'pydantic', 'scipy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# pack and index


def test_pack_index_and_train(photos: Path, tmp_path: Path) -> None:
    result = vit("data", "pack", "folder:photos", "packed", "--examples-per-shard", "5", "--jobs", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "train      18 images in 4 shards" in result.stdout
    assert "validation 6 images in 2 shards" in result.stdout
    assert "shards:packed/train-*.tar" in result.stdout
    again = vit("data", "pack", "folder:photos", "packed", "--examples-per-shard", "5", cwd=tmp_path)
    assert "4 shards there already" in again.stdout
    fails_with(
        vit("data", "pack", "folder:photos", "packed", "--seed", "1", "--examples-per-shard", "5", cwd=tmp_path),
        "seed (0 there, 1 now)",
    )
    indexed = vit("data", "index", "packed/train-*.tar", "--beside", cwd=tmp_path)
    assert indexed.returncode == 0, indexed.stderr
    assert "18 images in 4 shards, 3 classes" in indexed.stdout
    assert (tmp_path / "packed" / ".vit-index").is_dir()
    assert vit("data", "check", "shards:packed/train-*.tar", cwd=tmp_path).returncode == 0
    words = (
        "model.variant=mu/8",
        "data.image_size=16",
        "train.steps=2",
        "train.batch_size=4",
        "data.source=shards:packed/train-*.tar",
    )
    (tmp_path / "tiny.yaml").write_text("{}")
    trained = vit("pretrain", "--config", "tiny.yaml", *words, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr


@pytest.mark.slow
def test_a_killed_pack_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    words = ["shapes", "data.shapes.classes=4", "data.shapes.train_examples=400", "data.image_size=32", "--split", "train"]
    options = ["--examples-per-shard", "10", "--jobs", "2"]
    command = [sys.executable, "-m", "vitcli", "data", "pack", words[0], "killed", *words[1:], *options]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(list((tmp_path / "killed").glob("train-*.tar"))) < 3:
        assert process.poll() is None, "too fast to be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "_info.json").exists()
    result = vit("data", "pack", words[0], "killed", *words[1:], *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert vit("data", "pack", words[0], "whole", *words[1:], *options, cwd=tmp_path).returncode == 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    for name in names:
        if name != ".lock":
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_signal_ends_all_processes_and_leaves_nothing_half(tmp_path: Path) -> None:
    words = [
        "shapes",
        "out",
        "data.shapes.train_examples=4000",
        "--split",
        "train",
        "--examples-per-shard",
        "100",
        "--jobs",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "vitcli", "data", "pack", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not list((tmp_path / "out").glob("train-*.tar")):
        assert process.poll() is None, "too fast to be stopped"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)  # which also waits for whoever else holds the pipes
    assert (process.returncode, stderr) == (128 + signal.SIGTERM, b"vit: stopped by SIGTERM\n")
    assert not list((tmp_path / "out").glob(".tmp*"))
    remembered = json.loads((tmp_path / "out" / "_pack.json").read_text())["train"]["shards"]
    assert set(remembered) <= {path.name for path in (tmp_path / "out").glob("train-*.tar")}


def test_two_packs_into_one_folder_do_not_mix(photos: Path, tmp_path: Path) -> None:
    from vitcli.rundir import lock_run

    with lock_run(tmp_path / "packed"):
        fails_with(vit("data", "pack", "folder:photos", "packed", cwd=tmp_path), "another process is packing")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pack", "folder:nowhere", "out"], ["nowhere: there is no such folder"]),
        (["pack", "folder:photos", "file"], ["file: cannot be written"]),
        (["pack", "folder:photos", "out", "--exclude", "nowhere.tsv"], ["nowhere.tsv: cannot read this list"]),
        (["index", "nowhere/*.tar"], ["nowhere"]),
        (["check", "folder:nowhere"], ["nowhere: there is no such folder"]),
        (["check", "shards:nowhere/*.tar"], ["nowhere"]),
        (["check", "cifar11"], ["cifar11: no such data set"]),
        (["check", "folder:photos", "--against", "folder:nowhere"], ["nowhere"]),
        (["check", "folder:photos", "--write-list", "file/list.tsv"], ["file"]),
        (["stats", "folder:nowhere"], ["nowhere"]),
        (["bench", "folder:nowhere"], ["nowhere"]),
        (["bench", "folder:photos", "data.workers=1", "--workers", "2"], ["drop one"]),
        (["stats", "folder:photos", "data.colour=red"], ["data.colour is not a setting"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(photos: Path, tmp_path: Path, words: list[str], said: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    fails_with(vit("data", *words, cwd=tmp_path), *said)


# check


def test_check_says_what_it_finds_and_exits_with_1(photos: Path, tmp_path: Path) -> None:
    clean = vit("data", "check", "folder:photos", cwd=tmp_path)
    assert clean.returncode == 0, clean.stdout
    assert "nothing found" in clean.stdout
    assert "train: 18 readable images in 3 classes" in clean.stdout
    (photos / "train" / "ant" / "zero.jpg").write_bytes(b"")
    (photos / "train" / "bee" / "leak.webp").write_bytes((photos / "val" / "bee" / "0.webp").read_bytes())
    found = vit("data", "check", "folder:photos", "--write-list", "bad.tsv", cwd=tmp_path)
    assert (found.returncode, found.stderr) == (1, "")
    assert "empty: 1\n  photos/train/ant/zero.jpg: the file is empty" in found.stdout
    assert "photos/train/bee/leak.webp [train, bee] = photos/val/bee/0.webp [val, bee]" in found.stdout
    assert found.stdout.splitlines()[-1] == "found: 1 duplicate, 1 empty"
    listed = [line.split("\t") for line in (tmp_path / "bad.tsv").read_text().splitlines()]
    assert [row[:2] for row in listed] == [["photos/train/ant/zero.jpg", "empty"], ["photos/train/bee/leak.webp", "duplicate"]]
    packed = vit("data", "pack", "folder:photos", "packed", "--exclude", "bad.tsv", "--verify", cwd=tmp_path)
    assert packed.returncode == 0, packed.stderr
    assert "18 images in 1 shard," in packed.stdout and "2 left out" in packed.stdout
    assert vit("data", "check", "shards:packed", cwd=tmp_path).returncode == 0


def test_check_prints_json(photos: Path, tmp_path: Path) -> None:
    (photos / "train" / "ant" / "zero.jpg").write_bytes(b"")
    result = vit("data", "check", "folder:photos", "--json", "--jobs", "1", "--against", "digits", cwd=tmp_path)
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert report["clean"] is False
    assert report["counts"] == {"empty": 1}
    place = "photos/train/ant/zero.jpg"
    assert report["findings"] == [{"set": "train", "kind": "empty", "place": place, "reason": "the file is empty"}]
    assert [each["name"] for each in report["sets"]] == ["train", "val", "digits (val)"]
    assert vit("data", "check", "folder:photos", "--split", "val", cwd=tmp_path).returncode == 0


# stats


def section() -> DataConfig:
    return DataConfig.model_validate({"source": "digits", "image_size": 8, "memory_cache_gib": 0})


def test_stats_are_numpys(photos: Path) -> None:
    source = open_source(f"folder:{photos}", split="train", data=section())
    pixels = np.concatenate([source[index][0].reshape(-1, 3) for index in range(len(source))]).astype(np.float64) / 255
    for jobs in (1, 2):
        found = measure_pixels(source, jobs=jobs)
        assert found.mean == pytest.approx(pixels.mean(axis=0).tolist(), abs=1e-12)
        assert found.std == pytest.approx(pixels.std(axis=0).tolist(), abs=1e-12)
        assert (found.examples, found.pixels) == (18, len(pixels))


def test_stats_of_a_uniform_source_and_of_a_part() -> None:
    digits = open_source("digits", split="train", data=section())
    everything = np.stack([digits[index][0] for index in range(len(digits))]) / 255
    assert measure_pixels(digits, jobs=1).std == pytest.approx(everything.std(axis=(0, 1, 2)).tolist(), abs=1e-12)
    chosen = sample_of(digits, examples=100, seed=0)
    assert len(set(chosen.tolist())) == 100 and (np.diff(chosen) > 0).all()
    assert set(chosen.tolist()) < set(sample_of(digits, examples=200, seed=0).tolist())
    assert measure_pixels(digits, examples=100, jobs=1).mean == pytest.approx(
        everything[chosen].mean(axis=(0, 1, 2)).tolist(), abs=1e-14
    )


def test_stats_are_ready_to_paste(photos: Path, tmp_path: Path) -> None:
    native = vit("data", "stats", "folder:photos", cwd=tmp_path)
    assert native.returncode == 0, native.stderr
    first, last = native.stdout.strip().splitlines()
    assert "18 training images, 34,560 pixels, at their own sizes" in first
    assert vit("data", "stats", "folder:photos", *last.split(), cwd=tmp_path).returncode == 0, "the line is made of overrides"
    resized = json.loads(
        vit("data", "stats", "folder:photos", "data.image_size=16", "--json", "--examples", "10", cwd=tmp_path).stdout
    )
    assert (resized["examples"], resized["of"], resized["pixels"]) == (10, 18, 10 * 16 * 16)
    assert "resized to 16 x 16" in resized["measured"]


# preview and bench


def test_preview_shows_before_and_after(photos: Path, tmp_path: Path) -> None:
    sheets = {}
    for name, options in (("plain", []), ("both", ["--augmented"])):
        words = ("data", "preview", "folder:photos", "--out", f"{name}.png", "--rows", "3", "--columns", "4", *options)
        result = vit(*words, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        with Image.open(tmp_path / f"{name}.png") as sheet:
            sheets[name] = np.asarray(sheet)
    assert len(sheets["both"]) - 4 == 2 * (len(sheets["plain"]) - 4)
    assert (sheets["both"][:100] == sheets["plain"][:100]).all(), "the first row shows the images as they are"


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        (["folder:photos", "data.memory_cache_gib=0", "--workers", "1"], ["read", "decode", "augment", "hand-over", "loader"]),
        (["digits", "--workers", "0"], ["read", "augment", "hand-over", "loader"]),
    ],
)
def test_bench_measures_each_stage(photos: Path, tmp_path: Path, words: list[str], stages: list[str]) -> None:
    options = ("data.image_size=16", "--batch-size", "8", "--seconds", "0.1")
    result = vit("data", "bench", *words, *options, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert list(measured["images_per_second"]) == stages
    assert all(speed > 0 for speed in measured["images_per_second"].values())
    assert measured["bottleneck"].startswith("bottleneck: ")
    if "digits" in words:
        table = vit("data", "bench", *words, *options, cwd=tmp_path)
        assert "images/s" in table.stdout and "bottleneck: " in table.stdout


def test_bench_passes_over_what_training_would(photos: Path, tmp_path: Path) -> None:
    (photos / "train" / "ant" / "0.png").write_bytes(b"")
    words = ("data", "bench", "folder:photos", "data.memory_cache_gib=0", "data.image_size=16", "--workers", "0")
    options = ("--batch-size", "9", "--seconds", "0.1")
    ended = vit(*words, *options, cwd=tmp_path)
    assert ended.returncode == 2 and "ant/0.png" in ended.stderr
    result = vit(*words, *options, "data.on_error=skip", cwd=tmp_path)
    assert result.returncode == 0 and "bottleneck: " in result.stdout, result.stderr
    assert result.stderr.count("takes the place of one that cannot be read (1 of at most") == 1
    too_many = vit(*words, *options, "data.on_error=skip", "data.skip_limit=0", cwd=tmp_path)
    assert too_many.returncode == 2 and "ant/0.png" in too_many.stderr


@pytest.mark.parametrize(
    ("read", "decode", "augment", "hand_over", "named"),
    [
        (100.0, 1000.0, 1000.0, 1e6, "bottleneck: read, 83 % of the time"),
        (1e5, 200.0, 1000.0, 1e6, "bottleneck: decode, 83 %"),
        (1e5, None, 1000.0, 1e6, "bottleneck: augment, 99 %"),
        (1e5, 1e5, 1e5, 1000.0, "bottleneck: hand-over"),
    ],
)
def test_the_bottleneck_is_named(read: float, decode: float | None, augment: float, hand_over: float, named: str) -> None:
    speeds = Speeds(read, decode, augment, hand_over, loader=90.0, workers=2, cores=2)
    assert bottleneck(speeds).startswith(named)
