"""YAML files and `key=value` overrides to a valid `Config`, and back; every error names file, line and key.

Layers, weakest first: a recipe (fine-tuning only), the file, the overrides. A layer that sets the length in one unit
removes the weaker layers' other units, and the recipe's warm-up with them. Nothing in a file is ever executed: only plain
scalars, lists and maps are read.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from vitcli.config import Config
from vitcli.distillation_config import distillation_problem
from vitcli.errors import ConfigError
from vitcli.model_config import SIZES, ModelConfig, model_problem, resolve_model
from vitcli.objective_config import objective_problem

__all__ = ["Layers", "check_config", "dump_config", "flatten", "load_config", "read_config", "setting_keys", "stored_config"]

LENGTHS = ("steps", "epochs", "examples")
LONGEST = 1 << 18  # characters of a config file, and of its values once aliases (*name) are written out; more is no config
MOST_SETTINGS = 1000
LARGEST_INT = 2**63 - 1  # beyond it numpy and torch raise errors of their own
PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # in paths these end in errors far from here
SHOWN = 120  # characters of a key or value in a message


class PlainLoader(yaml.SafeLoader):
    """YAML 1.1 without its traps: `3e-4` is a number, and a key given twice is an error."""


for first, resolvers in list(PlainLoader.yaml_implicit_resolvers.items()):
    # 010 is ten and not eight, 1:30 is no number of seconds, and a date is text
    dropped = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    PlainLoader.yaml_implicit_resolvers[first] = [(tag, pattern) for tag, pattern in resolvers if tag not in dropped]
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
PlainLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value).replace("_", "")))
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class PlainDumper(yaml.SafeDumper):
    """Quotes what `PlainLoader` would take for a number, such as the name 1e3."""


PlainDumper.yaml_implicit_resolvers = PlainLoader.yaml_implicit_resolvers


class Layers:
    """Settings by dotted key and where each was said, so that an error can point there.

    Args:
        base: the weakest layer, a nested mapping (a recipe).
        base_name: how errors call it.
    """

    def __init__(self, base: Mapping[str, Any] | None = None, *, base_name: str = "recipe") -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.base_name = base_name
        self.files: list[str] = []
        if base:
            self.add(flatten(base), {}, base_name)

    def add(self, values: Mapping[str, Any], lines: Mapping[str, int], name: str) -> None:
        """Put a layer of dotted keys on top; `lines` gives the line in the file `name` where known."""
        if any(f"train.{unit}" in values for unit in LENGTHS):
            for unit in LENGTHS:
                self.values.pop(f"train.{unit}", None)
            if self.origins.get("optim.warmup_steps") == self.base_name:
                self.values.pop("optim.warmup_steps", None)  # a recipe's warm-up belongs to the recipe's length
        if values.get("model.variant") is not None:
            for size in SIZES:
                self.values.pop(f"model.{size}", None)  # a variant replaces the sizes of weaker layers
        for key, value in values.items():
            for old in [k for k in self.values if k.startswith(key + ".") or key.startswith(k + ".")]:
                del self.values[old]  # `data: null` replaces data.source, and the other way round
            self.values[key] = value
            self.origins[key] = f"{name}:{lines[key]}" if key in lines else name

    def add_file(self, path: Path) -> None:
        """Read a YAML file as the next layer.

        Raises:
            ConfigError: missing, unreadable, not YAML, not a map, or a key twice.
        """
        values, lines = read_yaml(path)
        self.files.append(str(path))
        self.add(values, lines, str(path))

    def add_overrides(self, overrides: Sequence[str]) -> None:
        """Read `key=value` words as the next layer; values are YAML, so `[64,48]` and `null` work."""
        parsed: dict[str, Any] = {}
        for word in overrides:
            key, equals, text = word.partition("=")
            if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
                raise ConfigError(f"{shown(word)}: expected key=value, such as optim.lr=3e-4")
            try:
                loader, node = compose(text)
                value = None if node is None else loader.construct_object(node, deep=True)
            except (yaml.YAMLError, ValueError, LookupError):  # `!!bool maybe`, and `!!float` of nothing
                raise ConfigError(f"{shown(word)}: the value is not YAML; quote it for the shell") from None
            if isinstance(value, dict) and not text.lstrip().startswith("{"):
                value = text  # `folder:` alone is a name, not a map
            parsed |= flatten({key: value}) if isinstance(value, dict) else {key: value}
        lengths = [f"train.{unit}" for unit in LENGTHS if parsed.get(f"train.{unit}") is not None]
        if len(lengths) > 1:
            raise ConfigError(f"{' and '.join(lengths)} are both given; give exactly one of steps, epochs and examples")
        for key, value in parsed.items():
            self.add({key: value}, {}, shown(f"{key}={value}"))

    def where(self, key: str) -> str:
        """Return the best place to point at for a key: its own, else its section's, else any layer's name."""
        for candidate in (key, *[k for k in self.origins if k.startswith(key + ".")]):
            if candidate in self.origins:
                return self.origins[candidate]
        return self.files[-1] if self.files else self.base_name

    def nested(self) -> dict[str, Any]:
        """Return the settings as a nested dictionary."""
        result: dict[str, Any] = {}
        for key, value in self.values.items():
            *sections, name = key.split(".")
            target = result
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
        return result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted keys; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def compose(text: str) -> tuple[PlainLoader, yaml.Node | None]:
    """Parse a YAML document of plain values; a few lines of aliases can stand for gigabytes, so they are counted first.

    Raises:
        yaml.YAMLError: not YAML, too deep, too large, or of a type that no setting has.
    """
    loader = PlainLoader(text)  # check_plain leaves nothing that would construct anything else
    try:
        root = loader.get_single_node()
        if root is not None:
            check_plain(root, {})
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    finally:
        loader.dispose()
    return loader, root


def check_plain(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return how many characters a node stands for; raise where a tag or the size is no setting's."""
    known = sizes.get(id(node))
    if known == 0:
        raise yaml.constructor.ConstructorError(None, None, "an alias that contains itself", node.start_mark)
    if known is not None:
        return known
    if node.tag not in PLAIN_TAGS:
        raise yaml.constructor.ConstructorError(None, None, f"no setting has the type {shown(node.tag)}", node.start_mark)
    sizes[id(node)] = 0  # under way
    if isinstance(node, yaml.ScalarNode):
        size = 1 + len(node.value)
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
        size = 1 + sum(check_plain(child, sizes) for child in children)
    if size > LONGEST:
        problem = f"more than {LONGEST:,} characters once its aliases are written out"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    sizes[id(node)] = size
    return size


