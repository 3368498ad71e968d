"""Settings by measurement: what is tried, what is chosen, and that it is kept; speeds are given, never timed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vitcli import tuning
from vitcli.model_config import ModelConfig
from vitcli.tuning import Choice, choose, choose_settings, measure, sizes_to_try, worth_measuring

MODEL = ModelConfig(patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=2)
CPU = torch.device("cpu")
SECONDS_PER_IMAGE = {("float32", 64): 1.0, ("float32", 32): 0.5, ("float32", 16): 0.8, ("float32", 8): 2.0}


def settle(cache: Path, **changes: Any) -> Choice:
    given: dict[str, Any] = {
        "image_size": (8, 8),
        "num_classes": 3,
        "device": CPU,
        "precision": "float32",
        "micro_batch_size": None,
        "largest": 64,
        "budget_seconds": 0.05,
        "cache_dir": cache,
    }
    return choose_settings(MODEL, **{**given, **changes})


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a table take the clock's place; return the list that the number of measurements ends up in."""
    calls: list[int] = []

    def measured(step: object, candidates: list[tuple[str, int]], budget: float) -> dict[tuple[str, int], float]:
        calls.append(len(candidates))
        return {each: 1.0 / SECONDS_PER_IMAGE[each] for each in candidates} if budget else {}

    monkeypatch.setattr(tuning, "measure", measured)
    return calls


def test_the_fastest_is_chosen_and_the_table_says_why(tmp_path: Path, speeds: list[int]) -> None:
    choice = settle(tmp_path)
    assert (choice.precision, choice.micro_batch_size, choice.kept) == ("float32", 32, False)
    assert [row["micro_batch_size"] for row in choice.table] == [64, 32, 16, 8]
    assert [row["images_per_second"] for row in choice.table] == [1.0, 2.0, 1.2, 0.5]
    json.dumps(choice.as_dict())


def test_the_next_run_does_not_measure(tmp_path: Path, speeds: list[int]) -> None:
    first = settle(tmp_path)
    count = len(speeds)
    again = settle(tmp_path)
    assert (again.micro_batch_size, again.table, again.kept) == (32, first.table, True)
    assert len(speeds) == count


@pytest.mark.parametrize("changes", [{"image_size": (16, 16)}, {"largest": 16}, {"num_classes": 4}])
def test_other_tasks_are_measured(tmp_path: Path, speeds: list[int], changes: dict[str, Any]) -> None:
    settle(tmp_path)
    assert not settle(tmp_path, **changes).kept


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"key": 1}', '{"choice": {"precision": 1}}'])
def test_a_damaged_file_is_measured_again(tmp_path: Path, speeds: list[int], content: str) -> None:
    settle(tmp_path)
    (file,) = (tmp_path / "tuning").iterdir()
    file.write_text(content)
    assert not settle(tmp_path).kept
    assert settle(tmp_path).kept


def test_a_kept_choice_with_other_types_is_measured_again(tmp_path: Path, speeds: list[int]) -> None:
    settle(tmp_path)
    (file,) = (tmp_path / "tuning").iterdir()
    kept = json.loads(file.read_text())
    for wrong in ({"micro_batch_size": 0}, {"micro_batch_size": "8"}, {"precision": "int4"}):
        file.write_text(json.dumps({**kept, "choice": {**kept["choice"], **wrong}}))
        assert not settle(tmp_path).kept


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path: Path, speeds: list[int]) -> None:
    (tmp_path / "file").write_text("")
    assert settle(tmp_path / "file").micro_batch_size == 32
    assert not settle(tmp_path / "file").kept


def test_what_is_given_is_not_measured(tmp_path: Path, speeds: list[int]) -> None:
    assert settle(tmp_path, micro_batch_size=5) == Choice("float32", 5)
    assert speeds == []
    assert not list(tmp_path.iterdir())


def test_a_real_measurement_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    choice = settle(tmp_path, precision="auto", largest=16)
    assert torch.equal(torch.get_rng_state(), before)
    assert choice.precision in ("float32", "bf16") and choice.micro_batch_size in (16, 8)
    assert {row["micro_batch_size"] for row in choice.table} <= {16, 8}
    assert all(row["images_per_second"] > 0 for row in choice.table)


def test_sizes_are_halves() -> None:
    assert sizes_to_try(128, smallest=8) == [128, 64, 32, 16]
    assert sizes_to_try(100, smallest=8) == [100, 50, 25, 13]
    assert sizes_to_try(5, smallest=8) == [5]


def test_a_choice_other_than_the_default_wins_clearly() -> None:
    small, large = ("float32", 16), ("float32", 64)
    assert choose({small: 108.0, large: 100.0}, default=large) == large
    assert choose({small: 112.0, large: 100.0}, default=large) == small
    assert choose({small: 1.0, large: 0.0}, default=large) == small  # the default did not fit into memory
    assert choose({small: 1.0}, default=large) == large  # nor into the time
    assert choose({}, default=large) == large


def test_candidates_that_do_not_fit_into_memory_score_nothing() -> None:
    def step(precision: str, size: int) -> float:
        if size > 16:
            raise torch.OutOfMemoryError
        return 0.001 * size

    rates = measure(step, [("float32", size) for size in (64, 32, 16, 8)], 0.2)
    assert rates["float32", 64] == rates["float32", 32] == 0.0
    assert rates["float32", 16] == pytest.approx(1000)


def test_candidates_that_would_take_too_long_are_left_out() -> None:
    rates = measure(lambda precision, size: 1.0 * size, [("float32", size) for size in (64, 8)], 1.0)
    assert set(rates) <= {("float32", 8)}


def test_short_runs_are_not_worth_it() -> None:
    assert not worth_measuring(images=10_000, flops_per_image=10**6, device=CPU)
    assert worth_measuring(images=10**9, flops_per_image=10**9, device=CPU)
