"""The reference pages of docs/: every command from the command line itself, every setting from the schema.

    python scripts/make_reference.py            (writes docs/reference/commands.md, settings.md and study-settings.md)
    python scripts/make_reference.py --check    (exit code 1 where a page is not what it would write)

Lists and no tables, so that they can be read on a phone. A test makes the same check.
"""

import argparse
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from vitcli.cli import app
from vitcli.config import Config
from vitcli.section import Section
from vitcli.study.config import StudyConfig

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
WIDTH = 120  # characters of a line; Markdown joins them again
NOTE = "<!-- written by `make reference`: change the help text or the schema, then run it again -->"
PLACEHOLDERS = {int: "N", float: "X", Path: "PATH"}  # what stands for a value


def wrapped(text: str, *, indent: str = "") -> str:
    """Return one paragraph or list item as lines; words such as --batch-size are not broken."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Parameter:
    """An option or word of a command, as its function declares it."""

    forms: tuple[str, ...]  # --debug, or --early-stop and --no-early-stop; none of a word
    value: str  # what stands for its value: N, PATH, png|svg, IN; empty for a flag
    info: Any  # typer's OptionInfo or ArgumentInfo
    default: Any
    required: bool
    multiple: bool


def commands_page() -> str:
    """Return docs/reference/commands.md."""
    parts = [
        "# Commands",
        NOTE,
        wrapped(
            "Every command and option, from the texts of `--help`. What a command prints as its result goes to standard "
            "output, everything else to standard error. `KEY=VALUE` words are [settings](settings.md). Exit codes and "
            "environment variables: [Files, environment, exit codes](files.md)."
        ),
        "- `vit --version`: print the version and stop.\n"
        "- `vit --help`, `vit COMMAND --help`: what can be said, and an example.\n"
        "- `vit --install-completion`: commands and options are completed by your shell from then on.",
        *group_parts(app, "vit"),
    ]
    return "\n\n".join(parts) + "\n"


def group_parts(group: typer.Typer, name: str) -> Iterator[str]:
    """Yield the paragraphs about every command of a group, by name, and of the groups in it."""
    commands = {info.name or str(info.callback.__name__): info for info in group.registered_commands if info.callback}
    groups = {str(info.name): info for info in group.registered_groups}
    for word in sorted({*commands, *groups}):
        if word in commands:
            yield from command_parts(f"{name} {word}", commands[word])
        elif (inner := groups[word].typer_instance) is not None:
            yield from group_parts(inner, f"{name} {word}")


def command_parts(name: str, info: Any) -> Iterator[str]:
    """Yield a heading, what a command does, its usage, options and examples."""
    yield f"## {name}"
    for paragraph in inspect.cleandoc(info.help or info.callback.__doc__ or "").split("\n\n"):
        yield wrapped(" ".join(paragraph.split()))
    parameters = parameters_of(info.callback)
    needed = [f"{each.forms[0]} {each.value}" for each in parameters if each.forms and each.required]
    words = [each.value for each in parameters if not each.forms]
    yield f"```text\n{' '.join([name, *needed, '[OPTIONS]', *words])}\n```"
    yield "\n".join(map(parameter_item, parameters))
    yield from example_parts(info.epilog or "")


def parameters_of(function: Any) -> list[Parameter]:
    """Return the parameters of a command's function, in its order."""
    hints = get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = get_args(hints[name])[:2]
        inner = [each for each in get_args(kind) if each is not NoneType] if isinstance(kind, UnionType) else [kind]
        kind = inner[0]
        multiple = get_origin(kind) is list
        kind = get_args(kind)[0] if multiple else kind
        is_option = isinstance(info, OptionInfo)
        required = parameter.default is inspect.Parameter.empty
        default = None if required else parameter.default
        value = "" if kind is bool else str(info.metavar or placeholder(kind))
        value += "..." if multiple and not is_option and "..." not in value else ""
        first = [info.default] if isinstance(info.default, str) else []  # where Annotated keeps the first word of Option()
        forms = tuple("/".join([*first, *(info.param_decls or [])]).split("/")) if is_option else ()
        found.append(Parameter(forms, value, info, default, required, multiple))
    return found


