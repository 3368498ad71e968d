"""The house rules that a machine can check: imports point down, no god rooms, nothing unread, a fast command line."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from vitcli import config

SRC = Path(__file__).parents[1] / "src" / "vitcli"
# Lowest first. A leaf may import lower rooms only; a room from `weights` up may import its neighbours, without circles.
LAYERS = (
    {"__init__", "errors", "randomness", "section", "rendezvous"},
    {"model_config", "objective_config", "distillation_config"},
    {"config"},
    {"config_file", "pretrained"},
    {"models", "data", "optim", "logs", "device", "interrupts", "distributed", "lanes", "in_use", "optimizer_file"}
    | {"metrics", "losses"}
    | {"pretrained", "fewshot", "neighbours"},
    {"weights", "checkpoint", "forward", "evaluate", "opened", "rundir", "recipes", "own_data", "plan", "tuning", "recovery"}
    | {"retention", "saving", "features", "logistic", "probe_sets", "probes", "predictions", "findings", "figures", "speed"}
    | {"views", "translation", "label_sets", "jobs", "predict", "inspection", "objectives", "teacher"},
    {"step", "watch", "ending"},
    {"fit"},
    {"train", "assess", "data_commands", "sweep", "sweep_plan", "sweep_results", "run_record", "report", "compare"}
    | {"study", "doctor"},
    {"cli", "cli_data", "cli_eval", "cli_models", "cli_options", "cli_predict", "cli_sweep", "cli_report"}
    | {"cli_study", "cli_doctor", "cli_inspect"},
    {"__main__"},
)
LEAVES = LAYERS[4]
# seconds to import, so never for `vit --help`
LAZY = ("torch", "torchvision", "numpy", "sklearn", "tensorboard", "matplotlib", "jinja2")


def module_name(path: Path) -> str:
    parts = ("vitcli", *path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path for path in sorted(SRC.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str, *, at_import: bool = False) -> list[str]:
    """Return the dotted names a module imports, `from a import b` as `a.b`; with `at_import` only those run by importing it."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: write the absolute name"
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(module))
    return found


def own_imports(module: str, *, at_import: bool = False) -> set[str]:
    """Return the modules of this package that a module imports."""
    result = set()
    for name in imports(module, at_import=at_import):
        if name.split(".")[0] != "vitcli":
            continue
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        result.add("vitcli.__init__" if name == "vitcli" else name)
    return result - {module}


def room(module: str) -> str:
    return module.split(".")[1]


def layer(module: str) -> int:
    found = [level for level, rooms in enumerate(LAYERS) if room(module) in rooms]
    assert found, f"{module}: a new room; give it a layer here and a line in the README's code tree"
    return found[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    for other in own_imports(module):
        same_room = room(other) == room(module)
        beside = layer(other) == layer(module) and room(module) not in LEAVES
        assert layer(other) < layer(module) or same_room or beside, f"{module} imports {other}, which is not below it"


def test_no_import_circles() -> None:
    remaining = {module: own_imports(module) for module in MODULES}
    while free := [module for module, others in remaining.items() if not others & remaining.keys()]:
        for module in free:
            del remaining[module]
    assert not remaining, f"these import each other in a circle: {sorted(remaining)}"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "vitcli.__init__" and room(m) in LEAVES])
def test_leaves_do_not_know_the_root_config(module: str) -> None:
    assert "vitcli.config.Config" not in imports(module), f"{module}: take your own section, not the whole Config"
    assert "vitcli.config" not in imports(module), f"{module}: import the section by name"


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is(module: str) -> None:
    docstring = ast.get_docstring(tree(module))
    assert docstring, f"{module} has no docstring"
    assert len(docstring.splitlines()) <= 10, f"{module}: a module docstring has at most 10 lines"


def test_no_rooms_for_leftovers() -> None:
    leftovers = {"utils", "util", "helpers", "common", "misc"}
    assert not [m for m in MODULES if leftovers & set(m.split("."))]


def test_command_line_imports_nothing_slow() -> None:
    reached, waiting = set(), {"vitcli.cli"}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        slow = [name for name in imports(module, at_import=True) if name.split(".")[0] in LAZY]
        assert not slow, f"{module} imports {slow} when the command line starts; import inside the command"
        waiting |= own_imports(module, at_import=True) - reached
    code = f"import sys, vitcli.cli; print(*(set(sys.modules) & set({LAZY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def sections() -> list[type[config.Section]]:
    return [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, config.Section)]


def settings() -> list[str]:
    return sorted(f"{kind.__name__}.{name}" for kind in sections() for name in kind.model_fields)


@cache
def attributes_read() -> frozenset[str]:
    """Return every `.name` read anywhere but where settings are only checked and carried."""
    readers = [module for module in MODULES if module != "vitcli.config_file"]
    return frozenset(
        node.attr
        for module in readers
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    )


@pytest.mark.parametrize("setting", settings())
def test_every_setting_is_read(setting: str) -> None:
    name = setting.partition(".")[2]
    assert name in attributes_read(), f"{setting}: nobody reads `.{name}`; a setting without effect is a bug"


def test_every_setting_is_described() -> None:
    bare = [
        f"{kind.__name__}.{name}"
        for kind in sections()
        for name, field in kind.model_fields.items()
        if not field.description and not (isinstance(field.annotation, type) and issubclass(field.annotation, config.Section))
    ]
    assert not bare, f"settings without a description: {bare}"