def shown(text: object) -> str:
    """Return a key or value for a message: one line, printable, not endless."""
    text = str(text)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a YAML map as dotted keys, and the line of each."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: there is no such config file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error.__class__.__name__}); expected YAML") from None
    if len(text) > LONGEST:
        raise ConfigError(f"{path}: has more than {LONGEST:,} characters; expected the settings of a run")
    try:
        loader, root = compose(text)
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        if root is not None:
            if not isinstance(root, yaml.MappingNode):
                raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected settings as `key: value`, found something else")
            walk(loader, root, "", path, values, lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, LookupError) as error:
        raise ConfigError(f"{path}: not valid YAML: {shown(str(error).splitlines()[0])}") from None
    return values, lines


def walk(
    loader: PlainLoader, node: yaml.MappingNode, prefix: str, path: Path, values: dict[str, Any], lines: dict[str, int]
) -> None:
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{path}:{line}: expected a setting's name, found a {key_node.id}")
        key = f"{prefix}{key_node.value}"
        if not key.isprintable() or len(key) > SHOWN or not key_node.value:
            raise ConfigError(f"{path}:{line}: {shown(key)!r} is not a setting; `vit schema` lists the settings")
        if len(lines) == MOST_SETTINGS:
            raise ConfigError(f"{path}:{line}: has more than {MOST_SETTINGS:,} settings")
        if key in lines:
            raise ConfigError(f"{path}:{line}: {key} is given twice, first at line {lines[key]}")
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            walk(loader, value_node, f"{key}.", path, values, lines)
        else:
            values[key] = loader.construct_object(value_node, deep=True)


