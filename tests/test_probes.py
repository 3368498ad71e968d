"""Probes of a finished run by hand, and few-shot probes of one that trains, which must not notice them."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from tests.harness import Run
from vitcli.checkpoint import load_checkpoint
from vitcli.config import DataConfig
from vitcli.config_file import load_config
from vitcli.data.sources import open_source
from vitcli.distributed import SOLO
from vitcli.errors import ConfigError, DataError
from vitcli.features import Features, extract_features
from vitcli.logs import RunLog
from vitcli.opened import open_model
from vitcli.probe_sets import ProbeSet, few_shot, shot_pool
from vitcli.probes import open_probe_sets, probe_checkpoint
from vitcli.train import pretrain

CONFIG = """
seed: 2
model: {patch_size: 4, width: 24, depth: 1, num_heads: 2, dropout: 0.1}
data: {source: shapes, image_size: 16, shapes: {classes: 4, train_examples: 200, val_examples: 40}, workers: 0}
train: {steps: 12, batch_size: 16, precision: float32, tune: false, ema_decay: 0.8}
log: {log_every_steps: 1, eval_every_steps: 4, checkpoint_every_steps: 4, keep_checkpoints: 9}
fewshot: {datasets: [digits, shapes], shots: [2, 5], seeds: 2}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    (folder / "tiny.yaml").write_text(CONFIG)
    train(folder)
    return folder


def train(folder: Path, *overrides: str, out: str = "run") -> list[str]:
    said: list[str] = []
    pretrain(folder / "tiny.yaml", [f"out={folder / out}", *overrides], dry_run=False, say=said.append)
    return said


def rows(folder: Path, kind: str | None = "fewshot", out: str = "run") -> list[dict[str, Any]]:
    timed = ("images_per_second", "seconds")
    lines = map(json.loads, (folder / out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in timed} for row in lines if kind in (None, row["kind"])]


def weights(folder: Path, out: str = "run", step: int = 12) -> dict[str, bytes]:
    saved = load_checkpoint(folder / out / "checkpoints" / f"step_{step:08d}")
    assert saved.ema_state is not None
    states = {"model": saved.model_state, "ema": saved.ema_state}
    return {f"{kind}.{name}": tensor.numpy().tobytes() for kind, state in states.items() for name, tensor in state.items()}


def probe(folder: Path, dataset: str | None = "digits", **options: Any) -> dict[str, Any]:
    said: list[str] = []
    overrides = options.pop("overrides", [])
    return probe_checkpoint(folder / "run", dataset=dataset, overrides=overrides, say=said.append, **options)


# ---------------------------------------------------------------- by hand


def test_few_shot_is_that_of_scikit_learn_and_big_visions_draw(finished: Path) -> None:
    found = probe(finished, shots=[1, 5], seeds=3)
    opened = open_model(finished / "run", dataset="digits", say=print)
    sides = {}
    for split in ("train", "val"):
        source = open_source("digits", split=split, data=opened.config.data)
        features = extract_features(
            opened.model, source, opened.config, device=torch.device("cpu"), batch_size=256, warn=print,
            flops_per_image=opened.flops_per_image,
        )  # fmt: skip
        assert features is not None
        sides[split] = features.values.astype(np.float64), features.labels
    (train_x, train_y), (test_x, test_y) = sides["train"], sides["val"]
    for entry in found["fewshot"]:
        expected = []
        for seed in range(3):
            chance = np.random.default_rng(seed)
            drawn = np.concatenate([chance.permutation(np.where(train_y == k)[0])[: entry["shots"]] for k in range(10)])
            mean, std = train_x[drawn].mean(0), train_x[drawn].std(0) + 1e-5
            X, T = (np.column_stack([(x - mean) / std, np.full(len(x), 100.0)]) for x in (train_x[drawn], test_x))
            judge = Ridge(alpha=1024.0, fit_intercept=False).fit(X, 2 * np.eye(10)[train_y[drawn]] - 1)
            expected.append((judge.predict(T).argmax(1) == test_y).mean())
        assert entry["per_seed"] == pytest.approx(expected, abs=1.01 / len(test_y))  # a tie may fall either way
        assert entry["accuracy_mean"] == pytest.approx(np.mean(entry["per_seed"]))
        assert entry["accuracy_std"] == pytest.approx(np.std(entry["per_seed"], ddof=1))
        low, high = entry["interval"]
        assert low < entry["accuracy_mean"] < high
        assert (entry["l2"], entry["l2_per_seed"]) == (1024.0, [1024.0] * 3)
    assert (found["train_examples"], found["test_examples"], found["classes"], found["features"]) == (1438, 359, 10, 24)
    assert (found["dataset"], found["step"], found["linear"], found["knn"]) == ("digits", 12, None, {})
    json.dumps(found, allow_nan=False)


