"""The README tells the truth: its commands parse, its settings and files exist, its code tree is the code."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from vitcli.cli import app
from vitcli.config_file import setting_keys

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def shell_lines() -> list[str]:
    """Return the commands in the README's shell blocks, continued lines joined, prompts removed."""
    blocks = re.findall(r"(?ms)^```(?:sh|bash|console)\n(.*?)^```", README)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if line.strip() and not line.lstrip().startswith("#")]


def vit_words(line: str) -> list[str] | None:
    """Return the words after `vit` if the line is such a command; what the shell redirects is the shell's."""
    words = shlex.split(line, comments=True)
    words = next((words[:i] for i, word in enumerate(words) if word in (">", "|", "&&")), words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words[1:] if words and Path(words[0]).name == "vit" else None


COMMANDS = [line for line in shell_lines() if vit_words(line) is not None]


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Parse `vit` words down to the command that would run, and run nothing; raise what the command line would print."""
    command: Any = typer.main.get_command(app)
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


def test_the_readme_shows_the_commands() -> None:
    shown = {parse(vit_words(line) or [])[0] for line in COMMANDS}
    assert {"pretrain", "finetune", "eval", "preview", "schema"} <= shown


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parse(vit_words(line) or [])


@pytest.mark.parametrize("line", ["vit pretrain --confg x.yaml", "vit finetune --dataset", "vit evaluate", "vit data preview"])
def test_a_wrong_command_does_not_parse(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|requires an argument|no such command|missing"):
        parse(vit_words(line) or [])


@pytest.mark.parametrize("line", COMMANDS)
def test_settings_and_files_exist(line: str) -> None:
    words = vit_words(line) or []
    for word in words:
        if key := re.match(r"([a-z_]+(?:\.[a-z_]+)*)=", word):
            assert key[1] in setting_keys(), f"{word}: not a setting"
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{word}: no such file"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", "\n".join(shell_lines())))))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"(?m)^{target}:", MAKEFILE)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_code_tree_is_the_code() -> None:
    tree = re.search(r"(?ms)^src/vitcli/\n(.*?)^```", README)
    assert tree, "the README has no code tree"
    shown: list[str] = []
    folder = ""
    for line in tree[1].splitlines():
        indent, name = re.match(r"([│├└─ ]*)(\S+)", line).groups()  # type: ignore[union-attr]
        folder = folder if len(indent) > 4 else ""
        if name.endswith("/"):
            folder = name
        else:
            shown.append(folder + name)
    sources = {str(path.relative_to(ROOT / "src" / "vitcli")) for path in (ROOT / "src" / "vitcli").rglob("*.py")}
    optional = {source for source in sources if source.endswith("__init__.py")}
    assert set(shown) - sources == set(), "drawn, but not there"
    assert sources - optional - set(shown) == set(), "there, but not drawn"
    assert len(shown) == len(set(shown))
