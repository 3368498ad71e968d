"""A study's YAML and `key=value` words to a valid `StudyConfig`, and on to the settings of its runs.

Every error names file, line and key, as those of a run's config do. What the study says of its runs is kept as it was said,
with its places, and becomes the layers of each run's config (`run_layers`), so that a mistake there is found in the usual way.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vitcli.config_file import Layers, PlainDumper, flatten, setting_keys, shown, unfit
from vitcli.errors import ConfigError
from vitcli.study.cells import PLAIN
from vitcli.study.config import LengthConfig, SearchConfig, StudyConfig, TransferConfig, VariantConfig, points_of

__all__ = ["dump_study", "read_study", "run_layers"]

Fail = Callable[[str, str], None]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,39}")  # of a family or variant, which becomes a folder
MOST_POINTS = 100  # of a search, for each family and size
# settings of a run that a study decides, and what says it there
DECIDED = {
    "out": "every run has its place in the study's folder",
    "seed": "`seeds` says it",
    "ckpt": "the runs of a study start from scratch",
    "from_scratch": "the runs of a study start from scratch",
    "data.examples": "`sizes` says it",
    "data.dev_fraction": "`search.dev_fraction` and `length.dev_fraction` say it",
    "train.steps": "`length` says it",
    "train.epochs": "`length` says it",
    "train.examples": "`length` says it",
    "train.early_stop_evals": "`length.early_stop_evals` says it",
    "fewshot.datasets": "`transfer` says it",
    "fewshot.shots": "`transfer` says it",
    "fewshot.seeds": "`transfer` says it",
    "log.readings": "`sizes` says it",
}


# ---------------------------------------------------------------- reading


def read_study(path: Path, overrides: Sequence[str] = ()) -> tuple[StudyConfig, Layers]:
    """Read, merge and check a study's file and `key=value` words; return it and where each setting came from.

    Whether the settings of a run are right is found when the runs are planned.

    Raises:
        ConfigError: one line with file, line, key, what was found and what was expected.
    """
    layers = Layers(base_name="study")
    layers.add_file(path)
    layers.add_overrides(overrides)
    config = validate(layers)
    check_study(config, layers)
    return config, layers


def validate(layers: Layers) -> StudyConfig:
    """Turn layers into a StudyConfig, or raise a ConfigError for the first thing wrong."""
    for key, value in layers.values.items():
        if complaint := unfit(value):
            raise ConfigError(f"{layers.where(key)}: {shown(key)} {complaint}")
    try:
        return StudyConfig.model_validate(layers.nested())
    except ValidationError as error:
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    key, where = ".".join(path), place_of(path, layers)
    if first["type"] == "extra_forbidden":
        fields = list(section_at(path[:-1]).model_fields)
        near = difflib.get_close_matches(path[-1], fields, 1, 0.6)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"expected {', '.join(fields)}"
        raise ConfigError(f"{where}: {shown(key)} is not a setting of a study; {hint}")
    if first["type"] == "missing":
        raise ConfigError(f"{where}: {key} is missing; it must be given")
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if first["type"] in ("model_type", "dict_type"):
        expected = "settings below it"
    raise ConfigError(f"{where}: {key} is {shown(repr(first['input']))}; expected {expected}")


def place_of(path: Sequence[str], layers: Layers) -> str:
    """Return where the innermost part of a path was said."""
    for end in range(len(path), 0, -1):
        key = ".".join(path[:end])
        if any(known == key or known.startswith(f"{key}.") for known in layers.values):
            return layers.where(key)
    return layers.where("")


def section_at(path: Sequence[str]) -> type[BaseModel]:
    """Return the section whose settings lie below a path."""
    sections: dict[str, type[BaseModel]] = {
        "length": LengthConfig,
        "search": SearchConfig,
        "variants": VariantConfig,
        "transfer": TransferConfig,
    }
    return sections[path[0]] if path else StudyConfig


# ---------------------------------------------------------------- what contradicts


def check_study(config: StudyConfig, layers: Layers) -> None:
    """Raise a ConfigError where settings that are each valid contradict one another, or are not a study's to make."""

    def fail(key: str, message: str) -> None:
        raise ConfigError(f"{place_of(key.split('.'), layers)}: {key} {message}")

    for kind, names in (("families", config.families), ("variants", config.variants)):
        for name in names:
            if not NAME.fullmatch(name) or name == "all" or (kind == "variants" and name == PLAIN):
                fail(
                    f"{kind}.{name}",
                    f"cannot be a name; expected up to 40 letters, digits, +, - and _, and neither all nor {PLAIN}",
                )
    known = ", ".join(config.families)
    for name in config.compare or []:
        if name not in config.families:
            fail("compare", f"names {name!r}; the families are {known}")
    for name, variant in config.variants.items():
        key = f"variants.{name}"
        if not variant.settings:
            fail(f"{key}.settings", f"is empty: {PLAIN} has no settings of its own already")
        for part, chosen, whole in (
            ("families", variant.families, list(config.families)),
            ("sizes", variant.sizes, config.sizes),
            ("seeds", variant.seeds, config.seeds),
        ):
            if strangers := [each for each in chosen or [] if each not in whole]:
                fail(f"{key}.{part}", f"has {strangers[0]!r}, which is not among the study's {part}: {whole}")
        if variant.search and config.search is None:
            fail(f"{key}.search", "is true, but the study has no search")
    check_form(config, fail=fail)
    check_settings(config, layers)
    if config.search is not None:
        check_search(config, layers)
    check_transfer(config, fail=fail)


