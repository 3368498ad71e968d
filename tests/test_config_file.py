"""Reading configs: every mistake gets one line with file, line, key, and what to write instead."""

from pathlib import Path

import pytest

from vitcli.config import Config
from vitcli.config_file import dump_config, load_config, read_config, setting_keys, stored_config
from vitcli.errors import ConfigError

GOOD = """\
model: {variant: Ti/4}
data:
  source: shapes
  image_size: 32
optim:
  lr: 3e-4
  weight_decay: 0.1
train:
  steps: 100
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD)
    return path


def test_numbers_in_scientific_notation_are_numbers(good: Path) -> None:
    assert load_config(good).optim.lr == 3e-4
    assert load_config(good, ["optim.lr=5E-5"]).optim.lr == 5e-5
    assert load_config(good, ["train.epochs=1e3"]).train.epochs == 1000


def test_yamls_number_traps_are_closed(good: Path) -> None:
    assert load_config(good, ["train.steps=010"]).train.steps == 10
    assert load_config(good, ["train.steps=1_000"]).train.steps == 1000
    with pytest.raises(ConfigError, match="train.steps is '1:30'"):
        load_config(good, ["train.steps=1:30"])


def test_an_unknown_key_names_file_line_and_the_nearest_key(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD.replace("weight_decay", "wieght_decay"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}:7: optim.wieght_decay is not a setting; did you mean optim.weight_decay?"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr=fast", "optim.lr is 'fast'; expected a valid number"),
        ("optim.lr=-1", "optim.lr is -1; expected greater than 0"),
        ("train.steps=2.5", "train.steps is 2.5; expected a valid integer"),
        ("lr=3", "lr is not a setting; did you mean optim.lr?"),
        ("nonsense=1", "nonsense is not a setting; `vit schema` lists the settings"),
        ("model.pool=max", "model.pool is 'max'; expected 'token', 'gap' or 'map'"),
        ("data.image_size=30", "model.patch_size is 4: data.image_size 30 x 30 is no multiple of 4 px"),
        ("data.image_size=[32,a]", "data.image_size is [32, 'a']; expected a valid integer"),
        ("model.num_heads=5", "model.num_heads is 5, which does not divide model.width (192)"),
        ("model.variant=XL/16", "'XL/16' is not a variant; expected NAME/PATCH such as B/16"),
        ("train.micro_batch_size=512", "train.micro_batch_size is 512, more than train.batch_size (256)"),
        ("optim.warmup_steps=100", "optim.warmup_steps is 100, but the run has 100 steps"),
        ("optim.end_lr=1", "optim.end_lr is 1.0, above optim.lr (0.0003)"),
        ("data.shapes.classes=1", "data.shapes.classes is 1; expected greater than or equal to 2"),
        ("data.std=[0,1,1]", "data.std is [0.0, 1.0, 1.0]; every number must be above 0"),
        (
            "data.image_size=[32,48,3]",
            "data.image_size is [32, 48, 3]; expected one number for a square, or two: [height, width]",
        ),
        ("data=shapes", "data is 'shapes'; expected settings below it, such as data.source"),
        ("train.steps=true", "train.steps is True; expected something else than true or false"),
        ("optim.lr=.inf", "optim.lr is inf; expected a finite number"),
        ("data.image_size=8", "data.image_size is 8 x 8; shapes makes images of 16 to 512 px"),
        (
            "model.pos_embed=sincos2d model.width=4 model.num_heads=1",
            "sincos2d needs a width of 8 or more that 4 divides, not 4",
        ),
        ("train.steps=10 train.epochs=2", "train.steps and train.epochs are both given"),
        ("optim", "optim: expected key=value, such as optim.lr=3e-4"),
        ("optim.lr={", "the value is not YAML"),
        ("optim.lr=!!float", "the value is not YAML"),
        ("train.compile=!!bool", "the value is not YAML"),
    ],
)
def test_a_bad_override_gets_one_line(good: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(good, override.split(" "))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "  epochs: 3\n", ":10: train.steps and train.epochs are both given; give exactly one"),
        (
            GOOD.replace("  steps: 100", "  batch_size: 8"),
            ": train says nothing; give exactly one of steps, epochs and examples",
        ),
        (GOOD + "optim: {lr: 1}\n", ":10: optim is given twice, first at line 5"),
        (GOOD.replace("  source: shapes\n", ""), ": data.source is missing"),
        ("- a\n", ":1: expected settings as `key: value`, found something else"),
        ("a: [1,\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        (GOOD.replace("model: {variant: Ti/4}", "model: {width: 64}"), ":1: model needs patch_size, depth, num_heads"),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(good: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such config file; did you mean .*x\.yaml"):
        load_config(good.with_name("xx.yaml"))


def test_an_override_of_the_length_replaces_the_files_unit(good: Path) -> None:
    config = load_config(good, ["train.examples=5000"])
    assert (config.train.steps, config.train.examples) == (None, 5000)


def test_overrides_beat_the_file_and_the_file_beats_the_recipe(good: Path) -> None:
    base = {"optim": {"lr": 1.0, "momentum": 0.5, "warmup_steps": 7}, "train": {"steps": 20}}
    config, _ = read_config(good, ["optim.weight_decay=0.2"], base=base)
    assert (config.optim.lr, config.optim.momentum, config.optim.weight_decay) == (3e-4, 0.5, 0.2)
    assert config.optim.warmup_steps is None, "a recipe's warm-up must not outlive the recipe's length"
    assert (
        read_config(None, [], base={**base, **load_config(good).model_dump(include={"model", "data"})})[0].optim.warmup_steps
        == 7
    )


def test_a_variant_as_an_override_replaces_the_files_sizes(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD.replace("variant: Ti/4", "width: 64, depth: 2, num_heads: 2, patch_size: 8"))
    assert load_config(path, ["model.variant=S/16"]).model.width is None
    assert load_config(path, ["model.variant=S/16", "model.depth=3"]).model.depth == 3


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.yaml: data is missing"):
        load_config(tmp_path / "empty.yaml")


def test_a_folder_without_a_path_stays_a_name(good: Path) -> None:
    assert load_config(good, ["data.source=folder:"]).data.source == "folder:"


def test_one_number_is_a_square_and_two_are_height_and_width(good: Path) -> None:
    assert load_config(good).data.image_size == (32, 32)
    assert load_config(good, ["data.image_size=[64,48]"]).data.image_size == (64, 48)


def test_a_dumped_config_reads_back_equal(good: Path, tmp_path: Path) -> None:
    config = load_config(good, ["augment.mixup=0.2", "optim.eps=1e-9"])
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert stored_config(path) == config


def test_every_setting_says_what_it_is() -> None:
    schema = Config.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    undescribed = [n for s in sections for n, p in s["properties"].items() if "description" not in p and "$ref" not in p]
    assert undescribed == []
    assert "optim.weight_decay" in setting_keys()
