"""The README is short and tells the truth: its code tree is the code. What every page is tested for is in test_docs.py."""

import re

import pytest

from tests.pages import ROOT, Page, commands_in, parse, vit_commands, vit_words

README = Page(ROOT / "README.md", (ROOT / "README.md").read_text(encoding="utf-8"))
MOST_LINES = 80  # before the code tree: a screenful, and a map


def test_it_shows_the_commands() -> None:
    shown = {parse(words)[0] for words in vit_commands(README)}
    assert {"pretrain", "finetune", "eval", "predict", "preview"} <= shown


def test_it_is_short() -> None:
    assert README.text.partition("## The code")[0].count("\n") <= MOST_LINES


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vit eval --ckpt runs/a", [["eval", "--ckpt", "runs/a"]]),
        ("VIT_DATA=/data .venv/bin/vit schema | grep lr", [["schema"], None]),
        ("torchrun --nnodes 2 -m vitcli eval --json && tensorboard --logdir runs", [["eval", "--json"], None]),
        ("scripts/launch_nodes.sh --dry-run a,b pretrain --config x.yaml", [["pretrain", "--config", "x.yaml"]]),
        ("sbatch -N 2 scripts/launch_slurm.sh pretrain 'data.source=a b'", [["pretrain", "data.source=a b"]]),
        ("make demo  # vit", [None]),
    ],
)
def test_commands_are_found(line: str, expected: list[list[str] | None]) -> None:
    assert [vit_words(words) for words in commands_in(line)] == expected


@pytest.mark.parametrize("line", ["pretrain --confg x.yaml", "finetune --dataset", "evaluate", "data preview"])
def test_a_wrong_command_does_not_parse(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|requires an argument|no such command|missing"):
        parse(line.split())


def test_the_code_tree_is_the_code() -> None:
    tree = re.search(r"(?ms)^src/vitcli/\n(.*?)^```", README.text)
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
