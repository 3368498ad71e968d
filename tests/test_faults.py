"""Whatever happens to a run, and whenever: the same command goes on and ends with the same bytes as if nothing had.

Each fault comes at moments that a seed draws; a table of all of them is printed at the end. Steps trained again are what a
fault costs: those since the last checkpoint, or none where the run could still save.
"""

import contextlib
import ctypes
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Attempt, Run, wait_until

pytestmark = pytest.mark.slow

SEED = 20261122
STEPS, EVERY = 80, 5  # steps of a run, and between checkpoints
CONFIG = f"""
seed: 3
model: {{patch_size: 8, width: 32, depth: 2, num_heads: 2, dropout: 0.1}}
data: {{source: shapes, image_size: 32, workers: 0, shapes: {{classes: 5, train_examples: 500, val_examples: 64}}}}
augment: {{crop: inception, min_area: 0.3, mixup: 0.2, cutmix: 1.0}}
optim: {{lr: 3e-3, weight_decay: 0.1}}
train: {{steps: {STEPS}, batch_size: 24, micro_batch_size: 10, ema_decay: 0.9, precision: float32}}
log: {{log_every_steps: 1, eval_every_steps: 20, checkpoint_every_steps: {EVERY}, keep_checkpoints: 3}}
"""
FIRST_STEP = re.compile(rf"^step \d+/{STEPS} ", re.MULTILINE)
FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt", "manifest.json")


