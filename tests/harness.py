"""How tests run `vit`: a command in this process, or a training run in one of its own, to be hurt and started again."""

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcli.cli import main

SECONDS = 240.0  # that any wait may take, on a machine busy with other tests


@dataclass(frozen=True)
class Result:
    """What a command printed and how it ended."""

    returncode: int
    stdout: str
    stderr: str


def vit(*words: str, cwd: Path | None = None) -> Result:
    """Run a command in this process, as the script does: importing torch anew for each would take most of the time."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["vit", *words]
    try:
        with contextlib.chdir(cwd or Path.cwd()), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return Result(code, out.getvalue(), err.getvalue())


def wait_until(condition: Callable[[], object], what: str, *, pause: float = 0.002) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(pause)


class Attempt:
    """A started training run; its output goes to a file, so that nobody has to read it for the run to go on."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self.output = output

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def running(self) -> bool:
        return self.process.poll() is None

    def end(self) -> int:
        """Wait for it and return its exit code; negative for a signal."""
        return self.process.wait(SECONDS)

    @property
    def resumed_at(self) -> int:
        """The step it went on from."""
        found = re.search(r"resuming .* from step ([\d,]+)", self.text())
        return int(found[1].replace(",", "")) if found else 0


class Run:
    """A run directory and the command that fills it, to be given as often as it takes."""

    def __init__(self, folder: Path, config: str, *, out: Path | None = None) -> None:
        self.folder = folder
        self.config = folder / "tiny.yaml"
        self.config.write_text(config)
        self.out = out or folder / "run"
        self.attempts: list[Attempt] = []

    def start(
        self,
        *overrides: str,
        patch: str = "",
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> Attempt:
        """Give the command, in a process group of its own.

        Args:
            overrides: that change no result.
            patch: Python code to run first.
            environment: on top of this process's.
            before: called in the new process.
        """
        program = ["-c", f"{patch}\nfrom vitcli.cli import main\nmain()"] if patch else ["-m", "vitcli"]
        words = ["pretrain", "--config", str(self.config), "--out", str(self.out), *overrides]
        output = self.folder / f"output-{len(self.attempts)}.txt"
        caches = {"VIT_CACHE": str(self.folder / "cache"), "VIT_DATA": str(self.folder / "data"), "OMP_NUM_THREADS": "1"}
        with open(output, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, *program, *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **caches, **(environment or {})},
                start_new_session=True,
                preexec_fn=before,
            )
        self.attempts.append(Attempt(process, output))
        return self.attempts[-1]

    def last_step(self) -> int:
        """Return the last step in metrics.jsonl; 0 while there is none."""
        with contextlib.suppress(OSError):
            for line in reversed((self.out / "metrics.jsonl").read_text().splitlines()):
                if line.endswith("}"):
                    return int(json.loads(line)["step"])
        return 0

    def wait_for(self, attempt: Attempt, step: int) -> None:
        """Return once the run has logged a step; fail if it ends before."""
        wait_until(lambda: self.last_step() >= step or not attempt.running(), f"step {step}")
        assert self.last_step() >= step, f"ended before step {step}: {attempt.text()}"

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint directories, oldest first."""
        return sorted((self.out / "checkpoints").glob("step_*"))

    def digests(self, step: int) -> dict[str, str]:
        """Return the SHA-256 of what a checkpoint holds, weights and optimiser."""
        folder = self.out / "checkpoints" / f"step_{step:08d}"
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.iterdir())
            if path.name != "manifest.json"
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return what was logged, without what depends on the clock."""
        timed = ("images_per_second", "seconds")
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]
