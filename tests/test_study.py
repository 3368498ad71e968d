"""`vit study` from end to end: killed and gone on with, and what a terminal shows meanwhile."""

import hashlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.harness import vit, wait_until
from vitcli.study.cells import PLAIN, UPSTREAM, Cell, Measurement, Stage
from vitcli.study.table import Standing, last_step, open_view, summary_line

ROOT = Path(__file__).parents[1]
EVERY = 5  # steps between checkpoints
GRID = f"""
title: three tiny models
form: grid
base:
  data: {{source: digits, image_size: 8, workers: 0}}
  augment: {{crop: resize, flip: false}}
  train: {{batch_size: 16, precision: float32, tune: false}}
  log: {{sample_images: 0, log_every_steps: 1, checkpoint_every_steps: {EVERY}}}
families:
  narrow: {{model: {{patch_size: 4, width: 16, depth: 1, num_heads: 2}}}}
  deep: {{model: {{patch_size: 4, width: 16, depth: 2, num_heads: 2}}}}
  fine: {{model: {{patch_size: 2, width: 16, depth: 1, num_heads: 2}}}}
sizes: [100]
seeds: [0]
length: {{steps: 60}}
"""


def start(path: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vitcli", "study", "--config", str(path), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    with open(out.with_suffix(".txt"), "ab") as said:
        return subprocess.Popen(command, env=environment, start_new_session=True, stdout=said, stderr=said)


def digest(run: Path) -> str:
    weights = run / "checkpoints" / "step_00000060" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.slow  # three training runs, each in a process that imports torch
def test_a_kill_loses_the_unsaved_steps_of_one_cell(tmp_path: Path) -> None:
    path, out = tmp_path / "grid.yaml", tmp_path / "out"
    path.write_text(GRID)
    runs = [out / "cells" / PLAIN / family / "n000000100" / "s0" / "run" for family in ("narrow", "deep", "fine")]
    process = start(path, out)
    wait_until(lambda: last_step(runs[1]) >= 4 * EVERY or process.poll() is not None, "the second cell")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = last_step(runs[1])
    said = out.with_suffix(".txt").read_text()
    assert 4 * EVERY <= reached < 60, said
    manifest = (runs[0] / "manifest.json").read_bytes()
    assert (runs[0] / "summary.json").exists() and not runs[2].exists()
    assert start(path, out).wait(240) == 0, out.with_suffix(".txt").read_text()
    assert (runs[0] / "manifest.json").read_bytes() == manifest
    log = (out / "logs" / "cells-plain-deep-n000000100-s0.txt").read_text()
    found = re.search(r"resuming .* from step ([\d,]+)", log)
    assert found is not None and reached - int(found[1]) <= 2 * EVERY, log  # one save may have been under way
    for name in ("results.csv", "study.json", "study.md"):
        assert (out / name).stat().st_size > 0
    whole = vit("pretrain", "--config", str(runs[1].parent / "settings.yaml"), "--out", str(tmp_path / "whole"))
    assert whole.returncode == 0 and digest(tmp_path / "whole") == digest(runs[1])


def test_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = vit("study", "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 2 and "without torchrun" in done.stderr


# ---------------------------------------------------------------- the live table


def make_cell(out: Path, family: str, size: int, seed: int) -> Cell:
    folder = out / family / str(size) / str(seed)
    return Cell(PLAIN, family, size, seed, False, {}, folder, (Stage("pretrain", (), folder / "done"),), 10, 4, (), 1, 1, 3)


def standing(out: Path) -> Standing:
    cells = [make_cell(out, family, size, seed) for family in ("vit", "resnet") for size in (100, 1000) for seed in (0, 1)]
    values = [
        Measurement(PLAIN, cell.family, cell.examples, cell.seed, UPSTREAM, 0.5 + 0.1 * cell.seed, 100, 100, 1.0)
        for cell in cells[:3]
    ]
    running = cells[4]
    running.run.mkdir(parents=True)
    (running.folder / ".holder").touch()
    (running.run / "metrics.jsonl").write_text('{"kind": "train", "step": 7}\n{"kind": "tr')
    over = frozenset(cell.folder for cell in cells[:3])
    return Standing(cells, over, frozenset([cells[7].folder]), values, (100, 1000), ("fewshot:x:5", UPSTREAM), 60.0, 360.0)


def test_the_live_table(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    with open_view(lambda text: None, console=console) as view:
        view.show(standing(tmp_path))
        view.say("a line above [it]")
    shown = stream.getvalue()
    assert "upstream, %" in shown and "a line above [it]" in shown
    lines = [line for line in shown.splitlines() if "vit" in line and "plain" in line]
    assert "55.0" in lines[0] and "50.0 1/2" in lines[0]  # two seeds, and one of two
    assert "0/2!" in shown  # a failed one
    assert "plain / resnet / n=100 / seed 0  pretrain  step 7 of 10" in shown
    assert "3 of 8 cells done, 1 failed, 01:00 so far, about 01:20 to go" in shown


def test_without_a_terminal_there_are_lines(tmp_path: Path) -> None:
    said: list[str] = []
    with open_view(said.append, console=Console(file=io.StringIO())) as view:
        view.show(standing(tmp_path))
        view.say("a line")
    assert said == ["a line"] and not view.is_live


def test_nothing_is_said_of_the_rest_before_anything_has_ended(tmp_path: Path) -> None:
    first = standing(tmp_path)
    assert "to go" not in summary_line(Standing(**{**vars(first), "operations": 0.0}))
    assert last_step(tmp_path) == 0
