"""Commands run side by side as processes: a place for each, a file for what it prints, and why it failed.

What `vit sweep` and `vit study` share. A process here is another `vit`, which saves its work when it is told to end.
"""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Child", "begin", "end_all", "is_held", "reason_of", "slots_of"]


@dataclass(frozen=True)
class Child:
    """A process that was started here."""

    process: subprocess.Popen[bytes]
    log: Path  # what it prints
    log_start: int  # bytes of what others printed before
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Return how long ago it was started."""
        return time.monotonic() - self.started

    def reason(self) -> str:
        """Return why it failed, once it has ended."""
        return reason_of(self.process.returncode, self.log, self.log_start)


def slots_of(jobs: int | None, device: "torch.device") -> list[dict[str, str]]:
    """Return the environment of each place for a process: a GPU of its own, or its share of the CPU's cores.

    Args:
        jobs: processes at a time; None for as many as there are GPUs, or one.
    """
    if device.type == "cuda":
        import torch

        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
        return [{"CUDA_VISIBLE_DEVICES": visible[place % len(visible)]} for place in range(jobs or len(visible))]
    jobs = jobs or 1
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{}] * jobs
    return [{"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}] * jobs


def begin(
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str],
    output: Path | None = None,
    inherited: Sequence[int] = (),
) -> Child:
    """Start a process; what it prints goes behind what `log` holds.

    Args:
        environment: on top of this process's.
        output: takes what it prints on stdout instead, from its beginning.
        inherited: file descriptors that it keeps open.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        file = stack.enter_context(open(log, "ab"))
        start = file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file if output is None else stack.enter_context(open(output, "wb")),
            stderr=file,
            env={**os.environ, **environment},
            pass_fds=inherited,
        )
    return Child(process, log, start)


def end_all(children: Collection[Child]) -> None:
    """Tell all to end, and wait until they have saved and done so."""
    for child in children:
        with suppress(ProcessLookupError):
            child.process.terminate()
    for child in children:
        child.process.wait()


def reason_of(code: int, log: Path, start: int) -> str:
    """Return why a process failed, in one line: its own error message, else the last line it printed."""
    if code < 0:
        memory = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{memory}"
    with open(log, "rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("vit: ") for line in lines if line.startswith("vit: ")]
    return (own or lines or [f"exit code {code}"])[-1]


def is_held(run_dir: Path) -> bool:
    """Tell whether a process is writing to a run directory, holding `rundir.lock_run`."""
    try:
        descriptor = os.open(run_dir / ".lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who ask do not meet
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
