"""What is read from a study's runs: every number once, from where it is kept; the search's choice; files that say the same."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.made_study import make_cell, predictions, write_json, write_predictions
from vitcli.errors import UserError
from vitcli.study.cells import Cell, Measurement
from vitcli.study.controls import draw_study
from vitcli.study.page import edges
from vitcli.study.plan import Study, plan_study
from vitcli.study.record import summary_of, write_study
from vitcli.study.results import choose, measure, read_answers

STUDY: dict[str, Any] = {
    "title": "Planted",
    "form": "grid",
    "base": {
        "model": {"patch_size": 8, "width": 32, "depth": 1, "num_heads": 2},
        "data": {"source": "shapes", "image_size": 16, "shapes": {"classes": 4, "train_examples": 400, "val_examples": 200}},
        "train": {"batch_size": 20, "device": "cpu"},
    },
    "families": {"vit": {}, "deep": {"model": {"depth": 2}}},
    "sizes": [100, 200, 400],
    "seeds": [0, 1, 2],
    "length": {"epochs": 2},
}
TRANSFER = [{"dataset": "digits", "shots": [5], "finetune": {}}]
# the first is behind at the smallest size and ahead at the largest
PLANTED = {
    ("vit", 100): 0.30,
    ("vit", 200): 0.52,
    ("vit", 400): 0.8,
    ("deep", 100): 0.50,
    ("deep", 200): 0.55,
    ("deep", 400): 0.6,
}


def plan(tmp_path: Path, **settings: Any) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **settings}, sort_keys=False))
    return plan_study(path, [], out=tmp_path / "out", say=lambda text: None)


def planted(cell: Cell, metric: str) -> float:
    size = cell.examples if not cell.readings else 400
    base = PLANTED[cell.family, size] + 0.01 * (cell.seed - 1)
    if metric.startswith(("translate:", "unchanged:")):
        return base - 0.02 * int(metric[-1])
    return {"upstream": base, "fewshot:digits:5": base / 2, "finetune:digits": base / 4}[metric]


def make(study: Study, cells: Sequence[Cell] | None = None) -> None:
    for cell in study.finals(choose(study)) if cells is None else cells:
        make_cell(study, cell, accuracy=planted)


def values(found: Sequence[Measurement], **wanted: Any) -> list[float]:
    return [one.value for one in found if all(getattr(one, key) == value for key, value in wanted.items())]


# ---------------------------------------------------------------- the grid


def test_every_number_of_a_grid_is_read_once(tmp_path: Path) -> None:
    study = plan(tmp_path, transfer=TRANSFER, translate_px=[1, 2])
    cells = study.finals({})
    make(study, cells)
    found = measure(study)
    metrics = ["upstream", "fewshot:digits:5", "finetune:digits", "translate:1", "unchanged:1", "translate:2", "unchanged:2"]
    assert len(found) == 18 * len(metrics)
    for cell in cells:
        for metric in metrics:
            here = [
                one
                for one in found
                if (one.variant, one.family, one.examples, one.seed) == (cell.variant, cell.family, cell.examples, cell.seed)
                and one.metric == metric
            ]
            assert [one.value for one in here] == [pytest.approx(planted(cell, metric))]
            assert here[0].count == (359 if metric.startswith("fewshot") else 200)  # the digits held out
            assert here[0].images_seen == cell.steps * 20 == 2 * cell.examples
            assert here[0].flops == cell.training_flops * 2 * cell.examples
            assert (here[0].predictions is not None) == (metric == "upstream")


def test_what_is_not_there_yet_is_left_out(tmp_path: Path) -> None:
    study = plan(tmp_path, transfer=TRANSFER, translate_px=[1, 2])
    first, second = study.finals({})[:2]
    assert measure(study) == []
    make(study, [first, second])
    (second.run / "summary.json").unlink()  # killed while it trained: nothing but what later stages left, which cannot be
    shutil.rmtree(second.folder / "finetune-digits")
    next(stage.done for stage in second.stages if stage.name == "translate").unlink()
    assert {one.family for one in measure(study)} == {first.family}
    next(stage.done for stage in first.stages if stage.name == "translate").unlink()
    assert {one.metric for one in measure(study)} == {"upstream", "fewshot:digits:5", "finetune:digits"}


def test_early_stopping_is_judged_by_the_evaluation_split_and_pays_for_all_of_its_steps(tmp_path: Path) -> None:
    study = plan(tmp_path, length={"epochs": 4, "early_stop_evals": 3}, sizes=[400])
    cell = study.finals({})[0]
    make_cell(study, cell, accuracy=planted, early_stop=True)
    summary = cell.run / "summary.json"
    write_json(summary, {**json.loads(summary.read_text()), "top1": 0.99})  # of the development split: not to be reported
    (found,) = measure(study)
    assert (found.metric, found.value) == ("upstream", pytest.approx(planted(cell, "upstream")))
    assert found.predictions == cell.folder / "upstream.safetensors"
    assert found.images_seen == (cell.steps + 10) * 20


def test_a_damaged_file_is_an_error_for_who_asks_and_a_warning_for_the_study(tmp_path: Path) -> None:
    study = plan(tmp_path, sizes=[100, 400])
    make(study)
    cell = study.finals({})[0]
    path = cell.run / "predictions/val.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"val.safetensors: no predictions"):
        measure(study)
    said: list[str] = []
    write_study(study, say=said.append)
    assert len(said) == 1
    assert "plain / vit / n=100 / seed 0 is left out" in said[0]
    assert len(list(csv.DictReader((study.out / "results.csv").read_text().splitlines()))) == 11


# ---------------------------------------------------------------- one pass


def test_a_one_pass_run_is_read_at_every_reading_also_while_it_trains(tmp_path: Path) -> None:
    base = {
        **STUDY["base"],
        "data": {**STUDY["base"]["data"], "shapes": {"classes": 4, "train_examples": 410, "val_examples": 200}},
    }
    study = plan(
        tmp_path, form="one_pass", length=None, base=base, sizes=[90, 205, 400], transfer=TRANSFER, translate_px=[1, 2]
    )
    cell = study.finals({})[0]
    assert cell.readings == (90, 205, 400)
    make_cell(study, cell, accuracy=planted)
    found = measure(study)
    assert values(found, metric="upstream") == [pytest.approx(planted(cell, "upstream") * n / 3, abs=0.003) for n in (1, 2, 3)]
    assert values(found, metric="fewshot:digits:5", examples=205) == [pytest.approx(planted(cell, "fewshot:digits:5") * 2 / 3)]
    assert [one.images_seen for one in found if one.metric == "upstream"] == [100, 220, 400]  # whole batches of 20
    assert {one.examples for one in found if one.metric == "finetune:digits"} == {90, 205, 400}
    assert [one.predictions.name for one in found if one.predictions] == [f"step_{n:08d}.safetensors" for n in (5, 11, 20)]
    (cell.run / "summary.json").unlink()
    (cell.run / "predictions/step_00000020.safetensors").unlink()
    upstream = [one.examples for one in measure(study) if one.metric == "upstream"]
    assert upstream == [90, 205]


# ---------------------------------------------------------------- the search

SEARCH = {"settings": {"optim": {"lr": [0.1, 0.2, 0.3]}}, "dev_fraction": 0.2}


def trial(cell: Cell, top1: float | None, loss: float | None = 1.0) -> None:
    if top1 is not None:
        write_json(
            cell.run / "summary.json", {"top1": top1, "loss": loss, "step": 5, "trained_steps": 5, "train_seconds": 36.0}
        )


@pytest.mark.parametrize(
    ("results", "best"),
    [
        (((0.5, 1.0), (0.7, 1.0), (0.6, 1.0)), 0.2),
        (((0.7, 1.0), (0.7, 0.9), (0.7, 0.9)), 0.2),  # equal: the lower loss, then the first
        (((0.7, None), (0.7, 2.0), (0.1, 0.1)), 0.2),  # a loss that was not finite is the highest
        (((0.5, 1.0), None, (0.6, 1.0)), None),  # one is still to be run
    ],
)
def test_the_search_takes_the_best_of_trials_that_are_all_over(tmp_path: Path, results: Any, best: float | None) -> None:
    study = plan(tmp_path, search=SEARCH, sizes=[400], families={"vit": {}})
    for cell, result in zip(study.trials(), results):
        trial(cell, *(result or (None,)))
    chosen = choose(study)
    assert chosen == ({} if best is None else {("plain", "vit", 400): {"optim.lr": best}})
    assert len(study.finals(chosen)) == (0 if best is None else 3)


@pytest.mark.parametrize(("diverged", "over"), [(True, True), (False, False)])
def test_a_trial_that_diverged_has_lost_and_one_that_failed_otherwise_is_waited_for(
    tmp_path: Path, diverged: bool, over: bool
) -> None:
    study = plan(tmp_path, search=SEARCH, sizes=[400], families={"vit": {}})
    one, two, three = study.trials()
    trial(one, 0.2)
    trial(two, 0.4)
    write_json(three.folder / "failed.json", {"stage": "pretrain", "reason": "r", "diverged": diverged})
    assert bool(choose(study)) == over


def test_a_search_of_which_every_trial_diverged_has_chosen_nothing(tmp_path: Path) -> None:
    study = plan(tmp_path, search=SEARCH, sizes=[400], families={"vit": {}})
    for cell in study.trials():
        write_json(cell.folder / "failed.json", {"stage": "pretrain", "reason": "r", "diverged": True})
    assert choose(study) == {}


# ---------------------------------------------------------------- files


def test_the_files_say_what_was_planted(tmp_path: Path) -> None:
    study = plan(
        tmp_path,
        transfer=TRANSFER,
        translate_px=[1, 2],
        variants={"late": {"settings": {"model": {"pool": "gap"}}, "sizes": [100, 400]}},
    )
    make(study)
    said: list[str] = []
    lines = write_study(study, say=said.append)
    assert said == []
    rows = list(csv.DictReader((study.out / "results.csv").read_text().splitlines()))
    assert len(rows) == 7 * (18 + 12)
    row = next(
        row for row in rows if (row["family"], row["examples"], row["seed"], row["metric"]) == ("vit", "100", "1", "upstream")
    )
    assert float(row["value"]) == pytest.approx(0.30)
    assert row["folder"] == "cells/plain/vit/n000000100/s1"
    assert (study.out / row["predictions"]).is_file()
    record = json.loads((study.out / "study.json").read_text())
    assert record["cells"] == {"done": 30, "all": 30}
    assert record["hours"] == {"reported": pytest.approx(0.3), "search": 0, "finetune": pytest.approx(0.6)}
    assert record["runs"]["hardware"] == ["a processor, 2 cores"]
    upstream = next(each for each in record["comparison"] if (each["metric"], each["variant"]) == ("upstream", "plain"))
    assert [each["value"] for each in upstream["gaps"]] == [pytest.approx(each) for each in (-0.2, -0.03, 0.2)]
    assert upstream["crossover"]["kind"] == "measured"
    assert 200 < upstream["crossover"]["examples"] < 400
    late = [each for each in record["changes"] if (each["variant"], each["metric"]) == ("late", "upstream")]
    assert [(each["family"], each["examples"], each["value"]) for each in late] == [
        (family, size, pytest.approx(0.0, abs=1e-9)) for family in ("vit", "deep") for size in (100, 400)
    ]
    page = (study.out / "study.md").read_text()
    assert page.startswith("# Planted\n\nAll 30 cells are there.")
    assert "Measured crossover: beyond about" in page
    assert "| 100 | 30.0 (" in page
    assert "**−20** (" in page
    assert "figures/" not in page
    assert any("Measured crossover" in line for line in lines)
    assert any(line.startswith("100 ") and "30.0 (" in line for line in lines)


def test_a_study_of_one_size_compares_every_arm_with_the_first(tmp_path: Path) -> None:
    arms = {"vit": {}, "deep": {"model": {"depth": 2}}, "gap": {"model": {"pool": "gap"}}, "wide": {"model": {"width": 64}}}
    reached = {"vit": 0.5, "deep": 0.8, "gap": 0.5, "wide": 0.2}
    study = plan(tmp_path, families=arms, sizes=[400], variants={"late": {"settings": {"optim": {"lr": 1e-2}}}})
    assert study.notes == () and study.config.pair is None
    for cell in study.finals({}):
        make_cell(study, cell, accuracy=lambda cell, metric: reached[cell.family] + 0.01 * (cell.seed - 1))
    lines = write_study(study, say=pytest.fail)
    record = json.loads((study.out / "study.json").read_text())
    assert record["first_arm"] == "vit" and record["comparison"] == []
    leads = {each["family"]: each for each in record["against_first"] if each["variant"] == "plain"}
    assert {arm: each["value"] for arm, each in leads.items()} == {
        arm: pytest.approx(reached[arm] - 0.5, abs=1e-9) for arm in ("deep", "gap", "wide")
    }
    assert leads["deep"]["low"] > 0 > leads["wide"]["high"] and leads["gap"]["low"] < 0 < leads["gap"]["high"]
    page = (study.out / "study.md").read_text()
    assert "Upstream top-1 against vit: above it, in points: deep +30 (" in page and "not to be told from it: gap 0 (" in page
    assert "|  | top-1, % | less vit, points | operations |" in page and "| vit | 50.0 (" in page
    assert "| late less plain |" in page and "| wide | 20.0 (" in page
    assert any(line.startswith("wide ") and line.endswith(" x") for line in lines)
    drawn = {stem: figure for _, stem, _, figure in draw_study(summary_of(study, measure(study)))}
    assert {"arms-upstream", "accuracy-upstream", "flops-upstream", "control-late-upstream"} <= set(drawn)
    names = [tick.get_text() for tick in drawn["arms-upstream"].axes[0].get_yticklabels()]
    assert names == ["deep", "gap", "wide"]
    also = plan(tmp_path, families=arms, sizes=[400], compare=["wide", "deep"])  # who asks for a gap has it as well
    assert also.config.pair == ("wide", "deep")


def test_results_can_be_written_at_any_moment(tmp_path: Path) -> None:
    study = plan(tmp_path, search=SEARCH, sizes=[100, 400], transfer=TRANSFER)
    study.out.mkdir()
    write_study(study, say=print)  # nothing has begun
    assert "**0 of 12 cells are there**" in (study.out / "study.md").read_text()
    for cell in study.trials():
        trial(cell, 0.5 + cell.point["optim.lr"])
    cells = study.finals(choose(study))
    make(study, cells[:1])
    failed = {cells[1].folder: "pretrain: the disk is full"}
    write_study(study, say=print, failed=failed)
    page = (study.out / "study.md").read_text()
    assert "**1 of 12 cells are there**" in page
    assert "- plain / deep / n=100 / seed 0: pretrain: the disk is full" in page
    assert "| plain | vit | 100 | `optim.lr=0.1` | 60.0 |\n" in page
    assert "| plain | vit | 100 | `optim.lr=0.3` | **80.0**, chosen |\n" in page
    assert "- vit, 100 images: `optim.lr=0.3` is the largest tried" in page
    assert json.loads((study.out / "study.json").read_text())["search"][0]["chosen"] == {"optim.lr": 0.3}


@pytest.mark.parametrize(
    ("values", "chosen", "notes"),
    [
        ([1e-3, 2e-3, 4e-3], 2e-3, []),
        ([1e-3, 2e-3, 4e-3], 1e-3, ["`lr=0.001` is the smallest tried, so one beyond it may be better still"]),
        ([1e-3, 2e-3, 4e-3], 4e-3, ["`lr=0.004` is the largest tried, so one beyond it may be better still"]),
        ([1e-3, 2e-3], 2e-3, []),  # two say nothing of a side
        (["adam", "sgd", "muon"], "sgd", []),
    ],
)
def test_a_choice_at_the_end_of_what_was_tried_is_said(values: list[Any], chosen: Any, notes: list[str]) -> None:
    assert edges({"chosen": {"lr": chosen}, "trials": [{"settings": {"lr": value}} for value in values]}) == notes
    assert edges({"chosen": None, "trials": []}) == []


def test_answers_to_other_images_are_not_paired(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, fingerprint in zip(paths, "ffg"):
        write_predictions(path, predictions(0.5, images=20, seed=0), fingerprint=fingerprint)
    a, b, c = map(read_answers, paths)
    assert a.images == b.images != c.images
    assert np.array_equal(a.correct, c.correct)


@pytest.mark.slow
def test_figures_are_drawn_when_they_are_asked_for(tmp_path: Path) -> None:
    study = plan(tmp_path, sizes=[100, 400])
    make(study)
    write_study(study, say=print, figures=True)
    page = (study.out / "study.md").read_text()
    names = {"accuracy-upstream", "flops-upstream", "gap-upstream"}
    assert {path.stem for path in (study.out / "figures").iterdir()} == names
    for name in names:
        assert f"](figures/{name}.png)" in page
        assert (study.out / "figures" / f"{name}.svg").is_file()
