"""The launch scripts: what they would run, and, with stand-ins for ssh and SLURM on this machine, that they run it."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

SCRIPTS = Path(__file__).parents[1] / "scripts"
NODES, SLURM = SCRIPTS / "launch_nodes.sh", SCRIPTS / "launch_slurm.sh"
WORDS = ("pretrain", "--config", "a b.yaml", "data.mean=[0.5,0.5,0.5]")
CONFIG = """
model: {patch_size: 4, width: 32, depth: 2, num_heads: 2}
data: {source: digits, image_size: 16}
train: {steps: 400, batch_size: 24, precision: float32, tune: false}
log: {log_every_steps: 1, eval_every_steps: 400, checkpoint_every_steps: 100}
"""


def run(script: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        ["bash", str(script), *words], capture_output=True, text=True, timeout=60, env={**clean, **environment}
    )


def assert_launches(command: list[str], *, nodes: int, endpoint: str, processes: str = "gpu") -> None:
    """Let torchrun read the words itself, with its own names for its options."""
    launch = get_args_parser().parse_args(command[command.index("torch.distributed.run") + 1 :])
    assert (launch.nnodes, launch.nproc_per_node, launch.max_restarts) == (str(nodes), processes, 3)
    assert (launch.rdzv_backend, launch.rdzv_endpoint) == ("c10d", endpoint)
    assert launch.rdzv_id != "none"
    assert (launch.module, launch.training_script) == (True, "vitcli")
    assert tuple(launch.training_script_args) == WORDS


def test_what_each_host_would_run() -> None:
    made = run(NODES, "--dry-run", "node1,node2,node3", *WORDS, PYTHON="/opt/my python")
    assert made.returncode == 0, made.stderr
    commands = [shlex.split(line) for line in made.stdout.splitlines()]
    assert [(words[0], words[1]) for words in commands] == [("ssh", f"node{number}") for number in (1, 2, 3)]
    numbers = set()
    for _, _, remote in commands:
        folder, number, torchrun = remote.split(" && ")
        assert shlex.split(folder) == ["cd", os.getcwd()]
        numbers.add(number)
        words = shlex.split(torchrun)
        assert words[:4] == ["exec", "/opt/my python", "-m", "torch.distributed.run"]
        assert_launches(words, nodes=3, endpoint="node1:29500")
    assert len(numbers) == 3


def test_what_slurm_would_run() -> None:
    made = run(SLURM, "--dry-run", *WORDS, NPROC="4", PORT="29600")
    assert made.returncode == 0, made.stderr
    words = shlex.split(made.stdout)
    assert words[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(words)
    assert_launches(words, nodes=2, endpoint="node1:29600", processes="4")


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (NODES, (), "expected hosts and a vit command"),
        (NODES, ("node1,node2",), "expected hosts and a vit command"),
        (SLURM, ("--dry-run",), "expected a vit command"),
        (SLURM, WORDS, "not a SLURM job; start it with sbatch, or give --dry-run first"),
    ],
)
def test_what_is_missing_is_said(script: Path, words: tuple[str, ...], said: str) -> None:
    made = run(script, *words)
    assert (made.returncode, made.stdout) == (2, "")
    assert said in made.stderr


@pytest.mark.parametrize("script", [NODES, SLURM])
def test_shellcheck_finds_nothing(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    made = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout


# ---------------------------------------------------------------- stand-ins


STAND_INS = {
    "ssh": 'exec bash -c "${!#}"',  # the last word is the command
    "srun": 'while [[ $1 == --* ]]; do shift; done; echo $$ >"$STEP"; exec "$@"',
    "scancel": 'kill -TERM "$(cat "$STEP")"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >>"$STEP.requeued"; fi',
}


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-ins in front of PATH and return a folder with a config."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PORT": str(port),
        "STEP": str(tmp_path / "step"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def start(folder: Path, script: Path, *words: str) -> subprocess.Popen[str]:
    command = ["bash", str(script), *words, "pretrain", "--config", str(folder / "tiny.yaml"), "--out", str(folder / "run")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        if process.poll() is not None:
            pytest.fail(f"ended before step {step}: {process.communicate()[0]}")
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finished(folder: Path) -> bool:
    return json.loads((folder / "run" / "summary.json").read_text())["step"] == 400


@pytest.mark.slow
def test_two_hosts_train_stop_and_go_on(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "1")
    process = start(stage, NODES, "localhost,localhost")
    wait_for(process, stage, 20)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "saved; the same command goes on from there" in output
    process = start(stage, NODES, "localhost,localhost")
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    assert "resuming" in output
    assert "processes   2, ddp" not in output  # the plan is for the first start
    assert finished(stage)
    assert not list(Path("/tmp").glob(f"vit-{process.pid}-*"))


@pytest.mark.slow
def test_a_job_out_of_time_saves_and_goes_back_to_the_queue(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "2")
    process = start(stage, SLURM)
    wait_for(process, stage, 20)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "saved; the same command goes on from there" in output
    assert (stage / "step.requeued").read_text() == "requeue 4711\n"
    process = start(stage, SLURM)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    assert finished(stage)
    assert (stage / "step.requeued").read_text() == "requeue 4711\n"
