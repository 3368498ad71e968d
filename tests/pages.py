"""Markdown pages as the tests see them: code blocks, prose, links, anchors, and the commands and settings they name."""

import re
import shlex
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import typer.main

from vitcli.cli import app
from vitcli.config import Config
from vitcli.config_file import setting_keys

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
KEYS = setting_keys()
SECTIONS = [name for name in Config.model_fields if any(key.startswith(f"{name}.") for key in KEYS)]
SHELL = ("sh", "bash", "console")
SETTING = re.compile(r"([a-z_]+(?:\.[a-z0-9_]+)*)=(.*)", re.DOTALL)
FILE_NAMES = re.compile(r"\.(md|py|json|jsonl|ya?ml|npz|safetensors|tsv|csv|pt|pt2|pth|bin|onnx|html|png|svg)$")


@dataclass(frozen=True)
class Page:
    """A Markdown page."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        """Return where it is, from the repository's root."""
        return str(self.path.relative_to(ROOT)) if self.path.is_relative_to(ROOT) else self.path.name

    @property
    def made(self) -> bool:
        """Tell whether a command wrote it: `study.md` in a folder below docs/results."""
        return self.name.startswith("docs/results/") and self.name.endswith("/study.md")

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """Return (language, code) of each fenced block; a block may be indented, as in a list."""
        found = re.findall(r"(?ms)^( *)```(\w*)\n(.*?)^\1```", self.text)
        return [(language, re.sub(rf"(?m)^{indent}", "", code)) for indent, language, code in found]

    @cached_property
    def prose(self) -> str:
        """Return the page without fenced blocks and comments."""
        return re.sub(r"(?s)<!--.*?-->", "", re.sub(r"(?ms)^( *)```\w*\n.*?^\1```", "", self.text))

    @cached_property
    def inline(self) -> list[str]:
        """Return what stands between backticks."""
        return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", self.prose)]

    @cached_property
    def links(self) -> list[tuple[str, str]]:
        """Return (text, target) of each link and image."""
        return re.findall(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+(?:\([^()]*\))?)\)", self.prose)

    @cached_property
    def anchors(self) -> set[str]:
        """Return the anchors of its headings, as GitHub makes them."""
        counts: dict[str, int] = {}
        found = set()
        for heading in re.findall(r"(?m)^#{1,6} (.+)$", self.prose):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
            slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
            found.add(slug if slug not in counts else f"{slug}-{counts[slug]}")
            counts[slug] = counts.get(slug, 0) + 1
        return found

    @cached_property
    def shell_lines(self) -> list[str]:
        """Return the commands of its shell blocks: continued lines joined, prompts and comments removed."""
        lines = "\n".join(code for language, code in self.blocks if language in SHELL).replace("\\\n", " ").splitlines()
        return [line.strip().removeprefix("$ ") for line in lines if line.strip() and not line.lstrip().startswith("#")]

    @cached_property
    def tables(self) -> list[list[str]]:
        """Return its tables, each as lines."""
        return [table.strip().splitlines() for table in re.findall(r"(?m)(?:^ *\|.*\n?)+", self.prose)]


def read_pages() -> list[Page]:
    """Return the README and every page below docs/."""
    return [Page(path, path.read_text(encoding="utf-8")) for path in PATHS]


# ---------------------------------------------------------------- commands


def commands_in(line: str) -> list[list[str]]:
    """Return the words of each command of a shell line, without variables set before it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for each in found if (words := drop_variables(each))]


def drop_variables(words: list[str]) -> list[str]:
    """Leave out the VARIABLE=value words at the beginning."""
    first = next((place for place, word in enumerate(words) if not re.match(r"[A-Za-z_]+=", word)), len(words))
    return words[first:]


def vit_words(words: list[str]) -> list[str] | None:
    """Return what follows `vit`, also where torchrun, python or a launch script starts it; None of another command."""
    name = Path(words[0]).name
    if name == "vit":
        return words[1:]
    if name in ("torchrun", "python") and "-m" in words and words[words.index("-m") + 1] == "vitcli":
        return words[words.index("vitcli") + 1 :]
    for script, before in (("launch_slurm.sh", 0), ("launch_nodes.sh", 1)):
        for place, word in enumerate(words):
            if Path(word).name == script:
                rest = [each for each in words[place + 1 :] if each != "--dry-run"]
                return rest[before:]
    return None


def vit_commands(page: Page) -> list[list[str]]:
    """Return the words after `vit` of every such command in a page's shell blocks."""
    found = [vit_words(words) for line in page.shell_lines for words in commands_in(line)]
    return [words for words in found if words is not None]


@cache
def root_command() -> Any:
    """Return the command line, built once: that takes as long as many parses."""
    return typer.main.get_command(app)


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Parse `vit` words down to the command that would run, and run nothing; raise what the command line would print."""
    command = root_command()
    name, context = "vit", None
    while hasattr(command, "commands"):
        if words in (["--version"], ["--help"]) or words[:1] in (["--install-completion"], ["--show-completion"]):
            return name, {}
        context = command.make_context(name, list(words), parent=context)
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, command, words = command.resolve_command(context, rest)
    if "--help" in words:
        return name, {}
    return name, command.make_context(name, list(words), parent=context).params


def known_options() -> set[str]:
    """Return every long option of every command."""

    def below(command: Any) -> set[str]:
        found = {form for parameter in command.params for form in (*parameter.opts, *parameter.secondary_opts)}
        return found.union(*(below(each) for each in getattr(command, "commands", {}).values()))

    return {form for form in below(root_command()) if form.startswith("--")} | {"--help"}


def setting_of(code: str) -> tuple[str, str | None] | None:
    """Return (key, value or None) of inline code that names a setting: train.epochs, optim.lr=3e-4, `model.pool: gap`."""
    match = re.fullmatch(r"([a-z_]+(?:\.[a-z0-9_]+)+(?:\.\*)?)(?:(?:=|: )(.+))?", code)
    if match is None or match[1].split(".")[0] not in SECTIONS or FILE_NAMES.search(match[1]):
        return None
    return match[1], match[2]
