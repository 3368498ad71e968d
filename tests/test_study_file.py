"""What a study's YAML may say: every mistake is one line with its place, and settings reach the runs in the right order."""

from pathlib import Path

import pytest

from vitcli.errors import ConfigError
from vitcli.study.config import nearest_size, points_of
from vitcli.study.file import dump_study, read_study, run_layers

STUDY = """title: A study
form: grid
base:
  model: {patch_size: 8, width: 16, depth: 1, num_heads: 2}
  data: {source: shapes, image_size: 16}
  optim:
    lr: 1e-3
  train: {batch_size: 8}
families:
  wide:
    model: {width: 32}
  narrow:
    optim:
      lr: 2e-3
variants:
  rough:
    settings: {augment: {flip: false}}
    sizes: [40]
sizes: [20, 40]
seeds: [0, 1]
length:
  epochs: 2
search:
  settings: {optim.weight_decay: [0.0, 0.1], train.label_smoothing: [0.0, 0.1]}
  families:
    narrow: {optim.weight_decay: [0.0, 0.05, 0.1, 0.2], train.label_smoothing: [0.0]}
transfer:
  - {dataset: digits, shots: [1, 5], finetune: {train.steps: 5}}
translate_px: [1, 2]
"""

# what to replace, by what, and what is said of it
MISTAKES = [
    ("title: A study\n", "", r": title is missing; it must be given"),
    ("form: grid", "form: mesh", r":2: form is 'mesh'; expected 'grid' or 'one_pass'"),
    ("  epochs: 2", "  epoch: 2", r":22: length\.epoch is not a setting of a study; did you mean length\.epochs\?"),
    ("sizes: [20, 40]\n", "sises: [20, 40]\n", r":19: sises is not a setting .* did you mean sizes\?"),
    ("sizes: [20, 40]\n", "zzz: 1\n", r":19: zzz is not a setting of a study; expected title, form, base, families"),
    ("sizes: [20, 40]\n", "sizes: [40, 20]\n", r":19: sizes is \[40, 20\]; expected different numbers in ascending"),
    ("sizes: [20, 40]\n", "sizes: [20, 0]\n", r":19: sizes\.1 is 0; expected greater than or equal to 1"),
    ("sizes: [20, 40]\n", "sizes: 20\n", r":19: sizes is 20; expected a valid list"),
    ("seeds: [0, 1]", "seeds: [0, 0]", r":20: seeds is \[0, 0\]; expected each of them once"),
    (
        "    sizes: [40]",
        "    sizes: [50]",
        r":18: variants\.rough\.sizes has 50, which is not among the study's sizes",
    ),
    ("    sizes: [40]", "    seeds: [7]", r":18: variants\.rough\.seeds has 7, which is not among"),
    ("    sizes: [40]", "    families: [other]", r":18: variants\.rough\.families has 'other', which is not among"),
    (
        "    sizes: [40]",
        "    size: [40]",
        r":18: variants\.rough\.size is not .* did you mean variants\.rough\.sizes\?",
    ),
    ("{augment: {flip: false}}", "{}", r":17: variants\.rough\.settings is empty: plain has no settings of its own"),
    ("{augment: {flip: false}}", "3", r":17: variants\.rough\.settings is 3; expected settings below it"),
    ("  rough:", "  plain:", r":17: variants\.plain cannot be a name"),
    ("  wide:", "  wi de:", r":11: families\.wi de cannot be a name; expected up to 40 letters"),
    ("  wide:", "  all:", r":11: families\.all cannot be a name"),
    ("sizes: [20, 40]\n", "sizes: [20]\ncompare: [wide, tall]\n", r"compare names 'tall'; the families are wide, narrow"),
    (
        "sizes: [20, 40]\n",
        "sizes: [20, 40]\ncompare: [wide]\n",
        r":20: compare is \['wide'\]; expected .* at least 2",
    ),
    # what the study decides
    (
        "  train: {batch_size: 8}",
        "  train: {batch_size: 8, steps: 9}",
        r":8: train\.steps is not for .* `length` says it",
    ),
    ("    lr: 1e-3", "    lr: 1e-3\n  seed: 3", r":8: seed is not for the runs of a study to say: `seeds` says it"),
    ("    model: {width: 32}", "    data: {examples: 3}", r":11: data\.examples is not for .* `sizes` says it"),
    (
        "{flip: false}}",
        "{flip: false}, fewshot: {shots: [1]}}",
        r":17: fewshot\.shots is not for .* `transfer` says it",
    ),
    (
        "{flip: false}}",
        "{flip: false}, optim: {weight_decay: 1}}",
        r":17: optim\.weight_decay is what the search chooses",
    ),
    # length
    ("length:\n  epochs: 2\n", "", r": length is missing; form: grid needs one of length\.epochs"),
    ("  epochs: 2", "  {epochs: 2, steps: 3}", r"length length\.epochs and length\.steps are both given; give exactly one"),
    ("  epochs: 2", "  early_stop_evals: 2", r":2\d: length says nothing; give exactly one of epochs"),
    ("form: grid", "form: one_pass", r":22: length is for form: grid; a one_pass run is as long as"),
    # search
    (
        "weight_decay: [0.0, 0.1]",
        "wieght_decay: [0.0, 0.1]",
        r":24: optim\.wieght_decay is not a setting; did you mean",
    ),
    (
        "weight_decay: [0.0, 0.1]",
        "weight_decay: 0.1",
        r":24: optim\.weight_decay is 0\.1; expected a list of different",
    ),
    (
        "weight_decay: [0.0, 0.1]",
        "weight_decay: [0.1, 0.1]",
        r":24: optim\.weight_decay is \[0\.1, 0\.1\]; expected a list",
    ),
    (
        "{optim.weight_decay: [0.0, 0.1]",
        "{train.steps: [1, 2]",
        r":24: train\.steps is not to be searched: `length`",
    ),
    (
        "[0.0, 0.05, 0.1, 0.2]",
        "[0.0, 0.05, 0.1]",
        r":26: the search tries 3 combinations for narrow and 4 for wide; give",
    ),
    (
        "    narrow: {optim.w",
        "    other: {optim.w",
        r":26: search\.families has 'other'; the families are wide, narrow",
    ),
    ("search:\n", "search:\n  sizes: [30]\n", r":24: search\.sizes has 30, which is not among the study's sizes"),
    ("search:\n", "search:\n  share: 2\n", r":24: search\.share is 2; expected less than or equal to 1"),
    # transfer
    ("dataset: digits, ", "", r":27: transfer\.0\.dataset is missing"),
    (
        "shots: [1, 5], finetune: {train.steps: 5}",
        "shots: []",
        r":27: transfer measures nothing on digits; give shots",
    ),
    (
        "train.steps: 5",
        "train.stebs: 5",
        r":27: transfer has train\.stebs for digits, not a setting; .* train\.steps\?",
    ),
    ("train.steps: 5", "seed: 5", r":27: transfer has seed for digits, which the study decides"),
    ("train.steps: 5}", "}, families: {tall: {}}", r":27: transfer has a family tall for digits; expected one of wide, narrow"),
    ("finetune: {train.steps: 5}", "families: {wide: {}}", r":27: transfer has families for digits, but no finetune; give"),
    (
        "train.steps: 5}",
        "}, families: {wide: {optim.rl: 1}}",
        r":27: transfer has optim\.rl for digits, not a setting; .* optim",
    ),
    ("train.steps: 5}", "}, families: {wide: {seed: 1}}", r":27: transfer has seed for digits, which the study decides"),
    ("translate_px", "  - {dataset: digits, shots: [1]}\ntranslate_px", r":27: transfer has digits twice"),
    (
        "translate_px",
        "  - {dataset: pets, shots: [2]}\ntranslate_px",
        r":27: transfer has other shots or seeds for pets",
    ),
    ("translate_px: [1, 2]", "translate_px: [2, 1]", r":29: translate_px is \[2, 1\]; expected different numbers"),
    ("title: A study", "title: A study\ntitle: B", r":2: title is given twice"),
]


