"""What a fine-tuning run does when nobody says: for data sets of a user's own."""

from typing import Any

import pytest

from vitcli.recipes import Recipe, class_notes, finetune_recipe, inequality


def recipe(dataset: str = "folder:photos", *, side: int = 32, **facts: Any) -> Recipe:
    model = {"patch_size": 4 if side < 224 else 16, "width": 96, "depth": 2, "num_heads": 2, **facts.pop("model", {})}
    return finetune_recipe(
        dataset,
        model=model,
        preprocessing={"image_size": [side, side], "mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop_fraction": None},
        num_examples=facts.pop("num_examples", 300),
        forward_flops=50_000_000,
        flops_per_second=facts.pop("speed", 1e13),
        **facts,
    )


@pytest.mark.parametrize(
    ("side", "picture_side", "expected"),
    [(32, None, 32), (32, 20, 32), (32, 40, 32), (32, 64, 56), (224, 300, 224), (224, 384, 384), (224, 4000, 384)],
)
def test_the_image_size_suits_pictures_and_checkpoint(side: int, picture_side: int | None, expected: int) -> None:
    made = recipe(side=side, picture_side=picture_side)
    assert made.settings["data"]["image_size"] == [expected, expected]
    said = [note for note in made.notes if note.startswith("resolution:")]
    assert bool(said) == (picture_side is not None)
    if picture_side is not None:
        assert ("enlarged" in said[0]) == (picture_side < expected)
        assert ("more than the checkpoint's" in said[0]) == (expected > side)


def test_a_larger_size_needs_time_positions_and_a_set_of_ones_own() -> None:
    def side_of(made: Recipe) -> int:
        return int(made.settings["data"]["image_size"][0])

    assert side_of(recipe(picture_side=64)) == 56
    assert side_of(recipe(picture_side=64, speed=1e9)) == 32
    assert side_of(recipe(picture_side=64, model={"pos_embed": "relative"})) == 32
    assert side_of(recipe("fashion-mnist", picture_side=64)) == 32


def test_a_larger_size_counts_in_the_time_there_is() -> None:
    fast, slow = recipe(picture_side=64, speed=3e9), recipe(picture_side=64, speed=3e7)
    assert fast.settings["train"]["steps"] == 562
    assert slow.settings["train"]["steps"] == 100
    assert "shortened from 562 steps" in slow.notes[0]


@pytest.mark.parametrize(
    ("sizes", "ratio"), [({"a": 10, "b": 10}, 1.0), ({"a": 60, "b": 10}, 6.0), ({"a": 0, "b": 3}, 1.0), ({}, 1.0)]
)
def test_inequality(sizes: dict[str, int], ratio: float) -> None:
    assert inequality(sizes) == ratio


def test_unequal_classes_are_weighed_and_said() -> None:
    equal, unequal = recipe(class_sizes={"a": 50, "b": 10}), recipe(class_sizes={"a": 51, "b": 10})
    assert "class_weights" not in equal.settings["train"]
    assert unequal.settings["train"]["class_weights"] == "sqrt"
    assert not any(note.startswith("weights:") for note in equal.notes)
    assert any(note.startswith("weights:") for note in unequal.notes)
    assert "class_weights" not in recipe("cifar10", class_sizes={"a": 51, "b": 10}).settings["train"]


def test_small_classes_are_named_but_not_all_of_a_hundred() -> None:
    assert class_notes({"a": 5, "b": 5}, unequal=False) == ["classes: 2, of 5 training images each"]
    notes = class_notes({f"class {n}": n % 10 for n in range(100)}, unequal=True)
    assert notes[0] == "classes: 100, of 0 (class 0) to 9 (class 99) training images"
    assert notes[-1].startswith("few images: class 0 (0), class 10 (0)") and "and 45 more" in notes[-1]


@pytest.mark.parametrize(
    ("dataset", "ends_early"),
    [
        ("folder:photos", True),
        ("shards:x/{0..9}.tar", True),
        ("hf:beans", True),
        ("digits", False),
        ("mnist", False),
        ("pets", False),
    ],
)
def test_no_published_test_set_chooses_a_checkpoint(dataset: str, ends_early: bool) -> None:
    made = recipe(dataset, class_sizes={"a": 40, "b": 40})
    assert ("early_stop_evals" in made.settings["train"]) == ends_early
    assert any(note.startswith("ends early:") for note in made.notes) == ends_early