class Tally:
    """What was done to runs, how often, and what it cost."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}  # fault: times, most steps trained again

    def count(self, fault: str, *, repeated: int) -> None:
        row = self.rows.setdefault(fault, [0, 0])
        row[0] += 1
        row[1] = max(row[1], repeated)

    def table(self) -> list[str]:
        lines = [f"{'fault':<48} {'times':>5}  {'most steps trained again':>24}"]
        lines += [f"{fault:<48} {times:>5}  {repeated:>24}" for fault, (times, repeated) in self.rows.items()]
        total = sum(times for times, _ in self.rows.values())
        return [*lines, f"{total} faults, seed {SEED}; every run ended with the bytes of the uninterrupted one"]


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    result = Tally()
    yield result
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and result.rows:
        reporter.write_line("")
        for line in result.table():
            reporter.write_line(line)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("uninterrupted"), CONFIG)
    attempt = run.start()
    assert attempt.end() == 0, attempt.text()
    return run


class Victim(Run):
    """A run that faults are tried on."""

    def __init__(self, folder: Path, uninterrupted: Run, tally: Tally, *, out: Path | None = None) -> None:
        super().__init__(folder, CONFIG, out=out)
        self.uninterrupted = uninterrupted
        self.tally = tally
        self.pending: list[tuple[str, int]] = []  # faults since the last start, and the step each came after

    def hurt(self, fault: str) -> None:
        """Note that a fault has just ended, or been survived by, the run."""
        self.pending.append((fault, self.last_step()))

    def saving(self) -> bool:
        """Tell whether a checkpoint is being written."""
        return any((self.out / "checkpoints").glob(".tmp-step_*"))

    def settle(self, attempt: Attempt) -> None:
        """Count the faults that a new start has overcome."""
        for fault, step in self.pending:
            self.tally.count(fault, repeated=max(0, step - attempt.resumed_at))
        self.pending.clear()

    def go_on(self, step: int, *overrides: str, **how: Any) -> Attempt:
        """Start, and return after a step that is this one or later and was made now."""
        attempt = self.start(*overrides, **how)
        wait_until(lambda: FIRST_STEP.search(attempt.text()) or not attempt.running(), "a first step")
        self.wait_for(attempt, step)
        assert attempt.running(), attempt.text()
        self.settle(attempt)
        return attempt

    def finish(self) -> Attempt:
        """Give the command a last time; it must end as the uninterrupted run did, byte for byte."""
        attempt = self.start()
        assert attempt.end() == 0, attempt.text()
        self.settle(attempt)
        assert self.digests(STEPS) == self.uninterrupted.digests(STEPS)
        assert self.rows() == self.uninterrupted.rows()
        assert not list(self.out.rglob(".tmp-*"))
        return attempt


@pytest.fixture
def victim(tmp_path: Path, uninterrupted: Run, tally: Tally) -> Iterator[Victim]:
    run = Victim(tmp_path, uninterrupted, tally)
    yield run
    for attempt in run.attempts:
        if attempt.running():
            os.killpg(attempt.process.pid, signal.SIGKILL)
            attempt.end()


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{SEED} {request.node.name}")


def moments(chance: random.Random, times: int, *, first: int = 2) -> list[int]:
    """Draw steps, early enough for the run not to end before it is hurt."""
    return sorted(chance.sample(range(first, STEPS - 20), times))


def failed(attempt: Attempt, *said: str) -> None:
    """Check that a run gave up as it should: exit code 2, and one line that says why."""
    assert attempt.end() == 2, attempt.text()
    assert "Traceback" not in attempt.text(), attempt.text()
    last = attempt.text().strip().splitlines()[-1]
    assert last.startswith("vit: "), last
    assert any(words in last for words in said), last


# ---------------------------------------------------------------- signals


def test_sigkill_at_any_moment(victim: Victim, chance: random.Random) -> None:
    attempt = victim.start()
    time.sleep(chance.uniform(0.05, 3.0))  # while it starts
    attempt.process.kill()
    attempt.end()
    victim.hurt("SIGKILL while starting")
    for number, step in enumerate(moments(chance, 5)):
        attempt = victim.go_on(step, f"data.workers={number % 3}")
        time.sleep(chance.random() * 0.03)
        attempt.process.kill()
        assert attempt.end() == -signal.SIGKILL
        victim.hurt("SIGKILL")
    victim.finish()


def test_sigkill_while_a_checkpoint_is_written(victim: Victim, chance: random.Random) -> None:
    for step in moments(chance, 4):
        attempt = victim.go_on(step)
        wait_until(victim.saving, "a checkpoint", pause=0.0)
        time.sleep(chance.random() * 0.01)
        attempt.process.kill()
        attempt.end()
        victim.hurt("SIGKILL while saving")
    victim.finish()


@pytest.mark.parametrize(("signum", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_stop_signal_loses_no_step(victim: Victim, chance: random.Random, signum: int, name: str) -> None:
    for number, step in enumerate(moments(chance, 3)):
        attempt = victim.go_on(step, f"data.workers={2 * (number % 2)}")
        time.sleep(chance.random() * 0.03)
        if signum == signal.SIGINT:  # a terminal sends it to every process of the run
            os.killpg(attempt.process.pid, signum)
        else:
            attempt.process.send_signal(signum)
        assert attempt.end() == 128 + signum, attempt.text()
        assert "Traceback" not in attempt.text(), attempt.text()
        victim.hurt(name)
        assert victim.checkpoints()[-1].name == f"step_{victim.last_step():08d}"
    victim.finish()
    assert victim.tally.rows[name][1] == 0


@pytest.mark.parametrize(
    ("signum", "name"), [(signal.SIGTERM, "SIGTERM twice in a row"), (signal.SIGINT, "Ctrl-C twice in a row")]
)
def test_an_impatient_second_signal_costs_nothing(victim: Victim, chance: random.Random, signum: int, name: str) -> None:
    for step in moments(chance, 3):
        attempt = victim.go_on(step)
        os.killpg(attempt.process.pid, signum)
        time.sleep(chance.random() * 0.06)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(attempt.process.pid, signum)
        assert attempt.end() == 128 + signum, attempt.text()
        assert "Traceback" not in attempt.text(), attempt.text()
        victim.hurt(name)
        assert victim.checkpoints()[-1].name == f"step_{victim.last_step():08d}"
    victim.finish()
    assert victim.tally.rows[name][1] == 0


def test_stopped_and_continued(victim: Victim, chance: random.Random) -> None:
    for step in moments(chance, 2):
        attempt = victim.go_on(step)
        attempt.process.send_signal(signal.SIGSTOP)
        time.sleep(chance.random())
        attempt.process.send_signal(signal.SIGCONT)
        time.sleep(chance.random() * 0.1)
        attempt.process.kill()
        attempt.end()
        victim.hurt("SIGSTOP, SIGCONT, then SIGKILL")
    victim.finish()


def test_a_loader_process_that_is_killed(victim: Victim, chance: random.Random) -> None:
    for step in moments(chance, 2):
        attempt = victim.go_on(step, "data.workers=2")
        children = Path(f"/proc/{attempt.process.pid}/task/{attempt.process.pid}/children").read_text().split()
        assert children, attempt.text()
        os.kill(int(chance.choice(children)), signal.SIGKILL)
        assert attempt.end() != 0 or victim.last_step() == STEPS, attempt.text()
        victim.hurt("SIGKILL of a loader process")
    victim.finish()


# ---------------------------------------------------------------- crashes between write and rename

CRASH = """
import os, re, signal
def crashing(real, seen=[0]):
    def move(source, target, **places):
        hit = re.search({pattern!r}, f"{{source}} > {{target}}") is not None
        seen[0] += hit
        if hit and seen[0] == {nth} and {early}:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target, **places)
        if hit and seen[0] == {nth}:
            os.kill(os.getpid(), signal.SIGKILL)
    return move
