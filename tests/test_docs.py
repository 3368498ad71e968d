"""The documentation tells the truth: commands parse, settings have such names and values, links lead somewhere, and more."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import vit
from tests.page_checks import LOOKS
from tests.pages import KEYS, ROOT, Page, parse, read_pages, vit_commands

sys.path.insert(0, str(ROOT / "scripts"))
make_reference = importlib.import_module("make_reference")

PAGES = read_pages()
IDS = [page.name for page in PAGES]


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_page(page: Page, look: Callable[[Page], Iterator[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert list(look(page)) == []


WRONG = """\
# A page

See [this](missing.md), [that](#no-such-heading) and [`Transformer`](SRC/models/vit.py).
Set `optim.learning_rate`, `train.epochs=many` or `model.pool: max`; say `--verbos`; read `scripts/nothing.py`.
Then `vit eval --ckpt x --top5`.

| a | b | c | d | e |
|---|---|---|---|---|

```sh
make cake
vit pretrain --confg x.yaml
vit pretrain --config configs/nothing.yaml
vit finetune --ckpt runs/a --dataset digits optim.lrr=1
FOO=1 torchrun --nnodes 2 -m vitcli finetune --ckpt runs/a --dataset digits optim.lr=fast | cat
vit study --config configs/study-quick.yaml base.optim.lr=[] seeds=none
vit study --config my.yaml sedes=[1] && vit evaluate
python scripts/scale_plan.py --jsn plan.json
sbatch --nodes 8 scripts/launch_slurm.sh pretrain --config configs/jft-like.yaml train.batch_size=0
```

```yaml
optim: {lr: 1, momentun: 0.9}
variants:
  one: {settings: {data: {patch_permutation: none}}}
```
"""
COMPLAINTS = [
    *("--confg", "there is no configs/nothing.yaml", "optim.lrr", "'fast'", "seeds", "sedes", "evaluate", "train.batch_size"),
    *("--top5", "`optim.learning_rate`", "many", "'max'", "--verbos", "scripts/nothing.py", "make cake", "--jsn"),
    *("momentun", "patch_permutation", "missing.md", "#no-such-heading", "`Transformer`", "5 columns"),
]


def test_a_wrong_page_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = WRONG.replace("SRC", str(ROOT / "src" / "vitcli")) + f"\n```sh\necho {'long ' * 20}\n```\n"
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    found = [problem for look in LOOKS for problem in look(Page(path, text))]
    for complaint in [*COMPLAINTS, "characters"]:
        assert any(complaint in problem for problem in found), f"{complaint}: not noticed in\n" + "\n".join(found)
    assert len(found) == len(COMPLAINTS) + 1, "\n".join(found)


@pytest.mark.slow
def test_the_first_run_runs(tmp_path: Path) -> None:
    """Every command of the tutorial, in its order, on a few images."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    page = next(page for page in PAGES if page.path.name == "first-run.md")
    short = {
        "pretrain": ["train.examples=256", "data.shapes.val_examples=100"],
        "finetune": ["train.steps=4", "log.sample_images=0"],
        "inspect": ["--examples", "8"],
    }
    for words in vit_commands(page):
        result = vit(*words, *short.get(words[0], []), cwd=tmp_path)
        assert result.returncode == 0, f"vit {' '.join(words)}: {result.stderr}"
    assert (tmp_path / "runs" / "jft-like-digits" / "report.html").is_file()


def test_every_page_is_in_the_index() -> None:
    index = next(page for page in PAGES if page.name == "docs/README.md")
    linked = {(index.path.parent / target.partition("#")[0]).resolve() for _, target in index.links}
    assert {page.path for page in PAGES if not page.made} - linked - {index.path, ROOT / "README.md"} == set()


def test_every_command_is_shown_somewhere() -> None:
    shown = {parse(words)[0] for page in PAGES if "reference" not in page.name for words in vit_commands(page)}
    every = {heading.split()[-1] for heading in re.findall(r"(?m)^## (vit .+)$", make_reference.pages()["commands.md"])}
    assert every - shown == set()


def test_the_reference_is_what_the_code_says() -> None:
    folder = ROOT / "docs" / "reference"
    assert make_reference.stale(folder) == [], "run: python scripts/make_reference.py"
    settings = (folder / "settings.md").read_text(encoding="utf-8")
    assert [key for key in KEYS if f"- `{key}` (" not in settings] == []


def test_a_stale_reference_is_noticed(tmp_path: Path) -> None:
    for name, text in make_reference.pages().items():
        (tmp_path / name).write_text(text.replace("weight_decay", "decay"), encoding="utf-8")
    (tmp_path / "commands.md").unlink()
    assert make_reference.stale(tmp_path) == ["commands.md", "settings.md"]