def check_form(config: StudyConfig, *, fail: Fail) -> None:
    """Refuse a length that does not go with the form of the study."""
    length = config.length
    if config.form == "one_pass":
        if length is not None:
            fail("length", "is for form: grid; a one_pass run is as long as the largest of `sizes`")
        if config.search is not None and config.search.sizes is not None:
            fail("search.sizes", "is for form: grid; a one_pass run has one length")
        return
    if length is None:
        fail("length", "is missing; form: grid needs one of length.epochs, length.examples and length.steps")
        return
    given = [unit for unit in ("epochs", "examples", "steps") if getattr(length, unit) is not None]
    if len(given) != 1:
        said = " and ".join(f"length.{unit}" for unit in given) + " are both given" if given else "says nothing"
        fail("length", f"{said}; give exactly one of epochs, examples and steps")
    if config.search is not None and (strangers := [each for each in config.search.sizes or [] if each not in config.sizes]):
        fail("search.sizes", f"has {strangers[0]!r}, which is not among the study's sizes: {config.sizes}")


def check_settings(config: StudyConfig, layers: Layers) -> None:
    """Refuse settings of runs that the study decides itself, or that a search would replace."""
    prefixes = ["base.", *(f"families.{name}." for name in config.families)]
    prefixes += [f"variants.{name}.settings." for name in config.variants]
    searched = searched_keys(config)
    for full in layers.values:
        prefix = next((prefix for prefix in prefixes if full.startswith(prefix)), None)
        if prefix is None:
            continue
        key = full.removeprefix(prefix)
        if key in DECIDED:
            raise ConfigError(f"{layers.where(full)}: {key} is not for the runs of a study to say: {DECIDED[key]}")
        if prefix.startswith("variants.") and key in searched:
            raise ConfigError(
                f"{layers.where(full)}: {key} is what the search chooses, which would win over the variant; leave it out of one"
            )


def searched_keys(config: StudyConfig) -> set[str]:
    """Return the settings that a search chooses for any family."""
    if config.search is None:
        return set()
    return {key for tree in (config.search.settings, *config.search.families.values()) for key in flatten(tree)}


