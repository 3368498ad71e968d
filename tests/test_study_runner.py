"""Working through cells: each once, whoever is killed, whoever else is at it. Stages are shell commands of milliseconds."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.harness import wait_until
from vitcli.errors import Interrupted, UserError
from vitcli.interrupts import StopSignals
from vitcli.rundir import read_json
from vitcli.study import claims, runner
from vitcli.study.cells import PLAIN, Cell, Stage
from vitcli.study.claims import Claims
from vitcli.study.runner import FAILED, Runner, is_over

ROOT = Path(__file__).parents[1]
WORK = "echo x >> starts; touch done"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "command", shell)
    monkeypatch.setattr(runner, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.05)


def shell(stage: Stage) -> list[str]:
    return ["sh", "-c", f"cd '{stage.done.parent}'; {stage.words[0]}"]


def make_cell(out: Path, name: str, *commands: str, printing: str | None = None, trial: bool = False) -> Cell:
    """Return a cell; each command must make the file `done`, `done1`, ...; what the last one prints is its result."""
    folder = out / "cells" / name
    stages = [
        Stage(f"stage{place}", (command,), folder / ("done" if place == 0 else f"done{place}"))
        for place, command in enumerate(commands)
    ]
    if printing is not None:
        stages.append(Stage("print", (printing,), folder / "printed", folder / "printed"))
    return Cell(PLAIN, name, 100, 0, trial, {}, folder, tuple(stages), 10, 4, (), 1, 1, 3)


def run(
    out: Path,
    cells: Sequence[Cell] | Callable[[], Sequence[Cell]],
    *,
    jobs: int = 1,
    stop: StopSignals | None = None,
    said: list[str] | None = None,
) -> dict[str, str]:
    """Run cells to their end; return problems by name."""
    slots = [{"SLOT": str(place)} for place in range(jobs)]
    runner = Runner(
        out,
        slots=slots,
        prepare=lambda cell: (cell.folder / "settings").touch(),
        report=lambda ended: None,
        say=(said if said is not None else []).append,
    )
    problems = runner.run(cells if callable(cells) else lambda: cells, stop=stop or StopSignals())
    return {folder.name: why for folder, why in problems.items()}


def starts(cell: Cell) -> int:
    try:
        return len((cell.folder / "starts").read_text().split())
    except FileNotFoundError:
        return 0


# ---------------------------------------------------------------- one process


def test_stages_follow_each_other_and_are_not_repeated(tmp_path: Path) -> None:
    cells = [
        make_cell(
            tmp_path, name, "test -e settings && " + WORK, "test -e done && touch done1", printing="echo result; echo note >&2"
        )
        for name in ("a", "b")
    ]
    said: list[str] = []
    assert run(tmp_path, cells, said=said) == {}
    assert [line.split(": ")[1].split(",")[0] for line in said] == ["begins", "done in 00:00"] * 2
    assert all(is_over(cell) and (cell.folder / "printed").read_text() == "result\n" for cell in cells)
    log = (tmp_path / "logs" / "cells-a.txt").read_text()
    assert "note" in log and log.count("$ vit ") == 3
    assert run(tmp_path, cells, said=said) == {} and len(said) == 4 and starts(cells[0]) == 1
    (cells[0].folder / "printed").unlink()
    run(tmp_path, cells)
    assert (cells[0].folder / "printed").exists() and starts(cells[0]) == 1  # only what is missing
    assert not list(tmp_path.rglob(".tmp-*")) and not list(tmp_path.rglob(".holder"))


def test_cells_side_by_side_have_a_place_each(tmp_path: Path) -> None:
    cells = [make_cell(tmp_path, name, "echo $SLOT > slot; sleep 0.2; touch done") for name in "abcd"]
    run(tmp_path, cells, jobs=2)
    assert sorted((cell.folder / "slot").read_text() for cell in cells) == ["0\n", "0\n", "1\n", "1\n"]


def test_a_failing_cell_does_not_stop_the_others(tmp_path: Path) -> None:
    bad = make_cell(tmp_path, "b", "echo x >> starts; echo 'vit: no such thing; mend it' >&2; test -e mended && touch done")
    idle = make_cell(tmp_path, "c", "echo x >> starts")
    cells = [make_cell(tmp_path, "a", WORK), bad, idle, make_cell(tmp_path, "d", WORK, printing="echo half; exit 1")]
    problems = run(tmp_path, cells)
    assert problems["b"] == "stage0: no such thing; mend it" and "is not there" in problems["c"]
    assert set(problems) == {"b", "c", "d"} and is_over(cells[0]) and not (cells[3].folder / "printed").exists()
    assert starts(bad) == 1  # once is enough for one call
    (bad.folder / "mended").touch()
    assert set(run(tmp_path, cells)) == {"c", "d"}  # the next call tries again
    assert is_over(bad) and not (bad.folder / FAILED).exists() and starts(idle) == 2


def test_divergence_is_a_result(tmp_path: Path) -> None:
    cell = make_cell(
        tmp_path, "a", "echo x >> starts; echo 'vit: loss or gradient not finite in 5 steps' >&2; exit 2", trial=True
    )
    for _ in range(2):
        assert "not finite" in run(tmp_path, [cell])["a"]
    record = read_json(cell.folder / FAILED)
    assert starts(cell) == 1 and record is not None and record["diverged"]


def test_a_failure_elsewhere_is_not_repeated_here(tmp_path: Path) -> None:
    """Two calls run at once: what failed in one is not tried by the other, which had begun before."""
    gate = tmp_path / "gate"
    slow = make_cell(tmp_path, "a", f"while ! test -e {gate}; do sleep 0.01; done; touch done")
    bad = make_cell(tmp_path, "b", "echo x >> starts; exit 1")
    found: list[dict[str, str]] = []
    first = threading.Thread(target=lambda: found.append(run(tmp_path, [slow, bad])))
    second = threading.Thread(target=lambda: found.append(run(tmp_path, [bad, slow])))
    first.start()
    try:
        wait_until(lambda: (tmp_path / "logs" / "cells-a.txt").exists(), "the first cell")
        second.start()
        wait_until(lambda: (bad.folder / FAILED).exists(), "the failure")
    finally:
        gate.touch()
    first.join()
    second.join()
    assert starts(bad) == 1 and [set(problems) for problems in found] == [{"b"}, {"b"}]


def test_what_a_search_chooses_comes_after_its_trials(tmp_path: Path) -> None:
    trials = [make_cell(tmp_path, name, WORK, trial=True) for name in "ab"]
    final = make_cell(tmp_path, "final", "test -e ../a/done && test -e ../b/done && touch done")

    def todo() -> list[Cell]:
        return [*trials, *([final] if all(map(is_over, trials)) else [])]

    assert run(tmp_path, todo, jobs=2) == {} and is_over(final)


def test_a_full_disk_ends_all(tmp_path: Path) -> None:
    other = make_cell(tmp_path, "a", "trap 'touch saved; exit 143' TERM; while :; do sleep 0.02; done")
    full = make_cell(tmp_path, "b", "echo 'vit: x: cannot be written (No space left on device)' >&2; exit 2")
    rest = make_cell(tmp_path, "c", WORK)
    with pytest.raises(UserError, match="no room left"):
        run(tmp_path, [other, full, rest], jobs=2)
    assert (other.folder / "saved").exists() and starts(rest) == 0
    assert not list(tmp_path.rglob(FAILED)) and not list(tmp_path.rglob(".holder"))


# ---------------------------------------------------------------- signals


def test_a_signal_ends_all_and_the_next_call_goes_on(tmp_path: Path) -> None:
    save = (
        "echo x >> starts; trap 'touch saved; exit 143' TERM; test -e saved && touch done && exit; while :; do sleep 0.02; done"
    )
    cells = [make_cell(tmp_path, name, save) for name in "ab"]
    stop, said = StopSignals(), list[str]()

    def interrupt() -> None:
        wait_until(lambda: starts(cells[0]) == 1, "the start")
        time.sleep(0.05)  # for the trap
        stop.received = signal.SIGTERM

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        run(tmp_path, cells, stop=stop, said=said)
    thread.join()
    assert (cells[0].folder / "saved").exists() and starts(cells[1]) == 0 and "stopping 1 cell" in said[-1]
    assert not list(tmp_path.rglob(".holder")) and not list(tmp_path.rglob(FAILED))
    (cells[1].folder).mkdir(exist_ok=True)
    (cells[1].folder / "saved").touch()
    assert run(tmp_path, cells) == {} and starts(cells[0]) == 2


def test_a_cell_that_was_taken_over_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.0)
    cell = make_cell(tmp_path, "a", "test -e taken && touch done && exit; touch taken; sleep 60")
    said: list[str] = []

    def take() -> None:
        wait_until(lambda: (cell.folder / "taken").exists(), "the start")
        (cell.folder / ".holder").write_text('{"machine": "another"}')
        wait_until(lambda: any("left to that" in text for text in said), "the loss")
        (cell.folder / ".holder").unlink()  # the other one is through with it

    thread = threading.Thread(target=take)
    thread.start()
    assert run(tmp_path, [cell], said=said) == {}
    thread.join()
    assert is_over(cell)


# ---------------------------------------------------------------- several processes


DRIVER = """
import sys
from pathlib import Path
from vitcli.study import runner as study_run
from vitcli.interrupts import StopSignals
from vitcli.study.cells import Cell, Stage
study_run.TICK_SECONDS, study_run.LOOK_SECONDS = 0.01, 0.05
study_run.command = lambda stage: ["sh", "-c", f"cd '{stage.done.parent}'; {stage.words[0]}"]
out, work, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
cells = []
for name in names:
    folder = out / "cells" / name
    stage = Stage("stage0", (work,), folder / "done")
    cells.append(Cell("plain", name, 100, 0, False, {}, folder, (stage,), 10, 4, (), 1, 1, 3))
