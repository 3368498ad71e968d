"""Runs side by side: what differs, and whether a difference could be chance."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tests.harness import vit
from tests.made_run import make_run
from vitcli.compare import with_holm
from vitcli.predictions import VAL_PREDICTIONS, load_predictions


def compare(*runs: Path, more: tuple[str, ...] = ()) -> dict[str, Any]:
    result = vit("compare", *map(str, runs), "--json", *more)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_two_runs_on_the_same_images(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", accuracy=0.5, seed=1)
    b = make_run(tmp_path / "b", accuracy=0.8, seed=2, optim={"lr": 0.01})
    found = compare(a, b)
    assert found["settings"] == {"optim.lr": [0.001, 0.01]}
    (pair,) = found["pairs"]
    right = [load_predictions(run / VAL_PREDICTIONS)[0].correct for run in (a, b)]
    only_a, only_b = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    assert (pair["only_a"], pair["only_b"], pair["images"]) == (only_a, only_b, 240)
    assert pair["difference"] == pytest.approx(right[1].mean() - right[0].mean())
    assert pair["p"] == pytest.approx(stats.binomtest(only_b, only_a + only_b, 0.5).pvalue)
    assert pair["p_holm"] == pair["p"]
    low, high = pair["interval"]
    normal = stats.norm.interval(0.95, pair["difference"], (right[1].astype(int) - right[0].astype(int)).std() / np.sqrt(240))
    assert (low, high) == pytest.approx(normal, abs=0.01)
    shown = vit("compare", str(a), str(b)).stdout
    assert f"{100 * right[0].mean():.2f} %" in shown
    assert "optim.lr" in shown
    assert f"b less a: {100 * pair['difference']:+.2f} points" in shown


def test_a_run_with_its_own_copy_does_not_differ(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed=3) for name in ("a", "b")]
    found = compare(*runs)
    assert found["settings"] == {}
    assert (found["pairs"][0]["difference"], found["pairs"][0]["p"]) == (0, 1)
    assert "no setting differs" in vit("compare", *map(str, runs)).stdout


def test_other_images_are_not_compared(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", source="digits")
    c = make_run(tmp_path / "c", data={"shapes": {"classes": 6, "train_examples": 60, "val_examples": 200}})
    found = compare(a, b, c)
    assert [pair["comparable"] for pair in found["pairs"]] == [False] * 3
    assert "different images: shapes and digits" in found["pairs"][0]["why"]
    assert "two versions or parts of shapes" in found["pairs"][1]["why"]
    assert "p_holm" not in found["pairs"][0]
    assert "not comparable" in vit("compare", str(a), str(b)).stdout


def test_images_that_one_run_skipped_are_left_out(tmp_path: Path) -> None:
    from dataclasses import fields

    from vitcli.predictions import Predictions, save_predictions

    a, b = (make_run(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    found, about = load_predictions(b / VAL_PREDICTIONS)
    kept = {field.name: getattr(found, field.name) for field in fields(found)}
    fewer = Predictions(**{name: None if array is None else array[::2] for name, array in kept.items()})
    save_predictions(b / VAL_PREDICTIONS, fewer, about=about)
    (pair,) = compare(a, b)["pairs"]
    assert pair["images"] == 120
    right = load_predictions(a / VAL_PREDICTIONS)[0].correct[::2]
    assert pair["difference"] == pytest.approx(fewer.correct.mean() - right.mean())


def test_a_run_without_answers_keeps_its_numbers(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", predictions=False)
    c = make_run(tmp_path / "c", predictions=False, finished=False)
    found = compare(a, b, c)
    assert found["runs"][1]["top1"]["value"] == pytest.approx(json.loads((b / "summary.json").read_text())["top1"])
    assert found["runs"][1]["top1"]["interval"][0] < found["runs"][1]["top1"]["value"]
    assert found["runs"][2]["finished"] is False
    assert found["runs"][2]["top1"]["interval"] is None
    assert "no checkpoint" in found["pairs"][0]["why"]
    assert "40 of 100" in vit("compare", str(a), str(c)).stdout


def test_files(tmp_path: Path) -> None:
    a, b = (make_run(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    out = tmp_path / "deep" / "comparison"
    out.mkdir(parents=True)
    (out / "compare.json").write_text('{"made_by": "vit compare"}')  # one's own files may be written anew
    found = compare(a, b, more=("--out", str(out)))
    assert json.loads((out / "compare.json").read_text()) == found
    with Image.open(out / "curves.png") as picture:
        assert picture.width > 1000
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "curves.png"]


def test_bad_input(tmp_path: Path) -> None:
    a, b = (make_run(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    for words, said in (
        ([a], "one run alone"),
        ([a, tmp_path / "." / "a"], "there twice"),
        ([a, tmp_path / "nowhere"], "there is no such directory"),
        ([a, b, "--out", tmp_path / "mine"], "holds other files"),
        ([a, b, "--out", a / "config.yaml"], "this is a file"),
    ):
        result = vit("compare", *map(str, words))
        assert result.returncode == 2
        assert said in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_runs_of_the_same_name_are_called_by_what_their_paths_do_not_share(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / folder / "run", seed=seed) for seed, folder in enumerate(("x", "y"))]
    assert [run["name"] for run in compare(*runs)["runs"]] == ["x/run", "y/run"]


def test_holm() -> None:
    # Holm's own steps: the smallest times 3, the next times 2, never less than the one before
    pairs = [{"comparable": True, "p": p} for p in (0.04, 0.01, 0.03)] + [{"comparable": False}]
    assert [found.get("p_holm") for found in with_holm(pairs)] == pytest.approx([0.06, 0.03, 0.06, None])
    assert [found["p_holm"] for found in with_holm([{"comparable": True, "p": 0.7}] * 2)] == [1.0, 1.0]
