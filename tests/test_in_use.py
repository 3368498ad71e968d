"""Who reads a directory's files is noticed, ours and others, and nobody is harmed by the look."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from vitcli.in_use import held, unread


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "step_00000001"
    directory.mkdir()
    for name in ("manifest.json", "model.safetensors"):
        (directory / name).write_text(name)
    return directory


def alone(directory: Path) -> bool:
    with unread(directory) as nobody_reads:
        return nobody_reads()


def test_nobody_reads(folder: Path) -> None:
    assert alone(folder)
    assert alone(folder)  # the look leaves nothing behind
    assert (folder / "model.safetensors").read_text() == "model.safetensors"


def test_our_own_readers_count_where_leases_are_not_to_be_had(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def no_leases(descriptor: int, command: int, argument: Any = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", no_leases)
    with open(folder / "model.safetensors"):
        assert alone(folder)  # nobody can tell
    with held(folder / "manifest.json"):
        assert not alone(folder)
        with held(folder / "manifest.json"):  # readers do not mind each other
            assert not alone(folder)
        assert not alone(folder)
    assert alone(folder)


def test_readers_count_where_locks_are_not_to_be_had(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with held(folder / "manifest.json"):
        assert not alone(folder)
    assert alone(folder)


def test_another_process_with_a_file_open(folder: Path) -> None:
    code = "import sys; file = open(sys.argv[1]); print('open', flush=True); input()"
    command = [sys.executable, "-c", code, str(folder / "model.safetensors")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
        assert not alone(folder)
        reader.communicate("\n")
    assert alone(folder)


def test_who_comes_inside_the_block_is_noticed_and_served(folder: Path) -> None:
    read: list[str] = []
    comer = threading.Thread(target=lambda: read.append((folder / "model.safetensors").read_text()))
    with unread(folder) as nobody_reads:
        assert nobody_reads()
        comer.start()
        comer.join(0.2)
        assert not nobody_reads()
        assert read == []
    comer.join(30)
    assert read == ["model.safetensors"]


def test_a_forked_process_takes_no_lock_along(folder: Path) -> None:
    with held(folder / "manifest.json"):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        descriptor = os.open(folder / "manifest.json", os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child still has the file open, not locked
        os.close(descriptor)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_what_is_no_plain_file_is_passed_over(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    assert alone(folder)
    with pytest.raises(FileNotFoundError), held(folder / "nothing"):
        pass
