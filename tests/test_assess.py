"""`vit eval` as a user meets it: every number against scikit-learn, every file, every question that cannot be answered."""

import csv
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, precision_recall_fscore_support

from tests.harness import Result, vit
from vitcli.assess import open_run, predictions_of_run
from vitcli.forward import logits, source_answers
from vitcli.metrics import bootstrap_interval
from vitcli.opened import open_model
from vitcli.predictions import load_predictions
from vitcli.speed import measure_speed

TINY = """
model: {patch_size: 8, width: 32, depth: 1, num_heads: 2}
data: {source: shapes, image_size: 16, shapes: {classes: 8, train_examples: 160, val_examples: 120}}
optim: {lr: 0.003}
train: {precision: float32, steps: 30, batch_size: 32, ema_decay: 0.8}
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assess")
    (folder / "tiny.yaml").write_text(TINY)
    result = vit("pretrain", "--config", "tiny.yaml", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "tiny"


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "copied"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitcli.assess.measure_speed", partial(measure_speed, seconds=0.02))


def judged(*words: str) -> dict[str, Any]:
    result = vit("eval", *words, "--json")
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def fails_with(result: Result, *said: str) -> None:
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert "Traceback" not in result.stderr
    for words in said:
        assert words in result.stderr.strip().splitlines()[-1]


# ---------------------------------------------------------------- numbers


def test_every_number_agrees_with_scikit_learn(run_dir: Path) -> None:
    found = judged("--ckpt", str(run_dir))
    opened, images = open_run(run_dir, say=print)
    scores = np.concatenate([
        answer.double().numpy()
        for _, answer in source_answers(
            opened.model, images.source, opened.config, forward=logits, device=opened.device, batch_size=256, warn=print,
            flops_per_image=opened.flops_per_image,
        )
    ])  # fmt: skip
    truth = np.array([images.source[i][1] for i in range(120)])
    guesses, every = scores.argmax(1), np.arange(8)
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert 0.2 < found["top1"] < 1
    assert found["top1"] == accuracy_score(truth, guesses)
    assert found["loss"] == pytest.approx(log_loss(truth, probabilities, labels=every), rel=1e-6)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guesses, labels=every, average="macro"))
    precision, recall, f1, support = precision_recall_fscore_support(truth, guesses, labels=every, zero_division=np.nan)
    rows = found["per_class"]
    for key, expected in (("precision", precision), ("accuracy", recall), ("f1", f1), ("examples", support)):
        np.testing.assert_allclose([np.nan if row[key] is None else row[key] for row in rows], expected, rtol=1e-12)
    assert found["intervals"]["top1"] == list(bootstrap_interval(guesses == truth))
    edges = np.linspace(0, 1, 16)
    place = np.digitize(probabilities.max(1), edges[1:-1], right=True)
    ece = sum(
        abs((guesses == truth)[place == b].mean() - probabilities.max(1)[place == b].mean()) * (place == b).mean()
        for b in set(place.tolist())
    )
    assert found["calibration"]["ece"] == pytest.approx(ece, rel=1e-5)
    wrong = np.flatnonzero(guesses != truth)
    surest = wrong[np.argmax(probabilities.max(1)[wrong])]
    assert found["mistakes"][0]["where"] == images.source.where(int(surest))
    assert found["mistakes"][0]["confidence"] == pytest.approx(probabilities.max(1)[surest], rel=1e-5)
    pair = found["confused"][0]
    table = confusion_matrix(truth, guesses, labels=every) * (1 - np.eye(8))
    assert pair["images"] == table.max()
    assert table[images.classes.index(pair["label"]), images.classes.index(pair["predicted"])] == table.max()


def test_batch_size_changes_no_result(run_dir: Path) -> None:
    one, other = (judged("--ckpt", str(run_dir), "--batch-size", size) for size in ("120", "7"))
    for found in (one, other):
        for clock in ("seconds", "images_per_second"):
            del found[clock]
    assert one["per_class"] == other["per_class"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_the_tables(run_dir: Path) -> None:
    said = vit("eval", "--ckpt", str(run_dir), "--mistakes", "3").stdout
    for words in ("top-1", "top-5", "loss", "macro F1", "ECE", "temperature", "most confused", "surest mistakes", "precision"):
        assert words in said
    assert said.count("shapes[") == 3
    assert max(map(len, said.splitlines())) < 140
    assert len(said.splitlines()) < 35
    assert "surest" not in vit("eval", "--ckpt", str(run_dir), "--mistakes", "0").stdout


# ---------------------------------------------------------------- files


def test_a_finished_run_keeps_its_answers(run_dir: Path) -> None:
    kept, about = load_predictions(run_dir / "predictions" / "val.safetensors")
    summary = json.loads((run_dir / "summary.json").read_text())
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert (kept.correct.mean(), kept.correct.sum(), len(kept)) == (summary["top1"], summary["correct"], 120)
    assert kept.losses.mean() == pytest.approx(summary["loss"], rel=1e-6)
    assert about["dataset"] == "shapes"
    assert about["fingerprint"] == manifest["data"]["val"]
    assert (about["step"], len(about["classes"])) == (30, 8)
    assert about["checkpoint"] == "checkpoints/step_00000030/ema.safetensors"
    assert (run_dir / about["checkpoint"]).is_file()


@pytest.mark.parametrize("state", ["kept", "older version", "damaged"])
def test_answers_of_a_run_are_read_or_computed(copied: Path, state: str) -> None:
    path = copied / "predictions" / "val.safetensors"
    if state == "older version":
        shutil.rmtree(path.parent)
    elif state == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    kept, about = predictions_of_run(copied, say=said.append)
    summary = json.loads((copied / "summary.json").read_text())
    assert kept.correct.sum() == summary["correct"]
    assert (about["step"], about["dataset"]) == (30, "shapes")
    assert any("evaluating" in line for line in said) == (state == "damaged")


def test_files_to_write(run_dir: Path, tmp_path: Path) -> None:
    table, answers = tmp_path / "confusion.csv", tmp_path / "answers.safetensors"
    found = judged("--ckpt", str(run_dir), "--confusion", str(table), "--save-predictions", str(answers))
    with open(table, encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == [row[0] for row in rows] == [row["class"] for row in found["per_class"]]
    counts = np.array([row[1:] for row in rows], np.int64)
    kept, about = load_predictions(answers)
    np.testing.assert_array_equal(counts, confusion_matrix(kept.labels, kept.predicted, labels=np.arange(8)))
    assert counts.trace() == found["correct"]
    assert (about["dataset"], about["fingerprint"]) == ("shapes", found["fingerprint"])
    whole = table.read_bytes()
    for option, path in (("--confusion", table), ("--save-predictions", answers)):
        fails_with(vit("eval", "--ckpt", str(run_dir), option, str(path)), f"{path}: exists already")
    assert table.read_bytes() == whole
    fails_with(vit("eval", "--ckpt", str(run_dir), "--confusion", str(tmp_path / "no" / "x.csv")), "there is no folder")


# ---------------------------------------------------------------- other questions


def test_views_and_corruptions(run_dir: Path) -> None:
    plain = judged("--ckpt", str(run_dir))
    found = judged("--ckpt", str(run_dir), "--tta", "flip", "--robustness")
    assert (plain["tta"], found["tta"]) == (None, "flip")
    assert found["loss"] != plain["loss"]
    table = found["robustness"]["corruptions"]
    assert list(table) == ["blur", "noise", "jpeg", "contrast"]
    assert all([cell["strength"] for cell in cells] == [1, 2, 3, 4, 5] for cells in table.values())
    assert found["robustness"]["means"]["noise"] == pytest.approx(np.mean([cell["top1"] for cell in table["noise"]]))
    assert table["noise"][4]["top1"] < found["top1"]
    low, high = table["noise"][0]["interval"]
    assert low <= table["noise"][0]["top1"] <= high
    said = vit("eval", "--ckpt", str(run_dir), "--robustness").stdout
    assert "strength" in said and "without" in said


def test_moved_images(run_dir: Path) -> None:
    found = judged("--ckpt", str(run_dir), "--translate", "2,1", "--mistakes", "0")
    assert [row["px"] for row in found["translation"]] == [1, 2]
    opened, images = open_run(run_dir, say=print)
    pixels = np.stack([images.source[i][0] for i in range(120)])
    truth = np.array([images.source[i][1] for i in range(120)])
    whole = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        before = opened.model(whole).argmax(1).numpy()
        moved = torch.cat([whole[:, :, :, 2:], whole[:, :, :, -1:], whole[:, :, :, -1:]], dim=3)  # to the left
        after = opened.model(moved).argmax(1).numpy()
    row = found["translation"][1]
    assert row["directions"]["left"] == {"top1": np.mean(after == truth), "unchanged": np.mean(after == before)}
    assert 0.2 < row["unchanged"] < 1
    for key in ("top1", "unchanged"):
        assert row[key] == pytest.approx(np.mean([each[key] for each in row["directions"].values()]))
    assert row["interval"][0] < row["top1"] < row["interval"][1]
    said = vit("eval", "--ckpt", str(run_dir), "--translate", "8").stdout
    assert "unchanged" in said and "8 px" in said
    fails_with(vit("eval", "--ckpt", str(run_dir), "--translate", "9"), "--translate: 9 px, of images shown at 16 x 16 px")


def test_speed(run_dir: Path) -> None:
    speed = judged("--ckpt", str(run_dir), "--speed", "--batch-size", "16")["speed"]
    assert speed["images_per_second"] > 0
    assert 0 < speed["latency_ms"]["median"] <= speed["latency_ms"]["p90"]
    assert (speed["batch_size"], speed["image_size"], speed["precision"]) == (16, [16, 16], "float32")
    assert "the model alone" in vit("eval", "--ckpt", str(run_dir), "--speed").stdout
    slow = measure_speed(open_model(run_dir, say=print), batch_size=1, seconds=0.0)
    assert slow["latency_ms"]["images"] >= 5
    assert slow["images_per_second"] == pytest.approx(1e3 / slow["latency_ms"]["median"])


@pytest.mark.slow
def test_probes_need_no_fitting_classes(run_dir: Path) -> None:
    words = ["--ckpt", str(run_dir), "--dataset", "digits", "--fewshot", "2,1", "--knn", "5", "--seeds", "2"]
    found = judged(*words)
    assert "top1" not in found
    probes = found["probes"]
    assert [row["shots"] for row in probes["fewshot"]] == [1, 2]
    assert (probes["test_examples"], probes["classes"], found["dataset"]) == (359, 10, "digits")
    said = vit("eval", *words, "--linear", "--l2", "auto").stdout
    for name in ("1-shot", "2-shot", "linear", "5-NN"):
        assert name in said
    fails_with(vit("eval", *words, "--robustness"), "digits")  # the classifier is asked too, and does not know these classes


def test_the_image_size_and_settings_of_the_data_may_change(run_dir: Path) -> None:
    base = judged("--ckpt", str(run_dir))
    larger = judged("--ckpt", str(run_dir), "--image-size", "24x16")
    assert larger["loss"] != base["loss"]
    same = judged("--ckpt", str(run_dir), "data.image_size=[24,16]")
    assert same["loss"] == larger["loss"]
    fewer = judged("--ckpt", str(run_dir), "data.shapes.val_examples=40")
    assert fewer["examples"] == 40


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.depth=2"], "model.depth=2: `vit eval` takes settings of data.*"),
        (["optim.lr=1"], "takes settings of data.*"),
        (["data.nonsense=1"], "nonsense"),
        (["--fewshot", "0"], "--fewshot is '0', expected whole numbers"),
        (["--fewshot", "1,,5"], "expected whole numbers"),
        (["--knn", "many"], "--knn is 'many'"),
        (["--fewshot", "1", "--l2", "-3"], "--l2 is '-3', expected a number above 0"),
        (["--fewshot", "1", "--l2", "nan"], "expected a number above 0"),
        (["--image-size", "big"], "--image-size is 'big'"),
        (["--labels", "nothing.json"], "nothing.json"),
        (["--dataset", "digits"], "digits"),
    ],
)
def test_questions_that_have_no_answer(run_dir: Path, words: list[str], says: str) -> None:
    fails_with(vit("eval", "--ckpt", str(run_dir), *words), says)


def test_names_with_control_characters_are_printed_harmlessly(tmp_path: Path) -> None:
    from PIL import Image

    for number, name in enumerate(("\x1b[31mred", "two\nlines", "pl ain")):
        for shade in range(12):
            path = tmp_path / "photos" / name / f"{shade}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (20 * shade, 100 * number, 0)).save(path)
    (tmp_path / "tiny.yaml").write_text(
        "model: {patch_size: 8, width: 32, depth: 1, num_heads: 2}\ndata: {source: 'folder:photos', image_size: 16}\n"
        "train: {steps: 2, batch_size: 8}\n"
    )
    result = vit("pretrain", "--config", "tiny.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said = vit("eval", "--ckpt", "runs/tiny", "--mistakes", "9", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "\x1b" not in said.stdout
    assert "two\\nlines" in said.stdout


@pytest.mark.slow
def test_two_processes_find_what_one_finds(run_dir: Path, tmp_path: Path) -> None:
    words = ["-m", "vitcli", "eval", "--ckpt", str(run_dir), "--batch-size", "9", "--robustness", "--json"]
    words += ["--save-predictions"]
    single = [sys.executable, *words, str(tmp_path / "one")]
    double = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *words,
        str(tmp_path / "two"),
    ]
    found = []
    for command in (single, double):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        found.append({k: v for k, v in json.loads(done.stdout).items() if k not in ("seconds", "images_per_second")})
    assert found[0] == found[1]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = subprocess.run(double, capture_output=True, text=True, timeout=240)
    assert again.returncode != 0
    assert again.stderr.count("exists already") == 1