runner = study_run.Runner(out, slots=[{}], prepare=lambda cell: None, report=lambda ended: None, say=print)
stop = StopSignals()
with stop.installed(), stop.deferred():
    sys.exit(bool(runner.run(lambda: cells, stop=stop)))
"""


def drive(out: Path, work: str, names: str) -> subprocess.Popen[bytes]:
    """Start another process on the same folder, in a process group of its own."""
    command = [sys.executable, "-c", DRIVER, str(out), work, names]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    work, names = "echo x >> starts; sleep 0.05; touch done", "abcdefgh"
    cells = [make_cell(tmp_path, name, work) for name in names]
    processes = [drive(tmp_path, work, names) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert [starts(cell) for cell in cells] == [1] * len(cells)


def test_the_command_of_a_killed_process_is_waited_for(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    work = f"echo x >> starts; while ! test -e {gate}; do sleep 0.02; done; touch done"
    cells = [make_cell(tmp_path, name, work) for name in "ab"]
    process = drive(tmp_path, work, "ab")
    wait_until(lambda: starts(cells[0]) == 1, "the start")
    process.kill()
    process.wait()
    said: list[str] = []
    thread = threading.Thread(target=lambda: run(tmp_path, cells, said=said))
    thread.start()
    try:
        wait_until(lambda: starts(cells[1]) == 1, "the second cell")  # the first one is left to what was started
        assert starts(cells[0]) == 1 and Claims().take(cells[0].folder) is None
    finally:
        gate.touch()
    thread.join()
    assert [starts(cell) for cell in cells] == [1, 1] and all(map(is_over, cells))


def test_a_process_killed_with_its_command_loses_that_cell_alone(tmp_path: Path) -> None:
    work = "echo x >> starts; test $(ls .. | grep -c b) = 0 || test -e killed || sleep 60; touch done"
    cells = [make_cell(tmp_path, name, work) for name in "abc"]
    process = drive(tmp_path, work, "abc")
    wait_until(lambda: starts(cells[1]) == 1, "the second cell")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert is_over(cells[0]) and not is_over(cells[1])
    for cell in cells:
        cell.folder.mkdir(exist_ok=True)
        (cell.folder / "killed").touch()
    assert run(tmp_path, cells) == {}
    assert [starts(cell) for cell in cells] == [1, 2, 1]


def test_the_second_interrupt_does_not_cut_the_saving_short(tmp_path: Path) -> None:
    work = "trap 'touch saving; sleep 0.3; touch saved; exit 130' INT TERM; touch ready; while :; do sleep 0.02; done"
    cell = make_cell(tmp_path, "a", work)
    process = drive(tmp_path, work, "a")
    wait_until(lambda: (cell.folder / "ready").exists(), "the start")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: (cell.folder / "saving").exists(), "the saving")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0
    assert (cell.folder / "saved").exists() and not (cell.folder / ".holder").exists()
