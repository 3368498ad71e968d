"""`vit doctor`: what it says about an installation and a run, that it is right, and that it leaves no trace of its trial."""

import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.harness import Result, vit
from vitcli.config import Config
from vitcli.data.stages import Speeds
from vitcli.distributed import SOLO
from vitcli.doctor import examination, installation, look, trial
from vitcli.doctor.checks import Check, in_bytes, in_words, worst
from vitcli.doctor.forecast import check_disk, check_memory, check_time, estimate_checkpoint_bytes, kept_at_most, memory_of
from vitcli.doctor.trial import Trial, check_speed
from vitcli.errors import UserError
from vitcli.fit import Job
from vitcli.plan import reading_steps
from vitcli.retention import Keep, kept_steps
from vitcli.rundir import lock_run
from vitcli.train import settle_job

CPU = torch.device("cpu")
TINY = """
model: {variant: mu/8}
data: {source: "folder:photos", image_size: 16}
train: {steps: 4, batch_size: 8, tune: false}
log: {sample_images: 0}
"""


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a moment only; no test asks how fast anything is."""
    monkeypatch.setattr(trial, "MEASURE_SECONDS", 0.02)
    monkeypatch.setattr(trial, "STAGE_SECONDS", 0.005)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Write a config and three classes of pictures, 8 to train on and 3 to evaluate on each; return their folder."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        for split, count in (("train", 8), ("val", 3)):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                coarse.resize((24, 20), Image.Resampling.BICUBIC).save(tmp_path / "photos" / split / name / f"{i}.png")
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def examined(result: Result, code: int = 0) -> dict[str, dict[str, Any]]:
    """Return the checks of a --json examination by their names."""
    assert result.returncode == code, result.stdout + result.stderr
    checks = json.loads(result.stdout)["checks"]
    assert len({check["name"] for check in checks}) == len(checks), "two lines about one thing"
    return {check["name"]: check for check in checks}


def doctor(place: Path, *words: str, code: int = 0) -> dict[str, dict[str, Any]]:
    return examined(vit("doctor", "--config", "tiny.yaml", *words, "--json", cwd=place), code)


# ---------------------------------------------------------------- as a user meets it


def test_an_installation_alone() -> None:
    result = vit("doctor")
    assert result.returncode == 0, result.stdout
    assert torch.__version__.split("+")[0] in result.stdout
    assert "vit doctor --config FILE" in result.stdout
    found = examined(vit("doctor", "--json"))
    assert set(found) == {"versions", "machine", "device", "precision"}
    assert found["precision"]["numbers"]["precision"] in ("float32", "bf16")


def test_a_run_that_will_work_fits_a_screen_and_is_left_untouched(place: Path) -> None:
    result = vit("doctor", "--config", "tiny.yaml", "--out", "runs/a", cwd=place)
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 80  # the last one is to be copied
    assert len(lines) <= 32, result.stdout
    assert lines[-1].strip() == "vit pretrain --config tiny.yaml --out runs/a"
    assert not (place / "runs").exists()
    found = doctor(place)
    assert {"config", "run", "images", "data", "memory", "speed", "time", "disk"} <= set(found)
    assert found["images"]["numbers"]["looked_at"] == 33
    assert found["data"]["numbers"]["classes"] == 3
    assert found["speed"]["numbers"]["images_per_second"] > 0
    assert found["time"]["numbers"]["steps"] == 4
    assert not [check for check in found.values() if check["status"] == "problem"]


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "muon"])
def test_checkpoint_sizes_are_those_of_the_run(place: Path, optimiser: str) -> None:
    words: tuple[str, ...] = (
        "model.variant=null",
        "model.patch_size=4",
        "model.width=64",
        "model.depth=3",
        "model.num_heads=2",
    )
    words += ("model.mlp_dim=128", "train.ema_decay=0.9", f"optim.name={optimiser}", "optim.momentum=0.9")
    disk = doctor(place, *words)["disk"]["numbers"]
    assert vit("pretrain", "--config", "tiny.yaml", *words, cwd=place).returncode == 0
    checkpoints = sorted((place / "runs" / "tiny" / "checkpoints").iterdir())
    real = sum(file.stat().st_size for file in checkpoints[-1].iterdir())
    assert 0.9 * real < disk["checkpoint_bytes"] <= real  # the rest are names and the manifest
    assert len(checkpoints) <= disk["checkpoints"]


@pytest.mark.slow
def test_a_run_that_has_begun_or_ended_is_known(place: Path) -> None:
    assert vit("pretrain", "--config", "tiny.yaml", cwd=place).returncode == 0
    found = doctor(place)
    assert found["run"]["status"] == "warning" and "finished" in found["run"]["text"]
    (place / "runs" / "tiny" / "summary.json").unlink()
    found = doctor(place)
    assert "goes on from step 4" in found["run"]["text"]
    assert found["time"]["numbers"]["steps"] == 0
    refused = doctor(place, "optim.lr=0.5", code=1)["run"]
    assert refused["status"] == "problem" and "optim.lr" in refused["text"]
    tuned = examined(vit("doctor", "--ckpt", "runs/tiny", "--dataset", "folder:photos", "train.steps=5", "--json", cwd=place))
    assert "taken" in tuned["weights"]["text"]


def test_a_directory_that_somebody_writes_to_or_that_is_none_is_a_problem(place: Path) -> None:
    with lock_run(place / "runs" / "tiny"):
        assert "another process" in doctor(place, code=1)["run"]["text"]
    assert doctor(place)["run"]["status"] == "ok"
    (place / "file").write_text("")
    assert "this is a file" in doctor(place, "--out", "file", code=1)["run"]["text"]


def test_all_that_cannot_be_read_is_said_once(place: Path) -> None:
    (place / "photos" / "train" / "bee" / "0.png").write_bytes(b"no picture")
    (place / "photos" / "val" / "ant" / "0.png").write_bytes(b"nor this")
    found = doctor(place, code=1)
    assert found["images"]["status"] == "problem"
    assert "2 files cannot be read" in found["images"]["text"]
    assert "data" not in found  # the run would stop at the first of them, with less to say
    assert any("vit data check" in advice for advice in found["images"]["advice"])
    passed_over = doctor(place, "data.on_error=skip")
    assert passed_over["images"]["status"] == "warning"
    assert passed_over["data"]["numbers"]["train_examples"] == 24
    limited = doctor(place, "data.on_error=skip", "data.skip_limit=1", code=1)
    assert limited["images"]["status"] == "problem"


def test_pictures_on_both_sides_or_with_two_labels_are_said(place: Path) -> None:
    shutil.copy(place / "photos" / "train" / "bee" / "1.png", place / "photos" / "val" / "bee" / "copy.png")
    shutil.copy(place / "photos" / "train" / "bee" / "2.png", place / "photos" / "train" / "cow" / "copy.png")
    found = doctor(place)["images"]
    assert found["status"] == "warning"
    assert "1 picture both to train and to evaluate on" in found["text"] and "1 picture with two labels" in found["text"]


def test_a_damaged_picture_is_found_before_fine_tuning_too(place: Path) -> None:
    assert vit("pretrain", "--config", "tiny.yaml", cwd=place).returncode == 0
    (place / "photos" / "train" / "bee" / "0.png").write_bytes(b"no picture")
    words = ("--ckpt", "runs/tiny", "--dataset", "folder:photos", "--json")
    assert "0.png" in examined(vit("doctor", *words, cwd=place), 1)["images"]["text"]


def test_a_small_part_of_a_set_misses_no_classes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(64, 160):
        shutil.copy(place / "photos" / "train" / "bee" / "1.png", place / "photos" / "train" / "ant" / f"{number}.png")
    monkeypatch.setattr(look, "LOOK_SECONDS", 0.0)
    found = doctor(place)["images"]
    assert found["numbers"]["looked_at"] < found["numbers"]["of"] == 33 + 96
    assert "empty-class" not in found["numbers"]["counts"]
    assert "looks at all" in " ".join(found["advice"]) or "lists all" in " ".join(found["advice"])


@pytest.mark.parametrize(
    ("words", "check", "said"),
    [
        (["optim.lrr=3"], "config", "did you mean optim.lr?"),
        (["train.epochs=3"], "config", ""),  # with steps in the file: taken, so this one is the control
        (["data.source=folder:nowhere"], "data", "nowhere: there is no such folder"),
        (["ckpt=nowhere"], "weights", "nowhere"),
        (["train.freeze_backbone=true"], "config", "random weights"),
        (["train.device=cuda"], "device", "sees no GPU"),
        (["optim.warmup_steps=3", "train.steps=null", "train.epochs=0.5"], "config", "warmup_steps"),
    ],
)
def test_what_would_end_the_run_is_a_problem(place: Path, words: list[str], check: str, said: str) -> None:
    if words == ["train.device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = doctor(place, *words, code=1 if said else 0)[check]
    assert found["status"] == ("problem" if said else "ok")
    assert said in found["text"]


def test_a_missing_folder_says_where_it_was_looked_for(place: Path) -> None:
    advice = doctor(place, "data.source=folder:nowhere", code=1)["data"]["advice"]
    assert str(place) in advice[0]


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "nowhere.yaml"],
        ["--config", "tiny.yaml", "nonsense"],
        ["--ckpt", "runs/x"],
        ["--dataset", "digits"],
        ["optim.lr=3"],
    ],
)
def test_words_that_make_no_sense_are_one_line_and_exit_2(place: Path, words: list[str]) -> None:
    result = vit("doctor", *words, cwd=place)
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_the_command_line_stays_fast() -> None:
    code = "import sys, vitcli.cli_doctor; print(sorted({'torch', 'numpy', 'pydantic', 'packaging'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---------------------------------------------------------------- the installation


def test_versions_are_compared_with_what_packages_need(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"vitcli": ["torch>=2.11,<3", "absent>=1", "datasets>=4; extra == 'hf'"], "torchvision": ["torch==2.14.1"]}

    def requires(package: str) -> list[str]:
        if package not in needs:
            raise importlib.metadata.PackageNotFoundError
        return needs[package]

    monkeypatch.setattr(installation, "requires", requires)
    there = {"torch": "2.14.1+cpu", "absent": "1.5"}
    monkeypatch.setattr(installation, "installed_version", there.get)
    assert installation.check_versions().status == "ok"
    there["torch"] = "2.5.0"
    found = installation.check_versions()
    assert found.status == "warning" and "torchvision needs ==2.14.1" in found.text and len(found.advice) == 2
    del there["absent"]
    assert installation.check_versions().status == "problem"
    del needs["vitcli"]  # run from its source
    assert installation.check_versions().status == "warning"


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert installation.check_device()[0].status == "ok"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in installation.check_device()[0].text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check, device = installation.check_device()
    assert check.status == "warning" and "CUDA_VISIBLE_DEVICES" in check.advice[0] and device == CPU
    check, device = installation.check_device("cuda")
    assert check.status == "problem" and device is None
    assert installation.check_precision(device).status == "skipped"


def test_a_device_that_miscomputes_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "miscomputes", lambda device: "no kernel image is available")
    check, device = installation.check_device("cpu")
    assert check.status == "problem" and device is None


def test_a_precision_that_does_not_suit_the_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "choose_precision", lambda wanted, device, width: "float32")
    assert installation.check_precision(CPU).status == "ok"
    assert installation.check_precision(CPU, wanted="float32").status == "ok"
    assert installation.check_precision(CPU, wanted="bf16").status == "warning"


def test_what_keeps_a_machine_from_its_cores_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installation, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(installation, "available_cores", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)  # of two threads to a core
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(installation, "little_shared", list)
    quota = tmp_path / "cpu.max"
    quota.write_text("max 100000\n")
    assert not installation.fewer_cores(12)
    quota.write_text("250000 100000\n")
    assert "2.5 cores" in installation.check_machine().text
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert len(installation.check_machine().advice) == 2


def test_little_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(free: int) -> Callable[[Path], Any]:
        return lambda path: shutil._ntuple_diskusage(free, 0, free)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage(64 << 20))
    assert "64 MiB" in installation.little_shared()[0].text
    monkeypatch.setattr(shutil, "disk_usage", usage(8 << 30))
    assert not installation.little_shared()


# ---------------------------------------------------------------- arithmetic


def job_of(**settings: Any) -> Job:
    """Settle a job on computed images."""
    base: dict[str, Any] = {
        "model": {"patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64},
        "data": {"source": "shapes", "image_size": 32, "shapes": {"train_examples": 5000, "val_examples": 600}},
        "train": {"steps": 1000, "batch_size": 100, "tune": False, "precision": "float32"},
        "out": "runs/none",
    }
    for section, values in settings.items():
        base[section] = {**base.get(section, {}), **values}
    return settle_job(Config.model_validate(base), start=None, ranks=SOLO)


def trial_of(**changes: Any) -> Trial:
    speeds = Speeds(read=1e4, decode=2e3, augment=5e3, hand_over=1e5, loader=900.0, workers=2, cores=4)
    given: dict[str, Any] = {"at_once": 8, "model_speed": 600.0, "speed": 500.0, "loader_speed": 900.0, "loss": 2.3}
    given |= {"stages": speeds, "checkpoint_bytes": 1000, "peak_bytes": None, "cpu_share": 1.0, "said": ()}
    return Trial(**{**given, **changes})


def test_time_is_training_and_evaluation() -> None:
    job = job_of(log={"eval_every_steps": 250})
    made = check_time(job, trial_of(), done_steps=0, now=datetime(2026, 1, 1, 12))
    assert made.numbers["evaluation_seconds"] == pytest.approx(4 * 600 / (3 * 600.0), abs=0.1)
    assert made.numbers["seconds"] == pytest.approx(1000 * 100 / 500 + 4 / 3, abs=0.1)
    assert made.status == "ok" and "12:03" in made.text
    half = check_time(job, trial_of(), done_steps=500, now=datetime(2026, 1, 1, 12))
    assert half.numbers["seconds"] == pytest.approx(made.numbers["seconds"] / 2, abs=0.1)
    assert "undisturbed" in check_time(job, trial_of(cpu_share=0.2), done_steps=0, now=datetime.now()).text


def test_a_run_that_takes_weeks_or_evaluates_too_often_is_said() -> None:
    slow = check_time(job_of(), trial_of(model_speed=0.11, speed=0.1), done_steps=0, now=datetime(2026, 1, 1))
    assert slow.status == "warning"
    fits = int(next(part for part in slow.advice if "train.steps=" in part).rpartition("=")[2])
    assert 1000 * 0.5 / 12 < fits * 1.0 < 1000 * 1.5 / 11  # of 12 days
    assert any("log.checkpoint_every_steps=" in advice for advice in slow.advice)
    often = check_time(job_of(log={"eval_every_steps": 2}), trial_of(), done_steps=0, now=datetime(2026, 1, 1))
    assert "that is much evaluation" in often.text
    every = int(often.advice[0].split("=")[1].split(",")[0])
    rarer = check_time(job_of(log={"eval_every_steps": every}), trial_of(), done_steps=0, now=datetime(2026, 1, 1))
    assert rarer.status == "ok"  # who takes the advice is rid of it


def test_the_bottleneck_is_the_slower_of_the_two() -> None:
    job = job_of()
    fast = check_speed(job, trial_of())
    assert (fast.status, fast.numbers["bottleneck"]) == ("ok", "model")
    slow = check_speed(job, trial_of(model_speed=2000.0, speed=850.0))
    assert (slow.status, slow.numbers["bottleneck"]) == ("warning", "loader")
    assert "decode" in slow.text and "vit data pack --resize" in slow.advice[0]
    shared = check_speed(job, trial_of(speed=300.0))
    assert shared.status == "warning" and "50 %" in shared.text
    disturbed = check_speed(job, trial_of(speed=300.0, cpu_share=0.3))
    assert "50 %" not in disturbed.text and "other programs" in disturbed.text
    assert check_speed(job, trial_of(loss=math.nan)).status == "problem"
    assert check_speed(job, trial_of(said=("out of memory in step 1",))).status == "warning"


def test_memory_is_a_line_through_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = job_of(train={"micro_batch_size": 50}).plan
    fixed, each = memory_of(plan)
    assert fixed == 16 * plan.parameters  # weights, gradients, two moments of 4 bytes
    assert fixed + 50 * each == plan.memory_estimate_bytes
    roomy = check_memory(plan, available=10 * plan.memory_estimate_bytes, trial=None)
    assert roomy.status == "ok" and roomy.numbers["largest_micro_batch"] > 400
    tight = check_memory(plan, available=fixed + 20 * each, trial=None)
    assert tight.status == "problem"
    assert f"train.micro_batch_size={tight.numbers['largest_micro_batch']} " in tight.advice[0]
    gpu = replace(plan, device=torch.device("cuda"))
    monkeypatch.setattr("vitcli.doctor.forecast.memory_of", lambda plan: (fixed, each))
    assert check_memory(gpu, available=fixed + 20 * each, trial=None).status == "warning"  # goes on with half as many
    assert check_memory(plan, available=fixed, trial=None).status == "problem"
    measured = check_memory(plan, available=10**9, trial=trial_of(at_once=50, peak_bytes=fixed + 50 * 1000))
    assert measured.numbers["image_bytes"] == 1000
    assert check_memory(plan, available=None, trial=None).status == "ok"


@pytest.mark.parametrize(
    ("log", "train"),
    [
        ({}, {}),
        ({"keep_checkpoints": 5, "checkpoint_every_steps": 7}, {"steps": 100}),
        ({"keep_every_steps": 20, "checkpoint_every_steps": 5}, {"steps": 203}),
        ({"keep_every_steps": 6, "checkpoint_every_steps": 4, "eval_every_steps": 10, "keep_best": 3}, {"steps": 205}),
        ({"checkpoint_every_steps": 50, "readings": [100, 700, 3300], "keep_every_steps": 100}, {"steps": 300}),
        ({"checkpoint_every_steps": 9, "eval_every_steps": 6}, {"steps": 101, "early_stop_evals": 3}),
        ({"checkpoint_every_steps": 1000}, {"steps": 10}),
    ],
)
def test_as_many_checkpoints_as_the_rules_leave(log: dict[str, Any], train: dict[str, Any]) -> None:
    config = job_of(log=log, train=train).config
    every, steps = config.log, config.train.steps
    assert steps and every.checkpoint_every_steps and every.eval_every_steps
    best = every.keep_best if config.train.early_stop_evals is None else max(1, every.keep_best)
    readings = reading_steps(config)
    keep = Keep(every.keep_checkpoints, best, every_steps=every.keep_every_steps, steps=readings)
    saved = [s for s in range(1, steps + 1) if s % every.checkpoint_every_steps == 0 or s == steps or s in readings]
    saved = sorted({*saved, *(s for s in range(1, steps + 1) if best and s % every.eval_every_steps == 0)})
    scores = {step: -float(step) for step in saved}  # the oldest are the best: those that no other rule keeps
    there: set[int] = set()
    most = 0
    for step in saved:
        most = max(most, len(there) + 1)  # the one being written beside those that are there
        there = kept_steps({*there, step}, keep, scores)
    assert most <= kept_at_most(config) <= most + 3


def test_a_disk_that_is_too_small_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of()
    config = job.config.model_copy(update={"out": tmp_path / "runs" / "x"})
    assert check_disk(config, checkpoint_bytes=1000).status == "ok"
    need = kept_at_most(config) * 1000
    for free, status in ((2 * need, "ok"), (need, "warning"), (need - 1, "problem")):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: shutil._ntuple_diskusage(0, 0, free))
        assert check_disk(config, checkpoint_bytes=1000).status == status
    estimate = estimate_checkpoint_bytes(job.plan)
    assert estimate == 12 * job.plan.parameters  # weights and two moments
    (tmp_path / "file").write_text("")
    inside = config.model_copy(update={"out": tmp_path / "file" / "x"})
    assert check_disk(inside, checkpoint_bytes=0).status == "problem"


def test_what_ends_a_trial_is_said_and_a_defect_is_not_hidden() -> None:
    assert "memory" in examination.trouble_of(torch.OutOfMemoryError("CUDA out of memory"), workers=2).text
    assert "--shm-size" in examination.trouble_of(RuntimeError("DataLoader worker (pid 7) is killed"), workers=2).advice[0]
    assert examination.trouble_of(UserError("mend it"), workers=2).text == "mend it"
    with pytest.raises(RuntimeError, match="a defect"):
        examination.trouble_of(RuntimeError("a defect"), workers=2)


def test_words_for_numbers() -> None:
    assert [in_bytes(size) for size in (3 << 20, 500 << 20, 5 << 29, 40 << 30)] == ["3.0 MiB", "500 MiB", "2.5 GiB", "40 GiB"]
    assert [in_words(seconds) for seconds in (5, 600, 7200, 864_000)] == ["5 s", "10 min", "2.0 h", "10 days"]
    assert worst([]) == "ok" and worst(["warning", "ok", "skipped"]) == "warning"
    assert Check("a", "ok", "b").as_dict()["advice"] == []


@pytest.mark.gpu
def test_memory_is_measured_on_a_gpu(place: Path) -> None:
    found = doctor(place)
    assert "measured" in found["memory"]["text"] and found["device"]["numbers"]["gpus"] >= 1
