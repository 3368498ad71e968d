"""`vit models` as a user meets it: the table, JSON, a config's model, and one line for what cannot be done."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from tests.harness import Result, vit
from vitcli.cli_models import LISTED
from vitcli.config_file import load_config
from vitcli.model_config import SIZES, ModelConfig, resolve_model
from vitcli.models import build_model

ROOT = Path(__file__).parents[1]


def listed(*words: str) -> list[dict[str, Any]]:
    result = vit("models", *words, "--json")
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)["models"]
    return rows


def fails_with(result: Result, *said: str) -> None:
    assert result.returncode == 2, result.stdout
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for words in said:
        assert words in result.stderr


def test_the_table_has_every_listed_variant() -> None:
    result = vit("models")
    assert result.returncode == 0, result.stderr
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["model", "parameters", "GFLOPs", "forward", "in", "training", "MiB", "activations", "tokens"]
    assert [line.split()[0] for line in lines] == list(LISTED)
    assert len({len(line) for line in (head, *lines)}) == 1  # columns line up
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["B/16"] == ["86,567,656", "35.13", "105.38", rows["B/16"][3], "197"]
    assert rows["R50x1"][0] == "25,549,352" and rows["R50x1"][-1] == "-"


@pytest.mark.parametrize("name", ["Ti/16", "R26+S/32", "R+Ti/16", "R26x1"])
def test_numbers_are_the_models(name: str) -> None:
    (row,) = listed(name, "--classes", "21", "--image-size", "96x160")
    with torch.device("meta"):
        model = build_model(resolve_model(ModelConfig(variant=name)), image_size=(96, 160), num_classes=21)
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert row["image_size"] == [96, 160]
    assert row["training_flops"] == 3 * row["forward_flops"] > 0
    assert row["activation_bytes"] > 1e6
    assert row["tokens"] == {"Ti/16": 61, "R26x1": None}.get(name, 16)


def test_settings_change_what_is_listed() -> None:
    plain, pooled = listed("B/16", "S/16"), listed("B/16", "S/16", "model.pool=gap", "model.registers=4")
    assert [row["tokens"] for row in plain] == [197, 197]
    assert [row["tokens"] for row in pooled] == [200, 200]
    assert [row["parameters"] - other["parameters"] for row, other in zip(pooled, plain, strict=True)] == [2 * 768, 2 * 384]


def test_a_configs_model() -> None:
    path = ROOT / "configs" / "cifar10-scratch.yaml"
    config = load_config(path)
    (row,) = listed("--config", str(path), "--classes", "10")
    assert row["model"] == str(path) and row["image_size"] == list(config.data.image_size)
    model = build_model(resolve_model(config.model), image_size=config.data.image_size, num_classes=10)
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    (larger,) = listed("--config", str(path), "model.variant=Ti/8", "--image-size", "64x32")
    assert larger["image_size"] == [64, 32] and larger["tokens"] in (32, 33) and larger["parameters"] > row["parameters"]


def test_sizes_that_do_not_fit_are_left_out_of_the_list_and_refused_by_name() -> None:
    result = vit("models", "--image-size", "96")
    assert "B/16" in result.stdout and "left out at 96 px" in result.stdout.splitlines()[-1]
    assert "H/14" in result.stdout.splitlines()[-1] and "L/32" not in result.stdout.splitlines()[-1]
    fails_with(vit("models", "H/14", "--image-size", "96"), "H/14", "model.patch_size is 14", "no multiple of 14 px")


def test_errors_are_one_line() -> None:
    fails_with(vit("models", "Q/3"), "'Q/3' is not a variant", "such as B/16")
    fails_with(vit("models", "R51x1"), "'R51x1' is not a variant")
    fails_with(vit("models", "B/16", "model.pol=gap"), "model.pol is not a setting", "model.pool")
    fails_with(vit("models", "B/16", "model.attention=axial"), "class token")
    fails_with(vit("models", "--image-size", "12by8"), "--image-size '12by8'", "192x256")
    fails_with(vit("models", "--config", "nothing.yaml"), "nothing.yaml: there is no such config file")
    fails_with(vit("models", "--config", str(ROOT / "configs" / "cifar10-scratch.yaml"), "B/16"), "drop one of them")


def test_the_page_says_what_the_command_says() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for row in listed():
        cells = [
            row["model"],
            f"{row['parameters'] / 1e6:,.1f}",
            f"{row['forward_flops'] / 1e9:,.2f}",
            f"{row['activation_bytes'] / 2**20:,.0f}",
        ]
        assert f"\n| {' | '.join(cells)} |\n" in page


def test_the_page_names_every_option_and_its_values() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    options = page.partition("## Options")[2].partition("## Costs")[0]
    sizes = {*SIZES, "variant", "resnet_root"}
    for name, field in ModelConfig.model_fields.items():
        section = page if name in sizes else options
        assert f"`{name}`" in section or f"{name}:" in section, f"docs/models.md says nothing about model.{name}"
        for value in get_args(field.annotation) if name not in sizes and get_origin(field.annotation) is Literal else ():
            assert f"`{value}`" in options, f"docs/models.md says nothing about model.{name}: {value}"


def test_help_is_fast() -> None:
    assert "vit models" in vit("models", "--help").stdout
    code = "import sys, vitcli.cli_models; print(sorted({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