def write(folder: Path, text: str = STUDY) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("there", "instead", "said"), MISTAKES)
def test_a_mistake_is_pointed_at(tmp_path: Path, there: str, instead: str, said: str) -> None:
    assert STUDY.count(there) >= 1
    with pytest.raises(ConfigError, match=said) as error:
        read_study(write(tmp_path, STUDY.replace(there, instead, 1)))
    assert "\n" not in str(error.value)


def test_the_study_without_mistakes_is_read(tmp_path: Path) -> None:
    config, _ = read_study(write(tmp_path))
    assert config.pair == ("wide", "narrow")
    assert config.all_variants == ["plain", "rough"]
    assert (config.sizes_of("plain"), config.sizes_of("rough")) == ([20, 40], [40])
    assert (config.families_of("rough"), config.seeds_of("rough")) == (["wide", "narrow"], [0, 1])
    assert config.length is not None and config.search is not None
    again, _ = read_study(write(tmp_path, dump_study(config)))
    assert again == config


def test_one_family_has_no_gap(tmp_path: Path) -> None:
    text = STUDY.replace("  wide:\n    model: {width: 32}\n", "")
    config, _ = read_study(write(tmp_path, text), ["search=null"])
    assert config.pair is None and list(config.families) == ["narrow"]


def test_overrides_win_and_are_pointed_at(tmp_path: Path) -> None:
    path = write(tmp_path)
    config, _ = read_study(path, ["seeds=[4]", "variants.rough.seeds=all", "length.epochs=5"])
    assert config.seeds == [4] and config.length is not None and config.length.epochs == 5
    for word, said in (
        ("sizes=[3,2]", r"^sizes=\[3, 2\]: sizes is"),
        ("lenth.epochs=1", r"^lenth\.epochs=1: lenth"),
        ("base.data.examples=4", r"^base\.data\.examples=4: data\.examples is not for"),
        ("sizes", "expected key=value"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_study(path, [word])


def test_points_are_every_combination_in_order(tmp_path: Path) -> None:
    config, _ = read_study(write(tmp_path))
    decay, smoothing = "optim.weight_decay", "train.label_smoothing"
    grid = [(0.0, 0.0), (0.0, 0.1), (0.1, 0.0), (0.1, 0.1)]
    assert points_of(config, "wide") == [{decay: a, smoothing: b} for a, b in grid]
    assert points_of(config, "narrow") == [{decay: a, smoothing: 0.0} for a in (0.0, 0.05, 0.1, 0.2)]
    assert points_of(config.model_copy(update={"search": None}), "wide") == [{}]


def test_settings_of_a_run_are_layers(tmp_path: Path) -> None:
    """Weakest first: what studies take, base, family, variant, what is tried; an override of one of them stays in its place."""
    path = write(tmp_path)
    _, layers = read_study(path, ["variants.rough.settings.optim.lr=5e-3", "base.train.batch_size=4"])

    def values(family: str, variant: str, point: dict[str, float]) -> tuple[object, ...]:
        found = run_layers(layers, defaults={"optim": {"lr": 1.0}, "seed": 9}, family=family, variant=variant, point=point)
        return tuple(found.values[key] for key in ("optim.lr", "model.width", "train.batch_size", "seed"))

    assert values("wide", "plain", {}) == (1e-3, 32, 4, 9)
    assert values("narrow", "plain", {}) == (2e-3, 16, 4, 9)
    assert values("narrow", "rough", {}) == (5e-3, 16, 4, 9)
    assert values("narrow", "rough", {"optim.lr": 7.0}) == (7.0, 16, 4, 9)
    found = run_layers(layers, defaults={}, family="narrow", variant="rough", point={"optim.weight_decay": 0.1})
    assert found.where("model.width") == f"{path}:4"
    assert found.where("augment.flip") == f"{path}:17"
    assert found.where("optim.lr").startswith("variants.rough.settings.optim.lr=0.005")
    assert found.where("optim.weight_decay") == f"{path}:26"


def test_a_familys_variant_replaces_the_bases_sizes(tmp_path: Path) -> None:
    _, layers = read_study(write(tmp_path, STUDY.replace("    model: {width: 32}", "    model: {variant: B/16}")))
    found = run_layers(layers, defaults={}, family="wide", variant="plain", point={})
    assert "model.width" not in found.values and found.values["model.variant"] == "B/16"


@pytest.mark.parametrize(("size", "nearest"), [(10, 10), (29, 10), (32, 100), (31, 10), (1000, 100), (1, 10)])
def test_the_nearest_size_is_by_ratio(size: int, nearest: int) -> None:
    assert nearest_size(size, [10, 100]) == nearest
