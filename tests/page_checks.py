"""What may be wrong with a page: each function yields what it finds, in a line each."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tests.pages import (
    KEYS,
    ROOT,
    SETTING,
    Page,
    commands_in,
    known_options,
    parse,
    setting_of,
    vit_commands,
    vit_words,
)
from vitcli.config_file import Layers, compose, flatten, load_config, validate
from vitcli.errors import ConfigError
from vitcli.study.config import StudyConfig
from vitcli.study.file import read_study

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
OPTIONS = known_options()
# what a whole config needs beside the settings that are looked at
BASE = {"model": {"variant": "B/16"}, "data": {"source": "shapes", "image_size": 224}, "train": {"steps": 1_000_000}}
# options that prose names, of torchrun and of our scripts
FOREIGN = {"--max-restarts", "--nproc-per-node", "--settings"}
# measurements that many columns belong to; everything else is narrow enough for a phone
WIDE = {"docs/speed.md", "docs/study.md", "docs/data.md", "docs/explanation/vit-h14-on-paper.md"}
MOST_COLUMNS = 4
LONGEST_CODE = 100


def wrong_commands(page: Page) -> Iterator[str]:
    """Say which commands do not parse, or name files or settings that there are not."""
    for words in vit_commands(page):
        yield from wrong_command(words)
    for code in page.inline:
        if code.startswith("vit ") and "..." not in code and len(code.split()) > 3:
            yield from wrong_command(commands_in(code)[0][1:])


def wrong_command(words: list[str]) -> Iterator[str]:
    line = " ".join(["vit", *words])
    try:
        name, parameters = parse(words)
    except Exception as error:  # whatever click has for it
        yield f"{line}: {getattr(error, 'message', error)}"
        return
    settings = [word for word in parameters.get("overrides") or parameters.get("words") or [] if SETTING.fullmatch(word)]
    config: Path | None = parameters.get("config")
    shipped = ROOT / config if config is not None and (ROOT / config).is_file() else None
    if config is not None and config.parts[0] == "configs" and not shipped:
        yield f"{line}: there is no {config}"
    try:
        if name == "study":
            check_study_words(shipped, settings)
        elif shipped and name in ("pretrain", "doctor"):
            load_config(shipped, settings)
        else:
            check_settings(settings)
    except ConfigError as error:
        yield f"{line}: {error}"


def check_settings(settings: list[str]) -> None:
    """Raise ConfigError for a setting with a name or value that there is not."""
    layers = Layers(BASE)
    layers.add_overrides(settings)
    validate(layers)


def check_study_words(path: Path | None, settings: list[str]) -> None:
    """Raise ConfigError for words that a study would not take."""
    if path is not None:
        read_study(path, settings)
        return
    for word in settings:
        first, _, rest = word.partition("=")[0].partition(".")
        if first not in StudyConfig.model_fields:
            raise ConfigError(f"{word}: not a setting of a study")
        if first == "base":
            check_settings([f"{rest}={word.partition('=')[2]}"])


def wrong_names(page: Page) -> Iterator[str]:
    """Say which inline settings, options, files and make targets there are not."""
    for code in page.inline:
        if (setting := setting_of(code)) is not None:
            key, value = setting
            if key.removesuffix(".*") not in KEYS and not any(known.startswith(f"{key.removesuffix('.*')}.") for known in KEYS):
                yield f"`{code}`: no such setting"
            elif value is not None and not re.search(r"[A-Z]{2}", value):
                try:
                    check_settings([f"{key}={value}"])
                except ConfigError as error:
                    yield f"`{code}`: {error}"
        elif option := re.match(r"--[a-z][a-z0-9-]*", code):
            if option[0] not in OPTIONS | FOREIGN:
                yield f"`{code}`: no command has such an option"
        elif re.fullmatch(r"(configs|scripts|src|tests|docs)/[\w./-]+", code) and not (ROOT / code).exists():
            yield f"`{code}`: no such file"
    for words in (words for line in page.shell_lines for words in commands_in(line)):
        kinds = "scripts|tests" if vit_words(words) else "configs|scripts|tests"
        for word in words:
            if re.fullmatch(rf"({kinds})/[\w./-]+", word) and not (ROOT / word).exists():
                yield f"{' '.join(words)}: there is no {word}"
        yield from wrong_script_options(words)
        if words[0] == "make":
            yield from (f"make {word}: no such target" for word in words[1:] if "=" not in word and not is_target(word))


def is_target(word: str) -> bool:
    return re.search(rf"(?m)^{re.escape(word)}:", MAKEFILE) is not None


def wrong_script_options(words: list[str]) -> Iterator[str]:
    """Say which options of `python scripts/NAME.py` the script does not have."""
    if words[0] != "python" or not words[1].startswith("scripts/"):
        return
    script = ROOT / words[1]
    said = {node.value for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Constant)}
    yield from (f"{words[1]} has no option {word}" for word in words if word.startswith("--") and word not in said)


def wrong_yaml(page: Page) -> Iterator[str]:
    """Say what is wrong with the YAML blocks: settings of a run or of a study, each part at the left margin by itself."""
    for language, block in page.blocks:
        for part in re.split(r"(?m)^(?=\S)", block) if language == "yaml" else []:
            if not part.strip() or part.startswith("#"):
                continue
            loader, node = compose(part)
            assert node is not None
            ((key, value),) = loader.construct_object(node, deep=True).items()
            try:
                if key in StudyConfig.model_fields:
                    TypeAdapter(StudyConfig.model_fields[key].annotation).validate_python(value)
                    check_run_settings(key, value)
                else:
                    check_nested({key: value})
            except (ConfigError, ValidationError) as error:
                yield f"{part.splitlines()[0]}: {' '.join(str(error).splitlines()[:3])}"


def check_run_settings(key: str, value: Any) -> None:
    """Check the settings of runs inside a study's key."""
    inside = {"base": [value], "families": list(value.values()) if key == "families" else []}.get(key, [])
    inside += [each["settings"] for each in value.values()] if key == "variants" else []
    for settings in inside:
        check_nested(settings)


