"""The command line as a user meets it: help, version, and one line with exit code 2 for every bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.harness import Result, vit
from vitcli.checkpoint import load_weights_file

TINY = """
model: {patch_size: 8, width: 32, depth: 1, num_heads: 2}
data: {source: shapes, image_size: 16, shapes: {classes: 3, train_examples: 60, val_examples: 30}}
train: {steps: 4, batch_size: 8}
"""


def fails_with(result: Result, *said: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    for words in said:
        assert words in last


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(TINY)
    result = vit("pretrain", "--config", "tiny.yaml", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_version_and_help() -> None:
    assert vit("--version").stdout.startswith("vit ")
    for command in (["pretrain"], ["finetune"], ["eval"], ["data", "preview"], ["schema"]):
        result = vit(*command, "--help")
        assert result.returncode == 0
        assert "Example: vit" in result.stdout


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, vitcli.cli; print(sorted({'torch', 'numpy', 'pydantic', 'yaml', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_json_schema_lists_the_settings() -> None:
    schema = json.loads(vit("schema", "--json").stdout)
    assert schema["$defs"]["OptimConfig"]["additionalProperties"] is False
    assert "optim.weight_decay" in vit("schema").stdout


def test_a_finished_run_says_so_and_changes_nothing(trained: Path) -> None:
    run = trained / "runs" / "tiny"
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} == {
        "config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "predictions",
    }  # fmt: skip
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    result = vit("pretrain", "--config", "tiny.yaml", cwd=trained)
    assert result.returncode == 0
    assert "is finished: top-1" in result.stdout
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_another_config_for_the_same_run_is_refused_with_the_differing_keys(trained: Path) -> None:
    result = vit("pretrain", "--config", "tiny.yaml", "optim.lr=0.5", "seed=9", cwd=trained)
    fails_with(result, "runs/tiny: this run has another config", "optim.lr (0.001 there, 0.5 now)", "seed (0 there, 9 now)")


def test_settings_that_change_no_result_may_change(trained: Path) -> None:
    assert vit("pretrain", "--config", "tiny.yaml", "data.workers=1", "log.keep_checkpoints=5", cwd=trained).returncode == 0


def test_eval_counts_every_image_once_and_prints_json(trained: Path) -> None:
    result = json.loads(vit("eval", "--ckpt", "runs/tiny", "--json", "--batch-size", "7", cwd=trained).stdout)
    assert result["examples"] == 30
    assert sum(row["examples"] for row in result["per_class"]) == 30
    assert sum(row["correct"] for row in result["per_class"]) == result["correct"] == round(30 * result["top1"])
    summary = json.loads((trained / "runs" / "tiny" / "summary.json").read_text())
    assert (summary["top1"], summary["correct"]) == (result["top1"], result["correct"])
    assert "top-1" in vit("eval", "--ckpt", "runs/tiny", cwd=trained).stdout


def test_a_weights_file_and_a_checkpoint_directory_evaluate_as_the_run_does(trained: Path) -> None:
    step = "runs/tiny/checkpoints/step_00000004"
    results = [
        json.loads(vit("eval", "--ckpt", p, "--json", cwd=trained).stdout)
        for p in ("runs/tiny", step, f"{step}/model.safetensors")
    ]
    assert len({(r["top1"], round(r["loss"], 9)) for r in results}) == 1


def test_dry_run_prints_the_plan_and_writes_nothing(trained: Path) -> None:
    result = vit("pretrain", "--config", "tiny.yaml", "--out", "runs/planned", "--dry-run", cwd=trained)
    assert result.returncode == 0, result.stderr
    for word in (
        "parameters",
        "FLOPs",
        "epochs",
        "lr ",
        "memory",
        "60 training and 30 evaluation images",
        "start       scratch",
    ):
        assert word in result.stdout
    assert not (trained / "runs" / "planned").exists()


def test_finetune_on_a_folder_at_a_higher_non_square_resolution(trained: Path) -> None:
    for number in range(24):
        for name in ("dark", "light"):
            path = trained / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20 + number, 30), 40 if name == "dark" else 210).save(path)
    words = ("finetune", "--ckpt", "runs/tiny", "--dataset", "folder:photos", "data.image_size=[32,24]", "train.steps=6")
    result = vit(*words, cwd=trained)
    assert result.returncode == 0, result.stderr
    assert "resized: pos_embed 2x2 -> 4x3" in result.stdout
    assert "new: head" in result.stdout
    evaluation = json.loads(vit("eval", "--ckpt", "runs/tiny-photos", "--json", cwd=trained).stdout)
    assert [row["class"] for row in evaluation["per_class"]] == ["dark", "light"]
    fails_with(
        vit("eval", "--ckpt", "runs/tiny", "--dataset", "folder:photos", cwd=trained),
        "folder:photos",
        "fine-tune it on this first",
    )


def test_the_linear_probe_leaves_the_backbone_alone(trained: Path) -> None:
    words = (
        "finetune",
        "--ckpt",
        "runs/tiny",
        "--dataset",
        "digits",
        "train.steps=3",
        "train.freeze_backbone=true",
        "--out",
        "runs/probe",
    )
    result = vit(*words, cwd=trained)
    assert result.returncode == 0, result.stderr
    before, after = load_weights_file(trained / "runs" / "tiny").state, load_weights_file(trained / "runs" / "probe").state
    changed = {name for name in after if name not in before or not after[name].equal(before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_preview_writes_a_contact_sheet(trained: Path) -> None:
    for source in ("shapes", "digits"):
        result = vit("data", "preview", source, "--out", f"{source}.png", "--rows", "3", "--columns", "4", cwd=trained)
        assert result.returncode == 0, result.stderr
        with Image.open(trained / f"{source}.png") as sheet:
            assert min(sheet.size) > 100


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain", "--config", "nowhere.yaml"], ["nowhere.yaml: there is no such config file"]),
        (
            ["pretrain", "--config", "tiny.yaml", "--out", "runs/x", "optim.lrr=1"],
            ["optim.lrr is not a setting; did you mean optim.lr?"],
        ),
        (["pretrain", "--config", "tiny.yaml", "--out", "runs/x", "data.source=cifar11"], ["cifar11"]),
        (["pretrain", "--config", "tiny.yaml", "--out", "runs/x", "data.source=folder:nowhere"], ["nowhere"]),
        (["pretrain", "--config", "tiny.yaml", "--out", "runs/x", "train.device=cuda"], ["torch sees no GPU"]),
        (["finetune", "--ckpt", "nowhere", "--dataset", "digits"], ["nowhere"]),
        (["finetune", "--ckpt", "tiny.yaml", "--dataset", "digits"], ["tiny.yaml"]),
        (["finetune", "--ckpt", "runs/tiny", "--dataset", "digits", "model.width=64"], ["model.width is 64", "has 32"]),
        (
            ["finetune", "--ckpt", "runs/tiny", "--dataset", "digits", "data.source=mnist"],
            ["data.source is mnist, but --dataset is digits"],
        ),
        (["eval", "--ckpt", "runs/tiny", "--dataset", "digits"], ["digits", "fine-tune it on this first"]),
        (["data", "preview", "folder:nowhere"], ["nowhere"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(trained: Path, words: list[str], said: list[str]) -> None:
    if "train.device=cuda" in words and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    fails_with(vit(*words, cwd=trained), *said)
    assert not (trained / "runs" / "x" / "checkpoints").exists()


def test_debug_adds_the_traceback_and_keeps_the_exit_code(trained: Path) -> None:
    result = vit("pretrain", "--config", "nowhere.yaml", "--debug", cwd=trained)
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def test_a_run_that_failed_before_its_first_checkpoint_does_not_bind_the_corrected_command(trained: Path) -> None:
    words = ("finetune", "--ckpt", "runs/tiny", "--dataset", "digits", "train.steps=2", "--out", "runs/early")
    assert vit(*words, "seed=5", cwd=trained).returncode == 0
    early = trained / "runs" / "early"
    shutil.rmtree(early / "checkpoints")  # as one leaves it that had no memory for its first step
    (early / "summary.json").unlink()
    assert vit(*words, cwd=trained).returncode == 0


def test_settings_that_options_decide_are_refused(trained: Path) -> None:
    words = ("finetune", "--ckpt", "runs/tiny", "--dataset", "digits", "--out", "runs/y")
    fails_with(vit(*words, "from_scratch=true", cwd=trained), "given by --ckpt and --from-scratch")
    fails_with(vit(*words, "--from-scratch", "train.freeze_backbone=true", cwd=trained), "keeps random weights")


def test_dry_run_of_fine_tuning_says_what_would_be_loaded(trained: Path) -> None:
    words = ("finetune", "--ckpt", "runs/tiny", "--dataset", "digits", "--out", "runs/z", "--dry-run")
    assert "20 tensors: 18 taken, 2 new: head" in vit(*words, cwd=trained).stdout
    fails_with(vit(*words, "model.pool=gap", cwd=trained), 'model.pool is "gap", but the checkpoint runs/tiny has "token"')


def test_the_module_runs_as_a_program(trained: Path) -> None:
    words = [sys.executable, "-m", "vitcli", "pretrain", "--config", "nowhere.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=trained, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "vit: nowhere.yaml: there is no such config file\n"


def test_a_directory_with_other_files_is_not_written_to(trained: Path) -> None:
    (trained / "runs" / "mine").mkdir()
    (trained / "runs" / "mine" / "thesis.tex").write_text("precious")
    fails_with(
        vit("pretrain", "--config", "tiny.yaml", "--out", "runs/mine", cwd=trained), "holds files but no run (thesis.tex"
    )
    assert [p.name for p in (trained / "runs" / "mine").iterdir()] == ["thesis.tex"]
