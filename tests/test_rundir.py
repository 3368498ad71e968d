"""The run directory: one writer, whole files, and what made the numbers."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vitcli import rundir
from vitcli.config_file import flatten
from vitcli.errors import RunExistsError, UserError
from vitcli.rundir import build_manifest, differing_keys, git_revision, lock_run, read_json, write_json, write_text


def start_holder(run_dir: Path, code: str) -> subprocess.Popen[str]:
    """Start a process that holds the lock of `run_dir` while it runs `code`, and wait until it has it."""
    program = f"""
import os, sys, time
from pathlib import Path
from vitcli.rundir import lock_run
with lock_run(Path(sys.argv[1])):
{code}
    print("held", flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    holder = start_holder(run_dir, "    pass")
    try:
        with pytest.raises(RunExistsError, match=f"pid {holder.pid}"), lock_run(run_dir):
            pass
        with lock_run(tmp_path / "runs" / "b"):  # another run is free
            pass
    finally:
        holder.kill()
        holder.communicate()
    with lock_run(run_dir):
        pass


def test_loader_processes_do_not_keep_a_dead_runs_lock(tmp_path: Path) -> None:
    code = "    if os.fork() == 0:\n        time.sleep(6)\n        os._exit(0)"
    holder = start_holder(tmp_path, code)
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 4  # its child is still asleep then, but may not have come to its first instruction yet
    while True:
        try:
            with lock_run(tmp_path):
                break
        except RunExistsError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    holder.communicate()


def test_a_fork_does_not_unlock_its_parent(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=os.getpid)
        child.start()
        child.join()
        assert child.exitcode == 0
        with pytest.raises(RunExistsError), lock_run(tmp_path):
            pass
    with lock_run(tmp_path):
        pass


def test_lock_ends_with_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_run(tmp_path):
        raise KeyError
    with lock_run(tmp_path):
        pass


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), lock_run(tmp_path / "file" / "run"):
        pass


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    assert read_json(path) is None
    write_json(path, {"top1": 0.5, "name": "dög"})
    assert read_json(path) == {"top1": 0.5, "name": "dög"}

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"summary\.json: cannot be written \(No space left on device\)"):
        write_text(path, "new")
    assert read_json(path) == {"top1": 0.5, "name": "dög"}
    assert [item.name for item in tmp_path.iterdir()] == ["summary.json"]


def test_leftovers_of_a_kill_go_with_the_next_lock(tmp_path: Path) -> None:
    (tmp_path / ".tmp-config.yaml-4711").write_text("half")
    with lock_run(tmp_path):
        assert [item.name for item in tmp_path.iterdir()] == [".lock"]


def test_a_stranger_among_the_leftovers_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".tmp-mine").mkdir()
    with lock_run(tmp_path):
        assert (tmp_path / ".tmp-mine").is_dir()


def test_what_is_no_plain_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    os.mkfifo(path)
    with pytest.raises(RunExistsError, match=r"manifest\.json: not a file of ours"):
        read_json(path)
    path.unlink()
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(RunExistsError, match=r"manifest\.json: not a file of ours"):
        read_json(path)


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "summary.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000, '{"step": ' + "9" * 10_000 + "}"])
def test_malformed_json_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunExistsError, match=r"manifest\.json"):
        read_json(tmp_path / "manifest.json")


def test_manifest(tmp_path: Path) -> None:
    manifest = build_manifest(hardware="a chip, 1 threads", data={"train": {"fingerprint": "f"}}, command=["vit", "pretrain"])
    assert manifest["command"] == ["vit", "pretrain"]
    assert manifest["versions"]["python"] == sys.version.split()[0]
    assert manifest["versions"]["torch"][0].isdigit()
    assert manifest["hardware"]["device"] == "a chip, 1 threads"
    assert manifest["hardware"]["cpu_cores"] >= 1
    assert manifest["data"] == {"train": {"fingerprint": "f"}}
    assert manifest["started"].endswith("+00:00")
    assert json.loads(json.dumps(manifest)) == manifest
    assert git_revision(tmp_path / "file.py") is None


def fake_git(*, tracked: bool, status: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if "ls-files" in command and not tracked:
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, "0123abc\n" if "rev-parse" in command else status, "")

    return run


@pytest.mark.parametrize(
    ("tracked", "status", "expected"),
    [(True, "", "0123abc"), (True, " M src/vitcli/cli.py\n", "0123abc-dirty"), (False, "", None)],
)
def test_git_revision(tracked: bool, status: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_git(tracked=tracked, status=status))
    assert git_revision(Path("rundir.py")) == expected


def test_git_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_revision(Path(rundir.__file__)) is None


def test_differing_keys() -> None:
    a = {"seed": 0, "optim": {"lr": 1e-3, "betas": (0.9, 0.99)}, "model": {"variant": "Ti/16"}, "train": {"epochs": 3}}
    same = {"train": {"epochs": 3.0}, "model": {"variant": "Ti/16"}, "optim": {"betas": [0.9, 0.99], "lr": 0.001}, "seed": 0}
    assert differing_keys(a, same) == []
    other = {**same, "seed": 1, "optim": {"lr": 3e-3, "betas": [0.9, 0.99], "clip": None}, "model": {}}
    assert differing_keys(a, other) == ["model", "model.variant", "optim.clip", "optim.lr", "seed"]
    assert differing_keys({"flip": True}, {"flip": 1}) == ["flip"]
    assert differing_keys({"out": Path("runs/a")}, {"out": "runs/a"}) == []


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, {"x": 2}]}, "e": {}, "f": None}) == {
        "a.b.c": 1,
        "a.d": [1, {"x": 2}],
        "e": {},
        "f": None,
    }