def check_nested(settings: dict[str, Any]) -> None:
    layers = Layers(BASE)
    layers.add(flatten(settings), {}, "page")
    validate(layers)


def wrong_links(page: Page) -> Iterator[str]:
    """Say which links lead nowhere, and which names in them the file they lead to does not define."""
    for text, target in page.links:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.path.parent / path).resolve() if path else page.path
        if not place.exists():
            yield f"({target}): there is no such file"
        elif anchor and anchor not in Page(place, place.read_text(encoding="utf-8")).anchors:
            yield f"({target}): there is no such heading"
        elif (name := re.fullmatch(r"`(\w+)`", text)) and place.suffix == ".py" and not defines(place, name[1]):
            yield f"[{text}]({target}): nothing there has this name"


def defines(path: Path, name: str) -> bool:
    """Tell whether a module, or a class in it, defines a name."""
    return re.search(rf"(?m)^ *(?:class|def) {name}\b|^{name}\b.* = ", path.read_text(encoding="utf-8")) is not None


def too_wide(page: Page) -> Iterator[str]:
    """Say which tables have too many columns, and which lines of code are too long, for a phone."""
    for table in page.tables if page.name not in WIDE and not page.made else []:
        columns = len(re.split(r"(?<!\\)\|", table[0].strip().strip("|")))
        if columns > MOST_COLUMNS:
            yield f"{table[0]}: {columns} columns"
    for language, block in page.blocks:
        for line in block.splitlines():
            if len(line) > LONGEST_CODE and not (page.name == "README.md" and not language):
                yield f"{line}: {len(line)} characters"


LOOKS = [wrong_commands, wrong_names, wrong_yaml, wrong_links, too_wide]