def test_linear_and_neighbours_beside_it_change_no_draw(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitcli.logistic.L2_CHOICES", (0.1, 0.01))
    alone = probe(finished, shots=[5], seeds=2, cache=False)
    everything = probe(finished, shots=[5], seeds=2, linear=True, knn=[1, 20], cache=False)
    for ours, theirs in zip(alone["fewshot"][0]["per_seed"], everything["fewshot"][0]["per_seed"]):
        assert ours == pytest.approx(theirs, abs=1.01 / 359)  # features come from other batches, so with other last bits
    linear, knn = everything["linear"], everything["knn"]
    assert linear["accuracy"] > everything["fewshot"][0]["accuracy_mean"]
    assert linear["interval"][0] < linear["accuracy"] < linear["interval"][1]
    assert linear["dev_accuracy"] is not None and linear["converged"]
    assert set(knn) == {"1", "20"}
    for votes in knn.values():
        assert votes["accuracy"] > 0.3 and votes["accuracy_plain"] > 0.3
        assert votes["interval"][0] < votes["accuracy"] < votes["interval"][1]
    assert knn["1"]["accuracy"] == knn["1"]["accuracy_plain"]
    json.dumps(everything, allow_nan=False)


def test_cached_features_give_the_same_numbers(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitcli.logistic.L2_CHOICES", (0.1,))
    first = probe(finished, shots=[5], linear=True)
    assert probe(finished, shots=[5], linear=True) == first
    assert probe(finished, shots=[5])["fewshot"] == first["fewshot"]  # also where a few images would do
    assert probe(finished, shots=[5], linear=True, cache=False) == first


def test_l2_can_be_chosen(finished: Path) -> None:
    found = probe(finished, shots=[1, 5], l2=None, seeds=2)["fewshot"]
    assert [entry["l2"] for entry in found] == [None, None]
    assert found[0]["l2_per_seed"] == [1024.0, 1024.0]
    assert all(2.0**-10 <= l2 <= 2.0**20 for l2 in found[1]["l2_per_seed"])
    one = probe(finished, shots=[5], l2=16.0, seeds=1)["fewshot"][0]
    assert (one["l2"], one["accuracy_std"], len(one["per_seed"])) == (16.0, None, 1)


def test_computed_labels_and_the_runs_own_data(finished: Path) -> None:
    found = probe(finished, None, shots=[2, 5], knn=[3])
    assert (found["dataset"], found["classes"], found["test_examples"]) == ("shapes", 4, 40)
    alone = probe(finished, None, shots=[2, 5], cache=False)
    for ours, theirs in zip(alone["fewshot"], found["fewshot"]):
        assert ours["per_seed"] == pytest.approx(theirs["per_seed"], abs=1.01 / 40)


def test_what_cannot_be_probed_is_one_line(finished: Path) -> None:
    with pytest.raises(ConfigError, match="--knn 2000: digits has 1,438 training images; take fewer"):
        probe(finished, knn=[2000])
    with pytest.raises(ConfigError, match="nothing to probe"):
        probe(finished)
    with pytest.raises(DataError, match="no such data set"):
        probe(finished, "digit", shots=[1])


def test_a_test_class_without_training_images_is_refused() -> None:
    data = load_data("digits")
    train = open_source("digits", split="train", data=data)
    test = open_source("digits", split="val", data=data)
    test.classes = [*test.classes[:9], "ten"]
    with pytest.raises(DataError, match="classes that its training split lacks: 'ten'"):
        ProbeSet.matched("digits", train, test)
    test.classes = [*test.classes[:9][::-1], "9"]  # by name, not by number
    matched = ProbeSet.matched("digits", train, test)
    assert matched.class_map is not None
    assert matched.class_map.tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0, 9]


def load_data(source: str) -> DataConfig:
    return DataConfig(source=source, image_size=(16, 16))


def test_the_pool_is_what_the_draws_take(finished: Path) -> None:
    train = open_source("digits", split="train", data=load_data("digits"))
    pool, numbers = shot_pool(train, num_classes=10, shots=[1, 3], seeds=2)
    assert len(pool) == len(numbers) <= 2 * 3 * 10
    assert (np.diff(numbers) > 0).all()
    np.testing.assert_array_equal(np.asarray(train.labels)[numbers], np.asarray(pool.labels))
    for position in (0, len(pool) - 1):
        np.testing.assert_array_equal(pool[position][0], train[int(numbers[position])][0])


def test_an_unreadable_shot_is_one_shot_less() -> None:
    train = open_source("digits", split="train", data=load_data("digits"))
    test = open_source("digits", split="val", data=load_data("digits"))
    probed = ProbeSet.matched("digits", train, test)
    pool, numbers = shot_pool(train, num_classes=10, shots=[4], seeds=1)

    def pixels(source: Any, indices: Any) -> Any:
        return source.batch(np.asarray(indices))[0].reshape(len(indices), -1).astype(np.float32)

    everywhere = np.arange(len(test))
    answers = Features(pixels(test, everywhere), np.asarray(test.labels), everywhere)
    readable = np.delete(np.arange(len(pool)), [0, 7])
    known = Features(pixels(pool, readable), np.asarray(pool.labels)[readable], readable)
    hits, _ = few_shot(probed, known, numbers, answers, shots=[4], seeds=1, l2=1024.0)[4]
    assert hits.shape == (1, len(test)) and hits.mean() > 0.5


# ---------------------------------------------------------------- in training


def test_a_run_is_probed_at_its_evaluations_and_at_the_end(finished: Path) -> None:
    found = rows(finished)
    assert [row["step"] for row in found] == [4, 8, 12]
    names = {f"{name}/{shots}shot" for name in ("digits", "shapes") for shots in (2, 5)}
    assert all(set(row) == {"kind", "step", *names} for row in found)
    assert all(0.1 < row["digits/5shot"] < 1 for row in found)


def test_the_numbers_are_those_of_the_averaged_weights_probed_by_hand(finished: Path) -> None:
    batch_size = load_config(finished / "run" / "config.yaml").train.eval_batch_size
    last = rows(finished)[-1]
    for dataset in ("digits", "shapes"):
        by_hand = probe(finished, dataset, shots=[2, 5], seeds=2, batch_size=batch_size, cache=False)["fewshot"]
        assert [last[f"{dataset}/{entry['shots']}shot"] for entry in by_hand] == [entry["accuracy_mean"] for entry in by_hand]


def test_tensorboard_has_them(finished: Path) -> None:
    events = EventAccumulator(str(finished / "run" / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("fewshot/digits/5shot")]
    assert curve == [(row["step"], pytest.approx(row["digits/5shot"])) for row in rows(finished)]


def test_training_does_not_notice(finished: Path) -> None:
    train(finished, "fewshot.datasets=[]", out="unprobed")
    assert weights(finished, "unprobed") == weights(finished)
    assert rows(finished, "fewshot", "unprobed") == []
    assert rows(finished, "eval", "unprobed") == rows(finished, "eval")


@pytest.mark.parametrize("lost", [12, None])
def test_a_run_that_goes_on_has_the_same_rows_once(finished: Path, tmp_path: Path, lost: int | None) -> None:
    """Killed before the last checkpoint was whole, or between the last probe and the summary."""
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    requested = json.loads((tmp_path / "run" / "manifest.json").read_text())["requested"]
    (tmp_path / "run" / "summary.json").unlink()
    if lost:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{lost:08d}")
    said = train(tmp_path)
    assert any("resuming" in line for line in said)
    assert rows(tmp_path, None) == rows(finished, None)
    assert weights(tmp_path) == weights(finished)
    assert requested["fewshot"]["shots"] == [2, 5]


def test_probes_may_be_added_to_a_run_that_has_begun(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    train(tmp_path, "fewshot.shots=[1]", "fewshot.every_steps=5", "fewshot.datasets=[digits]")
    assert [sorted(row) for row in rows(tmp_path)][2:] == [["digits/1shot", "kind", "step"]] * 2
    assert [row["step"] for row in rows(tmp_path)] == [4, 8, 10, 12]
    assert weights(tmp_path) == weights(finished)


def test_an_unknown_set_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    with pytest.raises(DataError, match="cifr10: no such data set"):
        train(tmp_path, "fewshot.datasets=[digits, cifr10]")
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_a_run_on_a_part_of_its_data_is_probed_on_whole_sets(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    config = load_config(tmp_path / "tiny.yaml", ["data.examples=20", "fewshot.datasets=[digits]"])
    (probed,) = open_probe_sets(config, ranks=SOLO)
    assert (len(probed.train), len(probed.test)) == (1438, 359)


def test_the_log_says_what_was_found(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, start_step=0, total_steps=100, batch_size=4, stream=stream) as log:
        log.fewshot_row(50, {"digits/5shot": 0.83213, "folder-photos/10shot": 0.5})
        assert log.probed == {50}
    assert "few-shot step 50/100: digits 5shot 83.21 %, folder-photos 10shot 50.00 %" in stream.getvalue()
    with RunLog(tmp_path, start_step=60, total_steps=100, batch_size=4, quiet=True) as log:
        assert log.probed == {50}
    with RunLog(tmp_path, start_step=40, total_steps=100, batch_size=4, quiet=True) as log:
        assert log.probed == set()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_probe_as_one_does(finished: Path, tmp_path: Path, parallel: str) -> None:
    """Their weights differ by rounding alone, so that hardly an image changes sides."""
    run, settings = Run(tmp_path, CONFIG), [f"train.parallel={parallel}", "model.dropout=0"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vitcli", "pretrain"]
    done = subprocess.run(
        [sys.executable, *command, "--config", str(run.config), "--out", str(run.out), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    train(finished, "model.dropout=0", out=f"alone-{parallel}")
    ours, theirs = rows(tmp_path), rows(finished, out=f"alone-{parallel}")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [4, 8, 12]
    for one, other in zip(ours, theirs):
        for key, value in other.items():
            assert key in ("kind", "step") or math.isclose(one[key], value, abs_tol=0.03), (key, one[key], value)