os.rename, os.replace = crashing(os.rename), crashing(os.replace)
"""


def test_a_crash_between_write_and_rename(victim: Victim, chance: random.Random) -> None:
    places = [r"> .*/config\.yaml$", r"> .*/manifest\.json$"]
    places += 4 * [r"> .*/step_\d+$"] + 2 * [r"/step_\d+ > "] + [r"> .*/summary\.json$"]
    for number, pattern in enumerate(places):
        early = number % 2 == 0
        nth = chance.randint(1, 2) if "step_" in pattern else 1
        attempt = victim.start(patch=CRASH.format(pattern=pattern, nth=nth, early=early))
        assert attempt.end() == -signal.SIGKILL, (pattern, nth, attempt.text())
        victim.settle(attempt)
        victim.hurt(f"crash just {'before' if early else 'after'} a rename")
    victim.finish()


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "vit-test", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root may mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path, uninterrupted: Run, tally: Tally, chance: random.Random) -> None:
    victim = Victim(tmp_path, uninterrupted, tally, out=small_disk / "run")
    for step in moments(chance, 4):
        attempt = victim.go_on(step)
        spare = chance.choice([0, 0, 4096, chance.randrange(200_000)])
        filler = small_disk / "filler"
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(65536))
        os.truncate(filler, max(0, filler.stat().st_size - spare))
        failed(attempt, "No space left on device")
        filler.unlink()
        victim.hurt("disk full (tmpfs)")
    victim.finish()


def test_files_may_not_grow(victim: Victim, chance: random.Random) -> None:
    largest = max((victim.uninterrupted.out / "checkpoints" / f"step_{STEPS:08d}" / name).stat().st_size for name in FILES)
    for step in moments(chance, 3):
        victim.go_on(step).process.kill()
        victim.attempts[-1].end()
        limit = chance.randrange(largest // 2, largest)
        attempt = victim.start(before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
        failed(attempt, "File too large")
        victim.hurt("file size limit (RLIMIT_FSIZE)")
    victim.finish()


def obey_permissions() -> None:
    """Make root a user like others in the program that is started next: PR_SET_SECUREBITS, SECBIT_NOROOT."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None, use_errno=True).prctl(28, 1, 0, 0, 0) == 0


def test_a_read_only_run_directory(victim: Victim, chance: random.Random) -> None:
    folders: list[Callable[[], Path]] = [lambda: victim.out, lambda: victim.out / "checkpoints"]
    for folder, step in zip(2 * folders, moments(chance, 4, first=EVERY + 1)):
        attempt = victim.go_on(step, before=obey_permissions)
        place = folder()
        place.chmod(0o555)
        try:
            if place == victim.out:  # open files go on; the next start needs new ones
                attempt.process.kill()
                attempt.end()
                attempt = victim.start(before=obey_permissions)
            failed(attempt, "Permission denied")
        finally:
            place.chmod(0o755)
        victim.hurt("read-only run directory" if place == victim.out else "read-only checkpoints directory")
    victim.finish()