def check_search(config: StudyConfig, layers: Layers) -> None:
    """Refuse a search that tries what cannot be chosen, or more for one family than for another."""
    search = config.search
    assert search is not None
    if strangers := [name for name in search.families if name not in config.families]:
        raise ConfigError(
            f"{layers.where(f'search.families.{strangers[0]}')}: search.families has {strangers[0]!r}; "
            f"the families are {', '.join(config.families)}"
        )
    known = setting_keys()
    for prefix, tree in (
        ("search.settings", search.settings),
        *((f"search.families.{name}", tree) for name, tree in search.families.items()),
    ):
        for key, values in flatten(tree).items():
            where = layers.where(f"{prefix}.{key}")
            if key in DECIDED:
                raise ConfigError(f"{where}: {key} is not to be searched: {DECIDED[key]}")
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, 0.6)
                raise ConfigError(
                    f"{where}: {shown(key)} is not a setting; "
                    + (f"did you mean {near[0]}?" if near else "`vit schema` lists the settings")
                )
            if not isinstance(values, list) or not values or any(values.count(value) > 1 for value in values):
                raise ConfigError(f"{where}: {key} is {shown(repr(values))}; expected a list of different values to try")
    counts = {name: len(points_of(config, name)) for name in config.families}
    most = max(counts, key=lambda name: counts[name])
    for name, count in counts.items():
        if count != counts[most]:
            raise ConfigError(
                f"{layers.where(f'search.families.{name}' if name in search.families else 'search')}: the search tries "
                f"{count} combinations for {name} and {counts[most]} for {most}; give every family as many, or none is "
                "compared fairly"
            )
    if counts[most] > MOST_POINTS:
        raise ConfigError(f"{layers.where('search')}: search has {counts[most]} combinations; expected at most {MOST_POINTS}")


def check_transfer(config: StudyConfig, *, fail: Fail) -> None:
    """Refuse transfer data sets that one section `fewshot` cannot say, or with settings that are none."""
    names = [each.dataset for each in config.transfer]
    if twice := next((name for name in names if names.count(name) > 1), None):
        fail("transfer", f"has {twice} twice")
    probed = [each for each in config.transfer if each.shots]
    for each in probed:
        if (each.shots, each.seeds) != (probed[0].shots, probed[0].seeds):
            fail(
                "transfer",
                f"has other shots or seeds for {each.dataset} than for {probed[0].dataset}; give all the same, or none",
            )
    known = setting_keys()
    decided = {"out", "seed", "ckpt", "from_scratch", "data.source"}
    for each in config.transfer:
        if not each.shots and each.finetune is None:
            fail("transfer", f"measures nothing on {each.dataset}; give shots, or finetune")
        for family in each.families:
            if family not in config.families:
                fail("transfer", f"has a family {family} for {each.dataset}; expected one of {', '.join(config.families)}")
            if each.finetune is None:
                fail("transfer", f"has families for {each.dataset}, but no finetune; give finetune, {{}} for the recipe alone")
        for key in (key for family in config.families for key in each.finetune_of(family)):
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, 0.6)
                fail(
                    "transfer", f"has {key} for {each.dataset}, not a setting" + (f"; did you mean {near[0]}?" if near else "")
                )
            if key in decided:
                fail("transfer", f"has {key} for {each.dataset}, which the study decides")


# ---------------------------------------------------------------- from a study to the settings of its runs
def run_layers(layers: Layers, *, defaults: dict[str, Any], family: str, variant: str, point: Mapping[str, Any]) -> Layers:
    """Return the settings of a run as the study says them: defaults, base, family, variant, and what the search tries."""
    result = Layers(defaults, base_name="study")
    result.files = layers.files  # to point at where nothing better is known
    for prefix in ("base.", f"families.{family}.", f"variants.{variant}.settings."):
        stated = {key.removeprefix(prefix): value for key, value in layers.values.items() if key.startswith(prefix)}
        places = {key: layers.origins[prefix + key] for key in stated}
        in_file = {key: value for key, value in stated.items() if places[key].startswith(tuple(f"{f}:" for f in layers.files))}
        words = [{key: value} for key, value in stated.items() if key not in in_file]
        for layer in (in_file, *words):  # what an override replaces is below it
            if layer:
                result.add(layer, {}, "study")
                result.origins.update({key: places[key] for key in layer})
    for key, value in point.items():
        result.add({key: value}, {}, layers.where(point_key(layers, key, family)))
    return result


def point_key(layers: Layers, key: str, family: str) -> str:
    """Return the key under which a value to try was said."""
    own = f"search.families.{family}.{key}"
    return own if own in layers.values else f"search.settings.{key}"


def dump_study(config: StudyConfig) -> str:
    """Return the study as YAML that `read_study` reads back to an equal one."""
    stated = config.model_dump(mode="json")
    return yaml.dump(stated, Dumper=PlainDumper, sort_keys=False, default_flow_style=None, width=120)