def setting_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return every dotted key of the schema, in its order."""
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        keys += setting_keys(cast(type[BaseModel], kind), f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return keys


def nearest(key: str) -> str:
    known = setting_keys()
    sections = sorted({k.rsplit(".", 1)[0] for k in known if "." in k})
    close = difflib.get_close_matches(key, known + sections, 1, 0.6)
    if not close:  # the right name in the wrong section
        close = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"; did you mean {close[0]}?" if close else "; `vit schema` lists the settings"


def validate(layers: Layers) -> Config:
    """Turn layers into a Config, or raise a ConfigError for the first thing wrong."""
    for key, value in layers.values.items():
        complaint = unfit(value)
        if complaint:
            raise ConfigError(f"{layers.where(key)}: {shown(key)} {complaint}")
    try:
        return Config.model_validate(layers.nested())
    except ValidationError as error:
        # an unknown key first: a misspelt name often makes a required one missing
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    known = set(setting_keys())
    key = ".".join(path)
    while "." in key and key not in known and first["type"] != "extra_forbidden":
        key = key.rsplit(".", 1)[0]  # a place inside a value, such as the first of two numbers
    where = layers.where(key)
    if first["type"] == "extra_forbidden":
        raise ConfigError(f"{where}: {shown(key)} is not a setting{nearest(key)}")
    if first["type"] == "missing":
        raise ConfigError(f"{where}: {key} is missing; it must be given")
    found = layers.values.get(key, first["input"])
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if first["type"] == "model_type":
        expected = (
            f"settings below it, such as {key}.{next(k.split('.')[1] for k in setting_keys() if k.startswith(f'{key}.'))}"
        )
    raise ConfigError(f"{where}: {key} is {shown(repr(found))}; expected {expected}")


def unfit(value: Any) -> str | None:
    """Say why no setting can have a value, whatever its type; None if it may be one."""
    if isinstance(value, str) and UNPRINTABLE.search(value):
        return f"is {shown(repr(value))}; expected text without control characters"
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        return f"is {shown(value)}; expected a number of at most 63 bits"
    if isinstance(value, list | tuple):
        return next(filter(None, map(unfit, value)), None)
    if isinstance(value, Mapping):
        return next(filter(None, (unfit(each) for pair in value.items() for each in pair)), None)
    return None


def check_config(config: Config, layers: Layers) -> None:
    """Raise a ConfigError where settings that are each valid contradict one another."""
    train, data, optim = config.train, config.data, config.optim

    def fail(key: str, message: str) -> None:
        raise ConfigError(f"{layers.where(key)}: {key} {message}")

    given = [unit for unit in LENGTHS if getattr(train, unit) is not None]
    if len(given) != 1:
        said = " and ".join(f"train.{unit}" for unit in given) + " are both given" if given else "train says nothing"
        where = layers.where(f"train.{given[-1]}" if given else "train")
        raise ConfigError(f"{where}: {said}; give exactly one of steps, epochs and examples")
    if train.micro_batch_size is not None and train.micro_batch_size > train.batch_size:
        fail(
            "train.micro_batch_size",
            f"is {train.micro_batch_size}, more than train.batch_size ({train.batch_size}); make it smaller",
        )
    if train.steps is not None and optim.warmup_steps is not None and optim.warmup_steps >= train.steps:
        fail("optim.warmup_steps", f"is {optim.warmup_steps}, but the run has {train.steps} steps; make it shorter")
    if optim.end_lr > optim.lr:
        fail("optim.end_lr", f"is {optim.end_lr}, above optim.lr ({optim.lr}); the schedule must not rise")
    if train.loss == "sigmoid" and train.label_smoothing > 0:
        fail("train.label_smoothing", "has no meaning with train.loss: sigmoid; set it to 0")
    if min(data.std) <= 0:
        fail("data.std", f"is {list(data.std)}; every number must be above 0")
    if train.ema_decay is not None and train.ema_share is not None:
        fail("train.ema_share", "is another way to average than train.ema_decay; drop one of them")
    average = "ema_decay" if train.ema_decay is not None else "ema_share"
    if train.freeze_backbone and getattr(train, average) is not None:
        fail(f"train.{average}", "averages weights that train.freeze_backbone keeps fixed; drop one of them")
    if train.freeze_backbone and (train.freeze or train.head_first_steps):
        fail("train.freeze_backbone", "trains the head alone to the end; drop it, or train.freeze and train.head_first_steps")
    if (data.source == "mix") != (data.mix is not None):
        fail("data.mix", "and data.source: mix go together; give both or neither")
    if data.mix is not None and (any(part.source == "mix" for part in data.mix) or not data.mix):
        fail("data.mix", "needs one part or more, each a source of its own and none of them a mix")
    if data.dev_fraction is not None and data.val_source is not None:
        fail("data.dev_fraction", "evaluates on a share of the training split, and data.val_source on another source; drop one")
    if data.val_source == "mix" and data.source != "mix":
        fail("data.val_source", "is mix, but data.source is not; name a single source")
    if "mosaic" in [spec.partition(":")[0] for spec in (data.source, data.val_source or "")]:
        cells, shift = [side / data.mosaic.grid for side in data.image_size], data.mosaic.shift
        if any(cell != int(cell) or cell < 4 for cell in cells):
            sides = " x ".join(map(str, data.image_size))
            fail("data.mosaic.grid", f"is {data.mosaic.grid}, but {sides} px are not so many cells of 4 whole px or more")
        if shift > min(cells):
            fail("data.mosaic.shift", f"is {shift} px, more than a cell of {min(cells):g} px")
    if "shapes" in (data.source, data.val_source) and not all(16 <= side <= 512 for side in data.image_size):
        fail("data.image_size", f"is {data.image_size[0]} x {data.image_size[1]}; shapes makes images of 16 to 512 px")
    if data.patch_permutation is not None:
        side, (height, width) = data.patch_permutation, data.image_size
        if height % side or width % side or height * width < 4 * side**2:
            fail("data.patch_permutation", f"is {side}; it must cut the image of {height} x {width} px into 4 squares or more")
    check_model(config.model, data.image_size, layers)
    check_objective(config, layers)


# settings that say how to learn from labels
OF_LABELS = {
    "train": ("loss", "label_smoothing", "class_weights", "freeze_backbone", "head_first_steps"),
    "augment": ("mixup", "cutmix"),
}


def check_objective(config: Config, layers: Layers) -> None:
    problem = objective_problem(config.objective, resolve_model(config.model), config.data.image_size)
    for section, fields in OF_LABELS.items() if problem is None and not config.objective.needs_labels else ():
        values = getattr(config, section)
        for field in fields:
            if getattr(values, field) != type(values).model_fields[field].default:
                problem = (
                    f"{section}.{field}",
                    f"is about labels, and objective.name {config.objective.name} uses none; drop it",
                )
    problem = problem or distillation_problem(config.distillation, objective=config.objective.name, loss=config.train.loss)
    if problem is not None:
        raise ConfigError(f"{layers.where(problem[0])}: {problem[0]} {problem[1]}")


def check_model(model: ModelConfig, image_size: tuple[int, int], layers: Layers) -> None:
    try:
        sizes = resolve_model(model)
    except ValueError as error:
        key = "model.variant" if model.variant else "model"
        raise ConfigError(f"{layers.where(key)}: {key} {error}") from None
    problem = model_problem(sizes, image_size)
    if problem is not None:
        key, what = problem
        raise ConfigError(f"{layers.where(f'model.{key}')}: model.{key} {what}")


def read_config(
    path: Path | None, overrides: Sequence[str] = (), *, base: Mapping[str, Any] | None = None, base_name: str = "recipe"
) -> tuple[Config, Layers]:
    """Read, merge and check the layers; return the Config and where each setting came from.

    Raises:
        ConfigError: one line with file, line, key, what was found and what was expected.
    """
    layers = Layers(base, base_name=base_name)
    if path is not None:
        layers.add_file(path)
    layers.add_overrides(overrides)
    config = validate(layers)
    check_config(config, layers)
    return config, layers


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a whole config from one file and overrides; raises as `read_config`."""
    return read_config(Path(path), overrides)[0]


def stored_config(path: Path) -> Config:
    """Read the resolved config of a run directory."""
    layers = Layers()
    layers.add_file(path)
    return validate(layers)


def dump_config(config: Config) -> str:
    """Return the config as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=PlainDumper, sort_keys=False, default_flow_style=None, width=120)