# ---------------------------------------------------------------- damaged checkpoints


def damage(path: Path, chance: random.Random, *, flip: bool) -> None:
    """Flip one bit of a file, or cut it short."""
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    if flip:
        content[place] ^= 1 << chance.randrange(8)
    else:
        del content[place:]
    path.write_bytes(content)


@pytest.mark.parametrize("flip", [True, False])
def test_a_damaged_checkpoint_is_passed_over(victim: Victim, chance: random.Random, flip: bool) -> None:
    fault = "bit flipped in a checkpoint" if flip else "checkpoint file truncated"
    for step, name in zip(moments(chance, 4, first=2 * EVERY + 1), FILES, strict=True):
        attempt = victim.go_on(step)
        attempt.process.kill()
        attempt.end()
        newest, earlier = victim.checkpoints()[-1], victim.checkpoints()[:-1]
        damage(newest / name, chance, flip=flip)
        victim.hurt(fault)
        attempt = victim.go_on(int(earlier[-1].name[5:]) + 1) if earlier else victim.go_on(1)
        attempt.process.kill()
        attempt.end()
        assert re.search(f"warning: .*{newest.name}.* falling back to the checkpoint before", attempt.text()), attempt.text()
        assert attempt.resumed_at == (int(earlier[-1].name[5:]) if earlier else 0)
        victim.hurt("SIGKILL")
    victim.finish()


def test_all_checkpoints_damaged(victim: Victim, chance: random.Random) -> None:
    attempt = victim.go_on(moments(chance, 1, first=2 * EVERY + 1)[0])
    attempt.process.kill()
    attempt.end()
    for checkpoint in victim.checkpoints():
        damage(checkpoint / chance.choice(FILES), chance, flip=chance.random() < 0.5)
    victim.hurt("every checkpoint damaged")
    attempt = victim.finish()
    assert attempt.resumed_at == 0


# ---------------------------------------------------------------- clocks and rivals

CLOCK = """
import random, time
real, chance, offset = time.time, random.Random({seed}), [0.0]
def jumping():
    if chance.random() < 0.2:
        offset[0] = chance.choice([-real(), -3.2e8, -3600.0, 3600.0, 3.2e8])
    return max(0.0, real() + offset[0])
time.time = jumping
time.time_ns = lambda: int(jumping() * 1e9)
"""


def test_clock_jumps(victim: Victim, chance: random.Random) -> None:
    folder = victim.folder / "clock"
    folder.mkdir()
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    for step in moments(chance, 3):
        (folder / "sitecustomize.py").write_text(CLOCK.format(seed=chance.randrange(1000)))
        attempt = victim.go_on(step, environment={"PYTHONPATH": paths})
        attempt.process.send_signal(chance.choice([signal.SIGTERM, signal.SIGKILL]))
        assert attempt.end() != 0
        for path in victim.out.rglob("*"):  # as if written in another century
            os.utime(path, (0, 0) if chance.random() < 0.5 else (4e9, 4e9))
        victim.hurt("clock jumps by hours and years")
    victim.finish()


def test_a_second_process_is_refused_and_does_no_harm(victim: Victim, chance: random.Random) -> None:
    for step in moments(chance, 2):
        attempt = victim.go_on(step)
        attempt.process.send_signal(signal.SIGSTOP)  # so that the run does not end before its rival begins
        failed(victim.start(), "another process")
        attempt.process.send_signal(signal.SIGCONT)
        attempt.process.send_signal(signal.SIGTERM)
        assert attempt.end() == 128 + signal.SIGTERM, attempt.text()
        victim.hurt("a second process on the same directory")
    victim.finish()
