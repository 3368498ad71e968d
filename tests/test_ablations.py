"""The page on the paper's ablations: made from studies with planted accuracies, beside the paper's numbers."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.made_study import make_cell, write_json
from vitcli.study.cells import Cell
from vitcli.study.plan import Study, begin_study, plan_study
from vitcli.study.record import write_study
from vitcli.study.results import choose

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
results: Any = importlib.import_module("ablation_results")
CONFIGS = ROOT / "configs" / "ablations"


def made(name: str, folder: Path, reached: dict[str, float]) -> Study:
    """Plan a shipped ablation and write what its runs would leave."""
    study = plan_study(CONFIGS / f"{name}.yaml", [], out=folder, say=lambda _: None)
    begin_study(study)

    def accuracy(cell: Cell, metric: str) -> float:
        return reached[cell.family] + 0.01 * cell.seed

    for number, cell in enumerate(study.trials()):
        write_json(cell.run / "summary.json", {"step": 1, "trained_steps": 1, "top1": 0.1 * (number % 3), "loss": 1.0})
    for cell in study.finals(choose(study)):
        make_cell(study, cell, accuracy=accuracy)
    write_study(study, say=pytest.fail)
    return study


def test_every_shipped_ablation_has_a_place_on_the_page() -> None:
    page = (ROOT / "docs" / "results" / "ablations.md").read_text(encoding="utf-8")
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert set(results.STUDIES) == names
    made = results.filled(page, {name: f"\nthe table of {name}\n" for name in names})
    assert all(f"<!-- made: {name} -->\n\nthe table of {name}\n\n<!-- made: end -->" in made for name in names)
    assert results.filled(made, dict.fromkeys(names, "")).count("the table of") == 0  # made again
    with pytest.raises(SystemExit, match="marks for"):
        results.filled(page.replace("made: positions", "made: other"), {})
    assert results.filled(made, {"positions": "anew"}).count("the table of") == len(names) - 1  # the others stay


def test_positions_stand_beside_table_8(tmp_path: Path) -> None:
    reached = {name: 0.3 if name == "none" else 0.6 for name in results.TABLE_8}
    made("positions", tmp_path / "runs", reached)
    text = results.section("positions", tmp_path / "runs", beside=tmp_path)
    assert "|  | top-1, % | less 1d, points | paper, less 1d |" in text
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in text.splitlines() if row.startswith("| ")}
    assert set(results.TABLE_8) <= set(rows)
    assert "**\u221230** (" in rows["none"] and rows["none"].endswith("| \u22122.82 |")  # 61.382 - 64.206
    assert rows["1d"].endswith("|  |") and rows["1d-shared"].endswith("| +0.09 |")
    assert "34,000 images of `shapes` (50 classes), 5,000 to evaluate; 3 seeds" in text


def test_two_optimisers_stand_beside_table_7(tmp_path: Path) -> None:
    made("adam-sgd", tmp_path / "runs", {"adam": 0.6, "sgd": 0.5})
    text = results.section("adam-sgd", tmp_path / "runs", beside=tmp_path)
    assert "| upstream top-1 | 61.0 (" in text and "**\u221210** (" in text
    assert "| rate chosen | 0.03 | 1 |" in text
    assert "| paper: ResNet50, ImageNet | 77.54 | 78.24 | +0.70 |" in text


def test_the_lesson_of_figure_9(tmp_path: Path) -> None:
    """The mean of the patches is behind at the token's best rate, and ahead at its own."""
    reached = {
        "token-1e-3": 0.5,
        "token-3e-4": 0.4,
        "token-3e-3": 0.6,
        "token-1e-2": 0.3,
        "gap-3e-4": 0.5,
        "gap-1e-3": 0.7,
        "gap-3e-3": 0.3,
        "gap-1e-2": 0.2,
    }
    made("class-token", tmp_path / "runs", reached)
    text = results.section("class-token", tmp_path / "runs", beside=tmp_path)
    assert "The class token is best at 3e-3." in text
    assert "has **\u221230** (" in text and "and **+10** (" in text and "at its own best one, 1e-3." in text


def test_one_rate_may_be_best_for_both(tmp_path: Path) -> None:
    reached = dict.fromkeys(("token-1e-3", "token-3e-4", "token-1e-2", "gap-3e-4", "gap-1e-3", "gap-1e-2"), 0.3)
    made("class-token", tmp_path / "runs", {**reached, "token-3e-3": 0.6, "gap-3e-3": 0.5})
    text = results.section("class-token", tmp_path / "runs", beside=tmp_path)
    assert "Both are best at 3e-3. There the mean of the patches has **\u221210** (" in text
