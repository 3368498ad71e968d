"""Every shipped config: valid, buildable, and the paper's numbers where it says so."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vitcli.config import Config
from vitcli.config_file import dump_config, load_config
from vitcli.errors import ConfigError
from vitcli.model_config import resolve_model
from vitcli.models import build_model
from vitcli.recipes import finetune_recipe
from vitcli.study.file import dump_study, read_study
from vitcli.study.plan import cost, plan_study
from vitcli.study.words import all_finals, describe_study

ROOT = Path(__file__).parents[1]
ABLATIONS = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
STUDIES = [*sorted((ROOT / "configs").rglob("study-*.yaml")), *ABLATIONS]
SHIPPED = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*STUDIES})
PAPER = ROOT / "configs" / "paper"
IDS = [str(path.relative_to(ROOT)) for path in SHIPPED]

# ViT (2010.11929) Table 3: epochs, lr, schedule, weight decay, dropout; and what the text adds: clipping on ImageNet only.
TABLE_3: dict[str, tuple[str, float, float, str, float, float, float | None]] = {
    "vit-b16-jft": ("B/16", 7, 8e-4, "linear", 0.1, 0.0, None),
    "vit-b32-jft": ("B/32", 7, 8e-4, "linear", 0.1, 0.0, None),
    "vit-l32-jft": ("L/32", 7, 6e-4, "linear", 0.1, 0.0, None),
    "vit-l16-jft": ("L/16", 14, 4e-4, "linear", 0.1, 0.0, None),
    "vit-h14-jft": ("H/14", 14, 3e-4, "linear", 0.1, 0.0, None),
    "vit-b16-imagenet21k": ("B/16", 90, 1e-3, "linear", 0.03, 0.1, None),
    "vit-b32-imagenet21k": ("B/32", 90, 1e-3, "linear", 0.03, 0.1, None),
    "vit-l16-imagenet21k": ("L/16", 90, 1e-3, "linear", 0.03, 0.1, None),
    "vit-l32-imagenet21k": ("L/32", 90, 1e-3, "linear", 0.03, 0.1, None),
    "vit-b16-imagenet": ("B/16", 300, 3e-3, "cosine", 0.3, 0.1, 1.0),
    "vit-b32-imagenet": ("B/32", 300, 3e-3, "cosine", 0.3, 0.1, 1.0),
    "vit-l16-imagenet": ("L/16", 300, 3e-3, "cosine", 0.3, 0.1, 1.0),
    "vit-l32-imagenet": ("L/32", 300, 3e-3, "cosine", 0.3, 0.1, 1.0),
}
# Table 4 (steps), and warm-up as the authors released it.
TABLE_4 = {
    "imagenet": (20_000, 500),
    "cifar10": (10_000, 500),
    "cifar100": (10_000, 500),
    "pets": (500, 100),
    "flowers102": (500, 100),
}


def load(path: Path) -> Config:
    """Read a shipped file; what a fine-tuning file leaves to the checkpoint is a B/16 at 224 px here."""
    text = path.read_text(encoding="utf-8")
    checkpoint = [] if "\nmodel:" in text else ["model.variant=B/16"]
    return load_config(path, checkpoint + ([] if "image_size:" in text else ["data.image_size=224"]))


def test_there_are_configs() -> None:
    expected = {*TABLE_3, *(f"finetune-{dataset}" for dataset in TABLE_4)}
    assert {path.stem for path in PAPER.glob("*.yaml")} == expected
    assert (ROOT / "configs" / "jft-like.yaml").exists()
    assert (ROOT / "configs" / "cifar10-scratch.yaml").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=IDS)
def test_loads_and_builds(path: Path) -> None:
    config = load(path)
    with torch.device("meta"):
        model = build_model(resolve_model(config.model), image_size=config.data.image_size, num_classes=10)
        logits = model(torch.zeros(1, 3, *config.data.image_size))
    assert logits.shape == (1, 10)


@pytest.mark.parametrize("path", SHIPPED, ids=IDS)
def test_survives_being_written_and_read(path: Path, tmp_path: Path) -> None:
    config = load(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy, []) == config


@pytest.mark.parametrize("path", SHIPPED, ids=IDS)
def test_starts_with_a_comment(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies(path: Path, tmp_path: Path) -> None:
    """Every cell has settings that a run can have; the data need not be here."""
    study = plan_study(path, [], out=tmp_path / "study", needs_data=False, say=lambda _: None)
    assert study.notes == (), "families that are compared should take the same operations"
    assert len(describe_study(study)) > len(study.config.families)
    assert path.read_text(encoding="utf-8").startswith("# ")
    copy = tmp_path / "study.yaml"
    copy.write_text(dump_study(study.config), encoding="utf-8")
    assert read_study(copy)[0] == study.config
    if path in ABLATIONS:  # arms of one size, which two cores afford
        assert study.config.first_arm == next(iter(study.config.families)) and study.config.pair is None
        assert study.config.seeds == [0, 1, 2]
        assert sum(map(cost, [*study.trials(), *all_finals(study)])) < 6e13  # 1.7 hours of a core at 10 GFLOP/s


def test_a_wrong_key_in_a_shipped_file_fails(tmp_path: Path) -> None:
    text = (PAPER / "vit-b16-jft.yaml").read_text(encoding="utf-8").replace("weight_decay", "wieght_decay")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"wrong\.yaml:\d+: optim\.wieght_decay .*optim\.weight_decay"):
        load_config(wrong, [])


@pytest.mark.parametrize("name", TABLE_3)
def test_table_3(name: str) -> None:
    config = load(PAPER / f"{name}.yaml")
    optim, train, model = config.optim, config.train, config.model
    found = (model.variant, train.epochs, optim.lr, optim.schedule, optim.weight_decay, model.dropout, optim.grad_clip)
    assert found == TABLE_3[name]
    assert (optim.name, optim.beta1, optim.beta2, optim.warmup_steps, train.batch_size) == ("adamw", 0.9, 0.999, 10_000, 4096)
    assert (model.representation_size, model.pool, model.pos_embed) == ("width", "token", "learned")
    assert config.data.image_size == (224, 224)


@pytest.mark.parametrize("dataset", TABLE_4)
def test_table_4(dataset: str) -> None:
    config = load(PAPER / f"finetune-{dataset}.yaml")
    optim, train = config.optim, config.train
    assert (train.steps, optim.warmup_steps) == TABLE_4[dataset]
    assert (optim.name, optim.momentum, optim.schedule, optim.weight_decay, optim.grad_clip) == ("sgd", 0.9, "cosine", 0.0, 1.0)
    assert (train.batch_size, train.loss, config.data.source, config.data.image_size) == (512, "softmax", dataset, (384, 384))
    assert config.model.representation_size is None


@pytest.mark.parametrize("dataset", TABLE_4)
def test_the_built_in_recipe_is_the_shipped_file(dataset: str) -> None:
    config = load(PAPER / f"finetune-{dataset}.yaml")
    model = resolve_model(config.model).model_dump()
    preprocessing: dict[str, Any] = {
        "image_size": (224, 224), "mean": config.data.mean, "std": config.data.std, "eval_crop_fraction": None,
    }  # fmt: skip
    recipe = finetune_recipe(
        dataset, model=model, preprocessing=preprocessing, num_examples=50_000, forward_flops=10**9, flops_per_second=1e15
    )
    settings = {**recipe.settings, "data": {"source": dataset, **recipe.settings["data"]}}
    stated = Config.model_validate(settings)
    for section in ("data", "augment", "optim", "train"):
        assert getattr(stated, section) == getattr(config, section), section