def placeholder(kind: Any) -> str:
    """Return what stands for a value of a type."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(each.value) for each in kind)
    return PLACEHOLDERS.get(kind, "TEXT")


def parameter_item(parameter: Parameter) -> str:
    """Return one list item: the form, in brackets what may be given, and the help text."""
    info, default = parameter.info, parameter.default
    form = " ".join(part for part in (" / ".join(parameter.forms), parameter.value) if part)
    facts = ["required"] if parameter.forms and parameter.required else []
    if parameter.forms and parameter.multiple and "several times" not in info.help and "repeated" not in info.help:
        facts.append("may be given several times")
    if words := range_words({"minimum": info.min, "maximum": info.max}):
        facts.append(words)
    if len(parameter.forms) == 2:
        facts.append(f"default `{parameter.forms[0 if default else 1]}`")
    elif default not in (None, False):
        facts.append(f"default {as_text(getattr(default, 'value', default))}")
    return item(form, facts, info.help)


def item(name: str, facts: list[str], text: str | None) -> str:
    """Return a list item, wrapped."""
    said = f" ({'; '.join(facts)})" if facts else ""
    return wrapped(f"- `{name}`{said}" + (f": {' '.join(text.split())}" if text else ""), indent="  ")


def example_parts(epilog: str) -> Iterator[str]:
    """Yield the examples of an epilog: "Example: vit ...", or several after three spaces."""
    for part in re.split(r"\s{3,}", epilog.strip()) if epilog else []:
        label, _, line = part.partition(": ")
        yield f"{label}:"
        code = textwrap.wrap(line.strip(), 96, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        yield "```sh\n" + " \\\n".join(code) + "\n```"


# ---------------------------------------------------------------- settings


def settings_page() -> str:
    """Return docs/reference/settings.md."""
    parts = [
        "# Settings",
        NOTE,
        wrapped(
            "Every setting of a run: what it is called in a YAML file, section by section, and as a `section.name=value` word "
            "after a command. `vit schema` prints the same, and [Settings and configs](../configs.md) says how they are given."
        ),
        wrapped(
            "**resume: free** means that the setting may have another value when an unfinished run is gone on with, because it "
            "cannot change a result. Of all others a run directory refuses another value "
            "([why](../stop-and-go-on.md#what-may-change))."
        ),
        *section_parts(Config, "", heading="Top level"),
    ]
    return "\n\n".join(parts) + "\n"


def study_page() -> str:
    """Return docs/reference/study-settings.md."""
    parts = [
        "# Settings of a study",
        NOTE,
        wrapped(
            "Every key of the YAML file that `vit study` takes; [Comparing model families](../study.md) says what they are "
            "for. Where *settings* stands, [settings of a run](settings.md) go, nested as there."
        ),
        *section_parts(StudyConfig, "", heading="Top level"),
    ]
    return "\n\n".join(parts) + "\n"


def section_parts(section: type[Section], prefix: str, *, heading: str) -> Iterator[str]:
    """Yield a heading, what the section is, its settings as a list, then the sections inside it."""
    schema = section.model_json_schema()
    yield f"## {heading}"
    yield (section.__doc__ or "").strip().split("\n\n")[0]
    inner: list[tuple[str, str, type[Section]]] = []
    items = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner += [(key, shape, kind) for shape, kind in sections_in(field.annotation)]
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            continue
        default = "required" if field.is_required() else f"default {as_text(field.get_default(call_default_factory=True))}"
        facts = [words_of(schema["properties"][name]), default]
        if isinstance(field.json_schema_extra, Mapping) and field.json_schema_extra.get("may_change_on_resume"):
            facts.append("**resume: free**")
        items.append(item(key, facts, field.description))
    yield "\n".join(items)
    for key, shape, kind in inner:
        each = shape != "alone"
        yield from section_parts(kind, "" if each else f"{key}.", heading=f"{key}, {shape}" if each else key)


def sections_in(annotation: Any, shape: str = "alone") -> list[tuple[str, type[Section]]]:
    """Return the sections that a setting holds, and whether alone, in a list ("each") or by name ("each name")."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [(shape, annotation)]
    shape = {list: "each", dict: "each name"}.get(get_origin(annotation), shape)
    return [found for part in get_args(annotation) for found in sections_in(part, shape)]


def as_text(value: Any) -> str:
    """Return a default as YAML writes it."""
    return f"`{value if isinstance(value, str) else json.dumps(value, default=str)}`"


def words_of(node: Mapping[str, Any]) -> str:
    """Return in words what values a node of a JSON schema allows."""
    values = dict.fromkeys(alternatives(node))
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


def alternatives(node: Mapping[str, Any]) -> list[str]:
    """Return in words each kind of value that a node allows."""
    if "anyOf" in node:
        return [words for each in node["anyOf"] for words in alternatives(each)]
    if "enum" in node or "const" in node:
        return [f"`{value}`" for value in node.get("enum", [node.get("const")])]
    kind = node.get("type")
    if kind == "array":
        if "prefixItems" in node:
            return [f"{len(node['prefixItems'])} {plural(node['prefixItems'][0])}"]
        return [f"list of {plural(node.get('items', {}))}"]
    if kind in ("integer", "number"):
        return [" ".join(part for part in ("whole number" if kind == "integer" else "number", range_words(node)) if part)]
    plain = {"string": "text", "boolean": "true or false", "null": "null", "object": "settings"}
    if kind == "object" and isinstance(node.get("additionalProperties"), Mapping):
        return ["names, each with settings"]
    return ["path" if node.get("format") == "path" else plain.get(str(kind), "settings")]


def plural(node: Mapping[str, Any]) -> str:
    """Return what a list is made of."""
    return re.sub(r"^(whole number|number|path|text)\b", r"\1s", words_of(node))


def range_words(node: Mapping[str, Any]) -> str:
    """Return the range of a number in words, or nothing."""
    low, above, high, below = (node.get(f"{kind}imum") for kind in ("min", "exclusiveMin", "max", "exclusiveMax"))
    words = [f"{word} {end:,.10g}" for word, end in (("from", low), ("above", above)) if end is not None]
    words += [f"{word} {end:,.10g}" for word, end in (("to", high), ("below", below)) if end is not None]
    return (" " if low is not None and high is not None else ", ").join(words)


# ---------------------------------------------------------------- files


def pages() -> dict[str, str]:
    """Return every generated page by its file name."""
    return {"commands.md": commands_page(), "settings.md": settings_page(), "study-settings.md": study_page()}


def stale(folder: Path) -> list[str]:
    """Return the names of the pages in a folder that are not what would be written."""
    return [
        name
        for name, text in pages().items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is stale")
    old = stale(FOLDER)
    if parser.parse_args().check:
        if old:
            sys.exit(f"docs/reference: {', '.join(old)} is not what the code says; run: python scripts/make_reference.py")
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in old:
        (FOLDER / name).write_text(pages()[name], encoding="utf-8")
        print(f"docs/reference/{name}: written anew")


if __name__ == "__main__":
    main()
